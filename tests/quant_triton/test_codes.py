"""Tables of the 4-bit codes, and the PTX that looks them up, which no interpreter runs: emulated here."""

import re

import numpy as np
import pytest
import torch

from quant_triton import codes
from quantlib import formats

quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@quant_types
def test_tables_are_those_of_the_format(quant_type):
    cpu = torch.device("cpu")
    ours = codes.codebook(quant_type, cpu)
    assert torch.equal(ours.view(torch.int32), formats.codebook(quant_type).view(torch.int32))
    assert torch.equal(codes.thresholds(quant_type, cpu), formats.thresholds(quant_type))
    assert codes.sorted_codes(quant_type, cpu).tolist() == formats.sorted_codes(quant_type).tolist()


def test_values_are_loaded_where_bytes_are_not_looked_up():
    assert codes.byte_lookup("nf4", torch.device("cpu"), torch.float16) == ""


def prmt(low, high, selector):
    source = low.astype(np.uint64) | high.astype(np.uint64) << np.uint64(32)
    result = np.zeros_like(source)
    for i in range(4):
        nibble = (selector >> np.uint32(4 * i) & np.uint32(15)).astype(np.uint64)
        byte = source >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(0xFF)
        byte = np.where(nibble & np.uint64(8), np.where(byte & np.uint64(0x80), 0xFF, 0), byte)
        result |= byte.astype(np.uint64) << np.uint64(8 * i)
    return result.astype(np.uint32)


def pack(dtype):
    def operation(high, low):
        bits = [torch.tensor(part.view(np.float32)).to(dtype).view(torch.int16).numpy() for part in (low, high)]
        return np.stack(bits, -1).view(np.uint32)[..., 0]

    return operation


OPERATIONS = {
    "mov.b32": lambda a: a,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "shr.u32": lambda a, b: a >> b,
    "lop3.b32": lambda a, b, c, table: {0xEA: (a & b) | c}[int(table[0])],
    "prmt.b32": prmt,
    "mul.rn.f32": lambda a, b: (a.view(np.float32) * b.view(np.float32)).view(np.uint32),
    "cvt.rn.f16x2.f32": pack(torch.float16),
    "cvt.rn.bf16x2.f32": pack(torch.bfloat16),
}


def emulate(ptx, words, lane=0, scale=None):
    """The eight values of each word, as 16-bit patterns, that `ptx` computes in one lane."""
    registers = {"$4": words, "%lanemask_lt": np.uint32((1 << lane) - 1), "%lanemask_eq": np.uint32(1 << lane)}
    if scale is not None:
        registers["$5"] = scale.view(np.uint32)

    def operand(text):
        if text not in registers:
            registers[text] = np.uint32(int(text[2:], 16) if text.startswith("0f") else int(text, 0))
        return np.ascontiguousarray(np.broadcast_to(registers[text], words.shape))

    for line in re.findall(r"[^;{}]+", ptx):
        name, _, arguments = line.strip().partition(" ")
        if name and not name.startswith("."):
            target, *sources = (part.strip() for part in arguments.split(","))
            registers[target] = OPERATIONS[name](*map(operand, sources))
    pairs = np.stack([registers[f"${i}"] for i in range(4)], -1)
    return np.stack([pairs & 0xFFFF, pairs >> np.uint32(16)], -1).reshape(-1, 8)


def nibbles(words):
    """The eight codes of each word in order."""
    in_order = words.view(np.uint8).reshape(-1, 4)
    return np.stack([in_order >> 4, in_order & 15], -1).reshape(-1, 8)


def every_half():
    """Words with every combination of four codes in either half."""
    half = np.arange(1 << 16, dtype=np.uint32)
    return np.concatenate([half << np.uint32(16) | half[::-1], half, half << np.uint32(16)])


@quant_types
@every_dtype
def test_the_ptx_decodes_every_word(quant_type, dtype):
    words = every_half()
    table = codes.codebook(quant_type, torch.device("cpu"), dtype).view(torch.int16).numpy().view(np.uint16)
    for lane in (0, 31):
        assert (emulate(codes.lookup_ptx(quant_type, dtype), words, lane) == table[nibbles(words)]).all()


@quant_types
@every_dtype
def test_the_ptx_decodes_and_scales_every_word(quant_type, dtype):
    words = every_half()
    scale = torch.rand(len(words)) * 10
    scale[::1000], scale[1::1000] = float("inf"), -1e-7
    table = codes.codebook(quant_type, torch.device("cpu"))
    expected = (table[torch.from_numpy(nibbles(words)).long()] * scale[:, None]).to(dtype)
    values = emulate(codes.scaled_lookup_ptx(quant_type, dtype), words, scale=scale.numpy())
    actual = torch.from_numpy(values.astype(np.uint16).view(np.int16)).view(dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit()[~actual.isnan()], expected.signbit()[~expected.isnan()])
