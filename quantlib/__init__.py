"""Quantized weights for training: NF4/FP4 and int8, as functions, `nn.Module`s and PyTorch ops."""

from quantlib.backends import explain, use_backend
from quantlib.convert import quantize_model
from quantlib.formats import Quantized4bit, QuantizedInt8
from quantlib.functional import (
    dequantize_4bit,
    dequantize_int8,
    embedding_4bit,
    linear_4bit,
    linear_int8,
    quantize_4bit,
    quantize_int8,
)
from quantlib.modules import Embedding4bit, Linear4bit, Linear8bit

__version__ = "0.1.0"

__all__ = [
    "Embedding4bit",
    "Linear4bit",
    "Linear8bit",
    "Quantized4bit",
    "QuantizedInt8",
    "dequantize_4bit",
    "dequantize_int8",
    "embedding_4bit",
    "explain",
    "linear_4bit",
    "linear_int8",
    "quantize_4bit",
    "quantize_int8",
    "quantize_model",
    "use_backend",
]
