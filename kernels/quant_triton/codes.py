"""The 4-bit codes of NF4 and FP4 (QLoRA, arXiv:2305.14314): tables, decoding, the scales of blocks.

Decoding in registers, to float16 and bfloat16 on NVIDIA GPUs: a value of 16 bits is looked up as two bytes. `prmt`
selects 4 bytes out of 8 by 4 nibbles, so a table of 16 bytes takes two of them and a third that chooses by the nibble's
highest bit; two more interleave the low and the high bytes of 4 values. That is 16 `prmt` and 5 shifts and masks per 8
weights, without memory. `decode` looks up values of the codebook; `decode_scaled` first makes the tables of its 16
products with a scale, which are exact, in about 32 instructions for all weights of a thread with that scale. Elsewhere
values are loaded from the table of 16, which stays in the first cache.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import architecture

Weight = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, str, int]  # as every op takes it

NESTED_BLOCK_SIZE = tl.constexpr(256)

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
# Codes by rising value. FP4 has two zeros, 0 and 8; an exact zero becomes 0.
SORTED_CODES = {"nf4": tuple(range(16)), "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)}


@cache
def codebook(quant_type: str, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values of the 16 codes, [16] in `dtype`. Shared: do not write to it."""
    return torch.tensor(CODEBOOKS[quant_type], dtype=torch.float32).to(device, dtype)


@cache
def thresholds(quant_type: str, device: torch.device) -> Tensor:
    """Midpoints of neighbouring values, [15] float32 ascending. Shared: do not write to it."""
    ascending = codebook(quant_type, torch.device("cpu"))[list(SORTED_CODES[quant_type])]
    return ((ascending[:-1] + ascending[1:]) / 2).to(device)


@cache
def sorted_codes(quant_type: str, device: torch.device) -> Tensor:
    """Codes by rising value, [16] int32. Shared: do not write to it."""
    return torch.tensor(SORTED_CODES[quant_type], dtype=torch.int32, device=device)


def check_format(op: str, quant_type: str) -> None:
    """Raises ValueError for an unknown quant_type."""
    if quant_type not in CODEBOOKS:
        raise ValueError(f"quant_triton.{op}: quant_type {quant_type!r}; allowed: {', '.join(CODEBOOKS)}")


