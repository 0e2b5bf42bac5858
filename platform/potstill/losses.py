"""Loss functions: pure, one value a sample. Shape suffixes: B samples, K logits (a binary model has one).

A label is int64 [B], or multi-hot [B,K], where a sample may have several classes. A label of -1 says that there is
none: such a sample has some finite value, and whoever sums gives it weight 0.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.errors import UserError

EFFECTIVE_BETA = 0.999
MOST_POSITIVE_WEIGHT = 100.0


def cross_entropy(
    logits_BK: Tensor,
    label_B: Tensor,
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,
) -> Tensor:
    """Cross-entropy with the labels, smoothed as in Szegedy et al. 2015, arXiv:1512.00567. Returns [B], in nats.

    `class_weights` [K] multiply the samples of a class (the smoothed part: each class's own share).
    """
    return F.cross_entropy(
        logits_BK.float(),
        label_B.clamp(min=0),
        weight=class_weights,
        reduction="none",
        label_smoothing=label_smoothing,
    )


def bce(
    logits_BK: Tensor,
    label: Tensor,
    *,
    label_smoothing: float = 0.0,
    reduce_classes: str = "mean",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Binary cross-entropy of every class for itself. Returns [B], in nats: the mean (as timm) or sum over classes.

    For labels of one class as in Wightman et al. 2021, arXiv:2110.00476, whose training mixes labels: a mixed pair's
    two losses by their shares are this loss of the mixed target. Smoothing: one class's 1 becomes 1 - s + s/K and the
    others' 0 becomes s/K; several classes and binary move towards 1/2. `class_weights` [K] multiply the positives.
    """
    target_BK = _targets(label, logits_BK, label_smoothing)
    loss_BK = F.binary_cross_entropy_with_logits(
        logits_BK.float(), target_BK, pos_weight=class_weights, reduction="none"
    )
    return _over_classes(loss_BK, reduce_classes)


def focal(
    logits_BK: Tensor,
    label: Tensor,
    *,
    gamma: float = 2.0,
    alpha: float | None = None,
    label_smoothing: float = 0.0,
    reduce_classes: str = "mean",
    class_weights: Tensor | None = None,
) -> Tensor:
    """(1 - p)^gamma times the cross-entropy -log p of what is true. Lin et al. 2017, arXiv:1708.02002. Returns [B].

    One class of several: p is the softmax's. Multi-hot and binary labels: every class for itself, p of what is true
    of it; `alpha` then weighs what is present and 1 - alpha what is absent (the paper: 0.25), null leaves both at 1.
    `class_weights` and smoothing as in cross_entropy or, where classes stand for themselves, in bce.
    Raises UserError where alpha has no meaning.
    """
    logits_BK = logits_BK.float()
    target_BK = _targets(label, logits_BK, label_smoothing)
    if _one_of_several(label, logits_BK):
        if alpha is not None:
            raise UserError(
                f"task.terms.*.alpha must be null with focal and one class of several, got {alpha:g}; use class_weights"
            )
        log_BK = logits_BK.log_softmax(dim=1)
        loss_BK = -target_BK * _power(1 - log_BK.exp(), gamma) * log_BK
        return (loss_BK if class_weights is None else loss_BK * class_weights).sum(dim=1)
    log_yes_BK, log_no_BK = F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK)
    yes_BK = -torch.exp(gamma * log_no_BK) * log_yes_BK
    no_BK = -torch.exp(gamma * log_yes_BK) * log_no_BK
    if alpha is not None:
        yes_BK, no_BK = alpha * yes_BK, (1 - alpha) * no_BK
    return _of_each_class(target_BK, yes_BK, no_BK, class_weights, reduce_classes)


