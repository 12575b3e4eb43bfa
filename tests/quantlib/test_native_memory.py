"""Large results of the C++ kernels, whose memory is used again."""

import gc
import sys

import pytest
import torch

from quantlib import dequantize_4bit, dequantize_int8, quantize_4bit, quantize_int8, reference

from .native import DTYPES

ROWS, COLUMNS = 4096, 4096  # 32 MiB in 16 bits, from where on memory is kept


@pytest.fixture(scope="module")
def weight():
    return torch.randn(ROWS, COLUMNS, generator=torch.Generator().manual_seed(0)).bfloat16()


@pytest.mark.skipif(sys.platform != "linux" or torch.__version__ < (2, 11), reason="needs Linux and PyTorch 2.11")
def test_a_freed_result_is_used_again_and_a_live_one_is_not(weight):
    q = quantize_4bit(weight)
    first = dequantize_4bit(q)
    expected, address = first.clone(), first.data_ptr()
    view = first[1:]  # keeps the memory, not the tensor
    del first
    second = dequantize_4bit(q)
    assert second.data_ptr() != address
    second.zero_()
    assert torch.equal(view, expected[1:])
    del view
    gc.collect()
    third = dequantize_4bit(q)
    assert third.data_ptr() == address
    assert torch.equal(third, expected)
    assert not second.any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_results_in_used_memory_are_whole(weight, dtype):
    """A block of another size and dtype is not taken, or taken and written throughout."""
    dequantize_4bit(quantize_4bit(weight), torch.float32).fill_(torch.nan)
    packed, absmax = reference.quantize_4bit(weight, "nf4", 64)
    expected = reference.dequantize_4bit(packed, absmax, None, None, None, "nf4", 64, weight.shape, dtype)
    for _ in range(2):
        found = dequantize_4bit(quantize_4bit(weight), dtype)
        assert found.is_contiguous() and torch.equal(found, expected)
        found.fill_(torch.nan)


def test_int8(weight):
    q = quantize_int8(weight)
    expected = reference.dequantize_int8(q.values, q.absmax, -1, None, torch.bfloat16)
    for _ in range(2):
        found = dequantize_int8(q)
        assert torch.equal(found, expected)
        found.fill_(torch.nan)


def test_gradients_views_and_pickles_of_such_a_result(weight, tmp_path):
    w = dequantize_4bit(quantize_4bit(weight)).requires_grad_()
    (w[:2].t() * 3).sum().backward()
    assert torch.equal(w.grad[:2], torch.full((2, COLUMNS), 3.0).bfloat16()) and not w.grad[2:].any()
    torch.save(w[:3].detach().clone(), tmp_path / "w")
    assert torch.equal(torch.load(tmp_path / "w", weights_only=True), w[:3])
    shared = w.detach().share_memory_()
    assert shared.is_shared() and torch.equal(shared, w)
