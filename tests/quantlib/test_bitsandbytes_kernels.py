"""Bit-exactness with bitsandbytes 0.50.

The truth is bitsandbytes' plain PyTorch implementation (`bitsandbytes.backends.default.ops`): its native CPU
kernels are wrong where a row is no multiple of the block, and choose other 8-bit codes near a threshold.
"""

import importlib.util
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import formats, reference

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra of the tests, for parity")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@pytest.fixture(scope="module")
def plain():
    """bitsandbytes' plain PyTorch kernels by op name, as functions.

    Dispatch would prefer its native kernels, so the file is loaded a second time with a `register_kernel` that
    keeps the functions, and without the torch.compile it wraps some of them in.
    """
    kernels = {}

    def keep(op, device):
        return lambda kernel: kernels.setdefault(op.removeprefix("bitsandbytes::"), kernel)

    origin = importlib.util.find_spec("bitsandbytes.backends.default.ops").origin
    spec = importlib.util.spec_from_file_location("bitsandbytes.backends.default.plain", origin)
    module = importlib.util.module_from_spec(spec)
    with (
        mock.patch("bitsandbytes._ops.register_kernel", keep),
        mock.patch("torch.compile", lambda function, **_: function),
    ):
        spec.loader.exec_module(module)
    return kernels


def assert_identical(ours, theirs):
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def values(n: int, dtype: torch.dtype, seed: int) -> torch.Tensor:
    """n numbers of magnitudes from denormal to huge, signed zeros among them, with a stretch of zeros."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, generator=generator) * 2.0 ** torch.randint(-12, 6, (n,), generator=generator)
    x[n // 3 : n // 3 + 200] = 0
    tiny, largest = torch.finfo(dtype).smallest_normal, torch.finfo(dtype).max
    x[: n // 8] *= tiny
    x[n // 8 : n // 6] *= largest / 1e4
    x[::17] *= 0
    return x.clamp(-largest, largest).to(dtype)


def test_tables(plain):
    for quant_type in formats.QUANT_TYPES:
        assert_identical(formats.codebook(quant_type), bnb.functional.get_4bit_type(quant_type, device="cpu"))
        module = plain["quantize_4bit"].__globals__
        bounds, order = module["_get_4bit_quantize_bounds"](quant_type, torch.device("cpu"))
        assert_identical(formats.thresholds(quant_type), bounds)
        assert_identical(formats.sorted_codes(quant_type), order)
    assert_identical(formats.dynamic_codebook(), bnb.functional.create_dynamic_map())


def check_4bit(plain, x, quant_type, block_size):
    packed, absmax = reference.quantize_4bit(x, quant_type, block_size)
    their_packed, their_absmax = plain["quantize_4bit"](x, block_size, quant_type, torch.uint8)
    assert_identical(packed, their_packed)
    assert_identical(absmax, their_absmax)
    for dtype in DTYPES:
        ours = reference.dequantize_4bit(packed, absmax, None, None, None, quant_type, block_size, x.shape, dtype)
        theirs = plain["dequantize_4bit"](packed, absmax, block_size, quant_type, x.shape, dtype)
        assert_identical(ours, theirs)


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit(plain, quant_type, block_size, dtype):
    for n in (2 * block_size, 5 * block_size + 18, 3 * block_size + 7, block_size - 1, 10_000):
        check_4bit(plain, values(n, dtype, n), quant_type, block_size)


@settings(deadline=None, max_examples=80)
@given(
    n=st.integers(1, 3000),
    block_size=st.sampled_from(formats.BLOCK_SIZES),
    quant_type=st.sampled_from(formats.QUANT_TYPES),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_4bit_of_any_size(plain, n, block_size, quant_type, dtype, seed):
    check_4bit(plain, values(n, dtype, seed), quant_type, block_size)


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("n", [64, 70, 256, 300])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_4bit_of_non_finite_values(plain, quant_type, n, bad):
    x = torch.randn(n)
    x[[3, n - 2]] = bad
    check_4bit(plain, x, quant_type, 64)


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
def test_4bit_at_every_threshold(plain, quant_type):
    bounds = formats.thresholds(quant_type)
    up, down = (bounds.nextafter(torch.tensor(end)) for end in (2.0, -2.0))
    for scale in (1.0, 0.37, 3.1e-5, 1.7e30):
        x = torch.cat([torch.tensor([1.0]), bounds, up, down, torch.zeros(2), -torch.zeros(16)]) * scale
        check_4bit(plain, x, quant_type, 64)  # one full block, and the same as a partial block of 4096
        check_4bit(plain, x, quant_type, 4096)


@pytest.mark.parametrize("shape, block_size", [((1152, 4304), 64), ((64, 96), 64), ((64, 32), 64), ((40, 80), 32)])
def test_4bit_where_a_row_is_no_multiple_of_the_block(plain, shape, block_size):
    w = torch.randn(shape)
    check_4bit(plain, w, "nf4", block_size)
    packed, absmax = reference.quantize_4bit(w, "nf4", block_size)
    decoded = reference.dequantize_4bit(packed, absmax, None, None, None, "nf4", block_size, shape, torch.float32)
    # half the widest gap of the NF4 codebook, times the block's absmax: what no right decoding can exceed
    bound = absmax.repeat_interleave(block_size)[: w.numel()].view(shape) * 0.1520
    assert ((decoded - w).abs() <= bound).all()


def check_double_quant(plain, absmax):
    codes, nested_absmax, nested_codebook, offset = formats.quantize_absmax(absmax)
    their_offset = absmax.mean()
    their_codes, their_absmax = plain["quantize_blockwise"](absmax - their_offset, nested_codebook, 256)
    assert_identical(offset, their_offset)
    assert_identical(codes, their_codes)
    assert_identical(nested_absmax, their_absmax)
    decoded = plain["dequantize_blockwise"](codes, nested_absmax, nested_codebook, 256, torch.float32) + offset
    assert_identical(formats.dequantize_absmax(codes, nested_absmax, nested_codebook, offset), decoded)
    return codes, nested_absmax, nested_codebook, offset


@settings(deadline=None, max_examples=60)
@given(blocks=st.integers(1, 1500), seed=st.integers(0, 2**31))
def test_double_quant_of_any_size(plain, blocks, seed):
    generator = torch.Generator().manual_seed(seed)
    check_double_quant(plain, torch.randn(blocks, generator=generator).exp())


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("shape", [(256, 64), (255, 64), (257, 64), (96, 128), (61, 67)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_double_quantized_weight(plain, quant_type, shape, dtype):
    w = torch.randn(shape).to(dtype)
    packed, absmax = reference.quantize_4bit(w, quant_type, 64)
    nested = check_double_quant(plain, absmax)
    theirs = plain["dequantize_4bit"](packed, formats.dequantize_absmax(*nested), 64, quant_type, shape, dtype)
    assert_identical(reference.dequantize_4bit(packed, *nested, quant_type, 64, shape, dtype), theirs)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_through_the_public_functions(double_quant, dtype):
    """Where its native CPU kernels are right, bitsandbytes' public functions decode to the same bits."""
    w = torch.randn(64, 256).to(dtype)
    packed, state = bnb.functional.quantize_4bit(w, compress_statistics=double_quant, quant_type="nf4")
    nested = (state.state2.absmax, state.state2.code, state.offset) if double_quant else (None, None, None)
    ours = reference.dequantize_4bit(packed, state.absmax, *nested, "nf4", 64, w.shape, dtype)
    assert_identical(ours, bnb.functional.dequantize_4bit(packed, state))


