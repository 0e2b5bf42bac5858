"""From a config and a cache to the objects that the loop takes. Plain PyTorch; runs on the worker."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
from collections.abc import Callable, Container, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn

from potstill import runs
from potstill.config import (
    Config,
    augment_seed,
    build,
    load_run_config,
    stage_configs,
    teacher_inputs,
    teacher_specs,
)
from potstill.data.augment import Augment, progressive_px
from potstill.data.batches import Batches
from potstill.data.cache import Cache, open_cache
from potstill.distil_losses import patch_mse
from potstill.errors import UserError
from potstill.loop import Progress, Session, Stage, Training, autocast_of
from potstill.metric_names import higher_is_better
from potstill.metrics import over_views
from potstill.models.images import TimmModel, freeze
from potstill.models.published import weights_file
from potstill.models.weights import head_of, init_from, load_file_state, load_run_state
from potstill.optim import LearningRate, build_optimizer
from potstill.predictions import read_thresholds
from potstill.registry import load_plugins
from potstill.soft_labels import SoftLabels
from potstill.task import (
    Batch,
    Ensemble,
    Task,
    Teacher,
    Term,
    build_projections,
    build_terms,
    match_classes,
    refuse_gaps,
)
from potstill.watch import check_labels


def image_px(config: Config) -> int:
    """Side of what the model sees, in pixels."""
    return config.augment.image_px or config.data.decode.image_px


def task_kind(config: Config) -> str:
    """single_label | multi_label | binary."""
    return config.task.get("kind", "single_label")


def outputs_of(config: Config, classes: Sequence[str]) -> list[str]:
    """What each of the model's logits stands for: every class or, of two in a binary task, the second."""
    return list(classes[1:] if task_kind(config) == "binary" else classes)


def build_model(config: Config, outputs: Sequence[str]) -> TimmModel:
    return build("model", config.model, num_classes=len(outputs), image_px=image_px(config))


def load_model(
    run_dir: Path, which: str | runs.Checkpoint = "best"
) -> tuple[TimmModel, list[str], Config]:
    """A run's model with its weights, its classes by name, and its config."""
    config = load_run_config(run_dir)
    load_plugins(config.plugins)
    config.model["pretrained"] = False
    classes = runs.read_json(run_dir / "run.json")["classes"]
    model = build_model(config, outputs_of(config, classes))
    load_run_state(model, run_dir, which)
    return model, classes, config


def build_teachers(
    config: Config, classes: Sequence[str], device: torch.device
) -> list[Teacher | Ensemble]:
    """What adds the teacher's columns to a batch: nothing, one teacher, or the ensemble of several.

    Raises UserError unless they do the same kind of task, take images of this size, and know these classes.
    """
    kind, wanted = task_kind(config), teacher_inputs(config)
    specs = teacher_specs(config)
    teachers = {
        name: _load_teacher(name, spec, config, classes, kind, wanted.get(name, ["logits"]))
        for name, spec in specs.items()
    }
    layout = torch.channels_last if config.loop.channels_last else torch.contiguous_format
    if not config.teachers:
        return [t.to(device=device, memory_format=layout) for t in teachers.values()]  # type: ignore[call-overload]
    for name, teacher in teachers.items():
        teacher.outputs = ["logits", *wanted.get(name, [])]
    known = {name: t.order.tolist() for name, t in teachers.items()}
    refuse_gaps(known, outputs_of(config, classes), kind)
    shares = [spec["weight"] for spec in specs.values()]
    ensemble = Ensemble(list(teachers.values()), shares, kind)
    return [ensemble.to(device=device, memory_format=layout)]  # type: ignore[call-overload]


def _load_teacher(
    name: str,
    spec: dict[str, Any],
    config: Config,
    classes: Sequence[str],
    kind: str,
    outputs: Sequence[str],
) -> Teacher:
    """A run, or a file of weights, as a frozen teacher."""
    key = "teacher" if name == "teacher" else f"teachers.{name}"
    px = image_px(config)
    if spec["weights"]:
        file = weights_file(
            spec["weights"], spec["weights_dir"], spec["model"]["_target_"], f"{key}.weights"
        )
        said, own_px = file.name, px
        logits = outputs_of(config, classes)
        model = build("model", spec["model"], num_classes=len(logits), image_px=px)
        order = load_file_state(model, file, f"{key}.weights", logits)
    else:
        run_dir = Path(spec["run"])
        model, known, theirs = load_model(run_dir)
        said, own_px = run_dir.name, image_px(theirs)
        if task_kind(theirs) != kind:
            raise UserError(
                f"{key}.run must do the student's kind of task ({kind}), got {said}, which does {task_kind(theirs)}"
            )
        order = match_classes(known, classes, str(run_dir), spec["classes"] == "overlap", key)
        if key == "teacher" and -1 in order:
            refuse_gaps({name: order}, classes, kind)
        order = [0] if kind == "binary" else order
    teacher = Teacher(model, name, order, outputs)
    try:
        told = teacher({"image": torch.zeros(1, 3, px, px)})
    except (AssertionError, RuntimeError, UserError) as error:
        raise UserError(
            f"{key}.run: {said} was trained on images of {own_px} px and does not take the "
            f"student's {px} px ({str(error).splitlines()[0]}); set augment.image_px={own_px}, or use a "
            "teacher that takes any size"
        ) from None
    for output in outputs:
        if f"{name}.{output}" not in told:
            there = sorted(teacher.model({"image": torch.zeros(1, 3, px, px)}))
            raise UserError(
                f"task.terms.*.inputs names {name}.{output}, which {said} does not have; it has "
                f"{', '.join(f'{name}.{o}' for o in there)}"
            )
    return teacher


