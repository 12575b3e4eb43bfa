"""Products with factors of low rank, in as few passes over the large operand as there are; `lora.py` is built of them.

`project` reads x once for drop(x) a^T, dropping as it reads. `gradients_dy` reads dy once for dy b and dy^T s.
`gradient_a` reads x once for ds^T drop(x), the mask drawn again. `add_branch_` adds a product to y or dx in place.

Several adapters in one batch are one branch of all their ranks together, whose s is 0 where a row and a factor belong
to different adapters: a `Gate`, applied as s and ds are written. Ranks may differ, and rows may have no adapter. Sums
over rows are taken an adapter at a time, of its rows alone: a NaN in another's is not multiplied by 0, nor even read.

Ranks are rounded up to a power of two, 16 at least; those above 128 (64 on AMD; 16 in a gated sum over rows) are taken
in parts, a program each, which read x or dy again. `project` skips parts that serve none of a program's rows. Factors
may have another dtype than x: they are cast as they are read. Sums that several programs share go through a float32
workspace that is added up in a fixed order, so that results are the same bits on every run.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .branch import Lora, branch, branch_arguments
from .dropout import dropout_constants, sharing, survivors
from .launch import architecture, bucket, config, dot, launch, problem
from .low_rank_tiles import rank_key
from .parts import sum_parts

# ---------------------------------------------------------------------------------------------------
# Kernels


@triton.jit
def _load_where(source, row, column, stride, of_rows, of_columns):
    """A tile of a matrix, 0 where not both its row and its column are wanted. row: int64."""
    wanted = of_rows[:, None] & of_columns[None, :]
    return tl.load(source + row[:, None] * stride + column[None, :], mask=wanted, other=0.0)


@triton.jit
def load_rows(source, row, column, rows, columns):
    """A tile of a contiguous matrix [rows, columns]. row: int64."""
    return _load_where(source, row, column, columns, row < rows, column < columns)


@triton.jit
def _load_kept(x, row, wanted, start, k, stride, seed, threshold, DROP: tl.constexpr, K: tl.constexpr):
    """A tile of x [m, k] from column `start`, 0 in rows that are not wanted and where it is dropped, NaN or not."""
    column = start + tl.arange(0, K)
    tile = _load_where(x, row, column, stride, wanted, column < k)
    if DROP > 0:
        tile = tl.where(survivors(seed, row, start, k, threshold, DROP, K), tile, 0.0)
    return tile


@triton.jit
def _serves(owner, adapter, row, factor, m, rank):
    """[rows, factors]: whether the factor is of the row's adapter."""
    of_row = tl.load(owner + row, mask=row < m, other=-1)
    of_factor = tl.load(adapter + factor, mask=factor < rank, other=-2)
    return of_row[:, None] == of_factor[None, :]


@triton.jit
def _gated(s, owner, adapter, gains, row, factor, m, rank):
    """s [rows, factors] times the gain of each factor where it is of the row's adapter; 0 elsewhere, NaN or not."""
    gain = tl.load(gains + factor, mask=factor < rank, other=0.0)
    return tl.where(_serves(owner, adapter, row, factor, m, rank), s * gain[None, :], 0.0)


@triton.jit
def _adapters(adapter, factor, rank, GATED: tl.constexpr):
    """The first and the last adapter that factors are of; 0 and 0 without a gate."""
    first, last = 0, 0
    if GATED:
        first = tl.min(tl.load(adapter + factor, mask=factor < rank, other=2**31 - 1))
        last = tl.max(tl.load(adapter + factor, mask=factor < rank, other=-1))
    return first, last


@triton.jit
def _of(one, adapters, index, count, GATED: tl.constexpr):
    """Which of some rows or factors exist and are of one adapter; without a gate, which exist."""
    exists = index < count
    if GATED:
        exists &= tl.load(adapters + index, mask=exists, other=-1) == one
    return exists


