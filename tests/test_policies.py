import math

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from timm.data import auto_augment as timm_ops
from torch import Tensor
from torchvision.transforms.autoaugment import TrivialAugmentWide

from potstill import registry
from potstill.data.augment import uniforms
from potstill.data.policies import (
    AUGMIX,
    GAMMA_LANES,
    MEAN,
    OPERATIONS,
    RAND,
    RAND_INCREASING,
    TRIVIAL,
    AugMix,
    Plugged,
    RandAugment,
    TrivialAugment,
    _strengths,
    apply,
    betas,
    log_gammas,
    parse_policy,
)
from potstill.errors import UserError

POLICIES = ["rand-m9-n2-mstd0.5-inc1", "rand-m6-n3-p0.7", "trivial", "augmix-m3-w3", "augmix-w2-d1"]
NEUTRAL = {
    **dict.fromkeys(("shear_x", "shear_y", "translate_x", "translate_y", "rotate"), 0),
    **dict.fromkeys(("brightness", "contrast", "color", "sharpness"), 1),
    **{"posterize": 8, "solarize": 256, "solarize_add": 0},
}


def photos(count: int = 6, height: int = 40, width: int = 52, seed: int = 0) -> Tensor:
    """Smooth images of whole levels, float [B, 3, height, width] in [0, 1]."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic")
    return (smooth.clamp(0.05, 0.9) * 255).round() / 255


def numbers(count: int, lanes: int, seed: int = 0) -> Tensor:
    return uniforms(seed, torch.zeros(count, dtype=torch.int64), torch.arange(count), lanes)


def one(name: str, images: Tensor, amount: float) -> Tensor:
    amounts = torch.full((len(images),), amount, dtype=torch.float64)
    return apply(images.clone(), (name,), torch.zeros(len(images), dtype=torch.int64), amounts)


# -------------------------------------------------------------------------------------- operations
FILL = {"resample": Image.Resampling.BILINEAR, "fillcolor": tuple(round(255 * m) for m in MEAN)}
BY_PILLOW = [
    ("shear_x", 0.3, lambda image: timm_ops.shear_x(image, 0.3, **FILL)),
    ("shear_y", -0.3, lambda image: timm_ops.shear_y(image, -0.3, **FILL)),
    ("translate_x", 0.25, lambda image: timm_ops.translate_x_rel(image, 0.25, **FILL)),
    ("translate_y", -0.3, lambda image: timm_ops.translate_y_rel(image, -0.3, **FILL)),
    ("rotate", 30, lambda image: timm_ops.rotate(image, 30, **FILL)),
    ("posterize", 3, lambda image: timm_ops.posterize(image, 3)),
    ("posterize", 1, lambda image: timm_ops.posterize(image, 1)),
    ("solarize", 100, lambda image: timm_ops.solarize(image, 100)),
    ("solarize_add", 60, lambda image: timm_ops.solarize_add(image, 60)),
    ("invert", 0, timm_ops.invert),
    ("equalize", 0, timm_ops.equalize),
    ("autocontrast", 0, timm_ops.auto_contrast),
    *(
        (name, factor, lambda image, n=name, f=factor: getattr(timm_ops, n)(image, f))
        for name in ("brightness", "contrast", "color", "sharpness")
        for factor in (0.1, 1.9)
    ),
]


@pytest.mark.parametrize(
    ("name", "amount", "reference"), BY_PILLOW, ids=[f"{n}-{a}" for n, a, _ in BY_PILLOW]
)
def test_operations_are_pillows(name, amount, reference):
    images = photos()
    expected = []
    for image in images:
        pixels = (image * 255).byte().permute(1, 2, 0).numpy()
        expected.append(torch.from_numpy(np.array(reference(Image.fromarray(pixels)))))
    wanted = torch.stack(expected).permute(0, 3, 1, 2).float()
    got = one(name, images, amount) * 255
    moved = (wanted - images * 255).abs().mean()
    difference = (got - wanted).abs()
    assert moved > 0.5
    if OPERATIONS[name][0] == "affine":  # at the edge of what came in, half a pixel is blended
        assert (difference > 1).float().mean() < 0.04
    else:  # Pillow rounds once or twice on its way
        assert difference.max() < 1.5
    assert difference.mean() < 0.1 * moved + 0.4


def test_every_operation_is_compared_with_pillow():
    assert {name for name, *_ in BY_PILLOW} == set(OPERATIONS)
    assert {*RAND, *RAND_INCREASING, *AUGMIX, *TRIVIAL} == {*OPERATIONS, "identity"}


@pytest.mark.parametrize("name", NEUTRAL)
def test_operations_change_nothing_at_their_neutral_amount(name):
    images = photos()
    torch.testing.assert_close(one(name, images, NEUTRAL[name]), images, atol=2e-5, rtol=0)


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("value", [0.0, 0.5, 1.0])
def test_operations_stay_in_range_and_stand_an_even_image(name, value):
    for amount in (0.1, 0.9):
        out = one(name, torch.full((2, 3, 8, 8), value), amount)
        assert out.isfinite().all()
        assert 0 <= out.min() <= out.max() <= 1


def test_operations_stand_the_smallest_images():
    for name in OPERATIONS:
        for height, width in ((1, 1), (1, 3), (2, 2)):
            assert one(name, photos(2, height, width), 0.5).shape == (2, 3, height, width)


def test_a_batch_takes_each_operation_where_it_was_drawn():
    names = (*OPERATIONS, "identity")
    images = photos(2 * len(names) + 1)
    drawn = torch.tensor([*range(len(names)), *range(len(names)), -1])
    amounts = torch.linspace(0.2, 0.9, len(images), dtype=torch.float64)
    out = apply(images.clone(), names, drawn, amounts)
    for row, place in enumerate(drawn.tolist()):
        if place in (-1, len(names) - 1):
            assert torch.equal(out[row], images[row])
        else:
            alone = one(names[place], images[row : row + 1], float(amounts[row]))
            assert torch.equal(out[row], alone[0]), names[place]


# ----------------------------------------------------------------------------------- distributions
@pytest.mark.parametrize("alpha", [0.2, 1.0, 8.0])
def test_gammas_and_betas_are_scipys(alpha):
    n = 20_000
    u = numbers(n, 2 * GAMMA_LANES)
    gammas = log_gammas(u[:, :GAMMA_LANES], alpha).numpy()
    assert stats.kstest(gammas, stats.loggamma(alpha).cdf).pvalue > 0.01
    lam = betas(u, alpha).numpy()
    assert stats.kstest(lam, stats.beta(alpha, alpha).cdf).pvalue > 0.01
    assert stats.kstest(lam, stats.beta(alpha * 1.3, alpha * 1.3).cdf).pvalue < 0.01


def test_betas_take_an_alpha_for_each():
    u = numbers(100, 2 * GAMMA_LANES)
    alpha = torch.tensor([0.2, 3.0], dtype=torch.float64).repeat(50)
    both = betas(u, alpha)
    assert torch.equal(both[::2], betas(u, 0.2)[::2])
    assert torch.equal(both[1::2], betas(u, 3.0)[1::2])


def test_betas_stand_the_ends_of_the_uniforms():
    for value in (0.0, 1 - 2.0**-53):
        lam = betas(torch.full((1, 2 * GAMMA_LANES), value, dtype=torch.float64), 0.1)
        assert 0 <= lam.item() <= 1


# -------------------------------------------------------------------------------------- magnitudes
IN_TIMM = {
    "color": "Color",
    "contrast": "Contrast",
    "brightness": "Brightness",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "solarize_add": "SolarizeAdd",
    "rotate": "Rotate",
    "shear_x": "ShearX",
    "shear_y": "ShearY",
    "translate_x": "TranslateXRel",
    "translate_y": "TranslateYRel",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}


@pytest.mark.parametrize("increasing", [False, True])
def test_randaugments_magnitudes_are_timms(increasing):
    table = RAND_INCREASING if increasing else RAND
    known = timm_ops._RAND_INCREASING_TRANSFORMS if increasing else timm_ops._RAND_TRANSFORMS
    assert len(table) == len(known)
    for name, amount in table.items():
        theirs = IN_TIMM[name]
        theirs = theirs if theirs in known else f"{theirs}Increasing"
        assert theirs in known
        level_of = timm_ops.LEVEL_TO_ARG[theirs]
        for level in (0.0, 2.5, 5.0, 9.0, 10.0) if level_of else ():
            strength = torch.tensor([level / 10] * 2, dtype=torch.float64)
            ours = amount(strength, torch.tensor([-1.0, 1.0], dtype=torch.float64)).tolist()
            # timm draws the sign itself: both come in 40 draws
            expected = {level_of(level, {})[0] for _ in range(40)}
            if name == "posterize":
                expected = {max(bits, 1) for bits in expected}  # none at all is a black image
            assert sorted(set(ours)) == pytest.approx(sorted(expected))


def test_augmix_has_timms_operations():
    names = {IN_TIMM[name] for name in AUGMIX}
    assert names == {name.removesuffix("Increasing") for name in timm_ops._AUGMIX_TRANSFORMS}


def test_trivialaugments_strengths_are_torchvisions():
    theirs = TrivialAugmentWide()._augmentation_space(31)
    assert {name.replace("_", "") for name in TRIVIAL} == {name.lower() for name in theirs}
    strength = torch.arange(31, dtype=torch.float64) / 30
    for name, amount in TRIVIAL.items():
        magnitudes, signed = next(
            v for k, v in theirs.items() if k.lower() == name.replace("_", "")
        )
        expected = magnitudes.double().expand(31)
        if name in ("brightness", "color", "contrast", "sharpness"):
            expected = 1 + expected
        if name.startswith("translate"):
            expected = (expected + 1e-4).floor()  # its int(), but 16 is not 15.9999
        plus, minus = amount(strength, torch.ones(31).double()), amount(strength, -torch.ones(31))
        torch.testing.assert_close(plus.double(), expected, atol=1e-5, rtol=0)
        assert torch.equal(plus, minus.double()) == (not signed or not expected.any())


def test_the_noise_of_a_magnitude():
    u = numbers(20_000, 1)[:, 0]
    assert (_strengths(u, 9, 0, 10) == 0.9).all()
    noisy = _strengths(u, 5, 0.5, 10).numpy()
    assert stats.kstest(noisy * 10, stats.norm(5, 0.5).cdf).pvalue > 0.01
    clamped = _strengths(u, 9, 2, 10)
    assert clamped.max() == 1
    assert 0.28 < (clamped == 1).double().mean() < 0.34  # half a deviation and more above: 31 %
    assert _strengths(u, 9, 2, 15).max() == 1.5
    uniform = _strengths(u, 4, math.inf, 10).numpy()
    assert stats.kstest(uniform * 10, stats.uniform(0, 4).cdf).pvalue > 0.01


# ---------------------------------------------------------------------------------------- policies
@pytest.mark.parametrize("text", POLICIES)
def test_policies_do_not_depend_on_the_batch(text):
    policy, images = parse_policy(text), photos(48, 24, 24)
    u = numbers(48, policy.lanes)
    whole = policy(images.clone(), u)
    assert not torch.equal(whole, images)
    assert whole.dtype == torch.float32
    assert 0 <= whole.min() <= whole.max() <= 1
    order = torch.randperm(48, generator=torch.Generator().manual_seed(1))
    assert torch.equal(policy(images[order], u[order]), whole[order])
    for size in (1, 2, 7):
        parts = [policy(images[i : i + size].clone(), u[i : i + size]) for i in range(0, 48, size)]
        assert torch.equal(torch.cat(parts), whole)
    last = images.to(memory_format=torch.channels_last, copy=True)
    torch.testing.assert_close(policy(last, u), whole, atol=1e-6, rtol=0)


def test_randaugment_draws_every_operation_as_often():
    n = 4000
    images = photos(1, 20, 20).expand(n, 3, 20, 20)
    for p in (0.0, 0.5, 1.0):
        policy = RandAugment(m=9, n=1, p=p, inc=True)
        out = policy(images.clone(), numbers(n, policy.lanes))
        for inverted in (1 - images, one("solarize_add", images[:1], 99).expand_as(images)):
            share = (out == inverted).flatten(1).all(1).double().mean()
            assert abs(share - p / 15) < 4 * math.sqrt(p / 15 / n) + 1e-9
        changed = (out != images).flatten(1).any(1).double().mean()
        assert abs(changed - p) < 4 * math.sqrt(p * (1 - p) / n) + 1e-9


def test_randaugment_does_n_operations_in_a_row():
    images, first = photos(40, 24, 24), RandAugment(m=7, n=1, p=0.8, mstd=1)
    u = numbers(40, 3 * first.lanes)
    expected = images.clone()
    for part in u.chunk(3, dim=1):
        expected = first(expected, part)
    assert torch.equal(RandAugment(m=7, n=3, p=0.8, mstd=1)(images.clone(), u), expected)


def test_randaugments_magnitude_counts():
    images = photos(200, 24, 24)
    moved = []
    for m in (1, 5, 9):
        policy = RandAugment(m=m, n=2, p=1, inc=True)
        out = policy(images.clone(), numbers(200, policy.lanes))
        moved.append(float((out - images).abs().mean()))
    assert moved[0] < 0.9 * moved[1] < 0.81 * moved[2]


def test_trivialaugment_draws_every_operation_as_often_at_any_strength():
    n, images = 8000, photos(1, 64, 64)
    u = numbers(n, 3)
    shifted = u[(u[:, 0] * len(TRIVIAL)).long() == list(TRIVIAL).index("translate_x")]
    assert abs(len(shifted) / n - 1 / 14) < 4 * math.sqrt(1 / 14 / n)
    shifted = shifted[:400]
    out = TrivialAugment()(images.repeat(len(shifted), 1, 1, 1), shifted)
    columns = torch.zeros(len(shifted), dtype=torch.int64)
    fill = torch.tensor(MEAN)[:, None, None]
    for side in (out, out.flip(3)):
        filled = ((side - fill).abs() < 1e-6).all(dim=1).all(dim=1)
        columns = torch.maximum(columns, filled.long().cumprod(1).sum(1))
    # 31 bins of up to 32 px: whole pixels, 15 of which stand for no bin, and both sides as often
    assert set(columns.tolist()) == {int(32 * b / 30) for b in range(31)}
    left = ((out[:, :, :, 0] - fill[:, 0]).abs() < 1e-6).all(2).all(1)
    moved = columns > 0
    assert abs(left[moved].double().mean() - 0.5) < 2 / math.sqrt(int(moved.sum()))


def test_augmix_is_a_mix_of_chains():
    images, many = photos(30, 24, 24), AugMix(m=5, w=3, d=2, a=0.7)
    u = numbers(30, many.lanes)
    share, weights, chains = u.split(
        [2 * GAMMA_LANES, 3 * GAMMA_LANES, many.lanes - 5 * GAMMA_LANES], dim=1
    )
    by_weight = log_gammas(weights.unflatten(1, (3, GAMMA_LANES)), 0.7).exp()
    by_weight = (by_weight / by_weight.sum(1, keepdim=True)).float()[:, :, None, None, None]
    expected, single = images.clone(), AugMix(m=5, w=1, d=2, a=0.7)
    for i, chain in enumerate(chains.chunk(3, dim=1)):
        alone = single(images.clone(), torch.cat((share, weights[:, :GAMMA_LANES], chain), dim=1))
        expected += by_weight[:, i] * (alone - images)
    out = many(images.clone(), u)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    assert (out - images).abs().mean() > 0.01


def test_augmixs_share_is_beta():
    images, policy = photos(1, 20, 20).expand(2000, 3, 20, 20), AugMix(m=3, w=1, d=1, a=2)
    u = numbers(2000, policy.lanes)
    u[:, 3 * GAMMA_LANES + 1] = (list(AUGMIX).index("equalize") + 0.5) / len(AUGMIX)
    out = policy(images.clone(), u)
    full = one("equalize", images[:1], 0) - images[:1]
    share = ((out - images) * full).sum((1, 2, 3)) / (full * full).sum()
    assert stats.kstest(share.double().numpy(), stats.beta(2, 2).cdf).pvalue > 0.01


def test_augmixs_chains_are_of_one_to_three_operations_unless_given():
    images, policy = photos(300, 20, 20), AugMix(m=10, w=1)
    u = numbers(300, policy.lanes)
    mixed, depth = u.split([3 * GAMMA_LANES, policy.lanes - 3 * GAMMA_LANES], dim=1)
    depth, chain = (depth[:, :1] * 3).long()[:, 0] + 1, depth
    out = policy(images.clone(), u)
    for d in (1, 2, 3):
        fixed = AugMix(m=10, w=1, d=d)
        same = fixed(images.clone(), torch.cat((mixed, chain[:, : 1 + 3 * d]), dim=1))
        equal = (same == out).flatten(1).all(1)
        assert 70 < (depth == d).sum() < 130
        assert equal[depth == d].all()
        assert equal[depth != d].double().mean() < 0.2  # a further operation that does nothing


# ------------------------------------------------------------------------------------- their names
@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("rand", RandAugment()),
        ("rand-m9-mstd0.5-inc1", RandAugment(m=9, mstd=0.5, inc=True)),
        ("rand-m9-n3-p0.8-inc0", RandAugment(m=9, n=3, p=0.8)),
        ("rand-m15-mmax20-mstd101", RandAugment(m=15, mmax=20, mstd=math.inf)),
        ("rand-mstdinf", RandAugment(mstd=math.inf)),
        ("trivial", TrivialAugment()),
        ("augmix", AugMix()),
        ("augmix-m3-w3-d-1", AugMix()),
        ("augmix-m5-w4-d2-a0.5-mstd1", AugMix(m=5, w=4, d=2, a=0.5, mstd=1)),
    ],
)
def test_the_names_of_policies(text, expected):
    assert parse_policy(text) == expected


@pytest.mark.parametrize("text", ["rand-m9-n2-mstd0.5", "rand-m3-inc1", "rand-mstd101-n4-p0.2"])
def test_timm_reads_randaugments_names_alike(text):
    ours, theirs = parse_policy(text), timm_ops.rand_augment_transform(text)
    assert isinstance(ours, RandAugment)
    assert ours.n == theirs.num_layers
    for op in theirs.ops:
        assert (op.magnitude, op.prob, op.magnitude_std) == (ours.m, ours.p, ours.mstd)
    assert any(op.name.endswith("Increasing") for op in theirs.ops) == ours.inc


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("randaug", "must be null or of the kind of rand-m9-n2-mstd0.5-inc1, trivial.*'randaug'"),
        ("rand-m11", r"m must be <= 10, the full magnitude, got 11 .*mmax"),
        ("rand-n0", "n must be a whole number of operations from 1 to 16, got 0"),
        ("rand-n1.5", "n must be a whole number"),
        ("rand-p2", "p must be a probability from 0 to 1, got 2"),
        ("rand-m-1", "m must be a magnitude >= 0, got -1"),
        ("rand-m9-m8", "each once with a number, got 'm8'"),
        ("rand-m9-tweights", "rand takes m, n, p, mstd, mmax, inc, .* got 'tweights'"),
        ("rand_m9", "must be null or of the kind"),
        ("trivial-m9", "trivial takes no options, got 'm9'"),
        ("augmix-d0", "d must be a depth from 1 to 16, or -1"),
        ("augmix-a0", "a must be an alpha > 0"),
        ("augmix-ainf", "a must be an alpha > 0"),
        ("augmix-m12", "m must be <= 10"),
        ("augmix-b1", "augmix takes m, w, d, a, mstd"),
        ("", "must be null or of the kind"),
    ],
)
def test_other_names_are_refused(text, message):
    with pytest.raises(UserError, match=f"augment.policy.*{message}"):
        parse_policy(text)


# ---------------------------------------------------------------------------------------- plug-ins
@pytest.fixture
def plugged():
    """Registers a user's augmentations, and takes them out again."""
    names = []

    def put(name, function):
        names.append(name)
        return registry.register("augmentation", name)(function)

    yield put
    for name in names:
        registry._KNOWN["augmentation"].pop(name)


