"""What is evaluated: on which images, whether the run knows them, and what is written of it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from conftest import tiny_overrides, write_tree
from potstill import runs
from potstill.config import EvaluateConfig, compose
from potstill.errors import UserError
from potstill.evaluation import evaluate_run
from potstill.predictions import Predictions


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


def test_a_manifest_with_columns_of_its_own_outside_its_folder(asked, tmp_path):
    """The run was trained on folders; the manifest names its columns otherwise, and its images stand beside it."""
    write_tree(tmp_path / "tree", seed=17)
    (tmp_path / "lists").mkdir()
    rows = [
        f"../tree/val/{colour}/{i:03d}.png,{colour},unused"
        for colour in ("red", "white")
        for i in range(3)
    ]
    listed = tmp_path / "lists" / "field.csv"
    listed.write_text("\n".join(["photo,species,label", *rows]) + "\n")
    columns = ["data.columns.image=photo", "data.columns.label=species"]
    there = [f"data.root={listed}", "data.source=manifest", *columns]
    with pytest.raises(UserError, match=r"data\.allow_outside"):
        evaluate_run(asked(*there))
    found = evaluate_run(asked(*there, "data.allow_outside=true"))
    assert {row["class"]: row["support"] for row in found["per_class"]} == {"red": 3, "white": 3}
    assert found["samples"] == 6


def test_a_plugins_source_may_be_evaluated_on(asked, tmp_path, monkeypatch):
    tree = write_tree(tmp_path / "tree", seed=17)
    (tmp_path / "only_white.py").write_text(
        """
from pathlib import Path

from potstill import register
from potstill.data.sources import Entry, Listing


class Files:
    def read(self, entry):
        return Path(entry.place).read_bytes()


@register("source", "only_white")
def only_white(data):
    paths = sorted(Path(data.root).glob("val/white/*.png"))
    return Listing([Entry(p.name, ("white",), place=str(p)) for p in paths], Files(), data.root)
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    there = ["plugins=[only_white]", "data.source=only_white", f"data.root={tree}"]
    found = evaluate_run(asked(*there))
    assert [(row["class"], row["support"]) for row in found["per_class"]] == [("white", 4)]


def test_each_checkpoint_is_read_through_once(asked, trained, monkeypatch):
    """To be sure of it: its SHA-256 costs what reading it costs."""
    read: list[Path] = []
    real = runs.file_sha256
    monkeypatch.setattr(runs, "file_sha256", lambda path: read.append(path) or real(path))
    evaluate_run(asked())
    weights = [path for path in read if path.name == "model.safetensors"]
    assert weights
    assert len(weights) == len(set(weights)) <= 2


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


# ------------------------------------------------------------------------------- other kinds of labels
def own_run(tree: Path, cache_dir: Path, runs_dir: Path, *overrides: str) -> Path:
    from potstill.fit import fit

    fit(compose("train", [*tiny_overrides(tree, cache_dir, runs_dir), "run.name=run", *overrides]))
    return runs_dir / "run"


def kept(run_dir: Path) -> tuple[Predictions, dict]:
    """The best checkpoint's predictions and thresholds."""
    folder = runs.best_checkpoint(run_dir).folder
    with np.load(folder / "val_predictions.npz") as arrays:
        found = Predictions.of_arrays(arrays)
    return found, json.loads((folder / "thresholds.json").read_text())


def test_a_binary_run_is_measured_at_the_threshold_of_its_validation(
    tiny_tree, cache_dir, tmp_path, ray_session
):
    run_dir = own_run(
        tiny_tree, cache_dir, tmp_path, "task=binary", "data.classes=[blue,white]",
        "task.threshold=max_f1", "task.metrics=[auc,f1,calibration_error]", "loop.monitor=val_auc",
        "loop.batch_size=8",
    )  # fmt: skip
    found, thresholds = kept(run_dir)
    assert thresholds["thresholds"] == {"white": found.thresholds[0]}
    history = runs.read_json(run_dir / "training_history.json")
    assert len(history["val_auc"]) == len(history["val_f1"]) == 2
    out = tmp_path / "out"
    asked = [f"from_run={run_dir}", f"cache.dir={cache_dir}", f"output={out}"]
    own = evaluate_run(compose("evaluate", asked))
    assert own["kind"] == "binary"
    assert own["thresholds"] == thresholds["thresholds"]
    best = runs.read_json(run_dir / "summary.json")["best_metrics"]
    for name in ("loss", "auc", "f1", "top1_acc", "calibration_error"):
        assert own["metrics"][name] == pytest.approx(best[f"val_{name}"], rel=1e-4)
    assert {p.stem for p in out.glob("*.png")} == {"confusion_matrix", "curves", "reliability"}
    # on other images the threshold stays, though another would suit them better
    strangers = write_tree(tmp_path / "strangers", seed=11, val=20)
    for path in (strangers / "val" / "white").iterdir():
        pixels = np.asarray(Image.open(path)) // 2
        Image.fromarray(pixels).save(path)
    there = ["data.classes=[blue,white]", "metrics=[f1,brier]", "tta=flip"]
    other = evaluate_run(compose("evaluate", [*asked, f"data.root={strangers}", *there]))
    assert other["thresholds"] == own["thresholds"]
    assert set(other["metrics"]) == {"loss", "top1_acc", "top5_acc", "macro_f1", "f1", "brier"}
    assert other["samples"] == 40


