"""`python -m bench compare A B`: how our times changed between two records, or from a commit to the working tree.

A and B are records, folders with one, or commits: of a commit the record committed with it is read. With `--base REV`
nothing is read: REV is checked out and built in .cache/bench/, and both it and the working tree are measured now, in
turn, by the benchmarks of the working tree; `--options "--ops linear_4bit --rows 1,64"` says what.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from bench import machine, records, report
from bench.inputs import dimensions
from bench.peers import OURS
from bench.records import Record

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Change:
    """Our time for one case before and after. faster: before / after; clear: the ranges p20 ... p80 do not meet."""

    case: tuple
    before: dict
    after: dict

    @property
    def faster(self) -> float:
        return self.before["median"] / self.after["median"]

    @property
    def clear(self) -> bool:
        return self.before["p20"] > self.after["p80"] or self.after["p20"] > self.before["p80"]


def _ours(record: Record) -> dict[tuple, dict]:
    return {records.case_key(e): e for e in record["results"] if e["peer"] == OURS and e["status"] == "ok"}


def changes(before: Record, after: Record) -> list[Change]:
    """The cases that both records timed, in the order of the second."""
    old, new = _ours(before), _ours(after)
    return [Change(key, old[key], entry) for key, entry in new.items() if key in old]


def _verdict(change: Change) -> str:
    if not change.clear:
        return ""
    return "faster" if change.faster > 1 else "**slower**"


def table(found: Sequence[Change]) -> str:
    """Markdown; the largest slow-down first."""
    rows = []
    for change in sorted(found, key=lambda c: c.faster):
        entry = change.after
        way = " + backward" if entry["backward"] else ""
        rows.append(
            (
                f"{entry['op']}{way}",
                dimensions(entry["shape"]),
                "" if entry["m"] is None else str(entry["m"]),
                entry["dtype"],
                report.duration(change.before["median"]),
                report.duration(entry["median"]),
                f"{change.faster:.2f}x",
                _verdict(change),
            )
        )
    return report.table(("op", "shape", "M", "dtype", "before", "after", "speed", ""), rows)


def text(before: Record, after: Record) -> str:
    """The whole comparison: what was compared, the table, and cases that only one side has."""
    found = changes(before, after)
    if not found:
        raise ValueError("the two records have no case in common that both timed")
    alone = (len(_ours(before)) - len(found), len(_ours(after)) - len(found))
    notes = [f"before: {_about(before)}", f"after:  {_about(after)}"]
    if before["machine"]["name"] != after["machine"]["name"]:
        notes.append("The machines differ: these are no changes of the code.")
    mean = statistics.geometric_mean(change.faster for change in found)
    last = f"{len(found)} cases, geometric mean {mean:.2f}x; only before: {alone[0]}, only after: {alone[1]}."
    return "\n".join([*notes, "", table(found), "", last])


def _about(record: Record) -> str:
    commit = record["machine"]["commit"]
    changed = " and changes" if commit["dirty"] else ""
    return f"{(commit['hash'] or 'unknown')[:12]}{changed}, {record['started']}, {record['machine']['name']}"


# ---------------------------------------------------------------------------------------------------
# Records and commits


def _git(*arguments: str) -> str:
    done = subprocess.run(("git", *arguments), cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout


def find(name: str) -> Record:
    """The record that a path, a folder or a commit stands for.

    Raises:
        ValueError: it is none of these, or the commit holds no record of this machine.
    """
    path = Path(name)
    if path.exists():
        return records.read(path / "ops.json" if path.is_dir() else path)
    where = machine.results_dir().relative_to(ROOT) / "ops.json"
    try:
        commit = _git("rev-parse", "--verify", "--quiet", f"{name}^{{commit}}").strip()
    except ValueError:
        raise ValueError(f"{name!r} is neither a file, nor a folder, nor a commit") from None
    return records.parse(_git("show", f"{commit}:{where.as_posix()}"), f"{name}:{where}")


# ---------------------------------------------------------------------------------------------------
# Base and head


def checkout(revision: str) -> Path:
    """A built work tree of a commit, in .cache/bench/, kept for the next time."""
    commit = _git("rev-parse", "--verify", f"{revision}^{{commit}}").strip()
    tree = ROOT / ".cache" / "bench" / commit[:12]
    built = tree / ".built"
    if not built.exists():
        if not tree.exists():
            _git("worktree", "prune")
            _git("worktree", "add", "--detach", str(tree), commit)
        print(f"building {commit[:12]} in {tree}", flush=True)
        subprocess.run((sys.executable, "setup.py", "-q", "build_ext", "--inplace"), cwd=tree, check=True)
        built.touch()
    return tree


def measure(tree: Path, out: Path, options: Sequence[str]) -> Record:
    """Runs this checkout's benchmarks on the packages of `tree`, in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "bench").symlink_to(ROOT / "bench")
        paths = (str(tree), str(tree / "kernels"), os.environ.get("PYTHONPATH", ""))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = (sys.executable, "-m", "bench", "run", "--peers", "none", "--out", str(out), *options)
        subprocess.run(command, cwd=folder, env=environment, check=True, stdout=subprocess.DEVNULL)
    return records.read(out / "ops.json")


def merged(runs: Sequence[Record]) -> Record:
    """Several runs as one: the median of the medians, and the widest range."""
    first, *rest = runs
    others = [_ours(record) for record in rest]
    results = []
    for key, entry in _ours(first).items():
        same = [entry, *(found[key] for found in others if key in found)]
        spread = {"p20": min(e["p20"] for e in same), "p80": max(e["p80"] for e in same)}
        results.append({**entry, "median": statistics.median(e["median"] for e in same), **spread})
    return {**first, "results": results}


def against(revision: str, rounds: int, options: Sequence[str]) -> tuple[Record, Record]:
    """Measures a commit and the working tree in turn; returns both."""
    trees = (checkout(revision), ROOT)
    runs: tuple[list[Record], list[Record]] = ([], [])
    for i in range(rounds):
        for tree, mine in zip(trees, runs, strict=True):
            with tempfile.TemporaryDirectory() as out:
                mine.append(measure(tree, Path(out), options))
            print(f"round {i + 1} of {rounds}: {tree}", flush=True)
    return merged(runs[0]), merged(runs[1])


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("records", nargs="*", metavar="A B", help="two records, folders or commits")
    parser.add_argument("--base", metavar="REV", help="measure this commit and the working tree now")
    parser.add_argument("--rounds", type=int, default=2, help="of --base: turns of each side (default 2)")
    parser.add_argument("--options", default="", help="of --base: options of `run`, in one string")


def main(args: argparse.Namespace) -> int:
    if args.base:
        if args.records:
            raise ValueError("--base measures the working tree; it takes no records")
        print(text(*against(args.base, args.rounds, args.options.split())))
        return 0
    if len(args.records) != 2:
        raise ValueError(f"two records are needed, {len(args.records)} came; or --base REV")
    print(text(*map(find, args.records)))
    return 0
