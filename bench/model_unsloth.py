"""Unsloth as a contestant of the whole-model benchmark, in a process of its own.

Importing it changes transformers and PEFT for everybody in the process. It loads the model as its users do, from a
folder with bitsandbytes' 4-bit weights, which is written here first. Unsloth 2026.10.9 asks for transformers 5.17.0 at
most, which is older than the one in constraints.txt.
"""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from peft import PeftModel
from safetensors.torch import save_file

from bench.model_contestants import ALPHA, RANK, Contestant, Shape, _bitsandbytes, build

if TYPE_CHECKING:
    from bench.model import Row
    from bench.model_runner import Settings, Truth

NAME = "Unsloth"
# Unsloth asks to be imported before the libraries that it changes.
COMMAND = "import sys, unsloth; from bench import model_unsloth; model_unsloth.child(sys.argv[1])"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def write_checkpoint(folder: Path, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
    """The benchmark's model in bitsandbytes' NF4 with double quantization, and a tokenizer, in `folder`."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    model = build(shape, _bitsandbytes, device, dtype)
    save_file({name: t.contiguous().cpu() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    name = str(dtype).removeprefix("torch.")
    config = {
        **model.config.to_diff_dict(),
        "architectures": ["LlamaForCausalLM"],
        "dtype": name,
        "quantization_config": {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": name,
            "llm_int8_skip_modules": ["lm_head"],
        },
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"<unk>": 0, "</s>": 1}, unk_token="<unk>"))
    tokens = {"unk_token": "<unk>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **tokens).save_pretrained(folder)


@dataclass(frozen=True)
class Unsloth(Contestant):
    """Loads from `folder`; its own checkpointing and kernels."""

    folder: str = ""
    length: int = 8192

    def make(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> PeftModel:
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            self.folder, max_seq_length=self.length, dtype=dtype, load_in_4bit=True
        )
        return FastLanguageModel.get_peft_model(
            model,
            r=RANK,
            lora_alpha=ALPHA,
            lora_dropout=0,
            bias="none",
            target_modules=PROJECTIONS,
            use_gradient_checkpointing=True,
            max_seq_length=self.length,
        )

    def set_checkpointing(self, model: PeftModel, on: bool) -> None:
        from unsloth import FastLanguageModel

        FastLanguageModel.for_training(model, use_gradient_checkpointing=on)


def child(folder: str) -> None:
    """In the process of its own: measures what the parent left in `folder`, and leaves the rows there."""
    from bench import model  # which imports this module

    settings, truth = pickle.loads((Path(folder) / "task.pickle").read_bytes())
    length = max(cell.sequence for cell in settings.cells) + 1024
    contestant = Unsloth(NAME, _bitsandbytes, decodes=False, folder=folder, length=length)
    runner, rows, _ = model.admit(contestant, settings, truth)
    rows = rows or model.measure_alone(runner, settings.cells)
    (Path(folder) / "rows.json").write_text(json.dumps(rows))


def missing(device: torch.device) -> str:
    """Why it cannot run; "" if it can. On a CPU it trains with bitsandbytes' and PEFT's layers, which are measured."""
    if device.type != "cuda":
        return "its kernels run on GPUs only"
    absent = [module for module in ("unsloth", "bitsandbytes") if find_spec(module) is None]
    return f"{', '.join(absent)} not installed" if absent else ""


def measure(settings: Settings, truth: Truth, command: str = COMMAND) -> list[Row]:
    """Its rows. Raises RuntimeError if its process fails."""
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoint(Path(folder), settings.shape, settings.device, settings.dtype)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
        (Path(folder) / "task.pickle").write_bytes(pickle.dumps((settings, truth)))
        offline = {**os.environ, "HF_HUB_OFFLINE": "1"}
        done = subprocess.run([sys.executable, "-c", command, folder], capture_output=True, env=offline)
        if done.returncode:
            last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"its process ended with code {done.returncode}: {last}")
        return json.loads((Path(folder) / "rows.json").read_text())
