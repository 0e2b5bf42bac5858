"""Weights that move: by hand, and what is refused."""

import math

import pytest

from potstill.errors import UserError
from potstill.term_weights import Guard, Weight, check_weights

KEY = "task.terms.distil.weight"


def values(spec, epochs=10, others=None):
    weight = Weight(KEY, spec, epochs)
    return lambda epoch: weight.at(epoch, others or {})


def test_a_number_stays():
    assert [values(0.25)(e) for e in (0, 3.5, 99)] == [0.25] * 3


def test_linear_and_cosine_by_hand():
    line = values({"schedule": "linear", "from": 0.2, "to": 1.0, "start_epoch": 2, "end_epoch": 6})
    assert [line(e) for e in (0, 2, 3, 4, 6, 9)] == pytest.approx([0.2, 0.2, 0.4, 0.6, 1.0, 1.0])
    wave = values({"schedule": "cosine", "from": 1.0, "to": 0.0})
    assert [wave(e) for e in (0, 2.5, 5, 10)] == pytest.approx(
        [1.0, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.0]
    )


def test_steps_by_hand():
    stairs = values({"schedule": "steps", "values": [0, 0.5, 1], "milestones": [5, 7.5]})
    assert [stairs(e) for e in (0, 4.99, 5, 7.4, 7.5)] == [0, 0, 0.5, 0.5, 1]


def test_a_complement_is_what_the_other_leaves():
    other = Weight(KEY, {"schedule": "linear", "from": 0, "to": 1}, 4)
    rest = values({"schedule": "complement", "of": "distil"}, 4, {"distil": other})
    assert [rest(e) for e in (0, 1, 4)] == [1.0, 0.75, 0.0]


def guard(**changes) -> Guard:
    given = {"levels": [0.01, 0.05, 0.1, 0.5], "metric": "val_auc", "collapse": 0.1, "reach": 0.8}
    return Guard(term="distil", **{**given, **changes})


def test_a_level_is_taken_when_the_metric_has_reached_its_value():
    it = guard()
    assert it.after_epoch(0.7) is None
    event = it.after_epoch(0.8)
    assert event is not None
    assert (event.level, event.weight, event.restored) == (1, 0.05, False)
    assert event.why == "val_auc has reached 0.8 (0.8000)"
    assert [it.after_epoch(0.9) is not None for _ in range(3)] == [True, True, False]
    assert it.weight == 0.5


def test_a_level_is_taken_when_the_metric_no_longer_improves():
    it = guard(reach=None, patience=2)
    assert [it.after_epoch(v) for v in (0.6, 0.7, 0.7)] == [None] * 3
    event = it.after_epoch(0.69)
    assert event is not None
    assert "has not improved for 2 epochs" in event.why
    # counted anew at every level
    assert [it.after_epoch(v) for v in (0.7, 0.7)] == [None] * 2


@pytest.mark.parametrize("collapsed", [0.69, math.nan])
def test_a_level_that_collapses_is_left_for_good(collapsed):
    it = guard()
    it.after_epoch(0.8)
    assert it.after_epoch(0.75) is None  # a fall of less than 0.1
    event = it.after_epoch(collapsed)
    assert event is not None
    assert (event.level, event.weight, event.restored) == (0, 0.01, True)
    assert it.after_epoch(0.95) is None
    assert it.weight == 0.01


def test_where_less_is_better_a_rise_is_the_collapse():
    it = guard(metric="val_loss", reach=0.5, collapse=0.2)
    assert it.after_epoch(0.6) is None
    event = it.after_epoch(0.5)
    assert event is not None
    assert event.level == 1
    it = guard(metric="val_loss", reach=0.1, patience=1, collapse=0.2)
    assert it.after_epoch(0.5) is None
    first = it.after_epoch(0.55)
    back = it.after_epoch(0.76)
    assert first is not None
    assert first.level == 1
    assert back is not None
    assert back.restored
    assert "val_loss rose from" in back.why


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ({"schedule": "slow"}, "weight.schedule must be one of linear, cosine"),
        ({}, "a weight that stays is a number"),
        ({"schedule": "linear", "from": 0}, "weight.to must be given"),
        ({"schedule": "linear", "from": 0, "to": -1}, "weight.to must be a number >= 0, got -1"),
        ({"schedule": "linear", "from": 0, "to": 1, "end_epoc": 3}, "did you mean end_epoch"),
        (
            {"schedule": "cosine", "from": 0, "to": 1, "start_epoch": 5, "end_epoch": 4},
            "weight.end_epoch must be null or > start_epoch",
        ),
        ({"schedule": "steps", "values": [0, 1], "milestones": [3, 4]}, "one more than milestones"),
        ({"schedule": "steps", "values": [0, 1, 1], "milestones": [4, 2]}, "each later than"),
        (
            {"schedule": "guarded", "levels": [0.1], "metric": "val_auc", "collapse": 0.1},
            "weight.levels must be at least two",
        ),
        (
            {"schedule": "guarded", "levels": [0, 1], "metric": "val_auc", "collapse": 0.1},
            "no level is ever taken",
        ),
        (
            {"schedule": "guarded", "levels": [0, 1], "metric": "train_loss", "collapse": 0.1},
            "weight.metric must be a metric of validation",
        ),
    ],
)
def test_what_is_refused(spec, said):
    with pytest.raises(UserError, match=said):
        Weight(KEY, spec)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": {"schedule": "complement", "of": "c"}, "b": 0.5}, r"must be a term .*\(b\), got 'c'"),
        ({"a": {"schedule": "complement", "of": "b"}, "b": 1.5}, "b.weight must be <= 1"),
        (
            {"a": {"schedule": "guarded", "levels": [0, 1], "metric": "val_x", "reach": 1, "collapse": 1}},
            "metric must be one of val_loss, val_auc, got 'val_x'",
        ),
        (
            {
                n: {"schedule": "guarded", "levels": [0, 1], "metric": "val_auc", "reach": 1, "collapse": 1}
                for n in "ab"
            },
            "one weight at most may be guarded, got a, b",
        ),
    ],
)  # fmt: skip
def test_weights_that_do_not_go_together(weights, said):
    terms = {name: {"weight": weight} for name, weight in weights.items()}
    with pytest.raises(UserError, match=said):
        check_weights(terms, ["val_loss", "val_auc"])
