"""The PEFT layer on a small Llama: PEFT's own results are the oracle."""

import copy
import logging

import pytest
import torch
from torch import nn

peft = pytest.importorskip("peft", reason="the PEFT layer needs peft")
transformers = pytest.importorskip("transformers", reason="the PEFT layer needs transformers")

from peft import LoraConfig, PeftModel, get_peft_model  # noqa: E402
from peft.tuners.lora import layer as peft_layer  # noqa: E402
from peft.tuners.lora import model as peft_model  # noqa: E402

import lora_ops.peft  # noqa: E402
from lora_ops import prepare_for_training, register_peft  # noqa: E402
from lora_ops.peft import LoraQuantizedLinear  # noqa: E402
from quantlib import Linear4bit, Linear8bit, quantize_model  # noqa: E402

LAYERS = {4: Linear4bit, 8: Linear8bit}


@pytest.fixture(autouse=True)
def _registered(monkeypatch):
    """Registered for the test; PEFT is as it was afterwards, for the tests of others."""
    monkeypatch.setattr(peft_model, "dispatch_default", peft_model.dispatch_default)
    monkeypatch.setattr(lora_ops.peft, "_said", set())
    register_peft()


def tiny_llama(dtype=torch.float32, bias=False):
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=80,
        attention_bias=bias,
        mlp_bias=bias,
        attn_implementation="eager",
    )
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def quantized_llama(bits=4, dtype=torch.float32, bias=False, **options):
    model = tiny_llama(dtype, bias)
    quantize_model(model, bits, progress=False, **options)
    return model


def decoded(model):
    """A copy of a quantized model with plain nn.Linear layers of the decoded weights."""
    model = copy.deepcopy(model)
    for name, module in list(model.named_modules()):
        if isinstance(module, (Linear4bit, Linear8bit)):
            linear = nn.Linear(module.in_features, module.out_features, bias=module.bias is not None)
            linear.weight.data = module.dequantize()
            if module.bias is not None:
                linear.bias.data = module.bias.data.clone()
            model.set_submodule(name, linear.to(module.dequantize().dtype))
    return model


def lora_config(**options):
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.0} | options)


def randomize(model, seed=2, scale=0.1):
    """Draws every adapter weight, B included, from `seed`; scales the magnitudes of DoRA. Turns evaluation on."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            noise = scale * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.data.copy_(parameter * (1 + noise) if "magnitude" in name else noise)
    return model.eval()


def lora_layers(model):
    return [module for module in model.modules() if isinstance(module, LoraQuantizedLinear)]


def tokens(rows=2, length=12):
    return torch.randint(0, 80, (rows, length), generator=torch.Generator().manual_seed(3))


def logits(model, **kwargs):
    with torch.no_grad():
        return model(input_ids=tokens(), **kwargs).logits


def adapter_gradients(model):
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def by_peft(model, monkeypatch, function):
    """Runs `function(model)` on PEFT's own computation."""
    with monkeypatch.context() as patch:
        patch.setattr(LoraQuantizedLinear, "fused_reason", lambda self: "test")
        return function(model)


def stored(layer):
    """The bytes of a quantized layer."""
    return {key: value.clone() for key, value in layer.get_base_layer().state_dict().items()}


def assert_same(a, b):
    assert a.keys() == b.keys()
    for key in a:
        assert torch.equal(a[key], b[key]), key


@pytest.mark.parametrize("bits", [4, 8])
def test_get_peft_model_uses_the_fused_layer(bits):
    model = get_peft_model(quantized_llama(bits), lora_config(task_type="CAUSAL_LM"))
    layers = lora_layers(model)
    assert len(layers) == 2 * 7
    for layer in layers:
        assert isinstance(layer, peft_layer.Linear) and isinstance(layer.base_layer, LAYERS[bits])
        assert repr(layer).startswith("lora.")
        assert layer.fused_reason() is None
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 7 * 2 and all("lora_" in name for name in trainable)


