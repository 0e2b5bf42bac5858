"""Weights from files and runs into a model: read safely, match by name, take over classes by name."""

from __future__ import annotations

import argparse
import json
import pickle
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from potstill import runs
from potstill.errors import UserError
from potstill.models.images import forget_rows

_WRAPPERS = ("state_dict_ema", "state_dict", "model", "model_state_dict")
"""Keys under which training scripts put the weights; averaged ones come first, as in timm."""

_PREFIXES = ("module.", "_orig_mod.", "model.", "net.")
"""What DDP, torch.compile, a task and TimmModel put before a name. No timm model has a name with one."""

_MIN_MATCH = 0.5
_SHOWN = 10


# ------------------------------------------------------------------------------------------ reading
def load_weights(path: str | Path, key: str = "model.init_from") -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a .pth, .pt or .bin file, on the CPU, by timm's own names.

    Wrappers (`state_dict`, `model`, …; averaged weights before plain ones) and prefixes (`module.`, …)
    are taken off. No code of the file is run. `key` names the config key in errors.
    Raises UserError for a missing, damaged or unsafe file, and for one without tensors.
    """
    return _read(Path(path).expanduser(), key)[0]


def _read(path: Path, key: str) -> tuple[dict[str, Tensor], list[str] | None]:
    """Tensors, and the names of the classes where the file has them (under `classes`)."""
    if not path.is_file():
        problem = "is a folder but not a run" if path.is_dir() else "does not exist"
        raise UserError(
            f"{key} must be a run's folder or a .safetensors, .pth, .pt or .bin file, got {path}, which {problem}"
        )
    if path.suffix == ".safetensors":
        content, classes = _read_safetensors(path, key)
    elif path.suffix in (".pth", ".pt", ".bin"):
        content = _read_pickle(path, key)
        classes = content.get("classes") if isinstance(content, Mapping) else None
    else:
        raise UserError(f"{key} must end in .safetensors, .pth, .pt or .bin, got {path}")
    while isinstance(content, Mapping) and (wrapper := _wrapper(content)):
        content = content[wrapper]
    tensors = content.items() if isinstance(content, Mapping) else ()
    state = {_plain_name(k): v for k, v in tensors if isinstance(k, str) and isinstance(v, Tensor)}
    if not state:
        raise UserError(
            f"{key}: {path} holds no tensors by name; save a model's state_dict(), not the model itself"
        )
    named = isinstance(classes, list | tuple) and all(isinstance(c, str) for c in classes)
    return state, list(classes) if named and classes else None


def _wrapper(content: Mapping[Any, Any]) -> str | None:
    return next((w for w in _WRAPPERS if isinstance(content.get(w), Mapping)), None)


def _plain_name(name: str) -> str:
    while prefix := next((p for p in _PREFIXES if name.startswith(p)), None):
        name = name[len(prefix) :]
    return name


def _read_safetensors(path: Path, key: str) -> tuple[dict[str, Tensor], list[str] | None]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            classes = json.loads((file.metadata() or {}).get("classes", "null"))
            return {name: file.get_tensor(name) for name in file.keys()}, classes  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as e:
        raise UserError(
            f"{key}: {path} is not a readable .safetensors file ({e}); fetch it again"
        ) from e


def _read_pickle(path: Path, key: str) -> Any:
    try:
        # timm's own training script keeps its arguments beside the weights; a Namespace runs no code
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as e:
        if "GLOBAL" in str(e):
            raise UserError(
                f"{key} must hold tensors only, got {path}, which wants to run code when it is read "
                f"({_cause(e)}); save its state_dict() alone, best as .safetensors, where you trust it"
            ) from e
        raise UserError(
            f"{key}: {path} is not a readable weights file, or holds more than tensors ({_cause(e)}); fetch it again, "
            "or save its state_dict() alone"
        ) from e
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as e:
        raise UserError(
            f"{key}: {path} is not a readable weights file ({_cause(e)}); fetch it again"
        ) from e


def _cause(e: Exception) -> str:
    """The one line of torch's essay that names what was refused."""
    lines = [line.strip() for line in str(e).splitlines() if line.strip()] or [type(e).__name__]
    return next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), lines[0])[
        :200
    ]


