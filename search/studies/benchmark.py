"""Which network for these images, this device and this budget: any networks, measured in speed and accuracy on one plane.

    search/run.py benchmark --models 'deit_tiny,timm:vit_*_patch16_224,mine.json' --data folder:PATH --max latency_ms=5 --max latency_ms=10

Phase `profile` measures the speed of every network. Phase `rounds` trains those that are within a budget, by successive halving under one
seed: within each budget, to the next round go the networks on the front of validation accuracy over the cost, and those least behind it,
up to half of them and at least three. A network that goes on continues its own training. Those that reach the end are the finalists, and
phase `finalists` trains them under the other seeds, paired. Each `--max` is a budget of its own; without one, every network is within the
only budget.

`--how train` trains from fresh weights and `finetune` from those in the folder `--weights`. `probe` trains a classifier on the frozen
network of the folder; that is cheap, so there are no rounds, and every network within a budget has all seeds.

Selection looks at validation images and costs alone. The accuracy on test images is reported, and says which networks can be told apart.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from results.answers import Question
from results.formats import count
from results.paths import without_password
from search.budget import assigned_bounds
from search.default_recipe import default_recipe
from search.fixed_points import grid, refuse_flags_of_a_search
from search.model_list import ListedModel, listed_models
from search.named_models import is_digest
from search.strategy import Proposer
from search.study import DEFAULT_DATA, RESULT_ATTRIBUTE, FineTuning, Phase, RunSettings, SettingsError, Study, flag_of, study
from search.training_rounds import EPOCHS_AXIS, rungs_of, stopping
from space.component import Scalar
from space.cost import cost
from space.recipe import Recipe
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import digest_of
from workers.evaluator import Call, evaluators

if TYPE_CHECKING:
    import optuna

    from search.strategies.halving import Halving
    from space.model import Model
    from space.weights import Weights

PROFILE, ROUNDS, FINALISTS = "profile", "rounds", "finalists"
"""The names of the phases; stored."""

NETWORK, SEED = "network", "seed"
MAX_SEED = 10_000

EVALUATOR = {"train": "train", "finetune": "train", "probe": "linear_probe"}
"""What measures accuracy, by how networks are made to know the images."""

COSTS = ("latency_ms", "latency_p90_ms", "latency_p99_ms", "latency_to_anchor", "memory_mb", "params_m", "gmacs")
"""What a profile measures and a network may be bounded by."""

EXACT: tuple[str, ...] = ("params_m", "gmacs")
"""Those that are known without measuring."""

GOAL = "val_top1_pct"
HALF, LEAST_KEPT = 2, 3
"""Of the networks within a budget, one in two goes on to the next round, and at least three, so that there is something to compare."""

DIGITS_IMG_SIZE = 32
FINETUNE_LR_SHARE = 0.1
"""Of the rate of a training from fresh weights, which would take trained ones apart."""

Bounds = Mapping[str, float]
"""A budget: the most that a network may have of each metric."""


@dataclass(frozen=True, kw_only=True)
class BenchmarkOptions(FineTuning):
    """Which networks, how they come to know the images, and the budgets under which a winner is asked for."""

    models: str = field(
        default="",
        metadata={"metavar": "A,B", "help": "names as for describe, and shell-style patterns such as timm:vit_*_patch16_224"},
    )
    how: str = field(
        default="train",
        metadata={"help": "train, from fresh weights; finetune or probe, a linear one, from the files of the folder --weights"},
    )
    max: tuple[str, ...] = field(
        default=(),
        metadata={
            "metavar": "METRIC=VALUE",
            "help": "a budget, e.g. latency_ms=5; repeatable, and each has a winner; A=1,B=2 is one budget of two bounds",
        },
    )
    cost: str = field(default="latency_ms", metadata={"help": f"what the front is over: {', '.join(COSTS)}"})
    epochs: int = field(
        default=0,
        metadata={"help": "epochs of a whole training or probe; 0: 60 for digits, else 20, and 50 for a probe", "at_least": 0},
    )
    seeds: int = field(default=3, metadata={"help": "paired trainings of each finalist, counting from --seed", "at_least": 1})
    batch_size: int = field(default=0, metadata={"help": "images per step; 0: 32 for digits, else 128", "at_least": 0})
    lr: float = field(
        default=0.0,
        metadata={"help": "AdamW's learning rate; 0: 3e-3 for digits, else 1e-3, and a tenth of it for finetune", "at_least": 0},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.how not in EVALUATOR:
            raise unknown_name("way", self.how, EVALUATOR, "--how")
        if self.cost not in COSTS:
            raise unknown_name("cost", self.cost, COSTS, "--cost")
        for budget in self.budgets:
            for metric, bound in budget.items():
                if metric not in COSTS:
                    raise unknown_name("cost", metric, COSTS, f"--max {metric}={bound:g}")
                if not 0 < bound < math.inf:
                    raise SpecError(f"--max {metric}={bound:g}; a number above 0 is expected")

    @property
    def budgets(self) -> tuple[Bounds, ...]:
        """The budgets in the order of the flags; one without bounds if there is none."""
        return tuple(map(_budget, self.max)) or ({},)


def _budget(text: str) -> Bounds:
    given = assigned_bounds("--max", text.split(","))
    budget = {name: bound for _, name, bound in given}
    if len(budget) < len(given):
        raise SpecError(f"--max {text} bounds a metric twice; for two budgets give two flags")
    return budget


@study("benchmark", options=BenchmarkOptions)
def benchmark(run: RunSettings) -> Study:
    """Find the network for your images, device and budget: accuracy against speed, the front, a winner per budget."""
    options: BenchmarkOptions = run.options
    _refuse_flags_without_meaning(run, options)
    img_size = run.img_size or (DIGITS_IMG_SIZE if run.data == DEFAULT_DATA else None)
    listed = listed_models(options.models, run, img_size=img_size, num_classes=run.num_classes)
    if run.num_classes is not None:
        # The study is also made before the classes of the data are known, and parameters depend on them.
        _refuse_budgets_out_of_reach(options.budgets, listed.models)
    call = _accuracy_call(run, options)
    entrants = _entrants(listed.models, run, options, call)
    budgets, seeds = options.budgets, range(run.seed, run.seed + options.seeds)
    profile = Phase(
        name=PROFILE,
        space=_space(PROFILE, entrants, (), lambda params: Candidate(model=_of(entrants, params).model, label=params[NETWORK])),
        evaluators=(run.call(PROFILE),),
        objectives=(options.cost,),
        propose=grid([{NETWORK: name} for name in entrants]),
        plan=f"{count(len(entrants), 'network')}, the speed of each measured once",
        failures_are_data=True,
    )
    measuring = {"evaluators": (call,), "objectives": (GOAL,)}
    phases = [profile]
    if options.how == "probe":
        phases.append(_probes(entrants, budgets, seeds, measuring))
    else:
        phases += _trainings(entrants, options, seeds, measuring)
    question = Question(
        kind="benchmark",
        parameters={
            "data": run.data,
            "how": options.how,
            "cost": options.cost,
            "budgets": [dict(budget) for budget in budgets],
            "seeds": list(seeds),
            "networks": {
                name: {"digest": one.model.digest, "epochs": one.recipe.epochs, "command": _command(one, call, run)}
                for name, one in entrants.items()
            },
            "left_out": [list(each) for each in listed.left_out],
        },
    )
    return Study(phases=tuple(phases), question=question, notes=(*listed.notes, *_notes(run)))


def _notes(run: RunSettings) -> list[str]:
    if run.processes == 1:
        return []
    return [f"--processes {run.processes}: the commands that are printed train in one process, which changes the last digits of a result"]


@dataclass(frozen=True, kw_only=True)
class Entrant:
    """A network by the name that the user gave it, and how it is trained under the first seed."""

    name: str
    model: Model
    recipe: Recipe
    weights: Weights | None

    def candidate(self, seed: int, stop_after: int | None = None) -> Candidate:
        """The network as it is measured under a seed, trained to its end or up to an epoch."""
        stop = {} if stop_after is None else stopping(stop_after, self.recipe.epochs)
        shown = f"{stop_after}/{self.recipe.epochs} epochs " if stop else ""
        recipe = replace(self.recipe, seed=seed)
        return Candidate(model=self.model, recipe=recipe, weights=self.weights, settings=stop, label=f"{shown}{self.name} seed {seed}")


Entrants = Mapping[str, Entrant]


def _of(entrants: Entrants, params: Mapping[str, Any]) -> Entrant:
    return entrants[params[NETWORK]]


def _refuse_flags_without_meaning(run: RunSettings, options: BenchmarkOptions) -> None:
    if not options.models:
        raise SettingsError("--models is missing: names separated by commas, e.g. --models 'deit_tiny,timm:vit_*_patch16_224'")
    refuse_flags_of_a_search(run, "every network of --models within a budget --max METRIC=VALUE is measured")
    if run.proxy_img_size is not None:
        raise SettingsError("--proxy-img-size means nothing here: networks are measured at the size of the images")
    if run.seed + options.seeds > MAX_SEED:
        raise SettingsError(f"--seed {run.seed} and {options.seeds} seeds: seeds go up to {MAX_SEED - 1}")
    if options.how == "train" and run.weights is not None:
        raise SettingsError(f"--weights {run.weights} means nothing with --how train; finetune and probe start from weights")
    if options.how != "train" and run.weights is None:
        raise SettingsError(f"--how {options.how} needs --weights DIR, a folder with NAME.safetensors or the like for each network")
    for name in ("batch_size", "lr", "layer_decay", "freeze") if options.how == "probe" else ():
        if (value := getattr(options, name)) != getattr(BenchmarkOptions, name):
            raise SettingsError(
                f"{flag_of(name)} {value} means nothing with --how probe; --set linear_probe.FIELD=VALUE says how it learns"
            )


def _refuse_budgets_out_of_reach(budgets: Sequence[Bounds], models: Sequence[ListedModel]) -> None:
    """What is known without measuring is refused here; the bounds of the others once all networks are profiled."""
    counted = {one.name: cost(one.model) for one in models}
    exact = {name: dict(zip(EXACT, (found.params / 1e6, found.macs / 1e9), strict=True)) for name, found in counted.items()}
    for budget in budgets:
        _refuse_unless_reached({metric: bound for metric, bound in budget.items() if metric in EXACT}, exact)


def _refuse_unless_reached(budget: Bounds, costs: Mapping[str, Mapping[str, float]]) -> None:
    """Raise SettingsError, with the nearest network, unless a network is within the budget."""
    if any(is_within(budget, measured) for measured in costs.values()):
        return
    nearest = min(costs, key=lambda name: max(costs[name][metric] / bound for metric, bound in budget.items()))
    has = ", ".join(f"{metric} {costs[nearest][metric]:.4g}" for metric in budget)
    raise SettingsError(f"{flags_of(budget)}: none of {count(len(costs), 'network')} is within it; the nearest, {nearest}, has {has}")


def is_within(budget: Bounds, costs: Mapping[str, float]) -> bool:
    """Whether a network with these costs is within the budget."""
    return all(costs[metric] <= bound for metric, bound in budget.items())


def flags_of(budget: Bounds) -> str:
    """The budget as the command line has it."""
    return f"--max {','.join(f'{metric}={bound:g}' for metric, bound in budget.items())}"


def _entrants(models: Sequence[ListedModel], run: RunSettings, options: BenchmarkOptions, call: Call) -> dict[str, Entrant]:
    """The networks by name, with their weights checked."""
    return {
        one.name: Entrant(
            name=one.name, model=one.model, recipe=_recipe(one.model, run, options, call), weights=run.weights_for(one.model, one.name)
        )
        for one in models
    }


def _recipe(model: Model, run: RunSettings, options: BenchmarkOptions, call: Call) -> Recipe:
    """How the network is trained under the first seed; of a probe, which has settings of its own, the seed and the epochs."""
    if options.how == "probe":
        return Recipe(epochs=call.settings.epochs, seed=run.seed, warmup_epochs=0)
    recipe = default_recipe(
        run,
        img_size=model.img_size,
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        seed=run.seed,
        layer_decay=options.layer_decay,
        freeze=options.freeze,
    )
    if options.how == "finetune" and not options.lr:
        recipe = replace(recipe, lr=recipe.lr * FINETUNE_LR_SHARE, min_lr=recipe.min_lr * FINETUNE_LR_SHARE)
    return recipe


def _accuracy_call(run: RunSettings, options: BenchmarkOptions) -> Call:
    call = run.call(EVALUATOR[options.how])
    if options.how == "probe" and options.epochs:
        if "epochs" in run.evaluator_settings.get(call.name, {}):
            raise SettingsError(f"--epochs and --set {call.name}.epochs say the same thing; give one of them")
        return call.changed({"epochs": options.epochs})
    if options.how != "probe" and call.settings.stop_after:
        raise SettingsError(f"--set train.stop_after={call.settings.stop_after} means nothing here: the rounds say where a training stops")
    return call


def _space(phase: str, entrants: Entrants, axes: Sequence[Axis], decode: Callable[[Mapping[str, Any]], Candidate]) -> SearchSpace:
    """Networks by name; the space's own name tells networks and weights apart that are called the same."""
    identity = [[one.model.digest, one.weights.identity if one.weights else None] for one in entrants.values()]
    networks = Axis(name=NETWORK, choices=tuple(entrants))
    return SearchSpace(name=f"benchmark/{digest_of(identity)}/{phase}", axes=(networks, *axes), decode=decode)


