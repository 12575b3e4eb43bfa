"""Triton kernels for quantized weights; needs nothing but torch and triton.

They are tested under Triton's interpreter and compiled for every GPU they are for; none has run on one yet.

Functions take and return plain tensors, with the arguments of the `torch.ops.quantlib` op of the same name. Those of
experts (`grouped.py`), `absmax_int8` and `rms_norm_quantize_int8` are no such ops.
"""

from .absmax import absmax_int8, dequantize_int8, quantize_int8, rms_norm_quantize_int8
from .dropout import dropout
from .grouped import linear_4bit_grouped, linear_4bit_grouped_dx
from .int8 import linear_int8, linear_int8_dx
from .linear_4bit import linear_4bit
from .linear_4bit_backward import linear_4bit_dx
from .lora import lora_linear_4bit, lora_linear_4bit_backward, lora_linear_int8, lora_linear_int8_backward
from .nf4 import dequantize_4bit, embedding_4bit, quantize_4bit

__all__ = [
    "absmax_int8",
    "dequantize_4bit",
    "dequantize_int8",
    "dropout",
    "embedding_4bit",
    "linear_4bit",
    "linear_4bit_dx",
    "linear_4bit_grouped",
    "linear_4bit_grouped_dx",
    "linear_int8",
    "linear_int8_dx",
    "lora_linear_4bit",
    "lora_linear_4bit_backward",
    "lora_linear_int8",
    "lora_linear_int8_backward",
    "quantize_4bit",
    "quantize_int8",
    "rms_norm_quantize_int8",
]
