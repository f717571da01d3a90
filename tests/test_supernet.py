"""The supernet: a subnet in it is the network of its own spec, whatever the supernet is made of."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from supernets import autoformer, drawn, resnas
from torch import Tensor, nn

from space.component import Cost, component
from space.registry import SpecError
from space.slicing import subnet_slices
from space.spec import Component
from space.supernet import Supernet, first_difference, supernet_from_tensors
from space.supernet_space import SupernetSpace

pytestmark = pytest.mark.usefixtures("one_thread")

SPACES = {"resnas": resnas(), "autoformer": autoformer()}
IMAGES = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
SEEDS = st.integers(0, 2**31)


def supernet_of(space: SupernetSpace, **how) -> Supernet:
    """In evaluation mode, with weights far from their initial zeros and ones, batch statistics included."""
    supernet = Supernet(space.largest, **how).eval()
    generator = torch.Generator().manual_seed(1)
    for tensor in supernet.network.state_dict().values():
        if tensor.is_floating_point():
            tensor += 0.1 * torch.rand(tensor.shape, generator=generator)
    return supernet


def backward(*logits: Tensor) -> None:
    sum(((each * torch.linspace(-1, 2, each.shape[1])).sum() for each in logits), torch.zeros(())).backward()


def gradients(supernet: Supernet) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in supernet.network.named_parameters() if parameter.grad is not None}


def assert_near(found: Tensor, expected: Tensor) -> None:
    # atol: float32 sums in another order
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", SPACES)
@given(seed=SEEDS)
@settings(max_examples=25)
def test_a_subnet_is_the_network_of_its_own_spec(name: str, seed: int):
    """Outputs and gradients; weights that the subnet does not have get zero, blocks that it leaves out none at all."""
    space, supernet = SPACES[name], supernet_of(SPACES[name])
    subnet = drawn(space, seed)
    alone = supernet.extract(subnet)
    assert alone.spec == subnet.arch
    assert not {tensor.data_ptr() for tensor in alone.parameters()} & {tensor.data_ptr() for tensor in supernet.parameters()}
    shared, expected = supernet(IMAGES, subnet), alone(IMAGES)
    assert_near(shared, expected)
    backward(shared)
    backward(expected)
    found, own = gradients(supernet), dict(alone.named_parameters())
    slices = [each for each in subnet_slices(subnet) if each.name in own]
    assert found.keys() == {each.origin for each in slices}
    for each in slices:
        gradient = own[each.name].grad
        assert gradient is not None
        assert_near(each.read(found[each.origin]), gradient)
        assert found[each.origin].count_nonzero() <= gradient.numel()


@pytest.mark.parametrize("name", SPACES)
@given(seeds=st.lists(SEEDS, min_size=1, max_size=3))
@settings(max_examples=15)
def test_a_step_of_several_subnets_is_the_sum_of_their_single_steps(name: str, seeds: list[int]):
    """In training mode: the batch statistics of a stem that is shared are those of the whole batch, for each of them."""
    space = SPACES[name]
    subnets = [drawn(space, seed) for seed in seeds]
    together = supernet_of(space).train()
    embedded = together.embed(IMAGES)
    backward(*(together.run(embedded[place :: len(subnets)], subnet) for place, subnet in enumerate(subnets)))
    expected: dict[str, Tensor] = {}
    for place, subnet in enumerate(subnets):
        single = supernet_of(space).train()
        backward(single.run(single.embed(IMAGES)[place :: len(subnets)], subnet))
        for key, gradient in gradients(single).items():
            expected[key] = expected.get(key, torch.zeros(())) + gradient
    assert gradients(together).keys() == expected.keys()
    for key, gradient in gradients(together).items():
        assert_near(gradient, expected[key])


def test_a_block_of_an_extracted_network_is_the_one_that_it_was_in_the_supernet():
    space = SPACES["resnas"]
    supernet = supernet_of(space)
    alone = supernet.extract(space.subnet(space.largest_point | {"keep1_2": False, "hidden_dim1_3": 5}))
    block, origin = alone.stages[0].blocks[1], supernet.network.stages[0].blocks[2]
    assert torch.equal(block.mixer.qkv.weight, origin.mixer.qkv.weight)
    assert torch.equal(block.feed_forward.mlp.fc1.weight, origin.feed_forward.mlp.fc1.weight[:5])
    assert torch.equal(block.feed_forward.mlp.fc2.weight, origin.feed_forward.mlp.fc2.weight[:, :5])


@pytest.mark.parametrize("name", SPACES)
def test_weights_are_views_save_where_a_fused_dimension_forces_a_copy(name: str):
    space = SPACES[name]
    supernet, subnet = supernet_of(space), space.subnet(space.smallest_point)
    full = supernet.network.state_dict()
    copied = {each.name for each in subnet_slices(subnet) if each.read(full[each.origin]).data_ptr() != full[each.origin].data_ptr()}
    # Queries, keys and values of fewer heads lie apart; the slice of a single dimension is a view.
    assert {key.rpartition("mixer.")[2] for key in copied} == {"qkv.weight", "qkv.bias"}


def test_a_stem_that_slices_its_output_runs_once_for_all_subnets():
    space = SPACES["resnas"]
    supernet = supernet_of(space).train()
    before = supernet.network.patch_embed.norm1.num_batches_tracked.item()
    embedded = supernet.embed(IMAGES)
    for seed in range(3):
        supernet.run(embedded, drawn(space, seed))
    assert embedded.shape[-1] == space.largest.stages[0].embed_dim
    assert supernet.network.patch_embed.norm1.num_batches_tracked.item() == before + 1
    assert SPACES["autoformer"].largest.patch_embed.name == "conv"
    assert Supernet(SPACES["autoformer"].largest).embed(IMAGES) is IMAGES


def test_a_step_begins_with_gradients_of_zero_in_the_memory_of_the_last():
    space = SPACES["resnas"]
    supernet, small = supernet_of(space), space.subnet(space.smallest_point)
    backward(supernet(IMAGES, small))
    first = {name: gradient.clone() for name, gradient in gradients(supernet).items()}
    places = {name: gradient.data_ptr() for name, gradient in gradients(supernet).items()}
    backward(supernet(IMAGES, small))
    for name, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, 2 * first[name])
    supernet.zero_grad(set_to_none=True)
    backward(supernet(IMAGES, small))
    for name, gradient in gradients(supernet).items():
        torch.testing.assert_close(gradient, first[name], rtol=0, atol=0)
    narrow = {each.origin for each in subnet_slices(small) if not each.is_whole}
    assert all(gradient.data_ptr() == places[name] for name, gradient in gradients(supernet).items() if name in narrow)


def test_dropped_blocks_are_not_run():
    space, ran = SPACES["resnas"], []
    subnet = space.subnet(space.largest_point | {"keep1_2": False})
    supernet = supernet_of(space)
    supernet.network.stages[0].blocks[1].mixer.proj.weight.data.fill_(torch.nan)
    handle = nn.modules.module.register_module_forward_hook(lambda module, given, out: ran.append(type(module).__name__))
    try:
        logits = supernet(IMAGES, subnet)
    finally:
        handle.remove()
    assert torch.isfinite(logits).all()
    assert ran.count("Attention") == subnet.arch.depth == 4


def test_a_block_keeps_its_drop_path_when_one_before_it_is_left_out():
    space = SPACES["resnas"]
    subnet = space.subnet(space.largest_point | {"keep1_2": False})
    supernet = Supernet(space.largest, drop_path=0.6)
    full = [getattr(block.drop_path, "drop_prob", 0.0) for stage in supernet.network.stages for block in stage.blocks]
    assert full == pytest.approx([0, 0.15, 0.3, 0.45, 0.6])
    met = []
    handle = nn.modules.module.register_module_forward_hook(
        lambda module, given, out: met.append(module.drop_prob) if type(module).__name__ == "DropPath" else None
    )
    try:
        supernet.train()(IMAGES, subnet)
        assert met == pytest.approx([0.3, 0.3, 0.45, 0.45, 0.6, 0.6])
        supernet.eval()
        torch.testing.assert_close(supernet(IMAGES, subnet), supernet(IMAGES, subnet), rtol=0, atol=0)
    finally:
        handle.remove()


def test_a_subnet_that_first_ran_for_inference_alone_can_be_trained():
    """What is computed from shapes, such as tables of distances, is kept from call to call."""
    space = SPACES["autoformer"]
    supernet, subnet = supernet_of(space), drawn(space, 123)
    with torch.inference_mode():
        first = supernet(IMAGES, subnet).clone()
    logits = supernet(IMAGES, subnet)
    assert_near(logits, first)
    backward(logits)
    assert gradients(supernet)


def test_tensors_become_a_supernet_without_a_copy():
    space = SPACES["autoformer"]
    supernet, subnet = supernet_of(space), drawn(space, 5)
    tensors = supernet.network.state_dict()
    again = supernet_from_tensors(space.largest, tensors)
    assert {tensor.data_ptr() for tensor in again.parameters()} == {tensor.data_ptr() for tensor in tensors.values()}
    assert_near(again(IMAGES, subnet), supernet(IMAGES, subnet))
    assert not any(parameter.requires_grad for parameter in again.parameters())
    other = replace(space.largest, num_classes=7)
    with pytest.raises(SpecError, match=r"another network: head.*\[0\] is 10, not 7"):
        supernet_from_tensors(other, tensors)


def test_a_subnet_of_another_supernet_is_refused_with_the_difference():
    space = SPACES["resnas"]
    other = replace(space, largest=replace(space.largest, num_classes=7))
    with pytest.raises(SpecError, match="cut out of another supernet: num_classes is 7, not 10"):
        Supernet(space.largest)(IMAGES, drawn(other, 0))


@component("norm", "batch_norm_of_tokens")
class BatchNormOfTokens(nn.BatchNorm1d):
    """A norm whose statistics would depend on the subnets of a step."""

    def __init__(self, shape):
        super().__init__(shape.dim)

    @staticmethod
    def cost(shape) -> Cost:
        return Cost(params=2 * shape.dim)


def test_batch_statistics_that_depend_on_the_path_are_refused_with_the_reason():
    largest = replace(SPACES["autoformer"].largest, norm=Component("batch_norm_of_tokens"))
    with pytest.raises(SpecError, match=r"batch statistics of stages.0.blocks.0.norm1: they depend on the subnets of a step"):
        Supernet(largest)


def test_the_first_difference_of_two_values_is_named():
    assert first_difference({"a": [1, {"b": 2}]}, {"a": [1, {"b": 3}]}) == "a[1].b is 2, not 3"
    assert first_difference({"a": 1}, {"a": 1}) == ""
    assert first_difference({"a": 1, "b": 2}, {"a": 1}) == "b is 2, not missing"
    assert first_difference({"a": [1]}, {"a": [1, 2]}) == "a is [1], not [1, 2]"
    assert first_difference({"a": [{"b": 1}]}, {"a": []}) == "a has 1 entries, not 0"
