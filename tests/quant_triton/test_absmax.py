"""Absmax int8 against the reference, bit for bit."""

import itertools

import pytest
import torch

from quant_triton import absmax
from quant_triton.absmax import absmax_int8, dequantize_int8, quantize_int8, rms_norm_quantize_int8
from quantlib import reference

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16)
ROW, COLUMN, TENSOR = (-1, None, 0.0), (0, None, 0.0), (None, None, 0.0)
KINDS = (ROW, (-1, None, 1.5), COLUMN, TENSOR, (None, 64, 0.0), (None, 5, 0.0), (None, 5000, 0.0))

# NumPy, which interprets here, tells of each division by zero.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def assert_as_reference(x, *kind):
    actual, expected = quantize_int8(x, *kind), reference.quantize_int8(x, *kind)
    for a, e in zip(actual, expected, strict=True):
        assert (a.shape, a.dtype, a.is_contiguous()) == (e.shape, e.dtype, True)
        torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)
    for dtype in DTYPES:
        decoded = dequantize_int8(*expected[:2], *kind[:2], dtype)
        wanted = reference.dequantize_int8(*expected[:2], *kind[:2], dtype)
        torch.testing.assert_close(decoded, wanted, rtol=0, atol=0, equal_nan=True)


def with_extremes(*shape, dtype=torch.float32):
    x = torch.randn(shape)
    flat = x.view(-1)
    flat[: len(flat) // 5] = 0
    flat[len(flat) // 4] = 1e-40
    flat[-1] = 8
    return x.to(dtype)


@every_dtype
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 13), (33, 130), (2, 4099)])
def test_same_bits_as_the_reference(shape, kind, dtype):
    assert_as_reference(with_extremes(*shape, dtype=dtype), *kind)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_what_is_too_long_for_one_read(kind, monkeypatch):
    monkeypatch.setattr(absmax, "LONGEST_ROW", 8)
    monkeypatch.setattr(absmax, "LONGEST_COLUMN", 8)
    for shape in ((33, 130), (130, 9), (2, 9000)):
        assert_as_reference(with_extremes(*shape), *kind)


@pytest.mark.parametrize("kind", [ROW, (-1, None, 0.5), TENSOR, (None, 7, 0.0)], ids=str)
@pytest.mark.parametrize("shape", [(7,), (2, 3, 20), (0, 4), (4, 0), (2, 0, 3)])
def test_any_number_of_dimensions_and_nothing(shape, kind):
    assert_as_reference(torch.randn(shape), *kind)


def test_columns_of_nothing():
    for shape in ((0, 4), (4, 0)):
        assert_as_reference(torch.randn(shape), *COLUMN)


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_any_strides(kind):
    x = torch.randn(40, 66)
    for view in (x.t(), x[::2, 1:-3], x[:, ::3], x[:0], x[:, :1].expand(-1, 5)):
        assert_as_reference(view, *kind)


def test_offsets_beyond_two_to_the_31():
    try:
        memory = torch.empty(5 * 2**29 + 9, dtype=torch.float16)  # pages that nobody touches are not there
    except RuntimeError:
        pytest.skip("needs an address space of 5 GB")
    for shape, strides in (((2, 3), (1, 5 * 2**28)), ((3, 2), (5 * 2**28, 1))):
        x = memory.as_strided(shape, strides)
        x.copy_(torch.randn(shape))
        for kind in (ROW, (-1, None, 0.5), COLUMN):
            assert_as_reference(x, *kind)
        assert torch.equal(absmax_int8(x)[1], reference.quantize_int8(x, *COLUMN)[1])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_what_is_not_finite(bad, whole, monkeypatch):
    if not whole:
        monkeypatch.setattr(absmax, "LONGEST_ROW", 8)
        monkeypatch.setattr(absmax, "LONGEST_COLUMN", 3)
    x = torch.randn(6, 40)
    x[2, 3] = bad
    for kind in KINDS:
        assert_as_reference(x, *kind)


def test_outliers_in_no_in_some_and_in_all_columns():
    x = torch.randn(70, 5000).clamp(-3, 3)
    assert not quantize_int8(x, -1, None, 4.0)[2].any()
    x[3, 17], x[69, 17], x[5, 4999], x[0, 4096] = 9, -9, -4, 5
    values, _, outliers = quantize_int8(x, -1, None, 4.0)
    assert outliers.nonzero().view(-1).tolist() == [17, 4096, 4999] and not values[:, outliers].any()
    for threshold in (4.0, 1e-9, 2.9):
        assert_as_reference(x, -1, None, threshold)


@every_dtype
def test_a_threshold_is_compared_in_the_dtype_of_x(dtype):
    x = torch.tensor([[0.1, 0.2, 0.3]]).to(dtype)
    assert_as_reference(x, -1, None, 0.1)
    assert quantize_int8(x, -1, None, 0.1)[2].tolist() == [True, True, True]


def test_absmax_of_rows_and_columns():
    for x in (torch.randn(130, 70), torch.randn(3, 500).t(), torch.randn(0, 4)):
        rows, columns = absmax_int8(x)
        assert torch.equal(rows, reference.quantize_int8(x, *ROW)[1])
        assert torch.equal(columns, reference.quantize_int8(x, *COLUMN)[1])


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 2.0])
def test_rms_norm_in_front(threshold, dtype):
    for shape in ((5, 64), (2, 3, 130)):
        x, weight = torch.randn(shape).to(dtype), (1 + 0.1 * torch.randn(shape[-1])).to(dtype)
        y, *quantized = rms_norm_quantize_int8(x, weight, 1e-6, threshold)
        exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=torch.finfo(dtype).eps / 2 + 4e-7, atol=1e-7)
        for a, e in zip(quantized, reference.quantize_int8(y, -1, None, threshold), strict=True):
            torch.testing.assert_close(a, e, rtol=0, atol=0)


@pytest.mark.parametrize(
    "kind, what",
    [
        ((0, 64, 0.0), "blocks take dim=None"),
        ((None, 0, 0.0), "block_size 0"),
        ((1, None, 0.0), "dim is 1"),
        ((0, None, 2.0), "threshold is 2.0"),
        ((-1, None, -1.0), "threshold is -1.0"),
    ],
)
def test_a_wrong_argument_is_named(kind, what):
    with pytest.raises(ValueError, match=what):
        quantize_int8(torch.ones(2, 3), *kind)
    with pytest.raises(ValueError, match="weight"):
        rms_norm_quantize_int8(torch.ones(2, 3), torch.ones(2), 1e-6, 0.0)
    with pytest.raises(ValueError, match="K at most 16384"):
        rms_norm_quantize_int8(torch.ones(2, 16385), torch.ones(16385), 1e-6, 0.0)


def test_every_pair_of_value_and_scale_decodes_as_the_reference_does():
    values = torch.arange(-128, 128, dtype=torch.int8).repeat(64, 1)
    scales = torch.logspace(-38, 38, 64)
    for kind, dtype in itertools.product(((-1, None), (None, 256)), DTYPES):
        decoded = dequantize_int8(values, scales, *kind, dtype)
        assert torch.equal(decoded, reference.dequantize_int8(values, scales, *kind, dtype))
