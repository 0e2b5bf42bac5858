"""A folder of this machine and its copy in an object store.

Nothing in the store is renamed, and nothing is appended to. A journal is a series of numbered segments,
journal/00000001.jsonl and so on, of which the last one is put again as it grows; a checkpoint's or a set's other files
are put before the meta.json or manifest.json that makes them valid, and removed after it.

The copy is what is left when the folder is lost, so nothing is removed from it because the folder lacks it: only what
this process has had here, and has removed since.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from potstill import runs
from potstill.claim import OWNER
from potstill.data.files import Place, at_once
from potstill.errors import UserError

JOURNAL_S = 60.0
"""So long a journal waits that has little to say, and no checkpoint to go with."""
SEGMENT_BYTES, TAIL_BYTES = 1 << 20, 64
LISTINGS = 3
CHUNK_BYTES, IN_FLIGHT_BYTES = 1 << 22, 1 << 24
"""Of one file; as many files as `at_once` has threads are on their way together."""
JOURNAL = "journal.jsonl"
COMMITS = ("meta.json", "manifest.json", "summary.json")

Seen = tuple[int, int]
"""A file's bytes, and the time of its last change here in ns; -1: unknown."""


class GoneApart(UserError):
    """A folder and its copy hold different courses of one run."""


class Replica:
    """One folder and its copy."""

    def __init__(self, folder: Path, place: Place) -> None:
        self.folder, self.place = folder, place
        self._sent: dict[str, Seen] = {}
        """What the copy has, as it was here, by name."""
        self._had: set[str] = set()
        """What has been here in this process's time, and what it knows to have been given up."""
        self._journals: dict[str, _Journal] = {}
        """What the copy has of them, by the folder that they are of."""
        self._metas: dict[str, bytes] = {}
        """The copy's meta.json by checkpoint; as they were when the copy was listed."""
        self._listed = False
        self._pushes = threading.Lock()

    # ------------------------------------------------------------------------------------- from there
    def pull(self) -> bool:
        """Bring the folder up to its copy. Returns whether there is one.

        A run's journal tells which side is ahead. Where it is the copy, the folder becomes what the copy is; else it gets
        back what it has lost. What has no journal (a set) is taken where it is missing or of another size. What is
        unfinished there (a checkpoint without its meta.json) is left.

        Raises OSError, UserError where the two have gone different ways.
        """
        for again in reversed(range(LISTINGS)):
            try:
                return self._pull()
            except FileNotFoundError:  # who writes there has removed something since it was listed
                if not again:
                    raise
        raise AssertionError("LISTINGS is at least 1")

    def _pull(self) -> bool:
        there = self._look()
        found = zip(self._journals, at_once(self._ahead, list(self._journals)), strict=True)
        ahead = {scope: journal for scope, journal in found if journal}
        whole = [n for n in there if self._is_committed(n) and not _is_segment(n) and n != OWNER]
        wanted = [n for n in whole if self._is_wanted(n, there[n], ahead)]
        for late in (False, True):
            at_once(self._fetch, [n for n in wanted if (_name(n) in COMMITS) == late])
        self._give_up(ahead)
        for scope, journal in ahead.items():  # last: with it, this is as far as the copy
            runs.atomic_write(self.folder / scope / JOURNAL, journal)
        for name in wanted:
            info = (self.folder / name).stat()
            self._sent[name] = (info.st_size, info.st_mtime_ns)
        self._had |= {n for n in whole if (self.folder / n).exists()}
        return bool(there)

    def _look(self) -> dict[str, int]:
        """Bytes of every object below the place; what is known of the copy starts from it."""
        there = {}
        with suppress(FileNotFoundError):
            there = {name: size for name, (size, _) in self.place.files(recursive=True)}
        self._journals = {}
        for name in sorted(filter(_is_segment, there)):
            scope = str(PurePosixPath(name).parent.parent)
            self._journals.setdefault(scope, _Journal()).sizes.append(there[name])
        found = {_checkpoint_of(name) for name in there} - {None}
        metas = [c for c in found if c is not None and f"{c}/meta.json" in there]
        read = at_once(Place.read, [self.place.join(f"{c}/meta.json") for c in metas])
        self._metas = dict(zip(metas, read, strict=True))
        same = {c for c, meta in self._metas.items() if self._meta_here(c) == meta}
        self._sent = {}
        for name, size in there.items():
            if _is_segment(name) or name == OWNER:
                continue
            info = _stat(self.folder / name)
            # of anything else it cannot be told: it is sent again where it is here
            never_changed = _checkpoint_of(name) in same or name.endswith(".arrow")
            known = never_changed and info is not None and info.st_size == size
            self._sent[name] = (size, info.st_mtime_ns if known and info else -1)
        self._listed = True
        return there

    def _ahead(self, scope: str) -> bytes | None:
        """The copy's journal, where it is ahead of the one here."""
        known, path = self._journals[scope], self.folder / scope / JOURNAL
        names = [_segment(scope, i + 1) for i in range(len(known.sizes))]
        segments = at_once(Place.read, [self.place.join(n) for n in names])
        theirs = b"".join(segments)
        known.sizes, known.tail = [len(s) for s in segments], theirs[-TAIL_BYTES:]
        ours = path.read_bytes() if path.exists() else b""
        if ours.startswith(theirs):
            return None
        if not theirs.startswith(ours[: ours.rfind(b"\n") + 1]):
            raise GoneApart(
                f"runs.dir: {path} and its copy {self.place.join(scope)} have gone different ways: each machine went on by "
                f"itself. Give this run another run.name; or move {self.folder} away (with what only it has) to go on from "
                "the copy"
            )
        return theirs

    def _is_committed(self, name: str) -> bool:
        return (checkpoint := _checkpoint_of(name)) is None or checkpoint in self._metas

    def _is_wanted(self, name: str, size: int, ahead: Collection[str]) -> bool:
        here, scope, checkpoint = _size(self.folder / name), self._scope(name), _checkpoint_of(name)
        if checkpoint is not None:
            ours = self._meta_here(checkpoint)
            if ours == self._metas[checkpoint]:
                return here != size
            return scope in ahead or (ours is None and not self._was_given_up(checkpoint))
        if scope is None or name.endswith(".arrow"):
            return here != size
        return scope in ahead or here is None

    def _was_given_up(self, checkpoint: str) -> bool:
        """Whether the copy's checkpoint is of a course that was left here: one of a later step, but older.

        Any other one that is missing here was lost, or is one too many, and goes with the next one that is written.
        """
        root = (self.folder / checkpoint).parent
        ours = [(_time(found), f.name) for f in root.glob("step-*") if (found := _read(f))]
        newest = max(ours, default=(-math.inf, ""))
        theirs = (_time(self._metas[checkpoint]), PurePosixPath(checkpoint).name)
        return theirs[0] < newest[0] and theirs[1] > newest[1]

    def _give_up(self, ahead: Collection[str]) -> None:
        """Checkpoints of courses that were left: here by the copy's journal, or there by ours."""
        for checkpoint in self._metas:
            gone = self._meta_here(checkpoint) is None and self._was_given_up(checkpoint)
            if self._scope(checkpoint) not in ahead and gone:
                self._had |= {n for n in self._sent if _checkpoint_of(n) == checkpoint}
        for scope in ahead:
            root = self.folder / scope / "checkpoints"
            inner = str(PurePosixPath(scope, "checkpoints"))
            kept = {c for c in self._metas if str(PurePosixPath(c).parent) == inner}
            for folder in root.glob("step-*") if kept else ():
                if folder.relative_to(self.folder).as_posix() not in kept:
                    shutil.rmtree(folder)

    def _scope(self, name: str) -> str | None:
        """The nearest folder around it that has a journal in the copy."""
        return next((str(p) for p in PurePosixPath(name).parents if str(p) in self._journals), None)

    def _meta_here(self, checkpoint: str) -> bytes | None:
        return _read(self.folder / checkpoint)

    def _fetch(self, name: str) -> None:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with self.place.join(name).open() as source, open(beside, "wb") as file:
                while chunk := source.read(CHUNK_BYTES):
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
                if file.tell() != source.size():
                    raise OSError(f"{self.place.join(name)} ended before its end")
            os.replace(beside, path)
        finally:
            beside.unlink(missing_ok=True)

    # --------------------------------------------------------------------------------------- to there
    def push(self, anew: bool = False, unhurried: bool = False) -> None:
        """Send what is new or has changed (`anew`: all but journals), and remove what was removed here.

        `unhurried`: a journal that has little to say waits for a checkpoint, or for JOURNAL_S. Raises OSError, and
        UserError where the folder is no longer what it was.
        """
        with self._pushes:
            self._push(anew, unhurried)

    def _push(self, anew: bool, unhurried: bool) -> None:
        if not self._listed:
            self._look()
        if anew:
            self._sent = {name: (size, -1) for name, (size, _) in self._sent.items()}
        here = self._here()
        if "." in self._journals and JOURNAL not in here:
            raise UserError(
                f"{self.folder / JOURNAL} is gone: nothing is sent, and nothing removed"
            )
        new = [n for n in here if _name(n) != JOURNAL and self._sent.get(n) != here[n]]
        commits = [n for n in new if _name(n) in COMMITS]
        for name in (n for n in here if _name(n) == JOURNAL):
            self._push_journal(str(PurePosixPath(name).parent), unhurried and not commits)
        # what is written anew is no checkpoint until all of it is there
        self._remove([n for n in commits if _checkpoint_of(n) and n in self._sent])
        self._send([n for n in new if n not in commits])
        self._send(commits)
        # who has the claim is the only writer
        gone = [n for n in self._sent if n in self._had and self._was_removed(n, here)]
        self._remove([n for n in gone if _name(n) in COMMITS])
        self._remove([n for n in gone if _name(n) not in COMMITS])

    def send(self, names: Sequence[str]) -> None:
        """Send these files, whatever else is there. Raises OSError."""
        self._send([n for n in names if _name(n) not in COMMITS])
        self._send([n for n in names if _name(n) in COMMITS])

    def _here(self) -> dict[str, Seen]:
        """Raises UserError where the folder that was here is not, OSError where it cannot be read."""
        if not self.folder.is_dir() and not self._had:
            return {}  # nothing has been made yet

        def failed(error: OSError) -> None:
            if not isinstance(error, FileNotFoundError):  # a folder that was removed in this moment
                raise error

        found: dict[str, Seen] = {}
        for folder, folders, names in os.walk(self.folder, onerror=failed):
            folders[:] = [f for f in folders if not f.startswith(".")]
            for name in (n for n in names if not n.startswith(".")):
                with suppress(FileNotFoundError):
                    info = (path := Path(folder, name)).stat()
                    seen = (info.st_size, info.st_mtime_ns)
                    found[path.relative_to(self.folder).as_posix()] = seen
        if self._had and not found:
            raise UserError(
                f"{self.folder} is gone, or empty: nothing is sent, and nothing removed"
            )
        self._had |= found.keys()
        return found

    def _was_removed(self, name: str, here: Collection[str]) -> bool:
        """Whether what is missing here was removed by who works here, and not lost with what is around it."""
        if name in here:
            return False
        scope = self._scope(name)
        if scope is not None and str(PurePosixPath(scope, JOURNAL)) not in here:
            return False
        parts = PurePosixPath(name).parts
        if "checkpoints" not in parts:
            return True
        # a run that has one is never without
        root = "/".join(parts[: parts.index("checkpoints") + 1])
        return any(n.startswith(f"{root}/") and _name(n) == "meta.json" for n in here)

    def _push_journal(self, scope: str, unhurried: bool) -> None:
        known, path = self._journals.setdefault(scope, _Journal()), self.folder / scope / JOURNAL
        done = sum(known.sizes)
        again = known.sizes[-1] if known.sizes and known.sizes[-1] < SEGMENT_BYTES else 0
        with open(path, "rb") as file:
            file.seek(done - len(known.tail))
            if file.read(len(known.tail)) != known.tail or os.fstat(file.fileno()).st_size < done:
                raise UserError(f"{path} is not the journal that was sent before")
            file.seek(done - again)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        fresh = len(whole) - again
        waits = fresh < SEGMENT_BYTES and time.monotonic() - known.sent_at < JOURNAL_S
        if fresh <= 0 or (unhurried and waits):
            return
        number = len(known.sizes) + (0 if again else 1)
        place = self.place.join(_segment(scope, number))
        with place.filesystem().open_output_stream(place.path) as sink:
            sink.write(whole)
        known.sizes[number - 1 :] = [len(whole)]
        known.tail, known.sent_at = whole[-TAIL_BYTES:], time.monotonic()

    def _send(self, names: Sequence[str]) -> None:
        for name, seen in zip(names, at_once(self._send_one, names), strict=True):
            if seen is not None:
                self._sent[name] = seen

    def _send_one(self, name: str) -> Seen | None:
        """What was sent; None where it is gone in this moment."""
        place = self.place.join(name)
        try:
            file = open(self.folder / name, "rb")  # noqa: SIM115 (only its opening may fail so)
        except FileNotFoundError:
            return None
        with file, place.filesystem().open_output_stream(place.path) as sink:
            info = os.fstat(file.fileno())
            unsent = 0
            while chunk := file.read(CHUNK_BYTES):
                sink.write(chunk)
                unsent += len(chunk)
                if unsent >= IN_FLIGHT_BYTES:  # by itself it would take all of a file into memory
                    sink.flush()
                    unsent = 0
        return info.st_size, info.st_mtime_ns

    def _remove(self, names: Sequence[str]) -> None:
        def remove(name: str) -> None:
            place = self.place.join(name)
            with suppress(FileNotFoundError):
                place.filesystem().delete_file(place.path)

        at_once(remove, names)
        for name in names:
            del self._sent[name]
            self._had.discard(name)


