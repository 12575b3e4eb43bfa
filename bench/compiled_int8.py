"""The int8 and dropout kernels as they are compiled, see `bench.compiled`."""

from collections.abc import Callable

import torch

from bench.compiled import Expect, Variant
from quant_triton import absmax_kernels, int8, int8_few_rows, int8_many_rows, launch
from quant_triton.dropout import TILE, _dropout_kernel  # the package has a function of the module's name
from quant_triton.low_rank_tiles import branch_factors


def _quantize(name: str, dtype: str, axis: int, length: int, split: bool = False, norm: bool = False) -> Variant:
    pointers = {"x": f"*{dtype}", "values": "*i8", "absmax": "*fp32"}
    optional = {"flags": ("*u8", split), "columns": ("*i32", split), "norm_weight": (f"*{dtype}", norm)}
    optional["normed"] = (f"*{dtype}", norm)
    absent = {name: None for name, (_, present) in optional.items() if not present}
    numbers = dict.fromkeys(("C", "x_row"), "i32:16") | {"R": "i32", "n": "i64:16", "limit": "fp32", "eps": "fp32"}
    constants = {**absent, "x_column": 1, "AXIS": axis, "SPLIT": split, "NORM": norm, "PARTIAL": False}
    return Variant(
        f"quantize_int8 {name} {dtype}",
        absmax_kernels.quantize_kernel,
        {**pointers, **{name: kind for name, (kind, present) in optional.items() if present}, **numbers},
        lambda arch: {**constants, **launch.default("int8_whole", arch, axis=axis, length=length, norm=norm)},
        {"enable_fp_fusion": False},
        Expect(load=16, store=16 if axis == 1 else 8),
    )


_MATRIX = dict.fromkeys(("C", "x_row"), "i32:16") | {"R": "i32", "n": "i64:16"}
_WIDE = {"PARTIAL": False, "BLOCK_R": 1, "BLOCK_C": 4096, "num_warps": 8}


def _absmax(name: str, rows: bool, columns: bool, split: bool, tile: dict) -> Variant:
    there = {"row_absmax": ("*i32", rows), "column_absmax": ("*i32", columns)}
    there |= {"flags": ("*u8", split), "columns": ("*i32", split)}
    return Variant(
        f"absmax_int8 {name} bf16",
        absmax_kernels.absmax_kernel,
        {"x": "*bf16", "limit": "fp32", **_MATRIX} | {name: kind for name, (kind, present) in there.items() if present},
        {name: None for name, (_, present) in there.items() if not present}
        | {"x_column": 1, "ROWS": rows, "COLUMNS": columns, "SPLIT": split, **tile},
        {"enable_fp_fusion": False},
        Expect(load=16),
    )


def _scale(axis: int, split: bool) -> Variant:
    return Variant(
        f"quantize_int8 by known {'row' if axis else 'column'}{' with outliers' if split else ''} bf16",
        absmax_kernels.scale_kernel,
        {"x": "*bf16", "absmax": "*fp32", "values": "*i8", **_MATRIX} | ({"flags": "*u8"} if split else {}),
        {"x_column": 1, "AXIS": axis, "SPLIT": split, **_WIDE} | ({} if split else {"flags": None}),
        {"enable_fp_fusion": False},
        Expect(load=16, store=16),
    )


def _dequantize(axis: int) -> Variant:
    return Variant(
        f"dequantize_int8 {'row' if axis else 'column'} bf16",
        absmax_kernels.dequantize_kernel,
        {"values": "*i8", "absmax": "*fp32", "out": "*bf16", "R": "i32", "C": "i32:16", "n": "i64:16"},
        {"AXIS": axis, **_WIDE},
        {"enable_fp_fusion": False},
        Expect(load=16, store=16, absent=("cvt.rn.f32.s8", "fma.rn.f32")),
    )


_CLEAR = Variant(
    "clear_outliers",
    absmax_kernels.clear_kernel,
    {"values": "*i8", "flags": "*u8", "columns": "*i32", "R": "i32", "C": "i32:16"},
    {"BLOCK_R": 128, "BLOCK_C": 8, "num_warps": 4},
    {"enable_fp_fusion": False},
)


