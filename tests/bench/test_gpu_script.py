"""bench/gpu.sh: budget, report and exit code with stages of a few milliseconds; the stages; all of it as a dry run."""

import contextlib
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from bench import gpu, gpu_stages
from bench.cases import OPS
from bench.contest import MANY
from bench.gpu_stages import STAGES, Command, Failed, Options, OutOfTime, Partial, Stage, Unavailable

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "bench" / "gpu.sh"


def stage(name, code="print('done')", share=1.0, **options):
    """A stage that runs a line of Python."""
    return Stage(name, share, lambda *_: [Command([sys.executable, "-S", "-c", code])], **options)


def run(out, *stages, budget=60.0, more=()):
    """(exit code, entries by name) of a call with these stages."""
    code = gpu.main(["--out", str(out), "--budget", str(budget), *more], stages)
    return code, {entry["name"]: entry for entry in report(out)["stages"]}


def report(out):
    return json.loads((out / "report.json").read_text())


def statuses(entries):
    return {name: entry["status"] for name, entry in entries.items()}


def unavailable(options, seconds):
    raise Unavailable("no such tool")


def test_the_table_comes_last_and_the_report_says_the_same(tmp_path, capfd):
    code, entries = run(tmp_path, stage("first", "print('a'); print('42 tests')"), Stage("second", 0.5, unavailable))
    assert code == 0 and report(tmp_path)["ok"] is True
    assert statuses(entries) == {"first": "ok", "second": "unavailable"}
    lines = capfd.readouterr().out.strip().splitlines()
    assert lines[-3].split() == ["stage", "status", "seconds", "note"]
    assert lines[-2].startswith("first") and lines[-2].endswith("42 tests")
    assert lines[-1].split() == ["second", "unavailable", "0.0", "no", "such", "tool"]
    assert "42 tests" in (tmp_path / "gpu.log").read_text()


def test_a_failure_is_told_and_the_rest_still_runs(tmp_path):
    code, entries = run(tmp_path, stage("bad", "print('so it is'); raise SystemExit(3)"), stage("good"))
    assert code == 1 and report(tmp_path)["ok"] is False
    assert statuses(entries) == {"bad": "failed", "good": "ok"}
    assert entries["bad"]["note"] == "so it is" and "so it is" in entries["bad"]["output"]


def test_without_a_vital_stage_nothing_follows(tmp_path):
    code, entries = run(tmp_path, stage("base", "raise SystemExit(1)", vital=True), stage("next"))
    assert code == 1 and statuses(entries) == {"base": "failed", "next": "not run"}
    assert entries["next"]["note"] == "base: failed"


def test_a_stage_that_raises_is_a_failure_of_that_stage(tmp_path):
    def broken(options, output, code):
        raise KeyError("results")

    code, entries = run(tmp_path, stage("odd", result=broken), stage("next"))
    assert code == 1 and statuses(entries) == {"odd": "failed", "next": "ok"}
    assert "KeyError" in entries["odd"]["note"]


def test_a_stage_is_stopped_at_its_share_with_all_it_started(tmp_path):
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-S', '-c', {TOUCH.format(tmp_path / 'late')!r}])"
    code, entries = run(tmp_path, stage("long", child, share=0.05), stage("next"), budget=20)
    assert code == 1 and statuses(entries) == {"long": "out of time", "next": "ok"}
    time.sleep(1.2)
    assert not (tmp_path / "late").exists()


TOUCH = "import time; time.sleep(2); open({!r}, 'w')"


def test_a_budget_that_is_spent_fails_what_is_left(tmp_path):
    code, entries = run(tmp_path, stage("long", "import time; time.sleep(9)"), stage("next"), budget=gpu.RESERVE + 0.5)
    assert code == 1 and statuses(entries) == {"long": "out of time", "next": "out of time"}


def test_a_second_call_runs_only_what_is_not_finished(tmp_path):
    counter, flag = tmp_path / "count", tmp_path / "flag"
    count = stage("count", f"open({str(counter)!r}, 'a').write('x')")
    flaky = stage("flaky", f"import os, sys; sys.exit(not os.path.exists({str(flag)!r}))")
    assert run(tmp_path, count, flaky)[0] == 1
    flag.touch()
    code, entries = run(tmp_path, count, flaky)
    assert code == 0 and entries["count"]["kept"] and "kept" not in entries["flaky"]
    assert counter.read_text() == "x"
    assert run(tmp_path, count, flaky, more=["--fresh"])[0] == 0
    assert counter.read_text() == "xx"


