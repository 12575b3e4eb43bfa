"""Whole models: `python -m bench model`. Tokens a second, peak memory, and where the time goes.

Each contestant trains the same Llama with random weights and LoRA on all linear layers, and generates a token. Before
anything is timed, its loss, the gradients of its adapters and its logits are held against the same model computed in
float32, and before each row its gradients are looked at again: a contestant that computes something else is "wrong"
and has no times. Contestants take turns; where their models do not fit into memory together, each runs alone.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from bench import limits, machine, model_report, model_unsloth, records, timing
from bench.model_contestants import (
    CONTESTANTS,
    OURS,
    RANK,
    REFERENCE,
    SHAPES,
    Contestant,
    Shape,
    draw_adapters,
    held_bytes,
)
from bench.model_split import split
from qlora.cli import quiet
from qlora.model import choose_dtype

# Against float32: what 16-bit arithmetic may differ by. Gradients and logits as relative distance, all together.
TOLERANCES = {"loss": 0.02, "gradients": 0.1, "logits": 0.1}
KEY = ("task", "sequence", "batch", "checkpointing")
Row = dict[str, object]


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


def _row(cell: Cell, name: str, status: str, reason: str = "", **values: object) -> Row:
    where = {key: getattr(cell, key) for key in KEY}
    return {**where, "peer": name, "status": status, "reason": reason, **values}


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]


def _prepare(runner: Runner, cell: Cell) -> tuple[Callable[[], Tensor], dict[str, float]]:
    """What to time, after one look at its gradients."""
    ids = runner.tokens(cell.batch, cell.sequence)
    if cell.task == "decode":
        return runner.decode(ids), {}
    runner.start(cell.checkpointing)
    loss, gradients = runner.gradients(ids)
    norm = math.sqrt(sum(gradient.double().square().sum().item() for gradient in gradients.values()))
    return runner.step(ids), {"loss": loss, "gradient_norm": norm}


def measure_cell(runners: Sequence[Runner], cell: Cell) -> list[Row]:
    """Rows of contestants that take turns. Raises torch.OutOfMemoryError if they do not fit together."""
    rows, calls, seen = [], {}, {}
    for runner in runners:
        name = runner.contestant.name
        try:
            calls[name], seen[name] = _prepare(runner, cell)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a peer may fail in any way
            status = "wrong" if isinstance(error, FloatingPointError) else "failed"
            rows.append(_row(cell, name, status, _first_line(error)))
    s = runners[0].settings
    options = {"device": s.device, "seconds": s.seconds * len(calls), "min_rounds": s.min_rounds}
    times = timing.measure(calls, **options)
    for runner in runners:
        name = runner.contestant.name
        if name not in times:
            continue
        last = calls[name]()
        if not torch.isfinite(last).all():
            rows.append(_row(cell, name, "wrong", "the result is not finite after the timed calls"))
            continue
        rows.append(_row(cell, name, "ok", **seen[name], **_values(runner, cell, times[name])))
        if cell.split:
            rows[-1]["split"] = split(runner.model, calls[name], s.device, RANK, s.shape.vocab)
    return rows


def _values(runner: Runner, cell: Cell, found: timing.Timing) -> Row:
    tokens = cell.batch * (cell.sequence if cell.task == "train" else 1)
    held = held_bytes(runner.model, runner.optimizer)
    return {
        "median": found.median,
        "p20": found.p20,
        "p80": found.p80,
        "host": found.host,
        "rounds": found.rounds,
        "tokens_per_second": tokens / found.median,
        "held_memory": held,
        "peak_memory": None if found.peak_memory is None else held + found.peak_memory,
        **work(runner.settings.shape, cell),
    }


def work(shape: Shape, cell: Cell) -> dict[str, int]:
    """Operations, and bytes of weights read, that a cell takes at least; the adapters' 1% is left out.

    A training step multiplies by each weight forward and for dx, and forward again under checkpointing. A quantized
    weight takes 4.127 bits, the head's 16.
    """
    head = shape.hidden * shape.vocab
    if cell.task == "decode":
        weights = shape.linear_weights + head
        return {"operations": 2 * cell.batch * weights, "read": int(shape.linear_weights * 4.127 / 8) + 2 * head}
    passes = 2 + cell.checkpointing
    attention = 2 * shape.layers * shape.hidden * cell.sequence  # causal; its backward pass is twice the forward
    products = passes * shape.linear_weights + 2 * head
    operations = cell.batch * cell.sequence * (2 * products + (passes + 1) * attention)
    return {"operations": operations, "read": passes * int(shape.linear_weights * 4.127 / 8) + 4 * head}


def measure_alone(runner: Runner, cells: Sequence[Cell]) -> list[Row]:
    """Rows of one contestant that has the memory to itself; a cell that does not fit is a failure."""
    rows, name = [], runner.contestant.name
    for cell in cells:
        if cell.task == "decode" and not runner.contestant.decodes:
            rows.append(_row(cell, name, "unavailable", "its generation is not measured"))
            continue
        try:
            rows += measure_cell([runner], cell)
            continue
        except torch.OutOfMemoryError:
            rows.append(_row(cell, name, "failed", "out of memory"))
        runner.release()  # after the handler, whose traceback keeps tensors alive
    runner.release()
    return rows


def admit(contestant: Contestant, settings: Settings, truth: Truth) -> tuple[Runner | None, list[Row], dict]:
    """A runner of a contestant that computes the right thing; else None and its rows, which say why not."""
    reason, status, errors = contestant.missing(settings.device), "unavailable", {}
    if not reason:
        runner = Runner(contestant, settings)
        try:
            errors = distances(runner.truth(), truth)
            reason, status = complaint(errors), "wrong"
        except Exception as error:  # a peer may fail in any way
            reason = _first_line(error)
            status = "wrong" if isinstance(error, FloatingPointError) else "failed"
        # In eval mode on a CPU, bitsandbytes repacks its weights, and then trains with wrong gradients: built anew.
        runner.release()
        if not reason:
            return runner, [], errors
    return None, [_row(cell, contestant.name, status, reason) for cell in settings.cells], errors


def judge(rows: list[Row], limit: limits.Limits, dtype: str) -> None:
    """Takes the times from rows that do not agree with the other contestants, and sets the rest beside ours and the
    machine's limits."""
    for cell in {_key(row) for row in rows}:
        here = [row for row in rows if _key(row) == cell and row["status"] == "ok"]
        for row in here if cell[0] == "train" else ():
            _agree(row, here)
        ours = next((row["median"] for row in here if row["peer"] == OURS and row["status"] == "ok"), None)
        for row in here:
            if row["status"] == "ok":
                row["ratio"] = row["median"] / ours if ours else None
                least = max(row["operations"] / limit[dtype], row["read"] / limit["read"])
                row["limit"] = least / row["median"]


