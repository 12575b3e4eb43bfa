"""The CUDA part on a machine without a GPU: when it is built, that it compiles, and that its decoding is right."""

import ctypes
import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from quantlib import functional, ops, reference

ROOT = Path(__file__).resolve().parents[2]
CUDA = ROOT / "csrc" / "cuda"


@pytest.fixture(scope="module")
def setup_py():
    spec = importlib.util.spec_from_file_location("setup_py", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("setting", "cuda_home", "torch_cuda", "built", "reason"),
    [
        (None, "/cuda", "13.0", True, ""),
        ("", "/cuda", "13.0", True, ""),
        (None, None, "13.0", False, "nvcc was not found"),
        (None, "/cuda", None, False, "built without CUDA"),
        ("0", "/cuda", "13.0", False, "QUANTLIB_CUDA=0"),
        ("0", None, None, False, "QUANTLIB_CUDA=0"),
        ("1", "/cuda", "13.0", True, ""),
        ("1", "/cuda", None, True, ""),
    ],
)
def test_when_the_cuda_module_is_built(setup_py, setting, cuda_home, torch_cuda, built, reason):
    decision, why = setup_py.decide_cuda(setting, cuda_home, torch_cuda)
    assert decision is built
    assert reason in why and bool(reason) is bool(why)
    assert "\n" not in why


@pytest.mark.parametrize(("setting", "cuda_home", "message"), [("1", None, "nvcc"), ("yes", "/cuda", "'yes'")])
def test_a_wish_that_cannot_be_met_is_an_error(setup_py, setting, cuda_home, message):
    with pytest.raises(ValueError, match=message) as error:
        setup_py.decide_cuda(setting, cuda_home, "13.0")
    assert "QUANTLIB_CUDA" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("setting", "chosen"),
    [(None, ["75", "80", "90"]), ("", ["75", "80", "90"]), ("90", ["90"]), ("80;90a", ["80", "90a"])],
)
def test_which_architectures_it_is_built_for(setup_py, setting, chosen):
    known = ["sm_75", "sm_80", "sm_86", "sm_90"]
    assert setup_py.choose_architectures(setting, known) == chosen
    with pytest.raises(ValueError, match=r"QUANTLIB_CUDA_ARCHS='80,13'.*'13'.*75, 80, 86, 90"):
        setup_py.choose_architectures("80,13", known)


def test_a_bad_setting_ends_the_build_with_one_line():
    env = {**os.environ, "QUANTLIB_CUDA": "maybe"}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1 and "'maybe'" in result.stderr


def test_a_build_without_torch_says_so_in_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise ImportError('not installed')")
    env = {**os.environ, "PYTHONPATH": str(tmp_path)}
    command = [sys.executable, "setup.py", "--version"]
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.returncode != 0
    assert len(result.stderr.strip().splitlines()) == 1 and "PyTorch" in result.stderr


def test_the_schema_is_that_of_the_op():
    text = re.sub(r'"\s*"', "", (CUDA / "ops.cpp").read_text())
    schemas = re.findall(r'm\.def\(\s*"(\w+)(.*?)"\)', text)
    assert schemas
    for name, schema in schemas:
        assert schema == ops.SCHEMAS[name]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory):
    """The device's decoding functions, compiled for the host."""
    folder = tmp_path_factory.mktemp("decoder")
    (folder / "host.cpp").write_text("""
#include "cuda/decode_4bit.h"
using namespace quantlib;
extern "C" void decode_all(const uint8_t* packed, const float* values, const uint8_t* codes, const float* nested,
                           const float* codebook, const float* offset, int fp4, int shift, int64_t n, float* out) {
  const Codebook table = fp4 ? fp4_codebook() : nf4_codebook();
  const Absmax absmax{values, codes, nested, codebook, offset};
  for (int64_t i = 0; i < n; ++i) {
    const int64_t first = i / 8 * 8;
    const int64_t bytes = (n - first + 1) / 2;
    const uint32_t word = load_word(packed + first / 2, bytes < 4 ? static_cast<int>(bytes) : 4);
    const float scale = values ? block_absmax<false>(absmax, i >> shift) : block_absmax<true>(absmax, i >> shift);
    out[i] = decode(word, static_cast<int>(i % 8), table.code, scale);
  }
}
""")
    library = folder / "decoder.so"
    flags = ["-std=c++17", "-O2", "-ffp-contract=off", "-Wall", "-Werror", "-shared", "-fPIC", f"-I{ROOT / 'csrc'}"]
    subprocess.run(["g++", *flags, str(folder / "host.cpp"), "-o", str(library)], check=True)
    return ctypes.CDLL(str(library)).decode_all


