"""Exact parameters and multiply-adds of a model: integer arithmetic for an `ArchSpec`, shapes without values for a `TimmSpec`.

`macs` counts convolutions, linear layers and attention products, one per multiply-add: what papers print.
`fvcore_macs` is what `fvcore_count.fvcore_macs` counts on the built network.
"""

from __future__ import annotations

from space.component import Cost
from space.layout import groups, layout, part_cost
from space.model import Model
from space.timm_spec import TimmSpec


def cost(spec: Model) -> Cost:
    """The counts of the whole network for one image; raises SpecError if it cannot be built."""
    if isinstance(spec, TimmSpec):
        return sum(cost_by_part(spec).values(), Cost())
    params = macs = fvcore_macs = 0
    for _, group in groups(spec):
        counted = group.cost
        params += counted.params
        macs += counted.macs
        fvcore_macs += counted.fvcore_macs
    return Cost(params, macs, fvcore_macs)


def cost_by_part(spec: Model) -> dict[str, Cost]:
    """The counts of every part under its module path, in the order of the forward pass; they add up to `cost`.

    The parts of a timm model are its parameters and modules of the first level, in the order it declares them.
    """
    if isinstance(spec, TimmSpec):
        from space.timm_cost import counted  # here, since counting a spec of ours needs neither torch nor timm

        return dict(counted(spec).parts)
    return {part.path: part_cost(part) for part in layout(spec)}
