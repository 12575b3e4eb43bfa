"""The kernels of absmax int8, the format's arithmetic for other kernels, and outlier columns; see absmax.py.

Outliers. An element at or above the threshold counts in no absmax, which a row decides alone; but its column is an
outlier in every row, which only the whole batch decides. So rows are quantized without waiting for it: they store a
flag for the column of each outlier, and the program that arrives last writes the list of flagged columns and their
number, for later kernels to read as the bound of a loop. The values that rows wrote into those columns are then
cleared (`quantize_int8`) or taken off the product (`linear_int8`). The host waits for nothing; one buffer, zeroed by
torch, holds the flags and the counter.

On sm_90 a bfloat16 element of a row of 4096 takes 13 instructions of the 20 there is time for at the bandwidth of an
H200, in 47 registers; 63 if it looks for outliers. No spills.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

_STEP = tl.constexpr(1 / 127)
_LARGEST = tl.constexpr(3.4028234663852886e38)
_ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: a float32 sum with it is rounded to an integer, half to even
_ROUND_BITS = tl.constexpr(0x4B400000)


# ---------------------------------------------------------------------------------------------------
# Arithmetic of the format


@triton.jit
def exact_float(values):
    """int8 as float32 by two additions, each of which runs eight times as fast as a conversion."""
    return (values.to(tl.int32) + _ROUND_BITS).to(tl.float32, bitcast=True) - _ROUND


@triton.jit
def decoded_int8(values, absmax):
    """`values * absmax * (1 / 127)` in float32, each product rounded (fp_fusion off); absmax must broadcast."""
    return exact_float(values) * absmax * _STEP


@triton.jit
def quantized_int8(x, absmax):
    """round(x * (1 / absmax * 127)), half to even; 0 where scale or absmax is not finite. absmax must broadcast."""
    scale = tl.div_rn(1.0, absmax) * 127  # two roundings, as in bitsandbytes
    usable = (scale <= _LARGEST) & (absmax <= _LARGEST)
    rounded = tl.where(usable, x * scale, 0.0) + _ROUND  # the integer is in the last bits of the sum
    return rounded.to(tl.int32, bitcast=True).to(tl.int8)


@triton.jit
def magnitude(x):
    """|x| as the bits of a float32, which order as integers do, NaN last."""
    return x.to(tl.float32).to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _largest(x, AXIS: tl.constexpr):
    return tl.max(magnitude(x), AXIS).to(tl.float32, bitcast=True)


# ---------------------------------------------------------------------------------------------------
# Outlier columns


@triton.jit
def _list_columns(flags, columns, n_columns, WORDS: tl.constexpr):
    """Writes the flagged columns in rising order; how many there are."""
    words = flags.to(tl.pointer_type(tl.int32))  # of four flags, 0 or 1 each
    count = 0
    for start in range(0, tl.cdiv(n_columns, 4), WORDS):
        k = start + tl.arange(0, WORDS)
        word = tl.load(words + k, mask=k < tl.cdiv(n_columns, 4), other=0, cache_modifier=".cg")
        ones = (word * 0x01010101) >> 24
        rank = count + tl.cumsum(ones, 0) - ones
        for byte in tl.static_range(4):
            flag = (word >> (8 * byte)) & 1
            tl.store(columns + rank, 4 * k + byte, mask=flag != 0)
            rank += flag
        count += tl.sum(ones, 0)
    return count


@triton.jit
def _split_outliers(x, column, inside, limit, flags):
    """Flags the columns of |x| >= limit: (x without these elements, 1 if there may be any)."""
    largest = tl.max(tl.max(magnitude(x), 1), 0).to(tl.float32, bitcast=True)
    hit = 1 - (largest < limit).to(tl.int32)  # also for a NaN, which is no outlier
    if hit != 0:
        found = (tl.abs(x) >= limit) & inside
        tl.store(flags + column + tl.zeros(found.shape, tl.int32), 1, mask=found)
        x = tl.where(found, 0.0, x)
    return x, hit


@triton.jit
def _arrive(hit, flags, columns, n_columns):
    """The end of a program: the last one to come here lists the outlier columns."""
    tail = flags + tl.cdiv(n_columns, 16) * 16
    tl.debug_barrier()  # every thread's flags come before its program's arrival
    before = tl.atomic_add(tail.to(tl.pointer_type(tl.int64)), 1 + (hit.to(tl.int64) << 32), sem="acq_rel")
    if (before & 0xFFFFFFFF) == tl.num_programs(0) - 1:
        count = 0
        if (before >> 32) + hit > 0:
            count = _list_columns(flags, columns, n_columns, WORDS=512)
        tl.store((tail + 8).to(tl.pointer_type(tl.int32)), count)


@triton.jit
def outlier_count(flags, n_columns):
    """The number of outlier columns, once the kernel that quantizes is done."""
    return tl.load((flags + tl.cdiv(n_columns, 16) * 16 + 8).to(tl.pointer_type(tl.int32)))


@dataclass(frozen=True)
class Outliers:
    """What kernels tell each other about outlier columns.

    state: zeros before the first kernel, uint8: a flag a column, then, from the next multiple of 16 bytes, the counter
    of programs (8 bytes), the number of outlier columns (int32), 4 bytes of nothing and `extra` bytes for others.
    columns: [n_columns] int32, the outlier columns in rising order; as many as there are.
    """

    state: Tensor
    columns: Tensor

    @staticmethod
    def of(n_columns: int, device: torch.device, extra: int = 0) -> Outliers:
        state = torch.zeros(tail(n_columns) + 16 + extra, dtype=torch.uint8, device=device)
        return Outliers(state, torch.empty(n_columns, dtype=torch.int32, device=device))


def tail(n_columns: int) -> int:
    """Where the flags of so many columns end in `Outliers.state`, rounded up."""
    return triton.cdiv(n_columns, 16) * 16


@functools.cache
def outlier_limit(threshold: float, dtype: torch.dtype) -> float:
    """The threshold rounded to x's dtype, as bitsandbytes compares."""
    return torch.full((), threshold, dtype=dtype, device="cpu").item()


