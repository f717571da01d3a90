"""Accuracy of a subnet with the weights that it inherits from a trained supernet; nothing is trained, nothing is recalibrated.

A worker keeps the supernet, of the phase `supernet` or the one whose `model.pt` the candidate starts from, which all workers of a node
map from one file; and the images, decoded once.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
from torch import nn

from results.records import Metric, stderr_name
from space.model import Model, require_arch
from space.randomness import stream
from space.recipe import Recipe
from space.subnet_spec import SubnetSpec
from space.supernet import Supernet
from workers.data import DataSet
from workers.evaluator import Context, evaluator
from workers.evaluators.supernet import load_supernet
from workers.evaluators.train import WEIGHTS
from workers.inference import predict, top1_pct

SUPERNET = "supernet"
"""The phase whose network lends its weights."""
METRIC = "inherited_top1_pct"


@dataclass(frozen=True, kw_only=True)
class InheritedSettings:
    """`num_images` of the validation part are looked at, drawn at random and the same for every subnet of a study; 0 is all of them.

    A longer draw begins with a shorter one. The batch size changes no number but the last bits.
    """

    num_images: int = 0
    batch_size: int = 256

    def __post_init__(self) -> None:
        for name, least in (("num_images", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ValueError(f"{name} is {value!r}; allowed: whole numbers from {least}")


def check(model: Model, recipe: Recipe | None, settings: InheritedSettings) -> None:
    _subnet(model)


def _subnet(model: Model) -> SubnetSpec:
    """The model as a subnet; the supernet's own network is the largest of them. Raises SpecError for what is none."""
    if isinstance(model, SubnetSpec):
        return model
    arch = require_arch(model, "inherited")
    return SubnetSpec(supernet=arch, arch=arch, kept=tuple(tuple(range(len(stage.blocks))) for stage in arch.stages))


@evaluator(
    "inherited",
    metrics=(
        Metric(METRIC, "maximize", "validation accuracy with the supernet's weights: what a search may look at"),
        Metric(stderr_name(METRIC), "minimize", "its standard error over images"),
    ),
    settings=InheritedSettings,
    check=check,
    uses_data=True,
    needs_dataset=True,
    weights="optional",
    memory_mb=2000,
)
def inherited(model: Model, context: Context, settings: InheritedSettings) -> Mapping[str, float]:
    """Accuracy of a subnet with the weights of a trained supernet, on a part of the validation images.

    Reports `overhead_ms`, the time outside the forward passes.
    """
    started = time.perf_counter()
    subnet = _subnet(model)
    assert context.dataset is not None
    trained = context.weights.path.parent if context.weights else context.best(SUPERNET).workdir
    supernet = _supernet(trained.absolute(), context.device, file_version(trained / WEIGHTS))
    part = _part(_Asked(context.dataset, context.dataset.digest, context.dataset.img_size, settings.num_images, context.seed))
    network = _Timed(supernet.at(subnet))
    images = np.arange(len(part.labels))
    top1 = top1_pct(predict(network, part, images, device=context.device, batch_size=settings.batch_size), part.labels)
    context.report("overhead_ms", 1e3 * (time.perf_counter() - started - network.elapsed_s), 0)
    return {METRIC: top1, stderr_name(METRIC): math.sqrt(top1 * (100 - top1) / len(images))}


def file_version(path: Path) -> tuple[int, int] | None:
    """What changes when a file is written anew, as by a fresh study of the same name; None where there is none."""
    if not path.exists():
        return None
    found = path.stat()
    return found.st_mtime_ns, found.st_size


@lru_cache(maxsize=1)
def _supernet(workdir: Path, device: str, version: tuple[int, int] | None) -> Supernet:
    """The supernet of a work directory; `version` is that of its file."""
    return load_supernet(workdir, device)


class _Timed(nn.Module):
    """A network, and the seconds that its forward passes have taken."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.elapsed_s = network, 0.0

    def forward(self, images):
        started = time.perf_counter()
        logits = self.network(images).cpu()
        self.elapsed_s += time.perf_counter() - started
        return logits


@dataclass(frozen=True)
class _Asked:
    """Images by what decides them; a data set that Ray hands over anew for every job is the same by its digest and its size of images."""

    dataset: DataSet = field(compare=False)
    digest: str
    img_size: int
    num_images: int
    seed: int


@lru_cache(maxsize=2)
def _part(asked: _Asked) -> DataSet:
    """The images as a data set in memory."""
    dataset = asked.dataset
    order = np.random.default_rng(stream(asked.seed, "inherited")).permutation(dataset.val)
    chosen = np.sort(order[: asked.num_images or None])
    return replace(dataset, images=dataset.load(chosen), labels=dataset.labels[chosen], positions=None)
