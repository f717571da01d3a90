"""Stitched networks: enumeration, exact costs, the stitch itself, least squares, evaluation with shared prefixes."""

from __future__ import annotations

import itertools
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import run_here
from hypothesis import given
from hypothesis import strategies as st

from search.run import main
from space import catalog
from space.cost import cost
from space.families.sn_net import (
    Anchors,
    LevelSampler,
    compute_levels,
    level_gap,
    macs_of_all,
    nearest_blocks,
    nearest_blocks_of_stages,
    paired,
    read_anchors,
    two_way,
)
from space.families.vit import plain_vit
from space.kinds.stitch import StitchKind
from space.least_squares import LeastSquares, PseudoInverse
from space.model import build_model, fit_tensors
from space.registry import SpecError
from space.stitch_spec import Connection, Segment, StitchSpec, connections, read_route, route_text
from space.stitching import Stitch, StitchedTransformer, fit_stitches

ANCHORS = StitchKind().examples()[0].anchors
ROUTES = tuple(stitch.route for stitch in two_way([2, 4]) if stitch.is_usable)
PUBLISHED = {"deit3_small+deit3_base": (5.74, 5.80), "deit3_small+deit3_large": (9.43, 9.52), "deit3_base+deit3_large": (21.40, 21.56)}
"""Least and most GMACs of a stitch on the first level between the anchors, of the released lists of FLOPs."""


