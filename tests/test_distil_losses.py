import inspect
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from potstill import distil_losses
from potstill.distil_losses import (
    BATCH_SCOPE,
    LOSSES,
    PROJECTED,
    attention,
    dist,
    dkd,
    embedding_cosine,
    embedding_mse,
    feature_cosine,
    feature_mse,
    hard_labels,
    hard_labels_sigmoid,
    patch_mse,
    rkd_angle,
    rkd_distance,
)
from potstill.errors import UserError
from potstill.losses import LOSSES as LABEL_LOSSES
from potstill.losses import kl

ROWS = 6
MAPS = ("attention", "patch_mse", "feature_mse", "feature_cosine")
HARD = ("hard_labels", "hard_labels_sigmoid")


def drawn(name: str, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """A student's and a teacher's output that suit the loss."""
    shape = (ROWS, 4, 5, 5) if name in MAPS else (ROWS, 4)
    random = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=random), torch.randn(shape, generator=random)


def more(name: str, weight: torch.Tensor | None = None) -> list[torch.Tensor]:
    """The inputs after the student's and the teacher's."""
    if name in BATCH_SCOPE:
        return [torch.ones(ROWS) if weight is None else weight]
    return [torch.tensor([0, 1, 2, 3, -1, 0])] if name == "dkd" else []


def moved(student: torch.Tensor, loss: torch.Tensor) -> torch.Tensor:
    loss.sum().backward()
    assert student.grad is not None
    return student.grad


@pytest.mark.parametrize("name", [n for n in LOSSES if n not in HARD])
def test_a_loss_is_zero_when_equal_and_above_it_when_not(name):
    student, teacher = drawn(name)
    assert LOSSES[name](teacher, teacher, *more(name)).abs().max() < 1e-5
    assert (LOSSES[name](student, teacher, *more(name)) > 1e-3).all()


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_reaches_the_student_only(name):
    student, teacher = (x.requires_grad_() for x in drawn(name))
    gradient = moved(student, LOSSES[name](student, teacher, *more(name)))
    assert (gradient.flatten(1).abs().sum(1) > 0).all()
    assert teacher.grad is None


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_every_loss_counts_in_fp32(name, dtype):
    student, teacher = drawn(name)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = LOSSES[name](student.to(dtype), teacher.to(dtype), *more(name))
    exact = LOSSES[name](student.to(dtype).double().float(), teacher.to(dtype).float(), *more(name))
    assert found.dtype == torch.float32
    assert found.shape == (() if name in BATCH_SCOPE else (ROWS,))
    assert torch.allclose(found, exact, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [0.0, 1e-6, 6e4])
def test_the_extreme_is_finite(name, scale):
    given, teacher = drawn(name)
    for weight in (
        torch.ones(ROWS),
        torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0]),
        torch.zeros(ROWS),
    ):
        for of_teacher in (teacher, teacher * scale, -scale * given):
            student = (scale * given).requires_grad_()
            value = LOSSES[name](student, of_teacher, *more(name, weight))
            assert value.isfinite().all()
            assert moved(student, value).isfinite().all()


@pytest.mark.parametrize("name", sorted(BATCH_SCOPE))
def test_a_row_without_weight_does_not_exist(name):
    student, teacher = drawn(name)
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 0.0, 1.0])
    rows = weight > 0
    few = student[rows].requires_grad_()
    expected = LOSSES[name](few, teacher[rows], weight[rows])
    wanted = moved(few, expected)
    for garbage in (0.0, 1e9, math.nan):
        padded, of_teacher = student.clone(), teacher.clone()
        padded[~rows], of_teacher[~rows] = garbage, garbage
        padded.requires_grad_()
        found = LOSSES[name](padded, of_teacher, weight)
        gradient = moved(padded, found)
        assert found.item() == pytest.approx(expected.item(), rel=1e-5)
        assert torch.allclose(gradient[rows], wanted, atol=1e-6)
        assert gradient[~rows].abs().sum() == 0


