"""A teacher's outputs for repeatable crops of the training images, kept on disk in checked shards.

B images of a batch, K classes, k of them kept, V views of an image.

<soft_labels.dir>/<key>/
    shard-*.arrow     a row an image, in the order of the cache: id, and each output of its V views in 16 bits
    shard-*.json      what the shard is: size, SHA-256, the images it was planned for
    manifest.json     what the outputs are of, and the shards; written last, it is the commit

The key stands for all that the numbers depend on. A Ray Data actor (on a GPU) or task (on cores) writes its own
shards and returns only their description. A training that reads them runs no teacher: what it sees of an image is a
function of (seed, view, id), so the outputs of a view are those that the teacher would give now.
"""

from __future__ import annotations

import copy
import dataclasses
import errno
import fcntl
import hashlib
import json
import math
import os
import pickle
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from potstill import console, runs
from potstill.config import (
    NAMED_WEIGHTS,
    Config,
    augment_seed,
    from_dict,
    load_run_config,
    resolved,
    stage_configs,
    teacher_inputs,
    teacher_specs,
    to_dict,
)
from potstill.data.cache import Cache, open_cache, shard_fault, write_batch
from potstill.data.prepare import check, prepared
from potstill.data.store import SPACE_MARGIN
from potstill.errors import UserError
from potstill.models.published import weights_file
from potstill.registry import load_plugins
from potstill.replica import with_local_runs
from potstill.runs import atomic_write, file_sha256, read_json, write_json
from potstill.storage import is_uri, local_folder

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from potstill.handover import Mark

FORMAT = 1
SHARD_BYTES = 32 * 1024**2
MOST_SHARD_ROWS = 4096  # a shard is what an interruption costs an actor
SMALL_SHARD_ROWS = 256
PARALLEL_SHARDS = 32
LARGEST = 65504.0  # of 16 bits

# What an image is to its teacher does not depend on these, or they stand in the key by themselves.
_NOT_SEEN = frozenset(
    (
        *("image_px", "views", "seed", "eval_crop", "tta", "start_px", "grow_until"),
        *("mixup", "cutmix", "mix_prob", "mix_switch_prob", "mix_off_epochs"),
    )
)
_OFF: dict[str, Any] = {
    **dict.fromkeys(("flip", "vflip", "rotate", "color", "erasing"), 0.0),
    **{"crop_scale": [1.0, 1.0], "policy": None},
}
# Losses that see more of logits than their softmax, which is all that the top K keep.
_NOT_OF_TOP_K = frozenset(
    (
        *("feature_mse", "feature_cosine", "embedding_mse", "embedding_cosine"),
        *("rkd_distance", "rkd_angle"),
    )
)


class Keyed(Protocol):
    """A set of images by its key: a Cache, or the Plan of one that is not there yet."""

    @property
    def key(self) -> str: ...


# ------------------------------------------------------------------------------------------ the recipe
def refuse_recipe(config: Config) -> None:
    """Raise UserError where outputs that are kept cannot be those of what a student sees. Imports no torch."""
    augment = config.augment
    online = "or use the online teacher (teacher.soft_labels=null)"
    for key in ("mixup", "cutmix"):
        if value := getattr(augment, key):
            raise UserError(
                f"augment.{key} must be 0 with soft labels, got {value:g}: a teacher must see the mixed image itself; set "
                f"augment.{key}=0, {online}"
            )
    if augment.start_px is not None:
        raise UserError(
            f"augment.start_px must be null with soft labels, got {augment.start_px}: they are of one size, and images "
            f"would have others in the first epochs; set augment.start_px=null, {online}"
        )
    for i, stage in enumerate(stage_configs(config)):
        other = stage.augment
        if other.mixup or other.cutmix or other.start_px or _seen(stage) != _seen(config):
            raise UserError(
                f"stages.{i}.augment must leave the augmentation as it is with soft labels, got "
                f"{config.stages[i]['augment']}: they are of one augmentation; remove it, {online}"
            )
    if augment.views is None and (on := _random_keys(config)):
        raise UserError(
            f"augment.views must be a number with soft labels, got null: {', '.join(on)} would give an image another look "
            f"in every epoch, which cannot all be kept; set augment.views=4, say, {online}"
        )
    kind, top_k = config.task.get("kind", "single_label"), config.soft_labels.top_k
    if top_k is None or config.teacher.soft_labels:  # a folder says itself what it keeps
        return
    if kind != "single_label":
        raise UserError(
            f"soft_labels.top_k must be null for task.kind={kind}, got {top_k}: its classes share no probability that could "
            "be spread; set soft_labels.top_k=null"
        )
    _refuse_losses(config, {c: top_k for c in outputs_named(config) if c.endswith(".logits")})


