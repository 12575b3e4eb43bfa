"""The peers' wheels: what pip is asked for, and that a wheel which was cut down still installs."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from bench import peer_wheels

METADATA = "Metadata-Version: 2.1\nName: bitsandbytes\nVersion: 0.50.2\n"
WHEEL = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: false\nTag: py3-none-any\n"


@pytest.fixture
def wheel(tmp_path):
    """A wheel with the layout of bitsandbytes'."""
    path = tmp_path / "bitsandbytes-0.50.2-py3-none-any.whl"
    info = "bitsandbytes-0.50.2.dist-info"
    files = {"bitsandbytes/__init__.py": "", f"{info}/METADATA": METADATA, f"{info}/WHEEL": WHEEL}
    files |= {f"bitsandbytes/libbitsandbytes_{name}.so": name * 9 for name in ("cpu", "cuda130", "cuda132", "rocm70")}
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))
    return path


def test_a_cut_wheel_installs_and_pip_finds_all_its_files(wheel, tmp_path):
    cut = peer_wheels.cut(wheel, ("cpu", "cuda130"))
    assert cut.name == "bitsandbytes-0.50.2-0cut-py3-none-any.whl" and not wheel.exists()
    target = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--target", str(target), str(cut)]
    done = subprocess.run(pip, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    libraries = sorted(path.name for path in (target / "bitsandbytes").glob("*.so"))
    assert libraries == ["libbitsandbytes_cpu.so", "libbitsandbytes_cuda130.so"]


def test_its_record_is_right(wheel):
    with zipfile.ZipFile(peer_wheels.cut(wheel, ("cpu",))) as archive:
        names = archive.namelist()
        record = archive.read("bitsandbytes-0.50.2.dist-info/RECORD").decode()
        lines = [line.rsplit(",", 2) for line in record.splitlines()]
        assert [name for name, *_ in lines] == names and lines[-1][1:] == ["", ""]
        assert all(int(size) == archive.getinfo(name).file_size for name, _, size in lines[:-1])
        empty = {name: digest for name, digest, _ in lines}["bitsandbytes/__init__.py"]
        assert empty == "sha256=47DEQpj8HBSa-_TImW-5JCeuQeRkm5NMpJWZG3hSuFU"


def test_a_library_that_is_not_there_is_named(wheel):
    with pytest.raises(ValueError, match="no library for cuda999; it has cpu, cuda130"):
        peer_wheels.cut(wheel, ("cpu", "cuda999"))
    assert wheel.exists()


def test_what_pip_is_asked_for(tmp_path):
    command = peer_wheels.download_command(tmp_path, ["peft", "torchao==0.18.0"], "3.12")
    assert command[-2:] == ["peft", "torchao==0.18.0"] and "--no-deps" in command
    assert command[command.index("--python-version") + 1] == "3.12" and "manylinux_2_28_x86_64" in command
    assert Path(command[command.index("-c") + 1]).is_file()


def test_the_listing_says_when_it_is_too_much(wheel, tmp_path):
    size = wheel.stat().st_size
    text, fits = peer_wheels.listing(tmp_path, size)
    assert fits and wheel.name in text and "in all" in text.splitlines()[-1]
    text, fits = peer_wheels.listing(tmp_path, size - 1)
    assert not fits and "more than" in text


def test_a_folder_with_wheels_is_left_alone(wheel, tmp_path, capsys):
    assert peer_wheels.main([str(tmp_path)]) == 2
    assert wheel.name in capsys.readouterr().err and wheel.exists()
