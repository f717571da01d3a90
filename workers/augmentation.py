"""Augmentation of single images, as functions of (seed, epoch, image) alone; mixing images is `workers/mixing.py`.

Shifts, flips and erasing work on whole batches, on their device: `draw` the random numbers of an epoch, then `augment`. A crop of
random shape and RandAugment work on one PIL image at a time, before that. B images, H = W = `img_size`, M images of the data set.
"""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from workers.data import IMAGENET_MEAN, IMAGENET_STD

if TYPE_CHECKING:
    from PIL.Image import Image

ERASED_AREA = (0.02, 1 / 3)
ERASED_ASPECT = (0.3, 1 / 0.3)
ERASING_ATTEMPTS = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Draws:
    """The shift, the flip and the erased box of each image; None where the recipe has no such augmentation."""

    shift: Tensor | None
    """`(M, 2)` int64: pixels down and to the right."""
    flip: Tensor | None
    """`(M,)` bool."""
    box: Tensor | None
    """`(M, 4)` int64: top, left, bottom, right of the erased box; all zeros where nothing is erased."""

    def map(self, change: Callable[[Tensor], Tensor]) -> Draws:
        """The draws with `change` applied to every column, such as a selection of rows or a move to a device."""
        columns = vars(self).items()
        return Draws(**{name: None if column is None else change(column) for name, column in columns})


def draw(recipe: Recipe, epoch: int, *, num_images: int, img_size: int) -> Draws:
    """The random numbers of an epoch for all M images; row i belongs to image i, whatever its batch."""
    uniform = np.random.default_rng(stream(recipe.seed, "augment", epoch)).random((num_images, 3))
    margin = img_size // 8
    shift = np.floor(uniform[:, :2] * (2 * margin + 1)).astype(np.int64) - margin
    return Draws(
        shift=torch.from_numpy(shift) if recipe.crop == "pad" and margin else None,
        flip=torch.from_numpy(uniform[:, 2] < 0.5) if recipe.flip else None,
        box=torch.from_numpy(_draw_boxes(recipe, epoch, num_images, img_size)) if recipe.random_erasing else None,
    )


def _draw_boxes(recipe: Recipe, epoch: int, num_images: int, img_size: int) -> np.ndarray:
    """Random Erasing Data Augmentation, https://arxiv.org/abs/1708.04896, algorithm 1, with the ranges of timm's RandomErasing.

    The paper repeats until a box fits and timm tries ten times. Here four boxes are drawn; in less than 1 % of cases none of them fits.
    """
    # A stream of its own: erasing changes neither the shifts nor the flips.
    uniform = np.random.default_rng(stream(recipe.seed, "erase", epoch)).random((num_images, 3 + 2 * ERASING_ATTEMPTS))
    area = (ERASED_AREA[0] + uniform[:, 3::2] * (ERASED_AREA[1] - ERASED_AREA[0])) * img_size**2
    low, high = map(math.log, ERASED_ASPECT)
    aspect = np.exp(low + uniform[:, 4::2] * (high - low))
    height, width = np.round(np.sqrt(area * aspect)), np.round(np.sqrt(area / aspect))
    fits = (height < img_size) & (width < img_size)
    first = np.argmax(fits, axis=1, keepdims=True)
    size = np.concatenate([np.take_along_axis(side, first, axis=1) for side in (height, width)], axis=1)
    corner = np.floor(uniform[:, 1:3] * (img_size - size + 1))
    is_erased = (uniform[:, 0] < recipe.random_erasing) & fits.any(axis=1)
    return np.concatenate((corner, corner + size), axis=1).astype(np.int64) * is_erased[:, None]