@dataclass
class _Journal:
    """What the copy has of one."""

    sizes: list[int] = field(default_factory=list)
    tail: bytes = b""
    """Its last bytes: a journal that has others there is another one."""
    sent_at: float = -math.inf


def _name(name: str) -> str:
    return name.rpartition("/")[2]


def _checkpoint_of(name: str) -> str | None:
    """The folder of the checkpoint that a file is of."""
    found = re.match(r"((?:.*/)?(?:checkpoints|donated/\d+)/step-\d+)/", name)
    return found[1] if found else None


def _segment(scope: str, number: int) -> str:
    return str(PurePosixPath(scope, "journal", f"{number:08d}.jsonl"))


def _is_segment(name: str) -> bool:
    path = PurePosixPath(name)
    return path.parent.name == "journal" and path.suffix == ".jsonl"


def _time(meta: bytes) -> float:
    """When a checkpoint was written."""
    with suppress(ValueError, TypeError, AttributeError):
        return float(json.loads(meta).get("time", 0.0))
    return 0.0


def _read(checkpoint: Path) -> bytes | None:
    """Its meta.json; None where it has none, or a damaged one."""
    with suppress(OSError, ValueError):
        content = (checkpoint / "meta.json").read_bytes()
        json.loads(content)
        return content
    return None


def _stat(path: Path) -> os.stat_result | None:
    with suppress(OSError):
        return path.stat()
    return None


def _size(path: Path) -> int | None:
    info = _stat(path)
    return None if info is None else info.st_size
