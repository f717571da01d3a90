"""One training from start to end: a pure function of model, recipe, data and objective, however often it was interrupted.

Every random draw comes from a stream named by (seed, epoch, step) or (seed, epoch, index), so the position in the training is the
whole state of its randomness. A checkpoint holds weights, optimizer, moving average, the objective's own state and that position: a
resumed training is bit-identical to an uninterrupted one (on the CPU, with the same number of threads).
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
from torch import nn

from space.model import Model, depth_of, require_arch, supports_class_row, token_size
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError
from space.spec import digest_of
from space.weights import Weights
from workers.augmentation import make_image_transform
from workers.batches import Batch, TrainingBatches
from workers.checkpoints import latest_checkpoint, link_checkpoints, save_checkpoint
from workers.data import DataSet
from workers.distributed import ALONE, Process
from workers.evaluator import PROGRESS, EvaluationError, Report, report_nothing
from workers.learner import Learner
from workers.mixing import make_mixer
from workers.objectives import Classification, Objective, Position, Setup

FINITE_CHECK_STEPS = 50
"""Reading the loss waits for the device, so it is read once in this many steps; the device remembers a step that was not finite."""

PROGRESS_EVERY_S = 1.0

CHECKPOINTS = "checkpoints-"
"""Prefix of the folder in a work directory that holds the checkpoints of a training; the identity of the training follows it."""


@dataclass(frozen=True, kw_only=True)
class Training:
    """A training at its end or stop: the network to use (the moving average, if the recipe keeps one) and what its course showed."""

    network: nn.Module
    is_finished: bool
    """Whether all epochs of the recipe were trained; if not, the last checkpoint is there to go on from."""
    losses: tuple[float, ...]
    """The mean loss of each epoch, mixing and smoothing included; nan for epochs before a checkpoint that does not hold them."""
    images_per_s: float
    data_wait_pct: float
    """Share of the training time spent waiting for data; both rates leave validation out and count from the last start."""
    checkpoints: Path
    """The folder of this training's checkpoints; once it is finished and the network is stored, they are of no more use."""


def train(
    model: Model,
    recipe: Recipe,
    dataset: DataSet,
    *,
    workdir: Path,
    weights: Weights | None = None,
    objective: Objective | None = None,
    stop_after: int | None = None,
    continue_from: Path | None = None,
    process: Process = ALONE,
    report: Report = report_nothing,
    warn: Callable[[str], None] = lambda message: None,
    num_loader_workers: int = 0,
    checkpoint_every_s: float = 60.0,
) -> Training:
    """Train the network of `model` on the training part of `dataset`, going on from the last checkpoint in `workdir`.

    The network starts from `weights`, or from fresh ones. The `objective` says what is minimised and validated; None is plain
    classification. The training stops after `stop_after` epochs (None: all of the recipe) with a checkpoint, and its schedule is that
    of all epochs. `continue_from` is the work directory of an earlier, stopped trial of the same training, whose files stay as they
    are: this one goes on from its last checkpoint if that is newer than those in `workdir`. If there is none to go on from, it warns
    and trains from the beginning; the result is the same.

    Reports `train_loss`, what the objective validates (`val_top1_pct` and `val_nll` of classification), `lr`, `lr_x_weight_decay`,
    `images_per_s` and `data_wait_pct` after each epoch, and its progress, which is 1 at the stop. Raises SpecError where model, recipe,
    data, objective and stop do not fit one another, and EvaluationError `non_finite` naming the step and the last good checkpoint.
    """
    check_recipe(model, recipe, num_processes=process.world_size)
    check_stop(recipe, stop_after)
    if model.num_classes != dataset.num_classes:
        raise SpecError(f"the network has {model.num_classes} classes, data {dataset.source!r} has {dataset.num_classes}")
    run = _Run(
        model,
        recipe,
        dataset,
        workdir,
        weights,
        objective or Classification(),
        stop_after,
        process,
        report,
        num_loader_workers,
        checkpoint_every_s,
    )
    with _own_random_state(process.device):
        run.start(continue_from, warn)
        run.to_the_end()
    return run.result()


def check_stop(recipe: Recipe, stop_after: int | None) -> None:
    """Raise SpecError unless the training has an epoch to stop after; None is the last one."""
    if stop_after is not None and not 1 <= stop_after <= recipe.epochs:
        raise SpecError(f"stop_after is {stop_after}; the recipe has {recipe.epochs} epochs, so allowed are 1 to {recipe.epochs}")


