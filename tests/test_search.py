"""Searches on real Ray, with a model of a few weights: what fails alone, what is stopped, what goes on after a kill."""

from __future__ import annotations

import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import yaml

from conftest import ROOT, tiny_overrides
from potstill import runs, search_tune
from potstill.config import Config, compose, differing_keys, load_run_config
from potstill.errors import Stopped, UserError
from potstill.search import _Search, tune
from potstill.search_plan import Ledger, SearchPlan, config_of_trial, trial_name

SMALL = [
    *("plugins=[search_parts]", "model=plugin", "model._target_=few_weights"),
    *("loop.batch_size=24", "optimizer.lr=1e-2"),
]
LR = {"min": 1e-4, "max": 1e-1, "log": True}


# ---------------------------------------------------------------------------------------------- helpers
@pytest.fixture
def given(tiny_tree: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`given({"space": …}, "loop.epochs=3")`: what is written after jobs/tune.py; the search is in a file of its own."""

    def make(search: dict[str, Any], *overrides: str, folder: str = "runs") -> list[str]:
        about = {"algorithm": "random", "scheduler": "none", **search}
        path = tmp_path / "conf" / "search" / "own.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"search": about}, sort_keys=False, allow_unicode=True)
        path.write_text(f"# @package _global_\n{text}")
        places = tiny_overrides(tiny_tree, cache_dir, tmp_path / folder)
        small = [o for o in places if not o.startswith(("model.", "loop.batch", "optimizer."))]
        return [
            *("--config-dir", str(tmp_path / "conf"), "search=own", "run.name=s"),
            *(*small, *SMALL, *overrides),
        ]

    return make


@pytest.fixture
def config(given, ray_session) -> Callable[..., Config]:
    """The same as a config, for a search in this process, on the tests' Ray."""

    def make(search: dict[str, Any], *overrides: str, folder: str = "runs") -> Config:
        _, conf, *rest = given(search, *overrides, folder=folder)
        return compose("tune", rest, conf)

    return make


def folder_of(config: Config) -> Path:
    return Path(config.runs.dir) / str(config.run.name)


def journal(folder: Path) -> list[dict[str, Any]]:
    """Every record there ever was, superseded ones too."""
    return runs.parse_lines((folder / "journal.jsonl").read_bytes().splitlines())


def trials_of(folder: Path) -> list[Any]:
    found = Ledger.read(folder).trials
    assert sorted(found) == list(range(len(found)))
    return [found[n] for n in sorted(found)]


def counted(folder: Path, kind: str) -> Counter[int]:
    return Counter(r["number"] for r in journal(folder) if r["kind"] == kind)


def epochs_in(run_dir: Path) -> list[int]:
    """The number of every epoch that was ever trained, in order."""
    return [r["epoch"] for r in journal(run_dir) if r["kind"] == "epoch"]


def leaderboard(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "leaderboard.csv", newline="") as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def outcome(folder: Path) -> list[tuple[Any, ...]]:
    """What a search has found, but for when."""
    return [(t.name, t.state, t.point, t.values, t.epochs) for t in trials_of(folder)]


class Driver:
    """A search in a process of its own, with a Ray of its own; whatever it starts can be ended by id."""

    def __init__(self, arguments: list[str], cwd: Path) -> None:
        self.known: dict[int, psutil.Process] = {}
        self.output = open(cwd / f"output-{time.monotonic_ns()}.txt", "w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "jobs" / "tune.py"), *arguments],
            cwd=cwd,
            env={**os.environ, "PYTHONPATH": str(ROOT / "tests")},
            start_new_session=True,
            stdout=self.output,
            stderr=subprocess.STDOUT,
        )

    def wait_for(self, what: Callable[[], Any], timeout_s: float = 240) -> Any:
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if found := what():
                self.remember()
                return found
            assert self.process.poll() is None, f"it ended too early: {self.said()}"
            time.sleep(0.02)
        raise AssertionError(f"it did not come: {self.said()}")

    def remember(self) -> None:
        with suppress(psutil.NoSuchProcess):
            for child in psutil.Process(self.process.pid).children(recursive=True):
                self.known[child.pid] = child

    def kill(self) -> None:
        """-9 to the driver alone, as the kernel would; Ray notices by itself."""
        self.remember()
        self.process.kill()
        self.process.wait()

    def end(self, timeout_s: float = 300) -> int:
        return self.process.wait(timeout_s)

    def said(self) -> str:
        self.output.flush()
        return Path(self.output.name).read_text()

    def clean(self) -> None:
        self.remember()
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for child in self.known.values():
            with suppress(psutil.NoSuchProcess):  # by id and start time: it is not another's
                child.kill()
        self.output.close()


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[Callable[[list[str]], Driver]]:
    started: list[Driver] = []

    def start(arguments: list[str]) -> Driver:
        started.append(Driver(arguments, tmp_path))
        return started[-1]

    yield start
    for one in started:
        one.clean()


# -------------------------------------------------------------------------------------------- killed
@pytest.mark.slow
def test_killed_twice_no_trial_is_lost_or_doubled(given, config, driver, tmp_path):
    """SIGKILL to the driver alone, in the middle of a trial: nothing can be noted then."""
    about = {
        "space": {"optimizer.lr": LR, "model.channels": [2, 4, 8]},
        **{"num_samples": 5, "max_concurrent_trials": 1},
    }
    slow = ("loop.epochs=3", "model.sleep_s=0.7")
    arguments = given(about, *slow)
    folder = tmp_path / "runs" / "s"

    def epochs_of(number: int) -> int:
        path = folder / "trials" / trial_name(number) / "journal.jsonl"
        return path.read_text().count('"kind":"checkpoint"') if path.exists() else 0

    for number in (1, 3):
        process = driver(arguments)
        process.wait_for(lambda n=number: epochs_of(n) >= 2)
        process.kill()
        found = Ledger.read(folder)
        assert [t.number for t in found.ended()] == list(range(number))
        assert [t.number for t in found.unfinished()] == [number]
        assert not (folder / "summary.json").exists()
    last = driver(arguments)
    assert last.end() == 0, last.said()
    assert "Going on: 3 trials have ended, 1 are unfinished" in last.said()
    assert counted(folder, "proposed") == counted(folder, "trial") == dict.fromkeys(range(5), 1)
    assert [r["attempt"] for r in journal(folder) if r["kind"] == "attempt"] == [1, 2, 3]
    for number in range(5):
        epochs = Counter(epochs_in(folder / "trials" / trial_name(number)))
        assert sorted(epochs) == [1, 2, 3]
        assert sum(epochs.values()) <= (4 if number in (1, 3) else 3), "one interval at most"
        attempts = runs.last_attempt(folder / "trials" / trial_name(number))
        assert attempts == (2 if number in (1, 3) else 1)
    summary = runs.read_json(folder / "summary.json")
    assert (summary["status"], summary["completed"], summary["epochs"]) == ("finished", 5, 15)
    whole = tune(config(about, *slow, folder="elsewhere"))
    assert outcome(folder) == outcome(tmp_path / "elsewhere" / "s")
    assert summary["best"] == whole["best"]


def test_a_killed_drivers_folder_is_gone_on_with(config, tmp_path, monkeypatch):
    """As a kill leaves it: a trial that has ended unheard, one in its midst, one that is only written down."""
    about = {"space": {"optimizer.lr": LR, "model.channels": [2, 4]}, "num_samples": 4}
    whole = tune(config(about, "loop.epochs=2", folder="whole"))
    folder, left = tmp_path / "whole" / "s", tmp_path / "left" / "s"
    shutil.copytree(folder, left)
    for file in ("summary.json", "leaderboard.csv"):
        (left / file).unlink()
    lines = (left / "journal.jsonl").read_text().splitlines(keepends=True)
    records = [json.loads(line) for line in lines]
    kept = [
        line
        for line, r in zip(lines, records, strict=True)
        if r["kind"] == "attempt"
        or (r["kind"] == "proposed" and r["number"] < 3)
        or (r["kind"] == "trial" and r["number"] == 0)
    ]
    torn = next(line for line, r in zip(lines, records, strict=True) if r["kind"] == "trial")
    (left / "journal.jsonl").write_text("".join(kept) + torn[:40])
    # 1 has ended, and nobody heard; 2 has done its first epoch of two, and 3 is not there at all
    second = left / "trials" / trial_name(2)
    (second / "summary.json").unlink()
    records = journal(second)
    first = next(i for i, r in enumerate(records) if r["kind"] == "checkpoint")
    checkpoints = sorted((second / "checkpoints").glob("step-*"))
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[1])
    meta = runs.read_json(checkpoints[0] / "meta.json")
    meta["best"] = {**meta["best"], "folder": checkpoints[0].name}
    runs.write_json(checkpoints[0] / "meta.json", meta)
    (second / "journal.jsonl").unlink()
    runs.append_records(second, records[: first + 1])
    shutil.rmtree(left / "trials" / trial_name(3))
    started: list[int] = []
    start = _Search._start
    monkeypatch.setattr(_Search, "_start", lambda s, n: started.append(n) or start(s, n))
    gone_on = tune(config(about, "loop.epochs=2", folder="left"))
    assert started == [2, 3], "1 had nothing left to do"
    assert outcome(left) == outcome(folder)
    assert gone_on["best"] == whole["best"]
    assert counted(left, "proposed") == counted(left, "trial") == dict.fromkeys(range(4), 1)
    assert [epochs_in(left / "trials" / trial_name(n)) for n in range(4)] == [[1, 2]] * 4
    assert [runs.last_attempt(left / "trials" / trial_name(n)) for n in range(4)] == [1, 1, 2, 1]


