"""From a config and a cache to the objects that the loop takes. Plain PyTorch; runs on the worker."""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from timm.layers.norm_act import convert_sync_batchnorm

from potstill import runs
from potstill.config import Config, build, load_run_config
from potstill.data.augment import Augment
from potstill.data.batches import Batches
from potstill.data.cache import Cache, open_cache
from potstill.errors import UserError
from potstill.loop import Progress, Session, higher_is_better, train
from potstill.models.images import TimmModel, freeze
from potstill.models.weights import init_from, load_run_state
from potstill.optim import LearningRate, build_optimizer
from potstill.task import Task, Teacher, build_terms, match_classes
from potstill.watch import check_labels


def image_px(config: Config) -> int:
    """Side of what the model sees, in pixels."""
    return config.augment.image_px or config.data.decode.image_px


def build_model(config: Config, num_classes: int) -> TimmModel:
    return build("model", config.model, num_classes=num_classes, image_px=image_px(config))


def load_model(run_dir: Path, which: str = "best") -> tuple[TimmModel, list[str], Config]:
    """A run's model with its weights, its classes in the order of its outputs, and its config."""
    config = load_run_config(run_dir)
    config.model["pretrained"] = False
    classes = runs.read_json(run_dir / "run.json")["classes"]
    model = build_model(config, len(classes))
    load_run_state(model, run_dir, which)
    return model, classes, config


def load_teacher(run_dir: Path, name: str, classes: Sequence[str], px: int) -> Teacher:
    """A run as a frozen teacher for these classes and images of px x px.

    Raises UserError unless it knows the same classes and takes images of this size.
    """
    model, known, config = load_model(run_dir)
    teacher = Teacher(model, name, match_classes(known, classes, str(run_dir)))
    try:
        teacher({"image": torch.zeros(1, 3, px, px)})
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"teacher.run: {run_dir.name} was trained on images of {image_px(config)} px and does not take the "
            f"student's {px} px ({str(error).splitlines()[0]}); set augment.image_px={image_px(config)}, or use a "
            "teacher that takes any size"
        ) from None
    return teacher


def train_run(
    config: Config,
    cache_dir: Path,
    session: Session,
    device: torch.device,
    attempt: int,
    findings: Sequence[dict[str, str]],
) -> Progress:
    """Build what the config names and train it; returns where the run ended.

    `findings` are warnings about the data that were found before; they go into the journal with ours.
    """
    cache = open_cache(cache_dir)
    torch.manual_seed(config.loop.seed)
    # a run that goes on has its weights from its checkpoint; where they once came from may be gone
    goes_on = session.resume_from()[0] is not None
    config.model["pretrained"] = bool(config.model.get("pretrained")) and not goes_on
    model = build_model(config, len(cache.classes))
    notes = []
    if config.model.get("init_from") and not goes_on:
        notes = init_from(model, config.model["init_from"], cache.classes).lines()
    freeze(model, (config.model.get("freeze") or {}).get("all_but_last_blocks"))
    model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    task = Task(model, build_terms(config.task["terms"]))
    if config.scaling.sync_batchnorm and session.world_size > 1 and device.type == "cuda":
        # torch's own would drop the activation inside timm's BatchNormAct2d
        task.model = convert_sync_batchnorm(task.model)
    teachers = []
    if config.teacher.run:
        teacher = load_teacher(Path(config.teacher.run), "teacher", cache.classes, image_px(config))
        teachers.append(teacher.to(device=device, memory_format=torch.channels_last))  # type: ignore[call-overload]
    batches, val_batches = _batches(config, cache, session, device)
    optimizer = build_optimizer(model, set(model.head_parameter_names()), config.optimizer, device)
    learning_rate = LearningRate(
        optimizer,
        config.schedule,
        batches.steps,
        config.loop.epochs,
        higher_is_better(config.loop.monitor),
    )
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
    }
    return train(
        task,
        teachers,
        optimizer,
        learning_rate,
        batches,
        val_batches,
        Augment(config.augment, config.data.decode.image_px, config.loop.seed),
        config.loop,
        session,
        device=device,
        classes=cache.classes,
        attempt=attempt,
        standing=[*findings, *check_labels(_counts(cache), cache.classes)],
        notes=notes,
        facts=facts,
    )


def _batches(
    config: Config, cache: Cache, session: Session, device: torch.device
) -> tuple[Batches, Batches]:
    px = config.data.decode.image_px
    shared: dict[str, Any] = {
        "seed": config.loop.seed,
        "rank": session.rank,
        "world_size": session.world_size,
        "pin": device.type == "cuda",
    }
    window_rows = max(1, int(config.data.shuffle_window_gb * 1e9 / (3 * px * px)))
    training = Batches(
        cache.split("train"),
        config.loop.batch_size,
        shuffle=True,
        window_rows=window_rows,
        views=config.augment.views,
        **shared,
    )
    # no gradients are kept, so that validation can take more at a time than an update's forward pass does
    forward = config.loop.micro_batch_size or -(-config.loop.batch_size // config.loop.accumulate)
    validation = Batches(
        cache.split("val"), max(2 * forward, 2 * session.world_size), shuffle=False, **shared
    )
    return training, validation


def _counts(cache: Cache) -> dict[str, Any]:
    import numpy as np

    return {
        s: np.bincount(cache.split(s).labels, minlength=len(cache.classes))
        for s in ("train", "val")
    }


def keep_freed_memory() -> None:
    """Tell glibc to keep what is freed instead of returning it to the system at once.

    A training step on a CPU frees and takes the same hundreds of MB again and again; without this every
    one of those pages is faulted in anew (see benchmarks/plain_loop.py for what that costs).
    """
    m_trim_threshold, m_mmap_max = -1, -4
    with contextlib.suppress(OSError, AttributeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(m_mmap_max, 0)
        libc.mallopt(m_trim_threshold, 2**31 - 1)


def prepare_process(cpus: int) -> None:
    """Make this process a fast place to train: its threads (Ray sets OMP_NUM_THREADS to a worker's CPUs,
    which may be fewer than it may use) and its memory."""
    keep_freed_memory()
    torch.set_num_threads(cpus)
