"""`python -m bench report`: tables and plots from records, and the README's performance section.

Beside the records of a machine, in bench/results/<machine>/, it writes README.md with every table, and the plots. The
README of the repository gets a summary of each machine between its two markers. No number is typed.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from bench import limits, machine, plots, records, targets
from bench.cases import OPS
from bench.inputs import dimensions
from bench.peers import OURS
from bench.records import Record
from qlora.files import replaced

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
KINDS = ("ops", "model", "quality")


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Markdown, the first column left, the others right."""
    rule = ["---", *["---:"] * (len(header) - 1)]
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, rule, *rows))


def duration(seconds: float) -> str:
    """Three digits, in a unit that fits."""
    for unit, factor in (("s", 1), ("ms", 1e3), ("us", 1e6)):
        if seconds * factor >= 1 or unit == "us":
            value = seconds * factor
            return f"{value:.{max(0, 2 - len(str(int(value))) + 1)}f} {unit}"
    raise AssertionError("unreachable")


def _cell(entry: dict | None) -> str:
    """A contestant's time and how many times ours that is."""
    if entry is None or entry["status"] == "unavailable":
        return ""
    if entry["status"] != "ok":
        return f"**{entry['status']}**"
    graph = f" ({duration(entry['graph'])} in a graph)" if entry.get("graph") else ""
    if entry["peer"] == OURS:
        return f"{duration(entry['median'])}{graph}"
    ratio = targets.speed_up(entry)
    return f"{duration(entry['median'])}{graph}" + (f", {ratio:.2f}x" if ratio else "")


def _measured(entry: dict | None) -> bool:
    return entry is not None and entry["status"] != "unavailable"


def _limit(entry: dict | None) -> str:
    return f"{entry['limit']:.0%}" if entry and entry.get("limit") else ""


def _memory(entry: dict | None) -> str:
    held = entry.get("peak_memory") if entry else None
    return "" if held is None else f"{held / 1e6:,.1f} MB"


def _host(entry: dict | None) -> str:
    return duration(entry["host"]) if entry and entry.get("host") else ""


def op_table(entries: Sequence[dict]) -> str:
    """One op: a row per case, our time, percent of the limit and memory, then the peers."""
    by_case: dict[tuple, dict[str, dict]] = {}
    for entry in entries:
        by_case.setdefault(records.case_key(entry), {})[entry["peer"]] = entry
    names = dict.fromkeys(e["peer"] for e in entries if e["peer"] != OURS and _measured(e))
    gpu = any(entry["device"] == "cuda" for entry in entries)
    header = ["shape", "M", "dtype", "data", OURS, "of limit", "memory", *(["host"] if gpu else []), *names]
    rows = []
    for found in by_case.values():
        first, ours = next(iter(found.values())), found.get(OURS)
        way = [
            dimensions(first["shape"]),
            "" if first["m"] is None else str(first["m"]),
            first["dtype"],
            first["cache"],
        ]
        numbers = [_cell(ours), _limit(ours), _memory(ours), *([_host(ours)] if gpu else [])]
        rows.append([*way, *numbers, *(_cell(found.get(name)) for name in names)])
    return table(header, rows)


def target_table(record: Record) -> str:
    """What was aimed at, what was measured, and whether that is enough."""
    verdicts = {True: "met", False: "**not met**", None: ""}
    rows = []
    for outcome in targets.outcomes(record):
        target = outcome.target
        measured = "" if outcome.measured is None else f"{outcome.measured:.2f}x"
        aim = f">= {target.least:.3g}x {target.peer}"
        rows.append((target.what, aim, measured, outcome.where, verdicts[outcome.met]))
    return table(("what", "target", "measured", "worst at", ""), rows) if rows else ""


def about(record: Record) -> str:
    """Machine, commit, date and versions of a record, in a line."""
    found = record["machine"]
    commit = (found["commit"]["hash"] or "unknown")[:12] + (" and changes" if found["commit"]["dirty"] else "")
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    state = f"{found['cpu']['threads']} threads, load {found['cpu']['load']} at the start"
    return f"{found['name']}, {state}; commit {commit}, {record['started'][:10]}; {versions}."


def _title(op: str, backward: bool) -> str:
    return f"{op}, forward and backward" if backward else op


def ops_page(record: Record, folder: Path) -> str:
    """All tables of the ops, for the machine's page; writes the plots into `folder`."""
    parts = [about(record)]
    for device, found in record["limits"].items():
        parts += [f"## Limits of this {device}", table(("limit", "measured"), limits.text(found))]
    if aims := target_table(record):
        parts += ["## Targets", aims]
    pictures = plots.draw(record, folder)
    for op, entry in OPS.items():
        for backward in (False, True):
            rows = [e for e in record["results"] if e["op"] == op and e["backward"] == backward]
            if rows:
                parts += [f"## {_title(op, backward)}", f"{entry.what[0].upper()}{entry.what[1:]}.", op_table(rows)]
            if picture := pictures.get((op, backward)):
                parts.append(f"![{_title(op, backward)}]({picture.name})")
    if gaps := _gaps(record):
        parts += ["## Not measured, or wrong", gaps]
    return "\n\n".join(parts)


