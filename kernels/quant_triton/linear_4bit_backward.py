"""The gradient dY W with a 4-bit W (QLoRA, arXiv:2305.14314), in the ways of `linear_4bit`.

Here the sum runs over the rows of W, whose scales differ, so each weight is scaled as it is decoded. A thread holds 32
neighbours of a row, which share a scale: it multiplies the codebook, not them, and looks up what it rounded once. A
tile of W is turned on its way through shared memory (16-byte stores, transposing `ldmatrix`) into the operand that
wgmma takes from registers; the other is a tile of dY^T. Rows of dY are the product's narrow side, so that few of them
still make a full instruction. Tiles are split along the sum where they are few.

A LoRA branch comes first, while its tile is all that is kept in registers, and the sum goes on from there: one rounding
and no other pass over dx, with dropout, too.

Compiled for sm_90 with bfloat16 and blocks of 64, a weight takes 7.8 machine instructions of a thread in the loop with
128 rows and 6.1 with 16. A branch leaves the loop and the registers alone (124 of a thread, two programs of 128 rows a
multiprocessor); with dropout there are 204, one program. No spills, copies of 16 bytes.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branch import Lora, branch, branch_arguments
from .codes import Weight, block_scales, checked_weight, codebook, decode_scaled, scaled_lookup
from .launch import Architecture, Config, bucket, candidates, config, default, default_config, dot, launch, problem
from .linear_4bit import chunk_size, fusable, most_fused_rows, rows_of, splits
from .linear_4bit_kernels import tile_of_expert
from .nf4 import dequantize_4bit, quantize_4bit
from .parts import sum_parts


@triton.jit(do_not_specialize=["m", "experts", "threshold"])
def linear_4bit_dx_kernel(
    dy,
    packed,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codes,
    ends,
    out,
    m,
    n,
    k,
    stride_dy,
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
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHUNK: tl.constexpr,
    CHUNKS_PER_BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLIT: tl.constexpr,
):
    DTYPE: tl.constexpr = dy.dtype.element_ty
    CHUNKS: tl.constexpr = BLOCK_K // CHUNK
    WORDS: tl.constexpr = CHUNK // 8
    chunks = k // CHUNK
    words_a_row = tl.multiple_of(k // 8, WORDS)
    tiles_m = tl.cdiv(m, BLOCK_M) + (experts if EXPERTS > 0 else 0)
    first_m = tl.program_id(0) % tiles_m * BLOCK_M
    first_k = tl.program_id(0) // tiles_m * BLOCK_K
    split = tl.program_id(1)
    end_m = m
    first_chunk = first_k // CHUNK
    if EXPERTS > 0:
        expert, first_m, end_m = tile_of_expert(ends, experts, first_m // BLOCK_M, BLOCK_M, EXPERTS)
        packed += expert.to(tl.int64) * n * (k // 32) * 16
        first_chunk += expert * n * chunks
        lora_b += expert.to(tl.int64) * k * rank
    dy += first_m.to(tl.int64) * stride_dy
    words = packed.to(tl.pointer_type(tl.int32), bitcast=True)

    # Rows and columns beyond the last are read from it, and not stored.
    row = tl.arange(0, BLOCK_M)
    existing_row = tl.maximum(tl.minimum(row, end_m - first_m - 1), 0)
    feature = tl.arange(0, BLOCK_N)
    chunk = tl.minimum(tl.arange(0, CHUNKS), chunks - 1 - first_k // CHUNK)
    word = tl.arange(0, BLOCK_K // 8)
    word = tl.minimum(first_k // CHUNK + word // WORDS, chunks - 1) * WORDS + word % WORDS
    word = tl.max_contiguous(tl.multiple_of(word, WORDS), WORDS)
    at_dy = existing_row[None, :] * stride_dy + feature[:, None]
    acc = tl.zeros((BLOCK_K, BLOCK_M), tl.float32)
    if RANK > 0 and split == 0:  # first, while there are no other sums to be kept in registers
        lora = (lora_s, lora_b, lora_seed, rank, stride_feature, stride_factor, scaling, threshold)
        acc = branch(lora, first_m.to(tl.int64) + existing_row, first_k, k, DTYPE, RANK, DROP, True, BLOCK_K)

    share = tl.cdiv(tl.cdiv(n, BLOCK_N), SPLIT) * BLOCK_N
    begin = split * share
    end = tl.minimum(begin + share, n) if end_m > first_m else begin
    for first in range(begin, end, BLOCK_N):
        if EVEN:
            existing = first + feature
            exists = existing >= 0
            g = tl.load(dy + first + at_dy)
        else:
            existing = tl.minimum(first + feature, n - 1)
            exists = first + feature < n
            g = tl.load(dy + first + at_dy, mask=exists[:, None], other=0.0)
        w = tl.load(words + existing[:, None] * words_a_row + word[None, :])
        block = (first_chunk + existing[:, None] * chunks + chunk[None, :]) // CHUNKS_PER_BLOCK
        mask = exists[:, None] & (block >= 0)
        scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, mask, DOUBLE_QUANT)
        scale = tl.broadcast_to(scale[:, :, None], (BLOCK_N, CHUNKS, WORDS))
        v = decode_scaled(w, tl.reshape(scale, (BLOCK_N, CHUNKS * WORDS)), codes, DTYPE, LOOKUP)
        v = tl.reshape(v, (BLOCK_N, BLOCK_K))
        acc = dot(tl.trans(v), g, acc)

    column = first_k + tl.arange(0, BLOCK_K)
    inside = (row < end_m - first_m)[None, :] & (column < k)[:, None]
    out += (split.to(tl.int64) * m + first_m) * k
    tl.store(out + row[None, :] * k + column[:, None], acc.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------
# Launching


@default_config("linear_4bit_dx")
def _(arch: Architecture, *, m: int, n: int, k: int, chunk: int, dtype: torch.dtype) -> Config:
    if arch.interpreted:
        tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT": 2 if n > 128 else 1}
        return tiles | {"num_warps": 4, "num_stages": 1}
    if m > most_fused_rows(arch, dtype) or (arch.rounds_float32 and dtype == torch.float32):
        return {}  # decoded first
    if arch.capability < 80:
        tiles = {"BLOCK_M": m, "BLOCK_N": 32, "BLOCK_K": 128, "SPLIT": splits(triton.cdiv(k, 128), n // 32, arch)}
        return tiles | {"num_warps": 4, "num_stages": 2}
    block_m = max(16, min(m, 128))
    tiles = {"BLOCK_M": block_m, "BLOCK_N": 64, "BLOCK_K": 128}
    split = splits(triton.cdiv(m, block_m) * triton.cdiv(k, 128), n // 64, arch)
    # Products of float32 are the ordinary cores', which hold their operands in registers.
    return tiles | {"SPLIT": split, "num_warps": 8 if m > 16 or dtype == torch.float32 else 4, "num_stages": 3}


@candidates("linear_4bit_dx")
def _(arch: Architecture, *, m: int, n: int, k: int, chunk: int, dtype: torch.dtype) -> Iterator[Config]:
    largest = most_fused_rows(arch, dtype)
    base = default("linear_4bit_dx", arch, m=min(m, largest), n=n, k=k, chunk=chunk, dtype=dtype)
    if not base:
        return
    yield {}
    sizes = itertools.product((16, 32, 64, 128), (32, 64), (64, 128), (1, 2, 4, 8), (3, 4))
    for block_m, block_n, block_k, split, stages in sizes:
        if block_m <= max(m, 16) <= 8 * block_m:
            tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
            yield tiles | {"num_warps": block_k // 16, "num_stages": stages}


@problem("linear_4bit_dx")
def _(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], object]:
    packed, absmax = quantize_4bit(torch.randn((n, k), device=device, dtype=dtype), "nf4", 64)
    dy = torch.randn((m, n), device=device, dtype=dtype)
    return lambda: linear_4bit_dx(dy, packed, absmax, None, None, None, "nf4", 64, k)


def settings_for_dx(dy: Tensor, weight: Weight, in_features: int) -> Config:
    """The configuration with which `fused_dx` takes these rows; empty if W is to be decoded first."""
    packed, block_size = weight[0], weight[-1]
    m, n = dy.shape
    if not fusable(packed, in_features, block_size):
        return {}
    chunk = chunk_size(block_size)
    return config("linear_4bit_dx", dy.device, m=bucket(m), n=n, k=in_features, chunk=chunk, dtype=dy.dtype)


def fused_dx(
    dy: Tensor,
    weight: Weight,
    in_features: int,
    settings: Config,
    *,
    lora: Lora | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """`dy W`, plus a branch, without a decoded W in memory.

    Args:
        dy: [rows, n], elements of a row adjacent. weight, in_features: as `linear_4bit_dx`; `fusable`.
        settings: a configuration of "linear_4bit_dx". ends: as in `linear_4bit.fused`.
    """
    packed, absmax, *nested, quant_type, block_size = weight
    (m, n), k = dy.shape, in_features
    chunk, split = chunk_size(block_size), settings["SPLIT"]
    experts = 0 if ends is None else ends.numel()
    tiles = (triton.cdiv(m, settings["BLOCK_M"]) + experts) * triton.cdiv(k, settings["BLOCK_K"])
    if not m or not k:
        return dy.new_empty((m, k))
    out = dy.new_empty((split, m, k), dtype=dy.dtype if split == 1 else torch.float32)
    launch(
        linear_4bit_dx_kernel,
        (tiles, split),
        dy,
        packed,
        absmax,
        *(absmax if part is None else part for part in nested),  # never followed
        codebook(quant_type, dy.device),
        dy if ends is None else ends,
        out,
        m,
        n,
        k,
        dy.stride(0),
        experts,
        fp_fusion=True,
        **branch_arguments(lora, dy),
        DOUBLE_QUANT=nested[0] is not None,
        LOOKUP=scaled_lookup(quant_type, dy.device, dy.dtype),
        EXPERTS=triton.next_power_of_2(experts) if experts else 0,
        CHUNK=chunk,
        CHUNKS_PER_BLOCK=block_size // chunk,
        EVEN=n % (settings["BLOCK_N"] * split) == 0,
        **settings,
    )
    return out[0] if split == 1 else sum_parts(out, dy.dtype)


def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> Tensor:
    """Gradient of `linear_4bit` for x: `dy @ W` with a 4-bit W, [out_features, in_features].

    Args:
        dy: [..., out_features], float32, float16 or bfloat16, any strides.
        packed ... block_size: the weight, see `dequantize_4bit`.

    Returns:
        [..., in_features], contiguous, in dy's dtype. Sums in float32, in an order that depends on the shape only.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    weight = checked_weight(
        "linear_4bit_dx", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    rows = rows_of(dy)
    shape = (*dy.shape[:-1], in_features)
    settings = settings_for_dx(rows, weight, in_features)
    if settings:
        return fused_dx(rows, weight, in_features, settings).view(shape)
    w = dequantize_4bit(*weight, (rows.shape[1], in_features), dy.dtype)
    return (rows @ w).view(shape)
