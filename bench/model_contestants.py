"""The contestants of the whole-model benchmark: one Llama, its linear layers held in different ways.

The weights are random, drawn by the name of the layer, so that every contestant has the same ones. A layer is drawn
in 16 bits, quantized, and freed before the next is drawn: a model of 8 billion parameters never exists in 16 bits,
but in the contestant that trains it so. That one holds the decoded NF4 values: all compute the same function.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from types import FunctionType, MethodType

import torch
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import lora_ops
import quantlib

RANK, ALPHA = 16, 32.0


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the sides of its linear layers are multiples of 64."""

    name: str
    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self) -> LlamaConfig:
        """Rotary base and context of Llama-3; they change no time."""
        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=131072,
            rms_norm_eps=1e-5,
            rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
            tie_word_embeddings=False,
            bos_token_id=None,
            eos_token_id=None,
        )

    @property
    def linear_weights(self) -> int:
        """Weights of the adapted linear layers."""
        kv = self.hidden * self.kv_heads // self.heads
        return self.layers * self.hidden * (2 * self.hidden + 2 * kv + 3 * self.intermediate)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("tiny", 128, 320, 2, 4, 2, 512),
        Shape("small", 2048, 5632, 2, 16, 4, 4096),
        Shape("llama-3-8b", 4096, 14336, 32, 32, 8, 128256),
    )
}


def draw(name: str, shape: torch.Size, device: torch.device, dtype: torch.dtype, std: float = 0.02) -> Tensor:
    """A normal tensor that depends on `name` and on the device type only."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.randn(shape, generator=generator, device=device).mul_(std).to(dtype)


def build(shape: Shape, layer: Callable[[Tensor], nn.Module], device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The model with `layer(weight)` in place of each linear layer but lm_head, frozen.

    Args:
        layer: makes a module [.., in] -> [.., out] of a weight [out, in] in `dtype`, on `device`.
    """
    config = shape.config()
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    for name, module in list(model.named_modules()):
        for key, parameter in list(module.named_parameters(recurse=False)):
            if isinstance(module, nn.Linear) and name != "lm_head":
                parent, child = name.rpartition(".")[::2]
                setattr(model.get_submodule(parent), child, layer(draw(name, parameter.shape, device, dtype)))
            else:
                is_norm = parameter.dim() == 1
                value = draw(name, parameter.shape, device, dtype, std=0.1 if is_norm else 0.02) + is_norm
                setattr(module, key, nn.Parameter(value, requires_grad=False))
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)  # its buffers are in no state dict
    return model.requires_grad_(False)


def _ours(weight: Tensor) -> nn.Module:
    return quantlib.Linear4bit.from_linear(_dense(weight), quant_type="nf4", block_size=64, double_quant=True)


def _bitsandbytes(weight: Tensor) -> nn.Module:
    import bitsandbytes as bnb

    out_features, in_features = weight.shape
    layer = bnb.nn.Linear4bit(in_features, out_features, bias=False, compute_dtype=weight.dtype, device="meta")
    options = {"requires_grad": False, "blocksize": 64, "compress_statistics": True, "quant_type": "nf4"}
    layer.weight = bnb.nn.Params4bit(weight, module=layer, **options).to(weight.device)
    return layer


