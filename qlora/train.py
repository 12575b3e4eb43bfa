"""A QLoRA fine-tune: frozen quantized base, LoRA adapter, transformers' Trainer.

Everything is checked, and the model is loaded, before anything is written. What a training leaves in its
output directory:

    adapter_model.safetensors, adapter_config.json   the adapter in PEFT's format, when it is complete
    training_log.json, loss.png                      every loss, the settings, the result
    checkpoints/run.json, checkpoints/checkpoint-N   what `resume` needs to go on to the same losses
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from datasets import Dataset
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import (
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import lora_ops
from qlora.data import make_blocks, read_documents, split
from qlora.errors import InputError, check_choice, check_range
from qlora.evaluate import mean_loss
from qlora.files import published, write_json
from qlora.model import (
    Quantization,
    add_adapter,
    check_safetensors,
    check_tokens,
    choose_device,
    choose_dtype,
    find_model,
    load_base,
    load_tokenizer,
    weight_bytes,
)
from qlora.plot import plot_losses

SCHEDULERS = ("linear", "cosine", "constant")
OUTPUT_FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training_log.json", "loss.png")


@dataclass(frozen=True)
class TrainOptions:
    """The settings of a training; the command line's options of the same names."""

    model: str
    data: list[str]
    output: str
    eval_data: list[str] = field(default_factory=list)
    eval_fraction: float = 0.1
    quantization: Quantization = field(default_factory=Quantization)
    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.05
    target_modules: list[str] = field(default_factory=list)
    lr: float = 2e-4
    scheduler: str = "cosine"
    warmup_ratio: float = 0.03
    weight_decay: float = 0.0
    max_grad_norm: float = 1.0
    epochs: float = 3.0
    max_steps: int = 0
    batch_size: int = 8
    grad_accum: int = 1
    seq_len: int = 512
    gradient_checkpointing: bool = False
    seed: int = 0
    device: str = "auto"
    dtype: str = "auto"
    eval_steps: int = 0
    save_steps: int = 100
    resume: bool = False
    overwrite: bool = False
    progress: bool = True

    def check(self) -> None:
        """InputError for a value that is not allowed."""
        self.quantization.check()
        check_range("--rank", self.rank, 1)
        check_range("--alpha", self.alpha, 1e-6)
        check_range("--dropout", self.dropout, 0, 0.99)
        check_range("--lr", self.lr, 1e-12, 1e3)
        check_choice("--scheduler", self.scheduler, SCHEDULERS)
        check_range("--warmup-ratio", self.warmup_ratio, 0, 0.99)
        check_range("--weight-decay", self.weight_decay, 0)
        check_range("--max-grad-norm", self.max_grad_norm, 0)
        check_range("--epochs", self.epochs, 1e-6)
        check_range("--max-steps", self.max_steps, 0)
        check_range("--batch-size", self.batch_size, 1)
        check_range("--grad-accum", self.grad_accum, 1)
        check_range("--seq-len", self.seq_len, 2)
        check_range("--eval-fraction", self.eval_fraction, 0, 0.9)
        check_range("--eval-steps", self.eval_steps, 0)
        check_range("--save-steps", self.save_steps, 1)
        check_range("--seed", self.seed, 0, 2**32 - 1)
        if self.resume and self.overwrite:
            raise InputError("--resume and --overwrite exclude each other; choose one")

    def identity(self) -> dict[str, Any]:
        """The settings that decide the losses: a resumed training must have the same."""
        free = {"output", "save_steps", "resume", "overwrite", "progress", "data", "eval_data"}
        return {name: value for name, value in asdict(self).items() if name not in free}


class _Watch(TrainerCallback):
    """One progress bar for the whole training, and a stop when the loss is no number."""

    def __init__(self, progress: bool):
        self.bar = tqdm(desc="training", unit="step", mininterval=0.5, disable=not progress)

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.reset(state.max_steps)
        self.bar.update(state.global_step)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.update(1)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: Any
    ) -> None:
        if "loss" not in logs:
            return
        if not math.isfinite(logs["loss"]):
            raise InputError(
                f"the loss is {logs['loss']} at step {state.global_step}; use a lower --lr or --dtype float32"
            )
        self.bar.set_postfix(loss=f"{logs['loss']:.3f}", refresh=False)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        self.bar.close()


