"""Tiny objectives that do what supernets, stitches and growing networks will: each uses one more of the loop's freedoms."""

from __future__ import annotations

import torch
from torch import nn

from workers.learner import Origin
from workers.objectives import Classification, Objective


class Permuting(Classification):
    """An MLP whose hidden units are sorted by importance before each epoch."""

    @staticmethod
    def mlp(num_hidden):
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 8 * 8, num_hidden), nn.GELU(), nn.Linear(num_hidden, 10))

    @staticmethod
    def changes(order):
        return {
            "1.weight": lambda tensor: tensor[order],
            "1.bias": lambda tensor: tensor[order],
            "3.weight": lambda tensor: tensor[:, order],
        }

    def start(self, setup):
        self.setup = setup
        return self.mlp(16)

    def before_epoch(self, epoch, learner):
        order = learner.module[1].weight.detach().abs().sum(dim=1).argsort(descending=True)
        assert epoch == 0 or not torch.equal(order, torch.arange(16)), "there is something to sort"
        learner.transform(self.changes(order))
        return learner


class Growing(Classification):
    """An MLP that gains four hidden units before each epoch but the first; new ones have outgoing weights of zero."""

    num_hidden = 8

    def start(self, setup):
        self.setup = setup
        return Permuting.mlp(self.num_hidden)

    def before_epoch(self, epoch, learner):
        if epoch == 0:
            return learner
        self.num_hidden += 4
        larger = Permuting.mlp(self.num_hidden)
        larger[3].weight.data[:, -4:] = 0
        origins = {
            "1.weight": Origin("1.weight", lambda old, fresh: torch.cat([old, fresh[-4:]])),
            "1.bias": Origin("1.bias", lambda old, fresh: torch.cat([old, fresh[-4:]])),
            "3.weight": Origin("3.weight", lambda old, fresh: torch.cat([old, fresh[:, -4:]], dim=1)),
            "3.bias": Origin("3.bias"),
        }
        return learner.exchanged(larger, origins)

    def validate(self, module):
        return {"num_hidden": module[1].out_features}

    def state_dict(self):
        return {"num_hidden": self.num_hidden}

    def load_state_dict(self, state):
        self.num_hidden = state["num_hidden"]


class _WithHead(nn.Module):
    def __init__(self, network, head):
        super().__init__()
        self.network, self.head = network, head

    def forward(self, images):
        return self.network(images), self.head(images.flatten(1))


class AuxiliaryHead(Objective):
    """A second head on the pixels, whose weight in the loss fades as losses are counted: state of the objective's own."""

    num_losses = 0

    @staticmethod
    def head(model):
        torch.manual_seed(7)
        return nn.Linear(3 * model.img_size**2, model.num_classes)

    def start(self, setup):
        return _WithHead(super().start(setup), self.head(setup.model))

    def loss(self, forward, batch, position):
        logits, auxiliary = forward(batch.images)
        self.num_losses += 1
        losses = [nn.functional.cross_entropy(each.float(), batch.labels) for each in (logits, auxiliary)]
        return losses[0] + losses[1] / self.num_losses

    def network(self, module):
        return module.network

    def state_dict(self):
        return {"num_losses": self.num_losses}

    def load_state_dict(self, state):
        self.num_losses = state["num_losses"]


class _Branches(nn.Module):
    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.head = nn.Linear(16, 10)

    def forward(self, images, branch=1):
        return self.head(self.branches[branch](images.flatten(1)).relu())


class Subnets(Objective):
    """A supernet of three branches of which a step trains one for every other image of the global batch, and never all three.

    Which two it trains is drawn once per step, for all processes; `by_epoch` trains the branch of the epoch's number instead.
    """

    touches_all = False

    def __init__(self, *, by_epoch=False):
        self.by_epoch = by_epoch

    @staticmethod
    def branch(number):
        torch.manual_seed(number)
        return nn.Linear(3 * 8 * 8, 16)

    def start(self, setup):
        self.setup = setup
        torch.manual_seed(100)
        return _Branches([self.branch(number) for number in range(3)])

    def loss(self, forward, batch, position):
        if self.by_epoch:
            return nn.functional.cross_entropy(forward(batch.images, position.epoch), batch.labels)
        generator = torch.Generator().manual_seed(position.shared_stream("subnets"))
        sampled = torch.randperm(3, generator=generator)[:2].tolist()
        # The place of each image in its part of the global batch, whichever process has it.
        places = position.rank + position.world_size * torch.arange(len(batch.images))
        total = torch.zeros(())
        for number, branch in enumerate(sampled):
            mine = places % 2 == number
            if mine.any():
                logits = forward(batch.images[mine], branch)
                total = total + nn.functional.cross_entropy(logits, batch.labels[mine], reduction="sum")
        return total / len(batch.images)
