"""The commands as a user runs them, each in a process of its own."""

from __future__ import annotations

import contextlib
import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from conftest import ROOT, run_job, skip, tiny_overrides, write_tree
from potstill import runs

MISTAKES = {
    "one class": (["data.root=one"], r"at least 2 classes|2 classes"),
    "empty folder": (["data.root=empty"], r"data\.root must be a folder of class folders"),
    "missing path": (
        ["data.root=nowhere"],
        r"data\.root must be a folder.*nowhere.*does not exist",
    ),
    "no path": ([], r"data\.root"),
    "misspelt key": (
        ["data.root=tree", "loop.epocs=3"],
        r"loop\.epocs is not a key.*did you mean loop\.epochs",
    ),
    "large batch": (
        ["data.root=tree", "loop.batch_size=5000"],
        r"loop\.batch_size must be <= the number of training images, got 5000 for 48",
    ),
    "full cache": (["data.root=tree", "cache.max_gb=0.000001"], r"cache\.max_gb"),
    "no teacher": (
        ["data.root=tree", "loop.batch_size=16", "task=distil", "teacher.run=nowhere"],
        r"teacher\.run must be the folder of a run",
    ),
    "no weights": (
        ["data.root=tree", "loop.batch_size=16", "model.init_from=no.pth"],
        r"model\.init_from must be .*no\.pth', which does not exist",
    ),
}


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mistakes")
    write_tree(folder / "tree")
    (folder / "empty").mkdir()
    one = folder / "one" / "only"
    one.mkdir(parents=True)
    for path in (folder / "tree" / "train" / "red").iterdir():
        (one / path.name).write_bytes(path.read_bytes())
    return folder


