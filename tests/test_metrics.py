"""What is measured, against scikit-learn and torchmetrics; over ranks; and in how much memory."""

from __future__ import annotations

import contextlib
import json
import math
import warnings

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics.functional.classification import (
    binary_calibration_error,
    multiclass_average_precision,
    multiclass_calibration_error,
)

from potstill import metric_names
from potstill.errors import UserError
from potstill.metrics import Meter, OneVsRest, evaluate, mean_of_views
from potstill.predictions import (
    Predictions,
    calibration,
    choose_thresholds,
    confusion_counts,
    most_confused,
    per_class,
    read_thresholds,
    thresholds_file,
)

CPU = torch.device("cpu")


def logits_of(label, num_classes, sharpness, rng):
    """Logits that know the label by `sharpness`."""
    noise = rng.normal(size=(len(label), num_classes))
    return torch.tensor(noise + sharpness * np.eye(num_classes)[label], dtype=torch.float32)


def measured(kind, logits, label, names=(), *, weight=None, batch=64, **more):
    """evaluate() over given logits, in batches of the order of ids reversed."""
    weight = torch.ones(len(logits)) if weight is None else weight
    ids = torch.arange(len(logits)).flip(0)

    def batches():
        for part in ids.split(batch):
            given = {"id": part, "label": label[part], "label_weight": weight[part]}
            yield {**given, "logits": logits[part]}, bool((weight[part] == 0).any())

    classes = 2 if kind == "binary" else logits.shape[1]
    everything = (kind, classes, CPU, contextlib.nullcontext, names)
    return evaluate(lambda b: b["logits"], batches(), *everything, **more)


def names_of(kind):
    return [name for name, about in metric_names.METRICS.items() if kind in about.kinds]


# ------------------------------------------------------------------------------------------- by kind
@pytest.fixture(scope="module")
def single():
    """2,000 samples of 12 classes, of which class 7 has none but is predicted."""
    rng = np.random.default_rng(0)
    label = rng.choice([k for k in range(12) if k != 7], 2000)
    logits = logits_of(label, 12, 2.0, rng)
    return logits, torch.tensor(label), logits.softmax(1).numpy()


