"""Aim's explorer with many runs: ours beside `aim up` as it comes, and what helps.

  uv run benchmarks/explorer.py [--runs 1000] [--epochs 20] [--rounds 5] [--output explorer-benchmark]

Makes a repository of `--runs` trainings of `--epochs` epochs, written to Aim by the code that writes a training's
(potstill.tracking), each with its config, losses, accuracies, rates and summary; ten experiments of equal size. Where
--output has one already, it is taken. Then, each on a copy of its own:
  index   from an empty index: `jobs/explore.py --index-only`, `aim storage reindex`
  start   from the command to the first page of an indexed repository (ours prints its link when it can be opened)
  asked   the requests of Aim's page, as it sends them, of both servers in turns (A B B A …): the first of each by itself
          (values are read from the runs' files), then the median of `--rounds`
  helps   the same of ours where fewer runs are asked for, and with nine of ten runs archived
Ratios are ours to `aim up`: medians of each round's ratio. Nothing is cached by the client. Writes explorer.json.
"""

from __future__ import annotations

import argparse
import http.client
import json
import logging
import math
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlencode

from potstill import console, runs
from potstill.config import compose, to_yaml

ROOT = Path(__file__).resolve().parents[1]
EXPERIMENTS = 10
STEPS_PER_EPOCH = 52
LOG_EVERY_STEPS = 10
START = 1_790_000_000.0
LOSS = '((metric.name == "loss" and metric.context.subset == "train") or (metric.name == "loss" and metric.context.subset == "val"))'
ONE = 'run.experiment == "experiment-3"'

ASKED: dict[str, tuple[str, dict[str, Any]]] = {
    "project (every page asks)": ("/api/projects", {}),
    "activity (home page)": ("/api/projects/activity", {}),
    "names of metrics": ("/api/projects/params", {"sequence": "metric"}),
    "runs table, 45 rows": ("/api/runs/search/run", {"q": "", "limit": 45}),
    "runs by an attribute": (
        "/api/runs/search/run",
        {"q": "run.config.optimizer.lr > 0.09", "limit": 45},
    ),
    "loss of one experiment": ("/api/runs/search/metric", {"q": f"{ONE} and {LOSS}", "p": 500}),
    "loss of all runs": ("/api/runs/search/metric", {"q": LOSS, "p": 500}),
}
PAGE = ["/", "/static-files/static/js/main.js?version=1", "/api/projects/pinned-sequences"]
PAGE += [f"{path}?{urlencode(asked)}" for path, asked in list(ASKED.values())[:4]]


class Server(NamedTuple):
    port: int
    headers: dict[str, str]
    started_s: float

    def get(self, path: str) -> float:
        """Seconds until all of the answer is there."""
        began = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request("GET", path, headers={**self.headers, "Accept-Encoding": "gzip"})
        answer = connection.getresponse()
        answer.read()
        connection.close()
        assert answer.status == 200, f"{path}: {answer.status}"
        return time.perf_counter() - began

    def page(self) -> float:
        """All that the page of runs asks for, six at a time as a browser does."""
        began = time.perf_counter()
        with ThreadPoolExecutor(6) as pool:
            list(pool.map(self.get, PAGE))
        return time.perf_counter() - began


# ------------------------------------------------------------------------------------------- the repository
def records(index: int, lr: float, epochs: int) -> Iterator[dict[str, Any]]:
    """The journal of a training, as far as it concerns Aim."""
    rng, began = random.Random(index), START + 600 * index
    for epoch in range(1, epochs + 1):
        last = epoch * STEPS_PER_EPOCH
        steps = [s for s in range(last - STEPS_PER_EPOCH + 1, last) if s % LOG_EVERY_STEPS == 0]
        loss = 2.5 * math.exp(-epoch / 8) + abs(math.log10(lr) + 2.5) / 4 + rng.gauss(0, 0.02)
        about = {"attempt": 1, "epoch": epoch, "lr": lr * (1 - epoch / epochs)}
        for step in [*steps, last]:
            at = {"step": step, "time": began + step, "loss": loss + rng.gauss(0, 0.1)}
            yield {"kind": "step", **about, **at, "images_per_s": 900 + rng.gauss(0, 20)}
        accuracy = 100 * math.exp(-loss)
        values = {
            **{
                "train_loss": loss,
                "train_top1_acc": accuracy,
                "train_top5_acc": accuracy**0.5 * 10,
            },
            **{"val_loss": loss * 1.1, "val_top1_acc": accuracy - 2, "val_top5_acc": accuracy},
            **{"val_macro_f1": accuracy - 4, "images_per_s": 880.0, "seconds": 12.5, "top_k": 5},
        }
        terms = {"task": {"loss": loss, "weighted": loss}}
        at = {"step": last, "time": began + last, "terms": terms, "warnings": []}
        yield {"kind": "epoch", **about, **values, **at}
    best = {"metric": "val_top1_acc", "value": 100 * math.exp(-1), "epoch": epochs, "step": 0}
    end = {"kind": "end", "attempt": 1, "step": epochs * STEPS_PER_EPOCH, "status": "finished"}
    yield {**end, "time": began + epochs * STEPS_PER_EPOCH, "reason": "", "best": best}