def _refuse_losses(config: Config, kept: Mapping[str, int | None]) -> None:
    """Losses that would take log-probabilities for logits. `kept`: of each column the top K, null where all are."""
    terms = [t for stage in stage_configs(config) for t in stage.task["terms"].items()]
    for key, term in terms:
        for column in term["inputs"]:
            if (k := kept.get(column)) and term["loss"] in _NOT_OF_TOP_K:
                raise UserError(
                    f"task.terms.{key}.loss must be one that sees probabilities (kl, dkd, dist, hard_labels) where only the "
                    f"top {k} of {column} are kept, got {term['loss']}; write all of them with soft_labels.top_k=null"
                )


def _random_keys(config: Config) -> list[str]:
    """Keys that make an image another one in another view."""
    return [f"augment.{key}" for key, off in _OFF.items() if getattr(config.augment, key) != off]


def _seen(config: Config) -> dict[str, Any]:
    """The keys of `augment` that make what a teacher sees; of what is off no details."""
    values = {k: v for k, v in dataclasses.asdict(config.augment).items() if k not in _NOT_SEEN}
    if values["crop_scale"] == [1.0, 1.0] and not values["rotate"]:
        del values["crop_ratio"]
    if not values["erasing"]:
        del values["erasing_scale"], values["erasing_mode"]
    return values


def outputs_named(config: Config) -> list[str]:
    """The teachers' columns that a term of `task` or of a stage takes: `teacher.logits`, ...; sorted."""
    found = teacher_inputs(config)
    return sorted(f"{name}.{output}" for name, outputs in found.items() for output in outputs)


def _teachers_of(config: Config) -> dict[str, dict[str, Any]]:
    """By name what a teacher's outputs depend on; nothing where the config names no teacher.

    Raises UserError where a run or a file of weights is missing or damaged.
    """
    found = {}
    for name, node in teacher_specs(config).items():
        key = "teacher" if name == "teacher" else f"teachers.{name}"
        about: dict[str, Any] = {"classes": node["classes"]}
        if name != "teacher":
            about["weight"] = node["weight"]
        if node["run"]:
            run_dir = runs.open_run(node["run"], f"{key}.run")
            about["sha256"] = runs.best_checkpoint(run_dir).meta["sha256"]["model.safetensors"]
            model = load_run_config(run_dir).model
            # where its first weights came from is over
            about["model"] = {
                k: v for k, v in model.items() if k not in ("pretrained", "init_from", "freeze")
            }
            about["knows"] = read_json(run_dir / "run.json")["classes"]
        else:
            target = node["model"].get("_target_", "")
            file = weights_file(node["weights"], node["weights_dir"], target, f"{key}.weights")
            about["sha256"] = file_sha256(file)
            about["model"] = node["model"]
        found[name] = about
    return found


def _about(
    config: Config,
    data_key: str,
    classes: Sequence[str],
    teachers: dict[str, dict[str, Any]],
    outputs: list[str],
) -> dict[str, Any]:
    """All that the numbers depend on: what the key is a hash of."""
    random = bool(_random_keys(config))
    about = {
        "format": FORMAT,
        "teachers": teachers,
        "data": data_key,
        "classes": list(classes),
        "kind": config.task.get("kind", "single_label"),
        "image_px": config.augment.image_px or config.data.decode.image_px,
        "augment": _seen(config),
        "random": random,
        "views": (config.augment.views or 1) if random else 1,
        "seed": augment_seed(config) if random else None,
        "precision": config.loop.precision,
        "outputs": outputs,
        "top_k": config.soft_labels.top_k,
    }
    return json.loads(json.dumps(about))


def _key(about: dict[str, Any]) -> str:
    return hashlib.blake2b(json.dumps(about, sort_keys=True).encode(), digest_size=8).hexdigest()


def key_of(config: Config, images: Keyed, classes: Sequence[str]) -> str:
    """The name of the folder that `soft_labels` writes for this config, whose set has these classes."""
    teachers, outputs = _teachers_of(config), outputs_named(config)
    return _key(_about(config, images.key, classes, teachers, outputs))


