"""All that is known of a study, as every view shows it: ranked measurements, the effects of its designs, the answer to its question."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from typing import Any

from results.answers import Answer, Question, answer
from results.effects.study import Effects, load_effects
from results.mlflow_store import DESIGNS_TAG, QUESTION_FILE, QUESTION_TAG, StudyRuns, read_artifact, read_study
from results.study_results import StudyResults, results_of


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """`effects` are those of the study's designs, and `answer` is that to its question, where it has any.

    `effects_failure` and `answer_failure` say why they could not be stated.
    """

    results: StudyResults
    effects: tuple[Effects, ...] = ()
    effects_failure: str = ""
    answer: Answer | None = None
    answer_failure: str = ""

    def only(self, phase: str) -> StudyReport:
        """The report of one phase; raises UnreadableStudy for a phase without measurements."""
        effects = tuple(one for one in self.effects if one.phase == phase)
        return replace(self, results=self.results.only(phase), effects=effects, answer=None, answer_failure="")

    @property
    def summary(self) -> dict[str, Any]:
        """The result for a script, as JSON: the answer to the study's question, else what ranks first in each phase."""
        if self.answer or self.answer_failure:
            return dict(self.answer.summary) if self.answer else {}
        return {phase: self.results.first(phase) for phase in self.results.phases}

    def without_effects(self, error: Exception) -> StudyReport:
        """The same report, saying that `error` kept the effects from being stated or drawn."""
        return replace(self, effects_failure=f"effects could not be stated: {type(error).__name__}: {error}")


def load_report(uri: str, study_name: str) -> StudyReport:
    """Everything MLflow holds of the study, over all invocations.

    Raises UnreadableStudy if the store or the study does not exist; never creates a store.
    """
    runs = read_study(uri, study_name)
    report = _answered(StudyReport(results=results_of(runs)), runs)
    if not any(DESIGNS_TAG in run.data.tags for run in runs.parents):
        return report
    try:
        return replace(report, effects=load_effects(runs))
    except Exception as error:  # the measurements are shown even if the effects cannot be
        return report.without_effects(error)


def _answered(report: StudyReport, runs: StudyRuns) -> StudyReport:
    """The report with the answer to the question that the study asked last."""
    asked = [run for run in runs.parents if QUESTION_TAG in run.data.tags]
    if not (asked and report.results.phases):
        return report
    try:
        question = Question(**json.loads(read_artifact(runs.client, asked[-1], QUESTION_FILE) or ""))
        return replace(report, answer=answer(question, report.results))
    except Exception as error:  # the measurements are shown even if they give no answer
        return replace(report, answer_failure=f"no answer yet: {error}")
