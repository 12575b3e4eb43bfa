"""Configurations, buckets and the launch itself."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from quant_triton import launch
from quant_triton.launch import ARCHITECTURES, TUNABLES, Architecture, bucket, config, default, default_config, forced

LORA = {  # op -> what its configuration depends on besides rows, rank and dtype
    "lora_project": {"k": 4096, "drop": 4},
    "lora_dy": {"n": 4096},
    "lora_da": {"k": 4096, "drop": 0},
    "lora_add": {"n": 4096, "drop": 1},
}


@pytest.fixture
def op():
    """An op with a configuration that tells what it was asked with."""

    @default_config("some op")
    def _(arch, **key):
        return {"BLOCK": 16, "arch": arch, "key": key}

    launch._config.cache_clear()
    yield "some op"
    del TUNABLES["some op"]
    launch._config.cache_clear()


@triton.jit
def _product(a, b, out, SIZE: tl.constexpr, ACC: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    tl.store(out + tile, launch.dot(tl.load(a + tile), tl.load(b + tile), tl.full((SIZE, SIZE), 1, ACC)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8], ids=str)
def test_dot_accumulates_in_32_bits(dtype):
    a, b = (torch.randn(32, 32).mul(9).to(dtype) for _ in range(2))
    into, acc = (torch.int32, tl.int32) if dtype == torch.int8 else (torch.float32, tl.float32)
    out = torch.empty(32, 32, dtype=into)
    launch.launch(_product, (1,), a, b, out, fp_fusion=True, SIZE=32, ACC=acc)
    exact = a.double() @ b.double() + 1
    assert (out - exact).abs().max() <= 1e-6 * (a.double().abs() @ b.double().abs()).max()


def test_an_empty_grid_launches_nothing():
    out = torch.full((32, 32), -1.0)
    launch.launch(_product, (0, 4), out, out, out, fp_fusion=True, SIZE=32, ACC=tl.float32)
    assert (out == -1).all()


class Kernel:
    """Notes how it is launched."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *arguments, **constants: self.launches.append((grid, arguments, constants, on_gpu[-1]))


on_gpu = [0]


class Device:
    """What `torch.cuda.device` does to the current GPU."""

    def __init__(self, device):
        self.index = device.index

    def __enter__(self):
        on_gpu.append(self.index)

    def __exit__(self, *exc):
        on_gpu.pop()


@pytest.mark.parametrize("fp_fusion", [False, True])
@pytest.mark.parametrize("index", [0, 1])
def test_a_kernel_runs_on_the_gpu_of_its_first_argument(index, fp_fusion, monkeypatch):
    monkeypatch.setattr(launch, "INTERPRETED", False)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: on_gpu[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    kernel, tensor = Kernel(), SimpleNamespace(device=torch.device("cuda", index))
    launch.launch(kernel, (2,), tensor, 5, fp_fusion=fp_fusion, SIZE=32)
    assert kernel.launches == [((2,), (tensor, 5), {"enable_fp_fusion": fp_fusion, "SIZE": 32}, index)]
    assert on_gpu == [0]


@pytest.mark.parametrize(
    "m, expected", [(1, 1), (2, 2), (3, 4), (16, 16), (17, 32), (1024, 1024), (1025, 2048), (9999, 2048)]
)
def test_rows_fall_into_buckets(m, expected):
    assert bucket(m) == expected


def test_the_interpreter_has_an_architecture_of_its_own(op):
    found = config(op, torch.device("cpu"), m=4)
    assert found["arch"].interpreted and found["key"] == {"m": 4}
    assert config(op, torch.device("cpu"), m=4) is found, "asked once"
    with pytest.raises(TypeError):
        found["BLOCK"] = 1


def test_a_default_is_that_of_its_architecture(op):
    assert default(op, ARCHITECTURES["sm_90"], k=1)["arch"] == Architecture("cuda", 90, 132, 227 * 1024)
    assert ARCHITECTURES["gfx942"].warp == 64


@pytest.mark.parametrize("like, capability", [("sm_86", 87), ("sm_100", 103), ("sm_100", 110), ("sm_120", 121)])
def test_a_gpu_that_nobody_knows_is_treated_like_its_family(like, capability):
    known = ARCHITECTURES[like]
    new = replace(known, capability=capability)
    for dtype in (torch.bfloat16, torch.float32):
        for m in (1, 16, 64, 1024):
            for op in ("linear_4bit", "linear_4bit_dx"):
                key = {"m": m, "n": 4096, "k": 14336, "chunk": 64, "dtype": dtype}
                assert default(op, new, **key) == default(op, known, **key)
            for op, sizes in LORA.items():
                key = {"m": m, "r": 16, "dtype": dtype} | sizes
                assert default(op, new, **key) == default(op, known, **key)


def test_forced_configurations_end_with_their_block(op):
    with forced(op, {"BLOCK": 99}) as seen:
        assert config(op, torch.device("cpu"), m=4) == {"BLOCK": 99}
    assert seen.keys == [{"m": 4}]
    assert config(op, torch.device("cpu"), m=4)["BLOCK"] == 16
    with forced(op) as seen:
        assert config(op, torch.device("cpu"), m=4)["BLOCK"] == 16
    assert seen.keys == [{"m": 4}]


def test_a_tuned_configuration_comes_first(op, monkeypatch):
    tuned = {op: {"dtype=float16,m=8": {"config": {"BLOCK": 64}, "us": 1.0}}}
    monkeypatch.setattr(launch, "_tuned", lambda device: tuned)
    assert config(op, torch.device("cpu"), m=8, dtype=torch.float16) == {"BLOCK": 64}
    assert config(op, torch.device("cpu"), m=16, dtype=torch.float16)["BLOCK"] == 16


def test_a_gpu_s_name_becomes_a_file_s():
    assert launch.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
