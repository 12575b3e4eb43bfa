"""Products with 4-bit weights and their gradients, against float64 and plain PyTorch's error."""

import itertools

import pytest
import torch

from quant_triton.branch import Lora
from quant_triton.launch import forced
from quant_triton.linear_4bit import fusable, fused, linear_4bit, settings_for
from quant_triton.linear_4bit_backward import fused_dx, linear_4bit_dx, settings_for_dx
from quant_triton.nf4 import embedding_4bit
from quantlib import functional, reference
from tests.gpu.harness import assert_error_within

DTYPES = [torch.float32, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
FORMATS = [("nf4", 64, False), ("nf4", 64, True), ("fp4", 32, True), ("nf4", 256, False)]
# rows, out, in: a row, a few, tiles and more; whole and broken tiles; split sums; rows of W that blocks straddle
SHAPES = [(1, 256, 512), (5, 129, 320), (16, 33, 192), (40, 70, 640)]


def quantized(n, k, quant_type="nf4", block_size=64, double_quant=False):
    return functional.quantize_4bit(
        0.05 * torch.randn(n, k), quant_type, block_size, double_quant=double_quant
    ).op_args()


def assert_multiplies(x, weight, n, bias):
    exact = reference.linear_4bit(x.double(), *weight, n, None if bias is None else bias.double())
    plain = reference.linear_4bit(x, *weight, n, bias)
    assert_error_within(linear_4bit(x, *weight, n, bias), plain, exact)


def assert_multiplies_back(dy, weight, k):
    exact = reference.linear_4bit_dx(dy.double(), *weight, k)
    assert_error_within(linear_4bit_dx(dy, *weight, k), reference.linear_4bit_dx(dy, *weight, k), exact, factor=1.5)


@every_dtype
@pytest.mark.parametrize("quant_type, block_size, double_quant", FORMATS)
@pytest.mark.parametrize("m, n, k", SHAPES)
def test_errors_are_within_budget(m, n, k, quant_type, block_size, double_quant, dtype):
    weight = quantized(n, k, quant_type, block_size, double_quant)
    assert fusable(weight[0], k, block_size)
    assert_multiplies(torch.randn(m, k).to(dtype), weight, n, torch.randn(n).to(dtype))
    assert_multiplies_back(torch.randn(m, n).to(dtype), weight, k)


@every_dtype
@pytest.mark.parametrize("warps_k, k_width, unroll, split", [(1, 2, 1, 3), (1, 8, 3, 1), (4, 4, 1, 1), (2, 2, 2, 3)])
def test_every_configuration_gives_the_product(warps_k, k_width, unroll, split, dtype):
    tiles = {"BLOCK_M": 16, "BLOCK_N": 16, "WARPS_K": warps_k, "K_WIDTH": k_width, "UNROLL": unroll, "SPLIT": split}
    for (m, n, k), block_size in itertools.product([(3, 50, 192), (20, 16, 512), (3, 50, 160)], [32, 64, 256]):
        weight = quantized(n, k, block_size=block_size)
        for scaled in (0, 64, 128) if warps_k == 1 else (0,):
            with forced("linear_4bit", tiles | {"SCALED": scaled, "num_warps": 4, "num_stages": 1}):
                assert_multiplies(torch.randn(m, k).to(dtype), weight, n, torch.randn(n).to(dtype))


@every_dtype
@pytest.mark.parametrize("block_n, block_k, split", [(16, 64, 1), (64, 128, 3)])
def test_every_configuration_gives_the_gradient(block_n, block_k, split, dtype):
    tiles = {"BLOCK_M": 16, "BLOCK_N": block_n, "BLOCK_K": block_k, "SPLIT": split}
    for (m, n, k), block_size in itertools.product([(3, 50, 192), (20, 192, 64)], [32, 64]):
        with forced("linear_4bit_dx", tiles | {"num_warps": 4, "num_stages": 1}):
            assert_multiplies_back(torch.randn(m, n).to(dtype), quantized(n, k, block_size=block_size), k)


@every_dtype
def test_decoded_first(dtype):
    for k in (100, 128):  # rows of W that are no whole words; a configuration that says so
        weight = quantized(24, k)
        with forced("linear_4bit", {}), forced("linear_4bit_dx", {}):
            assert_multiplies(torch.randn(5, k).to(dtype), weight, 24, torch.randn(24).to(dtype))
            assert_multiplies_back(torch.randn(5, 24).to(dtype), weight, k)


def test_a_weight_that_is_not_aligned_is_decoded_first():
    packed, *rest = quantized(24, 128)
    moved = torch.cat([packed[:1], packed])[1:]
    assert not fusable(moved, 128, 64) and not settings_for(torch.randn(2, 128), (moved, *rest), 24)
    x = torch.randn(2, 128)
    torch.testing.assert_close(linear_4bit(x, moved, *rest, 24, None), linear_4bit(x, packed, *rest, 24, None))


def test_any_strides_and_leading_dimensions():
    weight, x, dy = quantized(40, 128), torch.randn(6, 128), torch.randn(6, 40)
    y, dx = linear_4bit(x, *weight, 40, None), linear_4bit_dx(dy, *weight, 128)
    padded = torch.cat([x, x], 1)[:, :128]
    for same in (padded, x.t().contiguous().t(), x.repeat_interleave(2, 0)[::2]):
        assert torch.equal(linear_4bit(same, *weight, 40, None), y)
    assert torch.equal(linear_4bit(x.view(2, 3, 128), *weight, 40, None), y.view(2, 3, 40))
    assert torch.equal(linear_4bit_dx(dy.t().contiguous().t().view(2, 3, 40), *weight, 128), dx.view(2, 3, 128))
    one = torch.ones(()).expand(6, 128)
    assert torch.equal(linear_4bit(one, *weight, 40, None), linear_4bit(torch.ones(6, 128), *weight, 40, None))


def test_a_weight_and_a_bias_of_any_strides():
    def strided(t):
        return torch.stack([t, torch.zeros_like(t)], -1)[..., 0] if isinstance(t, torch.Tensor) else t

    weight, x, dy, bias = (
        quantized(40, 128, double_quant=True),
        torch.randn(6, 128),
        torch.randn(6, 40),
        torch.randn(40),
    )
    other = tuple(map(strided, weight))
    assert not any(other[i].is_contiguous() for i in (0, 1, 3))
    for settings in ({}, None):
        with forced("linear_4bit", settings), forced("linear_4bit_dx", settings):
            assert torch.equal(linear_4bit(x, *other, 40, strided(bias)), linear_4bit(x, *weight, 40, bias))
            assert torch.equal(linear_4bit_dx(dy, *other, 128), linear_4bit_dx(dy, *weight, 128))
    i = torch.tensor([3, 1])
    assert torch.equal(
        embedding_4bit(i, *other, 40, 128, torch.float16), embedding_4bit(i, *weight, 40, 128, torch.float16)
    )


def test_a_single_row_without_leading_dimension():
    weight, x = quantized(40, 128), torch.randn(128)
    assert torch.equal(linear_4bit(x, *weight, 40, None), linear_4bit(x[None], *weight, 40, None)[0])


@pytest.mark.parametrize("m, n, k", [(0, 40, 128), (3, 0, 128), (3, 40, 0)])
def test_of_nothing(m, n, k):
    weight = quantized(n, k)
    assert torch.equal(linear_4bit(torch.randn(m, k), *weight, n, None), torch.zeros(m, n))
    assert torch.equal(linear_4bit_dx(torch.randn(m, n), *weight, k), torch.zeros(m, k))


@every_dtype
@pytest.mark.parametrize("m", [3, 20])
def test_what_is_not_finite(m, dtype):
    w = torch.randn(40, 256)
    w[7, 70], w[9, 5] = float("inf"), float("nan")
    weight = functional.quantize_4bit(w, "nf4", 64).op_args()
    y = linear_4bit(torch.randn(m, 256).to(dtype), *weight, 40, None)
    assert y.isnan().any(0).nonzero().view(-1).tolist() == [7, 9] and y.isfinite().sum() == 38 * m
    x = torch.randn(m, 256).to(dtype)
    x[1, 3] = float("inf")
    y = linear_4bit(x, *weight, 40, None)
    assert not y[1].isfinite().any() and y[0].isfinite().sum() == 38
    dy = torch.randn(m, 40).to(dtype)
    assert torch.equal(
        linear_4bit_dx(dy, *weight, 256).isfinite(), reference.linear_4bit_dx(dy, *weight, 256).isfinite()
    )


@every_dtype
@pytest.mark.parametrize("m", [3, 20])
@pytest.mark.parametrize("rank", [1, 20])
def test_a_branch_of_low_rank_is_added_before_rounding(rank, m, dtype):
    n, k = 70, 320
    weight, x, bias = quantized(n, k), torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    s, b = torch.randn(m, rank).to(dtype), torch.randn(n, rank).to(dtype)
    y = fused(x, weight, n, bias, settings_for(x, weight, n), lora=Lora(s, b, 0.5))
    exact = reference.linear_4bit(x.double(), *weight, n, bias.double()) + 0.5 * s.double() @ b.double().t()
    plain = reference.linear_4bit(x, *weight, n, bias) + 0.5 * s @ b.t()
    assert_error_within(y, plain, exact)


@every_dtype
@pytest.mark.parametrize("m, n", [(3, 70), (20, 300)])
@pytest.mark.parametrize("rank", [1, 20, 70])
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_gradient_takes_its_branch_before_rounding(p, rank, m, n, dtype):
    k = 320
    weight, dy, seed = quantized(n, k), torch.randn(m, n).to(dtype), torch.tensor([2**40 + 5]) if p else None
    ds, a = torch.randn(m, rank).to(dtype), torch.randn(rank, k)
    dx = fused_dx(dy, weight, k, settings_for_dx(dy, weight, k), lora=Lora(ds, a.t(), 0.5, seed, p))

    def branch(ds, a):
        product = 0.5 * ds @ a
        return reference.dropout(product, seed, p) if p else product

    exact_branch = branch(ds.double(), a.to(dtype).double())
    exact = reference.linear_4bit_dx(dy.double(), *weight, k) + exact_branch
    plain = reference.linear_4bit_dx(dy, *weight, k) + branch(ds, a.to(dtype))
    assert_error_within(dx, plain, exact, factor=1.5)
    if dtype == torch.float16:  # rounded once, so that only the order of sums can make a difference
        decoded = reference.dequantize_4bit(*weight, (n, k), dtype)
        once = (dy.double() @ decoded.double() + exact_branch).to(dtype)
        assert (dx != once).double().mean() < 0.01
