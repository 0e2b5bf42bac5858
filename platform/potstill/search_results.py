"""What a search found: who is best, and what it was that made the difference. From finished data, without Ray.

The drawings show eligible trials that have a finite value of every objective; a setting is called by the last parts
of its name. What stands in a picture is worked out once (`_Panel`, `_Axis`, `_Importance`) and drawn twice, by
matplotlib and as plotly's JSON. That JSON is written by hand: Aim's viewer cannot read the packed arrays that
plotly's own objects turn into.
"""

from __future__ import annotations

import csv
import html
import io
import json
import math
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import metric_names, runs
from potstill.console import duration
from potstill.report import COLOURS, CSS, GRID, INK, MUTED, head, new_figure, png, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ENDED_WITH_A_VALUE = ("completed", "stopped early")
MIN_TRIALS_FOR_IMPORTANCE = 4
FEW_TRIALS = 25  # below it, what importance says of one setting of several is often chance
MAX_CATEGORIES = 10  # of a setting, in importance
MAX_TICKS = 24
MAX_BARS = 30
OTHERS = "#9aa5b1"
FROM_WORST_TO_BEST = ("#d5dde6", "#7ba7d4", "#0b3d78")
NOTHING_YET = "No trial has ended with a value yet"

Plotly = dict[str, Any]


@dataclass(frozen=True)
class Objective:
    """`name`: a metric of the journal, such as val_top1_acc, or a measure of the model (see `MEASURES`)."""

    name: str
    higher_is_better: bool


@dataclass
class TrialResult:
    """`state`: completed | stopped early | failed | running | waiting. `why`: of a failure, or of the stop.

    `point`: the value of each variable that was active, as JSON has them. `values`: objectives and measures, None or
    NaN where there is none. `feasible`: keeps to search.constraints.
    """

    number: int
    name: str
    state: str
    point: dict[str, Any]
    values: dict[str, float | None]
    epochs: int
    seconds: float
    why: str = ""
    feasible: bool = True


# ---------------------------------------------------------------------------------------------- names
@dataclass(frozen=True)
class _Measure:
    title: str
    unit: str = ""  # of the axis
    compact: bool = False  # large whole numbers: 1.3M


MEASURES = {
    "parameters": _Measure("Parameters", compact=True),
    "macs": _Measure("Multiply-adds", "an image", compact=True),
    "latency_ms": _Measure("Latency", "ms, batch of 1"),
    "latency_ms_batch": _Measure("Latency of a batch", "ms"),
    "file_mb": _Measure("Model file", "MB"),
}


def _measure(key: str) -> _Measure | None:
    """What is known of a measure; None for a metric of the journal."""
    return MEASURES.get(key)


def _title(key: str) -> str:
    """`Top-1 accuracy`, `Latency`."""
    measure = _measure(key)
    return measure.title if measure else metric_names.title(key)


def _title_and_unit(key: str) -> str:
    """`Top-1 accuracy (validation)`, `Latency (ms, batch of 1)`."""
    if measure := _measure(key):
        return f"{measure.title} ({measure.unit})" if measure.unit else measure.title
    subset = {"val": "validation", "train": "training"}.get(key.split("_")[0])
    return f"{_title(key)} ({subset})" if subset else _title(key)


def _in_a_sentence(key: str) -> str:
    title = _title(key)
    return title if title[:2].isupper() else title[:1].lower() + title[1:]


def _shown(key: str, value: float) -> str:
    """A value with its unit: `93.10 %`, `12.3 ms`, `1,297`."""
    measure = _measure(key)
    if measure is None or not math.isfinite(value):
        return metric_names.shown(key, value, space=" ")
    if measure.compact:
        return f"{value:,.0f}"
    return f"{value:.3g} {measure.unit.split(',')[0]}"


def _tick(key: str, value: float) -> str:
    """A value at an axis, whose title has the unit."""
    measure = _measure(key)
    if measure and measure.compact:
        return _compact(value)
    return f"{round(value, 3):g} %" if metric_names.is_percent(key) else f"{value:.5g}"


def _compact(value: float) -> str:
    for scale, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.4g}{letter}"
    return f"{value:.4g}"


def short_names(names: Sequence[str]) -> dict[str, str]:
    """Each dotted name's last two parts, or as many as tell it from the others."""

    def tail(name: str, parts: int) -> str:
        return ".".join(name.split(".")[-parts:])

    short = {}
    for name in names:
        length = name.count(".") + 1
        parts = 2
        while parts < length and any(o != name and tail(o, parts) == tail(name, parts) for o in names):  # fmt: skip
            parts += 1
        short[name] = tail(name, parts)
    return short


def _shorten(text: str, longest: int) -> str:
    """On one line, the middle left out where it is long: what tells settings apart may stand at the end."""
    text = " ".join(text.split())
    if len(text) <= longest:
        return text
    front = (longest - 1) * 2 // 3
    return f"{text[:front]}…{text[front + 1 - longest :]}"


def _distinct(texts: Sequence[str], longest: int) -> list[str]:
    """The texts shortened; what would look the same is numbered."""
    short = [_shorten(text, longest) for text in texts]
    often, seen = Counter(short), Counter()
    for at, text in enumerate(short):
        seen[text] += 1
        if often[text] > 1:
            short[at] = f"{text} ({seen[text]})"
    return short


def _plain_text(text: str) -> str:
    """For matplotlib, which reads $...$ as mathematics."""
    return text.replace("$", r"\$")


def _setting(value: Any) -> str:
    """A setting as a reader writes it: text as it is, the rest as JSON."""
    return value if isinstance(value, str) else _json(value)


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), ensure_ascii=False)


# ------------------------------------------------------------------------------------------- selection
def eligible(trials: Sequence[TrialResult]) -> list[TrialResult]:
    """Those that may win: completed or stopped early, and feasible.

    What was stopped early has a true value too, that of its best epoch.
    """
    return [t for t in trials if t.state in ENDED_WITH_A_VALUE and t.feasible]


def _value(trial: TrialResult, key: str) -> float | None:
    """The finite value, or None."""
    value = trial.values.get(key)
    return value if value is not None and math.isfinite(value) else None


