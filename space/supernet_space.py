"""The space of a supernet as a value: `SupernetSpace`, the largest network and what its subnets may choose. Importing it imports no torch.

    block = BlockChoices(mixer={"num_heads": (6, 5, 4, 3)}, feed_forward={"hidden_dim": (768, 640, 512, 384)})
    stage = StageChoices(widths=(256, 224, 192), blocks=(block, replace(block, is_skippable=True)))
    space = SupernetSpace(name="mine", largest=largest, stages=(stage, ...))

A point of the space is a mapping from the names of its axes to values, in the order of the forward pass:

    embed_dim1           width of stage 1
    depth1               blocks of stage 1, if the stage declares depths: the first ones are kept
    keep1_2              whether block 2 of stage 1 is kept, if it is skippable
    num_heads1_2         a choice of the mixer or the feed-forward of block 2 of stage 1; it exists only where the block is kept

All choices stand in descending order, so the first point of the axes is the largest network. What is not chosen from is as in the largest
network, and a dimension with a single choice is no axis.

The two published forms are ViT-ResNAS (https://arxiv.org/abs/2109.00642), with skippable blocks, and AutoFormer
(https://arxiv.org/abs/2107.00651), with depths.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from space.component import Scalar, declaration
from space.cost import cost
from space.layout import layout
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, digest_of, full_choices
from space.subnet_spec import SubnetSpec

PARTS = ("mixer", "feed_forward")
"""The parts of a block whose choices a space may offer."""
SKIPPED, UNCHANGED = "-", "+"
"""In the notation of a subnet: a block that is left out, and one without choices."""

Values = tuple[int, ...] | tuple[float, ...]
Sizes = tuple[tuple[str, int], ...]
"""What the choices of one part of a block are set to, by name."""


@dataclass(frozen=True, kw_only=True)
class BlockChoices:
    """What a block may choose: for its mixer and its feed-forward, by the name of a whole-number choice, the values.

    Real numbers are multiples of the stage's width, rounded down: `{"hidden_dim": (4.0, 3.5)}` are feed-forward ratios. A skippable block
    may be left out. Names are stored in alphabetical order, values in descending order. Raises SpecError for no values, equal ones, and
    ones that are not above 0.
    """

    mixer: Mapping[str, Values] = field(default_factory=dict, hash=False)
    feed_forward: Mapping[str, Values] = field(default_factory=dict, hash=False)
    is_skippable: bool = False

    def __post_init__(self) -> None:
        for part in PARTS:
            given = getattr(self, part)
            if not isinstance(given, Mapping):
                raise SpecError(f"{part} is {given!r}; the values of each choice by its name are expected")
            in_order = {name: _descending(given[name], f"{part} {name}", (int, float)) for name in sorted(given)}
            object.__setattr__(self, part, in_order)
        if shared := self.mixer.keys() & self.feed_forward.keys():
            raise SpecError(f"mixer and feed_forward both have a choice {', '.join(sorted(shared))}; a name may stand for one axis only")
        if type(self.is_skippable) is not bool:
            raise SpecError(f"is_skippable is {self.is_skippable!r}; allowed: true, false")

    @property
    def values(self) -> dict[str, Values]:
        """The values of every choice, the mixer's first."""
        return {**self.mixer, **self.feed_forward}


@dataclass(frozen=True, kw_only=True)
class StageChoices:
    """The widths of a stage, and the choices of each of the supernet's blocks in it.

    A stage that declares `depths` keeps its first blocks, as many as its depth; otherwise the skippable blocks may be left out one by
    one. Raises SpecError for no widths, for depths beside skippable blocks, and for a stage that may lose all its blocks.
    """

    widths: tuple[int, ...]
    blocks: tuple[BlockChoices, ...]
    depths: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "widths", _descending(self.widths, "widths", (int,)))
        object.__setattr__(self, "blocks", tuple(self.blocks))
        if self.depths is None:
            if all(block.is_skippable for block in self.blocks):
                raise SpecError("every block is skippable; a stage needs a block that stays")
            return
        object.__setattr__(self, "depths", _descending(self.depths, "depths", (int,)))
        if self.depths[0] != len(self.blocks):
            raise SpecError(f"depths has {self.depths[0]} as the largest; it must be the number of blocks, {len(self.blocks)}")
        if any(block.is_skippable for block in self.blocks):
            raise SpecError("depths beside skippable blocks; a stage has one way to lose blocks")


