"""Plots and page of a run."""

from __future__ import annotations

import json
import math
import re
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from potstill import runs
from potstill.errors import UserError
from potstill.predictions import (
    Predictions,
    binary_predictions,
    confusion_counts,
    most_confused,
    multi_label_predictions,
    per_class,
)
from potstill.report import confusion_figure, png, report, write_history
from synthetic_runs import attempt, epoch, make_run, predictions, step, whole_journal

CURVES = {"loss_curves", "top1_accuracy", "top5_accuracy", "training_summary"}
PLOTS = CURVES | {"confusion_matrix", "reliability"}


class Page(HTMLParser):
    """The rows of every table, and the addresses that the page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.sources: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data):
        if self.rows and self.rows[-1]:
            self.rows[-1][-1] += data


def test_a_run_gets_its_plots_and_a_page_that_needs_nothing_else(tmp_path):
    warning = {"name": "collapsed", "message": "all are <b>rubra</b>"}
    run_dir = make_run(
        tmp_path, whole_journal(3, warnings=[warning], best=False), guesses=predictions(4)
    )
    written = report(run_dir)
    assert {p.stem for p in written[:-1]} == PLOTS
    for path in written[:-1]:
        with Image.open(path) as image:
            assert min(image.size) > 500
            assert len(image.convert("L").getcolors()) > 20, "an empty picture"
    assert written[-1] == run_dir / "report.html"
    text = written[-1].read_text()
    page = Page(text)
    assert len(page.sources) == len(PLOTS)
    assert all(source.startswith("data:image/png;base64,") for source in page.sources)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", text)
    assert "<b>rubra</b>" not in text
    assert "ilex <i>" not in text
    epochs = [row for row in page.rows if row and row[0] in "123"]
    assert [row[1] for row in epochs] == [f"{2 / 3 / at:.4f}" for at in (1, 2, 3)]
    classes = {
        row[0]: row[1:]
        for row in page.rows
        if row and row[0] in ("robur", "rubra", "ilex <i>", "suber")
    }
    assert len(classes) == 4
    assert sum(int(row[-1].split()[0]) for row in classes.values()) == 60


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_values_that_are_no_numbers_are_drawn_around(tmp_path, value):
    keys = (
        "train_loss",
        "val_loss",
        "val_top1_acc",
        "val_top5_acc",
        "val_macro_f1",
        "images_per_s",
        "seconds",
    )
    run_dir = make_run(
        tmp_path,
        [attempt(), step(1, loss=value), epoch(1, **dict.fromkeys(keys, value), best=False)],
    )
    written = report(run_dir)
    assert {p.stem for p in written[:-1]} == CURVES
    assert "no finished epoch" in written[-1].read_text()  # why there is no matrix


def test_a_run_without_steps_or_with_one_epoch_is_drawn(tmp_path):
    run_dir = make_run(tmp_path, [attempt(epochs=1), epoch(1, best=False)], guesses=predictions(4))
    assert len(report(run_dir)) == 7


def test_a_run_without_an_epoch_is_refused(tmp_path):
    run_dir = make_run(tmp_path, [attempt(), step(1)])
    with pytest.raises(UserError, match="must have finished an epoch"):
        report(run_dir)


def test_history_is_the_journals_floats(tmp_path):
    records = [
        *(attempt(), epoch(1), epoch(2, val_loss=9.0)),
        attempt(2, 8, resumed_from="step-00000008"),
        epoch(2, 2, val_loss=math.nan),
    ]
    run_dir = make_run(tmp_path, records)
    write_history(run_dir)
    history = json.loads((run_dir / "training_history.json").read_text())
    assert list(history) == list(runs.HISTORY_KEYS)
    assert history["train_top1_acc"] == [60 + 1 / 3, 60 + 2 / 3]
    assert history["val_loss"][0] == 2.1 / 3
    assert history["val_loss"][1] is None, "JSON has no word for what is no number"


def several(samples=300, classes=4, seed=0):
    rng = np.random.default_rng(seed)
    targets = rng.random((samples, classes)) < 0.3
    scores = np.clip(rng.normal(0.35, 0.15, targets.shape) + 0.3 * targets, 0, 1)
    best = scores.argmax(1)
    ids = np.arange(samples) + 1000
    return multi_label_predictions(ids, targets, scores, best, scores.max(1), "max_f1")


def two(samples=300, seed=0):
    rng = np.random.default_rng(seed)
    label = (rng.random(samples) < 0.3).astype(int)
    score = np.clip(rng.normal(0.35, 0.15, samples) + 0.3 * label, 0, 1)
    return binary_predictions(np.arange(samples) + 1000, label, score, "youden")


def as_asked(kind, *, top_k, monitor="val_auc", **metrics):
    """A journal of three epochs of a run that was asked for `metrics`."""
    records = whole_journal(3)
    for record in records:
        if record["kind"] == "attempt":
            record |= {"task_kind": kind, "metrics": list(metrics), "monitor": monitor}
        if record["kind"] == "epoch":
            at = record["epoch"]
            record |= {f"val_{name}": value * at / 3 for name, value in metrics.items()}
            record["top_k"] = top_k
    return records


def test_a_run_of_several_labels_has_curves_and_a_table_of_thresholds(tmp_path):
    found = several()
    records = as_asked("multi_label", top_k=3, auc=0.9, micro_f1=75.0)
    run_dir = make_run(tmp_path, records, guesses=found.arrays())
    written = report(run_dir)
    assert {p.stem for p in written[:-1]} == CURVES | {"curves", "reliability", "metrics"}
    page = Page(written[-1].read_text())
    rows = [row for row in page.rows if row[0] in ("robur", "rubra", "ilex <i>", "suber")]
    expected = per_class(found, ["robur", "rubra", "ilex <i>", "suber"])
    assert [row[0] for row in rows] == [row["class"] for row in expected]
    for row, of in zip(rows, expected, strict=True):
        shares = [f"{of[key]:.2f}" for key in ("precision", "recall", "f1")]
        assert row[1:4] == shares
        assert row[4:6] == [f"{of['average_precision']:.4f}", f"{of['threshold']:.4f}"]
        assert int(row[6].split()[0]) == of["support"]
    text = written[-1].read_text()
    assert "validation hit@1" in text
    assert "best epoch, by val_auc" in text


def test_a_run_of_two_classes_has_curves_beside_its_matrix(tmp_path):
    records = as_asked("binary", top_k=1, auc=0.9, brier=0.1, f1=80.0, mcc=0.6)
    run_dir = make_run(tmp_path, records, classes=["no", "yes"], guesses=two().arrays())
    written = report(run_dir)
    names = {p.stem for p in written[:-1]}
    assert names == (PLOTS | {"curves", "metrics"}) - {"top5_accuracy"}
    epochs = [row for row in Page(written[-1].read_text()).rows if row and row[0] == "3"]
    assert "0.9000" in epochs[0]
    assert "80.00" in epochs[0]
    threshold = f"{float(two().thresholds[0]):.3f}"
    assert (
        f"yes counts as predicted from a probability of {threshold} on" in written[-1].read_text()
    )


def test_chosen_metrics_are_in_the_history(tmp_path):
    run_dir = make_run(tmp_path, as_asked("binary", top_k=1, auc=0.9))
    write_history(run_dir)
    history = json.loads((run_dir / "training_history.json").read_text())
    assert history["val_auc"] == [0.9 * at / 3 for at in (1, 2, 3)]
    assert list(history)[-1] == "val_auc"


def test_seven_thousand_classes_are_reported_in_seconds(tmp_path):
    classes = [f"species {k}" for k in range(7120)]
    run_dir = make_run(
        tmp_path, whole_journal(3), classes=classes, guesses=predictions(7120, 20_000)
    )
    began = time.monotonic()
    page = report(run_dir)[-1]
    assert time.monotonic() - began < 30
    assert page.stat().st_size < 4e6
    assert "These are 1,000 of 7,120" in page.read_text()


def test_confusion_by_hand():
    label = np.array([0, 0, 0, 1, 2, 2])
    said = np.array([0, 1, 1, 1, 0, 2])
    found = Predictions(np.arange(6), label, said, np.ones(6))
    counts = confusion_counts(found, 4)
    assert counts.toarray().tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert most_confused(counts, 5) == [(0, 1, 2), (2, 0, 1)]
    rows = per_class(found, ["a", "b", "c", "never seen"])
    assert [row["class"] for row in rows] == ["never seen", "a", "b", "c"]
    assert rows[1] == pytest.approx(
        {"class": "a", "precision": 50, "recall": 100 / 3, "f1": 40, "support": 3}
    )
    assert rows[0] == {"class": "never seen", "precision": 0, "recall": 0, "f1": 0, "support": 0}


@pytest.mark.parametrize("classes", [2, 12, 13, 100, 101, 2000])
def test_a_confusion_can_be_read_at_any_number_of_classes(classes):
    counts = confusion_counts(Predictions(**predictions(classes, 300)), classes)
    figure = confusion_figure(counts, [f"$n_{i}^" for i in range(classes)], "validation")
    axes = figure.axes[0]
    numbered = [t for t in axes.texts if "%\n" in t.get_text()]
    assert bool(numbered) == (classes <= 12)
    assert bool(axes.images) == (classes <= 100)
    assert bool(axes.patches) == (classes > 100)
    width, height = figure.get_size_inches()
    assert max(width, height) <= 14
    if classes in (12, 2000):
        png(figure)
