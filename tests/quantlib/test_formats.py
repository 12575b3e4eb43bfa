"""Codebooks, double quantization and the containers."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import formats, reference
from quantlib.formats import Quantized4bit, QuantizedInt8

QUANT_TYPES = formats.QUANT_TYPES


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_thresholds_lie_halfway_between_sorted_neighbours(quant_type):
    codebook, order = formats.codebook(quant_type), formats.sorted_codes(quant_type)
    ascending = codebook[order].double()
    assert sorted(order.tolist()) == list(range(16))
    assert (ascending.diff() >= 0).all()
    halfway = (ascending[1:] + ascending[:-1]) / 2
    torch.testing.assert_close(formats.thresholds(quant_type).double(), halfway, rtol=2**-24, atol=0)
    assert codebook.abs().max() == 1 and codebook.dtype == torch.float32


def test_fp4_is_sign_and_magnitude_in_twelfths():
    codebook = formats.codebook("fp4")
    twelfths = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=torch.float64)
    assert torch.equal(codebook[:8], (twelfths / 12).float())
    assert torch.equal(codebook[8:], -codebook[:8])
    assert not torch.signbit(codebook[8]), "bitsandbytes' second zero is positive"


def test_dynamic_codebook():
    codebook = formats.dynamic_codebook()
    assert codebook.shape == (256,) and codebook.dtype == torch.float32
    assert (codebook.diff() > 0).all()
    assert codebook[127] == 0 and codebook[255] == 1
    assert torch.equal(codebook[:127].flip(0), -codebook[128:255])
    # the last decade, (0.1, 1), has 64 steps of 0.9 / 64
    last = 0.1 + 0.9 * (torch.arange(64, dtype=torch.float64) + 0.5) / 64
    torch.testing.assert_close(codebook[191:255].double(), last, rtol=1e-6, atol=0)


def test_accessors_share_one_tensor_per_device():
    assert formats.codebook("nf4") is formats.codebook("nf4", torch.device("cpu"))
    assert formats.dynamic_codebook("meta") is formats.dynamic_codebook("meta")
    assert formats.codebook("nf4", "meta").device.type == "meta"


def test_tracing_leaves_no_fake_tensor_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    formats._copies.clear()
    with FakeTensorMode(allow_non_fake_inputs=True):
        formats.codebook("nf4", "meta")
    assert all(type(t) is torch.Tensor for t in formats._copies.values())


@settings(deadline=None, max_examples=50)
@given(blocks=st.integers(0, 700), spread=st.floats(0, 3), seed=st.integers(0, 2**31))
def test_double_quantization_is_nearest_in_the_dynamic_map(blocks, spread, seed):
    generator = torch.Generator().manual_seed(seed)
    absmax = torch.rand(blocks, generator=generator) * spread + 0.01
    codes, nested_absmax, nested_codebook, offset = formats.quantize_absmax(absmax)
    assert codes.dtype == torch.uint8 and codes.shape == (blocks,)
    assert nested_absmax.shape == (-(-blocks // 256),) and offset.shape == ()
    decoded = formats.dequantize_absmax(codes, nested_absmax, nested_codebook, offset)
    assert decoded.dtype == torch.float32

    book, scale = nested_codebook.double(), nested_absmax.double().repeat_interleave(256)[:blocks]
    residual = absmax.double() - offset.double()
    best = (residual[:, None] - book * scale[:, None]).abs().amin(1) if blocks else residual
    error = (decoded.double() - absmax.double()).abs()
    # one rounding each of absmax - offset, of the scaling, and of the two steps of decoding
    slack = 2**-23 * (absmax.double() + 3 * scale)
    assert (error <= best + slack).all()


def test_double_quantization_of_one_block_is_exact():
    absmax = torch.tensor([3.7])
    assert torch.equal(formats.dequantize_absmax(*formats.quantize_absmax(absmax)), absmax)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_double_quantization_of_a_bad_scale_is_never_finite(bad):
    absmax = torch.ones(300)
    absmax[7] = bad
    assert not formats.dequantize_absmax(*formats.quantize_absmax(absmax)).isfinite().any()


def make_4bit(shape=(6, 64), double_quant=True, storage=torch.uint8, dtype=torch.bfloat16, quant_type="nf4"):
    packed, absmax = reference.quantize_4bit(torch.randn(shape), quant_type, 64)
    nested = (None, None, None)
    if double_quant:
        absmax, *nested = formats.quantize_absmax(absmax)
    packed = packed.view(-1).view(storage)[:, None]
    return Quantized4bit(packed, absmax, *nested, quant_type, 64, torch.Size(shape), dtype)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16, torch.bfloat16, torch.float32])
def test_container_4bit(double_quant, storage):
    q = make_4bit(double_quant=double_quant, storage=storage)
    assert q.packed.shape == (192 // storage.itemsize, 1)
    packed, absmax, nested_absmax, _, _, quant_type, block_size = q.op_args()
    assert packed.dtype == torch.uint8 and packed.shape == (192, 1)
    assert (quant_type, block_size, q.double_quant) == ("nf4", 64, double_quant)
    assert (nested_absmax is not None) == double_quant and absmax is q.absmax
    assert q.nbytes == 192 + (6 + 4 + 1024 + 4 if double_quant else 24)
    for dtype in (None, torch.float32):
        decoded = q.dequantize(dtype)
        expected = reference.dequantize_4bit(*q.op_args(), q.shape, dtype or torch.bfloat16)
        assert decoded.shape == (6, 64) and torch.equal(decoded, expected)
    moved = q.to("meta")
    assert {t.device.type for t in vars(moved).values() if isinstance(t, torch.Tensor)} == {"meta"}
    assert (moved.shape, moved.dtype, moved.packed.dtype) == (q.shape, q.dtype, storage)


def test_container_int8():
    x = torch.randn(3, 5, dtype=torch.float16)
    x[1, 2] = 9
    q = QuantizedInt8(*reference.quantize_int8(x, -1, None, 6.0), -1, None, x.dtype)
    assert q.shape == (3, 5) and q.nbytes == 15 + 12 + 5
    assert q.dequantize().dtype == torch.float16
    assert torch.equal(
        q.dequantize(torch.float32), reference.dequantize_int8(q.values, q.absmax, -1, None, torch.float32)
    )
    assert q.to("meta").outliers.device.type == "meta"
    assert QuantizedInt8(q.values, q.absmax, None, -1, None, x.dtype).to("meta").outliers is None
