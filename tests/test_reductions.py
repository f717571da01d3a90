"""Token reductions: the published counts, and each method by its definition."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from test_components import module
from torch import Tensor

from space.catalog import resolve
from space.component import AttentionColumns, Cost, Tokens, TokenShape
from space.components.gtp import grid_neighbours
from space.cost import cost
from space.families.vit import plain_vit
from space.fvcore_count import fvcore_macs
from space.layout import layout
from space.model import as_arch
from space.reductions import placed, with_reductions, without_reductions
from space.registry import SpecError
from space.spec import ArchSpec, Component
from space.vit import build

PLAIN = plain_vit(24, 4, 3, patch_size=4, img_size=32, num_classes=7)
"""65 tokens."""

REDUCED = {
    "evit": placed(PLAIN, "evit", keep=0.7),
    "evit_without_fusing": placed(PLAIN, "evit", keep=0.7, fuse=False),
    "gtp": placed(PLAIN, "gtp", P=8),
    "diffrate": placed(PLAIN, "diffrate", prune_to=(65, 60, 40, 3), merge_to=(65, 50, 30, 3)),
    "mctf": placed(PLAIN, "mctf", r=24),
    "random_drop": placed(PLAIN, "random_drop", num_kept=(64, 50, 40, 10), seed=1),
}
EVERY = pytest.mark.parametrize("reduced", REDUCED.values(), ids=REDUCED)

SCHEDULE = {
    "prune_to": (197, 196, 190, 168, 150, 139, 129, 117, 99, 78, 58, 3),
    "merge_to": (197, 194, 176, 156, 141, 133, 121, 107, 88, 64, 56, 3),
}
"""DeiT-S at 2.9 GMAC, printed as 2.905: https://github.com/OpenGVLab/DiffRate."""


def deit(size: str) -> ArchSpec:
    arch = as_arch(resolve(f"deit_{size}"))
    assert arch is not None
    return arch


@pytest.mark.parametrize(
    ("keep", "fused", "dropped", "printed"),
    [(0.9, 4.02, 3.99, 4.0), (0.8, 3.48, 3.44, 3.5), (0.7, 3.03, 3.00, 3.0), (0.6, 2.64, 2.61, 2.6), (0.5, 2.31, 2.28, 2.3)],
)
def test_evit_has_its_published_counts(keep: float, fused: float, dropped: float, printed: float):
    """DeiT-S in https://arxiv.org/abs/2202.07800, which prints the same digit with and without fusing: norms counted, as fvcore does."""
    counts = [cost(placed(deit("small"), "evit", keep=keep, fuse=fuse)) for fuse in (True, False)]
    assert [round(counted.macs / 1e9, 2) for counted in counts] == [fused, dropped]
    assert [round(counted.fvcore_macs / 1e9, 1) for counted in counts] == [printed, printed]


def test_gtp_diffrate_and_mctf_have_their_published_counts():
    """GTP: https://arxiv.org/abs/2311.03035, P = 8; MCTF: 2.6 GMAC, https://arxiv.org/abs/2403.10030."""
    assert [round(cost(placed(deit(size), "gtp", P=8)).macs / 1e9, 2) for size in ("small", "base")] == [3.42, 13.10]
    assert round(cost(placed(deit("small"), "diffrate", **SCHEDULE)).macs / 1e9, 3) == 2.905
    assert round(cost(placed(deit("small"), "mctf", r=16)).macs / 1e9, 2) == 2.58


def num_tokens(spec: ArchSpec) -> list[int]:
    """Tokens that enter each block's feed-forward."""
    return [part.shape.num_tokens for part in layout(spec) if part.kind == "feed_forward" and isinstance(part.shape, TokenShape)]


def test_mctf_ends_with_21_tokens_and_never_goes_below_10():
    assert num_tokens(placed(deit("small"), "mctf", r=16)) == [197, *range(181, 20, -16)]
    assert num_tokens(placed(PLAIN, "mctf", r=100)) == [65, 33, 17, 10]


@EVERY
def test_counts_of_a_whole_network_are_those_of_fvcore(reduced: ArchSpec):
    model = build(reduced)
    assert fvcore_macs(model, reduced.img_size) == cost(reduced).fvcore_macs
    assert cost(reduced).params == cost(PLAIN).params
    assert cost(reduced).macs < cost(PLAIN).macs


