"""The tuner, with times that are made up."""

import json

import pytest
import torch

import quant_triton  # noqa: F401 - registers what can be tuned
from quant_triton import launch, tune
from quant_triton.launch import TUNABLES, candidates, config, default_config, forced, problem

CPU = torch.device("cpu")


@pytest.fixture
def op(monkeypatch):
    """An op whose result tells its configuration; "time" says how long it takes, "error" how wrong it is."""
    name = "made up"

    @default_config(name)
    def _(arch, *, m, n):
        return {"time": 10.0}

    @candidates(name)
    def _(arch, *, m, n):
        yield {"time": 30.0}
        yield {"time": 4.0, "error": 0.1}
        yield {"time": 5.0 + m}
        yield {"time": 1.0, "fails": True}

    @problem(name)
    def _(device, m, n):
        def run():
            chosen = config(name, device, m=m, n=n)
            if "fails" in chosen:
                raise tune.TritonError("out of resources")
            run.time = chosen["time"]
            return torch.ones(3) + chosen.get("error", 0.0)

        return run

    def microseconds(run):
        run()
        return run.time

    monkeypatch.setattr(tune, "microseconds", microseconds)
    launch._config.cache_clear()
    yield name
    del TUNABLES[name]
    launch._config.cache_clear()


def test_the_fastest_that_is_right_is_kept_with_its_time(op, tmp_path, capsys):
    path, _ = tune.tune([op], CPU, tmp_path, shapes=[(64, 32), (64, 96)], rows=[1, 8])
    content = json.loads(path.read_text())
    assert content["ops"] == {
        op: {
            "m=1,n=64": {"config": {"time": 6.0}, "us": 6.0, "default_us": 10.0},
            "m=8,n=64": {"config": {"time": 10.0}, "us": 10.0, "default_us": 10.0},
        }
    }
    assert {"gpu", "triton", "torch"} <= set(content)
    printed = capsys.readouterr()
    assert printed.out.count(op) == 2 and "another result" in printed.err
    assert [file.name for file in tmp_path.iterdir()] == ["interpreter.json"]


def test_a_second_run_adds_to_the_file(op, tmp_path):
    path, _ = tune.tune([op], CPU, tmp_path, shapes=[(64, 32)], rows=[1])
    tune.write(path, {"another": {"k=1": {"config": {}}}}, "interpreter")
    tune.tune([op], CPU, tmp_path, shapes=[(128, 32)], rows=[1])
    content = json.loads(path.read_text())["ops"]
    assert set(content) == {op, "another"} and set(content[op]) == {"m=1,n=64", "m=1,n=128"}


def test_what_was_written_is_what_is_launched(op, tmp_path, monkeypatch):
    tune.tune([op], CPU, tmp_path, shapes=[(64, 32)], rows=[1])
    monkeypatch.setattr(launch, "TUNED", tmp_path)
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Interpreter")
    monkeypatch.setattr(launch, "architecture", lambda device: launch.ARCHITECTURES["sm_90"])
    for cached in (launch._tuned, launch._config):
        cached.cache_clear()
    assert config(op, CPU, m=1, n=64) == {"time": 6.0}
    assert config(op, CPU, m=2, n=64) == {"time": 10.0}, "nobody tuned it"
    launch._tuned.cache_clear()


def test_it_stops_when_its_time_is_over(op, tmp_path):
    path, complete = tune.tune([op], CPU, tmp_path, shapes=[(64, 32)], rows=[1], budget=-1.0)
    assert not complete and json.loads(path.read_text())["ops"] == {op: {}}


def test_the_command_names_what_it_cannot_tune(op, capsys):
    with pytest.raises(SystemExit):
        tune.main(["none such"])
    assert "cannot be tuned: none such; allowed:" in capsys.readouterr().err


def test_the_command_tunes(op, tmp_path, capsys):
    assert tune.main([op, "--shapes", "64x32", "--rows", "1", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(tmp_path / "interpreter.json")


@pytest.mark.parametrize("name", sorted(name for name, op in TUNABLES.items() if op.problem))
def test_the_tuner_can_time_every_op(name):
    """Its problem runs it, with a key that its default and its candidates understand."""
    keys = []
    for run in tune.problems(name, CPU, [(64, 128)], [1, 32], torch.float16):
        with forced(name) as seen:
            run()
        keys += seen.keys
    assert keys
    for key in keys:
        for arch in launch.ARCHITECTURES.values():
            assert isinstance(launch.default(name, arch, **key), dict)
            assert all(isinstance(tile, dict) for tile in TUNABLES[name].candidates(arch, **key))


def test_tuned_files_are_complete():
    """Every committed entry belongs to an op that is there, and says what it gained."""
    for path in launch.TUNED.glob("*.json"):
        for op, entries in json.loads(path.read_text())["ops"].items():
            assert op in TUNABLES, path
            assert all({"config", "us", "default_us"} <= set(entry) for entry in entries.values())