@pytest.mark.parametrize("name", sorted(BATCH_SCOPE))
def test_a_weight_of_two_is_the_same_row_twice_and_their_size_says_nothing(name):
    student, teacher = drawn(name)
    weight = torch.tensor([2.0, 1.0, 1.0, 1.0, 1.0, 1.0])
    found = LOSSES[name](student, teacher, weight)
    assert LOSSES[name](student, teacher, 1e-3 * weight).item() == pytest.approx(
        found.item(), rel=1e-5
    )
    if name == "dist":  # the others have no relation of a row to its own copy
        student, teacher = (torch.cat([x[:1], x]) for x in (student, teacher))
        twice = dist(student, teacher, torch.ones(ROWS + 1))
        assert twice.item() == pytest.approx(found.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "least"), [("rkd_distance", 2), ("rkd_angle", 3)])
def test_too_few_rows_have_no_relations(name, least):
    for rows in range(least + 1):
        student, teacher = (x.requires_grad_() for x in drawn(name))
        weight = (torch.arange(ROWS) < rows).float()
        value = LOSSES[name](student, teacher, weight)
        gradient = moved(student, value)
        assert gradient.isfinite().all()
        if rows < least:
            assert value == 0
            assert gradient.abs().sum() == 0
    assert LOSSES["rkd_angle"](*drawn("rkd_angle"), torch.ones(ROWS)) > 0


def test_dist_of_one_row_knows_the_classes_of_a_sample_only():
    student, teacher = drawn("dist")
    one = (torch.arange(ROWS) == 2).float()
    by_hand = 1 - torch.corrcoef(torch.stack([student[2].softmax(0), teacher[2].softmax(0)]))[0, 1]
    assert dist(student, teacher, one).item() == pytest.approx(by_hand.item(), rel=1e-4)
    assert dist(student, teacher, 0 * one) == 0


# --- logits


def test_dkd_is_kl_taken_apart():
    student, teacher, label = torch.randn(8, 5), torch.randn(8, 5), torch.arange(8) % 5
    for temperature in (1.0, 4.0):
        of_label = dkd(student, teacher, label, alpha=1.0, beta=0.0, temperature=temperature)
        of_rest = dkd(student, teacher, label, alpha=0.0, beta=1.0, temperature=temperature)
        sure = (teacher / temperature).softmax(1).gather(1, label[:, None])[:, 0]
        whole = kl(student, teacher, temperature=temperature)
        assert torch.allclose(of_label + (1 - sure) * of_rest, whole, atol=1e-5)
        both = dkd(student, teacher, label, alpha=2.0, beta=3.0, temperature=temperature)
        assert torch.allclose(both, 2 * of_label + 3 * of_rest, atol=1e-5)


def test_dkd_by_hand():
    # label 1: the teacher (1/4, 1/2, 1/4), the student (1/2, 1/4, 1/4), at T = 1
    teacher = torch.tensor([[0.25, 0.5, 0.25]]).log()
    student = torch.tensor([[0.5, 0.25, 0.25]]).log()
    of_label = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    of_rest = 0.5 * math.log(0.5 / (2 / 3)) + 0.5 * math.log(0.5 / (1 / 3))
    found = dkd(student, teacher, torch.tensor([1]), beta=8.0, temperature=1.0)
    assert found.item() == pytest.approx(of_label + 8 * of_rest, rel=1e-5)
    # without a label, the teacher's own first class is the one
    assert dkd(student, teacher, torch.tensor([-1]), temperature=1.0).item() == pytest.approx(
        found.item()
    )


def test_dkd_of_two_classes_and_of_a_sure_teacher():
    student, label = torch.randn(4, 2), torch.tensor([0, 1, 0, 1])
    teacher = torch.randn(4, 2)
    assert torch.allclose(dkd(student, teacher, label), kl(student, teacher), atol=1e-5)
    # the rest counts in full, where kl forgets it
    sure = torch.tensor([[90.0, 1.0, 0.0]])
    swapped = torch.tensor([[90.0, 0.0, 1.0]])
    assert kl(swapped, sure, temperature=1.0) < 1e-6
    wanted = math.tanh(0.5)  # (p - q) · log(p / q) of p = sigmoid(1), q = 1 - p
    assert dkd(swapped, sure, torch.tensor([0]), beta=1.0, temperature=1.0).item() == pytest.approx(
        wanted, rel=1e-5
    )


