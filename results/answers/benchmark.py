"""Which network for these images, this device and these budgets?

Parameters of the question: `data`; `how` networks came to know the images; `cost`, the metric that the front is over; `budgets`, an object
of upper bounds by metric for each winner that is asked for; `seeds`; `networks`, `{name: {"digest", "epochs", "command"}}` in the order
of the list; and `left_out`, `[[name, reason]]`.

The front and the winners are those of the mean validation accuracy. Test images had no part in the choice: there the winner is
compared with every other finalist within its budget, paired by seed and image.
"""

from __future__ import annotations

import json
import math
import shlex
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from results.answers import Answer
from results.columns import TEXT_WIDTH, Column, fitted
from results.effects.convergence import MAX_LOSS_FALL, loss_fall
from results.effects.statistics import resample
from results.effects.study import read_run_predictions
from results.figures import benchmark as figure
from results.formats import TIMING_MARKS, count, format_value, timing_marks
from results.mlflow_store import mlflow_client
from results.pareto import pareto_front, to_minimize

if TYPE_CHECKING:
    import pandas as pd

    from results.effects.predictions import Predictions
    from results.study_results import StudyResults

PROFILE, ROUNDS, FINALISTS = "profile", "rounds", "finalists"
CONFIDENCE = 0.95
COSTS = ("latency_ms", "latency_to_anchor", "params_m", "gmacs")
"""Shown of every network beside the cost that the front is over."""

UNCONVERGED = "^"

Bounds = Mapping[str, float]


@dataclass(frozen=True)
class Mean:
    """A mean with its 95 % interval; the ends are nan where nothing can be said of them."""

    value: float
    low: float = math.nan
    high: float = math.nan

    def __str__(self) -> str:
        ends = f" [{self.low:.1f}, {self.high:.1f}]" if math.isfinite(self.low) else ""
        return f"{self.value:.1f}{ends}"

    def to_json(self) -> dict[str, float | None]:
        return {name: number if math.isfinite(number := getattr(self, name)) else None for name in ("value", "low", "high")}


@dataclass(frozen=True, kw_only=True)
class Finalist:
    """A network that was measured to the end; accuracies in percent, with intervals over seeds and images."""

    name: str
    digest: str
    costs: Mapping[str, float]
    val: Mean
    test: Mean
    seeds: tuple[int, ...]
    correct: Mapping[int, np.ndarray] = field(repr=False)
    """By seed, whether each test image (N,) was recognised, 0 or 100; empty where the predictions cannot be read."""
    loss_fall: float
    marks: str
    """What is to be doubted in its time (`results.formats.timing_marks`)."""
    is_front: bool = False

    @property
    def is_converged(self) -> bool:
        return not self.loss_fall > MAX_LOSS_FALL


@dataclass(frozen=True, kw_only=True)
class Stopped:
    """A network that did not reach the end, and its validation accuracy at the last epoch that it was measured at."""

    name: str
    costs: Mapping[str, float]
    epochs: int
    val_top1_pct: float


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Test accuracy of another network minus the winner's, in points, with its simultaneous interval."""

    name: str
    value: float
    low: float
    high: float

    @property
    def is_told_apart(self) -> bool:
        return self.low > 0 or self.high < 0

    def __str__(self) -> str:
        return f"{self.name} ({self.value:+.1f} [{self.low:+.1f}, {self.high:+.1f}])"