# ----------------------------------------------------------------------------------------- the writing
def soft_labels(config: Config) -> Path:
    """Write the outputs of the config's teacher for `augment.views` crops of every training image, by Ray Data.

    Which outputs: those that the terms of the task and its stages name (`teacher.logits`, ...), computed at
    loop.precision. What is there already and whole is not written again; a finished folder is returned at once.
    Returns the folder, which is what teacher.soft_labels takes.

    Raises UserError for a recipe that soft labels cannot serve (see `refuse_recipe`), a teacher that is missing,
    damaged or of other classes, too little space, and outputs that 16 bits do not hold.
    """
    config = copy.deepcopy(config)
    config.teacher.soft_labels = None
    _resolve_paths(config)
    config = with_local_runs(config)
    refuse_recipe(config)
    if not (teachers := _teachers_of(config)):
        raise UserError(
            "teacher.run must name the teacher whose outputs are to be kept, got null (and no teacher.weights, no "
            "teachers); add teacher.run=runs/<teacher>"
        )
    if not (outputs := outputs_named(config)):
        raise UserError(
            "task.terms must name an output of the teacher, such as teacher.logits, got none: there is nothing to keep; "
            "use task=distil"
        )
    plan = check(config.data, config.cache)
    about = _about(config, plan.key, plan.rows.classes, teachers, outputs)
    if is_uri(config.soft_labels.dir):
        raise UserError(
            f"soft_labels.dir must be a folder, got {config.soft_labels.dir!r}; nodes that do not see it are sent what they need"
        )
    folder = local_folder(config.soft_labels.dir, "soft_labels.dir") / _key(about)
    with _lock(folder):
        if _is_finished(folder, config.cache.verify):
            console.say(f"Soft labels are there already: {folder}")
            return folder
        columns = _probe(config, plan.rows.classes, about)
        with prepared(config.data, config.cache, "soft labels", prefer=plan.key) as found:
            if found.cache_dir.name != plan.key:
                raise UserError(
                    f"data.root: {plan.rows.root} changed while it was prepared; start again"
                )
            cache = open_cache(found.cache_dir, config.cache.verify)
            _write(config, cache, about, columns, folder)
    return folder