class Predictor:
    """A run's weights, ready to be asked. `checkpoint`: best | last, or one that was picked already. `classes` [K] are
    its classes by name.

    Raises UserError where there is no such run or checkpoint.
    """

    def __init__(
        self,
        run_dir: Path,
        checkpoint: str | runs.Checkpoint = "best",
        precision: str = "fp32",
        use_gpu: bool | None = None,
        tta: str | None = None,
    ) -> None:
        if isinstance(checkpoint, str):
            checkpoint = runs.pick_checkpoint(run_dir, checkpoint)
        model, self.classes, config = load_model(run_dir, checkpoint)
        self.kind = task_kind(config)
        self.decode = config.data.decode
        self.device = pick_device(use_gpu)
        self.autocast = autocast_of(precision, self.device)
        views = dataclasses.replace(config.augment, tta=tta or config.augment.tta)
        self.augment = Augment(views, config.data.decode.image_px, config.loop.seed)
        self.model = model.to(device=self.device, memory_format=torch.channels_last).eval()  # type: ignore[call-overload]
        self.outputs = outputs_of(config, self.classes)
        self.thresholds = read_thresholds(checkpoint.folder, self.outputs)

    @torch.inference_mode()
    def logits(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] on any device -> float [B, K] (binary: [B, 1]): the mean of all views."""
        views = self.augment.eval_views(images.to(self.device, non_blocking=True))
        with self.autocast():
            return over_views(self.model, {}, views, self.kind)

    def probabilities(self, images: torch.Tensor) -> torch.Tensor:
        """uint8 [B, 3, H, W] -> float [B, K]; of a binary task both classes' [B, 2]."""
        logits = self.logits(images)
        if self.kind == "single_label":
            return logits.softmax(dim=1)
        chances = logits.sigmoid()
        return torch.cat((1 - chances, chances), dim=1) if self.kind == "binary" else chances

    def said(self, probability_K: np.ndarray) -> tuple[list[str], float]:
        """Class names and confidence: the most probable class or, where thresholds decide, what is above them."""
        if self.kind == "single_label":
            best = int(probability_K.argmax())
            return [self.classes[best]], float(probability_K[best])
        thresholds = 0.5 if self.thresholds is None else self.thresholds
        if self.kind == "binary":
            chosen = int((probability_K[1:] >= thresholds).item())
            return [self.classes[chosen]], float(probability_K[chosen])
        above = np.flatnonzero(probability_K >= thresholds)
        above = above[np.argsort(-probability_K[above])]
        return [self.classes[k] for k in above], float(probability_K.max())


def pick_device(use_gpu: bool | None) -> torch.device:
    """The GPU where there is one, unless `use_gpu` says otherwise. Raises UserError."""
    on_gpu = torch.cuda.is_available() and use_gpu is not False
    if use_gpu and not on_gpu:
        raise UserError("use_gpu must be false or null on a machine without a GPU, got true")
    return torch.device("cuda" if on_gpu else "cpu")


def train_run(
    config: Config,
    cache_dir: Path,
    session: Session,
    device: torch.device,
    attempt: int,
    findings: Sequence[dict[str, str]],
) -> tuple[Progress, bool]:
    """Build what the config names and train it; returns where the run ended, and whether patience ended it.

    `findings` are warnings about the data that were found before; they go into the journal with ours.
    """
    training, notes = build_training(config, cache_dir, session, device, attempt, findings)
    model = training.task.model
    facts = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "soft_labels": config.teacher.soft_labels,
    }
    progress = training.run(notes, facts)
    return progress, training.ended_early


