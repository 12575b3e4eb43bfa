"""Which kernel serves an op, and why.

A backend is a named set of kernels. `auto` (the default) takes the first of `BACKENDS` that can run: the best C++
level the CPU supports for CPU tensors, Triton for CUDA and ROCm, plain PyTorch for devices without kernels of their
own. An explicit choice, by `use_backend(name)` or the environment variable QUANTLIB_BACKEND, never falls back: it
raises with what is missing. `explain(op, device)` says which backend would run and why the others would not.

Under TRITON_INTERPRET=1 the Triton kernels serve tensors on every device, slowly, as a proof.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import ModuleType

import torch

from quantlib import ops, reference

AUTO = "auto"


def _import(name: str) -> tuple[ModuleType | None, str]:
    """The extension module, or None and the reason why it does not load."""
    try:
        return importlib.import_module(name), ""
    except ImportError as error:
        return None, f"{name} does not load: {error}"


_C, _c_missing = _import("quantlib._C")


@dataclass(frozen=True)
class Backend:
    """A named set of kernels.

    name: what `use_backend` takes. device: the device type it serves, None for all. ops: those it has.
    kernel: op name -> callable with the op's schema, once it is loaded. missing: why it cannot run here, "" if it can.
    load: loads what is not loaded with quantlib, GPU libraries, and gives its kernels as plain functions.
    manual: why `auto` passes it over although it can run, "" if it does not.
    doubt: why its results may be wrong, "" if it has been seen to run.
    """

    name: str
    device: str | None
    ops: Collection[str]
    kernel: Callable[[str], Callable]
    missing: str = ""
    load: Callable[[], dict[str, Callable]] = dict
    manual: str = ""
    doubt: str = ""

    def refusal(self, op: str, device: str) -> str:
        """Why this backend cannot run `op` on `device`; "" if it can."""
        if self.device not in (None, device):
            return f"serves {self.device} tensors, not {device}"
        if self.missing:
            return self.missing
        return "" if op in self.ops else f"has no kernel for {op}"


_OVERLOADS = {op: getattr(torch.ops.quantlib, op).default for op in ops.SCHEMAS}


def _registered(op: str) -> Callable:
    return _OVERLOADS[op]


def _without_autocast(function: Callable) -> Callable:
    """An op computes in the dtypes that it is given: torch's products inside of it must not choose others."""

    @functools.wraps(function)
    def without_autocast(*args: object) -> object:
        device = args[0].device.type
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return without_autocast


def _reference(op: str) -> Callable:
    return _without_autocast(getattr(reference, op))


_CPU_LEVELS = {
    "cpu-onednn": "AVX-512 with BF16, VBMI and VNNI",
    "cpu-avx512bf16": "AVX-512 with BF16, VBMI and VNNI",
    "cpu-avx512": "AVX-512 with VNNI",
    "cpu-avx2": "AVX2, FMA and F16C",
    "cpu-portable": "nothing special",
}


def _cpu_missing(name: str) -> str:
    if _C is None:
        return _c_missing
    return "" if name in _C.cpu_isas() else f"it needs {_CPU_LEVELS[name]}, which this CPU lacks"


def _cpu_manual(name: str) -> str:
    if _C is None or name != "cpu-onednn" or _C.cpu_isas()[0] == name:
        return ""
    return "many rows by PyTorch's oneDNN are for CPUs with AMX, which this one lacks"


def _not_installed(*modules: str) -> str:
    """Which is not, "" if all are. Looks without importing: that fails without a GPU, or costs start-up time."""
    return next((f"{module} is not installed" for module in modules if not importlib.util.find_spec(module)), "")


def _gpu_missing(*modules: str) -> str:
    return _not_installed(*modules) if torch.cuda.is_available() else "torch finds no CUDA device"


_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def _load_triton() -> dict[str, Callable]:
    """Registers them as torch.ops.quantlib_triton.* as well: torch.compile need not look into a launch."""
    quant_triton = importlib.import_module("quant_triton")
    kernels = {op: _without_autocast(getattr(quant_triton, op)) for op in ops.SCHEMAS}
    for op, kernel in kernels.items():
        ops.register("quantlib_triton", op)
        torch.library.impl(f"quantlib_triton::{op}", "CompositeExplicitAutograd")(kernel)
    return kernels


