"""Training data-efficient image transformers and distillation through attention (DeiT), https://arxiv.org/abs/2012.12877, Table 1.

The networks without the distillation token: plain Vision Transformers.
"""

from __future__ import annotations

from functools import partial

from space.families.vit import plain_vit
from space.family import Family, NamedModel, family

_SOURCE = "Training data-efficient image transformers (https://arxiv.org/abs/2012.12877), 224 px"


@family("deit")
def deit() -> Family:
    """DeiT: the sizes Ti, S and B of the plain Vision Transformer."""
    return Family(
        models={
            "deit_tiny": NamedModel(summary=f"DeiT-Ti: 12 blocks 192 wide, patch 16; {_SOURCE}", make=partial(plain_vit, 192, 12, 3)),
            "deit_small": NamedModel(summary=f"DeiT-S: 12 blocks 384 wide, patch 16; {_SOURCE}", make=partial(plain_vit, 384, 12, 6)),
            "deit_base": NamedModel(summary=f"DeiT-B: 12 blocks 768 wide, patch 16; {_SOURCE}", make=partial(plain_vit, 768, 12, 12)),
        }
    )
