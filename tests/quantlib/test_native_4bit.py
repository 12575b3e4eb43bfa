"""The C++ kernels of 4-bit weights against the reference, on every instruction set of this CPU."""

import functools

import pytest
import torch
from hypothesis import strategies as st

from quantlib import reference, use_backend
from tests.threads import threads

from .native import (
    assert_error_within,
    assert_same,
    block_sizes,
    dtypes,
    every_dtype,
    every_isa,
    forall,
    nested,
    quant_types,
    tensors,
    weight_4bit,
)

ops = torch.ops.quantlib


@every_isa
@forall(x=tensors(), quant_type=quant_types, block_size=block_sizes)
def test_quantize_is_bit_exact(isa, x, quant_type, block_size):
    with use_backend(isa):
        actual = ops.quantize_4bit(x, quant_type, block_size)
    for a, e in zip(actual, reference.quantize_4bit(x, quant_type, block_size), strict=True):
        assert_same(a, e)


@every_isa
@every_dtype
def test_quantize_at_thresholds(isa, dtype):
    """Every float16 number from -1 to 1, the block's absmax being 1."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    x = bits.view(torch.float16)
    x = x[x.abs() <= 1].to(dtype)
    x = torch.nn.functional.pad(x, (0, -x.numel() % 31)).view(-1, 31)
    x = torch.cat((x, torch.ones(x.shape[0], 1, dtype=dtype)), 1)
    for quant_type in ("nf4", "fp4"):
        with use_backend(isa):
            packed, _ = ops.quantize_4bit(x, quant_type, 32)
        assert_same(packed, reference.quantize_4bit(x, quant_type, 32)[0])


@functools.cache
def every_bfloat16_at(quant_type, exponent):
    """Blocks of 32 with every bfloat16 up to absmax, for every absmax of an exponent; and their codes."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    bits = torch.arange(128) + max(exponent + 127, 0) * 128
    blocks = []
    for absmax in bits.to(torch.int16).view(torch.bfloat16):
        x = numbers[numbers.abs() <= absmax]
        x = torch.nn.functional.pad(x, (0, -x.numel() % 31)).view(-1, 31)
        blocks.append(torch.cat((absmax.expand(x.shape[0], 1), x), 1))
    x = torch.cat(blocks)
    return x, reference.quantize_4bit(x, quant_type, 32)


@every_isa
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("exponent", [-127, -101, -100, 0, 13, 14, 100])
def test_quantize_every_bfloat16(isa, quant_type, exponent):
    x, expected = every_bfloat16_at(quant_type, exponent)
    with use_backend(isa):
        actual = ops.quantize_4bit(x, quant_type, 32)
    for a, e in zip(actual, expected, strict=True):
        assert_same(a, e)


@every_isa
@forall(x=tensors(), quant_type=quant_types, block_size=block_sizes, dtype=dtypes, double_quant=st.booleans())
def test_dequantize_is_bit_exact(isa, x, quant_type, block_size, dtype, double_quant):
    packed, absmax = reference.quantize_4bit(x, quant_type, block_size)
    scales = nested(absmax) if double_quant else (absmax, None, None, None)
    args = (packed, *scales, quant_type, block_size, x.shape, dtype)
    with use_backend(isa):
        actual = ops.dequantize_4bit(*args)
    assert_same(actual, reference.dequantize_4bit(*args))


@every_isa
@every_dtype
def test_dequantize_every_code_at_every_scale(isa, dtype):
    """Scales over the whole range of float32, so that results are subnormal, overflow or are not finite."""
    exponents = torch.arange(-149, 128, dtype=torch.float64)
    absmax = torch.cat((2**exponents * 1.7, torch.tensor([0.0, float("inf"), float("nan"), -0.3]))).float()
    packed = torch.arange(256, dtype=torch.uint8).repeat(absmax.numel(), 1).view(-1, 1)
    args = (packed, absmax, None, None, None, "nf4", 512, (absmax.numel(), 512), dtype)
    with use_backend(isa):
        assert_same(ops.dequantize_4bit(*args), reference.dequantize_4bit(*args))


