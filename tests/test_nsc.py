"""NSC: its closed form against the integral and against random matrices, its invariances, and what it refuses."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from scipy.integrate import quad

from space import catalog
from space.families import autoformer
from space.registry import SpecError
from workers.evaluator import Context, NoSettings
from workers.evaluators.nsc import map_score, nsc, spectral_score

SIZES = [(192, 64), (192, 192), (64, 192), (192, 768), (1, 7), (5, 5), (3, 1000)]


def integral(inputs: int, outputs: int) -> float:
    """The definition: min(n, m) times the integral of ln(1 + M s^2 x) over the Marchenko-Pastur density."""
    smaller, larger = sorted((inputs, outputs))
    ratio, gain = smaller / larger, larger * 2 / (inputs + outputs)
    low, high = (1 - math.sqrt(ratio)) ** 2, (1 + math.sqrt(ratio)) ** 2

    def integrand(angle: float) -> float:
        # x runs over the support as the cosine of an angle, which takes the square-root ends out of the density.
        x = (low + high) / 2 - (high - low) / 2 * math.cos(angle)
        density = math.sqrt(max(0.0, (high - x) * (x - low))) / (2 * math.pi * ratio * max(x, 1e-300))
        return math.log1p(gain * x) * density * (high - low) / 2 * math.sin(angle)

    return smaller * quad(integrand, 0, math.pi, limit=200)[0]


@pytest.mark.parametrize(("inputs", "outputs"), SIZES)
def test_the_closed_form_is_the_integral(inputs: int, outputs: int):
    assert map_score(inputs, outputs) == pytest.approx(integral(inputs, outputs), rel=1e-7)


def test_it_is_the_log_determinant_of_a_wide_random_layer():
    inputs, outputs = 300, 450
    weights = np.random.default_rng(0).normal(0, math.sqrt(2 / (inputs + outputs)), (outputs, inputs))
    drawn = np.log1p(np.linalg.eigvalsh(weights.T @ weights)).sum()
    assert map_score(inputs, outputs) == pytest.approx(drawn, rel=0.01)


def test_a_network_is_the_sum_over_the_maps_of_its_blocks():
    spec = autoformer.spec({"hidden_dim": 192, "depth": 1, "mlp_ratio": [4], "num_heads": [3]}, num_classes=10)
    expected = 9 * integral(192, 64) + integral(192, 192) + 2 * integral(192, 768)
    assert spectral_score(spec) == pytest.approx(expected, rel=1e-7)


def test_networks_with_the_same_blocks_in_another_order_tie():
    ratios, heads = [3.5, 4.0] * 6, [3, 4, 4] * 4
    scores = set()
    for seed in range(20):
        order = random.Random(seed).sample(range(12), 12)
        arch = {"hidden_dim": 216, "depth": 12, "mlp_ratio": [ratios[i] for i in order], "num_heads": [heads[i] for i in order]}
        if sorted(zip(arch["mlp_ratio"], arch["num_heads"], strict=True)) == sorted(zip(ratios, heads, strict=True)):
            scores.add(spectral_score(autoformer.spec(arch, num_classes=10)))
    assert len(scores) == 1


def test_windows_and_relative_positions_change_nothing_of_it():
    arch = {"hidden_dim": 192, "depth": 2, "mlp_ratio": [4, 4], "num_heads": [3, 3]}
    assert spectral_score(autoformer.spec(arch, num_classes=10)) == spectral_score(autoformer.cream_spec(arch, num_classes=10))


def test_a_network_of_timm_is_refused_with_the_reason():
    with pytest.raises(SpecError, match="nsc takes networks of our components"):
        nsc(catalog.resolve("timm:vit_tiny_patch16_224"), Context(seed=0), NoSettings())
