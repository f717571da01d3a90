"""ViT-ResNAS: train a supernet, search it with inherited weights, train what was found, https://arxiv.org/abs/2109.00642.

    search/run.py vit_resnas --data digits --trials 200 --top 1

Phase `supernet` trains the largest network of a space, a few subnets a step. Phase `evolution` searches the subnets within the budget of
MACs by their accuracy with inherited weights on a part of the validation images, and phase `finalists` measures its best on all of them.
Phase `retrain` trains the best of these, networks drawn at random within the same budget and one made by hand, all by one recipe under
paired seeds. Validation images alone decide; test images are for what is reported.

`--max gmacs=C` is the budget, and every network found has from 0.975 C to C, as published. Without it C is what the hand-made network
costs. That is `--hand-made NAME`, else the subnet that the space scales evenly: equal blocks in every stage, and widths, heads, hidden
units and depths at the same place among their choices.

With `--trust N`, phase `trust` trains N subnets alone, from the smallest to the largest. Their accuracy says how far inherited weights,
scores of untrained networks and plain size rank networks. The answer at the end begins with that table.

With `--weights FILE`, the `model.pt` of a supernet of the same space that an earlier study trained, nothing trains one: two budgets can
share a supernet.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from results.answers import Question
from results.records import Metric
from search.budget import Budget, climb, random_point
from search.fixed_points import grid
from search.strategy import proposed_point
from search.studies.rank_quality import why_not
from search.study import DEFAULT_DATA, Need, Options, Phase, PhaseStopped, RunSettings, SettingsError, Study, study
from space import catalog
from space.component import Scalar
from space.cost import cost
from space.model import Model, require_arch, resized
from space.randomness import stream
from space.recipe import Recipe
from space.registry import SpecError, unknown_name
from space.search_space import Axis, Candidate, SearchSpace
from space.subnet_spec import SubnetSpec
from space.supernet_space import SupernetSpace
from workers.evaluator import Call
from workers.mixings import mixings

if TYPE_CHECKING:
    import optuna

    from results.effects.design import Design
    from space.weights import Weights

SUPERNET, EVOLUTION, FINALISTS, RETRAIN, TRUST = "supernet", "evolution", "finalists", "retrain", "trust"
INHERITED, ALONE = "inherited_top1_pct", "test_top1_pct"
LEAST_SHARE = 0.975
"""Of the budget of MACs: the published search takes nothing smaller."""
MAX_NETWORKS = 10
MIN_TRUST = 12
MAX_SEED = 10_000
SCORES = {"inherited": (INHERITED,), "as_vit": ("length_distortion", "ntk_condition"), "nsc": ("nsc",)}
"""What is to predict the accuracy of a subnet alone, by its evaluator: inherited weights, and scores of the untrained network."""
SPREAD = 0.01
"""The share by which a subnet that is trained for `trust` may miss the MACs it is to have."""
NUM_STARTS = 20
MAX_PLACES = 9
KEEP = "keep"
Point = Mapping[str, Scalar]


def level(name: str, number: int) -> str:
    """The number-th network of a kind, from 0: `searched`, `searched_2`, ...; stored, so it never changes."""
    return name if number == 0 else f"{name}_{number + 1}"


HAND_MADE, SEARCHED, RANDOM = "hand_made", "searched", "random"
LEVELS = (HAND_MADE, *(level(name, number) for name in (SEARCHED, RANDOM) for number in range(MAX_NETWORKS)))
"""The choices of the study's axis; stored."""


