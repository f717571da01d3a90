"""How long laws take to fit, and how often their intervals hold the parameters that the points were made with.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_scaling_laws.py [--sets 100] [--resamples 200]

The law of two variables is the published one of 245 networks, with their number of points; its errors of log loss are normal (sd .01) or
Laplace's, which a Huber loss fits best. The law of one variable is made at five patch sizes with three seeds. Coverage is of nominal 95 %
intervals, in percent of the sets: that of 100 sets has a standard error of 2.

GOAL: 245 points of two variables with 4,000 resamples in under two minutes.
"""

import argparse
import platform
import time
from collections.abc import Callable, Mapping

import numpy as np
import scipy

from results.scaling_laws.fitting import fit_laws
from results.scaling_laws.law import Interval, Law
from results.scaling_laws.one_variable import SATURATING_POWER, fit_one_variable
from results.scaling_laws.points import Points
from results.scaling_laws.two_variables import fit_two_variables

TWO = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}
"""Chinchilla Scaling: A replication attempt, https://arxiv.org/abs/2404.10102."""

ONE = {"a": 0.008, "alpha": 1.3, "b": 0.8}
NUM_PUBLISHED = 245


def of_two(n: int, seed: int, errors: str) -> Points:
    generator = np.random.default_rng(seed)
    N, D = np.exp(generator.uniform(np.log([5e7, 5e8]), np.log([1.6e10, 5e11]), (n, 2))).T
    E, A, alpha, B, beta = TWO.values()
    off = generator.normal(0, 0.01, n) if errors == "normal" else generator.laplace(0, 0.01 / np.sqrt(2), n)
    return Points(x=np.stack([N, D], axis=1), y=(E + A / N**alpha + B / D**beta) * np.exp(off), x_names=("N", "D"), y_name="loss")


def of_one(num_seeds: int, seed: int) -> Points:
    x = np.repeat([16.0, 8.0, 4.0, 2.0, 1.0], num_seeds)
    y = ONE["a"] * x ** ONE["alpha"] + ONE["b"] + np.random.default_rng(seed).normal(0, 0.005, len(x))
    return Points(x=x[:, None], y=y, x_names=("patch",), y_name="loss")


def coverage(title: str, planted: Mapping[str, float], num_sets: int, fit: Callable[[int], Law]) -> None:
    inside = {kind: dict.fromkeys(planted, 0) for kind in ("profile", "bootstrap")}
    for seed in range(num_sets):
        law = fit(seed)
        for name, value in planted.items():
            for kind, counts in inside.items():
                counts[name] += holds(getattr(law.parameters[name], kind), value)
    for kind, counts in inside.items():
        print(f"{title:34} {kind:9} " + "  ".join(f"{name} {100 * number / num_sets:.0f}" for name, number in counts.items()), flush=True)


def holds(interval: Interval, value: float) -> bool:
    return (interval.low is None or interval.low <= value) and (interval.high is None or value <= interval.high)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sets", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    options = parser.parse_args()
    versions = f"Python {platform.python_version()}, numpy {np.__version__}, scipy {scipy.__version__}"
    print(f"{platform.processor() or platform.machine()}, {versions}")
    for title, points in (
        (f"{NUM_PUBLISHED} points of two variables", of_two(NUM_PUBLISHED, 0, "normal")),
        ("15 points of one", of_one(3, 0)),
    ):
        began, cpu = time.perf_counter(), time.process_time()
        fit_laws(points, num_resamples=4000)
        print(f"{title}, 4000 resamples: {time.process_time() - cpu:.1f} CPU-s, {time.perf_counter() - began:.1f} s", flush=True)
    print(f"coverage in percent over {options.sets} sets")
    for num_seeds in (1, 3):
        coverage(
            f"5 patch sizes, {num_seeds} seeds",
            ONE,
            options.sets,
            lambda seed, num_seeds=num_seeds: fit_one_variable(
                of_one(num_seeds, seed), SATURATING_POWER, noise_sd=None, num_resamples=options.resamples, seed=seed
            ),
        )
    for n in (40, NUM_PUBLISHED):
        for errors in ("normal", "laplace"):
            coverage(
                f"{n} points of (N, D), {errors} errors",
                TWO,
                options.sets,
                lambda seed, n=n, errors=errors: fit_two_variables(of_two(n, seed, errors), num_resamples=options.resamples, seed=seed),
            )


if __name__ == "__main__":
    main()
