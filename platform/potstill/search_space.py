"""What a search varies, from plain YAML (`search.space`).

    optimizer.lr: {min: 1e-4, max: 1e-2, log: true}          a number
    loop.batch_size: {min: 16, max: 64, step: 16}            an integer, where all three are
    model.name: [mobilenetv3_small_050, resnet18]            a choice of any plain values
    model.kwargs.width: {values: [32, 64], when: "model.name == 'resnet18'"}
    terms:                                                   a named choice that sets several keys at once
      options:
        kl: {task.terms.features: null}
        kl_and_features: {task.terms.features: {loss: feature_cosine}}

`when` is an expression (see expressions.py) over the variables before it and the base config; where it is false, the
base config's value stands. A later variable may lie below a key to which an earlier one gives a mapping.
"""

from __future__ import annotations

import copy
import itertools
import json
import math
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from potstill.config import flatten
from potstill.errors import UserError
from potstill.expressions import Expression, as_text, near

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial

Point = dict[str, Any]
"""The value of each active variable by name: a number, the choice itself, or the label of an option."""

Kind = Literal["float", "int", "choice", "options"]


@dataclass(frozen=True)
class Variable:
    """One variable of the space. `low`, `high` (on the grid), `step` (None: continuous) and `log` are a number's;
    `choices` are the values of a choice or the labels of `options`: label -> {config key: value}."""

    name: str
    kind: Kind
    when: Expression | None = None
    low: float = 0
    high: float = 0
    step: float | None = None
    log: bool = False
    choices: tuple[Any, ...] = ()
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self) -> dict[str, list[Any]]:
        """Each config key that it may set -> the values listed for it (none for a number)."""
        if self.kind != "options":
            return {self.name: list(self.choices)}
        found: dict[str, list[Any]] = {}
        for option in self.options.values():
            for key, value in option.items():
                found.setdefault(key, []).append(value)
        return found

    def keys(self) -> tuple[str, ...]:
        """The config keys that it may set."""
        return tuple(self.settings())

    def overrides(self, value: Any) -> dict[str, Any]:
        return copy.deepcopy({**self.options[value]} if self.options else {self.name: value})

    def shown(self) -> str:
        if self.choices:
            return " | ".join(c if isinstance(c, str) else as_text(c) for c in self.choices)
        plain = self.step is None or (self.kind == "int" and self.step == 1)
        how = "log" if self.log else "" if plain else f"steps of {self.step:g}"
        return f"{as_text(self.low)} … {as_text(self.high)}" + (f" ({how})" if how else "")

    @property
    def count(self) -> int | None:
        """How many values it has; None where it is continuous."""
        if self.choices:
            return len(self.choices)
        return None if self.step is None else round((self.high - self.low) / self.step) + 1

    def at(self, place: int) -> Any:
        """The value at a place, from 0, of one that is not continuous."""
        if self.choices:
            return copy.deepcopy(self.choices[place])
        assert self.step is not None
        if self.kind == "int":
            return int(self.low + place * self.step)
        # decimal, so that the third of 0.1 in steps of 0.1 is 0.3, however it is reached
        return float(Decimal(str(self.low)) + place * Decimal(str(self.step)))

    def place(self, value: Any) -> int | None:
        """The inverse of `at`; None for what is not among its values."""
        if not self.choices:
            assert self.step is not None
            place = round((value - self.low) / self.step)
            if not 0 <= place < (self.count or 0):
                return None
            near_it = math.isclose(value, self.at(place), rel_tol=1e-12, abs_tol=1e-8 * self.step)
            return place if near_it else None
        identity = _identity(value)
        same = [i for i, c in enumerate(self.choices) if _identity(c) == identity]
        if not same and _is_number(value):  # 1 for 1.0
            same = [i for i, c in enumerate(self.choices) if _is_number(c) and c == value]
        return same[0] if same else None

    def checked(self, value: Any, key: str) -> Any:
        """The value as a point has it (`1e-3` read as a number, on its grid). Raises UserError for what is outside."""
        if self.choices:
            if (place := self.place(value)) is None:
                remedy = f"choose one, or add it to search.space.{self.name}"
                _refuse(key, f"one of {self.shown()}", value, remedy)
            return self.at(place)
        number = _number(value)
        if number is not None and self.step is not None:
            if (place := self.place(number)) is not None:
                return self.at(place)
        elif number is not None and self.low <= number <= self.high:
            return float(number)
        rule = "a whole number in" if self.kind == "int" else "a number in"
        remedy = f"change it, or the range of search.space.{self.name}"
        _refuse(key, f"{rule} {self.shown()}", value, remedy)

    # Optuna's side

    def _labels(self) -> tuple[Any, ...]:
        """The choices as Optuna takes them: lists and mappings by their place, and all where two would be equal there."""
        places = [f"#{i}" for i in range(len(self.choices))]
        labels = [
            p if isinstance(c, list | Mapping) else c
            for p, c in zip(places, self.choices, strict=True)
        ]
        twins = any(a == b for a, b in itertools.combinations(labels, 2))  # True and 1, say
        return tuple(places if twins else labels)

    def ask(self, trial: Trial) -> Any:
        if self.choices:
            kept = trial.suggest_categorical(self.name, self._labels())
        elif self.kind == "int":
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            kept = trial.suggest_int(self.name, low, high, step=step, log=self.log)
        else:
            kept = trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)
        return self.decode(kept)

    def distribution(self) -> BaseDistribution:
        from optuna import distributions

        if self.choices:
            return distributions.CategoricalDistribution(self._labels())
        if self.kind == "int":
            low, high, step = int(self.low), int(self.high), int(self.step or 1)
            return distributions.IntDistribution(low, high, self.log, step)
        return distributions.FloatDistribution(self.low, self.high, self.log, self.step)

    def encode(self, value: Any) -> Any:
        value = self.checked(value, f"search.space.{self.name}")
        place = self.place(value) if self.choices else None
        return value if place is None else self._labels()[place]

    def decode(self, kept: Any) -> Any:
        if self.choices:
            labels = self._labels()
            if kept not in labels:
                remedy = "go on with the space of the earlier trials, or start another search"
                _refuse(f"search.space.{self.name}", f"one of {self.shown()}", kept, remedy)
            return self.at(labels.index(kept))
        return self.checked(kept, f"search.space.{self.name}")

    # the population's side

    def drawn(self, rng: random.Random) -> Any:
        """A value at random, evenly (of the logarithm with `log`)."""
        if self.count is not None and not self.log:
            return self.at(rng.randrange(self.count))
        # every whole number has the part of the line that rounds to it
        edge = 0.5 if self.kind == "int" else 0.0
        low, high = self.low - edge, self.high + edge
        if self.log:
            value = math.exp(rng.uniform(math.log(low), math.log(high)))
        else:
            value = rng.uniform(low, high)
        value = min(max(value, self.low), self.high)
        return round(value) if self.kind == "int" else value

    def explored(self, value: Any, rng: random.Random) -> Any:
        """A value near this one: 0.8 or 1.2 times as large (a step at least, where there is room), or a neighbour."""
        if self.choices:
            place = self.place(value)
            assert place is not None
            return self.at(min(max(place + rng.choice((-1, 0, 1)), 0), len(self.choices) - 1))
        factor = rng.choice((0.8, 1.2))
        scaled = min(max(value * factor, self.low), self.high)
        if self.step is None:
            return scaled
        place, moved = self.place(value), round((scaled - self.low) / self.step)
        assert place is not None
        assert self.count is not None
        if moved == place:
            moved = place + (1 if (factor > 1) == (value >= 0) else -1)
        return self.at(min(max(moved, 0), self.count - 1))


