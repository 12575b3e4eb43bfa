"""Fixtures of the whole suite: poisoned memory, fixed seeds, and the default backend."""

import os

# Triton's interpreter multiplies by numpy, whose BLAS sums in another order on every generation of CPU: 192 products
# were 0.92 to 1.14 times as inexact as PyTorch's. One order on all of them; it is read when numpy is loaded.
os.environ.setdefault("OPENBLAS_CORETYPE", "Haswell")

import pytest
import torch

from quantlib import use_backend


@pytest.fixture(autouse=True)
def _deterministic():
    """Fills `torch.empty` with NaN (or the largest integer), so that an element nobody writes shows."""
    torch.use_deterministic_algorithms(True)
    torch.manual_seed(0)
    with use_backend("auto"):
        yield
    torch.use_deterministic_algorithms(False)
