"""Patch models: the published shapes and names, what a patch sees, their weights from files."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torchvision.models import resnet50

from conftest import ROOT
from potstill.config import build
from potstill.errors import UserError
from potstill.models.images import freeze
from potstill.models.patches import LaDeDa9, PatchModel, TinyLaDeDa
from potstill.models.published import weights_file
from potstill.models.weights import head_of, init_from, load_file_state

BN: dict[str, tuple[int, ...]] = dict.fromkeys(
    ("weight", "bias", "running_mean", "running_var"), (8,)
)
BN["num_batches_tracked"] = ()
TINY = {
    "conv1.weight": (8, 3, 1, 1),
    "conv2.weight": (8, 8, 3, 3),
    **{f"bn1.{k}": v for k, v in BN.items()},
    "layer1.0.conv1.weight": (8, 8, 1, 1),
    **{f"layer1.0.bn1.{k}": v for k, v in BN.items()},
    "layer1.0.conv2.weight": (8, 8, 3, 3),
    **{f"layer1.0.bn2.{k}": v for k, v in BN.items()},
    "fc.weight": (1, 8),
    "fc.bias": (1,),
}


def images(count: int, px: int, seed: int = 0) -> dict[str, torch.Tensor]:
    return {"image": torch.rand(count, 3, px, px, generator=torch.Generator().manual_seed(seed))}


def moved_statistics(model: PatchModel) -> PatchModel:
    """As after some training: no BatchNorm is the identity."""
    torch.manual_seed(7)
    for name, buffer in model.named_buffers():
        if name.endswith("running_mean"):
            buffer.normal_(std=0.1)
        if name.endswith("running_var"):
            buffer.uniform_(0.5, 1.5)
    return model.eval()


# --------------------------------------------------------------------------------------- architecture
def test_the_tiny_ones_state_dict_is_the_published_one():
    model = TinyLaDeDa(1)
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == TINY
    assert sum(p.numel() for p in model.parameters()) == 1297


def test_the_large_ones_names_are_resnets_and_three_kernels_look_around():
    with torch.device("meta"):
        resnet = resnet50(num_classes=1)
        model: Any = LaDeDa9(1)
    state = model.state_dict()
    assert set(state) == set(resnet.state_dict()) | {"conv2.weight"}
    wide = {k for k, v in state.items() if v.ndim == 4 and v.shape[2] == 3}
    assert wide == {"conv2.weight", "layer1.0.conv2.weight", "layer2.0.conv2.weight"}
    assert not {k for k, v in state.items() if v.ndim == 4 and v.shape[2] not in (1, 3)}
    differing = {
        k for k, v in resnet.state_dict().items() if v.shape != state[k].shape and "conv2" not in k
    }
    assert differing == {"conv1.weight"}
    assert [model.bn1.momentum, model.layer1[0].bn1.momentum] == [0.001, 0.1]
    strides = [stage[0].conv2.stride[0] for stage in (model.layer1, model.layer2, model.layer3)]
    assert [*strides, model.layer4[0].conv2.stride[0]] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("cls", "px", "side"),
    [
        (LaDeDa9, 256, 31),
        (LaDeDa9, 64, 7),
        (LaDeDa9, 9, 1),
        (TinyLaDeDa, 256, 126),
        (TinyLaDeDa, 64, 30),
        (TinyLaDeDa, 5, 1),
    ],
)
def test_the_size_of_the_map(cls, px, side):
    with torch.device("meta"):
        found = cls(1, image_px=px).eval()({"image": torch.empty(2, 3, px, px)})
    assert found["patch_logits"].shape == (2, 1, side, side)
    assert found["map"].shape == (2, cls.feature_dim, side, side)
    assert found["features"].shape == (2, cls.feature_dim)
    assert found["logits"].shape == (2, 1)
    size, stride = cls.patch
    assert side == (px - size) // stride + 1


@pytest.mark.parametrize("cls", [LaDeDa9, TinyLaDeDa])
@pytest.mark.parametrize("preprocessing", ["raw", "npr", "right_diag"])
def test_a_patch_sees_its_pixels_and_no_other(cls, preprocessing):
    model = moved_statistics(cls(1, preprocessing=preprocessing)).requires_grad_(False)
    size, stride = cls.patch
    image = images(1, 4 * stride + size)["image"].requires_grad_()
    model({"image": image})["patch_logits"][0, 0, 1, 2].backward()
    assert image.grad is not None
    rows, columns = image.grad[0].abs().sum(0).nonzero().T
    box = [int(v) for v in (rows.min(), rows.max(), columns.min(), columns.max())]
    whole = [stride, stride + size - 1, 2 * stride, 2 * stride + size - 1]
    more = int(preprocessing == "right_diag")
    assert box == [whole[0] - more, whole[1] + more, whole[2] - more, whole[3] + more]


@pytest.mark.parametrize("cls", [LaDeDa9, TinyLaDeDa])
def test_the_images_logit_is_the_mean_of_its_patches_and_of_their_features(cls):
    model = moved_statistics(cls(3))
    with torch.no_grad():
        found = model(images(2, 31))
        torch.testing.assert_close(found["logits"], found["patch_logits"].mean((2, 3)))
        torch.testing.assert_close(found["logits"], model.fc(found["features"]))
        at = found["map"][1, :, 0, 1]
        torch.testing.assert_close(model.fc(at), found["patch_logits"][1, :, 0, 1])


def test_what_passes_by_is_cropped_at_the_right_and_the_bottom():
    """With the three convolutions at 0, a block gives back its input's first rows and columns."""
    model: Any = LaDeDa9(1)
    block = model.layer1[0].eval()
    block.bn3.weight.data.zero_()
    x = torch.rand(1, 64, 10, 10)
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(block.downsample(x)[:, :, :4, :4]))
    assert block.downsample(x).shape[2:] == (5, 5)