# ------------------------------------------------------------------------------------- what goes wrong
def test_whatever_a_trial_dies_of_ends_it_alone(config, capsys):
    """It raises, its loss is NaN, it says nothing any more."""
    moods = ["well", "raises", "nan", "well", "hangs"]
    about = {
        "space": {"model.mood": ["well", "raises", "nan", "hangs"], "optimizer.lr": [1e-2, 2e-2]},
        "points": [
            {"model.mood": mood, "optimizer.lr": 2e-2 if place == 3 else 1e-2}
            for place, mood in enumerate(moods)
        ],
    }
    tune(config({**about, "num_samples": 4}, "loop.epochs=2", "scaling.max_failures=1"))
    # only now may silence be short: the first trial of a process has much to import
    last = {**about, "num_samples": 5, "silent_minutes": 0.1}
    chosen = config(last, "loop.epochs=2", "scaling.max_failures=1")
    folder = folder_of(chosen)
    summary = tune(chosen)
    assert (summary["status"], summary["trials"]) == ("finished", 5)
    assert (summary["completed"], summary["failed"], summary["stopped_early"]) == (2, 3, 0)
    trials = trials_of(folder)
    assert [t.state for t in trials] == ["completed", "failed", "failed", "completed", "failed"]
    assert [t.epochs for t in trials] == [2, 0, 0, 2, 0]
    assert trials[1].why == "RuntimeError: this choice cannot be trained"
    assert trials[2].why.startswith("the training loss is nan at step ")
    assert trials[4].why == "it has not finished an epoch for 0.1 minutes (search.silent_minutes)"
    assert [t.feasible for t in trials] == [True, False, False, True, False]
    assert (
        "this choice cannot be trained"
        in (folder / "trials" / "trial-0001" / "error.txt").read_text()
    )
    assert "LossNotFinite" in (folder / "trials" / "trial-0002" / "error.txt").read_text()
    board = leaderboard(folder)
    for trial in trials:
        found = runs.read_json(folder / "trials" / trial.name / "summary.json")
        assert found["status"] == ("finished" if trial.state == "completed" else "failed")
        assert (found["reason"], board[trial.name]["why"]) == (trial.why, trial.why)
        assert board[trial.name]["state"] == trial.state
        assert (board[trial.name]["rank"] == "") == (trial.state == "failed")
    assert summary["best"]["trial"] in ("trial-0000", "trial-0003")
    said = capsys.readouterr().out
    assert "trial-0001 failed after 0 epochs: RuntimeError: this choice cannot be trained" in said
    assert "5 trials (2 completed, 3 failed)" in said