def test_registering_twice_changes_nothing_and_other_layers_stay_peft_s():
    dispatch = peft_model.dispatch_default
    register_peft()
    assert peft_model.dispatch_default is dispatch
    model = get_peft_model(tiny_llama(), lora_config())
    assert not lora_layers(model)


def test_a_peft_built_otherwise_is_refused(monkeypatch):
    monkeypatch.delattr(peft_model, "dispatch_default")
    with pytest.raises(RuntimeError, match=f"PEFT {peft.__version__} chooses its LoRA layers in an unknown way"):
        register_peft()


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("bits", [4, 8])
def test_same_results_as_peft_on_the_same_layers(bits, options, monkeypatch):
    model = randomize(get_peft_model(quantized_llama(bits, bias=True), lora_config(**options)))
    assert all(layer.fused_reason() is None for layer in lora_layers(model))
    # int8 rounds x: one changed rounding moves a logit by far more than float32 would
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if bits == 4 else {"rtol": 0.02, "atol": 0.02}
    torch.testing.assert_close(logits(model), by_peft(model, monkeypatch, logits), **tolerance)
    fused, expected = adapter_gradients(model), by_peft(model, monkeypatch, adapter_gradients)
    assert fused.keys() == expected.keys()
    for name, gradient in fused.items():
        error = (gradient - expected[name]).norm() / expected[name].norm()
        assert error < (1e-4 if bits == 4 else 0.05), name


def test_bf16_model_with_float32_adapters_and_under_autocast(monkeypatch):
    model = randomize(get_peft_model(quantized_llama(dtype=torch.bfloat16), lora_config()))
    exact = randomize(get_peft_model(decoded(model.unload()).float(), lora_config()))
    model = randomize(get_peft_model(quantized_llama(dtype=torch.bfloat16), lora_config()))
    assert {layer.lora_A["default"].weight.dtype for layer in lora_layers(model)} == {torch.float32}
    expected = logits(exact)
    ours = (logits(model).float() - expected).norm()
    peft_s = (by_peft(model, monkeypatch, logits).float() - expected).norm()
    assert logits(model).dtype == torch.bfloat16
    assert ours <= 1.5 * peft_s
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = logits(model)
        by_peft_under_autocast = by_peft(model, monkeypatch, logits)
    assert (under_autocast - expected).norm() <= 1.5 * (by_peft_under_autocast - expected).norm()


@pytest.mark.parametrize("cast, expected", [(True, torch.float32), (False, torch.bfloat16)])
@pytest.mark.parametrize("storage", [torch.uint8, torch.bfloat16])
def test_adapters_take_the_dtype_of_the_decoded_weight_unless_peft_casts_them(cast, expected, storage):
    base = quantized_llama(dtype=torch.bfloat16, quant_storage=storage)
    model = get_peft_model(base, lora_config(), autocast_adapter_dtype=cast)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {expected}


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_travel_to_stock_peft_and_back(bits, tmp_path):
    base = quantized_llama(bits, **({"threshold": 0.0} if bits == 8 else {}))
    dense = decoded(base)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if bits == 4 else {"rtol": 0.1, "atol": 0.1}
    ours = randomize(get_peft_model(base, lora_config()))
    ours.save_pretrained(tmp_path / "ours")
    stock = PeftModel.from_pretrained(copy.deepcopy(dense), tmp_path / "ours")
    assert not lora_layers(stock)
    torch.testing.assert_close(logits(stock), logits(ours), **tolerance)

    stock = randomize(get_peft_model(dense, lora_config()), seed=7)
    stock.save_pretrained(tmp_path / "stock")
    ours = PeftModel.from_pretrained(quantized_llama(bits), tmp_path / "stock")
    assert all(layer.fused_reason() is None for layer in lora_layers(ours))
    torch.testing.assert_close(logits(ours), logits(stock), **tolerance)


