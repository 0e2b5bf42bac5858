"""What 7,120 classes cost: listing, preparing, the head, metrics and the report, in seconds and MiB.

    python benchmarks/many_classes.py [--classes 7120] [--per_class 6] [--output many_classes.json]

Makes a tree of small JPEGs, prepares it, trains one short epoch, evaluates and draws the report; each phase's
time, and the largest PSS of this process with all below it over what it was when the phase began. The same with
10 classes stands beside it: the ratio is what the classes cost.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from prepare_memory import Sampler, summed_pss_mib


def make_tree(root: Path, classes: int, count: int, side: int = 64) -> None:
    """`count` JPEGs, each of its class's colour and some noise, spread over `classes` folders."""
    from PIL import Image

    rng = np.random.default_rng(0)
    colours = rng.integers(30, 226, (classes, 3))
    for c in range(classes):
        folder = root / f"species_{c:05d}"
        folder.mkdir(parents=True)
        for i in range(count // classes):
            noise = rng.normal(0, 20, (side, side, 3))
            pixels = np.clip(colours[c] + noise, 0, 255).astype(np.uint8)
            buffer = io.BytesIO()
            Image.fromarray(pixels).save(buffer, "JPEG", quality=85)
            (folder / f"{i:03d}.jpg").write_bytes(buffer.getvalue())


def measured(phases: dict[str, dict[str, float]], name: str, work: Callable[[], Any]) -> Any:
    before = summed_pss_mib()["all"]
    sampler = Sampler(every_s=0.2)
    sampler.start()
    started = time.monotonic()
    try:
        return work()
    finally:
        seconds = time.monotonic() - started
        sampler.done.set()
        sampler.join()
        over = max(sampler.peak["all"], summed_pss_mib()["all"]) - before
        phases[name] = {"seconds": seconds, "over_mib": over}


def run(folder: Path, classes: int, count: int, epochs: int, steps: int) -> dict[str, Any]:
    from potstill import report, runs
    from potstill.config import compose
    from potstill.data.prepare import check, prepare
    from potstill.fit import fit

    phases: dict[str, dict[str, float]] = {}
    tree = folder / f"tree-{classes}"
    make_tree(tree, classes, count)
    config = compose(
        "train",
        [
            *(f"data.root={tree}", f"cache.dir={folder / 'cache'}", f"runs.dir={folder / 'runs'}"),
            *("run.name=" + str(classes), "tracking=none", "data.decode.image_px=64"),
            *("model.name=resnet10t", "loop.batch_size=128", f"loop.epochs={epochs}"),
            f"loop.steps_per_epoch={steps}",
            "task.metrics=[balanced_acc,macro_precision,calibration_error,average_precision]",
        ],
    )
    measured(phases, "list and check", lambda: check(config.data, config.cache))
    measured(phases, "prepare", lambda: prepare(config.data, config.cache))
    measured(phases, "train, evaluate, report", lambda: fit(config))
    run_dir = folder / "runs" / str(classes)
    measured(phases, "report alone", lambda: report.report(run_dir))
    epoch = [r for r in runs.read_journal(run_dir) if r["kind"] == "epoch"][-1]
    phases["one epoch of the loop"] = {"seconds": epoch["seconds"], "over_mib": float("nan")}
    checkpoint = runs.pick_checkpoint(run_dir, "last").folder
    return {
        "classes": classes,
        "images": count,
        "phases": phases,
        "parameters": runs.read_json(run_dir / "summary.json")["parameters"],
        "checkpoint_mb": sum(f.stat().st_size for f in checkpoint.iterdir()) / 1e6,
        "run_mb": sum(f.stat().st_size for f in run_dir.rglob("*") if f.is_file()) / 1e6,
        "images_per_s": epoch["images_per_s"],
        "report_html_mb": (run_dir / "report.html").stat().st_size / 1e6,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--classes", type=int, default=7120)
    parser.add_argument("--per_class", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--output", type=Path, default=Path("many_classes.json"))
    args = parser.parse_args()
    count = args.classes * args.per_class
    with tempfile.TemporaryDirectory() as folder:
        few, many = (
            run(Path(folder), classes, count, args.epochs, args.steps)
            for classes in (10, args.classes)
        )
    table = Table(title=f"{count:,} images, {os.cpu_count()} cores")
    for name in ("phase", "10 classes", f"{args.classes:,} classes", "ratio", "MiB", "MiB (many)"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for name, there in many["phases"].items():
        here = few["phases"][name]
        ratio = there["seconds"] / here["seconds"]
        memory = (f"{p['over_mib']:,.0f}" for p in (here, there))
        table.add_row(
            name, f"{here['seconds']:.1f} s", f"{there['seconds']:.1f} s", f"{ratio:.2f}", *memory
        )
    for key in ("parameters", "checkpoint_mb", "run_mb", "report_html_mb", "images_per_s"):
        ratio = many[key] / few[key]
        table.add_row(key, f"{few[key]:,.1f}", f"{many[key]:,.1f}", f"{ratio:.2f}", "", "")
    Console().print(table)
    args.output.write_text(json.dumps({"few": few, "many": many}, indent=2) + "\n")


if __name__ == "__main__":
    main()
