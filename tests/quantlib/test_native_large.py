"""More than 2^31 elements: indices that no longer fit 32 bits. The interesting elements lie at both ends."""

import re
from pathlib import Path

import pytest
import torch

from quantlib import dequantize_4bit, quantize_4bit, quantize_int8, reference

COLUMNS = 4096
ROWS = 2**31 // COLUMNS + 3


def _available_gigabytes() -> float:
    meminfo = Path("/proc/meminfo")
    found = re.search(r"MemAvailable: +(\d+) kB", meminfo.read_text()) if meminfo.exists() else None
    return int(found[1]) / 1e6 if found else 0


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(_available_gigabytes() < 14, reason="needs Linux and 14 GB of available memory"),
]


@pytest.fixture
def x():
    torch.use_deterministic_algorithms(False)  # filling gigabytes with NaN first proves nothing more here
    x = torch.zeros(ROWS, COLUMNS, dtype=torch.bfloat16)
    x[0] = torch.randn(COLUMNS)
    x[-1] = torch.randn(COLUMNS)
    return x


def test_4bit(x):
    q = quantize_4bit(x)
    y = dequantize_4bit(q)
    del q
    for row in (0, -1):
        expected = dequantize_4bit(quantize_4bit(x[row].clone()))
        assert torch.equal(y[row], expected)
    assert not y[1:-1].any()


def test_int8(x):
    q = quantize_int8(x, threshold=3.0)
    for row in (0, -1):
        values, absmax, _ = reference.quantize_int8(x[row], -1, None, 3.0)
        kept = ~q.outliers
        assert torch.equal(q.values[row, kept], values[kept]) and torch.equal(q.absmax[row], absmax)
    assert torch.equal(q.outliers, (x[[0, -1]].abs() >= 3).any(0))
    assert not q.values[1:-1].any()


def test_dropout(x):
    x[-1] = 1
    seed = torch.tensor([7])
    y = torch.ops.quantlib.dropout(x, seed, 0.5)
    first = (ROWS - 1) * COLUMNS // 4
    group = torch.arange(first, first + COLUMNS // 4)
    zero = torch.zeros_like(group)
    words = reference.philox4x32((group & 0xFFFFFFFF, group >> 32, zero, zero), (seed, zero[:1])).view(-1)
    assert torch.equal(y[-1] != 0, (words >> 8) >= 2**23)
    assert not y[1:-1].any()
