"""Tiles of the kernels in `low_rank.py` and `merge.py`: defaults by architecture, and what the tuner tries.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
import triton

from .launch import Architecture, candidates, default_config


def rank_key(rank: int) -> int:
    """The rank that a configuration is for."""
    return max(16, triton.next_power_of_2(rank))


def multiplies_slowly(arch: Architecture, dtype: torch.dtype) -> bool:
    """Whether products are left to the ordinary cores, which hold their operands in registers: tiles must be small."""
    return dtype == torch.float32 or (arch.kind == "cuda" and arch.capability < 80)


def branch_factors(arch: Architecture, rank: int, dtype: torch.dtype) -> int:
    """How many factors of a branch of that rank a product takes at once: more would take its registers."""
    return min(rank_key(rank), 16 if multiplies_slowly(arch, dtype) else 32)


def _roomy(arch: Architecture) -> bool:
    return arch.shared_memory > 160 << 10


def _stages(arch: Architecture, bytes_per_stage: int) -> int:
    """A pipeline that leaves room for a second program on the same multiprocessor."""
    return max(2, min(4, 1 + arch.shared_memory // (2 * bytes_per_stage)))


def _at_most(arch: Architecture, registers: int) -> dict:
    """Registers that a thread may have, or the assembler spills a few bytes to make them fewer still."""
    return {"maxnreg": registers} if arch.kind == "cuda" else {}


@default_config("lora_project")
def _(arch: Architecture, *, m: int, k: int, r: int, dtype: torch.dtype, drop: int) -> dict:
    if arch.interpreted:
        return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": min(r, 32)}
    if multiplies_slowly(arch, dtype):
        return {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_R": min(r, 32), "num_warps": 4, "num_stages": 3}
    rows, r = min(max(m, 16), 32 if drop or r > 32 else 64), min(r, 64 if arch.kind == "hip" else 128)
    columns = 32 if drop == 1 else 128 if r <= (32 if _roomy(arch) and not drop else 16) else 64
    stages = _stages(arch, dtype.itemsize * columns * (rows + 2 * r))
    warps = 4 if r <= 64 else 8
    return {"BLOCK_M": rows, "BLOCK_K": columns, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}


@default_config("lora_dy")
def _(arch: Architecture, *, m: int, n: int, r: int, dtype: torch.dtype) -> dict:
    if arch.interpreted:
        return {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_R": min(r, 32)}
    if multiplies_slowly(arch, dtype):
        tile = {"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_R": min(r, 32), "num_warps": 4, "num_stages": 3}
        return tile | _at_most(arch, 192) if arch.capability <= 80 else tile
    # ds is written once for each block of columns: wide ones keep that small beside dy itself.
    rows, r = 64 if r <= 16 else 32, min(r, 64 if arch.kind == "hip" else 128)
    columns = {16: 256, 32: 256 if _roomy(arch) else 128, 64: 128, 128: 64}[r]
    warps = 4 if arch.kind == "hip" else 8
    stages = _stages(arch, dtype.itemsize * rows * (columns + r))
    tile = {"BLOCK_M": rows, "BLOCK_N": columns, "BLOCK_R": r, "num_warps": warps, "num_stages": stages}
    return tile if arch.warpgroups else tile | _at_most(arch, 224)


@default_config("lora_da")
def _(arch: Architecture, *, m: int, k: int, r: int, dtype: torch.dtype, drop: int) -> dict:
    if arch.interpreted:
        return {"BLOCK_M": 32, "BLOCK_K": 64, "BLOCK_R": min(r, 32)}
    if multiplies_slowly(arch, dtype):
        return {"BLOCK_M": 16, "BLOCK_K": 64, "BLOCK_R": min(r, 32), "num_warps": 4, "num_stages": 3}
    rows, r = 32 if drop or r > 64 else 64, min(r, 64 if arch.kind == "hip" else 128)
    columns = 32 if drop == 1 else 128 if r <= 64 else 64
    stages = _stages(arch, dtype.itemsize * rows * (columns + r))
    tile = {"BLOCK_M": rows, "BLOCK_K": columns, "BLOCK_R": r, "num_warps": 4, "num_stages": stages}
    return tile | _at_most(arch, 168) if drop == 1 and r > 64 else tile


@default_config("lora_add")
def _(arch: Architecture, *, m: int, n: int, r: int, dtype: torch.dtype, drop: int) -> dict:
    if arch.interpreted:
        return {"BLOCK_M": 32, "BLOCK_N": 64}
    if multiplies_slowly(arch, dtype):
        return {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    rows = min(max(m, 16), 32 if drop else 64)
    tile = {"BLOCK_M": rows, "BLOCK_N": 64 if drop == 1 else 128, "num_warps": 4, "num_stages": 2}
    return tile | _at_most(arch, 168) if drop else tile


@default_config("lora_merge")
def _(arch: Architecture, *, n: int, k: int, r: int, bits: int, dtype: torch.dtype) -> dict:
    if arch.interpreted:
        return {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": min(r, 32)}
    if multiplies_slowly(arch, dtype):
        return {"BLOCK_N": 32, "BLOCK_K": 64, "BLOCK_R": 16, "num_warps": 4, "num_stages": 2}
    warps = 4 if arch.kind == "hip" else 8
    return {"BLOCK_N": 64, "BLOCK_K": 128, "BLOCK_R": min(r, 64), "num_warps": warps, "num_stages": 2}


# ---------------------------------------------------------------------------------------------------
# What the tuner tries


def _grid(first: str, second: str, r: int, stages: tuple[int, ...]) -> Iterator[dict]:
    for rows, columns, warps, depth in product((16, 32, 64, 128), (64, 128, 256), (4, 8), stages):
        if 8 <= rows * columns // (32 * warps) <= 128:
            yield {first: rows, second: columns, "BLOCK_R": min(r, 64), "num_warps": warps, "num_stages": depth}


@candidates("lora_project")
def _(arch: Architecture, *, r: int, **key) -> Iterator[dict]:
    return _grid("BLOCK_M", "BLOCK_K", r, (3, 4))


@candidates("lora_dy")
def _(arch: Architecture, *, r: int, **key) -> Iterator[dict]:
    return _grid("BLOCK_M", "BLOCK_N", r, (3, 4))


@candidates("lora_da")
def _(arch: Architecture, *, r: int, **key) -> Iterator[dict]:
    return _grid("BLOCK_M", "BLOCK_K", r, (3, 4))


@candidates("lora_add")
def _(arch: Architecture, *, r: int, **key) -> Iterator[dict]:
    for tile in _grid("BLOCK_M", "BLOCK_N", r, (2,)):
        del tile["BLOCK_R"]
        yield tile


@candidates("lora_merge")
def _(arch: Architecture, *, r: int, **key) -> Iterator[dict]:
    return _grid("BLOCK_N", "BLOCK_K", r, (2,))
