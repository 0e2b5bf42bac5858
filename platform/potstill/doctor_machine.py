"""What the doctor looks at in a machine: Python and packages, GPUs, limits, the token, and a Ray of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import resource
import sys
import time
from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.control_groups import Groups
from potstill.doctor_findings import (
    FAIL,
    FEW_INODES,
    PASS,
    SYNC,
    WARN,
    At,
    Finding,
    Options,
    Problem,
    Steps,
    brief,
    gigabytes,
    judged,
    project,
    several,
)

LOCAL_STORE_BYTES = 512 << 20  # what cluster.start_ray gives a Ray of our own
MIN_MEMORY_BYTES, FEW_MEMORY_BYTES = 2 * 10**9, 4 * 10**9
FEW_FILES, TOO_FEW_FILES, MANY_FILES = 8192, 1024, 65536
FEW_PROCESSES = 4096
FEW_INOTIFY = 8
MOST_SOCKET_BYTES = 107  # the kernel's
# RAY_local_fs_capacity_threshold: above it Ray stores and spills nothing any more
RAY_DISK_SHARE = 0.95
# NVML's slowdown by hardware, by software for heat, by hardware for heat, by the power brake
SLOWED_BY_HEAT_OR_POWER = 0x8 | 0x20 | 0x40 | 0x80
BROKEN_GPU = "restart the machine; `dmesg | grep -i -e nvrm -e xid` tells what the driver has seen"


# ------------------------------------------------------------------------------------ Python and packages
_IMPORTED_AS = {
    "pillow": "PIL",
    "scikit-learn": "sklearn",
    "hydra-core": "hydra",
    "nvidia-ml-py": "pynvml",
}
# What is loaded of those with compiled parts, which must fit the machine and each other. To import all that is Python
# alone takes half a minute, and says no more than its version and its place do.
_LOADED = {
    "torch": "torch",
    "torchvision": "torchvision",
    "numpy": "numpy",
    "scipy": "scipy.linalg",
    "pyarrow": "pyarrow",
    "pillow": "PIL.Image",
    "safetensors": "safetensors",
    "psutil": "psutil",
    "ray": "ray",
}


def python(options: Options) -> Steps:
    yield At("python", "reading what the project needs")
    requires, packages = project()
    yield At("packages", "reading what is installed")
    from packaging.requirements import Requirement
    from packaging.specifiers import SpecifierSet

    version = ".".join(map(str, sys.version_info[:3]))
    bad = not SpecifierSet(requires).contains(version)
    remedy = f"use a Python {requires}: uv python install 3.11 && {SYNC}"
    problems = [(FAIL, f"the project needs {requires}", remedy)] if bad else []
    values = {"version": version, "requires": requires, "executable": sys.executable}
    yield judged("python", f"{version}, {sys.executable}", problems, values)
    if options.wants("packages"):
        yield _packages([Requirement(each) for each in packages])


def _packages(requirements: list[Any]) -> Finding:
    """What the project needs, and what that needs in turn."""
    from importlib import metadata

    from packaging.requirements import Requirement

    versions: dict[str, str | None] = {}
    problems: list[Problem] = []
    followed: set[tuple[str, frozenset[str]]] = set()
    # (requirement, who asks for it, which of the project's own it is for); Aim's last
    due = deque((r, "", r.name) for r in sorted(requirements, key=lambda r: r.name == "aim"))
    while due:
        each, by, root = due.popleft()
        name = re.sub(r"[-_.]+", "-", each.name).lower()
        if name not in versions:
            versions[name] = None
            with contextlib.suppress(metadata.PackageNotFoundError):
                versions[name] = metadata.version(name)
        found = versions[name]
        if found is None or not each.specifier.contains(found, prereleases=True):
            said = "is missing" if found is None else f"is {found}, not {each.specifier}"
            said += f", as {by} needs" if by else ""
            # training goes on without Aim, and says so
            status = WARN if root == "aim" else FAIL
            problems.append((status, f"{name} {said}", f"{SYNC}, or pip install '{each}'"))
        key = (name, frozenset(each.extras))
        if found is None or key in followed:
            continue
        followed.add(key)
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            extras = ["", *each.extras]
            if inner.marker is None or any(inner.marker.evaluate({"extra": e}) for e in extras):
                due.append((inner, name, root))
    if len(problems) > 3:
        more = (FAIL, f"and {len(problems) - 3} others", "")
        problems = [*((status, said, SYNC) for status, said, _ in problems[:3]), more]
    own = {each.name: versions.get(each.name) for each in requirements}
    shown = ("torch", "torchvision", "timm", "ray", "aim")
    measured = ", ".join(f"{name} {own[name]}" for name in shown if own.get(name))
    rest = "" if problems else f"; {len(versions)} packages within their ranges"
    return judged("packages", measured + rest, problems, {"versions": own})


def _imports(options: Options) -> Steps:
    """The real thing: a package may be there and not load, for want of a library or of another's version."""
    import importlib.util

    problems: list[Problem] = []
    missing: list[str] = []
    began, loaded = time.monotonic(), []
    # the check of Ray imports it, too
    elsewhere = {"ray"} if options.wants("ray") and not (options.address or options.node) else set()
    for package in (re.split(r"[^\w.-]", each, maxsplit=1)[0] for each in project()[1]):
        again = f"{SYNC} --reinstall-package {package}"
        name = _IMPORTED_AS.get(package, package)
        yield At("imports", f"importing {name}", again)
        spec = importlib.util.find_spec(name)
        if spec is None:
            missing.append(package)
        elif (stray := _not_the_installed(package, spec.origin)) is not None:
            said = f"{name} is {stray}, and not the installed one"
            problems.append((FAIL, said, f"move {stray} away, or see PYTHONPATH"))
        elif package in _LOADED.keys() - elsewhere:
            try:
                _load(_LOADED[package], Path(spec.origin or "").parent)
                loaded.append(name)
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                problems.append((FAIL, f"{name} does not import ({brief(error)})", again))
    if missing:
        problems.append((FAIL, f"not installed: {', '.join(missing)}", SYNC))
    if len(problems) > 4:  # mostly one fault that many trip over
        problems = [*problems[:4], (FAIL, f"and {len(problems) - 4} others", "")]
    took_s = time.monotonic() - began
    values = {"modules": loaded, "seconds": round(took_s, 1)}
    measured = "" if problems else f"{', '.join(loaded)} load, in {took_s:.1f} s"
    yield judged("imports", measured, problems, values)


