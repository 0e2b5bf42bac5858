"""The whole path on images that train in a second: what is done, once, and what the gate lets through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import ROOT, run_job, tiny_overrides, write_tree
from potstill import distil as path
from potstill import runs
from potstill.config import Config, compose
from potstill.errors import Stopped, UserError

TEACHER = """# @package _global_
defaults: [{override /task: binary}, _self_]
data: {decode: {image_px: 32, fit: squash}}
model: {name: test_convnext}
optimizer: {lr: 3e-3}
loop: {epochs: 2, batch_size: 8, monitor: val_auc}
"""
STUDENT = """# @package _global_
defaults: [{override /task: binary}, _self_]
task:
  terms:
    task: {weight: {schedule: complement, of: distil}}
    distil: {loss: kl_sigmoid, inputs: [logits, teacher.logits], weight: 0.7, temperature: 2.0}
loop: {monitor: val_auc}
distil: {teacher: tiny_teacher}
"""
ONE_SEED = ("debug=true", "distil.seeds=[0]")


@pytest.fixture(scope="module")
def conf(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conf")
    (folder / "experiment").mkdir()
    for name, text in (("teacher", TEACHER), ("tune", TEACHER), ("student", STUDENT)):
        (folder / "experiment" / f"tiny_{name}.yaml").write_text(text)
    other = TEACHER.replace("test_convnext", "test_vit")
    (folder / "experiment" / "tiny_other.yaml").write_text(other)
    return folder


@pytest.fixture(scope="module")
def student(conf: Path, tiny_tree: Path, cache_dir: Path, tmp_path_factory, ray_session):
    """`student("loop.epochs=3", …)`: the config of a path in one folder for all tests, so that they share the teacher."""
    folder = tmp_path_factory.mktemp("paths")

    def make(*overrides: str) -> Config:
        places = [o for o in tiny_overrides(tiny_tree, cache_dir, folder) if "loop.epochs" not in o]
        small = ["data.classes=[blue,red]", "loop.batch_size=8"]
        if not any(o.startswith("stages=") for o in overrides):
            small.append("loop.epochs=1")
        return compose(
            "distil", ["experiment=tiny_student", *places, *small, *overrides], str(conf)
        )

    return make


@pytest.fixture
def worked(monkeypatch) -> list[str]:
    """The steps that are done, not passed over, in order; a step that STOP names is stopped in its work, once."""
    done: list[str] = []
    step = path._Path._step

    def counted(self, name, key, work, title=""):
        def counting(digest):
            if STOP and name == STOP[0]:
                raise Stopped(f"stopped in {STOP.pop()}")
            done.append(name)
            return work(digest)

        return step(self, name, key, counting, title)

    monkeypatch.setattr(path._Path, "_step", counted)
    STOP.clear()
    return done


STOP: list[str] = []


@pytest.fixture
def auc_of(monkeypatch) -> dict[str, float]:
    """`auc_of["teacher"] = 0.6`: what measuring a run of this role says."""
    given: dict[str, float] = {}
    measure: Callable = path.measure

    def pretended(run_dir, *arguments):
        found = measure(run_dir, *arguments)
        for role, value in given.items():
            if f"-{role}-" in run_dir.name:
                found["metrics"] = {**found["metrics"], "auc": value}
        return found

    monkeypatch.setattr(path, "measure", pretended)
    return given


def read(config: Config, name: str):
    return runs.read_json(Path(config.runs.dir) / str(config.run.name) / name)


def forget_the_diagnosis(config: Config) -> None:
    """What a test has pretended in this folder is not true of the next."""
    place = Path(config.runs.dir) / str(config.run.name) / "steps.json"
    if place.exists():
        steps = runs.read_json(place)
        steps.pop("diagnose-teacher", None)
        runs.write_json(place, steps)


ALL = [
    *("teacher", "diagnose-teacher", "alone-s0", "alone-s1", "alone-s2"),
    *("distilled-s0", "distilled-s1", "distilled-s2"),
    *("evaluate-alone-s0", "evaluate-alone-s1", "evaluate-alone-s2"),
    *("evaluate-distilled-s0", "evaluate-distilled-s1", "evaluate-distilled-s2", "latency"),
]


@pytest.mark.slow
def test_the_whole_path_over_three_seeds(student, conf, worked, capsys):
    config = student("run.name=whole")
    result = path.distil(config, str(conf))
    assert worked == ALL
    folder = Path(config.runs.dir) / "whole"
    assert {"steps.json", "gate.json", "comparison.json", "comparison.png", "comparison.md"} <= {
        f.name for f in folder.iterdir()
    }
    assert runs.read_json(folder / "comparison.json") == result
    assert result["seeds"] == [0, 1, 2]
    assert result["metric"] == "auc"
    assert len(result["alone"]["values"]) == len(result["distilled"]["values"]) == 3
    assert result["models"]["student"]["parameters"] > 0
    assert set(result["models"]["teacher"]["latency_ms"]) == {"1", "32"}
    assert "thread" in result["latency_on"]
    gate = read(config, "gate.json")
    judged = gate["teachers"]["teacher"]
    assert gate["distil"] is True
    assert judged["diagnose"]["verdict"] == judged["verify"]["verdict"] == "good"
    assert judged["finetuned"] is None
    assert (judged["verify"]["thresholds"]["good"], judged["verify"]["samples"]) == (0.65, 8)
    teacher = read(config, "steps.json")["teacher"]["result"]["run"]
    for seed in "012":
        alone, taught = (Path(result["runs"][g][seed]) for g in ("alone", "distilled"))
        assert runs.read_json(taught / "run.json")["teacher_run"] == teacher
        assert runs.read_json(alone / "run.json")["teacher_run"] is None
        mine, theirs = ((r / "config.yaml").read_text() for r in (alone, taught))
        assert ("teacher.logits" in theirs, "teacher.logits" in mine) == (True, False)
        assert f"seed: {seed}" in mine
    said = capsys.readouterr().out
    table = said.split("The student, alone and distilled; seeds: 0, 1, 2")[-1].split("Latency")[0]
    firsts = [line.split()[0] for line in table.splitlines() if line.strip()]
    assert firsts[-3:] == ["teacher", "alone", "distilled"], "on 80 characters, nothing is wrapped"
    assert "Distillation" in (folder / "comparison.md").read_text()

    worked.clear()
    assert path.distil(config, str(conf)) == result
    assert worked == [], "all of it is done"

    changed = student("run.name=whole", "optimizer.lr=2e-3")
    path.distil(changed, str(conf))
    assert worked == ALL[2:-1], "neither the teacher, nor what it was measured at, nor the latency"
    worked.clear()
    path.distil(student("run.name=whole", "optimizer.lr=2e-3", "distil.metric=val_loss"), str(conf))
    assert worked == [], "all of it was measured"

    flipped = student("run.name=whole", "augment.tta=flip", *ONE_SEED)
    path.distil(flipped, str(conf))
    assert "evaluate-alone-s0" in worked, "what is measured is another thing"
    worked.clear()
    path.distil(student("run.name=whole", *ONE_SEED), str(conf))
    assert {"evaluate-alone-s0", "evaluate-distilled-s0"} <= set(worked)


def test_a_comparison_of_an_earlier_config_is_taken_away(student, conf, worked):
    config = student("run.name=outdated", *ONE_SEED)
    path.distil(config, str(conf))
    folder = Path(config.runs.dir) / "outdated"
    assert {f.name for f in folder.glob("comparison.*")} == set(path.COMPARISON)
    STOP[:] = ["alone-s0"]
    with pytest.raises(Stopped):
        path.distil(student("run.name=outdated", "optimizer.lr=2e-3", *ONE_SEED), str(conf))
    assert not list(folder.glob("comparison.*"))


def test_verified_and_compared_on_test_but_diagnosed_on_val(student, conf, worked, tmp_path):
    tree = write_tree(tmp_path / "tree", train=12, val=4, seed=5)
    write_tree(tmp_path / "more", train=1, val=6, seed=6)
    shutil.move(tmp_path / "more" / "val", tree / "test")
    config = student("run.name=tested", f"data.root={tree}", "distil.subset=test", *ONE_SEED)
    result = path.distil(config, str(conf))
    assert worked[:3] == ["teacher", "diagnose-teacher", "verify-teacher"], (
        "it needs no fine-tuning"
    )
    gate = read(config, "gate.json")
    assert (gate["data"]["diagnosed_on"], gate["data"]["verified_on"]) == ("val", "test")
    judged = gate["teachers"]["teacher"]
    told = {k: (judged[k]["subset"], judged[k]["samples"]) for k in ("diagnose", "verify")}
    assert told == {"diagnose": ("val", 8), "verify": ("test", 12)}
    assert judged["finetuned"] is None
    assert (result["measured_on"]["subset"], result["measured_on"]["samples"]) == ("test", 12)
    assert result["models"]["teacher"]["value"] == judged["verify"]["metrics"]["auc"]


def once(monkeypatch, module, name: str, after: int) -> None:
    """Let this function stop the path when it is called for the n-th time, and never again."""
    real, calls = getattr(module, name), [0]

    def stopping(*arguments, **options):
        calls[0] += 1
        if calls[0] == after:
            raise Stopped(f"stopped inside {name}")
        return real(*arguments, **options)

    monkeypatch.setattr(module, name, stopping)


def interrupt_in(runs_dir: Path, run: str) -> threading.Thread:
    """Ctrl-C as soon as an epoch of this run is done."""

    def interrupt() -> None:
        until = time.monotonic() + 120
        while time.monotonic() < until:
            for journal in runs_dir.glob(f"{run}-*/journal.jsonl"):
                if '"kind":"epoch"' in journal.read_text():
                    os.kill(os.getpid(), signal.SIGINT)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
    return thread


@pytest.mark.slow
def test_stopped_inside_a_step_the_same_command_goes_on(
    student, conf, worked, monkeypatch, tmp_path
):
    """In the midst of the sets of fakes, of the soft labels, of a student's training and of an evaluation."""
    from potstill import evaluation, soft_labels
    from potstill.data import fakes
    from test_fakes import write_images

    monkeypatch.setattr(path, "FEWEST_SEEDS", 1)
    photos = write_images(tmp_path / "photos", {"a": 60}, size=(48, 40))
    config = student(
        *("run.name=inside", "distil.seeds=[0]", "data.root=null", "data.classes=null"),
        *("distil.soft_labels=true", "augment.views=2", "loop.epochs=30", "gate.good=0.02"),
        *("gate.marginal=0.01", f"soft_labels.dir={tmp_path / 'soft'}", "fakes.px=32"),
        *(f"fakes.images={photos}", f"fakes.dir={tmp_path / 'sets'}"),
        *("fakes.teacher_images=40", "fakes.max_images=80"),
    )

    def stopped(step: str, begun: list[str]) -> None:
        worked.clear()
        with pytest.raises(Stopped):
            path.distil(config, str(conf))
        assert worked == begun
        found = read(config, "steps.json")
        assert list(found)[-1] == step
        assert (found[step]["status"], found[step]["result"]) == ("stopped", None)

    once(monkeypatch, fakes, "_encoded", after=50)  # of the second set
    stopped("fakes", ["fakes"])
    assert len(list((tmp_path / "sets").glob("*/fakes.json"))) == 1
    monkeypatch.setattr(soft_labels, "SMALL_SHARD_ROWS", 16)
    real = soft_labels._run

    def some(*arguments):
        for n, description in enumerate(real(*arguments)):
            if n == 2:
                raise Stopped("stopped after two shards")
            yield description

    monkeypatch.setattr(soft_labels, "_run", some)
    stopped("soft-labels", ["fakes", "teacher", "diagnose-teacher", "soft-labels"])
    monkeypatch.setattr(soft_labels, "_run", real)
    assert not list((tmp_path / "soft").glob("*/manifest.json"))
    thread = interrupt_in(Path(config.runs.dir), "inside-alone-s0")
    stopped("alone-s0", ["soft-labels", "alone-s0"])
    thread.join()
    (run_dir,) = Path(config.runs.dir).glob("inside-alone-s0-*")
    assert runs.last_attempt(run_dir) == 1
    once(monkeypatch, evaluation, "measure", after=2)  # the first is of the student alone
    begun = ["alone-s0", "distilled-s0", "evaluate-alone-s0", "evaluate-distilled-s0"]
    stopped("evaluate-distilled-s0", begun)
    assert runs.last_attempt(run_dir) == 2, "it went on, in the same run"
    worked.clear()
    result = path.distil(config, str(conf))
    assert worked == ["evaluate-distilled-s0", "latency"]
    assert result["verdict"] == "no interval with one seed"
    assert result["soft_labels_seconds"] > 0
    text = (Path(config.runs.dir) / "inside" / "comparison.md").read_text()
    assert "soft labels for all seeds took" in text


