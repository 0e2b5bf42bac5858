"""What a search is, its record and its proposals; Ray prepares a set of images, and no more."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml

from conftest import COLOURS, run_job, tiny_overrides
from potstill import runs
from potstill.assemble import build_training
from potstill.config import Config, compose, differing_keys
from potstill.data.prepare import check, prepare
from potstill.errors import UserError
from potstill.search import _Search
from potstill.search_plan import (
    Ledger,
    Proposer,
    Refused,
    SearchPlan,
    config_of_trial,
    curve_of,
    data_key,
    trial_name,
)
from potstill.search_results import TrialResult
from potstill.search_winners import write_experiments
from potstill.sessions import JournalSession

LR = {"min": 1e-4, "max": 1e-1, "log": True}
CLASSES = sorted(COLOURS)
SMALL = [
    *("plugins=[search_parts]", "model=plugin", "model._target_=few_weights"),
    *("loop.batch_size=24", "optimizer.lr=1e-2"),
]


@pytest.fixture
def given(tiny_tree: Path, cache_dir: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """`given({"space": …}, "loop.epochs=3")`: what is written after jobs/tune.py; the search is in a file of its own."""

    def make(search: dict[str, Any], *overrides: str) -> list[str]:
        about = {"algorithm": "random", "scheduler": "none", **search}
        path = tmp_path / "conf" / "search" / "own.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = yaml.safe_dump({"search": about}, sort_keys=False, allow_unicode=True)
        path.write_text(f"# @package _global_\n{text}")
        places = tiny_overrides(tiny_tree, cache_dir, tmp_path / "runs")
        ours = ("model.", "loop.batch", "optimizer.")
        if any(o.startswith("stages=") for o in overrides):
            ours += ("loop.epochs",)
        small = [o for o in places if not o.startswith(ours)]
        return ["--config-dir", str(tmp_path / "conf"), "search=own", *small, *SMALL, *overrides]

    return make


@pytest.fixture
def config(given) -> Callable[..., Config]:
    def make(search: dict[str, Any], *overrides: str) -> Config:
        _, conf, *rest = given(search, *overrides)
        return compose("tune", rest, conf)

    return make


@pytest.fixture
def plan(config) -> Callable[..., SearchPlan]:
    def make(search: dict[str, Any], *overrides: str) -> SearchPlan:
        made = SearchPlan(config(search, *overrides))
        for point in made.space.finite(("data.",), 16) or [{}]:
            one = made.config_of(point)
            made.sets[data_key(one)] = check(one.data, one.cache)
        return made

    return make


def refused(plan: SearchPlan, point: dict[str, Any]) -> str:
    with pytest.raises(Refused) as caught:
        plan.admit(point)
    return str(caught.value)


# ----------------------------------------------------------------------------------------- what is refused
@pytest.mark.parametrize(
    ("search", "overrides", "said"),
    [
        ({"space": {}}, [], r"search\.space must have at least one key, got none; use search=quickstart"),
        (
            {"space": {"optimizer.lrr": LR}},
            [],
            r"search\.space\.optimizer\.lrr is not a key of a training's config; did you mean optimizer\.lr\?",
        ),
        ({"space": {"run.name": ["a", "b"]}}, [], r"search\.space\.run\.name must be a key that a result depends on"),
        ({"space": {"cache.format": ["raw", "jpeg"]}}, [], r"search\.space\.cache\.format must be a key that a result"),
        ({"space": {"scaling.num_workers": [1, 2]}}, [], r"search\.space\.scaling\.num_workers must be a key that"),
        ({"space": {"tracking.name": ["aim", "none"]}}, [], r"search\.space\.tracking\.name must be a key that"),
        ({"space": {"loop.epochs": [1, 2]}}, [], r"search\.space\.loop\.epochs cannot be searched: .*set search\.epochs"),
        ({"space": {"loop.monitor": ["val_loss"]}}, [], r"search\.space\.loop\.monitor cannot be searched"),
        (
            {"space": {"optimizer.lr": LR}, "objectives": ["parameters"]},
            [],
            r"search\.objectives must have a metric of validation, such as val_top1_acc, got parameters",
        ),
        (
            {"space": {"optimizer.lr": LR}, "objectives": ["accuracy"]},
            [],
            r"search\.objectives must be of parameters, .*got 'accuracy'",
        ),
        (
            {"space": {"optimizer.lr": LR}, "objectives": ["val_acu"]},
            [],
            r"search\.objectives must be of .*got 'acu'; did you mean auc\?",
        ),
        (
            {"space": {"model.channels": [4, 8]}, "scheduler": "pbt"},
            [],
            r"search\.scheduler=pbt needs numbers that may change while a model trains .*got model\.channels",
        ),
        (
            {"space": {"augment.image_px": {"min": 16, "max": 32, "step": 8}}, "scheduler": "pbt"},
            [],
            r"search\.scheduler=pbt needs numbers",
        ),
        (
            {"space": {"optimizer.lr": LR}, "epochs": 2},
            ["stages=[{epochs: 1}, {epochs: 2}]"],
            r"search\.epochs must be null with stages, got 2",
        ),
        (
            {"space": {"optimizer.lr": LR}, "points": [{"optimizer.lr": 7.0}]},
            [],
            r"search\.points\[0\]\.optimizer\.lr must be a number in .*got 7",
        ),
        (
            {"space": {"optimizer.lr": LR}, "conditions": ["optimizer.lrr < 1"]},
            [],
            r"search\.conditions\[0\].*optimizer\.lrr.*did you mean optimizer\.lr",
        ),
        (
            {"space": {"optimizer.lr": LR}, "constraints": ["paramters <= 1e6"]},
            [],
            r"search\.constraints\[0\].*paramters.*did you mean parameters",
        ),
    ],
)  # fmt: skip
def test_a_search_that_cannot_be_is_refused(config, search, overrides, said):
    with pytest.raises(UserError, match=said):
        SearchPlan(config(search, *overrides))


@pytest.mark.parametrize(
    ("search", "said"),
    [
        (
            {"space": {"data.split.val": {"min": 0.1, "max": 0.4}}},
            r"at most 16 sets of data\.\*, and from lists",
        ),
        ({"space": {"data.split.seed": list(range(17))}}, r"at most 16 sets of data"),
        (
            {"space": {"augment.color": [0.0, 0.2]}, "soft_labels": True},
            r"search\.space\.augment\.color cannot be searched with search\.soft_labels=true",
        ),
        ({"space": {"loop.batch_size": [500]}, "points": [{"loop.batch_size": 500}]}, r"loop\.batch_size must be <="),
    ],
)  # fmt: skip
def test_what_the_data_are_needed_to_refuse(config, search, said):
    with pytest.raises(UserError, match=said):
        _Search(SearchPlan(config(search)))


def test_by_command_line_one_message_and_no_traceback(given, tmp_path):
    wrong = given({"space": {"optimizer.lrr": LR}})
    env_dir = Path(__file__).parent  # the plug-in's, too: it is looked for in the current folder
    done = run_job("tune", *wrong, cwd=env_dir)
    assert done.returncode == 2
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: search.space.optimizer.lrr is not a key of a training's config")
    assert not (tmp_path / "runs").exists()


def test_another_search_in_the_same_folder_is_refused_and_named(config):
    about = {"space": {"optimizer.lr": LR}, "num_samples": 3}
    first = SearchPlan(config(about, "run.name=here"))
    first.write_identity({"git_commit": "abc"})
    kept = (first.folder / "search.json").read_text()
    more = {**about, "num_samples": 9, "max_hours": 2.0, "retrain_best": 1, "silent_minutes": 5}
    SearchPlan(config(more, "run.name=here", "tracking=none")).write_identity({})
    assert (first.folder / "search.json").read_text() == kept
    other = {**about, "seed": 4}
    with pytest.raises(UserError) as caught:
        SearchPlan(config(other, "run.name=here", "loop.batch_size=12")).write_identity({})
    said = str(caught.value)
    assert said.startswith("run.name: here is another search (")
    assert "base.loop.batch_size: 24 -> 12" in said
    assert "search.seed: 0 -> 4" in said
    assert (first.folder / "search.json").read_text() == kept


def test_a_searchs_own_folder_is_named_by_what_its_trials_depend_on(config):
    about = {"space": {"optimizer.lr": LR}}
    names = [
        SearchPlan(config({**about, **changes}, *overrides)).folder.name
        for changes, overrides in (
            ({}, []),
            ({"num_samples": 40}, ["run.tags=[a]"]),
            ({"seed": 1}, []),
            ({}, ["optimizer.weight_decay=0.2"]),
        )
    ]
    assert names[0] == names[1]
    assert len(set(names)) == 3
    assert all(n.startswith("search-own-") for n in names)


# ------------------------------------------------------------------------------------------- one trial
def test_the_config_of_a_trial(plan):
    made = plan(
        {
            "space": {
                "optimizer.lr": LR,
                "size": {"options": {"s": {"model.channels": 2}, "l": {"model.channels": 8}}},
                "task.terms.further": [
                    None,
                    {"loss": "cross_entropy", "inputs": ["logits", "label"]},
                ],
            },
            "epochs": 4,
            "objectives": ["val_auc"],
        },
        *("loop.epochs=40", "schedule.warmup_epochs=5", "run.tags=[spring]", "run.name=s"),
    )
    term = {"loss": "cross_entropy", "inputs": ["logits", "label"]}
    point = {"optimizer.lr": 3e-3, "size": "l", "task.terms.further": term}
    trained = made.placed(made.config_of(point), 7)
    assert (trained.optimizer.lr, trained.model["channels"]) == (3e-3, 8)
    assert (trained.loop.epochs, trained.schedule.warmup_epochs) == (4, 2)
    assert trained.loop.monitor == "val_auc"
    assert trained.task["metrics"] == ["auc"]
    assert set(trained.task["terms"]) == {"task", "further"}
    assert set(made.config_of({**point, "task.terms.further": None}).task["terms"]) == {"task"}
    assert (trained.run.name, trained.run.tags) == ("trial-0007", ["spring", "search:s"])
    assert trained.runs.dir == str(made.folder / "trials")
    assert trained.search.space == {}
    assert made.base["optimizer"]["lr"] == 1e-2, "the base is left alone"


def test_conditions_and_constraints_prune_before_training(plan):
    made = plan(
        {
            "space": {"model.channels": [2, 4, 8], "optimizer.lr": [0.01, 0.1]},
            "conditions": ["model.channels < 8 or optimizer.lr < 0.05", "'features' in outputs"],
            "constraints": ["parameters <= 200", "val_top1_acc >= 30"],
        }
    )
    assert refused(made, {"model.channels": 8, "optimizer.lr": 0.1}) == (
        "condition: model.channels < 8 or optimizer.lr < 0.05"
    )
    assert (
        refused(made, {"model.channels": 8, "optimizer.lr": 0.01})
        == "constraint: parameters <= 200"
    )
    trained, measures = made.admit({"model.channels": 4, "optimizer.lr": 0.1})
    # 3x3x3 weights and a bias for each channel; each channel to 4 classes, and their biases
    assert measures["parameters"] == 4 * 28 + 4 * 4 + 4
    assert measures["macs"] == 16 * 16 * 4 * 27 + 4 * 4
    assert trained.model["channels"] == 4
    assert made.broken({**measures, "val_top1_acc": 30.0}) is None
    assert made.broken({**measures, "val_top1_acc": 29.9}) == "val_top1_acc >= 30"
    assert made.broken({**measures, "val_top1_acc": math.nan}) == "val_top1_acc >= 30"
    assert made.broken({**measures, "val_top1_acc": None}) == "val_top1_acc >= 30"


def test_a_constraint_on_a_metric_has_it_measured(plan):
    made = plan({"space": {"optimizer.lr": LR}, "constraints": ["val_auc >= 0.9"]})
    assert made.config_of({"optimizer.lr": 1e-3}).task["metrics"] == ["auc"]


def test_a_model_that_cannot_be_built_is_refused_with_its_reason(plan):
    made = plan({"space": {"model.channels": [4, 0], "model.widht": [1, 2]}})
    said = refused(made, {"model.channels": 4, "model.widht": 1})
    assert "model.widht is not a key of few_weights" in said


def test_a_term_on_what_a_students_model_does_not_return_is_refused(plan):
    term = {"loss": "feature_mse", "inputs": ["map", "features"], "weight": 1.0}
    made = plan({"space": {"task.terms.more": [None, term]}})
    made.admit({"task.terms.more": None})
    assert refused(made, {"task.terms.more": term}) == (
        "task.terms.more takes map, which few_weights does not return"
    )


@pytest.mark.parametrize(
    ("about", "cause"),
    [
        ({"constraints": ["parameters <= 10"]}, "constraint: parameters <= 10"),
        ({"conditions": ["model.channels > 4 and model.channels < 4"]}, "condition: model.channels > 4"),
    ],
)  # fmt: skip
def test_a_space_without_a_possible_trial_is_refused_with_the_cause(config, about, cause):
    made = SearchPlan(config({"space": {"model.channels": [2, 4, 8]}, **about}))
    made.folder.mkdir(parents=True)
    owner = _Search(made)
    with pytest.raises(UserError) as caught:
        owner.next_trial(2)
    assert "300 proposals in a row were refused, the last one for its " + cause in str(caught.value)
    assert owner.ledger.refused == owner.ledger.draws == 300
    assert not owner.ledger.trials
    assert not (made.folder / "trials").exists()
    refusals = [json.loads(x) for x in (made.folder / "journal.jsonl").read_text().splitlines()]
    assert {r["why"].partition(" and")[0] for r in refusals} == {cause}


def test_a_proposal_is_on_the_disk_before_its_trial_starts_and_refused_ones_have_no_folder(config):
    made = SearchPlan(
        config(
            {
                "space": {"model.channels": [2, 4, 8]},
                "constraints": ["parameters < 200"],
                "points": [{"model.channels": c} for c in (8, 4, 8, 2)],
                "num_samples": 2,
                "max_concurrent_trials": 2,
            }
        )
    )
    made.folder.mkdir(parents=True)
    owner = _Search(made)
    assert [owner.next_trial(2), owner.next_trial(2)] == [0, 1]
    found = Ledger.read(made.folder)
    assert [(t.number, t.state, t.point) for t in found.trials.values()] == [
        (0, "waiting", {"model.channels": 4}),
        (1, "waiting", {"model.channels": 2}),
    ]
    assert (found.draws, found.refused) == (4, 2)
    assert sorted(f.name for f in (made.folder / "trials").iterdir()) == [
        "trial-0000",
        "trial-0001",
    ]
    about = runs.read_json(made.folder / "trials" / "trial-0001" / "run.json")
    assert (about["search"]["number"], about["search"]["point"]) == (1, {"model.channels": 2})
    assert owner.next_trial(2) == "later", "two are under way"
    owner.live.clear()
    assert owner.next_trial(2) == 0, "those that wait go first"
    owner.live = {0: {}, 1: {}}
    assert owner.next_trial(3) == "over"


# --------------------------------------------------------------------------------------------- record
def test_the_ledger_says_the_same_when_it_is_read_again(tmp_path):
    ledger = Ledger(tmp_path)
    ledger.add("attempt", epochs=3, num_samples=3)
    ledger.add(
        "proposed", draw=0, number=0, point={"a": 1}, source="given", measures={"parameters": 9}
    )
    ledger.add("refused", draw=1, point={"a": 5}, why="constraint: parameters <= 10")
    ledger.add(
        "proposed", draw=2, number=1, point={"a": 2}, source="random", measures={"parameters": 9}
    )
    ledger.add("exploit", number=1, donor=0, point={"a": 3}, measures={"parameters": 12})
    about = {"values": {"val_loss": 0.5}, "epochs": 3, "seconds": 2.0, "feasible": True, "why": ""}
    ledger.add("trial", number=0, name="trial-0000", state="completed", **about)
    with open(tmp_path / "journal.jsonl", "a") as file:
        file.write('{"kind": "trial", "num')  # torn by a crash
    found = Ledger.read(tmp_path)
    assert found.trials == ledger.trials
    assert (found.draws, found.refused, found.sources) == (3, 1, {0: "given", 1: "random"})
    assert [t.number for t in found.ended()] == [0]
    assert [t.number for t in found.unfinished()] == [1]
    assert found.trials[0].values == {"parameters": 9, "val_loss": 0.5}
    assert found.trials[1].point == {"a": 3}
    assert (ledger.attempt, found.attempt) == (1, 2)
    steps = [
        json.loads(x)["step"] for x in (tmp_path / "journal.jsonl").read_text().splitlines()[:-1]
    ]
    assert steps == [0, 0, 0, 0, 0, 1]


# ------------------------------------------------------------------------------------------ proposals
SPACE = {
    "optimizer.lr": LR,
    "augment.flip": {"min": 0.0, "max": 1.0},
    "model.channels": [2, 4, 8],
}


def result(
    number: int, point: dict[str, Any], value: float | None, state: str = "completed", why: str = ""
):
    values = {"val_top1_acc": value, "parameters": 100}
    return TrialResult(number, trial_name(number), state, point, values, 3, 1.0, why)


@pytest.mark.parametrize("algorithm", ["random", "tpe", "nsga2"])
def test_draws_are_a_function_of_seed_and_place(plan, algorithm):
    made = plan({"space": SPACE, "algorithm": algorithm})
    first, second = Proposer(made), Proposer(made)
    some = [first.draw(i)[0] for i in range(4)]
    assert len({json.dumps(p) for p in some}) == 4
    assert [second.draw(i)[0] for i in (3, 1)] == [some[3], some[1]], "in whatever order"
    other = Proposer(plan({"space": SPACE, "algorithm": algorithm, "seed": 1}))
    assert other.draw(0)[0] != some[0]


def told(proposer: Proposer, count: int) -> list[TrialResult]:
    """Draw, take and end so many trials; the best have a rate near 1e-2. Every fifth proposal is refused."""
    found, place = [], 0
    while len(found) < count:
        point, asked = proposer.draw(place)
        place += 1
        if place % 5 == 0:
            proposer.given_back(asked)
            continue
        number = len(found)
        proposer.accepted(asked, number)
        value = 100 - 10 * abs(math.log10(point["optimizer.lr"]) + 2)
        found.append(result(number, point, value))
        proposer.ended(found[-1], {1: value / 2, 2: value})
    return found


def test_a_rebuilt_tpe_proposes_the_same_and_has_learned(plan):
    made = plan({"space": SPACE, "algorithm": "tpe", "num_samples": 16})
    live = Proposer(made)
    trials = told(live, 14)
    again = Proposer(made)
    for trial in trials:
        again.ended(trial, {})

    def drawn(proposer: Proposer) -> list[dict[str, Any]]:
        found = []
        for place in range(100, 130):
            point, asked = proposer.draw(place)
            proposer.given_back(asked)
            found.append(point)
        return found

    draws, blind = drawn(live), drawn(Proposer(made))
    assert draws == drawn(again)
    assert draws != blind

    def distance(points: list[dict[str, Any]]) -> float:
        return sum(abs(math.log10(p["optimizer.lr"]) + 2) for p in points) / len(points)

    assert distance(draws) < 0.6 * distance(blind), "it looks where it was good"


def test_what_the_proposer_makes_of_a_trials_end(plan):
    from optuna.trial import TrialState

    made = plan({"space": SPACE})
    proposer = Proposer(made)
    point = {"optimizer.lr": 1e-2, "augment.flip": 0.5, "model.channels": 4}
    nan = "the training loss is nan at step 3 (epoch 1); last good checkpoint: none yet"
    ends = [
        (result(0, point, 80.0), {1: 70.0, 2: 80.0}),
        (result(1, point, 60.0, "stopped early"), {1: 50.0, 2: 60.0, 3: math.nan}),
        (result(2, point, None, "failed", "RuntimeError: broken"), {}),
        (result(3, point, 90.0, "failed", "RuntimeError: broken"), {1: 90.0}),
        (result(4, point, None, "failed", nan), {}),
        (result(5, point, 99.0, "failed", nan), {1: 99.0}),
        (result(6, point, math.nan), {1: math.nan}),
        (result(7, point, None, "failed", "weights are NaN or infinite at step 3"), {}),
    ]
    for trial, curve in ends:
        proposer.ended(trial, curve)
    found = proposer.study.trials
    assert [t.state for t in found] == [TrialState.COMPLETE, *[TrialState.PRUNED] * 4], (
        "what broke teaches nothing"
    )
    assert [t.intermediate_values for t in found] == [{}, {1: 50.0, 2: 60.0}, {}, {}, {}]
    bad = [t.constraints for t in found]
    assert bad == [{}, {}, *[{"feasible": 1.0}] * 3], "what diverged is bad, not unknown"
    assert proposer.study.trials[0].values == [80.0]


def test_of_several_objectives_a_stopped_trial_counts_by_what_it_reached(plan):
    from optuna.trial import TrialState

    made = plan({"space": SPACE, "objectives": ["val_top1_acc", "parameters"]})
    proposer = Proposer(made)
    point, asked = proposer.draw(0)
    proposer.accepted(asked, 0)
    proposer.ended(result(0, point, 55.0, "stopped early"), {1: 55.0})
    proposer.ended(result(1, point, None, "failed", "weights are NaN or infinite"), {})
    given_back, stopped, diverged = proposer.study.trials
    assert given_back.state == TrialState.FAIL, "it was asked for; what became of it follows"
    assert (stopped.state, stopped.values) == (TrialState.COMPLETE, [55.0, 100.0])
    assert (diverged.state, diverged.constraints) == (TrialState.PRUNED, {"feasible": 1.0})
    assert [d.name for d in proposer.study.directions] == ["MAXIMIZE", "MINIMIZE"]


def test_tpe_does_not_propose_for_ever_what_is_refused(plan):
    space = {"model.channels": [2, 4, 8, 16], "optimizer.lr": LR}
    made = plan({"space": space, "objectives": ["val_top1_acc", "parameters"], "num_samples": 16})
    proposer = Proposer(made)
    for number in range(8):  # the more channels the better, and the largest are beyond a constraint
        point = {"model.channels": 4 if number % 2 else 2, "optimizer.lr": 1e-2 * (number + 1) / 8}
        proposer.ended(result(number, point, 50.0 + 10 * point["model.channels"]), {})
    admitted = 0
    for place in range(40):
        point, asked = proposer.draw(place)
        proposer.given_back(asked)
        if point["model.channels"] > 4:
            proposer.refused(point)
        else:
            admitted += 1
    assert admitted >= 20


def test_a_trial_that_went_anothers_way_is_told_where_it_ended(plan):
    made = plan({"space": SPACE, "scheduler": "pbt"})
    proposer = Proposer(made)
    point, asked = proposer.draw(0)
    proposer.accepted(asked, 0)
    moved = {**point, "optimizer.lr": 0.05}
    proposer.ended(result(0, moved, 70.0), {})
    first, second = proposer.study.trials
    assert first.state.name == "FAIL"
    assert (second.state.name, second.params["optimizer.lr"]) == ("COMPLETE", 0.05)


# --------------------------------------------------------------------------------------------- pbt
def test_which_settings_may_change_while_a_model_trains(plan):
    made = plan(
        {
            "space": {
                "optimizer.lr": LR,
                "optimizer.name": ["sgd", "adamw"],
                "task.terms.task.weight": {"min": 0.5, "max": 1.0},
                "augment.flip": {"min": 0.0, "max": 1.0},
                "augment.image_px": {"min": 16, "max": 32, "step": 8},
                "augment.views": {"min": 1, "max": 4, "step": 1},
                "loop.batch_size": {"min": 8, "max": 16, "step": 8},
                "model.channels": {"min": 2, "max": 8, "step": 2},
            },
            "scheduler": "pbt",
        }
    )
    assert made.mutable() == ["optimizer.lr", "task.terms.task.weight", "augment.flip"]


def test_adopted_weights_keep_the_receivers_settings(config, tmp_path, ray_session):
    """Model, optimizer's state and place are the donor's; learning rate, decay and momentum our own."""
    base = config({"space": {"optimizer.lr": LR}}, "optimizer.name=sgd", "schedule=constant")
    cache = prepare(base.data, base.cache).cache_dir
    done = {}
    for name, lr, decay, epochs in (("donor", 0.05, 0.1, 3), ("ours", 0.001, 0.0, 1)):
        one = SearchPlan(base).config_of({"optimizer.lr": lr})
        one.optimizer.weight_decay, one.loop.epochs = decay, epochs
        one.optimizer.momentum = 0.8 if name == "donor" else 0.5
        run_dir = tmp_path / name
        run_dir.mkdir()
        training, _ = build_training(one, cache, JournalSession(run_dir), torch.device("cpu"))
        training.run()
        done[name] = one
    donor, _ = runs.newest_checkpoint(tmp_path / "donor")
    assert donor is not None
    adopted = runs.adopt_checkpoint(tmp_path / "ours", donor, "trial-0001", 0.25)
    assert [f.name for f in (tmp_path / "ours" / "checkpoints").glob("step-*")] == [
        donor.folder.name
    ]
    assert adopted.meta["adopted"] == "trial-0001"
    best = adopted.meta["best"]
    assert (best["folder"], best["value"], best["epoch"]) == (donor.folder.name, 0.25, 3)
    assert (runs.best_checkpoint(tmp_path / "ours").step, donor.meta.get("adopted")) == (6, None)
    weights = donor.model_state()
    assert all(torch.equal(v, weights[k]) for k, v in adopted.model_state().items())
    assert adopted.model_state().keys() == weights.keys()

    ours = done["ours"]
    ours.loop.epochs = 4
    session = JournalSession(tmp_path / "ours")
    session.attempt = 2
    training, _ = build_training(ours, cache, session, torch.device("cpu"), 2)
    checkpoint, _ = session.resume_from()
    training._resume(checkpoint, [], {})
    assert all(torch.equal(v, weights[k]) for k, v in training.task.model.state_dict().items())
    theirs, mine = donor.state()["optimizer"], training.optimizer.state_dict()
    momenta = [s["momentum_buffer"] for s in theirs["state"].values()]
    assert momenta
    for a, b in zip(momenta, (s["momentum_buffer"] for s in mine["state"].values()), strict=True):
        assert torch.equal(a, b)
        assert a.abs().sum() > 0
    for mine_group, their_group in zip(mine["param_groups"], theirs["param_groups"], strict=True):
        assert (mine_group["lr"], mine_group["momentum"]) == (0.001, 0.5)
        assert (their_group["lr"], their_group["momentum"]) == (0.05, 0.8)
        assert mine_group["weight_decay"] == 0.0
    training, _ = build_training(ours, cache, session, torch.device("cpu"), 2)
    training.run()
    records = runs.read_journal(tmp_path / "ours")
    after = [r for r in records if r["attempt"] == 2]
    assert [r["epoch"] for r in after if r["kind"] == "epoch"] == [4]
    assert {r["lr"] for r in after if r["kind"] == "step"} == {0.001}
    # gone on with once more, it is an ordinary run: the settings are those it was saved with
    newest, _ = runs.newest_checkpoint(tmp_path / "ours")
    assert newest is not None
    assert (newest.step, newest.meta.get("adopted")) == (8, None)


# ------------------------------------------------------------------------------------------- its winners
def finished_search(made: SearchPlan, points: list[dict[str, Any]]) -> list[TrialResult]:
    """Folders of trials as a search writes them, without training them."""
    trials = []
    for number, point in enumerate(points):
        trained = made.placed(made.config_of(point), number)
        runs.atomic_write(
            made.folder / "trials" / trial_name(number) / "config.yaml",
            yaml.safe_dump(_plain(trained)),
        )
        trials.append(result(number, point, 50.0 + number))
    return trials


def _plain(config: Config) -> dict[str, Any]:
    from potstill.config import to_dict

    return to_dict(config)


def trained_again(made: SearchPlan, number: int, name: str = "best") -> tuple[Config, Config]:
    places = [
        f"runs.dir={made.folder.parent}",
        f"cache.dir={made.config.cache.dir}",
        "tracking=none",
    ]
    again = compose("train", [f"experiment={name}", *places], str(made.folder))
    return config_of_trial(made.folder, number), again


def test_the_winners_experiment_trains_as_it_is(plan):
    made = plan(
        {
            "space": {
                "optimizer.lr": LR,
                "model.note": ["a ${loop.epochs} b", "été – 木 = {x}, [y]"],
                "model.channels": [2, 8],
            },
            "epochs": 2,
        },
        *("loop.epochs=30", "schedule.warmup_epochs=4"),
    )
    points = [
        {"optimizer.lr": 0.012345678901234567, "model.note": note, "model.channels": 8}
        for note in ("a ${loop.epochs} b", "été – 木 = {x}, [y]")
    ]
    for count in (1, 2):
        trials = finished_search(made, points[:count])
        assert write_experiments(made, trials) == {}
        trial, again = trained_again(made, count - 1)
        assert differing_keys(trial, again) == [
            "loop.epochs: 2 -> 30",
            "schedule.warmup_epochs: 1.0 -> 4.0",
        ]
        assert again.model["note"] == points[count - 1]["model.note"]
        assert again.model["_target_"] == "few_weights"
        assert again.search.space == {}
        assert again.run.name is None


def test_the_front_has_an_experiment_each_and_old_ones_go(plan):
    made = plan(
        {
            "space": {"optimizer.lr": LR},
            "objectives": ["val_top1_acc", "parameters"],
            "num_samples": 3,
        }
    )
    trials = finished_search(made, [{"optimizer.lr": lr} for lr in (0.001, 0.002, 0.003)])
    for trial, parameters in zip(trials, (10, 20, 30), strict=True):
        trial.values["parameters"] = parameters
    assert list(write_experiments(made, trials)) == ["pareto-1", "pareto-2", "pareto-3"]
    trial, again = trained_again(made, 0, "pareto-3")
    assert (differing_keys(trial, again), again.optimizer.lr) == ([], 0.001)
    assert trained_again(made, 2, "best")[1].optimizer.lr == 0.003
    trials[2].values["parameters"] = 5  # it now beats them all
    assert list(write_experiments(made, trials)) == ["pareto-1"]
    names = sorted(f.name for f in (made.folder / "experiment").iterdir())
    assert names == ["best.yaml", "pareto-1.yaml"]


def test_the_experiment_of_a_distilled_student(plan, tmp_path):
    made = plan(
        {
            "space": {
                "task.terms.distil.weight": [{"schedule": "linear", "from": 2.0, "to": 0.2}, 0.5],
                "task.terms.features": [
                    None,
                    {
                        "loss": "feature_cosine",
                        "inputs": ["features", "teacher.features"],
                        "weight": 4.0,
                    },
                ],
                "task.terms.distil.temperature": {"min": 1.0, "max": 8.0},
            },
        },
        *("task=distil", f"teacher.run={tmp_path / 'a teacher'}"),
    )
    term = {"loss": "feature_cosine", "inputs": ["features", "teacher.features"], "weight": 4.0}
    falling = {"schedule": "linear", "from": 2.0, "to": 0.2}
    for features in (None, term):
        point = {
            "task.terms.distil.weight": falling,
            "task.terms.features": features,
            "task.terms.distil.temperature": 2.5,
        }
        trials = finished_search(made, [point])
        write_experiments(made, trials)
        trial, again = trained_again(made, 0)
        assert differing_keys(trial, again) == []
        assert again.teacher.run == str(tmp_path / "a teacher")
        assert again.task["terms"]["distil"]["weight"] == falling
        assert ("features" in again.task["terms"]) == (features is not None)


def test_the_curve_of_a_trial_is_its_own_last_way(tmp_path):
    for attempt, epochs in ((1, {1: 50.0, 2: 60.0}), (2, {2: 70.0})):
        start = 0 if attempt == 1 else 10
        runs.append_records(tmp_path, [{"kind": "attempt", "attempt": attempt, "step": start}])
        runs.append_records(
            tmp_path,
            [
                {"kind": "epoch", "attempt": attempt, "step": 10 * e, "epoch": e, "val_top1_acc": v}
                for e, v in epochs.items()
            ],
        )
    assert curve_of(tmp_path, "val_top1_acc") == {1: 50.0, 2: 70.0}


# ------------------------------------------------------------------------------------------- resources
@pytest.mark.parametrize(
    ("there", "settings", "workers", "expected"),
    [
        ({"CPU": 2.0}, {}, 1, ({"cpu": 1.0}, 2)),
        ({"CPU": 2.0}, {"cpus_per_trial": 2.0}, 1, ({"cpu": 2.0}, 1)),
        ({"CPU": 8.0}, {"max_concurrent_trials": 3}, 1, ({"cpu": 1.0}, 3)),
        ({"CPU": 8.0}, {}, 2, ({"cpu": 0, "memory": 1e6}, 4)),  # its workers hold the cores
        ({"CPU": 16.0, "GPU": 2.0}, {}, 1, ({"cpu": 8.0, "gpu": 1.0}, 2)),
        ({"CPU": 16.0, "GPU": 2.0}, {"gpus_per_trial": 0.25}, 1, ({"cpu": 2.0, "gpu": 0.25}, 8)),
        ({"CPU": 16.0, "GPU": 2.0}, {"gpus_per_trial": 0.0}, 1, ({"cpu": 1.0}, 16)),
        ({"CPU": 16.0, "GPU": 4.0}, {}, 2, ({"cpu": 0, "memory": 1e6}, 2)),
        ({"CPU": 4.0, "GPU": 1.0}, {"gpus_per_trial": 0.1}, 1, ({"cpu": 1.0, "gpu": 0.1}, 4)),
        # with these two the room limits the number
        ({"CPU": 8.0}, {"scheduler": "pbt", "max_concurrent_trials": 2}, 1, ({"cpu": 3}, 2)),
        ({"CPU": 8.0}, {"scheduler": "pbt", "max_concurrent_trials": 3}, 1, ({"cpu": 3}, 3)),
    ],
)
def test_the_share_of_a_trial(config, monkeypatch, there, settings, workers, expected):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    made = SearchPlan(
        config({"space": {"optimizer.lr": LR}, **settings}, f"scaling.num_workers={workers}")
    )
    owner: Any = SimpleNamespace(search=made.search, plan=made)
    use_gpu = _Search._on_gpus(owner, there.get("GPU", 0.0))
    assert _Search._resources(owner, [there], use_gpu) == expected


def test_a_trial_fits_on_the_smallest_node_of_its_kind(config, monkeypatch, ray_session):
    """Data nodes' cores are not a GPU node's, and where none has come yet a trial asks for one core."""
    from potstill import cluster

    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    roles = [{"Labels": {cluster.ROLE: role}} for role in ("head", "data")]
    monkeypatch.setattr(cluster, "alive_nodes", lambda: roles)
    made = SearchPlan(config({"space": {"optimizer.lr": LR}}, "scaling.num_workers=1"))
    owner: Any = SimpleNamespace(search=made.search, plan=made)
    assert _Search._on_gpus(owner, 0.0), "as a training there would ask for one"
    small, large = {"CPU": 16.0, "GPU": 1.0}, {"CPU": 96.0, "GPU": 4.0}
    assert _Search._resources(owner, [small, large], True) == ({"cpu": 16.0, "gpu": 1.0}, 5)
    assert _Search._resources(owner, [], True) == ({"cpu": 1.0, "gpu": 1.0}, 1)


def test_more_than_there_is_is_refused_unless_the_cluster_may_grow(config, monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    about = {"space": {"optimizer.lr": LR}, "cpus_per_trial": 4.0, "max_concurrent_trials": 6}
    made = SearchPlan(config(about))
    owner: Any = SimpleNamespace(search=made.search, plan=made)
    with pytest.raises(
        UserError, match=r"must be <= what there is \(2 cores, 0 GPUs\), got 4 and 0"
    ):
        _Search._resources(owner, [{"CPU": 2.0}], False)
    monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
    assert _Search._resources(owner, [{"CPU": 2.0}], False) == ({"cpu": 4.0}, 6)


# --------------------------------------------------------------------------- what earlier starts have reached
class _Trial:
    """What schedulers ask of Tune's trial."""

    def __init__(self, number: int) -> None:
        self.trial_id, self.config, self.status = f"tune-{number}", {"number": number}, "RUNNING"