def images(number: int = 3, seed: int = 0) -> torch.Tensor:
    return torch.randn(number, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


# Enumeration


@given(st.integers(2, 14), st.integers(2, 30))
def test_two_way_stitching_has_n2_minus_n_plus_2_usable_routes_at_any_depths(small: int, large: int):
    n, stitches = min(small, large), two_way([small, large])
    usable = [stitch for stitch in stitches if stitch.is_usable]
    assert len(usable) == len({stitch.route for stitch in usable}) == n * n - n + 2
    assert [stitch.id for stitch in stitches] == list(range(len(stitches)))
    for stitch in usable:
        assert stitch.route[0].first == 0
        assert stitch.route[-1].last == (small, large)[stitch.route[-1].anchor] - 1
        assert all(segment.first <= segment.last for segment in stitch.route)
        # Both sides of a stitch are equally deep in their anchors, to within a run of blocks.
        for one, other in itertools.pairwise(stitch.route):
            depths = (small, large)[one.anchor], (small, large)[other.anchor]
            assert abs((one.last + 1) / depths[0] - other.first / depths[1]) < 1 / n


def test_two_way_stitches_are_numbered_as_published():
    stitches = two_way([12, 24])
    first_of = {}
    for stitch in stitches:
        first_of.setdefault(stitch.kind, stitch.id)
    assert first_of == {"anchor": 0, "SL": 2, "LS": 14, "LSL": 25, "SLS": 80}
    assert [stitch.id for stitch in stitches if not stitch.is_usable] == [13]
    assert stitches[19].route == (Segment(1, 0, 11), Segment(0, 6, 11))
    assert sum(stitch.is_usable for stitch in two_way([12, 12, 24])) == 267


@pytest.mark.parametrize(
    ("kernel", "stride", "number"), [(2, 1, 71), (1, 1, 27), (2, 2, 51), (3, 3, 75), (4, 4, 99), (3, 2, 91), (4, 2, 131)]
)
def test_paired_stitching_of_three_anchors_has_the_published_number_of_networks(kernel: int, stride: int, number: int):
    stitches = paired([12, 12, 12], kernel=kernel, stride=stride)
    assert len(stitches) == len({stitch.route for stitch in stitches}) == number


def test_paired_stitching_beyond_neighbours_goes_through_chains_of_three():
    stitches = paired([12, 12, 12], nearest=False)
    assert len(stitches) == 732
    assert {len(stitch.route) for stitch in stitches} == {1, 2, 3}


def test_nearest_stitching_of_swin_has_41_networks():
    assert len(nearest_blocks_of_stages([(2, 2, 6, 2), (2, 2, 18, 2), (2, 2, 18, 2)])) + 3 == 41


def test_nearest_stitching_enters_every_block_of_the_larger_anchor_but_its_first():
    assert [stitch.route[1].first for stitch in nearest_blocks([4, 12])[2:]] == list(range(1, 12))
    assert nearest_blocks([4, 12])[2:][2].route == (Segment(0, 0, 1), Segment(1, 3, 11))


def test_paired_stitching_refuses_other_depths_and_windows():
    with pytest.raises(SpecError, match="anchors of equal depth; these have 12, 24"):
        paired([12, 24])
    with pytest.raises(SpecError, match="kernel is 2, stride is 3"):
        paired([12, 12], stride=3)


# Costs


@pytest.mark.parametrize("names", PUBLISHED)
def test_costs_of_all_stitches_are_the_published_ones(names: str):
    anchors = read_anchors(names)
    stitches = anchors.stitches()
    counted = [cost(anchors.stitch(stitch.route)).fvcore_macs for stitch in stitches]
    assert (len(counted), len(set(counted))) == (134, 44)
    levels = compute_levels(counted, level_gap(anchors.models))
    assert [len(level) for level in levels] == [1, *[12] * 11, 1]
    assert compute_levels(counted, 10**9) == levels
    assert (round(counted[0] / 1e9, 2), *(round(bound(counted[i] for i in levels[1]) / 1e9, 2) for bound in (min, max))) == (
        4.61 if "small" in names else 17.58,
        *PUBLISHED[names],
    )


@pytest.mark.parametrize(
    ("depths", "sizes"),
    [((12, 12, 24), [1, *[12] * 11, 1, *[12] * 11, 1]), ((24, 24), [1, *[24] * 23, 1]), ((6, 12), [1, *[6] * 5, 1])],
)
def test_every_anchor_has_a_level_of_its_own(depths: tuple[int, ...], sizes: list[int]):
    models = tuple(plain_vit(width, depth, width // 64) for width, depth in zip((384, 768, 1024), depths, strict=False))
    anchors = Anchors(tuple("abc"[: len(models)]), models)
    counted = [cost(anchors.stitch(stitch.route)).fvcore_macs for stitch in anchors.stitches()]
    assert [len(level) for level in compute_levels(counted, level_gap(models))] == sizes


def test_shared_prefixes_save_the_published_share_of_an_evaluation():
    anchors = read_anchors("deit3_small+deit3_large")
    alone, together = macs_of_all(anchors.models, [stitch.route for stitch in anchors.stitches()])
    assert (round(alone / 1e9), round(together / 1e9)) == (4455, 1650)


def test_every_level_is_drawn_equally_often():
    sampler = LevelSampler(((0,), (1, 2, 3), (4, 5)))
    drawn = Counter(sampler.draw(seed) for seed in range(3000))
    assert all(abs(sum(drawn[i] for i in level) / 3000 - 1 / 3) < 0.04 for level in sampler.levels)
    assert sampler.draw(7) == sampler.draw(7)


# Names


def test_a_key_names_the_network_whatever_the_order_of_the_anchors():
    key = "sn_net:deit3_small+deit3_large:S0-5>L12-23"
    model = catalog.resolve(key)
    assert isinstance(model, StitchSpec)
    assert model == catalog.resolve("sn_net:deit3_large+deit3_small:S0-5>L12-23")
    assert read_anchors("deit3_small+deit3_large").key(model.route) == key
    assert len(catalog.explanation(key)) == 2


@given(st.sampled_from([stitch.route for stitch in two_way([12, 24]) if stitch.is_usable]))
def test_the_text_of_a_route_reads_back(route: tuple[Segment, ...]):
    for names in (("deit3_small", "deit3_large"), ("a.json", "b.json")):
        assert read_route(route_text(route, names), names) == route


def test_positions_and_layer_scale_may_differ_between_anchors():
    counts = [cost(catalog.resolve(f"sn_net:deit3_small+deit_base:{route}")) for route in ("S0-5>B6-11", "B0-5>S6-11")]
    assert counts[0] != counts[1]


def test_plain_vits_of_timm_are_anchors_and_take_their_weights():
    ours, timms = catalog.resolve("sn_net:deit_tiny+deit_small:T0-5>S6-11"), "sn_net:timm:vit_tiny_patch16_224+timm:vit_small_patch16_224"
    assert catalog.resolve(f"{timms}:T0-5>S6-11") == ours
    anchor = read_anchors(timms.removeprefix("sn_net:")).models[0]
    tensors = build_model(catalog.resolve("timm:vit_tiny_patch16_224"), seed=0).state_dict()
    assert fit_tensors(anchor, tensors).changes == ()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("deit3_small+deit3_large", "names anchors and no route, as sn_net:deit3_small+deit3_large:S0>L2-23 does"),
        ("deit3_small", "names no two anchors"),
        ("deit3_small+deit3_large:S0-5>X2", "'X2' of the stitch 'S0-5>X2' is no segment such as S0-5; letters of the anchors: S, L"),
        ("deit3_small+deit3_large:S0-5>L12-22", "ends at block 22 of anchor 1; the classifier stands behind block 23"),
        ("deit3_small+deit3_large:S1-5>L12-23", "starts at block 1 of anchor 0"),
        ("deit3_small+deit3_large:S0-12>L12-23", "blocks 0 to 12 of anchor 0, which has the blocks 0 to 11"),
        ("deit3_small+deit3_large:S0-5>S6-11", "two segments in a row are of one anchor"),
        ("deit_small+vit_digits:A0-5>B1", "anchor 1 has img_size 16, anchor 0 has 224"),
        ("deit_small+deit_small:A0>B1-11", "an anchor is given twice"),
        ("timm:resnet18+deit_tiny:A0>B1", "timm model 'resnet18' is no plain Vision Transformer: its class is ResNet"),
        ("timm:vit_small_patch16_224+timm:vit_base_patch32_224:S0>B1-11", "7x7 patches and 1 prefix token, anchor 0 has 14x14"),
        ("timm:vit_base_patch16_rpn_224+deit_tiny:A0>B1-11", "its blocks are of the class ResPostBlock"),
        ("timm:vit_tiny_patch16_224+timm:vit_small_patch16_224", "names anchors and no route"),
        ("timm:vit_medium_patch16_gap_256+deit_tiny:A0>B1-11", "it has 38,861,288 parameters, a plain one of its size 38,879,720"),
    ],
)
def test_a_stitch_that_cannot_be_is_refused_in_one_line(text: str, message: str):
    with pytest.raises(SpecError) as refused:
        catalog.resolve(f"sn_net:{text}")
    assert message in str(refused.value)
    assert "\n" not in str(refused.value)


def test_describe_lists_every_usable_stitch(tmp_path: Path):
    listed = json.loads(run_here(main, "describe", "sn_net:deit3_small+deit3_large", "--stitches", "--json", cwd=tmp_path).stdout)[
        "stitches"
    ]
    assert len(listed) == 134
    assert all(row.keys() == {"id", "key", "kind", "macs", "fvcore_macs", "params"} for row in listed)
    one = next(row for row in listed if row["id"] == 7)
    assert one["key"] == "sn_net:deit3_small+deit3_large:S0-5>L12-23"
    assert cost(catalog.resolve(one["key"])) == (one["params"], one["macs"], one["fvcore_macs"])
    table = run_here(main, "describe", "sn_net:deit3_small+deit3_large", "--stitches", cwd=tmp_path).stdout.splitlines()
    assert all(len(line) <= 80 for line in table)
    assert sum(">" in line for line in table) == 132


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("deit_tiny", "--stitches"), "'deit_tiny' names no anchors"),
        (("sn_net:deit3_small+deit3_large", "--stitches", "pared"), "unknown stitching space 'pared'; did you mean 'paired'"),
        (("sn_net:deit3_small+deit3_large", "--stitches", "paired"), "anchors of equal depth"),
        (("sn_net:deit3_small+deit3_large:S0-5>L12-23", "--stitches"), "has the route 'S0-5>L12-23' already"),
        (("sn_net:deit3_small+deit3_large", "--stitches", "--set", "depth=3"), "--set and --out are for one"),
    ],
)
def test_describe_refuses_what_it_cannot_list(args: tuple[str, ...], message: str, tmp_path: Path):
    refused = run_here(main, "describe", *args, cwd=tmp_path)
    assert refused.returncode == 2
    assert message in refused.stderr


