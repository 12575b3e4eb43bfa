"""LLM.int8() (arXiv:2208.07339): int8 x int8 on tensor cores, outlier columns of x in x's own dtype.

    y[m, n] = (acc * x_absmax[m] / 127 + sum of x[m, c] * W[n, c] over outlier columns c) * absmax[n] / 127 + bias[n]

with W the int8 values, which bfloat16 and float16 hold exactly, and acc the int32 product without the outlier columns.

Up to 2 rows: one launch. A program takes a few rows of W and all of K; it starts to load W, finds the scale and the
outlier columns of x, which a program sees whole, and multiplies with ordinary integer instructions.

More rows: one launch to quantize x (absmax.py), one to multiply. Both operands lie K-contiguous in shared memory as
tensor cores want them, brought there by TMA where the GPU has it. Few rows of x are the second operand, padded to 16
rather than 64, and K is split among programs: the last one to finish a tile sums the int32 parts, exact in any order.
The number of outlier columns is read on the device. Rows were quantized before anyone knew these columns, so a product
in int8 takes their part off the accumulator, which is then what the definition says to the bit; for many rows, another
launch clears them instead, which leaves the registers to a larger tile. On Turing, for which Triton has no tensor-core
products, the same integers are multiplied in float16, exact within a step.

Backward: W is decoded in shared-memory tiles for few rows; for many, once into a workspace for torch's matmul.

Compiled for sm_90: many rows wgmma.m64n128k32.s32.s8.s8 in tiles of 128 x 256, 242 registers, 192 KiB of shared memory,
no spills. Triton waits for each step's wgmma, as it does unless sums are float32; steps of 128 columns keep that below
a seventh. 16 rows: wgmma.m64n16k32, 56 registers, six stages. One row: dp4a, 0.5 instructions a weight.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F
from triton.tools.tensor_descriptor import TensorDescriptor

from .absmax import (
    clear_outliers,
    decoded_int8,
    dequantize_int8,
    exact_float,
    magnitude,
    outlier_count,
    outlier_limit,
    quantize_rows,
    quantized_int8,
)
from .launch import bucket, candidates, config, default_config, dot, launch, problem

LARGEST_K = 133144  # 127 * 127 * K fits into int32
FEW_ROWS = 2  # one launch; beyond, quantizing x in every program costs more than another launch
DX_ROWS = 512  # above, W is decoded to a workspace
_STEP = tl.constexpr(1 / 127)
_OUTLIERS, _OUTLIERS_INT8 = tl.constexpr(16), tl.constexpr(32)  # columns of a step, the least that tensor cores take


# ---------------------------------------------------------------------------------------------------
# Few rows: quantization and product in one kernel


@triton.jit
def _vectors(pointer, row, stride, first, rows, K, VECTORS: tl.constexpr, LENGTH: tl.constexpr):
    """[rows, VECTORS, LENGTH] of a matrix, from vector `first` of each row: a thread has vectors along K. 0 outside."""
    vector = first + tl.arange(0, VECTORS)[None, :, None]
    at = row[:, None, None].to(tl.int64) * stride + vector * LENGTH + tl.arange(0, LENGTH)[None, None, :]
    return tl.load(pointer + at, mask=(row[:, None, None] < rows) & (vector * LENGTH < K), other=0)


@triton.jit
def _fourths(t):
    """The four [A, B] of a tensor [A, B, 4]."""
    even, odd = tl.split(tl.reshape(t, (t.shape[0], t.shape[1], 2, 2)))
    a, c = tl.split(even)
    b, d = tl.split(odd)
    return a, b, c, d


@triton.jit
def _byte(word, PLACE: tl.constexpr):
    """One of a word's four int8."""
    return (word << (24 - 8 * PLACE)) >> 24


@triton.jit
def _dot4(a, b, acc, DP4A: tl.constexpr):
    """acc + the products of the four int8 of each word of a with those of b."""
    if DP4A:
        acc = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [a, b, acc], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for i in tl.static_range(4):
            acc += _byte(a, i) * _byte(b, i)
    return acc