@pytest.mark.slow
def test_killed_in_a_students_training_the_same_command_finishes(conf, tiny_tree, tmp_path):
    """SIGKILL to the whole job: nothing can be noted then."""
    given = [
        *("--config-dir", str(conf), "experiment=tiny_student", "run.name=killed", "debug=true"),
        *(
            o
            for o in tiny_overrides(tiny_tree, tmp_path / "cache", tmp_path / "runs")
            if "epochs" not in o
        ),
        *("data.classes=[blue,red]", "loop.batch_size=8", "distil.seeds=[0]"),
        *("stages=[{epochs: 1}, {epochs: 1}, {epochs: 1}, {epochs: 1}, {epochs: 1}, {epochs: 1}]",),
    ]
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "distil.py"), *given],
        cwd=tmp_path,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 400
    journals: list[Path] = []
    while time.monotonic() < until and job.poll() is None:
        journals = list((tmp_path / "runs").glob("killed-distilled-s0-*/journal.jsonl"))
        if journals and '"kind":"epoch"' in journals[0].read_text():
            break
        time.sleep(0.01)
    assert time.monotonic() < until, "it did not come so far"
    assert job.poll() is None, "it was to be killed"
    os.killpg(job.pid, signal.SIGKILL)
    job.wait()
    steps = runs.read_json(tmp_path / "runs" / "killed" / "steps.json")
    assert steps["distilled-s0"]["status"] == "running"
    assert steps["distilled-s0"]["result"] is None
    done = run_job("distil", *given, cwd=tmp_path, timeout_s=240)
    assert done.returncode == 0, done.stderr
    assert "teacher: done before" in done.stdout
    assert "alone-s0: done before" in done.stdout
    assert runs.last_attempt(journals[0].parent) == 2
    assert (tmp_path / "runs" / "killed" / "comparison.json").exists()
    after = runs.read_json(tmp_path / "runs" / "killed" / "steps.json")
    assert {s["status"] for s in after.values()} == {"finished"}