@dataclass(frozen=True, kw_only=True)
class Winner:
    """The finalist with the best validation accuracy within a budget, and how the others within it compare."""

    budget: Bounds
    finalist: Finalist
    others: tuple[Difference, ...]


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Everything that the answer says."""

    cost: str
    finalists: tuple[Finalist, ...]
    stopped: tuple[Stopped, ...]
    winners: tuple[Winner, ...]
    without_winner: tuple[Bounds, ...]
    unmeasured: Mapping[str, str]
    """Networks that were not trained, with the reason."""
    epochs_trained: int
    epochs_whole: int

    @property
    def epochs_saved_pct(self) -> float:
        return 100 * (1 - self.epochs_trained / self.epochs_whole)


def answer(results: StudyResults, parameters: Mapping[str, Any]) -> Answer:
    """The front, the winners and what they are told apart from; raises ValueError before a network was measured to its end."""
    compared = compare(results, parameters)
    num = len(parameters["networks"])
    return Answer(
        title=f"Which of {count(num, 'network')} for {parameters['data']}, {compared.cost} against accuracy",
        text=_text(compared, parameters),
        table=_table(compared, parameters),
        summary=_summary(compared, parameters),
        figure=figure.page_figure(compared),
        legend=figure.LEGEND,
        draw=partial(figure.write_png, compared),
    )


def compare(results: StudyResults, parameters: Mapping[str, Any]) -> Comparison:
    """The comparison that the measurements so far give; raises ValueError if no network was measured to its end."""
    networks, cost, seeds = parameters["networks"], parameters["cost"], parameters["seeds"]
    rows = {phase: [row for row in _with_params(results, phase) if row["network"] in networks] for phase in (PROFILE, ROUNDS, FINALISTS)}
    profiles = {row["network"]: row for row in rows[PROFILE]}
    whole: dict[str, dict[int, dict[str, Any]]] = {}
    reached: dict[str, dict[str, Any]] = {}
    for row in [*rows[ROUNDS], *rows[FINALISTS]]:
        name = row["network"]
        epochs = int(row.get("epochs_trained", networks[name]["epochs"]))
        if name in profiles and epochs == networks[name]["epochs"]:
            if row["seed"] in seeds:
                whole.setdefault(name, {})[row["seed"]] = row
        elif name in profiles and epochs > reached.get(name, {}).get("epochs", 0):
            reached[name] = {"epochs": epochs, "val_top1_pct": row["val_top1_pct"]}
    if not whole:
        raise ValueError("no network has been measured to the end of its training yet")
    finalists = front_of(_finalists(whole, profiles, networks, results), cost)
    stopped = tuple(
        Stopped(name=name, costs=profiles[name], epochs=reached[name]["epochs"], val_top1_pct=reached[name]["val_top1_pct"])
        for name in networks
        if name in reached and name not in whole
    )
    winners = [(budget, winner_within(budget, finalists, cost)) for budget in parameters["budgets"]]
    trained = sum(networks[name]["epochs"] * len(found) for name, found in whole.items()) + sum(one.epochs for one in stopped)
    entered = [name for name in networks if name in whole or name in reached]
    return Comparison(
        cost=cost,
        finalists=tuple(sorted(finalists, key=lambda one: -one.val.value)),
        stopped=stopped,
        winners=tuple(winner for _, winner in winners if winner),
        without_winner=tuple(budget for budget, winner in winners if not winner),
        unmeasured={name: _why_not(profiles.get(name), parameters["budgets"]) for name in networks if name not in entered},
        epochs_trained=trained,
        epochs_whole=len(seeds) * sum(networks[name]["epochs"] for name in entered),
    )


def _why_not(profile: Mapping[str, Any] | None, budgets: Sequence[Bounds]) -> str:
    """Why a network was not trained."""
    if profile is None:
        return "its speed could not be measured"
    return "its training failed" if any(_is_within(budget, profile) for budget in budgets) else "outside every budget"


def _is_within(budget: Bounds, costs: Mapping[str, Any]) -> bool:
    return all(costs[metric] <= bound for metric, bound in budget.items())


def _with_params(results: StudyResults, phase: str) -> list[dict[str, Any]]:
    """The rows of a phase, the trial's own parameters among their values; its seed is that of the measurement."""
    if phase not in results.phases:
        return []
    return [{**json.loads(row["params"]), **row} for row in results.phase(phase).to_dict("records")]


def _finalists(
    whole: Mapping[str, Mapping[int, Mapping[str, Any]]],
    profiles: Mapping[str, Mapping[str, Any]],
    networks: Mapping[str, Mapping[str, Any]],
    results: StudyResults,
) -> list[Finalist]:
    client = mlflow_client(results.provenance.tracking_uri)
    predictions = {
        (name, seed): read_run_predictions(client, client.get_run(str(row["run_id"])))
        for name in networks
        for seed, row in sorted(whole.get(name, {}).items())
    }
    readable = {key: found for key, found in predictions.items() if not isinstance(found, str)}
    val, test = (_correct({key: images(found) for key, found in readable.items()}) for images in (_val_images, _test_images))
    return [
        Finalist(
            name=name,
            digest=networks[name]["digest"],
            costs=profiles[name],
            val=_mean([row["val_top1_pct"] for row in by_seed.values()], val.get(name, {})),
            test=_mean([row["test_top1_pct"] for row in by_seed.values()], test.get(name, {})),
            seeds=tuple(sorted(by_seed)),
            correct=test.get(name, {}),
            loss_fall=_loss_fall([found for (of, _), found in readable.items() if of == name]),
            marks=timing_marks(profiles[name]),
        )
        for name, by_seed in whole.items()
    ]


