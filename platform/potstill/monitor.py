"""What runs, and on what: runs, searches, GPUs, machine, cache, disks and cluster, in a terminal or as JSON.

`Monitor.look` returns all of it as one dictionary, which monitor.schema.json describes and --json prints; the view is
drawn from that dictionary alone. A section that cannot be read says why, and takes none of the others with it.

    monitor_runs.py       runs, searches and distillations, from their folders
    monitor_machine.py    GPUs, cores, memory, disks, caches
    monitor_ray.py        a cluster
    monitor_view.py       the view
"""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import signal
import socket
import sys
import tempfile
import termios
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from potstill.errors import UserError
from potstill.monitor_machine import Gpus, Machine, Owners, look_at_cache, look_at_disks
from potstill.monitor_ray import RayWatch
from potstill.monitor_runs import (
    ACTIVE,
    Distillation,
    Run,
    RunsFolder,
    Search,
    Told,
    Watched,
    one_line,
)
from potstill.monitor_view import as_ascii, render
from potstill.storage import local_folder

VERSION = 1
"""Of the JSON; a change that a reader must know of raises it."""
SCHEMA = Path(__file__).with_name("monitor.schema.json")

INTERVAL_S = 2.0
PLAIN_INTERVAL_S = 60.0
"""Where the view goes to a file or to a job's log."""
CACHE_EVERY_S = 10.0
"""Looking through a cache is a stat of each of its shards."""
CPU_SAMPLE_S = 0.4
PLAIN_WIDTH = 100


# ---------------------------------------------------------------------------------------- all together
@dataclass
class Options:
    runs: Sequence[str] = ("runs",)
    cache: str | None = None
    """None: `cache`, where it is there or nothing else is."""
    local_cache: str | None = None
    cache_max_gb: float | None = None
    address: str | None = None
    everything: bool = False
    """Runs that ended within the last day, too."""


