"""Tables of the 4-bit codes, and the PTX that looks them up, which no interpreter runs: emulated here."""

import re

import numpy as np
import pytest
import torch

from quant_triton import codes
from quantlib import formats

quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])


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


OPERATIONS = {
    "mov": lambda a: a,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "shr": lambda a, b: a >> b,
    "lop3": lambda a, b, c, table: {0xEA: (a & b) | c}[int(table[0])],
    "prmt": prmt,
}


def emulate(ptx, words, lane):
    """The registers after running the lines of `ptx` in one lane."""
    registers = {"$4": words, "%lanemask_lt": np.uint32((1 << lane) - 1), "%lanemask_eq": np.uint32(1 << lane)}

    def operand(text):
        if text in registers:
            return np.broadcast_to(registers[text], words.shape)
        return np.broadcast_to(np.uint32(int(text, 0)), words.shape)

    for name, arguments in re.findall(r"(\w+)\.[bu]32 ([^;]*);", ptx.replace(".reg .b32", ".reg")):
        target, *sources = (part.strip() for part in arguments.split(","))
        registers[target] = OPERATIONS[name](*map(operand, sources))
    return registers


@quant_types
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_the_ptx_decodes_every_word(quant_type, dtype):
    # Every combination of four codes in either half.
    half = np.arange(1 << 16, dtype=np.uint32)
    words = np.concatenate([half << np.uint32(16) | half[::-1], half, half << np.uint32(16)])
    table = codes.codebook(quant_type, torch.device("cpu"), dtype).view(torch.int16).numpy().view(np.uint16)
    for lane in (0, 31):
        registers = emulate(codes.lookup_ptx(quant_type, dtype), words, lane)
        pairs = np.stack([registers[f"${i}"] for i in range(4)], -1)
        values = np.stack([pairs & 0xFFFF, pairs >> np.uint32(16)], -1).reshape(-1, 8)
        in_order = words.view(np.uint8).reshape(-1, 4)
        expected = np.stack([table[in_order >> 4], table[in_order & 15]], -1).reshape(-1, 8)
        assert (values == expected).all()
