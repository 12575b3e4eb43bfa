"""Comparisons, from recorded runs, and of a commit with the working tree."""

import copy
import json
import subprocess

import pytest

from bench import __main__ as command
from bench import compare, records


def faster(record, factor, op="linear_4bit"):
    """The record of a run in which our times of an op were divided by `factor`."""
    changed = copy.deepcopy(record)
    for e in changed["results"]:
        if e["op"] == op and e["peer"] == "quantlib":
            e |= {name: e[name] / factor for name in ("median", "p20", "p80")}
    return changed


def test_changes(recorded):
    found = compare.changes(recorded, faster(recorded, 1e3))
    assert {c.after["op"] for c in found} == {"quantize_4bit", "linear_4bit", "linear_int8"}
    for change in found:
        linear = change.after["op"] == "linear_4bit"
        assert change.faster == pytest.approx(1e3 if linear else 1)
        assert change.clear == linear


def test_text(recorded):
    text = compare.text(recorded, faster(recorded, 1e-3))
    rows = [line for line in text.splitlines() if line.startswith(("| l", "| q"))]
    assert len(rows) == 9 and all("**slower**" in row for row in rows[:4]) and not any("slower" in r for r in rows[4:])
    assert "| linear_4bit + backward | 128x256 | 1 |" in text
    assert "9 cases, geometric mean" in text and "The machines differ" not in text


def test_other_machines_and_cases_are_pointed_out(recorded):
    other = copy.deepcopy(recorded)
    other["machine"]["name"] = "another"
    other["results"] = [e for e in other["results"] if e["op"] != "quantize_4bit"]
    text = compare.text(recorded, other)
    assert "The machines differ" in text and "only before: 1, only after: 0" in text
    other["results"] = []
    with pytest.raises(ValueError, match="no case in common"):
        compare.text(recorded, other)


def test_a_result_that_was_wrong_is_not_compared(recorded):
    after = copy.deepcopy(recorded)
    ours = next(e for e in after["results"] if e["peer"] == "quantlib")
    ours["status"] = "wrong"
    assert records.case_key(ours) not in {c.case for c in compare.changes(recorded, after)}


def test_files_folders_and_commits(folder, recorded, monkeypatch, capsys):
    root = folder.parents[2]
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.com")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-qm", "recorded")):
        subprocess.run((*git, *arguments), cwd=root, check=True)
    monkeypatch.setattr(compare, "ROOT", root)
    monkeypatch.setattr(compare.machine, "results_dir", lambda: folder)
    (folder / "ops.json").write_text(json.dumps(faster(recorded, 1e3)))
    assert command.main(["compare", "HEAD", str(folder)]) == 0
    from_commit = capsys.readouterr().out
    assert "| faster |" in from_commit and "slower" not in from_commit
    assert command.main(["compare", str(folder / "ops.json"), "HEAD"]) == 0
    assert "**slower**" in capsys.readouterr().out
    assert command.main(["compare", "HEAD", "no-such-thing"]) == 2
    assert "'no-such-thing' is neither a file, nor a folder, nor a commit" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["one"], ["a", "b", "c"], [], ["a", "--base", "HEAD"]])
def test_what_to_compare(arguments, capsys):
    assert command.main(["compare", *arguments]) == 2
    assert capsys.readouterr().err


def test_rounds_are_merged(recorded):
    runs = [faster(recorded, factor) for factor in (1, 2, 4)]
    found = compare._ours(compare.merged(runs))
    for key, entry in compare._ours(recorded).items():
        factor = 2 if entry["op"] == "linear_4bit" else 1
        assert found[key]["median"] == pytest.approx(entry["median"] / factor)
        assert found[key]["p80"] == entry["p80"] and found[key]["p20"] == pytest.approx(entry["p20"] / factor**2)


def test_base_and_head_are_measured_in_turn(monkeypatch, capsys):
    """With the working tree in the place of the commit: checking out and building is left to git and setup.py."""
    monkeypatch.setattr(compare, "checkout", lambda revision: compare.ROOT)
    assert command.main(["compare", "--base", "HEAD", "--rounds", "1", "--options", "--quick --ops quantize_int8"]) == 0
    out = capsys.readouterr().out
    assert "| quantize_int8 | 128x256 |" in out and "1 cases, geometric mean" in out


def test_checkout_of_a_commit_is_built_once(tmp_path, monkeypatch):
    git = ("git", "-c", "user.name=x", "-c", "user.email=x@example.com")
    (tmp_path / "setup.py").write_text("open('log', 'a').write('built ')")
    for arguments in (("init", "-q"), ("add", "."), ("commit", "-qm", "one")):
        subprocess.run((*git, *arguments), cwd=tmp_path, check=True)
    monkeypatch.setattr(compare, "ROOT", tmp_path)
    tree = compare.checkout("HEAD")
    assert tree == compare.checkout("HEAD") and tree.parent == tmp_path / ".cache" / "bench"
    assert (tree / "log").read_text() == "built "
    with pytest.raises(ValueError, match="no-such-commit"):
        compare.checkout("no-such-commit")
