"""The search space: round trips with Optuna, conditions, neighbours, combinations, and what is refused."""

from __future__ import annotations

import copy
import itertools
import json
import math
import pickle
import random
import subprocess
import sys
import warnings

import optuna
import pytest
import yaml

from potstill.errors import UserError
from potstill.search_space import Expression, Space

optuna.logging.set_verbosity(optuna.logging.ERROR)

BASE = {
    "optimizer.lr": 1e-3,
    "optimizer.weight_decay": 0.0,
    "loop.batch_size": 32,
    "loop.epochs": 5,
    "model.name": "mobilenetv3_small_050",
    "model.kwargs": {},
    "augment.flip": None,
    "task.terms.kl.loss": "kl",
    "task.terms.kl.weight": 1.0,
    "task.terms.features.loss": "feature_mse",
    "task.terms.features.scope": "sample",
}
TEXT = """
optimizer.lr: {min: 1e-4, max: 1e-2, log: true}
optimizer.weight_decay: {min: 0, max: 0.35, step: 0.1}
loop.batch_size: {min: 16, max: 70, step: 16}
loop.epochs: {min: 1, max: 40, log: true}
model.name: [mobilenetv3_small_050, resnet18]
model.kwargs.width: {values: [32, 64, null], when: "model.name == 'resnet18'"}
model.kwargs.depth: {min: 2, max: 4, when: "model.kwargs.width != null and model.kwargs.width > 32"}
terms:
  options:
    kl: {task.terms.features: null}
    kl_and_features: {task.terms.features: {loss: feature_cosine, inputs: [a, b]}}
    as_it_is: {}
task.terms.features.weight: {min: 1.0, max: 16, log: true, when: "terms == 'kl_and_features'"}
task.terms.kl: [{loss: dkd, weight: 2}, {loss: kl, weight: 2}]
augment.flip: [true, 1, 1.0, "1", null, [1, 2], {a: 1}]
"""
SPEC = yaml.safe_load(TEXT)


@pytest.fixture(scope="module")
def space() -> Space:
    return Space.parse(SPEC, BASE)


def typed(point):
    """True, 1 and 1.0 are equal to Python."""
    return json.dumps(point, sort_keys=True)


def random_points(space: Space, count: int = 200, sampler=None):
    """(point, trial) of a study that asks and tells."""
    study = optuna.create_study(sampler=sampler or optuna.samplers.RandomSampler(seed=1))
    for i in range(count):
        trial = study.ask()
        point = space.suggest(trial)
        yield point, study.tell(trial, float(i % 7))


def refuse_unless_inside(space: Space, point):
    """`complete` is the judge of a whole point; it must also give the same back."""
    assert typed(space.complete(point, "search.points[0]")) == typed(point)


def test_what_is_parsed(space):
    kinds = {n: v.kind for n, v in space.variables.items()}
    assert list(kinds) == list(SPEC)
    assert list(kinds.values()) == [
        "float", "float", "int", "int", "choice", "choice", "int", "options", "float", "choice", "choice",
    ]  # fmt: skip
    shown = {n: v.shown() for n, v in space.variables.items()}
    assert shown["optimizer.lr"] == "0.0001 … 0.01 (log)"
    assert shown["optimizer.weight_decay"] == "0 … 0.3 (steps of 0.1)"
    assert shown["loop.batch_size"] == "16 … 64 (steps of 16)", "the last one on the grid"
    assert shown["model.kwargs.depth"] == "2 … 4"
    assert shown["model.kwargs.width"] == "32 | 64 | null"
    assert shown["terms"] == "kl | kl_and_features | as_it_is"
    assert space.variables["terms"].keys() == ("task.terms.features",)
    assert space.keys() == {*SPEC, "task.terms.features"} - {"terms"}
    assert isinstance(space.variables["model.kwargs.width"].when, Expression)
    assert space.variables["model.name"].when is None