def _trainings(entrants: Entrants, options: BenchmarkOptions, seeds: range, measuring: Mapping[str, Any]) -> list[Phase]:
    """The rounds under the first seed, and the finalists under the others."""
    first = seeds[0]
    epochs = next(iter(entrants.values())).recipe.epochs
    # A training too short to be halved has fewer rounds.
    rungs = tuple(dict.fromkeys(max(1, rung) for rung in rungs_of(epochs)))
    halving = partial(_halving, entrants=entrants, options=options, rungs=rungs)
    rounds = Phase(
        name=ROUNDS,
        space=_space(
            ROUNDS,
            entrants,
            (Axis(name=EPOCHS_AXIS, choices=rungs),),
            lambda params: _of(entrants, params).candidate(first, params[EPOCHS_AXIS]),
        ),
        propose=halving,
        plan=f"successive halving under seed {first}: to epoch {', then to epoch '.join(map(str, rungs))}; "
        f"within each budget go on the front of {GOAL} over {options.cost} and what is least behind it, up to half, at least {LEAST_KEPT}",
        **measuring,
    )
    if len(seeds) == 1:
        return [rounds]

    def propose(phases: Mapping[str, optuna.Study]) -> Proposer:
        finished = halving(phases).family(phases[ROUNDS])
        names = dict.fromkeys(trial.params[NETWORK] for trial in finished)
        return grid([{NETWORK: name, SEED: seed} for seed in seeds[1:] for name in names])(phases)

    return [rounds, _finalists(entrants, propose, f"what is left, trained again under {_listed_seeds(seeds[1:])}", measuring)]


