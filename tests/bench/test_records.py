"""Records: complete or absent, readable again, and never mistaken for something else."""

import json
import math

import pytest

from bench import records


def test_written_and_read(tmp_path):
    record = records.new("ops", {"name": "a machine"})
    record["results"].append({"median": 0.25, "peers": ("a", "b"), "limit": math.nan, "deep": {"x": [math.inf]}})
    records.write(tmp_path / "new" / "ops.json", record)
    back = records.read(tmp_path / "new" / "ops.json")
    assert back["results"] == [{"median": 0.25, "peers": ["a", "b"], "limit": None, "deep": {"x": [None]}}]
    assert back["machine"] == {"name": "a machine"} and back["kind"] == "ops"


def test_interrupted_write_keeps_the_old_record(tmp_path):
    path = tmp_path / "ops.json"
    records.write(path, records.new("ops", {"name": "old"}))
    broken = records.new("ops", {"name": object()})
    with pytest.raises(TypeError):
        records.write(path, broken)
    assert records.read(path)["machine"]["name"] == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["ops.json"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "not JSON"),
        ("[]", "schema None"),
        ('{"schema": 99}', "schema 99; this version of bench reads 1"),
        (json.dumps({"schema": records.SCHEMA, "kind": "ops"}), "lacks started, machine, limits, results"),
    ],
)
def test_refuses_what_is_no_record(tmp_path, text, message):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        records.read(path)
    assert str(path) in str(error.value)


def test_contestants_share_a_case(recorded):
    found = {records.case_key(entry) for entry in recorded["results"]}
    assert len(found) < len(recorded["results"])
    assert len({records.case_key({**e, "peer": "?"}) for e in recorded["results"]}) == len(found)
