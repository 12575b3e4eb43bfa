"""Contestants: ours hold the budget, wrong ones are found out, missing ones say why."""

import importlib.util
import math
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import quantlib
from bench import contest, peers, peers_quantlib, peers_torch, suites
from bench.cases import OPS, make_weights
from bench.inputs import Case, Source
from bench.peers import CONTESTANTS, Contestant, Unavailable

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.parametrize("op", OPS)
def test_every_op_has_ours_and_a_peer(op):
    names = [peer.name for peer in CONTESTANTS[op]]
    assert names[0] == peers.OURS
    assert len(names) == len(set(names)) >= 2


TRUTH = {"y": torch.ones(3, 4, dtype=torch.float64)}
PLAIN = {"y": torch.ones(3, 4) * 1.01}


@pytest.mark.parametrize(
    ("result", "status", "reason"),
    [
        (torch.ones(3, 4) * 1.019, "ok", ""),
        (torch.ones(3, 4) * 1.05, "wrong", "error 5 times that of plain PyTorch"),
        (torch.full((3, 4), math.nan), "wrong", "error inf times"),
        (torch.full((3, 4), math.inf), "wrong", "error inf times"),
        (torch.ones(3, 5), "wrong", r"y has shape \(3, 5\); expected \(3, 4\)"),
    ],
)
def test_verdict(result, status, reason):
    found, why, _ = peers.verdict({"y": result}, TRUTH, PLAIN)
    assert found == status
    assert re.search(reason, why) if reason else not why


def test_verdict_of_other_results():
    assert peers.verdict({"dx": TRUTH["y"]}, TRUTH, PLAIN)[1] == "it returns dx; expected y"


def test_exact_plain_results_leave_no_room_for_errors():
    assert peers.verdict({"y": TRUTH["y"] * 1.001}, TRUTH, TRUTH)[0] == "wrong"
    assert peers.verdict(TRUTH, TRUTH, TRUTH)[0] == "ok"


def test_missing_package():
    peer = Contestant("x", "no_such_package", lambda case, w: None)
    with pytest.raises(Unavailable, match="no_such_package is not installed"):
        peer.entry(None, None)


def test_versions_are_those_of_the_packages():
    build = lambda case, w: None  # noqa: E731
    assert peers.package_version(Contestant("quantlib, decode + torch", None, build)) == quantlib.__version__
    assert peers.package_version(Contestant("torch._int_mm", None, build)) == torch.__version__
    assert peers.package_version(Contestant("x", "no_such_package", build)) is None
    assert peers.package_version(Contestant("x", "numpy", build)) == numpy.__version__


@pytest.mark.parametrize(
    "op, name, off",
    [
        ("linear_int8", "torch._int_mm, product alone", 1.02),
        ("linear_int8", "torchao, int8 without outliers", 1.1),
        ("dropout", "torch", 1.02),
    ],
)
def test_what_computes_something_of_its_own_is_held_to_it(op, name, off):
    case = Case(op, suites.tiny(op), torch.bfloat16, 20)
    w, rows = make_weights(case.group, Source("cpu")), OPS[op].rows(case, Source("cpu", 1))
    (peer,) = (peer for peer in CONTESTANTS[op] if peer.name == name)
    if peer.package:
        pytest.importorskip(peer.package)
    entry = peer.entry(case, w)
    expected = OPS[op].truth(w, rows), OPS[op].plain(w, rows)
    assert peers.judged(entry, rows, *expected)[0] == "ok"
    wrong = replace(entry, results=lambda output: {"y": entry.results(output)["y"] * off})
    assert peers.judged(wrong, rows, *expected)[0] == "wrong"


def test_rows_that_an_entry_takes():
    entry = peers.Entry(lambda rows: None, least_rows=17, most_rows=64)
    assert entry.refusal(16) == "it takes M >= 17 only"
    assert "above M = 64" in entry.refusal(65)
    assert entry.refusal(64) == "" == entry.refusal(None)


def test_uniform_int4_is_as_good_as_15_steps_can_be():
    w = torch.randn(8, 128, dtype=torch.bfloat16)
    codes, scales, decoded = peers_torch.uniform_int4(w, 64)
    assert codes.min() >= 0 and codes.max() <= 15 and scales.shape == (2, 8, 2)
    step = scales[..., 0].t().repeat_interleave(64, 1).double()
    assert ((decoded - w.double()).abs() <= 0.6 * step + 0.02).all()


def test_a_step_returns_the_gradients():
    weight = torch.randn(4, 3, requires_grad=True)
    rows = SimpleNamespace(x=torch.randn(5, 3), dy=torch.randn(5, 4))
    y, dx, dw = contest.step(lambda x: x @ weight.t(), (weight,))(rows)
    assert torch.equal(dx, rows.dy @ weight) and torch.allclose(dw, rows.dy.t() @ rows.x)
    assert torch.equal(y, rows.x @ weight.t()) and rows.x.grad is None


