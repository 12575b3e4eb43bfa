"""bitsandbytes. Its 4-bit weights are judged by what they themselves mean, since it rounds some scales another way."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import quantlib
from bench.contest import Entry, Truth, Unavailable, Weights, contestant, layer_entry, one, truth_of
from bench.inputs import THRESHOLD, Case, exact_4bit
from quantlib import reference


def _bnb() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


def _bnb_4bit(bnb: ModuleType, weight: Tensor, nested: bool = True) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        *reversed(weight.shape), bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested, blocksize=64
    )
    return layer.to(weight.device)


def _bnb_int8(bnb: ModuleType, weight: Tensor) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        *reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
    )
    source = weight.to("cpu", copy=True)  # it quantizes on the way from the CPU only
    layer.weight = bnb.nn.Int8Params(source, requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device)


def bnb_layer(case: Case, w: Weights) -> nn.Module:
    return _bnb_int8(_bnb(), w.w) if "int8" in case.op else _bnb_4bit(_bnb(), w.w)


def decoder(packed: Tensor, state: Any, shape: tuple[int, ...]) -> Callable[[], Tensor]:
    """Gives its weight in float64. The tensors are taken now, since inference on a CPU replaces them."""
    nested = (state.state2.absmax, state.state2.code, state.offset)
    args = (packed.data, state.absmax, *nested, "nf4", 64, shape, torch.float64)
    return lambda: reference.dequantize_4bit(*args)


def _bnb_truth(case: Case, w: Weights, packed: Tensor, state: Any) -> Truth:
    """The truth for its own 4-bit weights: its CPU kernel rounds some of the nested scales another way."""
    return truth_of(case, w, decoder(packed, state, case.shape))


def own_truth(case: Case, w: Weights, layer: nn.Module) -> Truth | None:
    return None if "int8" in case.op else _bnb_truth(case, w, layer.weight.data, layer.weight.quant_state)


@contestant("quantize_4bit", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional

    def results(output):
        packed, state = output
        args = (packed, state.absmax, None, None, None, "nf4", 64, case.shape, torch.float64)
        return {"decoded": reference.dequantize_4bit(*args)}

    run = lambda rows: functional.quantize_4bit(w.w, quant_type="nf4", blocksize=64)  # noqa: E731
    return Entry(run, results, graph=False)  # it launches on the legacy stream, which ends a process that captures


@contestant(("dequantize_4bit", "dequantize_4bit_double"), "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    nested = case.op.endswith("double")
    packed, state = functional.quantize_4bit(w.w, quant_type="nf4", blocksize=64, compress_statistics=nested)
    truth = _bnb_truth(case, w, packed, state) if nested else None
    return Entry(lambda rows: functional.dequantize_4bit(packed, state), one("w"), truth)


@contestant("quantize_int8", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    dtype = _bnb_int8_dtype(w.w)

    def results(output):
        return {"decoded": reference.dequantize_int8(output[0], output[1], -1, None, torch.float64)}

    return Entry(lambda rows: functional.int8_vectorwise_quant(w.w.to(dtype)), results, graph=False)


def _bnb_int8_dtype(x: Tensor) -> torch.dtype:
    """Its CUDA kernels take float16 only; its own layers cast to it."""
    return torch.float16 if x.device.type == "cuda" else x.dtype


@contestant("quantize_int8_columns", "bitsandbytes, rows and columns", package="bitsandbytes")
def _(case, w):
    if w.w.device.type == "cpu":
        raise Unavailable("it has no CPU kernel for columns")
    functional = _bnb().functional
    dtype = _bnb_int8_dtype(w.w)

    def results(output):
        return {"decoded": reference.dequantize_int8(output[1], output[3], 0, None, torch.float64)}

    return Entry(lambda rows: functional.int8_double_quant(w.w.to(dtype)), results, graph=False)


@contestant("dequantize_int8", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    run = lambda rows: functional.int8_vectorwise_dequant(w.q.values, w.q.absmax).to(case.dtype)  # noqa: E731
    return Entry(run, one("w"))


@contestant(("linear_4bit", "linear_int8"), "bitsandbytes", package="bitsandbytes")
def _(case, w):
    """In eval mode without gradients, where bitsandbytes repacks its 4-bit weights on CPUs; else in train mode."""
    layer = bnb_layer(case, w).train(case.backward)
    graph = case.op == "linear_4bit" and not case.backward
    return layer_entry(case, layer, truth=own_truth(case, w, layer), graph=graph)


@contestant("linear_4bit", "bitsandbytes, not repacked", package="bitsandbytes")
def _(case, w):
    if case.backward or w.w.device.type != "cpu":
        raise Unavailable("the same as bitsandbytes: it repacks for inference on CPUs only")
    layer = bnb_layer(case, w).train()
    return layer_entry(case, layer, truth=own_truth(case, w, layer))


@contestant("embedding_4bit", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    bnb = _bnb()
    layer = bnb.nn.Embedding4bit(1, case.shape[1], dtype=case.dtype, quant_type="nf4")
    layer.num_embeddings = case.shape[0]
    layer.weight = bnb.nn.Params4bit(
        w.w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64, module=layer
    )
    layer = layer.to(w.w.device)
    q = quantlib.quantize_4bit(w.w)  # its embedding knows no double quantization
    truth = truth_of(case, w, lambda: exact_4bit(SimpleNamespace(q=q)))
    return Entry(lambda rows: layer(rows.indices), one("rows"), truth, graph=False)
