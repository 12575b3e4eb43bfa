"""The LoRA kernels as they are compiled, see `bench.compiled`: a layer of 4096 x 14336, 8192 rows."""

from bench.compiled import Expect, Variant
from bench.compiled_nf4 import TORCH, branch
from quant_triton import low_rank, merge, parts
from quant_triton.launch import default
from quant_triton.low_rank_tiles import branch_factors

M, N, K = 8192, 4096, 14336


def _tensor_cores(dtype):
    """What multiplies on each GPU, by Triton's name for it; on sm_75 nothing does."""
    kind = {"bf16": "bf16", "fp16": "f16"}[dtype]
    return {
        **dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), rf"^mma\.m16n8k16.*f32\.{kind}\.{kind}\.f32"),
        "sm_90": rf"mma.*f32\.{kind}\.{kind}",
        "sm_100": "mma",
        "gfx942": f"v_mfma_f32.*{kind}",
    }


_GATE = {"owner": "*i32", "adapter": "*i32", "gains": "*fp32"}


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
        Expect(**({"absent": (r"mma\.",)} if dtype == "fp32" else {"tensor": _tensor_cores(dtype)}), **expect),
    )


def _name(what, r, **flags):
    return " ".join(
        [f"{what} r={r}", *(f"{name}={flag}" if flag is not True else name for name, flag in flags.items() if flag)]
    )


def _project(r, drop, dtype="bf16", gated=False, m=2048):
    """One program takes the whole sum where there are many rows, or a part."""
    odd = drop == 1
    signature = {"x": "*T", "a": "*fp32", "out": "*T" if m == 2048 else "*fp32", "seed": "*i64", "m": "i32"}
    signature |= {"k": "i32" if odd else "i32:16", "rank": "i32:16", "stride": "i64" if odd else "i64:16"}
    signature |= {"threshold": "i32", "scale": "fp32", "blocks_per_split": "i32", **_GATE}
    constants = {"DROP": drop, "GATED": gated}
    key = {"m": m, "k": K, "r": r, "drop": drop}
    name = _name("project", r, m=m != 2048 and m, dropout=drop > 0, gated=gated, odd=odd)
    load = 4 if odd else 16
    return _variant(name, low_rank._project_kernel, signature, "lora_project", key, constants, dtype, load=load)


def _dy(r, dtype="bf16", gated=False, ds=True, db=True):
    signature = {"dy": "*T", "s": "*T", "b": "*fp32", "ds_parts": "*fp32", "db_parts": "*fp32", "m": "i32"}
    signature |= {"n": "i32:16", "rank": "i32:16", "stride": "i64:16", "scaling": "fp32", "blocks_per_split": "i32"}
    signature |= _GATE
    constants = {"NEED_DS": ds, "NEED_DB": db, "GATED": gated}
    key = {"m": 2048, "n": N, "r": r}
    name = _name("dy", r, gated=gated, only="" if ds and db else "ds" if ds else "db")
    return _variant(name, low_rank._dy_kernel, signature, "lora_dy", key, constants, dtype, load=16)


def _da(r, drop, dtype="bf16", gated=False):
    odd = drop == 1
    signature = {"x": "*T", "ds": "*T", "parts": "*fp32", "seed": "*i64", "m": "i32", "rank": "i32:16"}
    signature |= {"k": "i32" if odd else "i32:16", "stride": "i64" if odd else "i64:16"}
    signature |= {"threshold": "i32", "scale": "fp32", "blocks_per_split": "i32", "owner": "*i32", "adapter": "*i32"}
    constants = {"DROP": drop, "GATED": gated}
    key = {"m": 2048, "k": K, "r": r, "drop": drop}
    name = _name("da", r, dropout=drop > 0, gated=gated, odd=odd)
    return _variant(name, low_rank._da_kernel, signature, "lora_da", key, constants, dtype, load=2 if odd else 16)


def _add(r, drop, dtype="bf16", m=2048):
    odd = drop == 1

    def constants(arch):
        return {"RANK": branch_factors(arch, r, TORCH[dtype]), "stride_feature": 1, "DROP": drop}

    signature = {"out": "*T", "m": "i32", **branch(dtype, transposed=True), "n": "i32" if odd else "i32:16"}
    key = {"m": m, "n": N, "r": r, "drop": drop}
    name = _name("add", r, m=m != 2048 and m, dropout=drop > 0, odd=odd)
    wide = {} if odd else {"load": 16, "store": 16}
    return _variant(name, low_rank._add_kernel, signature, "lora_add", key, constants, dtype, **wide)


def _merge(r, bits, nested=False, dtype="bf16"):
    signature = {"values": "*u8" if bits == 4 else "*i8", "absmax": "*u8" if nested else "*fp32"}
    signature |= dict.fromkeys(("nested_absmax", "nested_codebook", "offset", "codebook", "a", "b"), "*fp32")
    signature |= {"out": "*T", "n": "i32:16", "k": "i32:16", "rank": "i32:16", "scaling": "fp32"}
    constants = {"BITS": bits, "SCALED": 64, "DOUBLE_QUANT": nested}
    key = {"n": N, "k": K, "r": r, "bits": bits}
    name = f"merge {bits} bit r={r}{' nested' if nested else ''}"
    return _variant(name, merge._merge_kernel, signature, "lora_merge", key, constants, dtype, load=16, store=16)


# Larger ranks are taken in parts. 0, 4, 1: no dropout; elements that share a counter of it, 1 where rows are odd.
_RANKS = (16, 32, 64, 128)

VARIANTS = [
    *(_project(r, drop) for r in _RANKS for drop in (0, 4)),
    *(_project(16, drop, m=m) for m in (16, 32) for drop in (0, 4)),
    *(_project(r, 4, gated=True) for r in (16, 128)),
    *(_dy(r) for r in _RANKS),
    _dy(16, gated=True),
    *(_dy(16, ds=ds, db=not ds) for ds in (False, True)),
    *(_da(r, drop) for r in _RANKS for drop in (0, 4)),
    *(_da(16, drop, gated=True) for drop in (0, 4)),
    *(_add(r, drop) for r in (16, 128) for drop in (0, 4)),
    _add(16, 0, m=16),
    *(of(r, 1) for of in (_project, _da, _add) for r in (16, 128)),
    *(of(16, 4, "fp16") for of in (_project, _da, _add)),
    *(of(r, drop, "fp32") for of in (_project, _da, _add) for r, drop in ((16, 4), (64, 0))),
    *(_dy(r, dtype) for r, dtype in ((16, "fp16"), (64, "fp32"))),
    *(_merge(r, 4, nested) for r in _RANKS for nested in (False, True)),
    *(_merge(r, 8) for r in (16, 64)),
    *(_merge(*variant) for variant in ((16, 4, True, "fp16"), (64, 4, True, "fp32"), (64, 8, False, "fp32"))),
    Variant(
        "sum of parts",
        parts.sum_kernel,
        {"parts": "*fp32", "out": "*bf16", "count": "i32", "size": "i32:16"},
        {"BLOCK": parts.BLOCK},
        {"enable_fp_fusion": True},
        Expect(load=16, store=16),
    ),
]
