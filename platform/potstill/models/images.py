"""Image classifiers: any timm model, with named outputs, its own normalisation and frozen parts.

B samples, D features, K classes, H x W pixels.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from potstill.errors import UserError

_OURS = {
    "num_classes": "it is the number of classes of the data",
    "pretrained": "use model.pretrained",
    "drop_path_rate": "use model.drop_path",
    "checkpoint_path": "use model.init_from",
    "in_chans": "images have 3 channels",
    "features_only": "a classifier is needed",
}
"""Keys that model.kwargs must not carry, and what to do instead."""

_HUB_TIMEOUT_S = 5


class ImageStats(NamedTuple):
    mean: tuple[float, ...]
    std: tuple[float, ...]


# ---------------------------------------------------------------------------------------- by name
def check_name(name: str) -> None:
    """Raises UserError, with the nearest names, if timm has no such model (or no such weights tag)."""
    import timm
    from timm.models import get_arch_name, get_arch_pretrained_cfgs

    arch = get_arch_name(name)
    if not timm.is_model(arch):
        near = difflib.get_close_matches(arch, timm.list_models(), n=4, cutoff=0.6)
        hint = f"did you mean {', '.join(near)}; " if near else ""
        raise UserError(
            f"model.name must be a timm model, got {name!r}; {hint}all: timm.list_models()"
        )
    tags = sorted(get_arch_pretrained_cfgs(arch))
    if arch != name and name not in tags:
        raise UserError(
            f"model.name: timm knows no weights {name!r}; use {arch} or one of {', '.join(tags)}"
        )


def _check_weights_in_reach(name: str) -> None:
    """Raises UserError where timm has no weights for the model, or nobody answers for them.

    One question with a short timeout: left to itself the hub's client tries for most of a minute.
    """
    import huggingface_hub as hub
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    if cfg is None or not cfg.has_weights:
        raise UserError(
            f"model.pretrained=true needs weights, and timm has none for {name}; set model.pretrained=false, or model.init_from=<file>"
        )
    repo = cfg.hf_hub_id
    if not repo or hub.constants.HF_HUB_OFFLINE:
        return
    files = ("model.safetensors", "pytorch_model.bin")
    if any(isinstance(hub.try_to_load_from_cache(repo, file), str) for file in files):
        return
    try:
        hub.utils.get_session().head(hub.constants.ENDPOINT, timeout=_HUB_TIMEOUT_S)
    except (
        Exception
    ) as e:  # the hub's client has changed its HTTP library, and with it what it raises
        raise _out_of_reach(name, e) from e


def _out_of_reach(name: str, cause: Exception) -> UserError:
    return UserError(
        f"model.pretrained=true must download the weights of {name}, and nothing came ({_first_line(cause)}); "
        "set model.pretrained=false and model.init_from=<a .safetensors or .pth file, or a run>"
    )


def _first_line(e: Exception) -> str:
    return (str(e).strip() or type(e).__name__).splitlines()[0][:200]


def _create(
    name: str, num_classes: int, pretrained: bool, drop_path: float | None, kwargs: dict[str, Any]
) -> nn.Module:
    import timm

    for key, remedy in _OURS.items():
        if key in kwargs:
            raise UserError(f"model.kwargs must not hold {key}, got {kwargs[key]!r}: {remedy}")
    if pretrained:
        _check_weights_in_reach(name)

    def create(pretrained: bool = False, **more: Any) -> nn.Module:
        return timm.create_model(name, pretrained=pretrained, num_classes=num_classes, **more)

    def works(**more: Any) -> bool:
        with torch.device("meta"):
            try:
                create(**more)
            except Exception:
                return False
        return True

    given = kwargs if drop_path is None else {**kwargs, "drop_path_rate": drop_path}
    try:
        return create(pretrained, **given)
    except Exception as e:
        # whose fault it is shows when the parts are left out one by one
        if pretrained and works(**given):
            raise _out_of_reach(name, e) from e
        if drop_path is not None and works(**kwargs):
            raise UserError(
                f"model.drop_path: {name} takes none, got {drop_path}; set it to null ({_first_line(e)})"
            ) from e
        if kwargs and works():
            raise UserError(
                f"model.kwargs must be what timm's {name} takes, got {kwargs}; leave out what it refuses: "
                f"{_first_line(e)}"
            ) from e
        raise


# --------------------------------------------------------------------------------------- the model
class TimmModel(nn.Module):
    """A timm classifier as `{"image": [B, 3, H, W]} -> {"logits": [B, K], "features": [B, D]}`.

    `num_classes` and `image_px` (the side of what it will see) are handed in by the caller; the rest is
    the config's `model` node. `kwargs` go to `timm.create_model`. Images are float in [0, 1]: the model
    normalises them with its own mean and std. Features are what the classifier takes; where a family has
    no single such vector (`feature_dim` is None), there are logits only.

    `grad_checkpointing`: blocks keep their input only and are computed again in the backward pass: less
    memory for about a third more time, the same gradients and statistics (Chen et al. 2016, arXiv:1604.06174).

    Raises UserError for an unknown name, for weights out of reach, for `kwargs`, `drop_path` or
    `grad_checkpointing` that the model refuses, and for an image size that it cannot take.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        num_classes: int,
        *,
        name: str,
        pretrained: bool = False,
        drop_path: float | None = None,
        kwargs: dict[str, Any] | None = None,
        grad_checkpointing: bool = False,
        image_px: int | None = None,
    ) -> None:
        super().__init__()
        check_name(name)
        self.name, self.num_classes = name, num_classes
        kwargs = dict(kwargs or {})
        if image_px is not None:
            kwargs = {**_size_kwargs(name, image_px), **kwargs}
        self.net: Any = _create(name, num_classes, pretrained, drop_path, kwargs)
        stats = ImageStats(self.net.pretrained_cfg["mean"], self.net.pretrained_cfg["std"])
        for key, value in stats._asdict().items():
            self.register_buffer(key, torch.tensor(value).view(1, 3, 1, 1), persistent=False)
        self.feature_dim: int | None = None
        self._dropout = 0.0
        self._probe(image_px)
        self._grad_checkpointing = grad_checkpointing
        if grad_checkpointing:
            self._checkpoint_gradients()
        if pretrained and num_classes != self.net.pretrained_cfg.get("num_classes"):
            forget_rows(self, self.head_parameter_names(), range(num_classes))

    def forward(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`batch["image"]`: float [B, 3, H, W] in [0, 1]. Returns logits [B, K], features [B, D] and, where the family
        ends in one, the last feature map [B, C, h, w]."""
        image = batch["image"]
        assert image.is_floating_point(), "uint8 images must go through Augment first"
        image = (image - self.mean) / self.std
        if self.feature_dim is None:
            return {"logits": self.net(image)}
        last = self.net.forward_features(image)
        features = self.net.forward_head(last, pre_logits=True)
        logits = self.net.get_classifier()(self._drop(features))
        is_map = last.ndim == 4 and "NHWC" not in str(getattr(self.net, "output_fmt", "NCHW"))
        return {"logits": logits, "features": features, **({"map": last} if is_map else {})}

    def train(self, mode: bool = True) -> TimmModel:
        """As ever, but what is frozen as a whole stays in eval mode, so that its BatchNorm stays put."""
        super().train(mode)
        if self._grad_checkpointing:
            _count_batches_once(self.net)
        if mode:
            rest_frozen(self.net)
        return self

    def head_parameter_names(self) -> list[str]:
        """The classifier's parameters, as `named_parameters` has them; each has K rows."""
        classifier = self.net.pretrained_cfg.get("classifier") or ()
        prefixes = (classifier,) if isinstance(classifier, str) else tuple(classifier)
        return [
            name
            for name, tensor in self.named_parameters()
            if name.startswith(tuple(f"net.{prefix}." for prefix in prefixes))
            and tensor.ndim
            and tensor.shape[0] == self.num_classes
        ]

    def layer_of(self) -> dict[str, int]:
        """The layer of every parameter: 0 is what stands before the first block, then one for each block,
        then one for what stands after the last, the classifier too. Empty where timm names no blocks.

        Blocks are those of `freeze`.
        """
        place, blocks = _blocks(self.net, self.head_parameter_names())
        return {f"net.{name}": layer for name, layer in place.items()} if blocks else {}

    def _drop(self, features: Tensor) -> Tensor:
        return F.dropout(features, self._dropout, self.net.training) if self._dropout else features

    def _checkpoint_gradients(self) -> None:
        try:
            self.net.set_grad_checkpointing(True)
        except (AssertionError, AttributeError) as e:
            raise UserError(
                f"model.grad_checkpointing must be false for {self.name}, whose family has none in timm, got true; to save "
                "memory use loop.micro_batch_size"
            ) from e
        _count_batches_once(self.net)

    @torch.no_grad()
    def _probe(self, image_px: int | None) -> None:
        """Send one image through: does this size work, and are the features what the classifier takes?

        Costs one forward pass of one image, and leaves weights, buffers and random state alone.
        """
        net, cfg = self.net, self.net.pretrained_cfg
        own_px = cfg["input_size"][-1]
        px = image_px or getattr(getattr(net, "patch_embed", None), "img_size", None) or own_px
        height, width = px if isinstance(px, tuple | list) else (px, px)
        image = torch.linspace(0, 1, 3 * height * width).view(1, 3, height, width)
        image = (image - self.mean) / self.std
        net.eval()
        classifier = net.get_classifier() if hasattr(net, "get_classifier") else None
        taken: list[Tensor] = []
        hooks = []
        if isinstance(classifier, nn.Module):
            hooks = [classifier.register_forward_pre_hook(lambda _, args: taken.extend(args))]
        try:
            logits = net(image)
        except Exception as e:
            raise UserError(
                f"augment.image_px (by default data.decode.image_px) must suit the model, got {px} for {self.name}: "
                f"{_first_line(e)}; its own size is {own_px}"
            ) from e
        finally:
            for hook in hooks:
                hook.remove()
        if not isinstance(logits, Tensor) or logits.shape != (1, self.num_classes):
            raise UserError(
                f"model.name must be a classifier that returns one vector of logits, got {self.name}"
            )
        if len(taken) == 1 and self._gives_features(image, taken[0], logits):
            self.feature_dim = taken[0].shape[1]
        net.train()

    def _gives_features(self, image: Tensor, taken: Tensor, logits: Tensor) -> bool:
        """Whether the parts of the forward pass, run one by one, make the same as the whole."""
        net = self.net
        head = getattr(net, "forward_head", None)
        if head is None or "pre_logits" not in inspect.signature(head).parameters:
            return False
        try:
            maps = net.forward_features(image)
            features = head(maps, pre_logits=True)
            # features are compared too: a classifier that starts at zero gives the same for any
            return (
                taken.ndim == 2
                and _same(features, taken)
                and _same(net.get_classifier()(features), logits)
                and self._find_dropout(maps)
            )
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False

    def _find_dropout(self, maps: Tensor) -> bool:
        """Families drop features before they hand them out, or after: the same seed tells which."""
        net, classifier = self.net, self.net.get_classifier()
        rate = float(getattr(net, "drop_rate", 0.0) or 0.0)
        if not rate:
            return True
        for module in net.modules():
            module.training = module is net or isinstance(module, nn.Dropout)
        try:
            expected = _seeded(lambda: net.forward_head(maps))
            for self._dropout in (0.0, rate):
                got = _seeded(
                    lambda: classifier(self._drop(net.forward_head(maps, pre_logits=True)))
                )
                if _same(got, expected):
                    return True
            self._dropout = 0.0
            return False
        finally:
            net.eval()


def _size_kwargs(name: str, image_px: int) -> dict[str, Any]:
    """A model with a fixed input size (most transformers) must be built for the size that it will see."""
    from timm.models import get_pretrained_cfg

    cfg = get_pretrained_cfg(name)
    fixed = cfg is not None and cfg.fixed_input_size and cfg.input_size[-1] != image_px
    return {"img_size": image_px} if fixed else {}


def _same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-4, atol=1e-6)


