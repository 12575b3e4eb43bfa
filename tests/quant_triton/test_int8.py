"""LLM.int8(): the integers of the reference, one rounding, in every branch of the kernels."""

import inspect
from collections import defaultdict

import pytest
import torch

from quant_triton import absmax as absmax_kernels
from quant_triton import int8, int8_few_rows, int8_many_rows
from quant_triton.branch import Lora
from quant_triton.int8 import LEAST_SCALING, linear_int8, linear_int8_dx
from quant_triton.launch import forced
from quantlib import reference

NAN, INF = float("nan"), float("inf")
DTYPES = (torch.float32, torch.float16)
# NumPy, which interprets here, tells of each division by zero.
pytestmark = pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning")
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)

TILE = {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 64, "GROUP_M": 2, "num_warps": 1, "num_stages": 1}


def int8_weight(n, k):
    return reference.quantize_int8(torch.randn(n, k) * 0.05, -1, None, 0.0)[:2]


def with_outliers(m, k, dtype=torch.float32, columns=(3, -1)):
    x = torch.randn(m, k)
    for i, column in enumerate(columns):
        x[i % m, column] = 20 - 3 * i
    return x.to(dtype)


def branch_of(m, features, rank, dtype, scaling=0.7, p=0.0):
    """A branch with strided factors in float32."""
    b = torch.randn(2 * rank, features + 3).t()[3:, ::2] * rank**-0.5
    return Lora(torch.randn(m, rank).to(dtype), b, scaling, torch.tensor([2**40 + 5]) if p else None, p)


def branch_in(dtype, lora):
    product = lora.scaling * (lora.s.to(dtype) @ lora.b.to(lora.s.dtype).to(dtype).t())
    return product if lora.seed is None else reference.dropout(product, lora.seed, lora.p)


def assert_exact(y, x, values, absmax, bias, threshold, lora=None):
    """One rounding from the exact value, up to the few float32 operations before it."""
    q, x_absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    exact = (q.double() @ values.double().t()) * (x_absmax.double()[:, None] * absmax.double()) / 127**2
    if threshold:
        w = values.double() * absmax.double()[:, None] / 127
        exact += x.double()[:, outliers] @ w[:, outliers].t()
    if bias is not None:
        exact += bias.double()
    if lora is not None:
        exact += branch_in(torch.float64, lora)
    assert y.dtype == x.dtype
    tolerance = torch.finfo(x.dtype).eps / 2 + 2e-6
    torch.testing.assert_close(y.double(), exact, rtol=tolerance, atol=2e-6 * exact.abs().max().item())


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0, 2.0])
@pytest.mark.parametrize("m, n, k", [(1, 33, 100), (1, 64, 512), (3, 9, 600), (4, 20, 130), (5, 40, 333), (70, 50, 96)])
def test_linear_int8_is_exact(m, n, k, threshold, dtype):
    x, bias = with_outliers(m, k, dtype), torch.randn(n).to(dtype)
    values, absmax = int8_weight(n, k)
    assert_exact(linear_int8(x, values, absmax, bias, threshold), x, values, absmax, bias, threshold)
    assert_exact(linear_int8(x, values, absmax, None, threshold), x, values, absmax, None, threshold)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("weight_first", [False, True])
@pytest.mark.parametrize("split_k", [1, 3])
def test_every_way_to_multiply(split_k, weight_first, tma):
    """TMA and products in int8, or neither, as Turing has it."""
    x = with_outliers(45, 400, torch.float16)
    values, absmax = int8_weight(70, 400)
    way = {"SPLIT_K": split_k, "WEIGHT_FIRST": weight_first, "TMA": tma, "INT8": tma}
    with forced("linear_int8", {**TILE, **way}):
        for threshold in (0.0, 6.0):
            assert_exact(linear_int8(x, values, absmax, None, threshold), x, values, absmax, None, threshold)
        lora = branch_of(45, 70, 20, torch.float16)
        assert_exact(linear_int8(x, values, absmax, None, 6.0, lora=lora), x, values, absmax, None, 6.0, lora)
        odd = x[:, :-3].contiguous(), values[:, :-3].contiguous()
        assert_exact(linear_int8(*odd, absmax, None, 6.0), *odd, absmax, None, 6.0)