def _probes(entrants: Entrants, budgets: Sequence[Bounds], seeds: range, measuring: Mapping[str, Any]) -> Phase:
    def propose(phases: Mapping[str, optuna.Study]) -> Proposer:
        return grid([{NETWORK: name, SEED: seed} for seed in seeds for name in _affordable(phases, entrants, budgets)])(phases)

    return _finalists(entrants, propose, f"the networks within a budget, probed under {_listed_seeds(seeds)}", measuring)


def _finalists(
    entrants: Entrants, propose: Callable[[Mapping[str, optuna.Study]], Proposer], plan: str, measuring: Mapping[str, Any]
) -> Phase:
    axes = (Axis(name=SEED, choices=range(MAX_SEED)),)
    space = _space(FINALISTS, entrants, axes, lambda params: _of(entrants, params).candidate(params[SEED]))
    return Phase(name=FINALISTS, space=space, propose=propose, plan=plan, **measuring)


def _listed_seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, seeds))}"


def _halving(phases: Mapping[str, optuna.Study], *, entrants: Entrants, options: BenchmarkOptions, rungs: Sequence[int]) -> Halving:
    from search.strategies.halving import Halving, NearestToFront

    costs = _affordable(phases, entrants, options.budgets)

    def is_in(budget: Bounds, point: Mapping[str, Scalar]) -> bool:
        return is_within(budget, costs[str(point[NETWORK])])

    goal = next(metric for metric in evaluators.get(EVALUATOR[options.how]).metrics if metric.name == GOAL)
    select = NearestToFront(
        cost=lambda point: costs[str(point[NETWORK])][options.cost],
        budgets=[partial(is_in, budget) for budget in options.budgets],
        goal=goal,
        reduction=HALF,
        at_least=LEAST_KEPT,
    )
    points = [{NETWORK: name} for name in costs]
    return Halving(points, rungs=rungs, goal=goal, epochs_axis=EPOCHS_AXIS, select=select)


