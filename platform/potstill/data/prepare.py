"""Source -> checked, decoded, sharded cache, with a quarantine and a report. Ray Data does the work.

One item of the dataset is the plan of one shard. The task that gets it reads, decodes and writes that
shard, and returns only its description: pixels do not travel through the object store. A shard's plan
depends on the source and the decode spec alone, so that a build that was interrupted goes on with what is
there, on any number of cores.
"""

from __future__ import annotations

import dataclasses
import errno
import fcntl
import hashlib
import json
import logging
import os
import pickle
import shutil
import stat
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill import console
from potstill.data import images
from potstill.data.cache import FORMAT, Cache, open_cache, shard_fault, write_shard
from potstill.data.sources import SPLITS, Rows, fingerprint, list_rows, printable
from potstill.errors import UserError
from potstill.runs import atomic_write, read_json, write_json

if TYPE_CHECKING:
    from rich.console import Console

    from potstill import config

SHARD_BYTES = (
    32 * 1024**2
)  # what a task holds in memory at once, and the largest piece an epoch moves about
SMALL_SHARD_ROWS = 256
PARALLEL_SHARDS = (
    32  # a set with less than SHARD_BYTES for each is cut into this many, if they are not tiny
)
SPACE_MARGIN = 1.05

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


@dataclass(frozen=True)
class Prepared:
    cache_dir: Path
    report: dict[str, Any]
    reused: bool


def check(data: config.Data, cache: config.Cache, for_training: bool = True) -> Plan:
    """Everything that can be refused without opening an image; takes seconds and needs no Ray.

    `for_training=False` is for a folder to evaluate on: see sources.list_rows.

    Raises UserError.
    """
    rows = list_rows(data, for_training)
    root = Path(cache.dir).expanduser().absolute()
    _refuse_cache_dir(root, rows.root)
    key = fingerprint(rows, data.decode)
    folder = root / key
    shards = _plan_shards(rows, data.decode)
    needed = 0
    if not (folder / "manifest.json").exists():
        present = sum(_size(folder / s.file) for s in shards)
        needed = max(0, _bytes_of(rows, data.decode, len(shards)) - present)
        _refuse_space(root, folder, needed, present, cache.max_gb)
    return Plan(rows, key, folder, data.decode, shards, needed)


def prepare(
    data: config.Data,
    cache: config.Cache,
    progress: Progress | None = None,
    for_training: bool = True,
) -> Prepared:
    """The cache of a source: the one on disk where it fits, else it is built. Ray is started only to build.

    Another process that prepares the same key is waited for.

    Raises UserError where the source, the space, or what the images turn out to be does not allow it.
    """
    plan = check(data, cache, for_training)
    with _lock(plan, progress):
        reused = _is_ready(plan, cache.verify)
        if not reused:
            _build(plan, data, cache.verify, progress, for_training)
        report = read_json(plan.folder / "report.json")
        _refuse_unusable(report, plan.folder, data.max_bad_fraction, for_training)
    return Prepared(plan.folder, report, reused)


def prepare_shown(data: config.Data, cache: config.Cache, for_training: bool = True) -> Prepared:
    """`prepare`, with a progress bar where there is something to build."""
    with ExitStack() as stack:
        bar: list[Callable[[float], None]] = []

        def show(done: int, total: int) -> None:
            if not bar:
                bar.append(stack.enter_context(console.progress("Preparing images", total)))
            bar[0](done)

        return prepare(data, cache, show, for_training)


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


