"""What is measured: sums over batches and ranks, and evaluate().

Loss, top-1 and top-5 are summed while batches pass; so is what needs every probability of a single-label model, in
memory that does not grow with the samples. The rest follows from the predictions that evaluate() gathers
(predictions.py).

The sums are torchmetrics', its own metrics are not: those of many classes count K x K pairs at every update, go
through thresholds one by one, and let classes without a sample count as 0 (tests/test_metrics.py compares).

Shape suffixes: B samples, K logits (a binary model has one), C bins of score, N samples of a split.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection

from potstill import losses
from potstill.metric_names import ALWAYS
from potstill.predictions import (
    Predictions,
    binary_predictions,
    measure,
    multi_label_predictions,
)

AREAS = ("auc", "average_precision")


def top_k(num_classes: int) -> int:
    """The k of "top5": 5, or one less than the number of classes, where top-5 would always be right."""
    return max(1, min(5, num_classes - 1))


class WeightedMean(Metric):
    """Mean of values by their weights, in float64; NaN stays NaN.

    torchmetrics' MeanMetric forgets the weights where it is told to let NaN through.
    """

    total: Tensor
    weight: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("total", "weight"):
            self.add_state(
                name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum", persistent=True
            )

    def update(self, value: Tensor, weight: Tensor) -> None:
        """`value` and `weight`: both [] or both [B]."""
        self.total += (value.double() * weight.double()).sum()
        self.weight += weight.double().sum()

    def compute(self) -> Tensor:
        return self.total / self.weight


class OneVsRest(Metric):
    """AUC and average precision of each class against the rest, as means over the classes with a sample.

    From histograms of log p/(1-p) in 512 bins of 0.07 from -18 to 18; within a bin, own samples and the rest count as
    evenly mixed, which moves the means by less than 0.001. Two int32 [K, 512]: 29 MB for 7,120 classes, whatever the
    number of samples.
    """

    BINS, SPAN = 512, 18.0
    full_state_update = False
    own: Tensor
    whole: Tensor

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        for name in ("own", "whole"):
            zeros = torch.zeros(num_classes, self.BINS, dtype=torch.int32)
            self.add_state(name, zeros, dist_reduce_fx="sum", persistent=True)

    def update(self, logits_BK: Tensor, label_B: Tensor) -> None:
        log_BK = logits_BK.float().log_softmax(dim=1)
        odds_BK = log_BK - torch.log(-torch.expm1(log_BK))  # infinite for a probability of 1
        odds_BK = odds_BK.nan_to_num_(nan=-self.SPAN).clamp_(-self.SPAN, self.SPAN)
        place_BK = odds_BK.add_(self.SPAN).mul_(self.BINS / (2 * self.SPAN)).long()
        place_BK.clamp_(max=self.BINS - 1)
        place_BK += torch.arange(len(self.whole), device=place_BK.device) * self.BINS
        of_label_B = place_BK.gather(1, label_B[:, None])
        one = torch.ones((), dtype=torch.int32, device=place_BK.device)
        for state, place in ((self.whole, place_BK), (self.own, of_label_B)):
            state.view(-1).scatter_add_(0, place.flatten(), one.expand(place.numel()))

    def compute(self) -> dict[str, Tensor]:
        chunks = zip(self.own.split(1024), self.whole.split(1024), strict=True)
        areas = [torch.cat(a) for a in zip(*(self._areas(*c) for c in chunks), strict=True)]
        return {name: a.nanmean() for name, a in zip(AREAS, areas, strict=True)}

    @staticmethod
    def _areas(own_KC: Tensor, whole_KC: Tensor) -> tuple[Tensor, Tensor]:
        """Both [K]; NaN for a class without a sample, or with all of them."""
        own_KC = own_KC.flip(1).double()  # the highest scores first
        rest_KC = whole_KC.flip(1).double() - own_KC
        true_KC, false_KC = own_KC.cumsum(1), rest_KC.cumsum(1)
        own_K, rest_K = true_KC[:, -1], false_KC[:, -1]
        # of each own sample, the share of the rest that stands below it; half of what stands beside it
        below_KC = rest_K[:, None] - false_KC + rest_KC / 2
        auc_K = (own_KC * below_KC).sum(1) / (own_K * rest_K)
        # the precision at the middle of a bin's own samples, had it mixed them evenly with the rest
        middle_KC = true_KC - own_KC / 2 + 0.5
        precision_KC = middle_KC / (middle_KC + false_KC - rest_KC / 2)
        precision_K = (own_KC * precision_KC).sum(1) / own_K
        return auc_K, precision_K


class Meter:
    """Means of an epoch over every sample of every rank; the one place where batches are averaged.

    `compute()` returns loss, top1_acc, top5_acc (percent) and what else was asked for. It is collective.

    `kind`: single_label | multi_label | binary. `num_classes` counts class names: 2 for binary, whose model has one
    logit. `terms`: further means, as `term/<name>`. `metrics`: those of metric_names.py that cannot be had from
    predictions; the rest is passed over here.
    """

    def __init__(
        self,
        kind: str,
        num_classes: int,
        device: torch.device,
        terms: Iterable[str] = (),
        metrics: Sequence[str] = (),
    ) -> None:
        self.kind, self.top_k = kind, top_k(num_classes)
        one_class = kind == "single_label"
        self.wanted = [n for n in metrics if n == "brier" or (n in AREAS and one_class)]
        means = ("loss", *(f"term/{t}" for t in terms), "top1_acc", "top5_acc")
        sums: dict[str, Any] = {name: WeightedMean() for name in means}
        if "brier" in self.wanted:
            sums["brier"] = WeightedMean()
        if set(AREAS) & set(self.wanted):
            sums["areas"] = OneVsRest(num_classes)
        self.sums = MetricCollection(sums, compute_groups=False).to(device)

    def update_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        """`value` and `weight`: both [] or both [B]."""
        self.sums[name].update(value, weight)

    def update_classified(
        self, logits_BK: Tensor, label: Tensor, weight_B: Tensor, padded: bool
    ) -> None:
        """`label`: int64 [B], or multi-hot [B,K]. Each sample counts once, but not with weight 0 or a label of -1.

        `padded`: whether there are such samples. In a multi-label task those without any true class have nothing to
        hit, and are left out of top-1 and top-5.
        """
        if padded:
            real_B = (weight_B > 0) & (label.view(len(label), -1)[:, 0] >= 0)
            logits_BK, label = logits_BK[real_B], label[real_B]
        logits_BK = logits_BK.float()
        best_B5, hittable_B = self._hits(logits_BK, label)
        counted_B = torch.ones_like(hittable_B)
        self.sums["top1_acc"].update(best_B5[:, 0], hittable_B)
        self.sums["top5_acc"].update(best_B5.any(dim=1), hittable_B)
        if "brier" in self.wanted:
            self.sums["brier"].update(_squared_error(self.kind, logits_BK, label), counted_B)
        if "areas" in self.sums:
            self.sums["areas"].update(logits_BK, label)

    def _hits(self, logits_BK: Tensor, label: Tensor) -> tuple[Tensor, Tensor]:
        """Whether each of the best classes is true [B, up to 5], and which samples have one to hit [B]."""
        if self.kind == "binary":
            return ((logits_BK > 0) == (label[:, None] == 1)), label >= 0
        best_B5 = logits_BK.topk(self.top_k, dim=1).indices
        if self.kind == "multi_label":
            return label.gather(1, best_B5) > 0.5, (label > 0.5).any(dim=1)
        return best_B5 == label[:, None], label >= 0

    def compute(self) -> dict[str, float]:
        values = {name: float(v) for name, v in self.sums.compute().items()}
        hidden = set(AREAS) - set(self.wanted)
        percent = ("top1_acc", "top5_acc")
        return {n: 100.0 * v if n in percent else v for n, v in values.items() if n not in hidden}

    def state(self) -> dict[str, Tensor]:
        """The sums over all ranks so far. Collective."""
        sums = {}
        for name, value in self.sums.state_dict().items():
            total = value.clone()
            if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                dist.all_reduce(total)
            sums[name] = total.cpu()
        return sums

    def load_state(self, sums: dict[str, Tensor], rank: int) -> None:
        """Rank 0 takes up the sums of all; the others start from nothing."""
        if rank == 0:
            self.sums.load_state_dict(sums)
            for metric in self.sums.values():
                metric._update_count = 1  # it has been updated, in the life before


def _squared_error(kind: str, logits_BK: Tensor, label: Tensor) -> Tensor:
    """Brier 1950, Mon. Weather Rev. 78:1. Returns [B]: the sum over classes of single_label, else their mean."""
    if kind == "single_label":
        truth_BK = F.one_hot(label.clamp(min=0), logits_BK.shape[1])
        return (logits_BK.softmax(dim=1) - truth_BK).square().sum(dim=1)
    truth_BK = label.float()[:, None] if kind == "binary" else label
    return (logits_BK.sigmoid() - truth_BK).square().mean(dim=1)


def mean_of_views(views: Sequence[Tensor], kind: str) -> Tensor:
    """Logits [B,K] of the mean of the probabilities that several views of the same images were given."""
    if len(views) == 1:
        return views[0]
    logits_VBK = torch.stack(list(views)).float()
    if kind == "single_label":
        return logits_VBK.log_softmax(dim=2).logsumexp(dim=0) - math.log(len(views))
    yes_BK, no_BK = (F.logsigmoid(x).logsumexp(dim=0) for x in (logits_VBK, -logits_VBK))
    return yes_BK - no_BK


def over_views(
    model: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    batch: dict[str, Tensor],
    views: Iterable[Tensor],
    kind: str,
) -> Tensor:
    """Logits [B,K] of a batch by several views [B,3,h,w] of its images, one after another: see `mean_of_views`."""
    said = [model({**batch, "image": view})["logits"].float() for view in views]
    return mean_of_views(said, kind)


@torch.inference_mode()
def evaluate(
    predict: Callable[[dict[str, Tensor]], Tensor],
    batches: Iterable[tuple[dict[str, Tensor], bool]],
    kind: str,
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
    metrics: Sequence[str] = (),
    threshold: str | float | np.ndarray = 0.5,
) -> tuple[dict[str, float], Predictions]:
    """Run `predict(batch) -> logits [B,K]` over a split. `batches`: (batch on the device, whether some of its
    `label_weight` are 0).

    Returns loss, top1_acc, top5_acc, macro_f1 and `metrics` (metric_names.py), and the predictions of all ranks.
    The loss is the mean by `label_weight` of cross-entropy without smoothing, or of binary cross-entropy averaged
    over classes, so that every model is measured by the same; all else counts each labelled sample once. Binary and
    multi-label: what needs a decision takes it at `threshold`, see predictions.choose_thresholds; given as an array
    [1] or [K] it was chosen before, elsewhere. Collective.
    """
    meter = Meter(kind, num_classes, device, metrics=metrics)
    loss_of = losses.cross_entropy if kind == "single_label" else losses.bce
    columns: list[tuple[Tensor, ...]] = []
    for batch, padded in batches:
        label, weight_B = batch["label"], batch["label_weight"]
        with autocast():
            logits_BK = predict(batch).float()
        meter.update_mean("loss", loss_of(logits_BK, label), weight_B)
        meter.update_classified(logits_BK, label, weight_B, padded)
        said = (batch["id"], label, *_said(kind, logits_BK))
        columns.append(tuple(c[weight_B > 0] for c in said) if padded else said)
    joined = [torch.cat(c).cpu().numpy() for c in zip(*columns, strict=True)] if columns else []
    joined = _gather(joined)
    order = np.argsort(joined[0], kind="stable")
    found = _predictions(kind, [c[order] for c in joined], threshold)
    names = dict.fromkeys((*ALWAYS, *metrics))
    values = {**meter.compute(), **measure(found, num_classes, names)}
    return {name: values[name] for name in ("loss", *names)}, found


def _said(kind: str, logits_BK: Tensor) -> tuple[Tensor, ...]:
    """The columns that a kind's predictions are made of, besides id and label."""
    if kind == "binary":
        return (logits_BK[:, 0].sigmoid(),)
    probability_BK = logits_BK.softmax(dim=1) if kind == "single_label" else logits_BK.sigmoid()
    confidence_B, prediction_B = probability_BK.max(dim=1)
    if kind == "single_label":
        return prediction_B, confidence_B
    return prediction_B, confidence_B, probability_BK.half()


def _predictions(
    kind: str, columns: list[np.ndarray], threshold: str | float | np.ndarray
) -> Predictions:
    if kind == "binary":
        ids, label, score = columns
        return binary_predictions(ids, label, score, threshold)
    if kind == "multi_label":
        ids, targets, prediction, confidence, scores = columns
        return multi_label_predictions(
            ids, targets > 0.5, scores, prediction, confidence, threshold
        )
    ids, label, prediction, confidence = columns
    return Predictions(
        ids, label.astype(np.int32), prediction.astype(np.int32), confidence.astype(np.float32)
    )


def _gather(columns: list[np.ndarray]) -> list[np.ndarray]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return columns
    parts: list[list[np.ndarray]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, columns)
    return [np.concatenate(c) for c in zip(*(p for p in parts if p), strict=True)]
