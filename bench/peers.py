"""Who is measured: this package and its peers, each found by import.

A contestant of an op is a function that builds something to call from a case and its weights:

    @contestant("linear_4bit", "bitsandbytes", package="bitsandbytes")
    def _(case, w):
        layer = ...                                  # not timed
        return Entry(lambda rows: layer(rows.x))     # timed

It raises `Unavailable` where it cannot serve, with the reason. What it returns is compared with the truth before it is
timed; what does not hold the error budget is reported as wrong, never as fast.
"""

from __future__ import annotations

import copy
import importlib
import importlib.util
import logging
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import lora_ops
import quantlib
from bench import machine
from bench.cases import BUDGET, OPS, RANK, SCALING, THRESHOLD, Case, Results, sampled
from quantlib import backends, reference

OURS = "quantlib"
Rows = SimpleNamespace
Weights = SimpleNamespace


class Unavailable(Exception):
    """Why a contestant cannot serve a case."""


def _one(name: str) -> Callable[[Any], Results]:
    return lambda output: {name: output}


_y = _one("y")


@dataclass(frozen=True)
class Entry:
    """Something to time.

    run: rows -> output. results: output -> named tensors, to compare; not timed. truth: rows -> what is right in
    float64, where it differs from the op's because the contestant computes something of its own. graph: a CUDA graph
    can hold it. least_rows, most_rows: the M it is meant for.
    """

    run: Callable[[Rows], Any]
    results: Callable[[Any], Results] = _y
    truth: Callable[[Rows], Results] | None = None
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
    return quantlib.__version__ if peer.package is None else machine.version(_distribution(peer.package))


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


# ---------------------------------------------------------------------------------------------------
# Helpers


def step(layer: Callable[[Tensor], Tensor], parameters: Iterable[Tensor] = ()) -> Callable[[Rows], tuple[Tensor, ...]]:
    """Forward and backward of a layer: rows -> y, dx and the gradients of the parameters."""
    parameters = tuple(parameters)

    def run(rows: Rows) -> tuple[Tensor, ...]:
        x = rows.x.detach().requires_grad_()
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *parameters), rows.dy)

    return run


def _named(*names: str) -> Callable[[tuple[Tensor, ...]], Results]:
    return lambda output: dict(zip(names, output, strict=True))


def layer_entry(case: Case, layer: Callable[[Tensor], Tensor], **rest: Any) -> Entry:
    """A linear layer without parameters to train: y, and dx if the case goes backward."""
    if case.backward:
        return Entry(step(layer), _named("y", "dx"), **{"graph": False, **rest})
    return Entry(lambda rows: layer(rows.x), **rest)