def _seeded(compute: Callable[[], Tensor]) -> Tensor:
    state = torch.default_generator.get_state()
    try:
        torch.default_generator.manual_seed(0)
        return compute()
    finally:
        torch.default_generator.set_state(state)


# ------------------------------------------------------------------------------ gradient checkpointing
def _count_batches_once(net: nn.Module) -> None:
    """Let BatchNorm leave its statistics alone while a block is computed again in the backward pass.

    Also for modules that came later, such as those of convert_sync_batchnorm.
    """
    for module in net.modules():
        fresh = _put_statistics_back not in module._forward_hooks.values()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and fresh:
            module.register_forward_pre_hook(_hold_statistics)
            module.register_forward_hook(_put_statistics_back, always_call=True)


def _hold_statistics(module: nn.Module, _: Any) -> None:
    in_backward = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
    if in_backward and module.training:
        module.__dict__["_held"] = {n: b.clone() for n, b in module.named_buffers(recurse=False)}


def _put_statistics_back(module: nn.Module, *_: Any) -> None:
    for name, held in module.__dict__.pop("_held", {}).items():
        module.get_buffer(name).copy_(held)


# --------------------------------------------------------------------------------------- frozen parts
@torch.no_grad()
def forget_rows(model: nn.Module, head: Iterable[str], rows: Iterable[int]) -> None:
    """Let these classes of the classifier (its parameters by name) start from zero, where the backbone does not.

    The large logits of a random classifier would send large random gradients into a backbone that knows
    something already. Kolesnikov et al. 2020, arXiv:1912.11370, section 3.3.
    """
    rows = list(rows)
    state = model.state_dict()
    for name in head:
        state[name][rows] = 0.0


