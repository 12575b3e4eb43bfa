"""The cases that are run together, with the shapes of real models."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from bench.cases import OPS
from bench.inputs import Case

# [out_features, in_features] of the linear layers; an embedding is [vocabulary, hidden].
MODELS: dict[str, dict[str, tuple[int, int]]] = {
    "Llama-3 8B": {"q, o": (4096, 4096), "k, v": (1024, 4096), "gate, up": (14336, 4096), "down": (4096, 14336)},
    "Llama-3 70B": {"q, o": (8192, 8192), "k, v": (1024, 8192), "gate, up": (28672, 8192), "down": (8192, 28672)},
    "Qwen3 8B": {"gate, up": (12288, 4096), "down": (4096, 12288)},
    "Qwen3 32B": {"q": (8192, 5120), "k, v": (1024, 5120), "gate, up": (25600, 5120), "down": (5120, 25600)},
    "Mixtral 8x7B": {"an expert": (14336, 4096), "embedding": (32000, 4096)},
}
# [experts, out_features, in_features]
EXPERTS: dict[str, dict[str, tuple[int, int, int]]] = {
    "Mixtral 8x7B": {"experts' gate, up": (8, 14336, 4096), "experts' down": (8, 4096, 14336)},
    "Qwen3 30B-A3B": {"experts' gate, up": (128, 768, 2048), "experts' down": (128, 2048, 768)},
}


def layer_name(shape: tuple[int, ...]) -> str:
    """The first layer of MODELS or EXPERTS that has this shape, "" if none has."""
    known = (*MODELS.items(), *EXPERTS.items())
    return next((f"{m} {layer}" for m, layers in known for layer, s in layers.items() if s == shape), "")


TRANSFORMS = ("quantize_4bit", "dequantize_4bit", "quantize_int8", "quantize_int8_columns", "dequantize_int8")
BF16 = torch.bfloat16


def _layers(op: str, shapes, rows, dtype=BF16, backward=(False, True), **rest) -> Iterator[Case]:
    for way in backward:
        for shape in shapes:
            for m in rows:
                yield Case(op, shape, dtype, m, way, **rest)


def _embedding(*rows: int) -> Iterator[Case]:
    """Warm: copies of a table this large would be gigabytes."""
    return _layers("embedding_4bit", (MODELS["Mixtral 8x7B"]["embedding"],), rows, backward=(False,), cache="warm")


def tiny(op: str) -> tuple[int, ...]:
    """A shape that takes no time."""
    return {"linear_4bit_experts": (3, 128, 256), "dropout": (256,)}.get(op, (128, 256))


def _quick(device: str) -> Iterator[Case]:
    """Seconds: every op once, forward and backward.

    Under Triton's interpreter in float16 and on one copy: it is wrong about bfloat16, and slow.
    """
    dtype, cache = (torch.float16, "warm") if os.environ.get("TRITON_INTERPRET") == "1" else (BF16, "cold")
    for op, entry in OPS.items():
        for m in (1, 5) if entry.rows else (None,):
            for backward in (False, True) if entry.backward else (False,):
                yield Case(op, tiny(op), dtype, m, backward, cache)


def _default_cpu(device: str) -> Iterator[Case]:
    """About seven minutes on two slow cores. Square weights fit into the cache in 4 bits, the others do not."""
    square, up, down = (4096, 4096), (14336, 4096), (4096, 14336)
    rows = (1, 4, 16, 64, 256, 1024)
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        yield Case(op, square, BF16, cache="warm")
        yield Case(op, up, BF16)
    for op in ("quantize_4bit", "dequantize_4bit", "quantize_int8"):
        yield Case(op, square, torch.float32, cache="warm")
    for op in ("linear_4bit", "linear_int8"):
        yield from _layers(op, (square,), rows, cache="warm")
        yield from _layers(op, (up, down), rows, backward=(False,))
        yield from _layers(op, (up, down), (256, 1024), backward=(True,))
    yield from _layers("linear_4bit", (square,), (1, 64, 256), torch.float32, (False,), cache="warm")
    yield from _layers("linear_4bit", (square,), (1, 16), torch.float16, (False,), cache="warm")
    yield from _embedding(1, 1024)
    yield from _layers("dropout", ((4096,),), (1024,), backward=(False,), cache="warm")
    for op in ("lora_linear_4bit", "lora_linear_int8"):
        yield from _layers(op, (square,), (16, 128, 1024), backward=(True,), cache="warm")


def _default_cuda(device: str) -> Iterator[Case]:
    """Most valuable first: a run may be cut short."""
    llama8, llama70 = ((4096, 4096), (14336, 4096), (4096, 14336)), ((8192, 8192), (28672, 8192), (8192, 28672))
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        for shape in ((4096, 4096), (14336, 4096), (8192, 28672)):
            yield Case(op, shape, BF16)
    yield from _layers("linear_4bit", ((4096, 4096), (8192, 28672)), (1, 16, 64, 256, 2048, 16384))
    yield from _layers("linear_int8", ((4096, 4096), (8192, 28672)), (1, 16, 256, 2048, 16384))
    yield from _layers("lora_linear_4bit", ((4096, 4096), (14336, 4096)), (2048, 8192), backward=(True,))
    yield from _layers("lora_linear_int8", ((4096, 4096),), (2048, 8192), backward=(True,))
    yield from _layers("lora_linear_4bit", ((4096, 4096),), (1, 16, 256), backward=(False,))
    yield from _layers("linear_4bit_experts", ((8, 14336, 4096), (128, 768, 2048)), (16, 256, 4096))
    yield from _layers("lora_linear_4bit_adapters", ((4096, 4096),), (16, 256, 4096))
    yield from _embedding(1, 1024, 16384)
    yield from _layers("dropout", ((4096,),), (1, 1024, 16384), backward=(False,))
    yield from _layers(
        "linear_4bit", llama8[1:] + llama70[:2], (1, 4, 16, 64, 256, 1024, 4096, 16384), backward=(False,)
    )
    yield from _layers("linear_int8", llama8[1:] + llama70[:2], (1, 16, 256, 2048), backward=(False,))


def _full(device: str) -> Iterator[Case]:
    """Every layer of MODELS, M from 1 to 16384, three dtypes for the transforms. Hours."""
    layers = {layer: None for model in MODELS.values() for name, layer in model.items() if name != "embedding"}
    rows = tuple(4**i for i in range(8))
    for op in (*TRANSFORMS, "dequantize_4bit_double"):
        for shape in layers:
            for dtype in (BF16, torch.float16, torch.float32):
                yield Case(op, shape, dtype)
    for op in ("linear_4bit", "linear_int8", "lora_linear_4bit", "lora_linear_int8"):
        yield from _layers(op, layers, rows)
    if device == "cuda":
        experts = [layer for model in EXPERTS.values() for layer in model.values()]
        yield from _layers("linear_4bit_experts", experts, rows[1:])  # a token alone has several experts
        yield from _layers("lora_linear_4bit_adapters", MODELS["Llama-3 8B"].values(), rows)
    yield from _embedding(*rows)
    yield from _layers("dropout", ((4096,), (14336,)), rows, backward=(False,))


def suite(name: str, device: str) -> list[Case]:
    """The cases of "quick", "default" or "full" for a kind of device ("cpu", "cuda"), those of one group together.

    Raises:
        ValueError: unknown name.
    """
    makers = {"quick": _quick, "default": _default_cuda if device == "cuda" else _default_cpu, "full": _full}
    if name not in makers:
        raise ValueError(f"suite is {name!r}; allowed: {', '.join(makers)}")
    return list(dict.fromkeys(makers[name](device)))
