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
        "label_weight": torch.ones(n),
        "weight_total": torch.tensor(total or float(n)),
        "label_weight_total": torch.tensor(total or float(n)),
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
    batch["weight"][4:] = batch["label_weight"][4:] = 0
    loss, _, _ = task(batch)
    four = {k: v[:4] if v.ndim else v for k, v in batch.items()}
    assert loss.item() == pytest.approx(task(four)[0].item(), rel=1e-6)


def test_terms_are_weighted_and_told_apart():
    student, teacher = Task(Linear(), build_terms(DISTIL)), Teacher(Linear(), "teacher", [0, 1, 2])
    loss, sums, _ = student(teacher(batch_of(5)))
    assert set(sums) == {"task", "distil"}
    assert all(s.weight == 5 for s in sums.values())
    task, distil = (sums[name].value.item() / 5 for name in ("task", "distil"))
    assert loss.item() == pytest.approx(0.1 * task + 0.9 * distil, rel=1e-5)


def test_rows_without_a_label_teach_by_the_teacher_alone():
    """Of six rows four have a label: the task's mean is over four, the distillation's over six."""
    student, teacher = Task(Linear(), build_terms(DISTIL)), Teacher(Linear(), "teacher", [0, 1, 2])
    batch = batch_of(6)
    batch["label"][4:], batch["label_weight"][4:] = -1, 0
    batch["label_weight_total"] = torch.tensor(4.0)
    _, sums, outputs = student(teacher(batch))
    four = nn.functional.cross_entropy(outputs["logits"][:4], batch["label"][:4], reduction="sum")
    assert sums["task"].value.item() == pytest.approx(four.item(), rel=1e-5)
    assert (sums["task"].weight, sums["distil"].weight) == (4, 6)


def test_a_batch_without_any_label_is_no_reason_to_fail():
    task, batch = Task(Linear(), build_terms(CLASSIFY)), batch_of(4)
    batch["label"][:], batch["label_weight"][:] = -1, 0
    batch["label_weight_total"] = torch.tensor(0.0)
    loss, _, _ = task(batch)
    loss.backward()
    assert loss.item() == 0
    assert all(torch.isfinite(p.grad).all() for p in task.parameters())


def test_both_labels_of_a_mixed_image_count_by_their_shares():
    """Cross-entropy is linear in the target: the same as with soft targets, worked by torch."""
    task, batch = Task(Linear(), build_terms(CLASSIFY)), batch_of(4)
    batch["label_mix"] = batch["label"][[1, 0, 3, 2]]
    batch["label_weight_mix"] = torch.ones(4)
    batch["mix"] = torch.tensor([0.3, 0.3, 0.8, 0.8])
    loss, _, outputs = task(batch)
    own, other = (nn.functional.one_hot(batch[k], 3).float() for k in ("label", "label_mix"))
    soft = batch["mix"][:, None] * own + (1 - batch["mix"][:, None]) * other
    assert loss.item() == pytest.approx(
        nn.functional.cross_entropy(outputs["logits"], soft).item(), rel=1e-5
    )


def test_a_label_mixed_with_none_counts_by_its_share():
    task, batch = Task(Linear(), build_terms(CLASSIFY)), batch_of(2)
    batch |= {"label": torch.tensor([1, -1]), "label_mix": torch.tensor([-1, 1])}
    batch |= {
        "label_weight": torch.tensor([1.0, 0.0]),
        "label_weight_mix": torch.tensor([0.0, 1.0]),
    }
    batch |= {"mix": torch.tensor([0.7, 0.7]), "label_weight_total": torch.tensor(1.0)}
    loss, sums, outputs = task(batch)
    each = nn.functional.cross_entropy(outputs["logits"], torch.tensor([1, 1]), reduction="none")
    assert loss.item() == pytest.approx((0.7 * each[0] + 0.3 * each[1]).item(), rel=1e-5)
    assert sums["task"].weight == pytest.approx(1.0)


def test_class_weights_change_what_a_class_counts():
    plain = Task(Linear(), build_terms(CLASSIFY))
    node = {"task": {**CLASSIFY["task"], "class_weights": "balanced"}}
    weighted = Task(plain.model, build_terms(node, counts_K=[80, 10, 10]))
    batch = batch_of(9)
    rare = {**batch, "label": torch.ones(9, dtype=torch.int64)}
    assert weighted(rare)[0].item() > 3 * plain(rare)[0].item()
    common = {**batch, "label": torch.zeros(9, dtype=torch.int64)}
    assert weighted(common)[0].item() < 0.5 * plain(common)[0].item()
    with pytest.raises(UserError, match=r"class_weights must be .* each of the 3 classes, got 2"):
        build_terms({"task": {**CLASSIFY["task"], "class_weights": [1, 2]}}, counts_K=[1, 1, 1])


@pytest.mark.parametrize("kind", ["multi_label", "binary"])
def test_a_loss_that_does_not_suit_the_labels_is_refused(kind):
    with pytest.raises(UserError, match=rf"task.kind={kind}, got cross_entropy.*use bce"):
        build_terms(CLASSIFY, kind)


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
    with pytest.raises(UserError, match=r"names 'teacher.logits'; there are label, logits"):
        Task(Linear(), build_terms(DISTIL))(batch_of(2))


def test_what_another_loss_has_switched_off_does_not_get_in_the_way():
    node = {"loss": "kl", "inputs": ["logits", "teacher.logits"], "label_smoothing": 0.0}
    assert build_terms({"distil": {**node, "class_weights": None}})[0].options == {}
    with pytest.raises(UserError, match=r"label_smoothing is not an option of kl"):
        build_terms({"distil": {**node, "label_smoothing": 0.1}})


@pytest.mark.parametrize("kind", ["multi_label", "binary"])
def test_a_label_loss_takes_no_teacher_and_kl_has_a_form_for_every_kind(kind):
    with pytest.raises(
        UserError,
        match=r"compares with labels, got teacher.logits; use hard_labels_sigmoid or kl_sigmoid",
    ):
        build_terms({"d": {"loss": "bce", "inputs": ["logits", "teacher.logits"]}}, kind)
    with pytest.raises(UserError, match="got kl; use kl_sigmoid"):
        build_terms({"d": {"loss": "kl", "inputs": ["logits", "teacher.logits"]}}, kind)
    node = {"loss": "kl_sigmoid", "inputs": ["logits", "teacher.logits"]}
    assert build_terms({"d": node}, kind)[0].name == "d"
    with pytest.raises(UserError, match="got kl_sigmoid; use kl"):
        build_terms({"d": node})


def test_class_weights_of_several_labels_come_from_their_share_of_the_images():
    node = {"loss": "bce", "inputs": ["logits", "label"], "class_weights": "balanced"}
    term = build_terms({"task": node}, "multi_label", [10, 50], samples=100)[0]
    assert term.options["class_weights"].tolist() == pytest.approx([9.0, 1.0])


def test_alpha_of_focal_is_for_what_is_present_or_absent():
    node = {"loss": "focal", "inputs": ["logits", "label"], "alpha": 0.3}
    with pytest.raises(UserError, match=r"alpha must be null with focal and one class of several"):
        build_terms({"task": node})
    assert build_terms({"task": node}, "binary")[0].options == {"alpha": 0.3}
