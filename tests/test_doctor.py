"""Faults are planted one at a time: the check that is meant for it finds it, names the remedy, and finds nothing
where the fault is not."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import clusters
from conftest import ROOT, s3_bucket
from potstill import doctor, doctor_storage, runs
from potstill.doctor_cluster import clock_offset, clocks, look_over
from potstill.doctor_findings import Options
from synthetic_runs import make_run, whole_journal

Found = dict[str, list[dict[str, Any]]]


def examined(
    *arguments: str,
    cwd: Path | None = None,
    env: Mapping[str, str | None] | None = None,
    prefix: tuple[str, ...] = (),
    status: int | None = None,
    **options: Any,
) -> Found:
    """Its findings by name, of the command as a user gives it. `env`: None takes a variable away."""
    said = {k: v for k, v in {**os.environ, **(env or {})}.items() if v is not None}
    command = [*prefix, sys.executable, str(ROOT / "jobs" / "doctor.py"), "--json", *arguments]
    done = subprocess.run(
        command, cwd=cwd, env=said, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode in (0, 1), done.stderr
    result = json.loads(done.stdout)
    assert done.returncode == (0 if result["ok"] else 1)
    assert result["ok"] == (not any(c["status"] == "fail" for c in result["checks"]))
    if status is not None:
        assert done.returncode == status
    found: Found = {}
    for check in result["checks"]:
        assert check["remedies"] or check["status"] in ("pass", "skip"), check
        found.setdefault(check["name"], []).append(check)
    return found


def looked(*names: str, **options: Any) -> Found:
    """As `examined`, in this process: of checks that need none of their own."""
    found: Found = {}
    for each in doctor.examine(Options(wanted=names, **options)):
        assert each.remedies or each.status == "pass"
        found.setdefault(each.name, []).append(dataclasses.asdict(each))
    return found


def only(found: Found, name: str) -> dict[str, Any]:
    """The one finding of this name."""
    (one,) = found[name]
    return one


def well(found: Found) -> None:
    """But for a disk that is slow because others write: how busy this machine is is not a test's business."""
    bad = [c for checks in found.values() for c in checks if c["status"] != "pass"]
    assert not [c for c in bad if "writing is slow (" not in c["found"]]
    assert found


def hosts_mounts(*commands: str) -> tuple[str, ...]:
    """A prefix: the process has mounts of its own, made by these commands. Skips where that is not allowed."""
    if subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("needs root, to give a process mounts of its own")
    script = " && ".join(["mount --make-rprivate /", *commands, 'exec "$@"'])
    return ("unshare", "-m", "bash", "-c", script, "bash")


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that other accounts may enter; pytest's own they may not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


def modules(folder: Path, **sources: str) -> dict[str, str]:
    """An environment in which these modules come before the installed ones."""
    for name, source in sources.items():
        folder.mkdir(exist_ok=True)
        (folder / f"{name}.py").write_text(textwrap.dedent(source))
    return first(folder)


def first(folder: Path) -> dict[str, str]:
    """An environment in which what is in this folder comes before what is installed."""
    return {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT / 'platform'}"}


# ------------------------------------------------------------------------------------------- the machine
LIMITS = "cpus,memory,shared-memory,open-files,processes,inotify,temp"


def test_a_machine_without_faults(tmp_path):
    found = examined("--only", f"python,packages,{LIMITS},token", cwd=tmp_path)
    assert set(found) == {*LIMITS.split(","), "python", "packages", "token"}
    # how busy this machine is, is not the test's business
    well({name: f for name, f in found.items() if name not in ("cpus", "temp", "memory")})
    assert only(found, "packages")["values"]["versions"]["ray"].startswith("2.60.")


@pytest.mark.parametrize(
    ("name", "version", "status"), [("timm", "0.9.2", "fail"), ("aim", "2.0", "warn")]
)
def test_a_package_out_of_its_range(tmp_path, name, version, status):
    about = tmp_path / "site" / f"{name}-{version}.dist-info"
    about.mkdir(parents=True)
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    found = only(examined("--only", "packages", env=first(about.parent)), "packages")
    assert found["status"] == status
    assert found["found"].count(" is ") == 1
    assert f"{name} is {version}, not " in found["found"]
    (remedy,) = found["remedies"]
    assert remedy.startswith(f"uv sync, or pip install '{name}")


def test_a_package_that_another_one_needs(tmp_path):
    about = tmp_path / "sympy-0.7.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: sympy\nVersion: 0.7\n")
    found = only(examined("--only", "packages", env=first(tmp_path)), "packages")
    assert found["status"] == "fail"
    assert "sympy is 0.7, not >=" in found["found"]
    assert ", as torch needs" in found["found"]


def test_a_python_that_is_too_old():
    source = (
        "import runpy, sys; sys.version_info = (3, 9, 2, 'final', 0); sys.argv = ['doctor.py']; "
        f"runpy.run_path({str(ROOT / 'jobs' / 'doctor.py')!r}, run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", source], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "")
    assert "3.9.2" in done.stdout
    assert "→ uv run jobs/doctor.py" in done.stdout


def test_a_python_without_any_package():
    """The doctor itself needs none: a system's Python is told what it lacks."""
    # -S: no site-packages
    command = [
        sys.executable,
        "-S",
        str(ROOT / "jobs" / "doctor.py"),
        "--only",
        "python,packages,memory",
    ]
    done = subprocess.run(command, env={"PATH": os.environ["PATH"]}, capture_output=True, text=True)
    assert done.returncode == 1
    assert "✓ memory" in done.stdout
    assert "No module named 'packaging'" in done.stdout
    assert "→ uv sync" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_low_limit_of_open_files(monkeypatch):
    """ray.init raises the limit as far as it may; on a node, whose Ray was started before, it counts as it is."""

    def limited(soft: int, hard: int, **options: Any) -> dict[str, Any]:
        monkeypatch.setattr("resource.getrlimit", lambda _: (soft, hard))
        return only(looked("open-files", **options), "open-files")

    well({"open-files": [limited(1024, 20_000)]})
    found = limited(2048, 20_000, node=True)
    assert (found["status"], found["remedies"]) == (
        "warn",
        ("ulimit -n 20000, before `ray start`",),
    )
    assert "2,048" in found["found"]
    found = limited(1024, 4096)
    assert (found["status"], "limits.conf" in found["remedies"][0]) == ("warn", True)
    assert limited(512, 512)["status"] == "fail"
    well({"open-files": [limited(9000, 9000, node=True)]})
    well({"open-files": [limited(-1, -1, node=True)]})


def test_little_shared_memory():
    small = hosts_mounts("mount -t tmpfs -o size=64m tmpfs /dev/shm")
    found = only(examined("--only", "shared-memory", prefix=small, status=1), "shared-memory")
    assert found["status"] == "fail"
    assert "67 MB free of 67 MB in /dev/shm" in found["found"]
    assert "--shm-size" in found["remedies"][0]
    full = hosts_mounts(
        "mount -t tmpfs -o size=1200m tmpfs /dev/shm", "fallocate -l 900m /dev/shm/others"
    )
    found = only(examined("--only", "shared-memory", prefix=full, status=1), "shared-memory")
    assert found["remedies"] == ["remove what fills it: du -sh /dev/shm/*"]
    # on a node a Ray is at work, and may have filled it with its own
    well(examined("--only", "shared-memory", "--node", prefix=full, status=0))
    wide = hosts_mounts("mount -t tmpfs -o size=1200m tmpfs /dev/shm")
    well(examined("--only", "shared-memory", prefix=wide, status=0))


GROUPS = {
    "version 2": {
        "cpu.max": "150000 100000",
        "cpu.stat": "usage_usec 900000000\nnr_periods 7",
        "memory.max": "8000000000",
        "memory.current": "7500000000",
        "memory.stat": "anon 1\ninactive_file 2000000000\nactive_file 500000000\n",
        "pids.max": "5000",
        "pids.current": "4990",
    },
    "version 1": {
        "cpu/cpu.cfs_quota_us": "150000",
        "cpu/cpu.cfs_period_us": "100000",
        "cpu/cpuacct.usage": "900000000000",
        "memory/memory.limit_in_bytes": "8000000000",
        "memory/memory.usage_in_bytes": "7500000000",
        "memory/memory.stat": "total_inactive_file 2000000000\ntotal_active_file 500000000\n",
        "pids/pids.max": "5000",
        "pids/pids.current": "4990",
    },
}


