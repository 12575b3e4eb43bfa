"""What every op computes, in plain PyTorch: the oracle, and the implementation where no kernel is.

One function per entry of `quantlib.ops.SCHEMAS`, of the same name and arguments. They run on any device and
in any float dtype: float16, bfloat16 and float32 follow the exact arithmetic of the formats (float32 inside,
bit-compatible with bitsandbytes 0.50), float64 is carried through in float64, which is the oracle's mode.
None of them makes the host wait for the device or has a shape that depends on data. The arguments of a 4-bit
weight are described in `quantlib.ops`, its format in `quantlib.formats`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from quantlib import formats

_EXACT_IN_FLOAT32 = 1024  # 1024 * 127 * 127 < 2^24: a float32 sum of so many int8 products is exact
_MASK32 = 0xFFFFFFFF


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def quantize_4bit(x: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Blockwise absmax quantization to NF4 or FP4 (QLoRA).

    Args:
        x: n elements in any shape, quantized in row-major order.
    Returns:
        packed [ceil(n / 2), 1] uint8 and absmax [ceil(n / block_size)] float32 (float64 for a float64 x). An
        odd n ends in the code of zero. An all-zero block has the code of zero throughout and absmax 0, or
        1e-38 if it is a last, partial block. A block with a NaN has absmax NaN and the code of 1 throughout;
        a block with an infinity has absmax inf, the code of 1 at infinities of either sign and the code of 0
        elsewhere.
    """
    scaled, absmax = formats.scale_blocks(x.to(_arithmetic(x.dtype)).reshape(-1), block_size)
    if scaled.numel() % 2:
        scaled = F.pad(scaled, (0, 1))
    index = torch.bucketize(scaled, formats.thresholds(quant_type, x.device).to(scaled.dtype))
    codes = formats.sorted_codes(quant_type, x.device)[index].to(torch.uint8)
    return ((codes[::2] << 4) | codes[1::2])[:, None], absmax


def _absmax(absmax, nested_absmax, nested_codebook, offset) -> Tensor:
    if nested_absmax is None:
        return absmax
    return formats.dequantize_absmax(absmax, nested_absmax, nested_codebook, offset)


def dequantize_4bit(
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: Sequence[int],
    dtype: torch.dtype,
) -> Tensor:
    """Decode a 4-bit weight: `dtype(code * absmax)`, the product in float32 (float64 for float64).

    Returns:
        a tensor of `shape` and `dtype`. A block whose absmax is NaN decodes to NaN; one whose absmax is
        infinite decodes to inf where it held an infinity and to NaN elsewhere.
    """
    compute = _arithmetic(dtype)
    codebook = formats.codebook(quant_type, packed.device).to(compute)
    pairs = torch.cartesian_prod(codebook, codebook)  # the two values of each of the 256 bytes
    values = pairs[packed.reshape(-1).int()].reshape(-1)[: math.prod(shape)]
    scales = _absmax(absmax, nested_absmax, nested_codebook, offset).to(compute)
    return formats.unscale_blocks(values, scales, block_size).view(shape).to(dtype)


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
    """`x @ W^T + bias` with W, [out_features, in_features], decoded to x's dtype.

    Args:
        x: [..., in_features]. bias: [out_features] or None.
    Returns:
        [..., out_features] in x's dtype.
    """
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    w = dequantize_4bit(*weight, (out_features, x.shape[-1]), x.dtype)
    return F.linear(x, w, None if bias is None else bias.to(x.dtype))


def linear_4bit_dx(
    dy: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    in_features: int,
) -> Tensor:
    """Gradient of `linear_4bit` for x: `dy @ W` with W decoded to dy's dtype. dy: [..., out_features]."""
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    return dy @ dequantize_4bit(*weight, (dy.shape[-1], in_features), dy.dtype)


