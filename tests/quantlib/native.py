"""What the tests of the C++ kernels share: instruction sets, hypothesis strategies, comparisons."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from quantlib import _C, ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SPECIAL = (float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1e-45, 1e-40, -1e-38, 3e-37, 6e-8, 1e30, -3e38)

every_isa = pytest.mark.parametrize("isa", _C.cpu_isas())
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def forall(**strategies):
    """`hypothesis.given`, except that timings never decide a test."""
    return lambda test: settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])(given(**strategies)(test))


dtypes = st.sampled_from(DTYPES)
block_sizes = st.sampled_from(ops.BLOCK_SIZES)
quant_types = st.sampled_from(ops.QUANT_TYPES)


@st.composite
def tensors(draw, min_dims=1, max_dims=3, max_side=70, special=True):
    """A float tensor of any dtype, shape and strides, empty ones included, at times with special values."""
    shape = draw(st.lists(st.integers(0, max_side), min_size=min_dims, max_size=max_dims))
    x = torch.randn(shape, generator=torch.Generator().manual_seed(draw(st.integers(0, 2**32))))
    x *= 10.0 ** draw(st.integers(-6, 3))
    if special and x.numel():
        for value in draw(st.lists(st.sampled_from(SPECIAL), max_size=4)):
            x.view(-1)[draw(st.integers(0, x.numel() - 1))] = value
    x = x.to(draw(dtypes))
    layout = draw(st.sampled_from(("contiguous", "transposed", "strided")))
    if layout == "transposed":
        x = x.transpose(0, -1).contiguous().transpose(0, -1)
    elif layout == "strided":
        x = torch.stack((x, x), -1)[..., 0]
    return x


def nested(absmax):
    """absmax as double quant stores it: codes, nested_absmax, nested_codebook, offset; and what it decodes to."""
    codebook = torch.linspace(-1, 1, 256)
    codes = torch.randint(0, 256, absmax.shape, dtype=torch.uint8)
    scales = torch.rand((absmax.numel() + 255) // 256) * 0.1
    return codes, scales, codebook, torch.tensor(0.15)


def weight_4bit(n, k, block_size=64, quant_type="nf4", double_quant=False, seed=4321):
    """The seven arguments of a random 4-bit weight [n, k]."""
    w = torch.randn(n, k, generator=torch.Generator().manual_seed(seed)) * 0.05
    packed, absmax = reference.quantize_4bit(w, quant_type, block_size)
    scales = nested(absmax) if double_quant else (absmax, None, None, None)
    return packed, *scales, quant_type, block_size


def assert_same(actual, expected):
    """Equal bit for bit, NaN where NaN is expected."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def assert_error_within(actual, plain, exact, factor=1.0):
    """`actual` is no further from the float64 `exact` than plain PyTorch in the same dtype, times `factor`.

    The root mean square of the error decides, up to the noise between two orders of summation: a percent where
    rounding the result dominates, a tenth in float32. The largest error is one draw from the tail, so it only
    has to be of the same size.
    """
    error, allowed = actual.double() - exact, plain.double() - exact
    floor = exact.abs().max() * torch.finfo(actual.dtype).eps * 1e-2
    assert actual.dtype == plain.dtype and actual.shape == exact.shape
    noise = 1.1 if actual.dtype == torch.float32 else 1.01
    assert error.square().mean().sqrt() <= noise * factor * allowed.square().mean().sqrt() + floor
    assert error.abs().max() <= 2 * factor * allowed.abs().max() + floor
