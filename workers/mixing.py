"""Augmentations that mix a batch with itself: Mixup and CutMix (timm's), Patch Mixing, MaskMix, TransMix and MixPro.

    mixup, cutmix   https://arxiv.org/abs/1710.09412, https://arxiv.org/abs/1905.04899: timm.data.Mixup with alpha 0.8 and 1.0;
                    mixup_cutmix is one or the other at even odds
    patch_mixing    Hardwiring ViT Patch Selectivity into CNNs using Patch Mixing, https://arxiv.org/abs/2306.17848: k cells of a
                    grid are replaced by the partner's. Its code is not public; the law is ours: half of the batches on each grid of
                    `default_grids`, k the nearest to r n in 1..n-1, r ~ Beta(1, 1)
    mask_mix        MixPro: Data Augmentation with MaskMix and Progressive Attention Labeling for Vision Transformer,
                    https://arxiv.org/abs/2304.12043: k cells of a grid are kept, cells being whole multiples of a patch
    mixpro          the same images; progressive attention labelling moves the label's weight to what the class token attends to
                    as the network grows confident: lam = alpha lam_attn + (1 - alpha) lam_area, hard labels
    transmix        TransMix: Attend to Mix for Vision Transformers, https://arxiv.org/abs/2111.09833: CutMix's image,
                    lam = (lam_area + lam_attn) / 2

The released code of TransMix also draws Mixup in a fifth of the batches, that of MixPro Mixup or CutMix in half of them; here every
batch is the method's own.

Every method weighs two labels per image, lam for its own and 1 - lam for its partner's. `recipe.mixing_reference` does as the
released code, the default what it means to do:

    released code                                         default
    k = ceil(r n): k = n, nothing mixed, once in n        k uniform in 1..n-1: always mixed and E[lam] = 1/2,
    batches, and E[lam] = 1/2 + 1/(2 n)                   not in favour of the own image
    lam_area = k / n, though the last cells are cropped   the share of pixels, exactly
    the loss also has a gradient through alpha            alpha weighs the loss and is not trained by it
    TransMix's box on the token grid: nearest pixel       share of each token's pixels, exactly

Letters: g cells per side of a grid, n = g^2, K classes; `own` says which cells show the image itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from space.recipe import Recipe
from space.registry import SpecError
from workers.corruptions import default_grids

MIXUP_ALPHA = 0.8
CUTMIX_ALPHA = 1.0
MASK_MIX_GRID = 4
"""Cells per side of MaskMix: 56 px at 224, as in the released configurations."""

CountRule = Literal["ceil", "round", "uniform"]


@dataclass(frozen=True, kw_only=True, eq=False)
class Mixed:
    """A mixed batch: pixels and label of image i are its own for a share `lam[i]`, and of image `partner[i]` for the rest.

    A batch that was left as it is holds the very tensor that was given, lam 1 and no mask; an image that is its own partner has lam 1.
    """

    images: Tensor
    """(B, 3, H, W)"""
    partner: Tensor
    """(B,) int64"""
    lam: Tensor
    """(B,) float32: the own image's share of the area."""
    mask: Tensor | None = None
    """(B, g, g) bool, true where a cell is the own image's or would be, had it a partner; None for Mixup and CutMix."""
    cell_size: int = 1
    """Pixels per side of a cell of the mask; those at the right and lower border may be cropped."""


class Mixer(Protocol):
    """One method of mixing: images before the forward pass, the loss after it. Draws from the seed alone, on the CPU, without a sync."""

    needs_class_row: ClassVar[bool] = False
    """Whether the loss reads how the class token of the last block attends to the patches."""

    def mix(self, images: Tensor, seed: int) -> Mixed:
        """The mixed batch of images `(B, 3, H, H)`, which are not written to."""
        ...

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        """Mean cross entropy of logits `(B, K)` to labels `(B,)` mixed as the images were.

        `class_row` `(B, N)` is the class token's attention to the N patches of a square grid; it need not sum to 1.
        """
        return mixed_loss(logits, labels, mixed.partner, mixed.lam, label_smoothing)


