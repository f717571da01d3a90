"""One training from start to end: a pure function of model, recipe and data, however often it was interrupted.

Every random draw comes from a stream named by (seed, epoch, step) or (seed, epoch, index), so the position in the training is the
whole state of its randomness: a checkpoint holds weights, optimizer, moving average and that position, and what is resumed ends
with the bits of what was not (on the CPU, with the same number of threads).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from space.model import Model, build_model, decay_exempt, exponent_parameters, supports_class_row, token_size
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import digest_of
from workers.augmentation import make_image_transform
from workers.batches import TrainingBatches
from workers.checkpoints import latest_checkpoint, save_checkpoint
from workers.data import DataSet
from workers.distributed import ALONE, Process
from workers.evaluator import PROGRESS, EvaluationError, Report, report_nothing
from workers.inference import mean_nll, predict, top1_pct
from workers.mixing import Mixer, make_mixer

FINITE_CHECK_STEPS = 50
"""A look at the loss waits for the device; until the next one a step that was not finite is remembered there."""

PROGRESS_EVERY_S = 1.0

CHECKPOINTS = "checkpoints-"
"""Begins the name of the folder in a work directory that holds the checkpoints of a training; its identity follows."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A finished training: the network to use (the moving average, if the recipe keeps one) and what its course showed."""

    network: nn.Module
    train_loss: float
    """Mean over the last epoch, mixing and smoothing included."""
    images_per_s: float
    data_wait_pct: float
    """Share of the training time spent waiting for data; both rates leave validation out and are those since the last start."""
    checkpoints: Path
    """The folder of this training's checkpoints, of no more use once the network is stored."""


def train(
    model: Model,
    recipe: Recipe,
    dataset: DataSet,
    *,
    workdir: Path,
    process: Process = ALONE,
    report: Report = report_nothing,
    warn: Callable[[str], None] = lambda message: None,
    num_loader_workers: int = 0,
    checkpoint_every_s: float = 60.0,
) -> Training:
    """Train the network of `model` on the training part of `dataset`, going on from the last checkpoint in `workdir`.

    Reports `train_loss`, `val_top1_pct`, `val_nll`, `lr`, `images_per_s` and `data_wait_pct` after each epoch, and its progress.
    Raises SpecError where model, recipe and data do not fit one another, and EvaluationError `non_finite` naming the step and the
    last good checkpoint.
    """
    check_recipe(model, recipe, num_processes=process.world_size)
    if model.num_classes != dataset.num_classes:
        raise SpecError(f"the network has {model.num_classes} classes, data {dataset.source!r} has {dataset.num_classes}")
    run = _Run(model, recipe, dataset, workdir, process, report, num_loader_workers, checkpoint_every_s)
    with _own_random_state(process.device):
        run.resume(warn)
        run.to_the_end()
    return run.result()


def check_recipe(model: Model, recipe: Recipe, *, num_processes: int = 1) -> None:
    """Raise SpecError unless the network can be trained in this way by so many processes; needs no data."""
    if model.in_chans != 3:
        raise SpecError(f"the network has in_chans {model.in_chans}; images have 3 channels")
    make_image_transform(recipe, model.img_size)
    mixer = make_mixer(recipe, img_size=model.img_size, patch_size=token_size(model), num_processes=num_processes)
    if mixer is not None and mixer.needs_class_row and (reason := supports_class_row(model)):
        raise SpecError(f"mixing {recipe.mixing!r} reads the class token's attention: {reason}")