def _load(module: str, folder: Path) -> None:
    import importlib

    if module != "torchvision":
        importlib.import_module(module)
        return
    # its Python imports half of torch; what may not fit torch is its library
    torch = importlib.import_module("torch")
    for library in folder.glob("_C*.so"):
        torch.ops.load_library(str(library))


def _not_the_installed(package: str, origin: str | None) -> str | None:
    """The file that an import would take, where it is not below what was installed."""
    from importlib import metadata

    with contextlib.suppress(metadata.PackageNotFoundError):
        about = metadata.distribution(package)
        editable = "/" if about.read_text("direct_url.json") else ""
        installed = os.path.realpath(editable or str(about.locate_file("")))
        if origin and not os.path.realpath(origin).startswith(installed.rstrip("/") + "/"):
            return origin
    return None


# ------------------------------------------------------------------------------------------------ GPUs
def gpus(options: Options) -> Steps:
    """NVIDIA's library first, torch after it: else our own process would stand among those on the GPU."""
    if options.address:  # the run will use the cluster's, which doctor_cluster.py counts
        options = dataclasses.replace(options, gpus=None)
    seen = None
    if options.wants("driver", "gpus", "cuda"):
        yield At("driver", "asking the driver", BROKEN_GPU)
        seen = _driver(options)
        yield seen.finding
        if options.wants("gpus"):
            yield At("gpus", "asking the GPUs", BROKEN_GPU)
            yield from _each_gpu(options, seen)
    if options.wants("imports"):
        yield from _imports(options)
    if seen is not None and options.wants("cuda"):
        yield At("cuda", "importing torch")
        yield from _cuda(options, seen)


@dataclass(frozen=True)
class _Driver:
    finding: Finding
    gpus: tuple[int, ...] = ()
    """Those that CUDA_VISIBLE_DEVICES leaves, as NVIDIA's library counts."""
    all: int = 0
    cuda: tuple[int, int] = (0, 0)
    """The newest CUDA that the driver knows."""


