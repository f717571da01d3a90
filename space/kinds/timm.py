"""Kind "timm": a model of timm by its name there, `TimmSpec`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from space.component import Cost
from space.model import Model, ModelKind, model_kind
from space.timm_spec import TimmSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from space.state_dicts import Fitted


@model_kind("timm")
class TimmKind(ModelKind[TimmSpec]):
    """A model of timm."""

    notation = "NAME"

    def examples(self) -> tuple[TimmSpec, ...]:
        small = (("depth", 2), ("embed_dim", 24), ("num_heads", 2))
        return (
            TimmSpec(name="vit_tiny_patch16_224", img_size=32, num_classes=5, in_chans=1, options=small),
            TimmSpec(name="test_convnext", img_size=32, num_classes=5),
        )

    def from_json(self, data: Mapping[str, Any]) -> TimmSpec:
        return TimmSpec.from_json(data)

    def read(self, text: str) -> TimmSpec:
        """The model at the image size that its pretrained weights take, with 1000 classes."""
        from space.timm_build import pretrained_config

        in_chans, img_size, _ = pretrained_config(text).input_size
        return TimmSpec(name=text, img_size=img_size, in_chans=in_chans, num_classes=1000)

    def resized(self, model: TimmSpec, *, img_size: int, num_classes: int) -> TimmSpec:
        return replace(model, img_size=img_size, num_classes=num_classes)

    def cost_by_part(self, model: TimmSpec) -> dict[str, Cost]:
        from space.timm_cost import counted

        return dict(counted(model).parts)

    def build(self, model: TimmSpec, *, seed: int, drop_path: float) -> nn.Module:
        from space.timm_build import build_timm

        return build_timm(model, seed=seed, drop_path=drop_path)

    def depth(self, model: TimmSpec) -> int:
        """The blocks which timm's transformers and ConvNeXts name `blocks.0` and so on; 0 for models that name none."""
        from space.timm_cost import counted

        return counted(model).depth

    def token_size(self, model: TimmSpec) -> int | None:
        from space.timm_cost import counted

        return counted(model).patch_size

    def why_no_class_row(self, model: TimmSpec) -> str:
        return "models of timm give no attention"

    def fit(self, model: TimmSpec, tensors: Mapping[str, Tensor], stored: Model | None) -> Fitted:
        from space.timm_build import fit_to_timm

        return fit_to_timm(model, tensors)

    def normalisation(self, model: TimmSpec) -> tuple[tuple[float, ...], tuple[float, ...]]:
        from space.timm_build import pretrained_config

        config = pretrained_config(model.name)
        return tuple(config.mean), tuple(config.std)

    def foldable_convolution(self, model: TimmSpec) -> str | None:
        from space.timm_build import foldable_convolution

        return foldable_convolution(model)
