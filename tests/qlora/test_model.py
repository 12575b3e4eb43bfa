"""Loading base models and adapters: every damaged or wrong one is refused, in words."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

import quantlib
from qlora.errors import InputError
from qlora.model import (
    Quantization,
    add_adapter,
    choose_device,
    choose_dtype,
    find_model,
    load_adapter,
    load_base,
    load_tokenizer,
    weight_bytes,
)

CPU = torch.device("cpu")


def load(path, bits=16, dtype=torch.float32, **options):
    return load_base(find_model(str(path)), Quantization(bits, **options), CPU, dtype, progress=False)


@pytest.fixture
def copy(base, tmp_path):
    """A copy of the base model to damage."""
    return shutil.copytree(base, tmp_path / "copy")


@pytest.fixture
def adapter(base, tmp_path):
    """The directory of a saved adapter of the base model."""
    model = add_adapter(load(base, 4)[0], rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(file, change):
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("bits", [4, 8])
def test_every_linear_layer_but_the_head_is_quantized(base, bits):
    model, report = load(base, bits)
    kinds = {name: type(module) for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    expected = {4: quantlib.Linear4bit, 8: quantlib.Linear8bit}[bits]
    assert kinds.pop("lm_head") is torch.nn.Linear
    assert set(kinds.values()) == {expected}
    assert len(kinds) == 14 == len(report.converted)
    assert not model.training


def test_quantization_options_reach_the_layers(base):
    model, _ = load(base, 4, quant_type="fp4", block_size=128, double_quant=False)
    quantized = model.model.layers[0].mlp.up_proj.quantized
    assert (quantized.quant_type, quantized.block_size, quantized.double_quant) == ("fp4", 128, False)
    model, _ = load(base, 8, threshold=3.5)
    assert model.model.layers[0].mlp.up_proj.threshold == 3.5


def test_weight_bytes(base):
    model, _ = load(base, 16, torch.bfloat16)
    assert weight_bytes(model) == 2 * sum(p.numel() for p in model.parameters())
    packed, _ = load(base, 4, torch.bfloat16)
    linear = sum(m.weight.numel() for m in model.model.layers.modules() if isinstance(m, torch.nn.Linear))
    saved = weight_bytes(model) - weight_bytes(packed)
    # 16 bits become 4.127, and a codebook of 1 kB for each layer.
    assert 0 < (16 - 4.127) / 8 * linear - saved < 14 * 2048


def test_dtype_and_device():
    assert choose_dtype("float16", CPU) is torch.float16
    assert choose_dtype("auto", torch.device("cuda")) is torch.bfloat16
    assert choose_dtype("auto", CPU) in (torch.bfloat16, torch.float32)
    assert choose_device("cpu") == CPU


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_where_there_is_none():
    assert choose_device("auto") == CPU
    with pytest.raises(InputError, match="no CUDA device"):
        choose_device("cuda")


@pytest.mark.parametrize("name", ["./missing", "/nowhere/model", "a/b/c", "~/missing"])
def test_missing_directory(name):
    with pytest.raises(InputError, match=f"model directory {name} does not exist"):
        find_model(name)


def test_hub_id(base, monkeypatch):
    asked = []

    def snapshot(name, allow_patterns):
        asked.append((name, "*.bin" in allow_patterns, "*.safetensors" in allow_patterns))
        return str(base)

    monkeypatch.setattr("qlora.model.snapshot_download", snapshot)
    assert find_model("owner/name") == find_model("name") == base
    assert asked == [("owner/name", False, True), ("name", False, True)]


def test_hub_id_without_network(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nobody/nothing is no directory, and the hub did not give it"):
        find_model("nobody/nothing")


def test_directory_that_is_no_model(copy, tmp_path):
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(str(tmp_path))
    with pytest.raises(InputError, match=r"no config\.json"):
        find_model(str(copy / "config.json"))
    (copy / "config.json").write_text('{"model_type"')
    with pytest.raises(InputError, match=r"config\.json is not JSON"):
        find_model(str(copy))


def test_unknown_model_type(copy):
    (copy / "config.json").write_text('{"model_type": "nothing"}')
    with pytest.raises(InputError, match="cannot be loaded as a causal language model"):
        load(copy)


def test_quantized_model_is_refused(copy):
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(InputError, match="already quantized"):
        find_model(str(copy))


def test_pickled_weights_are_refused(copy):
    (copy / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no weights; expected model\.safetensors"):
        find_model(str(copy))
    torch.save({}, copy / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"only pickled weights \(pytorch_model\.bin\)"):
        find_model(str(copy))


@pytest.mark.parametrize("keep", [0, 5, 1000, -1])
def test_truncated_weights(copy, keep):
    file = copy / "model.safetensors"
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(InputError, match="truncated or damaged"):
        find_model(str(copy))


def test_missing_shard(copy):
    (copy / "model.safetensors").rename(copy / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"lacks model-00002-of-00002\.safetensors"):
        find_model(str(copy))
    (copy / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="names no files"):
        find_model(str(copy))


def test_missing_weight(copy):
    edit(copy / "model.safetensors", lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    with pytest.raises(InputError, match=r"1 missing, e\.g\. model\.layers\.1\.mlp\.up_proj\.weight"):
        load(copy)


def test_weight_of_another_shape(copy):
    edit(copy / "model.safetensors", lambda tensors: tensors.update({"model.norm.weight": torch.ones(65)}))
    with pytest.raises(InputError, match=r"1 mismatched, e\.g\. model\.norm\.weight is \[65\], expected \[64\]"):
        load(copy)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", ["model.layers.0.mlp.down_proj.weight", "model.norm.weight"])
def test_weights_that_are_no_numbers(copy, name, bad):
    edit(copy / "model.safetensors", lambda tensors: tensors[name].view(-1)[-1:].fill_(bad))
    with pytest.raises(InputError, match=f"{name} holds NaN or Inf"):
        load(copy, 4)


def test_model_without_tokenizer(copy):
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (copy / file).unlink()
    with pytest.raises(InputError, match="no usable tokenizer"):
        load_tokenizer(copy)


@pytest.mark.parametrize("bits", [4, 8, 16])
def test_adapter_survives_saving(base, tmp_path, bits):
    model = add_adapter(load(base, bits)[0], rank=4, alpha=8, dropout=0.0, target_modules="all-linear")
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    ids = torch.arange(20)[None]
    expected = model.eval()(input_ids=ids).logits
    model.save_pretrained(tmp_path)
    loaded = load_adapter(load(base, bits)[0], tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, expected)
    assert not any(p.requires_grad for p in loaded.parameters())


def test_no_adapter(base, adapter, tmp_path):
    model, _ = load(base, 4)
    with pytest.raises(InputError, match=r"no adapter_config\.json"):
        load_adapter(model, tmp_path)
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(InputError, match=r"no adapter_model\.safetensors \(pickled adapters are refused\)"):
        load_adapter(model, adapter)


def test_damaged_adapters(base, adapter):
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    key = next(iter(load_file(file)))

    file.write_bytes(whole[:-8])
    with pytest.raises(InputError, match="truncated or damaged"):
        load_adapter(load(base, 4)[0], adapter)
    file.write_bytes(whole)
    edit(file, lambda tensors: tensors.pop(key))
    with pytest.raises(InputError, match=f"1 tensors differ, e.g. {key}"):
        load_adapter(load(base, 4)[0], adapter)
    file.write_bytes(whole)
    edit(file, lambda tensors: tensors.update({key: torch.zeros(3, 5)}))
    with pytest.raises(InputError, match="does not fit this model"):
        load_adapter(load(base, 4)[0], adapter)
    file.write_bytes(whole)
    edit(file, lambda tensors: tensors[key].view(-1)[0].fill_(torch.nan))
    with pytest.raises(InputError, match="holds NaN or Inf"):
        load_adapter(load(base, 4)[0], adapter)


def test_target_modules_that_match_nothing(base):
    with pytest.raises(InputError, match="--target-modules"):
        add_adapter(load(base, 4)[0], rank=4, alpha=8, dropout=0.0, target_modules=["nothing"])
