"""The schema of a run, its validation, and `build()`: the one module that knows Hydra.

A config is composed from `conf/` by Hydra, checked here, and then travels as plain dataclasses and dicts:
nothing behind this module, and no Ray worker, needs Hydra or OmegaConf.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import importlib
import inspect
import json
import math
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from potstill.errors import UserError

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


@dataclass
class Data:
    source: str = "folder"
    root: str | None = None
    classes: list[str] | None = None
    """Names or wildcards (`Quercus_*`); null takes every class."""
    max_samples: int | None = None
    max_bad_fraction: float = 0.05
    shuffle_window_gb: float = 2.0
    decode: Decode = field(default_factory=Decode)
    split: Split = field(default_factory=Split)


@dataclass
class Cache:
    dir: str = "cache"
    max_gb: float | None = None
    verify: bool = False
    """Read every shard again and compare its checksum before it is used (sizes are always compared)."""


@dataclass
class Augment:
    image_px: int | None = None
    """Side of what the model sees; null is data.decode.image_px."""
    crop_scale: list[float] = field(default_factory=lambda: [1.0, 1.0])
    crop_ratio: list[float] = field(default_factory=lambda: [0.75, 1.3333])
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
    temperature: float = 4.0


@dataclass
class Optimizer:
    name: str = "adamw"
    lr: float = 1e-3
    weight_decay: float = 0.05
    momentum: float = 0.9
    """SGD only."""
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])
    """Adam and AdamW only."""
    head_lr: float | None = None
    """Learning rate of the classifier; null is lr."""


@dataclass
class Schedule:
    name: str = "cosine"
    warmup_epochs: float = 0.0
    min_lr: float = 0.0
    factor: float = 0.1
    """plateau: what the learning rate is multiplied by."""
    patience: int = 3
    """plateau: epochs without improvement of loop.monitor before it is."""


@dataclass
class Loop:
    epochs: int = 10
    batch_size: int = 64
    """Samples in one update, over all workers."""
    micro_batch_size: int | None = None
    """Samples in one forward pass of one worker; null is the worker's whole share."""
    accumulate: int = 1
    """The same, said as the number of forward passes in an update."""
    precision: str = "fp32"
    clip_norm: float | None = None
    patience: int | None = None
    """Epochs without improvement of `monitor` before the run stops; null is off."""
    monitor: str = "val_top1_acc"
    seed: int = 0
    checkpoint_every_steps: int = 500
    """A checkpoint is also taken at the end of every epoch."""
    log_every_steps: int = 10


@dataclass
class Scaling:
    num_workers: int = 0
    """0: train in this process (Ray Train's local mode, which starts at once); n: on n Ray workers."""
    use_gpu: bool | None = None
    """null: where there is one for every worker."""
    cpus_per_worker: int | None = None
    """null: the machine's cores, divided among the workers."""
    sync_batchnorm: bool = False
    max_failures: int = 3
    """How often a lost worker is replaced before the run gives up."""


@dataclass
class Run:
    name: str | None = None
    """null: <experiment>-<hash of the config>."""
    again: bool = False
    tags: list[str] = field(default_factory=list)


@dataclass
class Runs:
    dir: str = "runs"


@dataclass
class Tracking:
    name: str = "aim"
    repo: str | None = None
    """Folder that holds `.aim`; null is runs.dir."""


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
    experiment: str | None = None


@dataclass
class PrepareConfig:
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)


@dataclass
class EvaluateConfig:
    """`data.root: null` evaluates on the run's own data; a key of `data` left at null is the run's own."""

    from_run: str | None = None
    data: Data = field(default_factory=Data)
    cache: Cache = field(default_factory=Cache)
    subset: str = "val"
    checkpoint: str = "best"
    batch_size: int = 256
    precision: str = "fp32"
    use_gpu: bool | None = None
    output: str | None = None
    """Folder of evaluation.json; null is <run>/evaluations/<data key>-<subset>."""


@dataclass
class ReportConfig:
    from_run: str | None = None
    tracking: Tracking = field(default_factory=lambda: Tracking(name="none"))


