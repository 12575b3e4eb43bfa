"""Do these layers train as plain 16-bit PEFT does? `python bench/parity.py`

The same LoRA fine-tune (base model, data, seed, order of blocks) on a base in 16, 8 and 4 bits. What 16-bit
runs differ by when only their seed changes (start of A, dropout, order of blocks) is the noise. Both are
compared as means over windows of steps. Writes the recorded losses to bench/results/parity/parity.json, and
the plot to docs/parity.png.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora.cli import quiet
from qlora.demo import ALPHA, DROPOUT, LR, RANK, SEQ_LEN, write_corpus
from qlora.files import replaced, write_json
from qlora.model import Quantization
from qlora.options import TrainOptions
from qlora.plot import running_mean
from qlora.pretrain import BaseOptions, cached_base
from qlora.train import train

SEEDS = (0, 1, 2)
WINDOW = 20
Losses = Sequence[float]


def record(base: Path, files: tuple[Path, Path], bits: int, seed: int, **settings: object) -> dict:
    """Train once; the loss of every step, and the held-out loss at the end."""
    with tempfile.TemporaryDirectory() as output:
        log = train(
            TrainOptions(
                model=str(base),
                data=[str(files[0])],
                eval_data=[str(files[1])],
                output=f"{output}/adapter",
                quantization=Quantization(bits),
                seed=seed,
                rank=RANK,
                alpha=ALPHA,
                dropout=DROPOUT,
                device="cpu",
                **{"lr": LR, "seq_len": SEQ_LEN, **settings},
            )
        )
    return {"losses": [entry["loss"] for entry in log["losses"]], "held_out": log["eval_loss"], "dtype": log["dtype"]}


def windows(losses: Losses) -> torch.Tensor:
    """Means over consecutive windows of WINDOW steps."""
    whole = len(losses) // WINDOW * WINDOW
    return torch.tensor(losses[:whole], dtype=torch.float64).view(-1, WINDOW).mean(1)


def distance(one: Losses, other: Losses) -> float:
    """Mean over the windows of the absolute difference of two curves, in nats per token."""
    return (windows(one) - windows(other)).abs().mean().item()


def noise(runs: Sequence[Losses]) -> float:
    """The smallest distance between two runs that differ in their seed only."""
    return min(distance(one, other) for one, other in combinations(runs, 2))


def measure(base: Path, files: tuple[Path, Path], steps: int, **settings: object) -> dict[str, dict]:
    """All the runs: 16 bits once per seed, 8 and 4 bits with the first seed."""
    runs = {f"16 bits, seed {seed}": record(base, files, 16, seed, max_steps=steps, **settings) for seed in SEEDS}
    for bits in (8, 4):
        runs[f"{bits} bits, seed 0"] = record(base, files, bits, 0, max_steps=steps, **settings)
    return runs


def report(runs: Mapping[str, Mapping]) -> dict[str, float]:
    """Distances of the quantized runs from the 16-bit run of the same seed, beside the noise."""
    plain = [runs[f"16 bits, seed {seed}"]["losses"] for seed in SEEDS]
    distances = {f"{bits} bits": distance(runs[f"{bits} bits, seed 0"]["losses"], plain[0]) for bits in (8, 4)}
    return {"noise": noise(plain), **distances}


def draw(runs: Mapping[str, Mapping], path: Path) -> None:
    """Write a PNG: the curves as running means, and their differences from the first run."""
    figure = Figure(figsize=(11, 4), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    plain = running_mean(list(enumerate(runs["16 bits, seed 0"]["losses"], start=1)), WINDOW)
    for name, run in runs.items():
        style = {"linewidth": 1.0, "linestyle": "--"} if name.startswith("16") else {"linewidth": 2.0}
        curve = running_mean(list(enumerate(run["losses"], start=1)), WINDOW)
        left.plot(*zip(*curve, strict=True), label=name, **style)
        difference = [(step, one - other) for (step, one), (_, other) in zip(curve, plain, strict=True)]
        right.plot(*zip(*difference, strict=True), label=name, **style)
    left.set(xlabel="step", ylabel=f"loss, mean of {WINDOW} steps (nats per token)", title="LoRA fine-tune")
    right.set(xlabel="step", ylabel="difference", title="Difference from 16 bits, seed 0")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    left.legend()
    with replaced(path) as partial:
        figure.savefig(partial)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train in 16, 8 and 4 bits and compare the loss curves.")
    parser.add_argument("--steps", type=int, default=240)
    parser.add_argument("--cache", type=Path, default=Path("demo"), help="where the demonstration keeps its base model")
    parser.add_argument("--json", type=Path, default=Path("bench/results/parity/parity.json"))
    parser.add_argument("--plot", type=Path, default=Path("docs/parity.png"))
    args = parser.parse_args()
    quiet()
    files = write_corpus(args.cache / "data", seed=0)
    runs = measure(cached_base(args.cache, BaseOptions()), files, args.steps)
    summary = report(runs)
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    write_json(
        args.json, {"steps": args.steps, "window": WINDOW, "summary": summary, "versions": versions, "runs": runs}
    )
    draw(runs, args.plot)
    print(json.dumps(summary, indent=2))


if __name__ == "__main__":
    main()
