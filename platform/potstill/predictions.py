"""What a model said of a split, and all that follows from it: thresholds, tables, confusion, calibration.

Numpy alone, so that reports need not wait for torch. Shape suffixes: N samples, K classes, T distinct scores.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from potstill.errors import UserError

if TYPE_CHECKING:
    from scipy.sparse import csr_array

CALIBRATION_BINS = 15
NO_LABEL = -1


@dataclass(frozen=True)
class Predictions:
    """In the order of sample ids; classes are indices, probabilities fractions.

    single_label: `prediction` has the largest probability, `confidence`.
    binary: `score` is the probability of class 1; `prediction` is 1 from the threshold on, and `confidence` the
    probability of what was predicted.
    multi_label: `scores` and `targets` [N, K] are what was said of each class and what is true; `prediction` is the
    best-scored class, `confidence` its probability, and `label` is -1 throughout. A class counts as predicted from
    its threshold on. Two bytes a sample and class.
    """

    id: np.ndarray
    """int64 [N]"""
    label: np.ndarray
    """int32 [N]"""
    prediction: np.ndarray
    """int32 [N]"""
    confidence: np.ndarray
    """float32 [N]"""
    score: np.ndarray | None = None
    """float32 [N], binary only"""
    scores: np.ndarray | None = None
    """float16 [N, K], multi_label only"""
    targets: np.ndarray | None = None
    """bool [N, K], multi_label only"""
    thresholds: np.ndarray | None = None
    """float32 [1] binary, [K] multi_label"""

    @property
    def kind(self) -> str:
        if self.scores is not None:
            return "multi_label"
        return "single_label" if self.score is None else "binary"

    def arrays(self) -> dict[str, np.ndarray]:
        """For numpy.savez: the fields that there are; `targets` as packed bits uint8 [N, ceil(K/8)]."""
        found = {name: value for name, value in vars(self).items() if value is not None}
        if self.targets is not None:
            found["targets"] = np.packbits(self.targets, axis=1)
        return found

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, np.ndarray]) -> Predictions:
        """What `arrays` made, again."""
        found = dict(arrays)
        if "targets" in found:
            count = found["scores"].shape[1]
            found["targets"] = np.unpackbits(found["targets"], axis=1, count=count).astype(bool)
        return cls(**found)

    def decided(self) -> np.ndarray:
        """multi_label: which classes count as predicted, bool [N, K]."""
        assert self.scores is not None
        assert self.thresholds is not None
        return self.scores.astype(np.float32) >= self.thresholds


def binary_predictions(
    id_N: np.ndarray, label_N: np.ndarray, score_N: np.ndarray, threshold: str | float | np.ndarray
) -> Predictions:
    """`threshold` as in `choose_thresholds`, or chosen already: float32 [1]."""
    score_N = score_N.astype(np.float32)
    chosen = _thresholds(score_N[:, None], label_N[:, None] == 1, threshold)
    said_N = score_N >= chosen[0]
    confidence_N = np.where(said_N, score_N, 1 - score_N)
    return Predictions(
        id_N,
        label_N.astype(np.int32),
        said_N.astype(np.int32),
        confidence_N.astype(np.float32),
        score=score_N,
        thresholds=chosen,
    )


def multi_label_predictions(
    id_N: np.ndarray,
    targets_NK: np.ndarray,
    scores_NK: np.ndarray,
    prediction_N: np.ndarray,
    confidence_N: np.ndarray,
    threshold: str | float | np.ndarray,
) -> Predictions:
    """`threshold` as in `choose_thresholds`, or chosen already: float32 [K]."""
    scores_NK, targets_NK = scores_NK.astype(np.float16), targets_NK.astype(bool)
    return Predictions(
        id_N,
        np.full(len(id_N), NO_LABEL, np.int32),
        prediction_N.astype(np.int32),
        confidence_N.astype(np.float32),
        scores=scores_NK,
        targets=targets_NK,
        thresholds=_thresholds(scores_NK, targets_NK, threshold),
    )


# ----------------------------------------------------------------------------------------- thresholds
class Ranked(NamedTuple):
    """What is caught and what is wrongly caught from each distinct score on, the highest first."""

    score_T: np.ndarray
    true_T: np.ndarray
    false_T: np.ndarray


def ranked(score_N: np.ndarray, target_N: np.ndarray) -> Ranked:
    """`score_N` and bool `target_N` [N]; a score that is no number ranks last."""
    order = np.argsort(-score_N, kind="stable")
    score, target = score_N[order], target_N[order]
    last_T = np.append(np.flatnonzero(score[1:] != score[:-1]), len(score) - 1)
    true_N = np.cumsum(target)
    return Ranked(score[last_T], true_N[last_T], last_T + 1 - true_N[last_T])


def area_under_roc(found: Ranked) -> float:
    """Fraction; not a number where there is nothing to tell apart."""
    positives, negatives = int(found.true_T[-1]), int(found.false_T[-1])
    if not positives or not negatives:
        return math.nan
    true, false = np.append(0, found.true_T), np.append(0, found.false_T)
    return float(np.trapezoid(true, false) / (positives * negatives))


def average_precision(found: Ranked) -> float:
    """Sum of precision times the gain in recall, without interpolation; a fraction, not a number without positives."""
    positives = int(found.true_T[-1])
    if not positives:
        return math.nan
    gained = np.diff(found.true_T, prepend=0)
    return float((gained * found.true_T / (found.true_T + found.false_T)).sum() / positives)


def choose_thresholds(
    scores_NK: np.ndarray, targets_NK: np.ndarray, how: str | float
) -> np.ndarray:
    """The probability from which each class counts as present, float32 [K].

    `how`: a number; max_f1 (the best F1: Lipton et al. 2014, arXiv:1402.1892); youden (the largest sum of
    sensitivity and specificity: Youden 1950, Cancer 3:32). A threshold stands halfway between the two scores that it
    parts. A class that has no positive sample (youden: or no negative one) gets 0.5: there is nothing to choose by.
    """
    if not isinstance(how, str):
        return np.full(scores_NK.shape[1], how, np.float32)
    return np.array(
        [
            _choose(score_N.astype(np.float32), target_N, how)
            for score_N, target_N in zip(scores_NK.T, targets_NK.T, strict=True)
        ],
        np.float32,
    )


def _choose(score_N: np.ndarray, target_N: np.ndarray, how: str) -> float:
    positives = int(target_N.sum())
    negatives = len(target_N) - positives
    if not positives or (how == "youden" and not negatives):
        return 0.5
    score_T, true_T, false_T = ranked(score_N, target_N)
    if how == "max_f1":
        worth_T = 2 * true_T / (true_T + false_T + positives)
    elif how == "youden":
        worth_T = true_T / positives - false_T / negatives
    else:
        raise UserError(f"task.threshold must be max_f1, youden or a number, got {how!r}")
    best = int(worth_T.argmax())
    below = score_T[best + 1] if best + 1 < len(score_T) else 0.0
    return float((score_T[best] + below) / 2)


def _thresholds(
    scores_NK: np.ndarray, targets_NK: np.ndarray, threshold: str | float | np.ndarray
) -> np.ndarray:
    if isinstance(threshold, np.ndarray):
        return threshold.astype(np.float32)
    return choose_thresholds(scores_NK, targets_NK, threshold)


def thresholds_file(found: Predictions, classes: Sequence[str], how: str | float) -> bytes:
    """thresholds.json of a checkpoint: what was chosen on validation, by class name; binary: of class 1 alone."""
    assert found.thresholds is not None
    names = classes[1:] if found.kind == "binary" else classes
    chosen = dict(zip(names, found.thresholds.tolist(), strict=True))
    return (json.dumps({"chosen_by": how, "thresholds": chosen}, indent=2) + "\n").encode()


def read_thresholds(checkpoint: Path, outputs: Sequence[str]) -> np.ndarray | None:
    """The thresholds that a checkpoint keeps, float32 in the order of `outputs` (class names); None where it has none."""
    path = checkpoint / "thresholds.json"
    if not path.exists():
        return None
    chosen = json.loads(path.read_text())["thresholds"]
    return np.array([chosen[name] for name in outputs], np.float32)


# -------------------------------------------------------------------------------------------- counting
class Counts(NamedTuple):
    """Of each class: samples that were rightly given it, that were given it, that have it. int64 [K] each."""

    hit_K: np.ndarray
    guessed_K: np.ndarray
    support_K: np.ndarray

    def precision_K(self) -> np.ndarray:
        return self.hit_K / np.maximum(self.guessed_K, 1)

    def recall_K(self) -> np.ndarray:
        return self.hit_K / np.maximum(self.support_K, 1)

    def f1_K(self) -> np.ndarray:
        return 2 * self.hit_K / np.maximum(self.guessed_K + self.support_K, 1)


def count(found: Predictions, num_classes: int) -> Counts:
    if found.targets is not None:
        said_NK = found.decided()
        columns = (said_NK & found.targets, said_NK, found.targets)
        return Counts(*(c.sum(0, dtype=np.int64) for c in columns))
    hit_N = found.label[found.label == found.prediction]
    columns = (hit_N, found.prediction, found.label)
    return Counts(*(np.bincount(c, minlength=num_classes) for c in columns))


def measure(found: Predictions, num_classes: int, names: Iterable[str]) -> dict[str, float]:
    """Those of `names` (metric_names.py) that follow from predictions alone, in percent or as fractions.

    Means over classes are over those that have a sample here. top1_acc and top5_acc of a binary task are those at
    its threshold.
    """
    counts = count(found, num_classes)
    present_K = counts.support_K > 0

    def macro(values_K: np.ndarray) -> float:
        return float(values_K[present_K].mean()) if present_K.any() else math.nan

    measures = {
        "macro_f1": lambda: macro(counts.f1_K()),
        "macro_precision": lambda: macro(counts.precision_K()),
        "macro_recall": lambda: macro(counts.recall_K()),
        "balanced_acc": lambda: macro(counts.recall_K()),
        "micro_f1": lambda: (
            2 * counts.hit_K.sum() / max(counts.guessed_K.sum() + counts.support_K.sum(), 1)
        ),
        "mcc": lambda: _correlation(counts),
        "cohen_kappa": lambda: _agreement(counts),
        "calibration_error": lambda: calibration(found).error,
    }
    if found.score is not None:
        area = ranked(found.score, found.label == 1)
        measures |= {
            "top1_acc": lambda: counts.hit_K.sum() / len(found.id),
            "top5_acc": lambda: counts.hit_K.sum() / len(found.id),
            "f1": lambda: counts.f1_K()[1],
            "precision": lambda: counts.precision_K()[1],
            "recall": lambda: counts.recall_K()[1],
            "specificity": lambda: counts.recall_K()[0],
            "auc": lambda: area_under_roc(area),
            "average_precision": lambda: average_precision(area),
        }
    if found.targets is not None:
        measures |= {
            "exact_match": lambda: (found.decided() == found.targets).all(1).mean(),
            "auc": lambda: _mean_over_classes(found, area_under_roc),
            "average_precision": lambda: _mean_over_classes(found, average_precision),
        }
    from potstill.metric_names import is_percent

    wanted = [name for name in names if name in measures]
    return {n: (100.0 if is_percent(n) else 1.0) * float(measures[n]()) for n in wanted}


def _mean_over_classes(found: Predictions, of: Any) -> float:
    values = [v for v in map(of, _ranked_classes(found)) if math.isfinite(v)]
    return sum(values) / len(values) if values else math.nan


def _ranked_classes(found: Predictions) -> Iterable[Ranked]:
    assert found.scores is not None
    assert found.targets is not None
    for score_N, target_N in zip(found.scores.T, found.targets.T, strict=True):
        yield ranked(score_N.astype(np.float32), target_N)


def _correlation(counts: Counts) -> float:
    """Matthews correlation of several classes: Gorodkin 2004, Comput. Biol. Chem. 28:367. 0 where it is undefined."""
    guessed, support = counts.guessed_K.astype(float), counts.support_K.astype(float)
    total = support.sum()
    spread = math.sqrt((total**2 - (guessed**2).sum()) * (total**2 - (support**2).sum()))
    above = counts.hit_K.sum() * total - (guessed * support).sum()
    return above / spread if spread else 0.0


def _agreement(counts: Counts) -> float:
    """Cohen 1960, Educ. Psychol. Meas. 20:37. 0 where chance alone explains everything."""
    total = float(counts.support_K.sum())
    seen = counts.hit_K.sum() / total
    by_chance = (counts.guessed_K.astype(float) * counts.support_K).sum() / total**2
    return float((seen - by_chance) / (1 - by_chance)) if by_chance < 1 else 0.0


def per_class(found: Predictions, classes: Sequence[str]) -> list[dict[str, Any]]:
    """A row for each class, worst F1 first: precision, recall and F1 in percent (0 where undefined), and support.

    multi_label: also its threshold, and its average precision (a fraction; None without a positive sample).
    """
    counts = count(found, len(classes))
    columns = {
        "precision": 100 * counts.precision_K(),
        "recall": 100 * counts.recall_K(),
        "f1": 100 * counts.f1_K(),
        "support": counts.support_K,
    }
    rows = [
        {"class": name, **dict(zip(columns, values, strict=True))}
        for name, *values in zip(classes, *(c.tolist() for c in columns.values()), strict=True)
    ]
    if found.targets is not None:
        assert found.thresholds is not None
        for row, threshold, area in zip(
            rows, found.thresholds.tolist(), _ranked_classes(found), strict=True
        ):
            precision = average_precision(area)
            row["average_precision"] = precision if math.isfinite(precision) else None
            row["threshold"] = threshold
    return sorted(rows, key=lambda row: (row["f1"], row["class"]))


def confusion_counts(found: Predictions, num_classes: int) -> csr_array:
    """Sparse int64 [K, K]: row = true class, column = predicted class. Dense, 7,000 classes would take 400 MB."""
    from scipy.sparse import csr_array

    pairs, counts = np.unique(
        found.label.astype(np.int64) * num_classes + found.prediction, return_counts=True
    )
    return csr_array((counts, np.divmod(pairs, num_classes)), shape=(num_classes, num_classes))


def most_confused(counts: csr_array, top: int) -> list[tuple[int, int, int]]:
    """The `top` largest entries off the diagonal, as (true class, predicted class, count), largest first."""
    entries = counts.tocoo()
    row, column, number = map(np.asarray, (entries.row, entries.col, entries.data))
    off = row != column
    row, column, number = row[off], column[off], number[off]
    order = np.lexsort((column, row, np.negative(number)))[:top]
    return list(
        zip(row[order].tolist(), column[order].tolist(), number[order].tolist(), strict=True)
    )


# ----------------------------------------------------------------------------------------- calibration
@dataclass(frozen=True)
class Calibration:
    """How often what is said with a confidence is so, by bins of confidence of equal width."""

    count: np.ndarray
    """int64 [bins]"""
    confidence: np.ndarray
    """Mean of the bin, float64 [bins]; not a number where it is empty."""
    frequency: np.ndarray
    """How often it was so, float64 [bins]; not a number where it is empty."""

    @property
    def error(self) -> float:
        """Expected calibration error, a fraction. Guo et al. 2017, arXiv:1706.04599."""
        gap = np.nan_to_num(np.abs(self.frequency - self.confidence))
        return float((gap * self.count).sum() / max(self.count.sum(), 1))

    def rows(self) -> list[dict[str, Any]]:
        """The bins that hold something."""
        edges = np.linspace(0, 1, len(self.count) + 1)
        return [
            {
                "from": float(edges[at]),
                "to": float(edges[at + 1]),
                "count": int(self.count[at]),
                "confidence": float(self.confidence[at]),
                "frequency": float(self.frequency[at]),
            }
            for at in np.flatnonzero(self.count)
        ]


def calibration(found: Predictions, bins: int = CALIBRATION_BINS) -> Calibration:
    """single_label: of the predicted class. binary: of class 1. multi_label: of every class of every sample."""
    if found.scores is not None and found.targets is not None:
        said, true = found.scores.astype(np.float32).ravel(), found.targets.ravel()
    elif found.score is not None:
        said, true = found.score, found.label == 1
    else:
        said, true = found.confidence, found.label == found.prediction
    place = np.clip(np.nan_to_num(said) * bins, 0, bins - 1).astype(np.int64)
    number = np.bincount(place, minlength=bins)
    with np.errstate(invalid="ignore"):  # an empty bin has no mean
        confidence = np.bincount(place, said, minlength=bins) / number
        frequency = np.bincount(place, true, minlength=bins) / number
    return Calibration(number, confidence, frequency)
