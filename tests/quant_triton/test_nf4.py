"""Quantizing and decoding 4-bit weights."""

import itertools

import pytest
import torch

import quant_triton
from quant_triton import codes
from quantlib import formats, functional, reference

SHAPES = [(1,), (7,), (5, 13), (64, 64), (33, 130), (3, 4099), (16, 4096)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("block_size", [32, 64, 4096])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_dequantize_4bit_is_exact(quant_type, block_size, dtype):
    for shape, double_quant in itertools.product(SHAPES, (False, True)):
        weight = torch.randn(shape)
        weight.view(-1)[:40] = 0
        weight.view(-1)[-1] = float("nan")
        arguments = functional.quantize_4bit(weight, quant_type, block_size, double_quant=double_quant).op_args()
        got = quant_triton.dequantize_4bit(*arguments, shape, dtype)
        expected = reference.dequantize_4bit(*arguments, shape, dtype)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_dequantize_4bit_of_nothing():
    arguments = functional.quantize_4bit(torch.randn(64)).op_args()
    assert quant_triton.dequantize_4bit(*arguments, (0, 4), torch.float32).shape == (0, 4)


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_codebooks_are_those_of_the_format(quant_type):
    ours = torch.tensor(codes.CODEBOOKS[quant_type], dtype=torch.float32)
    assert torch.equal(ours.view(torch.int32), formats.codebook(quant_type).view(torch.int32))


@pytest.mark.parametrize("change", [{"quant_type": "int4"}, {"offset": torch.zeros(())}])
def test_a_wrong_argument_is_named(change):
    arguments = {
        "packed": torch.zeros(32, 1, dtype=torch.uint8),
        "absmax": torch.ones(1),
        "nested_absmax": None,
        "nested_codebook": None,
        "offset": None,
        "quant_type": "nf4",
        "block_size": 64,
    }
    with pytest.raises(ValueError, match=next(iter(change))):
        quant_triton.dequantize_4bit(**{**arguments, **change}, shape=(64,), dtype=torch.float32)
