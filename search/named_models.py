"""The model that a user names: all that the catalogue reads, and the digest of a leaderboard entry."""

from __future__ import annotations

import re
from pathlib import Path

from space import catalog
from space.model import Model
from space.registry import SpecError

MIN_DIGITS = 4
"""Of a digest, to be taken for one."""


def is_digest(text: str) -> bool:
    """Whether the text is taken for a digest or its first digits, because it names nothing else."""
    looks_so = re.fullmatch(f"[0-9a-f]{{{MIN_DIGITS},16}}", text) is not None
    return looks_so and text not in catalog.names() and not Path(text).is_file()


def named_model(text: str, tracking_uri: str) -> Model:
    """The spec that `text` names: of the catalogue, a method's string, a file, or a leaderboard entry by the first digits of its digest.

    Entries are looked up in the MLflow store at `tracking_uri`. Raises SpecError for what names no model.
    """
    if not is_digest(text):
        return catalog.resolve(text)
    from results.mlflow_store import check_tracking, find_candidate
    from space.model import model_from_json

    check_tracking(tracking_uri)
    candidate = find_candidate(tracking_uri, text)
    if candidate is None:
        raise SpecError(f"no leaderboard entry has the digest {text!r} in {tracking_uri}; --runs or --tracking-uri name another store")
    return model_from_json(candidate["model"])