def _resolve_paths(config: Config) -> None:
    """A worker may stand in another folder."""
    config.cache.local_dir = resolved(config.cache.local_dir)
    teacher = config.teacher
    teacher.run, teacher.weights_dir = resolved(teacher.run), resolved(teacher.weights_dir) or ""
    for node in config.teachers.values():
        node["run"] = resolved(node.get("run"))
        node["weights_dir"] = resolved(node.get("weights_dir", "weights"))
    for node in (vars(teacher), *config.teachers.values()):
        if node.get("weights") and node["weights"] not in NAMED_WEIGHTS:
            node["weights"] = resolved(node["weights"])


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    """Wait until no other process writes this folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise UserError(
            f"soft_labels.dir must be a folder that can be written, got {str(folder.parent)!r} ({error.strerror}); set "
            "soft_labels.dir to another one"
        ) from None
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            console.say(f"Waiting for the process that writes {folder} (Ctrl-C stops)")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


def _is_finished(folder: Path, verify: bool) -> bool:
    if not (folder / "manifest.json").exists():
        return False
    try:
        SoftLabels.open(folder, verify)
    except UserError:
        return False
    return True


def _probe(config: Config, classes: Sequence[str], about: dict[str, Any]) -> dict[str, Any]:
    """What each output is, from one black image: its shape, how many classes of it are kept (`top_k`, null: all), and
    of a map of patches which pixels they see (`patch`: size and stride, null where the model does not say)."""
    import torch

    from potstill.assemble import build_teachers
    from potstill.task import Teacher

    px = about["image_px"]
    teachers = build_teachers(config, classes, torch.device("cpu"))
    found = _ask(teachers, torch.zeros(1, 3, px, px))
    columns, patches = {}, {}
    for one in (module for teacher in teachers for module in teacher.modules()):
        if isinstance(one, Teacher) and (patch := getattr(one.model, "patch", None)):
            patches[f"{one.name}.patch_logits"] = list(patch)
    for name in about["outputs"]:
        if name not in found:
            there = sorted(c for c in found if "." in c)
            raise UserError(
                f"task.terms: an input is {name!r}, but the teacher has no such output; it has {', '.join(there)}"
            )
        shape = list(found[name].shape[1:])
        k = about["top_k"] if name.endswith(".logits") else None
        columns[name] = {
            "shape": shape,
            "top_k": k if k and k < shape[0] else None,
            "patch": patches.get(name),
        }
    return columns


def _ask(teachers: Sequence[Any], image: Tensor) -> dict[str, Tensor]:
    """All columns that the teachers make of images float [B, 3, h, w]."""
    import torch

    batch = {"image": image}
    with torch.inference_mode():
        for teacher in teachers:
            batch = teacher(batch)
    return batch


def _fields(columns: Mapping[str, Any]) -> Iterator[tuple[str, np.dtype, list[int]]]:
    """(name, type, shape of one view) of what a shard holds for each image, besides its id."""
    for name, about in columns.items():
        if k := about["top_k"]:
            narrow = about["shape"][0] <= 1 << 16
            yield f"{name}:class", np.dtype(np.uint16 if narrow else np.int32), [k]
            yield name, np.dtype(np.float16), [k + 1]
        else:
            yield name, np.dtype(np.float16), about["shape"]


def _write(
    config: Config, cache: Cache, about: dict[str, Any], columns: dict[str, Any], folder: Path
) -> None:
    ids, views, specs = cache.split("train").ids, about["views"], teacher_specs(config)
    row_bytes = 8 + views * sum(t.itemsize * math.prod(shape) for _, t, shape in _fields(columns))
    plan = _plan_shards(len(ids), row_bytes)
    for leftover in folder.glob(".*.tmp"):
        leftover.unlink(missing_ok=True)
    (folder / "manifest.json").unlink(missing_ok=True)
    done = {name: d for name, *rows in plan if (d := _kept(folder, name, ids[slice(*rows)]))}
    todo = [shard for shard in plan if shard[0] not in done]
    _say_size(columns, len(ids), views, row_bytes, folder, (len(done), len(plan)))
    rows_left = sum(end - first for _, first, end in todo)
    _refuse_space(folder, rows_left * row_bytes)
    if todo:
        job = {
            "config": to_dict(config),
            "cache_dir": str(cache.folder),
            "folder": str(folder),
            "views": views,
            "columns": columns,
        }
        with console.progress("Writing soft labels", rows_left * views) as update:
            written = 0
            for description in _run(config, job, todo):
                done[description["name"]] = description
                written += description["rows"] * views
                update(written)
    manifest = {
        "key": folder.name,
        "about": about,
        "columns": columns,
        "images": len(ids),
        "views": views,
        # for people: the key goes by their weights
        "sources": {n: node["run"] or node["weights"] for n, node in specs.items()},
        "created": time.time(),
        "shards": [{k: done[n][k] for k in ("file", "rows", "bytes", "sha256")} for n, *_ in plan],
    }
    write_json(folder / "manifest.json", manifest)


def _plan_shards(images: int, row_bytes: int) -> list[tuple[str, int, int]]:
    """(name, first row, end) of each: a function of the numbers alone, so that an interrupted build goes on."""
    rows = min(max(images // PARALLEL_SHARDS, SMALL_SHARD_ROWS), MOST_SHARD_ROWS)
    rows = max(1, min(rows, SHARD_BYTES // row_bytes))
    starts = range(0, images, rows)
    return [(f"shard-{i:05d}", first, min(first + rows, images)) for i, first in enumerate(starts)]


def _kept(folder: Path, name: str, ids: np.ndarray) -> dict[str, Any] | None:
    """The description of a shard that an earlier build has finished, if it is whole."""
    try:
        found = read_json(folder / f"{name}.json")
        if found["format"] != FORMAT or found["ids"] != _digest(ids):
            return None
        return None if shard_fault(folder, found, verify=True) else found
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _digest(ids: np.ndarray) -> str:
    return hashlib.blake2b(ids.tobytes(), digest_size=8).hexdigest()


def _say_size(
    columns: Mapping[str, Any],
    images: int,
    views: int,
    row_bytes: int,
    folder: Path,
    there: tuple[int, int],
) -> None:
    said = []
    for name, about in columns.items():
        size = "x".join(map(str, about["shape"]))
        said.append(f"{name} ({size}{f', the top {k}' if (k := about['top_k']) else ''})")
    goes_on = f"; {there[0]} of {there[1]} shards are there" if there[0] else ""
    console.say(
        f"Soft labels: {images:,} images x {views} views x {', '.join(said)} in 16 bits: "
        f"{images * row_bytes / 1e6:,.2f} MB in {folder}{goes_on}"
    )


def _refuse_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed * SPACE_MARGIN > free:
        raise UserError(
            f"soft_labels.dir must have {needed * SPACE_MARGIN / 1e6:,.0f} MB free, got {free / 1e6:,.0f} MB at "
            f"{str(folder.parent)!r}; free some, set soft_labels.dir to another disk, keep fewer classes with "
            "soft_labels.top_k, or take fewer augment.views"
        )


def _run(
    config: Config, job: dict[str, Any], shards: list[tuple[str, int, int]]
) -> Iterator[dict[str, Any]]:
    """Write shards on every GPU, or else on all cores; their descriptions, in the order in which they are done."""
    from potstill.cluster import (
        alive_nodes,
        has_roles,
        quiet_ray_data,
        said_while_waiting,
        selector,
        shown,
        start_ray,
    )
    from potstill.handover import Desk, marked, open_desk, taken

    ours = start_ray()  # before ray is imported: it reads its environment then
    import ray
    import ray.data

    folder, desk = Path(job["folder"]), None
    try:
        nodes = [node["Resources"] for node in alive_nodes()]
        gpus = 0
        if config.scaling.use_gpu is not False:
            gpus = sum(int(node.get("GPU", 0)) for node in nodes)
            if has_roles():  # more may come when they are asked for
                gpus = max(gpus, config.scaling.num_workers, 1)
        if config.scaling.use_gpu and not gpus:
            raise UserError(
                "scaling.use_gpu must be false or null on a machine without a GPU, got true"
            )
        cores = [int(node["CPU"]) for node in nodes if node.get("CPU", 0) >= 1] or [1]
        workers = min(len(shards), gpus or sum(cores))
        cpus = max(1, min(sum(cores) // workers, *cores))
        job = {**job, "use_gpu": gpus > 0, "cpus": cpus, "path": sys.path}
        items = [{"name": name, "first": first, "end": end} for name, first, end in shards]
        desk = open_desk(Desk)
        role, began = "train" if gpus else "data", []
        what = f"the first shard of soft labels{shown(selector(role, config.scaling.labels))}"
        with (
            quiet_ray_data(role, config.scaling.labels),
            marked(folder) as mark,
            said_while_waiting(what, lambda: bool(began)),
        ):
            about = {"job": json.dumps(job), "mark": mark, "desk": desk}
            given: dict[str, Any] = {"fn_kwargs": about, "num_cpus": cpus}
            dataset = ray.data.from_items(items, override_num_blocks=len(items))
            if gpus:
                # a task's process may be given another GPU the next time, an actor keeps its own
                given |= {"num_cpus": None, "num_gpus": 1}
                given["compute"] = ray.data.ActorPoolStrategy(
                    min_size=1, max_size=workers, initial_size=workers
                )
            work: Any = _Actor if gpus else _write_row
            dataset = dataset.map(work, **given)
            for row in dataset.iter_rows():
                began.append(True)
                description = json.loads(row["description"])
                if message := description.get("error"):
                    raise UserError(message)
                taken(folder, pickle.loads(row["files"]))
                yield description
    finally:
        if desk is not None:
            ray.kill(desk)
        if ours:  # training in this process wants the memory and the cores
            ray.shutdown()


class _Actor:
    def __call__(self, row: dict[str, Any], **about: Any) -> dict[str, Any]:
        return _write_row(row, **about)


def _write_row(row: dict[str, Any], job: str, mark: Mark, desk: Any) -> dict[str, Any]:
    """What a Ray Data task does. A mistake of the user's comes back as a message: Ray would wrap it in a traceback."""
    from potstill.handover import made

    files: dict[str, bytes] = {}
    try:
        writer = _writer(job)
        writer.bring_from = None if mark.seen() else desk
        part = row["name"], int(row["first"]), int(row["end"])
        description, files = made(mark, lambda folder: writer.write(folder, *part))
    except UserError as error:
        description = {"error": str(error)}
    return {"description": json.dumps(description), "files": pickle.dumps(files)}


