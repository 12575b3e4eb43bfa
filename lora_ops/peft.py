"""The PEFT layer for quantlib's linear layers, and its registration.

`register_peft()` makes PEFT put `LoraQuantizedLinear` on every `Linear4bit` and `Linear8bit`. It is PEFT's own
`lora.Linear` with two things replaced: the forward pass runs fused where it can, and merge and unmerge work on a
quantized weight. Attributes, checkpoint keys and everything else are PEFT's.
"""

from __future__ import annotations

import logging
import warnings
from typing import Any

import peft
import torch
from peft.tuners.lora import layer as peft_layer
from peft.tuners.lora import model as peft_model
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from lora_ops.modules import lora_forward
from quantlib import Linear4bit, Linear8bit

logger = logging.getLogger(__name__)
_said: set[str] = set()

# Variants and initialisations that neither read nor write the base weight as a float parameter.
_VARIANTS = ((), ("use_dora",), ("alora_invocation_tokens",), ("arrow_config",))
_INITS = ("gaussian", "eva")


def _say_once(reason: str) -> None:
    if not torch.compiler.is_compiling() and reason not in _said:
        _said.add(reason)
        logger.warning("lora_ops: PEFT's own LoRA computation is used, not the fused one: %s", reason)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward: hooks, or a forward set on the instance."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