def _dropout(dtype: str, size: int) -> Variant:
    return Variant(
        f"dropout {dtype}",
        _dropout_kernel,
        {"x": f"*{dtype}", "seed": "*i64", "out": f"*{dtype}", "n": "i64:16", "threshold": "i32", "scale": "fp32"},
        TILE,
        {"enable_fp_fusion": False},
        Expect(load=4 * size, store=4 * size, absent=("st.shared",)),  # words meet their elements without an exchange
    )


_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def _suffix(rank: int) -> str:
    return f" rank={rank}" if rank else ""


def _branch(rank: int, dtype: str, transposed: bool = False) -> tuple[dict[str, str], Callable]:
    """The signature and, by architecture, the constants of a LoRA branch with b in float32; transposed: as for dx."""
    types = {"lora_s": f"*{dtype}", "lora_b": "*fp32", "scaling": "fp32", "rank": "i32:16"}
    long, short = ("stride_factor", "stride_feature") if transposed else ("stride_feature", "stride_factor")
    types[long] = "i32:16"
    return types, lambda arch: {short: 1, "RANK": rank and branch_factors(arch, rank, _DTYPES[dtype])}


def _few_rows(m: int, split: bool, dtype: str = "bf16", n: int = 4096, k: int = 4096, rank: int = 0) -> Variant:
    types, factors = _branch(rank, dtype)
    return Variant(
        f"linear_int8 {m} rows{' with outliers' if split else ''}{_suffix(rank)} to {n} {dtype}",
        int8_few_rows.few_rows_kernel,
        {"x": f"*{dtype}", "w": "*i32", "w_absmax": "*fp32", "bias": f"*{dtype}", "y": f"*{dtype}", "M": "i32"}
        | dict.fromkeys(("N", "K", "x_row"), "i32:16")
        | {"limit": "fp32"}
        | types,
        lambda arch: {
            "SPLIT": split,
            "ROWS": m,
            **factors(arch),
            **launch.default("linear_int8_few_rows", arch, m=m, n=n, k=k),
        },
        {"enable_fp_fusion": True},
        Expect(load=16, absent=("cvt.rn.f32.s8",)),
    )


def _product(m: int, split: bool, dtype: str = "bf16", n: int = 4096, k: int = 4096, rank: int = 0) -> Variant:
    types, factors = _branch(rank, dtype)

    def tile(arch):
        return launch.default("linear_int8", arch, m=m, n=n, k=k, dtype=_DTYPES[dtype])

    def optional(arch):
        """Pointers that some launches have: their types, None where this one does not."""
        parts = tile(arch)["SPLIT_K"] > 1
        types = {"columns": ("*i32", split), "state": ("*u8", split or parts), "parts": ("*i32", parts)}
        return {name: kind if present else None for name, (kind, present) in types.items()}

    def signature(arch):
        blocks = tile(arch)
        kinds = {"x": f"*{dtype}", "q": "*i8", "w": "*i8", "x_absmax": "*fp32", "w_absmax": "*fp32"}
        kinds |= {"bias": f"*{dtype}", "y": f"*{dtype}", "M": "i32"} | dict.fromkeys(("N", "K", "x_row"), "i32:16")
        kinds |= {name: kind for name, kind in optional(arch).items() if kind} | types
        for name, rows in (("q_tiles", blocks["BLOCK_M"]), ("w_tiles", blocks["BLOCK_N"])):
            kinds[name] = f"tensordesc<i8[{rows},{blocks['BLOCK_K']}]>" if blocks["TMA"] else "*i8"
        return kinds

    def constants(arch):
        missing = {name: None for name, kind in optional(arch).items() if not kind}
        return {**missing, **factors(arch), "SPLIT": split, **tile(arch)}

    tensor = dict.fromkeys(("sm_80", "sm_86", "sm_89", "sm_120"), r"mma.*m16n8k32.*\.s8\.s8")
    tensor |= {
        "sm_100": r"mma.*(m16n8k32.*\.s8\.s8|kind::i8)",  # Triton 3.7, and 3.9, which has tcgen05 multiply int8
        "sm_90": r"wgmma.*k32\.s32\.s8\.s8",
        "gfx942": "v_mfma" if dtype == "fp32" else "v_mfma_i32",
    }
    return Variant(
        f"linear_int8 {m} rows{' with outliers' if split else ''}{_suffix(rank)} {dtype}",
        int8_many_rows.product_kernel,
        signature,
        constants,
        {"enable_fp_fusion": True},
        # A branch of more factors has as many instructions of its own. Triton likes to make TF32 of float32.
        Expect(tensor=tensor if rank <= 16 else {}, absent=("tf32",)),
    )


