"""The oracle itself: its written-out gradients against autograd, in float64."""

import pytest
import torch

from lora_ops import reference


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("lead", [(), (5,), (2, 3)])
def test_gradients_agree_with_autograd(lead, dropout_p):
    torch.manual_seed(0)
    x, weight, A, B, bias = (
        torch.randn(shape, dtype=torch.float64) for shape in ((*lead, 6), (7, 6), (2, 6), (7, 2), (7,))
    )
    keep = torch.rand(x.shape) >= dropout_p if dropout_p else None
    leaves = [t.requires_grad_() for t in (x, A, B, bias)]
    y = reference.lora_linear(x, weight, A, B, 1.7, bias, keep, dropout_p)
    dy = torch.randn_like(y)
    expected = torch.autograd.grad(y, leaves, dy)
    actual = reference.lora_linear_backward(dy, x, weight, A, B, 1.7, keep, dropout_p)
    for got, want in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, want)


def test_a_dropped_nan_leaves_the_branch():
    x = torch.tensor([[float("nan"), 1.0]], dtype=torch.float64)
    keep = torch.tensor([[False, True]])
    assert reference.apply_dropout(x, keep, 0.5).tolist() == [[0.0, 2.0]]
