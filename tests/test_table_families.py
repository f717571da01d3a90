"""Networks as tables of trained networks write them: AutoFormer in both forms and PiT."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from space import catalog
from space.component import TokenShape
from space.components.autoformer import RelativeAttention, distance_entries
from space.cost import cost
from space.families import autoformer, pit
from space.fvcore_count import fvcore_macs
from space.registry import SpecError
from space.vit import build

PIT: dict[str, Any] = {"base_dim": 16, "mlp_ratio": 6, "depth": [2, 8, 4], "num_heads": [2, 4, 4]}
AUTOFORMER: dict[str, Any] = {"hidden_dim": 192, "depth": 2, "mlp_ratio": [3.5, 4.0], "num_heads": [3, 4]}


def test_pit_has_the_counts_of_the_network_that_was_trained():
    counted = cost(pit.spec(PIT, num_classes=100))
    assert (counted.params, counted.macs) == (893_828, 267_613_760)


def test_the_counts_of_pit_are_those_of_the_built_network():
    spec = pit.spec(PIT, num_classes=100, img_size=64)
    network = build(spec, generator=torch.Generator().manual_seed(0))
    assert sum(parameter.numel() for parameter in network.parameters()) == cost(spec).params
    assert fvcore_macs(network, img_size=64) == cost(spec).fvcore_macs


def test_autoformers_own_heads_are_64_wide_and_know_relative_positions():
    own, auto_prox = (cost(read(AUTOFORMER, num_classes=10)) for read in (autoformer.cream_spec, autoformer.spec))
    # The second block has 4 heads: queries, keys, values and the projection of 64 further channels.
    tables = 2 * 4 * 30 * 64
    assert own.params - auto_prox.params == tables + 64 * (3 * 193 + 192)


@pytest.mark.parametrize(("size", "params_m"), [("tiny", 5.7), ("small", 22.9), ("base", 54.0)])
def test_the_published_autoformers_lie_inside_their_spaces(size: str, params_m: float):
    """Parameters of AutoFormer-T, -S and -B: Table 5 of the paper."""
    ranges = autoformer.CREAM[size]
    ends = []
    for pick in (min, max):
        depth = pick(ranges.depths)
        arch = {
            "hidden_dim": pick(ranges.hidden_dims),
            "depth": depth,
            "mlp_ratio": [pick(ranges.mlp_ratios)] * depth,
            "num_heads": [pick(ranges.num_heads)] * depth,
        }
        ends.append(cost(autoformer.cream_spec(arch, num_classes=1000)).params / 1e6)
    assert ends[0] < params_m < ends[1]


def test_relative_attention_is_its_equations():
    grid, heads, dim = (2, 3), 2, 4
    shape = TokenShape(8, 6, grid, num_prefix=1, has_class_token=True)
    layer = RelativeAttention(shape, num_heads=heads, head_dim=dim, qkv_bias=True, max_distance=1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    x = torch.randn(2, 7, 8, generator=generator)
    q, k, v = layer.qkv(x).reshape(2, 7, 3, heads, dim).unbind(2)

    def entry(i: int, j: int, axis: int) -> int:
        if 0 in (i, j):
            return 0
        (a, b) = divmod(i - 1, grid[1])[axis], divmod(j - 1, grid[1])[axis]
        return max(-1, min(1, b - a)) + 2

    expected = torch.zeros(2, 7, heads, dim)
    for b in range(2):
        for h in range(heads):
            for i in range(7):
                keys = [k[b, j, h] + layer.key_rows[entry(i, j, 0)] + layer.key_columns[entry(i, j, 1)] for j in range(7)]
                values = [v[b, j, h] + layer.value_rows[entry(i, j, 0)] + layer.value_columns[entry(i, j, 1)] for j in range(7)]
                weights = torch.stack([q[b, i, h] @ key / math.sqrt(dim) for key in keys]).softmax(0)
                expected[b, i, h] = sum(weight * value for weight, value in zip(weights, values, strict=True))
    torch.testing.assert_close(layer(x), layer.proj(expected.flatten(2)), rtol=1e-4, atol=1e-4)


def test_distances_beyond_the_table_count_as_its_last_entry():
    rows, columns = distance_entries((3, 3), 0, 1)
    assert rows[0].tolist() == [2, 2, 2, 3, 3, 3, 3, 3, 3]
    assert columns[8].tolist() == [1, 1, 2] * 3


@pytest.mark.parametrize(
    ("name", "arch", "message"),
    [
        ("autoformer", {"hidden_dim": 192}, "depth, mlp_ratio, num_heads is missing"),
        ("autoformer", {**AUTOFORMER, "heads": 3}, "unknown heads"),
        ("autoformer", {**AUTOFORMER, "depth": 3}, "mlp_ratio has 2 entries; depth is 3"),
        ("autoformer", {**AUTOFORMER, "num_heads": [3, 5]}, "num_heads is 5; it must divide hidden_dim 192"),
        ("autoformer_cream", {**AUTOFORMER, "num_heads": [3, 0]}, "a list of whole numbers above 0"),
        ("autoformer_cream", {**AUTOFORMER, "hidden_dim": "192"}, "hidden_dim is '192'; a whole number"),
        ("pit", {**PIT, "depth": [2, 8]}, "a list of 3 whole numbers"),
        ("pit", {**PIT, "num_heads": [4, 2, 4]}, "the next width 32 is not a multiple of the width 64"),
        ("pit", {**PIT, "mlp_ratio": 0}, "mlp_ratio is 0; a number above 0"),
    ],
)
def test_an_architecture_outside_its_family_is_refused(name: str, arch: dict[str, Any], message: str):
    with pytest.raises(SpecError, match=message):
        cost(catalog.tables()[name](arch, num_classes=10, img_size=224))
