"""Models by name, and the reading of whatever a user may name a model by. Listing imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

from space import as_vit
from space.model import Model, model_from_json
from space.registry import SpecError, unknown_name
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.timm_spec import TimmSpec, pretrained_config


def plain_vit(
    embed_dim: int, depth: int, num_heads: int, *, mlp_ratio: int = 4, patch_size: int = 16, img_size: int = 224, num_classes: int = 1000
) -> ArchSpec:
    """ViT (https://arxiv.org/abs/2010.11929): class token, learned positions."""
    block = BlockSpec(
        mixer=Component("attention", num_heads=num_heads, head_dim=embed_dim // num_heads),
        feed_forward=Component("mlp", hidden_dim=mlp_ratio * embed_dim),
    )
    return ArchSpec(
        stages=(StageSpec(embed_dim=embed_dim, blocks=(block,) * depth),),
        img_size=img_size,
        num_classes=num_classes,
        patch_embed=Component("conv", kernel=patch_size, stride=patch_size),
        prefix=Component("class_token"),
        position=Component("learned"),
        pooling=Component("class_token"),
    )


_DEIT = "Training data-efficient image transformers (https://arxiv.org/abs/2012.12877), 224 px"
_AS_VIT = "As-ViT (https://arxiv.org/abs/2202.11921), 224 px"

_MODELS: dict[str, tuple[str, Callable[[], Model]]] = {
    "deit_tiny": (f"DeiT-Ti: 12 blocks 192 wide, patch 16; {_DEIT}", lambda: plain_vit(192, 12, 3)),
    "deit_small": (f"DeiT-S: 12 blocks 384 wide, patch 16; {_DEIT}", lambda: plain_vit(384, 12, 6)),
    "deit_base": (f"DeiT-B: 12 blocks 768 wide, patch 16; {_DEIT}", lambda: plain_vit(768, 12, 12)),
    "vit_large_patch16": (
        "ViT-L/16: 24 blocks 1024 wide; An image is worth 16x16 words (https://arxiv.org/abs/2010.11929), 224 px",
        lambda: plain_vit(1024, 24, 16),
    ),
    "as_vit_seed": (f"the published seed topology at width 32, depth 1; {_AS_VIT}", lambda: as_vit.spec(as_vit.SEED, img_size=224)),
    "as_vit_small": (f"As-ViT-Small: 88 wide, 10 blocks; {_AS_VIT}", lambda: as_vit.spec(as_vit.ASVIT_SMALL, img_size=224)),
    "as_vit_base": (f"As-ViT-Base: 116 wide, 11 blocks; {_AS_VIT}", lambda: as_vit.spec(as_vit.ASVIT_BASE, img_size=224)),
    "as_vit_large": (f"As-ViT-Large: 180 wide, 14 blocks; {_AS_VIT}", lambda: as_vit.spec(as_vit.ASVIT_LARGE, img_size=224)),
    "vit_digits": (
        "4 blocks 48 wide, patch 4; for the 10 classes of digits, 16 px",
        lambda: plain_vit(48, 4, 3, mlp_ratio=2, patch_size=4, img_size=16, num_classes=10),
    ),
    "vit_cifar": (
        "6 blocks 256 wide, patch 4; for 10 classes, 32 px",
        lambda: plain_vit(256, 6, 4, patch_size=4, img_size=32, num_classes=10),
    ),
    "convnext_cifar": (
        "timm's ConvNeXt-Atto with a stem of stride 1; for 10 classes, 32 px",
        lambda: TimmSpec(name="convnext_atto", img_size=32, num_classes=10, options=(("patch_size", 1),)),
    ),
}


def names() -> tuple[str, ...]:
    """The named models, smallest first within a family."""
    return tuple(_MODELS)


def summary(name: str) -> str:
    """One line about a named model."""
    return _entry(name)[0]


def resolve(text: str) -> Model:
    """The model that `text` names.

    A catalogue name, `as_vit:` and a string of that method (at 224 pixels), `timm:` and the name of a model there (1000 classes, at
    the size its pretrained weights take), or the path of a JSON file that holds a spec or a candidate, whose reported network is
    taken. Raises SpecError with the nearest names.
    """
    if text in _MODELS:
        return _entry(text)[1]()
    method, colon, string = text.partition(":")
    if colon and method == "as_vit":
        return as_vit.spec(as_vit.Network.parse(string), img_size=224)
    if colon and method == "timm":
        in_chans, img_size, _ = pretrained_config(string).input_size
        return TimmSpec(name=string, img_size=img_size, in_chans=in_chans, num_classes=1000)
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return _read(path)
    return _entry(text)[1]()


def _entry(name: str) -> tuple[str, Callable[[], Model]]:
    if name not in _MODELS:
        error = unknown_name("model", name, _MODELS)
        raise SpecError(f"{error}; as_vit:STRING, timm:NAME and the path of a spec's JSON are read too")
    return _MODELS[name]


def _read(path: Path) -> Model:
    try:
        data = json.loads(path.read_text())
        if isinstance(data, Mapping) and isinstance(data.get("model"), Mapping):
            data = data["model"]
        return model_from_json(data)
    except (OSError, UnicodeDecodeError, json.JSONDecodeError, SpecError) as error:
        raise SpecError(f"{path}: {error}") from error
