"""Runs the stages of `bench/gpu.sh` within a budget, and leaves a report whatever happens.

Under --out (default: the variable OUT, else bench/results/<gpu>/):

    report.json       each stage: status, seconds, note, commands, the end of its output if it went wrong
    gpu.log           the output of everything
    environment.json  machine, versions, clocks
    tests.xml         the GPU tests, as JUnit XML
    tuned-<gpu>.json  with --tune: configurations of the Triton kernels, also left in kernels/quant_triton/tuned/
    ops.json, model-<name>.json   records of `python -m bench`

The report is rewritten whenever a stage starts or ends, so that it can be read after a kill. A second call with the
same --out runs only what is not finished, as long as the sources and the options are the same. The exit code is 0 if
every stage is ok, unavailable, or partial: measured right as far as its time went.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from types import FrameType
from typing import IO

from bench.gpu_stages import (
    ROOT,
    STAGES,
    WORK,
    Command,
    Failed,
    Options,
    OutOfTime,
    Partial,
    Stage,
    Unavailable,
    smi,
)
from qlora.files import write_json

SOURCES = ("bench", "csrc", "kernels", "lora_ops", "qlora", "quantlib", "tests", "pyproject.toml", "setup.py")
SUFFIXES = (".py", ".sh", ".h", ".cpp", ".cu", ".toml")
GOOD = ("ok", "partial", "unavailable")
RESERVE = 5.0  # seconds kept back for stopping a stage and for the table
LOG_LIMIT = 12 << 20  # bytes; a run's output is a few hundred kilobytes unless something repeats itself
TAIL = 400  # lines of output that a stage's result is read from; the report keeps a tenth
_LIBC = ctypes.CDLL(None)


class Killed(BaseException):
    """A signal asked this process to end."""


def fingerprint(options: Options) -> str:
    """A hash of the sources and of the options that change what a stage finds."""
    digest = hashlib.sha256(repr((options.dry_run, options.tune, sys.version, sys.executable)).encode())
    if options.wheels is not None:
        digest.update(repr(sorted((path.name, path.stat().st_size) for path in options.wheels.glob("*.whl"))).encode())
    for name in SOURCES:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.suffix in SUFFIXES and file.is_file():
                digest.update(f"{file.relative_to(ROOT)}\0".encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def environment(options: Options) -> dict[str, str]:
    """Variables of every stage: the repository and the peers on the path, no network, output at once."""
    paths = [*([options.site] if options.wheels else []), ROOT, ROOT / "kernels", os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "OUT": str(options.out),
    }


class Log:
    """Copies output to the screen and to a file of limited size, and keeps its end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.tail: deque[str] = deque(maxlen=TAIL)

    def write(self, line: bytes) -> None:
        self.tail.append(line.decode(errors="replace").rstrip("\n"))
        sys.stdout.buffer.write(line)
        sys.stdout.buffer.flush()
        if self.file.tell() + len(line) < LOG_LIMIT:
            self.file.write(line)
            self.file.flush()

    def say(self, text: str) -> None:
        self.write(f"{text}\n".encode())

    def copy(self, stream: IO[bytes]) -> None:
        for line in stream:
            self.write(line)

    @property
    def output(self) -> str:
        return "\n".join(self.tail)


def _begin() -> None:
    """In a command's process, before it starts: a group of its own, and no life after its parent's."""
    os.setpgrp()
    if hasattr(_LIBC, "prctl"):
        _LIBC.prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: nobody else would free the GPU


