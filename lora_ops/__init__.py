"""LoRA fused with quantlib's layers: the function, a module, and the layer that PEFT uses.

lora_linear           one linear layer with its LoRA branch, as one autograd function
LoraLinear            a module around it, for use without PEFT
register_peft         makes `get_peft_model` and `PeftModel.from_pretrained` use the fused layer
prepare_for_training  freezes a model, checkpoints its activations, upcasts nothing
"""

from lora_ops.functional import lora_linear
from lora_ops.modules import LoraLinear, prepare_for_training


def register_peft() -> None:
    """Makes PEFT adapt `quantlib.Linear4bit` and `Linear8bit` with the fused LoRA layer, in this process.

    Call it once before `get_peft_model` or `PeftModel.from_pretrained`; calling it again changes nothing.
    Checkpoints stay PEFT's own: they load in stock PEFT and the other way round.

    Raises:
        ImportError: PEFT is not installed. RuntimeError: this version of PEFT is built differently.
    """
    from lora_ops.peft import register

    register()


__all__ = ["LoraLinear", "lora_linear", "prepare_for_training", "register_peft"]
