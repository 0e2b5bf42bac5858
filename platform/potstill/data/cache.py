"""The cache on disk: decoded images in checksummed shards, read by memory-mapping.

<cache.dir>/<key>/
    manifest.json         written last: without it this is no cache yet
    classes.json          the class names in the order of their index
    shard-00000.arrow     one Arrow record batch: image (raw: [px*px*3] uint8, memory-mapped; jpeg: the bytes
                          of a JPEG, decoded at every read), label (-1: unlabelled), labels (a list: only
                          where an image may have several), weight, id, sha256 (of the image's file),
                          path, width, height (of the whole image, in pixels)
    shard-00000.json      what prepare.py knows of that shard, so that an interrupted build can go on
    quarantine.parquet    the files left out: path, split, class, reason, detail
    report.json
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.config import Decode
from potstill.data.store import LocalCopies
from potstill.errors import UserError
from potstill.runs import file_sha256, read_json
from potstill.storage import local_folder

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 2


PIXELS = ("raw", "jpeg")
MOST_DECODERS = 16


def write_shard(
    folder: Path, name: str, columns: Mapping[str, Any], jpeg_quality: int | None = None
) -> dict[str, Any]:
    """Write one shard beside its name, sync it, rename it. Returns {"file", "rows", "bytes", "sha256"}.

    Images are kept as they are, or, with a `jpeg_quality` of 1 to 100, as JPEGs of that quality.

    `columns`: image uint8 [n, px, px, 3], contiguous; label, weight and id [n]; sha256 n times 32 bytes; path
    n strings; width and height [n]; perhaps labels, n lists of indices.
    """
    import pyarrow as pa

    image = columns["image"]
    rows, record_bytes = len(image), int(np.prod(image.shape[1:]))
    assert rows > 0
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    kinds = {
        "label": pa.int32(),
        **({"labels": pa.list_(pa.int32())} if "labels" in columns else {}),
        "weight": pa.float32(),
        "id": pa.int64(),
        "sha256": pa.binary(32),
        "path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
    if jpeg_quality is not None:
        pixels = pa.array([encode_jpeg(each, jpeg_quality) for each in image], pa.binary())
    else:
        pixels = pa.FixedSizeBinaryArray.from_buffers(
            pa.binary(record_bytes), rows, [None, pa.py_buffer(image)]
        )
    arrays = [pixels, *(pa.array(columns[name], kind) for name, kind in kinds.items())]
    return write_batch(folder, name, pa.record_batch(arrays, names=["image", *kinds]))


def write_batch(folder: Path, name: str, batch: pa.RecordBatch) -> dict[str, Any]:
    """Write a file of one record batch beside its name, sync it, rename it. Returns {"file", "rows", "bytes", "sha256"}."""
    import pyarrow as pa

    beside = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        description = {
            "file": name,
            "rows": batch.num_rows,
            "bytes": beside.stat().st_size,
            "sha256": file_sha256(beside),
        }
        os.replace(beside, folder / name)
    finally:
        beside.unlink(missing_ok=True)
    return description


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """uint8 [px, px, 3] -> a JPEG; its colours are kept at full resolution (4:4:4)."""
    from PIL import Image

    sink = io.BytesIO()
    Image.fromarray(image).save(sink, "JPEG", quality=quality, subsampling=0)
    return sink.getvalue()


def open_cache(
    folder: Path,
    verify: bool = False,
    local_dir: str | Path | None = None,
    max_gb: float | None = None,
) -> Cache:
    """Open a finished cache. The sizes of its shards are compared, and their SHA-256 where `verify` is set.

    With a `local_dir`, on a disk of this node, shards are copied there within `max_gb` before their images
    are read (see store.LocalCopies). Raises UserError where the cache is not finished or damaged.
    """
    remedy = "run jobs/prepare.py with the same data and cache keys"
    try:
        manifest = read_json(folder / "manifest.json")
        format_ = manifest["format"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(
            f"cache: {folder} must hold a finished cache, but its manifest.json is missing or damaged; {remedy}"
        ) from None
    if format_ != FORMAT:
        raise UserError(
            f"cache: {folder} must be of format {FORMAT}, got {format_}; delete the folder, and {remedy}"
        )
    for shard in manifest["shards"]:
        if fault := shard_fault(folder, shard, verify):
            raise UserError(
                f"cache: {folder / shard['file']} is damaged: {fault}; {remedy}"
                f"{' and cache.verify=true' if verify else ''}: only what is damaged is built again"
            )
    return Cache(folder, manifest, local_dir, max_gb)


def shard_fault(folder: Path, shard: Mapping[str, Any], verify: bool) -> str | None:
    """What is wrong with a shard's file, compared with its description; None where nothing is."""
    try:
        size = (folder / shard["file"]).stat().st_size
    except OSError as error:
        return error.strerror or str(error)
    if size != shard["bytes"]:
        return f"{size} bytes instead of {shard['bytes']}"
    if verify and file_sha256(folder / shard["file"]) != shard["sha256"]:
        return "its SHA-256 does not match"
    return None


