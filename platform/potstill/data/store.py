"""Which sets a cache folder holds, who uses them, and which go when there is no room.

<cache.dir>/
    .lock                 held for a moment by whoever makes room or takes room
    <key>/
        .lock             held by who builds the set; its content is the bytes that the build will take
        .use.*            one for each process that uses the set, held by it; it dies with the process
        .used             its time is that of the last use
        manifest.json ... see cache.py

A folder of node-local copies (`cache.local_dir`) is kept in the same way; its sets may lack shards.
"""

from __future__ import annotations

import dataclasses
import difflib
import fcntl
import hashlib
import os
import shutil
import socket
import threading
import time
import uuid
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import console
from potstill.errors import UserError
from potstill.runs import read_json
from potstill.storage import local_folder

if TYPE_CHECKING:
    from potstill import config

SPACE_MARGIN = 1.05  # files take whole blocks, and folders some more


@dataclass(frozen=True)
class StoredSet:
    """A folder of a cache folder."""

    folder: Path
    bytes: int
    """What it takes; while it is built, what it will take."""
    pending: int
    """How many of these bytes are still to be written."""
    last_used: float
    """In seconds since 1970."""
    users: tuple[str, ...]
    """What its users call themselves; who builds it is one of them."""

    @property
    def key(self) -> str:
        return self.folder.name


def stored_sets(root: Path) -> list[StoredSet]:
    """The sets below a cache folder, the least recently used first."""
    folders = [f for f in _listed(root) if not f.name.startswith(".") and (f / ".lock").exists()]
    found = []
    for folder in folders:
        with suppress(OSError):  # evicted in this moment
            found.append(_look(folder))
    return sorted(found, key=lambda s: s.last_used)


def _look(folder: Path, tries: int = 20) -> StoredSet:
    sizes, users, last_used = 0, [], 0.0
    for path in _listed(folder):
        if path.is_symlink():
            continue  # not ours
        if path.name.startswith((".use.", "..use.")):
            # its bytes do not count: a user comes without asking for room
            with suppress(FileNotFoundError):  # let go in this moment
                if path.name.startswith(".use.") and (user := _user(path)):
                    users.append(user)
            continue
        try:
            info = path.stat()
        except FileNotFoundError:
            if tries:  # it may have got its lasting name in this moment, and is not to be missed
                time.sleep(0.002)
                return _look(folder, tries - 1)
            continue  # a stale listing of a network's disk
        sizes += info.st_size
        if path.name in (".used", ".lock", "manifest.json"):
            last_used = max(last_used, info.st_mtime)
    reserved = _reserved(folder / ".lock")
    if reserved is not None:
        users.append("its builder")
    if not os.access(folder, os.W_OK | os.X_OK):
        users.append("another account")  # it cannot be removed
    pending = max(0, (reserved or 0) - sizes)
    return StoredSet(folder, sizes + pending, pending, last_used, tuple(sorted(users)))