# ---------------------------------------------------------------------------------------- init_from
@dataclass
class InitReport:
    """What `init_from` took over. Tensor names are timm's own."""

    source: str
    kept: list[str]
    """Classes whose row of the classifier was copied, in the model's order."""
    dropped: list[str]
    """Classes of the source that the model does not have."""
    new: list[str]
    """Classes whose row starts from zero."""
    unnamed: int
    """Rows of a classifier that was left out because its file does not name its classes."""
    loaded: list[str]
    missing: list[str]
    """Tensors of the model's backbone that the source lacks: they keep their fresh values."""
    unexpected: list[str]
    """Tensors of the source that the model has no place for."""
    mismatched: list[str]
    """Classifier tensors of another width."""

    def lines(self) -> list[str]:
        """For the console: one line of counts, then at most ten names of each kind."""
        dropped = f"{self.unnamed} (the file names none)" if self.unnamed else len(self.dropped)
        lines = [
            f"init_from {self.source}: {len(self.loaded)} tensors",
            f"classes: kept {len(self.kept)}, dropped {dropped}, new {len(self.new)}",
        ]
        kinds = ("kept", "dropped", "new", "missing", "unexpected", "mismatched")
        return lines + [f"  {k}: {_some(names)}" for k in kinds if (names := getattr(self, k))]

    def __str__(self) -> str:
        return "\n".join(self.lines())


def init_from(model: Any, source: str | Path, classes: Sequence[str]) -> InitReport:
    """Start `model` from a run (its best checkpoint) or a weights file. `classes` [K] are those of its logits.

    `model` is any nn.Module; one with `head_parameter_names()` (as TimmModel has) says what its classifier is.

    The backbone is taken over as a whole. Of the classifier, rows of classes with the same name are
    copied and the others start from zero (see `forget_rows`). A run names its classes, a file does in `classes` (safetensors:
    metadata, JSON); a classifier whose classes have no names is left out, whatever its shape, unless the model knows
    what those of such a file are (`file_classes`, as PatchModel does).

    Raises UserError where less than half of the backbone is in the source (another architecture), or
    a tensor of it has another shape. The model is then as it was.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        run_dir = runs.open_run(path, "model.init_from")
        state = _by_plain_name(runs.best_checkpoint(run_dir).model_state())
        about = runs.read_json(run_dir / "run.json")
        known: list[str] | None = about.get("outputs") or about["classes"]
    else:
        state, known = _read(path, "model.init_from")

    target = _by_plain_name(model.state_dict())
    head = {_plain_name(name) for name in head_of(model)}
    described = getattr(model, "name", type(model).__name__)
    backbone = target.keys() - head
    misshapen = {n for n in backbone & state.keys() if state[n].shape != target[n].shape}
    matched = (backbone & state.keys()) - misshapen
    missing, unexpected = backbone - state.keys(), state.keys() - target.keys()
    if len(matched) < _MIN_MATCH * len(backbone):
        raise UserError(
            f"model.init_from must hold the weights of model.name={described}, got {source}, in which "
            f"{len(matched)} of {len(backbone)} backbone tensors fit (missing: {_some(missing)}; unexpected: "
            f"{_some(unexpected)}; other shape: {_some(misshapen)}); set model.name to what the file was trained as"
        )
    if misshapen:
        raise UserError(
            f"model.init_from must fit model.name={described} (with its kwargs, at this image size), got {source}, "
            f"where shapes differ: {_some(_shapes(n, state[n], target[n]) for n in sorted(misshapen))}; "
            "use the kwargs and the image size that it was trained with"
        )

    taken, mismatched, rows, kept = set(matched), set[str](), [], list[str]()
    found = sorted(head & state.keys())
    of_model: Sequence[str] = getattr(model, "file_classes", ())
    if known is None and found and len(state[found[0]]) == len(of_model):
        known = list(of_model)
    if known is not None and found:
        if any(len(state[n]) != len(known) for n in found):
            raise UserError(
                f"model.init_from: {source} names {len(known)} classes, but its classifier has {len(state[found[0]])} rows"
            )
        mismatched = {n for n in found if state[n].shape[1:] != target[n].shape[1:]}
        place = {name: row for row, name in enumerate(known)}
        if not mismatched:
            kept = [c for c in classes if c in place]
            rows = [(row, place[c]) for row, c in enumerate(classes) if c in place]
            taken |= set(found) if kept else set()
    with torch.no_grad():
        for name in matched:
            target[name].copy_(state[name])
        if rows:
            to_rows, from_rows = (torch.tensor(r) for r in zip(*rows, strict=True))
            for name in found:
                target[name][to_rows] = state[name][from_rows].to(target[name])
        forget_rows(
            model, head_of(model), [row for row, c in enumerate(classes) if c not in set(kept)]
        )
    return InitReport(
        source=str(source),
        kept=kept,
        dropped=[c for c in known or () if c not in set(kept)],
        new=[c for c in classes if c not in set(kept)],
        unnamed=len(state[found[0]]) if known is None and found else 0,
        loaded=sorted(taken),
        missing=sorted(missing),
        unexpected=sorted(unexpected),
        mismatched=sorted(mismatched),
    )


def head_of(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters; none where a model does not tell."""
    tell = getattr(model, "head_parameter_names", None)
    return tell() if tell else []