def bitsandbytes_llama(bits):
    """The same float model, quantized by bitsandbytes, marked as transformers marks it."""
    bnb = pytest.importorskip("bitsandbytes", reason="compares with stock PEFT over bitsandbytes layers")
    model = tiny_llama()
    for name, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or name == "lm_head":
            continue
        shape = module.in_features, module.out_features
        if bits == 4:
            layer = bnb.nn.Linear4bit(*shape, bias=False, quant_type="nf4", compress_statistics=True)
            layer.weight = bnb.nn.Params4bit(module.weight.data, False, quant_type="nf4", compress_statistics=True)
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
            layer.weight = bnb.nn.Int8Params(module.weight.data, requires_grad=False, has_fp16_weights=False)
        model.set_submodule(name, layer.to("cpu"))
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


@pytest.mark.parametrize("bits", [4, 8])
def test_adapters_travel_to_peft_over_bitsandbytes_and_back(bits, tmp_path):
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if bits == 4 else {"rtol": 0.1, "atol": 0.1}
    ours = randomize(get_peft_model(quantized_llama(bits), lora_config()))
    ours.save_pretrained(tmp_path / "ours")
    theirs = PeftModel.from_pretrained(bitsandbytes_llama(bits), tmp_path / "ours")
    theirs.train()  # in evaluation bitsandbytes computes in bfloat16, whatever the dtype of x
    torch.testing.assert_close(logits(theirs), logits(ours), **tolerance)

    theirs = randomize(get_peft_model(bitsandbytes_llama(bits), lora_config()), seed=7)
    theirs.save_pretrained(tmp_path / "theirs")
    theirs.train()
    ours = PeftModel.from_pretrained(quantized_llama(bits), tmp_path / "theirs")
    torch.testing.assert_close(logits(ours), logits(theirs), **tolerance)


@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_merge_requantizes_the_sum_and_unmerge_restores_every_bit(bits, safe_merge):
    model = randomize(get_peft_model(quantized_llama(bits, bias=True), lora_config(lora_bias=True)))
    layer = lora_layers(model)[0]
    base = layer.get_base_layer()
    before, unmerged = stored(layer), logits(model)
    expected = copy.deepcopy(base)
    expected.quantize_(base.dequantize() + layer.get_delta_weight("default"))
    bias = base.bias + layer.scaling["default"] * layer.lora_B["default"].bias  # PEFT over bitsandbytes: unscaled

    model.merge_adapter(safe_merge=safe_merge)
    assert layer.merged and layer.fused_reason() == "adapters are merged"
    assert_same(stored(layer), dict(expected.state_dict().items()) | {"bias": bias.data})
    assert not torch.equal(logits(model), unmerged)

    with model.disable_adapter():  # PEFT unmerges for this
        logits(model)
    assert_same(stored(layer), before)
    assert torch.equal(logits(model), unmerged)
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


@pytest.mark.parametrize("bits", [4, 8])
def test_merge_and_unload_leaves_plain_quantized_layers(bits):
    model = randomize(get_peft_model(quantized_llama(bits), lora_config()))
    model.merge_adapter()
    merged = logits(model)
    model.unmerge_adapter()
    plain = model.merge_and_unload()
    assert not lora_layers(plain)
    assert sum(isinstance(module, LAYERS[bits]) for module in plain.modules()) == 2 * 7
    assert torch.equal(logits(plain), merged)


def test_unload_restores_the_base_model():
    base = quantized_llama()
    before = logits(base)
    model = randomize(get_peft_model(base, lora_config()))
    assert not torch.equal(logits(model), before)
    assert torch.equal(logits(model.unload()), before)


def test_a_broken_adapter_is_not_merged():
    model = randomize(get_peft_model(quantized_llama(), lora_config()))
    layer = lora_layers(model)[0]
    layer.lora_B["default"].weight.data[0, 0] = float("nan")
    before = stored(layer)
    with pytest.raises(ValueError, match="'default' gives NaN or infinity; nothing was changed"):
        layer.merge(safe_merge=True)
    assert_same(stored(layer), before)
    assert not layer.merged


def test_lora_bias_needs_a_base_bias_to_merge():
    with pytest.warns(UserWarning, match="merging LoRA weights won't be possible"):
        model = randomize(get_peft_model(quantized_llama(), lora_config(lora_bias=True)))
    with pytest.raises(RuntimeError, match="the base layer has no bias to merge it into"):
        lora_layers(model)[0].merge()


