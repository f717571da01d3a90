"""A linear probe of poolings: each candidate trains its pooling and head alone, on the cached tokens of one frozen backbone.

The backbone is the network that the phase `backbone` left; the candidate is the same architecture with the pooling under test. The
tokens `(N, C)` after the final norm are computed once for all images and kept beside the backbone, so that a probe costs seconds and
poolings can be compared over many seeds, paired: a seed gives all poolings the same head, the same images and the same batches.

A candidate that starts from weights of its own, in a phase that needs no `backbone`, is its own backbone, a network of timm too: it stays
frozen as its weights are, and a fresh classifier is trained on what its own classifier would see, one vector `(D,)` for each image.

A convex problem with the same images ends at the same place whatever the head starts from, and an interval over such seeds would be
narrow for no reason. Each seed therefore trains on its own part of the training images, `subsample` of them without replacement.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from results.records import Metric
from space.component import TokenShape
from space.layout import layout
from space.model import Model, as_arch, build_model, exponent_parameters
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import digest_of
from space.vit import VisionTransformer
from space.weights import Weights
from workers.batches import evaluation_batches
from workers.checkpoints import load_model
from workers.data import DataSet
from workers.evaluator import ARTIFACTS, Context, EvaluationError, evaluator
from workers.evaluators.train import PREDICTIONS, WEIGHTS, write_predictions
from workers.inference import mean_nll, top1_pct
from workers.learner import Learner
from workers.weights import load_weights

BACKBONE = "backbone"
"""The phase whose best network is probed."""

CHUNK = 1024
"""Images pooled at a time where no gradient is needed."""


@dataclass(frozen=True, kw_only=True)
class LinearProbeSettings:
    """How pooling and head are trained: AdamW, cosine to 0, cross-entropy without smoothing.

    The learning rate of exponents is multiplied by `exponent_lr_scale` of the trial's recipe; they have no weight decay. `dtype` is that of
    the cached tokens; float16 halves the file at a relative error of 2^-11, and pooling is computed in float32 either way.
    """

    epochs: int = 50
    batch_size: int = 256
    lr: float = 1e-2
    weight_decay: float = 0.01
    subsample: float = 0.9
    dtype: Literal["float32", "float16"] = "float32"

    def __post_init__(self) -> None:
        if not 0.0 < self.subsample <= 1.0:
            raise ValueError(f"subsample is {self.subsample!r}; allowed: above 0 to 1")
        self.recipe(seed=0, exponent_lr_scale=1.0)

    def recipe(self, *, seed: int, exponent_lr_scale: float) -> Recipe:
        """These settings as a recipe; raises SpecError for a value that no recipe can have."""
        return Recipe(
            epochs=self.epochs,
            seed=seed,
            batch_size=self.batch_size,
            lr=self.lr,
            min_lr=0.0,
            weight_decay=self.weight_decay,
            warmup_epochs=0.0,
            exponent_lr_scale=exponent_lr_scale,
        )


@evaluator(
    "linear_probe",
    metrics=(
        Metric("val_top1_pct", "maximize", "validation accuracy: what a selection may look at"),
        Metric("test_top1_pct", "maximize", "test accuracy of the same probe: what is reported"),
        Metric("test_nll", "minimize", "test negative log-likelihood, nats"),
    ),
    settings=LinearProbeSettings,
    uses_data=True,
    needs_dataset=True,
    weights="optional",
    memory_mb=2000,
)
def linear_probe(model: Model, context: Context, settings: LinearProbeSettings) -> Mapping[str, float]:
    """Train the pooling and head of the candidate on a frozen backbone, or a classifier on its own weights, frozen."""
    if context.recipe is None or context.dataset is None:
        raise SpecError("linear_probe needs labelled data and a recipe, whose seed it takes")
    dataset = context.dataset
    recipe = settings.recipe(seed=context.recipe.seed, exponent_lr_scale=context.recipe.exponent_lr_scale)
    built = build_model(model, seed=recipe.seed)
    if context.weights is not None and BACKBONE not in context.earlier:
        tokens = _features(model, context.weights, dataset, context.device)
        probe = nn.Sequential(nn.Identity(), _classifier(built))
    else:
        tokens = _tokens(model, context, dataset, settings)
        probe = nn.Sequential(built.get_submodule("pooling"), built.get_submodule("head"))
    probe.to(context.device)
    parts = np.cumsum([len(dataset.train), len(dataset.val)])
    train_tokens, val_tokens, test_tokens = tokens.to(context.device).tensor_split(parts.tolist())
    losses = _train(probe, train_tokens, torch.from_numpy(dataset.labels[dataset.train]).to(context.device), recipe, settings, context)
    val_logits, test_logits = _logits(probe, val_tokens), _logits(probe, test_tokens)
    val_labels, test_labels = dataset.labels[dataset.val], dataset.labels[dataset.test]
    val = dataset.val, val_labels, val_logits
    write_predictions(context.workdir / ARTIFACTS / PREDICTIONS, dataset.test, test_labels, test_logits, losses, val=val)
    return {
        "val_top1_pct": top1_pct(val_logits, val_labels),
        "test_top1_pct": top1_pct(test_logits, test_labels),
        "test_nll": mean_nll(test_logits, test_labels),
    }


def _tokens(model: Model, context: Context, dataset: DataSet, settings: LinearProbeSettings) -> Tensor:
    """Tokens `(images, N, C)` of the backbone that the earlier phase trained, whose pooling alone may differ from the candidate's."""
    weights = context.best(BACKBONE).workdir / WEIGHTS
    if not weights.exists():
        raise EvaluationError("error", f"phase {BACKBONE!r} left no trained network in {weights.parent}: measure it by train")
    backbone, stored = load_model(weights, context.device)
    check_same_but_pooling(stored, model)
    return torch.from_numpy(cached_tokens(backbone, weights, dataset, device=context.device, dtype=settings.dtype))


