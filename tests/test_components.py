"""What every registered component owes: the shapes, the counts, the gradients and the state that it declares."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from space.component import (
    KINDS,
    POSITIVE,
    AttentionTap,
    BlockForm,
    Choice,
    Cost,
    ImageShape,
    Tokens,
    TokenShape,
    component,
    components,
    declaration,
)
from space.components.attention import from_windows, to_windows
from space.components.position import sincos_2d
from space.cost import cost
from space.fvcore_count import fvcore_macs
from space.layout import layout
from space.model import decay_exempt, exponent_parameters, supports_class_row
from space.registry import SpecError
from space.spec import ArchSpec, BlockSpec, Component, StageSpec, canonical, full_choices
from space.vit import build, initialize


def offered_components() -> Iterator[tuple[str, Component]]:
    """Every component with its first, middle and last offered choices, one choice moved at a time."""
    for kind in KINDS:
        for name in components.names(kind):
            declared = declaration(kind, name)
            first = {choice: offer.offered[0] for choice, offer in declared.choices.items()}
            seen = set()
            for choice, offer in [*declared.choices.items(), ("", Choice(offered=(0,)))]:
                for value in dict.fromkeys((offer.offered[0], offer.offered[len(offer.offered) // 2], offer.offered[-1])):
                    moved = Component(name, **first | ({choice: value} if choice else {}))
                    if repr(moved) not in seen:
                        seen.add(repr(moved))
                        yield kind, moved


CASES = list(offered_components())
EVERY = pytest.mark.parametrize(("kind", "part"), CASES, ids=[f"{kind}-{part!r}" for kind, part in CASES])


IMG_SIZES = (32, 64, 128, 224)


def network(kind: str, part: Component, img_size: int) -> ArchSpec:
    """A network of two small blocks at `img_size` pixels with `part` in its place, and with the class token that it needs."""
    declared = declaration(kind, part.name)
    has_prefix = kind == "prefix" or declared.needs_class_token or declared.attention_tap == AttentionTap.CLASS_ROW
    has_prefix |= part.choices.get("covers_prefix") is False
    parts: dict[str, Any] = {
        "patch_embed": Component("conv", kernel=4, stride=4),
        "prefix": Component("class_token") if has_prefix else None,
        "position": Component("learned"),
        "pooling": Component("mean"),
    }
    in_block: dict[str, Any] = {
        "mixer": Component("attention", num_heads=2, head_dim=5),
        "feed_forward": Component("mlp", hidden_dim=20),
    }
    (in_block if kind in ("mixer", "feed_forward", "token_reduction", "layer_scale") else parts)[kind] = part
    downsampling = parts.pop("downsampling", Component("patch_merging", kernel=2))
    first = BlockSpec(**in_block)
    last = BlockSpec(mixer=Component("attention", num_heads=1, head_dim=4), feed_forward=in_block["feed_forward"])
    # Patch merging needs a grid with two sides of even length and no prefix tokens.
    if kind != "downsampling" and (has_prefix or kind in ("patch_embed", "token_reduction")):
        stages = (StageSpec(embed_dim=48, blocks=(first, last)),)
    else:
        stages = (StageSpec(embed_dim=24, blocks=(first,), downsampling=downsampling), StageSpec(embed_dim=48, blocks=(last,)))
    return ArchSpec(stages=stages, img_size=img_size, num_classes=7, **parts)


def host(kind: str, part: Component) -> ArchSpec:
    """The network of the smallest image size that the values of `part` fit."""
    reasons = []
    for img_size in IMG_SIZES:
        spec = network(kind, part, img_size)
        try:
            layout(spec)
        except SpecError as error:
            reasons.append(f"{img_size} px: {error}")
        else:
            return spec
    raise AssertionError("\n".join([f"no network holds {kind} {part!r}", *reasons]))


def images(img_size: int = 32, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, img_size, img_size, generator=torch.Generator().manual_seed(1))


def built(spec: ArchSpec):
    return build(spec, generator=torch.Generator().manual_seed(0)).eval()


@EVERY
def test_the_network_that_is_checked_holds_the_component(kind: str, part: Component):
    assert (kind, canonical(kind, part)) in {(placed.kind, placed.component) for placed in layout(host(kind, part))}


@EVERY
def test_a_component_puts_out_the_shape_it_declares(kind: str, part: Component):
    spec = host(kind, part)
    model, seen = built(spec), {}

    def note(path: str, output: Any) -> None:
        # A part may act twice; the shape that it declares is that of the first time.
        seen.setdefault(path, output)

    for path, module in model.named_modules():
        module.register_forward_hook(lambda _, __, output, path=path: note(path, output))
    model(images(spec.img_size))
    for placed in layout(spec):
        output = seen[placed.path]
        while isinstance(output, tuple):
            output = output[0]
        shape = placed.output_shape
        per_sample = (shape.dim,) if placed.kind in ("pooling", "head") else (shape.num_tokens, shape.dim)
        assert tuple(output.shape) == (2, *per_sample), placed.path
        assert shape.grid is None or math.prod(shape.grid) == shape.num_patches
        if placed.kind in ("pooling", "head"):
            assert shape == TokenShape(shape.dim, 1)


@EVERY
def test_the_gradient_reaches_every_parameter(kind: str, part: Component):
    spec = host(kind, part)
    model = built(spec).train()
    (model(images(spec.img_size)) * torch.linspace(-1, 2, 7)).sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not without


@EVERY
def test_samples_do_not_see_each_other_in_evaluation(kind: str, part: Component):
    spec = host(kind, part)
    model, x = built(spec), images(spec.img_size, batch=3)
    with torch.no_grad():
        before = model(x)
        x[1] = x[1].flip(-1) * 2
        after = model(x)
    torch.testing.assert_close(after[[0, 2]], before[[0, 2]], rtol=0, atol=1e-6)  # fp32 order of sums
    assert not torch.allclose(after[1], before[1])


@EVERY
def test_evaluation_is_deterministic_and_the_state_is_all_there_is(kind: str, part: Component):
    spec = host(kind, part)
    model, other = built(spec), build(spec, generator=torch.Generator().manual_seed(5)).eval()
    other.load_state_dict(model.state_dict())
    x = images(spec.img_size)
    with torch.no_grad():
        first = model(x)
        assert torch.equal(model(x), first)
        assert torch.equal(other(x), first)


@EVERY
def test_initial_weights_are_a_function_of_the_generator_alone(kind: str, part: Component):
    spec = host(kind, part)
    model, other = built(spec), build(spec)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.fill_(math.nan)
    initialize(other, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@EVERY
def test_the_spec_survives_json(kind: str, part: Component):
    spec = host(kind, part)
    assert ArchSpec.from_json(spec.to_json()) == spec


@EVERY
def test_counts_are_those_of_the_built_network(kind: str, part: Component):
    spec = host(kind, part)
    model, counted = built(spec), cost(spec)
    assert counted.params == sum(parameter.numel() for parameter in model.parameters())
    assert counted.fvcore_macs == fvcore_macs(model, spec.img_size)
    assert counted.macs <= counted.fvcore_macs
    for placed in layout(spec):
        own = sum(parameter.numel() for parameter in model.get_submodule(placed.path).parameters())
        assert placed.module_class.cost(placed.shape, **placed.arguments).params == own, placed.path


@EVERY
def test_parameters_named_for_the_optimizer_exist(kind: str, part: Component):
    model = built(host(kind, part))
    names = dict(model.named_parameters()).keys()
    assert decay_exempt(model) <= names
    assert exponent_parameters(model) <= decay_exempt(model)


COUNTING = [(kind, part) for kind, part in CASES if kind in ("mixer", "pooling") and declaration(kind, part.name).takes_sizes]


@pytest.mark.parametrize(("kind", "part"), COUNTING, ids=[f"{kind}-{part!r}" for kind, part in COUNTING])
def test_a_token_of_size_s_is_s_equal_tokens(kind: str, part: Component):
    counts = torch.tensor([1, 1, 3, 2, 1, 4])
    shape = TokenShape(48, 4, num_prefix=2, has_class_token=True)
    made: Any = module(kind, part, shape)
    x = torch.randn(2, 6, 48, generator=torch.Generator().manual_seed(1))
    written_out = x.repeat_interleave(counts, dim=1)
    expected = made(written_out)
    if kind == "mixer":
        first = counts.cumsum(0) - counts
        expected = expected[:, first]
    torch.testing.assert_close(made(x, sizes=counts.float().expand(2, -1)), expected, rtol=1e-4, atol=1e-5)  # fp32 order of sums


def check_contract(kind: str, part: Component) -> None:
    """All of the above, of a component that only one test knows."""
    test_the_network_that_is_checked_holds_the_component(kind, part)
    test_a_component_puts_out_the_shape_it_declares(kind, part)
    test_the_gradient_reaches_every_parameter(kind, part)
    test_samples_do_not_see_each_other_in_evaluation(kind, part)
    test_evaluation_is_deterministic_and_the_state_is_all_there_is(kind, part)
    test_initial_weights_are_a_function_of_the_generator_alone(kind, part)
    test_the_spec_survives_json(kind, part)
    test_counts_are_those_of_the_built_network(kind, part)
    test_parameters_named_for_the_optimizer_exist(kind, part)


def forget(kind: str, name: str) -> None:
    del components._parts[kind, name]


@pytest.fixture
def merging_with_class_token() -> Iterator[str]:
    @component("downsampling", "merging_with_class_token_of_a_test", needs_grid=True, needs_class_token=True)
    class MergingWithClassToken(nn.Module):
        """Squares of 2 x 2 patches become one patch, and the prefix tokens get a layer of their own."""

        def __init__(self, shape: TokenShape, *, out_dim: int):
            super().__init__()
            self.shape = shape
            self.merge = nn.Linear(4 * shape.dim, out_dim, bias=False)
            self.widen = nn.Linear(shape.dim, out_dim, bias=False)

        @staticmethod
        def output_shape(shape: TokenShape, *, out_dim: int) -> TokenShape:
            assert shape.grid is not None
            height, width = shape.grid
            return shape._replace(dim=out_dim, num_patches=height * width // 4, grid=(height // 2, width // 2))

        @staticmethod
        def cost(shape: TokenShape, *, out_dim: int) -> Cost:
            patches = Cost.linear(shape.num_patches // 4, 4 * shape.dim, out_dim, bias=False)
            return patches + Cost.linear(shape.num_prefix, shape.dim, out_dim, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            prefix, patches = x.split([self.shape.num_prefix, self.shape.num_patches], dim=1)
            squares = F.pixel_unshuffle(patches.mT.unflatten(2, self.shape.grid), 2).flatten(2).mT
            return torch.cat([self.widen(prefix), self.merge(squares)], dim=1)

    yield "merging_with_class_token_of_a_test"
    forget("downsampling", "merging_with_class_token_of_a_test")


def test_a_downsampling_that_needs_a_class_token_is_placed_between_two_stages(merging_with_class_token: str):
    part = Component(merging_with_class_token)
    check_contract("downsampling", part)
    assert built(host("downsampling", part)).forward_tokens(images()).shape == (2, 1 + 16, 48)


@pytest.fixture
def coarse_patches() -> Iterator[str]:
    @component(
        "patch_embed",
        "coarse_patches_of_a_test",
        choices={name: Choice(offered=(32,), allowed=POSITIVE) for name in ("kernel", "stride")},
    )
    class CoarsePatches(nn.Conv2d):
        """A strided convolution that gives at least 2 x 2 patches."""

        def __init__(self, shape: ImageShape, *, kernel: int, stride: int, out_dim: int):
            super().__init__(shape.in_chans, out_dim, kernel, stride)

        @staticmethod
        def output_shape(shape: ImageShape, *, kernel: int, stride: int, out_dim: int) -> TokenShape:
            height, width = ((size - kernel) // stride + 1 for size in (shape.height, shape.width))
            if min(height, width) < 2:
                raise SpecError(f"an image of {shape.height}x{shape.width} pixels has fewer than 2x2 patches")
            return TokenShape(out_dim, height * width, (height, width))

        @staticmethod
        def cost(shape: ImageShape, *, kernel: int, stride: int, out_dim: int) -> Cost:
            num_patches = CoarsePatches.output_shape(shape, kernel=kernel, stride=stride, out_dim=out_dim).num_patches
            return Cost.linear(num_patches, kernel * kernel * shape.in_chans, out_dim)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).flatten(2).mT

    yield "coarse_patches_of_a_test"
    forget("patch_embed", "coarse_patches_of_a_test")


def test_values_that_do_not_fit_32_px_are_checked_in_a_larger_image(coarse_patches: str):
    part = Component(coarse_patches, kernel=32, stride=32)
    assert host("patch_embed", part).img_size == 64
    check_contract("patch_embed", part)


def test_a_component_that_fits_no_image_is_named(coarse_patches: str):
    with pytest.raises(
        AssertionError, match=r"patch_embed coarse_patches_of_a_test\(kernel=200, stride=200\)(.|\n)*224 px: .* 2x2 patches"
    ):
        host("patch_embed", Component(coarse_patches, kernel=200, stride=200))


@pytest.fixture
def top_k() -> Iterator[str]:
    @component(
        "token_reduction",
        "top_k_of_a_test",
        choices={"keep": Choice(offered=(4, 8), allowed=POSITIVE)},
        needs_class_token=True,
        attention_tap=AttentionTap.CLASS_ROW,
    )
    class TopK(nn.Module):
        """Keep the class token and the patches that it attends to most (as EViT does), weighted."""

        def __init__(self, shape: TokenShape, *, keep: int):
            super().__init__()
            self.keep = keep
            self.gain = nn.Linear(shape.dim, shape.dim, bias=False)

        @staticmethod
        def output_shape(shape: TokenShape, *, keep: int) -> TokenShape:
            if keep > shape.num_patches:
                raise SpecError(f"keep is {keep}; there are {shape.num_patches} patches")
            return shape._replace(num_patches=keep, grid=None)

        @staticmethod
        def cost(shape: TokenShape, *, keep: int) -> Cost:
            return Cost.linear(shape.num_prefix + keep, shape.dim, shape.dim, bias=False)

        def forward(self, x: Tensor, tapped: Tensor) -> Tensor:
            kept = tapped.mean(dim=1)[:, 1:].topk(self.keep).indices + 1
            patches = x.gather(1, kept.unsqueeze(-1).expand(-1, -1, x.shape[-1]))
            return self.gain(torch.cat([x[:, :1], patches], dim=1))

    yield "top_k_of_a_test"
    forget("token_reduction", "top_k_of_a_test")


def test_a_token_reduction_that_reads_the_class_row_is_one_class(top_k: str):
    part = Component(top_k, keep=8)
    check_contract("token_reduction", part)
    spec = host("token_reduction", part)
    assert built(spec).forward_tokens(images()).shape == (2, 1 + 8, 48)
    with pytest.raises(SpecError, match="keep is 80; there are 64 patches"):
        cost(network("token_reduction", Component(top_k, keep=80), img_size=32))


def test_a_tap_that_the_mixer_does_not_offer_is_refused(monkeypatch: pytest.MonkeyPatch, top_k: str):
    attention: Any = components.get("mixer", "attention")
    monkeypatch.setattr(attention, "declaration", dataclasses.replace(attention.declaration, offers_tap=AttentionTap.NONE))
    spec = network("token_reduction", Component(top_k, keep=6), img_size=32)
    with pytest.raises(SpecError, match="reads an attention tap of level CLASS_ROW; mixer 'attention' offers NONE"):
        cost(spec)


@pytest.fixture
def pairs() -> Iterator[str]:
    @component("token_reduction", "pairs_of_a_test", takes_sizes=True)
    class Pairs(nn.Module):
        """The mean of every two patches, of size two."""

        def __init__(self, shape: TokenShape):
            super().__init__()
            self.num_prefix = shape.num_prefix

        @staticmethod
        def output_shape(shape: TokenShape) -> TokenShape:
            return shape._replace(num_patches=shape.num_patches // 2, grid=None, has_sizes=True)

        @staticmethod
        def cost(shape: TokenShape) -> Cost:
            return Cost()

        def forward(self, tokens: Tokens) -> Tokens:
            prefix, patches = tokens.x[:, : self.num_prefix], tokens.x[:, self.num_prefix :]
            merged = patches.unflatten(1, (-1, 2)).mean(dim=2)
            sizes = torch.full(merged.shape[:2], 2.0)
            return Tokens(torch.cat([prefix, merged], dim=1), torch.cat([torch.ones(prefix.shape[:2]), sizes], dim=1))

    yield "pairs_of_a_test"
    forget("token_reduction", "pairs_of_a_test")


def test_sizes_reach_the_next_mixer_and_the_pooling(pairs: str):
    part = Component(pairs)
    check_contract("token_reduction", part)
    model, given = built(host("token_reduction", part)), {}
    for path in ("stages.0.blocks.0.mixer", "stages.0.blocks.1.mixer", "pooling"):
        model.get_submodule(path).register_forward_hook(
            lambda _, __, keywords, ___, path=path: given.update({path: keywords.get("sizes")}), with_kwargs=True
        )
    model(images())
    assert given["stages.0.blocks.0.mixer"] is None
    for path in ("stages.0.blocks.1.mixer", "pooling"):
        assert given[path].tolist() == [[2.0] * 32] * 2


def test_a_component_that_takes_no_sizes_is_refused_where_sizes_are_handed_on(monkeypatch: pytest.MonkeyPatch, pairs: str, top_k: str):
    with_class_token = dataclasses.replace(host("token_reduction", Component(pairs)), prefix=Component("class_token"))
    (stage,) = with_class_token.stages
    again = dataclasses.replace(stage.blocks[1], token_reduction=Component(top_k, keep=8))
    stages = (dataclasses.replace(stage, blocks=(stage.blocks[0], again)),)
    with pytest.raises(SpecError, match=r"blocks.1.token_reduction: .* takes no token sizes, which an earlier token reduction hands on"):
        cost(dataclasses.replace(with_class_token, stages=stages))
    for kind, name in (("mixer", "attention"), ("pooling", "mean")):
        cls: Any = components.get(kind, name)
        with monkeypatch.context() as patch:
            patch.setattr(cls, "declaration", dataclasses.replace(cls.declaration, takes_sizes=False))
            with pytest.raises(SpecError, match=f"{kind} '{name}' takes no token sizes"):
                # Layouts are kept, so another image size makes a new one.
                cost(network("token_reduction", Component(pairs), img_size=40 if kind == "mixer" else 48))


@pytest.fixture
def parallel() -> Iterator[str]:
    def both_at_once(block: Any, tokens: Tokens) -> Tokens:
        normed = block.norm1(tokens.x)
        return tokens._replace(x=tokens.x + block.drop_path(block.mixer(normed) + block.feed_forward(normed)))

    @component("feed_forward", "parallel_of_a_test", block_form=BlockForm(("norm1", "mixer", "feed_forward"), both_at_once))
    class Parallel(nn.Linear):
        """A feed-forward beside the mixer, on the same normalised tokens."""

        def __init__(self, shape: TokenShape):
            super().__init__(shape.dim, shape.dim)

        @staticmethod
        def cost(shape: TokenShape) -> Cost:
            return Cost.linear(shape.num_tokens, shape.dim, shape.dim)

    yield "parallel_of_a_test"
    forget("feed_forward", "parallel_of_a_test")


def test_a_component_may_declare_another_form_of_its_block(parallel: str):
    part = Component(parallel)
    check_contract("feed_forward", part)
    spec = host("feed_forward", part)
    assert "stages.0.blocks.0.norm2" not in {placed.path for placed in layout(spec)}
    block: Any = built(spec).get_submodule("stages.0.blocks.0")
    x = torch.randn(2, 64, 24)
    with torch.no_grad():
        normed = block.norm1(x)
        torch.testing.assert_close(block(Tokens(x))[0].x, x + block.mixer(normed) + block.feed_forward(normed))
    last = dataclasses.replace(spec.stages[1].blocks[0], feed_forward=part)
    stages = (spec.stages[0], dataclasses.replace(spec.stages[1], blocks=(last,)))
    assert supports_class_row(dataclasses.replace(spec, stages=stages)) == "the last block has a form of its own, which gives no attention"
    with pytest.raises(SpecError, match="token_reduction 'mctf' and feed_forward 'parallel_of_a_test' need blocks of different forms"):
        cost(dataclasses.replace(spec, stages=(spec.stages[0], dataclasses.replace(spec.stages[1], blocks=(merging(last),)))))


def merging(block: BlockSpec) -> BlockSpec:
    return dataclasses.replace(block, token_reduction=Component("mctf", r=4))


@pytest.fixture
def nothing() -> Iterator[str]:
    @component("pooling", "nothing_of_a_test")
    class Nothing(nn.Identity):
        """A part without effect in a place that cannot be empty."""

        @staticmethod
        def canonical() -> None:
            return None

    yield "nothing_of_a_test"
    forget("pooling", "nothing_of_a_test")


def test_a_part_without_effect_is_no_part_of_a_spec(nothing: str):
    assert canonical("token_reduction", Component("evit", keep=1.0)) is None
    with pytest.raises(SpecError, match="pooling is missing; registered"):
        dataclasses.replace(host("prefix", Component("class_token")), pooling=Component(nothing))


def reducing(number: int, keep: Component) -> ArchSpec:
    """Two blocks, of which the one of this number reduces its tokens."""
    block = BlockSpec(mixer=Component("attention", num_heads=2, head_dim=5), feed_forward=Component("mlp", hidden_dim=20))
    blocks = [block, block]
    blocks[number] = dataclasses.replace(block, token_reduction=keep)
    return dataclasses.replace(host("prefix", Component("class_token")), stages=(StageSpec(embed_dim=48, blocks=tuple(blocks)),))


def test_the_class_row_is_read_beside_a_token_reduction_of_the_last_block(top_k: str):
    model = built(reducing(1, Component(top_k, keep=8)))
    seen: list[Tensor] = []
    model.get_submodule("stages.0.blocks.1.token_reduction").register_forward_hook(lambda _, inputs, __: seen.append(inputs[1]))
    with torch.no_grad():
        plain = model(images())
        logits, row = model(images(), with_class_row=True)
    assert torch.equal(logits, plain)
    assert torch.equal(row, seen[1].mean(dim=1)[:, 1:])
    assert row.shape == (2, 64)


def test_there_is_no_class_row_on_a_broken_grid(top_k: str):
    assert supports_class_row(reducing(0, Component(top_k, keep=8))) == "an earlier token reduction breaks the grid of patches up"


def test_there_is_no_class_row_of_a_mixer_without_a_tap(monkeypatch: pytest.MonkeyPatch):
    attention: Any = components.get("mixer", "attention")
    monkeypatch.setattr(attention, "declaration", dataclasses.replace(attention.declaration, offers_tap=AttentionTap.NONE))
    assert supports_class_row(host("prefix", Component("class_token"))) == "the last mixer, 'attention', offers no attention tap"


def test_there_is_no_class_row_where_the_last_block_taps_more(monkeypatch: pytest.MonkeyPatch, top_k: str):
    attention, reduction = components.get("mixer", "attention"), components.get("token_reduction", top_k)
    for cls, field in ((attention, "offers_tap"), (reduction, "attention_tap")):
        monkeypatch.setattr(cls, "declaration", dataclasses.replace(cls.declaration, **{field: AttentionTap.COLUMN_SUMS}))  # type: ignore[attr-defined]
    reason = "the token reduction of the last block reads an attention tap of level COLUMN_SUMS"
    assert supports_class_row(reducing(1, Component(top_k, keep=6))) == reason


def module(kind: str, part: Component, shape: TokenShape) -> nn.Module:
    made = components.get(kind, part.name)(shape, **full_choices(kind, part))
    initialize(made, torch.Generator().manual_seed(0))
    return made


def test_the_class_row_is_the_first_row_of_the_attention_map():
    attention: Any = module("mixer", Component("attention", num_heads=3, head_dim=4), TokenShape(10, 6))
    x = torch.randn(2, 6, 10)
    _, row = attention(x, tap=AttentionTap.CLASS_ROW)
    q, k, _ = attention.qkv(x).reshape(2, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
    torch.testing.assert_close(row, (q @ k.mT / 2).softmax(-1)[:, :, 0])
    torch.testing.assert_close(row.sum(-1), torch.ones(2, 3))


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that any operator gives."""

    def __init__(self):
        super().__init__()
        self.num_elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.num_elements = max([self.num_elements, *sizes])
        return result


