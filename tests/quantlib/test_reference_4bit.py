"""The 4-bit references against definitions written another way, in float64 or in plain Python."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from quantlib import formats, reference

QUANT_TYPES = formats.QUANT_TYPES
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
NAN, INF = float("nan"), float("inf")
SMALLEST = torch.tensor(1e-38)  # the least absmax of a last, partial block
ZERO_CODE = {"nf4": 7, "fp4": 0}
ONE_CODE = {"nf4": 15, "fp4": 3}


def codes_of(packed):
    return torch.stack([packed >> 4, packed & 15], -1).view(-1)


def decode(q, shape, dtype=torch.float32, quant_type="nf4", block_size=64):
    packed, absmax, *nested = q
    return reference.dequantize_4bit(packed, absmax, *(nested or (None,) * 3), quant_type, block_size, shape, dtype)


def double_quantized(x, quant_type="nf4", block_size=64):
    packed, absmax = reference.quantize_4bit(x, quant_type, block_size)
    return packed, *formats.quantize_absmax(absmax)


def strided(x, layout):
    """The same values with other strides."""
    if layout == "transposed":
        return x.t().contiguous().t()
    if layout == "sliced":
        padded = x.new_full((x.shape[0], 2 * x.shape[1] + 1), NAN)
        padded[:, 1::2] = x
        return padded[:, 1::2]
    return x


@settings(deadline=None, max_examples=80)
@given(
    rows=st.integers(0, 20),
    columns=st.integers(0, 130),
    layout=st.sampled_from(["contiguous", "transposed", "sliced"]),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    quant_type=st.sampled_from(QUANT_TYPES),
    block_size=st.sampled_from(formats.BLOCK_SIZES),
    exponent=st.integers(-14, 12),
    seed=st.integers(0, 2**31),
)
def test_quantize_chooses_the_nearest_code(rows, columns, layout, dtype, quant_type, block_size, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    x = strided((torch.randn(rows, columns, generator=generator) * 2.0**exponent).to(dtype), layout)
    packed, absmax = reference.quantize_4bit(x, quant_type, block_size)
    n = rows * columns
    assert packed.shape == (-(-n // 2), 1) and packed.dtype == torch.uint8
    assert absmax.shape == (-(-n // block_size),)
    assert absmax.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)

    flat = x.double().reshape(-1)
    codes = codes_of(packed)
    if n % 2:
        assert codes[-1] == ZERO_CODE[quant_type]
    codes = codes[:n].long()
    codebook = formats.codebook(quant_type).double()
    for i in range(0, n, block_size):
        block, scale = flat[i : i + block_size], absmax[i // block_size].double()
        assert scale == block.abs().max().clamp(min=0 if len(block) == block_size else 1e-38).to(absmax.dtype)
        distance = (block[:, None] - codebook * scale).abs()
        chosen = distance.gather(1, codes[i : i + block_size, None]).squeeze(1)
        assert (chosen <= distance.amin(1) + 2**-22 * scale).all()

    decoded = decode((packed, absmax), x.shape, torch.float64, quant_type, block_size)
    scales = absmax.double().repeat_interleave(block_size)[:n]
    assert torch.equal(decoded.view(-1), codebook[codes] * scales)
    for low in DTYPES:
        # float32 times float32 is exact in float64, so this rounds twice only where float32 itself does
        expected = (codebook[codes].float() * scales.float()).to(low)
        assert torch.equal(decode((packed, absmax), x.shape, low, quant_type, block_size).view(-1), expected)


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("block_size", formats.BLOCK_SIZES)
@pytest.mark.parametrize("n", [1, 31, 4096, 4097, 9001])
def test_quantizing_what_was_decoded_changes_nothing(quant_type, block_size, n):
    x = torch.randn(n)
    q = reference.quantize_4bit(x, quant_type, block_size)
    decoded = decode(q, (n,), torch.float32, quant_type, block_size)
    packed, absmax = reference.quantize_4bit(decoded, quant_type, block_size)
    assert torch.equal(absmax, q[1]), "the largest value of each block has code 1 or -1"
    again = decode((packed, absmax), (n,), torch.float32, quant_type, block_size)
    assert torch.equal(again, decoded)
    if quant_type == "nf4":  # fp4 has two codes of value 0
        assert torch.equal(packed, q[0])


@pytest.mark.parametrize("quant_type", QUANT_TYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_blocks(quant_type, dtype):
    packed, absmax = reference.quantize_4bit(torch.zeros(64 + 10, dtype=dtype), quant_type, 64)
    assert (codes_of(packed) == ZERO_CODE[quant_type]).all()
    assert absmax.tolist() == [0.0, SMALLEST.item()]
    decoded = decode((packed, absmax), (74,), dtype, quant_type)
    assert (decoded == 0).all() and not torch.signbit(decoded).any()


@pytest.mark.parametrize("n", [64, 40])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_non_finite_values_stay_in_their_block(quant_type, n):
    x = torch.randn(64 + n)
    for bad in (NAN, INF, -INF):
        y = x.clone()
        y[64 + 5] = bad
        packed, absmax = reference.quantize_4bit(y, quant_type, 64)
        clean_packed, clean_absmax = reference.quantize_4bit(x, quant_type, 64)
        assert torch.equal(packed[:32], clean_packed[:32]) and absmax[0] == clean_absmax[0]
        codes, decoded = codes_of(packed)[64 : 64 + n], decode((packed, absmax), y.shape, quant_type=quant_type)
        assert torch.equal(decoded[:64].isfinite(), torch.ones(64, dtype=torch.bool))
        if math.isnan(bad):
            assert absmax[1].isnan() and (codes == ONE_CODE[quant_type]).all() and decoded[64:].isnan().all()
        else:
            assert absmax[1] == INF and codes[5] == ONE_CODE[quant_type] and decoded[69] == INF
            others = torch.arange(n) != 5
            assert (codes[others] == ZERO_CODE[quant_type]).all() and decoded[64:][others].isnan().all()


@pytest.mark.parametrize("scale", [1e-45, 1e-40, 2e-38, 1e38, 3.4e38])
def test_denormal_and_huge_blocks_decode_to_something_finite(scale):
    x = torch.randn(64).clamp(-1, 1) * scale
    x[0] = scale
    q = reference.quantize_4bit(x, "nf4", 64)
    decoded = decode(q, (64,))
    assert decoded.isfinite().all() and q[1] == x.abs().max()
    if scale > 1e-38:
        assert ((decoded - x).abs() <= 0.1520 * scale).all()


def test_float16_overflow_decodes_to_infinity():
    packed, absmax = reference.quantize_4bit(torch.full((64,), 1e6), "nf4", 64)
    assert (decode((packed, absmax), (64,), torch.float16) == INF).all()


def weights(shape, dtype=torch.float32, quant_type="nf4", block_size=64, nested=True):
    w = torch.randn(shape).to(dtype)
    if nested:
        return (*double_quantized(w, quant_type, block_size), quant_type, block_size)
    return (*reference.quantize_4bit(w, quant_type, block_size), None, None, None, quant_type, block_size)


@settings(deadline=None, max_examples=50)
@given(
    rows=st.integers(1, 40),
    dim=st.integers(0, 130),
    block_size=st.sampled_from((32, 64, 256, 4096)),
    quant_type=st.sampled_from(QUANT_TYPES),
    nested=st.booleans(),
    dtype=st.sampled_from((*DTYPES, torch.float64)),
    index_dtype=st.sampled_from((torch.int64, torch.int32)),
    data=st.data(),
)
def test_embedding_gathers_rows(rows, dim, block_size, quant_type, nested, dtype, index_dtype, data):
    args = weights((rows, dim), torch.float32, quant_type, block_size, nested)
    picked = data.draw(st.lists(st.integers(0, rows - 1), max_size=12))
    shape = data.draw(st.sampled_from([(len(picked),), (1, len(picked), 1)]))
    indices = torch.tensor(picked, dtype=index_dtype).view(shape)
    table = reference.dequantize_4bit(*args, (rows, dim), dtype)
    out = reference.embedding_4bit(indices, *args, rows, dim, dtype)
    assert out.dtype == dtype and torch.equal(out, table[indices.long()])


@pytest.mark.parametrize("index", [-1, 7])
def test_embedding_refuses_rows_out_of_range(index):
    with pytest.raises(IndexError):
        reference.embedding_4bit(torch.tensor([0, index]), *weights((7, 64)), 7, 64, torch.float32)


UNIT = {torch.float32: 2**-24, torch.float16: 2**-11, torch.bfloat16: 2**-8}


@settings(deadline=None, max_examples=60)
@given(
    lead=st.sampled_from([(), (0,), (1,), (5,), (2, 3)]),
    out_features=st.integers(1, 40),
    in_features=st.integers(1, 150),
    dtype=st.sampled_from(DTYPES),
    nested=st.booleans(),
    with_bias=st.booleans(),
    layout=st.sampled_from(["contiguous", "sliced"]),
)
def test_linear_and_dx_against_float64(lead, out_features, in_features, dtype, nested, with_bias, layout):
    args = weights((out_features, in_features), nested=nested)
    w = reference.dequantize_4bit(*args, (out_features, in_features), dtype).double()
    x, dy = torch.randn(*lead, in_features).to(dtype), torch.randn(*lead, out_features).to(dtype)
    if x.dim() == 2:
        x, dy = strided(x, layout), strided(dy, layout)
    bias = torch.randn(out_features).to(dtype) if with_bias else None

    y = reference.linear_4bit(x, *args, out_features, bias)
    dx = reference.linear_4bit_dx(dy, *args, in_features)
    shift = 0 if bias is None else bias.double()
    for ours, exact, magnitude, terms in (
        (y, x.double() @ w.t() + shift, x.double().abs() @ w.abs().t() + abs(shift), in_features + 1),
        (dx, dy.double() @ w, dy.double().abs() @ w.abs(), out_features),
    ):
        assert ours.dtype == dtype and ours.shape == exact.shape
        # a float32 sum, and, where torch does not fuse the bias, two roundings to dtype
        bound = terms * 2**-23 * magnitude + 3 * UNIT[dtype] * magnitude
        assert ((ours.double() - exact).abs() <= bound + torch.finfo(dtype).smallest_normal).all()


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", QUANT_TYPES)
def test_linear_is_differentiable_in_float64(nested, quant_type):
    args = weights((6, 11), quant_type=quant_type, block_size=32, nested=nested)
    x = torch.randn(2, 3, 11, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(6, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, b: reference.linear_4bit(x, *args, 6, b), (x, bias))
    assert torch.autograd.gradcheck(lambda dy: reference.linear_4bit_dx(dy, *args, 11), (dy,))
    (dx,) = torch.autograd.grad(reference.linear_4bit(x, *args, 6, bias), x, dy)
    torch.testing.assert_close(dx, reference.linear_4bit_dx(dy, *args, 11), rtol=1e-13, atol=1e-13)


def test_non_finite_activations():
    args = weights((6, 64))
    x = torch.zeros(4, 64)
    x[1, 3], x[2, 5] = NAN, INF
    y = reference.linear_4bit(x, *args, 6, None)
    assert y[1].isnan().all() and not y[2].isfinite().any() and (y[[0, 3]] == 0).all()


def test_on_meta_and_compiled_without_graph_breaks():
    """No shape depends on data, nothing waits for a device, and the tracer sees one graph."""
    args = weights((6, 96))
    x, dy, indices = torch.randn(5, 96), torch.randn(5, 6), torch.tensor([2, 5])
    calls = {
        reference.quantize_4bit: (x, "fp4", 64),
        reference.dequantize_4bit: (*args, (6, 96), torch.bfloat16),
        reference.linear_4bit: (x, *args, 6, None),
        reference.linear_4bit_dx: (dy, *args, 96),
        reference.embedding_4bit: (indices, *args, 6, 96, torch.float32),
    }
    for function, arguments in calls.items():
        expected = function(*arguments)
        on_meta = function(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in arguments))
        compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(*arguments)
        results = (expected, on_meta, compiled)
        for e, m, c in zip(*(r if isinstance(r, tuple) else (r,) for r in results), strict=True):
            assert (m.shape, m.dtype) == (e.shape, e.dtype)
            assert torch.equal(c, e)
