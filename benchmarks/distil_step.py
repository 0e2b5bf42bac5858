"""What a teacher costs: an update with none, with soft labels, with the teacher itself, and its forward pass alone.

  uv run benchmarks/distil_step.py <class folders> <run of a teacher> [--model mobilenetv3_small_050] [--rounds 9] [--steps 8]

All four run in this process in turns (A B C D D C B A …), `--steps` updates a turn, reading and augmenting included.
Printed are the medians, the median over the rounds of cached ÷ none, and how much of the speed that arithmetic allows an
online teacher keeps: (cached + forward) ÷ online. Writes distil_step.json into the working folder.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from potstill.assemble import build_training, pick_device, prepare_process
from potstill.config import Config, compose
from potstill.data.prepare import prepare
from potstill.loop import Training
from potstill.soft_labels import soft_labels

BATCH, PX = 64, 128


class _Quiet:
    rank, world_size = 0, 1

    def log(self, record: dict) -> None: ...
    def report(self, metrics: dict, snapshot: object) -> None: ...
    def resume_from(self) -> tuple[None, list[str]]:
        return None, []

    def asked(self) -> str:
        return ""


def _config(args: argparse.Namespace, folder: Path, *more: str) -> Config:
    return compose(
        "train",
        [
            f"data.root={args.images}",
            f"data.max_samples={args.images_used}",
            f"data.decode.image_px={PX}",
            f"cache.dir={folder / 'cache'}",
            f"soft_labels.dir={folder / 'soft'}",
            *("augment.crop_scale=[0.35,1.0]", "augment.flip=0.5", "augment.views=2"),
            f"model.name={args.model}",
            f"loop.batch_size={BATCH}",
            f"loop.precision={args.precision}",
            "tracking=none",
            *more,
        ],
    )


def _updates(config: Config, cache: Path, device: torch.device) -> Callable[[], None]:
    """One update of the loop, as jobs/train.py runs it."""
    training, _ = build_training(config, cache, _Quiet(), device)
    stream = _forever(training)

    def step() -> None:
        training.learning_rate.before_step(training.at.stage_step)
        training._update(next(stream))
        training.at.step += 1

    return step


def _forward(config: Config, cache: Path, device: torch.device) -> Callable[[], None]:
    """The teacher's part of it, on images that are there."""
    training, _ = build_training(config, cache, _Quiet(), device)
    with torch.no_grad():
        seen = training._augmented(next(_forever(training)))

    def step() -> None:
        with torch.no_grad(), training.autocast():
            training.teachers[0](seen)

    return step


def _forever(training: Training) -> Iterator[dict[str, torch.Tensor]]:
    for epoch in range(10**6):
        for batch in training.batches.epoch(epoch):
            if len(batch["id"]) == BATCH:
                yield batch


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images")
    parser.add_argument("teacher")
    parser.add_argument("--model", default="mobilenetv3_small_050")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--images-used", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    args = parser.parse_args()
    device = pick_device(None)
    prepare_process(len(os.sched_getaffinity(0)))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        taught = ("task=distil", f"teacher.run={Path(args.teacher).resolve()}")
        online = _config(args, folder, *taught)
        kept = soft_labels(online)
        cache = prepare(online.data, online.cache).cache_dir
        ways: dict[str, Callable[[], None]] = {
            "no teacher": _updates(_config(args, folder), cache, device),
            "cached": _updates(
                _config(args, folder, "task=distil", f"teacher.soft_labels={kept}"), cache, device
            ),
            "online": _updates(online, cache, device),
            "teacher forward": _forward(online, cache, device),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for turn in range(args.rounds + 1):
            for name in list(ways) if turn % 2 else reversed(ways):
                began = time.perf_counter()
                for _ in range(args.steps):
                    ways[name]()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                if turn:  # the first is a warm-up
                    times[name].append((time.perf_counter() - began) / args.steps)
    medians = {name: 1000 * statistics.median(of) for name, of in times.items()}
    rounds = [dict(zip(times, row, strict=True)) for row in zip(*times.values(), strict=True)]
    result = {
        "device": str(device),
        "milliseconds": medians,
        "cached / no teacher": statistics.median(r["cached"] / r["no teacher"] for r in rounds),
        "share of what arithmetic allows": statistics.median(
            (r["cached"] + r["teacher forward"]) / r["online"] for r in rounds
        ),
    }
    for name, value in medians.items():
        print(f"{name:<16} {value:8.1f} ms an update of {BATCH}")
    print(f"cached / no teacher              {result['cached / no teacher']:.3f}")
    print(f"online: share of what is allowed {result['share of what arithmetic allows']:.3f}")
    Path("distil_step.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
