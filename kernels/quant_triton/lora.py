"""LoRA (arXiv:2106.09685) on a frozen quantized base, forward and backward.

    s = drop(x) a^T      y = x W^T + bias + scaling * s b^T
    ds = scaling * dy b  db = scaling * dy^T s  da = ds^T drop(x)  dx = dy W + drop'(ds a)

The branch is under 1% of the arithmetic; what it costs is passes over x, y and dy. Forward, one over x gives s; the
rest is the epilogue of the base product, or costs nothing at all where many rows make it worthwhile to decode W first:
then W + scaling * b a is written instead (`merge.py`), unless dropout lies between. Backward, one pass over dy gives ds
and db, one over x da, and dx takes its branch as y does, with dropout's mask drawn again where it lies on the branch.
Only many rows with dropout or many adapters need another pass over y and dx, as the vendor's product comes before. s,
rank numbers a row, is kept from the forward pass.

With a `Gate` a batch is served by many adapters of mixed ranks: a and b are those of all adapters, one below the other
and side by side, and each row has its own adapter or none.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .branch import Lora
from .codes import Weight, checked_weight, codebook
from .int8 import DX_ROWS, LEAST_SCALING, linear_int8, linear_int8_dx
from .linear_4bit import fused, linear_4bit, rows_of, settings_for
from .linear_4bit_backward import fused_dx, linear_4bit_dx, settings_for_dx
from .low_rank import Gate, add_branch_, gradient_a, gradients_dy, project
from .merge import SPAN, merge


def _merged_4bit(weight: Weight, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    packed, absmax, *nested, quant_type, block_size = weight
    return merge(packed, absmax, tuple(nested), codebook(quant_type, packed.device), block_size, a, b, scaling, dtype)


def _merged_int8(values: Tensor, absmax: Tensor, a: Tensor, b: Tensor, scaling: float, dtype: torch.dtype) -> Tensor:
    return merge(values, absmax, (None, None, None), None, 1, a, b, scaling, dtype)


def _kept(s: Tensor | None, x: Tensor, a: Tensor, keep_s: bool) -> Tensor:
    return s.view(*x.shape[:-1], a.shape[0]) if keep_s else x.new_empty(0)


def lora_linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    keep_s: bool,
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor]:
    """`x W^T + bias + scaling * dropout(x) a^T b^T` with a 4-bit W, [out_features, in_features].

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides. packed ... block_size: see `dequantize_4bit`.
        bias: [out_features] in x's dtype, or None. a: [rank, in_features], b: [out_features, rank]: any float dtype.
        scaling: factor of the branch. seed, p: of the dropout, as `dropout` takes them; seed None for none.
        keep_s: whether a backward pass will need s. gate: of many adapters; their scalings are its, times `scaling`.

    Returns:
        y, [..., out_features], and s = dropout(x) a^T, [..., rank], both in x's dtype; s is empty unless keep_s.
    """
    weight = checked_weight(
        "lora_linear_4bit", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    rows, a, b = rows_of(x), a.contiguous(), b.contiguous()
    k, n = rows.shape[1], b.shape[0]
    settings = settings_for(rows, weight, n)
    merges = seed is None and gate is None and not settings and k % SPAN.value == 0
    s = project(rows, a, seed, p, gate) if keep_s or not merges else None
    if merges:
        y = F.linear(rows, _merged_4bit(weight, a, b, scaling, x.dtype), bias)
    elif settings:
        y = fused(rows, weight, n, bias, settings, lora=Lora(s, b, scaling))
    else:
        y = add_branch_(linear_4bit(rows, *weight, n, bias), Lora(s, b, scaling))
    return y.view(*x.shape[:-1], n), _kept(s, x, a, keep_s)


def lora_linear_int8(
    x: Tensor,
    values: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    keep_s: bool,
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor]:
    """`linear_int8` with the branch of `lora_linear_4bit`, for which x is not quantized."""
    rows, a, b = rows_of(x), a.contiguous(), b.contiguous()
    s = project(rows, a, seed, p, gate)
    lora, base = Lora(s, b, scaling), (rows, values, absmax, bias, threshold)
    y = linear_int8(*base, lora=lora) if abs(scaling) >= LEAST_SCALING else add_branch_(linear_int8(*base), lora)
    return y.view(*x.shape[:-1], b.shape[0]), _kept(s, x, a, keep_s)


def _backward(
    base_dx: Callable[[Tensor, Lora], Tensor],
    merged: Callable[[], Tensor] | None,
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needed: Sequence[bool],
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients for x, a and b.

    base_dx: gives dy W + a branch. merged: gives W + scaling * b a, or None where base_dx is to be asked.
    """
    need_dx, need_da, need_db = needed
    dy, rows, s = rows_of(dy), rows_of(x), rows_of(s).contiguous()
    ds, db = gradients_dy(dy, s, b, scaling, need_da or (need_dx and merged is None), need_db, gate)
    dx = x.new_empty(0)
    if need_dx and merged is not None:
        dx = (dy @ merged()).view(x.shape)
    elif need_dx:
        dx = base_dx(dy, Lora(ds, a.t(), seed=seed, p=p)).view(x.shape)
    da = gradient_a(rows, ds, seed, p, a.dtype, gate) if need_da else a.new_empty(0)
    return dx, da, db if need_db else b.new_empty(0)


def lora_linear_4bit_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needed: Sequence[bool],
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `lora_linear_4bit` for x, a and b.

    Args:
        dy: [..., out_features] in x's dtype, any strides. s: as `lora_linear_4bit` returned it. needed: of dx, da, db;
        the others are returned empty. The rest: as `lora_linear_4bit` took it.

    Returns:
        dx in x's shape and dtype, da in a's, db in b's: sums in float32, rounded to that dtype once.
    """
    weight = checked_weight(
        "lora_linear_4bit_backward", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    a, b, k = a.contiguous(), b.contiguous(), x.shape[-1]
    settings = settings_for_dx(rows_of(dy), weight, k)
    merges = seed is None and gate is None and not settings and k % SPAN.value == 0

    def base_dx(dy: Tensor, lora: Lora) -> Tensor:
        if settings:
            return fused_dx(dy, weight, k, settings, lora=lora)
        return add_branch_(linear_4bit_dx(dy, *weight, k), lora)

    return _backward(
        base_dx,
        (lambda: _merged_4bit(weight, a, b, scaling, x.dtype)) if merges else None,
        *(dy, x, s, a, b, scaling, seed, p, needed, gate),
    )


def lora_linear_int8_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    values: Tensor,
    absmax: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needed: Sequence[bool],
    gate: Gate | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of `lora_linear_int8` for x, a and b, as `lora_linear_4bit_backward` gives them."""
    a, b = a.contiguous(), b.contiguous()
    merges = seed is None and gate is None and dy.numel() > DX_ROWS * b.shape[0]
    return _backward(
        lambda dy, lora: linear_int8_dx(dy, values, absmax, lora=lora),
        (lambda: _merged_int8(values, absmax, a, b, scaling, x.dtype)) if merges else None,
        *(dy, x, s, a, b, scaling, seed, p, needed, gate),
    )
