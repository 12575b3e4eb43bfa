"""`python -m bench run`: every op against its peers, in turn, beside the machine's limits."""

from __future__ import annotations

import argparse
import gc
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench import cases, limits, machine, peers, records, suites, timing
from bench.cases import OPS
from bench.inputs import Case, Source, copied
from bench.peers import OURS, Contestant, Entry, Unavailable

MOST_COPIES = 64
COPIED_BYTES = 16 << 30  # of all copies together, each with its weight in the dtype twice: to quantize, and decoded
GRAPH_ROWS = 256  # above, what it costs to launch no longer shows
Built = dict[str, "list[Entry] | tuple[str, str]"]


def _first_line(error: BaseException) -> str:
    line = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {line[:200]}"


def copies(case: Case, device: torch.device, most: int = MOST_COPIES) -> int:
    """How many copies of the data a cold case cycles through: together twice the cache."""
    if case.cache == "warm":
        return 1
    entry = OPS[case.op]
    read = entry.cost(replace(case, m=1) if entry.rows and case.m is None else case).read
    held = math.prod(case.shape) * (2 * case.dtype.itemsize + 1)
    return max(1, min(most, math.ceil(2 * machine.cache_size(device) / read), COPIED_BYTES // held))


def build(group: Case, weights: Sequence[SimpleNamespace], contestants: Iterable[Contestant]) -> Built:
    """Name -> one entry per copy of the weights, or why there is none: ("unavailable" or "failed", reason)."""
    built: Built = {}
    for peer in contestants:
        try:
            built[peer.name] = [peer.entry(group, w) for w in weights]
        except (Unavailable, ImportError) as error:
            built[peer.name] = ("unavailable", str(error))
        except Exception as error:
            built[peer.name] = ("failed", _first_line(error))
    return built


def check(case: Case, built: Built, weights: SimpleNamespace, rows: SimpleNamespace) -> dict[str, dict]:
    """Name -> status, reason and error of each contestant on the first copy of the data."""
    op = OPS[case.op]
    truth, plain = op.truth(weights, rows), op.plain(weights, rows)
    found = {}
    for name, entries in built.items():
        error = None
        if isinstance(entries, tuple):
            status, reason = entries
        elif reason := entries[0].refusal(case.m):
            status = "unavailable"
        else:
            try:
                status, reason, error = peers.judged(entries[0], rows, truth, plain)
            except Exception as problem:
                status, reason = "failed", _first_line(problem)
        found[name] = {"status": status, "reason": reason, "error": error}
    return found


def measure(
    case: Case, weights: Sequence[SimpleNamespace], built: Built, args: argparse.Namespace, limit: dict
) -> list:
    """The record's entries of one case, ours first."""
    device, op = torch.device(args.device), OPS[case.op]
    count = min(copies(case, device, args.most_copies), len(weights))
    source = Source(device, seed=1)
    rows = [op.rows(case, source) if op.rows else SimpleNamespace()]
    rows += [copied(rows[0]) for _ in range(count - 1)]
    with torch.set_grad_enabled(case.backward):
        found = check(case, built, weights[0], rows[0])
        right = [name for name, result in found.items() if result["status"] == "ok"]
        calls = {name: [_bound(e, r) for e, r in zip(built[name], rows, strict=False)] for name in right}
        small = case.m is None or case.m <= GRAPH_ROWS
        graph = [name for name in right if small and built[name][0].graph]
        times = timing.measure(calls, device=device, seconds=args.seconds, min_rounds=args.min_rounds, graph=graph)
    least = limits.floor(case, op.cost(case), limit, machine.cache_size(device))
    entries = []
    for peer in peers.CONTESTANTS[case.op]:
        if peer.name not in found:
            continue
        entry = _entry(case, device, peer, found[peer.name])
        if peer.name in times:
            timed = times[peer.name]
            entry |= asdict(timed) | {"limit": least / (timed.graph or timed.median)}
            if OURS in times:
                entry["ratio"] = timed.median / times[OURS].median
                if timed.graph and times[OURS].graph:
                    entry["graph_ratio"] = timed.graph / times[OURS].graph
        entries.append(entry)
    return entries


def _entry(case: Case, device: torch.device, peer: Contestant, found: dict) -> dict:
    """What an entry of the record holds whether it has times or not."""
    cost = OPS[case.op].cost(case)
    entry = {**case.fields(), "device": device.type, "layer": suites.layer_name(case.shape), "peer": peer.name}
    entry |= {"version": peers.package_version(peer), **found}
    return entry | {"read": cost.read, "written": cost.written, "operations": dict(cost.operations)}


def _too_large(case: Case, args: argparse.Namespace) -> list[dict]:
    """The entries of a case that needs more memory than the GPU has, for nobody's fault."""
    found = {"status": "unavailable", "reason": "the case does not fit into the GPU's memory", "error": None}
    device = torch.device(args.device)
    return [_entry(case, device, peer, found) for peer in _contestants(case.op, args.peers)]


def _bound(entry: Entry, rows: SimpleNamespace) -> timing.Call:
    return lambda: entry.run(rows)


def _summary(case: Case, entries: Sequence[dict]) -> Iterator[str]:
    yield str(case)
    for entry in entries:
        if entry["status"] == "ok":
            ratio = f"{entry['ratio']:6.2f}x" if "ratio" in entry else " " * 7
            graph = f"  graph {entry['graph'] * 1e3:.4f} ms" if entry["graph"] else ""
            yield f"  {entry['peer']:34} {entry['median'] * 1e3:10.3f} ms {ratio} {entry['limit']:7.1%}{graph}"
        elif entry["status"] != "unavailable":
            yield f"  {entry['peer']:34} {entry['status']}: {entry['reason']}"


def _selected(args: argparse.Namespace) -> list[Case]:
    chosen = suites.suite("quick" if args.quick else args.suite, args.device)
    for name in args.ops or ():
        if name not in OPS:
            raise ValueError(f"--ops: unknown op {name!r}; allowed: {', '.join(OPS)}")
    return [case for case in chosen if (not args.ops or case.op in args.ops) and (not args.rows or case.m in args.rows)]


def _contestants(op: str, wanted: Sequence[str] | None) -> list[Contestant]:
    return [p for p in peers.CONTESTANTS[op] if not wanted or p.name == OURS or any(w in p.name for w in wanted)]


def prepare(group: Case, args: argparse.Namespace) -> tuple[list[SimpleNamespace], Built]:
    """The copies of a group's weights, and its contestants built on each."""
    device = torch.device(args.device)
    first = cases.make_weights(group, Source(device))
    weights = [first]
    for _ in range(copies(group, device, args.most_copies) - 1):
        weights.append(copied(SimpleNamespace(**{k: v for k, v in vars(first).items() if k != "exact"})))
    return weights, build(group, weights, _contestants(group.op, args.peers))


def measure_all(
    selected: Sequence[Case], args: argparse.Namespace, limit: dict, begin: Callable[[Case], None]
) -> Iterator[tuple[Case, list[dict]]]:
    """The entries of each case, before which `begin` is called; weights and contestants are built once per group."""
    for group, together in groupby(selected, key=lambda case: case.group):
        members = list(together)
        begin(members[0])
        prepared = _fitting(prepare, group, args)
        for case in members:
            begin(case)
            entries = prepared and _fitting(measure, case, *prepared, args, limit)
            yield case, entries or _too_large(case, args)
        del prepared
        gc.collect()


def _fitting(function: Callable, *arguments: object) -> Any:
    """What a function returns, None if it needs more memory than the GPU has."""
    with suppress(torch.OutOfMemoryError):
        return function(*arguments)
    gc.collect()  # what the exception's traceback kept
    torch.cuda.empty_cache()
    return None


def configure(parser: argparse.ArgumentParser) -> None:
    names = lambda text: text.split(",")  # noqa: E731
    parser.add_argument("--suite", default="default", help="default (minutes) or full (hours)")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything runs")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cpu", "cuda"))
    parser.add_argument("--ops", type=names, help=f"comma-separated, of {', '.join(OPS)}")
    parser.add_argument("--rows", type=lambda text: [int(m) for m in text.split(",")], help="only these M")
    parser.add_argument("--peers", type=names, help="comma-separated parts of names; this package is always in")
    parser.add_argument("--seconds", type=float, help="per case, for all contestants together (default 1)")
    parser.add_argument("--min-rounds", type=int, help="turns of each contestant at least, however slow (default 3)")
    parser.add_argument("--budget", type=float, help="stop after so many seconds; --resume continues")
    parser.add_argument("--resume", action="store_true", help="keep what the record holds, measure the rest")
    parser.add_argument("--out", type=Path, help="the record, or its folder (default bench/results/<machine>)")


