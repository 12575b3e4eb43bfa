"""Loss curves from recorded losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from qlora.files import replaced

Points = Sequence[tuple[int, float]]


def running_mean(points: Points, window: int) -> list[tuple[int, float]]:
    """Each point's mean with the up to `window` - 1 points before it."""
    means = []
    for i in range(len(points)):
        recent = [loss for _, loss in points[max(0, i - window + 1) : i + 1]]
        means.append((points[i][0], sum(recent) / len(recent)))
    return means


def plot_losses(path: Path, curves: Mapping[str, Points], title: str, held_out: Points = (), window: int = 20) -> None:
    """Write a PNG of the curves, [(step, loss), ...] by name: thin as recorded, bold as running means."""
    figure = Figure(figsize=(7, 4), dpi=120, layout="tight")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, points in curves.items():
        (line,) = axes.plot(*zip(*points, strict=True), linewidth=0.6, alpha=0.35)
        smooth = running_mean(points, window)
        axes.plot(*zip(*smooth, strict=True), color=line.get_color(), linewidth=1.6, label=name)
    if held_out:
        axes.plot(*zip(*held_out, strict=True), "o--", color="black", markersize=4, linewidth=1, label="held out")
    axes.set(xlabel="step", ylabel="loss (nats per token)", title=title)
    axes.grid(alpha=0.3)
    axes.legend()
    with replaced(path) as partial:
        figure.savefig(partial)
