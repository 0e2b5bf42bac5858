"""What is learned: terms, the task that sums them, and teachers that add columns to a batch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from potstill.errors import UserError
from potstill.losses import LOSSES

Batch = dict[str, Tensor]
"""image [B,3,H,W] (uint8 until augmented, then float in [0, 1]), label [B], id [B] and view [B] int64,
weight [B] (0 for padding), weight_total [] (the sum of weights of the whole global batch)."""


@dataclass(frozen=True)
class Term:
    """One part of the loss: `weight` x `loss(*inputs, **options)`, one value a sample.

    `inputs` name columns of the batch or outputs of the model: `logits`, `label`, `teacher.logits`.
    """

    name: str
    loss: Callable[..., Tensor]
    inputs: tuple[str, ...]
    weight: float
    options: dict[str, Any] = field(default_factory=dict)


def build_terms(terms: dict[str, dict[str, Any]]) -> list[Term]:
    """`task.terms` of the config. Raises UserError for an unknown loss, option or a wrong number of inputs."""
    built = []
    for name, node in terms.items():
        key = f"task.terms.{name}"
        options = dict(node)
        loss_name, inputs, weight = (
            options.pop("loss", None),
            options.pop("inputs", []),
            options.pop("weight", 1.0),
        )
        if loss_name not in LOSSES:
            near = difflib.get_close_matches(str(loss_name), LOSSES, n=1)
            remedy = f"; did you mean {near[0]}?" if near else ""
            raise UserError(
                f"{key}.loss must be one of {', '.join(LOSSES)}, got {loss_name!r}{remedy}"
            )
        parameters = inspect.signature(LOSSES[loss_name]).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if len(inputs) != len(positional):
            raise UserError(
                f"{key}.inputs must name {len(positional)} inputs ({', '.join(positional)}), got {inputs}"
            )
        for option in options:
            if option not in keywords:
                raise UserError(
                    f"{key}.{option} is not an option of {loss_name}; it has {', '.join(keywords) or 'none'}"
                )
        built.append(Term(name, LOSSES[loss_name], tuple(inputs), float(weight), options))
    return built


class Task(nn.Module):
    """A model and the terms it is trained on."""

    def __init__(self, model: nn.Module, terms: Sequence[Term]) -> None:
        super().__init__()
        self.model = model
        self.terms = list(terms)

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor], dict[str, Tensor]]:
        """Returns (loss [], means by term, outputs of the model).

        The loss is this batch's share of the global batch's weighted mean: sum of w·l over
        `weight_total`. So the shares of ranks and micro-batches add up, whatever their sizes.
        """
        outputs = self.model(batch)
        columns = {**batch, **outputs}
        weight_B, total = batch["weight"], batch["weight_total"]
        loss = weight_B.new_zeros(())
        shares: dict[str, Tensor] = {}
        for term in self.terms:
            loss_B = term.loss(
                *(self._column(columns, term, name) for name in term.inputs), **term.options
            )
            share = (loss_B * weight_B).sum() / total
            loss = loss + term.weight * share
            shares[term.name] = share.detach()
        return loss, shares, outputs

    @staticmethod
    def _column(columns: dict[str, Tensor], term: Term, name: str) -> Tensor:
        if name not in columns:
            raise UserError(
                f"task.terms.{term.name}.inputs names {name!r}; there are {', '.join(sorted(columns))}"
            )
        return columns[name]


class Teacher(nn.Module):
    """A frozen model, always in eval mode, whose outputs become columns `<name>.<output>` of a batch.

    `order` [K] says at which of the teacher's outputs each of the student's classes stands.
    """

    def __init__(self, model: nn.Module, name: str, order: Sequence[int]) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.order: Tensor
        self.register_buffer("order", torch.tensor(order), persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher has no training mode: its statistics stay put."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        logits_BK = self.model(batch)["logits"][:, self.order]
        return {**batch, f"{self.name}.logits": logits_BK}


def match_classes(teacher: Sequence[str], student: Sequence[str], teacher_run: str) -> list[int]:
    """Where each of the student's classes stands among the teacher's outputs, by name.

    Raises UserError with the difference unless both know the same classes.
    """
    missing, extra = sorted(set(student) - set(teacher)), sorted(set(teacher) - set(student))
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"the teacher does not know {len(missing)}: {', '.join(missing[:5])}")
        if extra:
            parts.append(f"the data lacks {len(extra)} of the teacher's: {', '.join(extra[:5])}")
        raise UserError(
            f"teacher.run must know the classes of the data by the same names, got {teacher_run}: "
            f"{'; '.join(parts)}; train a teacher on these classes, or choose classes with data.classes"
        )
    return [list(teacher).index(name) for name in student]