# The stitch


def trained(stitch: Stitch) -> Stitch:
    """The stitch with a low-rank update that is not 0."""
    assert stitch.up is not None
    torch.nn.init.normal_(stitch.up, generator=torch.Generator().manual_seed(1))
    return stitch


def test_a_stitch_is_the_frozen_map_plus_its_low_rank_update():
    stitch = trained(Stitch(6, 5, rank=2))
    x, (down, up) = torch.randn(2, 3, 6), (stitch.down, stitch.up)
    assert down is not None
    assert up is not None
    expected = x @ (stitch.weight + up @ down / 2).T + stitch.bias
    assert torch.allclose(stitch(x), expected, atol=1e-6)
    with torch.no_grad():
        assert torch.allclose(stitch(x), expected, atol=1e-6)
    stitch(x).sum().backward()
    assert stitch.weight.grad is None
    assert all(part.grad is not None for part in (stitch.bias, down, up))
    assert Stitch(6, 5, rank=None).weight.requires_grad


def test_mode_and_loading_in_any_order_change_nothing():
    source = trained(Stitch(6, 5, rank=2)).eval()
    x = torch.randn(2, 3, 6)
    with torch.no_grad():
        expected = source(x)
    state = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    assert state.keys() == {"weight", "bias", "down", "up"}
    for order in itertools.permutations(("eval", "load", "train", "look")):
        stitch = Stitch(6, 5, rank=2)
        for step in order:
            match step:
                case "load":
                    stitch.load_state_dict(state)
                case "look":
                    with torch.no_grad():
                        stitch(x)
                case _:
                    getattr(stitch, step)()
        with torch.no_grad():
            assert torch.equal(stitch.eval()(x), expected)
        assert all(torch.equal(tensor, state[name]) for name, tensor in stitch.state_dict().items())


