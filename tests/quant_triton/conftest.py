"""Runs the tests of this folder under Triton's interpreter, each file in a process of its own.

They are last, and what they wait for, which is also what test_compiled.py has compiled, starts first: it runs beside
all other tests, on what these leave of the cores.

Triton decides when a kernel is defined whether it will be interpreted, and the rest of the suite needs its compiler. So
pytest sees a file here as one test, which runs the file under TRITON_INTERPRET=1. To see or choose single tests:

    TRITON_INTERPRET=1 python -m pytest tests/quant_triton/test_nf4.py -k nested

The interpreter is wrong about bfloat16: use `dtypes` here, and compile bfloat16 in test_compiled.py.
"""

import importlib.util
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import ClassVar

import pytest

HERE = Path(__file__).parent
ROOT = Path(__file__).resolve().parents[2]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
NEED_THE_COMPILER = ("test_compiled.py",)

if importlib.util.find_spec("triton") is None:  # it has wheels for Linux only
    collect_ignore_glob = ["test_*.py"]
elif INTERPRETING:
    collect_ignore = list(NEED_THE_COMPILER)


class InterpretedFile(pytest.File):
    """A test file that becomes one test."""

    def collect(self):
        yield InterpretedTests.from_parent(self, name="interpreted")


def _run(path: Path, marks: str) -> subprocess.CompletedProcess:
    command = ["nice", "-n", "19", sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider"]
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    # One thread: those of processes that share the cores wait for each other, spinning.
    env = {
        **os.environ,
        "TRITON_INTERPRET": "1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
    }
    return subprocess.run([*command, "-m", marks, path], cwd=ROOT, env=env, capture_output=True, text=True)


class InterpretedTests(pytest.Item):
    """Passes if all tests of its file do."""

    pool = ThreadPoolExecutor(os.cpu_count())
    runs: ClassVar[dict[Path, Future]] = {}

    def runtest(self):
        result = self.runs[self.path].result()
        self.add_report_section("call", "under the interpreter", result.stdout + result.stderr)
        # 5: the marks chosen leave no test.
        assert result.returncode in (0, 5), f"{self.path.name} failed under Triton's interpreter, see its output"

    def repr_failure(self, excinfo):
        return str(excinfo.value)

    def reportinfo(self):
        return self.path, None, f"{self.path.name} under Triton's interpreter"


compilers = ExitStack()
compiling: dict[str, Future] = {}  # by the test that asks for it


@pytest.fixture
def found(request):
    """What the kernel of a test's `case` becomes."""
    return compiling[request.node.nodeid]


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.parent == HERE)


def pytest_collection_finish(session):
    if session.config.option.collectonly:
        return
    for item in session.items:
        if isinstance(item, InterpretedTests):
            item.runs[item.path] = item.pool.submit(_run, item.path, session.config.getoption("-m"))
    if asking := [item for item in session.items if "found" in getattr(item, "fixturenames", ())]:
        from bench import compiled

        cases = [item.callspec.params["case"] for item in asking]
        futures = compilers.enter_context(compiled.compiling(cases))
        compiling.update(zip([item.nodeid for item in asking], futures, strict=True))


def pytest_sessionfinish():
    InterpretedTests.pool.shutdown(cancel_futures=True)
    compilers.close()


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path, parent):
    if not INTERPRETING and module_path.parent == HERE and module_path.name not in NEED_THE_COMPILER:
        return InterpretedFile.from_parent(parent, path=module_path)
    return None