def stop(process: subprocess.Popen) -> None:
    """Ends a command and what it started: asked first, then forced."""
    for number, patience in ((signal.SIGTERM, 3.0), (signal.SIGKILL, 3.0)):
        try:
            os.killpg(process.pid, number)
            process.wait(patience)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def run_command(command: Command, variables: dict[str, str], seconds: float, log: Log) -> int | None:
    """The exit code, or None if the command had to be stopped after so many seconds."""
    process = subprocess.Popen(
        command.arguments,
        cwd=ROOT,
        env={**variables, **command.environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        preexec_fn=_begin,
    )
    reader = threading.Thread(target=log.copy, args=(process.stdout,), daemon=True)
    reader.start()
    try:
        return process.wait(max(seconds, 0))
    except subprocess.TimeoutExpired:
        return None
    finally:
        stop(process)
        reader.join(3)


def run_stage(stage: Stage, options: Options, seconds: float, log: Log, entry: dict) -> None:
    """Runs the commands of a stage; enters its commands, status and note."""
    deadline = time.monotonic() + seconds
    try:
        commands = stage.commands(options, seconds)
        entry["commands"] = [list(command.arguments) for command in commands]
        for command in commands:
            log.say("$ " + " ".join(command.arguments))
            code = run_command(command, environment(options), deadline - time.monotonic(), log)
            if code is None:
                entry.update(status="out of time", note=f"stopped after {seconds:.0f} s")
                return
            entry["note"] = stage.result(options, log.output, code)
        entry["status"] = "ok"
    except Unavailable as reason:
        entry.update(status="unavailable", note=str(reason))
    except Partial as reason:
        entry.update(status="partial", note=str(reason))
    except OutOfTime as reason:
        entry.update(status="out of time", note=str(reason))
    except Failed as reason:
        entry.update(status="failed", note=str(reason))
    except Exception as error:  # a report of all stages is worth more than a traceback of one
        entry.update(status="failed", note=f"{type(error).__name__}: {error}")


def table(stages: Sequence[dict]) -> str:
    """Stage, status, seconds, note."""
    rows = [("stage", "status", "seconds", "note")]
    for entry in stages:
        seconds = f"{entry['seconds']:.1f}" if entry["seconds"] is not None else ""
        note = " ".join(f"{'kept: ' if entry.get('kept') else ''}{entry['note']}".split())
        rows.append((entry["name"], entry["status"], seconds, note if len(note) <= 100 else f"{note[:97]}..."))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    return "\n".join(
        f"{name:<{widths[0]}}  {status:<{widths[1]}}  {seconds:>{widths[2]}}  {note}".rstrip()
        for name, status, seconds, note in rows
    )


class Run:
    """One call of gpu.sh: the report, and the stages as they go."""

    def __init__(self, options: Options, stages: Sequence[Stage]) -> None:
        self.options = options
        self.stages = stages
        self.start = time.monotonic()
        self.path = options.out / "report.json"
        self.report = {
            "schema": 1,
            "kind": "gpu",
            "started": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "fingerprint": fingerprint(options),
            "budget": options.budget,
            "dry_run": options.dry_run,
            "ok": None,
            "stages": [],
        }
        earlier = self._earlier()
        self.options = replace(options, resume=bool(earlier))
        finished = self._finished(earlier)
        for stage in stages:
            entry = {"name": stage.name, "status": "waiting", "seconds": None, "note": "", "commands": []}
            self.report["stages"].append(finished.get(stage.name, entry))

    def _earlier(self) -> list[dict]:
        """The stages of an earlier call with the same sources and options."""
        if self.options.fresh:
            return []
        try:
            earlier = json.loads(self.path.read_text(encoding="utf-8"))
            return earlier["stages"] if earlier["fingerprint"] == self.report["fingerprint"] else []
        except (OSError, ValueError, KeyError, TypeError):
            return []

    def _finished(self, earlier: list[dict]) -> dict[str, dict]:
        """The entries of stages that need not run again, by name."""
        entries = {entry["name"]: {**entry, "kept": True} for entry in earlier if entry["status"] == "ok"}
        for stage in self.stages:
            if any(not path.exists() for path in stage.leaves(self.options)):
                entries.pop(stage.name, None)
        return entries

    def write(self) -> None:
        write_json(self.path, self.report)

    def remaining(self) -> float:
        return self.options.budget - RESERVE - (time.monotonic() - self.start)

    def run(self) -> None:
        """Runs what is not finished, in order."""
        if not self.options.resume:
            (self.options.out / "gpu.log").unlink(missing_ok=True)
        lost = ""
        for stage, entry in zip(self.stages, self.report["stages"], strict=True):
            if entry.get("kept"):
                continue
            if lost:
                entry.update(status="not run", note=lost)
            elif self.remaining() <= 0:
                entry.update(status="out of time", note="no time left to start")
            else:
                self._run_one(stage, entry)
            if stage.vital and entry["status"] != "ok":
                lost = f"{stage.name}: {entry['status']}"
            self.write()

    def _run_one(self, stage: Stage, entry: dict) -> None:
        entry["status"] = "running"
        self.write()
        begin = time.monotonic()
        seconds = min(stage.share * self.options.budget, self.remaining())
        with (self.options.out / "gpu.log").open("ab") as file:
            log = Log(file)
            log.say(f"== {stage.name}, at most {seconds:.0f} s")
            try:
                run_stage(stage, self.options, seconds, log, entry)
            except Killed as signal_name:
                entry.update(status="killed", note=str(signal_name))
                raise
            finally:
                entry["seconds"] = round(time.monotonic() - begin, 1)
                if entry["status"] not in GOOD:
                    entry["output"] = list(log.tail)[-TAIL // 10 :]

    def finish(self) -> int:
        """Writes the report, prints the table; returns the exit code."""
        self.report["ok"] = all(entry["status"] in GOOD for entry in self.report["stages"])
        self.report["seconds"] = round(time.monotonic() - self.start, 1)
        self.write()
        print(f"\n{self.path}: {'ok' if self.report['ok'] else 'NOT OK'}, {self.report['seconds']:.0f} s\n")
        print(table(self.report["stages"]), flush=True)
        return int(not self.report["ok"])


def _kill(number: int, frame: FrameType | None) -> None:
    raise Killed(signal.Signals(number).name)


def parse(arguments: Sequence[str] | None) -> Options:
    """The options of a command line."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        description="Builds, tests, sanitizes and benchmarks on this machine's GPU, in stages; prints a table last.",
        epilog="Environment: PYTHON, the Python that has PyTorch (python3); OUT, the default of --out.",
    )
    parser.add_argument("--out", type=Path, help="where to write (default: $OUT, else bench/results/<gpu>)")
    parser.add_argument("--budget", type=float, default=540, metavar="SECONDS", help="for everything (default: 540)")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="peers to install, see bench/peer_wheels.py")
    parser.add_argument("--tune", action="store_true", help="look for better configurations of the Triton kernels")
    parser.add_argument("--fresh", action="store_true", help="run finished stages again")
    parser.add_argument("--dry-run", action="store_true", help="walk all stages on a CPU, with tiny shapes")
    args = parser.parse_args(arguments)
    if args.budget <= RESERVE:
        parser.error(f"--budget {args.budget:g}: it takes more than {RESERVE:g} seconds")
    if args.wheels is not None and not args.wheels.is_dir():
        parser.error(f"--wheels {args.wheels}: no such folder")
    out = args.out or Path(os.environ.get("OUT") or _default_out(args.dry_run))
    wheels = args.wheels.resolve() if args.wheels else None
    return Options(out.resolve(), args.budget, wheels, args.fresh, args.dry_run, args.tune)


def _default_out(dry_run: bool) -> Path:
    if dry_run:
        return WORK / "dry-run"
    gpu = re.sub(r"[^a-z0-9]+", "-", (smi("name") or "no gpu").lower()).strip("-")
    return ROOT / "bench" / "results" / gpu


def main(arguments: Sequence[str] | None = None, stages: Sequence[Stage] = STAGES) -> int:
    """Runs the stages; returns the exit code."""
    options = parse(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    run = Run(options, stages)
    handlers = {number: signal.signal(number, _kill) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    try:
        run.run()
    except Killed as signal_name:
        run.finish()
        return 128 + signal.Signals[str(signal_name)]
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return run.finish()


if __name__ == "__main__":
    sys.exit(main())