def _bytes_of(rows: Rows, decode: config.Decode, shards: int) -> int:
    return len(rows) * (_record_bytes(decode) + 64) + sum(map(len, rows.path)) + shards * 8192


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _refuse_cache_dir(root: Path, source: Path) -> None:
    if root.resolve().is_relative_to(source.resolve()):
        inside = root.resolve().relative_to(source.resolve())
        if not any(part.startswith(".") for part in inside.parts):
            raise UserError(
                f"cache.dir must not be inside data.root, got {str(root)!r}: its files would count as images; set cache.dir"
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


def _refuse_space(
    root: Path, folder: Path, needed: int, present: int, max_gb: float | None
) -> None:
    if max_gb is not None:
        others = [
            f for f in root.glob("*") if f.is_dir() and f != folder and (f / ".lock").exists()
        ]
        held = sum(_size(f) for other in others for f in other.iterdir())
        if held + present + needed > max_gb * 1e9:
            raise UserError(
                f"cache.max_gb must be at least {(held + present + needed) / 1e9:.3f} for this set, got {max_gb:g}: it takes "
                f"{(present + needed) / 1e9:.3f} GB, and {len(others)} other sets in {str(root)!r} take {held / 1e9:.3f} GB; "
                "raise it, delete a set's folder, or take a smaller data.decode.image_px or data.max_samples"
            )
    free = shutil.disk_usage(_existing(root)).free
    if needed * SPACE_MARGIN > free:
        raise UserError(
            f"cache.dir must have {needed * SPACE_MARGIN / 1e9:.3f} GB free for this set, got {free / 1e9:.3f} GB at {str(root)!r}; "
            "free some, set cache.dir to another disk, or take a smaller data.decode.image_px or data.max_samples"
        )


# --------------------------------------------------------------------------------------- one at a time
@contextmanager
def _lock(plan: Plan, progress: Progress | None) -> Iterator[None]:
    """Wait until no other process prepares this key; meanwhile report what it has done."""
    plan.folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(plan.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if progress:
                    done = sum(
                        len(s.rows) for s in plan.shards if (plan.folder / s.sidecar).exists()
                    )
                    progress(done, len(plan.rows))
                time.sleep(0.25)
        yield
    finally:
        os.close(handle)


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
    plan: Plan, data: config.Data, verify: bool, progress: Progress | None, for_training: bool
) -> None:
    started = time.monotonic()
    for leftover in plan.folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    descriptions = {
        s.name: d for s in plan.shards if (d := _kept(plan.folder, plan.rows, s, verify))
    }
    # a finished cache that lost a shard is none until it has it again
    mended = (plan.folder / "manifest.json").exists()
    (plan.folder / "manifest.json").unlink(missing_ok=True)
    todo = [s for s in plan.shards if s.name not in descriptions]
    done = sum(d["planned"] for d in descriptions.values())
    if progress:
        progress(done, len(plan.rows))
    built = 0
    for description in _run(plan, todo) if todo else ():
        descriptions[description["name"]] = description
        built += description["planned"]
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
        "root": str(plan.rows.root),
        "created": time.time(),
        "classes": plan.rows.classes,
        "decode": dataclasses.asdict(plan.decode),
        "counts": {
            split: n for split, n in counts.items() if n or (plan.rows.split == split).any()
        },
        "shards": shards,
    }


def _run(plan: Plan, shards: list[Shard]) -> Iterator[dict[str, Any]]:
    """Build shards on all cores; their descriptions, in the order in which they are done."""
    from potstill.cluster import start_ray

    ours = start_ray()  # before ray is imported: it reads its environment then
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    # what it logs stays in its file; the console shows our lines only
    consoles = [h for h in logging.getLogger("ray.data").handlers if h.name == "console"]
    levels = [h.level for h in consoles]
    for handler in consoles:
        handler.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            items = [{"job": pickle.dumps(_job(plan, s))} for s in shards]
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            for row in dataset.map(_run_job).iter_rows():
                description = json.loads(row["description"])
                if message := description.get("error"):
                    raise UserError(message)
                yield description
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
        if ours:  # training in this process wants the memory and the cores
            ray.shutdown()


# ------------------------------------------------------------------------------------------ one shard
@dataclass(frozen=True)
class _Job:
    name: str
    split: str
    folder: Path
    root: Path
    decode: config.Decode
    classes: list[str]  # of each row
    path: list[str]
    size: np.ndarray
    mtime_ns: np.ndarray
    label: np.ndarray
    id: np.ndarray


def _job(plan: Plan, shard: Shard) -> _Job:
    rows, at = plan.rows, shard.rows
    return _Job(
        name=shard.name,
        split=shard.split,
        folder=plan.folder,
        root=rows.root,
        decode=plan.decode,
        classes=[rows.classes[i] for i in rows.label[at]],
        path=[rows.path[i] for i in at],
        size=rows.size[at],
        mtime_ns=rows.mtime_ns[at],
        label=rows.label[at],
        id=rows.id[at],
    )