@dataclass(frozen=True)
class Space:
    """All variables, in order, over a base config (flat: dotted key -> value)."""

    variables: dict[str, Variable]
    base: dict[str, Any]

    @classmethod
    def parse(cls, space: Mapping[str, Any], base: Mapping[str, Any]) -> Space:
        """Raises UserError for anything that is not a space; see the top of this file."""
        if not isinstance(space, Mapping) or not space:
            remedy = "say what to vary, such as `optimizer.lr: {min: 1e-4, max: 1e-2, log: true}`"
            _refuse("search.space", "a mapping with at least one variable", space, remedy)
        variables = {name: _variable(name, spec) for name, spec in space.items()}
        _refuse_clashes(list(variables.values()), base)
        made = cls(variables, dict(base))
        made._refuse_unknown_names()
        return made

    def _sources(self, name: str) -> list[Variable]:
        """The variables that a name in an expression depends on."""
        if name in self.variables and self.variables[name].kind == "options":
            return [self.variables[name]]
        return [v for v in self.variables.values() if any(_covers(k, name) for k in v.settings())]

    def _reads(self, variable: Variable) -> set[str]:
        names = variable.when.names if variable.when else ()
        return {v.name for name in names for v in self._sources(name)}

    def _refuse_unknown_names(self) -> None:
        known, before = set(self.base), set()
        for v in self.variables.values():
            for name in sorted(v.when.names) if v.when else ():
                key = f"search.space.{v.name}.when"
                rule = "over variables before it or keys of the config"
                for u in self._sources(name):
                    if u.name not in before:
                        remedy = "leave it out" if u is v else f"declare {v.name} after {u.name}"
                        _refuse(key, rule, _Plain(f"{name}, which {u.name} sets"), remedy)
                if name not in known:
                    _refuse(key, rule, _Plain(name), near(name, known))
            before.add(v.name)
            known |= {v.name, *v.keys()}
            for key, values in v.settings().items():
                known |= {k for value in values for k, _ in flatten({key: value})}

    def keys(self) -> set[str]:
        """All config keys that any variable may set."""
        return {key for v in self.variables.values() for key in v.settings()}

    def _active(self, variable: Variable, point: Point) -> bool:
        return variable.when is None or variable.when.holds(self.values(point))

    def suggest(self, trial: Trial) -> Point:
        point: Point = {}
        for v in self.variables.values():
            if self._active(v, point):
                point[v.name] = v.ask(trial)
        return point

    def overrides(self, point: Point) -> dict[str, Any]:
        """Dotted config key -> value, in the order in which to apply them: a later one may lie below an earlier one."""
        found: dict[str, Any] = {}
        for v in self.variables.values():
            if v.name in point:
                found |= v.overrides(point[v.name])
        return found

    def values(self, point: Point) -> dict[str, Any]:
        """What expressions see: the base config with the overrides, and the labels of options.

        A mapping stands there as a whole and by its leaves. What the space may set, but neither the point nor the base
        config does, is None, so that a condition may ask for it.
        """
        flat = dict(self.base)
        for key, value in self.overrides(point).items():
            for old in [k for k in flat if k.startswith(f"{key}.")]:
                del flat[old]
            for above in [k for k in flat if key.startswith(f"{k}.")]:
                flat[above] = _with(flat[above], key[len(above) + 1 :].split("."), value)
            flat |= {**dict(flatten({key: value})), key: value}
        absent = dict.fromkeys(sorted(self.keys() - flat.keys()))
        for key in absent:
            for below in [k for k in flat if k.startswith(f"{key}.")]:
                path = below[len(key) + 1 :].split(".")
                absent[key] = _with(absent[key], path, flat[below])
        labels = {n: point.get(n) for n, v in self.variables.items() if v.kind == "options"}
        return flat | absent | labels

    def distributions(self, point: Point) -> dict[str, BaseDistribution]:
        """Optuna's, of the active variables."""
        return {n: v.distribution() for n, v in self.variables.items() if n in point}

    def params(self, point: Point) -> dict[str, Any]:
        """The values as Optuna keeps them. Raises UserError for one that is not in the space."""
        return {n: v.encode(point[n]) for n, v in self.variables.items() if n in point}

    def point_of(self, params: Mapping[str, Any]) -> Point:
        """The inverse of `params`. Raises UserError for params of another space."""
        self._refuse_strangers(params, "an earlier trial")
        return {n: v.decode(params[n]) for n, v in self.variables.items() if n in params}

    def _refuse_strangers(self, names: Iterable[Any], key: str) -> None:
        for name in names:
            if name not in self.variables:
                hint = near(str(name), self.variables)
                _refuse(key, "over variables of search.space", name, hint)

    def complete(self, given: Mapping[str, Any], key: str) -> Point:
        """A known good point as the user wrote it at `key`. Raises UserError unless it is all of one point."""
        if not isinstance(given, Mapping):
            remedy = "give a value for each variable"
            _refuse(key, "a mapping of variables to values", given, remedy)
        self._refuse_strangers(given, key)
        point: Point = {}
        for n, v in self.variables.items():
            if not self._active(v, point):
                if n in given:
                    rule = f"left out where {v.when.text!r} does not hold" if v.when else ""
                    _refuse(f"{key}.{n}", rule, given[n], "remove it, or change what that reads")
                continue
            if n not in given:
                remedy = f"add a value in {v.shown()}"
                _refuse(f"{key}.{n}", "given", _Plain("nothing"), remedy)
            point[n] = v.checked(given[n], f"{key}.{n}")
        return point

    def mutable(self, prefixes: Sequence[str]) -> list[str]:
        """The variables that set nothing below these prefixes, and on which no variable that does depends."""
        fixed: set[str] = set()
        for v in reversed(self.variables.values()):
            if v.name in fixed or _touches(v.keys(), prefixes):
                fixed |= {v.name, *self._reads(v)}
        return [n for n in self.variables if n not in fixed]

    def mutate(
        self, point: Point, names: Collection[str], rng: random.Random, resample: float = 0.25
    ) -> Point:
        """A point near this one that differs in `names` only: "explore" of Jaderberg et al. 2017, arXiv:1711.09846.

        Each is drawn anew with probability `resample`, and moved a little otherwise. What becomes inactive thereby
        leaves, what becomes active is drawn.
        """
        new: Point = {}
        for n, v in self.variables.items():
            if not self._active(v, new):
                continue
            if n not in point or (n in names and rng.random() < resample):
                new[n] = v.drawn(rng)
            else:
                new[n] = v.explored(point[n], rng) if n in names else copy.deepcopy(point[n])
        return new

    def finite(self, prefixes: Sequence[str], limit: int) -> list[Point] | None:
        """Every combination of the variables that set a key below these prefixes and of those that their `when` reads.

        None where one of them is continuous or there are more than `limit`; one empty point where there is none.
        """
        chosen: set[str] = set()
        for v in reversed(self.variables.values()):
            if v.name in chosen or _touches(v.keys(), prefixes):
                chosen |= {v.name, *self._reads(v)}
        variables = [v for n, v in self.variables.items() if n in chosen]
        if any(v.count is None for v in variables):
            return None
        points = list(itertools.islice(self._combinations(variables, {}), limit + 1))
        return points if len(points) <= limit else None

    def _combinations(self, variables: list[Variable], point: Point) -> Iterator[Point]:
        if not variables:
            yield copy.deepcopy(point)
            return
        first, *rest = variables
        if not self._active(first, point):
            yield from self._combinations(rest, point)
            return
        for place in range(first.count or 0):
            yield from self._combinations(rest, {**point, first.name: first.at(place)})


