"""The stages of `bench/gpu.sh`, most valuable first.

A stage is a list of commands. To add one, append it to STAGES: the runner (`bench.gpu`) does the rest. Only the
standard library is imported here, so that a machine where PyTorch does not load still gets a report.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "gpu"
SANITIZER_TOOLS = ("memcheck", "racecheck", "synccheck")


class Unavailable(Exception):
    """The machine lacks what a stage needs, and nothing is wrong with the code: the stage is left out."""


class Failed(Exception):
    """The commands of a stage succeeded, but what they left shows a failure."""


class OutOfTime(Exception):
    """A command stopped by itself when its time was over; what it has is kept."""


class Partial(Exception):
    """All that was measured is right, but time was over before all was: no failure, and the next call continues."""


@dataclass(frozen=True)
class Options:
    """The command line of gpu.sh.

    out: where everything is written. wheels: folder with peers' wheels, or None. tune: look for better configurations
    of the Triton kernels first. resume: what lies in `out` is of these sources.
    """

    out: Path
    budget: float = 540.0
    wheels: Path | None = None
    fresh: bool = False
    dry_run: bool = False
    tune: bool = False
    resume: bool = False

    @property
    def site(self) -> Path:
        """Where the wheels are installed."""
        return WORK / "site"


@dataclass(frozen=True)
class Command:
    """Arguments and additions to the environment."""

    arguments: Sequence[str]
    environment: dict[str, str] = field(default_factory=dict)


def last_line(output: str) -> str:
    """The last line that says anything."""
    return next((line.strip() for line in reversed(output.splitlines()) if line.strip()), "")


def plain_result(options: Options, output: str, code: int) -> str:
    """The last line of the output; Failed if the exit code is not 0."""
    if code:
        raise Failed(last_line(output) or f"exit code {code}")
    return last_line(output)


@dataclass(frozen=True)
class Stage:
    """A step with a result of its own.

    name: as in the table. share: of the whole budget, the most it may take.
    commands(options, seconds): what to run one after the other within so many seconds; may raise Unavailable.
    result(options, output, code): asked after each command, with its exit code: the result in a few words, or raises
        Failed, OutOfTime, Partial or Unavailable. `plain_result` by default.
    leaves(options): what must be there for a finished stage not to run again on the next call.
    vital: without it no later stage makes sense.
    """

    name: str
    share: float
    commands: Callable[[Options, float], list[Command]]
    result: Callable[[Options, str, int], str] = plain_result
    leaves: Callable[[Options], list[Path]] = lambda options: []
    vital: bool = False


def smi(field_name: str) -> str | None:
    """A property of the first GPU as nvidia-smi tells it, None without nvidia-smi or a GPU."""
    query = ["nvidia-smi", f"--query-gpu={field_name}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def python(*arguments: str | Path, **environment: str) -> Command:
    """A command of the Python that runs this one."""
    return Command([sys.executable, *map(str, arguments)], environment)


# ---------------------------------------------------------------------------------------------------
# Peers


def _wheels(options: Options, seconds: float) -> list[Command]:
    if options.wheels is None:
        raise Unavailable("no --wheels given; peers are those already installed")
    files = sorted(options.wheels.glob("*.whl"))
    if not files:
        raise Failed(f"no .whl file in {options.wheels}")
    shutil.rmtree(options.site, ignore_errors=True)
    target = ("--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--target", options.site)
    return [python("-m", "pip", "install", "-q", "--disable-pip-version-check", *target, *files)]


def _wheels_result(options: Options, output: str, code: int) -> str:
    plain_result(options, output, code)
    return ", ".join("-".join(path.name.split("-")[:2]) for path in sorted(options.wheels.glob("*.whl")))


# ---------------------------------------------------------------------------------------------------
# Environment, build, diagnostics


def _environment(options: Options, seconds: float) -> list[Command]:
    dry = ["--dry-run"] if options.dry_run else []
    return [python("-m", "bench.gpu_environment", options.out / "environment.json", *dry)]


def _build(options: Options, seconds: float) -> list[Command]:
    environment = {"QUANTLIB_CUDA": "0"}
    if not options.dry_run:
        capability = smi("compute_cap")
        if capability is None:
            raise Failed("nvidia-smi does not tell the GPU's compute capability")
        environment = {"QUANTLIB_CUDA": "1", "QUANTLIB_CUDA_ARCHS": capability.replace(".", "")}
    return [python("setup.py", "build_ext", "--inplace", **environment)]


def _built(options: Options) -> list[Path]:
    modules = ("_C",) if options.dry_run else ("_C", "_C_cuda")
    # A name without a match stands for what is missing.
    return [next(ROOT.glob(f"quantlib/{name}.*so"), ROOT / f"quantlib/{name}.so") for name in modules]


def _build_result(options: Options, output: str, code: int) -> str:
    plain_result(options, output, code)
    return ", ".join(f"{path.name} {path.stat().st_size / 2**20:.1f} MiB" for path in _built(options))


def _diagnose(options: Options, seconds: float) -> list[Command]:
    return [python("-m", "quantlib")]


# ---------------------------------------------------------------------------------------------------
# Tuning: before the tests, so that they test what was found


TUNED = ROOT / "kernels" / "quant_triton" / "tuned"


def _tune(options: Options, seconds: float) -> list[Command]:
    if not options.tune:
        raise Unavailable("not asked for with --tune; configurations are those committed, or the defaults")
    budget = ("--budget", f"{max(1.0, 0.9 * seconds - 10):.0f}")
    sizes, out = ("--shapes", "4096x4096", "14336x4096", "--rows", "1", "16", "128", "1024", "8192"), TUNED
    if options.dry_run:
        sizes, out = ("--shapes", "64x128", "--rows", "1", "--dtype", "float16"), options.out
    return [python("-m", "quant_triton.tune", *budget, *sizes, "--out", out, **_dry_environment(options))]


def _tune_result(options: Options, output: str, code: int) -> str:
    """What was found goes to `out` as well: it is to be committed."""
    if code not in (0, 3):
        raise Failed(last_line(output) or f"exit code {code}")
    found = Path(last_line(output))
    if found.parent != options.out:
        shutil.copy(found, options.out / f"tuned-{found.name}")
    if code == 3:
        raise OutOfTime("some problems were not tuned")
    return found.name


# ---------------------------------------------------------------------------------------------------
# Tests


def _pytest(options: Options, marks: str, *arguments: str | Path) -> list[str]:
    common = ["-m", "pytest", "tests/gpu", "-q", "-m", marks, "-p", "no:cacheprovider", "-p", "no:benchmark"]
    return [*common, *map(str, arguments)]


def _dry_environment(options: Options) -> dict[str, str]:
    return {"QUANTLIB_GPU_DRY_RUN": "1", "TRITON_INTERPRET": "1"} if options.dry_run else {}


def _tests(options: Options, seconds: float) -> list[Command]:
    junit = options.out / "tests.xml"
    junit.unlink(missing_ok=True)
    return [python(*_pytest(options, "gpu", "--junitxml", junit), **_dry_environment(options))]


def _tests_result(options: Options, output: str, code: int) -> str:
    junit = options.out / "tests.xml"
    if not junit.exists():
        raise Failed(f"pytest left no result: {last_line(output)}")
    suite = ElementTree.parse(junit).getroot().find("testsuite")
    total, *bad = (int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped"))
    failures, errors, skipped = bad
    counts = f"{total - sum(bad)} passed, {failures + errors} failed, {skipped} skipped"
    if code or failures or errors or total == skipped:
        raise Failed(counts)
    return counts


def find_sanitizer() -> str | None:
    """compute-sanitizer on PATH or beside nvcc."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    folders = [
        os.environ.get("PATH", ""),
        *(f"{home}/{name}" for home in homes if home for name in ("bin", "compute-sanitizer")),
    ]
    return shutil.which("compute-sanitizer", path=os.pathsep.join(folders))


