"""What is said about the machine."""

import json
from pathlib import Path

import pytest
import torch

from bench import machine


def test_description_is_complete_and_json():
    found = json.loads(json.dumps(machine.describe()))
    # A distribution's version may lack the local part, "+cpu" or "+cu132".
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["cpu"]["threads"] == torch.get_num_threads()
    assert found["cpu"]["cache_bytes"] >= 1 << 18
    assert (found["gpu"] is None) == (not torch.cuda.is_available())
    assert set(found["commit"]) == {"hash", "dirty"}


@pytest.mark.parametrize(
    ("name", "folder"),
    [("NVIDIA H200", "nvidia-h200"), ("AMD EPYC, 2 cores", "amd-epyc-2-cores"), ("Intel(R) X/9 @ 3", "intel-r-x-9-3")],
)
def test_slug(name, folder):
    assert machine.slug(name) == folder


def test_results_folder(tmp_path):
    assert machine.results_dir(tmp_path) == tmp_path
    assert machine.results_dir().parent.parts[-2:] == ("bench", "results")


def test_commit_where_the_history_is_missing(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "SOURCE", tmp_path)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    monkeypatch.delenv("BENCH_COMMIT", raising=False)
    assert machine.commit() == {"hash": None, "dirty": False}
    monkeypatch.setenv("BENCH_COMMIT", "abc")
    assert machine.commit() == {"hash": "abc", "dirty": False}


def test_a_command_that_fails_or_is_missing_prints_nothing():
    assert machine._output("false") == ""
    assert machine._output("no such command") == ""
    assert machine._output("echo", "x", cwd=Path("/")) == "x"


def test_gpu_from_what_nvidia_smi_prints(monkeypatch):
    properties = type(
        "P",
        (),
        {
            "name": "NVIDIA H200",
            "total_memory": 1,
            "L2_cache_size": 50 << 20,
            "multi_processor_count": 132,
            "major": 9,
            "minor": 0,
            "uuid": "u-1",
        },
    )
    commands = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(
        machine, "_output", lambda *c, cwd=None: commands.append(c) or "1980, 3201, 1980, 3201, 700.00, 41, 580.1"
    )
    found = machine._gpu()
    assert found["clocks.sm"] == "1980" and found["driver_version"] == "580.1" and found["capability"] == "9.0"
    assert commands[0][-2:] == ("-i", "GPU-u-1")
    assert machine.cache_size("cuda") == 50 << 20