# reading a space

_FORMS = {
    "options": ("options", "when"),
    "values": ("values", "when"),
    "min": ("min", "max", "step", "log", "when"),
}


def _variable(name: Any, spec: Any) -> Variable:
    key = f"search.space.{name}"
    _refuse_no_key(key, name)
    if isinstance(spec, list | tuple):
        spec = {"values": spec}
    if not isinstance(spec, Mapping) or not spec.keys() & {"min", "max", "values", "options"}:
        rule = "a list of choices or a mapping with min and max, values, or options"
        _refuse(key, rule, spec, "what does not vary is set in the config, not in search.space")
    form = next(f for f in _FORMS if f in spec or f == "min")
    for part in spec:
        if part not in _FORMS[form]:
            hint = near(str(part), _FORMS[form])
            _refuse(key, f"given by {', '.join(_FORMS[form])} only", part, hint)
    given = spec.get("when")
    when = None if given is None else Expression(given, f"{key}.when")
    if form == "min":
        return _range(name, key, spec, when)
    if form == "values":
        values = spec["values"]
        if not isinstance(values, list | tuple) or not values:
            _refuse(key, "a list with at least one choice", values, "add the values to try")
        _refuse_twins(key, dict(enumerate(values)))
        return Variable(name, "choice", when, choices=tuple(copy.deepcopy(values)))
    key, options = f"{key}.options", spec["options"]
    if not isinstance(options, Mapping) or not options:
        remedy = "such as `options: {small: {model.name: resnet18}, large: {model.name: resnet50}}`"
        _refuse(key, "a mapping of labels to what they set", options, remedy)
    for label, sets in options.items():
        if not isinstance(label, str) or not label:
            _refuse(key, "labelled by texts", label, "put it in quotes")
        if not isinstance(sets, Mapping):
            _refuse(f"{key}.{label}", "a mapping of config keys to values", sets, "{} sets none")
        for k in sets:
            _refuse_no_key(f"{key}.{label}", k)
    _refuse_twins(key, options)
    own = {label: copy.deepcopy({**sets}) for label, sets in options.items()}
    return Variable(name, "options", when, choices=tuple(own), options=own)


