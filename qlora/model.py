"""Loading: base model, quantization, adapter. Everything is checked before it is used.

A base model is a directory in Hugging Face format (or the id of one on the hub) with its weights in
safetensors; pickled checkpoints are refused, because loading one runs its code.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

import lora_ops
import quantlib
from qlora.errors import InputError, check_choice, check_range, first_line
from quantlib import ops

if TYPE_CHECKING:
    from datasets import Dataset

BITS = (4, 8, 16)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]


@dataclass(frozen=True)
class Quantization:
    """How the weights of a base model are held; fields that do not belong to `bits` are ignored."""

    bits: int = 4
    quant_type: str = "nf4"
    block_size: int = 64
    double_quant: bool = True
    threshold: float = 6.0

    def check(self) -> None:
        """InputError for a value that is not allowed."""
        check_choice("--bits", self.bits, BITS)
        check_choice("--quant-type", self.quant_type, ops.QUANT_TYPES)
        check_choice("--block-size", self.block_size, ops.BLOCK_SIZES)
        check_range("--threshold", self.threshold, 0)

    def options(self) -> dict[str, object]:
        """The arguments of `quantlib.quantize_model` for these bits."""
        if self.bits == 4:
            return {
                "quant_type": self.quant_type,
                "block_size": self.block_size,
                "double_quant": self.double_quant,
            }
        return {"threshold": self.threshold}


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: this PyTorch sees no CUDA device; use --device cpu")
    return torch.device(name)


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 where the device multiplies bfloat16 matrices natively, float32 elsewhere.

    The layers that stay unquantized (lm_head, attention) are PyTorch's, and on a CPU without AVX-512 its
    bfloat16 products are tens of times slower than its float32 ones.
    """
    if name != "auto":
        return DTYPES[name]
    native = device.type != "cpu" or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.bfloat16 if native else torch.float32


def find_model(model: str) -> Path:
    """The local directory of a model given by path or hub id, with its files checked.

    Raises InputError if it is missing, not a model, already quantized, or its weights are pickled, absent
    or truncated.
    """
    path = Path(model).expanduser()
    if not path.exists():
        if model.startswith((".", "~", "/")) or len(path.parts) > 2:
            raise InputError(f"model directory {model} does not exist; give a directory or a hub id")
        try:
            path = Path(snapshot_download(model, allow_patterns=HUB_FILES))
        except (HFValidationError, HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
            raise InputError(
                f"model {model} is no directory, and the hub did not give it: {first_line(error)}"
            ) from None
    if not (path / "config.json").is_file():
        raise InputError(f"{model} is not a model directory: it has no config.json")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{model}/config.json is not JSON ({error}); fetch the model again") from None
    if "quantization_config" in config:
        raise InputError(f"{model} is already quantized; give the unquantized model and choose --bits")
    _check_weight_files(path)
    return path


def _check_weight_files(path: Path) -> None:
    index = path / "model.safetensors.index.json"
    if (path / "model.safetensors").is_file():
        names: Iterable[str] = ["model.safetensors"]
    elif index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{index} names no files; fetch the model again") from None
    elif pickled := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in path.glob(pattern)):
        raise InputError(
            f"{path} has only pickled weights ({pickled[0]}), which can run code when loaded; "
            f"convert them to safetensors"
        )
    else:
        raise InputError(f"{path} has no weights; expected model.safetensors")
    for name in names:
        if not (path / name).is_file():
            raise InputError(f"{path} lacks {name}, which its index names; fetch the model again")
        check_safetensors(path / name)


def check_safetensors(file: Path) -> set[str]:
    """The tensor names in a safetensors file; InputError if it is truncated or damaged."""
    try:
        with safe_open(file, framework="pt") as content:
            return set(content.keys())
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} is truncated or damaged ({str(error).splitlines()[0]}); fetch or write it again"
        ) from None


