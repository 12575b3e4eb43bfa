"""The last steps of LLM.int8(), which all its kernels share: scales, a LoRA branch, bias, and the one rounding.

The branch (`branch.py`) is added to the sums where they are, in registers, which have no room for a second tile: the
sums are divided by its scaling first and multiplied by it afterwards.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from .branch import Lora, add_products, branch_arguments
from .launch import dot

_STEP = tl.constexpr(1 / 127)
_ARGUMENTS = ("lora_s", "lora_b", "rank", "stride_feature", "stride_factor", "scaling", "RANK")


def epilogue_arguments(lora: Lora | None, x: Tensor) -> dict[str, Any]:
    """What `store_int8` wants to know of a branch without dropout, by name."""
    arguments = branch_arguments(lora, x)
    return {name: arguments[name] for name in _ARGUMENTS}


@triton.jit
def product(a, b, acc, WEIGHT_FIRST: tl.constexpr):
    """acc + a b^T, or acc + b a^T if the weight, b, is the first operand."""
    return dot(b, tl.trans(a), acc) if WEIGHT_FIRST else dot(a, tl.trans(b), acc)


@triton.jit
def _few_products(m, n, M, N, lora_s, lora_b, rank, stride_feature, stride_factor, RANK: tl.constexpr):
    """s b^T for fewer rows than a product of matrices takes."""
    acc = tl.zeros((m.shape[0], n.shape[0], RANK), tl.float32)
    for first in range(0, rank, RANK):
        factor = first + tl.arange(0, RANK)
        at = n[:, None].to(tl.int64) * stride_feature + factor[None, :].to(tl.int64) * stride_factor
        b = tl.load(lora_b + at, mask=(n < N)[:, None] & (factor < rank)[None, :], other=0.0)
        at = m[:, None].to(tl.int64) * rank + factor[None, :]
        s = tl.load(lora_s + at, mask=(m < M)[:, None] & (factor < rank)[None, :], other=0.0)
        acc += s.to(tl.float32)[:, None, :] * b.to(s.dtype).to(tl.float32)[None, :, :]
    return tl.sum(acc, 2)


@triton.jit
def store_int8(y, total, w_absmax, bias, lora, m, n, M, N, RANK: tl.constexpr, WEIGHT_FIRST: tl.constexpr):
    """y = total * w_absmax / 127 + a branch + bias for rows m and columns n; total is [n, m] if WEIGHT_FIRST.

    lora: the arguments of the same names, (lora_s, lora_b, rank, stride_feature, stride_factor, scaling).
    """
    axis: tl.constexpr = 1 if WEIGHT_FIRST else 0
    total *= tl.expand_dims(tl.load(w_absmax + n, mask=n < N, other=0.0) * _STEP, axis)
    if RANK > 0:
        s, b, rank, stride_feature, stride_factor, scaling = lora
        if m.shape[0] < 16:
            total += scaling * _few_products(m, n, M, N, s, b, rank, stride_feature, stride_factor, RANK)
        else:
            DTYPE: tl.constexpr = y.dtype.element_ty
            row = tl.minimum(m, M - 1).to(tl.int64)
            total *= tl.div_rn(1.0, scaling)
            total = add_products(total, s, b, row, n, N, rank, stride_feature, stride_factor, DTYPE, RANK, WEIGHT_FIRST)
            total *= scaling
    if bias is not None:
        total += tl.expand_dims(tl.load(bias + n, mask=n < N, other=0.0).to(tl.float32), axis)
    if WEIGHT_FIRST:
        total = tl.trans(total)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m[:, None] < M) & (n[None, :] < N))