@every_isa
@forall(
    rows=st.integers(1, 40),
    dim=st.integers(1, 130),
    count=st.integers(0, 9),
    block_size=block_sizes,
    dtype=dtypes,
    double_quant=st.booleans(),
    data=st.data(),
)
def test_embedding_is_bit_exact(isa, rows, dim, count, block_size, dtype, double_quant, data):
    weight = weight_4bit(rows, dim, block_size, double_quant=double_quant)
    picks = data.draw(st.lists(st.integers(0, rows - 1), min_size=count, max_size=count))
    index_dtype = data.draw(st.sampled_from((torch.int64, torch.int32)))
    args = (torch.tensor(picks, dtype=index_dtype), *weight, rows, dim, dtype)
    with use_backend(isa):
        assert_same(ops.embedding_4bit(*args), reference.embedding_4bit(*args))


def test_embedding_refuses_an_index_outside():
    for index in (-1, 3):
        with pytest.raises(RuntimeError, match="outside"):
            ops.embedding_4bit(torch.tensor([index]), *weight_4bit(3, 64), 3, 64, torch.float32)


SHAPES = (
    # m, n, k, block size: few rows and many, odd sizes, blocks across rows and longer than rows
    (1, 1024, 512, 64),
    (3, 512, 1024, 128),
    (6, 256, 64, 256),
    (17, 68, 640, 64),
    (5, 69, 160, 32),
    (40, 333, 224, 128),
    (2, 1030, 96, 64),
    (7, 129, 333, 64),
    (20, 96, 100, 32),
    (130, 64, 704, 64),
    (33, 47, 4099, 4096),
    (1200, 40, 72, 64),
)


@every_isa
@every_dtype
@pytest.mark.parametrize("m, n, k, block_size", SHAPES)
@pytest.mark.parametrize("quant_type, double_quant", [("nf4", False), ("fp4", True)])
def test_linear_and_gradient_within_error_budget(isa, dtype, m, n, k, block_size, quant_type, double_quant):
    weight = weight_4bit(n, k, block_size, quant_type, double_quant)
    x, dy, bias = (torch.randn(shape).to(dtype) for shape in ((m, k), (m, n), (n,)))
    with use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, bias)
        no_bias = ops.linear_4bit(x, *weight, n, None)
        dx = ops.linear_4bit_dx(dy, *weight, k)
    exact = reference.linear_4bit(x.double(), *weight, n, bias.double())
    assert_error_within(y, reference.linear_4bit(x, *weight, n, bias), exact)
    exact = reference.linear_4bit(x.double(), *weight, n, None)
    assert_error_within(no_bias, reference.linear_4bit(x, *weight, n, None), exact)
    exact = reference.linear_4bit_dx(dy.double(), *weight, k)
    assert_error_within(dx, reference.linear_4bit_dx(dy, *weight, k), exact, factor=1.5)


@every_isa
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("k, block_size", [(57 * 64, 64), (2048, 4096)])
def test_linear_with_rows_that_panels_take_turns_at(isa, dtype, k, block_size):
    """More bytes of x than are read again for every panel, in two passes; one thread, so that it has many panels."""
    m, n = 1400, 333
    weight = weight_4bit(n, k, block_size)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    with threads(1), use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, bias)
    exact = reference.linear_4bit(x.double(), *weight, n, bias.double())
    assert_error_within(y, reference.linear_4bit(x, *weight, n, bias), exact)


@every_isa
@every_dtype
@pytest.mark.parametrize("k, block_size", [(22592, 64), (22560, 32)])
def test_linear_with_few_long_rows(isa, dtype, k, block_size):
    """More bytes of x than pass the weight at once, in parts of which the last ends within a group of 128."""
    m, n = 6, 70
    weight = weight_4bit(n, k, block_size)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    with use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, bias)
    exact = reference.linear_4bit(x.double(), *weight, n, bias.double())
    assert_error_within(y, reference.linear_4bit(x, *weight, n, bias), exact)


