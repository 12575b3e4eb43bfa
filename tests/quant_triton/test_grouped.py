"""Products with the 4-bit weights of experts."""

import pytest
import torch
from torch.nn import functional as F

from quant_triton.branch import Lora
from quant_triton.grouped import linear_4bit_grouped, linear_4bit_grouped_dx
from quantlib import functional, reference
from tests.gpu.harness import assert_error_within

N, K = 40, 128
COUNTS = [[3, 0, 20, 1, 17], [33], [0, 0, 18], [0, 16, 0], [0, 0]]


def experts(counts, **options):
    """ends, the expert of each row, and the weight."""
    weight = functional.quantize_4bit(0.05 * torch.randn(len(counts) * N, K), **options).op_args()
    counts = torch.tensor(counts)
    return counts.cumsum(0).int(), torch.arange(len(counts)).repeat_interleave(counts), weight


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("counts", COUNTS, ids=str)
def test_each_row_meets_its_expert(counts, double_quant, dtype):
    ends, _, weight = experts(counts, double_quant=double_quant)
    m = sum(counts)
    x, dy, bias = (torch.randn(size).to(dtype) for size in ((m, K), (m, N), (len(counts), N)))
    y = linear_4bit_grouped(x, *weight, N, bias, ends)
    dx = linear_4bit_grouped_dx(dy, *weight, K, ends)
    assert y.shape == (m, N) and dx.shape == (m, K)
    if not m:
        return
    exact, plain = (by_expert(x, dy, bias, weight, counts, d) for d in (torch.float64, dtype))
    assert_error_within(y, plain[0], exact[0])
    assert_error_within(dx, plain[1], exact[1], factor=1.5)


def by_expert(x, dy, bias, weight, counts, dtype):
    """Product and gradient in plain PyTorch."""
    w = reference.dequantize_4bit(*weight, (len(counts), N, K), dtype)
    rows, rows_dy = (t.to(dtype).split(counts) for t in (x, dy))
    y = [F.linear(part, *arguments) for part, *arguments in zip(rows, w, bias.to(dtype), strict=True)]
    return torch.cat(y), torch.cat([part @ one for part, one in zip(rows_dy, w, strict=True)])


def test_a_branch_per_expert():
    ends, expert, weight = experts([5, 0, 20])
    x, s, b = torch.randn(25, K), torch.randn(25, 6), torch.randn(3, N, 6)
    y = linear_4bit_grouped(x, *weight, N, None, ends, Lora(s, b, 0.5))
    branch = 0.5 * torch.einsum("mr,mnr->mn", s, b[expert])
    torch.testing.assert_close(y, linear_4bit_grouped(x, *weight, N, None, ends) + branch)


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_a_gradient_with_a_branch_per_expert(p):
    ends, expert, weight = experts([5, 0, 20])
    dy, ds, a, seed = torch.randn(25, N), torch.randn(25, 6), torch.randn(3, 6, K), torch.tensor([9]) if p else None
    dx = linear_4bit_grouped_dx(dy, *weight, K, ends, Lora(ds, a.transpose(1, 2), 0.5, seed, p))
    branch = 0.5 * torch.einsum("mr,mrk->mk", ds, a[expert])
    branch = reference.dropout(branch, seed, p) if p else branch
    torch.testing.assert_close(dx, linear_4bit_grouped_dx(dy, *weight, K, ends) + branch)


def test_rows_of_any_strides():
    ends, _, weight = experts([5, 0, 20])
    x = torch.randn(25, K)
    y = linear_4bit_grouped(x, *weight, N, None, ends)
    assert torch.equal(linear_4bit_grouped(x.t().contiguous().t(), *weight, N, None, ends), y)


def test_what_the_kernels_cannot_read_is_refused():
    ends, _, weight = experts([5, 20])
    with pytest.raises(ValueError, match="int64"):
        linear_4bit_grouped(torch.randn(25, K), *weight, N, None, ends.long())
    odd = functional.quantize_4bit(torch.randn(2 * N, 100)).op_args()
    with pytest.raises(ValueError, match="multiple of 64"):
        linear_4bit_grouped(torch.randn(25, 100), *odd, N, None, ends)