def test_the_way_to_multiply_leaves_no_trace():
    """Integer sums are exact in any order, so configurations differ in the outlier columns' sums at most."""
    x, (values, absmax) = torch.randn(20, 300), int8_weight(70, 300)
    results = []
    for split_k, weight_first in ((1, False), (2, False), (4, True)):
        way = {"SPLIT_K": split_k, "WEIGHT_FIRST": weight_first, "TMA": False, "INT8": True}
        with forced("linear_int8", {**TILE, **way}):
            results.append(linear_int8(x, values, absmax, None, 6.0))
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("m", [2, 9])
def test_more_outlier_columns_than_one_step_takes(m):
    x = with_outliers(m, 200, columns=range(1, 200, 4))
    values, absmax = int8_weight(17, 200)
    assert_exact(linear_int8(x, values, absmax, None, 5.0), x, values, absmax, None, 5.0)
    assert_exact(linear_int8(x, values, absmax, None, 1e-3), x, values, absmax, None, 1e-3)


def test_rows_too_long_for_one_read(monkeypatch):
    monkeypatch.setattr(absmax_kernels, "LONGEST_ROW", 64)
    x, (values, absmax) = with_outliers(9, 5000), int8_weight(6, 5000)
    assert_exact(linear_int8(x, values, absmax, None, 6.0), x, values, absmax, None, 6.0)


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("m, n, k, rank", [(1, 33, 100, 3), (2, 20, 130, 70), (5, 40, 333, 16), (70, 50, 96, 40)])
def test_a_branch_is_rounded_with_the_rest(m, n, k, rank, threshold, dtype):
    x, bias, (values, absmax) = with_outliers(m, k, dtype), torch.randn(n).to(dtype), int8_weight(n, k)
    for scaling in (0.7, -16.0, LEAST_SCALING):
        lora = branch_of(m, n, rank, dtype, scaling)
        y = linear_int8(x, values, absmax, bias, threshold, lora=lora)
        assert_exact(y, x, values, absmax, bias, threshold, lora)


@every_dtype
@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("limit", [512, 0])
@pytest.mark.parametrize("m, n, k, rank", [(1, 64, 100, 3), (7, 129, 65, 70), (40, 33, 130, 16)])
def test_a_branch_of_dx_within_its_budget(m, n, k, rank, limit, p, dtype, monkeypatch):
    monkeypatch.setattr(int8, "DX_ROWS", limit)
    (values, absmax), dy, lora = int8_weight(n, k), torch.randn(m, n).to(dtype), branch_of(m, k, rank, dtype, 1.0, p)
    dx = linear_int8_dx(dy, values, absmax, lora=lora)
    plain = reference.linear_int8_dx(dy, values, absmax) + branch_in(dtype, lora)
    exact = reference.linear_int8_dx(dy.double(), values, absmax) + branch_in(torch.float64, lora)
    error, allowed = (t.double() - exact for t in (dx, plain))
    assert dx.dtype == dtype and error.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt()


