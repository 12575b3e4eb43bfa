"""State-dict entries: round trips, and one clear error for every way in which a file can be wrong."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantlib import checkpoint, formats, reference
from quantlib.formats import Quantized4bit, QuantizedInt8

PREFIX = "model.layers.0.q_proj."
BLOB = PREFIX + "weight.quant_state.bitsandbytes__nf4"


def make_4bit(shape=(6, 96), double_quant=True, storage=torch.uint8, dtype=torch.bfloat16, quant_type="nf4"):
    packed, absmax = reference.quantize_4bit(torch.randn(shape), quant_type, 64)
    nested = (None, None, None)
    if double_quant:
        absmax, *nested = formats.quantize_absmax(absmax)
    packed = packed.view(-1).view(storage)[:, None]
    return Quantized4bit(packed, absmax, *nested, quant_type, 64, torch.Size(shape), dtype)


def plain(value):
    """A tensor as dtype, shape and bytes: codes viewed as floats may be NaN, which equals nothing."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.dtype, value.shape, value.reshape(-1).view(torch.uint8).tolist()


def assert_same(a, b):
    assert {k: plain(v) for k, v in vars(a).items()} == {k: plain(v) for k, v in vars(b).items()}


def blob(**fields) -> torch.Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


FIELDS = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 96]}
NESTED = {"nested_blocksize": 256, "nested_dtype": "float32", "nested_offset": 0.5}


