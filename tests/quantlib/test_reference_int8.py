"""The int8 references against definitions written another way, in float64 or in plain Python."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
GRANULARITIES = [(-1, None), (0, None), (None, None), (None, 16), (None, 5)]


def groups(x, dim, block_size):
    """The elements that share an absmax, as lists of flat positions, in the order of absmax."""
    positions = torch.arange(x.numel()).view(x.shape)
    if block_size is not None:
        return list(positions.view(-1).split(block_size)) if x.numel() else []
    if dim is None:
        return [positions.view(-1)]
    return list(positions if dim == -1 else positions.t())


@settings(deadline=None, max_examples=100)
@given(
    rows=st.integers(0, 9),
    columns=st.integers(0, 40),
    granularity=st.sampled_from(GRANULARITIES),
    transposed=st.booleans(),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    exponent=st.integers(-14, 12),
    seed=st.integers(0, 2**31),
)
def test_quantize_and_dequantize(rows, columns, granularity, transposed, dtype, exponent, seed):
    dim, block_size = granularity
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(rows, columns, generator=generator) * 2.0**exponent).to(dtype)
    x = x.t().contiguous().t() if transposed else x
    values, absmax, outliers = reference.quantize_int8(x, dim, block_size, 0.0)
    decoded = reference.dequantize_int8(values, absmax, dim, block_size, torch.float64)
    assert values.dtype == torch.int8 and values.shape == decoded.shape == x.shape
    assert outliers.dtype == torch.bool and outliers.shape == (0,)
    shapes = {-1: (rows,), 0: (columns,), None: () if block_size is None else (-(-rows * columns // block_size),)}
    assert absmax.shape == shapes[dim]
    assert absmax.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    flat = x.double().reshape(-1)
    for scale, group in zip(absmax.reshape(-1).double(), groups(x, dim, block_size), strict=True):
        members, q = flat[group], values.reshape(-1)[group].double()
        assert scale == (members.abs().max() if len(members) else 0)
        exact = members * 127 / scale if scale > 0 else torch.zeros_like(members)
        assert ((q - exact).abs() <= 0.5 + 2**-16).all() and (q.abs() <= 127).all()
        torch.testing.assert_close(decoded.reshape(-1)[group], q * scale / 127, rtol=1e-15, atol=0)
    for low in DTYPES:
        # three float32 roundings, then one to dtype
        ours = reference.dequantize_int8(values, absmax, dim, block_size, low)
        assert ours.dtype == low
        torch.testing.assert_close(ours.double(), decoded, rtol=2**-8 if low == torch.bfloat16 else 2**-10, atol=1e-6)


def test_halves_round_to_even():
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5]])
    assert reference.quantize_int8(x, -1, None, 0.0)[0].tolist() == [[127, 0, 2, 2, 0, -2, -2]]


def test_quantizing_what_was_decoded_changes_nothing():
    values, absmax, _ = reference.quantize_int8(torch.randn(50, 300), -1, None, 0.0)
    decoded = reference.dequantize_int8(values, absmax, -1, None, torch.float32)
    again, _, _ = reference.quantize_int8(decoded, -1, None, 0.0)
    assert torch.equal(again, values)


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-38, 3.7e-37])
def test_rows_of_zeros_or_next_to_nothing_become_zeros(tiny):
    x = torch.tensor([[tiny, -tiny, 0.0], [1.0, 2.0, -3.0]])
    values, absmax, _ = reference.quantize_int8(x, -1, None, 0.0)
    assert values[0].tolist() == [0, 0, 0] and absmax[0] == x[0, 0] and values[1].tolist() == [42, 85, -127]
    assert (reference.dequantize_int8(values, absmax, -1, None, torch.float32)[0] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_non_finite_values_spoil_what_shares_their_absmax_and_no_more(bad, granularity):
    x = torch.randn(6, 8)
    x[2, 3] = bad
    values, absmax, _ = reference.quantize_int8(x, *granularity, 0.0)
    clean = reference.quantize_int8(torch.where(x.isfinite(), x, 0), *granularity, 0.0)[0].view(-1)
    decoded = reference.dequantize_int8(values, absmax, *granularity, torch.float32).view(-1)
    for scale, group in zip(absmax.view(-1), groups(x, *granularity), strict=True):
        if (group == 2 * 8 + 3).any():
            assert scale.isnan() if bad != bad else scale == INF
            assert (values.view(-1)[group] == 0).all() and decoded[group].isnan().all()
        else:
            assert torch.equal(values.view(-1)[group], clean[group]) and decoded[group].isfinite().all()


@settings(deadline=None, max_examples=60)
@given(
    lead=st.sampled_from([(), (0,), (1,), (7,), (2, 3)]),
    columns=st.integers(0, 40),
    threshold=st.sampled_from([1e-3, 0.7, 1.5, 6.0]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_outlier_columns(lead, columns, threshold, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*lead, columns, generator=generator).to(dtype)
    before = x.clone()
    values, absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    assert torch.equal(x, before)
    assert values.shape == x.shape and absmax.shape == x.shape[:-1] and outliers.shape == (columns,)
    rows, q = x.reshape(-1 if columns else len(absmax.reshape(-1)), columns), values.reshape(-1, max(columns, 1))
    rounded = torch.tensor(threshold, dtype=dtype)
    for k in range(columns):
        assert outliers[k] == any(v.abs() >= rounded for v in rows[:, k])
        assert not outliers[k] or (q[:, k] == 0).all()
    for row, scale in zip(rows, absmax.reshape(-1), strict=True):
        assert scale == max([v.abs().item() for v in row if v.abs() < rounded], default=0.0)


def linear_oracle(x, values, absmax, bias, threshold):
    """LLM.int8() on a matrix x in float64, by gathering the outlier columns."""
    q, x_absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    w = values.double() * absmax.double()[:, None] / 127
    y = (q.double() * x_absmax.double()[:, None] / 127) @ w.t()
    magnitude = (q.double() * x_absmax.double()[:, None] / 127).abs() @ w.abs().t()
    columns = outliers.nonzero().view(-1)
    y = y + x.double()[:, columns] @ w[:, columns].t()
    magnitude = magnitude + x.double()[:, columns].abs() @ w[:, columns].abs().t()
    if bias is not None:
        y, magnitude = y + bias.double(), magnitude + bias.double().abs()
    return y, magnitude


UNIT = {torch.float64: 2**-53, torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 9),
    in_features=st.integers(1, 150),
    out_features=st.integers(1, 20),
    threshold=st.sampled_from([0.0, 0.5, 2.5, 6.0]),
    with_bias=st.booleans(),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    seed=st.integers(0, 2**31),
)
def test_linear_against_float64(rows, in_features, out_features, threshold, with_bias, dtype, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, in_features, generator=generator).to(dtype)
    w = torch.randn(out_features, in_features, generator=generator)
    bias = torch.randn(out_features, generator=generator).to(dtype) if with_bias else None
    values, absmax, _ = reference.quantize_int8(w, -1, None, 0.0)
    y = reference.linear_int8(x, values, absmax, bias, threshold)
    exact, magnitude = linear_oracle(x, values, absmax, bias, threshold)
    assert y.dtype == dtype and y.shape == exact.shape
    # sums in float32 (float64 for float64), one rounding to dtype
    work = UNIT[torch.float64 if dtype == torch.float64 else torch.float32]
    bound = (in_features + 8) * work * magnitude + UNIT[dtype] * exact.abs() * (1 + 1e-3)
    assert ((y.double() - exact).abs() <= bound).all()
    folded = reference.linear_int8(x.view(1, rows, 1, in_features), values, absmax, bias, threshold)
    assert folded.shape == (1, rows, 1, out_features) and torch.equal(folded.view_as(y), y)


def test_integer_sums_beyond_float32():
    k = 5000
    x, w = torch.ones(2, k), torch.ones(3, k)
    values, absmax, _ = reference.quantize_int8(w, -1, None, 0.0)
    assert torch.equal(reference._int8_matmul(values, values), torch.full((3, 3), k * 127 * 127, dtype=torch.int32))
    odd = torch.randint(-127, 128, (4, k), dtype=torch.int8)
    assert torch.equal(reference._int8_matmul(odd, odd).long(), odd.long() @ odd.long().t())
    torch.testing.assert_close(reference.linear_int8(x, values, absmax, None, 0.0), torch.full((2, 3), float(k)))


def test_rows_without_outliers_do_not_see_other_rows_infinities():
    values, absmax, _ = reference.quantize_int8(torch.randn(5, 32), -1, None, 0.0)
    x = torch.randn(3, 32)
    x[1, 4] = INF
    y = reference.linear_int8(x, values, absmax, None, 6.0)
    assert y[[0, 2]].isfinite().all() and not y[1].isfinite().any()
    x[1, 4] = NAN
    y = reference.linear_int8(x, values, absmax, None, 6.0)
    assert y[[0, 2]].isfinite().all() and y[1].isnan().all()
    assert reference.linear_int8(x, values, absmax, None, 0.0)[1].isnan().all()


def test_gradients_in_float64():
    values, absmax, _ = reference.quantize_int8(torch.randn(6, 11), -1, None, 0.0)
    x = (torch.randn(2, 11, dtype=torch.float64) + 5).requires_grad_()
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)

    # with every column an outlier nothing of x is rounded, and the function is differentiable
    def linear(x, bias):
        return reference.linear_int8(x, values, absmax, bias, 0.01)

    assert torch.autograd.gradcheck(linear, (x, bias))
    assert torch.autograd.gradcheck(lambda dy: reference.linear_int8_dx(dy, values, absmax), (dy,))
    (dx,) = torch.autograd.grad(linear(x, bias), x, dy)
    torch.testing.assert_close(dx, reference.linear_int8_dx(dy, values, absmax), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dx(dtype):
    values, absmax, _ = reference.quantize_int8(torch.randn(20, 33), -1, None, 0.0)
    dy = torch.randn(2, 4, 20).to(dtype)
    dx = reference.linear_int8_dx(dy, values, absmax)
    w = reference.dequantize_int8(values, absmax, -1, None, dtype).double()
    bound = (20 * 2**-23 + UNIT[dtype] * 1.01) * (dy.double().abs() @ w.abs())
    assert dx.dtype == dtype and ((dx.double() - dy.double() @ w).abs() <= bound).all()


def test_on_meta_and_compiled_without_graph_breaks():
    """No shape depends on data, nothing waits for a device, and the tracer sees one graph."""
    x, w = torch.randn(5, 96), torch.randn(6, 96)
    values, absmax, _ = reference.quantize_int8(w, -1, None, 0.0)
    calls = [
        (reference.quantize_int8, (x, -1, None, 1.0)),
        (reference.quantize_int8, (x, None, 64, 0.0)),
        (reference.dequantize_int8, (values, absmax, -1, None, torch.bfloat16)),
        (reference.linear_int8, (x, values, absmax, None, 1.0)),
        (reference.linear_int8_dx, (torch.randn(5, 6), values, absmax)),
    ]
    for function, arguments in calls:
        expected = function(*arguments)
        on_meta = function(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        results = (expected, on_meta, compiled)
        for e, m, c in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert (m.shape, m.dtype) == (e.shape, e.dtype)
            assert torch.equal(c, e)
