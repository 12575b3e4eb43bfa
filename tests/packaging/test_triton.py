"""The Triton kernels without a GPU: right under Triton's interpreter, and compiled for real devices."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlib import formats

triton = pytest.importorskip("triton", reason="needs Triton, which has wheels for Linux only")

ROOT = Path(__file__).resolve().parents[2]

# A process of its own: Triton reads TRITON_INTERPRET when a kernel is defined. Its interpreter truncates where
# bfloat16 should round, so that dtype is left to real devices.
INTERPRETED = """
import itertools, torch, quant_triton
from quantlib import functional, reference

torch.manual_seed(0)
torch.use_deterministic_algorithms(True)  # fills the output with NaN beforehand
shapes = [(1,), (7,), (5, 13), (64, 64), (33, 130), (3, 4099), (16, 4096)]
for shape, quant_type, double_quant in itertools.product(shapes, ("nf4", "fp4"), (False, True)):
    for block_size, dtype in itertools.product((32, 64, 4096), (torch.float32, torch.float16)):
        weight = torch.randn(shape)
        weight.view(-1)[:40] = 0
        weight.view(-1)[-1] = float("nan")
        arguments = functional.quantize_4bit(weight, quant_type, block_size, double_quant=double_quant).op_args()
        got = quant_triton.dequantize_4bit(*arguments, shape, dtype)
        expected = reference.dequantize_4bit(*arguments, shape, dtype)
        case = (shape, quant_type, double_quant, block_size, dtype)
        assert got.shape == expected.shape and got.dtype == dtype, case
        assert torch.equal(got.isnan(), expected.isnan()), case
        assert torch.equal(got.nan_to_num(), expected.nan_to_num()), case
assert quant_triton.dequantize_4bit(*arguments, (0, 4), torch.float32).shape == (0, 4)
"""


def test_dequantize_4bit_is_exact_under_the_interpreter():
    env = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    result = subprocess.run([sys.executable, "-c", INTERPRETED], env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_its_codebooks_are_those_of_the_format(quant_type):
    from quant_triton import nf4

    ours = torch.tensor(nf4.CODEBOOKS[quant_type], dtype=torch.float32)
    assert torch.equal(ours.view(torch.int32), formats.codebook(quant_type).view(torch.int32))


@pytest.mark.parametrize("change", [{"quant_type": "int4"}, {"offset": torch.zeros(())}])
def test_a_wrong_argument_is_named(change):
    import quant_triton

    arguments = {
        "packed": torch.zeros(32, 1, dtype=torch.uint8),
        "absmax": torch.ones(1),
        "nested_absmax": None,
        "nested_codebook": None,
        "offset": None,
        "quant_type": "nf4",
        "block_size": 64,
    }
    with pytest.raises(ValueError, match=next(iter(change))):
        quant_triton.dequantize_4bit(**{**arguments, **change}, shape=(64,), dtype=torch.float32)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("out", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("capability", [80, 90])
def test_dequantize_4bit_compiles_for(capability, out, double_quant):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from quant_triton import nf4

    signature = dict.fromkeys(("nested_absmax", "nested_codebook", "offset", "codebook"), "*fp32")
    signature |= {"packed": "*u8", "absmax": "*u8" if double_quant else "*fp32", "out": f"*{out}"} | dict.fromkeys(
        ("n", "n_bytes"), "i64"
    )
    constants = {"BLOCK_SIZE": 64, "DOUBLE_QUANT": double_quant, "BYTES": nf4.BYTES_PER_PROGRAM}
    signature |= dict.fromkeys(constants, "constexpr")
    signature = {name: signature[name] for name in nf4._dequantize_4bit_kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    source = ASTSource(nf4._dequantize_4bit_kernel, signature, constants, aligned)
    kernel = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"enable_fp_fusion": False})
    ptx = kernel.asm["ptx"]
    assert f".target sm_{capability}" in ptx
    assert "st.global.v4.b32" in ptx, "stores of 16 bytes"
    if out != "fp32":
        assert "st.shared" not in ptx, "each thread stores what it decoded"
    assert "fma.rn.f32" not in ptx, "the format rounds each product before it is added to"
    assert "st.local" not in ptx and "ld.local" not in ptx
