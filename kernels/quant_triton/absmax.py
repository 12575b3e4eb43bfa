"""Absmax int8 by row, column, block or tensor, and LLM.int8()'s outlier columns (arXiv:2208.07339) found on device.

A tensor is seen as a matrix whose rows or columns share an absmax; a block is a row of its own. Where a row (up to
32768 elements) or a column (up to 512) fits into a program, that program reads it once. Longer ones are read twice:
maxima of tiles first, joined by an atomic maximum, whose result does not depend on the order, then the values.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from .absmax_kernels import (
    Outliers,
    absmax_kernel,
    clear_kernel,
    dequantize_kernel,
    outlier_limit,
    quantize_kernel,
    scale_kernel,
)
from .launch import candidates, config, default, default_config, launch, problem

LONGEST_ROW, LONGEST_COLUMN = 32768, 512  # that a program reads at once
LONGEST_NORM = 16384  # of a row with its norm's weight beside it


@dataclass(frozen=True)
class _Matrix:
    """x as a matrix whose rows (axis 1) or columns (axis 0) share an absmax; shape: of absmax."""

    x: Tensor
    rows: int
    columns: int
    axis: int
    shape: tuple[int, ...]

    @staticmethod
    def of(op: str, x: Tensor, dim: int | None, block_size: int | None) -> _Matrix:
        if block_size is not None and (dim is not None or block_size <= 0):
            raise ValueError(
                f"quant_triton.{op}: dim is {dim}, block_size {block_size}; blocks take dim=None and a size >= 1"
            )
        if dim not in (None, 0, -1) or (dim == 0 and x.dim() != 2) or (dim == -1 and x.dim() == 0):
            raise ValueError(
                f"quant_triton.{op}: dim is {dim} and x has shape {tuple(x.shape)}; "
                "allowed: -1 (row), 0 (column of a matrix), None (tensor or blocks)"
            )
        if dim == 0:
            return _Matrix(x, *x.shape, axis=0, shape=tuple(x.shape[1:]))
        if dim == -1:
            rows = math.prod(x.shape[:-1])
            return _Matrix(x.reshape(rows, x.shape[-1]), rows, x.shape[-1], axis=1, shape=tuple(x.shape[:-1]))
        length = x.numel() if block_size is None else min(block_size, x.numel())
        rows = triton.cdiv(x.numel(), length) if length else 0
        flat = x.contiguous().view(-1)
        return _Matrix(flat, rows, length, axis=1, shape=() if block_size is None else (rows,))

    @property
    def strides(self) -> tuple[int, int]:
        return self.x.stride() if self.x.dim() == 2 else (self.columns, 1)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """R, C, n of the kernels."""
        return self.rows, self.columns, self.x.numel()

    @property
    def partial(self) -> bool:
        return self.rows * self.columns != self.x.numel()

    def grid(self, tile: dict) -> tuple[int]:
        return (triton.cdiv(self.rows, tile["BLOCK_R"]) * triton.cdiv(self.columns, tile["BLOCK_C"]),)


@default_config("int8_whole")
def _(arch, *, axis, length, norm):
    """Tiles of whole rows or columns, 32 elements a thread or 64, 16 where a norm's weight needs registers too."""
    length = triton.next_power_of_2(length)
    across = max((1024 if arch.interpreted else 4096) // length, 1) if axis == 1 else 32
    tile = (across, length) if axis == 1 else (length, across)
    warps = min(max(length * across // (512 if norm else 1024), 1), 32 if norm else 16)
    return {"BLOCK_R": tile[0], "BLOCK_C": tile[1], "num_warps": max(warps * 32 // arch.warp, 1), "num_stages": 1}


@candidates("int8_whole")
def _(arch, *, axis, length, norm):
    base = default("int8_whole", arch, axis=axis, length=length, norm=norm)
    for warps in (4, 8, 16, 32):
        if 8 <= base["BLOCK_R"] * base["BLOCK_C"] // (warps * arch.warp) <= 64:
            yield {**base, "num_warps": warps}


@problem("int8_whole")
def _(device, n, k, dtype):
    x = torch.randn(n, k, device=device, dtype=dtype)
    yield lambda: quantize_int8(x, -1, None, 6.0)
    yield lambda: quantize_int8(x, 0, None, 0.0)
    yield lambda: rms_norm_quantize_int8(x, x[0], 1e-6, 6.0)


def _tile_of(matrix: _Matrix) -> dict:
    """4096 elements, as wide as the matrix."""
    width = min(triton.next_power_of_2(matrix.columns), 4096)
    return {"BLOCK_R": 4096 // width, "BLOCK_C": width, "num_warps": 8}


def _quantize(
    matrix: _Matrix, threshold: float, extra: int = 0, norm: tuple[Tensor, float] | None = None
) -> tuple[Tensor, Tensor, Outliers | None, Tensor | None]:
    """values, absmax, outliers, normalized x; see `quantize_rows`."""
    x, axis, split = matrix.x, matrix.axis, threshold > 0
    values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    outliers = Outliers.of(matrix.columns if split else 0, x.device, extra) if split or extra else None
    found = (outliers.state, outliers.columns) if split else (None, None)
    numbers = (*matrix.sizes, *matrix.strides, outlier_limit(threshold, x.dtype))
    constants = {"fp_fusion": False, "SPLIT": split, "PARTIAL": matrix.partial}
    length = matrix.columns if axis == 1 else matrix.rows
    if length <= (LONGEST_ROW if axis == 1 else LONGEST_COLUMN):
        absmax = torch.empty(matrix.shape, dtype=torch.float32, device=x.device)
        weight, eps = norm or (None, 0.0)
        normed = torch.empty(x.shape, dtype=x.dtype, device=x.device) if norm else None
        constants |= {
            "AXIS": axis,
            "NORM": norm is not None,
            **config("int8_whole", x.device, axis=axis, length=length, norm=norm is not None),
        }
        arguments = (x, values, absmax, *found, weight, normed, *numbers, eps)
        launch(quantize_kernel, matrix.grid(constants), *arguments, **constants)
        return values, absmax, outliers, normed
    absmax = torch.zeros(matrix.shape, dtype=torch.float32, device=x.device)
    constants |= _tile_of(matrix)
    targets = (absmax.view(torch.int32), None) if axis == 1 else (None, absmax.view(torch.int32))
    grid = matrix.grid(constants)
    launch(absmax_kernel, grid, x, *targets, *found, *numbers, ROWS=axis == 1, COLUMNS=axis == 0, **constants)
    launch(scale_kernel, grid, x, absmax, values, found[0], *numbers[:-1], AXIS=axis, **constants)
    return values, absmax, outliers, None


def quantize_rows(x: Tensor, threshold: float, extra: int = 0) -> tuple[Tensor, Tensor, Outliers | None]:
    """Rows of a matrix for a product to come, which takes off what is in outlier columns: they are not cleared.

    Args:
        x: [M, K], not empty. threshold: 0 for no outliers. extra: bytes of zeros wanted at the end of `Outliers.state`.

    Returns:
        values [M, K] int8, absmax [M] float32, and Outliers, None if neither threshold nor extra bytes were asked for.
    """
    return _quantize(_Matrix.of("quantize_int8", x, -1, None), threshold, extra)[:3]


def clear_outliers(values: Tensor, outliers: Outliers) -> Tensor:
    """Zeros in the outlier columns of values, [..., K] int8; whether a column is one, [K] bool."""
    columns = values.shape[-1]
    rows = values.numel() // columns
    tile = {"BLOCK_R": 128, "BLOCK_C": 8, "num_warps": 4}
    grid = (triton.cdiv(rows, tile["BLOCK_R"]),)
    launch(clear_kernel, grid, values, outliers.state, outliers.columns, rows, columns, fp_fusion=False, **tile)
    return outliers.state[:columns].view(torch.bool)


def quantize_int8(
    x: Tensor, dim: int | None, block_size: int | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax int8: `values = round_half_even(x * (1 / absmax * 127))`.

    Args:
        x: any shape and strides, float32, float16 or bfloat16; [..., K] for dim=-1.
        dim: -1 one absmax per row, 0 per column of a matrix, None for the whole tensor or for blocks.
        block_size: with dim None, the length of a block of the flattened x; else None.
        threshold: with dim=-1 and > 0, elements of |x| >= threshold (rounded to x's dtype) are outliers: no row's
            absmax counts them, and the values of a column that holds one are 0 in every row.

    Returns:
        values: int8 of x's shape, contiguous. absmax: float32, one per row ([...]), column ([K]), block ([blocks]), or
        one. outliers: bool, [K] with a threshold and [0] without. Values are 0 where absmax is NaN, infinite or below
        3.8e-37.

    Raises:
        ValueError: dim, block_size and threshold that do not go together.
    """
    if threshold < 0 or (threshold > 0 and dim != -1):
        raise ValueError(f"quant_triton.quantize_int8: threshold is {threshold}; it is >= 0, and 0 without dim=-1")
    matrix = _Matrix.of("quantize_int8", x, dim, block_size)
    n_outliers = x.shape[-1] if threshold > 0 else 0
    if not x.numel():
        values = torch.empty(x.shape, dtype=torch.int8, device=x.device)
        absmax = torch.zeros(matrix.shape, dtype=torch.float32, device=x.device)
        return values, absmax, torch.zeros(n_outliers, dtype=torch.bool, device=x.device)
    values, absmax, outliers, _ = _quantize(matrix, threshold)
    values = values.view(x.shape)
    if threshold > 0:
        return values, absmax, clear_outliers(values, outliers)
    return values, absmax, torch.empty(0, dtype=torch.bool, device=x.device)


def rms_norm_quantize_int8(
    x: Tensor, weight: Tensor, eps: float, threshold: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`y = rms_norm(x)`, the mean square and the products in float32, rounded once; and `quantize_int8(y, -1, ...)`.

    Args:
        x: [..., K], K up to 16384, any strides. weight: [K]. threshold: as in `quantize_int8`.

    Returns:
        y in x's dtype, then values, absmax and outliers of y, from one read of x.

    Raises:
        ValueError: an empty x, a weight of another size, K above 16384.
    """
    if not x.numel() or weight.shape != x.shape[-1:] or weight.numel() > LONGEST_NORM:
        raise ValueError(
            f"quant_triton.rms_norm_quantize_int8: x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; "
            f"x is [..., K], not empty, weight [K], K at most {LONGEST_NORM}"
        )
    matrix = _Matrix.of("rms_norm_quantize_int8", x, -1, None)
    values, absmax, outliers, normed = _quantize(matrix, threshold, norm=(weight.contiguous(), eps))
    values = values.view(x.shape)
    flags = clear_outliers(values, outliers) if threshold > 0 else torch.empty(0, dtype=torch.bool, device=x.device)
    return normed.view(x.shape), values, absmax, flags


def absmax_int8(x: Tensor) -> tuple[Tensor, Tensor]:
    """The absmax of rows and of columns from one read of a matrix, as training in int8 wants both (arXiv:2304.13013).

    Args:
        x: [M, K], any strides.

    Returns:
        [M] and [K] float32, what `quantize_int8` gives with dim=-1 and dim=0.
    """
    matrix = _Matrix.of("absmax_int8", x, 0, None)
    rows, columns = (torch.zeros(size, dtype=torch.float32, device=x.device) for size in x.shape)
    if x.numel():
        tile = {"BLOCK_R": 128, "BLOCK_C": 64, "num_warps": 8}
        bits = (rows.view(torch.int32), columns.view(torch.int32))
        numbers = (*matrix.sizes, *matrix.strides, 0.0)
        constants = {"ROWS": True, "COLUMNS": True, "SPLIT": False, "PARTIAL": False, **tile}
        launch(absmax_kernel, matrix.grid(tile), x, *bits, None, None, *numbers, fp_fusion=False, **constants)
    return rows, columns


def dequantize_int8(
    values: Tensor, absmax: Tensor, dim: int | None, block_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Decodes absmax int8: `dtype((values * absmax) * (1 / 127))` in float32.

    Args:
        values: int8, any shape and strides. absmax, dim, block_size: as `quantize_int8` gives and takes them.
        dtype: float32, float16 or bfloat16.

    Returns:
        A contiguous tensor of values' shape and `dtype`; NaN where the absmax is NaN or infinite.

    Raises:
        ValueError: dim and block_size that do not go together.
    """
    matrix = _Matrix.of("dequantize_int8", values.contiguous(), dim, block_size)
    out = torch.empty(values.shape, dtype=dtype, device=values.device)
    if values.numel():
        tile = _tile_of(matrix)
        constants = {"AXIS": matrix.axis, "PARTIAL": matrix.partial, **tile}
        arguments = (matrix.x, absmax.contiguous(), out, *matrix.sizes)
        launch(dequantize_kernel, matrix.grid(tile), *arguments, fp_fusion=False, **constants)
    return out