def main(args: argparse.Namespace) -> int:
    """Writes the record after every case.

    The exit code is 1 if a result of this package is wrong or failed, 3 if the budget ended the run.
    """
    deadline = time.monotonic() + args.budget if args.budget else math.inf
    if args.seconds is None:
        args.seconds = 0.01 if args.quick else 1.0
    if args.min_rounds is None:
        args.min_rounds = 1 if args.quick else 3
    args.most_copies = 4 if args.quick else MOST_COPIES
    selected = _selected(args)
    path = args.out if args.out and args.out.suffix == ".json" else machine.results_dir(args.out) / "ops.json"
    record = records.new("ops", machine.describe())
    if args.resume and path.exists():
        record = records.read(path)
        if record["machine"]["commit"] != machine.commit() or record["machine"]["name"] != machine.name():
            raise ValueError(f"{path} is of another commit or machine; run without --resume")
    crashed = record.setdefault("crashed", [])
    if "running" in record:
        crashed.append(record.pop("running"))
    done = {records.case_key(entry) for entry in record["results"]}
    fields = {case: case.fields() | {"device": args.device} for case in selected}
    selected = [case for case in selected if records.case_key(fields[case]) not in done and str(case) not in crashed]
    limit = record["limits"].setdefault(args.device, {})
    if not limit:
        limit |= limits.measure(args.device, args.quick)
        print(", ".join(f"{name} {value}" for name, value in limits.text(limit)), flush=True)
    busy = record["machine"]["cpu"]["load"]
    if busy > 0.5:
        print(f"This machine was busy when the run began (load {busy}): the numbers will be of little use", flush=True)

    def begin(case: Case) -> None:
        """If a library ends the process, --resume leaves this case out."""
        record["running"] = str(case)
        records.write(path, record)

    measured = 0
    for case, entries in measure_all(selected, args, limit, begin):
        print("\n".join(_summary(case, entries)), flush=True)
        record["results"] += entries
        del record["running"]
        records.write(path, record)
        measured += 1
        if time.monotonic() > deadline:
            break
    bad = [e for e in record["results"] if e["peer"].startswith(OURS) and e["status"] in ("wrong", "failed")]
    for entry in bad:
        print(f"{entry['op']} M={entry['m']}: {entry['peer']} {entry['status']}: {entry['reason']}", file=sys.stderr)
    if measured < len(selected):
        print(f"The budget ended the run after {measured} of {len(selected)} cases; --resume continues")
    for case in crashed:
        print(f"{case}: the process ended while this was measured", file=sys.stderr)
    print(f"{len(record['results'])} results in {path}")
    return 1 if bad or crashed else 3 if measured < len(selected) else 0