@lru_cache(maxsize=1)
def _writer(job: str) -> _Writer:
    """One for all shards that a process writes."""
    return _Writer(job)


class _Writer:
    """It holds the teacher and the images."""

    def __init__(self, job: str) -> None:
        self.job = json.loads(job)
        self.bring_from: Any = None
        """The desk of the driver's node, where its folders are not seen from here."""
        # a plug-in is imported by its name
        sys.path.extend(p for p in self.job["path"] if p not in sys.path)

    @cached_property
    def _held(self) -> tuple[Config, Cache, torch.device, list[Any]]:
        import torch

        from potstill.assemble import build_teachers, prepare_process

        prepare_process(self.job["cpus"])
        config = from_dict(Config, self.job["config"])
        load_plugins(config.plugins)
        on_gpu = self.job["use_gpu"] and not config.scaling.rehearse
        device = torch.device("cuda" if on_gpu else "cpu")
        cache_dir = Path(self.job["cache_dir"])
        if self.bring_from is not None:
            from potstill.handover import brought

            cache_dir = brought(config, cache_dir, self.bring_from)
        cache = open_cache(
            cache_dir,
            local_dir=config.cache.local_dir,
            max_gb=config.cache.max_gb,
        )
        return config, cache, device, build_teachers(config, cache.classes, device)

    def write(self, folder: Path, name: str, first: int, end: int) -> dict[str, Any]:
        """Compute rows `first` to `end` and write them, with a sidecar. Returns the sidecar's content."""
        import torch

        from potstill.data.augment import Augment
        from potstill.loop import autocast_of

        config, cache, device, teachers = self._held
        reader, views, columns = cache.split("train"), self.job["views"], self.job["columns"]
        augment = Augment(config.augment, config.data.decode.image_px, augment_seed(config))
        autocast = autocast_of(config.loop.precision, device)
        values = {
            field: np.empty((end - first, views, *shape), kind)
            for field, kind, shape in _fields(columns)
        }
        for start in range(first, end, config.soft_labels.batch_size):
            rows = np.arange(start, min(start + config.soft_labels.batch_size, end))
            stored = torch.from_numpy(reader.read(rows)).permute(0, 3, 1, 2).to(device)
            ids = torch.from_numpy(reader.ids[rows])
            for view in range(views):
                seen = augment.train(stored, ids, torch.full_like(ids, view))
                with autocast():
                    found = _ask(teachers, seen)
                for column, about in columns.items():
                    for field, packed in _packed(column, found[column], about["top_k"]).items():
                        values[field][rows - first, view] = packed.cpu().numpy()
        ids = reader.ids[first:end]
        description = {
            "format": FORMAT,
            "name": name,
            "ids": _digest(ids),
            **_write_shard(folder, f"{name}.arrow", ids, values),
        }
        atomic_write(folder / f"{name}.json", json.dumps(description))
        return description


