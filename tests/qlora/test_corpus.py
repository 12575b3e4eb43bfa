"""Python's own text is there, and the two domains do not overlap."""

import pytest

from qlora import corpus
from qlora.errors import InputError


def test_sources_are_python_without_the_documentation():
    texts = corpus.sources()
    assert len(texts) > 300
    assert sum(map(len, texts)) > 5_000_000
    assert any("class ArgumentParser" in text for text in texts)
    sentence = "Assert statements are a convenient way to insert debugging assertions"
    assert any(sentence in text for part in corpus.documentation() for text in part)
    assert not any(sentence in text for text in texts)


def test_missing_sources(monkeypatch, tmp_path):
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    with pytest.raises(InputError, match="lacks the standard library's sources"):
        corpus.sources()


def test_documentation_is_split_by_topic_and_seed():
    train, test = corpus.documentation()
    sizes = [sum(map(len, part)) for part in (train, test)]
    assert 0.08 < sizes[1] / sum(sizes) <= 0.12
    assert not set(train) & set(test)
    assert corpus.documentation() == (train, test)
    assert corpus.documentation(seed=1)[1] != test