def _by_plain_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {_plain_name(name): tensor for name, tensor in state.items()}


def _shapes(name: str, theirs: Tensor, ours: Tensor) -> str:
    return f"{name} {list(theirs.shape)} for {list(ours.shape)}"


def _some(names: Iterable[str]) -> str:
    names = list(names) if isinstance(names, list) else sorted(names)
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return (", ".join(names[:_SHOWN]) or "none") + more


# --------------------------------------------------------------------------------------------- runs
def load_run_state(model: nn.Module, run_dir: Path, which: str | runs.Checkpoint = "best") -> None:
    """Load a run's checkpoint into a model built from its config, to the last tensor. `which`: best | last, or one
    that was picked already.

    Raises UserError where there is no such checkpoint, or where names or shapes differ.
    """
    checkpoint = runs.pick_checkpoint(run_dir, which) if isinstance(which, str) else which
    state = _by_plain_name(checkpoint.model_state())
    if differing := _load_whole(model, state):
        raise UserError(
            f"{checkpoint.folder} must fit the model that {run_dir / 'config.yaml'} describes, got {len(differing)} "
            f"tensors that differ: {_some(differing)}; use the versions in {run_dir / 'run.json'}"
        )


def load_file_state(
    model: nn.Module,
    path: str | Path,
    key: str = "teacher.weights",
    outputs: Sequence[str] | None = None,
) -> list[int]:
    """Load a weights file into a model to the last tensor, its classifier among them, on whatever device it stands.

    Returns at which of the file's logits each of `outputs` [K], the classes that are asked for, stands: by name, where
    the file names its classes or the model knows what they are (`file_classes`), else in the same order.
    BatchNorm's count of batches may be missing. Raises UserError where it has other classes, where the file cannot be read (see load_weights), or
    where names or shapes differ.
    """
    state, known = _read(Path(path).expanduser(), key)
    own = _by_plain_name(model.state_dict())
    counts = {n: t for n, t in own.items() if n.endswith("num_batches_tracked")}
    if differing := _load_whole(model, {**counts, **state}):
        raise UserError(
            f"{key} must be weights of {getattr(model, 'name', type(model).__name__)}, got {path}, with {len(differing)} "
            f"tensors that differ: {_some(differing)}; name the model that it was trained as (teacher.model)"
        )
    if outputs is None:
        return []
    of_model: Sequence[str] = getattr(model, "file_classes", ())
    known = known or (list(of_model) if len(of_model) == len(outputs) else list(outputs))
    if set(known) != set(outputs):
        raise UserError(
            f"{key}: the logits of {path} stand for {', '.join(known)}, got data where they would stand for "
            f"{', '.join(outputs)}; name the folders of the classes so (0_real and 1_fake for published real-or-fake weights)"
        )
    return [known.index(name) for name in outputs]


def _load_whole(model: nn.Module, state: Mapping[str, Tensor]) -> list[str]:
    """What differs; the model has these weights only where nothing does."""
    target = _by_plain_name(model.state_dict())
    differing = [f"missing {n}" for n in sorted(target.keys() - state.keys())]
    differing += [f"unexpected {n}" for n in sorted(state.keys() - target.keys())]
    differing += [
        _shapes(n, state[n], target[n])
        for n in sorted(target.keys() & state.keys())
        if state[n].shape != target[n].shape
    ]
    if not differing:
        with torch.no_grad():
            for name, tensor in target.items():
                tensor.copy_(state[name])
    return differing


# ------------------------------------------------------------------------------------------- numbers