@torch.no_grad()
def _features(model: Model, weights: Weights, dataset: DataSet, device: str) -> Tensor:
    """What the classifier of the network with these weights sees `(images, D)`, of train, validation and test images in this order."""
    network = build_model(model, seed=0)
    load_weights(network, model, weights)
    network.to(device).eval()
    seen: list[Tensor] = []
    # A copy: a batch may lie in memory that the next one takes.
    _classifier(network).register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].float().cpu().clone()))
    ids = np.concatenate([dataset.train, dataset.val, dataset.test])
    for images, _ in evaluation_batches(dataset, ids, device=device, batch_size=256):
        network(images)
    if {features.ndim for features in seen} != {2} or sum(map(len, seen)) != len(ids):
        raise EvaluationError("error", f"the classifier of {model.kind} model {model.digest[:8]} does not see one vector for each image")
    return torch.cat(seen)


def _classifier(network: nn.Module) -> nn.Module:
    """The last layer; raises EvaluationError for a network that has none, or several."""
    # timm's networks say which layer it is; ours call it by one name.
    found = network.get_classifier() if hasattr(network, "get_classifier") else network.get_submodule("head")  # pyright: ignore[reportCallIssue]
    if not isinstance(found, nn.Module) or isinstance(found, nn.Identity):
        raise EvaluationError("error", "linear_probe needs a network with one classifier")
    return found


def check_same_but_pooling(backbone: Model, model: Model) -> None:
    """Raise SpecError unless both are networks of our components that differ in their pooling at most; neither may be a subnet."""
    there, here = as_arch(backbone), as_arch(model)
    # A subnet's pooling is its supernet's, and another choice of blocks would go unnoticed below.
    if there is None or here is None or there is not backbone or here is not model:
        raise SpecError("linear_probe exchanges the pooling of a network of our components; models of timm and subnets have none")
    theirs, ours = replace(there, pooling=here.pooling).to_json(), here.to_json()
    if any(part.kind == "pooling" and part.shape.has_sizes for part in layout(here) if isinstance(part.shape, TokenShape)):
        raise SpecError("linear_probe keeps tokens without their sizes, and a token reduction of this network hands sizes on")
    different = [name for name in sorted(theirs.keys() | ours.keys()) if theirs.get(name) != ours.get(name)]
    if different:
        told = "; ".join(f"{name} is {_short(theirs.get(name))} there and {_short(ours.get(name))} here" for name in different)
        raise SpecError(f"the backbone is of another architecture, and only the pooling may differ: {told}")


