"""Where the time of a training step goes, by kind of work, from torch.profiler.

Forward passes run inside labels, one for each part of the model; a backward node belongs to the part that made it,
which the profiler knows by sequence number. The name of an op and the shapes of a matrix product go before labels:
a product with an edge of the LoRA rank is the adapter's, one with an edge of the vocabulary the loss's, and what a
fused layer computes inside one autograd node is told apart like that.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import takewhile
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

import quantlib

os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # the profiler announces itself on stderr
GROUPS = ("base linear", "LoRA", "base + LoRA", "attention", "norm + activation", "loss", "optimizer", "other")
_LABEL = "bench: "
_PRODUCTS = ("aten::mm", "aten::addmm", "aten::addmm_", "aten::linear", "aten::matmul", "aten::_addmm_activation")
_FUSED_OPS = ("quantlib::lora_linear", "quantlib_triton::lora_linear")  # one op, which no profile takes apart
_BASE_OPS = ("quantlib::linear", "quantlib::dequantize", "bitsandbytes::", "MatMul4Bit")
_BASE_KERNELS = ("kDequantize", "kgemm_4bit", "kGemm4bit", "dequantize_4bit", "dequantize_blockwise")
_ATTENTION_OPS = ("aten::scaled_dot_product", "aten::_scaled_dot_product", "aten::_flash_attention")
_NODE = "autograd::engine::evaluate_function"


def label_of(name: str, module: nn.Module, parent: nn.Module | None) -> str | None:
    """The group that a module's own work belongs to; None where it belongs to what it is part of."""
    kind = type(module).__name__
    if isinstance(module, BaseTunerLayer):
        return "LoRA"
    if name.endswith("base_layer") and isinstance(parent, BaseTunerLayer):
        # A label on these would be a hook, which the fused layer rightly respects by not fusing.
        return None if isinstance(module, quantlib.Linear4bit | quantlib.Linear8bit) else "base linear"
    if kind.endswith(("Attention", "RotaryEmbedding")):
        return "attention"
    if kind.endswith(("RMSNorm", "MLP")):
        return "norm + activation"
    if kind.endswith("ForCausalLM"):
        return "loss"
    if kind.endswith(("DecoderLayer", "LlamaModel")):
        return "other"
    return None


@contextmanager
def labels(model: nn.Module) -> Iterator[None]:
    """Within, every part of the model runs its forward pass inside its label."""
    modules = dict(model.named_modules())
    labelled = []

    def wrap(forward: Callable, label: str) -> Callable:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(_LABEL + label):
                return forward(*args, **kwargs)

        return run

    for name, module in modules.items():
        label = label_of(name, module, modules.get(name.rpartition(".")[0]))
        if label is not None:
            labelled.append((module, vars(module).get("forward")))
            module.forward = wrap(module.forward, label)
    try:
        yield
    finally:
        for module, forward in labelled:
            if forward is None:
                del module.forward
            else:
                module.forward = forward


def _chain(event: Any) -> Iterator[Any]:
    while event is not None:
        yield event
        event = event.cpu_parent


def _dimensions(event: Any) -> set[int]:
    return {size for shape in event.input_shapes or () for size in shape if isinstance(size, int)}


def _by_work(chain: Sequence[Any], kernel: str, rank: int, vocab: int) -> str | None:
    """The group by what is computed: by the names of the ops around, else by the shapes of a product."""
    if any(name in kernel for name in _BASE_KERNELS):
        return "base linear"
    inside = list(takewhile(lambda event: not event.name.startswith((_LABEL, _NODE)), chain))
    for event in inside:
        if event.name.startswith(_FUSED_OPS):
            return "base + LoRA"
        if event.name.startswith(_BASE_OPS):
            return "base linear"
        if event.name.startswith(_ATTENTION_OPS) or "AttentionBackward" in event.name:
            return "attention"
        if event.name.startswith("Optimizer."):
            return "optimizer"
    for event in inside:
        if event.name in _PRODUCTS and (dimensions := _dimensions(event)):
            return "LoRA" if rank in dimensions else "loss" if vocab in dimensions else "base linear"
    return None


def _label(chain: Sequence[Any], forward: dict[tuple[int, int], Any]) -> str | None:
    """The innermost label around an event; for a backward node, the one around the op that made it."""
    for event in chain:
        if event.name.startswith(_LABEL):
            return event.name.removeprefix(_LABEL)
        if event.name.startswith(_NODE):
            made_by = forward.get(event.sequence_nr)
            return None if made_by is None else _label(list(_chain(made_by)), {})
    return None


def group_times(events: Sequence[Any], rank: int, vocab: int, cuda: bool) -> dict[str, float]:
    """Seconds by group of the events of a profile, of device time with `cuda`, else of host time.

    Args:
        events: the `events()` of a profile with shapes.
    """
    events = [event for event in events if event.device_type == torch.autograd.DeviceType.CPU]
    forward: dict[int, Any] = {}
    for event in sorted(events, key=lambda event: event.time_range.start):
        # Nodes carry the number of the op that made them: the last of those with that number. What is computed
        # again under checkpointing runs inside a node, makes no node that is ever run, and counts from anew.
        in_backward = any(outer.name.startswith(_NODE) for outer in _chain(event))
        if event.sequence_nr >= 0 and not in_backward:
            forward[event.sequence_nr] = event
    times = dict.fromkeys(GROUPS, 0.0)
    for event in events:
        if cuda:
            # Annotations are mirrored on the device, under their own names, and are no work.
            work = [(kernel.name, kernel.duration) for kernel in event.kernels if kernel.name != event.name]
        else:
            work = [("", event.self_cpu_time_total)]
        for kernel, microseconds in work:
            chain = list(_chain(event))
            group = _by_work(chain, kernel, rank, vocab) or _label(chain, forward) or "other"
            times[group] += microseconds / 1e6
    return times


def split(
    model: nn.Module, step: Callable[[], object], device: torch.device, rank: int, vocab: int
) -> dict[str, float]:
    """Seconds by group of one call of `step`, a training step of `model`."""
    cuda = device.type == "cuda"
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * cuda
    with labels(model), profile(activities=activities, record_shapes=True) as found:
        step()
        if cuda:
            torch.cuda.synchronize(device)
    return group_times(found.events(), rank, vocab, cuda)