def _median(values: Iterable[float]) -> float:
    finite = [value for value in values if math.isfinite(value)]
    return timing.quantile(finite, 0.5) if finite else math.nan


def _agree(row: Row, rows: Sequence[Row]) -> None:
    loss, norm = (_median(other[name] for other in rows) for name in ("loss", "gradient_norm"))
    errors = {"loss": abs(row["loss"] - loss), "gradients": abs(row["gradient_norm"] / norm - 1)}
    if found := complaint(errors):
        row |= {"status": "wrong", "reason": f"{found}, from the contestants' median"}
        for name in ("median", "p20", "p80", "host", "tokens_per_second", "split"):
            row.pop(name, None)


def _key(row: Row) -> tuple:
    return tuple(row[name] for name in KEY)


def run(
    settings: Settings,
    contestants: Sequence[Contestant] = CONTESTANTS,
    save: Callable[[records.Record], None] = lambda record: None,
    deadline: float = math.inf,
) -> records.Record:
    """Measures everything, or what it can until `deadline` (of `time.monotonic`), and returns the record.

    Args:
        save: called with the record whenever it has grown.
    """
    record = _new_record(settings)
    reference = Runner(REFERENCE, settings)
    truth = reference.truth()
    reference.release()
    runners, rows = [], record["results"]
    for contestant in contestants:
        runner, refused, record["errors"][contestant.name] = admit(contestant, settings, truth)
        rows += refused
        runners += [runner] if runner else []
    for found in _measure_all(runners, settings.cells if runners else ()):
        rows += found
        record["stopped"] = time.monotonic() > deadline
        judge(rows, record["limits"][settings.device.type], record["model"]["dtype"])
        save(record)
        if record["stopped"]:
            return record
    for runner in runners:
        runner.release()
    rows += _unsloth(settings, truth)
    judge(rows, record["limits"][settings.device.type], record["model"]["dtype"])
    save(record)
    return record


