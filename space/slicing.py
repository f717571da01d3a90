"""Parameters of a narrow network as slices of a wide one's: what networks that share weights stand on.

Every dimension is cut to its first entries. A dimension that is folded from several sizes, such as the rows of fused queries, keys and
values (parts, heads, head_dim), is cut in each of these; a component declares them by `folds` (`space/component.py`). ViT-ResNAS
(https://arxiv.org/abs/2109.00642) and AutoFormer (https://arxiv.org/abs/2107.00651) slice in this way.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from space.component import Folds
from space.layout import Part, layout
from space.registry import SpecError
from space.subnet_spec import SubnetSpec


class Slice(NamedTuple):
    """A tensor of a subnet as a part of one of its supernet, both by their names; the sizes that their dimensions are folded from."""

    name: str
    origin: str
    wide: Folds
    narrow: Folds

    @property
    def is_whole(self) -> bool:
        return self.wide == self.narrow

    def view(self, tensor: Tensor) -> Tensor:
        """The part of the supernet's tensor, as a view in which folded dimensions are unfolded: writing to it writes to the tensor."""
        dim = 0
        for whole, part in zip(self.wide, self.narrow, strict=True):
            if len(whole) > 1:
                tensor = tensor.unflatten(dim, whole)
            for size, kept in zip(whole, part, strict=True):
                if size != kept:
                    tensor = tensor.narrow(dim, 0, kept)
                dim += 1
        return tensor

    def read(self, tensor: Tensor) -> Tensor:
        """The subnet's tensor, of the supernet's; a view wherever it can be one."""
        return tensor if self.is_whole else self.view(tensor).reshape([math.prod(sizes) for sizes in self.narrow])

    def add(self, tensor: Tensor, part: Tensor) -> None:
        """Add what has the shape of the subnet's tensor to its place in the supernet's."""
        view = self.view(tensor)
        view += part.reshape(view.shape)


def sliced(tensor: Tensor, wide: Folds, narrow: Folds) -> Tensor:
    """The first entries of every size that a dimension of the tensor is folded from; a view wherever it can be one."""
    return Slice("", "", wide, narrow).read(tensor)


def subnet_tensors(subnet: SubnetSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the state dict of the subnet's network holds, as slices of `tensors`, the supernet's by name.

    Gradients of the slices arrive in `tensors`, so `torch.func.functional_call(network, subnet_tensors(subnet, parameters), images)` trains
    the supernet. What `tensors` lacks is left out, and buffers that no state dict holds are the subnet's own. Raises SpecError where more
    than widths differ: another number of tokens is no slice.
    """
    return {each.name: each.read(tensors[each.origin]) for each in subnet_slices(subnet) if each.origin in tensors}


@lru_cache(maxsize=256)
def subnet_slices(subnet: SubnetSpec) -> tuple[Slice, ...]:
    """Where each tensor of the subnet's state dict lies in its supernet's. Raises SpecError as `subnet_tensors`."""
    origins = {part.path: part for part in layout(subnet.supernet)}
    slices: list[Slice] = []
    for part in layout(subnet.arch):
        origin = origins[subnet.origin(part.path)]
        if part.shape[1:] != origin.shape[1:]:
            raise SpecError(f"{part.path} sees {part.shape}, in the supernet {origin.shape}; only widths are sliced")
        wide, narrow = tensor_folds(origin), tensor_folds(part)
        slices += [Slice(f"{part.path}.{name}", f"{origin.path}.{name}", wide[name], narrow[name]) for name in narrow]
    return tuple(slices)


def tensor_folds(part: Part) -> dict[str, Folds]:
    """How the dimensions of each tensor in the state dict of the part's module are folded, by its name there."""
    return _tensor_folds(part._replace(path=""))


@lru_cache(maxsize=16384)
def _tensor_folds(part: Part) -> dict[str, Folds]:
    declared = part.module_class.folds(part.shape, **part.arguments) if hasattr(part.module_class, "folds") else {}
    with torch.device("meta"):
        tensors = part.module().state_dict()
    return {name: tuple((size,) for size in tensor.shape) for name, tensor in tensors.items()} | declared
