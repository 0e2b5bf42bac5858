"""The monitor's look at this machine: GPUs, cores, memory, disks, and what is kept in caches."""

from __future__ import annotations

import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from potstill.control_groups import Groups
from potstill.data import store
from potstill.monitor_runs import ACTIVE, Told, count, one_line

GPU_RETRY_S = 60.0


# ------------------------------------------------------------------------------------------------ GPUs
class Gpus:
    """This machine's NVIDIA GPUs, by NVML. What a GPU does not tell is None; what it breaks at ends that GPU alone.

    `nvml`: the module pynvml, or what stands for it.
    """

    def __init__(self, nvml: Any = None) -> None:
        self._nvml = nvml
        self._ready = False
        self._tried = -math.inf
        self._reason: str | None = None

    def look(self, owners: Callable[[int], str | None] = lambda pid: None) -> Told:
        """`owners`: which of our runs a process is of."""
        if not self._ready and time.monotonic() - self._tried >= GPU_RETRY_S:
            self._start()
        if not self._ready:
            return {"reason": self._reason, "driver": None, "devices": []}
        nvml = self._nvml
        try:
            count = nvml.nvmlDeviceGetCount()
            devices = [self._device(i, owners) for i in range(count)]
        except nvml.NVMLError as error:  # the driver was unloaded, or the library no longer fits it
            self.close()
            self._reason = f"NVML: {error}"
            return {"reason": self._reason, "driver": None, "devices": []}
        driver = self._ask(nvml.nvmlSystemGetDriverVersion)
        reason = None if devices else "no NVIDIA GPU"
        return {"reason": reason, "driver": one_line(_string(driver), 40), "devices": devices}

    def close(self) -> None:
        if self._ready:
            self._ready = False
            with suppress(self._nvml.NVMLError):
                self._nvml.nvmlShutdown()

    def _start(self) -> None:
        self._tried = time.monotonic()
        if self._nvml is None:
            import pynvml

            self._nvml = pynvml
        nvml = self._nvml
        try:
            nvml.nvmlInit()
            self._ready = True
        except nvml.NVMLError as error:
            code = getattr(error, "value", None)
            if code in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED):
                self._reason = "no NVIDIA GPU"
            elif code == nvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH:
                self._reason = (
                    "the NVIDIA driver was changed while it ran; restart the machine (NVML: "
                    f"{error})"
                )
            else:
                self._reason = f"NVML: {error}"

    def _ask(self, question: Callable[..., Any], *arguments: Any) -> Any:
        """None for what this GPU, or this driver, does not tell."""
        try:
            return question(*arguments)
        except self._nvml.NVMLError as error:
            if getattr(error, "value", None) == self._nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            return None

    def _device(self, index: int, owners: Callable[[int], str | None]) -> Told:
        nvml = self._nvml
        told: Told = dict.fromkeys(
            ("name", "uuid", "utilization_percent", "memory_used_bytes", "memory_total_bytes")
        )
        told |= dict.fromkeys(("temperature_c", "power_w", "power_limit_w", "error"))
        told = {"index": index, **told, "mig": None, "slices": [], "processes": []}
        try:
            handle = nvml.nvmlDeviceGetHandleByIndex(index)
            told["name"] = _string(self._ask(nvml.nvmlDeviceGetName, handle))
            told |= self._use(handle, owners)
            rates = self._ask(nvml.nvmlDeviceGetUtilizationRates, handle)
            told["utilization_percent"] = None if rates is None else rates.gpu
            sensor = nvml.NVML_TEMPERATURE_GPU
            told["temperature_c"] = self._ask(nvml.nvmlDeviceGetTemperature, handle, sensor)
            told["power_w"] = _watts(self._ask(nvml.nvmlDeviceGetPowerUsage, handle))
            limit = self._ask(nvml.nvmlDeviceGetEnforcedPowerLimit, handle)
            told["power_limit_w"] = _watts(limit)
            mode = self._ask(nvml.nvmlDeviceGetMigMode, handle)
            told["mig"] = None if mode is None else mode[0] == nvml.NVML_DEVICE_MIG_ENABLE
            if told["mig"]:
                told["slices"] = self._slices(handle, owners)
        except nvml.NVMLError as error:
            told["error"] = one_line(error, 120)
        return told

    def _slices(self, handle: Any, owners: Callable[[int], str | None]) -> list[Told]:
        """The parts that a GPU in MIG mode is cut into; there are fewer than there may be."""
        nvml, found = self._nvml, []
        for index in range(self._ask(nvml.nvmlDeviceGetMaxMigDeviceCount, handle) or 0):
            part = self._ask(nvml.nvmlDeviceGetMigDeviceHandleByIndex, handle, index)
            if part is not None:
                name = _string(self._ask(nvml.nvmlDeviceGetName, part))
                found.append({"index": index, "name": name, **self._use(part, owners)})
        return found

    def _use(self, handle: Any, owners: Callable[[int], str | None]) -> Told:
        """What a GPU and a slice of one both tell."""
        nvml = self._nvml
        memory = self._ask(nvml.nvmlDeviceGetMemoryInfo, handle)
        found = {}
        for question in (
            nvml.nvmlDeviceGetComputeRunningProcesses,
            nvml.nvmlDeviceGetGraphicsRunningProcesses,
        ):
            for process in self._ask(question, handle) or ():
                found.setdefault(process.pid, process)
        processes = [
            {
                "pid": pid,
                "name": _process_name(pid),
                "memory_bytes": count(process.usedGpuMemory),
                "run": owners(pid),
            }
            for pid, process in sorted(found.items())
        ]
        return {
            "uuid": _string(self._ask(nvml.nvmlDeviceGetUUID, handle)),
            "memory_used_bytes": None if memory is None else memory.used,
            "memory_total_bytes": None if memory is None else memory.total,
            "processes": processes,
        }