def build_training(
    config: Config,
    cache_dir: Path,
    session: Session,
    device: torch.device,
    attempt: int = 1,
    findings: Sequence[dict[str, str]] = (),
) -> tuple[Training, list[str]]:
    """The training that a config names, ready to run, and what there is to say about how it was built.

    Raises UserError for whatever does not go together.
    """
    cache = open_cache(cache_dir, local_dir=config.cache.local_dir, max_gb=config.cache.max_gb)
    torch.manual_seed(config.loop.seed)
    # a run that goes on has its weights from its checkpoint; where they once came from may be gone
    goes_on = session.resume_from()[0] is not None
    config.model["pretrained"] = bool(config.model.get("pretrained")) and not goes_on
    outputs = outputs_of(config, cache.classes)
    model = build_model(config, outputs)
    _check_smaller_sizes(config, model, f"{config.model.get('name')}", torch.device("cpu"))
    notes = []
    if config.model.get("init_from") and not goes_on:
        notes = init_from(model, config.model["init_from"], outputs).lines()
    counts = _counts(cache)
    kind = task_kind(config)
    layout = torch.channels_last if config.loop.channels_last else torch.contiguous_format
    model = model.to(device=device, memory_format=layout)  # type: ignore[call-overload]
    labelled = int((cache.split("train").labels >= 0).sum())
    parts = stage_configs(config)
    terms = [
        build_terms(p.task["terms"], kind, counts["train"], device, labelled, p.loop.epochs)
        for p in parts
    ]
    soft = None
    if config.teacher.soft_labels:
        soft = SoftLabels.open(Path(config.teacher.soft_labels))
        soft.check(config, cache, cache.classes)
    teachers = [] if soft else build_teachers(config, cache.classes, device)
    for teacher in teachers:
        names = [Path(s["run"] or s["weights"]).name for s in teacher_specs(config).values()]
        _check_smaller_sizes(config, teacher, f"the teacher {', '.join(names)}", device)
    every = [term for of_stage in terms for term in of_stage]
    shapes, patches = _shapes(model, teachers, soft, image_px(config), device)
    for term in every:
        _bind_patches(term, patches)
    # what was drawn so far depends on where the teacher's outputs come from
    torch.manual_seed(config.loop.seed)
    projections = {n: p.to(device) for n, p in build_projections(every, shapes).items()}
    task = Task(model, terms[0], kind, projections)
    if config.scaling.sync_batchnorm and session.world_size > 1 and device.type == "cuda":
        # torch's own would drop the activation inside timm's BatchNormAct2d
        task.model = convert_sync_batchnorm(task.model)
    _try_terms(task, every, shapes)
    if config.loop.compile:
        nets = [t for teacher in teachers for t in teacher.modules() if isinstance(t, Teacher)]
        _compile([task.model, *(t.model for t in nets)], config, device)
    batches, val_batches = _batches(config, cache, session, device, soft)
    meant = {name for name, p in task.model.named_parameters() if p.requires_grad}
    stages = [
        Stage(
            epochs=part.loop.epochs,
            terms=of_stage,
            augment=Augment(part.augment, config.data.decode.image_px, augment_seed(config)),
            begin=_beginning(part, task, of_stage, meant, batches.steps, device),
            patience=part.loop.patience,
            name=str((config.stages[i] if config.stages else {}).get("name") or ""),
        )
        for i, (part, of_stage) in enumerate(zip(parts, terms, strict=True))
    ]
    training = Training(
        task=task,
        teachers=teachers,
        stages=stages,
        batches=batches,
        val_batches=val_batches,
        cfg=config.loop,
        session=session,
        device=device,
        classes=cache.classes,
        metrics=config.task.get("metrics") or (),
        threshold=config.task.get("threshold", 0.5),
        attempt=attempt,
        standing=[*findings, *check_labels(counts, cache.classes)],
    )
    return training, notes


def _beginning(
    config: Config,
    task: Task,
    terms: Sequence[Term],
    meant: Container[str],
    steps_per_epoch: int,
    device: torch.device,
) -> Callable[[], tuple[torch.optim.Optimizer, LearningRate]]:
    """What begins a stage: who trains in it, and how fast. `config` is the stage's own, `meant` names the parameters that
    the model means to be trained."""

    def begin() -> tuple[torch.optim.Optimizer, LearningRate]:
        model = task.model
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in meant)
        freeze(model, (config.model.get("freeze") or {}).get("all_but_last_blocks"))
        for name, projection in task.projections.items():
            projection.requires_grad_(any(term.name == name for term in terms))
        further = [p for p in task.projections.parameters() if p.requires_grad]
        optimizer = build_optimizer(model, set(head_of(model)), config.optimizer, device, further)
        learning_rate = LearningRate(
            optimizer,
            config.schedule,
            steps_per_epoch,
            config.loop.epochs,
            higher_is_better(config.loop.monitor),
        )
        return optimizer, learning_rate

    return begin


