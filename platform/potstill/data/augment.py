"""Augmentation of a whole batch on its device, repeatable to the pixel.

B samples, C = 3 channels, H x W the stored size, h x w what the model sees, L lanes of random numbers.

A sample's augmentation is a function of (seed, view, id) and of nothing else: not of its batch, rank or
step. Soft labels of a random crop stay valid because the crop can be made again. What two samples become
that are mixed is a function of both of their (view, id).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill.data.policies import (
    GAMMA_LANES,
    MEAN,
    STD,
    betas,
    normals,
    parse_policy,
    recolour,
    sample,
)

if TYPE_CHECKING:
    from potstill.config import Augment as AugmentConfig

LANES = (
    *("area", "ratio", "left", "top", "flip", "angle", "brightness", "contrast", "saturation"),
    "vflip",
)
"""One random number each. A new lane goes to the end: the numbers of the others then stay what they were."""

# Streams of their own, by another seed: how many numbers one takes does not move those of the others.
_POLICY = 0xA0761D6478BD642F
_ERASING = 0xE7037ED1A0B428DB
_NOISE = 0x8EBC6AF09C88C6E3
_PAIRS = 0x589965CC75374CC3

_NOISE_PX = 256
_MASK = (1 << 64) - 1
_GAMMA = 0x9E3779B97F4A7C15
_MUL1 = 0xBF58476D1CE4E5B9
_MUL2 = 0x94D049BB133111EB


# ---------------------------------------------------------------------------------- random numbers
def _signed(value: int) -> int:
    """The int64 with the low 64 bits of `value`."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical shift of an int64 tensor; torch's own `>>` drags the sign along."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's step (Steele et al. 2014, doi:10.1145/2660193.2660195), in wrapping int64."""
    x = x + _signed(_GAMMA)
    x = (x ^ _shift_right(x, 30)) * _signed(_MUL1)
    x = (x ^ _shift_right(x, 27)) * _signed(_MUL2)
    return x ^ _shift_right(x, 31)


def _mix_int(x: int) -> int:
    """`_mix` for a Python int; returns the unsigned 64 bits."""
    x = (x + _GAMMA) & _MASK
    x = ((x ^ (x >> 30)) * _MUL1) & _MASK
    x = ((x ^ (x >> 27)) * _MUL2) & _MASK
    return x ^ (x >> 31)


@overload
def views_of(seed: int, epoch: int, occurrence: int, views: int | None) -> int: ...
@overload
def views_of(seed: int, epoch: int, occurrence: Tensor, views: int | None) -> Tensor: ...
def views_of(seed: int, epoch: int, occurrence: int | Tensor, views: int | None) -> int | Tensor:
    """Which view of a sample is due: hash(seed, epoch, occurrence), modulo `views` where it is set.

    `occurrence` counts how often this id has come in this epoch, from 0: an int, or int64 of any shape,
    whose shape and device the result has. Never negative.
    """
    start = _mix_int(_mix_int(seed) ^ (epoch & _MASK))
    if isinstance(occurrence, Tensor):
        hashed = _shift_right(_mix(occurrence ^ _signed(start)), 1)
        return hashed if views is None else hashed % views
    value = _mix_int(start ^ (occurrence & _MASK)) >> 1
    return value if views is None else value % views


def uniforms(seed: int, views: Tensor, ids: Tensor, lanes: int = len(LANES)) -> Tensor:
    """Counter-based random numbers in [0, 1): float64 [B, L] on the ids' device, from int64 [B] each.

    Row b depends on (seed, views[b], ids[b]) only, and is the same to the bit on every device.
    """
    keys_B = _mix(_mix(views ^ _signed(_mix_int(seed))) ^ ids)
    lane_L = torch.arange(lanes, device=ids.device)
    bits_BL = _mix(keys_B[:, None] + lane_L * _signed(_GAMMA))
    return _shift_right(bits_BL, 11).double() * 2.0**-53


