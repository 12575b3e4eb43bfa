"""Tests of the benchmarks: one thread, since what they time is tiny; and a record made from one."""

import copy
import json
from pathlib import Path

import pytest

from bench import records
from tests.threads import threads

RECORDED = Path(__file__).parent / "recorded.json"


@pytest.fixture(autouse=True)
def _one_thread():
    with threads(1):
        yield


@pytest.fixture(scope="session")
def _recorded():
    return records.parse(RECORDED.read_text(encoding="utf-8"), RECORDED)


@pytest.fixture
def recorded(_recorded):
    """What `python -m bench run --quick` once recorded, cut down to three ops."""
    return copy.deepcopy(_recorded)


@pytest.fixture
def folder(recorded, tmp_path):
    """A machine's folder with that record, in a repository's bench/results."""
    path = tmp_path / "bench" / "results" / "machine"
    path.mkdir(parents=True)
    (path / "ops.json").write_text(json.dumps(recorded), encoding="utf-8")
    return path