# ------------------------------------------------------------------------------------------- the input
def test_the_image_is_normalised_by_imagenets_numbers():
    model = TinyLaDeDa(1)
    seen = []
    model.conv1.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    model({"image": (mean + 2 * std).view(1, 3, 1, 1).expand(2, 3, 8, 8)})
    torch.testing.assert_close(seen[0], torch.full((2, 3, 8, 8), 2.0), atol=1e-5, rtol=0)


def test_npr_by_hand_and_of_an_odd_size():
    model = TinyLaDeDa(1, preprocessing="npr")
    square = torch.tensor([[1.0, 5, 2], [3, 9, 2], [4, 6, 8]]).expand(1, 3, 3, 3)
    expected = torch.tensor([[0.0, 4, 0], [2, 8, 0], [0, 2, 0]])
    assert torch.equal(model.preprocess(square), expected.expand(1, 3, 3, 3))
    whole = images(2, 16)["image"]
    half = F.interpolate(whole, scale_factor=0.5, mode="nearest")
    again = whole - F.interpolate(half, scale_factor=2, mode="nearest")
    assert torch.equal(model.preprocess(whole), again)


def test_the_right_diagonal_by_hand():
    """Of x + 10 y: the kernel is dx + dy, so the sum of (dx + dy) (dx + 10 dy) = 11 x 6; zeros beyond the edge."""
    model = TinyLaDeDa(1, preprocessing="right_diag")
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(5.0), indexing="ij")
    ramp = torch.stack((x + 10 * y, 2 * (x + 10 * y), torch.zeros(5, 5)))[None]
    found = model.preprocess(ramp)
    assert torch.equal(
        found[0, :, 1:4, 1:4], torch.tensor([66.0, 132, 0]).view(3, 1, 1).expand(3, 3, 3)
    )
    assert found[0, 0, 0, 0] == 1 * 1 + 1 * 10 + 2 * 11


def test_the_scale_of_the_input_is_that_of_the_first_kernel():
    plain, scaled = TinyLaDeDa(1).eval(), TinyLaDeDa(1, input_scale=2 / 3).eval()
    scaled.load_state_dict(plain.state_dict())
    plain.conv1.weight.data *= 2 / 3
    with torch.no_grad():
        torch.testing.assert_close(scaled(images(2, 9))["logits"], plain(images(2, 9))["logits"])


