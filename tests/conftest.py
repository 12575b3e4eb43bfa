"""Fixtures of the whole suite: poisoned memory, fixed seeds, and the default backend."""

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
