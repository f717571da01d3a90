"""Plain Vision Transformers of timm as networks of our components. Importing it imports no torch."""

from __future__ import annotations

from typing import Any

from space.component import Cost
from space.cost import cost
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.timm_spec import TimmSpec


def as_plain_vit(spec: TimmSpec) -> ArchSpec:
    """timm's `VisionTransformer` as a network of our components, into which its weights fit (`fit_tensors`).

    Raises SpecError for another class, and for one with parts that ours does not have: its counts would be others.
    """
    import torch
    from timm.models.vision_transformer import Block, VisionTransformer

    from space.timm_build import create
    from space.timm_cost import counted

    refusal = f"timm model {spec.name!r} is no plain Vision Transformer"
    with torch.device("meta"):
        model: Any = create(spec)
    if type(model) is not VisionTransformer:
        raise SpecError(f"{refusal}: its class is {type(model).__name__}")
    first: Any = model.blocks[0]
    if (block_class := type(first)) is not Block:
        raise SpecError(f"{refusal}: its blocks are of the class {block_class.__name__}")
    activation = first.mlp.act
    if type(activation) is not torch.nn.GELU or activation.approximate != "none":
        raise SpecError(f"{refusal}: its activation is {activation}, and not the exact GELU")
    if (eps := first.norm1.eps) != 1e-6:
        raise SpecError(f"{refusal}: the eps of its norms is {eps:g}, and not 1e-06")
    kernel = model.patch_embed.patch_size[0]
    block = BlockSpec(
        mixer=Component("attention", num_heads=first.attn.num_heads, head_dim=first.attn.head_dim),
        feed_forward=Component("mlp", hidden_dim=first.mlp.fc1.out_features),
        layer_scale=None if isinstance(first.ls1, torch.nn.Identity) else Component("learned"),
    )
    arch = ArchSpec(
        stages=(StageSpec(embed_dim=model.embed_dim, blocks=(block,) * len(model.blocks)),),
        img_size=spec.img_size,
        in_chans=spec.in_chans,
        num_classes=spec.num_classes,
        patch_embed=Component("conv", kernel=kernel, stride=kernel),
        prefix=Component("class_token") if model.has_class_token else None,
        position=Component("learned", covers_prefix=not model.no_embed_class),
        pooling=Component("class_token" if model.global_pool == "token" else "mean"),
    )
    ours, theirs = cost(arch), sum(counted(spec).parts.values(), Cost())
    if ours != theirs:
        raise SpecError(f"{refusal}: it has {theirs.params:,} parameters, a plain one of its size {ours.params:,}")
    return arch
