"""What a model costs before it is trained: counted, and worked out by hand."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from potstill import architecture
from potstill.architecture import MEASURES, TIMED, facts_of, key_of
from potstill.assemble import build_model
from potstill.config import Config, compose
from potstill.errors import UserError

CLASSES = ["blue", "green", "red"]


def config(*overrides: str) -> Config:
    return compose("train", ["data.root=x", "data.decode.image_px=32", *overrides])


def few(*overrides: str) -> Config:
    return config(
        "plugins=[search_parts]", "model=plugin", "model._target_=few_weights", *overrides
    )


@pytest.mark.parametrize(("channels", "px"), [(4, 32), (7, 20)])
def test_a_small_model_by_hand(channels, px):
    """A 3 x 3 convolution of 3 channels with stride 2, a mean, and a matrix."""
    found = facts_of(few(f"model.channels={channels}", f"augment.image_px={px}"), CLASSES)
    side = px // 2
    assert found.parameters == channels * (27 + 1) + channels * 3 + 3
    assert found.macs == side * side * channels * 27 + channels * 3
    assert found.file_mb == pytest.approx(4e-6 * found.parameters)
    assert found.outputs == ("logits", "features")
    assert found.measures() == {
        "parameters": found.parameters,
        "macs": found.macs,
        "file_mb": found.file_mb,
    }


@pytest.mark.parametrize("name", ["test_convnext", "resnet10t", "test_vit"])
def test_timm_models_against_their_parameters_and_hooks(name):
    """Multiply-adds of every convolution and linear layer, from the shapes that go through it."""
    chosen = config(f"model.name={name}", "augment.image_px=32")
    model = build_model(chosen, CLASSES).eval()
    counted = 0

    def count(layer, inputs, output):
        nonlocal counted
        if isinstance(layer, nn.Conv2d):
            k = layer.kernel_size[0] * layer.kernel_size[1] * layer.in_channels // layer.groups
            counted += output.numel() * k
        else:
            counted += output.numel() * layer.in_features

    for layer in model.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    model({"image": torch.zeros(1, 3, 32, 32)})
    found = facts_of(chosen, CLASSES)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    if name == "test_vit":  # and queries by keys, weights by values
        assert found.macs > counted
    else:
        assert found.macs == counted
    state = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point())
    assert found.file_mb == pytest.approx(4e-6 * state)
    assert found.file_mb >= 4e-6 * found.parameters


def test_tiny_ladeda_has_the_papers_parameters():
    native = ("model=tiny_ladeda", "task=binary", "data.decode.fit=native", "cache.format=raw")
    small, large = (
        facts_of(config(*native, f"data.decode.image_px={px}"), ["real", "fake"])
        for px in (64, 128)
    )
    assert small.parameters == large.parameters == 1297
    assert small.outputs == ("logits", "patch_logits", "features", "map")
    assert 4 < large.macs / small.macs < 4.5, "four times the pixels, and fewer borders"


def test_how_a_model_is_trained_does_not_make_it_another():
    same = [
        config("model.name=resnet10t", *more)
        for more in (
            [],
            ["model.pretrained=true"],
            ["model.init_from=somewhere"],
            ["model.freeze.all_but_last_blocks=1"],
            ["model.drop_path=0.1"],
            ["model.grad_checkpointing=true"],
            ["optimizer.lr=0.5", "loop.epochs=3"],
            ["augment.image_px=32"],
        )
    ]
    assert len({key_of(c, CLASSES) for c in same}) == 1
    others = [
        config("model.name=resnet10t"),
        config("model.name=resnet18"),
        config("model.name=resnet10t", "model.kwargs={channels: [4, 6, 8, 12]}"),
        config("model.name=resnet10t", "augment.image_px=24"),
        config("model.name=resnet10t", "data.decode.image_px=48"),
        few(),
        few("model.channels=8"),
    ]
    keys = [key_of(c, CLASSES) for c in others]
    assert len(set(keys)) == len(keys)
    assert key_of(others[0], [*CLASSES, "white"]) != keys[0]


def test_weights_are_not_needed_to_count():
    """A search counts hundreds of models: none may be downloaded, nor an init_from read."""
    plain = facts_of(config("model.name=resnet10t"), CLASSES)
    wanted = config("model.name=resnet10t", "model.pretrained=true", "model.init_from=/nowhere")
    assert facts_of(wanted, CLASSES) == plain
    assert wanted.model["pretrained"] is True, "the config itself stays"


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["model.name=resnet10t", "model.kwargs={chanels: [1]}"], r"model\.kwargs must be what timm's resnet10t takes"),
        (["model.name=test_vit", "augment.image_px=30"], r"augment\.image_px"),
    ],
)  # fmt: skip
def test_a_model_that_cannot_be_built_is_a_users_mistake(overrides, said):
    with pytest.raises(UserError, match=said):
        facts_of(config(*overrides), CLASSES)


def test_a_plugins_own_error_is_told_with_the_model():
    with pytest.raises(
        UserError,
        match=r"model cannot be built, or does not take images of 32 px: .*'channels': -1",
    ):
        facts_of(few("model.channels=-1"), CLASSES)


def test_latency_is_of_one_image_and_of_a_batch():
    told = architecture.timed(few("model.channels=64"), CLASSES, "cpu", 64)
    assert set(told) == {*TIMED, "latency_device"}
    assert set(TIMED) < set(MEASURES)
    assert 0 < told["latency_ms"] < told["latency_ms_batch"]
    assert "threads" in told["latency_device"]