@pytest.mark.parametrize(
    "sampler",
    [
        lambda: optuna.samplers.RandomSampler(seed=0),
        lambda: optuna.samplers.TPESampler(seed=0, n_startup_trials=10),
        lambda: optuna.samplers.TPESampler(
            seed=0, n_startup_trials=10, multivariate=True, group=True
        ),
    ],
    ids=["random", "tpe", "group"],
)
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_points_and_optunas_params_are_the_same_thing(space, sampler):
    again = optuna.create_study()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(step|Choices).*")  # Optuna's of our spaces
        for point, trial in random_points(space, 80, sampler()):
            params = space.params(point)
            assert params.keys() == trial.params.keys() == point.keys()
            for name, kept in trial.params.items():
                assert params[name] == pytest.approx(kept)
                assert type(params[name]) is type(kept)
            assert typed(space.point_of(params)) == typed(point)
            assert typed(space.point_of(trial.params)) == typed(point)
            assert typed(space.point_of(json.loads(json.dumps(params)))) == typed(point)
            assert space.distributions(point) == trial.distributions
            again.add_trial(
                optuna.create_trial(
                    params=params, distributions=space.distributions(point), value=1.0
                )
            )
            refuse_unless_inside(space, point)
            assert typed(json.loads(json.dumps(point))) == typed(point)
    assert len(again.trials) == 80


def test_a_study_in_a_file_gives_the_points_back(space, tmp_path):
    url = f"sqlite:///{tmp_path}/study.db"
    study = optuna.create_study(storage=url, study_name="s")
    points = []
    for _ in range(8):
        trial = study.ask()
        points.append(space.suggest(trial))
        study.tell(trial, 0.0)
    stored = optuna.load_study(storage=url, study_name="s").trials
    assert [typed(space.point_of(t.params)) for t in stored] == [typed(p) for p in points]


def test_every_value_is_reached_and_on_its_grid(space):
    seen: dict[str, set] = {}
    for point, _ in random_points(space, 400):
        for name, value in point.items():
            seen.setdefault(name, set()).add(json.dumps(value))
    assert seen["optimizer.weight_decay"] == {"0.0", "0.1", "0.2", "0.3"}, "no 0.30000000000000004"
    assert seen["loop.batch_size"] == {"16", "32", "48", "64"}
    assert seen["model.kwargs.depth"] == {"2", "3", "4"}
    assert seen["augment.flip"] == {"true", "1", "1.0", '"1"', "null", "[1, 2]", '{"a": 1}'}
    assert all(isinstance(json.loads(v), int) for v in seen["loop.epochs"])


def test_where_when_does_not_hold_the_variable_is_absent(space):
    kinds = set()
    for point, _ in random_points(space):
        width = point.get("model.kwargs.width", "absent")
        assert (width != "absent") == (point["model.name"] == "resnet18")
        assert ("model.kwargs.depth" in point) == (width == 64)
        assert ("task.terms.features.weight" in point) == (point["terms"] == "kl_and_features")
        assert list(point) == [n for n in SPEC if n in point], "in order"
        kinds.add((width, point["terms"]))
    assert len(kinds) == 12


def test_when_reads_the_base_config():
    spec = {"optimizer.lr": {"min": 0.1, "max": 1.0, "when": "loop.epochs > 3 and model.kwargs == null"}}  # fmt: skip
    for kwargs, count in ((None, 1), (3, 0)):
        space = Space.parse(spec, {"loop.epochs": 5, "model.kwargs": kwargs})
        assert len(space.suggest(optuna.create_study().ask())) == count


def test_overrides_expand_options_in_order(space):
    point = {
        "task.terms.features.weight": 4.0,  # a point's own order does not count
        "terms": "kl_and_features",
        "optimizer.lr": 0.001,
    }
    assert list(space.overrides(point).items()) == [
        ("optimizer.lr", 0.001),
        ("task.terms.features", {"loss": "feature_cosine", "inputs": ["a", "b"]}),
        ("task.terms.features.weight", 4.0),
    ]
    assert space.overrides({"terms": "kl"}) == {"task.terms.features": None}
    assert space.overrides({"terms": "as_it_is"}) == {}


def test_values_are_the_config_as_expressions_see_it(space):
    seen = space.values({"terms": "kl_and_features", "task.terms.features.weight": 4.0, "model.kwargs.width": 64})  # fmt: skip
    assert seen["task.terms.features.loss"] == "feature_cosine"
    assert "task.terms.features.scope" not in seen, "the base's went with its mapping"
    assert seen["task.terms.features.weight"] == 4.0
    assert seen["task.terms.features"]["weight"] == 4.0, "the whole has the later override too"
    assert seen["terms"] == "kl_and_features"
    assert seen["model.kwargs"] == {"width": 64}
    assert seen["optimizer.lr"] == 1e-3, "the base's"

    seen = space.values({"terms": "kl"})
    assert seen["task.terms.features"] is None
    assert "task.terms.features.loss" not in seen
    assert seen["task.terms.features.weight"] is None
    assert seen["model.kwargs.width"] is None, "neither the point nor the base sets it"

    seen = space.values({"terms": "as_it_is"})
    assert seen["task.terms.features"] == {"loss": "feature_mse", "scope": "sample"}
    assert seen["task.terms.features.loss"] == "feature_mse"
    assert space.values({})["terms"] is None

    condition = Expression(
        "terms == 'kl' or task.terms.features.weight < 2", "search.conditions[0]"
    )
    assert [condition.holds(space.values(p)) for p, _ in random_points(space, 50) if p["terms"] != "as_it_is"]  # fmt: skip


