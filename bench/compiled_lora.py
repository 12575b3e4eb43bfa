"""The LoRA kernels as they are compiled, see `bench.compiled`: a layer of 4096 x 14336, 8192 rows."""

from bench.compiled import Expect, Variant
from bench.compiled_nf4 import TORCH, branch
from quant_triton import low_rank, merge, parts
from quant_triton.launch import ARCHITECTURES, default
from quant_triton.low_rank_tiles import branch_factors

M, N, K = 8192, 4096, 14336
_TENSOR_CORES = {
    **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"^mma\.m16n8k16.*f32.bf16.bf16.f32"),
    "sm_90": "mma.*f32.bf16.bf16",
    "sm_100": "mma",
    "gfx942": "v_mfma_f32.*bf16",
}
_GATE = {"owner": "*i32", "adapter": "*i32", "gains": "*fp32"}
_MMA = dict.fromkeys(ARCHITECTURES, "") | _TENSOR_CORES


def _variant(name, kernel, signature, op, key, constants, dtype="bf16", **expect):
    return Variant(
        f"lora {name} {dtype}",
        kernel,
        {argument: kind.replace("T", dtype) for argument, kind in signature.items()},
        lambda arch: {
            **(constants(arch) if callable(constants) else constants),
            **default(op, arch, dtype=TORCH[dtype], **key),
        },
        {"enable_fp_fusion": op != "lora_merge"},
        # float32 must not be rounded to TF32, which is what tensor cores would do.
        Expect(**({"tensor": _MMA} if dtype == "bf16" else {"absent": (r"mma\.",)}), **expect),
    )


def _project(r, drop, dtype="bf16", gated=False):
    signature = {"x": "*T", "a": "*fp32", "out": "*T", "seed": "*i64", "m": "i32", "k": "i32:16", "rank": "i32:16"}
    signature |= {"stride": "i64:16", "threshold": "i32", "scale": "fp32", "blocks_per_split": "i32", **_GATE}
    constants = {"DROP": drop, "QUADS": True, "GATED": gated}
    key = {"m": 2048, "k": K, "r": r, "drop": drop}
    name = f"project r={r}{' dropout' if drop else ''}{' gated' if gated else ''}"
    return _variant(name, low_rank._project_kernel, signature, "lora_project", key, constants, dtype, load=16)


def _dy(r, dtype="bf16", gated=False):
    signature = {"dy": "*T", "s": "*T", "b": "*fp32", "ds_parts": "*fp32", "db_parts": "*fp32", "m": "i32"}
    signature |= {"n": "i32:16", "rank": "i32:16", "stride": "i64:16", "scaling": "fp32", "blocks_per_split": "i32"}
    signature |= _GATE
    constants = {"NEED_DS": True, "NEED_DB": True, "GATED": gated}
    key = {"m": 2048, "n": N, "r": r}
    return _variant(
        f"dy r={r}{' gated' if gated else ''}",
        low_rank._dy_kernel,
        signature,
        "lora_dy",
        key,
        constants,
        dtype,
        load=16,
    )


def _da(r, drop, dtype="bf16"):
    signature = {"x": "*T", "ds": "*T", "parts": "*fp32", "seed": "*i64", "m": "i32", "k": "i32:16", "rank": "i32:16"}
    signature |= {"stride": "i64:16", "threshold": "i32", "scale": "fp32", "blocks_per_split": "i32"}
    constants = {"DROP": drop, "QUADS": True}
    key = {"m": 2048, "k": K, "r": r, "drop": drop}
    name = f"da r={r}{' dropout' if drop else ''}"
    return _variant(name, low_rank._da_kernel, signature, "lora_da", key, constants, dtype, load=16)


def _add(r, drop, dtype="bf16"):
    def constants(arch):
        return {"RANK": branch_factors(arch, r, TORCH[dtype]), "stride_feature": 1, "DROP": drop, "QUADS": True}

    signature = {"out": "*T", "m": "i32", "n": "i32:16", **branch(dtype, transposed=True)}
    key = {"m": 2048, "n": N, "r": r, "drop": drop}
    name = f"add r={r}{' dropout' if drop else ''}"
    return _variant(name, low_rank._add_kernel, signature, "lora_add", key, constants, dtype, load=16, store=16)


def _merge(r, bits, nested=False, dtype="bf16"):
    signature = {"values": "*u8" if bits == 4 else "*i8", "absmax": "*u8" if nested else "*fp32"}
    signature |= dict.fromkeys(("nested_absmax", "nested_codebook", "offset", "codebook", "a", "b"), "*fp32")
    signature |= {"out": "*T", "n": "i32:16", "k": "i32:16", "rank": "i32:16", "scaling": "fp32"}
    constants = {"BITS": bits, "SCALED": 64, "DOUBLE_QUANT": nested}
    key = {"n": N, "k": K, "r": r, "bits": bits}
    name = f"merge {bits} bit r={r}{' nested' if nested else ''}"
    return _variant(name, merge._merge_kernel, signature, "lora_merge", key, constants, dtype, load=16, store=16)


VARIANTS = [
    *(_project(r, drop) for r, drop in ((16, False), (16, True), (64, True), (128, False))),
    *(_dy(r) for r in (16, 64, 128)),
    _project(128, True, gated=True),
    _dy(128, gated=True),
    *(_da(r, drop) for r, drop in ((16, False), (16, True), (128, True))),
    *(_add(r, drop) for r, drop in ((16, False), (16, True), (128, True))),
    *(_merge(*variant) for variant in ((16, 4), (16, 4, True), (128, 4, True), (16, 8))),
    *(of(64, False, "fp32") for of in (_project, _da, _add)),
    _dy(64, "fp32"),
    _merge(64, 4, True, "fp32"),
    Variant(
        "sum of parts",
        parts.sum_kernel,
        {"parts": "*fp32", "out": "*bf16", "count": "i32", "size": "i32:16"},
        {"BLOCK": parts.BLOCK},
        {"enable_fp_fusion": True},
        Expect(load=16, store=16),
    ),
]