@pytest.mark.parametrize("quant_type", ops.QUANT_TYPES)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize(("n", "block_size"), [(1, 32), (7, 64), (16384, 32), (70001, 64), (8193, 4096)])
def test_the_device_functions_decode_like_the_reference(decoder, quant_type, double_quant, n, block_size):
    weight = torch.randn(n, generator=torch.Generator().manual_seed(n))
    q = functional.quantize_4bit(weight, quant_type, block_size, double_quant=double_quant)
    arguments = q.op_args()
    # Every byte, so every pair of codes, where there is room for them.
    packed = torch.arange((n + 1) // 2, dtype=torch.int64).to(torch.uint8).view(-1, 1)
    expected = reference.dequantize_4bit(packed, *arguments[1:], (n,), torch.float32)
    out = torch.full((n,), float("nan"))
    _, absmax, nested, codebook, offset = arguments[:5]
    tensors = (None, absmax, nested, codebook, offset) if double_quant else (absmax, None, None, None, None)
    pointers = [ctypes.c_void_p(t.data_ptr() if t is not None else None) for t in (packed, *tensors)]
    numbers = (ctypes.c_int(quant_type == "fp4"), ctypes.c_int(block_size.bit_length() - 1), ctypes.c_int64(n))
    decoder(*pointers, *numbers, ctypes.c_void_p(out.data_ptr()))
    assert torch.equal(out.view(torch.int32), expected.view(torch.int32))


needs_nvcc = pytest.mark.skipif(not shutil.which("nvcc"), reason="needs nvcc, CUDA's compiler, on PATH")


@needs_nvcc
@pytest.mark.parametrize("source", sorted(path.name for path in CUDA.glob("*.cu")))
@pytest.mark.parametrize("arch", ["75", "80", "90", "100", "120"])
def test_kernels_compile_without_spilling(source, arch, tmp_path):
    command = ["nvcc", "-O3", "-std=c++17", f"-arch=sm_{arch}", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    command += ["-c", str(CUDA / source), "-o", str(tmp_path / "kernel.o")]
    result = subprocess.run(command, capture_output=True, text=True)
    if "Unsupported gpu architecture" in result.stderr:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    assert result.returncode == 0, result.stderr
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert usage
    assert set(usage) == {("0", "0", "0")}, result.stderr


@needs_nvcc
@pytest.mark.slow
def test_the_cuda_module_builds_and_registers_its_ops_without_a_gpu(tmp_path):
    """A CPU build of torch lacks one function, the current stream's; a stand-in for it lets the module load."""
    for name in ("csrc", "quantlib"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copy(ROOT / "setup.py", tmp_path)
    env = {**os.environ, "QUANTLIB_CUDA": "1", "QUANTLIB_CUDA_ARCHS": "90"}
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    built = subprocess.run(build, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr

    module = tmp_path / "quantlib" / "_C_cuda.abi3.so"
    needed = subprocess.run(["readelf", "-d", str(module)], check=True, capture_output=True, text=True).stdout
    assert "[libtorch.so]" in needed, "a CUDA build of torch could not find its own stream for this module"

    stand_in = tmp_path / "stand_in.cpp"
    stand_in.write_text('extern "C" int aoti_torch_get_current_cuda_stream(int, void**) { return 1; }')
    library = tmp_path / "stand_in.so"
    subprocess.run(["g++", "-shared", "-fPIC", str(stand_in), "-o", str(library)], check=True)
    code = f"""
import ctypes, torch
if torch.version.cuda is None:
    ctypes.CDLL({str(library)!r}, ctypes.RTLD_GLOBAL)
torch.ops.load_library({str(module)!r})
print(torch.ops.quantlib_cuda.dequantize_4bit.default._schema)
"""
    loaded = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert loaded.returncode == 0, loaded.stderr
    assert loaded.stdout.startswith("quantlib_cuda::dequantize_4bit(")
