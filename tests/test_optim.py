import io
import itertools

import pytest
import torch
import torch.nn.functional as F
from timm.optim import list_optimizers
from torch import nn
from torch.optim import lr_scheduler as torchs

from potstill.config import CONF_DIR, Optimizer, Schedule, compose
from potstill.errors import UserError
from potstill.models.images import TimmModel, freeze
from potstill.optim import LearningRate, build_optimizer, check_optimizer

CPU = torch.device("cpu")
ELSEWHERE = ("adahessian", "fused", "bnb")  # second order, or of packages that are not installed


# ------------------------------------------------------------------------------------------- schedules
def rates(schedule: Schedule, steps: int = 10, epochs: int = 4, lr: float = 1.0) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)
    rate = LearningRate(optimizer, schedule, steps, epochs, higher_is_better=True)
    return [rate.before_step(i) for i in range(steps * epochs)]


def rates_of_torch(make, count: int) -> list[float]:
    """What torch's own scheduler sets, update by update."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)
    found = []
    for _ in range(count):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


def test_cosine_warms_up_then_falls_to_its_floor():
    found = rates(Schedule("cosine", warmup_epochs=1, min_lr=0.1))
    assert found[0] == pytest.approx(0.1)
    assert found[9] == found[10] == pytest.approx(1.0)
    assert all(a > b for a, b in itertools.pairwise(found[10:]))
    assert found[25] == pytest.approx(0.1 + 0.9 * 0.5)
    assert 0.1 < found[-1] < 0.11


def test_constant_stays():
    assert set(rates(Schedule("constant"))) == {1.0}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("steps", [1, 7])
@pytest.mark.parametrize(
    ("schedule", "make"),
    [
        (
            Schedule("cosine", min_lr=0.05),
            lambda o, n, w: torchs.CosineAnnealingLR(o, n - w, eta_min=0.05),
        ),
        (
            Schedule("cosine_restarts", cycle_epochs=3, min_lr=0.05),
            lambda o, n, w: torchs.CosineAnnealingWarmRestarts(o, 3 * n // 12, eta_min=0.05),
        ),
        (
            Schedule("cosine_restarts", cycle_epochs=1, cycle_mult=2),
            lambda o, n, w: torchs.CosineAnnealingWarmRestarts(o, n // 12, T_mult=2),
        ),
        (
            Schedule("polynomial", power=0.9),
            lambda o, n, w: torchs.PolynomialLR(o, n - w, power=0.9),
        ),
        (
            Schedule("steps", milestones=[3, 8.5], factor=0.3),
            lambda o, n, w: torchs.MultiStepLR(
                o, [3 * n // 12 - w, round(8.5 * n / 12) - w], gamma=0.3
            ),
        ),
        (
            Schedule("one_cycle", peak=0.4, div_factor=10, final_div_factor=100),
            lambda o, n, w: torchs.OneCycleLR(
                *(o, 1.0, n), pct_start=0.4, div_factor=10, final_div_factor=100
            ),
        ),
    ],
    ids=["cosine", "restarts", "longer restarts", "polynomial", "steps", "one cycle"],
)
def test_every_update_has_torchs_rate(schedule, make, steps, warmup):
    """12 epochs; the warm-up is torch's LinearLR in front (one_cycle has its own, and the config refuses both)."""
    warmup = 0 if schedule.name == "one_cycle" else warmup
    total, warm = 12 * steps, warmup * steps
    expected = rates_of_torch(lambda o: make(o, total, warm), total - warm)
    if warm:
        ramp = rates_of_torch(
            lambda o: torchs.LinearLR(o, 1 / warm, total_iters=max(warm - 1, 1)), warm
        )
        expected = ramp + expected
    schedule = Schedule(**{**vars(schedule), "warmup_epochs": warmup})
    found = rates(schedule, steps, 12)
    assert found == pytest.approx(expected, abs=1e-9)
    assert len(set(found)) > 2


