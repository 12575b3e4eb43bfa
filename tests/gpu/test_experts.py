"""The 4-bit weights of experts on the GPU, which are no registered op yet, against plain PyTorch per expert."""

import pytest
import torch
from torch.nn import functional as F

from quantlib import reference

from .harness import DEVICE, DRY_RUN, DTYPES, assert_error_within, no_synchronization, to_device, weight_4bit

pytestmark = pytest.mark.gpu
grouped = pytest.importorskip("quant_triton.grouped", reason="needs Triton")

COUNTS = [[3, 0, 20, 1], *([] if DRY_RUN else [[300, 0, 1, 700, 16], [5] * 64])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=len)
def test_products_and_gradients(counts, dtype):
    if DRY_RUN and dtype == torch.bfloat16:
        pytest.skip("Triton's interpreter truncates where bfloat16 rounds")
    m, n, k = sum(counts), 96, 128
    weight = weight_4bit(len(counts) * n, k, double_quant=True)
    x, dy = torch.randn(m, k).to(dtype), torch.randn(m, n).to(dtype)
    ends = torch.tensor(counts).cumsum(0).int().to(DEVICE)
    on_device = to_device((x, dy, *weight))

    def run():
        return (
            grouped.linear_4bit_grouped(on_device[0], *on_device[2:], n, None, ends),
            grouped.linear_4bit_grouped_dx(on_device[1], *on_device[2:], k, ends),
        )

    run()  # compiles and fills caches, which may wait
    with no_synchronization():
        y, dx = run()
    exact, plain = (by_expert(x, dy, weight, (len(counts), n, k), counts, d) for d in (torch.float64, dtype))
    assert_error_within(y, plain[0], exact[0])
    assert_error_within(dx, plain[1], exact[1], factor=1.5)


def by_expert(x, dy, weight, shape, counts, dtype):
    """Products and gradients in plain PyTorch, on the GPU but for float64."""
    w = reference.dequantize_4bit(*weight, shape, dtype)
    if dtype != torch.float64:
        x, dy, w = to_device((x, dy, w))
    parts = list(zip(x.to(dtype).split(counts), dy.to(dtype).split(counts), w, strict=True))
    return torch.cat([F.linear(a, one) for a, _, one in parts]), torch.cat([b @ one for _, b, one in parts])