def _dx(m: int, dtype: str = "bf16", n: int = 4096, k: int = 4096, rank: int = 0, drop: bool = False) -> Variant:
    types, factors = _branch(rank, dtype, transposed=True)
    return Variant(
        f"linear_int8_dx {m} rows{_suffix(rank)}{' dropout' if drop else ''} {dtype}",
        int8.dx_kernel,
        {"dy": f"*{dtype}", "w": "*i8", "w_absmax": "*fp32", "dx": f"*{dtype}", "M": "i32"}
        | dict.fromkeys(("N", "K", "dy_row"), "i32:16")
        | {"lora_seed": "*i64", "threshold": "i32"}
        | types,
        lambda arch: {
            "DROP": 4 * drop,
            **factors(arch),
            **launch.default("linear_int8_dx", arch, m=m, n=n, k=k, dtype=_DTYPES[dtype]),
        },
        {"enable_fp_fusion": False},
        Expect(load=16, absent=("cvt.rn.f32.s8", "tf32")),
    )


VARIANTS = [
    *(_quantize(f"row of {length}", "bf16", 1, length) for length in (512, 4096, 32768)),
    *(_quantize(f"row of {length} with outliers", "bf16", 1, length, split=True) for length in (4096, 32768)),
    *(
        _quantize(f"row of {length} after RMSNorm", "bf16", 1, length, split=True, norm=True)
        for length in (4096, 16384)
    ),
    _quantize("row of 16384 after RMSNorm", "fp32", 1, 16384, split=True, norm=True),
    _quantize("row of 32768", "fp32", 1, 32768, split=True),
    _quantize("column of 512", "bf16", 0, 512),
    _absmax("row with outliers", True, False, True, _WIDE),
    _absmax("row and column", True, True, False, {**_WIDE, "BLOCK_R": 128, "BLOCK_C": 64}),
    *(_scale(axis, split) for axis, split in ((0, False), (1, True))),
    *(_dequantize(axis) for axis in (0, 1)),
    _CLEAR,
    *(
        _few_rows(m, split, n=n)
        for m, split, n in ((1, False, 4096), (1, True, 4096), (1, True, 1024), (1, True, 14336), (2, True, 4096))
    ),
    *(_product(m, split) for m in (16, 2048) for split in (False, True)),
    *(_product(m, True) for m in (32, 64, 128, 256)),
    *(_product(m, True, "fp32") for m in (16, 32, 2048)),
    _product(2048, True, "fp16"),
    *(_few_rows(m, True, "fp32") for m in (1, 2)),
    _few_rows(2, True, rank=64),
    *(_product(m, True, rank=64) for m in (16, 256, 2048)),
    *(_product(m, True, rank=16) for m in (64, 2048)),
    _product(2048, True, "fp32", rank=64),
    *(_dx(m) for m in (16, 32, 64, 512)),
    *(_dx(m, "fp32") for m in (16, 32, 64, 512)),
    *(_dx(m, rank=rank, drop=drop) for m, rank, drop in ((16, 16, True), (512, 64, False), (512, 64, True))),
    _dx(512, "fp32", rank=16, drop=True),
    *(_dropout(dtype, size) for dtype, size in (("fp32", 4), ("bf16", 2))),
]
