"""The int8 and dropout kernels as they are compiled, see `bench.compiled`."""

from bench.compiled import Expect, Variant
from quant_triton import dropout

VARIANTS = [
    Variant(
        f"dropout {dtype}",
        dropout._dropout_kernel,
        {"x": f"*{dtype}", "seed": "*i64", "out": f"*{dtype}", "n": "i64:16", "threshold": "i32", "scale": "fp32"},
        dropout.TILE,
        {"enable_fp_fusion": False},
        Expect(load=4 * size, store=4 * size, absent=("st.shared",)),  # words meet their elements without an exchange
    )
    for dtype, size in (("fp32", 4), ("bf16", 2))
]
