"""Names for training that goes wrong in silence. Pure functions of what an epoch measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

COLLAPSED_SHARE = 0.995
"""Predictions count as collapsed when one class takes more than this share of them."""


@dataclass(frozen=True)
class Finding:
    name: str
    message: str


def check_epoch(
    epochs: Sequence[dict[str, Any]],
    labels: np.ndarray,
    predictions: np.ndarray,
    classes: Sequence[str],
) -> list[dict[str, str]]:
    """Warnings about the last of `epochs` (epoch records, oldest first).

    `labels` and `predictions` [N] are validation samples as class indices. Returns
    [{"name", "message"}] with the names collapsed, val_at_chance, val_loss_frozen.
    """
    found = [
        _collapsed(labels, predictions, classes),
        _at_chance(epochs, labels, len(classes)),
        _frozen(epochs),
    ]
    return [asdict(w) for w in found if w]


def _collapsed(
    labels: np.ndarray, predictions: np.ndarray, classes: Sequence[str]
) -> Finding | None:
    counts = np.bincount(predictions, minlength=len(classes))
    top, true_share = (
        int(counts.argmax()),
        np.bincount(labels, minlength=len(classes)).max() / len(labels),
    )
    share = counts[top] / len(predictions)
    if share <= COLLAPSED_SHARE or true_share > COLLAPSED_SHARE:
        return None
    return Finding("collapsed", f"{share:.1%} of the validation predictions are {classes[top]!r}")


def _at_chance(
    epochs: Sequence[dict[str, Any]], labels: np.ndarray, num_classes: int
) -> Finding | None:
    """Chance is what always saying the commonest class would score, and the loss of saying nothing."""
    last, first = epochs[-1], epochs[0]
    if len(epochs) < 2:
        return None
    chance = 100 * np.bincount(labels, minlength=num_classes).max() / len(labels)
    # two standard errors: a set of 50 images can miss its chance level by luck
    chance_high = chance + 200 * math.sqrt(chance / 100 * (1 - chance / 100) / len(labels))
    learns = last["train_loss"] < 0.9 * first["train_loss"] or last["train_top1_acc"] > max(
        2 * chance, chance + 10
    )
    if not learns or last["val_top1_acc"] > chance_high:
        return None
    return Finding(
        "val_at_chance",
        f"validation top-1 is {last['val_top1_acc']:.2f}% (always saying the commonest class: {chance:.2f}%) while "
        f"training learns (loss {first['train_loss']:.4f} -> {last['train_loss']:.4f}); compare the labels, class "
        "order and preprocessing of the splits",
    )


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
