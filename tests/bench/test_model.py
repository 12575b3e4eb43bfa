"""The whole-model benchmark: it runs, it tells wrong from right, and it goes on where memory or time ends."""

import json
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from peft import get_peft_model
from torch.autograd import DeviceType
from transformers.models.llama import modeling_llama

from bench import model, model_report, model_unsloth, records
from bench.__main__ import main
from bench.model_contestants import (
    CONTESTANTS,
    OURS,
    RANK,
    REFERENCE,
    SHAPES,
    Contestant,
    _decoded,
    _dense,
    build,
    draw_adapters,
    held_bytes,
    lora_config,
)
from bench.model_split import GROUPS, group_times, split
from quantlib import Linear4bit
from tests.threads import threads

CPU = torch.device("cpu")
TINY = SHAPES["tiny"]
CELLS = model.cells([16], 16)
SETTINGS = model.Settings(TINY, CPU, torch.bfloat16, CELLS, seconds=0.0, min_rounds=1, check_tokens=16)
OURS_ONLY = CONTESTANTS[:1]
GPU_ONLY = ("Unsloth", "bitsandbytes + PEFT + Liger", "quantlib + Liger")


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small are multiplied faster by one thread than by several."""
    with threads(1):
        yield


@pytest.fixture(autouse=True, scope="module")
def _no_limits():
    """Limits of the machine take seconds to measure, and decide nothing here."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.limits, "measure", lambda *_, **__: {"bfloat16": 1e11, "float32": 1e11, "read": 1e10})
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the command writes for the tiny model."""
    out = tmp_path_factory.mktemp("model")
    assert main(["model", "--quick", "--device", "cpu", "--sequence", "16", "--out", str(out)]) == 0
    return records.read(out / "model-tiny.json")


@pytest.fixture(scope="module")
def truth():
    return model.Runner(REFERENCE, SETTINGS).truth()


def test_every_contestant_computes_the_same(record):
    rows = record["results"]
    assert len(rows) == 3 * (len(CONTESTANTS) + 1)
    for row in rows:
        assert row["status"] == "ok" or "install" in row["reason"] or row["peer"] in GPU_ONLY, row
    assert {row["status"] for row in rows if row["peer"] in (OURS, "16 bits + PEFT")} == {"ok"}
    assert record["errors"][OURS]["gradients"] < 0.05


def test_rows_hold_times_memory_and_ratios(record):
    for row in record["results"]:
        if row["status"] == "ok":
            assert 0 < row["p20"] <= row["median"] <= row["p80"]
            assert row["tokens_per_second"] == pytest.approx((16 if row["task"] == "train" else 1) / row["median"])
            assert row["peak_memory"] is None or row["peak_memory"] >= row["held_memory"] > 0
            assert row["ratio"] > 0
            assert 0 < row["limit"] < 1
        else:
            assert "median" not in row
    ours, other = (next(row for row in record["results"] if row["peer"] == peer) for peer in (OURS, "16 bits + PEFT"))
    assert ours["ratio"] == 1
    assert ours["held_memory"] < other["held_memory"]


def test_time_is_split(record):
    for row in record["results"]:
        if row["status"] == "ok" and row["task"] == "train":
            assert list(row["split"]) == list(GROUPS)
            base = {"base linear", "base + LoRA"}
            assert all(row["split"][group] > 0 for group in GROUPS if group not in base), row["split"]
            ours = row["peer"] == OURS
            assert (row["split"]["base + LoRA"] > 0) == ours and (row["split"]["base linear"] > 0) != ours, row["split"]


def test_report(record, tmp_path):
    page = model_report.page(record, tmp_path)
    assert "| quantlib | 16 | yes |" in page
    assert "share of time" in page
    for peer in GPU_ONLY:
        assert page.count(peer) == 1 and f"- {peer}: unavailable, " in page
    assert (tmp_path / "model-tiny.png").stat().st_size > 10_000
    assert "model-tiny.png" in model_report.section(record, tmp_path)


def test_report_without_results(record, tmp_path):
    """A budget can end before anything is measured, and everything can fail."""
    failed = [{**row, "status": "failed", "reason": "out of memory"} for row in record["results"]]
    for results in ([], failed):
        page = model_report.page({**record, "results": results}, tmp_path)
        assert ("out of memory" in page) == bool(results)


def _fp4(weight):
    return Linear4bit.from_linear(_dense(weight), quant_type="fp4")


class _Zero(torch.nn.Linear):
    def forward(self, x):
        return super().forward(x) * 0


def _zero(weight):
    layer = _Zero(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    return layer


def _broken(weight):
    raise OSError("no such library\nat all")


@pytest.mark.parametrize(
    ("layer", "status", "reason"),
    [
        (_fp4, "wrong", "gradients off by"),
        (_zero, "wrong", "gradient"),
        (_broken, "failed", "OSError: no such library"),
    ],
)
def test_what_computes_something_else_has_no_time(truth, layer, status, reason):
    runner, rows, _ = model.admit(Contestant("other", layer, autocast=False), SETTINGS, truth)
    assert runner is None
    assert [row["status"] for row in rows] == [status] * len(CELLS)
    assert all(reason in row["reason"] and "\n" not in row["reason"] and "median" not in row for row in rows)


def test_a_missing_gradient_is_an_error():
    runner = model.Runner(CONTESTANTS[0], SETTINGS)
    runner.start()
    next(p for p in runner.model.parameters() if p.requires_grad).register_hook(torch.zeros_like)
    with pytest.raises(FloatingPointError, match="has norm 0"):
        runner.gradients(runner.tokens(1, 8))


def test_a_result_that_is_not_finite_has_no_time():
    runner = model.Runner(CONTESTANTS[0], SETTINGS)
    runner.step = lambda ids: lambda: torch.tensor(torch.nan)
    (row,) = model.measure_cell([runner], CELLS[1])
    assert row["status"] == "wrong"
    assert "not finite" in row["reason"]
    assert "median" not in row


def test_missing_contestants_say_why(truth):
    absent = Contestant("other", _decoded, needs=("no_such_module",))
    gpu = Contestant("another", _decoded, devices=("cuda",))
    for contestant, reason in ((absent, "no_such_module not installed"), (gpu, "runs on cuda only")):
        runner, rows, _ = model.admit(contestant, SETTINGS, truth)
        assert runner is None
        assert {(row["status"], row["reason"]) for row in rows} == {("unavailable", reason)}


def test_what_does_not_import_is_unavailable(truth):
    def layer(weight):
        raise ImportError("too old a version of transformers")

    runner, rows, _ = model.admit(Contestant("other", layer), SETTINGS, truth)
    assert runner is None
    assert {row["status"] for row in rows} == {"unavailable"}
    assert all("too old a version" in row["reason"] for row in rows)


def test_liger_changes_its_own_model_alone(monkeypatch):
    """With a stand-in that changes transformers' names and the model as Liger-Kernel does."""
    calls = []

    def rotation(*args):
        calls.append(args)
        return original["apply_rotary_pos_emb"](*args)

    def apply(model):
        modeling_llama.apply_rotary_pos_emb = rotation
        modeling_llama.LlamaRMSNorm = None
        model.config.patched = True

    original = vars(modeling_llama).copy()
    stand_in = SimpleNamespace(apply_liger_kernel_to_llama=apply)
    monkeypatch.setitem(sys.modules, "liger_kernel", SimpleNamespace(transformers=stand_in))
    monkeypatch.setitem(sys.modules, "liger_kernel.transformers", stand_in)
    (liger,) = (contestant for contestant in CONTESTANTS if contestant.name == "quantlib + Liger")
    plain, patched = (model.Runner(contestant, SETTINGS) for contestant in (CONTESTANTS[0], liger))
    ids = plain.tokens(1, 8)
    for runner, count in ((plain, 0), (patched, 2 * TINY.layers), (plain, 2 * TINY.layers)):
        runner.start(checkpointing=True)  # a layer runs twice
        loss = runner.gradients(ids)[0]
        assert len(calls) == count
    assert loss == patched.gradients(ids)[0]
    assert patched.model.config.patched and not hasattr(plain.model.config, "patched")
    assert all(vars(modeling_llama)[name] is value for name, value in original.items())


