"""Triton kernels for quantized weights; needs nothing but torch and triton.

Functions take and return plain tensors, with the arguments of the `torch.ops.quantlib` op of the same name.
"""

from .nf4 import dequantize_4bit

__all__ = ["dequantize_4bit"]
