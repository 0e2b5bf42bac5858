"""Parts of the tests of searches: a model of a few weights, which may be told to misbehave (plugins=[search_parts])."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from torch import Tensor, nn

from potstill.registry import register


@register("model", "few_weights")
class FewWeights(nn.Module):
    """`mood`: well | raises | nan | hangs, and it shows when it is trained. `sleep_s`: what each of its updates lasts."""

    def __init__(
        self,
        num_classes: int,
        *,
        image_px: int | None = None,
        channels: int = 4,
        mood: str = "well",
        sleep_s: float = 0.0,
        note: str = "",
    ) -> None:
        super().__init__()
        self.mood, self.sleep_s = mood, sleep_s
        self.first = nn.Conv2d(3, channels, 3, stride=2, padding=1)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        features = self.first(batch["image"]).relu().mean((2, 3))
        logits = self.fc(features)
        if self.training:
            time.sleep(self.sleep_s)
            if self.mood == "raises":
                raise RuntimeError("this choice cannot be trained")
            if self.mood == "hangs":
                time.sleep(3600)
            if self.mood == "nan":
                logits = logits * math.nan
        return {"logits": logits, "features": features}

    def head_parameter_names(self) -> list[str]:
        return ["fc.weight", "fc.bias"]
