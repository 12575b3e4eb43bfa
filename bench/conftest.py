"""Options of the suites that pytest-benchmark runs: `pytest bench --suite default --benchmark-json=out.json`."""

import torch


def pytest_addoption(parser):
    group = parser.getgroup("bench")
    group.addoption("--suite", default="quick", help="cases: quick (default), default (minutes) or full (hours)")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")


def pytest_generate_tests(metafunc):
    """One test per case and contestant, those of a group together: its weights are built once."""
    if {"case", "contestant"} <= set(metafunc.fixturenames):
        from bench import peers, suites

        config = metafunc.config
        chosen = suites.suite(config.getoption("--suite"), config.getoption("--bench-device"))
        pairs = [(case, peer) for case in chosen for peer in peers.CONTESTANTS[case.op]]
        metafunc.parametrize("case, contestant", pairs, ids=[f"{case}, {peer.name}" for case, peer in pairs])