@pytest.mark.parametrize("with_sizes", [False, True], ids=["plain", "sizes"])
@pytest.mark.parametrize("tap", AttentionTap, ids=lambda tap: tap.name)
def test_the_map_of_attention_is_made_only_for_the_taps_that_read_it(tap: AttentionTap, with_sizes: bool):
    N = 300
    attention: Any = module("mixer", Component("attention", num_heads=2, head_dim=4), TokenShape(8, N))
    sizes = torch.full((1, N), 2.0) if with_sizes else None
    with torch.no_grad(), Largest() as largest:
        attention(torch.randn(1, N, 8), tap=tap, sizes=sizes)
    assert (largest.num_elements >= N * N) == (tap >= AttentionTap.COLUMN_SUMS)


def test_every_tap_reads_one_map_and_leaves_the_tokens_as_they_are():
    attention: Any = module("mixer", Component("attention", num_heads=3, head_dim=4), TokenShape(10, 6))
    x, sizes = torch.randn(2, 6, 10), torch.tensor([[1.0, 2, 1, 3, 1, 1], [1, 1, 4, 1, 1, 2]])
    plain = attention(x, sizes=sizes)
    tapped = {}
    for tap in (AttentionTap.CLASS_ROW, AttentionTap.COLUMN_SUMS, AttentionTap.FULL_MAP):
        y, tapped[tap] = attention(x, tap=tap, sizes=sizes)
        torch.testing.assert_close(y, plain)
    q, k, _ = attention.qkv(x).reshape(2, 6, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 2).exp() * sizes[:, None, None]
    weights = weights / weights.sum(-1, keepdim=True)
    torch.testing.assert_close(tapped[AttentionTap.FULL_MAP], weights)
    torch.testing.assert_close(tapped[AttentionTap.CLASS_ROW], weights[:, :, 0])
    torch.testing.assert_close(tapped[AttentionTap.COLUMN_SUMS].sums, weights.sum(2))
    torch.testing.assert_close(tapped[AttentionTap.COLUMN_SUMS].diagonal, weights.diagonal(dim1=2, dim2=3))