def test_what_is_partial_is_well_and_continues(tmp_path):
    ends = iter([Partial("3 ok"), None])

    def result(options, output, code):
        if reason := next(ends):
            raise reason
        return "7 ok"

    code, entries = run(tmp_path, stage("measure", result=result))
    assert code == 0 and report(tmp_path)["ok"] is True
    assert (entries["measure"]["status"], entries["measure"]["note"]) == ("partial", "3 ok")
    code, entries = run(tmp_path, stage("measure", result=result))
    assert code == 0 and (entries["measure"]["status"], entries["measure"]["note"]) == ("ok", "7 ok")


def test_nothing_is_kept_when_sources_change_or_what_a_stage_left_is_gone(tmp_path, monkeypatch):
    left = tmp_path / "left"
    build = stage("build", f"open({str(left)!r}, 'w')", leaves=lambda options: [left])
    run(tmp_path, build)
    assert run(tmp_path, build)[1]["build"]["kept"]
    left.unlink()
    assert "kept" not in run(tmp_path, build)[1]["build"]
    monkeypatch.setattr(gpu, "SOURCES", ("bench",))
    assert "kept" not in run(tmp_path, build)[1]["build"]


def test_a_report_that_is_no_report_is_replaced(tmp_path):
    (tmp_path / "report.json").write_text('["half')
    assert run(tmp_path, stage("a"))[0] == 0


KILLABLE = """
import sys
from bench import gpu
from bench.gpu_stages import Command, Stage
sleep = lambda *_: [Command([sys.executable, "-S", "-c", "import time; print('begun', flush=True); time.sleep(60)"])]
sys.exit(gpu.main(["--out", sys.argv[1]], [Stage("long", 1.0, sleep), Stage("next", 1.0, sleep)]))
"""


