"""Policies: many small operations on a whole batch, each on the samples that drew it.

B samples, n of them that drew the same operation, L random numbers a sample, h x w pixels, A arguments.

A policy is a function (images float [B, 3, h, w] in [0, 1], u float64 [B, L] in [0, 1)) -> images, as a
plug-in's is. What a sample becomes depends on its own pixels and its own row of `u` only. The plan (which
operation, how strong) is made on the CPU, so that it is the same on every device and no kernel waits for it.

Magnitudes are those of timm and torchvision. What differs: posterizing leaves one bit at least (none is a
black image, and Pillow 13 refuses it); turning and shifting is bilinear, and what comes in from outside has
ImageNet's mean colour, whatever the policy (timm draws bilinear or bicubic, torchvision takes the nearest
pixel and black); pixels are not rounded to 256 levels between two operations; and TrivialAugment's 32
pixels are 32 of what the model sees.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from potstill import registry
from potstill.errors import UserError

MEAN = (0.485, 0.456, 0.406)
"""ImageNet's mean colour and, below, its standard deviation: red, green, blue."""
STD = (0.229, 0.224, 0.225)

_LUMA = (0.299, 0.587, 0.114)


# ------------------------------------------------------------------------------------ distributions
_ROUNDS = 8
GAMMA_LANES = 2 * _ROUNDS + 1
"""How many uniform numbers `log_gammas` takes for each of its own."""


def normals(u: Tensor) -> Tensor:
    """Standard normal numbers from uniform ones in [0, 1), float64, by the inverse distribution function."""
    return torch.special.ndtri(u.clamp(min=2.0**-54))


def log_gammas(u: Tensor, alpha: float | Tensor) -> Tensor:
    """Logarithms of Gamma(alpha) numbers: float64 [...] from u [..., GAMMA_LANES] in [0, 1).

    Marsaglia and Tsang 2000, doi:10.1145/358407.358414, at alpha + 1, which takes at least 95 of 100
    proposals; the first of 8 that is taken counts, and the last where none is (1 in 10^10). The logarithm
    of a Gamma(0.01) number is a number; itself it would be 0.
    """
    alpha = torch.as_tensor(alpha, dtype=u.dtype, device=u.device)
    x, accept, power = u.split((_ROUNDS, _ROUNDS, 1), dim=-1)
    d = (alpha + 2 / 3)[..., None]
    x = normals(x)
    log_v = 3 * torch.log1p((x / (9 * d).sqrt()).clamp(min=-1 + 1e-9))
    bound = x * x / 2 + d * (1 - log_v.exp() + log_v)
    taken = torch.log(accept.clamp(min=2.0**-54)) < bound
    taken[..., -1] = True
    # argmax of booleans is the first True on the CPU only; of these numbers it is on every device
    order = torch.arange(_ROUNDS, 0, -1, device=u.device)
    first = (taken * order).argmax(dim=-1, keepdim=True)
    log_u = torch.log(power[..., 0].clamp(min=2.0**-54))
    return d[..., 0].log() + log_v.gather(-1, first)[..., 0] + log_u / alpha


def betas(u: Tensor, alpha: float | Tensor) -> Tensor:
    """Beta(alpha, alpha) numbers in [0, 1]: float64 [B] from u [B, 2 * GAMMA_LANES]; `alpha` may be a [B]."""
    one, other = u.split(GAMMA_LANES, dim=-1)
    return torch.sigmoid(log_gammas(one, alpha) - log_gammas(other, alpha))


