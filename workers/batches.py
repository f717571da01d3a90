"""Batches for training and evaluation, in an order that can be resumed at any step.

The order of an epoch depends on (seed, epoch) alone, the augmentation of an image on (seed, epoch, image) alone: not on the batch
size, the number of processes or the number of loader workers. A set in memory is gathered and augmented on the network's device, so
that no batch is copied to it. A DataLoader is used only where images are decoded or transformed one by one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader

from space.randomness import stream
from space.recipe import Recipe
from workers.augmentation import augment, draw, make_image_transform, normalise, seeded
from workers.data import DataSet, to_pixels

if TYPE_CHECKING:
    from PIL.Image import Image

ROWS_PER_COPY = 4096


class Batch(NamedTuple):
    """Images and labels on one device."""

    images: Tensor
    """`(B, 3, H, W)` float32, normalised."""
    labels: Tensor
    """`(B,)` int64"""


class TrainingBatches:
    """The batches of one process: it takes every `world_size`-th image of each global batch of the recipe, starting at the `rank`-th.

    The last incomplete batch of an epoch is left out. A set smaller than a batch is one batch, cut so that each process gets an even
    number per accumulation part. Raises ValueError if train has too few images, or if the batch cannot be shared evenly.
    """

    num_steps: int
    """Optimizer steps per epoch."""
    images_per_step: int
    """Images per optimizer step, over all processes."""
    wait_s: float
    """Time from asking for a batch to having it, summed over all batches. On a GPU it includes the launch of a gather, not its run time."""

    def __init__(self, dataset: DataSet, recipe: Recipe, *, device: str, rank: int = 0, world_size: int = 1, num_workers: int = 0):
        num_shares = world_size * recipe.num_accumulation
        if recipe.batch_size % num_shares:
            raise ValueError(
                f"recipe: batch_size {recipe.batch_size} is not a multiple of {num_shares}"
                f" ({world_size} processes, num_accumulation {recipe.num_accumulation})"
            )
        num_train = len(dataset.train)
        self.images_per_step = recipe.batch_size if num_train >= recipe.batch_size else num_train // (2 * num_shares) * 2 * num_shares
        if not self.images_per_step:
            raise ValueError(f"data {dataset.source!r}: train has {num_train} images, too few for {num_shares} parts of a batch")
        self.num_steps = num_train // self.images_per_step
        self.wait_s = 0.0
        self._dataset, self._recipe, self._device = dataset, recipe, device
        self._rank, self._world_size = rank, world_size
        transform = make_image_transform(recipe, dataset.img_size)
        self._decoder = self._resident = None
        if dataset.images is None or transform is not None:
            self._decoder = _Decoder(_Images(dataset, transform, recipe), num_workers, device)
        elif torch.device(device).type != "cpu":
            self._resident = _copy_to(device, dataset.images)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """This process's batches of an epoch, from step `first_step` on. The global random generators keep their state."""
        began = time.perf_counter()
        rows = self._rows(epoch)[first_step:]
        draws = draw(self._recipe, epoch, num_images=len(self._dataset.labels), img_size=self._dataset.img_size)
        draws = draws.map(lambda column: column[torch.from_numpy(rows)].to(self._device))
        labels = torch.from_numpy(self._dataset.labels[rows]).to(self._device)
        pixels = self._pixels(epoch, rows)
        for step in range(len(rows)):
            batch = Batch(augment(next(pixels), draws.map(itemgetter(step))), labels[step])
            self.wait_s += time.perf_counter() - began
            yield batch
            began = time.perf_counter()

    def _rows(self, epoch: int) -> np.ndarray:
        """The images of this process `(num_steps, B)`."""
        order = np.random.default_rng(stream(self._recipe.seed, "order", epoch)).permutation(self._dataset.train)
        steps = order[: self.num_steps * self.images_per_step].reshape(self.num_steps, self.images_per_step)
        return steps[:, self._rank :: self._world_size]

    def _pixels(self, epoch: int, rows: np.ndarray) -> Iterator[Tensor]:
        if self._decoder is not None:
            yield from self._decoder.decode(epoch, rows)
        elif self._resident is not None:
            for indices in torch.from_numpy(rows).to(self._device):
                yield self._resident[indices]
        else:
            for indices in rows:
                yield torch.from_numpy(self._dataset.load(indices))


