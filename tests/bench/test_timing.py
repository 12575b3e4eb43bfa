"""Timing: turns, copies, quantiles, memory; and the GPU's way through a stand-in for torch.cuda."""

import sys
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bench import timing


@settings(deadline=None)
@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=40), st.floats(0, 1))
def test_quantile(values, q):
    expected = torch.quantile(torch.tensor(values, dtype=torch.float64), q).item()
    assert timing.quantile(values, q) == pytest.approx(expected, abs=1e-9)


def test_contestants_take_turns_and_follow_each_other_equally_often():
    turns = []
    run = [lambda name=name: turns.append(name) for name in "abc"]
    timing._rounds(run, seconds=0, min_rounds=600, max_rounds=600)
    rounds = ["".join(turns[i : i + 3]) for i in range(0, len(turns), 3)]
    assert all(sorted(r) == ["a", "b", "c"] for r in rounds)
    follows = Counter(pairwise(turns))
    counts = [follows[a, b] for a in "abc" for b in "abc" if a != b]
    assert max(counts) < 1.3 * min(counts)  # 267 each, but for chance
    again = []
    timing._rounds([lambda name=name: again.append(name) for name in "abc"], 0, 600, 600)
    assert again == turns


def test_rounds_end_with_the_time_or_the_maximum():
    turns = []
    timing._rounds([lambda: turns.append(1)], seconds=60, min_rounds=1, max_rounds=7)
    assert len(turns) == 7


def test_every_contestant_is_measured_and_every_copy_used():
    calls = []
    functions = {"one": lambda: calls.append("one"), "many": [lambda i=i: calls.append(i) for i in range(3)]}
    found = timing.measure(functions, seconds=0, min_rounds=2)
    assert list(found) == ["one", "many"]
    assert {"one", 0, 1, 2} == set(calls)
    for result in found.values():
        assert 0 <= result.p20 <= result.median <= result.p80 and result.rounds >= 2
        assert result.host == result.median and result.graph is None


def test_a_slow_function_is_called_once_a_turn(monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    calls = []
    found = timing.measure({"slow": lambda: calls.append(1)}, seconds=0, min_rounds=3)
    assert found["slow"].median == 1 and found["slow"].rounds == 3
    assert len(calls) == 4  # one for its memory, three rounds


def test_nothing_to_measure():
    assert timing.measure({}) == {}


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of resident memory comes from Linux's /proc")
def test_peak_memory_of_a_call():
    size = 64 << 20
    held = torch.zeros(size, dtype=torch.uint8)
    found = timing._peak_resident(lambda: held + 1)
    assert found is None or 0.9 * size < found < 1.5 * size


class _Device:
    """A stand-in for torch.cuda: time passes when `work` is called, by eager calls or by a replayed graph."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.synchronized = 0
        self.slept = 0
        self.failed = False

    def work(self, milliseconds):
        if self.capturing is None:
            self.now += milliseconds
        else:
            self.capturing.append(milliseconds)

    def module(self):
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def synchronize(self):
                pass

            def elapsed_time(self, end):
                return end.at - self.at

        class Stream:
            def wait_stream(self, other):
                pass

            def __enter__(self):
                return self

            def __exit__(self, *exc):
                pass

        class CUDAGraph:
            def capture_begin(self):
                device.capturing = self.work = []

            def capture_end(self):
                failed, device.capturing = device.failed, None
                if failed:
                    raise RuntimeError("capture failed because of an earlier error")

            def replay(self):
                device.now += sum(self.work)

        def synchronize(where=None):
            device.synchronized += 1

        def sleep(cycles):
            device.slept += 1
            device.now += 1000

        return SimpleNamespace(
            Event=Event,
            Stream=Stream,
            CUDAGraph=CUDAGraph,
            stream=lambda stream: stream,
            current_stream=Stream,
            synchronize=synchronize,
            _sleep=sleep,
            reset_peak_memory_stats=lambda where: None,
            memory_allocated=lambda where: 100,
            max_memory_allocated=lambda where: 350,
        )


@pytest.fixture
def device(monkeypatch):
    device = _Device()
    monkeypatch.setattr(timing.torch, "cuda", device.module())
    return device


def test_gpu_times_come_from_events_and_graphs(device):
    found = timing.measure(
        {"two copies": [lambda: device.work(2), lambda: device.work(2)], "no graph": lambda: device.work(3)},
        device="cuda",
        seconds=0,
        min_rounds=2,
        graph=["two copies"],
    )
    assert found["two copies"].median == pytest.approx(2e-3)
    assert found["two copies"].graph == pytest.approx(2e-3)  # the busy wait before a replay is not in it
    assert found["two copies"].peak_memory == 250
    assert found["no graph"].median == pytest.approx(3e-3) and found["no graph"].graph is None
    assert device.synchronized >= found["two copies"].rounds and device.slept > 0


def test_a_graph_that_cannot_be_captured_is_noted(device):
    def call():
        if device.capturing is not None:
            device.failed = True
            raise RuntimeError("operation not permitted when stream is capturing\nmore")
        device.work(1)

    found = timing.measure({"x": call}, device="cuda", seconds=0, min_rounds=1, graph=["x"])["x"]
    assert found.graph is None and found.median == pytest.approx(1e-3)
    assert found.note == "no CUDA graph: operation not permitted when stream is capturing"