# -------------------------------------------------------------------------------------- operations
def sample(images: Tensor, coefficients: Tensor, size: tuple[int, int], padding: str) -> Tensor:
    """Bilinear sampling. float [B, C, H, W] -> float [B, C, *size]; `padding` is grid_sample's.

    `coefficients` [B, 6] (xx, xy, x0, yx, yy, y0) say where a pixel of the result at (x, y) comes from, both
    in [-1, 1] from edge to edge: (xx x + xy y + x0, yx x + yy y + y0).
    """
    xx, xy, x0, yx, yy, y0 = coefficients.float()[:, :, None, None].unbind(1)
    rows, columns = (
        (2 * torch.arange(n, device=images.device, dtype=torch.float32) + 1) / n - 1 for n in size
    )
    grid = torch.stack(
        (xx * columns + (xy * rows[:, None] + x0), yx * columns + (yy * rows[:, None] + y0)), dim=3
    )
    return F.grid_sample(images, grid, mode="bilinear", padding_mode=padding, align_corners=False)


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


def _levels(images: Tensor) -> Tensor:
    """The 256 levels that the operations below know: whole numbers, as floats."""
    return (images * 255).round()


def _column(arguments: Tensor) -> Tensor:
    return arguments.float()[:, :, None, None]


def _affine(images: Tensor, coefficients: Tensor) -> Tensor:
    fill = torch.tensor(MEAN).to(images.device, non_blocking=True)[:, None, None]
    size = (images.shape[2], images.shape[3])
    return sample(images - fill, coefficients, size, "zeros").add_(fill).clamp_(0, 1)


def _sharpen(images: Tensor, factors: Tensor) -> Tensor:
    """0 smooths by Pillow's 3 x 3 filter, 1 leaves alone; the outermost pixels stay, as Pillow's do."""
    blurred = images.clone()
    if min(images.shape[2:]) > 2:
        inner = images[:, :, 1:-1, 1:-1]
        blurred[:, :, 1:-1, 1:-1] = (9 * F.avg_pool2d(images, 3, 1) + 4 * inner) / 13
    return torch.lerp(blurred, images, _column(factors)).clamp_(0, 1)


def _posterize(images: Tensor, bits: Tensor) -> Tensor:
    step = 2.0 ** (8 - _column(bits))
    return torch.where(step > 1, (_levels(images) / step).floor() * step / 255, images)


def _solarize(images: Tensor, threshold: Tensor) -> Tensor:
    return torch.where(_levels(images) < _column(threshold), images, 1 - images)


def _solarize_add(images: Tensor, addend: Tensor) -> Tensor:
    brighter = (images + _column(addend) / 255).clamp_(max=1)
    return torch.where(_levels(images) < 128, brighter, images)


def _autocontrast(images: Tensor, _: Tensor) -> Tensor:
    low, high = images.amin(dim=(2, 3), keepdim=True), images.amax(dim=(2, 3), keepdim=True)
    return torch.where(high > low, ((images - low) / (high - low)).clamp_(0, 1), images)


