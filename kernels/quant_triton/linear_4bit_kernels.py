"""The kernels of `linear_4bit`: codes decoded into the registers that the product reads.

Which k meets which is free as long as W and x agree. A thread of an `mma` holds pairs of columns of W (K_WIDTH = 2; 4
where Triton groups them so), a word of packed codes holds eight neighbours. So columns are numbered anew within a
chunk: slot ((j * 8 / K_WIDTH + u) * 4 + t) * K_WIDTH + v stands for k = 8 * (J * t + j) + u * K_WIDTH + v, where J is
the words of a chunk over 4. Each thread then decodes whole words into the very registers that the product reads, and
x, the smaller operand, is loaded in that order.

Compiled for sm_90 with bfloat16 and blocks of 64, a weight takes so many machine instructions of a thread in the loop
(NF4's bytes 2.6 of them): 5.3 for 1 row, 6.2 for 16, 6.1 for 64 and 6.9 for 128, a tile of 128 x 128 x 128 thus 880
cycles to issue where wgmma takes 980. No stores to shared memory, no spills; W is copied in 16 bytes, 64 of a row at
once, and read from shared memory without conflicts.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .branch import branch
from .codes import block_scales, decode, decode_scaled
from .launch import dot


@triton.jit
def _columns(CHUNK: tl.constexpr, K_WIDTH: tl.constexpr):
    """The k of each slot of a chunk; see the module."""
    slot = tl.arange(0, CHUNK)
    k = slot // K_WIDTH % 4 * (CHUNK // 4) + slot // (4 * K_WIDTH) * K_WIDTH + slot % K_WIDTH
    return tl.max_contiguous(tl.multiple_of(k, K_WIDTH), K_WIDTH)


@triton.jit
def tile_of_expert(ends, experts, tile, BLOCK_M: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert, first row, end) of a tile of rows that are sorted by expert; all 0 where there is no such tile.

    ends: [experts] int32, where the rows of each expert end. EXPERTS: a power of two, at least `experts`.
    """
    expert = tl.arange(0, EXPERTS)
    end = tl.load(ends + expert, mask=expert < experts, other=0)
    start = tl.load(ends + expert - 1, mask=(expert > 0) & (expert < experts), other=0)
    tiles = tl.cdiv(end - start, BLOCK_M)
    past = tl.cumsum(tiles, 0) <= tile
    mine = expert == tl.sum(past.to(tl.int32), 0)
    first = tl.sum(tl.where(mine, start, 0), 0) + (tile - tl.sum(tl.where(past, tiles, 0), 0)) * BLOCK_M
    last = tl.sum(tl.where(mine, end, 0), 0)
    return tl.sum(tl.where(mine, expert, 0), 0), tl.where(last > 0, first, 0), last