def test_several_adapters(monkeypatch):
    model = get_peft_model(quantized_llama(), lora_config())
    model.add_adapter("second", lora_config(r=2, lora_alpha=3))
    randomize(model)
    layer = lora_layers(model)[0]
    one = logits(model)
    model.set_adapter("second")
    two = logits(model)
    assert layer.fused_reason() is None and not torch.equal(one, two)
    model.set_adapter("default")
    assert torch.equal(logits(model), one)

    model.base_model.set_adapter(["default", "second"])
    assert layer.fused_reason() == "2 adapters are active"
    dense = get_peft_model(decoded(quantized_llama()), lora_config())
    dense.add_adapter("second", lora_config(r=2, lora_alpha=3))
    randomize(dense)
    dense.base_model.set_adapter(["default", "second"])
    torch.testing.assert_close(logits(model), logits(dense), rtol=1e-4, atol=1e-5)

    before = stored(layer)
    model.merge_adapter()
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert_same(stored(layer), before)

    model.delete_adapter("default")
    assert layer.active_adapters == ["second"] and layer.fused_reason() is None
    torch.testing.assert_close(logits(model), two)
    with model.disable_adapter():
        torch.testing.assert_close(logits(model), logits(quantized_llama()))


def test_a_batch_of_mixed_adapters():
    model = get_peft_model(quantized_llama(), lora_config())
    model.add_adapter("second", lora_config())
    randomize(model)
    expected = []
    for row, name in enumerate(["default", "second"]):
        model.set_adapter(name)
        expected.append(logits(model)[row])
    mixed = logits(model, adapter_names=["default", "second"])
    torch.testing.assert_close(mixed, torch.stack(expected), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_dora(bits):
    base = quantized_llama(bits, bias=True)
    dense = get_peft_model(decoded(base), lora_config(use_dora=True))
    model = get_peft_model(base, lora_config(use_dora=True))
    name = "base_model.model.model.layers.1.mlp.up_proj"
    layer, dense_layer = model.get_submodule(name), dense.get_submodule(name)
    magnitude, expected = (m.lora_magnitude_vector["default"].weight for m in (layer, dense_layer))
    torch.testing.assert_close(magnitude, expected)
    randomize(model), randomize(dense)
    assert layer.fused_reason() == "the adapter is a DoraLinearVariant"
    tolerance = {"rtol": 1e-3, "atol": 1e-4} if bits == 4 else {"rtol": 0.1, "atol": 0.1}
    torch.testing.assert_close(logits(model), logits(dense), **tolerance)

    before = stored(layer)
    weight = dense_layer.get_base_layer().weight
    dense_layer.merge()
    expected = copy.deepcopy(layer.get_base_layer())
    expected.quantize_(weight)
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer.get_base_layer().dequantize(), expected.dequantize(), rtol=0.02, atol=0.02)
    layer.unmerge()
    assert_same(stored(layer), before)


def test_two_dora_adapters_merge_and_unmerge():
    model = get_peft_model(quantized_llama(), lora_config(use_dora=True))
    model.add_adapter("second", lora_config(use_dora=True))
    randomize(model)
    layer = lora_layers(model)[0]
    before = stored(layer)
    model.base_model.set_adapter(["default", "second"])
    model.merge_adapter()
    assert layer.merged_adapters == ["default", "second"]
    model.unmerge_adapter()
    assert_same(stored(layer), before)


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa' reads or rewrites the base weight"),
        ({"init_lora_weights": "olora"}, "init_lora_weights='olora' reads or rewrites"),
        ({"init_lora_weights": "mica"}, "init_lora_weights='mica'"),
        ({"init_lora_weights": "orthogonal"}, "init_lora_weights='orthogonal'"),
    ],
    ids=lambda value: value.get("init_lora_weights") if isinstance(value, dict) else "",
)
def test_initialisations_that_need_a_float_weight_are_refused(options, reason):
    with pytest.raises(ValueError, match=reason):
        get_peft_model(quantized_llama(), lora_config(**options))


