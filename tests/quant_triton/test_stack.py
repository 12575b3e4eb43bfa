"""The whole module stack through the Triton kernels, on CPU tensors: layers, LoRA, a PEFT model, a training step."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import lora_ops
import quantlib
from lora_ops import reference as lora_reference
from quantlib import backends, ops

peft = pytest.importorskip("peft", reason="the training step needs peft")
transformers = pytest.importorskip("transformers", reason="the training step needs transformers")

import lora_ops.peft  # noqa: E402

LAYERS = {4: quantlib.Linear4bit, 8: quantlib.Linear8bit}
every_kind = pytest.mark.parametrize("bits", LAYERS)


@pytest.fixture
def calls(monkeypatch):
    """The ops that Triton served, in order; whatever asks for a kernel is given Triton's."""
    served = []
    triton = next(backend for backend in backends.BACKENDS if backend.name == "triton")

    def noted(op):
        kernel = triton.kernel(op)

        def call(*args):
            served.append(op)
            return kernel(*args)

        return call

    with quantlib.use_backend("triton"):
        monkeypatch.setattr(backends._choice, "backend", replace(triton, kernel=noted))
        yield served


def test_triton_has_every_op():
    triton = next(backend for backend in backends.BACKENDS if backend.name == "triton")
    assert set(triton.ops) == set(ops.SCHEMAS)
    for op in ops.SCHEMAS:
        with quantlib.use_backend("triton"):
            assert quantlib.explain(op).chosen == "triton"
        assert quantlib.explain(op).verdicts["triton"].startswith("only on request: it is interpreted")


@every_kind
def test_a_layer(bits, calls):
    plain = nn.Linear(96, 40)
    layer = LAYERS[bits].from_linear(plain)
    x = torch.randn(3, 5, 96, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    weight = layer.dequantize(torch.float32)
    torch.testing.assert_close(
        y, F.linear(x, weight, layer.bias), rtol=0.05 if bits == 8 else 1e-4, atol=0.05 if bits == 8 else 1e-4
    )
    torch.testing.assert_close(x.grad, 2 * y.detach() @ weight, rtol=1e-4, atol=1e-4)
    form = {4: ["quantize_4bit", "linear_4bit", "linear_4bit_dx", "dequantize_4bit"]}
    form[8] = ["quantize_int8", "linear_int8", "linear_int8_dx", "dequantize_int8"]
    assert sorted({*calls}) == sorted(form[bits])


def test_an_embedding(calls):
    table = quantlib.Embedding4bit.from_embedding(nn.Embedding(30, 64))
    indices = torch.tensor([[0, 29], [7, 7]])
    assert torch.equal(table(indices), F.embedding(indices, table.dequantize()))
    assert "embedding_4bit" in calls


@pytest.mark.parametrize("p", [0.0, 0.25])
@every_kind
def test_lora(bits, p, calls):
    layer = LAYERS[bits].from_linear(nn.Linear(64, 48))
    adapted = lora_ops.LoraLinear(layer, rank=4, dropout=p)
    with torch.no_grad():
        adapted.lora_B.normal_()
    x = torch.randn(7, 64, requires_grad=True)
    torch.manual_seed(1)
    y = adapted(x)
    dy = torch.randn_like(y)
    y.backward(dy)
    keep = None
    if p:
        torch.manual_seed(1)
        seed = torch.randint(2**63 - 1, (1,))
        keep = quantlib.reference.dropout(torch.ones_like(x), seed, p) != 0
    weight = layer.dequantize(torch.float32)
    arguments = (weight, adapted.lora_A.detach(), adapted.lora_B.detach(), adapted.scaling)
    tolerance = {"rtol": 0.05, "atol": 0.1} if bits == 8 else {"rtol": 1e-4, "atol": 1e-4}
    expected = lora_reference.lora_linear(x.detach(), *arguments, layer.bias.detach(), keep, p)
    torch.testing.assert_close(y.detach(), expected, **tolerance)
    expected = lora_reference.lora_linear_backward(dy, x.detach(), *arguments, keep, p)
    for got, want in zip((x.grad, adapted.lora_A.grad, adapted.lora_B.grad), expected, strict=False):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    name = "lora_linear_4bit" if bits == 4 else "lora_linear_int8"
    # One op forward and one backward; the quantized layer's own ops are not called.
    assert [op for op in calls if "quantize" not in op] == [name, f"{name}_backward"]


@every_kind
def test_training_a_peft_model(bits, calls, monkeypatch):
    model = lora_ops.peft.peft_model
    monkeypatch.setattr(model, "dispatch_default", model.dispatch_default)
    lora_ops.register_peft()
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=40,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    quantlib.quantize_model(model, bits, progress=False)
    options = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1, task_type="CAUSAL_LM")
    model = lora_ops.prepare_for_training(peft.get_peft_model(model, options)).train()
    adapters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=3e-2)
    tokens = torch.arange(24).view(2, 12)
    losses = []
    for _ in range(4):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert all(parameter.grad is not None and parameter.grad.isfinite().all() for parameter in adapters)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    name = "lora_linear_4bit" if bits == 4 else "lora_linear_int8"
    # Seven layers, twice forward since activations are checkpointed.
    assert calls.count(name) == 4 * 7 * 2 and calls.count(f"{name}_backward") == 4 * 7


@every_kind
def test_a_layer_under_autocast(bits, calls):
    layer = LAYERS[bits].from_linear(nn.Linear(64, 40))
    x = torch.randn(5, 64, requires_grad=True)
    with torch.autocast("cpu", torch.float16):
        y = layer(x)
    assert y.dtype == torch.float16
    y.float().sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantize(torch.float32).sum(0).expand(5, 64), rtol=0.02, atol=0.02)


@every_kind
def test_torch_compile_sees_one_op(bits):
    with quantlib.use_backend("triton"):
        layer = lora_ops.LoraLinear(LAYERS[bits].from_linear(nn.Linear(64, 40)), rank=4)
        with torch.no_grad():
            layer.lora_B.normal_()
        graphs = []

        def keep(graph, inputs):
            graphs.append(graph)
            return graph.forward

        x = torch.randn(5, 64)
        compiled = torch.compile(layer, fullgraph=True, backend=keep)
        with torch.no_grad():
            assert torch.equal(compiled(x), layer(x))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    name = "lora_linear_4bit" if bits == 4 else "lora_linear_int8"
    assert sum("quantlib_triton" in target for target in targets) == 1
    assert any(f"quantlib_triton.{name}" in target for target in targets), targets
