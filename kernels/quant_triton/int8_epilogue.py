"""The last step of LLM.int8(), which all its kernels share.

Compiled and interpreted, not yet run on a GPU.
"""

import triton
import triton.language as tl

_STEP = tl.constexpr(1 / 127)


@triton.jit
def store_int8(y, total, w_absmax, bias, m, n, M, N):
    """y = total * w_absmax / 127 + bias for rows m and columns n."""
    column = n[None, :] < N
    total *= tl.load(w_absmax + n[None, :], mask=column, other=0.0) * _STEP
    if bias is not None:
        total += tl.load(bias + n[None, :], mask=column, other=0.0).to(tl.float32)
    at = m[:, None].to(tl.int64) * N + n[None, :]
    tl.store(y + at, total.to(y.dtype.element_ty), mask=(m[:, None] < M) & column)
