"""`python -m quantlib`: versions, then every op on every backend, run on a small example and compared.

Exit code 1 if a kernel that claims to run fails or disagrees with the reference, or none could be loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys

import torch
from torch import Tensor

from quantlib import backends, ops, quantize_4bit, quantize_int8, reference

PACKAGES = ("qlora-kernels", "torch", "triton", "numpy", "transformers", "peft", "bitsandbytes")


def example_args(device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> dict[str, tuple]:
    """Small valid arguments of every op: odd sizes, double quant, a bias, an outlier column."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 96, generator=generator)
    x = torch.randn(5, 96, generator=generator).to(device, dtype)
    x[2, 7] = 20.0
    dy = torch.randn(5, 24, generator=generator).to(device, dtype)
    bias = torch.randn(24, generator=generator).to(device, dtype)
    indices = torch.tensor([[3, 0], [23, 3]], device=device)
    seed = torch.tensor([1234], device=device)
    q4 = quantize_4bit(weight, double_quant=True).to(device).op_args()
    q8 = quantize_int8(weight)
    int8 = q8.values.to(device), q8.absmax.to(device)
    a, b = torch.randn(4, 96, generator=generator).to(device), torch.randn(24, 4, generator=generator).to(device)
    branch = (a, b, 0.5, seed, 0.25)
    s = (reference.dropout(x, seed, 0.25) @ a.to(dtype).t()).contiguous()
    return {
        "quantize_4bit": (x, "nf4", 64),
        "dequantize_4bit": (*q4, [24, 96], dtype),
        "linear_4bit": (x, *q4, 24, bias),
        "linear_4bit_dx": (dy, *q4, 96),
        "embedding_4bit": (indices, *q4, 24, 96, dtype),
        "quantize_int8": (x, -1, None, 6.0),
        "dequantize_int8": (*int8, -1, None, dtype),
        "linear_int8": (x, *int8, bias, 6.0),
        "linear_int8_dx": (dy, *int8),
        "dropout": (x, seed, 0.25),
        "lora_linear_4bit": (x, *q4, bias, *branch, True),
        "lora_linear_4bit_backward": (dy, x, s, *q4, *branch, [True, True, True]),
        "lora_linear_int8": (x, *int8, bias, 6.0, *branch, True),
        "lora_linear_int8_backward": (dy, x, s, *int8, *branch, [True, True, True]),
    }


def _outputs(result: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def _run_step(backend: str, op: str, device: str) -> str:
    """Runs `op` once; "" if it agrees with the reference on the same inputs, else what is wrong."""
    args = example_args(device)[op]
    try:
        with backends.use_backend(backend):
            got = _outputs(backends.kernel(op, torch.device(device))(*args))
        for ours, theirs in zip(got, _outputs(getattr(reference, op)(*args)), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0]}"
    return ""


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def main() -> int:
    """Prints the report; returns the exit code."""
    print(f"Python {platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        print(f"{package} {_version(package)}")
    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    print(f"devices: {', '.join(devices)}; threads: {torch.get_num_threads()}")
    print(f"QUANTLIB_BACKEND: {os.environ.get('QUANTLIB_BACKEND', 'not set')}\n")

    broken = False
    for device in devices:
        for op in ops.SCHEMAS:
            explanation = backends.explain(op, device)
            for name, verdict in explanation.verdicts.items():
                if verdict.startswith("no:"):
                    status = verdict
                else:
                    fault = _run_step(name, op, device)
                    broken |= bool(fault)
                    status = f"BROKEN: {fault}" if fault else f"ok; {verdict}"
                print(f"{device:<5} {op:<25} {name:<13} {status}")
    if backends._C is None:
        print(f"\nThe native kernels are missing: {backends._c_missing}. Rebuild with `pip install .`")
        broken = True
    print("\nSomething above is broken." if broken else "\nEverything that can run here works.")
    return int(broken)


if __name__ == "__main__":
    sys.exit(main())
