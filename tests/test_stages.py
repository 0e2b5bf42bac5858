"""Stages, guarded weights, and relations between samples: the loop without Ray."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch
from torch import nn

from potstill import runs
from potstill.config import Augment as AugmentConfig
from potstill.config import Optimizer, Schedule
from potstill.data.augment import Augment
from potstill.errors import Stopped
from potstill.loop import Stage
from potstill.optim import LearningRate, build_optimizer
from potstill.task import Teacher, build_terms
from test_loop import CPU, LocalSession, Net, records, run, same, weights

LABELS = {"loss": "cross_entropy", "inputs": ["logits", "label"], "weight": 1.0}
TEACHER = {"loss": "kl", "inputs": ["logits", "teacher.logits"]}
PLAIN = Augment(AugmentConfig(), 8, 0)
UPDATES = 4  # 50 images, 16 a batch


def stage(task, epochs, lr, *, terms=None, frozen=(), augment=PLAIN, name="", cfg=None):
    own = build_terms(terms, epochs=epochs) if terms else task.terms

    def begin():
        for key, parameter in task.model.named_parameters():
            parameter.requires_grad_(not key.startswith(tuple(frozen)))
        opt = build_optimizer(task.model, set(), Optimizer(lr=lr, weight_decay=0), CPU)
        rate = LearningRate(opt, cfg or Schedule("constant"), UPDATES, epochs, True)
        return opt, rate

    return Stage(epochs, own, augment, begin, name=name)


def seeded(seed=5, **options) -> Net:
    torch.manual_seed(seed)
    return Net(**options)


def two(task, begin, augment):
    return [
        stage(task, 2, 1e-2, frozen=("conv",), name="head"),
        stage(task, 2, 1e-3, augment=Augment(AugmentConfig(flip=0.5), 8, 0), name="all"),
    ]


def test_every_stage_has_its_own_rate_terms_and_frozen_parts(tmp_path):
    net = seeded()
    conv = net.conv.weight.detach().clone()
    seen = []

    def watched(task, begin, augment):
        stages = two(task, begin, augment)
        stages[1].terms = build_terms({"other": {**LABELS, "weight": 0.5}})
        second = stages[1].begin
        stages[1].begin = lambda: seen.append(task.model.conv.weight.detach().clone()) or second()
        return stages

    _, progress = run(tmp_path / "r", net=net, stages=watched, epochs=4)
    assert progress.epoch == 4
    rates = [s["lr"] for s in records(tmp_path / "r", "step")]
    assert rates == [1e-2] * 8 + [1e-3] * 8
    assert torch.equal(conv, seen[0])  # frozen in the first stage
    assert not torch.equal(conv, net.conv.weight)  # and trained in the second
    epochs = records(tmp_path / "r", "epoch")
    assert [e["stage"] for e in epochs] == [1, 1, 2, 2]
    assert [list(e["terms"]) for e in epochs] == [["task"]] * 2 + [["other"]] * 2
    told = epochs[-1]["terms"]["other"]
    assert told["weight"] == 0.5
    assert told["weighted"] == pytest.approx(0.5 * told["loss"])
    assert epochs[-1]["train_loss"] == pytest.approx(told["weighted"])
    begun = records(tmp_path / "r", "stage")
    assert [(b["stage"], b["stage_name"], b["step"]) for b in begun] == [(2, "all", 8)]


@pytest.mark.parametrize("stop_at", [3, 8, 11, 15])
def test_a_run_goes_on_inside_any_stage(tmp_path, stop_at):
    """In the middle of each stage and on the border between them."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(whole, net=seeded(dropout=0.3), stages=two, epochs=4, ema=0.9)
    session = LocalSession(broken, stop_at=stop_at)
    with pytest.raises(Stopped):
        run(broken, session=session, net=seeded(dropout=0.3), stages=two, epochs=4, ema=0.9)
    run(broken, net=seeded(dropout=0.3), stages=two, epochs=4, ema=0.9)
    assert same(weights(whole), weights(broken))
    told = [[r["train_loss"] for r in records(d, "epoch")] for d in (whole, broken)]
    assert told[0] == pytest.approx(told[1], rel=1e-12)


def test_patience_ends_a_stage_and_not_the_run(tmp_path):
    def stages(task, begin, augment):
        first = stage(task, 6, 1e-12)
        first.patience = 2
        return [first, stage(task, 2, 1e-2)]

    _, progress = run(tmp_path / "r", net=seeded(norm=False), stages=stages, epochs=8)
    epochs = [e["stage"] for e in records(tmp_path / "r", "epoch")]
    assert epochs == [1, 1, 1, 2, 2]
    assert progress.epoch == 5


