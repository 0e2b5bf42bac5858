import threading
import time

import numpy as np
import pytest
import torch

from potstill.data.batches import (
    Batches,
    batch_bounds,
    draw_balanced,
    draw_weighted,
    epoch_order,
    micro_batches,
    occurrences,
    split_pairs,
)


class Rows:
    """A reader whose images say which row they are."""

    def __init__(self, n: int, shard: int = 8) -> None:
        self.ids = np.arange(n, dtype=np.int64) * 7 + 3
        self.labels = np.arange(n, dtype=np.int64) % 3
        self.weights = np.ones(n, np.float32)
        self.shard_rows = [min(shard, n - i) for i in range(0, n, shard)]

    def read(self, rows):
        return np.broadcast_to(
            np.asarray(rows, np.uint8)[:, None, None, None], (len(rows), 2, 2, 3)
        ).copy()

    def targets(self, rows):
        return self.labels[rows]


def make(n=50, batch=16, rank=0, world=1, **more):
    options = {"seed": 1, "shuffle": True, "rank": rank, "world_size": world, **more}
    return Batches(Rows(n), batch, **options)


def real_ids(batch):
    return batch["id"][batch["weight"] > 0].tolist()


def test_an_epoch_holds_every_sample_once_in_an_order_of_its_own():
    orders = [epoch_order([8, 8, 8, 5], seed=1, epoch=e, window_rows=1000) for e in (0, 1)]
    assert all(sorted(o) == list(range(29)) for o in orders)
    assert not np.array_equal(*orders)
    assert np.array_equal(orders[0], epoch_order([8, 8, 8, 5], 1, 0, 1000))
    assert not np.array_equal(orders[0], epoch_order([8, 8, 8, 5], 2, 0, 1000))


