"""The table and the plot of a record of `python -m bench model`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.machine import slug
from bench.model_split import GROUPS
from bench.plots import new_figure
from bench.records import Record
from bench.report import about
from bench.report import table as markdown
from qlora.files import replaced

OURS = "quantlib"


def _gigabytes(count: float | None) -> str:
    return "" if count is None else f"{count / 1e9:.2f}"


def _cells(record: Record, task: str) -> list[dict]:
    """The rows of a task; who is unavailable is named once, below the tables."""
    return [row for row in record["results"] if row["task"] == task and row["status"] != "unavailable"]


def _speed(row: dict) -> tuple[str, ...]:
    """Rate, share of the limit, ratio and memory, or in their place what is wrong."""
    if row["status"] != "ok":
        return row["status"], "", "", ""
    ratio = "1.00" if row["peer"] == OURS else f"{row['ratio']:.2f}" if row.get("ratio") else ""
    return f"{row['tokens_per_second']:,.1f}", f"{100 * row['limit']:.1f}%", ratio, _gigabytes(row["peak_memory"])


def _tokens(row: dict) -> str:
    return str(row["sequence"]) if row["batch"] == 1 else f"{row['batch']} x {row['sequence']}"


def _training(record: Record) -> str:
    rows = [
        (row["peer"], _tokens(row), "yes" if row["checkpointing"] else "no", *_speed(row))
        for row in sorted(_cells(record, "train"), key=lambda row: (row["sequence"], row["checkpointing"]))
    ]
    header = ("training step", "tokens", "checkpointing", "tokens/s", "of the limit", "time / ours", "peak GB")
    return markdown(header, rows)


def _decoding(record: Record) -> str:
    rows = [(row["peer"], str(row["sequence"]), *_speed(row)) for row in _cells(record, "decode")]
    return markdown(("generated token", "after", "tokens/s", "of the limit", "time / ours", "peak GB"), rows)


def _longest(record: Record) -> list[dict]:
    """The rows with a split of the longest sequence trained, without checkpointing where there is a choice."""
    rows = [row for row in _cells(record, "train") if row["status"] == "ok" and row.get("split")]
    key = max(((row["sequence"], not row["checkpointing"]) for row in rows), default=None)
    return [row for row in rows if (row["sequence"], not row["checkpointing"]) == key]


def _split(record: Record) -> str:
    rows = []
    for row in _longest(record):
        total = sum(row["split"].values()) or 1.0
        shares = [f"{100 * row['split'][group] / total:.0f}%" for group in GROUPS]
        rows.append((row["peer"], *shares))
    if not rows:
        return ""
    which = _longest(record)[0]
    title = f"{which['sequence']} tokens{', checkpointing' if which['checkpointing'] else ''}: share of time"
    return markdown((title, *GROUPS), rows)


def _title(record: Record) -> str:
    model = record["model"]
    return (
        f"{model['name']}: hidden {model['hidden']}, {model['layers']} layers, {model['linear_weights'] / 1e6:,.0f} M "
        f"weights in linear layers, random, NF4 with double quantization, LoRA of rank {model['rank']} on all of them, "
        f"{model['dtype']}, one sequence a step unless a batch is named."
    )


def _reasons(record: Record) -> str:
    missing = dict.fromkeys(f"- {r['peer']}: {r['status']}, {r['reason']}" for r in record["results"] if r["reason"])
    return "\n".join(missing)


def _agreement(record: Record) -> str:
    """How far each contestant is from float32, beside what is allowed."""
    allowed = record["tolerances"]
    rows = [(peer, *(f"{errors[name]:.2g}" for name in allowed)) for peer, errors in record["errors"].items() if errors]
    header = ("distance from the model in float32", *(f"{name}, at most {limit:g}" for name, limit in allowed.items()))
    return markdown(header, rows) if rows else ""


def table(record: Record) -> str:
    """Markdown: training, generation, the split of the longest training step, agreement, why anything is missing."""
    parts = (_title(record), _training(record), _decoding(record), _split(record), _agreement(record), _reasons(record))
    return "\n\n".join(part for part in parts if part)


def _picture(record: Record, folder: Path) -> str:
    path = folder / f"model-{slug(record['model']['name'])}.png"
    plot(record, path)
    return f"![tokens a second, memory, time by kind of work]({path.name})"


def page(record: Record, folder: Path) -> str:
    """All of it, for the machine's page; writes the plot into `folder`."""
    name = record["model"]["name"]
    return "\n\n".join((f"## Whole model: {name}", about(record), table(record), _picture(record, folder)))


def section(record: Record, folder: Path) -> str:
    """The README's share: training and generation, why anything is missing, and the plot."""
    parts = (_title(record), _training(record), _decoding(record), _reasons(record), _picture(record, folder))
    return "\n\n".join(part for part in parts if part)


def plot(record: Record, path: Path) -> None:
    """Tokens a second and peak memory against the length of the sequence, and the split of the longest step."""
    figure = new_figure(14, 4.5)
    speed, memory, split = figure.subplots(1, 3)
    rows = [row for row in _cells(record, "train") if row["status"] == "ok"]
    for i, peer in enumerate(dict.fromkeys(row["peer"] for row in rows)):
        for checkpointing, style in ((False, "o-"), (True, "s--")):
            mine = [row for row in rows if row["peer"] == peer and row["checkpointing"] == checkpointing]
            mine.sort(key=lambda row: row["sequence"])
            if not mine:
                continue
            lengths = [row["sequence"] for row in mine]
            label = peer + (", checkpointing" if checkpointing else "")
            speed.plot(lengths, [row["tokens_per_second"] for row in mine], style, color=f"C{i}", label=label)
            held = [(row["sequence"], row["peak_memory"] / 1e9) for row in mine if row["peak_memory"] is not None]
            if held:
                memory.plot(*zip(*held, strict=True), style, color=f"C{i}")
    for axes, name in ((speed, "tokens/s"), (memory, "peak memory, GB")):
        axes.set(xlabel="tokens in the sequence", ylabel=name, xscale="log", ylim=(0, None))
        axes.set_xticks(sorted({row["sequence"] for row in rows}), sorted({row["sequence"] for row in rows}))
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*speed.get_legend_handles_labels(), loc="outside lower left", ncols=4, fontsize="x-small")
    longest = _longest(record)
    names = [row["peer"].replace(" + ", " +\n").replace(", ", ",\n") for row in longest]
    base = [0.0] * len(longest)
    for group in GROUPS:
        # The profiler slows a step down; its shares are laid over the measured time.
        values = [row["median"] * row["split"][group] / (sum(row["split"].values()) or 1.0) for row in longest]
        split.bar(names, values, 0.6, base, label=group)
        base = [a + b for a, b in zip(base, values, strict=True)]
    split.tick_params(axis="x", labelsize="x-small")
    split.set(ylabel="seconds per step", title=_longest_title(longest))
    split.legend(fontsize="x-small", loc="center left", bbox_to_anchor=(1, 0.5), reverse=True)
    figure.suptitle(f"{record['model']['name']}: QLoRA training on {record['machine']['name']}")
    with replaced(Path(path)) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _longest_title(longest: Sequence[dict]) -> str:
    if not longest:
        return ""
    return f"{longest[0]['sequence']} tokens{', checkpointing' if longest[0]['checkpointing'] else ''}"