def asymmetric(
    logits_BK: Tensor,
    label: Tensor,
    *,
    gamma_neg: float = 4.0,
    gamma_pos: float = 1.0,
    clip: float = 0.05,
    label_smoothing: float = 0.0,
    reduce_classes: str = "sum",
    class_weights: Tensor | None = None,
) -> Tensor:
    """Asymmetric loss: what is absent counts less the surer it is. Ridnik et al. 2020, arXiv:2009.14119. Returns [B].

    Multi-hot and binary labels: (1-p)^gamma_pos · -log p of what is present, q^gamma_neg · -log(1-q) of what is absent,
    where q = max(p - clip, 0); summed over classes, as in the paper, or their mean. One class of several: the authors'
    variant for it (timm's AsymmetricLossSingleLabel) on the softmax, always summed; there gamma_neg acts through
    `label_smoothing` alone (timm: 0.1). `class_weights` as in bce.
    """
    logits_BK = logits_BK.float()
    target_BK = _targets(label, logits_BK, label_smoothing)
    if _one_of_several(label, logits_BK):
        log_BK = logits_BK.log_softmax(dim=1)
        probability_BK = log_BK.exp()
        focus_BK = torch.where(
            _targets(label, logits_BK) > 0,
            _power(1 - probability_BK, gamma_pos),
            _power(probability_BK, gamma_neg),
        )
        loss_BK = -target_BK * focus_BK * log_BK
        return (loss_BK if class_weights is None else loss_BK * class_weights).sum(dim=1)
    log_yes_BK, log_no_BK = F.logsigmoid(logits_BK), F.logsigmoid(-logits_BK)
    probability_BK = logits_BK.sigmoid()
    yes_BK = -torch.exp(gamma_pos * log_no_BK) * log_yes_BK
    if clip > 0:
        log_no_BK = (1 - probability_BK + clip).clamp(max=1.0).log()
    no_BK = -_power((probability_BK - clip).clamp(min=0.0), gamma_neg) * log_no_BK
    return _of_each_class(target_BK, yes_BK, no_BK, class_weights, reduce_classes)


