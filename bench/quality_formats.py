"""The formats whose errors `python -m bench quality` measures: how to quantize and decode a weight, ours and theirs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec

import torch
from torch import Tensor, nn

import quantlib
from quantlib.formats import BLOCK_SIZES


@dataclass(frozen=True)
class Format:
    """A way to hold a weight.

    ours: weight [out, in] -> codes as stored, decoded values in float32, bits held per weight. theirs: codes and
    decoded values of bitsandbytes; None where it has no such format.
    """

    name: str
    quant_type: str
    block_size: int | None
    double_quant: bool
    ours: Callable[[Tensor], tuple[Tensor, Tensor, float]]
    theirs: Callable[[Tensor], tuple[Tensor, Tensor]] | None = None


def _bits(nbytes: int, weight: Tensor) -> float:
    return 8 * nbytes / weight.numel()


def four_bits(quant_type: str, block_size: int, double_quant: bool) -> Format:
    """NF4 or FP4."""

    def ours(weight: Tensor) -> tuple[Tensor, Tensor, float]:
        q = quantlib.quantize_4bit(weight, quant_type, block_size, double_quant)
        shared = q.nested_codebook.nbytes if double_quant else 0  # a constant of 1 kB, the same for every weight
        return q.packed, q.dequantize(torch.float32), _bits(q.nbytes - shared, weight)

    def theirs(weight: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes import functional as bnb

        packed, state = bnb.quantize_4bit(
            weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
        )
        state.dtype = torch.float32  # else the decoded values are rounded to 16 bits
        return packed, bnb.dequantize_4bit(packed, state)

    name = f"{quant_type.upper()}, block {block_size}{', double quant' if double_quant else ''}"
    return Format(name, quant_type, block_size, double_quant, ours, theirs)


def int8(name: str, dim: int | None, block_size: int | None) -> Format:
    """absmax int8; bitsandbytes has the one with a scale per row."""

    def ours(weight: Tensor) -> tuple[Tensor, Tensor, float]:
        q = quantlib.quantize_int8(weight, dim, block_size)
        return q.values, q.dequantize(torch.float32), _bits(q.nbytes, weight)

    def theirs(weight: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes import functional as bnb

        values, absmax, _ = bnb.int8_vectorwise_quant(weight.half())
        return values, bnb.int8_vectorwise_dequant(values, absmax)

    return Format(name, "int8", block_size, False, ours, theirs if dim == -1 else None)


def formats() -> Iterator[Format]:
    """Every format, 4 bits first."""
    for quant_type in ("nf4", "fp4"):
        for block_size in BLOCK_SIZES:
            for double_quant in (False, True):
                yield four_bits(quant_type, block_size, double_quant)
    yield int8("int8, row", -1, None)
    yield int8("int8, column", 0, None)
    yield int8("int8, tensor", None, None)
    for block_size in (64, 256, 1024):
        yield int8(f"int8, block {block_size}", None, block_size)


def has_bitsandbytes() -> bool:
    return find_spec("bitsandbytes") is not None


def bitsandbytes_layer(
    linear: nn.Linear, bits: int, quant_type: str, double_quant: bool, threshold: float
) -> nn.Module:
    """bitsandbytes' layer on a copy of the weight of `linear`, in eval mode."""
    import bitsandbytes as bnb

    weight, shape = linear.weight.detach().clone(), (linear.in_features, linear.out_features)
    if bits == 4:
        layer = bnb.nn.Linear4bit(*shape, bias=False, compute_dtype=weight.dtype)
        options = {"requires_grad": False, "quant_type": quant_type, "compress_statistics": double_quant}
        layer.weight = bnb.nn.Params4bit(weight, module=layer, **options)
    else:
        layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=threshold)
        layer.weight = bnb.nn.Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device).eval()