class Monitor:
    def __init__(self, options: Options, gpus: Gpus | None = None) -> None:
        """Raises UserError for a folder that cannot be read, and for an address that is none."""
        self.options = options
        self.folders = [RunsFolder(given) for given in options.runs]
        self.ray = RayWatch(options.address) if options.address else None
        if self.ray:
            self.ray.ask()  # it answers while the rest is looked at
        self.machine, self.gpus = Machine(), gpus or Gpus()
        self._began = time.monotonic()
        self._caches: tuple[float, list[Told]] = (-math.inf, [])

    def look(self, first: bool = False) -> Told:
        """All there is to tell, as monitor.schema.json has it. `first`: wait for what takes a moment."""
        errors: list[Told] = []

        def section(name: str, work: Callable[[], Any], otherwise: Any) -> Any:
            try:
                return work()
            except Exception as error:
                message = one_line(error) or type(error).__name__
                errors.append({"section": name, "message": message})
                return otherwise

        now = time.time()
        nothing = {"folders": [], "runs": [], "searches": [], "distillations": []}
        told = section("runs", lambda: self._runs(now, errors), nothing)
        active = [one for folder in self.folders for one in self._active(folder)]
        caches = section("caches", lambda: self._look_at_caches(active), [])
        disks = section("disks", lambda: look_at_disks(self._places(caches)), [])
        gpus = section("gpus", lambda: self.gpus.look(Owners(_all(told))), None)
        if first:
            if self.ray:
                self.ray.wait()
            time.sleep(max(0.0, self._began + CPU_SAMPLE_S - time.monotonic()))
        machine = section("machine", self.machine.look, None)
        ray = section("ray", self.ray.look, None) if self.ray else None
        return {
            "version": VERSION,
            "time": now,
            "host": socket.gethostname(),
            **told,
            "gpus": gpus,
            "machine": machine,
            "caches": caches,
            "disks": disks,
            "ray": ray,
            "errors": errors,
        }

    def close(self) -> None:
        self.gpus.close()
        if self.ray:
            self.ray.close()

    def _runs(self, now: float, errors: list[Told]) -> Told:
        told: Told = {"folders": [], "runs": [], "searches": [], "distillations": []}
        chosen: dict[Path, Watched] = {}
        for folder in self.folders:
            about: Told = {"path": str(folder.folder), "exists": folder.folder.is_dir()}
            about |= {"counts": {}, "error": None}
            told["folders"].append(about)
            try:
                folder.look()
            except OSError as error:
                about["error"] = error.strerror or str(error)
                continue
            about["counts"] = folder.counts()
            chosen |= {one.folder: one for one in folder.chosen(now, self.options.everything)}
        for one in sorted(chosen.values(), key=lambda one: one.order()):
            self._tell(one, now, told, errors)
        return told

    def _tell(self, one: Watched, now: float, told: Told, errors: list[Told]) -> None:
        """A journal that makes no sense is its own run's trouble."""
        if one.trouble:
            errors.append({"section": "runs", "message": f"{one.folder.name}: {one.trouble}"})
            return
        lists = {Run: "runs", Search: "searches", Distillation: "distillations"}
        try:
            told[lists[type(one)]].append(one.about(now))
            if isinstance(one, Search):
                told["runs"] += [trial.about(now) for trial in one.running()]
        except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            message = f"{one.folder.name}: {type(error).__name__}: {one_line(error, 160)}"
            errors.append({"section": "runs", "message": message})

    def _active(self, folder: RunsFolder) -> list[Run]:
        found = []
        for one in folder.watched.values():
            found += one.running() if isinstance(one, Search) else []
            found += [one] if isinstance(one, Run) and one.state in ACTIVE else []
        return found

    def _look_at_caches(self, active: list[Run]) -> list[Told]:
        now = time.monotonic()
        if now - self._caches[0] >= CACHE_EVERY_S:
            self._caches = (now, self._find_caches(active))
        return self._caches[1]

    def _find_caches(self, active: list[Run]) -> list[Told]:
        """The folders that were named, and those that runs under way use; the tightest limit of these, or the flag's."""
        options = self.options
        found: dict[Path, bool] = {}
        """Whether it is one of node-local copies."""
        limits: dict[Path, list[tuple[float, str]]] = {}
        if options.cache is not None:
            found[local_folder(options.cache, "cache.dir")] = False
        if options.local_cache:
            found[local_folder(options.local_cache, "cache.local_dir")] = True
        for run in active:
            settings = run.settings()
            for key, local in (("cache", False), ("local_dir", True)):
                if settings.get(key):
                    folder = local_folder(str(settings[key]), f"cache.{key}")
                    found.setdefault(folder, local)
                    if settings.get("max_gb"):
                        limit = (settings["max_gb"], f"run {run.folder.name}")
                        limits.setdefault(folder, []).append(limit)
        usual = local_folder("cache")
        if options.cache is None and (usual.is_dir() or not found):
            found.setdefault(usual, False)
        flag = [(options.cache_max_gb, "flag")] if options.cache_max_gb is not None else None
        return [
            look_at_cache(folder, local, *min(flag or limits.get(folder) or [(None, None)]))
            for folder, local in found.items()
        ]

    def _places(self, caches: list[Told]) -> dict[str, Path]:
        names = ["runs"] if len(self.folders) == 1 else [str(f.folder) for f in self.folders]
        places = dict(zip(names, (f.folder for f in self.folders), strict=True))
        for cache in caches:
            name = "local cache" if cache["local"] else "cache"
            places[name if name not in places else cache["path"]] = Path(cache["path"])
        for place in (tempfile.gettempdir(), "/dev/shm"):
            places[place] = Path(place)
        return places


def _all(told: Told) -> list[Told]:
    return [*told["runs"], *told["searches"], *told["distillations"]]


# ---------------------------------------------------------------------------------------- the command
def command(arguments: Sequence[str], about: str | None) -> int:
    """What jobs/monitor.py does; returns the exit status."""
    flags = _parser(about).parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGINT):
        # a shell's background job is born with the second one ignored
        signal.signal(number, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt), closing(Monitor(_options(flags))) as monitor:
            _show(monitor, flags)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # `monitor.py --json | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def _options(flags: argparse.Namespace) -> Options:
    if flags.interval_s is not None and not 0.2 <= flags.interval_s <= 3600:
        raise UserError(f"--interval-s must be from 0.2 to 3600, got {flags.interval_s:g}")
    if flags.cache_max_gb is not None and not flags.cache_max_gb > 0:
        raise UserError(f"--cache-max-gb must be > 0, got {flags.cache_max_gb:g}")
    address = flags.address or os.environ.get("RAY_ADDRESS")
    return Options(
        runs=flags.runs or ("runs",),
        cache=flags.cache,
        local_cache=flags.local_cache,
        cache_max_gb=flags.cache_max_gb,
        address=None if address in (None, "", "local") else address,
        everything=flags.all,
    )