def check_finite(tensors: Iterable[tuple[str, torch.Tensor]], source: str) -> None:
    """InputError naming the first tensor that holds NaN or Inf."""
    for name, tensor in tensors:
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise InputError(f"{source}: {name} holds NaN or Inf; the checkpoint is broken, use another one")


def load_tokenizer(path: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model directory."""
    try:
        return AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"{path} has no usable tokenizer: {first_line(error)}") from None


def load_base(
    path: Path, quantization: Quantization, device: torch.device, dtype: torch.dtype, progress: bool = True
) -> tuple[PreTrainedModel, object | None]:
    """The model of a checked directory, quantized, in eval mode, and `quantize_model`'s report.

    The report is None for 16 bits. Raises InputError for a model of unknown type and for weights that do
    not fit the configuration, are missing, or hold NaN or Inf.
    """
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except (OSError, ValueError, KeyError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(f"{path} cannot be loaded as a causal language model: {first_line(error)}") from None
    for kind in ("mismatched", "missing"):
        if keys := info[f"{kind}_keys"]:
            key = sorted(keys, key=str)[0]
            detail = f"{key[0]} is {list(key[1])}, expected {list(key[2])}" if isinstance(key, tuple) else key
            raise InputError(
                f"{path}: weights do not match config.json ({len(keys)} {kind}, e.g. {detail}); "
                f"the checkpoint is damaged or belongs to another model"
            )
    check_finite(model.named_parameters(), str(path))
    model.config.use_cache = False
    report = None
    if quantization.bits != 16:
        report = quantlib.quantize_model(model, bits=quantization.bits, progress=progress, **quantization.options())
    return model.to(device).eval(), report


def add_adapter(
    model: PreTrainedModel, rank: int, alpha: float, dropout: float, target_modules: list[str] | str
) -> PeftModel:
    """A new LoRA adapter on the linear layers, ready for training; PEFT's layers where ours do not serve."""
    lora_ops.register_peft()
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=dropout,
        target_modules=target_modules,
        task_type="CAUSAL_LM",
    )
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"--target-modules: {str(error).splitlines()[0]}") from None


def load_adapter(model: PreTrainedModel, directory: str | Path) -> PeftModel:
    """The adapter saved in `directory`, on `model`, frozen. InputError if it is absent, damaged or not its."""
    directory = Path(directory)
    if not (directory / "adapter_config.json").is_file():
        raise InputError(f"{directory} has no adapter_config.json; give the output directory of a training")
    file = directory / "adapter_model.safetensors"
    if not file.is_file():
        raise InputError(f"{directory} has no adapter_model.safetensors (pickled adapters are refused)")
    found = check_safetensors(file)
    lora_ops.register_peft()
    try:
        adapted = PeftModel.from_pretrained(model, str(directory))
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise InputError(f"the adapter in {directory} does not fit this model: {reason}") from None
    expected = get_peft_model_state_dict(adapted, save_embedding_layers=False)
    if wrong := found.symmetric_difference(expected):
        raise InputError(
            f"the adapter in {directory} does not fit this model: {len(wrong)} tensors differ, "
            f"e.g. {sorted(wrong)[0]}; it is damaged or belongs to another model"
        )
    check_finite(expected.items(), str(file))
    return adapted.eval()


def check_tokens(blocks: Dataset, model: torch.nn.Module, seq_len: int) -> None:
    """InputError if the blocks are longer than the model's positions or hold tokens it has no embedding for."""
    positions = getattr(model.config, "max_position_embeddings", None)
    if positions is not None and seq_len > positions:
        raise InputError(f"--seq-len {seq_len}: the model has {positions} positions; give at most that")
    rows = model.get_input_embeddings().num_embeddings
    highest = max(map(max, blocks["input_ids"]))
    if highest >= rows:
        raise InputError(f"the tokenizer gives token {highest}, the model has {rows}; they do not belong together")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of every distinct parameter and buffer of the state dict, packed weights and scales included."""
    tensors = {t.data_ptr(): t for t in model.state_dict().values() if isinstance(t, torch.Tensor)}
    return sum(tensor.nbytes for tensor in tensors.values())