@pytest.mark.parametrize(
    ("target", "options", "said"),
    [
        ("ladeda9", {"preprocessing": "NPR"}, r"model\.preprocessing must be one of raw, npr, "),
        ("ladeda9", {"input_scale": 0.0}, r"model\.input_scale must be > 0, got 0"),
        ("tiny_ladeda", {"stem_momentum": 1.5}, r"model\.stem_momentum must be > 0 and <= 1"),
        ("tiny_ladeda", {"preprocesing": "npr"}, r"did you mean model\.preprocessing\?"),
        ("ladeda9", {"px": 8}, r"augment\.image_px .* must be >= 9 for ladeda9.*, got 8"),
    ],
)
def test_what_cannot_be_built_is_refused(target, options, said):
    px = options.pop("px", 64)
    with pytest.raises(UserError, match=said):
        build("model", {"_target_": target, **options}, num_classes=1, image_px=px)


# ---------------------------------------------------------------------------------------- frozen parts
def test_only_the_head_and_the_last_block_train_and_frozen_statistics_stay():
    model = LaDeDa9(1)
    assert max(model.layer_of().values()) == 17
    frozen = set(freeze(model, 1))
    trains = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trains == {n for n in model.state_dict() if n.startswith("layer4.2.")} - {
        n for n in model.state_dict() if "running" in n or "num_batches" in n
    } | {"fc.weight", "fc.bias"}
    assert frozen | trains == {n for n, _ in model.named_parameters()}
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(2):  # fc starts small
        optimizer.zero_grad()
        logits = model(images(4, 17))["logits"]
        F.binary_cross_entropy_with_logits(logits, torch.tensor([[0.0], [1], [1], [1]])).backward()
        optimizer.step()
    changed = {n for n, v in model.state_dict().items() if not torch.equal(before[n], v)}
    assert changed == {n for n in before if n.startswith(("layer4.2.", "fc."))}
    model.eval()
    assert not any(m.training for m in model.modules())


def test_the_blocks_of_the_tiny_one():
    model = TinyLaDeDa(1)
    layers = model.layer_of()
    assert [layers[n] for n in ("conv1.weight", "bn1.bias", "layer1.0.conv2.weight")] == [0, 0, 1]
    assert {layers[n] for n in head_of(model)} == {2}
    with pytest.raises(UserError, match=r"from 0 to 1, the number of blocks of tiny_ladeda, got 2"):
        freeze(model, 2)
    assert "fc.weight" not in freeze(model, 0)


def test_a_model_that_names_no_parts_cannot_be_frozen_in_part():
    with pytest.raises(UserError, match=r"its class names no blocks in Linear, got 1"):
        freeze(torch.nn.Linear(2, 2), 1)
    with pytest.raises(UserError, match=r"must be null for Linear, whose class does not tell"):
        freeze(torch.nn.Linear(2, 2), 0)


# ------------------------------------------------------------------------------------------ weights
WRAPS = {
    "as published": lambda s: s,
    "data parallel": lambda s: {f"module.{k}": v for k, v in s.items()},
    "model": lambda s: {"model": s, "total_steps": 3},
    "state_dict": lambda s: {"state_dict": {f"module.{k}": v for k, v in s.items()}},
}


@pytest.mark.parametrize("wrap", WRAPS)
@pytest.mark.parametrize("how", ["teacher", "init_from"])
def test_published_files_load_whole(tmp_path, wrap, how):
    source, path = moved_statistics(TinyLaDeDa(1)), tmp_path / "WildRF_Tiny_LaDeDa.pth"
    torch.save(WRAPS[wrap](source.state_dict()), path)
    model = TinyLaDeDa(1).eval()
    if how == "teacher":
        load_file_state(model, path, outputs=["1_fake"])
    else:
        assert init_from(model, path, ["1_fake"]).kept == ["1_fake"]
    assert torch.equal(model(images(2, 12))["patch_logits"], source(images(2, 12))["patch_logits"])


def test_a_teachers_logit_must_stand_for_the_positive_class(tmp_path):
    """Folders fake and real make real the positive one: the published files say the contrary."""
    save_file(TinyLaDeDa(1).state_dict(), tmp_path / "w.safetensors")
    with pytest.raises(UserError, match=r"stand for 1_fake, got data .* real; name the folders"):
        load_file_state(TinyLaDeDa(1), tmp_path / "w.safetensors", outputs=["real"])


