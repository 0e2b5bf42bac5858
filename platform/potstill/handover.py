"""What the nodes of a cluster hand each other where they share no storage.

Runs, and what they are made from, lie on the driver's node: on a cluster the head. A process on another node that
sees the same folder (a shared mount, or the same machine) works in it directly; any other one asks the driver's
node: it is sent files, and sends back what it has made.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import os
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from potstill import runs, storage
from potstill.data import store
from potstill.errors import UserError

if TYPE_CHECKING:
    from potstill.config import Config

PIECE_BYTES = 16 << 20
TRIES = 3
"""How often what changes while it is copied is begun again."""
KEPT_S = 7 * 86400.0
"""Copies that nobody has used for so long are removed; sooner, where their room is needed."""

_held: dict[Path, store.Hold] = {}
_in_use: dict[Path, int] = {}
"""Of the copies that this process reads from, the open file by which others see that: it closes with the process."""


# ------------------------------------------------------------------------------- what is seen from where
@dataclass(frozen=True)
class Mark:
    """A file that is in a folder only as long as a block of the driver's runs: who sees it, sees the folder."""

    folder: str
    name: str

    def seen(self) -> bool:
        return os.path.exists(os.path.join(self.folder, self.name))


@contextmanager
def marked(folder: Path) -> Iterator[Mark]:
    for left in folder.glob(".seen-*"):  # by a driver that was killed
        with _locked(left, wait=False) as nobodys:
            if nobodys:
                left.unlink(missing_ok=True)
    mark = Mark(str(folder), f".seen-{uuid.uuid4().hex}")
    beside = folder / f".new{mark.name}"
    with _locked(beside):
        os.replace(beside, folder / mark.name)
        try:
            yield mark
        finally:
            with suppress(OSError):
                (folder / mark.name).unlink()


# ------------------------------------------------------------------------------------ the driver's node
class Desk:
    """Hands out files of this node. A Ray actor on the driver's node is made of it: see `open_desk`."""

    def files(self, path: str) -> list[tuple[str, int, int]]:
        """(path below `path`, bytes, time of change in ns) of a file ("" below itself), or of all in a folder."""
        root = Path(path)
        if root.is_file():
            info = root.stat()
            return [("", info.st_size, info.st_mtime_ns)]
        found = []
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(f for f in folders if not f.startswith("."))
            for name in sorted(n for n in names if not n.startswith(".")):
                at = Path(folder, name)
                with suppress(FileNotFoundError):  # a run prunes its checkpoints
                    info = at.stat()
                    inner = at.relative_to(root).as_posix()
                    found.append((inner, info.st_size, info.st_mtime_ns))
        return found

    def read(self, path: str, start: int) -> tuple[bytes, int, int]:
        """A piece of a file, and what `files` would say of it now."""
        with open(path, "rb") as file:
            info = os.fstat(file.fileno())
            return os.pread(file.fileno(), PIECE_BYTES, start), info.st_size, info.st_mtime_ns

    def call(self, kind: type[runs.RunFolder], run_dir: Path, name: str, *arguments: Any) -> Any:
        """What a RunFolder's method returns, of a run on this node."""
        return getattr(kind(run_dir), name)(*arguments)


class FarFolder(runs.RunFolder):
    """A run's folder on the driver's node, seen from another one."""

    def __init__(self, desk: Any, run_dir: Path, kind: type[runs.RunFolder] = runs.RunFolder):
        super().__init__(run_dir)
        self._desk, self._kind = desk, kind

    def ask(self, name: str, *arguments: Any) -> Any:
        """Let the folder's method be called where it lies."""
        return asked(self._desk.call.remote(self._kind, self.run_dir, name, *arguments))

    def append(self, records: list[runs.Record]) -> None:
        self.ask("append", records)

    def journal(self) -> list[runs.Record]:
        return self.ask("journal")

    def last_attempt(self) -> int:
        return self.ask("last_attempt")

    def keep(self, step: int, contents: dict[str, bytes], meta: dict[str, Any]) -> runs.Checkpoint:
        return self.ask("keep", step, contents, meta)

    def newest(self) -> tuple[runs.Checkpoint | None, list[str]]:
        """With the checkpoint's folder as it is there: see `bring`."""
        return self.ask("newest")

    def bring(self, checkpoint: runs.Checkpoint) -> runs.Checkpoint:
        """A copy of it on this node, whole. Raises UserError."""
        return runs.load_checkpoint(fetched(self._desk, str(checkpoint.folder), _is_checkpoint))