def test_a_window_reads_a_disk_shard_by_shard():
    order = epoch_order([10] * 6, seed=0, epoch=0, window_rows=20)
    windows = [{row // 10 for row in order[i : i + 20]} for i in range(0, 60, 20)]
    assert all(len(w) == 2 for w in windows)
    assert set.union(*windows) == set(range(6))


@pytest.mark.parametrize(
    ("n", "batch", "sizes"),
    [(50, 16, [16, 16, 16, 2]), (49, 16, [16, 16, 17]), (48, 16, [16] * 3), (3, 8, [3])],
)
def test_the_tail_is_a_batch_but_never_a_single_sample(n, batch, sizes):
    assert np.diff(batch_bounds(n, batch)).tolist() == sizes


def test_shares_are_whole_pairs_and_cover_everything():
    for n in range(60):
        for parts in range(1, 6):
            cuts = split_pairs(n, parts)
            assert len(cuts) == parts
            assert [i for c in cuts for i in range(c.start, c.stop)] == list(range(n))
            assert all(c.start % 2 == 0 or c.start == n for c in cuts)
            assert n == 1 or all(c.stop - c.start != 1 for c in cuts)


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_any_number_of_ranks_sees_the_same_samples_in_the_same_steps(world):
    alone = list(make().epoch(0))
    ranks = [list(make(rank=r, world=world).epoch(0)) for r in range(world)]
    for step, whole in enumerate(alone):
        together = [i for r in ranks for i in real_ids(r[step])]
        assert together == whole["id"].tolist()
        assert all(r[step]["weight_total"] == len(whole["id"]) for r in ranks)
        assert all(len(r[step]["id"]) >= 2 for r in ranks)


def test_a_rank_without_a_sample_is_padded_with_weight_zero():
    tail = list(make(n=18, batch=16, rank=0, world=4).epoch(0))[-1]
    assert tail["weight"].tolist() == [0.0, 0.0]
    assert tail["weight_total"] == 2


def test_an_epoch_goes_on_at_the_exact_sample():
    whole = [b["id"].tolist() for b in make().epoch(2)]
    assert [b["id"].tolist() for b in make().epoch(2, start=2)] == whole[2:]


def test_columns_belong_together():
    for batch in make(views=2).epoch(0):
        rows = batch["image"][:, 0, 0, 0].long()
        assert torch.equal(batch["id"], rows * 7 + 3)
        assert torch.equal(batch["label"], rows % 3)
        assert batch["image"].shape[1:] == (3, 2, 2)
        assert batch["image"].is_contiguous(memory_format=torch.channels_last)


def test_micro_batches_cover_a_batch_in_even_parts():
    batch = next(iter(make(n=50, batch=30).epoch(0)))
    for size, accumulate in ((8, 1), (None, 4), (7, 1)):
        parts = micro_batches(batch, size, accumulate)
        assert [i for p in parts for i in p["id"].tolist()] == batch["id"].tolist()
        assert len(parts) == (4 if size != 7 else 5)
        assert min(len(p["id"]) for p in parts) >= 2
        assert all(p["weight_total"] == 30 for p in parts)


def test_an_epoch_of_so_many_steps_goes_on_through_the_passes():
    """50 samples in batches of 16 are 4 steps a pass: epochs of 6 hold the same batches, cut elsewhere."""
    passes = [b["id"].tolist() for e in range(3) for b in make().epoch(e)]
    long = [make(steps_per_epoch=6).epoch(e) for e in range(2)]
    assert [b["id"].tolist() for epoch in long for b in epoch] == passes
    views = [b["view"][0].item() for e in range(3) for b in make().epoch(e)]
    long = [make(steps_per_epoch=6).epoch(e) for e in range(2)]
    assert [b["view"][0].item() for epoch in long for b in epoch] == views
    short = make(steps_per_epoch=3)
    assert short.steps == 3
    assert [b["id"].tolist() for e in range(4) for b in short.epoch(e)] == passes
    assert [b["id"].tolist() for b in short.epoch(2, start=1)] == passes[7:9]


def test_weighted_draws_follow_the_weights():
    weights = np.repeat([0.0, 1.0, 3.0], 2000)
    counts = draw_weighted(weights, seed=0, epoch=0)
    assert counts.sum() == 6000
    assert counts[:2000].sum() == 0
    assert counts[4000:].sum() / counts[2000:4000].sum() == pytest.approx(3, rel=0.1)
    assert not np.array_equal(counts, draw_weighted(weights, seed=0, epoch=1))


def test_balanced_draws_give_every_class_the_same_and_spread_it_evenly():
    labels = np.repeat([0, 1, 2, -1], [97, 20, 6, 5])
    counts = draw_balanced(labels, seed=0, epoch=0)
    drawn = [int(counts[labels == k].sum()) for k in range(3)]
    assert drawn == [41, 41, 41]
    assert all(np.ptp(counts[labels == k]) <= 1 for k in range(3))
    assert (counts[labels == -1] == 1).all()
    assert counts.sum() == len(labels)


@pytest.mark.parametrize("sampler", ["weighted", "class_balanced"])
@pytest.mark.parametrize("world", [1, 2])
def test_a_sampler_is_just_another_order(sampler, world):
    """Every rank has its part of the same batches, and a sample that comes again comes as another view."""
    reader = Rows(50)
    reader.labels = np.repeat([0, 1], [40, 10])
    reader.weights = np.repeat([1.0, 9.0], [40, 10]).astype(np.float32)

    def batches(rank, world):
        make = {"seed": 1, "shuffle": True, "rank": rank, "world_size": world, "sampler": sampler}
        return list(Batches(reader, 16, **make).epoch(0))

    alone = batches(0, 1)
    ids = torch.cat([b["id"] for b in alone])
    assert len(ids) == 50
    rare = ids >= 40 * 7 + 3
    assert rare.sum() >= 20
    ranks = [batches(r, world) for r in range(world)]
    for step, whole in enumerate(alone):
        assert [i for r in ranks for i in real_ids(r[step])] == whole["id"].tolist()
    seen = set(zip(ids.tolist(), torch.cat([b["view"] for b in alone]).tolist(), strict=True))
    assert len(seen) == 50
    # drawn by its weight, it does not weigh again in the loss
    weights = torch.cat([b["weight"] for b in alone])
    assert (weights == (1 if sampler == "weighted" else torch.where(rare, 9.0, 1.0))).all()


def test_occurrences_count_from_zero():
    assert occurrences(np.array([5, 3, 5, 5, 3, 9])).tolist() == [0, 0, 1, 2, 1, 0]
    assert occurrences(np.empty(0, np.int64)).tolist() == []


def test_weights_and_missing_labels_reach_the_batch():
    reader = Rows(6)
    reader.labels = np.array([0, -1, 1, 2, -1, 0])
    reader.weights = np.array([1, 1, 2, 0.5, 3, 1], np.float32)
    batch = next(iter(Batches(reader, 6, seed=0, shuffle=False).epoch(0)))
    assert batch["weight"].tolist() == [1, 1, 2, 0.5, 3, 1]
    assert batch["label_weight"].tolist() == [1, 0, 2, 0.5, 0, 1]
    assert (batch["weight_total"], batch["label_weight_total"], batch["count"]) == (8.5, 4.5, 6)


def test_what_the_reader_raises_is_raised_and_its_thread_ends():
    class Broken(Rows):
        def read(self, rows):
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        list(Batches(Broken(20), 4, seed=0, shuffle=True).epoch(0))
    epoch = make(n=4000, batch=4).epoch(0)
    next(epoch)
    epoch.close()
    deadline = time.monotonic() + 5
    while (
        any(t.name == "read-ahead" for t in threading.enumerate()) and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    assert not any(t.name == "read-ahead" for t in threading.enumerate())
