"""What a proposal of `evolution` costs over a whole published search, and whether it keeps to its budget, on one core.

    python tests/benchmarks/bench_evolution.py [--space vit_resnas/tiny] [--gmacs 1.7944] [--trials 3350]

Trials are asked and told in memory; an accuracy is made up, from the number of blocks and the last width, so that there is something to
climb. Times are CPU time of `ask` and of the space's questions.
"""

import argparse
import statistics
import time

import optuna
from machine import machine

from results.records import Metric
from search.budget import Budget
from search.strategies.evolution import evolution
from search.strategy import Problem
from space import catalog
from space.subnet_spec import SubnetSpec


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--space", default="vit_resnas/tiny")
    parser.add_argument("--gmacs", type=float, default=1.7944, help="the budget C; proposals are within [0.975 C, C]")
    parser.add_argument("--trials", type=int, default=3350)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print(machine())
    space = catalog.supernet_space(args.space).search_space()
    budget = Budget(at_most={"gmacs": args.gmacs}, at_least={"gmacs": 0.975 * args.gmacs})
    problem = Problem(space=space, goals=(Metric("accuracy", "maximize"),), budget=budget, seed=0, num_trials=args.trials)
    study = optuna.create_study(direction="maximize", sampler=evolution(problem))
    asked_ms, digests, num_outside = [], set(), 0
    for _ in range(args.trials):
        begun = time.process_time()
        trial = study.ask()
        point = space.suggest(trial)
        asked_ms.append(1e3 * (time.process_time() - begun))
        candidate = space.decode(point)
        assert isinstance(candidate.model, SubnetSpec)
        digests.add(candidate.model.digest)
        num_outside += not budget.holds(candidate)
        study.tell(trial, candidate.model.arch.depth + candidate.model.arch.stages[-1].embed_dim / 256)
    tenth = args.trials // 10
    first, last = statistics.fmean(asked_ms[:tenth]), statistics.fmean(asked_ms[-tenth:])
    print(f"{args.trials} proposals: {len(digests)} different networks, {num_outside} outside the budget")
    print(f"ms a proposal: {first:.1f} in the first tenth, {last:.1f} in the last")


if __name__ == "__main__":
    main()