def training_identity(
    model: Model, recipe: Recipe, dataset: DataSet, objective: Objective | None = None, *parts: Any, weights: Weights | None = None
) -> str:
    """16 hex digits that tell a training from all others, whatever its stop; `parts` are JSON of the caller's own."""
    identity: list[Any] = [model.digest, recipe.to_json(), dataset.digest, *parts]
    if recipe.ema_decay:
        # Until November 2026 the average had no warm-up: a checkpoint of that time is of another training.
        identity.append({"ema_warmup": True})
    if recipe.mixing == "mixpro" and recipe.label_smoothing and not recipe.mixing_reference:
        # Until November 2026 MixPro's labels were not smoothed.
        identity.append({"mixpro_smoothed": True})
    if objective is not None and type(objective) is not Classification:
        identity.append({"objective": [type(objective).__name__, objective.identity]})
    if weights is not None:
        identity.append({"weights": weights.identity})
    return digest_of(identity)


def check_recipe(model: Model, recipe: Recipe, *, num_processes: int = 1) -> None:
    """Raise SpecError unless the network can be trained in this way by so many processes; needs no data."""
    if model.in_chans != 3:
        raise SpecError(f"the network has in_chans {model.in_chans}; images have 3 channels")
    if recipe.freeze and recipe.freeze > (depth := depth_of(model)):
        raise SpecError(f"recipe: freeze is {recipe.freeze}; the network has {depth} blocks")
    make_image_transform(recipe, model.img_size)
    mixer = make_mixer(recipe, img_size=model.img_size, patch_size=token_size(model), num_processes=num_processes)
    if mixer is not None and mixer.needs_class_row and (reason := supports_class_row(model)):
        raise SpecError(f"mixing {recipe.mixing!r} reads the class token's attention: {reason}")
    if mixer is not None and mixer.has_token_labels:
        require_arch(model, f"mixing {recipe.mixing!r}, which labels tokens,")


