"""Linear4bit, Linear8bit and Embedding4bit as modules: casts, copies, state dicts, bitsandbytes' checkpoints."""

import copy
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantlib import Embedding4bit, Linear4bit, Linear8bit

IN, OUT = 128, 48


def _layers():
    yield "nf4", Linear4bit(IN, OUT)
    yield "fp4, single quant, no bias", Linear4bit(IN, OUT, bias=False, quant_type="fp4", double_quant=False)
    yield "bfloat16 storage", Linear4bit(IN, OUT, quant_storage=torch.bfloat16)
    yield "int8", Linear8bit(IN, OUT)
    yield "embedding", Embedding4bit(OUT, IN)


each_layer = pytest.mark.parametrize(("name", "layer"), list(_layers()), ids=[name for name, _ in _layers()])


def _input(layer):
    return torch.arange(7) if isinstance(layer, Embedding4bit) else torch.randn(7, IN)


def _fresh(layer):
    """A layer of the same kind and format with other contents."""
    if isinstance(layer, Linear8bit):
        return Linear8bit(IN, OUT, bias=layer.bias is not None)
    options = {"quant_type": layer.quant_type, "double_quant": layer.double_quant, "quant_storage": layer.quant_storage}
    if isinstance(layer, Embedding4bit):
        return Embedding4bit(OUT, IN, **options)
    return Linear4bit(IN, OUT, bias=layer.bias is not None, **options)


def _same(a, b):
    x = _input(a)
    return torch.equal(a(x), b(x)) and torch.equal(a.dequantize(), b.dequantize())


@each_layer
def test_is_the_layer_it_replaces(name, layer):
    assert isinstance(layer, nn.Embedding if name == "embedding" else nn.Linear)
    assert layer(_input(layer)).shape[-1] == (IN if name == "embedding" else OUT)
    assert layer.dequantize().shape == (OUT, IN)
    assert not layer.weight.requires_grad
    assert layer.W_q is layer.weight
    assert str(IN) in repr(layer)


@each_layer
@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_copies(name, layer, how):
    twin = how(layer)
    assert _same(layer, twin)
    assert twin.weight.data_ptr() != layer.weight.data_ptr()


@each_layer
def test_state_dict_round_trip_through_safetensors(name, layer, tmp_path):
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    twin = _fresh(layer)
    assert not _same(layer, twin)
    result = twin.load_state_dict(state)
    assert not result.missing_keys and not result.unexpected_keys
    assert _same(layer, twin)


@each_layer
def test_state_dict_into_a_meta_layer(name, layer):
    with torch.device("meta"):
        twin = _fresh(layer)
    assert twin.weight.is_meta
    twin.load_state_dict(layer.state_dict(), assign=True)
    assert _same(layer, twin)


@each_layer
def test_state_dict_keeps_a_prefix_and_its_neighbours(name, layer):
    model = nn.Sequential(nn.LayerNorm(IN), layer, nn.LayerNorm(OUT))
    state = model.state_dict()
    assert [key for key in state if not key.startswith("1.")] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    twin = nn.Sequential(nn.LayerNorm(IN), _fresh(layer), nn.LayerNorm(OUT))
    twin.load_state_dict(state)
    assert _same(twin[1], layer)


@each_layer
def test_loading_a_float_weight_quantizes_it(name, layer):
    weight = torch.randn(OUT, IN)
    state = {"weight": weight} | ({"bias": torch.ones(OUT)} if getattr(layer, "bias", None) is not None else {})
    twin = _fresh(layer)
    twin.load_state_dict(state)
    expected = _fresh(layer)
    expected.quantize_(weight)
    assert torch.equal(twin.dequantize(), expected.dequantize())