def _known(trial: TrialResult, key: str) -> float:
    """The value of a trial that is known to have it."""
    value = _value(trial, key)
    assert value is not None
    return float(value)


def _scored(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[TrialResult]:
    """The eligible ones with a finite value of every objective."""
    return [t for t in eligible(trials) if all(_value(t, o.name) is not None for o in objectives)]


def _losses(trial: TrialResult, objectives: Sequence[Objective]) -> tuple[float, ...]:
    """The objectives of a scored trial, turned so that less is better."""
    return tuple(
        -_known(trial, o.name) if o.higher_is_better else _known(trial, o.name) for o in objectives
    )


def pareto(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[TrialResult]:
    """The eligible trials that no other one beats or equals in everything, the best by the first objective first.

    Of trials that are equal in all objectives, the one with the smallest number.
    """
    order = sorted(
        ((_losses(t, objectives), t.number, t) for t in _scored(trials, objectives)),
        key=lambda entry: entry[:2],
    )
    # in this order nobody is beaten by one that comes later
    front: list[tuple[tuple[float, ...], TrialResult]] = []
    for losses, _, trial in order:
        if not any(all(a <= b for a, b in zip(f, losses, strict=True)) for f, _ in front):
            front.append((losses, trial))
    return [trial for _, trial in front]


def ranked(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[TrialResult]:
    """All trials, best first: the Pareto front, then the front of what is left, and so on; each as `pareto` sorts it.

    Trials that equal one of a front follow that front. Ineligible ones and those without a value come last, by number.
    """
    left = _scored(trials, objectives)
    order: list[TrialResult] = []
    while left:
        front = pareto(left, objectives)
        kept = {id(t) for t in front}
        of_front = {_losses(t, objectives) for t in front}
        equals = [t for t in left if _losses(t, objectives) in of_front and id(t) not in kept]
        order += front + sorted(equals, key=lambda t: (_losses(t, objectives), t.number))
        left = [t for t in left if _losses(t, objectives) not in of_front]
    known = {id(t) for t in order}
    return order + sorted((t for t in trials if id(t) not in known), key=lambda t: t.number)


def best_of(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> TrialResult | None:
    """The first of `pareto`: the best by the first objective; None where no trial has every objective."""
    front = pareto(trials, objectives)
    return front[0] if front else None


# --------------------------------------------------------------------------------------------- writing
def write_leaderboard(
    folder: Path, trials: Sequence[TrialResult], objectives: Sequence[Objective]
) -> None:
    """Write leaderboard.csv, atomically, within milliseconds."""
    runs.atomic_write(folder / "leaderboard.csv", _leaderboard(trials, objectives))


def write_pictures(
    folder: Path, trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> None:
    """Write figures.json, pareto.{png,html} and plots/{importance,parallel}.png, each atomically, within seconds.

    `title`: of the search, on every picture. Fit for every moment of a search, before the first trial's end too.
    """
    importance = _importance_of(trials, objectives)
    drawn = _figures(trials, objectives, title, importance)
    runs.write_json(folder / "figures.json", drawn)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a class may be named in any script
        pictures = {
            "pareto.png": _pareto_figure(trials, objectives, title),
            "plots/importance.png": _importance_figure(importance, title),
            "plots/parallel.png": _parallel_figure(trials, objectives, title),
        }
        for name, figure in pictures.items():
            runs.atomic_write(folder / name, png(figure))
    runs.atomic_write(folder / "pareto.html", _page(trials, objectives, title, drawn))


def figures(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> dict[str, Plotly]:
    """Plotly's JSON, {"data": [...], "layout": {...}}, under "pareto", "importance" and "parallel"."""
    return _figures(trials, objectives, title, _importance_of(trials, objectives))


def _figures(
    trials: Sequence[TrialResult],
    objectives: Sequence[Objective],
    title: str,
    importance: _Importance,
) -> dict[str, Plotly]:
    return {
        "pareto": _pareto_plotly(trials, objectives, title),
        "importance": _importance_plotly(importance, title),
        "parallel": _parallel_plotly(trials, objectives, title),
    }


def _leaderboard(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> str:
    """The table as CSV, best first; without a rank where a trial is not eligible or lacks a value.

    A setting is written so that it can be told apart: text as it is unless JSON would read it as something else,
    the rest as JSON, and an empty cell where the variable was not active.
    """
    keys = [
        *dict.fromkeys([*(o.name for o in objectives), *(key for t in trials for key in t.values)])
    ]
    names = list(dict.fromkeys(name for t in trials for name in t.point))
    fixed = ["rank", "name", "state", "pareto", "feasible", *keys, "epochs", "seconds", "why"]
    columns = [f"{name} (setting)" if name in fixed else name for name in names]
    front = {id(t) for t in pareto(trials, objectives)}
    scored = {id(t) for t in _scored(trials, objectives)}
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow([*fixed[:-1], *columns, "why"])
    for rank, trial in enumerate(ranked(trials, objectives), 1):
        values = [trial.values.get(key) for key in keys]
        rows.writerow([
            rank if id(trial) in scored else "",
            trial.name,
            trial.state,
            "yes" if id(trial) in front else "no",
            "yes" if trial.feasible else "no",
            *("" if v is None or math.isnan(v) else v for v in values),
            trial.epochs,
            trial.seconds,
            *(_cell(trial.point[name]) if name in trial.point else "" for name in names),
            trial.why,
        ])  # fmt: skip
    return out.getvalue()


def _cell(value: Any) -> str:
    if isinstance(value, str) and value:
        try:
            json.loads(value)
        except ValueError:
            return value
    return _json(value)


# ----------------------------------------------------------------------------------------------- words
def _counts(trials: Sequence[TrialResult]) -> str:
    """`41 trials: 34 completed, 7 failed; 2 of them break a constraint`."""
    if not trials:
        return "no trials yet"
    states = Counter(t.state for t in trials)
    parts = ", ".join(f"{number} {state}" for state, number in states.most_common())
    text = f"{_trials(len(trials))}: {parts}"
    broken = sum(not t.feasible for t in trials)
    verb = "breaks" if broken == 1 else "break"
    return f"{text}; {broken} of them {verb} a constraint" if broken else text


def _trials(number: int) -> str:
    return "1 trial" if number == 1 else f"{number} trials"


def _direction(objective: Objective) -> str:
    return "more is better" if objective.higher_is_better else "less is better"


def _hover(trial: TrialResult, objectives: Sequence[Objective]) -> str:
    """A trial for plotly, which reads a little HTML."""
    keys = dict.fromkeys([*(o.name for o in objectives), *trial.values])
    lines = [f"<b>{_for_plotly(trial.name, 60)}</b>, {_for_plotly(trial.state, 40)}"]
    lines += [
        f"{_for_plotly(_title_and_unit(key), 60)}: {_shown(key, value)}"
        for key in keys
        if (value := _value(trial, key)) is not None
    ]
    lines.append(f"{trial.epochs} epochs, {duration(trial.seconds)}")
    lines += [
        f"<i>{_for_plotly(name, 60)}</i> = {_for_plotly(f'{value:.6g}' if isinstance(value, float) else _setting(value), 60)}"
        for name, value in trial.point.items()
    ]
    return "<br>".join(lines)


def _for_plotly(text: str, longest: int) -> str:
    return html.escape(_shorten(text, longest), quote=False)


# ------------------------------------------------------------------------------------------------ axes
@dataclass
class _Axis:
    """Where each trial stands on an axis, and what is written along it: linear, a logarithm, or places in a row."""

    label: str
    at: list[float]
    ticks: list[tuple[float, str]]
    low: float
    high: float
    note: str = ""


def _spans(values: Sequence[float], decades: float) -> bool:
    return bool(values) and min(values) > 0 and max(values) / min(values) > 10**decades


def _is_log(key: str, values: Sequence[float]) -> bool:
    """A cost over more than a decade; a loss where some trial went wild."""
    return _spans(values, 1.0 if _measure(key) else 1.5) and (
        _measure(key) is not None or key.endswith("loss")
    )


def _log_ticks(low: float, high: float) -> list[float]:
    """Round numbers between two positive ones."""
    decades = math.log10(high / low)
    steps = (1, 2, 5) if decades <= 2 else (1, 3) if decades <= 3.5 else (1,)
    every = max(1, round(decades / 6))
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    ticks = [float(f"{s}e{p}") for p in powers if p % every == 0 or len(steps) > 1 for s in steps]
    ticks = [tick for tick in ticks if low * 0.98 <= tick <= high * 1.02]
    return ticks if len(ticks) > 1 else [low, high]


def _number_axis(
    label: str, values: Sequence[float | None], log: bool, text: Callable[[float], str]
) -> _Axis:
    """None is left for the caller to place (NaN)."""
    from matplotlib.ticker import MaxNLocator

    known = sorted({v for v in values if v is not None})
    low, high = known[0], known[-1]
    if low == high or len(known) <= 5:
        ticks = [float(v) for v in known]
    elif log:
        ticks = _log_ticks(low, high)
    else:
        ticks = [float(v) for v in MaxNLocator(6).tick_values(low, high) if low <= v <= high]
    place: Callable[[float], float] = math.log10 if log else float
    low, high = place(low), place(high)
    if low == high:
        low, high = low - 0.5, high + 0.5
    far_apart: list[tuple[float, str]] = []
    for tick in ticks:  # few values are written as they are, but not over one another
        if not far_apart or place(tick) - far_apart[-1][0] > 0.03 * (high - low):
            far_apart.append((place(tick), text(tick)))
    at = [math.nan if v is None else place(v) for v in values]
    return _Axis(label, at, far_apart, low, high, "log" if log else "")


def _value_axis(key: str, trials: Sequence[TrialResult]) -> _Axis:
    values = [_value(t, key) for t in trials]
    log = _is_log(key, [v for v in values if v is not None])
    return _number_axis(_title_and_unit(key), values, log, lambda value: _tick(key, value))


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


@dataclass
class _Variable:
    """A variable of the space over some trials. Of a numeric one `numbers` has None where there is no number;
    `texts` says what there is, "not set" where the variable was not active."""

    name: str
    texts: list[str]
    numbers: list[float | None] | None
    log: bool


def _variables(trials: Sequence[TrialResult]) -> list[_Variable]:
    """A variable is numeric if all its values are numbers, or null: a numeric one is logarithmic if it spans more
    than 1.5 decades above 0."""
    found = []
    for name in dict.fromkeys(name for t in trials for name in t.point):
        values = [t.point.get(name) for t in trials]
        texts = [_setting(t.point[name]) if name in t.point else "not set" for t in trials]
        known = [v for v in values if v is not None]
        if known and all(map(_is_number, known)):
            numbers = [float(v) if v is not None else None for v in values]
            found.append(_Variable(name, texts, numbers, _spans(known, 1.5)))
        else:
            found.append(_Variable(name, texts, None, False))
    return found


def _variable_axis(variable: _Variable, label: str) -> _Axis:
    """Of a numeric variable, what is no number (null, not set) has a place of its own beneath the scale."""
    texts = variable.texts
    if variable.numbers is None:
        names = sorted(set(texts), key=lambda t: (t == "not set", t))
        labels = _distinct(names, 20)
        every = -(-len(names) // MAX_TICKS)  # beyond, only some are named
        ticks = [(float(i), labels[i]) for i in range(0, len(names), every)]
        at = [float(names.index(text)) for text in texts]
        return _Axis(label, at, ticks, *((0, len(names) - 1) if len(names) > 1 else (-0.5, 0.5)))
    axis = _number_axis(label, variable.numbers, variable.log, lambda value: f"{value:.4g}")
    step = 0.1 * (axis.high - axis.low)
    none = sorted({t for t, n in zip(texts, variable.numbers, strict=True) if n is None})
    for text in none:
        axis.low -= step
        axis.ticks.append((axis.low, text))
        axis.at = [axis.low if t == text else at for t, at in zip(texts, axis.at, strict=True)]
    return axis


# ------------------------------------------------------------------------------------------ importance
@dataclass
class _Importance:
    """`shares`: of each variable by its short name, the largest first; sums to 1. Empty where `why_not` says why."""

    objective: str
    trials: int
    shares: dict[str, float]
    why_not: str = ""


def _importance_of(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> _Importance:
    """How much each setting decides how the trials rank by the first objective.

    fANOVA (Hutter et al. 2014) as Optuna has it: a forest learns the trials' ranks, and a setting's share is the
    variance of the ranks that it explains by itself. Ranks, because one run that diverged would otherwise decide
    alone. A logarithmic number is given as its logarithm. fANOVA takes no trial that lacks a setting, so a number
    that some trials do not have becomes four categories: not set, low, middle and high (a third of the trials that
    have it in each); a category that some do not have gets one more. PED-ANOVA, which knows settings that are not
    always there, needs more trials than a search of large models has, and does not see that being set at all matters.
    """
    scored = _scored(trials, objectives)
    name = objectives[0].name
    found = _Importance(name, len(scored), {})
    losses = [_losses(t, objectives[:1])[0] for t in scored]
    variables = [v for v in _variables(scored) if len(set(v.texts)) > 1]
    if not scored:
        found.why_not = NOTHING_YET
    elif len(scored) < MIN_TRIALS_FOR_IMPORTANCE:
        found.why_not = f"{_trials(len(scored))} with a value, {MIN_TRIALS_FOR_IMPORTANCE} needed"
    elif min(losses) == max(losses):
        found.why_not = f"{_title(name)} is the same in all {_trials(len(scored))}"
    elif not variables:
        found.why_not = "All trials have the same settings"
    else:
        shares = _fanova(variables, losses)
        if not (total := sum(shares.values())) > 0:
            found.why_not = "No setting made a difference by itself"
        else:
            short = short_names([v.name for v in variables])
            order = sorted(shares, key=lambda key: -shares[key])
            found.shares = {short[key]: float(shares[key] / total) for key in order}
    return found


def _fanova(variables: Sequence[_Variable], losses: Sequence[float]) -> dict[str, float]:
    import optuna
    from optuna.distributions import (
        BaseDistribution,
        CategoricalDistribution,
        FloatDistribution,
    )
    from scipy.stats import rankdata

    distributions: dict[str, BaseDistribution] = {}
    columns: dict[str, Sequence[Any]] = {}
    for variable in variables:
        column: Sequence[Any] = variable.texts
        if variable.numbers is not None and None not in variable.numbers:
            numbers = [n for n in variable.numbers if n is not None]
            column = [math.log10(n) for n in numbers] if variable.log else numbers
            distributions[variable.name] = FloatDistribution(min(column), max(column))
        else:
            if variable.numbers is not None:
                column = _thirds(variable)
            column = _frequent(column)
            distributions[variable.name] = CategoricalDistribution(sorted(set(column)))
        columns[variable.name] = column
    ranks = rankdata(losses)
    said = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # experimental parts
            study = optuna.create_study()
            study.add_trials([
                optuna.trial.create_trial(
                    params={name: column[i] for name, column in columns.items()},
                    distributions=distributions,
                    value=float(rank),
                )
                for i, rank in enumerate(ranks)
            ])  # fmt: skip
            # shallow: whole trees find the same shares, but take a minute for 500 trials
            evaluator = optuna.importance.FanovaImportanceEvaluator(n_trees=32, max_depth=6, seed=0)
            found = optuna.importance.get_param_importances(
                study, evaluator=evaluator, params=list(columns), normalize=False
            )
    finally:
        optuna.logging.set_verbosity(said)
    return {name: share if math.isfinite(share) else 0.0 for name, share in found.items()}


def _thirds(variable: _Variable) -> list[str]:
    """A number that is not always there, as categories."""
    import numpy as np

    assert variable.numbers is not None
    known = [n for n in variable.numbers if n is not None]
    if len(set(known)) <= 3:
        return variable.texts
    edges = np.quantile(known, (1 / 3, 2 / 3))
    names = ("low", "middle", "high")
    return [
        text if number is None else names[int(np.searchsorted(edges, number))]
        for text, number in zip(variable.texts, variable.numbers, strict=True)
    ]


def _frequent(column: Sequence[str]) -> list[str]:
    """The most frequent categories, and the others as one: fANOVA's time grows with the cube of their number."""
    kept = {text for text, _ in Counter(column).most_common(MAX_CATEGORIES)}
    return [text if text in kept else "others" for text in column]


def _importance_words(found: _Importance) -> tuple[str, str]:
    """The picture's title, and what a reader must know of it."""
    facts = f"share of the ranking that each setting explains by itself · {_trials(found.trials)}"
    if found.trials < FEW_TRIALS:
        facts += " only: a hint, no more"
    return f"What decides {_in_a_sentence(found.objective)}", facts


def _bars(found: _Importance) -> list[tuple[str, float]]:
    shown = list(found.shares.items())[:MAX_BARS]
    labels = _distinct([name for name, _ in shown], 40)
    return [(label, share) for label, (_, share) in zip(labels, shown, strict=True)]


def _importance_figure(found: _Importance, title: str) -> Figure:
    bars = _bars(found)
    figure = _titled(9, max(3.2, 1.9 + 0.32 * len(bars)), title)
    axes = figure.add_subplot()
    name, facts = _importance_words(found)
    if found.why_not:
        _say_nothing(axes, name, found.why_not)
        return figure
    style(axes)
    axes.grid(False, axis="y")
    axes.barh(range(len(bars)), [share for _, share in bars], color=COLOURS["val"], height=0.7)
    axes.set_yticks(range(len(bars)), [_plain_text(label) for label, _ in bars])
    for at, (_, share) in enumerate(bars):
        axes.annotate(
            f"{100 * share:.0f} %", (share, at), xytext=(4, 0), textcoords="offset points",
            va="center", fontsize=9, color=MUTED,
        )  # fmt: skip
    axes.invert_yaxis()
    axes.margins(x=0.1, y=0.02)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
    axes.set_xlabel("share of what the settings explain", color=MUTED)
    head(axes, _plain_text(name), facts)
    return figure


def _importance_plotly(found: _Importance, title: str) -> Plotly:
    name, facts = _importance_words(found)
    if found.why_not:
        return _nothing_plotly(name, title, found.why_not)
    bars = _bars(found)
    labels = [html.escape(label, quote=False) for label, _ in bars]
    shares = [share for _, share in bars]
    trace = {
        "type": "bar",
        "orientation": "h",
        "x": shares,
        "y": labels,
        "text": [f"{100 * share:.0f} %" for share in shares],
        "textposition": "outside",
        "cliponaxis": False,
        "marker": {"color": COLOURS["val"]},
        "hovertemplate": "%{y}: %{x:.1%}<extra></extra>",
    }
    layout = _layout(name, f"{facts} · {title}", 150 + 26 * max(len(bars), 3)) | {
        "xaxis": _axis_look("share of what the settings explain") | {"tickformat": ".0%"},
        "yaxis": {"type": "category", "autorange": "reversed", "automargin": True},
    }
    return {"data": [trace], "layout": layout}


# ---------------------------------------------------------------------------------------------- pareto
@dataclass
class _Panel:
    """The first objective against something: `x` is a value's name, or None for the trial's number.

    `line`: through the marked points, as steps: "post" (the value holds until the next) | "pre" | "" (none).
    """

    x: str | None
    y: str
    title: str
    facts: str
    trials: list[TrialResult]
    marked: list[TrialResult]
    line: str
    marked_name: str = "Pareto front"
    running_best: bool = False

    def xs(self, trials: Sequence[TrialResult]) -> list[float]:
        return [t.number if self.x is None else _known(t, self.x) for t in trials]

    def ys(self, trials: Sequence[TrialResult]) -> list[float]:
        return [_known(t, self.y) for t in trials]


def _panels(trials: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[_Panel]:
    scored = _scored(trials, objectives)
    front = pareto(trials, objectives)
    first = objectives[0]
    y = first.name
    if len(objectives) > 1:
        panels = []
        for other in objectives[1:]:
            line = ""
            if len(objectives) == 2:
                # towards the worse side of x, what is reached so far holds
                line = "pre" if other.higher_is_better else "post"
            marked = front
            if line:
                marked = sorted(front, key=lambda t, key=other.name: _known(t, key))
            facts = f"{len(front)} of {_trials(len(scored))} on the Pareto front"
            if len(objectives) > 2:
                facts += f" of all {len(objectives)} objectives"
            heading = f"{_title(y)} against {_in_a_sentence(other.name)}"
            panels.append(_Panel(other.name, y, heading, facts, scored, marked, line))
        return panels
    by_number = sorted(scored, key=lambda t: t.number)
    best: list[TrialResult] = []
    for trial in by_number:
        if not best or _losses(trial, objectives) < _losses(best[-1], objectives):
            best.append(trial)
    facts = f"best: {_shown(y, _known(best[-1], y))} in trial {best[-1].number}" if best else ""  # fmt: skip
    running = f"{_title(y)}, trial by trial"
    panels = [_Panel(None, y, running, facts, by_number, best, "post", "best so far", True)]
    sized = [t for t in scored if _value(t, "parameters") is not None]
    if sized and y != "parameters":
        heading = f"{_title(y)} against parameters"
        known = [t for t in front if t in sized]
        facts = f"{_trials(len(sized))}, the best marked"
        panels.append(_Panel("parameters", y, heading, facts, sized, known, "", "best so far"))
    return panels


def _pareto_figure(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> Figure:
    panels = _panels(trials, objectives)
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    size = (9.5, 6.2) if len(panels) == 1 else (6.4 * columns, 5.4 * rows)
    figure = _titled(*size, title, _counts(trials))
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    drawn = list(zip(grid.flat, panels, strict=False))
    for axes, panel in drawn:
        if not panel.trials:
            _say_nothing(axes, panel.title, NOTHING_YET)
            continue
        style(axes)
        _scatter(axes, panel)
        _scale(axes, "x", panel.x, panel.xs(panel.trials))
        _scale(axes, "y", panel.y, panel.ys(panel.trials))
        head(axes, _plain_text(panel.title), panel.facts)
    shown = {}
    for axes, _ in drawn:
        handles, labels = axes.get_legend_handles_labels()
        shown |= dict(zip(labels, handles, strict=True))
    if shown:
        figure.legend(
            shown.values(), shown.keys(), loc="outside lower left", ncols=4, frameon=False,
            fontsize=9, labelcolor=INK, handletextpad=0.3,
        )  # fmt: skip
    figure.draw_without_rendering()  # where the points stand is known only now
    for axes, panel in drawn:
        if panel.trials:
            _number_points(axes, panel)
    return figure


def _scatter(axes: Axes, panel: _Panel) -> None:
    marked = {id(t) for t in panel.marked}
    others = [t for t in panel.trials if id(t) not in marked]
    blue = COLOURS["val"]
    if panel.line:
        xs, ys = panel.xs(panel.marked), panel.ys(panel.marked)
        if panel.running_best:
            xs, ys = [*xs, panel.trials[-1].number], [*ys, ys[-1]]
        axes.step(xs, ys, where=panel.line, color=blue, linewidth=1.8, zorder=2)  # type: ignore[arg-type]
    for group, colour, size, name in (
        (others, OTHERS, 6, "other trials"),
        (panel.marked, blue, 8, panel.marked_name),
    ):
        for state in ENDED_WITH_A_VALUE:
            these = [t for t in group if t.state == state]
            whole = state == "completed"
            if these:
                axes.plot(
                    panel.xs(these),
                    panel.ys(these),
                    "o",
                    color=colour,
                    markerfacecolor=colour if whole else "white",
                    markeredgewidth=1.4,
                    alpha=0.85 if group is others else 1,
                    markersize=size,
                    zorder=3 if group is others else 4,
                    label=name if whole else f"{name}, stopped early",
                )
    axes.margins(0.08)


def _scale(axes: Axes, side: str, key: str | None, values: Sequence[float]) -> None:
    """Scale, ticks and title of one axis."""
    from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

    axis = axes.xaxis if side == "x" else axes.yaxis
    named = axes.set_xlabel if side == "x" else axes.set_ylabel
    if key is None:
        axis.set_major_locator(MaxNLocator(integer=True, nbins=8, min_n_ticks=1))
        named("trial", color=MUTED)
        return
    named(_plain_text(_title_and_unit(key)), color=MUTED)
    if _is_log(key, values):
        (axes.set_xscale if side == "x" else axes.set_yscale)("log")
        axis.set_major_locator(FixedLocator(_log_ticks(min(values), max(values))))
        axis.set_minor_locator(NullLocator())
    elif min(values) == max(values):
        axis.set_major_locator(FixedLocator([values[0]]))
    else:
        axis.set_major_locator(MaxNLocator(7))
    axis.set_major_formatter(lambda value, _: _tick(key, value))


def _number_points(axes: Axes, panel: _Panel) -> None:
    """Write trial numbers beside the marked points, where there is room for them."""
    scale = axes.figure.dpi / 72
    to_px = axes.transData.transform
    points = to_px(list(zip(panel.xs(panel.trials), panel.ys(panel.trials), strict=True))) / scale
    taken = [(x - 4, y - 4, x + 4, y + 4) for x, y in points]
    frame = axes.get_window_extent()
    for trial in panel.marked:
        text = str(trial.number)
        xy = (panel.xs([trial])[0], panel.ys([trial])[0])
        x, y = to_px(xy) / scale
        width, height = 5.2 * len(text), 7.5
        for dx, dy in (
            (6, 4), (-6 - width, 4), (6, -4 - height), (-6 - width, -4 - height),
            (-width / 2, 8), (-width / 2, -8 - height), (9, -height / 2), (-9 - width, -height / 2),
        ):  # fmt: skip
            box = (x + dx, y + dy, x + dx + width, y + dy + height)
            inside = (
                box[0] > frame.x0 / scale
                and box[1] > frame.y0 / scale
                and box[2] < frame.x1 / scale
                and box[3] < frame.y1 / scale
            )
            if inside and not any(
                box[0] < o[2] and o[0] < box[2] and box[1] < o[3] and o[1] < box[3] for o in taken
            ):
                taken.append(box)
                note = axes.annotate(
                    text, xy, xytext=(dx, dy), textcoords="offset points", fontsize=8, color=INK,
                    fontweight="bold", zorder=5,
                )  # fmt: skip
                note.set_in_layout(False)
                break


def _pareto_plotly(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> Plotly:
    panels = _panels(trials, objectives)
    heading = (
        panels[0].title if len(objectives) < 3 else f"{_title(objectives[0].name)} and the rest"
    )
    if not panels[0].trials:
        return _nothing_plotly(panels[0].title, title, NOTHING_YET)
    early = any(t.state == "stopped early" for p in panels for t in p.trials)
    facts = f"{panels[0].facts}{' · hollow: stopped early' if early else ''} · {title}"
    layout = _layout(heading, facts, 560) | {
        "hovermode": "closest",
        "legend": {"orientation": "h", "y": -0.16, "x": 0},
    }
    data: list[Plotly] = []
    gap = 0.09 if len(panels) > 1 else 0.0
    width = (1 - gap * (len(panels) - 1)) / len(panels)
    for at, panel in enumerate(panels):
        suffix = str(at + 1) if at else ""
        left = at * (width + gap)
        layout[f"xaxis{suffix}"] = {
            **_plotly_scale(panel.x, panel.xs(panel.trials)),
            "domain": [left, left + width],
            "anchor": f"y{suffix}",
        }
        layout[f"yaxis{suffix}"] = {
            **_plotly_scale(panel.y, panel.ys(panel.trials)),
            "anchor": f"x{suffix}",
            "automargin": True,
        }
        data += _plotly_points(panel, objectives, suffix, with_legend=at == 0)
    return {"data": data, "layout": layout}


def _plotly_points(
    panel: _Panel, objectives: Sequence[Objective], suffix: str, with_legend: bool
) -> list[Plotly]:
    marked = {id(t) for t in panel.marked}
    others = [t for t in panel.trials if id(t) not in marked]
    on: Plotly = {"type": "scatter", "xaxis": f"x{suffix}", "yaxis": f"y{suffix}"}
    traces: list[Plotly] = []
    if panel.line:
        xs, ys = panel.xs(panel.marked), panel.ys(panel.marked)
        if panel.running_best:
            xs, ys = [*xs, panel.trials[-1].number], [*ys, ys[-1]]
        shape = "hv" if panel.line == "post" else "vh"
        line = {"shape": shape, "color": COLOURS["val"], "width": 2}
        traces.append(
            {
                **on,
                "mode": "lines",
                "x": xs,
                "y": ys,
                "line": line,
                "hoverinfo": "skip",
                "showlegend": False,
            }
        )
    # on the side where nobody else can stand
    where = "top" if objectives[0].higher_is_better else "bottom"
    other = next((o for o in objectives if o.name == panel.x), None)
    where += " center" if other is None else " right" if other.higher_is_better else " left"
    for group, colour, size, name, mode in (
        (others, OTHERS, 8, "other trials", "markers"),
        (panel.marked, COLOURS["val"], 10, panel.marked_name, "markers+text"),
    ):
        group = sorted(group, key=lambda t: t.state)  # the legend shows the first: a whole one
        symbols = ["circle" if t.state == "completed" else "circle-open" for t in group]
        traces.append(
            {
                **on,
                "mode": mode,
                "name": name,
                "showlegend": with_legend and bool(group),
                "x": panel.xs(group),
                "y": panel.ys(group),
                "text": [str(t.number) for t in group],
                "textposition": where,
                "textfont": {"size": 11, "color": INK},
                "hovertext": [_hover(t, objectives) for t in group],
                "hovertemplate": "%{hovertext}<extra></extra>",
                "marker": {
                    "color": colour,
                    "size": size,
                    "symbol": symbols,
                    "line": {"width": 1.5, "color": colour},
                },
            }
        )
    return traces


def _plotly_scale(key: str | None, values: Sequence[float]) -> Plotly:
    if key is None:
        return _axis_look("trial") | {"tickformat": "d"}
    look = _axis_look(_for_plotly(_title_and_unit(key), 60))
    measure = _measure(key)
    if _is_log(key, values):
        ticks = _log_ticks(min(values), max(values))
        texts = [_tick(key, tick) for tick in ticks]
        return look | {"type": "log", "tickvals": ticks, "ticktext": texts}
    if measure and measure.compact:
        return look | {"tickformat": "~s"}
    return look | ({"ticksuffix": " %"} if metric_names.is_percent(key) else {})


# -------------------------------------------------------------------------------------------- parallel
def _parallel_axes(scored: Sequence[TrialResult], objectives: Sequence[Objective]) -> list[_Axis]:
    """One of each variable, then one of each objective, the first one last: there the colours are read."""
    variables = _variables(scored)
    short = short_names([v.name for v in variables])
    axes = [_variable_axis(v, short[v.name]) for v in variables]
    for objective in (*objectives[1:], objectives[0]):
        axis = _value_axis(objective.name, scored)
        axis.note = f"{axis.note}, {_direction(objective)}" if axis.note else _direction(objective)
        axes.append(axis)
    return axes


def _parallel_words(scored: Sequence[TrialResult], objectives: Sequence[Objective]) -> tuple[str, str]:  # fmt: skip
    name = _in_a_sentence(objectives[0].name)
    return (
        "Settings and what came of them",
        f"one line a trial, {len(scored)} in all · the darker, the better its {name}",
    )


def _why_no_parallel(scored: Sequence[TrialResult]) -> str:
    if not scored:
        return NOTHING_YET
    return "" if any(t.point for t in scored) else "The trials have no settings that differ"


def _in_two_lines(label: str, longest: int = 16) -> str:
    """A name is broken at a dot or a space near its middle, so that it is no wider than its axis has room."""
    label = _shorten(label, 2 * longest)
    breaks = [i + 1 for i, c in enumerate(label) if c in ". _" and 0 < i < len(label) - 1]
    if len(label) <= longest or not breaks:
        return label
    at = min(breaks, key=lambda i: abs(i - len(label) / 2))
    return f"{label[:at].rstrip()}\n{label[at:]}"


def _shades(scored: Sequence[TrialResult], objective: Objective) -> list[float]:
    """0 for the worst, 1 for the best: by rank, as one that went wild would make all the others look alike."""
    losses = [_losses(t, [objective]) for t in scored]
    order = sorted(set(losses), reverse=True)
    place = {loss: at / max(len(order) - 1, 1) for at, loss in enumerate(order)}
    return [place[loss] for loss in losses]


def _parallel_figure(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> Figure:
    from matplotlib.collections import LineCollection
    from matplotlib.colors import LinearSegmentedColormap

    scored = _scored(trials, objectives)
    name, facts = _parallel_words(scored, objectives)
    if why := _why_no_parallel(scored):
        figure = _titled(9, 3.2, title)
        _say_nothing(figure.add_subplot(), name, why)
        return figure
    columns = _parallel_axes(scored, objectives)
    count = len(columns)
    most_ticks = max(len(c.ticks) for c in columns)
    # no wider than what a viewer still opens
    figure = _titled(min(max(9, 1.5 * count + 1), 40), min(max(5.6, 0.26 * most_ticks + 2), 9), title)  # fmt: skip
    axes = figure.add_subplot()
    axes.set_xlim(-0.15, count - 0.35)
    axes.set_ylim(-0.04, 1.04)
    for side in axes.spines.values():
        side.set_visible(False)
    axes.set_yticks([])
    axes.set_xticks([])

    def height(column: _Axis, at: float) -> float:
        return (at - column.low) / (column.high - column.low)

    shares = _shades(scored, objectives[0])
    order = sorted(range(len(scored)), key=lambda i: shares[i])  # the best on top
    lines = [[(x, height(c, c.at[i])) for x, c in enumerate(columns)] for i in order]
    shades = LinearSegmentedColormap.from_list("worst to best", FROM_WORST_TO_BEST)
    axes.add_collection(
        LineCollection(
            lines,
            colors=[shades(shares[i]) for i in order],
            linewidths=1.6 if len(scored) <= 60 else 1.0,
            alpha=0.9 if len(scored) <= 60 else 0.75,
            zorder=2,
        )
    )
    box = {"facecolor": "white", "edgecolor": "none", "pad": 0.8, "alpha": 0.8}
    for x, column in enumerate(columns):
        objective = x >= count - len(objectives)
        axes.plot((x, x), (0, 1), color=INK if objective else MUTED, linewidth=1.2, zorder=3)
        for at, text in column.ticks:
            y = height(column, at)
            axes.plot((x - 0.02, x), (y, y), color=MUTED, linewidth=1, zorder=3)
            axes.annotate(
                _plain_text(text), (x, y), xytext=(4, 0), textcoords="offset points", va="center",
                fontsize=8, color=INK, zorder=4, bbox=box,
            )  # fmt: skip
        axes.annotate(
            _plain_text(_in_two_lines(column.label)), (x, 1.04), xytext=(-4, 4),
            textcoords="offset points", va="bottom", fontsize=9, linespacing=1.05,
            color=COLOURS["val"] if objective else INK, fontweight="bold",
        )  # fmt: skip
        if column.note:
            axes.annotate(
                column.note.replace(", ", "\n"), (x, -0.04), xytext=(-4, -4),
                textcoords="offset points", va="top", fontsize=8, color=MUTED,
            )  # fmt: skip
    # where `head` would write stand the names of the axes
    axes.set_title(name, color=INK, pad=58)
    axes.annotate(
        facts, (0, 1), xytext=(0, 43), xycoords="axes fraction", textcoords="offset points",
        color=MUTED, fontsize=9,
    )  # fmt: skip
    return figure


def _parallel_plotly(
    trials: Sequence[TrialResult], objectives: Sequence[Objective], title: str
) -> Plotly:
    scored = _scored(trials, objectives)
    name, facts = _parallel_words(scored, objectives)
    if why := _why_no_parallel(scored):
        return _nothing_plotly(name, title, why)
    columns = _parallel_axes(scored, objectives)
    dimensions = [
        {
            # plotly reads a little HTML in a label, and none in a tick
            "label": html.escape(_in_two_lines(c.label, 15), quote=False).replace("\n", "<br>"),
            "values": c.at,
            "range": [c.low, c.high],
            "tickvals": [at for at, _ in c.ticks],
            "ticktext": [text for _, text in c.ticks],
        }
        for c in columns
    ]
    trace = {
        "type": "parcoords",
        "dimensions": dimensions,
        "line": {
            "color": _shades(scored, objectives[0]),
            "cmin": 0,
            "cmax": 1,
            "colorscale": [[at / 2, colour] for at, colour in enumerate(FROM_WORST_TO_BEST)],
        },
        "labelfont": {"size": 12, "color": INK},
        "tickfont": {"size": 11, "color": INK},
        "rangefont": {"size": 1, "color": "rgba(0,0,0,0)"},  # of a logarithm: no use to a reader
    }
    layout = _layout(name, f"{facts} · {title}", 600)
    left = 20 + 7 * max(len(text) for _, text in columns[0].ticks)  # they stand left of the axis
    layout["margin"] = {"l": max(70, left), "r": 70, "t": 150, "b": 30}
    if (least := 100 * len(columns) + left) > 1250:  # wider than the page: the reader scrolls
        layout["width"] = least
    return {"data": [trace], "layout": layout}


# ----------------------------------------------------------------------------------------- both drawers
def _titled(width_in: float, height_in: float, title: str, counts: str = "") -> Figure:
    figure = new_figure(width_in, height_in)
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12)  # type: ignore[union-attr]
    longest = int(10 * width_in)
    lines = [_plain_text(_shorten(text, longest)) for text in (title, counts) if text]
    figure.suptitle("\n".join(lines), x=0.01, ha="left", fontsize=11, color=INK)
    return figure


def _say_nothing(axes: Axes, title: str, why: str) -> None:
    axes.set_axis_off()
    axes.text(0.5, 0.5, _plain_text(why), transform=axes.transAxes, ha="center", color=MUTED)
    axes.set_title(_plain_text(title), color=INK)


def _nothing_plotly(name: str, title: str, why: str) -> Plotly:
    layout = _layout(name, title, 240)
    hidden = {"visible": False, "range": [0, 1]}
    note = {"text": html.escape(why, quote=False), "x": 0.5, "y": 0.5, "showarrow": False}
    note |= {"xref": "paper", "yref": "paper", "font": {"size": 14, "color": MUTED}}
    return {"data": [], "layout": layout | {"xaxis": hidden, "yaxis": hidden, "annotations": [note]}}  # fmt: skip


def _layout(name: str, facts: str, height_px: int) -> Plotly:
    small = f'<span style="font-size:12px;color:{MUTED}">{_for_plotly(facts, 140)}</span>'
    return {
        "title": {"text": f"<b>{_for_plotly(name, 80)}</b><br>{small}", "x": 0.01, "xanchor": "left", "y": 1 - 20 / height_px, "yanchor": "top"},
        "font": {"family": "system-ui, sans-serif", "size": 12, "color": INK},
        "paper_bgcolor": "white",
        "plot_bgcolor": "white",
        "height": height_px,
        "margin": {"l": 70, "r": 30, "t": 80, "b": 60},
    }  # fmt: skip


def _axis_look(title: str) -> Plotly:
    return {
        "title": {"text": title, "font": {"color": MUTED}},
        "gridcolor": GRID,
        "linecolor": OTHERS,
        "zeroline": False,
        "automargin": True,
    }


# ------------------------------------------------------------------------------------------------ page
PAGE_CSS = """
body { max-width: 80rem; }
.plot { background: #fff; border: 1px solid var(--line); border-radius: .5rem; margin: 1.25rem 0; overflow-x: auto; }
"""


def _page(
    trials: Sequence[TrialResult],
    objectives: Sequence[Objective],
    title: str,
    drawn: dict[str, Plotly],
) -> str:
    """Everything within one file: it is opened from disks and mails that reach no network."""
    from plotly.offline import get_plotlyjs

    text = html.escape
    tiles: list[tuple[str, str]] = []
    if best := best_of(trials, objectives):
        tiles = [(_shown(o.name, _known(best, o.name)), _title_and_unit(o.name)) for o in objectives]  # fmt: skip
        tiles.append((best.name, f"the best by {_in_a_sentence(objectives[0].name)}"))
        if len(objectives) > 1:
            tiles.append((str(len(pareto(trials, objectives))), "on the Pareto front"))
    # a "</script>" in a name must not end the script
    data = json.dumps(drawn, ensure_ascii=True, allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{text(title)}</title><style>{CSS}{PAGE_CSS}</style></head><body>",
        f'<h1>{text(title)}</h1><p class="muted">{text(_counts(trials))}</p><div class="tiles">',
        *(
            f'<div class="tile"><b>{text(value)}</b><span>{text(label)}</span></div>'
            for value, label in tiles
        ),
        "</div>",
        *(f'<div class="plot" id="{name}"></div>' for name in drawn),
        '<p class="muted">Point at a trial for its settings; drag along an axis of the last picture to pick some.</p>'
        if best
        else "",
        "<noscript>These pictures need JavaScript; pareto.png and plots/ do not.</noscript>",
        f'<script type="application/json" id="figures">{data}</script>',
        f"<script>{get_plotlyjs()}</script>",
        "<script>",
        'const figures = JSON.parse(document.getElementById("figures").textContent);',
        "for (const [name, figure] of Object.entries(figures))",
        "  Plotly.newPlot(name, figure.data, figure.layout, {responsive: true, displaylogo: false});",
        "</script></body></html>",
    ]
    return "\n".join(parts)