@dataclass
class QuickstartConfig:
    data_dir: str = "data/digits"
    cache: Cache = field(default_factory=Cache)
    runs: Runs = field(default_factory=Runs)
    tracking: Tracking = field(default_factory=Tracking)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])
    debug: bool = False


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
    search = [f"hydra.searchpath=[file://{_config_dir(config_dir)}]"] if config_dir else []
    try:
        with initialize_config_dir(config_dir=str(CONF_DIR), version_base="1.3"):
            composed = hydra_compose(
                name, [*map(_may_add, overrides), *search], return_hydra_config=True
            )
        choices = composed.hydra.runtime.choices
        with open_dict(composed):
            del composed["hydra"]
        assert isinstance(composed, DictConfig)
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError(_explain(name, overrides, error)) from None
    assert isinstance(config, schema)
    if isinstance(config, Config):
        config.experiment = choices.get("experiment") or config.experiment
        config = apply_debug(config) if config.debug else config
    validate(config)
    return config


# Open dicts of the config, whose keys are not ours to list.
OPEN = ("model.kwargs", "task.terms")


def _may_add(override: str) -> str:
    """Let `model.kwargs.channels=…` add a key without Hydra's `+`."""
    return f"++{override}" if override.startswith(OPEN) else override


def _config_dir(folder: str) -> Path:
    path = Path(folder).expanduser().resolve()
    if not path.is_dir():
        raise UserError(
            f"--config-dir must be a folder that holds config groups, got {folder}, which is none"
        )
    return path


def _explain(name: str, overrides: Sequence[str], error: Exception) -> str:
    """Say which key is meant and what is close to it, instead of Hydra's internals."""
    # Hydra's own words are of little use, those of OmegaConf beneath it name the type
    cause = error.__cause__ or error
    text = " ".join(str(cause).split("full_key:")[0].split())
    keys = _known_keys(name)
    groups = {
        p.name: sorted(f.stem for f in p.glob("*.yaml")) for p in CONF_DIR.iterdir() if p.is_dir()
    }
    for override in overrides:
        key, _, value = override.partition("=")
        key = key.lstrip("+~")
        if not _ or not key:
            return f"an argument must be key=value, got {override!r}; --help lists the keys"
        if key in groups and value.strip("\"'") not in groups[key]:
            if value in ("", "null"):
                continue
            return f"{key} must be one of {', '.join(groups[key]) or 'none yet'}, got {value!r} (files of conf/{key}/)"
        known = key in keys or key in groups or any(k.startswith(key + ".") for k in keys)
        free = key.startswith(OPEN)
        if not known and not free:
            near = difflib.get_close_matches(key, [*keys, *groups], n=2, cutoff=0.6)
            remedy = f"did you mean {' or '.join(near)}?" if near else "--help lists the keys"
            return f"{key} is not a key of this job (got {override!r}); {remedy}"
    key = str(getattr(cause, "full_key", "") or "the config")
    shown = next((o for o in overrides if o.partition("=")[0].lstrip("+~") == key), key)
    return f"{shown} was refused: {text}; --help lists the keys and their defaults"


def _known_keys(name: str) -> dict[str, Any]:
    """Every dotted key of a job's config and its default, those of plug-in nodes among them."""
    import yaml

    keys = dict(flatten(to_dict(SCHEMAS[name]())))
    if name == "train":
        for group in ("model", "task"):
            for path in (CONF_DIR / group).glob("*.yaml"):
                text = path.read_text().replace("${teacher.temperature}", "0")
                keys.update(flatten(yaml.safe_load(text), f"{group}."))
    return keys


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
def _number(
    low: float, high: float = math.inf, open_low: bool = False
) -> tuple[Callable[[Any], bool], str]:
    below = "> " if open_low else ">= "
    rule = f"must be {below}{low:g}" + (f" and <= {high:g}" if high < math.inf else "")
    return lambda v: (v > low if open_low else v >= low) and v <= high, rule


def _one_of(*names: str) -> tuple[Callable[[Any], bool], str]:
    return lambda v: v in names, f"must be one of {', '.join(names)}"


