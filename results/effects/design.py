"""How an ablation is stated before it is run: contrasts of levels on named outcomes.

A `Design` is written down (`to_json`, `digest`) before anything is trained. Each contrast is the mean of some levels of a
factor minus a baseline level, paired by seed and by test image. Every outcome of the design is reported for every contrast;
one contrast of a factor, on its own outcome, is primary and keeps its p-value. The others are corrected by Holm's method. A family is the
rows of a factor on one outcome, because each outcome is a question of its own that the design asks.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, get_args

from results.effects.statistics import Alternative
from results.records import Metric


@dataclass(frozen=True, kw_only=True)
class Contrast:
    """The mean of `levels` of a factor minus `baseline`.

    `outcome` is the outcome that the contrast was made for. `alternative` and `published` apply to it; on other outcomes the test is
    two-sided. `alternative` is about the sign of the effect, not about what is better. `published` is the effect that `source` states, in
    percentage points for accuracies, else in the outcome's unit; if the source states a range, it is the lower end.
    """

    factor: str
    levels: tuple[str, ...]
    baseline: str
    outcome: str
    is_primary: bool = False
    published: float | None = None
    source: str = ""
    alternative: Alternative = "two-sided"

    @property
    def text(self) -> str:
        arm = self.levels[0] if len(self.levels) == 1 else f"mean({', '.join(self.levels)})"
        return f"{arm} - {self.baseline}"


@dataclass(frozen=True, kw_only=True)
class Design:
    """What is compared on which outcomes; raises ValueError when it contradicts itself.

    `margin_pct` is the largest harm, in percentage points, that does not matter (TOST); outcomes in other units have no margin.
    """

    name: str
    contrasts: tuple[Contrast, ...]
    outcomes: tuple[Metric, ...]
    margin_pct: float = 1.0
    alpha: float = 0.05

    def __post_init__(self) -> None:
        known = [outcome.name for outcome in self.outcomes]
        if not self.contrasts:
            raise ValueError(f"design {self.name!r} has no contrast")
        if not (0 < self.alpha <= 0.2 and self.margin_pct > 0):
            raise ValueError(f"design {self.name!r} needs 0 < alpha <= 0.2 and margin_pct > 0, got {self.alpha} and {self.margin_pct}")
        if len(set(known)) < len(known):
            raise ValueError(f"design {self.name!r} names an outcome twice: {', '.join(known)}")
        for contrast in self.contrasts:
            where = f"contrast {contrast.factor}: {contrast.text}" if contrast.levels else f"a contrast of {contrast.factor}"
            if not contrast.levels or contrast.baseline in contrast.levels or len(set(contrast.levels)) < len(contrast.levels):
                raise ValueError(f"{where} needs levels that differ from each other and from the baseline {contrast.baseline!r}")
            if contrast.outcome not in known:
                raise ValueError(f"{where} is on unknown outcome {contrast.outcome!r}; known: {', '.join(known)}")
            if contrast.alternative not in get_args(Alternative):
                raise ValueError(f"{where} has alternative {contrast.alternative!r}; known: {', '.join(get_args(Alternative))}")
        for factor in self.factors:
            own = [contrast for contrast in self.contrasts if contrast.factor == factor]
            if len({contrast.text for contrast in own}) < len(own):
                raise ValueError(f"factor {factor!r} has a contrast twice: {'; '.join(contrast.text for contrast in own)}")
            primary = [contrast.text for contrast in own if contrast.is_primary]
            if len(primary) != 1:
                raise ValueError(
                    f"factor {factor!r} needs exactly one primary contrast, has {len(primary)}: {'; '.join(primary) or '(none)'}"
                )

    @property
    def factors(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(contrast.factor for contrast in self.contrasts))

    def family_size(self, contrast: Contrast, outcome: str) -> int:
        """The number of tests that Holm's method corrects together with this one, itself included; 1 for a primary test."""
        own = [other for other in self.contrasts if other.factor == contrast.factor]
        if contrast.is_primary and contrast.outcome == outcome:
            return 1
        return sum(not (other.is_primary and other.outcome == outcome) for other in own)

    @property
    def num_seeds_needed(self) -> int:
        """The fewest seeds with which the exact test can reject in every row, if its effect is large enough."""
        rows = [(contrast, outcome.name) for contrast in self.contrasts for outcome in self.outcomes]
        tests = [self.family_size(*row) * (2 if self.alternative(*row) == "two-sided" else 1) for row in rows]
        return math.ceil(math.log2(max(tests) / self.alpha))

    def alternative(self, contrast: Contrast, outcome: str) -> Alternative:
        """The contrast's own alternative on its own outcome, else two-sided."""
        return contrast.alternative if outcome == contrast.outcome else "two-sided"

    def to_json(self) -> dict[str, Any]:
        outcomes = [outcome.to_json() for outcome in self.outcomes]
        return json.loads(json.dumps({**asdict(self), "outcomes": outcomes}))

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Design:
        """The design of `to_json`'s object; raises ValueError for anything else."""
        try:
            contrasts = tuple(Contrast(**{**contrast, "levels": tuple(contrast["levels"])}) for contrast in data["contrasts"])
            outcomes = tuple(Metric(**outcome) for outcome in data["outcomes"])
            return cls(**{**data, "contrasts": contrasts, "outcomes": outcomes})
        except (KeyError, TypeError) as error:
            raise ValueError(f"not a design: {type(error).__name__}: {error}") from None

    @property
    def digest(self) -> str:
        """The name under which a design is registered: 16 hex digits of the SHA-256 of its canonical JSON."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:16]
