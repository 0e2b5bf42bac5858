"""The schema of a run, its validation, and `build()`: the one module that knows Hydra.

A config is composed from `conf/` by Hydra, checked here, and then travels as plain dataclasses and dicts:
nothing behind this module, and no Ray worker, needs Hydra or OmegaConf.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import errno
import fnmatch
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import signal
import sys
import threading
import typing
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from potstill import registry
from potstill.errors import Stopped, UserError
from potstill.storage import home, is_uri

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"

AUDIT_CHECKS = ("duplicates", "labels", "balance", "history", "splits", "blank")


# ---------------------------------------------------------------------------------------------- schema
@dataclass
class Decode:
    image_px: int = 224
    """Side of the square that is stored in the cache, in pixels."""
    fit: str = "shorter_side"
    """shorter_side (resize it, crop the centre) | squash | pad | native (no resampling: centre crop or zero padding)."""
    max_megapixels: float = 100.0
    """A larger image is quarantined before it is decoded."""


@dataclass
class Split:
    val: float = 0.2
    """Share of each class that validates, where the source has no validation split of its own."""
    seed: int = 0
    """Another seed draws another validation split, and another choice of max_samples."""


@dataclass
class Columns:
    image: str | None = None
    """Column of paths, URLs or bytes; null: the first there is of path, url, image, image.bytes, file_name, bytes.
    Of a tar: the extension of the image, where a sample has several."""
    label: str = "label"
    """Column of class names; with data.multi_label a list of them, or text with `|` between."""
    split: str = "split"
    """Column of train, val or test; where it is missing or empty, the split is made (data.split)."""
    weight: str = "weight"
    """Column of sample weights; where it is missing, each is 1."""
    group: str = "group"
    """Column of what must not straddle a split: a plant, a patient, a camera trap."""


@dataclass
class Data:
    source: str = "folder"
    """folder | manifest (CSV, JSONL, Parquet) | tar (WebDataset) | parquet (Hugging Face layout) | digits (scikit-learn's, written to root) | a plug-in's."""
    root: str | None = None
    """Folder, manifest or shards (`train-{000..099}.tar`): a path, or a URI (s3://, gs://, file://); must be given."""
    columns: Columns = field(default_factory=Columns)
    allow_outside: bool = False
    """true: a manifest's relative paths may leave its folder, and absolute ones are taken."""
    multi_label: bool = False
    """true: an image may have several classes, or none (task=multilabel)."""
    unlabeled: str | None = None
    """Folder or URI of further training images without labels: terms that need a label leave them out."""
    classes: list[str] | None = None
    """Names or wildcards (`Quercus_*`); null takes every class."""
    max_samples: int | None = None
    """Images in all; splits keep their proportions, classes take turns. null takes every image."""
    max_bad_fraction: float = 0.05
    """Share of the images that may be quarantined before the set is refused."""
    shuffle_window_gb: float = 2.0
    """Samples are shuffled within windows of so many GB of pixels: less memory, less mixing."""
    decode: Decode = field(default_factory=Decode)
    split: Split = field(default_factory=Split)


@dataclass
class Cache:
    dir: str = "cache"
    """Folder of the caches: one folder a set, decoding and format."""
    max_gb: float | None = None
    """What all sets in it may take, in GB: the least recently used go, never one in use. null sets no limit."""
    format: str = "auto"
    """raw (decoded pixels, memory-mapped) | jpeg (a fifth of the space or less, decoded at every read) | auto: raw where it fits."""
    jpeg_quality: int = 95
    """Quality of re-encoded shards, from 1 to 100 (format=jpeg)."""
    local_dir: str | None = None
    """Folder on this node's own disk to which shards are copied before they are read; null reads them in place."""
    verify: bool = False
    """Read every shard again and compare its checksum before it is used (sizes are always compared)."""


@dataclass
class Augment:
    image_px: int | None = None
    """Side of what the model sees, in pixels; null is data.decode.image_px."""
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Smallest and largest share of the image's area that a random crop takes. Source: arXiv:1409.4842, timm --scale"""
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    """Smallest and largest ratio of a random crop's width to its height. Source: arXiv:1409.4842, timm --ratio"""
    flip: float = 0.0
    """Probability of a horizontal flip. Source: timm --hflip"""
    vflip: float = 0.0
    """Probability of a vertical flip. Source: timm --vflip"""
    rotate: float = 0.0
    """Largest angle, in degrees, either way. Source: torchvision RandomRotation"""
    color: float = 0.0
    """Strength of brightness, contrast and saturation changes: factors in [1 - color, 1 + color]. Source: timm --color-jitter"""
    eval_crop: float = 1.0
    """Share of the frame's side that validation sees, from the centre; 0.875 suits crops of half the frame and more. Source: arXiv:1906.06423, timm --crop-pct"""
    views: int | None = None
    """How many different augmentations a sample has in all; null draws a new one at every occurrence. Source: arXiv:2106.05237"""
    seed: int | None = None
    """Of what is drawn; one number for runs of several loop.seed lets them share soft labels. null is loop.seed."""
    policy: str | None = None
    """rand-m9-n2-mstd0.5 (RandAugment) | trivial (TrivialAugment) | augmix-m3-w3 (AugMix) | a plug-in's; null is off. Source: arXiv:1909.13719, arXiv:2103.10158, arXiv:1912.02781, timm --aa"""
    erasing: float = 0.0
    """Probability that a rectangle is erased (random erasing). Source: arXiv:1708.04896, timm --reprob"""
    erasing_scale: list[float] = field(default_factory=lambda: [0.02, 0.3333])
    """Smallest and largest share of the image that is erased. Source: arXiv:1708.04896"""
    erasing_mode: str = "pixel"
    """pixel (noise) | rand (one random colour) | const (black). Source: timm --remode"""
    mixup: float = 0.0
    """Alpha of the Beta distribution that two images of a pair are blended by; 0 is off. Source: arXiv:1710.09412, timm --mixup"""
    cutmix: float = 0.0
    """Alpha of the Beta distribution of the share that is pasted from the pair's other image; 0 is off. Source: arXiv:1905.04899, timm --cutmix"""
    mix_prob: float = 1.0
    """Probability that a pair is mixed at all. Source: timm --mixup-prob"""
    mix_switch_prob: float = 0.5
    """Probability of cutmix rather than mixup, where both are on. Source: timm --mixup-switch-prob"""
    mix_off_epochs: int = 0
    """Epochs at the end without mixup and cutmix. Source: timm --mixup-off-epoch"""
    start_px: int | None = None
    """Side of what the model sees in the first epoch; it grows to image_px. null is image_px. Source: arXiv:2104.00298"""
    grow_until: float = 0.8
    """Share of the epochs after which the full side is reached (start_px). Source: arXiv:2104.00298"""
    tta: str = "none"
    """Views that are averaged in every evaluation: none | flip (2) | five_crop (5) | ten_crop (10). Source: doi:10.1145/3065386"""


@dataclass
class TeacherConfig:
    run: str | None = None
    """Folder of the teacher's run; null trains without one."""
    weights: str | None = None
    """Instead of a run, weights for teacher.model: wildrf | forensyth | finetuned (files of weights_dir), or a path."""
    weights_dir: str = "weights"
    """Folder of the files that wildrf, forensyth and finetuned stand for."""
    model: dict[str, Any] = field(default_factory=dict)
    """What teacher.weights are of, such as {_target_: ladeda9, preprocessing: npr}."""
    classes: str = "same"
    """same: the teacher must know exactly the classes of the data | overlap: those that both know count, by name."""
    temperature: float = 4.0
    """What logits are divided by before they are compared with the teacher's (task=distil). Source: arXiv:1503.02531"""
    soft_labels: str | None = None
    """Folder that jobs/soft_labels.py has written: its outputs are read, and no teacher runs. Source: arXiv:2112.01528"""


@dataclass
class SoftLabels:
    dir: str = "soft_labels"
    """Folder of the soft labels: one folder for each teacher, set and augmentation."""
    top_k: int | None = None
    """Classes whose logits are kept, the rest of the probability being spread evenly; null keeps all, in 16 bits. Source: arXiv:2112.01528"""
    batch_size: int = 256
    """Images in one forward pass of the teacher."""


@dataclass
class Gate:
    metric: str | None = None
    """What a teacher is judged by: a metric of docs/recipes.md; null: auc for task.kind=binary and multi_label, else top1_acc."""
    good: float | None = None
    """From here on a teacher is good; null: 0.65 for an AUC, else 30 % of the way from chance to perfect."""
    marginal: float | None = None
    """From here on it is marginal, below it must be fine-tuned; null: 0.55 for an AUC, else 10 % of the way."""
    inverted: float = 0.45
    """An AUC below says that the labels are probably inverted."""
    on_marginal: str = "finetune"
    """What becomes of a marginal teacher: finetune | skip (it is used as it is, with a warning)."""


@dataclass
class Distil:
    """What jobs/distil.py does besides training; jobs/train.py trains one student and does not look here."""

    teacher: str | None = None
    """Experiment that trains the teacher, where neither teacher.run nor teacher.weights names one; jobs/tune.py takes it, too."""
    teacher_overrides: list[str] = field(default_factory=list)
    """Overrides of that experiment, such as data.root=<other images>."""
    finetune: str | None = None
    """Experiment that fine-tunes a teacher which the gate does not let pass; null: there is no fine-tuning."""
    finetune_overrides: list[str] = field(default_factory=list)
    """Overrides of that experiment; what its model is, the teacher says."""
    soft_labels: bool = False
    """true: write the teacher's outputs once, and let all students read them."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each trains one student alone and one distilled; fixed before the first of them."""
    metric: str | None = None
    """What the students are compared by, such as val_auc; null is loop.monitor."""
    subset: str = "val"
    """Images that the teacher is verified and the students are compared on: val | test; it is diagnosed on val."""


@dataclass
class Fakes:
    """Two sets of real and fake images that jobs/distil.py makes first: the teacher's, and the student's."""

    images: str | None = None
    """Folder of real images (with train/ and val/ or not); null: no set is made."""
    dir: str = "data/fakes"
    """Where the sets are written: one folder a generator."""
    teacher_generator: str = "nearest"
    """Of the set that the teacher is trained on: nearest | bilinear | transposed."""
    generator: str = "transposed"
    """Of the set that it is diagnosed and fine-tuned on, and that the students learn: nearest | bilinear | transposed."""
    teacher_images: int = 600
    """Images of the teacher's set, real and fake together."""
    max_images: int = 1400
    """Images of the other set, real and fake together."""
    px: int = 64
    """Side of the crops, in pixels; nothing is resampled but by a generator."""
    jpeg_quality: int | None = 95
    """Quality that both classes are saved with, last of all; null saves both as PNG."""
    seed: int = 0
    """Of the choice of images and crops, and of the generator's random weights."""


@dataclass
class Search:
    """What jobs/tune.py does with many trainings; jobs/train.py trains one and does not look here."""

    name: str | None = None
    """The file of conf/search/ that was chosen (search=…); set by it."""
    space: dict[str, Any] = field(default_factory=dict)
    """What is searched: config keys, each with {min, max, log, step}, a list of choices, or options that set several keys: docs/search.md."""
    conditions: list[str] = field(default_factory=list)
    """What must hold of every trial, such as `model.kwargs.dim % model.kwargs.heads == 0`: others are not started."""
    constraints: list[str] = field(default_factory=list)
    """What winners must keep to, such as `parameters <= 1e6`: by parameters, macs, file_mb or latency_ms before a trial is trained, by a metric afterwards."""
    points: list[dict[str, Any]] = field(default_factory=list)
    """Known good settings, by the names of the space: they are tried first."""
    objectives: list[str] = field(default_factory=lambda: ["val_top1_acc"])
    """What is sought, the first one decides: metrics of the journal (val_top1_acc, val_auc, …), parameters, macs, file_mb, latency_ms."""
    algorithm: str = "tpe"
    """tpe (with several objectives for their Pareto front) | random | nsga2. Source: arXiv:1907.10902, doi:10.1145/3377930.3389817, doi:10.1109/4235.996017"""
    scheduler: str = "asha"
    """asha | hyperband | median (stop what is behind) | pbt (the worst go on from the best) | none. Source: arXiv:1810.05934, arXiv:1603.06560, doi:10.1145/3097983.3098043, arXiv:1711.09846"""
    grace_epochs: int = 1
    """No trial is stopped before; with pbt the epochs between two changes."""
    reduction: float = 3.0
    """Of so many trials one goes on at each rung (asha, hyperband)."""
    num_samples: int = 16
    """Trials in all; a higher number lets a finished search go on."""
    epochs: int | None = None
    """Epochs of a trial at most; null: loop.epochs. Winners are trained again for loop.epochs."""
    max_hours: float | None = None
    """The search stops by then; the same command goes on. null sets no limit."""
    max_concurrent_trials: int | None = None
    """null: as many as the cores or GPUs take."""
    cpus_per_trial: float | None = None
    """null: scaling.cpus_per_worker for each worker, else the cores that belong to its GPU, else one."""
    gpus_per_trial: float | None = None
    """Such as 0.25: four trials share a GPU. null: one for each worker where there is one."""
    silent_minutes: float = 60.0
    """A trial that has not finished an epoch for so long is ended as failed."""
    soft_labels: bool = False
    """true: the teacher's outputs are written once, before the first trial, and all trials read them."""
    latency_device: str | None = None
    """cpu | cuda: where latency_ms is measured, once for each architecture while no trial runs; null: cuda where the trials use it."""
    latency_batch: int = 32
    """latency_ms is of one image; latency_ms_batch of so many, in one pass."""
    seed: int = 0
    """Of the choice of trials, not of their training (loop.seed)."""
    retrain_best: int = 0
    """So many winners are trained for loop.epochs over search.seeds when the search is done."""
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Of the winners' trainings; fixed before the first trial."""


@dataclass
class Optimizer:
    name: str = "adamw"
    """Any optimizer of timm: timm.optim.list_optimizers(). Source: timm --opt"""
    lr: float = 1e-3
    """Learning rate, after the warm-up. Source: timm --lr"""
    weight_decay: float = 0.05
    """Of weight matrices and kernels; biases and norms have none. Source: timm --weight-decay"""
    momentum: float = 0.9
    """Of the optimizers that have one (sgd, lamb, muon, ...). Source: timm --momentum"""
    betas: list[float] | None = None
    """Of Adam and its kin, two numbers or three; null: the optimizer's own. Source: timm --opt-betas"""
    head_lr: float | None = None
    """Learning rate of the classifier; null is lr."""
    layer_decay: float | None = None
    """Each block's rate is that of the block above it times this; null is 1. Source: arXiv:2003.10555, timm --layer-decay"""
    lrs: dict[str, float] = field(default_factory=dict)
    """Learning rates of parameters by wildcard, such as {net.blocks.*: 1e-4}; the first that matches counts."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of timm's optimizer. Source: timm --opt-kwargs"""


@dataclass
class Schedule:
    name: str = "cosine"
    """cosine | cosine_restarts | polynomial | one_cycle | steps | plateau | constant. Source: timm --sched"""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises linearly; may be a fraction. Source: arXiv:1706.02677, timm --warmup-epochs"""
    min_lr: float = 0.0
    """The learning rate does not fall below it. Source: timm --min-lr"""
    factor: float = 0.1
    """plateau, steps: what the learning rate is multiplied by. Source: timm --decay-rate"""
    patience: int = 3
    """plateau: epochs without improvement of loop.monitor before it is. Source: timm --patience-epochs"""
    milestones: list[float] = field(default_factory=list)
    """steps: epochs after which it is multiplied by `factor`. Source: timm --decay-milestones"""
    cycle_epochs: float = 10.0
    """cosine_restarts: length of the first cycle (T_0), in epochs. Source: arXiv:1608.03983"""
    cycle_mult: float = 1.0
    """cosine_restarts: each cycle is so many times as long as the one before (T_mult). Source: arXiv:1608.03983, timm --lr-cycle-mul"""
    power: float = 1.0
    """polynomial: (1 - progress) to this power. Source: timm --decay-rate (poly)"""
    peak: float = 0.3
    """one_cycle: share of the training in which the rate rises. Source: arXiv:1708.07120"""
    div_factor: float = 25.0
    """one_cycle: the first rate is lr / div_factor. Source: torch OneCycleLR"""
    final_div_factor: float = 1e4
    """one_cycle: the last rate is the first / final_div_factor. Source: torch OneCycleLR"""


@dataclass
class Loop:
    epochs: int = 10
    """Passes over the training images, or turns of steps_per_epoch."""
    steps_per_epoch: int | None = None
    """Updates in an epoch, which then may end within a pass or span several; null: one pass."""
    sampler: str = "shuffle"
    """shuffle (every image once) | weighted (by data.columns.weight, with replacement) | class_balanced (classes alike)."""
    batch_size: int = 64
    """Samples in one update, over all workers. Source: timm --batch-size"""
    micro_batch_size: Any = None
    """Samples in one forward pass of one worker; auto: as many as memory holds; null is the worker's whole share."""
    accumulate: int = 1
    """The same, said as the number of forward passes in an update. Source: timm --grad-accum-steps"""
    precision: str = "fp32"
    """fp32 | bf16 | fp16, of the forward pass; weights stay fp32. Source: arXiv:1710.03740, timm --amp"""
    channels_last: bool = True
    """Keep images and kernels in NHWC order, which convolutions like; false is NCHW. Source: timm --channels-last"""
    compile: bool = False
    """torch.compile the model: slow to start, then faster on GPUs. Source: timm --torchcompile"""
    clip_norm: float | None = None
    """Largest norm of an update's gradient; null switches clipping off. Source: arXiv:1211.5063, timm --clip-grad"""
    ema: float | None = None
    """Decay of an exponential moving average of the weights, which is what is measured and kept; null is off. Source: doi:10.1137/0330046, timm --model-ema-decay"""
    ema_warmup: bool = True
    """Let the decay rise to `ema` from 0, so that the first weights are soon forgotten. Source: timm --model-ema-warmup"""
    average_last: int | None = None
    """Measure and keep the mean of the weights at the ends of the last so many epochs; null is off. Source: arXiv:1803.05407"""
    patience: int | None = None
    """Epochs without improvement of `monitor` before the run stops; null is off."""
    monitor: str = "val_top1_acc"
    """What makes a checkpoint the best: train_loss, val_loss, val_top1_acc, ..., or val_<a metric of task.metrics>. Source: timm --eval-metric"""
    seed: int = 0
    """Of the first weights, the order of samples and the augmentation."""
    checkpoint_every_steps: int = 500
    """Updates between checkpoints; one is also taken at the end of every epoch."""
    log_every_steps: int = 10
    """Updates between records of the loss."""


@dataclass
class Scaling:
    num_workers: int = 0
    """0: train in this process (Ray Train's local mode, which starts at once); n: on n Ray workers."""
    use_gpu: bool | None = None
    """null: where there is one for every worker; on a cluster whose nodes have roles, true."""
    cpus_per_worker: int | None = None
    """null: the machine's cores, divided among the workers; on a cluster, with GPUs, the node's, divided among its GPUs."""
    labels: dict[str, str] = field(default_factory=dict)
    """Labels of the nodes of a cluster that workers may be on, besides their role: {ray.io/market-type: on-demand}."""
    rehearse: bool = False
    """true: reserve GPUs, and compute on the CPUs beside them: to rehearse a cluster without any."""
    sync_batchnorm: bool = False
    """BatchNorm over the samples of all GPUs; not where an update takes several forward passes. Source: timm --sync-bn"""
    max_failures: int = 3
    """How often a lost worker is replaced before the run gives up."""


@dataclass
class Run:
    name: str | None = None
    """Name of the run's folder; null: <experiment>-<hash of the config>."""
    again: bool = False
    """true: where this run has finished already, start another instead of showing its summary."""
    tags: list[str] = field(default_factory=list)
    """Words to find the run by in Aim and in its report."""


@dataclass
class Runs:
    dir: str = "runs"
    """Folder of the runs: one folder a run."""


@dataclass
class Tracking:
    name: str = "aim"
    """aim | none."""
    repo: str | None = None
    """Folder that holds `.aim`; null is the folder of the runs."""


@dataclass
class Config:
    """Everything that one training needs."""

    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    augment: Augment = field(default_factory=Augment)
    model: dict[str, Any] = field(default_factory=dict)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    teachers: dict[str, Any] = field(default_factory=dict)
    """Several teachers by name: teacher.logits is then their weighted ensemble, <name>.<output> each one's own."""
    task: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loop: Loop = field(default_factory=Loop)
    stages: list[dict[str, Any]] = field(default_factory=list)
    """Parts of the training, one after the other, each {epochs, name} and what it changes: {terms, optimizer, schedule, augment, freeze, patience}; loop.epochs is then their sum."""
    soft_labels: SoftLabels = field(default_factory=SoftLabels)
    gate: Gate = field(default_factory=Gate)
    distil: Distil = field(default_factory=Distil)
    fakes: Fakes = field(default_factory=Fakes)
    search: Search = field(default_factory=Search)
    scaling: Scaling = field(default_factory=Scaling)
    run: Run = field(default_factory=Run)
    runs: Runs = field(default_factory=Runs)
    tracking: Tracking = field(default_factory=Tracking)
    plugins: list[str] = field(default_factory=list)
    """Python modules that register models, losses, sources or augmentations of your own."""
    debug: bool = False
    """true: 200 images, at most 64 px, two epochs: does it work at all?"""
    experiment: str | None = None
    """A file of conf/experiment/; it overrides all other groups."""


@dataclass
class PrepareConfig:
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    plugins: list[str] = field(default_factory=list)
    """Python modules that register sources of your own."""


@dataclass
class EvaluateColumns:
    image: str | None = None
    """Column of paths, URLs or bytes; null, here and below: the run's own."""
    label: str | None = None
    """Column of class names; null: the run's own."""
    split: str | None = None
    """Column of train, val or test; null: the run's own."""
    weight: str | None = None
    """Column of sample weights; null: the run's own."""
    group: str | None = None
    """Column of what must not straddle a split; null: the run's own."""


@dataclass
class EvaluateData:
    """What is evaluated on. How it is decoded is the run's own affair, and no key of it is taken here."""

    root: str | None = None
    """Images that are decoded as the run's own were; null: the run's own data."""
    source: str | None = None
    """What the root is: folder | manifest | tar | parquet | a plug-in's; null: the same as the run's own."""
    columns: EvaluateColumns = field(default_factory=EvaluateColumns)
    allow_outside: bool | None = None
    """true: a manifest's relative paths may leave its folder, and absolute ones are taken; null is the run's own."""
    classes: list[str] | None = None
    """Names or wildcards (`Quercus_*`); null takes every class of the folder, or the run's own choice."""
    max_samples: int | None = None
    """Images in all; null takes every image of the folder, or as many as the run."""
    max_bad_fraction: float | None = None
    """Share of the images that may be quarantined; null is the run's own."""


@dataclass
class EvaluateConfig:
    from_run: str | None = None
    """Folder of the run; must be given."""
    data: EvaluateData = field(default_factory=EvaluateData)
    cache: Cache = field(default_factory=Cache)
    subset: str = "val"
    """train | val | test; a folder without such folders is evaluated whole, as val."""
    checkpoint: str = "best"
    """best (by loop.monitor) | last."""
    batch_size: int = 256
    """Images in one forward pass."""
    precision: str = "fp32"
    """fp32 | bf16 | fp16."""
    use_gpu: bool | None = None
    """null: where there is one."""
    output: str | None = None
    """Folder of evaluation.json and its pictures; null is <run>/evaluations/<data key>-<subset>."""
    metrics: list[str] | None = None
    """What is measured besides loss, top-1, top-5 and macro-F1; null is the run's own task.metrics."""
    tta: str | None = None
    """Views that are averaged: none | flip | five_crop | ten_crop; null is the run's own."""
    plugins: list[str] = field(default_factory=list)
    """Python modules that register sources of your own; the run's own plug-ins are loaded in any case."""


@dataclass
class PredictConfig:
    from_run: str | None = None
    """Folder of the run; must be given."""
    images: str | None = None
    """An image, or a folder that is searched for images; must be given."""
    output: str = "predictions.csv"
    """File of the result, .csv or .parquet: a row an image, with the probability of every class."""
    checkpoint: str = "best"
    """best (by loop.monitor) | last."""
    batch_size: int = 64
    """Images in one forward pass."""
    precision: str = "fp32"
    """fp32 | bf16 | fp16."""
    use_gpu: bool | None = None
    """null: where there is one."""
    tta: str | None = None
    """Views that are averaged: none | flip | five_crop | ten_crop; null is the run's own."""


@dataclass
class ReportConfig:
    from_run: str | None = None
    """Folder of the run; must be given."""
    tracking: Tracking = field(default_factory=lambda: Tracking(name="none"))


@dataclass
class QuickstartConfig:
    data_dir: str = "data/digits"
    """Where the images of the digits are written."""
    cache: Cache = field(default_factory=Cache)
    runs: Runs = field(default_factory=Runs)
    tracking: Tracking = field(default_factory=Tracking)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    """Each trains one student alone and one distilled."""
    debug: bool = False
    """true: 200 images and two epochs a run."""


@dataclass
class AuditModel:
    name: str | None = None
    """A model of timm whose features labels and splits are judged by; null: colours and textures, which see less."""
    init_from: str | None = None
    """Its weights: a .safetensors or a .pth file."""
    pretrained: bool = False
    """true: its weights from the hub."""


@dataclass
class AuditConfig:
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    from_run: str | None = None
    """Folder of a run whose model's features are used instead of `model`; not one trained on these labels."""
    model: AuditModel = field(default_factory=AuditModel)
    checks: list[str] = field(default_factory=lambda: list(AUDIT_CHECKS))
    """What is looked for."""
    max_images: int | None = 20_000
    """Images, chosen at random, for labels, history and splits; duplicates and blanks look at all. null: all."""
    near_bits: int = 12
    """Near-duplicates: most bits in which two 64-bit perceptual hashes may differ."""
    near_correlation: float = 0.85
    """Near-duplicates: least correlation of two thumbnails' detail."""
    folds: int = 5
    """Parts that take turns in being judged by a classifier that was trained on the others."""
    seed: int = 0
    """Of the folds and of the choice of max_images."""
    most_shown: int = 40
    """Groups or images a finding shows on the page; the tables hold all."""
    batch_size: int = 64
    """Images in one forward pass."""
    use_gpu: bool | None = None
    """null: where there is one, for the features alone."""
    strict: bool = False
    """true: end with status 2 where something serious is found."""
    output: str | None = None
    """Folder of audit.html, audit.json and the tables; null is audits/<key of the cache>."""
    plugins: list[str] = field(default_factory=list)
    """Python modules that register sources of your own."""


@dataclass
class MakeFakesConfig:
    images: str | None = None
    """Folder of real images (with train/ and val/ or not); must be given."""
    output: str | None = None
    """Folder of the set: {train,val,test}/{0_real,1_fake}/; null is data/fakes/<generator>."""
    generator: str = "transposed"
    """How half of the crops are halved and doubled again: nearest | bilinear | transposed (random weights)."""
    max_images: int = 1400
    """Images of the set, real and fake together."""
    px: int = 64
    """Side of the crops, in pixels; nothing is resampled but by the generator."""
    jpeg_quality: int | None = 95
    """Quality that both classes are saved with, last of all; null saves both as PNG."""
    seed: int = 0
    """Of the choice of images and crops, and of the generator's random weights."""


SCHEMAS: dict[str, type] = {
    "train": Config,
    "soft_labels": Config,
    "distil": Config,
    "tune": Config,
    "make_fakes": MakeFakesConfig,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "predict": PredictConfig,
    "report": ReportConfig,
    "audit": AuditConfig,
    "quickstart": QuickstartConfig,
}


# ------------------------------------------------------------------------------------------ composing
def compose(name: str, overrides: Sequence[str] = (), config_dir: str | None = None) -> Any:
    """Compose `conf/<name>.yaml` with Hydra overrides, and check every value.

    `config_dir` is searched for config groups (say, `experiment/`) before `conf/`. Returns SCHEMAS[name].
    Raises UserError, which names the key, the rule, the value and the remedy.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.core.global_hydra import GlobalHydra
    from hydra.errors import HydraException
    from omegaconf import DictConfig, OmegaConf, open_dict
    from omegaconf.errors import OmegaConfBaseException

    schema = SCHEMAS[name]
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    GlobalHydra.instance().clear()
    further = _config_dir(config_dir) if config_dir else None
    search = [f"hydra.searchpath=[{_quoted(f'file://{further}')}]"] if further else []
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose(
                name,
                [*(_for_hydra(o, overrides) for o in overrides), *search],
                return_hydra_config=True,
            )
        choices = composed.hydra.runtime.choices
        with open_dict(composed):
            del composed["hydra"]
        assert isinstance(composed, DictConfig)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(name, overrides, error, further)) from None
    assert isinstance(config, schema)
    registry.load_plugins(getattr(config, "plugins", []))
    if isinstance(config, Config):
        config.experiment = choices.get("experiment") or config.experiment
        config.search.name = choices.get("search") or config.search.name
        config = apply_debug(config) if config.debug else config
        given = any(o.partition("=")[0].lstrip("+") == "loop.epochs" for o in overrides)
        if given and config.stages:
            raise UserError(
                f"loop.epochs is what the stages make together, got {config.loop.epochs} with {len(config.stages)} stages; change "
                "stages, or leave them out (stages=[])"
            )
        _count_stages(config)
    validate(config)
    if isinstance(config, Config) and name not in ("distil", "tune"):
        _refuse_missing_teacher(config)
    return config


# Open dicts of the config, whose keys are not ours to list.
OPEN = (
    *("model.kwargs", "task.terms", "optimizer.lrs", "optimizer.kwargs"),
    *("teacher.model", "teachers", "stages", "search.space", "scaling.labels"),
)


# Keys whose values are plain text, mostly paths: what Hydra's grammar makes of ( ) , = # and so on is not meant.
LITERAL = frozenset(
    (
        *(
            "data.root",
            "data.unlabeled",
            "teacher.weights",
            "teacher.weights_dir",
            "teacher.soft_labels",
            "soft_labels.dir",
            "fakes.images",
            "fakes.dir",
            "cache.dir",
            "cache.local_dir",
            "runs.dir",
            "run.name",
            "tracking.repo",
            "teacher.run",
        ),
        *("model.init_from", "from_run", "output", "images", "data_dir"),
    )
)


def _for_hydra(override: str, overrides: Sequence[str]) -> str:
    """An override in Hydra's grammar: plain text is quoted, and `model.kwargs.channels=…` needs no `+`.

    `null`, nothing, and what the user has quoted already keep their meaning. The keys of a plug-in's model
    are its own.
    """
    free = (*OPEN, "model.") if "model=plugin" in overrides else OPEN
    key, equals, value = override.partition("=")
    if key.lstrip("+") in LITERAL and not re.fullmatch(_LEFT_ALONE, value, re.DOTALL):
        override = f"{key}{equals}{_quoted(value)}" if equals else override
    return f"++{override}" if override.startswith(free) else override


_LEFT_ALONE = r"""|null|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""


def _quoted(text: str) -> str:
    """Text that comes out of Hydra and OmegaConf as it is."""
    from hydra.core.override_parser.types import Quote, QuotedString

    return QuotedString(_without_interpolation(text), Quote.single).with_quotes()


def _without_interpolation(text: str) -> str:
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _config_dir(folder: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"--config-dir must be a folder that holds config groups, got {folder}, which is none"
        )
    return path


def _explain(
    name: str, overrides: Sequence[str], error: Exception, further: Path | None = None
) -> str:
    """Say which key is meant and what is close to it, instead of Hydra's internals."""
    # Hydra's own words are of little use, those of OmegaConf beneath it name the type
    cause = error.__cause__ or error
    text = " ".join(str(cause).split("full_key:")[0].split())
    keys = _known_keys(name)
    groups = _groups(CONF_DIR, further)
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if not _ or not key:
            return f"an argument must be key=value, got {override!r}; --help lists the keys"
        if key in groups and value.strip("\"'") not in groups[key]:
            return f"{key} must be one of {', '.join(groups[key]) or 'none yet'}, got {value!r} (files of conf/{key}/)"
        known = key in keys or key in groups or any(k.startswith(key + ".") for k in keys)
        free = key.startswith((*OPEN, "model.") if "model=plugin" in overrides else OPEN)
        if not known and not free:
            near = difflib.get_close_matches(key, [*keys, *groups], n=2, cutoff=0.6)
            remedy = f"did you mean {' or '.join(near)}?" if near else "--help lists the keys"
            return f"{key} is not a key of this job (got {override!r}); {remedy}"
    key = str(getattr(cause, "full_key", "") or "the config")
    shown = next((o for o in overrides if o.partition("=")[0].lstrip("+~") == key), key)
    shown = getattr(error, "override", shown)  # one that Hydra's grammar does not take
    return f"{shown} was refused: {text}; --help lists the keys and their defaults"


def _known_keys(name: str) -> dict[str, Any]:
    """Every dotted key of a job's config and its default, those of plug-in nodes among them."""
    import yaml

    keys = dict(flatten(to_dict(SCHEMAS[name]())))
    if SCHEMAS[name] is Config:
        defaults = yaml.safe_load((CONF_DIR / "train.yaml").read_text())["defaults"]
        chosen = {g: c for entry in defaults if isinstance(entry, dict) for g, c in entry.items()}
        for group in ("model", "task"):
            keys.pop(group)
            # what is chosen by default says the defaults, the others what else there is
            files = (CONF_DIR / group).glob("*.yaml")
            for path in sorted(files, key=lambda f: (f.stem != chosen[group], f.stem)):
                nodes = flatten(yaml.safe_load(path.read_text()), f"{group}.")
                keys.update((key, value) for key, value in nodes if key not in keys)
    return keys


def _groups(*folders: Path | None) -> dict[str, list[str]]:
    """The config groups below some folders, and the choices of each."""
    found: dict[str, set[str]] = {}
    for path in (p for folder in folders if folder for p in folder.iterdir() if p.is_dir()):
        found.setdefault(path.name, set()).update(f.stem for f in path.glob("*.yaml"))
    return {group: sorted(names) for group, names in sorted(found.items())}


def apply_debug(config: Config) -> Config:
    """Shrink an experiment to seconds on a CPU: few samples, small images, two epochs."""
    data, loop = config.data, config.loop
    data.max_samples = min(data.max_samples or 200, 200)
    data.decode.image_px = min(data.decode.image_px, 64)
    config.augment.image_px = min(config.augment.image_px or 64, 64)
    if config.augment.start_px is not None:
        config.augment.start_px = min(config.augment.start_px, config.augment.image_px)
    config.augment.mix_off_epochs = min(config.augment.mix_off_epochs, 1)
    loop.epochs = min(loop.epochs, 2)
    if loop.average_last is not None:
        loop.average_last = min(loop.average_last, loop.epochs)
    if loop.steps_per_epoch is not None:
        loop.steps_per_epoch = min(loop.steps_per_epoch, 10)
    loop.compile = False
    loop.batch_size = min(loop.batch_size, 16)
    loop.micro_batch_size = None
    loop.accumulate = min(loop.accumulate, 2)
    config.schedule.warmup_epochs = min(config.schedule.warmup_epochs, 0.5)
    config.fakes.teacher_images = min(config.fakes.teacher_images, 80)
    config.fakes.max_images = min(config.fakes.max_images, 120)
    for stage in config.stages:
        if isinstance(stage, dict) and _is_number(stage.get("epochs")):
            stage["epochs"] = min(stage["epochs"], 1)
        if isinstance(stage, dict) and isinstance(stage.get("schedule"), dict):
            stage["schedule"].pop("warmup_epochs", None)
    return config


def _count_stages(config: Config) -> None:
    """loop.epochs is what the stages make together."""
    if config.stages:
        epochs = [s.get("epochs") if isinstance(s, dict) else None for s in config.stages]
        for i, count in enumerate(epochs):
            if not isinstance(count, int) or isinstance(count, bool) or count < 1:
                raise UserError(
                    f"stages.{i}.epochs must be an integer >= 1, got {count!r}; such as stages=[{{epochs: 5}}, {{epochs: 20}}]"
                )
        config.loop.epochs = sum(count for count in epochs if count)


def stage_configs(config: Config) -> list[Config]:
    """The config of each stage: the whole one with what the stage changes; `loop.epochs` is the stage's own.

    Without stages it is the config itself. Raises UserError that begins with the stage's place.
    """
    if not config.stages:
        return [config]
    found = []
    for i, stage in enumerate(config.stages):
        if unknown := sorted(set(stage) - set(STAGE_KEYS)):
            near = difflib.get_close_matches(unknown[0], STAGE_KEYS, n=1)
            remedy = f"did you mean {near[0]}?" if near else f"it has {', '.join(STAGE_KEYS)}"
            raise UserError(f"stages.{i}.{unknown[0]} is not a key of a stage; {remedy}")
        for group in ("terms", "optimizer", "schedule", "augment", "freeze"):
            if not isinstance(stage.get(group) or {}, dict):
                raise UserError(
                    f"stages.{i}.{group} must be a mapping of keys to values, got {stage[group]!r}"
                )
        for name, term in (stage.get("terms") or {}).items():
            if not isinstance(term or {}, dict):
                raise UserError(
                    f"stages.{i}.terms.{name} must be a mapping, or null to leave the term out, got {term!r}"
                )
        for key in ONE_FOR_ALL_STAGES:
            if key in (stage.get("augment") or {}):
                raise UserError(
                    f"stages.{i}.augment.{key} must not be set: validation and soft labels are the same in all stages; set "
                    f"augment.{key}"
                )
        values = to_dict(config)
        values["stages"] = []
        values["loop"]["epochs"] = stage["epochs"]
        if "patience" in stage:
            values["loop"]["patience"] = stage["patience"]
        if "freeze" in stage:
            values["model"]["freeze"] = stage["freeze"]
        for group in ("optimizer", "schedule", "augment"):
            given = stage.get(group) or {}
            if unknown := sorted(set(given) - set(values[group])):
                near = difflib.get_close_matches(unknown[0], values[group], n=1)
                remedy = f"did you mean {near[0]}?" if near else "--help lists the keys"
                raise UserError(
                    f"stages.{i}.{group}.{unknown[0]} is not a key of {group}; {remedy}"
                )
            values[group].update(given)
        values["task"]["terms"] = _merged_terms(values["task"]["terms"], stage.get("terms") or {})
        try:
            found.append(from_dict(Config, values))
            for key, value in flatten(to_dict(found[-1])):
                if key in RULES and value is not None:
                    _refuse_unless(RULES[key], key, value, HINTS.get(key))
        except UserError as error:
            raise UserError(f"stages.{i}: {error}") from None
    return found


def _merged_terms(terms: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """A stage's terms: those of the task with what it changes; null leaves one out."""
    merged = dict(terms)
    for name, change in changes.items():
        if change is None:
            merged.pop(name, None)
        else:
            merged[name] = {**merged.get(name, {}), **change}
    return merged


# ------------------------------------------------------------------------------------------- checking
Check = tuple[Callable[[Any], bool], str]
"""A test of a value, and the rule it stands for."""


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _number(
    low: float,
    high: float = math.inf,
    open_low: bool = False,
    open_high: bool = False,
    kind: str = "",
) -> Check:
    rule = f"must be {kind}{'>' if open_low else '>='} {low:g}"
    rule += f" and {'<' if open_high else '<='} {high:g}" if high < math.inf else ""

    def test(value: Any) -> bool:
        above = _is_number(value) and (value > low if open_low else value >= low)
        return above and (value < high if open_high else value <= high)

    return test, rule


def _one_of(*names: str) -> Check:
    return lambda v: v in names, f"must be one of {', '.join(names)}"


def _pair(low: float, high: float) -> Check:
    return (
        lambda v: len(v) == 2 and low < v[0] <= v[1] <= high,
        f"must be two numbers, the smaller first, above {low:g} and up to {high:g}",
    )


def _text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _mapping(*needed: str) -> Callable[[Any], bool]:
    return lambda v: isinstance(v, dict) and set(needed) <= set(v)


def _increasing(low: float) -> Check:
    return (
        lambda v: all(map(_is_number, v)) and all(b > a for a, b in itertools.pairwise([low, *v])),
        f"must be numbers above {low:g}, each larger than the one before",
    )


def _or_null(check: Check) -> Check:
    test, rule = check
    return lambda v: v is None or test(v), rule.replace("must be", "must be null or", 1)


EVEN_PX: Check = (
    lambda v: 16 <= v <= 4096 and v % 2 == 0,
    "must be an even number >= 16 and <= 4096",
)
GENERATORS = ("nearest", "bilinear", "transposed")
TTA = ("none", "flip", "five_crop", "ten_crop")
TASK_KINDS = ("single_label", "multi_label", "binary")

NAMED_WEIGHTS = ("wildrf", "forensyth", "forensynth", "finetuned")
TEACHER_KEYS = ("run", "weights", "weights_dir", "model", "classes", "weight")
ONE_FOR_ALL_STAGES = ("views", "seed", "image_px", "eval_crop", "tta")
STAGE_KEYS = ("name", "epochs", "terms", "optimizer", "schedule", "augment", "freeze", "patience")
TASK_KEYS = ("kind", "terms", "metrics", "threshold")

RULES: dict[str, Check] = {
    "data.classes": (lambda v: len(v) > 0, "must name at least one class"),
    "data.max_samples": _number(2),
    "data.max_bad_fraction": _number(0, 1),
    "data.shuffle_window_gb": _number(0, open_low=True),
    "data.decode.image_px": _number(8, 4096),
    "data.decode.fit": _one_of("shorter_side", "squash", "pad", "native"),
    "data.decode.max_megapixels": _number(0, open_low=True),
    "data.split.val": _number(0, 1, open_low=True),
    "data.split.seed": _number(0),
    "cache.max_gb": _number(0, open_low=True),
    "cache.format": _one_of("auto", "raw", "jpeg"),
    "cache.jpeg_quality": _number(1, 100),
    "augment.image_px": _number(8, 4096),
    "augment.crop_scale": _pair(0, 1),
    "augment.crop_ratio": _pair(0, 100),
    "augment.flip": _number(0, 1),
    "augment.vflip": _number(0, 1),
    "augment.erasing": _number(0, 1),
    "augment.erasing_scale": _pair(0, 1),
    "augment.erasing_mode": _one_of("pixel", "rand", "const"),
    "augment.mixup": _number(0),
    "augment.cutmix": _number(0),
    "augment.mix_prob": _number(0, 1),
    "augment.mix_switch_prob": _number(0, 1),
    "augment.mix_off_epochs": _number(0),
    "augment.start_px": _number(8, 4096),
    "augment.grow_until": _number(0, 1, open_low=True),
    "augment.tta": _one_of(*TTA),
    "augment.rotate": _number(0, 180),
    "augment.color": _number(0, 1),
    "augment.eval_crop": _number(0.1, 1),
    "augment.views": _number(1),
    "augment.seed": _number(0),
    "teacher.temperature": _number(0, open_low=True),
    "teacher.classes": _one_of("same", "overlap"),
    "soft_labels.top_k": _number(1),
    "soft_labels.batch_size": _number(1),
    "gate.good": _number(0, 100),
    "gate.marginal": _number(0, 100),
    "gate.inverted": _number(0, 0.5),
    "gate.on_marginal": _one_of("finetune", "skip"),
    "distil.subset": _one_of("val", "test"),
    "distil.seeds": (
        lambda v: bool(v) and len(set(v)) == len(v) and all(s >= 0 for s in v),
        "must be different numbers >= 0, at least one",
    ),
    "fakes.teacher_generator": _one_of(*GENERATORS),
    "fakes.generator": _one_of(*GENERATORS),
    "fakes.teacher_images": _number(24),
    "fakes.max_images": _number(24),
    "fakes.px": EVEN_PX,
    "fakes.jpeg_quality": _number(1, 100),
    "fakes.seed": _number(0),
    "search.objectives": (
        lambda v: bool(v) and len(set(v)) == len(v),
        "must name at least one objective, each once",
    ),
    "search.algorithm": _one_of("tpe", "random", "nsga2"),
    "search.scheduler": _one_of("asha", "hyperband", "median", "pbt", "none"),
    "search.grace_epochs": _number(1),
    "search.reduction": _number(1, open_low=True),
    "search.num_samples": _number(1),
    "search.epochs": _number(1),
    "search.max_hours": _number(0, open_low=True),
    "search.max_concurrent_trials": _number(1),
    "search.cpus_per_trial": _number(0, open_low=True),
    "search.gpus_per_trial": _number(0),
    "search.silent_minutes": _number(0, open_low=True),
    "search.latency_device": _one_of("cpu", "cuda"),
    "search.latency_batch": _number(1),
    "search.seed": _number(0),
    "search.retrain_best": _number(0),
    "search.seeds": (
        lambda v: bool(v) and len(set(v)) == len(v) and all(s >= 0 for s in v),
        "must be different numbers >= 0, at least one",
    ),
    "generator": _one_of(*GENERATORS),
    "px": EVEN_PX,
    "jpeg_quality": _number(1, 100),
    "optimizer.lr": _number(0, open_low=True),
    "optimizer.head_lr": _number(0, open_low=True),
    "optimizer.layer_decay": _number(0, 1, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.momentum": _number(0, 1),
    "optimizer.betas": (
        lambda v: len(v) in (2, 3) and all(0 <= beta < 1 for beta in v),
        "must be two or three numbers >= 0 and < 1",
    ),
    "schedule.name": _one_of(
        *("cosine", "cosine_restarts", "polynomial", "one_cycle", "steps", "plateau", "constant")
    ),
    "schedule.warmup_epochs": _number(0),
    "schedule.min_lr": _number(0),
    "schedule.factor": _number(0, 1, open_low=True),
    "schedule.patience": _number(0),
    "schedule.milestones": _increasing(0),
    "schedule.cycle_epochs": _number(0, open_low=True),
    "schedule.cycle_mult": _number(1),
    "schedule.power": _number(0, open_low=True),
    "schedule.peak": _number(0, 1, open_low=True, open_high=True),
    "schedule.div_factor": _number(1),
    "schedule.final_div_factor": _number(1),
    "loop.epochs": _number(1),
    "loop.steps_per_epoch": _number(1),
    "loop.sampler": _one_of("shuffle", "weighted", "class_balanced"),
    "loop.batch_size": _number(1),
    "loop.micro_batch_size": (
        lambda v: v == "auto" or (isinstance(v, int) and not isinstance(v, bool) and v >= 1),
        "must be null, auto or an integer >= 1",
    ),
    "loop.accumulate": _number(1),
    "loop.precision": _one_of("fp32", "bf16", "fp16"),
    "loop.clip_norm": _number(0, open_low=True),
    "loop.ema": _number(0, 1, open_low=True, open_high=True),
    "loop.average_last": _number(2),
    "loop.patience": _number(1),
    "loop.seed": _number(0),
    "loop.checkpoint_every_steps": _number(1),
    "loop.log_every_steps": _number(1),
    "scaling.num_workers": _number(0),
    "scaling.cpus_per_worker": _number(1),
    "scaling.max_failures": _number(0),
    "scaling.labels": (
        lambda v: isinstance(v, dict) and all(_text(k) and _text(x) for k, x in v.items()),
        "must be labels of nodes and their values, such as {ray.io/market-type: on-demand}",
    ),
    "tracking.name": _one_of("aim", "none"),
    "tta": _one_of(*TTA),
    "subset": _one_of("train", "val", "test"),
    "checkpoint": _one_of("best", "last"),
    "batch_size": _number(1),
    "checks": (
        lambda v: len(v) > 0 and set(v) <= set(AUDIT_CHECKS),
        f"must be some of {', '.join(AUDIT_CHECKS)}",
    ),
    "max_images": _number(100),
    "near_bits": _number(0, 24),
    "near_correlation": _number(0, 1, open_low=True),
    "folds": _number(2, 20),
    "seed": _number(0),
    "most_shown": _number(1, 1000),
    "precision": _one_of("fp32", "bf16", "fp16"),
}

# The nodes that no dataclass types: check and meaning of each place, what holds others first. `*` is any name.
NODES: dict[str, tuple[Check, str]] = {
    "model": ((_mapping("_target_"), "must be a mapping with _target_"), ""),
    "model._target_": (
        (_text, "must be text"),
        "What builds the model: timm, or a plug-in's name.",
    ),
    "model.name": ((_text, "must be text"), "A model of timm: timm.list_models()."),
    "model.pretrained": (
        (lambda v: isinstance(v, bool), "must be true or false"),
        "true: start from timm's weights, from the hub.",
    ),
    "model.init_from": (
        _or_null((_text, "must be text")),
        "Start from a run's folder, a .safetensors or a .pth file; null: from random weights.",
    ),
    "model.drop_path": (
        _or_null(_number(0, 1, open_high=True, kind="a number ")),
        "Rate of stochastic depth, where the family has it. Source: arXiv:1603.09382",
    ),
    "model.grad_checkpointing": (
        (lambda v: isinstance(v, bool), "must be true or false"),
        "true: activations are computed again in the backward pass: less memory, more time. Source: arXiv:1604.06174",
    ),
    "model.kwargs": (
        _or_null((_mapping(), "must be a mapping")),
        "Further arguments of timm.create_model, such as {channels: [16, 32, 64, 128]}.",
    ),
    "model.preprocessing": (
        _one_of("raw", "npr", "right_diag"),
        "ladeda9, tiny_ladeda: what the normalised image goes through: raw | npr (less its copy of half the resolution) | right_diag. Source: arXiv:2406.09398, arXiv:2312.10461",
    ),
    "model.input_scale": (
        _number(0, open_low=True, kind="a number "),
        "ladeda9, tiny_ladeda: what is then multiplied with; the published LaDeDa9 weights want 2/3.",
    ),
    "model.stem_momentum": (
        _number(0, 1, open_low=True, kind="a number "),
        "ladeda9, tiny_ladeda: momentum of the first BatchNorm; published: 0.001.",
    ),
    "model.freeze": (
        _or_null(
            (
                lambda v: isinstance(v, dict) and set(v) <= {"all_but_last_blocks"},
                "must be a mapping of all_but_last_blocks",
            )
        ),
        "",
    ),
    "model.freeze.all_but_last_blocks": (
        _or_null(
            (lambda v: _is_number(v) and isinstance(v, int) and v >= 0, "must be an integer >= 0")
        ),
        "n: only the head and the last n blocks train; null freezes nothing.",
    ),
    "teachers": ((_mapping(), "must be a mapping of names to {run: <folder>, weight: 1}"), ""),
    "teachers.*": (
        (
            lambda v: isinstance(v, dict) and set(v) <= set(TEACHER_KEYS),
            f"must be a mapping of {', '.join(TEACHER_KEYS)}",
        ),
        "",
    ),
    "teachers.*.run": (
        _or_null((_text, "must be text")),
        "Folder of this teacher's run. Source: doi:10.1145/3097983.3098135",
    ),
    "teachers.*.weights": (
        _or_null((_text, "must be text")),
        "Instead of a run, weights for its model, as teacher.weights.",
    ),
    "teachers.*.weights_dir": ((_text, "must be text"), "As teacher.weights_dir."),
    "teachers.*.model": ((_mapping("_target_"), "must be a mapping with _target_"), ""),
    "teachers.*.classes": (
        _one_of("same", "overlap"),
        "same | overlap (it may know some of the classes only, matched by name).",
    ),
    "teachers.*.weight": (
        _number(0, open_low=True, kind="a number "),
        "Its share in the ensemble, relative to the others'.",
    ),
    "task": (
        (
            lambda v: isinstance(v, dict) and "terms" in v and set(v) <= set(TASK_KEYS),
            f"must be a mapping of terms, and of nothing else than {', '.join(TASK_KEYS)}",
        ),
        "",
    ),
    "task.kind": (
        _one_of(*TASK_KINDS),
        "single_label (one class each) | multi_label (any number) | binary (two classes, one logit).",
    ),
    "task.metrics": (
        (lambda v: isinstance(v, list) and all(map(_text, v)), "must be a list of names"),
        "What validation measures besides loss, top-1, top-5 and macro-F1: see docs/recipes.md.",
    ),
    "task.threshold": (
        (
            lambda v: v in ("max_f1", "youden") or (_is_number(v) and 0 < v < 1),
            "must be max_f1, youden or a number > 0 and < 1",
        ),
        "binary, multi_label: probability from which a class counts as present; chosen on validation, or fixed.",
    ),
    "task.terms": (
        (
            lambda v: (
                isinstance(v, dict)
                and bool(v)
                and all(_text(name) and "." not in name for name in v)
            ),
            "must be a mapping that names at least one loss term (no dots in names)",
        ),
        "",
    ),
    "task.terms.*": ((_mapping("loss", "inputs"), "must be a mapping with loss and inputs"), ""),
    "task.terms.*.loss": (
        (_text, "must be text"),
        "Of labels: cross_entropy | bce | focal | asymmetric; of a teacher: kl | kl_sigmoid | … (docs/distillation.md); or a plug-in's.",
    ),
    "task.terms.*.inputs": (
        (lambda v: isinstance(v, list) and all(map(_text, v)), "must be a list of names"),
        "What the loss takes: label, outputs of the model (logits, features, map, patch_logits), of the teacher (teacher.logits).",
    ),
    "task.terms.*.weight": (
        (
            lambda v: isinstance(v, dict) or (_is_number(v) and v >= 0),
            "must be a number >= 0, or a mapping with schedule",
        ),
        "What the term is multiplied by in the sum: a number, or {schedule: linear | cosine | steps | guarded | complement, …}; see docs/distillation.md.",
    ),
    "task.terms.*.label_smoothing": (
        _number(0, 1, kind="a number "),
        "Losses of labels, and hard_labels: share of the target that is spread over all classes. Source: arXiv:1512.00567",
    ),
    "task.terms.*.class_weights": (
        _or_null(
            (
                lambda v: (
                    v in ("balanced", "effective")
                    or (isinstance(v, list) and all(_is_number(w) and w >= 0 for w in v))
                ),
                "must be balanced, effective or a number a class",
            )
        ),
        "balanced (inverse frequency) | effective (number of samples) | a number a class. Source: arXiv:1901.05555",
    ),
    "task.terms.*.gamma": (
        _number(0, kind="a number "),
        "focal: how little what is sure already counts; 0 is cross-entropy; dist: weight of how the samples of a class correlate. Source: arXiv:1708.02002, arXiv:2205.10536",
    ),
    "task.terms.*.alpha": (
        _or_null(_number(0, kind="a number ")),
        "focal, binary and multi_label: weight of what is present, up to 1, null weighs nothing; dkd: weight of how sure both are of the label. Source: arXiv:1708.02002, arXiv:2203.08679",
    ),
    "task.terms.*.beta": (
        _number(0, kind="a number "),
        "dkd: weight of how the other classes rank (8 for small images, 0.5 for ImageNet); dist: weight of how the classes of a sample correlate. Source: arXiv:2203.08679, arXiv:2205.10536",
    ),
    "task.terms.*.p": (
        _number(1, kind="a number "),
        "attention: power of the activations that are summed over channels. Source: arXiv:1612.03928",
    ),
    "task.terms.*.projection": (
        _one_of("linear", "mlp", "none"),
        "feature_mse, feature_cosine: how the student's output is brought to the teacher's width. Source: arXiv:1412.6550",
    ),
    "task.terms.*.gamma_neg": (
        _number(0, kind="a number "),
        "asymmetric: how little what is surely absent counts. Source: arXiv:2009.14119",
    ),
    "task.terms.*.gamma_pos": (
        _number(0, kind="a number "),
        "asymmetric: how little what is surely present counts. Source: arXiv:2009.14119",
    ),
    "task.terms.*.clip": (
        _number(0, 1, open_high=True, kind="a number "),
        "asymmetric: what is absent counts nothing below this probability. Source: arXiv:2009.14119",
    ),
    "task.terms.*.reduce_classes": (
        _one_of("mean", "sum"),
        "bce, focal, asymmetric, where classes stand for themselves: mean (asymmetric: sum) over them.",
    ),
    "task.terms.*.temperature": (
        _number(0, open_low=True, kind="a number "),
        "kl, kl_sigmoid, dkd, dist: what both logits are divided by.",
    ),
}

HINTS = {
    "search.max_hours": "null sets no limit",
    "search.reduction": "such as 3",
    "model": "use model=timm model.name=<name>",
    "model._target_": "use model._target_=timm",
    "model.name": "such as model.name=resnet18",
    "model.freeze": "use model.freeze.all_but_last_blocks=<n>",
    "task": "use task=classify or task=distil",
    "task.terms": "use task=classify or task=distil",
    "task.terms.*": "add it as task.terms.<name>={loss: cross_entropy, inputs: [logits, label]}",
    "task.terms.*.inputs": "such as [logits, label]",
    "loop.patience": "null switches early stopping off",
    "loop.clip_norm": "null switches clipping off",
    "data.classes": "null takes every class",
    "data.max_samples": "null takes every sample",
    "cache.max_gb": "null sets no limit",
}


def validate(config: Any) -> None:
    """Refuse what cannot work, before anything expensive starts.

    Raises UserError with the key, the rule, the value and, where it is not plain, the remedy.
    """
    values = to_dict(config)
    for key, value in flatten(values):
        if key in RULES and value is not None:
            _refuse_unless(RULES[key], key, value, HINTS.get(key))
    if not isinstance(config, Config):
        return
    for pattern, (check, _) in NODES.items():
        for key, value in _places(values, pattern):
            if _is_option_of_a_plugin(key, values):
                continue
            _refuse_unless(check, key, value, HINTS.get(pattern))
    registry.check("model", config.model["_target_"])
    if (
        config.model["_target_"] != "timm"
    ):  # its module is imported already: it can be asked at once
        model = registry.lookup("model", config.model["_target_"])
        _arguments("model", config.model, model, ("num_classes", "image_px"))
    registry.check("source", config.data.source)
    _check_task(config)
    _check_recipe(config)
    _check_native(config)
    _check_stages(config)
    loop = config.loop
    if loop.micro_batch_size and loop.accumulate > 1:
        raise UserError(
            "loop.micro_batch_size and loop.accumulate say the same thing: set one of them, got "
            f"{loop.micro_batch_size} and {loop.accumulate}"
        )
    if config.scaling.sync_batchnorm and (loop.micro_batch_size or loop.accumulate > 1):
        key = "micro_batch_size" if loop.micro_batch_size else "accumulate"
        raise UserError(
            f"scaling.sync_batchnorm must be false where loop.{key} is set, got true and {getattr(loop, key)}: in the last "
            "batch of an epoch workers may run different numbers of forward passes, and each waits for all; set "
            f"loop.{key}={'null' if loop.micro_batch_size else 1}, or scaling.sync_batchnorm=false"
        )
    workers = max(config.scaling.num_workers, 1)
    if loop.batch_size < 2 * workers:
        raise UserError(
            f"loop.batch_size must be >= {2 * workers} (two samples for each of {workers} workers: batch "
            f"statistics need them), got {loop.batch_size}"
        )
    if config.schedule.warmup_epochs >= loop.epochs:
        raise UserError(
            f"schedule.warmup_epochs must be < loop.epochs ({loop.epochs}), got {config.schedule.warmup_epochs:g}"
        )
    _check_teachers(config)


NATIVE_PIXELS = ("ladeda9", "tiny_ladeda")
"""Models that look for traces in pixels; a plug-in's class says so by `native_pixels = True`."""


def reads_native_pixels(model: dict[str, Any]) -> bool:
    """Whether a model node is of one that resampling would blind."""
    target = model.get("_target_")
    if target in NATIVE_PIXELS:
        return True
    plugin = target not in (None, "timm") and target in registry.names("model")
    return plugin and getattr(registry.lookup("model", str(target)), "native_pixels", False)


def _check_native(config: Config) -> None:
    models = {"model": config.model}
    for name, spec in teacher_specs(config).items():
        if spec["weights"] and spec["model"].get("_target_"):
            key = "teacher.model" if name == "teacher" else f"teachers.{name}.model"
            registry.check("model", spec["model"].get("_target_"))
            models[key] = spec["model"]
    for key, model in models.items():
        if reads_native_pixels(model):
            refuse_resampling(config, f"{key}={model['_target_']}")


def refuse_resampling(config: Config, because: str) -> None:
    """Refuse whatever would wipe out, or add, traces in the pixels. `because`: who reads them.

    Raises UserError that names the key.
    """
    augment, decode = config.augment, config.data.decode
    wanted: dict[str, tuple[Any, Any]] = {
        "data.decode.fit": (decode.fit, "native"),
        "cache.format": (config.cache.format, "raw"),
        "augment.image_px": (augment.image_px or decode.image_px, decode.image_px),
        "augment.start_px": (augment.start_px, None),
        "augment.crop_scale": (list(augment.crop_scale), [1.0, 1.0]),
        "augment.rotate": (augment.rotate, 0.0),
        "augment.color": (augment.color, 0.0),
        "augment.policy": (augment.policy, None),
        "augment.mixup": (augment.mixup, 0.0),
        "augment.eval_crop": (augment.eval_crop, 1.0),
        "augment.tta": (augment.tta if augment.tta != "flip" else "none", "none"),
    }
    for key, (value, needed) in wanted.items():
        if value != needed:
            raise UserError(
                f"{key} must be {_as_written(needed)} for {because}, which looks for traces that resampling and another JPEG "
                f"compression wipe out, got {_as_written(value)}; set {key}={_as_written(needed)}"
            )


def _check_stages(config: Config) -> None:
    """Every stage is a config of its own, and is checked as one."""
    if not config.stages:
        return
    if config.loop.average_last is not None:
        raise UserError(
            f"loop.average_last must be null with stages, got {config.loop.average_last}; use loop.ema"
        )
    for i, stage in enumerate(stage_configs(config)):
        try:
            validate(stage)
        except UserError as error:
            raise UserError(f"stages.{i}: {error}") from None


def augment_seed(config: Config) -> int:
    """Of what is drawn for a view of an image."""
    return config.loop.seed if config.augment.seed is None else config.augment.seed


def teacher_inputs(config: Config) -> dict[str, list[str]]:
    """By teacher (`teacher`, or a name of `teachers`): its outputs that the terms of any stage name."""
    known = ("teacher", *config.teachers)
    found: dict[str, list[str]] = {}
    terms = [t for stage in stage_configs(config) for t in stage.task["terms"].values()]
    for column in [c for term in [*config.task["terms"].values(), *terms] for c in term["inputs"]]:
        owner, dot, output = column.partition(".")
        if dot and owner in known and output not in found.setdefault(owner, []):
            found[owner].append(output)
    return found


def teacher_specs(config: Config) -> dict[str, dict[str, Any]]:
    """Every teacher that has to run, by name: {run, weights, weights_dir, model, classes, weight}."""
    defaults = {
        **{"run": None, "weights": None, "weights_dir": "weights"},
        **{"model": {}, "classes": "same", "weight": 1.0},
    }
    if config.teachers:
        return {name: {**defaults, **one} for name, one in config.teachers.items()}
    if not (config.teacher.run or config.teacher.weights):
        return {}
    return {"teacher": {**defaults, **{k: getattr(config.teacher, k) for k in TEACHER_KEYS[:-1]}}}


def has_teacher(config: Config) -> bool:
    teacher = config.teacher
    return bool(teacher.run or teacher.weights or teacher.soft_labels or config.teachers)


def _check_teachers(config: Config) -> None:
    """One teacher, several or none, and whether the terms have what they name."""
    teacher = config.teacher
    if teacher.soft_labels:
        from potstill.soft_labels import refuse_recipe

        refuse_recipe(config)
    if teacher.run and teacher.weights:
        raise UserError(
            f"teacher.run and teacher.weights say the same thing: set one of them, got {teacher.run} and {teacher.weights}"
        )
    if config.teachers and (one := teacher.run or teacher.weights):
        raise UserError(
            f"teacher and teachers do not go together: make the one ({one}) one of teachers, as teachers.<name>.run"
        )
    if teacher.weights and "_target_" not in teacher.model:
        raise UserError(
            f"teacher.model must say what teacher.weights={teacher.weights} are of, got nothing; add teacher=ladeda9, or "
            "teacher.model._target_=timm teacher.model.name=<name>"
        )
    for name, one in config.teachers.items():
        if name in ("teacher", "label", "image") or "." in name:
            raise UserError(f"teachers.{name} must have another name, without dots")
        if bool(one.get("run")) == bool(one.get("weights")):
            raise UserError(
                f"teachers.{name} must have a run or weights, got {one.get('run')} and {one.get('weights')}"
            )
        if one.get("weights") and "_target_" not in one.get("model", {}):
            raise UserError(
                f"teachers.{name}.model must say what {one['weights']} are of, got nothing"
            )
    if not config.distil.teacher:  # jobs/distil.py trains one
        _refuse_missing_teacher(config)


def _refuse_missing_teacher(config: Config) -> None:
    for name, term in config.task["terms"].items():
        if any(i.startswith("teacher.") for i in term["inputs"]) and not has_teacher(config):
            remedy = "add teacher.run=runs/<name>"
            if config.distil.teacher:
                remedy += ", or let jobs/distil.py train one"
            raise UserError(
                f"teacher.run must name the folder of a trained run, because task.terms.{name} learns from a "
                f"teacher, got null; {remedy}"
            )


def _is_option_of_a_plugin(key: str, values: dict[str, Any]) -> bool:
    """Whether a key is an option of a loss that a plug-in has registered: its values are its own affair."""
    parts = key.split(".")
    if parts[:2] != ["task", "terms"] or len(parts) < 4 or parts[3] in ("loss", "inputs", "weight"):
        return False
    return values["task"]["terms"][parts[2]].get("loss") in registry.names("loss")


def _check_task(config: Config) -> None:
    """What kind of labels, metrics and monitor go together."""
    from potstill import metric_names
    from potstill.term_weights import check_weights

    kind = config.task.get("kind", "single_label")
    if (kind == "multi_label") != config.data.multi_label:
        remedy = "set data.multi_label=true" if kind == "multi_label" else "use task=multilabel"
        raise UserError(
            f"task.kind must go with data.multi_label, got {kind} and {json.dumps(config.data.multi_label)}; {remedy}"
        )
    chosen = config.task.get("metrics") or []
    metric_names.check(kind, chosen)
    monitors = metric_names.monitors(kind, chosen)
    check_weights(config.task["terms"], monitors)
    for name, term in config.task["terms"].items():
        if term["loss"] == "focal" and (alpha := term.get("alpha")) is not None and alpha > 1:
            raise UserError(f"task.terms.{name}.alpha must be <= 1 with focal, got {alpha:g}")
    if config.loop.monitor not in monitors:
        remedy = "a metric of task.metrics is monitored as val_<name>"
        near = difflib.get_close_matches(config.loop.monitor, monitors, n=1)
        raise UserError(
            f"loop.monitor must be one of {', '.join(monitors)}, got {config.loop.monitor!r}; "
            f"{f'did you mean {near[0]}?' if near else remedy}"
        )
    if config.data.unlabeled and all("label" in t["inputs"] for t in config.task["terms"].values()):
        raise UserError(
            f"data.unlabeled needs a term that learns without labels, got {config.data.unlabeled!r} and only terms with a "
            "label; use task=distil with teacher.run, or set data.unlabeled=null"
        )
    if kind == "multi_label" and config.loop.sampler == "class_balanced":
        raise UserError(
            "loop.sampler must be shuffle or weighted with data.multi_label, got class_balanced: an image there has no "
            "one class; use task.terms.<term>.class_weights=balanced"
        )


def _check_recipe(config: Config) -> None:
    """Keys that do not go together."""
    loop, augment, schedule = config.loop, config.augment, config.schedule
    if loop.ema is not None and loop.average_last is not None:
        raise UserError(
            f"loop.ema and loop.average_last are two ways to average weights: set one of them, got {loop.ema:g} and "
            f"{loop.average_last}"
        )
    if loop.average_last is not None and loop.patience is not None:
        raise UserError(
            f"loop.average_last averages the last epochs, and loop.patience may end the run before them: set one of them to "
            f"null, got {loop.average_last} and {loop.patience}"
        )
    if loop.average_last is not None and loop.average_last > loop.epochs:
        raise UserError(
            f"loop.average_last must be <= loop.epochs ({loop.epochs}), got {loop.average_last}"
        )
    if schedule.name == "one_cycle" and schedule.warmup_epochs > 0:
        raise UserError(
            f"schedule.warmup_epochs must be 0 with schedule=one_cycle, which warms up by itself (schedule.peak), got "
            f"{schedule.warmup_epochs:g}"
        )
    if schedule.name == "steps" and not schedule.milestones:
        raise UserError(
            "schedule.milestones must name at least one epoch with schedule=steps, got []; such as [30,60,80]"
        )
    px = augment.image_px or config.data.decode.image_px
    if augment.start_px is not None and augment.start_px > px:
        raise UserError(
            f"augment.start_px must be <= augment.image_px ({px}), got {augment.start_px}"
        )
    if augment.mix_off_epochs and not (augment.mixup or augment.cutmix):
        raise UserError(
            f"augment.mix_off_epochs needs augment.mixup or augment.cutmix, got {augment.mix_off_epochs} with neither"
        )


def _refuse_unless(check: Check, key: str, value: Any, hint: str | None) -> None:
    test, rule = check
    if not test(value):
        shown = json.dumps(value) if value is None or isinstance(value, bool) else repr(value)
        raise UserError(f"{key} {rule}, got {shown}{f'; {hint}' if hint else ''}")


def _places(values: dict[str, Any], pattern: str) -> list[tuple[str, Any]]:
    """(dotted key, value) of every place in `values` that a pattern names."""
    found: list[tuple[str, Any]] = [("", values)]
    for part in pattern.split("."):
        found = [
            (f"{key}.{name}".lstrip("."), node[name])
            for key, node in found
            if isinstance(node, dict)
            for name in (node if part == "*" else [part])
            if name in node
        ]
    return found


# -------------------------------------------------------------------------------------------- building
# Keys of a plug-in node that are not its constructor's.
CONSUMED_ELSEWHERE: dict[str, frozenset[str]] = {"model": frozenset({"init_from", "freeze"})}


def build(key: registry.Kind, node: dict[str, Any], **injected: Any) -> Any:
    """Build a plug-in node: its constructor is its schema. `key` is the node's place, for errors.

    `injected` is what the config cannot say (the number of classes, say). Raises UserError for an
    unregistered target or a key that the constructor does not take. A node's `null` that the constructor
    does not take is left out: it says the same.
    """
    target = registry.lookup(key, node["_target_"])
    return target(**_arguments(key, node, target, injected), **injected)


def _arguments(
    key: str, node: dict[str, Any], target: Any, injected: Container[str]
) -> dict[str, Any]:
    elsewhere = CONSUMED_ELSEWHERE.get(key, frozenset())
    arguments = {k: v for k, v in node.items() if k != "_target_" and k not in elsewhere}
    accepted = inspect.signature(target).parameters
    arguments = {k: v for k, v in arguments.items() if k in accepted or v not in (None, {}, False)}
    free = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    for name in arguments:
        if (name not in accepted and not free) or name in injected:
            near = difflib.get_close_matches(name, [*accepted, *elsewhere], n=1)
            remedy = f"did you mean {key}.{near[0]}?" if near else f"it takes {', '.join(accepted)}"
            raise UserError(
                f"{key}.{name} is not a key of {node['_target_']} (got {arguments[name]!r}); {remedy}"
            )
    return arguments


def checked(config: Any) -> Any:
    """A copy of a config that was changed in Python, checked as a composed one is. Raises UserError."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        copied = OmegaConf.to_object(
            OmegaConf.merge(_structured(type(config)), literal(to_dict(config)))
        )
    except (OmegaConfBaseException, ValueError) as error:
        key = getattr(error, "full_key", "") or "the config"
        raise UserError(f"{key} was refused: {str(error).splitlines()[0]}") from None
    registry.load_plugins(getattr(copied, "plugins", []))
    if isinstance(copied, Config):
        copied = apply_debug(copied) if copied.debug else copied
        _count_stages(copied)
    validate(copied)
    return copied


@functools.cache
def _structured(schema: type) -> Any:
    """OmegaConf's form of a schema, which takes it a while; a merge copies it."""
    from omegaconf import OmegaConf

    return OmegaConf.structured(schema)


def literal(value: Any) -> Any:
    """Text as it is: OmegaConf would take `${…}` in it for another key."""
    if isinstance(value, dict):
        return {key: literal(item) for key, item in value.items()}
    if isinstance(value, list):
        return [literal(item) for item in value]
    return _without_interpolation(value) if isinstance(value, str) else value


# ----------------------------------------------------------------------------------------- plain dicts
def to_dict(config: Any) -> dict[str, Any]:
    return dataclasses.asdict(config)


def from_dict(schema: type, values: dict[str, Any]) -> Any:
    """The dataclass that `to_dict` made `values` of. Raises UserError for a key it does not have."""
    hints = typing.get_type_hints(schema)
    arguments = {}
    for key, value in values.items():
        if key not in hints:
            raise UserError(
                f"{schema.__name__} has no key {key!r}: was it written by another version of potstill?"
            )
        hint = hints[key]
        nested = hint if is_dataclass(hint) else None
        arguments[key] = from_dict(nested, value) if nested and isinstance(value, dict) else value  # type: ignore[arg-type]
    return schema(**arguments)


def flatten(values: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields (dotted key, leaf); an empty dict is a leaf."""
    for key, value in values.items():
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def resolved(path: str | None) -> str | None:
    """A path that means the same from any folder; a URI means that already."""
    return path if not path or is_uri(path) else str((home() / Path(path).expanduser()).resolve())


def resolve_teacher(teacher: dict[str, Any]) -> None:
    """Let a teacher's paths mean the same from any folder, in place."""
    weights = teacher.get("weights")
    # a name is looked up in weights_dir; without one that folder says nothing
    place = "weights_dir" if weights in NAMED_WEIGHTS else "weights"
    for key in ("run", "soft_labels", place):
        if teacher.get(key):
            teacher[key] = resolved(teacher[key])


def resolve_paths(config: Config) -> None:
    """A run must mean the same from any folder."""
    config.data.root = resolved(config.data.root)
    config.data.unlabeled = resolved(config.data.unlabeled)
    for one in (vars(config.teacher), *config.teachers.values()):
        resolve_teacher(one)
    config.model["init_from"] = resolved(config.model.get("init_from"))


def identity(config: Config) -> dict[str, Any]:
    """What a run's result depends on: the config without where it runs and where it is written."""
    values = to_dict(config)
    elsewhere = ("run", "runs", "tracking", "scaling", "cache", "debug", "experiment")
    for key in (*elsewhere, "soft_labels", "gate", "distil", "fakes", "search"):
        values.pop(key)
    values["loop"].pop("log_every_steps")
    values["scaling"] = {"sync_batchnorm": config.scaling.sync_batchnorm}
    values["data"]["root"] = resolved(config.data.root)
    values["data"]["unlabeled"] = resolved(config.data.unlabeled)
    for teacher in (values["teacher"], *values["teachers"].values()):
        resolve_teacher(teacher)
    return values


def config_hash(config: Config) -> str:
    return hashlib.sha256(json.dumps(identity(config), sort_keys=True).encode()).hexdigest()[:8]


def differing_keys(a: Config, b: Config) -> list[str]:
    """`key: value of a -> value of b` for every key of the identities that differs."""
    left, right = dict(flatten(identity(a))), dict(flatten(identity(b)))
    keys = sorted(left.keys() | right.keys())
    return [
        f"{k}: {left.get(k)!r} -> {right.get(k)!r}" for k in keys if left.get(k) != right.get(k)
    ]


def to_yaml(config: Any) -> str:
    import yaml

    return yaml.safe_dump(to_dict(config), sort_keys=False)


def load_run_config(run_dir: Path) -> Config:
    """The config that a run was started with."""
    import yaml

    try:
        return from_dict(Config, yaml.safe_load((run_dir / "config.yaml").read_text()))
    except (OSError, yaml.YAMLError, AttributeError) as error:
        raise UserError(
            f"{run_dir / 'config.yaml'} cannot be read ({error}); is this the folder of a run?"
        ) from None


# -------------------------------------------------------------------------------------------- commands
def job(
    name: str, flags: dict[str, dict[str, Any]] | None = None
) -> Callable[[Callable[..., None]], Callable[[], None]]:
    """Make `main(config)` a command: `key=value` overrides, --help, --cfg, --config-dir.

    `flags` are what else it takes, {"--flag": arguments of argparse's add_argument}; it is then called as
    `main(config, flags)`, where `flags.flag` is what was given.

    A UserError is printed as one message (exit status 2); a stop that was asked for, Ctrl-C among them, exits
    with 130. Anything else is a mistake of ours and keeps its traceback.
    """

    def decorate(main: Callable[..., None]) -> Callable[[], None]:
        def command() -> None:
            sys.exit(_run(name, main, sys.argv[1:], flags))

        command.__doc__ = main.__doc__
        return command

    return decorate


@contextlib.contextmanager
def _interruptions_come_again() -> Iterator[None]:
    """An interruption that comes within a finalizer, or a callback of the import system, is lost there: it comes again."""
    before = sys.unraisablehook

    def again() -> None:
        if sys.unraisablehook is hook:  # the job is not over
            os.kill(os.getpid(), signal.SIGTERM)

    def hook(what: sys.UnraisableHookArgs) -> None:
        of_ray = isinstance(what.exc_value, SystemExit) and what.exc_value.code == signal.SIGTERM
        if of_ray or what.exc_type is KeyboardInterrupt:
            threading.Timer(0.1, again).start()
        else:
            before(what)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _run(
    name: str,
    main: Callable[..., None],
    argv: list[str],
    flags: dict[str, dict[str, Any]] | None = None,
) -> int:
    import argparse

    module = sys.modules[main.__module__]
    parser = argparse.ArgumentParser(
        prog=f"jobs/{name}.py",
        description=module.__doc__,
        epilog=_keys_help(name),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="config values and group choices"
    )
    parser.add_argument("--cfg", action="store_true", help="print the composed config and stop")
    parser.add_argument(
        "--config-dir", metavar="DIR", help="a further folder of config groups (experiment/, …)"
    )
    for flag, options in (flags or {}).items():
        parser.add_argument(flag, **options)
    arguments = parser.parse_intermixed_args(argv)  # flags may stand between overrides
    # `ray job stop`, a queue, a machine that goes down: as Ctrl-C, wherever the job is
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        with _interruptions_come_again():
            config = compose(name, arguments.overrides, arguments.config_dir)
            if arguments.cfg:
                print(to_yaml(config), end="")
            else:
                main(config, arguments) if flags else main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        where = f" of {error.filename}" if error.filename else ", one that this job writes to,"
        print(
            f"error: the disk{where} must have room, got none ({error.strerror}); make room there, and start the same "
            "command again: it goes on from what is kept",
            file=sys.stderr,
        )
        return 2
    return 0


def _keys_help(name: str) -> str:
    """Groups, then every key with its default and what it means (read from the schema's own docstrings)."""
    lines = []
    if SCHEMAS[name] is Config:
        lines.append("groups (group=choice):")
        lines += [f"  {group:<12} {', '.join(names)}" for group, names in _groups(CONF_DIR).items()]
        lines.append("")
    lines.append("keys (default):")
    for key, value, text in _documented(SCHEMAS[name](), name):
        lines.append(f"  {key:<33} {_as_written(value):<16} {text}")
    return "\n".join(lines)


def keys_table(name: str = "train") -> str:
    """Every key of a job as a Markdown table: key, meaning, default, source."""
    lines = ["| key | meaning | default | source |", "|---|---|---|---|"]
    for key, value, text in _documented(SCHEMAS[name](), name):
        meaning, _, source = (part.strip() for part in text.partition("Source:"))
        cells = (f"`{key}`", meaning, f"`{_as_written(value)}`", source)
        lines.append(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |")
    return "\n".join(lines) + "\n"


def _as_written(value: Any) -> str:
    """A value as an override would say it."""
    if isinstance(value, list):
        return f"[{','.join(map(_as_written, value))}]"
    return json.dumps(value) if value is None or isinstance(value, bool) else str(value)


def _documented(defaults: Any, job_name: str, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    """(dotted key, default, meaning) of every key below a dataclass."""
    import ast

    tree = ast.parse(inspect.getsource(type(defaults))).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    previous = ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            previous = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
            texts[previous] = " ".join(str(node.value.value).split())
    for item in dataclasses.fields(defaults):
        key, value = f"{prefix}{item.name}", getattr(defaults, item.name)
        if is_dataclass(value):
            yield from _documented(value, job_name, f"{key}.")
        elif key in NODES and isinstance(value, dict):
            if text := texts.get(item.name):
                yield key, value, text
            yield from _documented_node(key, job_name)
        else:
            yield key, value, texts.get(item.name, "")


def _documented_node(root: str, job_name: str) -> Iterator[tuple[str, Any, str]]:
    known = _known_keys(job_name)
    for pattern, (_, text) in NODES.items():
        matching = [key for key in known if fnmatch.fnmatchcase(key, pattern)]
        if pattern.startswith(f"{root}.") and text:
            yield (
                pattern.replace("*", "<term>" if root == "task" else "<name>"),
                known[matching[0]] if matching else "by loss",
                text,
            )
