import math

import pytest
import torch
from torch import Tensor

from potstill.config import Augment as AugmentConfig
from potstill.data.augment import LANES, Augment, crop_boxes, recolour, uniforms, views_of, warp

PX = 32
EVERYTHING = {"crop_scale": [0.3, 1.0], "flip": 0.5, "rotate": 30.0, "color": 0.4}


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
@pytest.mark.parametrize("cfg", [EVERYTHING, {"flip": 0.5, "color": 0.4, "image_px": 20}])
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


def test_same_view_same_pixels_and_every_part_of_the_key_counts():
    image = photos(1)
    one, other = torch.tensor([7]), torch.tensor([8])
    first = augment(**EVERYTHING).train(image, one, one)
    assert torch.equal(first, augment(**EVERYTHING).train(image, one, one))
    assert not torch.equal(first, augment(**EVERYTHING).train(image, other, one))
    assert not torch.equal(first, augment(**EVERYTHING).train(image, one, other))
    assert not torch.equal(first, augment(1, **EVERYTHING).train(image, one, one))


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
    "cfg", [EVERYTHING, {**EVERYTHING, "image_px": 24}, {"image_px": 24, "flip": 0.5}]
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


def test_validation_sees_the_centre():
    images = torch.randint(0, 256, (2, 3, 20, 20), dtype=torch.uint8)
    augment = Augment(AugmentConfig(image_px=10, eval_crop=0.5), 20, 0)
    assert torch.equal(augment.eval(images), images[:, :, 5:15, 5:15].float() / 255)
