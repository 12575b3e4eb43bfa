"""Held-out loss and generated text of a model, with or without an adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from qlora.data import make_blocks, read_documents
from qlora.errors import InputError, check_range
from qlora.model import (
    Quantization,
    check_tokens,
    choose_device,
    choose_dtype,
    find_model,
    load_adapter,
    load_base,
    load_tokenizer,
)


@dataclass(frozen=True)
class ModelOptions:
    """A model to run: a path or hub id, how to hold its weights, and optionally a saved adapter."""

    model: str
    adapter: str | None = None
    quantization: Quantization = field(default_factory=Quantization)
    device: str = "auto"
    dtype: str = "auto"


def load(options: ModelOptions, progress: bool = True) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """The model in eval mode and its tokenizer."""
    options.quantization.check()
    device = choose_device(options.device)
    path = find_model(options.model)
    tokenizer = load_tokenizer(path)
    dtype = choose_dtype(options.dtype, device)
    model, _ = load_base(path, options.quantization, device, dtype, progress)
    if options.adapter is not None:
        model = load_adapter(model, options.adapter)
    return model, tokenizer


@torch.no_grad()
def mean_loss(model: torch.nn.Module, blocks: Dataset, batch_size: int = 8, progress: bool = True) -> float:
    """Mean negative log likelihood, in nats, of every token of the blocks but the first of each.

    Dropout is off; the model's mode is restored.
    """
    was_training = model.training
    model.eval()
    total, tokens = 0.0, 0
    device = next(model.parameters()).device
    for start in tqdm(range(0, len(blocks), batch_size), desc="evaluating", disable=not progress, leave=False):
        ids = torch.tensor(blocks[start : start + batch_size]["input_ids"], device=device)
        count = ids.shape[0] * (ids.shape[1] - 1)
        total += model(input_ids=ids, labels=ids).loss.item() * count
        tokens += count
    model.train(was_training)
    return total / tokens


def evaluate(
    options: ModelOptions, data: Sequence[str], seq_len: int = 512, batch_size: int = 8, progress: bool = True
) -> dict[str, float]:
    """Loss and perplexity of a model on text files."""
    check_range("--seq-len", seq_len, 2)
    check_range("--batch-size", batch_size, 1)
    documents = read_documents(data)
    model, tokenizer = load(options, progress)
    blocks = make_blocks(documents, tokenizer, seq_len)
    check_tokens(blocks, model, seq_len)
    loss = mean_loss(model, blocks, batch_size, progress)
    return {"loss": loss, "perplexity": math.exp(loss), "blocks": len(blocks), "seq_len": seq_len}


@dataclass(frozen=True)
class Sampling:
    """How to generate; temperature 0 always takes the likeliest token."""

    max_new_tokens: int = 100
    temperature: float = 0.0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0

    def check(self) -> None:
        """InputError for a value that is not allowed."""
        check_range("--max-new-tokens", self.max_new_tokens, 1)
        check_range("--temperature", self.temperature, 0, 100)
        check_range("--top-p", self.top_p, 0.001, 1)
        check_range("--repetition-penalty", self.repetition_penalty, 0.01, 100)


@torch.no_grad()
def generate(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, prompt: str, sampling: Sampling) -> str:
    """The continuation of `prompt`, without it."""
    inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
    length = inputs["input_ids"].shape[1]
    if length == 0:
        raise InputError("--prompt is empty; give at least one character")
    options = {"temperature": sampling.temperature, "top_p": sampling.top_p} if sampling.temperature else {}
    torch.manual_seed(sampling.seed)
    output = model.generate(
        **inputs.to(next(model.parameters()).device),
        max_new_tokens=sampling.max_new_tokens,
        repetition_penalty=sampling.repetition_penalty,
        do_sample=sampling.temperature > 0,
        pad_token_id=tokenizer.eos_token_id,
        use_cache=True,
        **options,
    )
    return tokenizer.decode(output[0, length:], skip_special_tokens=True)
