"""`lora_linear` against the float64 oracle: values, gradients, errors, and what autograd is made to hold."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from lora_ops import lora_linear, reference
from quantlib import dequantize_4bit, dequantize_int8, quantize_4bit, quantize_int8, use_backend
from quantlib import reference as quant_reference

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
BASES = ("dense", "nf4", "nf4-double", "fp4", "int8")


def make_base(kind, weight):
    """A base for lora_linear from a float weight, and the dense weight that it stands for, in float64."""
    if kind == "dense":
        return weight, weight.double()
    if kind == "int8":
        q = quantize_int8(weight)
        return q, dequantize_int8(q, torch.float32).double()
    q = quantize_4bit(weight, kind[:3], double_quant=kind.endswith("double"))
    return q, dequantize_4bit(q, torch.float32).double()


def make_inputs(kind="dense", lead=(17,), out=24, inner=32, rank=4, dtype=torch.float32, lora_dtype=None, seed=0):
    """(x, base, A, B, bias, dense) where every tensor but base is a leaf that requires grad."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape, dtype, scale=1.0):
        return (scale * torch.randn(shape, generator=generator)).to(dtype)

    base, dense = make_base(kind, draw(out, inner, dtype=dtype, scale=inner**-0.5))
    x = draw(*lead, inner, dtype=dtype).requires_grad_()
    A = draw(rank, inner, dtype=lora_dtype or dtype, scale=inner**-0.5).requires_grad_()
    B = draw(out, rank, dtype=lora_dtype or dtype, scale=rank**-0.5).requires_grad_()
    return x, base, A, B, draw(out, dtype=dtype).requires_grad_(), dense


def mask_of_next_call(x, p):
    """The mask that the next `lora_linear(x, ...)` draws; torch's generator is left as it was."""
    state = torch.get_rng_state()
    seed = torch.randint(2**63 - 1, (1,))
    torch.set_rng_state(state)
    return quant_reference.dropout(torch.ones(x.shape, dtype=torch.float64), seed, p) != 0


def error(actual, expected):
    return (actual.double() - expected).norm().item()


def seeded(function):
    """With dropout, gradcheck must see the same mask on every call."""

    def call(*args):
        torch.manual_seed(3)
        return function(*args)

    return call


@pytest.mark.parametrize("dropout_p", [0.0, 0.4])
def test_gradcheck(dropout_p):
    x, base, A, B, bias, _ = make_inputs(lead=(2, 3), out=5, inner=6, rank=2, dtype=torch.float64)
    check = seeded(lambda x, A, B, bias: lora_linear(x, base, A, B, 1.7, bias, dropout_p))
    assert torch.autograd.gradcheck(check, (x, A, B, bias))


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_without_gradients_the_result_is_the_same(kind, dropout_p):
    x, base, A, B, bias, _ = make_inputs(kind)

    def run(*tensors):
        torch.manual_seed(5)
        x, A, B, bias = tensors
        return lora_linear(x, base, A, B, 1.7, bias, dropout_p)

    y = run(x, A, B, bias)
    with torch.no_grad():
        switched_off = run(x, A, B, bias)
    frozen = run(*(t.detach() for t in (x, A, B, bias)))
    assert y.requires_grad and not switched_off.requires_grad and not frozen.requires_grad
    assert torch.equal(switched_off, y) and torch.equal(frozen, y)


# Kernels of this CPU, and plain PyTorch.
@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("kind", BASES)
def test_values_and_gradients(kind, dropout_p, backend):
    x, base, A, B, bias, dense = make_inputs(kind)
    keep = mask_of_next_call(x, dropout_p) if dropout_p else None
    with use_backend(backend):
        y = lora_linear(x, base, A, B, 2.0, bias, dropout_p, threshold=0.0)
        dy = torch.randn_like(y)
        grads = torch.autograd.grad(y, (x, A, B, bias), dy)
    wide = [t.detach().double() for t in (x, A, B, bias)]
    expected = reference.lora_linear(wide[0], dense, wide[1], wide[2], 2.0, wide[3], keep, dropout_p)
    # int8 also rounds x: to 1/254 of the largest element of a row
    tolerance = 2e-2 if kind == "int8" else 1e-5
    assert error(y, expected) <= tolerance * expected.norm()
    expected = reference.lora_linear_backward(dy.double(), wide[0], dense, wide[1], wide[2], 2.0, keep, dropout_p)
    for got, want in zip(grads, expected, strict=True):
        assert error(got, want) <= 1e-5 * want.norm()