def _row(peer, loss, norm, median):
    return model._row(
        CELLS[0], peer, "ok", loss=loss, gradient_norm=norm, median=median, tokens_per_second=1.0, operations=1, read=1
    )


@pytest.mark.parametrize(("loss", "norm"), [(5.1, 1.0), (5.0, 2.0), (float("nan"), 1.0)])
def test_contestants_that_disagree_lose_their_times(loss, norm):
    rows = [_row(OURS, 5.0, 1.0, 2.0), _row("b", 5.001, 1.01, 3.0), _row("c", loss, norm, 0.1)]
    model.judge(rows, {"bfloat16": 1.0, "read": 2.0}, "bfloat16")
    assert [row["status"] for row in rows] == ["ok", "ok", "wrong"]
    assert [row.get("ratio") for row in rows] == [1.0, 1.5, None]
    assert rows[0]["limit"] == 0.5
    assert "median" not in rows[2]
    assert "tokens_per_second" not in rows[2]


def test_nan_is_out_of_tolerance():
    assert "loss off by nan" in model.complaint({"loss": float("nan"), "gradients": 0.0})
    assert model.complaint(dict.fromkeys(model.TOLERANCES, 0.0)) == ""


def test_models_that_do_not_fit_together_run_alone(monkeypatch):
    contestants = (CONTESTANTS[0], CONTESTANTS[3])
    together, alone = [], []

    def measure(runners, cell):
        if len(runners) > 1:
            together.append(cell)
            raise torch.OutOfMemoryError
        alone.append((runners[0].contestant.name, cell))
        if cell == CELLS[1]:
            raise torch.OutOfMemoryError
        row = _row(runners[0].contestant.name, 5.0, 1.0, 1.0)
        return [{**row, "task": cell.task, "checkpointing": cell.checkpointing}]

    monkeypatch.setattr(model, "measure_cell", measure)
    found = model.run(SETTINGS, contestants)
    assert together == [CELLS[0]]
    assert alone == [(contestant.name, cell) for contestant in contestants for cell in CELLS]
    rows = [row for row in found["results"] if row["peer"] == OURS]
    assert [row["status"] for row in rows] == ["ok", "failed", "ok"]
    assert rows[1]["reason"] == "out of memory"


