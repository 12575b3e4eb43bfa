"""The settings of a training."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from qlora.errors import InputError, check_choice, check_range
from qlora.model import Quantization

SCHEDULERS = ("linear", "cosine", "constant")


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