def evaluation_batches(dataset: DataSet, indices: np.ndarray, *, device: str, batch_size: int, num_workers: int = 0) -> Iterator[Batch]:
    """The images without augmentation, in the order of `indices`; the last batch may be smaller."""
    parts = [indices[start : start + batch_size] for start in range(0, len(indices), batch_size)]
    if dataset.images is None:
        pixels: Iterable[Tensor] = _Decoder(_Images(dataset), num_workers, device).decode(0, parts)
    else:
        pixels = (torch.from_numpy(dataset.load(part)).to(device) for part in parts)
    for part, images in zip(parts, pixels, strict=True):
        yield Batch(normalise(images), torch.from_numpy(dataset.labels[part]).to(device))


class _Decoder:
    """Decodes batches of images one by one, in `num_workers` processes of its own or in this one."""

    def __init__(self, images: _Images, num_workers: int, device: str):
        self._dataset, self._device = images.dataset, device
        images.dataset.open_source()
        self._plan = _Plan()
        self._loader = DataLoader(
            images,  # type: ignore[arg-type]
            batch_sampler=self._plan,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.device(device).type == "cuda",
            # Without it the DataLoader draws a base seed, which no transform uses, from the global generator.
            generator=torch.Generator(),
        )

    def decode(self, epoch: int, rows: np.ndarray | list[np.ndarray]) -> Iterator[Tensor]:
        """Images `(B, 3, H, W)` uint8 on the device, for each row of indices."""
        self._plan.epoch, self._plan.rows = epoch, rows
        for images, damaged in self._loader:
            self._dataset.record_damage(damaged)
            yield images.to(self._device, non_blocking=True)


class _Plan:
    """A batch sampler that yields the (epoch, index) of each image of `rows`, one row per batch."""

    epoch: int
    rows: np.ndarray | list[np.ndarray]

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        for indices in self.rows:
            yield [(self.epoch, int(index)) for index in indices]

    def __len__(self) -> int:
        return len(self.rows)


class _Images:
    """Images by (epoch, index), transformed as the recipe says."""

    def __init__(self, dataset: DataSet, transform: Callable[[Image], Image] | None = None, recipe: Recipe | None = None):
        self.dataset, self.transform, self.recipe = dataset, transform, recipe

    def __getitems__(self, keys: Sequence[tuple[int, int]]) -> tuple[Tensor, tuple[str, ...]]:
        """Images `(B, 3, H, W)` uint8, and the names of the damaged files found so far."""
        return torch.from_numpy(np.stack([self._pixels(*key) for key in keys])), self.dataset.skipped

    def _pixels(self, epoch: int, index: int) -> np.ndarray:
        if self.transform is None or self.recipe is None:
            return to_pixels(self.dataset.square(index))
        image = self.dataset.open(index) if self.recipe.crop == "resized" else self.dataset.square(index)
        with seeded(self.recipe.seed, "augment", epoch, index):
            return to_pixels(self.transform(image))


def _as_it_is(batch: Any) -> Any:
    return batch


def _copy_to(device: str, images: np.ndarray) -> Tensor:
    """All images on the device, copied in parts: torch takes no read-only array, and a second whole copy in memory might not fit."""
    copy = torch.empty(images.shape, dtype=torch.uint8, device=device)
    for start in range(0, len(images), ROWS_PER_COPY):
        copy[start : start + ROWS_PER_COPY] = torch.from_numpy(images[start : start + ROWS_PER_COPY].copy())
    return copy
