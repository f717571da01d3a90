"""The training of a supernet: every step trains several subnets, each on a part of the batch.

Multi-architectural sampling of ViT-ResNAS, https://arxiv.org/abs/2109.00642: image i of a batch belongs to subnet i mod K, and the loss is
the mean over all images, which is the sum of B_k / B times the mean loss of subnet k on its B_k images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from space.model import Model
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from space.slicing import Slice
from space.subnet_spec import SubnetSpec
from space.supernet import Supernet, borrowed, first_difference
from space.supernet_space import SupernetSpace
from workers.batches import Batch
from workers.inference import predict, top1_pct
from workers.learner import Learner
from workers.objectives import Classification, Forward, Position, Setup, soft_target_loss, token_head
from workers.subnet_sampling import Sampling, SubnetSampler, draw_iid, orders_by_importance, unlocked_tables
from workers.weights import load_weights

NUM_RANDOM = 4
"""Subnets that stand for the space in the validation after each epoch, always the same."""


@dataclass(frozen=True, kw_only=True)
class SupernetTraining:
    """How a supernet is trained beside its recipe.

    Each process takes `num_subnets` a step, or for each accumulated part of one, drawn by `sampling` (`SubnetSampler`). Over the first
    `unlock_share` of the epochs the choices of the space are unlocked one by one, and with `sorts_units` heads and hidden units are
    sorted by importance before each of these epochs. A `distillation_weight` w trains all subnets with (1 - w) of the labels' loss and
    w of the divergence from the largest network, as it stands, in evaluation mode.
    """

    num_subnets: int = 2
    sampling: Sampling = "stratified"
    unlock_share: float = 0.25
    sorts_units: bool = True
    distillation_weight: float = 0.0

    def __post_init__(self) -> None:
        if self.num_subnets < 1:
            raise ValueError(f"num_subnets is {self.num_subnets}; allowed: whole numbers from 1")
        for name, is_legal, allowed in (
            ("unlock_share", 0 <= self.unlock_share <= 1, "from 0 to 1"),
            ("distillation_weight", 0 <= self.distillation_weight < 1, "from 0 to below 1"),
        ):
            if not is_legal:
                raise ValueError(f"{name} is {getattr(self, name)!r}; allowed: {allowed}")

    def sampler(self, space: SupernetSpace, recipe: Recipe) -> SubnetSampler:
        """Raises SpecError where the numbers do not fit."""
        return SubnetSampler(
            space=space, num_subnets=self.num_subnets, mode=self.sampling, num_unlocking_epochs=self.unlock_share * recipe.epochs
        )


class SupernetObjective(Classification):
    """Classification by the subnets of a space, which share their weights."""

    touches_all = False

    def __init__(self, space: SupernetSpace, how: SupernetTraining):
        self.space, self.how = space, how

    @property
    def identity(self) -> Any:
        # Not all fields of `how`: an evaluator's settings may add some that change no number.
        return {"space": self.space.to_json(), **{field.name: getattr(self.how, field.name) for field in fields(SupernetTraining)}}

    def start(self, setup: Setup) -> nn.Module:
        check_supernet_training(setup.model, setup.recipe, self.space, self.how, num_processes=setup.process.world_size)
        self.setup, recipe = setup, setup.recipe
        self.sampler = self.how.sampler(self.space, recipe)
        self.supernet = Supernet(self.space.largest, seed=recipe.seed, drop_path=recipe.drop_path)
        if setup.weights is not None:
            load_weights(self.supernet.network, setup.model, setup.weights)
        return _Trained(self.supernet, token_head(setup.model, recipe.seed) if self._labels_tokens else None)

    def network(self, module: nn.Module) -> nn.Module:
        assert isinstance(module, _Trained)
        return module.supernet

    def before_epoch(self, epoch: int, learner: Learner) -> Learner:
        if self.how.sorts_units and epoch <= self.sampler.num_unlocking_epochs:
            changes = orders_by_importance(self.space.largest, dict(self.supernet.network.named_parameters()))
            learner.transform({f"supernet.network.{name}": change for name, change in changes.items()})
        return learner

    def loss(self, forward: Forward, batch: Batch, position: Position) -> Tensor:
        subnets = self.sampler.sample(position.epoch, position.stream("subnets"))
        images, logits, loss = self._classify(partial(forward, subnets), batch, position)
        if not (weight := self.how.distillation_weight):
            return loss
        self.supernet.eval()
        with torch.no_grad(), self.setup.autocast():
            taught = self.supernet.network(images)
        self.supernet.train()
        return (1 - weight) * loss + weight * soft_target_loss(logits, taught.float(), temperature=1.0)

    def validate(self, module: nn.Module) -> Mapping[str, float]:
        assert isinstance(module, _Trained)
        return self.judge(module.supernet)

    def judge(self, supernet: Supernet) -> Mapping[str, float]:
        """The accuracies of the largest, the smallest and random subnets on all validation images, in percent."""
        accuracy = partial(_accuracy_pct, self.setup)
        largest, smallest = map(self.space.subnet, (self.space.largest_point, self.space.smallest_point))
        return {
            "largest_val_top1_pct": accuracy(supernet, largest),
            "smallest_val_top1_pct": accuracy(supernet, smallest),
            "random_val_top1_pct": fmean(accuracy(supernet, subnet) for subnet in random_subnets(self.space)),
        }


def random_subnets(space: SupernetSpace) -> tuple[SubnetSpec, ...]:
    """Independent draws from a whole space, the same in every training, so that curves compare."""
    generator, tables = torch.Generator().manual_seed(stream(0, "random_subnets")), unlocked_tables(space, 0, 0)
    return tuple(space.subnet(draw_iid(tables, generator)) for _ in range(NUM_RANDOM))


def check_supernet_training(model: Model, recipe: Recipe, space: SupernetSpace, how: SupernetTraining, *, num_processes: int = 1) -> None:
    """Raise SpecError unless the network is the largest of the space and can be trained as its supernet; needs no data."""
    if model != space.largest:
        raise SpecError(
            f"the network is not the largest of space {space.name!r}: {first_difference(model.to_json(), space.largest.to_json())}"
        )
    how.sampler(space, recipe)
    num_parts = recipe.num_accumulation * num_processes
    if recipe.batch_size // num_parts < how.num_subnets:
        parts = f"batch_size {recipe.batch_size} in {num_parts} parts" if num_parts > 1 else f"batch_size {recipe.batch_size}"
        raise SpecError(f"{how.num_subnets} subnets a step need an image each; {parts} gives {recipe.batch_size // num_parts}")
    for name, off in (("compile", False), ("freeze", 0), ("layer_decay", 1.0)):
        if (value := getattr(recipe, name)) != off:
            raise SpecError(f"recipe: {name} is {value}; a supernet, whose subnets differ from step to step, takes {off} alone")


class _Trained(nn.Module):
    """The supernet and, for a mixing that labels tokens, the classifier of tokens, of which a subnet has the first columns."""

    def __init__(self, supernet: Supernet, token_head: nn.Linear | None):
        super().__init__()
        self.supernet, self.token_head = supernet, token_head

    def forward(self, subnets: Sequence[SubnetSpec], images: Tensor, **asked: Any) -> Any:
        """What the networks give, image i that of subnet i mod K; with a classifier of tokens also the logits of these."""
        embedded = self.supernet.embed(images)
        parts = [self._run(embedded[place :: len(subnets)], subnet, asked) for place, subnet in enumerate(subnets)]
        if isinstance(parts[0], Tensor):
            return interleaved(parts)
        return tuple(interleaved(each) for each in zip(*parts, strict=True))

    def _run(self, embedded: Tensor, subnet: SubnetSpec, asked: Mapping[str, Any]) -> Any:
        if self.token_head is None:
            return self.supernet.run(embedded, subnet, **asked)
        logits, tokens = self.supernet.run(embedded, subnet, with_patches=True, **asked)
        whole, width = self.token_head.weight, tokens.shape[-1]
        columns = Slice("", "", tuple((size,) for size in whole.shape), ((len(whole),), (width,)))
        return logits, nn.functional.linear(tokens, borrowed(columns, whole), self.token_head.bias)


def interleaved(parts: Sequence[Tensor]) -> Tensor:
    """Rows of K tensors in turn: row i is row i // K of tensor i mod K. The lengths differ by one at most, the longer first."""
    order = torch.cat([torch.arange(place, sum(map(len, parts)), len(parts)) for place in range(len(parts))])
    return torch.cat(list(parts))[order.argsort().to(parts[0].device)]


def _accuracy_pct(setup: Setup, supernet: Supernet, subnet: SubnetSpec) -> float:
    val = setup.dataset.val
    logits = predict(supernet.at(subnet), setup.dataset, val, device=setup.process.device, num_loader_workers=setup.num_loader_workers)
    return top1_pct(logits, setup.dataset.labels[val])
