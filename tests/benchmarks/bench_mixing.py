"""What mixing a batch costs beside a training step of DeiT-Ti and beside timm's Mixup, on the CPU and on a CUDA device if there is one.

    python tests/benchmarks/bench_mixing.py [--batch-size 32] [--img-size 224] [--runs 30]

Times are medians, device synchronised at both ends; `pipelined` is the mean of calls queued one after the other, which is what a
training loop that never waits for its device sees. `loss` is what the mixed loss takes beyond cross entropy, forward only.
`copies` is all that a call allocates, freed or not, in sizes of the batch; `peak` what CUDA's allocator held at most.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from machine import machine
from timm.data import Mixup
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from space.catalog import resolve
from space.recipe import Recipe
from space.vit import build
from workers.mixing import make_mixer
from workers.mixings import mixings

METHODS = mixings.names()
NUM_CLASSES = 1000
PATCH_SIZE = 16


class AllocatedBytes(TorchDispatchMode):
    """Adds up the storages that operations make on the device of the batch."""

    def __init__(self, device: torch.device):
        super().__init__()
        self._device = device
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        result = func(*args, **(kwargs or {}))
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor) and leaf.device == self._device]
        self.num_bytes += sum({storage.data_ptr(): storage.nbytes() for storage in made if storage.data_ptr() not in given}.values())
        return result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def median_ms(work: Callable[[int], object], device: torch.device, num_runs: int) -> float:
    """The median time of `work(run)`, after a tenth as many runs for warm-up."""
    times = []
    for run in range(-max(1, num_runs // 10), num_runs):
        synchronize(device)
        begun = time.perf_counter()
        work(run + num_runs)
        synchronize(device)
        times.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(times[-num_runs:])


def pipelined_ms(work: Callable[[int], object], device: torch.device, num_runs: int) -> float:
    synchronize(device)
    begun = time.perf_counter()
    for run in range(num_runs):
        work(run)
    synchronize(device)
    return (time.perf_counter() - begun) * 1e3 / num_runs


def copies(work: Callable[[int], object], images: Tensor, num_runs: int) -> tuple[float, float]:
    """The most that one of the calls allocates in all, and (CUDA) holds at once, in sizes of the batch."""
    most, peak = 0, 0
    for run in range(num_runs):
        if images.is_cuda:
            torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() if images.is_cuda else 0
        with AllocatedBytes(images.device) as allocated:
            work(run)
        most = max(most, allocated.num_bytes)
        peak = max(peak, torch.cuda.max_memory_allocated() - before if images.is_cuda else 0)
    return most / images.nbytes, peak / images.nbytes


def measure(device: torch.device, batch_size: int, img_size: int, num_runs: int) -> None:
    torch.manual_seed(0)
    images = torch.rand(batch_size, 3, img_size, img_size, device=device)
    labels = torch.randint(NUM_CLASSES, (batch_size,), device=device)
    logits = torch.randn(batch_size, NUM_CLASSES, device=device)
    class_row = torch.rand(batch_size, (img_size // PATCH_SIZE) ** 2, device=device)
    model = build(replace(resolve("deit_tiny"), img_size=img_size, num_classes=NUM_CLASSES)).to(device).train()

    def step(_: int) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            output = model(images)
        F.cross_entropy(output.float(), labels).backward()
        model.zero_grad()

    step_ms = median_ms(step, device, num_runs if device.type == "cuda" else 3)
    plain_loss_ms = median_ms(lambda _: F.cross_entropy(logits, labels), device, num_runs)
    timm_mixup = Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=NUM_CLASSES)
    written = images.clone()
    timm_ms = median_ms(lambda _: timm_mixup(written, labels), device, num_runs)
    precision = "bf16" if device.type == "cuda" else "fp32"
    print(f"{device.type}, batch {batch_size} of {img_size} px: DeiT-Ti forward and backward {step_ms:.2f} ms in {precision}")
    print(f"  {'':13} {'mix ms':>8} {'pipelined':>9} {'of step':>8} {'of timm':>8} {'loss ms':>8} {'of step':>8} {'copies':>7} {'peak':>6}")
    print(f"  {'timm.Mixup':13} {timm_ms:8.3f} {'':>9} {timm_ms / step_ms:8.2%} {1:8.2f}")
    for method in METHODS:
        mixer = make_mixer(Recipe(epochs=1, mixing=method, batch_size=batch_size), img_size=img_size, patch_size=PATCH_SIZE)
        assert mixer is not None

        def mix(seed: int, mixer=mixer) -> object:
            return mixer.mix(images, seed)

        mixed = mixer.mix(images, 0)
        mix_ms = median_ms(mix, device, num_runs)
        loss_ms = median_ms(lambda _, mixer=mixer, mixed=mixed: mixer.loss(logits, labels, mixed, class_row, 0.1), device, num_runs)
        most, peak = copies(mix, images, 10)
        print(
            f"  {method:13} {mix_ms:8.3f} {pipelined_ms(mix, device, num_runs):9.3f} {mix_ms / step_ms:8.2%} {mix_ms / timm_ms:8.2f}"
            f" {loss_ms - plain_loss_ms:8.3f} {(loss_ms - plain_loss_ms) / step_ms:8.2%} {most:7.2f} {f'{peak:.2f}' if peak else '-':>6}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--runs", type=int, default=30)
    args = parser.parse_args()
    print(machine())
    for name in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        measure(torch.device(name, 0) if name == "cuda" else torch.device(name), args.batch_size, args.img_size, args.runs)


if __name__ == "__main__":
    main()