def test_other_classes_start_from_zero(tmp_path):
    save_file(TinyLaDeDa(1).state_dict(), tmp_path / "w.safetensors")
    model = TinyLaDeDa(1)
    found = init_from(model, tmp_path / "w.safetensors", ["oak"])
    assert (found.dropped, found.new) == (["1_fake"], ["oak"])
    assert not model.fc.weight.any()


def test_a_file_from_a_gpu_loads_without_one(tmp_path, monkeypatch):
    source, path = TinyLaDeDa(1), tmp_path / "w.pth"
    with monkeypatch.context() as patch:
        patch.setattr(torch.serialization, "location_tag", lambda _: "cuda:0")
        torch.save(source.state_dict(), path)
    if not torch.cuda.is_available():
        with pytest.raises(RuntimeError, match="CUDA"):
            torch.load(path, weights_only=True)
    model = TinyLaDeDa(1)
    load_file_state(model, path, outputs=["1_fake"])
    assert torch.equal(model.conv2.weight, source.conv2.weight)


def test_a_file_without_batch_counts_is_whole_and_another_models_is_refused(tmp_path):
    source, path = TinyLaDeDa(1), tmp_path / "w.pth"
    state = {k: v for k, v in source.state_dict().items() if "num_batches" not in k}
    torch.save(state, path)
    load_file_state(TinyLaDeDa(1), path)
    large = LaDeDa9(1)
    before = large.conv1.weight.clone()
    with pytest.raises(
        UserError,
        match=r"teacher\.weights must be weights of ladeda9, got .*w\.pth.*teacher\.model",
    ):
        load_file_state(large, path)
    assert torch.equal(large.conv1.weight, before)
    del state["bn1.running_var"]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"missing bn1\.running_var"):
        load_file_state(TinyLaDeDa(1), path)


@pytest.mark.parametrize(
    ("weights", "target", "place"),
    [
        ("wildrf", "ladeda9", "LaDeDa/WildRF_LaDeDa.pth"),
        ("forensyth", "ladeda9", "LaDeDa/ForenSynth_LaDeDa.pth"),
        ("forensynth", "tiny_ladeda", "Tiny_LaDeDa/ForenSynth_Tiny_LaDeDa.pth"),
        ("finetuned", "ladeda9", "LaDeDa/finetuned.safetensors"),
        ("finetuned", "tiny_ladeda", "Tiny_LaDeDa/finetuned.pth"),
    ],
)
def test_weights_by_name(tmp_path, weights, target, place):
    with pytest.raises(UserError, match=rf"teacher\.weights={weights} must stand in .*"):
        weights_file(weights, str(tmp_path), target)
    path = tmp_path / place
    path.parent.mkdir(parents=True)
    path.touch()
    assert weights_file(weights, str(tmp_path), target) == path


def test_a_missing_file_says_what_to_get_and_where_to_put_it(tmp_path):
    with pytest.raises(UserError) as refused:
        weights_file("wildrf", str(tmp_path), "ladeda9", "teachers.a.weights")
    for part in (
        "teachers.a.weights=wildrf",
        str(tmp_path / "LaDeDa" / "WildRF_LaDeDa.pth"),
        "github.com/barcavia/RealTime-DeepfakeDetection-in-the-RealWorld",
        "README",
        "teachers.a.weights_dir=",
    ):
        assert part in str(refused.value)
    with pytest.raises(UserError, match="its folder weights/Tiny_LaDeDa"):
        weights_file("wildrf", str(tmp_path), "tiny_ladeda")
    with pytest.raises(UserError, match=r"which does not exist; did you mean wildrf\?"):
        weights_file("wildfr", str(tmp_path), "ladeda9")
    with pytest.raises(UserError, match=r"a run is teacher\.run="):
        weights_file(str(tmp_path), "weights", "ladeda9")
    with pytest.raises(
        UserError, match=r"file of ladeda9 or tiny_ladeda, got model\._target_=timm"
    ):
        weights_file("finetuned", str(tmp_path), "timm")
    (tmp_path / "own.pth").touch()
    assert weights_file(str(tmp_path / "own.pth"), "weights", "timm") == tmp_path / "own.pth"


def test_the_driver_asks_for_a_file_without_torch():
    code = "import sys; import potstill.models.published; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(ROOT / "platform"))
