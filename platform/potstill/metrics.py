"""What is measured: sample-weighted means and torchmetrics collections, over all ranks.

Shapes: B samples, K classes, N samples of a split.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassF1Score


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


class Meter:
    """Means of an epoch over every sample of every rank; the one place where numbers are averaged.

    `compute()` returns loss, top1_acc, top5_acc (percent) and what else was asked for. It is collective.
    """

    def __init__(
        self,
        num_classes: int,
        device: torch.device,
        terms: Iterable[str] = (),
        macro_f1: bool = False,
    ) -> None:
        options: dict[str, Any] = {"num_classes": num_classes, "validate_args": False}
        accuracies: dict[str, Any] = {
            "top1_acc": MulticlassAccuracy(top_k=1, average="micro", **options),
            "top5_acc": MulticlassAccuracy(top_k=top_k(num_classes), average="micro", **options),
        }
        if macro_f1:
            accuracies["macro_f1"] = MulticlassF1Score(average="macro", **options)
        self.classified = MetricCollection(accuracies, compute_groups=False).to(device)
        self.classified.persistent(True)
        self.means = MetricCollection(
            {name: WeightedMean() for name in ("loss", *(f"term/{t}" for t in terms))},
            compute_groups=False,
        ).to(device)

    def update_mean(self, name: str, value: Tensor, weight: Tensor) -> None:
        """`value` and `weight`: both [] or both [B]."""
        self.means[name].update(value, weight)

    def update_classified(
        self, logits_BK: Tensor, label_B: Tensor, weight_B: Tensor, padded: bool
    ) -> None:
        """`padded`: whether some weights are 0; those samples are left out."""
        if padded:
            real = weight_B > 0
            logits_BK, label_B = logits_BK[real], label_B[real]
        if len(label_B):
            self.classified.update(logits_BK.float(), label_B)

    def compute(self) -> dict[str, float]:
        values = {k: float(v) for k, v in self.means.compute().items()}
        values.update({k: 100.0 * float(v) for k, v in self.classified.compute().items()})
        return values

    def state(self) -> dict[str, Tensor]:
        """The sums over all ranks so far. Collective."""
        sums = {}
        for prefix, collection in (("means.", self.means), ("classified.", self.classified)):
            for name, value in collection.state_dict().items():
                total = value.clone()
                if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
                    dist.all_reduce(total)
                sums[prefix + name] = total.cpu()
        return sums

    def load_state(self, sums: dict[str, Tensor], rank: int) -> None:
        """Rank 0 takes up the sums of all; the others start from nothing."""
        if rank == 0:
            self.means.load_state_dict(
                {k[6:]: v for k, v in sums.items() if k.startswith("means.")}
            )
            self.classified.load_state_dict(
                {k[11:]: v for k, v in sums.items() if k.startswith("classified.")}
            )
            for collection in (self.means, self.classified):
                for metric in collection.values():
                    metric._update_count = 1  # it has been updated, in the life before


@dataclass(frozen=True)
class Predictions:
    """What a model says of a split, in the order of sample ids. `prediction` and `label` are class indices."""

    id: np.ndarray
    label: np.ndarray
    prediction: np.ndarray
    confidence: np.ndarray

    def arrays(self) -> dict[str, np.ndarray]:
        return {
            "id": self.id,
            "label": self.label,
            "prediction": self.prediction,
            "confidence": self.confidence,
        }


@torch.inference_mode()
def evaluate(
    predict: Callable[[dict[str, Tensor]], Tensor],
    batches: Iterable[tuple[dict[str, Tensor], bool]],
    num_classes: int,
    device: torch.device,
    autocast: Callable[[], AbstractContextManager],
) -> tuple[dict[str, float], Predictions]:
    """Run `predict(batch) -> logits [B,K]` over a split. `batches`: (batch on the device, whether it is padded).

    Returns loss (cross-entropy without smoothing, so that every model is measured by the same), top1_acc,
    top5_acc, macro_f1 (percent), and the predictions of all ranks. Collective.
    """
    meter = Meter(num_classes, device, macro_f1=True)
    columns: list[tuple[Tensor, ...]] = []
    for batch, padded in batches:
        weight_B = batch["weight"]
        with autocast():
            logits_BK = predict(batch).float()
        loss_B = F.cross_entropy(logits_BK, batch["label"], reduction="none")
        meter.update_mean("loss", loss_B, weight_B)
        meter.update_classified(logits_BK, batch["label"], weight_B, padded)
        confidence_B, prediction_B = logits_BK.softmax(dim=1).max(dim=1)
        said = (batch["id"], batch["label"], prediction_B, confidence_B)
        columns.append(tuple(c[weight_B > 0] for c in said) if padded else said)
    joined = [torch.cat(c).cpu().numpy() for c in zip(*columns, strict=True)] if columns else []
    joined = _gather(joined)
    order = np.argsort(joined[0], kind="stable")
    ids, label, prediction, confidence = (c[order] for c in joined)
    found = Predictions(
        ids, label.astype(np.int32), prediction.astype(np.int32), confidence.astype(np.float32)
    )
    return meter.compute(), found


def _gather(columns: list[np.ndarray]) -> list[np.ndarray]:
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return columns
    parts: list[list[np.ndarray]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(parts, columns)
    return [np.concatenate(c) for c in zip(*(p for p in parts if p), strict=True)]
