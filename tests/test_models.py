import pytest
import timm
import torch
import torch.nn.functional as F
from timm.models import get_pretrained_cfg

from potstill.errors import UserError
from potstill.models.images import TimmModel, check_name, freeze

FAMILIES = [
    "test_resnet",
    "test_efficientnet",
    "test_convnext",
    "test_vit",
    "mobilenetv3_small_050",
    "tf_efficientnet_lite0",
]


def images(count: int = 2, px: int = 64, seed: int = 0) -> torch.Tensor:
    return torch.rand(count, 3, px, px, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------------------- outputs
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_timms_own(name):
    px = 160 if name == "test_vit" else 64
    model = TimmModel(5, name=name, image_px=px).eval()
    cfg = get_pretrained_cfg(name)
    mean, std = (torch.tensor(s).view(1, 3, 1, 1) for s in (cfg.mean, cfg.std))
    x = images(px=px)
    with torch.no_grad():
        out = model({"image": x, "label": torch.zeros(2)})
        expected = model.net((x - mean) / std)
    torch.testing.assert_close(out["logits"], expected)
    assert out["logits"].shape == (2, 5)
    assert out["logits"].std() > 0
    assert out["features"].shape == (2, model.feature_dim)
    torch.testing.assert_close(model.net.get_classifier()(out["features"]), expected)


def test_each_model_has_its_own_normalisation():
    models = [TimmModel(2, name=name) for name in ("test_vit", "resnet10t")]
    assert not torch.equal(models[0].mean, models[1].mean)
    model = models[0]
    assert not {"mean", "std"} & model.state_dict().keys()  # a file of weights stays timm's own


def test_a_model_without_one_vector_of_features_has_logits_only():
    model = TimmModel(3, name="swiftformer_xs").eval()  # the mean of two classifiers
    assert model.feature_dim is None
    with torch.no_grad():
        assert model({"image": images(1, 224)}).keys() == {"logits"}


@pytest.mark.parametrize("name", ["test_resnet", "efficientvit_m0"])
def test_dropout_is_timms_own(name):
    """The second family drops after it has handed the features out, the first before."""
    model = TimmModel(4, name=name, kwargs={"drop_rate": 0.5})
    assert model.feature_dim
    for module in model.modules():
        module.training = not isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    x = images(4, 160 if name == "test_resnet" else 224)
    torch.manual_seed(0)
    ours = model({"image": x})["logits"]
    torch.manual_seed(0)
    theirs = model.net((x - model.mean) / model.std)
    torch.testing.assert_close(ours, theirs)
    assert not torch.allclose(ours, model.eval()({"image": x})["logits"])


def test_building_leaves_random_state_and_buffers_alone():
    torch.manual_seed(3)
    raw = timm.create_model("test_resnet", num_classes=4, drop_rate=0.2)
    after_raw = torch.rand(3)
    torch.manual_seed(3)
    model = TimmModel(4, name="test_resnet", kwargs={"drop_rate": 0.2})
    assert torch.equal(torch.rand(3), after_raw)
    for name, tensor in raw.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[f"net.{name}"])
    assert all(module.training for module in model.modules())


def test_compiles_without_a_break():
    model = TimmModel(4, name="test_resnet").eval()
    x = images(2, 64)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled({"image": x})["logits"], model({"image": x})["logits"])


def test_kwargs_and_drop_path_reach_timm():
    model = TimmModel(3, name="resnet18", drop_path=0.3, kwargs={"channels": [8, 16, 24, 32]})
    assert model.feature_dim == 32
    assert any(getattr(m, "drop_prob", 0) for m in model.modules())


# ------------------------------------------------------------------------------------- image sizes
def test_a_transformer_is_built_for_its_image_size():
    model = TimmModel(3, name="test_vit", image_px=96).eval()
    assert model({"image": images(1, 96)})["logits"].shape == (1, 3)


@pytest.mark.parametrize(("name", "px"), [("test_vit", 90), ("levit_128s", 130)])
def test_an_impossible_image_size_is_refused(name, px):
    with pytest.raises(
        UserError, match=rf"augment\.image_px .* got {px} for {name}: .*own size is"
    ):
        TimmModel(3, name=name, image_px=px)


