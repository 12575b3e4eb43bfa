"""Against bitsandbytes' CUDA kernels, where it is installed."""

import pytest
import torch

import quantlib
from quantlib import checkpoint

from .harness import DEVICE, DTYPES, assert_same

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed; gpu.sh takes it with --wheels")

pytestmark = pytest.mark.gpu

every_format = pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def weight(dtype, n=256, k=512):
    return (0.05 * torch.randn(n, k)).to(DEVICE, dtype)


@every_format
@every_dtype
def test_it_decodes_our_weights_to_the_same_bits(quant_type, dtype):
    q = quantlib.quantize_4bit(weight(dtype), quant_type)
    code = bnb.functional.get_4bit_type(quant_type, device=DEVICE)
    state = bnb.functional.QuantState(q.absmax, q.shape, code, q.block_size, quant_type, dtype)
    assert_same(quantlib.dequantize_4bit(q), bnb.functional.dequantize_4bit(q.packed, state))


@every_format
@every_dtype
def test_it_quantizes_to_values_as_near(quant_type, dtype):
    """Its CUDA kernel divides by an approximation, so that near a threshold it may take the neighbour."""
    w = weight(dtype)
    theirs, state = bnb.functional.quantize_4bit(w, quant_type=quant_type, blocksize=64)
    ours = quantlib.quantize_4bit(w, quant_type, 64)
    assert_same(ours.absmax, state.absmax)
    their_codes = quantlib.formats.Quantized4bit(
        theirs, ours.absmax, None, None, None, quant_type, 64, ours.shape, ours.dtype
    )
    error, their_error = ((q.dequantize(torch.float32) - w.float()).abs().view(-1, 64) for q in (ours, their_codes))
    assert ((error - their_error).abs() <= 16 * torch.finfo(torch.float32).eps * ours.absmax[:, None]).all()


@every_format
@pytest.mark.parametrize("double_quant", [False, True])
def test_its_checkpoint_decodes_to_the_same_bits(quant_type, double_quant):
    layer = bnb.nn.Linear4bit(
        256, 128, bias=False, compress_statistics=double_quant, quant_type=quant_type, compute_dtype=torch.bfloat16
    ).to(DEVICE)
    q = checkpoint.load_4bit(layer.state_dict(prefix="layer."), "layer.").to(DEVICE)
    expected = bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state)
    assert_same(q.dequantize(expected.dtype), expected)


def test_its_int8_rows_are_ours():
    x = weight(torch.float16)
    values, absmax, _ = bnb.functional.int8_vectorwise_quant(x)
    ours = quantlib.quantize_int8(x)
    assert_same(ours.absmax, absmax)
    # Theirs multiplies by an approximate reciprocal: a value half way between two integers may go either way.
    assert (ours.values.int() - values.int()).abs().max() <= 1
