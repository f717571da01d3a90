"""A ConvNet for the 2020s (ConvNeXt), https://arxiv.org/abs/2201.03545, built by timm."""

from __future__ import annotations

from functools import partial

from space.family import Family, NamedModel, family
from space.timm_spec import TimmSpec


@family("convnext")
def convnext() -> Family:
    """ConvNeXt: the convolutional network that transformers are compared with."""
    return Family(
        models={
            "convnext_cifar": NamedModel(
                summary="timm's ConvNeXt-Atto with a stem of stride 1; for 10 classes, 32 px",
                make=partial(TimmSpec, name="convnext_atto", img_size=32, num_classes=10, options=(("patch_size", 1),)),
            )
        }
    )
