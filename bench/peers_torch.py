"""PyTorch: layers that are not quantized, and its own products of 8-bit and 4-bit integers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.cases import Results
from bench.contest import (
    LORA,
    Entry,
    Rows,
    Unavailable,
    adapter,
    contestant,
    frozen,
    layer_entry,
    lora_entry,
    one,
    truth_of,
)
from bench.inputs import DROPOUT, SCALING, sampled
from quantlib import reference


@contestant(("linear_4bit", "linear_int8"), "torch")
def _(case, w):
    """The layer that is not quantized, in the same dtype."""
    return layer_entry(case, frozen(w.decoded))


@contestant("embedding_4bit", "torch")
def _(case, w):
    return Entry(lambda rows: F.embedding(rows.indices, w.decoded), one("rows"))


@contestant(("quantize_int8", "quantize_int8_columns"), "torch, op by op")
def _(case, w):
    dim = 0 if case.op.endswith("columns") else -1

    def run(rows):
        absmax = w.w.abs().amax(dim).float()
        return (w.w.float() * (127 / absmax).unsqueeze(dim)).round().to(torch.int8), absmax

    def results(output):
        return {"decoded": reference.dequantize_int8(*output, dim, None, torch.float64)}

    return Entry(run, results)


@contestant("dequantize_int8", "torch, op by op")
def _(case, w):
    return Entry(lambda rows: (w.q.values.float() * (w.q.absmax / 127)[:, None]).to(case.dtype), one("w"))


@contestant("linear_4bit", "torch, float32")
def _(case, w):
    if case.dtype == torch.float32 or case.backward:
        raise Unavailable("measured forward only, beside 16-bit dtypes")
    weight = w.decoded.float()
    slow = w.w.device.type == "cpu"
    return Entry(lambda rows: F.linear(rows.x.float(), weight), most_rows=64 if slow else 1 << 30)


def uniform_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 ... 15 of a uniform grid per group of a row; scale and zero, [groups, out, 2]; the decoded weight."""
    out, into = weight.shape
    blocks = weight.float().view(out, -1, group)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    codes = ((blocks - zero.float()) / scale.float() + 8).round().clamp(0, 15)
    decoded = (codes.double() - 8) * scale.double() + zero.double()
    scales_and_zeros = torch.cat([scale, zero], -1).transpose(0, 1).contiguous()
    return codes.view(out, into).int(), scales_and_zeros, decoded.view(out, into)


@contestant("linear_4bit", "torch, uniform int4")
def _(case, w):
    """`_weight_int4pack_mm`: 4 bits in groups of 64, equal steps. Compared with the truth of its own weights."""
    if case.backward or case.dtype != torch.bfloat16:
        raise Unavailable("forward in bfloat16 only")
    codes, scales, decoded = uniform_int4(w.w, 64)
    aten = torch.ops.aten
    if w.w.device.type == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = aten._weight_int4pack_mm_for_cpu
    else:
        packed = aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        product = aten._weight_int4pack_mm
    truth = truth_of(case, w, lambda: decoded)
    most = 64 if w.w.device.type == "cpu" else 1 << 30  # it is no kernel for many rows
    return Entry(lambda rows: product(rows.x, packed, 64, scales), truth=truth, most_rows=most)


@contestant("linear_int8", "torch._int_mm, product alone")
def _(case, w):
    """A bound for any int8 layer: the integer product, without quantizing x, scales or outliers."""
    if case.backward:
        raise Unavailable("forward only")
    values = w.q.values.t()

    def rounded(rows: Rows) -> Tensor:
        if not hasattr(rows, "rounded"):  # at the first call on some rows, which is not timed
            rows.rounded = rows.x.round().clamp(-127, 127).to(torch.int8)
        return rows.rounded

    def truth(rows: Rows) -> tuple[Results, Results]:
        y = sampled(rounded(rows)).double() @ values.double()
        return {"y": y}, {"y": y.float()}

    least = 17 if w.w.device.type == "cuda" else 0
    return Entry(lambda rows: torch._int_mm(rounded(rows), values), truth=truth, least_rows=least)


@contestant("dropout", "torch")
def _(case, w):
    """Its mask is another in every call: what is compared is what is kept."""

    def results(output: tuple[Tensor, Tensor]) -> Results:
        y, x = output
        return {"y": torch.where(y == 0, x / (1 - DROPOUT), y)}

    def truth(rows: Rows) -> tuple[Results, Results]:
        x = sampled(rows.x)
        return {"y": x.double() / (1 - DROPOUT)}, {"y": x / (1 - DROPOUT)}

    return Entry(lambda rows: (F.dropout(rows.x, DROPOUT), rows.x), results, truth, graph=False)


@contestant(LORA, "torch, LoRA on 16 bits")
def _(case, w):
    A, B = adapter(w)
    layer = lambda x: F.linear(x, w.decoded) + SCALING * F.linear(F.linear(x, A), B)  # noqa: E731
    return lora_entry(case, layer, A, B)