def open_desk(kind: type, *arguments: Any) -> Any:
    """An actor of this class (a Desk) on this node, the driver's. It takes no cores; calls do not wait for each other."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here: Any = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "scheduling_strategy": here, "max_concurrency": 8}
    return ray.remote(kind).options(**options).remote(*arguments)


# ---------------------------------------------------------------------------------------- another node
# <copies_dir>/
#     fetched-<mark>/         a copy, whole; .use in it is held by those who read from it
#     .<name>.tmp             a folder that is being made, or removed
#     .<name>.lock            held by who does so
#     cache/                  prepared sets: see data/store.py
Listed = tuple[str, int, int]
"""As `Desk.files` has it."""


class _Changed(Exception):
    """A file is no longer what was listed."""


def fetched(desk: Any, path: str, sound: Callable[[Path], bool] = lambda _: True) -> Path:
    """A copy on this node of a file or folder of the driver's, under the same name. Made once a node; it stays as long
    as this process lives. `sound`: whether a copy that is there will do.

    Raises UserError where there is nothing to copy, or no room.
    """
    root, name = _copies(), Path(path).name
    for _ in range(TRIES):
        listed: list[Listed] = asked(desk.files.remote(path))
        if not listed:
            raise UserError(f"{path} must exist on the driver's node, but it does not")
        mark = hashlib.sha256(repr((path, listed)).encode()).hexdigest()[:16]
        folder = root / f"fetched-{mark}"
        with suppress(_Changed), _workplace(folder) as beside:
            if folder.is_dir() and not sound(folder / name):
                os.replace(folder, beside)
                shutil.rmtree(beside)
            if not folder.is_dir():
                needed = sum(size for _, size, _ in listed)
                try:
                    _make_room(root, needed)
                    for each in listed:
                        _copy(desk, _below(path, each), beside / name / each[0])
                    os.replace(beside, folder)
                except OSError as error:
                    what = f"a copy of {path} ({store.gigabytes(needed)})"
                    raise _no_room(root, what, error) from None
            _use(folder)
            return folder / name
    raise UserError(
        f"{path} must not change while it is copied to {os.uname().nodename}, but it did, {TRIES} times; start again when "
        "what writes it has ended"
    )


def fetched_set(desk: Any, cache_dir: Path, local_dir: str | None, max_gb: float | None) -> Path:
    """A copy on this node of a prepared set of the driver's; it stays as long as this process lives.

    Shards are compared with their SHA-256. Raises UserError where there is no room.
    """
    root = storage.local_folder(local_dir) if local_dir else _copies() / "cache"
    folder = root / cache_dir.name
    listed = {f[0]: f for f in asked(desk.files.remote(str(cache_dir))) if "/" not in f[0]}

    def missing() -> list[Listed]:
        return [f for f in listed.values() if not _is_there(folder / f[0], f[1])]

    for other in [f for f in _held if f != folder]:
        _held.pop(other).release()  # a trial before this one has read it in this process
    with store.locked(root):
        needed = sum(size for _, size, _ in missing())
        room = store.make_room(root, folder, needed, max_gb)
        if not room.fits:
            raise _no_room_for_set(root, cache_dir, needed, room.free_bytes)
        folder.mkdir(exist_ok=True)
        (folder / ".lock").touch()
        if folder not in _held:
            _held[folder] = store.Hold(folder, f"copy of {cache_dir}")
    try:
        with _locked(folder / ".fetch"):
            said = b"".join(_pieces(desk, _below(cache_dir, listed["manifest.json"])))
            sums = {shard["file"]: shard["sha256"] for shard in json.loads(said)["shards"]}
            # the manifest last: with it the set is complete
            for each in sorted(missing(), key=lambda f: f[0] == "manifest.json"):
                _copy(desk, _below(cache_dir, each), folder / each[0], sums.get(each[0]))
    except _Changed as changed:
        raise UserError(
            f"cache: {changed} changed while it was copied to {os.uname().nodename}; start again"
        ) from None
    except OSError as error:
        free = shutil.disk_usage(root).free
        raise _no_room_for_set(root, cache_dir, needed, free, error) from None
    return folder


def _below(path: str | Path, listed: Listed) -> Listed:
    """What was listed of a file or folder, with its whole path."""
    return (str(Path(path, listed[0])), *listed[1:])


def brought(config: Config, cache_dir: Path, desk: Any) -> Path:
    """To a node that does not see the driver's folders, what a training reads of them. Returns the set's folder here.

    `config` is changed to name the copies. Raises UserError where there is no room.
    """

    from potstill.config import NAMED_WEIGHTS

    def here(path: Any) -> Any:
        # a name of published weights is no path, nor is what only this node has
        return str(fetched(desk, path)) if path and asked(desk.files.remote(path)) else path

    for one in (vars(config.teacher), *config.teachers.values()):
        # without a name that is looked up there, weights_dir says nothing, and may be large
        named = one.get("weights") in NAMED_WEIGHTS
        for key in ("run", "soft_labels", "weights", *(["weights_dir"] if named else [])):
            if one.get(key):
                one[key] = here(one[key])
    config.model["init_from"] = here(config.model.get("init_from"))
    if (cache_dir / "manifest.json").exists():
        return cache_dir  # on storage that all nodes see, though the runs are not
    return fetched_set(desk, cache_dir, config.cache.local_dir, config.cache.max_gb)


def _is_there(path: Path, size: int) -> bool:
    with suppress(FileNotFoundError):
        return path.stat().st_size == size
    return False


def _copy(desk: Any, listed: Listed, target: Path, sha256: str | None = None) -> None:
    """Copied beside its name, synced, renamed: what has its name is whole, whatever happens to this node. `listed`: with
    its whole path. Raises _Changed, and OSError of this node's disk."""
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.tmp")
    digest = hashlib.sha256()
    try:
        with open(beside, "wb") as sink:
            for piece in _pieces(desk, listed):
                sink.write(piece)
                if sha256:
                    digest.update(piece)
            sink.flush()
            os.fsync(sink.fileno())
        if sha256 and digest.hexdigest() != sha256:
            raise UserError(
                f"cache: {listed[0]} is damaged: its SHA-256 does not match; run jobs/prepare.py with the same data and "
                "cache keys and cache.verify=true: only what is damaged is built again"
            )
        os.replace(beside, target)
    finally:
        beside.unlink(missing_ok=True)


