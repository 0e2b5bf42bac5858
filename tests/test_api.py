"""From Python: the same configs, checks and runs as by the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import potstill
from conftest import run_job, tiny_overrides, write_tree
from potstill import registry
from potstill.errors import UserError


@pytest.fixture(scope="module")
def trained(tmp_path_factory, cache_dir, ray_session):
    folder = tmp_path_factory.mktemp("api")
    tree = write_tree(folder / "tree", train=24)
    run = potstill.train(
        [*tiny_overrides(tree, cache_dir, folder / "runs"), "loop.epochs=4", "augment.tta=flip"]
    )
    return run, tree


def test_training_gives_the_run_and_its_summary(trained):
    run, _ = trained
    assert run.path.is_dir()
    assert run.summary["status"] == "finished"
    assert Path(run) == run.path


def test_a_changed_config_is_checked_again():
    config = potstill.compose(["data.root=nowhere", "model.name=resnet18"])
    config.loop.epochs = 0
    with pytest.raises(UserError, match=r"loop\.epochs must be >= 1, got 0"):
        potstill.train(config)
    config.loop.epochs = "many"
    with pytest.raises(UserError, match=r"loop\.epochs was refused"):
        potstill.train(config)


def test_evaluation_and_prediction_agree(trained):
    run, tree = trained
    result = potstill.evaluate(run)
    paths = sorted((tree / "val").glob("*/*.png"))
    found = potstill.predict(run, paths, batch_size=7)
    right = np.mean([p.labels == [path.parent.name] for p, path in zip(found, paths, strict=True)])
    assert 100 * right == pytest.approx(result["metrics"]["top1_acc"])
    assert found.classes == ["blue", "green", "red", "white"]
    assert found.probabilities.sum(1) == pytest.approx(np.ones(len(paths)), abs=1e-5)
    assert [p.confidence for p in found] == pytest.approx(found.probabilities.max(1).tolist())


def test_an_image_is_the_same_in_every_form(trained):
    run, tree = trained
    path = next((tree / "val").glob("red/*.png"))
    image = Image.open(path)
    forms = [str(path), path, path.read_bytes(), image, np.array(image)]
    found = potstill.predict(run, forms)
    assert np.ptp(found.probabilities, axis=0) == pytest.approx(np.zeros(4), abs=1e-6)
    assert potstill.predict(run, path)[0].labels == found[0].labels
    folder = potstill.predict(run, tree / "val")
    assert len(folder) == 16


def test_an_unreadable_image_is_a_row_with_its_reason(trained, tmp_path):
    run, tree = trained
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    good = next((tree / "val").glob("red/*.png"))
    found = potstill.predict(run, [tmp_path / "bad.jpg", good])
    assert found[0].labels == []
    assert found[0].error is not None
    assert found[0].error.startswith("not an image")
    assert np.isnan(found.probabilities[0]).all()
    assert found[1].error is None


@pytest.mark.parametrize(
    ("images", "says"),
    [
        ("missing.jpg", "images must exist, got 'missing.jpg'"),
        ([], "at least one image"),
        (np.zeros((4, 4, 4), np.float32), r"must be uint8 \[H, W, 3\]"),
    ],
)
def test_what_is_no_image_is_refused(trained, images, says):
    with pytest.raises(UserError, match=says):
        potstill.predict(trained[0], images)


def test_the_command_writes_a_table(trained, tmp_path):
    import pyarrow.csv
    import pyarrow.parquet

    run, tree = trained
    for name, read in (("p.csv", pyarrow.csv.read_csv), ("p.parquet", pyarrow.parquet.read_table)):
        arguments = (f"from_run={run.path}", f"images={tree / 'val'}", f"output={name}")
        done = run_job("predict", *arguments, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        table = read(tmp_path / name)
        assert table.num_rows == 16
        assert table.column_names[:4] == ["image", "class", "confidence", "error"]
        assert table.column_names[4:] == [f"p({c})" for c in ("blue", "green", "red", "white")]
    refused = run_job(
        "predict", f"from_run={run.path}", f"images={tree}", "output=p.txt", cwd=tmp_path
    )
    assert refused.returncode == 2
    assert "output must end in .csv or .parquet, got 'p.txt'" in refused.stderr


# --------------------------------------------------------------------------------------- registering
def test_what_is_registered_is_found_and_nothing_replaces_another():
    @registry.register("loss", "of_this_test")
    def loss(logits_BK, label_B):
        return logits_BK.sum(1)

    assert registry.lookup("loss", "of_this_test") is loss
    registry.register("loss", "of_this_test")(loss)
    with pytest.raises(UserError, match="there is a loss 'of_this_test' already"):
        registry.register("loss", "of_this_test")(lambda logits_BK: logits_BK)
    with pytest.raises(UserError, match=r"model\._target_ must be one of timm.*did you mean timm"):
        registry.lookup("model", "tim")
    del registry._KNOWN["loss"]["of_this_test"]


def test_a_plugin_that_does_not_import_is_named_with_its_error(tmp_path, monkeypatch):
    (tmp_path / "broken_plugin.py").write_text("import not_there_at_all\n")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"plugins: 'broken_plugin' cannot be imported .*not_there"):
        potstill.compose(["plugins=[broken_plugin]", "data.root=x"])
    with pytest.raises(UserError, match="plugins: 'nobody' cannot be imported"):
        potstill.compose(["plugins=[nobody]", "data.root=x"])


def test_no_plugin_replaces_what_is_built_in():
    from potstill.data import policies
    from potstill.losses import LOSSES

    assert set(registry.RESERVED["loss"]) == set(LOSSES)
    assert set(registry.RESERVED["augmentation"]) == set(policies._BUILT_IN)
    for kind, name in (("loss", "kl"), ("augmentation", "trivial"), ("source", "folder")):
        with pytest.raises(UserError, match=f"there is a {kind} '{name}' already"):
            registry.register(kind, name)(lambda: None)
