"""The tables and the plot of a record of `python -m bench quality`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from bench.records import Record
from bench.report import about
from bench.report import table as markdown
from qlora.files import replaced

_PLANTED = {
    "nothing": "nothing planted",
    "activations": "planted in activations",
    "weights": "planted in weights",
    "both": "planted, divided out of weights",
}


def rows_of(record: Record, table: str) -> list[dict]:
    """The results of one of the tables."""
    return [row for row in record["results"] if row["table"] == table]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.3f}%"


def _weights(record: Record) -> str:
    rows = []
    for row in rows_of(record, "weights"):
        theirs = row.get("bitsandbytes", {})
        differing = row.get("differing", {})
        rows.append(
            (
                row["format"],
                f"{row['bits']:.3f}",
                _percent(row["weight_error"]),
                _percent(row["output_error"]),
                _percent(theirs.get("output_error")),
                *(f"{differing[name]:,}" if differing else "" for name in ("codes", "weights")),
            )
        )
    header = (
        "format",
        "bits/weight",
        "weights",
        "outputs",
        "outputs, bitsandbytes",
        "codes that differ",
        "values that differ",
    )
    return markdown(header, rows)


def _outlier_groups(record: Record) -> dict[tuple[str, int], list[dict]]:
    groups: dict[tuple[str, int], list[dict]] = {}
    for row in rows_of(record, "outliers"):
        groups.setdefault((row["planted"], row["magnitude"]), []).append(row)
    return groups


def _outliers(record: Record) -> str:
    groups = _outlier_groups(record)
    thresholds = list(dict.fromkeys(row["threshold"] for row in rows_of(record, "outliers") if "threshold" in row))
    rows = []
    for (planted, magnitude), found in groups.items():
        name = _PLANTED[planted] + (f", x{magnitude}" if magnitude > 1 else "")
        int8 = {row["threshold"]: row for row in found if "threshold" in row}
        nf4 = next(row for row in found if row["format"] == "NF4")
        ours = [_percent(int8[threshold]["output_error"]) for threshold in thresholds]
        rows.append((name, *ours, _percent(nf4["output_error"])))
        theirs = [int8[threshold].get("bitsandbytes", {}).get("output_error") for threshold in thresholds]
        if any(error is not None for error in theirs):
            rows.append(("- bitsandbytes", *map(_percent, theirs), ""))
        rows.append(("- columns in 16 bits", *(f"{100 * int8[t]['outlier_columns']:.1f}%" for t in thresholds), ""))
    names = ["plain int8" if threshold == 0 else f"{threshold:g}" for threshold in thresholds]
    return markdown(("error of outputs; LLM.int8() at threshold", *names, "NF4"), rows)


def _perplexity(record: Record) -> str:
    rows = []
    for row in sorted(rows_of(record, "perplexity"), key=lambda row: row["magnitude"]):
        theirs = row.get("bitsandbytes", {}).get("perplexity")
        planted = "" if row["magnitude"] == 1 else f"x{row['magnitude']}"
        rows.append((row["format"], planted, f"{row['perplexity']:.3f}", "" if theirs is None else f"{theirs:.3f}"))
    return markdown(("weights held in", "outlier features", "perplexity", "bitsandbytes"), rows)


def _title(record: Record) -> str:
    model = record["model"]
    return (
        f"A small trained model (hidden {model['hidden']}, {model['layers']} layers, "
        f"{model['linear_weights']:,} weights in linear layers), {model['dtype']}. Errors are relative distances from "
        f"float64, means over the layers; {model['outliers']} outlier features where planted; perplexity on "
        f"{model['tokens']:,} tokens that it was not trained on."
    )


def _misread(record: Record) -> str:
    """A note on formats that bitsandbytes writes as we do, and reads otherwise."""
    names = [
        row["format"]
        for row in rows_of(record, "weights")
        if "bitsandbytes" in row
        and not row["differing"]["codes"]
        and row["bitsandbytes"]["weight_error"] > 1.01 * row["weight_error"]
    ]
    if not names:
        return ""
    return (
        "Its codes are the same as ours, but bitsandbytes decodes them to other weights, farther from the truth, for: "
        f"{'; '.join(names)}. This is an error of its decoder here and not a property of the format."
    )


def table(record: Record) -> str:
    """Markdown: errors of weights and outputs, outlier features by threshold, perplexity, and what is wrong."""
    wrong = [f"- {row['format']}: {row['reason']}" for row in record["results"] if row["status"] != "ok"]
    tables = (_weights(record), _misread(record), _outliers(record), _perplexity(record))
    return "\n\n".join(part for part in (_title(record), *tables, "\n".join(wrong)) if part)


def _picture(record: Record, folder: Path) -> str:
    plot(record, folder / "quality.png")
    return "![errors by bits and by threshold, perplexity](quality.png)"


def page(record: Record, folder: Path) -> str:
    """All of it, for the machine's page; writes the plot into `folder`."""
    heading = "## What the formats lose on trained weights"
    return "\n\n".join((heading, about(record), table(record), _picture(record, folder)))


