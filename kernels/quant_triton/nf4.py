"""NF4 and FP4 (QLoRA, arXiv:2305.14314): decoding 4-bit weights, double quantization undone on the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

NESTED_BLOCK_SIZE = tl.constexpr(256)
BYTES_PER_PROGRAM = 512  # each of 128 threads loads 4 and stores the 16 of a 16-bit dtype, with no exchange between

# This package stands alone, so it has its own copy of the two tables; a test holds them against quantlib's.
CODEBOOKS = {
    "nf4": (
        -1.0,
        -0.6961928009986877,
        -0.5250730514526367,
        -0.39491748809814453,
        -0.28444138169288635,
        -0.18477343022823334,
        -0.09105003625154495,
        0.0,
        0.07958029955625534,
        0.16093020141124725,
        0.24611230194568634,
        0.33791524171829224,
        0.44070982933044434,
        0.5626170039176941,
        0.7229568362236023,
        1.0,
    ),
    "fp4": tuple(v / 12 for v in (0.0, 0.0625, 8, 12, 4, 6, 2, 3, 0.0, -0.0625, -8, -12, -4, -6, -2, -3)),
}


@cache
def _codebook(quant_type: str, device: torch.device) -> Tensor:
    return torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32, device=device)


@triton.jit
def _dequantize_4bit_kernel(
    packed,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codebook,
    out,
    n,
    n_bytes,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    BYTES: tl.constexpr,
):
    start = tl.program_id(0).to(tl.int64) * BYTES
    index = start + tl.arange(0, BYTES)
    inside = index < n_bytes
    byte = tl.load(packed + index, mask=inside, other=0)
    block = index // (BLOCK_SIZE // 2)
    if DOUBLE_QUANT:
        code = tl.load(absmax + block, mask=inside, other=0)
        outer = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=inside, other=0.0)
        scale = tl.load(nested_codebook + code) * outer + tl.load(offset)
    else:
        scale = tl.load(absmax + block, mask=inside, other=0.0)
    high = tl.load(codebook + (byte >> 4)) * scale
    low = tl.load(codebook + (byte & 15)) * scale
    element = start * 2 + tl.arange(0, 2 * BYTES)
    tl.store(out + element, tl.interleave(high, low).to(out.dtype.element_ty), mask=element < n)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decodes a 4-bit weight of n elements: `dtype(codebook[code] * absmax)`, one rounding.

    Args:
        packed: [ceil(n / 2), 1] uint8, high nibble first, contiguous.
        absmax: [ceil(n / block_size)] float32; uint8 codes if the three nested arguments are given.
        nested_absmax: [ceil(blocks / 256)] float32. nested_codebook: [256] float32. offset: [] float32.
        quant_type: "nf4" or "fp4". block_size: a power of two, 32 ... 4096.
        shape: the shape of the result, with n elements. dtype: float32, float16 or bfloat16.

    Returns:
        A contiguous tensor of `shape` and `dtype` on the device of `packed`.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    nested = (nested_absmax, nested_codebook, offset)
    double_quant = nested_absmax is not None
    if any((part is not None) != double_quant for part in nested):
        raise ValueError(
            "quant_triton.dequantize_4bit: nested_absmax, nested_codebook and offset belong together: "
            "give all three (double quantization) or none"
        )
    if quant_type not in CODEBOOKS:
        raise ValueError(f"quant_triton.dequantize_4bit: quant_type {quant_type!r}; allowed: nf4, fp4")
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    n = math.prod(shape)
    if n:
        # Without double quantization its pointers are never followed; absmax stands in for them.
        pointers = nested if double_quant else (absmax,) * 3
        _dequantize_4bit_kernel[(triton.cdiv(n, 2 * BYTES_PER_PROGRAM),)](
            packed,
            absmax,
            *pointers,
            _codebook(quant_type, packed.device),
            out,
            n,
            (n + 1) // 2,
            BLOCK_SIZE=block_size,
            DOUBLE_QUANT=double_quant,
            BYTES=BYTES_PER_PROGRAM,
            enable_fp_fusion=False,  # the format rounds codebook * nested_absmax before it adds the offset
        )
    return out