@pytest.mark.parametrize("number, status", [(signal.SIGTERM, "killed"), (signal.SIGKILL, "running")])
def test_a_kill_leaves_a_report_that_can_be_read(tmp_path, number, status):
    command = [sys.executable, "-c", KILLABLE, str(tmp_path)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while process.stdout.readline() != "begun\n":
        pass
    process.send_signal(number)
    output = process.communicate(timeout=30)[0]
    entries = {entry["name"]: entry for entry in report(tmp_path)["stages"]}
    assert statuses(entries) == {"long": status, "next": "waiting"}
    assert process.returncode == (128 + number if number == signal.SIGTERM else -number)
    if number == signal.SIGTERM:
        assert output.strip().splitlines()[-1].split()[:2] == ["next", "waiting"]
    for _ in range(50):
        if left := _running(f"OUT={tmp_path}"):
            time.sleep(0.1)
    assert not left


def _running(variable):
    """Processes whose environment holds `variable`: what a stage started and nobody ended."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if variable.encode() in (folder / "environ").read_bytes().split(b"\0"):
                found.append(folder.name)
    return found


def test_a_log_has_an_end(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "LOG_LIMIT", 2000)
    code, _ = run(tmp_path, stage("loud", "for i in range(999): print('x' * 50)"))
    assert code == 0 and (tmp_path / "gpu.log").stat().st_size <= 2000


def test_where_it_writes(tmp_path, monkeypatch):
    monkeypatch.delenv("OUT", raising=False)
    monkeypatch.setattr(gpu, "smi", lambda field: "NVIDIA H200")
    assert gpu.parse([]).out == ROOT / "bench" / "results" / "nvidia-h200"
    assert gpu.parse(["--dry-run"]).out == ROOT / "build" / "gpu" / "dry-run"
    monkeypatch.setenv("OUT", str(tmp_path))
    assert gpu.parse([]).out == tmp_path
    assert gpu.parse(["--out", str(tmp_path / "other")]).out == tmp_path / "other"


@pytest.mark.parametrize("arguments, word", [(["--budget", "2"], "--budget"), (["--wheels", "/nowhere"], "--wheels")])
def test_a_bad_option_ends_with_one_line(arguments, word, capsys):
    with pytest.raises(SystemExit):
        gpu.parse(arguments)
    assert word in capsys.readouterr().err.splitlines()[-1]


# ---------------------------------------------------------------------------------------------------
# The stages themselves


@pytest.fixture
def options(tmp_path):
    return Options(out=tmp_path)


def named(name):
    return next(stage for stage in STAGES if stage.name == name)


def test_the_stages_begin_with_what_the_others_need():
    names = [stage.name for stage in STAGES]
    assert names[:3] == ["wheels", "environment", "build"] and len(set(names)) == len(names)
    assert [stage.name for stage in STAGES if stage.vital] == ["environment"]


def test_the_build_is_for_this_gpu(options, monkeypatch):
    monkeypatch.setattr(gpu_stages, "smi", lambda field: {"compute_cap": "9.0"}[field])
    (command,) = named("build").commands(options, 60)
    assert command.environment == {"QUANTLIB_CUDA": "1", "QUANTLIB_CUDA_ARCHS": "90"}
    monkeypatch.setattr(gpu_stages, "smi", lambda field: None)
    with pytest.raises(Failed, match="compute capability"):
        named("build").commands(options, 60)


def test_wheels_are_installed_without_network(options, tmp_path, monkeypatch):
    with pytest.raises(Unavailable):
        named("wheels").commands(options, 60)
    monkeypatch.setattr(gpu_stages, "WORK", tmp_path / "work")
    given = dataclasses.replace(options, wheels=tmp_path)
    with pytest.raises(Failed, match="no .whl"):
        named("wheels").commands(given, 60)
    (tmp_path / "peft-0.21.2-py3-none-any.whl").touch()
    (command,) = named("wheels").commands(given, 60)
    assert {"--no-index", "--no-deps", str(given.site)} <= set(command.arguments)
    assert named("wheels").result(given, "", 0) == "peft-0.21.2"
    assert gpu.environment(given)["PYTHONPATH"].split(os.pathsep)[0] == str(given.site)


def test_tuning_is_asked_for_and_what_it_finds_comes_back(options, tmp_path):
    with pytest.raises(Unavailable, match="--tune"):
        named("tune").commands(options, 60)
    asked = dataclasses.replace(options, tune=True, out=tmp_path / "out")
    asked.out.mkdir()
    (command,) = named("tune").commands(asked, 60)
    assert "quant_triton.tune" in command.arguments and str(gpu_stages.TUNED) in command.arguments
    (tmp_path / "nvidia-h200.json").write_text("{}")
    output = f"linear_4bit ...\n{tmp_path}/nvidia-h200.json\n"
    assert named("tune").result(asked, output, 0) == "nvidia-h200.json"
    assert (asked.out / "tuned-nvidia-h200.json").exists()
    with pytest.raises(OutOfTime):
        named("tune").result(asked, output, 3)
    with pytest.raises(Failed, match="no GPU"):
        named("tune").result(asked, "error: no GPU", 2)


def test_the_sanitizer_is_found_or_missed(options, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.setenv(variable, str(tmp_path / "none"))
    if not shutil.which("compute-sanitizer", path="/usr/local/cuda/bin:/usr/local/cuda/compute-sanitizer"):
        with pytest.raises(Unavailable, match="not found"):
            named("sanitizer").commands(options, 60)
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\n")
    tool.chmod(0o755)
    commands = named("sanitizer").commands(options, 60)
    assert [command.arguments[:3] for command in commands] == [
        [str(tool), "--tool", name] for name in ("memcheck", "racecheck", "synccheck")
    ]
    assert all("gpu and sanitizer" in command.arguments for command in commands)
    with pytest.raises(Unavailable, match="support"):
        named("sanitizer").result(options, "Error: Device not supported.\nmore", 1)


OURS_ALONE = {("quantlib", op) for op in MANY}  # Triton kernels under our own name
JUNIT = '<testsuites><testsuite tests="{}" failures="{}" errors="0" skipped="{}"/></testsuites>'


@pytest.mark.parametrize(
    "counts, code, note",
    [
        ((9, 0, 2), 0, None),
        ((9, 1, 2), 1, "6 passed, 1 failed"),
        ((9, 0, 9), 0, "0 passed"),
        ((9, 0, 2), 3, "7 passed"),
    ],
)
def test_tests_that_fail_or_all_skip_are_a_failure(options, counts, code, note):
    (options.out / "tests.xml").write_text(JUNIT.format(*counts))
    if note is None:
        assert named("tests").result(options, "", code) == "7 passed, 0 failed, 2 skipped"
    else:
        with pytest.raises(Failed, match=note):
            named("tests").result(options, "", code)


def test_a_test_run_that_leaves_nothing_is_a_failure(options):
    with pytest.raises(Failed, match="no result: Segmentation fault"):
        named("tests").result(options, "Segmentation fault\n", 139)


def test_what_the_benchmarks_say(options):
    results = [
        {"peer": "quantlib", "status": "ok", "reason": ""},
        {"peer": "bitsandbytes", "status": "wrong", "reason": "theirs"},
    ]
    result = named("ops").result
    with pytest.raises(Failed, match="ImportError"):
        result(options, "ImportError: torch", 1)
    (options.out / "ops.json").write_text(json.dumps({"results": results}))
    assert result(options, "", 0) == "1 ok, 1 wrong"
    with pytest.raises(Partial, match="1 ok, 1 wrong; not all was measured"):
        result(options, "", 3)
    (options.out / "ops.json").write_text(json.dumps({"results": []}))
    with pytest.raises(OutOfTime, match="nothing was measured"):
        result(options, "", 3)
    results[0] |= {"status": "wrong", "reason": "ours"}
    (options.out / "ops.json").write_text(json.dumps({"results": results}))
    with pytest.raises(Failed, match="ours"):
        result(options, "", 1)


def test_benchmarks_continue_a_record_of_the_same_sources_only(options):
    record = options.out / "ops.json"
    record.write_text("{}")
    again = dataclasses.replace(options, resume=True)
    assert "--resume" in named("ops").commands(again, 60)[0].arguments
    assert "--resume" not in named("ops").commands(options, 60)[0].arguments and not record.exists()


def test_a_dry_run_measures_the_triton_kernels_under_the_interpreter(options):
    assert named("ops").commands(options, 60)[0].environment == {}
    (command,) = named("ops").commands(dataclasses.replace(options, dry_run=True), 60)
    assert command.environment["TRITON_INTERPRET"] == "1" and "--quick" in command.arguments


def test_models_need_transformers_and_peft(options):
    result = named("model").result
    with pytest.raises(Unavailable, match="peft is not installed"):
        result(options, "Traceback ...\nModuleNotFoundError: No module named 'peft'\n", 1)
    with pytest.raises(Failed, match="No module named 'bench.no_such'"):
        result(options, "ModuleNotFoundError: No module named 'bench.no_such'\n", 1)


def test_measuring_needs_no_matplotlib():
    code = "import sys, bench.gpu, bench.run, bench.model; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_the_script_names_a_python_that_is_not_there():
    env = {**os.environ, "PYTHON": "no-such-python"}
    done = subprocess.run([str(SCRIPT)], env=env, capture_output=True, text=True)
    assert done.returncode == 2 and "no-such-python was not found" in done.stderr


@pytest.mark.skipif(not shutil.which("shellcheck"), reason="needs shellcheck")
@pytest.mark.parametrize("script", [SCRIPT, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_shellcheck(script):
    done = subprocess.run(["shellcheck", str(script)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def write_wheel(folder):
    """A wheel that installs one empty module."""
    folder.mkdir()
    info = "stand_in_for_a_peer-1.0.dist-info"
    files = {
        "stand_in_for_a_peer.py": "",
        f"{info}/METADATA": "Metadata-Version: 2.1\nName: stand-in-for-a-peer\nVersion: 1.0\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    with zipfile.ZipFile(folder / "stand_in_for_a_peer-1.0-py3-none-any.whl", "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))


@pytest.mark.slow
def test_a_dry_run_walks_every_stage(tmp_path_factory):
    tmp_path, wheels = tmp_path_factory.mktemp("out"), tmp_path_factory.mktemp("peers") / "wheels"
    write_wheel(wheels)
    command = [str(SCRIPT), "--dry-run", "--out", str(tmp_path), "--budget", "1800"]
    command += ["--tune", "--wheels", str(wheels)]
    done = subprocess.run(command, env={**os.environ, "PYTHON": sys.executable}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr
    found = {entry["name"]: entry["status"] for entry in report(tmp_path)["stages"]}
    assert list(found) == [stage.name for stage in STAGES] and set(found.values()) == {"ok"}
    files = sorted(path.name for path in tmp_path.iterdir())
    assert len(files) <= 8 and {"report.json", "gpu.log", "environment.json", "tests.xml", "ops.json"} <= set(files)
    assert all(set(name) <= set("abcdefghijklmnopqrstuvwxyz0123456789._-") for name in files)
    assert all(path.stat().st_size < 16 << 20 for path in tmp_path.iterdir())
    results = json.loads((tmp_path / "ops.json").read_text())["results"]
    interpreted = [e for e in results if e["peer"] == "quantlib, triton" or (e["peer"], e["op"]) in OURS_ALONE]
    assert {e["op"] for e in interpreted if e["status"] == "ok"} == set(OPS)
