"""The C++ kernels of absmax int8 against the reference, on every instruction set of this CPU."""

import pytest
import torch
from hypothesis import strategies as st

from quantlib import reference, use_backend
from tests.threads import threads

from .native import assert_error_within, assert_same, dtypes, every_dtype, every_isa, forall, tensors

ops = torch.ops.quantlib

THRESHOLDS = st.sampled_from((0.0, 0.5, 6.0))


def int8_weight(n, k):
    values, absmax, _ = reference.quantize_int8(torch.randn(n, k) * 0.05, -1, None, 0.0)
    return values, absmax


@every_isa
@forall(x=tensors(), threshold=THRESHOLDS, block_size=st.integers(1, 5000), dtype=dtypes)
def test_quantize_and_dequantize_are_bit_exact(isa, x, threshold, block_size, dtype):
    kinds = [(-1, None, threshold), (None, None, 0.0), (None, block_size, 0.0)]
    if x.ndim == 2:
        kinds.append((0, None, 0.0))
    for kind in kinds:
        with use_backend(isa):
            actual = ops.quantize_int8(x, *kind)
            decoded = ops.dequantize_int8(actual[0], actual[1], *kind[:2], dtype)
        expected = reference.quantize_int8(x, *kind)
        for a, e in zip(actual, expected, strict=True):
            assert_same(a, e)
        assert_same(decoded, reference.dequantize_int8(*expected[:2], *kind[:2], dtype))


@every_isa
def test_quantize_large_tensor_and_blocks_across_threads(isa):
    x = torch.randn(300, 1111)
    x[299, 1110] = -50
    for kind in ((0, None, 0.0), (None, None, 0.0), (None, 100_000, 0.0), (None, 64, 0.0), (-1, None, 4.0)):
        with use_backend(isa):
            actual = ops.quantize_int8(x, *kind)
        for a, e in zip(actual, reference.quantize_int8(x, *kind), strict=True):
            assert_same(a, e)


@every_isa
@every_dtype
@pytest.mark.parametrize(
    "m, n, k", [(1, 64, 512), (3, 30, 333), (20, 96, 100), (64, 53, 333), (65, 53, 333), (130, 70, 704), (5, 8, 40000)]
)
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_linear_equals_the_exact_result(isa, dtype, m, n, k, threshold):
    """One rounding from the exact value, up to the few float32 operations before it."""
    values, absmax = int8_weight(n, k)
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    x[0, 3], x[m - 1, k - 1] = 20, -9
    with use_backend(isa):
        y = ops.linear_int8(x, values, absmax, bias, threshold)
    # the integers depend on float32 scales, so they are taken from the reference in x's dtype
    q, x_absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    exact = (q.double() @ values.double().t()) * (x_absmax.double()[:, None] * absmax.double()) / 127**2
    if threshold:
        w = values.double() * absmax.double()[:, None] / 127
        exact += x.double()[:, outliers] @ w[:, outliers].t()
    exact += bias.double()
    scale = exact.abs().max().item()
    tolerance = torch.finfo(dtype).eps / 2 + 2e-6
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=2e-6 * scale)


@every_isa
@pytest.mark.parametrize("k", [4500, 4501])
def test_linear_with_rows_that_panels_take_turns_at(isa, k):
    """More bytes of x than are read again for every panel, in two passes; one thread, so that it has many panels."""
    m, n, threshold = 1900, 333, 4.0
    values, absmax = int8_weight(n, k)
    x = torch.randn(m, k)
    with threads(1), use_backend(isa):
        y = ops.linear_int8(x, values, absmax, None, threshold)
    expected = reference.linear_int8(x, values, absmax, None, threshold)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * expected.abs().max().item())


@every_isa
@pytest.mark.parametrize("m", [8, 130])
def test_thousands_of_outlier_columns_within_error_budget(isa, m):
    values, absmax = int8_weight(48, 9000)
    x, threshold = torch.randn(m, 9000), 0.01
    with use_backend(isa):
        y = ops.linear_int8(x, values, absmax, None, threshold)
    plain, exact = (reference.linear_int8(t, values, absmax, None, threshold) for t in (x, x.double()))
    assert_error_within(y, plain, exact)


@every_isa
@every_dtype
@pytest.mark.parametrize("m, n, k", [(1, 64, 2048), (7, 129, 320), (7, 129, 333), (130, 64, 300)])
def test_gradient_within_error_budget(isa, dtype, m, n, k):
    values, absmax = int8_weight(n, k)
    dy = torch.randn(m, n).to(dtype)
    with use_backend(isa):
        dx = ops.linear_int8_dx(dy, values, absmax)
    exact = reference.linear_int8_dx(dy.double(), values, absmax)
    assert_error_within(dx, reference.linear_int8_dx(dy, values, absmax), exact, factor=1.5)