def make(root: Path, count: int, epochs: int) -> None:
    """A repository of that many runs, with an empty index."""
    from potstill.tracking import _Repository, _TrainingRun

    logging.disable(logging.WARNING)  # of locks that are taken over
    repository, rng = _Repository(root), random.Random(0)
    config = to_yaml(
        compose("train", ["data.root=photos", "model.name=resnet10t", "optimizer.lr=0.0123"])
    )
    with console.progress(f"Writing runs of {epochs} epochs", count) as update:
        for index in range(count):
            lr = 10 ** rng.uniform(-4, -1)
            folder = root / "runs" / f"run-{index:04d}"
            folder.mkdir(parents=True)
            (folder / "config.yaml").write_text(config.replace("0.0123", f"{lr:.6f}"))
            search = {"id": "bench", "number": index, "point": {"optimizer.lr": lr}, "dir": ""}
            about = {
                **{"name": folder.name, "experiment": f"experiment-{index % EXPERIMENTS}"},
                **{"created": START + 600 * index, "tags": ["bench"], "search": search},
                **{"classes": [f"class {k}" for k in range(12)], "teacher_run": None},
                **{"dataset": {"key": "0" * 16, "root": "photos", "counts": {"train": 3319}}},
                **{"git_commit": "0" * 40, "git_dirty": False, "init_from": None},
                "versions": {"torch": "2", "ray": "2", "timm": "1", "potstill": "0"},
            }
            runs.write_json(folder / "run.json", about)
            journal = list(records(index, lr, epochs))
            summary = {"name": folder.name, "status": "finished", "best": journal[-1]["best"]}
            runs.write_json(folder / "summary.json", {**summary, "parameters": 5_000_000})
            aim_run = _TrainingRun(folder, repository)
            aim_run.describe()
            for record in journal:
                aim_run.track(record)
            aim_run.complete(journal, console.warn)
            aim_run.close()
            update(index + 1)
    shutil.rmtree(root / "runs")
    (root / "made.json").write_text(json.dumps([count, epochs]))


def copy_of(made: Path, name: str) -> Path:
    copy = made.with_name(name)
    shutil.rmtree(copy, ignore_errors=True)
    return Path(shutil.copytree(made, copy))


# ----------------------------------------------------------------------------------------------- both servers
def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT / "platform")}


def command(side: str, repo: Path, port: int) -> list[str]:
    if side == "ours":
        script = str(ROOT / "jobs" / "explore.py")
        return [sys.executable, script, "--repo", str(repo), "--port", str(port), "--no-open"]
    aim = str(Path(sys.executable).with_name("aim"))
    return [aim, "up", "--repo", str(repo), "--port", str(port), "--yes"]