class Cache:
    """A prepared set. It travels to another process as its folder."""

    def __init__(
        self,
        folder: Path,
        manifest: dict[str, Any],
        local_dir: str | Path | None = None,
        max_gb: float | None = None,
    ):
        self.folder = folder
        self.manifest = manifest
        self.key: str = manifest["key"]
        self.classes: list[str] = manifest["classes"]
        self.decode = Decode(**manifest["decode"])
        self.counts: dict[str, int] = manifest["counts"]
        self.multi_label: bool = manifest.get("multi_label", False)
        self.pixels: str = manifest.get("pixels", "raw")
        self._splits: dict[str, SplitReader] = {}
        self._reopened_with = (False, local_dir, max_gb)
        self._copies = None
        if local_dir is not None:
            self._copies = LocalCopies(
                folder, local_folder(str(local_dir), "cache.local_dir"), max_gb
            )

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.folder, *self._reopened_with)

    def path_of(self, shard: Mapping[str, Any]) -> Path:
        """Where the images of a shard are read: on this node, where copies are kept."""
        return self._copies.path(shard) if self._copies else self.folder / shard["file"]

    def split(self, name: str) -> SplitReader:
        """The reader of train, val or test; of no rows where the set has no such split."""
        if name not in self._splits:
            self._splits[name] = SplitReader(self, name)
        return self._splits[name]


