"""What the trials of an ablation predicted: per-image outcomes, and the curves of their robustness."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from results.curves import Curve, area_pct

CellKey = tuple[str, str, int]
"""Factor, level, seed."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """One trial on the test images: `ids` and `labels` (N,) int64, each outcome (N,) float.

    `curves` are its robustness curves, averaged over images: levels (L,) and accuracy (L,) in percent. `train_loss` (E,) is the mean
    training loss of each epoch, None if it was not kept, as before November 2026. `val` are the ids of the validation images and which of
    them were recognised (V,), None if they were not kept.
    """

    ids: np.ndarray
    labels: np.ndarray
    outcomes: Mapping[str, np.ndarray]
    curves: Mapping[str, Curve] = field(default_factory=dict)
    num_classes: int
    train_loss: np.ndarray | None = None
    val: tuple[np.ndarray, np.ndarray] | None = None


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One trial of an ablation: its factor, level, seed and predictions."""

    factor: str
    level: str
    seed: int
    predictions: Predictions

    @property
    def key(self) -> CellKey:
        return self.factor, self.level, self.seed


def read_predictions(path: Path) -> Predictions:
    """The outcomes of a trial from its `predictions.npz` and from `robustness.npz` beside it, if there is one.

    `top1_pct` is 0 or 100 per image and `nll` in nats. A robustness curve `name` gives `<name>_auc`, the accuracy in percent
    averaged over the range of its levels (trapezoids); its mean over images is the metric `<name>_auc_pct` of the evaluator
    `robustness`. Both names are stored, the first in registered designs, the second in MLflow: neither can change.
    Raises ValueError, naming the file, for a damaged file, for logits that are not finite and for curves of other images.
    """
    stored = _arrays(path, ("ids", "labels", "logits"))
    ids, labels, logits = stored["ids"], stored["labels"], stored["logits"].astype(float)
    if not (ids.shape == labels.shape == logits.shape[:1] and logits.ndim == 2 and len(ids)):
        raise ValueError(f"{path.name}: ids {ids.shape}, labels {labels.shape} and logits {logits.shape} do not belong together")
    if not np.isfinite(logits).all():
        raise ValueError(f"{path.name}: logits of {(~np.isfinite(logits)).any(axis=1).sum()} images are not finite")
    if not ((labels >= 0) & (labels < logits.shape[1])).all():
        raise ValueError(f"{path.name}: labels from {labels.min()} to {labels.max()} of {logits.shape[1]} classes")
    train_loss = stored.get("train_loss")
    val = (stored["val_ids"], stored["val_correct"]) if "val_ids" in stored else None
    logits -= logits.max(axis=1, keepdims=True)
    nll = np.log(np.exp(logits).sum(axis=1)) - logits[np.arange(len(labels)), labels]
    outcomes = {"top1_pct": 100.0 * (logits.argmax(axis=1) == labels), "nll": nll}
    curves: dict[str, Curve] = {}
    beside = path.with_name("robustness.npz")
    if beside.exists():
        stored = _arrays(beside, ("ids",))
        order = image_positions(stored["ids"], ids, beside.name, path.name)
        for name in sorted(name for name in stored if f"{name}_levels" in stored):
            levels, correct = stored[f"{name}_levels"].astype(float), 100.0 * stored[name]
            if correct.shape != (len(ids), len(levels)):
                raise ValueError(f"{beside.name}: {name} is {correct.shape} for {len(ids)} images at {len(levels)} levels")
            outcomes[f"{name}_auc"] = area_pct(levels, correct)[order]
            curves[name] = levels, correct.mean(axis=0)
    return Predictions(
        ids=ids, labels=labels, outcomes=outcomes, curves=curves, num_classes=logits.shape[1], train_loss=train_loss, val=val
    )


def _arrays(path: Path, needed: Sequence[str]) -> dict[str, np.ndarray]:
    try:
        with np.load(path) as file:
            stored = dict(file)
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{path.name}: {type(error).__name__}: {error}") from error
    if lacking := [name for name in needed if name not in stored]:
        raise ValueError(f"{path.name}: no {', '.join(lacking)} in it")
    return stored


def image_positions(ids: np.ndarray, wanted: np.ndarray, where: str, other: str) -> np.ndarray:
    """The position in `ids` of each of `wanted`; raises ValueError when the two are not the same set of images."""
    if len(ids) == len(wanted) and (ids == wanted).all():
        return np.arange(len(ids))
    only, lacking = np.setdiff1d(ids, wanted), np.setdiff1d(wanted, ids)
    if len(only) or len(lacking) or len(ids) != len(wanted):
        raise ValueError(
            f"{where} and {other} are not of the same test images: only the first has {some_ids(only)}, only the second {some_ids(lacking)}"
        )
    order = np.argsort(ids, kind="stable")
    return order[np.searchsorted(ids[order], wanted)]


def some_ids(ids: np.ndarray) -> str:
    """The first five, and how many more there are."""
    return (", ".join(map(str, ids[:5].tolist())) + (f" and {len(ids) - 5} more" if len(ids) > 5 else "")) or "none"