@EVERY
def test_the_weights_of_the_plain_network_are_those_of_the_reduced_one(reduced: ArchSpec):
    plain, model = build(PLAIN, generator=torch.Generator().manual_seed(0)).eval(), build(reduced).eval()
    model.load_state_dict(plain.state_dict())
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        assert model(x).shape == (2, 7)
        assert not torch.equal(model(x), plain(x))
    assert without_reductions(reduced) == PLAIN


@pytest.mark.parametrize(
    "reduced",
    [placed(PLAIN, "evit", keep=1), placed(PLAIN, "gtp", P=0), placed(PLAIN, "mctf", r=0)],
    ids=["evit keep = 1", "gtp P = 0", "mctf r = 0"],
)
def test_a_reduction_that_keeps_every_token_is_the_plain_network(reduced: ArchSpec):
    assert reduced == PLAIN
    assert reduced.digest == PLAIN.digest


def test_a_schedule_that_keeps_every_token_costs_and_builds_nothing():
    kept = placed(PLAIN, "diffrate", prune_to=(65,) * 4, merge_to=(65,) * 4)
    assert cost(kept) == cost(PLAIN)
    assert {part.path for part in layout(kept)} == {part.path for part in layout(PLAIN)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: with_reductions(PLAIN, {4: Component("gtp", P=2)}), "token reduction in block 4; the network has blocks 0 to 3"),
        (lambda: placed(PLAIN, "diffrate", prune_to=(9,), merge_to=9), "prune_to has 1 values; there are 4 blocks for them"),
        (lambda: cost(placed(PLAIN, "diffrate", prune_to=9, merge_to=10)), "merge_to is 10; at most prune_to, 9, is expected"),
        (lambda: cost(placed(PLAIN, "diffrate", prune_to=9, merge_to=1)), "merge_to is 1; a patch must stay beside the 1 prefix"),
        (lambda: cost(placed(PLAIN, "gtp", P=64)), "P is 64; there are 64 patches, of which one must stay"),
        (lambda: placed(PLAIN, "evit", keep=1.5), "keep is 1.5; allowed: float, above 0 to 1"),
        (lambda: cost(placed(dataclasses.replace(PLAIN, prefix=None), "evit", keep=0.5)), "token_reduction 'evit' needs a class token"),
        (
            lambda: cost(with_reductions(PLAIN, {0: Component("gtp", P=2), 1: Component("evit", keep=0.5)})),
            "'evit' cannot follow 'gtp', which remembers something of every token",
        ),
        (
            lambda: cost(with_reductions(PLAIN, {0: Component("evit", keep=0.5), 1: Component("gtp", P=2)})),
            "graph 'mixed' needs the patches on a grid, but an earlier part breaks the grid up; use 'semantic'",
        ),
        (lambda: cost(placed(PLAIN, "random_drop", num_kept=(65,) * 4, seed=0)), "num_kept is 65; there are 64 patches"),
    ],
)  # fmt: skip
def test_what_cannot_be_reduced_is_refused_with_the_reason(make: Any, message: str):
    with pytest.raises(SpecError, match=message):
        make()


SHAPE = TokenShape(8, 12, (3, 4), num_prefix=1, has_class_token=True)


def tokens(sizes: Tensor | None = None) -> Tokens:
    return Tokens(torch.randn(2, 13, 8, generator=torch.Generator().manual_seed(0)), sizes)


def attention_weights(num_heads: int = 3) -> Tensor:
    return torch.randn(2, num_heads, 13, 13, generator=torch.Generator().manual_seed(1)).softmax(dim=-1)


def test_evit_keeps_the_best_patches_in_order_and_fuses_the_others():
    reduction: Any = module("token_reduction", Component("evit", keep=0.4), SHAPE)
    sizes = torch.arange(1.0, 14).expand(2, -1)
    given, row = tokens(sizes), attention_weights()[:, :, 0]
    x, new_sizes, _ = reduction(given, row)
    for b in range(2):
        scores = row[b].mean(0)
        order = sorted(range(1, 13), key=lambda j: -scores[j])
        kept, rest = order[:5], order[5:]  # ceil(0.4 * 12)
        expected = [given.x[b, 0], *given.x[b, kept], sum(scores[j] * given.x[b, j] for j in rest)]
        torch.testing.assert_close(x[b], torch.stack(expected))
        assert new_sizes[b].tolist() == [1, *sizes[b, kept].tolist(), sizes[b, rest].sum()]


