"""Every registered op: `opcheck` (schema, fake, autograd, AOT dispatch), and the checks of bad arguments."""

import pytest
import torch

from quantlib import backends, ops, quantize_4bit, quantize_int8
from quantlib.__main__ import example_args


@pytest.mark.parametrize("dtype", ops.FLOAT_DTYPES)
@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_opcheck(op, dtype):
    torch.library.opcheck(getattr(torch.ops.quantlib, op).default, example_args(dtype=dtype)[op])


@pytest.mark.parametrize("op", ["quantize_4bit", "linear_4bit", "linear_int8", "quantize_int8", "dropout"])
def test_opcheck_transposed_and_empty_inputs(op):
    first, *rest = example_args()[op]
    for x in (first.repeat(2, 1).t().contiguous().t()[::2], first[:0]):
        torch.library.opcheck(getattr(torch.ops.quantlib, op).default, (x, *rest))


@pytest.mark.parametrize("op", ops.SCHEMAS)
def test_fake_agrees_with_the_reference(op):
    """opcheck compares the fake with the CPU kernel; other devices run the reference."""
    args = example_args()[op]
    real = backends._reference(op)(*args)
    fake = getattr(torch.ops.quantlib, op)(*(a.to("meta") if isinstance(a, torch.Tensor) else a for a in args))
    for r, f in zip(
        (real,) if isinstance(real, torch.Tensor) else real,
        (fake,) if isinstance(fake, torch.Tensor) else fake,
        strict=True,
    ):
        assert (r.shape, r.dtype, r.stride()) == (f.shape, f.dtype, f.stride())


Q4 = quantize_4bit(torch.linspace(-1, 1, 24 * 96).view(24, 96), double_quant=True)
Q8 = quantize_int8(torch.linspace(-1, 1, 24 * 96).view(24, 96))
X = torch.ones(5, 96)


def _weight(**changes):
    names = ("packed", "absmax", "nested_absmax", "nested_codebook", "offset", "quant_type", "block_size")
    return tuple(changes.get(name, value) for name, value in zip(names, Q4.op_args(), strict=True))


@pytest.mark.parametrize(
    ("op", "args", "error", "words"),
    [
        ("quantize_4bit", (X, "int4", 64), ValueError, "quant_type is 'int4'.*nf4, fp4"),
        ("quantize_4bit", (X, "nf4", 63), ValueError, "block_size is 63.*32, 64"),
        ("quantize_4bit", (X.long(), "nf4", 64), TypeError, "x is torch.int64.*float32"),
        ("quantize_4bit", (X.double(), "nf4", 64), TypeError, "x is torch.float64.*quantlib.reference"),
        ("dequantize_4bit", (*_weight(), [24, 95], torch.float32), ValueError, "packed has 1152 elements.* has 1140"),
        ("dequantize_4bit", (*_weight(), [24, 96], torch.int8), TypeError, "dtype is torch.int8"),
        ("dequantize_4bit", (*_weight(offset=None), [24, 96], torch.float32), ValueError, "come together"),
        ("dequantize_4bit", (*_weight(absmax=X), [24, 96], torch.float32), TypeError, "absmax is torch.float32"),
        ("linear_4bit", (X[:, :95], *_weight(), 24, None), ValueError, "packed has 1152 elements"),
        ("linear_4bit", (X[0, 0], *_weight(), 24, None), ValueError, "at least one dimension"),
        ("linear_4bit", (X, *_weight(), 24, torch.ones(23)), ValueError, r"bias has shape \(23,\).*\(24,\)"),
        ("linear_4bit", (X, *_weight(), 24, torch.ones(24).half()), TypeError, "bias is torch.float16 and x is"),
        ("linear_4bit", (X.to("meta"), *_weight(), 24, None), ValueError, "x is on meta and packed on cpu"),
        ("linear_4bit_dx", (X, *_weight(), 96), ValueError, "packed has 1152 elements"),
        ("embedding_4bit", (X, *_weight(), 24, 96, torch.float32), TypeError, "indices is torch.float32"),
        ("quantize_int8", (X, 1, None, 0.0), ValueError, "dim is 1; allowed: -1"),
        ("quantize_int8", (X, -1, 64, 0.0), ValueError, "blocks take dim=None"),
        ("quantize_int8", (X[None], 0, None, 0.0), ValueError, "takes a matrix"),
        ("quantize_int8", (X, 0, None, 6.0), ValueError, "outlier columns need dim=-1"),
        ("quantize_int8", (X, -1, None, float("nan")), ValueError, "threshold is nan"),
        ("dequantize_int8", (Q8.values, Q8.absmax[:3], -1, None, torch.float32), ValueError, r"\(3,\).*\(24,\)"),
        ("linear_int8", (X[:, :95], Q8.values, Q8.absmax, None, 0.0), ValueError, "in_features = 96"),
        ("linear_int8", (X, Q8.values.short(), Q8.absmax, None, 0.0), TypeError, "values is torch.int16"),
        ("linear_int8", (X, Q8.values, Q8.absmax.double(), None, 0.0), TypeError, "absmax is torch.float64"),
        ("linear_int8", (X, Q8.values[0], Q8.absmax, None, 0.0), ValueError, "a weight is"),
        ("linear_int8_dx", (X, Q8.values, Q8.absmax), ValueError, "out_features = 24"),
        ("dropout", (X, torch.tensor([1]), 1.0), ValueError, "p is 1.0"),
        ("dropout", (X, torch.tensor([1.0]), 0.5), ValueError, "one int64"),
    ],
)
def test_bad_arguments(op, args, error, words):
    with pytest.raises(error, match=f"quantlib.{op}: .*{words}"):
        ops.CHECKS[op](*args)


@pytest.mark.parametrize("op", ["dequantize_4bit", "linear_4bit", "linear_4bit_dx", "linear_int8", "linear_int8_dx"])
def test_the_kernel_itself_refuses_what_would_read_out_of_bounds(op):
    """A caller who goes past the public functions gets an error, not a crash."""
    args = list(example_args()[op])
    weight = next(i for i, a in enumerate(args) if isinstance(a, torch.Tensor) and a.dtype in (torch.uint8, torch.int8))
    args[weight] = args[weight][:3]
    with pytest.raises((RuntimeError, ValueError)):
        getattr(torch.ops.quantlib, op)(*args)