@pytest.mark.slow
def test_stopped_at_each_step_the_same_command_goes_on(student, conf, worked, auc_of):
    """A teacher that needs fine-tuning, and soft labels: every step there is."""
    auc_of["teacher"] = 0.5
    config = student(
        *("run.name=stops", "distil.finetune=tiny_tune", "distil.soft_labels=true"),
        *("augment.views=2", "augment.crop_scale=[0.9,1.0]", *ONE_SEED),
        f"soft_labels.dir={Path(student().runs.dir) / 'soft'}",
    )
    steps = [
        *("teacher", "diagnose-teacher", "finetuned", "verify-teacher", "soft-labels", "alone-s0"),
        *("distilled-s0", "evaluate-alone-s0", "evaluate-distilled-s0", "latency"),
    ]
    for at, name in enumerate(steps):
        worked.clear()
        STOP[:] = [name]
        with pytest.raises(Stopped, match=f"stopped in {name}"):
            path.distil(config, str(conf))
        assert worked == steps[max(at - 1, 0) : at], "only what the stop before had left"
        found = read(config, "steps.json")
        assert list(found) == steps[: at + 1]
        assert [s["status"] for s in found.values()] == ["finished"] * at + ["stopped"]
        assert found[name]["result"] is None
    worked.clear()
    result = path.distil(config, str(conf))
    assert worked == ["latency"]
    assert result["gate"]["distil"]
    finetuned = read(config, "steps.json")["finetuned"]["result"]["run"]
    about = runs.read_json(Path(finetuned) / "run.json")
    assert about["init_from"] == read(config, "steps.json")["teacher"]["result"]["run"]
    taught = Path(result["runs"]["distilled"]["0"])
    assert runs.read_json(taught / "run.json")["teacher_run"] == finetuned

    worked.clear()
    shutil.rmtree(result["runs"]["alone"]["0"])
    path.distil(config, str(conf))
    assert worked == ["alone-s0"], "a run that was removed is made again, to the same weights"


