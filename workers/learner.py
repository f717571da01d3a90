"""The module that learns with all that follows its parameters: optimizer state, schedule and moving average."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from space.model import decay_exempt, exponent_parameters
from space.recipe import Recipe
from workers.layers import rate_scales


@dataclass(frozen=True)
class Origin:
    """Where a parameter or buffer of a new module comes from: the one called `name` in the old module.

    `change(old, fresh)` is the new tensor. `fresh` is the tensor without an origin: the new module's own, or zeros for a moment. For
    example, `torch.cat([old, fresh[-4:]])` adds four rows, which begin with the new module's weights and without momentum.
    """

    name: str
    change: Callable[[Tensor, Tensor], Tensor] = lambda old, fresh: old


class Learner:
    """A module on its device with its optimizer, schedule and moving average.

    A moment of the optimizer is whatever it keeps in the shape of a parameter, such as AdamW's `exp_avg`.
    """

    def __init__(self, module: nn.Module, recipe: Recipe, steps_per_epoch: int):
        self.module = module
        self.optimizer = make_optimizer(module, recipe)
        self._schedule = make_schedule(self.optimizer, recipe, steps_per_epoch)
        self._average = _make_average(module, recipe)
        self._recipe, self._steps_per_epoch = recipe, steps_per_epoch

    @property
    def averaged(self) -> nn.Module:
        """The moving average of the module if the recipe keeps one, else the module."""
        return self.module if self._average is None else self._average.module

    @property
    def lr(self) -> float:
        """The rate of the last step, of the groups that have no scale of their own."""
        return self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"]

    @property
    def lr_x_weight_decay(self) -> float:
        """The share by which decoupled weight decay shrank weights in the last step, in the optimizer's own rate and decay."""
        return max(group["lr"] / group["lr_scale"] * group["weight_decay"] for group in self.optimizer.param_groups)

    def set_rate(self, step: int) -> None:
        """Set the learning rates of the step, counted from 0."""
        self._schedule.step_update(step)

    def update(self, num_steps: int) -> None:
        """Take an optimizer step, set the gradients to None and update the moving average; `num_steps` includes this step.

        A parameter without gradient is left alone, and so are its moments: it neither decays nor goes on by momentum.
        """
        self._begin_momentum()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self._average is not None:
            # Without its warm-up an average of decay d shows the initial weights for 1 / (1 - d) steps.
            self._average.update(self.module, step=num_steps)

    def transform(self, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> None:
        """Change parameters and buffers in place by name, each together with its moments and its moving average.

        For permutations: a change is applied to each of these tensors alone and keeps its shape. Raises ValueError if it does not.
        """
        self._take_over(self, {name: Origin(name, lambda old, fresh, change=change: change(old)) for name, change in changes.items()})

    def exchanged(self, module: nn.Module, origins: Mapping[str, Origin]) -> Learner:
        """A learner of another module. The origin of a parameter or buffer named in `origins` makes the new tensor, its moments and its
        moving average from the old ones. All others are those of `module` and begin without moments.

        Raises ValueError for a changed tensor whose shape is not that of the new one.
        """
        device = next(self.module.parameters()).device
        learner = Learner(module.to(device), self._recipe, self._steps_per_epoch)
        if "step" in (old := self.optimizer.param_groups[0]):
            # timm's LAMB counts its steps per group, not per parameter.
            for group in learner.optimizer.param_groups:
                group["step"] = old["step"].clone()
        learner._take_over(self, origins)
        return learner

    def state_dict(self) -> dict[str, Any]:
        return {
            "network": self.module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self._average is None else self._average.module.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.module.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self._average is not None:
            self._average.module.load_state_dict(state["average"])

    def _begin_momentum(self) -> None:
        """Give zero momentum to parameters that SGD touches later than others: its fused kernel takes all momenta of a group or none."""
        if isinstance(self.optimizer, torch.optim.SGD) and self.optimizer.state:
            for group in self.optimizer.param_groups:
                for parameter in group["params"]:
                    if parameter.grad is not None and "momentum_buffer" not in self.optimizer.state[parameter]:
                        self.optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)

    @torch.no_grad()
    def _take_over(self, old: Learner, origins: Mapping[str, Origin]) -> None:
        networks = [(self.module, old.module)]
        if self._average is not None:
            networks.append((self.averaged, old.averaged))
        written = []
        for mine, theirs in networks:
            targets, sources = mine.state_dict(), theirs.state_dict()
            written += [(targets[name], _new(name, origin, sources[origin.name], targets[name])) for name, origin in origins.items()]
        targets, sources = dict(self.module.named_parameters()), dict(old.module.named_parameters())
        moved = {}
        for name, origin in origins.items():
            source = sources.get(origin.name)
            if name in targets and source is not None and source in old.optimizer.state:
                target = targets[name]
                moved[target] = {
                    key: _new(name, origin, value, torch.zeros_like(target)) if _is_moment(key, value, source) else deepcopy(value)
                    for key, value in old.optimizer.state[source].items()
                }
        # Everything is read before anything is written: `old` may be this learner.
        for target, value in written:
            target.copy_(value)
        self.optimizer.state.update(moved)


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer of the recipe; weight decay spares norms, biases, positions, tokens and exponents."""
    from timm import optim

    exempt, exponents = decay_exempt(network), exponent_parameters(network)
    scales = rate_scales(network, recipe.layer_decay)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        decay = 0.0 if name in exempt or name in exponents else recipe.optimizer_weight_decay
        scale = (recipe.exponent_lr_scale if name in exponents else 1.0) * scales[name]
        groups.setdefault((decay, scale), []).append(parameter)
    # timm's schedulers multiply the rate of a group by its "lr_scale".
    params: Any = [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in groups.items()]
    # timm's LAMB clips gradients unless told not to; clipping is for the recipe to say.
    own: dict[str, dict[str, Any]] = {"adamw": {"fused": True}, "sgd": {"fused": True}, "lamb": {"max_grad_norm": None}}
    return optim.create_optimizer_v2(  # type: ignore[reportPrivateImportUsage]
        params, opt=recipe.optimizer, lr=recipe.optimizer_lr, momentum=0.9, **own.get(recipe.optimizer, {})
    )


def make_schedule(optimizer: torch.optim.Optimizer, recipe: Recipe, steps_per_epoch: int) -> Any:
    """Linear warm-up, then a cosine to `min_lr` at the last step: timm's schedule, a function of the step alone."""
    from timm.scheduler.cosine_lr import CosineLRScheduler

    num_steps = recipe.epochs * steps_per_epoch
    warmup = min(round(recipe.warmup_epochs * steps_per_epoch), num_steps // 2)
    scale = recipe.optimizer_lr / recipe.lr
    return CosineLRScheduler(
        optimizer,
        t_initial=max(num_steps - 1 - warmup, 1),
        lr_min=recipe.min_lr * scale,
        warmup_t=warmup,
        warmup_lr_init=recipe.min_lr * scale,
        warmup_prefix=True,
        t_in_epochs=False,
    )


def _make_average(module: nn.Module, recipe: Recipe) -> Any:
    if not recipe.ema_decay:
        return None
    from timm.utils.model_ema import ModelEmaV3

    return ModelEmaV3(module, decay=recipe.ema_decay, use_warmup=True)


def _is_moment(key: str, value: Any, parameter: Tensor) -> bool:
    return isinstance(value, Tensor) and key != "step" and value.shape == parameter.shape


def _new(name: str, origin: Origin, old: Tensor, fresh: Tensor) -> Tensor:
    new = origin.change(old.detach(), fresh.detach()).clone()
    if new.shape != fresh.shape:
        raise ValueError(f"{name} has shape {tuple(fresh.shape)}, but its origin {origin.name} gives {tuple(new.shape)}")
    return new