@triton.jit(do_not_specialize=["M"])
def _few_rows_kernel(
    x,
    w,
    w_absmax,
    bias,
    y,
    M,
    N,
    K,
    x_row,
    limit,
    SPLIT: tl.constexpr,
    DP4A: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    VECTORS: tl.constexpr,
):
    """w: as words of four int8. A thread has 16 bytes of each of BLOCK_N rows of W at a time."""
    m = tl.arange(0, ROWS)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    vectors = K // 16
    ahead = _vectors(w, n, K // 4, 0, N, K // 4, VECTORS, 4)  # under way while x is looked at

    largest = tl.zeros((ROWS, VECTORS), tl.int32)
    hits = largest
    for first in range(0, vectors, VECTORS):
        size = magnitude(_vectors(x, m, x_row, first, M, K, VECTORS, 16))
        if SPLIT:
            found = size.to(tl.float32, bitcast=True) >= limit
            hits |= tl.max(found.to(tl.int32), 2)
            size = tl.where(found, 0, size)
        largest = tl.maximum(largest, tl.max(size, 2))
    x_absmax = tl.max(largest, 1).to(tl.float32, bitcast=True)
    split = 0
    if SPLIT:
        split = tl.max(tl.max(hits, 1), 0)

    acc = tl.zeros((ROWS, BLOCK_N, VECTORS), tl.int32)
    extra = tl.zeros((ROWS, BLOCK_N, VECTORS), tl.float32)
    for first in range(0, vectors, VECTORS):
        words = _fourths(ahead)
        ahead = _vectors(w, n, K // 4, first + VECTORS, N, K // 4, VECTORS, 4)
        tile = _vectors(x, m, x_row, first, M, K, VECTORS, 16).to(tl.float32)
        q = quantized_int8(tile, x_absmax[:, None, None])
        if split != 0:
            outlier = tl.max((tl.abs(tile) >= limit).to(tl.int32), 0)[None, :, :] != 0
            q = tl.where(outlier, 0, q)
            left = _fourths(tl.reshape(tl.where(outlier, tile, 0.0), (ROWS, VECTORS * 4, 4)))
            for byte in tl.static_range(4):
                parts = _fourths(tl.reshape(left[byte], (ROWS, VECTORS, 4)))
                for word in tl.static_range(4):
                    weight = exact_float(_byte(words[word], byte))
                    extra += parts[word][:, None, :] * weight[None, :, :]
        bytes_of_words = tl.reshape(q.to(tl.int32) & 255, (ROWS, VECTORS * 4, 4))
        packed = tl.sum(bytes_of_words << (8 * tl.arange(0, 4))[None, None, :], 2)
        packed = _fourths(tl.reshape(packed, (ROWS, VECTORS, 4)))
        for word in tl.static_range(4):
            acc = _dot4(words[word][None, :, :], packed[word][:, None, :], acc, DP4A)

    total = tl.sum(acc, 2).to(tl.float32) * (x_absmax * _STEP)[:, None] + tl.sum(extra, 2)
    _store(y, total, w_absmax, bias, m, n, M, N)


@triton.jit
def _store(y, total, w_absmax, bias, m, n, M, N):
    """y = total * w_absmax / 127 + bias for rows m and columns n."""
    column = n[None, :] < N
    total *= tl.load(w_absmax + n[None, :], mask=column, other=0.0) * _STEP
    if bias is not None:
        total += tl.load(bias + n[None, :], mask=column, other=0.0).to(tl.float32)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m[:, None] < M) & column)


# ---------------------------------------------------------------------------------------------------
# More rows: x is quantized already


@triton.jit
def _tile(source, first, start, rows, K, TMA: tl.constexpr, ROWS: tl.constexpr, BLOCK_K: tl.constexpr):
    """[ROWS, BLOCK_K] of an int8 matrix, a pointer or a TMA descriptor; 0 outside."""
    if TMA:
        tile = source.load([first, start])
    else:
        row = (first + tl.arange(0, ROWS))[:, None]
        k = start + tl.arange(0, BLOCK_K)[None, :]
        tile = tl.load(source + row.to(tl.int64) * K + k, mask=(row < rows) & (k < K), other=0)
    return tile