# ---------------------------------------------------------------------------------------- mistakes
def test_unknown_name_gets_near_names():
    with pytest.raises(
        UserError, match=r"model\.name must be a timm model, got 'resnt18'; did you mean resnet18, "
    ):
        check_name("resnt18")
    with pytest.raises(UserError, match=r"'qqqqqqqq'; all: timm\.list_models\(\)"):
        check_name("qqqqqqqq")
    with pytest.raises(
        UserError, match=r"no weights 'resnet18\.x'; use resnet18 or one of resnet18\.a1_in1k"
    ):
        check_name("resnet18.x")
    check_name("resnet18.a1_in1k")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "resnet18", "kwargs": {"bogus": 1}}, r"model\.kwargs must .*resnet18.*'bogus'"),
        (
            {"name": "resnet18", "kwargs": {"in_chans": 1}},
            r"model\.kwargs must not hold in_chans, got 1",
        ),
        (
            {"name": "vgg11", "drop_path": 0.1},
            r"model\.drop_path: vgg11 takes none, got 0\.1; set it to null",
        ),
        (
            {"name": "test_mambaout", "pretrained": True},
            r"model\.pretrained=true needs weights, and timm has none",
        ),
    ],
)
def test_what_a_model_refuses_is_the_users(arguments, message):
    with pytest.raises(UserError, match=message):
        TimmModel(3, **arguments)


def test_weights_out_of_reach_name_the_remedy(monkeypatch, tmp_path):
    """The hub is sent to a port that nobody listens on; the cache is empty."""
    import huggingface_hub as hub

    monkeypatch.setattr(hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        UserError, match=r"model\.pretrained=true must download .*model\.init_from=<"
    ):
        TimmModel(3, name="test_resnet", pretrained=True)


# ------------------------------------------------------------------------------------ frozen parts
def trained_one_step(model: TimmModel, px: int) -> tuple[dict, dict]:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.train()
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model({"image": images(8, px)})["logits"], torch.arange(8) % 3).backward()
    optimizer.step()
    return before, model.state_dict()


@pytest.mark.parametrize(
    ("name", "blocks", "trains", "rests"),
    [
        ("test_resnet", 1, "net.layer4.0.", "net.layer3.0."),
        ("mobilenetv3_small_050", 2, "net.blocks.4.2.", "net.blocks.4.1."),
        ("test_efficientnet", 0, "net.conv_head.", "net.blocks.4.0."),
        ("test_convnext", 1, "net.stages.3.", "net.stages.2."),
        ("test_vit", 2, "net.blocks.4.", "net.blocks.3."),
    ],
)
def test_only_the_head_and_the_last_blocks_train(name, blocks, trains, rests):
    px = 160 if name == "test_vit" else 64
    model = TimmModel(3, name=name, image_px=px)
    frozen = set(freeze(model, blocks))
    assert frozen == {n for n, p in model.named_parameters() if not p.requires_grad}
    assert not frozen & set(model.head_parameter_names())
    before, after = trained_one_step(model, px)
    changed = {n for n in after if not torch.equal(before[n], after[n])}
    assert not changed & frozen
    assert changed >= set(model.head_parameter_names())
    assert any(n.startswith(trains) for n in changed)
    assert not any(
        n.startswith(rests) for n in changed
    )  # neither weights nor BatchNorm's statistics
    first = next(iter(after)).removeprefix("net.").split(".")[0]
    assert not any(n.startswith(f"net.{first}") for n in changed)


def test_frozen_batchnorm_stays_put_and_the_rest_moves():
    model = TimmModel(3, name="test_resnet")
    freeze(model, 1)
    before, after = trained_one_step(model, 64)
    statistics = [n for n in after if "running" in n or "num_batches" in n]
    moved = {n for n in statistics if not torch.equal(before[n], after[n])}
    assert moved == {n for n in statistics if n.startswith("net.layer4.")}
    model.eval()
    assert not any(m.training for m in model.modules())


def test_freezing_nothing_and_all_blocks():
    model = TimmModel(3, name="test_resnet")
    assert freeze(model, None) == []
    stem = freeze(model, 4)
    assert stem
    assert all(n.startswith(("net.conv1", "net.bn1")) for n in stem)
    with pytest.raises(
        UserError, match=r"all_but_last_blocks must be from 0 to 4.* of test_resnet, got 5; null"
    ):
        freeze(model, 5)
    with pytest.raises(UserError, match=r"from 0 to 4.*got -1"):
        freeze(model, -1)


