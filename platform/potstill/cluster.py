"""One quiet Ray for whoever needs it, and what of a cluster's nodes does which work.

A cluster whose nodes carry the label `potstill.io/role` (see cluster.yaml) keeps work apart: head takes none, data
reads and decodes images, train has GPUs. What asks for a role waits for such a node, and the autoscaler starts one of
that kind and of no other.
"""

from __future__ import annotations

import copy
import logging
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from potstill import console
from potstill.errors import RunFailed, UserError

ROLE = "potstill.io/role"
ROLES = ("head", "data", "train")
WAITING_FIRST_S, WAITING_AGAIN_S = 15.0, 120.0
ANSWER_S = 10.0


def start_ray(num_cpus: int | None = None) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of our own on this machine. Idempotent.

    Returns whether this call started one, which its caller may then shut down. Raises UserError for a cluster that does
    not answer or does not let us in, RunFailed where no Ray starts here.

    Ray's console output stays out of ours; its logs are under /tmp/ray/session_latest/logs.
    """
    # `uv run` would otherwise pack the working directory and start every worker through uv
    os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Ray's own 15 lets a training starve beside whatever else the machine does
    os.environ.setdefault("RAY_worker_niceness", "5")
    os.environ.setdefault("RAY_TRAIN_HEALTH_CHECK_INTERVAL_S", "0.5")
    import ray

    if ray.is_initialized():
        return False
    logging.getLogger("ray").setLevel(logging.ERROR)
    quiet = {"log_to_driver": False, "configure_logging": False, "logging_level": "ERROR"}
    with _keeping_sigterm():
        return _start(num_cpus, quiet)


@contextmanager
def _keeping_sigterm() -> Iterator[None]:
    """Ray puts a handler in the place of ours, after which `ray job stop` would end a job without a word."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    except SystemExit as ended:  # by Ray's own, while it starts
        if ended.code == signal.SIGTERM and callable(before):
            raise KeyboardInterrupt from None
        raise
    finally:
        if callable(before) and threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


def _start(num_cpus: int | None, quiet: dict[str, Any]) -> bool:
    import ray

    if os.environ.get("RAY_ADDRESS"):
        _join(**quiet)
        return False
    # "local": a file of Ray's may name a cluster that somebody has started on this machine
    about = {"num_cpus": num_cpus, "include_dashboard": False, "object_store_memory": 512 << 20}
    try:
        with _nobody_to_warn():
            ray.init("local", **about, **quiet)
    except Exception as error:  # whatever its parts died of
        ray.shutdown()
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise RunFailed(
            f"Ray did not start on this machine ({why}); it gives its processes 30 s, so wait for what else runs here, or "
            "see jobs/doctor.py --only ray,temp,memory,cpus and Ray's logs in /tmp/ray/session_latest/logs"
        ) from error
    _keep_to_owner(Path("~/.ray/auth_token").expanduser())
    return True


@contextmanager
def _nobody_to_warn() -> Iterator[None]:
    """One machine has nobody to warn of its preemption. A cluster that this process joins later has, and so have those
    that its children join."""
    name = "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER"
    said = name in os.environ
    os.environ.setdefault(name, "0")
    try:
        yield
    finally:
        if not said:
            os.environ.pop(name, None)


def _join(**options: Any) -> None:
    """Join the cluster of RAY_ADDRESS. Ray itself tries an address that nobody has for a minute, then exits."""
    import ray

    address = os.environ["RAY_ADDRESS"]
    host, _, port = address.rpartition(":")
    if port.isdigit() and "/" not in host:
        try:
            socket.create_connection((host.strip("[]"), int(port)), ANSWER_S).close()
        except (OSError, OverflowError) as error:
            raise UserError(
                f"RAY_ADDRESS must be <host>:<port> of a cluster's head that runs, got {address} ({error}); correct it, "
                "or unset it: a private Ray is then started on this machine"
            ) from error
    try:
        ray.init(**options)
    except (ConnectionError, RuntimeError, ValueError) as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"RAY_ADDRESS must be a cluster that lets this machine in, got {address} ({why}); it wants its own token "
            "(RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token) and its own version of Ray: "
            f"jobs/doctor.py --address {address} tells which"
        ) from error


