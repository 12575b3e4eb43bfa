"""What a GPU run ran on: `python -m bench.gpu_environment FILE`, the first stage of bench/gpu.sh.

Writes `bench.machine.describe()`, the compiler's version, what nvidia-smi prints and what is missing to FILE, and exits
with 1 if the machine cannot run the rest.
"""

from __future__ import annotations

import argparse
import importlib.util
import subprocess
import sys
from pathlib import Path

import torch

from bench import machine
from bench.gpu_stages import find_sanitizer
from qlora.files import write_json


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.SubprocessError) as error:
        return f"{command[0]}: {error}"
    return (done.stdout + done.stderr).strip()


def problems() -> list[str]:
    """What is missing for a GPU run, a sentence each."""
    found = []
    if not torch.cuda.is_available():
        built = f"built for CUDA {torch.version.cuda}" if torch.version.cuda else "built without CUDA"
        found.append(f"torch {torch.__version__}, {built}, finds no CUDA device")
    if importlib.util.find_spec("triton") is None:
        found.append("Triton is not installed")
    return found


def main(arguments: list[str] | None = None) -> int:
    """Writes the file, prints a line per fact and a summary last; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu_environment", description=__doc__.splitlines()[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--dry-run", action="store_true", help="a machine without a GPU is no failure")
    options = parser.parse_args(arguments)

    description = machine.describe()
    tools = {
        "nvidia-smi": _output("nvidia-smi"),
        "nvcc": _output("nvcc", "--version"),
        "compute-sanitizer": find_sanitizer(),
    }
    missing = problems()
    write_json(options.file, {"machine": description, "tools": tools, "problems": missing})
    for name, text in tools.items():
        print(f"{name}: {text}")
    for package, version in description["versions"].items():
        print(f"{package} {version}")
    print(f"{description['name']}, torch {torch.__version__}" if options.dry_run or not missing else "; ".join(missing))
    return int(bool(missing) and not options.dry_run)


if __name__ == "__main__":
    sys.exit(main())