class LoraQuantizedLinear(peft_layer.Linear):
    """LoRA on a `Linear4bit` or `Linear8bit`, fused. Interface and state dict of PEFT's `lora.Linear`.

    Merging decodes the weight, adds the branch in float32 and quantizes again, which rounds. While merged, the
    layer keeps the packed tensors from before (as many bytes again), so that unmerging restores them bit for bit.
    """

    _unmerged: tuple[Any, Tensor | None] | None = None

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        init = config.init_lora_weights
        if not isinstance(init, bool) and str(init).lower() not in _INITS:
            raise ValueError(
                f"lora_ops: init_lora_weights={init!r} reads or rewrites the base weight, which is quantized here; "
                f"use True, {', '.join(map(repr, _INITS))}, or initialise on the float model and quantize afterwards"
            )
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    @property
    def lora_variants(self) -> dict:
        return {key: variant for key, variant in super().lora_variants.items() if key in _VARIANTS}

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device, torch.dtype]:
        # PEFT takes the dtype of new adapters from the storage of the weight, which says nothing here.
        dtype = getattr(base_layer, "compute_dtype", None) or base_layer.quantized.dtype
        return base_layer.weight.device, dtype

    def fused_reason(self) -> str | None:
        """Why the fused computation cannot serve the layer in its present state; None if it does."""
        parts = self._fused_parts()
        return parts if isinstance(parts, str) else None

    def _fused_parts(self) -> str | tuple[str, nn.Module, nn.Module, nn.Module, nn.Module]:
        """The adapter's name, the base layer, lora_A, lora_B and dropout; or the reason."""
        if self.disable_adapters:
            return "adapters are disabled"
        if self.merged:
            return "adapters are merged"
        adapters = self.lora_A  # nn.Module takes half a microsecond to find each attribute
        names = [name for name in self.active_adapters if name in adapters]
        if len(names) != 1:
            return f"{len(names)} adapters are active"
        name = names[0]
        if name in self.lora_variant:
            return f"the adapter is a {type(self.lora_variant[name]).__name__}"
        base = self.base_layer
        if type(base) not in (Linear4bit, Linear8bit):
            return f"the base layer is a {type(base).__name__}"
        lora_A, lora_B, dropout = adapters[name], self.lora_B[name], self.lora_dropout[name]
        for part, allowed in ((lora_A, (nn.Linear,)), (lora_B, (nn.Linear,)), (dropout, (nn.Dropout, nn.Identity))):
            if type(part) not in allowed:
                return f"a part of the adapter is a {type(part).__name__}"
        for part in (lora_A, lora_B):
            if type(part.weight) not in (nn.Parameter, Tensor):
                return f"the adapter's weight is a {type(part.weight).__name__}"
        if any(map(_is_hooked, (base, lora_A, lora_B, dropout))):
            return "the layer or a part of the adapter has hooks"
        return name, base, lora_A, lora_B, dropout

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        parts = self._fused_parts()
        reason = parts if isinstance(parts, str) else None
        if reason is None and (args or any(value is not None for value in kwargs.values())):
            reason = f"extra arguments: {', '.join(kwargs) or len(args)}"
        if reason is not None:
            if not (self.disable_adapters or self.merged):
                _say_once(reason)
            return super().forward(x, *args, **kwargs)
        name, base, lora_A, lora_B, dropout = parts
        dropout_p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        return lora_forward(base, x, lora_A.weight, lora_B.weight, self.scaling[name], lora_B.bias, dropout_p)

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Merges the adapters, the active ones by default, into the quantized weight.

        Args:
            safe_merge: raise ValueError, before anything is changed, if the sum is not finite.
            adapter_names: which adapters.
        """
        for name in check_adapters_to_merge(self, adapter_names):
            if name in self.lora_A:
                self._merge_adapter(name, safe_merge)

    def _merge_adapter(self, name: str, safe_merge: bool) -> None:
        weight = self.get_base_layer().dequantize(torch.float32)
        if name in self.lora_variant:
            weight = self.lora_variant[name].merge_safe(self, name, weight)
        else:
            weight = weight + self.get_delta_weight(name)
        base = self.get_base_layer()
        bias = base.bias
        if self.lora_bias[name]:
            if bias is None:
                raise RuntimeError(
                    f"lora_ops: adapter {name!r} has lora_bias=True, but the base layer has no bias to merge it into"
                )
            bias = bias + self.scaling[name] * self.lora_B[name].bias
        if safe_merge and not (weight.isfinite().all() and (bias is None or bias.isfinite().all())):
            raise ValueError(
                f"lora_ops: merging adapter {name!r} gives NaN or infinity; nothing was changed, "
                "the adapter or the base weight is broken"
            )
        if self._unmerged is None:
            self._unmerged = (base.quantized, None if base.bias is None else base.bias.data)
        base.quantize_(weight)
        if bias is not None:
            base.bias.data = bias.to(base.bias.dtype)
        self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Restores the weight from before all merges, bit for bit."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        base = self.get_base_layer()
        quantized, bias = self._unmerged
        base.set_quantized(quantized.to(base.weight.device))
        if bias is not None:
            base.bias.data = bias.to(base.bias.device)
        for name in self.merged_adapters:
            self._caches.pop(f"{name}-weight_norm", None)  # kept by DoRA for PEFT's own unmerge
        self.merged_adapters.clear()
        self._unmerged = None


def register() -> None:
    """Makes PEFT use `LoraQuantizedLinear` for Linear4bit and Linear8bit, in this process; see `lora_ops`."""
    dispatch_default = getattr(peft_model, "dispatch_default", None)
    if getattr(dispatch_default, "serves_quantlib", False):
        return
    create = getattr(peft_model.LoraModel, "_create_new_module", None)
    globals_used = getattr(getattr(create, "__code__", None), "co_names", ())
    if dispatch_default is None or "dispatch_default" not in globals_used:
        raise RuntimeError(
            f"lora_ops.register_peft: PEFT {peft.__version__} chooses its LoRA layers in an unknown way; "
            "install the peft version named in this package's requirements, or report this"
        )

    def dispatch(
        target: nn.Module, adapter_name: str, config: Any, parameter_name: str | None = None, **kwargs: Any
    ) -> nn.Module | None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        if parameter_name is not None or not isinstance(base, (Linear4bit, Linear8bit)):
            return dispatch_default(target, adapter_name, config, parameter_name=parameter_name, **kwargs)
        config.fan_in_fan_out = False  # as PEFT does for nn.Linear
        return LoraQuantizedLinear(target, adapter_name, config=config, **kwargs)

    dispatch.serves_quantlib = True
    peft_model.dispatch_default = dispatch
