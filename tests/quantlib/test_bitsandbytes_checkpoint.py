"""Checkpoints of bitsandbytes 0.50 load here, and ours load there: containers, through safetensors files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib import checkpoint, formats, reference
from quantlib.formats import Quantized4bit, QuantizedInt8

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional extra of the tests, for parity")

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def decode(q, dtype=None):
    if isinstance(q, QuantizedInt8):
        return reference.dequantize_int8(q.values, q.absmax, q.dim, q.block_size, dtype or q.dtype)
    return reference.dequantize_4bit(*q.op_args(), q.shape, dtype or q.dtype)


def quantize(w, quant_type, double_quant, storage=torch.uint8):
    packed, absmax = reference.quantize_4bit(w, quant_type, 64)
    nested = (None, None, None)
    if double_quant:
        absmax, *nested = formats.quantize_absmax(absmax)
    packed = packed.view(-1).view(storage)[:, None]
    return Quantized4bit(packed, absmax, *nested, quant_type, 64, w.shape, w.dtype)


def their_linear_4bit(out_features, in_features, dtype, quant_type, double_quant, storage):
    layer = bnb.nn.Linear4bit(
        in_features, out_features, compress_statistics=double_quant, quant_type=quant_type, quant_storage=storage
    )
    original = layer.weight.data.to(dtype)
    layer.weight = bnb.nn.Params4bit(
        original.clone(),
        compress_statistics=double_quant,
        quant_type=quant_type,
        quant_storage=storage,
        module=layer,
    )
    return layer.to("cpu"), original


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_from_bitsandbytes(tmp_path, quant_type, double_quant, storage, dtype):
    layer, original = their_linear_4bit(48, 128, dtype, quant_type, double_quant, storage)
    assert layer.weight.bnb_quantized
    theirs = layer.state_dict(prefix="layer.")
    save_file(theirs, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")

    q = checkpoint.load_4bit(loaded, "layer.")
    assert (q.shape, q.dtype, q.quant_type, q.block_size) == (original.shape, dtype, quant_type, 64)
    assert q.double_quant == double_quant and q.packed.dtype == storage
    assert sorted([*checkpoint.keys_4bit(loaded, "layer."), "layer.bias"]) == sorted(theirs)
    assert torch.equal(decode(q), bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state))

    packed, absmax = reference.quantize_4bit(original, quant_type, 64)
    assert torch.equal(q.op_args()[0], packed)
    assert double_quant or torch.equal(q.absmax, absmax)


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.float16])
def test_4bit_entries_are_byte_for_byte_those_of_bitsandbytes(quant_type, double_quant, storage):
    layer, _ = their_linear_4bit(48, 128, torch.bfloat16, quant_type, double_quant, storage)
    theirs = layer.state_dict()
    del theirs["bias"]
    ours = checkpoint.state_dict_4bit(checkpoint.load_4bit(theirs))
    assert list(ours) == list(theirs)
    for key in theirs:
        assert ours[key].dtype == theirs[key].dtype and ours[key].shape == theirs[key].shape, key
        assert torch.equal(ours[key].reshape(-1).view(torch.uint8), theirs[key].reshape(-1).view(torch.uint8)), key


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_4bit_to_bitsandbytes(tmp_path, quant_type, double_quant, storage, dtype):
    q = quantize(torch.randn(48, 128).to(dtype), quant_type, double_quant, storage)
    save_file(checkpoint.state_dict_4bit(q, "layer."), tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    data = loaded.pop("layer.weight")
    stats = {key.removeprefix("layer.weight."): value for key, value in loaded.items()}
    theirs = bnb.nn.Params4bit.from_prequantized(data=data, quantized_stats=stats, device="cpu")

    state = theirs.quant_state
    assert (state.shape, state.dtype, state.quant_type, state.blocksize) == (q.shape, dtype, quant_type, 64)
    assert state.nested == double_quant and theirs.quant_storage == storage
    assert torch.equal(bnb.functional.dequantize_4bit(theirs.data, state), decode(q))


def test_4bit_of_a_shape_no_block_divides(tmp_path):
    """bitsandbytes' native CPU decoding is wrong here; its saved tensors are right and decode here."""
    layer, original = their_linear_4bit(40, 96, torch.float32, "nf4", False, torch.uint8)
    save_file(layer.state_dict(), tmp_path / "model.safetensors")
    q = checkpoint.load_4bit(load_file(tmp_path / "model.safetensors"))
    ours = quantize(original, "nf4", False)
    assert torch.equal(decode(q), decode(ours))


def their_linear_int8(out_features, in_features, bias=True):
    layer = bnb.nn.Linear8bitLt(in_features, out_features, bias=bias, has_fp16_weights=False, threshold=6.0)
    original = layer.weight.data.clone()
    return layer.to("cpu"), original


def test_int8_from_bitsandbytes(tmp_path):
    layer, original = their_linear_int8(48, 128)
    theirs = layer.state_dict(prefix="layer.")
    save_file(theirs, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    q = checkpoint.load_int8(loaded, "layer.")
    assert sorted([*checkpoint.keys_int8(loaded, "layer."), "layer.bias"]) == sorted(theirs)
    # bitsandbytes rounds the weight to float16 before it quantizes
    values, absmax, _ = reference.quantize_int8(original.half(), -1, None, 0.0)
    assert torch.equal(q.values, values) and torch.equal(q.absmax, absmax)
    expected = bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB)
    assert torch.equal(decode(q, torch.float32), expected)

    ours = checkpoint.state_dict_int8(q, "layer.")
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]) and value.dtype == theirs[key].dtype and value.shape == theirs[key].shape


def test_int8_to_bitsandbytes(tmp_path):
    values, absmax, _ = reference.quantize_int8(torch.randn(48, 128), -1, None, 0.0)
    q = QuantizedInt8(values, absmax, None, -1, None, torch.float32)
    save_file(checkpoint.state_dict_int8(q), tmp_path / "model.safetensors")
    layer, _ = their_linear_int8(48, 128, bias=False)
    layer.load_state_dict(load_file(tmp_path / "model.safetensors"))
    assert torch.equal(layer.weight.data, values) and torch.equal(layer.weight.SCB, absmax)
    assert torch.equal(bnb.functional.int8_vectorwise_dequant(layer.weight.data, layer.weight.SCB), decode(q))
