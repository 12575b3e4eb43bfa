"""One contestant's model in the whole-model benchmark: it trains, generates, and is held against float32."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from bench.model_contestants import Contestant, Shape, draw_adapters

# Against float32: what 16-bit arithmetic may differ by. Gradients and logits as relative distance, all together.
TOLERANCES = {"loss": 0.02, "gradients": 0.1, "logits": 0.1}


@dataclass(frozen=True)
class Cell:
    """One thing to time: a training step, or one generated token after `sequence` others; split: by kind of work."""

    task: str
    sequence: int
    batch: int = 1
    checkpointing: bool = False
    split: bool = False


@dataclass(frozen=True)
class Settings:
    """What to run. check_tokens: length of the sequence on which contestants are held against float32."""

    shape: Shape
    device: torch.device
    dtype: torch.dtype
    cells: tuple[Cell, ...]
    seconds: float
    min_rounds: int = 3
    check_tokens: int = 128


@dataclass(frozen=True)
class Truth:
    """What the float32 model computes: loss, gradient of each adapter by name, logits of a generated token.

    A contestant whose generation is not looked at has no logits.
    """

    loss: float
    gradients: dict[str, Tensor]
    logits: Tensor | None


class Runner:
    """A contestant's model, built when it is first used, and what is timed on it."""

    def __init__(self, contestant: Contestant, settings: Settings) -> None:
        self.contestant = contestant
        self.settings = settings
        self._model: torch.nn.Module | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    @property
    def model(self) -> torch.nn.Module:
        if self._model is None:
            s = self.settings
            self._model = self.contestant.make(s.shape, s.device, s.dtype)
        return self._model

    def release(self) -> None:
        """Gives the memory back; the model is built again when it is next used."""
        self._model = self.optimizer = None
        gc.collect()
        if self.settings.device.type == "cuda":
            torch.cuda.empty_cache()

    def tokens(self, batch: int, sequence: int) -> Tensor:
        generator = torch.Generator().manual_seed(sequence)
        ids = torch.randint(self.settings.shape.vocab, (batch, sequence), generator=generator)
        return ids.to(self.settings.device)

    def _autocast(self) -> AbstractContextManager:
        s = self.settings
        if self.contestant.autocast and s.dtype != torch.float32:
            return torch.autocast(s.device.type, dtype=s.dtype)
        return nullcontext()

    def start(self, checkpointing: bool = False) -> None:
        """Adapters and optimizer as new, in training mode."""
        draw_adapters(self.model)
        self.model.train()
        self.contestant.set_checkpointing(self.model, checkpointing)
        adapters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(adapters, lr=1e-4, fused=True)

    def _backward(self, ids: Tensor) -> Tensor:
        with self._autocast():
            loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        return loss.detach()

    def gradients(self, ids: Tensor) -> tuple[float, dict[str, Tensor]]:
        """Loss and the gradient of every adapter. Raises FloatingPointError for one that is missing, zero or NaN."""
        loss = self._backward(ids).item()
        gradients = {name: p.grad for name, p in self.model.named_parameters() if p.requires_grad}
        for name, gradient in gradients.items():
            norm = 0.0 if gradient is None else gradient.float().norm().item()
            if not 0 < norm < math.inf:
                raise FloatingPointError(f"the gradient of {name} has norm {norm}")
        self.optimizer.zero_grad()
        return loss, gradients

    def step(self, ids: Tensor) -> Callable[[], Tensor]:
        """A training step: forward, backward, optimizer."""

        def run() -> Tensor:
            loss = self._backward(ids)
            self.optimizer.step()
            self.optimizer.zero_grad()
            return loss

        return run

    @torch.no_grad()
    def decode(self, ids: Tensor) -> Callable[[], Tensor]:
        """Reads all tokens but the last, then returns what generates one more token and returns its logits."""
        self.model.eval()
        with self._autocast():
            cache = self.model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        token = ids[:, -1:]

        @torch.no_grad()
        def run() -> Tensor:
            nonlocal token
            with self._autocast():
                logits = self.model(input_ids=token, past_key_values=cache, use_cache=True).logits[:, -1]
            token = logits.argmax(-1, keepdim=True)
            return logits

        return run

    def truth(self) -> Truth:
        """Loss, gradients and logits on the sequence that contestants are compared on."""
        ids = self.tokens(1, self.settings.check_tokens)
        self.start()
        loss, gradients = self.gradients(ids)
        on_cpu = {name: gradient.float().cpu() for name, gradient in gradients.items()}
        return Truth(loss, on_cpu, self.decode(ids)().float().cpu() if self.contestant.decodes else None)


def distances(found: Truth, truth: Truth) -> dict[str, float]:
    """How far a contestant is from the truth: the loss in nats, the others as relative distances."""
    if found.gradients.keys() != truth.gradients.keys():
        raise ValueError("the adapters have other names than the reference's")
    squares = torch.zeros(2, dtype=torch.float64)
    for name, gradient in truth.gradients.items():
        for i, part in enumerate((found.gradients[name] - gradient, gradient)):
            squares[i] += part.double().square().sum()
    errors = {"loss": abs(found.loss - truth.loss), "gradients": (squares[0] / squares[1]).sqrt().item()}
    if found.logits is not None:
        errors["logits"] = ((found.logits - truth.logits).norm() / truth.logits.norm()).item()
    return errors


def complaint(errors: dict[str, float]) -> str:
    """What is out of tolerance, NaN too; "" if nothing is."""
    wrong = [name for name, error in errors.items() if not error <= TOLERANCES[name]]
    return "; ".join(f"{name} off by {errors[name]:.3g}, allowed {TOLERANCES[name]:g}" for name in wrong)
