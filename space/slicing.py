"""Parameters of a narrow network as slices of a wide one's: what networks that share weights stand on.

Every dimension is cut to its first entries. A dimension that is folded from several sizes, such as the rows of fused queries, keys and
values (parts, heads, head_dim), is cut in each of these; a component declares them by `folds` (`space/component.py`). ViT-ResNAS
(https://arxiv.org/abs/2109.00642) and AutoFormer (https://arxiv.org/abs/2107.00651) slice in this way.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache

import torch
from torch import Tensor

from space.component import Folds
from space.layout import Part, layout
from space.registry import SpecError
from space.spec import ArchSpec
from space.subnet_spec import SubnetSpec


def sliced(tensor: Tensor, wide: Folds, narrow: Folds) -> Tensor:
    """The first entries of every size that a dimension of the tensor is folded from; a view wherever it can be one."""
    for dim, (whole, part) in enumerate(zip(wide, narrow, strict=True)):
        if whole == part:
            continue
        unfolded = tensor.unflatten(dim, whole)
        for offset, size in enumerate(part):
            unfolded = unfolded.narrow(dim + offset, 0, size)
        tensor = unfolded.flatten(dim, dim + len(part) - 1)
    return tensor


def subnet_tensors(subnet: SubnetSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the state dict of the subnet's network holds, as slices of `tensors`, the supernet's by name.

    Gradients of the slices arrive in `tensors`, so `torch.func.functional_call(network, subnet_tensors(subnet, parameters), images)` trains
    the supernet. What `tensors` lacks is left out, and buffers that no state dict holds are the subnet's own. Raises SpecError where more
    than widths differ: another number of tokens is no slice.
    """
    origins = {part.path: part for part in layout(subnet.supernet)}
    slices: dict[str, Tensor] = {}
    for part in layout(subnet.arch):
        origin = origins[subnet.origin(part.path)]
        if part.shape[1:] != origin.shape[1:]:
            raise SpecError(f"{part.path} sees {part.shape}, in the supernet {origin.shape}; only widths are sliced")
        wide, narrow = _folds(subnet.supernet, origin), _folds(subnet.arch, part)
        for name in narrow:
            if (whole := tensors.get(f"{origin.path}.{name}")) is not None:
                slices[f"{part.path}.{name}"] = sliced(whole, wide[name], narrow[name])
    return slices


def _folds(spec: ArchSpec, part: Part) -> dict[str, Folds]:
    """How the dimensions of each tensor of the part's module are folded, by its name there."""
    declared = part.module_class.folds(part.shape, **part.arguments) if hasattr(part.module_class, "folds") else {}
    start = f"{part.path}."
    plain = {name.removeprefix(start): tuple((size,) for size in shape) for name, shape in _shapes(spec).items() if name.startswith(start)}
    return plain | declared


@lru_cache(maxsize=256)
def _shapes(spec: ArchSpec) -> dict[str, torch.Size]:
    from space.vit import VisionTransformer

    with torch.device("meta"):
        return {name: tensor.shape for name, tensor in VisionTransformer(spec).state_dict().items()}
