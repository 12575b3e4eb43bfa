"""quantize_model: what it converts, what it leaves alone and says so, what it refuses."""

import copy

import pytest
import torch
from torch import nn

from quantlib import Linear4bit, Linear8bit, quantize_model


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up = nn.Parameter(torch.randn(2, 64, 64))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(100, 64)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64)) for _ in range(3))
        self.experts = Experts()
        self.norm = nn.LayerNorm(64)
        self.lm_head = nn.Linear(64, 100, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            x = x + layer(x)
        return self.lm_head(self.norm(x))


@pytest.mark.parametrize(("bits", "layer"), [(4, Linear4bit), (8, Linear8bit)])
def test_converts_every_linear_but_the_head(bits, layer):
    model = Model()
    before = copy.deepcopy(model)
    report = quantize_model(model, bits=bits, progress=False)
    assert [type(m) for stack in model.layers for m in (stack[0], stack[2])] == [layer] * 6
    assert type(model.lm_head) is nn.Linear
    assert report.converted == [f"layers.{i}.{j}" for i in range(3) for j in (0, 2)]
    assert report.skipped == {
        "embed": "Embedding is not nn.Linear",
        "experts": "Experts is not nn.Linear",
        "lm_head": "named in skip",
    }
    ids = torch.arange(10)
    assert (model(ids) - before(ids)).norm() < 0.2 * before(ids).norm()


def test_report_counts_bytes():
    model = Model()
    report = quantize_model(model, double_quant=False, progress=False)
    linear, packed = 6 * (64 * 64 + 64) * 4, 6 * (64 * 64 // 2 + 64 * 4 + 64 * 4)
    others = (100 * 64 + 2 * 64 * 64 + 64 * 100) * 4
    assert report.bytes_before == linear + others
    assert report.bytes_after == packed + others
    text = str(report)
    assert "layers.*.*      6  Linear4bit" in text and "named in skip" in text


def test_options_reach_the_layer_and_wrong_ones_change_nothing():
    model = Model()
    for options, error in (
        ({"block_size": 48}, ValueError),
        ({"blocksize": 64}, TypeError),
        ({"bits": 3}, ValueError),
        ({"skip": ("layers.0.0", "0", "2", "lm_head")}, ValueError),
    ):
        with pytest.raises(error):
            quantize_model(model, progress=False, **options)
        assert not any(isinstance(m, Linear4bit) for m in model.modules())
    quantize_model(model, progress=False, block_size=32, quant_type="fp4", skip="lm_head")
    assert model.layers[0][0].block_size == 32 and model.layers[0][0].quant_type == "fp4"
    quantize_model(Model(), bits=8, progress=False, threshold=0.0)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_non_finite_weights_are_refused_before_anything_changes(bad):
    model = Model()
    model.layers[2][2].weight.data[3, 4] = bad
    with pytest.raises(ValueError, match=r"layers.2.2.weight has 1 NaN or infinite values; the checkpoint is damaged"):
        quantize_model(model, progress=False)
    assert not any(isinstance(m, Linear4bit) for m in model.modules())


def test_meta_weights_are_refused():
    with torch.device("meta"):
        model = Model()
    with pytest.raises(ValueError, match="on the meta device; load the weights first"):
        quantize_model(model, progress=False)


def test_shared_parameters_and_modules():
    model = Model()
    model.lm_head.weight = model.embed.weight
    report = quantize_model(model, skip=(), progress=False)
    assert report.skipped["lm_head"] == "its weight is shared with another module"
    assert model.lm_head.weight is model.embed.weight

    model = Model()
    model.layers[1] = model.layers[0]
    model.again = model.layers[0][0]
    quantize_model(model, progress=False)
    assert isinstance(model.again, Linear4bit)
    assert model.again is model.layers[0][0] is model.layers[1][0]


def test_subclasses_quantized_layers_and_the_root_are_left_alone():
    class Special(nn.Linear):
        pass

    model = nn.Sequential(nn.Linear(64, 64), Special(64, 64), Linear8bit(64, 64))
    report = quantize_model(model, progress=False)
    assert report.skipped == {"1": "Special may compute more than nn.Linear does", "2": "already quantized"}
    with pytest.raises(ValueError, match="it is the model itself"):
        quantize_model(nn.Linear(64, 64), progress=False)


def test_float_weights_are_freed_as_it_goes(monkeypatch):
    """The peak is one float layer above the final size, not the whole model."""
    import weakref

    model = Model()
    alive = [weakref.ref(m) for m in model.modules() if type(m) is nn.Linear]
    counts = []
    original = Linear4bit.from_linear.__func__

    def counting(cls, linear, **options):
        counts.append(sum(ref() is not None for ref in alive))
        return original(cls, linear, **options)

    monkeypatch.setattr(Linear4bit, "from_linear", classmethod(counting))
    quantize_model(model, progress=False)
    assert counts == [7, 6, 5, 4, 3, 2] or counts == [7, 7, 6, 5, 4, 3]
