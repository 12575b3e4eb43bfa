"""This package as a contestant, and its parts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import lora_ops
import quantlib
from bench.cases import OPS, Results
from bench.contest import (
    CONTESTANTS,
    LORA,
    MANY,
    OURS,
    Entry,
    Rows,
    Unavailable,
    Weights,
    adapter,
    contestant,
    frozen,
    layer_entry,
    lora_entry,
    one,
)
from bench.inputs import DROPOUT, SCALING, THRESHOLD, Case
from quantlib import backends, reference


def quantized_layer(case: Case, w: Weights) -> nn.Module:
    if "int8" in case.op:
        return quantlib.Linear8bit.from_linear(frozen(w.w), threshold=THRESHOLD)
    return quantlib.Linear4bit.from_linear(frozen(w.w), compute_dtype=case.dtype, double_quant=True)


def _decode_4bit(q: quantlib.Quantized4bit) -> Results:
    return {"decoded": reference.dequantize_4bit(*q.op_args(), q.shape, torch.float64)}


def _decode_int8(q: quantlib.QuantizedInt8) -> Results:
    return {"decoded": reference.dequantize_int8(q.values, q.absmax, q.dim, q.block_size, torch.float64)}


@contestant("quantize_4bit", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_4bit(w.w), _decode_4bit)


@contestant(("dequantize_4bit", "dequantize_4bit_double", "dequantize_int8"), OURS)
def _(case, w):
    return Entry(lambda rows: w.q.dequantize(), one("w"))


@contestant("quantize_int8", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_int8(w.w), _decode_int8)


@contestant("quantize_int8_columns", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_int8(w.w, dim=0), _decode_int8)


@contestant(("linear_4bit", "linear_int8"), OURS)
def _(case, w):
    return layer_entry(case, quantized_layer(case, w).train(case.backward))


@contestant("linear_4bit", "quantlib, decode + torch")
def _(case, w):
    """The weight decoded to memory and multiplied by PyTorch, as most packages do it."""
    return layer_entry(case, lambda x: F.linear(x, w.q.dequantize()))


@contestant("embedding_4bit", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.embedding_4bit(rows.indices, w.q), one("rows"))


@contestant("dropout", OURS)
def _(case, w):
    return Entry(lambda rows: backends.kernel("dropout", rows.x.device)(rows.x, rows.seed, DROPOUT))


@contestant(LORA, OURS)
def _(case, w):
    A, B = adapter(w)
    layer = lambda x: lora_ops.lora_linear(x, w.q, A, B, SCALING, threshold=THRESHOLD)  # noqa: E731
    return lora_entry(case, layer, A, B)


@contestant(LORA, "quantlib, base layer alone")
def _(case, w):
    def truth(rows):
        base = OPS[case.op.removeprefix("lora_")]
        return base.truth(w, rows), base.plain(w, rows)

    entry = layer_entry(case, quantized_layer(case, w))
    return Entry(entry.run, entry.results, truth, graph=False)


def _kernels(case: Case) -> list[str]:
    """The ops of `quantlib.ops` that a case runs."""
    if case.op in LORA:
        return [case.op, f"{case.op}_backward"] if case.backward else [case.op]
    op = case.op.removesuffix("_double").removesuffix("_columns")
    return [op, f"{op}_dx"] if case.backward else [op]


def _by_backend(backend: backends.Backend) -> None:
    """A contestant of its own: what OURS runs, by the kernels of this backend."""

    def build(case: Case, w: Weights) -> Entry:
        for op in _kernels(case):
            if refusal := backend.refusal(op, w.w.device.type):
                raise Unavailable(f"it {refusal}")
        if all(backends.explain(op, w.w).chosen == backend.name for op in _kernels(case)):
            raise Unavailable(f"it is what {OURS} runs")
        (ours,) = (peer for peer in CONTESTANTS[case.op] if peer.name == OURS)
        entry = ours.entry(case, w)

        def run(rows: Rows) -> Any:
            with backends.use_backend(backend.name):
                return entry.run(rows)

        return replace(entry, run=run)

    contestant([op for op in OPS if op not in MANY], f"quantlib, {backend.name}")(build)


for _backend in backends.BACKENDS:
    if _backend.doubt:
        _by_backend(_backend)
