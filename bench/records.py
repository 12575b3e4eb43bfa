"""Records: what one run measured, as one JSON file.

    schema    version of this layout
    kind      which command wrote it: "ops", "model", "quality"
    started   UTC, ISO 8601
    machine   `machine.describe()`: names, clocks, versions, commit
    limits    what the machine can do (`bench.limits`), bytes or operations a second; {} if not measured
    results   one entry per measurement

An entry of kind "ops" holds the fields of its case (op, shape, m, dtype, backward, cache, model), its cost (bytes,
operations) and its contestant (peer, version), then status: "ok", "wrong", "unavailable" or "failed", with a reason
for all but the first. Only "ok" has times, in seconds (median, p20, p80, host, graph), peak_memory in bytes, limit
(the fraction of the machine's limit reached) and ratio, this contestant's time over ours. Such a record also has
crashed, cases during which the process ended, and, during a run, running.
"""

from __future__ import annotations

import datetime
import json
import math
from pathlib import Path
from typing import Any

from qlora.files import write_json

SCHEMA = 1
Record = dict[str, Any]


def new(kind: str, machine: dict) -> Record:
    """An empty record of a run that starts now."""
    started = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    return {"schema": SCHEMA, "kind": kind, "started": started, "machine": machine, "limits": {}, "results": []}


def _check(record: Any, source: object) -> Record:
    if not isinstance(record, dict) or record.get("schema") != SCHEMA:
        found = record.get("schema") if isinstance(record, dict) else None
        raise ValueError(f"{source}: schema {found!r}; this version of bench reads {SCHEMA}. Measure again.")
    missing = [key for key in ("kind", "started", "machine", "limits", "results") if key not in record]
    if missing:
        raise ValueError(f"{source}: it lacks {', '.join(missing)}; it is no record of `python -m bench`")
    return record


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinities."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write(path: Path, record: Record) -> None:
    """Writes all of it or nothing. Numbers that are not finite become null."""
    write_json(Path(path), _finite(_check(record, path)))


def parse(text: str, source: object) -> Record:
    """A record from its JSON. Raises ValueError, naming `source`, for anything else."""
    try:
        return _check(json.loads(text), source)
    except json.JSONDecodeError as error:
        raise ValueError(f"{source}: not JSON ({error})") from None


def read(path: Path) -> Record:
    """The record at `path`. Raises ValueError if it is none, or of another schema."""
    return parse(Path(path).read_text(encoding="utf-8"), path)


def case_key(entry: dict) -> tuple:
    """What identifies the case of an entry of kind "ops"; entries of all its contestants share it."""
    names = ("op", "shape", "dtype", "m", "backward", "cache", "device")
    return tuple(tuple(value) if isinstance(value := entry[name], list) else value for name in names)