# ---------------------------------------------------------------------------------------------------
# Kernels. A matrix of R rows and C columns; PARTIAL: only its first n elements exist.


@triton.jit
def _place(R, C, n, PARTIAL: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """(row, column, which elements exist) of this program's tile, int64."""
    tiles = tl.cdiv(C, BLOCK_C)
    row = (tl.program_id(0) // tiles).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    column = (tl.program_id(0) % tiles).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (row < R) & (column < C)
    if PARTIAL:
        inside &= row * C + column < n
    return row, column, inside


@triton.jit(do_not_specialize=["R"])
def quantize_kernel(
    x,
    values,
    absmax,
    flags,
    columns,
    norm_weight,
    normed,
    R,
    C,
    n,
    x_row,
    x_column,
    limit,
    eps,
    AXIS: tl.constexpr,
    SPLIT: tl.constexpr,
    NORM: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """A tile holds whole rows (AXIS 1) or columns (AXIS 0). NORM: RMSNorm first, for AXIS 1."""
    row = tl.arange(0, BLOCK_R)[:, None].to(tl.int64)
    column = tl.arange(0, BLOCK_C)[None, :].to(tl.int64)
    if AXIS == 1:
        row += tl.program_id(0).to(tl.int64) * BLOCK_R
    else:
        column += tl.program_id(0).to(tl.int64) * BLOCK_C
    inside = (row < R) & (column < C)
    if PARTIAL:
        inside &= row * C + column < n
    at = row * C + column
    tile = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    if NORM:
        inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.sum(tile * tile, 1) / C + eps))
        weight = tl.load(norm_weight + column, mask=column < C, other=0.0).to(tl.float32)
        low = (tile * inverse[:, None] * weight).to(normed.dtype.element_ty)
        tl.store(normed + at, low, mask=inside)
        tile = low.to(tl.float32)
    if SPLIT:
        tile, hit = _split_outliers(tile, column, inside, limit, flags)
    largest = _largest(tile, AXIS)
    if AXIS == 1:
        tl.store(absmax + row, tl.expand_dims(largest, 1), mask=row < R)
    else:
        tl.store(absmax + column, tl.expand_dims(largest, 0), mask=column < C)
    tl.store(values + at, quantized_int8(tile, tl.expand_dims(largest, AXIS)), mask=inside)
    if SPLIT:
        _arrive(hit, flags, columns, C)


@triton.jit(do_not_specialize=["R"])
def absmax_kernel(
    x,
    row_absmax,
    column_absmax,
    flags,
    columns,
    R,
    C,
    n,
    x_row,
    x_column,
    limit,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Maxima, as the bits of float32, of rows, columns or both; they start as zeros."""
    row, column, inside = _place(R, C, n, PARTIAL, BLOCK_R, BLOCK_C)
    tile = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        tile, hit = _split_outliers(tile, column, inside, limit, flags)
    if ROWS:
        tl.atomic_max(row_absmax + row, tl.max(magnitude(tile), 1)[:, None], mask=row < R, sem="relaxed")
    if COLUMNS:
        tl.atomic_max(column_absmax + column, tl.max(magnitude(tile), 0)[None, :], mask=column < C, sem="relaxed")
    if SPLIT:
        _arrive(hit, flags, columns, C)


@triton.jit(do_not_specialize=["R"])
def scale_kernel(
    x,
    absmax,
    values,
    flags,
    R,
    C,
    n,
    x_row,
    x_column,
    AXIS: tl.constexpr,
    SPLIT: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Values from known absmax; outliers and their columns become zeros."""
    row, column, inside = _place(R, C, n, PARTIAL, BLOCK_R, BLOCK_C)
    tile = tl.load(x + row * x_row + column * x_column, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:
        ordinary = tl.load(flags + column, mask=column < C, other=0) == 0
        tile = tl.where(ordinary, tile, 0.0)
    scale = tl.load(absmax + row, mask=row < R) if AXIS == 1 else tl.load(absmax + column, mask=column < C)
    tl.store(values + row * C + column, quantized_int8(tile, scale), mask=inside)


@triton.jit(do_not_specialize=["R"])
def clear_kernel(values, flags, columns, R, C, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    """Zeros in the outlier columns of values."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)[:, None]
    count = outlier_count(flags, C)
    for start in range(0, count, BLOCK_C):
        i = start + tl.arange(0, BLOCK_C)[None, :]
        column = tl.load(columns + i, mask=i < count, other=0)
        tl.store(values + row * C + column, tl.zeros((BLOCK_R, BLOCK_C), tl.int8), mask=(row < R) & (i < count))


@triton.jit(do_not_specialize=["R"])
def dequantize_kernel(
    values,
    absmax,
    out,
    R,
    C,
    n,
    AXIS: tl.constexpr,
    PARTIAL: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    row, column, inside = _place(R, C, n, PARTIAL, BLOCK_R, BLOCK_C)
    at = row * C + column
    scale = tl.load(absmax + row, mask=row < R) if AXIS == 1 else tl.load(absmax + column, mask=column < C)
    result = decoded_int8(tl.load(values + at, mask=inside, other=0), scale)
    tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
