import contextlib
import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.averaging import Averager


class Net(nn.Module):
    """BatchNorm has buffers that are averaged, and one, a count, that is copied."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.norm(self.conv(x)).relu().mean((2, 3)))


def update(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    torch.manual_seed(step)
    F.cross_entropy(model(torch.randn(4, 3, 6, 6)), torch.randint(0, 2, (4,))).backward()
    optimizer.step()
    optimizer.zero_grad()


def copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def averaged(averager: Averager, model: nn.Module) -> dict[str, Tensor]:
    with averager.swapped():
        return copied(model)


# --------------------------------------------------------------------------------------------- means
@pytest.mark.parametrize("warmup", [True, False])
def test_ema_is_its_formula(warmup):
    """After every update, with the decay that timm's ModelEmaV3 would take."""
    from timm.utils import ModelEmaV3

    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    averager = Averager(model, ema=0.8, warmup=warmup)
    theirs = ModelEmaV3(model, decay=0.8, use_warmup=warmup)
    expected = copied(model)
    for step in range(20):
        update(model, optimizer, step)
        averager.after_step(step)
        decay = theirs.get_decay(step + 1) if warmup else 0.8
        assert decay <= 0.8
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * tensor
            else:
                expected[name] = tensor.clone()
        if warmup:
            theirs.update(model, step + 1)
    found = averaged(averager, model)
    close(found, expected)
    assert int(found["norm.num_batches_tracked"]) == 20
    if warmup:
        close(found, dict(theirs.module.state_dict()))
    assert not torch.allclose(found["conv.weight"], model.conv.weight)
    assert not torch.allclose(found["norm.running_mean"], model.norm.running_mean)


def test_warm_up_forgets_the_first_weights():
    def after(warmup: bool) -> float:
        model = Net()
        averager = Averager(model, ema=0.9999, warmup=warmup)
        with torch.no_grad():
            model.fc.weight.fill_(1.0)
        averager.after_step(0)
        return float(averaged(averager, model)["fc.weight"].mean())

    assert after(warmup=True) == 1.0
    assert after(warmup=False) < 0.5


@pytest.mark.parametrize("last", [2, 3, 9])
def test_the_last_epochs_count_alike(last):
    model, epochs = Net(), 5
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    averager = Averager(model, average_last=last)
    kept = []
    for epoch in range(epochs):
        for step in range(3):
            update(model, optimizer, 3 * epoch + step)
            averager.after_step(3 * epoch + step)
        averager.after_epoch(epoch, epochs)
        kept.append(copied(model))
        assert averager.active is (epoch >= epochs - last)
        if averager.active:
            counted = kept[max(epochs - last, 0) :]
            expected = {
                name: torch.stack([k[name] for k in counted]).mean(0)
                if tensor.is_floating_point()
                else tensor
                for name, tensor in kept[-1].items()
            }
            close(averaged(averager, model), expected)
    assert not torch.allclose(averaged(averager, model)["fc.weight"], model.fc.weight)


def test_neither_is_no_average():
    model = Net()
    averager = Averager(model)
    averager.after_step(0)
    averager.after_epoch(0, 1)
    before = copied(model)
    assert not averager.active
    with averager.swapped():
        assert same(copied(model), before)
    assert averager.state_dict()["tensors"] == {}


# ------------------------------------------------------------------------------------------- swapping
def trained(memory_format=torch.contiguous_format, **options) -> tuple[Net, Averager]:
    model = Net().to(memory_format=memory_format)
    averager = Averager(model, **(options or {"ema": 0.7}))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for step in range(4):
        update(model, optimizer, step)
        averager.after_step(step)
    return model, averager


def test_what_is_trained_comes_back_bit_by_bit_in_the_same_place():
    model, averager = trained(torch.channels_last)
    before, places = copied(model), [p.data_ptr() for p in model.parameters()]
    average = averaged(averager, model)
    assert not same(average, before)
    assert same(copied(model), before)
    assert same(averaged(averager, model), average)
    with contextlib.suppress(KeyError), averager.swapped():
        assert same(copied(model), average)
        raise KeyError
    assert same(copied(model), before)
    assert [p.data_ptr() for p in model.parameters()] == places
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)


def test_what_is_changed_within_stays_in_the_average():
    model, averager = trained()
    before = model.norm.running_mean.clone()
    with averager.swapped():
        model.norm.running_mean.fill_(7.0)
    assert torch.equal(model.norm.running_mean, before)
    assert bool(averaged(averager, model)["norm.running_mean"].eq(7.0).all())


def test_a_compiled_model_sees_the_average():
    model, averager = trained()
    compiled = torch.compile(model.eval(), backend="eager")
    x = torch.randn(2, 3, 6, 6)
    with torch.no_grad():
        before = compiled(x)
        with averager.swapped():
            torch.testing.assert_close(compiled(x), model(x))
            assert not torch.allclose(compiled(x), before)
        assert torch.equal(compiled(x), before)


def test_what_is_frozen_is_neither_averaged_nor_kept_twice():
    model = Net()
    model.conv.weight.requires_grad_(False)
    averager = Averager(model, ema=0.5)
    assert "conv.weight" not in averager.state_dict()["tensors"]
    assert averager.state_dict()["tensors"].keys() == copied(model).keys() - {"conv.weight"}


def test_shared_weights_are_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(2, 2, bias=False), "b": nn.Linear(2, 2, bias=False)})
    model["b"].weight = model["a"].weight
    averager = Averager(model, ema=0.5, warmup=False)
    before = model["a"].weight.detach().clone()
    with torch.no_grad():
        model["a"].weight.add_(1.0)
    averager.after_step(0)
    with averager.swapped():
        torch.testing.assert_close(model["b"].weight.detach(), before + 0.5)
    torch.testing.assert_close(model["b"].weight.detach(), before + 1.0)


# ------------------------------------------------------------------------------------------- resuming
@pytest.mark.parametrize("options", [{"ema": 0.7}, {"average_last": 3}, {}], ids=str)
@pytest.mark.parametrize("within", [True, False])
def test_a_stopped_average_goes_on_bit_by_bit(options, within):
    """Saved with the average in the model or with what is trained; through a file read without code."""

    def go_on(model: Net, averager: Averager, epochs: range) -> dict[str, Tensor]:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        for epoch in epochs:
            for step in range(3):
                update(model, optimizer, 3 * epoch + step)
                averager.after_step(3 * epoch + step)
            averager.after_epoch(epoch, 6)
        return averaged(averager, model)

    model = Net()
    averager = Averager(model, **options)
    go_on(model, averager, range(4))
    file = io.BytesIO()
    if within:
        with averager.swapped():
            torch.save([model.state_dict(), averager.state_dict()], file)
    else:
        torch.save([model.state_dict(), averager.state_dict()], file)
    expected = go_on(model, averager, range(4, 6))

    again = Net()
    fresh = Averager(again, **options)
    weights, state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again.load_state_dict(copy.deepcopy(weights))
    fresh.load_state_dict(state)
    assert same(go_on(again, fresh, range(4, 6)), expected)
    assert same(copied(again), copied(model))
    assert fresh.active is bool(options)
