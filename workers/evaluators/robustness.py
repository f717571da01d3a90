"""Accuracy of a trained network on test images that lose information step by step; see `workers/corruptions.py`.

    patch_mix_coarse, patch_mix_fine    0 to 50 % of the cells of a grid come from a test image of another class
    patch_drop                          0 to 80 % of the cells of the fine grid have the mean colour
    permutation                         1, 4, 16, ... tiles are shuffled

The area under a curve is the mean accuracy over its levels by the trapezoidal rule, in percent; the levels are the shares of cells
that were really replaced, and for the permutation log2 of the number of tiles. The trained network is the one that `short_train`
left in the trial's work directory.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from results.curves import area_pct, read_curves
from results.figures.robustness import write_html, write_png
from results.records import Metric, write_bytes_atomically
from space.model import Model
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from workers.batches import evaluation_batches
from workers.checkpoints import load_model
from workers.corruptions import (
    DROP_SHARES,
    MIX_SHARES,
    cell_counts,
    default_grids,
    drop_cells,
    mix_cells,
    other_class_partners,
    permute_tiles,
    random_orders,
    tile_sides,
)
from workers.data import DataSet
from workers.evaluator import ARTIFACTS, Context, EvaluationError, evaluator
from workers.evaluators.short_train import WEIGHTS

CURVES = "robustness.npz"


@dataclass(frozen=True, kw_only=True)
class RobustnessSettings:
    """What is corrupted and how.

    A grid of 0 follows from the image size (`default_grids`). `max_images` limits the test images to a random part; 0 takes all. The
    corruptions depend on this `seed` and not on the trial's: networks are compared on the same corruptions of the same images.
    """

    coarse_grid: int = 0
    fine_grid: int = 0
    max_images: int = 0
    batch_size: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("coarse_grid", 0), ("fine_grid", 0), ("max_images", 0), ("batch_size", 1), ("seed", 0)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {least}")

    def grids(self, img_size: int) -> tuple[int, int]:
        """Cells per side, coarse and fine; raises ValueError if they do not divide the image."""
        if not self.coarse_grid and not self.fine_grid:
            return default_grids(img_size)
        if not 1 < self.coarse_grid < self.fine_grid or img_size % self.coarse_grid or img_size % self.fine_grid:
            given = f"coarse_grid {self.coarse_grid} and fine_grid {self.fine_grid}"
            raise ValueError(f"{given}; allowed: two divisors of img_size {img_size}, 1 < coarse < fine, or 0 for both")
        return self.coarse_grid, self.fine_grid


@dataclass(frozen=True)
class _Curve:
    """A corruption and its levels, of which the first is the clean image."""

    name: str
    levels: tuple[float, ...]
    """Percent of the cells, or log2 of the number of tiles."""
    steps: tuple[int, ...]
    """The same as `report` wants it: whole percent, or the number of tiles."""
    corrupted: Callable[[Tensor, Tensor, np.ndarray], Iterator[Tensor]]
    """Images, partners `(B, 3, H, W)` and ids `(B,)` to the images at each level after the first."""


def check(model: Model, recipe: Recipe | None, settings: RobustnessSettings) -> None:
    try:
        settings.grids(model.img_size)
    except ValueError as error:
        raise SpecError(f"robustness: {error}") from error


@evaluator(
    "robustness",
    metrics=(
        Metric("patch_mix_auc_pct", "maximize", "mean of both areas under the curve of the patch-mix attack"),
        Metric("patch_mix_coarse_auc_pct", "maximize", "area under accuracy over 0 to 50 % foreign cells of the coarse grid"),
        Metric("patch_mix_fine_auc_pct", "maximize", "area under accuracy over 0 to 50 % foreign cells of the fine grid"),
        Metric("patch_drop_auc_pct", "maximize", "area under accuracy over 0 to 80 % dropped cells of the fine grid"),
        Metric("permutation_auc_pct", "maximize", "area under accuracy over log2 of the number of shuffled tiles"),
    ),
    settings=RobustnessSettings,
    check=check,
    uses_data=True,
    needs_dataset=True,
    memory_mb=2000,
)
def robustness(model: Model, context: Context, settings: RobustnessSettings) -> Mapping[str, float]:
    """Accuracy under patch-mix attack, patch drop and patch permutation of the network that short_train left."""
    dataset, weights = context.dataset, context.workdir / WEIGHTS
    if dataset is None:
        raise EvaluationError("error", "robustness needs the labelled data set of the trial")
    if not weights.exists():
        raise EvaluationError("error", "there is no trained network: put short_train before it (--evaluators short_train,robustness)")
    curves = _curves(model.img_size, settings)
    network, _ = load_model(weights, context.device)
    ids = _tested(dataset.test, settings)
    correct = _correct(network, dataset, ids, curves, settings, context.device)
    folder = context.workdir / ARTIFACTS
    _write_curves(folder / CURVES, ids, curves, correct)
    accuracies = read_curves([folder / CURVES])
    values = {}
    for curve in curves:
        levels, (accuracy_pct,) = accuracies[curve.name]
        values[f"{curve.name}_auc_pct"] = float(area_pct(levels, accuracy_pct))
        for step, value in zip(curve.steps, accuracy_pct, strict=True):
            context.report(f"{curve.name}_top1_pct", float(value), step)
    title = f"Robustness on {len(ids):,} test images"
    for write, suffix in ((write_png, "png"), (write_html, "html")):
        write({model.digest: accuracies}, folder / f"robustness.{suffix}", title=title, chance_pct=100 / dataset.num_classes)
    return {"patch_mix_auc_pct": (values["patch_mix_coarse_auc_pct"] + values["patch_mix_fine_auc_pct"]) / 2, **values}


def _curves(img_size: int, settings: RobustnessSettings) -> tuple[_Curve, ...]:
    coarse, fine = settings.grids(img_size)

    def drop(images: Tensor, partners: Tensor, order: Tensor, num_dropped: int) -> Tensor:
        return drop_cells(images, order, num_dropped)

    return (
        _cells("patch_mix_coarse", coarse, MIX_SHARES, mix_cells, settings.seed),
        _cells("patch_mix_fine", fine, MIX_SHARES, mix_cells, settings.seed),
        _cells("patch_drop", fine, DROP_SHARES, drop, settings.seed),
        _permutation(tile_sides(img_size, fine), settings.seed),
    )


def _cells(name: str, grid: int, shares: tuple[float, ...], corrupt: Callable[[Tensor, Tensor, Tensor, int], Tensor], seed: int) -> _Curve:
    """A curve whose levels give more and more cells of a grid to `corrupt`; each image has its own order of cells."""
    counts = cell_counts(shares, grid**2)

    def corrupted(images: Tensor, partners: Tensor, ids: np.ndarray) -> Iterator[Tensor]:
        order = random_orders(ids, grid**2, seed=seed, name=name).to(images.device)
        return (corrupt(images, partners, order, count) for count in counts[1:])

    shares_pct = tuple(100 * count / grid**2 for count in counts)
    return _Curve(name, shares_pct, tuple(round(share) for share in shares_pct), corrupted)


def _permutation(sides: tuple[int, ...], seed: int) -> _Curve:
    num_tiles = tuple(side**2 for side in sides)

    def corrupted(images: Tensor, partners: Tensor, ids: np.ndarray) -> Iterator[Tensor]:
        for number in num_tiles[1:]:
            yield permute_tiles(images, random_orders(ids, number, seed=seed, name=f"permutation/{number}").to(images.device))

    return _Curve("permutation", tuple(math.log2(number) for number in num_tiles), num_tiles, corrupted)


def _tested(test: np.ndarray, settings: RobustnessSettings) -> np.ndarray:
    if not settings.max_images:
        return test
    shuffled = np.random.default_rng(stream(settings.seed, "test images")).permutation(test)
    return np.sort(shuffled[: settings.max_images])


@torch.inference_mode()
def _correct(
    network: nn.Module, dataset: DataSet, ids: np.ndarray, curves: tuple[_Curve, ...], settings: RobustnessSettings, device: str
) -> dict[str, np.ndarray]:
    """Whether each image is classified rightly at each level, `(len(ids), levels)` bool for each curve by name."""
    # Partners come from all test images, so an image has the same partner when only a part is tested.
    partners = other_class_partners(ids, dataset.test, dataset.labels, seed=settings.seed)
    own, others = (evaluation_batches(dataset, indices, device=device, batch_size=settings.batch_size) for indices in (ids, partners))
    parts: dict[str, list[np.ndarray]] = {curve.name: [] for curve in curves}
    num_done = 0
    for (images, labels), (partner_images, _) in zip(own, others, strict=True):
        batch_ids = ids[num_done : num_done + len(images)]
        num_done += len(images)
        clean = network(images).argmax(dim=1) == labels
        for curve in curves:
            corrupted = curve.corrupted(images, partner_images, batch_ids)
            levels = [clean, *(network(each).argmax(dim=1) == labels for each in corrupted)]
            parts[curve.name].append(torch.stack(levels, dim=1).cpu().numpy())
    return {name: np.concatenate(found) for name, found in parts.items()}


def _write_curves(path: Path, ids: np.ndarray, curves: tuple[_Curve, ...], correct: dict[str, np.ndarray]) -> None:
    """`ids (N,)` and of each curve `<name> (N, levels)` bool and `<name>_levels (levels,)`, over which its area is taken."""
    arrays: dict[str, Any] = {"ids": ids, **correct, **{f"{curve.name}_levels": np.array(curve.levels) for curve in curves}}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomically(path, buffer.getvalue())