@dataclass(frozen=True, kw_only=True)
class SupernetSpace:
    """All subnets of `largest` that the choices of its stages allow.

    Raises SpecError where a stage or a block of `largest` has no choices declared, where the largest value of a dimension is not that of
    `largest`, and where a part of the network cannot be built at a width or with a value: the message names the part.
    """

    name: str
    largest: ArchSpec
    stages: tuple[StageChoices, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if len(self.stages) != len(self.largest.stages):
            raise SpecError(f"{len(self.stages)} stages of choices; the largest network has {len(self.largest.stages)}")
        for index, (choices, stage) in enumerate(zip(self.stages, self.largest.stages, strict=True)):
            _check_stage(f"stages[{index}]", choices, stage)
        _check_networks(self)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The decisions in the order of the forward pass, each with its choices in descending order."""
        return tuple(self._axes())

    def _axes(self) -> Iterator[Axis]:
        for number, stage in enumerate(self.stages, 1):
            yield from _axis(f"embed_dim{number}", stage.widths)
            if stage.depths is not None:
                yield from _axis(f"depth{number}", stage.depths)
            for block, choices in enumerate(stage.blocks, 1):
                when: tuple[str, Scalar | tuple[Scalar, ...]] | None = None
                if choices.is_skippable:
                    when = (f"keep{number}_{block}", True)
                    yield Axis(name=when[0], choices=(True, False))
                elif stage.depths is not None and block > stage.depths[-1]:
                    when = (f"depth{number}", tuple(depth for depth in stage.depths if depth >= block))
                for name, values in choices.values.items():
                    yield from _axis(f"{name}{number}_{block}", values, when)

    def canonical(self, point: Mapping[str, Scalar]) -> dict[str, Scalar]:
        """The point without the genes of blocks that it leaves out: equal for equal subnets.

        Raises SpecError for a missing gene, a value that is not allowed, and a name that is no axis.
        """
        if unknown := [name for name in point if name not in self._axes_by_name]:
            raise unknown_name("axis", unknown[0], self._axes_by_name, f"space {self.name!r}")
        genes: dict[str, Scalar] = {}
        for axis in self.axes:
            if axis.is_active(genes):
                assert isinstance(axis.choices, tuple)
                if axis.name not in point or point[axis.name] not in axis.choices:
                    allowed = ", ".join(map(str, axis.choices))
                    raise SpecError(f"space {self.name!r}: {axis.name} is {point.get(axis.name)!r}; allowed: {allowed}")
                genes[axis.name] = axis.choices[axis.choices.index(point[axis.name])]
        return genes

    @cached_property
    def _axes_by_name(self) -> dict[str, Axis]:
        return {axis.name: axis for axis in self.axes}

    def subnet(self, point: Mapping[str, Scalar]) -> SubnetSpec:
        """The subnet at a point; genes of blocks that are left out change nothing. Raises SpecError as `canonical` does."""
        genes = self.canonical(point)
        stages, kept = [], []
        for number, (choices, stage) in enumerate(zip(self.stages, self.largest.stages, strict=True), 1):
            width = int(genes.get(f"embed_dim{number}", choices.widths[0]))
            origins = self._kept(genes, number, choices)
            blocks = tuple(_block(stage.blocks[origin], *self._sizes(genes, number, origin, width)) for origin in origins)
            stages.append(replace(stage, embed_dim=width, blocks=blocks))
            kept.append(origins)
        return SubnetSpec(supernet=self.largest, arch=replace(self.largest, stages=tuple(stages)), kept=tuple(kept))

    @staticmethod
    def _kept(genes: Mapping[str, Scalar], number: int, choices: StageChoices) -> tuple[int, ...]:
        """The numbers, from 0, of the blocks that stage `number` keeps."""
        depth = int(genes.get(f"depth{number}", len(choices.blocks)))
        return tuple(block for block in range(depth) if genes.get(f"keep{number}_{block + 1}", True))

    def _values(self, genes: Mapping[str, Scalar], number: int, block: int, part: str) -> dict[str, Any]:
        """The values of the choices of one part of a block that is kept."""
        choices: Mapping[str, Values] = getattr(self.stages[number - 1].blocks[block], part)
        return {name: genes.get(f"{name}{number}_{block + 1}", values[0]) for name, values in choices.items()}

    def _sizes(self, genes: Mapping[str, Scalar], number: int, block: int, width: int) -> Iterator[Sizes]:
        """The same values of each part as its component takes them."""
        for part in PARTS:
            yield tuple((name, _in_channels(value, width)) for name, value in self._values(genes, number, block, part).items())

    def point(self, subnet: SubnetSpec) -> dict[str, Scalar]:
        """The point of a subnet of this space, canonical; raises SpecError for any other."""
        if subnet.supernet != self.largest:
            raise SpecError(f"the subnet is cut out of another network than the largest of space {self.name!r}")
        genes: dict[str, Scalar] = {}
        for number, (choices, stage) in enumerate(zip(self.stages, subnet.arch.stages, strict=True), 1):
            kept = subnet.kept[number - 1]
            genes[f"embed_dim{number}"] = stage.embed_dim
            genes[f"depth{number}"] = len(kept)
            genes |= {f"keep{number}_{origin + 1}": origin in kept for origin in range(len(choices.blocks))}
            for block, origin in zip(stage.blocks, kept, strict=True):
                for part in PARTS:
                    built = full_choices(part, getattr(block, part))
                    for name, values in getattr(choices.blocks[origin], part).items():
                        found = [value for value in values if _in_channels(value, stage.embed_dim) == built[name]]
                        genes[f"{name}{number}_{origin + 1}"] = found[0] if found else built[name]
        point = self.canonical({name: value for name, value in genes.items() if name in self._axes_by_name})
        if self.subnet(point) != subnet:
            raise SpecError(f"the subnet differs from every network of space {self.name!r}; the nearest point is {self.label(point)}")
        return point

    def search_space(self) -> SearchSpace:
        """The space for any strategy: its candidates are subnets, labelled in the notation of `label`."""

        def decode(point: Mapping[str, Any]) -> Candidate:
            return Candidate(model=self.subnet(point), label=self.label(point))

        return SearchSpace(name=self.name, axes=self.axes, decode=decode)

    def label(self, point: Mapping[str, Scalar]) -> str:
        """The subnet in one word that `read` takes: `224,6x768,-,5x640|448,...`.

        A field for each stage, with bars between them: its width, then each block's values in the order of its choices. `-` is a
        skippable block that is left out, and `+` a block without choices.
        """
        genes = self.canonical(point)
        stages = []
        for number, choices in enumerate(self.stages, 1):
            kept = self._kept(genes, number, choices)
            words = [str(genes.get(f"embed_dim{number}", choices.widths[0]))]
            for block in range(max(kept) + 1 if choices.depths else len(choices.blocks)):
                values = [f"{value:g}" for part in PARTS for value in self._values(genes, number, block, part).values()]
                words.append(("x".join(values) or UNCHANGED) if block in kept else SKIPPED)
            stages.append(",".join(words))
        return "|".join(stages)

    def read(self, text: str) -> dict[str, Scalar]:
        """The point of a subnet in the notation of `label`; raises SpecError naming the field and what is allowed there."""
        where = f"subnet string of {self.name}"
        stages = read_stages(text, where)
        if len(stages) != len(self.stages):
            raise SpecError(f"{where}: {text!r} has {len(stages)} stages between bars; {len(self.stages)} are needed")
        genes: dict[str, Scalar] = {}
        for number, (choices, (width, blocks)) in enumerate(zip(self.stages, stages, strict=True), 1):
            depths = choices.depths or (len(choices.blocks),)
            if len(blocks) not in depths:
                raise SpecError(f"{where}: stage {number} has {len(blocks)} blocks; allowed: {', '.join(map(str, depths))}")
            _check_value(width, choices.widths, f"{where}: width of stage {number}")
            genes |= {f"embed_dim{number}": width, f"depth{number}": len(blocks)}
            for block, (values, block_choices) in enumerate(zip(blocks, choices.blocks, strict=False), 1):
                genes |= _block_genes(values, block_choices, f"{number}_{block}", f"{where}: block {block} of stage {number}")
        return self.canonical({name: value for name, value in genes.items() if name in self._axes_by_name})

    def explain(self, point: Mapping[str, Scalar]) -> tuple[str, ...]:
        """The label in words of at most 80 characters a line, a line for each stage."""
        genes = self.canonical(point)
        lines = [f"subnet of {self.name}, stage by stage:"]
        for number, choices in enumerate(self.stages, 1):
            names = " x ".join(dict.fromkeys(name for block in choices.blocks for name in block.values)) or "nothing"
            width = genes.get(f"embed_dim{number}", choices.widths[0])
            num_kept = len(self._kept(genes, number, choices))
            lines.append(f"{number}: {width} wide, {num_kept} of {len(choices.blocks)} blocks; chosen in each: {names}")
        return tuple(lines)

    @property
    def num_networks(self) -> int:
        """How many subnets there are, exactly; two that keep different blocks are two, whatever their shapes."""
        return math.prod(map(_num_in_stage, self.stages))

    @property
    def largest_point(self) -> dict[str, Scalar]:
        """The point of the largest network."""
        return self._extreme(0)

    @property
    def smallest_point(self) -> dict[str, Scalar]:
        """The point with the smallest value of every axis and without skippable blocks."""
        return self._extreme(-1)

    def _extreme(self, place: int) -> dict[str, Scalar]:
        return self.canonical({axis.name: axis.choices[place] for axis in self.axes if isinstance(axis.choices, tuple)})

    @cached_property
    def macs_range(self) -> tuple[int, int]:
        """Multiply-adds of the smallest and of the largest subnet, for one image."""
        return cost(self.subnet(self.smallest_point)).macs, cost(self.largest).macs

    def resized(self, *, img_size: int | None = None, num_classes: int | None = None) -> SupernetSpace:
        """The same choices for other images or classes; None leaves them as they are. Raises SpecError for a size that does not fit."""
        given = {"img_size": img_size, "num_classes": num_classes}
        changes = {name: value for name, value in given.items() if value is not None and value != getattr(self.largest, name)}
        return replace(self, largest=replace(self.largest, **changes)) if changes else self

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object: values in descending order, defaults left out."""
        return {"name": self.name, "largest": self.largest.to_json(), "stages": [_stage_json(stage) for stage in self.stages]}

    @classmethod
    def from_json(cls, data: Any) -> SupernetSpace:
        """The space of `to_json`'s object; raises SpecError saying which field is wrong."""
        given = _object(data, cls, "space")
        if not isinstance(given["name"], str) or not given["name"]:
            raise SpecError(f"space.name is {given['name']!r}; a name is expected")
        try:
            largest = ArchSpec.from_json(given["largest"])
        except SpecError as error:
            raise SpecError(f"space.largest: {error}") from error
        stages = [_stage_from_json(stage, f"space.stages[{index}]") for index, stage in enumerate(_list(given["stages"], "space.stages"))]
        return _made(cls, "space", name=given["name"], largest=largest, stages=tuple(stages))

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())


