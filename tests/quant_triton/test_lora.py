"""LoRA on quantized bases against the float64 reference, and the products of low rank that it is made of."""

import pytest
import torch

from quant_triton import lora, low_rank
from quant_triton.branch import Lora
from quant_triton.codes import codebook
from quant_triton.merge import merge
from quantlib import functional, reference

DTYPES = [torch.float32, torch.float16]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_p = pytest.mark.parametrize("p", [0.0, 0.3])
# rows, out, in, rank: a row, odd sizes, parts along every dimension, a rank above what a program takes at once
SHAPES = [(1, 33, 13, 1), (70, 96, 128, 16), (37, 300, 130, 40)]


def factors(n, k, rank, dtype=torch.float32):
    return (torch.randn(rank, k) * k**-0.5).to(dtype), (torch.randn(n, rank) * rank**-0.5).to(dtype)


def draw_seed(p):
    return torch.tensor([2**40 + 5]) if p else None


def dropped(x, seed, p):
    return x if seed is None else reference.dropout(x, seed, p)


def assert_near(actual, exact, dtype, roundings=1):
    """Off by `roundings` roundings to `dtype` and the order of a sum."""
    assert actual.shape == exact.shape and actual.isfinite().all()
    scale = exact.norm() + 1e-30
    assert (actual.double() - exact).norm() <= (0.5 * roundings * torch.finfo(dtype).eps + 1e-6) * scale


@every_dtype
@every_p
@pytest.mark.parametrize("m, n, k, rank", SHAPES)
def test_products_of_low_rank(m, n, k, rank, p, dtype):
    x, dy, seed = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype), draw_seed(p)
    a, b = factors(n, k, rank)
    a_x, b_x = (t.to(dtype).double() for t in (a, b))
    x_dropped = dropped(x.double(), seed, p)
    s = low_rank.project(x, a, seed, p)
    assert_near(s, x_dropped @ a_x.t(), dtype)
    ds, db = low_rank.gradients_dy(dy, s, b, 0.5, True, True)
    assert_near(ds, 0.5 * dy.double() @ b_x, dtype)
    assert_near(db, 0.5 * dy.double().t() @ s.double(), b.dtype)
    assert_near(low_rank.gradient_a(x, ds, seed, p, torch.float32), ds.double().t() @ x_dropped, torch.float32)
    y = torch.randn(m, k).to(dtype)
    exact = y.double() + dropped(2 * ds.double() @ a_x, seed, p)
    assert low_rank.add_branch_(y, Lora(ds, a.t(), 2.0, seed, p)) is y
    assert_near(y, exact, dtype)


def test_products_take_any_strides():
    x, a = torch.randn(33, 40), torch.randn(5, 40)
    expected = low_rank.project(x, a, None, 0.0)
    padded = torch.cat([x, x], 1)[:, :40]
    for other in (padded, x.t().contiguous().t()):
        assert torch.equal(low_rank.project(other, a, None, 0.0), expected)
    expanded = torch.ones(()).expand(33, 40)
    ds, _ = low_rank.gradients_dy(expanded, expected, a.t().contiguous(), 1.0, True, False)
    torch.testing.assert_close(ds, a.sum(1).expand(33, 5), rtol=1e-5, atol=1e-5)


def test_dropped_elements_are_gone_even_if_they_are_nan():
    x, a, seed = torch.full((8, 64), float("nan")), torch.ones(1, 64), torch.tensor([3])
    kept = reference.dropout(torch.ones(8, 64), seed, 0.5) != 0
    x[kept] = 1
    torch.testing.assert_close(low_rank.project(x, a, seed, 0.5)[:, 0], 2.0 * kept.sum(1))


@every_dtype
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type, block_size", [("nf4", 64), ("fp4", 32), ("nf4", 4096)])
def test_merging_a_4_bit_weight(quant_type, block_size, double_quant, dtype):
    n, k, rank = 70, 96, 20
    q = functional.quantize_4bit(torch.randn(n, k), quant_type, block_size, double_quant=double_quant)
    packed, absmax, *nested, _, _ = q.op_args()
    a, b = factors(n, k, rank)
    table = codebook(quant_type, torch.device("cpu"))
    merged = merge(packed, absmax, tuple(nested), table, block_size, a, b, 0.5, dtype)
    branch = 0.5 * b.to(dtype).double() @ a.to(dtype).double()
    assert_near(merged, reference.dequantize_4bit(*q.op_args(), (n, k), torch.float64) + branch, dtype)


