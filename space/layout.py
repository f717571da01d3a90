"""The parts of a spec in the order of the forward pass, each with the shape that reaches it.

`cost` sums over them and `build` makes modules of them, so what is counted is what is built.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import Any, NamedTuple

from space.component import AttentionTap, BlockForm, Cost, ImageShape, LinearMaps, TokenShape, components, declaration
from space.registry import ImageSizeError, SpecError
from space.spec import ArchSpec, BlockSpec, Component, full_choices, with_img_size

TWO_RESIDUALS = ("norm1", "mixer", "layer_scale1", "token_reduction", "norm2", "feed_forward", "layer_scale2")
"""The parts of a block that has no form of its own, in their order."""

KEEPS_COUNT = frozenset({"mixer", "token_reduction", "downsampling", "pooling"})
"""The kinds that must know how many tokens each token stands for."""

MOST_STRIDE = 256
"""Pixels along the side of a token of the last stage, at most, where an image size that fits is looked for."""


class Part(NamedTuple):
    """One component in its place: `path` is its module's name in the built network.

    `tap` is the attention that a mixer must give beside its tokens, for the token reduction after it. `counted` is its cost where the form
    of its block makes it another than that on `shape`.
    """

    path: str
    kind: str
    component: Component
    shape: ImageShape | TokenShape
    output_shape: TokenShape
    out_dim: int | None = None
    tap: AttentionTap = AttentionTap.NONE
    counted: Cost | None = None

    @property
    def module_class(self) -> Any:
        return components.get(self.kind, self.component.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords its class and its `cost` take beside the shape."""
        width = {} if self.out_dim is None else {"out_dim": self.out_dim}
        return full_choices(self.kind, self.component) | width

    def module(self) -> Any:
        """A new module of it, with the weights that its class draws from torch's global generator."""
        return self.module_class(self.shape, **self.arguments)


@dataclass(frozen=True, kw_only=True, eq=False)
class Group:
    """Parts that stand together, a block's or a single one, with paths relative to the group, and their summed cost.

    `form` is that of a block; None is two residuals. A group is equal to itself alone, which makes it a cheap key of a cache.
    """

    parts: tuple[Part, ...]
    output_shape: TokenShape
    cost: Cost
    form: BlockForm | None = None

    @cached_property
    def linear_maps(self) -> LinearMaps:
        """The weight matrices of the mixers and feed-forwards in it; raises SpecError for one that declares none."""
        maps: list[tuple[int, int, int]] = []
        for part in self.parts:
            if part.kind in ("mixer", "feed_forward"):
                declared = getattr(part.module_class, "linear_maps", None)
                if declared is None:
                    raise SpecError(f"{part.kind} {part.component.name!r} declares no linear maps")
                maps += declared(part.shape, **part.arguments)
        return tuple(maps)


def layout(spec: ArchSpec) -> tuple[Part, ...]:
    """Every part of the network; raises SpecError naming the part that cannot be built."""
    return tuple(part._replace(path=prefix + part.path) for prefix, group in groups(spec) for part in group.parts)


def groups(spec: ArchSpec) -> Iterator[tuple[str, Group]]:
    """The groups of parts in the order of the forward pass, each with the prefix of its paths.

    Groups are shared by all specs that hold them, which is what makes `cost` fast. Raises SpecError naming the part that cannot be built,
    and the nearest image sizes if that is why.
    """
    try:
        yield from _groups(spec)
    except ImageSizeError as error:
        raise SpecError(f"{error}; {_sizes_that_fit(spec)}") from error


def _sizes_that_fit(spec: ArchSpec) -> str:
    """The nearest smaller and larger image sizes of the network, for an error."""

    def fits(img_size: int) -> bool:
        try:
            return bool(list(_groups(with_img_size(spec, img_size))))
        except SpecError:
            return False

    ways = (range(spec.img_size - 1, 0, -1), range(spec.img_size + 1, 2 * spec.img_size + MOST_STRIDE))
    nearest = [str(size) for way in ways if (size := next(filter(fits, way), None))]
    return f"nearest img_size: {' or '.join(nearest)}" if nearest else f"no img_size near {spec.img_size} fits"