def read_space(path: Path) -> SupernetSpace:
    """The space in a JSON file; raises SpecError naming the file and what is wrong in it."""
    try:
        return SupernetSpace.from_json(json.loads(path.read_text()))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error


Block = tuple[float, ...] | None
"""The values of a block as they are written, None for one that is left out."""


def read_stages(text: str, where: str) -> list[tuple[int, list[Block]]]:
    """Width and blocks of each stage of a string such as `176,3x704,-,4x576|352,...`; raises SpecError naming the field that is wrong."""
    stages: list[tuple[int, list[Block]]] = []
    for number, stage in enumerate(text.strip().split("|"), 1):
        width, *blocks = (word.strip() for word in stage.split(","))
        if not re.fullmatch(r"[1-9][0-9]{0,5}", width):
            raise SpecError(f"{where}: width of stage {number} is {width!r}; a whole number above 0 is expected")
        if not blocks:
            raise SpecError(f"{where}: stage {number} is {stage!r}; its blocks are expected behind the width, as in 176,3x704,4x576")
        places = (f"{where}: block {block} of stage {number}" for block in range(1, len(blocks) + 1))
        stages.append((int(width), list(map(_read_block, blocks, places))))
    return stages


def _read_block(word: str, where: str) -> Block:
    if word == SKIPPED:
        return None
    if word == UNCHANGED:
        return ()
    if not re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?(x[0-9]{1,6}(\.[0-9]{1,6})?)*", word):
        raise SpecError(f"{where} is {word!r}; allowed: numbers with x between them, as in 3x704, or {SKIPPED} for no block")
    return tuple(float(value) if "." in value else int(value) for value in word.split("x"))


