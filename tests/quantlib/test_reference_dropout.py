"""Dropout: the published vectors of Philox, a generator in plain Python, and statistics."""

import inspect
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import ops, reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# kat_vectors of Random123: counter, key, output
KNOWN_ANSWERS = [
    ((0,) * 4, (0,) * 2, (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def philox(counter, key):
    """Philox4x32-10 in Python's integers."""
    counter, key = list(counter), list(key)
    for _ in range(10):
        high0, low0 = divmod(0xD2511F53 * counter[0], 2**32)
        high1, low1 = divmod(0xCD9E8D57 * counter[2], 2**32)
        counter = [high1 ^ counter[1] ^ key[0], low1, high0 ^ counter[3] ^ key[1], low0]
        key = [(key[0] + 0x9E3779B9) % 2**32, (key[1] + 0xBB67AE85) % 2**32]
    return counter


@pytest.mark.parametrize("counter, key, output", KNOWN_ANSWERS)
def test_known_answers(counter, key, output):
    tensors = ([torch.tensor([word]) for word in words] for words in (counter, key))
    assert tuple(reference.philox4x32(*tensors)[0].tolist()) == output
    assert tuple(philox(counter, key)) == output


@settings(deadline=None, max_examples=50)
@given(
    n=st.integers(0, 40),
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.floats(0, 1, exclude_max=True),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
)
def test_every_element_follows_its_definition(n, seed, p, dtype):
    x = (torch.arange(n) + 1).to(dtype)
    y = reference.dropout(x, torch.tensor([seed]), p)
    work = torch.float64 if dtype == torch.float64 else torch.float32
    scale = torch.tensor(1 / (1 - p), dtype=work)
    assert y.dtype == dtype
    for i in range(n):
        word = philox((i // 4, 0, 0, 0), (seed % 2**32, (seed >> 32) % 2**32))[i % 4]
        kept = (word >> 8) * 2.0**-24 >= p
        assert y[i] == ((x[i].to(work) * scale).to(dtype) if kept else 0)


@pytest.mark.parametrize("p", [0.05, 0.1, 0.5, 0.9])
def test_statistics(p):
    n = 200_000
    kept = reference.dropout(torch.ones(n), torch.tensor([1234]), p) != 0
    sigma = math.sqrt(n * p * (1 - p))
    assert abs(kept.sum().item() - n * (1 - p)) < 5 * sigma
    # neighbours, the four words of a counter, and other seeds are independent
    other = reference.dropout(torch.ones(n), torch.tensor([1235]), p) != 0
    expected = (p * p + (1 - p) ** 2) * n
    for a, b in [(kept[:-1], kept[1:]), (kept[:-4], kept[4:]), (kept, other)]:
        assert abs((a == b).sum().item() - expected) < 6 * sigma + 4
    counts = kept.view(-1, 4).sum(0).double() - n / 4 * (1 - p)
    assert (counts.abs() < 5 * sigma / 2).all()


def test_the_mask_depends_on_the_position_and_the_seed_alone():
    seed = torch.tensor([7])
    x = torch.randn(6, 10)
    y = reference.dropout(x, seed, 0.5)
    assert torch.equal(reference.dropout(x, seed, 0.5), y)
    assert torch.equal(reference.dropout(x.t().contiguous().t(), seed, 0.5), y)
    assert torch.equal(reference.dropout(x.view(3, 2, 10), seed, 0.5).view(6, 10), y)
    assert torch.equal(reference.dropout(x[:3], seed, 0.5), y[:3])
    assert not torch.equal(reference.dropout(x, seed + 1, 0.5), y)


@pytest.mark.parametrize("dtype", DTYPES)
def test_p_zero_keeps_everything(dtype):
    x = torch.tensor([0.0, -0.0, 1.5, float("inf"), -3.0], dtype=dtype)
    y = reference.dropout(x, torch.tensor([3]), 0.0)
    assert torch.equal(y, x) and y.data_ptr() != x.data_ptr()


def test_dropped_elements_are_zero_whatever_they_were():
    x = torch.full((1000,), float("nan"))
    y = reference.dropout(x, torch.tensor([3]), 0.5)
    kept = reference.dropout(torch.ones(1000), torch.tensor([3]), 0.5) != 0
    assert torch.equal(y.isnan(), kept) and (y[~kept] == 0).all()


def test_gradient_is_the_same_mask():
    x = torch.randn(3, 7, dtype=torch.float64, requires_grad=True)
    seed = torch.tensor([11])
    assert torch.autograd.gradcheck(lambda x: reference.dropout(x, seed, 0.4), (x,))
    dy = torch.randn(3, 7, dtype=torch.float64)
    (dx,) = torch.autograd.grad(reference.dropout(x, seed, 0.4), x, dy)
    assert torch.equal(dx, reference.dropout(dy, seed, 0.4))


def test_compiles_without_graph_breaks():
    x, seed = torch.randn(5, 9), torch.tensor([2])
    compiled = torch.compile(reference.dropout, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, seed, 0.3), reference.dropout(x, seed, 0.3))
    assert reference.dropout(x.to("meta"), seed.to("meta"), 0.3).shape == (5, 9)


def test_every_op_has_a_reference_of_its_schema():
    for name in ops.SCHEMAS:
        schema = getattr(torch.ops.quantlib, name).default._schema
        parameters = inspect.signature(getattr(reference, name)).parameters
        assert list(parameters) == [argument.name for argument in schema.arguments], name
