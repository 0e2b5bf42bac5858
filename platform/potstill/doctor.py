"""Looks a machine or a cluster over before a long run: each check measures, judges by a rule and names the remedy.

Every check has its time-out, and what may hang or take its process down (drivers, network mounts, Ray, RocksDB) is
looked at in a child, `python -m potstill.doctor --child <checks>`: a dead mount, a cluster that does not answer and a
broken package are findings. So nothing but the standard library is imported here, unless a check needs it.

A check is a generator of Findings; in between it yields an At, so that whoever has to kill it knows where it was.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from potstill import doctor_machine, doctor_storage
from potstill.doctor_findings import (
    FAIL,
    PASS,
    SYNC,
    WARN,
    At,
    Finding,
    Options,
    Steps,
    brief,
    judged,
    several,
    split_address,
)

MARKS = {PASS: "✓", WARN: "!", FAIL: "✗"}
STYLES = {PASS: "green", WARN: "yellow", FAIL: "red"}
MOST_AT_ONCE = 8
FLAGS = {
    "runs.dir": "--runs",
    "cache.dir": "--cache",
    "cache.local_dir": "--local-cache",
    "tracking.repo": "--repo",
    "scaling.num_workers": "--gpus",
}
"""What the other jobs call it."""


# ------------------------------------------------------------------------------------ which checks there are
def _cluster(options: Options) -> Steps:
    if options.address:
        from potstill.doctor_cluster import join_and_look

        yield from join_and_look(options)


@dataclass(frozen=True)
class _Runner:
    """Checks that are made in one go."""

    names: tuple[str, ...]
    run: Callable[[Options], Steps]
    timeout_s: float
    child: bool = True
    """In a process of its own, which can be killed."""


GROUPS = {
    "this machine": {
        "python": "its version, against what the project needs",
        "packages": "their versions, against what the project needs, and what they need in turn",
        "imports": "those with compiled parts load, and no other file stands in a package's place",
        "driver": "NVIDIA's driver",
        "gpus": "each GPU: free memory, other processes, heat, memory errors, modes, bf16",
        "cuda": "torch's CUDA against the driver's, and a product on each GPU",
        "cpus": "cores that this process may use, load",
        "memory": "what is free of it, within the container's limit",
        "shared-memory": "/dev/shm, where Ray's objects lie",
        "open-files": "ulimit -n",
        "processes": "how many there may be",
        "inotify": "instances of this account, which Aim's explorer takes",
        "temp": "the disk of Ray's sessions and spilled objects",
        "token": "RAY_AUTH_MODE, and who can read the token",
        "ray": "a Ray of our own starts (where there is no cluster)",
    },
    "cluster": {
        "reach": "the cluster answers, and takes this Python, Ray and token",
        "nodes": "each node starts a process, and is looked at as this machine is",
        "versions": "Python, Ray, torch, … are the same everywhere",
        "code": "potstill imports everywhere, and is the same",
        "roles": "labels of the nodes; the head takes no work; GPUs that are there",
        "clocks": "how far they are apart",
        "network": "every node reaches every other one on any port",
        "dashboard": "nobody is let in without a token",
        "object-store": "its size, and whether it fits /dev/shm",
    },
    "storage": {
        "runs": "can be made, written, synced, renamed, locked; free space; kind and speed",
        "runs-copy": "the folder on this machine of runs in an object store",
        "cache": "as runs, and mapped into memory",
        "cache-copy": "the folder on this machine of a cache in an object store",
        "local-cache": "the folder of each node's copies",
        "runs-seen": "every node reads, writes and locks it",
        "cache-seen": "every node reads, writes and locks it",
    },
    "tracking": {
        "aim": "Aim's version, its repository's, and that it can be opened",
        "aim-runs": "every run's database can be read to its end",
        "aim-index": "what stands in the runs is found by a query",
        "aim-journals": "runs that were tracked are in it",
        "aim-locks": "runs and locks that a dead process has left",
    },
}
NAMES = {name: group for group, names in GROUPS.items() for name in names}

# what takes longest first
_RUNNERS = (
    _Runner((*GROUPS["cluster"], "runs-seen", "cache-seen"), _cluster, 420),
    _Runner(("driver", "gpus", "imports", "cuda"), doctor_machine.gpus, 150),
    _Runner(("ray",), doctor_machine.private_ray, 120),
    _Runner(("aim", "aim-runs", "aim-index", "aim-journals", "aim-locks"), doctor_storage.aim, 150),
    _Runner(("runs", "runs-copy"), doctor_storage.runs, 60),
    _Runner(("cache", "cache-copy"), doctor_storage.cache, 60),
    _Runner(("local-cache",), doctor_storage.local_cache, 60),
    _Runner(("temp",), doctor_machine.temp, 15),
    _Runner(("python", "packages"), doctor_machine.python, 30, child=False),
    _Runner(("cpus", "memory", "shared-memory", "open-files", "processes", "inotify"), doctor_machine.limits, 15, child=False),
    _Runner(("token",), doctor_machine.token, 10, child=False),
)  # fmt: skip


# --------------------------------------------------------------------------------------------- running
class _Children:
    """The processes that are at work for us, each with whatever it has started."""

    def __init__(self) -> None:
        self._groups: set[int] = set()
        self._over = False
        self._lock = threading.Lock()

    def start(self, name: str, said: IO[str], errors: IO[str]) -> subprocess.Popen[str] | None:
        """None when all is over. Raises OSError."""
        root = str(Path(__file__).resolve().parents[1])
        paths = [root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
        with self._lock:
            if self._over:
                return None
            child = subprocess.Popen(
                [sys.executable, "-P", "-m", "potstill.doctor", "--child", name],
                stdin=subprocess.PIPE,
                stdout=said,
                stderr=errors,
                text=True,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
                start_new_session=True,
            )
            self._groups.add(child.pid)
        return child

    def end(self, child: subprocess.Popen[str]) -> None:
        self._kill(child.pid)
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(5)  # one that hangs in the kernel cannot be waited for
        with self._lock:
            self._groups.discard(child.pid)

    def end_all(self) -> None:
        """No other is started after it."""
        with self._lock:
            self._over = True
            for group in self._groups:
                self._kill(group)

    @staticmethod
    def _kill(group: int) -> None:
        with contextlib.suppress(OSError):
            os.killpg(group, signal.SIGKILL)


def examine(
    options: Options,
    timeouts_s: Mapping[str, float] | None = None,
    busy: Callable[[set[str]], None] | None = None,
) -> list[Finding]:
    """Make the wanted checks, several at a time, each within its time; `timeouts_s` by a runner's first name.

    `busy` hears, from other threads, which are being made.
    """
    slots = threading.Semaphore(min(max(len(os.sched_getaffinity(0)), 2), MOST_AT_ONCE))
    chosen = [r for r in _RUNNERS if options.wants(*r.names)]
    results: dict[str, list[Finding]] = {}
    at_work: set[str] = set()
    children = _Children()
    lock = threading.Lock()

    def work(runner: _Runner) -> None:
        name = runner.names[0]
        limit_s = (timeouts_s or {}).get(name, runner.timeout_s)
        with slots if runner.child else contextlib.nullcontext():
            with lock:
                at_work.add(name)
                if busy:
                    busy(at_work)
            try:
                if runner.child:
                    found = _in_child(runner, options, limit_s, children)
                else:
                    found = _in_thread(runner, options, limit_s)
            except OSError as error:  # no memory, no processes, no files left
                found = [_not_begun(runner, error)]
        with lock:
            results[name] = found
            at_work.discard(name)
            if busy:
                busy(at_work)

    threads = [(r, threading.Thread(target=work, args=(r,), daemon=True)) for r in chosen]
    try:
        for runner, thread in threads:
            try:
                thread.start()
            except RuntimeError as error:
                results[runner.names[0]] = [_not_begun(runner, error)]
        for _, thread in threads:
            if thread.ident is not None:
                thread.join()
    finally:
        children.end_all()  # after Ctrl-C
    found = [f for each in results.values() for f in each if options.wants(f.name)]
    order = list(NAMES)
    return sorted(found, key=lambda f: order.index(f.name))


def _not_begun(runner: _Runner, error: Exception) -> Finding:
    remedy = "end what else runs here, or raise the limits of memory, processes and open files (free, ulimit -a)"
    said = f"nothing can be started to look at it ({brief(error)})"
    return judged(runner.names[0], "", [(FAIL, said, remedy)])


def _steps(runner: _Runner, options: Options) -> Steps:
    """The runner's findings, the last of them a failure where it raises."""
    last = At(next(n for n in runner.names if options.wants(n)), "starting")
    try:
        for step in runner.run(options):
            if isinstance(step, At):
                last = step
            yield step
    except Exception as error:
        remedy = (
            SYNC
            if isinstance(error, ImportError)
            else last.remedy or "this is a mistake of the doctor's: please report it"
        )
        yield judged(last.name, "", [(FAIL, f"{last.doing}: {brief(error)}", remedy)])