def test_the_folded_weight_is_kept_until_one_of_its_tensors_changes():
    stitch = trained(Stitch(6, 5, rank=2))
    with torch.no_grad():
        kept = stitch.folded_weight()
        assert stitch.folded_weight() is kept
        assert stitch.up is not None
        stitch.up.mul_(2)
        assert not torch.equal(stitch.folded_weight(), kept)
        assert stitch.double().folded_weight().dtype == torch.float64


def test_a_fused_optimizer_is_noticed_though_it_counts_no_version():
    stitch, x = trained(Stitch(6, 5, rank=2)), torch.randn(2, 3, 6)
    optimizer = torch.optim.AdamW([each for each in stitch.parameters() if each.requires_grad], lr=0.1, fused=True)
    for _ in range(2):
        with torch.no_grad():
            stitch.eval()(x)
        stitch.train()(x).sum().backward()
        optimizer.step()
    expected = stitch(x)
    with torch.no_grad():
        assert torch.allclose(stitch.eval()(x), expected, atol=1e-6)


@torch.inference_mode()
def test_a_stitch_made_in_inference_mode_follows_its_tensors():
    stitch = trained(Stitch(6, 5, rank=2))
    assert stitch.up is not None
    before = stitch.folded_weight()
    stitch.up.mul_(2)
    assert not torch.equal(stitch.folded_weight(), before)


