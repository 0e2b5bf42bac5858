"""Weights of loss terms that move: by the clock, or when a validation metric allows.

`weight: 0.5` stays. A mapping with `schedule` moves; `value` of an epoch (a float: 2.5 is the middle of the third,
counted from the start of the stage) is

linear, cosine   {schedule: linear, from: 0, to: 1, start_epoch: 0, end_epoch: null (the stage's end)}
steps            {schedule: steps, values: [0, 0.5, 1], milestones: [5, 10]}
guarded          {schedule: guarded, levels: [0.01, 0.05, 0.1, 0.5], metric: val_auc, reach: 0.7, patience: 2,
                  collapse: 0.1}: the next level is taken when the metric has reached `reach` or has not improved
                  for `patience` epochs; where it then falls by `collapse` below what it was when the level was
                  taken, the level before is restored, with the weights of that moment, and kept
complement       {schedule: complement, of: <term>}: one minus the weight of another term
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from potstill.errors import UserError
from potstill.metric_names import higher_is_better

KEYS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "linear": (("from", "to"), ("start_epoch", "end_epoch")),
    "cosine": (("from", "to"), ("start_epoch", "end_epoch")),
    "steps": (("values", "milestones"), ()),
    "guarded": (("levels", "metric", "collapse"), ("reach", "patience")),
    "complement": (("of",), ()),
}
"""Of each schedule: the keys that it needs, and those that it may have."""


@dataclass(frozen=True)
class Event:
    """A guarded weight's change of level. `restored`: the model went back to what it was when this level was left."""

    term: str
    level: int
    weight: float
    restored: bool
    why: str


@dataclass
class Guard:
    """Where a guarded weight stands; what it does is decided once an epoch, by `after_epoch`.

    `ceiling`: the highest level that may still be taken; one that has collapsed is not tried again. `entered`: what the
    metric was when each level above the first was taken.
    """

    term: str
    levels: list[float]
    metric: str
    collapse: float
    reach: float | None = None
    patience: int | None = None
    level: int = 0
    ceiling: int = field(default=-1)
    entered: list[float] = field(default_factory=list)
    best: float = math.nan
    bad_epochs: int = 0

    def __post_init__(self) -> None:
        if self.ceiling < 0:
            self.ceiling = len(self.levels) - 1

    @property
    def weight(self) -> float:
        return self.levels[self.level]

    def after_epoch(self, value: float) -> Event | None:
        """Tell the metric of an epoch. Returns the change of level that follows, if one does.

        NaN (the metric has no value, or the training broke down) is a collapse, once a level was taken.
        """
        up = 1 if higher_is_better(self.metric) else -1
        if self.level and not up * value > up * self.entered[-1] - self.collapse:
            moved = "fell" if up > 0 else "rose"
            return self.fall_back(
                f"{self.metric} {moved} from {self.entered[-1]:.4f} to {value:.4f}, by {self.collapse:g} or more"
            )
        better = math.isnan(self.best) or up * value > up * self.best
        if not math.isnan(value):
            self.best, self.bad_epochs = (value, 0) if better else (self.best, self.bad_epochs + 1)
        if self.level == self.ceiling or math.isnan(value):
            return None
        why = ""
        if self.reach is not None and up * value >= up * self.reach:
            why = f"{self.metric} has reached {self.reach:g}"
        elif self.patience is not None and self.bad_epochs >= self.patience:
            why = f"{self.metric} has not improved for {self.bad_epochs} epochs"
        if not why:
            return None
        self.level += 1
        self.entered.append(value)
        self.best, self.bad_epochs = value, 0
        return Event(self.term, self.level, self.weight, False, f"{why} ({value:.4f})")

    def go_on_from(self, before: Guard) -> bool:
        """Take over where the guard of an earlier stage stands, if it is of the same term, metric and levels."""
        same = ("term", "metric", "levels")
        if any(getattr(self, key) != getattr(before, key) for key in same):
            return False
        for key in ("level", "ceiling", "entered", "best", "bad_epochs"):
            setattr(self, key, getattr(before, key))
        return True

    def fall_back(self, why: str) -> Event:
        """Give the present level up for good."""
        assert self.level > 0
        self.level -= 1
        self.ceiling = self.level
        self.best, self.bad_epochs = self.entered.pop(), 0
        return Event(self.term, self.level, self.weight, True, why)


class Weight:
    """One term's weight as the config gives it: a number, or a mapping with `schedule`.

    `key` is its place in the config, for errors. Raises UserError for what no schedule takes.
    """

    def __init__(self, key: str, spec: Any, epochs: int = 1) -> None:
        self.key, self.epochs = key, epochs
        self.guard: Guard | None = None
        self.spec: dict[str, Any]
        if not isinstance(spec, Mapping):
            self.schedule, self.spec = "constant", {"value": float(spec)}
            return
        self.spec = {k: v for k, v in spec.items() if k != "schedule"}
        self.schedule = spec.get("schedule")
        _check(key, self.schedule, self.spec)
        if self.schedule == "guarded":
            self.guard = Guard(term=key.split(".")[-2], **self.spec)

    @property
    def of(self) -> str | None:
        """The term that this weight is the complement of."""
        return self.spec["of"] if self.schedule == "complement" else None

    def at(self, epoch: float, others: Mapping[str, Weight]) -> float:
        """The weight at an epoch since the start of the stage. `others`: the weights of all terms, by name."""
        spec = self.spec
        match self.schedule:
            case "constant":
                return spec["value"]
            case "linear" | "cosine":
                start = spec.get("start_epoch") or 0.0
                end = spec.get("end_epoch") or self.epochs
                done = min(max((epoch - start) / max(end - start, 1e-9), 0.0), 1.0)
                share = done if self.schedule == "linear" else 0.5 * (1 - math.cos(math.pi * done))
                return spec["from"] + (spec["to"] - spec["from"]) * share
            case "steps":
                return spec["values"][sum(epoch >= m for m in spec["milestones"])]
            case "guarded":
                assert self.guard is not None
                return self.guard.weight
            case "complement":
                return 1.0 - others[spec["of"]].at(epoch, others)
        raise AssertionError(self.schedule)


