"""What all launchers share: configurations, the launch itself, and matrix products in one precision.

A kernel's configuration (its constexprs, num_warps, num_stages) comes from `config`: from `tuned/<gpu>.json` if that
GPU was tuned for the problem (`python -m quant_triton.tune`), else from the op's default for the architecture. An op
registers under a name of its choice:

    @default_config("linear_4bit_matvec")
    def _(arch, *, m, n, k): return {"BLOCK_N": 16, "num_warps": 4, "num_stages": 1}   # for Triton's interpreter: small

    @candidates("linear_4bit_matvec")            # what the tuner tries
    def _(arch, *, m, n, k): ...                 # an iterable of such dicts

    @problem("linear_4bit_matvec")               # what the tuner times: the public function, inputs made once
    def _(device, m, n, k, dtype): ...           # asks for what it needs, gives (or yields) lambda: linear_4bit(...)

and its launcher asks `config("linear_4bit_matvec", x.device, m=bucket(m), n=n, k=k)`, with everything in the key that
the best configuration depends on. Rows go in as `bucket(m)`, and the kernel's own argument for them is named in
`triton.jit(do_not_specialize=[...])`, or else every other batch compiles again.

Compiled and interpreted, not yet run on a GPU.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))  # for kernels, and as a bool for their launchers
TUNED = Path(__file__).with_name("tuned")
MANY_ROWS = 2048  # a bucket of its own: more rows are more of the same tiles

Config = Mapping[str, Any]


# ---------------------------------------------------------------------------------------------------
# Devices


@dataclass(frozen=True)
class Architecture:
    """What a configuration may depend on.

    kind: "cuda", "hip", or "interpreter". capability: 90 for sm_90, 942 for gfx942, 0 for the interpreter.
    multiprocessors: of the GPU. shared_memory: bytes that one program may use. warp: threads of a warp.
    """

    kind: str
    capability: int
    multiprocessors: int
    shared_memory: int

    @property
    def interpreted(self) -> bool:
        return self.kind == "interpreter"

    @property
    def warp(self) -> int:
        return 64 if self.kind == "hip" else 32

    @property
    def warpgroups(self) -> bool:
        """Whether four warps multiply together, 64 rows at once (wgmma, tcgen05)."""
        return self.kind == "cuda" and 90 <= self.capability < 120

    @property
    def rounds_float32(self) -> bool:
        """Whether Triton (3.7) rounds float32 to TF32 in a product of 64 rows or more, whatever it is asked for."""
        return self.kind == "cuda" and 100 <= self.capability < 120


_KIB = 1024
# Typical members of the architectures that kernels are compiled for ahead of time.
ARCHITECTURES = {
    "sm_75": Architecture("cuda", 75, 40, 64 * _KIB),
    "sm_80": Architecture("cuda", 80, 108, 163 * _KIB),
    "sm_86": Architecture("cuda", 86, 84, 99 * _KIB),
    "sm_89": Architecture("cuda", 89, 128, 99 * _KIB),
    "sm_90": Architecture("cuda", 90, 132, 227 * _KIB),
    "sm_100": Architecture("cuda", 100, 148, 227 * _KIB),
    "sm_120": Architecture("cuda", 120, 170, 99 * _KIB),
    "gfx942": Architecture("hip", 942, 304, 64 * _KIB),
}
_INTERPRETER = Architecture("interpreter", 0, 4, 1 << 30)


@functools.cache
def architecture(device: torch.device) -> Architecture:
    """The architecture of a device; the interpreter's if Triton interprets, wherever the tensors lie."""
    if INTERPRETED:
        return _INTERPRETER
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        capability = int(re.match(r"gfx(\d+)", properties.gcnArchName).group(1))
        return Architecture("hip", capability, properties.multi_processor_count, 64 * _KIB)
    return Architecture(
        "cuda",
        10 * properties.major + properties.minor,
        properties.multi_processor_count,
        properties.shared_memory_per_block_optin,
    )


