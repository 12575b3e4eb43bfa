"""Quantize, dequantize and multiply: the public functions, with autograd.

Each function checks its arguments, asks `quantlib.backends` for the kernel, and, where a gradient can flow,
wraps it in an `autograd.Function` that saves the packed weight only. Quantized weights are frozen: gradients
reach x and the bias, never the weight.

`matmul` and `matmul_dx` are the two halves without autograd, for building fused functions on top.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantlib import formats, ops
from quantlib.backends import kernel
from quantlib.formats import Quantized4bit, QuantizedInt8


def _run(op: str, device: torch.device, *args: Any) -> Any:
    ops.CHECKS[op](*args)
    return kernel(op, device)(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device_type: str) -> torch.dtype | None:
    """The dtype of the autocast in force, None without one."""
    if device_type != "meta" and torch.is_autocast_enabled(device_type):
        return torch.get_autocast_dtype(device_type)
    return None


def _autocast(x: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Under autocast a linear computes in the autocast dtype, as `F.linear` does."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return x, bias
    return x.to(dtype), None if bias is None else bias.to(dtype)


def _bias_grad(dy: Tensor) -> Tensor:
    return dy.reshape(-1, dy.shape[-1]).sum(0)


# ---------------------------------------------------------------------------------------------------
# 4-bit


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    quant_storage: torch.dtype = torch.uint8,
) -> Quantized4bit:
    """Quantizes to NF4 or FP4 in blocks along the flattened row-major tensor (QLoRA, arXiv 2305.14314).

    Args:
        weight: any shape and strides; float32, float16 or bfloat16.
        quant_type: "nf4" or "fp4".
        block_size: elements that share one absmax; 32, 64, ... 4096.
        double_quant: store absmax as 8-bit codes in blocks of 256 (0.127 instead of 0.5 bits a weight at 64).
        quant_storage: dtype that the packed bytes are viewed as, so that FSDP can shard them with the rest.

    Returns:
        Quantized4bit. An all-zero block decodes to zeros and a block with a NaN to NaN. Infinities, of either
        sign, decode to +inf and the rest of their block to NaN, as in bitsandbytes.

    Raises:
        TypeError: dtype of `weight`. ValueError: quant_type, block_size, or bytes that do not fill quant_storage.
    """
    weight = weight.detach()
    packed, absmax = _run("quantize_4bit", weight.device, weight, quant_type, block_size)
    if packed.numel() % quant_storage.itemsize:
        raise ValueError(
            f"quantlib.quantize_4bit: {packed.numel()} packed bytes do not fill quant_storage {quant_storage}; "
            "use torch.uint8"
        )
    nested: tuple[Tensor | None, ...] = (None, None, None)
    if double_quant:
        absmax, *nested = formats.quantize_absmax(absmax)
    return Quantized4bit(
        packed.view(-1).view(quant_storage).view(-1, 1),
        absmax,
        *nested,
        quant_type=quant_type,
        block_size=block_size,
        shape=weight.shape,
        dtype=weight.dtype,
    )


def dequantize_4bit(q: Quantized4bit, dtype: torch.dtype | None = None) -> Tensor:
    """Decodes: `dtype(codebook[code] * absmax)`, both factors float32, rounded once.

    Args:
        q: a quantized tensor. dtype: float32, float16 or bfloat16; the original dtype by default.

    Returns:
        Tensor of shape `q.shape`.
    """
    return _run("dequantize_4bit", q.packed.device, *q.op_args(), q.shape, dtype or q.dtype)


def _matrix(op: str, q: Quantized4bit) -> tuple[int, int]:
    if len(q.shape) != 2:
        raise ValueError(f"quantlib.{op}: the weight has shape {tuple(q.shape)}; expected [out_features, in_features]")
    return q.shape[0], q.shape[1]


class _Linear4bit(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size, out):
        weight = (packed, absmax, nested_absmax, nested_codebook, offset)
        ctx.save_for_backward(*weight)
        ctx.format = (quant_type, block_size, x.shape[-1])
        return _run("linear_4bit", x.device, x, *weight, quant_type, block_size, out, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = db = None
        if ctx.needs_input_grad[0]:
            dx = _run("linear_4bit_dx", dy.device, dy, *ctx.saved_tensors, *ctx.format)
        if ctx.needs_input_grad[1]:
            db = _bias_grad(dy)
        return dx, db, *(None,) * 8


def linear_4bit(x: Tensor, q: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """`x W^T + bias` with a 4-bit W, decoded inside the kernel; differentiable in x and bias.

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides. q: [out_features, in_features].
        bias: [out_features] in the dtype of x, or None. Under autocast x and bias are cast first.

    Returns:
        [..., out_features] in the dtype of x; products accumulate in float32.

    Raises:
        TypeError: a dtype. ValueError: a shape or a device.
    """
    out_features, in_features = _matrix("linear_4bit", q)
    ops._check_last_dim("linear_4bit", "x", x, in_features, "in_features")
    x, bias = _autocast(x, bias)
    if needs_grad(x, bias):
        return _Linear4bit.apply(x, bias, *q.op_args(), out_features)
    return _run("linear_4bit", x.device, x, *q.op_args(), out_features, bias)


def embedding_4bit(indices: Tensor, q: Quantized4bit, dtype: torch.dtype | None = None) -> Tensor:
    """Gathers and decodes rows of a 4-bit table.

    Args:
        indices: int64 or int32, any shape. q: [num_embeddings, embedding_dim]. dtype: of the result.

    Returns:
        [*indices.shape, embedding_dim].

    Raises:
        RuntimeError: an index out of range, on CPU (IndexError from the reference). TypeError, ValueError: dtypes
        and shapes.
    """
    num_embeddings, embedding_dim = _matrix("embedding_4bit", q)
    args = (indices, *q.op_args(), num_embeddings, embedding_dim, dtype or q.dtype)
    return _run("embedding_4bit", indices.device, *args)


# ---------------------------------------------------------------------------------------------------
# int8


def quantize_int8(
    x: Tensor, dim: int | None = -1, block_size: int | None = None, threshold: float = 0.0
) -> QuantizedInt8:
    """absmax int8: `round_half_even(x * (1 / absmax * 127))` in float32, absmax kept in float32.

    Args:
        x: float32, float16 or bfloat16, any strides.
        dim: -1 for one absmax a row (all leading dimensions), 0 for one a column of a matrix, None for one in
            all, or one per `block_size` elements of the flattened tensor.
        threshold: with dim=-1, an element of magnitude >= threshold is an outlier: it does not count for absmax,
            and its whole column is zeroed in `values` and set in `outliers` (LLM.int8(), arXiv 2208.07339). 0: off.

    Returns:
        QuantizedInt8. Where absmax is not finite, the values are 0 and decode to NaN.

    Raises:
        TypeError: dtype. ValueError: dim, block_size, threshold.
    """
    x = x.detach()
    values, absmax, outliers = _run("quantize_int8", x.device, x, dim, block_size, float(threshold))
    return QuantizedInt8(values, absmax, outliers if threshold > 0 else None, dim, block_size, x.dtype)


def dequantize_int8(q: QuantizedInt8, dtype: torch.dtype | None = None) -> Tensor:
    """`dtype(values * absmax / 127)`, computed in float32; outlier columns decode to 0.

    Args:
        q: quantized tensor. dtype: float32, float16 or bfloat16; the original dtype by default.
    """
    return _run("dequantize_int8", q.values.device, q.values, q.absmax, q.dim, q.block_size, dtype or q.dtype)


def _rows(op: str, q: QuantizedInt8) -> None:
    if q.dim != -1:
        raise ValueError(f"quantlib.{op}: the weight is quantized with dim={q.dim}; expected dim=-1 (one absmax a row)")


class _LinearInt8(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, bias, values, absmax, threshold):
        ctx.save_for_backward(values, absmax)
        return _run("linear_int8", x.device, x, values, absmax, bias, threshold)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        dx = _run("linear_int8_dx", dy.device, dy, *ctx.saved_tensors) if ctx.needs_input_grad[0] else None
        db = _bias_grad(dy) if ctx.needs_input_grad[1] else None
        return dx, db, None, None, None


def linear_int8(x: Tensor, q: QuantizedInt8, bias: Tensor | None = None, threshold: float = 6.0) -> Tensor:
    """LLM.int8(): x is quantized per row, multiplied in int8, outlier columns in 16 bit (arXiv 2208.07339).

    Columns of x with an element of magnitude >= threshold are multiplied in the dtype of x with the decoded
    columns of the weight; all others as int8 x int8 -> int32. Differentiable in x (straight through the
    quantization, on the decoded weight) and bias.

    Args:
        x: [..., in_features], float32, float16 or bfloat16. q: [out_features, in_features] with dim=-1.
        bias: [out_features] in the dtype of x, or None. threshold: 0 turns the outlier split off.

    Returns:
        [..., out_features] in the dtype of x, rounded once.

    Raises:
        TypeError: a dtype. ValueError: a shape, a device, threshold < 0, or a weight not quantized by row.
    """
    _rows("linear_int8", q)
    x, bias = _autocast(x, bias)
    args = (q.values, q.absmax, float(threshold))
    if needs_grad(x, bias):
        return _LinearInt8.apply(x, bias, *args)
    return _run("linear_int8", x.device, x, q.values, q.absmax, bias, float(threshold))


# ---------------------------------------------------------------------------------------------------
# Halves for fused functions


def matmul(
    x: Tensor, weight: Tensor | Quantized4bit | QuantizedInt8, bias: Tensor | None = None, threshold: float = 6.0
) -> Tensor:
    """`x W^T + bias` without autograd, for any kind of weight [out_features, in_features]."""
    with torch.no_grad():
        if isinstance(weight, Quantized4bit):
            return linear_4bit(x, weight, bias)
        if isinstance(weight, QuantizedInt8):
            return linear_int8(x, weight, bias, threshold)
        return torch.nn.functional.linear(x, weight, bias)


def matmul_dx(dy: Tensor, weight: Tensor | Quantized4bit | QuantizedInt8) -> Tensor:
    """`dy W` without autograd: [..., out_features] -> [..., in_features]."""
    with torch.no_grad():
        if isinstance(weight, Quantized4bit):
            _, in_features = _matrix("linear_4bit_dx", weight)
            return _run("linear_4bit_dx", dy.device, dy, *weight.op_args(), in_features)
        if isinstance(weight, QuantizedInt8):
            _rows("linear_int8_dx", weight)
            return _run("linear_int8_dx", dy.device, dy, weight.values, weight.absmax)
        return dy @ weight
