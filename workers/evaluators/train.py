"""Training for real: the trial's recipe on the trial's data, judged on images it never saw.

Selection looks at the validation part; the test part is reported, at the last epoch, for the network that is kept.
"""

from __future__ import annotations

import io
import json
import math
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from results.records import Metric, write_bytes_atomically, write_json_atomically
from space.model import Model
from space.recipe import Recipe
from space.registry import SpecError
from space.weights import Weights
from workers.checkpoints import save_model
from workers.data import DataSet
from workers.distributed import Process, on_devices
from workers.evaluator import ARTIFACTS, Context, EvaluationError, Report, evaluator
from workers.inference import mean_nll, predict, top1_pct
from workers.objectives import Classification, Distillation, Objective
from workers.training import Training, check_recipe, check_stop, train, training_identity
from workers.weights import weights_from

WEIGHTS = "model.pt"
PREDICTIONS = "predictions.npz"
FINISHED = "trained.json"
MUCH_WAITING_PCT = 10.0


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """How the training is run.

    `stop_after` so many epochs it stops, while its schedule stays that of all epochs of the recipe; 0 is to the end. `teacher` is the
    name of an earlier phase that trained a network (train): its best trial's network teaches by its logits, with
    `distillation_weight` from 0 to 1 of the loss and both distributions softened by `temperature` (`workers.objectives.Distillation`).

    `inherits` is the name of an earlier phase that trained a supernet: the network, a subnet of it, starts from its slices of the weights.

    The others change no number. `num_loader_workers` decode and transform single images, where that is needed; -1 takes none on the
    CPU, which the training has to itself, and for a GPU one per core, eight at most.
    """

    stop_after: int = field(default=0, metadata={"added_later": True})
    teacher: str = field(default="", metadata={"added_later": True})
    distillation_weight: float = field(default=0.5, metadata={"added_later": True})
    temperature: float = field(default=1.0, metadata={"added_later": True})
    inherits: str = field(default="", metadata={"added_later": True})
    checkpoint_every_s: float = field(default=60.0, metadata={"changes_numbers": False})
    num_loader_workers: int = field(default=-1, metadata={"changes_numbers": False})

    def __post_init__(self) -> None:
        if not self.checkpoint_every_s >= 0:
            raise ValueError(f"checkpoint_every_s is {self.checkpoint_every_s!r}; allowed: numbers from 0")
        if self.num_loader_workers < -1:
            raise ValueError(f"num_loader_workers is {self.num_loader_workers!r}; allowed: whole numbers from -1")
        if not 0 <= self.distillation_weight <= 1:
            raise ValueError(f"distillation_weight is {self.distillation_weight!r}; allowed: from 0 to 1")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature is {self.temperature!r}; allowed: numbers above 0")
        if not self.teacher and (self.distillation_weight, self.temperature) != (0.5, 1.0):
            raise ValueError("distillation_weight and temperature have no effect without a teacher, the name of an earlier phase")

    def num_loaders(self, device: str) -> int:
        if self.num_loader_workers >= 0:
            return self.num_loader_workers
        return min(8, len(os.sched_getaffinity(0))) if device.startswith("cuda") else 0


def check(model: Model, recipe: Recipe | None, settings: TrainSettings) -> None:
    if recipe is None:
        raise SpecError("train needs a recipe: --recipe epochs=20,batch_size=64 for one model, or a study that gives its trials one")
    check_recipe(model, recipe)
    check_stop(recipe, settings.stop_after or None)


@evaluator(
    "train",
    metrics=(
        Metric("val_top1_pct", "maximize", "validation accuracy at the last epoch: what a selection may look at"),
        Metric("val_nll", "minimize", "validation negative log-likelihood, nats"),
        Metric("test_top1_pct", "maximize", "test accuracy of the same network: what is reported"),
        Metric("test_nll", "minimize", "test negative log-likelihood, nats"),
        Metric("train_loss", "minimize", "mean training loss of the last epoch, mixing and smoothing included"),
    ),
    settings=TrainSettings,
    check=check,
    uses_data=True,
    needs_dataset=True,
    uses_processes=True,
    weights="optional",
    continued_by="stop_after",
    memory_mb=2000,
)
def train_network(model: Model, context: Context, settings: TrainSettings) -> Mapping[str, float]:
    """Train with the trial's recipe; leaves the weights, and the test logits of every image as an artifact."""
    check(model, context.recipe, settings)
    assert context.recipe is not None
    assert context.dataset is not None
    dataset, recipe = context.dataset, context.recipe
    teacher = _teacher(context, settings.teacher)
    weights = _inherited(context, settings.inherits, model) or context.weights
    stop = [{"stop_after": settings.stop_after}] if settings.stop_after else []
    identity = training_identity(model, recipe, dataset, _objective(teacher, settings), *stop, weights=weights)
    work = partial(
        _train_and_judge,
        model=model,
        recipe=recipe,
        dataset=dataset,
        workdir=context.workdir.absolute(),
        weights=weights,
        continue_from=None if context.continues is None else context.continues.absolute(),
        teacher=teacher,
        report=context.report,
        settings=settings,
        identity=identity,
    )
    done = finished(context.workdir, identity) or on_devices(work, context)
    for warning in (*dataset.warnings, *done["warnings"]):
        context.warn(warning)
    return done["values"]


