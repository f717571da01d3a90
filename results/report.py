"""All that is known of a study, as every view shows it: its ranked measurements, and the effects of its designs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from results.effects.study import Effects, load_effects
from results.mlflow_store import DESIGNS_TAG, read_study
from results.study_results import StudyResults, results_of


@dataclass(frozen=True, kw_only=True)
class StudyReport:
    """`effects` are those of the study's designs, where it has any; `effects_failure` says why they could not be stated."""

    results: StudyResults
    effects: tuple[Effects, ...] = ()
    effects_failure: str = ""

    def only(self, phase: str) -> StudyReport:
        """The report of one phase; raises UnreadableStudy for a phase without measurements."""
        effects = tuple(one for one in self.effects if one.phase == phase)
        return replace(self, results=self.results.only(phase), effects=effects)

    def without_effects(self, error: Exception) -> StudyReport:
        """The same report, saying that `error` kept the effects from being stated or drawn."""
        return replace(self, effects_failure=f"effects could not be stated: {type(error).__name__}: {error}")


def load_report(uri: str, study_name: str) -> StudyReport:
    """Everything MLflow holds of the study, over all invocations.

    Raises UnreadableStudy if the store or the study does not exist; never creates a store.
    """
    runs = read_study(uri, study_name)
    report = StudyReport(results=results_of(runs))
    if not any(DESIGNS_TAG in run.data.tags for run in runs.parents):
        return report
    try:
        return replace(report, effects=load_effects(runs))
    except Exception as error:  # the measurements are shown even if the effects cannot be
        return report.without_effects(error)