@pytest.mark.parametrize("version", GROUPS)
def test_what_a_container_may_take(tmp_path, monkeypatch, version):
    """A limit of an outer group counts too, and what files have in memory is free to be taken."""
    from potstill import doctor_machine
    from potstill.control_groups import Groups

    old = version == "version 1"
    for name, content in GROUPS[version].items():
        kind, _, file = name.rpartition("/")
        inner = tmp_path / kind / "job" / "step"
        inner.mkdir(parents=True, exist_ok=True)
        (tmp_path / kind / "job" / file).write_text(content)
        used = {"cpu.stat": "usage_usec 1000000\n", "cpuacct.usage": "1000000000"}
        (inner / file).write_text(used.get(file) or ("-1" if "quota" in file else "max"))
    lines = ("3:cpu:/job/step", "2:memory:/job/step", "1:pids:/job/step", "0::/")
    (tmp_path / "own").write_text("\n".join(lines if old else ["0::/job/step"]))
    groups = Groups(tmp_path, tmp_path / "own")
    assert groups.cores() == 1.5
    assert groups.busy_s() == 900, "of the group that has this limit"
    assert groups.memory() == (5_000_000_000, 8_000_000_000)
    assert groups.processes() == (4990, 5000)

    monkeypatch.setattr(doctor_machine, "Groups", lambda: groups)
    monkeypatch.setattr(
        doctor_machine, "_meminfo", lambda: {"MemTotal": 64 * 10**9, "MemAvailable": 60 * 10**9}
    )
    options = Options(wanted=("memory", "processes"))
    memory, processes = (f for f in doctor_machine.limits(options) if isinstance(f, doctor.Finding))
    assert memory.found.startswith("3.0 GB free of 8.0 GB that the container may have")
    assert memory.status == "warn"
    assert (processes.status, processes.remedies) == ("fail", ("docker run --pids-limit=-1",))
    nothing = Groups(tmp_path / "none", tmp_path / "own")
    assert (nothing.cores(), nothing.memory(), nothing.processes()) == (None, None, None)


def test_a_machine_on_which_nothing_can_be_started(monkeypatch):
    def refused(*_: Any, **__: Any) -> Any:
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("subprocess.Popen", refused)
    found = doctor.examine(Options(wanted=("driver", "temp", "token")))
    assert {f.name: f.status for f in found} == {"driver": "fail", "temp": "fail", "token": "pass"}
    assert "nothing can be started to look at it (BlockingIOError" in found[0].found


def test_a_disk_that_is_full_to_the_last_byte():
    """No temporary file can be made, nor one where it was started."""
    places = [p for p in ("/tmp", "/var/tmp", "/usr/tmp", "/mnt") if Path(p).is_dir()]
    if any(Path(code).is_relative_to(p) for p in places for code in (ROOT, sys.prefix)):
        pytest.skip("the code lies in a folder that this test hides from it")
    mounts = [f"mount -t tmpfs -o size=4k tmpfs {p}" for p in places]
    fill = [f"head -c 4096 /dev/zero > {p}/x" for p in places]
    prefix = hosts_mounts(*mounts, *fill, "cd /mnt")
    found = examined("--only", "driver,temp,runs", prefix=prefix, status=1)
    assert only(found, "driver")["status"] == "pass"
    assert "100% full" in only(found, "temp")["found"]
    assert "a file cannot be written (No space left on device)" in only(found, "runs")["found"]
    assert "make room at /mnt" in only(found, "runs")["remedies"][0]


def test_a_full_disk_of_rays_sessions():
    full = "mount -t tmpfs -o size=200m tmpfs /mnt", "fallocate -l 195m /mnt/x"
    env: dict[str, str | None] = {"RAY_TMPDIR": "/mnt"}
    found = only(examined("--only", "temp", env=env, prefix=hosts_mounts(*full)), "temp")
    assert found["status"] == "fail"
    assert "above 95% Ray stores and spills no objects" in found["found"]
    assert "make room in /mnt" in found["remedies"][0]
    few = hosts_mounts("mount -t tmpfs -o size=4g,nr_inodes=500 tmpfs /mnt")
    found = only(examined("--only", "temp", env=env, prefix=few), "temp")
    assert (found["status"], "more files only" in found["found"]) == ("warn", True)
    wide = hosts_mounts("mount -t tmpfs -o size=4g tmpfs /mnt")
    well(examined("--only", "temp", env=env, prefix=wide))
    closed = hosts_mounts("mount -t tmpfs -o size=4g,ro tmpfs /mnt")
    found = only(examined("--only", "temp", env=env, prefix=closed), "temp")
    assert (found["status"], "may not write in /mnt" in found["found"]) == ("fail", True)
    # where Ray looks, rather than where Python does
    found = only(examined("--only", "temp", env={"RAY_TMPDIR": None, "TMPDIR": "/gone"}), "temp")
    assert (found["status"], found["found"]) == ("fail", "/gone does not exist")


TOKEN: dict[str, tuple[str | None, int, str, str]] = {
    "readable": ("secret", 0o644, "can be read by its group and all accounts", "chmod 600 "),
    "missing": (None, 0, "is missing", "ray get-auth-token --generate"),
    "empty": (" \n", 0o600, "is empty", "ray get-auth-token --generate"),
}


@pytest.fixture
def environment(monkeypatch) -> Callable[..., None]:
    """Sets variables; None takes one away."""

    def change(**variables: str | None) -> None:
        for name, value in variables.items():
            if value is None:
                monkeypatch.delenv(name, raising=False)
            else:
                monkeypatch.setenv(name, value)

    change(RAY_AUTH_MODE=None, RAY_AUTH_TOKEN=None, RAY_AUTH_TOKEN_PATH=None)
    return change


@pytest.mark.parametrize("fault", TOKEN)
def test_a_token_that_is_none_or_everybodys(open_folder, environment, fault):
    content, mode, said, remedy = TOKEN[fault]
    token = open_folder / "auth_token"
    environment(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH=str(token))
    if content is not None:
        token.write_text(content)
        token.chmod(mode)
    found = only(looked("token"), "token")
    assert (found["status"], found["found"]) == ("fail", f"{token} {said}")
    assert remedy in found["remedies"][0]
    if fault == "readable":
        subprocess.run(found["remedies"][0], shell=True, check=True)  # the remedy is one
    else:
        token.write_text("secret")
        token.chmod(0o600)
    well(looked("token"))


def test_a_token_that_ray_would_not_use(open_folder, environment):
    token = open_folder / "t"
    token.write_text("secret")
    token.chmod(0o600)
    environment(HOME=str(open_folder), RAY_AUTH_MODE="token", RAY_AUTH_TOKEN_PATH="~/t")
    found = only(looked("token"), "token")
    assert (found["status"], "does not expand the ~" in found["found"]) == ("fail", True)
    environment(RAY_AUTH_TOKEN_PATH=str(token), RAY_AUTH_MODE="tokens")
    found = only(looked("token"), "token")
    assert (found["status"], found["remedies"]) == ("fail", ("export RAY_AUTH_MODE=token",))
    # a cluster has its own: another one would not do
    environment(RAY_AUTH_TOKEN_PATH=str(open_folder / "none"), RAY_AUTH_MODE="token")
    found = only(looked("token", address="h:6379"), "token")
    assert (found["status"], found["remedies"][0][:10]) == ("fail", "copy the h")
    # nobody else can enter this folder
    environment(RAY_AUTH_TOKEN_PATH=str(token))
    token.chmod(0o644)
    open_folder.chmod(0o700)
    well(looked("token"))


def test_a_token_of_a_cluster_that_everybody_on_this_machine_can_read(open_folder, environment):
    """It is none the less one that this process does not use it."""
    environment(HOME=str(open_folder))
    well(looked("token"))
    token = open_folder / ".ray" / "auth_token"
    token.parent.mkdir()
    token.parent.chmod(0o755)
    token.write_text("secret")
    token.chmod(0o644)
    found = only(looked("token"), "token")
    assert found["status"] == "fail"
    assert "can be read by its group and all accounts" in found["found"]
    assert found["remedies"] == (f"chmod 600 {token}",)
    token.chmod(0o600)
    well(looked("token"))
    # a cluster that takes everybody, and one whose token this process leaves out
    found = only(looked("token", address="h:6379"), "token")
    assert (found["status"], found["remedies"]) == ("warn", ("export RAY_AUTH_MODE=token",))
    environment(RAY_AUTH_MODE="disabled")
    found = only(looked("token", address="h:6379"), "token")
    assert (found["status"], "may run anything" in found["found"]) == ("warn", True)