def _keep_to_owner(token: Path) -> None:
    """Ray makes its token readable to whoever can reach the file; with it one may run code as this user."""
    with suppress(OSError):
        if token.stat().st_mode & 0o077:
            token.chmod(0o600)


def alive_nodes() -> list[dict[str, Any]]:
    """Of each node that is there, Ray's own record: NodeID, NodeManagerAddress, Resources, Labels, …"""
    import ray

    return [node for node in ray.nodes() if node["Alive"]]


def has_roles() -> bool:
    """Whether this cluster's nodes say what work they take."""
    return any(ROLE in node["Labels"] for node in alive_nodes())


def gpus_by_default(gpus_there: float, workers: int) -> bool:
    """What scaling.use_gpu=null means: where nodes come when they are asked for, those with GPUs are for training."""
    return gpus_there >= workers or bool(os.environ.get("RAY_ADDRESS") and has_roles())


def nodes_with(labels: Mapping[str, str]) -> list[dict[str, Any]]:
    """The nodes that are there and have these labels. Where a label is an expression of Ray's, none."""
    return [n for n in alive_nodes() if all(n["Labels"].get(k) == v for k, v in labels.items())]


def selector(role: str, labels: Mapping[str, str] | None = None) -> dict[str, str]:
    """The labels of nodes that do a kind of work; none where nodes have no roles. `labels`: further ones to ask for, of
    a cluster: this machine is taken as it is."""
    further = labels if labels and os.environ.get("RAY_ADDRESS") else {}
    return {**({ROLE: role} if has_roles() else {}), **further}


def shown(labels: Mapping[str, str]) -> str:
    """` on nodes of …`, or nothing."""
    return f" on nodes of {', '.join(f'{k}={v}' for k, v in labels.items())}" if labels else ""


@contextmanager
def said_while_waiting(what: str, begun: Callable[[], bool]) -> Iterator[None]:
    """On a cluster, say now and then what is waited for until work has begun: nodes start in minutes, or never."""
    over = threading.Event()
    started = time.monotonic()

    def look() -> None:
        import ray

        due = started + WAITING_FIRST_S
        while not over.wait(0.5) and not begun():
            if time.monotonic() < due:
                continue
            free = ray.available_resources()
            console.say(
                f"Waiting for {what} for {console.duration(time.monotonic() - started)}; free now: "
                f"{free.get('CPU', 0):g} CPU, {free.get('GPU', 0):g} GPU (`ray status` tells what the autoscaler does)"
            )
            due += WAITING_AGAIN_S

    thread = threading.Thread(target=look, name="waiting", daemon=True)
    if os.environ.get("RAY_ADDRESS"):
        thread.start()
    try:
        yield
    finally:
        over.set()
        if thread.is_alive():
            thread.join()


def role_here() -> str | None:
    """What this node, the driver's, is for."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    return next((n["Labels"].get(ROLE) for n in alive_nodes() if n["NodeID"] == here), None)


def cores_of_gpu() -> int:
    """The cores that this node has for each of its GPUs, at least one."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    resources = next(n["Resources"] for n in alive_nodes() if n["NodeID"] == here)
    return max(1, int(resources.get("CPU", 1) // max(1, resources.get("GPU", 1))))


@contextmanager
def quiet_ray_data(role: str = "data", labels: Mapping[str, str] | None = None) -> Iterator[None]:
    """What Ray Data logs stays in its file; the console shows our lines only. To be called after start_ray.

    What is executed within goes to nodes of this role and with these labels, and so does what is asked of the autoscaler.
    """
    import ray.data

    context = ray.data.DataContext.get_current().copy()
    # a copy shares what is not replaced
    context.execution_options = copy.copy(context.execution_options)
    context.execution_options.label_selector = selector(role, labels) or None
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    consoles = [h for h in logging.getLogger("ray.data").handlers if h.name == "console"]
    levels = [h.level for h in consoles]
    for handler in consoles:
        handler.setLevel(logging.CRITICAL)
    try:
        with ray.data.DataContext.current(context):
            yield
    finally:
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)