def plain(x, weight, A, B, scaling, bias):
    """The composition that PEFT runs, in one dtype throughout."""
    linear = torch.nn.functional.linear
    return linear(x, weight, bias) + linear(linear(x, A), B) * scaling


@pytest.mark.parametrize("dtype, lora_dtype", [*((d, d) for d in DTYPES), *((d, torch.float32) for d in DTYPES[1:])])
@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("rows", [1, 8, 300])
def test_error_is_within_that_of_plain_pytorch(rows, kind, dtype, lora_dtype):
    """With float32 adapters on 16-bit activations, plain PyTorch means autocast."""
    ours, theirs = [0.0] * 5, [0.0] * 5
    for seed in range(2 if rows > 8 else 8):
        x, base, A, B, bias, dense = make_inputs(kind, (rows,), 160, 192, 8, dtype, lora_dtype, seed=seed)
        # the base as plain PyTorch would hold it, rounded to dtype; the oracle takes the same weight
        weight = dense.to(dtype)
        if kind != "dense":
            dense = weight.double()
        wide = [t.detach().double() for t in (x, A, B, bias)]
        y = lora_linear(x, base, A, B, 1.5, bias)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
        grads = torch.autograd.grad(y, (x, A, B, bias), dy)
        with torch.autocast("cpu", dtype, enabled=dtype != lora_dtype):
            y_plain = plain(x, weight, A, B, 1.5, bias)
        grads_plain = torch.autograd.grad(y_plain, (x, A, B, bias), dy)
        exact = (
            reference.lora_linear(wide[0], dense, wide[1], wide[2], 1.5, wide[3]),
            *reference.lora_linear_backward(dy.double(), wide[0], dense, wide[1], wide[2], 1.5),
        )
        for i, (got, other, want) in enumerate(zip((y, *grads), (y_plain, *grads_plain), exact, strict=True)):
            ours[i] += error(got, want)
            theirs[i] += error(other, want)
    # the bias gradient is one sum, the same in both
    slack = 1.02 if dtype != torch.float32 else 1.1  # float32 error is the GEMM's order of summation
    assert ours[0] <= slack * theirs[0], ("y", ours[0] / theirs[0])
    for name, own, other in zip(("x", "A", "B", "bias"), ours[1:], theirs[1:], strict=True):
        assert own <= 1.5 * other, (name, own / other)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lora_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", BASES)