def _pieces(desk: Any, listed: Listed) -> Iterator[bytes]:
    """The content of a file of the driver's. Raises _Changed where it is no longer what was listed."""
    path, size, changed_ns = listed
    starts = range(0, size, PIECE_BYTES)
    # the next piece is on its way while this one is taken
    coming = [desk.read.remote(path, start) for start in starts[:2]]
    for i, start in enumerate(starts):
        try:
            piece, *now = asked(coming.pop(0))
        except FileNotFoundError:
            raise _Changed(path) from None
        except OSError as error:
            raise UserError(
                f"{path} must be readable on the driver's node, got {error.strerror or error}"
            ) from None
        if now != [size, changed_ns] or len(piece) != min(PIECE_BYTES, size - start):
            raise _Changed(path)
        if i + 2 < len(starts):
            coming.append(desk.read.remote(path, starts[i + 2]))
        yield piece


def _is_checkpoint(folder: Path) -> bool:
    with suppress(UserError):
        runs.load_checkpoint(folder)
        return True
    return False


T = TypeVar("T")


def made(mark: Mark, make: Callable[[Path], T]) -> tuple[T, dict[str, bytes]]:
    """Let `make` write files into the marked folder. Where it is not seen from here they are returned, by name."""
    if mark.seen():
        return make(Path(mark.folder)), {}
    root = _copies()
    try:
        _make_room(root)
        with _workplace(root / f"made-{uuid.uuid4().hex}") as beside:
            beside.mkdir()
            result = make(beside)
            files = sorted(f for f in beside.iterdir() if not f.name.startswith("."))
            return result, {f.name: f.read_bytes() for f in files}
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise _no_room(root, f"what is made for {mark.folder}", error) from None


