"""Perplexity against its definition in float64, and generation."""

import math

import pytest
import torch

from qlora.data import make_blocks
from qlora.errors import InputError
from qlora.evaluate import ModelOptions, Sampling, evaluate, generate, load, mean_loss
from qlora.model import Quantization


def options(base, bits=16, **changes):
    return ModelOptions(str(base), quantization=Quantization(bits), device="cpu", dtype="float32", **changes)


def test_mean_loss_is_that_of_every_token(base, text):
    model, tokenizer = load(options(base))
    blocks = make_blocks([text.read_text()[:1500]], tokenizer, 32)
    model = model.double()
    losses = []
    for block in blocks["input_ids"]:
        log_p = model(input_ids=torch.tensor([block])).logits[0].double().log_softmax(-1)
        losses += [-log_p[i, token].item() for i, token in enumerate(block[1:])]
    expected = sum(losses) / len(losses)
    for batch_size in (1, 4, 100):  # transformers computes the loss itself in float32
        assert math.isclose(mean_loss(model, blocks, batch_size, progress=False), expected, rel_tol=1e-6)


def test_mean_loss_leaves_the_mode_and_uses_no_dropout(base, text):
    model, tokenizer = load(options(base))
    blocks = make_blocks([text.read_text()], tokenizer, 32)
    expected = mean_loss(model, blocks, progress=False)
    model.model.embed_tokens = torch.nn.Sequential(model.model.embed_tokens, torch.nn.Dropout(0.5))
    model.train()
    assert mean_loss(model, blocks, progress=False) == expected
    assert model.training


def test_evaluate(base, text):
    result = evaluate(options(base), [str(text)], seq_len=64, progress=False)
    assert result["perplexity"] == math.exp(result["loss"])
    quantized = evaluate(options(base, 4), [str(text)], seq_len=64, progress=False)
    assert quantized["loss"] != result["loss"]
    assert math.isclose(quantized["loss"], result["loss"], rel_tol=0.02)


def test_evaluate_refuses(base, text):
    with pytest.raises(InputError, match="--seq-len 1"):
        evaluate(options(base), [str(text)], seq_len=1)
    with pytest.raises(InputError, match="--batch-size 0"):
        evaluate(options(base), [str(text)], batch_size=0)
    with pytest.raises(InputError, match="128 positions"):
        evaluate(options(base), [str(text)], seq_len=129)
    with pytest.raises(InputError, match="--bits 5"):
        evaluate(options(base, 5), [str(text)])


def test_generate_is_greedy_or_drawn_by_seed(base):
    model, tokenizer = load(options(base))

    def sample(**settings):
        return generate(model, tokenizer, "The if", Sampling(max_new_tokens=6, **settings))

    ids = tokenizer("The if", return_tensors="pt")["input_ids"]
    for _ in range(6):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert sample() == tokenizer.decode(ids[0, -6:], skip_special_tokens=True)
    assert sample(temperature=1.0, seed=1) == sample(temperature=1.0, seed=1)
    assert sample(temperature=1.0, seed=1) != sample(temperature=1.0, seed=2)


def test_generate_refuses(base):
    model, tokenizer = load(options(base))
    with pytest.raises(InputError, match="--prompt is empty"):
        generate(model, tokenizer, "", Sampling())
    for name, value in (("max_new_tokens", 0), ("temperature", -1.0), ("top_p", 0.0), ("repetition_penalty", 0.0)):
        with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}"):
            Sampling(**{name: value}).check()
