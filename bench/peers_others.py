"""PEFT over bitsandbytes and over our layers, torchao, and Unsloth."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from collections.abc import Callable
from types import ModuleType

import torch
from torch import Tensor, nn

from bench.cases import Results
from bench.contest import (
    LORA,
    Rows,
    Unavailable,
    Weights,
    adapter,
    contestant,
    frozen,
    layer_entry,
    lora_entry,
    truth_of,
)
from bench.inputs import RANK, SCALING, Case, sampled
from bench.peers_bitsandbytes import bnb_layer, own_truth
from bench.peers_quantlib import quantized_layer
from quantlib import reference

# ---------------------------------------------------------------------------------------------------
# PEFT, over bitsandbytes and over our layers


def _peft_layer(base: nn.Module, w: Weights, bits: int | None, float32: bool) -> tuple[nn.Module, Tensor, Tensor]:
    peft = importlib.import_module("peft")
    model = nn.Module()
    model.proj = base
    if bits:
        setattr(model, f"is_loaded_in_{bits}bit", True)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    layer = adapted.base_model.model.proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dtype = torch.float32 if float32 else w.A.dtype
    for parameter, value in ((A, w.A), (B, w.B)):
        parameter.data = value.to(dtype, copy=True)
    return layer, A, B


def _peft(name: str, base: Callable[[Case, Weights], nn.Module], bnb: bool, float32: bool) -> None:
    @contestant(LORA, name, package="peft")
    def _(case, w):
        if bnb and importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        bits = (8 if "int8" in case.op else 4) if bnb else None
        frozen = base(case, w)
        layer, A, B = _peft_layer(frozen, w, bits, float32)
        return lora_entry(case, layer, A, B, own_truth(case, w, frozen) if bnb else None)


_peft("PEFT, bitsandbytes", bnb_layer, bnb=True, float32=True)
_peft("PEFT, bitsandbytes, 16-bit adapter", bnb_layer, bnb=True, float32=False)
_peft("PEFT, quantlib", quantized_layer, bnb=False, float32=True)


# ---------------------------------------------------------------------------------------------------
# torchao


def _found(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@contestant("linear_4bit", "torchao, NF4", package="torchao")
def _(case, w):
    homes = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"  # 0.18; before
    nf4 = next((module for home in homes if (module := _found(home))), None)
    if nf4 is None:
        raise Unavailable(f"this version has neither {' nor '.join(homes)}")
    weight = nf4.to_nf4(w.w, block_size=64, scaler_block_size=256)
    truth = truth_of(case, w, lambda: weight.get_original_weight().double())
    return layer_entry(case, lambda x: nf4.linear_nf4(x, weight), truth=truth)


@contestant("linear_int8", "torchao, int8 without outliers", package="torchao")
def _(case, w):
    """Held to what it computes: every column of x is rounded to int8, the outliers too."""
    if case.backward:
        raise Unavailable("forward only")
    quantization = importlib.import_module("torchao.quantization")
    layer = nn.Sequential(copy.deepcopy(frozen(w.w)))
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    values, scale = layer[0].weight.qdata, layer[0].weight.scale.float()

    def truth(rows: Rows) -> tuple[Results, Results]:
        x = sampled(rows.x)
        y = x.double() @ (values * scale.double()).t()
        return {"y": y}, {"y": reference.linear_int8(x, values, 127 * scale.flatten(), None, 0.0)}

    return layer_entry(case, layer, truth=truth, graph=False)  # without torch.compile it prints each x to a string


# ---------------------------------------------------------------------------------------------------
# Unsloth


@contestant("lora_linear_4bit", "Unsloth", package="unsloth")
def _(case, w):
    """Its function for one projection. Importing Unsloth changes other libraries, so this comes last."""
    if w.w.device.type != "cuda":
        raise Unavailable("it needs a GPU")
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    base = bnb_layer(case, w)
    weight = base.weight
    A, B = adapter(w)
    layer = lambda x: function.apply(x[None], weight, weight.quant_state, A, B, SCALING)[0]  # noqa: E731
    return lora_entry(case, layer, A, B, own_truth(case, w, base))
