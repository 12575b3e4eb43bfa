"""The base model: saved whole, deterministic, kept for the next run."""

import dataclasses
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from qlora import pretrain as module
from qlora.model import find_model, load_tokenizer
from qlora.pretrain import cached_base, pretrain, train_tokenizer

from .conftest import TINY, TOPICS


def test_tokenizer_encodes_any_text():
    tokenizer = train_tokenizer(TOPICS, 384)
    assert len(tokenizer) == 384
    for text in ("if x:\n\tpass\n", "naïve ✓ 漢字", "  a  b ", TOPICS[0]):
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_pretraining_lowers_the_loss_and_is_deterministic(base, tmp_path):
    pretrain(TOPICS, tmp_path / "again", TINY, progress=False)
    one, two = (load_file(path / "model.safetensors") for path in (base, tmp_path / "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert {tensor.dtype for tensor in one.values()} == {torch.bfloat16}
    assert [path.name for path in tmp_path.iterdir()] == ["again"]
    assert find_model(str(tmp_path / "again")) == tmp_path / "again"
    assert load_tokenizer(tmp_path / "again").eos_token == "<|end|>"


def test_interrupted_pretraining_leaves_nothing(tmp_path, monkeypatch):
    def fail(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("transformers.PreTrainedTokenizerFast.save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        pretrain(TOPICS, tmp_path / "base", TINY, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_base_is_kept_and_known_by_its_options(tmp_path, monkeypatch):
    made = []

    def fake(texts, directory, options, progress):
        made.append(options)
        Path(directory).mkdir()

    monkeypatch.setattr(module, "pretrain", fake)
    first = cached_base(tmp_path, TINY)
    assert cached_base(tmp_path, TINY) == first
    other = dataclasses.replace(TINY, seed=1)
    assert cached_base(tmp_path, other) != first
    assert made == [TINY, other]
