"""NF4 and FP4 (QLoRA, arXiv:2305.14314): quantizing weights, decoding them, looking up rows of a decoded table.

All are exact: the bits of the reference. Products and sums are rounded one by one (no fused multiply-add), and decoding
rounds to the result's dtype once. Scales are computed once per block, double quantization undone on the way.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .codes import (
    block_scales,
    check_format,
    checked_weight,
    codebook,
    decode_scaled,
    scaled_lookup,
    sorted_codes,
    thresholds,
)
from .launch import launch

_DECODED_AT_ONCE = 2048  # bytes: 16 for each of 128 threads
_QUANTIZED_AT_ONCE = 4096
_EMBEDDED_AT_ONCE = 4096


@triton.jit
def _quantize_4bit(x, edges, order, packed, absmax, n, BLOCK_SIZE: tl.constexpr, BLOCKS: tl.constexpr):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)[None, :]
    inside = element < n
    value = tl.load(x + element, mask=inside, other=0.0).to(tl.float32)
    # A maximum ignores NaN.
    nan = tl.max((value != value).to(tl.int32), 1) > 0
    largest = tl.where(nan, float("nan"), tl.max(tl.abs(value), 1))
    divisor = tl.where(largest < 1e-38, 1e-38, largest)
    scaled = value * tl.div_rn(1.0, divisor)[:, None]
    if (tl.program_id(0) + 1).to(tl.int64) * BLOCKS * BLOCK_SIZE > n:
        whole = (block + 1) * BLOCK_SIZE <= n
        scaled = tl.where(whole[:, None], scaled, tl.div_rn(value, tl.broadcast_to(divisor[:, None], value.shape)))
        scaled = tl.where(inside, scaled, 0.0)
        largest = tl.where(whole, largest, divisor)
    # How many of the 15 thresholds are below: all of them for NaN.
    index = tl.zeros_like(scaled).to(tl.int32)
    for bit in tl.static_range(3, -1, -1):
        half = 1 << bit
        edge = tl.load(edges + index + (half - 1))
        index += tl.where(scaled <= edge, 0, half)
    code = tl.load(order + index)
    first, second = tl.split(tl.reshape(code, (BLOCKS, BLOCK_SIZE // 2, 2)))
    byte = block[:, None] * (BLOCK_SIZE // 2) + tl.arange(0, BLOCK_SIZE // 2)[None, :]
    tl.store(packed + byte, (first << 4 | second).to(tl.uint8), mask=byte * 2 < n)
    tl.store(absmax + block, largest, mask=block * BLOCK_SIZE < n)


def quantize_4bit(x: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Blockwise absmax quantization to NF4 or FP4, the bits of `quantlib.reference.quantize_4bit`.

    Args:
        x: n elements in any shape and strides (copied if not contiguous), float32, float16 or bfloat16.
        quant_type: "nf4" or "fp4". block_size: a power of two, 32 ... 4096.

    Returns:
        packed [ceil(n / 2), 1] uint8, high nibble first, and absmax [ceil(n / block_size)] float32. An odd n ends in
        the code of zero. An all-zero block has absmax 0, or 1e-38 if it is a last, partial block. A block with a NaN
        has absmax NaN and the code of 1 throughout; one with an infinity has absmax inf, the code of 1 at infinities
        and of 0 elsewhere.

    Raises:
        ValueError: unknown quant_type.
    """
    check_format("quantize_4bit", quant_type)
    n = x.numel()
    x = x.contiguous()
    packed = torch.empty(((n + 1) // 2, 1), dtype=torch.uint8, device=x.device)
    absmax = torch.empty((triton.cdiv(n, block_size),), dtype=torch.float32, device=x.device)
    blocks = max(_QUANTIZED_AT_ONCE // block_size, 1)
    launch(
        _quantize_4bit,
        (triton.cdiv(n, blocks * block_size),),
        x,
        thresholds(quant_type, x.device),
        sorted_codes(quant_type, x.device),
        packed,
        absmax,
        n,
        fp_fusion=False,
        BLOCK_SIZE=block_size,
        BLOCKS=blocks,
    )
    return packed, absmax


@triton.jit
def _dequantize_4bit(
    packed,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codes,
    out,
    n,
    n_bytes,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    WORDS: tl.constexpr,
    LOOKUP: tl.constexpr,
    TILE: tl.constexpr,
):
    # Each row of a tile of bytes, or words of four, lies in one block.
    BYTES: tl.constexpr = min(BLOCK_SIZE // 2, TILE)
    ROWS: tl.constexpr = TILE // BYTES
    UNIT: tl.constexpr = 4 if WORDS else 1
    DTYPE: tl.constexpr = out.dtype.element_ty
    start = tl.program_id(0).to(tl.int64) * TILE
    row = tl.arange(0, ROWS)
    index = row[:, None] * (BYTES // UNIT) + tl.arange(0, BYTES // UNIT)[None, :]
    left = tl.minimum(n_bytes - start, TILE).to(tl.int32)
    block = (start + row * BYTES) // (BLOCK_SIZE // 2)
    scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, row * BYTES < left, DOUBLE_QUANT)
    if WORDS:
        words = (packed + start).to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(words + index, mask=index < left // 4, other=0)
        value = decode_scaled(word, tl.broadcast_to(scale[:, None], word.shape), codes, DTYPE, LOOKUP)
    else:
        byte = tl.load(packed + start + index, mask=index < left, other=0)
        value = tl.join(tl.load(codes + (byte >> 4)), tl.load(codes + (byte & 15)))
        value = (value * scale[:, None, None]).to(DTYPE)
    element = tl.arange(0, ROWS)[:, None] * (2 * BYTES) + tl.arange(0, 2 * BYTES)[None, :]
    left = tl.minimum(n - start * 2, TILE * 2).to(tl.int32)
    tl.store(out + start * 2 + element, tl.reshape(value, (ROWS, 2 * BYTES)), mask=element < left)


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
        packed: [ceil(n / 2), 1] uint8, high nibble first.
        absmax: [ceil(n / block_size)] float32; uint8 codes if the three nested arguments are given.
        nested_absmax: [ceil(blocks / 256)] float32. nested_codebook: [256] float32. offset: [] float32.
        quant_type: "nf4" or "fp4". block_size: a power of two, 32 ... 4096.
        shape: the shape of the result, with n elements. dtype: float32, float16 or bfloat16.

    Returns:
        A contiguous tensor of `shape` and `dtype` on the device of `packed`.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    packed, absmax, *nested, _, _ = checked_weight("dequantize_4bit", *weight)
    double_quant = nested[0] is not None
    out = torch.empty(tuple(shape), dtype=dtype, device=packed.device)
    n = math.prod(shape)
    launch(
        _dequantize_4bit,
        (triton.cdiv(n, 2 * _DECODED_AT_ONCE),),
        packed,
        absmax,
        *(nested if double_quant else (absmax,) * 3),  # never followed
        codebook(quant_type, packed.device),
        out,
        n,
        (n + 1) // 2,
        fp_fusion=False,  # the format rounds nested_codebook * nested_absmax before it adds the offset
        BLOCK_SIZE=block_size,
        DOUBLE_QUANT=double_quant,
        WORDS=dtype != torch.float32 and n % 8 == 0 and packed.data_ptr() % 16 == 0,
        LOOKUP=scaled_lookup(quant_type, packed.device, dtype),
        TILE=_DECODED_AT_ONCE,
    )
    return out


@triton.jit
def _embedding_4bit(
    indices,
    packed,
    absmax,
    nested_absmax,
    nested_codebook,
    offset,
    codes,
    out,
    rows,
    dim,
    BLOCK_SIZE: tl.constexpr,
    DOUBLE_QUANT: tl.constexpr,
    WORDS: tl.constexpr,
    LOOKUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    DTYPE: tl.constexpr = out.dtype.element_ty
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(indices + place).to(tl.int64)
    exists = (row >= 0) & (row < rows)
    start = tl.program_id(1) * BLOCK
    end = tl.where(exists, dim, 0)  # Triton 3.9's interpreter takes no mask that is a vector & a scalar
    if WORDS:
        # Spans of 32 elements, 4 words, lie in one block each.
        span = start // 32 + tl.arange(0, BLOCK // 32)
        inside = span < end // 32
        span = row * (dim // 32) + span
        words = packed.to(tl.pointer_type(tl.int32), bitcast=True)
        word = tl.load(words + span[:, None] * 4 + tl.arange(0, 4)[None, :], mask=inside[:, None], other=0)
        block = span // (BLOCK_SIZE // 32)
        scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, inside, DOUBLE_QUANT)
        value = decode_scaled(word, tl.broadcast_to(scale[:, None], word.shape), codes, DTYPE, LOOKUP)
        value = tl.reshape(value, (BLOCK,))
    else:
        element = row * dim + start + tl.arange(0, BLOCK)
        inside = start + tl.arange(0, BLOCK) < end
        byte = tl.load(packed + element // 2, mask=inside, other=0).to(tl.int32)
        code = tl.where(element % 2 == 0, byte >> 4, byte & 15)
        block = element // BLOCK_SIZE
        scale = block_scales(absmax, nested_absmax, nested_codebook, offset, block, inside, DOUBLE_QUANT)
        value = (tl.load(codes + code) * scale).to(DTYPE)
    column = start + tl.arange(0, BLOCK)
    tl.store(out + place * dim + column, tl.where(exists, value, float("nan")), mask=column < dim)


def embedding_4bit(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a 4-bit table [num_embeddings, embedding_dim]; only the rows asked for are decoded.

    Args:
        indices: int64 or int32, any shape and strides. packed ... block_size: the table, see `dequantize_4bit`.
        dtype: float32, float16 or bfloat16.

    Returns:
        [*indices.shape, embedding_dim] in `dtype`, the bits of `dequantize_4bit`; NaN for an index that is not in
        0 ... num_embeddings - 1, since the host does not wait to complain.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    packed, absmax, *nested, _, _ = checked_weight("embedding_4bit", *weight)
    double_quant = nested[0] is not None
    out = torch.empty((*indices.shape, embedding_dim), dtype=dtype, device=packed.device)
    launch(
        _embedding_4bit,
        (indices.numel(), triton.cdiv(embedding_dim, _EMBEDDED_AT_ONCE)),
        indices.contiguous(),
        packed,
        absmax,
        *(nested if double_quant else (absmax,) * 3),  # never followed
        codebook(quant_type, packed.device),
        out,
        num_embeddings,
        embedding_dim,
        fp_fusion=False,
        BLOCK_SIZE=block_size,
        DOUBLE_QUANT=double_quant,
        WORDS=embedding_dim % 32 == 0 and packed.data_ptr() % 16 == 0,
        LOOKUP=scaled_lookup(quant_type, packed.device, dtype),
        BLOCK=_EMBEDDED_AT_ONCE,
    )
    return out
