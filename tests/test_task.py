import pytest
import torch
from torch import nn

from potstill.errors import UserError
from potstill.task import Task, Teacher, build_terms, match_classes

CLASSIFY = {"task": {"loss": "cross_entropy", "inputs": ["logits", "label"], "weight": 1.0}}
DISTIL = {
    "task": {"loss": "cross_entropy", "inputs": ["logits", "label"], "weight": 0.1},
    "distil": {
        "loss": "kl",
        "inputs": ["logits", "teacher.logits"],
        "weight": 0.9,
        "temperature": 4.0,
    },
}


class Linear(nn.Module):
    def __init__(self, classes: int = 3) -> None:
        super().__init__()
        self.fc = nn.Linear(3 * 4 * 4, classes)

    def forward(self, batch):
        return {"logits": self.fc(batch["image"].flatten(1))}


def batch_of(n: int, total: float | None = None):
    return {
        "image": torch.rand(n, 3, 4, 4),
        "label": torch.arange(n) % 3,
        "weight": torch.ones(n),
        "weight_total": torch.tensor(total or float(n)),
    }


def test_shares_of_parts_add_up_to_the_whole():
    torch.manual_seed(0)
    task = Task(Linear(), build_terms(CLASSIFY))
    whole = batch_of(10)
    loss, _, _ = task(whole)
    parts = [
        {k: v[cut] if v.ndim else v for k, v in whole.items()}
        for cut in (slice(0, 3), slice(3, 10))
    ]
    assert sum(task(part)[0] for part in parts).item() == pytest.approx(loss.item(), rel=1e-6)


def test_padding_weighs_nothing():
    task = Task(Linear(), build_terms(CLASSIFY))
    batch = batch_of(6, total=4.0)
    batch["weight"][4:] = 0
    loss, _, _ = task(batch)
    four = {k: v[:4] if v.ndim else v for k, v in batch.items()}
    assert loss.item() == pytest.approx(task(four)[0].item(), rel=1e-6)


def test_terms_are_weighted_and_told_apart():
    student, teacher = Task(Linear(), build_terms(DISTIL)), Teacher(Linear(), "teacher", [0, 1, 2])
    loss, shares, _ = student(teacher(batch_of(5)))
    assert set(shares) == {"task", "distil"}
    assert loss.item() == pytest.approx(
        0.1 * shares["task"].item() + 0.9 * shares["distil"].item(), rel=1e-5
    )


def test_a_teacher_stays_frozen_and_in_eval_mode():
    model = nn.Sequential(nn.BatchNorm2d(3))
    wrapped = Linear()
    wrapped.norm = model
    teacher = Teacher(wrapped, "teacher", [0, 1, 2])
    teacher.train()
    assert not teacher.training
    assert not wrapped.norm.training
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher(batch_of(4))["teacher.logits"].requires_grad


def test_a_teacher_answers_in_the_students_order():
    model, batch = Linear(), batch_of(4)
    order = match_classes(["ash", "oak", "elm"], ["elm", "ash", "oak"], "runs/t")
    assert order == [2, 0, 1]
    told = Teacher(model, "teacher", order)(batch)["teacher.logits"]
    assert torch.equal(told, model(batch)["logits"][:, [2, 0, 1]])


def test_other_classes_are_refused_with_the_difference():
    with pytest.raises(
        UserError, match=r"does not know 1: yew; the data lacks 1 of the teacher's: ash"
    ):
        match_classes(["ash", "oak"], ["oak", "yew"], "runs/t")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": "kll"}, r"task\.terms\.distil\.loss must be one of .* did you mean kl\?"),
        ({"inputs": ["logits"]}, r"task\.terms\.distil\.inputs must name 2 inputs"),
        (
            {"temprature": 2},
            r"task\.terms\.distil\.temprature is not an option of kl; it has temperature",
        ),
    ],
)
def test_bad_terms_are_refused_by_name(change, says):
    with pytest.raises(UserError, match=says):
        build_terms({"distil": {**DISTIL["distil"], **change}})


def test_a_missing_column_is_named():
    with pytest.raises(UserError, match=r"names 'teacher.logits'; there are image, label, logits"):
        Task(Linear(), build_terms(DISTIL))(batch_of(2))
