"""The C++ dropout against the reference, bit for bit, on every instruction set of this CPU."""

import torch
from hypothesis import strategies as st

from quantlib import reference, use_backend

from .native import assert_same, every_isa, forall, tensors

ops = torch.ops.quantlib


@every_isa
@forall(x=tensors(), seed=st.integers(-(2**63), 2**63 - 1), p=st.floats(0, 1, exclude_max=True))
def test_dropout_is_bit_exact(isa, x, seed, p):
    seed = torch.tensor([seed])
    with use_backend(isa):
        actual = ops.dropout(x, seed, p)
    assert_same(actual, reference.dropout(x, seed, p))


@every_isa
def test_dropout_large_and_across_threads(isa):
    x, seed = torch.ones(301, 1003), torch.tensor([7])
    with use_backend(isa):
        actual = ops.dropout(x, seed, 0.1)
        assert_same(ops.dropout(x, seed, 0.0), x)
    assert_same(actual, reference.dropout(x, seed, 0.1))
    assert abs((actual == 0).float().mean().item() - 0.1) < 3e-3