def _groups(spec: ArchSpec) -> Iterator[tuple[str, Group]]:
    group = _part_group("patch_embed", "patch_embed", spec.patch_embed, _image_shape(spec), spec.stages[0].embed_dim)
    yield "", group
    for kind, component in (("prefix", spec.prefix), ("position", spec.position)):
        if component is not None:
            group = _part_group(kind, kind, component, group.output_shape, None)
            yield "", group
    for index, stage in enumerate(spec.stages):
        place: Callable[[BlockSpec], Group] | None = None
        shape = before = None
        for where, block in zip(_block_paths(index, len(stage.blocks)), stage.blocks, strict=True):
            # Most blocks take the shape of the one before, many repeat that block, and comparisons are cheaper than look-ups.
            if place is None or group.output_shape is not shape:
                shape, before = group.output_shape, None
                place = _placing(spec.norm, shape)
            if block is not before:
                before = block
                try:
                    group = place(block)
                except SpecError as error:
                    raise type(error)(f"{where}{error}") from error
            yield where, group
        if stage.downsampling is not None:
            where = f"stages.{index}.downsampling"
            group = _part_group(where, "downsampling", stage.downsampling, group.output_shape, spec.stages[index + 1].embed_dim)
            yield "", group
    for kind, component, out_dim in (("norm", spec.norm, None), ("pooling", spec.pooling, None), ("head", spec.head, spec.num_classes)):
        group = _part_group(kind, kind, component, group.output_shape, out_dim)
        yield "", group


def part_cost(part: Part) -> Cost:
    """The exact counts of one part, for one image."""
    if part.counted is not None:
        return part.counted
    counted = part.module_class.cost(part.shape, **part.arguments)
    return counted + part.module_class.tap_cost(part.shape, part.tap, **part.arguments) if part.tap else counted


def _block_form(block: BlockSpec) -> BlockForm | None:
    """The form that a component of the block declares. Raises SpecError if two declare different ones."""
    found: dict[str, BlockForm] = {}
    for kind in ("mixer", "token_reduction", "feed_forward"):
        component = getattr(block, kind)
        if component is not None and (form := declaration(kind, component.name).block_form) is not None:
            found[f"{kind} {component.name!r}"] = form
    if len(set(map(id, found.values()))) > 1:
        raise SpecError(f"{' and '.join(found)} need blocks of different forms and cannot stand in one")
    return next(iter(found.values()), None)


def why_no_class_row(spec: ArchSpec) -> str | None:
    """Why the network cannot give the class token's attention on the grid of patches in its last block; None if it can."""
    last = f"stages.{len(spec.stages) - 1}.blocks.{len(spec.stages[-1].blocks) - 1}."
    block = next(group for where, group in groups(spec) if where == last)
    if block.form is not None:
        return "the last block has a form of its own, which gives no attention"
    mixer = next(part for part in block.parts if part.kind == "mixer")
    assert isinstance(mixer.shape, TokenShape)
    if not mixer.shape.has_class_token:
        return "there is no class token; add the prefix 'class_token'"
    if mixer.shape.grid is None:
        return "an earlier token reduction breaks the grid of patches up"
    offered = mixer.module_class.declaration.offers_tap
    if offered < AttentionTap.CLASS_ROW:
        return f"the last mixer, {mixer.component.name!r}, offers no attention tap"
    if mixer.tap > AttentionTap.CLASS_ROW:
        return f"the token reduction of the last block reads an attention tap of level {mixer.tap.name}"
    return None


def _image_shape(spec: ArchSpec) -> ImageShape:
    return ImageShape(spec.in_chans, spec.img_size, spec.img_size)