def test_permuting_the_tokens_permutes_what_attention_puts_out():
    attention = module("mixer", Component("attention", num_heads=2, head_dim=4), TokenShape(8, 9))
    x, order = torch.randn(2, 9, 8), torch.randperm(9)
    torch.testing.assert_close(attention(x[:, order]), attention(x)[:, order])


def test_windows_are_square_pieces_of_the_grid_and_come_back():
    x = torch.arange(24.0).reshape(1, 24, 1)
    windows = to_windows(x, (4, 6), 2)
    assert windows.flatten(1).tolist()[1] == [3, 4, 5, 9, 10, 11]
    assert torch.equal(from_windows(windows, (4, 6), 2), x)


def test_a_window_is_attended_to_as_a_network_of_its_own():
    shape = TokenShape(8, 16, (4, 4))
    windowed: Any = module("mixer", Component("window_attention", num_heads=2, head_dim=4, splits=2), shape)
    whole: Any = module("mixer", Component("attention", num_heads=2, head_dim=4), shape)
    whole.load_state_dict(windowed.state_dict())
    x = torch.randn(3, 16, 8)
    upper_right = x.reshape(3, 4, 4, 8)[:, :2, 2:].reshape(3, 4, 8)
    torch.testing.assert_close(windowed(x).reshape(3, 4, 4, 8)[:, :2, 2:].reshape(3, 4, 8), whole(upper_right))