def test_asha_takes_a_trial_up_on_the_rungs_that_it_stood_on():
    from potstill.search_tune import _Asha

    about: dict[str, Any] = {"time_attr": "epoch", "metric": "val_top1_acc", "mode": "max"}
    asha = _Asha(**about, max_t=28, grace_period=1, reduction_factor=3)
    asha.tell("trial-0000", {1: 50.0, 2: 60.0, 3: 70.0, 4: 80.0}, False)
    trial: Any = _Trial(0)
    asha.on_trial_add(None, trial)
    asha.on_trial_result(None, trial, {"epoch": 5, "val_top1_acc": 90.0})
    rungs = {milestone: recorded for milestone, recorded in asha._brackets[0]._rungs if recorded}
    assert rungs == {1: {"tune-0": 50.0}, 3: {"tune-0": 70.0}}, "no rung counts it twice, or late"


@pytest.mark.parametrize("mode", ["max", "min"])
def test_the_median_rule_judges_by_trials_of_earlier_starts(mode):
    from potstill.search_tune import _Median

    sign = 1 if mode == "max" else -1
    rule = _Median(
        time_attr="epoch", metric="val_loss", mode=mode, grace_period=1, min_samples_required=2
    )
    for number in range(3):
        rule.tell(f"trial-000{number}", {1: sign * 50.0, 2: sign * 60.0}, True)
    rule.tell("trial-0003", {1: sign * 90.0}, False)
    weak: Any = _Trial(4)
    rule.on_trial_add(None, weak)
    assert rule.on_trial_result(None, weak, {"epoch": 2, "val_loss": sign * 10.0}) == "STOP"
    strong: Any = _Trial(3)
    rule.on_trial_add(None, strong)
    assert (
        rule.on_trial_result(None, strong, {"epoch": 2, "val_loss": sign * 55.0}) == "CONTINUE"
    ), "its own first epoch counts, which was better"