def _frozen(weight: Tensor) -> nn.Linear:
    """A bias-free linear layer that holds this weight."""
    linear = nn.Linear(*reversed(weight.shape), bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def _bnb() -> ModuleType:
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    return importlib.import_module("bitsandbytes")


# ---------------------------------------------------------------------------------------------------
# This package


def _layer(case: Case, w: Weights) -> nn.Module:
    if "int8" in case.op:
        return quantlib.Linear8bit.from_linear(_frozen(w.w), threshold=THRESHOLD)
    return quantlib.Linear4bit.from_linear(_frozen(w.w), compute_dtype=case.dtype, double_quant=True)


def _decode_4bit(q: quantlib.Quantized4bit) -> Results:
    return {"decoded": reference.dequantize_4bit(*q.op_args(), q.shape, torch.float64)}


def _decode_int8(q: quantlib.QuantizedInt8) -> Results:
    return {"decoded": reference.dequantize_int8(q.values, q.absmax, q.dim, q.block_size, torch.float64)}


@contestant("quantize_4bit", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_4bit(w.w), _decode_4bit)


@contestant(("dequantize_4bit", "dequantize_4bit_double", "dequantize_int8"), OURS)
def _(case, w):
    return Entry(lambda rows: w.q.dequantize(), _one("w"))


@contestant("quantize_int8", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_int8(w.w), _decode_int8)


@contestant("quantize_int8_columns", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.quantize_int8(w.w, dim=0), _decode_int8)


@contestant(("linear_4bit", "linear_int8"), OURS)
def _(case, w):
    return layer_entry(case, _layer(case, w).train(case.backward))


@contestant("linear_4bit", "quantlib, decode + torch")
def _(case, w):
    """The weight decoded to memory and multiplied by PyTorch, as most packages do it."""
    return layer_entry(case, lambda x: F.linear(x, w.q.dequantize()))


@contestant("embedding_4bit", OURS)
def _(case, w):
    return Entry(lambda rows: quantlib.embedding_4bit(rows.indices, w.q), _one("rows"))


LORA = ("lora_linear_4bit", "lora_linear_int8")


def _adapter(w: Weights) -> tuple[Tensor, Tensor]:
    return w.A.detach().requires_grad_(), w.B.detach().requires_grad_()


def lora_entry(case: Case, layer: Callable[[Tensor], Tensor], A: Tensor, B: Tensor, truth=None) -> Entry:
    """A linear layer with a LoRA branch: y, and dx, dA and dB if the case goes backward."""
    if case.backward:
        return Entry(step(layer, (A, B)), _named("y", "dx", "dA", "dB"), truth, graph=False)
    return Entry(lambda rows: layer(rows.x), truth=truth, graph=False)


@contestant(LORA, OURS)
def _(case, w):
    A, B = _adapter(w)
    layer = lambda x: lora_ops.lora_linear(x, w.q, A, B, SCALING, threshold=THRESHOLD)  # noqa: E731
    return lora_entry(case, layer, A, B)


@contestant(LORA, "quantlib, base layer alone")
def _(case, w):
    def truth(rows):
        return OPS[case.op.removeprefix("lora_")].truth(w, rows)

    entry = layer_entry(case, _layer(case, w))
    return Entry(entry.run, entry.results, truth, graph=False)


_KERNELS: dict[str, Callable[[Case, Weights, Rows], tuple]] = {
    "quantize_4bit": lambda case, w, rows: (w.w, "nf4", 64),
    "dequantize_4bit": lambda case, w, rows: (*w.q.op_args(), w.q.shape, case.dtype),
    "linear_4bit": lambda case, w, rows: (rows.x, *w.q.op_args(), case.shape[0], None),
    "quantize_int8": lambda case, w, rows: (w.w, -1, None, 0.0),
    "dequantize_int8": lambda case, w, rows: (w.q.values, w.q.absmax, -1, None, case.dtype),
    "linear_int8": lambda case, w, rows: (rows.x, w.q.values, w.q.absmax, None, THRESHOLD),
}


def _kernel_results(case: Case, w: Weights) -> Callable[[Any], Results]:
    if case.op == "quantize_4bit":
        exact = lambda out: reference.dequantize_4bit(*out, None, None, None, "nf4", 64, case.shape, torch.float64)  # noqa: E731
        return lambda out: {"decoded": exact(out)}
    if case.op == "quantize_int8":
        return lambda out: {"decoded": reference.dequantize_int8(*out[:2], -1, None, torch.float64)}
    return _one("y" if OPS[case.op].rows else "w")


def _on_request(backend: backends.Backend) -> None:
    """A backend that `auto` passes over is a contestant of its own for the ops that it has."""

    def build(case: Case, w: Weights) -> Entry:
        device = w.w.device
        if case.backward:
            raise Unavailable("measured forward only")
        if refusal := backend.refusal(case.op, device.type):
            raise Unavailable(f"it {refusal}")
        kernel, args = backend.kernel(case.op), _KERNELS[case.op]
        return Entry(lambda rows: kernel(*args(case, w, rows)), _kernel_results(case, w))

    contestant([op for op in _KERNELS if op in backend.ops], f"quantlib, {backend.name}")(build)


for _backend in backends.BACKENDS:
    if _backend.manual:
        _on_request(_backend)


# ---------------------------------------------------------------------------------------------------
# bitsandbytes


def _bnb_4bit(bnb: ModuleType, weight: Tensor, nested: bool = True) -> nn.Module:
    layer = bnb.nn.Linear4bit(
        *reversed(weight.shape), bias=False, compute_dtype=weight.dtype, quant_type="nf4", device="meta"
    )
    layer.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, quant_type="nf4", compress_statistics=nested, blocksize=64
    )
    return layer.to(weight.device)


def _bnb_int8(bnb: ModuleType, weight: Tensor) -> nn.Module:
    layer = bnb.nn.Linear8bitLt(
        *reversed(weight.shape), bias=False, has_fp16_weights=False, threshold=THRESHOLD, device="meta"
    )
    source = weight.to("cpu", copy=True)  # it quantizes on the way from the CPU only
    layer.weight = bnb.nn.Int8Params(source, requires_grad=False, has_fp16_weights=False)
    return layer.to(weight.device)