@lru_cache(maxsize=1024)
def _block_paths(stage: int, num_blocks: int) -> tuple[str, ...]:
    return tuple(f"stages.{stage}.blocks.{number}." for number in range(num_blocks))


@lru_cache(maxsize=65536)
def _part_group(path: str, kind: str, component: Component, shape: Any, out_dim: int | None) -> Group:
    part = _place(path, kind, component, shape, out_dim)
    return Group(parts=(part,), output_shape=part.output_shape, cost=part_cost(part))


@lru_cache(maxsize=4096)
def _placing(norm: Component, shape: TokenShape) -> Callable[[BlockSpec], Group]:
    """What places a block in tokens of the shape, and keeps the groups of the blocks it has placed."""
    return lru_cache(maxsize=4096)(lambda block: _block_group(block, norm, shape))


def _block_group(block: BlockSpec, norm: Component, shape: TokenShape) -> Group:
    form = _block_form(block)
    given = {
        "norm1": ("norm", norm),
        "mixer": ("mixer", block.mixer),
        "layer_scale1": ("layer_scale", block.layer_scale),
        "token_reduction": ("token_reduction", block.token_reduction),
        "norm2": ("norm", norm),
        "feed_forward": ("feed_forward", block.feed_forward),
        "layer_scale2": ("layer_scale", block.layer_scale),
    }
    parts: dict[str, Part] = {}
    output = shape
    order = form.parts if form else TWO_RESIDUALS
    for path, (kind, component) in given.items():
        if component is not None and kind != "norm" and path not in order:
            raise SpecError(f"{path}: the form of this block has no place for {kind} {component.name!r}")
    for path in order:
        kind, component = given[path]
        if component is not None:
            parts[path] = _place(path, kind, component, output, None)
            output = parts[path].output_shape
    if block.token_reduction is not None:
        if parts["token_reduction"].output_shape == parts["token_reduction"].shape:
            # Nothing to reduce in tokens of this shape: no tap, no form of the block.
            return _placing(norm, shape)(replace(block, token_reduction=None))
        mixer, reduction = parts["mixer"].module_class.declaration, parts["token_reduction"].module_class.declaration
        if reduction.attention_tap > mixer.offers_tap:
            raise SpecError(
                f"token_reduction: {reduction.name!r} reads an attention tap of level {reduction.attention_tap.name}; "
                f"mixer {mixer.name!r} offers {mixer.offers_tap.name}"
            )
        parts["mixer"] = parts["mixer"]._replace(tap=reduction.attention_tap)
    for path, counted in (form.counted(parts) if form else {}).items():
        parts[path] = parts[path]._replace(counted=counted)
    return Group(parts=tuple(parts.values()), output_shape=output, cost=sum(map(part_cost, parts.values()), Cost()), form=form)


def _place(path: str, kind: str, component: Component, shape: Any, out_dim: int | None) -> Part:
    cls: Any = components.get(kind, component.name)
    declared = cls.declaration
    where = f"{path}: {kind} {component.name!r}"
    if declared.needs_grid and kind != "patch_embed" and shape.grid is None:
        raise SpecError(f"{where} needs the patches on a grid, but an earlier part breaks the grid up")
    if declared.needs_class_token and not shape.has_class_token:
        raise SpecError(f"{where} needs a class token; add the prefix 'class_token'")
    if kind in KEEPS_COUNT and shape.has_sizes and not declared.takes_sizes:
        raise SpecError(f"{where} takes no token sizes, which an earlier token reduction hands on")
    if kind == "token_reduction" and shape.memory not in ("", component.name):
        raise SpecError(f"{where} cannot follow {shape.memory!r}, which remembers something of every token")
    width = {} if out_dim is None else {"out_dim": out_dim}
    try:
        output = cls.output_shape(shape, **full_choices(kind, component), **width) if hasattr(cls, "output_shape") else shape
    except SpecError as error:
        raise type(error)(f"{where}: {error}") from error
    return Part(path, kind, component, shape, output, out_dim)