def taken(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write what `made` has returned, in its order."""
    for name, content in files.items():
        runs.atomic_write(folder / name, content)


# ------------------------------------------------------------------------------- the folder of the copies
def _copies() -> Path:
    root = storage.copies_dir()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)  # weights and images are nobody else's
    except OSError as error:
        raise UserError(
            f"POTSTILL_HOME must be a folder that can be written, got {str(root.parent)!r} on {os.uname().nodename} "
            f"({error.strerror}); it takes the copies of what this node does not see"
        ) from None
    return root


def _make_room(root: Path, needed: int = 0) -> None:
    """Remove what killed processes have left and, of the copies that nobody uses, those that are old and as many others
    as it takes. Raises OSError where there is no room even so."""
    for left in root.glob(".*.tmp"):
        with _workplace(root / left.stem[1:], wait=False):
            pass
    wanted = needed * store.SPACE_MARGIN
    for copy in sorted(root.glob("fetched-*"), key=_last_used):
        if _last_used(copy) > time.time() - KEPT_S and shutil.disk_usage(root).free >= wanted:
            break
        with _workplace(copy, wait=False) as beside, suppress(FileNotFoundError):
            if beside is not None and _is_unused(copy):
                os.replace(copy, beside)  # first: a part of it must not be taken for all of it
    if shutil.disk_usage(root).free < wanted:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _no_room(root: Path, what: str, why: OSError) -> UserError:
    free = store.gigabytes(shutil.disk_usage(root).free)
    return UserError(
        f"POTSTILL_HOME must have room for {what} on every node that does not see it, got {free} free at {str(root)!r} on "
        f"{os.uname().nodename} ({why.strerror}); free some, set POTSTILL_HOME to a larger disk, or keep it on storage that "
        "all nodes see"
    )


def _no_room_for_set(
    root: Path, cache_dir: Path, needed: int, free_bytes: int, why: OSError | None = None
) -> UserError:
    said = f" ({why.strerror})" if why else ""
    return UserError(
        f"cache.local_dir must have {store.gigabytes(needed)} free on every node, for a copy of the set {cache_dir.name}, "
        f"got {store.gigabytes(free_bytes)} at {str(root)!r} on {os.uname().nodename}{said}; raise cache.max_gb, set "
        "cache.local_dir to a larger disk, or keep cache.dir on storage that all nodes see"
    )


@contextmanager
def _workplace(folder: Path, wait: bool = True) -> Iterator[Any]:
    """A path beside `folder` at which this process alone makes or removes it; what is there after, or was left there by a
    process that was killed, goes. Not with `wait`: None where another one is at it."""
    beside, lock = (folder.with_name(f".{folder.name}.{end}") for end in ("tmp", "lock"))
    with _locked(lock, wait) as mine:
        if not mine:
            yield None
            return
        shutil.rmtree(beside, ignore_errors=True)
        try:
            yield beside
        finally:
            shutil.rmtree(beside, ignore_errors=True)
            lock.unlink(missing_ok=True)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Whether no other process holds this file; with `wait`, none does."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(handle)
            yield False
            return
        if store.is_same(handle, path):
            break
        os.close(handle)  # who held it has removed it
    try:
        yield True
    finally:
        os.close(handle)


def _use(copy: Path) -> None:
    """Nobody removes it as long as this process lives."""
    os.utime(copy)
    handle = _in_use.pop(copy, None)
    if handle is None or not store.is_same(handle, copy / ".use"):
        if handle is not None:
            os.close(handle)
        handle = os.open(copy / ".use", os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(handle, fcntl.LOCK_SH)
    _in_use[copy] = handle


def _last_used(copy: Path) -> float:
    with suppress(FileNotFoundError):
        return copy.stat().st_mtime
    return math.inf


def _is_unused(copy: Path) -> bool:
    with _locked(copy / ".use", wait=False) as unused:
        return unused


def asked(answer: Any) -> Any:
    """What a call of the desk returns; what it raises there is raised here as it was."""
    import ray
    import ray.exceptions

    try:
        return ray.get(answer)
    except ray.exceptions.RayTaskError as error:
        raise error.cause from None
