"""Aim holds what the journal holds: real repositories, read by another process."""

from __future__ import annotations

import fcntl
import json
import math
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import write_down_connections
from potstill import runs
from potstill.errors import UserError
from potstill.predictions import multi_label_predictions
from potstill.tracking import AimFollower, fill
from synthetic_runs import (
    START,
    attempt,
    epoch,
    make_cache,
    make_run,
    predictions,
    step,
    whole_journal,
)

CLASSES = ["robur", "rubra", "ilex <i>", "suber"]

READ = """
import json, sys
from aim import Repo
repo = Repo(sys.argv[1])
found = {}
for run in repo.query_runs(sys.argv[2], report_mode=0).iter_runs():
    run = run.run
    found[run.hash] = {
        "name": run.name, "experiment": run.experiment, "tags": sorted(run.tags), "active": run.active,
        "created": run.creation_time, "ended": run.end_time, "attributes": run[...], "metrics": {}, "objects": {},
    }
for metric in repo.query_metrics("metric.name != ''", report_mode=0).iter():
    frame = metric.dataframe()
    key = metric.name + "/" + metric.context.to_dict()["subset"]
    rows = sorted(zip(frame["step"].tolist(), frame["value"].tolist(), frame["epoch"].tolist(), [t.timestamp() for t in frame["time"]]))
    found[metric.run.hash]["metrics"][key] = rows
for kind in ("images", "figure_objects", "texts"):
    for sequence in getattr(repo, "query_" + kind)("", report_mode=0).iter():
        for step, (value, *_) in sequence.data.items():
            context = sequence.context.to_dict()
            if kind == "images":
                value = [(image.caption, image.to_pil_image().getpixel((0, 0))[0]) for image in value]
            else:
                value = value.data
            found[sequence.run.hash]["objects"][sequence.name + "/" + context.get("kind", "")] = [step, value]
print(json.dumps(found))
"""


def read_aim(repo: Path, query: str = "run.config.optimizer.lr == 0.003") -> dict[str, Any]:
    """What a fresh process finds in the repository: runs by hash."""
    command = [sys.executable, "-c", READ, str(repo), query]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def points(aim_run: dict[str, Any], metric: str) -> dict[int, float]:
    return {int(at): value for at, value, *_ in aim_run["metrics"][metric]}


