"""A search in Aim: one process writes the search and its trials, each from its own journal."""

from __future__ import annotations

import fcntl
import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from potstill import runs
from potstill.tracking import AimWriter, fill
from synthetic_runs import START, attempt, epoch, make_cache, make_run, predictions, whole_journal
from test_tracking import points, read_aim

ALL = "run.name != ''"
ASK = """
import json, sys
from aim import Repo
repo = Repo(sys.argv[1])
print(json.dumps([sorted(r.run.name for r in repo.query_runs(q, report_mode=0).iter_runs()) for q in sys.argv[2:]]))
"""


def ask(repo: Path, *queries: str) -> list[list[str]]:
    """The names of the runs that each query finds, in a process of its own."""
    command = [sys.executable, "-c", ASK, str(repo), *queries]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def make_search(root: Path, name: str = "greenhouse") -> Path:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("search: {algorithm: tpe}\noptimizer: {lr: 0.1}\n")
    about = {
        "name": name,
        "created": START,
        "search": "quickstart",
        "objectives": [
            {"name": "val_top1_acc", "higher_is_better": True},
            {"name": "parameters", "higher_is_better": False},
        ],
        "settings": {"space": {"optimizer.lr": [1e-4, 0.1]}, "max_hours": None, "constraints": {}},
        "git_commit": "0123abc",
        "git_dirty": True,
        "versions": {"optuna": "5.0"},
        "tags": ["spring"],
    }
    runs.write_json(folder / "search.json", about)
    return folder


def make_trial(search: Path, number: int, records: list[dict[str, Any]], **changes: Any) -> Path:
    trial = make_run(search / "trials", records, f"trial-{number:04d}", **changes)
    about = runs.read_json(trial / "run.json")
    point = {"optimizer.lr": 0.001 * number, "model.name": "resnet18"}
    of = {"id": search.name, "number": number, "point": point, "dir": str(search)}
    runs.write_json(trial / "run.json", about | {"search": of})
    return trial


def trial_ended(number: int, state: str, step: int, value: float | None, **changes: Any):
    values = {"val_top1_acc": value, "parameters": 1000 + number}
    best = {"val_top1_acc": 90.0 + step}
    name = f"trial-{number:04d}"
    return {
        "kind": "trial",
        "attempt": 1,
        "step": step,
        "time": START + 10 * step,
        **{"number": number, "name": name, "state": state, "values": values, "best": best},
        **changes,
    }


def end(status: str, step: int = 16, **changes: Any) -> dict[str, Any]:
    how = {"status": status, "reason": "", "best": None}
    how |= {"by": "scheduler"} if status == "stopped_early" else {}
    return {"kind": "end", "attempt": 1, "step": step, "time": START + 100, **how, **changes}


def wait_for(what: Callable[[], Any], timeout_s: float = 90) -> Any:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if found := what():
            return found
        time.sleep(0.3)
    raise AssertionError("it did not come")


def aim_hash(run_dir: Path) -> str:
    return runs.read_json(run_dir / "aim.json")["run"]


def open_files(pid: int) -> list[str]:
    links = []
    for handle in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(OSError):
            links.append(os.readlink(handle))
    return links


