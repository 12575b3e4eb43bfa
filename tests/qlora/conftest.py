"""A tiny base model and some real text."""

from pydoc_data.topics import topics

import pytest

from qlora.cli import quiet
from qlora.pretrain import BaseOptions, pretrain
from tests.threads import threads

quiet()
TINY = BaseOptions(
    vocab=384, hidden=64, intermediate=128, layers=2, heads=2, positions=128, steps=4, batch_size=4, seq_len=32
)
TOPICS = [topics[name] for name in ("assert", "break", "continue", "del", "if", "pass", "while")]


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    """Matrices this small are multiplied faster by one thread than by several."""
    with threads(1):
        yield


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """The directory of a tiny base model, hardly trained."""
    directory = tmp_path_factory.mktemp("base") / "tiny"
    pretrain(TOPICS, directory, TINY, progress=False)
    return directory


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """A text file of about 2,500 tokens."""
    file = tmp_path_factory.mktemp("text") / "topics.txt"
    file.write_text("\n\n".join(TOPICS), encoding="utf-8")
    return file
