"""Names for training that goes wrong in silence. Pure functions of what an epoch measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from potstill.predictions import Predictions, area_under_roc, ranked

COLLAPSED_SHARE = 0.995
"""Predictions count as collapsed when one class takes more than this share of them."""


@dataclass(frozen=True)
class Finding:
    name: str
    message: str


def check_epoch(
    epochs: Sequence[dict[str, Any]], found: Predictions, classes: Sequence[str]
) -> list[dict[str, str]]:
    """Warnings about the last of `epochs` (epoch records, oldest first).

    `found` is what was said of the validation samples in it. Returns [{"name", "message"}] with the names
    collapsed, val_at_chance, val_loss_frozen.
    """
    findings = [_collapsed(found, classes), _at_chance(epochs, found, classes), _frozen(epochs)]
    return [asdict(w) for w in findings if w]


def check_monitor(monitor: str, value: float) -> list[dict[str, str]]:
    """Warn of an epoch whose `loop.monitor` has no value: monitor_undefined."""
    if not math.isnan(value):
        return []
    message = (
        f"loop.monitor={monitor} has no value in this epoch (validation lacks what it is measured on, such as samples "
        "of both classes): the epoch cannot be the best one"
    )
    return [asdict(Finding("monitor_undefined", message))]


def _collapsed(found: Predictions, classes: Sequence[str]) -> Finding | None:
    if found.targets is not None and found.targets.any() and not found.decided().any():
        return Finding(
            "collapsed",
            "no class of any validation sample reaches its threshold (task.threshold); the largest probability is "
            f"{found.confidence.max():.3f}",
        )
    counts = np.bincount(found.prediction, minlength=len(classes))
    top = int(counts.argmax())
    share = counts[top] / len(found.prediction)
    if share <= COLLAPSED_SHARE or _commonest(found, len(classes)) > COLLAPSED_SHARE:
        return None
    said = "the best-scored class of" if found.targets is not None else "the prediction for"
    return Finding("collapsed", f"{said} {share:.1%} of the validation samples is {classes[top]!r}")


def _commonest(found: Predictions, num_classes: int) -> float:
    """Share of the samples (several labels: of those that have any) that have the commonest class."""
    if found.targets is None:
        return np.bincount(found.label, minlength=num_classes).max() / len(found.label)
    labelled = max(int(found.targets.any(1).sum()), 1)
    return float(found.targets.sum(0).max() / labelled)


def _at_chance(
    epochs: Sequence[dict[str, Any]], found: Predictions, classes: Sequence[str]
) -> Finding | None:
    """Chance is what always saying the commonest class would score, and the loss of saying nothing."""
    last, first = epochs[-1], epochs[0]
    if len(epochs) < 2:
        return None
    share = _commonest(found, len(classes))
    chance = 100 * share
    learns = last["train_loss"] < 0.9 * first["train_loss"] or last["train_top1_acc"] > max(
        2 * chance, chance + 10
    )
    if not learns:
        return None
    if found.score is not None:
        said = _area_at_chance(found.score, found.label == 1)
    else:
        # two standard errors: a set of 50 images can miss its chance level by luck
        high = chance + 200 * math.sqrt(share * max(1 - share, 0) / len(found.id))
        said = None
        if last["val_top1_acc"] <= high:
            said = (
                f"validation top-1 is {last['val_top1_acc']:.2f}% (always saying the commonest class: "
                f"{chance:.2f}%)"
            )
    if said is None:
        return None
    return Finding(
        "val_at_chance",
        f"{said} while training learns (loss {first['train_loss']:.4f} -> {last['train_loss']:.4f}); compare the "
        "labels, class order and preprocessing of the splits",
    )


def _area_at_chance(score_N: np.ndarray, positive_N: np.ndarray) -> str | None:
    """What is said where scores do not tell two classes apart; accuracy would not say it, where one is rare.

    Two standard errors of the area under chance: Mann & Whitney 1947, Ann. Math. Stat. 18:50.
    """
    positives = int(positive_N.sum())
    negatives = len(positive_N) - positives
    if not positives or not negatives:
        return None
    area = area_under_roc(ranked(score_N, positive_N))
    error = math.sqrt((positives + negatives + 1) / (12 * positives * negatives))
    if area > 0.5 + 2 * error:
        return None
    return f"validation AUC is {area:.3f} (chance: 0.500)"


def _frozen(epochs: Sequence[dict[str, Any]]) -> Finding | None:
    if len(epochs) < 2:
        return None
    last, before = epochs[-1]["val_loss"], epochs[-2]["val_loss"]
    if (
        f"{last:.6g}" != f"{before:.6g}"
        or epochs[-1]["train_loss"] == epochs[-2]["train_loss"] == 0
    ):
        return None
    return Finding(
        "val_loss_frozen", f"validation loss has stood at {last:.6g} since the last epoch"
    )


def check_labels(counts: dict[str, np.ndarray], classes: Sequence[str]) -> list[dict[str, str]]:
    """Warn of classes that stand in one split only. `counts`: split -> images by class [K]."""
    warnings = []
    for one, other in (("train", "val"), ("val", "train")):
        if one not in counts or other not in counts:
            continue
        only_here = np.flatnonzero((counts[one] > 0) & (counts[other] == 0))
        lone = [classes[int(k)] for k in only_here]
        if lone:
            message = f"{len(lone)} classes have images in {one} and none in {other}: {', '.join(lone[:5])}"
            warnings.append(
                asdict(Finding("label_sets_differ", message + (", …" if len(lone) > 5 else "")))
            )
    return warnings
