"""The quality benchmark: its errors are those of the formats, and its planted outliers change no function."""

import math

import pytest
import torch

from bench import quality, quality_report, records
from bench.__main__ import main
from bench.quality_formats import formats, has_bitsandbytes
from qlora.model import Quantization
from tests.threads import threads


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Matrices this small are multiplied faster by one thread than by several."""
    with threads(1):
        yield


@pytest.fixture(scope="module")
def record(tmp_path_factory):
    """What the command writes for a tiny model."""
    out = tmp_path_factory.mktemp("quality")
    assert main(["quality", "--quick", "--out", str(out)]) == 0
    return records.read(out / "quality.json")


def _weights(record):
    return {row["format"]: row for row in quality_report.rows_of(record, "weights")}


def test_errors_are_those_of_the_formats(record):
    rows = _weights(record)
    assert all(row["status"] == "ok" for row in rows.values())
    assert rows["NF4, block 64"]["weight_error"] == pytest.approx(0.09, abs=0.01)  # of normal weights
    assert rows["NF4, block 64"]["weight_error"] < rows["FP4, block 64"]["weight_error"]
    assert rows["NF4, block 64"]["weight_error"] < rows["NF4, block 512"]["weight_error"]
    assert rows["int8, row"]["weight_error"] < rows["int8, tensor"]["weight_error"] < 0.02


def test_bits_per_weight(record):
    rows = _weights(record)
    assert rows["NF4, block 64"]["bits"] == 4.5
    assert rows["NF4, block 64, double quant"]["bits"] == pytest.approx(4.13, abs=0.02)
    assert rows["int8, tensor"]["bits"] == pytest.approx(8, abs=0.01)


@pytest.mark.skipif(not has_bitsandbytes(), reason="needs bitsandbytes")
def test_codes_are_those_of_bitsandbytes(record):
    for row in _weights(record).values():
        if "bitsandbytes" in row:
            assert row["differing"]["codes"] == 0, row
    block_64 = _weights(record)["NF4, block 64"]
    assert block_64["bitsandbytes"]["output_error"] == pytest.approx(block_64["output_error"], rel=1e-6)


def test_the_threshold_saves_what_outliers_cost(record):
    found = {(r["planted"], r["magnitude"], r.get("threshold")): r for r in quality_report.rows_of(record, "outliers")}
    for planted in ("activations", "both"):
        plain, split = found[planted, 32, 0.0], found[planted, 32, 6.0]
        assert split["output_error"] < 0.75 * plain["output_error"]
        assert 0 < split["outlier_columns"] < 0.2
        assert plain["outlier_columns"] == 0


def test_planting_scales_exactly():
    generator = torch.Generator().manual_seed(0)
    weight, x = (torch.randn(n, 64, generator=generator).bfloat16() for n in (32, 16))
    layer = quality.Layer("layer", weight, x)
    exact = layer.exact()
    assert torch.equal(quality.plant(layer, "both", 32).exact(), exact)
    for where in ("activations", "weights"):
        assert not torch.equal(quality.plant(layer, where, 8).exact(), exact)
    assert torch.equal(layer.weight, weight)


def test_planted_outliers_change_no_perplexity(record):
    rows = quality_report.rows_of(record, "perplexity")
    plain = {row["magnitude"]: row["perplexity"] for row in rows if row["format"] == "16 bits"}
    assert set(plain) == set(quality.MAGNITUDES)
    assert len(set(plain.values())) == 1
    assert all(math.isfinite(row["perplexity"]) for row in rows)


def test_report(record, tmp_path):
    page = quality_report.page(record, tmp_path)
    assert "| NF4, block 64, double quant | 4.1" in page
    assert "| LLM.int8(), threshold 6 | x32 |" in page
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert "quality.png" in quality_report.section(record, tmp_path)


def test_report_without_bitsandbytes(record, tmp_path):
    drop = ("bitsandbytes", "differing")
    rows = [{name: value for name, value in row.items() if name not in drop} for row in record["results"]]
    assert "- bitsandbytes" not in quality_report.page({**record, "results": rows}, tmp_path)


@pytest.mark.parametrize(
    ("ours", "theirs", "status"),
    [(1.0, 1.0, "ok"), (1.005, 1.0, "ok"), (1.02, 1.0, "wrong"), (math.nan, 1.0, "wrong"), (0.5, None, "ok")],
)
def test_larger_errors_are_wrong(ours, theirs, status):
    row = {"error": ours} | ({} if theirs is None else {"bitsandbytes": {"error": theirs}})
    assert quality.judged(row, "error")["status"] == status


def test_names():
    assert len({form.name for form in formats()}) == len(list(formats()))
    assert quality.describe(Quantization(4, "fp4", 128, False)) == "FP4, block 128"
    assert quality.describe(Quantization(8, threshold=0.0)) == "int8, no threshold"
