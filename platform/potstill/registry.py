"""What a config may name: built-in models, losses, sources and augmentations, and those of plug-ins.

A plug-in is a Python module on the path that registers its own when it is imported:

    from potstill.registry import register

    @register("loss", "my_loss")
    def my_loss(logits_BK, label_B): ...

and is named by `plugins=[my_module]`.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

from potstill.errors import UserError

Kind = Literal["model", "loss", "source", "augmentation"]
T = TypeVar("T")

# Built-in ones are named by module and attribute, so that nothing is imported before it is used.
_KNOWN: dict[str, dict[str, Any]] = {
    "model": {
        "timm": "potstill.models.images:TimmModel",
        "ladeda9": "potstill.models.patches:LaDeDa9",
        "tiny_ladeda": "potstill.models.patches:TinyLaDeDa",
    },
    "loss": {},
    "source": {
        "folder": "potstill.data.folder:list_folder",
        "digits": "potstill.data.digits:list_digits",
        "manifest": "potstill.data.manifest:list_manifest",
        "parquet": "potstill.data.manifest:list_parquet",
        "tar": "potstill.data.tars:list_tar",
    },
    "augmentation": {},
}
# Built-in ones that are known by name where they are used, and that no plug-in may replace.
RESERVED = {
    "loss": (
        *("cross_entropy", "bce", "focal", "asymmetric", "kl", "kl_sigmoid"),
        *("dkd", "dist", "hard_labels", "hard_labels_sigmoid"),
        *("feature_mse", "feature_cosine", "embedding_mse", "embedding_cosine"),
        *("attention", "rkd_distance", "rkd_angle", "patch_mse"),
    ),
    "augmentation": ("rand", "trivial", "augmix"),
}
_KEYS = {
    "model": "model._target_",
    "loss": "task.terms.*.loss",
    "source": "data.source",
    "augmentation": "augment.policy",
}


def register(kind: Kind, name: str) -> Callable[[T], T]:
    """Decorator: let configs name this object. Raises UserError where something else has the name.

    model: a class, built as `cls(num_classes, image_px=…, **model)`, whose `forward(batch)` returns named
    outputs, `logits` [B, K] among them (see models/images.py:TimmModel).
    loss: a function of columns [B, …] to [B]; keyword-only arguments are its options (see losses.py).
    source: a function of the config's `data` to a Listing (see data/sources.py).
    augmentation: a function (images float [B, 3, h, w] in [0, 1], u float64 [B, L] in [0, 1)) -> images.
    """
    if kind not in _KNOWN:
        raise UserError(f"register: kind must be one of {', '.join(_KNOWN)}, got {kind!r}")

    def remember(target: T) -> T:
        known = _KNOWN[kind].get(name)
        reserved = name in RESERVED.get(kind, ())
        if reserved or (known is not None and not _same(known, target)):
            raise UserError(f"register: there is a {kind} {name!r} already; choose another name")
        _KNOWN[kind][name] = target
        return target

    return remember


def _same(known: Any, target: Any) -> bool:
    """Whether it is the same thing, imported again (a notebook's reload, say)."""
    if isinstance(known, str):
        return known == f"{target.__module__}:{target.__qualname__}"
    return (known.__module__, known.__qualname__) == (target.__module__, target.__qualname__)


def names(kind: Kind) -> list[str]:
    return sorted(_KNOWN[kind])


def check(kind: Kind, name: Any) -> None:
    """Raises UserError with what there is, unless this is registered. Imports nothing."""
    if name not in _KNOWN[kind]:
        near = difflib.get_close_matches(str(name), _KNOWN[kind], n=1)
        remedy = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"{_KEYS[kind]} must be one of {', '.join(names(kind))}, got {name!r}; {remedy}"
            f"a {kind} of your own is registered by plugins=[<module>]"
        )


def lookup(kind: Kind, name: str) -> Any:
    """The registered object, imported now if it is a built-in one. Raises UserError with what there is."""
    check(kind, name)
    found = _KNOWN[kind][name]
    if isinstance(found, str):
        module, _, attribute = found.partition(":")
        return getattr(importlib.import_module(module), attribute)
    return found


def load_plugins(modules: Sequence[str]) -> None:
    """Import modules that register things; they are also looked for in the current folder.

    Raises UserError where one cannot be imported, with its own error.
    """
    if modules and os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    for module in modules:
        try:
            importlib.import_module(module)
        except UserError:
            raise
        except Exception as error:
            raise UserError(
                f"plugins: {module!r} cannot be imported ({type(error).__name__}: {error}); it must be a Python module "
                "in the current folder or on PYTHONPATH"
            ) from error