@every_isa
@forall(x=tensors(special=False), n=st.integers(0, 50), block_size=block_sizes, double_quant=st.booleans())
def test_linear_any_shape_and_stride(isa, x, n, block_size, double_quant):
    k = x.shape[-1]
    weight = weight_4bit(n, k, block_size, double_quant=double_quant)
    exact = reference.linear_4bit(x.double(), *weight, n, None)
    dx_exact = reference.linear_4bit_dx(exact, *weight, k)
    w = reference.dequantize_4bit(*weight, (n, k), torch.float64).abs()
    with use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, None)
        dx = ops.linear_4bit_dx(exact.to(x.dtype), *weight, k)
    # Sums may cancel, so an error is measured by the size of their terms: roundings to x's dtype, and the bound of a
    # sum in float32.
    y_terms, dx_terms = x.double().abs() @ w.t(), exact.abs() @ w
    for actual, expected, size_of_terms, terms in ((y, exact, y_terms, k), (dx, dx_exact, dx_terms, n)):
        assert actual.shape == expected.shape and actual.dtype == x.dtype
        tolerance = (2 * torch.finfo(x.dtype).eps + terms * 2.0**-24) * size_of_terms
        if x.dtype == torch.float16:  # float16 has no more than 2^-24 to offer
            tolerance += 2.0**-24 * (1 + k + n)
        assert ((actual.double() - expected).abs() <= tolerance).all()


@every_isa
@pytest.mark.parametrize("k", [32, 64, 96, 128, 192, 320, 704])
@forall(
    m=st.integers(1, 70),
    n=st.integers(1, 70),
    block_size=block_sizes,
    quant_type=quant_types,
    double_quant=st.booleans(),
    dtype=dtypes,
)
def test_linear_any_block_size(isa, k, m, n, block_size, quant_type, double_quant, dtype):
    """Blocks within rows, across rows and longer than rows; groups of 128 with a tail; rows that are left over."""
    weight = weight_4bit(n, k, block_size, quant_type, double_quant)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    with use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, bias)
    exact = reference.linear_4bit(x.double(), *weight, n, bias.double())
    w = reference.dequantize_4bit(*weight, (n, k), torch.float64)
    size_of_terms = x.double().abs() @ w.abs().t() + bias.double().abs()
    assert ((y.double() - exact).abs() <= (2 * torch.finfo(dtype).eps + k * 2.0**-24) * size_of_terms).all()


@functools.lru_cache(maxsize=1)  # instruction sets take turns first
def product_of_rows(dtype, m, block_size):
    """x, the weight's arguments, n, and the product by plain PyTorch and in float64."""
    n, k = 2048 // m, 4096
    weight = weight_4bit(n, k, block_size)
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(m)).to(dtype)
    plain, exact = (reference.linear_4bit(t, *weight, n, None) for t in (x, x.double()))
    return x, weight, n, plain, exact


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 2, 3, 4, 5, 6, 7, 8, 13, 18, 19, 32, 70])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
def test_linear_within_error_budget_for_any_number_of_rows(isa, dtype, m, block_size):
    x, weight, n, plain, exact = product_of_rows(dtype, m, block_size)
    with use_backend(isa):
        y = ops.linear_4bit(x, *weight, n, None)
    assert_error_within(y, plain, exact)


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 5, 40])
@pytest.mark.parametrize("absmax", [0.0, 1e-44, 1e-39, 1e-36, 1e30, float("inf"), -float("inf"), float("nan")])
def test_linear_with_any_absmax(isa, dtype, m, absmax):
    """One block has the extreme absmax. Where float32 can tell, the result is that of the weights themselves."""
    n, k = 35, 192
    packed, scales, *rest = weight_4bit(n, k)
    scales = scales.clone()
    scales[7] = absmax
    packed.view(n, -1)[2, 32:64] = 0x77  # codes of zero: zero times infinity is NaN
    x = torch.randn(m, k).to(dtype)
    x[0, 64:128] = 0
    with use_backend(isa):
        y = ops.linear_4bit(x, packed, scales, *rest, n, None)
    exact = reference.linear_4bit(x.double(), packed, scales, *rest, n, None).to(dtype)
    assert torch.equal(y.isnan(), exact.isnan())
    assert torch.equal(y.isinf(), exact.isinf())
    ordinary = torch.arange(n) != 2
    torch.testing.assert_close(y[:, ordinary], exact[:, ordinary], rtol=0.02, atol=0.02)