def _watts(milliwatts: Any) -> float | None:
    return None if milliwatts is None else milliwatts / 1000


def _string(value: Any) -> str | None:
    return value.decode(errors="replace") if isinstance(value, bytes) else value


def _process_name(pid: int) -> str | None:
    """The program alone: arguments may hold what is nobody's business."""
    import psutil

    with suppress(psutil.Error):
        process = psutil.Process(pid)
        words = process.cmdline()
        first = words[0].split()[0] if words and words[0].split() else process.name()
        return one_line(first if first.startswith("ray::") else Path(first).name, 60)
    return None


class Owners:
    """Which run a process of this machine is of: the one that trains it, or that started it."""

    def __init__(self, shown: Iterable[Told]) -> None:
        here = socket.gethostname()
        self._of: dict[int, str] = {}
        for one in shown:
            if one["state"] in ACTIVE:
                if one.get("host") == here and one.get("pid"):
                    self._of.setdefault(one["pid"], one["name"])
                if one["driver_pid"]:
                    self._of.setdefault(one["driver_pid"], one["name"])

    def __call__(self, pid: int) -> str | None:
        import psutil

        if pid in self._of:
            return self._of[pid]
        with suppress(psutil.Error):
            for parent in psutil.Process(pid).parents():
                if parent.pid in self._of:
                    return self._of[parent.pid]
        return None


# --------------------------------------------------------------------------------------------- machine
class Machine:
    """This machine's cores and memory; in a container those that it may use, by its control group."""

    def __init__(self, groups: Groups | None = None) -> None:
        self._groups = groups or Groups()
        self._before: tuple[float, float, float] | None = None
        """When, the seconds that the cores were busy, and those that there were."""
        self.sample()

    def sample(self) -> None:
        """Where the share of busy cores counts from."""
        self._before = self._clock()

    def look(self) -> Told:
        import psutil

        limit = self._limit()
        machine = psutil.virtual_memory()
        used, total = machine.total - machine.available, machine.total
        memory = self._groups.memory()
        limited = memory is not None and memory[1] < total
        if memory is not None and limited:
            used, total = memory
        swap = psutil.swap_memory()
        loads = os.getloadavg()
        return {
            "host": socket.gethostname(),
            "cores": limit or os.cpu_count() or 1,
            "cpu_percent": self._percent(),
            "load": [round(one, 2) for one in loads],
            "memory_used_bytes": used,
            "memory_total_bytes": total,
            "swap_used_bytes": swap.used,
            "swap_total_bytes": swap.total,
            "container": limited or limit is not None,
        }

    def _percent(self) -> float | None:
        """Of the cores there are, since the last look."""
        before, now = self._before, self._clock()
        if before is None or now[0] - before[0] < 0.05 or now[2] <= before[2]:
            return None
        self._before = now
        share = (now[1] - before[1]) / (now[2] - before[2])
        return round(100 * min(max(share, 0.0), 1.0), 1)

    def _clock(self) -> tuple[float, float, float]:
        import psutil

        now, limit = time.monotonic(), self._limit()
        if limit is not None and (busy := self._groups.busy_s()) is not None:
            return now, busy, now * limit
        times = psutil.cpu_times()
        # guests are counted within user and nice
        every = sum(times) - getattr(times, "guest", 0.0) - getattr(times, "guest_nice", 0.0)
        return now, every - times.idle - getattr(times, "iowait", 0.0), every

    def _limit(self) -> float | None:
        """The cores that may be used, where that is fewer than there are."""
        least = self._groups.cores()
        return round(least, 2) if least and least < (os.cpu_count() or 1) else None


# --------------------------------------------------------------------------------- caches and disks
def look_at_cache(folder: Path, local: bool, limit_gb: float | None, source: str | None) -> Told:
    """The sets of a cache folder. `local`: it is one of node-local copies. `source`: who says the limit."""
    sets = store.stored_sets(folder)
    return {
        "path": str(folder),
        "local": local,
        "exists": folder.is_dir(),
        "bytes": sum(s.bytes - s.pending for s in sets),
        "pending_bytes": sum(s.pending for s in sets),
        "limit_bytes": None if limit_gb is None else round(limit_gb * 1e9),
        "limit_from": source,
        "sets": [
            {
                "key": s.key,
                "bytes": s.bytes,
                "pending_bytes": s.pending,
                "last_used": s.last_used,
                "users": list(s.users),
            }
            for s in reversed(sets)
        ],
    }


def look_at_disks(places: Mapping[str, Path]) -> list[Told]:
    """What is free where things are written; a disk that holds several of them is told once."""
    found: dict[int, Told] = {}
    for name, place in places.items():
        folder = place
        while not folder.exists() and folder != folder.parent:
            folder = folder.parent
        with suppress(OSError):
            device, use = folder.stat().st_dev, shutil.disk_usage(folder)
            if device in found:
                found[device]["for"].append(name)
                continue
            there = use.used + use.free  # without what only root may use
            share = use.free / there if there else 0.0
            found[device] = {
                "path": str(folder),
                "for": [name],
                "total_bytes": there,
                "free_bytes": use.free,
                "free_percent": round(100 * share, 1),
                "state": "critical" if share < 0.05 else "low" if share < 0.1 else "ok",
            }
    return list(found.values())