def test_dist_is_pearsons_correlation():
    student, teacher = drawn("dist")
    p, q = (student / 2).softmax(1), (teacher / 2).softmax(1)
    inter, intra = (
        torch.stack(
            [1 - torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(a, b, strict=True)]
        )
        for a, b in ((p, q), (p.T, q.T))
    )
    found = dist(student, teacher, torch.ones(ROWS), beta=2.0, gamma=3.0, temperature=2.0)
    assert found.item() == pytest.approx(4 * (2 * inter.mean() + 3 * intra.mean()).item(), rel=1e-4)


def test_dist_does_not_see_what_moves_or_scales_the_probabilities():
    _, teacher = drawn("dist")
    weight = torch.ones(ROWS)
    assert dist(teacher + torch.randn(ROWS, 1), teacher, weight).abs() < 1e-5
    less_sure = (0.3 * teacher.softmax(1) + 0.7 / 4).log()
    assert dist(less_sure, teacher, weight).abs() < 1e-4
    assert kl(less_sure, teacher, temperature=1.0).min() > 0.01
    # of two classes turned round all is opposite
    two = torch.randn(ROWS, 2)
    assert dist(two.flip(1), two, weight, beta=1.0, gamma=0.5).item() == pytest.approx(3, rel=1e-3)


def test_dist_can_tell_classes_of_any_rarity():
    _, teacher = drawn("dist")
    rare = torch.cat([teacher, teacher[:, :1] - 40], dim=1)
    other = torch.cat([teacher, -teacher[:, :1] - 40], dim=1)
    weight = torch.ones(ROWS)
    assert dist(rare, rare, weight).abs() < 1e-5
    assert dist(other, rare, weight, beta=0.0) > 0.1


def test_dist_leads_a_student_away_from_zero():
    _, teacher = drawn("dist")
    student = torch.zeros(ROWS, 4, requires_grad=True)
    gradient = moved(student, dist(student, teacher, torch.ones(ROWS)))
    assert gradient.abs().max() < 1e4
    step = (-1e-6 * gradient).detach()
    assert dist(step, teacher, torch.ones(ROWS)) < dist(0 * step, teacher, torch.ones(ROWS))


def test_hard_labels_are_the_teachers_choice():
    student, teacher = drawn("hard_labels")
    chosen = teacher.argmax(1)
    expected = F.cross_entropy(student, chosen, reduction="none", label_smoothing=0.1)
    assert torch.allclose(hard_labels(student, teacher, label_smoothing=0.1), expected)
    # how sure it is says nothing
    assert torch.equal(hard_labels(student, 9 * teacher), hard_labels(student, teacher))
    assert hard_labels(60 * F.one_hot(chosen, 4).float(), teacher).max() < 1e-6


def test_hard_labels_of_classes_that_stand_for_themselves():
    student = torch.tensor([[2.0, -1.0]])
    right, wrong = math.log(1 + math.exp(-2.0)), math.log(1 + math.exp(1.0))
    found = hard_labels_sigmoid(student, torch.tensor([[0.1, 7.0]]))
    assert found.item() == pytest.approx((right + wrong) / 2, rel=1e-5)
    smooth = hard_labels_sigmoid(student[:, :1], torch.tensor([[0.1]]), label_smoothing=0.2)
    assert smooth.item() == pytest.approx(0.9 * right + 0.1 * (right + 2.0), rel=1e-5)
    sure = 60 * torch.tensor([[1.0, -1.0]])
    assert hard_labels_sigmoid(sure, sure / 100) < 1e-6


# --- features, maps, embeddings


@pytest.mark.parametrize("loss", [feature_mse, embedding_mse])
def test_mse_by_hand(loss):
    student, teacher = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[3.0, 2.0], [0, 4]])
    assert loss(student, teacher).tolist() == [2.0, 8.0]