def slug(name: str) -> str:
    """The name of a GPU as a file's: "NVIDIA H200" is nvidia-h200."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


# ---------------------------------------------------------------------------------------------------
# Configurations


@dataclass
class Tunable:
    """What an op registered under one name; see the module."""

    default: Callable[..., Config] | None = None
    candidates: Callable[..., Iterable[Config]] | None = None
    problem: Callable[..., Callable[[], object]] | None = None


TUNABLES: dict[str, Tunable] = {}


def _registrar(part: str) -> Callable[[str], Callable]:
    def register(op: str) -> Callable:
        def decorate(function: Callable) -> Callable:
            setattr(TUNABLES.setdefault(op, Tunable()), part, function)
            return function

        return decorate

    return register


default_config = _registrar("default")
candidates = _registrar("candidates")
problem = _registrar("problem")


def key_string(key: Mapping[str, Any]) -> str:
    """A key as a tuned file spells it: "dtype=bfloat16,k=4096,m=16,n=4096"."""
    return ",".join(f"{name}={str(value).removeprefix('torch.')}" for name, value in sorted(key.items()))


@functools.cache
def _tuned(device: torch.device) -> dict[str, dict[str, dict]]:
    """op -> key -> entry of the device's file, empty if nobody tuned it."""
    if INTERPRETED:
        return {}
    path = TUNED / f"{slug(torch.cuda.get_device_name(device))}.json"
    return json.loads(path.read_text(encoding="utf-8"))["ops"] if path.exists() else {}


@functools.cache
def _config(op: str, device: torch.device, **key: Any) -> Config:
    entry = _tuned(device).get(op, {}).get(key_string(key))
    return MappingProxyType(entry["config"] if entry else default(op, architecture(device), **key))


def default(op: str, arch: Architecture, **key: Any) -> dict[str, Any]:
    """The configuration for a GPU that nobody tuned."""
    return dict(TUNABLES[op].default(arch, **key))


class forced:
    """Within a `with` block `config(op, ...)` gives `config`; `.keys` are those it was asked with."""

    def __init__(self, op: str, config: Config | None = None) -> None:
        self.op, self.config, self.keys = op, config, []

    def __enter__(self) -> forced:
        _forced[self.op] = self
        return self

    def __exit__(self, *exc: object) -> None:
        del _forced[self.op]


_forced: dict[str, forced] = {}


def config(op: str, device: torch.device, **key: Any) -> Config:
    """The configuration of `op` for a problem: tuned for this GPU, or the default of its architecture.

    Args:
        op: a name registered with `default_config`. key: what the best configuration depends on; hashable.

    Returns:
        Constexprs, num_warps and num_stages, to be unpacked into the launch. Read-only.
    """
    force = _forced.get(op)
    if force is None:
        return _config(op, device, **key)
    force.keys.append(key)
    return force.config if force.config is not None else _config(op, device, **key)


def bucket(m: int) -> int:
    """The number of rows that m counts as: the next power of two, one bucket beyond 1024."""
    return min(triton.next_power_of_2(m), MANY_ROWS)


# ---------------------------------------------------------------------------------------------------
# Launching


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, fp_fusion: bool, **constants: Any) -> None:
    """Runs a kernel on the GPU of its first argument, on that GPU's current stream; nothing for an empty grid.

    Args:
        grid: programs; the second and third number are at most 65535.
        fp_fusion: whether a product and a sum may be rounded once instead of twice. False where a format rounds both.
        constants: constexprs, num_warps, num_stages.

    Raises:
        ValueError: a tensor that lies where Triton cannot run.
    """
    if 0 in grid:
        return
    device = arguments[0].device
    if not INTERPRETED and device.type != "cuda":
        raise ValueError(
            f"quant_triton: a tensor is on {device}; Triton's kernels run on GPUs, or anywhere under its interpreter "
            "(TRITON_INTERPRET=1 before triton is imported)"
        )
    elsewhere = not INTERPRETED and device.index != torch.cuda.current_device()
    with torch.cuda.device(device) if elsewhere else nullcontext():
        kernel[grid](*arguments, enable_fp_fusion=fp_fusion, **constants)


@triton.jit
def dot(a, b, acc):
    """acc + a @ b: int8 into int32, float16 and bfloat16 into float32, float32 without rounding its factors to TF32.

    But see `Architecture.rounds_float32`.
    """
    if acc.dtype == tl.int32:
        acc = tl.dot(a, b, acc, out_dtype=tl.int32)
    else:
        if INTERPRETED:  # it multiplies the bit patterns of bfloat16
            a = a.to(tl.float32)
            b = b.to(tl.float32)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    return acc
