"""Which token reduction pays off without retraining: every reducer within the same budgets, on the same trained networks.

    search/run.py reduce --data digits --img-size 32 --seeds 3 --share 85 --share 70

Phase `train` trains the network and, for every budget, a narrower one that costs as much, under paired seeds. Phase `reduce` gives the
trained network the reductions of each paper, as mild as the budget allows, and measures accuracy, MACs and latency. A budget is a share
of what fvcore counts of the whole network, the work of choosing and merging tokens included. Two baselines are cheap: dropping patches
at random, in places drawn anew for every seed, and the narrower network.

With `--weights FILE` nothing is trained: the network is reduced as the file has it, there is no narrower one to compare with, and one
seed says where patches are dropped. Intervals are then over test images alone.

The contrasts are registered before the first trial: for each budget, the mean of all reducers against random dropping is primary, and
each reducer against either baseline and the whole network is Holm-corrected. Effects are paired by seed and by test image.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from typing import TYPE_CHECKING, Any

from results.records import Metric
from search.fixed_points import grid
from search.study import DEFAULT_DATA, Need, Options, Phase, RunSettings, SettingsError, Study, flag_of, study
from space.cost import cost
from space.model import require_arch, resized
from space.recipe import Recipe
from space.reductions import REDUCERS, narrower_within, reduced_within, without_reductions
from space.registry import SpecError
from space.search_space import Axis, Candidate, SearchSpace
from space.spec import ArchSpec

if TYPE_CHECKING:
    from results.effects.design import Design
    from space.weights import Weights

MAX_SEED = 10_000
TRAIN = "train"
WHOLE, RANDOM, NARROWER = "whole", "random_drop", "narrower"
METHODS = tuple(name for name in REDUCERS if name != RANDOM)
BASELINES = (WHOLE, RANDOM, NARROWER)
LEVELS = (*BASELINES, *METHODS)
"""The choices of the study's axes; they are stored, so they keep their order."""

TRAINING = ("seeds", "epochs", "batch_size", "lr")
"""The flags that say how networks are trained."""

PROFILED = {"batch_size": "32"}
"""A batch large enough that an operator costs more than its call."""


@dataclass(frozen=True, kw_only=True)
class ReduceOptions(Options):
    """Which network is reduced, to which budgets, and how it is trained."""

    model: str = field(default="", metadata={"help": "as for describe; default: vit_digits at 32 px for digits, else vit_cifar"})
    share: tuple[str, ...] = field(
        default=(), metadata={"help": "budget in percent of the whole network's MACs; repeatable; default: 85 and 70"}
    )
    seeds: int = field(default=3, metadata={"help": "paired trainings of each network, counting from --seed", "at_least": 1})
    epochs: int = field(default=30, metadata={"help": "epochs of each training", "at_least": 1})
    batch_size: int = field(default=32, metadata={"help": "images per step", "at_least": 1})
    lr: float = field(default=3e-3, metadata={"help": "AdamW's learning rate", "above": 0})

    def __post_init__(self) -> None:
        super().__post_init__()
        for text in self.share:
            if not text.isdecimal() or not 0 < int(text) < 100:
                raise SpecError(f"--share {text!r}; a whole number from 1 to 99 is expected, in percent")

    @property
    def shares(self) -> tuple[int, ...]:
        """The budgets in percent, the largest first."""
        return tuple(sorted(map(int, self.share or ("85", "70")), reverse=True))


