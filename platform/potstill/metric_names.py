"""What can be measured, by name: enough to check a config and to print a number without waiting for torch.

metrics.py and predictions.py measure them. `scale` says how a number is given: 100 for percent, 1 for a fraction.
Means over classes leave out the classes that a split has no sample of.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from potstill.errors import UserError

_ALL = ("single_label", "multi_label", "binary")
_ONE_CLASS_EACH = ("single_label", "binary")


@dataclass(frozen=True)
class About:
    title: str
    meaning: str
    kinds: tuple[str, ...] = _ALL
    scale: int = 100
    higher_is_better: bool = True


ALWAYS: dict[str, About] = {
    "top1_acc": About("Top-1 accuracy", "Share of samples whose best-scored class is true."),
    "top5_acc": About("Top-5 accuracy", "Share of samples with a true class among the best five."),
    "macro_f1": About("Macro-F1", "Mean F1 of the classes."),
}
METRICS: dict[str, About] = {
    "balanced_acc": About("Balanced accuracy", "Mean recall of the classes.", _ONE_CLASS_EACH),
    "macro_f1": ALWAYS["macro_f1"],
    "micro_f1": About("Micro-F1", "F1 over all decisions.", ("multi_label",)),
    "macro_precision": About("Macro precision", "Mean precision of the classes."),
    "macro_recall": About("Macro recall", "Mean recall of the classes."),
    "f1": About("F1", "F1 of the positive class.", ("binary",)),
    "precision": About("Precision", "Precision of the positive class.", ("binary",)),
    "recall": About("Recall", "Recall of the positive class (sensitivity).", ("binary",)),
    "specificity": About("Specificity", "Recall of the negative class.", ("binary",)),
    "exact_match": About(
        "Exact match", "Share of samples with every class right.", ("multi_label",)
    ),
    "auc": About(
        "AUC", "Area under the ROC curve; of several classes the mean, one against the rest.",
        scale=1,
    ),
    "average_precision": About(
        "Average precision", "Area under the precision-recall curve; of several classes the mean.",
        scale=1,
    ),
    "calibration_error": About(
        "Calibration error", "Expected calibration error in 15 bins. arXiv:1706.04599",
        scale=1, higher_is_better=False,
    ),
    "brier": About(
        "Brier score", "Squared error of the probabilities: summed over the classes of single_label, else their mean.",
        scale=1, higher_is_better=False,
    ),
    "mcc": About("Matthews correlation", "Matthews correlation coefficient.", _ONE_CLASS_EACH, 1),
    "cohen_kappa": About("Cohen's kappa", "Agreement beyond chance.", _ONE_CLASS_EACH, 1),
}  # fmt: skip


def check(kind: str, names: Sequence[str], key: str = "task.metrics") -> None:
    """Raises UserError for a name that is unknown, or not for this kind of task. `key` names them, for the error."""
    fit = [name for name, about in METRICS.items() if kind in about.kinds]
    for name in names:
        if name not in fit:
            near = difflib.get_close_matches(name, fit, n=1)
            remedy = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{key} must be of {', '.join(fit)} for task.kind={kind}, got {name!r}{remedy}"
            )


def monitors(kind: str, names: Sequence[str]) -> list[str]:
    """What loop.monitor may be."""
    measured = dict.fromkeys((*ALWAYS, *names))
    return ["train_loss", "val_loss", *(f"val_{name}" for name in measured)]


def plain(key: str) -> str:
    """`val_auc`, `train_auc` -> `auc`."""
    return key.removeprefix("val_").removeprefix("train_")


def _about(key: str) -> About | None:
    return ALWAYS.get(plain(key)) or METRICS.get(plain(key))


def higher_is_better(monitor: str) -> bool:
    """Whether a monitored value (`val_loss`, `val_auc`) should rise."""
    about = _about(monitor)
    return about.higher_is_better if about else not monitor.endswith("loss")


def is_percent(key: str) -> bool:
    """Whether `val_…` is given in percent; a loss or an area is not."""
    about = _about(key)
    return about.scale == 100 if about else key.endswith("_acc")


def title(key: str, kind: str = "single_label", top_k: int = 5) -> str:
    """What a reader calls it. Among several true classes, top-k is Hit@k: arXiv:1609.08675."""
    name = plain(key)
    if name in ("top1_acc", "top5_acc"):
        k = 1 if name == "top1_acc" else top_k
        return f"Hit@{k}" if kind == "multi_label" else f"Top-{k} accuracy"
    about = _about(name)
    return about.title if about else name.replace("_", " ").capitalize()


def shown(key: str, value: float, space: str = "") -> str:
    """`93.10%` or `0.9310`, by what it is. `space` stands before the percent sign."""
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return f"{value:.2f}{space}%" if is_percent(key) else f"{value:.4f}"


def further(keys: Iterable[str]) -> list[str]:
    """The validation metrics among an epoch record's keys that were chosen: those that not every run has."""
    return [
        k for k in keys if k.startswith("val_") and plain(k) in METRICS and plain(k) not in ALWAYS
    ]


def table() -> str:
    """Every metric as a Markdown table: name, meaning, kinds of task, unit."""
    lines = ["| name | meaning | task.kind | unit |", "|---|---|---|---|"]
    for name, about in METRICS.items():
        kinds = "all" if about.kinds == _ALL else ", ".join(about.kinds)
        unit = "percent" if about.scale == 100 else "fraction"
        better = "" if about.higher_is_better else "; lower is better"
        lines.append(f"| `{name}` | {about.meaning} | {kinds} | {unit}{better} |")
    return "\n".join(lines) + "\n"
