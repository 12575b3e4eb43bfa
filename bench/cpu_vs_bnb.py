"""CPU kernels against bitsandbytes and torch: `python bench/cpu_vs_bnb.py [size ...] [--quick]`.

Each line alternates the contestants in one process and prints median (and least) milliseconds; a ratio above 1
means that quantlib is faster. On a machine that does other work as well the least times tell more. Sizes are square
weights or NxK; default 4096. Layers run as their users run them: 4-bit with double quant, int8 with threshold 6 and
one outlier column, in eval mode; forward and backward in train mode with a frozen weight.
"""

import copy
import logging
import statistics
import sys
import time
import warnings
from functools import partial

import bitsandbytes as bnb
import torch

import quantlib

BUDGET = 0.5 if "--quick" in sys.argv else 2.0


def alternate(contestants):
    """Median and least milliseconds of each, called in turn."""
    times = {name: [] for name in contestants}
    for run in contestants.values():
        run()
    start = time.perf_counter()
    while len(times["quantlib"]) < 5 or (time.perf_counter() - start < BUDGET and len(times["quantlib"]) < 300):
        for name, run in contestants.items():
            begin = time.perf_counter()
            run()
            times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: (statistics.median(t), min(t)) for name, t in times.items()}


def report(op, dtype, m, size, **contestants):
    ms = alternate(contestants)
    median, least = ms.pop("quantlib")
    line = f"{op:15} {str(dtype)[6:]:8} {size:11} M={m:<4} quantlib {median:9.3f} (least {least:8.3f})"
    for name, (their_median, their_least) in ms.items():
        line += f"   {name} {their_median:9.3f} ({their_median / median:.2f}x, least {their_least / least:.2f}x)"
    print(line, flush=True)


def train_step(layer, x, dy):
    x = x.detach().requires_grad_()
    layer(x).backward(dy)


def bench_weight(w, size):
    report(
        "quantize_4bit", w.dtype, "-", size,
        quantlib=lambda: quantlib.quantize_4bit(w),
        bnb=lambda: bnb.functional.quantize_4bit(w, quant_type="nf4", blocksize=64),
    )  # fmt: skip
    q = quantlib.quantize_4bit(w)
    packed, state = bnb.functional.quantize_4bit(w, quant_type="nf4", blocksize=64)
    report(
        "dequantize_4bit", w.dtype, "-", size,
        quantlib=q.dequantize, bnb=lambda: bnb.functional.dequantize_4bit(packed, state),
    )  # fmt: skip


def bench_layers(w, size):
    (n, k), dtype = w.shape, w.dtype
    linear = torch.nn.Linear(k, n, bias=False, dtype=dtype)
    linear.weight = torch.nn.Parameter(w, requires_grad=False)
    ours = quantlib.Linear4bit.from_linear(linear, compute_dtype=dtype, double_quant=True)
    ours8 = quantlib.Linear8bit.from_linear(linear, threshold=6.0)
    theirs = bnb.nn.Linear4bit(k, n, bias=False, compute_dtype=dtype, quant_type="nf4")
    theirs.weight = bnb.nn.Params4bit(w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=True)
    theirs = theirs.to("cpu")
    theirs_eval = copy.deepcopy(theirs).eval()
    theirs8 = bnb.nn.Linear8bitLt(k, n, bias=False, has_fp16_weights=False, threshold=6.0)
    theirs8.weight = bnb.nn.Int8Params(w.clone(), requires_grad=False, has_fp16_weights=False)
    theirs8 = theirs8.to("cpu").eval()
    for m in (1, 4, 16, 64, 128, 512):
        x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
        x[0, 5] = 8
        with torch.no_grad():
            report(
                "linear_4bit", dtype, m, size,
                **{name: partial(f, x) for name, f in (("quantlib", ours), ("bnb", theirs_eval), ("torch", linear))},
            )  # fmt: skip
            report("linear_int8", dtype, m, size, quantlib=partial(ours8, x), bnb=partial(theirs8, x))
        if dtype != torch.float16 and m not in (4, 64):  # torch's float16 x @ w takes seconds to minutes
            contestants = {"quantlib": ours, "bnb": theirs, "torch": linear}
            report(
                "4bit fwd+bwd", dtype, m, size,
                **{name: partial(train_step, layer, x, dy) for name, layer in contestants.items()},
            )  # fmt: skip


if __name__ == "__main__":
    torch.manual_seed(0)
    logging.disable(logging.WARNING)  # bitsandbytes warns at every int8 call
    warnings.simplefilter("ignore")
    print(f"torch {torch.__version__}, bitsandbytes {bnb.__version__}, {torch.get_num_threads()} threads")
    for size in [a for a in sys.argv[1:] if a[0] != "-"] or ["4096"]:
        n, k = (int(s) for s in (size.split("x") if "x" in size else (size, size)))
        for dtype in (torch.bfloat16, torch.float32, torch.float16):
            w = (torch.randn(n, k) * 0.02).to(dtype)
            bench_weight(w, f"{n}x{k}")
            bench_layers(w, f"{n}x{k}")
