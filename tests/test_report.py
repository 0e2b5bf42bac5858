"""Plots and page of a run."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from potstill import runs
from potstill.errors import UserError
from potstill.report import (
    confusion_counts,
    confusion_figure,
    most_confused,
    per_class,
    png,
    report,
    write_history,
)
from synthetic_runs import attempt, epoch, make_run, predictions, step, whole_journal

PLOTS = {"loss_curves", "top1_accuracy", "top5_accuracy", "training_summary", "confusion_matrix"}


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
    assert {p.stem for p in written[:-1]} == PLOTS - {"confusion_matrix"}
    assert "no finished epoch" in written[-1].read_text()  # why there is no matrix


def test_a_run_without_steps_or_with_one_epoch_is_drawn(tmp_path):
    run_dir = make_run(tmp_path, [attempt(epochs=1), epoch(1, best=False)], guesses=predictions(4))
    assert len(report(run_dir)) == 6


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
    assert math.isnan(history["val_loss"][1])


def test_confusion_by_hand():
    guesses = {"label": np.array([0, 0, 0, 1, 2, 2]), "prediction": np.array([0, 1, 1, 1, 0, 2])}
    counts = confusion_counts(guesses, 4)
    assert counts.tolist() == [[1, 2, 0, 0], [0, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert most_confused(counts, 5) == [(0, 1, 2), (2, 0, 1)]
    rows = per_class(counts, ["a", "b", "c", "never seen"])
    assert [row["class"] for row in rows] == ["never seen", "a", "b", "c"]
    assert rows[1] == pytest.approx(
        {"class": "a", "precision": 50, "recall": 100 / 3, "f1": 40, "support": 3}
    )
    assert rows[0] == {"class": "never seen", "precision": 0, "recall": 0, "f1": 0, "support": 0}


@pytest.mark.parametrize("classes", [2, 12, 13, 100, 101, 2000])
def test_a_confusion_can_be_read_at_any_number_of_classes(classes):
    figure = confusion_figure(
        confusion_counts(predictions(classes, 300), classes), [f"$n_{i}^" for i in range(classes)]
    )
    axes = figure.axes[0]
    numbered = [t for t in axes.texts if "%\n" in t.get_text()]
    assert bool(numbered) == (classes <= 12)
    assert bool(axes.images) == (classes <= 100)
    assert bool(axes.patches) == (classes > 100)
    width, height = figure.get_size_inches()
    assert max(width, height) <= 14
    if classes in (12, 2000):
        png(figure)