@study("reduce", options=ReduceOptions)
def reduce(run: RunSettings) -> Study:
    """Compare token reductions without retraining, within equal budgets, with random dropping and narrower networks."""
    options: ReduceOptions = run.options
    _refuse_flags_without_meaning(run, options)
    if run.seed + options.seeds > MAX_SEED:
        raise SettingsError(f"--seed {run.seed} and {options.seeds} seeds: seeds go up to {MAX_SEED - 1}")
    plain = plain_network(run, options)
    weights = run.weights_for(plain, model_name(run, options))
    # Weights that are there already differ under no seed.
    seeds = range(run.seed, run.seed + (1 if weights else options.seeds))
    baselines = (WHOLE, RANDOM) if weights else BASELINES
    trained = {} if weights else {WHOLE: plain} | {f"{NARROWER}_{share}": _within(plain, NARROWER, share) for share in options.shares}
    levels, notes = chosen_levels(plain, options.shares)
    design = reduction_design(levels, baselines)
    settings = dict(run.evaluator_settings)
    profile = replace(run, evaluator_settings={**settings, "profile": {**PROFILED, **settings.get("profile", {})}})
    cells = [
        {"factor": factor, factor: level, "seed": seed}
        for seed in seeds
        for factor, methods in levels.items()
        for level in (*baselines, *methods)
    ]
    reducing = Phase(
        name="reduce",
        space=reduction_space(plain, run, options, weights),
        evaluators=(run.call("accuracy" if weights else "reduced"), profile.call("profile")),
        objectives=("val_top1_pct", "gmacs"),
        propose=grid(cells),
        needs=() if weights else (Need(TRAIN, "all"),),
        plan=f"{len(cells)} networks within {' and '.join(f'{share} %' for share in options.shares)} of the MACs, nothing trained",
    )
    if weights:
        notes.append("the network is reduced as its weights are, under one seed: intervals are over test images alone")
        return Study(phases=(reducing,), designs={"reduce": design}, notes=tuple(notes))
    if options.seeds < design.num_seeds_needed:
        enough = f"the exact test can reject every contrast from --seeds {design.num_seeds_needed} on"
        notes.append(f"--seeds {options.seeds} is enough for intervals; {enough}")
    return Study(phases=(_training(trained, run, options, seeds), reducing), designs={"reduce": design}, notes=tuple(notes))


def _training(networks: Mapping[str, ArchSpec], run: RunSettings, options: ReduceOptions, seeds: Sequence[int]) -> Phase:
    trainings = [{"network": name, "seed": seed} for seed in seeds for name in networks]
    return Phase(
        name=TRAIN,
        space=training_space(networks, run, options),
        evaluators=(run.call("train"),),
        objectives=("val_top1_pct",),
        propose=grid(trainings),
        plan=f"{len(trainings)} trainings of {options.epochs} epochs (--epochs), {options.seeds} of each network (--seeds)",
    )


def _refuse_flags_without_meaning(run: RunSettings, options: ReduceOptions) -> None:
    for name, flag in (("num_trials", "--trials"), ("strategy", "--strategy"), ("proxy_img_size", "--proxy-img-size")):
        if getattr(run, name) is not None:
            raise SettingsError(f"{flag} means nothing here: --share and --seeds say what is measured")
    if not run.budget.is_empty:
        raise SettingsError(f"{run.budget} means nothing here: --share says what a reduced network may cost")
    if run.weights is not None:
        for field in fields(options):
            if field.name in TRAINING and getattr(options, field.name) != field.default:
                raise SettingsError(
                    f"{flag_of(field.name)} {getattr(options, field.name)} means nothing with --weights: nothing is trained"
                )


def model_name(run: RunSettings, options: ReduceOptions) -> str:
    """The network that is reduced, as the user or the default names it."""
    return options.model or ("vit_digits" if run.data == DEFAULT_DATA else "vit_cifar")


def plain_network(run: RunSettings, options: ReduceOptions) -> ArchSpec:
    """The network without reductions; raises SettingsError for one that cannot be reduced."""
    name = model_name(run, options)
    # Weights that are there already are those of the network's own size.
    img_size = run.img_size or (32 if run.data == DEFAULT_DATA and not options.model and run.weights is None else None)
    plain = require_arch(resized(run.model(name), img_size=img_size, num_classes=run.num_classes), "reduce")
    if len(plain.stages) != 1:
        raise SettingsError(f"--model {name}: networks of one stage can be reduced; this one has {len(plain.stages)}")
    if plain != without_reductions(plain):
        raise SettingsError(f"--model {name} reduces its tokens already; name the network that keeps them")
    return plain


@cache
def _within(plain: ArchSpec, level: str, share: int, seed: int = 0) -> ArchSpec:
    """The network of a level within `share` percent of what fvcore counts of the whole one."""
    max_macs = cost(plain).fvcore_macs * share // 100
    if level == WHOLE:
        return plain
    return narrower_within(plain, max_macs) if level == NARROWER else reduced_within(plain, level, max_macs, seed=seed)


