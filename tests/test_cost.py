"""Counts against published tables, the reference implementations and fvcore."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

import results
from space.catalog import resolve
from space.cost import cost
from space.families import as_vit, autoformer
from space.fvcore_count import fvcore_macs
from space.vit import build

# timm 1.0 for parameters and fvcore 0.1.5 (attention as plain products) for its count; macs are those without norms:
# DeiT (https://arxiv.org/abs/2012.12877) prints 5.7 / 22.1 / 86.6 M and 1.3 / 4.6 / 17.6 G, ViT-L/16 304.3 M and 61.6 G.
PLAIN = {
    "deit_tiny": (5_717_416, 1_253_683_200, 1_258_411_200),
    "deit_small": (22_050_664, 4_598_882_304, 4_608_338_304),
    "deit_base": (86_567_656, 17_563_828_224, 17_582_740_224),
    "vit_large_patch16": (304_326_632, 61_554_712_576, 61_604_135_936),
    "deit3_small": (22_059_496, 4_598_882_304, 4_608_338_304),
    "deit3_base": (86_585_320, 17_563_828_224, 17_582_740_224),
    "deit3_large": (304_374_760, 61_554_712_576, 61_604_135_936),
}


@pytest.mark.parametrize("name", PLAIN)
def test_plain_vits_have_their_published_counts(name: str):
    assert tuple(cost(resolve(name))) == PLAIN[name]


@pytest.mark.parametrize("name", ["deit_tiny", "as_vit_seed"])
def test_fvcore_agrees_on_the_built_network(name: str):
    spec = resolve(name)
    model = build(spec)
    assert fvcore_macs(model, spec.img_size) == cost(spec).fvcore_macs
    assert sum(parameter.numel() for parameter in model.parameters()) == cost(spec).params
    assert model.training


def test_deit_small_of_timm_has_the_counts_of_ours():
    assert tuple(cost(resolve("timm:deit_small_patch16_224"))) == PLAIN["deit_small"]


# github.com/huggingface/pytorch-image-models, results/benchmark-infer-amp-nchw-pt240-cu124-rtx4090.csv, which counts with fvcore.
@pytest.mark.parametrize(
    ("name", "params_m", "gmacs"),
    [
        ("convnext_atto", 3.7, 0.55),
        ("resnet18", 11.69, 1.82),
        ("davit_tiny", 28.36, 4.54),
        ("hiera_tiny_224", 27.91, 4.91),
        ("levit_128", 9.21, 0.41),
        ("poolformer_s12", 11.92, 1.82),
    ],
)
def test_models_of_timm_have_their_published_counts(name: str, params_m: float, gmacs: float):
    counted = cost(resolve(f"timm:{name}"))
    assert (round(counted.params / 1e6, 2), round(counted.fvcore_macs / 1e9, 2)) == (params_m, gmacs)


# The released code builds these (github.com/VITA-Group/AsViT, at 224 pixels): parameters, MACs.
@pytest.mark.parametrize(
    ("text", "params", "gmacs"),
    [
        ("8,2,3|4,1,2|4,1,4|4,1,6|32", 2_319_624, 0.4916),
        ("4,8,2|2,4,2|2,2,2|2,1,2|16", 1_200_360, 0.1457),
        ("6,4,4|3,2,4|3,1,4|3,1,4|64", 1_768_680, 0.2788),
        ("8,2,3|4,1,2|4,1,4|4,1,6|32,8", 197_808, 0.0807),
        ("4,8,2|2,4,2|2,2,2|2,1,2|16,8", 125_736, 0.0135),
    ],
)
def test_as_vits_have_the_counts_of_the_released_code(text: str, params: int, gmacs: float):
    counted = cost(as_vit.spec(as_vit.Network.parse(text), img_size=224))
    assert counted.params == params
    # Its counter adds the bias of the convolution, less than 3e-4 of the total.
    assert counted.macs / 1e9 == pytest.approx(gmacs, abs=2e-4)


@pytest.mark.parametrize(
    ("network", "params_m", "gmacs"),
    [(as_vit.ASVIT_SMALL, 28.78, 5.13), (as_vit.ASVIT_BASE, 52.26, 8.75), (as_vit.ASVIT_LARGE, 87.58, 22.36)],
)
def test_the_as_vit_family_has_the_counts_of_the_released_code(network: as_vit.Network, params_m: float, gmacs: float):
    counted = cost(as_vit.spec(network, img_size=224))
    assert (round(counted.params / 1e6, 2), round(counted.macs / 1e9, 2)) == (params_m, gmacs)


def test_all_published_autoformers_have_their_counts():
    assert results.__file__ is not None
    with (Path(results.__file__).parent / "published" / "auto_prox_autoformer.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 100
    for row in rows:
        arch = {
            "hidden_dim": int(row["hidden_dim"]),
            "depth": int(row["depth"]),
            "mlp_ratio": list(map(float, row["mlp_ratio"].split())),
            "num_heads": list(map(int, row["num_heads"].split())),
        }
        counted = cost(autoformer.spec(arch, num_classes=100))
        assert (counted.params, counted.macs) == (int(row["params_c100"]), int(row["macs_c100_224"])), row["id"]