def _block_genes(values: Block, choices: BlockChoices, place: str, where: str) -> dict[str, Scalar]:
    if values is None:
        if not choices.is_skippable:
            raise SpecError(f"{where} is {SKIPPED!r}; it cannot be left out")
        return {f"keep{place}": False}
    offered = choices.values
    if len(values) != len(offered):
        form = "x".join(offered) or UNCHANGED
        raise SpecError(f"{where} is {'x'.join(map(str, values)) or UNCHANGED!r}; {form} is expected")
    for value, (name, allowed) in zip(values, offered.items(), strict=True):
        _check_value(value, allowed, f"{where}: {name}")
    return {f"keep{place}": True, **{f"{name}{place}": value for name, value in zip(offered, values, strict=True)}}


def _check_value(value: float, allowed: Values, where: str) -> None:
    if value not in allowed:
        raise SpecError(f"{where} is {value:g}; allowed: {', '.join(f'{each:g}' for each in allowed)}")


def _descending(values: Any, where: str, types: tuple[type, ...]) -> Any:
    """The values, the largest first; raises SpecError unless they are distinct numbers of one of the types, above 0."""
    if not isinstance(values, Sequence) or isinstance(values, str) or not values:
        raise SpecError(f"{where} is {values!r}; a list of at least one value is expected")
    if type(values[0]) not in types or any(type(value) is not type(values[0]) or not 0 < value < math.inf for value in values):
        meaning = "whole numbers" if types == (int,) else "all whole or all real numbers,"
        raise SpecError(f"{where} is {list(values)}; allowed: {meaning} above 0")
    if len(set(values)) != len(values):
        raise SpecError(f"{where} is {list(values)}; a value stands there twice")
    return tuple(sorted(values, reverse=True))