@pytest.mark.slow
def test_the_remedy_for_a_missing_token_is_one(open_folder):
    token = open_folder / "t"
    env = {
        "HOME": str(open_folder),
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    for content in (None, "\n"):
        if content is not None:
            token.write_text(content)
        (remedy,) = only(examined("--only", "token", env=env, status=1), "token")["remedies"]
        command = remedy.replace("uv run ", "")
        subprocess.run(["bash", "-c", command], env={**os.environ, **env}, check=True)
        well(examined("--only", "token", env=env, status=0))


# --------------------------------------------------------------------------------------------------- GPUs
NVML = """
class NVMLError(Exception): pass
class NVMLError_LibraryNotFound(NVMLError): pass
class NVMLError_LibRmVersionMismatch(NVMLError): pass
class NVMLError_NotSupported(NVMLError): pass
class NVMLError_GpuIsLost(NVMLError): value = 15
NVML_ERROR_GPU_IS_LOST = 15
class Memory: total, free = 80 * 10**9, {free}
class Process: pid, usedGpuMemory = 1, 30 * 10**9
NVML_TEMPERATURE_GPU = NVML_TEMPERATURE_THRESHOLD_SLOWDOWN = NVML_COMPUTEMODE_PROHIBITED = 2
NVML_COMPUTEMODE_EXCLUSIVE_PROCESS = 3
NVML_MEMORY_ERROR_TYPE_UNCORRECTED = NVML_VOLATILE_ECC = 1
def nvmlInit(): {init}
def nvmlSystemGetDriverVersion(): return "580.65"
def nvmlSystemGetCudaDriverVersion_v2(): return {cuda}
def nvmlDeviceGetCount(): return 1
def nvmlDeviceGetHandleByIndex(number): return number
def nvmlDeviceGetName(h): return "H200"
def nvmlDeviceGetMemoryInfo(h):
    if {lost}: raise NVMLError_GpuIsLost("GPU is lost")
    return Memory
def nvmlDeviceGetComputeRunningProcesses(h): return [Process] if Memory.free < 60e9 else []
def nvmlDeviceGetTotalEccErrors(h, *kind): return {errors}
def nvmlDeviceGetCudaComputeCapability(h): return (9, 0)
def nvmlDeviceGetComputeMode(h): return {mode}
def nvmlDeviceGetCurrentClocksThrottleReasons(h): return {slowed}
parts = {parts}
def nvmlDeviceGetMigMode(h): return (parts is not None, False)
def nvmlDeviceGetMaxMigDeviceCount(h): return 7
def nvmlDeviceGetMigDeviceHandleByIndex(h, at):
    if at >= parts: raise NVMLError_NotSupported()
    return at
"""


USUAL = {"free": 79 * 10**9, "init": "pass", "cuda": 13000, "errors": 0, "mode": 0}
USUAL |= {"slowed": 0x1 | 0x4, "parts": None, "lost": False}


def card(folder: Path, **faults: Any) -> dict[str, str]:
    """An environment with a driver for one card, which exists in nothing else: only failures are faked so."""
    return modules(folder, pynvml=NVML.format(**{**USUAL, **faults}))


@pytest.fixture
def asked(monkeypatch) -> Callable[..., Found]:
    """What is found of the driver and of a card with these faults."""
    from potstill import doctor_machine

    def ask(gpus: int | None = 1, **faults: Any) -> Found:
        driver: dict[str, Any] = {}
        exec(NVML.format(**{**USUAL, **faults}), driver)
        monkeypatch.setattr(doctor_machine, "_nvml", lambda: SimpleNamespace(**driver))
        found: Found = {}
        for step in doctor_machine.gpus(Options(wanted=("driver", "gpus"), gpus=gpus)):
            if isinstance(step, doctor.Finding):
                found.setdefault(step.name, []).append(dataclasses.asdict(step))
        return found

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return ask


def test_a_gpu_without_faults_and_with(asked, monkeypatch):
    found = asked()
    well(found)
    assert only(found, "gpus")["values"]["temperature_c"] is None  # this one does not say
    found = asked(free=50 * 10**9)
    assert [f["status"] for f in found["gpus"]] == ["warn", "warn"]
    assert "in use: process 1 (" in found["gpus"][0]["found"]
    assert "only 0 of 1 GPU" in found["gpus"][1]["found"]
    found = asked(errors=3)
    assert only(found, "gpus")["status"] == "fail"
    assert "3 uncorrected memory errors" in only(found, "gpus")["found"]
    found = asked(gpus=2)
    assert only(found, "driver")["status"] == "fail"
    assert "scaling.num_workers=1" in only(found, "driver")["remedies"][0]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    found = asked()
    assert set(found) == {"driver"}
    assert only(found, "driver")["remedies"] == ("unset CUDA_VISIBLE_DEVICES",)


@pytest.mark.parametrize(
    ("faults", "status", "said", "remedy"),
    [
        ({"mode": 2}, "fail", "set to take no work", "nvidia-smi -i 0 -c DEFAULT"),
        ({"mode": 3}, "warn", "one process at a time", "nvidia-smi -i 0 -c DEFAULT"),
        ({"lost": True}, "fail", "0: it does not answer (GPU is lost)", "restart the machine"),
        ({"slowed": 0x20}, "warn", "slowed down", "cooling"),
        ({"slowed": 0x80}, "warn", "slowed down", "power"),
        ({"parts": 0}, "fail", "MIG) and has none", "nvidia-smi -i 0 -mig 0"),
        ({"parts": 2, "free": 10**9}, "pass", "MIG, 2 parts", ""),
    ],
)
def test_a_gpu_that_is_not_as_it_should_be(asked, faults, status, said, remedy):
    found = only(asked(gpus=None, **faults), "gpus")
    assert (found["status"], said in found["found"]) == (status, True)
    assert remedy in "".join(found["remedies"])


def test_a_driver_that_is_broken_dies_or_hangs(tmp_path):
    broken = card(tmp_path, init="raise NVMLError_LibRmVersionMismatch('Mismatch')")
    found = only(examined("--only", "driver", env=broken), "driver")
    assert (found["status"], "updated under the running one" in found["remedies"][0]) == (
        "fail",
        True,
    )
    dies = card(tmp_path, init="import os; os.abort()")
    found = only(examined("--only", "driver", env=dies, status=1), "driver")
    assert "asking the driver: its process ended with SIGABRT" in found["found"]


def test_what_hangs_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setenv(
        "PYTHONPATH", card(tmp_path, init="import time; time.sleep(600)")["PYTHONPATH"]
    )
    options = Options(wanted=("driver", "token", "memory"))
    for limit_s in (2, 20):  # a busy machine may not come to the question within the first
        began = time.monotonic()
        found = doctor.examine(options, {"driver": float(limit_s)})
        assert time.monotonic() - began < limit_s + 8
        driver = next(f for f in found if f.name == "driver")
        if "starting" not in driver.found:
            break
    assert (driver.status, driver.found) == (
        "fail",
        f"asking the driver: no answer within {limit_s} s",
    )
    assert {f.name for f in found} == {"driver", "token", "memory"}


@pytest.mark.slow
def test_a_torch_that_cannot_use_the_gpu(tmp_path):
    """There is none, whatever this driver says; and one that is too old for torch."""
    import torch

    if torch.version.cuda is None or torch.cuda.is_available():
        pytest.skip("needs a torch that is built for CUDA, on a machine without")
    found = only(examined("--only", "cuda", "--gpus", "1", env=card(tmp_path)), "cuda")
    assert found["status"] == "fail"
    assert "the driver has 1 GPU, and torch cannot use any" in found["found"]
    found = only(examined("--only", "cuda", "--gpus", "1", env=card(tmp_path, cuda=11080)), "cuda")
    assert "the driver knows CUDA up to 11.8" in found["found"]
    assert "update the NVIDIA driver" in found["remedies"][0]


def test_a_torch_that_does_not_load(tmp_path):
    env = card(tmp_path)
    modules(tmp_path, torch="raise OSError('libcudart.so.13: cannot open shared object file')")
    found = only(examined("--only", "cuda", env=env), "cuda")
    assert "torch does not import (OSError: libcudart.so.13" in found["found"]
    assert found["remedies"] == ["uv sync"]


@pytest.mark.gpu
def test_a_real_gpu_computes():
    if not list(Path("/dev").glob("nvidia[0-9]*")):
        pytest.skip("no CUDA device")
    found = examined("--only", "driver,gpus,cuda", "--gpus", "1")
    assert only(found, "driver")["status"] == "pass"
    assert "GPU 0 computes" in only(found, "cuda")["found"]
    assert only(found, "cuda")["status"] == "pass"
    assert found["gpus"][0]["values"]["total_bytes"] > 1e9


@pytest.mark.slow
def test_each_package_loads():
    found = only(examined("--only", "imports"), "imports")
    assert found["status"] == "pass"
    assert {"torch", "torchvision", "ray", "numpy"} <= set(found["values"]["modules"])


BROKEN = """
    import importlib.machinery, sys
    class Broken:
        def __init__(self, error): self.error = error
        def create_module(self, spec): return None
        def exec_module(self, module): raise self.error
    class Finder:
        broken = {
            "safetensors": ImportError("no compiled part"),
            "torch": OSError("libcudart.so.13: cannot open shared object file"),
        }
        def find_spec(self, name, path=None, target=None):
            if name in self.broken:
                spec = importlib.machinery.PathFinder.find_spec(name, path)
                spec.loader = Broken(self.broken[name])
                return spec
    sys.meta_path.insert(0, Finder())
"""


def test_packages_that_do_not_load(tmp_path):
    """Two that are installed, and one in whose way another file stands."""
    env = modules(tmp_path, sitecustomize=BROKEN, optuna="")
    found = only(examined("--only", "imports", env=env, status=1), "imports")
    assert "safetensors does not import (ImportError: no compiled part)" in found["found"]
    assert "torch does not import (OSError: libcudart.so.13: cannot open" in found["found"]
    assert f"optuna is {tmp_path}/optuna.py, and not the installed one" in found["found"]
    assert "uv sync --reinstall-package safetensors" in found["remedies"]
    assert f"move {tmp_path}/optuna.py away, or see PYTHONPATH" in found["remedies"]


@pytest.mark.slow
def test_a_ray_of_our_own():
    found = only(examined("--only", "ray", env={"RAY_ADDRESS": None}), "ray")
    assert found["status"] == "pass"
    assert found["values"]["version"].startswith("2.60.")
    # its sockets have no room for their names
    far = Path("/tmp") / ("x" * 90)
    far.mkdir(exist_ok=True)
    try:
        env = {"RAY_ADDRESS": None, "RAY_TMPDIR": str(far)}
        found = examined("--only", "ray,temp", env=env)
        ray, temp = only(found, "ray"), only(found, "temp")
        assert ray["status"] == "fail"
        assert "starting a Ray on this machine" in ray["found"]
        assert "what this doctor says of temp and cpus" in ray["remedies"][0]
        assert "no room for the names of Ray's sockets" in temp["found"]
        assert "set RAY_TMPDIR to a folder of your own" in temp["remedies"][0]
    finally:
        shutil.rmtree(far)


# ------------------------------------------------------------------------------------------------ folders
SPACE = ("--need-gb", "0.01")


def test_folders_that_are_well_are_left_as_they_were(tmp_path):
    (tmp_path / "runs").mkdir()
    found = examined(
        "--only", "runs,cache,local-cache", "--local-cache", "nvme", *SPACE, cwd=tmp_path
    )
    well(found)
    assert "cache (to be made)" in only(found, "cache")["found"]
    assert only(found, "runs")["values"]["write_mb_per_s"] > 0
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "runs"]