@pytest.fixture
def nothing_expensive(tmp_path, monkeypatch):
    """A job that is started now cannot import Ray or torch."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "class Refuse:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name in ('ray', 'torch'): raise AssertionError(f'{name} is imported')\n"
        "sys.meta_path.insert(0, Refuse())\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))


@pytest.mark.usefixtures("nothing_expensive")
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_message_within_seconds(mistake, places):
    arguments, says = MISTAKES[mistake]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run_job("train", *arguments, cwd=places)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
    import re

    assert re.search(says, done.stderr), done.stderr
    assert seconds < 5, "of CPU, however busy the machine is"
    assert not (places / "cache").exists()


def test_an_unknown_model_is_refused_with_near_names(places):
    done = run_job(
        "train", "data.root=tree", "loop.batch_size=16", "model.name=resnt18", cwd=places
    )
    assert done.returncode == 2
    assert "model.name must be a timm model, got 'resnt18'; did you mean" in done.stderr
    assert "resnet18" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    ("room", "says"),
    [
        ("size=8k", "the disk of "),
        ("size=1500k", r"runs\.dir: the checkpoint of step \d+ could not be"),
    ],
)
def test_a_full_disk_is_said_and_with_room_the_same_command_goes_on(
    room, says, tmp_path, tiny_tree, cache_dir
):
    import re

    if os.geteuid() or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        skip("needs root, to give a process mounts of its own")
    places = tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs")
    (tmp_path / "runs").mkdir()
    command = [sys.executable, str(ROOT / "jobs" / "train.py"), *places, "run.name=run"]
    disk = f"mount --make-rprivate / && mount -t tmpfs -o {room} tmpfs runs || exit 99"
    script = f'{disk}; "$@"; echo "ended: $?"; mount -o remount,size=100m runs && "$@"'
    done = subprocess.run(
        ["unshare", "-m", "bash", "-c", script, "bash", *command, "scaling.num_workers=0"],
        **{"cwd": tmp_path, "capture_output": True, "text": True, "timeout": 400},
    )
    assert "ended: 2\n" in done.stdout
    assert re.search(f"^error: {says}", done.stderr, re.MULTILINE), done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == 0, "there is room now"


PLAIN = {"doctor", "explore", "monitor"}
"""Jobs of flags, without a config."""


@pytest.mark.parametrize("name", sorted(p.stem for p in (ROOT / "jobs").glob("*.py")))
def test_help_and_config_of_every_job(name, tmp_path):
    done = run_job(name, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert f"uv run jobs/{name}.py" in done.stdout
    if name in PLAIN:
        assert "options:" in done.stdout
        return
    assert "keys (default):" in done.stdout
    assert run_job(name, "--cfg", cwd=tmp_path).returncode == 0


def test_kill_9_in_mid_epoch_then_the_same_command_ends_with_the_same_bits(
    tmp_path, tiny_tree, cache_dir
):
    def command(folder: str) -> list[str]:
        overrides = tiny_overrides(tiny_tree, cache_dir, tmp_path / folder)
        more = [
            "model.name=test_resnet",
            "loop.epochs=4",
            "loop.batch_size=8",
            "loop.log_every_steps=1",
        ]
        # dropout, so that random numbers matter; 6 updates an epoch, so that step 9 is in the middle of the second
        more += ["loop.checkpoint_every_steps=4", "model.kwargs.drop_rate=0.2", "run.name=run"]
        return [sys.executable, str(ROOT / "jobs" / "train.py"), *overrides, *more]

    subprocess.run(command("whole"), check=True, capture_output=True, timeout=180)
    folder = tmp_path / "broken" / "run"
    victim = subprocess.Popen(
        command("broken"), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not any(r["kind"] == "step" and r["step"] >= 9 for r in runs.read_journal(folder)):
        assert time.monotonic() < deadline
        assert victim.poll() is None, "it ended before it could be killed"
        time.sleep(0.005)
    victim.send_signal(signal.SIGKILL)
    victim.wait()
    assert not (folder / "summary.json").exists()
    done = subprocess.run(
        command("broken"), check=True, capture_output=True, text=True, timeout=180
    )
    assert "Resumed from step-" in done.stdout
    last = [runs.pick_checkpoint(tmp_path / d / "run", "last").folder for d in ("whole", "broken")]
    assert last[0].name == last[1].name == "step-00000024"
    assert (last[0] / "model.safetensors").read_bytes() == (
        last[1] / "model.safetensors"
    ).read_bytes()
    told = [
        runs.read_json(tmp_path / d / "run" / "training_history.json")["val_loss"]
        for d in ("whole", "broken")
    ]
    assert told[0] == told[1]


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path, tiny_tree, cache_dir, workers):
    overrides = [
        *tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs"),
        "loop.epochs=2000",
        f"scaling.num_workers={workers}",
        "run.name=run",
    ]
    command = [
        sys.executable,
        str(ROOT / "jobs" / "train.py"),
        *overrides,
        "loop.log_every_steps=1",
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    folder = tmp_path / "runs" / "run"
    while not any(r["kind"] == "step" and r["step"] >= 4 for r in runs.read_journal(folder)):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=90)
    assert process.returncode == 130
    assert err.startswith("stopped at step")
    assert "Traceback" not in out + err
    assert runs.read_json(folder / "summary.json")["status"] == "stopped"
    newest, _ = runs.newest_checkpoint(folder)
    assert newest is not None
    assert newest.step >= 4


def listens(process: psutil.Process) -> bool:
    """Whether the process catches SIGTERM."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    caught = next(line for line in lines if "SigCgt" in line)
    return bool(int(caught.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


def starts_ray(process: psutil.Process) -> bool:
    names = []
    for child in process.children(recursive=True):
        with contextlib.suppress(psutil.Error):
            names.append(child.name())
    return "gcs_server" in names


@pytest.mark.parametrize("moment", [listens, starts_ray])
def test_told_to_end_a_job_says_so_and_leaves_nothing(tmp_path, tiny_tree, moment):
    """By `ray job stop`, before it trains; a training saves first. Ray has a handler of its own, which says nothing."""
    job = subprocess.Popen(
        [sys.executable, str(ROOT / "jobs" / "prepare.py"), f"data.root={tiny_tree}"],
        **{"cwd": tmp_path, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True},
    )
    process = psutil.Process(job.pid)
    while not moment(process):
        assert job.poll() is None, job.communicate()
        time.sleep(0.01)
    started = process.children(recursive=True)
    job.terminate()
    _, err = job.communicate(timeout=60)
    assert job.returncode == 130, err
    assert err.endswith("stopped; the same command goes on from here\n")
    assert "Traceback" not in err
    _, alive = psutil.wait_procs(started, timeout=30)
    assert not alive


def test_told_to_end_where_nothing_can_be_raised_it_ends_all_the_same():
    """An exception of a finalizer, or of a callback of the import system, is only printed."""
    code = """
import os, signal, time
from potstill.config import _run
class Finalized:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)
def main(config):
    Finalized()
    time.sleep(60)
    print("it went on")
raise SystemExit(_run("train", main, ["data.root=photos"]))
"""
    env = {**os.environ, "PYTHONPATH": str(ROOT / "platform")}
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=90
    )
    assert (done.returncode, done.stdout) == (130, "")
    assert done.stderr == "stopped; the same command goes on from here\n"


@pytest.mark.slow
def test_quickstart_from_an_empty_folder(tmp_path):
    done = run_job("quickstart", cwd=tmp_path, timeout_s=1500)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    for noise in ("INFO", "WARNING", "ray::", "Token authentication"):
        assert noise not in done.stdout + done.stderr
    for word in (
        "teacher",
        "student alone",
        "student distilled",
        "Distillation:",
        "uv run jobs/explore.py --repo",
    ):
        assert word in done.stdout
    result = json.loads((tmp_path / "runs" / "quickstart" / "comparison.json").read_text())
    assert result["verdict"] in ("helped", "no difference", "hurt")
    assert len(result["alone"]["values"]) == len(result["distilled"]["values"]) == 3
    check = "from aim import Repo; print(len({m.run.hash for r in Repo('runs').query_metrics(\"metric.name == 'loss'\").iter_runs() for m in r}))"
    told = subprocess.run(
        [sys.executable, "-c", check], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert told.stdout.strip() == "7", told


def test_quickstart_small(tmp_path, cache_dir):
    """The same path with few images, so that every test run walks it."""
    done = run_job(
        "quickstart",
        "debug=true",
        "seeds=[0,1]",
        "tracking=none",
        f"cache.dir={cache_dir}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert "paired over 2 seeds" in done.stdout
    result = json.loads((tmp_path / "runs" / "quickstart" / "comparison.json").read_text())
    assert len(result["alone"]["values"]) == 2
    assert Path(tmp_path / "runs" / "quickstart" / "comparison.png").exists()
