"""LLM.int8() for more than 2 rows: x is quantized by a kernel of its own (absmax_kernels.py) and multiplied here.

Both operands lie K-contiguous in shared memory as tensor cores want them, brought there by TMA where the GPU has it.
Few rows of x are the second operand, padded to 16 rather than 64, and K is split among programs: the last one to finish
a tile sums the int32 parts, exact in any order. The number of outlier columns is read on the device, and a step adds 16
of them. Rows were quantized before anyone knew these columns, so what a step multiplies is x less its int8 part, which
the sums have already: the difference, below half a step of int8 but for the outliers themselves, loses less than a
thousandth of such a step to its rounding to 16 bits. On Turing, for which Triton has no tensor-core products, the same
integers are multiplied in float16, exact within a step.

Compiled for sm_90: many rows wgmma.m64n128k32.s32.s8.s8 in tiles of 128 x 256, 255 registers, 192 KiB of shared memory,
no spills, with a LoRA branch or without. Triton waits for each step's wgmma, as it does unless sums are float32; steps
of 128 columns keep that below a seventh. 16 rows: wgmma.m64n16k32, 48 registers, six stages.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from .absmax import quantize_rows
from .absmax_kernels import outlier_count
from .branch import Lora
from .int8_epilogue import epilogue_arguments, product, store_int8
from .launch import bucket, candidates, config, default_config, launch

_STEP = tl.constexpr(1 / 127)
_OUTLIERS = tl.constexpr(16)  # columns of a step, the least that tensor cores take


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
def _integer_product(a, b, acc, INT8: tl.constexpr, WEIGHT_FIRST: tl.constexpr):
    """`product` of int8; without INT8 in float16, whose products sum up exactly for 1040 columns."""
    if INT8:
        acc = product(a, b, acc, WEIGHT_FIRST)
    else:
        part = product(a.to(tl.float16), b.to(tl.float16), tl.zeros(acc.shape, tl.float32), WEIGHT_FIRST)
        acc += part.to(tl.int32)
    return acc


@triton.jit
def _with_outliers(total, scale, x, q, w, columns, count, m, n, M, N, K, x_row, WEIGHT_FIRST: tl.constexpr):
    """The sums of a tile with what is in outlier columns in x's dtype: x, less what int8 has of it already."""
    for start in range(0, count, _OUTLIERS):
        i = start + tl.arange(0, _OUTLIERS)
        column = tl.load(columns + i, mask=i < count, other=0)
        taken = _columns(q, m, K, M, column, i < count).to(tl.float32) * scale[:, None]
        left = (_columns(x, m, x_row, M, column, i < count).to(tl.float32) - taken).to(x.dtype.element_ty)
        weight = _columns(w, n, K, N, column, i < count).to(x.dtype.element_ty)
        total = product(left, weight, total, WEIGHT_FIRST)
    return total