def embedding_4bit(
    indices: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    num_embeddings: int,
    embedding_dim: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a 4-bit table [num_embeddings, embedding_dim]; only the rows asked for are decoded.

    Args:
        indices: int64 or int32, any shape, 0 ... num_embeddings - 1 (others raise IndexError on CPU).
    Returns:
        [*indices.shape, embedding_dim] in `dtype`, bit-identical to the rows of `dequantize_4bit`.
    """
    compute, device = _arithmetic(dtype), packed.device
    # index_select, unlike indexing, refuses negative rows
    rows = torch.arange(num_embeddings, device=device).index_select(0, indices.reshape(-1))
    elements = rows[:, None] * embedding_dim + torch.arange(embedding_dim, device=device)
    shift = 4 - 4 * (elements % 2)
    codes = (packed.reshape(-1)[elements // 2].int() >> shift) & 15
    scales = _absmax(absmax, nested_absmax, nested_codebook, offset)[elements // block_size]
    values = formats.codebook(quant_type, device).to(compute)[codes] * scales.to(compute)
    return values.view(*indices.shape, embedding_dim).to(dtype)


def _largest(x: Tensor, dim: int) -> Tensor:
    """|x|.amax(dim), 0 where there is nothing to take it over."""
    return x.abs().amax(dim) if x.shape[dim] else x.new_zeros(x.shape[:dim] + x.shape[dim % x.ndim + 1 :])


def _spread(absmax: Tensor, values: Tensor, dim: int | None, block_size: int | None) -> Tensor:
    """absmax, one per row, column, tensor or block, in a shape that broadcasts against values."""
    if block_size is not None:
        return absmax.repeat_interleave(block_size)[: values.numel()].view(values.shape)
    return absmax if dim is None else absmax.unsqueeze(dim)


def quantize_int8(
    x: Tensor, dim: int | None, block_size: int | None, threshold: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Absmax int8: `values = round_half_even(x * (1 / absmax * 127))`, LLM.int8() outlier columns if asked.

    Args:
        x: any shape; [..., K] for dim=-1.
        dim: -1 one absmax per row, 0 per column, None for the whole tensor or for blocks.
        block_size: with dim None, the length of a block of the flattened x; else None.
        threshold: with dim=-1 and > 0, elements of |x| >= threshold (rounded to x's dtype) are outliers: no
            row's absmax counts them, and the values of a column that holds one are 0 in every row.
    Returns:
        values int8 of x's shape; absmax float32 (float64 for a float64 x; shapes in `formats.QuantizedInt8`);
        outliers bool, [K] with a threshold and [0] without. Where absmax is NaN, infinite or too small for
        1 / absmax * 127 to be finite (0 and below 3.8e-37), values are 0.
    """
    compute = _arithmetic(x.dtype)
    outliers = x.new_empty(0, dtype=torch.bool)
    kept = x
    if dim == -1 and threshold > 0:
        found = x.abs() >= x.new_full((), threshold)
        outliers = found.reshape(-1, x.shape[-1]).any(0) if x.numel() else x.new_zeros(x.shape[-1:]).bool()
        kept = x.masked_fill(found, 0)
    kept = kept.to(compute)
    if block_size is not None:
        flat = F.pad(kept.reshape(-1), (0, -x.numel() % block_size))
        absmax = _largest(flat.view(-1, block_size), -1)
    elif dim is None:
        absmax = _largest(kept.reshape(-1), 0)
    else:
        absmax = _largest(kept, dim)
    scale = absmax.reciprocal() * 127  # two roundings, as in bitsandbytes: what PyTorch makes of 127 / absmax
    usable = scale.isfinite() & absmax.isfinite()
    q = torch.round(kept * _spread(scale, x, dim, block_size))
    q = torch.where(_spread(usable, x, dim, block_size), q, 0)  # a cast of NaN or inf is undefined
    if outliers.numel():
        q = q.masked_fill(outliers, 0)
    return q.to(torch.int8), absmax, outliers


def dequantize_int8(
    values: Tensor, absmax: Tensor, dim: int | None, block_size: int | None, dtype: torch.dtype
) -> Tensor:
    """Decode absmax int8: `dtype((values * absmax) * (1 / 127))` in float32 (float64 for float64).

    Returns:
        a tensor of values' shape and `dtype`; NaN where the absmax is NaN or infinite.
    """
    compute = _arithmetic(dtype)
    scaled = values.to(compute) * _spread(absmax.to(compute), values, dim, block_size)
    return (scaled * formats.INT8_STEP).to(dtype)


def _int8_matmul(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [N, K]^T of int8, exact, int32, on devices that have no integer matmul."""
    total = a.new_zeros((a.shape[0], b.shape[0]), dtype=torch.int32)
    for k in range(0, a.shape[1], _EXACT_IN_FLOAT32):
        part = slice(k, k + _EXACT_IN_FLOAT32)
        total += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return total


def linear_int8(x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> Tensor:
    """LLM.int8(): int8 x int8 for the ordinary columns of x, its own dtype for the outlier columns.

    `y = acc * (x_absmax * absmax) / 127^2 + x[:, outliers] @ W[:, outliers]^T + bias`, where acc is the exact
    integer product of `values` and the row-wise quantized x (`quantize_int8` with this threshold), and W is
    the decoded weight. All sums in float32 (float64 for a float64 x), rounded once.

    Args:
        x: [..., in_features]. values: [out_features, in_features] int8. absmax: [out_features] float32.
        bias: [out_features] or None. threshold: 0 for no outlier columns.
    Returns:
        [..., out_features] in x's dtype. A row of x with a NaN, or with an infinity below no threshold, gives
        NaN.
    """
    compute = _arithmetic(x.dtype)
    rows = x.reshape(math.prod(x.shape[:-1]), x.shape[-1])
    q, x_absmax, outliers = quantize_int8(rows.detach(), -1, None, threshold)
    w_absmax = absmax.to(compute)
    y = _int8_matmul(q, values).to(compute) * (x_absmax[:, None] * w_absmax) * (1 / 127**2)
    if outliers.numel():
        # A mask, not a gather: how many columns there are is known on the device only.
        w = dequantize_int8(values, w_absmax, -1, None, compute)
        y = y + rows.to(compute).masked_fill(~outliers, 0) @ w.t()
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).view(*x.shape[:-1], values.shape[0])


def linear_int8_dx(dy: Tensor, values: Tensor, absmax: Tensor) -> Tensor:
    """Gradient of `linear_int8` for x, straight through its rounding: `dy @ W`, W decoded to dy's dtype."""
    return dy @ dequantize_int8(values, absmax, -1, None, dy.dtype)


def philox4x32(counter: Sequence[Tensor], key: Sequence[Tensor]) -> Tensor:
    """Philox4x32-10 (Salmon et al., SC 2011, https://doi.org/10.1145/2063384.2063405) in int64 arithmetic.

    Args:
        counter: four, key: two int64 tensors that broadcast, holding 32-bit unsigned integers.
    Returns:
        [..., 4] int64, four random 32-bit unsigned integers per counter.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps around at 2^64, which leaves both halves right
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _MASK32) ^ c1 ^ k0,
            p1 & _MASK32,
            ((p0 >> 32) & _MASK32) ^ c3 ^ k1,
            p0 & _MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & _MASK32, (k1 + 0xBB67AE85) & _MASK32
    return torch.stack(torch.broadcast_tensors(c0, c1, c2, c3), -1)


def dropout(x: Tensor, seed: Tensor, p: float) -> Tensor:
    """Dropout whose mask is a function of the seed alone, so that a backward pass can draw it again.

    Element i of the flattened, row-major x is kept iff `u_i >= p`, where u_i is the upper 24 bits, as a
    fraction, of word i % 4 of Philox4x32-10 at counter (i // 4, 0, 0) and key `seed`. Kept elements become `x
    * (1 / (1 - p))`, in float32 (float64 for a float64 x) and rounded once to x's dtype; the others become 0,
    NaN included.

    Args:
        x: any shape. seed: [1] int64, on x's device. p: 0 <= p < 1.
    """
    compute, n = _arithmetic(x.dtype), x.numel()
    group = torch.arange((n + 3) // 4, device=x.device)
    zero = torch.zeros_like(group)
    counter = (group & _MASK32, group >> 32, zero, zero)
    words = philox4x32(counter, (seed & _MASK32, (seed >> 32) & _MASK32)).view(-1)[:n].view(x.shape)
    kept = (words >> 8) >= math.ceil(p * 2**24)  # u >= p, compared exactly
    return torch.where(kept, x.to(compute) * (1 / (1 - p)), 0).to(x.dtype)


# ---------------------------------------------------------------------------------------------------
# LoRA (arXiv:2106.09685) on a frozen base: s = dropout(x) a^T, y = x W^T + bias + scaling * s b^T. Factors a and b are
# rounded to the dtype of x; y takes s rounded to it, too, as does the gradient of b.


def _dropped(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    return x if seed is None else dropout(x, seed, p)


def _lora(y, x, a, b, scaling, seed, p, keep_s) -> tuple[Tensor, Tensor]:
    s = _dropped(x, seed, p) @ a.to(x.dtype).t()
    y = (y.to(_arithmetic(x.dtype)) + scaling * (s @ b.to(x.dtype).t())).to(x.dtype)
    return y, s if keep_s else s.new_empty(0)


def _lora_backward(base_dx, dy, x, s, a, b, scaling, seed, p, needed) -> tuple[Tensor, Tensor, Tensor]:
    rows, dropped = dy.flatten(0, -2), _dropped(x, seed, p).flatten(0, -2)
    ds = scaling * (dy @ b.to(x.dtype))
    dx = base_dx() + _dropped(ds @ a.to(x.dtype), seed, p) if needed[0] else x.new_empty(0)
    da = (ds.flatten(0, -2).t() @ dropped).to(a.dtype) if needed[1] else a.new_empty(0)
    db = (scaling * (rows.t() @ s.flatten(0, -2))).to(b.dtype) if needed[2] else b.new_empty(0)
    return dx, da, db


def lora_linear_4bit(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_4bit` with a LoRA branch. x: [..., in_features].

    Returns:
        y [..., out_features] and s [..., rank], both in x's dtype; s is empty unless keep_s.
    """
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    y = linear_4bit(x, *weight, b.shape[0], bias)
    return _lora(y, x, a, b, scaling, seed, p, keep_s)


def lora_linear_4bit_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear_4bit` for x, a and b, in their dtypes; those not `needed` are empty. s: as it gave."""
    weight = (packed, absmax, nested_absmax, nested_codebook, offset, quant_type, block_size)
    base_dx = lambda: linear_4bit_dx(dy, *weight, x.shape[-1])  # noqa: E731
    return _lora_backward(base_dx, dy, x, s, a, b, scaling, seed, p, needed)


def lora_linear_int8(
    x: Tensor,
    values: Tensor,
    absmax: Tensor,
    bias: Tensor | None,
    threshold: float,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    keep_s: bool,
) -> tuple[Tensor, Tensor]:
    """`linear_int8` with a LoRA branch, whose x is not quantized. Returns y and s as `lora_linear_4bit` does."""
    return _lora(linear_int8(x, values, absmax, bias, threshold), x, a, b, scaling, seed, p, keep_s)


def lora_linear_int8_backward(
    dy: Tensor,
    x: Tensor,
    s: Tensor,
    values: Tensor,
    absmax: Tensor,
    a: Tensor,
    b: Tensor,
    scaling: float,
    seed: Tensor | None,
    p: float,
    needed: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `lora_linear_int8` for x, a and b, straight through the rounding of x."""
    return _lora_backward(lambda: linear_int8_dx(dy, values, absmax), dy, x, s, a, b, scaling, seed, p, needed)
