"""The 4-bit kernels as they are compiled, see `bench.compiled`."""

from bench.compiled import Expect, Variant
from quant_triton import nf4

_DEQUANTIZE = {
    "packed": "*u8",
    "nested_absmax": "*fp32",
    "nested_codebook": "*fp32",
    "offset": "*fp32",
    "codebook": "*fp32",
    "n": "i64:16",
    "n_bytes": "i64:16",
}

VARIANTS = [
    Variant(
        f"dequantize_4bit {'nested ' if nested else ''}{out}",
        nf4._dequantize_4bit_kernel,
        {**_DEQUANTIZE, "absmax": "*u8" if nested else "*fp32", "out": f"*{out}"},
        {"BLOCK_SIZE": 64, "DOUBLE_QUANT": nested, "BYTES": nf4.BYTES_PER_PROGRAM},
        {"enable_fp_fusion": False},
        # Each thread stores what it decoded, and each product is rounded before it is added to.
        Expect(store=16, absent=("fma.rn.f32", *(() if out == "fp32" else ("st.shared",)))),
    )
    for out in ("fp32", "fp16", "bf16")
    for nested in (False, True)
]
