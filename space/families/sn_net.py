"""SN-Net and SN-Netv2: networks stitched from the blocks of trained anchors.

Stitchable Neural Networks (v1), https://arxiv.org/abs/2302.06586; SN-Netv2: Stitched ViTs are Flexible Vision Backbones,
https://arxiv.org/abs/2307.00154, code at https://github.com/ziplab/SN-Netv2 (Apache-2.0).

A stitch is written `deit3_small+deit3_large:S0-5>L12-23`: the anchors, then the blocks of each that an image runs through. The anchors of a
stitch are ordered by their MACs, whatever the order in which they are named.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from space import catalog
from space.cost import cost, cost_by_part
from space.family import Family, family
from space.model import require_arch
from space.registry import SpecError, unknown_name
from space.spec import ArchSpec
from space.stitch_spec import Route, Segment, Step, StitchSpec, check_anchors, read_route, route_text, steps
from space.timm_spec import TimmSpec
from space.timm_vit import as_plain_vit

EMBEDDING = ("patch_embed", "prefix", "position")
LOOKS_LIKE_A_ROUTE = re.compile(r"[A-Z]\d")


class Stitch(NamedTuple):
    """A route of a stitching space, by its number there. `is_usable` is False for what is numbered but runs no block of its last anchor."""

    id: int
    kind: str
    route: Route
    is_usable: bool = True


def two_way(depths: Sequence[int]) -> tuple[Stitch, ...]:
    """SN-Netv2's space over anchors of so many blocks, the smallest anchor first, with its published numbering (section 3.2).

    Of two anchors the one of fewer blocks is cut into its n blocks, the other into n runs that are as equal as they can be, and both
    are aligned run by run. Numbered are the anchors; then SL (after run j of the small one go on in the large one), LS, LSL and SLS. The
    last SL would use no block of the large anchor and is not usable: n^2 - n + 2 are. Of three anchors every two neighbours are stitched,
    and they share the anchor between them. The released code is right for depths of ratio 1 and 2 alone.
    """
    ids = itertools.count()
    found = [Stitch(next(ids), "anchor", (Segment(anchor, 0, depth - 1),)) for anchor, depth in enumerate(depths)]
    for small, large in itertools.pairwise(range(len(depths))):
        found += [Stitch(next(ids), *rest) for rest in _two_way_pair(small, large, depths)]
    return tuple(found)


def _two_way_pair(small: int, large: int, depths: Sequence[int]) -> Iterator[tuple[str, Route, bool]]:
    n = min(depths[small], depths[large])
    shown = {small: "S", large: "L"} if len(depths) == 2 else {small: f"{small}-", large: f"{large}-"}

    def route(*parts: tuple[int, int, int]) -> tuple[str, Route, bool]:
        """The route over runs `start` to before `end` of the anchors."""
        segments = [Segment(anchor, start * depths[anchor] // n, end * depths[anchor] // n - 1) for anchor, start, end in parts]
        is_usable = all(segment.first <= segment.last for segment in segments)
        return "".join(shown[anchor] for anchor, _, _ in parts).removesuffix("-"), tuple(segments), is_usable

    yield from (route((small, 0, j + 1), (large, j + 1, n)) for j in range(n))
    yield from (route((large, 0, k + 1), (small, k + 1, n)) for k in range(n - 1))
    yield from (route((large, 0, k + 1), (small, k + 1, j + 1), (large, j + 1, n)) for k in range(n - 1) for j in range(k + 1, n - 1))
    yield from (route((small, 0, j + 1), (large, j + 1, k + 1), (small, k + 1, n)) for j in range(n - 1) for k in range(j + 1, n - 1))


def paired(depths: Sequence[int], *, kernel: int = 2, stride: int = 1, nearest: bool = True) -> tuple[Stitch, ...]:
    """SN-Net's space over anchors of equal depth (section 3.3): all pairs of blocks within a window, which slides over the depth.

    The window is `kernel` blocks long and moves by `stride`. A stitch (j, k) runs blocks 0 to j of the smaller anchor and k to the last of
    the larger. Without `nearest`, which stitches neighbours only, there are also stitches between the smallest and the largest anchor, and
    routes through all three. Raises SpecError for anchors of different depths, or a window that leaves the network.
    """
    if len(set(depths)) > 1:
        raise SpecError(f"paired stitching is for anchors of equal depth; these have {', '.join(map(str, depths))} blocks")
    depth = depths[0]
    if not 1 <= stride <= kernel <= depth:
        raise SpecError(f"kernel is {kernel}, stride is {stride}; allowed: 1 <= stride <= kernel <= {depth}, the depth")
    window = _window(depth, kernel, stride)
    reach = 1 if nearest else len(depths)
    return _one_way(depths, [*_chains(len(depths), reach)], lambda one, other: window)


def nearest_blocks(depths: Sequence[int]) -> tuple[Stitch, ...]:
    """SN-Net's space over anchors of unequal depth: each block of the larger anchor is entered from its nearest one of the smaller."""
    return _one_way(depths, [*_chains(len(depths), 1)], lambda one, other: _nearest(depths[one], depths[other]))


