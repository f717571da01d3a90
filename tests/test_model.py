"""Facts about models beyond the contract of their kinds: shared initial weights, class rows, parameters sorted for the optimizer."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_spec import tiny
from test_timm_spec import CONVNEXT
from torch import nn

from space.model import Model, as_arch, build_model, decay_exempt, exponent_parameters, model_from_json, supports_class_row
from space.registry import SpecError
from space.spec import ArchSpec, Component, StageSpec


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], 'an object is expected whose "model" is one of "arch", "stitch", "subnet", "timm"'),
        ({"name": "resnet18"}, 'an object is expected whose "model" is one of "arch", "stitch", "subnet", "timm"'),
        ({"model": "tim"}, "unknown kind of model 'tim'; did you mean 'timm'"),
        ({"model": {"model": "arch"}}, 'an object is expected whose "model" is one of "arch", "stitch", "subnet", "timm"'),
        ({"model": "arch"}, "spec lacks stages"),
    ],
)
def test_what_is_no_model_is_refused(data, message: str):
    with pytest.raises(SpecError, match=message):
        model_from_json(data)


def changed(**parts) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The weights of one seed without and with other parts."""
    return build_model(tiny(), seed=5).state_dict(), build_model(tiny(**parts), seed=5).state_dict()


@pytest.mark.parametrize(
    "pooling", [Component("gem"), Component("ggem", groups=4), Component("relu_mean"), Component("gem", learned=False)]
)
def test_networks_that_differ_in_pooling_share_all_other_weights(pooling: Component):
    one, other = changed(pooling=pooling)
    assert other.keys() - one.keys() <= {"pooling.p"}
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_deeper_network_shares_the_weights_of_the_shallower():
    block = tiny().stages[0].blocks[0]
    one, other = changed(stages=(StageSpec(embed_dim=16, blocks=(block,) * 4),))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert other.keys() - one.keys()


def test_two_layers_of_one_shape_have_weights_of_their_own():
    weights = build_model(tiny(), seed=0).state_dict()
    first, second = (weights[f"stages.0.blocks.{number}.mixer.qkv.weight"] for number in (0, 1))
    assert not torch.equal(first, second)


def with_last(**block) -> ArchSpec:
    first = tiny().stages[0].blocks[0]
    return tiny(stages=(StageSpec(embed_dim=16, blocks=(first, dataclasses.replace(first, **block))),))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (tiny(), None),
        (tiny(prefix=Component("class_token", num_registers=3), pooling=Component("mean")), None),
        (CONVNEXT, "models of timm give no attention"),
        (tiny(prefix=None, pooling=Component("mean")), "there is no class token; add the prefix 'class_token'"),
    ],
)
def test_the_class_row_is_refused_with_the_reason(model: Model, reason: str | None):
    assert supports_class_row(model) == reason
    if reason and as_arch(model):
        with pytest.raises(SpecError, match=reason):
            build_model(model, seed=0)(torch.zeros(1, 3, 32, 32), with_class_row=True)


def test_what_gets_no_weight_decay():
    registers = tiny(prefix=Component("class_token", num_registers=2), pooling=Component("ggem", groups=4))
    model = build_model(registers, seed=0)
    exempt = decay_exempt(model)
    assert {"prefix.class_token", "prefix.registers", "position.pos_embed", "pooling.p", "norm.weight", "head.bias"} <= exempt
    decayed = dict(model.named_parameters()).keys() - exempt
    assert decayed == {"patch_embed.proj.weight", "head.weight"} | {
        f"stages.0.blocks.{number}.{layer}.weight"
        for number in (0, 1)
        for layer in ("mixer.qkv", "mixer.proj", "feed_forward.mlp.fc1", "feed_forward.mlp.fc2")
    }


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnextv2_atto", "swin_tiny_patch4_window7_224", "resnet18"])
def test_the_decay_of_a_timm_model_is_as_timm_has_it(name: str):
    import timm
    from timm.optim import param_groups_weight_decay

    with torch.device("meta"):
        model = timm.create_model(name)
    no_decay, _ = param_groups_weight_decay(model, no_weight_decay_list=getattr(model, "no_weight_decay", set)())
    theirs = {id(parameter) for parameter in no_decay["params"]}
    assert decay_exempt(model) == {name for name, parameter in model.named_parameters() if id(parameter) in theirs}


def test_names_reach_through_wrappers():
    model = build_model(tiny(pooling=Component("gem")), seed=0)
    wrapped = nn.Sequential(model)
    assert exponent_parameters(wrapped) == {"0.pooling.p"}
    assert decay_exempt(wrapped) == {f"0.{name}" for name in decay_exempt(model)}


@pytest.mark.parametrize(
    ("pooling", "exponents"),
    [
        (Component("gem"), {"pooling.p"}),
        (Component("ggem", groups=2), {"pooling.p"}),
        (Component("gem", learned=False), set()),
        (Component("mean"), set()),
    ],
)
def test_exponents_are_those_of_a_learned_pooling(pooling: Component, exponents: set[str]):
    assert exponent_parameters(build_model(tiny(pooling=pooling), seed=0)) == exponents


def test_a_timm_model_has_no_exponents():
    assert exponent_parameters(build_model(CONVNEXT, seed=0)) == set()
