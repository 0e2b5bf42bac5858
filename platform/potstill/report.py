"""Plots and one HTML page of a run, from its journal and the best checkpoint's validation predictions."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import console, metric_names, runs
from potstill.console import duration
from potstill.errors import UserError
from potstill.predictions import (
    Calibration,
    Predictions,
    Ranked,
    area_under_roc,
    average_precision,
    calibration,
    confusion_counts,
    most_confused,
    per_class,
    ranked,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from scipy.sparse import csr_array

Record = dict[str, Any]
INK, MUTED, GRID = "#1f2933", "#66727f", "#e3e7eb"
COLOURS = {"train": "#d1792b", "val": "#2563a8", "other": "#5b7f3a", "warning": "#b3261e"}
MAX_MATRIX_CLASSES = 100
MAX_NUMBERED_CLASSES = 12
MAX_CURVES = 30
MAX_TABLE_ROWS = 1000


def write_history(run_dir: Path) -> None:
    """Write training_history.json, whole and atomically, from the journal."""
    runs.write_json(run_dir / "training_history.json", runs.history(runs.read_journal(run_dir)))


def report(run_dir: Path, summary: Record | None = None) -> list[Path]:
    """Draw `plots/*.png` and write `report.html`. Returns the files written, the page last.

    `summary` is what summary.json holds, or will hold: a run that ends writes that file last.

    Raises UserError if no epoch of the run has finished.
    """
    records = runs.read_journal(run_dir)
    standing = _standing(records)
    epochs = [
        {**r, "warnings": [w for w in r.get("warnings", []) if w not in standing]}
        for r in records
        if r["kind"] == "epoch"
    ]
    if not epochs:
        raise UserError(
            f"from_run={run_dir} must have finished an epoch to be reported on, got none; "
            "start its command again and let it train"
        )
    about = runs.read_json(run_dir / "run.json")
    classes: list[str] = about["classes"]
    found, missing = None, ""
    try:
        _, found = read_predictions(run_dir)
    except UserError as error:
        missing = str(error)

    kind, k = task_kind(records), epochs[-1]["top_k"]
    top_1, top_5 = (metric_names.title(key, kind, k) for key in ("top1_acc", "top5_acc"))
    drawings: dict[str, Callable[[], Figure]] = {
        "training_summary": lambda: _summary_figure(about["name"], kind, records, epochs),
        "loss_curves": lambda: _curve_figure("Loss", "loss", epochs, _step_losses(records)),
        "top1_accuracy": lambda: _curve_figure(top_1, "top1_acc", epochs),
    }
    if k > 1:
        drawings["top5_accuracy"] = lambda: _curve_figure(top_5, "top5_acc", epochs)
    if chosen := metric_names.further(epochs[-1]):
        drawings["metrics"] = lambda: _metrics_figure(chosen, epochs)
    if found is not None:
        drawings |= prediction_figures(found, classes, "validation")
    pictures: dict[str, bytes] = {}
    for name, draw in drawings.items():
        pictures[name] = png(draw())
        runs.atomic_write(run_dir / "plots" / f"{name}.png", pictures[name])
    heatmaps = _heatmaps(run_dir) if found is not None else None
    if isinstance(heatmaps, Path):
        pictures["heatmaps"] = heatmaps.read_bytes()
    page = run_dir / "report.html"
    if summary is None:
        path = run_dir / "summary.json"
        summary = runs.read_json(path) if path.exists() else {}
    assert summary is not None
    without = heatmaps if isinstance(heatmaps, str) else ""
    content = _page(run_dir, about, records, epochs, found or missing, pictures, summary, without)
    runs.atomic_write(page, content)
    return [*(run_dir / "plots" / f"{name}.png" for name in pictures), page]


def _heatmaps(run_dir: Path) -> Path | str | None:
    """Their file, why there is none, or None where the model has no patches."""
    from potstill.heatmaps import write_heatmaps

    try:
        return write_heatmaps(run_dir)
    except Exception as error:  # a picture must not be the end of a training that has finished
        said = str(error) or type(error).__name__
        console.warn(f"No heat maps of {run_dir.name}: {said}")
        return said


# -------------------------------------------------------------------------------------- predictions
def _standing(records: Sequence[Record]) -> list[dict[str, str]]:
    """Warnings about the data, once: every attempt and every epoch says them anew."""
    said = [{k: r[k] for k in ("name", "message")} for r in records if r["kind"] == "warning"]
    return [w for i, w in enumerate(said) if w not in said[:i]]


def task_kind(records: Sequence[Record]) -> str:
    """single_label | multi_label | binary, as the run's attempts say."""
    attempts = [r for r in records if r["kind"] == "attempt"]
    return attempts[-1].get("task_kind", "single_label") if attempts else "single_label"


