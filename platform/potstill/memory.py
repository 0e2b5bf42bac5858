"""How many samples a device's memory holds in one forward and backward pass."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from pathlib import Path

import torch

from potstill.control_groups import Groups
from potstill.errors import UserError

MARGIN = 0.8
"""Share of the free memory that may be planned with: fragments and other processes want some, too."""


def largest_that_fits(
    attempt: Callable[[int], None],
    most: int,
    device: torch.device,
    to_come: int = 0,
    workers: int = 1,
) -> int:
    """The largest even part of `most` samples (it, a half, a quarter, …) that `attempt(n)` has room for.

    `attempt` runs one forward and backward pass of n samples and leaves no trace. A GPU is asked by trying;
    a CPU, whose system would kill the process, by what passes of two and of four samples keep for the backward pass.
    `to_come`: bytes that the training will take beyond an attempt's, such as the optimizer's state. `workers`: how
    many processes share this machine's memory; a GPU is one worker's own. Raises UserError where two samples do not
    fit.
    """
    size = most
    while size >= 2:
        if _fits(attempt, size, device, to_come, workers):
            return size
        size = 2 * (size // 4)
    raise UserError(
        "loop.micro_batch_size=auto found no room for two samples; take a smaller augment.image_px or model, "
        "model.grad_checkpointing=true, or loop.precision=bf16"
    )


def _fits(
    attempt: Callable[[int], None], size: int, device: torch.device, to_come: int, workers: int
) -> bool:
    if device.type == "cpu":
        few, more = saved_bytes(attempt, 2), saved_bytes(attempt, 4)
        needed = few + (more - few) / 2 * (size - 2)
        # gradients of activations stand beside them, for a while; the weights that are saved, too, stand for theirs
        return 2 * needed + to_come <= MARGIN * free_bytes() / workers
    # else this attempt would be judged by the peak of one before it that failed
    torch.cuda.reset_peak_memory_stats(device)
    failed = False
    try:
        attempt(size)
    except torch.OutOfMemoryError:
        failed = True  # what it holds is let go when this clause is left
    if not failed:
        free, _ = torch.cuda.mem_get_info(device)
        room = 0.9 * (free + torch.cuda.memory_reserved(device))
        failed = torch.cuda.max_memory_allocated(device) + to_come > room
    torch.cuda.empty_cache()
    return not failed


def workers_here(world_size: int) -> int:
    """How many of a run's workers are on this machine: as Ray says it, else all of them."""
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)


def saved_bytes(attempt: Callable[[int], None], size: int) -> int:
    """What a forward pass keeps for the backward pass, in bytes; each storage counts once."""
    storages: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        attempt(size)
    return sum(storages.values())


def free_bytes() -> int:
    """Memory that this process may still take: what the system has available, within its control group."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, ValueError, IndexError):
        line = next(
            text
            for text in Path("/proc/meminfo").read_text().splitlines()
            if text.startswith("MemAvailable:")
        )
        free = int(line.split()[1]) * 1024
    if (within := Groups().memory()) is not None:
        used, limit = within
        free = min(free, limit - used)
    return free