def int8_values(rows, columns, dtype, seed):
    x = values(rows * columns, dtype, seed).view(rows, columns)
    # a row so small that 127 / absmax overflows is undefined in bitsandbytes
    return torch.where(x.abs().amax(1, keepdim=True) < 1e-36, 0, x).to(dtype)


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([0.0, 0.05, 1.3, 6.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_int8_rows(plain, rows, columns, dtype, threshold, seed):
    x = int8_values(rows, columns, dtype, seed)
    ours, absmax, outliers = reference.quantize_int8(x, -1, None, threshold)
    theirs, their_absmax, columns_found = plain["int8_vectorwise_quant"](x.clone(), threshold)
    assert_identical(absmax, their_absmax)
    assert_identical(ours, theirs)
    assert outliers.nonzero().view(-1).tolist() == ([] if columns_found is None else columns_found.tolist())
    decoded = reference.dequantize_int8(ours, absmax, -1, None, torch.float32)
    assert_identical(decoded, bnb.functional.int8_vectorwise_dequant(theirs, their_absmax))


@pytest.mark.parametrize("threshold", [0.0, 3.0])
@pytest.mark.parametrize("columns", [64, 2500])
def test_int8_matmul(plain, threshold, columns):
    x, w, bias = torch.randn(33, columns), torch.randn(48, columns), torch.randn(48)
    cw, w_absmax, _ = reference.quantize_int8(w, -1, None, 0.0)
    cx, x_absmax, found = plain["int8_vectorwise_quant"](x.clone(), threshold)
    theirs, _ = plain["int8_mixed_scaled_mm"](x, cx, cw, x_absmax, w_absmax, found, bias)
    ours = reference.linear_int8(x, cw, w_absmax, bias, threshold)
    # bitsandbytes multiplies by 6.200124e-05 for 1 / 127^2, which is 1.8e-5 too much
    magnitude = x.abs() @ reference.dequantize_int8(cw, w_absmax, -1, None, torch.float32).abs().t() + bias.abs()
    assert ((ours - theirs).abs() <= 1.9e-5 * magnitude).all()
