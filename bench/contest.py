"""What a contestant is, and how its results are judged.

A contestant of an op is a function that builds something to call from a case and its weights:

    @contestant("linear_4bit", "bitsandbytes", package="bitsandbytes")
    def _(case, w):
        layer = ...                                  # not timed
        return Entry(lambda rows: layer(rows.x))     # timed

It raises `Unavailable` where it cannot serve, with the reason. What it returns is compared with the truth before it is
timed; what does not hold the error budget is reported as wrong, never as fast.
"""

from __future__ import annotations

import functools
import importlib.util
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import quantlib
from bench import machine
from bench.cases import BUDGET, OPS, Results
from bench.inputs import Case, sampled

OURS = "quantlib"
Rows = SimpleNamespace
Weights = SimpleNamespace
Truth = Callable[[SimpleNamespace], tuple[Results, Results]]


class Unavailable(Exception):
    """Why a contestant cannot serve a case."""


def one(name: str) -> Callable[[Any], Results]:
    return lambda output: {name: output}


_y = one("y")


@dataclass(frozen=True)
class Entry:
    """Something to time.

    run: rows -> output. results: output -> named tensors, to compare; not timed. truth: rows -> what is right in
    float64, and the same in plain PyTorch, where they differ from the op's because the contestant computes something of
    its own. graph: a CUDA graph can hold it. least_rows, most_rows: the M it is meant for.
    """

    run: Callable[[Rows], Any]
    results: Callable[[Any], Results] = _y
    truth: Truth | None = None
    graph: bool = True
    least_rows: int = 0
    most_rows: int = 1 << 30

    def refusal(self, m: int | None) -> str:
        """Why it is not measured with m rows; "" if it is."""
        if m is not None and m < self.least_rows:
            return f"it takes M >= {self.least_rows} only"
        if m is not None and m > self.most_rows:
            return f"left out above M = {self.most_rows}, which it is not made for"
        return ""


@dataclass(frozen=True)
class Contestant:
    name: str
    package: str | None
    build: Callable[[Case, Weights], Entry]

    def entry(self, case: Case, weights: Weights) -> Entry:
        """Builds it. Raises Unavailable where its package is missing or it cannot serve the case."""
        if self.package and importlib.util.find_spec(self.package) is None:
            raise Unavailable(f"{self.package} is not installed")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.build(case, weights)


CONTESTANTS: dict[str, list[Contestant]] = {op: [] for op in OPS}


def contestant(ops: str | Iterable[str], name: str, package: str | None = None) -> Callable:
    """Registers the decorated builder for one op or several."""

    def register(build: Callable[[Case, Weights], Entry]) -> Callable:
        for op in [ops] if isinstance(ops, str) else ops:
            CONTESTANTS[op].append(Contestant(name, package, build))
        return build

    return register


def _distribution(package: str) -> str:
    return {"liger_kernel": "liger-kernel"}.get(package, package)


def package_version(peer: Contestant) -> str | None:
    """Version of the package a contestant comes from."""
    if peer.package is None:
        return quantlib.__version__ if peer.name.startswith(OURS) else torch.__version__
    return machine.version(_distribution(peer.package))


def share(results: Results, truth: Results, plain: Results) -> float:
    """The largest of the errors ||result - truth|| / ||plain - truth||: at most BUDGET if right, inf if not finite.

    Raises:
        ValueError: another set of results, or another shape.
    """
    if results.keys() != truth.keys():
        raise ValueError(f"it returns {', '.join(results)}; expected {', '.join(truth)}")
    worst = 0.0
    for name, right in truth.items():
        result = results[name].detach()
        if name in ("y", "dx"):
            result = sampled(result)
        if result.shape != right.shape:
            raise ValueError(f"{name} has shape {tuple(result.shape)}; expected {tuple(right.shape)}")
        error = (result.double() - right).norm()
        unit = (plain[name].double() - right).norm().clamp(min=1e-7 * right.norm().item())
        ratio = (error / unit).item() if unit > 0 else float(error > 0)
        worst = max(worst, ratio if ratio == ratio else float("inf"))
    return worst


def verdict(results: Results, truth: Results, plain: Results) -> tuple[str, str, float | None]:
    """Status, reason and share of the error: ("ok", "", 0.9), or ("wrong", why, share)."""
    try:
        found = share(results, truth, plain)
    except ValueError as error:
        return "wrong", str(error), None
    if found <= BUDGET:
        return "ok", "", found
    return "wrong", f"error {found:.3g} times that of plain PyTorch in this dtype; allowed {BUDGET:g}", found


def judged(entry: Entry, rows: Rows, truth: Results, plain: Results) -> tuple[str, str, float | None]:
    """The verdict on a contestant, which runs once. truth, plain: of the op. Raises whatever the contestant raises."""
    return verdict(entry.results(entry.run(rows)), *(entry.truth(rows) if entry.truth else (truth, plain)))


# ---------------------------------------------------------------------------------------------------
# Helpers


def truth_of(case: Case, w: Weights, exact: Callable[[], Tensor]) -> Truth:
    """The truth for other values of the weights, which are decoded once, when first asked for."""

    @functools.cache
    def own() -> Weights:
        values = exact()
        return SimpleNamespace(**{**vars(w), "exact": values, "decoded": values.to(case.dtype)})

    def truth(rows: Rows) -> tuple[Results, Results]:
        return OPS[case.op].truth(own(), rows), OPS[case.op].plain(own(), rows)

    return truth


def step(layer: Callable[[Tensor], Tensor], parameters: Iterable[Tensor] = ()) -> Callable[[Rows], tuple[Tensor, ...]]:
    """Forward and backward of a layer: rows -> y, dx and the gradients of the parameters."""
    parameters = tuple(parameters)

    def run(rows: Rows) -> tuple[Tensor, ...]:
        x = rows.x.detach().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *parameters), rows.dy)

    return run


def several(*names: str) -> Callable[[tuple[Tensor, ...]], Results]:
    return lambda output: dict(zip(names, output, strict=True))


def layer_entry(case: Case, layer: Callable[[Tensor], Tensor], **rest: Any) -> Entry:
    """A linear layer without parameters to train: y, and dx if the case goes backward."""
    if case.backward:
        return Entry(step(layer), several("y", "dx"), **{"graph": False, **rest})
    return Entry(lambda rows: layer(rows.x), **rest)


def frozen(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer that holds this weight."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


LORA = ("lora_linear_4bit", "lora_linear_int8")
MANY = EXPERTS, ADAPTERS = "linear_4bit_experts", "lora_linear_4bit_adapters"  # several weights in one call


def adapter(w: Weights) -> tuple[Tensor, Tensor]:
    return w.A.detach().requires_grad_(), w.B.detach().requires_grad_()


def lora_entry(
    case: Case, layer: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, truth: Truth | None = None
) -> Entry:
    """A linear layer with a LoRA branch: y, and dx, dA and dB if the case goes backward."""
    if case.backward:
        return Entry(step(layer, (A, B)), several("y", "dx", "dA", "dB"), truth, graph=False)
    return Entry(lambda rows: layer(rows.x), truth=truth, graph=False)
