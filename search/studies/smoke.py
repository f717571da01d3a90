"""A study small enough to try an installation: seconds on a CPU, every ledger written, conditional axes included.

search/run.py smoke
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from search.study import Phase, RunSettings, Study, study
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec, BlockSpec, Component, StageSpec


@study("smoke")
def smoke(run: RunSettings) -> Study:
    """Score a dozen tiny plain Vision Transformers without training, to try an installation."""
    phase = Phase(
        name="search",
        space=tiny_vit_space(img_size=run.proxy_img_size or run.img_size or 32, num_classes=run.num_classes_or(10)),
        evaluators=run.calls("as_vit", "cost"),
        objectives=run.objectives or ("length_distortion", "gmacs"),
        budget=run.budget,
        strategy=run.strategy or "random",
        num_trials=run.num_trials or 12,
    )
    return Study(phases=(phase,))


def tiny_vit_space(*, img_size: int, num_classes: int = 10) -> SearchSpace:
    """Plain ViTs of one stage; the pooling decides which further axes there are."""

    def decode(params: Mapping[str, Any]) -> Candidate:
        pooling = params["pooling"]
        exponent = {"p": params["p"]} if pooling == "gem" else {}
        block = BlockSpec(
            mixer=Component("attention", num_heads=params["num_heads"], head_dim=params["embed_dim"] // params["num_heads"]),
            feed_forward=Component("mlp", hidden_dim=params["mlp_ratio"] * params["embed_dim"]),
        )
        model = ArchSpec(
            stages=(StageSpec(embed_dim=params["embed_dim"], blocks=(block,) * params["depth"]),),
            img_size=img_size,
            num_classes=num_classes,
            patch_embed=Component("conv", kernel=params["patch_size"], stride=params["patch_size"]),
            prefix=Component("class_token") if pooling == "class_token" else None,
            position=Component(params["position"]),
            pooling=Component(pooling, **exponent),
        )
        name = f"ViT-{params['embed_dim']}x{params['depth']}/{params['patch_size']}"
        return Candidate(model=model, label=f"{name} {params['num_heads']}h r{params['mlp_ratio']} {params['position']} {pooling}")

    return SearchSpace(
        name="smoke/tiny_vit",
        axes=(
            Axis(name="embed_dim", choices=(32, 48, 64)),
            Axis(name="depth", choices=(2, 3, 4)),
            Axis(name="patch_size", choices=(4, 8)),
            Axis(name="num_heads", choices=(2, 4)),
            Axis(name="mlp_ratio", choices=(2, 4)),
            Axis(name="position", choices=("learned", "sincos")),
            Axis(name="pooling", choices=("class_token", "mean", "gem")),
            Axis(name="p", choices=(2.0, 3.0, 4.0), when=("pooling", "gem")),
        ),
        decode=decode,
    )
