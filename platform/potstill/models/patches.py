"""Patch models: is this image real, judged by small patches of it (LaDeDa and Tiny-LaDeDa, arXiv:2406.09398).

B samples, C channels, K logits (a binary task has one), H x W pixels, h x w patches. Parameters have the names, and
the state dict has exactly the keys, of the files published at
github.com/barcavia/RealTime-DeepfakeDetection-in-the-RealWorld (see published.py).
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UserError
from potstill.models.images import rest_frozen

PREPROCESSINGS = ("raw", "npr", "right_diag")
_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_RIGHT_DIAGONAL = ((-2.0, -1.0, 0.0), (-1.0, 0.0, 1.0), (0.0, 1.0, 2.0))


class PatchModel(nn.Module, ABC):
    """What patch models share: their input, their outputs, their frozen parts.

    `{"image": [B, 3, H, W]}`, float in [0, 1], -> `patch_logits` [B, K, h, w]; `logits` [B, K], their mean;
    `map` [B, C, h, w], what the last layer takes; and `features` [B, C], its mean over positions. Patch (i, j) sees
    the pixels [i * stride, i * stride + size), where `patch` is (size, stride); with right_diag one more all around.

    `preprocessing`, of the image after its normalisation by ImageNet's mean and std: raw; npr, less its
    nearest-neighbour copy of half the resolution (Tan et al. 2023, arXiv:2312.10461; the last row and column of an
    odd size have no neighbour and become 0, where the published code fails); right_diag, a diagonal gradient of each
    channel. It is not in the weights: a file must be used with what it was trained with.

    `input_scale`: what then comes in is multiplied by it. The published code has 2/3 for LaDeDa9, 1 for Tiny-LaDeDa.
    `stem_momentum`: of the first BatchNorm; with the published 0.001 its statistics need some thousand updates
    before what is validated is what was trained. Weights of a file do not depend on it.

    Raises UserError for values that it does not take, and for images smaller than a patch.
    """

    native_pixels: ClassVar[bool] = True
    """What it looks for does not survive resampling or another JPEG compression."""
    file_classes: ClassVar[tuple[str, ...]] = ("1_fake",)
    """What the logit of a weights file without class names stands for."""
    name: ClassVar[str]
    patch: ClassVar[tuple[int, int]]
    """Size of a patch and distance of two, in pixels."""
    feature_dim: int
    fc: nn.Linear
    mean: Tensor
    std: Tensor
    diagonal: Tensor

    def __init__(
        self,
        num_classes: int,
        image_px: int | None,
        preprocessing: str,
        input_scale: float,
        stem_momentum: float,
    ) -> None:
        super().__init__()
        if preprocessing not in PREPROCESSINGS:
            raise UserError(
                f"model.preprocessing must be one of {', '.join(PREPROCESSINGS)}, got {preprocessing!r}"
            )
        if not input_scale > 0:
            raise UserError(
                f"model.input_scale must be > 0, got {input_scale}; 1 leaves the input as it is"
            )
        if not 0 < stem_momentum <= 1:
            raise UserError(
                f"model.stem_momentum must be > 0 and <= 1, got {stem_momentum}; such as 0.1"
            )
        if image_px is not None and image_px < self.patch[0]:
            raise UserError(
                f"augment.image_px (by default data.decode.image_px) must be >= {self.patch[0]} for {self.name}, the side of "
                f"one patch, got {image_px}"
            )
        self.num_classes, self.preprocessing, self.input_scale = (
            num_classes,
            preprocessing,
            input_scale,
        )
        for key, value in _IMAGENET.items():
            self.register_buffer(key, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        kernel = torch.tensor(_RIGHT_DIAGONAL).expand(3, 1, 3, 3).contiguous()
        self.register_buffer("diagonal", kernel, persistent=False)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`batch["image"]`: float [B, 3, H, W] in [0, 1]. Returns logits, patch_logits, features and map."""
        image = batch["image"]
        assert image.is_floating_point(), "uint8 images must go through Augment first"
        map_BChw = self.patch_map(self.preprocess((image - self.mean) / self.std))
        patch_logits_BKhw = self.fc(map_BChw.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return {
            "logits": patch_logits_BKhw.mean((2, 3)),
            "patch_logits": patch_logits_BKhw,
            "features": map_BChw.mean((2, 3)),
            "map": map_BChw,
        }

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalised [B, 3, H, W] -> what the first convolution takes, of the same shape."""
        if self.preprocessing == "npr":
            coarse = F.interpolate(image[:, :, ::2, ::2], scale_factor=2.0, mode="nearest")
            image = image - coarse[:, :, : image.shape[2], : image.shape[3]]
        elif self.preprocessing == "right_diag":
            image = F.conv2d(image, self.diagonal.to(image.dtype), padding=1, groups=3)
        return image if self.input_scale == 1 else image * self.input_scale

    @abstractmethod
    def patch_map(self, image: Tensor) -> Tensor:
        """Preprocessed [B, 3, H, W] -> [B, C, h, w]."""

    def train(self, mode: bool = True) -> PatchModel:
        """As ever, but what is frozen as a whole stays in eval mode, so that its BatchNorm stays put."""
        super().train(mode)
        if mode:
            rest_frozen(self)
        return self

    def head_parameter_names(self) -> list[str]:
        """The classifier's parameters, as `named_parameters` has them; each has K rows."""
        return ["fc.weight", "fc.bias"]

    def layer_of(self) -> dict[str, int]:
        """The layer of every parameter: 0 the stem, then one for each block, then one for the classifier."""
        block_of = {
            name: block[0] if (block := re.match(r"layer\d+\.\d+", name)) else ""
            for name, _ in self.named_parameters()
        }
        blocks = [block for block in dict.fromkeys(block_of.values()) if block]
        place = {block: at for at, block in enumerate(blocks, start=1)}
        head = self.head_parameter_names()
        return {
            name: len(blocks) + 1 if name in head else place.get(block, 0)
            for name, block in block_of.items()
        }

    def _start(self) -> None:
        """The first weights of the published training."""
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=0.02)
        nn.init.zeros_(self.fc.bias)