@pytest.mark.parametrize("loss", [feature_cosine, embedding_cosine])
def test_cosine_by_hand_and_blind_to_length(loss):
    student = torch.tensor([[1.0, 1.0], [-2.0, 0.0], [0.0, 3.0]])
    teacher = torch.tensor([[5.0, 0.0], [1.0, 0.0], [4.0, 0.0]])
    assert loss(student, teacher).tolist() == pytest.approx([1 - math.sqrt(0.5), 2, 1])
    student, teacher = drawn("embedding_cosine")
    expected = 1 - F.cosine_similarity(student, teacher)
    assert torch.allclose(loss(student, teacher), expected, atol=1e-6)
    assert torch.allclose(loss(1e-3 * student, 70 * teacher), expected, atol=1e-6)


def test_cosine_of_maps_is_the_mean_over_positions():
    student, teacher = drawn("feature_cosine")
    expected = (1 - F.cosine_similarity(student, teacher, dim=1)).mean(dim=(1, 2))
    assert torch.allclose(feature_cosine(student, teacher), expected, atol=1e-6)


@pytest.mark.parametrize("loss", [feature_mse, feature_cosine, attention, patch_mse])
def test_maps_of_different_size_meet_on_the_smaller_grid(loss):
    student, teacher = torch.randn(3, 4, 7, 12), torch.randn(3, 4, 5, 13)
    small, of_teacher = (F.adaptive_avg_pool2d(x, (5, 12)) for x in (student, teacher))
    if loss is attention:  # it is the attention that is averaged
        small, of_teacher = (
            F.adaptive_avg_pool2d(x.square().mean(1, keepdim=True), (5, 12)).sqrt()
            for x in (student, teacher)
        )
    assert torch.allclose(loss(student, teacher), loss(small, of_teacher), atol=1e-5)
    assert torch.allclose(loss(small, of_teacher), loss(of_teacher, small), atol=1e-5)


def test_attention_by_hand_and_what_it_does_not_see():
    # p = 2: the student's attention (9, 16)/sqrt(337), the teacher's (1, 0)
    student, teacher = torch.tensor([[[[3.0, -4.0]]]]), torch.tensor([[[[1.0, 0.0]]], [[[2.0, 0]]]])
    by_hand = 2 - 2 * 9 / math.sqrt(337)
    assert attention(student, teacher[:1]).item() == pytest.approx(by_hand, rel=1e-5)
    assert attention(student, teacher[:1], p=1.0).item() == pytest.approx(2 - 2 * 0.6, rel=1e-5)
    student, teacher = drawn("attention")
    expected = attention(student, teacher)
    for same in (student[:, [2, 0, 3, 1]], -student, 50 * student, student.repeat(1, 3, 1, 1)):
        assert torch.allclose(attention(same, teacher), expected, atol=1e-5)
    assert not torch.allclose(attention(student.flip(3), teacher), expected, atol=1e-3)
    assert attention(1e4 * student, teacher, p=16.0).isfinite().all()


# --- relations


def rotated(x: torch.Tensor) -> torch.Tensor:
    return x @ torch.linalg.qr(torch.randn(x.shape[1], x.shape[1]))[0]


def test_relations_do_not_see_place_turn_or_scale_nor_width():
    student, teacher = drawn("rkd_distance")
    weight = torch.rand(ROWS) + 0.5
    for loss in (rkd_distance, rkd_angle):
        expected = loss(student, teacher, weight)
        wider = torch.cat([student, torch.zeros(ROWS, 3)], dim=1)
        for same in (student + 3, rotated(student), 0.01 * student, wider):
            assert loss(same, teacher, weight).item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss(student, 9 * teacher, weight).item() == pytest.approx(expected.item(), rel=1e-4)
        assert loss(rotated(5 * teacher) - 1, teacher, weight) < 1e-8
        bent = teacher * torch.tensor([1.0, 2.0, 3.0, 4.0])
        assert loss(bent, teacher, weight) > 1e-3


