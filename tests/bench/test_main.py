"""The command line."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import __main__ as command


def test_help_names_every_command(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    assert all(name in text for name in command.COMMANDS)


@pytest.mark.parametrize("name", ["run", "report", "compare", "limits"])
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as end:
        command.main([name, "--help"])
    assert end.value.code == 0
    assert f"python -m bench {name}" in capsys.readouterr().out


def test_unknown_command(capsys):
    with pytest.raises(SystemExit) as end:
        command.main(["walk"])
    assert end.value.code == 2
    assert "invalid choice: 'walk'" in capsys.readouterr().err


def test_limits(capsys):
    assert command.main(["limits", "--quick", "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["read"] > 0
    assert command.main(["limits", "--quick", "--device", "cpu"]) == 0
    assert "GB/s" in capsys.readouterr().out


def test_suites_under_pytest_benchmark(tmp_path):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "pytest", "bench", "-q", "-p", "no:cacheprovider", "-k", "quantize_int8 or int4"]
    done = subprocess.run(
        [*command, "--bench-device", "cpu", f"--benchmark-json={tmp_path / 'out.json'}"],
        cwd=root,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout
    found = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert {b["extra_info"]["peer"] for b in found} >= {"quantlib", "torch, uniform int4"}
    assert all(b["extra_info"]["GB/s"] > 0 and b["extra_info"]["median"] > 0 for b in found)