@triton.jit(do_not_specialize=["M"])
def product_kernel(
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
    lora_s,
    lora_b,
    rank,
    stride_feature,
    stride_factor,
    scaling,
    RANK: tl.constexpr,
    TMA: tl.constexpr,
    SPLIT: tl.constexpr,
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
        m = first_m + tl.arange(0, BLOCK_M)
        n = first_n + tl.arange(0, BLOCK_N)
        if SPLIT_K > 1:
            acc = tl.zeros_like(acc)
            for i in range(SPLIT_K):
                acc += tl.load(place + i * BLOCK_M * BLOCK_N, cache_modifier=".cg")
        scale = tl.load(x_absmax + m, mask=m < M, other=0.0) * _STEP
        total = acc.to(tl.float32) * tl.expand_dims(scale, 0 if WEIGHT_FIRST else 1)
        if SPLIT:
            total = _with_outliers(total, scale, x, q, w, columns, count, m, n, M, N, K, x_row, WEIGHT_FIRST)
        lora = (lora_s, lora_b, rank, stride_feature, stride_factor, scaling)
        store_int8(y, total, w_absmax, bias, lora, m, n, M, N, RANK, WEIGHT_FIRST)


def _tile_config(arch, m, n, k, block_m, block_n, block_k, warps):
    """Stages that fit, for one large tile or two small ones a multiprocessor, and K split to occupy all of them."""
    resident = 1 if block_m * block_n > 128 * 64 else 2
    stages = arch.shared_memory * 9 // 10 // resident // ((block_m + block_n) * block_k)
    tiles = triton.cdiv(m, block_m) * triton.cdiv(n, block_n)
    split = min(resident * arch.multiprocessors // tiles, k // (4 * block_k), 16)
    blocks = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "GROUP_M": 8, "SPLIT_K": max(split, 1)}
    hopper = arch.kind == "cuda" and arch.capability >= 90
    way = {"WEIGHT_FIRST": block_m < 64, "TMA": hopper, "INT8": arch.capability != 75}
    return {**blocks, **way, "num_warps": warps, "num_stages": max(2, min(stages, 4 if resident == 1 else 6))}


@default_config("linear_int8")
def _(arch, *, m, n, k, dtype):
    hopper = arch.kind == "cuda" and arch.capability >= 90
    small, plain = arch.shared_memory <= 64 * 1024, dtype == torch.float32  # outliers by ordinary instructions
    if arch.interpreted:
        tile = (16 if m <= 16 else 64, 32, 64, 1)
    elif arch.capability == 75:
        tile = (16 if m <= 16 else 32, 32, 32, 8)
    elif plain and arch.rounds_float32:
        tile = (16 if m <= 16 else 32, 32, 128, 4)
    elif m <= (32 if plain else 64):
        tile = (max(m, 16), 64, 64 if small else 128, 8 if plain and m > 16 else 4)
    elif plain:
        tile = (64, 64, 64, 8)
    elif m <= 128 or small:
        tile = (128, 64, 64 if small else 128, 8)
    elif m <= 512 or arch.capability != 90:  # mma.sync's accumulators leave no registers for larger tiles
        tile = (128, 128, 128 if hopper else 64, 8)
    else:
        tile = (128, 256, 128, 8)
    settings = _tile_config(arch, m, n, k, *tile)
    if plain and m == 32 and arch.kind == "cuda" and not hopper:
        settings["maxnreg"] = 128  # or the assembler may spill a few bytes to make them 80
    return settings


@candidates("linear_int8")
def _(arch, *, m, n, k, dtype):
    largest = 64 * 64 if dtype == torch.float32 else 128 * 256
    if dtype == torch.float32 and arch.rounds_float32:
        yield from (
            _tile_config(arch, m, n, k, rows, 32, block_k, 4) for rows in (16, 32) for block_k in (64, 128, 256)
        )
        return
    for block_m in (16, 32, 64) if m <= 64 else (64, 128):
        for block_n in (64, 128, 256):
            for block_k in (64, 128, 256):
                if (block_m + block_n) * block_k * 2 > arch.shared_memory or block_m * block_n > largest:
                    continue
                tile = _tile_config(arch, m, n, k, block_m, block_n, block_k, 8 if block_m * block_n > 8192 else 4)
                yield tile
                if block_m * block_n == 128 * 128:  # two programs on a multiprocessor: one multiplies, one waits
                    yield {**tile, "num_stages": 3, "maxnreg": 128}


def many_rows(
    x: Tensor, w: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, lora: Lora | None, y: Tensor
) -> None:
    """y [M, N] = `linear_int8` of x [M, K] by w [N, K], both contiguous along K, a multiple of 16."""
    (m, k), n, device = x.shape, w.shape[0], x.device
    tile = dict(config("linear_int8", device, m=bucket(m), n=n, k=k, dtype=x.dtype))
    tiles = triton.cdiv(m, tile["BLOCK_M"]) * triton.cdiv(n, tile["BLOCK_N"])
    split_k = tile["SPLIT_K"]
    q, x_absmax, outliers = quantize_rows(x, threshold, extra=4 * tiles if split_k > 1 else 0)
    found = (outliers.state, outliers.columns if threshold > 0 else None) if outliers else (None, None)
    parts = None
    if split_k > 1:
        parts = torch.empty(tiles * split_k * tile["BLOCK_M"] * tile["BLOCK_N"], dtype=torch.int32, device=device)
    q_tiles, w_tiles = q, w
    if tile["TMA"]:
        q_tiles = TensorDescriptor(q, [m, k], [k, 1], [tile["BLOCK_M"], tile["BLOCK_K"]])
        w_tiles = TensorDescriptor(w, [n, k], [k, 1], [tile["BLOCK_N"], tile["BLOCK_K"]])
    arguments = (x, q_tiles, w_tiles, q, w, x_absmax, absmax, bias, *found, parts, y, m, n, k, x.stride(0))
    constants = {"SPLIT": threshold > 0, **epilogue_arguments(lora, x), **tile}
    launch(product_kernel, (tiles * split_k,), *arguments, fp_fusion=True, **constants)