def checked_weight(
    op: str,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> Weight:
    """The weight as every op takes it, its parts contiguous; nested parts are there if it is double quantized.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    nested = (nested_absmax, nested_codebook, offset)
    if any((part is None) != (nested_absmax is None) for part in nested):
        raise ValueError(
            f"quant_triton.{op}: nested_absmax, nested_codebook and offset belong together: "
            "give all three (double quantization) or none"
        )
    check_format(op, quant_type)
    parts = (part if part is None else part.contiguous() for part in (packed, absmax, *nested))
    return *parts, quant_type, block_size


def byte_lookup(quant_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """How `decode` looks up values on this device: `lookup_ptx`, or "" to load them."""
    return lookup_ptx(quant_type, dtype) if architecture(device).kind == "cuda" and dtype != torch.float32 else ""


def scaled_lookup(quant_type: str, device: torch.device, dtype: torch.dtype) -> str:
    """How `decode_scaled` looks up values on this device: `scaled_lookup_ptx`, or "" to load them."""
    arch = architecture(device)
    in_registers = arch.kind == "cuda" and arch.capability >= 80 and dtype != torch.float32
    return scaled_lookup_ptx(quant_type, dtype) if in_registers else ""


@cache
def lookup_ptx(quant_type: str, dtype: torch.dtype) -> str:
    """The PTX that looks up the two bytes of values of 16 bits; see the module."""
    values = codebook(quant_type, torch.device("cpu"), dtype).view(torch.int16).tolist()
    # Were the tables known to be the same in all threads, the assembler would keep them in uniform registers, which
    # prmt cannot read, and copy them for each use. That a lane is not below itself it does not know.
    lines = ["mov.b32 s, %lanemask_lt;", "mov.b32 f, %lanemask_eq;", "and.b32 s, s, f;"]
    for shift in (0, 8):
        for first in range(0, 16, 4):
            four = bytes(value >> shift & 0xFF for value in values[first : first + 4])
            lines.append(f"or.b32 t{len(lines) - 3}, s, {int.from_bytes(four, 'little'):#x};")
    return _LOOKUP.replace("TABLES", "\n    ".join(lines))


@cache
def scaled_lookup_ptx(quant_type: str, dtype: torch.dtype) -> str:
    """The PTX that makes tables of the 16 products with a scale, rounded once, and looks up their bytes.

    The assembler makes them once for all the words of a thread that share a scale.
    """
    values = codebook(quant_type, torch.device("cpu")).view(torch.int32).tolist()
    lines = [f"mul.rn.f32 p{i}, $5, 0f{value & 0xFFFFFFFF:08X};" for i, value in enumerate(values)]
    pack = f"cvt.rn.{'f16x2' if dtype == torch.float16 else 'bf16x2'}.f32"
    lines += [f"{pack} c{i}, p{2 * i + 1}, p{2 * i};" for i in range(8)]
    for bytes_of_four, first in (("0x6420", 0), ("0x7531", 4)):
        lines += [f"prmt.b32 t{first + i}, c{2 * i}, c{2 * i + 1}, {bytes_of_four};" for i in range(4)]
    return _LOOKUP.replace("TABLES", ".reg .b32 c<8>;\n    .reg .f32 p<16>;\n    " + "\n    ".join(lines))


# $4: 8 codes, of which the high nibble of a byte comes first. $0 to $3: pairs of values. t0 to t3: the low bytes of the
# 16 values, t4 to t7: the high ones. s: the low 3 bits of each code; f: byte i of one half of a table, or of the other.
_LOOKUP = """{
    .reg .b32 s, f, l, h, m, n, t<8>;
    TABLES
    and.b32 s, $4, 0x77777777;
    shr.u32 f, $4, 1;
    lop3.b32 f, f, 0x44444444, 0x32103210, 0xEA;
    prmt.b32 l, t0, t1, s;  prmt.b32 m, t2, t3, s;  prmt.b32 l, l, m, f;
    prmt.b32 h, t4, t5, s;  prmt.b32 n, t6, t7, s;  prmt.b32 h, h, n, f;
    prmt.b32 $0, l, h, 0x4051;
    prmt.b32 $1, l, h, 0x6273;
    shr.u32 s, s, 16;
    shr.u32 f, f, 16;
    prmt.b32 l, t0, t1, s;  prmt.b32 m, t2, t3, s;  prmt.b32 l, l, m, f;
    prmt.b32 h, t4, t5, s;  prmt.b32 n, t6, t7, s;  prmt.b32 h, h, n, f;
    prmt.b32 $2, l, h, 0x4051;
    prmt.b32 $3, l, h, 0x6273;
}"""


# ---------------------------------------------------------------------------------------------------
# Inside kernels


@triton.jit
def block_scales(absmax, nested_absmax, nested_codebook, offset, block, mask, DOUBLE_QUANT: tl.constexpr):
    """The float32 scales of blocks, 0 where the mask is false.

    Nested ones have the bits of the reference only where the launch does not fuse products and sums.
    """
    if DOUBLE_QUANT:
        code = tl.load(absmax + block, mask=mask, other=0)
        outer = tl.load(nested_absmax + block // NESTED_BLOCK_SIZE, mask=mask, other=0.0)
        scale = tl.load(nested_codebook + code) * outer + tl.load(offset)
        return tl.where(mask, scale, 0.0)
    else:
        return tl.load(absmax + block, mask=mask, other=0.0)


@triton.jit
def _low(pair, DTYPE: tl.constexpr):
    return pair.to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _high(pair, DTYPE: tl.constexpr):
    return (pair >> 16).to(tl.int16).to(DTYPE, bitcast=True)


@triton.jit
def _in_order(p0, p1, p2, p3, DTYPE: tl.constexpr):
    """[..., 2, 2, 2] from the four pairs of values of each word."""
    first = tl.join(tl.join(_low(p0, DTYPE), _low(p2, DTYPE)), tl.join(_low(p1, DTYPE), _low(p3, DTYPE)))
    second = tl.join(tl.join(_high(p0, DTYPE), _high(p2, DTYPE)), tl.join(_high(p1, DTYPE), _high(p3, DTYPE)))
    return tl.join(first, second)


@triton.jit
def _load_in_order(words, codes):
    """[..., 2, 2, 2] from the codebook in memory."""
    bytes = tl.join(tl.join(words, words >> 16), tl.join(words >> 8, words >> 24))
    return tl.join(tl.load(codes + (bytes >> 4 & 15)), tl.load(codes + (bytes & 15)))


@triton.jit
def decode(words, codes, DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
    """The values of int32 words of eight codes, [..., 2, 2, 2] in DTYPE, in the order of elements.

    codes: the codebook, [16] in DTYPE. LOOKUP: see `byte_lookup`.
    """
    if LOOKUP != "":
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            LOOKUP,
            "=r,=r,=r,=r,r",
            [words],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return _in_order(p0, p1, p2, p3, DTYPE)
    else:
        return _load_in_order(words, codes)


@triton.jit
def decode_scaled(words, scale, codes, DTYPE: tl.constexpr, LOOKUP: tl.constexpr):
    """The values of int32 words of eight codes times a scale per word, [..., 2, 2, 2], rounded to DTYPE once.

    codes: the codebook, [16] float32. LOOKUP: see `scaled_lookup`.
    """
    if LOOKUP != "":
        p0, p1, p2, p3 = tl.inline_asm_elementwise(
            LOOKUP,
            "=r,=r,=r,=r,r,r",
            [words, scale],
            dtype=(tl.int32, tl.int32, tl.int32, tl.int32),
            is_pure=True,
            pack=1,
        )
        return _in_order(p0, p1, p2, p3, DTYPE)
    else:
        for _ in tl.static_range(3):
            scale = tl.expand_dims(scale, -1)
        return (_load_in_order(words, codes) * scale).to(DTYPE)