@each_layer
def test_a_missing_or_damaged_checkpoint_is_an_error(name, layer):
    state = dict(layer.state_dict())
    weight = next(key for key in state if key == "weight")
    with pytest.raises(RuntimeError, match="Missing key.*weight"):
        _fresh(layer).load_state_dict({k: v for k, v in state.items() if not k.startswith(("weight", "SCB"))})
    with pytest.raises(RuntimeError, match="weight"):
        _fresh(layer).load_state_dict(state | {weight: state[weight][:-1]})
    scales = next(key for key in state if key in ("weight.absmax", "SCB"))
    with pytest.raises(RuntimeError, match=scales):
        _fresh(layer).load_state_dict({k: v for k, v in state.items() if k != scales})
    with pytest.raises(RuntimeError, match="Unexpected key.*extra"):
        _fresh(layer).load_state_dict(state | {"extra": torch.ones(1)})


def test_a_checkpoint_of_another_shape_is_an_error():
    with pytest.raises(RuntimeError, match=r"weight holds a quantized tensor of shape \(48, 128\).*\(128, 48\)"):
        Linear4bit(OUT, IN, bias=False).load_state_dict(Linear4bit(IN, OUT, bias=False).state_dict())


@each_layer
@pytest.mark.parametrize("cast", ["half", "bfloat16", "float", "double"])
def test_casts_leave_the_packed_weight_alone(name, layer, cast):
    before = copy.deepcopy(layer)
    after = getattr(copy.deepcopy(layer), cast)()
    assert torch.equal(before.dequantize(torch.float32), after.dequantize(torch.float32))
    for scale in layer._scales:
        if getattr(layer, scale) is not None:
            assert getattr(after, scale).dtype == getattr(layer, scale).dtype
    if getattr(layer, "bias", None) is not None:
        assert after.bias.dtype == {"half": torch.float16, "bfloat16": torch.bfloat16}.get(
            cast, torch.float64 if cast == "double" else torch.float32
        )


@each_layer
def test_moving_to_meta_and_back_keeps_shapes(name, layer):
    meta = copy.deepcopy(layer).to("meta")
    assert meta.weight.is_meta and meta.absmax.is_meta
    assert meta.weight.shape == layer.weight.shape and meta.weight.dtype == layer.weight.dtype


def test_compute_dtype():
    layer = Linear4bit(IN, OUT, compute_dtype=torch.bfloat16)
    x = torch.randn(3, IN)
    y = layer(x)
    assert y.dtype == torch.float32
    assert torch.equal(y.bfloat16(), y.bfloat16().float().bfloat16())
    layer.compute_dtype = None
    assert torch.equal(y, layer(x.bfloat16()).float())


def test_bias_follows_the_dtype_of_x():
    for layer in (Linear4bit(IN, OUT), Linear8bit(IN, OUT)):
        assert layer(torch.randn(3, IN, dtype=torch.bfloat16)).dtype == torch.bfloat16
        layer(torch.randn(3, IN, dtype=torch.bfloat16)).sum().backward()
        assert layer.bias.grad.dtype == torch.float32


def test_from_linear_takes_over_mode_and_bias():
    linear = nn.Linear(IN, OUT).eval()
    for layer in (Linear4bit.from_linear(linear, block_size=32), Linear8bit.from_linear(linear, threshold=3.0)):
        assert layer.bias is linear.bias and not layer.training
        assert (layer.dequantize() - linear.weight).abs().max() < 0.02
    assert Linear4bit.from_linear(linear.bfloat16()).dequantize().dtype == torch.bfloat16
    assert Linear4bit.from_linear(nn.Linear(IN, OUT, bias=False)).bias is None


def test_from_embedding():
    embedding = nn.Embedding(OUT, IN, padding_idx=3)
    layer = Embedding4bit.from_embedding(embedding, double_quant=False)
    assert torch.equal(layer(torch.tensor([3])), torch.zeros(1, IN))
    assert torch.equal(layer(torch.arange(OUT)), layer.dequantize())
    with pytest.raises(ValueError, match="max_norm"):
        Embedding4bit.from_embedding(nn.Embedding(OUT, IN, max_norm=1.0))


