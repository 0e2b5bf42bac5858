"""Verdicts on a teacher, worked by hand."""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest

from potstill.config import Gate
from potstill.errors import UserError
from potstill.gate import chance, check_given, check_metric, default_metric, judge, thresholds


def auc(value: float, gate: Gate | None = None, **how):
    gate = gate or Gate()
    return judge("auc", value, thresholds("auc", 0.5, gate), gate, **how)


@pytest.mark.parametrize(
    ("value", "name", "diagnosed", "verified"),
    [
        (0.95, "good", True, True),
        (0.65, "good", True, True),
        (0.6499, "marginal", False, True),
        (0.55, "marginal", False, True),
        (0.5499, "must_finetune", False, False),
        (0.45, "must_finetune", False, False),
        (0.4499, "inverted", False, False),
        (0.0, "inverted", False, False),
    ],
)
def test_an_auc_at_and_beside_every_threshold(value, name, diagnosed, verified):
    assert (auc(value).name, auc(value).passed) == (name, diagnosed)
    again = auc(value, verifying=True)
    assert (again.name, again.passed) == (name, verified)
    assert again.loud == (name != "good"), "what is less than good is not said in passing"


def test_inverted_labels_are_named_and_fine_tuning_is_said_to_hide_them():
    found = auc(0.2)
    assert found.loud
    assert "PROBABLY INVERTED LABELS" in found.title
    assert "AUC 0.2000 is below 0.45" in found.title
    assert "fine-tuning would hide this" in found.consequence
    assert "wrong way round" in auc(0.2, verifying=True).consequence


def test_marginal_goes_by_on_marginal():
    assert "it is fine-tuned" in auc(0.6).consequence
    skipped = auc(0.6, Gate(on_marginal="skip"))
    assert skipped.passed
    assert "gate.on_marginal=skip" in skipped.consequence
    assert not auc(0.5, Gate(on_marginal="skip")).passed, "skip is for the marginal alone"
    assert "warning" in auc(0.6, verifying=True).consequence


def test_without_an_experiment_nobody_is_told_that_it_will_be_fine_tuned():
    for value in (0.2, 0.5, 0.6):
        said = auc(value, can_finetune=False).consequence
        assert "it is fine-tuned" not in said
        assert "there is no distil.finetune" in said


def test_thresholds_between_chance_and_perfect():
    """12 classes, the largest holds a fifth: 20 + 0.3 x 80 = 44 %, 20 + 0.1 x 80 = 28 %."""
    by_chance = chance("top1_acc", [20, *[8] * 10], 100, "single_label")
    limits = thresholds("top1_acc", by_chance, Gate())
    assert (by_chance, limits.good, limits.marginal) == pytest.approx((20, 44, 28))
    assert limits.inverted is None
    for value, name in (
        (44, "good"),
        (43.9, "marginal"),
        (27.9, "must_finetune"),
        (0, "must_finetune"),
    ):
        assert judge("top1_acc", value, limits, Gate()).name == name
    mcc = thresholds("mcc", 0.0, Gate())
    assert (mcc.good, mcc.marginal) == pytest.approx((0.3, 0.1))


def test_given_thresholds_count():
    gate = Gate(good=0.9, marginal=0.8, inverted=0.3)
    names = [auc(v, gate).name for v in (0.91, 0.85, 0.5, 0.29)]
    assert names == ["good", "marginal", "must_finetune", "inverted"]
    with pytest.raises(UserError, match=r"gate\.good must be > gate\.marginal \(0\.8\).*got 0\.7"):
        thresholds("auc", 0.5, Gate(good=0.7, marginal=0.8))


@pytest.mark.parametrize(
    ("metric", "given", "says"),
    [
        (
            "auc",
            {"good": 65},
            r"good must be a fraction <= 1.*got 65; set gate\.good=0\.65, not 65",
        ),
        ("auc", {"marginal": 55}, r"marginal must be a fraction <= 1.*got 55"),
        ("auc", {"marginal": 0.7}, r"good must be > gate\.marginal \(0\.7\).*got 0\.65"),
        ("mcc", {"marginal": 1.5}, r"marginal must be a fraction <= 1"),
        ("top1_acc", {"good": 0.65}, r"good must be in percent.*set gate\.good=65, not 0\.65"),
        (
            "top1_acc",
            {"marginal": 1},
            r"marginal must be in percent.*got 1; set gate\.marginal=100",
        ),
        ("top1_acc", {"good": 120}, r"good must be a percentage <= 100"),
        ("top1_acc", {"good": 5}, r"good must be > gate\.marginal \(10\)"),
        ("top1_acc", {"good": 40, "marginal": 50}, r"good must be > gate\.marginal \(50\)"),
    ],
)
def test_thresholds_that_cannot_be_meant_are_refused_each_alone(metric, given, says):
    with pytest.raises(UserError, match=rf"gate\.{says}"):
        check_given(metric, Gate(good=given.get("good"), marginal=given.get("marginal")))


def test_thresholds_that_can_be_meant_are_not_refused():
    given: Mapping[str, float]
    for metric, given in (
        ("auc", {}),
        ("auc", {"good": 0.95}),
        ("auc", {"good": 0.02, "marginal": 0.01}),
        ("auc", {"good": 1.0, "marginal": 0.01}),
        ("top1_acc", {"marginal": 65}),
        ("top1_acc", {"good": 65, "marginal": 0}),
        ("mcc", {"good": 0.4, "marginal": -0.1}),
    ):
        check_given(metric, Gate(good=given.get("good"), marginal=given.get("marginal")))


@pytest.mark.parametrize(
    ("metric", "support", "samples", "kind", "expected"),
    [
        ("auc", [1, 99], 100, "binary", 0.5),
        ("top1_acc", [30, 70], 100, "binary", 70),
        ("top5_acc", [10] * 10, 100, "single_label", 50),
        ("top5_acc", [50, 50], 100, "single_label", 100),
        ("balanced_acc", [90, 5, 5], 100, "single_label", 100 / 3),
        ("balanced_acc", [90, 10, 0], 100, "single_label", 50),  # the absent class is left out
        ("average_precision", [75, 25], 100, "binary", 0.25),
        ("average_precision", [50, 10], 100, "multi_label", 0.3),
        ("f1", [50, 50], 100, "binary", 200 / 3),
        ("precision", [75, 25], 100, "binary", 25),
        ("macro_f1", [50, 50], 100, "multi_label", 200 / 3),
        ("mcc", [50, 50], 100, "binary", 0),
    ],
)
def test_what_chance_gives(metric, support, samples, kind, expected):
    assert chance(metric, support, samples, kind) == pytest.approx(expected)


def test_refused_metrics():
    assert (default_metric("binary"), default_metric("single_label")) == ("auc", "top1_acc")
    with pytest.raises(UserError, match=r"gate\.metric must be one of .*got 'brier'"):
        check_metric("brier", "binary")
    with pytest.raises(UserError, match=r"gate\.metric must be of .*got 'f1'"):
        check_metric("f1", "single_label")
    check_metric("macro_f1", "single_label")
    with pytest.raises(UserError, match=r"auc has no value on these images"):
        auc(math.nan)
