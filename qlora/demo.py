"""A QLoRA fine-tune on real text, end to end, with nothing to download: `python -m qlora.demo`.

A small base model is pretrained on the sources of Python's standard library (and kept for the next run),
quantized, and fine-tuned with LoRA on Python's language documentation. The table at the end is measured.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from importlib.util import find_spec
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import lora_ops
from qlora import corpus
from qlora.cli import one_line_errors, quiet
from qlora.data import make_blocks, read_documents
from qlora.errors import check_choice, check_range
from qlora.evaluate import Sampling, generate, mean_loss
from qlora.files import replaced, write_json
from qlora.model import (
    Quantization,
    add_adapter,
    choose_dtype,
    load_adapter,
    load_base,
    load_tokenizer,
    weight_bytes,
)
from qlora.options import TrainOptions
from qlora.pretrain import BaseOptions, cached_base
from qlora.train import train

CPU = torch.device("cpu")
SEQ_LEN, BATCH_SIZE, RANK, ALPHA, DROPOUT, LR = 256, 8, 16, 32.0, 0.05, 2e-3
PROMPT = 'The "for" statement is used to'


def run(output: Path, bits: int = 4, steps: int = 180, base: BaseOptions | None = None, seed: int = 0) -> dict:
    """Run the demonstration, print its table, and return what the table says by name."""
    check_choice("--bits", bits, (4, 8))
    check_range("--steps", steps, 1)
    start = time.perf_counter()
    files = write_corpus(output / "data", seed)
    directory = cached_base(output, base or BaseOptions())
    tokenizer = load_tokenizer(directory)
    held_out = make_blocks(read_documents(files[1:]), tokenizer, SEQ_LEN)
    dtype = choose_dtype("auto", CPU)
    sampling = Sampling(max_new_tokens=80, repetition_penalty=1.3)
    quantization = Quantization(bits)

    model, _ = load_base(directory, Quantization(16), CPU, dtype)
    result: dict = {"bits": bits, "dtype": str(dtype).removeprefix("torch.")}
    result["weight_bytes_16bit"] = weight_bytes(model)
    result["perplexity_16bit"] = math.exp(mean_loss(model, held_out))
    model, report = load_base(directory, quantization, CPU, dtype)
    print(report)
    result["weight_bytes_quantized"] = weight_bytes(model)
    linear = [row for row in report.rows if not row.reason]
    result["linear_bytes_16bit"] = sum(row.bytes_before for row in linear)
    result["linear_bytes_quantized"] = sum(row.bytes_after for row in linear)
    result["perplexity_quantized"] = math.exp(mean_loss(model, held_out))
    result["sample_before"] = generate(model, tokenizer, PROMPT, sampling)

    adapter = output / f"adapter-{bits}bit"
    log = train(
        TrainOptions(
            model=str(directory),
            data=[str(files[0])],
            eval_data=[str(files[1])],
            output=str(adapter),
            quantization=quantization,
            rank=RANK,
            alpha=ALPHA,
            dropout=DROPOUT,
            lr=LR,
            max_steps=steps,
            batch_size=BATCH_SIZE,
            seq_len=SEQ_LEN,
            seed=seed,
            device="cpu",
            eval_steps=max(1, steps // 6),
            overwrite=True,
        )
    )
    result["perplexity_trained"] = log["perplexity"]
    result["trainable_parameters"] = log["trainable_parameters"]

    model = load_adapter(load_base(directory, quantization, CPU, dtype, progress=False)[0], adapter)
    result["perplexity_reloaded"] = math.exp(mean_loss(model, held_out))
    result["sample_after"] = generate(model, tokenizer, PROMPT, sampling)
    result["tokens_per_second"], result["tokens_per_second_bitsandbytes"] = compare_steps(
        directory, quantization, dtype
    )
    result["seconds"] = time.perf_counter() - start
    write_json(output / f"result-{bits}bit.json", result)
    print(table(result))
    print(f"\nPrompt: {PROMPT}\n\nBefore: {result['sample_before']}\n\nAfter: {result['sample_after']}\n")
    print(f"Loss curve: {adapter / 'loss.png'}. Took {result['seconds']:.0f} s.")
    print(f"Try: qlora generate --model {directory} --adapter {adapter} --bits {bits} --prompt 'An expression'")
    return result


def table(result: dict) -> str:
    """The result as aligned text."""
    bits, dtype = result["bits"], result["dtype"]
    base, quantized = result["perplexity_16bit"], result["perplexity_quantized"]
    trained, reloaded = result["perplexity_trained"], result["perplexity_reloaded"]
    linear, linear_packed = result["linear_bytes_16bit"], result["linear_bytes_quantized"]
    full, packed = result["weight_bytes_16bit"], result["weight_bytes_quantized"]
    ours, theirs = result["tokens_per_second"], result["tokens_per_second_bitsandbytes"]
    same = "equal" if reloaded == trained else f"differs by {reloaded - trained:+.2e}"
    beside = (
        (f"{theirs:,.0f}", f"these layers are {ours / theirs:.2f}x as fast")
        if theirs
        else ("", "bitsandbytes not installed")
    )
    rows = [
        ("held-out perplexity, base", dtype, f"{base:.2f}", ""),
        ("", f"{bits} bits", f"{quantized:.2f}", f"{100 * (quantized / base - 1):+.2f}%"),
        ("", f"{bits} bits, after QLoRA", f"{trained:.2f}", f"{100 * (trained / quantized - 1):+.1f}%"),
        ("", "adapter reloaded", f"{reloaded:.2f}", same),
        ("trainable parameters", f"LoRA rank {RANK}", f"{result['trainable_parameters']:,}", ""),
        ("weight bytes, linear layers", dtype, f"{linear:,}", ""),
        ("", f"{bits} bits", f"{linear_packed:,}", f"{100 * linear_packed / linear:.1f}%"),
        ("weight bytes, whole model", dtype, f"{full:,}", ""),
        ("", f"{bits} bits", f"{packed:,}", f"{100 * packed / full:.1f}%"),
        ("QLoRA step, tokens/s", "these layers", f"{ours:,.0f}", ""),
        ("", "PEFT + bitsandbytes", *beside),
    ]
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n" + "\n".join(
        f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d}".rstrip() for a, b, c, d in rows
    )


def write_corpus(directory: Path, seed: int) -> tuple[Path, Path]:
    """The documentation as two text files, topics apart."""
    files = (directory / "train.txt", directory / "held_out.txt")
    for file, texts in zip(files, corpus.documentation(seed=seed), strict=True):
        with replaced(file) as partial:
            partial.write_text("\n\n".join(texts), encoding="utf-8")
    return files


def _bitsandbytes_model(directory: Path, quantization: Quantization, dtype: torch.dtype) -> PeftModel:
    """The same model and adapter with stock PEFT on bitsandbytes, nothing cast to float32."""
    config = BitsAndBytesConfig(
        load_in_4bit=quantization.bits == 4,
        load_in_8bit=quantization.bits == 8,
        llm_int8_threshold=quantization.threshold,
        bnb_4bit_quant_type=quantization.quant_type,
        bnb_4bit_use_double_quant=quantization.double_quant,
        bnb_4bit_compute_dtype=dtype,
    )
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, quantization_config=config, device_map="cpu")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    lora = LoraConfig(r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules="all-linear")
    return get_peft_model(model, lora)


def compare_steps(
    directory: Path, quantization: Quantization, dtype: torch.dtype, rounds: int = 9
) -> tuple[float, float | None]:
    """Median tokens/s of a training step, ours and bitsandbytes', steps taken in turn; None if absent."""
    model, _ = load_base(directory, quantization, CPU, dtype, progress=False)
    ours = add_adapter(model, RANK, ALPHA, DROPOUT, "all-linear")
    contestants = [lora_ops.prepare_for_training(ours, gradient_checkpointing=False)]
    if find_spec("bitsandbytes"):
        contestants.append(_bitsandbytes_model(directory, quantization, dtype))
    ids = torch.randint(contestants[0].config.vocab_size, (BATCH_SIZE, SEQ_LEN), generator=torch.manual_seed(0))
    optimizers = [torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-4) for m in contestants]
    times: list[list[float]] = [[] for _ in contestants]
    for _ in range(rounds + 2):
        for model, optimizer, spent in zip(contestants, optimizers, times, strict=True):
            model.train()
            optimizer.zero_grad(set_to_none=False)
            start = time.perf_counter()
            model(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
            spent.append(time.perf_counter() - start)
    for model in contestants:
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and not 0 < parameter.grad.norm() < math.inf:
                raise RuntimeError(f"the timed step gives {name} no gradient")
    rates = [ids.numel() / statistics.median(spent[2:]) for spent in times]
    return rates[0], rates[1] if len(rates) > 1 else None


def main() -> int:
    """The command line of the demonstration."""
    parser = argparse.ArgumentParser(prog="python -m qlora.demo", description="A QLoRA fine-tune, end to end.")
    parser.add_argument("--output", type=Path, default=Path("demo"), help="directory for everything (default demo)")
    parser.add_argument("--bits", type=int, default=4, help="4 (default) or 8")
    parser.add_argument("--steps", type=int, default=180, help="of fine-tuning (default 180)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    quiet()
    return one_line_errors(lambda: run(args.output, args.bits, args.steps, seed=args.seed))


if __name__ == "__main__":
    sys.exit(main())
