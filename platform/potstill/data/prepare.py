"""Source -> checked, decoded, sharded cache, with a quarantine and a report. Ray Data does the work.

One item of the dataset is the plan of one shard. The task that gets it reads, decodes and writes that
shard, and returns only its description: pixels do not travel through the object store, unless its node does not see
the cache folder. A shard's plan
depends on the source and the decode spec alone, so that a build that was interrupted goes on with what is
there, on any number of cores.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import pickle
import sys
import time
import warnings
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np

from potstill import console
from potstill.data import images, store
from potstill.data.cache import (
    FORMAT,
    Cache,
    encode_jpeg,
    open_cache,
    shard_fault,
    write_shard,
)
from potstill.data.files import REQUESTS_AT_ONCE, explained
from potstill.data.sources import (
    SPLITS,
    UNLABELED,
    Opened,
    Rows,
    fingerprint,
    list_rows,
    printable,
)
from potstill.errors import UserError
from potstill.replica import replica_of
from potstill.runs import atomic_write, read_json, write_json
from potstill.storage import local_folder

if TYPE_CHECKING:
    from rich.console import Console

    from potstill import config
    from potstill.handover import Mark

SHARD_BYTES = (
    32 * 1024**2
)  # what a task holds in memory at once, and the largest piece an epoch moves about
SMALL_SHARD_ROWS = 256
PARALLEL_SHARDS = (
    32  # a set with less than SHARD_BYTES for each is cut into this many, if they are not tiny
)
JPEG_SAMPLES = 32
WAIT_S = 1.0

Progress = Callable[[int, int], None]
"""Called with (images done, images in all)."""


@dataclass(frozen=True)
class Shard:
    name: str
    split: str
    rows: np.ndarray
    """Positions in `Plan.rows`, in the order of their ids: a hash, so that every shard mixes the classes."""

    @property
    def file(self) -> str:
        return f"{self.name}.arrow"

    @property
    def sidecar(self) -> str:
        return f"{self.name}.json"


@dataclass(frozen=True)
class Plan:
    rows: Rows
    key: str
    folder: Path
    decode: config.Decode
    shards: list[Shard]
    bytes_needed: int
    """What is still to be written, in bytes."""
    source_key: str
    """What the source and the decoding alone make of the key: that of the set whose pixels are raw."""
    jpeg_quality: int | None
    """None: raw pixels."""
    finished: bool = False
    """It was there when it was looked for."""
    note: str = ""
    """Why cache.format=auto has not chosen raw pixels."""

    @property
    def pixels(self) -> str:
        """raw | jpeg."""
        return "raw" if self.jpeg_quality is None else "jpeg"

    @property
    def bytes_present(self) -> int:
        return sum(_size(self.folder / s.file) for s in self.shards)


@dataclass(frozen=True)
class Prepared:
    cache_dir: Path
    report: dict[str, Any]
    reused: bool


def check(
    data: config.Data, cache: config.Cache, for_training: bool = True, prefer: str | None = None
) -> Plan:
    """Everything that can be refused before images are read; takes seconds and needs no Ray.

    Only where a set of JPEGs is to be built are a few images opened: its size depends on them.
    `for_training=False` is for a folder to evaluate on: see sources.list_rows. `prefer` is the key of the
    set that cache.format=auto is to choose if it is one of this source: a run goes on with the pixels that
    it began with.

    Raises UserError.
    """
    rows = list_rows(data, for_training)
    root = local_folder(cache.dir, "cache.dir")
    _refuse_cache_dir(root, rows.walked)
    _refuse_local_dir(root, cache.local_dir)
    key = fingerprint(rows, data.decode)
    shards = _plan_shards(rows, data.decode)
    plans = []
    for quality in _qualities(cache, data.decode):
        own = key if quality is None else _jpeg_key(key, quality)
        plans.append(Plan(rows, own, root / own, data.decode, shards, 0, key, quality))
    return _choose([p for p in plans if p.key == prefer] or plans, cache)


def prepare(
    data: config.Data,
    cache: config.Cache,
    progress: Progress | None = None,
    for_training: bool = True,
) -> Prepared:
    """The cache of a source: the one on disk where it fits, else it is built. Ray is started only to build.

    Another process that prepares the same key is waited for, and so is room, where sets that are in use
    leave none. What is returned may be evicted at any time: who reads it takes `prepared`.

    Raises UserError where the source, the space, or what the images turn out to be does not allow it.
    """
    with ExitStack() as stack:
        return _prepare(data, cache, progress, for_training, None, "jobs/prepare.py", stack)


@contextmanager
def prepared(
    data: config.Data,
    cache: config.Cache,
    user: str,
    for_training: bool = True,
    prefer: str | None = None,
) -> Iterator[Prepared]:
    """As prepare_shown; the set is not evicted as long as the block runs. `user` is what others see it used by.

    `prefer`: see `check`.
    """
    with ExitStack() as stack:
        with _bar() as show:
            found = _prepare(data, cache, show, for_training, prefer, user, stack)
        yield found


def _prepare(
    data: config.Data,
    cache: config.Cache,
    progress: Progress | None,
    for_training: bool,
    prefer: str | None,
    user: str,
    stack: ExitStack,
) -> Prepared:
    """The set, which `stack` keeps from being evicted."""
    plan = check(data, cache, for_training, prefer)
    waiting = False
    while True:
        with _lock(plan, progress) as lock:
            reused = _is_ready(plan, cache.verify)
            if plan.finished and not (plan.folder / "manifest.json").exists():
                # evicted since: now it is a set that needs room
                plan = check(data, cache, for_training, plan.key)
                continue
            room = None if reused else _take_room(plan, cache, lock)
            if room is None or room.fits:
                fetched = not reused and _fetched(plan, cache)
                if not reused and not fetched:
                    _build(plan, data, cache, progress, for_training, lock)
                if not fetched:
                    _send(plan, cache, anew=not reused)
                report = read_json(plan.folder / "report.json")
                _refuse_unusable(report, plan.folder, data.max_bad_fraction, for_training)
                stack.enter_context(store.hold(plan.folder, user))
                return Prepared(plan.folder, report, reused)
        # who waits lets go of the lock: the shards it has may be what another one waits for
        if not room.could_fit:
            _refuse_space([(plan, room)], cache)
        waiting = _wait(plan, room, cache, waiting)


def _fetched(plan: Plan, cache: config.Cache) -> bool:
    """Bring here the set that cache.dir's object store has, where it is one that has it."""
    replica = replica_of(plan.folder, cache.dir, "cache.dir")
    if replica is None:
        return False
    with explained(replica.place, "cache.dir"):
        if replica.place.join("manifest.json").stat() is None:
            return False
        with _said_when_full(plan.folder):
            replica.pull()
    if _is_ready(plan, verify=True):
        return True
    for shard in plan.shards:  # what is damaged there is built again, and the rest is kept
        if _kept(plan.folder, plan.rows, shard, verify=True) is None:
            for name in (shard.file, shard.sidecar, "manifest.json"):
                (plan.folder / name).unlink(missing_ok=True)
    return False


