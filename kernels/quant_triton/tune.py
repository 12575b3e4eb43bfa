"""Measures configurations on this GPU and keeps the fastest: `python -m quant_triton.tune [op ...]`.

For every op that registered a problem and candidates (see `launch.py`), and every shape and number of rows, the default
and each candidate are timed, with the second-level cache emptied in between; a candidate counts only if it computes
what the default computes. The fastest go to `tuned/<gpu>.json` with their times, where `launch.config` finds them.
"""

from __future__ import annotations

import argparse
import inspect
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.errors import TritonError

from .launch import INTERPRETED, TUNABLES, TUNED, Config, architecture, default, forced, key_string, slug

# [out, in] of the layers of Llama-3 8B and 70B.
SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (8192, 8192), (28672, 8192), (8192, 28672))
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 8192)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def microseconds(run: Callable[[], object]) -> float:
    """The median time of a call on the GPU, with a cold cache; of one call, of no interest, under the interpreter."""
    if INTERPRETED:
        start = time.perf_counter()
        run()
        return 1e6 * (time.perf_counter() - start)
    return 1000 * triton.testing.do_bench(run, warmup=20, rep=60, return_mode="median")


def _outputs(result: Any) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


def _agree(result: Any, expected: Any) -> bool:
    """Whether two results are the same up to another order of summation."""
    for a, b in zip(_outputs(result), _outputs(expected), strict=True):
        tolerance = 4 * torch.finfo(b.dtype).eps if b.is_floating_point() else 0
        if not (a.double() - b.double()).norm() <= tolerance * b.double().norm():
            return False
    return True


def tune_one(op: str, run: Callable[[], object], device: torch.device) -> tuple[str, dict[str, Any]] | None:
    """(key, {"config", "us", "default_us"}) of the problem that `run` computes; None if it does not use `op`."""
    with forced(op) as seen:
        expected = run()
    if not seen.keys:
        return None
    key = seen.keys[0]
    first = default(op, architecture(device), **key)
    best: tuple[float, Config] | None = None
    default_us = float("inf")
    for number, config in enumerate([first, *TUNABLES[op].candidates(architecture(device), **key)]):
        with forced(op, config):
            try:
                if number and not _agree(run(), expected):
                    print(f"{op} {key_string(key)}: another result with {dict(config)}", file=sys.stderr)
                    continue
                us = microseconds(run)
            except TritonError:  # more shared memory or registers than there are
                continue
        default_us = us if number == 0 else default_us
        if best is None or us < best[0]:
            best = us, config
    if best is None:
        raise RuntimeError(f"quant_triton.tune: {op} {key_string(key)}: not even the default runs")
    return key_string(key), {"config": dict(best[1]), "us": round(best[0], 2), "default_us": round(default_us, 2)}


def problems(
    op: str, device: torch.device, shapes: Sequence[tuple[int, int]], rows: Sequence[int], dtype: torch.dtype
) -> Iterator[Callable[[], object]]:
    """The calls to time for an op, made one after the other: its problem for each combination of what it asks for."""
    build = TUNABLES[op].problem
    asked = inspect.signature(build).parameters
    done = set()
    for (n, k), m in itertools.product(shapes, rows):
        sizes = {name: value for name, value in {"m": m, "n": n, "k": k, "dtype": dtype}.items() if name in asked}
        if tuple(sizes.values()) not in done:
            done.add(tuple(sizes.values()))
            built = build(device, **sizes)
            yield from built if inspect.isgenerator(built) else (built,)


def write(path: Path, results: dict[str, dict[str, dict]], gpu: str) -> None:
    """Adds results, op -> key -> entry, to a file of tuned configurations, which appears as a whole or not at all."""
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"ops": {}}
    content |= {"gpu": gpu, "triton": triton.__version__, "torch": torch.__version__}
    for op, entries in results.items():
        content["ops"][op] = dict(sorted({**content["ops"].get(op, {}), **entries}.items()))
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    temporary.replace(path)


def tune(
    ops: Sequence[str],
    device: torch.device,
    folder: Path,
    shapes: Sequence[tuple[int, int]] = SHAPES,
    rows: Sequence[int] = ROWS,
    dtype: torch.dtype = torch.bfloat16,
    budget: float = float("inf"),
) -> tuple[Path, bool]:
    """Tunes ops, printing a line per problem; returns the file that was written, and whether the seconds sufficed."""
    end = time.monotonic() + budget
    gpu = "interpreter" if INTERPRETED else torch.cuda.get_device_name(device)
    path = folder / f"{slug(gpu)}.json"
    for op in ops:
        results: dict[str, dict] = {}
        for run in problems(op, device, shapes, rows, dtype):
            if time.monotonic() > end:
                break
            found = tune_one(op, run, device)
            if found is None or found[0] in results:
                continue
            key, entry = found
            results[key] = entry
            print(f"{op} {key}: {entry['us']} us, default {entry['default_us']} us: {entry['config']}", flush=True)
        write(path, {op: results}, gpu)
    return path, time.monotonic() <= end


def _shape(text: str) -> tuple[int, int]:
    n, k = text.split("x")
    return int(n), int(k)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    tunable = sorted(op for op, parts in TUNABLES.items() if parts.candidates and parts.problem)
    parser = argparse.ArgumentParser(prog="python -m quant_triton.tune", description=__doc__.splitlines()[0])
    parser.add_argument("ops", nargs="*", metavar="op", help=f"all by default: {', '.join(tunable)}")
    parser.add_argument("--shapes", type=_shape, nargs="+", default=SHAPES, metavar="OUTxIN")
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument(
        "--out", type=Path, default=TUNED, help="folder to write to (default: the package's, which is read)"
    )
    parser.add_argument("--budget", type=float, default=float("inf"), metavar="SECONDS", help="then it stops, with 3")
    args = parser.parse_args(arguments)
    unknown = sorted({*args.ops} - {*tunable})
    if unknown:
        parser.error(f"cannot be tuned: {', '.join(unknown)}; allowed: {', '.join(tunable)}")
    if not torch.cuda.is_available() and not INTERPRETED:
        parser.error("torch finds no GPU to measure on")
    device = torch.device("cpu" if INTERPRETED else f"cuda:{torch.cuda.current_device()}")
    path, complete = tune(
        args.ops or tunable, device, args.out, args.shapes, args.rows, DTYPES[args.dtype], args.budget
    )
    print(path)
    return 0 if complete else 3


if __name__ == "__main__":
    sys.exit(main())