# ------------------------------------------------------------------------------------- going on from another
def test_a_population_goes_on_from_the_better_ones_weights(config):
    """PBT: weights of the donor bit for bit, a learning rate of its own."""
    about = {
        "space": {
            "optimizer.lr": {"min": 1e-6, "max": 1e-1, "log": True},
            "model.channels": [4, 8],
        },
        "points": [
            {"optimizer.lr": lr, "model.channels": c}
            for lr, c in ((5e-2, 8), (1e-6, 4), (1e-6, 8), (2e-6, 4))
        ],
        **{"num_samples": 4, "scheduler": "pbt", "grace_epochs": 1},
        "objectives": ["val_loss"],
    }
    chosen = config(about, "loop.epochs=4", "schedule=constant", "optimizer.name=sgd")
    folder = folder_of(chosen)
    with keeping(folder / "trials", "*/checkpoints/step-*", "*/donated/*/step-*") as keep:
        summary = tune(chosen)
    assert (summary["trials"], summary["failed"]) == (4, 0)
    exploits = [r for r in journal(folder) if r["kind"] == "exploit"]
    assert exploits, "the slow ones must have gone on from others"
    points = {r["number"]: r["point"] for r in journal(folder) if r["kind"] == "proposed"}
    for record in exploits:
        donor, point = points[record["donor"]], record["point"]
        assert point["optimizer.lr"] != donor["optimizer.lr"]
        assert point["model.channels"] == donor["model.channels"], "weights must fit"
        points[record["number"]] = point
    trained = 0
    for number in sorted({r["number"] for r in exploits}):
        run_dir = folder / "trials" / trial_name(number)
        ours = [r for r in exploits if r["number"] == number]
        records = journal(run_dir)
        notes = [r for r in records if r["kind"] == "note" and "'s weights of step" in r["message"]]
        for record, note in zip(ours, notes, strict=True):
            name = trial_name(record["donor"])
            assert note["message"] == f"goes on from {name}'s weights of step {note['step']} (pbt)"
            of_it = [r for r in records if r["attempt"] == note["attempt"]]
            begun = next(r for r in of_it if r["kind"] == "attempt")
            assert begun["resumed_from"] == runs.checkpoint_name(note["step"])
            rates = {r["lr"] for r in of_it if r["kind"] == "step"}
            # nothing is left to train after the donor's last epoch
            assert rates == ({record["point"]["optimizer.lr"]} if note["step"] < 8 else set())
            trained += bool(rates)
            step = runs.checkpoint_name(note["step"])
            adopted = [
                c.model_state()
                for c in keep(f"{run_dir.name}/checkpoints/{step}")
                if c.meta.get("adopted") == name
            ]
            donated = [c.model_state() for c in keep(f"{name}/donated/*/{step}")]
            assert adopted
            assert any(same_weights(a, d) for a in adopted for d in donated)
            if note is notes[-1]:
                newest, _ = runs.newest_checkpoint(run_dir)
                assert newest is not None
                assert newest.step == 8
                unchanged = any(same_weights(newest.model_state(), a) for a in adopted)
                assert unchanged == (note["step"] == 8)
        last = load_run_config(run_dir)
        assert last.optimizer.lr == ours[-1]["point"]["optimizer.lr"]
        assert last.model["channels"] == ours[-1]["point"]["model.channels"]
        assert Ledger.read(folder).trials[number].point == ours[-1]["point"]
    assert trained