@torch.no_grad()
def _shapes(
    model: nn.Module,
    teachers: Sequence[Teacher | Ensemble],
    soft: SoftLabels | None,
    px: int,
    device: torch.device,
) -> tuple[dict[str, list[int]], dict[str, tuple[int, int]]]:
    """Of every column the shape of one sample, and of every map of patches (size, stride) in pixels, where it is known."""
    batch: Batch = {"image": torch.zeros(2, 3, px, px, device=device)}
    was_training = model.training
    outputs: dict[str, Tensor] = {**model.eval()(batch)}
    model.train(was_training)
    patches = {}
    if patch := getattr(model, "patch", None):
        patches["patch_logits"] = patch
    for teacher in teachers:
        outputs |= teacher(batch)
        for one in teacher.modules():
            if isinstance(one, Teacher) and (patch := getattr(one.model, "patch", None)):
                patches[f"{one.name}.patch_logits"] = patch
    shapes = {name: list(value.shape[1:]) for name, value in outputs.items() if name != "image"}
    if soft:
        columns = soft.manifest["columns"]
        shapes |= {name: list(about["shape"]) for name, about in columns.items()}
        patches |= {name: a["patch"] for name, a in columns.items() if a.get("patch")}
    return shapes, patches


def _bind_patches(term: Term, patches: Mapping[str, tuple[int, int]]) -> None:
    """Tell a loss that compares maps of patches which pixels they see."""
    if term.loss is patch_mse:
        for option, column in zip(("student_patch", "teacher_patch"), term.inputs, strict=True):
            term.options.setdefault(option, patches.get(column))


def _try_terms(task: Task, terms: Sequence[Term], shapes: Mapping[str, Sequence[int]]) -> None:
    """Compute every term once, on noise: shapes that do not go together are said before the training starts."""
    device = next(task.model.parameters()).device
    columns: Batch = {name: torch.randn(4, *shape, device=device) for name, shape in shapes.items()}
    columns["weight"] = torch.ones(4, device=device)
    classes = shapes["logits"][0]
    one_of_several = task.kind == "single_label"
    columns["label"] = torch.zeros(4, dtype=torch.long, device=device)
    if task.kind == "multi_label":
        columns["label"] = torch.zeros(4, classes, device=device)
    assert classes > 1 or not one_of_several
    with torch.no_grad():
        for term in terms:
            task.probe(columns, term)


def _check_smaller_sizes(config: Config, model: nn.Module, said: str, device: torch.device) -> None:
    """Whether a model takes every size that progressive training goes through. `said`: its name."""
    whole, start_px = image_px(config), config.augment.start_px
    sizes = {
        progressive_px(part.augment, image_px(part), epoch, part.loop.epochs)
        for part in stage_configs(config)
        for epoch in range(part.loop.epochs)
    }
    was_training = model.training
    model.eval()
    px = 0
    try:
        with torch.no_grad():
            for px in sorted(sizes - {whole}):
                model({"image": torch.zeros(1, 3, px, px, device=device)})
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"augment.start_px must lead to sizes that the model and its teacher take, got {start_px}, where images have "
            f"{px} px in some epoch: {said} does not take them ({str(error).splitlines()[0]}); set augment.start_px=null"
        ) from None
    finally:
        model.train(was_training)


def _compile(models: Sequence[Any], config: Config, device: torch.device) -> None:
    """Compile in place, and try it at once: what the compiler cannot do is said before the training starts."""
    px = image_px(config)
    for model in models:
        model.compile()
    sample = {"image": torch.zeros(2, 3, px, px, device=device)}
    training = models[0].training
    try:
        with torch.no_grad():
            models[0].eval()(sample)
    except Exception as error:
        if not type(error).__module__.startswith("torch._"):
            raise
        raise UserError(
            f"loop.compile=true needs a working compiler for {device.type} ({str(error).strip().splitlines()[0]}); install "
            "one (g++ for CPUs), or set loop.compile=false"
        ) from error
    finally:
        models[0].train(training)


def _batches(
    config: Config, cache: Cache, session: Session, device: torch.device, soft: SoftLabels | None
) -> tuple[Batches, Callable[[int], Batches]]:
    """Training's batches, and validation's of so many samples."""
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
        sampler=config.loop.sampler,
        steps_per_epoch=config.loop.steps_per_epoch,
        columns=soft.columns if soft else None,
        **shared,
    )
    val = cache.split("val")
    return training, lambda size: Batches(val, size, shuffle=False, **shared)


def _counts(cache: Cache) -> dict[str, Any]:
    """Images of each class [K], by split."""
    return {s: cache.split(s).class_counts() for s in ("train", "val")}


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