def test_rkd_distance_by_hand():
    # on a line at 0, 1, 3 and at 0, 1, 2: distances 1, 3, 2 over 2 and 1, 2, 1 over 4/3
    student, teacher = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([[0.0], [1.0], [2.0]])
    apart = [1 / 2 - 3 / 4, 3 / 2 - 3 / 2, 1 - 3 / 4]
    by_hand = sum(d * d / 2 for d in apart) / 3
    assert rkd_distance(student, teacher, torch.ones(3)).item() == pytest.approx(by_hand, rel=1e-5)
    # the pairs weigh 2, 2 and 1; means 10/5 and 7/5
    weighted = torch.tensor([2.0, 1.0, 1.0])
    apart = [(2, 1 / 2 - 5 / 7), (2, 3 / 2 - 10 / 7), (1, 1 - 5 / 7)]
    by_hand = sum(w * d * d / 2 for w, d in apart) / 5
    assert rkd_distance(student, teacher, weighted).item() == pytest.approx(by_hand, rel=1e-5)


def test_rkd_angle_by_hand():
    # a right angle with equal sides (cosines 0, 1/sqrt 2 twice), and three on a line (1, 1, -1)
    student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    teacher = torch.tensor([[0.0], [1.0], [2.0]])
    half = math.sqrt(0.5)
    # at the first row 0 and 1, at the second half and -1 (Huber beyond 1), at the third half and 1
    by_hand = (0.5 + (half + 1 - 0.5) + (1 - half) ** 2 / 2) / 3
    assert rkd_angle(student, teacher, torch.ones(3)).item() == pytest.approx(by_hand, rel=1e-5)


def test_rkd_angle_is_the_weighted_mean_over_three_different_rows():
    student, teacher = drawn("rkd_angle")
    weight = torch.tensor([1.0, 2.0, 0.0, 0.5, 1.0, 3.0])
    value = total = 0.0
    for i, j, k in itertools.permutations(range(ROWS), 3):
        of_student, of_teacher = (
            F.cosine_similarity(x[i] - x[j], x[k] - x[j], dim=0) for x in (student, teacher)
        )
        share = (weight[i] * weight[j] * weight[k]).item()
        value += share * F.smooth_l1_loss(of_student, of_teacher).item()
        total += share
    found = rkd_angle(student, teacher, weight)
    assert found.item() == pytest.approx(value / total, rel=1e-5)


def test_rkd_angle_in_parts_is_the_same(monkeypatch):
    student, teacher = (x.requires_grad_() for x in drawn("rkd_angle"))
    weight = torch.rand(ROWS)
    whole = rkd_angle(student, teacher, weight)
    expected = moved(student, whole).clone()
    student.grad = None
    monkeypatch.setattr(distil_losses, "ELEMENTS_AT_ONCE", 4 * ROWS * ROWS)  # 4 rows, then 2
    parts = rkd_angle(student, teacher, weight)
    assert parts.item() == pytest.approx(whole.item(), rel=1e-6)
    assert torch.allclose(moved(student, parts), expected, atol=1e-7)


@pytest.mark.parametrize("loss", [rkd_distance, rkd_angle])
def test_rows_in_one_place_leave_the_gradient_finite(loss):
    _, teacher = drawn("rkd_angle")
    student = torch.randn(ROWS, 4)
    student[1] = student[0]
    student[4] = student[5] + 1e-7
    for given in (student, torch.ones(ROWS, 4)):
        given = given.clone().requires_grad_()
        value = loss(given, teacher, torch.ones(ROWS))
        gradient = moved(given, value)
        assert value > 0
        assert gradient.isfinite().all()
    assert loss(teacher, torch.ones(ROWS, 4), torch.ones(ROWS)).isfinite()


# --- patches

TEACHER, STUDENT = (9, 8), (5, 2)


def test_patch_mse_is_the_mean_over_batch_height_width_and_channel():
    student, teacher = torch.randn(3, 2, 4, 5), torch.randn(3, 2, 4, 5)
    found = patch_mse(student, teacher)
    assert found.mean().item() == pytest.approx(F.mse_loss(student, teacher).item(), rel=1e-5)
    assert torch.allclose(
        patch_mse(student, teacher, student_patch=STUDENT, teacher_patch=STUDENT), found
    )


