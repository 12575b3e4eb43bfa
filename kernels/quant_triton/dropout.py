"""Dropout whose mask is a function of a seed alone, so that a backward pass draws it again.

Random words by Philox4x32-10 (Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405): one counter gives the
words of four consecutive elements. `random_words` and `kept` are there for other kernels that drop as they read.

A program of 128 threads has 1024 elements: two counters and 16 bytes of a 16-bit dtype a thread. The ten rounds cost
about 20 instructions an element, which is half of what an H200 executes while it streams 16-bit elements.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

GROUPS_PER_PROGRAM = 256
_ONE = 1 << 24  # probabilities are fractions of 24 bits


@triton.jit
def random_words(seed, group):
    """The words of elements 4 * group ... 4 * group + 3: four uint32 tensors. seed: int64. group: int64 tensor."""
    zero = tl.zeros(group.shape, tl.uint32)
    return tl.philox(seed, group.to(tl.uint32), (group >> 32).to(tl.uint32), zero, zero)


@triton.jit
def kept(words, threshold):
    """Whether elements survive; threshold: ceil(p * 2**24), int32."""
    return (words >> 8).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(x, seed, out, n, threshold, scale, GROUPS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * GROUPS
    a, b, c, d = random_words(tl.load(seed), start + tl.arange(0, GROUPS))
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    element = start * 4 + tl.arange(0, 4 * GROUPS)
    scaled = tl.load(x + element, mask=element < n, other=0.0).to(tl.float32) * scale
    tl.store(out + element, tl.where(kept(words, threshold), scaled, 0.0).to(out.dtype.element_ty), mask=element < n)


def dropout_constants(p: float) -> tuple[int, float]:
    """(threshold, scale) of a kernel that drops with probability p: what `kept` takes and what survivors grow by."""
    return math.ceil(p * _ONE), 1 / (1 - p)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Zeros elements with probability p and scales the others by 1 / (1 - p), rounded once.

    Args:
        x: any shape and strides, float32, float16 or bfloat16; elements are counted in row-major order.
        seed: [1] int64 on x's device, read by the kernel. p: 0 <= p < 1.

    Returns:
        A contiguous tensor of x's shape and dtype. Dropped elements are 0, NaN included.

    Raises:
        ValueError: p out of its range, or a seed that is not one int64.
    """
    if not 0 <= p < 1:
        raise ValueError(f"quant_triton.dropout: p is {p}; it must be in [0, 1)")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"quant_triton.dropout: seed is {seed.dtype} of {seed.numel()} elements; one int64 is needed")
    x = x.contiguous()
    out = torch.empty_like(x)
    n = x.numel()
    grid = (triton.cdiv(n, 4 * GROUPS_PER_PROGRAM),)
    threshold, scale = dropout_constants(p)
    launch(_dropout_kernel, grid, x, seed, out, n, threshold, scale, fp_fusion=False, GROUPS=GROUPS_PER_PROGRAM)
    return out
