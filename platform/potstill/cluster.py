"""One quiet Ray for whoever needs it."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def start_ray(num_cpus: int | None = None) -> bool:
    """Join the cluster that RAY_ADDRESS names, or start a Ray of our own on this machine. Idempotent.

    Returns whether this call started one, which its caller may then shut down.

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
    if os.environ.get("RAY_ADDRESS"):
        ray.init(**quiet)
        return False
    # one machine has nobody to warn of its preemption
    os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
    ray.init(num_cpus=num_cpus, include_dashboard=False, object_store_memory=512 * 2**20, **quiet)
    return True


@contextmanager
def quiet_ray_data() -> Iterator[None]:
    """What Ray Data logs stays in its file; the console shows our lines only. To be called after start_ray."""
    import ray.data

    context = ray.data.DataContext.get_current().copy()
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