# ------------------------------------------------------------------------------------------------ told
@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A finished run filled into a new repository, with every attempt to connect recorded."""
    root = tmp_path_factory.mktemp("told")
    warnings = [
        {"name": "collapsed", "message": "all are rubra"},
        {"name": "at chance", "message": "25 %"},
    ]
    guesses = predictions(4)
    records = whole_journal(3, val_loss=math.nan, warnings=warnings)
    run_dir = make_run(root, records, classes=CLASSES, guesses=guesses)
    make_cache(root / "cache" / "k1", guesses, CLASSES)
    runs.write_json(run_dir / "summary.json", {"parameters": 1234, "status": "finished"})
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(write_down_connections(root)))
        aim_hash = fill(run_dir, root / "aim")
    assert (root / "hooked").exists()
    shutil.copytree(root / "aim", root / "empty", ignore=shutil.ignore_patterns(aim_hash, "index"))
    found = read_aim(root / "aim", "run.name == 'oaks' and run.config.optimizer.lr == 0.003")
    return {"hash": aim_hash, "found": found, "records": records, "root": root}


def test_every_float_is_the_journals(told):
    aim_run = told["found"][told["hash"]]
    epochs = [r for r in told["records"] if r["kind"] == "epoch"]
    names = {
        "train_loss": "loss/train",
        "train_top1_acc": "top1_acc/train",
        "train_top5_acc": "top5_acc/train",
        "val_loss": "loss/val",
        "val_top1_acc": "top1_acc/val",
        "val_top5_acc": "top5_acc/val",
        "val_macro_f1": "macro_f1/val",
        "lr": "lr/train",
        "images_per_s": "images_per_s/train",
    }
    for key, metric in names.items():
        expected = [(r["step"], repr(r[key]), r["epoch"], r["time"]) for r in epochs]
        got = [
            (at, repr(value), in_epoch, when)
            for at, value, in_epoch, when in aim_run["metrics"][metric]
        ]
        assert got == expected, metric
    assert math.isnan(points(aim_run, "loss/val")[24])
    assert points(aim_run, "loss/task/train") == {
        r["step"]: r["terms"]["task"]["loss"] for r in epochs
    }
    assert points(aim_run, "weighted_loss/task/train") == {
        r["step"]: r["terms"]["task"]["weighted"] for r in epochs
    }
    steps = [r for r in told["records"] if r["kind"] == "step"]
    for key in ("loss", "lr", "images_per_s"):
        assert points(aim_run, f"batch_{key}/train") == {r["step"]: r[key] for r in steps}


def test_the_run_says_what_it_is(told):
    aim_run = told["found"][told["hash"]]
    assert (aim_run["name"], aim_run["experiment"], aim_run["tags"]) == (
        "oaks",
        "seedlings",
        ["first", "oak"],
    )
    assert not aim_run["active"]
    assert aim_run["created"] == START
    assert aim_run["ended"] == told["records"][-1]["time"]
    about = aim_run["attributes"]
    assert about["config"] == {
        "model": {"name": "resnet18"},
        "optimizer": {"lr": 0.003},
        "stages": [],
        "plugins": None,
    }
    assert about["dataset"]["key"] == "k1"
    assert about["git"] == {"commit": "0123abc", "dirty": False}
    assert about["teacher_run"] is None
    assert about["classes"] == 4
    assert about["status"]["status"] == "finished"
    assert about["summary"]["parameters"] == 1234


def test_pictures_and_warnings(told):
    objects = told["found"][told["hash"]]["objects"]
    guesses = predictions(4)
    at, mistakes = objects["predictions/mistake"]
    assert at == 8
    wrong = [i for i in range(60) if guesses["label"][i] != guesses["prediction"][i]]
    surest = sorted(wrong, key=lambda i: -guesses["confidence"][i])[:8]
    assert [pixel for _, pixel in mistakes] == surest
    first = surest[0]
    label, guess = (CLASSES[guesses[key][first]] for key in ("label", "prediction"))
    assert mistakes[0][0] == f"{label} → {guess} ({guesses['confidence'][first]:.2f})"
    correct = objects["predictions/correct"][1]
    assert len(correct) == 4
    assert not {pixel for _, pixel in correct} & set(wrong)
    figure = json.loads(objects["confusion_matrix/"][1])
    assert figure["data"][0]["type"] == "heatmap"
    assert sum(map(sum, figure["data"][0]["customdata"])) == 60
    assert objects["warnings/epoch"] == [24, "collapsed: all are rubra\nat chance: 25 %"]


def test_a_run_of_several_labels_is_told_with_its_metrics_and_label_sets(tmp_path):
    targets = np.array([[1, 0, 1, 0], [0, 1, 0, 0], [0, 0, 0, 0]], bool)
    scores = np.array([[0.9, 0.1, 0.7, 0.6], [0.2, 0.3, 0.4, 0.1], [0.1, 0.1, 0.1, 0.2]])
    ids = np.arange(3) + 1000
    arrays = (ids, targets, scores, scores.argmax(1), scores.max(1))
    guesses = multi_label_predictions(*arrays, 0.5).arrays()
    records = whole_journal(2, val_auc=0.875)
    run_dir = make_run(tmp_path, records, classes=CLASSES, guesses=guesses)
    make_cache(tmp_path / "cache" / "k1", guesses, CLASSES)
    aim_hash = fill(run_dir, tmp_path / "aim")
    aim_run = read_aim(tmp_path / "aim")[aim_hash]
    assert points(aim_run, "auc/val") == {16: 0.875}
    objects = aim_run["objects"]
    assert set(objects) == {"predictions/mistake", "predictions/correct"}
    assert [caption for caption, _ in objects["predictions/correct"][1]] == [
        "robur + ilex <i> → robur (0.90) + ilex <i> (0.70) + suber (0.60)"
    ]
    assert [caption for caption, _ in objects["predictions/mistake"][1]] == [
        "rubra → none",
        "none → none",
    ]


def test_aim_calls_nobody(told):
    assert not (told["root"] / "connections").exists()


# ---------------------------------------------------------------------------------------------- followed
@pytest.fixture
def repo(told: dict[str, Any], tmp_path: Path) -> Path:
    """A repository that exists already; making one takes Aim seconds."""
    return Path(shutil.copytree(told["root"] / "empty", tmp_path / "aim"))


def test_a_resumed_run_goes_on_in_its_own_aim_run(repo, tmp_path, capfd):
    records = [attempt(), *(step(at) for at in range(1, 14)), epoch(1)]
    run_dir = make_run(tmp_path, sorted(records, key=lambda r: r["step"]))
    said: list[str] = []
    first = AimFollower(run_dir, repo, said.append).close(180)
    # the second attempt takes over at step 10, and logs other steps than the first had
    runs.append_records(run_dir, [attempt(2, 10, resumed_from="step-00000010")])
    follower = AimFollower(run_dir, repo, said.append)
    runs.append_records(run_dir, [step(at, 2, loss=100.0 + at) for at in (12, 14, 16)])
    time.sleep(2.5)  # some records reach the follower while it follows, some at the end
    runs.append_records(run_dir, [epoch(2, 2, train_loss=0.125)])
    assert follower.close(180) == first
    found = read_aim(repo)
    assert list(found) == [first]
    aim_run = found[first]
    assert points(aim_run, "batch_loss/train") == {
        r["step"]: r["loss"] for r in runs.read_journal(run_dir) if r["kind"] == "step"
    }
    assert set(points(aim_run, "batch_loss/train")) == {*range(1, 11), 12, 14, 16}
    assert points(aim_run, "loss/train") == {8: 2 / 3, 16: 0.125}
    assert aim_run["attributes"]["status"]["status"] == "interrupted"
    assert len(said) == 2  # both times: no checkpoint, so no confusion matrix
    assert all("no confusion matrix" in line for line in said)
    assert capfd.readouterr() == ("", "")


def test_a_killed_driver_leaves_a_closed_run_that_a_query_finds(repo, tmp_path):
    run_dir = make_run(tmp_path, whole_journal(1)[:-1])
    code = (
        "import sys, time; from pathlib import Path; from potstill.tracking import AimFollower\n"
        f"f = AimFollower(Path({str(run_dir)!r}), Path({str(repo)!r}), print)\n"
        "print(f._writer._child.pid, flush=True); time.sleep(60)"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    child = int(driver.stdout.readline())
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    deadline = time.monotonic() + 180
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    (aim_run,) = read_aim(repo).values()
    assert len(aim_run["metrics"]["batch_loss/train"]) == 8
    assert not aim_run["active"]


# ------------------------------------------------------------------------------------- what goes wrong
def test_a_broken_repository_is_said_once_and_harms_nothing(tmp_path):
    run_dir = make_run(tmp_path, whole_journal(1))
    repo = tmp_path / "aim"
    (repo / ".aim").mkdir(parents=True)
    (repo / ".aim" / "VERSION").write_text("0.3\n")
    (repo / ".aim" / "run_metadata.sqlite").write_text("this is no database" * 100)
    said: list[str] = []
    follower = AimFollower(run_dir, repo, said.append)
    assert follower.close(180) is None
    assert len(said) == 1
    assert "file is not a database" in said[0]
    assert f"jobs/report.py from_run={run_dir} tracking=aim tracking.repo={repo}" in said[0]


def test_a_second_writer_waits_and_close_does_not_wait_for_ever(tmp_path):
    run_dir = make_run(tmp_path, whole_journal(1))
    said: list[str] = []
    with open(run_dir / ".aim.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        began = time.monotonic()
        follower = AimFollower(run_dir, tmp_path, said.append)
        assert follower.close(1.5) is None
        assert time.monotonic() - began < 10
    assert len(said) == 1
    assert "not done within 1.5 s" in said[0]
    assert follower._writer._child is not None
    assert follower._writer._child.returncode == -signal.SIGKILL
    assert not (tmp_path / ".aim").exists()


def test_a_busy_index_is_waited_for_and_a_lost_cache_costs_the_images_alone(told, tmp_path):
    shutil.copytree(
        told["root"], tmp_path, dirs_exist_ok=True
    )  # both moved: still the same Aim run
    run_dir, repo = tmp_path / "oaks", tmp_path / "aim"
    about = runs.read_json(run_dir / "run.json")
    about["dataset"]["dir"] = str(tmp_path / "gone")
    runs.write_json(run_dir / "run.json", about)
    runs.append_records(run_dir, [epoch(4)])
    code = (
        "import sys, time; from aim import Repo\n"
        f"index = Repo({str(repo)!r})._get_index_tree('meta', 0)\n"
        "print('held', flush=True); time.sleep(4)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert holder.stdout is not None
    assert holder.stdout.readline() == "held\n"
    said: list[str] = []
    found = fill(run_dir, repo, said.append)
    assert holder.wait() == 0
    assert found == told["hash"]
    assert len(said) == 1
    assert "no images with predictions" in said[0]
    aim_run = read_aim(repo)[found]
    assert [at for at, *_ in aim_run["metrics"]["loss/train"]] == [8, 16, 24, 32]
    assert len(aim_run["metrics"]["batch_loss/train"]) == 24  # told again, and no point doubled
    assert set(aim_run["objects"]) == {"confusion_matrix/", "warnings/epoch"}


def test_without_aim_it_is_said_once(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    assert AimFollower(make_run(tmp_path, []), tmp_path, said.append).close(180) is None
    assert len(said) == 1
    assert "Aim is not installed" in said[0]
    with pytest.raises(UserError, match="Aim is not installed"):
        fill(tmp_path / "oaks", tmp_path)


def test_levels_stages_and_where_a_student_comes_from(tmp_path):
    """Every change of level or stage is a text, every weight a metric, and a teacher finds its students."""
    records = whole_journal(3)
    at = next(r for r in records if r["kind"] == "epoch")
    at["terms"] = {"distil": {"loss": 2.0, "weighted": 0.1, "weight": 0.05}}
    about = {"attempt": 1, "step": at["step"], "time": at["time"], "epoch": 1}
    level = {"kind": "level", "term": "distil", "level": 2, "weight": 0.05, "restored": False}
    stage = {"kind": "stage", "stage": 2, "stages": 2, "stage_name": "slow", "stage_epochs": 20}
    place = records.index(at) + 1
    records[place:place] = [
        {**about, **level, "message": "val_auc has reached 0.7 (0.7100)"},
        {**about, **stage},
    ]
    run_dir = make_run(tmp_path, records, classes=CLASSES, guesses=predictions(4))
    known = runs.read_json(run_dir / "run.json")
    taught = {
        "teacher_run": str(tmp_path / "old_oak"),
        "teachers": {"teacher": str(tmp_path / "old_oak")},
        "soft_labels": str(tmp_path / "soft" / "abc123"),
    }
    runs.write_json(run_dir / "run.json", known | taught)
    fill(run_dir, tmp_path / "aim")
    (found,) = read_aim(tmp_path / "aim", "run.teacher.run == 'old_oak'").values()
    assert found["attributes"]["teacher"]["lineage"] == f"old_oak -> abc123 -> {run_dir.name}"
    assert points(found, "weight/distil/train") == {at["step"]: 0.05}
    assert found["objects"]["course/level"][1] == (
        "Weight of distil now at 0.05 (level 2): val_auc has reached 0.7 (0.7100)"
    )
    assert found["objects"]["course/stage"][1] == "Stage 2/2 (slow): 20 epochs"
