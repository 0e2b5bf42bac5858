import math

import pytest
import torch
import torch.nn.functional as F
from timm.loss import AsymmetricLossMultiLabel, AsymmetricLossSingleLabel, BinaryCrossEntropy

from potstill.errors import UserError
from potstill.losses import (
    LOSSES,
    asymmetric,
    bce,
    class_weights,
    cross_entropy,
    focal,
    kl,
    kl_sigmoid,
)

# logits and labels of each kind of task; the second sample has no label
KINDS = {
    "one_class": (torch.randn(5, 4), torch.tensor([0, -1, 2, 3, 1])),
    "multi_hot": (
        torch.randn(5, 4),
        torch.tensor([[1, 0, 1, 0], [-1] * 4, [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 0, 0]]).float(),
    ),
    "binary": (torch.randn(5, 1), torch.tensor([0, -1, 1, 1, 0])),
}
TAKES = {
    "cross_entropy": ("one_class",),
    "bce": tuple(KINDS),
    "focal": tuple(KINDS),
    "asymmetric": tuple(KINDS),
}
CASES = [(name, kind) for name, kinds in TAKES.items() for kind in kinds]


def test_kl_is_zero_when_equal_and_ignores_a_shift():
    logits = torch.randn(6, 5)
    assert kl(logits, logits, temperature=3.0).abs().max() < 1e-6
    assert kl(logits + 7.0, logits, temperature=3.0).abs().max() < 1e-5


def test_kl_has_the_value_worked_by_hand():
    # teacher (3/4, 1/4), student (1/2, 1/2) at T = 2: logits are 2 log p
    teacher = 2 * torch.tensor([[0.75, 0.25]]).log()
    student = 2 * torch.tensor([[0.5, 0.5]]).log()
    by_hand = 4 * (0.75 * math.log(0.75 / 0.5) + 0.25 * math.log(0.25 / 0.5))
    assert kl(student, teacher, temperature=2.0).item() == pytest.approx(by_hand, rel=1e-6)


def test_kl_moves_the_student_only():
    student, teacher = torch.randn(4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    kl(student, teacher).sum().backward()
    assert teacher.grad is None
    assert student.grad is not None
    assert student.grad.abs().sum() > 0


def test_kl_keeps_the_size_of_its_gradient_as_the_temperature_changes():
    teacher = torch.randn(64, 10)
    sizes = []
    for temperature in (8.0, 16.0, 32.0):
        student = torch.zeros(64, 10, requires_grad=True)
        kl(student, teacher, temperature=temperature).sum().backward()
        sizes.append(student.grad.norm().item())
    assert sizes[2] == pytest.approx(sizes[0], rel=0.1)


def test_cross_entropy_by_hand_and_smoothed():
    logits = torch.tensor([[0.9, 0.1]]).log()
    label = torch.tensor([0])
    assert cross_entropy(logits, label).item() == pytest.approx(-math.log(0.9), rel=1e-5)
    smooth = -(0.95 * math.log(0.9) + 0.05 * math.log(0.1))
    assert cross_entropy(logits, label, label_smoothing=0.1).item() == pytest.approx(
        smooth, rel=1e-5
    )


def test_class_weights_multiply_the_samples_of_a_class():
    logits, label = torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2])
    weights = torch.tensor([1.0, 2.0, 0.5])
    for loss in (cross_entropy, focal, asymmetric):
        assert torch.allclose(
            loss(logits, label, class_weights=weights), loss(logits, label) * weights[label]
        )


def test_bce_is_the_mean_or_sum_of_each_class_for_itself():
    logits = torch.tensor([[2.0, -1.0]])
    by_hand = [math.log(1 + math.exp(-2.0)), math.log(1 + math.exp(-1.0))]
    for label in (torch.tensor([0]), torch.tensor([[1.0, 0.0]])):
        assert bce(logits, label).item() == pytest.approx(sum(by_hand) / 2)
        assert bce(logits, label, reduce_classes="sum").item() == pytest.approx(sum(by_hand))
    doubled = bce(logits, torch.tensor([0]), class_weights=torch.tensor([3.0, 1.0]))
    assert doubled.item() == pytest.approx((3 * by_hand[0] + by_hand[1]) / 2)
    one = bce(logits[:, :1], torch.tensor([0]))
    assert one.item() == pytest.approx(math.log(1 + math.exp(2.0)))
    with pytest.raises(UserError, match="reduce_classes must be mean or sum, got 'max'"):
        bce(logits, torch.tensor([0]), reduce_classes="max")


