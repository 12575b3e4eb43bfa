"""Collects the peers' wheels for a GPU machine without network: `python -m bench.peer_wheels DIR [PACKAGE ...]`.

`bench/gpu.sh --wheels DIR` installs them there, without their dependencies: name those that the machine lacks too.
bitsandbytes is cut down to its libraries for CPUs and for one version of CUDA, from 43 to 4 MB.
"""

from __future__ import annotations

import argparse
import base64
import csv
import hashlib
import io
import re
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

# What the benchmarks compare with and PyTorch's own images lack; these wheels serve every version of Python.
PEERS = ("bitsandbytes", "peft", "accelerate", "liger-kernel", "torchao")
CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
LIMIT = 60 * 10**6  # bytes, of all wheels together
MANYLINUX = [f"manylinux_2_{minor}_x86_64" for minor in range(5, 40)] + ["manylinux2014_x86_64", "manylinux1_x86_64"]
LIBRARY = re.compile(r"bitsandbytes/libbitsandbytes_(\w+)\.so")


def download_command(folder: Path, packages: Sequence[str], python: str) -> list[str]:
    """pip's command for wheels for Linux on x86-64, whatever runs here; pip matches platforms by their exact names."""
    target = ["--only-binary=:all:", "--implementation", "cp", "--python-version", python]
    target += [argument for platform in MANYLINUX for argument in ("--platform", platform)]
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--no-deps"]
    return [*pip, *target, "-c", str(CONSTRAINTS), "-d", str(folder), *packages]


def _record(files: dict[str, bytes], name: str) -> bytes:
    """RECORD, as the wheel format defines it: each file's sha256 in unpadded base64, and its size."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    for path, content in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
        writer.writerow((path, f"sha256={digest}", len(content)))
    writer.writerow((name, "", ""))
    return text.getvalue().encode()


def cut(wheel: Path, keep: Sequence[str]) -> Path:
    """Replaces a wheel of bitsandbytes by one with the libraries `keep` only, such as ("cpu", "cuda130").

    The new one is marked by the build tag 0cut. Returns its path. Raises ValueError if a library to keep is not there.
    """
    with zipfile.ZipFile(wheel) as archive:
        infos = [info for info in archive.infolist() if not info.is_dir()]
        found = {match[1] for info in infos if (match := LIBRARY.fullmatch(info.filename))}
        if missing := sorted(set(keep) - found):
            raise ValueError(f"{wheel.name} has no library for {', '.join(missing)}; it has {', '.join(sorted(found))}")
        dropped = {f"bitsandbytes/libbitsandbytes_{name}.so" for name in found - set(keep)}
        files = {info.filename: archive.read(info) for info in infos if info.filename not in dropped}
    (record,) = (name for name in files if name.endswith(".dist-info/RECORD"))
    (metadata,) = (name for name in files if name.endswith(".dist-info/WHEEL"))
    del files[record]
    files[metadata] = files[metadata].rstrip() + b"\nBuild: 0cut\n"
    name, version, *tags = wheel.stem.split("-")
    target = wheel.with_name("-".join((name, version, "0cut", *tags[-3:])) + ".whl")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for path, content in files.items():
            archive.writestr(path, content)
        archive.writestr(record, _record(files, record))
    wheel.unlink()
    return target


def listing(folder: Path, limit: int = LIMIT) -> tuple[str, bool]:
    """A line per wheel and the sum in MB, and whether it is within the limit."""
    sizes = {path.name: path.stat().st_size for path in sorted(folder.glob("*.whl"))}
    total = sum(sizes.values())
    lines = [f"{size / 1e6:6.1f} MB  {name}" for name, size in sizes.items()]
    fits = total <= limit
    verdict = "" if fits else f", more than the {limit / 1e6:.0f} MB allowed"
    return "\n".join([*lines, f"{total / 1e6:6.1f} MB  in all{verdict}"]), fits


def main(arguments: Sequence[str] | None = None) -> int:
    """Fills the folder and lists it; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m bench.peer_wheels", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="where the wheels go")
    parser.add_argument("packages", nargs="*", default=PEERS, help=f"default: {' '.join(PEERS)}")
    parser.add_argument("--python", default="3.12", help="version of Python there (default 3.12)")
    parser.add_argument("--cuda", default="130", help="CUDA of the PyTorch there, without the dot (default 130)")
    parser.add_argument("--limit", type=float, default=LIMIT / 1e6, help="MB of all together (default 60)")
    args = parser.parse_args(arguments)
    args.folder.mkdir(parents=True, exist_ok=True)
    if old := sorted(args.folder.glob("*.whl")):
        print(f"{args.folder} already holds {old[0].name}: two versions of a package do not install", file=sys.stderr)
        return 2
    done = subprocess.run(download_command(args.folder, args.packages, args.python))
    if done.returncode:
        return done.returncode
    for wheel in args.folder.glob("bitsandbytes-*.whl"):
        cut(wheel, ("cpu", f"cuda{args.cuda}"))
    text, fits = listing(args.folder, int(args.limit * 1e6))
    print(text)
    return int(not fits)


if __name__ == "__main__":
    sys.exit(main())
