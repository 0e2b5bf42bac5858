"""Who joins a cluster hears why not; the rest of cluster.py is seen on clusters (test_cluster_*.py)."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import run_job
from potstill import cluster
from potstill.errors import RunFailed, UserError


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        return taken.getsockname()[1]


def test_an_address_that_nobody_has_is_said(tiny_tree: Path, tmp_path: Path, monkeypatch):
    address = f"127.0.0.1:{free_port()}"
    monkeypatch.setenv("RAY_ADDRESS", address)
    done = run_job(
        "train", f"data.root={tiny_tree}", "loop.batch_size=16", "scaling=cpu", cwd=tmp_path
    )
    assert done.returncode == 2, "Ray itself ends the process with 15, after 80 s"
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith(
        f"error: RAY_ADDRESS must be <host>:<port> of a cluster's head that runs, got {address}"
    )
    assert "unset it" in line


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Failed to connect to Ray cluster"),
        RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.50.0"),
    ],
)
def test_a_cluster_that_lets_nobody_in_without_its_token(error: Exception, monkeypatch):
    import ray

    def refuse(**options: object) -> None:
        raise error

    monkeypatch.setattr(ray, "init", refuse)
    with socket.create_server(("127.0.0.1", 0)) as head:
        monkeypatch.setenv("RAY_ADDRESS", f"127.0.0.1:{head.getsockname()[1]}")
        with pytest.raises(UserError, match="RAY_ADDRESS must be a cluster that lets") as told:
            cluster._join()
    assert str(error).splitlines()[0] in str(told.value)
    assert "RAY_AUTH_TOKEN_PATH" in str(told.value)


def test_a_ray_that_does_not_start_is_said_in_a_line(monkeypatch):
    import ray

    def refuse(*args: object, **options: object) -> None:
        raise Exception("The current node timed out during startup. This could\nhappen because")

    monkeypatch.setattr(ray, "init", refuse)
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    with pytest.raises(
        RunFailed, match=r"^Ray did not start on this machine \(The current node"
    ) as told:
        cluster.start_ray()
    assert "\n" not in str(told.value)
    assert "jobs/doctor.py" in str(told.value)


@pytest.mark.parametrize("said", [None, "1"])
def test_a_ray_of_its_own_is_not_warned_and_no_other_hears_of_that(said, tmp_path, monkeypatch):
    """Of a spot machine that is taken back, of which a cluster, joined later, must be told."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    monkeypatch.delenv(name, raising=False)
    if said:
        monkeypatch.setenv(name, said)
    script = (
        f"import os, ray; from potstill.cluster import start_ray; start_ray(1); told = os.environ.get({name!r})\n"
        f"there = ray.remote(lambda: os.environ.get({name!r}))\n"
        "print(told, ray.get(there.remote()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=240
    )
    assert done.stdout == ("1 1\n" if said else "None 0\n"), done.stderr


def test_ray_leaves_sigterm_to_the_job(tmp_path: Path):
    script = (
        "import signal; from potstill.cluster import start_ray; ours = signal.default_int_handler\n"
        "signal.signal(signal.SIGTERM, ours); start_ray(1)\n"
        "assert signal.getsignal(signal.SIGTERM) is ours"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_rays_token_is_its_owners_alone(tmp_path: Path):
    token = tmp_path / "auth_token"
    token.write_text("a" * 64)
    token.chmod(0o644)
    cluster._keep_to_owner(token)
    assert token.stat().st_mode & 0o777 == 0o600
    cluster._keep_to_owner(tmp_path / "none")