def chosen_levels(plain: ArchSpec, shares: Sequence[int]) -> tuple[dict[str, tuple[str, ...]], list[str]]:
    """The reducers that reach each budget, by its factor, and a sentence for each that does not.

    Raises SettingsError for a budget that none of them reaches, or random dropping does not.
    """
    chosen: dict[str, tuple[str, ...]] = {}
    notes: list[str] = []
    for share in shares:
        reasons: dict[str, str] = {}
        for level in (RANDOM, *METHODS):
            try:
                _within(plain, level, share)
            except SpecError as error:
                reasons[level] = str(error)
        reached = tuple(level for level in METHODS if level not in reasons)
        if RANDOM in reasons or not reached:
            raise SettingsError(f"--share {share}: {next(iter(reasons.values()))}")
        chosen[factor_of(share)] = reached
        notes += [f"level {level} of {factor_of(share)} is left out: {reason}" for level, reason in reasons.items()]
    return chosen, notes


def factor_of(share: int) -> str:
    """The factor of a budget; stored, so it never changes."""
    return f"macs_{share}"


def _recipe(options: ReduceOptions, run: RunSettings) -> Recipe:
    return Recipe(
        epochs=options.epochs,
        batch_size=options.batch_size,
        lr=options.lr,
        min_lr=options.lr / 100,
        warmup_epochs=options.epochs / 10,
        # A mirrored digit is another digit, or none.
        flip=run.data != DEFAULT_DATA,
    )


def training_space(networks: Mapping[str, ArchSpec], run: RunSettings, options: ReduceOptions) -> SearchSpace:
    """A point is one of the networks and a seed."""
    recipe = _recipe(options, run)

    def decode(params: Mapping[str, Any]) -> Candidate:
        network, seed = params["network"], params["seed"]
        return Candidate(model=networks[network], recipe=replace(recipe, seed=seed), label=f"{network} seed {seed}")

    axes = (Axis(name="network", choices=tuple(networks)), Axis(name="seed", choices=range(MAX_SEED)))
    return SearchSpace(name=f"reduce/{networks[WHOLE].digest[:8]}/train", axes=axes, decode=decode)


def reduction_space(plain: ArchSpec, run: RunSettings, options: ReduceOptions, weights: Weights | None) -> SearchSpace:
    """A point is a budget, as the factor, a level of it and a seed: of the training, and of what is drawn at random."""
    recipe = _recipe(options, run)
    shares = {factor_of(share): share for share in options.shares}

    def decode(params: Mapping[str, Any]) -> Candidate:
        factor, seed = params["factor"], params["seed"]
        level, share = params[factor], shares[factor]
        label = f"{level} {share} % seed {seed}" if level != WHOLE else f"{level} seed {seed}"
        training = None if weights else replace(recipe, seed=seed)
        return Candidate(model=_within(plain, level, share, seed), recipe=training, weights=weights, label=label)

    return SearchSpace(
        name=f"reduce/{plain.digest[:8]}",
        axes=(
            Axis(name="factor", choices=tuple(shares)),
            *(Axis(name=factor, choices=LEVELS, when=("factor", factor)) for factor in shares),
            Axis(name="seed", choices=range(MAX_SEED)),
        ),
        decode=decode,
    )


def reduction_design(levels: Mapping[str, Sequence[str]], baselines: Sequence[str]) -> Design:
    """What is tested within each budget: reducers against the baselines, and random dropping against the narrower network."""
    from results.effects.design import Contrast, Design

    contrasts: list[Contrast] = []
    for factor, methods in levels.items():
        pairs = [(level, baseline) for baseline in (RANDOM, NARROWER, WHOLE) for level in methods if baseline in baselines]
        pairs += [(RANDOM, NARROWER)] if NARROWER in baselines else []
        if len(methods) == 1:
            pairs.remove((methods[0], RANDOM))
        contrasts.append(Contrast(factor=factor, levels=tuple(methods), baseline=RANDOM, outcome="top1_pct", is_primary=True))
        contrasts += [Contrast(factor=factor, levels=(level,), baseline=baseline, outcome="top1_pct") for level, baseline in pairs]
    outcomes = (Metric("top1_pct", "maximize"), Metric("nll", "minimize"))
    return Design(name="reduce", contrasts=tuple(contrasts), outcomes=outcomes)