def test_ctrl_c_in_a_training_is_noted_and_the_training_goes_on(student, conf, worked, monkeypatch):
    monkeypatch.setattr(path, "FEWEST_SEEDS", 1)
    long = "distil.teacher_overrides=['loop.epochs=60']"
    config = student("run.name=interrupted", "distil.seeds=[0]", long)
    thread = interrupt_in(Path(config.runs.dir), "interrupted-teacher")
    with pytest.raises(Stopped):
        path.distil(config, str(conf))
    thread.join()
    assert {n: s["status"] for n, s in read(config, "steps.json").items()} == {"teacher": "stopped"}
    (run_dir,) = Path(config.runs.dir).glob("interrupted-teacher-*")
    before = runs.last_attempt(run_dir)
    STOP[:] = ["diagnose-teacher"]
    with pytest.raises(Stopped, match="stopped in diagnose-teacher"):
        path.distil(config, str(conf))
    found = read(config, "steps.json")
    assert {n: s["status"] for n, s in found.items()} == {
        "teacher": "finished",
        "diagnose-teacher": "stopped",
    }
    assert found["teacher"]["result"]["run"] == str(run_dir)
    assert (before, runs.last_attempt(run_dir)) == (1, 2), "it went on, in the same run"


def test_several_teachers_are_judged_each(student, conf, worked):
    config = student("run.name=whole", *ONE_SEED)
    path.distil(config, str(conf))
    run = read(config, "steps.json")["teacher"]["result"]["run"]
    both = student(
        *("run.name=several", "distil.teacher=null", *ONE_SEED),
        *(f"teachers.near.run={run}", f"teachers.far.run={run}"),
    )
    worked.clear()
    result = path.distil(both, str(conf))
    assert worked[:3] == ["diagnose-near", "diagnose-far", "alone-s0"]
    assert set(read(both, "gate.json")["teachers"]) == {"near", "far"}
    assert set(result["models"]) == {"near", "far", "student"}
    taught = runs.read_json(Path(result["runs"]["distilled"]["0"]) / "run.json")
    assert taught["teachers"] == {"near": run, "far": run}


def test_a_teacher_that_does_not_pass_teaches_nobody(student, conf, worked, auc_of, capsys):
    auc_of["teacher"] = 0.52
    config = student("run.name=gated", *ONE_SEED)
    forget_the_diagnosis(config)
    result = path.distil(config, str(conf))
    assert "alone-s0" in read(config, "steps.json")
    assert not [name for name in worked if "distilled" in name]
    assert result["verdict"] == "not distilled"
    assert result["distilled"] is None
    assert result["gate"]["distil"] is False
    assert "trained on the task's loss alone" in result["gate"]["why"]
    judged = read(config, "gate.json")["teachers"]["teacher"]
    assert judged["diagnose"]["verdict"] == judged["verify"]["verdict"] == "must_finetune"
    said = capsys.readouterr().out
    assert "there is no distil.finetune" in said
    assert "No distillation" in said


