"""Subnets: which blocks they keep is part of what they are."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations

import pytest
import torch
from test_spec import WITH_GRID, block, tiny

from space.cost import cost
from space.model import build_model, model_from_json
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec
from space.subnet_spec import SubnetSpec


def network(num_blocks: int, *, embed_dim: int = 16, **changes) -> ArchSpec:
    return tiny(**{"stages": (StageSpec(embed_dim=embed_dim, blocks=(block(),) * num_blocks),)} | changes)


SUPERNET = network(4)


def subnet(*kept: int, **changes) -> SubnetSpec:
    return SubnetSpec(**{"supernet": SUPERNET, "arch": network(len(kept)), "kept": (kept,)} | changes)


def test_every_choice_of_blocks_is_a_model_of_its_own():
    every = [subnet(*kept) for number in range(1, 5) for kept in combinations(range(4), number)]
    assert len({model.digest for model in every}) == len(set(every)) == len(every) == 15
    assert len({model.arch.digest for model in every}) == 4


def test_equal_subnets_share_their_digest():
    again = SubnetSpec(supernet=network(4), arch=network(2), kept=[[0, 3]])  # type: ignore[arg-type]
    assert again == subnet(0, 3)
    assert again.digest == subnet(0, 3).digest
    assert subnet(0, 3, supernet=network(5)).digest != again.digest


def test_the_digest_never_changes():
    assert subnet(0, 3).digest == GOLDEN_DIGEST


GOLDEN_DIGEST = "23dac22a9d1b2d62"
"""As first released: Optuna, MLflow and CSV files name networks by it."""


def test_it_costs_what_its_architecture_costs_alone():
    assert cost(subnet(1, 2)) == cost(network(2))


def test_a_block_starts_from_the_weights_that_it_has_in_the_supernet():
    whole, part = (build_model(model, seed=3).state_dict() for model in (SUPERNET, subnet(0, 3)))
    for name, weight in part.items():
        origin = name.replace("blocks.1.", "blocks.3.")
        assert torch.equal(weight, whole[origin]), name
    kept_others = build_model(subnet(0, 2), seed=3).state_dict()
    different = {name for name in part if not torch.equal(part[name], kept_others[name])}
    assert different
    assert all(name.startswith("stages.0.blocks.1.") for name in different)


def test_blocks_are_kept_stage_by_stage():
    blocks = WITH_GRID.stages[0].blocks * 2
    first, last = WITH_GRID.stages
    supernet = replace(WITH_GRID, stages=(replace(first, blocks=blocks), replace(last, blocks=last.blocks * 3)))
    model = SubnetSpec(supernet=supernet, arch=WITH_GRID, kept=((1,), (2,)))
    assert model.origin("stages.0.blocks.0.mixer.qkv") == "stages.0.blocks.1.mixer.qkv"
    assert model.origin("stages.1.blocks.0.norm1") == "stages.1.blocks.2.norm1"
    assert model.origin("stages.0.downsampling.reduction") == "stages.0.downsampling.reduction"
    whole, part = (build_model(spec, seed=0).state_dict() for spec in (supernet, model))
    origins = {name: name.replace("s.0.blocks.0", "s.0.blocks.1").replace("s.1.blocks.0", "s.1.blocks.2") for name in part}
    assert all(torch.equal(weight, whole[origins[name]]) for name, weight in part.items())


def one_block(**heads) -> ArchSpec:
    return tiny(stages=(StageSpec(embed_dim=16, blocks=(block(**heads),)),))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"arch": network(2, img_size=64)}, "img_size is 64; the supernet's is 32, and they must be equal"),
        ({"arch": network(2, num_classes=3)}, "num_classes is 3; the supernet's is 10"),
        ({"arch": network(2, in_chans=1)}, "in_chans is 1; the supernet's is 3"),
        ({"arch": WITH_GRID}, "the subnet has 2 stages; the supernet has 1 stage"),
        ({"arch": network(2, embed_dim=24)}, r"stages\[0\]: embed_dim is 24; allowed: at most the supernet's 16"),
        ({"arch": network(2, prefix=None, pooling=Component("mean"))}, "prefix: nothing stands where the supernet has 'class_token'"),
        ({"arch": network(2, pooling=Component("gem"))}, "pooling: 'gem' stands where the supernet has 'class_token'"),
        ({"arch": network(2, position=Component("sincos"))}, "position: 'sincos' stands where the supernet has 'learned'"),
        ({"arch": network(2, head=Component("tanh_mlp"))}, "head: 'tanh_mlp' stands where the supernet has 'linear'"),
        (
            {"arch": network(2, patch_embed=Component("conv", kernel=9, stride=8))},
            "patch_embed: kernel is 9; allowed: at most the supernet's 8",
        ),
        (
            {"arch": network(2, norm=Component("layer_norm", eps=1e-3))},
            "norm: eps is 0.001; the supernet's is 1e-06, and they must be equal",
        ),
        (
            {"arch": one_block(num_heads=3), "kept": ((2,),)},
            r"stages\[0\].blocks\[0\].mixer, kept from block 2: num_heads is 3; allowed: at most the supernet's 2",
        ),
        ({"arch": one_block(qkv_bias=False), "kept": ((2,),)}, "qkv_bias is False; the supernet's is True, and they must be equal"),
        (
            {
                "arch": tiny(
                    stages=(
                        StageSpec(
                            embed_dim=16,
                            blocks=(
                                BlockSpec(
                                    mixer=Component("window_attention", num_heads=2, head_dim=8, splits=2),
                                    feed_forward=Component("mlp", hidden_dim=32),
                                ),
                            ),
                        ),
                    )
                ),
                "kept": ((2,),),
            },
            "kept from block 2: 'window_attention' stands where the supernet has 'attention'",
        ),
        ({"kept": ((0,),)}, r"kept\[0\] is \(0,\); one number is needed for each of the stage's 2 blocks"),
        ({"kept": ((0, 4),)}, r"kept\[0\] is \(0, 4\); allowed: 0 to 3, the blocks of the supernet's stage"),
        ({"kept": ((-1, 2),)}, r"kept\[0\] is \(-1, 2\); allowed: 0 to 3"),
        ({"kept": ((2, 2),)}, r"kept\[0\] is \(2, 2\); the numbers must increase"),
        ({"kept": ((3, 0),)}, "the numbers must increase"),
        ({"kept": ((0, True),)}, r"kept\[0\] is \(0, True\); a list of block numbers is expected"),
        ({"kept": (0, 3)}, "one list of block numbers for each of the 1 stage is expected"),
        ({"kept": (7,)}, r"kept\[0\] is 7; a list of block numbers is expected"),
    ],
)
def test_what_cannot_be_cut_out_is_refused_with_the_reason(changes: dict, message: str):
    with pytest.raises(SpecError, match=message):
        subnet(0, 3, **changes)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data.pop("kept"), "subnet lacks kept"),
        (lambda data: data.update(kepd=[[0]]), "unknown field 'kepd' in subnet; did you mean 'kept'"),
        (lambda data: data.update(arch=[]), "subnet.arch: not the JSON of an architecture"),
        (lambda data: data["supernet"].pop("stages"), "subnet.supernet: spec lacks stages"),
        (lambda data: data.update(kept=[[0, "3"]]), r"subnet: kept\[0\] is \[0, '3'\]; a list of block numbers"),
        (lambda data: data.update(kept={}), "subnet: kept is {}"),
    ],
)
def test_an_error_in_json_names_its_place(change, message: str):
    data = subnet(0, 3).to_json()
    change(data)
    with pytest.raises(SpecError, match=message):
        model_from_json(data)