def test_bce_of_one_class_is_timms_and_mixes_as_its_targets_do():
    logits, label, other = torch.randn(8, 5), torch.arange(8) % 5, torch.arange(8) % 3
    timms = BinaryCrossEntropy(smoothing=0.1)(logits, label)
    assert bce(logits, label, label_smoothing=0.1).mean().item() == pytest.approx(timms.item())
    mixed = 0.3 * F.one_hot(label, 5) + 0.7 * F.one_hot(other, 5)
    pair = 0.3 * bce(logits, label) + 0.7 * bce(logits, other)
    assert torch.allclose(pair, bce(logits, mixed), atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_focal_without_focus_is_cross_entropy_and_focus_forgets_the_sure(kind):
    logits, label = KINDS[kind]
    plain = cross_entropy if kind == "one_class" else bce
    real = [0, 2, 3, 4]
    assert torch.allclose(focal(logits, label, gamma=0.0)[real], plain(logits, label)[real])
    assert (focal(logits, label) < plain(logits, label)).all()


def test_focal_by_hand():
    logits, label = torch.tensor([[0.9, 0.1]]).log(), torch.tensor([0])
    assert focal(logits, label).item() == pytest.approx(-(0.1**2) * math.log(0.9), rel=1e-4)
    # sigmoid(log 9) = 0.9
    odds = torch.tensor([[math.log(9.0)]])
    present = focal(odds, torch.tensor([1]), alpha=0.25)
    absent = focal(odds, torch.tensor([0]), alpha=0.25)
    assert present.item() == pytest.approx(-0.25 * 0.1**2 * math.log(0.9), rel=1e-4)
    assert absent.item() == pytest.approx(-0.75 * 0.9**2 * math.log(0.1), rel=1e-4)
    with pytest.raises(UserError, match=r"alpha must be null with focal .* got 0\.25"):
        focal(torch.zeros(2, 3), torch.tensor([0, 1]), alpha=0.25)


def test_asymmetric_by_hand_and_as_timm_has_it():
    odds = torch.tensor([[math.log(9.0), math.log(9.0)]])
    label = torch.tensor([[1.0, 0.0]])
    by_hand = -0.1 * math.log(0.9) - 0.85**4 * math.log(1 - 0.85)
    assert asymmetric(odds, label).item() == pytest.approx(by_hand, rel=1e-4)
    assert asymmetric(odds, label, reduce_classes="mean").item() == pytest.approx(by_hand / 2)
    # what is surely absent counts nothing at all: its probability is below the clip
    assert asymmetric(torch.full((1, 2), -4.0), torch.zeros(1, 2)).item() < 1e-20
    logits = torch.randn(16, 6)
    many = (torch.rand(16, 6) < 0.3).float()
    theirs = AsymmetricLossMultiLabel()(logits, many)
    assert asymmetric(logits, many).mean().item() == pytest.approx(theirs.item(), rel=1e-5)
    one = torch.arange(16) % 6
    theirs = AsymmetricLossSingleLabel()(logits, one)
    ours = asymmetric(logits, one, label_smoothing=0.1).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-5)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_loss_is_nearly_zero_where_the_model_is_surely_right(name, kind):
    _, label = KINDS[kind]
    real = label.view(5, -1)[:, 0] >= 0
    truth = F.one_hot(label.clamp(min=0), 4) if kind == "one_class" else label.view(5, -1)
    logits = 60.0 * (2.0 * truth - 1)
    sure, wrong = LOSSES[name](logits, label), LOSSES[name](-logits, label)
    assert sure[real].max() < 1e-6
    assert wrong[real].min() > 2  # asymmetric: the clip keeps an absent class from costing more