def test_a_whole_share_of_patches_is_not_rounded_up():
    # 0.55 * 100 is 55.00000000000001.
    assert module("token_reduction", Component("evit", keep=0.55), SHAPE._replace(num_patches=100)).num_kept == 55


def test_gtp_drops_the_lowest_scores_and_propagates_them_over_the_graph():
    reduction: Any = module("token_reduction", Component("gtp", P=4, alpha=0.3, num_neighbours=2), SHAPE)
    given, weights = tokens(), attention_weights()
    graph = reduction.remember(given.x)
    received = AttentionColumns(weights.sum(2), weights.diagonal(dim1=2, dim2=3))
    x, sizes, memory = reduction(given._replace(memory=graph), received)
    for b in range(2):
        score = weights[b].diagonal(dim1=1, dim2=2).amax(0) * weights[b].sum(1).amax(0)
        order = sorted(range(1, 13), key=lambda j: -score[j])
        kept, dropped = order[:8], order[8:]
        for place, i in enumerate(kept, start=1):
            moved = sum(graph[b, i - 1, j - 1] * given.x[b, j] for j in dropped)
            torch.testing.assert_close(x[b, place], given.x[b, i] + 0.3 * moved)
            torch.testing.assert_close(sizes[b, place], 1 + 0.3 * sum(graph[b, i - 1, j - 1] for j in dropped))
        assert torch.equal(x[b, 0], given.x[b, 0])
        assert sizes[b, 0] == 1
        assert torch.equal(memory[b], graph[b][[i - 1 for i in kept]][:, [i - 1 for i in kept]])