def test_a_teachers_patch_is_the_mean_of_the_students_inside_it():
    student, teacher = torch.randn(2, 1, 126, 126), torch.randn(2, 1, 31, 31)  # of 256 px
    patches = {"student_patch": STUDENT, "teacher_patch": TEACHER}
    inside = F.avg_pool2d(student, kernel_size=3, stride=4)  # patches 4i to 4i + 2
    assert inside.shape == teacher.shape
    expected = (inside - teacher).square().mean(dim=(1, 2, 3))
    assert torch.allclose(patch_mse(student, teacher, **patches), expected, atol=1e-5)
    # and turned round: a coarser student is compared with means of the teacher
    turned = patch_mse(teacher, student, student_patch=TEACHER, teacher_patch=STUDENT)
    assert torch.allclose(turned, expected, atol=1e-5)


def test_a_patch_is_compared_with_what_stands_where_it_stands():
    """An image that is bright in one place: both maps hold the mean of the pixels that a patch sees."""
    image = torch.zeros(1, 1, 64, 64)
    image[..., 40:48, 16:24] = 1.0
    seen = [F.avg_pool2d(image, size, stride) for size, stride in (STUDENT, TEACHER)]
    aligned = patch_mse(seen[0], seen[1], student_patch=STUDENT, teacher_patch=TEACHER)
    moved_by_one = patch_mse(
        seen[0].roll(4, dims=3), seen[1], student_patch=STUDENT, teacher_patch=TEACHER
    )
    assert aligned < 0.1 * moved_by_one
    assert aligned < 0.1 * seen[1].square().mean()


@pytest.mark.parametrize(
    ("fine", "coarse", "windows"),
    [
        ((5, 2), (9, 8), ((0, 3), (4, 7), (8, 11))),
        ((2, 2), (6, 3), ((0, 3), (2, 4), (3, 6))),  # no multiple: what lies inside [3, 9) is 4, 6
        ((9, 2), (5, 4), ((0, 1), (0, 3), (2, 5))),  # none inside: centres 4.5, 6.5, 8.5 in [4, 9)
        ((9, 2), (3, 4), ((0, 1), (0, 2), (2, 4))),  # nearest 4.5 to [0, 3); in [4, 7) are two
    ],
)
def test_which_patches_are_compared(fine, coarse, windows):
    assert distil_losses._inside(fine, coarse, 12, 3) == windows


@pytest.mark.parametrize(
    ("sizes", "patches"),
    [
        ((126, 31), {"student_patch": STUDENT, "teacher_patch": TEACHER}),
        ((126, 31), {}),
        ((31, 126), {"student_patch": STUDENT}),
        ((7, 5), {}),
    ],
)
def test_alignment_keeps_the_scale(sizes, patches):
    student, teacher = (torch.full((1, 1, n, n), v) for n, v in zip(sizes, (3.0, 1.0), strict=True))
    assert patch_mse(student, teacher, **patches).item() == pytest.approx(4.0, rel=1e-5)
    assert patch_mse(student, 3 * teacher, **patches).item() < 1e-9


@pytest.mark.parametrize("patches", [{}, {"student_patch": (2, 2), "teacher_patch": (8, 8)}])
def test_windows_that_tile_keep_the_images_logit(patches):
    student = torch.randn(2, 1, 12, 12)
    of_student, of_teacher = patches.get("student_patch"), patches.get("teacher_patch")
    small, _ = distil_losses._aligned(student, torch.zeros(2, 1, 3, 3), of_student, of_teacher)
    assert small.shape == (2, 1, 3, 3)
    assert torch.allclose(small.mean(dim=(1, 2, 3)), student.mean(dim=(1, 2, 3)), atol=1e-6)
    # a teacher of zeros: the loss of the image's logit is the least that the map's can be
    found = patch_mse(student, torch.zeros(2, 1, 3, 3), **patches)
    assert (found >= student.mean(dim=(1, 2, 3)).square() - 1e-6).all()


# --- what a user may get wrong


