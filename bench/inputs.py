"""A case, and its inputs: weights, made once per shape, and rows (activations, gradients), made for every M.

Weights hold w, the tensor that is quantized; q, our quantization of it; decoded, q in the dtype of w; and for LoRA A
and B. Rows hold x, and dy if the case goes backward; or indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
from torch import Tensor

from quantlib import Quantized4bit, QuantizedInt8, quantize_4bit, quantize_int8, reference

RANK, SCALING, THRESHOLD, OUTLIER_COLUMNS = 16, 2.0, 6.0, 4
DROPOUT = 0.05
SAMPLED_ROWS = 64  # of y and dx are compared: the truth in float64 is slow


@dataclass(frozen=True)
class Case:
    """One point: an op at a shape, with m rows (None for ops on weights alone), in a dtype.

    shape: [out, in] of a weight, [experts, out, in] of several, [columns] where there is none.

    cache: "warm" repeats on the same data; "cold" cycles through copies that exceed the cache together.
    """

    op: str
    shape: tuple[int, ...]
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
        shape, dtype = dimensions(self.shape), str(self.dtype).removeprefix("torch.")
        return f"{self.op}{way} {shape}{rows} {dtype} {self.cache}"


def dimensions(shape: Sequence[int]) -> str:
    """As tables and plots spell a shape: 4096x14336."""
    return "x".join(map(str, shape))


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


def weights_4bit(case: Case, source: Source, **options: object) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    q = quantize_4bit(w, "nf4", 64, **options)
    return SimpleNamespace(w=w, q=q, decoded=reference.dequantize_4bit(*q.op_args(), q.shape, w.dtype))


def exact_4bit(w: SimpleNamespace) -> Tensor:
    return reference.dequantize_4bit(*w.q.op_args(), w.q.shape, torch.float64)


def decode_int8(q: QuantizedInt8, dtype: torch.dtype) -> Tensor:
    return reference.dequantize_int8(q.values, q.absmax, q.dim, q.block_size, dtype)


def weights_int8(case: Case, source: Source) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    q = quantize_int8(w)
    return SimpleNamespace(w=w, q=q, decoded=decode_int8(q, w.dtype))


def with_lora(weights: Callable[..., SimpleNamespace]) -> Callable[..., SimpleNamespace]:
    def make(case: Case, source: Source, **options: object) -> SimpleNamespace:
        inputs = weights(case, source, **options)
        inputs.A = source.normal(RANK, case.shape[1], dtype=case.dtype, scale=0.02)
        inputs.B = source.normal(case.shape[0], RANK, dtype=case.dtype, scale=0.02)
        return inputs

    return make


def rows_of(case: Case, source: Source) -> SimpleNamespace:
    x = source.normal(case.m, case.shape[1], dtype=case.dtype)
    dy = source.normal(case.m, case.shape[0], dtype=case.dtype) if case.backward else None
    return SimpleNamespace(x=x, dy=dy)


def rows_with_outliers(case: Case, source: Source) -> SimpleNamespace:
    """A few columns are large in every row, as in the activations of large models."""
    rows = rows_of(case, source)
    columns = torch.linspace(0, case.shape[1] - 1, OUTLIER_COLUMNS).long()
    rows.x[:, columns.to(rows.x.device)] *= 10
    rows.x[:, 0] += 2 * THRESHOLD
    return rows


def no_weights(case: Case, source: Source) -> SimpleNamespace:
    """Only something that tells where the op is to run."""
    return SimpleNamespace(w=source.normal(1, dtype=case.dtype))


def rows_and_seed(case: Case, source: Source) -> SimpleNamespace:
    x = source.normal(case.m, case.shape[-1], dtype=case.dtype)
    return SimpleNamespace(x=x, seed=source.integers(1 << 62, 1))


def exact_int8(w: SimpleNamespace) -> Tensor:
    return decode_int8(w.q, torch.float64)


def weights_int8_columns(case: Case, source: Source) -> SimpleNamespace:
    w = source.normal(*case.shape, dtype=case.dtype, scale=0.02)
    return SimpleNamespace(w=w, q=quantize_int8(w, dim=0))


def weights_4bit_double(case: Case, source: Source) -> SimpleNamespace:
    return weights_4bit(case, source, double_quant=True)
