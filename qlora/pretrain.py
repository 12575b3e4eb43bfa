"""A small Llama-architecture base model, pretrained from nothing on the standard library's sources.

Stands in the demonstration and the tests for the model that a user would download. Two cores give it a few
minutes, so it is trained with Muon on its matrices, which here reaches in 300 steps the loss that AdamW
reaches in 800.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from qlora import corpus
from qlora.data import make_blocks
from qlora.model import choose_dtype

END = "<|end|>"


@dataclass(frozen=True)
class BaseOptions:
    """Size and training of the base model; every linear layer's sides are multiples of 64."""

    vocab: int = 4096
    hidden: int = 256
    intermediate: int = 704
    layers: int = 4
    heads: int = 4
    positions: int = 512
    steps: int = 700
    batch_size: int = 8
    seq_len: int = 256
    lr: float = 5e-3
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocab: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer: it encodes any text, and decodes to the same."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=vocab, special_tokens=[END], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token=END, clean_up_tokenization_spaces=False)


def pretrain(texts: Sequence[str], directory: Path, options: BaseOptions, progress: bool = True) -> None:
    """Train tokenizer and model on `texts` and save both in `directory`, in bfloat16 and safetensors.

    The tokenizer sees these texts only, as the tokenizer of a downloaded model has not seen the user's.
    """
    o = options
    tokenizer = train_tokenizer(texts, o.vocab)
    blocks = torch.tensor(make_blocks(texts, tokenizer, o.seq_len)["input_ids"][:])
    torch.manual_seed(o.seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=o.vocab,
            hidden_size=o.hidden,
            intermediate_size=o.intermediate,
            num_hidden_layers=o.layers,
            num_attention_heads=o.heads,
            max_position_embeddings=o.positions,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and ".layers." in name]
    others = [p for name, p in model.named_parameters() if p.dim() != 2 or ".layers." not in name]
    optimizers = (
        torch.optim.Muon(matrices, lr=o.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=o.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True),
    )
    order = torch.cat([torch.randperm(len(blocks)) for _ in range(math.ceil(o.steps * o.batch_size / len(blocks)))])
    dtype = choose_dtype("auto", torch.device("cpu"))
    with tqdm(range(o.steps), desc="pretraining", unit="step", mininterval=0.5, disable=not progress) as bar:
        for step in bar:
            lr = o.lr * min((step + 1) / (0.05 * o.steps), 1 - step / o.steps)
            ids = blocks[order[step * o.batch_size : (step + 1) * o.batch_size]]
            with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
                loss = model(input_ids=ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = lr
                optimizer.step()
                optimizer.zero_grad()
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    directory.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=".partial-", dir=directory.parent))
    try:
        model.to(torch.bfloat16).save_pretrained(staging)
        tokenizer.save_pretrained(staging)
        os.replace(staging, directory)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def cached_base(cache: Path, options: BaseOptions, progress: bool = True) -> Path:
    """The directory of the base model with these options, pretrained now if `cache` does not hold it.

    It is known by the options, by the code of this file and of the corpus, and by the Python version, whose
    library is the text.
    """
    code = b"".join(Path(file).read_bytes() for file in (__file__, corpus.__file__))
    key = json.dumps([asdict(options), hashlib.sha256(code).hexdigest(), platform.python_version()])
    directory = cache / f"base-{hashlib.sha256(key.encode()).hexdigest()[:12]}"
    if not directory.is_dir():
        pretrain(corpus.sources(), directory, options, progress)
    return directory
