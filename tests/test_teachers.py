"""Several teachers, projections, and what needs the samples of all ranks."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from potstill.errors import UserError
from potstill.task import (
    Ensemble,
    Task,
    Teacher,
    build_projections,
    build_terms,
    match_classes,
    refuse_gaps,
)
from test_task import Linear, batch_of


class Says(nn.Module):
    """A model whose logits are these, whatever it sees."""

    def __init__(self, *logits: float) -> None:
        super().__init__()
        self.said = torch.tensor(logits)

    def forward(self, batch):
        said = self.said.expand(len(batch["image"]), -1)
        return {"logits": said, "features": 2 * said}


def log(*probabilities: float) -> list[float]:
    return torch.tensor(probabilities).log().tolist()


def chances(batch, name="teacher"):
    return batch[f"{name}.logits"].softmax(dim=1)[0].tolist()


# ------------------------------------------------------------------------------------------- an ensemble
def test_an_ensemble_is_the_weighted_mean_of_probabilities():
    a = Teacher(Says(*log(0.7, 0.2, 0.1)), "a", [0, 1, 2])
    b = Teacher(Says(*log(0.1, 0.3, 0.6)), "b", [0, 1, 2])
    told = Ensemble([a, b], [3.0, 1.0], "single_label")(batch_of(2))
    assert chances(told) == pytest.approx([0.55, 0.225, 0.225])
    assert chances(told, "a") == pytest.approx([0.7, 0.2, 0.1])
    assert told["b.features"].shape == (2, 3)
    assert not told["teacher.logits"].requires_grad


def test_a_teacher_of_some_classes_shares_out_what_the_others_give_them():
    """By hand: the whole one gives .6 to a and b together; the regional one says 1 : 3 among them."""
    whole = Teacher(Says(*log(0.4, 0.2, 0.4)), "global", [0, 1, 2])
    order = match_classes(["b", "a", "x"], ["a", "b", "c"], "runs/r", overlap=True)
    assert order == [1, 0, -1]
    regional = Teacher(Says(*log(0.3, 0.1, 0.6)), "regional", order)
    told = Ensemble([whole, regional], [1.0, 1.0], "single_label")(batch_of(2))
    assert chances(told, "regional") == pytest.approx([0.15, 0.45, 0.4])
    assert chances(told) == pytest.approx([0.275, 0.325, 0.4])
    # where the whole one sees none of its classes, it has no say
    elsewhere = Teacher(Says(-50.0, -50.0, 50.0), "global", [0, 1, 2])
    told = Ensemble([elsewhere, regional], [1.0, 9.0], "single_label")(batch_of(2))
    assert chances(told) == pytest.approx([0.0, 0.0, 1.0], abs=1e-6)


def test_classes_that_stand_for_themselves_are_averaged_over_those_who_know_them():
    a = Teacher(Says(2.0, -1.0), "a", [0, 1, -1])
    b = Teacher(Says(0.0, 1.0), "b", [-1, 0, 1])
    told = Ensemble([a, b], [1.0, 3.0], "multi_label")(batch_of(1))["teacher.logits"][0].sigmoid()
    sigmoid = [torch.tensor(x).sigmoid().item() for x in (2.0, -1.0, 0.0, 1.0)]
    by_hand = [sigmoid[0], (sigmoid[1] + 3 * sigmoid[2]) / 4, sigmoid[3]]
    assert told.tolist() == pytest.approx(by_hand, rel=1e-5)


def test_gaps_are_refused_with_who_lacks_what():
    classes = ["ash", "elm", "oak"]
    with pytest.raises(UserError, match=r"none knows 1: oak"):
        refuse_gaps({"a": [0, 1, -1], "b": [-1, 0, -1]}, classes, "single_label")
    with pytest.raises(
        UserError, match=r"must know all 3 classes .*a lacks 1: oak; b lacks 1: ash"
    ):
        refuse_gaps({"a": [0, 1, -1], "b": [-1, 0, 1]}, classes, "single_label")
    refuse_gaps({"a": [0, 1, -1], "b": [-1, 0, 1]}, classes, "multi_label")
    refuse_gaps({"a": [0, 1, -1], "b": [2, 0, 1]}, classes, "single_label")


def test_one_that_knows_none_of_the_classes_is_refused_even_where_some_would_do():
    with pytest.raises(UserError, match=r"teachers\.b\.run must know some of the classes"):
        match_classes(["ash"], ["oak"], "runs/b", overlap=True, key="teachers.b")


# ------------------------------------------------------------------------------------------- at the start
@pytest.fixture(scope="module")
def teacher_run(tiny_tree, cache_dir, tmp_path_factory, ray_session) -> Path:
    from conftest import tiny_overrides
    from potstill.config import compose
    from potstill.fit import fit

    runs_dir = tmp_path_factory.mktemp("teachers")
    overrides = tiny_overrides(tiny_tree, cache_dir, runs_dir)
    fit(compose("train", [*overrides, "run.name=whole", "loop.epochs=1"]))
    return runs_dir / "whole"


def test_global_and_regional_teach_together(tiny, teacher_run):
    from potstill.fit import fit

    classes = "data.classes=[red,green]"
    fit(tiny("run.name=regional", "loop.epochs=1", classes, "loop.batch_size=12"))
    regional = Path(tiny().runs.dir) / "regional"
    several = [f"teachers.all.run={teacher_run}", f"teachers.some.run={regional}"]
    with pytest.raises(
        UserError,
        match=r"the teacher does not know 2: blue, white.*teachers\.some\.classes=overlap",
    ):
        fit(tiny("task=distil", *several))
    own = "task.terms.own={loss: kl, inputs: [logits, some.logits], weight: 0.1}"
    done = fit(
        tiny("task=distil", *several, "teachers.some.classes=overlap", own, "run.name=student")
    )
    run_dir = Path(tiny().runs.dir) / "student"
    assert done["status"] == "finished"
    about = json.loads((run_dir / "run.json").read_text())
    assert about["teachers"] == {"all": str(teacher_run), "some": str(regional)}
    terms = json.loads((run_dir / "journal.jsonl").read_text().splitlines()[-2])
    assert terms["kind"] in ("epoch", "checkpoint")
    with pytest.raises(UserError, match="none knows 2: blue, white"):
        fit(tiny("task=distil", several[1], "teachers.some.classes=overlap"))


def test_a_damaged_or_missing_teacher_is_refused_at_the_start(tiny, teacher_run, tmp_path):
    import shutil

    from potstill.fit import fit

    with pytest.raises(
        UserError, match=r"teacher\.run must be the folder of a run.*does not exist"
    ):
        fit(tiny("task=distil", f"teacher.run={tmp_path / 'nowhere'}"))
    broken = tmp_path / "broken"
    shutil.copytree(teacher_run, broken)
    for file in broken.glob("checkpoints/*/model.safetensors"):
        file.write_bytes(b"torn")
    with pytest.raises(UserError, match=r"teacher\.run cannot be used: .*broken"):
        fit(tiny("task=distil", f"teacher.run={broken}"))
    with pytest.raises(UserError, match=r"teachers\.b\.run cannot be used"):
        fit(tiny("task=distil", f"teachers.a.run={teacher_run}", f"teachers.b.run={broken}"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["teacher.run=a", "teacher.weights=b"], "teacher.run and teacher.weights say the same"),
        (["teacher.run=a", "teachers.x.run=b"], "teacher and teachers do not go together"),
        (["teachers.x.rnu=b"], "teachers.x must be a mapping of run, weights"),
        (["teachers.x.weight=2"], "teachers.x must have a run or weights"),
        (["teacher.weights=wildrf"], "teacher.model must say what teacher.weights=wildrf are of"),
        (["teachers.teacher.run=b"], "teachers.teacher must have another name"),
    ],
)
def test_teachers_that_do_not_go_together(tiny, overrides, said):
    with pytest.raises(UserError, match=said):
        tiny("task=distil", *overrides)


# --------------------------------------------------------------------------------------------- projections
FEATURES = {"hint": {"loss": "feature_mse", "inputs": ["features", "teacher.features"]}}


@pytest.mark.parametrize("how", ["linear", "mlp"])
@pytest.mark.parametrize("shape", [[5], [5, 4, 4]])
def test_a_projection_brings_the_student_to_the_teachers_width(how, shape):
    terms = build_terms({"hint": {**FEATURES["hint"], "projection": how}})
    shapes = {"features": shape, "teacher.features": [7, *shape[1:]]}
    projections = build_projections(terms, shapes)
    task = Task(Linear(), terms, projections=projections)
    columns = {name: torch.randn(2, *s) for name, s in shapes.items()}
    columns["weight"] = torch.ones(2)
    task.probe(columns, terms[0])
    assert projections["hint"](columns["features"]).shape == columns["teacher.features"].shape
    assert any("projections.hint" in name for name, _ in task.named_parameters())
    assert not any("projections" in name for name in task.model.state_dict())
    with pytest.raises(UserError, match=r"two vectors or two maps, got features \[5.*and"):
        build_projections(terms, {"features": [5], "teacher.features": [7, 4, 4]})


def test_without_a_projection_widths_must_agree():
    terms = build_terms({"hint": {**FEATURES["hint"], "projection": "none"}})
    assert build_projections(terms, {}) == {}
    task = Task(Linear(), terms)
    columns = {"features": torch.ones(2, 5), "teacher.features": torch.ones(2, 7)}
    with pytest.raises(UserError, match=r"5.*7"):
        task.probe(columns, terms[0])
    with pytest.raises(UserError, match="projection is for feature_cosine and feature_mse"):
        build_terms(
            {"d": {"loss": "kl", "inputs": ["logits", "teacher.logits"], "projection": "mlp"}}
        )


def test_a_projection_is_learned_kept_and_left_behind(tiny, teacher_run):
    """A run learns it, goes on with it, and its checkpoint's model does not hold it."""
    from potstill import runs
    from potstill.fit import fit

    hint = "task.terms.hint={loss: feature_mse, inputs: [features, teacher.features], weight: 1.0}"
    narrow = "model.kwargs={dims: [8, 16, 24, 40]}"
    fit(
        tiny(
            "task=distil", f"teacher.run={teacher_run}", hint, narrow, "run.name=r", "loop.epochs=3"
        )
    )
    run_dir = Path(tiny().runs.dir) / "r"
    checkpoint = runs.pick_checkpoint(run_dir, "last")
    assert not any("projection" in name for name in checkpoint.model_state())
    kept = checkpoint.state()["projections"]
    assert kept["hint.weight"].shape == (64, 40)
    epochs = [r for r in runs.read_journal(run_dir) if r["kind"] == "epoch"]
    told = [e["terms"]["hint"]["loss"] for e in epochs]
    assert told[-1] < 0.7 * told[0]