@dataclass(frozen=True, kw_only=True)
class VitResnasOptions(Options):
    """The space, how long its networks are trained, and which of them."""

    space: str = field(
        default="", metadata={"help": "a supernet's space by name, or its JSON file; default: vit_resnas/digits for digits, else .../cifar"}
    )
    epochs: int = field(default=60, metadata={"help": "epochs of the supernet", "at_least": 1})
    retrain_epochs: int = field(default=30, metadata={"help": "epochs of every network that is trained alone", "at_least": 1})
    batch_size: int = field(default=64, metadata={"help": "images per step", "at_least": 1})
    lr: float = field(default=2e-3, metadata={"help": "AdamW's learning rate", "above": 0})
    mixing: str = field(default="none", metadata={"help": "of the training images; patch_tokens is the published one"})
    architectures: int = field(default=2, metadata={"help": "subnets in each step of the supernet", "at_least": 1})
    sampling: str = field(default="stratified", metadata={"help": "how they are drawn: stratified (published), iid, sandwich or macs"})
    finalists: int = field(default=20, metadata={"help": "networks measured on all validation images", "at_least": 1})
    top: int = field(default=2, metadata={"help": f"searched networks that are trained, at most {MAX_NETWORKS}", "at_least": 1})
    random: int = field(default=2, metadata={"help": f"random networks trained beside them, at most {MAX_NETWORKS}", "at_least": 1})
    hand_made: str = field(default="", metadata={"help": "as for describe; default: the space's evenly scaled subnet"})
    seeds: int = field(default=3, metadata={"help": "paired trainings of each network, counting from --seed", "at_least": 1})
    inherit: bool = field(default=False, metadata={"help": "start these trainings from the supernet's weights"})
    trust: int = field(
        default=0, metadata={"help": f"subnets trained alone to judge the supernet, from {MIN_TRUST} on; 0: none", "at_least": 0}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("top", "random"):
            if (number := getattr(self, name)) > MAX_NETWORKS:
                raise SpecError(f"--{name} is {number}; at most {MAX_NETWORKS} is expected")
        if 0 < self.trust < MIN_TRUST:
            raise SpecError(f"--trust is {self.trust}; 0 or at least {MIN_TRUST} is expected, or the table says nothing")
        if self.top > self.finalists:
            raise SpecError(f"--top {self.top} of --finalists {self.finalists}: more than there are")
        if self.mixing not in ("none", *mixings.names()):
            raise unknown_name("mixing", self.mixing, ("none", *mixings.names()), "--mixing")

    @property
    def levels(self) -> tuple[str, ...]:
        """The networks that are compared, the hand-made one first."""
        searched = (level(SEARCHED, number) for number in range(self.top))
        return (HAND_MADE, *searched, *(level(RANDOM, number) for number in range(self.random)))


@study("vit_resnas", options=VitResnasOptions)
def vit_resnas(run: RunSettings) -> Study:
    """Train a supernet, search its subnets by inherited accuracy, and train the best beside hand-made and random ones."""
    options: VitResnasOptions = run.options
    if run.proxy_img_size is not None:
        raise SettingsError("--proxy-img-size means nothing here: subnets are measured with the supernet's weights at its image size")
    if run.seed + options.seeds > MAX_SEED:
        raise SettingsError(f"--seed {run.seed} and {options.seeds} seeds: seeds go up to {MAX_SEED - 1}")
    return _Plan(run, options).study()


class _Plan:
    """What all phases of a study share: the space, the recipe, the budget and the hand-made network."""

    def __init__(self, run: RunSettings, options: VitResnasOptions):
        is_digits = run.data == DEFAULT_DATA
        name = options.space or ("vit_resnas/digits" if is_digits else "vit_resnas/cifar")
        self.run, self.options = run, options
        self.space: SupernetSpace = catalog.supernet_space(name, img_size=run.img_size, num_classes=run.num_classes)
        self.recipe = Recipe(
            epochs=options.epochs,
            seed=run.seed,
            batch_size=options.batch_size,
            lr=options.lr,
            min_lr=options.lr / 100,
            warmup_epochs=options.epochs / 10,
            mixing=options.mixing,
            # A mirrored digit is another digit, or none; and digits fill their square, so that a crop cuts strokes off.
            flip=not is_digits,
            crop="none" if is_digits else "pad" if self.space.largest.img_size < 64 else "resized",
        )
        self.alone = replace(self.recipe, epochs=options.retrain_epochs, warmup_epochs=options.retrain_epochs / 10)
        self.weights = self._trained_supernet()
        self.needs = () if self.weights else (Need(SUPERNET),)
        self.subnets = self._with_weights(self.space.search_space())
        self.budget, self.hand_made = self._within()
        is_own = isinstance(self.hand_made, SubnetSpec) and self.hand_made.supernet == self.space.largest
        if options.inherit and not is_own:
            raise SettingsError(f"--inherit: the hand-made network {options.hand_made} is no subnet of space {self.space.name!r}")

    def _trained_supernet(self) -> Weights | None:
        """The supernet that the user gives; raises ValueError for a file that is none of this space."""
        if (weights := self.run.weights_for(self.space.largest, "model")) is None:
            return None
        from workers.evaluator import EvaluationError
        from workers.evaluators.supernet import load_supernet
        from workers.evaluators.train import WEIGHTS

        if weights.path.name != WEIGHTS:
            raise SettingsError(f"--weights {weights.path}: a supernet is read from the {WEIGHTS} of its training")
        try:
            load_supernet(weights.path.parent, space=self.space)
        except EvaluationError as error:
            raise SettingsError(f"--weights: {error}") from error
        return weights

    def _with_weights(self, space: SearchSpace) -> SearchSpace:
        """The space, with the given supernet's weights in every candidate."""
        if self.weights is None:
            return space
        return replace(space, decode=lambda point: replace(space.decode(point), weights=self.weights))

    def _within(self) -> tuple[Budget, Model]:
        """The budget, and the network made by hand."""
        given = self.run.budget
        most = given.at_most.get("gmacs")
        if most is not None:
            self._budget(most).check_reachable(self.subnets)
        if self.options.hand_made:
            made = resized(
                self.run.model(self.options.hand_made), img_size=self.space.largest.img_size, num_classes=self.space.largest.num_classes
            )
            require_arch(made, "--hand-made")
        else:
            made = self.space.subnet(evenly_scaled(self.space, most))
        return self._budget(gmacs(made) if most is None else most), made

    def _budget(self, most: float) -> Budget:
        given = self.run.budget
        return Budget(at_most={**given.at_most, "gmacs": most}, at_least={"gmacs": LEAST_SHARE * most, **given.at_least})

    def study(self) -> Study:
        run, options = self.run, self.options
        phases = [*([] if self.weights else [self._supernet()]), self._evolution(), self._finalists(), self._retrain()]
        scores: dict[str, tuple[str, ...]] = {}
        notes = self._notes()
        if options.trust:
            points = spread_points(self.space, options.trust, run.seed)
            phases.append(self._trust(points))
            for name, metrics in SCORES.items():
                call = next((call for call in self._measured(on_all=True) if call.name == name), run.call(name))
                if reason := why_not(call, Candidate(model=self.space.subnet(points[0]))):
                    notes.append(f"score {name} is left out: {reason}")
                    continue
                phases.append(self._score(call, metrics, points))
                scores[phases[-1].name] = metrics
        question = Question(
            kind="supernet_search",
            parameters={
                "trust": TRUST,
                "scores": {phase: list(metrics) for phase, metrics in scores.items()},
                "retrain": RETRAIN,
                "levels": list(options.levels),
                "inherited": INHERITED,
                "alone": ALONE,
            },
        )
        return Study(phases=tuple(phases), designs={RETRAIN: retrain_design(options)}, question=question, notes=tuple(notes))

    def _notes(self) -> list[str]:
        least, most = (macs / 1e9 for macs in self.space.macs_range)
        notes = [
            f"space {self.space.name}: {self.space.num_networks:.3g} networks, {least:.3g} to {most:.3g} GMAC; searched: {self.budget}"
        ]
        costs, allowed = gmacs(self.hand_made), self.budget.at_most["gmacs"]
        if not LEAST_SHARE * allowed <= costs <= allowed:
            notes.append(f"the hand-made network costs {costs:.3g} GMAC, {100 * costs / allowed:.0f} % of the budget: not equal MACs")
        needed = retrain_design(self.options).num_seeds_needed
        if self.options.seeds < needed:
            enough = f"the exact test can reject every contrast from --seeds {needed} on"
            notes.append(f"--seeds {self.options.seeds} is enough for intervals; {enough}")
        return notes

    def _supernet(self) -> Phase:
        options, space = self.options, self.space
        for name, flag in (("space", "--space"), ("num_subnets", "--architectures"), ("sampling", "--sampling")):
            if name in self.run.evaluator_settings.get(SUPERNET, {}):
                raise SettingsError(f"--set supernet.{name} means nothing here: {flag} says it")
        call = self.run.call(SUPERNET).changed(
            {"space": json.dumps(space.to_json(), sort_keys=True), "num_subnets": options.architectures, "sampling": options.sampling}
        )

        def decode(params: Mapping[str, Any]) -> Candidate:
            recipe = replace(self.recipe, seed=params["seed"])
            return Candidate(model=space.largest, recipe=recipe, label=f"{space.name} seed {params['seed']}")

        return Phase(
            name=SUPERNET,
            space=SearchSpace(name=f"{space.name}/supernet", axes=(Axis(name="seed", choices=range(MAX_SEED)),), decode=decode),
            evaluators=(call,),
            objectives=("random_val_top1_pct",),
            propose=grid([{"seed": self.run.seed}]),
            plan=f"the supernet, trained once for {options.epochs} epochs (--epochs), {options.architectures} subnets a step",
        )

    def _measured(self, *, on_all: bool) -> tuple[Call, ...]:
        """The evaluators of subnets with inherited weights, on a part of the validation images or on all."""
        changes = {}
        if on_all:
            changes = {"num_images": 0}
        elif "num_images" not in self.run.evaluator_settings.get("inherited", {}):
            changes = {"num_images": 100 if self.run.data == DEFAULT_DATA else 1000}
        return tuple(call.changed(changes) if call.name == "inherited" else call for call in self.run.calls("inherited", "cost"))

    def _evolution(self) -> Phase:
        return Phase(
            name=EVOLUTION,
            space=self.subnets,
            evaluators=self._measured(on_all=False),
            objectives=self.run.objectives or (INHERITED,),
            budget=self.budget,
            strategy=self.run.strategy or "evolution",
            num_trials=self.run.num_trials or (200 if self.run.data == DEFAULT_DATA else 3350),
            needs=self.needs,
        )

    def _finalists(self) -> Phase:
        number = self.options.finalists

        def propose(phases: Mapping[str, optuna.Study]):
            from search.strategies.grid import Grid

            return Grid(self._best(phases[EVOLUTION], number))

        return Phase(
            name=FINALISTS,
            space=self.subnets,
            evaluators=self._measured(on_all=True),
            objectives=self.run.objectives or (INHERITED,),
            propose=propose,
            needs=self.needs,
            plan=f"the {number} best of the search (--finalists), on all validation images",
        )

    def _best(self, studied: optuna.Study, number: int) -> list[Point]:
        """The points of the best complete trials, as leaderboards rank; raises PhaseStopped if there is none."""
        from optuna.trial import TrialState

        from search.strategies.evolution import best_points

        trials = studied.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        if not trials:
            raise PhaseStopped(f"{studied.study_name} has no complete trial to go on from")
        return best_points(trials, studied.directions, number)

    def _retrain(self) -> Phase:
        options, run = self.options, self.run
        train = run.call("train")
        seeds = range(run.seed, run.seed + options.seeds)

        def propose(phases: Mapping[str, optuna.Study]):
            from search.strategies.grid import Grid

            networks: dict[str, Point] = {HAND_MADE: {}}
            networks |= {level(SEARCHED, place): point for place, point in enumerate(self._best(phases[FINALISTS], options.top))}
            drawn = random_points(self.subnets, self.budget, options.random, run.seed)
            networks |= {level(RANDOM, place): point for place, point in enumerate(drawn)}
            refuse_other_networks(phases[RETRAIN], networks)
            return Grid(
                [{"factor": "network", "network": name, **point, "seed": seed} for seed in seeds for name, point in networks.items()]
            )

        how = "with the supernet's weights" if options.inherit else "from scratch"
        return Phase(
            name=RETRAIN,
            space=self._retrain_space(),
            evaluators=(train.changed({"inherits": SUPERNET}) if options.inherit and not self.weights else train, run.call("cost")),
            objectives=("val_top1_pct",),
            propose=propose,
            needs=self.needs if options.inherit else (),
            plan=f"{len(options.levels)} networks trained {how} for {options.retrain_epochs} epochs, under {options.seeds} paired seeds",
        )

    def _retrain_space(self) -> SearchSpace:
        """A point is a network, as the level of the factor, and a seed; one that was searched or drawn has its genes beside it."""
        subnets = tuple(name for name in LEVELS if name != HAND_MADE)
        genes = tuple(axis if axis.when else replace(axis, when=("network", subnets)) for axis in self.space.axes)

        def decode(params: Mapping[str, Any]) -> Candidate:
            name, seed = params["network"], params["seed"]
            own = {gene: value for gene, value in params.items() if gene not in ("factor", "network", "seed")}
            model = self.hand_made if name == HAND_MADE else self.space.subnet(own)
            weights = self.weights if self.options.inherit else None
            return Candidate(model=model, recipe=replace(self.alone, seed=seed), weights=weights, label=f"{name} seed {seed}")

        return SearchSpace(
            name=f"{self.space.name}/{self.space.digest[:8]}/retrain/{self.hand_made.digest[:8]}",
            axes=(
                Axis(name="factor", choices=("network",)),
                Axis(name="network", choices=LEVELS),
                *genes,
                Axis(name="seed", choices=range(MAX_SEED)),
            ),
            decode=decode,
        )

    def _alone_space(self) -> SearchSpace:
        """Subnets that are trained alone, by the recipe of the comparison."""

        def decode(params: Mapping[str, Any]) -> Candidate:
            return replace(self.subnets.decode(params), recipe=replace(self.alone, seed=self.run.seed), weights=None)

        return replace(self.subnets, name=f"{self.space.name}/{self.space.digest[:8]}/alone", decode=decode)

    def _trust(self, points: Sequence[Point]) -> Phase:
        return Phase(
            name=TRUST,
            space=self._alone_space(),
            evaluators=(self.run.call("train"), self.run.call("cost")),
            objectives=("val_top1_pct",),
            propose=grid(points),
            plan=f"{len(points)} subnets, from the smallest to the largest (--trust), trained for {self.options.retrain_epochs} epochs",
        )

    def _score(self, call: Call, metrics: tuple[str, ...], points: Sequence[Point]) -> Phase:
        """What a predictor says of the subnets of `trust`, in a phase of its own: where one fails, no other does."""
        inherits = call.name == "inherited"
        return Phase(
            name=f"{TRUST}_{call.name}",
            space=self.subnets,
            evaluators=(call,),
            objectives=metrics,
            propose=grid(points),
            needs=self.needs if inherits else (),
            plan=f"the same {len(points)} subnets, {'with the weights of the supernet' if inherits else 'untrained'}",
            failures_are_data=True,
        )


def gmacs(model: Model) -> float:
    """Multiply-adds for one image, 1e9."""
    return cost(require_arch(model, "a budget of MACs")).macs / 1e9


def evenly_scaled(space: SupernetSpace, max_gmacs: float | None) -> Point:
    """The subnet that a designer might draw: of each kind of choice every stage and block takes the one at the same place.

    Kinds are widths, each choice of the blocks, and depth; places go from 0, the largest, to 1, the smallest. Without a budget every
    kind is at its middle. Within one it is the network whose kinds differ least in their places, of those with `LEAST_SHARE` of the budget
    or more; where there is none, the one with most MACs.
    """
    if max_gmacs is None:
        return _at_places(space, dict.fromkeys(_num_places(space), 0.5))
    found: list[tuple[bool, float, Point]] = []
    kinds = _num_places(space)
    for steps in itertools.product(*(range(number) for number in kinds.values())):
        places = {kind: step / max(number - 1, 1) for (kind, number), step in zip(kinds.items(), steps, strict=True)}
        point = _at_places(space, places)
        costs = gmacs(space.subnet(point))
        if costs <= max_gmacs:
            fills = costs >= LEAST_SHARE * max_gmacs
            found.append((fills, min(places.values()) - max(places.values()) if fills else costs, point))
    # The smallest network is among them, and the budget was seen to hold one.
    return max(found, key=lambda one: one[:2])[2]


def _num_places(space: SupernetSpace) -> dict[str, int]:
    """By the kind of an axis, the number of places that are tried."""
    numbers: dict[str, int] = {}
    for axis in space.axes:
        number = len(_skippable(space, axis)) + 1 if _kind(axis) == KEEP else int(axis.size)
        numbers[_kind(axis)] = min(MAX_PLACES, max(numbers.get(_kind(axis), 0), number))
    return numbers


def _at_places(space: SupernetSpace, places: Mapping[str, float]) -> Point:
    point: dict[str, Scalar] = {}
    for axis in space.axes:
        place = places[_kind(axis)]
        if _kind(axis) == KEEP:
            skippable = _skippable(space, axis)
            point[axis.name] = skippable.index(axis.name) < len(skippable) - round(place * len(skippable))
        else:
            assert isinstance(axis.choices, tuple)
            point[axis.name] = axis.choices[round(place * (len(axis.choices) - 1))]
    return space.canonical(point)


def _kind(axis: Axis) -> str:
    """The name of an axis without its stage and block: `num_heads1_2` is of kind `num_heads`."""
    return re.sub(r"\d+(_\d+)?$", "", axis.name)


def _skippable(space: SupernetSpace, axis: Axis) -> list[str]:
    """The axes that skip blocks of the same stage as this one, in their order."""
    stage = axis.name.partition("_")[0]
    return [other.name for other in space.axes if _kind(other) == KEEP and other.name.partition("_")[0] == stage]


def random_points(space: SearchSpace, budget: Budget, number: int, seed: int) -> list[Point]:
    """Different points within the budget, each led into it from a uniform draw; a longer list begins with a shorter one.

    Raises PhaseStopped if so many are not found.
    """
    generator = random.Random(stream(seed, "random networks"))
    found: list[Point] = []
    for _ in range(NUM_STARTS * number):
        point, distance = climb(space, random_point(space, generator), budget, generator)
        if distance == 0 and point not in found:
            found.append(point)
        if len(found) == number:
            return found
    raise PhaseStopped(f"{len(found)} random networks of space {space.name!r} were found within {budget}, and --random asks for {number}")


def spread_points(space: SupernetSpace, number: int, seed: int) -> list[Point]:
    """Random subnets whose MACs are spread evenly from the smallest subnet to the largest, both of them included."""
    least, most = (macs / 1e9 for macs in space.macs_range)
    generator = random.Random(stream(seed, "spread networks"))
    subnets = space.search_space()
    points: list[Point] = [space.smallest_point]
    for place in range(1, number - 1):
        target = least + (most - least) * place / (number - 1)
        near = Budget(at_least={"gmacs": (1 - SPREAD) * target}, at_most={"gmacs": (1 + SPREAD) * target})
        reached: tuple[float, Point] = (math.inf, {})
        for _ in range(NUM_STARTS):
            point, distance = climb(subnets, random_point(subnets, generator), near, generator)
            reached = min(reached, (distance, point), key=lambda one: one[0])
            if distance == 0:
                break
        # Where no subnet is near enough, the nearest will do.
        points.append(reached[1])
    return [*points, space.largest_point]


def refuse_other_networks(studied: optuna.Study, networks: Mapping[str, Point]) -> None:
    """Raise PhaseStopped if a level of the comparison was trained as another network than it is now: their seeds would be mixed."""
    from optuna.trial import TrialState

    for trial in studied.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.RUNNING)):
        point = dict(proposed_point(trial))
        name = str(point.get("network"))
        own = {gene: value for gene, value in point.items() if gene not in ("factor", "network", "seed")}
        if name in networks and own != networks[name]:
            raise PhaseStopped(
                f"{studied.study_name} has trained another network as {name} than the search has found by now, "
                "or the budget has changed: compare under another --name"
            )


def retrain_design(options: VitResnasOptions) -> Design:
    """What is tested: the searched network against the hand-made one, and every searched one against every other kind."""
    from results.effects.design import Contrast, Design

    others = [name for name in options.levels if not name.startswith(SEARCHED)]
    pairs = [(name, other) for name in options.levels if name.startswith(SEARCHED) for other in others]
    contrasts = tuple(
        Contrast(factor="network", levels=(name,), baseline=other, outcome="top1_pct", is_primary=(name, other) == (SEARCHED, HAND_MADE))
        for name, other in pairs
    )
    outcomes = (Metric("top1_pct", "maximize"), Metric("nll", "minimize"))
    return Design(name="vit_resnas", contrasts=contrasts, outcomes=outcomes)