def _range(name: str, key: str, spec: Mapping[str, Any], when: Expression | None) -> Variable:
    numbers: dict[str, int | float] = {}
    for part in ("min", "max", "step"):
        if spec.get(part) is None and part == "step":
            continue
        number = _number(spec.get(part))
        if number is None:
            remedy = "choices of other values are a list"
            _refuse(f"{key}.{part}", "a finite number", spec.get(part), remedy)
        numbers[part] = number
    low, high, step = numbers["min"], numbers["max"], numbers.get("step")
    whole, log = all(isinstance(n, int) for n in numbers.values()), spec.get("log", False)
    if not isinstance(log, bool):
        _refuse(f"{key}.log", "true or false", log, "leave it out for false")
    if not low < high:
        remedy = "raise it, or set what does not vary in the config"
        _refuse(f"{key}.max", f"larger than min ({low})", high, remedy)
    if log and low <= 0:
        _refuse(f"{key}.min", "> 0 with log: true", low, "raise it, or leave log out")
    if step is not None:
        if log and not (whole and step == 1):
            _refuse(f"{key}.step", "left out with log: true", step, "remove one of the two")
        if step <= 0:
            _refuse(f"{key}.step", "> 0", step, "leave it out for every value")
        if Decimal(str(step)) > Decimal(str(high)) - Decimal(str(low)):
            _refuse(f"{key}.step", f"at most max - min ({high - low:g})", step, "make it smaller")
    if whole:
        step = step or 1
        return Variable(name, "int", when, low, low + (high - low) // step * step, step, log)
    if step is not None:  # the last value on the grid, as Optuna has it
        exact_low, exact_step = Decimal(str(float(low))), Decimal(str(float(step)))
        steps = (Decimal(str(float(high))) - exact_low) // exact_step
        high, step = float(exact_low + steps * exact_step), float(step)
    return Variable(name, "float", when, float(low), float(high), step, log)


def _refuse_no_key(place: str, key: Any) -> None:
    if not isinstance(key, str) or not all(key.split(".")) or any(c.isspace() for c in key):
        _refuse(place, "named by a dotted config key", key, "such as optimizer.lr")


def _refuse_twins(key: str, values: Mapping[Any, Any]) -> None:
    """Of values that are not plain, or given twice."""
    seen: dict[str, Any] = {}
    for name, value in values.items():
        if (identity := _identity(value)) is None:
            rule = "plain values: numbers, texts, null, true, false, and lists and mappings of them"
            _refuse(key, rule, value, "put it in quotes if it is a text")
        if identity in seen:
            got = f"{as_text(value)} at {seen[identity]} and {name}"
            _refuse(key, "different from each other", _Plain(got), "remove one")
        seen[identity] = name


def _refuse_clashes(variables: list[Variable], base: Mapping[str, Any]) -> None:
    """Of two that set the same key, and of orders in which one would undo the other."""
    keys = {key for v in variables for key in v.settings()}
    for j, v in enumerate(variables):
        place = f"search.space.{v.name}"
        if v.kind == "options" and (v.name in base or v.name in keys):
            _refuse(place, "no config key, because it is read as a label", v.name, "rename it")
        for label, option in v.options.items():
            for (a, value), b in itertools.combinations(option.items(), 2):
                _refuse_order(f"{place}.options.{label}", b[0], a, [value], True)
        for u in variables[:j]:
            for (a, values), b in itertools.product(u.settings().items(), v.settings()):
                if a == b:
                    remedy = "let one of them set it, or make both one variable with options"
                    _refuse(
                        place,
                        "over keys of its own",
                        _Plain(f"{b}, which {u.name} sets too"),
                        remedy,
                    )
                _refuse_order(place, b, a, values, v.when is not None)


def _refuse_order(place: str, key: str, earlier: str, values: list[Any], guarded: bool) -> None:
    if earlier.startswith(f"{key}."):
        got = _Plain(f"{key} after {earlier}")
        _refuse(place, "before what lies below it", got, f"declare {key} first")
    if not key.startswith(f"{earlier}."):
        return
    got, mappings = _Plain(f"{key} below {earlier}"), [isinstance(v, Mapping) for v in values]
    if not any(mappings):
        _refuse(place, "below no key that gets no mapping", got, "remove one of them")
    if not all(mappings) and not guarded:
        rule = f"given a `when`, because {earlier} is not always a mapping"
        _refuse(place, rule, got, f"say when {key} counts")


# small things


class _Plain(str):
    """Words of our own in the place of a value: shown without quotes."""

    __repr__ = str.__str__


def _refuse(key: str, rule: str, value: Any, remedy: str) -> NoReturn:
    raise UserError(f"{key} must be {rule}, got {value!r}; {remedy}")


def _number(value: Any) -> int | float | None:
    """A finite number, also one that YAML 1.1 takes for a text (1e-4); None for anything else."""
    if isinstance(value, str):
        try:
            value = int(value)
        except ValueError:
            try:
                value = float(value)
            except ValueError:
                return None
    try:
        return value if _is_number(value) and math.isfinite(value) else None
    except OverflowError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _identity(value: Any) -> str | None:
    """Equal for equal values only: True, 1 and 1.0 differ. None for what JSON would not give back."""
    try:
        text = json.dumps(value, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return None
    return text if json.loads(text) == value else None


def _covers(key: str, name: str) -> bool:
    return name == key or name.startswith(f"{key}.")


def _touches(keys: Iterable[str], prefixes: Sequence[str]) -> bool:
    """Whether one of the keys lies below a prefix such as `model.`, or holds it as a whole."""
    return any(key.startswith(p) or p.startswith(f"{key}.") for key in keys for p in prefixes)


def _with(mapping: Any, path: list[str], value: Any) -> dict[str, Any]:
    """A copy of a mapping (or of nothing) in which the value stands at a path."""
    old = mapping if isinstance(mapping, Mapping) else {}
    first, *rest = path
    return {**old, first: _with(old.get(first), rest, value) if rest else value}
