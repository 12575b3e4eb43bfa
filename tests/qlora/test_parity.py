"""Training on quantized bases follows training on the 16-bit one, within the noise of its seeds."""

import pytest

from bench.parity import SEEDS, distance, measure, noise, record, report, windows
from qlora import corpus
from qlora.demo import write_corpus
from qlora.pretrain import BaseOptions, pretrain

STEPS = 220
SMALL = BaseOptions(
    vocab=1024, hidden=128, intermediate=320, layers=2, heads=2, positions=64, steps=300, batch_size=16, seq_len=64
)
SETTINGS = {"seq_len": 64, "batch_size": 16, "progress": False}


def test_windows_and_distances(monkeypatch):
    monkeypatch.setattr("bench.parity.WINDOW", 2)
    assert windows([1.0, 3.0, 5.0, 7.0, 9.0]).tolist() == [2.0, 6.0]
    assert distance([1.0, 3.0, 5.0, 7.0], [2.0, 4.0, 3.0, 5.0]) == 1.5
    assert noise([[0.0, 0.0], [1.0, 1.0], [3.0, 3.0]]) == 1.0


@pytest.mark.slow
def test_losses_follow_the_16_bit_run(tmp_path):
    pretrain(corpus.sources()[:60], tmp_path / "base", SMALL, progress=False)
    files = write_corpus(tmp_path / "data", seed=0)
    runs = measure(tmp_path / "base", files, STEPS, **SETTINGS)
    result = report(runs)
    assert all(len(run["losses"]) == STEPS >= 200 for run in runs.values())
    assert result["8 bits"] < result["noise"], result
    assert result["4 bits"] < result["noise"], result

    # The comparison can fail: the noise is far below what is learned, and below the effect of a wrong gradient.
    plain = runs["16 bits, seed 0"]["losses"]
    learned = windows(plain)[0] - windows(plain)[-1]
    assert learned > 10 * result["noise"]
    half = record(tmp_path / "base", files, 4, seed=0, max_steps=STEPS, **SETTINGS, lr=2e-3 / 2)
    assert distance(half["losses"], plain) > result["noise"]

    held_out = [runs[f"16 bits, seed {seed}"]["held_out"] for seed in SEEDS]
    for bits in (8, 4):
        difference = abs(runs[f"{bits} bits, seed 0"]["held_out"] - held_out[0])
        assert difference < max(held_out) - min(held_out), (bits, held_out)
