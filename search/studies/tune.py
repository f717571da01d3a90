"""The recipe of one network, by successive halving.

    search/run.py tune --model vit_digits --data digits --recipes 18 --epochs 45

Recipes drawn at random, the default one first among them, are trained for a ninth of the epochs; the best third goes on to a third
of them, and the best third of those to the end (https://arxiv.org/abs/1502.07943). A recipe that goes on continues its own training.
Selection looks at the validation part. The default recipe stands in the same table, which therefore shows what tuning gains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from search.study import FineTuning, Phase, RunSettings, SettingsError, Study, study
from search.training_rounds import EPOCHS_AXIS, NUM_RUNGS, REDUCTION, halving_plan, rungs_of, stopping
from space.model import resized
from space.randomness import stream
from space.recipe import Recipe
from space.search_space import Axis, Candidate, SearchSpace

AXES: dict[str, tuple[Any, ...]] = {
    "lr_factor": (0.1, 0.3, 1.0, 3.0, 10.0),
    "weight_decay": (0.0, 0.05, 0.2),
    "drop_path": (0.0, 0.1),
    "label_smoothing": (0.0, 0.1),
    "mixing": ("none", "mixup_cutmix"),
}
DEFAULT = {"lr_factor": 1.0, "weight_decay": 0.05, "drop_path": 0.0, "label_smoothing": 0.1, "mixing": "none"}
"""The point of the default recipe."""


@dataclass(frozen=True, kw_only=True)
class TuneOptions(FineTuning):
    """Which network is trained, by how many recipes, and how long the longest training is."""

    model: str = field(default="vit_digits", metadata={"help": "as for describe"})
    recipes: int = field(default=18, metadata={"help": "recipes to try; the default recipe is one of them", "at_least": 1})
    epochs: int = field(
        default=45,
        metadata={
            "help": "epochs of a whole training; most recipes stop after a ninth or a third of them",
            "at_least": REDUCTION ** (NUM_RUNGS - 1),
        },
    )
    batch_size: int = field(default=32, metadata={"help": "images per step", "at_least": 1})
    lr: float = field(default=3e-3, metadata={"help": "learning rate that lr_factor multiplies", "above": 0})

    @property
    def rungs(self) -> tuple[int, ...]:
        """The epochs after which recipes are compared, the last one the whole training."""
        return rungs_of(self.epochs)


@study("tune", options=TuneOptions)
def tune(run: RunSettings) -> Study:
    """Find a recipe for one network by successive halving."""
    options: TuneOptions = run.options
    for name, flag in (("num_trials", "--trials"), ("strategy", "--strategy"), ("proxy_img_size", "--proxy-img-size")):
        if getattr(run, name) is not None:
            raise SettingsError(f"{flag} means nothing here: --recipes and --epochs say what is trained")
    if not run.budget.is_empty:
        raise SettingsError(f"{run.budget} means nothing here: --model says which network is trained")
    if len(run.objectives) > 1:
        raise SettingsError(f"--objectives {','.join(run.objectives)}: successive halving goes by one objective")
    points = drawn_recipes(options.recipes, run.seed)
    phase: Phase

    def propose(phases: Mapping[str, Any]):
        from search.strategies.halving import Halving

        return Halving(points, rungs=options.rungs, goal=phase.goals[0], reduction=REDUCTION, epochs_axis=EPOCHS_AXIS)

    phase = Phase(
        name="recipes",
        space=recipe_space(options, run),
        evaluators=run.calls("train"),
        objectives=run.objectives or ("val_top1_pct",),
        propose=propose,
        plan=halving_plan(options.recipes, options.rungs, "recipes"),
    )
    return Study(phases=(phase,))


def recipe_space(options: TuneOptions, run: RunSettings) -> SearchSpace:
    """Recipes, and after how many epochs their training is looked at."""
    model = resized(run.model(options.model), img_size=run.img_size, num_classes=run.num_classes)
    weights = run.weights_for(model, options.model)
    base = Recipe(
        epochs=options.epochs,
        seed=run.seed,
        batch_size=options.batch_size,
        lr=options.lr,
        layer_decay=options.layer_decay,
        freeze=options.freeze,
    )

    def decode(params: Mapping[str, Any]) -> Candidate:
        changes = {name: params[name] for name in AXES if name != "lr_factor"}
        recipe = replace(base, lr=base.lr * params["lr_factor"], min_lr=base.min_lr * params["lr_factor"], **changes)
        told = " ".join(f"{name}={params[name]}" for name in AXES if params[name] != DEFAULT[name]) or "default recipe"
        return Candidate(
            model=model,
            recipe=recipe,
            weights=weights,
            settings=stopping(params[EPOCHS_AXIS], options.epochs),
            label=f"{params[EPOCHS_AXIS]}/{options.epochs} epochs {told}",
        )

    axes = (Axis(name=name, choices=choices) for name, choices in AXES.items())
    return SearchSpace(
        name=f"tune/{options.model}/{model.digest[:8]}", axes=(*axes, Axis(name=EPOCHS_AXIS, choices=options.rungs)), decode=decode
    )


def drawn_recipes(number: int, seed: int) -> list[dict[str, Any]]:
    """The default recipe, then others drawn without replacement; a longer list begins with a shorter one.

    Raises SettingsError if `number` is above the number of recipes.
    """
    names, choices = tuple(AXES), tuple(AXES.values())
    shape = tuple(map(len, choices))
    if number > np.prod(shape):
        raise SettingsError(f"--recipes is {number}; at most {np.prod(shape)} is expected")
    order = np.random.default_rng(stream(seed, "recipes")).permutation(np.prod(shape))
    drawn = [
        {name: values[i] for name, values, i in zip(names, choices, np.unravel_index(index, shape), strict=True)}
        for index in order.tolist()
    ]
    return [DEFAULT, *(point for point in drawn if point != DEFAULT)][:number]