def _send(plan: Plan, cache: config.Cache, anew: bool) -> None:
    """Let the store have the set, where it lacks it; `anew`: whatever it has of it."""
    if replica := replica_of(plan.folder, cache.dir, "cache.dir"):
        with explained(replica.place, "cache.dir"):
            if anew or replica.place.join("manifest.json").stat() is None:
                replica.push(anew)


def prepare_shown(data: config.Data, cache: config.Cache, for_training: bool = True) -> Prepared:
    """`prepare`, with a progress bar where there is something to build."""
    with _bar() as show:
        return prepare(data, cache, show, for_training)


@contextmanager
def _bar() -> Iterator[Progress]:
    """A progress bar that appears with the first number."""
    with ExitStack() as stack:
        bar: list[Callable[[float], None]] = []

        def show(done: int, total: int) -> None:
            if not bar:
                bar.append(stack.enter_context(console.progress("Preparing images", total)))
            bar[0](done)

        yield show


# ---------------------------------------------------------------------------------------------- plan
def _plan_shards(rows: Rows, decode: config.Decode) -> list[Shard]:
    shards: list[Shard] = []
    for split in SPLITS:
        members = np.flatnonzero(rows.split == split)
        if len(members) == 0:
            continue
        members = members[np.argsort(rows.id[members])]
        by_size = -(-len(members) * _record_bytes(decode) // SHARD_BYTES)
        for_cores = min(PARALLEL_SHARDS, -(-len(members) // SMALL_SHARD_ROWS))
        for part in np.array_split(members, min(len(members), max(by_size, for_cores))):
            shards.append(Shard(f"shard-{len(shards):05d}", split, part))
    return shards


def _record_bytes(decode: config.Decode) -> int:
    return decode.image_px**2 * 3


def _qualities(cache: config.Cache, decode: config.Decode) -> list[int | None]:
    """The JPEG qualities that cache.format allows, None for raw pixels, in the order of preference."""
    if decode.fit == "native" and cache.format == "jpeg":
        raise UserError(
            "cache.format must be raw or auto where data.decode.fit is native, got 'jpeg': native pixels are kept for "
            "their traces, which a JPEG does not keep"
        )
    if cache.format == "raw" or decode.fit == "native":
        return [None]
    return [cache.jpeg_quality] if cache.format == "jpeg" else [None, cache.jpeg_quality]


def _jpeg_key(key: str, quality: int) -> str:
    return hashlib.blake2b(f"{key} jpeg {quality}".encode(), digest_size=8).hexdigest()


def _choose(plans: list[Plan], cache: config.Cache) -> Plan:
    """Of the sets that cache.format allows: one that is there, else one that fits, else one that could."""
    for plan in plans:
        if (plan.folder / "manifest.json").exists():
            return dataclasses.replace(plan, finished=True)
    found: list[tuple[Plan, store.Room]] = []
    for plan in plans:
        needed = max(0, _bytes_of(plan) - plan.bytes_present)
        plan = dataclasses.replace(plan, bytes_needed=needed, note=_note(found, needed, cache))
        room = store.room_for(plan.folder.parent, plan.folder, needed, cache.max_gb)
        if room.fits:
            return plan
        found.append((plan, room))
    for plan, room in found:
        if room.could_fit:
            return plan
    _refuse_space(found, cache)


def _note(before: list[tuple[Plan, store.Room]], needed: int, cache: config.Cache) -> str:
    if not before:
        return ""
    raw, room = before[0]
    limit = "" if cache.max_gb is None else f"cache.max_gb={cache.max_gb:g} and "
    return (
        f"cache.format=auto: images are kept as JPEGs, about {store.gigabytes(needed)}; raw pixels need "
        f"{store.gigabytes(raw.bytes_needed)}, more than {limit}{store.gigabytes(room.free_bytes)} of free disk leave"
    )


def _bytes_of(plan: Plan) -> int:
    """What a set takes in all, in bytes; of JPEGs an estimate from some of the images."""
    record = float(_record_bytes(plan.decode))
    if plan.jpeg_quality is not None and (sizes := _sampled_sizes(plan, plan.jpeg_quality)):
        # the mean of so few is off by two of its standard errors, at times
        record = float(np.mean(sizes) + 2 * np.std(sizes) / len(sizes) ** 0.5)
    texts = sum(map(len, plan.rows.path)) + 4 * sum(1 + len(k) for k in plan.rows.labels or ())
    return round(len(plan.rows) * (record + 64)) + texts + len(plan.shards) * 8192


def _sampled_sizes(plan: Plan, quality: int) -> list[int]:
    """Bytes of some images of the source as JPEGs; bad ones are left out."""
    at = np.unique(np.linspace(0, len(plan.rows) - 1, JPEG_SAMPLES).astype(int))
    rows = plan.rows.part(at)
    reader = rows.open()
    sizes = []
    for i in range(len(at)):
        with suppress(images.BadImage, OSError), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            image = images.decode_image(_read(reader, rows, i, plan.decode), plan.decode)
            sizes.append(len(encode_jpeg(image, quality)))
    return sizes


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse_cache_dir(root: Path, walked: list[Path]) -> None:
    for source in walked:
        if not root.resolve().is_relative_to(source.resolve()):
            continue
        inside = root.resolve().relative_to(source.resolve())
        if not any(part.startswith(".") for part in inside.parts):
            raise UserError(
                f"cache.dir must not be inside data.root or data.unlabeled, got {str(root)!r}: its files would count as "
                "images; set cache.dir"
            )
    existing = _existing(root)
    if not existing.is_dir():
        raise UserError(
            f"cache.dir must be a folder, got {str(root)!r}, but {str(existing)!r} is a file; set cache.dir"
        )
    if not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cache.dir must be writable, got {str(root)!r}; set cache.dir to another folder"
        )


def _existing(folder: Path) -> Path:
    while not folder.exists():
        folder = folder.parent
    return folder


def _refuse_local_dir(root: Path, local_dir: str | None) -> None:
    if local_dir is None:
        return
    local = local_folder(local_dir, "cache.local_dir")
    if local.resolve() == root.resolve():
        raise UserError(
            f"cache.local_dir must be another folder than cache.dir, got {local_dir!r} for both; it is for copies on this "
            "node's own disk: set it to null where cache.dir is on that disk already"
        )
    existing = _existing(local)
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise UserError(
            f"cache.local_dir must be a folder that can be written, got {local_dir!r}; set it to another one, or to null"
        )


def _refuse_space(found: list[tuple[Plan, store.Room]], cache: config.Cache) -> NoReturn:
    """Each of these sets is too large, whoever else leaves."""
    wholes = [plan.bytes_needed + plan.bytes_present for plan, _ in found]
    sizes = " and ".join(
        f"{'about ' if plan.jpeg_quality else ''}{whole / 1e9:.3f} GB {'as JPEGs' if plan.jpeg_quality else 'raw'}"
        for (plan, _), whole in zip(found, wholes, strict=True)
    )
    smaller = "take a smaller data.decode.image_px or data.max_samples"
    if cache.max_gb is not None and min(wholes) > cache.max_gb * 1e9:
        least = -(-min(wholes) // 10**6) / 1e3
        raise UserError(
            f"cache.max_gb must be at least {least:.3f} for this set, got {cache.max_gb:g}: it takes {sizes}; "
            f"raise it, or {smaller}"
        )
    needed = min(plan.bytes_needed for plan, _ in found) * store.SPACE_MARGIN
    root = str(found[0][0].folder.parent)
    raise UserError(
        f"cache.dir must have {needed / 1e9:.3f} GB free for this set, got {found[0][1].free_bytes / 1e9:.3f} GB at "
        f"{root!r} (it takes {sizes}); free some (jobs/prepare.py --evict lru), set cache.dir to another disk, or {smaller}"
    )


def _wait(plan: Plan, room: store.Room, cache: config.Cache, said: bool) -> bool:
    """Wait a moment for room, and say so once. Raises UserError where it is this process that has taken it."""
    used = "; ".join(
        f"{s.key} ({store.gigabytes(s.bytes)}) by {', '.join(s.users)}" for s in room.blocking
    )
    needs = (
        f"{store.gigabytes(plan.bytes_needed)} are needed within cache.max_gb={cache.max_gb} in "
        f"{plan.folder.parent}, where others are in use: {used}"
    )
    if room.only_here:
        raise UserError(
            f"cache.max_gb must have room for all sets that are used at once: {needs}; raise it, or let go of a set first"
        )
    if not said:
        console.say(f"Waiting for room: {needs} (Ctrl-C stops)")
    time.sleep(WAIT_S)
    return True


# --------------------------------------------------------------------------------------- one at a time
@contextmanager
def _lock(plan: Plan, progress: Progress | None) -> Iterator[int]:
    """Wait until no other process prepares this key; meanwhile report what it has done. Yields the lock's handle."""
    handle = _open_lock(plan.folder)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if store.is_same(handle, plan.folder / ".lock"):
                    break
                os.close(handle)  # the set was evicted meanwhile
                handle = _open_lock(plan.folder)
            except BlockingIOError:
                if progress:
                    done = sum(
                        len(s.rows) for s in plan.shards if (plan.folder / s.sidecar).exists()
                    )
                    progress(done, len(plan.rows))
                time.sleep(0.25)
        yield handle
    finally:
        os.close(handle)


def _open_lock(folder: Path) -> int:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with suppress(FileNotFoundError):  # evicted in this moment
            return os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)


def _take_room(plan: Plan, cache: config.Cache, lock: int) -> store.Room:
    """Make room for what is to be written, and keep it as long as `lock` is held."""
    needed = plan.bytes_needed
    if plan.finished:
        with suppress(OSError, ValueError, KeyError, TypeError):
            shards = read_json(plan.folder / "manifest.json")["shards"]
            needed = max(0, sum(s["bytes"] for s in shards) - plan.bytes_present)
    root = plan.folder.parent
    with store.locked(root):
        room = store.make_room(root, plan.folder, needed, cache.max_gb)
        if room.fits:
            _reserve(lock, plan.bytes_present + needed)
    return room


def _keep_room(plan: Plan, cache: config.Cache, lock: int, written: int, images: int) -> None:
    """Where JPEGs turn out larger than estimated: take more room for the rest, or stop when it is used up."""
    reserved = int(os.pread(lock, 32, 0) or 0)
    whole = round(written / max(images, 1) * len(plan.rows) * 1.01)
    if whole <= reserved:
        return
    root = plan.folder.parent
    with store.locked(root):
        room = store.make_room(root, plan.folder, whole - written, cache.max_gb)
        if room.fits:
            _reserve(lock, whole)
        elif written > reserved:
            raise UserError(
                f"cache.max_gb must have room for {whole / 1e9:.3f} GB of JPEGs, as the first {images:,} of {len(plan.rows):,} "
                f"images show (estimated were {reserved / 1e9:.3f} GB), got {cache.max_gb}; raise it, free some space, "
                "or take a lower cache.jpeg_quality: what is done is kept"
            )


def _reserve(lock: int, size: int) -> None:
    os.ftruncate(lock, 0)
    os.pwrite(lock, str(size).encode(), 0)


def _is_ready(plan: Plan, verify: bool) -> bool:
    if not (plan.folder / "manifest.json").exists():
        return False
    try:
        open_cache(plan.folder, verify)
        return (plan.folder / "report.json").exists()
    except UserError:
        return False


# --------------------------------------------------------------------------------------------- build
def _build(
    plan: Plan,
    data: config.Data,
    cache: config.Cache,
    progress: Progress | None,
    for_training: bool,
    lock: int,
) -> None:
    """`lock`: the handle of the set's lock, whose content is the room that is kept for it."""
    if plan.note:
        console.say(plan.note)
    started = time.monotonic()
    for leftover in plan.folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    descriptions = {
        s.name: d for s in plan.shards if (d := _kept(plan.folder, plan.rows, s, cache.verify))
    }
    # a finished cache that lost a shard is none until it has it again
    mended = (plan.folder / "manifest.json").exists()
    (plan.folder / "manifest.json").unlink(missing_ok=True)
    todo = [s for s in plan.shards if s.name not in descriptions]
    done = sum(d["planned"] for d in descriptions.values())
    if progress:
        progress(done, len(plan.rows))
    built, written = 0, sum(d.get("bytes", 0) for d in descriptions.values())
    for description in _run(plan, todo) if todo else ():
        descriptions[description["name"]] = description
        built += description["planned"]
        written += description.get("bytes", 0)
        if plan.jpeg_quality is not None:
            _keep_room(plan, cache, lock, written, done + built)
        if progress:
            progress(done + built, len(plan.rows))
    seconds = time.monotonic() - started

    ordered = [descriptions[s.name] for s in plan.shards]
    bad = [{"split": d["split"], **row} for d in ordered for row in d["quarantined"]]
    manifest = _manifest(plan, ordered)
    report = _report(plan, Cache(plan.folder, manifest), bad)
    report["built"] = {
        "images": built,
        "seconds": round(seconds, 3),
        "images_per_s": round(built / seconds, 1) if built else None,
        "mended": [s.name for s in todo] if mended else [],
    }
    _write_quarantine(plan.folder / "quarantine.parquet", bad)
    write_json(plan.folder / "classes.json", plan.rows.classes)
    write_json(plan.folder / "report.json", report)
    _refuse_unusable(report, plan.folder, data.max_bad_fraction, for_training)
    write_json(plan.folder / "manifest.json", manifest)
    os.ftruncate(lock, 0)  # what is written counts by itself


def _kept(folder: Path, rows: Rows, shard: Shard, verify: bool) -> dict[str, Any] | None:
    """The description of a shard that an earlier build has finished."""
    try:
        found = read_json(folder / shard.sidecar)
        if found["format"] != FORMAT or found["plan"] != _digest(rows.id[shard.rows]):
            return None
        if found["unopened"]:
            return None  # a file that could not be opened may open now
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found["rows"] and shard_fault(folder, found, verify) else found


def _digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()


def _manifest(plan: Plan, descriptions: list[dict[str, Any]]) -> dict[str, Any]:
    shards = [
        {k: d[k] for k in ("file", "split", "rows", "bytes", "sha256")}
        for d in descriptions
        if d["rows"]
    ]
    counts = {split: sum(s["rows"] for s in shards if s["split"] == split) for split in SPLITS}
    return {
        "format": FORMAT,
        "key": plan.key,
        "pixels": plan.pixels,
        "jpeg_quality": plan.jpeg_quality,
        "root": str(plan.rows.root),
        "created": time.time(),
        "classes": plan.rows.classes,
        "multi_label": plan.rows.labels is not None,
        "decode": dataclasses.asdict(plan.decode),
        "counts": {
            split: n for split, n in counts.items() if n or (plan.rows.split == split).any()
        },
        "shards": shards,
    }


def _run(plan: Plan, shards: list[Shard]) -> Iterator[dict[str, Any]]:
    """Build shards on all cores; their descriptions, in the order in which they are done."""
    at = np.concatenate([s.rows for s in shards])
    with ExitStack() as stack:
        rows = plan.rows
        if not os.environ.get(
            "RAY_ADDRESS"
        ):  # other nodes might not see what is staged; they read in place
            with _said_when_full(plan.folder):
                rows = stack.enter_context(rows.staged(plan.folder, at))
        yield from _run_tasks(plan, rows, shards)


def _run_tasks(plan: Plan, rows: Rows, shards: list[Shard]) -> Iterator[dict[str, Any]]:
    from potstill.cluster import quiet_ray_data, said_while_waiting, selector, shown, start_ray
    from potstill.handover import marked, taken

    ours = start_ray()  # before ray is imported: it reads its environment then
    import ray.data

    try:
        began: list[bool] = []
        with ExitStack() as stack:
            stack.enter_context(quiet_ray_data())
            mark = stack.enter_context(marked(plan.folder))
            what = f"the first shard{shown(selector('data'))}"
            stack.enter_context(said_while_waiting(what, lambda: bool(began)))
            path = json.dumps(sys.path)
            items = [
                {"job": pickle.dumps(_job(plan, rows, s, mark)), "sys_path": path} for s in shards
            ]
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            for row in dataset.map(_run_job).iter_rows():
                began.append(True)
                description = json.loads(row["description"])
                if message := description.get("error"):
                    raise UserError(message)
                with _said_when_full(plan.folder):
                    taken(plan.folder, pickle.loads(row["files"]))
                yield description
    finally:
        if ours:  # training in this process wants the memory and the cores
            ray.shutdown()


# ------------------------------------------------------------------------------------------ one shard
@dataclass(frozen=True)
class _Job:
    name: str
    split: str
    mark: Mark
    """Of the set's folder."""
    decode: config.Decode
    rows: Rows
    """Those of this shard."""
    jpeg_quality: int | None


def _job(plan: Plan, rows: Rows, shard: Shard, mark: Mark) -> _Job:
    part = rows.part(shard.rows)
    return _Job(shard.name, shard.split, mark, plan.decode, part, plan.jpeg_quality)


def _run_job(row: dict[str, Any]) -> dict[str, Any]:
    """What a Ray Data task does. A mistake of the user's comes back as a message: Ray would wrap it in a traceback."""
    # a plug-in's reader is imported when the job is unpickled
    sys.path.extend(p for p in json.loads(row["sys_path"]) if p not in sys.path)
    from potstill.handover import made

    job: _Job = pickle.loads(row["job"])
    files: dict[str, bytes] = {}
    try:
        description, files = made(job.mark, partial(_build_shard, job))
        if description["unopened"] == description["planned"] and not job.mark.seen():
            root = str(job.rows.root)
            description = {
                "error": f"data.root must be seen by every node that takes data jobs, got {root!r}, of which "
                f"{os.uname().nodename} can open no file; use storage that all nodes see, or a URI (s3://, gs://)"
            }
            files = {}
    except UserError as error:
        description = {"error": str(error)}
    return {"description": json.dumps(description), "files": pickle.dumps(files)}


def _build_shard(job: _Job, folder: Path) -> dict[str, Any]:
    """Read, decode, write a shard and its sidecar. Returns the sidecar's content."""
    # what could not be staged for all nodes is for this one
    with job.rows.staged(folder, np.arange(len(job.rows))) as rows:
        return _decode_shard(job, rows, folder)


def _decode_shard(job: _Job, rows: Rows, folder: Path) -> dict[str, Any]:
    px = job.decode.image_px
    pixels = np.empty((len(rows), px, px, 3), np.uint8)
    good: list[int] = []
    hashes: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    quarantined: list[dict[str, str]] = []
    unopened = 0
    with warnings.catch_warnings(), closing(_contents(rows, job.decode)) as contents:
        warnings.simplefilter("ignore")  # PIL's remarks on files that it reads all the same
        for i, (path, content_of) in enumerate(zip(rows.path, contents, strict=True)):
            try:
                content = content_of()
                pixels[len(good)], size = images.decode_with_size(content, job.decode)
            except (images.BadImage, OSError) as error:
                if isinstance(error, OSError):
                    unopened += 1
                    error = images.BadImage("unreadable", error.strerror or str(error))
                row = {
                    "path": printable(path),
                    "class": rows.names(i),
                    "reason": error.reason,
                    "detail": error.detail,
                }
                quarantined.append(row)
                continue
            good.append(i)
            sizes.append(size)
            hashes.append(hashlib.sha256(content).digest())
    written: dict[str, Any] = {"rows": 0}
    if good:
        columns = {
            "image": pixels[: len(good)],
            "label": rows.label[good],
            "weight": rows.weight[good],
            "id": rows.id[good],
            "sha256": hashes,
            "path": [printable(rows.path[i]) for i in good],
            "width": [w for w, _ in sizes],
            "height": [h for _, h in sizes],
        }
        if rows.labels is not None:
            columns["labels"] = [rows.labels[i] for i in good]
        with _said_when_full(folder):
            written = write_shard(folder, f"{job.name}.arrow", columns, job.jpeg_quality)
    description = {
        "format": FORMAT,
        "name": job.name,
        "split": job.split,
        "planned": len(rows),
        "plan": _digest(rows.id),
        "unopened": unopened,
        **written,
        "quarantined": quarantined,
    }
    atomic_write(folder / f"{job.name}.json", json.dumps(description))
    return description


@contextmanager
def _said_when_full(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"cache.dir must have room, but writing to {str(folder)!r} failed: {error.strerror}; free some space, "
                "and the same command goes on with the shards it has"
            ) from None
        raise


def _contents(rows: Rows, decode: config.Decode) -> Generator[Callable[[], bytes], None, None]:
    """For each row a call that gives what `_read` does; over a network they are read ahead, several at a time."""
    reader = rows.open()
    if not reader.waits():
        for i in range(len(rows)):
            yield partial(_read, reader, rows, i, decode)
        return
    pool = ThreadPoolExecutor(REQUESTS_AT_ONCE, thread_name_prefix="read-images")
    try:
        ahead: deque[Future[bytes]] = deque()
        for i in range(len(rows)):
            ahead.append(pool.submit(_read, reader, rows, i, decode))
            if len(ahead) > REQUESTS_AT_ONCE:
                yield ahead.popleft().result
        for future in ahead:
            yield future.result
    finally:
        pool.shutdown(cancel_futures=True)


def _read(reader: Opened, rows: Rows, i: int, decode: config.Decode) -> bytes:
    """A file's bytes. Raises OSError, BadImage, and UserError if it is no longer what was listed."""
    size = int(rows.size[i])
    # 16-bit RGBA without compression, and room for metadata: no image under the limit is larger
    if size > decode.max_megapixels * 8e6 + 64e6:
        raise images.BadImage(
            "over the pixel limit",
            f"a file of {size / 1e6:.0f} MB, data.decode.max_megapixels={decode.max_megapixels:g}",
        )
    return reader.read(i)


# -------------------------------------------------------------------------------------------- report
def _write_quarantine(path: Path, bad: list[dict[str, str]]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [(name, pa.string()) for name in ("path", "split", "class", "reason", "detail")]
    )
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(bad, schema), sink)
    atomic_write(path, sink.getvalue().to_pybytes())


def _report(plan: Plan, cache: Cache, bad: list[dict[str, str]]) -> dict[str, Any]:
    splits = {name: cache.split(name) for name in cache.counts}
    by_class = {name: dict.fromkeys(splits, 0) for name in cache.classes}
    for split, reader in splits.items():
        for name, n in zip(cache.classes, reader.class_counts().tolist(), strict=True):
            by_class[name][split] = n
    sizes = np.concatenate(
        [np.empty((0, 2), np.int32), *(r.original_sizes for r in splits.values())]
    )
    side = ("min", "median", "max")
    return {
        "key": plan.key,
        "root": str(plan.rows.root),
        "cache_dir": str(plan.folder),
        "decode": dataclasses.asdict(plan.decode),
        "listed": len(plan.rows),
        "images": sum(cache.counts.values()),
        "counts": cache.counts,
        "by_class": by_class,
        "unlabeled": sum(int((r.labels == UNLABELED).sum()) for r in splits.values()),
        "missing_classes": {s: [c for c, n in by_class.items() if n[s] == 0] for s in splits},
        "quarantined": {
            "total": len(bad),
            "by_reason": dict(Counter(row["reason"] for row in bad).most_common()),
            "by_split": dict(Counter(row["split"] for row in bad)),
            "first": bad[:5],
        },
        "duplicates": _duplicates(cache, list(splits)),
        "sizes": {
            "width": dict(zip(side, _spread(sizes[:, 0]), strict=True)),
            "height": dict(zip(side, _spread(sizes[:, 1]), strict=True)),
            "source_bytes": int(plan.rows.size.sum()),
            "cache_bytes": sum(s["bytes"] for s in cache.manifest["shards"]),
        },
        "ignored_files": plan.rows.ignored,
    }


def _spread(values: np.ndarray) -> tuple[int, int, int]:
    if len(values) == 0:
        return 0, 0, 0
    return int(values.min()), int(np.median(values)), int(values.max())


def _duplicates(cache: Cache, splits: list[str], most: int = 100) -> dict[str, Any]:
    """Groups of images whose files are the same bytes; those that cross splits or classes are listed first."""
    readers = [cache.split(name) for name in splits]
    hashes = np.concatenate([np.empty(0, "S32"), *(r.hashes for r in readers)])
    owner = np.repeat(np.arange(len(readers)), [len(r) for r in readers])
    _, group, size = np.unique(hashes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(size[group] > 1)
    rows = rows[np.argsort(group[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []
    across_splits = [len(np.unique(owner[g])) > 1 for g in groups]
    starts = np.cumsum([0, *(len(r) for r in readers)])

    def classes_of(row: int) -> str | None:
        reader, within = readers[owner[row]], int(row - starts[owner[row]])
        return None if reader.labels[within] == UNLABELED else reader.classes_of(within)

    across_classes = [len({classes_of(row) for row in g} - {None}) > 1 for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (not across_splits[i], not across_classes[i]))
    listed = []
    for i in order[:most]:
        members = [
            {
                "path": readers[owner[row]].paths[row - starts[owner[row]]],
                "split": splits[owner[row]],
                "class": classes_of(row),
            }
            for row in groups[i]
        ]
        listed.append(members)
    return {
        "groups": len(groups),
        "images": len(rows),
        "groups_across_splits": sum(across_splits),
        "groups_across_classes": sum(across_classes),
        "listed": listed,
    }


def _refuse_unusable(
    report: dict[str, Any], folder: Path, max_bad_fraction: float, for_training: bool
) -> None:
    bad, listed = report["quarantined"], report["listed"]
    if bad["total"] > max_bad_fraction * listed:
        reasons = ", ".join(f"{n} {reason}" for reason, n in bad["by_reason"].items())
        first = "; ".join(f"{r['path']} ({r['reason']}: {r['detail']})" for r in bad["first"])
        enough = -(-bad["total"] * 1000 // listed) / 1000
        raise UserError(
            f"data.max_bad_fraction must be at least the share of bad images, got {max_bad_fraction:g} with {bad['total']} of "
            f"{listed} bad ({reasons}): {first}. Mend or remove them (all are listed in {folder / 'quarantine.parquet'}), "
            f"or set data.max_bad_fraction={enough:g}: what is done is kept"
        )
    empty = [split for split, n in report["counts"].items() if n == 0]
    if empty:
        raise UserError(
            f"data.root must hold a readable image in every split, got none in {', '.join(empty)}; see {folder / 'quarantine.parquet'}"
        )
    trained = [name for name, n in report["by_class"].items() if n.get("train")]
    if for_training and len(trained) < 2:
        raise UserError(
            f"data.root must hold readable training images of at least 2 classes, got {len(trained)} "
            f"({', '.join(trained) or 'none'}); see {folder / 'quarantine.parquet'}"
        )


def print_report(report: dict[str, Any], console: Console, most_classes: int = 20) -> None:
    """The report as tables: at most `most_classes` classes, the largest first."""
    from rich.table import Table

    splits = list(report["counts"])
    table = Table(
        title=f"{report['images']:,} images, {len(report['by_class']):,} classes",
        title_justify="left",
    )
    table.add_column("class")
    for split in splits:
        table.add_column(split, justify="right")
    by_class = sorted(report["by_class"].items(), key=lambda item: -sum(item[1].values()))
    for name, counts in by_class[:most_classes]:
        table.add_row(name, *(f"{counts[s]:,}" for s in splits))
    if len(by_class) > most_classes:
        table.add_row(f"… {len(by_class) - most_classes:,} more", *("…" for _ in splits))
    table.add_section()
    table.add_row("all", *(f"{report['counts'][s]:,}" for s in splits))
    console.print(table)

    facts = Table(show_header=False, box=None)
    facts.add_column(no_wrap=True)
    facts.add_column(overflow="fold")
    bad, same, sizes = report["quarantined"], report["duplicates"], report["sizes"]
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in bad["by_reason"].items())
    facts.add_row(
        "quarantined",
        f"{bad['total']:,} of {report['listed']:,}" + (f": {reasons}" if reasons else ""),
    )
    crossing = f", {same['groups_across_splits']:,} groups across splits, {same['groups_across_classes']:,} across classes"
    facts.add_row(
        "duplicates",
        f"{same['images']:,} images in {same['groups']:,} groups"
        + (crossing if same["groups"] else ""),
    )
    if report["unlabeled"]:
        facts.add_row("unlabelled", f"{report['unlabeled']:,} images, for training")
    for split, names in report["missing_classes"].items():
        if names:
            some = ", ".join(names[:5]) + (", …" if len(names) > 5 else "")
            facts.add_row(f"not in {split}", f"{len(names):,} classes: {some}")
    width, height = sizes["width"], sizes["height"]
    facts.add_row(
        "original px",
        f"width {width['min']}–{width['max']} (median {width['median']}), "
        f"height {height['min']}–{height['max']} (median {height['median']})",
    )
    facts.add_row(
        "bytes", f"{sizes['source_bytes'] / 1e6:,.1f} MB -> {sizes['cache_bytes'] / 1e6:,.1f} MB"
    )
    if report["ignored_files"]:
        ignored = ", ".join(f"{n:,} {kind}" for kind, n in report["ignored_files"].items())
        facts.add_row("ignored files", ignored)
    built = report["built"]
    if built["images_per_s"]:
        facts.add_row(
            "built",
            f"{built['images']:,} images in {built['seconds']:.1f} s ({built['images_per_s']:,.0f} img/s)",
        )
    if built["mended"]:
        facts.add_row(
            "mended",
            f"{len(built['mended'])} damaged shards were built again: {', '.join(built['mended'][:5])}",
        )
    facts.add_row("cache", report["cache_dir"])
    console.print(facts)
