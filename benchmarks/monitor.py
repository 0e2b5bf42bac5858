"""What it costs to leave the monitor open, by how many runs there are: beside Glances, top and a bare loop.

  uv run benchmarks/monitor.py [--runs 50 1000] [--seconds 30] [--rounds 3] [--output monitor-benchmark]

Makes a folder of so many runs for each of --runs: one in 25 is under way, the others have ended. Their journals are as
trainings of 20 epochs leave them; those under way have 2,000 updates behind them, and get a line a second.

open     each program on a terminal of 120 x 40, a look every 2 s, `--rounds` times in turns (A B … B A), `--seconds` each
         after three looks that do not count. CPU time by the kernel's account, as a share of one core, and memory that
         would be free without it (USS).
           ours      jobs/monitor.py, for each number of runs
           Glances   the terminal monitor that is written in Python, too: as it comes, with all processes, networks and
                     sensors, which ours does not show; left out where `glances` is not on the PATH (pip install glances)
           top       Debian's procps, in C
           bare      a loop of psutil's cores and memory, drawn by rich.Live in 40 lines: what a look costs in Python
                     before it has told anything of a run
         The ratio is that of a round to Glances, or to top where that is missing; its median.
refresh  one look in this process, seconds of CPU, the median of 20: reading, and drawing for 120 x 40; beside what reading
         every journal anew costs (runs.read_journal of each run), as is usual where nothing is remembered.

Writes monitor.json.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import math
import os
import pty
import shutil
import statistics
import struct
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from potstill import console, runs
from potstill.monitor import Monitor, Options
from potstill.monitor_view import render

ROOT = Path(__file__).resolve().parents[1]
EVERY_S = 2.0
WIDTH, HEIGHT = 120, 40
EPOCHS, STEPS_PER_EPOCH, LOGGED = 20, 50, 5
BARE = """
import psutil, time
from rich.console import Console
from rich.live import Live
from rich.text import Text
screen = Console()
with Live(console=screen, screen=True, auto_refresh=False) as live:
    while True:
        said = f"{psutil.cpu_percent()} {psutil.virtual_memory().percent} "
        live.update(Text("\\n").join(Text(said * 8) for _ in range(40)), refresh=True)
        time.sleep(EVERY_S)
"""


# ----------------------------------------------------------------------------------------------- the runs
def journal(began: float, epochs: int, every: int, ended: bool) -> Iterator[dict[str, Any]]:
    """A training's records: an update logged in `every`."""
    last = {"attempt": 1, "step": epochs * STEPS_PER_EPOCH}
    about = {"epochs": 4 * EPOCHS, "steps_per_epoch": STEPS_PER_EPOCH, "world_size": 1}
    about |= {"device": "cpu", "host": "here", "pid": 1, "monitor": "val_top1_acc", "epoch": 0}
    yield {"kind": "attempt", "attempt": 1, "step": 0, "time": began, **about}
    for step in range(every, last["step"] + 1, every):
        epoch = (step - 1) // STEPS_PER_EPOCH + 1
        at = {"attempt": 1, "step": step, "time": began + step, "epoch": epoch}
        loss = 2.5 * math.exp(-step / 1000)
        of_step = {"loss": loss, "lr": 1e-3, "images_per_s": 900.0}
        yield {"kind": "step", **at, **of_step, "epoch_step": (step - 1) % STEPS_PER_EPOCH + 1}
        if step % STEPS_PER_EPOCH == 0:
            values = {"val_loss": loss, "val_top1_acc": 100 * math.exp(-loss), "best": True}
            times = {"seconds": 50.0, "total_seconds": float(step), "warnings": []}
            left = (4 * EPOCHS - epoch) * 50.0
            yield {"kind": "epoch", **at, **values, **times, "seconds_left": left}
    if ended:
        yield {"kind": "end", **last, "time": began + last["step"], "status": "finished"}


@contextmanager
def folder_of(root: Path, count: int) -> Iterator[Path]:
    """That many runs; this process holds those that are under way, and goes on with their journals."""
    shutil.rmtree(root, ignore_errors=True)
    config = "model: {name: resnet18}\ncache: {max_gb: null}\n"
    with ExitStack() as stack:
        live = []
        for index in range(count):
            folder = root / f"run-{index:04d}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(config)
            runs.write_json(folder / "run.json", {"name": folder.name})
            under_way = index % 25 == 0
            if under_way:
                stack.enter_context(runs.lock(folder))
                live.append(folder)
            else:
                (folder / ".lock").write_text("1")
            epochs = 2 * EPOCHS if under_way else EPOCHS
            every = 1 if under_way else STEPS_PER_EPOCH // LOGGED
            began = time.time() - epochs * STEPS_PER_EPOCH - (0 if under_way else 86400)
            runs.append_records(folder, list(journal(began, epochs, every, not under_way)))
        over = threading.Event()
        thread = threading.Thread(target=go_on, args=(live, over), daemon=True)
        thread.start()
        yield root
        over.set()
        thread.join()


