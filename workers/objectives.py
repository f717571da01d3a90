"""What a training minimises and validates: the contract of an objective, plain classification, and distillation.

The loop (`workers.training.train`) owns data, optimizer, schedule, moving average, checkpoints and processes. An objective owns the
module that is trained and its loss:

    class Supernet(Objective):
        touches_all = False                                             # a step trains the sampled subnet only

        def loss(self, forward, batch, position):
            subnet = self.space.sample(position.shared_stream("subnet"))
            return cross_entropy(forward(batch.images, subnet).float(), batch.labels)

A resumed training is bit-identical to an uninterrupted one if the objective draws only from the streams of `position` and from
torch's global generator, which is seeded before `start`, `before_epoch` and `loss`, and if `state_dict` holds what else changes.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from space.model import Model, as_arch, build_model
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from space.weights import Weights
from workers.batches import Batch
from workers.checkpoints import load_model
from workers.data import DataSet
from workers.distributed import Process
from workers.inference import mean_nll, predict, top1_pct
from workers.layers import freeze
from workers.learner import Learner
from workers.mixing import Mixer, token_loss
from workers.weights import load_weights

Forward = Callable[..., Any]
"""The module's call, in the precision of the recipe and prepared for several processes."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """What the loop tells an objective when the training starts."""

    model: Model
    recipe: Recipe
    dataset: DataSet
    process: Process
    mixer: Mixer | None
    """The recipe's mixing."""
    weights: Weights | None = None
    """What the network starts from; None is fresh weights."""
    autocast: Callable[[], AbstractContextManager[Any]]
    """The context of the recipe's precision, for forward passes other than the module's own."""
    num_loader_workers: int = 0


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in a training a loss is taken. Of a global batch, process `rank` has every `world_size`-th image from the `rank`-th, and
    these are cut into `num_parts` consecutive parts."""

    seed: int
    epoch: int
    step: int
    """Since the start of the training."""
    part: int
    num_parts: int
    rank: int
    world_size: int

    def stream(self, name: str) -> int:
        """The seed of the stream `name` of this part of the step, on this process."""
        return stream(self.seed, name, self.epoch, self.step, self.rank, self.part)

    def shared_stream(self, name: str) -> int:
        """The seed of the stream `name` of this step, equal for all its parts and processes."""
        return stream(self.seed, name, self.epoch, self.step)


class Objective(ABC):
    """How the loop's batches train a module. One instance serves one training, in each of its processes.

    All methods but `validate` are called in every process, and those without a batch must do the same in each.
    """

    touches_all: ClassVar[bool] = True
    """Whether each step gives every trained parameter a gradient. If not, the loop averages gradients itself after the last part of a
    step, so `loss` may call `forward` several times: a parameter that no process touched keeps the gradient None, and one that some
    process touched has the mean over all processes, with zero for those that did not. The optimizer skips None: such a parameter does
    not decay, does not move by momentum, and its moments wait. A part of a tensor that was not used has a zero gradient, and does
    decay and move."""

    setup: Setup

    @property
    def identity(self) -> Any:
        """JSON of what changes the training beside model, recipe, data and the name of the class. Called before `start`."""
        return None

    def start(self, setup: Setup) -> nn.Module:
        """The module to train, on the CPU and in the mode it is trained in; parameters that require no gradient stay as they are.

        It may hold more than the network, such as auxiliary heads: all of it is in the checkpoint and has a moving average. Called once; a
        resumed training calls it after `load_state_dict`, and the module must then be the one of the checkpoint. Raises SpecError where the
        objective does not fit the model or the data.
        """
        self.setup = setup
        network = build_model(setup.model, seed=setup.recipe.seed, drop_path=setup.recipe.drop_path)
        if setup.weights is not None:
            load_weights(network, setup.model, setup.weights)
        freeze(network, setup.recipe.freeze)
        return network

    def before_epoch(self, epoch: int, learner: Learner) -> Learner:
        """Called before the first step of each epoch, from 0; returns the learner to go on with.

        Here parameters may be permuted (`learner.transform`), frozen or released (`requires_grad_`), and the module be exchanged
        (`return learner.exchanged(...)`). A checkpoint between two epochs is taken before this call, one inside an epoch after it.
        """
        return learner

    @abstractmethod
    def loss(self, forward: Forward, batch: Batch, position: Position) -> Tensor:
        """Mean loss `()` over the images of the batch, which are one part of the step's images."""

    def network(self, module: nn.Module) -> nn.Module:
        """The network to use, of the module or its moving average: what `Training.network` is."""
        return module

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        """The metrics that are reported after each epoch, of the module or its moving average. Called in the first process alone."""
        setup = self.setup
        logits = predict(
            self.network(module), setup.dataset, setup.dataset.val, device=setup.process.device, num_loader_workers=setup.num_loader_workers
        )
        labels = setup.dataset.labels[setup.dataset.val]
        return {"val_top1_pct": top1_pct(logits, labels), "val_nll": mean_nll(logits, labels)}

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint holds beside the module: tensors, numbers, strings, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:  # noqa: B027
        """Take up the state of a checkpoint; called before `start`."""


