"""Slices of a wide network's tensors: what the narrow network gives with them, and what the wide one gives that is zero elsewhere."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_components import CASES, EVERY, built, host, images
from torch import Tensor, nn
from torch.func import functional_call

from space.component import ImageShape, TokenShape
from space.layout import Part, layout
from space.registry import SpecError
from space.slicing import sliced, subnet_tensors
from space.spec import ArchSpec, BlockSpec, Component, canonical, full_choices
from space.subnet_spec import SubnetSpec
from space.vit import initialize

FRACTIONS = (3 / 4, 2 / 3, 1 / 2, 1 / 3)


def reduced(kind: str, part: Component) -> Iterator[Component]:
    """The component itself, and with one whole number halved."""
    yield part
    for name, value in full_choices(kind, part).items():
        if type(value) is int and value > 1:
            yield Component(part.name, **part.choices | {name: value // 2})


def narrower(kind: str, whole: Component) -> Iterator[SubnetSpec]:
    """Subnets of the network that holds the component: narrower tokens, and the component itself or narrower."""
    supernet = host(kind, whole)
    for part in reduced(kind, canonical(kind, whole)):
        subnets = (subnet_of(supernet, kind, canonical(kind, whole), part, fraction) for fraction in FRACTIONS)
        # The widest that components and slices allow: some want a multiple of 4, others of their groups.
        yield from list(filter(None, subnets))[:1]


def subnet_of(supernet: ArchSpec, kind: str, whole: Component, part: Component, fraction: float) -> SubnetSpec | None:
    def exchanged(spec: Any) -> dict[str, Component]:
        return {field.name: part for field in dataclasses.fields(spec) if field.name == kind and getattr(spec, field.name) == whole}

    def narrow_block(block: BlockSpec) -> BlockSpec:
        return dataclasses.replace(block, **exchanged(block))

    try:
        stages = tuple(
            dataclasses.replace(
                stage, embed_dim=int(stage.embed_dim * fraction), blocks=tuple(map(narrow_block, stage.blocks)), **exchanged(stage)
            )
            for stage in supernet.stages
        )
        arch = dataclasses.replace(supernet, stages=stages, **exchanged(supernet))
        subnet = SubnetSpec(supernet=supernet, arch=arch, kept=tuple(tuple(range(len(stage.blocks))) for stage in stages))
        subnet_tensors(subnet, {})
    except SpecError:
        return None
    return subnet


@EVERY
def test_slices_have_the_shapes_outputs_and_gradients_of_the_narrow_network(kind: str, part: Component):
    subnets = list(narrower(kind, part))
    assert subnets, "no width of the network could be reduced"
    for subnet in subnets:
        wide, narrow = built(subnet.supernet), built(subnet.arch)
        slices = subnet_tensors(subnet, wide.state_dict(keep_vars=True))
        assert {name: tensor.shape for name, tensor in slices.items()} == {name: own.shape for name, own in narrow.state_dict().items()}
        x, weight = images(subnet.img_size), torch.linspace(-1, 2, 7)
        shared = functional_call(narrow, slices, (x,))
        (shared * weight).sum().backward()
        narrow.load_state_dict(slices)
        alone = narrow(x)
        (alone * weight).sum().backward()
        torch.testing.assert_close(shared, alone, rtol=0, atol=0)
        places = subnet_tensors(subnet, {name: numbered(parameter) for name, parameter in wide.named_parameters()})
        for name, parameter in narrow.named_parameters():
            gradient = wide.get_parameter(name).grad
            assert gradient is not None
            kept = torch.zeros(gradient.numel(), dtype=torch.bool).scatter(0, places[name].flatten(), True)
            assert kept.sum() == parameter.numel(), f"{name}: an entry of the wide tensor stands twice in the slice"
            torch.testing.assert_close(gradient.flatten()[places[name].flatten()], parameter.grad.flatten(), rtol=1e-5, atol=1e-6)
            assert not gradient.flatten()[~kept].any(), name


def numbered(tensor: Tensor) -> Tensor:
    return torch.arange(tensor.numel()).reshape(tensor.shape)


LINEAR_IN_ITS_WIDTHS = {
    *("attention", "window_attention", "mlp", "learned", "class_token", "conv", "residual_conv_stem", "linear", "tanh_mlp")
}
"""Components that entries of zero, in weights and tokens, do not change; a norm over them or a power mean looks at all channels."""
WITHOUT_NORM = [(kind, part) for kind, part in CASES if part.name in LINEAR_IN_ITS_WIDTHS and not part.choices.get("norm")]


@pytest.mark.parametrize(("kind", "part"), WITHOUT_NORM, ids=[f"{kind}-{part!r}" for kind, part in WITHOUT_NORM])
def test_a_wide_module_that_is_zero_outside_the_slice_gives_what_the_narrow_one_gives(kind: str, part: Component):
    for subnet in narrower(kind, part):
        wide_part, narrow_part = (next(each for each in layout(spec) if each.kind == kind) for spec in (subnet.supernet, subnet.arch))
        if any(wide_part.arguments.get(name) != narrow_part.arguments.get(name) for name in ("head_dim", "kernel", "splits")):
            continue  # The scale of attention, the patch and the window are no widths.
        wide, narrow = module_of(wide_part), module_of(narrow_part)
        own = {f"{wide_part.path}.{name}": tensor for name, tensor in wide.state_dict().items()}
        narrow.load_state_dict(relative(subnet_tensors(subnet, own), narrow_part))
        places = relative(subnet_tensors(subnet, {name: numbered(tensor) for name, tensor in own.items()}), narrow_part)
        with torch.no_grad():
            for name, parameter in wide.named_parameters():
                kept = torch.zeros(parameter.numel()).scatter(0, places[name].flatten(), 1.0)
                parameter *= kept.reshape(parameter.shape)
            x = input_of(narrow_part)
            expected = narrow(x)
            wider = x if kind == "patch_embed" else F.pad(x, (0, wide_part.shape[0] - narrow_part.shape[0]))
            torch.testing.assert_close(wide(wider)[..., : expected.shape[-1]], expected, rtol=1e-5, atol=1e-6)  # fp32 order of sums


def relative(tensors: dict[str, Tensor], part: Part) -> dict[str, Tensor]:
    return {name.removeprefix(f"{part.path}."): tensor for name, tensor in tensors.items() if name.startswith(f"{part.path}.")}


def module_of(part: Part) -> nn.Module:
    made = part.module_class(part.shape, **part.arguments)
    initialize(made, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for parameter in made.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1
    return made.eval()


def input_of(part: Part) -> Tensor:
    generator = torch.Generator().manual_seed(2)
    if isinstance(part.shape, ImageShape):
        return torch.randn(2, *part.shape, generator=generator)
    assert isinstance(part.shape, TokenShape)
    tokens = (part.shape.num_tokens,) if part.kind != "head" else ()
    return torch.randn(2, *tokens, part.shape.dim, generator=generator)


def test_fused_queries_keys_and_values_are_cut_by_part_head_and_head_dim():
    rows = torch.arange(3 * 4 * 6).reshape(-1, 1)
    kept = sliced(rows, ((3, 4, 6), (1,)), ((3, 2, 5), (1,)))
    expected = [part * 24 + head * 6 + index for part in range(3) for head in range(2) for index in range(5)]
    assert kept.flatten().tolist() == expected


def test_a_plain_slice_is_a_view():
    tensor = torch.zeros(4, 6)
    assert sliced(tensor, ((4,), (6,)), ((2,), (3,))).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()


def test_another_number_of_tokens_is_no_slice():
    supernet = host("prefix", Component("class_token", num_registers=4))
    arch = dataclasses.replace(supernet, prefix=Component("class_token", num_registers=2))
    subnet = SubnetSpec(supernet=supernet, arch=arch, kept=((0, 1),))
    with pytest.raises(SpecError, match=r"position sees TokenShape.*only widths are sliced"):
        subnet_tensors(subnet, {})
