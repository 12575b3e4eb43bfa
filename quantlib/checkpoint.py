"""Quantized weights as bitsandbytes writes them into a state dict, and back.

4-bit (`bitsandbytes.nn.Linear4bit`), under the module's prefix:

    weight                                  packed bytes, [bytes, 1] uint8, or viewed as a float storage dtype
    weight.absmax                           [blocks] float32; uint8 under double quantization
    weight.quant_map                        [16] float32, the codebook
    weight.nested_absmax                    [ceil(blocks / 256)] float32, double quantization only
    weight.nested_quant_map                 [256] float32, double quantization only
    weight.quant_state.bitsandbytes__nf4    or __fp4: UTF-8 JSON in a uint8 tensor

int8 (`bitsandbytes.nn.Linear8bitLt`): `weight` [out, in] int8, `SCB` [out] float32 (the row absmax), and
`weight_format`, uint8 0 for row-major.

What is read is checked entry by entry, as a file may be truncated or come from elsewhere; nothing is unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quantlib import formats
from quantlib.formats import BLOCK_SIZES, NESTED_BLOCK_SIZE, QUANT_TYPES, Quantized4bit, QuantizedInt8

_BLOB = "weight.quant_state.bitsandbytes__"
_ENTRIES_4BIT = ("weight", "weight.absmax", "weight.quant_map", "weight.nested_absmax", "weight.nested_quant_map")
_ENTRIES_INT8 = ("weight", "SCB", "weight_format")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_STORAGE_DTYPES = (torch.uint8, *_DTYPES.values())
_FIELDS = ("quant_type", "blocksize", "dtype", "shape")
_NESTED_FIELDS = ("nested_blocksize", "nested_dtype", "nested_offset")
_ROW_MAJOR = 0


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _entry(state_dict: Mapping[str, Any], key: str) -> Tensor:
    if key not in state_dict:
        raise ValueError(f"{key!r} is missing; the checkpoint is incomplete or its weight is not quantized")
    value = state_dict[key]
    if not isinstance(value, Tensor):
        raise ValueError(f"{key!r} is a {type(value).__name__}; a tensor is expected")
    return value


def _checked(state_dict: Mapping[str, Any], key: str, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    value = _entry(state_dict, key)
    if value.dtype != dtype or value.shape != shape:
        raise ValueError(
            f"{key!r} is {_name(value.dtype)} of shape {list(value.shape)}; "
            f"this weight needs {_name(dtype)} of shape {list(shape)}"
        )
    return value


# ---------------------------------------------------------------------------------------------------
# 4-bit


def state_dict_4bit(q: Quantized4bit, prefix: str = "") -> dict[str, Tensor]:
    """The entries of a 4-bit weight, in bitsandbytes' order, under `prefix` (a module's, such as "layers.0.").

    The tensors share the container's memory, except for the codebooks, which are copied: safetensors refuses
    tensors that share memory among themselves.
    """
    state = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": _name(q.dtype),
        "shape": list(q.shape),
    }
    entries = {
        "weight": q.packed,
        "weight.absmax": q.absmax,
        "weight.quant_map": formats.codebook(q.quant_type, q.device).clone(),
    }
    if q.double_quant:
        entries["weight.nested_absmax"] = q.nested_absmax
        entries["weight.nested_quant_map"] = q.nested_codebook.clone()
        nested = (NESTED_BLOCK_SIZE, "float32", q.offset.item())
        state.update(zip(_NESTED_FIELDS, nested, strict=True))
    blob = json.dumps(state).encode()
    entries[_BLOB + q.quant_type] = torch.tensor(list(blob), dtype=torch.uint8)
    return {prefix + name: value.detach() for name, value in entries.items()}


def keys_4bit(state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of `state_dict` that belong to the 4-bit weight under `prefix`, in the state dict's order."""
    entries = {prefix + name for name in _ENTRIES_4BIT}
    return [key for key in state_dict if key in entries or key.startswith(prefix + _BLOB)]


