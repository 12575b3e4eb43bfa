"""The 4-bit kernels as they are compiled, see `bench.compiled`."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from bench.compiled import Expect, Variant
from quant_triton import nf4
from quant_triton.codes import lookup_ptx, scaled_lookup_ptx
from quant_triton.launch import ARCHITECTURES, Architecture, default
from quant_triton.linear_4bit import chunk_size
from quant_triton.linear_4bit_backward import linear_4bit_dx_kernel
from quant_triton.linear_4bit_kernels import linear_4bit_kernel
from quant_triton.low_rank_tiles import branch_factors

TORCH = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def weight(nested: bool) -> dict[str, str]:
    """The signature of a 4-bit weight."""
    return {
        "packed": "*u8",
        "absmax": "*u8" if nested else "*fp32",
        "nested_absmax": "*fp32",
        "nested_codebook": "*fp32",
        "offset": "*fp32",
    }


def _quantize(dtype: str) -> Variant:
    return Variant(
        f"quantize_4bit {dtype}",
        nf4._quantize_4bit,
        {"x": f"*{dtype}", "edges": "*fp32", "order": "*i32", "packed": "*u8", "absmax": "*fp32", "n": "i64:16"},
        {"BLOCK_SIZE": 64, "BLOCKS": nf4._QUANTIZED_AT_ONCE // 64},
        {"enable_fp_fusion": False},
        Expect(load=16, store=4),
    )


def _dequantize(dtype: str, nested: bool) -> Variant:
    def constants(arch: Architecture) -> dict:
        lookup = _scaled_lookup(arch, dtype)
        sizes = {"BLOCK_SIZE": 64, "TILE": nf4._DECODED_AT_ONCE}
        return sizes | {"DOUBLE_QUANT": nested, "WORDS": dtype != "fp32", "LOOKUP": lookup}

    return Variant(
        f"dequantize_4bit {'nested ' if nested else ''}{dtype}",
        nf4._dequantize_4bit,
        {**weight(nested), "codes": "*fp32", "out": f"*{dtype}", "n": "i64:16", "n_bytes": "i64:16"},
        constants,
        {"enable_fp_fusion": False},
        # Each product is rounded before it is added to.
        Expect(load=16, store=16, absent=("fma.rn.f32",)),
    )


def _embedding(dtype: str, nested: bool) -> Variant:
    def constants(arch: Architecture) -> dict:
        sizes = {"BLOCK_SIZE": 64, "BLOCK": nf4._EMBEDDED_AT_ONCE}
        return sizes | {"DOUBLE_QUANT": nested, "WORDS": True, "LOOKUP": _scaled_lookup(arch, dtype)}

    return Variant(
        f"embedding_4bit {'nested ' if nested else ''}{dtype}",
        nf4._embedding_4bit,
        {**weight(nested), "indices": "*i64", "codes": "*fp32", "out": f"*{dtype}", "rows": "i32", "dim": "i32:16"},
        constants,
        {"enable_fp_fusion": False},
        Expect(load=16, store=16, absent=("fma.rn.f32",)),
    )


def _lookup(arch: Architecture, dtype: str) -> str:
    return lookup_ptx("nf4", TORCH[dtype]) if arch.kind == "cuda" and dtype != "fp32" else ""


def _scaled_lookup(arch: Architecture, dtype: str) -> str:
    in_registers = arch.kind == "cuda" and arch.capability >= 80 and dtype != "fp32"
    return scaled_lookup_ptx("nf4", TORCH[dtype]) if in_registers else ""


def branch(dtype: str, transposed: bool = False) -> dict[str, str]:
    """The signature of a branch of low rank; transposed: its b is a transposed matrix."""
    strides = ("stride_factor",) if transposed else ("stride_feature",)
    numbers = {"rank": "i32:16", "scaling": "fp32", "threshold": "i32"}
    return {"lora_s": f"*{dtype}", "lora_b": "*fp32", "lora_seed": "*i64"} | numbers | dict.fromkeys(strides, "i32:16")


def _out(settings: Mapping[str, Any], dtype: str) -> str:
    """The type of the result: parts in float32 where the sum is split."""
    return f"*{dtype}" if settings["SPLIT"] == 1 else "*fp32"


def _linear(
    m: int,
    dtype: str,
    n: int = 4096,
    nested: bool = False,
    block_size: int = 64,
    rank: int = 0,
    experts: int = 0,
    whole: bool = True,
) -> Variant:
    """`linear_4bit` of m rows by a [n, 4096] weight. whole: its rows are whole steps of the loop; there is a bias."""
    chunk = chunk_size(block_size)

    def settings(arch: Architecture) -> dict:
        tile = default("linear_4bit", arch, m=m, n=n, k=4096, chunk=chunk, dtype=TORCH[dtype])
        return tile | {"SPLIT": 1} if experts else tile

    def constants(arch: Architecture) -> dict:
        scaled = settings(arch)["SCALED"]
        lookup = (_scaled_lookup if scaled else _lookup)(arch, dtype)
        shape = {"BLOCK_SIZE": block_size, "CHUNK": scaled or chunk, "EVEN": whole}
        extras = {"BIAS": whole, "DROP": 0, "stride_factor": 1, "EXPERTS": experts}
        extras["RANK"] = rank and branch_factors(arch, rank, TORCH[dtype])
        return {"DOUBLE_QUANT": nested, "LOOKUP": lookup} | shape | extras | settings(arch)

    def signature(arch: Architecture) -> dict:
        types = weight(nested) | branch(dtype) | dict.fromkeys(("x", "bias"), f"*{dtype}")
        types |= {"ends": "*i32", "m": "i32", "n": "i32:16", "k": "i32:16", "stride_x": "i32:16", "experts": "i32"}
        codes = "*fp32" if settings(arch)["SCALED"] else f"*{dtype}"
        return types | {"codes": codes, "out": _out(settings(arch), dtype)}

    name = f"linear_4bit m={m} {dtype}" + f" n={n}" * (n != 4096) + " nested" * nested
    name += f" block={block_size}" * (block_size != 64) + f" rank={rank}" * bool(rank) + " experts" * bool(experts)
    tensor = {"sm_90": "mma.m16n8k16" if m <= 16 else f"wgmma.m64n{min(m, 128)}k16.* A in registers"}
    return Variant(
        name + " broken" * (not whole),
        linear_4bit_kernel,
        signature,
        constants,
        {"enable_fp_fusion": True},
        Expect(tensor=tensor if dtype != "fp32" else {}, load=16 if block_size > 32 else 8),
        _targets("linear_4bit", m, dtype),
    )


def _linear_dx(
    m: int,
    dtype: str,
    nested: bool = False,
    block_size: int = 64,
    rank: int = 0,
    drop: bool = False,
    experts: int = 0,
    whole: bool = True,
) -> Variant:
    """`linear_4bit_dx` of m rows by a [4096, 4096] weight. whole: its columns are whole steps of the loop."""
    chunk = chunk_size(block_size)

    def settings(arch: Architecture) -> dict:
        tile = default("linear_4bit_dx", arch, m=m, n=4096, k=4096, chunk=chunk, dtype=TORCH[dtype])
        return tile | {"SPLIT": 1} if experts else tile

    def constants(arch: Architecture) -> dict:
        shape = {"CHUNK": chunk, "CHUNKS_PER_BLOCK": block_size // chunk, "EVEN": whole}
        extras = {"DOUBLE_QUANT": nested, "LOOKUP": _scaled_lookup(arch, dtype), "EXPERTS": experts}
        extras |= {"RANK": rank and branch_factors(arch, rank, TORCH[dtype]), "DROP": 4 * drop, "stride_feature": 1}
        return extras | shape | settings(arch)

    def signature(arch: Architecture) -> dict:
        types = weight(nested) | branch(dtype, transposed=True) | {"dy": f"*{dtype}", "codes": "*fp32", "ends": "*i32"}
        types |= {"m": "i32", "n": "i32:16", "k": "i32:16", "stride_dy": "i32:16", "experts": "i32"}
        return types | {"out": _out(settings(arch), dtype)}

    name = f"linear_4bit_dx m={m} {dtype}" + " nested" * nested + f" block={block_size}" * (block_size != 64)
    name += f" rank={rank}" * bool(rank) + " dropout" * drop + " experts" * bool(experts) + " broken" * (not whole)
    tensor = {"sm_90": f"wgmma.m64n{max(16, min(m, 128))}k16.* A in registers"}
    return Variant(
        name,
        linear_4bit_dx_kernel,
        signature,
        constants,
        {"enable_fp_fusion": True},
        Expect(tensor=tensor if dtype != "fp32" else {}, load=16),
        _targets("linear_4bit_dx", m, dtype),
    )


def _targets(op: str, m: int, dtype: str) -> tuple[str, ...]:
    """Where W is not decoded first."""
    key = {"m": m, "n": 4096, "k": 4096, "chunk": 64, "dtype": TORCH[dtype]}
    return tuple(name for name, arch in ARCHITECTURES.items() if default(op, arch, **key))


def _never_stored(variant: Variant) -> Variant:
    """The variant on Hopper, where a decoded weight that went through shared memory would come back by ldmatrix."""
    expect = replace(variant.expect, absent=("ldmatrix",))
    return replace(variant, name=f"{variant.name}, no W in shared memory", expect=expect, targets=("sm_90",))


def _only_on_turing(variant: Variant) -> Variant:
    """The variant where programs have as few rows as there are; elsewhere they are those of more rows."""
    return replace(variant, targets=("sm_75",))


VARIANTS = [
    *(_quantize(dtype) for dtype in TORCH),
    *(_dequantize(dtype, nested) for dtype in TORCH for nested in (False, True)),
    *(_embedding(dtype, nested) for dtype in TORCH for nested in (False, True)),
    *(_linear(m, dtype) for m in (1, 16, 64, 128) for dtype in ("fp16", "bf16")),
    *(_never_stored(_linear(m, "bf16")) for m in (32, 64, 128)),
    *(_linear(m, "fp32") for m in (1, 16)),
    *(_only_on_turing(_linear(m, "fp16")) for m in (2, 4)),
    _linear(32, "bf16"),
    *(_linear(m, "bf16", n=28672) for m in (1, 16)),
    *(_linear(m, "bf16", nested=True) for m in (1, 16, 128)),
    *(_linear(m, "bf16", block_size=32) for m in (1, 128)),
    *(_linear(m, "bf16", block_size=128) for m in (1, 128)),
    *(_linear(m, "bf16", rank=rank) for m in (1, 16, 128) for rank in (16, 64)),
    _linear(1, "fp32", rank=16),
    *(_linear(m, "bf16", experts=64) for m in (1, 64)),
    _linear(64, "bf16", rank=16, experts=64),
    *(_linear(m, "bf16", whole=False) for m in (1, 128)),
    *(_linear_dx(m, dtype) for m in (16, 128) for dtype in ("fp16", "bf16")),
    *(_linear_dx(m, "bf16") for m in (32, 64)),
    *(_only_on_turing(_linear_dx(m, "fp16")) for m in (1, 2, 4)),
    _linear_dx(16, "fp32"),
    *(_linear_dx(m, "bf16", nested=True) for m in (16, 128)),
    *(_linear_dx(m, "bf16", block_size=32) for m in (16, 128)),
    *(_linear_dx(m, "bf16", rank=rank, drop=drop) for m in (16, 128) for rank in (16, 64) for drop in (False, True)),
    *(_only_on_turing(_linear_dx(m, "fp16", rank=16, drop=True)) for m in (1, 4)),
    _linear_dx(16, "fp32", rank=16, drop=True),
    *(_linear_dx(m, "bf16", experts=64) for m in (16, 64)),
    _linear_dx(64, "bf16", rank=16, experts=64),
    *(_linear_dx(m, "bf16", whole=False) for m in (16, 128)),
]