def write_striped(root: Path, *, shuffled: bool, train: int = 24, val: int = 60) -> Path:
    """Images of any colour: those of class b have a fine checkerboard, which only true labels lead to.

    `shuffled`: every other file of a class of train/ changes places with one of the other class.
    """
    import numpy as np
    from PIL import Image

    rng = np.random.default_rng(0)
    board = 22 * (-1) ** np.add.outer(np.arange(32), np.arange(32))[..., None]
    for split, count in (("train", train), ("val", val)):
        for k, name in enumerate("ab"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.uniform(50, 200, 3) + rng.normal(0, 8, (32, 32, 3)) + k * board
                Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(
                    root / split / name / f"{i:03d}.png"
                )
    for i in range(0, train if shuffled else 0, 2):
        a, b = (root / "train" / name / f"{i:03d}.png" for name in "ab")
        a.rename(root / "kept.png")
        b.rename(a)
        (root / "kept.png").rename(b)
    return root


@pytest.mark.parametrize("shuffled", [True, False], ids=["shuffled", "true labels"])
def test_labels_shuffled_in_training_are_found_by_measuring(
    shuffled, student, conf, worked, tmp_path, capsys
):
    """A teacher that is really trained on them, and the same one on labels that are true."""
    tree = write_striped(tmp_path / "tree", shuffled=shuffled)
    many = "distil.teacher_overrides=['loop.epochs=12','debug=false','loop.seed=1']"
    config = student(
        *(f"run.name=labels-{shuffled}", f"data.root={tree}", "data.classes=null", *ONE_SEED),
        many.replace("EPOCHS", "12"),
    )
    result = path.distil(config, str(conf))
    gate, told = read(config, "gate.json"), read(config, "comparison.json")
    judged = gate["teachers"]["teacher"]["verify"]
    if not shuffled:
        assert judged["value"] > 0.75
        assert gate["distil"]
        return
    assert judged["value"] < 0.55
    assert judged["verdict"] in ("must_finetune", "inverted")
    assert not gate["distil"]
    assert "no distillation: the students are trained on the task's loss alone" in gate["why"]
    assert not [name for name in worked if "distilled" in name]
    assert (result["verdict"], told["verdict"]) == ("not distilled", "not distilled")
    assert (told["distilled"], told["runs"]["distilled"], told["gain"]) == (None, {}, None)
    assert len(told["alone"]["values"]) == 1
    assert "No distillation: the teacher did not pass the gate" in capsys.readouterr().out


@pytest.mark.slow
def test_real_or_fake_from_a_folder_of_photographs(tmp_path):
    """The whole of it as a user starts it, small: the gate lets everybody pass after fine-tuning."""
    from test_fakes import write_images

    photos = write_images(tmp_path / "photos", {"ash": 60, "elm": 60}, size=(96, 80))
    given = ["experiment=realfake", "debug=true", f"fakes.images={photos}", "run.name=small"]
    given += ["distil.seeds=[0]", "gate.good=1.0", "gate.marginal=0.01", "tracking=none"]
    done = run_job("distil", *given, cwd=tmp_path, timeout_s=900)
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs" / "small"
    steps = runs.read_json(folder / "steps.json")
    assert list(steps) == [
        *("fakes", "teacher", "diagnose-teacher", "finetuned", "verify-teacher", "soft-labels"),
        *("alone-s0", "distilled-s0", "evaluate-alone-s0", "evaluate-distilled-s0", "latency"),
    ]
    assert {s["status"] for s in steps.values()} == {"finished"}
    gate = runs.read_json(folder / "gate.json")
    judged = gate["teachers"]["teacher"]
    assert (judged["diagnose"]["subset"], judged["verify"]["subset"]) == ("val", "test")
    assert judged["finetuned"] == steps["finetuned"]["result"]["run"]
    assert gate["distil"]
    told = runs.read_json(folder / "comparison.json")
    assert told["models"]["student"]["parameters"] == 1297
    assert told["verdict"] == "no interval with one seed"
    roots = {
        role: Path(
            runs.read_json(Path(steps[role]["result"]["run"]) / "run.json")["dataset"]["root"]
        )
        for role in ("teacher", "finetuned", "distilled-s0")
    }
    generators = [root.name.split("-")[0] for root in roots.values()]
    assert generators == ["nearest", "transposed", "transposed"]
    for role in ("teacher", "alone-s0", "distilled-s0"):
        picture = Path(steps[role]["result"]["run"]) / "plots" / "heatmaps.png"
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("on_marginal", ["finetune", "skip"])
def test_a_marginal_teacher(on_marginal, student, conf, worked, auc_of):
    auc_of["teacher"] = 0.6
    config = student(
        *("run.name=gated", "distil.finetune=tiny_tune", *ONE_SEED),
        f"gate.on_marginal={on_marginal}",
    )
    forget_the_diagnosis(config)
    result = path.distil(config, str(conf))
    judged = read(config, "gate.json")["teachers"]["teacher"]
    assert judged["diagnose"]["verdict"] == "marginal"
    assert ("finetuned" in worked) == (on_marginal == "finetune")
    assert judged["verify"]["verdict"] == ("good" if on_marginal == "finetune" else "marginal")
    assert result["gate"]["distil"]
    assert ("with this warning" in result["gate"]["why"]) == (on_marginal == "skip")
    assert read(config, "comparison.json")["distilled"]["values"]


def test_inverted_labels_are_named(student, conf, tiny_tree, tmp_path, capsys):
    """The teacher is trained on red images called blue, and blue ones called red."""
    turned = write_tree(tmp_path / "turned", train=24, seed=3)
    for split in ("train", "val"):
        (turned / split / "red").rename(turned / split / "other")
        (turned / split / "blue").rename(turned / split / "red")
        (turned / split / "other").rename(turned / split / "blue")
    there = f"'data.root={turned}','data.classes=[blue,red]','loop.epochs=6','debug=false'"
    config = student("run.name=turned", f"distil.teacher_overrides=[{there}]", *ONE_SEED)
    result = path.distil(config, str(conf))
    judged = read(config, "gate.json")["teachers"]["teacher"]
    assert judged["diagnose"]["value"] < 0.45
    assert judged["diagnose"]["verdict"] == "inverted"
    assert "fine-tuning would hide this" in judged["diagnose"]["consequence"]
    assert "! Gate, diagnose teacher: PROBABLY INVERTED LABELS" in capsys.readouterr().out
    assert result["verdict"] == "not distilled"


def test_a_teacher_of_weights_becomes_a_run(student, conf, worked):
    from potstill.evaluation import evaluate_run

    config = student("run.name=whole", *ONE_SEED)
    path.distil(config, str(conf))
    source = Path(read(config, "steps.json")["teacher"]["result"]["run"])
    weights = runs.best_checkpoint(source).folder / "model.safetensors"
    asked = (
        "run.name=given",
        f"teacher.weights={weights}",
        "teacher.model._target_=timm",
        *ONE_SEED,
    )
    given = student(*asked, "teacher.model.name=test_convnext")
    result = path.distil(given, str(conf))
    imported = Path(read(given, "steps.json")["import-teacher"]["result"]["run"])
    assert runs.is_run(imported)
    found = compose("evaluate", [f"from_run={imported}", f"cache.dir={config.cache.dir}"])
    told, own = (
        evaluate_run(found),
        evaluate_run(compose("evaluate", [f"from_run={source}", f"cache.dir={config.cache.dir}"])),
    )
    assert told["metrics"]["loss"] == pytest.approx(own["metrics"]["loss"], rel=1e-6)
    assert [w["name"] for w in told["warnings"]] == ["trained_on_unknown"]
    assert runs.read_json(Path(result["runs"]["distilled"]["0"]) / "run.json")[
        "teacher_run"
    ] == str(imported)
    worked.clear()
    wrong = student("run.name=mistaken", *asked[1:], "teacher.model.name=test_vit")
    with pytest.raises(
        UserError, match=r"teacher\.weights must be weights of test_vit, got .*\d+ tens"
    ):
        path.distil(wrong, str(conf))
    assert worked == [], "it is said at the start"


def test_weights_are_imported_whole_and_a_config_is_left_alone(student, tmp_path):
    from safetensors.torch import save_file

    from potstill.assemble import load_model
    from potstill.config import to_dict
    from potstill.data.prepare import check
    from potstill.models.patches import TinyLaDeDa

    theirs = TinyLaDeDa(1, preprocessing="right_diag", input_scale=2 / 3)
    theirs.fc.bias.data.fill_(0.25)
    save_file(theirs.state_dict(), tmp_path / "tiny.safetensors")
    for name in ("0_real", "1_fake"):
        shutil.copytree(Path(str(student().data.root)) / "train" / "red", tmp_path / "set" / name)
    config = student()
    config.data.root, config.data.classes = str(tmp_path / "set"), None
    config.model = {"_target_": "tiny_ladeda", "preprocessing": "right_diag", "input_scale": 2 / 3}
    before = to_dict(config)
    plan = check(config.data, config.cache)
    run = path.import_weights(tmp_path / "tiny.safetensors", config, plan)
    assert to_dict(config) == before
    model, classes, _ = load_model(run)
    assert classes == ["0_real", "1_fake"]
    assert model.state_dict()["fc.bias"].tolist() == [0.25]
    for name, tensor in theirs.state_dict().items():
        assert bool((model.state_dict()[name] == tensor).all()), name
    del theirs.conv2
    save_file(theirs.state_dict(), tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"teachers\.a\.weights must be weights of .*missing conv2"):
        path.import_weights(tmp_path / "less.safetensors", config, plan, "teachers.a.weights")


def test_fine_tuning_takes_the_teachers_own_model(tmp_path):
    """Published weights mean what they do with their preprocessing and scale; how it is trained is the experiment's."""
    from safetensors.torch import save_file

    from potstill.models.patches import LaDeDa9

    for split in ("train", "val", "test"):
        for name in ("0_real", "1_fake"):
            write_images_of_one(tmp_path / "set" / split / name, 20)
    save_file(LaDeDa9(1).state_dict(), tmp_path / "own.safetensors")
    config = compose(
        "distil",
        [
            *("experiment=realfake", "teacher=ladeda9", "distil.teacher=null", "tracking=none"),
            *(f"teacher.weights={tmp_path / 'own.safetensors'}", f"data.root={tmp_path / 'set'}"),
            *(f"runs.dir={tmp_path / 'runs'}", f"cache.dir={tmp_path / 'cache'}"),
            "teacher.model.preprocessing=right_diag",
        ],
    )
    found = path._Path(config, None).finetune
    assert found is not None
    assert found.model == {
        **{"_target_": "ladeda9", "preprocessing": "right_diag", "input_scale": 2 / 3},
        **{"init_from": path.TO_COME, "freeze": {"all_but_last_blocks": 1}, "stem_momentum": 0.1},
    }
    tiny = compose(
        "distil", ["experiment=realfake", "tracking=none", f"data.root={tmp_path / 'set'}"]
    )
    tiny.distil.teacher_overrides = ["model.preprocessing=raw", "model.input_scale=0.5"]
    own = path._Path(tiny, None).finetune
    assert own is not None
    assert (own.model["preprocessing"], own.model["input_scale"]) == ("raw", 0.5)


def write_images_of_one(folder: Path, count: int) -> None:
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True)
    for i in range(count):
        rng = np.random.default_rng([i, *folder.name.encode()])
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(folder / f"{i}.png")