def test_a_relative_folder_is_below_potstill_home(tmp_path):
    arguments = ("--only", "runs,local-cache", "--local-cache", "nvme", *SPACE)
    found = examined(*arguments, env={"POTSTILL_HOME": str(tmp_path)})
    assert only(found, "runs")["values"]["folder"] == str(tmp_path / "runs")
    assert only(found, "local-cache")["values"]["folder"] == str(tmp_path / "nvme")


def test_a_file_in_the_way_of_a_folder(tmp_path):
    (tmp_path / "runs").touch()
    (tmp_path / "cache").symlink_to("gone")
    found = examined("--only", "runs,cache", *SPACE, cwd=tmp_path, status=1)
    assert only(found, "runs")["found"] == f"{tmp_path}/runs is a file, not a folder"
    assert "runs.dir" in only(found, "runs")["remedies"][0]
    assert only(found, "cache")["found"] == f"{tmp_path}/cache is a link to nothing, not a folder"


def test_a_folder_that_cannot_be_written(tmp_path):
    at = tmp_path / "data"
    at.mkdir()
    prefix = hosts_mounts(f"mount --bind {at} {at}", f"mount -o remount,ro,bind {at}")
    arguments = ("--only", "runs,cache", "--runs", str(at / "runs"), *SPACE)
    found = examined(*arguments, cwd=tmp_path, prefix=prefix, status=1)
    assert "a folder cannot be made (Read-only file system)" in only(found, "runs")["found"]
    assert f"mount -o remount,rw {at}" in only(found, "runs")["remedies"][0]
    assert only(found, "cache")["status"] != "fail"
    well(examined(*arguments, cwd=tmp_path, prefix=hosts_mounts(f"mount --bind {at} {at}")))


def test_too_little_space(tmp_path):
    found = examined("--only", "runs", "--need-gb", "1e6", cwd=tmp_path, status=1)
    assert "less than the 1e+06 GB that are asked for" in only(found, "runs")["found"]
    assert "runs.dir" in only(found, "runs")["remedies"][0]
    # a disk of its own, and its room for files
    at = tmp_path / "cache"
    at.mkdir()
    small = hosts_mounts(f"mount -t tmpfs -o size=300m,nr_inodes=500 tmpfs {at}")
    found = only(examined("--only", "cache", cwd=tmp_path, prefix=small, status=1), "cache")
    assert "less than the 10 GB that are asked for" in found["found"]
    assert "is in memory" in found["found"]
    assert "more files only" in found["found"]
    assert f"uv run jobs/prepare.py --evict lru cache.dir={at} frees" in found["remedies"][0]