def _packed(column: str, values: Tensor, top_k: int | None) -> dict[str, Tensor]:
    """An output [B, ...] in 16 bits or, of logits, the `top_k` largest log-probabilities, their classes, and the
    log of what the others have together. Raises UserError where 16 bits do not hold it."""
    import torch

    values = values.float()
    if top_k is None:
        halves = values.half()
        if not halves.isfinite().all():
            largest = values.abs().max().item()
            raise UserError(
                f"{column} must be within ±{LARGEST:g} to be kept in 16 bits, got {largest:g} as its largest; use the online "
                "teacher (teacher.soft_labels=null)"
            )
        return {column: halves}
    if values.isnan().any():
        raise UserError(
            f"{column} must be numbers, got NaN; evaluate the teacher (jobs/evaluate.py)"
        )
    ordered, classes = values.log_softmax(dim=1).sort(dim=1, descending=True)
    rest = ordered[:, top_k:].logsumexp(dim=1, keepdim=True)
    kept = torch.cat((ordered[:, :top_k], rest), dim=1).clamp(min=-LARGEST)
    return {f"{column}:class": classes[:, :top_k], column: kept.half()}


def _write_shard(
    folder: Path, name: str, ids: np.ndarray, values: Mapping[str, np.ndarray]
) -> dict[str, Any]:
    """Write a shard beside its name, sync it, rename it: one record batch, a row an image.

    `ids` [n] int64; each of `values` [n, V, ...]. Returns {"file", "rows", "bytes", "sha256"}.
    """
    import pyarrow as pa

    arrays: list[Any] = [pa.array(ids, pa.int64())]
    for array in values.values():
        width = array.itemsize * math.prod(array.shape[1:])
        buffers = [None, pa.py_buffer(array)]
        arrays.append(pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(ids), buffers))
    batch = pa.record_batch(arrays, names=["id", *values])
    try:
        return write_batch(folder, name, batch)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"soft_labels.dir must have room, but writing to {str(folder)!r} failed: {error.strerror}; free some space, "
                "and the same command goes on with the shards it has"
            ) from None
        raise


