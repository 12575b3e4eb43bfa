"""The workflow files and the container file: they parse, and call commands that exist."""

import importlib.util
import os
import re
import shlex
from pathlib import Path

import pytest

from bench import gpu

yaml = pytest.importorskip("yaml", reason="PyYAML comes with transformers, of the extra `train`")

ROOT = Path(__file__).resolve().parents[2]
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def load(path):
    return yaml.safe_load(path.read_text())


def steps(path):
    return [step for job in load(path)["jobs"].values() for step in job["steps"]]


def check_command(line):
    """Asserts that a command is a make target, a module or a script of this repository that can be run."""
    words = shlex.split(line)
    while words and re.fullmatch(r"\w+=.*", words[0]):
        words.pop(0)
    if words[0] == "make":
        assert set(words[1:]) <= TARGETS, line
    elif words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]), line
    else:
        script = ROOT / words[0]
        assert script.is_file() and os.access(script, os.X_OK), line
    if words[0] == "bench/gpu.sh":
        check_options(gpu_options(words[1:]))


def gpu_options(words):
    return [word for word in words if word.startswith("--")]


def check_options(names):
    source = Path(gpu.__file__).read_text()
    assert not [name for name in names if f'"{name}"' not in source]


def test_there_are_workflows_for_both():
    assert [path.name for path in WORKFLOWS] == ["cpu.yml", "gpu.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_is_complete(path):
    workflow = load(path)
    triggers = workflow[True]  # YAML 1.1 reads the key `on` so
    assert "push" in triggers and workflow["permissions"] == {"contents": "read"}
    for job in workflow["jobs"].values():
        assert job["runs-on"] and job["steps"]
        assert job["steps"][0]["uses"].startswith("actions/checkout@")
        assert all(("run" in step) != ("uses" in step) for step in job["steps"])
        assert set([job["needs"]] if "needs" in job else []) <= set(workflow["jobs"])


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_calls_commands_that_exist(path):
    commands = [line for step in steps(path) if "run" in step for line in step["run"].strip().splitlines()]
    assert commands
    for command in commands:
        check_command(command)


def test_the_cpu_workflow_runs_what_ci_runs():
    assert [step["run"] for step in steps(WORKFLOWS[0]) if "run" in step] == [".ci/run"]


def test_the_gpu_workflow_uploads_its_report_whatever_happens():
    job = load(WORKFLOWS[1])["jobs"]["gpu"]
    assert "self-hosted" in job["runs-on"]
    (run,) = (step["run"] for step in job["steps"] if "run" in step)
    upload = job["steps"][-1]
    assert upload["uses"].startswith("actions/upload-artifact@") and upload["if"] == "always()"
    assert f"--out {upload['with']['path']}" in run


def test_the_container_calls_commands_that_exist():
    lines = (ROOT / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
    shown = [re.sub(r"^#\s+docker run( --?[\w-]+( \S+)??)*? qlora-kernels ", "", line) for line in lines]
    for line in shown:
        if line.startswith(("make ", "bench/")):
            check_command(line)
        elif line.startswith("RUN make "):
            check_command(line.removeprefix("RUN "))
        elif line.startswith("COPY ") and not line.startswith("COPY . "):
            assert all((ROOT / name).exists() for name in line.split()[1:-1])
    assert {"make test", "bench/gpu.sh"} <= set(shown)
    assert any(line.startswith("FROM nvidia/cuda:13.") and "devel" in line for line in lines)
    assert lines.index("ENV PATH=/qlora-kernels/.venv/bin:$PATH") < lines.index("RUN make .venv/built")  # for ninja


def test_what_git_ignores_is_not_copied_into_the_container():
    """Build outputs of this machine would be taken for those of the container."""
    ignored = {line.strip("/") for line in (ROOT / ".gitignore").read_text().split()}
    left_out = {line.removeprefix("**/") for line in (ROOT / ".dockerignore").read_text().split()}
    assert ignored - left_out <= {"*.py[cod]"}  # in __pycache__