def go_on(live: Sequence[Path], over: threading.Event) -> None:
    step = 2 * EPOCHS * STEPS_PER_EPOCH
    while not over.wait(1.0):
        step += 1
        at = {"attempt": 1, "step": step, "time": time.time(), "epoch": step // STEPS_PER_EPOCH + 1}
        of_step = {"loss": 0.5, "lr": 1e-3, "images_per_s": 900.0}
        of_step["epoch_step"] = (step - 1) % STEPS_PER_EPOCH + 1
        line = json.dumps({"kind": "step", **at, **of_step}, separators=(",", ":")) + "\n"
        for folder in live:
            with open(folder / "journal.jsonl", "a") as file:
                file.write(line)


# ------------------------------------------------------------------------------------------------- open
def left_open(command: Sequence[str], seconds: float) -> dict[str, float]:
    """A program on a terminal of its own: its share of a core, and its memory."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", HEIGHT, WIDTH, 0, 0))
    process = subprocess.Popen(
        command,
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env={**os.environ, "PYTHONPATH": str(ROOT / "platform"), "TERM": "xterm-256color"},
        start_new_session=True,
    )
    os.close(theirs)

    def drain() -> None:
        with suppress(OSError):  # the other end is closed
            while os.read(ours, 65536):
                pass

    reader = threading.Thread(target=drain, daemon=True)
    reader.start()
    try:
        seen = psutil.Process(process.pid)
        time.sleep(2 + 3 * EVERY_S)

        def spent() -> float:
            return sum(sum(p.cpu_times()[:2]) for p in [seen, *seen.children(recursive=True)])

        before, began = spent(), time.perf_counter()
        time.sleep(seconds)
        share = 100 * (spent() - before) / (time.perf_counter() - began)
        return {"percent_of_a_core": share, "memory_mb": seen.memory_full_info().uss / 1e6}
    finally:
        process.kill()
        process.wait()
        reader.join(5)
        os.close(ours)


def programs(folders: dict[int, Path]) -> dict[str, list[str]]:
    every = f"{EVERY_S:g}"
    found: dict[str, list[str]] = {}
    for count, folder in folders.items():
        given = ["--runs", str(folder), "--cache", str(folder / "cache"), "--interval-s", every]
        found[f"ours, {count:,} runs"] = [sys.executable, str(ROOT / "jobs/monitor.py"), *given]
    beside = Path(sys.executable).with_name("glances")
    glances = str(beside) if beside.exists() else shutil.which("glances")
    if glances:
        found["Glances"] = [glances, "-t", every, "--disable-check-update"]
    else:
        console.warn("Glances is not installed: left out (pip install glances)")
    if top := shutil.which("top"):
        found["top"] = [top, "-d", every]
    found["bare"] = [sys.executable, "-c", BARE.replace("EVERY_S", every)]
    return found


def compare(folders: dict[int, Path], seconds: float, rounds: int) -> dict[str, Any]:
    sides = programs(folders)
    peer = next(name for name in ("Glances", "top", "bare") if name in sides)
    orders = [list(sides) if at % 2 == 0 else list(sides)[::-1] for at in range(rounds)]
    turns = []
    with console.progress("Programs left open", rounds * len(sides)) as update:
        for order in orders:
            turns.append({})
            for side in order:
                turns[-1][side] = left_open(sides[side], seconds)
                update(sum(map(len, turns)))
    found: dict[str, Any] = {"peer": peer, "turns": turns, "sides": {}}
    for side in sides:
        every = [turn[side] for turn in turns]
        ratios = [t[side]["percent_of_a_core"] / t[peer]["percent_of_a_core"] for t in turns]
        found["sides"][side] = {
            "percent_of_a_core": statistics.median(s["percent_of_a_core"] for s in every),
            "memory_mb": statistics.median(s["memory_mb"] for s in every),
            "ratio": statistics.median(ratios),
        }
    return found


# ---------------------------------------------------------------------------------------------- refresh
def cpu_s(work: Callable[[], Any], times: int) -> float:
    found = []
    for _ in range(times):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return statistics.median(found)


def refresh(folder: Path) -> dict[str, float]:
    monitor = Monitor(Options(runs=[str(folder)], cache=str(folder / "cache")))
    told = monitor.look()
    read = cpu_s(monitor.look, 20)
    drawn = cpu_s(lambda: render(told, WIDTH, HEIGHT), 20)
    monitor.close()
    anew = cpu_s(lambda: [runs.read_journal(f) for f in sorted(folder.glob("run-*"))], 3)
    return {"look_s": read, "draw_s": drawn, "read_anew_s": anew, "ratio": (read + drawn) / anew}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, nargs="+", default=[50, 1000])
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("monitor-benchmark"))
    given = parser.parse_args()
    place = given.output.absolute()
    with ExitStack() as stack:
        folders = {
            count: stack.enter_context(folder_of(place / f"runs-{count}", count))
            for count in given.runs
        }
        result: dict[str, Any] = {"cores": os.cpu_count(), "every_s": EVERY_S}
        result["refresh"] = {str(count): refresh(folder) for count, folder in folders.items()}
        table = [
            [
                f"{int(count):,}",
                *(f"{1000 * found[k]:.1f} ms" for k in ("look_s", "draw_s", "read_anew_s")),
                f"{found['ratio']:.3f}",
            ]
            for count, found in result["refresh"].items()
        ]
        columns = ["runs", "look", "draw", "reading all anew", "ratio"]
        console.table(columns, table, "One refresh, CPU time")
        result["open"] = compare(folders, given.seconds, given.rounds)
    table = [
        [
            side,
            f"{found['percent_of_a_core']:.2f} %",
            f"{found['ratio']:.2f}",
            f"{found['memory_mb']:.0f} MB",
        ]
        for side, found in result["open"]["sides"].items()
    ]
    columns = ["", "of a core", f"ratio to {result['open']['peer']}", "memory"]
    console.table(columns, table, f"Left open, a look every {EVERY_S:g} s")
    (place / "monitor.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
