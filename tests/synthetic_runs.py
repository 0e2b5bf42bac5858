"""Writes a run's folder as a training leaves it, in milliseconds: for the tests of what is made from a journal."""

from __future__ import annotations

import dataclasses
import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from potstill import runs
from potstill.config import Decode

STEPS_PER_EPOCH = 8
START = 1_700_000_000.0


def attempt(number: int = 1, step: int = 0, epochs: int = 3, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "attempt",
        "attempt": number,
        "step": step,
        "time": START + step,
        "epoch": step // STEPS_PER_EPOCH,
        "resumed_from": None,
        "passed_over": [],
        "total_steps": epochs * STEPS_PER_EPOCH,
        "steps_per_epoch": STEPS_PER_EPOCH,
        "epochs": epochs,
        "world_size": 1,
        "device": "cpu",
        **changes,
    }


def step(at: int, number: int = 1, loss: float | None = None) -> dict[str, Any]:
    return {
        "kind": "step",
        "attempt": number,
        "step": at,
        "time": START + at,
        "epoch": (at - 1) // STEPS_PER_EPOCH + 1,
        "loss": 2.0 / at + 1 / 3 if loss is None else loss,
        "lr": 1e-3 / 3 * (1 + math.cos(at / 50)),
        "images_per_s": 640.0 + at / 7,
        "epoch_step": (at - 1) % STEPS_PER_EPOCH + 1,
    }


def epoch(at: int, number: int = 1, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "epoch",
        "attempt": number,
        "step": at * STEPS_PER_EPOCH,
        "time": START + at * STEPS_PER_EPOCH,
        "epoch": at,
        "train_loss": 2.0 / 3 / at,
        "train_top1_acc": 60 + at / 3,
        "train_top5_acc": 80 + at / 3,
        "val_loss": 2.1 / 3 / at,
        "val_top1_acc": 55 + at / 3,
        "val_top5_acc": 75 + at / 3,
        "val_macro_f1": 50 + at / 7,
        "lr": 1e-3 / 3 / at,
        "top_k": 3,
        "terms": {"task": {"loss": 0.7 / at, "weighted": 0.35 / at}},
        "seconds": 12.5,
        "images_per_s": 654.321,
        "seconds_left": 12.5,
        "best": True,
        "warnings": [],
        **changes,
    }


def whole_journal(epochs: int = 3, **last_epoch: Any) -> list[dict[str, Any]]:
    records = [attempt(epochs=epochs)]
    for at in range(1, epochs + 1):
        records += [
            step(s) for s in range((at - 1) * STEPS_PER_EPOCH + 1, at * STEPS_PER_EPOCH + 1)
        ]
        records.append(epoch(at, **(last_epoch if at == epochs else {})))
    end = {
        "kind": "end",
        "attempt": 1,
        "step": epochs * STEPS_PER_EPOCH,
        "status": "finished",
        "reason": "",
        "best": None,
    }
    return [*records, {**end, "time": START + epochs * STEPS_PER_EPOCH + 5}]


def predictions(classes: int, samples: int = 60) -> dict[str, np.ndarray]:
    """Every seventh is wrong, by one class; the later, the surer."""
    label = np.arange(samples) % classes
    wrong = np.arange(samples) % 7 == 3
    return {
        "id": np.arange(samples, dtype=np.int64) + 1000,
        "label": label.astype(np.int32),
        "prediction": np.where(wrong, (label + 1) % classes, label).astype(np.int32),
        "confidence": np.linspace(0.5, 0.99, samples, dtype=np.float32),
    }


def make_run(
    root: Path,
    records: list[dict[str, Any]],
    name: str = "oaks",
    classes: list[str] | None = None,
    guesses: dict[str, np.ndarray] | None = None,
) -> Path:
    """A run with these records; with the checkpoint of its first epoch, where `guesses` are given for it."""
    classes = classes or ["robur", "rubra", "ilex <i>", "suber"]
    run_dir = root / name
    run_dir.mkdir(parents=True, exist_ok=True)
    runs.atomic_write(
        run_dir / "config.yaml",
        "model: {name: resnet18}\noptimizer:\n  lr: 0.003\nstages: []\nplugins: null\n",
    )
    dataset = {
        "key": "k1",
        "dir": str(root / "cache" / "k1"),
        "root": "trees",
        "counts": {"train": 64, "val": 60},
    }
    about = {
        "name": name,
        "experiment": "seedlings",
        "created": START,
        "classes": classes,
        "dataset": dataset,
        "git_commit": "0123abc",
        "git_dirty": False,
        "teacher_run": None,
        "init_from": None,
        "tags": ["first", "oak"],
        "config_hash": "f00d",
        "versions": {"torch": "2.14.1"},
    }
    runs.write_json(run_dir / "run.json", about)
    if records:
        runs.append_records(run_dir, records)
    if guesses is not None:
        buffer = io.BytesIO()
        np.savez(buffer, **guesses)  # type: ignore[arg-type]
        best = {
            "folder": runs.checkpoint_name(8),
            "step": 8,
            "epoch": 1,
            "metric": "val_top1_acc",
            "value": 55.3,
        }
        runs.save_checkpoint(
            run_dir,
            8,
            {},
            {},
            {"epoch": 1, "epoch_done": True, "best": best},
            {"val_predictions.npz": buffer.getvalue()},
        )
    return run_dir


def make_cache(
    folder: Path, guesses: dict[str, np.ndarray], classes: list[str], image_px: int = 8
) -> None:
    """A cache of one validation shard: the red of an image is its id - 1000."""
    from potstill.data.cache import FORMAT, write_shard

    folder.mkdir(parents=True)
    count = len(guesses["id"])
    images = np.zeros((count, image_px, image_px, 3), np.uint8)
    images[..., 0] = (guesses["id"] - 1000)[:, None, None]
    columns = {
        "image": images,
        "label": guesses["label"],
        "weight": np.ones(count),
        "id": guesses["id"],
        "sha256": [bytes(32)] * count,
        "path": [f"{i}.png" for i in range(count)],
        "width": np.full(count, image_px),
        "height": np.full(count, image_px),
    }
    shard = write_shard(folder, "shard-00000.arrow", columns)
    manifest = {
        "format": FORMAT,
        "key": folder.name,
        "classes": classes,
        "decode": dataclasses.asdict(Decode(image_px=image_px)),
        "counts": {"val": count},
        "shards": [{**shard, "split": "val"}],
    }
    runs.write_json(folder / "manifest.json", manifest)
