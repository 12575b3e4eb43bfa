"""LLM.int8() (arXiv:2208.07339): int8 x int8 on tensor cores, outlier columns of x in x's own dtype.

    y[m, n] = (acc * x_absmax[m] / 127 + sum of x[m, c] * W[n, c] over outlier columns c) * absmax[n] / 127 + bias[n]

with W the int8 values, which bfloat16 and float16 hold exactly, and acc the int32 product without the outlier columns;
and a LoRA branch, if there is one (`branch.py`), before the one rounding.

Up to 2 rows: one launch (int8_few_rows.py). More: one to quantize x, one to multiply (int8_many_rows.py).

Backward: W is decoded in shared-memory tiles for few rows, whose sums start with a branch's, dropout included; for
many, once into a workspace for torch's matmul.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from .absmax import dequantize_int8
from .absmax_kernels import decoded_int8
from .branch import Lora, branch, branch_arguments
from .int8_few_rows import few_rows
from .int8_many_rows import many_rows
from .launch import bucket, candidates, config, default_config, dot, launch, problem
from .low_rank import add_branch_

LARGEST_K = 133144  # 127 * 127 * K fits into int32
FEW_ROWS = 2
DX_ROWS = 512  # above, W is decoded to a workspace
LEAST_SCALING = 1e-20  # of a branch: sums are divided by it, and must not overflow


@triton.jit(do_not_specialize=["M", "threshold"])
def dx_kernel(
    dy,
    w,
    w_absmax,
    dx,
    M,
    N,
    K,
    dy_row,
    lora_s,
    lora_b,
    lora_seed,
    rank,
    stride_feature,
    stride_factor,
    scaling,
    threshold,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx [M, K] = dy [M, N] @ W + a branch; a program has BLOCK_M rows and BLOCK_K columns of dx."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    first_k = tl.program_id(0) // tiles_m * BLOCK_K
    k = first_k + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    if RANK > 0:  # first, while there are no other sums to be kept in registers
        row = tl.reshape(tl.minimum(m, M - 1), (BLOCK_M,)).to(tl.int64)
        lora = (lora_s, lora_b, lora_seed, rank, stride_feature, stride_factor, scaling, threshold)
        acc = branch(lora, row, first_k, K, dy.dtype.element_ty, RANK, DROP, False, BLOCK_K)
    for start in range(0, N, BLOCK_N):
        across = start + tl.arange(0, BLOCK_N)[None, :]
        down = start + tl.arange(0, BLOCK_N)[:, None]
        a = tl.load(dy + m.to(tl.int64) * dy_row + across, mask=(m < M) & (across < N), other=0.0)
        values = tl.load(w + down.to(tl.int64) * K + k, mask=(down < N) & (k < K), other=0)
        scale = tl.load(w_absmax + down, mask=down < N, other=0.0)
        acc = dot(a, decoded_int8(values, scale).to(dy.dtype.element_ty), acc)
    tl.store(dx + m.to(tl.int64) * K + k, acc.to(dx.dtype.element_ty), mask=(m < M) & (k < K))


@default_config("linear_int8_dx")
def _(arch, *, m, n, k, dtype):
    if arch.interpreted:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1}
    plain = dtype == torch.float32 or arch.capability == 75  # multiplied by ordinary instructions
    mma_sync = arch.kind == "cuda" and arch.capability // 10 in (8, 12)  # whose operands lie in registers
    blocks = {"BLOCK_M": min(max(m, 16), 64), "BLOCK_N": 32 if plain else 64, "BLOCK_K": 32 if m <= 16 else 64}
    if arch.capability == 75:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}
    elif plain and arch.rounds_float32:
        blocks["BLOCK_M"] = min(blocks["BLOCK_M"], 32)
    elif m > 64 and not plain:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 32 if mma_sync else 64, "BLOCK_K": 128}
    warps = 8 if m > (32 if plain else 64) and arch.capability != 75 else 4
    return {**blocks, "num_warps": warps, "num_stages": 2 if arch.shared_memory <= 64 * 1024 else 4}


@candidates("linear_int8_dx")
def _(arch, *, m, n, k, dtype):
    small = dtype == torch.float32 and arch.rounds_float32
    for block_m in (16, 32) if small else (16, 32, 64) if m <= 64 else (64, 128):
        for block_k in (32, 64, 128):
            for block_n in (32, 64, 128):
                warps = 8 if block_m * block_k >= 128 * 64 else 4
                blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k}
                yield {**blocks, "num_warps": warps, "num_stages": 3}


def _inputs(device, m, n, k, dtype=torch.bfloat16):
    x = torch.randn(m, k, device=device, dtype=dtype)
    x[:, :: k // 7] *= 20  # outlier columns, as language models have them
    return x, torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device), torch.rand(n, device=device)


@problem("linear_int8_few_rows")
def _(device, m, n, k):
    arguments = _inputs(device, m, n, k)
    return lambda: linear_int8(*arguments, None, 6.0)


@problem("linear_int8")
def _(device, m, n, k, dtype):
    arguments = _inputs(device, m, n, k, dtype)
    return lambda: linear_int8(*arguments, None, 6.0)


@problem("linear_int8_dx")
def _(device, m, n, k, dtype):
    _, *weight = _inputs(device, m, n, k)
    dy = torch.randn(m, n, device=device, dtype=dtype)
    return lambda: linear_int8_dx(dy, *weight)


def _rows_of(op: str, name: str, x: Tensor, size: int, values: Tensor, absmax: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous, once it is known to fit the weight."""
    if not x.dim() or x.shape[-1] != size or absmax.shape != values.shape[:1]:
        raise ValueError(
            f"quant_triton.{op}: {name} has shape {tuple(x.shape)}, values {tuple(values.shape)} and absmax "
            f"{tuple(absmax.shape)}; {name} ends in {size} features, absmax has one element per row of values"
        )
    rows = x.reshape(math.prod(x.shape[:-1]), size)
    return rows if rows.stride(1) == 1 or size == 1 else rows.contiguous()