def same_weights(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[k], v) for k, v in other.items())


@contextlib.contextmanager
def keeping(folder: Path, *patterns: str) -> Iterator[Callable[[str], list[runs.Checkpoint]]]:
    """A second name for every checkpoint that ever stood there, as older ones are pruned.

    What is yielded takes a pattern, and returns all that has stood at such a place.
    """
    aside, done, numbers = folder.parent / "kept", threading.Event(), itertools.count()
    seen: dict[tuple[str, int], Path] = {}  # by the inode of meta.json, too: a step may come again

    def look() -> None:
        for found in (f for p in patterns for f in folder.glob(f"{p}/meta.json")):
            with suppress(OSError):  # pruned in this moment
                place = str(found.parent.relative_to(folder)), found.stat().st_ino
                if place not in seen:
                    copy = aside / str(next(numbers)) / found.parent.name
                    seen[place] = shutil.copytree(found.parent, copy, copy_function=os.link)

    def watch() -> None:
        while not done.wait(0.01):
            look()

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield lambda pattern: [
            runs.load_checkpoint(copy)
            for (place, _), copy in seen.items()
            if Path(place).match(pattern)
        ]
    finally:
        done.set()
        thread.join()


def test_a_trial_that_comes_by_a_step_again_donates_what_it_is_now(tmp_path, monkeypatch):
    """After it went on from another's weights; and what it has just donated is never the one that is removed."""
    monkeypatch.setattr(search_tune, "DONORS_KEPT", 2)
    progress = {"best": {"metric": "val_loss"}}

    def donated(step: int, value: float, attempt: int) -> float:
        shutil.rmtree(tmp_path / "checkpoints", ignore_errors=True)
        weights = {"w": torch.full((2,), value)}
        meta = {"epoch": step, "epoch_done": True, "best": None}
        kept = runs.save_checkpoint(tmp_path, step, weights, {"progress": progress}, meta)
        folder = search_tune._TrialFolder(tmp_path).donated(kept, attempt)
        assert folder.name == kept.folder.name
        return float(runs.load_checkpoint(folder).model_state()["w"][0])

    assert [donated(step, step, 1) for step in (2, 4, 6)] == [2, 4, 6]
    assert [donated(step, 10 + step, 2) for step in (2, 4)] == [12, 14]
    assert len(list(tmp_path.glob("donated/*/step-*"))) == 2


