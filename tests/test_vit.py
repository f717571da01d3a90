"""The built network: timm's logits with timm's weights, weights from a generator, drop path."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_spec import WITH_GRID, tiny
from torch import nn

from space.families.deit3 import deit3_vit
from space.families.vit import plain_vit
from space.layout import layout
from space.model import fit_tensors
from space.registry import SpecError
from space.spec import ArchSpec, Component
from space.vit import build, initialize

DEIT_TINY_CUT = dataclasses.replace(plain_vit(192, 3, 3), img_size=64)


def timm_vit(**changes) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(embed_dim=192, depth=3, num_heads=3, img_size=64, **changes).eval()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MEAN = {"pooling": Component("mean")}
TIMM_MEAN = {"global_pool": "avg", "fc_norm": False}


@pytest.mark.parametrize(
    ("changes", "timm_changes"),
    [
        ({}, {}),
        ({"prefix": Component("class_token", num_registers=2)} | MEAN, {"reg_tokens": 2} | TIMM_MEAN),
        ({"prefix": None} | MEAN, {"class_token": False} | TIMM_MEAN),
        ({"position": None}, {"pos_embed": "none"}),
    ],
    ids=["class_token", "registers_and_mean", "no_prefix", "no_position"],
)
def test_timm_weights_give_timm_logits(changes: dict, timm_changes: dict):
    theirs = timm_vit(**timm_changes)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    ours = build(dataclasses.replace(DEIT_TINY_CUT, **changes)).eval()
    ours.load_state_dict(fit_tensors(ours.spec, theirs.state_dict()).tensors)
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=1e-5)  # fp32 order of sums


PATCHES_ONLY = {"position": Component("learned", covers_prefix=False)}


@pytest.mark.parametrize(
    ("name", "ours", "changes"),
    [
        ("vit_tiny_patch16_224", plain_vit(192, 2, 3), {}),
        ("vit_small_patch16_224", plain_vit(384, 2, 6), {}),
        ("vit_base_patch16_224", plain_vit(768, 2, 12), {}),
        ("deit_tiny_patch16_224", plain_vit(192, 2, 3), {}),
        ("deit_small_patch16_224", plain_vit(384, 2, 6), {}),
        ("deit_base_patch16_224", plain_vit(768, 2, 12), {}),
        ("deit3_small_patch16_224", deit3_vit(384, 2, 6), {}),
        ("deit3_base_patch16_224", deit3_vit(768, 2, 12), {}),
        ("deit3_large_patch16_224", deit3_vit(1024, 2, 16), {}),
        (
            "vit_small_patch14_reg4_dinov2",
            dataclasses.replace(deit3_vit(384, 2, 6), img_size=56, patch_embed=Component("conv", kernel=14, stride=14)),
            {"prefix": Component("class_token", num_registers=4)},
        ),
    ],
)
def test_weights_of_a_network_of_timm_are_ours_and_give_its_logits(name: str, ours: ArchSpec, changes: dict):
    import timm

    spec = dataclasses.replace(ours, **changes)
    torch.manual_seed(0)
    theirs = timm.create_model(name, depth=2, img_size=spec.img_size, num_classes=spec.num_classes).eval()
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if parameter_name.endswith("gamma"):
                parameter.uniform_(0.1, 1.0)  # At their first 1e-6 they would hide a wrong block.
    fitted = fit_tensors(spec, theirs.state_dict())
    assert fitted.changes == ()
    network = build(spec).eval()
    network.load_state_dict(fitted.tensors)
    x = torch.randn(1, 3, spec.img_size, spec.img_size)
    with torch.no_grad():
        torch.testing.assert_close(network(x), theirs(x), rtol=1e-5, atol=1e-5)  # fp32 order of sums


def test_tensors_of_another_architecture_are_refused():
    with pytest.raises(SpecError, match=r"pos_embed has 19 positions: without 1 of prefix tokens they fill no square grid"):
        fit_tensors(DEIT_TINY_CUT, timm_vit(reg_tokens=2).state_dict())
    with pytest.raises(SpecError, match=r"prefix.registers is left over"):
        fit_tensors(DEIT_TINY_CUT, timm_vit().state_dict() | {"reg_token": torch.zeros(1, 2, 192)})
    with pytest.raises(SpecError, match=r"no stages.0.blocks.2.*and \d+ more"):
        fit_tensors(DEIT_TINY_CUT, {name: weight for name, weight in timm_vit().state_dict().items() if "blocks.2" not in name})
    with pytest.raises(SpecError, match=r"head.weight is \(1000, 192\) and should be \(1000, 96\)"):
        fit_tensors(plain_vit(96, 3, 3), build(plain_vit(96, 3, 3)).state_dict() | {"head.weight": torch.zeros(1000, 192)})
    with pytest.raises(SpecError, match="pos_embed has 17 positions: without 0 of prefix tokens they fill no square grid"):
        fit_tensors(dataclasses.replace(DEIT_TINY_CUT, img_size=96, **PATCHES_ONLY), timm_vit().state_dict())


def test_modules_are_named_by_their_path():
    model = build(WITH_GRID)
    for part in layout(WITH_GRID):
        assert type(model.get_submodule(part.path)) is part.module_class


def test_the_generator_alone_decides_the_weights():
    one, same, other = (build(WITH_GRID, generator=seeded(seed)).state_dict() for seed in (3, 3, 4))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["head.fc1.weight"], other["head.fc1.weight"])


def test_a_seeded_build_leaves_the_global_stream_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    build(tiny(), generator=seeded(0))
    assert torch.equal(torch.rand(3), expected)


def test_without_a_generator_the_global_stream_decides():
    torch.manual_seed(0)
    one = build(tiny()).head.weight
    two = build(tiny()).head.weight
    torch.manual_seed(0)
    assert torch.equal(build(tiny()).head.weight, one)
    assert not torch.equal(one, two)


def test_initial_weights_have_their_stated_distributions():
    model = build(dataclasses.replace(plain_vit(192, 1, 3), pooling=Component("gem", p=2.0)), generator=seeded(0))
    weights = dict(model.named_parameters())
    assert weights["stages.0.blocks.0.mixer.qkv.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    assert weights["position.pos_embed"].std().item() == pytest.approx(0.02, rel=0.02)
    assert 0 < weights["prefix.class_token"].abs().max().item() < 1e-5
    bound = (3 * 16 * 16) ** -0.5
    assert weights["patch_embed.proj.weight"].abs().max().item() == pytest.approx(bound, rel=0.01)
    assert 0 < weights["patch_embed.proj.bias"].abs().max().item() <= bound
    assert not weights["stages.0.blocks.0.mixer.qkv.bias"].any()
    assert torch.equal(weights["norm.weight"], torch.ones(192))
    assert weights["pooling.p"].item() == 2.0


def test_initialize_draws_a_single_module_too():
    layer, other = nn.Linear(4, 4), nn.Linear(4, 4)
    initialize(layer, seeded(0))
    initialize(other, seeded(0))
    assert torch.equal(layer.weight, other.weight)


def test_drop_path_rises_linearly_over_the_depth():
    from timm.layers.drop import DropPath

    deep = build(plain_vit(16, 5, 2), drop_path=0.4)
    rates = [module.drop_prob for module in deep.modules() if isinstance(module, DropPath)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4])
    assert not [module for module in build(tiny()).modules() if isinstance(module, DropPath)]
    with pytest.raises(ValueError, match=r"drop_path is 1.0; allowed"):
        build(tiny(), drop_path=1.0)


def test_tokens_come_out_before_the_final_norm():
    model = build(tiny()).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        tokens = model.forward_tokens(x)
        assert tokens.shape == (2, 17, 16)
        assert torch.equal(model.head(model.pooling(model.norm(tokens))), model(x))


REGISTERS = {"prefix": Component("class_token", num_registers=2)}


@pytest.mark.parametrize("changes", [{}, REGISTERS], ids=["class_token", "registers"])
def test_the_class_row_is_that_of_the_whole_attention_map(changes: dict):
    spec = tiny(**changes)
    model = build(spec, generator=seeded(0)).eval()
    x = torch.randn(3, 3, 32, 32)
    entered: list[torch.Tensor] = []
    last = model.stages[0].blocks[1].mixer
    last.register_forward_hook(lambda _, inputs, __: entered.append(inputs[0]))
    with torch.no_grad():
        plain = model(x)
        logits, row = model(x, with_class_row=True)
        q, k, _ = last.qkv(entered[0]).reshape(3, -1, 3, 2, 8).permute(2, 0, 3, 1, 4)
    assert torch.equal(logits, plain)
    attention = (q @ k.mT * 8**-0.5).softmax(-1)
    num_prefix = attention.shape[-1] - 16
    torch.testing.assert_close(row, attention.mean(1)[:, 0, num_prefix:], rtol=1e-5, atol=1e-6)  # fp32 order of sums
    assert row.shape == (3, 16)


def test_the_class_row_and_the_logits_are_the_same_while_training():
    model = build(tiny(), generator=seeded(0), drop_path=0.3)
    x = torch.randn(4, 3, 32, 32)
    torch.manual_seed(1)
    plain = model(x)
    torch.manual_seed(1)
    logits, row = model(x, with_class_row=True)
    assert torch.equal(logits, plain)
    (gradient,) = torch.autograd.grad(row.amax(), model.stages[0].blocks[1].mixer.qkv.weight)
    assert gradient.any()


def test_a_network_without_a_class_row_says_why():
    model = build(tiny(prefix=None, **MEAN))
    with pytest.raises(SpecError, match="no class row: there is no class token"):
        model(torch.zeros(1, 3, 32, 32), with_class_row=True)


def test_every_stage_but_the_last_is_passed_on_the_way_to_a_forward_pass():
    model = build(WITH_GRID, generator=seeded(0)).eval()
    x = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        tokens = model.patch_embed(x) + model.position.pos
        for stage in model.stages:
            for block in stage.blocks:
                tokens = tokens + block.mixer(block.norm1(tokens))
                tokens = tokens + block.feed_forward(block.norm2(tokens))
            tokens = tokens if stage.downsampling is None else stage.downsampling(tokens)
        assert torch.equal(model(x), model.head(model.pooling(model.norm(tokens))))