def test_a_branch_on_nothing():
    (values, absmax), lora = int8_weight(4, 8), branch_of(0, 4, 3, torch.float32)
    assert linear_int8(torch.randn(0, 8), values, absmax, None, 6.0, lora=lora).shape == (0, 4)
    lora = branch_of(5, 8, 3, torch.float32, 1.0)
    dx = linear_int8_dx(torch.randn(5, 0), torch.zeros(0, 8, dtype=torch.int8), torch.ones(0), lora=lora)
    torch.testing.assert_close(dx.double(), branch_in(torch.float64, lora), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("m", [1, 9])
def test_extreme_products_neither_saturate_nor_round(m):
    for sign in (1, -1):
        x, values = torch.ones(m, 1030), torch.full((6, 1030), 127 * sign, dtype=torch.int8)
        y = linear_int8(x, values, torch.ones(6), None, 0.0)
        torch.testing.assert_close(y, torch.full((m, 6), 1030.0 * sign))


@pytest.mark.parametrize("m", [2, 7])
def test_any_strides_and_dimensions(m):
    values, absmax = int8_weight(12, 66)
    wide = torch.randn(2 * m, 140)
    wide[1, 4] = 30
    for x in (wide[::2, 3:69], torch.randn(66, m).t(), torch.randn(m, 1, 66), torch.randn(m, 132)[:, ::2]):
        y, rows = linear_int8(x, values, absmax, None, 6.0), x.reshape(-1, 66)
        assert y.shape == (*x.shape[:-1], 12)
        assert_exact(y.view(-1, 12), rows, values, absmax, None, 6.0)
    strided = values.t().contiguous().t()
    assert torch.equal(
        linear_int8(wide[:, :66], strided, absmax, None, 6.0), linear_int8(wide[:, :66], values, absmax, None, 6.0)
    )


@pytest.mark.parametrize("m", [2, 7])
def test_any_strides_of_scales_and_bias(m):
    values, absmax = int8_weight(12, 66)
    x, dy, bias = torch.randn(m, 66), torch.randn(m, 12), torch.randn(12)
    spread = [torch.stack((t, t + 1), 1)[:, 0] for t in (absmax, bias)]
    assert torch.equal(linear_int8(x, values, *spread, 6.0), linear_int8(x, values, absmax, bias, 6.0))
    assert torch.equal(linear_int8_dx(dy, values, spread[0]), linear_int8_dx(dy, values, absmax))


@pytest.mark.parametrize("lead, n, k", [((0,), 4, 8), ((3,), 0, 8), ((3,), 4, 0), ((2, 0), 4, 8)])
def test_nothing(lead, n, k):
    values, absmax = torch.zeros(n, k, dtype=torch.int8), torch.ones(n)
    bias = torch.randn(n)
    assert torch.equal(linear_int8(torch.randn(*lead, k), values, absmax, bias, 6.0), bias.expand(*lead, n))
    assert torch.equal(linear_int8_dx(torch.randn(*lead, n), values, absmax), torch.zeros(*lead, k))


@every_dtype
@pytest.mark.parametrize("threshold", [0.0, 6.0])
@pytest.mark.parametrize("m", [1, 9])
def test_nan_and_inf_where_the_reference_has_them(m, threshold, dtype):
    values, absmax = int8_weight(40, 130)
    absmax[3], absmax[4] = NAN, INF
    values[3:5] = 0  # as quantize_int8 leaves them
    x = torch.randn(m, 130).to(dtype)
    x[0, 5], x[m - 1, 77] = NAN, INF
    dy = torch.randn(m, 40).to(dtype)
    dy[0, 1] = NAN
    for actual, expected in (
        (linear_int8(x, values, absmax, None, threshold), reference.linear_int8(x, values, absmax, None, threshold)),
        (linear_int8_dx(dy, values, absmax), reference.linear_int8_dx(dy.double(), values, absmax)),
    ):
        assert torch.equal(actual.isnan(), expected.isnan()) and torch.equal(actual.isinf(), expected.isinf())


@every_dtype
@pytest.mark.parametrize("limit", [512, 0])
@pytest.mark.parametrize("m, n, k", [(1, 64, 100), (7, 129, 65), (40, 33, 130)])
def test_gradient_within_its_budget(m, n, k, limit, dtype, monkeypatch):
    monkeypatch.setattr(int8, "DX_ROWS", limit)
    values, absmax = int8_weight(n, k)
    dy = torch.randn(m, n).to(dtype)
    dx, plain = linear_int8_dx(dy, values, absmax), reference.linear_int8_dx(dy, values, absmax)
    exact = reference.linear_int8_dx(dy.double(), values, absmax)
    error, allowed = (t.double() - exact for t in (dx, plain))
    assert dx.dtype == dtype and error.square().mean().sqrt() <= 1.5 * allowed.square().mean().sqrt()
    shaped = torch.stack((dy, dy), -1)[None, ..., 0]
    assert torch.equal(linear_int8_dx(shaped, values, absmax)[0], dx)


@pytest.mark.parametrize("call", [lambda x, *w: linear_int8(x, *w, None, 6.0), linear_int8_dx])
@pytest.mark.parametrize("x, absmax", [(torch.ones(2, 5), torch.ones(7)), (torch.ones(2, 7), torch.ones(6))])
def test_what_does_not_fit_is_named(call, x, absmax):
    with pytest.raises(ValueError, match="has shape"):
        call(x, torch.zeros(7, 7, dtype=torch.int8), absmax)


def test_sums_that_could_overflow_are_refused():
    with pytest.raises(ValueError, match="exact up to 133144"):
        linear_int8(torch.zeros(1, 133145), torch.zeros(1, 133145, dtype=torch.int8), torch.ones(1), None, 0.0)


def compiled_for(kernel, arguments, constants):
    """What of a launch makes Triton compile: constants, types, and what is known of integers."""
    unspecialized, known = kernel.kwargs["do_not_specialize"] or (), {}
    for name, value in (*zip(kernel.arg_names, arguments, strict=False), *constants.items()):
        parameter = inspect.signature(kernel.fn).parameters.get(name)
        if isinstance(value, torch.Tensor):
            known[name] = value.dtype
        elif parameter is None or parameter.annotation in ("tl.constexpr", int8.tl.constexpr) or value is None:
            known[name] = value
        elif isinstance(value, int) and name not in unspecialized:
            known[name] = "one" if value == 1 else value % 16 == 0
    return tuple(sorted(known.items(), key=lambda item: item[0]))


LAUNCHERS = (absmax_kernels, int8, int8_few_rows, int8_many_rows)


def test_one_launch_quantizes_and_one_multiplies(monkeypatch):
    names = []
    for module in LAUNCHERS:
        monkeypatch.setattr(module, "launch", lambda kernel, *_, **__: names.append(kernel.__name__))
    values, absmax = int8_weight(48, 64)
    for m in (2, 9, 3000):
        expected = ["few_rows_kernel"] if m == 2 else ["quantize_kernel", "product_kernel"]
        for lora in (None, branch_of(m, 48, 8, torch.float32)):
            names.clear()
            linear_int8(torch.randn(m, 64), values, absmax, None, 6.0, lora=lora)
            assert names == expected


def test_no_number_of_rows_compiles_again(monkeypatch):
    seen = defaultdict(set)

    def record(kernel, grid, *arguments, fp_fusion, **constants):
        seen[kernel.__name__].add(compiled_for(kernel, arguments, constants))

    for module in LAUNCHERS:
        monkeypatch.setattr(module, "launch", record)
    (values, absmax), rank = int8_weight(48, 64), 5
    for m in (33, 48, 50, 63, 64):
        x, dy = torch.randn(m, 64), torch.randn(m, 48)
        absmax_kernels.quantize_int8(x, -1, None, 6.0)
        linear_int8(x, values, absmax, None, 6.0, lora=branch_of(m, 48, rank, x.dtype))
        linear_int8_dx(dy, values, absmax, lora=branch_of(m, 64, rank, x.dtype, 1.0, 0.3))
    assert set(seen) == {"quantize_kernel", "clear_kernel", "product_kernel", "dx_kernel"}
    assert {name: keys for name, keys in seen.items() if len(keys) > 1} == {}
