"""Kind "arch": a network of our components, `ArchSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from space.component import Cost, TokenShape
from space.layout import groups, layout, part_cost, why_no_class_row
from space.model import Model, ModelKind, as_arch, model_kind
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, full_choices

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.state_dicts import Fitted


@model_kind("arch")
class ArchKind(ModelKind[ArchSpec]):
    """A network of our components."""

    def examples(self) -> tuple[ArchSpec, ...]:
        block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=8), feed_forward=Component("mlp", hidden_dim=32))
        plain = ArchSpec(
            stages=(StageSpec(embed_dim=16, blocks=(block,) * 2),),
            img_size=16,
            num_classes=5,
            patch_embed=Component("conv", kernel=4, stride=4),
            prefix=Component("class_token"),
            position=Component("learned"),
            pooling=Component("class_token"),
        )
        merging = StageSpec(embed_dim=16, blocks=(block,), downsampling=Component("patch_merging", kernel=2))
        pyramid = replace(
            plain,
            stages=(merging, StageSpec(embed_dim=32, blocks=(block,))),
            in_chans=1,
            prefix=None,
            position=None,
            pooling=Component("mean"),
        )
        return plain, pyramid

    def from_json(self, data: Mapping[str, Any]) -> ArchSpec:
        return ArchSpec.from_json(data)

    def resized(self, model: ArchSpec, *, img_size: int, num_classes: int) -> ArchSpec:
        return replace(model, img_size=img_size, num_classes=num_classes)

    def cost_by_part(self, model: ArchSpec) -> dict[str, Cost]:
        return {part.path: part_cost(part) for part in layout(model)}

    def cost(self, model: ArchSpec) -> Cost:
        # A search counts every proposal: three sums over columns take half the time of adding `Cost`s up.
        return Cost(*map(sum, zip(*(group.cost for _, group in groups(model)), strict=True)))

    def build(self, model: ArchSpec, *, seed: int, drop_path: float) -> nn.Module:
        from space.vit import build_seeded

        return build_seeded(model, seed=seed, drop_path=drop_path)

    def depth(self, model: ArchSpec) -> int:
        return model.depth

    def token_size(self, model: ArchSpec) -> int | None:
        tokens = next(part.shape for part in layout(model) if part.path == "norm")
        assert isinstance(tokens, TokenShape)
        return model.img_size // tokens.grid[0] if tokens.grid else None

    def why_no_class_row(self, model: ArchSpec) -> str | None:
        return why_no_class_row(model)

    def as_arch(self, model: ArchSpec) -> ArchSpec:
        return model

    def fit(self, model: ArchSpec, tensors: Mapping[str, Tensor], stored: Model | None) -> Fitted:
        from space.state_dicts import fit_to_arch

        return fit_to_arch(model, tensors, None if stored is None else as_arch(stored))

    def foldable_convolution(self, model: ArchSpec) -> str | None:
        choices = full_choices("patch_embed", model.patch_embed)
        is_foldable = model.patch_embed.name == "conv" and choices["bias"] and int(choices["kernel"]) <= int(choices["stride"])
        return "patch_embed.proj" if is_foldable else None