@pytest.mark.parametrize("quant_type", formats.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
@pytest.mark.parametrize("shape", [(6, 96), (5, 4, 8), (96,), (4, 1)])
def test_4bit_round_trip_through_a_file(tmp_path, quant_type, double_quant, storage, shape):
    q = make_4bit(shape, double_quant, storage, quant_type=quant_type)
    path = tmp_path / "model.safetensors"
    entries = checkpoint.state_dict_4bit(q, PREFIX)
    other = {PREFIX + "bias": torch.zeros(6), "model.layers.0.q_proj2.weight": torch.zeros(6)}
    save_file({**entries, **other}, path)
    loaded = load_file(path)
    assert sorted(checkpoint.keys_4bit(loaded, PREFIX)) == sorted(entries)
    assert_same(checkpoint.load_4bit(loaded, PREFIX), q)


@pytest.mark.parametrize("shape", [(3, 5), (0, 4), (1, 1)])
def test_4bit_round_trip_of_odd_and_empty_weights(shape):
    q = make_4bit(shape)
    assert_same(checkpoint.load_4bit(checkpoint.state_dict_4bit(q)), q)


def test_4bit_entries_of_several_modules_share_no_memory(tmp_path):
    a, b = make_4bit(), make_4bit()
    assert a.nested_codebook is b.nested_codebook
    save_file(
        {**checkpoint.state_dict_4bit(a, "a."), **checkpoint.state_dict_4bit(b, "b.")}, tmp_path / "x.safetensors"
    )


def test_4bit_blob_is_the_json_of_bitsandbytes():
    q = make_4bit(double_quant=False)
    assert bytes(checkpoint.state_dict_4bit(q, PREFIX)[BLOB].tolist()) == (
        b'{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [6, 96]}'
    )


DAMAGE_4BIT = {
    "no weight": ({"weight": None}, "weight'"),
    "no absmax": ({"weight.absmax": None}, "weight.absmax"),
    "no quant_map": ({"weight.quant_map": None}, "weight.quant_map"),
    "no nested_absmax": ({"weight.nested_absmax": None}, "weight.nested_absmax"),
    "no nested_quant_map": ({"weight.nested_quant_map": None}, "weight.nested_quant_map"),
    "no blob": ({"weight.quant_state.bitsandbytes__nf4": None}, "bitsandbytes__nf4"),
    "two blobs": ({"weight.quant_state.bitsandbytes__fp4": blob(**FIELDS, **NESTED)}, "bitsandbytes__fp4"),
    "not a tensor": ({"weight.absmax": [1.0]}, "weight.absmax.* is a list"),
    "weight too short": ({"weight": torch.zeros(287, 1, dtype=torch.uint8)}, "weight'.*287 bytes.*288 bytes"),
    "weight in a row": ({"weight": torch.zeros(1, 288, dtype=torch.uint8)}, "in one column"),
    "weight of int8": ({"weight": torch.zeros(288, 1, dtype=torch.int8)}, "weight' is int8"),
    "absmax too long": ({"weight.absmax": torch.zeros(10, dtype=torch.uint8)}, r"absmax.*\[10\].*\[9\]"),
    "absmax in two dimensions": ({"weight.absmax": torch.zeros(9, 1, dtype=torch.uint8)}, r"absmax.*\[9, 1\]"),
    "absmax of bfloat16": ({"weight.absmax": torch.zeros(9, dtype=torch.bfloat16)}, "absmax' is bfloat16"),
    "nested_absmax too long": ({"weight.nested_absmax": torch.zeros(2)}, r"nested_absmax.*\[2\].*\[1\]"),
    "nested_quant_map too short": ({"weight.nested_quant_map": torch.zeros(255)}, r"nested_quant_map.*\[255\]"),
    "another codebook": ({"weight.quant_map": formats.codebook("fp4")}, "weight.quant_map.* not the nf4 codebook"),
    "a codebook with a NaN": ({"weight.quant_map": torch.full((16,), float("nan"))}, "weight.quant_map"),
    "a short codebook": ({"weight.quant_map": torch.zeros(15)}, r"quant_map.*\[15\]"),
    "single absmax, nested blob": ({"weight.absmax": torch.zeros(9)}, "absmax' is float32"),
}
BAD_BLOBS = {
    "empty": torch.zeros(0, dtype=torch.uint8),
    "truncated": blob(**FIELDS)[:-7],
    "not UTF-8": torch.full((40,), 0xFF, dtype=torch.uint8),
    "deeply nested": torch.full((200_000,), ord("["), dtype=torch.uint8),
    "not uint8": blob(**FIELDS).int(),
    "two-dimensional": blob(**FIELDS)[None],
    "a list": torch.tensor(list(b"[1, 2]"), dtype=torch.uint8),
    "a number": torch.tensor(list(b"7"), dtype=torch.uint8),
    "no shape": blob(quant_type="nf4", blocksize=64, dtype="bfloat16"),
    "half nested": blob(**FIELDS, nested_blocksize=256),
    "unknown field": blob(**FIELDS, packing_format="cpu"),
    "quant type int4": blob(**{**FIELDS, "quant_type": "int4"}),
    "quant type of another key": blob(**{**FIELDS, "quant_type": "fp4"}),
    "quant type a list": blob(**{**FIELDS, "quant_type": ["nf4"]}),
    "block size 0": blob(**{**FIELDS, "blocksize": 0}),
    "block size 48": blob(**{**FIELDS, "blocksize": 48}),
    "block size 8192": blob(**{**FIELDS, "blocksize": 8192}),
    "block size of float": blob(**{**FIELDS, "blocksize": 64.0}),
    "dtype float64": blob(**{**FIELDS, "dtype": "float64"}),
    "dtype None": blob(**{**FIELDS, "dtype": None}),
    "shape None": blob(**{**FIELDS, "shape": None}),
    "shape negative": blob(**{**FIELDS, "shape": [-6, -96]}),
    "shape huge": blob(**{**FIELDS, "shape": [2**70, 4]}),
    "shape of text": blob(**{**FIELDS, "shape": ["6", "96"]}),
    "shape of booleans": blob(**{**FIELDS, "shape": [True, 576]}),
    "nested block size": blob(**FIELDS, **{**NESTED, "nested_blocksize": 128}),
    "nested dtype": blob(**FIELDS, **{**NESTED, "nested_dtype": "float16"}),
    "nested offset": blob(**FIELDS, **{**NESTED, "nested_offset": "x"}),
    "nested offset huge": blob(**FIELDS, **{**NESTED, "nested_offset": 10**400}),
}


@pytest.mark.parametrize("damage", DAMAGE_4BIT)
def test_damaged_4bit_entries(damage):
    changes, message = DAMAGE_4BIT[damage]
    state_dict = checkpoint.state_dict_4bit(make_4bit(), PREFIX)
    for name, value in changes.items():
        if value is None:
            del state_dict[PREFIX + name]
        else:
            state_dict[PREFIX + name] = value
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_4bit(state_dict, PREFIX)
    assert PREFIX + "weight" in str(error.value)


@pytest.mark.parametrize("damage", BAD_BLOBS)
def test_damaged_4bit_blobs(damage):
    state_dict = {**checkpoint.state_dict_4bit(make_4bit(), PREFIX), BLOB: BAD_BLOBS[damage]}
    with pytest.raises(ValueError, match=r"model\.layers\.0\.q_proj\.weight\.quant_state\.bitsandbytes__nf4"):
        checkpoint.load_4bit(state_dict, PREFIX)


def test_a_shape_whose_product_is_huge_names_the_weight():
    state_dict = {**checkpoint.state_dict_4bit(make_4bit(), PREFIX), BLOB: blob(**{**FIELDS, "shape": [2**62, 2**62]})}
    with pytest.raises(ValueError, match="weight'"):
        checkpoint.load_4bit(state_dict, PREFIX)


def test_an_unknown_quant_type_in_the_key():
    state_dict = checkpoint.state_dict_4bit(make_4bit(), PREFIX)
    del state_dict[BLOB]
    key = BLOB.replace("nf4", "int4")
    state_dict[key] = blob(**{**FIELDS, "quant_type": "int4"})
    with pytest.raises(ValueError, match="int4.*nf4, fp4"):
        checkpoint.load_4bit(state_dict, PREFIX)


def test_nested_entries_without_nested_fields():
    state_dict = checkpoint.state_dict_4bit(make_4bit(), PREFIX)
    state_dict |= checkpoint.state_dict_4bit(make_4bit(double_quant=False), PREFIX)
    with pytest.raises(ValueError, match=r"weight\.nested_absmax.*nested_offset"):
        checkpoint.load_4bit(state_dict, PREFIX)


def make_int8(rows=4, columns=6):
    w = torch.randn(rows, columns, dtype=torch.float16)
    values, absmax, _ = reference.quantize_int8(w, -1, None, 0.0)
    return QuantizedInt8(values, absmax, None, -1, None, torch.float16)


@pytest.mark.parametrize("shape", [(4, 6), (0, 6), (1, 1)])
def test_int8_round_trip_through_a_file(tmp_path, shape):
    q = make_int8(*shape)
    entries = checkpoint.state_dict_int8(q, PREFIX)
    save_file({**entries, PREFIX + "bias": torch.zeros(4)}, tmp_path / "model.safetensors")
    loaded = load_file(tmp_path / "model.safetensors")
    assert sorted(checkpoint.keys_int8(loaded, PREFIX)) == sorted(entries)
    assert_same(checkpoint.load_int8(loaded, PREFIX), q)


def test_int8_without_weight_format_is_row_major():
    q = make_int8()
    state_dict = checkpoint.state_dict_int8(q, PREFIX)
    del state_dict[PREFIX + "weight_format"]
    assert_same(checkpoint.load_int8(state_dict, PREFIX), q)


DAMAGE_INT8 = {
    "no weight": ({"weight": None}, "weight"),
    "no SCB": ({"SCB": None}, "SCB"),
    "a float weight": ({"weight": torch.zeros(4, 6)}, "weight' is float32"),
    "a flat weight": ({"weight": torch.zeros(24, dtype=torch.int8)}, r"weight' .*\[24\]"),
    "SCB too long": ({"SCB": torch.zeros(5)}, r"SCB.*\[5\].*\[4\]"),
    "SCB of float16": ({"SCB": torch.zeros(4).half()}, "SCB' is float16"),
    "column format": ({"weight_format": torch.tensor(1, dtype=torch.uint8)}, "weight_format' is 1"),
    "two formats": ({"weight_format": torch.zeros(2, dtype=torch.uint8)}, "weight_format"),
    "format as text": ({"weight_format": "row"}, "weight_format.* is a str"),
}


@pytest.mark.parametrize("damage", DAMAGE_INT8)
def test_damaged_int8_entries(damage):
    changes, message = DAMAGE_INT8[damage]
    state_dict = checkpoint.state_dict_int8(make_int8(), PREFIX)
    for name, value in changes.items():
        if value is None:
            del state_dict[PREFIX + name]
        else:
            state_dict[PREFIX + name] = value
    with pytest.raises(ValueError, match=message) as error:
        checkpoint.load_int8(state_dict, PREFIX)
    assert PREFIX in str(error.value)


def test_only_rows_of_a_matrix_have_an_int8_format():
    x = torch.randn(4, 6)
    for dim, block_size in ((0, None), (None, None), (None, 4)):
        values, absmax, _ = reference.quantize_int8(x, dim, block_size, 0.0)
        with pytest.raises(ValueError, match="dim=-1"):
            checkpoint.state_dict_int8(QuantizedInt8(values, absmax, None, dim, block_size, x.dtype))