# ----------------------------------------------------------------------------------------------- of all ranks
RELATIONS = {
    "task": {"loss": "cross_entropy", "inputs": ["logits", "label"]},
    "rkd": {"loss": "rkd_distance", "inputs": ["logits", "teacher.logits"], "weight": 3.0},
    "dist": {"loss": "dist", "inputs": ["logits", "teacher.logits"], "weight": 0.5},
}


def _whole():
    torch.manual_seed(3)
    batch = batch_of(10)
    torch.manual_seed(4)
    task = Task(Linear(), build_terms(RELATIONS))
    return task, Teacher(Linear(), "teacher", [0, 1, 2])(batch)


def _gradient(task, batch) -> tuple[float, list[torch.Tensor]]:
    loss, sums, _ = task(batch)
    loss.backward()
    assert all(torch.isfinite(s.value) for s in sums.values())
    return loss.item(), [p.grad.clone() for p in task.parameters()]


def _of_rank(rank: int, port: int, folder: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    torch.set_num_threads(1)
    task, whole = _whole()
    cut = slice(0, 4) if rank == 0 else slice(4, 10)  # ranks need not have equal shares
    loss, gradients = _gradient(task, {k: v[cut] if v.ndim else v for k, v in whole.items()})
    torch.save((loss, gradients), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_make_the_gradient_of_the_whole_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_of_rank, (port, str(tmp_path)), nprocs=2)
    loss, gradients = _gradient(*_whole())
    told = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in (0, 1)]
    assert sum(t[0] for t in told) == pytest.approx(loss, rel=1e-5)
    for mine, first, second in zip(gradients, told[0][1], told[1][1], strict=True):
        assert torch.allclose(mine, first + second, atol=1e-6)