def test_variants_that_need_a_float_weight_are_refused():
    with pytest.raises(ValueError, match="unsupported variant"):
        get_peft_model(quantized_llama(), lora_config(kasa_config=peft.KasaConfig()))


def test_hooks_are_called_and_the_fallback_is_said_once(caplog):
    model = randomize(get_peft_model(quantized_llama(), lora_config()))
    fused = logits(model)
    called = []
    for layer in lora_layers(model)[:2]:
        layer.lora_A["default"].register_forward_hook(lambda *args: called.append(args) and None)
    with caplog.at_level(logging.WARNING, logger="lora_ops.peft"):
        torch.testing.assert_close(logits(model), fused, rtol=1e-4, atol=1e-5)
        logits(model)
    assert len(called) == 4
    assert [record.getMessage() for record in caplog.records] == [
        "lora_ops: PEFT's own LoRA computation is used, not the fused one: the layer or a part of the adapter has hooks"
    ]


def test_a_wrapped_base_layer_or_adapter_part_is_left_to_peft():
    model = randomize(get_peft_model(quantized_llama(), lora_config()))
    expected = logits(model)
    first, second, third = lora_layers(model)[:3]
    first.base_layer.forward = first.base_layer.forward  # as accelerate's offloading does
    second.lora_dropout["default"] = nn.Sequential()
    nn.utils.parametrizations.orthogonal(third.lora_A["default"])
    assert first.fused_reason() == "the layer or a part of the adapter has hooks"
    assert second.fused_reason() == "a part of the adapter is a Sequential"
    assert third.fused_reason() == "a part of the adapter is a ParametrizedLinear"
    nn.utils.parametrize.remove_parametrizations(third.lora_A["default"], "weight", leave_parametrized=False)
    assert logits(model).shape == expected.shape


@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_prepare_for_training_checkpoints_without_changing_gradients_or_dtypes(dropout):
    def gradients(prepare):
        base = quantized_llama(dtype=torch.bfloat16)
        if prepare == "before":
            prepare_for_training(base)
        model = randomize(get_peft_model(base, lora_config(lora_dropout=dropout)))
        if prepare == "after":
            prepare_for_training(model)
        assert {p.dtype for n, p in model.named_parameters() if "norm" in n or "embed" in n} == {torch.bfloat16}
        checkpointed = any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
        assert checkpointed == (prepare is not None)
        model.train()
        torch.manual_seed(11)
        return adapter_gradients(model)

    expected = gradients(None)
    assert len(expected) == 2 * 7 * 2 and all(g.isfinite().all() and g.any() for g in expected.values())
    assert_same(gradients("before"), expected)
    assert_same(gradients("after"), expected)


def test_dropout_is_drawn_in_training_only():
    model = randomize(get_peft_model(quantized_llama(), lora_config(lora_dropout=0.5)))
    model.train()
    assert not torch.equal(logits(model), logits(model))
    model.eval()
    assert torch.equal(logits(model), logits(model))


def test_layer_compiles_without_graph_breaks():
    model = randomize(get_peft_model(quantized_llama(), lora_config(lora_dropout=0.1)))
    layer = lora_layers(model)[0].train()
    x = torch.randn(2, 5, 64, requires_grad=True)
    torch._dynamo.reset()
    results = []
    for call in (layer, torch.compile(layer, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        y = call(x)
        results.append((y, *torch.autograd.grad(y.square().sum(), (x, layer.lora_A["default"].weight))))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_a_merged_model_can_be_copied():
    model = randomize(get_peft_model(quantized_llama(), lora_config()))
    unmerged = logits(model)
    model.merge_adapter()
    other = copy.deepcopy(model)
    other.unmerge_adapter()
    assert torch.equal(logits(other), unmerged)


def test_training_lowers_the_loss():
    model = get_peft_model(prepare_for_training(quantized_llama()), lora_config(lora_dropout=0.05))
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        loss = model(input_ids=tokens(), labels=tokens()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]
