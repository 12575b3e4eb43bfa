"""LoraLinear: LoRA on a linear layer, quantized or not, for use without PEFT."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lora_ops.functional import lora_linear
from quantlib import Linear4bit, Linear8bit


def lora_forward(
    base_layer: nn.Linear,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scaling: float,
    lora_bias: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor:
    """`base_layer(x) + scaling * (dropout(x) A^T B^T + lora_bias)` by the fused function, as the layer computes it.

    Args:
        base_layer: nn.Linear with a frozen weight, Linear4bit (its compute_dtype is kept) or Linear8bit (its
            threshold is kept).
        x: [..., in_features]. A: [rank, in_features]. B: [out_features, rank]. lora_bias: [out_features] or None.

    Returns:
        [..., out_features] in the dtype that `base_layer(x)` has.
    """
    base = base_layer.quantized if isinstance(base_layer, (Linear4bit, Linear8bit)) else base_layer.weight
    bias = base_layer.bias
    if lora_bias is not None:
        bias = scaling * lora_bias if bias is None else bias + scaling * lora_bias
    threshold = base_layer.threshold if isinstance(base_layer, Linear8bit) else 0.0
    compute_dtype = getattr(base_layer, "compute_dtype", None)
    if compute_dtype is None:
        return lora_linear(x, base, A, B, scaling, bias, dropout_p, threshold)
    return lora_linear(x.to(compute_dtype), base, A, B, scaling, bias, dropout_p).to(x.dtype)


class LoraLinear(nn.Module):
    """A frozen linear layer with a trainable low-rank branch (LoRA, arXiv 2106.09685).

    y = base_layer(x) + alpha / rank * dropout(x) lora_A^T lora_B^T, [..., in_features] -> [..., out_features].
    lora_A [rank, in_features] starts uniform as in `nn.Linear`, lora_B [out_features, rank] at zero.

    Args:
        base_layer: nn.Linear, quantlib.Linear4bit or Linear8bit; its parameters are frozen here.
        rank, alpha, dropout: of the branch.
        dtype: of lora_A and lora_B; float32 by default, whatever x is.

    Raises:
        TypeError: base_layer. ValueError: rank or dropout.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        rank: int = 16,
        alpha: float = 16.0,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        if not isinstance(base_layer, nn.Linear):
            raise TypeError(
                f"lora_ops.LoraLinear: base_layer is a {type(base_layer).__name__}; "
                "pass a torch.nn.Linear, quantlib.Linear4bit or quantlib.Linear8bit"
            )
        if rank < 1:
            raise ValueError(f"lora_ops.LoraLinear: rank is {rank}; it must be >= 1")
        if not 0 <= dropout < 1:
            raise ValueError(f"lora_ops.LoraLinear: dropout is {dropout}; it must be in [0, 1)")
        super().__init__()
        self.base_layer = base_layer.requires_grad_(False)
        self.scaling = alpha / rank
        self.dropout = dropout
        device = base_layer.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base_layer.in_features, device=device, dtype=dtype))
        self.lora_B = nn.Parameter(torch.zeros(base_layer.out_features, rank, device=device, dtype=dtype))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def forward(self, x: Tensor) -> Tensor:
        dropout_p = self.dropout if self.training else 0.0
        return lora_forward(self.base_layer, x, self.lora_A, self.lora_B, self.scaling, dropout_p=dropout_p)

    @torch.no_grad()
    def merge(self) -> nn.Linear:
        """Adds the branch to the weight of `base_layer`, in place, and returns that layer.

        A quantized weight is decoded, summed in float32 and quantized again, which rounds.
        """
        delta = self.scaling * self.lora_B.float() @ self.lora_A.float()
        if isinstance(self.base_layer, (Linear4bit, Linear8bit)):
            self.base_layer.quantize_(self.base_layer.dequantize(torch.float32) + delta)
        else:
            self.base_layer.weight.copy_(self.base_layer.weight + delta)
        return self.base_layer

    def extra_repr(self) -> str:
        return f"rank={self.lora_A.shape[0]}, scaling={self.scaling:g}, dropout={self.dropout:g}"


def prepare_for_training(model: nn.Module, gradient_checkpointing: bool = True) -> nn.Module:
    """Prepares a transformers model for LoRA training, in place, before or after its adapters are added.

    Freezes every parameter except adapters (named "lora_..."). With gradient_checkpointing, turns on
    non-reentrant checkpointing and lets the embeddings' output require grad. No parameter is cast: PEFT's
    `prepare_model_for_kbit_training` turns all 16-bit parameters into float32, which costs memory and time.

    Args:
        model: a `transformers.PreTrainedModel`, or any module with gradient_checkpointing=False.

    Returns:
        The same model.

    Raises:
        ValueError: gradient_checkpointing on a model that does not support it.
    """
    if gradient_checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise ValueError(
            f"lora_ops.prepare_for_training: {type(model).__name__} does not support gradient checkpointing; "
            "pass gradient_checkpointing=False"
        )
    for name, parameter in model.named_parameters():
        if "lora_" not in name:
            parameter.requires_grad_(False)
    if gradient_checkpointing:
        # transformers 5 renames the method, and deprecates the old name
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
        if not getattr(model, "_require_grads_hooks", None):
            model.enable_input_require_grads()
    return model
