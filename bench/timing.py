"""Times of several functions, measured in turn.

The contestants of a comparison take turns within one process, in an order drawn anew for every round, so that a machine
that slows down slows all of them, and each follows every other equally often: what comes after a slow one that empties
the caches took up to a quarter longer, for milliseconds. A contestant is one callable, or several that do the same on
different copies of their data and are cycled through: with copies that exceed the cache together, every call finds its
data in memory.

On a GPU a call is timed by events from an idle device, so that what it costs to launch counts, as users feel it;
`graph` is the time per call inside a CUDA graph, where it does not. `host` is how long the call keeps Python busy.
"""

from __future__ import annotations

import ctypes
import random
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

Call = Callable[[], object]
TURN = 0.01  # seconds of calls in one turn: short functions are called several times
QUEUE_CYCLES = 200_000  # about 0.1 ms, in which the host launches a graph
GRAPH_CALLS = 16  # at least so many calls in a graph, since starting one costs microseconds


@dataclass(frozen=True)
class Timing:
    """Seconds per call over `rounds` calls; peak_memory in bytes above what was held before, None if unknown.

    graph: median inside a CUDA graph, None where there is none; note: why there is none though it was asked for.
    """

    median: float
    p20: float
    p80: float
    host: float
    peak_memory: int | None
    rounds: int
    graph: float | None = None
    note: str = ""


def quantile(values: Sequence[float], q: float) -> float:
    """The q-quantile, 0 <= q <= 1, by linear interpolation."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def _peak_resident(call: Call) -> int | None:
    """Growth of the process's resident memory during a call; None where Linux's /proc is not at hand."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def peak() -> int:
        return next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmHWM"))

    try:
        with suppress(AttributeError):  # memory that the C library keeps would hide what the call takes
            ctypes.CDLL(None).malloc_trim(0)
        reset.write_text("5")  # sets the high-water mark back to what is resident now
        before = peak()
        call()
        return peak() - before
    except (OSError, StopIteration):
        return None


class _Cpu:
    def measure(self, call: Call) -> tuple[float, float]:
        """Seconds of one call, and seconds that it kept the host busy: the same."""
        start = time.perf_counter()
        call()
        elapsed = time.perf_counter() - start
        return elapsed, elapsed

    def peak_memory(self, call: Call) -> int | None:
        return _peak_resident(call)


class _Cuda:
    def __init__(self, device: torch.device) -> None:
        self.device = device

    def before(self) -> None:
        torch.cuda.synchronize(self.device)

    def measure(self, call: Call) -> tuple[float, float]:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.before()
        begin.record()
        start = time.perf_counter()
        call()
        host = time.perf_counter() - start
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3, host

    def peak_memory(self, call: Call) -> int | None:
        torch.cuda.synchronize(self.device)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        call()
        torch.cuda.synchronize(self.device)
        return torch.cuda.max_memory_allocated(self.device) - before


class _CudaQueued(_Cuda):
    """Times calls that queue up behind a busy device: what it costs to launch them does not count."""

    def before(self) -> None:
        torch.cuda._sleep(QUEUE_CYCLES)


def _timer(device: torch.device | str) -> _Cpu | _Cuda:
    device = torch.device(device)
    return _Cuda(device) if device.type == "cuda" else _Cpu()