@every_dtype
def test_merging_an_int8_weight(dtype):
    n, k, rank = 37, 75, 3
    q = functional.quantize_int8(torch.randn(n, k))
    a, b = factors(n, k, rank)
    merged = merge(q.values, q.absmax, (None,) * 3, None, 1, a, b, 0.5, dtype)
    branch = 0.5 * b.to(dtype).double() @ a.to(dtype).double()
    assert_near(merged, reference.dequantize_int8(q.values, q.absmax, -1, None, torch.float64) + branch, dtype)


def test_merging_rows_that_blocks_straddle_is_refused():
    with pytest.raises(ValueError, match="rows have 40 elements"):
        merge(
            torch.zeros(1),
            torch.zeros(1),
            (None,) * 3,
            torch.zeros(16),
            64,
            torch.ones(1, 40),
            torch.ones(2, 1),
            1.0,
            torch.float32,
        )


# ---------------------------------------------------------------------------------------------------
# Base and branch


def base(kind, n, k):
    """(suffix of the op's name, its arguments for the weight)."""
    weight = torch.randn(n, k) * k**-0.5
    if kind == "int8":
        q = functional.quantize_int8(weight)
        return "int8", (q.values, q.absmax)
    return "4bit", functional.quantize_4bit(weight, double_quant=kind == "nested").op_args()


def budget(actual, plain, exact, factor, dtype):
    """Within `factor` of plain PyTorch's error, up to the noise of a sum's order."""
    error, allowed = ((t.double() - exact).norm() for t in (actual, plain))
    assert error <= factor * 1.05 * allowed + 1e-6 * exact.norm(), (error / allowed).item()


@every_dtype
@every_p
@pytest.mark.parametrize("lead, n, k, rank", [((3,), 64, 128, 8), ((2, 20), 72, 256, 16), ((40,), 33, 75, 4)])
@pytest.mark.parametrize("kind", ["nf4", "nested", "int8"])
def test_base_and_branch(kind, lead, n, k, rank, p, dtype, monkeypatch):
    suffix, weight = base(kind, n, k)
    x, dy, bias = (torch.randn(*lead, size).to(dtype) for size in (k, n, n))
    bias = bias.view(-1, n)[0].contiguous()
    between = (bias,) if suffix == "4bit" else (bias, 0.0)
    a, b = factors(n, k, rank)
    branch = (a, b, 2.0, draw_seed(p), p)
    forward, backward = f"lora_linear_{suffix}", f"lora_linear_{suffix}_backward"

    def on(module, dtype):
        x_, dy_, between_ = x.to(dtype), dy.to(dtype), (between[0].to(dtype), *between[1:])
        y, s = getattr(module, forward)(x_, *weight, *between_, *branch, True)
        gradients = getattr(module, backward)(dy_, x_, s, *weight, *branch, [True] * 3)
        return y, s, *gradients

    exact = on(reference, torch.float64)
    plain = on(reference, dtype)
    names = ("y", "s", "dx", "da", "db")
    for merged in (False, True) if p == 0 else (False,):
        if merged:  # as many rows make it
            monkeypatch.setattr(lora, "settings_for", lambda *_: {})
            monkeypatch.setattr(lora, "settings_for_dx", lambda *_: {})
            monkeypatch.setattr(lora, "DX_ROWS", 0)
        for name, actual, other, right in zip(names, on(lora, dtype), plain, exact, strict=True):
            assert actual.shape == right.shape and actual.dtype == other.dtype, name
            budget(actual, other, right, 1.0 if name == "y" else 1.5, dtype)


