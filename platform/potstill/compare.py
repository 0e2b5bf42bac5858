"""Did distillation help? The same student trained alone and from a teacher, over the same seeds."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

from potstill import console, metric_names, runs
from potstill.report import COLOURS, INK, MUTED, head, new_figure, png, style


def comparison(
    folder: Path,
    teacher: dict[str, Any],
    alone: Sequence[dict[str, Any]],
    distilled: Sequence[dict[str, Any]],
    metric: str = "val_top1_acc",
) -> dict[str, Any]:
    """`compared`, of the best epochs in the runs' summaries (summary.json). Raises ValueError as it does."""
    return compared(
        folder,
        metric,
        _best(teacher, metric),
        [_best(s, metric) for s in alone],
        [_best(s, metric) for s in distilled],
    )


def compared(
    folder: Path,
    metric: str,
    teacher: float | None,
    alone: Sequence[float],
    distilled: Sequence[float],
    about: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Compare what students reach, paired by seed; write comparison.json and comparison.png.

    Returns {"metric", "teacher", "alone": {"mean", "std", "values"}, "distilled": {…}, "gain", "interval", "verdict"}
    and what `about` holds besides. The gain is distilled - alone, the mean over the pairs, in the metric's units
    (percentage points, for one in percent); `interval` is its 95 % t interval, or None for one seed. Verdict:
    helped | no difference (the interval holds 0) | hurt | no interval with one seed | not comparable (a value is not
    finite) | not distilled (`distilled` is empty: the gate did not let the teacher pass).

    Raises ValueError if `alone` is empty, or `distilled` neither empty nor of its length.
    """
    if not alone or len(distilled) not in (0, len(alone)):
        raise ValueError(
            f"alone and distilled must be as many, and at least one, got {len(alone)} and {len(distilled)}"
        )
    gains = [after - before for before, after in zip(alone, distilled, strict=False)]
    interval = paired_interval(gains)
    better = metric_names.higher_is_better(metric)
    result: dict[str, Any] = {
        "metric": metric,
        "teacher": teacher,
        "alone": _spread_of(alone),
        "distilled": _spread_of(distilled) if distilled else None,
        "gain": fmean(gains) if gains else None,
        "interval": list(interval) if interval else None,
        "verdict": _verdict(gains, interval, better) if gains else "not distilled",
        **(about or {}),
    }
    runs.write_json(folder / "comparison.json", result)
    runs.atomic_write(folder / "comparison.png", _draw(result))
    return result


def _spread_of(values: Sequence[float]) -> dict[str, Any]:
    spread = stdev(values) if len(values) > 1 and _finite(values) else None
    return {"mean": fmean(values), "std": spread, "values": list(values)}


def _best(summary: dict[str, Any], metric: str) -> float:
    """Not a number where summary.json says null."""
    value = summary["best_metrics"][metric]
    return math.nan if value is None else float(value)


def conclusion(result: dict[str, Any]) -> str:
    """What came out, in one line: `Distillation helped: …`. `result`: of `compared`."""
    verdict, metric = result["verdict"], result["metric"]
    if verdict == "not distilled":
        return "No distillation: the teacher did not pass the gate, and the students were trained on the labels alone"
    percent = metric_names.is_percent(metric)
    digits, unit = (2, " points") if percent else (4, "")
    gain = f"{metric_names.title(metric)} {result['gain']:+.{digits}f}{unit}"
    count = len(result["alone"]["values"])
    if result["interval"] is None:
        return f"Distillation: {verdict} ({gain})"
    low, high = result["interval"]
    said = {
        "helped": "Distillation helped",
        "hurt": "Distillation hurt",
        "no difference": "Distillation made no difference that can be told from chance",
    }[verdict]
    return f"{said}: {gain} (95 % interval {low:+.{digits}f} to {high:+.{digits}f}, paired over {count} seeds)"


def comparison_rows(result: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the table that a user sees: narrow enough for 80 characters.

    `result`: of `compared`, with `models`: {<teacher>, "student"} -> {"parameters", "file_mb", "latency_ms": {batch:
    ms}, "seconds"}, where a student's seconds are of each group.
    """
    metric, models = result["metric"], result["models"]
    percent = metric_names.is_percent(metric)
    digits, unit = (2, " %") if percent else (4, "")
    batches = list(models["student"]["latency_ms"])
    subset = result.get("measured_on", {}).get("subset", "val")
    measured = f"{subset} {metric_names.title(metric).removesuffix(' accuracy')}"
    columns = ["model", measured, "parameters", "MB", *(f"ms x{b}" for b in batches), "training"]

    def row(
        name: str, model: dict[str, Any], of: dict[str, Any], seconds: float | None
    ) -> list[str]:
        spread = f" ± {of['std']:.{digits}f}" if of["std"] is not None else ""
        return [
            name,
            f"{of['mean']:.{digits}f}{spread}{unit}",
            f"{model['parameters']:,}",
            f"{model['file_mb']:.3g}",
            *(f"{model['latency_ms'][b]:.3g}" for b in batches),
            "-" if seconds is None else console.duration(seconds),
        ]

    rows = [
        row(name, model, _spread_of([model["value"]]), model["seconds"])
        for name, model in models.items()
        if name != "student"
    ]
    for name in ("alone", "distilled"):
        if result[name]:
            seconds = models["student"]["seconds"][name]
            rows.append(row(name, models["student"], result[name], seconds))
    return columns, rows


def as_markdown(result: dict[str, Any], notes: Sequence[str]) -> str:
    """comparison.md: the table, the conclusion, and what a reader must know of both."""
    columns, rows = comparison_rows(result)
    lines = [f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows)]
    return (
        "\n".join([*lines, "", f"**{conclusion(result)}**", *(f"\n{note}" for note in notes)])
        + "\n"
    )


