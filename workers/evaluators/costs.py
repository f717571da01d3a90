"""What costs nothing to know of a network: the baselines that every expensive score has to beat."""

from __future__ import annotations

import math
from collections.abc import Mapping

from results.records import Metric
from space.cost import cost as counts
from space.families.as_vit import length_distortion_closed_form
from space.model import Model, depth_of, require_arch
from workers.evaluator import Context, NoSettings, evaluator


@evaluator(
    "cost",
    metrics=(
        Metric("params_m", "minimize", "parameters, millions"),
        Metric("gmacs", "minimize", "multiply-adds for one image, 1e9"),
        Metric("depth", "minimize", "blocks"),
    ),
    is_free=True,
    memory_mb=0,
)
def cost(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """Parameters, MACs and depth by exact arithmetic, without building the network."""
    counted = counts(model)
    return {"params_m": counted.params / 1e6, "gmacs": counted.macs / 1e9, "depth": depth_of(model)}


@evaluator(
    "shape",
    metrics=(
        Metric("width", "maximize", "channels of a token, mean over the blocks"),
        Metric("kernel_product", "maximize", "product of the kernels between the stages, K2 K3 K4 of As-ViT; 1 without any"),
    ),
    subject="proxy",
    is_free=True,
    memory_mb=0,
)
def shape(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """Width, and the product of the kernels between stages: what As-ViT's length distortion is mostly made of."""
    stages = require_arch(model, "shape").stages
    widths = [stage.embed_dim for stage in stages for _ in stage.blocks]
    kernels = [stage.downsampling.choices.get("kernel", 1) for stage in stages if stage.downsampling]
    return {"width": sum(widths) / len(widths), "kernel_product": math.prod(map(int, kernels))}


@evaluator(
    "as_vit_closed_form",
    metrics=(Metric("closed_form", "maximize", "length distortion in the linear regime, about C^2 K2 K3 K4 up to a factor"),),
    subject="proxy",
    is_free=True,
    memory_mb=0,
)
def as_vit_closed_form(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """As-ViT's length distortion by formula: the mean speed that evaluator as_vit measures in its default mode."""
    return {"closed_form": length_distortion_closed_form(require_arch(model, "as_vit_closed_form"), num_angles=1)}
