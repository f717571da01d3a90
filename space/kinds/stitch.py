"""Kind "stitch": a route over the blocks of several anchors, `StitchSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from space.model import KindOfArch, Model, fit_tensors, model_kind
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.stitch_spec import Segment, StitchSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.state_dicts import Fitted


@model_kind("stitch")
class StitchKind(KindOfArch[StitchSpec]):
    """A route over anchors; it costs what its folded network costs."""

    def examples(self) -> tuple[StitchSpec, ...]:
        def anchor(embed_dim: int, depth: int) -> ArchSpec:
            block = BlockSpec(
                mixer=Component("attention", num_heads=2, head_dim=embed_dim // 2),
                feed_forward=Component("mlp", hidden_dim=2 * embed_dim),
            )
            return ArchSpec(
                stages=(StageSpec(embed_dim=embed_dim, blocks=(block,) * depth),),
                img_size=16,
                num_classes=5,
                patch_embed=Component("conv", kernel=4, stride=4),
                prefix=Component("class_token"),
                position=Component("learned"),
                pooling=Component("class_token"),
            )

        anchors = (anchor(8, 2), anchor(16, 4))
        return (
            StitchSpec(anchors=anchors, route=(Segment(0, 0, 0), Segment(1, 2, 3))),
            StitchSpec(anchors=anchors, route=(Segment(1, 0, 1), Segment(0, 1, 1))),
        )

    def from_json(self, data: Mapping[str, Any]) -> StitchSpec:
        return StitchSpec.from_json(data)

    def resized(self, model: StitchSpec, *, img_size: int, num_classes: int) -> StitchSpec:
        size = {"img_size": img_size, "num_classes": num_classes}
        return replace(model, anchors=tuple(replace(anchor, **size) for anchor in model.anchors))

    def build(self, model: StitchSpec, *, seed: int, drop_path: float) -> nn.Module:
        """The folded network with fresh weights; the stream of a module is named by its anchor and its place there.

        Two routes over equal anchors share the initial weights of every block that both run.
        """
        from space.vit import build_seeded

        def stream_name(path: str) -> str:
            origin = model.origin(path)
            if origin is None:
                return f"stitch.{'.'.join(map(str, model.stitch(path)))}"
            return f"anchor.{model.anchors[origin[0]].digest}.{origin[1]}"

        return build_seeded(model.folded, seed=seed, drop_path=drop_path, origin=stream_name)

    def as_arch(self, model: StitchSpec) -> ArchSpec:
        return model.folded

    def fit(self, model: StitchSpec, tensors: Mapping[str, Tensor], stored: Model | None) -> Fitted:
        return fit_tensors(model.folded, tensors, stored)