# ---------------------------------------------------------------------------------------- geometry
def crop_boxes(
    u_BL: Tensor, scale: tuple[float, float], ratio: tuple[float, float], width: int, height: int
) -> Tensor:
    """RandomResizedCrop's box (Szegedy et al. 2014, arXiv:1409.4842) in one step. u_BL: [B, 4] in [0, 1).

    Returns [B, 4]: centre x, centre y, width, height, as shares of the frame; always inside it.

    The area is uniform in `scale`, the ratio log-uniform in the part of `ratio` that fits the frame at
    that area, the place uniform. torchvision draws area and ratio together, again and again until they
    fit (its large areas are rarer for that), falls back to a centre crop after ten attempts, and rounds
    to whole pixels; ours keeps the area's distribution, and a box may begin between two pixels. Where
    no ratio fits, the nearest one is taken and the box clipped, as in that fallback.
    """
    area = scale[0] + (scale[1] - scale[0]) * u_BL[:, 0]
    frame = width / height
    widest = torch.clamp(frame / area, ratio[0], ratio[1])
    narrowest = torch.clamp(frame * area, ratio[0], ratio[1])
    log_narrow, log_wide = narrowest.log(), widest.log()
    aspect = (log_narrow + (log_wide - log_narrow) * u_BL[:, 1]).exp() / frame
    w = (area * aspect).sqrt().clamp(max=1.0)
    h = (area / aspect).sqrt().clamp(max=1.0)
    x = w / 2 + (1 - w) * u_BL[:, 2]
    y = h / 2 + (1 - h) * u_BL[:, 3]
    return torch.stack((x, y, w, h), dim=1)


def warp(
    images: Tensor,
    boxes: Tensor,
    mirrored: Tensor,
    degrees: Tensor,
    px: int,
    upside_down: Tensor | None = None,
) -> Tensor:
    """Crop, mirror and turn by one bilinear sampling. float [B, C, H, W] -> float [B, C, px, px].

    `boxes` [B, 4] as `crop_boxes` gives them, `mirrored` (left to right) and `upside_down` bool [B], `degrees`
    [B], counter-clockwise about the crop's centre. What a turn brings in from outside the crop is the
    frame's own content, reflected at its border. There is no antialiasing: where a crop is more than twice
    as wide as `px`, pixels are skipped, so store the cache at less than 2 x augment.image_px.
    """
    boxes, degrees = boxes.double(), degrees.double()
    x, y, w, h = boxes.unbind(1)
    cos, sin = torch.cos(degrees * math.pi / 180), torch.sin(degrees * math.pi / 180)
    w = torch.where(mirrored, -1.0, 1.0).double() * w
    if upside_down is not None:
        h = torch.where(upside_down, -1.0, 1.0).double() * h
    coefficients = torch.stack((w * cos, -w * sin, 2 * x - 1, h * sin, h * cos, 2 * y - 1), dim=1)
    return sample(images, coefficients, (px, px), "reflection")


def resize(images: Tensor, px: int) -> Tensor:
    """The whole frame, antialiased bilinear. uint8 [B, 3, H, W] -> float [B, 3, px, px] in [0, 1]."""
    planes = _planes(images)
    if images.shape[-2:] != (px, px):
        planes = F.interpolate(planes, (px, px), mode="bilinear", antialias=True).clamp_(0, 255)
    return planes.div_(255)


def _planes(images: Tensor) -> Tensor:
    """float32 in [0, 255], plane after plane: both samplings read planes fastest, and a model's rounding
    does not then depend on how a batch happened to lie in memory."""
    return images.contiguous().float()


def progressive_px(cfg: AugmentConfig, image_px: int, epoch: int, epochs: int) -> int:
    """Side of what the model sees in an epoch (0-based), in pixels: a multiple of 16, or `image_px`.

    It grows linearly from `start_px` to `image_px`, which is reached after the share `grow_until` of the
    epochs, and in the last one whatever that is. Tan and Le 2021, arXiv:2104.00298.
    """
    full_from = min(math.ceil(cfg.grow_until * epochs), epochs - 1)
    if cfg.start_px is None or epoch >= full_from:
        return image_px
    side = cfg.start_px + (image_px - cfg.start_px) * epoch / full_from
    return min(max(16 * round(side / 16), 16), image_px)


