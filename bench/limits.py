"""What the machine can do, measured: the ceilings beside which every number is put.

Bandwidth comes from PyTorch reading or copying a tensor much larger than the cache (`read`, `copy`) or one that fits
(`cached_read`, `cached_copy`); copying counts the bytes read and those written. Rates of multiplying matrices
(`bfloat16`, `float16`, `float32`, `int8`) come from PyTorch's own products. The fastest of several tries counts.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench import machine
from bench.cases import Cost
from bench.inputs import Case

Limits = dict[str, float]


@dataclass(frozen=True)
class _Sizes:
    large: int  # bytes
    cached: int
    matrix: int
    seconds: float  # for one limit


def _sizes(device: torch.device, quick: bool) -> _Sizes:
    if quick:
        return _Sizes(1 << 20, 1 << 18, 64, 0.0)
    cache = machine.cache_size(device)
    if device.type == "cuda":
        return _Sizes(max(1 << 30, 8 * cache), cache // 4, 8192, 0.3)
    return _Sizes(max(1 << 28, 8 * cache), cache // 4, 2048, 0.3)


def _fastest(call: Callable[[], object], device: torch.device, seconds: float) -> float:
    """Least seconds of a call, the first one apart."""
    times: list[float] = []
    while len(times) < 4 or sum(times) < seconds:
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(200_000)
            begin.record()
            call()
            end.record()
            end.synchronize()
            times.append(begin.elapsed_time(end) / 1e3)
        else:
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
    return min(times[1:])


def _bandwidth(size: int, device: torch.device, seconds: float) -> tuple[float, float]:
    """Bytes a second of reading, and of copying (read and written together)."""
    source = torch.ones(size // 4, device=device)
    target = torch.empty_like(source)
    read = _fastest(source.sum, device, seconds)
    copy = _fastest(lambda: target.copy_(source), device, seconds)
    return source.nbytes / read, 2 * source.nbytes / copy


def _rate(dtype: torch.dtype, n: int, device: torch.device, seconds: float) -> float | None:
    """Operations a second of multiplying n x n matrices, None where PyTorch cannot."""
    if dtype == torch.int8:
        a, b = (torch.randint(-127, 128, (n, n), dtype=dtype, device=device) for _ in range(2))
        product = lambda: torch._int_mm(a, b.t())  # noqa: E731
    else:
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        product = lambda: torch.nn.functional.linear(a, b)  # noqa: E731
    try:
        return 2 * n**3 / _fastest(product, device, seconds)
    except RuntimeError:
        return None


def measure(device: torch.device | str = "cpu", quick: bool = False) -> Limits:
    """Bytes or operations a second, by name; a rate that PyTorch cannot measure is left out."""
    device = torch.device(device)
    sizes = _sizes(device, quick)
    limits: dict[str, float | None] = {}
    limits["read"], limits["copy"] = _bandwidth(sizes.large, device, sizes.seconds)
    limits["cached_read"], limits["cached_copy"] = _bandwidth(sizes.cached, device, sizes.seconds)
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.int8):
        limits[str(dtype).removeprefix("torch.")] = _rate(dtype, sizes.matrix, device, sizes.seconds)
    if device.type == "cpu" and limits["float16"]:  # without such arithmetic, casting to float32 is the faster way
        limits["float16"] = max(limits["float16"], limits["float32"])
    return {name: value for name, value in limits.items() if value}


def floor(case: Case, cost: Cost, limits: Limits, cache: int) -> float:
    """Least seconds for a case: its bytes at the bandwidth, or its operations at their rates, whichever takes longer.

    Where over four fifths of the traffic is reading, bandwidth is that of reading, else that of copying; of the
    cache where a warm case fits into half of it. nan without limits for what it needs.
    """
    total = cost.read + cost.written
    kind = "read" if cost.read > 4 * cost.written else "copy"
    if case.cache == "warm" and total < cache / 2:
        kind = f"cached_{kind}"
    if kind not in limits or any(unit not in limits for unit in cost.operations):
        return float("nan")
    return max(total / limits[kind], sum(count / limits[unit] for unit, count in cost.operations.items()))


def text(limits: Limits) -> list[tuple[str, str]]:
    """Name and value of each limit, for tables."""
    return [
        (name, f"{value / 1e9:,.0f} GB/s" if "read" in name or "copy" in name else f"{value / 1e12:.3g} TOP/s")
        for name, value in limits.items()
    ]


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it works")
    parser.add_argument("--json", action="store_true", help="numbers in bytes and operations a second")


def main(args: argparse.Namespace) -> int:
    limits = measure(args.device, args.quick)
    print(json.dumps(limits) if args.json else "\n".join(f"{name:12} {value}" for name, value in text(limits)))
    return 0