def rest_frozen(net: nn.Module) -> None:
    """Put what is frozen as a whole into eval mode: its BatchNorm keeps its statistics, its dropout drops nothing."""
    for module in net.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()


def freeze(model: nn.Module, all_but_last_blocks: int | None) -> list[str]:
    """Let only the head and the last `all_but_last_blocks` blocks train; null freezes nothing, 0 all blocks.

    Blocks are the model's own, by its `layer_of()`; of a TimmModel timm's finest groups (a residual block, an
    inverted bottleneck, a transformer block). What stands before the first is frozen, what stands after the last (a
    last convolution, a norm, the classifier) trains. BatchNorm inside a frozen part keeps its statistics where the
    model's `train` sees to it: see `rest_frozen`.

    Returns the names of the frozen parameters. Raises UserError if there are fewer blocks.
    """
    if all_but_last_blocks is None:
        return []
    key, last = "model.freeze.all_but_last_blocks", all_but_last_blocks
    named = getattr(model, "name", type(model).__name__)
    layer_of: dict[str, int] = getattr(model, "layer_of", dict)()
    blocks = max(layer_of.values(), default=1) - 1
    if last > 0 and not blocks:
        who = "timm" if isinstance(model, TimmModel) else "its class"
        raise UserError(f"{key}: {who} names no blocks in {named}, got {last}; use 0 or null")
    if not 0 <= last <= blocks:
        raise UserError(
            f"{key} must be from 0 to {blocks}, the number of blocks of {named}, got {last}; "
            "null lets everything train"
        )
    if not layer_of:
        head = set(getattr(model, "head_parameter_names", list)())
        layer_of = {name: int(name in head) for name, _ in model.named_parameters()}
    if max(layer_of.values()) == 0:
        raise UserError(
            f"{key} must be null for {named}, whose class does not tell its head (head_parameter_names), got {last}"
        )
    frozen = [n for n, _ in model.named_parameters() if layer_of[n] <= blocks - last]
    for name in frozen:
        model.get_parameter(name).requires_grad_(False)
    model.train(model.training)
    return frozen


