"""A product of low rank as part of a larger one, added to its float32 sums so that both are rounded once.

    out = a large product + dropout(scaling * s b^T)

Forward s = drop(x) A^T and b = B; backward, for dx, s = ds and b = A^T, and dropout lies on the branch. Any rank: its
factors are taken in turns. Dropout's mask is drawn with rows first, as four neighbours of a row share a counter, and
turned where the product holds features first.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from .dropout import dropout_constants, sharing, survivors
from .launch import architecture, dot
from .low_rank_tiles import branch_factors


class Lora(NamedTuple):
    """What a kernel adds to its product: dropout(scaling * s b^T).

    s: [rows, rank], contiguous, in the product's dtype. b: [features, rank], any strides and float dtype;
    [experts, features, rank], contiguous, for experts. seed, p: as `dropout` takes them; seed None for none.
    """

    s: Tensor
    b: Tensor
    scaling: float = 1.0
    seed: Tensor | None = None
    p: float = 0.0


def branch_arguments(lora: Lora | None, stand_in: Tensor) -> dict[str, Any]:
    """Arguments and constexprs of a kernel that takes a branch, by name. stand_in: for pointers that are not there."""
    if lora is None:
        pointers = dict.fromkeys(("lora_s", "lora_b", "lora_seed"), stand_in)
        numbers = {"rank": 0, "stride_feature": 0, "stride_factor": 0, "scaling": 1.0, "threshold": 0}
        return pointers | numbers | {"RANK": 0, "DROP": 0}
    s, b, scaling, seed, p = lora
    threshold, scale = (0, 1.0) if seed is None else dropout_constants(p)
    rank = s.shape[1]
    return {
        "lora_s": s,
        "lora_b": b,
        "lora_seed": stand_in if seed is None else seed,
        "rank": rank,
        "stride_feature": b.stride(-2),
        "stride_factor": b.stride(-1),
        "scaling": scaling * scale,
        "threshold": threshold,
        "RANK": branch_factors(architecture(s.device), rank, s.dtype),
        "DROP": 0 if seed is None else sharing(b.shape[-2]),
    }


@triton.jit
def add_products(
    acc,
    lora_s,
    lora_b,
    row,
    feature,
    features,
    rank,
    stride_feature,
    stride_factor,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    FEATURES_FIRST: tl.constexpr,
):
    """acc + s b^T for rows, all of which exist (int64), and features; acc is [features, rows] if FEATURES_FIRST."""
    for first in tl.range(0, rank, RANK, num_stages=1):
        factor = first + tl.arange(0, RANK)
        exists = (factor < rank)[None, :]
        b = lora_b + feature[:, None].to(tl.int64) * stride_feature + factor[None, :].to(tl.int64) * stride_factor
        b = tl.load(b, mask=exists & (feature < features)[:, None], other=0.0).to(DTYPE)
        s = tl.load(lora_s + row[:, None] * rank + factor[None, :], mask=exists, other=0.0)
        acc = dot(b, tl.trans(s), acc) if FEATURES_FIRST else dot(s, tl.trans(b), acc)
    return acc


@triton.jit
def branch(
    lora,
    row,
    start,
    features,
    DTYPE: tl.constexpr,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    FEATURES_FIRST: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A tile of the branch in float32, [rows, BLOCK], or [BLOCK, rows] if FEATURES_FIRST.

    lora: (lora_s, lora_b, lora_seed, rank, stride_feature, stride_factor, scaling, threshold). row: [rows] int64, all
    of which exist. start: the first of BLOCK features; those from `features` on are 0. DROP: see `dropout.survivors`,
    0 for none.
    """
    s, b, seed, rank, stride_feature, stride_factor, scaling, threshold = lora
    feature = start + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK, row.shape[0]) if FEATURES_FIRST else (row.shape[0], BLOCK), tl.float32)
    acc = add_products(
        acc, s, b, row, feature, features, rank, stride_feature, stride_factor, DTYPE, RANK, FEATURES_FIRST
    )
    if DROP > 0:
        kept = survivors(seed, row, start, features, threshold, DROP, BLOCK)
        acc = tl.where(tl.trans(kept) if FEATURES_FIRST else kept, acc, 0.0)
    return acc * scaling
