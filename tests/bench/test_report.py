"""The report, from a recorded run."""

import json
import re

import pytest

from bench import __main__ as command
from bench import limits, plots, records, report, targets

README = f"# Title\n\nbefore\n\n{report.START}\nstale\n{report.END}\n\nafter\n"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.0123, "12.3 ms"), (0.000456, "456 us"), (1e-7, "0.10 us"), (0.5, "500 ms"), (123.4, "123 s")],
)
def test_duration(seconds, text):
    assert report.duration(seconds) == text


def entry(recorded, peer, op="linear_4bit", m=5, backward=False):
    found = [e for e in recorded["results"] if (e["op"], e["m"], e["backward"], e["peer"]) == (op, m, backward, peer)]
    assert len(found) == 1
    return found[0]


def columns(text):
    """The rows of a Markdown table as dictionaries."""
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines()]
    return [dict(zip(lines[0], row, strict=True)) for row in lines[2:]]


def test_table_of_an_op(recorded):
    ours, torch_ = entry(recorded, "quantlib"), entry(recorded, "torch")
    ours |= {"median": 0.002, "limit": 0.5, "peak_memory": 3e6}
    torch_ |= {"median": 0.004, "ratio": 2.0}
    entry(recorded, "bitsandbytes").update(status="wrong", reason="error 9 times that of plain PyTorch")
    rows = columns(report.op_table([e for e in recorded["results"] if e["op"] == "linear_4bit" and not e["backward"]]))
    assert [row["M"] for row in rows] == ["1", "5"]
    row = rows[1]
    assert row["quantlib"] == "2.00 ms" and row["of limit"] == "50%" and row["memory"] == "3.0 MB"
    assert row["torch"] == "4.00 ms, 2.00x" and row["bitsandbytes"] == "**wrong**"
    assert not any("Unsloth" in name or "torchao" in name for name in row)  # not installed: no empty column


def test_gpu_rows_show_graphs_and_host_time(recorded):
    ours, torch_ = entry(recorded, "quantlib"), entry(recorded, "torch")
    for e in (ours, torch_):
        e |= {"device": "cuda", "host": 5e-6}
    ours |= {"median": 20e-6, "graph": 2e-6}
    torch_ |= {"median": 30e-6, "graph": 8e-6, "ratio": 1.5, "graph_ratio": 4.0}
    (row,) = columns(report.op_table([ours, torch_]))
    assert row["quantlib"] == "20.0 us (2.00 us in a graph)" and row["host"] == "5.00 us"
    assert row["torch"] == "30.0 us (8.00 us in a graph), 4.00x"


def test_targets(recorded):
    square = {"shape": [4096, 4096], "device": "cpu", "dtype": "bfloat16"}
    ours, bnb = entry(recorded, "quantlib", m=1), entry(recorded, "bitsandbytes", m=1)
    ours |= square
    bnb |= square | {"ratio": 1.25}
    entry(recorded, "torch", m=1).update(square, ratio=4.5)
    outcomes = {(o.target.what, o.target.peer): o for o in targets.outcomes(recorded)}
    missed, met = outcomes["linear_4bit, M = 1", "bitsandbytes"], outcomes["linear_4bit, M = 1", "torch"]
    assert (missed.measured, missed.met, missed.where) == (1.25, False, "4096x4096, M = 1")
    assert (met.measured, met.met) == (4.5, True)
    assert outcomes["linear_4bit, M >= 64", "torch"].met is None
    rows = columns(report.target_table(recorded))
    assert {"what": "linear_4bit, M = 1", "target": ">= 1.3x bitsandbytes", "measured": "1.25x"}.items() <= rows[
        2
    ].items()
    assert rows[2][""] == "**not met**" and rows[3][""] == "met"


def test_targets_of_bandwidth(recorded):
    recorded["limits"]["cuda"] = recorded["limits"].pop("cpu") | {"copy": 4e12}
    ours = entry(recorded, "quantlib", m=1)
    ours |= {"device": "cuda", "shape": [8192, 28672], "dtype": "bfloat16", "read": 3e6, "written": 1e6}
    ours |= {"median": 9e-6, "graph": 1.2e-6}
    (found,) = [o for o in targets.outcomes(recorded) if o.target.peer == targets.COPY and "linear" in o.target.op]
    assert found.measured == pytest.approx(4e6 / 4e12 / 1.2e-6) and found.met
    assert all(outcome.target.device == "cuda" for outcome in targets.outcomes(recorded))


def test_page_and_readme(folder, recorded, tmp_path):
    recorded["results"][0].update(status="wrong", reason="error 9 times")
    recorded["crashed"] = ["linear_4bit 1x1"]
    (folder / "ops.json").write_text(json.dumps(recorded))
    readme = tmp_path / "README.md"
    readme.write_text(README)
    assert command.main(["report", str(folder), "--readme", str(readme)]) == 0
    page, text = (folder / "README.md").read_text(), readme.read_text()
    assert (
        text.startswith("# Title\n\nbefore\n\n") and text.endswith(f"{report.END}\n\nafter\n") and "stale" not in text
    )
    assert f"- {recorded['results'][0]['peer']}, wrong: error 9 times ({recorded['results'][0]['op']} bfloat16)" in page
    assert "- linear_4bit 1x1: the process ended" in page
    for name, _ in limits.text(recorded["limits"]["cpu"]):
        assert f"| {name} |" in page
    links = [tmp_path / link for link in re.findall(r"\]\((.+?)\)", text)]
    links += [folder / link for link in re.findall(r"\]\((.+?)\)", page)]
    assert {link.name for link in links} >= {"overview.png", "linear_4bit.png", "quantize_4bit.png", "README.md"}
    for link in links:
        assert link.exists()
        assert link.suffix != ".png" or link.read_bytes().startswith(b"\x89PNG")
    again = (page, text)
    assert command.main(["report", str(folder), "--readme", str(readme)]) == 0
    assert again == ((folder / "README.md").read_text(), readme.read_text())


@pytest.mark.parametrize("text", ["", report.START, f"{report.END}\n{report.START}"])
def test_readme_without_markers_is_left_alone(folder, tmp_path, text, capsys):
    readme = tmp_path / "README.md"
    readme.write_text(text)
    assert command.main(["report", str(folder), "--readme", str(readme)]) == 2
    assert "it needs a line" in capsys.readouterr().err
    assert readme.read_text() == text


def test_a_folder_without_records(tmp_path, capsys):
    assert command.main(["report", str(tmp_path), "--no-readme"]) == 2
    assert "expected one of ops.json, model.json, quality.json" in capsys.readouterr().err


def test_no_plot_without_right_results(recorded, tmp_path):
    for e in recorded["results"]:
        e["status"] = "failed"
    assert plots.draw(recorded, tmp_path) == {}
    assert plots.overview(recorded, tmp_path / "x.png") is None


def test_the_repository_has_the_markers():
    text = (report.machine.RESULTS.parent.parent / "README.md").read_text()
    assert text.index(report.START) < text.index(report.END)


def test_recorded_data_is_a_record(recorded):
    assert recorded["schema"] == records.SCHEMA and recorded["kind"] == "ops"
