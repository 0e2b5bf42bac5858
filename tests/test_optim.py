import itertools

import pytest
import torch
from torch import nn

from potstill.config import Optimizer, Schedule
from potstill.optim import LearningRate, build_optimizer

CPU = torch.device("cpu")


def rates(schedule: Schedule, steps: int = 10, epochs: int = 4, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    rate = LearningRate(optimizer, schedule, steps, epochs, higher_is_better=True)
    return [rate.before_step(i) for i in range(steps * epochs)]


def test_cosine_warms_up_then_falls_to_its_floor():
    found = rates(Schedule("cosine", warmup_epochs=1, min_lr=0.1))
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert found[25] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < found[-1] < 0.11


def test_constant_stays():
    assert set(rates(Schedule("constant"))) == {1.0}


def test_plateau_waits_then_falls_and_survives_a_restart():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    rate = LearningRate(
        optimizer, Schedule("plateau", factor=0.5, patience=1), 1, 10, higher_is_better=True
    )
    seen = []
    for value in (50, 60, 60, 59, 58, 57, 70):
        seen.append(rate.before_step(0))
        rate.after_epoch(value)
        fresh = LearningRate(optimizer, rate.cfg, 1, 10, higher_is_better=True)
        fresh.base = rate.base
        fresh.load_state_dict(rate.state_dict())
        rate = fresh
    assert seen == [1.0, 1.0, 1.0, 1.0, 0.5, 0.5, 0.25]


def test_groups_decay_matrices_only_and_give_the_head_its_rate():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(
        model, {"2.weight", "2.bias"}, Optimizer(lr=0.1, head_lr=0.5, weight_decay=0.05), CPU
    )
    by_parameter = {id(p): g for g in optimizer.param_groups for p in g["params"]}
    assert id(model[0].weight) not in by_parameter
    assert by_parameter[id(model[2].weight)]["lr"] == 0.5
    assert by_parameter[id(model[2].weight)]["weight_decay"] == 0.05
    assert by_parameter[id(model[2].bias)]["weight_decay"] == 0
    assert by_parameter[id(model[1].weight)] == {
        **by_parameter[id(model[1].weight)],
        "lr": 0.1,
        "weight_decay": 0,
    }


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_names_are_what_they_say(name, kind):
    assert type(build_optimizer(nn.Linear(2, 2), set(), Optimizer(name=name), CPU)) is kind