def _in_channels(value: float, width: int) -> int:
    """A value as a component takes it: a whole number, or a multiple of the width rounded down."""
    return value if isinstance(value, int) else int(width * value)


def _axis(name: str, values: Sequence[float], when: Any = None) -> Iterator[Axis]:
    if len(values) > 1:
        yield Axis(name=name, choices=tuple(values), when=when)


def _num_in_stage(choices: StageChoices) -> int:
    per_block = [math.prod(map(len, block.values.values())) for block in choices.blocks]
    if choices.depths is not None:
        return len(choices.widths) * sum(math.prod(per_block[:depth]) for depth in choices.depths)
    return len(choices.widths) * math.prod(number + block.is_skippable for number, block in zip(per_block, choices.blocks, strict=True))


@lru_cache(maxsize=65536)
def _block(largest: BlockSpec, mixer: Sizes, feed_forward: Sizes) -> BlockSpec:
    def narrowed(part: Component, sizes: Sizes) -> Component:
        return Component(part.name, **part.choices | dict(sizes))

    return replace(largest, mixer=narrowed(largest.mixer, mixer), feed_forward=narrowed(largest.feed_forward, feed_forward))


def _check_stage(where: str, choices: StageChoices, stage: StageSpec) -> None:
    if choices.widths[0] != stage.embed_dim:
        raise SpecError(f"{where}: the largest of widths is {choices.widths[0]}; it must be the largest network's, {stage.embed_dim}")
    if len(choices.blocks) != len(stage.blocks):
        raise SpecError(f"{where}: {len(choices.blocks)} blocks of choices; the largest network has {len(stage.blocks)} there")
    for number, (block_choices, block) in enumerate(zip(choices.blocks, stage.blocks, strict=True)):
        for part in PARTS:
            built = full_choices(part, getattr(block, part))
            place = f"{where}.blocks[{number}]: {part} {getattr(block, part).name!r}"
            for name, values in getattr(block_choices, part).items():
                if type(built.get(name)) is not int:
                    numbers = ", ".join(choice for choice, value in built.items() if type(value) is int)
                    raise SpecError(f"{place} has no whole-number choice {name!r}; it has: {numbers or 'none'}")
                if len(values) > 1 and not declaration(part, getattr(block, part).name).choices[name].is_sliced:
                    raise SpecError(f"{place}: {name} cannot be chosen: with another one the entries of a shared tensor mean other things")
                if _in_channels(values[0], stage.embed_dim) != built[name]:
                    most = f"{_in_channels(values[0], stage.embed_dim)}; it must be the largest network's, {built[name]}"
                    raise SpecError(f"{place}: the largest {name} is {most}")
                for width in choices.widths:
                    in_channels = [_in_channels(value, width) for value in values]
                    if len(set(in_channels)) != len(values) or 0 in in_channels:
                        raise SpecError(f"{place}: {name} {list(values)} is {in_channels} at width {width}; distinct sizes are needed")