def test_sets_of_fakes_are_made_first(student, conf, worked, tmp_path, monkeypatch):
    from potstill.data import fakes

    asked = {}

    def pretend(made):
        asked[made.generator] = (
            made.images,
            made.max_images,
            made.px,
            made.jpeg_quality,
            made.seed,
        )
        write_tree(Path(made.output), seed=len(asked))
        runs.write_json(Path(made.output) / "fakes.json", {})
        return Path(made.output)

    monkeypatch.setattr(fakes, "make_fakes_shown", pretend)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "a.jpg").write_bytes(b"a photograph")
    places = (
        f"fakes.images={tmp_path / 'photos'}",
        f"fakes.dir={tmp_path / 'sets'}",
        "data.root=null",
    )
    config = student("run.name=fakes", *places, *ONE_SEED)
    path.distil(config, str(conf))
    assert worked[:2] == ["fakes", "teacher"]
    photos = str((tmp_path / "photos").resolve())
    made = config.fakes
    assert asked == {
        "nearest": (photos, made.teacher_images, 64, 95, 0),
        "transposed": (photos, made.max_images, 64, 95, 0),
    }
    assert made.teacher_images < made.max_images
    steps = read(config, "steps.json")
    of_teacher = runs.read_json(Path(steps["teacher"]["result"]["run"]) / "run.json")
    of_student = runs.read_json(Path(steps["distilled-s0"]["result"]["run"]) / "run.json")
    names = [
        Path(about["dataset"]["root"]).name.split("-")[0] for about in (of_teacher, of_student)
    ]
    assert names == ["nearest", "transposed"]
    worked.clear()
    path.distil(config, str(conf))
    assert worked == []
    (tmp_path / "photos" / "b.jpg").write_bytes(b"another")
    path.distil(config, str(conf))
    assert worked[:2] == ["fakes", "teacher"], "other photographs, other sets"
    with pytest.raises(UserError, match=r"data\.root must be null where fakes\.images"):
        path.distil(student(*places[:2]), str(conf))
    given = student(
        *("run.name=given", f"teacher.run={steps['teacher']['result']['run']}", *places),
        f"fakes.dir={tmp_path / 'other'}",
    )
    asked.clear()
    STOP[:] = ["diagnose-teacher"]
    with pytest.raises(Stopped):
        path.distil(given, str(conf))
    assert set(asked) == {"transposed"}, "nobody needs the teacher's set"


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["distil.seeds=[0,1]"], r"distil\.seeds must be at least 3 different numbers, got \[0, 1\]"),
        (["distil.teacher=tiny_techer"], r"distil\.teacher=tiny_techer: experiment must be one of"),
        (
            ["distil.finetune=tiny_tune", "distil.finetune_overrides=['loop.epocs=2']"],
            r"distil\.finetune=tiny_tune: loop\.epocs is not a key.*did you mean loop\.epochs",
        ),
        (["distil.finetune=tiny_other"], r"distil\.finetune must be of the teacher's model.*test_vit"),
        (["distil.teacher_overrides=['model.name=test_convnxt']"], r"model\.name must be a timm model"),
        (["distil.metric=val_f2"], r"distil\.metric must be of .*got 'f2'"),
        (["gate.metric=brier"], r"gate\.metric must be one of"),
        (["distil.subset=test"], r"distil\.subset must be one that .* has \(val\), got 'test'"),
        (["distil.teacher=null", "teacher.run=nowhere"], r"teacher\.run must be the folder of a run"),
        (["task.terms.distil={loss: bce, inputs: [logits, label]}"], r"learns from a teacher"),
        (["run.again=true"], r"run\.again must be false"),
        (["loop.batch_size=5000"], r"loop\.batch_size must be <= the number of training images"),
        (["model.init_from=no.pth"], r"model\.init_from must be .*no\.pth', which does not exist"),
        (["data.classes=null"], r"task\.kind=binary needs data of 2 classes, got 4"),
        (
            ["distil.teacher_overrides=['data.classes=[green,red]']"],
            r"teacher\.run must know the classes.*the teacher does not know 1: blue",
        ),
        (["gate.good=0.5"], r"gate\.good must be > gate\.marginal"),
        (["gate.marginal=60"], r"gate\.marginal must be a fraction <= 1.*got 60; set gate\.marginal=0\.6,"),
        (
            ["gate.metric=top1_acc", "gate.marginal=0.65"],
            r"gate\.marginal must be in percent.*got 0\.65; set gate\.marginal=65, not 0\.65",
        ),
        (
            ["distil.soft_labels=true", "augment.views=2", "soft_labels.top_k=1"],
            r"soft_labels\.top_k must be null for task\.kind=binary",
        ),
        (["distil.teacher=null", "teachers.student.run=a"], r"teachers\.student must have another name"),
    ],
)  # fmt: skip
def test_a_mistake_in_any_step_is_said_before_the_first(overrides, says, student, conf):
    with pytest.raises(UserError, match=says):
        path.distil(student("run.name=mistaken", *overrides), str(conf))
    assert not (Path(student().runs.dir) / "mistaken").exists()


