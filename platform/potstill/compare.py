"""Did distillation help? The same student trained alone and from a teacher, over the same seeds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from potstill import metric_names, runs
from potstill.report import COLOURS, INK, MUTED, head, new_figure, png, style


def comparison(
    folder: Path,
    teacher: dict[str, Any],
    alone: Sequence[dict[str, Any]],
    distilled: Sequence[dict[str, Any]],
    metric: str = "val_top1_acc",
) -> dict[str, Any]:
    """Compare summaries (summary.json) of students, paired by seed; write comparison.json and comparison.png.

    Returns {"metric", "teacher", "alone": {"mean", "std", "values"}, "distilled": {…}, "gain", "interval", "verdict"}.
    The gain is distilled - alone, the mean over the pairs, in the metric's units (percentage points); `interval` is
    its 95 % t interval, or None for one seed. Verdict: helped | no difference (the interval holds 0) | hurt | no
    interval with one seed | not comparable (a value is not finite).

    Raises ValueError if the two lists are empty or not of one length.
    """
    if not alone or len(alone) != len(distilled):
        raise ValueError(
            f"alone and distilled must be as many, and at least one, got {len(alone)} and {len(distilled)}"
        )
    values = {
        "alone": [_best(s, metric) for s in alone],
        "distilled": [_best(s, metric) for s in distilled],
    }
    gains = [
        after - before for before, after in zip(values["alone"], values["distilled"], strict=True)
    ]
    interval = paired_interval(gains)
    result: dict[str, Any] = {
        "metric": metric,
        "teacher": _best(teacher, metric),
        **{
            name: {
                "mean": fmean(of),
                "std": stdev(of) if len(of) > 1 and _finite(of) else None,
                "values": of,
            }
            for name, of in values.items()
        },
        "gain": fmean(gains),
        "interval": list(interval) if interval else None,
        "verdict": _verdict(gains, interval, metric_names.higher_is_better(metric)),
    }
    runs.write_json(folder / "comparison.json", result)
    runs.atomic_write(folder / "comparison.png", _draw(result))
    return result


def _best(summary: dict[str, Any], metric: str) -> float:
    """Not a number where summary.json says null."""
    value = summary["best_metrics"][metric]
    return math.nan if value is None else float(value)


def _finite(values: Sequence[float]) -> bool:
    return all(math.isfinite(v) for v in values)


def paired_interval(
    differences: Sequence[float], confidence: float = 0.95
) -> tuple[float, float] | None:
    """Student's t interval of the mean difference; a point where all are equal; None for fewer than two."""
    from scipy import stats

    count = len(differences)
    if count < 2 or not _finite(differences):
        return None
    mean, spread = fmean(differences), stdev(differences)
    half = float(stats.t.ppf(0.5 + confidence / 2, count - 1)) * spread / math.sqrt(count)
    return mean - half, mean + half


def _verdict(
    gains: Sequence[float], interval: tuple[float, float] | None, larger_is_better: bool
) -> str:
    if not _finite(gains):
        return "not comparable"
    if interval is None:
        return "no interval with one seed"
    low, high = interval
    if low <= 0 <= high:
        return "no difference"
    return "helped" if (low > 0) == larger_is_better else "hurt"


def _draw(result: dict[str, Any]) -> bytes:
    figure = new_figure(7.5, 4.8)
    axes = figure.add_subplot()
    style(axes)
    axes.grid(False, axis="x")
    percent = metric_names.is_percent(result["metric"])
    unit, digits = (" %", 2) if percent else ("", 4)
    pairs = list(zip(result["alone"]["values"], result["distilled"]["values"], strict=True))
    for pair in pairs:
        axes.plot((1, 2), pair, color="#c3cad1", linewidth=1.5, zorder=1)
    for at, name, colour in ((1, "alone", COLOURS["train"]), (2, "distilled", COLOURS["val"])):
        of = result[name]
        axes.plot(
            [at] * len(of["values"]),
            of["values"],
            "o",
            color=colour,
            alpha=0.75,
            markersize=8,
            markeredgewidth=0,
        )
        axes.plot((at - 0.14, at + 0.14), (of["mean"], of["mean"]), color=colour, linewidth=3)
        spread = f" ± {of['std']:.{digits}f}" if of["std"] is not None else ""
        axes.annotate(
            f"{of['mean']:.{digits}f}{spread}{unit}",
            (at + 0.17, of["mean"]),
            va="center",
            color=colour,
            fontweight="bold",
        )
    axes.plot((-0.14, 0.14), (result["teacher"],) * 2, color=INK, linewidth=3)
    axes.annotate(
        f"{result['teacher']:.{digits}f}{unit}",
        (0.17, result["teacher"]),
        va="center",
        color=INK,
        fontweight="bold",
    )
    axes.axhline(
        result["teacher"], xmin=0.33, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=0
    )
    axes.set_xticks((0, 1, 2), ("teacher", "student alone", "student distilled"))
    axes.set_xlim(-0.4, 2.75)
    axes.margins(y=0.15)
    axes.set_ylabel(f"{result['metric']}{' (%)' if unit else ''}", color=MUTED)
    verdict: str = result["verdict"]
    headline = {
        "helped": "Distillation helped",
        "hurt": "Distillation hurt",
        "no difference": "No difference",
    }
    if result["interval"]:
        low, high = result["interval"]
        interval = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
        facts = f"gain {result['gain']:+.{digits}f}, {interval}, {len(pairs)} paired seeds"
    else:
        seeds = f"{len(pairs)} paired seed{'s' if len(pairs) > 1 else ''}"
        facts = f"gain {result['gain']:+.{digits}f}, {seeds}"
    head(axes, headline.get(verdict, verdict.capitalize()), facts)
    return png(figure)
