"""Quantizing, decoding and looking up 4-bit weights: the reference's bits."""

import itertools

import pytest
import torch

import quant_triton
from quantlib import functional, reference

SHAPES = [(1,), (7,), (5, 13), (64, 64), (33, 130), (3, 4099), (16, 4096)]
DTYPES = [torch.float32, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
quant_types = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
block_sizes = pytest.mark.parametrize("block_size", [32, 64, 4096])


def assert_same(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_quantizes(x, quant_type, block_size):
    got = quant_triton.quantize_4bit(x, quant_type, block_size)
    for ours, theirs in zip(got, reference.quantize_4bit(x, quant_type, block_size), strict=True):
        assert_same(ours, theirs)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bfloat16], ids=str)
@block_sizes
@quant_types
def test_quantize_4bit_is_exact(quant_type, block_size, dtype):
    for shape in SHAPES:
        x = torch.randn(shape)
        x.view(-1)[:100] = 0  # a whole block, or a partial one
        assert_quantizes(x.to(dtype), quant_type, block_size)


@every_dtype
@quant_types
def test_quantize_4bit_at_every_threshold(quant_type, dtype):
    edges = reference.formats.thresholds(quant_type)
    near = torch.stack([edges, edges.nextafter(torch.tensor(2.0)), edges.nextafter(torch.tensor(-2.0))])
    for scale in (1.0, 3.7e-30, 1e30 if dtype == torch.float32 else 1e3):
        x = torch.cat([near.view(-1), torch.ones(19)]) * scale
        assert_quantizes(x.to(dtype), quant_type, 64)
        assert_quantizes(x[:50].to(dtype), quant_type, 64)


@every_dtype
@quant_types
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [5, 70, 199])
def test_quantize_4bit_of_what_is_not_finite(value, place, quant_type, dtype):
    x = torch.randn(199 if place < 199 else 201).to(dtype)  # 199: in the last, partial block
    x[place] = value
    assert_quantizes(x, quant_type, 64)
    x[place + 1 if place < 198 else place - 1] = float("nan")
    assert_quantizes(x, quant_type, 64)


def test_quantize_4bit_of_any_strides():
    x = torch.randn(40, 70)
    for view in (x.t(), x[::3, 1::2], x[3].expand(20, 70), x[:0]):
        assert_quantizes(view, "nf4", 64)


@every_dtype
@block_sizes
@quant_types
def test_dequantize_4bit_is_exact(quant_type, block_size, dtype):
    for shape, double_quant in itertools.product(SHAPES, (False, True)):
        weight = torch.randn(shape)
        weight.view(-1)[:40] = 0
        weight.view(-1)[-1] = float("nan")
        arguments = functional.quantize_4bit(weight, quant_type, block_size, double_quant=double_quant).op_args()
        got = quant_triton.dequantize_4bit(*arguments, shape, dtype)
        assert_same(got, reference.dequantize_4bit(*arguments, shape, dtype))


def test_dequantize_4bit_of_nothing():
    arguments = functional.quantize_4bit(torch.randn(64)).op_args()
    assert quant_triton.dequantize_4bit(*arguments, (0, 4), torch.float32).shape == (0, 4)


@every_dtype
@quant_types
@pytest.mark.parametrize("double_quant", [False, True])
def test_embedding_4bit_is_exact(double_quant, quant_type, dtype):
    for dim, block_size in ((64, 64), (130, 32), (33, 64), (1030, 4096), (4128, 64), (96, 128)):
        table = torch.randn(30, dim)
        table[3, 5] = float("inf")
        weight = functional.quantize_4bit(table, quant_type, block_size, double_quant=double_quant).op_args()
        for indices in (torch.tensor([[3, 0], [29, 3]]), torch.arange(12, dtype=torch.int32)[::5], torch.tensor(7)):
            got = quant_triton.embedding_4bit(indices, *weight, 30, dim, dtype)
            assert_same(got, reference.embedding_4bit(indices, *weight, 30, dim, dtype))


def test_embedding_4bit_of_rows_that_do_not_exist():
    weight = functional.quantize_4bit(torch.randn(30, 64)).op_args()
    got = quant_triton.embedding_4bit(torch.tensor([-1, 2, 30, 2**40]), *weight, 30, 64, torch.float32)
    assert got.isnan().all(1).tolist() == [True, False, True, True]
    assert quant_triton.embedding_4bit(torch.empty(0, 3).long(), *weight, 30, 64, torch.float32).shape == (0, 3, 64)


@pytest.mark.parametrize("change", [{"quant_type": "int4"}, {"offset": torch.zeros(())}])
def test_a_wrong_argument_is_named(change):
    weight = {
        "packed": torch.zeros(32, 1, dtype=torch.uint8),
        "absmax": torch.ones(1),
        "nested_absmax": None,
        "nested_codebook": None,
        "offset": None,
        "quant_type": "nf4",
        "block_size": 64,
        **change,
    }
    calls = {
        "dequantize_4bit": {"shape": (64,), "dtype": torch.float32},
        "embedding_4bit": {
            "indices": torch.tensor([0]),
            "num_embeddings": 1,
            "embedding_dim": 64,
            "dtype": torch.float32,
        },
        "linear_4bit": {"x": torch.ones(64), "out_features": 1, "bias": None},
        "linear_4bit_dx": {"dy": torch.ones(1), "in_features": 64},
    }
    for op, arguments in calls.items():
        with pytest.raises(ValueError, match=next(iter(change))):
            getattr(quant_triton, op)(**weight, **arguments)


def test_an_unknown_format_is_not_quantized_to():
    with pytest.raises(ValueError, match="int4"):
        quant_triton.quantize_4bit(torch.ones(64), "int4", 64)
