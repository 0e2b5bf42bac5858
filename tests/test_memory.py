"""How many samples fit: by a GPU's failure, which is faked, and by a CPU's arithmetic, of which only the memory is."""

from __future__ import annotations

import pytest
import torch

from potstill import memory
from potstill.errors import UserError
from potstill.memory import largest_that_fits, workers_here

CPU, GPU = torch.device("cpu"), torch.device("cuda")


class SmallDevice:
    """1000 bytes, of which a sample takes 10. Like CUDA it remembers its peak, also that of a pass that failed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.peak, self.tried = 0, []
        for name, function in {
            "empty_cache": lambda: None,
            "mem_get_info": lambda _: (1000, 1000),
            "memory_reserved": lambda _: 0,
            "max_memory_allocated": lambda _: self.peak,
            "reset_peak_memory_stats": lambda _: setattr(self, "peak", 0),
        }.items():
            monkeypatch.setattr(torch.cuda, name, function)

    def attempt(self, n: int) -> None:
        self.tried.append(n)
        self.peak = max(self.peak, min(10 * n, 1000))
        if 10 * n > 1000:
            raise torch.OutOfMemoryError("CUDA out of memory")


@pytest.mark.parametrize(
    ("to_come", "tried"),
    [(0, [320, 160, 80]), (100, [320, 160, 80]), (101, [320, 160, 80, 40])],
)
def test_a_device_that_runs_out_of_memory_gets_less(monkeypatch, to_come, tried):
    """Of 1000 bytes 900 may be planned with: 80 samples and 100 bytes."""
    device = SmallDevice(monkeypatch)
    assert largest_that_fits(device.attempt, 320, GPU, to_come) == tried[-1]
    assert device.tried == tried


def test_a_device_without_room_for_two_samples_is_refused(monkeypatch):
    device = SmallDevice(monkeypatch)
    with pytest.raises(UserError, match="no room for two samples"):
        largest_that_fits(device.attempt, 100, GPU, to_come=881)
    assert device.tried[-1] == 2


def squares(n: int) -> None:
    """Keeps 400 bytes a sample for its backward pass."""
    x = torch.ones(n, 100, requires_grad=True)
    (x * x).sum().backward()


@pytest.mark.parametrize(
    ("to_come", "workers", "size"),
    [(0, 1, 100), (1, 1, 50), (0, 2, 50), (1, 2, 24), (40000, 1, 50)],
)
def test_a_cpu_gives_what_is_left_to_each_worker(monkeypatch, to_come, workers, size):
    """There is room for 100 samples, twice 400 bytes each, and nothing more."""
    assert memory.saved_bytes(squares, 4) == 1600
    monkeypatch.setattr(memory, "free_bytes", lambda: 80_000 / memory.MARGIN)
    assert largest_that_fits(squares, 100, CPU, to_come, workers) == size


def test_workers_of_this_machine(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert workers_here(4) == 4
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert workers_here(4) == 2
    assert workers_here(1) == 1, "another program's, that started this one"


def test_free_memory_is_that_of_this_machine():
    assert 1e6 < memory.free_bytes() < 1e15
