"""Ablations stated from per-image outcomes with planted effects, and their forest plot."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from results.columns import TEXT_WIDTH
from results.effects.convergence import MAX_LOSS_FALL, loss_fall
from results.effects.design import Contrast, Design
from results.effects.predictions import Cell, Predictions, read_predictions
from results.effects.statistics import holm, mcnemar_test
from results.effects.table import effects_table, levels_table
from results.effects.text import effects_text, levels_text, published_sources, reading_notes
from results.effects.verdict import excludes_zero
from results.figures.forest import panel_figures, write_html, write_png
from results.figures.style import PAPER
from results.formats import format_loss_fall
from results.records import Metric

NUM_IMAGES = 200
TOP1, NLL = Metric("top1_pct", "maximize"), Metric("nll", "minimize")
LABELS = np.repeat([0, 1, 2], [100, 60, 40])


def design(*contrasts: Contrast, outcomes: tuple[Metric, ...] = (TOP1,), **options) -> Design:
    return Design(name="ablations", contrasts=contrasts, outcomes=outcomes, **options)


def against_none(level: str, **options) -> Contrast:
    return Contrast(**{"factor": "mixing", "levels": (level,), "baseline": "none", "outcome": "top1_pct", **options})


PRIMARY = against_none("mixup", is_primary=True)


def cells(
    effects: Mapping[str, float], num_seeds: int, *, seed_noise: float = 3.0, noise: float = 2.0, outcome: str = "top1_pct"
) -> list[Cell]:
    """Trials whose outcome is 50 + effect + what the seed and the image do to every level + noise of their own."""
    generator = np.random.default_rng(0)
    images, seeds = 20 * generator.normal(size=NUM_IMAGES), seed_noise * generator.normal(size=num_seeds)
    return [
        trial(level, seed, 50 + effect + seeds[seed] + images + noise * generator.normal(size=NUM_IMAGES), outcome=outcome)
        for level, effect in effects.items()
        for seed in range(num_seeds)
    ]


def trial(level: str, seed: int, values: np.ndarray, *, outcome: str = "top1_pct", ids: np.ndarray | None = None) -> Cell:
    ids = np.arange(NUM_IMAGES) if ids is None else ids
    predictions = Predictions(ids=ids, labels=LABELS, outcomes={outcome: values}, num_classes=3)
    return Cell(factor="mixing", level=level, seed=seed, predictions=predictions)


def of_differences(values: np.ndarray, **options) -> pd.Series:
    """The row of a primary contrast whose differences (S, N) are these."""
    trials = [trial("none", seed, np.zeros(NUM_IMAGES)) for seed in range(len(values))]
    trials += [trial("mixup", seed, one) for seed, one in enumerate(values)]
    return effects_table(trials, design(against_none("mixup", is_primary=True, **options))).iloc[0]


def test_a_planted_effect_is_found_with_its_interval():
    found = effects_table(cells({"none": 0, "mixup": 2.5}, 8), design(PRIMARY)).iloc[0]
    assert found["effect"] == pytest.approx(2.5, abs=0.3)  # standard error 2 sqrt(2 / 1600) = .07
    assert found["low"] < 2.5 < found["high"] < 3.5
    assert (found["p"], found["smallest_p"], found["n_seeds"], found["n_images"]) == (2 / 256, 2 / 256, 8, NUM_IMAGES)
    assert found["mean"] - found["baseline_mean"] == pytest.approx(found["effect"])
    assert found["rejected"]
    assert found["is_shown"]
    assert found["verdict"].startswith("better by 2.")


def test_pairing_takes_out_what_seed_and_image_do_to_both_arms():
    loud, quiet = (
        effects_table(cells({"none": 0, "mixup": 1}, 8, seed_noise=noise), design(PRIMARY), num_resamples=500).iloc[0]
        for noise in (30.0, 0.0)
    )
    assert loud[["effect", "low", "high", "p"]].tolist() == pytest.approx(quiet[["effect", "low", "high", "p"]].tolist(), abs=1e-5)


def test_lower_is_better_where_the_outcome_says_so():
    on_nll = against_none("mixup", is_primary=True, outcome="nll")
    found = effects_table(cells({"none": 0, "mixup": -1}, 8, outcome="nll"), design(on_nll, outcomes=(NLL,))).iloc[0]
    assert found["effect"] < 0
    assert found["verdict"].startswith("better by 0.99")
    assert found["verdict"].split(":")[0].endswith("nats")
    assert (found["unit"], math.isnan(found["margin"]), math.isnan(found["equivalent_p"])) == ("nats", True, True)


def test_no_effect_is_printed_as_none_and_within_the_margin():
    found = effects_table(cells({"none": 0, "mixup": 0}, 8), design(PRIMARY)).iloc[0]
    assert not found["rejected"]
    assert found["verdict"].startswith("no difference of more than 1 point: 90 % interval [-")
    assert found["equivalent_p"] < 0.01
    assert found["equivalent"]
    assert found["low"] < found["low_90"] < found["high_90"] < found["high"]


def test_what_is_neither_shown_nor_within_the_margin_is_inconclusive():
    found = effects_table(cells({"none": 0, "mixup": 0}, 8, noise=60.0), design(PRIMARY)).iloc[0]
    assert found["verdict"].startswith("inconclusive: interval [")
    assert (found["no_harm"], found["equivalent"]) == (False, False)


def test_seeds_that_agree_on_images_that_do_not_are_better_on_these_images_only():
    """Every seed gains 30 on one half of the images and loses 29 on the other: another test set may have less of the first."""
    images = np.zeros(NUM_IMAGES)
    images[:100], images[100:] = 30.0, -29.0
    found = of_differences(images + 0.01 * np.random.default_rng(0).normal(size=(8, 1)))
    assert found["rejected"]
    assert not found["is_shown"]
    assert found["low"] < 0 < found["effect"] < found["high"]
    assert found["verdict"].startswith(
        "better by 0.50 points on these test images, p 0.0078; the interval over other images includes 0: interval [-"
    )


@pytest.mark.parametrize(("effect", "is_better"), [(0.3, True), (-0.3, False)])
def test_a_small_harm_is_shown_and_bounded(effect: float, is_better: bool):
    found = effects_table(cells({"none": 0, "mixup": effect}, 8, noise=0.5), design(PRIMARY)).iloc[0]
    assert found["is_shown"]
    assert found["verdict"].startswith("better by" if is_better else "worse by")
    assert "; no difference of more than 1 point: 90 % interval" in found["verdict"]


def test_no_harm_is_claimed_where_only_the_other_end_leaves_the_margin():
    found = of_differences(np.array([-0.8, 3.0, 0.1, 2.5, -0.5, 2.0, 0.9, -0.6])[:, None] + np.zeros(NUM_IMAGES))
    assert (found["no_harm"], found["equivalent"]) == (True, False)
    assert found["verdict"].startswith("inconclusive: ")
    assert "no harm of more than 1 point: 90 % interval [-" in found["verdict"]


def test_a_single_seed_says_nothing_of_harm():
    found = effects_table(cells({"none": 0, "mixup": 0}, 1, noise=0.1), design(PRIMARY)).iloc[0]
    assert (found["no_harm"], found["equivalent"]) == (False, False)


def test_equal_differences_of_all_seeds_have_no_t_test():
    assert math.isnan(of_differences(np.full((6, NUM_IMAGES), 0.5))["equivalent_p"])


def test_one_sided_tests_say_so_and_what_goes_against_them_is_the_opposite():
    greater = against_none("mixup", is_primary=True, alternative="greater")
    for effect, words in ((2.5, "better by 2."), (-2.5, "the opposite of what was tested: interval [-2.")):
        found = effects_table(cells({"none": 0, "mixup": effect}, 8), design(greater)).iloc[0]
        assert found["verdict"].startswith(words)
        assert "p one-sided " in found["verdict"]
        assert found["rejected"] == (effect > 0)


@pytest.mark.parametrize(("alternative", "smallest", "needed"), [("two-sided", 0.25, 6), ("greater", 0.125, 5)])
def test_three_seeds_say_that_they_cannot_reject(alternative: str, smallest: float, needed: int):
    plan = design(against_none("mixup", is_primary=True, alternative=alternative, published=0.5))
    found = effects_table(cells({"none": 0, "mixup": 20}, 3), plan).iloc[0]
    assert found["p"] == found["smallest_p"] == smallest
    assert f"3 seeds cannot reject at 0.05 (smallest p {smallest:.2g}), {needed} could" in found["verdict"]
    assert found["verdict"].startswith("inconclusive: interval [")
    assert found["could_have_seen"] is False
    assert found["mde"] == found["mde_seeds"] == math.inf
    assert plan.num_seeds_needed == needed


def test_one_seed_has_an_interval_of_images_and_nothing_over_seeds():
    found = effects_table(cells({"none": 0, "mixup": 20}, 1), design(PRIMARY)).iloc[0]
    assert "over images only excludes 0, p 1 does not reject; 1 seed cannot reject" in found["verdict"]
    assert found["mde"] == found["mde_seeds"] == math.inf
    assert math.isnan(found["equivalent_p"])


def test_two_networks_of_one_seed_are_compared_by_mcnemar():
    generator = np.random.default_rng(0)
    right = {level: generator.random(NUM_IMAGES) < share for level, share in (("none", 0.6), ("mixup", 0.8), ("cutmix", 0.6))}
    trials = [trial(level, 0, 100.0 * is_right) for level, is_right in right.items()]
    plan = design(PRIMARY, Contrast(factor="mixing", levels=("mixup", "cutmix"), baseline="none", outcome="top1_pct"))
    pair, mean = effects_table(trials, plan, num_resamples=200).to_dict("records")
    assert pair["p_mcnemar"] == mcnemar_test(right["mixup"], right["none"]) < 0.01
    assert f"McNemar's test of these two networks, which says nothing of other trainings: p {pair['p_mcnemar']:.2g}" in pair["verdict"]
    assert not pair["is_shown"]
    assert math.isnan(mean["p_mcnemar"]), "a mean over networks is not a network"
    of_two_seeds = effects_table([*trials, *(dataclasses.replace(one, seed=1) for one in trials)], plan, num_resamples=200)
    assert of_two_seeds["p_mcnemar"].isna().all()


def test_whether_the_published_effect_could_have_been_seen():
    def seen(published: float) -> bool:
        plan = design(against_none("mixup", is_primary=True, published=published))
        return effects_table(trials, plan, num_resamples=100).iloc[0]["could_have_seen"]

    trials = cells({"none": 0, "mixup": 0}, 8, noise=8.0)
    row = effects_table(trials, design(PRIMARY), num_resamples=100).iloc[0]
    limit = row["mde"]
    assert limit > max(row["mde_seeds"], row["mde_images"]), "the rule asks for the test and for the interval"
    assert (seen(1.01 * limit), seen(-1.01 * limit), seen(0.99 * limit)) == (True, True, False)
    assert row["could_have_seen"] is None


def learning(trials: list[Cell], **losses: list[float]) -> list[Cell]:
    """The trials with the training losses of their levels."""
    return [
        dataclasses.replace(one, predictions=dataclasses.replace(one.predictions, train_loss=np.array(losses[one.level])))
        if one.level in losses
        else one
        for one in trials
    ]


DONE, STILL_LEARNING = [2.0] * 10 + [0.5] * 10, np.linspace(2.0, 1.0, 20).tolist()


def test_convergence_is_the_fall_between_the_last_two_quarters():
    assert loss_fall([9.0, 9.0, 9.0, 9.0, 2.0, 1.0, 0.75, 0.25]) == 1.0
    assert loss_fall([9.0, *[1.0] * 8, *[0.5] * 2]) == 0.5, "of 11 epochs, quarters are two epochs: the last four count"
    assert loss_fall(DONE[:7]) == math.inf, "too few epochs to have converged"
    assert math.isnan(loss_fall([math.nan] * 10 + DONE[:4]))
    assert loss_fall([math.nan] * 4 + DONE[-10:]) == 0.0, "what came before does not matter"


def test_a_cosine_that_ends_flat_does_not_hide_that_the_loss_was_falling():
    """The loss falls with the area under the rate, which a cosine spends before its end; a tenth of the epochs later it is flat."""
    rate = (1 + np.cos(np.pi * np.arange(20) / 19)) / 2
    losses = 2.3 - 2.0 * rate.cumsum() / rate.sum()
    assert losses[-2] - losses[-1] < 0.01
    assert loss_fall(losses) > MAX_LOSS_FALL


def test_an_arm_that_still_learns_shows_nothing_and_claims_no_bound():
    trials = cells({"none": 0, "mixup": 2.5, "cutmix": 0.0}, 8)
    plan = design(PRIMARY, against_none("cutmix"))
    unknown = effects_table(trials, plan)
    done = effects_table(learning(trials, none=DONE, mixup=DONE, cutmix=DONE), plan)
    learns = effects_table(learning(trials, none=DONE, mixup=STILL_LEARNING, cutmix=STILL_LEARNING), plan)
    for table, is_converged in ((unknown, [None, None]), (done, [True, True]), (learns, [False, False])):
        assert table["is_converged"].tolist() == is_converged
        assert table["p"].tolist() == unknown["p"].tolist(), "the flag changes no test"
    assert done["verdict"].tolist() == unknown["verdict"].tolist()
    assert done["is_shown"].tolist() == [True, False]
    assert done["equivalent"].tolist() == [False, True]
    assert not learns[["is_shown", "no_harm", "equivalent"]].any(axis=None)
    assert learns["unconverged"].tolist() == ["mixup 0.26 nats", "cutmix 0.26 nats"]
    better, neither = learns["verdict"]
    nothing = "not converged, so nothing is shown: the training loss still fell"
    assert better.startswith(f"{nothing} (mixup 0.26 nats); after these epochs better by 2.")
    assert neither.startswith(f"{nothing} (cutmix 0.26 nats)")
    assert "shown" not in better.removeprefix(nothing)
    assert "no difference" not in neither


def test_one_arm_that_still_learns_is_enough_and_unknown_arms_are_unknown():
    trials = cells({"none": 0, "mixup": 1, "cutmix": 1}, 6)
    plan = design(Contrast(factor="mixing", levels=("mixup", "cutmix"), baseline="none", outcome="top1_pct", is_primary=True))
    of_one = effects_table(learning(trials, none=DONE, mixup=DONE, cutmix=STILL_LEARNING), plan, num_resamples=200).iloc[0]
    assert (of_one["is_converged"], of_one["unconverged"]) == (False, "cutmix 0.26 nats")
    partly = effects_table(learning(trials, none=DONE, mixup=STILL_LEARNING), plan, num_resamples=200)
    assert partly["is_converged"].tolist() == [False]
    partly = effects_table(learning(trials, none=DONE, mixup=DONE), plan, num_resamples=200)
    assert partly["is_converged"].tolist() == [None]
    assert "whether those arms converged is not known" in " ".join(reading_notes(partly))


def test_convergence_is_of_the_mean_over_seeds_and_stands_with_the_levels():
    trials = cells({"none": 0, "mixup": 1}, 2)
    one_slow_seed = [
        *learning([one for one in trials if one.seed == 0], none=DONE, mixup=STILL_LEARNING),
        *learning([one for one in trials if one.seed == 1], none=DONE, mixup=DONE),
    ]
    fall = loss_fall(STILL_LEARNING) / 2
    levels = levels_table(one_slow_seed, design(PRIMARY)).set_index("level")
    assert levels["loss_fall"].to_dict() == pytest.approx({"none": 0.0, "mixup": fall})
    assert levels["is_converged"].to_dict() == {"none": True, "mixup": False}
    assert [format_loss_fall(row) for row in levels.to_dict("records")] == ["0.00", "0.13, not converged"]
    assert "0.13, not converged" in levels_text(levels.reset_index())[0]
    assert levels_table(trials, design(PRIMARY))["is_converged"].tolist() == [None, None]


def test_how_arms_compare_says_nothing_of_their_convergence():
    """A6 of the protocol: a check that looked at the ordering would manufacture the result."""
    trials = learning(cells({"none": 0, "mixup": 30}, 6), none=DONE, mixup=STILL_LEARNING)
    for effect in (-30.0, 0.0, 30.0):
        others = learning(cells({"none": 0, "mixup": effect}, 6), none=DONE, mixup=STILL_LEARNING)
        flags = [effects_table(made, design(PRIMARY), num_resamples=100)["unconverged"].tolist() for made in (trials, others)]
        assert flags[0] == flags[1] == ["mixup 0.26 nats"]


def test_an_interval_that_ends_at_0_up_to_rounding_does_not_exclude_it():
    ends = [(1e-6, 1.36), (-1.36, -1e-6), (0.0, 1.36), (0.01, 1.36), (-1.36, -0.01), (-0.1, 1.36)]
    assert [excludes_zero({"low": low, "high": high}) for low, high in ends] == [False, False, False, True, True, False]
    assert excludes_zero({"low": 2.0, "high": 2.0})


def test_the_mean_of_levels_against_the_baseline():
    anything = Contrast(factor="mixing", levels=("mixup", "cutmix"), baseline="none", outcome="top1_pct", is_primary=True)
    found = effects_table(cells({"none": 0, "mixup": 1, "cutmix": 5}, 6), design(anything)).iloc[0]
    assert found["contrast"] == "mean(mixup, cutmix) - none"
    assert found["effect"] == pytest.approx(3, abs=0.3)


def test_all_but_the_primary_are_corrected_together_and_the_primary_comes_first():
    levels = ("cutmix", "mixup", "patch_mixing", "transmix")
    plan = design(*(against_none(level, is_primary=level == "mixup") for level in levels))
    table = effects_table(cells({"none": 0, "cutmix": 0.1, "mixup": 0.5, "patch_mixing": 3, "transmix": 0}, 9), plan)
    assert table["contrast"].tolist() == [f"{level} - none" for level in ("mixup", "cutmix", "patch_mixing", "transmix")]
    assert table["family_size"].tolist() == [1, 3, 3, 3]
    assert math.isnan(table["p_holm"][0])
    assert table["p_holm"][1:].tolist() == pytest.approx(holm(table["p"][1:].to_numpy()).tolist())
    assert table["p_holm"][2] == pytest.approx(3 * 2 / 2**9)
    assert plan.num_seeds_needed == 7  # 3 * 2 / 2^7 = .047


def test_a_primary_contrast_is_one_of_many_on_the_other_outcomes():
    plan = design(PRIMARY, against_none("cutmix"), outcomes=(TOP1, NLL))
    assert [plan.family_size(contrast, name) for contrast in plan.contrasts for name in ("top1_pct", "nll")] == [1, 2, 1, 2]
    one_sided = against_none("mixup", alternative="greater")
    assert (plan.alternative(one_sided, "top1_pct"), plan.alternative(one_sided, "nll")) == ("greater", "two-sided")


def test_what_is_not_measured_stays_in_its_family_and_is_named():
    plan = design(PRIMARY, against_none("cutmix"), against_none("transmix"))
    trials = [cell for cell in cells({"none": 0, "mixup": 1, "cutmix": 1}, 6) if (cell.level, cell.seed) != ("cutmix", 4)]
    table = effects_table(trials, plan, num_resamples=200)
    assert table["n_seeds"].tolist() == [6, 5, 0]
    assert table["missing"].tolist() == ["", "cutmix lacks seed 4 (not run)", "transmix lacks seed 0, 1, 2, 3, 4 and 1 more (not run)"]
    assert table["p_holm"][1] == pytest.approx(2 * table["p"][1])
    assert table["verdict"][2].startswith("not measured: no seed has every arm (transmix lacks")
    text = effects_text(table)
    assert "missing: cutmix lacks seed 4 (not run)" in " ".join(text.split())
    assert "not measured: mixing, top1_pct: transmix - none" in text
    assert effects_table([], plan)["n_seeds"].sum() == 0


def test_what_failed_is_told_from_what_was_not_run():
    trials = [cell for cell in cells({"none": 0, "mixup": 1}, 6) if cell.key not in {("mixing", "mixup", 2), ("mixing", "mixup", 4)}]
    absent = {("mixing", "mixup", 4): "failed: non_finite", ("mixing", "none", 9): "failed: timeout"}
    found = effects_table(trials, design(PRIMARY), absent=absent, num_resamples=200).iloc[0]
    missing = "none lacks seed 9 (failed: timeout); mixup lacks seed 2 (not run), seed 4 (failed: non_finite)"
    assert (found["n_seeds"], found["missing"]) == (4, missing)
    assert found["verdict"].endswith(f"missing: {missing}")


def test_levels_are_summed_up_over_seeds():
    trials = cells({"none": 0, "mixup": 1}, 3)
    levels = levels_table(trials, design(PRIMARY), absent={("mixing", "mixup", 3): "failed: timeout"})
    means = [cell.predictions.outcomes["top1_pct"].mean() for cell in trials if cell.level == "mixup"]
    row = levels.loc[levels["level"] == "mixup"].iloc[0]
    assert (row["mean"], row["sd"]) == pytest.approx((np.mean(means), np.std(means, ddof=1)))
    assert (row["n_seeds"], row["missing"]) == (3, "mixup lacks seed 3 (failed: timeout)")
    assert f"{np.mean(means):.2f} ± {np.std(means, ddof=1):.2f}" in levels_text(levels)[0]


def test_levels_are_ranked_over_seeds_within_their_factor_and_only_where_they_are_paired():
    # The best seed of all is one of the level whose mean is worst.
    means = {"none": (60, 60, 60), "mixup": (80, 20, 20), "cutmix": (70, 70, 70)}
    trials = [trial(level, seed, np.full(NUM_IMAGES, float(mean))) for level, own in means.items() for seed, mean in enumerate(own)]
    plan = design(PRIMARY, against_none("cutmix"))
    levels = levels_table(trials, plan)
    assert levels.set_index("level")["rank"].to_dict() == {"none": 2, "mixup": 3, "cutmix": 1}
    lines = [line.split() for line in levels_text(levels)[0].splitlines()[-3:]]
    assert [line[:4] for line in lines] == [
        [str(rank), "mixing:", *mean] for rank, *mean in ((1, "cutmix", "70.00"), (2, "none", "60.00"), (3, "mixup", "40.00"))
    ]
    lacking = levels_table(trials[:-1], plan).set_index("level")["rank"]
    assert math.isnan(lacking["cutmix"])
    assert lacking[["none", "mixup"]].tolist() == [1, 2]


def test_images_are_matched_by_id_not_by_place():
    trials = cells({"none": 0, "mixup": 2}, 6)
    expected = effects_table(trials, design(PRIMARY), num_resamples=200)
    shuffled = []
    for cell in trials:
        order = np.random.default_rng(cell.seed + 10 * (cell.level == "mixup")).permutation(NUM_IMAGES)
        known = cell.predictions
        shuffled.append(trial(cell.level, cell.seed, known.outcomes["top1_pct"][order], ids=known.ids[order]))
    found = effects_table(shuffled, design(PRIMARY), num_resamples=200)
    assert found["effect"][0] == pytest.approx(expected["effect"][0])
    assert found["mde_images"][0] == pytest.approx(expected["mde_images"][0])


def test_a_trial_on_other_images_is_left_out_and_named():
    trials = cells({"none": 0, "mixup": 2}, 3)
    other = [*trials[:-1], trial("mixup", 2, np.zeros(NUM_IMAGES), ids=np.arange(NUM_IMAGES) + 3)]
    found = effects_table(other, design(PRIMARY), num_resamples=100).iloc[0]
    assert found["n_seeds"] == 2
    assert "mixup lacks seed 2 (this trial and most are not of the same test images: only the first has 200, 201, 202" in found["missing"]
    with pytest.raises(ValueError, match="two trials of factor 'mixing', level 'mixup', seed 2"):
        effects_table([*trials, trials[-1]], design(PRIMARY))


def test_sentences_are_true_of_their_table():
    trials = cells({"none": 0, "mixup": 1}, 6)
    key = ("mixing", "mixup - none", "top1_pct")
    early, late, unknown = (
        effects_table(trials, design(PRIMARY), num_trials_before=before, num_resamples=50) for before in ({key: 0}, {key: 4}, None)
    )
    assert "named before the first trial of its arms" in "".join(reading_notes(early))
    assert not any("named before" in note for table in (late, unknown) for note in reading_notes(table))
    assert late["verdict"][0].endswith("registered after 4 trials of its arms")
    assert "registered" not in early["verdict"][0] + unknown["verdict"][0]
    assert "p: exact sign flips over seeds" in reading_notes(early)
    many = effects_table(cells({"none": 0, "mixup": 1}, 21), design(PRIMARY), num_resamples=50)
    assert "p: random sign flips over seeds" in reading_notes(many)


def test_a_design_survives_json_and_its_digest_is_of_its_content():
    plan = design(
        against_none("mixup", is_primary=True, published=0.7, source="a paper, Table 1"), against_none("cutmix"), outcomes=(TOP1, NLL)
    )
    again = Design.from_json(json.loads(json.dumps(plan.to_json())))
    assert again == plan
    assert again.digest == plan.digest
    assert dataclasses.replace(plan, alpha=0.01).digest != plan.digest
    with pytest.raises(ValueError, match=r"not a design: TypeError.*colour"):
        Design.from_json({**plan.to_json(), "colour": "red"})
    with pytest.raises(ValueError, match="not a design: KeyError: 'contrasts'"):
        Design.from_json({})


def test_a_registered_design_keeps_its_digest():
    outcomes = (TOP1, NLL, Metric("patch_drop_auc", "maximize"))
    # Registered before a metric had a unit.
    assert design(PRIMARY, outcomes=outcomes).digest == "ee946eccfe2f86d1"


@pytest.mark.parametrize(
    ("contrasts", "reason"),
    [
        ((), "has no contrast"),
        ((against_none("mixup"),), "exactly one primary contrast, has 0"),
        ((PRIMARY, against_none("cutmix", is_primary=True)), "has 2: mixup - none; cutmix - none"),
        ((PRIMARY, PRIMARY), "a contrast twice"),
        ((against_none("none", is_primary=True),), "differ from each other and from the baseline"),
        ((against_none("mixup", levels=()),), "a contrast of mixing needs levels"),
        ((against_none("mixup", outcome="top5_pct"),), "unknown outcome 'top5_pct'; known: top1_pct"),
        ((against_none("mixup", alternative="more"),), "alternative 'more'; known: two-sided, greater, less"),
    ],
)
def test_a_design_that_contradicts_itself_is_refused(contrasts: tuple[Contrast, ...], reason: str):
    with pytest.raises(ValueError, match=reason):
        design(*contrasts)


@pytest.mark.parametrize("options", [{"alpha": 0.0}, {"alpha": 0.5}, {"margin_pct": 0.0}])
def test_a_design_needs_a_level_and_a_margin(options: dict[str, float]):
    with pytest.raises(ValueError, match=r"needs 0 < alpha <= 0\.2 and margin_pct > 0"):
        design(PRIMARY, **options)


def test_predictions_are_read_as_accuracy_likelihood_and_areas(tmp_path: Path):
    logits = np.array([[2.0, 0, 0], [0, 1000, 0], [0, 0, 0]], dtype=np.float32)
    np.savez(tmp_path / "predictions.npz", ids=np.array([7, 3, 5]), labels=np.array([0, 0, 2]), logits=logits)
    old = read_predictions(tmp_path / "predictions.npz")
    assert (set(old.outcomes), old.train_loss) == ({"top1_pct", "nll"}, None)
    stored = dict(np.load(tmp_path / "predictions.npz"))
    np.savez(tmp_path / "predictions.npz", **stored, train_loss=np.array([2.0, 1.0]))
    correct = np.array([[True, True, False], [True, False, False], [True, True, True]])
    curve = {"patch_mix": correct, "patch_mix_levels": np.array([0.0, 0.2, 0.5])}
    np.savez(tmp_path / "robustness.npz", ids=np.array([3, 5, 7]), **curve)
    found = read_predictions(tmp_path / "predictions.npz")
    assert found.ids.tolist() == [7, 3, 5]
    assert found.outcomes["top1_pct"].tolist() == [100, 0, 0]
    assert found.outcomes["nll"] == pytest.approx([math.log(math.exp(2) + 2) - 2, 1000, math.log(3)])
    # Image 3: (.2 * 1 + .3 * .5) / .5; image 5: .2 * .5 / .5; image 7 is always right. In the order of the predictions.
    assert found.outcomes["patch_mix_auc"] == pytest.approx([100, 70, 20])
    levels, accuracy = found.curves["patch_mix"]
    assert (levels.tolist(), accuracy) == ([0, 0.2, 0.5], pytest.approx([100, 200 / 3, 100 / 3]))
    assert found.num_classes == 3
    assert found.train_loss is not None
    assert found.train_loss.tolist() == [2.0, 1.0]


def test_unusable_predictions_are_refused(tmp_path: Path):
    path = tmp_path / "predictions.npz"
    np.savez(path, ids=np.arange(2), labels=np.zeros(2, dtype=int), logits=np.array([[0.0, np.nan], [0.0, 0.0]]))
    with pytest.raises(ValueError, match=r"predictions.npz: logits of 1 images are not finite"):
        read_predictions(path)
    np.savez(path, ids=np.arange(2), labels=np.zeros(2, dtype=int), logits=np.zeros((2, 2)))
    (tmp_path / "robustness.npz").write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"^robustness.npz: BadZipFile: "):
        read_predictions(path)
    np.savez(tmp_path / "robustness.npz", drop=np.ones((2, 2)))
    with pytest.raises(ValueError, match=r"^robustness.npz: no ids in it"):
        read_predictions(path)
    np.savez(tmp_path / "robustness.npz", ids=np.arange(1, 3), drop=np.ones((2, 2), dtype=bool), drop_levels=np.arange(2.0))
    with pytest.raises(ValueError, match=r"robustness.npz and .*predictions.npz are not of the same test images"):
        read_predictions(path)


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    many = Contrast(factor="mixing", levels=("mixup", "cutmix"), baseline="none", outcome="top1_pct", is_primary=True, published=4.0)
    many = dataclasses.replace(many, source="a paper, Table 1")
    plan = design(many, against_none("mixup"), against_none("cutmix", outcome="nll"), outcomes=(TOP1, NLL))
    both = []
    for cell in cells({"none": 0, "mixup": 0, "cutmix": 6}, 7):
        values = cell.predictions.outcomes["top1_pct"]
        both.append(
            dataclasses.replace(
                cell, predictions=dataclasses.replace(cell.predictions, outcomes={"top1_pct": values, "nll": -values / 100})
            )
        )
    return effects_table(both, plan, num_resamples=300)


def test_the_text_fits_a_terminal_and_names_the_trivial_accuracy(table: pd.DataFrame):
    lines = effects_text(table).splitlines()
    assert max(map(len, lines)) <= TEXT_WIDTH
    assert "always guessing the most frequent class of the test set: 50.00 % top-1" in lines
    assert [line for line in lines if line.startswith("P ")] == ["P mixing: mean(mixup, cutmix) - none, top1_pct"]
    assert published_sources(table) == ["published +4.00 for mixing: mean(mixup, cutmix) - none: a paper, Table 1"]
    assert f"  {published_sources(table)[0]}" in lines
    words = ("better", "no diff", "inconclusive", "worse")
    assert sum(line.startswith("      ") and line.strip().startswith(words) for line in lines) == len(table)


def test_the_forest_shows_every_effect_filled_where_it_is_shown(table: pd.DataFrame):
    panels = list(panel_figures(table))
    assert [(outcome, better) for outcome, better, _ in panels] == [("top1_pct", "right is better"), ("nll", "left is better")]
    assert [figure.layout.xaxis.title.text for *_, figure in panels] == ["effect (points)", "effect (nats)"]
    traces = [trace for *_, figure in panels for trace in figure.data]
    measured = [trace for trace in traces if trace.name != "published effect"]
    filled = [color != PAPER for trace in measured for color in trace.marker.color]
    drawn = [x for trace in measured for x in trace.x]
    assert dict(zip(drawn, filled, strict=True)) == dict(zip(table["effect"], table["is_shown"], strict=True))
    assert set(filled) == {True, False}
    assert [trace.x for trace in traces if trace.name == "published effect"] == [(4.0,)]


def test_the_forest_crosses_what_had_not_converged():
    trials = learning(cells({"none": 0, "mixup": 5, "cutmix": 5}, 6), none=DONE, mixup=STILL_LEARNING, cutmix=DONE)
    plan = design(PRIMARY, Contrast(factor="mixing", levels=("cutmix",), baseline="none", outcome="top1_pct"))
    ((_, _, figure),) = panel_figures(effects_table(trials, plan, num_resamples=200))
    assert {trace.name: trace.marker.symbol for trace in figure.data} == {"primary contrast": ("x-thin",), "other contrast": ("circle",)}


def test_the_forest_is_a_readme_wide_png_and_a_page_that_loads_nothing(table: pd.DataFrame, tmp_path: Path):
    from PIL import Image

    write_png(table, tmp_path / "effects.png", "ablations")
    with Image.open(tmp_path / "effects.png") as image:
        assert image.width == 1804
    write_html(table, tmp_path / "effects.html", "<ablations>")
    page = (tmp_path / "effects.html").read_text()
    assert "&lt;ablations&gt;" in page
    assert "<script src" not in page
    assert "mean(mixup, cutmix) - none" in page


def test_nothing_measured_is_nothing_to_draw(tmp_path: Path):
    with pytest.raises(ValueError, match="nothing to draw"):
        write_png(effects_table([], design(PRIMARY)), tmp_path / "effects.png", "ablations")
