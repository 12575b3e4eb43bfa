"""The demonstration from start to end on a tiny base model, and its table."""

import json
from dataclasses import replace

import pytest
import torch

from qlora import demo
from qlora.demo import run, table
from qlora.pretrain import BaseOptions

from .conftest import TOPICS

TINY = BaseOptions(
    vocab=384, hidden=64, intermediate=128, layers=1, heads=1, positions=256, steps=2, batch_size=2, seq_len=256
)


@pytest.fixture(autouse=True)
def _small_corpus(monkeypatch):
    monkeypatch.setattr("qlora.corpus.sources", lambda: TOPICS)
    monkeypatch.setattr("qlora.corpus.documentation", lambda seed: (TOPICS[:4] * 3, TOPICS[4:]))


@pytest.mark.parametrize("bits", [4, 8])
def test_demo(tmp_path, capsys, monkeypatch, bits):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    result = run(tmp_path, bits, steps=6, base=TINY)
    printed = capsys.readouterr().out
    assert table(result) in printed
    assert "bitsandbytes not installed" in printed
    assert json.loads((tmp_path / f"result-{bits}bit.json").read_text()) == result
    assert result["perplexity_reloaded"] == result["perplexity_trained"] < result["perplexity_quantized"]
    assert result["weight_bytes_quantized"] < result["weight_bytes_16bit"]
    assert result["trainable_parameters"] == 16 * (4 * 128 + 3 * 192)
    assert (tmp_path / f"adapter-{bits}bit/loss.png").exists()

    # A second run takes the base model from the first, and gives the same numbers.
    monkeypatch.setattr("qlora.pretrain.pretrain", None)
    again = run(tmp_path, bits, steps=6, base=TINY)
    timed = {"seconds", "tokens_per_second"}
    assert {k: v for k, v in again.items() if k not in timed} == {k: v for k, v in result.items() if k not in timed}


@pytest.mark.parametrize("bits", [4, 8])
def test_steps_beside_bitsandbytes(tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is an optional peer")
    directory = demo.cached_base(tmp_path, replace(TINY, seq_len=32), progress=False)
    rates = demo.compare_steps(directory, demo.Quantization(bits), torch.bfloat16, rounds=2)
    assert all(rate > 0 for rate in rates)


def test_table_shows_a_difference():
    result = {
        "bits": 4,
        "dtype": "bfloat16",
        "perplexity_16bit": 100.0,
        "perplexity_quantized": 101.0,
        "perplexity_trained": 50.5,
        "perplexity_reloaded": 50.75,
        "linear_bytes_16bit": 800,
        "linear_bytes_quantized": 210,
        "weight_bytes_16bit": 1000,
        "weight_bytes_quantized": 400,
        "trainable_parameters": 12345,
        "tokens_per_second": 2000.0,
        "tokens_per_second_bitsandbytes": 1000.0,
    }
    lines = table(result).strip().splitlines()
    perplexities = ("100.00", "+1.00%", "-50.0%", "differs by +2.50e-01")
    sizes = ("12,345", "800", "26.2%", "1,000", "40.0%")
    for line, expected in zip(lines, (*perplexities, *sizes, "2,000", "2.00x as fast"), strict=True):
        assert line.endswith(expected)
