"""The parts of a spec in the order of the forward pass, each with the shape that reaches it.

`cost` sums over them and `build` makes modules of them, so what is counted is what is built.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

from space.component import SETS_WIDTH, AttentionTap, Cost, ImageShape, TokenShape, components
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, full_choices


class Part(NamedTuple):
    """One component in its place: `path` is its module's name in the built network."""

    path: str
    kind: str
    component: Component
    shape: ImageShape | TokenShape
    output_shape: TokenShape
    out_dim: int | None = None

    @property
    def module_class(self) -> Any:
        return components.get(self.kind, self.component.name)

    @property
    def arguments(self) -> dict[str, Any]:
        """The keywords its class and its `cost` take beside the shape."""
        width = {} if self.out_dim is None else {"out_dim": self.out_dim}
        return full_choices(self.kind, self.component) | width


def layout(spec: ArchSpec) -> tuple[Part, ...]:
    """Every part of the network; raises SpecError naming the part that cannot be built."""
    parts: list[Part] = []
    shape: Any = ImageShape(spec.in_chans, spec.img_size, spec.img_size)

    def add(path: str, kind: str, component: Component | None, out_dim: int | None = None) -> None:
        nonlocal shape
        if component is not None:
            parts.append(_place(path, kind, component, shape, out_dim))
            shape = parts[-1].output_shape

    add("patch_embed", "patch_embed", spec.patch_embed, spec.stages[0].embed_dim)
    add("prefix", "prefix", spec.prefix)
    add("position", "position", spec.position)
    for index, stage in enumerate(spec.stages):
        for number, block in enumerate(stage.blocks):
            block_parts = _block_layout(block, spec.norm, shape)
            prefix = f"stages.{index}.blocks.{number}."
            parts += [part._replace(path=prefix + part.path) for part in block_parts]
            shape = block_parts[-1].output_shape
        if stage.downsampling is not None:
            add(f"stages.{index}.downsampling", "downsampling", stage.downsampling, spec.stages[index + 1].embed_dim)
    add("norm", "norm", spec.norm)
    add("pooling", "pooling", spec.pooling)
    add("head", "head", spec.head, spec.num_classes)
    return tuple(parts)


@lru_cache(maxsize=4096)
def _block_layout(block: BlockSpec, norm: Component, shape: TokenShape) -> tuple[Part, ...]:
    parts: list[Part] = []
    for path, kind, component in (
        ("norm1", "norm", norm),
        ("mixer", "mixer", block.mixer),
        ("token_reduction", "token_reduction", block.token_reduction),
        ("norm2", "norm", norm),
        ("feed_forward", "feed_forward", block.feed_forward),
    ):
        if component is not None:
            parts.append(_place(path, kind, component, shape, None))
            shape = parts[-1].output_shape
    if block.token_reduction is not None:
        mixer, reduction = parts[1].module_class.declaration, parts[2].module_class.declaration
        if reduction.attention_tap > mixer.offers_tap:
            raise SpecError(
                f"token_reduction {reduction.name!r} reads an attention tap of level {reduction.attention_tap.name}; "
                f"mixer {mixer.name!r} offers {AttentionTap(mixer.offers_tap).name}"
            )
    return tuple(parts)


@lru_cache(maxsize=65536)
def _place(path: str, kind: str, component: Component, shape: Any, out_dim: int | None) -> Part:
    cls: Any = components.get(kind, component.name)
    declared = cls.declaration
    where = f"{path}: {kind} {component.name!r}"
    if declared.needs_grid and kind != "patch_embed" and shape.grid is None:
        raise SpecError(f"{where} needs the patches on a grid, but an earlier part breaks the grid up")
    if declared.needs_class_token and not shape.has_class_token:
        raise SpecError(f"{where} needs a class token; add the prefix 'class_token'")
    arguments = full_choices(kind, component)
    if kind in SETS_WIDTH:
        arguments["out_dim"] = out_dim
    try:
        output = cls.output_shape(shape, **arguments) if hasattr(cls, "output_shape") else shape
    except SpecError as error:
        raise SpecError(f"{where}: {error}") from error
    return Part(path, kind, component, shape, output, out_dim if kind in SETS_WIDTH else None)


@lru_cache(maxsize=65536)
def _part_cost(kind: str, component: Component, shape: Any, out_dim: int | None) -> Cost:
    width = {} if out_dim is None else {"out_dim": out_dim}
    return components.get(kind, component.name).cost(shape, **full_choices(kind, component), **width)  # type: ignore[attr-defined]


def part_cost(part: Part) -> Cost:
    """The exact counts of one part, for one image."""
    return _part_cost(part.kind, part.component, part.shape, part.out_dim)
