"""Training speed against a loop made of timm's own parts: the same network, images, batch, augmentation and optimizer.

    python tests/benchmarks/bench_training.py [--images 256] [--batch-size 64] [--repeats 7] [--device cuda]

timm's side is what its training script is made of: `create_loader` with its transforms and prefetcher, `Mixup`,
`SoftTargetCrossEntropy`, `create_optimizer_v2`, its cosine schedule and gradient clipping. Its images lie decoded in memory too, and
it is given the number of loader processes that suits it best. Epochs of both are taken in turns in this one process; validation
and the start of the loaders are outside the clock on both sides.

The limit we are against is the step of the network itself, forward and backward: the last lines say which share of the time it takes.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from machine import machine
from PIL import Image

from space.catalog import resolve
from space.model import Model, build_model
from space.recipe import Recipe
from workers.batches import TrainingBatches
from workers.data import IMAGENET_MEAN, IMAGENET_STD, DataSet
from workers.distributed import Process
from workers.learner import make_optimizer
from workers.training import precision, train

MODEL = "vit_cifar"
LOADER_PROCESSES = [number for number in (0, 1, 2, 4, 8, 16) if number <= max(2, len(os.sched_getaffinity(0)))]


def random_images(num_images: int, img_size: int) -> DataSet:
    """Noise of ten classes, decoded: what is in the pixels does not change the speed."""
    generator = np.random.default_rng(0)
    few = np.arange(num_images, num_images + 10)
    return DataSet(
        source="noise",
        img_size=img_size,
        classes=tuple("0123456789"),
        labels=generator.integers(0, 10, num_images + 10),
        train=np.arange(num_images),
        val=few,
        test=few,
        images=generator.integers(0, 256, (num_images + 10, 3, img_size, img_size), dtype=np.uint8),
        digest="noise",
    )


class PilImages(torch.utils.data.Dataset):
    """The training images as timm's loader expects them."""

    def __init__(self, dataset: DataSet):
        assert dataset.images is not None
        self.images = [Image.fromarray(image) for image in dataset.images[dataset.train].transpose(0, 2, 3, 1)]
        self.labels = dataset.labels.tolist()
        self.transform: Any = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Any:
        return self.transform(self.images[index]), self.labels[index]


class TimmLoop:
    """One epoch after the other with timm's parts."""

    def __init__(self, model: Model, recipe: Recipe, dataset: DataSet, device: str, num_workers: int):
        from timm.data import Mixup
        from timm.data.loader import create_loader
        from timm.loss import SoftTargetCrossEntropy

        self.recipe, self.device = recipe, torch.device(device)
        self.loader = create_loader(
            PilImages(dataset),
            input_size=(3, model.img_size, model.img_size),
            batch_size=recipe.batch_size,
            is_training=True,
            train_crop_mode="rkrc",
            hflip=0.5,
            color_jitter=0.0,
            mean=IMAGENET_MEAN,
            std=IMAGENET_STD,
            num_workers=num_workers,
            device=self.device,
            persistent_workers=num_workers > 0,
        )
        self.mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=recipe.label_smoothing, num_classes=model.num_classes)
        self.loss = SoftTargetCrossEntropy()
        self.network = build_model(model, seed=0).to(self.device).train()
        # timm's optimizer with its own defaults: no fused kernels.
        self.optimizer = make_timm_optimizer(self.network, recipe)

    def images_per_s(self) -> float:
        batches = iter(self.loader)
        num_images, started = 0, time.perf_counter()
        is_bf16 = precision(self.recipe, self.device.type) == "bf16"
        for images, labels in batches:
            images, targets = self.mixup(images, labels)
            with torch.autocast(self.device.type, dtype=torch.bfloat16) if is_bf16 else nullcontext():
                loss = self.loss(self.network(images), targets)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), self.recipe.clip_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad()
            num_images += len(images)
        synchronize(self.device)
        return num_images / (time.perf_counter() - started)


def make_timm_optimizer(network: torch.nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    from timm.optim import create_optimizer_v2

    return create_optimizer_v2(network, opt=recipe.optimizer, lr=recipe.optimizer_lr, weight_decay=recipe.optimizer_weight_decay)


def ours(model: Model, recipe: Recipe, dataset: DataSet, device: str) -> tuple[float, float]:
    """Images a second of one epoch, and the share of its time spent waiting for data, in percent."""
    with TemporaryDirectory() as folder:
        training = train(model, recipe, dataset, workdir=Path(folder), process=Process(device=device))
    return training.images_per_s, training.data_wait_pct


def step_alone(model: Model, recipe: Recipe, dataset: DataSet, device: str) -> float:
    """Images a second of forward, backward and optimizer step on one batch that is there already."""
    network = build_model(model, seed=0).to(device).train()
    optimizer = make_optimizer(network, recipe)
    batch = next(iter(TrainingBatches(dataset, recipe, device=device).epoch(0)))
    num_steps = len(dataset.train) // recipe.batch_size
    is_bf16 = precision(recipe, device) == "bf16"
    started = time.perf_counter()
    for _ in range(num_steps):
        with torch.autocast(device, dtype=torch.bfloat16) if is_bf16 else nullcontext():
            loss = torch.nn.functional.cross_entropy(network(batch.images), batch.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    synchronize(torch.device(device))
    return num_steps * recipe.batch_size / (time.perf_counter() - started)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = resolve(MODEL)
    recipe = Recipe(epochs=1, warmup_epochs=0, batch_size=args.batch_size, mixing="mixup_cutmix")
    dataset = random_images(args.images, model.img_size)
    print(machine())
    print(f"{MODEL}, {args.images} images of {model.img_size} px, batch {args.batch_size}, {args.device}, {recipe.mixing}")

    loops = {number: TimmLoop(model, recipe, dataset, args.device, number) for number in LOADER_PROCESSES}
    suited = max(loops, key=lambda number: (loops[number].images_per_s(), loops[number].images_per_s())[1])
    ours(model, recipe, dataset, args.device)
    rounds = []
    for _ in range(args.repeats):
        mine, wait_pct = ours(model, recipe, dataset, args.device)
        rounds.append((mine, wait_pct, loops[suited].images_per_s(), step_alone(model, recipe, dataset, args.device)))
    for mine, wait_pct, timms, alone in rounds:
        print(f"ours {mine:8.1f}   timm {timms:8.1f} ({suited} loader processes)   step alone {alone:8.1f} images/s", end="")
        print(f"   ours waits for data {wait_pct:.2f} %, other than the step {100 * (1 - mine / alone):.1f} % of the time")
    print(f"images/s ratio to timm: {statistics.median(mine / timms for mine, _, timms, _ in rounds):.2f}")


if __name__ == "__main__":
    main()
