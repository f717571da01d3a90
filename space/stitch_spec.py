"""A stitch as a value: `StitchSpec`, a route over the blocks of two or more anchors. Importing it imports no torch.

Stitchable Neural Networks, https://arxiv.org/abs/2302.06586; SN-Netv2: Stitched ViTs are Flexible Vision Backbones,
https://arxiv.org/abs/2307.00154.

An image is embedded by the anchor of the first segment. Where a route leaves one anchor for another, an affine map of every token, the
stitch, leads from the width of the one to the width of the other. The anchor of the last segment classifies. With its stitches folded
such a network is an ordinary one, `StitchSpec.folded`: a segment is a stage, a stitch is the downsampling `linear`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple

from space.component import TokenShape
from space.layout import layout
from space.registry import SpecError, unknown_name
from space.spec import ArchSpec, Component, StageSpec, digest_of

SIZES = {"tiny": "T", "small": "S", "base": "B", "medium": "M", "large": "L", "huge": "H"}
"""The letter of an anchor whose name holds such a word."""

_SEGMENT = re.compile(r"([A-Z])(\d+)(?:-(\d+))?")
_FIELDS = ("anchors", "route")


class Segment(NamedTuple):
    """Consecutive blocks `first` to `last`, both included, of one anchor; anchors and blocks are counted from 0."""

    anchor: int
    first: int
    last: int


Route = tuple[Segment, ...]


class Connection(NamedTuple):
    """Where a stitch stands: behind a block of one anchor, before a block of another."""

    from_anchor: int
    from_block: int
    to_anchor: int
    to_block: int


def connections(route: Route) -> tuple[Connection, ...]:
    """The stitches of a route in its order, one less than segments."""
    return tuple(Connection(one.anchor, one.last, other.anchor, other.first) for one, other in pairwise(route))


Step = tuple[Any, ...]
"""`("embed", anchor)`, `("block", anchor, block)`, `("stitch", *connection)` or `("classify", anchor)`."""


def steps(route: Route) -> tuple[Step, ...]:
    """What an image runs through, in order; two routes run the same work as long as their steps are equal."""
    taken: list[Step] = [("embed", route[0].anchor)]
    for segment, stitch in zip(route, (None, *connections(route)), strict=True):
        taken += [("stitch", *stitch)] if stitch else []
        taken += [("block", segment.anchor, block) for block in range(segment.first, segment.last + 1)]
    return (*taken, ("classify", route[-1].anchor))


@dataclass(frozen=True, kw_only=True)
class StitchSpec:
    """The network that runs `route` over `anchors`, from the smallest to the largest.

    Anchors are networks of our components with one stage, equal images, classes and norm, and equal tokens but for their width. Raises
    SpecError where this does not hold, or where a segment is not of its anchor.
    """

    kind: ClassVar[str] = "stitch"

    anchors: tuple[ArchSpec, ...]
    route: Route

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchors", tuple(self.anchors))
        check_anchors(self.anchors)
        object.__setattr__(self, "route", _checked_route(self.route, self.anchors))

    @property
    def img_size(self) -> int:
        return self.anchors[0].img_size

    @property
    def in_chans(self) -> int:
        return self.anchors[0].in_chans

    @property
    def num_classes(self) -> int:
        return self.anchors[0].num_classes

    @cached_property
    def folded(self) -> ArchSpec:
        """The same network on its own: what is counted, built and exported."""
        first, last = self.anchors[self.route[0].anchor], self.anchors[self.route[-1].anchor]
        stages = [
            StageSpec(
                embed_dim=self.anchors[segment.anchor].stages[0].embed_dim,
                blocks=self.anchors[segment.anchor].stages[0].blocks[segment.first : segment.last + 1],
                downsampling=Component("linear") if number < len(self.route) - 1 else None,
            )
            for number, segment in enumerate(self.route)
        ]
        return replace(first, stages=tuple(stages), norm=last.norm, pooling=last.pooling, head=last.head)

    @property
    def digest(self) -> str:
        """16 hex digits of the canonical JSON's SHA-256."""
        return digest_of(self.to_json())

    def to_json(self) -> dict[str, Any]:
        """The canonical JSON object, which holds the anchors whole."""
        return {"model": self.kind, "anchors": [anchor.to_json() for anchor in self.anchors], "route": [list(part) for part in self.route]}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StitchSpec:
        """The spec of `to_json`'s object; raises SpecError saying which field is wrong."""
        if not isinstance(data, Mapping) or data.get("model") != cls.kind:
            raise SpecError('not the JSON of a stitch: an object with "model": "stitch" is expected')
        for name in data:
            if name not in _FIELDS and name != "model":
                raise unknown_name("field", name, _FIELDS, "stitch")
        if missing := [name for name in _FIELDS if name not in data]:
            raise SpecError(f"stitch lacks {', '.join(missing)}")
        if not isinstance(data["anchors"], list | tuple):
            raise SpecError(f"stitch.anchors is {data['anchors']!r}; a list of networks is expected")
        anchors = tuple(_anchor_from_json(anchor, number) for number, anchor in enumerate(data["anchors"]))
        try:
            return cls(anchors=anchors, route=data["route"])
        except SpecError as error:
            raise SpecError(f"stitch: {error}") from error

    def origin(self, path: str) -> tuple[int, str] | None:
        """The anchor and the path there of a module of the folded network: `stages.1.blocks.0.mixer` -> `(1, "stages.0.blocks.12.mixer")`.

        None for a stitch, which belongs to no anchor.
        """
        match path.split("."):
            case ["stages", _, "downsampling", *_]:
                return None
            case ["stages", stage, "blocks", number, *rest]:
                segment = self.route[int(stage)]
                return segment.anchor, ".".join(["stages", "0", "blocks", str(segment.first + int(number)), *rest])
            case ["patch_embed" | "prefix" | "position", *_]:
                return self.route[0].anchor, path
        return self.route[-1].anchor, path

    def stitch(self, path: str) -> Connection:
        """The connection of the stitch at a path of the folded network, `stages.0.downsampling`."""
        return connections(self.route)[int(path.split(".")[1])]


