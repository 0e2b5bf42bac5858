"""Heat maps: every patch logit in its place, on one scale, in the report and in Aim."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from potstill import runs
from potstill.config import compose, to_yaml
from potstill.heatmaps import heatmap_figure, spread_patches, write_heatmaps
from potstill.models.patches import TinyLaDeDa
from potstill.predictions import binary_predictions
from potstill.report import png, report
from synthetic_runs import make_cache, make_run, whole_journal

CLASSES = ["0_real", "1_fake"]


def test_every_pixel_is_the_mean_of_the_patches_that_saw_it():
    """Patches of 3 pixels, one every 2: of the columns 0-2 and 2-4, and of the rows 0-2."""
    found = spread_patches(np.array([[[1.0, 3.0]], [[-2.0, 0.0]]]), (3, 2), (4, 6))
    assert found.shape == (2, 4, 6)
    for row in range(3):
        np.testing.assert_array_equal(found[0, row], [1, 1, 2, 3, 3, np.nan])
        np.testing.assert_array_equal(found[1, row], [-2, -2, -1, 0, 0, np.nan])
    assert np.isnan(found[:, 3]).all()


def test_a_patch_between_others_and_patches_with_gaps():
    logits = np.zeros((1, 3, 3))
    logits[0, 1, 2] = 8
    found = spread_patches(logits, (9, 8), (64, 64))[0]
    assert found[8:17, 16:25].min() > 0
    assert np.argwhere(found > 0).min(0).tolist() == [8, 16]
    assert np.argwhere(found > 0).max(0).tolist() == [16, 24]
    apart = spread_patches(np.ones((1, 2, 2)), (2, 4), (6, 6))[0]
    assert int(np.isfinite(apart).sum()) == 16


def test_the_picture_has_one_scale_around_zero_and_says_what_is_positive():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (8, 21, 21, 3), dtype=np.uint8)
    logits = rng.normal(2, 1, (8, 9, 9))
    logits[3, 4, 4] = -1000  # one wild patch
    figure = heatmap_figure(images, logits, (5, 2), [f"number ${i}" for i in range(8)], "1_fake")
    overlays: list[Any] = [axes.images[1] for axes in figure.axes if len(axes.images) == 2]
    assert len(overlays) == 8
    limits = {overlay.get_clim() for overlay in overlays}
    ((low, high),) = limits
    assert low == -high
    assert 3 < high < 100
    np.testing.assert_allclose(
        overlays[5].get_array(), np.ma.masked_invalid(spread_patches(logits, (5, 2), (21, 21))[5])
    )
    assert "patch logit (positive: 1_fake)" in {axes.get_ylabel() for axes in figure.axes}
    titles = [found for axes in figure.axes if (found := axes.get_title("left"))]
    assert titles == [rf"number \${i}" for i in range(8)]
    with Image.open(io.BytesIO(png(figure))) as picture:
        assert len(np.unique(np.asarray(picture.convert("RGB")).reshape(-1, 3), axis=0)) > 200


# ------------------------------------------------------------------------------------- of a whole run
@pytest.fixture
def patch_run(tmp_path: Path) -> Path:
    """A finished run of TinyLaDeDa on 16 px, with 8 validation images; the red of an image is its id - 1000."""
    rng = np.random.default_rng(0)
    label = np.arange(8) % 2
    score = np.clip(0.5 + 0.3 * (2 * label - 1) + rng.normal(0, 0.2, 8), 0.01, 0.99)
    ids = np.arange(8) + 1000
    found = binary_predictions(ids, label, score.astype(np.float32), 0.5)
    run_dir = make_run(tmp_path, whole_journal(1), classes=CLASSES)
    config = compose(
        "train",
        [
            "experiment=realfake_teacher",
            "model=tiny_ladeda",
            "data.root=x",
            "data.decode.image_px=16",
        ],
    )
    runs.atomic_write(run_dir / "config.yaml", to_yaml(config))
    buffer = io.BytesIO()
    np.savez(buffer, **found.arrays())  # type: ignore[arg-type]
    torch.manual_seed(0)
    best = {
        "folder": runs.checkpoint_name(8),
        "step": 8,
        "epoch": 1,
        "metric": "val_auc",
        "value": 0.9,
    }
    runs.save_checkpoint(
        run_dir,
        8,
        TinyLaDeDa(1).state_dict(),
        {},
        {"epoch": 1, "epoch_done": True, "best": best},
        {"val_predictions.npz": buffer.getvalue()},
    )
    make_cache(tmp_path / "cache" / "k1", {"id": ids, "label": label.astype(np.int32)}, CLASSES, 16)
    return run_dir


def test_the_surest_and_the_most_wrong_of_each_class_are_shown(patch_run, monkeypatch):
    import potstill.heatmaps as heatmaps

    drawn = {}

    def spy(images, patch_logits, patch, captions, positive):
        drawn.update(
            images=images, logits=patch_logits, patch=patch, captions=captions, positive=positive
        )
        return heatmap_figure(images, patch_logits, patch, captions, positive)

    monkeypatch.setattr(heatmaps, "heatmap_figure", spy)
    assert write_heatmaps(patch_run, count=4) == patch_run / "plots" / "heatmaps.png"
    with np.load(
        patch_run / "checkpoints" / runs.checkpoint_name(8) / "val_predictions.npz"
    ) as saved:
        score, label = saved["score"], saved["label"]
    real, fake = np.flatnonzero(label == 0), np.flatnonzero(label == 1)
    real = real[np.argsort(score[real], kind="stable")]
    fake = fake[np.argsort(-score[fake], kind="stable")]
    expected = [real[0], real[-1], fake[0], fake[-1]]
    assert drawn["images"][:, 0, 0, 0].tolist() == expected
    assert drawn["captions"][0] == f"0_real: P(1_fake) = {score[expected[0]]:.2f}"
    assert (drawn["patch"], drawn["positive"]) == ((5, 2), "1_fake")
    model = TinyLaDeDa(1, preprocessing="right_diag").eval()
    state = runs.best_checkpoint(patch_run).model_state()
    model.load_state_dict(state)
    image = torch.from_numpy(drawn["images"][:1]).permute(0, 3, 1, 2).float() / 255
    with torch.no_grad():
        torch.testing.assert_close(
            torch.from_numpy(drawn["logits"][:1]), model({"image": image})["patch_logits"][:, 0]
        )


def test_the_heat_map_stands_in_the_report(patch_run):
    assert patch_run / "plots" / "heatmaps.png" in report(patch_run)
    assert 'alt="heatmaps"' in (patch_run / "report.html").read_text()


def test_the_heat_map_stands_in_aim(patch_run, tmp_path):
    from potstill.tracking import fill

    write_heatmaps(patch_run, count=4)
    fill(patch_run, tmp_path / "aim")
    code = (
        "import sys; from aim import Repo\n"
        "for s in Repo(sys.argv[1]).query_images('images.name == \"heatmaps\"', report_mode=0).iter():\n"
        "    for step, (images, *_) in s.data.items(): print(step, len(images), *images[0].to_pil_image().size)\n"
    )
    said = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "aim")],
        capture_output=True,
        text=True,
        check=True,
    )
    with Image.open(patch_run / "plots" / "heatmaps.png") as picture:
        assert said.stdout.split() == ["8", "1", *map(str, picture.size)]


def test_a_cache_that_is_gone_costs_the_heat_map_alone(patch_run, tmp_path):
    (tmp_path / "cache" / "k1" / "manifest.json").unlink()
    written = report(patch_run)
    assert {"curves", "reliability"} < {path.stem for path in written}
    assert "heatmaps" not in {path.stem for path in written}
    assert "No heat maps: cache: " in (patch_run / "report.html").read_text()


@pytest.mark.parametrize("error", [RuntimeError("no such key"), ZeroDivisionError()])
def test_a_heat_map_that_cannot_be_drawn_is_a_warning(patch_run, monkeypatch, capsys, error):
    import potstill.heatmaps as heatmaps

    def broken(*_):
        raise error

    monkeypatch.setattr(heatmaps, "heatmap_figure", broken)
    written = report(patch_run)
    assert (patch_run / "report.html") in written
    assert "heatmaps" not in {path.stem for path in written}
    said = str(error) or "ZeroDivisionError"
    assert f"! No heat maps of {patch_run.name}: {said}" in capsys.readouterr().out
    assert f"No heat maps: {said}" in (patch_run / "report.html").read_text()


def test_other_models_have_none_and_need_no_torch_to_say_so(tmp_path):
    run_dir = make_run(tmp_path, whole_journal(1), classes=CLASSES)
    code = (
        "import sys; from pathlib import Path; from potstill.heatmaps import write_heatmaps\n"
        "assert write_heatmaps(Path(sys.argv[1])) is None\n"
        "assert 'torch' not in sys.modules\n"
    )
    source = Path(runs.__file__).parents[1]
    subprocess.run([sys.executable, "-c", code, str(run_dir)], check=True, cwd=source)
