"""The C++ kernels of a linear layer with its LoRA branch, on every instruction set of this CPU."""

import math

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
    tensors,
    weight_4bit,
)

ops = torch.ops.quantlib


def branch(x, n, rank, dtype):
    """a, b, scaling."""
    generator = torch.Generator().manual_seed(rank)
    a = torch.randn(rank, x.shape[-1], generator=generator) * 0.1
    b = torch.randn(n, rank, generator=generator) * 0.1
    return a.to(dtype), b.to(dtype), 0.75


def weight_int8(n, k):
    return reference.quantize_int8(torch.randn(n, k) * 0.05, -1, None, 0.0)[:2]


@every_isa
@every_dtype
@pytest.mark.parametrize("p, seed", [(0.0, None), (0.25, 7)])
@pytest.mark.parametrize(
    "m, n, k, rank",
    [(1, 256, 512, 16), (5, 129, 333, 3), (40, 70, 704, 8), (8, 64, 256, 256), (130, 100, 256, 33)],
)
def test_within_error_budget(isa, dtype, m, n, k, rank, p, seed):
    """Of plain PyTorch, which rounds the base and the branch, where the kernel rounds their sum."""
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    a, b, scaling = branch(x, n, rank, dtype)
    seed = None if seed is None else torch.tensor([seed])
    weight = weight_4bit(n, k, double_quant=True)
    with use_backend(isa):
        y, s = ops.lora_linear_4bit(x, *weight, bias, a, b, scaling, seed, p, True)
    plain = reference.lora_linear_4bit(x, *weight, bias, a, b, scaling, seed, p, True)
    wide = (x.double(), *weight, bias.double(), a.double(), b.double(), scaling, seed, p, True)
    for actual, expected, exact in zip((y, s), plain, reference.lora_linear_4bit(*wide), strict=True):
        assert_error_within(actual, expected, exact)


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 40])
@pytest.mark.parametrize("threshold", [0.0, 3.0])
def test_int8_is_the_base_and_the_branch(isa, dtype, m, threshold):
    n, k, rank = 70, 333, 8
    x, bias = torch.randn(m, k).to(dtype), torch.randn(n).to(dtype)
    a, b, scaling = branch(x, n, rank, torch.float32)
    values, absmax = weight_int8(n, k)
    with use_backend(isa):
        y, s = ops.lora_linear_int8(x, values, absmax, bias, threshold, a, b, scaling, None, 0.0, True)
        base = ops.linear_int8(x.float(), values, absmax, bias.float(), threshold)
    exact_s = x.double() @ a.double().t()
    exact = base.double() + scaling * exact_s @ b.double().t()
    eps = torch.finfo(dtype).eps
    size = base.double().abs() + scaling * exact_s.abs() @ b.double().abs().t()
    assert s.dtype == dtype and y.dtype == dtype
    assert ((s.double() - exact_s).abs() <= (eps + 1e-6) * (x.double().abs() @ a.double().abs().t())).all()
    assert ((y.double() - exact).abs() <= (eps + 1e-5) * size.amax()).all()


@every_isa
@forall(
    x=tensors(special=False),
    n=st.integers(0, 50),
    rank=st.integers(1, 20),
    block_size=block_sizes,
    factor_dtype=dtypes,
    keep=st.booleans(),
)
def test_any_shape_stride_and_dtype(isa, x, n, rank, block_size, factor_dtype, keep):
    weight = weight_4bit(n, x.shape[-1], block_size)
    a, b, scaling = branch(x, n, rank, factor_dtype)
    with use_backend(isa):
        y, s = ops.lora_linear_4bit(x, *weight, None, a, b.t().contiguous().t(), scaling, None, 0.0, keep)
    assert y.shape == (*x.shape[:-1], n) and y.dtype == x.dtype
    assert s.shape == ((*x.shape[:-1], rank) if keep else (0,)) and s.dtype == x.dtype
    w = reference.dequantize_4bit(*weight, (n, x.shape[-1]), torch.float64)
    xd, ad, bd = x.double(), a.double(), b.double()
    exact = xd @ w.t() + scaling * xd @ ad.t() @ bd.t()
    size_of_terms = xd.abs() @ w.abs().t() + scaling * xd.abs() @ ad.abs().t() @ bd.abs().t()
    sums = (x.shape[-1] + rank) * 2.0**-24  # the bound of a sum in float32
    tolerance = (2 * torch.finfo(x.dtype).eps + sums) * size_of_terms
    if x.dtype == torch.float16:  # float16 has no more than 2^-24 to offer
        tolerance += 2.0**-24 * (1 + x.shape[-1])
    assert ((y.double() - exact).abs() <= tolerance).all()