def _pair(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    return (
        lambda v: len(v) == 2 and low < v[0] <= v[1] <= high,
        f"must be two numbers, the smaller first, above {low:g} and up to {high:g}",
    )


MONITORS = ("val_top1_acc", "val_top5_acc", "val_macro_f1", "val_loss", "train_loss")

RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "data.source": _one_of("folder"),
    "data.max_samples": _number(2),
    "data.max_bad_fraction": _number(0, 1),
    "data.shuffle_window_gb": _number(0, open_low=True),
    "data.decode.image_px": _number(8, 4096),
    "data.decode.fit": _one_of("shorter_side", "squash", "pad", "native"),
    "data.decode.max_megapixels": _number(0, open_low=True),
    "data.split.val": _number(0, 1, open_low=True),
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

HINTS = {
    "loop.patience": "null switches early stopping off",
    "loop.clip_norm": "null switches clipping off",
    "data.max_samples": "null takes every sample",
    "cache.max_gb": "null sets no limit",
}


def validate(config: Any) -> None:
    """Refuse what cannot work, before anything expensive starts.

    Raises UserError with the key, the rule, the value and, where it is not plain, the remedy.
    """
    for key, value in flatten(to_dict(config)):
        if key in RULES and value is not None:
            test, rule = RULES[key]
            if not test(value):
                hint = f"; {HINTS[key]}" if key in HINTS else ""
                raise UserError(f"{key} {rule}, got {value!r}{hint}")
    if not isinstance(config, Config):
        return
    loop = config.loop
    if loop.micro_batch_size and loop.accumulate > 1:
        raise UserError(
            "loop.micro_batch_size and loop.accumulate say the same thing: set one of them, got "
            f"{loop.micro_batch_size} and {loop.accumulate}"
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
    if not config.task.get("terms"):
        raise UserError(
            "task.terms must name at least one loss term, got none; use task=classify or task=distil"
        )
    for name, term in config.task["terms"].items():
        weight = term.get("weight", 1.0)
        if not isinstance(weight, int | float) or not weight >= 0:
            raise UserError(f"task.terms.{name}.weight must be a number >= 0, got {weight!r}")
        if (
            any(str(i).startswith("teacher.") for i in term.get("inputs", []))
            and not config.teacher.run
        ):
            raise UserError(
                f"teacher.run must name the folder of a trained run, because task.terms.{name} learns from a "
                "teacher, got null; add teacher.run=runs/<name>"
            )
    check_node("model", config.model, CONSUMED_ELSEWHERE["model"])


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

    A UserError is printed as one message (exit status 2); Ctrl-C exits with 130. Anything else is a
    mistake of ours and keeps its traceback.
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
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def _keys_help(name: str) -> str:
    """Groups, then every key with its default and what it means (read from the schema's own docstrings)."""
    lines = []
    if name == "train":
        lines.append("groups (group=choice):")
        for folder in sorted(p for p in CONF_DIR.iterdir() if p.is_dir()):
            names = ", ".join(sorted(f.stem for f in folder.glob("*.yaml")))
            lines.append(f"  {folder.name:<12} {names}")
        lines.append("")
    lines.append("keys (default):")
    lines += [
        f"  {key:<32} {value!s:<16} {text}".rstrip()
        for key, value, text in _documented(SCHEMAS[name])
    ]
    return "\n".join(lines)


def _documented(schema: type, prefix: str = "") -> Iterator[tuple[str, Any, str]]:
    import ast

    hints = typing.get_type_hints(schema)
    tree = ast.parse(inspect.getsource(schema)).body[0]
    assert isinstance(tree, ast.ClassDef)
    texts: dict[str, str] = {}
    previous = ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            previous = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and previous:
            texts[previous] = " ".join(str(node.value.value).split())
    defaults = schema()
    for item in dataclasses.fields(schema):
        if is_dataclass(hint := hints[item.name]):
            yield from _documented(typing.cast(type, hint), f"{prefix}{item.name}.")
        else:
            value = getattr(defaults, item.name)
            yield (
                f"{prefix}{item.name}",
                "null" if value is None else value,
                texts.get(item.name, ""),
            )
