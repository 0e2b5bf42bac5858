"""Our training loop beside a plain PyTorch one: the same model, augmentation, batch and schedule.

  uv run benchmarks/plain_loop.py <seedlings12> [<tf_efficientnet_lite0.safetensors>] [--rounds 7] [--steps 10] [--epochs 0]

The plain loop is what one writes in an afternoon: ImageFolder, torchvision's transforms, a DataLoader, NCHW.
Both run in this process in turns (A B B A …), `--steps` updates a turn, reading and augmenting included; printed are
the medians and the median of each round's ratio. `--epochs N` then trains the plain loop for N whole epochs and
prints its validation accuracy and seconds. Writes plain_loop.json into the working folder.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import timm
import torch
from torch import nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

from potstill.assemble import build_model, keep_freed_memory
from potstill.config import Config, compose
from potstill.data.augment import Augment
from potstill.data.batches import Batches
from potstill.data.cache import open_cache
from potstill.data.prepare import prepare
from potstill.loop import Stage, Training
from potstill.models.weights import init_from
from potstill.optim import LearningRate, build_optimizer
from potstill.task import Task, build_terms

BATCH, PX, LR, EPOCHS = 64, 128, 1e-3, 8


class Plain:
    """The peer: about sixty lines with its evaluation."""

    def __init__(self, root: Path, weights: Path | None) -> None:
        flip_and_turn = [transforms.RandomHorizontalFlip(), transforms.RandomRotation(20)]
        crop = [transforms.RandomResizedCrop(PX, scale=(0.5, 1.0)), *flip_and_turn]
        to_tensor = [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
        train = ImageFolder(str(root / "train"), transforms.Compose([*crop, *to_tensor]))
        whole = transforms.Compose([transforms.Resize((PX, PX)), *to_tensor])
        self.train_loader = DataLoader(
            train, BATCH, shuffle=True, num_workers=2, persistent_workers=True
        )
        self.val_loader = DataLoader(
            ImageFolder(str(root / "validation"), whole), 2 * BATCH, num_workers=2
        )
        self.model: Any = timm.create_model(
            "tf_efficientnet_lite0", checkpoint_path=str(weights or "")
        )
        self.model.reset_classifier(len(train.classes))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=LR, weight_decay=0.05)
        self.criterion = nn.CrossEntropyLoss(label_smoothing=0.1)
        steps, warmup = len(self.train_loader) * EPOCHS, len(self.train_loader)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer,
            lambda i: (
                (i + 1) / warmup
                if i < warmup
                else 0.5 * (1 + math.cos(math.pi * (i - warmup) / (steps - warmup)))
            ),
        )
        self.batches = self._forever()

    def _forever(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        while True:
            yield from self.train_loader

    def step(self) -> None:
        images, labels = next(self.batches)
        loss = self.criterion(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    def epoch(self) -> None:
        self.model.train()
        for _ in range(len(self.train_loader)):
            self.step()

    @torch.no_grad()
    def accuracy(self) -> float:
        self.model.eval()
        right = sum((self.model(x).argmax(1) == y).sum().item() for x, y in self.val_loader)
        return 100 * right / len(self.val_loader.dataset)  # type: ignore[arg-type]


class _Quiet:
    rank, world_size = 0, 1

    def log(self, record: dict) -> None: ...
    def report(self, metrics: dict, snapshot: object) -> None: ...
    def resume_from(self) -> tuple[None, list[str]]:
        return None, []

    def asked(self) -> str:
        return ""


def ours(config: Config, weights: Path | None) -> Callable[[], None]:
    """One update of our loop, as jobs/train.py runs it."""
    cache = open_cache(prepare(config.data, config.cache).cache_dir)
    model = build_model(config, cache.classes)
    if weights:
        init_from(model, weights, cache.classes)
    model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = build_optimizer(
        model, set(model.head_parameter_names()), config.optimizer, torch.device("cpu")
    )
    batches = Batches(cache.split("train"), BATCH, seed=0, shuffle=True)
    rate = LearningRate(optimizer, config.schedule, batches.steps, EPOCHS, True)
    task = Task(model, build_terms(config.task["terms"]))
    augment = Augment(config.augment, config.data.decode.image_px, 0)
    training = Training(
        task,
        [],
        [Stage(EPOCHS, task.terms, augment, lambda: (optimizer, rate))],
        batches,
        lambda size: batches,
        config.loop,
        _Quiet(),
        torch.device("cpu"),
        cache.classes,
    )

    def forever() -> Iterator[dict[str, torch.Tensor]]:
        for epoch in range(1000):
            yield from batches.epoch(epoch)

    stream = forever()

    def step() -> None:
        training.learning_rate.before_step(training.at.step)
        training._update(next(stream))
        training.at.step += 1

    return step


def turn(step: Callable[[], None], steps: int) -> float:
    """Seconds of an update. The first few are not counted: they may find batches that were read during the other's turn."""
    for _ in range(5):
        step()
    started = time.perf_counter()
    for _ in range(steps):
        step()
    return (time.perf_counter() - started) / steps


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("root", type=Path)
    parser.add_argument("weights", type=Path, nargs="?")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--epochs", type=int, default=0)
    asked = parser.parse_args()
    result: dict[str, object] = {"threads": torch.get_num_threads()}
    plain = Plain(asked.root, asked.weights)
    if asked.epochs:
        started, seconds = time.perf_counter(), []
        for epoch in range(asked.epochs):
            began = time.perf_counter()
            plain.epoch()
            seconds.append(time.perf_counter() - began)
            print(
                f"plain epoch {epoch + 1}: {plain.accuracy():.2f} %, {seconds[-1]:.1f} s",
                flush=True,
            )
        result["plain_epoch_s"] = statistics.median(seconds)
        result["plain_whole_s"] = time.perf_counter() - started
        result["plain_top1"] = plain.accuracy()
    if asked.rounds:
        # the memory setting is the process's: from here on the plain loop has it too, which flatters the plain loop
        keep_freed_memory()
        with tempfile.TemporaryDirectory() as cache:
            config = compose(
                "train",
                ["experiment=seedlings_teacher", f"data.root={asked.root}", f"cache.dir={cache}"],
            )
            step = ours(config, asked.weights)
            plain.model.train()
            sides = {"ours": step, "plain": plain.step}
            rounds = []
            for i in range(asked.rounds):
                order = ["ours", "plain"] if i % 2 == 0 else ["plain", "ours"]
                rounds.append({name: turn(sides[name], asked.steps) for name in order})
        ratios = [r["ours"] / r["plain"] for r in rounds]
        for name in sides:
            result[f"{name}_step_s"] = statistics.median(r[name] for r in rounds)
        result["ratio"], result["ratios"] = statistics.median(ratios), ratios
    for key, value in result.items():
        print(f"{key:<16} {value}")
    Path("plain_loop.json").write_text(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