def test_a_weight_moves_within_the_stage(tmp_path):
    terms = {
        "task": {**LABELS, "weight": {"schedule": "complement", "of": "distil"}},
        "distil": {
            **TEACHER,
            "weight": {"schedule": "linear", "from": 0, "to": 1, "end_epoch": 2},
        },
    }
    teacher = Teacher(seeded(9), "teacher", [0, 1, 2])
    run(tmp_path / "r", net=seeded(), terms=terms, teachers=[teacher], epochs=3)
    epochs = records(tmp_path / "r", "epoch")
    # of updates 0, 1, 2, 3 of 4 an epoch: the epoch's weighted loss is not its last weight times its loss
    for epoch in epochs:
        parts = [t["weighted"] for t in epoch["terms"].values()]
        assert epoch["train_loss"] == pytest.approx(sum(parts), rel=1e-6)
    assert [e["terms"]["distil"]["weight"] for e in epochs] == [0.375, 0.875, 1.0]
    assert [e["terms"]["task"]["weight"] for e in epochs] == [0.625, 0.125, 0.0]


# ------------------------------------------------------------------------------------ guarded weights
def guarded(**changes):
    spec = {"schedule": "guarded", "levels": [0.01, 0.5, 0.99], "metric": "val_top1_acc"}
    return {
        "task": {**LABELS, "weight": {"schedule": "complement", "of": "distil"}},
        "distil": {**TEACHER, "weight": {**spec, "reach": 50, "collapse": 15, **changes}},
    }


class Liar(nn.Module):
    """A teacher that is sure of the wrong class."""

    def forward(self, batch):
        blue_to_red = batch["image"].mean((2, 3))  # the colours' order is the classes', reversed
        return {"logits": 500 * (blue_to_red - blue_to_red.mean(1, keepdim=True))}


def test_a_student_that_collapses_at_a_level_is_brought_back(tmp_path):
    """Taught by a liar: at 0.5 and more it unlearns, and is as good as before in the end."""
    net = seeded(norm=False)
    options = {
        "terms": guarded(levels=[0.01, 0.99], reach=60, collapse=10),
        "teachers": [Teacher(Liar(), "teacher", [0, 1, 2])],
        "epochs": 14,
        "optimizer": Optimizer(lr=0.03, weight_decay=0),
        "schedule": Schedule("constant"),
    }
    run(tmp_path / "r", net=net, **options)
    levels = records(tmp_path / "r", "level")
    assert [(e["level"], e["restored"]) for e in levels] == [(2, False), (1, True)]
    taken, left = levels
    assert "val_top1_acc has reached 60" in taken["message"]
    assert "val_top1_acc fell from" in left["message"]
    assert (taken["weight"], left["weight"]) == (0.99, 0.01)
    epochs = records(tmp_path / "r", "epoch")
    when_taken = epochs[taken["epoch"] - 1]["val_top1_acc"]
    collapsed = epochs[left["epoch"] - 1]
    assert collapsed["val_top1_acc"] <= when_taken - 10
    assert not collapsed["best"]
    assert [e["terms"]["distil"]["weight"] for e in epochs[left["epoch"] :]] == [0.01] * (
        14 - left["epoch"]
    )
    assert epochs[left["epoch"]]["val_top1_acc"] > when_taken - 10
    assert epochs[-1]["val_top1_acc"] >= when_taken
    # the weights of that moment, to the bit: the next checkpoint is the one in which the level was left
    taken_in = tmp_path / "again"
    run(taken_in, net=seeded(norm=False), **{**options, "epochs": taken["epoch"]})
    there = runs.pick_checkpoint(taken_in, "last").model_state()
    assert same(_state_at(tmp_path, left["epoch"], options), there)


def _state_at(tmp_path, epochs, options):
    run(tmp_path / "left", net=seeded(norm=False), **{**options, "epochs": epochs})
    return runs.pick_checkpoint(tmp_path / "left", "last").model_state()


def test_a_loss_that_is_not_finite_brings_it_back_too(tmp_path):
    class Poison(nn.Module):
        asked = 0

        def forward(self, batch):
            self.asked += 1
            bad = float("nan") if self.asked == 3 * UPDATES + 1 else 1.0
            return {"logits": torch.zeros(len(batch["image"]), 3) * bad}

    terms = guarded(levels=[0.0, 0.5], reach=0.1)
    teacher = Teacher(Poison(), "teacher", [0, 1, 2])
    run(tmp_path / "r", net=seeded(), terms=terms, teachers=[teacher], epochs=6)
    levels = records(tmp_path / "r", "level")
    assert [e["restored"] for e in levels] == [False, True]
    assert "the training loss is nan" in levels[1]["message"]
    assert len(records(tmp_path / "r", "epoch")) == 6