# Least squares


def test_streamed_least_squares_predicts_as_float64_lstsq_in_any_cut_and_adds_up_over_processes():
    generator = torch.Generator().manual_seed(0)
    x, noise = torch.randn(400, 12, generator=generator), torch.randn(400, 3, generator=generator)
    # Nearly collinear columns of very different size, far from 0.
    x = x @ torch.diag(torch.logspace(-3, 3, 12)) + 5
    x[:, 4] = x[:, 5] + 1e-3 * x[:, 4]
    y = x @ torch.randn(12, 3, generator=generator) + noise
    ones = torch.cat([x, torch.ones(400, 1)], dim=1).double()
    expected = ones @ torch.linalg.lstsq(ones, y.double(), driver="gelsd").solution
    whole, parts = LeastSquares(12, 3), [LeastSquares(12, 3) for _ in range(2)]
    whole.update(x, y)
    for part, rows in zip(parts, (slice(0, 150), slice(150, 400)), strict=True):
        part.update(x[rows], y[rows])
    for total, other in zip(parts[0].sums, parts[1].sums, strict=True):
        total += other
    for found in (whole.solve(), parts[0].solve()):
        assert found.num_dependent == 0
        predicted = x.double() @ found.weight.T + found.bias
        assert (predicted - expected).abs().max() < 1e-6 * expected.abs().max()
        left = (y.double() - expected).square().sum() / (y.double() - y.double().mean(dim=0)).square().sum()
        assert found.residual == pytest.approx(float(left), rel=1e-3)


def test_with_fewer_rows_than_inputs_the_rest_is_dependent():
    sums = LeastSquares(128, 1)
    sums.update(torch.randn(100, 128) @ torch.diag(torch.logspace(-2, 2, 128)), torch.randn(100, 1))
    assert sums.solve().num_dependent >= 29


def test_dependent_inputs_are_counted_and_leave_the_map_small():
    x = torch.randn(100, 6, generator=torch.Generator().manual_seed(0))
    x[:, 3], x[:, 5] = x[:, 0] - 2 * x[:, 1], 0.0
    y = x[:, :2].sum(dim=1, keepdim=True) + 1
    sums = LeastSquares(6, 1)
    sums.update(x, y)
    found = sums.solve()
    assert found.num_dependent == 2
    assert found.weight.abs().max() < 2
    assert torch.allclose(x.double() @ found.weight.T + found.bias, y.double(), atol=1e-5)


def test_one_channel_500_times_larger_leaves_the_others_their_say():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(20_000, 24, generator=generator)
    x[:, 7] *= 500
    y = x @ torch.randn(24, 8, generator=generator)
    sums = LeastSquares(24, 8)
    sums.update(x, y)
    assert sums.solve().residual < 1e-12
    released = PseudoInverse(24, 8)
    released.update(x, y)
    found = released.solve()
    # The released code's cutoff drops all channels but the large one.
    assert found.num_dependent == 24
    assert found.residual > 1e-6


def test_least_squares_refuses_no_rows_and_rows_that_are_not_finite():
    sums = LeastSquares(2, 1)
    with pytest.raises(ValueError, match="no rows"):
        sums.solve()
    sums.update(torch.tensor([[1.0, float("nan")]]), torch.ones(1, 1))
    with pytest.raises(ValueError, match="not finite"):
        sums.solve()


# The stitched network


@pytest.fixture(scope="module")
def stitched() -> StitchedTransformer:
    network = StitchedTransformer(ANCHORS, ROUTES, rank=3).eval()
    for stitch in network.stitches.values():
        assert isinstance(stitch, Stitch)
        trained(stitch)
    return network


@torch.no_grad()
def test_an_extracted_network_is_the_folded_one_and_gives_equal_logits(stitched: StitchedTransformer):
    for route in ROUTES:
        alone = stitched.extract(route)
        assert alone.spec == StitchSpec(anchors=ANCHORS, route=route).folded
        assert torch.allclose(alone(images()), stitched(images(), route), atol=1e-6)
        assert all(one is not other for one, other in itertools.product(alone.parameters(), stitched.parameters()))


