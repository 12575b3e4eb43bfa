"""Text files to blocks: contents, and every kind of file that is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qlora.data import make_blocks, read_documents, split
from qlora.errors import InputError
from qlora.model import load_tokenizer


@pytest.fixture(scope="module")
def tokenizer(base):
    return load_tokenizer(base)


def test_documents_of_text_and_json_lines(tmp_path):
    (tmp_path / "a.txt").write_text("naïve ✓\n", encoding="utf-8")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n\n{"text": "two", "id": 2}\n')
    assert read_documents([tmp_path / "a.txt", str(tmp_path / "b.jsonl")]) == ["naïve ✓\n", "one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", b"", "is empty; leave it out"),
        ("blank.txt", b" \n\t\n", "is empty; leave it out"),
        ("latin.txt", "naïve".encode("latin-1"), r"is not UTF-8 text \(byte 2\)"),
        ("picture.png", b"\x89PNG\r\n\x1a\n\0\0\0", r"is not UTF-8 text \(byte 0\)"),
        ("zeros.txt", b"a\0b", "is binary"),
        ("broken.jsonl", b'{"text": "a"}\n{"text": ', "broken.jsonl:2 is not JSON"),
        ("other.jsonl", b'{"content": "a"}', 'other.jsonl:1 has no string "text"'),
        ("number.jsonl", b'{"text": 3}', 'number.jsonl:1 has no string "text"'),
        ("list.jsonl", b"[1]", 'list.jsonl:1 has no string "text"'),
    ],
)
def test_files_that_are_no_text(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_documents([tmp_path / name])


def test_missing_file_and_directory(tmp_path):
    with pytest.raises(InputError, match="does not exist"):
        read_documents([tmp_path / "missing.txt"])
    with pytest.raises(InputError, match="is not a file"):
        read_documents([tmp_path])


@settings(max_examples=25, deadline=None)
@given(
    documents=st.lists(st.text(max_size=40), min_size=1, max_size=5),
    seq_len=st.integers(2, 9),
)
def test_blocks_are_the_tokens_in_order(tokenizer, documents, seq_len):
    end = tokenizer.eos_token_id
    tokens = [token for text in documents for token in [*tokenizer(text)["input_ids"], end]]
    whole = len(tokens) // seq_len * seq_len
    if whole == 0:
        with pytest.raises(InputError, match=f"the text is {len(tokens)} tokens, less than one block of {seq_len}"):
            make_blocks(documents, tokenizer, seq_len, "text")
        return
    blocks = make_blocks(documents, tokenizer, seq_len)
    assert all(len(block) == seq_len for block in blocks["input_ids"])
    assert [token for block in blocks["input_ids"] for token in block] == tokens[:whole]
    assert blocks["labels"][:] == blocks["input_ids"][:]


def test_split_is_disjoint_whole_and_drawn_by_seed(tokenizer):
    blocks = make_blocks(["x = 1\n" * 400], tokenizer, 8)
    blocks = blocks.add_column("number", list(range(len(blocks))))
    train, test = split(blocks, 0.25, seed=3)
    assert len(test) == round(len(blocks) * 0.25)
    assert sorted([*train["number"], *test["number"]]) == list(range(len(blocks)))
    assert split(blocks, 0.25, seed=3)[1]["number"][:] == test["number"][:]
    assert split(blocks, 0.25, seed=4)[1]["number"][:] != test["number"][:]
    assert split(blocks, 0, seed=3) == (blocks, None)


def test_too_few_blocks_to_hold_any_out(tokenizer):
    blocks = make_blocks(["if x: pass"], tokenizer, 4)
    with pytest.raises(InputError, match="too few to hold out"):
        split(blocks.select([0]), 0.1, seed=0)
