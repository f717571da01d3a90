"""The contract of an augmentation that mixes a batch with itself, and what several of them share.

    @mixing("cutmix")
    class CutMix(Mixer):
        @classmethod
        def of(cls, recipe, *, img_size, patch_size): ...

Each is one file of `workers/mixings`. Every method weighs two labels per image, lam for its own and 1 - lam for its partner's.
`recipe.mixing_reference` follows the released code; the default does what the paper means:

    released code                                         default
    k = ceil(r n): k = n, nothing mixed, once in n        k uniform in 1..n-1: always mixed and E[lam] = 1/2,
    batches, and E[lam] = 1/2 + 1/(2 n)                   not in favour of the own image
    lam_area = k / n, though the last cells are cropped   the share of pixels, exactly
    the loss also has a gradient through alpha            alpha weighs the loss and is not trained by it
    MixPro's loss is to hard labels                       to labels smoothed as in every other method
    TransMix's box on the token grid: nearest pixel       share of each token's pixels, exactly

The released code of TransMix also draws Mixup in a fifth of the batches, that of MixPro Mixup or CutMix in half of them; here every
batch is the method's own.

Letters: g cells per side of a grid, n = g^2, K classes; `own` marks the cells that show the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol, Self

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from space.recipe import Recipe
from space.registry import SpecError
from workers.mixings import mixing_class

CUTMIX_ALPHA = 1.0

CountRule = Literal["ceil", "round", "uniform"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """A mixed batch: pixels and label of image i are its own for a share `lam[i]`, and of image `partner[i]` for the rest.

    An unmixed batch holds the given tensor itself, lam 1 and no mask. An image that is its own partner has lam 1.
    """

    images: Tensor
    """(B, 3, H, W)"""
    partner: Tensor
    """(B,) int64"""
    lam: Tensor
    """(B,) float32: the own image's share of the area."""
    mask: Tensor | None = None
    """(B, g, g) bool, true where a cell shows the image itself, and anything if it is its own partner. None for Mixup and CutMix."""
    cell_size: int = 1
    """Pixels per side of a cell of the mask; those at the right and lower border may be cropped."""
    token_lam: Tensor | None = None
    """(B, g, g) float32: the own image's share of the label of every token of the last stage; None if tokens have the image's label."""


class Mixer(Protocol):
    """One method of mixing: images before the forward pass, the loss after it.

    It draws from the seed alone, on the CPU, and never waits for the device.
    """

    needs_class_row: ClassVar[bool] = False
    """Whether the loss reads how the class token of the last block attends to the patches."""
    has_token_labels: ClassVar[bool] = False
    """Whether the tokens of the last stage have labels of their own, which a second classifier learns beside the first."""

    @classmethod
    def of(cls, recipe: Recipe, *, img_size: int, patch_size: int | None) -> Self:
        """The mixer of a recipe; `patch_size` None means that the network has no patches to respect.

        Raises SpecError if the recipe's grid does not fit the image.
        """
        ...

    def mix(self, images: Tensor, seed: int) -> Mixed:
        """The mixed batch of images `(B, 3, H, H)`, which are not written to."""
        ...

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        """Mean cross entropy of logits `(B, K)` to labels `(B,)` mixed as the images were.

        `class_row` `(B, N)` is the class token's attention to the N patches of a square grid; it need not sum to 1.
        """
        return mixed_loss(logits, labels, mixed.partner, mixed.lam, label_smoothing)


def make_mixer(recipe: Recipe, *, img_size: int, patch_size: int | None, num_processes: int = 1) -> Mixer | None:
    """The mixer of `recipe.mixing`, None for `none`; `patch_size` as for `Mixer.of`.

    Raises SpecError if there is no such mixing, if a process has fewer than two images of a batch at a time, or if a grid does not
    fit the image in whole patches.
    """
    if recipe.mixing == "none":
        return None
    method = mixing_class(recipe.mixing)
    num_parts = recipe.num_accumulation * num_processes
    if recipe.batch_size < 2 * num_parts:
        parts = f"batch_size {recipe.batch_size} in {num_parts} parts" if num_parts > 1 else "batch_size 1"
        raise SpecError(f"mixing {recipe.mixing!r} needs two images at a time; {parts} gives one")
    return method.of(recipe, img_size=img_size, patch_size=patch_size)


