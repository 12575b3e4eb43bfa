"""Contestants of the ops that serve many weights in one call: experts, and adapters.

Ours are Triton kernels only, without a registered op; peers take one weight after the other, as their users do. Those
are told on the host how many rows each has, which costs a training step a wait that is not counted here.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.cases import Results
from bench.contest import ADAPTERS, EXPERTS, OURS, Entry, Rows, Truth, Unavailable, Weights, contestant, truth_of
from bench.inputs import Case, exact_4bit
from bench.many import ALPHA, NONE, RANKS
from bench.peers_bitsandbytes import bnb_layer, decoder, own_truth
from bench.peers_quantlib import quantized_layer
from quantlib import backends

Layer = Callable[[Tensor, Rows], Tensor]


def _kernels(w: Weights) -> ModuleType:
    (triton,) = (backend for backend in backends.BACKENDS if backend.name == "triton")
    if refusal := triton.refusal("linear_4bit", w.w.device.type):
        raise Unavailable(f"Triton kernels only: the backend {refusal}")
    return importlib.import_module("quant_triton")


def _results(count: int) -> Callable[[tuple[Tensor, ...]], Results]:
    """Of y; of y and dx; or of those and the gradients of `count` A and of as many B."""

    def results(output: tuple[Tensor, ...]) -> Results:
        found = dict(zip(("y", "dx"), output[:2], strict=False))
        if factors := output[2:]:
            found |= {"dA": torch.cat(factors[:count]), "dB": torch.cat(factors[count:], 1)}
        return found

    return results


def _entry(
    case: Case, layer: Layer, factors: Sequence[Tensor] = (), truth: Truth | None = None, graph: bool = False
) -> Entry:
    """y, and if the case goes backward dx and the gradients of the factors: all A, then all B."""

    def run(rows: Rows) -> tuple[Tensor, ...]:
        if not case.backward:
            return (layer(rows.x, rows),)
        x = rows.x.detach().requires_grad_()
        y = layer(x, rows)
        return y, *torch.autograd.grad(y, (x, *factors), rows.dy, materialize_grads=True)

    return Entry(run, _results(len(factors) // 2), truth, graph=graph)


# ---------------------------------------------------------------------------------------------------
# Experts


@contestant(EXPERTS, OURS)
def _(case, w):
    kernels = _kernels(w)
    _, out, into = case.shape
    weight = w.q.op_args()

    def run(rows):
        y = kernels.linear_4bit_grouped(rows.x, *weight, out, None, rows.ends)
        return (y, kernels.linear_4bit_grouped_dx(rows.dy, *weight, into, rows.ends)) if case.backward else (y,)

    return Entry(run, _results(0), graph=not case.backward)


def _one_by_one(layers: Sequence[Callable[[Tensor], Tensor]]) -> Layer:
    """Each expert that has rows multiplies its own."""

    def layer(x: Tensor, rows: Rows) -> Tensor:
        return torch.cat([expert(part) for expert, part in zip(layers, x.split(rows.counts), strict=True) if len(part)])

    return layer


def _quantized(
    case: Case, w: Weights, layer: Callable[[Case, Weights], nn.Module], decode: Callable[[nn.Module], Tensor]
) -> Entry:
    """Experts that were quantized one by one, and so have other scales of scales than all together.

    decode: a layer -> what gives its weight in float64.
    """
    one = replace(case, shape=case.shape[1:])
    layers = [layer(one, SimpleNamespace(w=weight)).train(case.backward) for weight in w.w]
    exact = [decode(layer) for layer in layers]
    return _entry(case, _one_by_one(layers), truth=truth_of(case, w, lambda: torch.stack([each() for each in exact])))


@contestant(EXPERTS, "quantlib, an expert at a time")
def _(case, w):
    return _quantized(case, w, quantized_layer, lambda layer: partial(exact_4bit, SimpleNamespace(q=layer.quantized)))


@contestant(EXPERTS, "torch, an expert at a time")
def _(case, w):
    return _entry(case, _one_by_one([lambda x, weight=weight: F.linear(x, weight) for weight in w.decoded]))


@contestant(EXPERTS, "torch._grouped_mm")
def _(case, w):
    """Its own kernel for 16-bit experts."""
    if not hasattr(torch, "_grouped_mm") or case.dtype != torch.bfloat16:
        raise Unavailable("bfloat16 only, from PyTorch 2.8")
    weight = w.decoded.transpose(1, 2)
    layer = lambda x, rows: torch._grouped_mm(x, weight, offs=rows.ends)  # noqa: E731
    return _entry(case, layer, graph=not case.backward)


@contestant(EXPERTS, "bitsandbytes, an expert at a time", package="bitsandbytes")
def _(case, w):
    shape = case.shape[1:]
    return _quantized(case, w, bnb_layer, lambda layer: decoder(layer.weight.data, layer.weight.quant_state, shape))


# ---------------------------------------------------------------------------------------------------
# Adapters


@contestant(ADAPTERS, OURS)
def _(case, w):
    kernels = _kernels(w)
    gate = importlib.import_module("quant_triton.low_rank").Gate
    weight = w.q.op_args()

    def run(rows):
        many = gate(rows.owner, w.adapter, w.scale)
        y, s = kernels.lora_linear_4bit(rows.x, *weight, None, w.A, w.B, 1.0, None, 0.0, case.backward, many)
        if not case.backward:
            return (y,)
        branch = (w.A, w.B, 1.0, None, 0.0, (True, True, True), many)
        return y, *kernels.lora_linear_4bit_backward(rows.dy, rows.x, s, *weight, *branch)

    return Entry(run, _results(1), graph=not case.backward)


def _factors(w: Weights) -> tuple[list[Tensor], list[Tensor]]:
    """A and B of each adapter, to train."""
    return [[t.contiguous().requires_grad_() for t in f.detach().split(RANKS, dim)] for dim, f in enumerate((w.A, w.B))]


def _by_sequence(rows: Rows, t: Tensor) -> Tensor:
    return t.view(len(rows.sequences), -1, t.shape[-1])


@contestant(ADAPTERS, "torch, an adapter at a time")
def _(case, w):
    """On a base of 16 bits."""
    A, B = _factors(w)

    def layer(x: Tensor, rows: Rows) -> Tensor:
        if not hasattr(rows, "of_adapter"):  # at the first call on some rows, which is not timed
            found = torch.tensor(rows.sequences, device=x.device)
            rows.of_adapter = {a: (found == a).nonzero().flatten() for a in set(rows.sequences) - {NONE}}
        x = _by_sequence(rows, x)
        y = F.linear(x, w.decoded)
        for i, sequences in rows.of_adapter.items():
            y = y.index_add(0, sequences, F.linear(F.linear(x[sequences], A[i]), B[i]), alpha=ALPHA / RANKS[i])
        return y.flatten(0, 1)

    return _entry(case, layer, (*A, *B))


def _peft_layer(base: nn.Module, w: Weights, bits: int | None) -> tuple[nn.Module, list[Tensor]]:
    """PEFT's layer with all adapters, called "0", "1" ... , in float32 as it makes them; its factors."""
    peft = importlib.import_module("peft")
    model: Any = nn.Module()
    model.proj = base
    if bits:
        setattr(model, f"is_loaded_in_{bits}bit", True)
    for i, rank in enumerate(RANKS):
        config = peft.LoraConfig(r=rank, lora_alpha=ALPHA, target_modules=["proj"], lora_dropout=0.0)
        if i:
            model.add_adapter(str(i), config)
        else:
            model = peft.get_peft_model(model, config, adapter_name="0")
    layer = model.base_model.model.proj
    factors = [[held[str(i)].weight for i in range(len(RANKS))] for held in (layer.lora_A, layer.lora_B)]
    for own, values in zip(factors, _factors(w), strict=True):
        for parameter, value in zip(own, values, strict=True):
            parameter.data = value.detach().float()
            parameter.requires_grad_()
    return layer, [*factors[0], *factors[1]]


def _peft(name: str, base: Callable[[Case, Weights], nn.Module], bits: int | None) -> None:
    @contestant(ADAPTERS, name, package="peft")
    def _(case, w):
        """Its batches of mixed adapters, which it offers for inference; the layer itself goes backward as well."""
        if bits and importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        frozen = base(case, w)
        truth = own_truth(case, w, frozen) if bits else None
        peft_layer, factors = _peft_layer(frozen, w, bits)

        def layer(x: Tensor, rows: Rows) -> Tensor:
            names = ["__base__" if adapter == NONE else str(adapter) for adapter in rows.sequences]
            return peft_layer(_by_sequence(rows, x), adapter_names=names).flatten(0, 1)

        return _entry(case, layer, factors, truth)


_peft("PEFT, bitsandbytes", bnb_layer, 4)
_peft("PEFT, quantlib", quantized_layer, None)
