"""`lora_linear`: a frozen linear layer, quantized or not, and its LoRA branch as one autograd function.

Notation, as in `lora_ops.reference`: S = drop(x) A^T, of shape [rows, rank]; y = x W^T + b + s S B^T.

The branch is under 1% of the arithmetic; its cost is passes over x, y and dY, casts, copies and saved tensors.
Where the backend has kernels for the whole (`quantlib.ops.COMPOSED`), one registered op does the forward pass and one
the backward pass, with S, rank numbers a row, saved in between if both are there. Elsewhere they are composed here: the
branch is added into the base product in place, dropout and S are recomputed in the backward pass from the seed, nothing
is cast to float32, and the scaling is applied inside the GEMMs, where it costs no rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from quantlib import reference
from quantlib.backends import fused, kernel
from quantlib.formats import Quantized4bit, QuantizedInt8
from quantlib.functional import autocast_dtype, matmul, matmul_dx, needs_grad

Base = Tensor | Quantized4bit | QuantizedInt8


def _flatten(base: Base) -> tuple[tuple[Tensor | None, ...], tuple[Any, ...]]:
    """The tensors of a weight, and what else `_unflatten` needs: autograd sees tensors only as arguments."""
    if isinstance(base, Quantized4bit):
        *tensors, quant_type, block_size = base.op_args()
        return tuple(tensors), (quant_type, block_size, tuple(base.shape), base.dtype)
    if isinstance(base, QuantizedInt8):
        # Not two: with as many arguments as forward has names but one, Dynamo believes that it takes no ctx.
        return (base.values, base.absmax, None), (base.dim, base.block_size, base.dtype)
    return (base,), ()


def _unflatten(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> Base:
    if len(tensors) == 5:
        quant_type, block_size, shape, dtype = rest
        return Quantized4bit(
            *tensors, quant_type=quant_type, block_size=block_size, shape=torch.Size(shape), dtype=dtype
        )
    if len(tensors) == 3:
        return QuantizedInt8(*tensors, *rest)
    return tensors[0]


def _dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    if seed is None:
        return x
    if x.dtype == torch.float64:  # the kernels have no float64; this is what gradcheck runs on
        return reference.dropout(x, seed, p)
    return kernel("dropout", x.device)(x, seed, p)


def _scaled_mm(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """`scale * a @ b`, rounded once."""
    return torch.addmm(a.new_zeros(()), a, b, beta=0, alpha=scale)


def _autocast_off(device_type: str) -> AbstractContextManager:
    return torch.autocast(device_type, enabled=False) if autocast_dtype(device_type) else nullcontext()


def _whole(x: Tensor, tensors: tuple[Tensor | None, ...], suffix: str = "") -> Callable | None:
    """The kernel for base and branch together, None where there is none."""
    op = {5: "lora_linear_4bit", 3: "lora_linear_int8"}.get(len(tensors))
    return None if op is None or x.dtype == torch.float64 else fused(op + suffix, x.device)


def _weight(tensors: tuple[Tensor | None, ...], rest: tuple[Any, ...]) -> tuple[Any, ...]:
    """A quantized weight as such a kernel takes it."""
    return (*tensors, *rest[:2]) if len(tensors) == 5 else tensors[:2]


def _forward(
    x: Tensor,
    A: Tensor,
    B: Tensor,
    bias: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    dropout_p: float,
    threshold: float,
    rest: tuple[Any, ...],
    tensors: tuple[Tensor | None, ...],
    differentiable: bool,
) -> tuple[Tensor, Tensor | None]:
    """y, and S if the backward pass wants it."""
    bias = None if bias is None else bias.to(x.dtype)
    whole = _whole(x, tensors)
    if whole is None:
        y = matmul(x, _unflatten(tensors, rest), bias, threshold)
        return y.addmm_(_dropout(x, seed, dropout_p) @ A.to(x.dtype).t(), B.to(x.dtype).t(), alpha=scaling), None
    of_base = (bias,) if len(tensors) == 5 else (bias, threshold)
    keep = differentiable and _whole(x, tensors, "_backward") is not None
    y, S = whole(x, *_weight(tensors, rest), *of_base, A, B, scaling, seed, dropout_p, keep)
    return y, S if keep else None


class _LoraLinear(torch.autograd.Function):
    """On rows: x [M, in], A [rank, in], B [out, rank], bias [out] -> [M, out]."""

    # ctx is an argument of forward because a separate setup_context costs 30 us a call (torch 2.13, measured).

    @staticmethod
    def forward(ctx, x, A, B, bias, seed, scaling, dropout_p, threshold, rest, *tensors):
        ctx.constants = (scaling, dropout_p, rest, None if bias is None else bias.dtype)
        y, S = _forward(x, A, B, bias, seed, scaling, dropout_p, threshold, rest, tensors, any(ctx.needs_input_grad))
        ctx.save_for_backward(x, A, B, seed, S, *tensors)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        with _autocast_off(dy.device.type):
            return _backward(ctx, dy)


def _backward(ctx, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, A, B, seed, S, *tensors = ctx.saved_tensors
    scaling, dropout_p, rest, bias_dtype = ctx.constants
    *needed, needs_db = ctx.needs_input_grad[:4]
    branch = (A, B, scaling, seed, dropout_p, needed)
    whole = None if S is None else _whole(x, tensors, "_backward")
    if whole is None:
        dx, dA, dB = _composed_backward(dy, x, _unflatten(tuple(tensors), rest), *branch)
    else:
        results = whole(dy, x, S, *_weight(tensors, rest), *branch)
        dx, dA, dB = (result if wanted else None for result, wanted in zip(results, needed, strict=True))
    db = dy.sum(0, dtype=torch.promote_types(dy.dtype, bias_dtype)).to(bias_dtype) if needs_db else None
    return dx, dA, dB, db, *(None,) * (5 + len(tensors))


def _composed_backward(
    dy: Tensor,
    x: Tensor,
    base: Base,
    A: Tensor,
    B: Tensor,
    scaling: float,
    seed: Tensor | None,
    dropout_p: float,
    needed: list[bool],
) -> tuple[Tensor | None, ...]:
    needs_dx, needs_dA, needs_dB = needed
    dx = dA = dB = None
    A_x = A.to(x.dtype)
    dropped = _dropout(x, seed, dropout_p) if needs_dA or needs_dB else None
    if needs_dB:
        dB = _scaled_mm(dy.t(), dropped @ A_x.t(), scaling).to(B.dtype)
    if needs_dA or needs_dx:
        dyB = dy @ B.to(x.dtype)  # dS without the scaling
    if needs_dA:
        dA = _scaled_mm(dyB.t(), dropped, scaling).to(A.dtype)
    del dropped
    if needs_dx:
        dx = matmul_dx(dy, base)
        if seed is None:
            dx.addmm_(dyB, A_x, alpha=scaling)
        else:
            dx.add_(_dropout(_scaled_mm(dyB, A_x, scaling), seed, dropout_p))
    return dx, dA, dB


def _check(x: Tensor, base: Base, A: Tensor, B: Tensor, bias: Tensor | None, dropout_p: float) -> None:
    op = "lora_ops.lora_linear"
    if not isinstance(base, (Tensor, Quantized4bit, QuantizedInt8)):
        raise TypeError(f"{op}: base is a {type(base).__name__}; pass a Tensor, a Quantized4bit or a QuantizedInt8")
    shape = tuple(base.shape)
    if len(shape) != 2:
        raise ValueError(f"{op}: base has shape {shape}; a weight is [out_features, in_features]")
    out_features, in_features = shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"{op}: x has shape {tuple(x.shape)} and base {shape}; the last dimension of x must be {in_features}"
        )
    rank = A.shape[0] if A.dim() else 0
    if rank == 0 or tuple(A.shape) != (rank, in_features):
        raise ValueError(f"{op}: A has shape {tuple(A.shape)}; expected [rank, {in_features}] with rank >= 1")
    if tuple(B.shape) != (out_features, rank):
        raise ValueError(
            f"{op}: B has shape {tuple(B.shape)} and A {tuple(A.shape)}; B must be [{out_features}, {rank}]"
        )
    if bias is not None and tuple(bias.shape) != (out_features,):
        raise ValueError(f"{op}: bias has shape {tuple(bias.shape)}; expected [{out_features}] or None")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p is {dropout_p}; it must be in [0, 1)")
    for name, t in (("base", base), ("A", A), ("B", B), ("bias", bias)):
        if t is not None and t.device != x.device:
            raise ValueError(f"{op}: x is on {x.device} and {name} on {t.device}; move both to one device")
    for name, t in (("x", x), ("A", A), ("B", B), ("bias", bias)):
        if t is not None and not t.is_floating_point():
            raise TypeError(f"{op}: {name} is {t.dtype}; pass a float tensor")
    if isinstance(base, Tensor):
        if base.dtype != x.dtype:
            raise TypeError(f"{op}: base is {base.dtype} and x is {x.dtype}; cast one to the other or use autocast")
        if base.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{op}: base requires grad, but its gradient is never computed; pass base.detach()")


def lora_linear(
    x: Tensor,
    base: Base,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    dropout_p: float = 0.0,
    threshold: float = 6.0,
) -> Tensor:
    """`x W^T + bias + scaling * dropout(x) A^T B^T` with a frozen W (LoRA, arXiv 2106.09685).

    Differentiable once in x, A, B and bias. Saves x, A, B, the packed weight and the dropout seed, and S where a
    kernel for the whole serves; nothing else.

    Args:
        x: [..., in_features], any strides: float32, float16 or bfloat16; float64 with a float64 base.
        base: W [out_features, in_features]: a quantized weight, or a Tensor of the dtype of x that does not
            require grad.
        A: [rank, in_features], B: [out_features, rank]: any float dtype. They are multiplied in the dtype of x;
            their gradients come in their own.
        scaling: factor of the branch, usually alpha / rank.
        bias: [out_features], any float dtype, or None.
        dropout_p: probability in [0, 1) of zeroing an element of x in the branch; 0 in evaluation. The mask comes
            from a seed drawn from torch's generator, so checkpointing replays it.
        threshold: of the outlier split of an int8 base, see `quantlib.linear_int8`.

    Returns:
        [..., out_features] in the dtype of x. Under autocast everything is computed in the autocast dtype.

    Raises:
        TypeError: a dtype, or a base of another type. ValueError: a shape, a device, dropout_p, or a base that
        requires grad.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None and x.dtype != torch.float64:
        x = x.to(dtype)
        base = base.to(dtype) if isinstance(base, Tensor) else base
    _check(x, base, A, B, bias, dropout_p)
    seed = torch.randint(2**63 - 1, (1,), device=x.device) if dropout_p > 0 else None
    tensors, rest = _flatten(base)
    with _autocast_off(x.device.type):
        rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
        args = (rows, A, B, bias, seed, scaling, dropout_p, threshold, rest)
        if needs_grad(x, A, B, bias):
            y = _LoraLinear.apply(*args, *tensors)
        else:  # without autograd, which takes longer than a small kernel
            y, _ = _forward(*args, tensors, differentiable=False)
    return y.view(*x.shape[:-1], y.shape[-1])
