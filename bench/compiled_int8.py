"""The int8 and dropout kernels as they are compiled, see `bench.compiled`."""

from bench.compiled import Expect, Variant
from quant_triton import absmax, launch
from quant_triton.dropout import TILE, _dropout_kernel  # the package has a function of the module's name


def _whole(axis: int, length: int):
    """The tile of `quantize_int8` on an architecture."""
    return lambda arch: launch.default("int8_whole", arch, axis=axis, length=length)


def _quantize(name: str, dtype: str, axis: int, length: int, split: bool = False, norm: bool = False) -> Variant:
    pointers = {"x": f"*{dtype}", "values": "*i8", "absmax": "*fp32"}
    optional = {"flags": ("*u8", split), "columns": ("*i32", split), "norm_weight": (f"*{dtype}", norm)}
    optional["normed"] = (f"*{dtype}", norm)
    absent = {name: None for name, (_, present) in optional.items() if not present}
    numbers = dict.fromkeys(("R", "C", "x_row"), "i32:16") | {"n": "i64:16", "limit": "fp32", "eps": "fp32"}
    constants = {**absent, "x_column": 1, "AXIS": axis, "SPLIT": split, "NORM": norm, "PARTIAL": False}
    tile = _whole(axis, length)
    return Variant(
        f"quantize_int8 {name} {dtype}",
        absmax._quantize_kernel,
        {**pointers, **{name: kind for name, (kind, present) in optional.items() if present}, **numbers},
        lambda arch: {**constants, **tile(arch)},
        {"enable_fp_fusion": False},
        Expect(load=16, store=16 if axis == 1 else 8),
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


VARIANTS = [
    *(_quantize(f"row of {length}", "bf16", 1, length) for length in (512, 4096, 14336, 32768)),
    *(_quantize(f"row of {length} with outliers", "bf16", 1, length, split=True) for length in (4096, 32768)),
    _quantize("row of 4096 after RMSNorm", "bf16", 1, 4096, split=True, norm=True),
    _quantize("row of 32768", "fp32", 1, 32768, split=True),
    _quantize("column of 512", "bf16", 0, 512),
    *(_dropout(dtype, size) for dtype, size in (("fp32", 4), ("bf16", 2))),
]