@triton.jit(do_not_specialize=["m", "threshold", "blocks_per_split"])
def _project_kernel(
    x,
    a,
    out,
    seed,
    owner,
    adapter,
    gains,
    m,
    k,
    rank,
    stride,
    threshold,
    scale,
    blocks_per_split,
    DROP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    factor = tl.program_id(2).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    first = tl.program_id(1) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(k, BLOCK_K))
    if GATED:  # x is not read for factors that serve none of these rows
        last = tl.where(tl.max(_serves(owner, adapter, row, factor, m, rank).to(tl.int32)) > 0, last, first)
    for block in range(first, last):
        start = block * BLOCK_K  # so that its alignment is known
        tile = _load_kept(x, row, row < m, start, k, stride, seed, threshold, DROP, BLOCK_K)
        right = load_rows(a, factor, start + tl.arange(0, BLOCK_K), rank, k).to(tile.dtype)
        acc = dot(tile, tl.trans(right), acc)
    if GATED:
        acc = _gated(acc, owner, adapter, gains, row, factor, m, rank)
    place = out + (tl.program_id(1).to(tl.int64) * m + row)[:, None] * rank + factor[None, :]
    tl.store(place, (acc * scale).to(out.dtype.element_ty), mask=(row < m)[:, None] & (factor < rank)[None, :])


@triton.jit(do_not_specialize=["m", "blocks_per_split"])
def _dy_kernel(
    dy,
    s,
    b,
    ds_parts,
    db_parts,
    owner,
    adapter,
    gains,
    m,
    n,
    rank,
    stride,
    scaling,
    blocks_per_split,
    NEED_DS: tl.constexpr,
    NEED_DB: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    chunk, split = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    column = chunk * BLOCK_N + tl.arange(0, BLOCK_N)
    factor = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    right = load_rows(b, column, factor, n, rank).to(dy.dtype.element_ty)
    first = tl.program_id(1) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(m, BLOCK_M))
    lowest, highest = _adapters(adapter, factor, rank, GATED)
    for one in range(lowest, highest + 1):
        its = _of(one, adapter, factor, rank, GATED)
        if GATED:
            gain = tl.load(gains + factor, mask=its, other=0.0)
        db = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
        for block in range(first, last):
            row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            served = _of(one, owner, row, m, GATED)
            tile = _load_where(dy, row, column, stride, served, column < n)
            if NEED_DS:
                ds = dot(tile, right, tl.zeros((BLOCK_M, BLOCK_R), tl.float32)) * scaling
                if GATED:
                    ds = tl.where(served[:, None], ds * gain[None, :], 0.0)
                place = ds_parts + (chunk * m + row)[:, None] * rank + factor[None, :]
                tl.store(place, ds, mask=(row < m)[:, None] & its[None, :])
            if NEED_DB:
                db = dot(tl.trans(tile), load_rows(s, row, factor, m, rank), db)
        if NEED_DB:
            place = db_parts + (split * n + column)[:, None] * rank + factor[None, :]
            tl.store(place, db * scaling, mask=(column < n)[:, None] & its[None, :])