def test_a_budget_keeps_what_there_is():
    saved = []
    found = model.run(SETTINGS, OURS_ONLY, save=lambda record: saved.append(len(record["results"])), deadline=0)
    assert found["stopped"]
    assert saved == [1]
    assert found["results"][0]["status"] == "ok"


def _arguments(*words):
    import argparse

    parser = argparse.ArgumentParser()
    model.configure(parser)
    return parser.parse_args(words)


def test_defaults_by_device(monkeypatch):
    chosen = model.settings(_arguments("--device", "cpu"))
    assert (chosen.shape.name, max(cell.sequence for cell in chosen.cells)) == ("small", 1024)
    chosen = model.settings(_arguments("--device", "cuda"))
    assert (chosen.shape.name, max(cell.sequence for cell in chosen.cells)) == ("llama-3-8b", 8192)
    assert chosen.cells[-1].task == "decode"
    assert [cell.split for cell in chosen.cells] == [False] * 8 + [True] * 2 + [False]
    chosen = model.settings(_arguments("--device", "cuda", "--layers", "2", "--batch", "4"))
    assert chosen.shape.layers == 2
    assert chosen.cells[0].batch == 4


def test_counts_of_llama():
    shape = SHAPES["llama-3-8b"]
    assert shape.linear_weights == 6_979_321_856
    step = model.work(shape, model.Cell("train", 1, 1))
    assert step["operations"] == pytest.approx(4 * (shape.linear_weights + 4096 * 128256), rel=1e-4)
    assert model.work(shape, model.Cell("decode", 1))["read"] == pytest.approx(4.65e9, rel=0.01)


def test_held_bytes_counts_everything_once():
    dense = held_bytes(build(TINY, _decoded, CPU, torch.bfloat16))
    parameters = TINY.linear_weights + 2 * TINY.vocab * TINY.hidden + (2 * TINY.layers + 1) * TINY.hidden
    assert dense == pytest.approx(2 * parameters, rel=0.001)  # and the rotary frequencies
    ours = held_bytes(build(TINY, CONTESTANTS[0].layer, CPU, torch.bfloat16))
    pytest.importorskip("bitsandbytes")
    theirs = held_bytes(build(TINY, CONTESTANTS[1].layer, CPU, torch.bfloat16))
    assert ours == pytest.approx(theirs, rel=0.1)
    assert ours < dense