def _triton(op: str) -> Callable:
    return getattr(torch.ops.quantlib_triton, op).default


def _load_cuda() -> dict[str, Callable]:
    importlib.import_module("quantlib._C_cuda")
    return {"dequantize_4bit": _cuda("dequantize_4bit")}


def _cuda(op: str) -> Callable:
    return getattr(torch.ops.quantlib_cuda, op).default


_NEVER_RUN = "it compiles, but no run on a GPU has confirmed it"
_EVERY_OP = tuple(ops.SCHEMAS)

# In the order in which `auto` considers them.
BACKENDS: tuple[Backend, ...] = (
    *(
        Backend(name, "cpu", _EVERY_OP, _registered, _cpu_missing(name), manual=_cpu_manual(name))
        for name in _CPU_LEVELS
    ),
    Backend(
        "triton",
        None if _INTERPRETED else "cuda",
        _EVERY_OP,
        _triton,
        (_not_installed if _INTERPRETED else _gpu_missing)("triton", "quant_triton"),
        load=_load_triton,
        manual="it is interpreted, as a proof" if _INTERPRETED else "",
        doubt=_NEVER_RUN,
    ),
    Backend(
        "cuda",
        "cuda",
        ("dequantize_4bit",),
        _cuda,
        _gpu_missing("quantlib._C_cuda"),
        load=_load_cuda,
        doubt=_NEVER_RUN,
    ),
    Backend("reference", None, _EVERY_OP, _reference),
)


def _names() -> list[str]:
    return [AUTO, "cpu", *(b.name for b in BACKENDS)]


def _find(name: str) -> Backend:
    """The backend called `name`; "cpu" is the best C++ level this CPU supports."""
    if name == "cpu":
        levels = [b for b in BACKENDS if b.device == "cpu"]
        return next((b for b in levels if not (b.missing or b.manual)), levels[-1])
    for backend in BACKENDS:
        if backend.name == name:
            return backend
    raise ValueError(f"quantlib.use_backend: unknown backend {name!r}; allowed: {', '.join(_names())}")


class _Choice:
    """The backend in force. One per process: autograd runs backward passes in threads of its own."""

    def __init__(self) -> None:
        self.backend: Backend | None = None
        self.isas: list[str] = [] if _C is None else _C.cpu_isas()
        self.isa = ""

    def set(self, name: str) -> None:
        backend = None if name == AUTO else _find(name)
        if backend is not None and backend.missing:
            raise RuntimeError(f"quantlib.use_backend: {name!r} cannot run here: {backend.missing}")
        if backend is not None:
            backend.load()  # not first in the middle of torch.compile
        isa = backend.name if backend and backend.device == "cpu" else next(iter(self.isas), "")
        if isa != self.isa:  # setting it takes longer than a small kernel
            _C.set_cpu_isa(isa)
            self.isa = isa
        self.backend = backend


_choice = _Choice()


class use_backend:
    """Chooses the backend of every op from here on, or within a `with` block.

    Args:
        name: "auto", "cpu" (best level of this CPU), "cpu-onednn", "cpu-avx512bf16", "cpu-avx512", "cpu-avx2",
            "cpu-portable", "triton", "cuda" or "reference" (plain PyTorch, any device).

    Raises:
        ValueError: unknown name. RuntimeError: the backend cannot run on this machine, with the reason.
        An op that the chosen backend does not serve raises when it is called.

    The choice holds for the whole process, since autograd runs backward passes in its own threads.
    """

    def __init__(self, name: str) -> None:
        self._previous = _choice.backend.name if _choice.backend else AUTO
        _choice.set(name)

    def __enter__(self) -> use_backend:
        return self

    def __exit__(self, *exc: object) -> None:
        _choice.set(self._previous)


def _automatic(op: str, device: str) -> Backend:
    return next(b for b in BACKENDS if not b.manual and not b.refusal(op, device))


