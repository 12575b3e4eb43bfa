"""Sums that several programs share: each writes its part to a float32 workspace, and one kernel adds them in order.

That gives the same bits on every run, which atomic additions would not.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = 1024


@triton.jit(do_not_specialize=["count"])
def sum_kernel(parts, out, count, size, BLOCK: tl.constexpr):
    """out [size] = the sum of parts [count, size], float32."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for _ in tl.range(0, count, loop_unroll_factor=4):  # so that loads do not wait for each other
        total += tl.load(parts + index, mask=index < size, other=0.0)
        parts += size
    tl.store(out + index, total.to(out.dtype.element_ty), mask=index < size)


def sum_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """The sum of parts, [count, ...] float32, over the first dimension, rounded to `dtype` once."""
    out = torch.empty(parts.shape[1:], dtype=dtype, device=parts.device)
    size = out.numel()
    launch(sum_kernel, (triton.cdiv(size, BLOCK),), parts, out, parts.shape[0], size, fp_fusion=True, BLOCK=BLOCK)
    return out