def test_threshold_sends_outlier_columns_through_the_float_path():
    x = torch.randn(5, IN)
    x[0, 7] = 60.0
    layer = Linear8bit(IN, OUT, bias=False)
    exact = x @ layer.dequantize(torch.float32).t()
    split = (layer(x) - exact).abs().max()
    layer.threshold = 0.0
    assert split < 0.2 * (layer(x) - exact).abs().max()


def test_errors():
    with pytest.raises(ValueError, match=r"Linear4bit.quantize_: weight has shape \(3, 3\); expected \(48, 128\)"):
        Linear4bit(IN, OUT).quantize_(torch.ones(3, 3))
    with pytest.raises(ValueError, match="block_size is 65"):
        Linear4bit(IN, OUT, block_size=65)
    with pytest.raises(ValueError, match="quant_type is 'nf3'"):
        Linear4bit(IN, OUT, quant_type="nf3")


# ---------------------------------------------------------------------------------------------------
# bitsandbytes: an optional test dependency. What it writes, we read, and the other way round.


@pytest.fixture
def bnb():
    return pytest.importorskip("bitsandbytes", reason="checkpoints of bitsandbytes need bitsandbytes")


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bitsandbytes_reads_and_writes_linear_4bit(bnb, tmp_path, quant_type, double_quant, dtype):
    linear = nn.Linear(IN, OUT, dtype=dtype)
    ours = Linear4bit.from_linear(linear, quant_type=quant_type, double_quant=double_quant)
    theirs = bnb.nn.Linear4bit(IN, OUT, quant_type=quant_type, compress_statistics=double_quant, compute_dtype=dtype)
    theirs.load_state_dict(linear.state_dict())
    theirs.weight = bnb.nn.Params4bit(
        linear.weight.data.clone(), quant_type=quant_type, compress_statistics=double_quant, requires_grad=False
    )
    theirs = theirs.to("cpu")  # this is what makes bitsandbytes quantize
    their_state, our_state = theirs.state_dict(), ours.state_dict()
    assert set(their_state) == set(our_state)
    for key, value in their_state.items():
        if not key.startswith("weight.quant_state"):
            torch.testing.assert_close(our_state[key].to(value.dtype), value, rtol=0, atol=0)

    save_file(their_state, tmp_path / "theirs.safetensors")
    twin = Linear4bit(IN, OUT)
    twin.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    assert torch.equal(twin.dequantize(), ours.dequantize())

    save_file(our_state, tmp_path / "ours.safetensors")
    state = load_file(tmp_path / "ours.safetensors")
    reread = bnb.nn.Linear4bit(IN, OUT, quant_type=quant_type, compute_dtype=dtype)
    reread.weight = bnb.nn.Params4bit.from_prequantized(
        data=state["weight"], quantized_stats={k: v for k, v in state.items() if k.startswith("weight.")}, device="cpu"
    )
    decoded = bnb.functional.dequantize_4bit(reread.weight.data, reread.weight.quant_state)
    assert torch.equal(decoded, ours.dequantize())


def test_bitsandbytes_reads_and_writes_linear_8bit(bnb, tmp_path):
    linear = nn.Linear(IN, OUT, dtype=torch.float16)
    ours = Linear8bit.from_linear(linear)
    theirs = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0)
    theirs.load_state_dict(linear.state_dict())
    theirs = theirs.to("cpu")
    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    twin = Linear8bit(IN, OUT)
    twin.load_state_dict(load_file(tmp_path / "theirs.safetensors"))
    assert torch.equal(twin.weight, ours.weight) and torch.equal(twin.absmax, ours.absmax)

    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    reread = bnb.nn.Linear8bitLt(IN, OUT, has_fp16_weights=False, threshold=6.0).to("cpu")
    reread.load_state_dict(load_file(tmp_path / "ours.safetensors"))
    x = torch.randn(3, IN, dtype=torch.float16)
    torch.testing.assert_close(reread(x), ours(x), rtol=0.02, atol=0.02)
