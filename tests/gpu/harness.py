"""What the GPU tests share: the device, the kernels that serve it, inputs for every op, comparisons.

A new kernel needs no new test here: KERNELS is read from `quantlib.backends`, and a new op needs an entry in `cases`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from quantlib import ops, reference, use_backend
from quantlib.backends import BACKENDS, kernel
from quantlib.formats import quantize_absmax

# `bench/gpu.sh --dry-run` walks these tests on a CPU, with Triton's interpreter: it sets TRITON_INTERPRET=1 as well.
DRY_RUN = os.environ.get("QUANTLIB_GPU_DRY_RUN") == "1"
DEVICE = torch.device("cpu" if DRY_RUN else "cuda")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)

EXACT = ("quantize_4bit", "dequantize_4bit", "embedding_4bit", "quantize_int8", "dequantize_int8", "dropout")
ON_DEVICE = tuple(backend for backend in BACKENDS if backend.device in (None, "cuda"))
# (backend, op): what `auto` picks, the reference, and each kernel, wherever it runs.
KERNELS = [
    *(("auto", op) for op in ops.SCHEMAS),
    *((backend.name, op) for backend in ON_DEVICE for op in backend.ops),
]


def weight_4bit(n: int, k: int, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False) -> tuple:
    """The seven arguments of a random 4-bit weight [n, k], on the CPU."""
    packed, absmax = reference.quantize_4bit(0.05 * torch.randn(n, k), quant_type, block_size)
    nested: tuple[Tensor | None, ...] = (None, None, None)
    if double_quant:
        absmax, *nested = quantize_absmax(absmax)
    return packed, absmax, *nested, quant_type, block_size


def weight_int8(n: int, k: int) -> tuple[Tensor, Tensor]:
    """values and absmax of a random int8 weight [n, k], on the CPU."""
    return reference.quantize_int8(0.05 * torch.randn(n, k), -1, None, 0.0)[:2]


FORMATS = (("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, True), ("fp4", 4096, False))
SHAPES = ((1, 1), (5, 13), (33, 130), *(() if DRY_RUN else ((64, 64), (3, 4099), (512, 1024), (1031, 257))))
LINEAR = (  # rows, out, in: one row, a few, a tile and more; odd and aligned
    (1, 256, 512),
    (5, 129, 333),
    *(() if DRY_RUN else ((33, 96, 640), (16, 1024, 4096), (300, 768, 1024), (2048, 512, 512))),
)


def with_outliers(m: int, k: int, dtype: torch.dtype) -> Tensor:
    """Activations with columns that LLM.int8() leaves in 16 bit."""
    x = torch.randn(m, k)
    x[0, 3], x[m - 1, k - 1] = 20, -9
    return x.to(dtype)


def cases(op: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Arguments for `op`, tensors on the CPU: every format, shapes that nothing divides, all granularities."""
    if op in ("quantize_4bit", "dequantize_4bit"):
        for shape in SHAPES:
            for quant_type, block_size, double_quant in FORMATS:
                if op == "dequantize_4bit":
                    weight = weight_4bit(*shape, quant_type, block_size, double_quant)
                    yield *weight, shape, dtype
                elif not double_quant:
                    yield torch.randn(shape).to(dtype), quant_type, block_size
        if op == "quantize_4bit":
            x = torch.randn(40, 70).to(dtype)
            x[3:9] = 0
            x[20, 5], x[30, 7] = float("nan"), float("inf")
            yield x, "nf4", 64
            yield x.t(), "fp4", 32
    elif op == "embedding_4bit":
        for dim in (64, 130):
            for form in FORMATS:
                yield torch.tensor([[3, 0], [29, 3]]), *weight_4bit(30, dim, *form), 30, dim, dtype
    elif op in ("linear_4bit", "linear_4bit_dx"):
        for m, n, k in LINEAR:
            for form in FORMATS[:2]:
                if op == "linear_4bit":
                    yield torch.randn(m, k).to(dtype), *weight_4bit(n, k, *form), n, torch.randn(n).to(dtype)
                else:
                    yield torch.randn(m, n).to(dtype), *weight_4bit(n, k, *form), k
    elif op in ("quantize_int8", "dequantize_int8"):
        for kind in ((-1, None, 0.0), (-1, None, 6.0), (0, None, 0.0), (None, None, 0.0), (None, 64, 0.0)):
            for m, k in ((1, 1), (33, 130), (64, 1000)):
                x = with_outliers(m, k, dtype) if k > 3 else torch.randn(m, k).to(dtype)
                if op == "quantize_int8":
                    yield x, *kind
                else:
                    values, absmax, _ = reference.quantize_int8(x, *kind)
                    yield values, absmax, *kind[:2], dtype
    elif op == "linear_int8":
        for m, n, k in LINEAR:
            for threshold in (0.0, 6.0):
                yield with_outliers(m, k, dtype), *weight_int8(n, k), torch.randn(n).to(dtype), threshold
    elif op == "linear_int8_dx":
        for m, n, k in LINEAR:
            yield torch.randn(m, n).to(dtype), *weight_int8(n, k)
    elif op == "dropout":
        for shape in ((1,), (33, 130), (7, 4099)):
            yield torch.randn(shape).to(dtype), torch.tensor([2**40 + 5]), 0.25
    elif op in ops.COMPOSED:
        yield from _lora_cases(op, dtype)
    else:
        raise NotImplementedError(f"tests/gpu/harness.py: no cases for the op {op!r}; add them")