@pytest.mark.parametrize("op", contest.MANY)
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("m", [1, 16])
def test_peers_of_experts_and_adapters_compute_the_same(op, backward, m):
    """With rows enough that an expert has none, several sequences share an adapter, and some have none."""
    case = Case(op, (4, 32, 64) if "experts" in op else (32, 64), torch.bfloat16, m, backward)
    w, rows = make_weights(case, Source("cpu")), OPS[op].rows(case, Source("cpu", 1))
    statuses = {}
    for peer in CONTESTANTS[op]:
        try:
            entry = peer.entry(case.group, w)
        except Unavailable as reason:
            statuses[peer.name] = str(reason)
            continue
        with torch.set_grad_enabled(backward):
            statuses[peer.name] = peers.judged(entry, rows, OPS[op].truth(w, rows), OPS[op].plain(w, rows))[0]
    assert "serves cuda tensors, not cpu" in statuses.pop("quantlib")
    missing = [name for name, status in statuses.items() if "not installed" in status]
    assert all(status == "ok" for name, status in statuses.items() if name not in missing), statuses
    assert len(statuses) > len(missing)


INTERPRETED = """
import torch
from bench import contest, peers
from bench.cases import OPS, make_weights
from bench.inputs import Case, Source
from bench.suites import suite

cases = [case for case in suite("quick", "cpu") if case.op in contest.MANY]
assert {(case.dtype, case.cache) for case in cases} == {(torch.float16, "warm")}
for case in cases:
    w, rows = make_weights(case.group, Source("cpu")), OPS[case.op].rows(case, Source("cpu", 1))
    entry = peers.CONTESTANTS[case.op][0].entry(case.group, w)
    found = peers.verdict(entry.results(entry.run(rows)), OPS[case.op].truth(w, rows), OPS[case.op].plain(w, rows))
    assert found[0] == "ok", (str(case), found)
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton")
def test_our_kernels_of_experts_and_adapters_under_the_interpreter():
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_backends_by_name_say_why_they_are_not_measured(monkeypatch):
    case = Case("dequantize_4bit", (8, 64), torch.bfloat16)
    weights = make_weights(case, Source("cpu"))
    (triton,) = (peer for peer in CONTESTANTS[case.op] if peer.name == "quantlib, triton")
    with pytest.raises(Unavailable, match="serves cuda tensors, not cpu"):
        triton.entry(case, weights)
    chosen = SimpleNamespace(chosen="triton")
    monkeypatch.setattr(peers_quantlib.backends.Backend, "refusal", lambda *_: "")
    monkeypatch.setattr(peers_quantlib.backends, "explain", lambda *_: chosen)
    with pytest.raises(Unavailable, match="it is what quantlib runs"):
        triton.entry(case, weights)


REGISTERED = [op for op in OPS if op not in contest.MANY]


@pytest.mark.parametrize(
    "op, backward", [(op, way) for op in REGISTERED for way in (False, True)[: 1 + OPS[op].backward]]
)
def test_a_backend_by_name_runs_what_ours_runs(op, backward, monkeypatch):
    """The same way as that of the CUDA and Triton kernels, with the reference's."""
    backends, seen = peers_quantlib.backends, []
    kernel = lambda op: seen.append(op) or backends._reference(op)  # noqa: E731
    (reference,) = (backend for backend in backends.BACKENDS if backend.name == "reference")
    stand_in = replace(reference, name="stand-in", kernel=kernel, manual="not asked for")
    monkeypatch.setattr(backends, "BACKENDS", (*backends.BACKENDS, stand_in))
    monkeypatch.setitem(CONTESTANTS, op, [peer for peer in CONTESTANTS[op] if peer.name == "quantlib"])
    for other in set(REGISTERED) - {op}:
        monkeypatch.setitem(CONTESTANTS, other, [])
    peers_quantlib._by_backend(stand_in)
    case = Case(op, (32, 64), torch.bfloat16, 5 if OPS[op].rows else None, backward=backward)
    w = make_weights(case, Source("cpu"))
    rows = OPS[op].rows(case, Source("cpu", 1)) if OPS[op].rows else SimpleNamespace()
    entry = CONTESTANTS[op][-1].entry(case, w)
    seen.clear()
    output = entry.run(rows)
    found = peers.verdict(entry.results(output), OPS[op].truth(w, rows), OPS[op].plain(w, rows))
    assert found[:2] == ("ok", "")
    assert set(seen) >= set(peers_quantlib._kernels(case))  # a forward pass asks whether there is a backward one