def make_optimizer(network: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    """timm's optimizer of the recipe; weight decay spares norms, biases, positions, tokens and exponents."""
    from timm import optim

    exempt, exponents = decay_exempt(network), exponent_parameters(network)
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in network.named_parameters():
        decay = 0.0 if name in exempt or name in exponents else recipe.optimizer_weight_decay
        scale = recipe.exponent_lr_scale if name in exponents else 1.0
        groups.setdefault((decay, scale), []).append(parameter)
    # timm's schedulers multiply the rate of a group by its "lr_scale".
    params: Any = [{"params": params, "weight_decay": decay, "lr_scale": scale} for (decay, scale), params in groups.items()]
    # timm's LAMB clips by itself unless told not to, which is the recipe's to say.
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


class _Run:
    """A training in progress. `step` counts the optimizer steps taken."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        dataset: DataSet,
        workdir: Path,
        process: Process,
        report: Report,
        num_loader_workers: int,
        checkpoint_every_s: float,
    ):
        self.model, self.recipe, self.dataset, self.process = model, recipe, dataset, process
        self.report = report if process.rank == 0 else report_nothing
        self.folder = workdir / f"{CHECKPOINTS}{self.identity}"
        self.num_loader_workers, self.checkpoint_every_s = num_loader_workers, checkpoint_every_s
        self.batches = TrainingBatches(
            dataset, recipe, device=process.device, rank=process.rank, world_size=process.world_size, num_workers=num_loader_workers
        )
        self.network = build_model(model, seed=recipe.seed, drop_path=recipe.drop_path).to(process.device).train()
        self.average = self._make_average()
        self.optimizer = make_optimizer(self.network, recipe)
        self.schedule = make_schedule(self.optimizer, recipe, self.batches.num_steps)
        self.mixer = make_mixer(recipe, img_size=model.img_size, patch_size=token_size(model), num_processes=process.world_size)
        self.num_steps = recipe.epochs * self.batches.num_steps
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=process.device)
        """Of the steps of this epoch so far."""
        self.train_loss = math.nan
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=process.device)
        self.last_checkpoint: Path | None = None
        self.trained_s, self.num_trained = 0.0, 0

    def resume(self, warn: Callable[[str], None]) -> None:
        """Go on from the last checkpoint, if there is one of this training."""
        found = latest_checkpoint(self.folder, warn) if self.process.rank == 0 else None
        if self.process.world_size > 1:
            # The first process alone tidies the folder, so the others are told what it found.
            shared = [found]
            torch.distributed.broadcast_object_list(shared)
            found = shared[0]
        if found is None:
            return
        self.last_checkpoint, state = found
        self.dataset.record_damage(tuple(state["skipped"]))
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.module.load_state_dict(state["average"])
        self.step, self.train_loss = state["step"], state["train_loss"]
        self.loss_sum = state["loss_sum"].to(self.loss_sum.device)

    def to_the_end(self) -> None:
        forward = self._make_forward()
        saved_at = shown_at = time.monotonic()
        while self.step < self.num_steps:
            epoch, first_step = divmod(self.step, self.batches.num_steps)
            began = time.monotonic()
            for batch in self.batches.epoch(epoch, first_step):
                self._take_step(forward, epoch, batch.images, batch.labels)
                now = time.monotonic()
                if self.step % FINITE_CHECK_STEPS == 0:
                    self._check_finite()
                if now - shown_at >= PROGRESS_EVERY_S:
                    shown_at = now
                    self.report(PROGRESS, self.step / self.num_steps, self.step)
                # The processes' losses come together at the end of an epoch: until then no one of them could save the sum.
                is_inside = self.step % self.batches.num_steps and self.process.world_size == 1
                if now - saved_at >= self.checkpoint_every_s and is_inside:
                    self._save()
                    saved_at = time.monotonic()
            self._check_finite()
            self.trained_s += time.monotonic() - began
            self._end_epoch(epoch)
            if time.monotonic() - saved_at >= self.checkpoint_every_s and self.step < self.num_steps:
                self._save()
                saved_at = time.monotonic()
        self.report(PROGRESS, 1.0, self.step)

    def result(self) -> Training:
        network = self.network if self.average is None else self.average.module
        return Training(
            network=network.eval(),
            train_loss=self.train_loss,
            images_per_s=self.images_per_s,
            data_wait_pct=self.data_wait_pct,
            checkpoints=self.folder,
        )

    @property
    def images_per_s(self) -> float:
        return self.num_trained / self.trained_s if self.trained_s else math.nan

    @property
    def data_wait_pct(self) -> float:
        return 100 * self.batches.wait_s / self.trained_s if self.trained_s else math.nan

    @property
    def identity(self) -> str:
        """Of what is trained, on what, and by how many processes."""
        return digest_of([self.model.digest, self.recipe.to_json(), self.dataset.digest, self.process.world_size])

    def _take_step(self, forward: Callable[..., Any], epoch: int, images: Tensor, labels: Tensor) -> None:
        recipe, num_parts = self.recipe, self.recipe.num_accumulation
        # Drop path and dropout draw from torch's global stream.
        torch.manual_seed(stream(recipe.seed, "step", epoch, self.step, self.process.rank))
        self.schedule.step_update(self.step)
        loss = torch.zeros((), device=images.device)
        for part, (some_images, some_labels) in enumerate(zip(images.chunk(num_parts), labels.chunk(num_parts), strict=True)):
            is_last = part == num_parts - 1
            seed = stream(recipe.seed, "mixing", epoch, self.step, self.process.rank, part)
            with nullcontext() if is_last else self._without_sync(forward):
                part_loss = self._loss(forward, some_images, some_labels, seed) * (len(some_images) / len(images))
                part_loss.backward()
            loss += part_loss.detach()
        # A finite loss can have gradients that are not, and the weights are then lost with this step.
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), recipe.clip_grad_norm or math.inf)
        is_good = torch.isfinite(loss) & torch.isfinite(norm)
        self.first_bad_step = torch.where((self.first_bad_step < 0) & ~is_good, self.step, self.first_bad_step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.network)
        self.loss_sum += loss
        self.step += 1
        self.num_trained += self.batches.images_per_step

    def _loss(self, forward: Callable[..., Any], images: Tensor, labels: Tensor, seed: int) -> Tensor:
        mixer: Mixer | None = self.mixer
        with self._autocast():
            if mixer is None:
                logits = forward(images)
                return nn.functional.cross_entropy(logits.float(), labels, label_smoothing=self.recipe.label_smoothing)
            mixed = mixer.mix(images, seed)
            if mixer.needs_class_row:
                logits, class_row = forward(mixed.images, with_class_row=True)
            else:
                logits, class_row = forward(mixed.images), None
        return mixer.loss(logits.float(), labels, mixed, class_row, self.recipe.label_smoothing)

    def _end_epoch(self, epoch: int) -> None:
        if self.process.world_size > 1:
            torch.distributed.all_reduce(self.loss_sum)
            self.loss_sum /= self.process.world_size
            self._share_damage()
        self.train_loss = (self.loss_sum / self.batches.num_steps).item()
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if self.process.rank:
            return
        network = self.network if self.average is None else self.average.module
        logits = predict(network, self.dataset, self.dataset.val, device=self.process.device, num_loader_workers=self.num_loader_workers)
        labels = self.dataset.labels[self.dataset.val]
        shown = {
            "train_loss": self.train_loss,
            "val_top1_pct": top1_pct(logits, labels),
            "val_nll": mean_nll(logits, labels),
            "lr": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["lr_scale"],
            "images_per_s": self.images_per_s,
            "data_wait_pct": self.data_wait_pct,
        }
        for name, value in shown.items():
            self.report(name, value, epoch + 1)

    def _share_damage(self) -> None:
        """Each process has met damaged files of its own share of a streamed set."""
        if self.dataset.images is None:
            met: list[Any] = [None] * self.process.world_size
            torch.distributed.all_gather_object(met, self.dataset.skipped)
            for names in met:
                self.dataset.record_damage(names)

    def _check_finite(self) -> None:
        bad_step = int(self.first_bad_step.item())
        if bad_step < 0:
            return
        epoch = bad_step // self.batches.num_steps
        where = f"step {bad_step} (epoch {epoch + 1} of {self.recipe.epochs})"
        good = f"the last good checkpoint is {self.last_checkpoint}" if self.last_checkpoint else "there is no checkpoint yet"
        raise EvaluationError("non_finite", f"the loss or its gradient is not finite at {where}; {good}")

    def _save(self) -> None:
        self._check_finite()
        if self.process.rank:
            return
        state = {
            "step": self.step,
            "train_loss": self.train_loss,
            "loss_sum": self.loss_sum.cpu(),
            "skipped": list(self.dataset.skipped),
            "network": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.module.state_dict(),
        }
        self.last_checkpoint = save_checkpoint(self.folder, self.step, state)

    def _make_average(self) -> Any:
        if not self.recipe.ema_decay:
            return None
        from timm.utils.model_ema import ModelEmaV3

        return ModelEmaV3(self.network, decay=self.recipe.ema_decay)

    def _make_forward(self) -> Callable[..., Any]:
        network: Any = self.network
        if self.process.world_size > 1:
            from torch.nn.parallel import DistributedDataParallel

            network = DistributedDataParallel(network)
        return torch.compile(network) if self.recipe.compile else network

    def _without_sync(self, forward: Callable[..., Any]) -> AbstractContextManager[Any]:
        """Gradients of all processes are averaged once per step, with its last part."""
        return forward.no_sync() if hasattr(forward, "no_sync") else nullcontext()  # type: ignore[attr-defined]

    def _autocast(self) -> AbstractContextManager[Any]:
        device = torch.device(self.process.device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=precision(self.recipe, device) == "bf16")


def precision(recipe: Recipe, device: str) -> str:
    """`fp32` or `bf16`: what the recipe's forward passes are computed in on this device."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


@contextmanager
def _own_random_state(device: str) -> Iterator[None]:
    """Seeding within leaves the caller's global streams as they were."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.startswith("cuda") else []):
        yield
