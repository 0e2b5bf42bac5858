"""The order of an epoch, the part of a rank, the exact position.

A pass goes once through the samples, or through as many draws of them; an epoch is a pass unless
`steps_per_epoch` says otherwise. The order is a function of (seed, pass) alone. A global batch is a slice
of it, and a rank takes its share of the slice, so any number of workers sees the same samples in the same
steps.
"""

from __future__ import annotations

import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from potstill.data.augment import views_of


class Reader(Protocol):
    """One split of a cache, see `cache.SplitReader`."""

    ids: Any  # [N] int64
    labels: Any  # [N] int64, -1 where there is none
    weights: Any  # [N] float32
    shard_rows: list[int]

    def read(self, rows: np.ndarray, /) -> np.ndarray: ...

    def targets(self, rows: np.ndarray, /) -> np.ndarray:
        """int64 [n], or float32 [n, K] where a sample may have several classes."""
        ...


def epoch_order(
    shard_rows: Sequence[int],
    seed: int,
    epoch: int,
    window_rows: int,
    counts: np.ndarray | None = None,
) -> np.ndarray:
    """Row numbers [N] in the order of an epoch; `counts` [N]: how often each row comes, else once.

    Shards are shuffled and taken together until a window holds `window_rows`; samples are shuffled
    within a window, so that a set larger than memory is read shard by shard.
    """
    rng = np.random.Generator(np.random.Philox([seed, epoch]))
    starts = [0, *np.cumsum(shard_rows).tolist()]
    parts: list[np.ndarray] = []
    window: list[np.ndarray] = []
    held = 0
    for shard in rng.permutation(len(shard_rows)):
        rows = np.arange(starts[shard], starts[shard + 1])
        window.append(rows if counts is None else np.repeat(rows, counts[rows]))
        held += shard_rows[shard]
        if held >= window_rows:
            parts.append(rng.permutation(np.concatenate(window)))
            window, held = [], 0
    if window:
        parts.append(rng.permutation(np.concatenate(window)))
    return np.concatenate(parts)


def draw_weighted(weights: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often each of N rows comes in N draws with replacement, by weights [N]."""
    rng = np.random.Generator(np.random.Philox([seed, epoch, 1]))
    share = weights.astype(np.float64)
    return rng.multinomial(len(share), share / share.sum())


def draw_balanced(labels: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """How often each of N rows comes so that every class has the same share of N, to within one draw.

    Within a class no image comes a second time before all others came once. Unlabelled rows (-1) come once.
    """
    rng = np.random.Generator(np.random.Philox([seed, epoch, 1]))
    counts = (labels < 0).astype(np.int64)
    classes = np.unique(labels[labels >= 0])
    each, extra = divmod(int((labels >= 0).sum()), len(classes))
    lucky = set(rng.permutation(classes)[:extra].tolist())
    for k in classes.tolist():
        rows = np.flatnonzero(labels == k)
        times, rest = divmod(each + (k in lucky), len(rows))
        counts[rows] = times
        counts[rng.permutation(rows)[:rest]] += 1
    return counts


def occurrences(order: np.ndarray) -> np.ndarray:
    """How often each entry [N] has come before in this order, from 0."""
    by_row = np.argsort(order, kind="stable")
    ordered = order[by_row]
    starts = np.flatnonzero(np.diff(ordered, prepend=ordered[:1] - 1))
    found = np.empty(len(order), np.int64)
    found[by_row] = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
    return found


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


Columns = Callable[[np.ndarray, np.ndarray], dict[str, Tensor]]
"""ids [b] and views [b], int64 -> further columns [b, ...], such as a teacher's outputs from the disk."""


class Batches:
    """Batches of one split for one rank, read ahead by a thread.

    Yields dicts of CPU tensors: image uint8 [b,3,H,W] (channels last in memory), label int64 [b] or float
    [b,K], id and view int64 [b], weight float [b], label_weight float [b] (the weight, and 0 where there is
    no label), and of the whole global batch weight_total, label_weight_total and count, float [].
    A rank without a sample in a short tail gets the batch's first samples with weight 0, so that it takes
    part in the step; that is the only padding.

    `sampler`: shuffle (every sample once a pass) | weighted (by the samples' weights, with replacement; the
    weights then do not count in the loss again) | class_balanced. `steps_per_epoch`: batches of an epoch,
    which then may end within a pass or span several; None is one pass. `columns`: adds further columns, in the
    reading thread.
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
        sampler: str = "shuffle",
        steps_per_epoch: int | None = None,
        columns: Columns | None = None,
    ) -> None:
        self.columns = columns
        self.reader, self.seed, self.shuffle = reader, seed, shuffle
        self.rank, self.world_size = rank, world_size
        self.window_rows, self.views, self.pin = window_rows, views, pin
        self.sampler = sampler
        self.samples = len(reader.ids)
        self.bounds = batch_bounds(self.samples, batch_size)
        self.pass_steps = len(self.bounds) - 1
        self.steps = steps_per_epoch or self.pass_steps

    def epoch(self, epoch: int, start: int = 0) -> Iterator[dict[str, Tensor]]:
        """The batches of an epoch (0-based) from step `start` on."""
        return _read_ahead(
            lambda: self._batches(epoch * self.steps + start, (epoch + 1) * self.steps)
        )

    def _batches(self, first: int, end: int) -> Iterator[dict[str, Tensor]]:
        """Batches by their number since the first pass began."""
        under_way, order, view_N = -1, np.empty(0, np.int64), np.empty(0, np.int64)
        for step in range(first, end):
            number, at = divmod(step, self.pass_steps)
            if number != under_way:
                under_way, order, view_N = number, *self._pass(number)
            chosen = slice(self.bounds[at], self.bounds[at + 1])
            yield self._batch(order[chosen], view_N[chosen])

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """Rows and views of a pass, both [N]."""
        if not self.shuffle:
            order = np.arange(self.samples)
        else:
            counts = None
            if self.sampler == "weighted":
                counts = draw_weighted(self.reader.weights, self.seed, number)
            elif self.sampler == "class_balanced":
                counts = draw_balanced(self.reader.labels, self.seed, number)
            rows = self.reader.shard_rows
            order = epoch_order(rows, self.seed, number, self.window_rows, counts)
        times_N = torch.from_numpy(occurrences(order))
        return order, views_of(self.seed, number, times_N, self.views).numpy()

    def _batch(self, rows: np.ndarray, view_B: np.ndarray) -> dict[str, Tensor]:
        cut = split_pairs(len(rows), self.world_size)[self.rank]
        padding = cut.start == cut.stop
        if padding:
            cut = slice(0, 2)
        share = rows[cut]
        weight = np.ones(len(rows), np.float32)
        if self.sampler != "weighted":
            weight = self.reader.weights[rows]
        label_weight = weight * (self.reader.labels[rows] >= 0)
        batch = {
            "image": torch.from_numpy(self.reader.read(share)).permute(0, 3, 1, 2),
            "label": torch.from_numpy(self.reader.targets(share)),
            "id": torch.from_numpy(self.reader.ids[share].astype(np.int64)),
            "view": torch.from_numpy(view_B[cut]),
            "weight": torch.from_numpy(weight[cut] * (not padding)),
            "label_weight": torch.from_numpy(label_weight[cut] * (not padding)),
            "weight_total": torch.tensor(float(weight.sum())),
            "label_weight_total": torch.tensor(float(label_weight.sum())),
            "count": torch.tensor(float(len(rows))),
        }
        if self.columns is not None:
            batch |= self.columns(batch["id"].numpy(), batch["view"].numpy())
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
