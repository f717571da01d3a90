"""CPU milliseconds per proposal of every strategy, without a budget and within a window [0.975 C, C] of MACs, C the median network's.

    python tests/benchmarks/bench_budget.py [--trials 100]

Optuna's storage is in memory and scores are random, so what is measured is the sampler: drawing, decoding, counting, climbing.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time

import optuna
from machine import machine

from results.records import Metric
from search.budget import UNLIMITED, Budget, random_point
from search.strategy import Problem, strategies
from space.families.as_vit import topology_space
from space.families.autoformer import autoformer_space
from space.search_space import SearchSpace

GOALS = (Metric("gain", "maximize"), Metric("price", "minimize"))
NUM_DRAWN = 2000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=100)
    num_trials = parser.parse_args().trials
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(machine())
    print(f"{'space':16} {'strategy':22} {'budget':7} {'within':>8} {'distinct':>8} {'median ms':>9} {'worst ms':>8}")
    for space in (topology_space(img_size=224, proxy_img_size=224, num_classes=1000), autoformer_space(num_classes=1000)):
        generator = random.Random(0)
        drawn = [random_point(space, generator) for _ in range(NUM_DRAWN)]
        budget = window(space, drawn)
        share = sum(budget.distance(space, point) == 0 for point in drawn) / NUM_DRAWN
        print(f"{space.name:16} {'drawn uniformly':22} {'':7} {share:8.1%}")
        for name in strategies.names():
            for told in (UNLIMITED, budget):
                print(f"{space.name:16} {name:22} {'none' if told.is_empty else 'window':7} {row(space, name, told, budget, num_trials)}")


def window(space: SearchSpace, drawn: list) -> Budget:
    any_macs = Budget(at_least={"gmacs": 0.0})
    median = statistics.median(any_macs.values(space.decode(point))["gmacs"] for point in drawn)
    return Budget(at_most={"gmacs": median}, at_least={"gmacs": 0.975 * median})


def row(space: SearchSpace, name: str, told: Budget, window: Budget, num_trials: int) -> str:
    """How many proposals of a strategy that is told one budget are within the window, and what they cost."""
    sampler = strategies.get(name)(Problem(space=space, goals=GOALS, budget=told, seed=0))
    study = optuna.create_study(directions=[goal.goal for goal in GOALS], sampler=sampler)
    took_ms, num_within, distinct = [], 0, set()
    for _ in range(num_trials):
        started = time.process_time()
        trial = study.ask()
        point = space.suggest(trial)
        took_ms.append(1000 * (time.process_time() - started))
        num_within += window.distance(space, point) == 0
        distinct.add(space.decode(point).model.digest)
        scores = random.Random(repr(point))
        study.tell(trial, (scores.random(), scores.random()))
    return f"{num_within:4}/{num_trials} {len(distinct):8} {statistics.median(took_ms):9.1f} {max(took_ms):8.1f}"


if __name__ == "__main__":
    main()
