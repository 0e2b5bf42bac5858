"""The whole path on images that train in a second: what is done, once, and what the gate lets through."""

from __future__ import annotations

import json
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import run_job, tiny_overrides, write_tree
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
        small = ["data.classes=[blue,red]", "loop.batch_size=8", "loop.epochs=1"]
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

    def interrupt() -> None:
        until = time.monotonic() + 60
        while time.monotonic() < until:
            for journal in Path(config.runs.dir).glob("interrupted-teacher-*/journal.jsonl"):
                if '"kind":"epoch"' in journal.read_text():
                    os.kill(os.getpid(), signal.SIGINT)
                    return
            time.sleep(0.02)

    thread = threading.Thread(target=interrupt)
    thread.start()
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
    wrong = student(*asked, "teacher.model.name=test_vit")
    with pytest.raises(UserError, match="must hold the weights of"):
        path.distil(wrong, str(conf))


def test_sets_of_fakes_are_made_first(student, conf, worked, tmp_path, monkeypatch):
    from potstill.data import fakes

    asked = {}

    def pretend(images, output, generator, *, max_images, px, jpeg_quality, seed):
        asked[generator] = (images, max_images, px, jpeg_quality, seed)
        write_tree(output, seed=len(asked))
        runs.write_json(output / "fakes.json", {})
        return output

    monkeypatch.setattr(fakes, "make_fakes", pretend)
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
    photos = (tmp_path / "photos").resolve()
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