def _parser(about: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="jobs/monitor.py",
        description=about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add(
        "--runs",
        action="append",
        metavar="DIR|URI",
        help="runs.dir of the runs to watch, or one run's folder; may be given again (default: runs)",
    )
    add(
        "--cache",
        metavar="DIR|URI",
        help="cache.dir (default: cache, and those that runs under way use)",
    )
    add("--local-cache", metavar="DIR", help="cache.local_dir, if there is one")
    add(
        "--cache-max-gb",
        type=float,
        metavar="GB",
        help="the cache's limit (default: the tightest of the runs under way)",
    )
    add(
        "--address",
        help="a Ray cluster: <head>:6379, auto for the one of this machine, or http://<dashboard>:8265, which does not know "
        "the autoscaler (default: RAY_ADDRESS; none: this machine alone)",
    )
    add(
        "--interval-s",
        type=float,
        metavar="S",
        help=f"seconds between two looks (default: {INTERVAL_S:g}; {PLAIN_INTERVAL_S:g} where the view goes to a file)",
    )
    add("--all", action="store_true", help="runs that ended within the last day, too")
    add("--once", action="store_true", help="look once, print, and stop")
    add("--json", action="store_true", help="one JSON object a look, one to a line")
    return parser


def _show(monitor: Monitor, flags: argparse.Namespace) -> None:
    capable = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    live = capable and not flags.once and not flags.json
    interval_s = flags.interval_s or (INTERVAL_S if live or flags.json else PLAIN_INTERVAL_S)
    if live:
        _watch(monitor, interval_s)
        return
    first = True
    while True:
        told = monitor.look(first)
        if flags.json:
            print(json.dumps(told, allow_nan=False), flush=True)
        else:
            _print(told)
        if flags.once:
            return
        first = False
        time.sleep(interval_s)


def _drawn(screen: Console, told: Told, width: int, height: int | None = None, hint="") -> Text:
    """The view in the characters that `screen` takes."""
    view = render(told, width, height, hint)
    return view if "utf" in (screen.encoding or "").lower() else as_ascii(view)


def _print(told: Told) -> None:
    """The view as plain text, or with colours on a terminal; a blank line after it."""
    screen = Console(highlight=False)
    if not (screen.is_terminal or os.environ.get("COLUMNS")):
        screen.width = PLAIN_WIDTH
    screen.print(_drawn(screen, told, screen.width), no_wrap=True, crop=False, soft_wrap=True)
    screen.print()
    screen.file.flush()


def _watch(monitor: Monitor, interval_s: float) -> None:
    """The live view: drawn anew at every look, at every change of the terminal's size; `q` ends it."""
    from rich.live import Live

    for name in (
        "COLUMNS",
        "LINES",
    ):  # readline exports them: the size that was, which would hold for ever
        os.environ.pop(name, None)
    screen = Console(highlight=False)
    hint = f"every {interval_s:g} s, q ends"
    with _woken() as wake, Live(console=screen, screen=True, auto_refresh=False) as live:
        told, due = monitor.look(), time.monotonic() + interval_s
        while True:
            view = _drawn(screen, told, screen.width, screen.height, hint)
            live.update(view, refresh=True)
            if wake(max(0.05, due - time.monotonic())) in ("q", "Q"):
                return
            if time.monotonic() >= due:
                due = time.monotonic() + interval_s
                told = monitor.look()


@contextmanager
def _woken() -> Iterator[Callable[[float], str]]:
    """Yields `wake(timeout_s)`, which returns the key that was pressed, or "" after the time or when the terminal's size
    has changed. Keys come without Enter while the block runs."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    before_wakeup = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    before_size = signal.signal(signal.SIGWINCH, lambda *_: None)
    keys = sys.stdin.fileno() if sys.stdin and sys.stdin.isatty() else None
    mode = termios.tcgetattr(keys) if keys is not None else None
    if keys is not None:
        tty.setcbreak(keys)

    def wake(timeout_s: float) -> str:
        nonlocal keys
        there = [reader] if keys is None else [reader, keys]
        ready, _, _ = select.select(there, [], [], timeout_s)
        if reader in ready:
            os.read(reader, 512)
        if keys is not None and keys in ready:
            pressed = os.read(keys, 1).decode(errors="replace")
            if not pressed:  # the terminal's input has ended; what it shows has not
                keys = None
            return pressed
        return ""

    try:
        yield wake
    finally:
        if mode is not None:
            termios.tcsetattr(sys.stdin.fileno(), termios.TCSADRAIN, mode)
        signal.signal(signal.SIGWINCH, before_size)
        signal.set_wakeup_fd(before_wakeup)
        os.close(reader)
        os.close(writer)