@every_isa
def test_dropout_is_that_of_the_op(isa):
    """The branch sees what `dropout` gives for the seed; the base sees x."""
    x, seed = torch.randn(3, 40), torch.tensor([2**40 + 3])
    a, b, scaling = branch(x, 20, 4, torch.float32)
    weight = weight_4bit(20, 40)
    with use_backend(isa):
        _, s = ops.lora_linear_4bit(x, *weight, None, a, b, scaling, seed, 0.5, True)
        dropped = ops.dropout(x, seed, 0.5)
    torch.testing.assert_close(s, dropped @ a.t())


@every_isa
@every_dtype
@pytest.mark.parametrize("kind", ["4bit", "int8"])
@pytest.mark.parametrize("p, seed", [(0.0, None), (0.25, 7)])
@pytest.mark.parametrize(
    "m, n, k, rank",
    [
        (1, 256, 512, 16),
        (5, 129, 333, 3),
        (8, 64, 256, 256),
        (32, 70, 80, 19),
        (40, 70, 704, 8),
        (64, 64, 60, 16),
        (130, 100, 256, 33),
    ],
)
def test_gradients_within_error_budget(isa, dtype, kind, m, n, k, rank, p, seed):
    """Of plain PyTorch, which rounds what it multiplies by the branch's factors."""
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    a, b, scaling = branch(x, n, rank, dtype)
    seed = None if seed is None else torch.tensor([seed])
    weight = weight_4bit(n, k, double_quant=True) if kind == "4bit" else weight_int8(n, k)
    s = (reference.dropout(x, seed, p) if seed is not None else x) @ a.t()
    op = f"lora_linear_{kind}_backward"
    run = lambda function, convert: function(  # noqa: E731
        *map(convert, (dy, x, s)), *weight, *map(convert, (a, b)), scaling, seed, p, [True] * 3
    )
    with use_backend(isa):
        actual = run(getattr(ops, op), lambda t: t)
    plain, exact = (run(getattr(reference, op), convert) for convert in (lambda t: t, torch.Tensor.double))
    for name, got, expected, truth in zip(("dx", "da", "db"), actual, plain, exact, strict=True):
        assert got.dtype == expected.dtype and got.shape == expected.shape, name
        assert_error_within(got, expected, truth, factor=1.5)


@every_isa
@pytest.mark.parametrize("m, n, rank", [(3, 90, 5), (20, 4200, 5), (100, 90, 5), (700, 4200, 5), (100, 90, 513)])
def test_gradients_of_float32_factors_are_not_rounded_to_16_bits(isa, m, n, rank):
    """Of few rows, of many, of more than are read at once, and of more ranks than one pass has."""
    k, scaling = 130, 0.5
    x, dy, s = (torch.randn(m, size).bfloat16() for size in (k, n, rank))
    a, b, _ = branch(x, n, rank, torch.float32)
    with use_backend(isa):
        _, *actual = ops.lora_linear_4bit_backward(
            dy, x, s, *weight_4bit(n, k), a, b, scaling, None, 0.0, [False, True, True]
        )
    x, dy, s, b = x.double(), dy.double(), s.double(), b.double()
    exact = scaling * (dy @ b).t() @ x, scaling * dy.t() @ s
    sizes = scaling * (dy.abs() @ b.abs()).t() @ x.abs(), scaling * dy.t().abs() @ s.abs()
    for got, truth, size in zip(actual, exact, sizes, strict=True):
        assert got.dtype == torch.float32
        assert ((got.double() - truth).abs() <= 2.0**-14 * size).all()


