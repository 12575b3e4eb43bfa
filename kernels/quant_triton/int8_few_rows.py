"""LLM.int8() for up to 2 rows: quantization and product in one kernel.

A program takes a few rows of W and all of K. It starts to load W, finds the scale and the outlier columns of x, which a
program sees whole, quantizes x and multiplies four int8 at a time: dp4a, half an instruction a weight and row; outlier
columns, where there are any, as float32. More rows would have every program quantize too much.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .absmax_kernels import exact_float, magnitude, outlier_limit, quantized_int8
from .branch import Lora
from .int8_epilogue import epilogue_arguments, store_int8
from .launch import bucket, candidates, config, default_config, launch

_STEP = tl.constexpr(1 / 127)


@triton.jit
def _vectors(pointer, row, stride, first, rows, K, VECTORS: tl.constexpr, LENGTH: tl.constexpr):
    """[rows, VECTORS, LENGTH] of a matrix, from vector `first` of each row: a thread has vectors along K. 0 outside."""
    k = (first * LENGTH + tl.arange(0, VECTORS * LENGTH))[None, :]
    at = row[:, None].to(tl.int64) * stride + k
    # As a matrix, since Triton 3.6 would have neighbouring threads load from different rows of the vectors.
    tile = tl.load(pointer + at, mask=(row < rows)[:, None] & (k < K), other=0)
    return tl.reshape(tile, (row.shape[0], VECTORS, LENGTH))


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
def few_rows_kernel(
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
    lora_s,
    lora_b,
    rank,
    stride_feature,
    stride_factor,
    scaling,
    RANK: tl.constexpr,
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
    lora = (lora_s, lora_b, rank, stride_feature, stride_factor, scaling)
    store_int8(y, total, w_absmax, bias, lora, m, n, M, N, RANK, False)


@default_config("linear_int8_few_rows")
def _(arch, *, m, n, k):
    if arch.interpreted:
        return {"BLOCK_N": 8, "VECTORS": 16, "DP4A": False, "num_warps": 1, "num_stages": 1}
    block_n = 16 if m == 1 and n >= 24 * arch.multiprocessors and arch.kind == "cuda" else 8
    vectors = max(min(triton.next_power_of_2(k // 16), 4 * arch.warp), arch.warp)
    return _few_rows_config(arch, block_n, vectors)


@candidates("linear_int8_few_rows")
def _(arch, *, m, n, k):
    for block_n in (4, 8, 16):
        for warps in (2, 4, 8):
            yield _few_rows_config(arch, block_n, warps * arch.warp)


def _few_rows_config(arch, block_n, vectors):
    launched = {"num_warps": vectors // arch.warp, "num_stages": 1}
    if arch.kind == "cuda":
        launched["maxnreg"] = 255  # or the assembler may spill a few bytes to make them 168
    return {"BLOCK_N": block_n, "VECTORS": vectors, "DP4A": arch.kind == "cuda", **launched}


def few_rows(
    x: Tensor, w: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, lora: Lora | None, y: Tensor
) -> None:
    """y [M, N] = `linear_int8` of x [M, K] by w [N, K], both contiguous along K, a multiple of 16; M up to 2."""
    (m, k), n = x.shape, w.shape[0]
    tile = config("linear_int8_few_rows", x.device, m=bucket(m), n=n, k=k)
    arguments = (x, w.view(torch.int32), absmax, bias, y, m, n, k, x.stride(0), outlier_limit(threshold, x.dtype))
    constants = {"SPLIT": threshold > 0, "ROWS": bucket(m), **epilogue_arguments(lora, x), **tile}
    launch(few_rows_kernel, (triton.cdiv(n, tile["BLOCK_N"]),), *arguments, fp_fusion=True, **constants)