def train(options: TrainOptions, callbacks: tuple[TrainerCallback, ...] = ()) -> dict[str, Any]:
    """Run a training and return its log, the content of training_log.json.

    Raises InputError for anything the user can put right. An interrupted training leaves its checkpoints;
    the same options with `resume` continue to the losses that it would have had.
    """
    options.check()
    output = Path(options.output)
    _check_output(output, options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    documents = read_documents(options.data)
    eval_documents = read_documents(options.eval_data)
    path = find_model(options.model)
    tokenizer = load_tokenizer(path)
    blocks = make_blocks(documents, tokenizer, options.seq_len, "training data")
    if eval_documents:
        train_blocks = blocks
        eval_blocks = make_blocks(eval_documents, tokenizer, options.seq_len, "evaluation data")
    else:
        train_blocks, eval_blocks = split(blocks, options.eval_fraction, options.seed)
    identity = {**options.identity(), "data": _digest(train_blocks)}
    checkpoint = _checkpoint_to_resume(output, identity) if options.resume else None

    model, report = load_base(path, options.quantization, device, dtype, options.progress)
    check_tokens(train_blocks, model, options.seq_len)
    if eval_blocks is not None:
        check_tokens(eval_blocks, model, options.seq_len)
    base_bytes = weight_bytes(model)
    set_seed(options.seed)
    model = add_adapter(model, options.rank, options.alpha, options.dropout, options.target_modules or "all-linear")
    lora_ops.prepare_for_training(model, gradient_checkpointing=options.gradient_checkpointing)
    if options.progress and report is not None:
        tqdm.write(str(report))

    if options.overwrite:
        _clear(output)
    write_json(output / "checkpoints" / "run.json", identity)
    began = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    trainer = _trainer(model, train_blocks, eval_blocks, options, device)
    for callback in callbacks:
        trainer.add_callback(callback)
    start = time.perf_counter()
    if began is not None and began.global_step >= began.max_steps:
        # Nothing is left to do but to write the result; the Trainer would do one step too many.
        peft.set_peft_model_state_dict(model, load_file(checkpoint / "adapter_model.safetensors"))
        trainer.state = began
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - start

    history = trainer.state.log_history
    steps = trainer.state.global_step
    tokens = (steps - (began.global_step if began else 0)) * options.batch_size * options.grad_accum * options.seq_len
    log: dict[str, Any] = {
        "options": asdict(options),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "trainable_parameters": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "base_weight_bytes": base_bytes,
        "steps": steps,
        "losses": [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in history
            if "loss" in entry
        ],
        "eval_losses": [
            {"step": entry["step"], "loss": entry["eval_loss"]} for entry in history if "eval_loss" in entry
        ],
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }
    if eval_blocks is not None:
        loss = mean_loss(model, eval_blocks, options.batch_size, options.progress)
        log["eval_loss"], log["perplexity"] = loss, math.exp(loss)
    with published(output, last="adapter_config.json") as staging:
        model.save_pretrained(staging)
        write_json(staging / "training_log.json", log)
        plot_losses(
            staging / "loss.png",
            {"training": [(entry["step"], entry["loss"]) for entry in log["losses"]]},
            f"{path.name}, {options.quantization.bits} bits, LoRA rank {options.rank}",
            held_out=[(entry["step"], entry["loss"]) for entry in log["eval_losses"]],
        )
    return log


def _check_output(output: Path, options: TrainOptions) -> None:
    if output.exists() and not output.is_dir():
        raise InputError(f"--output {output} is a file; give a directory")
    parent = next(path for path in (output, *output.absolute().parents) if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise InputError(f"--output {output} cannot be written to; give another directory")
    if options.resume:
        if not (output / "checkpoints" / "run.json").is_file():
            raise InputError(f"--resume: {output} holds no training to resume; leave --resume out")
    elif output.is_dir() and any(output.iterdir()) and not options.overwrite:
        raise InputError(
            f"--output {output} exists and is not empty; give a new directory, --resume to continue the "
            f"training in it, or --overwrite to replace it"
        )


def _clear(output: Path) -> None:
    """Remove what an earlier training wrote, and nothing else."""
    for name in OUTPUT_FILES:
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def _digest(blocks: Dataset) -> str:
    """What identifies the training data, in order."""
    return hashlib.sha256(json.dumps(blocks["input_ids"][:]).encode()).hexdigest()


def _checkpoint_to_resume(output: Path, identity: dict[str, Any]) -> Path | None:
    """The last complete checkpoint, None if the training stopped before its first.

    Raises InputError if the settings or the data differ from those that the training began with.
    """
    began = json.loads((output / "checkpoints" / "run.json").read_text(encoding="utf-8"))
    now = json.loads(json.dumps(identity))
    for name in now:
        if now[name] != began.get(name):
            what = "the training data differs" if name == "data" else f"{name} is {now[name]}, was {began.get(name)}"
            raise InputError(f"--resume: {what}; use the settings that the training in {output} began with")
    checkpoints = sorted(
        (output / "checkpoints").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True
    )
    return next(filter(_is_complete, checkpoints), None)


def _is_complete(checkpoint: Path) -> bool:
    """Whether the Trainer finished writing a checkpoint: its state, a JSON file, is what it writes last."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
        check_safetensors(checkpoint / "adapter_model.safetensors")
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"))


def _trainer(
    model: peft.PeftModel,
    train_blocks: Dataset,
    eval_blocks: Dataset | None,
    options: TrainOptions,
    device: torch.device,
) -> Trainer:
    arguments = TrainingArguments(
        output_dir=str(Path(options.output) / "checkpoints"),
        per_device_train_batch_size=options.batch_size,
        per_device_eval_batch_size=options.batch_size,
        gradient_accumulation_steps=options.grad_accum,
        learning_rate=options.lr,
        lr_scheduler_type=options.scheduler,
        warmup_steps=options.warmup_ratio,
        weight_decay=options.weight_decay,
        max_grad_norm=options.max_grad_norm,
        num_train_epochs=options.epochs,
        max_steps=options.max_steps or -1,
        seed=options.seed,
        use_cpu=device.type == "cpu",
        eval_strategy="steps" if options.eval_steps and eval_blocks is not None else "no",
        eval_steps=options.eval_steps or None,
        prediction_loss_only=True,
        label_names=["labels"],
        save_strategy="steps",
        save_steps=options.save_steps,
        save_total_limit=2,
        # Every step is logged, exactly: an average over steps could not be the same after resuming.
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        dataloader_pin_memory=device.type == "cuda",
        remove_unused_columns=False,
        report_to="none",
    )
    arguments._n_gpu = min(1, arguments.n_gpu)  # DataParallel cannot replicate packed weights
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=train_blocks,
        eval_dataset=eval_blocks,
        data_collator=default_data_collator,
        callbacks=[_Watch(options.progress)],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