def _driver(options: Options) -> _Driver:
    needed = options.gpus or 0
    need = f", and --gpus {needed} is asked for" if needed else ""
    none = FAIL if needed else PASS
    try:
        nvml = _nvml()
    except ImportError as error:
        remedy = f"{SYNC}, or pip install nvidia-ml-py"
        return _Driver(
            judged("driver", "", [(FAIL if needed else WARN, f"cannot ask ({error})", remedy)])
        )
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as error:
        said, has_card = str(error), _has_nvidia_card()
        if not has_card and isinstance(error, nvml.NVMLError_LibraryNotFound):
            remedy = "run on a machine with an NVIDIA GPU, or give --gpus 0" if needed else ""
            return _Driver(
                judged(
                    "driver",
                    "no NVIDIA driver and no GPU: training runs on the CPU",
                    [(none, f"--gpus {needed} is asked for", remedy)] if needed else [],
                    {"driver": None, "gpus": 0},
                )
            )
        remedy = (
            "the driver was updated under the running one: restart the machine"
            if isinstance(error, nvml.NVMLError_LibRmVersionMismatch)
            else "install the NVIDIA driver, load it (modprobe nvidia) or, in a container, start that with --gpus all"
        )
        return _Driver(
            judged("driver", "", [(FAIL, f"the NVIDIA driver does not answer ({said})", remedy)])
        )
    version = nvml.nvmlSystemGetDriverVersion()
    number = nvml.nvmlSystemGetCudaDriverVersion_v2()
    cuda = (number // 1000, number % 1000 // 10)
    count = nvml.nvmlDeviceGetCount()
    visible = _visible(nvml, count)
    measured = f"{version}, CUDA up to {cuda[0]}.{cuda[1]}, {several(count, 'GPU')}"
    problems: list[Problem] = []
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES")
    if hidden is not None and len(visible) < count:
        measured += f", CUDA_VISIBLE_DEVICES={hidden!r} leaves {len(visible)}"
    if len(visible) < needed:
        remedy = (
            "unset CUDA_VISIBLE_DEVICES"
            if count >= needed
            else f"use a machine with {several(needed, 'GPU')}, or scaling.num_workers={len(visible)}"
        )
        problems.append((FAIL, f"{several(len(visible), 'GPU')}{need}", remedy))
    values = {"driver": version, "cuda": list(cuda), "gpus": count, "visible": len(visible)}
    return _Driver(judged("driver", measured, problems, values), visible, count, cuda)


def _nvml() -> Any:
    """NVIDIA's library; it makes the classes of its errors when it is imported."""
    import pynvml

    return pynvml


def _has_nvidia_card() -> bool:
    for vendor in Path("/sys/bus/pci/devices").glob("*/vendor"):
        with contextlib.suppress(OSError):
            if vendor.read_text().strip() != "0x10de":
                continue
            kind = (vendor.parent / "class").read_text()
            if kind.startswith("0x03"):  # a display or 3D controller
                return True
    return bool(list(Path("/dev").glob("nvidia[0-9]*")))


def _visible(nvml: Any, count: int) -> tuple[int, ...]:
    text = os.environ.get("CUDA_VISIBLE_DEVICES")
    if text is None:
        return tuple(range(count))
    found: list[int] = []
    for part in filter(None, (p.strip() for p in text.split(","))):
        if part.lstrip("-").isdigit():
            if not 0 <= int(part) < count:
                break  # CUDA stops at the first that is none
            found.append(int(part))
        elif part.startswith("MIG-"):  # CUDA takes one part, whatever else is named
            with contextlib.suppress(nvml.NVMLError):
                own = nvml.nvmlDeviceGetHandleByUUID(part)
                whole = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(own)
                found.append(nvml.nvmlDeviceGetIndex(whole))
            break
        else:
            uuids = [
                nvml.nvmlDeviceGetUUID(nvml.nvmlDeviceGetHandleByIndex(i)) for i in range(count)
            ]
            found += [i for i, each in enumerate(uuids) if str(each).startswith(part)][:1]
    return tuple(dict.fromkeys(found))


def _each_gpu(options: Options, seen: _Driver) -> Iterator[Finding]:
    if not seen.gpus:
        return
    nvml, free = _nvml(), 0
    for number in seen.gpus:
        try:
            finding = _gpu(nvml, number)
            free += not finding.values["taken"]
        except nvml.NVMLError as error:
            problem = (FAIL, f"{number}: it does not answer ({error})", BROKEN_GPU)
            finding = judged("gpus", "", [problem], {"gpu": number})
        yield finding
    if options.gpus and free < options.gpus <= len(seen.gpus):
        remedy = "wait for the other processes, end them, or choose GPUs with CUDA_VISIBLE_DEVICES"
        said = f"only {free} of {several(options.gpus, 'GPU')} that are asked for are free of others' work"
        yield judged("gpus", "", [(WARN, said, remedy)], {"free": free})


def _gpu(nvml: Any, number: int) -> Finding:
    told = _told_by_gpu(nvml, number)
    total, free, capability = told["total_bytes"], told["free_bytes"], told["capability"]
    parts = [
        f"{number}: {told['device']}",
        f"{gigabytes(free)} of {gigabytes(total)} free" if total else "",
        f"{told['temperature_c']} °C" if told["temperature_c"] is not None else "",
        f"compute capability {capability[0]}.{capability[1]}" if capability else "",
        f"MIG, {several(told['mig_parts'], 'part')}" if told["mig"] else "",
    ]
    return judged("gpus", ", ".join(filter(None, parts)), _wrong_with_gpu(told), told)


def _told_by_gpu(nvml: Any, number: int) -> dict[str, Any]:
    """What a GPU says of itself; None for what it does not know."""
    handle = nvml.nvmlDeviceGetHandleByIndex(number)

    def ask(function: str, *arguments: Any) -> Any:
        try:
            return getattr(nvml, function)(handle, *arguments)
        except AttributeError:
            return None
        except nvml.NVMLError as error:
            if getattr(error, "value", None) == nvml.NVML_ERROR_GPU_IS_LOST:
                raise
            return None

    memory = ask("nvmlDeviceGetMemoryInfo")
    total, free = (memory.total, memory.free) if memory else (None, None)
    mig = ask("nvmlDeviceGetMigMode")
    cut = bool(mig and mig[0])
    most = (ask("nvmlDeviceGetMaxMigDeviceCount") or 0) if cut else 0
    parts = [ask("nvmlDeviceGetMigDeviceHandleByIndex", at) for at in range(most)]
    capability = ask("nvmlDeviceGetCudaComputeCapability")
    remapped = ask("nvmlDeviceGetRemappedRows")  # corrected, uncorrected, pending, failed
    persistence = ask("nvmlDeviceGetPersistenceMode")
    uncorrected = nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED, nvml.NVML_VOLATILE_ECC
    slowdown = nvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
    modes = {
        nvml.NVML_COMPUTEMODE_PROHIBITED: "prohibited",
        nvml.NVML_COMPUTEMODE_EXCLUSIVE_PROCESS: "exclusive",
    }
    return {
        "gpu": number,
        "device": ask("nvmlDeviceGetName") or "GPU",
        "free_bytes": free,
        "total_bytes": total,
        # a MIG part tells its memory only to who owns it
        "taken": bool(total and not cut and free / total < 0.9),
        "processes": {
            each.pid: each.usedGpuMemory
            for kind in ("Compute", "Graphics")
            for each in ask(f"nvmlDeviceGet{kind}RunningProcesses") or ()
        },
        "temperature_c": ask("nvmlDeviceGetTemperature", nvml.NVML_TEMPERATURE_GPU),
        "slowdown_c": ask("nvmlDeviceGetTemperatureThreshold", slowdown),
        "slowed_by": ask("nvmlDeviceGetCurrentClocksThrottleReasons"),
        "capability": list(capability) if capability else None,
        "uncorrected_ecc_errors": ask("nvmlDeviceGetTotalEccErrors", *uncorrected),
        "remapped_rows": list(remapped) if remapped else None,
        "retired_pages_pending": ask("nvmlDeviceGetRetiredPagesPendingStatus"),
        "persistence": None if persistence is None else bool(persistence),
        "mode": modes.get(ask("nvmlDeviceGetComputeMode"), "default"),
        "mig": None if mig is None else cut,
        "mig_parts": sum(part is not None for part in parts),
    }


def _wrong_with_gpu(told: Mapping[str, Any]) -> list[Problem]:
    number, problems = told["gpu"], []

    def add(status: str, said: str, remedy: str) -> None:
        problems.append((status, said, remedy))

    if told["taken"]:
        who = ", ".join(_process(pid, used) for pid, used in told["processes"].items())
        remedy = "end it, wait, or choose another GPU with CUDA_VISIBLE_DEVICES"
        add(WARN, f"in use: {who or 'by a process that is not seen from here'}", remedy)
    reset = f"restart the machine, or reset the GPU (nvidia-smi -i {number} --gpu-reset)"
    if errors := told["uncorrected_ecc_errors"]:
        said = f"{errors} uncorrected memory errors since the driver was loaded"
        add(FAIL, said, f"{reset}; if they come back, have it replaced")
    _, _, pending, failed = told["remapped_rows"] or (0, 0, 0, 0)
    if failed:
        add(FAIL, "memory that failed could not be replaced", "have the GPU replaced")
    if pending or told["retired_pages_pending"]:
        add(WARN, "failed memory waits for a reset to be replaced", reset)
    temperature, slowdown = told["temperature_c"], told["slowdown_c"]
    if temperature is not None and temperature >= (slowdown or 90) - 3:
        limit = f"at {slowdown} °C it slows down" if slowdown else "it slows down about there"
        add(WARN, f"{temperature} °C hot, {limit}", "look after its cooling")
    if (told["slowed_by"] or 0) & SLOWED_BY_HEAT_OR_POWER:
        said = "it is being slowed down, for its heat or its power supply"
        add(WARN, said, "look after its cooling and power (nvidia-smi -q -d PERFORMANCE)")
    if told["capability"] and told["capability"] < [8, 0]:
        add(WARN, "no bf16 in hardware", "loop.precision=fp16 or fp32")
    default = f"nvidia-smi -i {number} -c DEFAULT"
    if told["mode"] == "prohibited":
        add(FAIL, "it is set to take no work", default)
    if told["mode"] == "exclusive":
        said = "it is set to take one process at a time: what shares a GPU, as trials of a search may, fails"
        add(WARN, said, default)
    if told["mig"] and not told["mig_parts"]:
        remedy = f"nvidia-smi -i {number} -mig 0, or cut it (nvidia-smi mig -i {number} -cgi <profile> -C)"
        add(
            FAIL, "it is to be cut into parts (MIG) and has none: nothing can compute on it", remedy
        )
    return problems


def _process(pid: int, used: int | None) -> str:
    name = "?"
    with contextlib.suppress(OSError):
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    return f"process {pid} ({name}{', ' + gigabytes(used) if used else ''})"


def _cuda(options: Options, seen: _Driver) -> Steps:
    """A small product on each GPU, exact in bf16, against the CPU's."""
    if not seen.all and seen.finding.status != FAIL and not options.gpus:
        return  # no GPU, and none asked for
    status = FAIL if options.gpus else WARN
    try:
        import torch
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        yield judged("cuda", "", [(FAIL, f"torch does not import ({brief(error)})", SYNC)])
        return
    built = torch.version.cuda
    values = {"torch": torch.__version__, "torch_cuda": built, "driver_cuda": list(seen.cuda)}
    if built is None:
        said = f"torch {torch.__version__} is built without CUDA"
        remedy = (
            "install a torch with CUDA: uv sync in this project, or see pytorch.org/get-started"
        )
        yield judged("cuda", "", [(status, said, remedy)], values)
        return
    if not seen.gpus:
        if options.gpus:
            yield judged(
                "cuda", "", [(FAIL, "no GPU to compute on", "see the line of the driver")], values
            )
        return
    if seen.cuda < (int(built.split(".")[0]), 0):
        said = f"torch is built for CUDA {built}, and the driver knows CUDA up to {seen.cuda[0]}.{seen.cuda[1]}"
        remedy = f"update the NVIDIA driver, or install a torch for CUDA {seen.cuda[0]}"
        yield judged("cuda", "", [(FAIL, said, remedy)], values)
        return
    yield At("cuda", "starting CUDA")
    if not torch.cuda.is_available():
        said = f"the driver has {several(len(seen.gpus), 'GPU')}, and torch cannot use any"
        why = ""
        try:
            torch.cuda.init()
        except Exception as error:
            why = f" ({brief(error)})"
        remedy = (
            "restart the machine (or the container), and look for a second CUDA in LD_LIBRARY_PATH"
        )
        yield judged("cuda", "", [(FAIL, said + why, remedy)], values)
        return
    problems: list[Problem] = []
    parts = []
    for number in range(torch.cuda.device_count()):
        yield At("cuda", f"computing on GPU {number}")
        began = time.monotonic()
        try:
            right = _computes(torch, number)
            parts.append(f"GPU {number} computes ({time.monotonic() - began:.1f} s with its start)")
            if not right:
                remedy = (
                    "reset the GPU or restart the machine; if it stays so, have the GPU replaced"
                )
                problems.append((FAIL, f"GPU {number} computes something wrong", remedy))
        except Exception as error:
            text = brief(error)
            remedy = (
                "install a torch that is built for this GPU"
                if "no kernel image" in text
                else "end what else runs on it"
                if any(word in text.lower() for word in ("out of memory", "busy or unavailable"))
                else BROKEN_GPU
            )
            problems.append((FAIL, f"GPU {number} does not compute ({text})", remedy))
    measured = f"torch {torch.__version__} for CUDA {built}: {', '.join(parts)}"
    yield judged("cuda", measured, problems, values)


def _computes(torch: Any, number: int) -> bool:
    generator = torch.Generator().manual_seed(number)
    # sums of at most 256 ones are whole numbers that bf16 can hold
    a, b = (torch.randint(-1, 2, (256, 256), generator=generator).float() for _ in range(2))
    kind = torch.bfloat16 if torch.cuda.get_device_capability(number) >= (8, 0) else torch.float16
    there = (a.to(f"cuda:{number}", kind) @ b.to(f"cuda:{number}", kind)).float().cpu()
    return bool(torch.equal(there, a @ b))


# ------------------------------------------------------------------------------------ limits of a machine
def limits(options: Options) -> Steps:
    for name, check in (
        ("cpus", _cpus),
        ("memory", _memory),
        ("shared-memory", _shared_memory),
        ("open-files", _open_files),
        ("processes", _processes),
        ("inotify", _inotify),
    ):
        if options.wants(name):
            yield At(name, "reading")
            try:
                yield check(options)
            except (OSError, ValueError, KeyError) as error:  # a kernel that does not tell it
                remedy = "look yourself: ulimit -a, free -h, df -h /dev/shm"
                yield judged(name, "", [(WARN, f"it cannot be told ({brief(error)})", remedy)])


def _cpus(options: Options) -> Finding:
    cores: float = len(os.sched_getaffinity(0))
    cores = min(cores, Groups().cores() or cores)
    load = os.getloadavg()[0]
    problems: list[Problem] = []
    if load > 2 * (os.cpu_count() or 1):
        said = "others keep it busy"
        problems.append((WARN, said, "wait for what else runs here, or end it (see `top`)"))
    values = {"cores": cores, "load": round(load, 2)}
    return judged("cpus", f"{cores:g} cores, load {load:.1f}", problems, values)


def _meminfo() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    return {parts[0].rstrip(":"): int(parts[1]) * 1024 for parts in lines if len(parts) > 1}


def _memory(options: Options) -> Finding:
    known = _meminfo()
    total, free = known["MemTotal"], known["MemAvailable"]
    where = ""
    limited = Groups().memory()
    if limited and limited[1] < total:
        used, total = limited
        free, where = min(free, max(0, total - used)), " that the container may have"
    swap, swap_free = known.get("SwapTotal", 0), known.get("SwapFree", 0)
    problems: list[Problem] = []
    remedy = "end what else runs here, take a larger machine, or a smaller loop.micro_batch_size"
    if free < MIN_MEMORY_BYTES:
        problems.append((FAIL, f"less than {gigabytes(MIN_MEMORY_BYTES)} are free", remedy))
    elif free < FEW_MEMORY_BYTES:
        problems.append((WARN, f"less than {gigabytes(FEW_MEMORY_BYTES)} are free", remedy))
    if 1 - free / total > 0.9:
        said = "more than 90 % in use: Ray ends processes at 95 %"
        problems.append((WARN, said, remedy))
    swapped = (
        f", {gigabytes(swap - swap_free)} of {gigabytes(swap)} swap in use" if swap else ", no swap"
    )
    values = {"total_bytes": total, "free_bytes": free, "swap_bytes": swap}
    return judged(
        "memory", f"{gigabytes(free)} free of {gigabytes(total)}{where}{swapped}", problems, values
    )


def _shared_memory(options: Options) -> Finding:
    about = os.statvfs("/dev/shm")
    total, free = about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize
    problems: list[Problem] = []
    remedy = (
        "docker run --shm-size=8g; on Kubernetes mount an emptyDir with medium: Memory at /dev/shm; else "
        "mount -o remount,size=8G /dev/shm"
    )
    if total < LOCAL_STORE_BYTES:
        said = f"Ray's objects need {gigabytes(LOCAL_STORE_BYTES)} there, and NCCL some as well"
        problems.append((FAIL, said, remedy))
    elif free < LOCAL_STORE_BYTES and not options.node:  # there a Ray's own objects fill it
        said = f"less than the {gigabytes(LOCAL_STORE_BYTES)} of Ray's objects are free"
        problems.append((FAIL, said, "remove what fills it: du -sh /dev/shm/*"))
    elif total < 2 * LOCAL_STORE_BYTES:
        problems.append((WARN, "that is little beside other users of it", remedy))
    values = {"total_bytes": total, "free_bytes": free}
    measured = f"{gigabytes(free)} free of {gigabytes(total)} in /dev/shm"
    return judged("shared-memory", measured, problems, values)


def _open_files(options: Options) -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = MANY_FILES if hard == unlimited else min(hard, MANY_FILES)
    # ray.init raises the limit of its own process, and so of all that it starts; `ray start` does not
    raised = not options.node and soft != unlimited and soft < most
    counts = most if raised else MANY_FILES if soft == unlimited else soft
    problems: list[Problem] = []
    if counts < FEW_FILES:
        remedy = f"ulimit -n {most}, before `ray start`"
        if most < FEW_FILES:
            remedy = (
                f"raise nofile in /etc/security/limits.conf (docker run --ulimit nofile={MANY_FILES}:{MANY_FILES}), and log "
                "in again"
            )
        status = FAIL if counts < TOO_FEW_FILES else WARN
        problems.append((status, f"Ray's processes want {MANY_FILES:,}", remedy))

    def shown(limit: int) -> str:
        return "no limit" if limit == unlimited else f"{limit:,}"

    measured = f"{shown(soft)}, which Ray raises to {most:,}" if raised else shown(soft)
    values = {"soft": soft, "hard": hard}
    return judged("open-files", f"{measured} (at most {shown(hard)})", problems, values)


def _processes(options: Options) -> Finding:
    room = {"the kernel": int(Path("/proc/sys/kernel/threads-max").read_text())}
    soft, _ = resource.getrlimit(resource.RLIMIT_NPROC)
    if soft != resource.RLIM_INFINITY:
        room["ulimit -u"] = soft
    if limited := Groups().processes():
        room["the container"] = max(0, limited[1] - limited[0])
    by = min(room, key=lambda name: room[name])
    problems: list[Problem] = []
    if room[by] < FEW_PROCESSES:
        remedy = {"ulimit -u": "ulimit -u 65536", "the container": "docker run --pids-limit=-1"}
        said = f"Ray and torch start thousands of threads on {several(os.cpu_count() or 1, 'core')}"
        status = FAIL if room[by] < FEW_PROCESSES // 8 else WARN
        problems.append((status, said, remedy.get(by, "sysctl kernel.threads-max=65536")))
    measured = f"room for {room[by]:,} processes and threads (by {by})"
    return judged("processes", measured, problems, {"room": room[by], "by": by})


def _inotify(options: Options) -> Finding:
    most = int(Path("/proc/sys/fs/inotify/max_user_instances").read_text())
    used = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if folder.stat().st_uid != os.getuid():
                continue
            for handle in os.scandir(folder / "fd"):
                with contextlib.suppress(OSError):
                    used += os.readlink(handle.path) == "anon_inode:inotify"
    problems: list[Problem] = []
    if most - used < FEW_INOTIFY:
        remedy = "sysctl fs.inotify.max_user_instances=512, or end open explorers"
        problems.append((WARN, "Aim's explorer takes some for each repository", remedy))
    measured = f"{used} of {most} instances in use"
    return judged("inotify", measured, problems, {"used": used, "limit": most})


# ----------------------------------------------------------------------------------------------- token
def token(options: Options) -> Steps:
    yield At("token", "reading")
    mode = os.environ.get("RAY_AUTH_MODE")
    named = os.environ.get("RAY_AUTH_TOKEN_PATH") or None
    path = Path(named) if named else Path("~/.ray/auth_token").expanduser()
    values = {"mode": mode, "path": str(path)}
    kind = (mode or "").lower()
    problems: list[Problem] = []
    if kind not in ("", "token", "disabled", "k8s"):
        said = f"RAY_AUTH_MODE={mode} is no mode: Ray takes it for disabled"
        yield judged("token", "", [(FAIL, said, "export RAY_AUTH_MODE=token")], values)
        return
    if kind == "k8s":
        yield judged("token", "RAY_AUTH_MODE=k8s: by Kubernetes", [], values)
        return
    if os.environ.get("RAY_AUTH_TOKEN"):
        measured = "from RAY_AUTH_TOKEN"
    else:
        measured = f"from {path}" if path.exists() else f"Ray will make {path}"
        problems += _wrong_with_token(path, named, kind == "token", bool(options.address))
    if kind == "token":
        measured = f"RAY_AUTH_MODE=token, {measured}" if not problems else ""
    else:
        measured = "RAY_AUTH_MODE=disabled" if kind else "RAY_AUTH_MODE is not set"
        if not options.address:
            measured += "; a Ray of our own on this machine needs none"
        elif not kind and path.exists():
            said = f"{path} is there, and `ray start` uses it where this process does not"
            problems.append((WARN, said, "export RAY_AUTH_MODE=token"))
        else:
            said = "whoever reaches the cluster's ports may run anything on it"
            remedy = "start the cluster with RAY_AUTH_MODE=token, and set it here"
            problems.append((WARN, said, remedy))
    yield judged("token", measured, problems, values)


def _wrong_with_token(path: Path, named: str | None, used: bool, joining: bool) -> list[Problem]:
    """`used`: this process will read it; else it is only looked at for who else can. `joining`: a cluster has its own."""
    if joining:
        remedy = f"copy the head's ~/.ray/auth_token to {path}, and chmod 600 {path}"
    elif named:
        remedy = f"env -u RAY_AUTH_TOKEN_PATH uv run ray get-auth-token --generate > {path} && chmod 600 {path}"
    else:
        remedy = f"rm -f {path} && uv run ray get-auth-token --generate && chmod 600 {path}"
    problems: list[Problem] = []
    try:
        empty = not path.read_text(errors="replace").strip()
    except FileNotFoundError:
        if not used or not (named or joining):
            return []
        if str(path).startswith("~"):
            remedy = "export RAY_AUTH_TOKEN_PATH=$HOME/…"
            return [(FAIL, f"Ray does not expand the ~ of {path}", remedy)]
        return [(FAIL, f"{path} is missing", remedy)]
    except OSError as error:
        said = f"{path} cannot be read ({error.strerror})"
        return [(FAIL, said, f"chown or chmod it: ls -ld {path}")] if used else []
    if empty and used:
        problems.append((FAIL, f"{path} is empty", remedy))
    if not empty and (who := _readers(path)):
        problems.append((FAIL, f"{path} can be read by {who}", f"chmod 600 {path}"))
    return problems


def _readers(path: Path) -> str:
    """Who else can read a file: its mode alone does not say, where nobody else may enter its folder."""
    path = path.resolve()
    who = []
    for name, bit in (("its group", 3), ("all accounts", 0)):
        enter = all(p.stat().st_mode & (1 << bit) for p in path.parents)
        # read, or write, which is as bad
        if enter and path.stat().st_mode & (0o6 << bit):
            who.append(name)
    return " and ".join(who)


# ---------------------------------------------------------------------------------------------- private Ray
def temp(options: Options) -> Steps:
    yield At("temp", "looking at the disk")
    # what Ray takes, whether one may write there or not
    root = Path(os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp")
    values: dict[str, Any] = {"folder": str(root)}
    own = "set RAY_TMPDIR to a folder of your own (a short path: sockets stand in it)"
    if not root.is_dir():
        said = f"{root} is no folder" if os.path.lexists(root) else f"{root} does not exist"
        remedy = f"mkdir -p {root}, or {own}"
        yield judged("temp", "", [(FAIL, said, remedy)], values)
        return
    problems: list[Problem] = []
    about = os.statvfs(root)
    total, free = about.f_blocks * about.f_frsize, about.f_bavail * about.f_frsize
    share = 1 - free / total if total else 0.0
    remedy = f"make room in {root}, or set RAY_TMPDIR (ray start --temp-dir) to a larger disk; `ray` leaves old sessions in {root}/ray"
    if share > RAY_DISK_SHARE:
        said = f"{share:.0%} full: above {RAY_DISK_SHARE:.0%} Ray stores and spills no objects"
        problems.append((FAIL, said, remedy))
    elif share > 0.9 or free < 2e9:
        said = f"{share:.0%} full: at {RAY_DISK_SHARE:.0%} Ray stores and spills no objects"
        problems.append((WARN, said, remedy))
    if about.f_files and about.f_favail < FEW_INODES:
        said = f"room for {about.f_favail:,} more files only"
        problems.append((WARN, said, f"remove what has many small files there (df -i {root})"))
    sessions = root / "ray" if (root / "ray").exists() else root
    if not os.access(sessions, os.W_OK | os.X_OK):
        problems.append((FAIL, f"this account may not write in {sessions}", own))
    socket_name = (
        f"{root}/ray/session_2026-01-01_00-00-00_000000_{os.getpid()}/sockets/plasma_store"
    )
    if len(os.fsencode(socket_name)) > MOST_SOCKET_BYTES:
        problems.append((FAIL, "its path leaves no room for the names of Ray's sockets", own))
    values |= {"free_bytes": free, "total_bytes": total}
    yield judged(
        "temp", f"{gigabytes(free)} free of {gigabytes(total)} at {root}", problems, values
    )


def private_ray(options: Options) -> Steps:
    """What preparing, and training on this machine's workers, begin with."""
    if options.address or options.node:
        return
    root = os.environ.get("RAY_TMPDIR") or "/tmp"
    remedy = f"see the last lines of {root}/ray/session_latest/logs/*.err and gcs_server.out, and what this doctor says of temp and cpus"
    yield At("ray", "starting a Ray on this machine", remedy)
    os.environ.pop("RAY_ADDRESS", None)
    began = time.monotonic()
    from potstill.cluster import start_ray

    start_ray(1)
    import ray

    yield At("ray", "running a task", remedy)

    def task() -> str:
        import potstill

        return potstill.__name__

    try:
        ray.get(ray.remote(task).options(num_cpus=1).remote(), timeout=60)
        took_s = time.monotonic() - began
        yield At("ray", "stopping it")
    finally:
        ray.shutdown()
    said = f"a Ray of our own starts, and runs a task, in {took_s:.1f} s"
    yield judged("ray", said, [], {"version": ray.__version__, "seconds": round(took_s, 1)})
