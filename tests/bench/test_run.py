"""The run itself: small, but whole."""

import importlib.util
from types import SimpleNamespace

import pytest
import torch

from bench import __main__ as command
from bench import cases, contest, peers, records, run
from bench.contest import one
from bench.inputs import Case


def bench(*arguments):
    return command.main(["run", "--quick", "--device", "cpu", *map(str, arguments)])


@pytest.fixture
def contestants(monkeypatch):
    """The registry's list of one op, to change."""
    changed = {op: list(found) for op, found in peers.CONTESTANTS.items()}
    monkeypatch.setattr(peers, "CONTESTANTS", changed)
    return changed


def test_everything_of_ours_is_right(tmp_path, capsys):
    assert bench("--out", tmp_path) == 0
    record = records.read(tmp_path / "ops.json")
    assert {entry["op"] for entry in record["results"]} == set(cases.OPS)
    ours = [e for e in record["results"] if e["peer"] == peers.OURS]
    assert all(e["status"] == "ok" and e["ratio"] == 1 for e in ours if e["op"] not in contest.MANY)
    assert {e["reason"] for e in ours if e["op"] in contest.MANY} == {
        "Triton kernels only: the backend serves cuda tensors, not cpu"
    }
    for entry in record["results"]:
        assert entry["status"] in ("ok", "unavailable"), (entry["op"], entry["peer"], entry["reason"])
        assert (entry["status"] == "ok") == (not entry["reason"]) == ("median" in entry)
    timed = [e for e in record["results"] if e["status"] == "ok"]
    assert all(0 < e["p20"] <= e["median"] <= e["p80"] and e["limit"] > 0 and e["error"] <= 2 for e in timed)
    present = ("torch", "PEFT, quantlib")
    if importlib.util.find_spec("bitsandbytes"):
        present += ("bitsandbytes", "PEFT, bitsandbytes")
    for peer in present:
        assert any(e["peer"] == peer for e in timed)
    assert "linear_4bit forward + backward 128x256 M=5" in capsys.readouterr().out


def test_resuming_measures_what_is_missing(tmp_path, monkeypatch, capsys):
    assert bench("--ops", "quantize_int8,linear_int8", "--budget", "0.001", "--out", tmp_path / "r.json") == 3
    assert "after 1 of 5 cases; --resume continues" in capsys.readouterr().out
    first = records.read(tmp_path / "r.json")["results"]
    assert bench("--ops", "quantize_int8,linear_int8", "--resume", "--out", tmp_path / "r.json") == 0
    results = records.read(tmp_path / "r.json")["results"]
    assert results[: len(first)] == first
    assert len({records.case_key(entry) for entry in results}) == 5
    monkeypatch.setenv("BENCH_COMMIT", "another")
    assert bench("--resume", "--out", tmp_path / "r.json") == 2
    assert "of another commit or machine" in capsys.readouterr().err


def test_a_case_that_ended_the_process_is_left_out_the_next_time(tmp_path, contestants, capsys):
    def ends(case, w):
        raise KeyboardInterrupt

    contestants["quantize_int8"].append(peers.Contestant("ends", None, ends))
    with pytest.raises(KeyboardInterrupt):
        bench("--ops", "quantize_int8,dequantize_int8", "--out", tmp_path)
    assert records.read(tmp_path / "ops.json")["running"] == "quantize_int8 128x256 bfloat16 cold"
    assert bench("--ops", "quantize_int8,dequantize_int8", "--out", tmp_path, "--resume") == 1
    assert "quantize_int8 128x256 bfloat16 cold: the process ended" in capsys.readouterr().err
    record = records.read(tmp_path / "ops.json")
    assert "running" not in record and {e["op"] for e in record["results"]} == {"dequantize_int8"}


