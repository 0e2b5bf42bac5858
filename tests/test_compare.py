"""Did distillation help?"""

from __future__ import annotations

import json
import math
import re
import time
from typing import ClassVar

import pytest
from PIL import Image

from potstill import runs
from potstill.compare import (
    as_markdown,
    compared,
    comparison,
    comparison_rows,
    conclusion,
    latency_ms,
    paired_interval,
)


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


COSTS = {
    "teacher": {"value": 0.98, "parameters": 2_000_000, "file_mb": 8.0, "latency_ms": {"1": 20.0, "32": 400.0}, "seconds": 200.0},
    "student": {"parameters": 1_297, "file_mb": 0.0078, "latency_ms": {"1": 0.5, "32": 9.0}, "seconds": {"alone": 61.0, "distilled": 90.0}},
}  # fmt: skip


def test_a_table_of_what_it_costs(tmp_path):
    result = compared(
        tmp_path, "auc", 0.98, [0.90, 0.91, 0.92], [0.93, 0.945, 0.95], {"models": COSTS}
    )
    assert json.loads((tmp_path / "comparison.json").read_text()) == result
    columns, rows = comparison_rows(result)
    assert columns == ["model", "val AUC", "parameters", "MB", "ms x1", "ms x32", "training"]
    assert rows == [
        ["teacher", "0.9800", "2,000,000", "8", "20", "400", "3 min 20 s"],
        ["alone", "0.9100 ± 0.0100", "1,297", "0.0078", "0.5", "9", "1 min 01 s"],
        ["distilled", "0.9417 ± 0.0104", "1,297", "0.0078", "0.5", "9", "1 min 30 s"],
    ]
    assert conclusion(result).startswith("Distillation helped: AUC +0.0317 (95 % interval +0.0")
    assert conclusion(result).endswith("paired over 3 seeds)")
    text = as_markdown(result, ["On a CPU."])
    assert "| alone | 0.9100 ± 0.0100 |" in text
    assert text.endswith("\n\nOn a CPU.\n")


def test_students_of_no_teacher_are_shown_alone(tmp_path):
    result = compared(tmp_path, "top1_acc", 12.0, [90.0, 92.0], [], {"models": COSTS})
    assert (result["verdict"], result["distilled"], result["gain"]) == ("not distilled", None, None)
    assert [row[0] for row in comparison_rows(result)[1]] == ["teacher", "alone"]
    assert comparison_rows(result)[1][1][1] == "91.00 ± 1.41 %"
    assert conclusion(result).startswith("No distillation")
    assert (tmp_path / "comparison.png").exists()


@pytest.mark.parametrize(
    ("alone", "distilled", "says"),
    [
        ((92, 93.1, 94), (90, 91, 92), r"Distillation hurt: Top-1 accuracy -2\.03 points"),
        ((90, 91, 92), (92, 90, 92), r"made no difference that can be told from chance: .* \+0\.33 points"),
        ((90,), (95,), r"no interval with one seed \(Top-1 accuracy \+5\.00 points\)"),
    ],
)  # fmt: skip
def test_it_is_said_plainly(tmp_path, alone, distilled, says):
    assert re.search(says, conclusion(compared(tmp_path, "top1_acc", 97.0, alone, distilled)))


def test_latency_is_the_median_after_the_warm_up():
    """Sleeps of 1 ms, but for slow first passes and one that was disturbed."""
    import torch

    class Sleeper(torch.nn.Module):
        calls = 0
        shapes: ClassVar[set] = set()

        def forward(self, batch):
            self.calls += 1
            self.shapes.add(tuple(batch["image"].shape))
            time.sleep(0.2 if self.calls <= 2 or self.calls == 5 else 0.001)
            return {}

    model = Sleeper()
    assert 1 <= latency_ms(model, 16, 4, "cpu", warm_up=2, most_runs=9) < 100
    assert (model.calls, model.shapes, model.training) == (11, {(4, 3, 16, 16)}, False)
    slow = Sleeper()
    latency_ms(slow, 16, 4, "cpu", warm_up=2, most_runs=9, max_s=0.1)
    assert slow.calls == 5, "three are timed even where time is up"