def test_a_student_alone_is_the_same_training_without_its_teacher(student):
    config = student("optimizer.lr=0.004", "loop.epochs=7")
    alone = path.without_teacher(config)
    assert list(alone.task["terms"]) == ["task"]
    assert alone.task["terms"]["task"]["weight"] == 1.0
    assert "distil" in config.task["terms"], "the student's own config is left alone"
    assert (alone.optimizer, alone.loop, alone.augment) == (
        config.optimizer,
        config.loop,
        config.augment,
    )
    assert (alone.data, alone.model) == (config.data, config.model)


def test_weights_and_stages_of_a_student_alone(student):
    further = "task.terms.more={loss: focal, inputs: [logits, label], weight: 0.25}"
    stages = (
        "[{epochs: 1, terms: {task: null, more: null}}, {epochs: 2, optimizer: {lr: 0.01}, "
        "terms: {more: null, distil: {weight: 0.2}}}, {epochs: 1, terms: {more: {weight: 0.5}}}]"
    )
    alone = path.without_teacher(student(further, f"stages={stages}"))
    weights = {name: term["weight"] for name, term in alone.task["terms"].items()}
    assert weights == {"task": 1.0, "more": 0.25}, (
        "a number stays, the complement of what is gone is 1"
    )
    by_labels, one_left, both = alone.stages
    assert by_labels["terms"] == {}, "a stage on the teacher alone is trained on the labels"
    assert one_left == {
        "epochs": 2,
        "optimizer": {"lr": 0.01},
        "terms": {"more": None, "task": {"weight": 1.0}},
    }
    assert both["terms"] == {"more": {"weight": 0.5}}
    with pytest.raises(UserError, match=r"task\.terms must have a term without a teacher"):
        path.without_teacher(student("~task.terms.task"))


def test_the_job(conf, tiny_tree, cache_dir, tmp_path):
    """As a user starts it: experiments of --config-dir, one message and status 2 for a mistake, --steps."""
    given = [
        *("--config-dir", str(conf), "experiment=tiny_student"),
        *tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs"),
        "data.classes=[blue,red]",
    ]
    done = run_job("distil", *given, "distil.finetune=tiny_tun", cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr.startswith("error: distil.finetune=tiny_tun: experiment must be one of")
    assert not (tmp_path / "runs").exists()
    steps = {"teacher": {"key": "0123", "status": "finished", "result": {}, "seconds": 61.0}}
    folder = tmp_path / "runs" / "distil-tiny_student"
    folder.mkdir(parents=True)
    (folder / "steps.json").write_text(json.dumps(steps))
    done = run_job("distil", "--steps", *given, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "1 min 01 s" in done.stdout
