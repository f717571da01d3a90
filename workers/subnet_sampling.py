"""Which subnets a step of a supernet's training runs: the draw, what it may draw from, and the order of what subnets share.

Multi-architectural sampling and progressive shrinking as ViT-ResNAS has them, https://arxiv.org/abs/2109.00642, and the sandwich rule of
BigNAS, https://arxiv.org/abs/2003.11142. Every step and process draws from a stream of its own. The released code of ViT-ResNAS draws
from torch's global generator, whose state it restores: unless another part of the step drew from it, every step saw the same subnets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from space.component import Folds, Scalar
from space.cost import cost
from space.layout import Part, layout
from space.registry import SpecError
from space.slicing import tensor_folds
from space.spec import ArchSpec, Component, full_choices
from space.subnet_spec import SubnetSpec
from space.supernet_space import SupernetSpace

Sampling = Literal["stratified", "iid", "sandwich", "macs"]
Point = dict[str, Scalar]
Tables = Mapping[str, tuple[Scalar, ...]]
"""For each axis of a space what may be drawn, descending; a value that stands there twice is drawn twice as often."""

SORTED_UNITS = {"mixer": "num_heads", "feed_forward": "hidden_dim"}
"""By the kind of component, the choice that counts its interchangeable units: to permute these changes nothing that is computed."""


@dataclass(frozen=True, kw_only=True)
class SubnetSampler:
    """Draws `num_subnets` of a space for one step.

    `stratified`, as published: no two of a step share a value of an axis, as far as its table goes. `iid`: all independent. `sandwich`: the
    largest, the smallest, and the others independent. `macs`: multiply-adds spread evenly from the smallest to the largest subnet, where
    independent draws come out near the middle.

    The choices of an axis are unlocked one by one, from the largest, over the first `num_unlocking_epochs`. Raises SpecError for numbers
    that cannot be.
    """

    space: SupernetSpace
    num_subnets: int
    mode: Sampling
    num_unlocking_epochs: float

    def __post_init__(self) -> None:
        least = 2 if self.mode == "sandwich" else 1
        if self.num_subnets < least:
            raise SpecError(f"sampling {self.mode!r} with {self.num_subnets} subnets a step; allowed: from {least}")

    def sample(self, epoch: int, seed: int) -> tuple[SubnetSpec, ...]:
        """The subnets of the step whose stream is `seed`."""
        tables = unlocked_tables(self.space, epoch, self.num_unlocking_epochs)
        generator = torch.Generator().manual_seed(seed)
        points = _SAMPLINGS[self.mode](self.space, tables, self.num_subnets, generator)
        return tuple(map(self.space.subnet, points))


def unlocked_tables(space: SupernetSpace, epoch: int, num_epochs: float) -> Tables:
    """What may be drawn in an epoch, counted from 0: of n values the first 1 + floor(epoch (n - 1) / num_epochs).

    A skippable block has the table (keep, keep, drop, drop), so that it is dropped in 0, 1/3 and 1/2 of the draws as its values unlock.
    """

    def unlocked(values: tuple[Scalar, ...]) -> tuple[Scalar, ...]:
        if epoch >= num_epochs:
            return values
        return values[: 1 + int(epoch * (len(values) - 1) / num_epochs)]

    tables: dict[str, tuple[Scalar, ...]] = {}
    for axis in space.axes:
        assert isinstance(axis.choices, tuple)
        tables[axis.name] = unlocked((True, True, False, False) if axis.choices == (True, False) else axis.choices)
    return tables


def draw_iid(tables: Tables, generator: torch.Generator) -> Point:
    """Every axis drawn uniformly from its table, independent of the others."""
    return {name: table[_below(len(table), generator)] for name, table in tables.items()}


def _stratified(space: SupernetSpace, tables: Tables, number: int, generator: torch.Generator) -> list[Point]:
    points: list[Point] = [{} for _ in range(number)]
    for name, table in tables.items():
        repeated = table * -(-number // len(table))
        order = torch.randperm(len(repeated), generator=generator).tolist()
        for point, place in zip(points, order, strict=False):
            point[name] = repeated[place]
    return points


def _iid(space: SupernetSpace, tables: Tables, number: int, generator: torch.Generator) -> list[Point]:
    return [draw_iid(tables, generator) for _ in range(number)]


def _sandwich(space: SupernetSpace, tables: Tables, number: int, generator: torch.Generator) -> list[Point]:
    return [_corner(tables, 0), _corner(tables, -1), *_iid(space, tables, number - 2, generator)]


def _spread_over_macs(space: SupernetSpace, tables: Tables, number: int, generator: torch.Generator) -> list[Point]:
    """One subnet near a number of multiply-adds drawn from each of `number` equal parts of their range."""
    least, most = (_macs(space, _corner(tables, place)) for place in (-1, 0))
    targets = [least + (most - least) * (part + torch.rand((), generator=generator).item()) / number for part in range(number)]
    return [_towards(space, tables, target, generator) for target in targets]


_SAMPLINGS: dict[Sampling, Callable[[SupernetSpace, Tables, int, torch.Generator], list[Point]]] = {
    "stratified": _stratified,
    "iid": _iid,
    "sandwich": _sandwich,
    "macs": _spread_over_macs,
}


def _towards(space: SupernetSpace, tables: Tables, target: float, generator: torch.Generator) -> Point:
    """An independent draw, led towards the largest or the smallest subnet, axis by axis in random order, to the target's MACs."""
    point = draw_iid(tables, generator)
    grows = _macs(space, point) < target
    corner = _corner(tables, 0 if grows else -1)
    order = [list(tables)[place] for place in torch.randperm(len(tables), generator=generator).tolist()]

    def led(number: int) -> Point:
        return point | {name: corner[name] for name in order[:number]}

    # MACs change one way along the order, so the place where they pass the target is found by halving.
    low, high = 0, len(order)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if (_macs(space, led(middle)) < target) == grows else (low, middle)
    return min(led(low), led(high), key=lambda one: abs(_macs(space, one) - target))