def _train_and_judge(
    process: Process,
    *,
    model: Model,
    recipe: Recipe,
    dataset: DataSet,
    workdir: Path,
    weights: Weights | None,
    continue_from: Path | None,
    teacher: Path | None,
    report: Report,
    settings: TrainSettings,
    identity: str,
) -> dict[str, Any]:
    """Train; in the first process also judge the network and write what the trial leaves."""
    warnings: list[str] = []
    num_loaders = settings.num_loaders(process.device)
    training = train(
        model,
        recipe,
        dataset,
        workdir=workdir,
        weights=weights,
        objective=_objective(teacher, settings),
        stop_after=settings.stop_after or None,
        continue_from=continue_from,
        process=process,
        report=report,
        warn=warnings.append,
        num_loader_workers=num_loaders,
        checkpoint_every_s=settings.checkpoint_every_s,
    )
    if process.rank:
        return {}
    parts = {"val": dataset.val, "test": dataset.test}
    labels = {part: dataset.labels[indices] for part, indices in parts.items()}
    logits = {
        part: predict(training.network, dataset, indices, device=process.device, num_loader_workers=num_loaders)
        for part, indices in parts.items()
    }
    val = dataset.val, labels["val"], logits["val"]
    write_predictions(workdir / ARTIFACTS / PREDICTIONS, dataset.test, labels["test"], logits["test"], training.losses, val=val)
    save_model(workdir / WEIGHTS, training.network, model)
    values = {
        "val_top1_pct": top1_pct(logits["val"], labels["val"]),
        "val_nll": mean_nll(logits["val"], labels["val"]),
        "test_top1_pct": top1_pct(logits["test"], labels["test"]),
        "test_nll": mean_nll(logits["test"], labels["test"]),
        "train_loss": training.losses[-1],
    }
    done = {"values": values, "warnings": [*warnings, *warnings_of(training, dataset, "train")]}
    write_json_atomically(workdir / FINISHED, {"identity": identity, **done})
    if training.is_finished:
        shutil.rmtree(training.checkpoints, ignore_errors=True)
    return done


def warnings_of(training: Training, dataset: DataSet, evaluator: str) -> list[str]:
    """What a user should know of a training that has ended."""
    warnings = []
    if dataset.skipped:
        # A set that is streamed knows all its damaged files only now.
        named = ", ".join(dataset.skipped[:5]) + (", ..." if len(dataset.skipped) > 5 else "")
        warnings.append(f"data {dataset.source!r}: skipped as damaged ({len(dataset.skipped)}): {named}")
    if training.data_wait_pct > MUCH_WAITING_PCT:
        warnings.append(f"the training waited for data {training.data_wait_pct:.0f} % of its time: --set {evaluator}.num_loader_workers=N")
    return warnings


def _teacher(context: Context, phase: str) -> Path | None:
    """The weights that the earlier phase left, made absolute; None without a phase."""
    if not phase:
        return None
    weights = context.best(phase).workdir.absolute() / WEIGHTS
    if not weights.exists():
        raise EvaluationError("error", f"phase {phase!r}, the teacher of train, left no trained network in {weights.parent}")
    return weights


def _inherited(context: Context, phase: str, model: Model) -> Weights | None:
    """What the supernet of the earlier phase lends to the network; None without a phase."""
    return weights_from(context.best(phase).workdir.absolute() / WEIGHTS, model) if phase else None


def _objective(teacher: Path | None, settings: TrainSettings) -> Objective:
    if teacher is None:
        return Classification()
    return Distillation(teacher, weight=settings.distillation_weight, temperature=settings.temperature)


def write_predictions(
    path: Path,
    ids: np.ndarray,
    labels: np.ndarray,
    logits: np.ndarray,
    losses: Sequence[float] | None,
    *,
    val: tuple[np.ndarray, np.ndarray, np.ndarray] | None = None,
) -> None:
    """Per-image results `ids (N,)`, `labels (N,)`, `logits (N, K)` float32, and the mean training loss of each epoch, `train_loss (E,)`.

    Every statistic, and whether the training converged, can be taken again from them. `losses` is None where nothing was trained. Of `val`,
    ids, labels and logits of the validation images, it is kept which were recognised: `val_ids (V,)`, `val_correct (V,)` bool.
    """
    buffer = io.BytesIO()
    arrays: dict[str, Any] = {"ids": ids, "labels": labels, "logits": logits.astype(np.float32)}
    if losses is not None:
        arrays["train_loss"] = np.asarray(losses, dtype=float)
    if val is not None:
        val_ids, val_labels, val_logits = val
        arrays |= {"val_ids": val_ids, "val_correct": val_logits.argmax(axis=1) == val_labels}
    np.savez_compressed(buffer, **arrays)
    write_bytes_atomically(path, buffer.getvalue())


def finished(workdir: Path, identity: str) -> Mapping[str, Any] | None:
    """What a training left in `FINISHED`, if it had ended when its worker was lost in a later evaluator."""
    try:
        stored = json.loads((workdir / FINISHED).read_text())
    except (OSError, json.JSONDecodeError):
        return None
    return stored if stored["identity"] == identity and (workdir / WEIGHTS).exists() else None