def _ended_early(last: At, why: str, hung: bool) -> Finding:
    remedy = last.remedy or (
        "look after what it waits for: a mount that hangs (stat it), a driver (dmesg), a machine too busy"
        if hung
        else "look after what it used last: a driver (dmesg), or packages that do not fit each other (uv sync --reinstall)"
    )
    return judged(last.name, "", [(FAIL, f"{last.doing}: {why}", remedy)])


def _in_thread(runner: _Runner, options: Options, timeout_s: float) -> list[Finding]:
    steps: list[Finding | At] = []
    thread = threading.Thread(target=lambda: steps.extend(_steps(runner, options)), daemon=True)
    thread.start()
    thread.join(timeout_s)
    known, hangs = list(steps), thread.is_alive()
    found = [step for step in known if isinstance(step, Finding)]
    if hangs:
        at = [step for step in known if isinstance(step, At)] or [At(runner.names[0], "reading")]
        found.append(_ended_early(at[-1], f"no answer within {timeout_s:.0f} s", hung=True))
    return found


def _in_child(
    runner: _Runner, options: Options, timeout_s: float, children: _Children
) -> list[Finding]:
    with _in_memory() as said, _in_memory() as errors:
        child = children.start(runner.names[0], said, errors)
        if child is None:
            return []
        hung = False
        try:
            child.communicate(json.dumps(dataclasses.asdict(options)), timeout=timeout_s)
        except subprocess.TimeoutExpired:
            hung = True
        finally:
            children.end(child)
        last = At(runner.names[0], "starting")
        found = []
        said.seek(0)
        for line in said:
            with contextlib.suppress(ValueError, TypeError):  # a torn line
                step = json.loads(line)
                if "doing" in step:
                    last = At(**step)
                else:
                    found.append(Finding(**{**step, "remedies": tuple(step["remedies"])}))
        if hung:
            found.append(_ended_early(last, f"no answer within {timeout_s:.0f} s", hung))
        elif child.returncode:
            errors.seek(0)
            found.append(_ended_early(last, _how_it_died(child.returncode, errors.read()), hung))
    return found