def _check(key: str, schedule: Any, spec: Mapping[str, Any]) -> None:
    if not isinstance(schedule, str) or schedule not in KEYS:
        raise UserError(
            f"{key}.schedule must be one of {', '.join(KEYS)}, got {schedule!r}; a weight that stays is a number"
        )
    needed, further = KEYS[schedule]
    for name in map(str, spec):
        if name not in (*needed, *further):
            near = difflib.get_close_matches(name, (*needed, *further), n=1)
            remedy = (
                f"did you mean {near[0]}?" if near else f"it takes {', '.join((*needed, *further))}"
            )
            raise UserError(f"{key}.{name} is not a key of schedule={schedule}; {remedy}")
    for name in needed:
        if spec.get(name) is None:
            raise UserError(f"{key}.{name} must be given with schedule={schedule}, got null")
    match schedule:
        case "complement":
            _refuse_unless(
                isinstance(spec["of"], str), f"{key}.of", "the name of a term", spec["of"]
            )
        case "linear" | "cosine":
            for name in ("from", "to"):
                _refuse_unless(_is_weight(spec[name]), f"{key}.{name}", "a number >= 0", spec[name])
            start, end = spec.get("start_epoch") or 0, spec.get("end_epoch")
            good = _is_weight(start) and (end is None or (_is_weight(end) and end > start))
            _refuse_unless(good, f"{key}.end_epoch", f"null or > start_epoch ({start})", end)
        case "steps":
            values, milestones = spec["values"], spec["milestones"]
            _refuse_unless(_are_weights(values), f"{key}.values", "numbers >= 0", values)
            good = _are_weights(milestones) and all(
                b > a for a, b in itertools.pairwise(milestones)
            )
            _refuse_unless(
                good, f"{key}.milestones", "epochs, each later than the one before", milestones
            )
            _refuse_unless(
                len(values) == len(milestones) + 1,
                f"{key}.values", f"one more than milestones ({len(milestones)})", len(values),
            )  # fmt: skip
        case "guarded":
            levels, reach, patience = spec["levels"], spec.get("reach"), spec.get("patience")
            good = _are_weights(levels) and len(levels) > 1
            _refuse_unless(good, f"{key}.levels", "at least two numbers >= 0", levels)
            metric = str(spec["metric"])
            good = metric.startswith("val_") and isinstance(spec["metric"], str)
            _refuse_unless(good, f"{key}.metric", "a metric of validation, such as val_auc", metric)
            _refuse_unless(
                _is_weight(spec["collapse"]) and spec["collapse"] > 0,
                f"{key}.collapse",
                "> 0",
                spec["collapse"],
            )
            rising = good and all(b > a for a, b in itertools.pairwise(levels))
            _refuse_unless(rising, f"{key}.levels", "each larger than the one before", levels)
            number = isinstance(reach, int | float) and not isinstance(reach, bool)
            good = reach is None or (number and math.isfinite(reach))
            _refuse_unless(good, f"{key}.reach", "null or a number", reach)
            good = reach is not None or patience is not None
            _refuse_unless(
                good,
                f"{key}.reach",
                "given where patience is null, or no level is ever taken",
                reach,
            )
            whole = isinstance(patience, int) and not isinstance(patience, bool)
            good = patience is None or (whole and patience >= 1)
            _refuse_unless(good, f"{key}.patience", "null or an integer >= 1", patience)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf


def _are_weights(values: Any) -> bool:
    return isinstance(values, list) and bool(values) and all(map(_is_weight, values))


def _refuse_unless(good: bool, key: str, rule: str, value: Any) -> None:
    if not good:
        raise UserError(f"{key} must be {rule}, got {value!r}")


def check_weights(
    terms: Mapping[str, Mapping[str, Any]], monitors: list[str], key: str = "task.terms"
) -> None:
    """Refuse weights that no schedule takes, complements of what is not there or would be below 0, and metrics that
    are not measured. Raises UserError."""
    weights = {n: Weight(f"{key}.{n}.weight", t.get("weight", 1.0)) for n, t in terms.items()}
    guarded = [n for n, w in weights.items() if w.guard]
    if len(guarded) > 1:
        raise UserError(
            f"{key}: one weight at most may be guarded, got {', '.join(guarded)}; give one of them another schedule"
        )
    for name, weight in weights.items():
        if weight.guard and weight.guard.metric not in monitors:
            raise UserError(
                f"{key}.{name}.weight.metric must be one of {', '.join(monitors)}, got {weight.guard.metric!r}; a metric of "
                "task.metrics is val_<name>"
            )
        if (of := weight.of) is None:
            continue
        if of not in weights or weights[of].of is not None:
            others = [n for n, w in weights.items() if n != name and w.of is None]
            raise UserError(
                f"{key}.{name}.weight.of must be a term whose weight is not a complement itself ({', '.join(others)}), got {of!r}"
            )
        spec = weights[of].spec
        most = max(
            [
                spec.get("value", 0),
                spec.get("from", 0),
                spec.get("to", 0),
                *spec.get("values", []),
                *spec.get("levels", []),
            ]
        )
        if most > 1:
            raise UserError(
                f"{key}.{of}.weight must be <= 1, because {name} has the rest, got {most:g}"
            )
