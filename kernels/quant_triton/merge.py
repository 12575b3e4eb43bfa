"""Decoding a weight with a LoRA branch (arXiv:2106.09685) merged into it: round(W + scaling * b a).

Decoding to a workspace writes every element anyway, so the branch costs a product of low rank in registers and no
byte: one matrix product with the result gives y or dx, branch included, and with one rounding less than adding it.
Simulated in bfloat16: 2.34e-3 from float64, where the three roundings of PEFT give 2.87e-3.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import block_scales, codebook
from .launch import config, dot, launch, problem
from .low_rank import load_rows
from .low_rank_tiles import rank_key

SPAN = tl.constexpr(32)  # elements that share a scale, whatever the block size, where rows are multiples of it


@triton.jit
def _merge_kernel(
    values,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codebook,
    b,
    a,
    out,
    n,
    k,
    rank,
    scaling,
    BITS: tl.constexpr,
    SCALED: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * BLOCK_K
    column = start + tl.arange(0, BLOCK_K)
    acc = tl.zeros((BLOCK_N, BLOCK_K), tl.float32)
    for first in range(0, rank, BLOCK_R):
        factor = first + tl.arange(0, BLOCK_R).to(tl.int64)
        left = load_rows(b, row, factor, n, rank).to(out.dtype.element_ty)
        acc = dot(left, load_rows(a, factor, column, rank, k).to(out.dtype.element_ty), acc)
    if BITS == 4:
        # Spans of 32 columns, 16 bytes, each with one scale.
        span = row[:, None] * (k // SPAN) + (start // SPAN + tl.arange(0, BLOCK_K // SPAN))[None, :]
        there = (row < n)[:, None] & (start + SPAN * tl.arange(0, BLOCK_K // SPAN) < k)[None, :]
        scale = block_scales(
            absmax, nested_absmax, nested_codebook, offset, span // (SCALED // SPAN), there, DOUBLE_QUANT
        )
        place = span[:, :, None] * (SPAN // 2) + tl.arange(0, SPAN // 2)[None, None, :]
        byte = tl.load(values + place, mask=there[:, :, None], other=0)
        weight = tl.interleave(tl.load(codebook + (byte >> 4)), tl.load(codebook + (byte & 15))) * scale[:, :, None]
        weight = tl.reshape(weight, (BLOCK_N, BLOCK_K))
    else:
        scale = tl.load(absmax + row, mask=row < n, other=0.0)
        weight = load_rows(values, row, column, n, k).to(tl.float32) * scale[:, None] * (1 / 127)
    place = out + row[:, None] * k + column[None, :]
    merged = (weight + scaling * acc).to(out.dtype.element_ty)
    tl.store(place, merged, mask=(row < n)[:, None] & (column < k)[None, :])


def merge(
    values: Tensor,
    absmax: Tensor,
    nested: tuple[Tensor | None, ...],
    codebook: Tensor | None,
    block_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dtype: torch.dtype,
) -> Tensor:
    """`W + scaling * b a`, [n, k] in `dtype`, rounded once, except that a and b are rounded to `dtype` first.

    Args:
        values: a packed 4-bit weight with its `codebook` in float32, k a multiple of 32; or int8 with codebook None.
        absmax, nested, block_size: scales, as in `dequantize_4bit`, or one per row for int8.
        a: [rank, k], b: [n, rank], contiguous, any float dtype.
    """
    n, k, rank, r = b.shape[0], a.shape[1], a.shape[0], rank_key(a.shape[0])
    bits = 8 if codebook is None else 4
    if bits == 4 and k % SPAN.value:
        raise ValueError(f"quant_triton.merge: rows have {k} elements; they must be a multiple of {SPAN.value}")
    out = torch.empty((n, k), dtype=dtype, device=values.device)
    double_quant = nested[0] is not None
    pointers = tuple(absmax if t is None else t for t in (*nested, codebook))  # never followed
    tile = config("lora_merge", values.device, n=n, k=k, r=r, bits=bits, dtype=dtype)
    grid = (triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(k, tile["BLOCK_K"]))
    arguments = (values, absmax, *pointers, b, a, out, n, k, rank, scaling)
    constants = {"BITS": bits, "SCALED": block_size, "DOUBLE_QUANT": double_quant}
    launch(_merge_kernel, grid, *arguments, fp_fusion=False, **constants, **tile)
    return out


@problem("lora_merge")
def _(device, n, k, dtype):
    packed = torch.randint(256, (n * k // 2, 1), device=device, dtype=torch.uint8)
    absmax, a, b = (torch.rand(shape, device=device) for shape in ((n * k // 64,), (16, k), (n, 16)))
    return lambda: merge(packed, absmax, (None,) * 3, codebook("nf4", device), 64, a, b, 1.0, dtype)