def check_anchors(anchors: Sequence[ArchSpec]) -> None:
    """Raise SpecError unless tokens of each anchor can go on in any other."""
    if len(anchors) < 2:
        raise SpecError("stitching needs two anchors at least")
    if len(set(anchors)) < len(anchors):
        raise SpecError("an anchor is given twice")
    for number, anchor in enumerate(anchors):
        if len(anchor.stages) != 1:
            raise SpecError(f"anchor {number} has {len(anchor.stages)} stages; stitches lead between networks of one stage")
        if any(block.token_reduction for block in anchor.stages[0].blocks):
            raise SpecError(f"anchor {number} reduces its tokens; those of a stitch must be as many on both sides")
    first, *others = anchors
    for number, anchor in enumerate(others, start=1):
        for name in ("img_size", "in_chans", "num_classes", "norm"):
            if getattr(anchor, name) != getattr(first, name):
                raise SpecError(
                    f"anchor {number} has {name} {getattr(anchor, name)}, anchor 0 has {getattr(first, name)}; they must be equal"
                )
    shapes = [_tokens(anchor) for anchor in anchors]
    for number, shape in enumerate(shapes):
        if shape._replace(dim=shapes[0].dim) != shapes[0]:
            raise SpecError(f"anchor {number} has {_told(shape)}, anchor 0 has {_told(shapes[0])}; stitches keep every token in its place")


def _tokens(anchor: ArchSpec) -> TokenShape:
    shape = next(part.shape for part in layout(anchor) if part.path == "norm")
    assert isinstance(shape, TokenShape)
    return shape


def _told(shape: TokenShape) -> str:
    grid = "x".join(map(str, shape.grid)) if shape.grid else f"{shape.num_patches}"
    prefix = f" and {shape.num_prefix} prefix token{'s' * (shape.num_prefix > 1)}" if shape.num_prefix else " and no prefix token"
    return f"{grid} patches{prefix}"


def _checked_route(route: Any, anchors: Sequence[ArchSpec]) -> Route:
    if not isinstance(route, tuple | list) or not route:
        raise SpecError(f"route is {route!r}; a list of segments [anchor, first block, last block] is expected")
    checked: list[Segment] = []
    for part in route:
        if not isinstance(part, tuple | list) or len(part) != 3 or any(type(value) is not int for value in part):
            raise SpecError(f"route: {part!r} is no segment [anchor, first block, last block]")
        segment = Segment(*part)
        if not 0 <= segment.anchor < len(anchors):
            raise SpecError(f"route: there is no anchor {segment.anchor}; allowed: 0 to {len(anchors) - 1}")
        depth = anchors[segment.anchor].depth
        if not 0 <= segment.first <= segment.last < depth:
            raise SpecError(
                f"route: blocks {segment.first} to {segment.last} of anchor {segment.anchor}, which has the blocks 0 to {depth - 1}"
            )
        checked.append(segment)
    if checked[0].first:
        raise SpecError(f"route starts at block {checked[0].first} of anchor {checked[0].anchor}; a network starts at block 0")
    if checked[-1].last != anchors[checked[-1].anchor].depth - 1:
        end = anchors[checked[-1].anchor].depth - 1
        raise SpecError(f"route ends at block {checked[-1].last} of anchor {checked[-1].anchor}; the classifier stands behind block {end}")
    if any(one.anchor == other.anchor for one, other in pairwise(checked)):
        raise SpecError("route: two segments in a row are of one anchor")
    return tuple(checked)


def _anchor_from_json(data: Any, number: int) -> ArchSpec:
    try:
        return ArchSpec.from_json(data)
    except SpecError as error:
        raise SpecError(f"stitch.anchors[{number}]: {error}") from error


def letters(names: Sequence[str]) -> tuple[str, ...]:
    """A letter for each anchor: that of its size (`SIZES`) if all names tell one and no two the same, else A, B, C."""
    told = [{letter for word, letter in SIZES.items() if word in name.lower()} for name in names]
    found = [next(iter(letter)) for letter in told if len(letter) == 1]
    return tuple(found) if len(set(found)) == len(names) else tuple(map(chr, range(ord("A"), ord("A") + len(names))))


def route_text(route: Route, names: Sequence[str]) -> str:
    """`S0-5>L12-23`: the blocks of each segment, counted from 0."""
    shown = letters(names)
    return ">".join(f"{shown[part.anchor]}{part.first}" + (f"-{part.last}" if part.last > part.first else "") for part in route)


def read_route(text: str, names: Sequence[str]) -> Route:
    """The route of `route_text`; raises SpecError for another text."""
    shown = letters(names)
    return tuple(_segments(text, shown))


def _segments(text: str, shown: Sequence[str]) -> Iterator[Segment]:
    for part in text.split(">"):
        found = _SEGMENT.fullmatch(part)
        if found is None or found[1] not in shown:
            known = ", ".join(shown)
            raise SpecError(f"{part!r} of the stitch {text!r} is no segment such as {shown[0]}0-5; letters of the anchors: {known}")
        first = int(found[2])
        yield Segment(shown.index(found[1]), first, first if found[3] is None else int(found[3]))
