"""What a finished run says of images: in memory, or in files.

Shapes: N images, K classes, H x W pixels as stored by the run's decoding.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from potstill import console, runs
from potstill.config import PredictConfig, checked
from potstill.errors import UserError
from potstill.storage import home

if TYPE_CHECKING:
    from PIL import Image

    Given = str | Path | bytes | np.ndarray | Image.Image


@dataclass(frozen=True)
class ImagePrediction:
    """Of one image. `labels`: the class or, of a multi-label task, every class above its threshold."""

    source: str
    labels: list[str]
    confidence: float
    """Probability of the class; of a multi-label task, that of the most probable one."""
    error: str | None = None
    """Why there is nothing: the image could not be read."""


@dataclass(frozen=True)
class ImagePredictions:
    """Of N images: `[i]`, `len()` and iteration give `ImagePrediction`s."""

    classes: list[str]
    probabilities: np.ndarray
    """[N, K] float32; NaN for an image that could not be read."""
    rows: list[ImagePrediction]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> ImagePrediction:
        return self.rows[i]

    def __iter__(self) -> Iterator[ImagePrediction]:
        return iter(self.rows)


def predict(
    run: str | Path,
    images: Given | Sequence[Given],
    *,
    checkpoint: str = "best",
    batch_size: int = 64,
    precision: str = "fp32",
    use_gpu: bool | None = None,
    tta: str | None = None,
) -> ImagePredictions:
    """What a run says of images: paths (a folder stands for the images below it), bytes of image files, PIL
    images, or uint8 arrays [H, W, 3] or [H, W].

    They are decoded and cropped as in the run's validation. `checkpoint`: best | last. `tta`: views that are
    averaged, none | flip | five_crop | ten_crop; None is the run's own. An image that cannot be read is a row
    with an `error`; what is no image at all is refused. Raises UserError.
    """
    import torch

    from potstill.assemble import Predictor
    from potstill.data.images import BadImage, decode_image

    asked = checked(
        PredictConfig(
            checkpoint=checkpoint,
            batch_size=batch_size,
            precision=precision,
            use_gpu=use_gpu,
            tta=tta,
        )
    )
    run_dir = runs.open_run(run, "from_run")
    given = list(_spread(images))
    if not given:
        raise UserError(f"images must name at least one image, got {images!r}")
    predictor = Predictor(run_dir, asked.checkpoint, asked.precision, asked.use_gpu, asked.tta)
    parts: list[np.ndarray] = []
    errors: list[str | None] = []
    with console.progress("Predicting", len(given)) as update:
        for start in range(0, len(given), asked.batch_size):
            pixels: list[np.ndarray] = []
            readable: list[bool] = []
            for item in given[start : start + asked.batch_size]:
                try:
                    pixels.append(decode_image(_content(item), predictor.decode))
                    errors.append(None)
                except (BadImage, OSError) as error:
                    errors.append(
                        f"{error.reason}: {error.detail}"
                        if isinstance(error, BadImage)
                        else str(error.strerror or error)
                    )
                readable.append(errors[-1] is None)
            part = np.full((len(readable), len(predictor.classes)), np.nan, np.float32)
            if pixels:
                batch = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)
                part[readable] = predictor.probabilities(batch).cpu().numpy()
            parts.append(part)
            update(start + len(readable))
    probabilities = np.concatenate(parts)
    rows = [
        ImagePrediction(_name(item), *predictor.said(p), None)
        if error is None
        else ImagePrediction(_name(item), [], float("nan"), error)
        for item, p, error in zip(given, probabilities, errors, strict=True)
    ]
    return ImagePredictions(predictor.classes, probabilities, rows)


def _spread(images: Any) -> Iterator[Given]:
    """Every single image; folders are walked. Raises UserError for what is none."""
    from potstill.data.folder import SIDECARS

    alone = isinstance(images, str | Path | bytes | np.ndarray)
    several: Iterable[Any] = [images] if alone or not isinstance(images, Iterable) else images
    for item in several:
        if isinstance(item, str | Path) and Path(item).expanduser().is_dir():
            folder = Path(item).expanduser()
            for path in sorted(folder.rglob("*")):
                inside = path.relative_to(folder).parts
                hidden = any(part.startswith(".") for part in inside)
                if path.is_file() and not hidden and path.suffix.lower() not in SIDECARS:
                    yield path
        elif isinstance(item, str | Path) and not Path(item).expanduser().exists():
            raise UserError(f"images must exist, got {str(item)!r}, which does not")
        else:
            _refuse_unless_image(item)
            yield item


def _refuse_unless_image(item: Any) -> None:
    from PIL import Image

    if isinstance(item, np.ndarray):
        shape = item.shape
        coloured = item.ndim == 3 and shape[2] == 3
        if item.dtype != np.uint8 or not (item.ndim == 2 or coloured) or not item.size:
            raise UserError(
                f"images: an array must be uint8 [H, W, 3] or [H, W], got {item.dtype} {list(shape)}"
            )
    elif not isinstance(item, str | Path | bytes | Image.Image):
        raise UserError(
            "images must be paths, bytes of image files, PIL images or uint8 arrays [H, W, 3], got "
            f"{type(item).__module__}.{type(item).__qualname__}; a tensor [3, H, W] of 0 to 255 becomes one by "
            "tensor.permute(1, 2, 0).numpy()"
        )


def _content(item: Given) -> bytes:
    """The bytes of an image file. Raises OSError and images.BadImage."""
    from PIL import Image

    from potstill.data.images import as_file

    if isinstance(item, bytes):
        return item
    if isinstance(item, str | Path):
        return Path(item).expanduser().read_bytes()
    return as_file(Image.fromarray(item) if isinstance(item, np.ndarray) else item)


def _name(item: Given) -> str:
    return str(item) if isinstance(item, str | Path) else f"<{type(item).__name__}>"


def predict_files(config: PredictConfig) -> ImagePredictions:
    """What `jobs/predict.py` does: predict, print the first rows, write all of them. Raises UserError."""
    if config.from_run is None:
        raise UserError(
            "from_run must name the folder of a run, got null; add from_run=runs/<name>"
        )
    if config.images is None:
        raise UserError(
            "images must name an image or a folder of images, got null; add images=<folder>"
        )
    output = home() / Path(config.output).expanduser()
    if output.suffix not in (".csv", ".parquet"):
        raise UserError(f"output must end in .csv or .parquet, got {config.output!r}")
    images = Path(config.images).expanduser()
    if home() != Path.cwd():  # else the table names files as the user does
        images = home() / images
    found = predict(
        config.from_run,
        images,
        checkpoint=config.checkpoint,
        batch_size=config.batch_size,
        precision=config.precision,
        use_gpu=config.use_gpu,
        tta=config.tta,
    )
    _write(found, output)
    shown = [
        [r.source, "; ".join(r.labels) or r.error or "-", f"{r.confidence:.3f}"] for r in found
    ]
    title = f"{len(found)} images" + (", the first 20" if len(found) > 20 else "")
    console.table(["image", "class", "confidence"], shown[:20], title=title)
    if unread := sum(r.error is not None for r in found):
        console.warn(f"{unread} of {len(found)} images could not be read; see the column error")
    console.say(f"Written: {output}")
    return found


def _write(found: ImagePredictions, output: Path) -> None:
    """A row an image, a column a class, as CSV or Parquet."""
    import pyarrow as pa
    import pyarrow.csv
    import pyarrow.parquet

    columns: dict[str, Any] = {
        "image": [r.source for r in found],
        "class": ["; ".join(r.labels) for r in found],
        "confidence": pa.array([r.confidence for r in found], pa.float32()),
        "error": [r.error for r in found],
    }
    columns |= {f"p({c})": found.probabilities[:, k] for k, c in enumerate(found.classes)}
    table = pa.table(columns)
    sink = pa.BufferOutputStream()
    if output.suffix == ".parquet":
        pyarrow.parquet.write_table(table, sink)
    else:
        pyarrow.csv.write_csv(table, sink)
    output.parent.mkdir(parents=True, exist_ok=True)
    runs.atomic_write(output, sink.getvalue().to_pybytes())