def test_what_is_handed_out_is_the_callers_own(space):
    before = typed(space.overrides({"terms": "kl_and_features"}))
    for point, _ in random_points(space, 30):
        for value in (*space.overrides(point).values(), *point.values()):
            if isinstance(value, dict):
                value["spoilt"] = 1
            elif isinstance(value, list):
                value.append("spoilt")
    assert typed(space.overrides({"terms": "kl_and_features"})) == before
    assert all("spoilt" not in typed(p) for p, _ in random_points(space, 30))
    spec = copy.deepcopy(SPEC)
    parsed = Space.parse(spec, BASE)
    spec["terms"]["options"]["kl"]["task.terms.features"] = 3
    assert parsed.overrides({"terms": "kl"}) == {"task.terms.features": None}


def test_it_travels_to_a_worker(space):
    there = pickle.loads(pickle.dumps(space))
    point = space.suggest(optuna.create_study().ask())
    assert there.values(point) == space.values(point)


def test_nothing_slow_is_imported():
    code = (
        "import sys, potstill.search_space;"
        "print(sorted({'optuna', 'ray', 'torch', 'hydra'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# known good points


def good_point():
    return {
        "optimizer.lr": "1e-3",  # as YAML 1.1 reads it
        "optimizer.weight_decay": 0.30000000000000004,
        "loop.batch_size": 32.0,
        "loop.epochs": 3,
        "model.name": "resnet18",
        "model.kwargs.width": 32,
        "terms": "kl",
        "task.terms.kl": {"weight": 2, "loss": "kl"},
        "augment.flip": 1,
    }


def test_a_known_point_is_read(space):
    point = space.complete(good_point(), "search.points[0]")
    assert typed(point) == typed(
        good_point() | {"optimizer.lr": 1e-3, "optimizer.weight_decay": 0.3, "loop.batch_size": 32}
    )
    refuse_unless_inside(space, point)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"optimizer.lrr": 1}, r"must be over variables of search.space, got 'optimizer.lrr'; did you mean optimizer.lr"),
        ({"optimizer.lr": None}, r"\.optimizer\.lr must be a number in 0.0001 … 0.01 \(log\), got None; change it"),
        ({"optimizer.lr": 0.1}, r"\.optimizer\.lr must be a number in .*, got 0.1; .* range of search.space.optimizer.lr"),
        ({"optimizer.lr": "fast"}, r"\.optimizer\.lr must be a number"),
        ({"optimizer.lr": True}, r"\.optimizer\.lr must be a number"),
        ({"optimizer.lr": math.nan}, r"\.optimizer\.lr must be a number"),
        ({"optimizer.weight_decay": 0.25}, r"must be a number in 0 … 0.3 \(steps of 0.1\), got 0.25"),
        ({"loop.batch_size": 40}, r"must be a whole number in 16 … 64 \(steps of 16\), got 40"),
        ({"loop.batch_size": 80}, "must be a whole number in"),
        ({"loop.epochs": 2.000001}, "must be a whole number in"),
        ({"loop.epochs": 2.5}, "must be a whole number in"),
        ({"model.name": "resnet19"}, r"must be one of mobilenetv3_small_050 \| resnet18, got 'resnet19'; choose one, or add"),
        ({"augment.flip": False}, "must be one of"),
        ({"augment.flip": [2, 1]}, "must be one of"),
        ({"terms": None}, r"terms must be one of kl \| kl_and_features"),
        ({"task.terms.features.weight": 2}, r"features.weight must be left out where .*kl_and_features.* does not hold, got 2; remove it"),
        ({"model.kwargs.width": 64}, r"model.kwargs.depth must be given, got nothing; add a value in 2 … 4"),
        ({"terms": "kl_and_features"}, r"task.terms.features.weight must be given"),
    ],
)  # fmt: skip
def test_a_known_point_that_is_not_in_the_space(space, change, said):
    with pytest.raises(UserError, match=said) as refused:
        space.complete({**good_point(), **change}, "search.points[3]")
    assert str(refused.value).startswith("search.points[3]")