def cached_tokens(backbone: nn.Module, weights: Path, dataset: DataSet, *, device: str, dtype: str) -> np.ndarray:
    """Tokens `(images, N, C)` of train, validation and test images in this order, normalised, memory-mapped from a file beside `weights`.

    If there is no such file, `backbone`, whose weights these are, computes the tokens. Probes that start together may each compute them:
    the last one replaces the file by an equal one.
    """
    with weights.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    path = weights.parent / f"tokens-{digest_of([digest, dataset.digest, dtype])}.npy"
    if not path.exists():
        _write_tokens(backbone, path, dataset, device, dtype)
    # Copy on write: torch warns of arrays that cannot be written to, and the file stays as it is.
    return np.load(path, mmap_mode="c")


@torch.inference_mode()
def _write_tokens(backbone: nn.Module, path: Path, dataset: DataSet, device: str, dtype: str) -> None:
    assert isinstance(backbone, VisionTransformer)
    ids = np.concatenate([dataset.train, dataset.val, dataset.test])
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".tokens-")
    os.close(handle)
    try:
        rows, num_done = None, 0
        for images, _ in evaluation_batches(dataset, ids, device=device, batch_size=256):
            tokens = backbone.norm(backbone.forward_tokens(images)).cpu().numpy()
            if rows is None:
                rows = np.lib.format.open_memmap(temporary, mode="w+", dtype=np.dtype(dtype), shape=(len(ids), *tokens.shape[1:]))
            rows[num_done : num_done + len(tokens)] = tokens
            num_done += len(tokens)
        assert rows is not None
        rows.flush()
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def _train(
    probe: nn.Sequential, tokens: Tensor, labels: Tensor, recipe: Recipe, settings: LinearProbeSettings, context: Context
) -> list[float]:
    """Train pooling and head on the tokens `(n, N, C)` of this seed's part of the training images; the mean loss of each epoch."""
    if not any(parameter.requires_grad for parameter in probe[0].parameters()):
        # Nothing to learn in the pooling: the head sees the same vectors in every epoch.
        tokens, layers = _pooled(probe[0], tokens), nn.Sequential(nn.Identity(), probe[1])
    else:
        layers = probe
    num_images = max(1, round(settings.subsample * len(tokens)))
    chosen = np.random.default_rng(stream(recipe.seed, "probe images")).permutation(len(tokens))[:num_images]
    steps_per_epoch = math.ceil(num_images / recipe.batch_size)
    learner = Learner(layers, recipe, steps_per_epoch)
    # Not `workers.training.train`: a step here takes half a millisecond, and the checks and streams of that loop would double it.
    epoch_losses = []
    for epoch in range(recipe.epochs):
        order = np.random.default_rng(stream(recipe.seed, "probe batches", epoch)).permutation(chosen)
        losses = []
        for step, batch in enumerate(torch.from_numpy(order).to(tokens.device).split(recipe.batch_size)):
            learner.set_rate(num_steps := epoch * steps_per_epoch + step)
            loss = nn.functional.cross_entropy(layers(tokens[batch].float()), labels[batch])
            loss.backward()
            learner.update(num_steps + 1)
            losses.append(loss.detach())
        epoch_losses.append(torch.stack(losses).mean().item())
        context.report("train_loss", epoch_losses[-1], epoch + 1)
    exponents = exponent_parameters(probe)
    for name, parameter in probe.named_parameters():
        if name in exponents:
            for group, exponent in enumerate(parameter.tolist()):
                context.report(f"exponent_{group}", exponent, recipe.epochs)
    return epoch_losses


@torch.no_grad()
def _pooled(pooling: nn.Module, tokens: Tensor) -> Tensor:
    return torch.cat([pooling(part.float()) for part in tokens.split(CHUNK)])


@torch.no_grad()
def _logits(probe: nn.Sequential, tokens: Tensor) -> np.ndarray:
    return probe[1](_pooled(probe[0], tokens)).cpu().numpy()


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
