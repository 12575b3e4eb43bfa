"""The int8 and dropout kernels as they are compiled, see `bench.compiled`."""

from bench.compiled import Expect, Variant
from quant_triton import dropout

VARIANTS = [
    Variant(
        f"dropout {dtype}",
        dropout._dropout_kernel,
        {"x": f"*{dtype}", "seed": "*i64", "out": f"*{dtype}", "n": "i64:16", "threshold": "i32", "scale": "fp32"},
        {"GROUPS": dropout.GROUPS_PER_PROGRAM},
        {"enable_fp_fusion": False},
        Expect(load=16, store=16, absent=("st.shared",)),  # words meet their elements without an exchange
    )
    for dtype in ("fp32", "bf16")
]