def _dense(weight: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def _decoded(weight: Tensor) -> nn.Linear:
    return _dense(quantlib.quantize_4bit(weight, "nf4", 64, double_quant=True).dequantize())


def _decoded_float32(weight: Tensor) -> nn.Linear:
    return _dense(quantlib.quantize_4bit(weight, "nf4", 64, double_quant=True).dequantize(torch.float32))


def _liger(model: nn.Module) -> None:
    """Liger-Kernel's rotation, norms, activation and loss in this model alone: it would change them in all others too.

    What it replaces among the names of transformers' module is put back; only the attention, which looks its rotation
    up there, keeps a copy of them.
    """
    from liger_kernel.transformers import apply_liger_kernel_to_llama
    from transformers.models.llama import modeling_llama

    names = vars(modeling_llama).copy()
    try:
        apply_liger_kernel_to_llama(model=model)
        changed = vars(modeling_llama).copy()
    finally:
        vars(modeling_llama).update(names)
    for layer in model.model.layers:
        forward = type(layer.self_attn).forward
        own = FunctionType(forward.__code__, changed, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
        layer.self_attn.forward = MethodType(own, layer.self_attn)


def lora_config() -> LoraConfig:
    """LoRA on all linear layers. No dropout: contestants that drop different elements have different losses."""
    return LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")


def set_checkpointing(model: PeftModel, on: bool) -> None:
    """Turns transformers' gradient checkpointing, the non-reentrant one, on or off."""
    base = model.get_base_model()
    if on:
        # transformers 5 renames the method, and deprecates the old name
        enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    else:
        disable = getattr(base, "activation_checkpointing_disable", None) or base.gradient_checkpointing_disable
        disable()


@dataclass(frozen=True)
class Contestant:
    """A way to hold and train the model.

    layer: makes a linear layer of a 16-bit weight. needs: modules it imports. devices: where it runs.
    casts: PEFT's `prepare_model_for_kbit_training`, which turns every 16-bit parameter into float32.
    float32: everything is computed in float32, on the values of the 16-bit model.
    autocast: whether it is run under autocast, as transformers' Trainer with bf16=True does.
    decodes: whether its generation is measured. patch: changes the model before it is adapted.
    """

    name: str
    layer: Callable[[Tensor], nn.Module]
    needs: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    casts: bool = False
    float32: bool = False
    autocast: bool = True
    decodes: bool = True
    patch: Callable[[nn.Module], None] | None = None

    def missing(self, device: torch.device) -> str:
        """Why it cannot run on `device`; "" if it can."""
        if device.type not in self.devices:
            return f"runs on {' and '.join(self.devices)} only"
        absent = [module for module in self.needs if find_spec(module) is None]
        return f"{', '.join(absent)} not installed" if absent else ""

    def make(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> PeftModel:
        """The adapted model; its adapters are float32, PEFT's default."""
        model = build(shape, self.layer, device, dtype)
        if "bitsandbytes" in self.needs:
            model.is_loaded_in_4bit = True  # what PEFT asks before it looks for bitsandbytes' layers
        if self.float32:
            model = model.float()
        if self.casts:
            model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
        if self.patch:
            self.patch(model)
        model.config.use_cache = False
        if self.layer is _ours:
            lora_ops.register_peft()
        return get_peft_model(model, lora_config())

    def set_checkpointing(self, model: PeftModel, on: bool) -> None:
        """Gradient checkpointing from here on."""
        set_checkpointing(model, on)


OURS = "quantlib"
# Ours runs without autocast, as the `qlora` command does; PEFT's layers are slower without it, so theirs run with it.
CONTESTANTS = (
    Contestant(OURS, _ours, autocast=False),
    Contestant("bitsandbytes + PEFT", _bitsandbytes, needs=("bitsandbytes",)),
    Contestant("bitsandbytes + PEFT, float32 casts", _bitsandbytes, needs=("bitsandbytes",), casts=True),
    Contestant("16 bits + PEFT", _decoded),
    Contestant(
        "bitsandbytes + PEFT + Liger",
        _bitsandbytes,
        needs=("bitsandbytes", "liger_kernel"),
        devices=("cuda",),
        patch=_liger,
    ),
    Contestant("quantlib + Liger", _ours, needs=("liger_kernel",), devices=("cuda",), autocast=False, patch=_liger),
)
REFERENCE = Contestant("reference", _decoded_float32, float32=True, autocast=False)


def draw_adapters(model: nn.Module) -> None:
    """Gives every adapter its start, by its name: A as PEFT draws it, B small and not zero, for A's gradient's sake."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                std = 0.01 if ".lora_B." in name else 1 / math.sqrt(3 * parameter.shape[1])
                parameter.copy_(draw(name, parameter.shape, parameter.device, parameter.dtype, std))


def held_bytes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> int:
    """Bytes of the parameters, buffers, bitsandbytes' scales and the optimizer's state, each once."""
    tensors: list[Tensor] = [*model.parameters(), *model.buffers()]
    for module in model.modules():
        state = getattr(module, "quant_state", None)  # bitsandbytes keeps its scales in neither of the two
        for part in (state, getattr(state, "state2", None)):
            tensors += [value for value in vars(part).values() if isinstance(value, Tensor)] if part else []
    for values in optimizer.state.values() if optimizer else ():
        tensors += [value for value in values.values() if isinstance(value, Tensor)]
    return sum({(t.device, t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors}.values())