def test_locks_that_are_not_kept(tmp_path, monkeypatch):
    """As on a network mount without them: there flock is refused, or both get it."""
    options = Options(runs=str(tmp_path), need_gb=0, wanted=("runs",))

    def looked() -> Any:
        return [f for f in doctor_storage.runs(options) if isinstance(f, doctor.Finding)]

    monkeypatch.setattr(
        doctor_storage, "SLOW_MB_PER_S", 0.0
    )  # how busy the disk is is another matter
    assert [f.status for f in looked()] == ["pass"]
    monkeypatch.setattr("fcntl.flock", lambda *_: None)
    (found,) = looked()
    assert (found.status, "two processes could write one run" in found.found) == ("fail", True)

    def refused(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", refused)
    (found,) = looked()
    assert "files cannot be locked (No locks available)" in found.found
    assert "NFS 4" in found.remedies[0]


# ------------------------------------------------------------------------------------------ object stores
@pytest.fixture(scope="module")
def s3() -> Iterator[str]:
    """A server that speaks S3, with the bucket `kept`: the query of its URIs."""
    with s3_bucket("kept") as options:
        yield options


@contextlib.contextmanager
def refusing() -> Iterator[str]:
    """A server that answers every request as S3 does to somebody without rights."""

    class Refuse(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            said = b"<?xml version='1.0'?><Error><Code>AccessDenied</Code><Message>no</Message></Error>"
            self.send_response(403)
            self.send_header("Content-Length", str(len(said)))
            self.end_headers()
            self.wfile.write(said)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = _answer

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Refuse)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"endpoint_override=http://127.0.0.1:{server.server_port}&region=us-east-1"
    server.shutdown()


def test_an_object_store(tmp_path, s3):
    arguments = ("--only", "runs,runs-copy", *SPACE)
    found = examined(*arguments, "--runs", f"s3://kept/runs?{s3}", cwd=tmp_path)
    well(found)
    assert "put, listed, read and deleted" in only(found, "runs")["found"]
    assert "/copies/" in only(found, "runs-copy")["values"]["folder"]

    def of_runs(place: str) -> doctor.Finding:
        steps = doctor_storage.runs(Options(runs=place, wanted=("runs",)))
        return next(f for f in steps if isinstance(f, doctor.Finding))

    found = of_runs(f"s3://lost/runs?{s3}")
    assert (found.status, "in a bucket that does not exist" in found.found) == ("fail", True)
    assert "endpoint_override" in found.remedies[0]
    with refusing() as options:
        found = of_runs(f"s3://kept/runs?{options}")
    said = "'s3://kept/runs' refuses access, when putting an object"
    assert (found.status, found.found) == ("fail", said)
    assert "AWS_ACCESS_KEY_ID" in found.remedies[0]


class Store:
    """A bucket that refuses one of what is asked of it."""

    def __init__(self, refused: str) -> None:
        self.refused, self.objects = refused, {}

    def _ask(self, what: str) -> None:
        if what == self.refused:
            raise OSError("AWS Error ACCESS_DENIED")

    @contextlib.contextmanager
    def open_output_stream(self, path: str) -> Iterator[Any]:
        self._ask("put")
        yield SimpleNamespace(write=lambda content: self.objects.update({path: content}))

    def get_file_info(self, _: Any) -> list[Any]:
        self._ask("list")
        return [SimpleNamespace(path=path) for path in self.objects if self.refused != "show"]

    @contextlib.contextmanager
    def open_input_stream(self, path: str) -> Iterator[Any]:
        self._ask("read")
        yield SimpleNamespace(read=lambda: self.objects[path])

    def delete_file(self, path: str) -> None:
        self._ask("delete")
        del self.objects[path]


@pytest.mark.parametrize("refused", ["", "put", "list", "show", "read", "delete"])
def test_an_object_store_that_allows_half(refused):
    from potstill.data.files import locate
    from potstill.doctor_storage import put_and_get, why_not

    store, doing = Store(refused), ""
    try:
        for doing in put_and_get(store, "kept/runs", "abc"):  # noqa: B007
            pass
    except (OSError, ValueError) as error:
        said, remedy = why_not(locate("s3://kept/runs", "--runs"), doing, error)
        steps = {"put": "putting", "list": "listing", "show": "reading", "read": "reading"}
        assert f", when {steps.get(refused, 'deleting')} " in said
        assert remedy
    else:
        assert refused == ""
    assert bool(store.objects) == (refused == "delete")


def test_an_object_store_whose_clock_is_another():
    from potstill.data.files import locate
    from potstill.doctor_storage import why_not

    error = OSError("AWS Error UNKNOWN (HTTP status 403): RequestTimeTooSkewed")
    said, remedy = why_not(locate("s3://kept/runs", "--runs"), "putting an object", error)
    assert "the clock here is too far from its own" in said
    assert "chrony" in remedy


def test_an_object_store_that_does_not_answer(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:  # it listens, and says nothing
        place = f"s3://kept/runs?endpoint_override=http://127.0.0.1:{server.getsockname()[1]}"
        for limit_s in (2.0, 20.0):  # where the machine is busy, it takes a while to begin
            (found,) = doctor.examine(Options(runs=place, wanted=("runs",)), {"runs": limit_s})
            if not found.found.startswith("starting"):
                break
    assert found.status == "fail"
    assert found.found == f"asking s3://kept/runs: no answer within {limit_s:.0f} s"
    assert "endpoint_override" in found.remedies[0]


# ---------------------------------------------------------------------------------------------------- Aim
AIM = ("--only", "tracking")


@pytest.fixture(scope="module")
def tracked(tmp_path_factory) -> Path:
    """A folder of two runs, and Aim's repository with both, as trainings leave them."""
    from potstill.tracking import AimWriter

    root = tmp_path_factory.mktemp("tracked") / "runs"
    writer = AimWriter(root, lambda _: None)  # it misses the pictures
    for name in ("oak", "ash"):
        writer.follow(make_tracked(root, name))
    assert len(writer.close(120)) == 2
    return root


def make_tracked(root: Path, name: str) -> Path:
    run_dir = make_run(root, whole_journal(2), name)
    with open(run_dir / "config.yaml", "a") as config:
        config.write("tracking:\n  name: aim\n  repo: null\n")
    runs.write_json(run_dir / "summary.json", {"status": "finished"})
    return run_dir


@pytest.fixture
def repository(tracked, tmp_path) -> Path:
    """A copy of it, to be broken."""
    root = tmp_path / "runs"
    shutil.copytree(tracked, root)
    for path in root.glob("*/aim.json"):
        runs.write_json(path, {**runs.read_json(path), "repo": str(root)})
    return root


def hash_of(root: Path, name: str) -> str:
    return runs.read_json(root / name / "aim.json")["run"]


def but(found: Found, name: str) -> dict[str, Any]:
    """The finding of this name; all others are well."""
    well({other: checks for other, checks in found.items() if other != name})
    return only(found, name)


def test_aim_without_faults(repository):
    found = examined(*AIM, "--runs", str(repository), status=0)
    well(found)
    assert set(found) == {"aim", "aim-runs", "aim-index", "aim-journals", "aim-locks"}
    assert only(found, "aim-index")["found"] == "2 runs indexed"
    assert only(found, "aim-journals")["found"] == "2 runs that Aim was told of: all there"


def break_chunk(root: Path, name: str) -> None:
    chunk = max((root / ".aim/seqs/chunks" / hash_of(root, name)).glob("*.sst"))
    with open(chunk, "r+b") as file:
        file.seek(chunk.stat().st_size // 3)
        file.write(b"\xff" * 200)


def forget(root: Path, name: str) -> None:
    """Take a run out of the index, as where Aim had no time to write it there."""
    import aimrocks

    options = aimrocks.Options(create_if_missing=False, num_levels=4)
    index = aimrocks.DB(str(root / ".aim" / "meta" / "index"), options)
    prefix = b"meta\xfechunks\xfe" + hash_of(root, name).encode() + b"\xfe"
    records = index.iterkeys()
    records.seek(prefix)
    for key in [key for key in records if key.startswith(prefix)]:
        index.delete(key)


def test_an_aim_run_that_cannot_be_read_and_one_that_is_not_in_the_index(repository):
    break_chunk(repository, "ash")
    forget(repository, "oak")
    found = examined(*AIM, "--runs", str(repository), status=1)
    broken, behind = only(found, "aim-runs"), only(found, "aim-index")
    well({name: f for name, f in found.items() if name not in ("aim-runs", "aim-index")})

    assert broken["status"] == "fail"
    assert f"ash ({hash_of(repository, 'ash')}) cannot be read: Corruption" in broken["found"]
    assert broken["values"]["broken"] == [hash_of(repository, "ash")]
    told = (
        f"uv run jobs/report.py from_run={repository}/ash tracking=aim tracking.repo={repository}"
    )
    assert broken["remedies"][0].endswith(f" && {told}")

    assert behind["status"] == "warn"
    said = f"1 of 2 runs are not in the index as they are: oak ({hash_of(repository, 'oak')})"
    assert behind["found"] == said
    assert "jobs/explore.py" in behind["remedies"][0]


def leave_unindexed(root: Path, name: str) -> None:
    """Aim's index is another process's just then, as when an explorer is open."""
    import fcntl

    from potstill import tracking

    make_tracked(root, name)
    source = f"import potstill.tracking as t; t.INDEX_WAIT_S = 0; t.main([{str(root)!r}])"
    popen = subprocess.Popen

    def hasty(command: list[str], **options: Any) -> Any:
        return popen([command[0], "-P", "-c", source], **options)

    with open(root / ".aim/meta/index/LOCK", "r+b") as lock, pytest.MonkeyPatch.context() as patch:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        patch.setattr("potstill.tracking.subprocess.Popen", hasty)
        tracking.fill(root / name, root)


def test_an_aim_repository_of_another_account(tmp_path, monkeypatch):
    from potstill import aim_health

    repo = tmp_path / "my runs"
    for folder in ("meta/chunks", "seqs/chunks", "locks"):
        (repo / ".aim" / folder).mkdir(parents=True)
    health = aim_health.Health(repo, aim="3.29", exists=True, format="1.3")
    monkeypatch.setattr(aim_health, "examine", lambda *_: health)

    def found() -> doctor.Finding:
        steps = doctor_storage.aim(Options(runs=str(repo), wanted=("aim",)))
        return next(f for f in steps if isinstance(f, doctor.Finding))

    assert found().status == "pass"
    others = repo / ".aim" / "seqs" / "chunks"
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != others)
    assert found().status == "fail"
    assert f"this account may not write {others}" in found().found
    assert found().remedies[0].startswith(f"sudo chown -R $(id -un) '{repo}/.aim'")


@pytest.mark.slow
def test_the_remedies_for_aim_are_some(repository):
    leave_unindexed(repository, "elm")
    break_chunk(repository, "ash")
    found = examined(*AIM, "--runs", str(repository), status=1)
    programs = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}

    def follow(command: str) -> None:
        command = command.replace("uv run jobs/", f"{sys.executable} {ROOT}/jobs/").replace(
            "uv run ", ""
        )
        subprocess.run(
            ["bash", "-c", command], check=True, capture_output=True, env={**os.environ, **programs}
        )

    follow(only(found, "aim-runs")["remedies"][0].partition(" && ")[0])
    refill(repository, "ash")
    follow(only(found, "aim-index")["remedies"][0].partition(", or ")[2])
    well(examined(*AIM, "--runs", str(repository), status=0))


def refill(root: Path, name: str) -> None:
    """What jobs/report.py with tracking=aim does, without the pages."""
    from potstill.tracking import fill

    fill(root / name, root)


@pytest.mark.slow
def test_a_run_that_aim_does_not_have(repository):
    make_tracked(repository, "elm")
    found = but(examined(*AIM, "--runs", str(repository), status=0), "aim-journals")
    assert (found["status"], found["found"]) == ("warn", "Aim does not have elm")
    assert f"jobs/report.py from_run={repository}/elm tracking=aim" in found["remedies"][0]


LEAVE = """
import os, sys
from pathlib import Path
from potstill import tracking
tracking._TrainingRun.complete = lambda *_: (print("open", flush=True), os.kill(os.getpid(), 9))
tracking.main(sys.argv[1:])
"""


@pytest.mark.slow
def test_what_a_dead_writer_has_left(repository):
    run_dir = make_tracked(repository, "elm")
    child = subprocess.Popen(
        [sys.executable, "-c", LEAVE, str(repository)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    child.communicate(json.dumps({"follow": str(run_dir)}) + "\n")
    assert child.returncode == -9
    found = examined(*AIM, "--runs", str(repository), status=0)
    left = only(found, "aim-locks")
    assert left["status"] == "warn"
    assert (
        f"elm ({hash_of(repository, 'elm')}) was left open by a process that died" in left["found"]
    )
    refill(repository, "elm")
    well(examined(*AIM, "--runs", str(repository), status=0))


@pytest.mark.slow
def test_an_aim_repository_as_a_whole(repository):
    aim = repository / ".aim"
    shutil.move(aim / "meta/index", repository.parent / "index")
    found = but(examined(*AIM, "--runs", str(repository), status=0), "aim-index")
    assert "there is no index" in found["found"]
    shutil.move(repository.parent / "index", aim / "meta/index")

    table = max((aim / "meta/index").glob("*.sst"))
    content = table.read_bytes()
    table.write_bytes(content[: len(content) // 2])
    found = but(examined(*AIM, "--runs", str(repository), status=1), "aim-index")
    assert "the index is damaged: Corruption" in found["found"]
    table.write_bytes(content)

    (aim / "VERSION").write_text("9.0\n")
    found = only(examined(*AIM, "--runs", str(repository), status=1), "aim")
    assert "it is of format 9.0, and this Aim knows 1." in found["found"]
    assert "newer" in found["remedies"][0]
    (aim / "VERSION").write_text("0.9\n")
    found = only(examined(*AIM, "--runs", str(repository), status=1), "aim")
    assert "it is of format 0.9, and this Aim needs 1." in found["found"]
    assert "fill a new one from the journals" in found["remedies"][0]
    (aim / "VERSION").write_text("1.3\n")

    metadata = (aim / "run_metadata.sqlite").read_bytes()
    (aim / "run_metadata.sqlite").write_bytes(b"\0" * len(metadata))
    found = only(examined(*AIM, "--runs", str(repository), status=1), "aim")
    assert "run_metadata.sqlite" in found["found"]
    (aim / "run_metadata.sqlite").write_bytes(metadata)
    well(examined(*AIM, "--runs", str(repository), status=0))

    found = examined(*AIM, "--runs", str(repository.parent / "none"))
    assert "will be made by the first run" in only(found, "aim")["found"]


@pytest.mark.slow
def test_a_broken_aim_is_no_broken_run(repository, monkeypatch, tmp_path):
    broken = 'raise ImportError("libstdc++.so.6: version `GLIBCXX_3.4.32\' not found")'
    monkeypatch.setenv("PYTHONPATH", modules(tmp_path / "half", aimrocks=broken)["PYTHONPATH"])
    found = only(examined(*AIM, "--runs", str(repository), status=1), "aim")
    assert "GLIBCXX_3.4.32" in found["found"]
    assert not any("rm -rf" in remedy for remedy in found["remedies"])


@pytest.mark.slow
def test_a_reader_that_dies_names_the_run(repository, monkeypatch, tmp_path):
    """RocksDB may take the process down: another reader goes on behind that run."""
    from potstill import aim_health

    broken = hash_of(repository, "oak")
    hook = f"""
        import os, sys
        def hook(event, arguments):
            if event == "open" and {broken!r} in str(arguments[0]): os.abort()
        sys.addaudithook(hook)
    """
    monkeypatch.setenv("PYTHONPATH", modules(tmp_path / "hook", sitecustomize=hook)["PYTHONPATH"])
    health = aim_health.examine(repository)
    assert health.error == ""
    assert {r.hash: r.state for r in health.runs.values()} == {
        broken: "corrupt",
        hash_of(repository, "ash"): "indexed",
    }
    assert "status -6" in health.runs[broken].error


# ----------------------------------------------------------------------------------------------- clusters
def looked_over(*wanted: str, **options: Any) -> Found:
    """What the doctor finds in the cluster of `ray_session`."""
    found: Found = {}
    for step in look_over(Options(wanted=wanted, **options), 0.0):
        if isinstance(step, doctor.Finding):
            found.setdefault(step.name, []).append(dataclasses.asdict(step))
    return found


def test_a_cluster_of_one_node(ray_session, tmp_path):
    names = ("reach", "versions", "code", "roles", "clocks", "network", "runs-seen", "cache-seen")
    folders = {"runs": str(tmp_path / "a" / "runs"), "cache": str(tmp_path / "cache")}
    found = looked_over(*names, **folders)
    assert set(found) == set(names)
    well(found)
    assert list(tmp_path.iterdir()) == []


def test_an_object_store_of_every_node(ray_session, s3):
    places = {"runs": f"s3://kept/runs?{s3}"}
    with refusing() as options:
        places["cache"] = f"s3://kept/cache?{options}"
        found = looked_over("runs-seen", "cache-seen", **places)
    found = but(found, "cache-seen")
    assert found["status"] == "fail"
    assert found["found"].endswith("'s3://kept/cache' refuses access, when putting an object")
    (remedy,) = found["remedies"]
    assert "AWS_ACCESS_KEY_ID" in remedy
    assert remedy.endswith(" on every node (env_vars of runtime_env.yaml, or its role)")


def test_a_clock_that_is_ahead():
    for ahead_s, status in ((0.0, "pass"), (0.9, "pass"), (5.0, "warn"), (-45.0, "fail")):
        found = clocks({"h1": time.time, "h2": lambda ahead_s=ahead_s: time.time() + ahead_s})
        assert found.status == status
        assert found.values["offsets_s"] == pytest.approx({"h1": 0, "h2": ahead_s}, abs=0.2)
        if status != "pass":
            assert "chrony" in found.remedies[0]
            direction = "ahead" if ahead_s > 0 else "behind"
            assert found.found.startswith(f"h2 is {abs(ahead_s):.1f} s {direction}: ")


def test_a_node_that_goes_while_it_is_asked():
    """That is a finding, and the others are asked all the same."""

    def gone() -> float:
        raise TimeoutError("no answer")

    found = clocks({"h1": gone, "h2": lambda: time.time() + 5})
    assert found.status == "fail"
    assert "h1 does not tell the time (TimeoutError: no answer)" in found.found
    assert "h2 is 5.0 s ahead" in found.found


def test_what_a_check_of_a_cluster_trips_over_is_a_finding(ray_session, monkeypatch):
    monkeypatch.setattr("potstill.doctor_cluster._autoscaler", lambda *_: 1 / 0)
    found = looked_over("roles", "object-store", "clocks")
    assert only(found, "roles")["status"] == "fail"
    assert "looking for an autoscaler: ZeroDivisionError" in only(found, "roles")["found"]
    assert [only(found, n)["status"] for n in ("object-store", "clocks")] == ["pass", "pass"]


def test_locks_that_do_not_reach_other_nodes(ray_session, tmp_path, monkeypatch):
    """As on a network mount whose locks are each host's own."""
    monkeypatch.setattr("fcntl.flock", lambda *_: None)  # of this process
    found = only(looked_over("runs-seen", runs=str(tmp_path)), "runs-seen")
    assert found["status"] == "fail"
    assert "it can lock what is locked here: two processes could write one run" in found["found"]


def test_a_host_whose_name_is_not_its_address(monkeypatch):
    from potstill.doctor_cluster import _unknown_to_gloo, called_by_its_name

    def named(address: str, gloo: str = "") -> int:
        monkeypatch.setattr("socket.gethostbyname", lambda _: address)
        about = {"h": {"called": called_by_its_name(), "gloo": gloo}}
        problems = _unknown_to_gloo(about)
        assert all("GLOO_SOCKET_IFNAME" in remedy for _, _, remedy in problems)
        return len(problems)

    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(("192.0.2.1", 9))  # nothing is sent
        own = probe.getsockname()[0]
    assert named(own) == 0
    assert named("127.0.1.1") == 1
    assert named("192.0.2.7") == 1  # another's
    assert named("127.0.1.1", gloo="eth0") == 0

    def unknown(_: str) -> str:
        raise OSError(-2, "Name or service not known")

    monkeypatch.setattr("socket.gethostbyname", unknown)
    assert called_by_its_name() == "none of its own (Name or service not known)"


@pytest.mark.parametrize(
    ("host", "status", "mode", "found"),
    [
        ("127.0.0.1", 401, "token", "pass"),
        ("127.0.0.1", 200, "disabled", "pass"),
        ("127.0.0.1", 200, "token", "warn"),  # the cluster was started without
        ("0.0.0.0", 401, "token", "pass"),
        ("0.0.0.0", 200, "disabled", "warn"),
        ("127.0.0.1", None, "token", "warn"),
    ],
)
def test_a_dashboard_that_lets_everybody_in(monkeypatch, host, status, mode, found):
    from potstill.doctor_cluster import _judged_dashboard, _Node

    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if status is not None:
                self.send_response(status)
                self.send_header("Content-Length", "0")
                self.end_headers()

        def log_message(self, *_: Any) -> None:
            pass

    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    server = ThreadingHTTPServer((host, 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        seen = _Node().dashboard(server.server_port)
    finally:
        server.shutdown()
        server.server_close()
    assert seen["open"] == (host == "0.0.0.0")
    judged = _judged_dashboard(server.server_port, seen)
    assert judged.status == found
    assert bool(judged.remedies) == (found != "pass")
    asks = {200: "asks for no token", 401: "asks for the token", None: "answers nothing"}
    assert asks[status] in judged.found


def test_the_fastest_round_trip_tells_the_offset():
    """One clock, whose answers take 0.2 s there and none back, but for one."""
    now, trips = [100.0], iter([0.2, 0.2, 0.004, 0.2, 0.2])

    def ask() -> float:
        now[0] += next(trips)
        return now[0] + 7.0

    offset, unsure = clock_offset(ask, lambda: now[0], trips=5)
    assert unsure == pytest.approx(0.002)
    assert offset == pytest.approx(7.002)
    assert abs(offset - 7.0) <= unsure + 1e-9


def test_an_address_where_nobody_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    found = examined("--only", "cluster", "--address", f"127.0.0.1:{port}", status=1)
    assert set(found) == {"reach"}
    assert f"127.0.0.1:{port} does not answer (Connection refused)" in only(found, "reach")["found"]
    assert "RAY_ADDRESS" in only(found, "reach")["remedies"][0]
    found = only(examined("--only", "cluster", "--address", "a..b:6379", status=1), "reach")
    assert "a..b:6379 does not answer" in found["found"]


def test_the_ray_of_this_machine_where_there_is_none(tmp_path):
    env = {"RAY_TMPDIR": str(tmp_path), "RAY_ADDRESS": "auto"}
    # of processes it sees its own alone
    alone = ("unshare", "--pid", "--fork", "--mount-proc")
    if subprocess.run([*alone, "true"], capture_output=True).returncode:
        pytest.skip("needs root, to give a process a table of processes of its own")
    found = only(examined("--only", "cluster", env=env, prefix=alone, status=1), "reach")
    assert found["found"] == "no Ray runs on this machine that auto could stand for"
    assert "ray status" in found["remedies"][0]


@pytest.mark.slow
def test_an_address_where_something_else_answers():
    with socket.create_server(("127.0.0.1", 0)) as server:  # it listens, and says nothing
        address = f"127.0.0.1:{server.getsockname()[1]}"
        began = time.monotonic()
        found = examined("--only", "cluster", "--address", address, status=1)
        assert time.monotonic() - began < 100
    assert "answers, but not as the head of a Ray" in only(found, "reach")["found"]


@pytest.fixture(scope="module")
def hosts() -> Iterator[Callable[..., Any]]:
    """A cluster with a token, whose head is a host of its own. `hosts.join(*commands)` adds a node of which these
    commands, given on it first, make something worse."""
    clusters.refuse_without_namespaces()
    base = Path(tempfile.mkdtemp(prefix="psd", dir="/tmp"))
    base.chmod(0o755)
    for name, content in (("token", "secret"), ("wrong", "another")):
        (base / name).write_text(content)
        (base / name).chmod(0o600)
    env = {
        "PATH": f"{clusters.BIN}:{os.environ['PATH']}",
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(base / "token"),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ADDRESS": "10.77.0.1:6379",
        "POTSTILL_HOME": str(base / "home"),
    }
    (base / "home").mkdir()
    net = f"psd{os.getpid()}"
    subprocess.run(["ip", "netns", "add", net], check=True)
    head = clusters.Host(net, env)
    common = ("--object-store-memory", "300000000", "--num-cpus")

    def join(*commands: str, role: str = "data") -> None:
        at = "unshare -m -u bash -c"
        start = (
            f"ray start --address 10.77.0.1:6379 --node-ip-address 10.77.0.2 {' '.join(common)} 1"
        )
        labels = f"--labels potstill.io/role={role}"
        script = " && ".join(
            ["mount --make-rprivate /", "hostname h2", *commands, f"{start} {labels}"]
        )
        clusters.Host(net, {**env, "RAY_ADDRESS": ""}, at.split()).run(script)

    try:
        head.run("ip", "link", "set", "lo", "up")
        for number in (1, 2):
            head.run("ip", "addr", "add", f"10.77.0.{number}/24", "dev", "lo")
        started = ("--head", "--port", "6379", "--node-ip-address", "10.77.0.1", *common, "0")
        place = ("--temp-dir", str(base / "ray"), "--labels", "potstill.io/role=head")
        clusters.Host(net, {**env, "RAY_ADDRESS": ""}).run(
            *("ray", "start", *started, *place, "--dashboard-host", "0.0.0.0")
        )
        yield SimpleNamespace(head=head, join=join, base=base, env=env)
    finally:
        head.end()
        subprocess.run(["ip", "netns", "del", net], check=False)
        shutil.rmtree(base, ignore_errors=True)


@pytest.mark.slow
def test_the_faults_of_a_cluster(hosts):
    def looked(*names: str, **env: str | None) -> Found:
        said = {**hosts.env, "PYTHONPATH": None, **env}
        arguments = ("--only", ",".join(names), *SPACE)
        return examined(*arguments, env=said, prefix=tuple(hosts.head.prefix), cwd=hosts.base)

    # the head alone
    whole = ("token", "cluster", "runs-seen", "cache-seen")
    found = looked(*whole)
    well({name: f for name, f in found.items() if name not in ("roles", "dashboard", "nodes")})
    assert {f["status"] for f in found["nodes"]} <= {
        "pass",
        "warn",
    }  # of this machine: busy, or its disk full
    # Ray's token keeps strangers out of what is open to the network
    dashboard = only(found, "dashboard")
    assert dashboard["found"] == "port 8265 on every interface, asks for the token"
    roles = only(found, "roles")
    assert roles["status"] == "fail"
    assert "no node has potstill.io/role=data: such work would wait for ever" in roles["found"]

    found = looked("token", "cluster", RAY_AUTH_TOKEN_PATH=str(hosts.base / "wrong"))
    assert only(found, "token")["status"] == "pass"
    assert "refuses this token" in only(found, "reach")["found"]
    assert "RAY_AUTH_MODE=token on both sides" in only(found, "reach")["remedies"][0]
    found = looked("token", "cluster", RAY_AUTH_MODE=None)
    assert only(found, "token")["status"] == "warn"
    assert "refuses this token" in only(found, "reach")["found"]

    # a machine that reaches the head, and has no Ray of its own
    apart = (*hosts.head.prefix, *hosts_mounts(f"mount -t tmpfs tmpfs {hosts.base / 'ray'}"))
    stranger = {**hosts.env, "PYTHONPATH": None}
    found = examined("--only", "cluster", env=stranger, prefix=apart, cwd=hosts.base)
    assert only(found, "reach")["found"] == "this machine is no node of 10.77.0.1:6379"
    assert "ray job submit" in only(found, "reach")["remedies"][0]

    # a second host with a disk, a shared memory, a potstill and a timm of its own, and a low limit
    other, timm = hosts.base / "other", hosts.base / "timm"
    shutil.copytree(ROOT / "platform" / "potstill", other)
    (other / "loop.py").write_text((other / "loop.py").read_text() + "\n# a change\n")
    about = metadata.distribution("timm")
    installed = Path(str(about.locate_file(f"timm-{about.version}.dist-info")))
    shutil.copytree(installed, timm)
    (timm / "METADATA").write_text("Metadata-Version: 2.1\nName: timm\nVersion: 0.9.2\n")
    hosts.join(
        f"mount -t tmpfs -o size=99m tmpfs {hosts.base / 'home'}",
        "mount -t tmpfs -o size=400m tmpfs /dev/shm",
        f"mount --bind {other} {ROOT / 'platform' / 'potstill'}",
        f"mount --bind {timm} {installed}",
        "ulimit -n 4000",
    )
    name = "h2 (10.77.0.2)"
    found = looked(*whole)
    assert "2 nodes" in only(found, "reach")["found"]
    code = only(found, "code")
    assert code["status"] == "fail"
    assert code["found"].startswith(f"{name} has another potstill (")
    assert "--working-dir . --runtime-env runtime_env.yaml" in code["remedies"][0]
    versions = only(found, "versions")
    assert versions["status"] == "fail"
    assert f"0.9.2 on {name}" in versions["found"]
    assert versions["found"].count("differs") == 1
    cache = only(found, "cache-seen")
    assert cache["status"] == "warn"
    assert f"not seen by {name}" in cache["found"]
    assert "a shared mount" in cache["remedies"][0]
    assert only(found, "runs-seen")["status"] == "pass"
    at_node = {
        f["values"].get("check"): f for f in found["nodes"] if f["values"].get("node") == name
    }
    assert at_node["shared-memory"]["status"] == "fail"
    assert at_node["open-files"]["status"] == "warn"
    assert at_node["packages"]["status"] == "fail"
    assert {"clocks", "network", "object-store"} <= found.keys()
    assert only(found, "clocks")["status"] == "pass"
    assert "train: such work would wait for ever" in only(found, "roles")["found"]


@pytest.mark.slow
def test_a_submitted_doctor_knows_what_the_autoscaler_may_start():
    with clusters.autoscaling_cluster() as cluster:
        for gpus, status in (("2", "SUCCEEDED"), ("3", "FAILED")):
            job = cluster.submit("doctor", "--only", "reach,code,roles,token", "--gpus", gpus)
            assert cluster.ended(job).startswith(status)
            log = cluster.logs(job)
            assert "the autoscaler starts data (up to 2), train (up to 2)" in " ".join(log.split())
            assert "✓ code" in log
            assert ("✗ roles" in log) == (status == "FAILED")


# -------------------------------------------------------------------------------------------- the command
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "tokn"], "--only must name checks, got 'tokn'; did you mean token?"),
        (["--need-gb", "-1"], "--need-gb must be a number >= 0, got -1"),
        (["--gpus", "-1"], "--gpus must be >= 0, got -1"),
        (
            ["--address", "http://127.0.0.1:8265"],
            "--address must be host:port of the cluster's head",
        ),
        (["--address", "h:66666"], "--address must be host:port of the cluster's head"),
        (["runs.dir=/a b"], "write --runs '/a b', got 'runs.dir=/a b'"),
        (["--run-all"], "it knows no '--run-all'; --help lists what it knows"),
        (
            ["--runs", "ftp://host/runs"],
            "--runs must be a path, or a URI of s3://, gs:// or file://",
        ),
        (["--skip", "this machine,cluster,storage,tracking"], "--skip must leave a check"),
    ],
)
def test_wrong_usage(arguments, said, capsys):
    with pytest.raises(SystemExit) as ended:
        doctor.command(arguments, "")
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_the_table(open_folder):
    """What a user sees, at 72 columns."""
    token = open_folder / "t"
    token.write_text("secret")
    token.chmod(0o640)
    env = {
        **os.environ,
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN_PATH": str(token),
        "COLUMNS": "72",
    }
    command = [
        sys.executable,
        str(ROOT / "jobs/doctor.py"),
        "--only",
        "token,open-files,runs",
        *SPACE,
    ]
    done = subprocess.run(command, env=env, capture_output=True, text=True, cwd=open_folder)
    assert done.returncode == 1
    lines = done.stdout.splitlines()
    assert lines[0] == "this machine"
    assert lines[1].startswith(" ✓ open-files  ")
    assert lines[2] == f" ✗ token       {token} can be read by its group"
    assert lines[3] == f"               → chmod 600 {token}"
    assert lines[4:6] == ["", "storage"]
    assert re.match(rf" [✓!] runs        {open_folder}/runs \(to be made\):", lines[6])
    assert re.match(r"2 well, 1 failed \(|1 well, 1 warning, 1 failed \(", lines[-1])
    assert all(len(line) <= 72 for line in lines)


def test_an_address_from_the_environment_is_called_by_its_name(monkeypatch, capsys):
    monkeypatch.setenv("RAY_ADDRESS", "ray://h:10001")
    with pytest.raises(SystemExit):
        doctor.command([], "")
    assert "RAY_ADDRESS must be host:port" in capsys.readouterr().err


def test_who_stops_it_leaves_nothing_behind(tmp_path):
    """`ray job stop` sends SIGTERM."""
    mark = tmp_path / "pid"
    hangs = f"(open({str(mark)!r}, 'w').write(str(__import__('os').getpid())), __import__('time').sleep(600))"
    env = {**os.environ, **card(tmp_path, init=hangs)}
    command = [sys.executable, str(ROOT / "jobs/doctor.py"), "--only", "driver"]
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    while not (mark.exists() and mark.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(mark.read_text())
    process.terminate()
    assert process.communicate(timeout=20) == (b"", b"")
    assert process.returncode == 130
    while Path(f"/proc/{child}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{child}").exists()


@pytest.mark.parametrize("flags", [[], ["--json"]])
def test_a_reader_that_has_seen_enough(flags):
    """`doctor.py | head -1`"""
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, str(ROOT / "jobs/doctor.py"), "--only", "memory", *flags]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert done.stderr == ""


def test_strict_takes_a_warning_for_a_failure(monkeypatch, capsys):
    monkeypatch.setattr("resource.getrlimit", lambda _: (2048, 4096))
    assert doctor.command(["--only", "open-files"], "") == 0
    assert doctor.command(["--only", "open-files", "--strict"], "") == 1
    capsys.readouterr()


def test_every_check_has_a_group_and_one_who_makes_it():
    made = [name for runner in doctor._RUNNERS for name in runner.names]
    assert sorted(made) == sorted(doctor.NAMES)
