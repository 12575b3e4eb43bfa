"""The CPU kernels compile for 64-bit Arm, by the cross-compiler that the package ziglang brings."""

import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("ziglang", reason="needs the package ziglang")

ROOT = Path(__file__).resolve().parents[2]
EM_AARCH64 = 183  # e_machine in an ELF header


@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.name)
def test_compiles_for_arm_without_a_warning(source, tmp_path):
    target = tmp_path / "kernel.o"
    compiler = [sys.executable, "-m", "ziglang", "c++", "-target", "aarch64-linux-gnu"]
    flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Werror"]
    done = subprocess.run([*compiler, *flags, "-c", source, "-o", target], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int.from_bytes(target.read_bytes()[18:20], "little") == EM_AARCH64