class _Run:
    """A training in progress. `step` counts the optimizer steps taken."""

    def __init__(
        self,
        model: Model,
        recipe: Recipe,
        dataset: DataSet,
        workdir: Path,
        weights: Weights | None,
        objective: Objective,
        stop_after: int | None,
        process: Process,
        report: Report,
        num_loader_workers: int,
        checkpoint_every_s: float,
    ):
        self.recipe, self.dataset, self.objective, self.process = recipe, dataset, objective, process
        self.report = report if process.rank == 0 else report_nothing
        self.workdir, self.identity = workdir, training_identity(model, recipe, dataset, objective, process.world_size, weights=weights)
        self.checkpoint_every_s = checkpoint_every_s
        self.setup = Setup(
            model=model,
            recipe=recipe,
            dataset=dataset,
            process=process,
            mixer=make_mixer(recipe, img_size=model.img_size, patch_size=token_size(model), num_processes=process.world_size),
            weights=weights,
            autocast=self._autocast,
            num_loader_workers=num_loader_workers,
        )
        self.batches = TrainingBatches(
            dataset, recipe, device=process.device, rank=process.rank, world_size=process.world_size, num_workers=num_loader_workers
        )
        self.num_steps = recipe.epochs * self.batches.num_steps
        self.last_step = self.num_steps if stop_after is None else stop_after * self.batches.num_steps
        self.step = 0
        self.loss_sum = torch.zeros((), dtype=torch.float64, device=process.device)
        """The sum over the steps of this epoch so far."""
        self.losses: list[float] = []
        self.first_bad_step = torch.full((), -1, dtype=torch.int64, device=process.device)
        self.last_checkpoint: Path | None = None
        self.saved_step = -1
        self.trained_s, self.num_trained = 0.0, 0

    @property
    def folder(self) -> Path:
        return self.workdir / f"{CHECKPOINTS}{self.identity}"

    def start(self, continue_from: Path | None, warn: Callable[[str], None]) -> None:
        """Make the module that learns: as it stood at the last checkpoint, if there is one of this training, else anew."""
        found = self._find_checkpoint(continue_from, warn)
        state: dict[str, Any] = {}
        if found is not None:
            self.last_checkpoint, state = found
            self.dataset.record_damage(tuple(state["skipped"]))
            self.objective.load_state_dict(state.get("objective", {}))
        torch.manual_seed(stream(self.recipe.seed, "start"))
        module = self.objective.start(self.setup).to(self.process.device)
        self.learner = Learner(module, self.recipe, self.batches.num_steps)
        if state:
            self.learner.load_state_dict(state)
            self.step = state["step"]
            self.losses = _losses_of(state, num_epochs=self.step // self.batches.num_steps)
            self.loss_sum = state["loss_sum"].to(self.loss_sum.device)
            self.saved_step = self.step
        self._prepare_forward()

    def _find_checkpoint(self, continue_from: Path | None, warn: Callable[[str], None]) -> tuple[Path, dict[str, Any]] | None:
        found = None
        if self.process.rank == 0:
            if continue_from is not None:
                link_checkpoints(continue_from / self.folder.name, self.folder)
            found = latest_checkpoint(self.folder, warn, up_to=self.last_step)
            if found is None and continue_from is not None:
                warn(f"there is no intact checkpoint of this training in {continue_from}: it is trained from the beginning")
        if self.process.world_size > 1:
            # The first process alone tidies the folder, so the others are told what it found.
            shared = [found]
            torch.distributed.broadcast_object_list(shared)
            found = shared[0]
        return found

    def to_the_end(self) -> None:
        saved_at = shown_at = time.monotonic()
        while self.step < self.last_step:
            epoch, first_step = divmod(self.step, self.batches.num_steps)
            began = time.monotonic()
            if first_step == 0:
                self._begin_epoch(epoch)
            for batch in self.batches.epoch(epoch, first_step):
                self._take_step(epoch, batch)
                now = time.monotonic()
                if self.step % FINITE_CHECK_STEPS == 0:
                    self._check_finite()
                if now - shown_at >= PROGRESS_EVERY_S:
                    shown_at = now
                    self.report(PROGRESS, self.step / self.last_step, self.step)
                # The processes' losses come together at the end of an epoch: until then no one of them could save the sum.
                is_inside = self.step % self.batches.num_steps and self.process.world_size == 1
                if now - saved_at >= self.checkpoint_every_s and is_inside:
                    self._save()
                    saved_at = time.monotonic()
            self._check_finite()
            self.trained_s += time.monotonic() - began
            self._end_epoch(epoch)
            if time.monotonic() - saved_at >= self.checkpoint_every_s and self.step < self.last_step:
                self._save()
                saved_at = time.monotonic()
        if self.step < self.num_steps and self.saved_step != self.step:
            self._save()
        self.report(PROGRESS, 1.0, self.step)

    def result(self) -> Training:
        return Training(
            network=self.objective.network(self.learner.averaged).eval(),
            is_finished=self.step == self.num_steps,
            losses=tuple(self.losses),
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

    def _begin_epoch(self, epoch: int) -> None:
        if self.averages_gradients:
            self._share_module()
        torch.manual_seed(stream(self.recipe.seed, "before_epoch", epoch))
        before, trained = self.learner, _trained(self.learner.module)
        self.learner = self.objective.before_epoch(epoch, before)
        if self.learner is not before or _trained(self.learner.module) != trained:
            self._prepare_forward()

    def _take_step(self, epoch: int, batch: Batch) -> None:
        recipe, process, num_parts = self.recipe, self.process, self.recipe.num_accumulation
        # Drop path and dropout draw from torch's global stream.
        torch.manual_seed(stream(recipe.seed, "step", epoch, self.step, process.rank))
        self.learner.set_rate(self.step)
        loss = torch.zeros((), device=batch.images.device)
        for part, (images, labels) in enumerate(zip(batch.images.chunk(num_parts), batch.labels.chunk(num_parts), strict=True)):
            position = Position(
                seed=recipe.seed,
                epoch=epoch,
                step=self.step,
                part=part,
                num_parts=num_parts,
                rank=process.rank,
                world_size=process.world_size,
            )
            with nullcontext() if part == num_parts - 1 else self._without_sync():
                part_loss = self.objective.loss(self._forward, Batch(images, labels), position) * (len(images) / len(batch.images))
                part_loss.backward()
            loss += part_loss.detach()
        if self.averages_gradients:
            _average_gradients(self.learner.module, process.world_size)
        # A finite loss can have gradients that are not, and the weights are then lost with this step.
        norm = nn.utils.clip_grad_norm_(self.learner.module.parameters(), recipe.clip_grad_norm or math.inf)
        is_good = torch.isfinite(loss) & torch.isfinite(norm)
        self.first_bad_step = torch.where((self.first_bad_step < 0) & ~is_good, self.step, self.first_bad_step)
        self.step += 1
        self.learner.update(self.step)
        self.loss_sum += loss
        self.num_trained += self.batches.images_per_step

    def _end_epoch(self, epoch: int) -> None:
        if self.process.world_size > 1:
            torch.distributed.all_reduce(self.loss_sum)
            self.loss_sum /= self.process.world_size
            self._share_damage()
        self.losses.append((self.loss_sum / self.batches.num_steps).item())
        self.loss_sum = torch.zeros_like(self.loss_sum)
        if self.process.rank:
            return
        shown = {
            "train_loss": self.losses[-1],
            **self.objective.validate(self.learner.averaged),
            "lr": self.learner.lr,
            "lr_x_weight_decay": self.learner.lr_x_weight_decay,
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
            "losses": self.losses,
            "loss_sum": self.loss_sum.cpu(),
            "skipped": list(self.dataset.skipped),
            "objective": self.objective.state_dict(),
            **self.learner.state_dict(),
        }
        self.last_checkpoint = save_checkpoint(self.folder, self.step, state)
        self.saved_step = self.step

    @property
    def averages_gradients(self) -> bool:
        """Whether this loop averages gradients over the processes, and not DistributedDataParallel, which overlaps it with the
        backward pass but takes one forward pass per step that reaches every parameter."""
        return self.process.world_size > 1 and not self.objective.touches_all

    def _prepare_forward(self) -> None:
        """Prepare the call of the module; again after the module was exchanged or other parameters of it train."""
        self._parallel: Any = self.learner.module
        if self.averages_gradients:
            self._share_module()
        elif self.process.world_size > 1:
            from torch.nn.parallel import DistributedDataParallel

            self._parallel = DistributedDataParallel(self.learner.module)
        call: Any = torch.compile(self._parallel) if self.recipe.compile else self._parallel

        def forward(*args: Any, **kwargs: Any) -> Any:
            with self._autocast():
                return call(*args, **kwargs)

        self._forward = forward

    def _share_module(self) -> None:
        """Give all processes the first one's module: its buffers, such as statistics of batches, differ from process to process."""
        for tensor in self.learner.module.state_dict().values():
            torch.distributed.broadcast(tensor, src=0)

    def _without_sync(self) -> AbstractContextManager[Any]:
        """Gradients of all processes are averaged once per step, with its last part."""
        return self._parallel.no_sync() if hasattr(self._parallel, "no_sync") else nullcontext()

    def _autocast(self) -> AbstractContextManager[Any]:
        device = torch.device(self.process.device).type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=precision(self.recipe, device) == "bf16")


def _losses_of(checkpoint: dict[str, Any], num_epochs: int) -> list[float]:
    """The mean loss of each epoch before the checkpoint."""
    if "losses" in checkpoint:
        return checkpoint["losses"]
    # Until November 2026 a checkpoint held the loss of the last epoch alone.
    return [*[math.nan] * (num_epochs - 1), checkpoint["train_loss"]] if num_epochs else []


def precision(recipe: Recipe, device: str) -> str:
    """`fp32` or `bf16`: what the recipe's forward passes are computed in on this device."""
    if recipe.precision != "auto":
        return recipe.precision
    return "bf16" if device.startswith("cuda") and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"


@torch.no_grad()
def _average_gradients(module: nn.Module, num_processes: int) -> None:
    """Replace each gradient by its mean over the processes, in which a process that has none counts as zero.

    Where no process has one it stays None. The number of processes that have one is read on the host, which waits for the device.
    """
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    if not parameters:
        return
    num_touched = torch.tensor([float(parameter.grad is not None) for parameter in parameters], device=parameters[0].device)
    torch.distributed.all_reduce(num_touched)
    touched = [parameter for parameter, number in zip(parameters, num_touched.tolist(), strict=True) if number]
    for parameter in touched:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    if not touched:
        return
    gradients = [parameter.grad for parameter in touched if parameter.grad is not None]
    flat = torch.cat([gradient.flatten() for gradient in gradients])
    torch.distributed.all_reduce(flat)
    flat /= num_processes
    for gradient, mean in zip(gradients, flat.split([gradient.numel() for gradient in gradients]), strict=True):
        gradient.copy_(mean.view_as(gradient))


def _trained(module: nn.Module) -> list[bool]:
    return [parameter.requires_grad for parameter in module.parameters()]


@contextmanager
def _own_random_state(device: str) -> Iterator[None]:
    """Restore the states of the caller's global generators at the end."""
    with torch.random.fork_rng(devices=[torch.cuda.current_device()] if device.startswith("cuda") else []):
        yield
