"""Every Triton kernel compiled for every GPU: the intended instructions, no spills, shared memory that fits."""

import importlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from bench import compiled
from bench.compiled import Expect, Variant, complaints, facts
from quant_triton import launch
from quant_triton.launch import ARCHITECTURES

CASES = [(variant, target) for variant in compiled.variants() for target in variant.targets]


@pytest.mark.parametrize("case", CASES, ids=[f"{v.name}-{t}" for v, t in CASES])
def test_it_compiles_as_expected(case, found):
    variant, target = case
    assert complaints(variant, target, found.result()) == []


def test_every_kernel_that_is_launched_is_compiled():
    here = {variant.kernel for variant in compiled.variants()}
    for path in Path(launch.__file__).parent.glob("*.py"):
        names = re.findall(r"\blaunch\(\s*(\w+),", path.read_text(encoding="utf-8"))
        module = importlib.import_module(f"quant_triton.{path.stem}") if names else None
        assert {getattr(module, name) for name in names} <= here, path.name


def test_no_kernel_compiles_again_for_another_number_of_rows():
    for kernel in {variant.kernel for variant in compiled.variants()}:
        for parameter in kernel.params:
            if parameter.name in ("m", "M", "R", "count", "blocks_per_split"):
                assert parameter.do_not_specialize, (kernel.__name__, parameter.name)


def test_names_are_unique():
    names = [variant.name for variant in compiled.variants()]
    assert len(names) == len(set(names))


def test_without_the_interpreter_a_cpu_tensor_is_refused():
    with pytest.raises(ValueError, match="TRITON_INTERPRET=1"):
        launch.launch(_tile, (1,), torch.zeros(1), fp_fusion=True)


# ---------------------------------------------------------------------------------------------------
# What is read from the compiler's output


@triton.jit
def _tile(a, b, out, n, SIZE: tl.constexpr, DECODE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tile = index[:, None] * SIZE + index[None, :]
    left = tl.load(a + tile, mask=index[None, :] < n, other=0.0)
    if DECODE:
        left = (left * left).to(a.dtype.element_ty)
    acc = launch.dot(left, tl.trans(tl.load(b + tile)), tl.zeros((SIZE, SIZE), tl.float32))
    tl.store(out + tile, acc.to(out.dtype.element_ty))


def tile(decode=False, size=64, n="i32:16", **expect):
    signature = {"a": "*bf16", "b": "*bf16", "out": "*bf16", "n": n}
    constants = {"SIZE": size, "DECODE": decode, "num_warps": 4}
    return Variant("tile", _tile, signature, constants, {"enable_fp_fusion": True}, Expect(**expect))


@pytest.mark.parametrize(
    "target, decode, tensor",
    [
        ("sm_80", False, "mma.m16n8k16.row.col.f32.bf16.bf16.f32"),
        ("sm_90", False, "wgmma.m64n64k16.f32.bf16.bf16 A in shared memory"),
        ("sm_90", True, "wgmma.m64n64k16.f32.bf16.bf16 A in registers"),
        ("gfx942", False, "v_mfma_f32_"),
    ],
)
def test_tensor_core_instructions_are_found(target, decode, tensor):
    found = facts(tile(decode), target)
    assert found.tensor.startswith(tensor)
    assert found.registers > 16 and found.stack == 0 and found.shared > 0 and found.instructions > 100
    assert found.load == 16 and found.store in (8, 16)


def test_a_load_is_as_wide_as_is_known_to_be_aligned():
    assert facts(tile(), "sm_90").load == 16
    assert facts(tile(n="i32"), "sm_90").load <= 16


def test_what_is_not_as_expected_is_said():
    variant = tile(tensor={"sm_90": "mma.m16"}, load=64, absent=("wgmma",))
    found = facts(variant, "sm_90")
    wrong = complaints(variant, "sm_90", replace(found, stack=8, shared=1 << 20))
    assert [text.split()[0] for text in wrong] == ["8", "1048576", "tensor-core", "loads", "'wgmma'"]


@pytest.mark.parametrize("names, message", [({"n": None}, r"missing: \['n'\]"), ({"m": "i32"}, r"\['m'\]")])
def test_a_signature_that_is_not_the_kernel_s(names, message):
    signature = {name: kind for name, kind in {**tile().signature, **names}.items() if kind}
    with pytest.raises(ValueError, match=message):
        facts(replace(tile(), signature=signature), "sm_90")


def test_the_table_has_a_row_for_each():
    variant = tile()
    text = compiled.table([(variant, "sm_90", facts(variant, "sm_90"))])
    header, row = text.splitlines()
    assert header.split()[:2] == ["kernel", "target"] and row.split()[:3] == ["tile", "sm_90", "num_warps=4"]
    assert set(ARCHITECTURES) == {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"}
