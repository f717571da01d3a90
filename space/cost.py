"""Exact parameters and multiply-adds of a model: integer arithmetic for our components, shapes without values for a timm model.

`macs` counts convolutions, linear layers and attention products, one per multiply-add: what papers print.
`fvcore_macs` is what `fvcore_count.fvcore_macs` counts on the built network.
"""

from __future__ import annotations

from space.component import Cost
from space.model import Model, kinds


def cost(model: Model) -> Cost:
    """The counts of the whole network for one image; raises SpecError if it cannot be built."""
    return kinds.get(model.kind).cost(model)


def cost_by_part(model: Model) -> dict[str, Cost]:
    """The counts of every part under its module path, in the order of the forward pass; they add up to `cost`.

    The parts of a timm model are its parameters and modules of the first level, in the order it declares them.
    """
    return kinds.get(model.kind).cost_by_part(model)
