"""Products with 4-bit weights, x W^T and dY W (QLoRA, arXiv:2305.14314), in three ways by the rows of x.

1. Few rows: a stream of the weight. Every warp decodes another part of K and multiplies on the tensor cores, where 8
   rows cost what 1 does; the sums of the warps are added inside the program, in a fixed order.
2. Up to about a thousand rows: tiles of W, decoded in registers, times tiles of x^T, so that W is the operand that
   Hopper's wgmma takes from registers. Few tiles are split along K as well; a second kernel adds the parts in order.
3. More rows: W is decoded to a workspace once, as a whole, and the vendor's product does the rest. Slices of W that
   stay in the second-level cache would save a pass over it, at most 8% of the time with 2048 rows and 2% with 8192,
   and lose more than that in the last, half-empty wave of each slice's smaller product.

In 1, and in 2 with few rows, the codebook's values are multiplied, not the weights: the sum over a chunk of K that lies
in one block is scaled by the block's absmax in float32. A value of the codebook in 16 bits is no further off than a
rounded weight. An infinite absmax then makes the result NaN; a sum of |x| beyond float32's range overflows before it is
scaled. With more rows (SCALED, the size of a chunk) it is cheaper to scale the codebook for every 32 weights of a
thread, which gives rounded weights.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from .branch import Lora, branch_arguments
from .codes import Weight, byte_lookup, checked_weight, codebook, scaled_lookup
from .launch import Architecture, Config, bucket, candidates, config, default, default_config, launch, problem
from .linear_4bit_kernels import linear_4bit_kernel
from .nf4 import dequantize_4bit, quantize_4bit
from .parts import sum_parts


def chunk_size(block_size: int) -> int:
    """Elements of W along k that have one scale, as the kernels take them."""
    return min(block_size, 64)


def splits(tiles: int, steps: int, arch: Architecture) -> int:
    """Parts along the sum's dimension that make about two programs per multiprocessor, of at least eight steps each."""
    return max(1, min(2 * arch.multiprocessors // max(tiles, 1), steps // 8, 16))


def most_fused_rows(arch: Architecture, dtype: torch.dtype) -> int:
    """Rows up to which it does not pay to decode W first."""
    if arch.capability < 80:
        return 4  # Triton knows no tensor-core instruction there, so a row more costs as much as the first
    return 16 if dtype == torch.float32 else 1024


@default_config("linear_4bit")
def _(arch: Architecture, *, m: int, n: int, k: int, chunk: int, dtype: torch.dtype) -> Config:
    few = m <= 16
    if arch.interpreted:
        split = 2 if k > 256 else 1
        tiles = {"BLOCK_M": 16, "BLOCK_N": 32, "WARPS_K": 2 if few else 1, "UNROLL": 2, "SPLIT": split}
        return tiles | {"SCALED": 0 if few else 128, "K_WIDTH": 4 if few else 2, "num_warps": 4, "num_stages": 1}
    if m > most_fused_rows(arch, dtype):
        return {}  # decoded first
    roomy = arch.shared_memory > 160 << 10 and dtype != torch.float32
    if few:
        block_m = m if arch.capability < 80 else 8 if m <= 8 and arch.kind == "cuda" else 16
        block_n = 32 if roomy and n >= 64 * arch.multiprocessors else 16
        warps = 8 if roomy else 4
        split = splits(triton.cdiv(n, block_n), k // (warps * chunk), arch)
        tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "WARPS_K": warps, "UNROLL": 1, "SPLIT": split}
        return tiles | {"SCALED": 0, "K_WIDTH": 4, "num_warps": warps, "num_stages": 4 if roomy else 2}
    # wgmma and tcgen05 hold the sums outside of, or in more, registers than mma does.
    block_m, block_n = min(m, 128 if arch.warpgroups else 64), 128 if arch.kind == "cuda" else 64
    scaled = (128 if roomy else 64) if block_m >= 64 else 0
    split = splits(triton.cdiv(m, block_m) * triton.cdiv(n, block_n), k // 128, arch)
    tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "WARPS_K": 1, "UNROLL": 1 if scaled else 2, "SPLIT": split}
    pipeline = {"num_warps": block_n // 16, "num_stages": 3 if arch.kind == "cuda" else 2}
    if scaled and arch.kind == "cuda" and not arch.warpgroups:
        pipeline["maxnreg"] = 168  # or the assembler spills a few bytes to make it 128
    return tiles | pipeline | {"SCALED": scaled, "K_WIDTH": 2 if arch.capability == 90 else 4}


@candidates("linear_4bit")
def _(arch: Architecture, *, m: int, n: int, k: int, chunk: int, dtype: torch.dtype) -> Iterator[Config]:
    largest = most_fused_rows(arch, dtype)
    base = default("linear_4bit", arch, m=min(m, largest), n=n, k=k, chunk=chunk, dtype=dtype)
    if not base:
        return
    yield {}
    if m <= 16:
        for block_n, warps, split, stages in itertools.product((16, 32, 64), (4, 8), (1, 2, 4), (3, 5)):
            tiles = {"BLOCK_N": block_n, "WARPS_K": warps, "SPLIT": split}
            yield base | tiles | {"num_warps": warps, "num_stages": stages}
    else:
        base.pop("maxnreg", None)
        sizes = itertools.product((32, 64, 128), (64, 128), (0, 128), (1, 2, 4, 8), (3, 4))
        for block_m, block_n, scaled, split, stages in sizes:
            if block_m <= m:
                tiles = {"BLOCK_M": block_m, "BLOCK_N": block_n, "SCALED": scaled, "UNROLL": 1 if scaled else 2}
                yield base | tiles | {"SPLIT": split, "num_warps": block_n // 16, "num_stages": stages}


@problem("linear_4bit")
def _(device: torch.device, m: int, n: int, k: int, dtype: torch.dtype) -> Callable[[], object]:
    packed, absmax = quantize_4bit(torch.randn((n, k), device=device, dtype=dtype), "nf4", 64)
    x = torch.randn((m, k), device=device, dtype=dtype)
    return lambda: linear_4bit(x, packed, absmax, None, None, None, "nf4", 64, n, None)


def fusable(packed: Tensor, k: int, block_size: int) -> bool:
    """Whether the kernels can read this weight: rows of whole chunks, 16-byte addresses."""
    return k > 0 and k % chunk_size(block_size) == 0 and packed.data_ptr() % 16 == 0 and packed.is_contiguous()


def fused(
    x: Tensor,
    weight: Weight,
    out_features: int,
    bias: Tensor | None,
    settings: Config,
    *,
    lora: Lora | None = None,
    ends: Tensor | None = None,
) -> Tensor:
    """`x W^T + bias`, plus a branch, by ways 1 and 2 of the module.

    Args:
        x: [rows, k], elements of a row adjacent. weight, out_features, bias: as `linear_4bit`; `fusable`.
        settings: a configuration of "linear_4bit".
        ends: [experts] int32, the last rows of the experts that x is sorted by, plus one; the weight and the bias then
            are [experts, out_features, ...].
    """
    packed, absmax, *nested, quant_type, block_size = weight
    (m, k), n = x.shape, out_features
    scaled, split = settings["SCALED"], settings["SPLIT"]
    chunk = math.gcd(k, scaled) if scaled else chunk_size(block_size)
    step = settings["WARPS_K"] * settings["UNROLL"]
    experts = 0 if ends is None else ends.numel()
    tiles = (triton.cdiv(m, settings["BLOCK_M"]) + experts) * triton.cdiv(n, settings["BLOCK_N"])
    if not m or not n:
        return x.new_empty((m, n))
    out = x.new_empty((split, m, n), dtype=x.dtype if split == 1 else torch.float32)
    launch(
        linear_4bit_kernel,
        (tiles, split),
        x,
        packed,
        absmax,
        *(absmax if part is None else part for part in nested),  # never followed
        codebook(quant_type, x.device, torch.float32 if scaled else x.dtype),
        x if bias is None else bias.contiguous(),
        x if ends is None else ends,
        out,
        m,
        n,
        k,
        x.stride(0),
        experts,
        fp_fusion=True,
        **branch_arguments(lora, x),
        DOUBLE_QUANT=nested[0] is not None,
        LOOKUP=(scaled_lookup if scaled else byte_lookup)(quant_type, x.device, x.dtype),
        BIAS=bias is not None,
        EXPERTS=triton.next_power_of_2(experts) if experts else 0,
        BLOCK_SIZE=block_size,
        CHUNK=chunk,
        EVEN=k // chunk % (step * split) == 0,
        **settings,
    )
    return out[0] if split == 1 else sum_parts(out, x.dtype)


def rows_of(x: Tensor) -> Tensor:
    """x as a matrix, [rows, k], whose rows are contiguous; copied only if they are not."""
    x = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()


def settings_for(x: Tensor, weight: Weight, out_features: int) -> Config:
    """The configuration with which `fused` takes these rows; empty if W is to be decoded first."""
    packed, block_size = weight[0], weight[-1]
    m, k = x.shape
    if not fusable(packed, k, block_size):
        return {}
    return config(
        "linear_4bit", x.device, m=bucket(m), n=out_features, k=k, chunk=chunk_size(block_size), dtype=x.dtype
    )


def linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    out_features: int,
    bias: Tensor | None,
) -> Tensor:
    """`x @ W^T + bias` with a 4-bit W, [out_features, in_features].

    Args:
        x: [..., in_features], float32, float16 or bfloat16, any strides.
        packed ... block_size: the weight, see `dequantize_4bit`. bias: [out_features] in x's dtype, or None.

    Returns:
        [..., out_features], contiguous, in x's dtype. Sums in float32, in an order that depends on the shape only.

    Raises:
        ValueError: unknown quant_type, or nested arguments of which only some are given.
    """
    weight = checked_weight(
        "linear_4bit", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    rows = rows_of(x)
    shape = (*x.shape[:-1], out_features)
    settings = settings_for(rows, weight, out_features)
    if settings:
        return fused(rows, weight, out_features, bias, settings).view(shape)
    w = dequantize_4bit(*weight, (out_features, rows.shape[1]), x.dtype)
    return F.linear(rows, w, bias).view(shape)
