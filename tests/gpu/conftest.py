"""Fixtures of the GPU tests: the device, poisoned memory, fixed seeds."""

import os

# cuBLAS keeps to one order of summation only with a workspace of fixed size; it is read when CUDA starts.
os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")

import pytest
import torch

from quantlib import use_backend

from .harness import skip_without_device


@pytest.fixture(autouse=True)
def _deterministic():
    """As in tests/conftest.py, except that an operation of torch without a deterministic kernel is no error here."""
    skip_without_device()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.manual_seed(0)
    with use_backend("auto"):
        yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(params=["auto", "reference"])
def either_backend(request, _deterministic):
    """What `auto` chooses, the Triton kernels on a GPU, and plain PyTorch."""
    with use_backend(request.param):
        yield
