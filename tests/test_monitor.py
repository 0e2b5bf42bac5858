"""What the monitor tells, against real runs, a real search and a real cluster; only hardware and its failures are fake."""

from __future__ import annotations

import copy
import fcntl
import io
import json
import os
import pty
import random
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import termios
import threading
import time
import urllib.error
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from email.message import Message
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import psutil
import pynvml
import pytest
import yaml
from rich.text import Text

import clusters
from conftest import ROOT, run_job, tiny_overrides
from potstill import fit, monitor, monitor_machine, monitor_ray, monitor_runs, monitor_view, runs
from potstill.control_groups import Groups
from potstill.errors import UserError
from potstill.monitor import SCHEMA, Monitor, Options
from potstill.monitor_machine import Gpus, Machine, Owners, look_at_cache, look_at_disks
from potstill.monitor_ray import RayWatch, checked_address
from potstill.monitor_runs import RunJournal, RunsFolder, _Lock, seconds_left
from potstill.monitor_view import as_ascii, render
from synthetic_runs import attempt, epoch, make_run, step, whole_journal

SLOW_MODEL = ["plugins=[search_parts]", "model=plugin", "model._target_=few_weights"]


# --------------------------------------------------------------------------------------------- helpers
@pytest.fixture(scope="session")
def valid() -> Callable[[Any], Any]:
    """`valid(told)`: as the schema has it, and told back."""
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)

    def check(told: Any) -> Any:
        validator.validate(told)
        return told

    return check


@pytest.fixture(autouse=True)
def _no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)


@pytest.fixture
def said(tmp_path: Path, monkeypatch, capsys) -> Iterator[Callable[..., str]]:
    """`said("--all")`: what the command prints with --once, given this test's folders."""
    monkeypatch.chdir(tmp_path)
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*arguments: str) -> str:
        given = ["--runs", str(tmp_path / "runs"), "--cache", str(tmp_path / "cache")]
        capsys.readouterr()
        status = monitor.command(["--once", *given, *arguments], None)
        out, err = capsys.readouterr()
        assert (status, err) == (0, "")
        return out

    yield run
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def once(valid, said) -> Callable[..., Any]:
    """`once("--all")`: what --once --json tells."""
    return lambda *arguments: valid(json.loads(said("--json", *arguments)))


