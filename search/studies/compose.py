"""A search over axes that the command line names: components, their choices, the recipe, settings of evaluators.

    search/run.py compose --model vit_digits --axis pooling=mean,gem,ggem --axis recipe.lr=1e-4..1e-2:log \\
        --evaluators train,profile --objectives val_top1_pct,latency_ms --strategy nsga2 --trials 30

A component or an evaluator is usable here as soon as its file is there. How axes are written: `search/composition.py`.

Networks are trained by the recipe of the reference of the ablations, with the fields that `--recipe` or an axis says; `min_lr` keeps
its share of `lr`, and the warm-up its share of the epochs. Selection looks at the objectives alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from search.budget import Budget, random_point
from search.composition import RECIPE, MakeRecipe, composed_space, needed_choices
from search.fixed_points import grid
from search.strategy import strategies
from search.studies.ablations import AblationOptions, reference_candidate
from search.study import REPLACING, Options, Phase, RunSettings, SettingsError, Study, study
from search.training_rounds import EPOCHS_AXIS, REDUCTION, halving_plan, rungs_of, stopping
from space.model import resized
from space.recipe import Recipe, parse_recipe_fields
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from workers.evaluator import scores

if TYPE_CHECKING:
    from space.component import Scalar
    from workers.evaluator import Call

GRID, HALVING = "grid", "halving"
"""Proposers that `--strategy` takes here beside the registered strategies."""

DEFAULT_TRIALS = 30
MOST_POINTS = 10_000
"""Of a grid: more than anybody waits for."""
DRAWS = 100
"""Of random points for each that halving starts with, before the space is taken to hold no more."""

FOLLOWERS = {"min_lr": "lr", "warmup_epochs": "epochs"}
"""Fields of a recipe that keep their share of another, unless they are said."""

EXAMPLE = "e.g. --axis pooling=mean,gem --axis recipe.lr=1e-4..1e-2:log"


@dataclass(frozen=True, kw_only=True)
class ComposeOptions(Options):
    """What is varied around which candidate."""

    model: str = field(default="", metadata={"help": "as for describe; default: vit_digits for digits, else vit_cifar"})
    axis: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "TARGET=CHOICES",
            "help": "one axis, repeatable: pooling=mean,gem; feed_forward=mlp,hidden_dim=96,squeeze; feed_forward.ratio=2,4; depth=2..6; "
            "embed_dim=48,96; recipe.lr=1e-4..1e-2:log; profile.batch_size=1,8",
        },
    )
    recipe: str = field(
        default="",
        metadata={"metavar": "FIELD=VALUE,...", "help": "of every training; default: the recipe of the ablations' reference"},
    )


@study("compose", options=ComposeOptions)
def compose(run: RunSettings) -> Study:
    """Search over the axes that you name: components, their choices, recipe, settings of evaluators."""
    options: ComposeOptions = run.options
    if not options.axis:
        raise SettingsError(f"compose needs an axis, {EXAMPLE}")
    calls = run.calls(*(() if run.evaluators or _asks_for_scores_alone(run) else ("train",)))
    reference = reference_candidate(run, AblationOptions(model=options.model))
    model = resized(run.model(reference.label), img_size=run.img_size, num_classes=run.num_classes)
    space = composed_space(
        f"compose/{model.digest}",
        model,
        options.axis,
        calls=calls,
        recipe=_recipes(run, options.recipe, reference, calls),
        proxy_img_size=run.proxy_img_size,
    )
    try:
        space.decode(space.first_point())
    except SpecError as error:
        raise SpecError(
            f"the first choices of all axes make no network ({error}); let each --axis begin with what fits the others"
        ) from error
    objectives = run.objectives or (calls[0].evaluator.metrics[0].name,)
    return Study(phases=(_phase(run, space, calls, objectives),), notes=tuple(needed_choices(space, options.axis)))


def _asks_for_scores_alone(run: RunSettings) -> bool:
    return bool(run.objectives) and run.defaults >= REPLACING and scores().keys() >= set(run.objectives)


def _recipes(run: RunSettings, text: str, reference: Candidate, calls: tuple[Call, ...]) -> MakeRecipe | None:
    """The recipe of a candidate by the fields that axes say; None if nothing is trained."""
    given = parse_recipe_fields(text, "--recipe")
    # A gradient score reads labels and trains nothing; it had a recipe all the same in older studies.
    trains = [call.evaluator.subject == "model" or run.defaults < REPLACING for call in calls if call.evaluator.needs_dataset]
    if not any(trains):
        if given:
            raise SettingsError(f"--recipe {text}: {', '.join(call.name for call in calls)} trains nothing; --evaluators train,... does")
        return None
    base = reference.recipe
    assert base is not None

    def recipe(fields: Mapping[str, Any]) -> Recipe:
        said = {"seed": run.seed, **given, **fields}
        shares = {name: getattr(base, name) / getattr(base, leader) for name, leader in FOLLOWERS.items()}
        follows = {name: shares[name] * said[leader] for name, leader in FOLLOWERS.items() if leader in said}
        return replace(base, **{**follows, **said})

    recipe({})
    return recipe


def _phase(run: RunSettings, space: SearchSpace, calls: tuple[Call, ...], objectives: tuple[str, ...]) -> Phase:
    """The phase with what proposes its trials: a registered strategy, every point of the space, or successive halving."""
    is_small = space.size <= (run.num_trials or DEFAULT_TRIALS)
    strategy = run.strategy or (GRID if is_small else "nsga2" if len(objectives) > 1 else "tpe")
    common: dict[str, Any] = {"name": "search", "evaluators": calls, "objectives": objectives, "budget": run.budget}
    if strategy == GRID:
        return _grid(run, space, common)
    if strategy == HALVING:
        return _halving(run, space, common)
    if strategy not in strategies.names():
        raise unknown_name("strategy", strategy, [*strategies.names(), GRID, HALVING], "--strategy")
    return Phase(**common, space=space, strategy=strategy, num_trials=run.num_trials or DEFAULT_TRIALS)


def _grid(run: RunSettings, space: SearchSpace, common: Mapping[str, Any]) -> Phase:
    if run.strategy and run.num_trials:
        raise SettingsError(f"--trials {run.num_trials} means nothing with --strategy {GRID}, which measures every point")
    if not space.size <= MOST_POINTS:
        points = "infinitely many points" if math.isinf(space.size) else f"{space.size:,} points"
        raise SettingsError(
            f"--strategy {GRID}: the axes have {points}, and at most {MOST_POINTS:,} are measured; --strategy random draws some"
        )
    points = [point for point in space.points() if _is_within(run.budget, space, point)]
    reasons = "cannot be built" if run.budget.is_empty else f"cannot be built or are outside {run.budget}"
    left_out = f" of {space.size}; the others {reasons}" if len(points) < space.size else ""
    return Phase(**common, space=space, propose=grid(points), plan=f"every point of the grid ({len(points)}{left_out}), measured once")


def _halving(run: RunSettings, space: SearchSpace, common: Mapping[str, Any]) -> Phase:
    objectives, example = common["objectives"], space.decode(space.first_point())
    if len(objectives) > 1:
        raise SettingsError(f"--objectives {','.join(objectives)}: --strategy {HALVING} goes by one objective")
    if example.recipe is None or f"{RECIPE}.epochs" in (axis.name for axis in space.axes):
        raise SettingsError(
            f"--strategy {HALVING} decides how long each point is trained: it needs --evaluators train, and no axis of epochs"
        )
    rungs = rungs_of(example.recipe.epochs)
    if rungs[0] < 1:
        raise SettingsError(f"--strategy {HALVING}: of {rungs[-1]} epochs no ninth can be trained first; --recipe epochs=9 is the least")
    points = _drawn(run, space)

    def decode(params: Mapping[str, Any]) -> Candidate:
        candidate = space.decode({name: value for name, value in params.items() if name != EPOCHS_AXIS})
        stop = stopping(params[EPOCHS_AXIS], rungs[-1])
        settings = {**candidate.settings, **{name: {**candidate.settings.get(name, {}), **chosen} for name, chosen in stop.items()}}
        return replace(candidate, settings=settings, label=f"{params[EPOCHS_AXIS]}/{rungs[-1]} epochs {candidate.label}")

    def propose(phases: Mapping[str, Any]):
        from search.strategies.halving import Halving

        return Halving(points, rungs=rungs, goal=phase.goals[0], reduction=REDUCTION, epochs_axis=EPOCHS_AXIS)

    axes = (*space.axes, Axis(name=EPOCHS_AXIS, choices=rungs))
    phase = Phase(
        **common, space=replace(space, axes=axes, decode=decode), propose=propose, plan=halving_plan(len(points), rungs, "points")
    )
    return phase


def _drawn(run: RunSettings, space: SearchSpace) -> list[dict[str, Scalar]]:
    """Different points within the budget, as many as `--trials` says, drawn at random; fewer if the space holds no more."""
    wanted, generator = run.num_trials or DEFAULT_TRIALS, random.Random(run.seed)
    drawn: dict[Any, dict[str, Scalar]] = {}
    for _ in range(DRAWS * wanted):
        point = random_point(space, generator)
        if len(drawn) < wanted and _is_within(run.budget, space, point):
            drawn.setdefault(tuple(point.items()), point)
    return list(drawn.values())


def _is_within(budget: Budget, space: SearchSpace, point: Mapping[str, Scalar]) -> bool:
    try:
        return budget.holds(space.decode(point))
    except SpecError:
        return False