class SplitReader:
    """One split: N rows in the order of their shards. Nothing is read before it is asked for."""

    def __init__(self, cache: Cache, name: str):
        self.cache = cache
        self.name = name
        self._shards = [s for s in cache.manifest["shards"] if s["split"] == name]
        self.shard_rows: list[int] = [s["rows"] for s in self._shards]
        self._ends = np.cumsum(self.shard_rows, dtype=np.int64)
        self._starts = self._ends - self.shard_rows
        self._mapped: list[_Jpegs | np.ndarray | None] = [None] * len(self._shards)

    def __reduce__(self) -> tuple[Any, ...]:
        return _reopen_split, (self.cache, self.name)

    def __len__(self) -> int:
        return sum(self.shard_rows)

    @cached_property
    def ids(self) -> np.ndarray:
        """[N] int64."""
        return self._column("id", np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """[N] int64, index into the cache's K classes; -1: unlabelled.

        Where an image may have several classes it is the rarest of them, and K where it has none.
        """
        return self._column("label", np.int32).astype(np.int64)

    @cached_property
    def weights(self) -> np.ndarray:
        """[N] float32."""
        return self._column("weight", np.float32)

    def targets(self, rows: Sequence[int] | np.ndarray) -> np.ndarray:
        """What a loss compares with: int64 [n], -1 where unlabelled; where an image may have several classes,
        float32 [n, K] of 0 and 1."""
        rows = np.asarray(rows, np.int64)
        if not self.cache.multi_label:
            return self.labels[rows]
        starts, values = self._several
        hot = np.zeros((len(rows), len(self.cache.classes)), np.float32)
        counts = starts[rows + 1] - starts[rows]
        at = np.repeat(np.arange(len(rows)), counts)
        within = np.arange(len(at)) - np.repeat(np.cumsum(counts) - counts, counts)
        hot[at, values[np.repeat(starts[rows], counts) + within]] = 1
        return hot

    def classes_of(self, row: int) -> str:
        """The names of a row's classes, with `|` between several; "" where it has none, or they are not known."""
        label, classes = int(self.labels[row]), self.cache.classes
        if self.cache.multi_label:
            starts, values = self._several
            return "|".join(classes[k] for k in values[starts[row] : starts[row + 1]])
        return "" if label < 0 else classes[label]

    def class_counts(self) -> np.ndarray:
        """[K] int64: images of each class; one of several classes counts for each."""
        every = self._several[1] if self.cache.multi_label else self.labels
        return np.bincount(every[every >= 0], minlength=len(self.cache.classes))

    @cached_property
    def _several(self) -> tuple[np.ndarray, np.ndarray]:
        """Where each row's classes begin [N + 1], and the classes of all rows, one after the other."""
        starts, values = [np.zeros(1, np.int64)], [np.empty(0, np.int64)]
        for batch in self._batches:
            column = batch.column("labels")
            starts.append(column.offsets.to_numpy()[1:].astype(np.int64) + starts[-1][-1])
            values.append(column.values.to_numpy().astype(np.int64))
        return np.concatenate(starts), np.concatenate(values)

    @cached_property
    def hashes(self) -> np.ndarray:
        """[N] S32: SHA-256 of the images' files. Compare them as arrays: a single item loses trailing zeros."""
        return self._column("sha256", np.dtype("S32"))

    @cached_property
    def original_sizes(self) -> np.ndarray:
        """[N, 2] int32: width and height of the images before they were decoded, in pixels."""
        return np.stack([self._column("width", np.int32), self._column("height", np.int32)], 1)

    @cached_property
    def paths(self) -> list[str]:
        """N paths, relative to the source's root."""
        return [path for batch in self._batches for path in batch.column("path").to_pylist()]

    def read(self, rows: Sequence[int] | np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
        """Copy the images of `rows` [n] (into `out`, if given): uint8 [n, px, px, 3]. Safe in several threads."""
        rows = np.asarray(rows, np.int64)
        px = self.cache.decode.image_px
        if out is None:
            out = np.empty((len(rows), px, px, 3), np.uint8)
        if len(rows) == 0:
            return out
        if rows.min() < 0 or rows.max() >= len(self):
            raise IndexError(f"rows must be in [0, {len(self)}), got {rows.min()} to {rows.max()}")
        shard_of = np.searchsorted(self._ends, rows, side="right")
        within = rows - self._starts[shard_of]

        def fill(part: range) -> None:
            for i in part:
                out[i] = self._images(int(shard_of[i]))[int(within[i])]

        everything = range(len(rows))
        if self.cache.pixels == "raw" or len(rows) == 1:
            fill(everything)
        else:
            pool, threads = _decoders()
            for _ in pool.map(fill, [everything[k::threads] for k in range(threads)]):
                pass  # to raise what was raised
        return out

    def image(self, row: int) -> np.ndarray:
        """uint8 [px, px, 3] that cannot be written to: a view into the cache where its pixels are raw."""
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._images(shard)[row - int(self._starts[shard])]

    def row_of(self, sample_id: int) -> int:
        """The row of a sample. Raises KeyError where this split has no such id."""
        place = int(np.searchsorted(self.ids, sample_id, sorter=self._by_id))
        if place < len(self) and self.ids[row := int(self._by_id[place])] == sample_id:
            return row
        raise KeyError(sample_id)

    @cached_property
    def _by_id(self) -> np.ndarray:
        return np.argsort(self.ids)

    @cached_property
    def _batches(self) -> list[pa.RecordBatch]:
        return [_map(self.cache.folder / shard["file"]) for shard in self._shards]

    def _images(self, shard: int) -> _Jpegs | np.ndarray:
        """The images of a shard, mapped when they are first asked for; two threads may do so at once."""
        if (known := self._mapped[shard]) is None:
            about, px = self._shards[shard], self.cache.decode.image_px
            path = self.cache.path_of(about)
            in_place = path.parent == self.cache.folder
            batch = self._batches[shard] if in_place else _map(path)
            if self.cache.pixels == "jpeg":
                known = _Jpegs(batch, px, self.cache.folder / about["file"])
            else:
                known = _values(batch, "image", np.dtype(np.uint8)).reshape(-1, px, px, 3)
            self._mapped[shard] = known
        return known

    def _column(self, name: str, kind: Any) -> np.ndarray:
        parts = [_values(batch, name, np.dtype(kind)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, kind)


def _map(path: Path) -> pa.RecordBatch:
    import pyarrow as pa

    # the mapping lives as long as the batch; the file need not stay open, and there may be thousands
    with pa.memory_map(str(path)) as source:
        return pa.ipc.open_file(source).get_batch(0)


class _Jpegs:
    """The images of a jpeg shard, each decoded when it is asked for. Safe in several threads."""

    def __init__(self, batch: pa.RecordBatch, px: int, path: Path):
        _, starts, content = batch.column("image").buffers()
        self._starts = np.frombuffer(starts, np.int32, batch.num_rows + 1)
        self._content = memoryview(content)
        self._px, self._path = px, path

    def __getitem__(self, row: int) -> np.ndarray:
        from PIL import Image

        content = self._content[self._starts[row] : self._starts[row + 1]]
        try:
            with Image.open(io.BytesIO(content), formats=("JPEG",)) as im:
                image = np.array(im)
        except OSError as error:
            fault = str(error)
        else:
            if image.shape == (self._px, self._px, 3):
                image.flags.writeable = False
                return image
            fault = f"{image.shape} instead of {self._px} x {self._px} pixels"
        raise UserError(
            f"cache: {self._path} is damaged: image {row}: {fault}; run jobs/prepare.py with the same data and cache "
            "keys and cache.verify=true: only what is damaged is built again"
        )


@functools.cache
def _decoders() -> tuple[ThreadPoolExecutor, int]:
    """Threads that decode JPEGs: Pillow lets go of Python's lock meanwhile. And how many."""
    threads = min(MOST_DECODERS, len(os.sched_getaffinity(0)))
    return ThreadPoolExecutor(threads, thread_name_prefix="decode-jpeg"), threads


def _values(batch: pa.RecordBatch, name: str, kind: np.dtype) -> np.ndarray:
    column = batch.column(name)
    count = (
        batch.num_rows * column.type.bit_width // 8 // kind.itemsize
    )  # the buffer may end in padding
    return np.frombuffer(column.buffers()[1], kind, count)


def _reopen_split(cache: Cache, name: str) -> SplitReader:
    return cache.split(name)


def hash_prefixes(hashes: np.ndarray) -> np.ndarray:
    """The first 8 bytes of each SHA-256 (S32 [N]) as numbers [N] uint64: enough to know an image again."""
    return np.frombuffer(hashes.astype("S32").tobytes(), dtype=np.uint64)[::4]
