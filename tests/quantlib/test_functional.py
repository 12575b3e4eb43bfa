"""The public functions: gradients, autocast, torch.compile, what is saved for backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.autograd.graph import saved_tensors_hooks

import quantlib
from quantlib import functional, ops, reference

OUT, IN = 24, 96


def _weight(kind):
    w = torch.randn(OUT, IN)
    return quantlib.quantize_4bit(w, double_quant=True) if kind == "4bit" else quantlib.quantize_int8(w)


def _linear(kind):
    return quantlib.linear_4bit if kind == "4bit" else quantlib.linear_int8


kinds = pytest.mark.parametrize("kind", ["4bit", "int8"])
dtypes = pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES)


@kinds
@dtypes
def test_gradients_are_those_of_the_decoded_weight(kind, dtype):
    q = _weight(kind)
    x = torch.randn(3, 5, IN, dtype=dtype, requires_grad=True)
    bias = torch.randn(OUT, dtype=dtype, requires_grad=True)
    dy = torch.randn(3, 5, OUT, dtype=dtype)
    dx, db = torch.autograd.grad(_linear(kind)(x, q, bias), (x, bias), dy)

    exact_dx = dy.double() @ q.dequantize(torch.float32).double()
    plain_dx = dy @ q.dequantize(dtype)
    budget = 1.5 * (plain_dx.double() - exact_dx).abs().max() + torch.finfo(dtype).tiny
    assert (dx.double() - exact_dx).abs().max() <= budget
    plain_db = dy.reshape(-1, OUT).sum(0)
    torch.testing.assert_close(db, plain_db)


def test_gradcheck_of_the_references():
    """The oracles are differentiable in float64, and agree with the explicit dx."""
    weights = {"4bit": _weight("4bit").op_args(), "int8": (_weight("int8").values, _weight("int8").absmax)}
    x = torch.randn(3, IN, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(OUT, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, b: reference.linear_4bit(x, *weights["4bit"], OUT, b), (x, bias))
    dy = torch.randn(3, OUT, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda dy: reference.linear_4bit_dx(dy, *weights["4bit"], IN), dy)
    assert gradcheck(lambda dy: reference.linear_int8_dx(dy, *weights["int8"]), dy)
    (dx,) = torch.autograd.grad(reference.linear_4bit(x, *weights["4bit"], OUT, None), x, dy)
    torch.testing.assert_close(dx, reference.linear_4bit_dx(dy, *weights["4bit"], IN))


@kinds
def test_only_the_packed_weight_is_saved(kind):
    q = _weight(kind)
    own = {t.data_ptr() for t in vars(q).values() if isinstance(t, torch.Tensor)}
    saved = []
    with saved_tensors_hooks(lambda t: saved.append(t.data_ptr()) or t, lambda t: t):
        _linear(kind)(torch.randn(4, IN, requires_grad=True), q)
    assert saved and set(saved) <= own


@kinds
def test_a_gradient_that_nobody_asks_for_is_not_computed(kind, monkeypatch):
    q, x = _weight(kind), torch.randn(4, IN)
    bias = torch.randn(OUT, requires_grad=True)
    y = _linear(kind)(x, q, bias)
    monkeypatch.setattr(functional, "kernel", lambda *a: pytest.fail("dx was computed"))
    y.sum().backward()
    assert bias.grad is not None


@kinds
def test_double_backward_is_refused(kind):
    x = torch.randn(4, IN, requires_grad=True)
    (dx,) = torch.autograd.grad(_linear(kind)(x, _weight(kind)).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable|twice"):
        dx.sum().backward()


@kinds
def test_autocast_computes_and_returns_the_autocast_dtype(kind):
    q, bias = _weight(kind), torch.randn(OUT, requires_grad=True)
    x = torch.randn(4, IN, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = _linear(kind)(x, q, bias)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, _linear(kind)(x.bfloat16(), q, bias.bfloat16()))
    y.sum().backward()
    assert x.grad.dtype == bias.grad.dtype == torch.float32


@kinds
@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_without_graph_breaks(kind, dynamic):
    q = _weight(kind)
    compiled = torch.compile(lambda x: _linear(kind)(x, q), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 4, 7):
        x = torch.randn(rows, IN, requires_grad=True)
        y = compiled(x)
        assert torch.equal(y, _linear(kind)(x, q))
        (dx,) = torch.autograd.grad(y.sum(), x)
        torch.testing.assert_close(dx, torch.ones(rows, OUT) @ q.dequantize())


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["4bit", "int8"]),
    lead=st.lists(st.integers(0, 4), max_size=3),
    dtype=st.sampled_from(ops.FLOAT_DTYPES),
    layout=st.sampled_from(["contiguous", "transposed", "strided", "expanded"]),
)
def test_any_leading_dimensions_and_strides(kind, lead, dtype, layout):
    q = _weight(kind)
    if layout == "contiguous":
        x = torch.randn(*lead, IN, dtype=dtype)
    elif layout == "transposed":
        x = torch.randn(IN, *lead, dtype=dtype).movedim(0, -1)
    elif layout == "strided":
        x = torch.randn(*lead, 2 * IN, dtype=dtype)[..., ::2]
    else:
        x = torch.randn(IN, dtype=dtype).expand(*lead, IN)
    x.requires_grad_()
    y = _linear(kind)(x, q)
    assert y.shape == (*lead, OUT) and y.dtype == dtype
    assert torch.equal(y, _linear(kind)(x.detach().contiguous(), q))
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_matmul_takes_every_kind_of_weight():
    x, dy = torch.randn(4, IN), torch.randn(4, OUT)
    dense = torch.randn(OUT, IN)
    for weight in (dense, _weight("4bit"), _weight("int8")):
        decoded = weight if isinstance(weight, torch.Tensor) else weight.dequantize()
        torch.testing.assert_close(functional.matmul(x, weight), x @ decoded.t(), rtol=0.05, atol=0.2)
        torch.testing.assert_close(functional.matmul_dx(dy, weight), dy @ decoded)


def test_quantizing_records_no_gradient():
    w = torch.randn(OUT, IN, requires_grad=True)
    assert not quantlib.quantize_4bit(w).absmax.requires_grad
    assert not quantlib.quantize_int8(w).absmax.requires_grad


@pytest.mark.parametrize("storage", [torch.uint8, *ops.FLOAT_DTYPES])
def test_storage_dtype_holds_the_same_bytes(storage):
    w = torch.randn(OUT, IN)
    plain, stored = quantlib.quantize_4bit(w), quantlib.quantize_4bit(w, quant_storage=storage)
    assert stored.packed.dtype == storage
    assert torch.equal(stored.packed.view(-1).view(torch.uint8), plain.packed.view(-1))
    assert torch.equal(stored.dequantize(), plain.dequantize())


def test_errors_of_the_public_functions():
    q4, q8, x = _weight("4bit"), _weight("int8"), torch.randn(4, IN)
    with pytest.raises(ValueError, match="linear_4bit: x has shape .*in_features = 96"):
        quantlib.linear_4bit(x[:, 1:], q4)
    with pytest.raises(ValueError, match="linear_4bit: the weight has shape .*expected"):
        quantlib.linear_4bit(x, quantlib.quantize_4bit(torch.randn(64)))
    with pytest.raises(ValueError, match="linear_int8: the weight is quantized with dim=0; expected dim=-1"):
        quantlib.linear_int8(x, quantlib.quantize_int8(torch.randn(OUT, IN), dim=0))
    with pytest.raises(ValueError, match="3 packed bytes do not fill quant_storage torch.bfloat16"):
        quantlib.quantize_4bit(torch.randn(5), quant_storage=torch.bfloat16)
    with pytest.raises(TypeError, match="x is torch.float64"):
        quantlib.linear_int8(x.double(), q8)
    for backend, error in (("auto", RuntimeError), ("reference", IndexError)):
        for index in (OUT, -1):
            with quantlib.use_backend(backend), pytest.raises(error, match="index"):
                quantlib.embedding_4bit(torch.tensor([index]), q4)
