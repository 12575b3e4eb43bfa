"""The ops that are measured: their inputs, their truth in float64, their traffic and operations.

An op is one entry of OPS. Adding one takes an `Op(...)` here, its contestants in `bench/peers_*.py` and its shapes in
`bench/suites.py`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from bench import inputs, many
from bench.inputs import DROPOUT, RANK, SCALING, THRESHOLD, Case, Source, sampled
from bench.many import RANKS
from quantlib import reference

Results = dict[str, Tensor]
BUDGET = 2.0  # errors may be this many times those of plain PyTorch in the same dtype


@dataclass(frozen=True)
class Cost:
    """Bytes that must be read and written at least, and operations (two per multiply-add) by kind of arithmetic."""

    read: int
    written: int
    operations: Mapping[str, int] = field(default_factory=dict)


# ---------------------------------------------------------------------------------------------------
# Truth in float64, and the same in plain PyTorch, whose errors are the measure for everybody's


def _linear(x: Tensor, weight: Tensor, dy: Tensor | None) -> Results:
    y = F.linear(sampled(x), weight)
    return {"y": y} if dy is None else {"y": y, "dx": sampled(dy) @ weight}


def _exact_linear(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _linear(rows.x.double(), w.exact, None if rows.dy is None else rows.dy.double())


def _plain_linear(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _linear(rows.x, w.decoded, rows.dy)


def _plain_int8(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    """The definition of LLM.int8(): what rounding x to int8 costs is part of the measure."""
    results = _plain_linear(w, rows)
    return results | {"y": reference.linear_int8(sampled(rows.x), w.q.values, w.q.absmax, None, THRESHOLD)}


def _lora(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dy: Tensor | None, gate: Tensor | float = SCALING
) -> Results:
    """gate: factor of the branch, or of each row and rank: 0 where they belong to different adapters."""
    results = _linear(x, weight, dy)
    s = x @ A.t() * gate
    results["y"] = results["y"] + sampled(s) @ B.t()
    if dy is None:
        return results
    ds = dy @ B * gate
    results["dx"] = results["dx"] + sampled(ds) @ A
    return results | {"dA": ds.t() @ x, "dB": dy.t() @ s}


def _exact_lora(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    dy = None if rows.dy is None else rows.dy.double()
    return _lora(rows.x.double(), w.exact, w.A.double(), w.B.double(), dy)


def _plain_lora(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _lora(rows.x, w.decoded, w.A, w.B, rows.dy)


def _plain_lora_int8(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    results = _plain_lora(w, rows)
    return results | {"y": _plain_int8(w, rows)["y"] + SCALING * (sampled(rows.x) @ w.A.t() @ w.B.t())}


def _by_expert(x: Tensor, weight: Tensor, owner: Tensor, dy: Tensor | None) -> Results:
    chosen = sampled(owner).tolist()
    results = {"y": torch.stack([weight[e] @ row for e, row in zip(chosen, sampled(x), strict=True)])}
    if dy is not None:
        results["dx"] = torch.stack([row @ weight[e] for e, row in zip(chosen, sampled(dy), strict=True)])
    return results


def _exact_experts(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _by_expert(rows.x.double(), w.exact, rows.owner, None if rows.dy is None else rows.dy.double())


def _plain_experts(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _by_expert(rows.x, w.decoded, rows.owner, rows.dy)


def _exact_adapters(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    dy = None if rows.dy is None else rows.dy.double()
    return _lora(rows.x.double(), w.exact, w.A.double(), w.B.double(), dy, many.gate(w, rows).double())


def _plain_adapters(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _lora(rows.x, w.decoded, w.A, w.B, rows.dy, many.gate(w, rows).to(rows.x.dtype))


# ---------------------------------------------------------------------------------------------------
# Traffic and operations


def _arithmetic(case: Case) -> str:
    return str(case.dtype).removeprefix("torch.")


def bytes_4bit(elements: int, double_quant: bool) -> int:
    """Codes, and the absmax of each block of 64: four bytes, or one and a little."""
    scales = math.ceil(elements / 64)
    return elements // 2 + (scales + 4 * math.ceil(scales / 256) if double_quant else 4 * scales)


def _cost_transform(read: Callable[[Case], int], written: Callable[[Case], int]) -> Callable[[Case], Cost]:
    return lambda case: Cost(read(case), written(case))


def _plain_bytes(case: Case) -> int:
    return math.prod(case.shape) * case.dtype.itemsize


def _int8_bytes(dim: int) -> Callable[[Case], int]:
    return lambda case: math.prod(case.shape) + 4 * case.shape[dim]


def _one_adapter(case: Case) -> tuple[int, int]:
    """Rank of the factors that are read, and the sum over the rows of the rank that each is multiplied by."""
    return RANK, case.m * RANK


def _many_adapters(case: Case) -> tuple[int, int]:
    rows = many.rows_of_adapters(case.m)
    return sum(rank for rank, n in zip(RANKS, rows, strict=True) if n), sum(map(operator.mul, RANKS, rows))


def _cost_linear(
    weight_bytes: Callable[[Case], int],
    forward: str | None = None,
    ranks: Callable[[Case], tuple[int, int]] = lambda case: (0, 0),
) -> Callable:
    """Of a linear layer, and of its LoRA branch if it has ranks. forward: arithmetic where not that of the dtype."""

    def cost(case: Case) -> Cost:
        out, into = case.shape[-2:]
        size = case.dtype.itemsize
        x, y = case.m * into * size, case.m * out * size
        rank, uses = ranks(case)
        lora = rank * (out + into) * size
        own = _arithmetic(case)
        branch = 2 * uses * (out + into)
        operations = {own: branch}
        operations[forward or own] = operations.get(forward or own, 0) + 2 * case.m * out * into
        weight = weight_bytes(case)
        read, written = weight + x + lora, y
        if case.backward:  # dx = dy W; with LoRA dyB, its share of dx, x A^T, dA and dB, for which x is read again
            read, written = 2 * (weight + lora) + (2 * x if rank else x) + y, written + x + lora
            operations[own] += 2 * case.m * out * into + 2 * branch + 2 * uses * into
        return Cost(read, written, {unit: count for unit, count in operations.items() if count})

    return cost


def _nf4_experts(case: Case) -> int:
    """Of those experts that have rows."""
    used = sum(map(bool, many.rows_of_experts(case.m, case.shape[0])))
    return used * bytes_4bit(math.prod(case.shape[1:]), True)


def _cost_dropout(case: Case) -> Cost:
    size = case.m * case.shape[-1] * case.dtype.itemsize
    return Cost(size, size)


def _cost_embedding(case: Case) -> Cost:
    elements = case.m * case.shape[1]
    return Cost(bytes_4bit(elements, True) + 8 * case.m, elements * case.dtype.itemsize)


# ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Op:
    """How to make, check and count an op.

    weights, rows: make the inputs (rows is None for ops on weights alone). truth: results in float64, of the same
    names as those of the contestants. plain: the same in PyTorch and the case's dtype. exact: the weight in float64.
    cost: least traffic and operations. what: one line for the tables.
    """

    what: str
    weights: Callable[..., SimpleNamespace]
    truth: Callable[[SimpleNamespace, SimpleNamespace], Results]
    plain: Callable[[SimpleNamespace, SimpleNamespace], Results]
    cost: Callable[[Case], Cost]
    exact: Callable[[SimpleNamespace], Tensor]
    rows: Callable[[Case, Source], SimpleNamespace] | None = None
    backward: bool = False


def _quantizes(decode: Callable[[SimpleNamespace], Tensor], cost: Callable[[Case], Cost], what: str, weights) -> Op:
    """A quantizer is compared after decoding, with the tensor that it was given."""
    return Op(
        what=what,
        weights=weights,
        truth=lambda w, rows: {"decoded": w.w.double()},
        plain=lambda w, rows: {"decoded": decode(w)},
        cost=cost,
        exact=lambda w: w.w.double(),
    )


def _dequantizes(exact: Callable[[SimpleNamespace], Tensor], cost: Callable[[Case], Cost], what: str, weights) -> Op:
    return Op(
        what=what,
        weights=weights,
        truth=lambda w, rows: {"w": w.exact},
        plain=lambda w, rows: {"w": w.decoded},
        cost=cost,
        exact=exact,
    )


def _nf4(case: Case) -> int:
    return bytes_4bit(math.prod(case.shape), False)


def _nf4_double(case: Case) -> int:
    return bytes_4bit(math.prod(case.shape), True)


OPS: dict[str, Op] = {
    "quantize_4bit": _quantizes(
        inputs.exact_4bit, _cost_transform(_plain_bytes, _nf4), "NF4, blocks of 64", inputs.weights_4bit
    ),
    "dequantize_4bit": _dequantizes(
        inputs.exact_4bit, _cost_transform(_nf4, _plain_bytes), "NF4, blocks of 64", inputs.weights_4bit
    ),
    "dequantize_4bit_double": _dequantizes(
        inputs.exact_4bit,
        _cost_transform(_nf4_double, _plain_bytes),
        "NF4 with double quantization",
        inputs.weights_4bit_double,
    ),
    "quantize_int8": _quantizes(
        inputs.exact_int8, _cost_transform(_plain_bytes, _int8_bytes(0)), "one absmax a row", inputs.weights_int8
    ),
    "quantize_int8_columns": _quantizes(
        inputs.exact_int8,
        _cost_transform(_plain_bytes, _int8_bytes(1)),
        "one absmax a column",
        inputs.weights_int8_columns,
    ),
    "dequantize_int8": _dequantizes(
        inputs.exact_int8, _cost_transform(_int8_bytes(0), _plain_bytes), "one absmax a row", inputs.weights_int8
    ),
    "linear_4bit": Op(
        what="NF4 with double quantization; backward: dx",
        weights=inputs.weights_4bit_double,
        rows=inputs.rows_of,
        truth=_exact_linear,
        plain=_plain_linear,
        cost=_cost_linear(_nf4_double),
        exact=inputs.exact_4bit,
        backward=True,
    ),
    "linear_int8": Op(
        what="LLM.int8(), threshold 6, outlier columns; backward: dx",
        weights=inputs.weights_int8,
        rows=inputs.rows_with_outliers,
        truth=_exact_linear,
        plain=_plain_int8,
        cost=_cost_linear(_int8_bytes(0), forward="int8"),
        exact=inputs.exact_int8,
        backward=True,
    ),
    "embedding_4bit": Op(
        what="rows of an NF4 table",
        weights=inputs.weights_4bit_double,
        rows=lambda case, source: SimpleNamespace(indices=source.integers(case.shape[0], case.m)),
        truth=lambda w, rows: {"rows": w.exact[rows.indices]},
        plain=lambda w, rows: {"rows": w.decoded[rows.indices]},
        cost=_cost_embedding,
        exact=inputs.exact_4bit,
    ),
    "dropout": Op(
        what=f"p = {DROPOUT}, the mask a function of the seed",
        weights=inputs.no_weights,
        rows=inputs.rows_and_seed,
        truth=lambda w, rows: {"y": sampled(reference.dropout(rows.x.double(), rows.seed, DROPOUT))},
        plain=lambda w, rows: {"y": sampled(reference.dropout(rows.x, rows.seed, DROPOUT))},
        cost=_cost_dropout,
        exact=lambda w: w.w.double(),
    ),
    "lora_linear_4bit": Op(
        what="rank 16 on NF4 with double quantization; backward: dx, dA, dB",
        weights=inputs.with_lora(inputs.weights_4bit_double),
        rows=inputs.rows_of,
        truth=_exact_lora,
        plain=_plain_lora,
        cost=_cost_linear(_nf4_double, ranks=_one_adapter),
        exact=inputs.exact_4bit,
        backward=True,
    ),
    "lora_linear_int8": Op(
        what="rank 16 on LLM.int8(), outlier columns; backward: dx, dA, dB",
        weights=inputs.with_lora(inputs.weights_int8),
        rows=inputs.rows_with_outliers,
        truth=_exact_lora,
        plain=_plain_lora_int8,
        cost=_cost_linear(_int8_bytes(0), forward="int8", ranks=_one_adapter),
        exact=inputs.exact_int8,
        backward=True,
    ),
    "linear_4bit_experts": Op(
        what="NF4 with double quantization, M rows sorted by expert, unevenly many of each; backward: dx",
        weights=inputs.weights_4bit_double,
        rows=many.rows_by_expert,
        truth=_exact_experts,
        plain=_plain_experts,
        cost=_cost_linear(_nf4_experts),
        exact=inputs.exact_4bit,
        backward=True,
    ),
    "lora_linear_4bit_adapters": Op(
        what=f"adapters of ranks {', '.join(map(str, RANKS))} and none, a sequence each, on NF4 with double "
        "quantization; backward: dx, dA, dB",
        weights=many.with_adapters(inputs.weights_4bit_double),
        rows=many.rows_by_adapter,
        truth=_exact_adapters,
        plain=_plain_adapters,
        cost=_cost_linear(_nf4_double, ranks=_many_adapters),
        exact=inputs.exact_4bit,
        backward=True,
    ),
}


def make_weights(case: Case, source: Source) -> SimpleNamespace:
    """The weights of a case, with their exact values in float64."""
    op = OPS[case.op]
    inputs = op.weights(case, source)
    inputs.exact = op.exact(inputs)
    return inputs