def _lora_cases(op: str, dtype: torch.dtype) -> Iterator[tuple[Any, ...]]:
    """Without dropout and with; factors in float32 and in the dtype of x; a rank of more than one part."""
    for m, n, k in LINEAR:
        for rank, factors, p in ((8, dtype, 0.0), (70, torch.float32, 0.25)):
            weight = weight_4bit(n, k, double_quant=p > 0) if "4bit" in op else weight_int8(n, k)
            a, b = (torch.randn(rank, k) * k**-0.5).to(factors), (torch.randn(n, rank) * rank**-0.5).to(factors)
            seed = torch.tensor([2**40 + 5]) if p else None
            x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
            if op.endswith("_backward"):
                s = torch.randn(m, rank).to(dtype)
                yield torch.randn(m, n).to(dtype), x, s, *weight, a, b, 2.0, seed, p, [True, True, True]
            else:
                threshold = () if "4bit" in op else (6.0,)
                yield x, *weight, bias, *threshold, a, b, 2.0, seed, p, True


def to_device(arguments: Any, device: torch.device = DEVICE) -> Any:
    """The arguments with every tensor on `device`."""
    return tuple(a.to(device) if isinstance(a, Tensor) else a for a in arguments)


def run(backend: str, op: str, arguments: tuple) -> tuple[Tensor, ...]:
    """The results of `op` by `backend` on the device."""
    with use_backend(backend):
        result = kernel(op, DEVICE)(*arguments)
    return (result,) if isinstance(result, Tensor) else tuple(result)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """Equal bit for bit, NaN where NaN is expected."""
    torch.testing.assert_close(actual.cpu(), expected.cpu(), rtol=0, atol=0, equal_nan=True)


def assert_error_within(actual: Tensor, plain: Tensor, exact: Tensor, factor: float = 1.0) -> None:
    """`actual` is no further from the float64 `exact` than plain PyTorch in the same dtype, times `factor`.

    The root mean square decides, up to the noise between two orders of summation: a percent where rounding the result
    dominates, a tenth in float32. The largest error is one draw from the tail.
    """
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    error, allowed = (t.detach().cpu().double() - exact.cpu() for t in (actual, plain))
    floor = exact.abs().max() * torch.finfo(actual.dtype).eps * 1e-2
    noise = 1.1 if actual.dtype == torch.float32 else 1.01
    assert error.square().mean().sqrt() <= noise * factor * allowed.square().mean().sqrt() + floor
    assert error.abs().max() <= 2 * factor * allowed.abs().max() + floor