def test_a_cycle_that_is_no_whole_number_of_updates_still_begins_at_the_top():
    found = rates(Schedule("cosine_restarts", cycle_epochs=0.35, cycle_mult=1.5), steps=10)
    tops = [i for i, rate in enumerate(found) if rate == 1.0]
    assert tops == [0, 4, 10, 19, 33]  # 0.35 epochs are 3.5 updates: 4, 6, 9, 13.5, ...


@pytest.mark.parametrize(
    "name", ["cosine", "cosine_restarts", "polynomial", "one_cycle", "steps", "plateau", "constant"]
)
def test_groups_keep_their_proportions_and_the_floor(name):
    """Each group moves from its own rate; one that begins below the floor stays."""
    schedule = Schedule(name, milestones=[1, 2], cycle_epochs=2, patience=0)
    floored = Schedule(**{**vars(schedule), "min_lr": 0.3})
    for cfg, lowest in ((schedule, 0.0), (floored, 0.3)):
        groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 0.5, 0.1)]
        optimizer = torch.optim.SGD(groups, lr=1.0)
        rate = LearningRate(optimizer, cfg, 5, 4, higher_is_better=True)
        for step in range(20):
            assert rate.before_step(step) == optimizer.param_groups[0]["lr"]
            high, half, low = (group["lr"] for group in optimizer.param_groups)
            if not lowest:
                assert (half, low) == pytest.approx((high / 2, high / 10))
            elif name != "one_cycle":
                assert high >= 0.3
                assert half >= 0.3
                assert low == pytest.approx(0.1)
            if step % 5 == 4:
                rate.after_epoch(0.0)


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


def test_the_rate_that_is_told_is_that_of_optimizer_lr():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 1.0)]
    rate = LearningRate(
        torch.optim.SGD(groups, lr=1.0), Schedule("constant"), 1, 1, higher_is_better=True
    )
    assert rate.before_step(0) == 1.0


# -------------------------------------------------------------------------------------------- by name
def tiny() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Flatten(), nn.LayerNorm(8 * 16), nn.Linear(8 * 16, 5)
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    rate = LearningRate(optimizer, Schedule(warmup_epochs=2), 1, 20, higher_is_better=True)
    for step in steps:
        torch.manual_seed(step)
        rate.before_step(step)
        F.cross_entropy(model(torch.randn(4, 3, 6, 6)), torch.randint(0, 5, (4,))).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def own(name: str, **values) -> Optimizer:
    """The config of an optimizer with its own betas."""
    return Optimizer(**{"name": name, "betas": None, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("adamw", torch.optim.AdamW), ("adam", torch.optim.Adam), ("sgd", torch.optim.SGD)],
)
def test_the_common_ones_are_torchs_fused(name, kind):
    optimizer = build_optimizer(tiny(), set(), Optimizer(name=name), CPU)
    assert type(optimizer) is kind
    assert optimizer.defaults["fused"]
    assert optimizer.defaults.get("nesterov", True)
    assert not build_optimizer(tiny(), set(), Optimizer(name="sgd", momentum=0), CPU).defaults[
        "nesterov"
    ]


