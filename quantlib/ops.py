"""The registered ops, `torch.ops.quantlib.*`: schemas, fakes and argument checks.

Every op is declared here once. The check of an op is called by its fake implementation (torch.compile,
meta tensors, `opcheck`) and by the public function in `quantlib.functional`, before any work is done;
it returns nothing and raises TypeError for a dtype and ValueError for a shape or a value. Kernels are
registered elsewhere: C++ for CPU in `csrc/ops.cpp`, plain PyTorch in `quantlib.reference` for devices
that have none of their own.

A 4-bit weight of n elements travels through every op as the same seven arguments, in this order:

    packed           [ceil(n / 2), 1], uint8, high nibble first
    absmax           [ceil(n / block_size)], float32; uint8 codes under double quant
    nested_absmax    [ceil(blocks / 256)], float32; None without double quant
    nested_codebook  [256], float32; None without double quant
    offset           [], float32, the mean subtracted from absmax; None without double quant
    quant_type       "nf4" or "fp4"
    block_size       32, 64, 128, ... 4096

and a LoRA branch, y += scaling * dropout(x) a^T b^T, as five:

    a                [rank, in_features], any float dtype
    b                [out_features, rank], any float dtype
    scaling          factor of the branch
    seed             [1] int64, of the dropout in front of the branch; None for none
    p                probability of that dropout
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from quantlib.formats import BLOCK_SIZES, NESTED_BLOCK_SIZE, QUANT_TYPES

FLOAT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

_WEIGHT_4BIT = (
    "Tensor packed, Tensor absmax, Tensor? nested_absmax, Tensor? nested_codebook, Tensor? offset, "
    "str quant_type, int block_size"
)
_BRANCH = "Tensor a, Tensor b, float scaling, Tensor? seed, float p"

SCHEMAS = {
    "quantize_4bit": "(Tensor x, str quant_type, int block_size) -> (Tensor packed, Tensor absmax)",
    "dequantize_4bit": f"({_WEIGHT_4BIT}, SymInt[] shape, ScalarType dtype) -> Tensor",
    "linear_4bit": f"(Tensor x, {_WEIGHT_4BIT}, SymInt out_features, Tensor? bias) -> Tensor",
    "linear_4bit_dx": f"(Tensor dy, {_WEIGHT_4BIT}, SymInt in_features) -> Tensor",
    "embedding_4bit": f"(Tensor indices, {_WEIGHT_4BIT}, SymInt num_embeddings, "
    "SymInt embedding_dim, ScalarType dtype) -> Tensor",
    "quantize_int8": "(Tensor x, int? dim, int? block_size, float threshold) "
    "-> (Tensor values, Tensor absmax, Tensor outliers)",
    "dequantize_int8": "(Tensor values, Tensor absmax, int? dim, int? block_size, ScalarType dtype) -> Tensor",
    "linear_int8": "(Tensor x, Tensor values, Tensor absmax, Tensor? bias, float threshold) -> Tensor",
    "linear_int8_dx": "(Tensor dy, Tensor values, Tensor absmax) -> Tensor",
    "dropout": "(Tensor x, Tensor seed, float p) -> Tensor",
    "lora_linear_4bit": f"(Tensor x, {_WEIGHT_4BIT}, Tensor? bias, {_BRANCH}, bool keep_s) -> (Tensor y, Tensor s)",
    "lora_linear_4bit_backward": f"(Tensor dy, Tensor x, Tensor s, {_WEIGHT_4BIT}, {_BRANCH}, bool[3] needed) "
    "-> (Tensor dx, Tensor da, Tensor db)",
    "lora_linear_int8": f"(Tensor x, Tensor values, Tensor absmax, Tensor? bias, float threshold, {_BRANCH}, "
    "bool keep_s) -> (Tensor y, Tensor s)",
    "lora_linear_int8_backward": f"(Tensor dy, Tensor x, Tensor s, Tensor values, Tensor absmax, {_BRANCH}, "
    "bool[3] needed) -> (Tensor dx, Tensor da, Tensor db)",
}
# Where no kernel fuses these, `lora_ops` composes them of the ops above.
COMPOSED = tuple(name for name in SCHEMAS if name.startswith("lora_"))


# ---------------------------------------------------------------------------------------------------
# Checks. An error names the op, the argument, what came, what is allowed and, where it helps, what to do.


def _check_float(op: str, name: str, t: Tensor) -> None:
    if t.dtype not in FLOAT_DTYPES:
        raise TypeError(
            f"quantlib.{op}: {name} is {t.dtype}; float32, float16 and bfloat16 are supported "
            "(quantlib.reference also computes in float64)"
        )


def _check_dtype_argument(op: str, dtype: torch.dtype) -> None:
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"quantlib.{op}: dtype is {dtype}; float32, float16 and bfloat16 are supported")


def _check_devices(op: str, name: str, t: Tensor, **others: Tensor | None) -> None:
    for other_name, other in others.items():
        if other is not None and other.device != t.device:
            raise ValueError(
                f"quantlib.{op}: {name} is on {t.device} and {other_name} on {other.device}; move both to one device"
            )


def check_format_4bit(op: str, quant_type: str, block_size: int) -> None:
    """Raises ValueError unless `quant_type` and `block_size` name a 4-bit format."""
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quantlib.{op}: quant_type is {quant_type!r}; allowed: {', '.join(QUANT_TYPES)}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"quantlib.{op}: block_size is {block_size}; allowed: {', '.join(map(str, BLOCK_SIZES))}")


def _check_weight_4bit(
    op: str,
    n: int,
    packed: Tensor,
    absmax: Tensor,
    nested_absmax: Tensor | None,
    nested_codebook: Tensor | None,
    offset: Tensor | None,
    quant_type: str,
    block_size: int,
) -> None:
    check_format_4bit(op, quant_type, block_size)
    double_quant = nested_absmax is not None
    if (nested_codebook is not None) != double_quant or (offset is not None) != double_quant:
        raise ValueError(
            f"quantlib.{op}: nested_absmax, nested_codebook and offset come together (double quant) or not at all"
        )
    blocks = -(-n // block_size)
    parts = [
        ("packed", packed, torch.uint8, (n + 1) // 2),
        ("absmax", absmax, torch.uint8 if double_quant else torch.float32, blocks),
    ]
    if double_quant:
        parts += [
            ("nested_absmax", nested_absmax, torch.float32, -(-blocks // NESTED_BLOCK_SIZE)),
            ("nested_codebook", nested_codebook, torch.float32, 256),
            ("offset", offset, torch.float32, 1),
        ]
    device = packed.device
    for name, t, dtype, numel in parts:
        if t.dtype != dtype:
            raise TypeError(f"quantlib.{op}: {name} is {t.dtype}; expected {dtype}")
        if t.numel() != numel:
            raise ValueError(
                f"quantlib.{op}: {name} has {t.numel()} elements; a weight of {n} elements in blocks of "
                f"{block_size} has {numel}"
            )
        if t.device != device:
            _check_devices(op, "packed", packed, **{name: t})


def _check_last_dim(op: str, name: str, t: Tensor, size: int | None, meaning: str) -> None:
    if t.dim() == 0 or (size is not None and t.shape[-1] != size):
        wanted = "at least one dimension" if size is None else f"a last dimension of {meaning} = {size}"
        raise ValueError(f"quantlib.{op}: {name} has shape {tuple(t.shape)}; it needs {wanted}")


def _check_bias(op: str, x: Tensor, bias: Tensor | None, out_features: int) -> None:
    if bias is None:
        return
    if bias.dtype != x.dtype:
        raise TypeError(f"quantlib.{op}: bias is {bias.dtype} and x is {x.dtype}; cast one to the other")
    if tuple(bias.shape) != (out_features,):
        raise ValueError(f"quantlib.{op}: bias has shape {tuple(bias.shape)}; expected ({out_features},)")
    _check_devices(op, "x", x, bias=bias)


def check_quantize_4bit(x: Tensor, quant_type: str, block_size: int) -> None:
    check_format_4bit("quantize_4bit", quant_type, block_size)
    _check_float("quantize_4bit", "x", x)


def check_dequantize_4bit(*weight_shape_dtype) -> None:
    *weight, shape, dtype = weight_shape_dtype
    _check_dtype_argument("dequantize_4bit", dtype)
    _check_weight_4bit("dequantize_4bit", math.prod(shape), *weight)


def check_linear_4bit(x: Tensor, *weight_out_bias) -> None:
    *weight, out_features, bias = weight_out_bias
    _check_float("linear_4bit", "x", x)
    _check_last_dim("linear_4bit", "x", x, None, "in_features")
    _check_weight_4bit("linear_4bit", out_features * x.shape[-1], *weight)
    _check_devices("linear_4bit", "x", x, packed=weight[0])
    _check_bias("linear_4bit", x, bias, out_features)


def check_linear_4bit_dx(dy: Tensor, *weight_in) -> None:
    *weight, in_features = weight_in
    _check_float("linear_4bit_dx", "dy", dy)
    _check_last_dim("linear_4bit_dx", "dy", dy, None, "out_features")
    _check_weight_4bit("linear_4bit_dx", dy.shape[-1] * in_features, *weight)
    _check_devices("linear_4bit_dx", "dy", dy, packed=weight[0])


def check_embedding_4bit(indices: Tensor, *weight_sizes_dtype) -> None:
    *weight, num_embeddings, embedding_dim, dtype = weight_sizes_dtype
    if indices.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"quantlib.embedding_4bit: indices is {indices.dtype}; int64 and int32 are supported")
    _check_dtype_argument("embedding_4bit", dtype)
    _check_weight_4bit("embedding_4bit", num_embeddings * embedding_dim, *weight)
    _check_devices("embedding_4bit", "indices", indices, packed=weight[0])


def _check_granularity(op: str, x: Tensor, dim: int | None, block_size: int | None) -> None:
    if block_size is not None:
        if dim is not None or block_size <= 0:
            raise ValueError(
                f"quantlib.{op}: dim is {dim} and block_size {block_size}; blocks take dim=None and block_size >= 1"
            )
    elif dim not in (None, 0, -1):
        raise ValueError(f"quantlib.{op}: dim is {dim}; allowed: -1 (row), 0 (column), None (tensor or blocks)")
    elif dim == 0 and x.dim() != 2:
        raise ValueError(f"quantlib.{op}: dim=0 (column) takes a matrix; x has shape {tuple(x.shape)}")
    elif dim == -1:
        _check_last_dim(op, "x", x, None, "")


def _absmax_shape(x: Tensor, dim: int | None, block_size: int | None) -> tuple[int, ...]:
    if block_size is not None:
        return (-(-x.numel() // block_size),)
    return {-1: tuple(x.shape[:-1]), 0: tuple(x.shape[1:]), None: ()}[dim]


def check_quantize_int8(x: Tensor, dim: int | None, block_size: int | None, threshold: float) -> None:
    _check_float("quantize_int8", "x", x)
    _check_granularity("quantize_int8", x, dim, block_size)
    _check_threshold("quantize_int8", threshold)
    if threshold > 0 and dim != -1:
        raise ValueError(f"quantlib.quantize_int8: threshold is {threshold}; outlier columns need dim=-1 (row)")


def _check_threshold(op: str, threshold: float) -> None:
    if not threshold >= 0:
        raise ValueError(f"quantlib.{op}: threshold is {threshold}; it must be >= 0 (0 turns the outlier split off)")


def _check_int8(op: str, values: Tensor, absmax: Tensor, absmax_shape: tuple[int, ...]) -> None:
    if values.dtype != torch.int8:
        raise TypeError(f"quantlib.{op}: values is {values.dtype}; expected torch.int8")
    if absmax.dtype != torch.float32:
        raise TypeError(f"quantlib.{op}: absmax is {absmax.dtype}; expected torch.float32")
    if tuple(absmax.shape) != absmax_shape:
        raise ValueError(
            f"quantlib.{op}: absmax has shape {tuple(absmax.shape)}; values of shape {tuple(values.shape)} "
            f"need {absmax_shape}"
        )
    _check_devices(op, "values", values, absmax=absmax)


def check_dequantize_int8(
    values: Tensor, absmax: Tensor, dim: int | None, block_size: int | None, dtype: torch.dtype
) -> None:
    _check_dtype_argument("dequantize_int8", dtype)
    _check_granularity("dequantize_int8", values, dim, block_size)
    _check_int8("dequantize_int8", values, absmax, _absmax_shape(values, dim, block_size))


def _check_weight_int8(op: str, values: Tensor, absmax: Tensor) -> None:
    if values.dim() != 2:
        raise ValueError(
            f"quantlib.{op}: values has shape {tuple(values.shape)}; a weight is [out_features, in_features]"
        )
    _check_int8(op, values, absmax, (values.shape[0],))


def check_linear_int8(x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float) -> None:
    _check_float("linear_int8", "x", x)
    _check_threshold("linear_int8", threshold)
    _check_weight_int8("linear_int8", values, absmax)
    _check_last_dim("linear_int8", "x", x, values.shape[1], "in_features")
    _check_devices("linear_int8", "x", x, values=values)
    _check_bias("linear_int8", x, bias, values.shape[0])


def check_linear_int8_dx(dy: Tensor, values: Tensor, absmax: Tensor) -> None:
    _check_float("linear_int8_dx", "dy", dy)
    _check_weight_int8("linear_int8_dx", values, absmax)
    _check_last_dim("linear_int8_dx", "dy", dy, values.shape[0], "out_features")
    _check_devices("linear_int8_dx", "dy", dy, values=values)


def check_dropout(x: Tensor, seed: Tensor, p: float) -> None:
    _check_float("dropout", "x", x)
    if not 0 <= p < 1:
        raise ValueError(f"quantlib.dropout: p is {p}; it must be in [0, 1)")
    if seed.dtype != torch.int64 or seed.numel() != 1:
        raise ValueError(f"quantlib.dropout: seed is {seed.dtype} of {seed.numel()} elements; one int64 is needed")
    _check_devices("dropout", "x", x, seed=seed)


def _check_branch(
    op: str, x: Tensor, a: Tensor, b: Tensor, seed: Tensor | None, p: float, out_features: int | None = None
) -> None:
    for name, t in (("a", a), ("b", b)):
        _check_float(op, name, t)
        if t.dim() != 2:
            raise ValueError(f"quantlib.{op}: {name} has shape {tuple(t.shape)}; it must be a matrix")
    if a.shape[0] < 1 or a.shape[1] != x.shape[-1]:
        raise ValueError(f"quantlib.{op}: a has shape {tuple(a.shape)}; expected [rank, {x.shape[-1]}], rank >= 1")
    if b.shape[1] != a.shape[0] or (out_features is not None and b.shape[0] != out_features):
        rows = "out_features" if out_features is None else out_features
        raise ValueError(f"quantlib.{op}: b has shape {tuple(b.shape)}; expected [{rows}, {a.shape[0]}]")
    _check_devices(op, "x", x, a=a, b=b, seed=seed)
    if seed is not None:
        check_dropout(x, seed, p)


def check_lora_linear_4bit(x: Tensor, *weight_bias_branch) -> None:
    *weight, bias, a, b, _, seed, p, _ = weight_bias_branch
    _check_last_dim("lora_linear_4bit", "x", x, None, "in_features")
    _check_branch("lora_linear_4bit", x, a, b, seed, p)
    check_linear_4bit(x, *weight, b.shape[0], bias)


def check_lora_linear_int8(
    x: Tensor, values: Tensor, absmax: Tensor, bias: Tensor | None, threshold: float, *branch
) -> None:
    a, b, _, seed, p, _ = branch
    check_linear_int8(x, values, absmax, bias, threshold)
    _check_branch("lora_linear_int8", x, a, b, seed, p, values.shape[0])


def _check_backward(op: str, dy: Tensor, x: Tensor, s: Tensor, a: Tensor, b: Tensor, seed, p: float) -> None:
    _check_float(op, "dy", dy)
    _check_branch(op, x, a, b, seed, p)
    for name, t, features in (("dy", dy, b.shape[0]), ("s", s, a.shape[0])):
        if t.dtype != x.dtype or tuple(t.shape) != (*x.shape[:-1], features):
            raise ValueError(
                f"quantlib.{op}: {name} is {t.dtype} {tuple(t.shape)}; expected {x.dtype} {(*x.shape[:-1], features)}"
            )
    _check_devices(op, "x", x, dy=dy, s=s)


def check_lora_linear_4bit_backward(dy: Tensor, x: Tensor, s: Tensor, *weight_branch) -> None:
    *weight, a, b, _, seed, p, _ = weight_branch
    _check_backward("lora_linear_4bit_backward", dy, x, s, a, b, seed, p)
    check_linear_4bit_dx(dy, *weight, x.shape[-1])


def check_lora_linear_int8_backward(dy: Tensor, x: Tensor, s: Tensor, values, absmax, *branch) -> None:
    a, b, _, seed, p, _ = branch
    _check_backward("lora_linear_int8_backward", dy, x, s, a, b, seed, p)
    check_linear_int8_dx(dy, values, absmax)


CHECKS = {name: globals()[f"check_{name}"] for name in SCHEMAS}

# ---------------------------------------------------------------------------------------------------
# Fakes: fresh contiguous outputs, as the kernels allocate them.


def _fake_quantize_4bit(x, quant_type, block_size):
    n = x.numel()
    return (
        x.new_empty(((n + 1) // 2, 1), dtype=torch.uint8),
        x.new_empty((-(-n // block_size),), dtype=torch.float32),
    )


def _fake_quantize_int8(x, dim, block_size, threshold):
    return (
        x.new_empty(x.shape, dtype=torch.int8),
        x.new_empty(_absmax_shape(x, dim, block_size), dtype=torch.float32),
        x.new_empty((x.shape[-1] if threshold > 0 else 0,), dtype=torch.bool),
    )


def _fake_lora(x, *rest):
    a, b, keep_s = rest[-6], rest[-5], rest[-1]
    return (
        x.new_empty((*x.shape[:-1], b.shape[0])),
        x.new_empty((*x.shape[:-1], a.shape[0]) if keep_s else (0,)),
    )


def _fake_lora_backward(dy, x, *rest):
    a, b, needed = rest[-6], rest[-5], rest[-1]
    return tuple(t.new_empty(t.shape if wanted else (0,)) for t, wanted in zip((x, a, b), needed, strict=True))


_FAKES = {
    "quantize_4bit": _fake_quantize_4bit,
    "dequantize_4bit": lambda packed, *a: packed.new_empty(a[-2], dtype=a[-1]),
    "linear_4bit": lambda x, *a: x.new_empty((*x.shape[:-1], a[-2])),
    "linear_4bit_dx": lambda dy, *a: dy.new_empty((*dy.shape[:-1], a[-1])),
    "embedding_4bit": lambda indices, *a: indices.new_empty((*indices.shape, a[-2]), dtype=a[-1]),
    "quantize_int8": _fake_quantize_int8,
    "dequantize_int8": lambda values, absmax, dim, block_size, dtype: values.new_empty(values.shape, dtype=dtype),
    "linear_int8": lambda x, values, *a: x.new_empty((*x.shape[:-1], values.shape[0])),
    "linear_int8_dx": lambda dy, values, absmax: dy.new_empty((*dy.shape[:-1], values.shape[1])),
    "dropout": lambda x, seed, p: x.new_empty(x.shape),
    "lora_linear_4bit": _fake_lora,
    "lora_linear_4bit_backward": _fake_lora_backward,
    "lora_linear_int8": _fake_lora,
    "lora_linear_int8_backward": _fake_lora_backward,
}


def register(namespace: str, name: str) -> None:
    """Declares an op of SCHEMAS as `torch.ops.<namespace>.<name>`, with its check and fake."""
    check, fake = CHECKS[name], _FAKES[name]

    def checked_fake(*args):
        check(*args)
        return fake(*args)

    torch.library.define(f"{namespace}::{name}", SCHEMAS[name], tags=torch.Tag.pt2_compliant_tag)
    torch.library.register_fake(f"{namespace}::{name}", checked_fake)


for _name in SCHEMAS:
    register("quantlib", _name)