# ------------------------------------------------------------------------------------- impossible spaces
def test_an_impossible_space_starts_nothing_and_says_why(config, capsys):
    about = {"space": {"optimizer.lr": LR}, "constraints": ["parameters <= 10"], "num_samples": 2}
    chosen = config(about)
    folder = folder_of(chosen)
    with pytest.raises(
        UserError,
        match=r"300 proposals in a row were refused, the last one for its constraint: parameters <= 10; widen",
    ):
        tune(chosen)
    assert not (folder / "trials").exists()
    kinds = Counter(r["kind"] for r in journal(folder))
    assert kinds == {"attempt": 1, "refused": 300, "end": 1}
    assert journal(folder)[-1]["status"] == "failed"
    assert runs.read_json(folder / "summary.json")["best"] is None


# -------------------------------------------------------------------------------------------- schedulers
def points_of(*rates: float) -> dict[str, Any]:
    low = {"min": 1e-6, "max": 1.0, "log": True}
    return {"space": {"optimizer.lr": low}, "points": [{"optimizer.lr": r} for r in rates]}


@pytest.mark.slow
def test_asha_judges_by_what_earlier_starts_have_seen(config):
    """Going on with a higher number: a bad trial is stopped at the first rung, though its scheduler is new."""
    about = {
        **points_of(5e-2, 1e-6, 2e-6, 1e-1),
        **{
            "objectives": ["val_loss"],
            "scheduler": "asha",
            "reduction": 2,
            "max_concurrent_trials": 1,
        },
    }
    first = tune(config({**about, "num_samples": 1}, "loop.epochs=3"))
    assert (first["trials"], first["completed"]) == (1, 1)
    chosen = config({**about, "num_samples": 4}, "loop.epochs=3")
    folder = folder_of(chosen)
    summary = tune(chosen)
    assert (summary["status"], summary["trials"]) == ("finished", 4)
    trials = trials_of(folder)
    assert [t.state for t in trials[:3]] == ["completed", "stopped early", "stopped early"]
    assert [t.epochs for t in trials[:3]] == [3, 1, 1]
    assert trials[1].why == "asha stopped it after 1 epochs"
    assert all(t.feasible and math.isfinite(t.values["val_loss"]) for t in trials)
    assert summary["stopped_early"] == sum(t.state == "stopped early" for t in trials) >= 2
    assert [r["attempt"] for r in journal(folder) if r["kind"] == "attempt"] == [1, 2]
    assert (
        runs.read_json(folder / "trials" / "trial-0001" / "summary.json")["status"]
        == "stopped_early"
    )


@pytest.mark.slow
@pytest.mark.parametrize("scheduler", ["hyperband", "median"])
def test_other_schedulers_come_to_an_end(config, scheduler):
    about = {
        **points_of(5e-2, 1e-6, 1e-1, 2e-6, 1e-2),
        **{"objectives": ["val_loss"], "scheduler": scheduler, "num_samples": 5},
    }
    chosen = config(about, "loop.epochs=3")
    folder = folder_of(chosen)
    summary = tune(chosen)
    assert (summary["status"], summary["trials"], summary["failed"]) == ("finished", 5, 0)
    assert counted(folder, "proposed") == counted(folder, "trial") == dict.fromkeys(range(5), 1)
    trials = trials_of(folder)
    assert {t.state for t in trials} <= {"completed", "stopped early"}
    for trial in trials:
        assert sorted(epochs_in(folder / "trials" / trial.name)) == list(range(1, trial.epochs + 1))
        assert (trial.state == "completed") == (trial.epochs == 3)
    assert summary["best"]["trial"] in ("trial-0000", "trial-0002")