@dataclass(frozen=True, kw_only=True)
class GridMixing(Mixer):
    """Mixing by the cells of a grid with a random permutation of the batch; what Patch Mixing and MaskMix share.

    A batch draws one cell size of `cell_sizes`, equally likely, and one number k of cells, by `rule` from r ~ Beta(1, 1). Each image draws
    k cells of its own, which show the `drawn` image.
    """

    cell_sizes: tuple[int, ...]
    prob: float
    drawn: Literal["own", "partner"]
    rule: CountRule
    reference: bool

    def mix(self, images: Tensor, seed: int) -> Mixed:
        B, _, _, img_size = images.shape
        generator = torch.Generator().manual_seed(seed)
        if draw_uniform(generator) >= self.prob:
            return unmixed(images)
        cell_size = self.cell_sizes[int(draw_uniform(generator) * len(self.cell_sizes))]
        grid = math.ceil(img_size / cell_size)
        k = cell_count(draw_uniform(generator), grid**2, self.rule)
        partner = send(torch.randperm(B, generator=generator), images.device)
        cells = draw_cells(B, grid, k, generator, images.device)
        is_own_partner = partner == torch.arange(B, device=images.device)
        own = (cells if self.drawn == "own" else ~cells) | is_own_partner[:, None, None]
        lam = token_shares(own, cell_size, img_size, 1)[:, 0]
        if self.reference:
            lam = torch.where(is_own_partner, 1.0, k / grid**2)
        return Mixed(images=grid_mix(images, own, partner, cell_size), partner=partner, lam=lam, mask=own, cell_size=cell_size)


def grid_mix(images: Tensor, own: Tensor, partner: Tensor, cell_size: int) -> Tensor:
    """Images `(B, 3, H, W)` where `own` `(B, g, g)` bool is true, those of `partner` `(B,)` elsewhere, by cells of `cell_size` pixels.

    Cells that reach over the right and lower border are cropped. Holds one copy of the batch besides `images`, and a byte per pixel.
    """
    H, W = images.shape[-2:]
    pixels = own.repeat_interleave(cell_size, 1)[:, :H].repeat_interleave(cell_size, 2)[:, None, :, :W]
    mixed = images[partner]
    return torch.where(pixels, images, mixed, out=mixed)


def draw_uniform(generator: torch.Generator) -> float:
    """A number in [0, 1): a draw from Beta(1, 1)."""
    return torch.rand((), dtype=torch.float64, generator=generator).item()


def cell_count(r: float, n: int, rule: CountRule) -> int:
    """The number k of n cells for r in [0, 1) drawn uniformly.

    `ceil`: uniform in 1..n. `uniform`: uniform in 1..n-1. `round`: the nearest to r n in 1..n-1; both ends are 1.5 times as likely as the
    other counts. The last two are symmetric, so that E[k] = n / 2.
    """
    if rule == "round":
        return min(max(math.floor(r * n + 0.5), 1), n - 1)
    return max(1, math.ceil(r * (n if rule == "ceil" else n - 1)))