# ------------------------------------------------------------------------------------ mixing of pairs
def cut_boxes(lam_B: Tensor, u_B2: Tensor, height: int, width: int) -> Tensor:
    """CutMix's boxes, as timm draws them. Yun et al. 2019, arXiv:1905.04899. float64 [B], [B, 2] in [0, 1).

    Returns int64 [B, 4]: top, bottom, left, right, the second of each pair left out. The sides are
    sqrt(1 - lam) of the frame's, the centre is anywhere in it, and what stands out is clipped.
    """
    sides = []
    for size, u in ((height, u_B2[:, 0]), (width, u_B2[:, 1])):
        cut = (size * (1 - lam_B).sqrt()).long()
        centre = (size * u).long()
        sides += [(centre - cut // 2).clamp(min=0), (centre + (cut + 1) // 2).clamp(max=size)]
    return torch.stack(sides, dim=1)


def _between(low: Tensor, high: Tensor, size: int) -> Tensor:
    """bool [B, size]: which of `size` places are in [low, high) [B]."""
    places = torch.arange(size, device=low.device)
    return (places >= low[:, None]) & (places < high[:, None])


# ------------------------------------------------------------------------------------------- a batch
class Augment:
    """`cfg` says what is drawn, `seed` from which stream; images are stored at `decode_px`."""

    def __init__(self, cfg: AugmentConfig, decode_px: int, seed: int) -> None:
        self.image_px = cfg.image_px or decode_px
        self.seed = seed
        self.scale = (float(cfg.crop_scale[0]), float(cfg.crop_scale[1]))
        self.ratio = (float(cfg.crop_ratio[0]), float(cfg.crop_ratio[1]))
        self.flip, self.vflip = cfg.flip, cfg.vflip
        self.rotate, self.color = cfg.rotate, cfg.color
        self.policy = parse_policy(cfg.policy) if cfg.policy else None
        self.eval_crop, self.tta = cfg.eval_crop, cfg.tta
        self.mix_off_epochs = cfg.mix_off_epochs
        self.cfg = cfg
        self._noise: Tensor | None = None

    @torch.no_grad()
    def train(self, images: Tensor, ids: Tensor, views: Tensor, px: int | None = None) -> Tensor:
        """uint8 [B, 3, H, W] in any memory format, int64 [B], int64 [B] -> float [B, 3, h, w] in [0, 1].

        Crop, flip and turn, then colour, then the policy, then erasing. With everything off it is the whole
        frame as `resize` makes it, to the bit. `px` is another side than `image_px`. Runs on the images'
        device, in fp32; the policy and erasing are planned on the CPU: `ids` and `views` that are there already
        spare a wait for the device.
        """
        device, px = images.device, px or self.image_px
        planned_ids, planned_views = ids, views
        ids, views = (t.to(device, non_blocking=True) for t in (ids, views))
        u = dict(zip(LANES, uniforms(self.seed, views, ids).unbind(1), strict=True))
        mirrored, upside_down = u["flip"] < self.flip, u["vflip"] < self.vflip
        if self.rotate or self.scale != (1.0, 1.0):
            place = torch.stack([u[lane] for lane in ("area", "ratio", "left", "top")], dim=1)
            boxes = self._boxes(place, width=images.shape[3], height=images.shape[2])
            degrees = (2 * u["angle"] - 1) * self.rotate
            out = warp(_planes(images), boxes, mirrored, degrees, px, upside_down).div_(255)
        else:
            out = resize(images, px)
            if self.flip:
                out = torch.where(mirrored[:, None, None, None], out.flip(3), out)
            if self.vflip:
                out = torch.where(upside_down[:, None, None, None], out.flip(2), out)
        if self.color:
            jitter = [u[lane] for lane in ("brightness", "contrast", "saturation")]
            factors = 1 + (2 * torch.stack(jitter, dim=1) - 1) * self.color
            out = recolour(out, factors.clamp_(min=0))
        if self.policy is not None:
            seed, lanes = self.seed ^ _POLICY, self.policy.lanes
            out = self.policy(out, uniforms(seed, planned_views.cpu(), planned_ids.cpu(), lanes))
        if self.cfg.erasing:
            out = self._erase(out, planned_ids.cpu(), planned_views.cpu())
        return out

    def px_at(self, epoch: int, epochs: int) -> int:
        """Side of what the model sees in an epoch (0-based): see `progressive_px`."""
        return progressive_px(self.cfg, self.image_px, epoch, epochs)

    @torch.no_grad()
    def mix(self, batch: dict[str, Tensor], epoch_allows: bool = True) -> dict[str, Tensor]:
        """Mixup (Zhang et al. 2017, arXiv:1710.09412) and CutMix (arXiv:1905.04899) of the pairs (2i, 2i+1).

        `batch`: image float [B, 3, h, w], id and view int64 [B], label [B] or [B, K], label_weight [B]. Returns
        a batch with another image, and with mix [B] (the own share, in [0, 1]), label_mix and label_weight_mix
        (the other one's label and its weight). timm's pair mode: both of a pair have the same share, for
        CutMix that of the pixels that stayed. A last odd sample is left alone. Where mixing is off, or
        `epoch_allows` is false, it is the batch itself, without these columns.
        """
        cfg = self.cfg
        if not epoch_allows or not (cfg.mixup or cfg.cutmix):
            return batch
        images, ids, views = batch["image"], batch["id"], batch["view"]
        here = torch.arange(len(images), device=images.device)
        other = (here ^ 1).clamp(max=len(images) - 1)
        first, second = torch.minimum(here, other), torch.maximum(here, other)
        u = uniforms(
            self.seed ^ _PAIRS,
            _mix(views[first]) ^ views[second],
            _mix(ids[first]) ^ ids[second],
            4 + 2 * GAMMA_LANES,
        )
        cutmix_prob = cfg.mix_switch_prob if cfg.mixup and cfg.cutmix else float(cfg.cutmix > 0)
        cut = u[:, 0] < cutmix_prob
        lam = betas(u[:, 4:], torch.where(cut, cfg.cutmix or 1.0, cfg.mixup or 1.0).double())
        lam = torch.where((u[:, 1] < cfg.mix_prob) & (here != other), lam, 1.0)
        own = lam.float()[:, None, None, None]
        if cfg.cutmix:
            height, width = images.shape[2:]
            top, bottom, left, right = cut_boxes(lam, u[:, 2:4], height, width).unbind(1)
            area = (bottom - top) * (right - left)
            rows, columns = _between(top, bottom, height), _between(left, right, width)
            kept = ~(rows[:, None, :, None] & columns[:, None, None, :])
            own = torch.where(cut[:, None, None, None], kept.float(), own)
            lam = torch.where(cut, 1 - area / (height * width), lam)
        return {
            **batch,
            "image": torch.lerp(images[other], images, own),
            "mix": lam.float(),
            "label_mix": batch["label"][other],
            "label_weight_mix": batch["label_weight"][other],
        }

    @torch.no_grad()
    def eval(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float [B, 3, h, w] in [0, 1]: the centre of the frame, as `resize` makes it.

        `eval_crop` < 1 makes up for training crops, which show things larger than the whole frame does:
        Touvron et al. 2019, arXiv:1906.06423.
        """
        return self._part(images, self.eval_crop, 0.5, 0.5)

    @torch.no_grad()
    def eval_views(self, images: Tensor) -> Iterator[Tensor]:
        """Test-time views, whose predictions are to be averaged: each as `eval` makes one, when it is asked for.
        `tta` says which.

        none: that of `eval`. flip: it and its mirror. five_crop: the centre and the corners, of
        `eval_crop` of the sides, or of 0.875 of them where that is 1. ten_crop: each of these and its mirror.
        """
        share, places = self.eval_crop, ((0.5, 0.5),)
        if self.tta in ("five_crop", "ten_crop"):
            share = self.eval_crop if self.eval_crop < 1 else 0.875
            places = ((0.5, 0.5), (0, 0), (0, 1), (1, 0), (1, 1))
        for y, x in places:
            view = self._part(images, share, y, x)
            yield view
            if self.tta in ("flip", "ten_crop"):
                yield view.flip(3)

    def _part(self, images: Tensor, share: float, y: float, x: float) -> Tensor:
        """A part of the frame with `share` of its sides, `y` and `x` of the way from the top left corner."""
        height, width = (round(side * share) for side in images.shape[-2:])
        top, left = int((images.shape[-2] - height) * y), int((images.shape[-1] - width) * x)
        return resize(images[..., top : top + height, left : left + width], self.image_px)

    def _boxes(self, place: Tensor, width: int, height: int) -> Tensor:
        if self.scale == (1.0, 1.0):
            return torch.tensor([[0.5, 0.5, 1.0, 1.0]], device=place.device).expand(len(place), 4)
        return crop_boxes(place, self.scale, self.ratio, width, height)

    def _erase(self, images: Tensor, ids: Tensor, views: Tensor) -> Tensor:
        """Random erasing (Zhong et al. 2017, arXiv:1708.04896) of one box an image, in place.

        `ids` and `views` on the CPU. The box is drawn as a crop's, of `erasing_scale` of the area with sides
        from 3:10 to 10:3. timm erases after normalising, with normal numbers of mean 0 and deviation 1; here they
        have ImageNet's mean and deviation and are clamped to [0, 1], which is the same but for the clamp.
        The noise of `pixel` is a tile of 256 pixels, from another place of it for each sample; `rand` is one of
        its pixels, and `const` is black.
        """
        cfg = self.cfg
        u = uniforms(self.seed ^ _ERASING, views, ids, 7)
        rows = (u[:, 0] < cfg.erasing).nonzero()[:, 0]
        if not len(rows):
            return images
        u, height, width = u[rows], images.shape[2], images.shape[3]
        scale = (float(cfg.erasing_scale[0]), float(cfg.erasing_scale[1]))
        x, y, w, h = crop_boxes(u[:, 1:5], scale, (0.3, 1 / 0.3), width, height).unbind(1)
        edges = (x - w / 2) * width, (x + w / 2) * width, (y - h / 2) * height, (y + h / 2) * height
        bounds = torch.stack([*edges, *(u[:, 5:] * _NOISE_PX).floor().unbind(1)]).round().long()
        rows = rows.to(images.device, non_blocking=True)
        bounds = bounds.to(images.device, non_blocking=True)
        left, right, top, bottom, from_row, from_column = bounds
        inside = _between(top, bottom, height)[:, :, None] & _between(left, right, width)[:, None]
        part = images.index_select(0, rows)
        if cfg.erasing_mode == "const":
            filling = part.new_zeros(())
        else:
            if self._noise is None or self._noise.device != images.device:
                self._noise = self._noise_tile().to(images.device)
            size = (height, width) if cfg.erasing_mode == "pixel" else (1, 1)
            y, x = (
                (start[:, None] + torch.arange(n, device=images.device)) % _NOISE_PX
                for start, n in zip((from_row, from_column), size, strict=True)
            )
            filling = self._noise[:, y[:, :, None], x[:, None]].transpose(0, 1)
        return images.index_copy_(0, rows, torch.where(inside[:, None], filling, part))

    def _noise_tile(self) -> Tensor:
        """[3, 256, 256] in [0, 1]."""
        row = torch.arange(_NOISE_PX)
        u = uniforms(self.seed ^ _NOISE, torch.zeros_like(row), row, 3 * _NOISE_PX)
        noise = normals(u).float().view(_NOISE_PX, 3, _NOISE_PX).transpose(0, 1)
        mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
        return (mean + std * noise).clamp_(0, 1)