def _aligned(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows of a multiple of 16 features, W's at multiples of 16 bytes: as they are, or copied with zeros."""
    values, odd = values.contiguous(), -values.shape[1] % 16
    if odd:
        return F.pad(x, (0, odd)), F.pad(values, (0, odd))
    return x, values if values.data_ptr() % 16 == 0 else values.clone()


def linear_int8(
    x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, *, lora: Lora | None = None
) -> Tensor:
    """LLM.int8(): `y = x W^T + bias`, int8 x int8 for the ordinary columns of x, x's dtype for the outlier columns.

    Args:
        x: [..., K], any strides, float32, float16 or bfloat16. values: [N, K] int8. absmax: [N] float32.
        bias: [N] or None. threshold: columns of x with an element of at least this magnitude are outliers; 0 for none.
        lora: a branch without dropout to be added, whose scaling is at least LEAST_SCALING in magnitude.

    Returns:
        [..., N] in x's dtype, rounded once from float32; int32 sums are exact. A row of x with a NaN, or with an
        infinity below no threshold, gives NaN.

    Raises:
        ValueError: shapes that do not go together, or K above 133144, where an int32 could overflow.
    """
    n, k = values.shape
    rows = _rows_of("linear_int8", "x", x, k, values, absmax)
    if k > LARGEST_K:
        raise ValueError(f"quant_triton.linear_int8: K is {k}; sums in int32 are exact up to {LARGEST_K}")
    m = rows.shape[0]
    y = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if not y.numel() or not k:
        y.copy_(torch.zeros_like(y) if bias is None else bias)
    else:
        multiply = few_rows if m <= FEW_ROWS else many_rows
        bias = None if bias is None else bias.contiguous()
        multiply(*_aligned(rows, values), absmax.contiguous(), bias, threshold, lora, y)
    return y.view(*x.shape[:-1], n)


def linear_int8_dx(dy: Tensor, values: Tensor, absmax: Tensor, *, lora: Lora | None = None) -> Tensor:
    """Gradient of `linear_int8` for x, straight through its rounding: `dy @ W`, W decoded to dy's dtype.

    Args:
        dy: [..., N], any strides, float32, float16 or bfloat16. values: [N, K] int8. absmax: [N] float32.
        lora: a branch to be added.

    Returns:
        [..., K] in dy's dtype.

    Raises:
        ValueError: shapes that do not go together.
    """
    n, k = values.shape
    rows = _rows_of("linear_int8_dx", "dy", dy, n, values, absmax)
    m, shape = rows.shape[0], (*dy.shape[:-1], k)
    if m > DX_ROWS or not n:
        dx = rows @ dequantize_int8(values, absmax, -1, None, dy.dtype) if n else dy.new_zeros((m, k))
        return (dx if lora is None else add_branch_(dx, lora)).view(shape)
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    tile = config("linear_int8_dx", dy.device, m=bucket(m), n=n, k=k, dtype=dy.dtype)
    grid = (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(k, tile["BLOCK_K"]),)
    arguments = (rows, values.contiguous(), absmax.contiguous(), dx, m, n, k, rows.stride(0))
    constants = {**branch_arguments(lora, dy), **tile}
    launch(dx_kernel, grid, *arguments, fp_fusion=False, **constants)
    return dx.view(shape)
