"""Weights by name: where the files of published real-or-fake models are looked for, and how to get them.

No torch here: the driver asks before anything slow is imported.
"""

from __future__ import annotations

import difflib
from pathlib import Path

from potstill.errors import UserError

PROJECT = "github.com/barcavia/RealTime-DeepfakeDetection-in-the-RealWorld"
_TRAINED_ON = {"wildrf": "WildRF", "forensyth": "ForenSynth", "forensynth": "ForenSynth"}
_FOLDERS = {"ladeda9": "LaDeDa", "tiny_ladeda": "Tiny_LaDeDa"}
_NAMES = ("wildrf", "forensyth", "finetuned")


def weights_file(weights: str, weights_dir: str, target: str, key: str = "teacher.weights") -> Path:
    """The file that `weights` means: wildrf | forensyth | finetuned, or a path. `target`: the model's `_target_`.

    Published ones stand in `weights_dir` as their project names them; finetuned is what the user puts there as
    `LaDeDa/finetuned.safetensors` (or .pth). Raises UserError where the file is missing, and says what to get and
    where to put it.
    """
    folder = _FOLDERS.get(target)
    if weights not in (*_TRAINED_ON, "finetuned"):
        return _path(weights, key)
    if folder is None:
        raise UserError(
            f"{key}={weights} is a file of {' or '.join(_FOLDERS)}, got model._target_={target}; give a path instead"
        )
    place = Path(weights_dir).expanduser() / folder
    if weights == "finetuned":
        for path in (place / "finetuned.safetensors", place / "finetuned.pth"):
            if path.is_file():
                return path
        raise UserError(
            f"{key}=finetuned must stand in {place / 'finetuned.safetensors'} (or .pth), got no such file; copy there the "
            "model.safetensors of a fine-tuned run's best checkpoint, or name that run instead (teacher.run=runs/<name>)"
        )
    path = place / f"{_TRAINED_ON[weights]}_{folder}.pth"
    if not path.is_file():
        where = (
            "the link to LaDeDa's weights in the README"
            if folder == "LaDeDa"
            else "its folder weights/Tiny_LaDeDa"
        )
        raise UserError(
            f"{key}={weights} must stand in {path}, got no such file; get {path.name} from {PROJECT} ({where}) and put it "
            f"there, or say where it is with {key}_dir=<folder> or {key}=<path>"
        )
    return path


def _path(weights: str, key: str) -> Path:
    path = Path(weights).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        raise UserError(f"{key} must be a file, got the folder {path}; a run is teacher.run={path}")
    near = difflib.get_close_matches(weights, _NAMES, n=1)
    raise UserError(
        f"{key} must be {', '.join(_NAMES)} or the path of a file, got {weights!r}, which does not exist"
        + (f"; did you mean {near[0]}?" if near else "")
    )
