"""Distillation losses. Shape suffixes: B samples, K logits, D features, C channels, HW the grid of a map.

Sample scope: `f(student, teacher, *, options) -> [B]`. Batch scope (BATCH_SCOPE): `f(student, teacher, weight_B, *,
options) -> []` over the global batch, which the caller has gathered: weights weigh rows, and a row of weight 0 does
not exist. All count in fp32 whatever comes in, and no gradient reaches a teacher. `losses.kl` and `losses.kl_sigmoid`
are the plain ones.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from potstill.errors import UserError
from potstill.losses import bce, cross_entropy, kl, kl_sigmoid

Windows = tuple[tuple[int, int], ...]
"""For each cell of a coarser axis, which of the finer axis it is the mean of: [start, stop)."""

LEAST_VARIATION = 1e-3
LEAST_MEAN = 1e-20
ELEMENTS_AT_ONCE = 2**24


def dkd(
    student_BK: Tensor,
    teacher_BK: Tensor,
    label_B: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
) -> Tensor:
    """Decoupled knowledge distillation, T² · (alpha · TCKD + beta · NCKD). Zhao et al. 2022, arXiv:2203.08679.

    TCKD compares how sure both are of the label, NCKD how they rank the other classes among themselves; plain `kl`
    is TCKD + (1 - p) · NCKD, p the teacher's softened probability of the label: the surer the teacher, the less is
    learned of the rest. The paper: beta 8 on CIFAR, 0.5 on ImageNet. A row without a label (-1) is compared at the
    teacher's own first class. Returns [B], in nats. Raises UserError unless both have the same K >= 2 classes.
    """
    _check_classes(student_BK, teacher_BK, least=2)
    _check_positive("temperature", temperature)
    label_B = torch.where(label_B < 0, teacher_BK.argmax(dim=1), label_B)
    others = torch.arange(student_BK.shape[1] - 1, device=label_B.device).expand(len(label_B), -1)
    others = others + (others >= label_B[:, None])

    def parts(logits_BK: Tensor) -> tuple[Tensor, Tensor]:
        """The label against all others together, as one logit [B,1]; and the others [B,K-1]."""
        rest = logits_BK.float().gather(1, others)
        own_B1 = logits_BK.float().gather(1, label_B[:, None]) / temperature
        return own_B1 - (rest / temperature).logsumexp(dim=1, keepdim=True), rest

    student_own, student_rest = parts(student_BK)
    teacher_own, teacher_rest = parts(teacher_BK)
    of_label_B = temperature**2 * kl_sigmoid(student_own, teacher_own, temperature=1.0)
    of_rest_B = kl(student_rest, teacher_rest, temperature=temperature)
    return alpha * of_label_B + beta * of_rest_B


def dist(
    student_BK: Tensor,
    teacher_BK: Tensor,
    weight_B: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    """DIST: one minus Pearson's correlation of the probabilities. Huang et al. 2022, arXiv:2205.10536. Returns [].

    beta · between the classes of a sample (the weighted mean over samples) + gamma · between the samples of a class
    (the mean over classes; 0 with fewer than two samples), times T², as in the authors' code. Probabilities moved or
    scaled by a constant cost nothing. The paper: beta = gamma = 2 at T = 1 on ImageNet, T = 4 on CIFAR.
    What varies by less than a thousandth of its mean counts as constant: no correlation, and a gradient that stays
    finite where a student's head starts at zero. Raises UserError unless both have the same K >= 2 classes.
    """
    _check_classes(student_BK, teacher_BK, least=2)
    _check_positive("temperature", temperature)
    student_BK, teacher_BK = _existing(*_fp32(student_BK, teacher_BK), weight_B)
    student_BK, teacher_BK = ((x / temperature).softmax(dim=1) for x in (student_BK, teacher_BK))
    weight_B1 = weight_B.float()[:, None]
    one = torch.ones_like(weight_B1)
    inter = _mean(1 - _correlation(student_BK, teacher_BK, one, dim=1), weight_B1[:, 0])
    intra = (1 - _correlation(student_BK, teacher_BK, weight_B1, dim=0)).mean()
    intra = intra * ((weight_B > 0).sum() >= 2)
    return temperature**2 * (beta * inter + gamma * intra)


def hard_labels(student_BK: Tensor, teacher_BK: Tensor, *, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy with the teacher's first class. Touvron et al. 2020, arXiv:2012.12877, section 3. Returns [B], in
    nats. Raises UserError unless both have the same classes.
    """
    _check_classes(student_BK, teacher_BK, least=2)
    return cross_entropy(student_BK, teacher_BK.argmax(dim=1), label_smoothing=label_smoothing)


