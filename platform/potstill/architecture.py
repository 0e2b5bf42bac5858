"""What a model costs, before it is trained: parameters, multiply-adds, size, latency."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from potstill.config import Config
from potstill.errors import UserError

MEASURES = ("parameters", "macs", "file_mb", "latency_ms", "latency_ms_batch")
"""What can be sought or limited besides metrics; less is better of each."""
TIMED = ("latency_ms", "latency_ms_batch")

OF_THE_TRAINING = frozenset(
    ("init_from", "pretrained", "freeze", "drop_path", "grad_checkpointing", "stem_momentum")
)
"""Keys of a model that change how it is trained, and not what its weights mean."""


@dataclass(frozen=True)
class Facts:
    """Of one architecture at one size of images.

    parameters: all of them. macs: multiply-adds of one image's forward pass (matrix products and convolutions, as
    torch.utils.flop_counter counts them). file_mb: of the weights in 32 bits, in MB of 10^6 bytes. outputs: the names of
    what the model returns.
    """

    key: str
    parameters: int
    macs: int
    file_mb: float
    outputs: tuple[str, ...]

    def measures(self) -> dict[str, float]:
        return {"parameters": self.parameters, "macs": self.macs, "file_mb": self.file_mb}


def key_of(config: Config, classes: Sequence[str]) -> str:
    """The same for all configs of the same architecture, image size and number of outputs."""
    model = {k: v for k, v in config.model.items() if k not in OF_THE_TRAINING}
    px = config.augment.image_px or config.data.decode.image_px
    about = [model, px, len(classes), config.task.get("kind"), config.plugins]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:12]


def facts_of(config: Config, classes: Sequence[str]) -> Facts:
    """Build the model, and count in one forward pass of one image.

    `classes`: the data's. Raises UserError for a model that cannot be built, or does not take images of this size.
    """
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from potstill.assemble import image_px

    px = image_px(config)
    try:
        model = _built(config, classes).eval()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            outputs = model({"image": torch.zeros(1, 3, px, px)})
    except (AssertionError, RuntimeError, TypeError, ValueError, IndexError) as error:
        shown = {k: v for k, v in config.model.items() if v not in (None, {}, False)}
        raise UserError(
            f"model cannot be built, or does not take images of {px} px: {shown} "
            f"({(str(error).splitlines() or ['?'])[0]})"
        ) from None
    state = [t for t in model.state_dict().values() if t.is_floating_point()]
    return Facts(
        key=key_of(config, classes),
        parameters=sum(p.numel() for p in model.parameters()),
        macs=counter.get_total_flops() // 2,
        file_mb=sum(t.numel() * 4 for t in state) / 1e6,
        outputs=tuple(outputs),
    )


def _built(config: Config, classes: Sequence[str]) -> Any:
    """The model without weights of its own."""
    import copy

    from potstill.assemble import build_model, outputs_of

    bare = copy.deepcopy(config)
    bare.model["pretrained"], bare.model["init_from"] = False, None
    return build_model(bare, outputs_of(bare, classes))


def timed(
    config: Config, classes: Sequence[str], device: str, batch: int
) -> dict[str, float | str]:
    """`latency_ms` of one image and `latency_ms_batch` of `batch`, medians of warm passes in fp32, and the device's name.

    Nothing else should run on the device meanwhile.
    """
    import torch

    from potstill.assemble import image_px
    from potstill.compare import latency_ms

    model, px = _built(config, classes), image_px(config)
    return {
        "latency_ms": latency_ms(model, px, 1, torch.device(device), max_s=2.0),
        "latency_ms_batch": latency_ms(model, px, batch, torch.device(device), max_s=2.0),
        "latency_device": device_name(device),
    }


def device_name(device: str) -> str:
    """Such as `Intel(R) Xeon(R) Gold 6226R, 2 threads`."""
    import torch

    if device != "cpu":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (x.partition(":")[2].strip() for x in lines if x.startswith("model name")), name
        )
    except OSError:
        pass
    return f"{name}, {torch.get_num_threads()} threads"