# ------------------------------------------------------------------------------------------- other refusals
def test_other_images_under_the_same_name_are_refused(plan, tmp_path):
    made = plan({"space": {"optimizer.lr": LR}}, "run.name=mine")
    made.write_identity({})
    again = plan({"space": {"optimizer.lr": LR}}, "run.name=mine")
    again.write_identity({})
    key = next(iter(again.sets))
    again.sets[key] = SimpleNamespace(key="other", source_key="other", rows=again.sets[key].rows)
    with pytest.raises(UserError, match=r"data\.root: .* is not what mine began with"):
        again.write_identity({})


def test_no_trial_is_run_twice(config):
    from potstill.search import tune

    with pytest.raises(UserError, match=r"run\.again must be false here"):
        tune(config({"space": {"optimizer.lr": LR}}, "run.again=true"))


def test_the_best_so_far_can_be_asked_for(config, capsys):
    from potstill.search import show_best

    asked = config({"space": {"optimizer.lr": LR}})
    show_best(asked)
    assert "no trial has ended yet" in capsys.readouterr().out


def test_a_proposal_that_was_there_is_passed_over_until_the_space_is_used_up(config):
    made = SearchPlan(config({"space": {"model.channels": [2, 4]}, "num_samples": 3}))
    made.folder.mkdir(parents=True)
    owner = _Search(made)
    assert [owner.next_trial(9) for _ in range(3)] == [0, 1, 2]
    points = [owner.ledger.trials[n].point["model.channels"] for n in range(3)]
    assert sorted(points[:2]) == [2, 4]
    assert owner.ledger.refused >= 50, "the third had to be one of the two"


def test_full_length_undoes_what_a_short_trial_needs(plan):
    made = plan(
        {"space": {"optimizer.lr": LR}, "epochs": 2},
        "loop.epochs=12",
        "loop.average_last=5",
        "schedule.warmup_epochs=3",
    )
    short = made.config_of({"optimizer.lr": 1e-3})
    assert (short.loop.epochs, short.loop.average_last, short.schedule.warmup_epochs) == (2, 2, 1)
    whole = made.full_length(short)
    assert (whole.loop.epochs, whole.loop.average_last, whole.schedule.warmup_epochs) == (12, 5, 3)