# --------------------------------------------------------------------------------------- a whole search
@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A search of six trials at once: one ends early, one is broken, one is locked for a while."""
    root = tmp_path_factory.mktemp("searched")
    repo, search = root / "aim", make_search(root)
    guesses = predictions(4)
    trials = {
        number: make_trial(search, number, [attempt()], guesses=guesses) for number in range(5)
    }
    make_cache(search / "trials" / "cache" / "k1", guesses, ["a", "b", "c", "d"])
    broken, late = trials[3], search / "trials" / "trial-0005"
    (broken / "run.json").write_text('{"name": "tri')
    runs.append_records(search, [attempt(1, 0)])
    said: list[str] = []
    writer = AimWriter(repo, said.append)
    writer.follow(search / "trials" / "never")
    with open(trials[4] / ".aim.lock", "w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        for folder in (search, *trials.values(), late):
            writer.follow(folder)
            writer.follow(folder)
        wait_for(lambda: all((trials[n] / "aim.json").exists() for n in (0, 1, 2)))
        for at in (1, 2):
            for number in (0, 1, 2, 4):
                changes = {"val_top1_acc": 50.0 + number}
                if (number, at) == (2, 2):
                    changes = {"val_loss": math.nan, "val_top1_acc": math.nan}
                runs.append_records(trials[number], [epoch(at, **changes)])
            time.sleep(1.2)  # the journals grow while they are followed
        runs.append_records(trials[0], [end("finished")])
        runs.write_json(trials[0] / "summary.json", {"status": "finished"})
        runs.append_records(search, [trial_ended(0, "completed", 1, 50.0)])
        writer.over(trials[0])
        first = aim_hash(trials[0])
        during = wait_for(lambda: (found := ask(repo, "run.active", "not run.active"))[1] and found)
        assert writer._child is not None
        files = open_files(writer._child.pid)
    for number, status in ((1, "stopped_early"), (2, "failed")):
        runs.append_records(trials[number], [end(status)])
        writer.over(trials[number])
    make_trial(search, 5, [attempt(), epoch(1)])
    runs.append_records(
        search,
        [
            trial_ended(1, "stopped early", 2, math.nan),
            trial_ended(2, "failed", 3, None),
            trial_ended(3, "failed", 4, None),
            end("finished", 4, best={"val_top1_acc": 94.0}),
        ],
    )
    (search / "plots").mkdir()
    Image.new("RGB", (4, 4), (7, 0, 0)).save(search / "plots" / "pareto.png")
    drawn = {"data": [{"type": "bar", "x": [1]}], "layout": {"title": {"text": "front"}}}
    runs.write_json(search / "figures.json", {"pareto": drawn, "importance": None})
    hashes = writer.close(120)
    return {
        "repo": repo,
        "search": search,
        "trials": trials,
        "late": late,
        "said": said,
        "hashes": hashes,
        "first": first,
        "during": during,
        "files": files,
        "found": read_aim(repo, ALL),
    }


def test_every_trial_and_the_search_are_one_run_each(searched):
    trials, hashes = searched["trials"], searched["hashes"]
    whole = [searched["search"], *(trials[n] for n in (0, 1, 2, 4)), searched["late"]]
    assert set(hashes) == set(whole)
    assert set(searched["found"]) == set(hashes.values())
    assert hashes[trials[0]] == searched["first"]
    assert not any(run["active"] for run in searched["found"].values())
    assert not list((searched["repo"] / ".aim" / "meta" / "progress").iterdir())


def test_a_closed_trial_is_read_while_others_are_open_and_leaves_nothing_open(searched):
    active, ended = searched["during"]
    assert ended == ["trial-0000"]
    assert active == ["greenhouse", "trial-0001", "trial-0002"]  # one broken, one locked, one late
    held = {
        n: sum(
            f"/chunks/{searched['hashes'][searched['trials'][n]]}/" in f for f in searched["files"]
        )
        for n in (0, 1, 2)
    }
    assert held[0] == 0
    assert 0 < held[1] < 20
    assert 0 < held[2] < 20
    assert not any("inotify" in f for f in searched["files"])  # a user has 128 of them


def test_a_broken_trial_is_named_and_costs_the_others_nothing(searched):
    broken, never = searched["said"]
    assert "Aim does not have all of this run (JSONDecodeError: " in broken
    assert f"jobs/report.py from_run={searched['trials'][3]} tracking=aim" in broken
    assert "(its folder has no config.yaml or no run.json)" in never
    assert "trials/never " in never


def test_every_epoch_of_every_trial_is_there_and_nan_is_nan(searched):
    for folder in (*(searched["trials"][n] for n in (0, 1, 2, 4)), searched["late"]):
        aim_run = searched["found"][searched["hashes"][folder]]
        epochs = [r for r in runs.read_journal(folder) if r["kind"] == "epoch"]
        for key, metric in (("val_top1_acc", "top1_acc/val"), ("train_loss", "loss/train")):
            told = points(aim_run, metric)
            expected = {r["step"]: r[key] for r in epochs}
            assert repr(sorted(told.items())) == repr(sorted(expected.items()))
        assert not set(aim_run["objects"])  # no pictures of trials
    third = searched["found"][searched["hashes"][searched["trials"][2]]]
    assert math.isnan(points(third, "loss/val")[16])
    assert math.isnan(points(third, "top1_acc/val")[16])


def test_trials_are_found_by_their_state_point_and_search(searched):
    found = ask(
        searched["repo"],
        "run.search.state == 'failed'",
        "run.search.state == 'stopped early'",
        "run.search.state == 'completed'",
        "run.search.state == 'interrupted'",
        "run.search.point['optimizer.lr'] > 0.0015",
        "run.search.id == 'greenhouse' and run.search.number == 1",
        "'search:greenhouse' in run.tags",
        "run.experiment == 'search'",
    )
    trials = [f"trial-{number:04d}" for number in range(6)]
    assert found == [
        [trials[2]],
        [trials[1]],
        ["greenhouse", trials[0]],
        [trials[4], trials[5]],
        [trials[2], trials[4], trials[5]],
        [trials[1]],
        ["greenhouse", *trials[:3], *trials[4:]],
        ["greenhouse"],
    ]
    second = searched["found"][searched["hashes"][searched["trials"][1]]]
    assert second["attributes"]["search"]["point"] == {
        "optimizer.lr": 0.001,
        "model.name": "resnet18",
    }
    first = searched["found"][searched["first"]]
    assert first["attributes"]["summary"] == {"status": "finished"}


def test_the_search_is_told_by_its_trials(searched):
    aim_run = searched["found"][searched["hashes"][searched["search"]]]
    told = points(aim_run, "objective/val_top1_acc/val")
    assert told.keys() == {1, 2}
    assert told[1] == 50.0
    assert math.isnan(told[2])
    assert points(aim_run, "objective/parameters/val") == {1: 1000, 2: 1001, 3: 1002, 4: 1003}
    assert points(aim_run, "best/val_top1_acc/val") == {n: 90.0 + n for n in (1, 2, 3, 4)}
    assert points(aim_run, "trials/failed/val") == {3: 1, 4: 2}
    assert points(aim_run, "trials/completed/val")[4] == 1
    assert (aim_run["experiment"], aim_run["created"]) == ("search", START)
    assert aim_run["tags"] == ["search:greenhouse", "spring"]
    about = aim_run["attributes"]
    known = runs.read_json(searched["search"] / "search.json")
    assert about["search"] == {
        "id": "greenhouse",
        "state": "completed",
        "objectives": known["objectives"],
        "settings": known["settings"],
    }
    assert about["config"]["search"] == {"algorithm": "tpe"}
    assert about["git"] == {"commit": "0123abc", "dirty": True}
    assert about["versions"] == {"optuna": "5.0"}
    assert about["status"]["best"] == {"val_top1_acc": 94.0}


def test_figures_and_plots_of_the_search(searched):
    objects = searched["found"][searched["hashes"][searched["search"]]]["objects"]
    assert set(objects) == {"pareto/figure", "pareto/image"}
    at, figure = objects["pareto/figure"]
    drawn = runs.read_json(searched["search"] / "figures.json")["pareto"]
    assert (at, json.loads(figure)) == (4, drawn)
    assert objects["pareto/image"] == [4, [["pareto", 7]]]


def test_a_search_is_filled_again_under_its_hash(searched):
    search = searched["search"]
    (search / "figures.json").write_text("{")
    runs.append_records(
        search, [attempt(2, 3), trial_ended(4, "completed", 4, 77.0, attempt=2, best=None)]
    )
    said: list[str] = []
    assert fill(search, searched["repo"], said.append) == searched["hashes"][search]
    assert len(said) == 1
    assert "not all figures of the search" in said[0]
    aim_run = read_aim(searched["repo"], ALL)[searched["hashes"][search]]
    assert points(aim_run, "objective/parameters/val") == {1: 1000, 2: 1001, 3: 1002, 4: 1004}
    assert points(aim_run, "trials/failed/val") == {3: 1, 4: 1}
    assert aim_run["attributes"]["search"]["state"] == "interrupted"


# ------------------------------------------------------------------------------------- what goes wrong
@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """A process that has an AimWriter, follows these folders, and waits."""
    started = []

    def start(repo: Path, folders: list[Path]) -> subprocess.Popen[str]:
        code = (
            "import sys, time; from pathlib import Path; from potstill.tracking import AimWriter\n"
            "writer = AimWriter(Path(sys.argv[1]), print)\n"
            "for folder in sys.argv[2:]: writer.follow(Path(folder))\n"
            "time.sleep(300)"
        )
        command = [sys.executable, "-c", code, str(repo), *map(str, folders)]
        started.append(subprocess.Popen(command, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_after_a_kill_each_run_goes_on_as_itself(tmp_path, driver):
    repo, search = tmp_path / "aim", make_search(tmp_path)
    runs.append_records(search, [attempt(1, 0), trial_ended(0, "completed", 1, 50.0)])
    trials = [make_trial(search, number, whole_journal(2)[:-1]) for number in (1, 2)]
    folders = [search, *trials]
    process = driver(repo, folders)
    wait_for(lambda: all((folder / "aim.json").exists() for folder in folders))
    hashes = [aim_hash(folder) for folder in folders]
    process.send_signal(signal.SIGKILL)
    process.wait()
    # the old child may still be at it; the second trial goes back to its first epoch
    runs.append_records(search, [attempt(2, 1), trial_ended(1, "completed", 2, 60.0, attempt=2)])
    runs.append_records(trials[0], [end("finished")])
    runs.append_records(trials[1], [attempt(2, 8), epoch(2, 2, val_loss=7.0)])
    said: list[str] = []
    writer = AimWriter(repo, said.append)
    for folder in folders:
        writer.follow(folder)
    for folder in trials:
        writer.over(folder)
    writer.follow(trials[1])  # once more: it has a third epoch
    runs.append_records(trials[1], [epoch(3, 2), end("failed", 24, attempt=2)])
    assert writer.close(120) == dict(zip(folders, hashes, strict=True))
    assert said == []
    found = read_aim(repo, ALL)
    assert found.keys() == set(hashes)
    for folder, run_hash in zip(trials, hashes[1:], strict=True):
        records = runs.read_journal(folder)
        for kind, metric, key in (
            ("step", "batch_loss/train", "loss"),
            ("epoch", "loss/val", "val_loss"),
        ):
            expected = [(r["step"], r[key]) for r in records if r["kind"] == kind]
            rows = found[run_hash]["metrics"][metric]
            assert [(at, value) for at, value, *_ in rows] == sorted(expected)
    assert points(found[hashes[0]], "objective/val_top1_acc/val") == {1: 50.0, 2: 60.0}
    states = [found[h]["attributes"]["search"]["state"] for h in hashes]
    assert states == ["interrupted", "completed", "failed"]


def test_a_child_that_dies_is_said_once_and_again_for_what_came_later(tmp_path):
    search = make_search(tmp_path)
    trials = [make_trial(search, number, whole_journal(1)) for number in (0, 1)]
    said: list[str] = []
    writer = AimWriter(tmp_path / "aim", said.append)
    writer.follow(search)
    writer.follow(trials[0])
    assert writer._child is not None
    writer._child.kill()
    wait_for(lambda: said)
    writer.follow(trials[1])
    writer.over(trials[1])
    assert writer.close() == {}
    assert len(said) == 2
    assert f"all of 2 runs, {search} the first of them" in said[0]
    assert "status -9" in said[0]
    assert f"fill(Path('{search}'), Path('{tmp_path / 'aim'}'))" in said[0]
    assert "this run (its process ended with status -9: no message). The" in said[1]
    assert f"from_run={trials[1]} " in said[1]


def test_without_aim_a_search_hears_of_it_at_its_start_and_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said: list[str] = []
    writer = AimWriter(tmp_path, said.append)
    for number in range(3):
        writer.follow(tmp_path / f"trial-{number:04d}")
        writer.over(tmp_path / f"trial-{number:04d}")
    assert len(said) == 1
    assert writer.close() == {}
    assert len(said) == 2
    assert all("Aim is not installed" in line for line in said)
    assert "all of 2 runs" in said[1]