@triton.jit(do_not_specialize=["m", "blocks_per_split", "threshold"])
def _da_kernel(
    x,
    ds,
    parts,
    seed,
    owner,
    adapter,
    m,
    k,
    rank,
    stride,
    threshold,
    scale,
    blocks_per_split,
    DROP: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    start_k = tl.program_id(0) * BLOCK_K
    factor = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    column = start_k + tl.arange(0, BLOCK_K)
    first = tl.program_id(1) * blocks_per_split
    last = tl.minimum(first + blocks_per_split, tl.cdiv(m, BLOCK_M))
    lowest, highest = _adapters(adapter, factor, rank, GATED)
    for one in range(lowest, highest + 1):
        its = _of(one, adapter, factor, rank, GATED)
        acc = tl.zeros((BLOCK_R, BLOCK_K), tl.float32)
        for block in range(first, last):
            row = block * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
            served = _of(one, owner, row, m, GATED)
            tile = _load_kept(x, row, served, start_k, k, stride, seed, threshold, DROP, BLOCK_K)
            acc = dot(tl.trans(load_rows(ds, row, factor, m, rank)), tile, acc)
        place = parts + (tl.program_id(1).to(tl.int64) * rank + factor)[:, None] * k + column[None, :]
        tl.store(place, acc * scale, mask=its[:, None] & (column < k)[None, :])


@triton.jit(do_not_specialize=["m", "threshold"])
def _add_kernel(
    out,
    m,
    n,
    lora_s,
    lora_b,
    lora_seed,
    rank,
    stride_feature,
    stride_factor,
    scaling,
    threshold,
    RANK: tl.constexpr,
    DROP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    start = tl.program_id(1) * BLOCK_N
    column = start + tl.arange(0, BLOCK_N)
    lora = (lora_s, lora_b, lora_seed, rank, stride_feature, stride_factor, scaling, threshold)
    total = branch(lora, tl.minimum(row, m - 1), start, n, out.dtype.element_ty, RANK, DROP, False, BLOCK_N)
    place = out + row[:, None] * n + column[None, :]
    inside = (row < m)[:, None] & (column < n)[None, :]
    total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)


# ---------------------------------------------------------------------------------------------------
# Launchers


class Gate(NamedTuple):
    """Which factors of a branch serve which rows.

    owner: [m] int32, the adapter of each row, -1 for none. adapter: [rank] int32, the adapter of each factor; adapters
    are numbered as their factors follow each other. scale: [rank] float32, the scaling of its adapter.
    """

    owner: Tensor
    adapter: Tensor
    scale: Tensor


def _dropout(seed: Tensor | None, p: float, columns: int, stand_in: Tensor) -> tuple[Tensor, int, float, int]:
    """seed, threshold, scale and DROP of a kernel that may drop."""
    if seed is None:
        return stand_in, 0, 1.0, 0
    return seed, *dropout_constants(p), sharing(columns)


def _rows(t: Tensor) -> Tensor:
    """A matrix whose rows lie in one piece."""
    return t if t.stride(1) == 1 and t.stride(0) >= t.shape[1] else t.contiguous()


def _narrow_key(rank: int, gate: Gate | None) -> int:
    """The rank that a configuration for a sum over rows is for: the least with a gate, as adapters take a pass each."""
    return rank_key(rank if gate is None else 1)


def _splits(blocks: int, programs: int, device: torch.device) -> tuple[int, int]:
    """How many programs share a sum over so many blocks, so that the GPU is filled twice, and the blocks of each."""
    wanted = triton.cdiv(2 * architecture(device).multiprocessors, max(programs, 1))
    per_split = max(triton.cdiv(blocks, wanted), 1)
    return max(triton.cdiv(blocks, per_split), 1), per_split


def project(x: Tensor, a: Tensor, seed: Tensor | None, p: float, gate: Gate | None = None) -> Tensor:
    """`dropout(x) a^T`, gated.

    Args:
        x: [m, k]. a: [rank, k], contiguous, any float dtype. seed: [1] int64 and p: as in `dropout`; None for none.

    Returns:
        [m, rank] in x's dtype, rounded once.
    """
    (m, k), rank, r, x = x.shape, a.shape[0], rank_key(a.shape[0]), _rows(x)
    seed, threshold, scale, drop = _dropout(seed, p, k, x)
    tile = config("lora_project", x.device, m=bucket(m), k=k, r=r, dtype=x.dtype, drop=drop)
    blocks, parts_of_rank = triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(rank, tile["BLOCK_R"])
    splits, per_split = _splits(triton.cdiv(k, tile["BLOCK_K"]), blocks * parts_of_rank, x.device)
    out = torch.empty((splits, m, rank), dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    arguments = (x, a, out, seed, *(gate or (x,) * 3), m, k, rank, x.stride(0), threshold, scale, per_split)
    constants = {"GATED": gate is not None, "DROP": drop, **tile}
    launch(_project_kernel, (blocks, splits, parts_of_rank), *arguments, fp_fusion=True, **constants)
    return out[0] if splits == 1 else sum_parts(out, x.dtype)


def gradients_dy(
    dy: Tensor, s: Tensor, b: Tensor, scaling: float, need_ds: bool, need_db: bool, gate: Gate | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """`scaling * dy b` in dy's dtype and `scaling * dy^T s` in b's, gated; None for what is not needed.

    Args:
        dy: [m, n]. s: [m, rank], contiguous, in dy's dtype. b: [n, rank], contiguous, any float dtype.
    """
    (m, n), rank, r, dy = dy.shape, b.shape[1], _narrow_key(b.shape[1], gate), _rows(dy)
    tile = config("lora_dy", dy.device, m=bucket(m), n=n, r=r, dtype=dy.dtype)
    chunks, parts_of_rank = triton.cdiv(n, tile["BLOCK_N"]), triton.cdiv(rank, tile["BLOCK_R"])
    splits, per_split = _splits(triton.cdiv(m, tile["BLOCK_M"]), chunks * parts_of_rank, dy.device)
    ds, db = (
        torch.empty(shape if needed else (0,), dtype=torch.float32, device=dy.device)
        for needed, shape in ((need_ds, (chunks, m, rank)), (need_db, (splits, n, rank)))
    )
    arguments = (dy, s, b, ds, db, *(gate or (dy,) * 3), m, n, rank, dy.stride(0), scaling, per_split)
    needs = {"NEED_DS": need_ds, "NEED_DB": need_db, "GATED": gate is not None}
    launch(_dy_kernel, (chunks, splits, parts_of_rank), *arguments, fp_fusion=True, **needs, **tile)
    return sum_parts(ds, dy.dtype) if need_ds else None, sum_parts(db, b.dtype) if need_db else None


def gradient_a(
    x: Tensor, ds: Tensor, seed: Tensor | None, p: float, dtype: torch.dtype, gate: Gate | None = None
) -> Tensor:
    """`ds^T dropout(x)`, gated.

    Args:
        x: [m, k]. ds: [m, rank], contiguous, in x's dtype. seed, p: as in `project`. dtype: of the result, [rank, k].
    """
    (m, k), rank, r, x = x.shape, ds.shape[1], _narrow_key(ds.shape[1], gate), _rows(x)
    seed, threshold, scale, drop = _dropout(seed, p, k, x)
    tile = config("lora_da", x.device, m=bucket(m), k=k, r=r, dtype=x.dtype, drop=drop)
    chunks, parts_of_rank = triton.cdiv(k, tile["BLOCK_K"]), triton.cdiv(rank, tile["BLOCK_R"])
    splits, per_split = _splits(triton.cdiv(m, tile["BLOCK_M"]), chunks * parts_of_rank, x.device)
    parts = torch.empty((splits, rank, k), dtype=torch.float32, device=x.device)
    owner, adapter = gate[:2] if gate else (x, x)
    arguments = (x, ds, parts, seed, owner, adapter, m, k, rank, x.stride(0), threshold, scale, per_split)
    constants = {"GATED": gate is not None, "DROP": drop, **tile}
    launch(_da_kernel, (chunks, splits, parts_of_rank), *arguments, fp_fusion=True, **constants)
    return sum_parts(parts, dtype)


def add_branch_(out: Tensor, lora: Lora) -> Tensor:
    """Adds a branch to `out`, [m, n], contiguous, in place, rounded once more; returns out."""
    (m, n), r, arguments = out.shape, rank_key(lora.s.shape[1]), branch_arguments(lora, out)
    tile = config("lora_add", out.device, m=bucket(m), n=n, r=r, dtype=out.dtype, drop=arguments["DROP"])
    grid = (triton.cdiv(m, tile["BLOCK_M"]), triton.cdiv(n, tile["BLOCK_N"]))
    launch(_add_kernel, grid, out, m, n, fp_fusion=True, **arguments, **tile)
    return out


# ---------------------------------------------------------------------------------------------------
# For the tuner: rank 16, as it is most often, without dropout


@problem("lora_project")
def _(device, m, k, dtype):
    x, a = torch.randn(m, k, device=device, dtype=dtype), torch.randn(16, k, device=device)
    return lambda: project(x, a, None, 0.0)


@problem("lora_dy")
def _(device, m, n, dtype):
    dy, s = (torch.randn(m, size, device=device, dtype=dtype) for size in (n, 16))
    b = torch.randn(n, 16, device=device)
    return lambda: gradients_dy(dy, s, b, 1.0, True, True)


@problem("lora_da")
def _(device, m, k, dtype):
    x, ds = (torch.randn(m, size, device=device, dtype=dtype) for size in (k, 16))
    return lambda: gradient_a(x, ds, None, 0.0, torch.float32)


@problem("lora_add")
def _(device, m, n, dtype):
    out, left = (torch.randn(m, size, device=device, dtype=dtype) for size in (n, 16))
    lora = Lora(left, torch.randn(n, 16, device=device))
    return lambda: add_branch_(torch.zeros_like(out), lora)