def write(path: Path, records: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    runs.append_records(path.parent, records)


def now_run(root: Path, name: str, steps: int = 11, ahead_s: float = 0.0, **changes: Any) -> Path:
    """A run of three epochs of eight updates, a second each, that has come to update `steps` just now.

    `ahead_s`: what the clock of the machine that trains is before ours.
    """
    began = time.time() - steps + ahead_s
    about = {"total_steps": 24, "parameters": 10, "monitor": "val_top1_acc", "pid": os.getpid()}
    about |= {"host": socket.gethostname(), **changes}
    records = [{**attempt(**about), "time": began}]
    for at in range(1, steps + 1):
        records.append({**step(at), "time": began + at})
        if at % 8 == 0:
            last = {"total_seconds": float(at), "seconds": 8.0, "seconds_left": 24.0 - at}
            records.append({**epoch(at // 8, **last), "time": began + at})
    return make_run(root, records, name=name)


@contextmanager
def under_way(root: Path, name: str, steps: int = 11, **changes: Any) -> Iterator[Path]:
    """As now_run, and this process holds it."""
    with runs.lock(root / name):
        yield now_run(root, name, steps, **changes)


def in_state(folder: RunsFolder) -> dict[str, str]:
    folder.look()
    return {name: one.state for name, one in folder.watched.items()}


# ---------------------------------------------------------------------------------------------- schema
def test_the_schema_says_all_there_is_and_what_it_means():
    """Every object names all that it holds and nothing else; every value that is no reference is described."""
    schema = json.loads(SCHEMA.read_text())

    def every(node: Any, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
        if isinstance(node, dict):
            if "type" in node or "anyOf" in node or "$ref" in node:
                yield name, node
            for key, value in node.items():
                yield from every(value, f"{name}.{key}")
        elif isinstance(node, list):
            for value in node:
                yield from every(value, name)

    for name, node in every(schema, ""):
        if node.get("type") == "object":
            assert "additionalProperties" in node, name
            if "properties" in node and not name.endswith(".counts"):
                assert sorted(node["required"]) == sorted(node["properties"]), name
        for key, value in node.get("properties", {}).items():
            described = value.get("description") or value.get("$ref") == "#/$defs/state"
            assert described or name.endswith(".counts"), f"{name}: {key}"
            if key.endswith("_bytes") or key == "bytes":
                assert "bytes" in value.get("$ref", "") or name.endswith(".process"), (
                    f"{name}: {key}"
                )


# -------------------------------------------------------------------------------------------- journals
def any_journal(rng: random.Random) -> list[dict[str, Any]]:
    """Attempts that take over from each other, with orphans of earlier ones that go on writing, and warnings."""
    records, at = [], 0
    for number in range(1, rng.randint(2, 5)):
        at = rng.randint(0, at)
        records.append(attempt(number, at))
        for _ in range(rng.randint(0, 30)):
            at += 1
            writer = number if rng.random() < 0.9 else rng.randint(1, number)
            records.append(step(at, writer))
            if rng.random() < 0.1:
                warning = {"name": "odd", "message": str(rng.randint(0, 3))}
                records.append({**step(at, writer), "kind": "warning", **warning})
            if at % 8 == 0:
                said = [{"name": "flat", "message": "again"}] if rng.random() < 0.5 else []
                best = rng.random() < 0.5
                records.append(epoch(at // 8, writer, warnings=said, best=best))
        if rng.random() < 0.5:
            end = {"kind": "end", "status": "stopped", "reason": "", "best": None}
            records.append({**end, "attempt": number, "step": at, "time": 1.0})
    return records


@pytest.mark.parametrize("seed", range(40))
def test_a_journal_read_in_pieces_says_what_the_run_itself_reads(seed, tmp_path, monkeypatch):
    rng = random.Random(seed)
    monkeypatch.setattr(RunJournal, "CHUNK", rng.choice([64, 700, 2**20]))
    text = b"".join(json.dumps(r, separators=(",", ":")).encode() + b"\n" for r in any_journal(rng))
    path, read = tmp_path / "journal.jsonl", 0
    journal = RunJournal(path)
    while read < len(text):
        part = text[read : read + rng.randint(1, 2000)]
        read += len(part)
        with open(path, "ab") as file:
            file.write(part)
        journal.read()
    records = runs.read_journal(tmp_path)
    epochs = [r for r in records if r["kind"] == "epoch"]
    assert sorted(journal.epochs) == sorted(r["step"] for r in epochs)
    for record in epochs:
        kept = journal.epochs[record["step"]]
        assert kept["attempt"] == record["attempt"]
        assert kept["values"]["val_loss"] == record["val_loss"]
        assert kept["best"] == record["best"]
    assert journal.end == next((r for r in records if r["kind"] == "end"), None)
    assert journal.number == runs.last_attempt(tmp_path)
    steps = [r["step"] for r in records if r["kind"] == "step" and r["attempt"] == journal.number]
    if steps:
        assert journal.step["step"] == steps[-1]
    said = {(w["name"], w["message"]) for w in fit._warnings(records)}
    assert {(w["name"], w["message"]) for w in journal.warnings()} == said
    assert journal.unread == 0


def test_a_torn_line_waits_a_damaged_one_is_counted_and_a_new_file_is_read_anew(tmp_path):
    path = tmp_path / "journal.jsonl"
    journal = RunJournal(path)
    journal.read()
    assert not journal.begun
    whole = json.dumps(step(2)).encode()
    write(path, [attempt(), step(1)])
    with open(path, "ab") as file:
        file.write(
            b'\xff\xfe{no json\n{"kind":"epoch"}\n[1,2]\n{"kind":"step","attempt":{}}\n'
            + whole[:20]
        )
    journal.read()
    assert (journal.step["step"], journal.unread) == (1, 4)
    with open(path, "ab") as file:
        file.write(whole[20:] + b"\n")
    journal.read()
    assert (journal.step["step"], journal.unread) == (2, 4)
    path.unlink()
    write(path, [attempt(), step(1)])
    journal.read()
    assert (journal.step["step"], journal.unread) == (1, 0)
    other = tmp_path / "other"
    write(
        other / "journal.jsonl", [attempt(epochs=300), *(step(at) for at in range(1, 6)), epoch(1)]
    )
    os.replace(other / "journal.jsonl", path)  # longer than what was there, and another
    journal.read()
    assert (journal.step["step"], journal.unread, sorted(journal.epochs)) == (5, 0, [8])


def test_weights_that_were_taken_over_bring_their_epoch_and_the_late_one_of_before_is_none(
    tmp_path,
):
    taken = epoch(1, 2, val_loss=0.1)
    journal = a_journal(tmp_path, attempt(), attempt(2, 8), taken, epoch(1, val_loss=0.9))
    (kept,) = [r for r in runs.read_journal(tmp_path) if r["kind"] == "epoch"]
    assert journal.epochs[8]["values"]["val_loss"] == kept["val_loss"] == 0.1


def test_a_long_journal_costs_nothing_twice(tmp_path, monkeypatch):
    path = tmp_path / "journal.jsonl"
    write(path, [attempt(epochs=5000), *(step(at) for at in range(1, 40_000))])
    journal, parsed = RunJournal(path), []
    whole = runs.parse_lines

    def counted(lines):
        lines = list(lines)
        parsed.extend(lines)
        return whole(lines)

    monkeypatch.setattr(runs, "parse_lines", counted)
    journal.read()
    assert journal.step["step"] == 39_999
    assert len(parsed) < 10  # of forty thousand lines
    write(path, [step(40_000)])
    read: list[int] = []
    real = open

    def spied(*arguments, **options):
        file = real(*arguments, **options)
        with suppress(OSError):
            file.seek(0, 2)
            read.append(file.tell())
        return file

    parsed.clear()
    monkeypatch.setattr("builtins.open", spied)
    journal.read()
    assert journal.step["step"] == 40_000
    assert len(parsed) == 1
    read.clear()
    journal.read()
    assert read == []  # nothing new: the file is not even opened


def a_journal(tmp_path: Path, *records: dict[str, Any]) -> RunJournal:
    write(tmp_path / "journal.jsonl", list(records))
    journal = RunJournal(tmp_path / "journal.jsonl")
    journal.read()
    return journal


def timed(record: dict[str, Any], at: float, **changes: Any) -> dict[str, Any]:
    return {**record, "time": float(at), **changes}


def test_time_left_is_the_journals_own_mended_by_the_pace_since(tmp_path):
    begun = timed(attempt(epochs=4), 100)
    journal = a_journal(tmp_path, begun)
    assert seconds_left(journal, 105) is None
    write(journal.path, [timed(step(4), 120)])  # 5 s an update
    journal.read()
    assert seconds_left(journal, 120) == pytest.approx(5 * 28)
    assert seconds_left(journal, 130) == pytest.approx(5 * 28 - 10)
    # the epoch's updates took 40 s, measuring 4 s; three such are to come
    last = {"seconds": 44.0, "seconds_left": 132.0, "total_seconds": 44.0}
    write(journal.path, [timed(step(8), 140), timed(epoch(1), 144, **last)])
    journal.read()
    assert seconds_left(journal, 144) == pytest.approx(132)
    assert seconds_left(journal, 150) == pytest.approx(126)
    # half of the next epoch at twice the pace of before: (2.5 + 5) / 2 s an update from now on
    write(journal.path, [timed(step(12), 154)])
    journal.read()
    pace = 3.75
    expected = pace * 4 + 4 + 2 * (pace * 8 + 4)
    assert seconds_left(journal, 154) == pytest.approx(expected)
    assert seconds_left(journal, 1e9) == 0.0
    # a night's pause between two attempts is no pace
    write(journal.path, [timed(attempt(2, 8, epochs=4), 50_000), timed(step(12, 2), 50_010)])
    journal.read()
    assert seconds_left(journal, 50_010) == pytest.approx(expected)


def test_the_first_updates_start_up_is_no_pace(tmp_path):
    """A minute of compiling, then a second an update."""
    journal = a_journal(tmp_path, timed(attempt(), 100), timed(step(2), 160))
    assert seconds_left(journal, 160) == pytest.approx(30 * 22)
    write(journal.path, [timed(step(4), 162)])
    journal.read()
    assert seconds_left(journal, 162) == pytest.approx(20)
    assert seconds_left(journal, 165) == pytest.approx(17)
    write(journal.path, [timed(attempt(2, 4), 200), timed(step(6, 2), 260)])
    journal.read()
    assert seconds_left(journal, 260) == pytest.approx(30 * 18)


def test_a_stage_that_its_patience_has_ended_is_not_waited_for(tmp_path):
    """Ten epochs and four: the first stage ends after the second of its ten."""
    stages = [{"name": "heads", "epochs": 10}, {"name": "all", "epochs": 4}]
    last = {"seconds": 8.0, "total_seconds": 16.0, "seconds_left": 12 * 8.0}
    begun = timed(attempt(epochs=14, stages=stages), 100)
    journal = a_journal(tmp_path, begun, timed(step(16), 116), timed(epoch(2), 116, **last))
    assert (journal.epochs_in_all, journal.stage, seconds_left(journal, 116)) == (14, 1, 96)
    stage = {"kind": "stage", "attempt": 1, "step": 16, "stage": 2, "stages": 2, "epoch": 2}
    write(journal.path, [timed(stage, 116)])
    journal.read()
    assert (journal.epochs_in_all, journal.stage, seconds_left(journal, 116)) == (6, 2, 32)
    write(journal.path, [timed(step(20), 120)])
    journal.read()
    assert (journal.position(), seconds_left(journal, 120)) == ((2, 4), pytest.approx(28))
    # who takes over from before the stage has not begun it
    write(journal.path, [timed(attempt(2, 12, epochs=14, stages=stages), 130)])
    journal.read()
    assert (journal.epochs_in_all, journal.stage) == (14, 1)


def test_updates_that_a_guarded_weight_took_back_do_not_count(tmp_path):
    """The loop counts them on, and begins the epoch anew."""
    began = time.time() - 21
    records = [timed(attempt(), began), *(timed(step(at), began + at) for at in range(1, 14))]
    records.insert(9, timed(epoch(1, seconds=8.0, total_seconds=8.0, seconds_left=16.0), began + 8))
    again = [{**step(at), "epoch": 2, "epoch_step": at - 13} for at in range(14, 22)]
    with runs.lock(tmp_path / "runs" / "oaks"):
        records += [timed(r, began + r["step"]) for r in again]
        make_run(tmp_path / "runs", records)
        (seen,) = Monitor(Options(runs=[str(tmp_path / "runs")])).look()["runs"]
    assert (seen["epoch"], seen["epoch_step"], seen["step"], seen["progress"]) == (2, 8, 16, 2 / 3)
    assert 4 < seen["left_s"] <= 8


@pytest.mark.parametrize("ahead_s", [-5000.0, 0.0, 5000.0])
def test_the_clock_of_the_machine_that_trains_may_be_another(ahead_s, tmp_path):
    """Records carry its time, and what is told of it goes by when they came."""
    with under_way(tmp_path / "runs", "oaks", ahead_s=ahead_s):
        (seen,) = Monitor(Options(runs=[str(tmp_path / "runs")])).look()["runs"]
    assert (seen["state"], seen["silent"]) == ("running", False)
    assert seen["left_s"] == pytest.approx(13, abs=6)
    assert seen["elapsed_s"] == pytest.approx(11, abs=6)


# ------------------------------------------------------------------------------------ locks and states
def test_a_lock_is_asked_as_seldom_as_can_be(tmp_path, monkeypatch):
    lock = _Lock(tmp_path / ".lock")
    assert lock.held() is False
    with runs.lock(tmp_path):
        assert lock.held() is True
        assert lock.owner() == os.getpid()
    assert lock.held() is False
    long_ago = time.time() - 60
    os.utime(tmp_path / ".lock", (long_ago, long_ago))
    assert lock.held() is False
    with monkeypatch.context() as patch:
        # who takes it now meets nobody: it is only looked at
        patch.setattr(
            fcntl, "flock", lambda *_: pytest.fail("asked again, though nobody wrote to it")
        )
        assert lock.held() is False
    with runs.lock(tmp_path):
        assert lock.held() is True


def test_each_state_is_told_from_journal_and_lock(tmp_path):
    root = tmp_path / "runs"
    folder = RunsFolder(str(root))
    assert in_state(folder) == {}
    assert list(folder.chosen(time.time(), True)) == []
    with runs.lock(root / "oaks"):
        assert in_state(folder) == {"oaks": "starting"}
        write(root / "oaks" / "journal.jsonl", [{**attempt(), "time": time.time()}])
        assert in_state(folder) == {"oaks": "running"}
        end = {"kind": "end", "attempt": 1, "step": 24, "time": time.time()}
        write(root / "oaks" / "journal.jsonl", [{**end, "status": "finished", "reason": ""}])
        assert in_state(folder) == {"oaks": "finishing"}
    assert in_state(folder) == {"oaks": "finished"}
    make_run(root, whole_journal()[:-1], name="gone")
    make_run(root, [], name="empty")
    (root / ".aim").mkdir()
    (root / "notes").mkdir()
    assert in_state(folder) == {"oaks": "finished", "gone": "interrupted", "empty": "not_started"}
    counts = folder.counts()
    assert (counts["finished"], counts["interrupted"], counts["not_started"]) == (1, 1, 1)
    # it broke off years ago; what ended while somebody watched stays in view
    assert [one.folder.name for one in folder.chosen(time.time(), False)] == ["oaks"]
    os.utime(root / "gone" / "journal.jsonl", (time.time() - 60,) * 2)
    with runs.lock(root / "gone"):
        assert in_state(folder)["gone"] == "starting"  # again; its journal is of before
    shutil.rmtree(root / "gone")
    assert "gone" not in in_state(folder)


def test_what_is_over_is_looked_at_seldom_and_at_once_when_its_folder_changes(
    tmp_path, monkeypatch
):
    root, looked = tmp_path / "runs", []
    look = monitor_runs.Run.look
    monkeypatch.setattr(
        monitor_runs.Run, "look", lambda run: (looked.append(run.folder.name), look(run))
    )
    for name in ("a", "b", "c"):
        make_run(root, whole_journal(), name=name)
    folder = RunsFolder(str(root))

    def at(now_s: float) -> list[str]:
        looked.clear()
        monkeypatch.setattr(time, "monotonic", lambda: now_s)
        folder.look()
        return sorted(looked)

    with under_way(root, "d"):
        assert at(100) == ["a", "b", "c", "d"]
        assert at(102) == ["d"]
        (root / "b" / "report.html").touch()
        assert at(104) == ["b", "d"]
        assert at(121) == ["a", "c", "d"]


def test_what_failed_within_a_day_is_shown_and_what_is_finished_on_request(tmp_path):
    root, now = tmp_path / "runs", time.time()
    for name, status, hours in (
        ("well", "finished", 1),
        ("bad", "failed", 23),
        ("old", "failed", 25),
    ):
        end = {"kind": "end", "attempt": 1, "step": 8, "status": status, "reason": "it had to"}
        began = [timed(attempt(), now - 30 * 3600), timed(end, now - hours * 3600)]
        make_run(root, began, name=name)
    with runs.lock(root / "hapless"):  # it ended before it wrote a line
        pass
    watch = Monitor(Options(runs=[str(root)]))
    told = watch.look()
    assert [r["name"] for r in told["runs"]] == ["hapless", "bad"]
    view = render(told, 80).plain
    assert "it had to" in view
    assert "before it began" in view
    watch.options.everything = True
    assert [r["name"] for r in watch.look()["runs"]] == ["hapless", "well", "bad"]
    watch.options.everything = False
    for name in ("hapless", "bad"):
        shutil.rmtree(root / name)
    assert "nothing runs" in (view := render(watch.look(), 100).plain)
    assert "--all shows" in view
    for name in ("well", "old"):
        shutil.rmtree(root / name)
    assert "--all" not in render(watch.look(), 100).plain


def test_what_is_under_way_comes_first_whichever_folder_it_is_in(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    now_run(one, "broke-off")
    with under_way(other, "oaks"), under_way(one, "elms"):
        for name, ago in (("oaks", 50), ("elms", 100)):  # the last one began first
            lock = (other if name == "oaks" else one) / name / ".lock"
            os.utime(lock, (time.time() - ago,) * 2)
        watch = Monitor(Options(runs=[str(one), str(other), str(other / "oaks")]))
        assert [r["name"] for r in watch.look()["runs"]] == ["oaks", "elms", "broke-off"]


def test_runs_in_a_bucket_are_watched_where_they_are_driven(tmp_path, monkeypatch, valid):
    monkeypatch.setenv("POTSTILL_HOME", str(tmp_path))
    watch = Monitor(Options(runs=["s3://bucket/runs"]))
    told = valid(watch.look())
    assert "s3://bucket/runs has no copy here" in told["folders"][0]["error"]
    assert "a cluster's head" in " ".join(render(told, 200).plain.split())  # lines are folded
    now_run(Path(told["folders"][0]["path"]), "oaks")
    assert [r["name"] for r in valid(watch.look())["runs"]] == ["oaks"]


def test_an_orphans_end_is_not_the_runs(tmp_path):
    root = tmp_path / "runs"
    late = {"kind": "end", "attempt": 1, "time": time.time(), "status": "failed", "reason": "?"}
    for at in (4, 8):  # where the next attempt took over, and past that
        records = [attempt(), attempt(2, 4), step(5, 2), {**late, "step": at}]
        make_run(root, records, name=f"oaks-{at}")
    states = in_state(RunsFolder(str(root)))
    assert states == {"oaks-4": "interrupted", "oaks-8": "interrupted"}


def test_a_folder_that_cannot_be_read_is_refused_by_name(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    (tmp_path / "loop").symlink_to("loop")
    for name in ("file", "loop"):
        with pytest.raises(UserError, match=rf"--runs must be a folder.*{name}"):
            Monitor(Options(runs=[str(tmp_path / name)]))
    done = run_job("monitor", "--once", "--runs", str(tmp_path / "file"), cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: --runs must be a folder that can be read, got")
    assert "Traceback" not in done.stderr
    for wrong in (
        ["--interval-s", "0"],
        ["--cache-max-gb", "-1"],
        ["--address", "ray://head:10001"],
    ):
        assert monitor.command(["--once", "--runs", str(tmp_path), *wrong], None) == 2
        assert f"error: {wrong[0]}" in capsys.readouterr().err


def test_a_folder_that_becomes_unreadable_takes_nothing_else_with_it(tmp_path, valid):
    good, bad = tmp_path / "good", tmp_path / "bad"
    now_run(good, "oaks")
    bad.mkdir()
    watch = Monitor(Options(runs=[str(good), str(bad)]))
    bad.rmdir()
    bad.symlink_to("bad")
    told = valid(watch.look())
    assert [f["error"] is None for f in told["folders"]] == [True, False]
    assert [r["name"] for r in told["runs"]] == ["oaks"]
    assert "Could not be read" in render(told, 100).plain


def test_a_section_that_breaks_is_named_and_the_others_stand(tmp_path, valid, monkeypatch):
    now_run(tmp_path / "runs", "oaks")
    watch = Monitor(Options(runs=[str(tmp_path / "runs")]))
    monkeypatch.setattr(psutil, "virtual_memory", lambda: 1 / 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: [].pop())
    told = valid(watch.look())
    assert {e["section"] for e in told["errors"]} == {"machine", "disks"}
    assert (told["machine"], told["disks"]) == (None, [])
    assert [r["name"] for r in told["runs"]] == ["oaks"]
    view = render(told, 80).plain
    assert "machine: division by zero" in view
    assert "oaks" in view


# ------------------------------------------------------------------------------------------ real runs
def test_without_runs(once, valid, tmp_path):
    told = once()
    assert told["runs"] == []
    assert told["folders"] == [
        {
            "path": str(tmp_path / "runs"),
            "exists": False,
            "counts": dict.fromkeys(_STATES, 0),
            "error": None,
        }
    ]
    assert told["ray"] is None
    assert told["machine"]["cpu_percent"] is not None
    assert told["machine"]["memory_total_bytes"] <= psutil.virtual_memory().total
    free = {d for disk in told["disks"] for d in disk["for"]}
    assert {"runs", "cache", "/dev/shm"} <= free
    for wrong in _violations(told):
        with pytest.raises(jsonschema.ValidationError):
            valid(wrong)


_STATES = (
    *("starting", "running", "finishing", "interrupted", "finished", "stopped_early", "stopped"),
    *("failed", "not_started"),
)


def _violations(told: Any) -> Iterator[Any]:
    """One mistake each, in what a reader would go by."""
    for path, value in (
        (("new",), 1),
        (("version",), 2),
        (("machine", "new"), 1),
        (("machine", "memory_used_bytes"), -1),
        (("machine", "cpu_percent"), "50"),
        (("folders", 0, "counts", "asleep"), 1),
        (("disks", 0, "state"), "fine"),
        (("gpus", "devices"), None),
    ):
        wrong = copy.deepcopy(told)
        node = wrong
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        yield wrong
    for key in told:
        yield {k: v for k, v in told.items() if k != key}


@pytest.fixture(scope="module", autouse=True)
def training(request, tiny_tree, cache_dir, tmp_path_factory) -> Iterator[Any]:
    """jobs/train.py as a user starts it, until it is killed. It starts with this module, as it has much to import."""
    wanted = "test_a_run_in_progress_killed_and_seen_by_another_process"
    if not any(item.name == wanted for item in request.session.items):
        yield None
        return
    place = tmp_path_factory.mktemp("training")
    overrides = tiny_overrides(tiny_tree, cache_dir, place / "runs")
    kept = [o for o in overrides if not o.startswith(("model.", "loop.epochs"))]
    more = ["model.sleep_s=0.1", "loop.epochs=4000", "loop.log_every_steps=1", "run.name=oaks"]
    job = [sys.executable, str(ROOT / "jobs/train.py"), *kept, *SLOW_MODEL, *more]
    with open(place / "said.txt", "w") as printed:
        process = subprocess.Popen(
            [*job, "cache.max_gb=3"],
            cwd=place,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(_PLACES)},
            stdout=printed,
            stderr=subprocess.STDOUT,
        )
    yield place, process
    process.kill()
    process.wait()


_PLACES = [str(ROOT / "tests"), str(ROOT / "platform")]


def test_a_finished_run_is_shown_on_request_with_its_summarys_numbers(tiny, once, tmp_path):
    config = tiny("run.name=oaks", "scaling=local", "task.metrics=[auc]", "loop.monitor=val_auc")
    summary = fit.fit(config)
    assert once()["runs"] == []
    (seen,) = once("--all")["runs"]
    assert (seen["state"], seen["progress"], seen["epoch"], seen["epochs"]) == (
        "finished",
        1.0,
        2,
        2,
    )
    assert seen["best_value"] == pytest.approx(summary["best"]["value"])
    assert seen["best_epoch"] == summary["best"]["epoch"]
    assert seen["warnings"]["count"] == len(summary["warnings"])
    assert seen["elapsed_s"] >= summary["seconds"]
    assert once("--all", "--runs", str(tmp_path / "runs/oaks"))["runs"] == [seen]


@pytest.fixture
def search(tiny_tree, cache_dir, tmp_path, ray_session) -> Iterator[threading.Thread]:
    """A search of two trials at a time, of some seconds each, in a thread; its folder is tmp_path/runs/s."""
    from potstill.config import compose
    from potstill.search import tune

    space = {"optimizer.lr": {"min": 1e-4, "max": 1e-1, "log": True}}
    about = {"space": space, "algorithm": "random", "scheduler": "none", "num_samples": 4}
    path = tmp_path / "conf" / "search" / "own.yaml"
    path.parent.mkdir(parents=True)
    path.write_text(f"# @package _global_\n{yaml.safe_dump({'search': about})}")
    places = tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs")
    kept = [o for o in places if not o.startswith("model.")]
    more = ["model.sleep_s=0.2", "loop.epochs=5", "loop.log_every_steps=1", "run.name=s"]
    given = ["search=own", *kept, *SLOW_MODEL, *more]
    config = compose("tune", given, str(tmp_path / "conf"))
    thread = threading.Thread(target=tune, args=(config,))
    thread.start()
    yield thread
    thread.join()


@pytest.mark.slow
def test_a_search_with_its_trials(search, once, valid, tmp_path):
    watch = Monitor(Options(runs=[str(tmp_path / "runs")]))
    deadline, told = time.monotonic() + 300, None
    while search.is_alive() and time.monotonic() < deadline:
        told = valid(watch.look())
        running = [r for r in told["runs"] if r["state"] == "running" and r["val_loss"]]
        if running and told["searches"][0]["trials"]["done"]:
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"no trial was seen to run: {told}")
    (seen,) = told["searches"]
    assert (seen["name"], seen["state"], seen["trials"]["planned"]) == ("s", "running", 4)
    assert seen["trials"]["running"] == len([r for r in told["runs"] if r["search"] == "s"]) >= 1
    assert running[0]["epochs"] == 5
    assert seen["left_s"] is not None
    assert seen["objectives"][0]["name"] in seen["best"]
    view = render(told, 100).plain
    assert re.search(r"● s +\d/4 trials", view)
    assert f"{running[0]['name']} of s" in view
    search.join(300)
    told = once("--all")
    assert told["searches"][0]["state"] == "finished"
    assert told["searches"][0]["trials"]["done"] == told["searches"][0]["trials"]["completed"] == 4
    assert [r for r in told["runs"] if r["search"]] == []


def test_a_distillations_steps(tmp_path, once):
    folder = tmp_path / "runs" / "distil-oaks"
    steps = {
        "diagnose-teacher": {"key": "1", "status": "finished", "result": {}, "seconds": 12.5},
        "alone-s0": {"key": "2", "status": "running", "result": None, "seconds": 3.0},
    }
    with runs.lock(folder):
        runs.write_json(folder / "steps.json", steps)
        (seen,) = once()["distillations"]
        assert seen["state"] == "running"
        assert [s["status"] for s in seen["steps"]] == ["finished", "running"]
        assert 15.5 < seen["elapsed_s"] < 60  # what it took before, and since
    (seen,) = once()["distillations"]
    assert (seen["state"], seen["elapsed_s"]) == ("interrupted", 15.5)
    runs.write_json(folder / "steps.json", {"alone-s0": {**steps["alone-s0"], "status": "failed"}})
    assert once("--all")["distillations"][0]["state"] == "failed"
    (folder / "steps.json").write_text("[1, 2")
    told = once("--all")
    assert told["distillations"] == []
    assert [e["message"].partition(":")[0] for e in told["errors"]] == ["distil-oaks"]


def test_a_broken_journal_is_its_own_runs_trouble(tmp_path, once, said):
    root = tmp_path / "runs"
    bad = make_run(root, [{**attempt(), "time": time.time()}], name="bad")
    odd = {**step(3), "loss": "low", "lr": None, "images_per_s": float("nan"), "time": time.time()}
    write(bad / "journal.jsonl", [odd])
    with open(bad / "journal.jsonl", "ab") as file:
        file.write(os.urandom(5000) + b'\n{"kind":"epoch","attempt":1,"step":8}\n{"kind":"st')
    strange = {**attempt(), "epochs": "many", "steps_per_epoch": None, "time": time.time()}
    make_run(root, [{**strange, "total_steps": [], "host": 5, "pid": "?"}], name="odd")
    stage = {"kind": "stage", "attempt": 1, "step": 0, "stage": "first", "time": time.time()}
    make_run(root, [{**attempt(), "time": time.time()}, stage], name="worse")
    now_run(root, "good")
    told = once()
    assert [e["message"].partition(":")[0] for e in told["errors"]] == ["worse"]
    seen = {r["name"]: r for r in told["runs"]}
    assert set(seen) == {"bad", "odd", "good"}
    assert seen["bad"]["unread_lines"] > 0
    assert (seen["bad"]["step"], seen["bad"]["train_loss"]) == (3, None)
    assert seen["odd"]["progress"] is None
    assert (seen["good"]["epoch"], seen["good"]["epoch_step"]) == (2, 3)
    assert "lines of its journal are damaged" in said()


@pytest.mark.parametrize("seed", range(30))
def test_whatever_a_journal_holds_what_is_told_is_valid(seed, tmp_path, valid):
    """Values of any kind where numbers belong: the run is told without them, or named as an error."""
    rng = random.Random(seed)
    odd = [None, True, -3, 1.5, 1e308, float("nan"), float("inf"), "x", "", [], [1], {}, {"a": 1}]
    now, root = time.time(), tmp_path / "runs"
    for name in "abcde":
        records = copy.deepcopy(any_journal(rng))
        for _ in range(rng.randint(1, 6)):
            record = rng.choice(records)
            record[rng.choice(list(record))] = rng.choice(odd)
        make_run(root, [timed(r, now) if rng.random() < 0.9 else r for r in records], name=name)
    now_run(root, "good")
    watch = Monitor(Options(runs=[str(root)], everything=True))
    for _ in range(2):
        told = valid(watch.look())
        json.dumps(told, allow_nan=False)
        assert "good" in {r["name"] for r in told["runs"]}
        render(told, 80, 24)
        render(told, 200)


# ------------------------------------------------------------------------------------------------ GPUs
def not_there(code: int) -> Callable[..., Any]:
    def ask(*_: Any) -> Any:
        raise pynvml.NVMLError(code)

    return ask


class FakeNvml:
    """pynvml with two GPUs: an H200, and one in MIG mode that tells little. What it does not fake is pynvml's own."""

    def __init__(self, count: int = 2, start: int = pynvml.NVML_SUCCESS) -> None:
        self.count, self.start = count, start

    def __getattr__(self, name: str) -> Any:
        return getattr(pynvml, name)

    def nvmlInit(self) -> None:
        if self.start != pynvml.NVML_SUCCESS:
            raise pynvml.NVMLError(self.start)

    def nvmlShutdown(self) -> None:
        pass

    def nvmlSystemGetDriverVersion(self) -> str:
        return "580.65.06"

    def nvmlDeviceGetCount(self) -> int:
        return self.count

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        return index

    def _of_first(self, handle: Any, value: Any) -> Any:
        if handle != 0:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        return value

    def nvmlDeviceGetName(self, handle: Any) -> Any:
        return {0: "NVIDIA H200", 1: b"NVIDIA A100"}.get(handle, "NVIDIA A100 MIG 1g.5gb")

    def nvmlDeviceGetUUID(self, handle: Any) -> str:
        return f"GPU-{handle}"

    def nvmlDeviceGetMemoryInfo(self, handle: Any) -> Any:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NO_PERMISSION)
        total = 143_771 * 2**20 if handle == 0 else 5 * 10**9
        return SimpleNamespace(used=total // 4, total=total)

    def nvmlDeviceGetUtilizationRates(self, handle: Any) -> Any:
        return self._of_first(handle, SimpleNamespace(gpu=93, memory=40))

    def nvmlDeviceGetTemperature(self, handle: Any, sensor: int) -> int:
        return self._of_first(handle, 61)

    def nvmlDeviceGetPowerUsage(self, handle: Any) -> int:
        return self._of_first(handle, 412_345)

    def nvmlDeviceGetEnforcedPowerLimit(self, handle: Any) -> int:
        return self._of_first(handle, 700_000)

    def nvmlDeviceGetMigMode(self, handle: Any) -> list[int]:
        return [int(handle == 1), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle: Any) -> int:
        return 7

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle: Any, index: int) -> Any:
        if index > 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_FOUND)
        return f"mig{index}"

    def nvmlDeviceGetComputeRunningProcesses(self, handle: Any) -> list[Any]:
        if handle == 1:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)
        mine = SimpleNamespace(pid=os.getpid(), usedGpuMemory=3 * 10**9 if handle == 0 else None)
        return [mine] if handle in (0, "mig0") else []

    def nvmlDeviceGetGraphicsRunningProcesses(self, handle: Any) -> list[Any]:
        return self.nvmlDeviceGetComputeRunningProcesses(handle)


def test_a_gpu_tells_what_it_can(tmp_path, valid):
    with under_way(tmp_path / "runs", "oaks"):
        watch = Monitor(Options(runs=[str(tmp_path / "runs")]), Gpus(FakeNvml()))
        told = valid(watch.look())
        watch.close()
    first, second = told["gpus"]["devices"]
    assert (first["utilization_percent"], first["temperature_c"]) == (93, 61)
    assert (first["power_w"], first["power_limit_w"], first["mig"]) == (412.345, 700.0, False)
    assert first["memory_used_bytes"] * 4 == pytest.approx(first["memory_total_bytes"], rel=1e-6)
    (process,) = first["processes"]
    assert (process["pid"], process["run"]) == (os.getpid(), "oaks")
    assert process["memory_bytes"] == 3_000_000_000
    unknown = ("utilization_percent", "memory_used_bytes", "temperature_c", "power_w")
    assert [second[k] for k in unknown] == [None] * 4
    assert (second["name"], second["mig"], second["error"]) == ("NVIDIA A100", True, None)
    assert [s["memory_total_bytes"] for s in second["slices"]] == [5_000_000_000] * 2
    assert [p["memory_bytes"] for p in second["slices"][0]["processes"]] == [None]
    for width in (80, 200):
        view = render(told, width).plain
        assert "NVIDIA H200" in view
        for part in ("93 %", "37.7/151 GB", "61", "412/700 W", "oaks (", "slice 0"):
            assert part in view, part


def test_a_process_is_of_the_run_that_it_descends_from(tmp_path):
    """A run's loaders and workers use GPUs, too; another host's numbers mean others here."""
    child = subprocess.Popen(["sleep", "60"])
    try:
        with under_way(tmp_path / "runs", "oaks"):
            (seen,) = Monitor(Options(runs=[str(tmp_path / "runs")])).look()["runs"]
        assert Owners([seen])(child.pid) == Owners([seen])(os.getpid()) == "oaks"
        assert Owners([{**seen, "driver_pid": None, "host": "other"}])(child.pid) is None
        assert Owners([{**seen, "state": "interrupted"}])(child.pid) is None
        assert Owners([{**seen, "pid": child.pid, "driver_pid": None}])(os.getpid()) is None
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("asked", ["nvmlDeviceGetHandleByIndex", "nvmlDeviceGetTemperature"])
def test_a_gpu_that_is_lost_takes_no_other_with_it(asked):
    """It may be lost before the first question or between two."""
    nvml, gone = FakeNvml(), not_there(pynvml.NVML_ERROR_GPU_IS_LOST)
    gpus, ask = Gpus(nvml), getattr(nvml, asked)
    setattr(nvml, asked, lambda of, *more: gone() if of == 0 else ask(of, *more))
    first, second = gpus.look()["devices"]
    assert "lost" in first["error"].lower()
    assert second["error"] is None


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (pynvml.NVML_ERROR_LIBRARY_NOT_FOUND, "no NVIDIA GPU"),
        (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "no NVIDIA GPU"),
        (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "restart the machine"),
        (pynvml.NVML_ERROR_UNKNOWN, "NVML: Unknown"),
    ],
)
def test_without_a_gpu_or_a_driver_there_is_a_reason(code, reason, monkeypatch):
    nvml = FakeNvml(start=code)
    gpus = Gpus(nvml)
    told = gpus.look()
    assert told["devices"] == []
    assert reason in told["reason"]
    nvml.start = pynvml.NVML_SUCCESS
    assert gpus.look()["devices"] == []  # not asked again at once
    monkeypatch.setattr(monitor_machine, "GPU_RETRY_S", 0.0)
    assert len(gpus.look()["devices"]) == 2
    nvml.nvmlDeviceGetCount = not_there(pynvml.NVML_ERROR_UNINITIALIZED)  # type: ignore[method-assign]
    assert "Uninitialized" in gpus.look()["reason"]
    assert Gpus(FakeNvml(count=0)).look()["reason"] == "no NVIDIA GPU"


# --------------------------------------------------------------------------------------------- machine
def test_a_container_is_told_by_its_own_limits(tmp_path, monkeypatch):
    """Control groups of version 2: half a core, and a GB of which a quarter is cache that can be dropped."""
    group = tmp_path / "groups" / "pod"
    group.mkdir(parents=True)
    (tmp_path / "own").write_text("0::/pod/../pod\n")
    busy = group / "cpu.stat"
    files = {"cpu.max": "50000 100000\n", "memory.max": "1000000000\n"}
    files |= {"memory.current": "750000000\n", "memory.stat": "anon 1\ninactive_file 250000000\n"}
    for name, text in files.items():
        (group / name).write_text(text)
    busy.write_text("usage_usec 1000000\nuser_usec 5\n")
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    machine = Machine(Groups(tmp_path / "groups", tmp_path / "own"))
    monkeypatch.setattr(time, "monotonic", lambda: 100.2)
    busy.write_text(f"usage_usec {1_000_000 + 50_000}\nuser_usec 5\n")
    told = machine.look()
    assert (told["cores"], told["container"]) == (0.5, True)
    assert (told["memory_used_bytes"], told["memory_total_bytes"]) == (500_000_000, 1_000_000_000)
    assert told["cpu_percent"] == 50.0  # 50 ms of 200 ms, on half a core
    (group / "cpu.max").write_text("max 100000\n")
    (group / "memory.max").write_text("max\n")
    told = Machine(Groups(tmp_path / "groups", tmp_path / "own")).look()
    assert (told["container"], told["memory_total_bytes"]) == (False, psutil.virtual_memory().total)


def test_a_container_with_control_groups_of_version_1(tmp_path):
    (tmp_path / "own").write_text("4:memory:/docker/x\n2:cpu,cpuacct:/docker/x\n1:name=systemd:/\n")
    memory, cpu = tmp_path / "memory", tmp_path / "cpu,cpuacct" / "docker" / "x"
    memory.mkdir()  # seen from within, the group is the root
    cpu.mkdir(parents=True)
    (memory / "memory.limit_in_bytes").write_text("2000000000")
    (memory / "memory.usage_in_bytes").write_text("900000000")
    (memory / "memory.stat").write_text("total_inactive_file 100000000")
    (cpu / "cpu.cfs_quota_us").write_text("100000")
    (cpu / "cpu.cfs_period_us").write_text("100000")
    (cpu / "cpuacct.usage").write_text("5000000000")
    told = Machine(Groups(tmp_path, tmp_path / "own")).look()
    assert (told["memory_used_bytes"], told["memory_total_bytes"]) == (800_000_000, 2_000_000_000)
    assert told["cores"] == (1.0 if (os.cpu_count() or 1) > 1 else os.cpu_count())


def test_disks_warn_before_they_are_full(tmp_path, monkeypatch):
    places = {"runs": tmp_path / "a/b", "cache": tmp_path / "c"}
    for free, state in ((50, "ok"), (9, "low"), (4, "critical")):
        use = SimpleNamespace(total=120 * 10**9, used=(100 - free) * 10**9, free=free * 10**9)
        monkeypatch.setattr(shutil, "disk_usage", lambda _, use=use: use)
        (disk,) = look_at_disks(places)
        assert (disk["for"], disk["state"]) == (["runs", "cache"], state)
        assert disk["free_percent"] == free  # of what is not kept for root


def test_a_cache_with_a_build_under_way(tmp_path, valid):
    import numpy as np

    from synthetic_runs import make_cache

    guesses = {"id": np.arange(1000, 1004), "label": np.zeros(4, np.int32)}
    make_cache(tmp_path / "k1", guesses, ["a"])
    (tmp_path / "k1" / ".lock").touch()
    (tmp_path / "k2").mkdir()
    (tmp_path / "k2" / "shard-0.arrow").write_bytes(bytes(1000))
    from potstill.data import store

    handle = os.open(tmp_path / "k2" / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX)
        os.pwrite(handle, b"10000", 0)
        os.utime(handle, (time.time() - 60,) * 2)
        with store.hold(tmp_path / "k1", "run oaks"):
            told = look_at_cache(tmp_path, False, 0.001, "flag")
    finally:
        os.close(handle)
    assert [s["key"] for s in told["sets"]] == ["k1", "k2"]  # the last used first
    sets = {s["key"]: s for s in told["sets"]}
    assert sets["k2"]["users"] == ["its builder"]
    assert 8000 < sets["k2"]["pending_bytes"] < 9100
    assert sets["k1"]["users"][0].startswith("run oaks")
    assert told["limit_bytes"] == 1_000_000
    assert told["bytes"] + told["pending_bytes"] == sum(s["bytes"] for s in told["sets"])
    watch = Monitor(Options(runs=[str(tmp_path / "none")], cache=str(tmp_path)))
    view = render({**valid(watch.look()), "caches": [told]}, 80).plain
    assert "being built, 10 %" in view
    assert "run oaks, process" in view


def test_caches_of_runs_under_way_are_found_with_the_tightest_of_their_limits(
    tmp_path, valid, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cache").mkdir()
    root = tmp_path / "runs"
    with under_way(root, "oaks") as oaks, under_way(root, "elms") as elms:

        def limits(told: Any) -> dict[str, Any]:
            return {c["path"]: (c["limit_bytes"], c["limit_from"]) for c in told["caches"]}

        usual, theirs = str(tmp_path / "cache"), str(root / "cache")  # as run.json has it
        for tight, loose in ((oaks, elms), (elms, oaks)):
            for run, gb in ((tight, 2), (loose, 5)):
                (run / "config.yaml").write_text(f"model: {{}}\ncache: {{max_gb: {gb}}}\n")
            watch = Monitor(Options(runs=[str(root)]))
            expected = {theirs: (2 * 10**9, f"run {tight.name}"), usual: (None, None)}
            assert limits(valid(watch.look())) == expected
        flag = Monitor(Options(runs=[str(root)], cache_max_gb=7.5)).look()
        assert limits(flag) == dict.fromkeys((theirs, usual), (7.5e9, "flag"))
        monkeypatch.setattr(
            monitor, "look_at_cache", lambda *_: pytest.fail("looked again at once")
        )
        assert limits(watch.look()) == expected


# ------------------------------------------------------------------------------------------------ view
def a_view(tmp_path: Path) -> Any:
    root = tmp_path / "runs"
    now_run(root, "oaks-of-a-name-that-is-quite-long-as-names-of-runs-may-well-be")
    warning = {"name": "collapsed", "message": "all predictions are [rubra]"}
    with under_way(root, "elms") as run:
        said = {**step(12), "kind": "warning", **warning, "time": time.time()}
        write(run / "journal.jsonl", [said, {**step(12), "time": time.time()}])
        return Monitor(Options(runs=[str(root)]), Gpus(FakeNvml())).look(first=True)


@pytest.mark.parametrize("width", [60, 80, 120, 150, 200])
def test_the_view_fits_and_says_what_it_must(width, tmp_path):
    view = render(a_view(tmp_path), width)
    lines = view.split("\n")
    assert max(line.cell_len for line in lines) <= width
    said = view.plain
    for part in ("elms", "2/3", "0.5000", "0.7000", "55.33", "interrupted", "collapsed"):
        assert part in said, part
    assert "4/8" in said
    assert "50 %" in said
    assert re.search(r"1\d s left" if width < 150 else r"1\d s +cpu", said)
    assert re.search(r"for 1\d s" if width < 150 else r"1\d s +1\d s", said)
    assert "Top-1" not in said
    assert "top-1" in said
    wide = [line.plain for line in lines if "Machine" in line.plain]
    assert (len(lines) < 40) if width >= 150 else wide


def test_a_low_terminal_counts_what_it_cannot_show(tmp_path, monkeypatch):
    drawn = []
    draw = monitor_view._run_item
    monkeypatch.setattr(monitor_view, "_run_item", lambda *a: (drawn.append(a), draw(*a))[1])
    for i in range(60):
        now_run(tmp_path / "runs", f"run-{i:02d}")
    told = Monitor(Options(runs=[str(tmp_path / "runs")])).look()
    for width in (80, 200):
        for height in (24, 40):
            view = render(told, width, height)
            lines = view.plain.split("\n")
            assert len(lines) == height
            shown = sum("run-" in line for line in lines)
            assert f"… and {60 - shown} more" in view.plain
            assert shown > height // 3
            assert len(drawn) < height  # what cannot be shown is not drawn
            drawn.clear()
            assert "Machine" in view.plain
            assert "Disks" in view.plain


def test_on_a_low_terminal_details_go_before_runs_do(tmp_path):
    told = a_view(tmp_path)
    view = render(told, 80, 24).plain
    assert len(view.split("\n")) == 24
    for part in ("elms", "oaks", "collapsed", "NVIDIA A100", "memory", "/dev/shm"):
        assert part in view
    assert "more" not in view
    assert "slice 1" not in view  # there is no room for it
    # what a run says goes after what a GPU does; how many lines the rest takes is this machine's matter
    views = [render(told, 80, lines).plain for lines in range(12, 25)]
    said = [("its process is gone" in view, "elms (" in view) for view in views]
    assert (True, False) in said
    assert (False, True) not in said


def test_a_silent_run_is_told_apart_from_a_busy_one(tmp_path, valid):
    with under_way(tmp_path / "runs", "oaks") as run:
        journal, long_ago = run / "journal.jsonl", time.time() - 3600
        lines = [json.loads(line) for line in journal.read_text().splitlines()]
        journal.write_text("")
        write(journal, [{**r, "time": r["time"] - 3600} for r in lines])
        os.utime(journal, (long_ago, long_ago))
        os.utime(run / ".lock", (long_ago - 60, long_ago - 60))
        watch = Monitor(Options(runs=[str(tmp_path / "runs")]))
        told = valid(watch.look())
        assert told["runs"][0]["silent"]
        assert "silent: its last record came 1 h 00 min ago" in render(told, 80).plain
        write(journal, [{**step(12), "time": time.time()}])
        assert not watch.look()["runs"][0]["silent"]


def test_what_takes_no_unicode_gets_ascii(tmp_path, said, monkeypatch):
    now_run(tmp_path / "runs", "oaks")
    monkeypatch.setenv("COLUMNS", "72")
    with io.TextIOWrapper(io.BytesIO(), encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        said()
        printed = out.buffer.getvalue().decode("ascii")  # type: ignore[attr-defined]
    assert "x oaks" in printed
    assert max(map(len, printed.splitlines())) <= 72
    kept = as_ascii(Text.assemble("a ", ("━─", "green")))
    assert (kept.plain, kept.spans[0].style) == ("a #-", "green")


@contextmanager
def terminal(
    tmp_path: Path, *arguments: str, encoding: str = "utf-8"
) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """The live view on a terminal of 24 lines and 80 columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs/monitor.py"), *arguments],
        **{"stdin": theirs, "stdout": theirs, "stderr": theirs, "cwd": tmp_path},
        env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": encoding},
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
    )
    try:
        os.close(theirs)
        yield process, ours
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def read_until(ours: int, what: str, timeout_s: float = 20) -> str:
    said, deadline = b"", time.monotonic() + timeout_s
    while what.encode() not in said:
        assert time.monotonic() < deadline, said.decode(errors="replace")
        if select.select([ours], [], [], 0.2)[0]:
            try:
                said += os.read(ours, 65536)
            except OSError:  # the other end is closed
                break
    return said.decode(errors="replace")


def test_live_it_follows_the_terminals_size_and_q_ends_it(tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")  # as whatever has loaded readline leaves it
    now_run(tmp_path / "runs", "oaks")
    with terminal(tmp_path, "--interval-s", "30") as (process, ours):
        assert "\x1b[?1049h" in read_until(ours, "Disks")  # a screen of its own
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
        # a rule as wide as that, at once and not after half a minute
        read_until(ours, "─" * 101)
        os.write(ours, b"q")
        assert "\x1b[?1049l" in read_until(ours, "\x1b[?1049l")
        assert process.wait(10) == 0


@pytest.mark.parametrize(
    ("sent", "encoding", "rule"), [(signal.SIGINT, "utf-8", "─"), (signal.SIGTERM, "ascii", "--")]
)
def test_ctrl_c_ends_it_quietly_whatever_the_terminal_takes(sent, encoding, rule, tmp_path):
    with terminal(tmp_path, encoding=encoding) as (process, ours):
        assert f"Disks {rule}" in re.sub(r"\x1b\[[\d;]*m", "", read_until(ours, "/dev/shm"))
        os.kill(process.pid, sent)
        rest = read_until(ours, "\x1b[?1049l")
        assert process.wait(10) == 0
        assert "Traceback" not in rest
        assert "\x1b[?25h" in rest  # the cursor is back


def test_a_line_of_json_a_look_and_a_reader_that_leaves(tmp_path, valid):
    command = [sys.executable, str(ROOT / "jobs/monitor.py"), "--json", "--interval-s", "0.2"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None
    assert process.stderr is not None
    first, second = (valid(json.loads(process.stdout.readline())) for _ in range(2))
    assert second["time"] > first["time"]
    process.stdout.close()
    assert process.wait(10) == 0
    assert process.stderr.read() == b""


# ------------------------------------------------------------------------------------------ a real run
def test_a_run_in_progress_killed_and_seen_by_another_process(training, once, said, cache_dir):
    """What is told of it are its journal's own numbers."""
    place, process = training
    run, folder = place / "runs" / "oaks", ["--runs", str(place / "runs")]
    deadline = time.monotonic() + 300
    while not any(r["kind"] == "epoch" for r in runs.read_journal(run)):
        assert process.poll() is None, (place / "said.txt").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.2)
    told = once(*folder)
    (seen,) = told["runs"]
    records = runs.read_journal(run)
    assert (seen["name"], seen["state"], seen["silent"]) == ("oaks", "running", False)
    assert (seen["epochs"], seen["steps_per_epoch"], seen["total_steps"]) == (4000, 3, 12000)
    assert seen["driver_pid"] == seen["pid"] == process.pid
    assert (seen["device"], seen["host"]) == ("cpu", socket.gethostname())
    assert (seen["epoch"] - 1) * 3 + seen["epoch_step"] == seen["step"]
    of_step = next(r for r in records if r["kind"] == "step" and r["step"] == seen["step"])
    assert (seen["train_loss"], seen["lr"]) == (of_step["loss"], of_step["lr"])
    assert seen["images_per_s"] == of_step["images_per_s"]
    done = seen["epoch"] - 1
    of_epoch = next(r for r in records if r["kind"] == "epoch" and r["epoch"] == done)
    assert (seen["val_loss"], seen["monitor"]) == (of_epoch["val_loss"], "val_top1_acc")
    assert seen["monitor_value"] == of_epoch["val_top1_acc"]
    # its own guess is of before the checkpoint that this epoch has written
    assert 0.05 < seen["left_s"] / of_epoch["seconds_left"] < 20
    # its cache, which was not named, and the limit that it goes by
    (cache,) = [c for c in told["caches"] if c["path"] == str(cache_dir)]
    assert (cache["limit_bytes"], cache["limit_from"]) == (3_000_000_000, "run oaks")
    assert any("run oaks" in user for s in cache["sets"] for user in s["users"])
    process.kill()  # -9
    process.wait()
    told = once(*folder)
    (seen,) = told["runs"]
    assert (seen["state"], seen["left_s"], seen["driver_pid"]) == ("interrupted", None, None)
    assert told["folders"][1]["counts"]["interrupted"] == 1
    view = said(*folder)
    assert "interrupted" in view
    assert "its process is gone" in view
    assert "\x1b" not in view


# ------------------------------------------------------------------------------------------------- Ray
@pytest.mark.parametrize(
    "good", ["auto", "head:6379", "10.0.0.1:6379", "[::1]:6379", "http://h:8265/"]
)
def test_addresses(good):
    assert checked_address(good) == good.rstrip("/")


@pytest.mark.parametrize("wrong", ["head", "ray://head:10001", "6379", "a b:1", "http://"])
def test_addresses_that_are_none(wrong):
    with pytest.raises(UserError, match="--address"):
        checked_address(wrong)


def watched(address: str) -> Any:
    watch = RayWatch(address)
    try:
        watch.ask()
        watch.wait()
        return watch.look()
    finally:
        watch.close()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def test_a_cluster_that_is_not_there_is_a_reason_and_no_more(tmp_path, valid):
    began = time.monotonic()
    watch = Monitor(Options(runs=[str(tmp_path)], address=f"127.0.0.1:{free_port()}"))
    told = valid(watch.look(first=True))
    assert watch.ray is not None
    watch.look()
    assert watch.ray._asked is None  # not so soon again
    watch.close()
    assert time.monotonic() - began < 10
    assert "cannot be reached (Connection refused)" in told["ray"]["reason"]
    assert told["machine"] is not None
    assert "Connection refused" in render(told, 80).plain
    assert "refused" in watched(f"http://127.0.0.1:{free_port()}")["reason"]


def test_a_port_is_no_status():
    refused = monitor_ray._why(
        ConnectionError("10.0.0.1:40123 cannot be reached"), "10.0.0.1:40123"
    )
    assert refused == "10.0.0.1:40123 cannot be reached"
    for code, wants in ((401, True), (403, True), (404, False)):
        error = urllib.error.HTTPError("http://h:1", code, "no", Message(), None)
        assert ("wants a token" in monitor_ray._why(error, "h:1")) == wants


def test_what_the_dashboard_says_of_resources():
    text = "1.5/4.0 CPU (1.0 used of 2.0 reserved in placement groups)\n0B/2.50GiB memory\n1.0MiB/3KiB object_store_memory"
    assert monitor_ray._said_resources(text) == [
        {"name": "CPU", "used": 1.5, "total": 4.0},
        {"name": "memory", "used": 0.0, "total": 2.5 * 2**30},
        {"name": "object_store_memory", "used": 2.0**20, "total": 3072.0},
    ]


def test_a_cluster_that_hangs_is_given_up(monkeypatch):
    """Something takes the connection, and says nothing: Ray's own client would wait for most of a minute."""
    monkeypatch.setattr(monitor_ray, "RAY_PATIENCE_S", 1.5)
    with socket.create_server(("127.0.0.1", 0)) as server:
        began = time.monotonic()
        told = watched(f"127.0.0.1:{server.getsockname()[1]}")
        assert time.monotonic() - began < 8
        assert "no answer from" in told["reason"]
        assert "6379" in told["reason"]  # what may be wrong with the address
        assert told["nodes"] == []


def test_a_client_that_dies_is_started_anew(monkeypatch):
    monkeypatch.setattr(monitor_ray, "RAY_EVERY_S", 0.0)
    watch = RayWatch(f"127.0.0.1:{free_port()}")
    try:
        for _ in range(2):
            watch.ask()
            assert watch._process is not None
            watch._process.kill()
            watch.wait()
            assert "has ended" in watch.look()["reason"]
        watch.wait()
        assert "cannot be reached" in watch.look()["reason"]
    finally:
        watch.close()


def test_demands_are_told_with_their_labels():
    from ray.core.generated.autoscaler_pb2 import (  # pyright: ignore[reportAttributeAccessIssue]
        GangResourceRequest,
        ResourceRequest,
        ResourceRequestByCount,
    )

    on_gpus = ResourceRequest(resources_bundle={"GPU": 1.0, "CPU": 4.0})
    rule = on_gpus.label_selectors.add().label_constraints.add()
    rule.label_key, rule.operator = "potstill.io/role", 1
    rule.label_values.append("train")
    counted = [
        ResourceRequestByCount(request=on_gpus, count=2),
        ResourceRequestByCount(request=on_gpus, count=1),
    ]
    bundle = ResourceRequest(resources_bundle={"CPU": 1.0, "bundle_group_abc": 0.001})
    gang = GangResourceRequest(requests=[bundle, bundle])
    assert monitor_ray._demands(counted, [gang]) == [
        {
            "count": 3,
            "resources": {"CPU": 4.0, "GPU": 1.0},
            "labels": {"potstill.io/role": "train"},
            "group": False,
        },
        {"count": 2, "resources": {"CPU": 1.0}, "labels": {}, "group": True},
    ]
    assert monitor_ray._demands([on_gpus], [])[0]["count"] == 1


def test_the_first_autoscalers_own_words():
    from dataclasses import asdict

    from ray.autoscaler._private.autoscaler import AutoscalerSummary
    from ray.autoscaler._private.node_provider_availability_tracker import (
        NodeAvailabilityRecord,
        NodeAvailabilitySummary,
        UnavailableNodeInformation,
    )

    why = UnavailableNodeInformation(category="QuotaExceeded", description="no more H200s")
    tracked = NodeAvailabilitySummary({"train": NodeAvailabilityRecord("train", False, 5.0, why)})
    summary = AutoscalerSummary(
        active_nodes={"data": 1},
        idle_nodes=None,
        pending_nodes=[("10.0.0.9", "train", "setting-up")],
        pending_launches={"train": 2},
        failed_nodes=[("10.0.0.8", "data")],
        node_availability_summary=tracked,
    )
    written = json.loads(
        json.dumps({"time": time.time() - 90, "autoscaler_report": asdict(summary)})
    )
    told = monitor_ray._older_autoscaler(written)
    assert 89 < told["silent_s"] < 95
    assert [(x["type"], x["count"]) for x in told["launching"]] == [("train", 2), ("train", 1)]
    assert [x["reason"] for x in told["failed"]] == [
        "node 10.0.0.8 failed",
        "QuotaExceeded: no more H200s",
    ]


def test_gpus_of_other_nodes_as_the_dashboard_has_them(tmp_path, valid):
    """By Ray's own model of what a node reports, with the processes that the journals know."""
    from ray.dashboard.modules.reporter.reporter_models import GpuUtilizationInfo

    gpu = GpuUtilizationInfo(
        index=0, name="NVIDIA H200", uuid="GPU-7", utilizationGpu=88, memoryUsed=20_000,
        memoryTotal=143_771, powerMw=300_500, temperatureC=55,
        processesPids=[{"pid": 4242, "gpuMemoryUsage": 19_000}],
    )  # fmt: skip
    node = {"id": "a1", "ip": "10.0.0.7", "host": "gpu-7", "head": False, "type": "train"}
    node |= {"state": "active", "role": "train", "market": "spot", "labels": {}, "resources": []}
    report = {"raylet": {"nodeId": "a1"}, "mem": [64e9, 48e9, 25.0, 16e9], "cpu": 41.5}
    report |= {"cpus": [16, 8], "now": time.time(), "gpus": [json.loads(gpu.model_dump_json())]}
    report["mem"] = [int(v) for v in report["mem"]]
    report["disk"] = {"/": {"total": 120, "used": 70, "free": 30}}
    monitor_ray._add_hardware([node], [report])
    hardware = node["hardware"]
    assert (hardware["cpu_percent"], hardware["cores"], hardware["load_1min"]) == (41.5, 16, None)
    assert (hardware["memory_used_bytes"], hardware["memory_total_bytes"]) == (16e9, 64e9)
    assert (hardware["disk_free_bytes"], hardware["disk_total_bytes"]) == (30, 100)
    with under_way(tmp_path / "runs", "oaks", host="gpu-7", pid=4242):
        told = Monitor(Options(runs=[str(tmp_path / "runs")])).look()
    told["ray"] = {**monitor_ray._unknown("head:6379"), "nodes": [node], "age_s": 1.0}
    view = render(valid(told), 80).plain
    assert re.search(r"gpu-7 0 NVIDIA H200 .*88 %  21\.0/151 GB  55  30[01] W", view)
    assert "oaks (4242)" in view


@pytest.fixture
def cluster(tmp_path_factory) -> Iterator[tuple[str, dict[str, str]]]:
    """A head of our own on free ports, which wants a token: (its address, the environment of its clients)."""
    pytest.importorskip("aiohttp", reason="ray[default] brings the dashboard")
    base = Path(tmp_path_factory.mktemp("r", numbered=True)).resolve()
    short = Path(f"/tmp/pm{os.getpid()}")  # the names of Ray's sockets have few characters
    short.symlink_to(base)
    (base / "token").write_text("a" * 64)
    port, dashboard = free_port(), free_port()
    clients = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(base / "token")}
    env = {**clusters.outside(), **clients, "RAY_USAGE_STATS_ENABLED": "0"}
    try:
        subprocess.run(
            [
                *(str(Path(sys.executable).with_name("ray")), "start", "--head", f"--port={port}"),
                *("--num-cpus=0", f"--temp-dir={short}/t", "--object-store-memory=80000000"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
                *(f"--dashboard-agent-listen-port={free_port()}", "--labels=potstill.io/role=head"),
            ],
            **{"env": env, "check": True, "capture_output": True, "timeout": 300},
        )
        yield f"127.0.0.1:{port}", {**clients, "DASHBOARD": f"http://127.0.0.1:{dashboard}"}
    finally:
        for process in psutil.process_iter(["cmdline"]):  # those that name this folder, by id
            if any(f"{short}/t" in word for word in process.info["cmdline"] or ()):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
        short.unlink()


@pytest.mark.slow
def test_a_cluster_is_seen_from_outside(cluster, once, monkeypatch):
    address, env = cluster
    told = once("--address", address)
    assert "wants a token" in told["ray"]["reason"]
    assert told["ray"]["nodes"] == []
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    ray = once("--address", address)["ray"]
    assert (ray["reason"], ray["hardware_reason"], ray["version"]) == (None, None, ray["version"])
    (node,) = ray["nodes"]
    assert (node["head"], node["role"], node["host"]) == (True, "head", socket.gethostname())
    assert [r["name"] for r in ray["resources"]] == ["memory", "object_store_memory"]
    assert ray["jobs"] == []  # whoever looks is no driver
    assert ray["autoscaler"]["version"] is not None
    by_dashboard = once("--address", env["DASHBOARD"])["ray"]
    assert [n["id"] for n in by_dashboard["nodes"]] == [node["id"]]
    assert by_dashboard["autoscaler"] is None
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "b" * 64)
    told = once()
    assert "wants a token" in told["ray"]["reason"]


@pytest.mark.slow
def test_nodes_jobs_and_the_autoscaler_of_a_cluster(valid, tmp_path):
    """Work that asks for a GPU brings a node; what no node can hold is told; both the head's service and the dashboard."""
    with clusters.autoscaling_cluster() as cluster:

        def look(address: str = "127.0.0.1:6379") -> Any:
            job = [sys.executable, str(ROOT / "jobs/monitor.py"), "--once", "--json"]
            return valid(json.loads(cluster.head.run(*job, "--address", address, cwd=tmp_path)))[
                "ray"
            ]

        def roles(ray: Any) -> list[str]:
            return sorted(n["role"] for n in ray["nodes"])

        assert roles(look()) == ["head"]
        (tmp_path / "work.py").write_text(
            "import os, ray, time; ray.init(address='127.0.0.1:6379')\n"
            "@ray.remote(num_gpus=1, label_selector={'potstill.io/role': 'train'})\n"
            f"def work():\n    while not os.path.exists({str(tmp_path / 'enough')!r}): time.sleep(0.2)\n"
            "@ray.remote(num_gpus=8)\n"
            "def never(): pass\n"
            "kept = never.remote(); ray.get(work.remote())\n"
        )
        command = cluster.head.command(sys.executable, str(tmp_path / "work.py"))
        env = {**clusters.outside(), **cluster.head.env}
        with open(tmp_path / "said.txt", "w") as said:
            driver = subprocess.Popen(command, env=env, stdout=said, stderr=said)
        try:
            ray = clusters.wait_for(
                "a train node at work",
                lambda: (
                    (r := look())
                    and roles(r) == ["head", "train"]
                    and r["autoscaler"]["infeasible"]
                    # the node is there before its work is
                    and any(one["name"] == "GPU" and one["used"] for one in r["resources"])
                    and r
                ),
                240,
            )
            (node,) = [n for n in ray["nodes"] if n["role"] == "train"]
            used = {r["name"]: (r["used"], r["total"]) for r in node["resources"]}
            assert (used["GPU"], node["market"], node["state"]) == ((1, 1), "spot", "active")
            assert ray["autoscaler"]["version"] == "v2"
            assert ray["autoscaler"]["silent_s"] is not None
            assert [d["resources"]["GPU"] for d in ray["autoscaler"]["infeasible"]] == [8]
            (job,) = ray["jobs"]
            assert (job["submitted"], job["status"]) == (False, "RUNNING")
            assert "work.py" in job["entrypoint"]
            clusters.wait_for(  # which asks the nodes itself, every few seconds
                "the dashboard to say so, too",
                lambda: {r["name"] for r in look(cluster.address)["resources"]} >= {"CPU", "GPU"},
                60,
            )
            (tmp_path / "enough").touch()
            assert driver.wait(240) == 0, (tmp_path / "said.txt").read_text()
        finally:
            driver.kill()
            driver.wait()
        gone = clusters.wait_for(
            "the node to go", lambda: roles(r := look()) == ["head"] and r, 240
        )
        assert [(n["role"], "idle" in n["reason"]) for n in gone["dead"]] == [("train", True)]