@every_p
@pytest.mark.parametrize("rows", [9, 60])
@pytest.mark.parametrize("suffix", ["4bit", "int8"])
def test_many_adapters_of_mixed_ranks(suffix, rows, p):
    """As each row would be served by its own adapter alone, and rows without one by the base."""
    n, k, ranks, scalings = 64, 128, (3, 20, 8), (2.0, 0.5, 1.0)
    _, weight = base("int8" if suffix == "int8" else "nf4", n, k)
    x, dy, seed = torch.randn(rows, k), torch.randn(rows, n), draw_seed(p)
    between = (None,) if suffix == "4bit" else (None, 0.0)
    adapters = [factors(n, k, rank) for rank in ranks]
    a, b = torch.cat([a for a, _ in adapters]), torch.cat([b for _, b in adapters], 1)
    owner = torch.arange(rows, dtype=torch.int32) % 4 - 1
    adapter = torch.repeat_interleave(torch.arange(3), torch.tensor(ranks)).int()
    gate = low_rank.Gate(owner, adapter, torch.tensor(scalings)[adapter])
    forward, backward = (getattr(lora, f"lora_linear_{suffix}{way}") for way in ("", "_backward"))
    y, s = forward(x, *weight, *between, a, b, 1.0, seed, p, True, gate)
    dx, da, db = backward(dy, x, s, *weight, a, b, 1.0, seed, p, [True] * 3, gate)

    base_y = getattr(reference, f"linear_{suffix}")(x, *weight, *((n, None) if suffix == "4bit" else (None, 0.0)))
    base_dx = getattr(reference, f"linear_{suffix}_dx")(dy, *weight, *((k,) if suffix == "4bit" else ()))
    x_dropped, close = dropped(x, seed, p), {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(y[owner == -1], base_y[owner == -1], **close)
    torch.testing.assert_close(dx[owner == -1], base_dx[owner == -1], **close)
    for i, (a_i, b_i) in enumerate(adapters):
        mine, its = owner == i, adapter == i
        ds = scalings[i] * dy[mine] @ b_i
        torch.testing.assert_close(y[mine], base_y[mine] + scalings[i] * x_dropped[mine] @ a_i.t() @ b_i.t(), **close)
        torch.testing.assert_close(db[:, its], scalings[i] * dy[mine].t() @ (x_dropped[mine] @ a_i.t()), **close)
        torch.testing.assert_close(da[its], ds.t() @ x_dropped[mine], **close)
        branch = torch.zeros_like(x)
        branch[mine] = ds @ a_i
        torch.testing.assert_close(dx[mine], (base_dx + dropped(branch, seed, p))[mine], **close)


@pytest.mark.parametrize("suffix", ["4bit", "int8"])
def test_what_is_not_needed_is_not_computed(suffix):
    n, k = 64, 128
    _, weight = base("int8" if suffix == "int8" else "nf4", n, k)
    x, dy, branch = torch.randn(5, k), torch.randn(5, n), (*factors(n, k, 4), 2.0, None, 0.0)
    between = (None,) if suffix == "4bit" else (None, 0.0)
    y, s = getattr(lora, f"lora_linear_{suffix}")(x, *weight, *between, *branch, False)
    assert s.numel() == 0
    y_kept, s = getattr(lora, f"lora_linear_{suffix}")(x, *weight, *between, *branch, True)
    assert torch.equal(y, y_kept) and s.shape == (5, 4)
    backward = getattr(lora, f"lora_linear_{suffix}_backward")
    everything = backward(dy, x, s, *weight, *branch, [True] * 3)
    for i in range(3):
        some = backward(dy, x, s, *weight, *branch, [i == j for j in range(3)])
        for j in range(3):
            assert torch.equal(some[j], everything[j]) if i == j else some[j].numel() == 0


@pytest.mark.parametrize("scaling", [0.0, 1e-38, -1e-30, float("nan")])
def test_a_scaling_that_no_sum_can_be_divided_by(scaling):
    (_, weight), x, (a, b) = base("int8", 40, 64), torch.randn(5, 64), factors(40, 64, 8)
    y, _ = lora.lora_linear_int8(x, *weight, None, 0.0, a, b, scaling, None, 0.0, False)
    expected, _ = reference.lora_linear_int8(x, *weight, None, 0.0, a, b, scaling, None, 0.0, False)
    torch.testing.assert_close(y, expected, equal_nan=True, rtol=1e-5, atol=1e-5)


@every_p
@pytest.mark.parametrize("suffix", ["4bit", "int8"])
def test_a_branch_of_any_strides(suffix, p):
    (_, weight), (a, b), seed = base("int8" if suffix == "int8" else "nf4", 64, 128), factors(64, 128, 8), draw_seed(p)
    x, dy, s, bias = torch.randn(5, 128), torch.randn(5, 64), torch.randn(5, 8), torch.randn(64)
    between = () if suffix == "4bit" else (0.0,)
    forward, backward = (getattr(lora, f"lora_linear_{suffix}{way}") for way in ("", "_backward"))

    def both(form):
        x_, dy_, s_, bias_, a_, b_ = (form(t) for t in (x, dy, s, bias, a, b))
        branch = (a_, b_, 2.0, seed, p)
        return *forward(x_, *weight, bias_, *between, *branch, True), *backward(
            dy_, x_, s_, *weight, *branch, [True] * 3
        )

    expected = both(lambda t: t)
    for form in (lambda t: torch.stack([t, t], -1)[..., 0], lambda t: torch.cat([t, t], -1)[..., : t.shape[-1]]):
        for got, want in zip(both(form), expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize("suffix", ["4bit", "int8"])
def test_no_rows(suffix):
    n, k = 64, 128
    _, weight = base("int8" if suffix == "int8" else "nf4", n, k)
    a, b = factors(n, k, 4)
    x, dy = torch.randn(2, 0, k), torch.randn(2, 0, n)
    between = (None,) if suffix == "4bit" else (None, 0.0)
    y, s = getattr(lora, f"lora_linear_{suffix}")(x, *weight, *between, a, b, 2.0, None, 0.0, True)
    assert y.shape == dy.shape and s.shape == (2, 0, 4)
    gradients = getattr(lora, f"lora_linear_{suffix}_backward")(dy, x, s, *weight, a, b, 2.0, None, 0.0, [True] * 3)
    assert [g.shape for g in gradients] == [x.shape, a.shape, b.shape]
    assert not gradients[1].any() and not gradients[2].any()


def test_the_same_bits_on_every_run():
    _, weight = base("nf4", 64, 128)
    x, dy, branch = torch.randn(50, 128), torch.randn(50, 64), (*factors(64, 128, 8), 2.0, draw_seed(0.3), 0.3)
    _, s = lora.lora_linear_4bit(x, *weight, None, *branch, True)
    first, second = (lora.lora_linear_4bit_backward(dy, x, s, *weight, *branch, [True] * 3) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_what_adapters_do_not_serve_stays_out_of_their_factors():
    """Rows in blocks of one adapter each, so that programs skip the others; one that is NaN is nobody else's matter."""
    x, a = torch.randn(96, 64), torch.randn(120, 64)
    x[40, 3] = float("nan")
    owner, adapter = torch.arange(96).int() // 32 - 1, torch.arange(120).int() // 60
    s = low_rank.project(x, a, None, 0.0, low_rank.Gate(owner, adapter, torch.full((120,), 0.5)))
    mine = owner[:, None] == adapter[None, :]
    assert s[40, :60].isnan().all() and not s[~mine].any()
    rest = mine & (torch.arange(96) != 40)[:, None]
    torch.testing.assert_close(s[rest], (0.5 * x @ a.t())[rest])


@every_p
def test_what_other_rows_hold_stays_out_of_an_adapter_s_gradients(p):
    """Rows of adapters that share a program's factors, and of none, may be NaN or infinite."""
    n, k, ranks = 64, 128, (3, 20, 8)
    (_, weight), (a, b) = base("nf4", n, k), factors(n, k, sum(ranks))
    x, dy, branch = torch.randn(60, k), torch.randn(60, n), (a, b, 1.0, draw_seed(p), p)
    owner = torch.arange(60, dtype=torch.int32) % 4 - 1
    adapter = torch.repeat_interleave(torch.arange(3), torch.tensor(ranks)).int()
    gate = low_rank.Gate(owner, adapter, torch.ones(sum(ranks)))

    def results():
        y, s = lora.lora_linear_4bit(x, *weight, None, *branch, True, gate)
        return y, *lora.lora_linear_4bit_backward(dy, x, s, *weight, *branch, [True] * 3, gate)

    rows, mine = owner == 1, adapter == 1
    y, dx, da, db = results()
    x[owner == -1], dy[owner == -1] = float("nan"), float("inf")
    x[owner == 0], dy[owner == 0] = float("inf"), float("nan")
    x[owner == 2], dy[owner == 2] = float("nan"), 1.0
    y_now, dx_now, da_now, db_now = results()
    assert torch.equal(y_now[rows], y[rows]) and torch.equal(dx_now[rows], dx[rows])
    assert torch.equal(da_now[mine], da[mine]) and torch.equal(db_now[:, mine], db[:, mine])
    assert not da_now[~mine].isfinite().any() and not db_now[:, ~mine].isfinite().any()


@pytest.mark.parametrize("suffix", ["4bit", "int8"])
def test_gradients_of_float32_factors_are_float32_sums(suffix):
    (_, weight), (a, b) = base("int8" if suffix == "int8" else "nf4", 64, 128), factors(64, 128, 8)
    x, dy, s = (torch.randn(40, size).half() for size in (128, 64, 8))
    _, da, db = getattr(lora, f"lora_linear_{suffix}_backward")(dy, x, s, *weight, a, b, 2.0, None, 0.0, [True] * 3)
    assert da.dtype == db.dtype == torch.float32
    ds = (2 * dy.double() @ b.half().double()).half()
    assert_near(db, 2 * dy.double().t() @ s.double(), torch.float32)
    close = (da.double() - ds.double().t() @ x.double()).norm() / da.double().norm()
    assert close < 1e-4  # a few of ds are rounded the other way
