"""The network of a spec: `VisionTransformer`, its construction and its initial weights.

Module names are the paths of `layout`: `stages.0.blocks.1.mixer`. The model knows the kinds of components and their order, but no component
by name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from space.component import AttentionTap, BlockForm, Tokens
from space.layout import Part, groups, layout, why_no_class_row
from space.randomness import stream
from space.registry import SpecError
from space.spec import ArchSpec


class Block(nn.Module):
    """A pre-norm residual block, `(B, N, C) -> (B, N', C)`; N' < N after a token reduction.

    The token reduction stands between the two residuals and is given the mixer's attention tap if it declares one. A component may
    declare another form of the block.
    """

    def __init__(self, path: str, take: Callable[[str], Any], form: BlockForm | None, tap: AttentionTap, drop_path: float):
        super().__init__()
        self.form = form
        self.tap = tap
        self.norm1 = take(f"{path}.norm1")
        self.mixer = take(f"{path}.mixer")
        self.layer_scale1 = take(f"{path}.layer_scale1") or nn.Identity()
        self.token_reduction = take(f"{path}.token_reduction")
        self.norm2 = take(f"{path}.norm2")
        self.feed_forward = take(f"{path}.feed_forward")
        self.layer_scale2 = take(f"{path}.layer_scale2") or nn.Identity()
        self.drop_path = _drop_path(drop_path)

    def forward(self, tokens: Tokens, with_class_row: bool = False) -> tuple[Tokens, Tensor | None]:
        """The tokens after the block; `with_class_row` also the class token's attention, `(B, H, N)`, else None."""
        if self.form is not None:
            return self.form.forward(self, tokens), None
        if tokens.memory is None and hasattr(self.token_reduction, "remember"):
            tokens = tokens._replace(memory=self.token_reduction.remember(tokens.x))
        tap = self.tap or (AttentionTap.CLASS_ROW if with_class_row else AttentionTap.NONE)
        asked = {"tap": tap} if tap else {}
        sizes = {} if tokens.sizes is None else {"sizes": tokens.sizes}
        mixed = self.mixer(self.norm1(tokens.x), **asked, **sizes)
        mixed, tapped = mixed if tap else (mixed, None)
        tokens = tokens._replace(x=self.add_mixed(tokens.x, mixed))
        if self.token_reduction is not None:
            tokens = self._reduced(tokens, tapped)
        return tokens._replace(x=self.add_fed_forward(tokens.x)), tapped if with_class_row else None

    def add_mixed(self, x: Tensor, mixed: Tensor) -> Tensor:
        """The first residual: the tokens with what the mixer gave."""
        return x + self.drop_path(self.layer_scale1(mixed))

    def add_fed_forward(self, x: Tensor) -> Tensor:
        """The second residual: the tokens with what the feed-forward gives of them."""
        return x + self.drop_path(self.layer_scale2(self.feed_forward(self.norm2(x))))

    def _reduced(self, tokens: Tokens, tapped: Any) -> Tokens:
        taken = (tapped,) if self.tap else ()
        if self.token_reduction.declaration.takes_sizes:
            return self.token_reduction(tokens, *taken)
        return tokens._replace(x=self.token_reduction(tokens.x, *taken))


class Stage(nn.Module):
    """Blocks of one width and the downsampling to the next stage: `(B, N, C) -> (B, N', C')`."""

    def __init__(self, blocks: Iterable[Block], downsampling: nn.Module | None):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)
        self.downsampling = downsampling

    def forward(self, tokens: Tokens, with_class_row: bool = False) -> tuple[Tokens, Tensor | None]:
        """The tokens; `with_class_row`, of a last stage, also the class token's attention in the last block, `(B, H, N)`, else None."""
        *blocks, last = self.blocks
        for block in blocks:
            tokens, _ = block(tokens)
        tokens, class_row = last(tokens, with_class_row)
        return (tokens if self.downsampling is None else tokens._replace(x=self.downsampling(tokens.x))), class_row