def kl(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² · KL(teacher_T ‖ student_T) of the softened outputs; no gradient reaches the teacher.

    Hinton et al. 2015, arXiv:1503.02531; the factor T² keeps the gradient's size as T changes.
    Returns [B], in nats.
    """
    student_log_BK = F.log_softmax(student_BK.float() / temperature, dim=1)
    teacher_log_BK = F.log_softmax(teacher_BK.detach().float() / temperature, dim=1)
    divergence_BK = F.kl_div(student_log_BK, teacher_log_BK, reduction="none", log_target=True)
    return divergence_BK.sum(dim=1) * temperature**2


def kl_sigmoid(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² · KL(teacher_T ‖ student_T) of outputs that each stand for themselves, mean over classes: for several labels
    and for two classes by one logit. No gradient reaches the teacher.

    Hinton et al. 2015, arXiv:1503.02531, with a Bernoulli variable a class in the place of the softmax
    (Yang et al. 2023, arXiv:2308.06453, section 3.2). Returns [B], in nats.
    """
    student_BK, teacher_BK = (x.float() / temperature for x in (student_BK, teacher_BK.detach()))
    yes_BK = teacher_BK.sigmoid()
    of_yes_BK = yes_BK * (F.logsigmoid(teacher_BK) - F.logsigmoid(student_BK))
    of_no_BK = (1 - yes_BK) * (F.logsigmoid(-teacher_BK) - F.logsigmoid(-student_BK))
    return (of_yes_BK + of_no_BK).mean(dim=1) * temperature**2


LOSSES: dict[str, Callable[..., Tensor]] = {
    "cross_entropy": cross_entropy,
    "bce": bce,
    "focal": focal,
    "asymmetric": asymmetric,
    "kl": kl,
    "kl_sigmoid": kl_sigmoid,
}


def _one_of_several(label: Tensor, logits_BK: Tensor) -> bool:
    return label.ndim == 1 and logits_BK.shape[1] > 1


def _targets(label: Tensor, logits_BK: Tensor, smoothing: float = 0.0) -> Tensor:
    """What each logit should say, float [B,K]."""
    if _one_of_several(label, logits_BK):
        classes = logits_BK.shape[1]
        target_BK = F.one_hot(label.clamp(min=0), classes).float()
        return target_BK * (1 - smoothing) + smoothing / classes
    target_BK = label.clamp(min=0).float().view(len(label), -1)
    return target_BK * (1 - smoothing) + smoothing / 2


def _power(base: Tensor, exponent: float) -> Tensor:
    """base^exponent for bases >= 0, whose gradient is finite at 0 for exponents below 1 too."""
    return base if exponent == 1 else base.clamp(min=1e-8) ** exponent


def _of_each_class(
    target_BK: Tensor, yes_BK: Tensor, no_BK: Tensor, weights_K: Tensor | None, how: str
) -> Tensor:
    """The losses of what is present and of what is absent, by how much of each there is; [B]."""
    yes_BK = yes_BK if weights_K is None else yes_BK * weights_K
    return _over_classes(target_BK * yes_BK + (1 - target_BK) * no_BK, how)


def _over_classes(loss_BK: Tensor, how: str) -> Tensor:
    if how not in ("mean", "sum"):
        raise UserError(f"task.terms.*.reduce_classes must be mean or sum, got {how!r}")
    return loss_BK.mean(dim=1) if how == "mean" else loss_BK.sum(dim=1)


def class_weights(
    spec: str | Sequence[float],
    counts_K: Tensor,
    kind: str = "single_label",
    samples: int | None = None,
) -> Tensor:
    """What the `class_weights` of a config stand for, float32. `counts_K`: training samples that have each class.

    single_label: [K], scaled so that its mean over the training samples is 1. balanced: 1/n of a class of n samples.
    effective: (1 - b)/(1 - b^n), b = 0.999: Cui et al. 2019, arXiv:1901.05555. A list is scaled, too.
    multi_label: [K], what the present ones of a class are multiplied by: the absent ones' number over the present
    ones' (effective: their effective numbers), at most 100; a list is taken as it is. Needs `samples`, their number
    in all. binary: the same [1] for class 1, from `counts_K` [2]; a list gives the weights of both classes.
    A class without a sample has weight 1.
    """
    counts_K = torch.as_tensor(counts_K, dtype=torch.float64)
    given_K = None if isinstance(spec, str) else torch.tensor(list(spec), dtype=torch.float64)
    if kind == "single_label":
        weight_K = given_K if given_K is not None else 1 / _amount(counts_K, str(spec))
        weight_K = torch.where(counts_K > 0, weight_K, 0.0)
        mean = (weight_K * counts_K).sum() / counts_K.sum()
        if not mean > 0:
            raise UserError(
                f"task.terms.*.class_weights must be > 0 for a class that there are images of, got {spec}"
            )
        return torch.where(counts_K > 0, weight_K / mean, 1.0).float()
    if kind == "binary":
        absent_K, present_K = counts_K[:1], counts_K[1:]
        if given_K is not None:
            absent_K, present_K, spec = given_K[1:], given_K[:1], "balanced"
    else:
        if given_K is not None:
            return given_K.float()
        assert samples is not None, "class_weights: multi_label needs the number of samples"
        absent_K, present_K = samples - counts_K, counts_K
    ratio_K = _amount(absent_K, str(spec)) / _amount(present_K, str(spec))
    ratio_K = torch.where((present_K > 0) & (absent_K > 0), ratio_K, 1.0)
    return ratio_K.clamp(max=MOST_POSITIVE_WEIGHT).float()


def _amount(counts: Tensor, spec: str) -> Tensor:
    """How much so many samples are worth: their number, or their effective number."""
    return counts if spec == "balanced" else (1 - EFFECTIVE_BETA**counts) / (1 - EFFECTIVE_BETA)
