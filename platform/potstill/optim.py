"""Optimizers by timm's names, with rates by part of the model, and learning rates as a function of progress."""

from __future__ import annotations

import difflib
import fnmatch
import importlib.util
import inspect
import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from potstill.config import Optimizer, Schedule
from potstill.errors import UserError

_OURS = ("lr", "weight_decay", "momentum", "betas")
"""Arguments of optimizers that have a key of their own, and do not stand in optimizer.kwargs."""


# --------------------------------------------------------------------------------------- the optimizer
def check_optimizer(cfg: Optimizer) -> None:
    """Refuse, before anything expensive, what timm or the optimizer itself would; needs no model.

    Raises UserError for an unknown name (with near ones), for an optimizer that the loop cannot drive or
    whose package is missing, and for values or `kwargs` that it does not take. Imports timm.
    """
    info, known = _info(cfg.name), _timm().list_optimizers()
    if info is None:
        prefix = "lookahead_" if cfg.name.startswith("lookahead_") else ""
        near = difflib.get_close_matches(cfg.name.removeprefix(prefix).lower(), known, n=4)
        hint = f"did you mean {', '.join(prefix + name for name in near)}; " if near else ""
        raise UserError(
            f"optimizer.name must be an optimizer of timm, got {cfg.name!r}; {hint}all: "
            "timm.optim.list_optimizers(), each also as lookahead_<name>"
        )
    if info.second_order:
        raise UserError(
            f"optimizer.name: {cfg.name} needs second derivatives, which the training loop does not compute; use a "
            "first-order one, such as adamw"
        )
    if info.has_betas and cfg.betas is not None and len(cfg.betas) != info.num_betas:
        raise UserError(
            f"optimizer.betas must be {info.num_betas} numbers for {cfg.name}, got {cfg.betas}"
        )
    for pattern, lr in cfg.lrs.items():
        if isinstance(lr, bool) or not isinstance(lr, int | float) or not 0 < lr < math.inf:
            raise UserError(f"optimizer.lrs: the rate of {pattern!r} must be > 0, got {lr!r}")
    if isinstance(info.opt_class, str):  # of another package, and on GPUs only
        package = info.opt_class.split(".")[0]
        if importlib.util.find_spec(package) is None:
            plain = cfg.name.removeprefix("lookahead_").removeprefix("fused").removeprefix("bnb")
            plain = plain.removesuffix("8bit")
            raise UserError(
                f"optimizer.name: {cfg.name} needs the package {package}, which is not installed; install it, or use "
                f"{plain if plain in known else 'adamw'}"
            )
        return
    takes = [name for name in inspect.signature(info.opt_class).parameters if name != "params"]
    for name in cfg.kwargs:
        if name in _OURS:
            raise UserError(
                f"optimizer.kwargs must not hold {name}, got {cfg.kwargs[name]!r}: use optimizer.{name}"
            )
        if name not in takes:
            near = difflib.get_close_matches(name, takes, n=1)
            rest = ", ".join(sorted(set(takes) - set(_OURS)))
            raise UserError(
                f"optimizer.kwargs: {cfg.name} takes no {name!r}; "
                f"{f'did you mean {near[0]}; ' if near else ''}it takes {rest}"
            )
    _try(cfg)


def _timm() -> Any:
    import timm.optim

    return timm.optim


def _info(name: str) -> Any:
    """timm's description of an optimizer, or None."""
    name = name.removeprefix("lookahead_")
    return _timm().get_optimizer_info(name) if name in _timm().list_optimizers() else None


def _try(cfg: Optimizer) -> None:
    """Some values are refused by the constructor, others by the first update only."""
    parameters = [nn.Parameter(torch.ones(8, 8)), nn.Parameter(torch.ones(8))]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    try:
        optimizer = _create([{"params": parameters}], cfg, torch.device("cpu"))
        if "kron" not in cfg.name:  # its first update compiles for half a minute
            optimizer.step()
    except Exception as error:
        said = (str(error).strip() or type(error).__name__).splitlines()[0][:200]
        raise UserError(
            f"optimizer.kwargs and the other keys of optimizer must suit {cfg.name}, got {cfg.kwargs}: {said}"
        ) from error


