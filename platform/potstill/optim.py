"""Optimizers, and learning rates as a function of progress."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from potstill.config import Optimizer, Schedule


def build_optimizer(
    model: nn.Module, head: set[str], cfg: Optimizer, device: torch.device
) -> torch.optim.Optimizer:
    """`head`: names of the classifier's parameters, which take `head_lr`.

    Biases and parameters of normalisation (one dimension) are not decayed; frozen ones are left out.
    """
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in head, parameter.ndim > 1), []).append(parameter)
    params = [
        {
            "params": parameters,
            "lr": cfg.head_lr if is_head and cfg.head_lr else cfg.lr,
            "weight_decay": cfg.weight_decay if decays else 0.0,
        }
        for (is_head, decays), parameters in groups.items()
    ]
    fused: dict[str, Any] = {"fused": device.type in ("cuda", "cpu")}
    if cfg.name == "sgd":
        return torch.optim.SGD(
            params, lr=cfg.lr, momentum=cfg.momentum, nesterov=cfg.momentum > 0, **fused
        )
    kind = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[cfg.name]
    return kind(params, lr=cfg.lr, betas=(cfg.betas[0], cfg.betas[1]), **fused)


class LearningRate:
    """Sets every group's learning rate: warm-up times schedule.

    Cosine and warm-up move at every update, plateau at every epoch; `min_lr` is a floor for each group.
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
        self.warmup_steps = round(cfg.warmup_epochs * steps_per_epoch)
        self.total_steps = steps_per_epoch * epochs
        self.higher_is_better = higher_is_better
        self.plateau_factor, self.best, self.bad_epochs = 1.0, None, 0

    def at(self, step: int, base: float) -> float:
        """The learning rate of update `step` (0-based) for a group whose own is `base`."""
        if step < self.warmup_steps:
            return base * (step + 1) / self.warmup_steps
        factor = self.plateau_factor
        if self.cfg.name == "cosine":
            done = (step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1)
            cosine = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
            return (
                self.cfg.min_lr + (base - self.cfg.min_lr) * cosine
                if base > self.cfg.min_lr
                else base
            )
        return max(base * factor, min(self.cfg.min_lr, base))

    def before_step(self, step: int) -> float:
        """Set the rates of update `step`; returns the first group's."""
        for group, base in zip(self.optimizer.param_groups, self.base, strict=True):
            group["lr"] = self.at(step, base)
        return self.optimizer.param_groups[0]["lr"]

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