@every_isa
@forall(x=tensors(special=False), n=st.integers(0, 30), threshold=THRESHOLDS)
def test_linear_any_shape_and_stride(isa, x, n, threshold):
    values, absmax = int8_weight(n, x.shape[-1])
    bias = torch.randn(n)
    with use_backend(isa):
        y = ops.linear_int8(x, values, absmax, bias, threshold)
        dx = ops.linear_int8_dx(y, values, absmax)
    expected = reference.linear_int8(x, values, absmax, bias, threshold)
    assert dx.shape == x.shape and dx.dtype == x.dtype
    # against the size of the terms, since a sum of few elements may cancel
    w = reference.dequantize_int8(values, absmax, -1, None, torch.float32)
    size = (x.float().abs() @ w.abs().t() + bias.abs()).max().item() if expected.numel() else 0.0
    tolerance = 2 * torch.finfo(x.dtype).eps
    torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance * size)


@every_isa
@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("m, n, k", [(1, 40, 130), (9, 40, 130), (9, 41, 128), (70, 41, 128)])
def test_linear_keeps_nan_and_inf(isa, dtype, threshold, m, n, k):
    values, absmax = int8_weight(n, k)
    absmax = absmax.clone()
    absmax[3], absmax[4] = float("nan"), float("inf")
    values[3:5] = 0  # as quantize_int8 leaves them
    x = torch.randn(m, k).to(dtype)
    x[0, 5], x[m - 1, 77] = float("nan"), float("inf")
    dy = torch.randn(m, n).to(dtype)
    dy[0, 1] = float("nan")
    with use_backend(isa):
        y = ops.linear_int8(x, values, absmax, None, threshold)
        dx = ops.linear_int8_dx(dy, values, absmax)
    for actual, expected in (
        (y, reference.linear_int8(x, values, absmax, None, threshold)),
        (dx, reference.linear_int8_dx(dy.double(), values, absmax)),
    ):
        assert torch.equal(actual.isnan(), expected.isnan())
        assert torch.equal(actual.isinf(), expected.isinf())


@every_isa
@pytest.mark.parametrize("m", [1, 2, 70])
@pytest.mark.parametrize("k", [1030, 1032])
@pytest.mark.parametrize("x_sign, w_sign", [(1, 1), (1, -1), (-1, 1), (-1, -1)])
def test_extreme_products_do_not_saturate(isa, m, k, x_sign, w_sign):
    """All products 127 * 127 or its negative: what instructions with saturating sums get wrong."""
    values = torch.full((6, k), 127 * w_sign, dtype=torch.int8)
    with use_backend(isa):
        y = ops.linear_int8(torch.full((m, k), float(x_sign)), values, torch.ones(6), None, 0.0)
    torch.testing.assert_close(y, torch.full((m, 6), float(k * x_sign * w_sign)))


@every_isa
@pytest.mark.parametrize("m", [1, 30, 130])
def test_linear_is_reproducible_for_any_number_of_threads(isa, m):
    """Of 40 some take other rows of the same columns."""
    values, absmax = int8_weight(200, 512)
    x, dy = torch.randn(m, 512) * 3, torch.randn(m, 200)
    results = []
    for count in (1, 2, 7, 40):
        with threads(count), use_backend(isa):
            results.append((ops.linear_int8(x, values, absmax, None, 6.0), ops.linear_int8_dx(dy, values, absmax)))
    for y, dx in results[1:]:
        assert_same(y, results[0][0])
        assert_same(dx, results[0][1])


def test_ops_refuse_what_would_read_beyond_a_tensor():
    values, absmax = int8_weight(8, 64)
    with pytest.raises(RuntimeError, match="x has 63 features"):
        ops.linear_int8(torch.randn(2, 63), values, absmax, None, 0.0)
    with pytest.raises(RuntimeError, match="absmax has 7 elements"):
        ops.linear_int8(torch.randn(2, 64), values, absmax[:7], None, 0.0)
    with pytest.raises(RuntimeError, match="exact up to 133144"):
        ops.linear_int8(torch.zeros(1, 133145), torch.zeros(1, 133145, dtype=torch.int8), absmax[:1], None, 0.0)
    with pytest.raises(RuntimeError, match="dim must be"):
        ops.quantize_int8(torch.randn(2, 3, 4), 0, None, 0.0)
