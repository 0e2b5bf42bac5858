"""Loss functions: pure, one value a sample. Shapes: B samples, K classes."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits_BK: Tensor, label_B: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the labels, smoothed as in Szegedy et al. 2015, arXiv:1512.00567. Returns [B], in nats."""
    return F.cross_entropy(
        logits_BK.float(), label_B, reduction="none", label_smoothing=label_smoothing
    )


def kl(student_BK: Tensor, teacher_BK: Tensor, *, temperature: float = 4.0) -> Tensor:
    """T² · KL(teacher_T ‖ student_T) of the softened outputs; no gradient reaches the teacher.

    Hinton et al. 2015, arXiv:1503.02531; the factor T² keeps the gradient's size as T changes.
    Returns [B], in nats.
    """
    student_log_BK = F.log_softmax(student_BK.float() / temperature, dim=1)
    teacher_log_BK = F.log_softmax(teacher_BK.detach().float() / temperature, dim=1)
    divergence_BK = F.kl_div(student_log_BK, teacher_log_BK, reduction="none", log_target=True)
    return divergence_BK.sum(dim=1) * temperature**2


LOSSES: dict[str, Callable[..., Tensor]] = {"cross_entropy": cross_entropy, "kl": kl}
