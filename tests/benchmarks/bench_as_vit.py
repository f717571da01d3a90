"""What As-ViT's scores cost here and in the published way, on the seed topology at C = 32, 224 px, one thread.

    python tests/benchmarks/bench_as_vit.py [--img-size 224] [--outputs 3]

The published way is timed on the same weights with explicit softmax, and extrapolated: one forward pass, and
`--outputs` backward passes of the 256 (length distortion, derivatives to the angles alone) or 16 (NTK) it takes.
CPU seconds are of this process. Memory is the peak resident size of a fresh process, its imports apart.
"""

import argparse
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace

import torch
from machine import machine, memory_mb
from torch import Tensor

import space.components.attention
from space.families.as_vit import Network, spec
from space.vit import build
from workers.data import load_images
from workers.evaluator import Context
from workers.evaluators.as_vit import (
    AsVitSettings,
    as_vit,
    condition_number,
    draw_angles,
    draw_circle,
    draw_weights,
    features,
    ntk_gram,
    remove_norms,
    speeds,
)

SEED_TOPOLOGY = "8,2,3|4,1,2|4,1,4|4,1,6|32"
SETTINGS = AsVitSettings()
ANGLE_BATCHES = (6, 4)
"""The published mini-batches of the ten angles."""


def network(img_size: int, width: int = 32):
    model = build(spec(Network.parse(f"{SEED_TOPOLOGY},{width}"), img_size=img_size, num_classes=1000)).eval()
    draw_weights(model, 0, 0)
    return model


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


@contextmanager
def explicit_softmax() -> Iterator[None]:
    """Attention as the product, softmax and product it is written as."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1) @ v

    module = space.components.attention
    functional, module.F = module.F, SimpleNamespace(scaled_dot_product_attention=attention)
    try:
        yield
    finally:
        module.F = functional


def forward_mode_s(img_size: int) -> float:
    model, circle = network(img_size), draw_circle(0, 0, img_size)
    remove_norms(model)
    return cpu_s(lambda: speeds(model, circle, draw_angles(SETTINGS)))


def reverse_mode_s(img_size: int, num_outputs: int) -> float:
    model, circle = network(img_size).requires_grad_(False), draw_circle(0, 0, img_size)
    remove_norms(model)
    total = 0.0
    for some in draw_angles(SETTINGS).float().split(list(ANGLE_BATCHES)):
        angles = some.clone().requires_grad_()
        cos, sin = (part[:, None, None, None] for part in (angles.cos(), angles.sin()))
        with explicit_softmax():
            started = time.process_time()
            output = features(model, circle.u * cos + circle.v * sin)
            total += time.process_time() - started
        total += extrapolated_s(output.unbind(1), angles, num_outputs)
    return total


def extrapolated_s(outputs: Sequence[Tensor], inputs: Tensor | list[Tensor], num_passes: int) -> float:
    """Seconds of a backward pass for each of them, from the first `num_passes`."""
    started = time.process_time()
    for output in outputs[:num_passes]:
        torch.autograd.grad(output.sum(), inputs, retain_graph=True, allow_unused=True)
    return (time.process_time() - started) / num_passes * len(outputs)


def single_image_ntk_s(img_size: int, images: Tensor) -> float:
    model = network(img_size)
    return cpu_s(lambda: condition_number(ntk_gram(model, images)))


def full_batch_ntk_s(img_size: int, images: Tensor, num_passes: int) -> float:
    model = network(img_size)
    weights = [parameter for name, parameter in model.named_parameters() if "weight" in name]
    with explicit_softmax():
        started = time.process_time()
        rows = features(model, images).sum(dim=1).unbind(0)
        forward_s = time.process_time() - started
    return forward_s + extrapolated_s(rows, weights, num_passes)


def peak_mb(img_size: int, what: str) -> tuple[float, float]:
    """Peak resident memory in MiB of a fresh process after its imports, and of the work above that."""
    command = [sys.executable, __file__, "--img-size", str(img_size), "--peak-of", what]
    imports, peak = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-2:]
    return float(imports), float(peak) - float(imports)


def print_peak(img_size: int, what: str) -> None:
    import timm.layers  # noqa: F401 - an import that would otherwise happen while the network is built

    imports = memory_mb("VmRSS")
    torch.set_num_threads(1)
    if what == "length_distortion":
        model, circle = network(img_size), draw_circle(0, 0, img_size)
        remove_norms(model)
        speeds(model, circle, draw_angles(SETTINGS))
    elif what == "ntk":
        ntk_gram(network(img_size), torch.randn(16, 3, img_size, img_size))
    else:
        as_vit(spec(Network.parse(f"{SEED_TOPOLOGY},32"), img_size=img_size, num_classes=1000), Context(seed=0), SETTINGS)
    print(imports, memory_mb("VmHWM"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--outputs", type=int, default=3, help="backward passes to extrapolate from")
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    img_size = arguments.img_size
    if arguments.peak_of:
        return print_peak(img_size, arguments.peak_of)

    torch.set_num_threads(1)
    print(machine())
    print(f"seed topology {SEED_TOPOLOGY}, C = 32, {img_size} px, one network, CPU seconds\n")

    forward_mode_s(64)  # the first call pays for kernels being set up
    ours, theirs = forward_mode_s(img_size), reverse_mode_s(img_size, arguments.outputs)
    print(f"length distortion  forward mode {ours:8.2f}    per-output reverse mode {theirs:8.1f} (from {arguments.outputs} of 256 outputs)"
          f"    ratio {theirs / ours:6.1f}")  # fmt: skip
    images = load_images("digits", img_size=img_size, num_images=16, seed=0).images
    ours, theirs = single_image_ntk_s(img_size, images), full_batch_ntk_s(img_size, images, arguments.outputs)
    print(f"NTK, 16 images     one by one   {ours:8.2f}    full-batch pass per image {theirs:6.1f} (from {arguments.outputs} of 16 images)"
          f"     ratio {theirs / ours:6.1f}")  # fmt: skip

    print("\npeak resident memory, MiB")
    for what in ("length_distortion", "ntk", "as_vit"):
        imports, above = peak_mb(img_size, what)
        print(f"{what:18} {above:8.0f} above {imports:.0f} of imports")

    load_images("digits", img_size=32, num_images=1, seed=0)  # the first call pays for imports
    print("\none evaluation as_vit (5 networks, both scores), CPU seconds")
    for size in sorted({64, 128, img_size}):
        model = spec(Network.parse(f"{SEED_TOPOLOGY},32"), img_size=size, num_classes=1000)
        print(f"{size:4} px {cpu_s(lambda model=model: as_vit(model, Context(seed=0), SETTINGS)):8.2f}")


if __name__ == "__main__":
    main()
