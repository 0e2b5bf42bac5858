import itertools
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from potstill.config import Augment as AugmentConfig
from potstill.data.augment import (
    LANES,
    Augment,
    crop_boxes,
    cut_boxes,
    progressive_px,
    uniforms,
    views_of,
    warp,
)
from potstill.data.policies import MEAN, STD, recolour
from potstill.errors import UserError

PX = 32
EVERYTHING = {"crop_scale": [0.3, 1.0], "flip": 0.5, "rotate": 30.0, "color": 0.4}
STRONG = {"vflip": 0.5, "policy": "rand-m9-n2-mstd0.5-inc1", "erasing": 0.5}


def photos(count: int = 8, px: int = PX, seed: int = 0) -> Tensor:
    """Smooth uint8 images [B, 3, px, px] as the cache hands them out: a permuted NHWC view."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(count, 3, 6, 6, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (px, px), mode="bicubic").clamp(0, 1)
    return (smooth * 255).byte().permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def augment(seed: int = 0, decode_px: int = PX, **cfg) -> Augment:
    return Augment(AugmentConfig(**cfg), decode_px, seed)


def same_view(count: int, view: int = 3) -> Tensor:
    return torch.full((count,), view)


def labelled(images: Tensor, ids: Tensor, views: Tensor) -> dict[str, Tensor]:
    """A batch of augmented images, the last of which has no label."""
    n = len(ids)
    weight = torch.linspace(1, 2, n)
    seen = weight * (torch.arange(n) < n - 1)
    label = torch.where(seen > 0, torch.arange(n) % 3, -1)
    return {
        "image": images,
        "id": ids,
        "view": views,
        "label": label,
        "weight": weight,
        "label_weight": seen,
        "weight_total": torch.tensor(float(n)),
    }


# ---------------------------------------------------------------------------------- random numbers
def test_uniforms_are_splitmix64():
    """A known sequence: SplitMix64 from state 0 begins 0xE220A8397B1DCDAF (Vigna's splitmix64.c)."""
    from potstill.data.augment import _mix, _mix_int

    assert _mix_int(0) == 0xE220A8397B1DCDAF
    assert int(_mix(torch.tensor([0]))) % (1 << 64) == 0xE220A8397B1DCDAF


@pytest.mark.parametrize("what", ["ids", "views", "hashed views"])
def test_uniforms_are_uniform(what):
    n = 100_000
    counter = torch.arange(n)
    if what == "ids":
        u = uniforms(0, same_view(n), counter)
    elif what == "views":
        u = uniforms(0, counter, same_view(n))
    else:
        u = uniforms(1, views_of(1, 2, counter, None), torch.full((n,), 2**62 + 1))
    assert u.shape == (n, len(LANES))
    assert u.min() >= 0
    assert u.max() < 1
    for lane in u.unbind(1):
        counts = torch.histc(lane, 100, 0, 1)
        chi_square = ((counts - n / 100) ** 2 / (n / 100)).sum()
        assert 50 < chi_square < 165  # 99 degrees of freedom: beyond either end in 1 of 10^4
        assert (lane.sort().values - (torch.arange(n) + 0.5) / n).abs().max() < 2.2 / math.sqrt(n)


def test_lanes_neighbours_seeds_and_views_are_independent():
    n = 100_000
    ids = torch.arange(n)
    u = uniforms(0, same_view(n), ids)
    rows = [*u.unbind(1), u[:, 0].roll(1), u[:, 0].roll(64)]
    rows += [uniforms(0, same_view(n, 4), ids)[:, 0], uniforms(1, same_view(n), ids)[:, 0]]
    correlation = torch.corrcoef(torch.stack(rows)) - torch.eye(len(rows))
    assert correlation.abs().max() < 4.5 / math.sqrt(n)
    across = torch.histc(u.flatten(), 100, 0, 1)
    assert ((across - u.numel() / 100) ** 2 / (u.numel() / 100)).sum() < 165


def test_views_of_is_the_same_from_int_and_tensor():
    occurrences = torch.arange(50)
    for views in (None, 1, 2, 7):
        got = views_of(5, 9, occurrences, views)
        assert got.tolist() == [views_of(5, 9, i, views) for i in range(50)]
        assert got.min() >= 0
        if views is not None:
            assert set(got.tolist()) == set(range(views))
    assert (
        len({views_of(s, e, o, None) for s in range(4) for e in range(30) for o in range(4)}) == 480
    )


# -------------------------------------------------------------------------------------- repeatable
@pytest.mark.parametrize(
    "cfg",
    [
        EVERYTHING,
        {"flip": 0.5, "color": 0.4, "image_px": 20},
        {**EVERYTHING, **STRONG},
        {"policy": "augmix", "erasing": 1.0, "erasing_mode": "rand"},
    ],
)
def test_a_sample_does_not_depend_on_its_batch(cfg):
    images, ids, views = photos(64), torch.arange(64) * 977, torch.arange(64) % 5
    whole = augment(**cfg).train(images, ids, views)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    shuffled = augment(**cfg).train(images[order], ids[order], views[order])
    assert torch.equal(shuffled, whole[order])
    for row in (0, 17, 63):
        one = augment(**cfg).train(images[row : row + 1], ids[row : row + 1], views[row : row + 1])
        torch.testing.assert_close(one[0], whole[row], atol=1e-6, rtol=0)
    plain = augment(**cfg).train(images.contiguous(), ids, views)
    assert torch.equal(plain, whole)


@pytest.mark.parametrize(
    "cfg",
    [EVERYTHING, {"policy": "rand-p1-mstd1"}, {"policy": "trivial"}, {"policy": "augmix"}]
    + [{"erasing": 1.0, "erasing_mode": mode} for mode in ("pixel", "rand", "const")],
)
def test_same_view_same_pixels_and_every_part_of_the_key_counts(cfg):
    image = photos(1)
    one, other = torch.tensor([7]), torch.tensor([8])
    first = augment(**cfg).train(image, one, one)
    assert not torch.equal(first, augment().train(image, one, one))
    assert not first.requires_grad
    assert torch.equal(first, augment(**cfg).train(image, one, one))
    assert not torch.equal(first, augment(**cfg).train(image, other, one))
    assert not torch.equal(first, augment(**cfg).train(image, one, other))
    assert not torch.equal(first, augment(1, **cfg).train(image, one, one))


@pytest.mark.parametrize("cfg", [{"erasing": 0.5}, {"policy": "trivial"}])
def test_one_knob_does_not_move_what_another_draws(cfg):
    images, ids = photos(), torch.arange(8)
    plain = augment(**EVERYTHING).train(images, ids, ids)
    more = augment(**EVERYTHING, **cfg).train(images, ids, ids)
    same = (more == plain).flatten(1).float().mean(1)
    assert same.max() == 1  # a sample whose lot fell out of it


def test_the_stored_images_stay_what_they_were():
    images, ids = photos(), torch.arange(8)
    before = images.clone()
    for cfg in (EVERYTHING, STRONG, {"policy": "augmix", "erasing": 1.0}):
        augment(**cfg).train(images, ids, ids)
        assert torch.equal(images, before)


def test_views_limits_how_many_images_there_are():
    images, ids = photos(4), torch.arange(4)
    cut = augment(**EVERYTHING)
    seen: list[set[bytes]] = [set() for _ in ids]
    for epoch in range(12):
        view = views_of(0, epoch, torch.zeros(4, dtype=torch.int64), 2)
        for row, out in enumerate(cut.train(images, ids, view)):
            seen[row].add(out.numpy().tobytes())
    assert [len(images_of_id) for images_of_id in seen] == [2, 2, 2, 2]


# ---------------------------------------------------------------------------------------- geometry
def test_everything_off_is_the_image():
    images, ids = photos(), torch.arange(8)
    out = augment().train(images, ids, ids)
    assert out.dtype == torch.float32
    assert torch.equal(out, images / 255)
    assert torch.equal(augment().eval(images), images / 255)


def test_nothing_drawn_equals_evaluation_at_any_size():
    images, ids = photos(), torch.arange(8)
    small = augment(image_px=20)
    assert small.train(images, ids, ids).shape == (8, 3, 20, 20)
    assert torch.equal(small.train(images, ids, ids), small.eval(images))


def test_eval_is_antialiased():
    lines = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    lines[..., ::4] = 255  # a comb that a plain bilinear sampling at a quarter would miss or hit
    out = augment(decode_px=64, image_px=16).eval(lines)
    assert (out[..., 1:-1] - 0.25).abs().max() < 1e-3


def test_flip_is_exact_and_as_frequent_as_asked():
    images, ids = photos(64), torch.arange(64)
    always = augment(flip=1.0).train(images, ids, ids)
    assert torch.equal(always, images.flip(3) / 255)
    ids = torch.arange(2000)
    tiny = photos(1, 4).expand(2000, 3, 4, 4)
    flipped = (
        (augment(decode_px=4, flip=0.25).train(tiny, ids, ids) != tiny / 255).flatten(1).any(1)
    )
    assert 0.21 < flipped.float().mean() < 0.29  # 4 standard deviations


def test_vflip_is_exact_and_as_frequent_as_asked():
    images, ids = photos(64), torch.arange(64)
    always = augment(vflip=1.0).train(images, ids, ids)
    assert torch.equal(always, images.flip(2) / 255)
    both = augment(vflip=1.0, flip=1.0).train(images, ids, ids)
    assert torch.equal(both, images.flip(2, 3) / 255)
    ids = torch.arange(2000)
    some = augment(vflip=0.5, flip=0.5).train(photos(1).repeat(2000, 1, 1, 1), ids, ids)
    kinds = [photos(1) / 255, photos(1).flip(2) / 255, photos(1).flip(3) / 255]
    for kind in kinds:  # each of four as often: the two flips are drawn apart
        assert 0.21 < (some == kind).flatten(1).all(1).float().mean() < 0.29


def test_vflip_of_a_crop_is_that_crop_upside_down():
    images, no = photos().float(), torch.zeros(8, dtype=torch.bool)
    boxes = torch.tensor([[0.4, 0.55, 0.5, 0.7]]).expand(8, 4)
    for degrees in (0.0, 25.0):
        turns = torch.full((8,), degrees)
        crop, still = warp(images, boxes, no, -turns, 24), torch.zeros(8)
        flipped = warp(images, boxes, no, turns, 24, ~no)
        torch.testing.assert_close(flipped, crop.flip(2), atol=1e-3, rtol=0)
        assert torch.equal(
            warp(images, boxes, no, still, 24, no), warp(images, boxes, no, still, 24)
        )
    whole = augment(crop_scale=[1.0, 1.0], rotate=1e-6, vflip=1.0)
    ids = torch.arange(8)
    torch.testing.assert_close(
        whole.train(photos(), ids, ids), photos().flip(2) / 255, atol=1e-4, rtol=0
    )


def test_flip_of_a_crop_is_its_mirror():
    images = photos().float()
    boxes = torch.tensor([[0.4, 0.55, 0.5, 0.7]]).expand(8, 4)
    no, yes, still = (
        torch.zeros(8, dtype=torch.bool),
        torch.ones(8, dtype=torch.bool),
        torch.zeros(8),
    )
    crop = warp(images, boxes, no, still, 24)
    torch.testing.assert_close(warp(images, boxes, yes, still, 24), crop.flip(3), atol=1e-3, rtol=0)


def test_warp_of_the_whole_frame_is_the_image():
    images = photos().float()
    still = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(8, 4)
    out = warp(images, still, torch.zeros(8, dtype=torch.bool), torch.zeros(8), PX)
    torch.testing.assert_close(out, images, atol=5e-3, rtol=0)  # of 255


@pytest.mark.parametrize(("degrees", "turns"), [(90.0, 1), (180.0, 2), (-90.0, 3)])
def test_rotation_is_counter_clockwise_about_the_centre(degrees, turns):
    images = photos().float()
    frame = torch.tensor([[0.5, 0.5, 1.0, 1.0]]).expand(8, 4)
    out = warp(images, frame, torch.zeros(8, dtype=torch.bool), torch.full((8,), degrees), PX)
    torch.testing.assert_close(out, images.rot90(turns, (2, 3)), atol=5e-3, rtol=0)


def test_crop_cuts_out_its_box():
    images = photos().float()
    box = torch.tensor([[0.25, 0.75, 0.5, 0.5]]).expand(8, 4)  # the lower left quarter
    out = warp(images, box, torch.zeros(8, dtype=torch.bool), torch.zeros(8), PX // 2)
    torch.testing.assert_close(out, images[:, :, PX // 2 :, : PX // 2], atol=5e-3, rtol=0)


def test_an_even_image_stays_even_whatever_is_drawn():
    even = torch.full((64, 3, PX, PX), 100, dtype=torch.uint8)
    out = augment(**{**EVERYTHING, "color": 0.0}).train(even, torch.arange(64), same_view(64))
    torch.testing.assert_close(out, even / 255, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    ("scale", "ratio", "width", "height"),
    [
        ((0.08, 1.0), (0.75, 4 / 3), 100, 100),
        ((0.5, 0.9), (0.5, 0.6), 64, 96),
        ((0.9, 1.0), (3.0, 4.0), 50, 50),
    ],
)
def test_crop_boxes_stay_in_the_frame_and_keep_their_area(scale, ratio, width, height):
    n = 20_000
    boxes = crop_boxes(uniforms(0, same_view(n), torch.arange(n), 4), scale, ratio, width, height)
    x, y, w, h = boxes.unbind(1)
    for centre, size in ((x, w), (y, h)):
        assert (centre - size / 2).min() > -1e-9
        assert (centre + size / 2).max() < 1 + 1e-9
    aspect = (w * width) / (h * height)
    area = w * h
    if scale[0] * ratio[0] >= 1:  # no ratio fits: clipped to the nearest that does
        assert w.min() == 1
        return
    assert aspect.min() > ratio[0] - 1e-6
    assert aspect.max() < ratio[1] + 1e-6
    share = (area - scale[0]) / (scale[1] - scale[0])
    assert (share.sort().values - (torch.arange(n) + 0.5) / n).abs().max() < 2 / math.sqrt(n)
    small = aspect[area < 0.4].log()
    if len(small):  # where every ratio fits, its logarithm is uniform, so its mean is the middle
        assert small.mean().abs() < 0.01


# ------------------------------------------------------------------------------------------ colour
def test_colour_by_hand():
    pixel = torch.tensor([0.2, 0.4, 0.6]).view(1, 3, 1, 1)
    grey = 0.299 * 0.2 + 0.587 * 0.4 + 0.114 * 0.6
    brighter = recolour(pixel.clone(), torch.tensor([[1.5, 1.0, 1.0]]))
    torch.testing.assert_close(brighter, pixel * 1.5)
    washed = recolour(pixel.clone(), torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(washed, torch.full_like(pixel, grey))
    flat = recolour(torch.cat((pixel, pixel + 0.2), dim=3), torch.tensor([[1.0, 0.0, 1.0]]))
    torch.testing.assert_close(flat, torch.full_like(flat, grey + 0.1))
    assert recolour(pixel.clone(), torch.tensor([[9.0, 1.0, 1.0]])).max() == 1


def test_colour_is_torchvisions_where_nothing_clips():
    from torchvision.transforms import functional as reference

    images = photos().float() / 255 * 0.5 + 0.2
    factors = torch.tensor([[1.2, 0.8, 1.3]]).expand(8, 3)
    expected = reference.adjust_brightness(images, 1.2)
    expected = reference.adjust_saturation(reference.adjust_contrast(expected, 0.8), 1.3)
    got = recolour(images.clone(), factors)
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=0)  # torchvision's weights: 0.2989, …


# ------------------------------------------------------------------------------------------ devices
def test_cpu_is_deterministic():
    images, ids = photos(64), torch.arange(64)
    first = augment(**EVERYTHING, image_px=24).train(images, ids, ids)
    again = augment(**EVERYTHING, image_px=24).train(images, ids, ids)
    assert torch.equal(first, again)
    assert first.min() >= 0
    assert first.max() <= 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    "cfg",
    [
        EVERYTHING,
        {**EVERYTHING, "image_px": 24},
        {"image_px": 24, "flip": 0.5, "vflip": 0.5},
        {"erasing": 0.7, "crop_scale": [0.3, 1.0]},
        {"erasing": 0.7, "erasing_mode": "rand"},
        {"mixup": 0.8, "cutmix": 1.0},
    ],
)
def test_cuda_equals_cpu(cfg):
    images, ids, views = photos(64), torch.arange(64) * 977, torch.arange(64)
    assert torch.equal(uniforms(0, views.cuda(), ids.cuda()).cpu(), uniforms(0, views, ids))
    cut = augment(**cfg)
    on_cpu = cut.train(images, ids, views)
    torch.testing.assert_close(
        cut.train(images.cuda(), ids, views).cpu(), on_cpu, atol=1e-4, rtol=0
    )
    torch.testing.assert_close(cut.eval(images.cuda()).cpu(), cut.eval(images), atol=1e-4, rtol=0)
    batch = labelled(on_cpu, ids, views)
    there = cut.mix({k: v.cuda() for k, v in batch.items()})
    for key, value in cut.mix(batch).items():
        torch.testing.assert_close(there[key].cpu(), value, atol=1e-4, rtol=0)


def test_validation_sees_the_centre():
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    augment = Augment(AugmentConfig(image_px=10, eval_crop=0.5), 20, 0)
    assert torch.equal(augment.eval(images), images[:, :, 5:15, 5:15].float() / 255)


# ------------------------------------------------------------------------------------ policy, erasing
def test_a_policy_comes_after_the_crop_and_before_erasing():
    images, ids = photos(64), torch.arange(64)
    cut = {"crop_scale": [0.3, 1.0], "flip": 0.5}
    plain, strong = augment(**cut), augment(**cut, policy="rand-m9-n1-p1-inc1")
    crops, out = plain.train(images, ids, ids), strong.train(images, ids, ids)
    inverted = (out == 1 - crops).flatten(1).all(1)
    assert 0 < inverted.sum() < 16  # one in fifteen
    erased = augment(**cut, policy="rand-m9-n1-p1-inc1", erasing=1.0, erasing_mode="const")
    black = erased.train(images, ids, ids)
    changed = (black != out).any(1)
    assert ((black == 0).all(1) | ~changed).all()
    assert torch.equal(torch.where(changed[:, None], 0.0, out), black)


def test_a_wrong_policy_is_refused():
    with pytest.raises(UserError, match=r"augment.policy.*'radn-m9'"):
        augment(policy="radn-m9")


def test_erasing_is_as_frequent_and_as_large_as_asked():
    n, px = 2000, 48
    white = torch.full((1, 3, px, px), 255, dtype=torch.uint8).expand(n, 3, px, px)
    ids = torch.arange(n)
    for prob, scale in ((0.3, [0.02, 0.3333]), (1.0, [0.1, 0.2])):
        erase = augment(erasing=prob, erasing_scale=scale, erasing_mode="const", decode_px=px)
        hit = (erase.train(white, ids, ids) == 0).all(1)
        share = hit.flatten(1).float().mean(1)
        often = (share > 0).float().mean()
        assert abs(often - prob) < 4 * math.sqrt(prob * (1 - prob) / n) + 1e-9
        high, wide = hit.any(2).sum(1), hit.any(1).sum(1)
        assert torch.equal(high * wide, hit.sum((1, 2)))  # one rectangle
        rows, columns = hit.any(2).float().mean(0), hit.any(1).float().mean(0)
        assert (rows - rows.flip(0)).abs().max() < 0.07  # no side is spared
        assert (columns - columns.flip(0)).abs().max() < 0.07
        there = share > 0
        share, ratio = share[there], (wide / high)[there].log()
        assert share.min() > scale[0] - 0.012
        assert share.max() < scale[1] + 0.025
        assert abs(share.mean() - sum(scale) / 2) < 0.006
        assert abs(ratio.mean()) < 0.12
        assert (
            0.4 < ratio.std() < 0.8
        )  # 3:10 to 10:3, log-uniform: 0.70, less where it does not fit


def test_what_erased_pixels_are_filled_with():
    n, px = 400, 32
    images, ids = photos(1, px).expand(n, 3, px, px), torch.arange(n)
    outs = {
        mode: augment(erasing=1.0, erasing_scale=[0.2, 0.3], erasing_mode=mode).train(
            images, ids, ids
        )
        for mode in ("pixel", "rand", "const")
    }
    hit = (outs["const"] == 0).all(1)
    for out in outs.values():
        kept = torch.where(hit[:, None], images / 255, out)
        assert torch.equal(kept, images / 255)  # the same rectangle in every mode
    pixels = outs["pixel"].permute(1, 0, 2, 3)[:, hit]
    for channel, mean, std in zip(pixels, MEAN, STD, strict=True):
        assert abs(channel.mean() - mean) < 0.02
        assert abs(channel.std() - std) < 0.03  # the clamp takes some
    assert torch.corrcoef(pixels).triu(1).abs().max() < 0.02
    colours = []
    for out, where in zip(outs["rand"], hit, strict=True):
        colour = out[:, where]
        assert (colour == colour[:, :1]).all()
        colours.append(colour[:, 0])
    assert len(torch.stack(colours).unique(dim=0)) > 0.98 * n
    noises = [out[:, where][:, :20] for out, where in zip(outs["pixel"], hit, strict=True)]
    assert len(torch.stack(noises).flatten(1).unique(dim=0)) == n
    assert {float(n[0].std() > 0.05) for n in noises} == {1.0}  # noise, not a colour


def test_erasing_at_any_size():
    images, ids = photos(4), torch.arange(4)
    for px in (8, 300):
        out = augment(erasing=1.0, image_px=px).train(images, ids, ids)
        assert out.shape == (4, 3, px, px)
        assert out.isfinite().all()


# ---------------------------------------------------------------------------------- mixup and cutmix
def mixed(n: int = 64, px: int = PX, **cfg) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A batch before and after mixing."""
    batch = labelled(photos(n, px) / 255, torch.arange(n) * 977, torch.arange(n) % 5 + 2**40)
    return batch, augment(decode_px=px, **cfg).mix(batch)


def partners(n: int) -> Tensor:
    return torch.tensor([min(i ^ 1, n - 1) for i in range(n)])


def test_mixing_is_off_by_default_and_where_the_epoch_does_not_allow_it():
    batch = labelled(photos(4) / 255, torch.arange(4), torch.arange(4))
    assert augment().mix(batch, True) is batch
    assert augment(mixup=1.0, cutmix=1.0).mix(batch, False) is batch


def test_mixup_blends_a_pair_and_its_labels():
    before, after = mixed(mixup=1.0)
    other, share = partners(64), after["mix"][:, None, None, None]
    expected = share * before["image"] + (1 - share) * before["image"][other]
    torch.testing.assert_close(after["image"], expected, atol=1e-6, rtol=0)
    assert torch.equal(after["label_mix"], before["label"][other])
    assert torch.equal(after["label_weight_mix"], before["label_weight"][other])
    assert torch.equal(after["mix"][::2], after["mix"][1::2])
    assert len(after["mix"].unique()) == 32
    for key in ("label", "id", "view", "weight", "label_weight", "weight_total"):
        assert after[key] is before[key]
    assert not after["image"].requires_grad


def test_cutmix_takes_a_box_from_the_other_and_counts_its_pixels():
    before, after = mixed(cutmix=1.0)
    own, other = before["image"], before["image"][partners(64)]
    kept = (after["image"] == own).all(1)
    pasted = ~kept
    assert (after["image"] == other).all(1)[pasted].all()
    torch.testing.assert_close(after["mix"], kept.float().mean((1, 2)), atol=1e-6, rtol=0)
    high, wide = pasted.any(2).sum(1), pasted.any(1).sum(1)
    assert torch.equal(high * wide, pasted.sum((1, 2)))
    assert torch.equal(kept[::2], kept[1::2])  # the same box for both
    assert (after["mix"] > 0).all()
    assert after["mix"].std() > 0.15


def test_cutmixs_boxes_by_hand():
    lam = torch.tensor([0.75, 0.75, 0.75, 0.5, 1.0, 0.0], dtype=torch.float64)
    places = [[0.5, 0.5], [0.0, 0.0], [0.999, 0.5], [0.5, 0.25], [0.5, 0.5], [0.5, 0.5]]
    boxes = cut_boxes(lam, torch.tensor(places, dtype=torch.float64), 40, 61)
    assert boxes.tolist() == [
        [10, 30, 15, 45],  # half of either side: 20 x 30 about (20, 30)
        [0, 10, 0, 15],  # clipped at the corner
        [29, 40, 15, 45],
        [6, 34, 0, 37],  # 28 x 43 about (20, 15), clipped at the left
        [20, 20, 30, 30],  # nothing
        [0, 40, 0, 61],  # everything
    ]


@pytest.mark.parametrize(
    "cfg", [{"mixup": 0.4}, {"cutmix": 1.0}, {"mixup": 0.8, "cutmix": 1.0, "mix_prob": 0.7}]
)
def test_shares_are_distributed_as_timms(cfg):
    import numpy as np
    from scipy import stats
    from timm.data.mixup import Mixup

    n = 6000
    batch = labelled(torch.zeros(n, 3, 16, 16), torch.arange(n), same_view(n))
    ours = augment(**cfg).mix(batch)["mix"][::2].numpy()
    np.random.seed(0)
    theirs = Mixup(
        cfg.get("mixup", 0.0),
        cfg.get("cutmix", 0.0),
        prob=cfg.get("mix_prob", 1.0),
        mode="pair",
        label_smoothing=0.0,
        num_classes=2,
    )
    # its pairs are the first and the last, and so on: class 0 and class 1
    _, target = theirs(torch.zeros(n, 3, 16, 16), (torch.arange(n) >= n // 2).long())
    expected = target[: n // 2, 0].numpy()
    result: Any = stats.ks_2samp(ours, expected)
    assert result.pvalue > 0.01
    assert abs((ours == 1).mean() - (expected == 1).mean()) < 0.04


def test_mix_prob_and_mix_switch_prob():
    n = 4000
    images = photos(2, 8).float().repeat(n // 2, 1, 1, 1) / 255
    batch = labelled(images, torch.arange(n), same_view(n))
    other = images[partners(n)]
    for prob, switch in ((0.3, 0.5), (1.0, 0.2), (1.0, 1.0), (1.0, 0.0)):
        after = augment(mixup=5.0, cutmix=5.0, mix_prob=prob, mix_switch_prob=switch).mix(batch)
        out = after["image"]
        alone = (out == images).flatten(1).all(1)
        cut = ((out == images) | (out == other)).flatten(1).all(1) & ~alone
        assert abs((~alone).float().mean() - prob) < 4 * math.sqrt(prob * (1 - prob) * 2 / n) + 1e-3
        cuts = prob * switch
        assert abs(cut.float().mean() - cuts) < 4 * math.sqrt(cuts * (1 - cuts) * 2 / n) + 1e-3
        assert (after["mix"][alone] == 1).all()


def test_mixing_does_not_depend_on_the_micro_batch():
    for n in (64, 63):
        before, whole = mixed(n, mixup=0.8, cutmix=1.0, mix_prob=0.9)
        mix = augment(mixup=0.8, cutmix=1.0, mix_prob=0.9).mix
        for cuts in ([0, 2, 10, n], [0, 32, n]):
            parts = [
                mix({k: v[a:b] if v.ndim else v for k, v in before.items()})
                for a, b in itertools.pairwise(cuts)
            ]
            for key in ("image", "mix", "label_mix", "label_weight_mix"):
                assert torch.equal(torch.cat([part[key] for part in parts]), whole[key])


def test_every_part_of_a_pairs_key_counts():
    images = photos(2) / 255
    ids, views = torch.tensor([7, 8]), torch.tensor([3, 3])
    first = augment(mixup=1.0).mix(labelled(images, ids, views))["mix"]
    for other_ids, other_views in (
        (torch.tensor([9, 8]), views),
        (torch.tensor([7, 9]), views),
        (ids, torch.tensor([3, 4])),
        (ids, torch.tensor([4, 3])),
        (ids.flip(0), views),
    ):
        again = augment(mixup=1.0).mix(labelled(images, other_ids, other_views))["mix"]
        assert not torch.equal(again, first)
    assert not torch.equal(augment(1, mixup=1.0).mix(labelled(images, ids, views))["mix"], first)


def test_a_last_odd_sample_is_left_alone():
    for n in (1, 5):
        before, after = mixed(n, mixup=1.0, cutmix=1.0)
        assert after["mix"][-1] == 1
        assert torch.equal(after["image"][-1], before["image"][-1])
        assert torch.equal(after["label_mix"][-1], before["label"][-1])


def test_several_labels_are_mixed_too():
    batch = labelled(photos(4) / 255, torch.arange(4), torch.arange(4))
    batch["label"] = torch.eye(4, 6)
    after = augment(mixup=1.0).mix(batch)
    assert torch.equal(after["label_mix"], torch.eye(4, 6)[[1, 0, 3, 2]])


def test_mixing_leaves_the_batch_as_it_was():
    batch = labelled(photos(6) / 255, torch.arange(6), torch.arange(6))
    before = {k: v.clone() for k, v in batch.items()}
    augment(mixup=1.0, cutmix=1.0).mix(batch)
    assert batch.keys() == before.keys()
    assert all(torch.equal(batch[k], before[k]) for k in batch)


# --------------------------------------------------------------------------- sizes and views
def test_a_growing_size():
    cfg = AugmentConfig(start_px=96, grow_until=0.8)
    assert [progressive_px(cfg, 200, epoch, 10) for epoch in range(10)] == [
        *(96, 112, 128, 128, 144, 160, 176, 192, 200, 200)
    ]
    assert progressive_px(AugmentConfig(), 200, 0, 10) == 200
    assert progressive_px(cfg, 200, 0, 1) == 200
    slow = AugmentConfig(start_px=96, grow_until=1.0)
    assert [progressive_px(slow, 160, epoch, 3) for epoch in range(3)] == [96, 128, 160]
    tiny = AugmentConfig(start_px=8)
    assert [progressive_px(tiny, 12, epoch, 3) for epoch in range(3)] == [12, 12, 12]
    grown = augment(decode_px=200, start_px=96)
    assert [grown.px_at(epoch, 10) for epoch in (0, 9)] == [96, 200]


def test_a_size_of_its_own():
    images, ids = photos(), torch.arange(8)
    recipes: list[dict[str, Any]] = [{"flip": 0.5}, EVERYTHING, {**EVERYTHING, **STRONG}]
    for cfg in recipes:
        small = augment(**cfg).train(images, ids, ids, 16)
        assert small.shape == (8, 3, 16, 16)
        assert torch.equal(small, augment(**cfg, image_px=16).train(images, ids, ids))
        whole = augment(**cfg).train(images, ids, ids, PX)
        assert torch.equal(whole, augment(**cfg).train(images, ids, ids))


def test_test_time_views():
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    assert [v.shape for v in augment(decode_px=20).eval_views(images)] == [(2, 3, 20, 20)]
    one, mirrored = augment(decode_px=20, tta="flip").eval_views(images)
    assert torch.equal(one, images / 255)
    assert torch.equal(mirrored, one.flip(3))
    half: dict[str, Any] = {"image_px": 10, "eval_crop": 0.5}
    five = list(augment(0, 20, **half, tta="five_crop").eval_views(images))
    corners = [(5, 5), (0, 0), (0, 10), (10, 0), (10, 10)]
    for view, (top, left) in zip(five, corners, strict=True):
        assert torch.equal(view, images[:, :, top : top + 10, left : left + 10] / 255)
    assert torch.equal(five[0], augment(0, 20, **half).eval(images))
    ten = list(augment(0, 20, **half, tta="ten_crop").eval_views(images))
    for view, mirrored in zip(ten[::2], ten[1::2], strict=True):
        assert torch.equal(mirrored, view.flip(3))
    assert all(torch.equal(a, b) for a, b in zip(ten[::2], five, strict=True))
    large = torch.randint(0, 256, (2, 3, 40, 40), dtype=torch.uint8)
    most = list(augment(decode_px=40, image_px=35, tta="five_crop").eval_views(large))
    assert torch.equal(most[1], large[:, :, :35, :35] / 255)  # 0.875 of 40
