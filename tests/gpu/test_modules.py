"""Layers and LoRA on the GPU: values, gradients, checkpoints, autocast, torch.compile, CUDA graphs."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import quantlib
from lora_ops import lora_linear
from lora_ops import reference as lora_reference
from quantlib import reference

from . import harness
from .harness import DEVICE, assert_error_within, assert_same

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("either_backend")]

LAYERS = {"nf4": quantlib.Linear4bit, "int8": quantlib.Linear8bit}
every_layer = pytest.mark.parametrize("kind", LAYERS)
sixteen_bit = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def layer(kind, inner=256, out=96, dtype=torch.bfloat16):
    """A quantized layer with a bias, on the device."""
    return LAYERS[kind].from_linear(nn.Linear(inner, out).to(DEVICE, dtype))


def activations(*shape, dtype=torch.bfloat16, grad=True):
    return torch.randn(shape).to(DEVICE, dtype).requires_grad_(grad)


@every_layer
@sixteen_bit
def test_forward_and_backward(kind, dtype):
    linear, x = layer(kind, dtype=dtype), activations(3, 7, 256, dtype=dtype)
    y = linear(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    w = linear.dequantize(torch.float32)
    plain, bias = w.to(dtype), linear.bias.detach()
    assert y.shape == (3, 7, 96) and y.device.type == DEVICE.type
    exact = F.linear(x.detach().double(), w.double(), bias.double())
    if kind == "nf4":  # int8 rounds x as well, so its budget is another: see test_kernels.py
        assert_error_within(y, F.linear(x.detach(), plain, bias), exact)
    else:
        assert (y.double() - exact).norm() < 0.02 * exact.norm()
    assert_error_within(x.grad, dy @ plain, dy.double() @ w.double(), factor=1.5)
    assert_error_within(linear.bias.grad, dy.sum((0, 1)), dy.double().sum((0, 1)), factor=1.5)


@every_layer
def test_quantizing_here_or_on_the_cpu_is_the_same(kind):
    linear = nn.Linear(130, 96).half()
    options = {"double_quant": False} if kind == "nf4" else {}  # the mean of the scales depends on the order of a sum
    with quantlib.use_backend("auto"):
        there = LAYERS[kind].from_linear(linear, **options)
    here = LAYERS[kind].from_linear(linear.to(DEVICE), **options)
    theirs = there.state_dict()
    for key, value in here.state_dict().items():
        assert_same(value, theirs[key])


@every_layer
def test_checkpoints_move_between_devices(kind):
    source = layer(kind)
    target = LAYERS[kind](256, 96, device=DEVICE).bfloat16()
    target.load_state_dict({key: value.cpu() for key, value in source.state_dict().items()})
    assert target.weight.device.type == DEVICE.type
    x = activations(5, 256, grad=False)
    assert_same(target(x), source(x))


def test_embedding():
    table = quantlib.Embedding4bit.from_embedding(nn.Embedding(50, 130).to(DEVICE, torch.bfloat16))
    indices = torch.tensor([[0, 49], [7, 7]], device=DEVICE)
    assert_same(table(indices), F.embedding(indices, table.dequantize()))


@every_layer
def test_autocast(kind):
    linear, x = layer(kind, dtype=torch.float32), activations(5, 256, dtype=torch.float32)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        y = linear(x)
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and x.grad.isfinite().all()


@every_layer
def test_compiles_without_a_graph_break(kind):
    linear = layer(kind)
    compiled = torch.compile(linear, fullgraph=True)
    x = activations(5, 256)
    x_compiled = x.detach().clone().requires_grad_()
    y, y_compiled = linear(x), compiled(x_compiled)
    assert_same(y_compiled.detach(), y.detach())
    for value in (y, y_compiled):
        value.float().square().sum().backward()
    torch.testing.assert_close(x_compiled.grad, x.grad, rtol=0.02, atol=1e-3)


def lora_inputs(kind, dtype, rank=8):
    base = layer(kind, dtype=dtype).quantized if kind in LAYERS else activations(96, 256, dtype=dtype, grad=False)
    A, B = activations(rank, 256, dtype=dtype), activations(96, rank, dtype=dtype)
    with torch.no_grad():
        A.mul_(256**-0.5)
        B.mul_(rank**-0.5)
    return activations(40, 256, dtype=dtype), base, A, B, activations(96, dtype=dtype)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
@pytest.mark.parametrize("kind", ["dense", *LAYERS])
@sixteen_bit
def test_lora_linear(kind, dropout_p, dtype):
    x, base, A, B, bias = lora_inputs(kind, dtype)
    keep = None
    if dropout_p:
        torch.manual_seed(1)
        seed = torch.randint(2**63 - 1, (1,), device=DEVICE)
        keep = reference.dropout(torch.ones_like(x, dtype=torch.float64), seed, dropout_p) != 0
        torch.manual_seed(1)  # it draws the same seed
    y = lora_linear(x, base, A, B, 2.0, bias, dropout_p)
    dy = torch.randn_like(y)
    y.backward(dy)

    weight = (base if isinstance(base, torch.Tensor) else base.dequantize(torch.float32)).double()
    x64, A64, B64, bias64 = (t.detach().double() for t in (x, A, B, bias))
    exact = lora_reference.lora_linear(x64, weight, A64, B64, 2.0, bias64, keep, dropout_p)
    # A product of two roundings in 16 bit; int8 also rounds x.
    tolerance = 0.03 if kind == "int8" else 4 * torch.finfo(dtype).eps
    assert (y.double() - exact).norm() <= tolerance * exact.norm()
    expected = lora_reference.lora_linear_backward(dy.double(), x64, weight, A64, B64, 2.0, keep, dropout_p)
    for name, ours, value in zip(("x", "A", "B", "bias"), (x, A, B, bias), expected, strict=True):
        error = (ours.grad.double() - value).norm() / value.norm()
        assert error <= 4 * torch.finfo(dtype).eps, name


@every_layer
def test_lora_does_not_make_the_host_wait(kind):
    x, base, A, B, bias = lora_inputs(kind, torch.bfloat16)

    def step():
        lora_linear(x, base, A, B, 2.0, bias, 0.1).float().square().mean().backward()

    step()
    with harness.no_synchronization():
        step()


@every_layer
def test_layer_in_a_cuda_graph(kind):
    linear, x = layer(kind), activations(5, 256, grad=False)
    with torch.no_grad():
        replay, result = harness.captured(lambda: linear(x))
        for _ in range(2):
            x.copy_(torch.randn_like(x))
            replay()
            assert_same(result(), linear(x))