def test_single_label_is_what_scikit_learn_says(single):
    logits, label, probability = single
    values, found = measured("single_label", logits, label, names_of("single_label"))
    truth, said = label.numpy(), probability.argmax(1)
    present = sorted(set(truth))
    assert 7 in said
    macro = {"labels": present, "average": "macro"}
    one_hot = np.eye(12)[truth]
    expected = {
        "loss": sk.log_loss(truth, probability[:, :], labels=range(12)),
        "top1_acc": 100 * sk.accuracy_score(truth, said),
        "top5_acc": 100 * sk.top_k_accuracy_score(truth, probability, k=5, labels=range(12)),
        "macro_f1": 100 * sk.f1_score(truth, said, **macro),
        "macro_precision": 100 * sk.precision_score(truth, said, **macro),
        "macro_recall": 100 * sk.recall_score(truth, said, **macro),
        "mcc": sk.matthews_corrcoef(truth, said),
        "cohen_kappa": sk.cohen_kappa_score(truth, said),
        "brier": ((probability - one_hot) ** 2).sum(1).mean(),
        "calibration_error": multiclass_calibration_error(
            torch.tensor(probability), label, 12, n_bins=15
        ).item(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # class 7 is in the predictions alone: it is left out
        expected["balanced_acc"] = 100 * sk.balanced_accuracy_score(truth, said)
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name
    areas = [sk.roc_auc_score(truth == k, probability[:, k]) for k in present]
    assert values["auc"] == pytest.approx(np.mean(areas), abs=2e-4)
    areas = [sk.average_precision_score(truth == k, probability[:, k]) for k in present]
    assert values["average_precision"] == pytest.approx(np.mean(areas), abs=1e-3)
    assert (found.id == np.arange(2000)).all()
    assert (found.label == truth).all()
    assert found.arrays().keys() == {"id", "label", "prediction", "confidence"}


def test_why_torchmetrics_does_not_average_over_classes_here(single):
    """It takes a class without a sample for one of average precision 0; should that change, we need less code."""
    logits, label, probability = single
    values, _ = measured("single_label", logits, label, ["average_precision"])
    present = [
        sk.average_precision_score(label == k, probability[:, k]) for k in set(label.tolist())
    ]
    exact = float(np.mean(present))
    theirs = multiclass_average_precision(torch.tensor(probability), label, 12, thresholds=200)
    assert abs(values["average_precision"] - exact) < 1e-3
    assert abs(theirs.item() - exact) > 0.02


@pytest.fixture(scope="module")
def binary():
    rng = np.random.default_rng(1)
    label = (rng.random(1500) < 0.15).astype(np.int64)
    logits = torch.tensor(rng.normal(size=1500) + 2.0 * label - 1.5, dtype=torch.float32)
    return logits[:, None], torch.tensor(label)


@pytest.mark.parametrize("how", [0.5, 0.2, "max_f1", "youden"])
def test_binary_is_what_scikit_learn_says(binary, how):
    logits, label = binary
    values, found = measured("binary", logits, label, names_of("binary"), threshold=how)
    score, truth = logits[:, 0].sigmoid().numpy(), label.numpy()
    (threshold,) = found.thresholds
    if not isinstance(how, str):
        assert threshold == np.float32(how)
    said = score >= threshold
    expected = {
        "loss": sk.log_loss(truth, score),
        "top1_acc": 100 * sk.accuracy_score(truth, said),
        "top5_acc": 100 * sk.accuracy_score(truth, said),
        "macro_f1": 100 * sk.f1_score(truth, said, average="macro"),
        "f1": 100 * sk.f1_score(truth, said),
        "precision": 100 * sk.precision_score(truth, said),
        "recall": 100 * sk.recall_score(truth, said),
        "specificity": 100 * sk.recall_score(truth, said, pos_label=0),
        "balanced_acc": 100 * sk.balanced_accuracy_score(truth, said),
        "auc": sk.roc_auc_score(truth, score),
        "average_precision": sk.average_precision_score(truth, score),
        "brier": sk.brier_score_loss(truth, score),
        "mcc": sk.matthews_corrcoef(truth, said),
        "cohen_kappa": sk.cohen_kappa_score(truth, said),
        "calibration_error": binary_calibration_error(torch.tensor(score), label, n_bins=15).item(),
    }
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-5), name
    assert np.allclose(found.confidence, np.where(said, score, 1 - score))
    assert (found.prediction == said).all()
    assert found.kind == "binary"


@pytest.fixture(scope="module")
def several():
    """800 samples of 9 classes, of which class 4 has none; every tenth sample has no class at all."""
    rng = np.random.default_rng(2)
    truth = rng.random((800, 9)) < np.linspace(0.05, 0.5, 9)
    truth[:, 4] = False
    truth[::10] = False
    logits = rng.normal(size=(800, 9)) + 2.5 * truth - 1.0
    return torch.tensor(logits, dtype=torch.float32), torch.tensor(truth).float()


@pytest.mark.parametrize("how", [0.5, "max_f1"])
def test_multi_label_is_what_scikit_learn_says(several, how):
    logits, label = several
    values, found = measured("multi_label", logits, label, names_of("multi_label"), threshold=how)
    truth = label.numpy().astype(bool)
    score = logits.sigmoid().numpy()
    present = truth.any(0)
    said = found.scores.astype(np.float32) >= found.thresholds
    macro = {"average": "macro", "zero_division": 0}
    any_class = truth.any(1)
    order = np.argsort(-score, 1)
    hits = np.take_along_axis(truth, order, 1)[any_class]
    expected = {
        "loss": np.mean([sk.log_loss(t, s, labels=[0, 1]) for t, s in zip(truth.T, score.T, strict=True)]),
        "top1_acc": 100 * hits[:, 0].mean(),
        "top5_acc": 100 * hits[:, :5].any(1).mean(),
        "macro_f1": 100 * sk.f1_score(truth[:, present], said[:, present], **macro),
        "macro_precision": 100 * sk.precision_score(truth[:, present], said[:, present], **macro),
        "macro_recall": 100 * sk.recall_score(truth[:, present], said[:, present], **macro),
        "micro_f1": 100 * sk.f1_score(truth, said, average="micro"),
        "exact_match": 100 * sk.accuracy_score(truth, said),
        "brier": ((score - truth) ** 2).mean(),
        "calibration_error": binary_calibration_error(
            torch.tensor(score).flatten(), label.long().flatten(), n_bins=15
        ).item(),
    }  # fmt: skip
    for name, value in expected.items():
        assert values[name] == pytest.approx(value, rel=1e-3), name
    areas = [sk.roc_auc_score(truth[:, k], score[:, k]) for k in np.flatnonzero(present)]
    assert values["auc"] == pytest.approx(np.mean(areas), abs=1e-3)
    areas = [sk.average_precision_score(truth[:, k], score[:, k]) for k in np.flatnonzero(present)]
    assert values["average_precision"] == pytest.approx(np.mean(areas), abs=1e-3)
    assert (found.prediction == order[:, 0]).all()
    assert (found.label == -1).all()


def test_predictions_come_back_from_their_arrays(several, binary):
    for kind, (logits, label) in {"multi_label": several, "binary": binary}.items():
        _, found = measured(kind, logits, label)
        arrays = found.arrays()
        again = Predictions.of_arrays(arrays)
        assert again.kind == kind
        for name, value in vars(found).items():
            assert value is None or (getattr(again, name) == value).all()
        if kind == "multi_label":
            assert arrays["targets"].shape == (800, 2)
            assert (again.targets == label.numpy().astype(bool)).all()
            assert arrays["scores"].dtype == np.float16


# ------------------------------------------------------------------------- what is left out, and where
def test_samples_of_weight_zero_or_without_a_label_are_left_out(single, binary, several):
    for kind, (logits, label, *_) in (
        ("single_label", single), ("binary", binary), ("multi_label", several),
    ):  # fmt: skip
        names = names_of(kind)
        few = 100
        expected, _ = measured(kind, logits[:few], label[:few], names)
        label = label.clone()
        label[few:] = -1
        weight = torch.ones(len(label))
        weight[few:] = 0
        values, found = measured(kind, logits, label, names, weight=weight, batch=96)
        assert values == pytest.approx(expected, rel=1e-6)
        assert len(found.id) == few
        meter = Meter(kind, 2 if kind == "binary" else logits.shape[1], CPU, metrics=names)
        meter.update_mean("loss", torch.tensor(1.0), torch.tensor(1.0))
        meter.update_classified(logits, label, torch.ones(len(label)), True)
        assert meter.compute()["top5_acc"] == pytest.approx(expected["top5_acc"])


def test_the_loss_goes_by_weight_and_the_rest_by_samples(single):
    logits, label, _ = single
    weight = torch.linspace(0.1, 3, len(label))
    values, _ = measured("single_label", logits, label, weight=weight)
    each = torch.nn.functional.cross_entropy(logits, label, reduction="none")
    assert values["loss"] == pytest.approx(((each * weight).sum() / weight.sum()).item(), rel=1e-5)
    alike, _ = measured("single_label", logits, label)
    assert values["top1_acc"] == alike["top1_acc"]


def test_a_meter_goes_on_where_another_stopped(single):
    logits, label, _ = single
    names = ["auc", "brier"]
    one = torch.ones(1000)
    whole = Meter("single_label", 12, CPU, terms=["task"], metrics=names)
    first = Meter("single_label", 12, CPU, terms=["task"], metrics=names)
    for meter in (whole, first):
        meter.update_mean("term/task", torch.tensor(3.0), torch.tensor(2.0))
        meter.update_classified(logits[:1000], label[:1000], one, False)
    second = Meter("single_label", 12, CPU, terms=["task"], metrics=names)
    second.load_state(first.state(), rank=0)
    for meter in (whole, second):
        meter.update_mean("loss", torch.tensor(1.0), torch.tensor(1.0))
        meter.update_classified(logits[1000:], label[1000:], one, False)
    assert second.compute() == whole.compute()
    assert set(whole.compute()) == {"loss", "term/task", "top1_acc", "top5_acc", *names}


def test_a_class_that_is_never_there_or_always_there_makes_no_area():
    logits = torch.randn(20, 3)
    areas = OneVsRest(3)
    areas.update(logits, torch.zeros(20, dtype=torch.long))
    found = areas.compute()
    assert math.isnan(found["auc"])
    assert found["average_precision"] == 1


def test_areas_of_sure_models_and_of_logits_that_are_no_numbers():
    label = torch.arange(300) % 3
    areas = OneVsRest(3)
    areas.update(1000.0 * torch.nn.functional.one_hot(label, 3), label)
    assert areas.compute()["auc"] == 1
    areas.update(torch.full((3, 3), torch.nan), label[:3])
    assert areas.compute()["auc"] < 1


def test_seven_thousand_classes_are_held_in_tens_of_megabytes():
    meter = Meter("single_label", 7120, CPU, metrics=["auc", "average_precision", "brier"])
    held = sum(v.numel() * v.element_size() for v in meter.sums.state_dict().values())
    assert held < 30e6
    assert sum(v.numel() for v in Meter("single_label", 7120, CPU).state().values()) < 100


def test_areas_of_two_ranks_are_those_of_all_samples(single):
    """As torchmetrics joins ranks; tests/test_fit.py trains on two of them."""
    logits, label, _ = single
    parts = OneVsRest(12), OneVsRest(12), OneVsRest(12)
    for areas, rows in zip(parts, (slice(700), slice(700, None), slice(None)), strict=True):
        areas.update(logits[rows], label[rows])
    one, two, whole = parts
    one.merge_state(two)
    assert one.compute() == whole.compute()
    assert one.compute()["auc"] != two.compute()["auc"]


# ------------------------------------------------------------------------------------------ thresholds
def test_a_chosen_threshold_is_the_best_there_is():
    rng = np.random.default_rng(3)
    truth = rng.random((400, 3)) < 0.3
    score = np.clip(rng.normal(0.4, 0.15, (400, 3)) + 0.2 * truth, 0, 1).astype(np.float16)
    grid = np.linspace(0, 1, 2001)
    for how, worth in (
        ("max_f1", lambda t, s: sk.f1_score(t, s, zero_division=0)),
        ("youden", lambda t, s: sk.balanced_accuracy_score(t, s)),
    ):
        for k, threshold in enumerate(choose_thresholds(score, truth, how)):
            best = max(worth(truth[:, k], score[:, k] >= g) for g in grid[::20])
            assert worth(truth[:, k], score[:, k] >= threshold) >= best
    assert choose_thresholds(score, truth, 0.3).tolist() == [np.float32(0.3)] * 3
    with pytest.raises(UserError, match=r"task\.threshold must be max_f1, youden or a number"):
        choose_thresholds(score, truth, "best")


def test_a_class_that_leaves_no_choice_gets_a_half():
    score = np.array([[0.1, 0.9], [0.8, 0.7]], np.float32)
    truth = np.array([[False, True], [False, True]])
    assert choose_thresholds(score, truth, "youden").tolist() == [0.5, 0.5]
    assert choose_thresholds(score, truth, "max_f1").tolist() == pytest.approx([0.5, 0.35])


def test_thresholds_are_kept_by_name_and_used_as_they_are(several, binary, tmp_path):
    logits, label = several
    _, found = measured("multi_label", logits, label, threshold="max_f1")
    classes = [f"c{k}" for k in range(9)]
    (tmp_path / "thresholds.json").write_bytes(thresholds_file(found, classes, "max_f1"))
    kept = json.loads((tmp_path / "thresholds.json").read_text())
    assert kept["chosen_by"] == "max_f1"
    assert list(kept["thresholds"]) == classes
    turned = read_thresholds(tmp_path, classes[::-1])
    assert (turned == found.thresholds[::-1]).all()
    # on other data they are not chosen again
    _, other = measured("multi_label", -logits, label, threshold=found.thresholds)
    assert (other.thresholds == found.thresholds).all()
    _, found = measured("binary", *binary, threshold="youden")
    kept = json.loads(thresholds_file(found, ["ill", "well"], "youden"))
    assert kept["thresholds"] == {"well": found.thresholds[0]}
    assert read_thresholds(tmp_path / "nowhere", classes) is None


# ---------------------------------------------------------------------------------------------- tables
def test_the_table_of_several_labels_has_precision_and_threshold(several):
    logits, label = several
    _, found = measured("multi_label", logits, label, threshold="max_f1")
    rows = {row["class"]: row for row in per_class(found, [f"c{k}" for k in range(9)])}
    truth = label.numpy().astype(bool)
    for k in range(9):
        row = rows[f"c{k}"]
        said = found.scores[:, k].astype(np.float32) >= found.thresholds[k]
        assert row["support"] == truth[:, k].sum()
        assert row["f1"] == pytest.approx(
            100 * sk.f1_score(truth[:, k], said, zero_division=0), abs=1e-6
        )
        assert row["threshold"] == found.thresholds[k]
    area = sk.average_precision_score(truth[:, 8], found.scores[:, 8].astype(np.float32))
    assert rows["c8"]["average_precision"] == pytest.approx(area)
    assert rows["c4"]["average_precision"] is None
    json.dumps(list(rows.values()))


def test_confusion_of_many_classes_is_sparse():
    rng = np.random.default_rng(0)
    label, said = rng.integers(0, 7120, (2, 30_000), dtype=np.int32)
    found = Predictions(np.arange(30_000), label, said, np.ones(30_000, np.float32))
    counts = confusion_counts(found, 7120)
    assert counts.nnz <= 30_000
    assert counts.sum() == 30_000
    true, guess, number = most_confused(counts, 3)[0]
    assert true != guess
    assert number == ((label == true) & (said == guess)).sum()


def test_calibration_by_hand():
    confidence = np.array([0.95, 0.95, 0.95, 0.95, 0.55, 0.55], np.float32)
    label = np.zeros(6, np.int32)
    said = np.array([0, 0, 0, 1, 0, 1], np.int32)
    found = calibration(Predictions(np.arange(6), label, said, confidence), bins=10)
    assert found.error == pytest.approx((4 * 0.2 + 2 * 0.05) / 6, rel=1e-5)
    assert [(row["count"], row["frequency"]) for row in found.rows()] == [(2, 0.5), (4, 0.75)]
    full = Predictions(np.arange(1), label[:1], said[:1], np.ones(1, np.float32))
    assert calibration(full).rows()[0]["to"] == 1


# ------------------------------------------------------------------------------------- views, and names
@pytest.mark.parametrize("kind", ["single_label", "multi_label", "binary"])
def test_views_are_averaged_as_probabilities(kind):
    views = [torch.randn(4, 1 if kind == "binary" else 3) for _ in range(5)]
    of = (lambda x: x.softmax(1)) if kind == "single_label" else torch.sigmoid
    mean = torch.stack([of(v) for v in views]).mean(0)
    assert torch.allclose(of(mean_of_views(views, kind)), mean, atol=1e-6)
    assert mean_of_views(views[:1], kind) is views[0]
    assert mean_of_views([torch.full((1, 2), 300.0)] * 2, kind).isfinite().all()


def test_every_name_is_measured_and_shown(single, binary, several):
    for kind, (logits, label, *_) in (
        ("single_label", single), ("binary", binary), ("multi_label", several),
    ):  # fmt: skip
        values, _ = measured(kind, logits, label, names_of(kind))
        assert set(values) == {"loss", *metric_names.ALWAYS, *names_of(kind)}
        metric_names.check(kind, names_of(kind))
        for name, value in values.items():
            assert 0 <= value <= (100 if metric_names.is_percent(name) else 3), name


def test_a_name_that_cannot_be_measured_is_refused():
    with pytest.raises(UserError, match=r"task\.metrics must be of .* got 'exact_match'"):
        metric_names.check("single_label", ["auc", "exact_match"])
    with pytest.raises(UserError, match=r"metrics must be .* 'acu'; did you mean auc\?"):
        metric_names.check("binary", ["acu"], key="metrics")


def test_names_say_how_a_number_is_read():
    assert metric_names.shown("val_top1_acc", 12.345) == "12.35%"
    assert metric_names.shown("val_auc", 0.98765) == "0.9877"
    assert metric_names.shown("val_loss", math.nan) == "nan"
    assert not metric_names.higher_is_better("val_brier")
    assert not metric_names.higher_is_better("train_loss")
    assert metric_names.higher_is_better("val_top1_acc")
    assert metric_names.title("val_top5_acc", top_k=3) == "Top-3 accuracy"
    assert metric_names.title("top1_acc", "multi_label") == "Hit@1"
    assert metric_names.monitors("binary", ["auc", "macro_f1"])[-2:] == ["val_macro_f1", "val_auc"]
