"""Dropout: the reference's mask, bit for bit."""

import pytest
import torch

from quant_triton.dropout import _ONE, dropout, dropout_constants
from quantlib import reference

DTYPES = (torch.float32, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", [0, 7, 2**40 + 5, -1, -(2**63)])
def test_same_bits_as_the_reference(seed, dtype):
    seed = torch.tensor([seed])
    for shape, p in (((1,), 0.5), ((33, 130), 0.25), ((7, 4099), 0.1), ((2, 0, 3), 0.3), ((2, 5, 64), 0.999)):
        x = torch.randn(shape).to(dtype)
        x.view(-1)[3::7] = float("nan")
        got, expected = dropout(x, seed, p), reference.dropout(x, seed, p)
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)


def test_any_strides():
    x, seed = torch.randn(40, 31, 2)[..., 0].t(), torch.tensor([3])
    assert torch.equal(dropout(x, seed, 0.4), reference.dropout(x, seed, 0.4))


def test_a_probability_is_compared_exactly():
    """The words nearest to p on either side fall on different sides."""
    for p in (0.0, 2**-24, 0.1, 1 - 2**-24):
        threshold, scale = dropout_constants(p)
        assert (threshold - 1) / _ONE < p <= threshold / _ONE and scale == 1 / (1 - p)


def test_nothing_is_dropped_with_p_zero():
    x = torch.randn(5, 100)
    assert torch.equal(dropout(x, torch.tensor([11]), 0.0), x)


@pytest.mark.parametrize("seed, p, what", [([1], 1.0, "p is 1.0"), ([1], -0.1, "p is -0.1"), ([1, 2], 0.5, "seed is")])
def test_a_wrong_argument_is_named(seed, p, what):
    with pytest.raises(ValueError, match=what):
        dropout(torch.ones(3), torch.tensor(seed), p)