def _capture(calls: Sequence[Call]) -> tuple[Call, int]:
    """A replay of a CUDA graph that holds every call, and how many calls those are.

    Without `torch.cuda.graph`, which leaves its stream in force when a capture fails.
    """
    repeats = -(-GRAPH_CALLS // len(calls))
    side, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:  # lazy set-up must not happen during capture
            call()
        torch.cuda.synchronize()
        graph.capture_begin()
        try:
            for _ in range(repeats):
                for call in calls:
                    call()
        except RuntimeError:
            with suppress(RuntimeError):  # says only that there was an error
                graph.capture_end()
            raise
        graph.capture_end()
    torch.cuda.current_stream().wait_stream(side)
    return graph.replay, repeats * len(calls)


class _Contestant:
    def __init__(self, calls: Call | Sequence[Call], timer: _Cpu | _Cuda) -> None:
        self.calls = list(calls) if isinstance(calls, Sequence) else [calls]
        self.timer = timer
        self.next = 0
        self.times: list[float] = []
        self.hosts: list[float] = []
        start = time.perf_counter()
        self.peak = timer.peak_memory(self.calls[0])
        elapsed = min([time.perf_counter() - start, *map(self.seconds, self.calls[1:])])
        if elapsed < 10 * TURN:  # else it is too slow for a second look, however much of it was set-up
            elapsed = min(map(self.seconds, self.calls))
        self.per_turn = max(1, min(10, int(TURN / max(elapsed, 1e-9))))

    def seconds(self, call: Call) -> float:
        return self.timer.measure(call)[0]

    def _call(self) -> Call:
        self.next = (self.next + 1) % len(self.calls)
        return self.calls[self.next]

    def turn(self) -> None:
        """A few timed calls. With one copy of the data, a call that is not timed brings it into the cache."""
        if len(self.calls) == 1 and self.per_turn > 1:
            self.calls[0]()
        for _ in range(self.per_turn):
            elapsed, host = self.timer.measure(self._call())
            self.times.append(elapsed)
            self.hosts.append(host)

    def timing(self, graph: float | None, note: str) -> Timing:
        median, p20, p80 = (quantile(self.times, q) for q in (0.5, 0.2, 0.8))
        host = quantile(self.hosts, 0.5)
        return Timing(median, p20, p80, host, self.peak, len(self.times), graph, note)


def _rounds(turns: Sequence[Call], seconds: float, min_rounds: int, max_rounds: int) -> None:
    """Takes turns until the time is up, in an order that is drawn for each round, the same in every run."""
    deadline = time.perf_counter() + seconds
    order = random.Random(0)
    for done in range(max_rounds):
        if done >= min_rounds and time.perf_counter() >= deadline:
            break
        for turn in order.sample(turns, len(turns)):
            turn()


def _graphs(
    contestants: Mapping[str, _Contestant], names: Iterable[str], seconds: float, min_rounds: int, max_rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Median seconds per call inside a CUDA graph, and why where there is none."""
    replays, sizes, notes = {}, {}, {}
    for name in names:
        try:
            replay, sizes[name] = _capture(contestants[name].calls)
            replays[name] = _Contestant(replay, _CudaQueued(contestants[name].timer.device))
        except RuntimeError as error:
            notes[name] = f"no CUDA graph: {str(error).splitlines()[0]}"
    if replays:
        _rounds([replay.turn for replay in replays.values()], seconds, min_rounds, max_rounds)
    return {name: quantile(replay.times, 0.5) / sizes[name] for name, replay in replays.items()}, notes


def measure(
    functions: Mapping[str, Call | Sequence[Call]],
    *,
    device: torch.device | str = "cpu",
    seconds: float = 1.0,
    min_rounds: int = 3,
    max_rounds: int = 100,
    graph: Iterable[str] = (),
) -> dict[str, Timing]:
    """Times functions against each other.

    Args:
        functions: name -> callable, or callables that do the same on different copies of their data. The first has
            been called before, else the memory that it sets up counts as that of a call.
        device: where they compute. seconds: for all of them together, once warm.
        min_rounds, max_rounds: every function takes a turn in each round, and a turn of a short function is up to
            ten calls. The minimum is kept even where it takes longer than `seconds`.
        graph: names of those to measure inside a CUDA graph as well. Only ones known to stand it: some libraries end
            the process when a launch fails.

    Returns:
        name -> Timing, in the order of `functions`.
    """
    timer = _timer(device)
    contestants = {name: _Contestant(calls, timer) for name, calls in functions.items()}
    if contestants:
        _rounds([contestant.turn for contestant in contestants.values()], seconds, min_rounds, max_rounds)
    medians, notes = {}, {}
    if isinstance(timer, _Cuda):
        medians, notes = _graphs(contestants, graph, seconds, min_rounds, max_rounds)
    return {name: c.timing(medians.get(name), notes.get(name, "")) for name, c in contestants.items()}
