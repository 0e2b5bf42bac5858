"""From Python: the same configs, checks and runs as by the commands."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

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


@pytest.mark.parametrize("orientation", [3, 6])
@pytest.mark.parametrize("mode", ["RGB", "CMYK"])
def test_a_photo_is_upright_in_every_form(trained, tmp_path, mode, orientation):
    """As a phone writes it: the pixels lie, EXIF says so. Its two halves differ, so that turning it would show."""
    run, _ = trained
    pixels = np.random.default_rng(0).integers(0, 80, (41, 56, 3), dtype=np.uint8)
    pixels[:13, :, 2] += 170
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    path = tmp_path / "photo.jpg"
    Image.fromarray(pixels).convert(mode).save(path, exif=exif)
    with Image.open(path) as image:
        assert image.mode == mode
        found = potstill.predict(run, [path, path.read_bytes(), image], tta="none")
    assert [p.error for p in found] == [None] * 3
    assert np.ptp(found.probabilities, axis=0) == pytest.approx(np.zeros(4), abs=1e-6)
    with Image.open(path) as image:
        image.getexif().clear()
        lying = potstill.predict(run, image, tta="none")
    assert lying.probabilities[0] != pytest.approx(found.probabilities[0], abs=1e-4)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "HSV", "I;16"])
def test_pixels_of_every_mode_are_an_image(trained, mode):
    image = Image.new(mode, (40, 30), 1) if mode == "I;16" else Image.new("RGB", (40, 30), "white")
    image = image.convert(mode)
    found = potstill.predict(trained[0], [image])
    assert found[0].error is None
    assert mode == "I;16" or found[0].labels == ["white"]


def test_pixels_without_a_range_are_a_row_with_its_reason(trained):
    found = potstill.predict(trained[0], [Image.new("F", (40, 30)), Image.new("RGB", (0, 3))])
    assert found[0].error == "unreadable: 32-bit floating point pixels have no known range"
    assert found[1].error is not None


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
        (np.zeros((0, 4, 3), np.uint8), r"must be uint8 \[H, W, 3\]"),
        (None, "must be paths, bytes .*, got builtins.NoneType"),
        (5, "got builtins.int"),
        (["missing.jpg", None], "missing.jpg"),
        ([b"", None], "got builtins.NoneType"),
        (torch.zeros(2, 3, 8, 8), "got torch.Tensor; a tensor .* becomes one by"),
    ],
)
def test_what_is_no_image_is_refused(trained, images, says):
    with pytest.raises(UserError, match=says):
        potstill.predict(trained[0], images)


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ({"tta": "flips"}, "tta must be one of none, flip, five_crop, ten_crop, got 'flips'"),
        ({"precision": "fp8"}, "precision must be one of fp32, bf16, fp16, got 'fp8'"),
        ({"batch_size": 0}, "batch_size must be >= 1, got 0"),
        ({"batch_size": 1.5}, "batch_size was refused"),
        ({"checkpoint": "newest"}, "checkpoint must be one of best, last, got 'newest'"),
        ({"use_gpu": "perhaps"}, "use_gpu was refused"),
    ],
)
def test_options_of_predict_are_checked(trained, option, says):
    with pytest.raises(UserError, match=says):
        potstill.predict(trained[0], Image.new("RGB", (32, 32)), **option)


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
    with pytest.raises(
        UserError, match=r"model\._target_ must be one of .*timm.*did you mean timm"
    ):
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
    from potstill.distil_losses import LOSSES as OF_TEACHERS
    from potstill.losses import LOSSES

    assert set(registry.RESERVED["loss"]) == {*LOSSES, *OF_TEACHERS}
    assert set(registry.RESERVED["augmentation"]) == set(policies._BUILT_IN)
    for kind, name in (("loss", "kl"), ("augmentation", "trivial"), ("source", "folder")):
        with pytest.raises(UserError, match=f"there is a {kind} '{name}' already"):
            registry.register(kind, name)(lambda: None)