def _bnb_layer(case: Case, w: Weights) -> nn.Module:
    return _bnb_int8(_bnb(), w.w) if "int8" in case.op else _bnb_4bit(_bnb(), w.w)


def _bnb_truth(case: Case, w: Weights, packed: Tensor, state: Any) -> Callable[[Rows], Results]:
    """The truth for its own 4-bit weights: its CPU kernel rounds some of the nested scales another way.

    The tensors are taken now, since inference on a CPU replaces them. They are decoded when asked for, in float64.
    """
    nested = (state.state2.absmax, state.state2.code, state.offset)
    args = (packed.data, state.absmax, *nested, "nf4", 64, case.shape, torch.float64)

    def truth(rows: Rows) -> Results:
        exact = reference.dequantize_4bit(*args)
        return OPS[case.op].truth(SimpleNamespace(**{**vars(w), "exact": exact}), rows)

    return truth


def _bnb_own(case: Case, w: Weights, layer: nn.Module) -> Callable[[Rows], Results] | None:
    return None if "int8" in case.op else _bnb_truth(case, w, layer.weight.data, layer.weight.quant_state)


@contestant("quantize_4bit", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional

    def results(output):
        packed, state = output
        args = (packed, state.absmax, None, None, None, "nf4", 64, case.shape, torch.float64)
        return {"decoded": reference.dequantize_4bit(*args)}

    run = lambda rows: functional.quantize_4bit(w.w, quant_type="nf4", blocksize=64)  # noqa: E731
    return Entry(run, results, graph=False)  # it launches on the legacy stream, which ends a process that captures


@contestant(("dequantize_4bit", "dequantize_4bit_double"), "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    nested = case.op.endswith("double")
    packed, state = functional.quantize_4bit(w.w, quant_type="nf4", blocksize=64, compress_statistics=nested)
    truth = _bnb_truth(case, w, packed, state) if nested else None
    return Entry(lambda rows: functional.dequantize_4bit(packed, state), _one("w"), truth)


@contestant("quantize_int8", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    dtype = _bnb_int8_dtype(w.w)

    def results(output):
        return {"decoded": reference.dequantize_int8(output[0], output[1], -1, None, torch.float64)}

    return Entry(lambda rows: functional.int8_vectorwise_quant(w.w.to(dtype)), results, graph=False)


def _bnb_int8_dtype(x: Tensor) -> torch.dtype:
    """Its CUDA kernels take float16 only; its own layers cast to it."""
    return torch.float16 if x.device.type == "cuda" else x.dtype


@contestant("quantize_int8_columns", "bitsandbytes, rows and columns", package="bitsandbytes")
def _(case, w):
    if w.w.device.type == "cpu":
        raise Unavailable("it has no CPU kernel for columns")
    functional = _bnb().functional
    dtype = _bnb_int8_dtype(w.w)

    def results(output):
        return {"decoded": reference.dequantize_int8(output[1], output[3], 0, None, torch.float64)}

    return Entry(lambda rows: functional.int8_double_quant(w.w.to(dtype)), results, graph=False)


@contestant("dequantize_int8", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    functional = _bnb().functional
    run = lambda rows: functional.int8_vectorwise_dequant(w.q.values, w.q.absmax).to(case.dtype)  # noqa: E731
    return Entry(run, _one("w"))


@contestant(("linear_4bit", "linear_int8"), "bitsandbytes", package="bitsandbytes")
def _(case, w):
    """In eval mode without gradients, where bitsandbytes repacks its 4-bit weights on CPUs; else in train mode."""
    layer = _bnb_layer(case, w).train(case.backward)
    graph = case.op == "linear_4bit" and not case.backward
    return layer_entry(case, layer, truth=_bnb_own(case, w, layer), graph=graph)


@contestant("linear_4bit", "bitsandbytes, not repacked", package="bitsandbytes")
def _(case, w):
    if case.backward or w.w.device.type != "cpu":
        raise Unavailable("the same as bitsandbytes: it repacks for inference on CPUs only")
    layer = _bnb_layer(case, w).train()
    return layer_entry(case, layer, truth=_bnb_own(case, w, layer))


@contestant("embedding_4bit", "bitsandbytes", package="bitsandbytes")
def _(case, w):
    bnb = _bnb()
    layer = bnb.nn.Embedding4bit(1, case.shape[1], dtype=case.dtype, quant_type="nf4")
    layer.num_embeddings = case.shape[0]
    layer.weight = bnb.nn.Params4bit(
        w.w.clone(), requires_grad=False, quant_type="nf4", compress_statistics=False, blocksize=64, module=layer
    )
    layer = layer.to(w.w.device)
    q = quantlib.quantize_4bit(w.w)  # its embedding knows no double quantization
    exact = reference.dequantize_4bit(*q.op_args(), q.shape, torch.float64)
    truth = lambda rows: {"rows": exact[rows.indices]}  # noqa: E731
    return Entry(lambda rows: layer(rows.indices), _one("rows"), truth, graph=False)


# ---------------------------------------------------------------------------------------------------
# PyTorch


@contestant(("linear_4bit", "linear_int8"), "torch")
def _(case, w):
    """The layer that is not quantized, in the same dtype."""
    return layer_entry(case, _frozen(w.decoded))


@contestant("embedding_4bit", "torch")
def _(case, w):
    return Entry(lambda rows: F.embedding(rows.indices, w.decoded), _one("rows"))


@contestant(("quantize_int8", "quantize_int8_columns"), "torch, op by op")
def _(case, w):
    dim = 0 if case.op.endswith("columns") else -1

    def run(rows):
        absmax = w.w.abs().amax(dim).float()
        return (w.w.float() * (127 / absmax).unsqueeze(dim)).round().to(torch.int8), absmax

    def results(output):
        return {"decoded": reference.dequantize_int8(*output, dim, None, torch.float64)}

    return Entry(run, results)


@contestant("dequantize_int8", "torch, op by op")
def _(case, w):
    return Entry(lambda rows: (w.q.values.float() * (w.q.absmax / 127)[:, None]).to(case.dtype), _one("w"))


@contestant("linear_4bit", "torch, float32")
def _(case, w):
    if case.dtype == torch.float32 or case.backward:
        raise Unavailable("measured forward only, beside 16-bit dtypes")
    weight = w.decoded.float()
    slow = w.w.device.type == "cpu"
    return Entry(lambda rows: F.linear(rows.x.float(), weight), most_rows=64 if slow else 1 << 30)


def uniform_int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes 0 ... 15 of a uniform grid per group of a row; scale and zero, [groups, out, 2]; the decoded weight."""
    out, into = weight.shape
    blocks = weight.float().view(out, -1, group)
    low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
    scale = ((high - low) / 15).clamp(min=1e-8).to(weight.dtype)
    zero = (low + 8 * scale.float()).to(weight.dtype)
    codes = ((blocks - zero.float()) / scale.float() + 8).round().clamp(0, 15)
    decoded = (codes.double() - 8) * scale.double() + zero.double()
    scales_and_zeros = torch.cat([scale, zero], -1).transpose(0, 1).contiguous()
    return codes.view(out, into).int(), scales_and_zeros, decoded.view(out, into)


@contestant("linear_4bit", "torch, uniform int4")
def _(case, w):
    """`_weight_int4pack_mm`: 4 bits in groups of 64, equal steps. Compared with the truth of its own weights."""
    if case.backward or case.dtype != torch.bfloat16:
        raise Unavailable("forward in bfloat16 only")
    codes, scales, decoded = uniform_int4(w.w, 64)
    aten = torch.ops.aten
    if w.w.device.type == "cpu":
        packed = aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        product = aten._weight_int4pack_mm_for_cpu
    else:
        packed = aten._convert_weight_to_int4pack((codes[:, ::2] << 4 | codes[:, 1::2]).to(torch.uint8), 8)
        product = aten._weight_int4pack_mm
    truth = lambda rows: {"y": F.linear(sampled(rows.x).double(), decoded)}  # noqa: E731
    most = 64 if w.w.device.type == "cpu" else 1 << 30  # it is no kernel for many rows
    return Entry(lambda rows: product(rows.x, packed, 64, scales), truth=truth, most_rows=most)


@contestant("linear_int8", "torch._int_mm, product alone")
def _(case, w):
    """A bound for any int8 layer: the integer product, without quantizing x, scales or outliers."""
    if case.backward:
        raise Unavailable("forward only")
    values = w.q.values.t()

    def rounded(rows: Rows) -> Tensor:
        if not hasattr(rows, "rounded"):  # at the first call on some rows, which is not timed
            rows.rounded = rows.x.round().clamp(-127, 127).to(torch.int8)
        return rows.rounded

    truth = lambda rows: {"y": sampled(rounded(rows)).double() @ values.double()}  # noqa: E731
    least = 17 if w.w.device.type == "cuda" else 0
    return Entry(lambda rows: torch._int_mm(rounded(rows), values), truth=truth, least_rows=least)


@contestant(LORA, "torch, LoRA on 16 bits")
def _(case, w):
    A, B = _adapter(w)
    layer = lambda x: F.linear(x, w.decoded) + SCALING * F.linear(F.linear(x, A), B)  # noqa: E731
    return lora_entry(case, layer, A, B)


# ---------------------------------------------------------------------------------------------------
# PEFT, over bitsandbytes and over our layers


def _peft_layer(base: nn.Module, w: Weights, bits: int | None, float32: bool) -> tuple[nn.Module, Tensor, Tensor]:
    peft = importlib.import_module("peft")
    model = nn.Module()
    model.proj = base
    if bits:
        setattr(model, f"is_loaded_in_{bits}bit", True)
    config = peft.LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=["proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model, config, autocast_adapter_dtype=float32)
    layer = adapted.base_model.model.proj
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    dtype = torch.float32 if float32 else w.A.dtype
    for parameter, value in ((A, w.A), (B, w.B)):
        parameter.data = value.to(dtype, copy=True)
    return layer, A, B


def _peft(name: str, base: Callable[[Case, Weights], nn.Module], bnb: bool, float32: bool) -> None:
    @contestant(LORA, name, package="peft")
    def _(case, w):
        if bnb and importlib.util.find_spec("bitsandbytes") is None:
            raise Unavailable("bitsandbytes is not installed")
        bits = (8 if "int8" in case.op else 4) if bnb else None
        frozen = base(case, w)
        layer, A, B = _peft_layer(frozen, w, bits, float32)
        return lora_entry(case, layer, A, B, _bnb_own(case, w, frozen) if bnb else None)


_peft("PEFT, bitsandbytes", _bnb_layer, bnb=True, float32=True)
_peft("PEFT, bitsandbytes, 16-bit adapter", _bnb_layer, bnb=True, float32=False)
_peft("PEFT, quantlib", _layer, bnb=False, float32=True)


# ---------------------------------------------------------------------------------------------------
# torchao


def _found(module: str) -> ModuleType | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


@contestant("linear_4bit", "torchao, NF4", package="torchao")
def _(case, w):
    homes = "torchao.quantization.quantize_.workflows.nf4.nf4_tensor", "torchao.dtypes.nf4tensor"  # 0.18; before
    nf4 = next((module for home in homes if (module := _found(home))), None)
    if nf4 is None:
        raise Unavailable(f"this version has neither {' nor '.join(homes)}")
    weight = nf4.to_nf4(w.w, block_size=64, scaler_block_size=256)
    exact = weight.get_original_weight().double()

    def truth(rows):
        y = F.linear(sampled(rows.x).double(), exact)
        return {"y": y, "dx": sampled(rows.dy).double() @ exact} if case.backward else {"y": y}

    return layer_entry(case, lambda x: nf4.linear_nf4(x, weight), truth=truth)


@contestant("linear_int8", "torchao, int8 without outliers", package="torchao")
def _(case, w):
    if case.backward:
        raise Unavailable("forward only")
    quantization = importlib.import_module("torchao.quantization")
    layer = nn.Sequential(copy.deepcopy(_frozen(w.w)))
    quantization.quantize_(layer, quantization.Int8DynamicActivationInt8WeightConfig())
    return layer_entry(case, layer)


# ---------------------------------------------------------------------------------------------------
# Unsloth


@contestant("lora_linear_4bit", "Unsloth", package="unsloth")
def _(case, w):
    """Its function for one projection. Importing Unsloth changes other libraries, so this comes last."""
    if w.w.device.type != "cuda":
        raise Unavailable("it needs a GPU")
    function = importlib.import_module("unsloth.kernels.fast_lora").LoRA_W
    weight = _bnb_layer(case, w).weight
    A, B = _adapter(w)
    layer = lambda x: function.apply(x[None], weight, weight.quant_state, A, B, SCALING)[0]  # noqa: E731
    return lora_entry(case, layer, A, B, _bnb_truth(case, w, weight.data, weight.quant_state))