def augment(images: Tensor, draws: Draws) -> Tensor:
    """`(B, 3, H, W)` uint8 -> float32: shifted into a reflected margin, flipped, normalised, erased to the mean; B rows of draws."""
    images = _move(images, draws.shift, draws.flip)
    normalised = normalise(images)
    if draws.box is not None:
        _, _, H, W = images.shape
        rows, columns = (torch.arange(side, device=images.device) for side in (H, W))
        top, left, bottom, right = draws.box[:, :, None].unbind(1)
        inside_rows, inside_columns = (rows >= top) & (rows < bottom), (columns >= left) & (columns < right)
        normalised.masked_fill_((inside_rows[:, :, None] & inside_columns[:, None, :])[:, None], 0.0)
    return normalised


def _move(images: Tensor, shift: Tensor | None, flip: Tensor | None) -> Tensor:
    """Each image moved by its shift and mirrored, as one gather: no padded copy, no loop over images."""
    if shift is None and flip is None:
        return images
    B, C, H, W = images.shape
    rows, columns = (torch.arange(side, device=images.device).expand(B, side) for side in (H, W))
    if shift is not None:
        rows, columns = _reflect(rows - shift[:, :1], H), _reflect(columns - shift[:, 1:], W)
    if flip is not None:
        columns = torch.where(flip[:, None], columns.flip(1), columns)
    pixels = (rows[:, :, None] * W + columns[:, None, :]).view(B, 1, H * W)
    return images.view(B, C, H * W).gather(2, pixels.expand(B, C, H * W)).view(B, C, H, W)


def _reflect(positions: Tensor, size: int) -> Tensor:
    return size - 1 - (size - 1 - positions.abs()).abs()


def normalise(images: Tensor) -> Tensor:
    """`(B, 3, H, W)` uint8 -> float32, ImageNet mean 0 and standard deviation 1."""
    mean, std = _statistics(images.device)
    return images.float().sub_(mean).div_(std)


@lru_cache(maxsize=8)
def _statistics(device: torch.device) -> tuple[Tensor, Tensor]:
    """ImageNet's mean and standard deviation, for pixels of 0 to 255. Cached: a copy to the device in each step would wait for it."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) * 255 for values in (IMAGENET_MEAN, IMAGENET_STD))
    return mean, std


def make_image_transform(recipe: Recipe, img_size: int) -> Callable[[Image], Image] | None:
    """The recipe's transform of a single PIL image, made of timm's; None if there is none. It draws from the global generators.

    Raises SpecError if `randaugment` is no configuration of timm's.
    """
    steps: list[Callable[..., Any]] = []
    if recipe.crop == "resized":
        from timm.data.transforms import RandomResizedCropAndInterpolation

        steps.append(RandomResizedCropAndInterpolation(img_size, interpolation="bicubic"))
    if recipe.randaugment:
        steps.append(_randaugment(recipe.randaugment, img_size))
    if not steps:
        return None

    def transform(image: Image) -> Image:
        for step in steps:
            image = step(image)
        return image

    return transform


def _randaugment(config: str, img_size: int) -> Callable[[Image], Image]:
    from timm.data.auto_augment import posterize, rand_augment_transform

    mean = tuple(round(255 * value) for value in IMAGENET_MEAN)
    wrong = f"recipe: randaugment is {config!r}; timm expects a string such as 'rand-m9-mstd0.5-inc1'"
    # timm silently ignores a part that lacks its number.
    if not re.fullmatch(r"rand(-((mstd|mmax|inc|m|n|p)\d[\d.]*|t\w+))*", config):
        raise SpecError(wrong)
    try:
        transform = rand_augment_transform(config, {"translate_const": int(img_size * 0.45), "img_mean": mean})
    except (AssertionError, KeyError, ValueError) as error:
        raise SpecError(wrong) from error
    for op in transform.ops:
        if op.name.startswith("Posterize"):
            # timm asks for 0 bits at full magnitude, a black image, which Pillow refuses since version 13.
            op.aug_fn = lambda image, bits, **options: posterize(image, max(bits, 1), **options)
    return transform


@contextmanager
def seeded(*parts: int | str) -> Iterator[None]:
    """Seed the global generators of random, numpy and torch (CPU) by the stream named by `parts`; restore their state at the end."""
    seed = stream(*parts)
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        # torch.manual_seed would set the devices' generators too.
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])
