"""Power means and the poolings made of them: Group Generalized Mean Pooling for Vision Transformer (https://arxiv.org/abs/2212.04114)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from space.component import TokenShape, components
from space.components.pooling import GEM_EPS, MIN_EXPONENT, power_mean
from space.spec import Component, canonical, full_choices
from space.vit import initialize


def pooling(part: Component, dim: int, num_patches: int, num_prefix: int = 0) -> Any:
    part = canonical("pooling", part)
    shape = TokenShape(dim, num_patches, num_prefix=num_prefix, has_class_token=num_prefix > 0)
    made: nn.Module = components.get("pooling", part.name)(shape, **full_choices("pooling", part))
    initialize(made, torch.Generator().manual_seed(0))
    return made


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def exponents(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


seeds = st.integers(0, 2**32)
counts = st.integers(1, 9)
powers = st.floats(0.1, 50)


@given(seeds, counts, st.lists(powers, min_size=1, max_size=4))
def test_it_is_the_written_formula(seed: int, N: int, p: list[float]):
    # Values near 1, where the formula as written neither under- nor overflows.
    x = 0.5 + normal(2, N, len(p), seed=seed).sigmoid()
    torch.testing.assert_close(power_mean(x, exponents(*p)), (x ** exponents(*p)).mean(1) ** (1 / exponents(*p)), rtol=1e-12, atol=0)


@given(seeds, counts, powers, powers)
def test_it_rises_with_the_exponent(seed: int, N: int, p: float, q: float):
    x = normal(3, N, 5, seed=seed)
    low, high = (power_mean(x, torch.full((5,), power, dtype=torch.float64)) for power in sorted((p, q)))
    assert (low <= high * (1 + 1e-12)).all()


@given(seeds, counts, powers)
def test_it_lies_between_the_smallest_and_the_largest_value(seed: int, N: int, p: float):
    x = normal(3, N, 5, seed=seed)
    clamped, z = x.clamp(min=GEM_EPS), power_mean(x, torch.full((5,), p, dtype=torch.float64))
    assert (z >= clamped.amin(1) * (1 - 1e-12)).all()
    assert (z <= clamped.amax(1) * (1 + 1e-12)).all()


@given(seeds, counts, powers, st.floats(1e-3, 1e3))
def test_it_scales_with_values_above_the_clamp(seed: int, N: int, p: float, factor: float):
    x, power = 0.1 + normal(2, N, 3, seed=seed).abs(), torch.full((3,), p, dtype=torch.float64)
    torch.testing.assert_close(power_mean(factor * x, power), factor * power_mean(x, power), rtol=1e-12, atol=0)


@given(seeds, st.integers(2, 9), powers)
def test_the_order_of_the_patches_is_nothing_to_it(seed: int, N: int, p: float):
    x, power = normal(2, N, 3, seed=seed), torch.full((3,), p, dtype=torch.float64)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(power_mean(x[:, order], power), power_mean(x, power), rtol=1e-12, atol=0)


@given(seeds, counts)
def test_exponent_one_is_the_mean_of_the_clamped_values(seed: int, N: int):
    x = normal(2, N, 4, seed=seed)
    torch.testing.assert_close(power_mean(x, torch.ones(4)), x.clamp(min=GEM_EPS).mean(1), rtol=1e-12, atol=0)
    ours, relu = pooling(Component("gem", p=1.0), 4, N), pooling(Component("relu_mean"), 4, N)
    torch.testing.assert_close(ours(x).detach(), relu(x), rtol=0, atol=GEM_EPS)
    assert torch.equal(relu(x), x.relu().mean(1))


@given(seeds, counts)
def test_a_large_exponent_is_the_maximum(seed: int, N: int):
    x = normal(2, N, 4, seed=seed).abs() + 1e-3
    p = 1e4
    # N^(-1/p) of the maximum at the least.
    torch.testing.assert_close(power_mean(x, torch.full((4,), p, dtype=torch.float64)), x.amax(1), rtol=3 / p, atol=0)


@given(seeds, st.integers(2, 5))
@settings(max_examples=20)
def test_gradients_are_those_of_finite_differences(seed: int, N: int):
    x = (0.2 + normal(2, N, 3, seed=seed).abs()).requires_grad_()
    p = (0.5 + 5 * torch.rand(3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)).requires_grad_()
    assert torch.autograd.gradcheck(power_mean, (x, p))


@given(seeds, st.integers(1, 6))
def test_gradients_are_those_of_the_formula(seed: int, N: int):
    x = (0.2 + normal(1, N, 1, seed=seed).abs()).requires_grad_()
    p = exponents(0.5 + seed % 7).requires_grad_()
    z = power_mean(x, p)
    z.sum().backward()
    with torch.no_grad():
        weights = x**p / (x**p).sum(1, keepdim=True)
        by_p = z / p * ((weights * x.log()).sum(1) - z.log())
        by_x = (x / z.unsqueeze(1)) ** (p - 1) / N
    assert p.grad is not None
    assert x.grad is not None
    torch.testing.assert_close(p.grad, by_p.squeeze(0), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(x.grad, by_x, rtol=1e-9, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("p", [0.01, 1.0, 7.6, 50.0, 1e4])
def test_a_channel_without_positive_values_is_exactly_the_clamp(p: float, dtype: torch.dtype):
    x = torch.full((1, 7, 2), -1.0, dtype=dtype, requires_grad=True)
    power = torch.full((2,), p, dtype=dtype, requires_grad=True)
    z = power_mean(x, power)
    assert torch.equal(z, torch.full((1, 2), GEM_EPS, dtype=dtype))
    z.sum().backward()
    assert power.grad is not None
    assert x.grad is not None
    assert not x.grad.any()
    assert power.grad.isfinite().all()


@given(seeds, st.floats(0.5, 50), st.sampled_from([1e-8, 1e-3, 1.0, 1e3]), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
def test_nothing_overflows_in_any_precision(seed: int, p: float, scale: float, dtype: torch.dtype):
    x = (scale * normal(2, 7, 3, seed=seed)).to(dtype).requires_grad_()
    power = torch.full((3,), p, requires_grad=True)
    z = power_mean(x, power)
    assert z.dtype == dtype
    z.float().sum().backward()
    for value in (z, x.grad, power.grad):
        assert value is not None
        assert value.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_raised_inside_also_under_autocast(dtype: torch.dtype):
    x, p = normal(2, 7, 3).to(dtype), torch.full((3,), 20.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z = power_mean(x, p)
    assert torch.equal(z, power_mean(x.float(), p).to(dtype))


def test_one_group_is_gem_and_as_many_as_channels_give_each_its_own():
    x = normal(2, 5, 6, dtype=torch.float32)
    gem, whole = (pooling(part, 6, 5) for part in (Component("gem", p=2.0), Component("ggem", groups=1, p=2.0)))
    assert torch.equal(gem(x), whole(x))
    each = pooling(Component("ggem", groups=6, p=2.0), 6, 5)
    assert torch.equal(each(x), gem(x))
    with torch.no_grad():
        each.p.copy_(torch.arange(1.0, 7.0))
    one_by_one = [power_mean(x[..., c : c + 1], torch.tensor([c + 1.0])) for c in range(6)]
    torch.testing.assert_close(each(x), torch.cat(one_by_one, dim=1))


def test_groups_are_slices_of_channels():
    grouped = pooling(Component("ggem", groups=2), 6, 5, num_prefix=1)
    with torch.no_grad():
        grouped.p.copy_(torch.tensor([1.0, 4.0]))
    x = normal(2, 6, 6, dtype=torch.float32)
    assert torch.equal(grouped(x), power_mean(x[:, 1:], torch.tensor([1.0, 1, 1, 4, 4, 4])))


@pytest.mark.parametrize("name", ["mean", "relu_mean", "max", "gem"])
def test_prefix_tokens_are_left_out(name: str):
    made = pooling(Component(name), 4, 3, num_prefix=2)
    x = normal(1, 5, 4, dtype=torch.float32)
    changed = x.clone()
    changed[:, :2] = 9
    assert torch.equal(made(changed), made(x))


def test_a_frozen_exponent_pools_alike_and_is_no_weight():
    x = normal(2, 5, 6, dtype=torch.float32)
    learned, frozen = (pooling(Component("gem", p=2.0, learned=learned), 6, 5) for learned in (True, False))
    assert torch.equal(frozen(x), learned(x))
    assert list(learned.state_dict()) == ["p"]
    assert not list(frozen.parameters())
    assert not frozen.state_dict()


@pytest.mark.parametrize("step", [1e2, 1e10])
def test_an_exponent_that_a_step_pushed_below_zero_pools_at_the_least_and_comes_back(step: float):
    made = pooling(Component("ggem", groups=2), 4, 5)
    x = normal(3, 5, 4, dtype=torch.float32).abs() + 0.1
    optimizer = torch.optim.SGD(made.parameters(), lr=step)
    made(x).sum().backward()
    optimizer.step()
    assert (made.p < 0).all()
    z = made(x)
    assert torch.equal(z, power_mean(x, torch.full((4,), MIN_EXPONENT)))
    optimizer = torch.optim.SGD(made.parameters(), lr=step, maximize=True)
    below = made.p.detach().clone()
    optimizer.zero_grad()
    z.sum().backward()
    optimizer.step()
    assert (made.p > below).all()