# ----------------------------------------------------------------------------------------- the reading
class SoftLabels:
    """A finished folder of soft labels, memory-mapped. It travels to another process as its folder.

    Logits of which only the top K were kept (Shen and Xing 2021, arXiv:2112.01528) come back as log-probabilities:
    the K largest, and for every other class an even share of what is left. So a softmax at any temperature sees one
    distribution that sums to 1; lost are the order among the other classes, the more of it the higher the
    temperature, and the logits' own level, which no softmax sees.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder, self.manifest = folder, manifest
        self.about: dict[str, Any] = manifest["about"]
        self.views: int = manifest["views"]
        self.names: list[str] = list(manifest["columns"])
        self._ends = np.cumsum([s["rows"] for s in manifest["shards"]], dtype=np.int64)
        self._mapped: list[dict[str, np.ndarray] | None] = [None] * len(manifest["shards"])

    @classmethod
    def open(cls, folder: str | Path, verify: bool = False) -> SoftLabels:
        """Open a folder. The sizes of its shards are compared, and their SHA-256 where `verify` is set.

        Raises UserError where it is not finished, of another format, or damaged.
        """
        folder = Path(folder).expanduser().absolute()
        if not folder.is_dir():
            raise _refused(folder, "does not exist")
        try:
            manifest = read_json(folder / "manifest.json")
            about, shards = manifest["about"], manifest["shards"]
            format_ = about["format"]
        except FileNotFoundError:
            raise _refused(folder, "is not finished: it has no manifest.json") from None
        except (OSError, ValueError, KeyError, TypeError):
            raise _refused(folder, "is damaged: its manifest.json cannot be read") from None
        if format_ != FORMAT:
            raise _refused(folder, f"is of format {format_}, and this potstill reads {FORMAT}")
        for shard in shards:
            if fault := shard_fault(folder, shard, verify):
                more = " and cache.verify=true" if verify else ""
                raise _refused(folder, f"is damaged: {shard['file']}: {fault}", more)
        return cls(folder, manifest)

    def __reduce__(self) -> tuple[Any, ...]:
        return SoftLabels.open, (self.folder,)

    @cached_property
    def ids(self) -> np.ndarray:
        """[N] int64: the images, in the order of the rows."""
        parts = [self._shard(i)["id"] for i in range(len(self._mapped))]
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def columns(self, ids: np.ndarray, views: np.ndarray) -> dict[str, Tensor]:
        """The teachers' outputs for views [B] of images [B], both int64: {"teacher.logits": float32 [B, K], ...}.

        Where nothing was random every view is the only one there is. Safe in several threads.
        Raises UserError for an image that is not among them.
        """
        import torch

        rows = self._rows(np.asarray(ids))
        views = np.asarray(views) if self.about["random"] else np.zeros(len(rows), np.int64)
        shard_B = np.searchsorted(self._ends, rows, side="right")
        by_shard = np.argsort(shard_B, kind="stable")
        first = np.flatnonzero(np.diff(shard_B[by_shard], prepend=-1))
        parts = np.split(by_shard, first[1:])
        starts = self._ends - [s["rows"] for s in self.manifest["shards"]]
        values = {
            name: np.empty((len(rows), *shape), kind)
            for name, kind, shape in _fields(self.manifest["columns"])
        }
        for part in parts if len(rows) else ():
            i = int(shard_B[part[0]])
            shard, within = self._shard(i), rows[part] - starts[i]
            for name, out in values.items():
                out[part] = shard[name][within, views[part]]
        found = {}
        for name, about in self.manifest["columns"].items():
            kept = torch.from_numpy(values[name]).float()
            if about["top_k"]:
                classes = torch.from_numpy(values[f"{name}:class"].astype(np.int64))
                kept = spread_rest(kept, classes, about["shape"][0])
            found[name] = kept
        return found

    def check(self, config: Config, cache: Keyed, classes: Sequence[str]) -> None:
        """Refuse soft labels that are not what this config's teacher would say of what its student sees.

        `cache` is the student's, or the plan of it; a cache's images are looked up one by one. A teacher that the
        config also names must be the one whose outputs these are; without one they stand for themselves. Fewer views
        than were kept are welcome; they may be of another loop.precision.
        Raises UserError with the reason.
        """
        refuse_recipe(config)
        mine, teachers = self.about, _teachers_of(config)
        needed = outputs_named(config)
        asked = _about(config, cache.key, classes, teachers, needed)
        if teachers and asked["teachers"] != mine["teachers"]:
            raise _refused(self.folder, self._other_teacher(asked["teachers"]))
        reasons = {
            "data": "is of other images or another data.decode",
            "classes": "is of other classes, or of another order of them",
            "kind": "is of another task.kind",
            "image_px": "is of another augment.image_px",
        }
        for key, reason in reasons.items():
            if asked[key] != mine[key]:
                shown = f" ({mine[key]}, here {asked[key]})" if key != "classes" else ""
                raise _refused(self.folder, f"{reason}{shown}")
        theirs, ours = mine["augment"], asked["augment"]
        other = [k for k in sorted({*theirs, *ours}) if theirs.get(k) != ours.get(k)]
        if other:
            shown = "; ".join(f"augment.{k}: {theirs.get(k)}, here {ours.get(k)}" for k in other)
            raise _refused(self.folder, f"is of another crop or augmentation ({shown})")
        if asked["seed"] != mine["seed"]:
            raise _refused(
                self.folder,
                f"is of other crops (augment.seed or loop.seed {mine['seed']}, here {asked['seed']})",
            )
        if asked["views"] > self.views:
            raise _refused(
                self.folder, f"has {self.views} views, and augment.views is {asked['views']}"
            )
        if lacking := [name for name in needed if name not in self.names]:
            raise _refused(
                self.folder, f"lacks {', '.join(lacking)} (it has {', '.join(self.names)})"
            )
        _refuse_losses(config, {c: a["top_k"] for c, a in self.manifest["columns"].items()})
        if isinstance(cache, Cache):
            train = cache.split("train").ids
            if not np.array_equal(np.sort(train), self.ids[self._by_id]):
                raise _refused(self.folder, "is not of exactly these training images")

    def _other_teacher(self, asked: Mapping[str, Any]) -> str:
        known = self.manifest["sources"]
        sources = ", ".join(f"{name}: {known.get(name, '?')}" for name in self.about["teachers"])
        return f"holds the outputs of another teacher ({sources}) than {', '.join(asked)} of this config"

    @cached_property
    def _by_id(self) -> np.ndarray:
        return np.argsort(self.ids)

    @cached_property
    def _sorted_ids(self) -> np.ndarray:
        return self.ids[self._by_id]

    def _rows(self, ids_B: np.ndarray) -> np.ndarray:
        place = np.searchsorted(self._sorted_ids, ids_B)
        rows = self._by_id[np.minimum(place, len(self._by_id) - 1)]
        if (missing := self.ids[rows] != ids_B).any():
            raise _refused(self.folder, f"has no outputs for image {ids_B[missing][0]}")
        return rows

    def _shard(self, i: int) -> dict[str, np.ndarray]:
        """The fields of a shard [n, V, ...], mapped when they are first asked for; two threads may do so at once."""
        if (known := self._mapped[i]) is None:
            import pyarrow as pa

            # the mapping lives as long as the batch; the file need not stay open
            with pa.memory_map(str(self.folder / self.manifest["shards"][i]["file"])) as source:
                batch = pa.ipc.open_file(source).get_batch(0)
            n = batch.num_rows
            known = {"id": np.frombuffer(batch.column("id").buffers()[1], np.int64, n)}
            for name, kind, shape in _fields(self.manifest["columns"]):
                count = n * self.views * math.prod(shape)
                flat = np.frombuffer(batch.column(name).buffers()[1], kind, count)
                known[name] = flat.reshape(n, self.views, *shape)
            self._mapped[i] = known
        return known


def spread_rest(logs: Tensor, classes_Bk: Tensor, num_classes: int) -> Tensor:
    """Log-probabilities of all classes, float [B, K]: those of `classes_Bk` as they are, the rest spread evenly.

    `logs` [B, k + 1]: the log-probabilities of the classes, and that of all others together.
    Shen and Xing 2021, arXiv:2112.01528 (they call it smoothing).
    """
    share = logs[:, -1:] - math.log(num_classes - classes_Bk.shape[1])
    return share.repeat(1, num_classes).scatter_(1, classes_Bk, logs[:, :-1])


def _refused(folder: Path, reason: str, with_: str = "") -> UserError:
    return UserError(
        f"teacher.soft_labels: {folder} {reason}; run jobs/soft_labels.py with this config{with_}"
    )