def test_a_known_point_must_be_a_mapping_of_all(space):
    with pytest.raises(UserError, match=r"search.points\[0\] must be a mapping"):
        space.complete([1], "search.points[0]")
    with pytest.raises(UserError, match=r"search.points\[0\].optimizer.lr must be given"):
        space.complete({}, "search.points[0]")


def test_trials_of_another_space_are_refused(space):
    for params, said in (
        ({"gone": 1}, "an earlier trial must be over variables of search.space, got 'gone'"),
        ({"optimizer.lr": 5.0}, "search.space.optimizer.lr must be a number in"),
        ({"model.name": "vit"}, "search.space.model.name must be one of"),
        ({"augment.flip": "#9"}, "go on with the space of the earlier trials"),
    ):
        with pytest.raises(UserError, match=said):
            space.point_of(params)
    with pytest.raises(UserError, match=r"search.space.model.name must be one of"):
        space.params({"model.name": "vit"})


# the population


def test_mutable_are_those_that_nothing_fixed_depends_on(space):
    everything = list(SPEC)
    assert space.mutable([]) == everything
    assert space.mutable(["data."]) == everything
    model = ["model.name", "model.kwargs.width", "model.kwargs.depth"]
    assert space.mutable(["model."]) == [n for n in everything if n not in model]
    # the weight's presence hangs on `terms`, and that sets what lies above it
    terms = ["terms", "task.terms.features.weight"]
    assert space.mutable(["task.terms.features."]) == [n for n in everything if n not in terms]
    spec = {
        "a": [1, 2],
        "b": {"values": [1, 2], "when": "a == 1"},
        "model": {"values": [{"name": "x"}, {"name": "y"}], "when": "b == 2"},
        "c": [1, 2],
    }
    assert Space.parse(spec, {}).mutable(["model."]) == ["c"]


def test_mutate_stays_in_the_space_and_changes_everything(space):
    rng = random.Random(0)
    point, _ = next(random_points(space, 1))
    seen: dict[str, set] = {n: set() for n in SPEC}
    for _ in range(1000):
        point = space.mutate(point, list(SPEC), rng)
        refuse_unless_inside(space, point)
        for name, value in point.items():
            seen[name].add(json.dumps(value))
    for name, variable in space.variables.items():
        assert len(seen[name]) == (variable.count or len(seen[name])), name
        assert len(seen[name]) > 1
    assert len(seen["optimizer.lr"]) > 500


def test_mutate_leaves_the_others_as_they_are(space):
    rng = random.Random(1)
    names = space.mutable(["model."])
    for point, _ in random_points(space, 100):
        before = typed(point)
        new = space.mutate(point, names, rng)
        assert typed(point) == before
        for name in set(SPEC) - set(names):
            assert typed(new.get(name, "absent")) == typed(point.get(name, "absent"))
        assert typed(space.mutate(point, [], rng)) == before


def test_what_becomes_active_is_drawn_and_what_does_not_leaves(space):
    rng = random.Random(2)
    came = left = 0
    for point, _ in random_points(space, 200):
        new = space.mutate(point, ["terms"], rng, resample=1.0)
        refuse_unless_inside(space, new)
        came += new.keys() > point.keys()
        left += new.keys() < point.keys()
    assert came > 10
    assert left > 10


def test_a_number_moves_by_a_fifth_or_by_a_step():
    spec = {
        "lr": {"min": 0.1, "max": 10.0},
        "low": {"min": -1.0, "max": 1.0, "step": 0.5},
        "size": {"min": 1, "max": 64},
        "choice": list(range(10)),
    }
    space, rng = Space.parse(spec, {}), random.Random(0)

    start = {"lr": 1.0, "low": 0.0, "size": 1, "choice": 0}
    for name, value, expected in (
        ("lr", 1.0, {0.8, 1.2}),
        ("lr", 9.0, {9.0 * 0.8, 10.0}),
        ("lr", 0.1, {0.1, 0.1 * 1.2}),
        ("low", 0.0, {-0.5, 0.5}),
        ("low", 1.0, {0.5, 1.0}),
        ("low", -0.5, {-1.0, 0.0}),
        ("size", 2, {1, 3}),
        ("size", 1, {1, 2}),
        ("size", 50, {40, 60}),
        ("size", 64, {51, 64}),
        ("choice", 5, {4, 5, 6}),
        ("choice", 0, {0, 1}),
        ("choice", 9, {8, 9}),
    ):
        draws = [space.mutate({**start, name: value}, [name], rng, resample=0) for _ in range(60)]
        assert {d[name] for d in draws} == expected, (name, value)