def hard_labels_sigmoid(
    student_BK: Tensor, teacher_BK: Tensor, *, label_smoothing: float = 0.0
) -> Tensor:
    """`hard_labels` of outputs that each stand for themselves: present where the teacher's logit is above 0. For
    several labels and for two classes by one logit. Returns [B], in nats, the mean over classes.

    Touvron et al. 2020, arXiv:2012.12877, with a Bernoulli variable a class. Smoothing moves towards 1/2. Raises
    UserError unless both have the same classes.
    """
    _check_classes(student_BK, teacher_BK, least=1)
    return bce(student_BK, (teacher_BK > 0).float(), label_smoothing=label_smoothing)


def feature_mse(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error of features [B,D] or maps [B,C,H,W], already projected to the teacher's width; [B].

    Romero et al. 2014, arXiv:1412.6550 (FitNets), with the mean over all values in the place of half their sum.
    Maps of different size are both averaged to the smaller grid. Raises UserError where the width differs.
    """
    student, teacher = _same_width(student, teacher, "the projection must end in the teacher's")
    return (student - teacher).square().flatten(1).mean(dim=1)


def feature_cosine(student: Tensor, teacher: Tensor) -> Tensor:
    """1 - cosine of features [B,D] or, at each position, of maps [B,C,H,W] (their mean), projected already; [B].

    Sanh et al. 2019, arXiv:1910.01108 (DistilBERT aligns hidden states so). Maps of different size are both averaged
    to the smaller grid first. What is exactly zero has no direction: it costs 1 and has no gradient. Raises
    UserError where the width differs.
    """
    student, teacher = _same_width(student, teacher, "the projection must end in the teacher's")
    cosine = (_unit(student, dim=1) * _unit(teacher, dim=1)).sum(dim=1)
    return 1 - cosine.reshape(len(cosine), -1).mean(dim=1)


def attention(student_BCHW: Tensor, teacher_BCHW: Tensor, *, p: float = 2.0) -> Tensor:
    """Squared distance of the attention maps, sum over channels of |A|^p, each scaled to length 1. Returns [B], 0 to 2.

    Zagoruyko & Komodakis 2016, arXiv:1612.03928, activation-based; p = 2 is theirs. Any numbers of channels. Maps of
    different size: both attention maps are averaged to the smaller grid. The sum over positions, as in the paper:
    the authors' code takes their mean, so its weight of 1000 is 1000 / (h · w) here. Raises UserError where an input
    is no map.
    """
    if student_BCHW.ndim != 4 or teacher_BCHW.ndim != 4:
        raise _refusal(
            "be maps [B,C,H,W] with attention", student_BCHW, teacher_BCHW, "name a map output"
        )
    if not p >= 1:
        raise UserError(f"task.terms.*.p must be >= 1 with attention, got {p:g}; the paper has 2")

    def seen(map_BCHW: Tensor) -> Tensor:
        """[B,1,H,W]; scaled first, so that no power overflows: the length is set later anyway."""
        most = map_BCHW.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
        scaled = map_BCHW / torch.where(most > 0, most, 1.0)
        return scaled.abs().pow(p).mean(dim=1, keepdim=True)

    student, teacher = _fp32(student_BCHW, teacher_BCHW)
    student, teacher = _aligned(seen(student), seen(teacher))
    student, teacher = _unit(student.flatten(1), dim=1), _unit(teacher.flatten(1), dim=1)
    return (student - teacher).square().sum(dim=1)


def rkd_distance(student_BD: Tensor, teacher_BD: Tensor, weight_B: Tensor) -> Tensor:
    """Huber loss of the distances between samples, each over its mean. Park et al. 2019, arXiv:1904.05068. Returns [].

    The weighted mean over pairs of two different rows (the authors' code counts a row with itself, too, at 0);
    fewer than two rows: 0. Widths may differ. Takes B² values. Raises UserError where an input is not [B,D].
    """
    _check_vectors(student_BD, teacher_BD, "rkd_distance")
    student_BD, teacher_BD = _existing(*_fp32(student_BD, teacher_BD), weight_B)
    weight_B = weight_B.float()
    pair_BB = weight_B[:, None] * weight_B * _off_diagonal(weight_B)

    def relative(x_BD: Tensor) -> Tensor:
        # by differences: the shortcut by products is wrong for rows that nearly coincide
        apart_BB = torch.cdist(x_BD, x_BD, compute_mode="donot_use_mm_for_euclid_dist")
        mean = _mean(apart_BB, pair_BB)
        return apart_BB / torch.where(mean > 0, mean, 1.0)

    loss_BB = F.smooth_l1_loss(relative(student_BD), relative(teacher_BD), reduction="none")
    return _mean(loss_BB, pair_BB)


def rkd_angle(student_BD: Tensor, teacher_BD: Tensor, weight_B: Tensor) -> Tensor:
    """Huber loss of the cosine of the angle that two samples make at a third. Park et al. 2019, arXiv:1904.05068.
    Returns [].

    The weighted mean over triples of three different rows (the authors' code counts all B³); fewer than three rows:
    0. Two rows in one place have no direction: cosine 0, no gradient. Widths may differ. B³ · D operations; a tensor
    takes 64 MB at most (or B · max(B, D) values, if these are more): beyond that the angles are made in parts, and
    again on the way back. The paper weighs it 2 : 1 with rkd_distance. Raises UserError where an input is not [B,D].
    """
    _check_vectors(student_BD, teacher_BD, "rkd_angle")
    student_BD, teacher_BD = _existing(*_fp32(student_BD, teacher_BD), weight_B)
    share_B = weight_B.float() / weight_B.float().sum().clamp(min=1e-12)
    two_BB = share_B[:, None] * share_B * _off_diagonal(share_B)
    apart_BB = _off_diagonal(share_B)

    def part(student_BD: Tensor, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Weighted sum and sum of weights of the triples at the vertices [start, stop)."""
        away = apart_BB[start:stop]
        weight = share_B[start:stop, None, None] * two_BB * away[:, :, None] * away[:, None, :]
        student, teacher = (_angles(x, start, stop) for x in (student_BD, teacher_BD))
        loss = F.smooth_l1_loss(student, teacher, reduction="none")
        return (loss * weight).sum(), weight.sum()

    rows = len(student_BD)
    widest = max(rows, student_BD.shape[1], teacher_BD.shape[1])
    step = max(1, ELEMENTS_AT_ONCE // max(1, rows * widest))
    value, total = share_B.new_zeros(()), share_B.new_zeros(())
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        if step >= rows:
            summed, weight = part(student_BD, start, stop)
        else:
            summed, weight = checkpoint(
                part, student_BD, start, stop, use_reentrant=False, preserve_rng_state=False
            )
        value, total = value + summed, total + weight
    return value / torch.where(total > 0, total, 1.0)


def patch_mse(
    student_BCHW: Tensor,
    teacher_BCHW: Tensor,
    *,
    student_patch: tuple[int, int] | None = None,
    teacher_patch: tuple[int, int] | None = None,
) -> Tensor:
    """Mean squared error of patch logits, aligned in space; the mean over height x width x channel. Returns [B].

    So the mean over samples is the mean over batch x height x width x channel (Cavia et al. 2024, arXiv:2406.09398,
    who distil LaDeDa so). A patch is (size, stride) in pixels: patch i of an axis sees
    [i · stride, i · stride + size). Where both are known, each patch of the coarser map is compared with the mean of
    the finer map's patches that lie wholly inside its pixels; of those whose centre does, where none lies so; or
    else with the nearest. Where one is unknown, both maps are averaged to the smaller grid in equal windows, each
    axis for itself. Means of logits are logits: nothing is scaled, a constant map stays as it is, and so does a map's
    mean, the image's logit, where the windows tile it.
    Raises UserError for inputs that are no maps or differ in channels, and where the patches known cannot be of one
    image: both maps reach the last patch that fits, so their ends differ by less than the longer stride.
    """
    if student_BCHW.ndim != 4 or teacher_BCHW.ndim != 4:
        raise _refusal(
            "be patch logits [B,C,H,W] with patch_mse",
            student_BCHW,
            teacher_BCHW,
            "use a model with patch logits on both sides",
        )
    if student_BCHW.shape[1] != teacher_BCHW.shape[1]:
        raise _refusal(
            "have as many channels on both sides with patch_mse",
            student_BCHW,
            teacher_BCHW,
            "train both on the same classes",
        )
    student, teacher = _fp32(student_BCHW, teacher_BCHW)
    student, teacher = _aligned(student, teacher, student_patch, teacher_patch)
    return (student - teacher).square().flatten(1).mean(dim=1)


def embedding_mse(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """Mean squared error of embeddings, mean over D. Reimers & Gurevych 2020, arXiv:2004.09813. Returns [B].

    Nothing is projected: the embedding itself is what is wanted. Raises UserError where an input is not [B,D] or D
    differs.
    """
    _check_vectors(student_BD, teacher_BD, "embedding_mse")
    student, teacher = _same_width(student_BD, teacher_BD, "set the student's output_dim to it")
    return feature_mse(student, teacher)


def embedding_cosine(student_BD: Tensor, teacher_BD: Tensor) -> Tensor:
    """1 - cosine of embeddings; nothing is projected. Sanh et al. 2019, arXiv:1910.01108. Returns [B], 0 to 2.

    Raises UserError where an input is not [B,D] or D differs.
    """
    _check_vectors(student_BD, teacher_BD, "embedding_cosine")
    student, teacher = _same_width(student_BD, teacher_BD, "set the student's output_dim to it")
    return feature_cosine(student, teacher)


LOSSES: dict[str, Callable[..., Tensor]] = {
    "dkd": dkd,
    "dist": dist,
    "hard_labels": hard_labels,
    "hard_labels_sigmoid": hard_labels_sigmoid,
    "feature_mse": feature_mse,
    "feature_cosine": feature_cosine,
    "attention": attention,
    "rkd_distance": rkd_distance,
    "rkd_angle": rkd_angle,
    "patch_mse": patch_mse,
    "embedding_mse": embedding_mse,
    "embedding_cosine": embedding_cosine,
}
BATCH_SCOPE: frozenset[str] = frozenset({"dist", "rkd_distance", "rkd_angle"})
"""Losses of relations between samples: they need the whole global batch and `weight_B`, and return []."""
PROJECTED: frozenset[str] = frozenset({"feature_mse", "feature_cosine"})
"""Losses whose student input the task first projects to the teacher's width."""


def _fp32(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    return student.float(), teacher.detach().float()


def _refusal(rule: str, student: Tensor, teacher: Tensor, remedy: str) -> UserError:
    return UserError(
        f"task.terms.*.inputs must {rule}, got {list(student.shape)} of the student and {list(teacher.shape)} of the "
        f"teacher; {remedy}"
    )


def _check_classes(student_BK: Tensor, teacher_BK: Tensor, least: int) -> None:
    if student_BK.ndim != 2 or teacher_BK.ndim != 2:
        raise _refusal("be logits [B,K]", student_BK, teacher_BK, "name an output `logits`")
    if student_BK.shape[1] != teacher_BK.shape[1]:
        remedy = "train both on the same classes, or choose classes with data.classes"
        raise _refusal("have the same number of classes", student_BK, teacher_BK, remedy)
    if student_BK.shape[1] < least:
        remedy = "for one logit use kl_sigmoid or hard_labels_sigmoid"
        raise _refusal(f"have at least {least} classes", student_BK, teacher_BK, remedy)


def _check_vectors(student_BD: Tensor, teacher_BD: Tensor, loss: str) -> None:
    if student_BD.ndim != 2 or teacher_BD.ndim != 2:
        remedy = "name `features`, `embedding` or `logits`"
        raise _refusal(f"be [B,D] with {loss}", student_BD, teacher_BD, remedy)


def _check_positive(option: str, value: float) -> None:
    if not value > 0:
        raise UserError(f"task.terms.*.{option} must be > 0, got {value:g}; the usual is 1 to 8")


def _same_width(student: Tensor, teacher: Tensor, remedy: str) -> tuple[Tensor, Tensor]:
    """In fp32, and maps on one grid."""
    if student.ndim != teacher.ndim or student.ndim not in (2, 4):
        both = "name features on both sides, or maps on both"
        raise _refusal("both be [B,D] or both [B,C,H,W]", student, teacher, both)
    if student.shape[1] != teacher.shape[1]:
        raise _refusal("have the same width", student, teacher, remedy)
    student, teacher = _fp32(student, teacher)
    return _aligned(student, teacher) if student.ndim == 4 else (student, teacher)


def _existing(student: Tensor, teacher: Tensor, weight_B: Tensor) -> tuple[Tensor, Tensor]:
    """Zeros in the rows of weight 0: whatever stands there, NaN too, reaches neither value nor gradient."""
    there_B1 = weight_B[:, None] > 0
    return torch.where(there_B1, student, 0.0), torch.where(there_B1, teacher, 0.0)


def _mean(value: Tensor, weight: Tensor) -> Tensor:
    """The weighted mean, []; 0 where nothing has weight."""
    total = weight.sum()
    return (value * weight).sum() / torch.where(total > 0, total, 1.0)


def _off_diagonal(like_B: Tensor) -> Tensor:
    """[B,B]: 1 where two rows are different ones."""
    return 1 - torch.eye(len(like_B), device=like_B.device)


def _unit(x: Tensor, dim: int) -> Tensor:
    """Scaled to length 1 along `dim`; zeros stay zeros and take no gradient (normalize would give them 1e12)."""
    squared = x.square().sum(dim=dim, keepdim=True)
    return torch.where(squared > 0, x * torch.where(squared > 0, squared, 1.0).rsqrt(), 0.0)


def _correlation(a: Tensor, b: Tensor, weight: Tensor, dim: int) -> Tensor:
    """Pearson's, of what is not negative, along `dim`; over its mean first, so that the rarest class can be told."""
    total = weight.expand_as(a).sum(dim=dim, keepdim=True).clamp(min=1e-12)

    def mean(x: Tensor) -> Tensor:
        return (x * weight).sum(dim=dim, keepdim=True) / total

    def deviation(x: Tensor) -> Tensor:
        # where nothing weighs, too: a row that does not exist may be far from the others
        return torch.where(weight > 0, (x - mean(x)) / mean(x).clamp(min=LEAST_MEAN), 0.0)

    a, b = deviation(a), deviation(b)
    variances = (mean(a * a) + LEAST_VARIATION**2) * (mean(b * b) + LEAST_VARIATION**2)
    return (mean(a * b) * variances.rsqrt()).squeeze(dim)


def _angles(x_BD: Tensor, start: int, stop: int) -> Tensor:
    """Cosine of the angle at each row of [start, stop) between any two rows, [stop - start, B, B]."""
    with torch.autocast(x_BD.device.type, enabled=False):
        towards = _unit(x_BD[None, :, :] - x_BD[start:stop, None, :], dim=2)
        return towards @ towards.mT


def _aligned(
    student: Tensor,
    teacher: Tensor,
    student_patch: tuple[int, int] | None = None,
    teacher_patch: tuple[int, int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Both maps [B,C,H,W] on one grid: see patch_mse."""
    for axis in (2, 3):
        sizes = student.shape[axis], teacher.shape[axis]
        if student_patch is None or teacher_patch is None:
            student = _averaged(student, _equal_windows(sizes[0], min(sizes)), axis)
            teacher = _averaged(teacher, _equal_windows(sizes[1], min(sizes)), axis)
            continue
        of_student, of_teacher = (int(v) for v in student_patch), (int(v) for v in teacher_patch)
        (size_s, stride_s), (size_t, stride_t) = of_student, of_teacher
        ends = (sizes[0] - 1) * stride_s + size_s, (sizes[1] - 1) * stride_t + size_t
        if abs(ends[0] - ends[1]) >= max(stride_s, stride_t):
            raise _refusal(
                f"be patches of one image, whose ends agree, with patch_mse; here they end at {ends[0]} and "
                f"{ends[1]} px",
                student,
                teacher,
                "set the models' `patch` to their true (size, stride) in pixels, or to null",
            )
        if (stride_s, size_s) <= (stride_t, size_t):
            windows = _inside((size_s, stride_s), (size_t, stride_t), *sizes)
            student = _averaged(student, windows, axis)
        else:
            windows = _inside((size_t, stride_t), (size_s, stride_s), *reversed(sizes))
            teacher = _averaged(teacher, windows, axis)
    return student, teacher


@functools.lru_cache(maxsize=256)
def _equal_windows(fine: int, coarse: int) -> Windows:
    return tuple((i * fine // coarse, -(-(i + 1) * fine // coarse)) for i in range(coarse))


@functools.lru_cache(maxsize=256)
def _inside(
    fine: tuple[int, int], coarse: tuple[int, int], fine_count: int, coarse_count: int
) -> Windows:
    """Which of the finer patches, (size, stride) in pixels, are compared with each of the coarser."""
    (size, stride), (coarse_size, coarse_stride) = fine, coarse

    def window(at: int) -> tuple[int, int]:
        low, high = at * coarse_stride, at * coarse_stride + coarse_size
        starts = [i * stride for i in range(fine_count)]
        whole = [i for i, s in enumerate(starts) if low <= s and s + size <= high]
        centred = [i for i, s in enumerate(starts) if 2 * low <= 2 * s + size < 2 * high]
        nearest = min(range(fine_count), key=lambda i: abs(2 * starts[i] + size - low - high))
        found = whole or centred or [nearest]
        return found[0], found[-1] + 1

    return tuple(window(i) for i in range(coarse_count))


def _averaged(map_BCHW: Tensor, windows: Windows, axis: int) -> Tensor:
    """Means over the windows along one axis."""
    if windows == tuple((i, i + 1) for i in range(map_BCHW.shape[axis])):
        return map_BCHW
    longest = max(stop - start for start, stop in windows)
    index = [[min(start + i, stop - 1) for i in range(longest)] for start, stop in windows]
    share = [
        [(start + i < stop) / (stop - start) for i in range(longest)] for start, stop in windows
    ]
    index = torch.tensor(index, device=map_BCHW.device)
    last = map_BCHW.transpose(axis, 3)
    picked = last.index_select(3, index.flatten()).unflatten(3, index.shape)
    return (picked * picked.new_tensor(share)).sum(dim=4).transpose(axis, 3)