@triton.jit
def _columns(pointer, row, stride, rows, column, exists):
    """[rows, columns] gathered from a matrix; 0 outside."""
    return tl.load(
        pointer + row[:, None].to(tl.int64) * stride + column[None, :],
        mask=(row[:, None] < rows) & exists[None, :],
        other=0,
    )


@triton.jit
def _product(a, b, acc, WEIGHT_FIRST: tl.constexpr):
    """acc + a b^T, or acc + b a^T if the weight, b, is the first operand."""
    return dot(b, tl.trans(a), acc) if WEIGHT_FIRST else dot(a, tl.trans(b), acc)


@triton.jit
def _integer_product(a, b, acc, INT8: tl.constexpr, WEIGHT_FIRST: tl.constexpr):
    """_product of int8; without INT8 in float16, whose products sum up exactly for 1040 columns."""
    if INT8:
        acc = _product(a, b, acc, WEIGHT_FIRST)
    else:
        part = _product(a.to(tl.float16), b.to(tl.float16), tl.zeros(acc.shape, tl.float32), WEIGHT_FIRST)
        acc += part.to(tl.int32)
    return acc


@triton.jit
def _finish(
    acc,
    first_m,
    first_n,
    x,
    q,
    w,
    x_absmax,
    w_absmax,
    bias,
    count,
    columns,
    y,
    M,
    N,
    K,
    x_row,
    SPLIT: tl.constexpr,
    CLEARED: tl.constexpr,
    INT8: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """From the int32 product of a tile to y."""
    m = first_m + tl.arange(0, BLOCK_M)
    n = first_n + tl.arange(0, BLOCK_N)
    if SPLIT and not CLEARED:
        for start in range(0, count, _OUTLIERS_INT8):
            i = start + tl.arange(0, _OUTLIERS_INT8)
            column = tl.load(columns + i, mask=i < count, other=0)
            taken = _columns(q, m, K, M, column, i < count)
            weight = _columns(w, n, K, N, column, i < count)
            acc = _integer_product(-taken, weight, acc, INT8, WEIGHT_FIRST)
    scale = tl.load(x_absmax + m, mask=m < M, other=0.0) * _STEP
    total = acc.to(tl.float32) * tl.expand_dims(scale, 0 if WEIGHT_FIRST else 1)
    if SPLIT:
        for start in range(0, count, _OUTLIERS):
            i = start + tl.arange(0, _OUTLIERS)
            column = tl.load(columns + i, mask=i < count, other=0)
            left = _columns(x, m, x_row, M, column, i < count)
            weight = _columns(w, n, K, N, column, i < count).to(x.dtype.element_ty)
            total = _product(left, weight, total, WEIGHT_FIRST)
    if WEIGHT_FIRST:
        total = tl.trans(total)
    _store(y, total, w_absmax, bias, m, n, M, N)


@triton.jit(do_not_specialize=["M"])
def _product_kernel(
    x,
    q_tiles,
    w_tiles,
    q,
    w,
    x_absmax,
    w_absmax,
    bias,
    state,
    columns,
    parts,
    y,
    M,
    N,
    K,
    x_row,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
    CLEARED: tl.constexpr,
    INT8: tl.constexpr,
    WEIGHT_FIRST: tl.constexpr,
    SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    tiles_m, tiles_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    tiles = tiles_m * tiles_n
    tile = tl.program_id(0) % tiles
    part = tl.program_id(0) // tiles
    # Neighbours in time share rows of x and of W in L2: columns of at most GROUP_M tiles, one after the other.
    group = tile // (GROUP_M * tiles_n)
    height = tl.minimum(tiles_m - group * GROUP_M, GROUP_M)
    first_m = (group * GROUP_M + tile % (GROUP_M * tiles_n) % height) * BLOCK_M
    first_n = tile % (GROUP_M * tiles_n) // height * BLOCK_N

    count = 0  # outlier columns; asked for here, it is known when it is needed
    if SPLIT:
        count = outlier_count(state, K)

    share = tl.cdiv(tl.cdiv(K, BLOCK_K), SPLIT_K) * BLOCK_K
    acc = tl.zeros((BLOCK_N, BLOCK_M) if WEIGHT_FIRST else (BLOCK_M, BLOCK_N), tl.int32)
    for start in range(part * share, tl.minimum((part + 1) * share, K), BLOCK_K):
        a = _tile(q_tiles, first_m, start, M, K, TMA, BLOCK_M, BLOCK_K)
        b = _tile(w_tiles, first_n, start, N, K, TMA, BLOCK_N, BLOCK_K)
        acc = _integer_product(a, b, acc, INT8, WEIGHT_FIRST)

    if SPLIT_K == 1:
        last = True
    else:
        shape: tl.constexpr = acc.shape
        within = tl.arange(0, shape[0])[:, None] * shape[1] + tl.arange(0, shape[1])[None, :]
        place = parts + tile.to(tl.int64) * SPLIT_K * BLOCK_M * BLOCK_N + within
        tl.store(place + part * BLOCK_M * BLOCK_N, acc)
        arrivals = (state + tl.cdiv(K if SPLIT else 0, 16) * 16 + 16).to(tl.pointer_type(tl.int32))
        tl.debug_barrier()  # every thread's part comes before its program's arrival
        last = tl.atomic_add(arrivals + tile, 1, sem="acq_rel") == SPLIT_K - 1
        if last:
            acc = tl.zeros_like(acc)
            for i in range(SPLIT_K):
                acc += tl.load(place + i * BLOCK_M * BLOCK_N, cache_modifier=".cg")
    if last:
        _finish(
            acc,
            first_m,
            first_n,
            x,
            q,
            w,
            x_absmax,
            w_absmax,
            bias,
            count,
            columns,
            y,
            M,
            N,
            K,
            x_row,
            SPLIT,
            CLEARED,
            INT8,
            WEIGHT_FIRST,
            BLOCK_M,
            BLOCK_N,
        )


# ---------------------------------------------------------------------------------------------------
# Backward


@triton.jit(do_not_specialize=["M"])
def _dx_kernel(
    dy,
    w,
    w_absmax,
    dx,
    M,
    N,
    K,
    dy_row,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """dx [M, K] = dy [M, N] @ W; a program has BLOCK_M rows and BLOCK_K columns of dx."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    m = tl.program_id(0) % tiles_m * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
    k = tl.program_id(0) // tiles_m * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, N, BLOCK_N):
        across = start + tl.arange(0, BLOCK_N)[None, :]
        down = start + tl.arange(0, BLOCK_N)[:, None]
        a = tl.load(dy + m.to(tl.int64) * dy_row + across, mask=(m < M) & (across < N), other=0.0)
        values = tl.load(w + down.to(tl.int64) * K + k, mask=(down < N) & (k < K), other=0)
        scale = tl.load(w_absmax + down, mask=down < N, other=0.0)
        acc = dot(a, decoded_int8(values, scale).to(dy.dtype.element_ty), acc)
    tl.store(dx + m.to(tl.int64) * K + k, acc.to(dx.dtype.element_ty), mask=(m < M) & (k < K))


# ---------------------------------------------------------------------------------------------------
# Configurations


@default_config("linear_int8_few_rows")
def _(arch, *, m, n, k):
    if arch.interpreted:
        return {"BLOCK_N": 8, "VECTORS": 16, "DP4A": False, "num_warps": 1, "num_stages": 1}
    block_n = 16 if m == 1 and n >= 24 * arch.multiprocessors else 8
    vectors = max(min(triton.next_power_of_2(k // 16), 4 * arch.warp), arch.warp)
    return _few_rows_config(arch, block_n, vectors)


@candidates("linear_int8_few_rows")
def _(arch, *, m, n, k):
    for block_n in (4, 8, 16):
        for warps in (2, 4, 8):
            yield _few_rows_config(arch, block_n, warps * arch.warp)


def _few_rows_config(arch, block_n, vectors):
    launched = {"num_warps": vectors // arch.warp, "num_stages": 1}
    return {"BLOCK_N": block_n, "VECTORS": vectors, "DP4A": arch.kind == "cuda", **launched}


def _tile_config(arch, m, n, k, block_m, block_n, block_k, warps):
    """Stages that fit, for one large tile or two small ones a multiprocessor, and K split to occupy all of them."""
    resident = 1 if block_m * block_n > 128 * 64 else 2
    stages = arch.shared_memory * 9 // 10 // resident // ((block_m + block_n) * block_k)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = min(resident * arch.multiprocessors // tiles, k // (4 * block_k), 16)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "SPLIT_K": max(split, 1)}
    hopper = arch.kind == "cuda" and arch.capability >= 90
    way = {"WEIGHT_FIRST": block_m < 64, "TMA": hopper, "CLEARED": m > 512, "INT8": arch.capability != 75}
    return {**blocks, **way, "num_warps": warps, "num_stages": max(2, min(stages, 4 if resident == 1 else 6))}


@default_config("linear_int8")
def _(arch, *, m, n, k, dtype):
    hopper = arch.kind == "cuda" and arch.capability >= 90
    small = arch.shared_memory <= 64 * 1024
    if arch.interpreted:
        tile = (16 if m <= 16 else 64, 32, 64, 1)
    elif arch.capability == 75:
        tile = (16 if m <= 16 else 32, 32, 32, 8)
    elif m <= 64:
        tile = (max(m, 16), 64, 64 if small else 128, 4)
    elif dtype == torch.float32:
        tile = (64, 64, 64, 8)
    elif m <= 128 or small:
        tile = (128, 64, 64 if small else 128, 8)
    elif m <= 512 or arch.capability != 90:  # mma.sync's accumulators leave no registers for larger tiles
        tile = (128, 128, 128 if hopper else 64, 8)
    else:
        tile = (128, 256, 128, 8)
    return _tile_config(arch, m, n, k, *tile)


@candidates("linear_int8")
def _(arch, *, m, n, k, dtype):
    largest = 64 * 64 if dtype == torch.float32 else 128 * 256
    for block_m in (16, 32, 64) if m <= 64 else (64, 128):
        for block_n in (64, 128, 256):
            for block_k in (64, 128, 256):
                if (block_m + block_n) * block_k * 2 > arch.shared_memory or block_m * block_n > largest:
                    continue
                tile = _tile_config(arch, m, n, k, block_m, block_n, block_k, 8 if block_m * block_n > 8192 else 4)
                yield tile
                if block_m * block_n == 128 * 128:  # two programs on a multiprocessor: one multiplies, one waits
                    yield {**tile, "num_stages": 3, "maxnreg": 128}


@default_config("linear_int8_dx")
def _(arch, *, m, n, k, dtype):
    if arch.interpreted:
        return {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "num_warps": 1, "num_stages": 1}
    plain = dtype == torch.float32 or arch.capability == 75  # multiplied by ordinary instructions
    blocks = {"BLOCK_M": min(max(m, 16), 64), "BLOCK_N": 32 if plain else 64, "BLOCK_K": 32 if m <= 16 else 64}
    if arch.capability == 75:
        blocks = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64}
    elif m > 64 and not plain:
        blocks = {"BLOCK_M": 128, "BLOCK_N": 64, "BLOCK_K": 128}
    warps = 8 if m > 64 and arch.capability != 75 else 4
    return {**blocks, "num_warps": warps, "num_stages": 2 if arch.shared_memory <= 64 * 1024 else 3}


@candidates("linear_int8_dx")
def _(arch, *, m, n, k, dtype):
    for block_m in (16, 32, 64) if m <= 64 else (64, 128):
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


# ---------------------------------------------------------------------------------------------------
# Launchers


def _rows_of(op: str, name: str, x: Tensor, size: int, values: Tensor, absmax: Tensor) -> Tensor:
    """x as a matrix whose rows are contiguous, once it is known to fit the weight."""
    if not x.dim() or x.shape[-1] != size or absmax.shape != values.shape[:1]:
        raise ValueError(
            f"quant_triton.{op}: {name} has shape {tuple(x.shape)}, values {tuple(values.shape)} and absmax "
            f"{tuple(absmax.shape)}; {name} ends in {size} features, absmax has one element per row of values"
        )
    rows = x.reshape(math.prod(x.shape[:-1]), size)
    return rows if rows.stride(1) == 1 or size == 1 else rows.contiguous()


def linear_int8(x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8(): `y = x W^T + bias`, int8 x int8 for the ordinary columns of x, x's dtype for the outlier columns.

    Args:
        x: [..., K], any strides, float32, float16 or bfloat16. values: [N, K] int8. absmax: [N] float32.
        bias: [N] or None. threshold: columns of x with an element of at least this magnitude are outliers; 0 for none.

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
        multiply = _few_rows if m <= FEW_ROWS else _many_rows
        multiply(*_aligned(rows, values), absmax, bias, threshold, y)
    return y.view(*x.shape[:-1], n)


def _aligned(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Both with rows of a multiple of 16 features, W's at multiples of 16 bytes: as they are, or copied with zeros."""
    values, odd = values.contiguous(), -values.shape[1] % 16
    if odd:
        return F.pad(x, (0, odd)), F.pad(values, (0, odd))
    return x, values if values.data_ptr() % 16 == 0 else values.clone()


def _few_rows(x: Tensor, w: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, y: Tensor) -> None:
    (m, k), n = x.shape, w.shape[0]
    tile = config("linear_int8_few_rows", x.device, m=bucket(m), n=n, k=k)
    arguments = (x, w.view(torch.int32), absmax, bias, y, m, n, k, x.stride(0), outlier_limit(threshold, x.dtype))
    constants = {"SPLIT": threshold > 0, "ROWS": bucket(m), **tile}
    launch(_few_rows_kernel, (triton.cdiv(n, tile["BLOCK_N"]),), *arguments, fp_fusion=True, **constants)


def _many_rows(x: Tensor, w: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, y: Tensor) -> None:
    (m, k), n, device = x.shape, w.shape[0], x.device
    tile = dict(config("linear_int8", device, m=bucket(m), n=n, k=k, dtype=x.dtype))
    tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    split_k = tile["SPLIT_K"]
    q, x_absmax, outliers = quantize_rows(x, threshold, extra=4 * tiles if split_k > 1 else 0)
    found = (outliers.state, outliers.columns if threshold > 0 else None) if outliers else (None, None)
    if threshold > 0 and tile["CLEARED"]:
        clear_outliers(q, outliers)
    parts = None
    if split_k > 1:
        parts = torch.empty(tiles * split_k * tile["BLOCK_M"] * tile["BLOCK_N"], dtype=torch.int32, device=device)
    q_tiles, w_tiles = q, w
    if tile["TMA"]:
        q_tiles = TensorDescriptor(q, [m, k], [k, 1], [tile["BLOCK_M"], tile["BLOCK_K"]])
        w_tiles = TensorDescriptor(w, [n, k], [k, 1], [tile["BLOCK_N"], tile["BLOCK_K"]])
    arguments = (x, q_tiles, w_tiles, q, w, x_absmax, absmax, bias, *found, parts, y, m, n, k, x.stride(0))
    launch(_product_kernel, (tiles * split_k,), *arguments, fp_fusion=True, SPLIT=threshold > 0, **tile)


def linear_int8_dx(dy: Tensor, values: Tensor, absmax: Tensor) -> Tensor:
    """Gradient of `linear_int8` for x, straight through its rounding: `dy @ W`, W decoded to dy's dtype.

    Args:
        dy: [..., N], any strides, float32, float16 or bfloat16. values: [N, K] int8. absmax: [N] float32.

    Returns:
        [..., K] in dy's dtype.

    Raises:
        ValueError: shapes that do not go together.
    """
    n, k = values.shape
    rows = _rows_of("linear_int8_dx", "dy", dy, n, values, absmax)
    m = rows.shape[0]
    if not n or not m or not k:
        return dy.new_zeros((*dy.shape[:-1], k))
    if m > DX_ROWS:
        return dy @ dequantize_int8(values, absmax, -1, None, dy.dtype)
    dx = torch.empty((m, k), dtype=dy.dtype, device=dy.device)
    tile = config("linear_int8_dx", dy.device, m=bucket(m), n=n, k=k, dtype=dy.dtype)
    grid = (triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(k, tile["BLOCK_K"]),)
    arguments = (rows, values.contiguous(), absmax, dx, m, n, k, rows.stride(0))
    launch(_dx_kernel, grid, *arguments, fp_fusion=False, **tile)
    return dx.view(*dy.shape[:-1], k)
