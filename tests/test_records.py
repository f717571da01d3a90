"""Outcomes as values: their JSON form and the file that survives a crash."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from results.records import Failure, Measurement, Metric, outcome_from_json, outcome_to_json, write_json_atomically

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


@pytest.mark.parametrize(
    ("name", "unit"),
    [
        ("val_top1_pct", "%"),
        ("patch_drop_auc", "%"),
        ("nll", "nats"),
        ("test_nll", "nats"),
        ("latency_iqr_ms", "ms"),
        ("throughput_img_s", "images/s"),
        ("elapsed_s", "s"),
        ("memory_mb", "MB"),
        ("params_m", "millions"),
        ("gmacs", "GMAC"),
        ("depth", ""),
        ("train_loss", ""),
    ],
)
def test_the_unit_of_a_metric_follows_from_its_name_or_is_given(name: str, unit: str):
    assert Metric(name, "minimize").unit == unit
    assert Metric(name, "minimize", unit="kJ").unit == "kJ"


@pytest.mark.parametrize("metric", [Metric("top1_pct", "maximize", "accuracy"), Metric("energy", "minimize", unit="kJ")], ids=str)
def test_a_metric_survives_json(metric: Metric):
    assert Metric(**json.loads(json.dumps(metric.to_json()))) == metric


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "new folder" / "outcome.json"
    write_json_atomically(path, {"whole": True})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"torn": object()})
    assert json.loads(path.read_text()) == {"whole": True}
