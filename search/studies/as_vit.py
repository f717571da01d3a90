"""Auto-scaling Vision Transformers without Training (As-ViT), https://arxiv.org/abs/2202.11921, sections 3 and 4.

    search/run.py as_vit --trials 200

Phase `topology` searches the 4,556,250 seed topologies by two scores of the untrained network: expected length
distortion (higher is better) and NTK condition number (lower is better). Phase `growth` scales the best of them in
depth and width, scoring a narrow proxy of every candidate, into a family of networks up to `--max params_m=M`, in `--rounds` at most.
`--objectives` puts other scores in the place of both, in both phases.

Every network of a study is held to the upper bounds. Lower bounds are for the family alone: seed topologies are small, and
growth passes through small networks, so those below are measured too and left out of the family.

Where this deviates from the released code: the seed topology is the best measured one, by the sum of its ranks under
both scores, instead of the arg-max of a policy that may never have been measured; growth begins with the seed itself;
ties are broken in the right direction; and the scores are the corrected ones of `workers/evaluators/as_vit.py`.

What the scores add (results/reports/as_vit_cpu_202611.md, topologies drawn at random): length distortion orders them as the
free closed form C^2 K2 K3 K4 does, Kendall's tau +0.94 [+0.91, +0.96] at 224 px and +0.91 [+0.88, +0.93] at 128 px; the NTK
condition number follows the same product, tau -0.70 [-0.83, -0.55], with a standard error of 6 to 17 % per network. The
search picks the largest merging kernels and decides little else. Every leaderboard of this study prints these columns.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from results.records import Metric
from search.budget import Budget
from search.study import FITTED, Options, Phase, RunSettings, SettingsError, Study, study
from space.families.as_vit import TOPOLOGY_AXES, growth_space, topology_space

if TYPE_CHECKING:
    import optuna

SCORES = ("length_distortion", "ntk_condition")
NUM_CLASSES = 1000
"""Of ImageNet, the paper's data: for data without classes."""
DEFAULT_MAX_PARAMS_M = 30.0
"""As-ViT-Small, the smallest published network of the family, has 29 M parameters."""
DEFAULT_ROUNDS = 8
"""As-ViT-Small is six rounds above its seed."""
FIRST_MAX_PARAMS_M = 100.0
"""The default of studies that were created before `FITTED`; they had no limit of rounds."""


@dataclass(frozen=True, kw_only=True)
class AsVitOptions(Options):
    """How far growth goes, beside the budget."""

    rounds: int = field(default=0, metadata={"help": f"of growth at most, each one block deeper; 0: {DEFAULT_ROUNDS}", "at_least": 0})


@study("as_vit", options=AsVitOptions)
def as_vit(run: RunSettings) -> Study:
    """Search a seed topology without training, then grow it in width and depth (As-ViT)."""
    options: AsVitOptions = run.options
    num_classes = run.num_classes_or(NUM_CLASSES)
    sizes = {"img_size": run.img_size or 224, "proxy_img_size": run.proxy_img_size or run.img_size or 224, "num_classes": num_classes}
    evaluators = run.calls("as_vit", "as_vit_closed_form", "cost")
    is_first = run.defaults < FITTED
    max_params_m = _max_params_m(run.budget, FIRST_MAX_PARAMS_M if is_first else DEFAULT_MAX_PARAMS_M)
    max_rounds = options.rounds or (None if is_first else DEFAULT_ROUNDS)
    reported = Budget(at_most={"params_m": max_params_m, **run.budget.at_most}, at_least=run.budget.at_least)
    topology = Phase(
        name="topology",
        space=topology_space(**sizes),
        evaluators=evaluators,
        objectives=run.objectives or SCORES,
        budget=run.budget.upper(),
        strategy=run.strategy or "policy_gradient",
        num_trials=run.num_trials or 200,
    )

    def propose(phases: Mapping[str, optuna.Study]):
        from search.strategies.growth import Growth

        seed = best_topology(phases["topology"], topology.goals)
        return Growth(
            space=growth.space,
            topology={axis: seed.params[axis] for axis in TOPOLOGY_AXES},
            max_params=round(reported.at_most["params_m"] * 1e6),
            objectives=growth.goals,
            reported=reported,
            max_rounds=max_rounds,
        )

    growth = Phase(
        name="growth",
        space=growth_space(**sizes),
        evaluators=evaluators,
        objectives=run.objectives or SCORES,
        budget=reported.upper(),
        propose=propose,
        plan=_growth_plan(run.budget, reported, max_rounds),
    )
    if not reported.at_least:
        return Study(phases=(topology, growth))
    # The phases are held to the upper bounds alone, so nothing else would find out.
    reported.check_reachable(growth.space)
    note = (
        f"{Budget(at_least=reported.at_least)} is for the family; smaller networks on the way to it are measured, too, and left out of it"
    )
    return Study(phases=(topology, growth), notes=(note,))


def _growth_plan(given: Budget, reported: Budget, max_rounds: int | None) -> str:
    from search.strategies.growth import most_trials

    rounds = "as many rounds as"
    if max_rounds is not None:
        rounds = f"at most {max_rounds} rounds (--rounds), which is at most {1 + most_trials(max_rounds)} trials with the seed, as long as"
    default = "" if "params_m" in given.at_most else " (default)"
    limits = ", ".join(f"{metric} {bound:g}{default if metric == 'params_m' else ''}" for metric, bound in reported.at_most.items())
    return f"{rounds} a network is within {limits} (--max)"


def _max_params_m(budget: Budget, default: float) -> float:
    """Where growth ends, in millions of parameters; raises SettingsError if that is below the least that is asked for."""
    if "params_m" not in budget.at_most and budget.at_least.get("params_m", 0) > default:
        raise SettingsError(
            f"--min params_m={budget.at_least['params_m']:g}: growth ends at {default:g} unless told otherwise; give --max params_m=M too"
        )
    return budget.at_most.get("params_m", default)


def best_topology(studied: optuna.Study, goals: tuple[Metric, ...]) -> optuna.trial.FrozenTrial:
    """The complete trial with the smallest sum of ranks over the objectives, the earliest of equals.

    Raises SettingsError if no trial is complete.
    """
    from optuna.trial import TrialState

    from search.strategies.growth import best_by_ranks

    trials = studied.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    if not trials:
        raise SettingsError(f"{studied.study_name} has no complete trial to go on from")
    return min(best_by_ranks(trials, goals), key=lambda trial: trial.number)
