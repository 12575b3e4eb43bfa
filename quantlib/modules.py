"""Drop-in layers on quantized weights: Linear4bit, Linear8bit, Embedding4bit.

They subclass the torch layer that they replace, hold the packed weight as a frozen parameter and its scales as
buffers, and read and write the state dicts of bitsandbytes' `Linear4bit` and `Linear8bitLt`. Loading a float
weight quantizes it. `module.half()`, `.to(dtype)` and the like cast the bias but leave the packed weight and the
float32 scales as they are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from quantlib import checkpoint, functional
from quantlib.formats import Quantized4bit, QuantizedInt8


class Params4bit(nn.Parameter):
    """Packed 4-bit codes. The class name tells PEFT's `prepare_model_for_kbit_training`, which looks for it,
    that this is not a float parameter to be cast, whatever dtype it is stored in."""


class _QuantizedWeight:
    """What the quantized layers share: a frozen `weight`, scale buffers, casts, and the state dict.

    A layer names its scale buffers in `_scales` and maps its tensors to a container and to a state dict and back.
    """

    _scales: tuple[str, ...]

    @property
    def quantized(self) -> Quantized4bit | QuantizedInt8:
        """The weight as a container; it shares memory with the layer."""
        raise NotImplementedError

    def set_quantized(self, q: Any) -> None:
        """Replaces the stored weight by a container of the same kind and shape; shares its memory."""
        raise NotImplementedError

    def _quantize(self, weight: Tensor) -> Any:
        raise NotImplementedError

    def _shape(self) -> tuple[int, int]:
        raise NotImplementedError

    @property
    def W_q(self) -> nn.Parameter:
        """The stored weight. With `dequantize()` this is how PEFT recognises a layer that it must decode."""
        return self.weight

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, [out_features, in_features], in the original dtype by default."""
        return self.quantized.dequantize(dtype)

    def quantize_(self, weight: Tensor) -> None:
        """Replaces the stored weight by the quantization of a float weight of the same shape."""
        if tuple(weight.shape) != self._shape():
            raise ValueError(
                f"{type(self).__name__}.quantize_: weight has shape {tuple(weight.shape)}; expected {self._shape()}"
            )
        self.set_quantized(self._quantize(weight))

    def _set_scales(self, **scales: Tensor | None) -> None:
        for name, scale in scales.items():
            self.register_buffer(name, scale, persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        fixed = {id(self.weight), *(id(getattr(self, name)) for name in self._scales)}

        def fn_keeping_dtype(t: Tensor) -> Tensor:
            out = fn(t)
            return t.to(out.device) if id(t) in fixed and out.dtype != t.dtype else out

        return super()._apply(fn_keeping_dtype, recurse)

    def _save_to_state_dict(self, destination: dict, prefix: str, keep_vars: bool) -> None:
        others = {}
        super()._save_to_state_dict(others, prefix, keep_vars)
        del others[prefix + "weight"]
        destination.update(self._weight_state(prefix))
        destination.update(others)

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        name = prefix + "weight"
        own = self._weight_keys(state_dict, prefix)
        if name in state_dict:
            try:
                self._load_weight(state_dict, prefix)
            except (TypeError, ValueError) as error:
                error_msgs.append(str(error))
        rest = {key: value for key, value in state_dict.items() if key not in own}
        missing: list[str] = []
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys.extend(key for key in missing if key != name or name not in state_dict)

    def _load_weight(self, state_dict: dict, prefix: str) -> None:
        weight = state_dict[prefix + "weight"]
        device = weight.device if self.weight.is_meta else self.weight.device
        if weight.is_floating_point() and tuple(weight.shape) == self._shape():
            self.quantize_(weight.to(device))
            return
        q = self._read_state(state_dict, prefix)
        if tuple(q.shape) != self._shape():
            raise ValueError(
                f"{prefix}weight holds a quantized tensor of shape {tuple(q.shape)}; this {type(self).__name__} "
                f"is {self._shape()}"
            )
        self.set_quantized(q.to(device))


class _Weight4bit(_QuantizedWeight):
    _scales = ("absmax", "nested_absmax", "nested_codebook", "offset")

    def _set_format(self, quant_type: str, block_size: int, double_quant: bool, quant_storage: torch.dtype) -> None:
        self.quant_type = quant_type
        self.block_size = block_size
        self.double_quant = double_quant
        self.quant_storage = quant_storage

    @property
    def quantized(self) -> Quantized4bit:
        scales = self._buffers  # nn.Module takes half a microsecond to find each as an attribute
        return Quantized4bit(
            self.weight,
            scales["absmax"],
            scales["nested_absmax"],
            scales["nested_codebook"],
            scales["offset"],
            self.quant_type,
            self.block_size,
            torch.Size(self._shape()),
            self.weight_dtype,
        )

    def set_quantized(self, q: Quantized4bit) -> None:
        self._set_format(q.quant_type, q.block_size, q.double_quant, q.packed.dtype)
        self.weight_dtype = q.dtype
        self.weight = Params4bit(q.packed.detach(), requires_grad=False)
        self._set_scales(**{name: getattr(q, name) for name in self._scales})

    def _quantize(self, weight: Tensor) -> Quantized4bit:
        return functional.quantize_4bit(weight, self.quant_type, self.block_size, self.double_quant, self.quant_storage)

    def _weight_state(self, prefix: str) -> dict[str, Tensor]:
        return checkpoint.state_dict_4bit(self.quantized, prefix)

    def _weight_keys(self, state_dict: dict, prefix: str) -> list[str]:
        return checkpoint.keys_4bit(state_dict, prefix)

    def _read_state(self, state_dict: dict, prefix: str) -> Quantized4bit:
        return checkpoint.load_4bit(state_dict, prefix)

    def _format_repr(self) -> str:
        return f"quant_type={self.quant_type}, block_size={self.block_size}, double_quant={self.double_quant}"


def _uniform_weight(rows: int, columns: int, device: torch.device | str | None) -> Tensor:
    """A fresh weight as `nn.Linear` draws it."""
    weight = torch.empty(rows, columns, device=device)
    nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
    return weight


class _QuantizedLinear(_QuantizedWeight):
    def _init_linear(self, in_features: int, out_features: int, bias: bool, device: torch.device | str | None) -> None:
        self.in_features = in_features
        self.out_features = out_features
        self.quantize_(_uniform_weight(out_features, in_features, device))
        if bias:
            bound = 1 / math.sqrt(in_features) if in_features else 0
            self.bias = nn.Parameter(torch.empty(out_features, device=device).uniform_(-bound, bound))
        else:
            self.register_parameter("bias", None)

    def _shape(self) -> tuple[int, int]:
        return self.out_features, self.in_features

    @classmethod
    def from_linear(cls, linear: nn.Linear, **options: Any) -> nn.Linear:
        """Quantizes the weight of `linear`; the bias is taken over, not copied.

        Args:
            linear: a layer in float32, float16 or bfloat16.
            options: keyword arguments of the constructor, such as `block_size`.
        """
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta", **options)
        layer.quantize_(linear.weight)
        layer.bias = linear.bias
        return layer.train(linear.training)


class Linear4bit(_QuantizedLinear, _Weight4bit, nn.Linear):
    """`nn.Linear` on a frozen NF4 or FP4 weight.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`; the weight is drawn alike, then quantized.
        compute_dtype: dtype to multiply in; the result returns in the dtype of x. None: the dtype of x.
        quant_type, block_size, double_quant, quant_storage: the format, see `quantlib.quantize_4bit`.

    Shapes: [..., in_features] -> [..., out_features].
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        compute_dtype: torch.dtype | None = None,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.compute_dtype = compute_dtype
        self._set_format(quant_type, block_size, double_quant, quant_storage)
        self._init_linear(in_features, out_features, bias, device)

    def forward(self, x: Tensor) -> Tensor:
        if self.compute_dtype is None:
            return functional.linear_4bit(x, self.quantized, _cast(self.bias, x.dtype))
        dtype = self.compute_dtype
        return _cast(functional.linear_4bit(_cast(x, dtype), self.quantized, _cast(self.bias, dtype)), x.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, {self._format_repr()}"


def _cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return t if t is None or t.dtype == dtype else t.to(dtype)


class Linear8bit(_QuantizedLinear, nn.Linear):
    """`nn.Linear` on a frozen int8 weight, one absmax a row, with LLM.int8()'s outlier split.

    Args:
        in_features, out_features, bias, device: as in `nn.Linear`; the weight is drawn alike, then quantized.
        threshold: columns of x with an element of at least this magnitude are multiplied in the dtype of x; 0: off.

    Shapes: [..., in_features] -> [..., out_features].
    """

    _scales = ("absmax",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        threshold: float = 6.0,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.threshold = threshold
        self._init_linear(in_features, out_features, bias, device)

    @property
    def quantized(self) -> QuantizedInt8:
        return QuantizedInt8(self.weight, self.absmax, None, -1, None, self.weight_dtype)

    def set_quantized(self, q: QuantizedInt8) -> None:
        self.weight_dtype = q.dtype
        self.weight = nn.Parameter(q.values, requires_grad=False)
        self._set_scales(absmax=q.absmax)

    def _quantize(self, weight: Tensor) -> QuantizedInt8:
        return functional.quantize_int8(weight)

    def _weight_state(self, prefix: str) -> dict[str, Tensor]:
        return checkpoint.state_dict_int8(self.quantized, prefix)

    def _weight_keys(self, state_dict: dict, prefix: str) -> list[str]:
        return checkpoint.keys_int8(state_dict, prefix)

    def _read_state(self, state_dict: dict, prefix: str) -> QuantizedInt8:
        # The int8 format does not record the original dtype.
        return replace(checkpoint.load_int8(state_dict, prefix), dtype=self.weight_dtype)

    def forward(self, x: Tensor) -> Tensor:
        return functional.linear_int8(x, self.quantized, _cast(self.bias, x.dtype), self.threshold)

    def extra_repr(self) -> str:
        return f"{nn.Linear.extra_repr(self)}, threshold={self.threshold}"


class Embedding4bit(_Weight4bit, nn.Embedding):
    """`nn.Embedding` on a frozen NF4 or FP4 table; only the rows that are looked up are decoded.

    Args:
        num_embeddings, embedding_dim, padding_idx, device: as in `nn.Embedding`; drawn alike, then quantized.
        dtype: of the result; None: the dtype of the weight that was quantized.
        quant_type, block_size, double_quant, quant_storage: the format, see `quantlib.quantize_4bit`.

    Shapes: indices [...] -> [..., embedding_dim].
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        dtype: torch.dtype | None = None,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        quant_storage: torch.dtype = torch.uint8,
        device: torch.device | str | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.num_embeddings = num_embeddings
        self.embedding_dim = embedding_dim
        self.padding_idx = padding_idx
        # Attributes that nn.Embedding's repr reads; a frozen table has no gradient to scale and no norm to cap.
        self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse = None, 2.0, False, False
        self.dtype = dtype
        self._set_format(quant_type, block_size, double_quant, quant_storage)
        weight = torch.empty(num_embeddings, embedding_dim, device=device).normal_()
        if padding_idx is not None:
            weight[padding_idx] = 0
        self.quantize_(weight)

    def _shape(self) -> tuple[int, int]:
        return self.num_embeddings, self.embedding_dim

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **options: Any) -> Embedding4bit:
        """Quantizes the table of `embedding`.

        Args:
            embedding: a table in float32, float16 or bfloat16, without `max_norm`.
            options: keyword arguments of the constructor.
        """
        if embedding.max_norm is not None:
            raise ValueError("Embedding4bit.from_embedding: max_norm rewrites the table on look-up; it is frozen here")
        sizes = embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx
        layer = cls(*sizes, device="meta", **options)
        layer.quantize_(embedding.weight)
        return layer.train(embedding.training)

    def forward(self, indices: Tensor) -> Tensor:
        return functional.embedding_4bit(indices, self.quantized, self.dtype)

    def extra_repr(self) -> str:
        return f"{nn.Embedding.extra_repr(self)}, {self._format_repr()}"