def read_predictions(run_dir: Path) -> tuple[Record, Predictions]:
    """The best checkpoint's meta.json, and what is in its `val_predictions.npz`.

    Raises UserError if there is no such checkpoint, or it is damaged or without predictions.
    """
    import numpy as np

    best = runs.best_checkpoint(run_dir)
    path = best.folder / "val_predictions.npz"
    if not path.exists():
        raise UserError(
            f"{path} must hold the validation predictions of the best epoch, but does not exist"
        )
    with np.load(path, allow_pickle=False) as arrays:
        return best.meta, Predictions.of_arrays(arrays)


def prediction_figures(
    found: Predictions, classes: Sequence[str], subset: str
) -> dict[str, Callable[[], Figure]]:
    """What can be drawn of predictions, by name: confusion_matrix or curves, and reliability."""
    drawings: dict[str, Callable[[], Figure]] = {}
    if found.kind != "multi_label":
        counts = confusion_counts(found, len(classes))
        drawings["confusion_matrix"] = lambda: confusion_figure(counts, classes, subset)
    if found.kind != "single_label":
        drawings["curves"] = lambda: curves_figure(found, classes, subset)
    drawings["reliability"] = lambda: reliability_figure(calibration(found), found.kind, subset)
    return drawings


# ---------------------------------------------------------------------------------------- statistics
def best_epoch(epochs: Sequence[Record]) -> Record | None:
    """The record of the best epoch by loop.monitor, as the run itself marked it."""
    return next((r for r in reversed(epochs) if r.get("best")), None)


def _extreme(epochs: Sequence[Record], key: str) -> tuple[float, int] | None:
    """The best finite value of `key` and its epoch; None where there is none."""
    found = [(r[key], r["epoch"]) for r in epochs if math.isfinite(r.get(key, math.nan))]
    if not found:
        return None
    if metric_names.higher_is_better(key):
        return max(found, key=lambda f: (f[0], -f[1]))
    return min(found, key=lambda f: f[0])


def _number(value: float, key: str) -> str:
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "infinite"
    return metric_names.shown(key, value, space=" ")


def _statistics(epochs: Sequence[Record], metric: str) -> str:
    """`best val 0.41 (epoch 7) · last val 0.43 · gap 0.05`: the gap says how much worse validation is."""
    last = epochs[-1]
    parts = []
    if best := _extreme(epochs, f"val_{metric}"):
        parts.append(f"best val {_number(best[0], metric)} (epoch {best[1]})")
    parts.append(f"last val {_number(last[f'val_{metric}'], metric)}")
    if f"train_{metric}" in last:
        parts.append(f"train {_number(last[f'train_{metric}'], metric)}")
        gap = last[f"train_{metric}"] - last[f"val_{metric}"]
        gap = gap if metric_names.higher_is_better(metric) else -gap
        if math.isfinite(gap):
            shown = f"{gap:.2f} points" if metric_names.is_percent(metric) else f"{gap:.4f}"
            parts.append(f"generalisation gap {shown}")
    return " · ".join(parts)


