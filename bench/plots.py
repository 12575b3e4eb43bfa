"""Plots of records: time, percent of the limit and memory against M; ops without rows as bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from bench.inputs import dimensions
from bench.peers import CONTESTANTS, OURS
from bench.records import Record
from qlora.files import replaced

if TYPE_CHECKING:  # a machine that only measures needs no matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# What is drawn, its label, its scale, and the factor from the record's unit.
MEASURES = (
    ("median", "ms", "log", 1e3),
    ("limit", "% of the limit", "linear", 100),
    ("peak_memory", "peak memory, MB", "log", 1e-6),
)
_MARKERS = "osv^D<>ph*"


def _figure(rows: int, columns: int) -> tuple[Figure, list[list[Axes]]]:
    figure = new_figure(max(5.0, 4.2 * columns), max(3.6, 2.9 * rows))
    return figure, figure.subplots(rows, columns, squeeze=False).tolist()


def new_figure(width: float, height: float) -> Figure:
    """An empty figure, in inches, that is drawn without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _save(figure: Figure, path: Path) -> Path:
    with replaced(path) as partial:
        figure.savefig(partial)
    return path


def _style(peer: str) -> dict:
    """Ours is bold and black; every peer keeps its colour in all plots."""
    if peer == OURS:
        return {"color": "black", "linewidth": 2.2, "marker": "o", "markersize": 5, "zorder": 3}
    names = [p.name for op in CONTESTANTS.values() for p in op if p.name != OURS]
    index = list(dict.fromkeys(names)).index(peer) if peer in names else 0
    marker = _MARKERS[(index + index // 10) % 10]  # after ten, colours come again with another marker
    return {"color": f"C{index % 10}", "linewidth": 1.2, "marker": marker, "markersize": 4}


def _panels(entries: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Entries with rows by panel: (shape, dtype, backward, cache, device)."""
    panels: dict[tuple, list[dict]] = {}
    for e in entries:
        if e["status"] == "ok" and e["m"] is not None:
            key = (tuple(e["shape"]), e["dtype"], e["backward"], e["cache"], e["device"])
            panels.setdefault(key, []).append(e)
    return panels


MOST_PANELS = 4


def _fullest(panels: dict[tuple, list[dict]]) -> dict[tuple, list[dict]]:
    """The panels with the most numbers of rows, in their order."""
    counts = {panel: len({e["m"] for e in entries}) for panel, entries in panels.items()}
    chosen = sorted(panels, key=lambda panel: -counts[panel])[:MOST_PANELS]
    return {panel: entries for panel, entries in panels.items() if panel in chosen}


def _label(panel: tuple) -> str:
    shape, dtype, backward, cache, _ = panel
    return f"{dimensions(shape)} {dtype}, {cache}\n{'forward + backward' if backward else 'forward'}"


def _lines(axes: Axes, entries: Sequence[dict], measure: tuple[str, str, str, float]) -> None:
    """One line per contestant against M."""
    name, label, scale, factor = measure
    for peer in dict.fromkeys(e["peer"] for e in entries):
        points = sorted((e["m"], e[name] * factor) for e in entries if e["peer"] == peer and e.get(name))
        if points:
            axes.plot(*zip(*points, strict=True), label=peer, **_style(peer))
    rows = sorted({e["m"] for e in entries})
    axes.set_xscale("log", base=2)
    axes.set_xticks(rows, [str(m) for m in rows])
    axes.set_yscale(scale)
    axes.minorticks_off()
    axes.set_ylabel(label)
    axes.grid(alpha=0.3)


def _against_rows(op: str, panels: dict[tuple, list[dict]], path: Path) -> Path:
    figure, axes = _figure(len(MEASURES), len(panels))
    for column, (panel, entries) in enumerate(panels.items()):
        for row, measure in enumerate(MEASURES):
            _lines(axes[row][column], entries, measure)
        axes[0][column].set_title(_label(panel), fontsize="small")
        axes[-1][column].set_xlabel("M")
        axes[0][column].legend(fontsize="x-small")
    figure.suptitle(op)
    return _save(figure, path)


def _bars(op: str, entries: Sequence[dict], path: Path) -> Path:
    """Ops on weights alone: a group of bars per case."""
    groups = dict.fromkeys((tuple(e["shape"]), e["dtype"], e["cache"]) for e in entries)
    peers = list(dict.fromkeys(e["peer"] for e in entries))
    figure, axes = _figure(1, len(MEASURES))
    width = 0.8 / len(peers)
    for (name, label, scale, factor), panel in zip(MEASURES, axes[0], strict=True):
        for i, peer in enumerate(peers):
            found = {(tuple(e["shape"]), e["dtype"], e["cache"]): e for e in entries if e["peer"] == peer}
            heights = [(found[g][name] or 0) * factor if g in found else 0 for g in groups]
            panel.bar(
                [x + i * width for x in range(len(groups))], heights, width, label=peer, color=_style(peer)["color"]
            )
        panel.set_xticks(
            [x + 0.4 - width / 2 for x in range(len(groups))],
            [f"{dimensions(shape)}\n{dtype}\n{cache}" for shape, dtype, cache in groups],
            fontsize="x-small",
        )
        panel.set_yscale(scale)
        panel.set_ylabel(label)
        panel.grid(alpha=0.3, axis="y")
    axes[0][0].legend(fontsize="x-small")
    figure.suptitle(op)
    return _save(figure, path)


def draw(record: Record, folder: Path) -> dict[tuple[str, bool], Path]:
    """A PNG in `folder` per op and direction, by (op, backward); none where nothing was right."""
    drawn = {}
    for op, backward in dict.fromkeys((e["op"], e["backward"]) for e in record["results"]):
        entries = [e for e in record["results"] if (e["op"], e["backward"]) == (op, backward) and e["status"] == "ok"]
        path = folder / f"{op}{'_backward' if backward else ''}.png"
        if panels := _panels(entries):
            drawn[op, backward] = _against_rows(op, _fullest(panels), path)
        elif entries:
            drawn[op, backward] = _bars(op, entries, path)
    return drawn


def overview(record: Record, path: Path) -> Path | None:
    """Time against M of the linear layers at the shape measured most, for the README; None without one."""
    chosen = []
    for op in ("linear_4bit", "linear_int8"):
        for backward in (False, True):
            ways = {p: e for p, e in _panels(r for r in record["results"] if r["op"] == op).items() if p[2] == backward}
            if ways:
                panel = max(ways, key=lambda p: len({e["m"] for e in ways[p]}))
                chosen.append((f"{op}, {_label(panel)}", ways[panel]))
    if not chosen:
        return None
    figure, axes = _figure(2 if len(chosen) > 2 else 1, 2 if len(chosen) > 1 else 1)
    flat = [panel for row in axes for panel in row]
    for panel, (title, entries) in zip(flat, chosen, strict=False):
        _lines(panel, entries, MEASURES[0])
        panel.set_title(title, fontsize="small")
        panel.set_xlabel("M")
        panel.legend(fontsize="xx-small")
    for panel in flat[len(chosen) :]:
        panel.set_visible(False)
    return _save(figure, path)
