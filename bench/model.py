"""Whole models: `python -m bench model`. Tokens a second, peak memory, and where the time goes.

Each contestant trains the same Llama with random weights and LoRA on all linear layers, and generates a token. Before
anything is timed, its loss, the gradients of its adapters and its logits are held against the same model computed in
float32, and before each row its gradients are looked at again: a contestant that computes something else is "wrong"
and has no times. Contestants take turns; where their models do not fit into memory together, each runs alone.

A result holds what was timed (task, sequence, batch, checkpointing), the contestant (peer), status and reason as in
every record, and where the status is "ok": seconds (median, p20, p80, host), tokens_per_second, loss and gradient_norm
of the first step, held_memory (the model and the optimizer's state) and peak_memory in bytes, operations and bytes
read at least, ratio and limit, and for some a split of one step's seconds by kind of work. The record's errors say how
far each contestant is from float32, its tolerances what is allowed.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
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
    held_bytes,
)
from bench.model_runner import TOLERANCES, Cell, Runner, Settings, Truth, complaint, distances
from bench.model_split import split
from qlora.cli import quiet
from qlora.model import choose_dtype

KEY = ("task", "sequence", "batch", "checkpointing")
Row = dict[str, object]


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


def _keeping(call: Callable[[], Tensor], results: dict[str, Tensor], name: str) -> Callable[[], None]:
    def run() -> None:
        results[name] = call()

    return run


def measure_cell(runners: Sequence[Runner], cell: Cell) -> list[Row]:
    """Rows of contestants that take turns. Raises torch.OutOfMemoryError if they do not fit together."""
    rows, calls, seen, last = [], {}, {}, {}
    for runner in runners:
        name = runner.contestant.name
        try:
            call, seen[name] = _prepare(runner, cell)
            call()
            calls[name] = _keeping(call, last, name)
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
        if not torch.isfinite(last[name]).all():
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
        except ImportError as error:
            reason = _first_line(error)
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
    parser.add_argument("--sequence", type=int, nargs="+", help="default: 512 to 8192 on a GPU, 512 and 1024 on a CPU")
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
    sequences = args.sequence or ([32] if args.quick else [512, 1024, 2048, 4096, 8192] if cuda else [512, 1024])
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
