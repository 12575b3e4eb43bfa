"""Imports go one way: qlora -> lora_ops -> quantlib, and quant_triton stands alone."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
OURS = {"qlora", "lora_ops", "quantlib", "quant_triton"}
ALLOWED = {
    "qlora": {"qlora", "lora_ops", "quantlib"},
    "lora_ops": {"lora_ops", "quantlib"},
    "quantlib": {"quantlib", "quant_triton"},
}


def imported_names(path: Path) -> set[str]:
    """Top-level names of the absolute imports of a file, those inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names.update(alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("package", ALLOWED)
def test_a_layer_imports_only_layers_below_it(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    upward = {str(path.relative_to(ROOT)): imported_names(path) & OURS - ALLOWED[package] for path in files}
    assert not {path: names for path, names in upward.items() if names}


def test_quant_triton_needs_only_torch_and_triton():
    allowed = {"torch", "triton", *sys.stdlib_module_names}
    files = sorted((ROOT / "kernels" / "quant_triton").rglob("*.py"))
    assert files
    foreign = {path.name: imported_names(path) - allowed for path in files}
    assert not {name: names for name, names in foreign.items() if names}


def test_the_folder_kernels_is_no_package():
    assert not (ROOT / "kernels" / "__init__.py").exists(), "it would hide Hugging Face's package `kernels`"
    assert not (ROOT / "conftest.py").exists(), "pytest would then put the root, with kernels/, first on sys.path"
