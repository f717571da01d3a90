"""Networks whose blocks reduce their tokens: where the papers place each reduction, and how strong it is within a budget.

A reduction has no parameters, so the weights of the plain network are those of the reduced one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component


def with_reductions(spec: ArchSpec, reductions: Mapping[int, Component]) -> ArchSpec:
    """The network with a token reduction in some blocks, numbered from 0 over all stages; those that were there go.

    Raises SpecError for a block that there is not.
    """
    if beyond := [number for number in reductions if not 0 <= number < spec.depth]:
        raise SpecError(f"token reduction in block {beyond[0]}; the network has blocks 0 to {spec.depth - 1}")
    numbers = iter(range(spec.depth))

    def reduced(block: BlockSpec) -> BlockSpec:
        return replace(block, token_reduction=reductions.get(next(numbers)))

    return replace(spec, stages=tuple(replace(stage, blocks=tuple(map(reduced, stage.blocks))) for stage in spec.stages))


def without_reductions(spec: ArchSpec) -> ArchSpec:
    """The network whose blocks keep all tokens, with the same parameters."""
    return with_reductions(spec, {})


def evit(spec: ArchSpec, *, keep: float, fuse: bool = True) -> ArchSpec:
    """EViT in the blocks at a quarter, a half and three quarters of the depth: 3, 6 and 9 of 12."""
    return with_reductions(spec, dict.fromkeys((spec.depth * n // 4 for n in (1, 2, 3)), Component("evit", keep=keep, fuse=fuse)))


def gtp(spec: ArchSpec, *, P: int) -> ArchSpec:
    """GTP in every block."""
    return with_reductions(spec, dict.fromkeys(range(spec.depth), Component("gtp", P=P)))


def mctf(spec: ArchSpec, *, r: int) -> ArchSpec:
    """MCTF in every block but the first."""
    return with_reductions(spec, dict.fromkeys(range(1, spec.depth), Component("mctf", r=r)))


def diffrate(spec: ArchSpec, *, prune_to: Sequence[int], merge_to: Sequence[int]) -> ArchSpec:
    """DiffRate by a schedule: for every block the tokens after pruning and after merging, prefix tokens counted.

    Raises SpecError unless there is a number for every block.
    """
    if not len(prune_to) == len(merge_to) == spec.depth:
        raise SpecError(f"a schedule of {len(prune_to)} and {len(merge_to)} blocks; the network has {spec.depth}")
    schedule = enumerate(zip(prune_to, merge_to, strict=True))
    return with_reductions(spec, {block: Component("diffrate", prune_to=p, merge_to=m) for block, (p, m) in schedule})


def random_drop(spec: ArchSpec, *, num_kept: Sequence[int], seed: int) -> ArchSpec:
    """Patches dropped at random: for every block the number of patches that stay."""
    return with_reductions(spec, {block: Component("random_drop", num_kept=n, seed=seed) for block, n in enumerate(num_kept)})