def test_a_guarded_run_goes_on_where_it_stood(tmp_path):
    options = {
        "terms": guarded(),
        "teachers": [Teacher(seeded(9), "teacher", [0, 1, 2])],
        "epochs": 8,
    }
    run(tmp_path / "whole", net=seeded(), **options)
    for stop_at in (10, 20):
        folder = tmp_path / f"broken{stop_at}"
        with pytest.raises(Stopped):
            run(folder, session=LocalSession(folder, stop_at=stop_at), net=seeded(), **options)
        run(folder, net=seeded(), **options)
        assert same(weights(tmp_path / "whole"), weights(folder))
        levels = [
            [(e["level"], e["step"]) for e in records(d, "level")]
            for d in (tmp_path / "whole", folder)
        ]
        assert levels[0] == levels[1] != []


def test_a_guarded_weight_goes_on_in_the_next_stage(tmp_path):
    def stages(task, begin, augment):
        terms = guarded(reach=40)
        return [stage(task, 3, 2e-2, terms=terms), stage(task, 3, 1e-3, terms=terms)]

    teacher = Teacher(seeded(9), "teacher", [0, 1, 2])
    run(tmp_path / "r", net=seeded(), terms=guarded(), teachers=[teacher], stages=stages, epochs=6)
    at = [e["terms"]["distil"]["weight"] for e in records(tmp_path / "r", "epoch")]
    assert at == sorted(at)
    assert at[3] >= at[2] > 0.01


# ---------------------------------------------------------------------- relations between samples
RELATIONS = {
    "task": {**LABELS},
    "distance": {"loss": "rkd_distance", "inputs": ["features", "teacher.features"], "weight": 2.0},
    "dist": {"loss": "dist", "inputs": ["logits", "teacher.logits"], "weight": 1.0},
}


@pytest.mark.parametrize("parts", [{"micro_batch_size": 4}, {"accumulate": 3}])
def test_relations_of_the_whole_batch_do_not_depend_on_its_parts(tmp_path, parts):
    """Gradient caching: the same weights as if memory had held everything."""
    teacher = Teacher(seeded(9), "teacher", [0, 1, 2])
    sgd = Optimizer("sgd", lr=0.05)
    options = {"terms": RELATIONS, "teachers": [teacher], "optimizer": sgd, "epochs": 1}
    run(tmp_path / "whole", net=seeded(norm=False), **options)
    run(tmp_path / "parts", net=seeded(norm=False), **options, **parts)
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.allclose(a[k], b[k], atol=1e-5) for k in a)
    for one, other in zip(
        records(tmp_path / "whole", "epoch"), records(tmp_path / "parts", "epoch"), strict=True
    ):
        assert one["train_loss"] == pytest.approx(other["train_loss"], abs=1e-5)
        for name in RELATIONS:
            told = [r["terms"][name]["loss"] for r in (one, other)]
            assert told[0] == pytest.approx(told[1], abs=1e-5)
            assert told[0] > 0
    # and it is not what the parts would say each for itself
    alone = copy.deepcopy(options)
    alone["terms"] = {"task": {**LABELS}}
    run(tmp_path / "alone", net=seeded(norm=False), **alone)
    assert not same(weights(tmp_path / "alone"), a)


def test_batch_statistics_and_dropout_are_those_of_one_pass(tmp_path):
    """The first of the two passes leaves no trace, and the second sees the same dropout."""
    teacher = Teacher(seeded(9), "teacher", [0, 1, 2])
    net = seeded(dropout=0.3)
    options = {"terms": RELATIONS, "teachers": [teacher], "epochs": 1, "accumulate": 2}
    run(tmp_path / "r", net=net, optimizer=Optimizer(lr=1e-30, weight_decay=0), **options)
    plain = seeded(dropout=0.3)
    without = {"terms": {"task": {**LABELS}}, "epochs": 1, "accumulate": 2}
    run(tmp_path / "plain", net=plain, optimizer=Optimizer(lr=1e-30, weight_decay=0), **without)
    assert int(net.norm.num_batches_tracked) == int(plain.norm.num_batches_tracked)
    assert torch.allclose(net.norm.running_mean, plain.norm.running_mean, atol=1e-6)
    steps = [r["loss"] for r in records(tmp_path / "r", "step")]
    assert all(a > 0 for a in steps)
    assert not any(a == b for a, b in itertools.pairwise(steps))


# ------------------------------------------------------------------------------------------ corners
@pytest.mark.parametrize("averaging", [{"ema": 0.8}, {"average_last": 10}, {"precision": "fp16"}])
def test_what_is_brought_back_includes_averages_and_the_scaler(tmp_path, averaging):
    """A level is taken before the averaging of the last epochs begins, and left after it has."""
    options = {
        "terms": guarded(levels=[0.01, 0.99], reach=60, collapse=10),
        "teachers": [Teacher(Liar(), "teacher", [0, 1, 2])],
        "epochs": 14,
        "optimizer": Optimizer(lr=0.03, weight_decay=0),
        "schedule": Schedule("constant"),
    }
    run(tmp_path / "r", net=seeded(norm=False), **options, **averaging)
    assert [e["restored"] for e in records(tmp_path / "r", "level")] == [False, True]
    assert records(tmp_path / "r", "epoch")[-1]["val_top1_acc"] > 60