@every_isa
@forall(
    x=tensors(special=False),
    n=st.integers(0, 50),
    rank=st.integers(1, 20),
    factor_dtype=dtypes,
    needed=st.lists(st.booleans(), min_size=3, max_size=3),
)
def test_gradients_of_any_shape_stride_and_dtype(isa, x, n, rank, factor_dtype, needed):
    k = x.shape[-1]
    weight = weight_4bit(n, k)
    a, b, scaling = branch(x, n, rank, factor_dtype)
    generator = torch.Generator().manual_seed(n)
    dy, s = (torch.randn(*x.shape[:-1], size, generator=generator).to(x.dtype) for size in (n, rank))
    strided = b.t().contiguous().t()
    with use_backend(isa):
        results = ops.lora_linear_4bit_backward(dy, x, s, *weight, a, strided, scaling, None, 0.0, needed)
    w = reference.dequantize_4bit(*weight, (n, k), torch.float64)
    rows = lambda t: t.double().reshape(math.prod(t.shape[:-1]), t.shape[-1])  # noqa: E731

    def gradients(absolute):
        d, i, o, wd, ad, bd = (absolute(t) for t in (rows(dy), rows(x), rows(s), w, a.double(), b.double()))
        return (d @ wd + scaling * d @ bd @ ad).view(x.shape), scaling * (d @ bd).t() @ i, scaling * d.t() @ o

    terms = (n + rank, n + x.numel(), x.numel())
    for wanted, got, exact, size, count, dtype in zip(
        needed,
        results,
        gradients(lambda t: t),
        gradients(torch.abs),
        terms,
        (x.dtype, factor_dtype, factor_dtype),
        strict=True,
    ):
        assert got.dtype == dtype and got.shape == (exact.shape if wanted else (0,))
        if wanted:
            eps = 2 * max(torch.finfo(t).eps for t in (x.dtype, dtype)) + count * 2.0**-24
            floor = 2.0**-24 * (1 + n) if torch.float16 in (x.dtype, dtype) else 0.0  # all that float16 has to offer
            tolerance = eps * size + floor
            too_large = exact.abs() + tolerance > torch.finfo(dtype).max
            assert (((got.double() - exact).abs() <= tolerance) | too_large).all()


@every_isa
@every_dtype
@pytest.mark.parametrize("m", [1, 7, 40, 70])
def test_reproducible_for_any_number_of_threads(isa, dtype, m):
    """Of 40 some take other rows of the factors."""
    n, k, rank, scaling = 1000, 200, 27, 0.5
    x, dy, s = (torch.randn(m, size).to(dtype) for size in (k, n, rank))
    a, b, _ = branch(x, n, rank, torch.float32)
    weight = weight_4bit(n, k)

    def run(count):
        with threads(count), use_backend(isa):
            forward = ops.lora_linear_4bit(x, *weight, None, a, b, scaling, None, 0.0, True)
            return *forward, *ops.lora_linear_4bit_backward(dy, x, s, *weight, a, b, scaling, None, 0.0, [True] * 3)

    single = run(1)
    for count in (3, 40):
        for one, several in zip(single, run(count), strict=True):
            assert_same(several, one)


@every_isa
@pytest.mark.parametrize("m", [5, 70])
def test_nan_in_a_row_stays_there(isa, m):
    n, k, rank = 90, 130, 5
    x, dy, s = (torch.randn(m, size) for size in (k, n, rank))
    a, b, scaling = branch(x, n, rank, torch.float32)
    x[2, 100], dy[3, 70] = float("nan"), float("inf")
    weight = weight_4bit(n, k)
    with use_backend(isa):
        y, kept = ops.lora_linear_4bit(x, *weight, None, a, b, scaling, None, 0.0, True)
        dx, da, db = ops.lora_linear_4bit_backward(dy, x, s, *weight, a, b, scaling, None, 0.0, [True] * 3)
    rows = torch.arange(m)
    for result, row in ((y, 2), (kept, 2), (dx, 3)):
        assert torch.equal(result.isfinite().all(1), rows != row)
    assert torch.equal(db.isfinite().all(1), torch.arange(n) != 70)
    assert not da.isfinite().any()  # row 3 of ds is not, and column 100 of x


def test_what_would_read_beyond_a_tensor_is_refused():
    x, weight = torch.randn(2, 64), weight_4bit(8, 64)
    a, b, scaling = branch(x, 8, 4, torch.float32)
    for wrong_a, wrong_b, message in ((a[:, :63], b, "a must be"), (a[:3], b, "b must be"), (a[0], b, "matrices")):
        with pytest.raises(RuntimeError, match=message):
            ops.lora_linear_4bit(x, *weight, None, wrong_a, wrong_b, scaling, None, 0.0, False)
    with pytest.raises(RuntimeError, match="elements"):
        ops.lora_linear_4bit(x, *weight, None, a, torch.randn(9, 4), scaling, None, 0.0, False)
    dy, s = torch.randn(2, 8), torch.randn(2, 4)
    rest = (*weight, a, b, scaling, None, 0.0, [True] * 3)
    for wrong in ((dy[:1], x, s), (dy, x, s[:, :3]), (dy[:, :7], x, s), (dy.half(), x, s)):
        with pytest.raises(RuntimeError, match="must"):
            ops.lora_linear_4bit_backward(*wrong, *rest)
