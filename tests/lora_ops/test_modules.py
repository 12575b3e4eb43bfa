"""LoraLinear and prepare_for_training, without PEFT."""

import subprocess
import sys

import pytest
import torch
from torch import nn

from lora_ops import LoraLinear, prepare_for_training
from quantlib import Linear4bit, Linear8bit


def make_base(kind, bias=True):
    linear = nn.Linear(96, 40, bias=bias)
    if kind == "dense":
        return linear
    return (Linear4bit if kind == "4bit" else Linear8bit).from_linear(linear)


@pytest.mark.parametrize("kind", ["dense", "4bit", "8bit"])
def test_starts_as_the_base_layer_and_trains_only_the_branch(kind):
    base = make_base(kind)
    layer = LoraLinear(base, rank=4, alpha=8, dropout=0.1)
    x = torch.randn(3, 5, 96)
    torch.testing.assert_close(layer(x), base(x))
    assert sorted(name for name, p in layer.named_parameters() if p.requires_grad) == ["lora_A", "lora_B"]
    optimizer = torch.optim.Adam([p for p in layer.parameters() if p.requires_grad], lr=1e-2)
    target = base(x).detach() + 0.1 * x @ torch.randn(96, 2) @ torch.randn(2, 40)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (layer(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("kind", ["dense", "4bit", "8bit"])
def test_merge_returns_the_base_layer_with_the_branch_added(kind):
    base = make_base(kind)
    layer = LoraLinear(base, rank=4, alpha=8)
    nn.init.normal_(layer.lora_B)
    before = base.weight.detach().clone() if kind == "dense" else base.dequantize()
    expected = before + 2.0 * layer.lora_B @ layer.lora_A
    merged = layer.merge()
    assert merged is base
    if kind == "dense":
        torch.testing.assert_close(merged.weight, expected)
    else:
        reference = make_base(kind)
        reference.quantize_(expected.detach())
        torch.testing.assert_close(merged.dequantize(), reference.dequantize())


def test_dropout_only_in_training():
    layer = LoraLinear(make_base("4bit"), rank=4, dropout=0.5)
    nn.init.normal_(layer.lora_B)
    x = torch.randn(7, 96)
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


def test_compute_dtype_of_the_base_layer_is_kept():
    base = Linear4bit.from_linear(nn.Linear(64, 64), compute_dtype=torch.bfloat16)
    layer = LoraLinear(base, rank=4)
    x = torch.randn(5, 64)
    assert layer(x).dtype == torch.float32
    assert torch.equal(layer(x), layer(x.bfloat16()).float())


def test_state_dict_round_trip():
    layer, other = LoraLinear(make_base("4bit"), rank=4), LoraLinear(make_base("4bit"), rank=4)
    nn.init.normal_(layer.lora_B)
    other.load_state_dict(layer.state_dict())
    x = torch.randn(3, 96)
    assert torch.equal(layer(x), other(x))
    assert "rank=4" in repr(layer)


def test_bad_arguments_are_named():
    with pytest.raises(TypeError, match="base_layer is a ReLU"):
        LoraLinear(nn.ReLU())
    with pytest.raises(ValueError, match="rank is 0"):
        LoraLinear(make_base("dense"), rank=0)
    with pytest.raises(ValueError, match=r"dropout is 1.0; it must be in \[0, 1\)"):
        LoraLinear(make_base("dense"), dropout=1.0)
    with pytest.raises(ValueError, match="Linear does not support gradient checkpointing"):
        prepare_for_training(nn.Linear(2, 2))


def test_prepare_for_training_freezes_all_but_adapters():
    model = nn.Sequential(nn.Linear(96, 96), LoraLinear(make_base("4bit")))
    prepare_for_training(model, gradient_checkpointing=False)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == ["1.lora_A", "1.lora_B"]


def test_import_loads_neither_peft_nor_transformers():
    code = "import sys, lora_ops; print([m for m in ('peft', 'transformers', 'bitsandbytes') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