def test_an_extracted_network_has_the_precision_of_the_stitched_one():
    network = StitchedTransformer(ANCHORS, ROUTES, rank=2).double()
    assert {parameter.dtype for parameter in network.extract(ROUTES[-1]).parameters()} == {torch.float64}


@torch.no_grad()
def test_all_routes_together_give_the_logits_of_each_alone():
    depths = (4, 8)
    anchors = [
        replace(anchor, stages=(replace(anchor.stages[0], blocks=anchor.stages[0].blocks[:1] * depth),))
        for anchor, depth in zip(ANCHORS, depths, strict=True)
    ]
    routes = [stitch.route for stitch in two_way(depths) if stitch.is_usable]
    network = StitchedTransformer(anchors, routes).eval()
    found = dict(network.forward_all(images(), routes))
    assert found.keys() == set(routes)
    assert all(torch.equal(logits, network(images(), route)) for route, logits in found.items())


def test_a_route_without_its_stitches_is_refused(stitched: StitchedTransformer):
    with pytest.raises(SpecError, match="no stitch from block"):
        stitched(images(), (Segment(0, 0, 0), Segment(1, 1, 3)))


@torch.no_grad()
def test_stitches_start_from_the_map_between_the_anchors_own_tokens():
    network = StitchedTransformer(ANCHORS, ROUTES, rank=2)
    batches = [images(8, seed) for seed in range(4)]
    maps = fit_stitches(network, iter(batches))
    assert maps.keys() == set(network.connections)
    assert network.training
    connection = Connection(0, 0, 1, 2)
    reached = []
    for anchor, blocks in ((0, 1), (1, 2)):
        tokens = network.anchor(anchor).embed(torch.cat(batches))
        reached.append(network.run(tokens, anchor, 0, blocks - 1).x.reshape(-1, (8, 16)[anchor]).double())
    ones = torch.cat([reached[0], torch.ones(len(reached[0]), 1)], dim=1)
    expected = ones @ torch.linalg.lstsq(ones, reached[1]).solution
    found = maps[connection]
    assert torch.allclose(reached[0] @ found.weight.T + found.bias, expected, atol=1e-6)
    assert torch.equal(network.stitch(connection).weight, found.weight.float())


@torch.no_grad()
def test_the_released_initialisation_is_the_pseudo_inverse_of_all_tokens_at_once():
    networks = [StitchedTransformer(ANCHORS, ROUTES, rank=2) for _ in range(2)]
    batches = [images(8, seed) for seed in range(2)]
    ours, released = (
        fit_stitches(network, batches, reference=reference) for network, reference in zip(networks, (False, True), strict=True)
    )
    for connection in ours:
        assert torch.allclose(ours[connection].weight, released[connection].weight, atol=1e-3)
        assert ours[connection].residual <= released[connection].residual + 1e-6


def test_connections_that_share_a_stitch_start_from_the_mean_of_their_maps():
    routes = ((Segment(0, 0, 0), Segment(1, 2, 3)), (Segment(0, 0, 1), Segment(1, 3, 3)))
    network = StitchedTransformer(ANCHORS, routes, rank=None, shared={each: 0 for route in routes for each in connections(route)})
    assert len(network.stitches) == 1
    maps = fit_stitches(network, [images(8)])
    mean = torch.stack([found.weight for found in maps.values()]).mean(dim=0)
    assert torch.equal(network.stitch(connections(routes[0])[0]).weight, mean.float())


def test_weights_follow_from_the_seed_and_the_global_generator_is_left_alone():
    before = torch.get_rng_state()
    one, same, other = (StitchedTransformer(ANCHORS, ROUTES, seed=seed).state_dict() for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert any(not torch.equal(one[name], other[name]) for name in one)