def _new_record(settings: Settings) -> records.Record:
    record = records.new("model", machine.describe())
    shape, device = settings.shape, settings.device
    record["model"] = {**asdict(shape), "linear_weights": shape.linear_weights, "rank": RANK}
    record["model"]["dtype"] = str(settings.dtype).removeprefix("torch.")
    record["limits"] = {device.type: limits.measure(device, quick=settings.seconds == 0)}
    return record | {"tolerances": TOLERANCES, "errors": {}, "stopped": False}


def _measure_all(runners: Sequence[Runner], cells: Sequence[Cell]) -> Iterator[list[Row]]:
    """Rows, cell by cell; from the first cell that does not fit on, contestant by contestant."""
    for i, cell in enumerate(cells):
        try:
            yield measure_cell(runners, cell)
            continue
        except torch.OutOfMemoryError:
            pass  # out of the handler, whose traceback keeps tensors alive
        for runner in runners:
            runner.release()
        for runner in runners:
            yield measure_alone(runner, cells[i:])
        return


def _unsloth(settings: Settings, truth: Truth) -> list[Row]:
    reason, status = model_unsloth.missing(settings.device), "unavailable"
    if not reason:
        try:
            return model_unsloth.measure(settings, truth)
        except Exception as error:  # a peer may fail in any way
            reason, status = _first_line(error), "failed"
    return [_row(cell, model_unsloth.NAME, status, reason) for cell in settings.cells]


def cells(sequences: Sequence[int], decode_after: int, batch: int = 1, split_all: bool = False) -> tuple[Cell, ...]:
    """Training at each length with and without gradient checkpointing, and generation, last: see `admit`.

    A profile of a large model takes longer to read than everything else to measure: by default, of the longest only.
    """
    training = [
        Cell("train", sequence, batch, on, split_all or sequence == max(sequences))
        for sequence in sorted(sequences)
        for on in (True, False)
    ]
    return (*training, Cell("decode", decode_after))


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m bench model`."""
    parser.add_argument("--model", choices=list(SHAPES), help="default: llama-3-8b on a GPU, small on a CPU")
    parser.add_argument("--layers", type=int, help="fewer layers than the model has, for little memory")
    parser.add_argument("--sequence", type=int, nargs="+", help="default: 512 to 8192 on a GPU, 512 and 2048 on a CPU")
    parser.add_argument("--batch", type=int, default=1, help="sequences per training step (default 1)")
    parser.add_argument("--split-all", action="store_true", help="time by kind of work at every length")
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU where there is one")
    parser.add_argument("--seconds", type=float, help="per contestant and row; every row has at least 3 rounds")
    parser.add_argument("--budget", type=float, help="stop after so many seconds, with what there is")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see that everything runs")
    parser.add_argument("--out", type=Path, help="folder of the record (default bench/results/<machine>)")


def settings(args: argparse.Namespace) -> Settings:
    """What the arguments ask for."""
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    cuda = device.type == "cuda"
    name = "tiny" if args.quick else args.model or ("llama-3-8b" if cuda else "small")
    shape = SHAPES[name]
    if args.layers:
        shape = Shape(**{**asdict(shape), "name": f"{name}, {args.layers} layers", "layers": args.layers})
    sequences = args.sequence or ([32] if args.quick else [512, 1024, 2048, 4096, 8192] if cuda else [512, 2048])
    seconds = args.seconds if args.seconds is not None else 0.0 if args.quick else 3.0
    rounds, check = (1, 16) if args.quick else (3, 128)
    plan = cells(sequences, min(*sequences, 512), args.batch, args.split_all)
    return Settings(shape, device, choose_dtype("auto", device), plan, seconds, rounds, check)


def main(args: argparse.Namespace) -> int:
    """Writes the record after every row, and prints its table.

    The exit code is 1 if anything of ours is not right, 3 if the budget ended the run.
    """
    quiet()
    deadline = time.monotonic() + args.budget if args.budget else math.inf
    chosen = settings(args)
    path = machine.results_dir(args.out) / f"model-{machine.slug(chosen.shape.name)}.json"
    record = run(chosen, save=lambda record: records.write(path, record), deadline=deadline)
    print(model_report.table(record))
    print(f"\n{len(record['results'])} results in {path}")
    bad = [row for row in record["results"] if row["peer"] == OURS and row["status"] != "ok"]
    for row in bad:
        print(f"{row['task']}, {row['sequence']} tokens: {row['status']}: {row['reason']}", file=sys.stderr)
    return 1 if bad else 3 if record["stopped"] else 0