def section(record: Record, folder: Path) -> str:
    """The README's share: perplexity and the plot."""
    return "\n\n".join((_title(record), _perplexity(record), _picture(record, folder)))


def plot(record: Record, path: Path) -> None:
    """Error of outputs against bits per weight; against the threshold; and perplexity with outlier features."""
    figure = Figure(figsize=(15, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    bits, thresholds, perplexity = figure.subplots(1, 3)
    _plot_bits(bits, rows_of(record, "weights"))
    _plot_thresholds(thresholds, _outlier_groups(record))
    _plot_perplexity(perplexity, rows_of(record, "perplexity"))
    model = record["model"]
    figure.suptitle(f"What the formats lose on trained weights (hidden {model['hidden']}, {model['layers']} layers)")
    with replaced(Path(path)) as partial:
        figure.savefig(partial, format="png", dpi=120)


def _plot_bits(axes, rows: Sequence[dict]) -> None:
    for quant_type, double_quant, style in (
        ("nf4", False, "o-"),
        ("nf4", True, "o--"),
        ("fp4", False, "s-"),
        ("fp4", True, "s--"),
    ):
        line = [row for row in rows if (row["quant_type"], row["double_quant"]) == (quant_type, double_quant)]
        if line:
            label = quant_type.upper() + (", double quant" if double_quant else "")
            color = "C0" if quant_type == "nf4" else "C1"
            axes.plot(
                [r["bits"] for r in line], [100 * r["output_error"] for r in line], style, color=color, label=label
            )
    for row in rows:
        theirs = row.get("bitsandbytes")
        if theirs:
            label = None if axes.get_legend_handles_labels()[1][-1:] == ["bitsandbytes"] else "bitsandbytes"
            axes.plot(row["bits"], 100 * theirs["output_error"], "kx", markersize=4, label=label)
    axes.set(
        xlabel="bits per weight, 4-bit formats, blocks of 32 to 4096", ylabel="error of outputs, %", xlim=(3.98, 5.1)
    )
    axes.set_ylim(bottom=0)
    int8 = next((row for row in rows if row["format"] == "int8, row"), None)
    if int8:
        axes.axhline(100 * int8["output_error"], color="C2", linewidth=1, label="int8, row (8 bits)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _plot_thresholds(axes, groups: dict[tuple[str, int], list[dict]]) -> None:
    positions: dict[float, int] = {}
    for i, ((planted, magnitude), rows) in enumerate(groups.items()):
        int8 = [row for row in rows if "threshold" in row]
        positions |= {row["threshold"]: place for place, row in enumerate(int8)}
        label = _PLANTED[planted] + (f", x{magnitude}" if magnitude > 1 else "")
        places = range(len(int8))
        axes.plot(places, [100 * row["output_error"] for row in int8], "o-", color=f"C{i}", markersize=4, label=label)
        theirs = [row.get("bitsandbytes", {}).get("output_error") for row in int8]
        if all(error is not None for error in theirs):
            axes.plot(places, [100 * error for error in theirs], "kx", markersize=4)
    axes.set_xticks(list(positions.values()), ["none" if t == 0 else f"{t:g}" for t in positions])
    axes.set(xlabel="threshold of LLM.int8() (x: bitsandbytes)", ylabel="error of outputs, %", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="x-small")


def _plot_perplexity(axes, rows: Sequence[dict]) -> None:
    highest = max(row["magnitude"] for row in rows)
    names = [
        *(row["format"] for row in rows if row["magnitude"] == 1),
        *(row["format"] + f", outliers x{highest}" for row in rows if row["magnitude"] == highest),
    ]
    chosen = [row for wanted in (1, highest) for row in rows if row["magnitude"] == wanted]
    colors = ["C0" if row["magnitude"] == 1 else "C3" for row in chosen]
    places = range(len(chosen))
    values = [row["perplexity"] for row in chosen]
    axes.barh(places, values, color=colors)
    theirs = [(row["bitsandbytes"]["perplexity"], i) for i, row in enumerate(chosen) if "bitsandbytes" in row]
    if theirs:
        axes.plot(*zip(*theirs, strict=True), "kx", markersize=4)
    axes.set_yticks(list(places), names, fontsize="xx-small")
    axes.invert_yaxis()
    axes.set(xlabel="perplexity (x: bitsandbytes)", xlim=(0.97 * min(values), 1.02 * max(values)))
    axes.grid(alpha=0.3, axis="x")