def test_drawn_anew_is_even_in_the_logarithm():
    spec = {
        "a": {"min": 1e-4, "max": 1.0, "log": True},
        "b": {"min": 1, "max": 100, "log": True},
        "c": {"min": 0.0, "max": 1.0},
    }
    space, rng = Space.parse(spec, {}), random.Random(0)
    draws = [space.mutate({}, [], rng) for _ in range(4000)]
    assert sum(d["a"] < 1e-2 for d in draws) / 4000 == pytest.approx(0.5, abs=0.03)
    expected = math.log(10.5 / 0.5) / math.log(100.5 / 0.5)
    assert sum(d["b"] <= 10 for d in draws) / 4000 == pytest.approx(expected, abs=0.03)
    assert sum(d["c"] < 0.3 for d in draws) / 4000 == pytest.approx(0.3, abs=0.03)
    assert {d["b"] for d in draws} >= {1, 2, 3}


# combinations


def test_finite_is_what_brute_force_finds(space):
    expected = []
    for name, width, depth in itertools.product(
        ["mobilenetv3_small_050", "resnet18"], [32, 64, None, "absent"], [2, 3, 4, "absent"]
    ):
        if (width != "absent") == (name == "resnet18") and (depth != "absent") == (width == 64):
            point = {"model.name": name, "model.kwargs.width": width, "model.kwargs.depth": depth}
            expected.append({k: v for k, v in point.items() if v != "absent"})
    found = space.finite(["model."], 100)
    assert found is not None
    assert sorted(map(typed, found)) == sorted(map(typed, expected))
    assert space.finite(["model."], len(expected)) == found
    assert space.finite(["model."], len(expected) - 1) is None


def test_finite_takes_along_what_a_condition_reads(space):
    found = space.finite(["model.kwargs.depth"], 100)
    assert found is not None
    assert {tuple(p) for p in found} == {
        ("model.name",),
        ("model.name", "model.kwargs.width"),
        ("model.name", "model.kwargs.width", "model.kwargs.depth"),
    }


def test_finite_of_numbers(space):
    assert space.finite(["optimizer.lr"], 100) is None, "continuous"
    assert space.finite(["task.terms.features"], 100) is None, "its weight is"
    grid = space.finite(["optimizer.weight_decay", "loop.batch_size"], 100)
    assert grid == [
        {"optimizer.weight_decay": w, "loop.batch_size": b}
        for w in (0.0, 0.1, 0.2, 0.3)
        for b in (16, 32, 48, 64)
    ]
    assert space.finite(["data."], 100) == [{}]
    large = Space.parse({"a": {"min": 0, "max": 10**12}, "b": {"min": 0, "max": 10**12}}, {})
    assert large.finite([""], 1000) is None, "without building them all"


