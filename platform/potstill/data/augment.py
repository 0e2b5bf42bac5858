"""Augmentation of a whole batch on its device, repeatable to the pixel.

B samples, C = 3 channels, H x W the stored size, h x w what the model sees, L lanes of random numbers.

A sample's augmentation is a function of (seed, view, id) and of nothing else: not of its batch, rank or
step. Soft labels of a random crop stay valid because the crop can be made again.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, overload

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from potstill.config import Augment as AugmentConfig

LANES = ("area", "ratio", "left", "top", "flip", "angle", "brightness", "contrast", "saturation")
"""One random number each. A new lane goes to the end: the numbers of the others then stay what they were."""

_LUMA = (0.299, 0.587, 0.114)
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


def warp(images: Tensor, boxes: Tensor, mirrored: Tensor, degrees: Tensor, px: int) -> Tensor:
    """Crop, mirror and turn by one bilinear sampling. float [B, C, H, W] -> float [B, C, px, px].

    `boxes` [B, 4] as `crop_boxes` gives them, `mirrored` bool [B], `degrees` [B], counter-clockwise
    about the crop's centre. What a turn brings in from outside the crop is the frame's own content,
    reflected at its border. There is no antialiasing: where a crop is more than twice as wide as `px`,
    pixels are skipped, so store the cache at less than 2 x augment.image_px.
    """
    boxes, degrees = boxes.double(), degrees.double()
    x, y, w, h = boxes.unbind(1)
    cos, sin = torch.cos(degrees * math.pi / 180), torch.sin(degrees * math.pi / 180)
    side = torch.where(mirrored, -1.0, 1.0).double() * w
    coefficients = torch.stack(
        (side * cos, -side * sin, 2 * x - 1, h * sin, h * cos, 2 * y - 1), dim=1
    )
    xx, xy, x0, yx, yy, y0 = coefficients.float()[:, :, None, None].unbind(1)
    steps = (2 * torch.arange(px, device=images.device, dtype=torch.float32) + 1) / px - 1
    grid = torch.stack(
        (xx * steps + (xy * steps[:, None] + x0), yx * steps + (yy * steps[:, None] + y0)), dim=3
    )
    return F.grid_sample(
        images, grid, mode="bilinear", padding_mode="reflection", align_corners=False
    )


def recolour(images: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast (about the mean grey) and saturation, in this order, each by its factor.

    float [B, 3, h, w] in [0, 1], changed in place; `factors` [B, 3]. torchvision's `ColorJitter`, but in
    a fixed order and clamped to [0, 1] once, at the end, so that all three are one pass.
    """
    brightness, contrast, saturation = factors.float()[:, :, None, None].unbind(1)
    gain = brightness[:, None] * contrast[:, None]
    red, green, blue = (images[:, i : i + 1] * weight for i, weight in enumerate(_LUMA))
    grey = red.add_(green).add_(blue)
    mean = grey.mean(dim=(2, 3), keepdim=True)
    shift = grey.mul_((1 - saturation[:, None]) * gain)
    shift.add_((1 - contrast[:, None]) * brightness[:, None] * mean)
    return images.mul_(saturation[:, None] * gain).add_(shift).clamp_(0, 1)


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


# ------------------------------------------------------------------------------------------- a batch
class Augment:
    """`cfg` says what is drawn, `seed` from which stream; images are stored at `decode_px`."""

    def __init__(self, cfg: AugmentConfig, decode_px: int, seed: int) -> None:
        self.image_px = cfg.image_px or decode_px
        self.seed = seed
        self.scale = (float(cfg.crop_scale[0]), float(cfg.crop_scale[1]))
        self.ratio = (float(cfg.crop_ratio[0]), float(cfg.crop_ratio[1]))
        self.flip, self.rotate, self.color = cfg.flip, cfg.rotate, cfg.color
        self.eval_crop = cfg.eval_crop

    @torch.no_grad()
    def train(self, images: Tensor, ids: Tensor, views: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] in any memory format, int64 [B], int64 [B] -> float [B, 3, h, w] in [0, 1].

        With everything off it is `eval` of the whole frame to the bit. Runs on the images' device, in fp32.
        """
        device = images.device
        ids, views = ids.to(device), views.to(device)
        u = dict(zip(LANES, uniforms(self.seed, views, ids).unbind(1), strict=True))
        mirrored = u["flip"] < self.flip
        if self.rotate or self.scale != (1.0, 1.0):
            place = torch.stack([u[lane] for lane in ("area", "ratio", "left", "top")], dim=1)
            boxes = self._boxes(place, width=images.shape[3], height=images.shape[2])
            degrees = (2 * u["angle"] - 1) * self.rotate
            out = warp(_planes(images), boxes, mirrored, degrees, self.image_px).div_(255)
        else:
            out = resize(images, self.image_px)
            if self.flip:
                out = torch.where(mirrored[:, None, None, None], out.flip(3), out)
        if self.color:
            jitter = [u[lane] for lane in ("brightness", "contrast", "saturation")]
            factors = 1 + (2 * torch.stack(jitter, dim=1) - 1) * self.color
            out = recolour(out, factors.clamp_(min=0))
        return out

    @torch.no_grad()
    def eval(self, images: Tensor) -> Tensor:
        """uint8 [B, 3, H, W] -> float [B, 3, h, w] in [0, 1]: the centre of the frame, as `resize` makes it.

        `eval_crop` < 1 makes up for training crops, which show things larger than the whole frame does:
        Touvron et al. 2019, arXiv:1906.06423.
        """
        height, width = (round(side * self.eval_crop) for side in images.shape[-2:])
        top, left = (images.shape[-2] - height) // 2, (images.shape[-1] - width) // 2
        return resize(images[..., top : top + height, left : left + width], self.image_px)

    def _boxes(self, place: Tensor, width: int, height: int) -> Tensor:
        if self.scale == (1.0, 1.0):
            return torch.tensor([[0.5, 0.5, 1.0, 1.0]], device=place.device).expand(len(place), 4)
        return crop_boxes(place, self.scale, self.ratio, width, height)