def _corner(tables: Tables, place: int) -> Point:
    return {name: table[place] for name, table in tables.items()}


def _macs(space: SupernetSpace, point: Point) -> int:
    return cost(space.subnet(point)).macs


def _below(number: int, generator: torch.Generator) -> int:
    return int(torch.randint(number, (), generator=generator))


def orders_by_importance(spec: ArchSpec, weights: Mapping[str, Tensor]) -> dict[str, Callable[[Tensor], Tensor]]:
    """For each tensor of the network with heads or hidden units, by name, the permutation that puts the most important ones first.

    The importance of a unit is the sum of the absolute values of its weights and biases, in all tensors that have it. What the network
    computes stays the same; the first units, which the narrow subnets have, become the important ones.
    """
    changes: dict[str, Callable[[Tensor], Tensor]] = {}
    for part in layout(spec):
        if places := unit_places(part):
            named = {f"{part.path}.{name}": place for name, place in places.items()}
            importance = sum(_by_unit(weights[name], place).abs().sum(dim=1) for name, place in named.items())
            assert isinstance(importance, Tensor)
            order = importance.argsort(descending=True, stable=True)
            changes |= {name: _reordering(place, order) for name, place in named.items()}
    return changes


Place = tuple[Folds, int]
"""How a tensor's dimensions are folded, and which of all the sizes in them counts units."""


def unit_places(part: Part) -> dict[str, Place]:
    """The tensors of a part's module that have its interchangeable units, and where; empty if it has none or one.

    They are the sizes that change with the number of units.
    """
    choice = SORTED_UNITS.get(part.kind)
    units = full_choices(part.kind, part.component).get(choice, 1) if choice else 1
    if not choice or type(units) is not int or units < 2:
        return {}
    fewer = part._replace(component=Component(part.component.name, **part.component.choices | {choice: units - 1}))
    ours, theirs = tensor_folds(part), tensor_folds(fewer)
    places: dict[str, Place] = {}
    for name, folds in ours.items():
        sizes = [pair for mine, other in zip(folds, theirs[name], strict=True) for pair in zip(mine, other, strict=True)]
        if changed := [place for place, (mine, other) in enumerate(sizes) if mine != other]:
            places[name] = (folds, changed[0])
    return places


def _by_unit(tensor: Tensor, place: Place) -> Tensor:
    """The tensor as `(units, rest)`."""
    folds, dim = place
    unfolded = tensor.reshape([size for sizes in folds for size in sizes]).movedim(dim, 0)
    return unfolded.reshape(len(unfolded), -1)


def _reordering(place: Place, order: Tensor) -> Callable[[Tensor], Tensor]:
    folds, dim = place

    def reordered(tensor: Tensor) -> Tensor:
        unfolded = tensor.reshape([size for sizes in folds for size in sizes])
        return unfolded.index_select(dim, order).reshape(tensor.shape)

    return reordered
