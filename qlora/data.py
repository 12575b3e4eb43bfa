"""Text files to blocks of token ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import chain
from pathlib import Path

from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from qlora.errors import InputError


def read_documents(files: Sequence[str | Path]) -> list[str]:
    """The documents of UTF-8 text files: a whole file, or for `.jsonl` each line's "text".

    Raises InputError for a file that is missing, empty or not text.
    """
    documents: list[str] = []
    for file in map(Path, files):
        if not file.exists():
            raise InputError(f"data file {file} does not exist; give existing text files")
        if not file.is_file():
            raise InputError(f"data file {file} is not a file; give text files, for example {file}/*.txt")
        try:
            text = file.read_bytes().decode("utf-8")
        except UnicodeDecodeError as error:
            raise InputError(
                f"data file {file} is not UTF-8 text (byte {error.start}); convert it or leave it out"
            ) from None
        except OSError as error:
            raise InputError(f"data file {file} cannot be read: {error.strerror}") from None
        if "\0" in text:
            raise InputError(f"data file {file} is binary (it holds zero bytes); give text files")
        if not text.strip():
            raise InputError(f"data file {file} is empty; leave it out")
        documents += _json_lines(file, text) if file.suffix == ".jsonl" else [text]
    return documents


def _json_lines(file: Path, content: str) -> list[str]:
    documents = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise InputError(f"{file}:{number} is not JSON ({error.msg}); one object a line") from None
        if not isinstance(record, dict) or not isinstance(record.get("text"), str):
            raise InputError(f'{file}:{number} has no string "text"; each line needs one, {{"text": "..."}}')
        documents.append(record["text"])
    return documents


def make_blocks(
    documents: Sequence[str], tokenizer: PreTrainedTokenizerBase, seq_len: int, name: str = "data"
) -> Dataset:
    """Tokenise, join with the end-of-sequence token, and cut into blocks of `seq_len` tokens.

    Returns a dataset of `input_ids` and `labels`; the tokens that fill no block are left out. Raises
    InputError, naming the data `name`, if there is not even one block.
    """
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenise(batch: dict[str, list[str]]) -> dict[str, list[list[int]]]:
        ids = tokenizer(batch["text"], return_attention_mask=False, verbose=False)["input_ids"]
        return {"ids": [row if row[-1:] == end else row + end for row in ids]}

    def cut(batch: dict[str, list[list[int]]]) -> dict[str, list[list[int]]]:
        ids = list(chain.from_iterable(batch["ids"]))
        blocks = [ids[i : i + seq_len] for i in range(0, len(ids) - seq_len + 1, seq_len)]
        return {"input_ids": blocks, "labels": blocks}

    texts = Dataset.from_dict({"text": list(documents)})
    tokens = texts.map(tokenise, batched=True, remove_columns=["text"], desc="tokenising")
    total = sum(map(len, tokens["ids"]))
    if total < seq_len:
        raise InputError(
            f"the {name} is {total} tokens, less than one block of {seq_len}; give more text or a smaller --seq-len"
        )
    return tokens.map(cut, batched=True, batch_size=len(tokens), remove_columns=["ids"], desc="cutting")


def split(blocks: Dataset, eval_fraction: float, seed: int) -> tuple[Dataset, Dataset | None]:
    """Hold out `eval_fraction` of the blocks, drawn by `seed`; (train, None) for 0.

    Raises InputError if either part would have no block.
    """
    if eval_fraction == 0:
        return blocks, None
    held_out = max(1, round(len(blocks) * eval_fraction))
    if held_out >= len(blocks):
        raise InputError(
            f"the data is {len(blocks)} blocks, too few to hold out {held_out} for evaluation; give more "
            f"text, a smaller --seq-len, or --eval-fraction 0"
        )
    parts = blocks.train_test_split(test_size=held_out, seed=seed)
    return parts["train"], parts["test"]