@pytest.mark.parametrize("graph", ["spatial", "semantic", "mixed"])
def test_the_graph_joins_neighbours_on_the_grid_and_those_that_are_alike(graph: str):
    reduction: Any = module("token_reduction", Component("gtp", P=4, num_neighbours=2, graph=graph), SHAPE)
    x = tokens().x
    patches = x[0, 1:] / x[0, 1:].norm(dim=1, keepdim=True)
    edges = torch.zeros(12, 12)
    for i in range(12):
        alike = sorted((j for j in range(12) if j != i), key=lambda j: -(patches[i] @ patches[j]))[:2]
        for j in range(12):
            near = i != j and abs(i // 4 - j // 4) <= 1 and abs(i % 4 - j % 4) <= 1
            edges[i, j] = float((graph != "semantic" and near) or (graph != "spatial" and j in alike))
    degree = edges.sum(1)
    torch.testing.assert_close(reduction.remember(x)[0], edges / (degree[:, None] * degree[None]).sqrt())


def test_neighbours_do_not_reach_over_the_border_of_the_grid():
    assert grid_neighbours((2, 3)).sum(1).tolist() == [3, 5, 3, 3, 5, 3]


def test_diffrate_prunes_the_last_and_merges_the_tail_into_the_most_similar():
    reduction: Any = module("token_reduction", Component("diffrate", prune_to=10, merge_to=6), SHAPE)
    sizes = torch.arange(1.0, 14).expand(2, -1)
    given, row = tokens(sizes), attention_weights()[:, :, 0]
    x, new_sizes, _ = reduction(given, row)
    for b in range(2):
        order = [0, *sorted(range(1, 13), key=lambda j: -row[b].mean(0)[j])][:10]
        parts, gained = {i: [i] for i in order[:6]}, {i: float(sizes[b, i]) for i in order[:6]}
        for j in order[6:]:
            similarity = {i: torch.cosine_similarity(given.x[b, i], given.x[b, j], dim=0).item() for i in order[1:6]}
            nearest = max(similarity, key=similarity.__getitem__)
            parts[nearest].append(j)
            gained[nearest] += similarity[nearest] * float(sizes[b, j])
        torch.testing.assert_close(x[b], torch.stack([given.x[b, members].mean(0) for members in parts.values()]))
        torch.testing.assert_close(new_sizes[b], torch.tensor([max(1.0, size) for size in gained.values()]))


@pytest.mark.parametrize("bidirectional", [True, False], ids=["bidirectional", "one way"])
def test_mctf_merges_the_pairs_that_attract_each_other_most(bidirectional: bool):
    reduction: Any = module("token_reduction", Component("mctf", r=3, bidirectional=bidirectional), SHAPE)
    sizes = torch.tensor([1.0, 1, 2, 1, 3, 1, 1, 5, 1, 1, 2, 1, 1]).expand(2, -1)
    given, weights = tokens(sizes), attention_weights()
    (x, new_sizes, _), merged_weights = reduction(given, weights)
    for b in range(2):
        received = weights[b].mean(dim=(0, 1))
        info, small = (1 / received) / (1 / received).max(), (1 / sizes[b]) / (1 / sizes[b]).max()

        def attraction(i: int, j: int, b: int = b, info: Tensor = info, small: Tensor = small) -> float:
            similarity = torch.cosine_similarity(given.x[b, i], given.x[b, j], dim=0)
            return float(((similarity + 1) / 2) * (info[i] * info[j]) ** (1 / 20) * (small[i] * small[j]) ** (1 / 40))

        even, odd = list(range(2, 13, 2)), list(range(1, 13, 2))
        goes = {i: i for i in range(13)}
        num_forward = 1 if bidirectional else 3
        best = {i: max(odd, key=lambda j, i=i: attraction(i, j)) for i in even}
        away = sorted(even, key=lambda i: -attraction(i, best[i]))[:num_forward]
        goes |= {i: best[i] for i in away}
        if bidirectional:
            left = [i for i in even if i not in away]
            best = {j: max(left, key=lambda i, j=j: attraction(i, j)) for j in odd}
            goes |= {j: best[j] for j in sorted(odd, key=lambda j: -attraction(best[j], j))[:2]}
        ends = {i: goes[goes[i]] for i in goes}
        groups = [[i for i in range(13) if ends[i] == end] for end in sorted(set(ends.values()))]
        share = received * sizes[b]
        columns = torch.stack([weights[b, :, :, members].sum(-1) for members in groups], dim=-1)
        for place, members in enumerate(groups):
            mean = share[members] / share[members].sum()
            torch.testing.assert_close(x[b, place], (given.x[b, members] * mean[:, None]).sum(0))
            torch.testing.assert_close(merged_weights[b, :, place], (columns[:, members] * mean[:, None]).sum(1))
            assert new_sizes[b, place] == sizes[b, members].sum()
    torch.testing.assert_close(merged_weights.sum(-1), torch.ones(2, 3, 10))


def test_attention_one_step_ahead_is_attention_where_nothing_merges():
    attention: Any = module("mixer", Component("attention", num_heads=2, head_dim=4), SHAPE)
    sizes = torch.arange(1.0, 14).expand(2, -1)
    x = tokens().x
    torch.testing.assert_close(attention(x, sizes=sizes, between=lambda weights: (weights, x)), attention(x, sizes=sizes))


def test_mctf_needs_a_mixer_whose_map_can_be_merged(monkeypatch: pytest.MonkeyPatch):
    attention: Any = type(module("mixer", Component("attention", num_heads=2, head_dim=4), SHAPE))
    monkeypatch.delattr(attention, "merged_cost")
    with pytest.raises(SpecError, match="'mctf' merges between a mixer's map and its values, which 'attention' cannot"):
        cost(placed(plain_vit(24, 2, 3, patch_size=8, img_size=64), "mctf", r=3))


def test_prefix_tokens_stay_whatever_is_reduced():
    shape = SHAPE._replace(num_prefix=3, num_patches=10)
    weights = attention_weights()
    taps = {"evit": weights[:, :, 0], "diffrate": weights[:, :, 0], "mctf": weights}
    parts = {"evit": {"keep": 0.3}, "diffrate": {"prune_to": 8, "merge_to": 5}, "mctf": {"r": 3}}
    for name, choices in parts.items():
        reduction: Any = module("token_reduction", Component(name, **choices), shape)
        reduced = reduction(tokens(), taps[name])
        reduced = reduced if isinstance(reduced, Tokens) else reduced[0]
        torch.testing.assert_close(reduced.x[:, :3], tokens().x[:, :3])


def test_random_drop_is_drawn_by_its_seed():
    def index(seed: int) -> list[int]:
        return module("token_reduction", Component("random_drop", num_kept=6, seed=seed), SHAPE).index.tolist()

    assert index(0) == index(0) != index(1)
    assert index(0) == sorted(set(index(0)))
    assert "index" not in module("token_reduction", Component("random_drop", num_kept=6, seed=0), SHAPE).state_dict()


@pytest.mark.parametrize("num_registers", [0, 1, 4, 8, 16])
def test_registers_add_as_many_tokens_to_every_block(num_registers: int):
    spec = dataclasses.replace(deit("tiny"), prefix=Component("class_token", num_registers=num_registers))
    N, C = 197 + num_registers, 192
    blocks = 12 * (12 * N * C * C + 2 * N * N * C)
    assert cost(spec).macs == blocks + 196 * 768 * C + C * 1000
    assert cost(spec).params == cost(deit("tiny")).params + 2 * num_registers * C  # tokens and their positions


def test_a_memory_that_is_made_once_is_counted_once():
    macs = [
        part.module_class.cost(part.shape, **part.arguments) for part in layout(placed(PLAIN, "gtp", P=8)) if part.kind == "token_reduction"
    ]
    expected = [Cost(fvcore_macs=64 * 64 * 24 + 56 * 8 * 24), *(Cost(fvcore_macs=n * 8 * 24) for n in (48, 40, 32))]
    assert macs == expected


def test_a_reduced_network_has_a_notation():
    assert resolve("reduced:evit,keep=0.7:deit_small") == placed(deit("small"), "evit", keep=0.7)
    assert resolve("reduced:evit,keep=0.7,fuse=false:deit_small") == placed(deit("small"), "evit", keep=0.7, fuse=False)
    schedule = ",".join(f"{name}={'/'.join(map(str, counts))}" for name, counts in SCHEDULE.items())
    assert resolve(f"reduced:diffrate,{schedule}:deit_small") == placed(deit("small"), "diffrate", **SCHEDULE)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("reduced:deit_small", "REDUCTION,CHOICE=VALUE,...:MODEL is expected"),
        ("reduced:evit,0.7:deit_small", "REDUCTION,CHOICE=VALUE,...:MODEL is expected"),
        ("reduced:evti,keep=0.7:deit_small", "unknown token_reduction 'evti'; did you mean 'evit'"),
        ("reduced:evit,keeep=0.7:deit_small", "unknown choice 'keeep' in token_reduction 'evit'; did you mean 'keep'"),
        ("reduced:evit:deit_small", "token_reduction 'evit' needs a value for 'keep'"),
        ("reduced:gtp,P=all:deit_small", "P is 'all'; allowed: int, 0 or above"),
        ("reduced:gtp,P=8:timm:vit_tiny_patch16_224", "token reduction 'gtp' takes networks of our components"),
    ],
)
def test_a_wrong_notation_says_what_is_expected(text: str, message: str):
    with pytest.raises(SpecError, match=message):
        resolve(text)


@EVERY
def test_half_precision_gives_finite_logits(reduced: ArchSpec):
    model = build(reduced, generator=torch.Generator().manual_seed(0)).eval()
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert model(x).isfinite().all()
        assert model.to(torch.bfloat16)(x.to(torch.bfloat16)).isfinite().all()


def test_layer_scale_scales_both_residuals_of_every_form():
    (stage,) = PLAIN.stages
    blocks = tuple(dataclasses.replace(block, layer_scale=Component("learned")) for block in stage.blocks)
    scaled = dataclasses.replace(PLAIN, stages=(dataclasses.replace(stage, blocks=blocks),))
    for reduced in (placed(scaled, "mctf", r=24), placed(scaled, "gtp", P=8)):
        model = build(reduced, generator=torch.Generator().manual_seed(0)).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "layer_scale" in name:
                    parameter.zero_()
        x = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            class_token = model.get_parameter("prefix.class_token") + model.get_parameter("position.pos_embed")[:, :1]
            torch.testing.assert_close(model.forward_tokens(x)[:, :1], class_token)
        assert fvcore_macs(model, 32) == cost(reduced).fvcore_macs