class WithTokenHead(nn.Module):
    """A network with a second classifier on the tokens of its last stage, for mixings that label these."""

    def __init__(self, network: nn.Module, head: nn.Linear):
        super().__init__()
        self.network, self.token_head = network, head

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of the images `(B, K)` and of their tokens `(B, N, K)`."""
        logits, tokens = self.network(images, with_patches=True)
        return logits, self.token_head(tokens)


def token_head(model: Model, seed: int) -> nn.Linear:
    """The fresh classifier of `WithTokenHead`, for a network of our components."""
    arch = as_arch(model)
    assert arch is not None, "check_recipe refuses others"
    head = nn.Linear(arch.stages[-1].embed_dim, model.num_classes)
    nn.init.trunc_normal_(head.weight, std=0.02, generator=torch.Generator().manual_seed(stream(seed, "weights", "token_head")))
    nn.init.zeros_(head.bias)
    return head


class Classification(Objective):
    """Cross-entropy to the labels, smoothed and mixed as the recipe says.

    A mixing that labels the tokens of the last stage adds the mean cross-entropy of a second classifier on them, which is trained with
    the network and is no part of it.
    """

    def start(self, setup: Setup) -> nn.Module:
        network = super().start(setup)
        return WithTokenHead(network, token_head(setup.model, setup.recipe.seed)) if self._labels_tokens else network

    def network(self, module: nn.Module) -> nn.Module:
        return module.network if isinstance(module, WithTokenHead) else module

    @property
    def _labels_tokens(self) -> bool:
        return self.setup.mixer is not None and self.setup.mixer.has_token_labels

    def loss(self, forward: Forward, batch: Batch, position: Position) -> Tensor:
        _, _, loss = self._classify(forward, batch, position)
        return loss

    def _classify(self, forward: Forward, batch: Batch, position: Position) -> tuple[Tensor, Tensor, Tensor]:
        """The images as the network saw them, its logits `(B, K)` in float32, and the loss."""
        mixer, smoothing = self.setup.mixer, self.setup.recipe.label_smoothing
        if mixer is None:
            logits = forward(batch.images).float()
            return batch.images, logits, nn.functional.cross_entropy(logits, batch.labels, label_smoothing=smoothing)
        mixed = mixer.mix(batch.images, position.stream("mixing"))
        class_row = token_logits = None
        if mixer.needs_class_row:
            logits, class_row = forward(mixed.images, with_class_row=True)
        elif mixer.has_token_labels:
            logits, token_logits = forward(mixed.images)
        else:
            logits = forward(mixed.images)
        logits = logits.float()
        loss = mixer.loss(logits, batch.labels, mixed, class_row, smoothing)
        if token_logits is not None:
            loss = loss + token_loss(token_logits, batch.labels, mixed, smoothing)
        return mixed.images, logits, loss


class Distillation(Classification):
    """Classification with soft targets from a trained teacher, which stays as it is: (1 - w) CE + w T^2 KL(teacher || student).

    Distilling the Knowledge in a Neural Network, https://arxiv.org/abs/1503.02531, section 2: both distributions are softened by the
    temperature T, and T^2 keeps the size of their gradient. The teacher sees the same images, mixed ones included.
    """

    def __init__(self, teacher: Path, *, weight: float, temperature: float):
        """`teacher` is a file of `workers.checkpoints.save_model`, `weight` is w from 0 to 1, `temperature` is T above 0."""
        self.path, self.weight, self.temperature = teacher, weight, temperature

    @property
    def identity(self) -> Any:
        with self.path.open("rb") as file:
            checksum = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        return {"teacher": checksum, "weight": self.weight, "temperature": self.temperature}

    def start(self, setup: Setup) -> nn.Module:
        self.teacher, model = load_model(self.path, setup.process.device)
        for what in ("num_classes", "img_size"):
            if (theirs := getattr(model, what)) != (ours := getattr(setup.model, what)):
                raise SpecError(f"the teacher {self.path} has {what} {theirs}, the network {ours}; they must be equal")
        self.teacher.requires_grad_(False)
        return super().start(setup)

    def loss(self, forward: Forward, batch: Batch, position: Position) -> Tensor:
        images, logits, hard = self._classify(forward, batch, position)
        with torch.no_grad(), self.setup.autocast():
            taught = self.teacher(images)
        return (1 - self.weight) * hard + self.weight * soft_target_loss(logits, taught.float(), self.temperature)


def soft_target_loss(logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)) of logits `(B, K)`, mean over the batch, in nats."""
    student, teacher = ((each / temperature).log_softmax(dim=1) for each in (logits, teacher_logits))
    return temperature**2 * nn.functional.kl_div(student, teacher, reduction="batchmean", log_target=True)
