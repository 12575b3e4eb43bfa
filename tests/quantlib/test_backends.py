"""Choosing a backend, and being told which one runs."""

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

import quantlib
from quantlib import backends, ops


def test_auto_prefers_native_kernels():
    explanation = quantlib.explain("linear_4bit")
    assert explanation.chosen == backends._C.cpu_isas()[0]
    assert set(explanation.verdicts) == {b.name for b in backends.BACKENDS}
    assert "linear_4bit on cpu" in str(explanation)


def test_other_devices_run_the_reference():
    explanation = quantlib.explain("linear_4bit", "xpu")
    assert explanation.chosen == "reference"
    assert "serves cpu tensors, not xpu" in explanation.verdicts["cpu-portable"]


def test_base_and_branch_are_composed_where_no_kernel_has_both():
    explanation = quantlib.explain("lora_linear_4bit_backward", "xpu")
    assert explanation.chosen == "reference" and "composed" in explanation.verdicts["reference"]
    for op in ("lora_linear_4bit", "lora_linear_4bit_backward"):
        assert backends.fused(op, torch.device("xpu")) is None
        assert backends.fused(op, torch.device("cpu")) is not None
    with quantlib.use_backend("reference"):
        assert backends.fused("lora_linear_4bit_backward", torch.device("xpu")) is not None


def test_use_backend_is_restored():
    with quantlib.use_backend("reference"):
        assert backends.kernel("dropout", torch.device("cpu")).__wrapped__ is backends.reference.dropout
        assert quantlib.explain("dropout").chosen == "reference"
        with quantlib.use_backend("cpu-portable"):
            assert backends._C.cpu_isa() == "cpu-portable"
            assert quantlib.explain("dropout").chosen == "cpu-portable"
        assert quantlib.explain("dropout").chosen == "reference"
    assert backends._C.cpu_isa() == backends._C.cpu_isas()[0]


def test_an_explicit_choice_never_falls_back():
    with quantlib.use_backend("cpu"), pytest.raises(RuntimeError, match=r"dropout: backend 'cpu-.*serves cpu"):
        backends.kernel("dropout", torch.device("cuda"))


def test_shapes_are_inferred_under_any_backend():
    """A layer on the meta device is how every conversion begins."""
    with quantlib.use_backend("reference"):
        assert quantlib.Linear4bit(64, 64, device="meta").weight.shape == (2048, 1)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which has wheels for Linux only")
def test_the_interpreter_lets_triton_serve_the_cpu_on_request():
    script = """
import torch, quantlib
from quantlib import backends
print(quantlib.explain("dequantize_4bit").verdicts["triton"])
with quantlib.use_backend("triton"):
    print(backends.kernel("dequantize_4bit", torch.device("cpu")).name())
"""
    paths = os.pathsep.join(["kernels", os.environ.get("PYTHONPATH", "")])
    result = _python("-c", script, TRITON_INTERPRET="1", PYTHONPATH=paths)
    assert result.stdout.splitlines() == [
        f"only on request: it is interpreted, as a proof; {backends._NEVER_RUN}",
        "quantlib_triton::dequantize_4bit",
    ], result.stderr


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs Triton, which has wheels for Linux only")
def test_triton_serves_every_op_on_cuda_and_says_what_it_has_not_proved():
    """As on a machine with a GPU; what is registered for CUDA computes on the CPU here, interpreted."""
    script = """
import os, warnings
import torch
torch.cuda.is_available = lambda: True
import quantlib
from quantlib import backends, ops, reference
from quantlib.__main__ import _outputs, example_args
for op in ops.SCHEMAS:
    verdict = quantlib.explain(op, "cuda")
    assert verdict.chosen == "triton" and verdict.verdicts["triton"].endswith(backends._NEVER_RUN), verdict
    assert quantlib.explain(op).chosen == backends._C.cpu_isas()[0]
assert backends.fused("lora_linear_4bit", torch.device("cuda")) is backends._registered("lora_linear_4bit")
os.environ["TRITON_INTERPRET"] = "1"
cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for op, args in example_args().items():
        got = backends._registered(op).redispatch(cuda, *args)
        for ours, theirs in zip(_outputs(got), _outputs(getattr(reference, op)(*args)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
(warning,) = (str(w.message) for w in caught if "quantlib" in str(w.message))
assert "served by 'triton'" in warning and backends._NEVER_RUN in warning, warning
print("served")
"""
    paths = os.pathsep.join(["kernels", os.environ.get("PYTHONPATH", "")])
    result = _python("-c", script, PYTHONPATH=paths)
    assert result.stdout.splitlines() == ["served"], result.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_triton_says_what_is_missing():
    assert quantlib.explain("linear_4bit").verdicts["triton"] == "no: serves cuda tensors, not cpu"
    assert quantlib.explain("linear_4bit", "cuda").verdicts["triton"] == "no: torch finds no CUDA device"
    with pytest.raises(RuntimeError, match="'triton' cannot run here: torch finds no CUDA device"):
        quantlib.use_backend("triton")


def test_unknown_names():
    with pytest.raises(ValueError, match="unknown backend 'gpu'; allowed: auto, cpu, "):
        quantlib.use_backend("gpu")
    with pytest.raises(ValueError, match="unknown op 'gemm'; allowed: quantize_4bit"):
        quantlib.explain("gemm")


def _python(*args, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *args], env=env, capture_output=True, text=True)


def test_environment_variable():
    script = "import quantlib; print(quantlib.explain('dropout').chosen)"
    assert _python("-c", script, QUANTLIB_BACKEND="reference").stdout.strip() == "reference"
    result = _python("-c", script, QUANTLIB_BACKEND="fast")
    assert result.returncode != 0
    assert "QUANTLIB_BACKEND" in result.stderr and "'fast'" in result.stderr


def test_diagnostics():
    result = _python("-m", "quantlib")
    assert result.returncode == 0, result.stdout
    for op in ops.SCHEMAS:
        assert op in result.stdout
    assert "BROKEN" not in result.stdout


def test_diagnostics_exit_code_when_a_kernel_is_wrong(monkeypatch, capsys):
    from quantlib.__main__ import main

    monkeypatch.setattr(backends.reference, "dropout", lambda x, seed, p: x)
    assert main() == 1
    assert "BROKEN: AssertionError" in capsys.readouterr().out


def test_only_cpus_with_amx_take_it_by_themselves(monkeypatch):
    class WithAmx:
        cpu_isas = staticmethod(lambda: ["cpu-onednn", "cpu-avx512bf16"])

    class Without:
        cpu_isas = staticmethod(lambda: ["cpu-avx512bf16", "cpu-onednn"])

    monkeypatch.setattr(backends, "_C", WithAmx)
    assert backends._cpu_manual("cpu-onednn") == backends._cpu_manual("cpu-avx512bf16") == ""
    monkeypatch.setattr(backends, "_C", Without)
    assert "AMX" in backends._cpu_manual("cpu-onednn") and backends._cpu_manual("cpu-avx512bf16") == ""
