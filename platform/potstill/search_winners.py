"""What a search hands over: an experiment file for each winner, and winners trained at full length."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from potstill import console, metric_names, runs
from potstill.architecture import MEASURES
from potstill.config import config_hash
from potstill.search_plan import SearchPlan, config_of_trial
from potstill.search_results import TrialResult, best_of, eligible, pareto, ranked


def winners(plan: SearchPlan, trials: Sequence[TrialResult]) -> list[TrialResult]:
    """The best first: one objective by its value; of several the Pareto front, from the first objective's best on."""
    if len(plan.objectives) > 1:
        return pareto(trials, plan.objectives)
    fit = {t.number for t in eligible(trials)}
    values = {t.number: t.values.get(plan.metric) for t in trials}
    whole = [t for t in ranked(trials, plan.objectives) if t.number in fit]
    return [t for t in whole if (v := values[t.number]) is not None and math.isfinite(v)]


def write_experiments(plan: SearchPlan, trials: Sequence[TrialResult]) -> dict[str, TrialResult]:
    """experiment/best.yaml, and of several objectives experiment/pareto-1.yaml, …; returns them by name without `best`."""
    folder = plan.folder / "experiment"
    best = best_of(trials, plan.objectives)
    front = winners(plan, trials) if len(plan.objectives) > 1 else []
    named = {f"pareto-{i + 1}": t for i, t in enumerate(front)}
    for old in folder.glob("pareto-*.yaml"):
        if old.stem not in named:
            old.unlink()
    for name, trial in (named | ({"best": best} if best else {})).items():
        config = config_of_trial(plan.folder, trial.number)
        text = plan.experiment_of(config, _title(plan, name, trial))
        runs.atomic_write(folder / f"{name}.yaml", text)
    return named


def _title(plan: SearchPlan, name: str, trial: TrialResult) -> str:
    found = ", ".join(
        f"{k} {v:.6g}" for k, v in trial.values.items() if v is not None and k in _told(plan)
    )
    return (
        f"# {trial.name} of the search {plan.folder.name}: {found} after {trial.epochs} epochs.\n"
        f"#   uv run jobs/train.py --config-dir <this search's folder> experiment={name}"
    )


def _told(plan: SearchPlan) -> set[str]:
    return {*(o.name for o in plan.objectives), "parameters", "macs"}


def retrain(plan: SearchPlan, trials: Sequence[TrialResult]) -> list[dict[str, Any]]:
    """Train the winners for loop.epochs over search.seeds; write winners.json and winners.md. Done runs are only read.

    Raises Stopped: the same command goes on.
    """
    from potstill.fit import fit

    chosen = winners(plan, trials)[: plan.search.retrain_best]
    found = []
    for place, trial in enumerate(chosen, start=1):
        kept: dict[str, list[float]] = {}
        names = []
        for seed in plan.search.seeds:
            config = plan.full_length(config_of_trial(plan.folder, trial.number))
            config.loop.seed = seed
            if config.augment.seed is None:  # the same crops, and soft labels, whatever the seed
                config.augment.seed = plan.config.loop.seed
            config.runs, config.tracking = copy.deepcopy((plan.config.runs, plan.config.tracking))
            config.run.name = f"{plan.folder.name}-{trial.name}-s{seed}-{config_hash(config)}"
            console.say(
                f"\nWinner {place} of {len(chosen)}, {trial.name}, seed {seed}", "bold underline"
            )
            summary = fit(config)
            names.append(summary["name"])
            for key, value in (summary["best_metrics"] or {}).items():
                if key.startswith("val_") and value is not None:
                    kept.setdefault(key, []).append(value)
        measures = {k: v for k, v in trial.values.items() if k in MEASURES}
        found.append(
            {
                "trial": trial.name,
                "runs": names,
                "seeds": plan.search.seeds,
                "values": {o.name: kept[o.name] for o in plan.objectives if o.name in kept},
                "measures": measures,
                "in_the_search": {o.name: trial.values.get(o.name) for o in plan.objectives},
            }
        )
    runs.write_json(plan.folder / "winners.json", found)
    columns, rows = _rows(plan, found)
    console.table(columns, rows, title="Winners at full length")
    lines = ["| " + " | ".join(line) + " |" for line in (columns, ["---"] * len(columns), *rows)]
    runs.atomic_write(Path(plan.folder) / "winners.md", "\n".join(lines) + "\n")
    return found


def _rows(plan: SearchPlan, found: Sequence[dict[str, Any]]) -> tuple[list[str], list[list[str]]]:
    logged = [o.name for o in plan.objectives if o.name not in MEASURES]
    columns = ["trial", *logged, "in the search", "parameters", "macs"]
    rows = []
    for one in found:
        cells = [one["trial"]]
        for name in logged:
            values = one["values"].get(name, [])
            spread = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
            cells.append(f"{metric_names.shown(name, fmean(values))}{spread}" if values else "–")
        before = one["in_the_search"].get(plan.metric)
        cells.append("–" if before is None else metric_names.shown(plan.metric, before))
        cells += [f"{one['measures'].get(k, math.nan):,.0f}" for k in ("parameters", "macs")]
        rows.append(cells)
    return columns, rows