def kernel(op: str, device: torch.device) -> Callable:
    """The callable, with the schema of `op`, that serves tensors on `device`."""
    backend = _choice.backend
    if backend is None or device.type == "meta":
        return _registered(op)
    refusal = backend.refusal(op, device.type)
    if refusal:
        raise RuntimeError(
            f"quantlib.{op}: backend {backend.name!r} was chosen, but it {refusal}; "
            "choose another with quantlib.use_backend or QUANTLIB_BACKEND"
        )
    return backend.kernel(op)


def fused(op: str, device: torch.device) -> Callable | None:
    """The kernel that serves one of `ops.COMPOSED` as a whole; None where it is composed of the other ops' kernels."""
    backend = _choice.backend
    if backend is None:
        return None if _automatic(op, device.type).name == "reference" else _registered(op)
    return None if backend.refusal(op, device.type) else backend.kernel(op)


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the backend that would run `op` on `device`, and the verdict on each backend."""

    op: str
    device: str
    chosen: str | None
    verdicts: dict[str, str]

    def __str__(self) -> str:
        width = max(map(len, self.verdicts))
        lines = [f"{self.op} on {self.device}: {self.chosen or 'no backend'}"]
        return "\n".join(lines + [f"  {name:<{width}}  {why}" for name, why in self.verdicts.items()])


def explain(op: str, device: torch.device | str | torch.Tensor = "cpu") -> Explanation:
    """Says which backend would run an op, and why the others would not.

    Args:
        op: a name in `quantlib.ops.SCHEMAS`, such as "linear_4bit".
        device: a device, its name, or a tensor that lies on it.

    Raises:
        ValueError: unknown op.
    """
    if op not in ops.SCHEMAS:
        raise ValueError(f"quantlib.explain: unknown op {op!r}; allowed: {', '.join(ops.SCHEMAS)}")
    device_type = device.device.type if isinstance(device, torch.Tensor) else torch.device(device).type
    forced = _choice.backend
    chosen, verdicts = None, {}
    for backend in BACKENDS:
        refusal = backend.refusal(op, device_type)
        if refusal:
            verdicts[backend.name] = f"no: {refusal}"
        elif forced is not None:
            verdicts[backend.name] = "chosen by use_backend" if backend is forced else f"{forced.name} was chosen"
            chosen = forced.name if backend is forced else chosen
        elif backend.manual:
            verdicts[backend.name] = f"only on request: {backend.manual}"
        elif chosen is None:
            chosen = backend.name
            composed = op in ops.COMPOSED and fused(op, torch.device(device_type)) is None
            how = "composed of other ops, each by its own kernel" if composed else "the first that can run"
            verdicts[backend.name] = f"chosen: {how}"
        else:
            verdicts[backend.name] = f"can run, but {chosen} comes first"
        if backend.doubt and not refusal:
            verdicts[backend.name] += f"; {backend.doubt}"
    return Explanation(op, device_type, chosen, verdicts)


def _register_reference() -> None:
    """Plain PyTorch serves every op on every device that has no kernel of its own."""
    for name in ops.SCHEMAS:
        torch.library.impl(f"quantlib::{name}", "CompositeExplicitAutograd")(_reference(name))


@functools.cache
def _load_automatically(backend: Backend) -> dict[str, Callable]:
    if backend.doubt:
        warnings.warn(
            f"quantlib: tensors on {backend.device} are served by {backend.name!r}: {backend.doubt}. "
            "`python -m quantlib` compares every op with plain PyTorch on this machine; "
            "quantlib.use_backend('reference') computes with that instead",
            stacklevel=2,
        )
    return backend.load()


def _register_gpu() -> None:
    """What `auto` chooses for CUDA and ROCm tensors, loaded with the first of them."""
    for name in ops.SCHEMAS:
        backend = _automatic(name, "cuda")
        if backend.name != "reference":
            kernel = lambda *args, b=backend, op=name: _load_automatically(b)[op](*args)  # noqa: E731
            torch.library.impl(f"quantlib::{name}", "CUDA")(kernel)


_register_reference()
_register_gpu()
try:
    _choice.set(os.environ.get("QUANTLIB_BACKEND", AUTO))
except (ValueError, RuntimeError) as error:
    raise type(error)(f"{error} (from the environment variable QUANTLIB_BACKEND)") from None
