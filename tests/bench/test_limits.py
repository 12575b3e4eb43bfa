"""Limits: every ceiling is measured, and a case's least time is the larger of traffic and arithmetic."""

import math

import pytest
import torch

from bench import limits
from bench.cases import Cost
from bench.inputs import Case

LIMITS = {"read": 100.0, "copy": 50.0, "cached_read": 1000.0, "cached_copy": 500.0, "bfloat16": 10.0, "int8": 40.0}


def case(cache="cold"):
    return Case("linear_4bit", (8, 8), torch.bfloat16, 1, cache=cache)


@pytest.mark.parametrize(
    ("cost", "cache", "seconds"),
    [
        (Cost(900, 100), "cold", 10),  # read
        (Cost(500, 500), "cold", 20),  # copied
        (Cost(900, 100), "warm", 10),  # does not fit into half the cache
        (Cost(90, 10), "warm", 0.1),
        (Cost(50, 50), "warm", 0.2),
        (Cost(90, 10, {"bfloat16": 20, "int8": 40}), "cold", 3),  # arithmetic of two kinds, one after the other
        (Cost(900, 100, {"bfloat16": 20}), "cold", 10),
    ],
)
def test_floor(cost, cache, seconds):
    assert limits.floor(case(cache), cost, LIMITS, cache=500) == pytest.approx(seconds)


def test_no_floor_without_the_limit():
    assert math.isnan(limits.floor(case(), Cost(1, 1, {"float32": 1}), LIMITS, cache=1))
    assert math.isnan(limits.floor(case(), Cost(1, 1), {}, cache=1))


def test_all_are_measured():
    found = limits.measure("cpu", quick=True)
    assert set(found) >= {"read", "copy", "cached_read", "cached_copy", "bfloat16", "float16", "float32", "int8"}
    assert all(value > 0 for value in found.values())
    assert [name for name, _ in limits.text(found)] == list(found)


def test_a_rate_that_torch_lacks_is_left_out(monkeypatch):
    def missing(*args):
        raise RuntimeError("not implemented")

    monkeypatch.setattr(torch, "_int_mm", missing)
    assert "int8" not in limits.measure("cpu", quick=True)