@pytest.mark.parametrize(
    "name",
    [
        *("adamw", "sgd", "momentum", "lamb", "lars", "lion", "adafactor", "adafactorbv", "muon"),
        *("nadam", "radam", "rmsprop", "rmsproptf", "adan", "adopt", "mars", "novograd", "adamc"),
        *("adabelief", "madgrad", "adamp", "lookahead_adamw", "lookahead_sgd"),
    ],
)
def test_a_stopped_optimizer_goes_on_bit_by_bit(name):
    """Through a file that is read without running code, at a schedule's rates."""
    model, cfg = tiny(), own(name)
    optimizer = build_optimizer(model, {"3.weight", "3.bias"}, cfg, CPU)
    before = [p.detach().clone() for p in model.parameters()]
    train(model, optimizer, range(7))
    assert not any(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    train(model, optimizer, range(7, 14))

    state = torch.load(io.BytesIO(file.getvalue()), weights_only=True)
    again = tiny()
    again.load_state_dict(state["model"])
    fresh = build_optimizer(again, {"3.weight", "3.bias"}, cfg, CPU)
    names = [group["name"] for group in fresh.param_groups]
    fresh.load_state_dict(state["optimizer"])
    assert [group["name"] for group in fresh.param_groups] == names
    train(again, fresh, range(7, 14))
    for expected, found in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(expected, found)


@pytest.mark.filterwarnings("ignore:.*opt_einsum")
def test_every_optimizer_of_timm_trains_or_is_refused_with_a_reason():
    trained = 0
    for name in list_optimizers():
        if name.startswith("kron"):  # compiles for half a minute; tried by hand
            check_optimizer(own(name))
        elif name.startswith(ELSEWHERE):
            with pytest.raises(UserError, match=rf"optimizer\.name: {name} needs .* use "):
                check_optimizer(own(name))
        else:
            model = tiny()
            before = [p.detach().clone() for p in model.parameters()]
            train(model, build_optimizer(model, set(), own(name), CPU), range(2))
            moved = [a.ne(b).any() for a, b in zip(before, model.parameters(), strict=True)]
            assert all(moved), name
            trained += 1
    assert trained > 70


def test_betas_momentum_and_kwargs_reach_those_that_take_them():
    def defaults(**values) -> dict:
        return build_optimizer(tiny(), set(), own(**values), CPU).defaults

    assert defaults(name="lion")["betas"] == (0.9, 0.99)  # its own
    assert defaults(name="lion", betas=[0.8, 0.9])["betas"] == (0.8, 0.9)
    assert "betas" not in defaults(name="sgd", betas=[0.8, 0.9])
    assert defaults(name="rmsprop", momentum=0.5)["momentum"] == 0.5
    assert defaults(name="lamb", kwargs={"trust_clip": True, "eps": 1e-3})["trust_clip"]
    assert defaults(name="adamw", kwargs={"amsgrad": True})["amsgrad"]
    assert defaults(name="adamw", kwargs={"foreach": True})["fused"] is None
    assert defaults(name="lookahead_sgd")["lookahead_k"] == 6


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"name": "adamww"},
            r"optimizer\.name must be an optimizer of timm, got 'adamww'; did you mean adamw, .*; all:",
        ),
        ({"name": "AdamW"}, r"got 'AdamW'; did you mean adamw, "),
        ({"name": "lookahead_adamww"}, r"got 'lookahead_adamww'; did you mean lookahead_adamw, "),
        ({"name": "lookahead_lookahead_adamw"}, r"must be an optimizer of timm"),
        ({"name": "qqqqqq"}, r"got 'qqqqqq'; all: timm\.optim\.list_optimizers\(\)"),
        ({"name": "adahessian"}, r"adahessian needs second derivatives"),
        (
            {"name": "bnblion8bit"},
            r"needs the package bitsandbytes, which is not installed; install it, or use lion",
        ),
        ({"name": "fusedadamw"}, r"needs the package apex, .* or use adamw"),
        ({"kwargs": {"epz": 1}}, r"optimizer\.kwargs: adamw takes no 'epz'; did you mean eps; it"),
        ({"kwargs": {"lr": 1}}, r"kwargs must not hold lr, got 1: use optimizer\.lr"),
        ({"kwargs": {"eps": -1}}, r"must suit adamw, got \{'eps': -1\}: Invalid epsilon"),
        ({"name": "sgdw", "momentum": 0}, r"must suit sgdw, .*Nesterov momentum requires"),
        ({"name": "muon", "kwargs": {"ns_coefficients": "x"}}, r"must suit muon, .*"),
        (
            {"name": "adan", "betas": [0.9, 0.99]},
            r"betas must be 3 numbers for adan, got \[0\.9, 0",
        ),
        ({"lrs": {"a.*": 0}}, r"optimizer\.lrs: the rate of 'a\.\*' must be > 0, got 0"),
        ({"lrs": {"a.*": "fast"}}, r"must be > 0, got 'fast'"),
    ],
)
def test_what_an_optimizer_refuses_is_the_users(values, message):
    with pytest.raises(UserError, match=message):
        check_optimizer(own(**{"name": "adamw", **values}))