@pytest.mark.parametrize("what", ["prepare", "measure"])
def test_what_does_not_fit_into_memory_is_left_out(tmp_path, monkeypatch, what):
    function = getattr(run, what)

    def tight(case, *rest):
        if case.op == "linear_int8":
            raise torch.OutOfMemoryError("CUDA out of memory")
        return function(case, *rest)

    monkeypatch.setattr(run, what, tight)
    assert bench("--ops", "quantize_int8,linear_int8", "--out", tmp_path) == 0
    results = records.read(tmp_path / "ops.json")["results"]
    large = [e for e in results if e["op"] == "linear_int8"]
    assert {e["reason"] for e in large} == {"the case does not fit into the GPU's memory"}
    assert len({records.case_key(e) for e in large}) == 4 and {e["peer"] for e in large} >= {"quantlib", "torch"}
    assert any(e["status"] == "ok" for e in results if e["op"] == "quantize_int8")


def test_only_some_rows_and_peers(tmp_path):
    assert bench("--ops", "linear_4bit", "--rows", "5", "--peers", "int4", "--out", tmp_path) == 0
    results = records.read(tmp_path / "ops.json")["results"]
    assert {entry["m"] for entry in results} == {5}
    assert {entry["peer"] for entry in results} == {"quantlib", "torch, uniform int4"}


def test_unknown_op(tmp_path, capsys):
    assert bench("--ops", "linear_3bit", "--out", tmp_path) == 2
    assert "unknown op 'linear_3bit'; allowed: quantize_4bit" in capsys.readouterr().err


def test_wrong_and_broken_contestants_have_no_times(tmp_path, contestants):
    def broken(case, w):
        raise AttributeError("has moved\nelsewhere")

    def fails(rows):
        raise NotImplementedError("not this shape")

    contestants["dequantize_4bit"] += [
        peers.Contestant("wrong", None, lambda case, w: peers.Entry(lambda rows: w.w * 1.5, one("w"))),
        peers.Contestant("broken", None, broken),
        peers.Contestant("fails", None, lambda case, w: peers.Entry(fails)),
    ]
    assert bench("--ops", "dequantize_4bit", "--out", tmp_path) == 0
    found = {entry["peer"]: entry for entry in records.read(tmp_path / "ops.json")["results"]}
    assert found["wrong"]["status"] == "wrong" and "times that of plain PyTorch" in found["wrong"]["reason"]
    assert found["broken"]["reason"] == "AttributeError: has moved"
    assert found["fails"]["reason"] == "NotImplementedError: not this shape"
    assert not any("median" in found[name] or "ratio" in found[name] for name in ("wrong", "broken", "fails"))


def test_ours_wrong_fails_the_run(tmp_path, contestants, capsys):
    wrong = peers.Contestant(peers.OURS, None, lambda case, w: peers.Entry(lambda rows: w.w * 0, one("w")))
    contestants["dequantize_4bit"] = [wrong, *contestants["dequantize_4bit"][1:]]
    assert bench("--ops", "dequantize_4bit", "--out", tmp_path) == 1
    assert "dequantize_4bit M=None: quantlib wrong" in capsys.readouterr().err
    assert all("ratio" not in entry for entry in records.read(tmp_path / "ops.json")["results"])


def test_cold_data_exceed_the_cache_twice(monkeypatch):
    monkeypatch.setattr(run.machine, "cache_size", lambda device: 1 << 20)
    case = Case("linear_4bit", (1024, 1024), torch.bfloat16, 1)
    read = cases.OPS[case.op].cost(case).read
    count = run.copies(case, torch.device("cpu"))
    assert (count - 1) * read < 2 << 20 <= count * read
    assert run.copies(Case("linear_4bit", (1024, 1024), torch.bfloat16, 1, cache="warm"), torch.device("cpu")) == 1
    assert run.copies(Case("linear_4bit", (64, 64), torch.bfloat16, 1), torch.device("cpu")) == run.MOST_COPIES
    assert run.copies(Case("linear_4bit", (64, 64), torch.bfloat16, 1), torch.device("cpu"), 4) == 4
    many = Case("linear_4bit_experts", (128, 2048, 768), torch.bfloat16, 1)  # a single one is read, all are copied
    assert run.copies(many, torch.device("cpu")) * 128 * 2048 * 768 * 5 <= run.COPIED_BYTES


def test_each_copy_is_called_on_its_own_rows():
    seen = []
    entry = peers.Entry(lambda rows: seen.append(rows.x))
    calls = [run._bound(entry, SimpleNamespace(x=i)) for i in range(3)]
    for call in calls:
        call()
    assert seen == [0, 1, 2]
