"""Where in an image a patch model sees what it says: patch logits over the images they were made of.

Shape suffixes: N images, H x W pixels, h x w patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from potstill import registry, runs
from potstill.config import load_run_config
from potstill.report import INK, MUTED, new_figure, png, read_predictions

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.figure import Figure

    from potstill.data.cache import Cache
    from potstill.predictions import Predictions

COLUMNS = 6


def write_heatmaps(run_dir: Path, cache: Cache | None = None, count: int = 12) -> Path | None:
    """Draw validation images of a run's best checkpoint with their patch logits into `plots/heatmaps.png`.

    `cache`: the run's images; null opens those that run.json names. `count` images, half of each class: in each the
    surest, and those that the model is most wrong (or least sure) about. Returns the file; None where the model has no
    patch logits or the task is not binary, which is known without torch for timm's models.

    Raises UserError where the run has no predictions or its cache is gone.
    """
    if not _has_patches(run_dir):
        return None
    from potstill.data.cache import open_cache

    _, found = read_predictions(run_dir)
    if found.kind != "binary":
        return None
    import torch

    from potstill.assemble import Predictor

    about = runs.read_json(run_dir / "run.json")
    split = (cache or open_cache(Path(about["dataset"]["dir"]))).split("val")
    picked = _picks(found, count)
    rows = [split.row_of(int(found.id[at])) for at in picked]
    predictor = Predictor(run_dir, use_gpu=False)
    images = torch.from_numpy(split.read(rows)).permute(0, 3, 1, 2)
    with torch.inference_mode():
        seen = next(iter(predictor.augment.eval_views(images)))
        patch_logits = predictor.model({"image": seen})["patch_logits"][:, 0]
    pixels = (seen * 255).round().byte().permute(0, 2, 3, 1).numpy()
    captions = [_caption(found, at, predictor.classes) for at in picked]
    figure = heatmap_figure(
        pixels, patch_logits.numpy(), predictor.model.patch, captions, predictor.outputs[0]
    )
    path = run_dir / "plots" / "heatmaps.png"
    runs.atomic_write(path, png(figure))
    return path


def _has_patches(run_dir: Path) -> bool:
    config = load_run_config(run_dir)
    target = config.model.get("_target_", "timm")
    if target == "timm":
        return False
    registry.load_plugins(config.plugins or [])
    return getattr(registry.lookup("model", target), "patch", None) is not None


def _picks(found: Predictions, count: int) -> list[int]:
    """Places in `found`: class 0, then class 1; of each the surest first, the most wrong ones last."""
    import numpy as np

    assert found.score is not None
    picked = []
    for label in (0, 1):
        at = np.flatnonzero(found.label == label)
        of_truth = found.score[at] if label else 1 - found.score[at]
        at = at[np.argsort(-of_truth, kind="stable")]
        each = max(count // 4, 1)
        picked += [*at[:each], *at[max(each, len(at) - each) :]]
    return [int(at) for at in picked]


def _caption(found: Predictions, at: int, classes: Sequence[str]) -> str:
    assert found.score is not None
    return f"{classes[found.label[at]]}: P({classes[1]}) = {found.score[at]:.2f}"


# ------------------------------------------------------------------------------------------- pictures
def heatmap_figure(
    images: np.ndarray,
    patch_logits: np.ndarray,
    patch: tuple[int, int],
    captions: Sequence[str],
    positive: str = "the positive class",
) -> Figure:
    """Each image, and beneath it its patch logits in their places over it, all on one scale around 0.

    `images` uint8 [N, H, W, 3]; `patch_logits` [N, h, w], of which (i, j) saw the pixels [i * stride, i * stride + size)
    with `patch` = (size, stride); `captions` [N]; `positive`: what a logit above 0 speaks for.
    """
    import numpy as np

    heat = spread_patches(patch_logits, patch, images.shape[1:3])
    # a few wild patches must not take the colour from all others
    limit = float(np.percentile(np.abs(patch_logits), 99)) or 1.0
    columns = min(COLUMNS, len(images))
    blocks = -(-len(images) // columns)
    figure = new_figure(2.0 * columns + 1.2, 4.15 * blocks + 0.6)
    grid = figure.subplots(2 * blocks, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    shown = None
    for at, caption in enumerate(captions):
        row, column = 2 * (at // columns), at % columns
        above, below = grid[row, column], grid[row + 1, column]
        above.imshow(images[at], interpolation="nearest")
        above.set_title(
            caption.replace("$", r"\$"), fontsize=7.5, fontweight="normal", color=INK, pad=4
        )
        below.imshow(images[at].mean(2), cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        shown = below.imshow(
            np.ma.masked_invalid(heat[at]),
            cmap="RdBu_r",
            vmin=-limit,
            vmax=limit,
            alpha=0.62,
            interpolation="nearest",
        )
    if shown is not None:
        bar = figure.colorbar(shown, ax=grid, fraction=0.03, pad=0.02, aspect=40, extend="both")
        bar.ax.set_frame_on(False)
        bar.set_label(f"patch logit (positive: {positive})", color=MUTED)
    size, stride = patch
    figure.suptitle(
        f"Patch logits   ({size} x {size} pixels, every {stride}; their mean is the image's logit)",
        x=0.01,
        ha="left",
        fontsize=11,
        color=INK,
    )
    return figure


def spread_patches(
    patch_logits: np.ndarray, patch: tuple[int, int], pixels: Sequence[int]
) -> np.ndarray:
    """[N, h, w] -> [N, H, W] of `pixels` = (H, W): each pixel the mean of the patches that saw it, NaN where none did."""
    import numpy as np

    size, stride = patch
    count, rows, columns = patch_logits.shape
    total = np.zeros((count, *pixels))
    seen = np.zeros(tuple(pixels))
    for y in range(size):
        for x in range(size):
            place = np.s_[y : y + stride * rows : stride, x : x + stride * columns : stride]
            total[:, *place] += patch_logits
            seen[place] += 1
    with np.errstate(invalid="ignore"):
        return total / np.where(seen > 0, seen, np.nan)
