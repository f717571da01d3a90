"""Accuracy of a network whose blocks reduce their tokens, with the weights that a training left: nothing is trained here.

A token reduction has no parameters, so the network that the phase `train` trained without reductions, under the seed of the trial's
recipe, lends its weights as they are. The network may also be one that has no reduction.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from space.cost import cost
from space.model import Model, build_model, require_arch
from space.recipe import Recipe
from space.reductions import without_reductions
from space.registry import SpecError
from workers.checkpoints import load_model
from workers.evaluator import Context, EvaluationError, NoSettings, evaluator
from workers.evaluators.accuracy import METRICS, judged
from workers.evaluators.train import WEIGHTS

TRAINED = "train"
"""The phase whose networks lend their weights."""


def check(model: Model, recipe: Recipe | None, settings: NoSettings) -> None:
    arch = require_arch(model, "reduced")
    if recipe is None:
        raise SpecError("reduced needs a recipe, whose seed says which training lends its weights")
    if cost(arch).params != cost(without_reductions(arch)).params:
        raise SpecError("reduced takes token reductions without parameters: nothing would train them")


@evaluator(
    "reduced",
    metrics=METRICS,
    check=check,
    uses_data=True,
    needs_dataset=True,
    memory_mb=2000,
)
def reduced(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """Accuracy of a network with token reductions and the weights of the plain one, without training."""
    check(model, context.recipe, settings)
    assert context.recipe is not None
    network = build_model(model, seed=0)
    network.load_state_dict(_trained(model, context).state_dict())
    return judged(network, model, context)


def _trained(model: Model, context: Context) -> nn.Module:
    """The plain network that was trained under this seed."""
    assert context.recipe is not None
    context.best(TRAINED)
    plain = without_reductions(require_arch(model, "reduced"))
    for trial in context.earlier[TRAINED]:
        if trial.seed == context.recipe.seed and (trial.workdir / WEIGHTS).exists():
            network, stored = load_model(trial.workdir / WEIGHTS)
            if stored == plain:
                return network
    raise EvaluationError("error", f"phase {TRAINED!r} left no network {plain.digest} that was trained under seed {context.recipe.seed}")
