"""The sdist and the wheel, built from a copy of the sources and used away from the repository."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ["csrc", "kernels", "lora_ops", "qlora", "quantlib", "LICENSE", "MANIFEST.in", "pyproject.toml", "setup.py"]
PACKAGES = ["lora_ops", "qlora", "quant_triton", "quantlib"]

pytestmark = pytest.mark.slow


def run(*command: str, cwd: Path, **environment: str) -> str:
    env = {**os.environ, **environment}
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=env)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def dist(tmp_path_factory) -> Path:
    """A folder with an sdist, and the wheel built from it."""
    source = tmp_path_factory.mktemp("source")
    built = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for name in [*SOURCES, *(path.name for path in ROOT.glob("*.md"))]:
        path = ROOT / name
        if path.is_dir():
            shutil.copytree(path, source / name, ignore=built)
        else:
            shutil.copy(path, source)
    tuned = source / "kernels" / "quant_triton" / "tuned"
    tuned.mkdir(exist_ok=True)
    (tuned / "some-gpu.json").write_text('{"ops": {}}')
    out = source / "dist"
    run(sys.executable, "-m", "build", "--no-isolation", "-o", str(out), ".", cwd=source, QUANTLIB_CUDA="0")
    return out


@pytest.fixture(scope="module")
def wheel(dist) -> Path:
    (path,) = dist.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """The wheel, installed into a folder of its own."""
    target = tmp_path_factory.mktemp("installed")
    run(sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target), str(wheel), cwd=target)
    return target


def test_the_wheel_serves_every_python(wheel):
    name, _version, python, abi, _platform = wheel.stem.split("-")
    assert (name, python, abi) == ("qlora_kernels", "cp310", "abi3")


def test_the_wheel_holds_our_packages_and_no_other(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    top = {name.split("/")[0] for name in names if ".dist-info/" not in name}
    assert sorted(top) == PACKAGES, "a top-level `kernels` would overwrite Hugging Face's package of that name"
    assert {"quantlib/_C.abi3.so", "quant_triton/tuned/some-gpu.json"} <= set(names)
    for folder in (ROOT, ROOT / "kernels"):
        modules = {p.relative_to(folder).as_posix() for name in PACKAGES for p in folder.glob(f"{name}/**/*.py")}
        assert modules - set(names) == set()


def test_the_sdist_holds_the_native_sources(dist):
    (path,) = dist.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.split("/", 1)[-1] for name in archive.getnames()}
    native = {p.relative_to(ROOT).as_posix() for p in (ROOT / "csrc").rglob("*") if p.is_file()}
    assert native - names == set()
    assert {"setup.py", "pyproject.toml", "LICENSE"} <= names


def test_the_installed_wheel_works_away_from_the_repository(installed, tmp_path):
    code = """
import torch, quantlib, quantlib._C, lora_ops, qlora, quant_triton
q = quantlib.quantize_4bit(torch.randn(64, 64))
print(quantlib.linear_4bit(torch.randn(3, 64), q).shape)
for module in (quantlib, quantlib._C, lora_ops, qlora, quant_triton):
    print(module.__file__)
"""
    lines = run(sys.executable, "-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert lines[0] == "torch.Size([3, 64])"
    assert all(Path(line).is_relative_to(installed) for line in lines[1:])


@pytest.mark.skipif(not shutil.which("nm"), reason="needs nm, of binutils, to read the library's symbols")
def test_the_extension_uses_nothing_of_torch_but_its_stable_interface(installed):
    library = installed / "quantlib" / "_C.abi3.so"
    symbols = {
        line.split()[-1] for line in run("nm", "-D", "--undefined-only", str(library), cwd=installed).splitlines()
    }
    torch_symbols = {s for s in symbols if any(word in s for word in ("torch", "c10", "aten"))}
    assert torch_symbols, "it registers ops, so it must call torch"
    unstable = {s for s in torch_symbols if not s.startswith(("aoti_torch_", "torch_"))}
    assert not unstable