def _equalize(images: Tensor, _: Tensor) -> Tensor:
    """Pillow's: a channel's levels in equal numbers, but for the rounding of its step."""
    planes = _levels(images).long().flatten(2).flatten(0, 1)
    counts = torch.zeros(len(planes), 256, dtype=torch.int64, device=images.device)
    counts.scatter_add_(1, planes, torch.ones_like(planes))
    # the count of the highest level that there is stays out of Pillow's sum
    highest = counts.gather(1, planes.amax(dim=1, keepdim=True))
    step = (planes.shape[1] - highest) // 255
    below = counts.cumsum(1) - counts
    table = ((below + step // 2) // step.clamp(min=1)).clamp_(max=255)
    table = torch.where(step > 0, table, torch.arange(256, device=images.device))
    return table.gather(1, planes).reshape(images.shape).to(images.dtype) / 255


def _invert(images: Tensor, _: Tensor) -> Tensor:
    return 1 - images


_CALLS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "affine": _affine,
    "recolour": recolour,
    "sharpen": _sharpen,
    "posterize": _posterize,
    "solarize": _solarize,
    "solarize_add": _solarize_add,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
    "invert": _invert,
}
"""(the n images that drew it, arguments [n, A]) -> images. Several operations may be one call."""


def _affinely(
    coefficients: Callable[[Tensor, float], dict[int, Tensor | float]],
) -> tuple[str, Callable[[Tensor, int, int], Tensor]]:
    """`coefficients` of (amount [n], height / width) that differ from those of the image itself."""

    def arguments(amount: Tensor, height: int, width: int) -> Tensor:
        table = torch.tensor([1.0, 0, 0, 0, 1, 0], dtype=amount.dtype).repeat(len(amount), 1)
        for place, value in coefficients(amount, height / width).items():
            table[:, place] = value
        return table

    return "affine", arguments


def _factor(place: int) -> tuple[str, Callable[[Tensor, int, int], Tensor]]:
    def arguments(amount: Tensor, height: int, width: int) -> Tensor:
        factors = torch.ones(len(amount), 3, dtype=amount.dtype)
        factors[:, place] = amount
        return factors

    return "recolour", arguments


def _plain(call: str) -> tuple[str, Callable[[Tensor, int, int], Tensor]]:
    return call, lambda amount, height, width: amount[:, None]


def _turn(amount: Tensor, ratio: float) -> dict[int, Tensor | float]:
    cos, sin = torch.cos(amount * math.pi / 180), torch.sin(amount * math.pi / 180)
    return {0: cos, 1: -sin * ratio, 3: sin / ratio, 4: cos}


OPERATIONS: dict[str, tuple[str, Callable[[Tensor, int, int], Tensor]]] = {
    "shear_x": _affinely(lambda amount, ratio: {1: amount * ratio, 2: amount * ratio}),
    "shear_y": _affinely(lambda amount, ratio: {3: amount / ratio, 5: amount / ratio}),
    "translate_x": _affinely(lambda amount, ratio: {2: 2 * amount}),
    "translate_y": _affinely(lambda amount, ratio: {5: 2 * amount}),
    "rotate": _affinely(_turn),
    "brightness": _factor(0),
    "contrast": _factor(1),
    "color": _factor(2),
    "sharpness": _plain("sharpen"),
    "posterize": _plain("posterize"),
    "solarize": _plain("solarize"),
    "solarize_add": _plain("solarize_add"),
    "autocontrast": _plain("autocontrast"),
    "equalize": _plain("equalize"),
    "invert": _plain("invert"),
}
"""Name -> (call, its arguments [n, A] from amounts [n], height, width).

The amount is a slope (shear), a share of the side (translate), degrees counter-clockwise (rotate), a factor
with 1 for no change (brightness, contrast, color, sharpness), bits that stay (posterize), the level from
which pixels are inverted (solarize), or how many levels are added to those below 128 (solarize_add).
"""


def apply(images: Tensor, names: tuple[str, ...], drawn: Tensor, amounts: Tensor) -> Tensor:
    """Give each sample the operation it drew. float [B, 3, h, w] in [0, 1], changed in place and returned.

    `drawn` int64 [B] is a place in `names`; -1, and the name identity, leave the sample alone. `amounts`
    float64 [B]; both on the CPU.
    """
    height, width = images.shape[2:]
    planned: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for place, name in enumerate(names):
        rows = (drawn == place).nonzero()[:, 0]
        if name != "identity" and len(rows):
            call, arguments = OPERATIONS[name]
            plan = rows, arguments(amounts[rows], height, width)
            planned.setdefault(call, []).append(plan)
    for call, plans in planned.items():
        rows, arguments = (torch.cat(parts) for parts in zip(*plans, strict=True))
        rows = rows.to(images.device, non_blocking=True)
        arguments = arguments.to(images.device, non_blocking=True)
        images.index_copy_(0, rows, _CALLS[call](images.index_select(0, rows), arguments))
    return images


# ---------------------------------------------------------------------------------------- policies
class Policy(Protocol):
    @property
    def lanes(self) -> int:
        """How many random numbers a sample takes."""
        ...

    def __call__(self, images: Tensor, u: Tensor, /) -> Tensor:
        """float [B, 3, h, w] in [0, 1], which it may change; u float64 [B, lanes] on the CPU."""
        ...


Amounts = dict[str, Callable[[Tensor, Tensor], Tensor]]
"""Name -> amounts [n] from strengths [n] (1 is full) and signs [n] (-1 or 1)."""


def _none(strength: Tensor, sign: Tensor) -> Tensor:
    return torch.zeros_like(strength)


def _signed(full: float) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda strength, sign: full * strength * sign


def _enhanced(strength: Tensor, sign: Tensor) -> Tensor:
    return 1.8 * strength + 0.1


def _enhanced_more(strength: Tensor, sign: Tensor) -> Tensor:
    return (1 + 0.9 * strength * sign).clamp(min=0.1)


_FACTORS = ("color", "contrast", "brightness", "sharpness")

RAND: Amounts = {
    "autocontrast": _none,
    "equalize": _none,
    "invert": _none,
    "rotate": _signed(30),
    "posterize": lambda strength, sign: (4 * strength).floor().clamp(min=1),
    "solarize": lambda strength, sign: (256 * strength).floor().clamp(max=256),
    "solarize_add": lambda strength, sign: (110 * strength).floor().clamp(max=128),
    **dict.fromkeys(_FACTORS, _enhanced),
    "shear_x": _signed(0.3),
    "shear_y": _signed(0.3),
    "translate_x": _signed(0.45),
    "translate_y": _signed(0.45),
}
"""timm's `_RAND_TRANSFORMS`: some of them change less, the stronger they are."""

RAND_INCREASING: Amounts = {
    **RAND,
    "posterize": lambda strength, sign: (4 - (4 * strength).floor()).clamp(min=1),
    "solarize": lambda strength, sign: (256 - (256 * strength).floor()).clamp(min=0),
    **dict.fromkeys(_FACTORS, _enhanced_more),
}
"""timm's `_RAND_INCREASING_TRANSFORMS` (inc1)."""

AUGMIX: Amounts = {
    name: amount
    for name, amount in RAND_INCREASING.items()
    if name not in ("invert", "solarize_add")
}
"""timm's `_AUGMIX_TRANSFORMS`."""

_TRIVIAL_BINS = 31
_TRIVIAL_PX = 32

TRIVIAL: Amounts = {
    "identity": _none,
    "shear_x": _signed(0.99),
    "shear_y": _signed(0.99),
    # whole pixels here; the policy divides them by the side
    "translate_x": lambda strength, sign: (_TRIVIAL_PX * strength).floor() * sign,
    "translate_y": lambda strength, sign: (_TRIVIAL_PX * strength).floor() * sign,
    "rotate": _signed(135),
    **dict.fromkeys(_FACTORS, lambda strength, sign: 1 + 0.99 * strength * sign),
    "posterize": lambda strength, sign: 8 - (6 * strength).round(),
    "solarize": lambda strength, sign: 255 * (1 - strength),
    "autocontrast": _none,
    "equalize": _none,
}
"""torchvision's `TrivialAugmentWide`."""


def _amounts(table: Amounts, drawn: Tensor, strength: Tensor, sign: Tensor) -> Tensor:
    """The amount of each sample's operation. int64 [B], float64 [B] twice -> float64 [B]."""
    by_name = torch.stack([amount(strength, sign) for amount in table.values()], dim=1)
    return by_name.gather(1, drawn.clamp(min=0)[:, None])[:, 0]


def _choose(u: Tensor, count: int) -> Tensor:
    return (u * count).long()


def _strengths(u: Tensor, magnitude: float, mstd: float, mmax: float) -> Tensor:
    """timm's noise about a magnitude: normal, or uniform from 0 where `mstd` is infinite; 10 is full."""
    level = u * magnitude if math.isinf(mstd) else magnitude + mstd * normals(u)
    return level.clamp(0, mmax) / 10


def _signs(u: Tensor) -> Tensor:
    return torch.where(u < 0.5, -1.0, 1.0).to(u.dtype)


@dataclass(frozen=True)
class RandAugment:
    """`n` operations in a row, each done with probability `p` at magnitude `m` of 10. arXiv:1909.13719

    As timm does it: `mstd` is the normal noise of the magnitude (uniform in [0, m] where it is infinite),
    clamped to [0, mmax]; with `inc` every operation grows with the magnitude.
    """

    m: float = 10
    n: int = 2
    p: float = 0.5
    mstd: float = 0
    mmax: float = 10
    inc: bool = False

    @property
    def lanes(self) -> int:
        return 4 * self.n

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        table = RAND_INCREASING if self.inc else RAND
        for which, done, noise, side in u.unflatten(1, (self.n, 4)).permute(1, 2, 0):
            drawn = torch.where(done < self.p, _choose(which, len(table)), -1)
            strength = _strengths(noise, self.m, self.mstd, self.mmax)
            amounts = _amounts(table, drawn, strength, _signs(side))
            images = apply(images, tuple(table), drawn, amounts)
        return images


@dataclass(frozen=True)
class TrivialAugment:
    """One operation at one of 31 strengths, both uniform ("wide" ranges). arXiv:2103.10158"""

    @property
    def lanes(self) -> int:
        return 3

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        which, strength, side = u.unbind(1)
        drawn = _choose(which, len(TRIVIAL))
        strength = _choose(strength, _TRIVIAL_BINS).double() / (_TRIVIAL_BINS - 1)
        amounts = _amounts(TRIVIAL, drawn, strength, _signs(side))
        names = tuple(TRIVIAL)
        for name, px in (("translate_x", images.shape[3]), ("translate_y", images.shape[2])):
            amounts = torch.where(drawn == names.index(name), amounts / px, amounts)
        return apply(images, names, drawn, amounts)


@dataclass(frozen=True)
class AugMix:
    """`w` chains of `d` operations (-1: one to three), mixed, and the mix blended with the image.

    arXiv:1912.02781, as timm does it: the chains' weights are Dirichlet(a), the mix's share is Beta(a, a),
    magnitudes are uniform in [0, m] unless `mstd` is given. Pixels only: the paper's consistency loss
    is not part of it.
    """

    m: float = 3
    w: int = 3
    d: int = -1
    a: float = 1
    mstd: float = math.inf

    @property
    def _longest(self) -> int:
        return 3 if self.d == -1 else self.d

    @property
    def lanes(self) -> int:
        return (2 + self.w) * GAMMA_LANES + self.w * (1 + 3 * self._longest)

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        share, weights, chains = u.split(
            (2 * GAMMA_LANES, self.w * GAMMA_LANES, self.w * (1 + 3 * self._longest)), dim=1
        )
        on_device: dict[str, Any] = {"device": images.device, "non_blocking": True}
        share = betas(share, self.a).float().to(**on_device)[:, None, None, None]
        weights = log_gammas(weights.unflatten(1, (self.w, GAMMA_LANES)), self.a).softmax(dim=1)
        weights = weights.float().to(**on_device)[:, :, None, None, None]
        mixed = torch.zeros_like(images)
        for i, chain in enumerate(chains.chunk(self.w, dim=1)):
            mixed.addcmul_(self._chain(images.clone(), chain), weights[:, i])
        return torch.lerp(images, mixed.clamp_(0, 1), share)

    def _chain(self, images: Tensor, u: Tensor) -> Tensor:
        depth = 1 + _choose(u[:, 0], 3) if self.d == -1 else torch.full((len(u),), self.d)
        for i, (which, noise, side) in enumerate(u[:, 1:].unflatten(1, (-1, 3)).permute(1, 2, 0)):
            drawn = torch.where(i < depth, _choose(which, len(AUGMIX)), -1)
            strength = _strengths(noise, self.m, self.mstd, 10)
            amounts = _amounts(AUGMIX, drawn, strength, _signs(side))
            images = apply(images, tuple(AUGMIX), drawn, amounts)
        return images


@dataclass(frozen=True)
class Plugged:
    """A user's own augmentation, under the name that it is registered by."""

    name: str
    function: Callable[[Tensor, Tensor], Tensor]

    @property
    def lanes(self) -> int:
        return 64

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        shape, dtype = images.shape, images.dtype
        out = self.function(images, u.to(images.device, non_blocking=True))
        if not isinstance(out, Tensor) or out.shape != shape or out.dtype != dtype:
            got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out)
            raise UserError(
                f"augment.policy={self.name} must return images as it got them ({dtype} {list(shape)}, in [0, 1]), "
                f"got {got}"
            )
        return out.contiguous()