# what is refused


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        (0.1, "search.space.x must be a list of choices or a mapping .*, got 0.1; what does not vary"),
        ({}, "search.space.x must be a list of choices or"),
        ({"step": 1}, "search.space.x must be a list of choices or"),
        ([], "search.space.x must be a list with at least one choice"),
        ({"values": []}, "search.space.x must be a list with at least one choice"),
        ({"values": "ab"}, "search.space.x must be a list with at least one choice"),
        ([1, 2, 1], "search.space.x must be different from each other, got 1 at 0 and 2; remove one"),
        ([{"a": 1, "b": 2}, {"b": 2, "a": 1}], "search.space.x must be different"),
        ([math.nan], "search.space.x must be plain values"),
        ([{1: 2}], "search.space.x must be plain values"),
        (yaml.safe_load("[2020-01-01]"), "search.space.x must be plain values.*quotes"),
        ({"min": 1, "max": 2, "mx": 3}, "search.space.x must be given by min, max, .*, got 'mx'; did you mean max"),
        ({"values": [1], "min": 1}, "search.space.x must be given by values, when only, got 'min'"),
        ({"options": {"a": {}}, "values": [1]}, "must be given by options, when only, got 'values'"),
        ({"min": 1}, "search.space.x.max must be a finite number, got None"),
        ({"min": "low", "max": 2}, "search.space.x.min must be a finite number, got 'low'; choices"),
        ({"min": True, "max": 2}, "search.space.x.min must be a finite number, got True"),
        ({"min": 1, "max": math.nan}, "search.space.x.max must be a finite number, got nan"),
        ({"min": 1, "max": "inf"}, "search.space.x.max must be a finite number"),
        ({"min": 1, "max": 10**400}, "search.space.x.max must be a finite number"),
        ({"min": 1, "max": 1}, r"search.space.x.max must be larger than min \(1\), got 1; raise it, or set"),
        ({"min": 2.0, "max": 1}, "search.space.x.max must be larger than min"),
        ({"min": 0, "max": 1, "log": True}, "search.space.x.min must be > 0 with log: true, got 0; raise"),
        ({"min": 1, "max": 2, "log": "yes"}, "search.space.x.log must be true or false, got 'yes'"),
        ({"min": 1, "max": 9, "log": True, "step": 2}, "search.space.x.step must be left out with log"),
        ({"min": 1.0, "max": 9, "log": True, "step": 1}, "search.space.x.step must be left out with log"),
        ({"min": 1, "max": 9, "step": 0}, "search.space.x.step must be > 0, got 0"),
        ({"min": 1, "max": 9, "step": -1.0}, "search.space.x.step must be > 0"),
        ({"min": 1, "max": 9, "step": 8.5}, r"search.space.x.step must be at most max - min \(8\), got 8.5"),
        ({"min": 1, "max": 9, "step": "big"}, "search.space.x.step must be a finite number"),
        ({"options": {}}, "search.space.x.options must be a mapping of labels"),
        ({"options": ["a"]}, "search.space.x.options must be a mapping of labels"),
        ({"options": {True: {}}}, "search.space.x.options must be labelled by texts, got True; put it in quotes"),
        ({"options": {"a": None}}, "search.space.x.options.a must be a mapping of config keys to values, got None; {} sets none"),
        ({"options": {"a": {"k..l": 1}}}, "search.space.x.options.a must be named by a dotted config key"),
        ({"options": {"a": {"k": 1}, "b": {"k": 1}}}, "search.space.x.options must be different from each other.*a and b"),
        ({"options": {"a": {"k": {1, 2}}}}, "search.space.x.options must be plain values"),
        ({"options": {"a": {"x": 1}}}, "search.space.x must be no config key"),
        ({"options": {"a": {"k.l": 1, "k": {}}}}, "search.space.x.options.a must be before what lies below it, got k after k.l"),
        ({"options": {"a": {"k": 1, "k.l": 1}}}, "search.space.x.options.a must be below no key that gets no mapping"),
        ({"values": [1], "when": True}, "search.space.x.when must be an expression in quotes, got True"),
        ({"values": [1], "when": "import os"}, "search.space.x.when must be an expression that can be read"),
        ({"values": [1], "when": "lr.basee > 1"}, "search.space.x.when must be over variables before it or keys .*, got lr.basee; did you mean lr.base"),
        ({"values": [1], "when": "x > 1"}, "search.space.x.when must be over variables before it .*, got x, which x sets; leave it out"),
    ],
)  # fmt: skip
def test_what_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        Space.parse({"x": spec}, {"lr.base": 1})


@pytest.mark.parametrize("space", [None, {}, [], "x", [{"a": [1]}]])
def test_no_space_is_refused(space):
    with pytest.raises(UserError, match=r"search.space must be a mapping with at least one"):
        Space.parse(space, {})


@pytest.mark.parametrize("name", ["", "a..b", ".a", "a b", 3, None])
def test_names_that_are_no_keys_are_refused(name):
    with pytest.raises(UserError, match=r"search\.space\..* must be named by a dotted config key"):
        Space.parse({name: [1, 2]}, {})


