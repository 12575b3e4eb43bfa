"""The output directory of a training: what may be written to, cleared, and resumed from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from datasets import Dataset

from qlora.errors import InputError
from qlora.model import check_safetensors
from qlora.options import TrainOptions

FILES = ("adapter_config.json", "adapter_model.safetensors", "README.md", "training_log.json", "loss.png")


def check_output(output: Path, options: TrainOptions) -> None:
    """InputError unless a training with these options may write into `output`. Writes nothing."""
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


def clear_output(output: Path) -> None:
    """Remove what an earlier training wrote, and nothing else."""
    for name in FILES:
        (output / name).unlink(missing_ok=True)
    shutil.rmtree(output / "checkpoints", ignore_errors=True)


def digest(blocks: Dataset) -> str:
    """What identifies the training data, in order."""
    sha = hashlib.sha256()
    for batch in blocks.iter(batch_size=1000):
        sha.update(json.dumps(batch["input_ids"]).encode())
    return sha.hexdigest()


def checkpoint_to_resume(output: Path, identity: dict[str, Any]) -> Path | None:
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
