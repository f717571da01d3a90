"""Accuracy of a network as its weights are, without any training."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from results.records import Metric
from space.model import Model, build_model
from space.registry import SpecError
from workers.evaluator import ARTIFACTS, Context, evaluator
from workers.evaluators.train import PREDICTIONS, write_predictions
from workers.inference import mean_nll, predict, top1_pct
from workers.weights import load_weights


@dataclass(frozen=True, kw_only=True)
class AccuracySettings:
    """How the images are fed; it changes no number but the last bits."""

    batch_size: int = 256

    def __post_init__(self) -> None:
        if type(self.batch_size) is not int or self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size!r}; allowed: whole numbers from 1")


METRICS = (
    Metric("val_top1_pct", "maximize", "validation accuracy: what a selection may look at"),
    Metric("test_top1_pct", "maximize", "test accuracy of the same network: what is reported"),
    Metric("test_nll", "minimize", "test negative log-likelihood, nats"),
)


@evaluator(
    "accuracy",
    metrics=METRICS,
    settings=AccuracySettings,
    uses_data=True,
    needs_dataset=True,
    weights="needed",
    memory_mb=2000,
)
def accuracy(model: Model, context: Context, settings: AccuracySettings) -> Mapping[str, float]:
    """Accuracy of a network with the weights it starts from (--weights), without training; leaves the test logits as an artifact."""
    if context.weights is None:
        raise SpecError("accuracy needs weights: a network with fresh ones knows nothing")
    network = build_model(model, seed=context.seed)
    load_weights(network, model, context.weights)
    return judged(network, model, context, batch_size=settings.batch_size)


def judged(network: nn.Module, model: Model, context: Context, *, batch_size: int = AccuracySettings.batch_size) -> dict[str, float]:
    """The `METRICS` of a network as it is; leaves the test logits as an artifact. Raises SpecError for data with other classes."""
    assert context.dataset is not None
    dataset = context.dataset
    if model.num_classes != dataset.num_classes:
        raise SpecError(f"the network has {model.num_classes} classes, data {dataset.source!r} has {dataset.num_classes}")
    network.eval().to(context.device)
    logits, labels = {}, {}
    for part, indices in (("val", dataset.val), ("test", dataset.test)):
        logits[part] = predict(network, dataset, indices, device=context.device, batch_size=batch_size)
        labels[part] = dataset.labels[indices]
    for warning in dataset.warnings:
        context.warn(warning)
    write_predictions(context.workdir / ARTIFACTS / PREDICTIONS, dataset.test, labels["test"], logits["test"], losses=None)
    return {
        "val_top1_pct": top1_pct(logits["val"], labels["val"]),
        "test_top1_pct": top1_pct(logits["test"], labels["test"]),
        "test_nll": mean_nll(logits["test"], labels["test"]),
    }
