"""Dropout whose mask is a function of a seed alone, so that a backward pass draws it again.

Random words by Philox4x32-10 (Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405): one counter gives the
words of four consecutive elements. `survivors` is there for other kernels that drop what they read
or write.

A thread has one counter at a time, whose words are already where they are used: 8 bytes of a 16-bit dtype. On
sm_90 an element costs 28 instructions; streaming 16-bit elements leaves an H200 time for 27.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

TILE = {"GROUPS": 128, "PARTS": 2}
_ONE = 1 << 24  # probabilities are fractions of 24 bits


@triton.jit
def random_words(seed, group):
    """The words of elements 4 * group ... 4 * group + 3: four uint32 tensors. seed: int64. group: int64 tensor."""
    key_0, key_1 = seed.to(tl.uint32), (seed >> 32).to(tl.uint32)
    c0, c1 = group.to(tl.uint32), (group >> 32).to(tl.uint32)
    c2 = tl.zeros(group.shape, tl.uint32)
    c3 = c2
    for _ in tl.static_range(10):
        # One wide product each, where tl.philox takes two: its upper half, then its lower half.
        p0 = c0.to(tl.uint64) * 0xD2511F53
        p1 = c2.to(tl.uint64) * 0xCD9E8D57
        c0 = (p1 >> 32).to(tl.uint32) ^ c1 ^ key_0
        c1 = p1.to(tl.uint32)
        c2 = (p0 >> 32).to(tl.uint32) ^ c3 ^ key_1
        c3 = p0.to(tl.uint32)
        key_0 += 0x9E3779B9
        key_1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def kept(words, threshold):
    """Whether elements survive; threshold: ceil(p * 2**24), int32."""
    return (words >> 8).to(tl.int32) >= threshold


@triton.jit
def survivors(seed, row, start, columns, threshold, DROP: tl.constexpr, K: tl.constexpr):
    """Dropout's mask of a tile [M, K] of a matrix. row: [M] int64. start: the first of K columns.

    DROP: how many neighbours share a counter, see `sharing`; 4 divides start.
    """
    if DROP == 4:
        group = row[:, None] * (columns // 4) + (start // 4 + tl.arange(0, K // 4))[None, :]
        a, b, c, d = random_words(tl.load(seed), group)
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    else:
        element = row[:, None] * columns + (start + tl.arange(0, K))[None, :]
        a, b, c, d = random_words(tl.load(seed), element >> 2)
        lane = element & 3
        words = tl.where(lane < 2, tl.where(lane == 0, a, b), tl.where(lane == 2, c, d))
    return kept(words, threshold)


@triton.jit(do_not_specialize=["threshold"])
def _dropout_kernel(x, seed, out, n, threshold, scale, GROUPS: tl.constexpr, PARTS: tl.constexpr):
    key = tl.load(seed)
    for part in tl.static_range(PARTS):
        start = (tl.program_id(0).to(tl.int64) * PARTS + part) * GROUPS
        a, b, c, d = random_words(key, start + tl.arange(0, GROUPS))
        words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        element = start * 4 + tl.arange(0, 4 * GROUPS)
        scaled = tl.load(x + element, mask=element < n, other=0.0).to(tl.float32) * scale
        result = tl.where(kept(words, threshold), scaled, 0.0).to(out.dtype.element_ty)
        tl.store(out + element, result, mask=element < n)


def sharing(columns: int) -> int:
    """How many neighbours in a matrix of so many columns always share a counter: what kernels take as DROP, if any."""
    return 4 if columns % 4 == 0 else 1


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
    grid = (triton.cdiv(n, 4 * TILE["GROUPS"] * TILE["PARTS"]),)
    threshold, scale = dropout_constants(p)
    launch(_dropout_kernel, grid, x, seed, out, n, threshold, scale, fp_fusion=False, **TILE)
    return out
