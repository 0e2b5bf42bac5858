"""What is evaluated: on which images, whether the run knows them, and what is written of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_overrides, write_tree
from potstill import runs
from potstill.config import EvaluateConfig, compose
from potstill.errors import UserError
from potstill.evaluate import evaluate_run


@pytest.fixture(scope="module")
def trained(tiny_tree: Path, cache_dir: Path, tmp_path_factory, ray_session) -> Path:
    """The folder of a run of two epochs."""
    from potstill.fit import fit

    folder = tmp_path_factory.mktemp("evaluated")
    fit(compose("train", [*tiny_overrides(tiny_tree, cache_dir, folder), "run.name=run"]))
    return folder / "run"


@pytest.fixture
def asked(trained: Path, cache_dir: Path, tmp_path: Path):
    def make(*overrides: str) -> EvaluateConfig:
        places = (f"from_run={trained}", f"cache.dir={cache_dir}", f"output={tmp_path / 'out'}")
        return compose("evaluate", [*places, *overrides])

    return make


def test_the_runs_own_validation_images_are_not_warned_of(asked, tmp_path, capsys):
    found = evaluate_run(asked())
    assert found["warnings"] == []
    assert "trained on" not in capsys.readouterr().out
    assert runs.read_json(tmp_path / "out" / "evaluation.json") == found


def test_images_that_the_run_was_trained_on_are_counted(asked, tiny_tree, tmp_path, capsys):
    """Other names, other classes' order, no splits: only the content tells."""
    mixed = tmp_path / "mixed"
    strangers = write_tree(tmp_path / "strangers", seed=11)
    for at, name in enumerate(("red", "blue")):
        (mixed / name).mkdir(parents=True)
        for i in range(3 + at):
            shutil.copy(tiny_tree / "train" / name / f"{i:03d}.png", mixed / name / f"known{i}.png")
        for i in range(4):
            shutil.copy(strangers / "val" / name / f"{i:03d}.png", mixed / name / f"new{i}.png")
    found = evaluate_run(asked(f"data.root={mixed}"))
    assert found["samples"] == 15
    (warning,) = found["warnings"]
    assert "trained on 7 of these 15 images" in warning["message"]
    assert f"! trained_on: {warning['message']}" in capsys.readouterr().out
    assert runs.read_json(tmp_path / "out" / "evaluation.json")["warnings"] == [warning]
    unseen = evaluate_run(asked(f"data.root={strangers}"))
    assert unseen["warnings"] == []


def test_where_split_folders_stand_none_is_made_up(asked, tmp_path):
    tree = write_tree(tmp_path / "tree", seed=5)
    (tree / "val").rename(tree / "test")
    with pytest.raises(
        UserError,
        match=r"subset must be one that .* has \(test, train\), got 'val'; add subset=test",
    ):
        evaluate_run(asked(f"data.root={tree}"))
    assert evaluate_run(asked(f"data.root={tree}", "subset=test"))["samples"] == 16
    assert evaluate_run(asked(f"data.root={tree}", "subset=train"))["samples"] == 48


def test_the_table_is_in_percent_and_adds_up(asked, trained, tmp_path):
    found = evaluate_run(asked())
    best = runs.best_checkpoint(trained)
    kept = np.load(best.folder / "val_predictions.npz")
    classes = runs.read_json(trained / "run.json")["classes"]
    assert [row["class"] for row in found["per_class"]] == classes
    for row in found["per_class"]:
        assert set(row) == {"class", "support", "precision", "recall", "f1"}
        mine = kept["label"] == classes.index(row["class"])
        hits = (kept["prediction"] == kept["label"])[mine]
        assert row["support"] == mine.sum() == 4
        assert row["recall"] == pytest.approx(100 * hits.mean())
    assert np.mean([row["f1"] for row in found["per_class"]]) == pytest.approx(
        found["metrics"]["macro_f1"], abs=1e-4
    )
    assert found["checkpoint"] == best.folder.name
