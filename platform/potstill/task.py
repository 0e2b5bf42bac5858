"""What is learned: terms, the task that sums them, and teachers that add columns to a batch.

Shape suffixes: B samples of this forward pass, G of the global batch, K classes, D a width.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from potstill import distil_losses, losses, registry
from potstill.errors import UserError
from potstill.losses import class_weights
from potstill.term_weights import Weight

Batch = dict[str, Tensor]
"""image [B,3,H,W] (uint8 until augmented, then float in [0, 1]), id [B] and view [B] int64; label [B] int64 or,
where a sample may have several classes, [B,K] float; weight [B] (0 for padding), label_weight [B] (0 where there
is no label, too); weight_total, label_weight_total [] and count [] of the whole global batch.
Where pairs were mixed also label_mix and label_weight_mix (the partner's), and mix [B]: the share of the own."""


class Sum(NamedTuple):
    """A weighted sum of a term's values, and the sum of the weights, both []."""

    value: Tensor
    weight: Tensor


PROJECTIONS = ("linear", "mlp", "none")
"""How a student's output is brought to the width of the teacher's."""


@dataclass(frozen=True)
class Term:
    """One part of the loss: `weight` x `loss(*inputs, **options)`.

    `inputs` name columns of the batch or outputs of the model: `logits`, `label`, `teacher.logits`. A loss of scope
    `sample` gives one value a sample; one of scope `batch` compares samples with each other: it is called
    `loss(*inputs, weight_G, **options)` with the whole global batch and gives one value.
    """

    name: str
    loss: Callable[..., Tensor]
    inputs: tuple[str, ...]
    weight: Weight
    options: dict[str, Any] = field(default_factory=dict)
    scope: str = "sample"
    projection: str = "none"

    @property
    def taught(self) -> bool:
        """Whether it learns from a teacher, too: then images without a label count."""
        return any("." in name for name in self.inputs)


def build_terms(
    terms: dict[str, dict[str, Any]],
    kind: str = "single_label",
    counts_K: Sequence[int] | None = None,
    device: torch.device | None = None,
    samples: int | None = None,
    epochs: int = 1,
) -> list[Term]:
    """`task.terms` of the config. `counts_K`: training images of each class, and `samples` of them in all, for
    `class_weights`. `epochs`: those of the stage, for weights that move.

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
        scope = "batch" if loss_name in distil_losses.BATCH_SCOPE else "sample"
        parameters = inspect.signature(loss).parameters.values()
        positional = [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
        if scope == "batch":
            positional = positional[:-1]  # the weights
        keywords = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        keywords = [name for name in keywords if name not in BOUND]
        if len(inputs) != len(positional):
            raise UserError(
                f"{key}.inputs must name {len(positional)} inputs ({', '.join(positional)}), got {inputs}"
            )
        for parameter, column in zip(positional, inputs, strict=True):
            if parameter.startswith("label") and column.startswith("teacher."):
                raise UserError(
                    f"{key}.inputs: {loss_name} compares with labels, got {column}; use {'hard_labels or kl' if kind == 'single_label' else 'hard_labels_sigmoid or kl_sigmoid'}"
                )
        for option, value in dict(options).items():
            if option == "projection":
                continue
            if option not in keywords and not value:
                del options[
                    option
                ]  # the group's default for its own loss, switched off: it says nothing
            elif option not in keywords:
                raise UserError(
                    f"{key}.{option} is not an option of {loss_name}; it has {', '.join(keywords) or 'none'}"
                )
        projection = _projection(key, loss_name, options.pop("projection", None))
        if counts_K is not None and options.get("class_weights") is not None:
            spec = options["class_weights"]
            options["class_weights"] = _class_weights(key, kind, spec, counts_K, samples).to(device)
        weight = Weight(f"{key}.weight", weight, epochs)
        built.append(Term(name, loss, tuple(inputs), weight, options, scope, projection))
    return built


BOUND = ("student_patch", "teacher_patch")
"""Options that are not the user's: what the models' patches see, in pixels."""


def _projection(key: str, loss_name: str, given: Any) -> str:
    if loss_name not in distil_losses.PROJECTED:
        if given not in (None, "none"):
            raise UserError(
                f"{key}.projection is for {' and '.join(sorted(distil_losses.PROJECTED))}, got {given!r} with {loss_name}; leave it out"
            )
        return "none"
    if given is not None and given not in PROJECTIONS:
        raise UserError(f"{key}.projection must be one of {', '.join(PROJECTIONS)}, got {given!r}")
    return given or "linear"


_INSTEAD = {
    "cross_entropy": "bce, focal or asymmetric",
    "hard_labels": "hard_labels_sigmoid",
    **dict.fromkeys(("kl", "dkd", "dist"), "kl_sigmoid"),
}
NOT_FOR: dict[str, dict[str, str]] = {
    "single_label": {"kl_sigmoid": "kl", "hard_labels_sigmoid": "hard_labels"},
    "multi_label": _INSTEAD,
    "binary": _INSTEAD,
}
"""By kind of task: losses that do not suit it, and what to use instead."""


def _find_loss(key: str, name: Any) -> Callable[..., Tensor]:
    own = {n: registry.lookup("loss", n) for n in registry.names("loss")}
    known = {**losses.LOSSES, **distil_losses.LOSSES, **own}
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
    """A model, the terms it is trained on, and what kind of labels they take.

    `projections`, by term, belong to the task and not to the model: they are trained with it and left behind when
    the model is used. `epoch`: how far the stage is, for weights that move; the loop sets it.
    """

    def __init__(
        self,
        model: nn.Module,
        terms: Sequence[Term],
        kind: str = "single_label",
        projections: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.projections = nn.ModuleDict(dict(projections or {}))
        self.terms = list(terms)
        self.kind = kind
        self.epoch = 0.0

    @property
    def relations(self) -> list[Term]:
        """The terms that need the whole global batch."""
        return [term for term in self.terms if term.scope == "batch"]

    def weights(self) -> dict[str, float]:
        """Every term's weight as it is now."""
        specs = {term.name: term.weight for term in self.terms}
        return {name: weight.at(self.epoch, specs) for name, weight in specs.items()}

    def forward(
        self, batch: Batch, known: Relations | None = None
    ) -> tuple[Tensor, dict[str, Sum], dict[str, Tensor]]:
        """Returns (loss [], sums by term, outputs of the model).

        The loss is this batch's share of the global batch's weighted mean: of each term, sum of w·l over
        the whole batch's sum of w. So the shares of ranks and micro-batches add up, whatever their sizes.
        A term that takes labels and nothing of a teacher counts `label_weight`, any other `weight`.

        A term that needs the whole global batch gathers it from the ranks. Where this batch is only a part of the
        rank's, `known` says what the whole gave (see `relate`).
        """
        outputs = self.model(batch)
        columns = {**batch, **outputs}
        loss = batch["weight"].new_zeros(())
        sums: dict[str, Sum] = {}
        weights = self.weights()
        for term in self.terms:
            if term.scope == "batch":
                share, sums[term.name] = self._related(columns, term, known)
                loss = loss + weights[term.name] * share
                continue
            if "label" in term.inputs and not (term.taught and "mix" not in columns):
                summed, total = self._labelled(columns, term), batch["label_weight_total"]
            else:
                weight_B = batch["weight"]
                summed = Sum((self._values(columns, term) * weight_B).sum(), weight_B.sum())
                total = batch["weight_total"]
            # a batch without a label has nothing to say here
            loss = loss + weights[term.name] * summed.value / total.clamp(min=1e-12)
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
        return term.loss(*self._inputs(columns, term), **term.options)

    def _inputs(self, columns: Mapping[str, Tensor], term: Term) -> list[Tensor]:
        found = [self._column(columns, term, name) for name in term.inputs]
        if term.name in self.projections:
            found[0] = self.projections[term.name](found[0])
        return found

    @staticmethod
    def _column(columns: Mapping[str, Tensor], term: Term, name: str) -> Tensor:
        if name not in columns:
            there = sorted(c for c in columns if c not in _BOOKKEEPING)
            raise UserError(
                f"task.terms.{term.name}.inputs names {name!r}; there are {', '.join(there)}"
            )
        return columns[name]

    def probe(self, columns: Mapping[str, Tensor], term: Term) -> None:
        """Compute a term of these columns, which hold `weight` [B]: raises UserError where they do not go together."""
        inputs = self._inputs(columns, term)
        further = [columns["weight"]] if term.scope == "batch" else []
        term.loss(*inputs, *further, **term.options)

    # ------------------------------------------------------------------ what compares samples with each other
    def related_inputs(self, batch: Batch) -> tuple[dict[str, list[Tensor]], Tensor]:
        """What the terms over the whole batch take, by term, and the weights [B]: a part of it, to be put together."""
        columns = {**batch, **self.model(batch)}
        return {t.name: self._inputs(columns, t) for t in self.relations}, batch["weight"]

    def relate(self, parts: Sequence[tuple[dict[str, list[Tensor]], Tensor]]) -> list[Relations]:
        """The terms over the whole batch, from what `related_inputs` gave of each of this rank's parts.

        Gradient caching (Gao et al. 2021, arXiv:2101.06983): the loss of the whole batch is computed once, and of it
        the gradient of every sample's representation, which each part then carries on into the weights when it is run
        again. The same gradient as if memory had held everything. Collective.
        """
        weight_B = torch.cat([weight for _, weight in parts])
        sizes = [len(weight) for _, weight in parts]
        values: dict[str, Tensor] = {}
        gradients: dict[str, Sequence[Tensor]] = {}
        for term in self.relations:
            whole = [
                torch.cat(column) for column in zip(*(p[term.name] for p, _ in parts), strict=True)
            ]
            # in fp32: half precision would lose small gradients, which no loss scale has lifted yet
            student = whole[0].detach().float().requires_grad_()
            with torch.enable_grad():
                value = _over_ranks(term, [student, *whole[1:]], weight_B)
                (gradient,) = torch.autograd.grad(value, student)
            values[term.name] = value.detach()
            gradients[term.name] = gradient.split(sizes)
        return [
            Relations(values, {name: g[i] for name, g in gradients.items()})
            for i in range(len(parts))
        ]

    def no_relations(self, batch: Batch) -> Relations | None:
        """What stands for the terms over the whole batch where they are to be left out."""
        if not self.relations:
            return None
        with torch.no_grad():
            seen, weight_B = self.related_inputs(batch)
        zeros = {name: torch.zeros_like(inputs[0]).float() for name, inputs in seen.items()}
        return Relations({name: weight_B.new_zeros(()) for name in zeros}, zeros)

    def _related(
        self, columns: dict[str, Tensor], term: Term, known: Relations | None
    ) -> tuple[Tensor, Sum]:
        """A term over the whole batch: [] that has this part's share of its value and all of its own gradient."""
        weight_B, inputs = columns["weight"], self._inputs(columns, term)
        if known is None:
            whole = _over_ranks(term, inputs, weight_B)
            value = whole.detach()
        else:
            value = known.values[term.name]
            whole = (inputs[0].float() * known.gradients[term.name]).sum()
        share = weight_B.sum() / columns["weight_total"].clamp(min=1e-12)
        return value * share + whole - whole.detach(), Sum(value * weight_B.sum(), weight_B.sum())


class Relations(NamedTuple):
    """Of each term over the whole batch: its value [], and the gradient of this part's representations."""

    values: dict[str, Tensor]
    gradients: dict[str, Tensor]


_BOOKKEEPING = frozenset(
    (
        *("image", "id", "view", "weight", "weight_total", "label_weight", "label_weight_total"),
        *("count", "mix", "label_mix", "label_weight_mix"),
    )
)


def _over_ranks(term: Term, inputs: Sequence[Tensor], weight_B: Tensor) -> Tensor:
    """The loss of the samples of all ranks, with this rank's gradient. Collective."""
    gathered = [gather_ranks(column) for column in (*inputs, weight_B)]
    return term.loss(*gathered, **term.options)


def gather_ranks(mine: Tensor) -> Tensor:
    """The rows of all ranks [G, …], in their order. The gradient is that of this rank's own: what each rank computes of
    the same loss adds up to the whole gradient. Ranks may have different numbers of rows. Collective."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return mine
    rank, world = dist.get_rank(), dist.get_world_size()
    size = torch.tensor([len(mine)], device=mine.device)
    sizes = [torch.zeros_like(size) for _ in range(world)]
    dist.all_gather(sizes, size)
    counts = [int(s) for s in sizes]
    padded = mine.new_zeros((max(counts), *mine.shape[1:]))
    padded[: len(mine)] = mine.detach()
    others = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(others, padded)
    rows = [other[:count] for other, count in zip(others, counts, strict=True)]
    rows[rank] = mine
    return torch.cat(rows)


def build_projections(
    terms: Sequence[Term], shapes: Mapping[str, Sequence[int]]
) -> dict[str, nn.Module]:
    """A layer for each term whose student output must be brought to the teacher's width. `shapes`: of every column, of
    one sample ([D], or [C, h, w]). Raises UserError where there is nothing to project.

    linear: one layer without an activation, as in FitNets (Romero et al. 2014, arXiv:1412.6550), 1 x 1 over maps.
    mlp: two, with ReLU between. none: the widths must be equal.
    """
    found: dict[str, nn.Module] = {}
    seen: dict[str, Term] = {}
    for term in terms:
        before = seen.setdefault(term.name, term)
        if (before.projection, before.inputs) != (term.projection, term.inputs):
            raise UserError(
                f"stages: task.terms.{term.name} must have the same inputs and projection in every stage, got "
                f"{list(before.inputs)}, {before.projection} and {list(term.inputs)}, {term.projection}; give one of them "
                "another name"
            )
        if term.projection == "none" or term.name in found:
            continue
        key = f"task.terms.{term.name}.inputs"
        for column in term.inputs:
            if column not in shapes:
                raise UserError(f"{key} names {column!r}; there are {', '.join(sorted(shapes))}")
        student, teacher = (list(shapes[column]) for column in term.inputs[:2])
        if len(student) != len(teacher):
            raise UserError(
                f"{key} must be two vectors or two maps, got {term.inputs[0]} {student} and {term.inputs[1]} {teacher}"
            )

        def layer(width_in: int, width_out: int, maps: bool = len(student) == 3) -> nn.Module:
            return nn.Conv2d(width_in, width_out, 1) if maps else nn.Linear(width_in, width_out)

        one = layer(student[0], teacher[0])
        if term.projection == "mlp":
            one = nn.Sequential(
                layer(student[0], teacher[0]), nn.ReLU(), layer(teacher[0], teacher[0])
            )
        found[term.name] = one
    return found


class Teacher(nn.Module):
    """A frozen model, always in eval mode, whose outputs become columns `<name>.<output>` of a batch.

    `order` [K] says at which of the teacher's outputs each of the student's classes stands, -1 where the teacher does
    not know it: what stands at its place means nothing then (Ensemble fills it). `outputs` names the outputs that are
    wanted; None is all.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        order: Sequence[int],
        outputs: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        self.name = name
        self.outputs = outputs
        self.order: Tensor
        self.known_K: Tensor
        self.register_buffer("order", torch.tensor(order), persistent=False)
        self.register_buffer("known_K", torch.tensor(order) >= 0, persistent=False)

    def train(self, mode: bool = True) -> Teacher:
        """A teacher has no training mode: its statistics stay put."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        said = self.model(batch)
        return {
            **batch,
            **{
                f"{self.name}.{output}": self._ordered(value) if output in PER_CLASS else value
                for output, value in said.items()
                if self.outputs is None or output in self.outputs
            },
        }

    def _ordered(self, value: Tensor) -> Tensor:
        """[B, K'] or [B, K', h, w] by the teacher's classes -> by the student's."""
        return value[:, self.order.clamp(min=0)]


PER_CLASS = ("logits", "patch_logits")
"""Outputs with one place a class."""


class Ensemble(nn.Module):
    """Several teachers: each one's columns `<name>.<output>`, and `teacher.logits` of all of them together.

    One class of several: the mean of their probabilities by `weights`, given as log-probabilities (Hinton et al. 2015,
    arXiv:1503.02531, section 3; weighted as in You et al. 2017, doi:10.1145/3097983.3098135). A teacher that knows only
    a part of the classes says how what the others give to that part is to be shared out among them, and nothing about
    the rest: where they see none of its classes, it has no say. So one at least must know all classes.
    Several classes, or two by one logit: of each class the mean probability of those that know it, as its logit.
    """

    def __init__(self, teachers: Sequence[Teacher], weights: Sequence[float], kind: str) -> None:
        super().__init__()
        self.parts = nn.ModuleList(teachers)
        self.teachers = list(teachers)
        self.shares = [w / sum(weights) for w in weights]
        self.kind = kind
        # asked here, where no device has to be waited for
        self.whole = [i for i, t in enumerate(teachers) if bool(t.known_K.all())]

    def train(self, mode: bool = True) -> Ensemble:
        return super().train(False)

    @torch.no_grad()
    def forward(self, batch: Batch) -> Batch:
        logits = []
        for teacher in self.teachers:
            told = teacher({"image": batch["image"]})
            logits.append(told[f"{teacher.name}.logits"].float())
            told.pop("image")
            batch = {**batch, **told}
        known = [teacher.known_K for teacher in self.teachers]
        if self.kind != "single_label":
            return {**batch, "teacher.logits": self._of_each_class(logits, known)}
        said = self._completed(logits, known)
        for teacher, probability_BK in zip(self.teachers, said, strict=True):
            batch[f"{teacher.name}.logits"] = _log(probability_BK)
        whole = sum(share * p for share, p in zip(self.shares, said, strict=True))
        assert isinstance(whole, Tensor)
        return {**batch, "teacher.logits": _log(whole)}

    def _completed(self, logits: Sequence[Tensor], known: Sequence[Tensor]) -> list[Tensor]:
        """Every teacher's probabilities [B,K] of all classes."""
        total = sum(self.shares[i] for i in self.whole)
        base = sum(self.shares[i] / total * logits[i].softmax(dim=1) for i in self.whole)
        assert isinstance(base, Tensor)
        said = []
        for i, (logits_BK, known_K) in enumerate(zip(logits, known, strict=True)):
            if i in self.whole:
                said.append(logits_BK.softmax(dim=1))
                continue
            among_BK = logits_BK.masked_fill(~known_K, -torch.inf).softmax(dim=1)
            mass_B = (base * known_K).sum(dim=1, keepdim=True)
            said.append(torch.where(known_K, among_BK * mass_B, base))
        return said

    def _of_each_class(self, logits: Sequence[Tensor], known: Sequence[Tensor]) -> Tensor:
        share_TK = torch.stack([s * k.float() for s, k in zip(self.shares, known, strict=True)])
        share_TK = share_TK / share_TK.sum(dim=0)
        chance_TBK = torch.stack([x.sigmoid() for x in logits])
        chance_BK = (share_TK[:, None] * chance_TBK).sum(dim=0)
        return torch.logit(chance_BK, eps=1e-6)


def _log(probability_BK: Tensor) -> Tensor:
    return probability_BK.clamp(min=1e-12).log()


def match_classes(
    teacher: Sequence[str],
    student: Sequence[str],
    teacher_run: str,
    overlap: bool = False,
    key: str = "teacher",
) -> list[int]:
    """Where each of the student's classes stands among the teacher's outputs, by name.

    With `overlap` -1 where the teacher does not know the class, and what else it knows does not count. `key`: its place
    in the config. Raises UserError with the difference unless both know the same classes, or with `overlap` any.
    """
    missing, extra = sorted(set(student) - set(teacher)), sorted(set(teacher) - set(student))
    known = list(teacher)
    if overlap and len(missing) < len(set(student)):
        return [known.index(name) if name in set(teacher) else -1 for name in student]
    if missing or extra:
        parts = []
        if missing:
            parts.append(f"the teacher does not know {len(missing)}: {', '.join(missing[:5])}")
        if extra:
            parts.append(f"the data lacks {len(extra)} of the teacher's: {', '.join(extra[:5])}")
        raise UserError(
            f"{key}.run must know {'some of ' if overlap else ''}the classes of the data by the same names, got "
            f"{teacher_run}: {'; '.join(parts)}; train a teacher on these classes, choose classes with data.classes, or, "
            f"where what both know is enough, set {key}.classes=overlap"
        )
    return [known.index(name) for name in student]


def refuse_gaps(known: Mapping[str, Sequence[int]], classes: Sequence[str], kind: str) -> None:
    """Raises UserError unless teachers (`order` by name, see match_classes) know all classes together and, where classes
    exclude each other, one of them knows all."""
    lacking = {n: [c for c, at in zip(classes, o, strict=True) if at < 0] for n, o in known.items()}
    nobody = [c for c in classes if all(c in gaps for gaps in lacking.values())]
    if nobody:
        raise UserError(
            f"teachers must know every class of the data together, and none knows {len(nobody)}: {', '.join(nobody[:5])}; "
            "add a teacher that does, or choose classes with data.classes"
        )
    if kind == "single_label" and all(lacking.values()):
        told = "; ".join(
            f"{n} lacks {len(gaps)}: {', '.join(gaps[:3])}" for n, gaps in lacking.items()
        )
        raise UserError(
            f"one of teachers must know all {len(classes)} classes of the data, or nobody can say how likely another's are "
            f"({told}); add one that does, or choose classes with data.classes"
        )
