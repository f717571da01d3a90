"""Outcomes as values: their JSON form and the file that survives a crash."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.records import Failure, Measurement, outcome_from_json, outcome_to_json, write_json_atomically

numbers = st.floats(allow_nan=False, allow_infinity=False)
measurements = st.builds(
    Measurement,
    values=st.dictionaries(st.text(min_size=1), numbers),
    elapsed_s=numbers,
    device=st.text(),
    versions=st.dictionaries(st.text(), st.text()),
    seed=st.integers(),
    num_threads=st.integers(1, 64),
    warnings=st.lists(st.text()).map(tuple),
)
failures = st.builds(Failure, kind=st.sampled_from(["error", "timeout", "lost"]), message=st.text(), traceback=st.text(), elapsed_s=numbers)


@given(st.one_of(measurements, failures))
def test_an_outcome_survives_json(outcome):
    assert outcome_from_json(json.loads(json.dumps(outcome_to_json(outcome)))) == outcome


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "outcome.json"
    write_json_atomically(path, {"whole": True})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"torn": object()})
    assert json.loads(path.read_text()) == {"whole": True}