def test_every_mix_of_dtypes(kind, dtype, lora_dtype, autocast):
    x, base, A, B, bias, dense = make_inputs(kind, dtype=dtype, lora_dtype=lora_dtype)
    with torch.autocast("cpu", autocast, enabled=autocast is not None):
        y = lora_linear(x, base, A, B, 2.0, bias, threshold=0.0)
    assert y.dtype == (autocast or dtype)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, (x, A, B, bias), dy)
    wide = [t.detach().double() for t in (x, A, B, bias)]
    expected = (
        reference.lora_linear(wide[0], dense, wide[1], wide[2], 2.0, wide[3]),
        *reference.lora_linear_backward(dy.double(), wide[0], dense, wide[1], wide[2], 2.0),
    )
    assert [g.dtype for g in grads] == [dtype, lora_dtype, lora_dtype, dtype]
    coarsest = max((dtype, lora_dtype, y.dtype), key=lambda d: torch.finfo(d).eps)
    tolerance = max(2 * torch.finfo(coarsest).eps, 1e-5) + (2e-2 if kind == "int8" else 0)
    for got, want in zip((y, *grads), expected, strict=True):
        assert error(got, want) <= tolerance * want.norm()


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_shape_and_stride(data):
    def dim(low, high):
        return data.draw(st.integers(low, high))

    lead = data.draw(st.lists(st.integers(0, 4), max_size=3))
    inner, out, rank = dim(1, 40), dim(1, 40), dim(1, 5)
    kind = data.draw(st.sampled_from(BASES))
    dropout_p = data.draw(st.sampled_from([0.0, 0.5]))
    x, base, A, B, bias, dense = make_inputs(kind, lead, out, inner, rank)
    if data.draw(st.booleans()):  # the same values, in a transposed and padded buffer
        x = torch.stack([x.detach().movedim(-1, 0)] * 2, 0)[1].movedim(0, -1).requires_grad_()
    if data.draw(st.booleans()):
        bias = None
    keep = mask_of_next_call(x, dropout_p) if dropout_p else None
    y = lora_linear(x, base, A, B, 0.5, bias, dropout_p, threshold=0.0)
    dx, dA, dB = torch.autograd.grad(y.sum(), (x, A, B))
    wide = [t.detach().double() for t in (x, A, B)]
    wide_bias = None if bias is None else bias.detach().double()
    expected = reference.lora_linear(wide[0], dense, wide[1], wide[2], 0.5, wide_bias, keep, dropout_p)
    assert y.shape == (*lead, out)
    assert error(y, expected) <= (3e-2 if kind == "int8" else 1e-5) * (expected.norm() + 1)
    dy = torch.ones(y.shape, dtype=torch.float64)
    expected = reference.lora_linear_backward(dy, wide[0], dense, wide[1], wide[2], 0.5, keep, dropout_p)
    for got, want in zip((dx, dA, dB), expected, strict=False):
        assert got.shape == want.shape
        assert error(got, want) <= 1e-5 * (want.norm() + 1)