def nearest_blocks_of_stages(depths: Sequence[Sequence[int]]) -> tuple[tuple[int, int, int, int], ...]:
    """The stitches between neighbours among hierarchical anchors, `(small anchor, stage, from block, to block)`; the last stage has none.

    Of Swin-Ti, -S and -B, of 2-2-6-2, 2-2-18-2 and 2-2-18-2 blocks, there are 38, with the anchors 41 networks.
    """
    return tuple(
        (number, stage, *blocks)
        for number, (small, large) in enumerate(itertools.pairwise(depths))
        for stage in range(len(small) - 1)
        for blocks in _nearest(small[stage], large[stage])
    )


def _window(depth: int, kernel: int, stride: int) -> list[tuple[int, int]]:
    """The pairs of every window, each once, in the order of the windows; the last windows end with the network."""
    windows = (range(start, min(start + kernel, depth)) for start in range(0, depth, stride))
    pairs = ((leave, enter) for window in windows for leave in window for enter in window)
    return list(dict.fromkeys(pairs))


def _nearest(small: int, large: int) -> list[tuple[int, int]]:
    """A pair for each block of the larger but its first. Of equal depths block i is entered from i - 1, so that no block is added."""
    return [(min(block * small // large, block - 1), block) for block in range(1, large)]


def _chains(num_anchors: int, reach: int) -> Iterator[tuple[int, ...]]:
    """Rising runs of anchors: neighbours if `reach` is 1, else all of two and more."""
    lengths = (2,) if reach == 1 else range(2, num_anchors + 1)
    for length in lengths:
        for chain in itertools.combinations(range(num_anchors), length):
            if all(other - one <= reach for one, other in itertools.pairwise(chain)):
                yield chain


def _one_way(
    depths: Sequence[int], chains: Sequence[tuple[int, ...]], pairs_of: Callable[[int, int], list[tuple[int, int]]]
) -> tuple[Stitch, ...]:
    ids = itertools.count()
    found = [Stitch(next(ids), "anchor", (Segment(anchor, 0, depth - 1),)) for anchor, depth in enumerate(depths)]
    for chain in chains:
        steps = [pairs_of(one, other) for one, other in itertools.pairwise(chain)]
        for pairs in itertools.product(*steps):
            starts = (0, *(enter for _, enter in pairs))
            ends = (*(leave for leave, _ in pairs), depths[chain[-1]] - 1)
            if all(start <= end for start, end in zip(starts, ends, strict=True)):
                route = tuple(map(Segment, chain, starts, ends))
                found.append(Stitch(next(ids), "-".join(map(str, chain)), route))
    return tuple(found)


def compute_levels(macs: Sequence[int], gap: float) -> tuple[tuple[int, ...], ...]:
    """The stitches in groups of similar cost, cheapest first: positions in `macs`, rising in each group.

    Resource-constrained sampling draws a group, then a stitch of it (SN-Netv2, section 3.3). A group ends where a stitch costs over `gap`
    more than its cheapest member.
    """
    order = sorted(range(len(macs)), key=lambda position: macs[position])
    levels: list[list[int]] = []
    for position in order:
        if not levels or macs[position] - macs[levels[-1][0]] > gap:
            levels.append([])
        levels[-1].append(position)
    return tuple(tuple(sorted(level)) for level in levels)


def level_gap(anchors: Sequence[ArchSpec]) -> float:
    """Half of what it costs, as fvcore counts, to run one more run of blocks in the larger of two neighbouring anchors; the least of them.

    The released recipe takes 1e9 for two anchors of DeiT III at 224 px. This gives the same groups there, and groups of the same kind for
    other anchors: those of 12 runs have 13, and each anchor is one of its own.
    """
    return min(
        (cost(large).fvcore_macs - cost(small).fvcore_macs) / (2 * min(small.depth, large.depth))
        for small, large in itertools.pairwise(anchors)
    )


@dataclass(frozen=True)
class LevelSampler:
    """Draws positions of stitches: first one of the `levels` of `compute_levels`, then one of its stitches, both uniformly.

    A draw follows from its seed alone, so a training that names its seeds by (seed, step, rank) has no further state to keep.
    """

    levels: tuple[tuple[int, ...], ...]

    def draw(self, seed: int) -> int:
        generator = random.Random(seed)
        return generator.choice(generator.choice(self.levels))


def macs_of_all(anchors: Sequence[ArchSpec], routes: Sequence[Route]) -> tuple[int, int]:
    """Multiply-adds to evaluate an image on every route: one route after the other, and each step once that routes have in common.

    Counted as fvcore does, norms included.
    """
    prefixes: set[tuple[Step, ...]] = set()
    alone = together = 0
    for route in routes:
        counts = _macs_by_step(StitchSpec(anchors=tuple(anchors), route=route))
        alone += sum(counts)
        taken = steps(route)
        for end, count in enumerate(counts, start=1):
            if (prefix := taken[:end]) not in prefixes:
                prefixes.add(prefix)
                together += count
    return alone, together


def _macs_by_step(stitch: StitchSpec) -> list[int]:
    """The fvcore MACs of each of the route's `steps`."""
    counts: dict[str, int] = {}
    for path, counted in cost_by_part(stitch.folded).items():
        place, *rest = path.split(".")
        if place == "stages":
            step = ".".join((place, *rest[: 3 if rest[1] == "blocks" else 2]))
        else:
            step = "embed" if place in EMBEDDING else "classify"
        counts[step] = counts.get(step, 0) + counted.fvcore_macs
    return list(counts.values())


SPACES: dict[str, Callable[[Sequence[int]], tuple[Stitch, ...]]] = {"two_way": two_way, "paired": paired, "nearest": nearest_blocks}
"""Stitching spaces by name: SN-Netv2's, and SN-Net's for anchors of equal and of other depths."""


class Anchors(NamedTuple):
    """Networks to stitch, ordered by their MACs, with the names that a user gave them."""

    names: tuple[str, ...]
    models: tuple[ArchSpec, ...]

    def stitch(self, route: Route) -> StitchSpec:
        return StitchSpec(anchors=self.models, route=route)

    def stitches(self, space: str = "two_way") -> tuple[Stitch, ...]:
        """The usable stitches of one of `SPACES`; raises SpecError for another name, or depths that the space is not for."""
        if space not in SPACES:
            raise unknown_name("stitching space", space, SPACES)
        return tuple(stitch for stitch in SPACES[space]([model.depth for model in self.models]) if stitch.is_usable)

    def key(self, route: Route) -> str:
        """`sn_net:deit3_small+deit3_large:S0-5>L12-23`."""
        return f"sn_net:{'+'.join(self.names)}:{route_text(route, self.names)}"


def read_anchors(text: str) -> Anchors:
    """The anchors of `deit3_small+deit3_large`; raises SpecError for what is no model, or where tokens of one cannot go on in the other."""
    names = text.split("+")
    if len(names) < 2 or "" in names:
        raise SpecError(f"{text!r} names no two anchors; they are written deit3_small+deit3_large")
    models = [_anchor(name) for name in names]
    try:
        check_anchors(models)
    except SpecError as error:
        raise SpecError(f"sn_net:{text}: {error}") from error
    ordered = sorted(zip(names, models, strict=True), key=lambda each: cost(each[1]).macs)
    return Anchors(tuple(name for name, _ in ordered), tuple(model for _, model in ordered))


def _anchor(name: str) -> ArchSpec:
    model = catalog.resolve(name)
    if isinstance(model, TimmSpec):
        return as_plain_vit(model)
    return require_arch(model, f"a stitch with the anchor {name}")


def read(string: str) -> StitchSpec:
    """The network of `deit3_small+deit3_large:S0-5>L12-23`; raises SpecError saying what is allowed."""
    names, _, route = string.rpartition(":")
    if not LOOKS_LIKE_A_ROUTE.match(route):
        anchors = read_anchors(string)
        stitches = anchors.stitches()
        example = anchors.key(stitches[len(anchors.models)].route)
        listing = f"describe 'sn_net:{string}' --stitches lists {len(stitches)}"
        raise SpecError(f"sn_net:{string} names anchors and no route, as {example} does; {listing}")
    anchors = read_anchors(names)
    return anchors.stitch(read_route(route, anchors.names))


def explain(string: str) -> list[str]:
    """What each segment of a route runs, in lines of at most 80 characters."""
    names, _, route = string.rpartition(":")
    anchors = read_anchors(names)
    lines = []
    for text, segment in zip(route.split(">"), read_route(route, anchors.names), strict=True):
        name, last = anchors.names[segment.anchor], anchors.models[segment.anchor].depth - 1
        number = segment.last - segment.first + 1
        lines.append(f"{text:10} {number} of the blocks 0-{last} of {name}"[:80])
    return lines


@family("sn_net")
def sn_net() -> Family:
    """Stitched networks: a route over the blocks of several trained ones."""
    return Family(read=read, explain=explain)