# ---------------------------------------------------------------------------------- their short names
_BUILT_IN = {"rand": RandAugment, "trivial": TrivialAugment, "augmix": AugMix}

_EXAMPLES = "rand-m9-n2-mstd0.5-inc1, trivial, augmix-m3-w3-d2"

_RULES: dict[str, tuple[Callable[[float], bool], str]] = {
    "m": (lambda x: x >= 0, "a magnitude >= 0"),
    "n": (lambda x: x in range(1, 17), "a whole number of operations from 1 to 16"),
    "p": (lambda x: 0 <= x <= 1, "a probability from 0 to 1"),
    "mstd": (lambda x: x >= 0, "a standard deviation >= 0"),
    "mmax": (lambda x: 0 < x <= 30, "a largest magnitude from 0 to 30"),
    "inc": (lambda x: x in (0, 1), "0 or 1"),
    "w": (lambda x: x in range(1, 17), "a whole number of chains from 1 to 16"),
    "d": (lambda x: x in (-1, *range(1, 17)), "a depth from 1 to 16, or -1 for one to three"),
    "a": (lambda x: 0 < x < math.inf, "an alpha > 0"),
}


def parse_policy(text: str) -> Policy:
    """The policy of `augment.policy`: timm's strings, `trivial`, or the name of a registered augmentation.

    `rand-m9-n2-mstd0.5-inc1` (also p, mmax), `trivial`, `augmix-m3-w3-d-1` (also a, mstd). Raises UserError.
    """
    if text in registry.names("augmentation"):
        return Plugged(text, registry.lookup("augmentation", text))
    kind, *parts = re.split(r"-(?=[a-zA-Z])", text)
    if kind not in _BUILT_IN:
        plugged = "".join(f", {name}" for name in registry.names("augmentation"))
        raise UserError(
            f"augment.policy must be null or of the kind of {_EXAMPLES}{plugged}, got {text!r}; an augmentation of "
            "your own is registered by plugins=[<module>]"
        )
    target = _BUILT_IN[kind]
    fields = target.__dataclass_fields__
    values: dict[str, Any] = {}
    for part in parts:
        found = re.fullmatch(r"([a-z]+?)(-?\d+(?:\.\d+)?|inf)", part)
        if not found or found[1] not in fields or found[1] in values:
            takes = f"{', '.join(fields)}, each once with a number" if fields else "no options"
            raise UserError(
                f"augment.policy: {kind} takes {takes}, got {part!r} in {text!r}; examples are {_EXAMPLES}"
            )
        key, value = found[1], float(found[2])
        test, rule = _RULES[key]
        if not test(value):
            raise UserError(
                f"augment.policy: {key} must be {rule}, got {found[2]} in {text!r}; leave {part!r} out for "
                f"{key}={fields[key].default:g}"
            )
        if key == "mstd" and value > 100:
            value = math.inf  # timm's way to say uniform
        values[key] = int(value) if key in ("n", "w", "d") else value
    largest = values.get("mmax", 10)
    if values.get("m", 0) > largest:
        raise UserError(
            f"augment.policy: m must be <= {largest:g}, the full magnitude, got {values['m']:g} in {text!r}"
            + ("; mmax sets another" if kind == "rand" else "")
        )
    if "inc" in values:
        values["inc"] = bool(values["inc"])
    return target(**values)