Images = tuple[np.ndarray, np.ndarray]
"""Ids and, of each image, whether it was recognised, 0 or 100: (N,)."""


def _test_images(found: Predictions) -> Images | None:
    return found.ids, found.outcomes["top1_pct"]


def _val_images(found: Predictions) -> Images | None:
    return None if found.val is None else (found.val[0], 100.0 * found.val[1])


def _correct(measured: Mapping[tuple[str, int], Images | None]) -> dict[str, dict[int, np.ndarray]]:
    """Which images were recognised, by network and seed, all in one order; trials on other images than the first are left out."""
    found: dict[str, dict[int, np.ndarray]] = {}
    first: np.ndarray | None = None
    for (name, seed), images in measured.items():
        if images is None:
            continue
        order = np.argsort(images[0], kind="stable")
        ids = images[0][order]
        first = ids if first is None else first
        if np.array_equal(ids, first):
            found.setdefault(name, {})[seed] = images[1][order]
    return found


def _mean(accuracies: Sequence[float], correct: Mapping[int, np.ndarray]) -> Mean:
    """The mean accuracy over seeds in percent, with its interval over seeds and images where all predictions are known."""
    mean = float(np.mean(accuracies))
    if len(correct) < len(accuracies):
        return Mean(mean)
    (bootstrap,) = resample([np.stack(list(correct.values()))], seed=0)
    interval = bootstrap.interval(CONFIDENCE)
    # No accuracy is outside these.
    return Mean(mean, max(interval.low, 0.0), min(interval.high, 100.0))


def _loss_fall(measured: Sequence[Predictions]) -> float:
    """The mean over seeds; nan where no loss was kept."""
    falls = [loss_fall(found.train_loss) for found in measured if found.train_loss is not None]
    return float(np.mean(falls)) if falls else math.nan


def front_of(finalists: Sequence[Finalist], cost: str) -> list[Finalist]:
    """The finalists, each with its place on or behind the front of validation accuracy over cost."""
    plane = np.array([[one.costs[cost], one.val.value] for one in finalists])
    is_front = pareto_front(to_minimize(plane, ["minimize", "maximize"]))
    return [replace(one, is_front=bool(on_it)) for one, on_it in zip(finalists, is_front, strict=True)]


def winner_within(budget: Bounds, finalists: Sequence[Finalist], cost: str) -> Winner | None:
    """The winner within a budget, of equals the cheaper one; None if no finalist is within it."""
    within = [one for one in finalists if _is_within(budget, one.costs)]
    if not within:
        return None
    best = min(within, key=lambda one: (-one.val.value, one.costs[cost]))
    others = [one for one in within if one is not best and one.correct.keys() & best.correct.keys()]
    return Winner(budget=budget, finalist=best, others=tuple(differences(best, others)))


def differences(best: Finalist, others: Sequence[Finalist]) -> list[Difference]:
    """The others' accuracy on test images minus the best one's, under the seeds that both have, with Bonferroni's correction."""
    paired = []
    for one in others:
        seeds = sorted(one.correct.keys() & best.correct.keys())
        paired.append(np.stack([one.correct[seed] - best.correct[seed] for seed in seeds]))
    confidence = 1 - (1 - CONFIDENCE) / max(len(others), 1)
    found = [bootstrap.interval(confidence) for bootstrap in resample(paired, seed=0)]
    # No difference of two accuracies is outside these.
    return [
        Difference(name=one.name, value=each.estimate, low=max(each.low, -100.0), high=min(each.high, 100.0))
        for one, each in zip(others, found, strict=True)
    ]