def test_a_users_augmentation_is_a_policy(plugged):
    def darken(images: Tensor, u: Tensor) -> Tensor:
        assert u.dtype == torch.float64
        assert u.shape[1] >= 16
        return images * u[:, 3, None, None, None].float()

    plugged("darken", darken)
    policy, images = parse_policy("darken"), photos(4)
    u = numbers(4, policy.lanes)
    assert policy == Plugged("darken", darken)
    assert torch.equal(policy(images.clone(), u), images * u[:, 3].float()[:, None, None, None])
    with pytest.raises(UserError, match=r"darkem.*plugins"):
        parse_policy("darkem")


def test_what_a_users_augmentation_returns_is_checked(plugged):
    plugged("grey", lambda images, u: images.mean(1, keepdim=True))
    plugged("none", lambda images, u: None)
    plugged("double", lambda images, u: images.double())
    plugged("wide", lambda images, u: images.mean(1, keepdim=True).expand_as(images))
    images, u = photos(2), numbers(2, 64)
    for name, got in (("grey", r"\[2, 1, 40, 52\]"), ("none", "NoneType"), ("double", "float64")):
        with pytest.raises(UserError, match=rf"augment.policy={name} must return.*got .*{got}"):
            parse_policy(name)(images, u)
    assert parse_policy("wide")(images, u).is_contiguous()  # erasing writes into it


# ----------------------------------------------------------------------------------------- devices
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("text", POLICIES)
def test_policies_on_cuda_equal_those_on_the_cpu(text):
    policy, images = parse_policy(text), photos(64, 48, 48)
    u = numbers(64, policy.lanes)
    on_cpu, on_cuda = policy(images.clone(), u), policy(images.cuda(), u).cpu()
    # a rounding apart may be a level apart behind a threshold, and then much more
    assert ((on_cuda - on_cpu).abs() > 1e-4).float().mean() < 1e-3