# -------------------------------------------------------------------------------------- what it costs
@pytest.mark.slow
def test_latency_is_measured_once_an_architecture_while_nothing_runs(config, monkeypatch):
    """Too many architectures to list: each is timed when it is proposed, and waits until no trial runs."""
    beside: list[int] = []
    time_it = SearchPlan.time

    def watched(plan, trained, device):
        beside.extend(len(o.live) for o in search_tune._OWNERS.values())
        time_it(plan, trained, device)

    monkeypatch.setattr(SearchPlan, "time", watched)
    about = {
        "space": {
            "model.channels": {"min": 2, "max": 200, "step": 1},
            "optimizer.lr": [1e-2, 3e-2],
        },
        "points": [
            {"model.channels": c, "optimizer.lr": lr} for c, lr in ((4, 1e-2), (4, 3e-2), (8, 1e-2))
        ],
        "conditions": ["model.channels <= 8"],
        "constraints": ["parameters <= 300", "latency_ms <= 1e5", "val_top1_acc >= 0"],
        **{"objectives": ["val_top1_acc", "parameters", "latency_ms"], "num_samples": 3},
    }
    chosen = config(about, "loop.epochs=1")
    folder = folder_of(chosen)
    summary = tune(chosen)
    assert (summary["completed"], summary["trials"]) == (3, 3)
    assert beside == [0, 0], "two architectures, each timed alone"
    timed = runs.read_json(folder / "latency.json")
    assert len(timed) == 2
    trials = trials_of(folder)
    values = [t.values for t in trials]
    assert [v["parameters"] for v in values] == [4 * 28 + 20, 4 * 28 + 20, 8 * 28 + 36]
    assert values[0]["latency_ms"] == values[1]["latency_ms"]
    for name in ("latency_ms", "latency_ms_batch"):
        assert {v[name] for v in values} == {t[name] for t in timed.values()}
        assert all(v[name] > 0 for v in values)
    assert [t.point["model.channels"] for t in trials] == [4, 4, 8], "the known good first"
    assert set(Ledger.read(folder).sources.values()) == {"given"}
    names = sorted(f.stem for f in (folder / "experiment").iterdir())
    assert names == ["best", *(f"pareto-{i + 1}" for i in range(len(summary["pareto"])))]


# ------------------------------------------------------------------------------------- stopped, gone on
def interrupt_when(what: Callable[[], bool]) -> Any:
    """Ctrl-C as soon as this holds."""
    import threading

    def interrupt() -> None:
        until = time.monotonic() + 240
        while time.monotonic() < until:
            if what():
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.05)

    thread = threading.Thread(target=interrupt, daemon=True)
    thread.start()
    return thread


def test_ctrl_c_says_the_best_so_far_and_the_same_command_goes_on(config, capsys):
    about = {
        "space": {"optimizer.lr": [1e-2, 2e-2, 5e-2], "model.channels": [2, 4, 8]},
        **{"num_samples": 3, "max_concurrent_trials": 1},
        **{"points": [{"optimizer.lr": 1e-2, "model.channels": c} for c in (2, 4, 8)]},
    }
    chosen = config(about, "loop.epochs=3", "model.sleep_s=0.4")
    folder = folder_of(chosen)
    second = folder / "trials" / "trial-0001" / "journal.jsonl"
    thread = interrupt_when(lambda: second.exists() and '"kind":"checkpoint"' in second.read_text())
    with pytest.raises(Stopped, match=r"^stopped; the same command goes on from here$"):
        tune(chosen)
    thread.join()
    said = capsys.readouterr().out
    assert "Best: trial-0000" in said
    summary = runs.read_json(folder / "summary.json")
    assert (summary["status"], summary["completed"], summary["trials"]) == ("stopped", 1, 2)
    assert [t.state for t in trials_of(folder)] == ["completed", "waiting"]
    summary = tune(chosen)
    assert (summary["status"], summary["completed"]) == ("finished", 3)
    assert counted(folder, "proposed") == counted(folder, "trial") == dict.fromkeys(range(3), 1)
    epochs = epochs_in(folder / "trials" / "trial-0001")
    assert sorted(set(epochs)) == [1, 2, 3]
    assert len(epochs) <= 4
    ends = [(r["status"], r["reason"]) for r in journal(folder) if r["kind"] == "end"]
    assert ends == [("stopped", "stopped"), ("finished", "")]
    again = tune(chosen)  # all is done: it is only read
    assert (again["status"], again["best"]) == ("finished", summary["best"])
    assert len(journal(folder / "trials" / "trial-0002")) == len(
        runs.read_journal(folder / "trials" / "trial-0002")
    )