def _text(compared: Comparison, parameters: Mapping[str, Any]) -> str:
    shown = _shown_costs(compared.cost)
    columns = [
        Column("network", [_marked(one) for one in compared.finalists], is_text=True, at_most=26),
        *(Column(name, [_cost_text(one, name) for one in compared.finalists]) for name in shown[:1]),
        Column("validation %", [str(one.val) for one in compared.finalists]),
        Column("test %", [str(one.test) for one in compared.finalists]),
        *(Column(name, [_cost_text(one, name) for one in compared.finalists]) for name in shown[1:]),
    ]
    lines, left_out = fitted(columns, TEXT_WIDTH)
    notes = [
        f"* on the front of validation accuracy over {compared.cost}. Means of {_seeds_text(compared)} with 95 % intervals over seeds and "
        "images." + (f" Left out for {TEXT_WIDTH} columns: {', '.join(left_out)}." if left_out else ""),
        *_doubts(compared),
        *_stopped_in_words(compared, parameters),
        *(f"Not trained: {name} ({reason})." for name, reason in compared.unmeasured.items()),
        *(f"Left out: {name} ({reason})." for name, reason in parameters["left_out"]),
    ]
    verdict = [_winner_in_words(winner) for winner in compared.winners]
    if any(winner.others for winner in compared.winners):
        verdict.append(
            "Differences are in points on test images, paired by seed and image, with 95 % intervals that hold together within a budget."
        )
    verdict += [f"No finalist is within {_budget_text(budget)}." for budget in compared.without_winner]
    command = shell_lines(parameters["networks"][compared.winners[0].finalist.name]["command"]) if compared.winners else []
    first = f"under seed {parameters['seeds'][0]}"
    again = [f"This measures the winner again {first}; every network has its command in answer.csv and --json:"] if command else []
    paragraphs = [textwrap.fill(note, TEXT_WIDTH, break_on_hyphens=False) for note in [*notes, *again]]
    return "\n".join(
        [*lines, "", *paragraphs, *command, "", *(textwrap.fill(line, TEXT_WIDTH, break_on_hyphens=False) for line in verdict)]
    )


def _shown_costs(cost: str) -> list[str]:
    return list(dict.fromkeys([cost, *COSTS]))


def _marked(one: Finalist) -> str:
    return f"{one.name}{'*' if one.is_front else ''}{'' if one.is_converged else UNCONVERGED}"


def _cost_text(one: Finalist, name: str) -> str:
    return f"{format_value(one.costs[name], 3)}{one.marks if name.startswith('latency') else ''}"


def _seeds_text(compared: Comparison) -> str:
    numbers = sorted({len(one.seeds) for one in compared.finalists})
    return count(numbers[0], "seed") if len(numbers) == 1 else f"{numbers[0]} to {numbers[-1]} seeds"


def _doubts(compared: Comparison) -> list[str]:
    doubts = []
    if unconverged := [one for one in compared.finalists if not one.is_converged]:
        falls = [f"{one.name} ({_fall_text(one.loss_fall)})" for one in unconverged]
        doubts.append(f"{UNCONVERGED} had not converged, so that more epochs may change its place: {', '.join(falls)}.")
    if any(one.marks for one in compared.finalists):
        doubts.append(f"{TIMING_MARKS}.")
    return doubts


def _fall_text(fall: float) -> str:
    return f"its loss still fell by {fall:.2f} nats" if math.isfinite(fall) else "too few epochs to tell"


def _stopped_in_words(compared: Comparison, parameters: Mapping[str, Any]) -> list[str]:
    if parameters["how"] == "probe":
        return []
    went_out = [f"{one.name} after epoch {one.epochs} with {one.val_top1_pct:.1f} %" for one in compared.stopped]
    saved = (
        f"{compared.epochs_trained:,} of the {compared.epochs_whole:,} epochs were trained that all networks would take under all seeds: "
        f"{compared.epochs_saved_pct:.0f} % saved."
    )
    return [*([f"Did not reach the end: {', '.join(went_out)}."] if went_out else []), saved]


def _winner_in_words(winner: Winner) -> str:
    best = winner.finalist
    same, apart = ([one for one in winner.others if one.is_told_apart == wanted] for wanted in (False, True))
    words = [f"{_budget_text(winner.budget, capital=True)}: {best.name}, {best.val} % on validation and {best.test} % on test images."]
    if same:
        words.append(f"On test images it cannot be told from {_listed(same)}.")
    if apart:
        words.append(f"It is told from {_listed(apart)}.")
    if not winner.others:
        words.append("No other finalist is within that budget.")
    return " ".join(words)


