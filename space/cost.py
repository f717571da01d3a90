"""Exact parameters and multiply-adds of a spec: integer arithmetic, no tensors.

`macs` counts convolutions, linear layers and attention products, one per multiply-add: what papers print.
`fvcore_macs` is what `fvcore_count.fvcore_macs` counts on the built network.
"""

from __future__ import annotations

from space.component import Cost
from space.layout import groups, layout, part_cost
from space.spec import ArchSpec


def cost(spec: ArchSpec) -> Cost:
    """The counts of the whole network for one image; raises SpecError if it cannot be built."""
    params = macs = fvcore_macs = 0
    for _, group in groups(spec):
        counted = group.cost
        params += counted.params
        macs += counted.macs
        fvcore_macs += counted.fvcore_macs
    return Cost(params, macs, fvcore_macs)


def cost_by_part(spec: ArchSpec) -> dict[str, Cost]:
    """The counts of every part under its module path, in the order of the forward pass; they add up to `cost`."""
    return {part.path: part_cost(part) for part in layout(spec)}
