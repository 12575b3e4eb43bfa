"""LoRA linear, plain PyTorch: the oracle of the fused function. Runs in any float dtype, float64 included.

    x^ = keep * x / (1 - p)        S = x^ A^T        y = x W^T + b + s S B^T

LoRA: arXiv 2106.09685. W [out, in] is dense (decode a quantized weight first), A [rank, in], B [out, rank].
The gradients are written out rather than left to autograd, so that they can be held against both.
"""

from __future__ import annotations

import torch
from torch import Tensor


def apply_dropout(x: Tensor, keep: Tensor | None, dropout_p: float) -> Tensor:
    """`x / (1 - p)` where `keep` (bool, shape of x) is set, 0 elsewhere; x itself without a mask."""
    return x if keep is None else torch.where(keep, x / (1 - dropout_p), 0)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    bias: Tensor | None = None,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """The forward pass. x [..., in] -> [..., out]; all tensors of one dtype."""
    y = x @ weight.t() + scaling * (apply_dropout(x, keep, dropout_p) @ A.t()) @ B.t()
    return y if bias is None else y + bias


def lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    keep: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients (dx [..., in], dA [rank, in], dB [out, rank], dbias [out]) for dy [..., out].

    dS = s dY B     dB = s dY^T S     dA = dS^T x^     dX = dY W + drop'(dS A)     db = sum dY
    """
    dropped = apply_dropout(x, keep, dropout_p).reshape(-1, x.shape[-1])
    rows = dy.reshape(-1, dy.shape[-1])
    dS = scaling * rows @ B
    dB = scaling * rows.t() @ (dropped @ A.t())
    dA = dS.t() @ dropped
    dx = dy @ weight + apply_dropout((dS @ A).reshape(x.shape), keep, dropout_p)
    return dx, dA, dB, rows.sum(0)
