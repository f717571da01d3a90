"""Networks whose blocks reduce their tokens: where the papers place each reduction, and how strong it is within a budget.

These reductions have no parameters, so the weights of the plain network are those of the reduced one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from typing import Any

from space.component import Scalar, TokenShape, components
from space.cost import cost
from space.layout import layout
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, full_choices


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


def placed(spec: ArchSpec, reduction: str, **choices: Scalar | Sequence[Scalar]) -> ArchSpec:
    """The network with this reduction in the blocks where its paper places it.

    A choice is one value for all these blocks, or a sequence with one for each of them. Raises SpecError for another number of them, and
    for an unknown reduction or choice.
    """
    cls: Any = components.get("token_reduction", reduction)
    blocks = cls.places(spec.depth) if hasattr(cls, "places") else range(spec.depth)
    of_blocks: list[dict[str, Scalar]] = [{} for _ in blocks]
    for name, value in choices.items():
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value] * len(blocks)
        if len(values) != len(blocks):
            raise SpecError(f"token_reduction {reduction!r}: {name} has {len(values)} values; there are {len(blocks)} blocks for them")
        for chosen, one in zip(of_blocks, values, strict=True):
            chosen[name] = one
    return with_reductions(spec, {block: Component(reduction, **chosen) for block, chosen in zip(blocks, of_blocks, strict=True)})


def _evit_step(spec: ArchSpec, step: int, seed: int) -> ArchSpec:
    return placed(spec, "evit", keep=round(1 - step / 100, 2))


def _gtp_step(spec: ArchSpec, step: int, seed: int) -> ArchSpec:
    return placed(spec, "gtp", P=step)


def _mctf_step(spec: ArchSpec, step: int, seed: int) -> ArchSpec:
    return placed(spec, "mctf", r=step)


def _diffrate_step(spec: ArchSpec, step: int, seed: int) -> ArchSpec:
    """`step` tokens fewer in every block but the first, half of them pruned and the others merged."""
    merge_to = [_entering(spec).num_tokens - step * block for block in range(spec.depth)]
    prune_to = [merge_to[0], *(before - step // 2 for before in merge_to[:-1])]
    return placed(spec, "diffrate", prune_to=prune_to, merge_to=merge_to)


def _random_drop_step(spec: ArchSpec, step: int, seed: int) -> ArchSpec:
    """`step` patches fewer after the last block, spread evenly over all blocks, the first ones taking what is left over."""
    each, left_over = divmod(step, spec.depth)
    dropped = accumulate(each + (block < left_over) for block in range(spec.depth))
    return placed(spec, "random_drop", num_kept=[_entering(spec).num_patches - n for n in dropped], seed=seed)


REDUCERS: Mapping[str, Callable[[ArchSpec, int, int], ArchSpec]] = {
    "evit": _evit_step,
    "gtp": _gtp_step,
    "diffrate": _diffrate_step,
    "mctf": _mctf_step,
    "random_drop": _random_drop_step,
}
"""By name, the network that is reduced by a number of steps, from 1, with a seed for what is drawn."""


def reduced_within(spec: ArchSpec, reducer: str, max_macs: int, *, seed: int = 0) -> ArchSpec:
    """The network reduced by as few steps of `reducer` as bring what fvcore counts, the choosing of tokens included, to `max_macs`.

    Raises SpecError saying why no step does.
    """
    what = f"{reducer} cannot bring this network to {max_macs / 1e9:.4g} GMAC"
    step = 1
    while True:
        try:
            reduced = REDUCERS[reducer](spec, step, seed)
            spent = cost(reduced).fvcore_macs
        except SpecError as error:
            raise SpecError(f"{what}: {error}") from error
        if spent <= max_macs:
            return reduced
        if step > _entering(spec).num_patches * spec.depth:
            raise SpecError(f"{what}: it stops at {spent / 1e9:.4g}")
        step += 1


def narrower_within(spec: ArchSpec, max_macs: int) -> ArchSpec:
    """The widest network of the same depth and number of heads within `max_macs`, as `reduced_within` counts, one stage alone.

    Widths of heads and feed-forwards shrink with the width of the tokens. Raises SpecError if there is none.
    """
    (stage,) = spec.stages
    for embed_dim in range(stage.embed_dim - 1, 0, -1):
        blocks = tuple(_narrower(block, embed_dim / stage.embed_dim) for block in stage.blocks)
        narrower = replace(spec, stages=(replace(stage, embed_dim=embed_dim, blocks=blocks),))
        try:
            if cost(narrower).fvcore_macs <= max_macs:
                return narrower
        except SpecError:
            # A width that some part does not take.
            continue
    raise SpecError(f"no narrower network costs at most {max_macs / 1e9:.4g} GMAC")


def _narrower(block: BlockSpec, share: float) -> BlockSpec:
    def scaled(kind: str, part: Component, *widths: str) -> Component:
        chosen = full_choices(kind, part)
        return Component(part.name, **chosen | {name: max(1, round(share * int(chosen[name]))) for name in widths if name in chosen})

    mixer, feed_forward = scaled("mixer", block.mixer, "head_dim"), scaled("feed_forward", block.feed_forward, "hidden_dim")
    return replace(block, mixer=mixer, feed_forward=feed_forward)


def _entering(spec: ArchSpec) -> TokenShape:
    """The tokens that enter the first block."""
    shape = next(part.shape for part in layout(spec) if part.path == "stages.0.blocks.0.norm1")
    assert isinstance(shape, TokenShape)
    return shape
