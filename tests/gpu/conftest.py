"""Fixtures of the GPU tests: the device, poisoned memory, and kernels under the interpreter in a dry run."""

import dataclasses
import os

# cuBLAS keeps to one order of summation only with a workspace of fixed size; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from quantlib import backends, use_backend

from .harness import DRY_RUN, skip_without_device


@pytest.fixture(autouse=True)
def _deterministic(monkeypatch):
    """As in tests/conftest.py, except that an operation of torch without a deterministic kernel is no error here."""
    skip_without_device()
    if DRY_RUN:
        _let_the_interpreter_serve(monkeypatch)
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    with use_backend("auto"):
        yield
    torch.use_deterministic_algorithms(False)


def _let_the_interpreter_serve(monkeypatch):
    """Under TRITON_INTERPRET=1 the Triton kernels take CPU tensors; CUDA kernels have no such stand-in."""
    served = [dataclasses.replace(b, device=None, missing="") if b.name == "triton" else b for b in backends.BACKENDS]
    monkeypatch.setattr(backends, "BACKENDS", tuple(served))