@pytest.mark.parametrize("scale", [1.0, 200.0])
@pytest.mark.parametrize(("name", "kind"), CASES)
def test_gradients_are_finite_and_none_comes_from_a_sample_without_a_label(name, kind, scale):
    logits, label = KINDS[kind]
    options = {"focal": {"gamma": 0.5}, "asymmetric": {"gamma_neg": 0.5, "clip": 0.0}}
    for more in ({}, options.get(name, {})):
        given = (scale * logits).requires_grad_()
        value = LOSSES[name](given, label, **more)
        weight = (label.view(5, -1)[:, 0] >= 0).float()
        (value * weight).sum().backward()
        assert value.isfinite().all()
        assert given.grad is not None
        assert given.grad.isfinite().all()
        assert given.grad[1].abs().sum() == 0
        if scale == 1:
            assert (given.grad[weight > 0].abs().sum(1) > 0).all()


@pytest.mark.parametrize(("name", "kind"), [*CASES, ("kl", "one_class")])
def test_every_loss_gives_one_value_a_sample_in_fp32(name, kind):
    logits, label = KINDS[kind]
    other = torch.randn(5, 4) if name == "kl" else label
    value = LOSSES[name](logits.bfloat16(), other)
    assert value.shape == (5,)
    assert value.dtype == torch.float32


@pytest.mark.parametrize("spec", ["balanced", "effective", [1.0, 2.0, 4.0, 9.0]])
def test_class_weights_have_a_mean_of_one_over_the_samples(spec):
    counts = torch.tensor([100, 10, 5000, 0])
    weights = class_weights(spec, counts)
    assert (weights * counts).sum().item() == pytest.approx(counts.sum().item(), rel=1e-5)
    assert weights[3] == 1


def test_class_weights_by_hand():
    counts = torch.tensor([30, 10])
    assert class_weights("balanced", counts).tolist() == pytest.approx([2 / 3, 2])
    effective = [(1 - 0.999) / (1 - 0.999**n) for n in (30, 10)]
    ratio = class_weights("effective", counts)
    assert (ratio[1] / ratio[0]).item() == pytest.approx(effective[1] / effective[0], rel=1e-4)
    assert class_weights([1, 3], counts).tolist() == pytest.approx([2 / 3, 2])
    # of a binary task, and of several labels, the positives are weighted
    assert class_weights("balanced", counts, "binary").tolist() == [3]
    assert class_weights([1, 3], counts, "binary").tolist() == [3]
    several = class_weights("balanced", torch.tensor([20, 1, 0, 200]), "multi_label", samples=200)
    assert several.tolist() == [9, 100, 1, 1]  # 199 times would be too much
    assert class_weights([1, 3], counts, "multi_label").tolist() == [1, 3]
    with pytest.raises(UserError, match=r"class_weights must be > 0 .* got \[0, 0\]"):
        class_weights([0, 0], counts)


def test_kl_sigmoid_is_zero_when_equal_and_moves_the_student_alone():
    teacher = torch.tensor([[2.0, -1.0], [0.5, 3.0]], requires_grad=True)
    assert kl_sigmoid(teacher.detach(), teacher).abs().max() < 1e-6
    student = torch.zeros(2, 2, requires_grad=True)
    found = kl_sigmoid(student, teacher, temperature=2.0)
    assert (found > 0).all()
    found.sum().backward()
    assert teacher.grad is None
    assert (torch.sign(-student.grad) == torch.sign(teacher.detach())).all()


def test_kl_sigmoid_by_hand():
    """One logit: the teacher says 0.9, the student 0.5, at temperature 1."""
    teacher = torch.logit(torch.tensor([[0.9]]))
    by_hand = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)
    found = kl_sigmoid(torch.zeros(1, 1), teacher, temperature=1.0)
    assert found.item() == pytest.approx(by_hand, rel=1e-5)