def test_labels_leave_the_model_as_it_was():
    adapted = get_peft_model(build(TINY, _decoded, CPU, torch.bfloat16), lora_config())
    draw_adapters(adapted)
    ids = torch.zeros(1, 8, dtype=torch.int64)
    step = lambda: adapted(input_ids=ids, labels=ids).loss.backward()  # noqa: E731
    times = split(adapted, step, CPU, RANK, TINY.vocab)
    assert times["optimizer"] == 0
    assert times["base linear"] > 0
    assert not any("forward" in vars(module) for module in adapted.modules())


def _event(name, parent=None, kernels=(), shapes=(), sequence=-1, start=0):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        kernels=[SimpleNamespace(name=kernel, duration=microseconds) for kernel, microseconds in kernels],
        input_shapes=shapes,
        sequence_nr=sequence,
        self_cpu_time_total=1e6,
        device_type=DeviceType.CPU,
        time_range=SimpleNamespace(start=start),
    )


def test_split_of_device_time():
    """Kernels count once, for the op that launched them; annotations, which the device mirrors, do not."""
    label = _event("bench: norm + activation", kernels=[("bench: norm + activation", 9e6)])
    forward = _event("aten::mul", label, [("elementwise", 1e6)], sequence=7, start=1)
    node = _event("autograd::engine::evaluate_function: MulBackward0", sequence=7, start=5)
    backward = _event("aten::mul", node, [("elementwise", 2e6)], start=6)
    layer = _event("bench: LoRA", start=2)
    base = _event("aten::mm", layer, [("gemm", 3e6)], shapes=[[64, 4096], [4096, 4096]])
    adapter = _event("aten::mm", layer, [("gemm", 4e6)], shapes=[[64, 4096], [4096, 16]])
    cast = _event("aten::copy_", layer, [("elementwise", 5e6)])
    fused = _event("quantlib::linear_4bit", layer)
    inside = _event("aten::mm", fused, [("gemm", 6e6)], shapes=[[64, 16], [16, 16]])
    decode = _event("LoRA_MLP", _event("bench: attention"), [("kDequantizeBlockwise<bf16>", 7e6)])
    head = _event("aten::mm", _event("bench: loss"), [("gemm", 8e6)], shapes=[[64, 4096], [4096, 32000]])
    events = [label, forward, node, backward, layer, base, adapter, cast, fused, inside, decode, head]
    times = group_times(events, rank=16, vocab=32000, cuda=True)
    assert times["norm + activation"] == pytest.approx(3)
    assert times["base linear"] == pytest.approx(3 + 6 + 7)
    assert times["LoRA"] == pytest.approx(4 + 5)
    assert times["loss"] == pytest.approx(8)
    assert sum(times.values()) == pytest.approx(36)


UNSLOTH = """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from bench.model_contestants import set_checkpointing

class FastLanguageModel:
    @staticmethod
    def from_pretrained(folder, max_seq_length, dtype, load_in_4bit):
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype), AutoTokenizer.from_pretrained(folder)

    @staticmethod
    def get_peft_model(model, use_gradient_checkpointing, max_seq_length, **options):
        return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))

    @staticmethod
    def for_training(model, use_gradient_checkpointing):
        set_checkpointing(model, use_gradient_checkpointing)
"""


def test_unsloth_in_its_process(truth, tmp_path):
    """With a stand-in of Unsloth's interface: the checkpoint is right, and the rows come back."""
    pytest.importorskip("bitsandbytes")
    (tmp_path / "unsloth.py").write_text(UNSLOTH)
    command = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {model_unsloth.COMMAND}"
    settings = replace(SETTINGS, cells=CELLS[1:])
    start = time.monotonic()
    row, decode = model_unsloth.measure(settings, truth, command)
    assert (decode["status"], decode["reason"]) == ("unavailable", "its generation is not measured")
    assert row["status"] == "ok", row
    assert row["loss"] == pytest.approx(truth.loss, abs=model.TOLERANCES["loss"])
    assert row["median"] < time.monotonic() - start
    json.dumps(row)


def test_a_process_that_dies_is_a_failure(truth, monkeypatch):
    monkeypatch.setattr(model_unsloth, "write_checkpoint", lambda *_: None)
    with pytest.raises(RuntimeError, match="ended with code 1: ValueError: out of luck"):
        model_unsloth.measure(SETTINGS, truth, "raise ValueError('out of luck')")


def test_unsloth_is_for_gpus():
    assert model_unsloth.missing(CPU) == "its kernels run on GPUs only"