@pytest.mark.slow
def test_when_its_hours_are_over_it_stops_and_goes_on(config):
    about = {"space": {"optimizer.lr": [1e-2]}, "num_samples": 1}
    slow = ("loop.epochs=2", "model.sleep_s=0.2")
    with pytest.raises(
        Stopped, match=r"^search\.max_hours=1e-09 is over; the same command goes on"
    ):
        tune(config({**about, "max_hours": 1e-9}, *slow))
    chosen = config(about, *slow)
    assert [t.state for t in trials_of(folder_of(chosen))] in ([], ["waiting"])
    summary = tune(chosen)
    assert (summary["status"], summary["completed"], summary["trials"]) == ("finished", 1, 1)


# -------------------------------------------------------------------------------------------- winners
@pytest.mark.slow
def test_winners_are_trained_at_full_length_over_seeds(config):
    note = r"a \${loop.epochs} b – été"  # as YAML writes text that is no interpolation
    about = {
        "space": {"optimizer.lr": [1e-2, 5e-2], "model.note": [note]},
        "points": [{"optimizer.lr": lr, "model.note": note} for lr in (1e-2, 5e-2)],
        **{"num_samples": 2, "epochs": 1, "retrain_best": 1, "seeds": [3, 5]},
    }
    chosen = config(about, "loop.epochs=2")
    folder = folder_of(chosen)
    summary = tune(chosen)
    (winner,) = runs.read_json(folder / "winners.json")
    assert summary["winners"] == [winner]
    assert winner["trial"] == summary["best"]["trial"]
    assert winner["seeds"] == [3, 5]
    assert len(winner["values"]["val_top1_acc"]) == 2
    assert winner["in_the_search"]["val_top1_acc"] == summary["best"]["val_top1_acc"]
    trial = config_of_trial(folder, int(winner["trial"][-4:]))
    for name, seed, value in zip(
        winner["runs"], (3, 5), winner["values"]["val_top1_acc"], strict=True
    ):
        run_dir = folder.parent / name
        trained = load_run_config(run_dir)
        assert differing_keys(trial, trained) == [
            "augment.seed: None -> 0",
            "loop.epochs: 1 -> 2",
            f"loop.seed: 0 -> {seed}",
        ]
        assert trained.model["note"] == "a ${loop.epochs} b – été"
        found = runs.read_json(run_dir / "summary.json")
        assert (found["status"], found["epochs"]) == ("finished", 2)
        assert found["best_metrics"]["val_top1_acc"] == value
    assert f"| {winner['trial']} |" in (folder / "winners.md").read_text()
    places = [f"runs.dir={folder.parent}", f"cache.dir={chosen.cache.dir}", "tracking=none"]
    best = compose("train", ["experiment=best", *places], str(folder))
    assert differing_keys(trial, best) == ["loop.epochs: 1 -> 2"]
    tune(chosen)
    assert [runs.last_attempt(folder.parent / n) for n in winner["runs"]] == [1, 1]


# ------------------------------------------------------------------------------------------------ Aim
def states_in(repo: Path, name: str) -> list[list[str]]:
    from test_tracking_search import ask

    states = [f"run.search.state == '{s}'" for s in ("completed", "failed", "interrupted")]
    return ask(repo, f"'search:{name}' in run.tags or run.experiment == 'search'", *states)


