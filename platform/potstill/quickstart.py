"""The whole path on the handwritten digits that ship with scikit-learn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import numpy as np

from potstill import console
from potstill.compare import comparison
from potstill.config import Config, QuickstartConfig, compose
from potstill.data.digits import write_digits
from potstill.data.prepare import prepare_shown, print_report
from potstill.errors import UserError
from potstill.storage import local_folder


def quickstart(config: QuickstartConfig) -> dict[str, Any]:
    """Prepare, train a teacher, train students alone and distilled over the same seeds, compare.

    Returns what comparison.json holds. Raises UserError.
    """
    from potstill.fit import fit

    if len(set(config.seeds)) != len(config.seeds) or not config.seeds:
        raise UserError(f"seeds must be different numbers, at least one, got {config.seeds}")
    began = time.monotonic()
    root = write_digits(local_folder(config.data_dir, "data_dir"))
    console.say("Prepare", "bold underline")
    data = _compose(config, "digits_teacher", f"data.root={root}").data
    print_report(prepare_shown(data, config.cache).report, console.standard())

    def run(experiment: str, seed: int, *overrides: str) -> dict[str, Any]:
        return fit(
            _compose(config, experiment, f"data.root={root}", f"loop.seed={seed}", *overrides)
        )

    console.say("\nTeacher", "bold underline")
    teacher = run("digits_teacher", 0)
    teacher_run = local_folder(config.runs.dir) / teacher["name"]
    alone, distilled = [], []
    for seed in config.seeds:
        console.say(f"\nStudent alone, seed {seed}", "bold underline")
        alone.append(run("digits_student", seed))
        console.say(f"\nStudent distilled, seed {seed}", "bold underline")
        distilled.append(run("digits_distilled", seed, f"teacher.run={teacher_run}"))
    folder = local_folder(config.runs.dir) / "quickstart"
    result = comparison(folder, teacher, alone, distilled)
    _say(result, teacher, alone, distilled, folder, time.monotonic() - began)
    if config.tracking.name == "aim":
        repo = config.tracking.repo or config.runs.dir
        console.say(f"Aim:    uv run jobs/explore.py --repo {repo}")
    return result


def _compose(config: QuickstartConfig, experiment: str, *overrides: str) -> Config:
    composed = compose(
        "train", [f"experiment={experiment}", f"debug={str(config.debug).lower()}", *overrides]
    )
    composed.cache, composed.runs, composed.tracking = config.cache, config.runs, config.tracking
    composed.run.tags = ["quickstart"]
    return composed


def _say(
    result: dict[str, Any],
    teacher: dict[str, Any],
    alone: list[dict[str, Any]],
    distilled: list[dict[str, Any]],
    folder: Path,
    seconds: float,
) -> None:
    def row(name: str, group: list[dict[str, Any]]) -> list[str]:
        top1 = [s["best_metrics"]["val_top1_acc"] for s in group]
        spread = f" ± {np.std(top1, ddof=1):.2f}" if len(top1) > 1 else ""
        return [
            name,
            str(len(group)),
            f"{np.mean(top1):.2f}{spread} %",
            f"{group[0]['parameters']:,}",
            f"{group[0]['model_file_mb']:.2f} MB",
            f"{np.mean([s['seconds'] for s in group]):.1f} s",
        ]

    console.say("")
    console.table(
        ["model", "runs", "val top-1", "parameters", "file", "training"],
        [
            row("teacher", [teacher]),
            row("student alone", alone),
            row("student distilled", distilled),
        ],
    )
    low, high = result["interval"] or (float("nan"), float("nan"))
    console.say(
        f"Distillation: {result['verdict']} ({result['gain']:+.2f} points, 95 % interval {low:+.2f} to {high:+.2f}, "
        f"paired over {len(alone)} seeds)",
        "bold",
    )
    console.say(
        f"{seconds:.0f} s in all. Plots: {folder}, and plots/ and report.html in each run of {folder.parent}"
    )