@every_isa
@pytest.mark.parametrize("m", [1, 7, 20])
def test_linear_survives_sums_beyond_float32(isa, m):
    """The sum of x times codes overflows, that of x times weights does not."""
    n, k = 8, 128
    packed, absmax, *rest = weight_4bit(n, k)
    packed = torch.full_like(packed, 0xFF)
    absmax = torch.full_like(absmax, 2.0**-10)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.full((m, k), 2.0**125, dtype=dtype)
        with use_backend(isa):
            y = ops.linear_4bit(x, packed, absmax, *rest, n, None)
        assert_same(y, torch.full((m, n), 2.0**122, dtype=dtype))


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 5, 40])
def test_linear_keeps_nan_and_inf(isa, dtype, m):
    n, k = 68, 192
    packed, absmax, *rest = weight_4bit(n, k)
    absmax = absmax.clone()
    absmax[5], absmax[30] = float("nan"), float("inf")
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    x[0, 3], x[m - 1, 100] = float("nan"), float("inf")
    dy[0, 7] = float("nan")
    with use_backend(isa):
        y = ops.linear_4bit(x, packed, absmax, *rest, n, None)
        dx = ops.linear_4bit_dx(dy, packed, absmax, *rest, k)
    for actual, exact in (
        (y, reference.linear_4bit(x.double(), packed, absmax, *rest, n, None)),
        (dx, reference.linear_4bit_dx(dy.double(), packed, absmax, *rest, k)),
    ):
        assert torch.equal(actual.isnan(), exact.isnan())
        assert torch.equal(actual.isinf(), exact.isinf())


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 16, 50, 130])
def test_linear_is_reproducible_for_any_number_of_threads(isa, dtype, m):
    """Of 40 some take other rows of the same columns."""
    n, k = 260, 512
    weight = weight_4bit(n, k)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    results = []
    for count in (1, 2, 7, 40):
        with threads(count), use_backend(isa):
            results.append((ops.linear_4bit(x, *weight, n, None), ops.linear_4bit_dx(dy, *weight, k)))
    for y, dx in results[1:]:
        assert_same(y, results[0][0])
        assert_same(dx, results[0][1])


def test_ops_refuse_what_would_read_beyond_a_tensor():
    packed, absmax, *rest = weight_4bit(8, 64)
    x = torch.randn(2, 64)
    with pytest.raises(RuntimeError, match="packed has 128 elements"):
        ops.linear_4bit(x, packed[:128], absmax, *rest, 8, None)
    with pytest.raises(RuntimeError, match="absmax has 4 elements"):
        ops.dequantize_4bit(packed, absmax[:4], *rest, (8, 64), torch.float32)
    with pytest.raises(RuntimeError, match="bias has 7 elements"):
        ops.linear_4bit(x, packed, absmax, *rest, 8, torch.zeros(7))
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        ops.linear_4bit_dx(x.double()[:, :8], packed, absmax, *rest, 64)
    with pytest.raises(RuntimeError, match="power of two"):
        ops.quantize_4bit(x, "nf4", 48)
