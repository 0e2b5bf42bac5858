"""The platform from Python: the same configs, the same checks, the same runs.

import potstill

config = potstill.compose(["data.root=photos", "model.name=resnet18", "loop.epochs=5"])
run = potstill.train(config)
potstill.evaluate(run, ["data.root=new_photos"])
potstill.predict(run, "new_photos/oak/1.jpg")[0].labels
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from potstill import config as _config
from potstill.config import Config
from potstill.registry import register
from potstill.storage import local_folder

if TYPE_CHECKING:
    from potstill.inference import ImagePredictions

__all__ = ["Run", "compose", "evaluate", "predict", "register", "train", "tune"]


class Run:
    """A finished training: `path`, its folder, and `summary`, what summary.json says."""

    def __init__(self, path: Path, summary: dict[str, Any]) -> None:
        self.path, self.summary = path, summary

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        return f"Run({str(self.path)!r}, {self.summary['status']})"


def compose(
    overrides: Sequence[str] = (), *, job: str = "train", config_dir: str | None = None
) -> Any:
    """The config that a job would run with, checked. `overrides` as on the command line.

    Its values may be changed before it is used; it is checked again then. Raises UserError.
    """
    return _config.compose(job, overrides, config_dir)


def train(config: Config | Sequence[str]) -> Run:
    """Train one model, or go on with it, as `jobs/train.py` does. `config`: from `compose`, or its overrides.

    Raises UserError, and Stopped after Ctrl-C.
    """
    from potstill.fit import fit

    ready = _config.checked(config) if isinstance(config, Config) else compose(config)
    summary = fit(ready)
    return Run(local_folder(ready.runs.dir) / summary["name"], summary)


def tune(config: Config | Sequence[str]) -> dict[str, Any]:
    """Search, or go on with it, as `jobs/tune.py` does. `config`: from `compose(…, job="tune")`, or its overrides.

    Returns what summary.json of the search holds. Raises UserError, and Stopped after Ctrl-C.
    """
    from potstill import search

    ready = config if isinstance(config, Config) else compose(config, job="tune")
    return search.tune(ready)


def evaluate(run: str | os.PathLike[str], overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Measure a run, as `jobs/evaluate.py` does: returns what evaluation.json says. Raises UserError."""
    from potstill.evaluation import evaluate_run

    return evaluate_run(compose([f"from_run={os.fspath(run)}", *overrides], job="evaluate"))


def predict(run: str | os.PathLike[str], images: Any, **options: Any) -> ImagePredictions:
    """What a run says of images: see inference.predict for what they and the options may be."""
    from potstill import inference

    return inference.predict(os.fspath(run), images, **options)
