"""The training of a supernet, and what it leaves: weights in which a later phase runs any subnet of the space."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from results.records import Metric, write_json_atomically
from space.catalog import supernet_space
from space.model import Model, require_arch
from space.recipe import Recipe
from space.registry import SpecError
from space.supernet import Supernet, first_difference, supernet_from_tensors
from space.supernet_space import SupernetSpace
from space.weights import Weights
from workers.checkpoints import save_model
from workers.data import DataSet
from workers.distributed import Process, on_devices
from workers.evaluator import Context, EvaluationError, Report, evaluator
from workers.evaluators.train import FINISHED, WEIGHTS, TrainSettings, finished, warnings_of
from workers.supernet_objective import SupernetObjective, SupernetTraining, check_supernet_training
from workers.training import check_recipe, train, training_identity


@dataclass(frozen=True, kw_only=True)
class SupernetSettings(SupernetTraining):
    """The space, by its name in the catalogue or as its JSON, and how its supernet is trained (`SupernetTraining`).

    The candidate is the largest network of the space. `checkpoint_every_s` and `num_loader_workers` are as for `train`, and change no
    number.
    """

    space: str = ""
    checkpoint_every_s: float = field(default=60.0, metadata={"changes_numbers": False})
    num_loader_workers: int = field(default=-1, metadata={"changes_numbers": False})

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.loading

    @property
    def loading(self) -> TrainSettings:
        return TrainSettings(checkpoint_every_s=self.checkpoint_every_s, num_loader_workers=self.num_loader_workers)

    def space_of(self, model: Model) -> SupernetSpace:
        """The space; raises SpecError if it is unknown, or not one whose largest network may be `model`."""
        arch = require_arch(model, "supernet")
        if not self.space:
            raise SpecError("supernet.space is empty; the name of a supernet's space or its JSON is expected")
        if not self.space.startswith("{"):
            return supernet_space(self.space, img_size=arch.img_size, num_classes=arch.num_classes)
        try:
            return SupernetSpace.from_json(json.loads(self.space))
        except json.JSONDecodeError as error:
            raise SpecError(f"supernet.space is no JSON: {error}") from error


def check(model: Model, recipe: Recipe | None, settings: SupernetSettings) -> None:
    space = settings.space_of(model)
    if recipe is None:
        raise SpecError("supernet needs a recipe: --recipe epochs=20,batch_size=64")
    check_recipe(model, recipe)
    check_supernet_training(model, recipe, space, settings)


@evaluator(
    "supernet",
    metrics=(
        Metric("largest_val_top1_pct", "maximize", "validation accuracy of the largest network with the shared weights"),
        Metric("smallest_val_top1_pct", "maximize", "validation accuracy of the smallest subnet with the shared weights"),
        Metric("random_val_top1_pct", "maximize", "mean validation accuracy of four random subnets with the shared weights"),
        Metric("train_loss", "minimize", "mean training loss of the last epoch, mixing and smoothing included"),
    ),
    settings=SupernetSettings,
    check=check,
    uses_data=True,
    needs_dataset=True,
    uses_processes=True,
    weights="optional",
    memory_mb=2000,
)
def train_supernet(model: Model, context: Context, settings: SupernetSettings) -> Mapping[str, float]:
    """Train the weights that all subnets of a space share; leaves them for `load_supernet`, and as those of the largest network."""
    check(model, context.recipe, settings)
    assert context.recipe is not None
    assert context.dataset is not None
    space = settings.space_of(model)
    identity = training_identity(
        model, context.recipe, context.dataset, SupernetObjective(space, settings), context.processes, weights=context.weights
    )
    work = partial(
        _train_and_judge,
        model=model,
        recipe=context.recipe,
        dataset=context.dataset,
        workdir=context.workdir.absolute(),
        weights=context.weights,
        report=context.report,
        settings=settings,
        space=space,
        identity=identity,
    )
    done = finished(context.workdir, identity) or on_devices(work, context)
    for warning in (*context.dataset.warnings, *done["warnings"]):
        context.warn(warning)
    return done["values"]


def load_supernet(workdir: Path, device: str = "cpu", *, space: SupernetSpace | None = None) -> Supernet:
    """The supernet that a trial left in its work directory, in evaluation mode, with weights that need no gradient.

    On the CPU its weights are the mapped file: processes of a node share them, and only what is used is read. Raises EvaluationError if the
    trial left no supernet, and SpecError naming the difference if it is not the supernet of `space`.
    """
    path = workdir / WEIGHTS
    if not path.exists():
        raise EvaluationError("error", f"{workdir} holds no trained supernet: {WEIGHTS} is missing")
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if "space" not in stored:
        raise EvaluationError("error", f"{path} holds a network and no supernet")
    own = SupernetSpace.from_json(json.loads(stored["space"]))
    if space is not None and own != space:
        raise SpecError(f"{path} is the supernet of another space: {first_difference(own.to_json(), space.to_json())}")
    supernet = supernet_from_tensors(own.largest, stored["weights"])
    return supernet if device == "cpu" else supernet.to(device)


def _train_and_judge(
    process: Process,
    *,
    model: Model,
    recipe: Recipe,
    dataset: DataSet,
    workdir: Path,
    weights: Weights | None,
    report: Report,
    settings: SupernetSettings,
    space: SupernetSpace,
    identity: str,
) -> dict[str, Any]:
    """Train; in the first process also judge the subnets and write what the trial leaves."""
    warnings: list[str] = []
    objective = SupernetObjective(space, settings)
    training = train(
        model,
        recipe,
        dataset,
        workdir=workdir,
        weights=weights,
        objective=objective,
        process=process,
        report=report,
        warn=warnings.append,
        num_loader_workers=settings.loading.num_loaders(process.device),
        checkpoint_every_s=settings.checkpoint_every_s,
    )
    if process.rank:
        return {}
    assert isinstance(training.network, Supernet)
    save_model(workdir / WEIGHTS, training.network.network, model, space=json.dumps(space.to_json()))
    values = {**objective.judge(training.network), "train_loss": training.losses[-1]}
    done = {"values": values, "warnings": [*warnings, *warnings_of(training, dataset, "supernet")]}
    write_json_atomically(workdir / FINISHED, {"identity": identity, **done})
    shutil.rmtree(training.checkpoints, ignore_errors=True)
    return done
