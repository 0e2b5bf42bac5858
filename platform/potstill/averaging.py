"""Averages of a model's weights over its training: they are what is measured and kept, not what is trained."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Averager:
    """An exponential moving average of the weights, or their mean over the ends of the last epochs; or neither.

    `ema`: its decay, after every update: average = decay * average + (1 - decay) * weights. With `warmup`
    the decay of update n (0-based) is at most 1 - (1 + n) ** (-2/3), so that the first weights are soon
    forgotten: the formula of timm's ModelEmaV3 (Polyak & Juditsky 1992 for the idea).
    `average_last`: the equal mean of the weights at the ends of the last so many epochs (stochastic weight
    averaging, Izmailov et al. 2018, arXiv:1803.05407). Statistics of BatchNorm are averaged like weights.

    Averaged is what trains when the averager is made, with `frozen_too` all that a later stage may train, and the
    floating-point buffers; other buffers are copied. `model` must be where it will be trained (device, memory format), and bare: no wrapper's names.
    The average is held once beside the weights, on their device.
    """

    def __init__(
        self,
        model: nn.Module,
        ema: float | None = None,
        warmup: bool = True,
        average_last: int | None = None,
        frozen_too: bool = False,
    ) -> None:
        self.ema, self.warmup, self.average_last = ema, warmup, average_last
        self.averaged = 0
        # the tensors themselves and not views of their data; shared ones once
        named = {id(t): (name, t) for name, t in model.state_dict(keep_vars=True).items()}
        self._live: dict[str, Tensor] = {
            name: tensor
            for name, tensor in named.values()
            if frozen_too or tensor.requires_grad or not isinstance(tensor, nn.Parameter)
        }
        # what the model does not hold at the moment: the average; within swapped() what is trained
        self._other: dict[str, Tensor] = {}
        self._swapped = False
        if ema is not None:
            self._begin()

    def _begin(self) -> None:
        self._other = {name: tensor.detach().clone() for name, tensor in self._live.items()}

    @property
    def active(self) -> bool:
        """Whether there is an average to measure."""
        return self.ema is not None or self.averaged > 0

    def after_step(self, step: int) -> None:
        """Tell that update `step` (0-based) is done."""
        if self.ema is None:
            return
        decay = min(self.ema, 1 - (1 + step) ** (-2 / 3)) if self.warmup else self.ema
        self._towards_weights(1 - decay)

    def after_epoch(self, epoch: int, epochs: int) -> None:
        """Tell that epoch `epoch` (0-based) of `epochs` is done; before it is measured."""
        if self.average_last is None or epoch < epochs - self.average_last:
            return
        if not self._other:
            self._begin()
        self._towards_weights(1 / (self.averaged + 1))
        self.averaged += 1

    @torch.no_grad()
    def _towards_weights(self, share: float) -> None:
        assert not self._swapped, "the model holds its average, not what is trained"
        floats = [name for name, tensor in self._other.items() if tensor.is_floating_point()]
        if floats:
            torch._foreach_lerp_(  # pyright: ignore[reportPrivateImportUsage]
                [self._other[name] for name in floats],
                [self._live[name].detach() for name in floats],
                share,
            )
        for name in self._other.keys() - set(floats):
            self._other[name].copy_(self._live[name])

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Within it the model holds the average; afterwards again, bit by bit, what is trained.

        What is changed in the model meanwhile (batch statistics shared among ranks) stays in the average.
        Does nothing where there is no average.
        """
        if not self.active:
            yield
            return
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        # in place, because a compiled model knows its weights by their addresses; one copy at a time
        for name, mine in self._other.items():
            live = self._live[name]
            held = live.detach().clone()
            live.copy_(mine)
            mine.copy_(held)
        self._swapped = not self._swapped

    def state_dict(self) -> dict[str, Any]:
        """What the model does not hold at the moment: the average or, within `swapped()`, what is trained.

        Together with the model's own of the same moment it is all that is needed to go on.
        """
        return {"averaged": self.averaged, "swapped": self._swapped, "tensors": dict(self._other)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """After the model has loaded its own of the same moment; the model then holds what is trained."""
        self.averaged, self._swapped = state["averaged"], state["swapped"]
        self._other = {}
        if state["tensors"]:
            self._begin()
        for name, mine in self._other.items():
            mine.copy_(state["tensors"][name])
        if self._swapped:
            self._swap()