def assert_within_budget(op: str, actual: Tensor, arguments: tuple, on_device: tuple) -> None:
    """A product by `op` against the float64 result, within the budget of README's numerics contract."""
    if op == "linear_int8":
        _assert_int8_is_exact(actual, *arguments)
        return
    exact = getattr(reference, op)(*(a.double() if _is_activation(a, arguments) else a for a in arguments))
    x, weight = on_device[0], _decoded(op, on_device)
    bias = on_device[-1] if op == "linear_4bit" else None
    plain = x @ weight if op.endswith("_dx") else F.linear(x, weight, bias)
    assert_error_within(actual, plain, exact, factor=1.5 if op.endswith("_dx") else 1.0)


def assert_composed_within_budget(op: str, actual: tuple, arguments: tuple, on_device: tuple) -> None:
    """y no further from the float64 result than the reference in the same dtype, gradients at most 1.5x as far."""
    names = [argument.name for argument in getattr(torch.ops.quantlib, op).default._schema.arguments]
    wide = (a.double() if name in ("x", "dy", "s", "bias") else a for name, a in zip(names, arguments, strict=True))
    function, factor = getattr(reference, op), 1.5 if op.endswith("_backward") else 1.0
    for ours, plain, exact in zip(actual, function(*on_device), function(*wide), strict=True):
        assert_error_within(ours, plain, exact, factor)


def _is_activation(a: Any, arguments: tuple) -> bool:
    """x, dy and the bias; the scales of the weight are float32 whatever is computed in."""
    return isinstance(a, Tensor) and a.is_floating_point() and (a is arguments[0] or a is arguments[-1])


def _decoded(op: str, arguments: tuple) -> Tensor:
    x, *weight = arguments
    if op == "linear_int8_dx":
        return reference.dequantize_int8(*weight, -1, None, x.dtype)
    shape = (x.shape[-1], weight[7]) if op == "linear_4bit_dx" else (weight[7], x.shape[-1])
    return reference.dequantize_4bit(*weight[:7], shape, x.dtype)


def _assert_int8_is_exact(actual: Tensor, x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor, threshold) -> None:
    """One rounding from the exact value, up to the few float32 operations before it."""
    # The integers depend on float32 scales, so they are taken from the reference in x's dtype.
    q, x_absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    exact = (q.double() @ values.double().t()) * (x_absmax.double()[:, None] * absmax.double()) / 127**2
    if threshold:
        w = values.double() * absmax.double()[:, None] / 127
        exact += x.double()[:, outliers] @ w[:, outliers].t()
    exact += bias.double()
    tolerance = torch.finfo(x.dtype).eps / 2 + 2e-6
    scale = exact.abs().max().item()
    torch.testing.assert_close(actual.cpu().double(), exact, rtol=tolerance, atol=2e-6 * scale)


# ---------------------------------------------------------------------------------------------------
# What CUDA has and a CPU has not: in a dry run the functions are simply called.


@contextmanager
def no_synchronization() -> Iterator[None]:
    """Raises where the host waits for the device."""
    if DRY_RUN:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def captured(function: Callable[[], Any]) -> tuple[Callable[[], None], Callable[[], Any]]:
    """(replay, result) of a CUDA graph of `function`; result() is what it returned, filled by the last replay."""
    if DRY_RUN:
        results = []
        return lambda: results.append(function()), lambda: results[-1]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles, fills caches, makes workspaces
        for _ in range(2):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = function()
    return graph.replay, lambda: result


def side_stream() -> AbstractContextManager:
    """A stream of its own, busy for a while: what is launched on another one in between comes too early."""
    return nullcontext() if DRY_RUN else _busy_stream()


@contextmanager
def _busy_stream() -> Iterator[None]:
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        yield
    stream.synchronize()


def free_memory() -> int:
    """Bytes free on the device."""
    return 0 if DRY_RUN else torch.cuda.mem_get_info()[0]


def skip_without_device() -> None:
    """Skips the test where neither a CUDA device nor a dry run is at hand."""
    if not DRY_RUN and not torch.cuda.is_available():
        pytest.skip("needs a GPU: torch finds no CUDA device")