def _read_blob(state_dict: Mapping[str, Any], prefix: str) -> tuple[str, dict[str, Any]]:
    """The key and the fields of the quant-state blob, each field checked on its own."""
    found = [key for key in state_dict if key.startswith(prefix + _BLOB)]
    if len(found) != 1:
        raise ValueError(
            f"{prefix + _BLOB + 'nf4'!r} or '...__fp4' is expected once, found {found or 'none'}; "
            "the checkpoint is incomplete or its weight is not quantized to 4 bits"
        )
    key = found[0]
    blob = _entry(state_dict, key)
    if blob.dtype != torch.uint8 or blob.dim() != 1:
        raise ValueError(f"{key!r} is {_name(blob.dtype)} of shape {list(blob.shape)}; 1-D uint8 is expected")
    try:
        state = json.loads(bytes(blob.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{key!r} is not JSON ({error}); the checkpoint is damaged") from None
    if not isinstance(state, dict) or set(state) not in (set(_FIELDS), {*_FIELDS, *_NESTED_FIELDS}):
        fields = sorted(state) if isinstance(state, dict) else type(state).__name__
        raise ValueError(f"{key!r} has {fields}; expected {list(_FIELDS)}, with {list(_NESTED_FIELDS)} or without")

    def is_size(value: Any) -> bool:
        return type(value) is int and 0 <= value < 2**63

    def must(field: str, valid: bool, allowed: str) -> None:
        if not valid:
            raise ValueError(f"{key!r}: {field} is {state[field]!r}; allowed: {allowed}")

    must("quant_type", state["quant_type"] in QUANT_TYPES, ", ".join(QUANT_TYPES))
    must("quant_type", key == prefix + _BLOB + state["quant_type"], "the one in the key")
    must("blocksize", is_size(state["blocksize"]) and state["blocksize"] in BLOCK_SIZES, f"one of {BLOCK_SIZES}")
    must("dtype", isinstance(state["dtype"], str) and state["dtype"] in _DTYPES, ", ".join(_DTYPES))
    shape = state["shape"]
    must("shape", isinstance(shape, list) and all(map(is_size, shape)), "a list of sizes")
    if "nested_offset" in state:
        must("nested_blocksize", state["nested_blocksize"] == NESTED_BLOCK_SIZE, str(NESTED_BLOCK_SIZE))
        must("nested_dtype", state["nested_dtype"] == "float32", "float32")
        must("nested_offset", isinstance(state["nested_offset"], float), "a float")
    return key, state


def load_4bit(state_dict: Mapping[str, Any], prefix: str = "") -> Quantized4bit:
    """The 4-bit weight under `prefix`, sharing the state dict's tensors.

    Raises:
        ValueError: naming the key, if an entry is missing, has a dtype or shape that does not fit the weight, if
            the quant-state blob is damaged or asks for something unknown, or if quant_map is not the codebook.
    """
    key, state = _read_blob(state_dict, prefix)
    quant_type, block_size, shape = state["quant_type"], state["blocksize"], torch.Size(state["shape"])
    n = math.prod(shape)
    blocks = -(-n // block_size)

    packed = _entry(state_dict, prefix + "weight")
    if packed.dtype not in _STORAGE_DTYPES:
        names = ", ".join(map(_name, _STORAGE_DTYPES))
        raise ValueError(f"{prefix + 'weight'!r} is {_name(packed.dtype)}; packed codes are one of {names}")
    stored = (n + 1) // 2 // packed.dtype.itemsize
    if packed.nbytes != (n + 1) // 2 or packed.shape != (stored, 1):
        raise ValueError(
            f"{prefix + 'weight'!r} is {_name(packed.dtype)} of shape {list(packed.shape)}, {packed.nbytes} bytes; "
            f"a weight of shape {list(shape)} needs {(n + 1) // 2} bytes, in one column"
        )
    codebook = _checked(state_dict, prefix + "weight.quant_map", torch.float32, (16,))
    if not torch.allclose(codebook, formats.codebook(quant_type, codebook.device), rtol=0, atol=1e-6):
        raise ValueError(
            f"{prefix + 'weight.quant_map'!r} is not the {quant_type} codebook; only that one can be decoded"
        )

    nested: tuple[Tensor | None, ...] = (None, None, None)
    nested_keys = (prefix + "weight.nested_absmax", prefix + "weight.nested_quant_map")
    if "nested_offset" in state:
        absmax = _checked(state_dict, prefix + "weight.absmax", torch.uint8, (blocks,))
        nested = (
            _checked(state_dict, nested_keys[0], torch.float32, (-(-blocks // NESTED_BLOCK_SIZE),)),
            _checked(state_dict, nested_keys[1], torch.float32, (256,)),
            torch.tensor(state["nested_offset"], dtype=torch.float32, device=packed.device),
        )
    else:
        absmax = _checked(state_dict, prefix + "weight.absmax", torch.float32, (blocks,))
        for name in nested_keys:
            if name in state_dict:
                raise ValueError(f"{name!r} is there, but {key!r} has no {', '.join(_NESTED_FIELDS)}")
    return Quantized4bit(packed, absmax, *nested, quant_type, block_size, shape, _DTYPES[state["dtype"]])


# ---------------------------------------------------------------------------------------------------
# int8


def state_dict_int8(q: QuantizedInt8, prefix: str = "") -> dict[str, Tensor]:
    """The entries of a row-wise int8 weight, [out, in], under `prefix`, sharing the container's memory.

    Raises:
        ValueError: for any other granularity or rank, for which bitsandbytes has no format.
    """
    if q.dim != -1 or q.values.dim() != 2:
        raise ValueError(
            f"state_dict_int8: the weight has dim={q.dim} and shape {list(q.shape)}; "
            "only matrices quantized with dim=-1 (one absmax a row) have a checkpoint format"
        )
    weight_format = torch.tensor(_ROW_MAJOR, dtype=torch.uint8)
    values = (q.values, q.absmax, weight_format)
    return {prefix + name: value.detach() for name, value in zip(_ENTRIES_INT8, values, strict=True)}


def keys_int8(state_dict: Mapping[str, Any], prefix: str = "") -> list[str]:
    """The keys of `state_dict` that belong to the int8 weight under `prefix`, in the state dict's order."""
    entries = {prefix + name for name in _ENTRIES_INT8}
    return [key for key in state_dict if key in entries]


def load_int8(state_dict: Mapping[str, Any], prefix: str = "") -> QuantizedInt8:
    """The int8 weight under `prefix`, sharing the state dict's tensors.

    The format does not record the original dtype: the container says float16, which bitsandbytes quantizes from.

    Raises:
        ValueError: naming the key, if an entry is missing, has a dtype or shape that does not fit, or if
            `weight_format` is not row-major (checkpoints without it are).
    """
    values = _entry(state_dict, prefix + "weight")
    if values.dtype != torch.int8 or values.dim() != 2:
        raise ValueError(
            f"{prefix + 'weight'!r} is {_name(values.dtype)} of shape {list(values.shape)}; an int8 matrix is expected"
        )
    absmax = _checked(state_dict, prefix + "SCB", torch.float32, (values.shape[0],))
    format_key = prefix + "weight_format"
    if format_key in state_dict:
        weight_format = _entry(state_dict, format_key)
        if weight_format.numel() != 1 or weight_format.item() != _ROW_MAJOR:
            raise ValueError(
                f"{format_key!r} is {weight_format.tolist()}; only {_ROW_MAJOR} (row-major) can be read: "
                "quantize the original weight again"
            )
    return QuantizedInt8(values, absmax, None, -1, None, torch.float16)