@contextmanager
def serving(side: str, repo: Path) -> Iterator[Server]:
    """From the command to the first page."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    began = time.perf_counter()
    process = subprocess.Popen(
        command(side, repo, port),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        start_new_session=True,  # `aim up` leaves its workers to whoever ends the group
    )
    try:
        headers: dict[str, str] = {}
        if side == "ours":
            assert process.stdout is not None
            link = next(
                found
                for line in process.stdout
                if (found := re.search(r":(\d+)/\?token=(\S+)", line))
            )
            port, headers = int(link[1]), {"Authorization": f"Bearer {link[2]}"}
        server = Server(port, headers, 0.0)
        while process.poll() is None:
            with suppress(OSError, http.client.HTTPException):
                server.get("/")
                break
            time.sleep(0.05)
        yield server._replace(started_s=time.perf_counter() - began)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGINT)
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def index_s(side: str, repo: Path) -> float:
    began = time.perf_counter()
    aim = str(Path(sys.executable).with_name("aim"))
    reindex = [aim, "storage", "--repo", str(repo), "reindex", "--yes"]
    ours = [sys.executable, str(ROOT / "jobs" / "explore.py"), "--repo", str(repo), "--index-only"]
    subprocess.run(
        ours if side == "ours" else reindex, env=environment(), check=True, capture_output=True
    )
    return time.perf_counter() - began


def in_turns(servers: dict[str, Server], path: str | None, rounds: int) -> dict[str, Any]:
    """Of a request, or of the page: the first answer, the median of the following ones, the median ratio."""
    sides = list(servers)

    def ask(side: str) -> float:
        return servers[side].page() if path is None else servers[side].get(path)

    first = {side: ask(side) for side in sides}
    orders = [sides if at % 2 else sides[::-1] for at in range(rounds)]
    turns = [{side: ask(side) for side in order} for order in orders]
    found: dict[str, Any] = {"first_s": first}
    found["s"] = {side: statistics.median(t[side] for t in turns) for side in sides}
    if len(sides) > 1:
        found["first_ratio"] = first["ours"] / first["aim up"]
        found["ratio"] = statistics.median(t["ours"] / t["aim up"] for t in turns)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path("explorer-benchmark"))
    given = parser.parse_args()
    made = given.output.absolute() / "made"
    kept = made / "made.json"
    if not kept.exists() or json.loads(kept.read_text()) != [given.runs, given.epochs]:
        shutil.rmtree(made, ignore_errors=True)
        subprocess.run(  # in a process that ends: Aim keeps threads
            [
                sys.executable,
                "-c",
                f"import explorer as e; e.make(e.Path({str(made)!r}), {given.runs}, {given.epochs})",
            ],
            cwd=Path(__file__).parent,
            check=True,
            env=environment(),
        )
    sides = {"ours": copy_of(made, "ours"), "aim up": copy_of(made, "aim")}
    result: dict[str, Any] = {"runs": given.runs, "epochs": given.epochs, "cores": os.cpu_count()}
    rows: list[list[str]] = []

    def row(what: str, seconds: dict[str, float], ratio: float | None = None) -> None:
        ratio = ratio or seconds["ours"] / seconds["aim up"]
        rows.append([what, *(f"{seconds[side]:.2f} s" for side in sides), f"{ratio:.2f}"])

    result["index_s"] = {side: index_s(side, repo) for side, repo in sides.items()}
    row("index from nothing", result["index_s"])
    starts: list[dict[str, float]] = []
    for at in range(2):
        starts.append({})
        for side in list(sides) if at % 2 else list(sides)[::-1]:
            with serving(side, sides[side]) as server:
                starts[-1][side] = server.started_s
    result["start_s"] = {side: statistics.median(s[side] for s in starts) for side in sides}
    row("start to first page", result["start_s"])
    with (
        serving("ours", sides["ours"]) as ours,
        serving("aim up", sides["aim up"]) as theirs,
    ):
        servers = {"ours": ours, "aim up": theirs}
        result["asked"] = {"page of runs, all requests": in_turns(servers, None, given.rounds)}
        for what, (path, query) in ASKED.items():
            asked = f"{path}?{urlencode(query)}"
            result["asked"][what] = in_turns(servers, asked, given.rounds)
        for what, found in result["asked"].items():
            row(f"{what}: first", found["first_s"], found["first_ratio"])
            row(f"{what}: again", found["s"], found["ratio"])
        console.table(["", *sides, "ratio"], rows, f"{given.runs:,} runs of {given.epochs} epochs")
        result["helps"] = helps(ours, given.rounds)
    every = result["helps"]["loss of all runs"]
    table = [
        [
            what,
            f"{found['first_s']['ours']:.2f} s",
            f"{found['s']['ours']:.2f} s",
            f"{found['s']['ours'] / every['s']['ours']:.2f}",
        ]
        for what, found in result["helps"].items()
    ]
    console.table(["what helps", "first", "again", "of all"], table)
    (given.output / "explorer.json").write_text(json.dumps(result, indent=2) + "\n")


def helps(ours: Server, rounds: int) -> dict[str, Any]:
    """Searches of our explorer that read less."""

    def search(query: str) -> dict[str, Any]:
        asked = urlencode({"q": query, "p": 500})
        return in_turns({"ours": ours}, f"/api/runs/search/metric?{asked}", rounds)

    val = '((metric.name == "loss" and metric.context.subset == "val"))'
    found = {"loss of all runs": search(LOSS), "of validation only": search(val)}
    found |= {"of one experiment in ten": search(f"{ONE} and {LOSS}")}
    found |= {"of 45 runs by name": search(f'run.name < "run-0045" and {LOSS}')}
    connection = http.client.HTTPConnection("127.0.0.1", ours.port, timeout=600)
    connection.request(
        "GET", "/api/runs/search/run?exclude_params=true&exclude_traces=true", headers=ours.headers
    )
    answer = connection.getresponse().read().decode("latin-1")
    hashes = sorted(set(re.findall(r"[0-9a-f]{24}", answer)))
    archived = hashes[: len(hashes) * 9 // 10]
    headers = {**ours.headers, "Content-Type": "application/json"}
    connection.request("POST", "/api/runs/archive-batch", json.dumps(archived), headers)
    assert connection.getresponse().read() is not None
    return found | {"nine of ten runs archived": search(LOSS)}


if __name__ == "__main__":
    main()
