"""Driver time per trial of the loop, by ledger: an evaluator that costs nothing, a space of 12 parameters, default ledgers.

    python tests/benchmarks/bench_loop.py [--trials 3000]

The limit we are against is the ledgers' own price: Optuna's ask, suggest and tell on a journal file that is synced to disk,
and MLflow's run, metrics and status in sqlite, one transaction each.
"""

from __future__ import annotations

import argparse
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import optuna
from machine import machine

import search.measuring
from results.mlflow_store import MlflowTracker
from results.paths import RunPaths
from results.records import Metric
from search.lock import LockFile
from search.loop import PhaseLoop
from search.measuring import Measuring
from search.progress import Progress
from search.storage import open_storage
from search.study import Phase, make_sampler
from space.families.as_vit import topology_space
from space.spec import ArchSpec
from workers.evaluator import Call, Context, NoSettings, evaluator
from workers.pool import SerialPool

WINDOW = 50


@evaluator("nothing", metrics=(Metric("score", "maximize"),), is_free=True)
def nothing(model: ArchSpec, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """Measures nothing."""
    return {"score": 1.0}


class Stopwatch:
    """Seconds spent in each ledger, and when each trial was told."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.told_at = [time.perf_counter()]

    @contextmanager
    def _timing(self, ledger: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[ledger] += time.perf_counter() - started

    def wrap(self, owner: Any, name: str, ledger: str) -> None:
        function: Callable[..., Any] = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            with self._timing(ledger):
                result = function(*args, **kwargs)
            if name == "tell":
                self.told_at.append(time.perf_counter())
            return result

        setattr(owner, name, timed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trials", type=int, default=3000)
    num_trials = parser.parse_args().trials
    print(machine())
    with TemporaryDirectory() as folder:
        watch = run(Path(folder), num_trials)
    spent = sum(watch.seconds.values())
    total = watch.told_at[-1] - watch.told_at[0]
    print(f"{'ledger':28} {'ms per trial':>12}")
    for ledger, seconds in sorted(watch.seconds.items(), key=lambda item: -item[1]):
        print(f"{ledger:28} {1000 * seconds / num_trials:12.2f}")
    print(f"{'the loop itself':28} {1000 * (total - spent) / num_trials:12.2f}")
    early = per_trial_ms(watch, 100)
    for number in sorted({100, 1000, num_trials} & set(range(num_trials + 1))):
        at = per_trial_ms(watch, number)
        print(f"at {number:5} trials: {at:6.1f} ms per trial, {at / early:.2f} times that at 100")


def per_trial_ms(watch: Stopwatch, number: int) -> float:
    """Mean over the last `2 * WINDOW` trials up to `number` (centred where there are later ones)."""
    last = min(number + WINDOW, len(watch.told_at) - 1)
    first = last - 2 * WINDOW
    return 1000 * (watch.told_at[last] - watch.told_at[first]) / (last - first)


def run(folder: Path, num_trials: int) -> Stopwatch:
    paths = RunPaths(folder)
    phase = Phase(
        name="search",
        space=topology_space(img_size=224, proxy_img_size=224, num_classes=1000),
        evaluators=(Call("nothing"),),
        objectives=("score",),
        strategy="random",
        num_trials=num_trials,
    )
    storage = open_storage(paths.journal)
    study = optuna.create_study(study_name="bench/search", storage=storage, directions=["maximize"], sampler=make_sampler(phase, 0))
    tracker = MlflowTracker(paths.mlflow_uri, "bench", invocation={"command": "bench"}, objectives={"search": phase.goals})
    watch = Stopwatch()
    watch.wrap(study, "ask", "Optuna: ask")
    watch.wrap(optuna.Trial, "suggest_categorical", "Optuna: 12 suggestions")
    watch.wrap(optuna.Trial, "set_user_attr", "Optuna: result attribute")
    watch.wrap(study, "tell", "Optuna: tell")
    watch.wrap(tracker, "open", "MLflow: open the run")
    watch.wrap(tracker, "record", "MLflow: metrics and close")
    watch.wrap(search.measuring, "write_json_atomically", "outcome file")
    PhaseLoop(
        study_name="bench",
        phase=phase,
        study=study,
        storage=storage,
        measuring=Measuring(
            seed=0, data="digits", data_fingerprint="digits", workdir=lambda number: paths.workdir("bench", "search", number)
        ),
        pool=SerialPool(),
        tracker=tracker,
        progress=Progress(),
        hold=LockFile(paths.lock("bench"), "bench"),
    ).run()
    return watch


if __name__ == "__main__":
    main()
