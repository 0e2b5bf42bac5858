"""Did distillation help?"""

from __future__ import annotations

import json
import math

import pytest
from PIL import Image

from potstill import runs
from potstill.compare import comparison, paired_interval


def summaries(*values: float) -> list[dict]:
    return [{"best_metrics": {"val_top1_acc": v, "val_loss": 1 - v / 100}} for v in values]


def test_a_paired_interval_worked_by_hand(tmp_path):
    result = comparison(tmp_path, summaries(98)[0], summaries(90, 91, 92), summaries(92, 94, 93))
    # differences 2, 3, 1: mean 2, sd 1, t(0.975, 2) = 4.302653
    assert result["gain"] == pytest.approx(2)
    assert result["interval"] == pytest.approx(
        [2 - 4.302653 / math.sqrt(3), 2 + 4.302653 / math.sqrt(3)], abs=1e-5
    )
    assert result["verdict"] == "no difference"
    assert result["alone"] == {"mean": 91, "std": 1, "values": [90, 91, 92]}
    assert result["teacher"] == 98
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    with Image.open(tmp_path / "comparison.png") as image:
        assert len(image.convert("L").getcolors()) > 20


@pytest.mark.parametrize(
    ("alone", "distilled", "metric", "verdict"),
    [
        ((90, 91, 92), (92, 93.1, 94), "val_top1_acc", "helped"),
        ((92, 93.1, 94), (90, 91, 92), "val_top1_acc", "hurt"),
        ((90, 91, 92), (92, 93.1, 94), "val_loss", "helped"),
        ((90, 91), (92, 93), "val_top1_acc", "helped"),  # no spread at all
        ((90, 91), (90, 91), "val_top1_acc", "no difference"),
        ((90,), (95,), "val_top1_acc", "no interval with one seed"),
        ((90, math.nan), (92, 93), "val_top1_acc", "not comparable"),
    ],
)
def test_verdicts(tmp_path, alone, distilled, metric, verdict):
    result = comparison(
        tmp_path, summaries(97)[0], summaries(*alone), summaries(*distilled), metric
    )
    assert result["verdict"] == verdict
    assert (result["interval"] is None) == (
        verdict in ("no interval with one seed", "not comparable")
    )
    assert (tmp_path / "comparison.png").exists()


def test_a_summary_may_come_from_its_file(tmp_path):
    """There, what is not a number is null."""
    runs.write_json(tmp_path / "summary.json", summaries(math.nan)[0])
    again = runs.read_json(tmp_path / "summary.json")
    assert again["best_metrics"]["val_top1_acc"] is None
    result = comparison(tmp_path, again, [again], summaries(92))
    assert result["verdict"] == "not comparable"
    written = json.loads((tmp_path / "comparison.json").read_text())
    assert written["alone"]["values"] == [None]


def test_students_must_come_in_pairs(tmp_path):
    with pytest.raises(ValueError, match="got 2 and 1"):
        comparison(tmp_path, summaries(97)[0], summaries(90, 91), summaries(92))


def test_equal_differences_have_an_interval_of_no_width():
    assert paired_interval([1.5, 1.5, 1.5]) == (1.5, 1.5)
    assert paired_interval([1.5]) is None
