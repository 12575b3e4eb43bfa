"""The suites under pytest-benchmark: `pytest bench`, one benchmark per case and contestant.

`python -m bench run` lets contestants take turns and is what records come from. These are for one contestant at a
time: to profile it, to save runs and compare them with pytest-benchmark's own commands. On a GPU pytest-benchmark's
clock sees the host; the device's median and the bandwidth are in extra_info.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace

import pytest
import torch

from bench import cases, peers, timing
from bench.cases import OPS
from bench.inputs import Case, Source


@functools.lru_cache(maxsize=1)
def _weights(group: Case, device: str) -> SimpleNamespace:
    return cases.make_weights(group, Source(device))


@pytest.fixture
def device(request):
    return request.config.getoption("--bench-device")


def test_speed(case, contestant, device, benchmark):
    op, weights = OPS[case.op], _weights(case.group, device)
    try:
        entry = contestant.entry(case.group, weights)
    except (peers.Unavailable, ImportError) as reason:
        pytest.skip(str(reason))
    if reason := entry.refusal(case.m):
        pytest.skip(reason)
    rows = op.rows(case, Source(device, seed=1)) if op.rows else SimpleNamespace()
    with torch.set_grad_enabled(case.backward):
        status, reason, error = peers.judged(entry, rows, op.truth(weights, rows), op.plain(weights, rows))
        if status == "wrong":
            (pytest.fail if contestant.name.startswith(peers.OURS) else pytest.skip)(f"wrong: {reason}")

        def run():
            entry.run(rows)
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.pedantic(run, rounds=5, iterations=1, warmup_rounds=1)
        found = timing.measure({"": lambda: entry.run(rows)}, device=device, seconds=0.1, min_rounds=1)[""]
    cost = op.cost(case)
    benchmark.group = str(case)
    benchmark.extra_info |= {
        "peer": contestant.name,
        "version": peers.package_version(contestant),
        "error": error,
        "median": found.median,
        "peak_memory": found.peak_memory,
        "GB/s": (cost.read + cost.written) / found.median / 1e9,
    }