def _run_job(row: dict[str, Any]) -> dict[str, Any]:
    """What a Ray Data task does. A mistake of the user's comes back as a message: Ray would wrap it in a traceback."""
    try:
        description = _build_shard(pickle.loads(row["job"]))
    except UserError as error:
        description = {"error": str(error)}
    return {"description": json.dumps(description)}


def _build_shard(job: _Job) -> dict[str, Any]:
    """Read, decode, write a shard and its sidecar. Returns the sidecar's content."""
    px = job.decode.image_px
    pixels = np.empty((len(job.path), px, px, 3), np.uint8)
    good: list[int] = []
    hashes: list[bytes] = []
    sizes: list[tuple[int, int]] = []
    quarantined: list[dict[str, str]] = []
    unopened = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL's remarks on files that it reads all the same
        for i, path in enumerate(job.path):
            try:
                content = _read(job, i)
                pixels[len(good)], size = images.decode_with_size(content, job.decode)
            except (images.BadImage, OSError) as error:
                if isinstance(error, OSError):
                    unopened += 1
                    error = images.BadImage("unreadable", error.strerror or str(error))
                row = {
                    "path": printable(path),
                    "class": job.classes[i],
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
            "label": job.label[good],
            "id": job.id[good],
            "sha256": hashes,
            "path": [printable(job.path[i]) for i in good],
            "width": [w for w, _ in sizes],
            "height": [h for _, h in sizes],
        }
        try:
            written = write_shard(job.folder, f"{job.name}.arrow", columns)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(
                    f"cache.dir must have room, but writing to {str(job.folder)!r} failed: {error.strerror}; free some space, "
                    "and the same command goes on with the shards it has"
                ) from None
            raise
    description = {
        "format": FORMAT,
        "name": job.name,
        "split": job.split,
        "planned": len(job.path),
        "plan": _digest(job.id),
        "unopened": unopened,
        **written,
        "quarantined": quarantined,
    }
    atomic_write(job.folder / f"{job.name}.json", json.dumps(description))
    return description


def _read(job: _Job, i: int) -> bytes:
    """A file's bytes. Raises OSError, BadImage, and UserError if it is no longer what was listed."""
    path = job.root / job.path[i]
    with open(path, "rb") as file:
        info = os.fstat(file.fileno())
        if not stat.S_ISREG(info.st_mode) or (info.st_size, info.st_mtime_ns) != (
            job.size[i],
            job.mtime_ns[i],
        ):
            raise UserError(
                f"data.root must not change while it is prepared, but {str(path)!r} did; start the same command again"
            )
        # 16-bit RGBA without compression, and room for metadata: no image under the limit is larger
        if info.st_size > job.decode.max_megapixels * 8e6 + 64e6:
            raise images.BadImage(
                "over the pixel limit",
                f"a file of {info.st_size / 1e6:.0f} MB, data.decode.max_megapixels={job.decode.max_megapixels:g}",
            )
        return file.read()


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
        counted = np.bincount(reader.labels, minlength=len(cache.classes))
        for name, n in zip(cache.classes, counted.tolist(), strict=True):
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
    labels = np.concatenate([np.empty(0, np.int64), *(r.labels for r in readers)])
    owner = np.repeat(np.arange(len(readers)), [len(r) for r in readers])
    _, group, size = np.unique(hashes, return_inverse=True, return_counts=True)
    rows = np.flatnonzero(size[group] > 1)
    rows = rows[np.argsort(group[rows], kind="stable")]
    groups = np.split(rows, np.flatnonzero(np.diff(group[rows])) + 1) if len(rows) else []
    across_splits = [len(np.unique(owner[g])) > 1 for g in groups]
    across_classes = [len(np.unique(labels[g])) > 1 for g in groups]
    order = sorted(range(len(groups)), key=lambda i: (not across_splits[i], not across_classes[i]))
    starts = np.cumsum([0, *(len(r) for r in readers)])
    listed = []
    for i in order[:most]:
        members = [
            {
                "path": readers[owner[row]].paths[row - starts[owner[row]]],
                "split": splits[owner[row]],
                "class": cache.classes[labels[row]],
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