def _step_losses(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """Epochs (as a fraction) and batch losses of the step records."""
    per_epoch = next((r["steps_per_epoch"] for r in records if r["kind"] == "attempt"), None)
    steps = [r for r in records if r["kind"] == "step"] if per_epoch else []
    return [r["step"] / per_epoch for r in steps], [r["loss"] for r in steps]


# -------------------------------------------------------------------------------------------- figures
def new_figure(width_in: float, height_in: float) -> Figure:
    """A figure in this project's style that no window system and no global state knows of."""
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    mpl.rcParams.update(
        {
            "font.size": 10,
            "axes.titleweight": "bold",
            "axes.titlelocation": "left",
            "axes.titlesize": 12,
        }
    )
    figure = Figure(figsize=(width_in, height_in), dpi=140, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def style(axes: Axes) -> None:
    axes.grid(True, color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color("#9aa5b1")
    axes.tick_params(colors=MUTED, labelcolor=INK)


def head(axes: Axes, title: str, facts: str, size: float = 9) -> None:
    """The title, and beneath it the statistics that belong to the plot."""
    axes.set_title(title, color=INK, pad=24)
    line = axes.annotate(
        facts,
        (0, 1),
        xytext=(0, 8),
        xycoords="axes fraction",
        textcoords="offset points",
        color=MUTED,
        fontsize=size,
    )
    line.set_in_layout(False)  # a long line must not make the plot narrower


def png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def _curves(axes: Axes, epochs: Sequence[Record], metric: str) -> None:
    """Train and validation of one metric, with the best epoch, labels at the lines' ends, and warnings."""
    from matplotlib.ticker import MaxNLocator

    xs = [r["epoch"] for r in epochs]
    ends: list[tuple[float, str]] = []
    for subset in ("train", "val"):
        ys = [r.get(f"{subset}_{metric}", math.nan) for r in epochs]
        finite = [(x, y) for x, y in zip(xs, ys, strict=True) if math.isfinite(y)]
        if finite:
            colour = COLOURS[subset]
            many = len(xs) > 40
            axes.plot(xs, ys, color=colour, linewidth=2, marker=None if many else "o", markersize=4)
            lost = [x for x, y in zip(xs, ys, strict=True) if not math.isfinite(y)]
            at_foot = {"transform": axes.get_xaxis_transform(), "linestyle": "", "marker": "x"}
            axes.plot(lost, [0.03] * len(lost), color=colour, **at_foot)
            ends.append((finite[-1][1], subset))
    if (best := _extreme(epochs, f"val_{metric}")) and len(epochs) > 1:
        axes.plot(
            best[1],
            best[0],
            "o",
            color="white",
            markeredgecolor=COLOURS["val"],
            markersize=9,
            markeredgewidth=2,
        )
    if not ends:
        axes.text(0.5, 0.5, "no finite value", transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_xlim(min(0.5, xs[0] - 0.5), xs[-1] + max(0.5, 0.02 * len(xs)))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
    axes.set_xlabel("epoch", color=MUTED)
    _mark_warnings(axes, epochs)
    _label_ends(axes, ends)


def _label_ends(axes: Axes, ends: list[tuple[float, str]]) -> None:
    """Name the lines at their ends, moved apart where the ends are close."""
    low, high = axes.get_ylim()
    least = 0.06 * (high - low)
    ends = sorted(ends)
    if len(ends) == 2 and (overlap := least - (ends[1][0] - ends[0][0])) > 0:
        ends = [(ends[0][0] - overlap / 2, ends[0][1]), (ends[1][0] + overlap / 2, ends[1][1])]
    for placed, subset in ends:
        axes.annotate(
            subset,
            (1.0, placed),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            color=COLOURS[subset],
            fontweight="bold",
            annotation_clip=False,
        )


def _mark_warnings(axes: Axes, epochs: Sequence[Record]) -> None:
    """A line at each epoch with a warning; the name where it first appears."""
    seen: set[str] = set()
    for record in epochs:
        names = [w["name"] for w in record.get("warnings", [])]
        if not names:
            continue
        axes.axvline(
            record["epoch"], color=COLOURS["warning"], linewidth=1, linestyle=(0, (2, 3)), zorder=1
        )
        for line, name in enumerate(n for n in dict.fromkeys(names) if n not in seen):
            late = record["epoch"] > (axes.get_xlim()[0] + axes.get_xlim()[1]) / 2
            axes.annotate(
                f"! {name}",
                (record["epoch"], 1.0),
                xycoords=("data", "axes fraction"),
                xytext=(-4 if late else 4, -4 - 12 * line),
                textcoords="offset points",
                ha="right" if late else "left",
                va="top",
                color=COLOURS["warning"],
                fontsize=8,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.7},
            )
        seen.update(names)


def _curve_figure(
    title: str,
    metric: str,
    epochs: Sequence[Record],
    steps: tuple[list[float], list[float]] | None = None,
) -> Figure:
    figure = new_figure(8, 4.6)
    axes = figure.add_subplot()
    style(axes)
    if steps and steps[0]:
        axes.plot(*steps, color=COLOURS["train"], alpha=0.25, linewidth=0.8, zorder=1)
        _clip_to_epochs(axes, epochs, metric, steps[1])
    _curves(axes, epochs, metric)
    if steps and steps[0]:
        axes.set_xlim(left=epochs[0]["epoch"] - 1)
    head(axes, title, _statistics(epochs, metric))
    _percent_axis(axes, metric)
    return figure


def _percent_axis(axes: Axes, metric: str) -> None:
    if metric_names.is_percent(metric):
        axes.yaxis.set_major_formatter(lambda value, _: f"{value:g} %")


def _metrics_figure(keys: Sequence[str], epochs: Sequence[Record]) -> Figure:
    """One small plot for each metric that was chosen."""
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    figure = new_figure(max(4.6 * columns, 6), 3.6 * rows)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr]
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, key in zip(grid.flat, keys, strict=False):
        metric = metric_names.plain(key)
        style(axes)
        _curves(axes, epochs, metric)
        head(axes, metric_names.title(key), _statistics(epochs, metric), 8)
        _percent_axis(axes, metric)
    for axes in grid.flat[len(keys) :]:
        axes.set_visible(False)
    return figure


def _clip_to_epochs(
    axes: Axes, epochs: Sequence[Record], metric: str, values: Sequence[float]
) -> None:
    """Keep one wild batch from flattening the curves: the axis ends at the 99th percentile of the batches."""
    import numpy as np

    shown = [r.get(f"{s}_{metric}", math.nan) for r in epochs for s in ("train", "val")]
    finite = np.array([v for v in shown if math.isfinite(v)])
    batches = np.array([v for v in values if math.isfinite(v)])
    if len(finite) and len(batches):
        low, high = (
            min(finite.min(), np.percentile(batches, 1)),
            max(finite.max(), np.percentile(batches, 99)),
        )
        margin = 0.06 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)


def _summary_figure(
    name: str, kind: str, records: Sequence[Record], epochs: Sequence[Record]
) -> Figure:
    k = epochs[-1]["top_k"]
    figure = new_figure(13, 8)
    grid = figure.subplots(2, 2)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr]
    third = "top5_acc" if k > 1 else "macro_f1"
    for axes, metric in zip(grid.flat, ("loss", "top1_acc", third), strict=False):
        style(axes)
        _curves(axes, epochs, metric)
        head(axes, metric_names.title(metric, kind, k), _statistics(epochs, metric), 8)
        _percent_axis(axes, metric)

    axes = grid[1, 1]
    style(axes)
    at, _ = _step_losses(records)
    rates = [r["lr"] for r in records if r["kind"] == "step"] if at else [r["lr"] for r in epochs]
    axes.plot(at or [r["epoch"] for r in epochs], rates, color=COLOURS["other"], linewidth=2)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("epoch", color=MUTED)
    finite = [rate for rate in rates if math.isfinite(rate)]
    rate_text = f"largest {max(finite):.3g} · last {rates[-1]:.3g}" if finite else "no finite value"
    head(axes, "Learning rate", rate_text, 8)

    seconds = sum(r["seconds"] for r in epochs)
    parts = [
        _epochs(len(epochs)),
        duration(seconds),
        f"{epochs[-1]['images_per_s']:,.0f} img/s in the last one",
    ]
    if best := best_epoch(epochs):
        monitor = _monitor(records)
        keys = ["val_top1_acc", "val_macro_f1"]
        shown = [f"{_named(key, kind, k)} {_number(best[key], key)}" for key in keys]
        if monitor in best and monitor not in keys:
            shown.append(f"{_named(monitor, kind, k)} {_number(best[monitor], monitor)}")
        parts.append(f"best epoch {best['epoch']}: {', '.join(shown)}")
    figure.suptitle(f"{name}   ({' · '.join(parts)})", x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def confusion_figure(pairs: csr_array, classes: Sequence[str], subset: str) -> Figure:
    """Row-normalised matrix with numbers up to 12 classes, without up to 100; beyond, the most confused pairs."""
    import numpy as np

    size = len(classes)
    right = int(pairs.diagonal().sum())
    total = int(pairs.sum())
    facts = f"{right:,} of {total:,} {subset} samples right ({100 * right / max(total, 1):.2f} %)"
    if size > MAX_MATRIX_CLASSES:
        return _pairs_figure(pairs, classes, facts, subset)
    counts = pairs.toarray()
    share = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    side = max(5.0, min(12.0, 2.6 + (0.62 if size <= MAX_NUMBERED_CLASSES else 0.16) * size))
    figure = new_figure(side + 1.2, side)
    axes = figure.add_subplot()
    image = axes.imshow(share, cmap="Blues", vmin=0, vmax=1)
    font = 9 if size <= MAX_NUMBERED_CLASSES else max(4.0, min(8.0, 340 / size))
    names = [_shorten(name) for name in classes]
    turn = 0 if max(map(len, names)) <= 3 and size <= 30 else 45 if size <= 30 else 90
    axes.set_xticks(
        range(size), names, rotation=turn, ha="right" if turn == 45 else "center", fontsize=font
    )
    axes.set_yticks(range(size), names, fontsize=font)
    if size <= MAX_NUMBERED_CLASSES:
        for row in range(size):
            for column in range(size):
                if counts[row, column]:
                    axes.text(
                        column,
                        row,
                        f"{100 * share[row, column]:.0f} %\n{counts[row, column]}",
                        ha="center",
                        va="center",
                        fontsize=8,
                        color="white" if share[row, column] > 0.55 else INK,
                    )
    edges = np.arange(size + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(
        which="minor",
        color=GRID if size <= MAX_NUMBERED_CLASSES else "white",
        linewidth=12 / max(size, 12),
    )
    axes.tick_params(which="both", length=0)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_xlabel("predicted", color=MUTED)
    axes.set_ylabel("true", color=MUTED)
    head(axes, "Confusion matrix", facts)
    if size > MAX_NUMBERED_CLASSES:
        bar = figure.colorbar(
            image, ax=axes, fraction=0.04, pad=0.02, format=lambda value, _: f"{100 * value:.0f} %"
        )
        bar.ax.set_frame_on(False)
        bar.set_label("share of the true class", color=MUTED)
    return figure


def _pairs_figure(counts: csr_array, classes: Sequence[str], facts: str, subset: str) -> Figure:
    pairs = most_confused(counts, 25)
    support = counts.sum(axis=1)
    figure = new_figure(9, max(3.0, 1.4 + 0.3 * len(pairs)))
    axes = figure.add_subplot()
    style(axes)
    axes.grid(False, axis="y")
    axes.barh(range(len(pairs)), [n for _, _, n in pairs], color=COLOURS["val"], height=0.7)
    axes.set_yticks(
        range(len(pairs)),
        [f"{_shorten(classes[t])} → {_shorten(classes[p])}" for t, p, _ in pairs],
        fontsize=8,
    )
    for at, (true, _, number) in enumerate(pairs):
        axes.annotate(
            f"{number} of {int(support[true])}", (number, at), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=8, color=MUTED,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.set_xlabel(f"{subset} samples", color=MUTED)
    head(axes, "Most confused pairs (true → predicted)", f"{facts}, {len(classes):,} classes")
    return figure


def reliability_figure(found: Calibration, kind: str, subset: str) -> Figure:
    """How often what was said with a confidence was so; beneath it, how often it was said."""
    import numpy as np

    what = {
        "single_label": ("confidence of the prediction", "share that is right"),
        "binary": ("probability of the positive class", "share that is positive"),
        "multi_label": ("probability of a class, all classes together", "share that is true"),
    }[kind]
    figure = new_figure(6.4, 6.6)
    axes, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    width = 1 / len(found.count)
    middle = (np.arange(len(found.count)) + 0.5) * width
    for one in (axes, below):
        style(one)
        one.set_xlim(0, 1)
    axes.bar(middle, found.frequency, 0.92 * width, color=COLOURS["val"], alpha=0.55, zorder=2)
    axes.plot((0, 1), (0, 1), color=INK, linewidth=1.2, linestyle=(0, (4, 4)), zorder=3)
    axes.plot(
        found.confidence, found.frequency, "o", color="white", markeredgecolor=INK, zorder=4,
        markersize=6, clip_on=False,
    )  # fmt: skip
    axes.set_ylim(0, 1)
    axes.set_ylabel(what[1], color=MUTED)
    below.bar(middle, found.count, 0.92 * width, color="#9aa5b1")
    below.set_ylabel("number", color=MUTED)
    below.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    below.set_xlabel(what[0], color=MUTED)
    number = int(found.count.sum())
    facts = f"expected calibration error {found.error:.4f} · {number:,} {subset} "
    facts += "decisions" if kind == "multi_label" else "samples"
    head(axes, "Reliability (on the dashed line: as sure as it is right)", facts)
    return figure


def curves_figure(found: Predictions, classes: Sequence[str], subset: str) -> Figure:
    """ROC and precision-recall curves: of class 1 or, of several labels, of each class and of all decisions."""
    import numpy as np

    lines: list[tuple[Ranked, bool]] = []
    if found.score is not None:
        whole = ranked(found.score, found.label == 1)
        title, of = f"Telling {_shorten(classes[1])} from {_shorten(classes[0])}", "samples"
    else:
        assert found.scores is not None
        assert found.targets is not None
        whole = ranked(found.scores.astype(np.float32).ravel(), found.targets.ravel())
        title, of = "All decisions together", "decisions"
        if len(classes) <= MAX_CURVES:
            title += ", and each class (thin)"
            lines += [
                (ranked(score.astype(np.float32), target), False)
                for score, target in zip(found.scores.T, found.targets.T, strict=True)
                if target.any() and not target.all()
            ]
    lines.append((whole, True))
    figure = new_figure(11, 5.4)
    roc, precision = figure.subplots(1, 2)
    for (score_T, true_T, false_T), main in lines:
        look: dict[str, Any] = {"color": COLOURS["val"] if main else "#9aa5b1"}
        look |= {"linewidth": 2.2 if main else 0.8, "alpha": 1 if main else 0.7}
        # matplotlib needs no more points than a screen has
        at = np.unique(np.linspace(0, len(score_T) - 1, 2000).astype(int))
        recall, total = true_T[at] / max(true_T[-1], 1), true_T[at] + false_T[at]
        roc.plot(np.append(0, false_T[at] / max(false_T[-1], 1)), np.append(0, recall), **look)
        precision.step(np.append(0, recall), np.append(1, true_T[at] / total), where="pre", **look)
    positives, negatives = int(whole.true_T[-1]), int(whole.false_T[-1])
    share = positives / (positives + negatives)
    roc.plot((0, 1), (0, 1), color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
    precision.axhline(share, color=MUTED, linewidth=1, linestyle=(0, (4, 4)))
    if found.score is not None and found.thresholds is not None:
        _mark_threshold(roc, precision, whole, float(found.thresholds[0]))
    for axes, x, y in (
        (roc, "share of the negatives that is let in", "share of the positives that is found"),
        (precision, "recall", "precision"),
    ):
        style(axes)
        axes.set_xlim(-0.01, 1.01)
        axes.set_ylim(-0.01, 1.02)
        axes.set_xlabel(x, color=MUTED)
        axes.set_ylabel(y, color=MUTED)
    head(
        roc,
        title,
        f"ROC: area {area_under_roc(whole):.4f} · {positives:,} of {positives + negatives:,} {subset} {of} positive",
    )
    head(
        precision,
        "Precision and recall",
        f"average precision {average_precision(whole):.4f} · by chance {share:.4f}",
    )
    return figure


def _mark_threshold(roc: Axes, precision: Axes, whole: Ranked, threshold: float) -> None:
    import numpy as np

    above = np.flatnonzero(whole.score_T >= threshold)
    if not len(above):
        return
    true, false = int(whole.true_T[above[-1]]), int(whole.false_T[above[-1]])
    recall = true / max(int(whole.true_T[-1]), 1)
    let_in = false / max(int(whole.false_T[-1]), 1)
    for axes, x, y in ((roc, let_in, recall), (precision, recall, true / max(true + false, 1))):
        axes.plot(
            x,
            y,
            "o",
            color="white",
            markeredgecolor=COLOURS["train"],
            markeredgewidth=2.2,
            markersize=9,
            zorder=5,
        )
        right = x > 0.6
        axes.annotate(
            f"threshold {threshold:.3f}", (x, y), xytext=(-8 if right else 10, -16), textcoords="offset points",
            ha="right" if right else "left", color=COLOURS["train"], fontsize=9, fontweight="bold",
        )  # fmt: skip


def _monitor(records: Sequence[Record]) -> str:
    attempts = [r for r in records if r["kind"] == "attempt"]
    return attempts[-1].get("monitor", "val_top1_acc") if attempts else "val_top1_acc"


def _named(key: str, kind: str, top_k: int) -> str:
    """A metric within a sentence: `top-1`, `macro-F1`, `hit@1`."""
    name = metric_names.title(key, kind, top_k).removesuffix(" accuracy")
    return name if name[:2].isupper() else name[:1].lower() + name[1:]


def _shorten(name: str, longest: int = 28) -> str:
    # matplotlib reads $...$ as mathematics
    name = name if len(name) <= longest else f"{name[: longest - 1]}…"
    return name.replace("$", r"\$")


def _epochs(number: int) -> str:
    return "1 epoch" if number == 1 else f"{number} epochs"


# ----------------------------------------------------------------------------------------------- page
CSS = """
:root { color-scheme: light dark; --ink: #1f2933; --muted: #66727f; --line: #e3e7eb; --back: #ffffff; --card: #f7f8fa; --warn: #b3261e; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ec; --muted: #9aa5b1; --line: #3a424b; --back: #171b20; --card: #20262d; --warn: #ff8a80; } }
body { margin: 0 auto; padding: 2rem 1.25rem 4rem; max-width: 64rem; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; overflow-wrap: anywhere; } h2 { font-size: 1.15rem; margin: 2.25rem 0 .6rem; }
.muted { color: var(--muted); } .warn { color: var(--warn); }
.tiles { display: flex; flex-wrap: wrap; gap: .75rem; margin: 1.25rem 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .6rem .9rem; min-width: 8.5rem; }
.tile b { display: block; font-size: 1.3rem; font-variant-numeric: tabular-nums; } .tile span { color: var(--muted); font-size: .85rem; }
.scroll { overflow: auto; max-height: 32rem; border: 1px solid var(--line); border-radius: .5rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; text-align: right; white-space: nowrap; border-bottom: 1px solid var(--line); }
th { position: sticky; top: 0; background: var(--card); font-weight: 600; } tr:last-child td { border-bottom: 0; }
th:first-child, td:first-child, td.text { text-align: left; } tr.best td { font-weight: 600; } td.text { white-space: normal; overflow-wrap: anywhere; }
img { display: block; width: 100%; height: auto; border-radius: .5rem; border: 1px solid var(--line); background: #fff; margin: 0 0 1rem; }
.pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(20rem, 1fr)); gap: 0 1rem; }
pre { background: var(--card); border: 1px solid var(--line); border-radius: .5rem; padding: .8rem 1rem; overflow: auto; max-height: 32rem; font-size: .82rem; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 700; margin: 2rem 0 .6rem; }
"""


def _page(
    run_dir: Path,
    about: Record,
    records: Sequence[Record],
    epochs: Sequence[Record],
    found: Predictions | str,
    pictures: dict[str, bytes],
    summary: Record,
    no_heatmaps: str = "",
) -> str:
    """`found`: the best epoch's validation predictions, or why there are none. `no_heatmaps`: why they are missing."""
    from datetime import datetime

    text = html.escape
    end = next((r for r in reversed(records) if r["kind"] == "end"), None)
    status = (
        f"{end['status'].replace('_', ' ')}{': ' + end['reason'] if end.get('reason') else ''}"
        if end
        else "not ended"
    )
    best = best_epoch(epochs)
    k = epochs[-1]["top_k"]
    created = datetime.fromtimestamp(about["created"]).strftime("%Y-%m-%d %H:%M")

    kind = task_kind(records)
    tiles = []
    if best:
        keys = ["val_top1_acc", *(["val_top5_acc"] if k > 1 else []), "val_macro_f1", "val_loss"]
        keys = list(dict.fromkeys([*keys, *metric_names.further(best)]))
        tiles += [(_number(best[key], key), f"validation {_named(key, kind, k)}") for key in keys]
        tiles.append((str(best["epoch"]), f"best epoch, by {_monitor(records)}"))
    tiles.append((duration(sum(r["seconds"] for r in epochs)), _epochs(len(epochs))))
    if summary.get("parameters") and summary.get("model_file_mb"):
        tiles.append(
            (f"{summary['parameters']:,}", f"parameters, {summary['model_file_mb']:.1f} MB")
        )

    dataset = about["dataset"]
    commit = about["git_commit"]
    identity = [
        ("Experiment", about["experiment"] or "none"),
        ("Folder", run_dir.resolve()),
        ("Started", created),
        ("Status", status),
        ("Config hash", about["config_hash"]),
        (
            "Git commit",
            f"{commit}{' with uncommitted changes' if about['git_dirty'] else ''}"
            if commit
            else "none",
        ),
        ("Teacher", about["teacher_run"] or "none"),
        ("Initial weights", about["init_from"] or "none"),
        ("Tags", ", ".join(about["tags"]) or "none"),
        ("Dataset", f"{dataset['root']} ({dataset['key']})"),
        ("Classes", f"{len(about['classes']):,}"),
        *((f"Samples, {name}", f"{number:,}") for name, number in dataset["counts"].items()),
        *((f"Version, {name}", version) for name, version in about["versions"].items()),
    ]
    attempts = [r for r in records if r["kind"] == "attempt"]
    for attempt in attempts:
        if attempt.get("resumed_from") or attempt.get("passed_over"):
            over = (
                f"; passed over {', '.join(attempt['passed_over'])}"
                if attempt.get("passed_over")
                else ""
            )
            origin = attempt.get("resumed_from") or "the beginning"
            identity.append(
                (f"Attempt {attempt['attempt']}", f"from {origin}, step {attempt['step']}{over}")
            )

    warned = [(f"epoch {r['epoch']}", w) for r in epochs for w in r.get("warnings", [])]
    warned = [("run", w) for w in _standing(records)] + warned
    columns = [
        "epoch",
        *runs.history_keys(epochs),
        "seconds",
        "images_per_s",
    ]

    def picture(name: str) -> str:
        if name not in pictures:
            return ""
        code = base64.b64encode(pictures[name]).decode()
        return f'<img alt="{text(name.replace("_", " "))}" src="data:image/png;base64,{code}">'

    def cell(record: Record, key: str) -> str:
        value = record.get(key)
        if not isinstance(value, (int, float)):
            return "–"
        if key == "epoch":
            return str(value)
        if key == "lr":
            return f"{value:.3g}"
        if key == "images_per_s":
            return f"{value:,.0f}"
        return (
            f"{value:.2f}" if metric_names.is_percent(key) or key == "seconds" else f"{value:.4f}"
        )

    parts = [
        f"<h1>{text(about['name'])}</h1>",
        f'<p class="muted">{text(status)} · started {text(created)} · {len(about["classes"]):,} classes</p>',
        '<div class="tiles">',
        *(
            f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>'
            for value, label in tiles
        ),
        "</div>",
    ]
    if warned:
        parts += [
            '<h2>Warnings</h2><div class="scroll"><table><tr><th>where</th><td class="text"><b>what</b></td></tr>'
        ]
        parts += [
            f'<tr><td>{text(where)}</td><td class="text"><b class="warn">{text(w["name"])}</b>: {text(w["message"])}</td></tr>'
            for where, w in warned
        ]
        parts += ["</table></div>"]
    parts += [
        "<h2>Training</h2>",
        picture("training_summary"),
        picture("loss_curves"),
        f'<div class="pair">{picture("top1_accuracy")}{picture("top5_accuracy")}</div>',
        picture("metrics"),
        "<h2>Epochs</h2>",
        f'<p class="muted">Accuracies, precision, recall and F1 in percent; top5 is {_named("top5_acc", kind, k)} here. '
        "The best epoch is in bold.</p>",
        '<div class="scroll"><table><tr>',
        *(f"<th>{text(column)}</th>" for column in columns),
        "</tr>",
    ]
    for record in epochs:
        marked = ' class="best"' if best and record["epoch"] == best["epoch"] else ""
        parts.append(
            f"<tr{marked}>"
            + "".join(f"<td>{cell(record, column)}</td>" for column in columns)
            + "</tr>"
        )
    parts += ["</table></div>", "<h2>Validation, by class</h2>"]
    if isinstance(found, str):
        parts.append(f'<p class="muted">Not known: {text(found)}</p>')
    else:
        parts += [picture("confusion_matrix"), picture("curves")]
        parts += _class_table(found, about["classes"])
        parts += ["<h2>Calibration</h2>", f'<div class="pair">{picture("reliability")}</div>']
    if "heatmaps" in pictures:
        parts += ["<h2>Where it sees it</h2>", picture("heatmaps")]
    elif no_heatmaps:
        parts.append(f'<p class="muted">No heat maps: {text(no_heatmaps)}</p>')
    parts += ["<h2>This run</h2>", '<div class="scroll"><table>']
    parts += [
        f'<tr><td>{text(str(name))}</td><td class="text">{text(str(value))}</td></tr>'
        for name, value in identity
    ]
    parts += [
        "</table></div>",
        f"<details><summary>Config</summary><pre>{text((run_dir / 'config.yaml').read_text())}</pre></details>",
        f"<details><summary>Summary</summary><pre>{text(json.dumps(summary, indent=2))}</pre></details>"
        if summary
        else "",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{text(about['name'])}</title><style>{CSS}</style></head><body>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def _class_table(found: Predictions, classes: Sequence[str]) -> list[str]:
    rows = per_class(found, classes)
    headings = {"class": "class", "precision": "precision", "recall": "recall", "f1": "F1"}
    if found.kind == "multi_label":
        headings |= {"average_precision": "average precision", "threshold": "threshold"}
    headings["support"] = "support"

    def cell(row: Record, key: str) -> str:
        value = row[key]
        if key == "class":
            return html.escape(value)
        if key == "support":
            return f"{value:,}"
        if value is None:
            return "–"
        return f"{value:.4f}" if key in ("average_precision", "threshold") else f"{value:.2f}"

    said = "At the best epoch, in percent, worst F1 first."
    if found.kind == "multi_label":
        said += (
            " A class counts as predicted from its threshold on; average precision is a fraction."
        )
    elif found.thresholds is not None:
        said += f" {html.escape(classes[1])} counts as predicted from a probability of {found.thresholds[0]:.3f} on."
    if len(rows) > MAX_TABLE_ROWS:
        said += (
            f" These are {MAX_TABLE_ROWS:,} of {len(rows):,}; jobs/evaluate.py writes all of them."
        )
    parts = [f'<p class="muted">{said}</p>', '<div class="scroll"><table><tr>']
    parts += [f"<th>{heading}</th>" for heading in headings.values()]
    parts.append("</tr>")
    for row in rows[:MAX_TABLE_ROWS]:
        parts.append(f"<tr>{''.join(f'<td>{cell(row, key)}</td>' for key in headings)}</tr>")
    return [*parts, "</table></div>"]
