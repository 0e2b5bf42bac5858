"""What is learned: terms, the task that sums them, and teachers that add columns to a batch."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from potstill import registry
from potstill.errors import UserError
from potstill.losses import LOSSES, class_weights

Batch = dict[str, Tensor]
"""image [B,3,H,W] (uint8 until augmented, then float in [0, 1]), id [B] and view [B] int64; label [B] int64 or,
where a sample may have several classes, [B,K] float; weight [B] (0 for padding), label_weight [B] (0 where there
is no label, too); weight_total, label_weight_total [] and count [] of the whole global batch.
Where pairs were mixed also label_mix and label_weight_mix (the partner's), and mix [B]: the share of the own."""


class Sum(NamedTuple):
    """A weighted sum of a term's values, and the sum of the weights, both []."""

    value: Tensor
    weight: Tensor


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


def build_terms(
    terms: dict[str, dict[str, Any]],
    kind: str = "single_label",
    counts_K: Sequence[int] | None = None,
    device: torch.device | None = None,
    samples: int | None = None,
) -> list[Term]:
    """`task.terms` of the config. `counts_K`: training images of each class, and `samples` of them in all, for
    `class_weights`.

    Raises UserError for an unknown loss or option, a wrong number of inputs, and a loss that is not for
    this kind of task.
    """
    built = []
    for name, node in terms.items():
        key = f"task.terms.{name}"
        options = dict(node)
        loss_name, inputs, weight = (
            options.pop("loss", None),
            options.pop("inputs", []),
            options.pop("weight", 1.0),
        )
        loss = _find_loss(key, loss_name)
        if loss_name in NOT_FOR[kind]:
            raise UserError(
                f"{key}.loss must suit task.kind={kind}, got {loss_name}; use {NOT_FOR[kind][loss_name]}"
            )
        if kind == "single_label" and loss_name == "focal" and options.get("alpha") is not None:
            raise UserError(
                f"{key}.alpha must be null with focal and one class of several, got {options['alpha']:g}; use class_weights"
            )
        parameters = inspect.signature(loss).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        if len(inputs) != len(positional):
            raise UserError(
                f"{key}.inputs must name {len(positional)} inputs ({', '.join(positional)}), got {inputs}"
            )
        for parameter, column in zip(positional, inputs, strict=True):
            if parameter.startswith("label") and column.startswith("teacher."):
                raise UserError(
                    f"{key}.inputs: {loss_name} compares with labels, got {column}; use {'kl' if kind == 'single_label' else 'kl_sigmoid'}"
                )
        for option, value in dict(options).items():
            if option not in keywords and not value:
                del options[
                    option
                ]  # the group's default for its own loss, switched off: it says nothing
            elif option not in keywords:
                raise UserError(
                    f"{key}.{option} is not an option of {loss_name}; it has {', '.join(keywords) or 'none'}"
                )
        if counts_K is not None and options.get("class_weights") is not None:
            spec = options["class_weights"]
            options["class_weights"] = _class_weights(key, kind, spec, counts_K, samples).to(device)
        built.append(Term(name, loss, tuple(inputs), float(weight), options))
    return built


_INSTEAD = {"cross_entropy": "bce, focal or asymmetric", "kl": "kl_sigmoid"}
NOT_FOR: dict[str, dict[str, str]] = {
    "single_label": {"kl_sigmoid": "kl"},
    "multi_label": _INSTEAD,
    "binary": _INSTEAD,
}
"""By kind of task: losses that do not suit it, and what to use instead."""


def _find_loss(key: str, name: Any) -> Callable[..., Tensor]:
    own = {n: registry.lookup("loss", n) for n in registry.names("loss")}
    known = {**LOSSES, **own}
    if name not in known:
        near = difflib.get_close_matches(str(name), known, n=1)
        remedy = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"{key}.loss must be one of {', '.join(known)}, got {name!r}{remedy}")
    return known[name]


def _class_weights(
    key: str, kind: str, spec: Any, counts_K: Sequence[int], samples: int | None
) -> Tensor:
    if isinstance(spec, list) and len(spec) != len(counts_K):
        raise UserError(
            f"{key}.class_weights must be balanced, effective or a number for each of the {len(counts_K)} classes, got "
            f"{len(spec)} numbers"
        )
    return class_weights(spec, torch.as_tensor(counts_K), kind, samples)


class Task(nn.Module):
    """A model, the terms it is trained on, and what kind of labels they take."""

    def __init__(self, model: nn.Module, terms: Sequence[Term], kind: str = "single_label") -> None:
        super().__init__()
        self.model = model
        self.terms = list(terms)
        self.kind = kind

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Sum], dict[str, Tensor]]:
        """Returns (loss [], sums by term, outputs of the model).

        The loss is this batch's share of the global batch's weighted mean: of each term, sum of w·l over
        the whole batch's sum of w. So the shares of ranks and micro-batches add up, whatever their sizes.
        A term that takes labels counts `label_weight`, any other `weight`.
        """
        outputs = self.model(batch)
        columns = {**batch, **outputs}
        loss = batch["weight"].new_zeros(())
        sums: dict[str, Sum] = {}
        for term in self.terms:
            if "label" in term.inputs:
                summed, total = self._labelled(columns, term), batch["label_weight_total"]
            else:
                weight_B = batch["weight"]
                summed = Sum((self._values(columns, term) * weight_B).sum(), weight_B.sum())
                total = batch["weight_total"]
            # a batch without a label has nothing to say here
            loss = loss + term.weight * summed.value / total.clamp(min=1e-12)
            sums[term.name] = Sum(summed.value.detach(), summed.weight)
        return loss, sums, outputs

    def _labelled(self, columns: dict[str, Tensor], term: Term) -> Sum:
        """Of a mixed image both labels count, each by its share: Zhang et al. 2017, arXiv:1710.09412, section 3."""
        weight_B = columns["label_weight"]
        if "mix" not in columns:
            return Sum((self._values(columns, term) * weight_B).sum(), weight_B.sum())
        own_B = columns["mix"] * weight_B
        other_B = (1 - columns["mix"]) * columns["label_weight_mix"]
        of_partner = self._values({**columns, "label": columns["label_mix"]}, term)
        value = (self._values(columns, term) * own_B + of_partner * other_B).sum()
        return Sum(value, (own_B + other_B).sum())

    def _values(self, columns: dict[str, Tensor], term: Term) -> Tensor:
        inputs = (self._column(columns, term, name) for name in term.inputs)
        return term.loss(*inputs, **term.options)

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
