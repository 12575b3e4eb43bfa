"""A training step through transformers and PEFT on the GPU."""

import pytest
import torch

from . import harness
from .harness import DEVICE

peft = pytest.importorskip("peft", reason="the training step needs peft")
transformers = pytest.importorskip("transformers", reason="the training step needs transformers")

import lora_ops  # noqa: E402
import lora_ops.peft  # noqa: E402
import quantlib  # noqa: E402

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("either_backend")]


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Registered for the test; PEFT is as it was afterwards."""
    model = lora_ops.peft.peft_model
    monkeypatch.setattr(model, "dispatch_default", model.dispatch_default)
    lora_ops.register_peft()


def trainable_model(bits, checkpointing):
    config = transformers.LlamaConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=96,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config).to(DEVICE, torch.bfloat16)
    quantlib.quantize_model(model, bits, progress=False)
    options = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", lora_dropout=0.05, task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, options)
    lora_ops.prepare_for_training(model, gradient_checkpointing=checkpointing)
    return model.train()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_training_steps(bits, checkpointing):
    model = trainable_model(bits, checkpointing)
    layers = [module for module in model.modules() if isinstance(module, lora_ops.peft.LoraQuantizedLinear)]
    assert len(layers) == 14 and all(module.fused_reason() is None for module in layers)
    adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(adapters.values(), lr=1e-2)
    tokens = torch.arange(96, device=DEVICE).view(2, 48)
    losses = []
    for _ in range(4 if harness.DRY_RUN else 12):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        for name, parameter in adapters.items():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(loss.item())
        if len(losses) > 1:  # B starts at 0, so the first step gives A no gradient
            assert all(parameter.grad.any() for parameter in adapters.values())
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
