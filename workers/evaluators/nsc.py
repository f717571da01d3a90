"""NSC, a score of an untrained Vision Transformer in closed form: the sizes of its weight matrices alone decide it.

Defined as in https://arxiv.org/abs/2609.23087. A linear map from `n` to `m` features counts

    min(n, m) * integral of ln(1 + M s^2 x) over the Marchenko-Pastur law of ratio min(n, m) / max(n, m),
    M = max(n, m),  s^2 = 2 / (n + m),

and the score of a network is the sum over the maps of its blocks: queries, keys and values head by head, the projection of the
heads, and both layers of the feed-forward. The logarithms sum the spectrum of a random matrix with Xavier variance s^2 in the limit of
wide layers, so no image, seed or weight plays a role. The integral has a closed form, the Shannon transform of that law (Tulino and
Verdu, "Random Matrix Theory and Wireless Communications", 2004, equation 1.14).

It is undefined for blocks with other mixers or feed-forwards than those that declare `linear_maps`. Patch embedding, position, pooling
and head do not count, and neither does the number of tokens: networks that differ in the patch size alone score the same.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

from results.records import Metric
from space.layout import Group, groups
from space.model import Model, require_arch
from space.registry import SpecError
from space.spec import ArchSpec
from workers.evaluator import Context, NoSettings, evaluator


def spectral_score(spec: ArchSpec) -> float:
    """NSC of a network of our components; raises SpecError where it is undefined."""
    counted: list[float] = []
    for where, group in groups(spec):
        try:
            counted += _terms(group)
        except SpecError as error:
            raise SpecError(f"nsc is undefined here: {where}{error}") from error
    # Rounded once, so that networks with the same maps in another order tie.
    return math.fsum(counted)


@lru_cache(maxsize=65536)
def _terms(group: Group) -> tuple[float, ...]:
    """What each kind of linear map in the group counts; networks of a space share most of their groups."""
    return tuple(number * map_score(inputs, outputs) for inputs, outputs, number in group.linear_maps)


def map_score(inputs: int, outputs: int) -> float:
    """What one linear map counts: min(n, m) times the expected ln(1 + M s^2 x)."""
    smaller, larger = sorted((inputs, outputs))
    ratio, gain = smaller / larger, 2 * larger / (inputs + outputs)
    root = math.sqrt(ratio)
    # F of the Shannon transform; the law's support ends at (1 - root)^2 and (1 + root)^2.
    spread = (math.sqrt(gain * (1 + root) ** 2 + 1) - math.sqrt(gain * (1 - root) ** 2 + 1)) ** 2 / 4
    transform = math.log1p(gain - spread) + math.log1p(gain * ratio - spread) / ratio - spread / (gain * ratio)
    return smaller * transform


@evaluator(
    "nsc",
    metrics=(Metric("nsc", "maximize", "sum over the blocks' linear maps of their random spectrum's ln(1 + x), in closed form"),),
    subject="proxy",
    is_free=True,
    memory_mb=0,
)
def nsc(model: Model, context: Context, settings: NoSettings) -> Mapping[str, float]:
    """NSC: a closed-form score from the sizes of the weight matrices."""
    return {"nsc": spectral_score(require_arch(model, "nsc"))}