def _check_networks(space: SupernetSpace) -> None:
    """Lay out every width beside every width of the next stage, and every value of a block at every width: all else is the largest."""
    layout(space.largest)
    largest = space.largest_point

    def check(genes: Mapping[str, Scalar], where: str) -> None:
        # What is no axis has one value.
        moved = {name: value for name, value in genes.items() if name in largest}
        try:
            layout(space.subnet(largest | moved).arch)
        except SpecError as error:
            raise SpecError(f"{where}: {error}") from error

    for index, (choices, stage) in enumerate(zip(space.stages, space.largest.stages, strict=True)):
        following = space.stages[index + 1].widths if index + 1 < len(space.stages) else (0,)
        for width in choices.widths:
            at_width, where = {f"embed_dim{index + 1}": width}, f"stages[{index}]: width {width}"
            for next_width in following:
                check({**at_width, f"embed_dim{index + 2}": next_width}, where)
            for number, block in _distinct_blocks(choices, stage):
                for name, values in block.values.items():
                    for value in values:
                        check({**at_width, f"{name}{index + 1}_{number}": value}, f"{where}: {name} {value:g}")


def _distinct_blocks(choices: StageChoices, stage: StageSpec) -> list[tuple[int, BlockChoices]]:
    """The first of the blocks that are equal and have equal choices, numbered from 1."""
    distinct: dict[tuple[BlockSpec, str], tuple[int, BlockChoices]] = {}
    for number, (block_choices, block) in enumerate(zip(choices.blocks, stage.blocks, strict=True), 1):
        distinct.setdefault((block, str(block_choices.values)), (number, block_choices))
    return list(distinct.values())


def _stage_json(stage: StageChoices) -> dict[str, Any]:
    depths = {} if stage.depths is None else {"depths": list(stage.depths)}
    return {"widths": list(stage.widths), **depths, "blocks": [_block_json(block) for block in stage.blocks]}


def _block_json(block: BlockChoices) -> dict[str, Any]:
    parts = {part: {name: list(values) for name, values in getattr(block, part).items()} for part in PARTS if getattr(block, part)}
    return {**parts, **({"is_skippable": True} if block.is_skippable else {})}


def _stage_from_json(data: Any, where: str) -> StageChoices:
    given = _object(data, StageChoices, where)
    blocks = []
    for number, block in enumerate(_list(given["blocks"], f"{where}.blocks")):
        place = f"{where}.blocks[{number}]"
        blocks.append(_made(BlockChoices, place, **_object(block, BlockChoices, place)))
    return _made(StageChoices, where, **{**given, "blocks": tuple(blocks)})


def _object(data: Any, cls: type, where: str) -> dict[str, Any]:
    """The fields of `cls` in a JSON object; raises SpecError for one that is unknown or missing."""
    if not isinstance(data, Mapping):
        raise SpecError(f"{where} is {data!r}; an object is expected")
    known = [each.name for each in fields(cls)]
    for name in data:
        if name not in known:
            raise unknown_name("field", name, known, where)
    required = {SupernetSpace: ("name", "largest", "stages"), StageChoices: ("widths", "blocks"), BlockChoices: ()}[cls]
    if missing := [name for name in required if name not in data]:
        raise SpecError(f"{where} lacks {', '.join(missing)}")
    return dict(data)


def _list(data: Any, where: str) -> list[Any]:
    if not isinstance(data, list):
        raise SpecError(f"{where} is {data!r}; a list is expected")
    return data


def _made(cls: Callable[..., Any], where: str, **values: Any) -> Any:
    try:
        return cls(**values)
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
