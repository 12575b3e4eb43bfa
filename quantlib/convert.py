"""Quantizing the linear layers of a model in place, with a report of what was done and why."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from quantlib.modules import Linear4bit, Linear8bit, _QuantizedWeight

_LAYERS = {4: Linear4bit, 8: Linear8bit}


@dataclass(frozen=True)
class ReportRow:
    """One weight: where it is, its class now, why it was left alone ("" if quantized), bytes before and after."""

    name: str
    layer: str
    reason: str
    bytes_before: int
    bytes_after: int


@dataclass
class Report:
    """What `quantize_model` did. `str(report)` is a table; equal rows of a repeated block are folded."""

    bits: int
    rows: list[ReportRow] = field(default_factory=list)

    @property
    def converted(self) -> list[str]:
        """Names of the modules that were quantized."""
        return [row.name for row in self.rows if not row.reason]

    @property
    def skipped(self) -> dict[str, str]:
        """Name of every weight of two or more dimensions that stays as it was, and why."""
        return {row.name: row.reason for row in self.rows if row.reason}

    @property
    def bytes_before(self) -> int:
        """Bytes of all listed weights before; with `bytes_after`, scales included."""
        return sum(row.bytes_before for row in self.rows)

    @property
    def bytes_after(self) -> int:
        return sum(row.bytes_after for row in self.rows)

    def __str__(self) -> str:
        folded: dict[tuple[str, str, str], list[int]] = {}
        for row in self.rows:
            name = ".".join("*" if part.isdigit() else part for part in row.name.split("."))
            sums = folded.setdefault((name, row.layer, row.reason), [0, 0, 0])
            for i, value in enumerate((1, row.bytes_before, row.bytes_after)):
                sums[i] += value
        table = [("weight", "count", "layer", "MB before", "MB after", "left as it is because")]
        for (name, layer, reason), (count, before, after) in folded.items():
            table.append((name, str(count), layer, f"{before / 1e6:.2f}", f"{after / 1e6:.2f}", reason))
        before, after = self.bytes_before, self.bytes_after
        table.append(("total", str(len(self.rows)), "", f"{before / 1e6:.2f}", f"{after / 1e6:.2f}", ""))
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        right = (1, 3, 4)
        return "\n".join(
            "  ".join(
                cell.rjust(width) if i in right else cell.ljust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in table
        )


def _nbytes(module: nn.Module) -> int:
    tensors = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    return sum(t.numel() * t.element_size() for t in tensors)


def _is_skipped(name: str, skip: Iterable[str]) -> bool:
    return any(name == pattern or name.endswith("." + pattern) for pattern in skip)


def _reason_to_keep(name: str, module: nn.Module, skip: Iterable[str], tied: set[int]) -> str:
    """Why a module with a weight is not quantized; "" if it is."""
    if isinstance(module, _QuantizedWeight):
        return "already quantized"
    if not name:
        return "it is the model itself; use Linear4bit.from_linear or Linear8bit.from_linear"
    if not isinstance(module, nn.Linear):
        return f"{type(module).__name__} is not nn.Linear"
    if _is_skipped(name, skip):
        return "named in skip"
    if type(module) is not nn.Linear:
        return f"{type(module).__name__} may compute more than nn.Linear does"
    if id(module.weight) in tied:
        return "its weight is shared with another module"
    return ""


def _tied(model: nn.Module) -> set[int]:
    """ids of parameters that more than one module holds."""
    seen: set[int] = set()
    tied: set[int] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (tied if id(parameter) in seen else seen).add(id(parameter))
    return tied


def _check_finite(name: str, weight: torch.Tensor) -> None:
    if weight.is_meta:
        raise ValueError(f"quantlib.quantize_model: {name}.weight is on the meta device; load the weights first")
    bad = weight.numel() - int(torch.isfinite(weight).sum())
    if bad:
        raise ValueError(
            f"quantlib.quantize_model: {name}.weight has {bad} NaN or infinite values; "
            "the checkpoint is damaged: load an intact one"
        )


def quantize_model(
    model: nn.Module,
    bits: int = 4,
    skip: Iterable[str] = ("lm_head",),
    progress: bool = True,
    **options: Any,
) -> Report:
    """Replaces every `nn.Linear` of a model by Linear4bit or Linear8bit, in place.

    All weights are checked before the first is replaced, so an error leaves the model as it was.

    Args:
        model: any module tree. bits: 4 or 8.
        skip: names to leave alone: a whole dotted name, or its last parts ("lm_head", "mlp.gate").
        progress: show a bar.
        options: keyword arguments of the layer's constructor (`quant_type`, `block_size`, `double_quant`,
            `compute_dtype`, `quant_storage`; `threshold` for 8 bits).

    Returns:
        Report, also listing every weight of two or more dimensions that was left as it is, and why.

    Raises:
        ValueError: bits, weights with NaN or infinities, weights on the meta device, nothing to convert.
        TypeError: an option that the layer does not take.
    """
    if bits not in _LAYERS:
        raise ValueError(f"quantlib.quantize_model: bits is {bits!r}; allowed: 4, 8")
    if isinstance(skip, str):
        skip = (skip,)
    layer_type = _LAYERS[bits]
    layer_type(64, 64, device="meta", **options)  # refuses wrong options before any work
    tied = _tied(model)
    report = Report(bits)
    todo: list[str] = []
    for name, module in model.named_modules():
        is_matrix = any(p.dim() >= 2 for p in module.parameters(recurse=False))
        if is_matrix or isinstance(module, _QuantizedWeight):
            reason = _reason_to_keep(name, module, skip, tied)
            if reason:
                size = _nbytes(module)
                report.rows.append(ReportRow(name, type(module).__name__, reason, size, size))
            else:
                _check_finite(name, module.weight)
                todo.append(name)
    if not todo:
        raise ValueError(f"quantlib.quantize_model: no nn.Linear to quantize in {type(model).__name__}:\n{report}")
    places = _places(model)
    for name in tqdm(todo, desc=f"quantizing to {bits} bits", disable=not progress):
        linear = model.get_submodule(name)
        layer = layer_type.from_linear(linear, **options)
        for parent, child in places[id(linear)]:
            setattr(parent, child, layer)
        report.rows.append(ReportRow(name, layer_type.__name__, "", _nbytes(linear), _nbytes(layer)))
    return report


def _places(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """id of a module -> every parent and attribute that holds it; ids, so that replaced weights are freed."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for child_name, child in parent._modules.items():
            places.setdefault(id(child), []).append((parent, child_name))
    return places