def _create(
    groups: list[dict[str, Any]], cfg: Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    info, given = _info(cfg.name), dict(cfg.kwargs)
    if info.has_betas and cfg.betas is not None:
        given["betas"] = tuple(cfg.betas)
    if info.opt_class is torch.optim.SGD and cfg.momentum == 0:
        given.setdefault("nesterov", False)
    has_fused = info.opt_class in (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)
    if has_fused and "foreach" not in given:
        given.setdefault("fused", device.type in ("cuda", "cpu"))
    return _timm().create_optimizer_v2(
        groups,
        opt=cfg.name,
        lr=cfg.lr,
        weight_decay=cfg.weight_decay,
        momentum=cfg.momentum,
        **given,
    )


def build_optimizer(
    model: nn.Module,
    head: set[str],
    cfg: Optimizer,
    device: torch.device,
    further: Sequence[nn.Parameter] = (),
) -> torch.optim.Optimizer:
    """The optimizer of the config over all parameters that are not frozen, and `further` ones at `lr`.

    `head`: names of the classifier's parameters. A parameter's rate is, in this order: that of the first
    pattern of `lrs` that its name matches; `head_lr` in the head; `lr` times `layer_decay` for every layer
    between its own and the highest, by the model's `layer_of()` (see TimmModel; Clark et al. 2020,
    arXiv:2003.10555; Bao et al. 2021, arXiv:2106.08254). Biases, parameters of normalisation (one
    dimension) and what the model's `no_weight_decay()` names are not decayed. Muon leaves the head to its
    AdamW.

    Every group has a `name`: head, body, `layer <n>`, or its pattern of `lrs`.

    Raises UserError for what `check_optimizer` refuses, for a pattern that names nothing, and for a rate
    of a head or of layers in a model that names none.
    """
    check_optimizer(cfg)
    layer_of: dict[str, int] = getattr(model, "layer_of", dict)()
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    _refuse_unknown_parts(model, trainable, head, cfg, layer_of)
    undecayed = set(_undecayed(model, trainable))
    orthogonal = cfg.name.endswith("muon")
    top = max(layer_of.values(), default=0)
    groups: dict[tuple[str, float, bool, bool], dict[str, Any]] = {}
    for name, parameter in trainable.items():
        pattern = next((p for p in cfg.lrs if fnmatch.fnmatchcase(name, p)), None)
        layer = layer_of.get(name, top)
        if pattern is not None:
            part, lr = pattern, cfg.lrs[pattern]
        elif name in head:
            part, lr = "head", cfg.head_lr or cfg.lr
        elif cfg.layer_decay is not None:
            part, lr = f"layer {layer}", cfg.lr * cfg.layer_decay ** (top - layer)
        else:
            part, lr = "body", cfg.lr
        decays = parameter.ndim > 1 and not name.endswith(".bias") and name not in undecayed
        falls_back = orthogonal and name in head
        group = groups.setdefault(
            (part, lr, decays, falls_back),
            {
                "params": [],
                "name": part,
                "lr": lr,
                "weight_decay": cfg.weight_decay if decays else 0.0,
                **({"use_fallback": True} if falls_back else {}),
            },
        )
        group["params"].append(parameter)
    if further:
        own = {"params": list(further), "name": "projections", "lr": cfg.lr}
        fallback = {"use_fallback": True} if orthogonal else {}
        groups["projections", cfg.lr, True, orthogonal] = {
            **own, "weight_decay": cfg.weight_decay, **fallback
        }  # fmt: skip
    try:
        optimizer = _create(list(groups.values()), cfg, device)
    except (AssertionError, ImportError) as error:
        raise UserError(
            f"optimizer.name: {cfg.name} cannot be used here ({error}); use adamw"
        ) from error
    for group in optimizer.param_groups:
        # timm's corrected weight decay measures a rate by its peak, which is the group's own
        if "max_lr_snapshot" in group:
            group["max_lr_snapshot"] = group["lr"]
    return optimizer


def _refuse_unknown_parts(
    model: nn.Module,
    trainable: Collection[str],
    head: set[str],
    cfg: Optimizer,
    layer_of: Mapping[str, int],
) -> None:
    what = getattr(model, "name", type(model).__name__)
    if cfg.head_lr is not None and not head:
        raise UserError(
            f"optimizer.head_lr must be null for {what}, which names no classifier, got {cfg.head_lr:g}; use optimizer.lrs"
        )
    if cfg.layer_decay is not None and not layer_of:
        raise UserError(
            f"optimizer.layer_decay must be null for {what}, which names no blocks, got {cfg.layer_decay:g}; use "
            "optimizer.lrs"
        )
    names = list(trainable)
    for pattern in cfg.lrs:
        if any(fnmatch.fnmatchcase(name, pattern) for name in names):
            continue
        if any(fnmatch.fnmatchcase(name, pattern) for name, _ in model.named_parameters()):
            raise UserError(
                f"optimizer.lrs: all that {pattern!r} names is frozen by model.freeze; leave it out"
            )
        dotted = [name.split(".") for name in names]
        parts = {".".join(n[:i]): f"{'.'.join(n[:i])}.*" for n in dotted for i in range(1, len(n))}
        parts.update({name: name for name in names})
        stem = pattern.partition("*")[0].rstrip(".")
        near = [parts[part] for part in difflib.get_close_matches(stem, parts)] or names[:3]
        raise UserError(
            f"optimizer.lrs: {pattern!r} must match the name of a parameter of {what}, and matches none; names are like "
            f"{', '.join(near)}"
        )


def _undecayed(model: nn.Module, names: Collection[str]) -> Iterator[str]:
    """What the model, or a part of it, wants no weight decay on (position embeddings, tokens): timm's convention."""
    for prefix, module in model.named_modules():
        for pattern in getattr(module, "no_weight_decay", set)():
            yield from fnmatch.filter(names, f"{prefix}.{pattern}".lstrip("."))


# ------------------------------------------------------------------------------------ the learning rate
class LearningRate:
    """Sets every group's learning rate: a linear warm-up, then the schedule, from the group's own rate.

    cosine: half a cosine down to `min_lr` (Loshchilov & Hutter 2016, arXiv:1608.03983).
    cosine_restarts: the same again and again, each cycle `cycle_mult` times as long (the same paper).
    polynomial: (1 - progress) ** `power`, down to `min_lr`.
    one_cycle: up from lr / `div_factor` in the share `peak` of the training, then down by `final_div_factor`
    below where it began, both by half a cosine; it is its own warm-up (Smith & Topin 2017, arXiv:1708.07120;
    the momentum stays).
    steps: times `factor` after each of `milestones`, in epochs from the start.
    plateau: times `factor` when the monitored value has not improved for more than `patience` epochs.
    constant.

    Plateau moves at every epoch, the others at every update. `min_lr` is a floor after the warm-up; a group
    whose own rate is below it keeps that.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        cfg: Schedule,
        steps_per_epoch: int,
        epochs: int,
        higher_is_better: bool,
    ) -> None:
        self.optimizer, self.cfg = optimizer, cfg
        self.base = [group["lr"] for group in optimizer.param_groups]
        common = optimizer.defaults["lr"]
        self.shown = self.base.index(common) if common in self.base else 0
        self.warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        self.total_steps = steps_per_epoch * epochs
        self.cycle_steps = max(1, round(cfg.cycle_epochs * steps_per_epoch))
        self.milestones = [round(epoch * steps_per_epoch) for epoch in cfg.milestones]
        self.higher_is_better = higher_is_better
        self.plateau_factor, self.best, self.bad_epochs = 1.0, None, 0

    def at(self, step: int, base: float) -> float:
        """The learning rate of update `step` (0-based) for a group whose own is `base`."""
        cfg = self.cfg
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        step -= self.warmup_steps
        done = min(step / max(self.total_steps - self.warmup_steps, 1), 1.0)
        floor = min(cfg.min_lr, base)
        match cfg.name:
            case "cosine":
                return floor + (base - floor) * _half_cosine(done)
            case "cosine_restarts":
                return floor + (base - floor) * _half_cosine(self._cycle_done(step))
            case "polynomial":
                return floor + (base - floor) * (1 - done) ** cfg.power
            case "one_cycle":
                return max(base * self._one_cycle(step), floor)
            case "steps":
                passed = sum(step + self.warmup_steps >= m for m in self.milestones)
                return max(base * cfg.factor**passed, floor)
            case "plateau":
                return max(base * self.plateau_factor, floor)
            case "constant":
                return base
        raise AssertionError(cfg.name)

    def _cycle_done(self, step: int) -> float:
        """The share of its cycle that update `step` has behind it."""
        length = self.cycle_steps
        if self.cfg.cycle_mult == 1:
            return step % length / length
        cycle = 0
        while step >= length:
            step, cycle = step - length, cycle + 1
            length = round(self.cycle_steps * self.cfg.cycle_mult**cycle)
        return step / length

    def _one_cycle(self, step: int) -> float:
        """The rate's share of its peak; the last update has the final one."""
        cfg, last = self.cfg, self.total_steps - 1
        first = 1 / cfg.div_factor
        peak = cfg.peak * self.total_steps - 1
        if step <= peak:
            return first + (1 - first) * (1 - _half_cosine(step / peak if peak else 1.0))
        final = first / cfg.final_div_factor
        return final + (1 - final) * _half_cosine(min((step - peak) / max(last - peak, 1e-9), 1.0))

    def before_step(self, step: int) -> float:
        """Set the rates of update `step`; returns that of the parameters whose own is `optimizer.lr`."""
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = self.at(step, base)
        return self.optimizer.param_groups[self.shown]["lr"]

    def after_epoch(self, value: float) -> None:
        """Tell the monitored value of the epoch, which a plateau schedule waits for."""
        if self.cfg.name != "plateau":
            return
        if self.best is None or (value > self.best if self.higher_is_better else value < self.best):
            self.best, self.bad_epochs = value, 0
            return
        self.bad_epochs += 1
        if self.bad_epochs > self.cfg.patience:
            self.plateau_factor *= self.cfg.factor
            self.bad_epochs = 0

    def state_dict(self) -> dict[str, Any]:
        return {
            "plateau_factor": self.plateau_factor,
            "best": self.best,
            "bad_epochs": self.bad_epochs,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.plateau_factor, self.best, self.bad_epochs = (
            state["plateau_factor"],
            state["best"],
            state["bad_epochs"],
        )


def _half_cosine(done: float) -> float:
    """From 1 at 0 down to 0 at 1."""
    return 0.5 * (1 + math.cos(math.pi * done))