def _sanitizer(options: Options, seconds: float) -> list[Command]:
    tests = [sys.executable, *_pytest(options, "gpu and sanitizer", "-x")]
    if options.dry_run:
        return [Command(tests, _dry_environment(options))]
    sanitizer = find_sanitizer()
    if sanitizer is None:
        raise Unavailable("compute-sanitizer was not found")
    # Without torch's cache every tensor is an allocation of its own, and a step beyond its end is seen. What torch
    # asks of the driver may fail as it pleases: the kernels' accesses are what is looked at.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    common = ["--error-exitcode", "86", "--print-limit", "20", "--target-processes", "application-only"]
    special = {"memcheck": ["--report-api-errors", "no"]}
    return [
        Command([sanitizer, "--tool", tool, *common, *special.get(tool, []), *tests], environment)
        for tool in SANITIZER_TOOLS
    ]


def _sanitizer_result(options: Options, output: str, code: int) -> str:
    if code and "Device not supported" in output:
        raise Unavailable("compute-sanitizer does not support this device or driver")
    return plain_result(options, output, code)


# ---------------------------------------------------------------------------------------------------
# Benchmarks


def _bench(options: Options, seconds: float, command: str, *more: str, **environment: str) -> list[Command]:
    size = ["--quick", "--device", "cpu"] if options.dry_run else ["--device", "cuda"]
    budget = f"{max(1.0, 0.9 * seconds - 10):.0f}"  # it stops between two measurements, not within one
    return [python("-m", "bench", command, *size, "--budget", budget, "--out", options.out, *more, **environment)]