def _listed(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:
        return []


def _reserved(lock: Path) -> int | None:
    """The bytes that a build will take; None where nobody builds."""
    handle = os.open(lock, os.O_RDONLY)
    try:
        # shared: two who look at once must not take each other for a builder
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return int(os.pread(handle, 32, 0) or 0)
    finally:
        os.close(handle)
    return None


def _user(path: Path) -> str | None:
    """Who holds a .use file; None where its process is gone."""
    try:
        handle = os.open(path, os.O_RDONLY)
    except PermissionError:
        return "another account"
    try:
        fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return os.pread(handle, 512, 0).decode(errors="replace") or "unknown"
    finally:
        os.close(handle)
    return None


# --------------------------------------------------------------------------------------------- in use
class Hold:
    """A set is in use, and is not evicted, until `release`, or until this process ends.

    Any number of processes may hold one set. `user` is what `jobs/prepare.py --list` calls this one.
    To be taken within `locked(root)`: else an eviction that has just looked would not see it.
    """

    def __init__(self, folder: Path, user: str) -> None:
        """Raises FileNotFoundError where there is no such set (any more)."""
        name = f".use.{uuid.uuid4().hex}"
        beside, path = folder / f".{name}.tmp", folder / name
        handle = os.open(beside, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        self.release = weakref.finalize(self, _let_go, handle, path)
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.pwrite(handle, f"{user}, {_this_process()}".encode(), 0)
        # only now: whoever holds the set next removes the .use files that nobody holds
        os.replace(beside, path)
        touch(folder)
        for other in folder.glob(".use.*"):
            with suppress(OSError):
                if other != path and _user(other) is None:
                    other.unlink()


def _this_process() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _let_go(handle: int, path: Path) -> None:
    with suppress(OSError):
        path.unlink()
    os.close(handle)


@contextmanager
def hold(folder: Path, user: str = "potstill") -> Iterator[None]:
    """Keep a set from being evicted as long as the block runs. Raises FileNotFoundError where it is gone."""
    with locked(folder.parent):
        held = Hold(folder, user)
    try:
        yield
    finally:
        held.release()


def touch(folder: Path) -> None:
    """The set is used now."""
    (folder / ".used").touch()


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """Keep others from making or taking room in a cache folder: for moments, not for a build."""
    root.mkdir(parents=True, exist_ok=True)
    handle = os.open(root / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


# ----------------------------------------------------------------------------------------------- room
@dataclass(frozen=True)
class Room:
    """Whether a set fits in a cache folder."""

    fits: bool
    """At once, when the sets of `evict` are gone."""
    could_fit: bool
    """When nobody uses any other set."""
    evict: tuple[StoredSet, ...]
    """Sets that nobody uses."""
    blocking: tuple[StoredSet, ...]
    """Other sets that are in use."""

    @property
    def only_here(self) -> bool:
        """Whether this process itself is all that is in the way: there is nothing to wait for."""
        users = [user for s in self.blocking for user in s.users]
        return bool(users) and all(user.endswith(_this_process()) for user in users)

    free_bytes: int
    """What the disk would have left for it, without any other set."""


def room_for(root: Path, folder: Path, needed: int, max_gb: float | None) -> Room:
    """Whether `needed` further bytes of the set at `folder` fit within `max_gb` and on the disk.

    Sets go, the least recently used first, only where there is a `max_gb`: without it nobody has said that
    they may.
    """
    stored = stored_sets(root)
    others = [s for s in stored if s.folder != folder]
    own = sum(s.bytes - s.pending for s in stored if s.folder == folder)
    limit = float("inf") if max_gb is None else max_gb * 1e9
    free = shutil.disk_usage(_existing(root)).free - sum(s.pending for s in others)

    def fits(kept: Sequence[StoredSet], gone: Sequence[StoredSet]) -> bool:
        if needed <= 0:
            return True
        within = own + needed + sum(s.bytes for s in kept) <= limit
        return within and needed * SPACE_MARGIN <= free + sum(s.bytes for s in gone)

    kept, evicted = list(others), []
    # an empty folder frees nothing: somebody may be waiting there
    for unused in [s for s in others if not s.users and s.bytes and max_gb is not None]:
        if fits(kept, evicted):
            break
        kept.remove(unused)
        evicted.append(unused)
    possible = [] if max_gb is None else others
    return Room(
        fits=fits(kept, evicted),
        could_fit=fits([s for s in others if s not in possible], possible),
        evict=tuple(evicted),
        blocking=tuple(s for s in others if s.users),
        free_bytes=free + sum(s.bytes for s in possible),
    )


def make_room(root: Path, folder: Path, needed: int, max_gb: float | None) -> Room:
    """As room_for; where the set fits, what is in its way goes. To be called within `locked(root)`."""
    clear(root)
    room = room_for(root, folder, needed, max_gb)
    if room.fits:
        for unused in room.evict:
            if not _remove(unused):
                return dataclasses.replace(room, fits=False)  # somebody took it in this moment
            console.say(f"Evicted {unused.key} ({_about(unused)})")
    return room


def clear(root: Path) -> None:
    """Finish what an eviction that was killed has left. To be called within `locked(root)`."""
    for leftover in root.glob(".evicted-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _remove(unused: StoredSet) -> bool:
    """Delete a set that had no users; False where somebody prepares it now. Others see all of it, or nothing.

    To be called within the `locked(root)` in which its users were looked for.
    """
    try:
        handle = os.open(unused.folder / ".lock", os.O_RDWR)
    except FileNotFoundError:
        return True
    try:
        if not _taken(handle):
            return False
        hidden = unused.folder.with_name(f".evicted-{unused.key}-{uuid.uuid4().hex}")
        os.replace(unused.folder, hidden)
    except PermissionError:
        return False
    finally:
        os.close(handle)
    shutil.rmtree(hidden, ignore_errors=True)
    return True


def _taken(handle: int, patience_s: float = 1.0) -> bool:
    """Whether the lock is ours now. A builder keeps it; who only looks (`_reserved`) shares it, for less than a moment."""
    until = time.monotonic() + patience_s
    while time.monotonic() < until:
        with suppress(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        fcntl.flock(handle, fcntl.LOCK_UN)
        time.sleep(0.005)
    return False


def _about(stored: StoredSet) -> str:
    return f"{gigabytes(stored.bytes)}, last used {_ago(stored.last_used)}"


def _ago(then: float) -> str:
    seconds = max(0.0, time.time() - then)
    for limit, unit, each in ((90, "s", 1), (5400, "min", 60), (48 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / each:.0f} {unit} ago"
    return f"{seconds / 86400:.0f} days ago"


def gigabytes(size: float) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def is_same(handle: int, path: Path) -> bool:
    """Whether an open file still stands under this name."""
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


# ------------------------------------------------------------------------------------- list and evict
def print_sets(cache: config.Cache) -> None:
    """What `jobs/prepare.py --list` shows: the sets of cache.dir, and the copies in cache.local_dir."""
    from rich import box
    from rich.table import Table

    for name, root in _roots(cache):
        stored = stored_sets(root)
        if not stored:
            console.say(f"{name}: no sets in {root}")
            continue
        limit = "" if cache.max_gb is None else f" of {cache.max_gb:g} GB"
        console.say(
            f"{name}={root}: {len(stored)} sets, {gigabytes(sum(s.bytes for s in stored))}{limit}"
        )
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
        for column in ("key", "images", "px", "format", "size", "last used", "users", "state"):
            table.add_column(
                column, no_wrap=True, justify="left" if column in ("key", "state") else "right"
            )
        below = []  # what is too long for a column
        for each in reversed(stored):
            known: dict[str, Any] = {}
            with suppress(OSError, ValueError):
                known = read_json(each.folder / "manifest.json")
            table.add_row(each.key, *_described(each, known))
            below.append(f"{each.key}: {known.get('root', 'unfinished')}")
            below += [f"  in use by {user}" for user in each.users]
        console.standard().print(table)
        for line in below:
            console.say(line)


def _described(stored: StoredSet, known: Mapping[str, Any]) -> list[str]:
    there = {path.name: path.stat().st_size for path in stored.folder.glob("*.arrow")}
    shards = known.get("shards", [])
    state = "unfinished"
    if known:
        # of a set of local copies, or one that was damaged, some
        share = sum(there.get(s["file"]) == s["bytes"] for s in shards) / max(len(shards), 1)
        state = "ready" if share == 1 else f"{share:.0%} there"
    return [
        f"{sum(known['counts'].values()):,}" if known else "?",
        str(known["decode"]["image_px"]) if known else "?",
        known.get("pixels", "raw") if known else "?",
        gigabytes(stored.bytes),
        _ago(stored.last_used),
        str(len(stored.users)),
        state,
    ]


def evict(cache: config.Cache, which: str) -> list[str]:
    """What `jobs/prepare.py --evict` does: a key, `lru` (the one unused for longest) or `all` that are unused.

    Says what it freed, and returns the keys. Raises UserError where there is no such set, or it is in use.
    """
    gone = []
    for _, root in _roots(cache):
        if not root.is_dir():
            continue
        with locked(root):
            clear(root)
            stored = stored_sets(root)
            if which == "lru":
                stored = [s for s in stored if not s.users][:1]
            elif which != "all":
                stored = [s for s in stored if s.key == which]
            for each in stored:
                if not each.users and _remove(each):
                    gone.append(each.key)
                    console.say(f"Evicted {each.key} ({_about(each)}) from {root}")
                    continue
                users = "; ".join(each.users) or "a process that has just begun"
                if which == "all":
                    console.say(f"Kept {each.key}: in use by {users}")
                else:
                    raise UserError(
                        f"--evict must name a set that is not in use, got {which}, used by {users}; "
                        "wait until it ends"
                    )
    if not gone:
        _refuse_to_find_nothing(cache, which)
    return gone


def _refuse_to_find_nothing(cache: config.Cache, which: str) -> None:
    roots = [root for _, root in _roots(cache)]
    if which in ("all", "lru"):
        console.say(f"Nothing to evict in {' and '.join(map(str, roots))}")
        return
    keys = [s.key for root in roots for s in stored_sets(root)]
    near = difflib.get_close_matches(which, keys, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else "--list shows the sets"
    raise UserError(
        f"--evict must be lru, all or the key of a set in {' or '.join(map(str, roots))}, got {which!r}; {hint}"
    )


def _roots(cache: config.Cache) -> list[tuple[str, Path]]:
    roots = [("cache.dir", local_folder(cache.dir, "cache.dir"))]
    if cache.local_dir:
        roots.append(("cache.local_dir", local_folder(cache.local_dir, "cache.local_dir")))
    return roots


# ------------------------------------------------------------------------------------- on this node
class LocalCopies:
    """Copies of one set's shards on this node's own disk, within a budget that all sets share.

    The copies are in use, and stay, as long as this object lives. A shard that finds no room is read where
    it is.
    """

    def __init__(self, folder: Path, local_dir: Path, max_gb: float | None) -> None:
        self.source = folder
        self.root = local_dir
        self.folder = local_dir / folder.name
        self.max_gb = max_gb
        self._held: Hold | None = None
        self._full = ""  # why no more shards are copied
        self._one_at_a_time = threading.Lock()

    def path(self, shard: Mapping[str, Any]) -> Path:
        """Where to read a shard (of a manifest): its copy, made and checked first where need be, or itself.

        Raises UserError where the copy does not have the shard's SHA-256: the shard is damaged.
        """
        copy = self.folder / shard["file"]
        with self._one_at_a_time:
            try:
                usable = self._open()
                if usable and self._is_there(copy, shard):
                    return copy
                if not self._full:
                    if usable and self._copy(shard, copy):
                        return copy
                    self._full = (
                        f"no room for all of {self.folder.name} within cache.max_gb and on the disk"
                    )
                    console.say(f"cache.local_dir: {self._full}; the rest is read in {self.source}")
            except OSError as error:
                if not self._full:
                    self._full = f"{self.root} cannot be used ({error.strerror or error})"
                    console.warn(f"cache.local_dir: {self._full}; shards are read in {self.source}")
        return self.source / shard["file"]

    def _open(self) -> bool:
        """Take the set's folder here into use; False where there is not even room for its manifest."""
        if self._held is not None:
            return True
        about, manifest = (f / "manifest.json" for f in (self.source, self.folder))
        with locked(self.root):
            if not manifest.exists():
                needed = about.stat().st_size + 4096  # and for the small files beside it
                if not make_room(self.root, self.folder, needed, self.max_gb).fits:
                    return False
                self.folder.mkdir(exist_ok=True)
                (self.folder / ".lock").touch()
                beside = self.folder / ".manifest.tmp"
                shutil.copyfile(about, beside)
                os.replace(beside, manifest)
            self._held = Hold(self.folder, f"copies of {self.source}")
        return True

    @staticmethod
    def _is_there(copy: Path, shard: Mapping[str, Any]) -> bool:
        with suppress(FileNotFoundError):
            return copy.stat().st_size == shard["bytes"]
        return False

    def _copy(self, shard: Mapping[str, Any], copy: Path) -> bool:
        """False where there is no room. A second process waits for the first one's copy."""
        beside = copy.with_name(f".{copy.name}.tmp")
        while True:
            with locked(self.root):
                if self._is_there(copy, shard):
                    return True
                handle = os.open(beside, os.O_RDWR | os.O_CREAT, 0o644)
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    mine = True
                except BlockingIOError:
                    mine = False
                if mine and not is_same(handle, beside):
                    os.close(handle)  # renamed in this moment: that is the copy
                    continue
                if mine:
                    os.ftruncate(handle, 0)  # the rest of a copy whose process is gone
                    if not make_room(self.root, self.folder, shard["bytes"], self.max_gb).fits:
                        beside.unlink()
                        os.close(handle)
                        return False
                    os.ftruncate(handle, shard["bytes"])  # it counts from now on
            try:
                if mine:
                    self._fill(handle, beside, copy, shard)
                    return True
                fcntl.flock(handle, fcntl.LOCK_EX)
            finally:
                os.close(handle)

    def _fill(self, handle: int, beside: Path, copy: Path, shard: Mapping[str, Any]) -> None:
        digest = hashlib.sha256()
        try:
            with (
                open(self.source / shard["file"], "rb") as source,
                open(handle, "wb", closefd=False) as sink,
            ):
                while block := source.read(1 << 20):
                    digest.update(block)
                    sink.write(block)
                sink.flush()
                os.fsync(handle)
            if digest.hexdigest() != shard["sha256"]:
                raise UserError(
                    f"cache: {self.source / shard['file']} is damaged: its SHA-256 does not match; run jobs/prepare.py "
                    "with the same data and cache keys and cache.verify=true: only what is damaged is built again"
                )
            os.replace(beside, copy)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
