"""The plot is a PNG, and its bold line the running mean."""

import pytest

from qlora.plot import plot_losses, running_mean


def test_running_mean():
    points = [(1, 4.0), (2, 2.0), (3, 6.0)]
    assert running_mean(points, 2) == [(1, 4.0), (2, 3.0), (3, 4.0)]
    assert running_mean(points, 1) == points
    assert running_mean([], 5) == []


@pytest.mark.parametrize("held_out", [[], [(1, 3.0), (2, 2.0)]])
def test_plot(tmp_path, held_out):
    plot_losses(tmp_path / "loss.png", {"a": [(1, 2.0), (2, 1.0)], "b": [(1, 2.0)]}, "title", held_out)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert len(list(tmp_path.iterdir())) == 1