class VisionTransformer(nn.Module):
    """The network of `spec`: images `(B, in_chans, img_size, img_size)` to logits `(B, num_classes)`.

    With `with_class_row` it gives `(logits, class_row)`: `(B, num_patches)`, the class token's attention on the patches in the last
    block, mean over the heads. The row includes no prefix token and so sums to less than 1. It alone is recomputed, attention stays
    fused, and the logits are the same to the bit. Raises SpecError where `why_no_class_row` gives a reason. With `with_patches` it gives
    `(logits, patches)`: the tokens after the final norm without the prefix, `(B, num_patches, C)`.

    `drop_path` is that of the last block, or one rate for each block. `make` makes the module of a part.
    """

    def __init__(self, spec: ArchSpec, *, drop_path: float | Sequence[float] = 0.0, make: Callable[[Part], nn.Module] = Part.module):
        super().__init__()
        self.spec = spec
        parts = {part.path: part for part in layout(spec)}
        forms = {where: group.form for where, group in groups(spec)}

        def take(path: str) -> Any:
            part = parts.get(path)
            return None if part is None else make(part)

        rates = iter(drop_path if isinstance(drop_path, Sequence) else drop_path_rates(spec.depth, drop_path))
        self.patch_embed = take("patch_embed")
        self.prefix = take("prefix")
        self.position = take("position")
        self.stages = nn.ModuleList()
        for index, stage in enumerate(spec.stages):
            paths = [f"stages.{index}.blocks.{number}" for number in range(len(stage.blocks))]
            blocks = [Block(path, take, forms[f"{path}."], parts[f"{path}.mixer"].tap, next(rates)) for path in paths]
            self.stages.append(Stage(blocks, take(f"stages.{index}.downsampling")))
        self.norm = take("norm")
        self.pooling = take("pooling")
        self.head = take("head")
        self._no_class_row = why_no_class_row(spec)
        self._num_prefix = parts["norm"].output_shape.num_prefix

    def forward_tokens(self, x: Tensor) -> Tensor:
        """Tokens `(B, N, C)` after the last stage, prefix first, before the final norm."""
        return self._tokens(x)[0].x

    def forward(self, x: Tensor, *, with_class_row: bool = False, with_patches: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        if with_class_row and self._no_class_row:
            raise SpecError(f"no class row: {self._no_class_row}")
        tokens, class_row = self._tokens(x, with_class_row)
        normed = self.norm(tokens.x)
        logits = self._read(normed, tokens)
        if with_patches:
            return logits, normed[:, self._num_prefix :]
        return logits if class_row is None else (logits, class_row.mean(dim=1)[:, self._num_prefix :])

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns of parameter names by layer, in timm's convention: what precedes the blocks, each block (`coarse`: stage), the rest."""
        stage = r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.blocks\.(\d+)"
        with_the_block_before = (99999,)
        return {
            "stem": r"^(?:patch_embed|prefix|position)\.",
            "blocks": [(stage, None), (r"^stages\.(\d+)\.downsampling", with_the_block_before), (r"^norm\.", with_the_block_before)],
        }

    def embed(self, x: Tensor) -> Tokens:
        """The tokens that the first block takes, of images `(B, in_chans, img_size, img_size)`."""
        x = self.patch_embed(x)
        if self.prefix is not None:
            x = self.prefix(x)
        if self.position is not None:
            x = self.position(x)
        return Tokens(x)

    def classify(self, tokens: Tokens) -> Tensor:
        """Logits `(B, num_classes)` of the tokens after the last block."""
        return self._read(self.norm(tokens.x), tokens)

    def _read(self, normed: Tensor, tokens: Tokens) -> Tensor:
        sizes = {} if tokens.sizes is None else {"sizes": tokens.sizes}
        return self.head(self.pooling(normed, **sizes))

    def _tokens(self, x: Tensor, with_class_row: bool = False) -> tuple[Tokens, Tensor | None]:
        tokens = self.embed(x)
        *stages, last = self.stages
        for stage in stages:
            tokens, _ = stage(tokens)
        return last(tokens, with_class_row)


def drop_path_rates(depth: int, drop_path: float) -> tuple[float, ...]:
    """The stochastic depth of each block as timm spaces them: from 0 at the first to `drop_path` at the last."""
    return tuple(index * drop_path / max(1, depth - 1) for index in range(depth))


def build(spec: ArchSpec, *, generator: torch.Generator | None = None, drop_path: float = 0.0) -> VisionTransformer:
    """The initialised network on the CPU, in training mode; without a generator PyTorch's global one draws the weights.

    `drop_path` is the stochastic depth of the last block, falling linearly to 0 at the first.
    """
    model = _uninitialized(spec, drop_path)
    initialize(model, generator)
    return model


def build_seeded(
    spec: ArchSpec, *, seed: int, drop_path: float = 0.0, origin: Callable[[str], str] = lambda path: path
) -> VisionTransformer:
    """As `build`, but every module's weights are drawn from a stream named by `seed` and the module's path in the network.

    `origin` maps a path to the one that names its stream: in a network cut out of another, the path that the module had there.
    """
    model = _uninitialized(spec, drop_path)
    initialize_by_path(model, lambda path, _: torch.Generator().manual_seed(stream(seed, "weights", origin(path))))
    return model


def _uninitialized(spec: ArchSpec, drop_path: float) -> VisionTransformer:
    if not 0.0 <= drop_path < 1.0:
        raise ValueError(f"drop_path is {drop_path!r}; allowed: from 0 to below 1")
    # Constructors draw weights of their own, which are overwritten: a caller's global stream should not notice.
    with torch.random.fork_rng(devices=[]):
        return VisionTransformer(spec, drop_path=drop_path)


@torch.no_grad()
def initialize(model: nn.Module, generator: torch.Generator | None) -> None:
    """Draw every parameter anew, a pure function of the generator's state.

    Linear layers truncated normal of std 0.02 with bias 0, norms 1 and 0, convolutions PyTorch's default (Kaiming uniform,
    a = sqrt 5, as timm and As-ViT leave them); what is none of these is drawn by its component's `init_weights`.
    """
    # Inner modules first, so that a component may overrule what its layers were given.
    for module in reversed(list(model.modules())):
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.modules.conv._ConvNd):
            nn.init.kaiming_uniform_(module.weight, a=math.sqrt(5), generator=generator)
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                nn.init.uniform_(module.bias, -bound, bound, generator=generator)
        elif isinstance(module, nn.LayerNorm | nn.RMSNorm | nn.GroupNorm | nn.modules.batchnorm._BatchNorm):
            module.reset_parameters()  # ones and zeros: nothing is drawn
        if hasattr(module, "declaration") and hasattr(module, "init_weights"):
            module.init_weights(generator)  # type: ignore[operator]


def initialize_by_path(model: nn.Module, generator_of: Callable[[str, nn.Module], torch.Generator]) -> None:
    """`initialize`, but each module with weights of its own draws from the generator of its path: no draw depends on another module."""
    # Inner modules first, as in `initialize`.
    for path, module in reversed(list(model.named_modules())):
        if hasattr(module, "init_weights") or next(module.parameters(recurse=False), None) is not None:
            initialize(module, generator_of(path, module))


def _drop_path(rate: float) -> nn.Module:
    if rate == 0.0:
        return nn.Identity()
    from timm.layers.drop import DropPath

    return DropPath(rate)
