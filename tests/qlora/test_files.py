"""Files appear whole or not at all."""

import json

import pytest

from qlora.files import published, replaced, write_json


def test_replaced_keeps_the_old_file_on_failure(tmp_path):
    file = tmp_path / "deep" / "file.txt"
    with replaced(file) as partial:
        partial.write_text("old")
    with pytest.raises(RuntimeError), replaced(file) as partial:
        partial.write_text("half")
        raise RuntimeError
    assert file.read_text() == "old"
    assert list(file.parent.iterdir()) == [file]


def test_write_json(tmp_path):
    write_json(tmp_path / "a.json", {"x": [1.5, None]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": [1.5, None]}
    with pytest.raises(TypeError):
        write_json(tmp_path / "b.json", {"x": object()})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]


def test_published_all_or_nothing(tmp_path):
    with published(tmp_path, last="index") as staging:
        for name in ("index", "data"):
            (staging / name).write_text("1")
    with pytest.raises(RuntimeError), published(tmp_path, last="index") as staging:
        (staging / "data").write_text("2")
        raise RuntimeError
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"index": "1", "data": "1"}


def test_published_moves_the_last_file_last(tmp_path, monkeypatch):
    (tmp_path / "index").write_text("old")
    moved = []

    def crash(source, target):
        moved.append(target.name)
        assert not (tmp_path / "index").exists()
        if target.name == "z":
            raise OSError("disk full")
        source.rename(target)

    monkeypatch.setattr("os.replace", crash)
    with pytest.raises(OSError, match="disk full"), published(tmp_path, last="index") as staging:
        for name in ("index", "a", "z"):
            (staging / name).write_text("new")
    assert moved == ["a", "z"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
