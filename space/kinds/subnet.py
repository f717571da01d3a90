"""Kind "subnet": an architecture cut out of a supernet, `SubnetSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from space.model import KindOfArch, Model, fit_tensors, model_kind
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.subnet_spec import SubnetSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.state_dicts import Fitted


@model_kind("subnet")
class SubnetKind(KindOfArch[SubnetSpec]):
    """An architecture cut out of a supernet; it costs what it costs alone."""

    def examples(self) -> tuple[SubnetSpec, ...]:
        def network(embed_dim: int, num_blocks: int, num_heads: int, hidden_dim: int) -> ArchSpec:
            block = BlockSpec(
                mixer=Component("attention", num_heads=num_heads, head_dim=8), feed_forward=Component("mlp", hidden_dim=hidden_dim)
            )
            return ArchSpec(
                stages=(StageSpec(embed_dim=embed_dim, blocks=(block,) * num_blocks),),
                img_size=16,
                num_classes=5,
                patch_embed=Component("conv", kernel=4, stride=4),
                prefix=Component("class_token"),
                position=Component("learned"),
                pooling=Component("class_token"),
            )

        return (SubnetSpec(supernet=network(16, 4, 2, 32), arch=network(12, 2, 1, 24), kept=((0, 3),)),)

    def from_json(self, data: Mapping[str, Any]) -> SubnetSpec:
        return SubnetSpec.from_json(data)

    def resized(self, model: SubnetSpec, *, img_size: int, num_classes: int) -> SubnetSpec:
        size = {"img_size": img_size, "num_classes": num_classes}
        return replace(model, supernet=replace(model.supernet, **size), arch=replace(model.arch, **size))

    def build(self, model: SubnetSpec, *, seed: int, drop_path: float) -> nn.Module:
        """The network of `arch` with fresh weights; a block's stream is named by the block that it was in the supernet.

        A subnet as wide as its supernet therefore starts from the weights that the supernet of the same seed starts from.
        """
        from space.vit import build_seeded

        return build_seeded(model.arch, seed=seed, drop_path=drop_path, origin=model.origin)

    def as_arch(self, model: SubnetSpec) -> ArchSpec:
        return model.arch

    def fit(self, model: SubnetSpec, tensors: Mapping[str, Tensor], stored: Model | None) -> Fitted:
        """The tensors of the same network, or slices of its supernet's."""
        from space.slicing import subnet_tensors

        if isinstance(stored, SubnetSpec) and stored.kept != model.kept:
            raise SpecError(f"they keep the blocks {stored.kept} of their supernet and not {model.kept}")
        try:
            return fit_tensors(model.arch, tensors, stored)
        except SpecError as error:
            alone = error
        try:
            whole = fit_tensors(model.supernet, tensors, stored)
        except SpecError as error:
            raise SpecError(f"{alone}; nor are they of its supernet: {error}") from error
        return whole._replace(tensors=subnet_tensors(model, whole.tensors), changes=(*whole.changes, "slices of the supernet's"))