def draw_cells(num_images: int, grid: int, k: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`(B, g, g)` bool with exactly `k` cells true in every image, all choices equally likely, the same on every device."""
    order = send(torch.rand(num_images, grid**2, generator=generator), torch.device(device)).argsort(dim=1, stable=True)
    return (order < k).view(num_images, grid, grid)


def token_shares(own: Tensor, cell_size: int, img_size: int, num_tokens: int) -> Tensor:
    """The own share of each token's area, `(B, g, g) -> (B, N)` float32, exact whether or not cells and tokens align.

    With one token it is the share of the image.
    """
    tokens = math.isqrt(num_tokens)
    assert tokens**2 == num_tokens, f"{num_tokens} tokens are no square grid"
    # Lengths are in units of a `tokens`-th of a pixel: whole numbers, so nothing is rounded before the division.
    token = torch.arange(tokens, device=own.device)[:, None] * img_size
    cell = torch.arange(own.shape[-1], device=own.device) * (cell_size * tokens)
    overlap = ((token + img_size).minimum(cell + cell_size * tokens) - token.maximum(cell)).clamp_min(0).float()
    # Not products of matrices, which autocast and TF32 would round.
    columns = (own[:, :, None] * overlap).sum(dim=-1)
    return (columns[:, None] * overlap[:, :, None]).sum(dim=2).flatten(1) / img_size**2


def attended_share(class_row: Tensor, shares: Tensor) -> Tensor:
    """lam_attn `(B,)`: the share of the attention `(B, N)` that falls on own tokens `(B, N)`; no gradient flows to the attention."""
    # A row that underflowed to zero counts as uniform.
    attention = class_row.detach().float() + torch.finfo(torch.float32).tiny
    return (shares * attention).sum(dim=1) / attention.sum(dim=1)


def mixed_loss(logits: Tensor, labels: Tensor, partner: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch of lam CE(z, y) + (1 - lam) CE(z, y_partner), labels smoothed as timm does: the soft-target cross entropy."""
    own, other = (
        F.cross_entropy(logits.float(), some, label_smoothing=label_smoothing, reduction="none") for some in (labels, labels[partner])
    )
    return (lam * own + (1 - lam) * other).mean()


def token_loss(token_logits: Tensor, labels: Tensor, mixed: Mixed, label_smoothing: float) -> Tensor:
    """Mean cross entropy of the logits `(B, N, K)` of all tokens to labels `(B,)` mixed as each token was."""
    B, N, _ = token_logits.shape
    lam = mixed.lam[:, None].expand(B, N) if mixed.token_lam is None else mixed.token_lam.reshape(B, N)
    # Token n of image i is row i N + n; a partner is known by its first token.
    partner = (mixed.partner * N).repeat_interleave(N)
    return mixed_loss(token_logits.flatten(0, 1), labels.repeat_interleave(N), partner, lam.flatten(), label_smoothing)


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """Seed numpy's global generator, the only one that timm draws from, and restore its state at the end. Not for concurrent threads."""
    before = np.random.get_state()
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(before)


def cell_sizes(recipe: Recipe, *, img_size: int, patch_size: int, default: Callable[[Collection[int]], Sequence[int]]) -> tuple[int, ...]:
    """Pixels per side of the cells of the recipe's grids: multiples of the patch, cropped at the border at most.

    If the recipe names no grid, `default` picks the cells per side from those that are possible. Raises SpecError if a grid does not fit,
    or if `default` raises ValueError.
    """
    where = f"mixing {recipe.mixing!r} at {img_size} px"
    # The smallest cell that makes a grid of so many; 1 cell per side mixes nothing.
    sizes = {math.ceil(img_size / size): size for size in reversed(range(patch_size, img_size, patch_size))}
    if not sizes:
        raise SpecError(f"{where}: a patch of {patch_size} px leaves no two cells to mix")
    try:
        grids = recipe.mixing_grids or default(sizes)
    except ValueError as problem:
        raise SpecError(f"{where}: {problem}; name its mixing_grids") from problem
    if unfit := [grid for grid in grids if grid not in sizes]:
        patches = f" of whole {patch_size} px patches" if patch_size > 1 else ""
        raise SpecError(f"{where}: {unfit[0]} cells per side{patches} do not fit; allowed: {', '.join(map(str, sorted(sizes)))}")
    return tuple(sizes[grid] for grid in grids)


def unmixed(images: Tensor) -> Mixed:
    """The batch as it was given."""
    B = len(images)
    return Mixed(images=images, partner=torch.arange(B, device=images.device), lam=torch.ones(B, device=images.device))


def mixed_with_reverse(images: Tensor, lam: float, mask: Tensor | None = None) -> Mixed:
    """A batch mixed with its reverse; of an odd number the last image is left out and is its own partner."""
    B, even = len(images), len(images) // 2 * 2
    order = torch.arange(B, device=images.device)
    partner = torch.cat([order[:even].flip(0), order[even:]])
    return Mixed(images=images, partner=partner, lam=torch.where(partner == order, 1.0, lam), mask=mask)


def send(drawn: Tensor, device: torch.device) -> Tensor:
    """What was drawn on the CPU, on the device."""
    # From pageable memory the copy would wait for the device.
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