def _listed(differences: Sequence[Difference]) -> str:
    return ", ".join(map(str, sorted(differences, key=lambda one: -one.value)))


def _budget_text(budget: Bounds, *, capital: bool = False) -> str:
    bounds = " and ".join(f"{metric} <= {bound:g}" for metric, bound in budget.items())
    text = f"with {bounds}" if bounds else "without a bound"
    return text[0].upper() + text[1:] if capital else text


def shell_lines(command: str, width: int = TEXT_WIDTH) -> list[str]:
    """The command in lines that a shell reads as one: broken before flags, and within an unquoted value that is too long after commas."""
    flags: list[str] = []
    for word in map(shlex.quote, shlex.split(command)):
        if flags and not word.startswith("--"):
            flags[-1] += f" {word}"
        else:
            flags.append(word)
    lines, indent = [flags[0]], "    "
    for part in flags[1:]:
        if len(lines[-1]) + len(part) + 3 <= width:
            lines[-1] += f" {part}"
            continue
        lines[-1] += " \\"
        lines.append(indent)
        may_break = "'" not in part
        while may_break and len(lines[-1]) + len(part) + 2 > width and (place := part.rfind(",", 0, width - len(lines[-1]) - 1)) > 0:
            lines[-1] += part[: place + 1] + "\\"
            part = part[place + 1 :]
            lines.append("")
        lines[-1] += part
    return lines


def _summary(compared: Comparison, parameters: Mapping[str, Any]) -> dict[str, Any]:
    networks = {
        one.name: {
            "digest": one.digest,
            **{name: one.costs[name] for name in _shown_costs(compared.cost)},
            "val_top1_pct": one.val.to_json(),
            "test_top1_pct": one.test.to_json(),
            "seeds": list(one.seeds),
            "is_front": one.is_front,
            "is_converged": one.is_converged,
            "command": parameters["networks"][one.name]["command"],
        }
        for one in compared.finalists
    }
    winners = [
        {
            "max": dict(winner.budget),
            "winner": winner.finalist.name,
            "not_told_apart": [one.name for one in winner.others if not one.is_told_apart],
            "told_apart": [one.name for one in winner.others if one.is_told_apart],
        }
        for winner in compared.winners
    ]
    return {
        "cost": compared.cost,
        "front": [one.name for one in compared.finalists if one.is_front],
        "budgets": [*winners, *({"max": dict(budget), "winner": None} for budget in compared.without_winner)],
        "finalists": networks,
        "stopped": {one.name: {"epochs": one.epochs, "val_top1_pct": one.val_top1_pct} for one in compared.stopped},
        "not_trained": dict(compared.unmeasured),
        "left_out": dict(parameters["left_out"]),
        "epochs_saved_pct": compared.epochs_saved_pct,
    }


def _table(compared: Comparison, parameters: Mapping[str, Any]) -> pd.DataFrame:
    import pandas as pd

    rows: list[dict[str, Any]] = []
    for one in compared.finalists:
        row: dict[str, Any] = {"network": one.name, "digest": one.digest, **{name: one.costs[name] for name in _shown_costs(compared.cost)}}
        for name, mean in (("val_top1_pct", one.val), ("test_top1_pct", one.test)):
            row |= {name: mean.value, f"{name}_low": mean.low, f"{name}_high": mean.high}
        row |= {"seeds": len(one.seeds), "epochs": parameters["networks"][one.name]["epochs"], "is_front": one.is_front}
        row |= {"loss_fall": one.loss_fall, "is_converged": one.is_converged}
        row["wins"] = "; ".join(_budget_text(winner.budget) for winner in compared.winners if winner.finalist is one)
        rows.append(row | {"command": parameters["networks"][one.name]["command"]})
    for out in compared.stopped:
        shown = {name: out.costs[name] for name in _shown_costs(compared.cost)}
        digest, command = (parameters["networks"][out.name][key] for key in ("digest", "command"))
        rows.append(
            {"network": out.name, "digest": digest, **shown, "val_top1_pct": out.val_top1_pct, "epochs": out.epochs, "command": command}
        )
    return pd.DataFrame(rows)
