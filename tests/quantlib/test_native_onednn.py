"""Products of many rows by PyTorch's oneDNN, which CPUs with AMX take by themselves and others here.

What all instruction sets have in common is tested with the others, by `every_isa`.
"""

import pytest
import torch

import quantlib
from quantlib import _C

from .native import assert_same, every_dtype, weight_4bit

ops = torch.ops.quantlib
pytestmark = pytest.mark.skipif("cpu-onednn" not in _C.cpu_isas(), reason="it stands on kernels that need AVX512-BF16")
ROWS = 32  # by_onednn of csrc/cpu/cpu.h


@pytest.mark.parametrize("rows", [ROWS, 131])
@pytest.mark.parametrize("biased", [False, True])
def test_bfloat16_is_what_pytorch_makes_of_the_decoded_weight(rows, biased):
    n, k = 96, 200
    weight = weight_4bit(n, k, double_quant=True)
    decoded = ops.dequantize_4bit(*weight, (n, k), torch.bfloat16)
    x, dy = torch.randn(rows, k).bfloat16(), torch.randn(rows, n).bfloat16()
    bias = torch.randn(n).bfloat16() if biased else None
    with quantlib.use_backend("cpu-onednn"):
        y, dx = ops.linear_4bit(x, *weight, n, bias), ops.linear_4bit_dx(dy, *weight, k)
    assert_same(y, torch.nn.functional.linear(x, decoded, bias))
    assert_same(dx, dy @ decoded)


def test_int8_dx_is_what_pytorch_makes_of_the_decoded_weight():
    values, absmax, _ = ops.quantize_int8(torch.randn(96, 200), -1, None, 0.0)
    dy = torch.randn(ROWS, 96).bfloat16()
    with quantlib.use_backend("cpu-onednn"):
        dx = ops.linear_int8_dx(dy, values, absmax)
    assert_same(dx, dy @ ops.dequantize_int8(values, absmax, -1, None, torch.bfloat16))


@every_dtype
# The second has more columns than sums of 32 rows are computed for at once, PyTorch is wrong about the third.
@pytest.mark.parametrize("rows, n, k", [(131, 300, 200), (40, 300_001, 16), (40, 2, 1), (33, 1, 2)])
def test_int8_is_exact_in_integers(dtype, rows, n, k):
    values, absmax, _ = ops.quantize_int8(torch.randn(n, k), -1, None, 0.0)
    x, bias = torch.randn(rows, k).to(dtype), torch.randn(n).to(dtype)
    x[:, k // 2] = 20  # an outlier column
    results = []
    for isa in ("cpu-avx512bf16", "cpu-onednn"):
        with quantlib.use_backend(isa):
            results.append(ops.linear_int8(x, values, absmax, bias, 6.0))
    assert_same(*results)


@every_dtype
def test_other_products_stay_with_the_kernels(dtype):
    """Few rows, and floats that oneDNN has no faster product for."""
    rows = ROWS - 1 if dtype == torch.bfloat16 else 131
    weight, x = weight_4bit(96, 256), torch.randn(rows, 256).to(dtype)
    results = []
    for isa in ("cpu-avx512bf16", "cpu-onednn"):
        with quantlib.use_backend(isa):
            results.append(ops.linear_4bit(x, *weight, 96, None))
    assert_same(*results)


def test_autocast_does_not_reach_beneath_the_op():
    weight, x = weight_4bit(96, 200), torch.randn(ROWS, 200).bfloat16()
    with quantlib.use_backend("cpu-onednn"):
        expected = ops.linear_4bit(x, *weight, 96, None)
        with torch.autocast("cpu", torch.float16):
            assert_same(ops.linear_4bit(x, *weight, 96, None), expected)