@pytest.mark.parametrize(
    ("space", "said"),
    [
        (
            {"o": {"options": {"p": {"a": 1}}}, "a": [1, 2]},
            "search.space.a must be over keys of its own, got a, which o sets too; let one",
        ),
        (
            {"o": {"options": {"p": {"a": 1}}}, "q": {"options": {"p": {"a": 1}}}},
            "search.space.q must be over keys of its own, got a, which o sets too",
        ),
        (
            {"a.b": [1, 2], "a": [{"b": 1}, {"b": 2}]},
            "search.space.a must be before what lies below it, got a after a.b; declare a first",
        ),
        (
            {"a": [1, 2], "a.b": [1, 2]},
            "search.space.a.b must be below no key that gets no mapping, got a.b below a",
        ),
        (
            {"a": {"min": 1, "max": 2}, "a.b": [1, 2]},
            "search.space.a.b must be below no key that gets no mapping",
        ),
        (
            {"a": [None, {"b": 1}], "a.b": [1, 2]},
            "search.space.a.b must be given a `when`, because a is not always a mapping",
        ),
        (
            {"a": {"values": [1, 2], "when": "b == 1"}, "b": [1, 2]},
            "search.space.a.when must be over variables before it .*, got b, which b sets; declare a after b",
        ),
        (
            {"a": {"values": [1, 2], "when": "base.k == 1"}, "o": {"options": {"p": {"base": {"k": 2}}}}},
            "search.space.a.when must be over variables before it .*, got base.k, which o sets",
        ),
        ({"base.k": {"options": {"p": {}}}}, "search.space.base.k must be no config key"),
        ({"a": [1], "o": {"options": {"p": {"o.a": 1, "o": 2}}}}, "search.space.o must be no config key"),
    ],
)  # fmt: skip
def test_variables_that_do_not_go_together(space, said):
    with pytest.raises(UserError, match=said):
        Space.parse(space, {"base.k": 1})


def test_what_goes_together():
    """Neighbouring names, mappings with what lies below them, and a bundle named as a part of the config."""
    spec = {
        "a": [{"b": 1}, {"b": 2, "c": {"d": 1}}],
        "a.b": [3, 4],
        "ab": [1, 2],
        "model": {"options": {"p": {"model.name": "x"}, "q": {"m": {}, "m.n": 1}}},
        "z": {"values": [1, 2], "when": "model == 'p' and a.b == 3 and ab == 1"},
    }
    space = Space.parse(spec, {"model.name": "y"})
    assert space.overrides({"a": {"b": 1}, "a.b": 3}) == {"a": {"b": 1}, "a.b": 3}
    seen = space.values({"a": {"b": 2, "c": {"d": 1}}, "a.b": 4, "model": "q"})
    assert (seen["a.b"], seen["a.c.d"], seen["m.n"], seen["model.name"]) == (4, 1, 1, "y")
    assert seen["a"] == {"b": 4, "c": {"d": 1}}


def test_an_absent_bundle_is_null_to_later_conditions():
    spec = {
        "on": [True, False],
        "o": {"options": {"p": {"k": 1}, "q": {}}, "when": "on"},
        "x": {"values": [1, 2], "when": "o == 'p'"},
        "y": {"values": [1, 2], "when": "x == null"},
    }
    space = Space.parse(spec, {})
    found = space.finite([""], 99)
    assert found is not None
    assert [tuple(p) for p in found] == [("on", "o", "x")] * 2 + [("on", "o", "y")] * 2 + [("on", "y")] * 2  # fmt: skip


@pytest.mark.parametrize(
    ("values", "labels"),
    [
        ([1, 2.5, "a", None, True], ["#0", "#1", "#2", "#3", "#4"]),  # True == 1
        ([0, 2, "a", None, True], [0, 2, "a", None, True]),
        ([1, 1.0], ["#0", "#1"]),
        ([0, False], ["#0", "#1"]),
        (["#1", {"a": 1}], ["#0", "#1"]),
        (["x", {"a": 1}, None, [1]], ["x", "#1", None, "#3"]),
    ],
)
def test_how_optuna_keeps_choices(values, labels):
    space = Space.parse({"x": values}, {})
    for value, label in zip(values, labels, strict=True):
        assert typed(space.params({"x": value})) == typed({"x": label})
        assert typed(space.point_of({"x": label})) == typed({"x": value})


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        ({"min": 1, "max": 4}, "int"),
        ({"min": "1", "max": 4, "step": None}, "int"),
        ({"min": 1, "max": 4, "step": 1, "log": True}, "int"),
        ({"min": 1, "max": 4.0}, "float"),
        ({"min": 1, "max": 4, "step": 0.5}, "float"),
        ({"min": "1e0", "max": 4}, "float"),
    ],
)
def test_whole_numbers_only_where_all_are(spec, kind):
    assert Space.parse({"x": spec}, {}).variables["x"].kind == kind