def make_mixer(recipe: Recipe, *, img_size: int, patch_size: int | None, num_processes: int = 1) -> Mixer | None:
    """The mixer of `recipe.mixing`, or None; `patch_size` None means that the network has no patches to respect.

    Raises SpecError if a process has fewer than two images of a batch at a time, or a grid does not fit the image in whole patches.
    """
    if recipe.mixing == "none":
        return None
    num_parts = recipe.num_accumulation * num_processes
    if recipe.batch_size < 2 * num_parts:
        parts = f"batch_size {recipe.batch_size} in {num_parts} parts" if num_parts > 1 else "batch_size 1"
        raise SpecError(f"mixing {recipe.mixing!r} needs two images at a time; {parts} gives one")
    prob, reference = recipe.mixing_prob, recipe.mixing_reference
    match recipe.mixing:
        case "mixup":
            return TimmMixing(prob=prob, mixup_alpha=MIXUP_ALPHA)
        case "cutmix":
            return TimmMixing(prob=prob, cutmix_alpha=CUTMIX_ALPHA)
        case "mixup_cutmix":
            return TimmMixing(prob=prob, mixup_alpha=MIXUP_ALPHA, cutmix_alpha=CUTMIX_ALPHA)
        case "transmix":
            return TransMix(prob=prob, reference=reference)
        case "patch_mixing":
            return GridMixing(cell_sizes=_cell_sizes(recipe, img_size, 1), prob=prob, drawn="partner", rule="round", reference=False)
        case "mask_mix" | "mixpro":
            mixing = GridMixing if recipe.mixing == "mask_mix" else MixPro
            cell_sizes, rule = _cell_sizes(recipe, img_size, patch_size or 1), "ceil" if reference else "uniform"
            return mixing(cell_sizes=cell_sizes, prob=prob, drawn="own", rule=rule, reference=reference)