def _ops(options: Options, seconds: float) -> list[Command]:
    record = options.out / "ops.json"
    if not options.resume:
        record.unlink(missing_ok=True)
    resume = ["--resume"] if record.exists() else []
    return _bench(options, seconds, "run", *resume, **_dry_environment(options))


def _model(options: Options, seconds: float) -> list[Command]:
    for record in options.out.glob("model-*.json"):
        record.unlink()
    return _bench(options, seconds, "model")


def _bench_result(pattern: str) -> Callable[[Options, str, int], str]:
    """Counts what the records of that name hold; a benchmark ends with 1 if ours is wrong, with 3 if time was over."""

    def result(options: Options, output: str, code: int) -> str:
        records = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(options.out.glob(pattern))]
        if code not in (0, 1, 3) or not records:
            raise Failed(last_line(output) or f"exit code {code}")
        results = [result for record in records for result in record["results"]]
        counts = ", ".join(f"{n} {status}" for status, n in Counter(r["status"] for r in results).most_common())
        if code == 1:
            ours = (r for r in results if r["peer"].startswith("quantlib") and r["status"] in ("wrong", "failed"))
            raise Failed(f"{counts}; {next((r['reason'] for r in ours), last_line(output))}")
        if code == 3 and not results:
            raise OutOfTime("nothing was measured")
        if code == 3:
            raise Partial(f"{counts}; not all was measured")
        return counts

    return result


def _model_result(options: Options, output: str, code: int) -> str:
    """Models are transformers', adapted by PEFT: without those there are none."""
    if code and (missing := re.search(r"No module named '(transformers|peft|accelerate)'", last_line(output))):
        raise Unavailable(f"{missing[1]} is not installed")
    return _bench_result("model-*.json")(options, output, code)


STAGES: tuple[Stage, ...] = (
    Stage("wheels", 0.12, _wheels, _wheels_result, lambda options: [options.site]),
    Stage("environment", 0.15, _environment, vital=True),
    Stage("build", 0.25, _build, _build_result, _built),
    Stage("diagnose", 0.15, _diagnose),
    Stage("tune", 0.5, _tune, _tune_result),
    Stage("tests", 0.35, _tests, _tests_result),
    Stage("ops", 0.35, _ops, _bench_result("ops.json")),
    Stage("sanitizer", 0.25, _sanitizer, _sanitizer_result),
    Stage("model", 1.0, _model, _model_result),
)