def _affordable(phases: Mapping[str, optuna.Study], entrants: Entrants, budgets: Sequence[Bounds]) -> dict[str, Mapping[str, float]]:
    """The costs of the networks that are within a budget; raises SettingsError for a budget that has none."""
    from optuna.trial import TrialState

    told = phases[PROFILE].get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    measured = {trial.params[NETWORK]: trial.user_attrs[RESULT_ATTRIBUTE] for trial in told}
    # In the order of the list: the proposers' order of equals.
    costs = {name: measured[name] for name in entrants if name in measured}
    if not costs:
        raise SettingsError("no network could be profiled; the reasons are above, and in MLflow")
    for budget in budgets:
        _refuse_unless_reached(budget, costs)
    return {name: found for name, found in costs.items() if any(is_within(budget, found) for budget in budgets)}


def _command(one: Entrant, call: Call, run: RunSettings) -> str:
    """The command that measures a network again, under the first seed."""
    recipe = {name: value for name, value in one.recipe.to_json().items() if name != "seed"}
    fields = ",".join(f"{name}={str(value).lower() if isinstance(value, bool) else value}" for name, value in recipe.items())
    settings = [f"{name}.{key}={value}" for name in (PROFILE, call.name) for key, value in run.evaluator_settings.get(name, {}).items()]
    if call.settings != run.call(call.name).settings:
        settings.append(f"{call.name}.epochs={call.settings.epochs}")
    words = ["search/run.py", "evaluate", one.name, "--evaluators", f"{PROFILE},{call.name}"]
    words += ["--data", run.data, "--img-size", str(one.model.img_size), "--seed", str(one.recipe.seed), "--recipe", fields]
    words += ["--weights", str(run.weights)] if run.weights else []
    words += ["--gpus", f"{run.gpus:g}"] if run.gpus else []
    if is_digest(one.name):
        words += ["--tracking-uri", without_password(run.tracking_uri)] if run.tracking_uri else ["--runs", str(run.runs)]
    words += [word for setting in settings for word in ("--set", setting)]
    return shlex.join(words)