@pytest.mark.parametrize(
    ("name", "student", "teacher", "said"),
    [
        ("dkd", (2, 3), (2, 4), r"same number of classes, got \[2, 3\] .* \[2, 4\] .*; train both"),
        ("dist", (2, 3), (2, 4), "same number of classes"),
        ("dist", (2, 1), (2, 1), r"at least 2 classes, .* use kl_sigmoid"),
        ("dkd", (2, 1), (2, 1), "at least 2 classes"),
        ("hard_labels", (2, 1), (2, 1), "at least 2 classes, .* hard_labels_sigmoid"),
        ("hard_labels", (2, 3), (2, 4), "same number of classes"),
        ("hard_labels_sigmoid", (2, 1), (2, 2), "same number of classes"),
        ("hard_labels", (2, 3, 1, 1), (2, 3, 1, 1), r"be logits \[B,K\]"),
        ("feature_mse", (2, 3), (2, 4), "same width, .* the projection must end in"),
        ("feature_cosine", (2, 3, 2, 2), (2, 4, 2, 2), "same width"),
        ("feature_mse", (2, 3), (2, 3, 2, 2), r"both be \[B,D\] or both \[B,C,H,W\]"),
        ("attention", (2, 3), (2, 3), r"be maps \[B,C,H,W\] with attention"),
        ("rkd_angle", (2, 3, 2, 2), (2, 3), r"be \[B,D\] with rkd_angle"),
        ("rkd_distance", (2, 3), (2, 3, 2, 2), r"be \[B,D\] with rkd_distance"),
        ("patch_mse", (2, 1), (2, 1), "be patch logits"),
        ("patch_mse", (2, 1, 4, 4), (2, 2, 4, 4), "as many channels on both sides"),
        ("embedding_mse", (2, 3), (2, 4), "same width, .* output_dim"),
        ("embedding_cosine", (2, 3), (2, 4), "same width, .* output_dim"),
        ("embedding_cosine", (2, 3, 1, 1), (2, 3, 1, 1), r"be \[B,D\] with embedding_cosine"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_both_of_them(name, student, teacher, said):
    rest = [torch.ones(2)] if name in BATCH_SCOPE else [torch.tensor([0, 1])] * (name == "dkd")
    with pytest.raises(UserError, match=said) as refused:
        LOSSES[name](torch.zeros(student), torch.zeros(teacher), *rest)
    assert str(refused.value).startswith("task.terms.*.inputs must ")


def test_options_out_of_range_and_patches_of_another_image_are_refused():
    two = torch.zeros(2, 3)
    with pytest.raises(UserError, match=r"task\.terms\.\*\.temperature must be > 0, got 0"):
        dkd(two, two, torch.tensor([0, 1]), temperature=0.0)
    with pytest.raises(UserError, match=r"task\.terms\.\*\.temperature must be > 0, got -1"):
        dist(two, two, torch.ones(2), temperature=-1.0)
    with pytest.raises(UserError, match=r"task\.terms\.\*\.p must be >= 1 with attention, got 0.5"):
        attention(torch.zeros(2, 3, 2, 2), torch.zeros(2, 3, 2, 2), p=0.5)
    maps = torch.zeros(1, 1, 126, 126), torch.zeros(1, 1, 31, 31)
    with pytest.raises(UserError, match=r"here they end at 505 and 249 px, got \[1, 1, 126, 126\]"):
        patch_mse(*maps, student_patch=(5, 4), teacher_patch=TEACHER)


def test_names_and_inputs_are_what_a_task_expects():
    assert not set(LOSSES) & set(LABEL_LOSSES)
    assert set(LOSSES) >= BATCH_SCOPE | PROJECTED
    for name, loss in LOSSES.items():
        inputs = [
            p.name
            for p in inspect.signature(loss).parameters.values()
            if p.kind is p.POSITIONAL_OR_KEYWORD
        ]
        assert inputs[0].startswith("student")
        assert inputs[1].startswith("teacher")
        assert inputs[2:] == (
            ["weight_B"] if name in BATCH_SCOPE else ["label_B"] * (name == "dkd")
        )
