"""A QLoRA fine-tune: frozen quantized base, LoRA adapter, transformers' Trainer.

Everything is checked, and the model is loaded, before anything is written. What a training leaves in its
output directory:

    adapter_model.safetensors, adapter_config.json   the adapter in PEFT's format, when it is complete
    training_log.json, loss.png                      every loss, the settings, the result
    checkpoints/run.json, checkpoints/checkpoint-N   what `resume` needs to go on to the same losses
"""

from __future__ import annotations

import math
import time
from dataclasses import asdict
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
from qlora.errors import InputError
from qlora.evaluate import mean_loss
from qlora.files import published, write_json
from qlora.model import (
    add_adapter,
    check_tokens,
    choose_device,
    choose_dtype,
    find_model,
    load_base,
    load_tokenizer,
    weight_bytes,
)
from qlora.options import TrainOptions
from qlora.output import check_output, checkpoint_to_resume, clear_output, digest
from qlora.plot import plot_losses


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
    the same options with `resume` continue, on the same machine, to the losses that it would have had.
    """
    options.check()
    output = Path(options.output)
    check_output(output, options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    train_documents, eval_documents = read_documents(options.data), read_documents(options.eval_data)
    path = find_model(options.model)
    tokenizer = load_tokenizer(path)
    train_blocks = make_blocks(train_documents, tokenizer, options.seq_len, "training data")
    if eval_documents:
        eval_blocks = make_blocks(eval_documents, tokenizer, options.seq_len, "evaluation data")
    else:
        train_blocks, eval_blocks = split(train_blocks, options.eval_fraction, options.seed)
    identity = {**options.identity(), "data": digest(train_blocks)}
    checkpoint = checkpoint_to_resume(output, identity) if options.resume else None

    base, report = load_base(path, options.quantization, device, dtype, options.progress)
    for blocks in filter(None, (train_blocks, eval_blocks)):
        check_tokens(blocks, base, options.seq_len)
    if options.progress and report is not None:
        tqdm.write(str(report))
    log: dict[str, Any] = {
        "options": asdict(options),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__},
        "device": str(device),
        "dtype": str(dtype).removeprefix("torch."),
        "base_weight_bytes": weight_bytes(base),
    }
    set_seed(options.seed)
    model = add_adapter(base, options.rank, options.alpha, options.dropout, options.target_modules or "all-linear")
    lora_ops.prepare_for_training(model, gradient_checkpointing=options.gradient_checkpointing)
    log["trainable_parameters"] = sum(p.numel() for p in model.parameters() if p.requires_grad)

    if options.overwrite:
        clear_output(output)
    write_json(output / "checkpoints" / "run.json", identity)
    trainer = _trainer(model, train_blocks, eval_blocks, options, device)
    for callback in callbacks:
        trainer.add_callback(callback)
    log |= _run(trainer, checkpoint, options)
    if eval_blocks is not None:
        log["eval_loss"] = mean_loss(model, eval_blocks, options.batch_size, options.progress)
        log["perplexity"] = math.exp(log["eval_loss"])
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


def _run(trainer: Trainer, checkpoint: Path | None, options: TrainOptions) -> dict[str, Any]:
    """Train, from the checkpoint if there is one, and return the part of the log that this makes."""
    began = None if checkpoint is None else TrainerState.load_from_json(str(checkpoint / "trainer_state.json"))
    start = time.perf_counter()
    if began is not None and began.global_step >= began.max_steps:
        # Nothing is left to do but to write the result; the Trainer would do one step too many.
        peft.set_peft_model_state_dict(trainer.model, load_file(checkpoint / "adapter_model.safetensors"))
        trainer.state = began
    else:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    seconds = time.perf_counter() - start
    state = trainer.state
    steps = state.global_step - (0 if began is None else began.global_step)
    return {
        "steps": state.global_step,
        "losses": [
            {name: entry[name] for name in ("step", "loss", "learning_rate", "grad_norm")}
            for entry in state.log_history
            if "loss" in entry
        ],
        "eval_losses": [
            {"step": entry["step"], "loss": entry["eval_loss"]} for entry in state.log_history if "eval_loss" in entry
        ],
        "seconds": seconds,
        "tokens_per_second": steps * options.batch_size * options.grad_accum * options.seq_len / seconds,
    }


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
