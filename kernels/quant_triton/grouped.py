"""Products with the 4-bit weights of many experts, for tokens sorted by expert (mixture of experts).

The kernels of `linear_4bit` and its gradient, with one weight [experts, out, in]: a program finds out on the device
which expert its tile of rows belongs to, so that the host needs to know the number of rows only. Never decoded first.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from .branch import Lora
from .codes import checked_weight
from .launch import Config, architecture, bucket, config, default
from .linear_4bit import chunk_size, fusable, fused, most_fused_rows, rows_of
from .linear_4bit_backward import fused_dx


def _settings(op: str, x: Tensor, packed: Tensor, block_size: int, n: int, k: int, ends: Tensor) -> Config:
    """A configuration for as many rows as an expert has on average, not split along the sum.

    Raises:
        ValueError: a weight or ends that the kernels cannot read.
    """
    chunk, experts = chunk_size(block_size), ends.numel()
    if ends.dtype != torch.int32 or ends.dim() != 1 or not experts:
        raise ValueError(f"quant_triton.{op}: ends is {ends.dtype} {tuple(ends.shape)}; expected int32 [experts]")
    if not fusable(packed, k, block_size):
        raise ValueError(
            f"quant_triton.{op}: in_features is {k}; experts need a multiple of {chunk} and a packed weight that is "
            "contiguous and aligned to 16 bytes"
        )
    arch = architecture(x.device)
    m = min(bucket(triton.cdiv(x.shape[0], experts)), most_fused_rows(arch, x.dtype))
    key = {"m": m, "n": n, "k": k, "chunk": chunk, "dtype": x.dtype}
    settings = config(op, x.device, **key) or default(op, arch, **key)
    if not settings:
        raise ValueError(f"quant_triton.{op}: experts have no kernel for {x.dtype} on this GPU")
    return {**settings, "SPLIT": 1}


def linear_4bit_grouped(
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
    ends: Tensor,
    lora: Lora | None = None,
) -> Tensor:
    """`x[i] @ W[e]^T + bias[e]` for each row i and its expert e.

    Args:
        x: [rows, in_features], sorted by expert; float32, float16 or bfloat16, any strides.
        packed ... block_size: the weights, [experts, out_features, in_features], as one; see `dequantize_4bit`.
        bias: [experts, out_features] in x's dtype, or None.
        ends: [experts] int32, on the device: expert e has the rows from ends[e - 1] (0 for the first) up to ends[e].
            The last of them is the number of rows.
        lora: what is added to the product.

    Returns:
        [rows, out_features], contiguous, in x's dtype.

    Raises:
        ValueError: unknown quant_type, nested arguments of which only some are given, or in_features that is no
            multiple of 64 (32 for blocks of 32).
    """
    weight = checked_weight(
        "linear_4bit_grouped", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    x = rows_of(x)
    settings = _settings("linear_4bit", x, weight[0], block_size, out_features, x.shape[1], ends)
    return fused(x, weight, out_features, bias, settings, lora=lora, ends=ends)


def linear_4bit_grouped_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
    ends: Tensor,
    lora: Lora | None = None,
) -> Tensor:
    """Gradient of `linear_4bit_grouped` for x: `dy[i] @ W[e]`.

    Args:
        dy: [rows, out_features], sorted by expert. The rest: as `linear_4bit_grouped`.

    Returns:
        [rows, in_features], contiguous, in dy's dtype.

    Raises:
        ValueError: as `linear_4bit_grouped`.
    """
    weight = checked_weight(
        "linear_4bit_grouped_dx", packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size
    )
    dy = rows_of(dy)
    settings = _settings("linear_4bit_dx", dy, weight[0], block_size, dy.shape[1], in_features, ends)
    return fused_dx(dy, weight, in_features, settings, lora=lora, ends=ends)
