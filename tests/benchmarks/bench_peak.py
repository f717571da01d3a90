"""How much of the device's bf16 peak DeiT-B reaches, beside what a plain matrix product reaches on the same device.

    python tests/benchmarks/bench_peak.py [--device cpu] [--model deit_base]

The network runs compiled in bf16 at its best batch size, as the evaluator `throughput` finds it. A multiply-add is two operations.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from machine import machine

from space import catalog
from space.cost import cost
from workers.evaluate import device_name
from workers.evaluator import Context
from workers.evaluators.throughput import ThroughputSettings, throughput
from workers.timing import Runnable, latency_ms, percentiles, warm_up

PEAK_TFLOPS = {"H200": 989.4, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "A100": 312.0, "L40S": 362.0, "L4": 121.0, "B200": 2250.0}
"""Dense bf16 with fp32 sums, by a part of the device's name: NVIDIA's data sheets, without sparsity."""
SIZES = {"cuda": 8192, "cpu": 1024}
NUM_RUNS = 50


def matmul_tflops(device: str) -> float:
    """The rate of a square product of bf16 matrices, at the median of its runs."""
    size = SIZES[device]
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    product = Runnable(torch.nn.Identity(), a, lambda: a @ b)
    warm_up(lambda: latency_ms(product), least=10)
    return 2 * size**3 / percentiles([latency_ms(product) for _ in range(NUM_RUNS)])(50) / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SIZES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--model", default="deit_base")
    arguments = parser.parse_args()
    print(machine())
    model, device = catalog.resolve(arguments.model), arguments.device
    product = matmul_tflops(device)
    with tempfile.TemporaryDirectory() as folder:
        context = Context(seed=0, device=device, workdir=Path(folder))
        measured = throughput(model, context, ThroughputSettings(precision="bf16", execution="compile"))
    network = 2 * cost(model).macs * measured["best_throughput_img_s"] / 1e12
    peak = next((tflops for part, tflops in PEAK_TFLOPS.items() if part in device_name(device)), None)
    rows = [(f"matrix product of {SIZES[device]}", product), (f"{arguments.model} at batch {measured['best_batch_size']:.0f}", network)]
    for title, tflops in rows:
        of_peak = f"{tflops / peak:10.0%} of the data sheet's peak" if peak else ""
        print(f"{title:32} {tflops:10.3g} TFLOP/s {tflops / product:10.0%} of the product{of_peak}")
    print(f"{measured['best_throughput_img_s']:.0f} images/s; bf16{'' if peak else '; no peak is known for this device'}")


if __name__ == "__main__":
    main()