def _gaps(record: Record) -> str:
    """Who has no number where, and why."""
    where: dict[tuple[str, str, str], dict[str, None]] = {}
    for e in record["results"]:
        if e["status"] != "ok":
            place = f"{_title(e['op'], e['backward'])} {e['dtype']}"
            where.setdefault((e["peer"], e["status"], e["reason"]), {})[place] = None
    lines = [f"- {peer}, {status}: {reason} ({'; '.join(ops)})" for (peer, status, reason), ops in where.items()]
    lines += [f"- {case}: the process ended while this was measured" for case in record.get("crashed", ())]
    return "\n".join(lines)


def ops_section(record: Record, folder: Path) -> str:
    """The README's share: targets and one plot."""
    picture = plots.overview(record, folder / "overview.png")
    parts = [about(record), target_table(record)]
    if picture:
        parts.append(f"![time against M]({picture.name})")
    return "\n\n".join(part for part in parts if part)


def _renderer(record: Record, name: str) -> Callable[[Record, Path], str]:
    """What makes a record's "page" for its machine, or its "section" for the README; the plots go into a folder."""
    if record["kind"] == "ops":
        return {"page": ops_page, "section": ops_section}[name]
    return getattr(importlib.import_module(f"bench.{record['kind']}_report"), name)


def _paths(folder: Path) -> list[Path]:
    """A machine's records: ops.json, quality.json, model-<name>.json, in the order of KINDS."""
    return [path for kind in KINDS for path in sorted((*folder.glob(f"{kind}.json"), *folder.glob(f"{kind}-*.json")))]


HOW = """\
Each ratio is a peer's median time over ours, the two measured in turn in one run: above 1, we are faster. The limit is
the machine's own, measured at the start of the run: the bytes that a case must move at the bandwidth of reading or
copying, or its operations at the rate of PyTorch's matrix product, whichever takes longer. Warm data are in the cache,
cold ones are not. A result whose error exceeds twice that of plain PyTorch in the same dtype, both against float64, is
reported as wrong and takes part in no ratio."""


def write_page(folder: Path) -> dict[str, Record]:
    """Writes README.md and the plots beside the records of one machine; returns the records by file name."""
    found = {path.stem: records.read(path) for path in _paths(folder)}
    if not found:
        raise ValueError(f"{folder}: no record in it; expected one of {', '.join(f'{kind}.json' for kind in KINDS)}")
    name = next(iter(found.values()))["machine"]["name"]
    parts = [f"# {name}", "Written by `python -m bench report`.", HOW]
    parts += [_renderer(record, "page")(record, folder) for record in found.values()]
    with replaced(folder / "README.md") as partial:
        partial.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    return found


def summary(folder: Path, found: dict[str, Record], root: Path) -> str:
    """One machine's part of the README in `root`: links are made relative to it."""
    where = folder.resolve().relative_to(root.resolve()).as_posix()
    name = next(iter(found.values()))["machine"]["name"]
    parts = [f"### {name}"]
    parts += [_renderer(record, "section")(record, folder) for record in found.values()]
    parts.append(f"All tables and plots: [{where}]({where}/README.md).")
    return "\n\n".join(parts).replace("](", f"]({where}/").replace(f"]({where}/{where}/", f"]({where}/")


def around_markers(path: Path) -> tuple[str, str]:
    """What a README says before and after the generated part. Raises ValueError where the markers are missing."""
    before, start, rest = path.read_text(encoding="utf-8").partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"{path}: it needs a line {START} and, after it, a line {END}")
    return before, after


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folders", nargs="*", type=Path, help="with records (default: all of bench/results)")
    parser.add_argument("--readme", type=Path, default=machine.RESULTS.parent.parent / "README.md")
    parser.add_argument("--no-readme", action="store_true", help="write the machines' pages only")


def main(args: argparse.Namespace) -> int:
    before, after = ("", "") if args.no_readme else around_markers(args.readme)
    folders = args.folders or sorted(path for path in machine.RESULTS.glob("*") if _paths(path))
    if not folders:
        raise ValueError(f"no records in {machine.RESULTS}; make one with `python -m bench run`")
    pages = [(folder, write_page(folder)) for folder in folders]
    for folder, _ in pages:
        print(folder / "README.md")
    if args.no_readme:
        return 0
    text = "\n\n".join([HOW, *(summary(folder, found, args.readme.parent) for folder, found in pages)])
    with replaced(args.readme) as partial:
        partial.write_text(f"{before}{START}\n{text}\n{END}{after}", encoding="utf-8")
    print(args.readme)
    return 0