def _blocks(net: Any, head_names: list[str]) -> tuple[dict[str, int], int]:
    """Each parameter's place (0 is the stem, 1 the first block, …) and the number of blocks.

    What stands after the last block has the place after it.
    """
    from timm.models import group_parameters
    from timm.models._manipulate import MATCH_PREV_GROUP

    names = [name for name, _ in net.named_parameters()]
    head = {name.removeprefix("net.") for name in head_names}
    if not hasattr(net, "group_matcher"):
        return {name: int(name in head) for name in names}, 0

    # timm joins what stands between two blocks to the one before it, and so the tail to the last block
    def tail_apart(matcher: Any) -> Any:
        if callable(matcher):

            def without_joins(name: str) -> Any:
                place = matcher(name)
                joined = isinstance(place, tuple) and place[-1] == MATCH_PREV_GROUP[0]
                return (float("inf"),) if joined else place

            return without_joins
        return {
            group: [(e, s) for e, s in spec if s != MATCH_PREV_GROUP]
            if isinstance(spec, list)
            else spec
            for group, spec in matcher.items()
        }

    matcher = net.group_matcher(coarse=False)
    joined: Any = group_parameters(net, matcher, reverse=True)
    apart: Any = group_parameters(net, tail_apart(matcher), reverse=True)
    classifier = next(name for name in names if name in head)
    after: int = joined[classifier]
    place = {
        name: after
        if name in head or (joined[name] >= after - 1 and apart[name] == apart[classifier])
        else joined[name]
        for name in names
    }
    return place, after - 1