def test_a_plateau_forgets_the_epochs_that_were_taken_back(tmp_path):
    """Where the metric stands still at a level, the rate would fall; with the level it comes back."""
    options = {
        "terms": guarded(levels=[0.01, 0.99], reach=60, collapse=10),
        "teachers": [Teacher(Liar(), "teacher", [0, 1, 2])],
        "epochs": 14,
        "optimizer": Optimizer(lr=0.03, weight_decay=0),
        "schedule": Schedule("plateau", patience=1, factor=0.7),
    }
    run(tmp_path / "r", net=seeded(norm=False), **options)
    taken, left = records(tmp_path / "r", "level")
    rates = [e["lr"] for e in records(tmp_path / "r", "epoch")]
    assert rates[left["epoch"] - 1] < rates[taken["epoch"]]
    assert rates[left["epoch"]] == rates[taken["epoch"]]


def test_a_checkpoint_of_before_there_were_stages_is_gone_on_with(tmp_path):
    class Older(LocalSession):
        def resume_from(self):
            found, passed_over = super().resume_from()
            if found is None:
                return found, passed_over
            state = found.state()
            for key in ("stage", "stage_epoch", "stage_step"):
                del state["progress"][key]
            for key in ("projections", "guard", "restore_points"):
                del state[key]
            object.__setattr__(found, "state", lambda: state)
            return found, passed_over

    with pytest.raises(Stopped):
        run(tmp_path / "r", session=LocalSession(tmp_path / "r", stop_at=6), net=seeded())
    run(tmp_path / "r", session=Older(tmp_path / "r"), net=seeded())
    run(tmp_path / "whole", net=seeded())
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "r"))


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_cached_gradients_do_not_vanish_in_half_precision(half):
    from potstill.task import Task

    terms = build_terms(
        {"rkd": {"loss": "rkd_angle", "inputs": ["features", "teacher.features"], "weight": 1.0}}
    )
    task = Task(Net(), terms)
    torch.manual_seed(0)
    student, teacher = torch.randn(48, 64), torch.randn(48, 64)

    def gradients(kind):
        parts = [
            ({"rkd": [s.to(kind), t.to(kind)]}, torch.ones(len(s)))
            for s, t in zip(student.split(16), teacher.split(16), strict=True)
        ]
        return torch.cat([r.gradients["rkd"] for r in task.relate(parts)])

    whole, rough = gradients(torch.float32), gradients(half)
    assert rough.dtype == torch.float32
    assert (rough == 0).float().mean() < 0.01
    assert (rough - whole).norm() < 0.05 * whole.norm()


# -------------------------------------------------------------------------------------- on two workers
HINT = {"loss": "feature_mse", "inputs": ["features", "teacher.features"], "projection": "none"}


def _hint_then_relations(task, begin, augment):
    """FitNets' two stages: features alone, which leave the head without a gradient, then all."""
    return [
        stage(task, 1, 1e-2, terms={"hint": HINT}),
        stage(task, 1, 1e-3, terms={**RELATIONS, "hint": HINT}),
    ]


def _staged(folder, **options):
    options |= {"terms": {"hint": HINT}, "stages": _hint_then_relations, "epochs": 2}
    teacher = Teacher(seeded(9, norm=False), "teacher", [0, 1, 2])
    return run(folder, net=seeded(norm=False), teachers=[teacher], **options)


def _of_rank(rank: int, port: int, folder: str, accumulate: int) -> None:
    import functools
    from pathlib import Path

    import torch.distributed as dist

    import test_loop

    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
    test_loop.Batches = functools.partial(test_loop.Batches, rank=rank, world_size=2)

    class Session(LocalSession):
        def log(self, record):
            if self.rank == 0:
                super().log(record)

        def report(self, metrics, snapshot):
            if self.rank == 0:
                super().report(metrics, snapshot)

        def resume_from(self):
            return None, []

    session = Session(Path(folder))
    session.rank, session.world_size = rank, 2
    _staged(Path(folder), session=session, attempt=1, accumulate=accumulate)
    dist.destroy_process_group()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_stages_on_two_workers_are_those_of_one(tmp_path, accumulate):
    """Stages that leave parameters out, projections, and relations over ranks and parts together."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "two").mkdir()
    torch.multiprocessing.spawn(_of_rank, (port, str(tmp_path / "two"), accumulate), nprocs=2)
    _staged(tmp_path / "one")
    a, b = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert all(torch.allclose(a[k], b[k], atol=2e-4) for k in a)
    losses = [[e["train_loss"] for e in records(tmp_path / d, "epoch")] for d in ("one", "two")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