def test_checkpointing_replays_the_mask():
    x, base, A, B, bias, _ = make_inputs("nf4")

    def run(function):
        torch.manual_seed(5)
        y = function(lambda *args: lora_linear(*args, dropout_p=0.5), x, base, A, B, 2.0, bias)
        torch.randn(3)  # the generator moves on between forward and backward
        return y, *torch.autograd.grad(y.square().sum(), (x, A, B, bias))

    direct = run(lambda f, *args: f(*args))
    replayed = run(lambda f, *args: checkpoint(f, *args, use_reentrant=False, preserve_rng_state=True))
    for a, b in zip(direct, replayed, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_gradients_that_nobody_needs_are_not_computed(kind):
    x, base, A, B, bias, _ = make_inputs(kind)
    everything = torch.autograd.grad(lora_linear(x, base, A, B, 2.0, bias).sum(), (x, A, B))
    for i in range(3):
        tensors = [t.detach().requires_grad_(i == j) for j, t in enumerate((x, A, B))]
        with use_backend("reference"):
            y = lora_linear(tensors[0], base, *tensors[1:], 2.0, bias.detach())
            (grad,) = torch.autograd.grad(y.sum(), tensors[i])
        torch.testing.assert_close(grad, everything[i], rtol=1e-4, atol=1e-4)


def test_a_backend_that_changes_between_the_passes_still_serves():
    x, base, A, B, bias, _ = make_inputs("nf4")
    expected = torch.autograd.grad(lora_linear(x, base, A, B, 2.0, bias).sum(), (x, A, B, bias))
    for before, after in (("auto", "reference"), ("reference", "auto")):
        with use_backend(before):
            y = lora_linear(x, base, A, B, 2.0, bias)
        with use_backend(after):
            grads = torch.autograd.grad(y.sum(), (x, A, B, bias))
        for grad, other in zip(grads, expected, strict=True):
            torch.testing.assert_close(grad, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", BASES)
def test_compiles_where_nothing_needs_a_gradient(kind):
    x, base, A, B, bias, _ = make_inputs(kind)
    compiled = torch.compile(lambda x: lora_linear(x, base, A, B, 2.0, bias), fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), lora_linear(x, base, A, B, 2.0, bias))


def test_two_calls_draw_two_masks():
    x, base, A, B, _, _ = make_inputs("nf4")
    with torch.no_grad():
        first, second = (lora_linear(x, base, A, B, 2.0, dropout_p=0.5) for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("kind", BASES)
def test_saves_the_inputs_and_nothing_else(kind):
    x, base, A, B, bias, _ = make_inputs(kind, lead=(50,), dtype=torch.bfloat16, lora_dtype=torch.float32)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = lora_linear(x, base, A, B, 2.0, bias, dropout_p=0.1)
    if kind == "dense":
        weight = {base.data_ptr()}
    else:
        weight = {t.data_ptr() for t in vars(base).values() if isinstance(t, torch.Tensor)}
    seed = [t for t in saved if t.dtype == torch.int64]
    assert [tuple(t.shape) for t in seed] == [(1,)]
    inputs = weight | {t.data_ptr() for t in (x, A, B, seed[0])}
    assert inputs <= {t.data_ptr() for t in saved}
    more = [tuple(t.shape) for t in saved if t.data_ptr() not in inputs]
    assert more == ([] if kind == "dense" else [(50, A.shape[0])])  # S
    y.sum().backward()


def test_inputs_are_left_as_they_were():
    x, base, A, B, bias, _ = make_inputs("nf4")
    before = [t.clone() for t in (x, A, B, bias, base.packed, base.absmax)]
    y = lora_linear(x, base, A, B, 2.0, bias, dropout_p=0.2)
    dy = torch.randn_like(y)
    dy_before = dy.clone()
    y.backward(dy)
    for t, old in zip((x, A, B, bias, base.packed, base.absmax, dy), (*before, dy_before), strict=True):
        assert torch.equal(t, old)


def test_the_result_may_be_modified_in_place():
    x, base, A, B, bias, _ = make_inputs("nf4", lead=(2, 5))
    y = lora_linear(x, base, A, B, 2.0, bias)
    expected = torch.autograd.grad(3 * y.sum(), (x, A, B), retain_graph=True)
    y.mul_(3)
    for got, want in zip(torch.autograd.grad(y.sum(), (x, A, B)), expected, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("kind", ["dense", "nf4"])
@pytest.mark.parametrize("wanted", ["x", "A", "B", "bias"])
def test_computes_only_the_gradients_asked_for(wanted, kind, monkeypatch):
    from lora_ops import functional

    calls = []
    monkeypatch.setattr(functional, "matmul_dx", lambda *a: calls.append(a) or torch.zeros(17, 32))
    whole = functional._whole

    def watched(x, tensors, suffix=""):
        kernel = whole(x, tensors, suffix)
        return kernel and (lambda *args: (calls.append(args) if suffix and args[-1][0] else None, kernel(*args))[1])

    monkeypatch.setattr(functional, "_whole", watched)
    leaves = dict(zip(["x", "base", "A", "B", "bias", "dense"], make_inputs(kind), strict=True))
    for name in ("x", "A", "B", "bias"):
        leaves[name].requires_grad_(name == wanted)
    y = lora_linear(leaves["x"], leaves["base"], leaves["A"], leaves["B"], 2.0, leaves["bias"], 0.1)
    y.sum().backward()
    assert bool(calls) == (wanted == "x")
    assert [name for name in ("x", "A", "B", "bias") if leaves[name].grad is not None] == [wanted]


def test_no_second_derivative():
    x, base, A, B, _, _ = make_inputs("dense")
    (dx,) = torch.autograd.grad(lora_linear(x, base, A, B, 2.0).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_non_finite_inputs_reach_the_places_they_reach_in_plain_pytorch():
    x, base, A, B, bias, dense = make_inputs("nf4", lead=(6,))
    with torch.no_grad():
        x[1, 3], x[4, 0] = math.nan, math.inf
        y = lora_linear(x, base, A, B, 2.0, bias)
        expected = plain(x, dense.float(), A, B, 2.0, bias)
    assert torch.equal(y.isnan(), expected.isnan())
    assert torch.equal(y.isinf(), expected.isinf())


def test_bitwise_reproducible():
    def run():
        x, base, A, B, bias, _ = make_inputs("nf4", lead=(64,), dtype=torch.bfloat16)
        torch.manual_seed(1)
        y = lora_linear(x, base, A, B, 2.0, bias, dropout_p=0.1)
        return y, *torch.autograd.grad(y.sum(), (x, A, B, bias))

    for a, b in zip(run(), run(), strict=True):
        assert torch.equal(a, b)


def test_autocast_around_the_backward_pass_changes_nothing():
    x, base, A, B, bias, _ = make_inputs("nf4")
    y = lora_linear(x, base, A, B, 2.0, bias)
    expected = torch.autograd.grad(y.sum(), (x, A, B), retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        actual = torch.autograd.grad(y.sum(), (x, A, B))
    for got, want in zip(actual, expected, strict=True):
        assert torch.equal(got, want)


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
@pytest.mark.parametrize("kind", ["dense", "nf4-double", "int8"])
def test_compiles_without_graph_breaks(kind, dropout_p):
    x, base, A, B, bias, _ = make_inputs(kind, lead=(2, 9))

    def function(x, A, B, bias):
        return lora_linear(x, base, A, B, 2.0, bias, dropout_p) * 2

    torch._dynamo.reset()
    results = []
    for call in (function, torch.compile(function, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        y = call(x, A, B, bias)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, A, B, bias))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, exception, message",
    [
        ({"x": torch.zeros(())}, ValueError, r"x has shape \(\).*must be 32"),
        ({"x": torch.zeros(3, 31)}, ValueError, r"x has shape \(3, 31\) and base \(24, 32\)"),
        ({"x": torch.zeros(3, 32, dtype=torch.int64)}, TypeError, "x is torch.int64"),
        ({"x": torch.zeros(3, 32, dtype=torch.bfloat16)}, TypeError, "base is torch.float32 and x is torch.bfloat16"),
        ({"x": torch.zeros(3, 32, device="meta")}, ValueError, "x is on meta and base on cpu"),
        ({"base": [1, 2]}, TypeError, "base is a list; pass a Tensor, a Quantized4bit or a QuantizedInt8"),
        ({"base": torch.zeros(32)}, ValueError, r"base has shape \(32,\)"),
        ({"base": torch.zeros(24, 32, requires_grad=True)}, ValueError, r"pass base.detach\(\)"),
        ({"A": torch.zeros(4, 31)}, ValueError, r"A has shape \(4, 31\); expected \[rank, 32\]"),
        ({"A": torch.zeros(0, 32)}, ValueError, "rank >= 1"),
        ({"B": torch.zeros(24, 5)}, ValueError, r"B has shape \(24, 5\).*must be \[24, 4\]"),
        ({"bias": torch.zeros(23)}, ValueError, r"bias has shape \(23,\); expected \[24\]"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p is 1.0; it must be in \[0, 1\)"),
        ({"dropout_p": -0.1}, ValueError, "dropout_p is -0.1"),
    ],
)
def test_bad_arguments_are_named(change, exception, message):
    x, base, A, B, bias, _ = make_inputs()
    arguments = {"x": x, "base": base, "A": A, "B": B, "scaling": 2.0, "bias": bias} | change
    with pytest.raises(exception, match="lora_ops.lora_linear: .*" + message):
        lora_linear(**arguments)


def test_float64_needs_a_float64_base():
    x, base, A, B, _, _ = make_inputs("nf4")
    with pytest.raises(TypeError, match=r"float64; float32, float16 and bfloat16 are supported"):
        lora_linear(x.double(), base, A, B, 2.0)