@dataclass(frozen=True, kw_only=True)
class TimmMixing(Mixer):
    """timm's Mixup, CutMix or, when both alphas are given, one of them at even odds; one lam for a batch, which meets its reverse."""

    prob: float
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0

    def mix(self, images: Tensor, seed: int) -> Mixed:
        from timm.data.mixup import Mixup

        mixup = Mixup(self.mixup_alpha, self.cutmix_alpha, prob=self.prob, switch_prob=0.5, label_smoothing=0.0, num_classes=2)
        mixed = images.clone()
        with numpy_seeded(seed):
            # It writes to its argument, of even length, and tells lam only in the labels: two, of two classes, say it all.
            _, labels = mixup(mixed[: len(images) // 2 * 2], torch.arange(2))
        lam = labels[0, 0].item()
        return _unmixed(images) if lam == 1 else _with_reverse(mixed, lam)


@dataclass(frozen=True, kw_only=True)
class GridMixing(Mixer):
    """Mixing by the cells of a grid with a random permutation of the batch: Patch Mixing and MaskMix.

    A batch has one cell size of `cell_sizes`, equally likely, and one number k of cells, by `rule` from r ~ Beta(1, 1); an image
    has its own random k cells, which are filled by the `drawn` image.
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
            return _unmixed(images)
        cell_size = self.cell_sizes[int(draw_uniform(generator) * len(self.cell_sizes))]
        grid = math.ceil(img_size / cell_size)
        k = cell_count(draw_uniform(generator), grid**2, self.rule)
        partner = _send(torch.randperm(B, generator=generator), images.device)
        cells = draw_cells(B, grid, k, generator, images.device)
        is_own_partner = partner == torch.arange(B, device=images.device)
        own = (cells if self.drawn == "own" else ~cells) | is_own_partner[:, None, None]
        lam = token_shares(own, cell_size, img_size, 1)[:, 0]
        if self.reference:
            lam = torch.where(is_own_partner, 1.0, k / grid**2)
        return Mixed(images=grid_mix(images, own, partner, cell_size), partner=partner, lam=lam, mask=own, cell_size=cell_size)


@dataclass(frozen=True, kw_only=True)
class MixPro(GridMixing):
    """MaskMix with progressive attention labelling: labels are hard, smoothing enters alpha alone, as in the released code."""

    needs_class_row: ClassVar[bool] = True

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        if mixed.mask is None:
            return mixed_loss(logits, labels, mixed.partner, mixed.lam, label_smoothing)
        assert class_row is not None, "progressive attention labelling reads the class row"
        shares = token_shares(mixed.mask, mixed.cell_size, mixed.images.shape[-1], class_row.shape[1])
        alpha = confidence(logits, labels, mixed.partner, mixed.lam, label_smoothing)
        lam = mixed.lam.lerp(attended_share(class_row, shares), alpha if self.reference else alpha.detach())
        return mixed_loss(logits, labels, mixed.partner, lam, 0.0)


@dataclass(frozen=True, kw_only=True)
class TransMix(Mixer):
    """A box of the batch's reverse, pasted as CutMix does; half of the label follows the class token's attention."""

    needs_class_row: ClassVar[bool] = True
    prob: float
    reference: bool

    def mix(self, images: Tensor, seed: int) -> Mixed:
        from timm.data.mixup import cutmix_bbox_and_lam

        with numpy_seeded(seed):
            if np.random.rand() >= self.prob:
                return _unmixed(images)
            (top, bottom, left, right), lam = cutmix_bbox_and_lam(images.shape, np.random.beta(CUTMIX_ALPHA, CUTMIX_ALPHA))
        own = torch.ones(images.shape[-2:], dtype=torch.bool, device=images.device)
        own[top:bottom, left:right] = False
        mixed, even = images.clone(), len(images) // 2 * 2
        mixed[:even, :, top:bottom, left:right] = images[:even, :, top:bottom, left:right].flip(0)
        return _with_reverse(mixed, float(lam), own.expand(len(images), -1, -1))

    def loss(self, logits: Tensor, labels: Tensor, mixed: Mixed, class_row: Tensor | None, label_smoothing: float) -> Tensor:
        lam = mixed.lam
        if mixed.mask is not None:
            assert class_row is not None, "TransMix reads the class row"
            box = mixed.mask[:1]  # the batch has one
            reduced = nearest_tokens(box, class_row.shape[1]) if self.reference else token_shares(box, 1, box.shape[-1], class_row.shape[1])
            lam = (lam + attended_share(class_row, reduced)) / 2
        return mixed_loss(logits, labels, mixed.partner, lam, label_smoothing)


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

    `ceil`: uniform in 1..n. `uniform`: uniform in 1..n-1. `round`: the nearest to r n in 1..n-1, whose ends are half as likely
    again as the rest. The last two are symmetric, so that E[k] = n / 2.
    """
    if rule == "round":
        return min(max(math.floor(r * n + 0.5), 1), n - 1)
    return max(1, math.ceil(r * (n if rule == "ceil" else n - 1)))


def draw_cells(num_images: int, grid: int, k: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """`(B, g, g)` bool with exactly `k` cells true in every image, all choices equally likely, the same on every device."""
    order = _send(torch.rand(num_images, grid**2, generator=generator), torch.device(device)).argsort(dim=1, stable=True)
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


def nearest_tokens(own: Tensor, num_tokens: int) -> Tensor:
    """`(B, H, H) -> (B, N)` float32: the value at each token's first pixel, as nearest-neighbour interpolation has it."""
    tokens = math.isqrt(num_tokens)
    first = torch.arange(tokens, device=own.device) * own.shape[-1] // tokens
    return own[:, first][:, :, first].flatten(1).float()


def attended_share(class_row: Tensor, shares: Tensor) -> Tensor:
    """lam_attn `(B,)`: the share of the attention `(B, N)` that falls on own tokens `(B, N)`; no gradient flows to the attention."""
    # A row that underflowed to zero counts as uniform.
    attention = class_row.detach().float() + torch.finfo(torch.float32).tiny
    return (shares * attention).sum(dim=1) / attention.sum(dim=1)


def confidence(logits: Tensor, labels: Tensor, partner: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """alpha `(B,)` in [0, 1] of progressive attention labelling: the cosine between the prediction and the smoothed mixed label."""
    K = logits.shape[1]
    own, other = F.one_hot(labels, K), F.one_hot(labels[partner], K)
    target = (1 - label_smoothing) * (lam[:, None] * own + (1 - lam[:, None]) * other) + label_smoothing / K
    return F.cosine_similarity(target, logits.float().softmax(dim=1)).clamp(0, 1)


def mixed_loss(logits: Tensor, labels: Tensor, partner: Tensor, lam: Tensor, label_smoothing: float) -> Tensor:
    """Mean over the batch of lam CE(z, y) + (1 - lam) CE(z, y_partner), labels smoothed as timm does: the soft-target cross entropy."""
    own, other = (
        F.cross_entropy(logits.float(), some, label_smoothing=label_smoothing, reduction="none") for some in (labels, labels[partner])
    )
    return (lam * own + (1 - lam) * other).mean()


@contextmanager
def numpy_seeded(seed: int) -> Iterator[None]:
    """numpy's global generator seeded by 64 bits, and afterwards as it was: timm draws from no other. Not for concurrent threads."""
    before = np.random.get_state()
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])
    try:
        yield
    finally:
        np.random.set_state(before)


def _cell_sizes(recipe: Recipe, img_size: int, patch_size: int) -> tuple[int, ...]:
    """Pixels per side of the cells of the recipe's grids or the method's own: multiples of the patch, cropped at the border at most."""
    where = f"mixing {recipe.mixing!r} at {img_size} px"
    # The smallest cell that makes a grid of so many; 1 cell per side mixes nothing.
    sizes = {math.ceil(img_size / size): size for size in reversed(range(patch_size, img_size, patch_size))}
    if not sizes:
        raise SpecError(f"{where}: a patch of {patch_size} px leaves no two cells to mix")
    if recipe.mixing_grids:
        grids = recipe.mixing_grids
    elif recipe.mixing == "patch_mixing":
        try:
            grids = default_grids(img_size)
        except ValueError as problem:
            raise SpecError(f"{where}: {problem}; name its mixing_grids") from problem
    else:
        grids = (min(sizes, key=lambda grid: (abs(grid - MASK_MIX_GRID), grid)),)
    if unfit := [grid for grid in grids if grid not in sizes]:
        patches = f" of whole {patch_size} px patches" if patch_size > 1 else ""
        raise SpecError(f"{where}: {unfit[0]} cells per side{patches} do not fit; allowed: {', '.join(map(str, sorted(sizes)))}")
    return tuple(sizes[grid] for grid in grids)


def _unmixed(images: Tensor) -> Mixed:
    B = len(images)
    return Mixed(images=images, partner=torch.arange(B, device=images.device), lam=torch.ones(B, device=images.device))


def _with_reverse(images: Tensor, lam: float, mask: Tensor | None = None) -> Mixed:
    """A batch mixed with its reverse; of an odd number the last image is left out and is its own partner."""
    B, even = len(images), len(images) // 2 * 2
    order = torch.arange(B, device=images.device)
    partner = torch.cat([order[:even].flip(0), order[even:]])
    return Mixed(images=images, partner=partner, lam=torch.where(partner == order, 1.0, lam), mask=mask)


def _send(drawn: Tensor, device: torch.device) -> Tensor:
    # From pageable memory the copy would wait for the device.
    return drawn.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else drawn.to(device)