def latency_ms(
    model: Any,
    px: int,
    batch: int,
    device: Any,
    *,
    warm_up: int = 3,
    most_runs: int = 30,
    max_s: float = 5.0,
) -> float:
    """Median time of a forward pass of `batch` images of px x px in fp32, in ms, after `warm_up` passes.

    At most `most_runs` passes are timed, and no more once `max_s` have gone by (but at least three).
    """
    import torch

    model = model.to(device).eval()
    images = {"image": torch.rand(batch, 3, px, px, device=device)}
    wait = torch.cuda.synchronize if torch.device(device).type == "cuda" else lambda: None
    times: list[float] = []
    over = time.perf_counter() + max_s
    with torch.inference_mode():
        for i in range(warm_up + most_runs):
            wait()
            began = time.perf_counter()
            model(images)
            wait()
            if i >= warm_up:
                times.append(1000 * (time.perf_counter() - began))
            if len(times) >= 3 and time.perf_counter() > over:
                break
    return median(times)


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
    distilled = result["distilled"]
    pairs = list(zip(result["alone"]["values"], (distilled or {}).get("values", ()), strict=False))
    for pair in pairs:
        axes.plot((1, 2), pair, color="#c3cad1", linewidth=1.5, zorder=1)
    for at, name, colour in ((1, "alone", COLOURS["train"]), (2, "distilled", COLOURS["val"])):
        of = result[name]
        if of is None:
            continue
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
    if (teacher := result["teacher"]) is not None:
        axes.plot((-0.14, 0.14), (teacher,) * 2, color=INK, linewidth=3)
        axes.annotate(
            f"{teacher:.{digits}f}{unit}",
            (0.17, teacher),
            va="center",
            color=INK,
            fontweight="bold",
        )
        axes.axhline(teacher, xmin=0.33, color=MUTED, linewidth=1, linestyle=(0, (4, 4)), zorder=0)
    axes.set_xticks((0, 1, 2), ("teacher", "student alone", "student distilled"))
    axes.set_xlim(-0.4, 2.75)
    axes.margins(y=0.15)
    axes.set_ylabel(f"{result['metric']}{' (%)' if unit else ''}", color=MUTED)
    verdict: str = result["verdict"]
    headline = {
        "helped": "Distillation helped",
        "hurt": "Distillation hurt",
        "no difference": "No difference",
        "not distilled": "No distillation: the teacher did not pass the gate",
    }
    seeds = (
        f"{len(result['alone']['values'])} seed{'s' if len(result['alone']['values']) > 1 else ''}"
    )
    if result["interval"]:
        low, high = result["interval"]
        interval = f"95 % interval {low:+.{digits}f} to {high:+.{digits}f}"
        facts = f"gain {result['gain']:+.{digits}f}, {interval}, {len(pairs)} paired seeds"
    else:
        facts = f"gain {result['gain']:+.{digits}f}, {seeds}" if pairs else seeds
    head(axes, headline.get(verdict, verdict.capitalize()), facts)
    return png(figure)
