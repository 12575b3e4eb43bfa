"""What may be written to and resumed from, before anything is written."""

import json

import pytest
from datasets import Dataset

from qlora.errors import InputError
from qlora.options import TrainOptions
from qlora.output import check_output, checkpoint_to_resume, clear_output, digest


def check(output, **changes):
    check_output(output, TrainOptions(model="m", data=["d"], output=str(output), **changes))


def test_new_and_empty_directories_are_fine(tmp_path):
    check(tmp_path)
    check(tmp_path / "deep" / "below")
    assert list(tmp_path.iterdir()) == []


def test_output_that_is_a_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("")
    with pytest.raises(InputError, match="is a file"):
        check(file)
    with pytest.raises(InputError, match="cannot be written to"):
        check(file / "below")


def test_output_in_use(tmp_path):
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(InputError, match="exists and is not empty"):
        check(tmp_path)
    check(tmp_path, overwrite=True)
    with pytest.raises(InputError, match="no training to resume"):
        check(tmp_path, resume=True)


def test_clear_removes_only_what_a_training_writes(tmp_path):
    (tmp_path / "checkpoints").mkdir()
    for name in ("notes.md", "loss.png", "checkpoints/run.json"):
        (tmp_path / name).write_text("")
    clear_output(tmp_path)
    clear_output(tmp_path / "missing")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.md"]


def test_no_checkpoint_is_complete(tmp_path):
    for number in (9, 10):
        (tmp_path / f"checkpoints/checkpoint-{number}").mkdir(parents=True)
    (tmp_path / "checkpoints/run.json").write_text(json.dumps({"seed": 1}))
    assert checkpoint_to_resume(tmp_path, {"seed": 1}) is None
    with pytest.raises(InputError, match="seed is 2, was 1"):
        checkpoint_to_resume(tmp_path, {"seed": 2})


def test_digest_depends_on_content_and_order():
    one, two, three = (Dataset.from_dict({"input_ids": ids}) for ids in ([[1, 2], [3, 4]], [[3, 4], [1, 2]], [[1, 2]]))
    assert digest(one) == digest(Dataset.from_dict({"input_ids": [[1, 2], [3, 4]]}))
    assert len({digest(one), digest(two), digest(three)}) == 3
