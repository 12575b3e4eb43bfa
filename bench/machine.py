"""What was measured, and on what: names, clocks, versions, commit."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import quantlib

PACKAGES = (
    "qlora-kernels",
    "torch",
    "triton",
    "bitsandbytes",
    "torchao",
    "peft",
    "transformers",
    "liger-kernel",
    "unsloth",
    "numpy",
)
RESULTS = Path(__file__).parent / "results"
# The code that is measured; under `compare --base` it lies in another folder than these files.
SOURCE = Path(quantlib.__file__).resolve().parent.parent


def _output(*command: str, cwd: Path | None = None) -> str:
    """What a command prints, "" if it fails or does not exist."""
    try:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def version(package: str) -> str | None:
    """The installed version of a distribution, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def commit() -> dict:
    """Hash of the measured source and whether tracked files differ from it.

    BENCH_COMMIT stands in where the sources travel without their history; the hash is None where neither is there.
    """
    if "BENCH_COMMIT" in os.environ:
        return {"hash": os.environ["BENCH_COMMIT"], "dirty": False}
    found = _output("git", "rev-parse", "HEAD", cwd=SOURCE)
    code = ("quantlib", "lora_ops", "qlora", "kernels", "csrc", "setup.py")
    dirty = bool(_output("git", "status", "--porcelain", "--", *code, cwd=SOURCE))
    return {"hash": found or None, "dirty": dirty}


def _cpuinfo() -> dict[str, list[str]]:
    """Field -> values of all processors; {} on systems without /proc."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    fields: dict[str, list[str]] = {}
    for line in lines:
        name, colon, value = line.partition(":")
        if colon:
            fields.setdefault(name.strip(), []).append(value.strip())
    return fields


def last_level_cache() -> int:
    """Bytes of the CPU's largest cache as the system tells; 32 MiB where it does not."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KMG]?)", file.read_text().strip()).groups()
        sizes.append(int(number) << {"": 0, "K": 10, "M": 20, "G": 30}[unit])
    return max(sizes, default=32 << 20)


def cache_size(device: torch.device | str) -> int:
    """Bytes of the cache that a working set must exceed to come from memory: the CPU's last level, the GPU's L2."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    return last_level_cache()


def _cpu() -> dict:
    info = _cpuinfo()
    clocks = [float(mhz) for mhz in info.get("cpu MHz", [])]
    levels = quantlib.backends._C.cpu_isas() if quantlib.backends._C else []
    title = (info.get("model name") or [platform.processor() or platform.machine()])[0]
    # Virtual machines give every generation one title.
    numbers = [f"{field.removeprefix('cpu ')} {info[field][0]}" for field in ("cpu family", "model") if field in info]
    return {
        "name": " ".join([title, *numbers]),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": levels[0] if levels else "reference",
        "cache_bytes": last_level_cache(),
        "mhz": round(sum(clocks) / len(clocks)) if clocks else None,
        "load": round(os.getloadavg()[0], 2),
    }


_SMI = (
    "clocks.sm",
    "clocks.mem",
    "clocks.max.sm",
    "clocks.max.mem",
    "power.limit",
    "temperature.gpu",
    "driver_version",
)


def _gpu() -> dict | None:
    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    query = ("nvidia-smi", f"--query-gpu={','.join(_SMI)}", "--format=csv,noheader,nounits")
    uuid = getattr(properties, "uuid", None)
    line = _output(*query, *(["-i", f"GPU-{uuid}"] if uuid else [])).partition("\n")[0]
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "cache_bytes": properties.L2_cache_size,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
        **dict(zip(_SMI, (value.strip() for value in line.split(",")), strict=False)),
    }


def slug(name: str) -> str:
    """Name of the results folder: lower case letters, digits and hyphens."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def name() -> str:
    """The GPU, or the CPU with its number of cores where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    cpu = _cpu()
    return f"{cpu['name']}, {cpu['cores']} cores"


def describe() -> dict:
    """Everything about the machine and the software that a number depends on, for a record."""
    return {
        "name": name(),
        "commit": commit(),
        "cpu": _cpu(),
        "gpu": _gpu(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "backend": os.environ.get("QUANTLIB_BACKEND", "auto"),
        "versions": {package: found for package in PACKAGES if (found := version(package))},
    }


def results_dir(out: Path | None = None) -> Path:
    """Where this machine's records go: `out`, or bench/results/<machine>."""
    return Path(out) if out else RESULTS / slug(name())
