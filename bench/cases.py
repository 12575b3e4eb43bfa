"""What is measured: the ops, their inputs, their truth in float64, their traffic, and the shapes of real models.

An op is one entry of OPS. Its weights are made once per shape, its rows (activations, gradients) for every number of
rows M. Adding one takes an `Op(...)` here and its contestants in `bench.peers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlib import Quantized4bit, QuantizedInt8, quantize_4bit, quantize_int8, reference

Results = dict[str, Tensor]
RANK, SCALING, THRESHOLD, OUTLIER_COLUMNS = 16, 2.0, 6.0, 4
SAMPLED_ROWS = 64  # of y and dx are compared: the truth in float64 is slow
BUDGET = 2.0  # errors may be this many times those of plain PyTorch in the same dtype

# [out_features, in_features] of the linear layers; an embedding is [vocabulary, hidden].
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3 8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3 70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
    "Qwen3 8B": {"gate, up": (12288, 4096), "down": (4096, 12288)},
    "Qwen3 32B": {"q": (8192, 5120), "k, v": (1024, 5120), "gate, up": (25600, 5120), "down": (5120, 25600)},
    "Mixtral 8x7B": {"an expert": (14336, 4096), "embedding": (32000, 4096)},
}


def layer_name(shape: tuple[int, int]) -> str:
    """The first layer of MODELS that has this shape, "" if none has."""
    return next((f"{m} {layer}" for m, layers in MODELS.items() for layer, s in layers.items() if s == shape), "")


@dataclass(frozen=True)
class Case:
    """One point: an op at a shape [out, in], with m rows (None for ops on weights alone), in a dtype.

    cache: "warm" repeats on the same data; "cold" cycles through copies that exceed the cache together.
    """

    op: str
    shape: tuple[int, int]
    dtype: torch.dtype
    m: int | None = None
    backward: bool = False
    cache: str = "cold"

    @property
    def group(self) -> Case:
        """What all numbers of rows have in common: their weights are the same."""
        return replace(self, m=None)

    def fields(self) -> dict:
        """For a record; they identify the case."""
        shape, dtype = list(self.shape), str(self.dtype).removeprefix("torch.")
        return {
            "op": self.op,
            "shape": shape,
            "dtype": dtype,
            "m": self.m,
            "backward": self.backward,
            "cache": self.cache,
        }

    def __str__(self) -> str:
        rows = "" if self.m is None else f" M={self.m}"
        way = " forward + backward" if self.backward else ""
        out, into = self.shape
        return f"{self.op}{way} {out}x{into}{rows} {str(self.dtype).removeprefix('torch.')} {self.cache}"


@dataclass(frozen=True)
class Cost:
    """Bytes that must be read and written at least, and operations (two per multiply-add) by kind of arithmetic."""

    read: int
    written: int
    operations: Mapping[str, int] = field(default_factory=dict)


class Source:
    """Random tensors on a device, the same for the same seed."""

    def __init__(self, device: torch.device | str, seed: int = 0) -> None:
        self.device = torch.device(device)
        self.generator = torch.Generator(self.device).manual_seed(seed)

    def normal(self, *shape: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device).mul_(scale).to(dtype)

    def integers(self, high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=self.generator, device=self.device)


def copied(inputs: SimpleNamespace) -> SimpleNamespace:
    """The same in other memory."""

    def copy(value: object) -> object:
        if isinstance(value, Quantized4bit | QuantizedInt8):
            return replace(value, **{k: copy(v) for k, v in vars(value).items() if isinstance(v, Tensor)})
        return value.clone() if isinstance(value, Tensor) else value

    return SimpleNamespace(**{name: copy(value) for name, value in vars(inputs).items()})


def sampled(rows: Tensor) -> Tensor:
    """Up to SAMPLED_ROWS rows, the first and the last among them."""
    count = rows.shape[0]
    if count <= SAMPLED_ROWS:
        return rows
    return rows[torch.linspace(0, count - 1, SAMPLED_ROWS).long().to(rows.device)]


# ---------------------------------------------------------------------------------------------------
# Inputs. Weights hold w, the tensor that is quantized; q, our quantization of it; decoded, q in the dtype of w; exact,
# q in float64. Rows hold what changes with M.


def _weights_4bit(case: Case, source: Source, **options: object) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    q = quantize_4bit(w, "nf4", 64, **options)
    return SimpleNamespace(w=w, q=q, decoded=reference.dequantize_4bit(*q.op_args(), q.shape, w.dtype))


def _exact_4bit(w: SimpleNamespace) -> Tensor:
    return reference.dequantize_4bit(*w.q.op_args(), w.q.shape, torch.float64)


def _decode_int8(q: QuantizedInt8, dtype: torch.dtype) -> Tensor:
    return reference.dequantize_int8(q.values, q.absmax, q.dim, q.block_size, dtype)


def _weights_int8(case: Case, source: Source) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    q = quantize_int8(w)
    return SimpleNamespace(w=w, q=q, decoded=_decode_int8(q, w.dtype))


def _with_lora(weights: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    def make(case: Case, source: Source, **options: object) -> SimpleNamespace:
        inputs = weights(case, source, **options)
        inputs.A = source.normal(RANK, case.shape[1], dtype=case.dtype, scale=0.02)
        inputs.B = source.normal(case.shape[0], RANK, dtype=case.dtype, scale=0.02)
        return inputs

    return make


def _rows(case: Case, source: Source) -> SimpleNamespace:
    x = source.normal(case.m, case.shape[1], dtype=case.dtype)
    dy = source.normal(case.m, case.shape[0], dtype=case.dtype) if case.backward else None
    return SimpleNamespace(x=x, dy=dy)


def _rows_with_outliers(case: Case, source: Source) -> SimpleNamespace:
    """A few columns are large in every row, as in the activations of large models."""
    rows = _rows(case, source)
    columns = torch.linspace(0, case.shape[1] - 1, OUTLIER_COLUMNS).long()
    rows.x[:, columns.to(rows.x.device)] *= 10
    rows.x[:, 0] += 2 * THRESHOLD
    return rows


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


def _lora(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dy: Tensor | None) -> Results:
    results = _linear(x, weight, dy)
    results["y"] = results["y"] + SCALING * (sampled(x) @ A.t() @ B.t())
    if dy is None:
        return results
    dyB = SCALING * (dy @ B)
    results["dx"] = results["dx"] + sampled(dyB) @ A
    return results | {"dA": dyB.t() @ x, "dB": SCALING * (dy.t() @ (x @ A.t()))}


def _exact_lora(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    dy = None if rows.dy is None else rows.dy.double()
    return _lora(rows.x.double(), w.exact, w.A.double(), w.B.double(), dy)


def _plain_lora(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    return _lora(rows.x, w.decoded, w.A, w.B, rows.dy)


def _plain_lora_int8(w: SimpleNamespace, rows: SimpleNamespace) -> Results:
    results = _plain_lora(w, rows)
    return results | {"y": _plain_int8(w, rows)["y"] + SCALING * (sampled(rows.x) @ w.A.t() @ w.B.t())}


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


def _cost_linear(weight_bytes: Callable[[Case], int], forward: str | None = None, rank: int = 0) -> Callable:
    """Of a linear layer, and of its LoRA branch if it has a rank. forward: arithmetic where not that of the dtype."""

    def cost(case: Case) -> Cost:
        out, into = case.shape
        size = case.dtype.itemsize
        x, y = case.m * into * size, case.m * out * size
        lora = rank * (out + into) * size
        own = _arithmetic(case)
        branch = 2 * case.m * rank * (out + into)
        operations = {own: branch}
        operations[forward or own] = operations.get(forward or own, 0) + 2 * case.m * out * into
        read, written = weight_bytes(case) + x + lora, y
        if case.backward:  # dx = dy W; with LoRA dyB, its share of dx, x A^T, dA and dB
            read, written = 2 * read + y, written + x + lora
            operations[own] += 2 * case.m * out * into + (2 * branch + 2 * case.m * rank * into if rank else 0)
        return Cost(read, written, {unit: count for unit, count in operations.items() if count})

    return cost


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


def _exact_int8(w: SimpleNamespace) -> Tensor:
    return _decode_int8(w.q, torch.float64)


def _quantized_columns(case: Case, source: Source) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    return SimpleNamespace(w=w, q=quantize_int8(w, dim=0))


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


def _double(case: Case, source: Source) -> SimpleNamespace:
    return _weights_4bit(case, source, double_quant=True)


OPS: dict[str, Op] = {
    "quantize_4bit": _quantizes(_exact_4bit, _cost_transform(_plain_bytes, _nf4), "NF4, blocks of 64", _weights_4bit),
    "dequantize_4bit": _dequantizes(
        _exact_4bit, _cost_transform(_nf4, _plain_bytes), "NF4, blocks of 64", _weights_4bit
    ),
    "dequantize_4bit_double": _dequantizes(
        _exact_4bit, _cost_transform(_nf4_double, _plain_bytes), "NF4 with double quantization", _double
    ),
    "quantize_int8": _quantizes(
        _exact_int8, _cost_transform(_plain_bytes, _int8_bytes(0)), "one absmax a row", _weights_int8
    ),
    "quantize_int8_columns": _quantizes(
        _exact_int8, _cost_transform(_plain_bytes, _int8_bytes(1)), "one absmax a column", _quantized_columns
    ),
    "dequantize_int8": _dequantizes(
        _exact_int8, _cost_transform(_int8_bytes(0), _plain_bytes), "one absmax a row", _weights_int8
    ),
    "linear_4bit": Op(
        what="NF4 with double quantization; backward: dx",
        weights=_double,
        rows=_rows,
        truth=_exact_linear,
        plain=_plain_linear,
        cost=_cost_linear(_nf4_double),
        exact=_exact_4bit,
        backward=True,
    ),
    "linear_int8": Op(
        what="LLM.int8(), threshold 6, outlier columns; backward: dx",
        weights=_weights_int8,
        rows=_rows_with_outliers,
        truth=_exact_linear,
        plain=_plain_int8,
        cost=_cost_linear(_int8_bytes(0), forward="int8"),
        exact=_exact_int8,
        backward=True,
    ),
    "embedding_4bit": Op(
        what="rows of an NF4 table",
        weights=_double,
        rows=lambda case, source: SimpleNamespace(indices=source.integers(case.shape[0], case.m)),
        truth=lambda w, rows: {"rows": w.exact[rows.indices]},
        plain=lambda w, rows: {"rows": w.decoded[rows.indices]},
        cost=_cost_embedding,
        exact=_exact_4bit,
    ),
    "lora_linear_4bit": Op(
        what="rank 16 on NF4 with double quantization; backward: dx, dA, dB",
        weights=_with_lora(_double),
        rows=_rows,
        truth=_exact_lora,
        plain=_plain_lora,
        cost=_cost_linear(_nf4_double, rank=RANK),
        exact=_exact_4bit,
        backward=True,
    ),
    "lora_linear_int8": Op(
        what="rank 16 on LLM.int8(), outlier columns; backward: dx, dA, dB",
        weights=_with_lora(_weights_int8),
        rows=_rows_with_outliers,
        truth=_exact_lora,
        plain=_plain_lora_int8,
        cost=_cost_linear(_int8_bytes(0), forward="int8", rank=RANK),
        exact=_exact_int8,
        backward=True,
    ),
}


def make_weights(case: Case, source: Source) -> SimpleNamespace:
    """The weights of a case, with their exact values in float64."""
    op = OPS[case.op]
    inputs = op.weights(case, source)
    inputs.exact = op.exact(inputs)
    return inputs


# ---------------------------------------------------------------------------------------------------
# Suites


TRANSFORMS = ("quantize_4bit", "dequantize_4bit", "quantize_int8", "quantize_int8_columns", "dequantize_int8")
BF16 = torch.bfloat16


def _layers(op: str, shapes, rows, dtype=BF16, backward=(False, True), **rest) -> Iterator[Case]:
    for way in backward:
        for shape in shapes:
            for m in rows:
                yield Case(op, shape, dtype, m, way, **rest)


def _embedding(*rows: int) -> Iterator[Case]:
    """Warm: copies of a table this large would be gigabytes."""
    return _layers("embedding_4bit", (MODELS["Mixtral 8x7B"]["embedding"],), rows, backward=(False,), cache="warm")


def _quick(device: str) -> Iterator[Case]:
    """Seconds: every op once, forward and backward."""
    for op, entry in OPS.items():
        for m in (1, 5) if entry.rows else (None,):
            for backward in (False, True) if entry.backward else (False,):
                yield Case(op, (128, 256), BF16, m, backward, "cold")


def _default_cpu(device: str) -> Iterator[Case]:
    """About ten minutes on two cores. Square weights fit into the cache in 4 bits, the others do not."""
    square, up, down = (4096, 4096), (14336, 4096), (4096, 14336)
    rows = (1, 4, 16, 64, 256, 1024)
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        yield Case(op, square, BF16, cache="warm")
        yield Case(op, up, BF16)
    for op in ("quantize_4bit", "dequantize_4bit", "quantize_int8"):
        yield Case(op, square, torch.float32, cache="warm")
    for op in ("linear_4bit", "linear_int8"):
        yield from _layers(op, (square,), rows, cache="warm")
        yield from _layers(op, (up, down), rows, backward=(False,))
        yield from _layers(op, (up, down), (64, 256, 1024), backward=(True,))
    yield from _layers("linear_4bit", (square,), (1, 64, 256), torch.float32, (False,), cache="warm")
    yield from _layers("linear_4bit", (square,), (1, 16), torch.float16, (False,), cache="warm")
    yield from _embedding(1, 64, 1024)
    for op in ("lora_linear_4bit", "lora_linear_int8"):
        yield from _layers(op, (square,), (16, 128, 1024), backward=(True,), cache="warm")
        yield from _layers(op, (up,), (256,), backward=(True,))


def _default_cuda(device: str) -> Iterator[Case]:
    """Most valuable first: a run may be cut short."""
    llama8, llama70 = ((4096, 4096), (14336, 4096), (4096, 14336)), ((8192, 8192), (28672, 8192), (8192, 28672))
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        for shape in ((4096, 4096), (14336, 4096), (8192, 28672)):
            yield Case(op, shape, BF16)
    yield from _layers("linear_4bit", ((4096, 4096), (8192, 28672)), (1, 16, 64, 256, 2048, 8192))
    yield from _layers("linear_int8", ((4096, 4096), (8192, 28672)), (1, 16, 256, 2048, 8192))
    yield from _layers("lora_linear_4bit", ((4096, 4096), (14336, 4096)), (2048, 8192), backward=(True,))
    yield from _layers("lora_linear_int8", ((4096, 4096),), (2048, 8192), backward=(True,))
    yield from _embedding(1, 1024, 16384)
    yield from _layers(
        "linear_4bit", llama8[1:] + llama70[:2], (1, 4, 16, 64, 256, 1024, 4096, 16384), backward=(False,)
    )
    yield from _layers("linear_int8", llama8[1:] + llama70[:2], (1, 16, 256, 2048), backward=(False,))


def _full(device: str) -> Iterator[Case]:
    """Every layer of MODELS, M from 1 to 16384, three dtypes for the transforms. Hours."""
    layers = {layer: None for model in MODELS.values() for name, layer in model.items() if name != "embedding"}
    rows = tuple(4**i for i in range(8))
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        for shape in layers:
            for dtype in (BF16, torch.float16, torch.float32):
                yield Case(op, shape, dtype)
    for op in ("linear_4bit", "linear_int8", "lora_linear_4bit", "lora_linear_int8"):
        yield from _layers(op, layers, rows)
    yield from _embedding(*rows)


def suite(name: str, device: str) -> list[Case]:
    """The cases of "quick", "default" or "full" for a kind of device ("cpu", "cuda"), those of one group together.

    Raises:
        ValueError: unknown name.
    """
    makers = {"quick": _quick, "default": _default_cuda if device == "cuda" else _default_cpu, "full": _full}
    if name not in makers:
        raise ValueError(f"suite is {name!r}; allowed: {', '.join(makers)}")
    return list(dict.fromkeys(makers[name](device)))
