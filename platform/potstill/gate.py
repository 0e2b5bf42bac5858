"""Is a teacher worth learning from? A metric, two thresholds, a verdict and what follows from it.

Shapes: K classes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from potstill import metric_names
from potstill.config import Gate
from potstill.errors import UserError

GOOD_AUC, MARGINAL_AUC = 0.65, 0.55
GOOD_SHARE, MARGINAL_SHARE = 0.3, 0.1
"""Of the way from chance to perfect, for metrics other than an AUC."""

JUDGED_BY = (
    *("auc", "top1_acc", "top5_acc", "balanced_acc", "macro_recall", "macro_precision"),
    *("precision", "macro_f1", "f1", "average_precision", "mcc", "cohen_kappa"),
)
"""The metrics of which it is known what chance gives."""


@dataclass(frozen=True)
class Thresholds:
    """In the metric's own unit. `inverted`: an AUC below it; None for any other metric."""

    good: float
    marginal: float
    inverted: float | None
    chance: float


@dataclass(frozen=True)
class Verdict:
    """`name`: good | marginal | must_finetune | inverted."""

    name: str
    title: str
    consequence: str
    passed: bool
    """Diagnosed: it need not be fine-tuned. Verified: students may learn from it."""
    loud: bool
    """Whether a user must not overlook it."""


def default_metric(kind: str) -> str:
    """What a teacher is judged by where gate.metric is null. `kind`: task.kind."""
    return "top1_acc" if kind == "single_label" else "auc"


def check_metric(metric: str, kind: str) -> None:
    """Raises UserError for a metric that this kind of task does not have, or whose value by chance is not known."""
    if metric not in JUDGED_BY:
        raise UserError(
            f"gate.metric must be one of {', '.join(JUDGED_BY)}, got {metric!r}: of others it is not known what chance gives"
        )
    if metric not in metric_names.ALWAYS:
        metric_names.check(kind, [metric], key="gate.metric")


def check_given(metric: str, gate: Gate) -> None:
    """Raises UserError for thresholds that cannot be meant, whatever chance gives: of another unit, or turned round."""
    percent = metric_names.is_percent(metric)
    for key, value in (("good", gate.good), ("marginal", gate.marginal)):
        if value is None:
            continue
        if percent and 0 < value <= 1:
            raise UserError(
                f"gate.{key} must be in percent, as {metric} is, got {value:g}; set gate.{key}={100 * value:g}, not {value:g}"
            )
        perfect = 100 if percent else 1
        if value > perfect:
            remedy = "" if percent else f"; set gate.{key}={value / 100:g}, not {value:g}"
            raise UserError(
                f"gate.{key} must be {'a percentage' if percent else 'a fraction'} <= {perfect}, what a perfect {metric} is, "
                f"got {value:g}{remedy}"
            )
    if metric == "auc" or gate.good is not None:  # by chance 0 the other one is at its lowest
        thresholds(metric, 0.0, gate)


def chance(metric: str, support_K: Sequence[int], samples: int, kind: str) -> float:
    """What a classifier that has learned nothing reaches, in the metric's unit: percent or a fraction.

    `support_K`: samples of each class in the split that was measured, of `samples` in all (of a multi-label task
    they may add up to more, or less); of a binary task the positive class is the last.
    """
    present = [n for n in support_K if n]
    shares = sorted((n / max(samples, 1) for n in present), reverse=True)
    count = max(len(present), 1)
    positive = support_K[-1] / max(samples, 1) if support_K else 0.0
    scale = 100.0 if metric_names.is_percent(metric) else 1.0
    match metric:
        case "auc":
            share = 0.5
        case "top1_acc":
            share = max(shares[:1], default=0.0)
        case "top5_acc":
            share = min(sum(shares[:5]), 1.0)
        case "precision":
            share = positive
        case "f1":  # of one who calls everything positive
            share = 2 * positive / (1 + positive)
        case "average_precision":
            share = positive if kind == "binary" else sum(shares) / count
        case "macro_f1" | "macro_precision" if kind == "multi_label":
            share = sum(s if metric == "macro_precision" else 2 * s / (1 + s) for s in shares)
            share /= count
        case "mcc" | "cohen_kappa":
            share = 0.0
        case _:
            share = 1 / count
    return scale * share


