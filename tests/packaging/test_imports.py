"""What an import brings along, seen from a fresh interpreter in the repository root."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run(code: str) -> str:
    """Output of `python -c code` in the repository root, where kernels/ is in sight."""
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip().splitlines()[-1]


@pytest.mark.skipif(importlib.util.find_spec("kernels.layer") is None, reason="Hugging Face's `kernels` is absent")
def test_the_name_kernels_still_belongs_to_hugging_face():
    origin = Path(run("import kernels; print(kernels.__file__)"))
    assert "site-packages" in origin.parts and origin.parent.name == "kernels"
    assert ROOT / "kernels" not in origin.parents
    assert run("from kernels import LayerRepository; print(LayerRepository.__name__)") == "LayerRepository"


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs the extra `train`")
def test_llama_of_transformers_imports_beside_our_folder():
    code = "from transformers.models.llama.modeling_llama import LlamaForCausalLM as c; print(c.__name__)"
    assert run(code) == "LlamaForCausalLM"


@pytest.mark.parametrize("package", ["quantlib", "lora_ops"])
def test_importing_a_package_is_light(package):
    """No trainer library nor Triton comes along, and no CUDA context is made: a process may still fork afterwards."""
    heavy = ["transformers", "peft", "bitsandbytes", "datasets", "matplotlib", "quant_triton", "triton"]
    code = f"""
import json, sys, {package}, torch
print(json.dumps([[name for name in {heavy} if name in sys.modules], torch.cuda.is_initialized()]))
"""
    assert json.loads(run(code)) == [[], False]