def test_attention_can_be_differentiated_forward_under_the_math_backend():
    attention = module("mixer", Component("window_attention", num_heads=2, head_dim=4, splits=2), TokenShape(8, 16, (4, 4)))
    x = torch.randn(1, 16, 8)
    with sdpa_kernel(SDPBackend.MATH):
        _, tangent = torch.func.jvp(attention, (x,), (torch.ones_like(x),))
    assert tangent.any()


def test_sines_and_cosines_are_those_of_mae():
    embedding = sincos_2d(8, (3, 5))
    assert embedding.shape == (15, 8)
    row, column = 2, 3
    angles = [column * 1.0, column * 0.01, row * 1.0, row * 0.01]
    expected = [math.sin(a) for a in angles[:2]] + [math.cos(a) for a in angles[:2]]
    expected += [math.sin(a) for a in angles[2:]] + [math.cos(a) for a in angles[2:]]
    torch.testing.assert_close(embedding[row * 5 + column], torch.tensor(expected))


def test_prefix_tokens_get_no_sines():
    position = module("position", Component("sincos"), TokenShape(8, 4, (2, 2), num_prefix=2, has_class_token=True))
    x = torch.randn(1, 6, 8)
    assert torch.equal(position(x)[:, :2], x[:, :2])
    assert not list(position.state_dict())