@triton.jit(do_not_specialize=["m", "experts", "threshold"])
def linear_4bit_kernel(
    x,
    packed,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codes,
    bias,
    ends,
    out,
    m,
    n,
    k,
    stride_x,
    experts,
    lora_s,
    lora_b,
    lora_seed,
    rank,
    stride_feature,
    stride_factor,
    scaling,
    threshold,
    DOUBLE_QUANT: tl.constexpr,
    LOOKUP: tl.constexpr,
    BIAS: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    EXPERTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CHUNK: tl.constexpr,
    EVEN: tl.constexpr,
    SCALED: tl.constexpr,
    K_WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    WARPS_K: tl.constexpr,
    UNROLL: tl.constexpr,
    SPLIT: tl.constexpr,
):
    DTYPE: tl.constexpr = x.dtype.element_ty
    WORDS: tl.constexpr = CHUNK // 8
    J: tl.constexpr = WORDS // 4
    U: tl.constexpr = 8 // K_WIDTH
    GROUP: tl.constexpr = min(BLOCK_SIZE, CHUNK)  # what has one scale
    GROUPS: tl.constexpr = CHUNK // GROUP
    tl.static_assert(GROUPS == 1 or SCALED > 0)
    tl.static_assert(WARPS_K == 1 or SCALED == 0)
    chunks = k // CHUNK
    words_a_row = tl.multiple_of(k // 8, WORDS)
    tiles_m = tl.cdiv(m, BLOCK_M) + (experts if EXPERTS > 0 else 0)
    first_m = tl.program_id(0) % tiles_m * BLOCK_M
    first_n = tl.program_id(0) // tiles_m * BLOCK_N
    split = tl.program_id(1)
    end_m = m
    first_group = 0
    if EXPERTS > 0:
        expert, first_m, end_m = tile_of_expert(ends, experts, first_m // BLOCK_M, BLOCK_M, EXPERTS)
        packed += expert.to(tl.int64) * n * (k // 32) * 16
        first_group = expert * n * chunks * GROUPS
        bias += expert * n
        lora_b += expert.to(tl.int64) * n * rank
    x += first_m.to(tl.int64) * stride_x
    words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
    # Rows beyond the last are read from it, and not stored.
    row = tl.arange(0, BLOCK_M)
    feature = first_n + tl.arange(0, BLOCK_N)
    existing_row = tl.maximum(tl.minimum(row, end_m - first_m - 1), 0)
    existing_feature = tl.minimum(feature, n - 1)

    # Offsets of the first chunk. With WARPS_K > 1 there are as many neighbouring chunks, one for each warp; rows of W
    # go by eight, which is how the threads that load them are spread over those that multiply.
    word = tl.arange(0, WORDS)
    warp = tl.arange(0, WARPS_K)
    at_x = existing_row[None, :] * stride_x + _columns(CHUNK, K_WIDTH)[:, None]
    if WARPS_K > 1:
        eights = first_n + tl.arange(0, BLOCK_N // 8)[:, None, None, None] * 8 + tl.arange(0, 8)[None, None, :, None]
        at_w = tl.minimum(eights, n - 1) * words_a_row + warp[None, :, None, None] * WORDS + word[None, None, None, :]
        at_x = warp[:, None, None] * CHUNK + at_x[None, :, :]
        at_scale = first_group + existing_feature[None, :] * chunks + warp[:, None]
        acc = tl.zeros((WARPS_K, BLOCK_N, BLOCK_M), tl.float32)
    else:
        at_w = existing_feature[:, None] * words_a_row + word[None, :]
        at_scale = first_group + existing_feature[:, None] * (chunks * GROUPS) + tl.arange(0, GROUPS)[None, :]
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)

    STEP: tl.constexpr = WARPS_K * UNROLL
    share = tl.cdiv(tl.cdiv(chunks, STEP), SPLIT) * STEP
    begin = split * share
    end = tl.minimum(begin + share, chunks) if end_m > first_m else begin
    for first in range(begin, end, STEP):
        for i in tl.static_range(UNROLL):
            chunk = first + i * WARPS_K
            block = (chunk * GROUPS + at_scale) // (BLOCK_SIZE // GROUP)
            if EVEN:
                w = tl.load(words + chunk * WORDS + at_w)
                xt = tl.load(x + chunk * CHUNK + at_x)
                scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, block >= 0, DOUBLE_QUANT)
            else:
                exists = chunk + warp < chunks
                if WARPS_K > 1:
                    w = tl.load(words + chunk * WORDS + at_w, mask=exists[None, :, None, None])
                    xt = tl.load(x + chunk * CHUNK + at_x, mask=exists[:, None, None], other=0.0)
                else:
                    w = tl.load(words + chunk * WORDS + at_w, mask=exists[:, None])
                    xt = tl.load(x + chunk * CHUNK + at_x, mask=exists[:, None], other=0.0)
                mask = exists[:, None] & (block >= 0)
                scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, mask, DOUBLE_QUANT)
            if SCALED > 0:
                scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, GROUPS, WORDS // GROUPS))
                v = decode_scaled(w, tl.reshape(scale, (BLOCK_N, WORDS)), codes, DTYPE, LOOKUP)
            else:
                v = decode(w, codes, DTYPE, LOOKUP)
                scale += scale - scale  # inf becomes NaN, as most weights of such a block are
            if WARPS_K > 1:
                v = tl.reshape(v, (BLOCK_N // 8, WARPS_K, 8, 4, J, U, K_WIDTH))
                v = tl.reshape(tl.permute(v, (1, 0, 2, 4, 5, 3, 6)), (WARPS_K, BLOCK_N, CHUNK))
                acc += dot(v, xt, tl.zeros_like(acc)) * scale[:, :, None]
            else:
                v = tl.reshape(v, (BLOCK_N, 4, J, U, K_WIDTH))
                v = tl.reshape(tl.permute(v, (0, 2, 3, 1, 4)), (BLOCK_N, CHUNK))
                if SCALED > 0:
                    acc = dot(v, xt, acc)
                else:
                    acc += dot(v, xt, tl.zeros_like(acc)) * scale
    if WARPS_K > 1:
        acc = tl.sum(acc, 0)

    inside = (row < end_m - first_m)[None, :] & (feature < n)[:, None]
    if RANK > 0 and split == 0:
        lora = (lora_s, lora_b, lora_seed, rank, stride_feature, stride_factor, scaling, threshold)
        acc += branch(lora, first_m.to(tl.int64) + existing_row, first_n, n, DTYPE, RANK, DROP, True, BLOCK_N)
    if BIAS:
        biased = tl.where(split == 0, n, 0)
        acc += tl.load(bias + feature, mask=feature < biased, other=0.0).to(tl.float32)[:, None]
    out += (split.to(tl.int64) * m + first_m) * n
    tl.store(out + row[None, :] * n + feature[:, None], acc.to(out.dtype.element_ty), mask=inside)