def test_a_multi_label_run_from_manifest_to_table(tiny_tree, cache_dir, tmp_path, ray_session):
    """Each colour, and `dark` or `light`, matched by name to a manifest that lacks one of them."""
    light = {"blue": "dark", "green": "dark", "red": "dark", "white": "light"}

    def manifest(name: str, tree: Path, colours: list[str], splits=("train", "val")) -> Path:
        rows = ["path,label,split"]
        for split in splits:
            rows += [
                f"{path.relative_to(tree)},{colour}|{light[colour]},{split}"
                for colour in colours
                for path in sorted((tree / split / colour).iterdir())
            ]
        (tree / name).write_text("\n".join(rows) + "\n")
        return tree / name

    tree = write_tree(tmp_path / "tree", seed=3)
    root = manifest("all.csv", tree, list(light))
    run_dir = own_run(
        tree, cache_dir, tmp_path, "task=multilabel", "data.source=manifest", f"data.root={root}",
        "data.multi_label=true", "task.metrics=[auc,average_precision,exact_match]", "loop.epochs=3",
        "task.terms.task.class_weights=balanced",
    )  # fmt: skip
    found, thresholds = kept(run_dir)
    classes = runs.read_json(run_dir / "run.json")["classes"]
    assert classes == ["blue", "dark", "green", "light", "red", "white"]
    assert list(thresholds["thresholds"]) == classes
    assert found.targets.sum() == 2 * 16
    assert (run_dir / "plots" / "curves.png").exists()
    out = tmp_path / "out"
    asked = [f"from_run={run_dir}", f"cache.dir={cache_dir}", f"output={out}"]
    own = evaluate_run(compose("evaluate", asked))
    best = runs.read_json(run_dir / "summary.json")["best_metrics"]
    for name in ("loss", "top1_acc", "macro_f1", "auc", "exact_match"):
        assert own["metrics"][name] == pytest.approx(best[f"val_{name}"], rel=1e-3)
    assert {p.stem for p in out.glob("*.png")} == {"curves", "reliability"}
    few = manifest("few.csv", write_tree(tmp_path / "few", seed=7), ["red", "white"], ("val",))
    other = evaluate_run(compose("evaluate", [*asked, f"data.root={few}", "subset=val"]))
    assert [row["class"] for row in other["per_class"]] == ["dark", "light", "red", "white"]
    assert [row["support"] for row in other["per_class"]] == [4, 4, 4, 4]
    assert other["thresholds"] == thresholds["thresholds"]


def test_a_number_that_is_none_is_null_in_every_file(tiny_tree, cache_dir, tmp_path, ray_session):
    """No AUC without both classes; strict readers know no NaN."""

    def strict(path: Path) -> dict:
        def refuse(word: str) -> None:
            raise AssertionError(f"{path} holds {word}")

        return json.loads(path.read_text(), parse_constant=refuse)

    tree = write_tree(tmp_path / "tree", seed=3)
    shutil.rmtree(tree / "val" / "white")
    run_dir = own_run(
        tree, cache_dir, tmp_path, "task=binary", "data.classes=[blue,white]", "task.metrics=[auc]",
        "loop.batch_size=8",
    )  # fmt: skip
    assert strict(run_dir / "training_history.json")["val_auc"] == [None, None]
    assert strict(run_dir / "summary.json")["best_metrics"]["val_auc"] is None
    assert all(np.isnan(r["val_auc"]) for r in runs.read_journal(run_dir) if r["kind"] == "epoch")
    for meta in run_dir.glob("checkpoints/*/meta.json"):
        strict(meta)
    places = [f"from_run={run_dir}", f"cache.dir={cache_dir}", f"output={tmp_path / 'out'}"]
    found = evaluate_run(compose("evaluate", places))
    assert np.isnan(found["metrics"]["auc"])
    written = strict(tmp_path / "out" / "evaluation.json")
    assert written["metrics"]["auc"] is None
    assert written["metrics"]["loss"] == found["metrics"]["loss"]


def test_a_metric_that_is_not_for_the_runs_kind_is_refused_at_once(asked):
    with pytest.raises(UserError, match=r"metrics must be of balanced_acc, .* got 'exact_match'"):
        evaluate_run(asked("metrics=[exact_match]"))
