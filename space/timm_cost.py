"""Exact counts of a timm model: its forward pass on the meta device, where shapes are all there is.

Products come from PyTorch's `FlopCounterMode`, which counts fused attention right on that device; to them `fvcore_macs` adds what
fvcore counts of norms and adaptive pooling. It equals `fvcore_count.fvcore_macs` unless a model resamples, calls einsum or
standardises its weights with a norm (NFNet: 2 per cent below).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from space.component import Cost
from space.registry import SpecError
from space.timm_build import create
from space.timm_spec import TimmSpec


@dataclass(frozen=True)
class Counted:
    """Counts of the root's own parameters and of its children, by name in the order timm declares them, and the number of blocks.

    `patch_size` is that of a Vision Transformer's embedding in pixels, None where there is none or it is not square.
    """

    parts: Mapping[str, Cost]
    depth: int
    patch_size: int | None = None


@lru_cache(maxsize=1024)
def counted(spec: TimmSpec) -> Counted:
    """The counts for one image; raises SpecError if the network cannot be built, takes no such image, or gives no logits.

    Work outside any child, such as pooling before the head, is listed as `between`.
    """
    with torch.device("meta"):
        # `to`, since some models make tensors from arrays.
        model = create(spec).to("meta").eval().requires_grad_(False)
    named_params = dict.fromkeys((*dict(model.named_parameters(recurse=False)), *dict(model.named_children())), 0)
    for path, parameter in model.named_parameters():
        named_params[path.partition(".")[0]] += parameter.numel()
    image = torch.zeros(1, spec.in_chans, spec.img_size, spec.img_size, device="meta")
    with FlopCounterMode(display=False) as products, _ElementwiseMacs() as elementwise:
        shares = _shares(model, lambda: (products.get_total_flops() // 2, elementwise.macs))
        try:
            logits = model(image)
        except Exception as error:  # Every model refuses an image in its own way.
            raise SpecError(f"timm model {spec.name!r} takes no image of {spec.img_size} pixels: {error}") from error
    if not isinstance(logits, Tensor) or logits.shape != (1, spec.num_classes):
        raise SpecError(f"timm model {spec.name!r} puts out no logits for {spec.num_classes} classes; is it no classifier?")
    total = (products.get_total_flops() // 2, elementwise.macs)
    between = [whole - sum(share[index] for share in shares.values()) for index, whole in enumerate(total)]
    parts = {name: _cost(params, *shares.get(name, (0, 0))) for name, params in named_params.items()}
    parts = {name: part for name, part in parts.items() if any(part)}
    if any(between):
        parts["between"] = _cost(0, *between)
    depth = sum(is_block(path, module) for path, module in model.named_modules())
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", None)
    square = patch[0] if isinstance(patch, tuple) and len(set(patch)) == 1 else None
    return Counted(parts, depth, square)


def _cost(params: int, macs: int, elementwise: int) -> Cost:
    return Cost(params, macs, macs + elementwise)


def is_block(path: str, module: nn.Module) -> bool:
    """Whether the module is a residual block by its path, as timm's transformers and ConvNeXts and our networks name them: `blocks.0`."""
    # EfficientNets nest them, `blocks.0.1`, and only the inner ones are blocks.
    return re.search(r"(^|\.)blocks(\.\d+)+$", path) is not None and not isinstance(module, nn.Sequential)


def _shares(model: nn.Module, totals: Callable[[], tuple[int, int]]) -> dict[str, tuple[int, int]]:
    """How much of `totals()` each child of the model adds in the forward pass to come, by name; filled as it runs."""
    shares: dict[str, tuple[int, int]] = {}
    entered: list[tuple[int, int]] = []

    def enter(*_: Any) -> None:
        entered.append(totals())

    def leave(module: nn.Module, *_: Any) -> None:
        before, after = entered.pop(), totals()
        if not entered:
            sums = shares.get(child_of[module], (0, 0))
            shares[child_of[module]] = (sums[0] + after[0] - before[0], sums[1] + after[1] - before[1])

    # Also inside the children, since some models run the layers of a child without calling it.
    child_of = {module: path.partition(".")[0] for path, module in model.named_modules() if path}
    for module in child_of:
        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
    return shares


class _ElementwiseMacs(TorchFunctionMode):
    """Sums what fvcore counts of norms and adaptive pooling: a fixed count for each input element."""

    macs = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _PER_ELEMENT:
            affine, per_element = _PER_ELEMENT[func]
            is_affine = (args[affine] if len(args) > affine else kwargs.get("weight")) is not None
            self.macs += per_element[is_affine] * math.prod(args[0].shape)
        return func(*args, **kwargs)


_PER_ELEMENT: dict[Any, tuple[int, tuple[int, int]]] = {
    F.layer_norm: (2, (4, 5)),
    F.group_norm: (2, (4, 5)),
    F.batch_norm: (3, (1, 2)),
    F.adaptive_avg_pool2d: (1, (1, 1)),
}
"""Position of the weight among the arguments, and the count per element without and with one; `norm_flop_counter` and
`batchnorm_flop_jit` of fvcore 0.1.5, in evaluation mode."""