def test_every_trial_and_the_search_are_in_aim(config, tmp_path):
    about = {
        "space": {"model.mood": ["well", "raises"]},
        "points": [{"model.mood": m} for m in ("well", "raises", "well")],
        "num_samples": 3,
    }
    chosen = config(about, "loop.epochs=1", "tracking=aim", f"tracking.repo={tmp_path / 'aim'}")
    tune(chosen)
    trials = [trial_name(n) for n in range(3)]
    assert states_in(tmp_path / "aim", "s") == [
        ["s", *trials],
        ["s", trials[0], trials[2]],
        [trials[1]],
        [],
    ]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_stopped_by_a_signal_and_gone_on_with_each_is_one_run_in_aim(
    given, driver, tmp_path, number
):
    about = {"space": {"optimizer.lr": LR}, "num_samples": 3, "max_concurrent_trials": 1}
    aim = tmp_path / "aim"
    arguments = given(
        about, "loop.epochs=3", "model.sleep_s=0.5", "tracking=aim", f"tracking.repo={aim}"
    )
    folder = tmp_path / "runs" / "s"
    second = folder / "trials" / "trial-0001" / "journal.jsonl"
    process = driver(arguments)
    process.wait_for(lambda: second.exists() and '"kind":"checkpoint"' in second.read_text())
    process.process.send_signal(number)
    assert process.end() == 130, process.said()
    assert "Best: trial-0000" in process.said()
    assert "Traceback" not in process.said()
    assert process.said().strip().endswith("stopped; the same command goes on from here")
    kept = {f.parent.name: runs.read_json(f)["run"] for f in folder.rglob("aim.json")}
    assert set(kept) == {"s", "trial-0000", "trial-0001"}
    last = driver(arguments)
    assert last.end() == 0, last.said()
    now = {f.parent.name: runs.read_json(f)["run"] for f in folder.rglob("aim.json")}
    trials = [trial_name(n) for n in range(3)]
    assert set(now) == {"s", *trials}
    assert now | kept == now, "each goes on as itself"
    assert states_in(aim, "s") == [["s", *trials], ["s", *trials], [], []]


# ------------------------------------------------------------------------------------- by command line
def test_by_command_line_a_mistake_is_one_message(given, driver):
    process = driver(given({"space": {"data.split.val": {"min": 0.1, "max": 0.3}}}))
    assert process.end() == 2
    (line,) = process.said().strip().splitlines()
    assert line.startswith("error: search.space may choose among at most 16 sets of data.*")


# ------------------------------------------------------------------------------------ several workers
@pytest.mark.slow
def test_a_trial_of_two_workers_reports_every_epoch(config):
    about = {"space": {"optimizer.lr": [1e-2, 2e-2]}, "num_samples": 1, "scheduler": "asha"}
    chosen = config(about, "loop.epochs=2", "scaling.num_workers=2", "scaling.use_gpu=false")
    folder = folder_of(chosen)
    heard: list[int] = []
    hear = _Search.heard
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            _Search, "heard", lambda s, n, r: heard.append(r.get("epoch")) or hear(s, n, r)
        )
        summary = tune(chosen)
    assert (summary["completed"], summary["failed"]) == (1, 0), trials_of(folder)[0].why
    assert [e for e in heard if e] == [1, 2]
    records = journal(folder / "trials" / "trial-0000")
    assert [r["world_size"] for r in records if r["kind"] == "attempt"] == [2]
    assert epochs_in(folder / "trials" / "trial-0000") == [1, 2]


def test_trials_on_nodes_that_do_not_see_the_runs(config, monkeypatch, tmp_path):
    """As on hosts with disks of their own: all that a trial writes goes by the driver's node, and comes back from it."""
    from potstill import search_tune
    from potstill.handover import Mark

    about = {"space": {"optimizer.lr": [1e-3, 1e-2]}, "num_samples": 2}
    near, far = config(about, "run.name=near"), config(about, "run.name=far")
    tune(near)
    unseen = contextlib.nullcontext(Mark("nowhere", ".seen"))
    monkeypatch.setattr(search_tune, "marked", lambda _: unseen)
    summary = tune(far)
    assert (summary["trials"], summary["failed"]) == (2, 0)
    told = [
        [runs.history(journal(folder_of(c) / "trials" / trial_name(n))) for n in range(2)]
        for c in (near, far)
    ]
    assert told[0] == told[1]
    kept, _ = runs.newest_checkpoint(folder_of(far) / "trials" / trial_name(1))
    assert kept is not None


def test_a_population_whose_members_do_not_see_the_runs_is_refused(config, monkeypatch):
    """Tune itself wants the weights that trials exchange where all nodes see them."""
    from potstill import search_tune
    from potstill.handover import Mark

    unseen = contextlib.nullcontext(Mark("nowhere", ".seen"))
    monkeypatch.setattr(search_tune, "marked", lambda _: unseen)
    rates = {"optimizer.lr": {"min": 1e-4, "max": 1e-1, "log": True}}
    chosen = config({"space": rates, "num_samples": 2, "scheduler": "pbt"}, "run.name=unseen")
    assert tune(chosen)["failed"] == 2
    for number in range(2):
        end = journal(folder_of(chosen) / "trials" / trial_name(number))[-1]
        assert "use storage that all nodes mount" in end["reason"]