def thresholds(metric: str, by_chance: float, gate: Gate) -> Thresholds:
    """`by_chance`: what `chance` says. Raises UserError unless good > marginal."""
    perfect = 100.0 if metric_names.is_percent(metric) else 1.0
    if metric == "auc":
        good, marginal = GOOD_AUC, MARGINAL_AUC
    else:
        good = by_chance + GOOD_SHARE * (perfect - by_chance)
        marginal = by_chance + MARGINAL_SHARE * (perfect - by_chance)
    good = good if gate.good is None else gate.good
    marginal = marginal if gate.marginal is None else gate.marginal
    if not marginal < good <= perfect:
        raise UserError(
            f"gate.good must be > gate.marginal ({marginal:g}) and <= {perfect:g}, what a perfect {metric} is, got {good:g}"
        )
    return Thresholds(good, marginal, gate.inverted if metric == "auc" else None, by_chance)


def judge(
    metric: str,
    value: float,
    limits: Thresholds,
    gate: Gate,
    *,
    verifying: bool = False,
    can_finetune: bool = True,
) -> Verdict:
    """The verdict on a teacher that was measured once (diagnosed), or again (`verifying`: after any fine-tuning).

    `can_finetune`: whether there is an experiment that fine-tunes it. Raises UserError for a value that is none.
    """
    if not math.isfinite(value):
        raise UserError(
            f"gate.metric: {metric} has no value on these images ({value}); they must hold samples of every class, or "
            "choose another metric"
        )
    shown = f"{metric_names.title(metric)} {metric_names.shown(metric, value)}"
    scale = _said(metric, limits)
    if value >= limits.good:
        name, title = "good", f"Good: {shown} ({scale})"
    elif value >= limits.marginal:
        name, title = "marginal", f"Marginal: {shown} ({scale})"
    elif limits.inverted is not None and value < limits.inverted:
        name = "inverted"
        title = f"PROBABLY INVERTED LABELS: {shown} is below {limits.inverted:g}, worse than guessing ({scale})"
    else:
        name, title = "must_finetune", f"Not fit to teach: {shown} ({scale})"
    passed, consequence = (
        _once_verified(name) if verifying else _once_diagnosed(name, gate, can_finetune)
    )
    loud = name == "inverted" or (verifying and name != "good")
    return Verdict(name, title, consequence, passed, loud)


def _said(metric: str, limits: Thresholds) -> str:
    good, marginal, by_chance = (
        metric_names.shown(metric, v) for v in (limits.good, limits.marginal, limits.chance)
    )
    return f"good from {good}, marginal from {marginal}; chance gives {by_chance}"


_CHECK_LABELS = (
    "it orders the classes well but the wrong way round: compare the names and the order of its classes with those of "
    "the data"
)


def _once_diagnosed(name: str, gate: Gate, can_finetune: bool) -> tuple[bool, str]:
    tuned = (
        "it is fine-tuned" if can_finetune else "there is no distil.finetune, so it stays as it is"
    )
    if name == "good":
        return True, "no fine-tuning is needed"
    if name == "marginal" and gate.on_marginal == "skip":
        return True, "it is used as it is (gate.on_marginal=skip)"
    if name == "marginal":
        return False, f"{tuned} (gate.on_marginal=finetune)"
    if name == "inverted":
        return False, f"{_CHECK_LABELS}; fine-tuning would hide this instead of mending it; {tuned}"
    return False, f"it must be fine-tuned before anything learns from it: {tuned}"


def _once_verified(name: str) -> tuple[bool, str]:
    if name == "good":
        return True, "the students learn from it"
    if name == "marginal":
        return True, "the students learn from it, with this warning: do not expect much of it"
    alone = "no distillation: the students are trained on the task's loss alone"
    return False, f"{alone}; {_CHECK_LABELS}" if name == "inverted" else alone
