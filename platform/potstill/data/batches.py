"""The order of an epoch, the part of a rank, the exact position.

The order is a function of (seed, epoch) alone. A global batch is a slice of it, and a rank takes its
share of the slice, so any number of workers sees the same samples in the same steps.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from potstill.data.augment import views_of


class Reader(Protocol):
    """One split of a cache, see `cache.SplitReader`."""

    ids: Any  # [N] int64
    labels: Any  # [N] int64
    shard_rows: list[int]

    def read(self, rows: np.ndarray, /) -> np.ndarray: ...


def epoch_order(shard_rows: Sequence[int], seed: int, epoch: int, window_rows: int) -> np.ndarray:
    """Row numbers [N] in the order of an epoch.

    Shards are shuffled and taken together until a window holds `window_rows`; samples are shuffled
    within a window, so that a set larger than memory is read shard by shard.
    """
    rng = np.random.Generator(np.random.Philox([seed, epoch]))
    starts = [0, *np.cumsum(shard_rows).tolist()]
    parts: list[np.ndarray] = []
    window: list[np.ndarray] = []
    held = 0
    for shard in rng.permutation(len(shard_rows)):
        window.append(np.arange(starts[shard], starts[shard + 1]))
        held += shard_rows[shard]
        if held >= window_rows:
            parts.append(rng.permutation(np.concatenate(window)))
            window, held = [], 0
    if window:
        parts.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(parts)


def batch_bounds(n: int, batch_size: int) -> np.ndarray:
    """Where the batches of n samples begin and end [steps + 1].

    The tail is a batch of its own, however short; only a single sample, which batch statistics cannot
    use, joins the batch before it.
    """
    bounds = np.arange(0, n, batch_size)
    if n % batch_size == 1 and len(bounds) > 1:
        bounds = bounds[:-1]
    return np.append(bounds, n)


def split_pairs(n: int, parts: int) -> list[slice]:
    """Cut n samples into `parts` runs of whole pairs (2i, 2i+1), as even as can be; some may be empty.

    A last odd sample goes with the pair before it, so that no part is a single sample.
    """
    pairs = max(n // 2, 1) if n else 0
    bounds = [2 * (pairs * i // parts) for i in range(parts)] + [n]
    if pairs:
        bounds = [n if b // 2 >= pairs else b for b in bounds]
    return [slice(a, b) for a, b in itertools.pairwise(bounds)]


class Batches:
    """Batches of one split for one rank, read ahead by a thread.

    Yields dicts of CPU tensors: image uint8 [b,3,H,W] (channels last in memory), label, id, view int64 [b],
    weight float [b], weight_total float [] of the global batch. A rank without a sample in a short tail
    gets the batch's first samples with weight 0, so that it takes part in the step; that is the only padding.
    """

    def __init__(
        self,
        reader: Reader,
        batch_size: int,
        *,
        seed: int,
        shuffle: bool,
        rank: int = 0,
        world_size: int = 1,
        window_rows: int = 1 << 62,
        views: int | None = None,
        pin: bool = False,
    ) -> None:
        self.reader, self.seed, self.shuffle = reader, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.window_rows, self.views, self.pin = window_rows, views, pin
        self.samples = len(reader.ids)
        self.bounds = batch_bounds(self.samples, batch_size)
        self.steps = len(self.bounds) - 1

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch (0-based) from step `start` on."""
        if self.shuffle:
            order = epoch_order(self.reader.shard_rows, self.seed, epoch, self.window_rows)
        else:
            order = np.arange(self.samples)
        view = views_of(self.seed, epoch, 0, self.views)
        return _read_ahead(
            lambda: (self._batch(order, step, view) for step in range(start, self.steps))
        )

    def _batch(self, order: np.ndarray, step: int, view: int) -> dict[str, Tensor]:
        rows = order[self.bounds[step] : self.bounds[step + 1]]
        share = rows[split_pairs(len(rows), self.world_size)[self.rank]]
        weight = 1.0
        if not len(share):
            share, weight = rows[:2], 0.0
        image = torch.from_numpy(self.reader.read(share)).permute(0, 3, 1, 2)
        batch = {
            "image": image,
            "label": torch.from_numpy(self.reader.labels[share].astype(np.int64)),
            "id": torch.from_numpy(self.reader.ids[share].astype(np.int64)),
            "view": torch.full((len(share),), view, dtype=torch.int64),
            "weight": torch.full((len(share),), weight),
            "weight_total": torch.tensor(float(len(rows))),
        }
        return {k: v.pin_memory() for k, v in batch.items()} if self.pin else batch


def micro_batches(
    batch: dict[str, Tensor], size: int | None, accumulate: int
) -> list[dict[str, Tensor]]:
    """Cut a rank's batch into forward passes of at most `size` samples (or `accumulate` of them), in whole pairs."""
    n = len(batch["id"])
    parts = accumulate if size is None else -(-n // max(size, 2))
    cuts = [s for s in split_pairs(n, min(parts, max(n // 2, 1))) if s.stop > s.start]
    return [{k: v[cut] if v.ndim else v for k, v in batch.items()} for cut in cuts]


def _read_ahead(make, depth: int = 3):
    """Run an iterator in a thread, `depth` items ahead. What it raises is raised here; leaving early ends it."""
    items: queue.Queue = queue.Queue(depth)
    stop = threading.Event()

    def put(item) -> bool:
        while not stop.is_set():
            try:
                items.put(item, timeout=0.1)
                return True
            except queue.Full:
                continue
        return False

    def work() -> None:
        try:
            for item in make():
                if not put((item, None)):
                    return
            put((None, None))
        except BaseException as error:
            put((None, error))

    threading.Thread(target=work, daemon=True, name="read-ahead").start()
    try:
        while True:
            item, error = items.get()
            if error is not None:
                raise error
            if item is None:
                return
            yield item
    finally:
        stop.set()
