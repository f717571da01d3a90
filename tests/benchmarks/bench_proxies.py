"""What the training-free scores cost: those in closed form by themselves, the others beside one forward and backward pass of their batch.

    python tests/benchmarks/bench_proxies.py [--model deit_tiny] [--img-size 224] [--batch-size 64] [--rounds 3] [--specs 100000]

All on one thread. Scores in closed form are taken of distinct networks of the AutoFormer space, at points that are drawn beforehand. Their
limit in Python is to look every block up by its hash and to add the terms of a network up, which is printed beside them.

Every round times the pass and then each evaluator as a trial calls it, its network and its images included, so that all meet the same load
of the machine; a ratio is the median over rounds of the evaluator's time to that of the pass in its round. The pass is the mean
cross-entropy's, in parts of eight images at 224 px, as the scores take it. CPU seconds are of this process, and memory is the peak resident
size of a fresh process above its imports and the data set.

GOAL: cost, shape and nsc of 100,000 networks in 10 s, in 30 s with their construction; gradient_scores at most 2 passes; gradient_scores,
grasp, synflow and gradient_variance together at most 7.
"""

import argparse
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from bench_cost import RandomTrial
from machine import machine, memory_mb

from space.catalog import resolve, spaces
from space.model import Model, build_model
from workers.batches import Batch
from workers.data import load_dataset
from workers.evaluator import Context, EvaluationError, NoSettings, evaluators
from workers.proxies import gradients, in_chunks, labelled_batches

SCORES = ("gradient_scores", "grasp", "synflow", "gradient_variance", "dss", "az_nas", "meco", "w_pca", "head_confidence")
OF_GRADIENTS = SCORES[:4]
CLOSED_FORM = ("cost", "shape", "nsc")
NUM_CLASSES = 100
DATA = "digits"


def cpu_s(work: Callable[[], object]) -> float:
    started = time.process_time()
    work()
    return time.process_time() - started


def closed_form(num_specs: int) -> None:
    """Print what `CLOSED_FORM` takes of so many networks, with and without making them."""
    space, trial = spaces()["autoformer"](img_size=224, num_classes=NUM_CLASSES), RandomTrial(seed=0)
    points: dict[tuple, dict] = {}
    while len(points) < num_specs:
        params = space.suggest(trial)
        points[tuple(params.values())] = params
    models: list[Model] = []
    context, settings = Context(seed=0), NoSettings()
    made = cpu_s(lambda: models.extend(space.decode(params).model for params in points.values()))
    taken = {}
    for name in CLOSED_FORM:
        score = evaluators.get(name).function
        taken[name] = cpu_s(lambda score=score: [score(model, context, settings) for model in models])
    blocks = [model.stages[0].blocks for model in models]
    terms = [[1.5] * (4 * len(of_model)) for of_model in blocks]
    limit = cpu_s(lambda: [(list(map(hash, of_model)), math.fsum(some)) for of_model, some in zip(blocks, terms, strict=True)])
    scored = sum(taken.values())
    print(f"{num_specs:,} distinct networks of the AutoFormer space, CPU s: " + ", ".join(f"{n} {s:.2f}" for n, s in taken.items()))
    print(f"  prebuilt {scored:.2f} (at most 10), construction included {made + scored:.2f} (at most 30); look-ups and sums {limit:.2f}\n")


def one_pass(model: Model, batch: Batch) -> None:
    """One forward and backward pass of the batch, the gradients of all parameters summed."""
    network = build_model(model, seed=0)
    parameters = list(network.parameters())
    total = [torch.zeros_like(parameter) for parameter in parameters]
    for images, labels in in_chunks(network, *batch):
        loss = F.cross_entropy(network(images), labels, reduction="sum") / len(batch.images)
        for sum_so_far, gradient in zip(total, gradients(loss, parameters), strict=True):
            sum_so_far += gradient


def measure(name: str, model: Model, context: Context, batch_size: int) -> None:
    each = evaluators.get(name)
    settings = each.settings()
    each.function(model, context, replace(settings, batch_size=batch_size) if hasattr(settings, "batch_size") else settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="deit_tiny", help="a name or NOTATION that the command line takes")
    parser.add_argument("--img-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--specs", type=int, default=100_000)
    parser.add_argument("--peak-of", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    model = replace(resolve(args.model), img_size=args.img_size, num_classes=NUM_CLASSES)
    context = Context(seed=0, data=DATA, dataset=load_dataset(DATA, img_size=args.img_size))
    (batch,) = labelled_batches(model, context, batch_size=args.batch_size)
    if args.peak_of:
        evaluators.get(args.peak_of)
        before = memory_mb("VmRSS")
        measure(args.peak_of, model, context, args.batch_size)
        return print(before, memory_mb("VmHWM"))

    print(machine())
    closed_form(args.specs)
    print(f"{args.model}, {args.img_size} px, batch of {args.batch_size}, {args.rounds} rounds\n")
    scores = []
    for name in SCORES:
        try:
            measure(name, model, context, 2)  # the first call pays for imports
            scores.append(name)
        except EvaluationError as error:
            print(f"left out: {name} ({error})\n")
    ratios: dict[str, list[float]] = {name: [] for name in scores}
    passes = []
    for _ in range(args.rounds):
        passes.append(cpu_s(lambda: one_pass(model, batch)))
        for name in scores:
            ratios[name].append(cpu_s(lambda name=name: measure(name, model, context, args.batch_size)) / passes[-1])
    print(f"one forward and backward pass: {statistics.median(passes):.2f} CPU s\n")
    print(f"{'evaluator':18} {'passes':>7} {'least':>7} {'most':>7}   metrics")
    for name, of_score in ratios.items():
        metrics = ", ".join(metric.name for metric in evaluators.get(name).metrics)
        print(f"{name:18} {statistics.median(of_score):7.2f} {min(of_score):7.2f} {max(of_score):7.2f}   {metrics}")
    together = statistics.median(map(sum, zip(*(ratios[name] for name in OF_GRADIENTS), strict=True)))
    print(f"\n{' + '.join(OF_GRADIENTS)}: {together:.2f} passes (at most 7); {OF_GRADIENTS[0]} at most 2\n", flush=True)

    print("peak resident memory above the imports and the data, MiB")
    for name in scores:
        command = [sys.executable, __file__, "--peak-of", name, "--model", args.model]
        command += ["--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
        before, after = map(float, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
        print(f"{name:18} {after - before:7.0f}", flush=True)


if __name__ == "__main__":
    main()