def _in_memory() -> IO[str]:
    """A file for a child to write to, without a disk: one that is full is among what there is to find."""
    return os.fdopen(os.memfd_create("doctor"), "w+", errors="replace")


def _how_it_died(code: int, errors: str) -> str:
    before = errors.partition("***")[0]  # what libraries print of their stack says nothing
    lines = [line.strip() for line in before.splitlines() if line.strip()]
    how = signal.Signals(-code).name if code < 0 else f"status {code}"
    return ": ".join([f"its process ended with {how}", *lines[-1:]])[:400]


def _child(name: str) -> int:
    """Make one runner's checks, and say each step in a line of JSON."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # libraries print
    given = json.loads(sys.stdin.read())
    options = Options(**{**given, "wanted": tuple(given["wanted"])})
    runner = next(r for r in _RUNNERS if r.names[0] == name)
    for step in _steps(runner, options):
        print(json.dumps(dataclasses.asdict(step), default=str), file=answers, flush=True)
    answers.close()
    # an exit by the book may wait for threads that hang, or print what libraries have to say at the end
    os._exit(0)


# ------------------------------------------------------------------------------------------- the command
def command(arguments: Sequence[str], about: str) -> int:
    """What `jobs/doctor.py` does. Returns the exit status."""
    options, flags = _parse(arguments, about)
    shown = _Busy(not flags.json)
    began = time.monotonic()
    if threading.current_thread() is threading.main_thread():
        # `ray job stop`; and a shell's background job is born with the second one ignored
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.default_int_handler)
    try:
        found = examine(options, busy=shown)
    except KeyboardInterrupt:
        return 130
    finally:
        shown.clear()
    took_s = time.monotonic() - began
    counts = {status: sum(f.status == status for f in found) for status in MARKS}
    failed = bool(counts[FAIL] or (flags.strict and counts[WARN]))
    try:
        if flags.json:
            _print_json(options, found, counts, took_s, ok=not failed)
        else:
            _show(found, counts, took_s)
        sys.stdout.flush()
    except BrokenPipeError:  # `doctor.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return int(failed)


def _print_json(
    options: Options, found: Sequence[Finding], counts: Mapping[str, int], took_s: float, ok: bool
) -> None:
    result = {
        "host": socket.gethostname(),
        "address": options.address,
        "time": time.time(),
        "seconds": round(took_s, 1),
        "counts": counts,
        "ok": ok,
        "checks": [{"group": NAMES[f.name], **dataclasses.asdict(f)} for f in found],
    }
    print(json.dumps(result, indent=2, default=str))


def _parse(arguments: Sequence[str], about: str) -> tuple[Options, argparse.Namespace]:
    listed = "\n".join(
        f"\n{group}:\n" + "\n".join(f"  {name:<15} {what}" for name, what in names.items())
        for group, names in GROUPS.items()
    )
    parser = argparse.ArgumentParser(
        prog="jobs/doctor.py",
        description=about,
        epilog=f"checks:{listed}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--runs", metavar="DIR|URI", default="runs", help="runs.dir of the run (default: runs)")
    add("--cache", metavar="DIR|URI", default="cache", help="its cache.dir (default: cache)")
    add("--local-cache", metavar="DIR", help="its cache.local_dir, on every node")
    add(
        "--repo",
        metavar="DIR",
        help="its tracking.repo, the folder of .aim (default: that of --runs)",
    )
    add(
        "--need-gb",
        type=float,
        metavar="GB",
        help="free space that each folder must have (default: runs 5, cache and local-cache 10)",
    )
    add(
        "--gpus",
        type=int,
        metavar="N",
        help="how many GPUs it will use (default: as many as there are, if any)",
    )
    add(
        "--address",
        metavar="HOST:PORT",
        default=os.environ.get("RAY_ADDRESS"),
        help="the cluster's head, or auto for the Ray of this machine (default: RAY_ADDRESS; without: this machine only)",
    )
    names = "NAME,…"
    add("--only", metavar=names, action="append", help="these checks, or groups of them, alone")
    add("--skip", metavar=names, action="append", help="all but these")
    add("--strict", action="store_true", help="a warning is a failure")
    add("--json", action="store_true", help="print one JSON object instead of the table")
    add("--node", action="store_true", help=argparse.SUPPRESS)
    flags, rest = parser.parse_known_args(arguments)
    for each in rest:
        key, equals, value = each.partition("=")
        if equals and key in FLAGS:
            flag = f"{FLAGS[key]} {shlex.quote(value)}"
            parser.error(f"it takes flags, not keys: write {flag}, got {each!r}")
    if rest:
        parser.error(f"it knows no {' '.join(rest)!r}; --help lists what it knows")
    only, skip = _chosen(parser, "--only", flags.only), _chosen(parser, "--skip", flags.skip)
    wanted = tuple(n for n in NAMES if (not only or n in only) and n not in skip)
    if not wanted:
        parser.error("--skip must leave a check, got all of them")
    _refuse_no_folders(parser, flags)
    if flags.need_gb is not None and not 0 <= flags.need_gb < float("inf"):
        parser.error(f"--need-gb must be a number >= 0, got {flags.need_gb:g}")
    if flags.gpus is not None and flags.gpus < 0:
        parser.error(f"--gpus must be >= 0, got {flags.gpus}")
    return Options(
        runs=flags.runs,
        cache=flags.cache,
        local_cache=flags.local_cache,
        repo=flags.repo,
        need_gb=flags.need_gb,
        gpus=flags.gpus,
        address=_address(parser, flags),
        wanted=wanted,
        node=flags.node,
    ), flags


def _chosen(parser: argparse.ArgumentParser, flag: str, texts: list[str] | None) -> list[str]:
    """The checks that a flag names, or those of the groups that it names."""
    found: list[str] = []
    for name in filter(None, (n.strip() for text in texts or () for n in text.split(","))):
        name = "this machine" if name == "machine" else name
        if name not in NAMES and name not in GROUPS:
            import difflib

            near = difflib.get_close_matches(name, [*NAMES, *GROUPS], n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the checks"
            parser.error(f"{flag} must name checks, got {name!r}; {hint}")
        found += GROUPS.get(name, [name])
    return found


def _refuse_no_folders(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> None:
    with contextlib.suppress(ImportError):  # without what reads URIs, the check says so
        from potstill.errors import UserError
        from potstill.storage import local_folder

        for flag in ("runs", "cache", "local_cache", "repo"):
            text = getattr(flags, flag)
            try:
                if text is not None:
                    local_folder(text, f"--{flag.replace('_', '-')}")
            except UserError as error:
                parser.error(str(error))
            except FileNotFoundError:
                parser.error("the current folder is gone: cd to another one")


def _address(parser: argparse.ArgumentParser, flags: argparse.Namespace) -> str | None:
    address = (flags.address or "").strip()
    if flags.node or address in ("", "local"):
        return None
    if address != "auto":
        try:
            split_address(address)
        except ValueError:
            said = "--address" if flags.address != os.environ.get("RAY_ADDRESS") else "RAY_ADDRESS"
            parser.error(
                f"{said} must be host:port of the cluster's head (port 6379 as a rule), auto for the Ray of this machine, or "
                f"nothing for this machine alone, got {address!r}; http://…:8265 is for `ray job submit --address`"
            )
    return address


class _Busy:
    """A line on a terminal that says what is being looked at, and goes when it is over."""

    def __init__(self, wanted: bool) -> None:
        self._on = wanted and sys.stderr.isatty()

    def __call__(self, names: set[str]) -> None:
        if self._on:
            sys.stderr.write(f"\r\x1b[K{', '.join(sorted(names))} …")
            sys.stderr.flush()

    def clear(self) -> None:
        if self._on:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def _show(found: Sequence[Finding], counts: Mapping[str, int], seconds: float) -> None:
    import textwrap

    columns = max(60, shutil.get_terminal_size((100, 24)).columns)
    wide = max((len(f.name) for f in found), default=0)
    group = ""
    for each in found:
        if NAMES[each.name] != group:
            _say(f"{'' if not group else chr(10)}{NAMES[each.name]}", "bold")
            group = NAMES[each.name]
        head = f" {MARKS[each.status]} {each.name:<{wide}}  "
        indent = " " * len(head)
        lines = textwrap.wrap(each.found, columns - len(head), break_on_hyphens=False) or [""]
        _say(head + f"\n{indent}".join(lines), "" if each.status == PASS else STYLES[each.status])
        for remedy in each.remedies:
            _say(f"{indent}→ " + f"\n{indent}  ".join(_folded(remedy, columns - len(indent) - 2)))
    said = [f"{counts[PASS]} well"]
    said += [several(counts[WARN], "warning")] if counts[WARN] else []
    said += [f"{counts[FAIL]} failed"] if counts[FAIL] else []
    style = STYLES[FAIL if counts[FAIL] else WARN if counts[WARN] else PASS]
    _say(f"\n{', '.join(said)} ({seconds:.0f} s)", style)


def _folded(remedy: str, columns: int) -> list[str]:
    """The lines of a remedy; a command stays on one, to be copied."""
    import textwrap

    commands = (
        "uv ",
        "rm ",
        "ray ",
        "chmod ",
        "export ",
        "ulimit ",
        "docker ",
        "mount ",
        "sysctl ",
    )
    if (remedy.startswith(commands) and "; " not in remedy) or len(remedy) <= columns:
        return [remedy]
    return textwrap.wrap(remedy, columns, break_on_hyphens=False, break_long_words=False)


def _say(text: str, style: str = "") -> None:
    try:
        from potstill.console import say
    except ImportError:  # where rich is missing, that is among the findings
        print(text)
    else:
        say(text, style)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        sys.exit(_child(sys.argv[2]))
    sys.exit(command(sys.argv[1:], __doc__ or ""))