def test_presets_are_what_their_files_say():
    for path in sorted((CONF_DIR / "optimizer").glob("*.yaml")):
        cfg = compose("train", ["data.root=x", f"optimizer={path.stem}"]).optimizer
        assert cfg.name == path.stem
        check_optimizer(cfg)
    for path in sorted((CONF_DIR / "schedule").glob("*.yaml")):
        schedule = compose("train", ["data.root=x", f"schedule={path.stem}"]).schedule
        assert schedule.name == path.stem
        falls = schedule.name not in ("constant", "plateau")
        found = rates(schedule, 10, 10)
        assert max(found) == pytest.approx(1.0, abs=1e-3)
        assert (found[-1] < 0.2) is falls


# --------------------------------------------------------------------------------------------- groups
def group_of(optimizer: torch.optim.Optimizer, model: nn.Module) -> dict[str, dict]:
    """Each trained parameter's group, by its name."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}


def test_groups_decay_matrices_only_and_give_the_head_its_rate():
    model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 2))
    model[0].weight.requires_grad_(False)
    optimizer = build_optimizer(
        model, {"2.weight", "2.bias"}, Optimizer(lr=0.1, head_lr=0.5, weight_decay=0.05), CPU
    )
    found = group_of(optimizer, model)
    assert "0.weight" not in found
    expected = {
        "0.bias": ("body", 0.1, 0),
        "1.weight": ("body", 0.1, 0),
        "1.bias": ("body", 0.1, 0),
        "2.weight": ("head", 0.5, 0.05),
        "2.bias": ("head", 0.5, 0),
    }
    assert {n: (g["name"], g["lr"], g["weight_decay"]) for n, g in found.items()} == expected


def test_what_a_model_wants_undecayed_is_not():
    model = TimmModel(3, name="test_vit", image_px=160)
    found = group_of(build_optimizer(model, set(), Optimizer(), CPU), model)
    assert model.net.pos_embed.ndim > 1
    assert found["net.pos_embed"]["weight_decay"] == 0
    assert found["net.blocks.0.attn.qkv.weight"]["weight_decay"] == 0.05
    assert found["net.blocks.0.attn.qkv.bias"]["weight_decay"] == 0


BLOCKS = {
    "test_vit": [f"net.blocks.{i}.attn.qkv.weight" for i in range(6)],
    "test_convnext": [
        f"net.stages.{stage}.blocks.{i}.conv_dw.weight"
        for stage, depth in enumerate((1, 2, 4, 2))
        for i in range(depth)
    ],
}


@pytest.mark.parametrize(
    ("name", "px", "stem", "tail"),
    [
        ("test_vit", 160, "net.patch_embed.proj.weight", "net.norm.weight"),
        ("test_convnext", 64, "net.stem.0.weight", "net.head.norm.weight"),
    ],
)
def test_each_blocks_rate_is_that_of_the_one_above_times_layer_decay(name, px, stem, tail):
    model = TimmModel(3, name=name, image_px=px)
    head = set(model.head_parameter_names())
    assert model.layer_of().keys() == {n for n, _ in model.named_parameters()}
    cfg = Optimizer(lr=1.0, layer_decay=0.5)
    found = group_of(build_optimizer(model, head, cfg, CPU), model)
    chain = [stem, *BLOCKS[name], next(iter(head))]
    assert max(model.layer_of().values()) == len(chain) - 1
    assert [found[n]["lr"] for n in chain] == [0.5**i for i in reversed(range(len(chain)))]
    assert found[tail]["lr"] == 1.0
    assert [found[n]["name"] for n in chain[:2]] == ["layer 0", "layer 1"]
    assert all(found[n]["name"] == "head" for n in head)
    cfg = Optimizer(lr=1.0, layer_decay=0.5, head_lr=3.0)
    found = group_of(build_optimizer(model, head, cfg, CPU), model)
    assert all(found[n]["lr"] == 3.0 for n in head)
    assert found[tail]["lr"] == 1.0


def test_lower_layers_move_less_with_layer_decay():
    """The rates reach the weights: of an equal gradient each layer takes its share."""
    model = TimmModel(3, name="test_resnet")
    freeze(model, 3)  # of 4
    cfg = Optimizer("momentum", lr=1.0, momentum=0.0, weight_decay=0.0, layer_decay=0.1)
    optimizer = build_optimizer(model, set(model.head_parameter_names()), cfg, CPU)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    moved = {n: float((before[n] - p.detach()).mean()) for n, p in model.named_parameters()}
    assert moved["net.conv1.0.weight"] == moved["net.layer1.0.conv1.weight"] == 0  # frozen
    for layer, expected in ((2, 1e-3), (3, 1e-2), (4, 1e-1)):
        assert moved[f"net.layer{layer}.0.conv1.weight"] == pytest.approx(expected, rel=1e-3)
    assert moved["net.fc.weight"] == pytest.approx(1.0)


def test_rates_by_wildcard_win_and_the_first_counts():
    model = TimmModel(3, name="test_resnet")
    head = set(model.head_parameter_names())
    lrs = {"net.layer1.*.bn?.*": 0.3, "net.layer1.*": 0.2, "net.fc.bias": 0.4}
    cfg = Optimizer(lr=0.1, head_lr=0.5, layer_decay=0.9, lrs=lrs)
    found = group_of(build_optimizer(model, head, cfg, CPU), model)
    assert found["net.layer1.0.bn1.weight"]["lr"] == 0.3
    assert found["net.layer1.0.conv1.weight"]["lr"] == 0.2
    assert found["net.layer1.0.conv1.weight"]["name"] == "net.layer1.*"
    assert found["net.fc.bias"]["lr"] == 0.4
    assert found["net.fc.weight"]["lr"] == 0.5
    assert found["net.layer4.0.conv1.weight"]["lr"] == pytest.approx(0.09)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"lrs": {"net.layr4.*": 0.1}},
            r"optimizer\.lrs: 'net\.layr4\.\*' must match .* test_resnet, and matches none; .* net\.layer4\.\*, ",
        ),
        ({"lrs": {"net.layer1.*": 0.1}}, r"all that 'net\.layer1\.\*' names is frozen by model\.freeze"),
        ({"head_lr": 0.5}, r"head_lr must be null for test_resnet, which names no classifier, got 0\.5"),
    ],
)  # fmt: skip
def test_rates_for_parts_that_are_not_there_are_refused(values, message):
    model = TimmModel(3, name="test_resnet")
    freeze(model, 2)
    with pytest.raises(UserError, match=message):
        build_optimizer(model, set(), Optimizer(**values), CPU)


@pytest.mark.parametrize("name", ["pit_ti_224", None])
def test_layer_decay_needs_a_model_that_names_its_blocks(name):
    model = TimmModel(3, name=name) if name else tiny()
    with pytest.raises(
        UserError, match=rf"layer_decay must be null for {name or 'Sequential'}, .* got 0\.5"
    ):
        build_optimizer(model, set(), Optimizer(layer_decay=0.5), CPU)


def test_muon_leaves_the_head_to_adamw():
    model = tiny()
    optimizer = build_optimizer(model, {"3.weight", "3.bias"}, own("muon"), CPU)
    train(model, optimizer, range(1))
    assert "exp_avg" in optimizer.state[model[3].weight]
    assert "exp_avg" not in optimizer.state[model[0].weight]


def test_corrected_decay_measures_each_group_by_its_own_peak():
    model = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 2, bias=False))
    cfg = own("adamc", lr=0.1, head_lr=0.01, weight_decay=0.5)
    optimizer = build_optimizer(model, {"1.weight"}, cfg, CPU)
    before = model[1].weight.detach().clone()
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    torch.testing.assert_close(model[1].weight.detach(), before * (1 - 0.01 * 0.5))