def test_a_model_without_named_blocks_can_still_freeze_all_but_its_head():
    model = TimmModel(3, name="pit_ti_224")
    with pytest.raises(
        UserError, match=r"timm names no blocks in pit_ti_224, got 1; use 0 or null"
    ):
        freeze(model, 1)
    freeze(model, 0)
    trains = [n for n, p in model.named_parameters() if p.requires_grad]
    assert trains == model.head_parameter_names()


# ----------------------------------------------------------------------------------- recipes in the model
def one_update(
    name: str, px: int, grad_checkpointing: bool
) -> tuple[int, torch.Tensor, dict[str, torch.Tensor]]:
    """Numbers kept for the backward pass, the logits, and every gradient and buffer after it."""
    torch.manual_seed(0)
    model = TimmModel(
        3, name=name, image_px=px, drop_path=0.3, grad_checkpointing=grad_checkpointing
    )
    with torch.no_grad():  # some blocks begin as the identity, and have no gradient inside
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    kept = 0

    def count(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel()
        return tensor

    torch.manual_seed(1)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = model({"image": images(4, px)})["logits"]
    in_forward = kept
    F.cross_entropy(logits, torch.arange(4) % 3).backward()
    moving = [bool(p.grad.any()) for p in model.parameters()]
    assert sum(moving) > 0.7 * len(moving)
    found = {n: p.grad for n, p in model.named_parameters()} | dict(model.named_buffers())
    return in_forward, logits, found


@pytest.mark.parametrize("name", FAMILIES)
def test_checkpointing_keeps_less_and_changes_no_number(name):
    """Not the statistics of BatchNorm either, which a second forward pass would count twice."""
    px = 160 if name == "test_vit" else 64
    kept, logits, plain = one_update(name, px, grad_checkpointing=False)
    kept_now, logits_now, checkpointed = one_update(name, px, grad_checkpointing=True)
    assert kept_now < 0.6 * kept
    assert torch.equal(logits, logits_now)
    assert plain.keys() == checkpointed.keys()
    for key in plain:
        assert torch.equal(plain[key], checkpointed[key]), key


def test_checkpointing_holds_statistics_of_modules_that_came_later():
    """As scaling.sync_batchnorm makes them."""
    model = TimmModel(3, name="test_resnet", grad_checkpointing=True)
    model.net.layer1[0].bn1 = timm.layers.BatchNormAct2d(32)
    model.train()
    F.cross_entropy(model({"image": images(4)})["logits"], torch.arange(4) % 3).backward()
    assert int(model.net.layer1[0].bn1.num_batches_tracked) == 1


def test_checkpointing_compiles_without_a_break():
    model = TimmModel(4, name="test_resnet", grad_checkpointing=True)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for forward in (compiled, model):
        model.zero_grad()
        F.cross_entropy(forward({"image": images(4)})["logits"], torch.arange(4)).backward()
        gradients.append(model.net.conv1[0].weight.grad)
    assert int(model.net.layer1[0].bn1.num_batches_tracked) == 2
    torch.testing.assert_close(*gradients)


def test_a_family_without_checkpointing_says_so():
    with pytest.raises(
        UserError, match=r"grad_checkpointing must be false for pit_ti_224, .*micro_batch_size"
    ):
        TimmModel(3, name="pit_ti_224", grad_checkpointing=True)


def test_stochastic_depth_drops_whole_samples_in_training_and_more_of_them_above():
    model = TimmModel(3, name="test_vit", image_px=160, drop_path=0.5)
    rates = [
        block.drop_path1.drop_prob
        for block in model.net.blocks
        if hasattr(block.drop_path1, "drop_prob")
    ]
    assert rates == sorted(rates)
    assert rates[-1] == 0.5
    last = model.net.blocks[-1].drop_path1
    torch.manual_seed(0)
    out = last(torch.ones(1000, 2, 2))
    assert set(out.unique().tolist()) == {0.0, 2.0}  # the rest is scaled, so that the mean stays
    assert bool((out == out[:, :1, :1]).all())
    assert 430 < int((out[:, 0, 0] == 0).sum()) < 570
    x = {"image": images(4, 160)}
    torch.manual_seed(0)
    first = model(x)["logits"]
    assert not torch.allclose(first, model(x)["logits"])
    model.eval()
    assert torch.equal(model(x)["logits"], model(x)["logits"])
    without = TimmModel(3, name="test_vit", image_px=160)
    without.load_state_dict(model.state_dict())
    torch.testing.assert_close(without(x)["logits"], model(x)["logits"])  # still in training mode
