"""The schema of a run, its validation, and `build()`: the one module that knows Hydra.

A config is composed from `conf/` by Hydra, checked here, and then travels as plain dataclasses and dicts:
nothing behind this module, and no Ray worker, needs Hydra or OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import hashlib
import importlib
import inspect
import json
import math
import re
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from potstill.errors import Stopped, UserError

CONF_DIR = Path(__file__).resolve().parents[2] / "conf"


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
class Data:
    source: str = "folder"
    """folder: <root>/<class>/*, or <root>/{train,val,test}/<class>/*."""
    root: str | None = None
    """The folder of images; must be given."""
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
    """Folder of the caches: one folder a set and decoding."""
    max_gb: float | None = None
    """What all sets in it may take, in GB; null sets no limit."""
    verify: bool = False
    """Read every shard again and compare its checksum before it is used (sizes are always compared)."""


@dataclass
class Augment:
    image_px: int | None = None
    """Side of what the model sees, in pixels; null is data.decode.image_px."""
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    """Smallest and largest share of the image's area that a random crop takes."""
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
    """Smallest and largest ratio of a random crop's width to its height."""
    flip: float = 0.0
    """Probability of a horizontal flip."""
    rotate: float = 0.0
    """Largest angle, in degrees, either way."""
    color: float = 0.0
    """Strength of brightness, contrast and saturation changes: factors in [1 - color, 1 + color]."""
    eval_crop: float = 1.0
    """Share of the frame's side that validation sees, from the centre; 0.875 suits crops of half the frame and more."""
    views: int | None = None
    """How many different augmentations a sample has in all; null draws a new one at every occurrence."""


@dataclass
class TeacherConfig:
    run: str | None = None
    """Folder of the teacher's run; null trains without one."""
    temperature: float = 4.0
    """What logits are divided by before they are compared with the teacher's (task=distil)."""


@dataclass
class Optimizer:
    name: str = "adamw"
    """adamw | adam | sgd."""
    lr: float = 1e-3
    """Learning rate, after the warm-up."""
    weight_decay: float = 0.05
    """Of weight matrices and kernels; biases and norms have none."""
    momentum: float = 0.9
    """SGD only."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam and AdamW only."""
    head_lr: float | None = None
    """Learning rate of the classifier; null is lr."""


@dataclass
class Schedule:
    name: str = "cosine"
    """cosine | plateau | constant."""
    warmup_epochs: float = 0.0
    """Epochs in which the learning rate rises linearly; may be a fraction."""
    min_lr: float = 0.0
    """The learning rate does not fall below it."""
    factor: float = 0.1
    """plateau: what the learning rate is multiplied by."""
    patience: int = 3
    """plateau: epochs without improvement of loop.monitor before it is."""


@dataclass
class Loop:
    epochs: int = 10
    """Passes over the training images."""
    batch_size: int = 64
    """Samples in one update, over all workers."""
    micro_batch_size: int | None = None
    """Samples in one forward pass of one worker; null is the worker's whole share."""
    accumulate: int = 1
    """The same, said as the number of forward passes in an update."""
    precision: str = "fp32"
    """fp32 | bf16 | fp16, of the forward pass; weights stay fp32."""
    clip_norm: float | None = None
    """Largest norm of an update's gradient; null switches clipping off."""
    patience: int | None = None
    """Epochs without improvement of `monitor` before the run stops; null is off."""
    monitor: str = "val_top1_acc"
    """What makes a checkpoint the best: val_top1_acc | val_top5_acc | val_macro_f1 | val_loss | train_loss."""
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
    """null: where there is one for every worker."""
    cpus_per_worker: int | None = None
    """null: the machine's cores, divided among the workers."""
    sync_batchnorm: bool = False
    """BatchNorm over the samples of all GPUs; not where an update takes several forward passes."""
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
    task: dict[str, Any] = field(default_factory=dict)
    optimizer: Optimizer = field(default_factory=Optimizer)
    schedule: Schedule = field(default_factory=Schedule)
    loop: Loop = field(default_factory=Loop)
    scaling: Scaling = field(default_factory=Scaling)
    run: Run = field(default_factory=Run)
    runs: Runs = field(default_factory=Runs)
    tracking: Tracking = field(default_factory=Tracking)
    debug: bool = False
    """true: 200 images, at most 64 px, two epochs: does it work at all?"""
    experiment: str | None = None
    """A file of conf/experiment/; it overrides all other groups."""


@dataclass
class PrepareConfig:
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)


@dataclass
class EvaluateData:
    """What is evaluated on. How it is decoded is the run's own affair, and no key of it is taken here."""

    root: str | None = None
    """A folder of class folders, decoded as the run's own images were; null: the run's own data."""
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
    """Folder of evaluation.json; null is <run>/evaluations/<data key>-<subset>."""


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


SCHEMAS: dict[str, type] = {
    "train": Config,
    "prepare": PrepareConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
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
                name, [*map(_for_hydra, overrides), *search], return_hydra_config=True
            )
        choices = composed.hydra.runtime.choices
        with open_dict(composed):
            del composed["hydra"]
        assert isinstance(composed, DictConfig)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise UserError(_explain(name, overrides, error, further)) from None
    assert isinstance(config, schema)
    if isinstance(config, Config):
        config.experiment = choices.get("experiment") or config.experiment
        config = apply_debug(config) if config.debug else config
    validate(config)
    return config


# Open dicts of the config, whose keys are not ours to list.
OPEN = ("model.kwargs", "task.terms")


# Keys whose values are plain text, mostly paths: what Hydra's grammar makes of ( ) , = # and so on is not meant.
LITERAL = frozenset(
    (
        *("data.root", "cache.dir", "runs.dir", "run.name", "tracking.repo", "teacher.run"),
        *("model.init_from", "from_run", "output", "data_dir"),
    )
)


def _for_hydra(override: str) -> str:
    """An override in Hydra's grammar: plain text is quoted, and `model.kwargs.channels=…` needs no `+`.

    `null`, nothing, and what the user has quoted already keep their meaning.
    """
    key, equals, value = override.partition("=")
    if key.lstrip("+") in LITERAL and not re.fullmatch(_LEFT_ALONE, value, re.DOTALL):
        override = f"{key}{equals}{_quoted(value)}" if equals else override
    return f"++{override}" if override.startswith(OPEN) else override


_LEFT_ALONE = r"""|null|'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*\""""


def _quoted(text: str) -> str:
    """Text that comes out of Hydra and OmegaConf as it is."""
    from hydra.core.override_parser.types import Quote, QuotedString

    without_interpolation = re.sub(r"(\\*)\$\{", r"\1\1\\${", text)
    return QuotedString(without_interpolation, Quote.single).with_quotes()


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
        free = key.startswith(OPEN)
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
    if name == "train":
        for group in ("model", "task"):
            keys.pop(group)
            for path in sorted((CONF_DIR / group).glob("*.yaml")):
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
    loop.epochs = min(loop.epochs, 2)
    loop.batch_size = min(loop.batch_size, 16)
    loop.micro_batch_size = None
    loop.accumulate = min(loop.accumulate, 2)
    config.schedule.warmup_epochs = min(config.schedule.warmup_epochs, 0.5)
    return config


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


def _or_null(check: Check) -> Check:
    test, rule = check
    return lambda v: v is None or test(v), rule.replace("must be", "must be null or", 1)


MONITORS = ("val_top1_acc", "val_top5_acc", "val_macro_f1", "val_loss", "train_loss")

RULES: dict[str, Check] = {
    "data.source": _one_of("folder"),
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
    "augment.image_px": _number(8, 4096),
    "augment.crop_scale": _pair(0, 1),
    "augment.crop_ratio": _pair(0, 100),
    "augment.flip": _number(0, 1),
    "augment.rotate": _number(0, 180),
    "augment.color": _number(0, 1),
    "augment.eval_crop": _number(0.1, 1),
    "augment.views": _number(1),
    "teacher.temperature": _number(0, open_low=True),
    "optimizer.name": _one_of("adamw", "adam", "sgd"),
    "optimizer.lr": _number(0, open_low=True),
    "optimizer.head_lr": _number(0, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.momentum": _number(0, 1),
    "optimizer.betas": (
        lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v),
        "must be two numbers >= 0 and < 1",
    ),
    "schedule.name": _one_of("cosine", "plateau", "constant"),
    "schedule.warmup_epochs": _number(0),
    "schedule.min_lr": _number(0),
    "schedule.factor": _number(0, 1, open_low=True),
    "schedule.patience": _number(0),
    "loop.epochs": _number(1),
    "loop.batch_size": _number(1),
    "loop.micro_batch_size": _number(1),
    "loop.accumulate": _number(1),
    "loop.precision": _one_of("fp32", "bf16", "fp16"),
    "loop.clip_norm": _number(0, open_low=True),
    "loop.patience": _number(1),
    "loop.monitor": _one_of(*MONITORS),
    "loop.seed": _number(0),
    "loop.checkpoint_every_steps": _number(1),
    "loop.log_every_steps": _number(1),
    "scaling.num_workers": _number(0),
    "scaling.cpus_per_worker": _number(1),
    "scaling.max_failures": _number(0),
    "tracking.name": _one_of("aim", "none"),
    "subset": _one_of("train", "val", "test"),
    "checkpoint": _one_of("best", "last"),
    "batch_size": _number(1),
    "precision": _one_of("fp32", "bf16", "fp16"),
}

# The nodes that no dataclass types: check and meaning of each place, what holds others first. `*` is any name.
NODES: dict[str, tuple[Check, str]] = {
    "model": ((_mapping("_target_", "name"), "must be a mapping with _target_ and name"), ""),
    "model._target_": ((_text, "must be text"), "What builds the model: timm, so far."),
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
        "Rate of stochastic depth, where the family has it.",
    ),
    "model.kwargs": (
        _or_null((_mapping(), "must be a mapping")),
        "Further arguments of timm.create_model, such as {channels: [16, 32, 64, 128]}.",
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
    "task": (
        (
            lambda v: isinstance(v, dict) and set(v) == {"terms"},
            "must be a mapping of terms, and of nothing else",
        ),
        "",
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
    "task.terms.*.loss": ((_text, "must be text"), "cross_entropy | kl."),
    "task.terms.*.inputs": (
        (lambda v: isinstance(v, list) and all(map(_text, v)), "must be a list of names"),
        "What the loss takes: label, outputs of the model (logits), of the teacher (teacher.logits).",
    ),
    "task.terms.*.weight": (
        _number(0, kind="a number "),
        "What the term is multiplied by in the sum.",
    ),
    "task.terms.*.label_smoothing": (
        _number(0, 1, kind="a number "),
        "cross_entropy: share of the target that is spread over all classes.",
    ),
    "task.terms.*.temperature": (
        _number(0, open_low=True, kind="a number "),
        "kl: what both logits are divided by.",
    ),
}

HINTS = {
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
            _refuse_unless(check, key, value, HINTS.get(pattern))
    check_node("model", config.model, CONSUMED_ELSEWHERE["model"])
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
    for name, term in config.task["terms"].items():
        if any(i.startswith("teacher.") for i in term["inputs"]) and not config.teacher.run:
            raise UserError(
                f"teacher.run must name the folder of a trained run, because task.terms.{name} learns from a "
                "teacher, got null; add teacher.run=runs/<name>"
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
# What `_target_` may name: nothing else is ever imported from a config.
REGISTRY: dict[str, str] = {"timm": "potstill.models.images:TimmModel"}

# Keys of a plug-in node that are not its constructor's.
CONSUMED_ELSEWHERE: dict[str, frozenset[str]] = {"model": frozenset({"init_from", "freeze"})}


def check_node(key: str, node: dict[str, Any], elsewhere: frozenset[str] = frozenset()) -> str:
    """Check that a plug-in node names a registered target; returns its `module:attribute`."""
    target = node.get("_target_")
    if target not in REGISTRY:
        raise UserError(
            f"{key}._target_ must be one of {', '.join(sorted(REGISTRY))}, got {target!r}"
        )
    return REGISTRY[target]


def build(key: str, node: dict[str, Any], **injected: Any) -> Any:
    """Build a plug-in node: its constructor is its schema. `key` is the node's place, for errors.

    `injected` is what the config cannot say (the number of classes, say). Raises UserError for an
    unregistered target or a key that the constructor does not take.
    """
    elsewhere = CONSUMED_ELSEWHERE.get(key, frozenset())
    module, _, attribute = check_node(key, node, elsewhere).partition(":")
    target = getattr(importlib.import_module(module), attribute)
    arguments = {k: v for k, v in node.items() if k != "_target_" and k not in elsewhere}
    accepted = inspect.signature(target).parameters
    for name in arguments:
        if name not in accepted or name in injected:
            near = difflib.get_close_matches(name, [*accepted, *elsewhere], n=1)
            remedy = f"did you mean {key}.{near[0]}?" if near else f"it takes {', '.join(accepted)}"
            raise UserError(
                f"{key}.{name} is not a key of {node['_target_']} (got {arguments[name]!r}); {remedy}"
            )
    return target(**arguments, **injected)


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


def identity(config: Config) -> dict[str, Any]:
    """What a run's result depends on: the config without where it runs and where it is written."""
    values = to_dict(config)
    for key in ("run", "runs", "tracking", "scaling", "cache", "debug", "experiment"):
        values.pop(key)
    values["loop"].pop("log_every_steps")
    values["scaling"] = {"sync_batchnorm": config.scaling.sync_batchnorm}
    if config.data.root:
        values["data"]["root"] = str(Path(config.data.root).expanduser().resolve())
    if config.teacher.run:
        values["teacher"]["run"] = str(Path(config.teacher.run).expanduser().resolve())
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
def job(name: str) -> Callable[[Callable[[Any], None]], Callable[[], None]]:
    """Make `main(config)` a command: `key=value` overrides, --help, --cfg, --config-dir.

    A UserError is printed as one message (exit status 2); a stop that was asked for, Ctrl-C among them, exits
    with 130. Anything else is a mistake of ours and keeps its traceback.
    """

    def decorate(main: Callable[[Any], None]) -> Callable[[], None]:
        def command() -> None:
            sys.exit(_run(name, main, sys.argv[1:]))

        command.__doc__ = main.__doc__
        return command

    return decorate


def _run(name: str, main: Callable[[Any], None], argv: list[str]) -> int:
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
    arguments = parser.parse_args(argv)
    try:
        config = compose(name, arguments.overrides, arguments.config_dir)
        if arguments.cfg:
            print(to_yaml(config), end="")
        else:
            main(config)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return 130
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _keys_help(name: str) -> str:
    """Groups, then every key with its default and what it means (read from the schema's own docstrings)."""
    lines = []
    if name == "train":
        lines.append("groups (group=choice):")
        lines += [f"  {group:<12} {', '.join(names)}" for group, names in _groups(CONF_DIR).items()]
        lines.append("")
    lines.append("keys (default):")
    for key, value, text in _documented(SCHEMAS[name](), name):
        lines.append(f"  {key:<33} {_as_written(value):<16} {text}")
    return "\n".join(lines)


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
        elif key in NODES:
            yield from _documented_node(key, job_name)
        else:
            yield key, value, texts.get(item.name, "")


def _documented_node(root: str, job_name: str) -> Iterator[tuple[str, Any, str]]:
    known = _known_keys(job_name)
    for pattern, (_, text) in NODES.items():
        matching = [key for key in known if fnmatch.fnmatchcase(key, pattern)]
        if pattern.startswith(f"{root}.") and text:
            yield pattern.replace("*", "<term>"), known[matching[0]], text
