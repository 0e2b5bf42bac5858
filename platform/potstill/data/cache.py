"""The cache on disk: decoded images in checksummed shards, read by memory-mapping.

<cache.dir>/<key>/
    manifest.json         written last: without it this is no cache yet
    classes.json          the class names in the order of their index
    shard-00000.arrow     one Arrow record batch: image [px*px*3] uint8, label, id, sha256 (of the image's
                          file), path, width, height (of the whole image, in pixels)
    shard-00000.json      what prepare.py knows of that shard, so that an interrupted build can go on
    quarantine.parquet    the files left out: path, split, class, reason, detail
    report.json
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill.config import Decode
from potstill.errors import UserError
from potstill.runs import file_sha256, read_json

if TYPE_CHECKING:
    import pyarrow as pa

FORMAT = 1


def write_shard(folder: Path, name: str, columns: Mapping[str, Any]) -> dict[str, Any]:
    """Write one shard beside its name, sync it, rename it. Returns {"file", "rows", "bytes", "sha256"}.

    `columns`: image uint8 [n, px, px, 3], contiguous; label and id [n]; sha256 n times 32 bytes; path n
    strings; width and height [n].
    """
    import pyarrow as pa

    image = columns["image"]
    rows, record_bytes = len(image), int(np.prod(image.shape[1:]))
    assert rows > 0
    assert image.dtype == np.uint8
    assert image.flags.c_contiguous
    kinds = {
        "label": pa.int32(),
        "id": pa.int64(),
        "sha256": pa.binary(32),
        "path": pa.string(),
        "width": pa.int32(),
        "height": pa.int32(),
    }
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(record_bytes), rows, [None, pa.py_buffer(image)]
    )
    arrays = [pixels, *(pa.array(columns[name], kind) for name, kind in kinds.items())]
    batch = pa.record_batch(arrays, names=["image", *kinds])
    beside = folder / f".{name}.{os.getpid()}.tmp"
    try:
        with pa.OSFile(str(beside), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
            writer.write_batch(batch)
        with open(beside, "rb") as file:
            os.fsync(file.fileno())
        description = {
            "file": name,
            "rows": rows,
            "bytes": beside.stat().st_size,
            "sha256": file_sha256(beside),
        }
        os.replace(beside, folder / name)
    finally:
        beside.unlink(missing_ok=True)
    return description


def open_cache(folder: Path, verify: bool = False) -> Cache:
    """Open a finished cache. The sizes of its shards are compared, and their SHA-256 where `verify` is set.

    Raises UserError where it is not finished or damaged.
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
    return Cache(folder, manifest)


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

    def __init__(self, folder: Path, manifest: dict[str, Any]):
        self.folder = folder
        self.manifest = manifest
        self.key: str = manifest["key"]
        self.classes: list[str] = manifest["classes"]
        self.decode = Decode(**manifest["decode"])
        self.counts: dict[str, int] = manifest["counts"]
        self._splits: dict[str, SplitReader] = {}

    def __reduce__(self) -> tuple[Any, ...]:
        return open_cache, (self.folder,)

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
        """[N] int64, index into the cache's classes."""
        return self._column("label", np.int32).astype(np.int64)

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
        images = self._images
        for i, (shard, row) in enumerate(zip(shard_of.tolist(), within.tolist(), strict=True)):
            out[i] = images[shard][row]
        return out

    def image(self, row: int) -> np.ndarray:
        """uint8 [px, px, 3], a view into the cache that cannot be written to."""
        if not 0 <= row < len(self):
            raise IndexError(f"row must be in [0, {len(self)}), got {row}")
        shard = int(np.searchsorted(self._ends, row, side="right"))
        return self._images[shard][row - int(self._starts[shard])]

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
        import pyarrow as pa

        batches = []
        for shard in self._shards:
            # the mapping lives as long as the batch; the file need not stay open, and there may be thousands
            with pa.memory_map(str(self.cache.folder / shard["file"])) as source:
                batches.append(pa.ipc.open_file(source).get_batch(0))
        return batches

    @cached_property
    def _images(self) -> list[np.ndarray]:
        px = self.cache.decode.image_px
        return [
            _values(batch, "image", np.dtype(np.uint8)).reshape(-1, px, px, 3)
            for batch in self._batches
        ]

    def _column(self, name: str, kind: Any) -> np.ndarray:
        parts = [_values(batch, name, np.dtype(kind)) for batch in self._batches]
        return np.concatenate(parts) if parts else np.empty(0, kind)


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
