import math

import pytest
import torch

from potstill.losses import LOSSES, cross_entropy, kl


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


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss_gives_one_value_a_sample_in_fp32(name):
    logits = torch.randn(3, 4, dtype=torch.bfloat16)
    other = torch.tensor([0, 1, 2]) if name == "cross_entropy" else torch.randn(3, 4)
    value = LOSSES[name](logits, other)
    assert value.shape == (3,)
    assert value.dtype == torch.float32