class LaDeDa9(PatchModel):
    """ResNet-50 in which each position of the last map has seen 9 x 9 pixels. Cavia et al. 2024, arXiv:2406.09398.

    The map of 64 px is 7 x 7, of 256 px 31 x 31. 13.6 million parameters. See PatchModel.
    """

    name = "ladeda9"
    patch = (9, 8)
    feature_dim = 2048

    def __init__(
        self,
        num_classes: int,
        *,
        image_px: int | None = None,
        preprocessing: str = "raw",
        input_scale: float = 1.0,
        stem_momentum: float = 0.001,
    ) -> None:
        super().__init__(num_classes, image_px, preprocessing, input_scale, stem_momentum)
        self.conv1 = nn.Conv2d(3, 64, 1, bias=False)
        self.conv2 = nn.Conv2d(64, 64, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64, momentum=stem_momentum)
        self.layer1 = _stage(64, 64, depth=3, first_kernel=3, stride=2)
        self.layer2 = _stage(256, 128, depth=4, first_kernel=3, stride=2)
        self.layer3 = _stage(512, 256, depth=6, first_kernel=1, stride=2)
        self.layer4 = _stage(1024, 512, depth=3, first_kernel=1, stride=1)
        self.fc = nn.Linear(2048, num_classes)
        self._start()

    def patch_map(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv2(self.conv1(image))), inplace=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def _stage(channels: int, width: int, depth: int, first_kernel: int, stride: int) -> nn.Sequential:
    first = _Bottleneck(channels, width, first_kernel, stride)
    return nn.Sequential(first, *(_Bottleneck(4 * width, width) for _ in range(depth - 1)))


class _Bottleneck(nn.Module):
    """ResNet's (expansion 4), without padding: what passes by is cropped at the right and the bottom to what remains."""

    def __init__(self, channels: int, width: int, kernel: int = 1, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, kernel, stride, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        self.downsample = None
        if stride != 1 or channels != 4 * width:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, 4 * width, 1, stride, bias=False), nn.BatchNorm2d(4 * width)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        past = x if self.downsample is None else self.downsample(x)
        out += past[:, :, : out.shape[2], : out.shape[3]]
        return F.relu(out, inplace=True)


class TinyLaDeDa(PatchModel):
    """Four convolutions, 1,297 parameters with one logit; patches of 5 x 5 pixels. Cavia et al. 2024, arXiv:2406.09398.

    The map of 64 px is 30 x 30, of 256 px 126 x 126. See PatchModel.
    """

    name = "tiny_ladeda"
    patch = (5, 2)
    feature_dim = 8

    def __init__(
        self,
        num_classes: int,
        *,
        image_px: int | None = None,
        preprocessing: str = "raw",
        input_scale: float = 1.0,
        stem_momentum: float = 0.001,
    ) -> None:
        super().__init__(num_classes, image_px, preprocessing, input_scale, stem_momentum)
        self.conv1 = nn.Conv2d(3, 8, 1, bias=False)
        self.conv2 = nn.Conv2d(8, 8, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(8, momentum=stem_momentum)
        self.layer1 = nn.Sequential(_TwoConvolutions(8))
        self.fc = nn.Linear(8, num_classes)
        self._start()

    def patch_map(self, image: Tensor) -> Tensor:
        return self.layer1(F.relu(self.bn1(self.conv2(self.conv1(image))), inplace=True))


class _TwoConvolutions(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 2, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(x)), inplace=True)
