"""Errors of the formats on trained weights: `python -m bench quality`.

The weights are those of a model of the demonstration's size, small but really trained: first of all, on Python's
documentation. What the formats lose is taken against float64. Three questions, one table each:

weights      how far are decoded weights, and a layer's outputs computed with them, from the exact ones?
outliers     what do outlier features cost, with LLM.int8()'s split at each threshold and without it (threshold 0)?
perplexity   what is left of it in the whole model, on topics of the documentation that the model has not seen?

Outlier features are planted into the activations ("activations"), into the weights' columns ("weights"), or into the
activations with the weights divided to match ("both"), which changes nothing of what the model computes: it is how
they come about in large models. bitsandbytes computes each number too, where it has the format.
"""

from __future__ import annotations

import argparse
import copy
import logging
import math
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from torch import Tensor, nn

import quantlib
from bench import machine, quality_report, records
from bench.quality_formats import Format, bitsandbytes_layer, formats, has_bitsandbytes
from qlora import corpus
from qlora.cli import quiet
from qlora.data import make_blocks
from qlora.evaluate import mean_loss
from qlora.model import Quantization, choose_dtype, load_base, load_tokenizer
from qlora.pretrain import BaseOptions, pretrain

CPU = torch.device("cpu")
OUTLIERS = 6  # planted features; LLM.int8() found at most 7 in models of up to 13 billion parameters
MAGNITUDES = (1, 8, 32)
THRESHOLDS = (0.0, 1.0, 2.0, 4.0, 6.0, 8.0, 16.0, 32.0)
BASE = BaseOptions(steps=200)  # a minute or two; enough for text of one kind
TINY = BaseOptions(
    vocab=384, hidden=64, intermediate=128, layers=2, heads=2, positions=64, steps=4, batch_size=4, seq_len=32
)
Row = dict[str, object]


@dataclass(frozen=True)
class Layer:
    """A linear layer's weight [out, in] and rows of its input [rows, in], both as the model holds them."""

    name: str
    weight: Tensor
    x: Tensor

    def exact(self) -> Tensor:
        return self.x.double() @ self.weight.double().t()


def capture(model: nn.Module, ids: Tensor, rows: int) -> list[Layer]:
    """Every linear layer but lm_head, with `rows` of what it is given for `ids`."""
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs.update({name: args[0].flatten(0, -2)}))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    with torch.no_grad():
        model(input_ids=ids)
    for hook in hooks:
        hook.remove()
    layers = []
    for name, x in inputs.items():
        step = max(1, len(x) // rows)
        layers.append(Layer(name, model.get_submodule(name).weight.detach(), x[::step][:rows]))
    return layers


def distance(found: Tensor, exact: Tensor) -> float:
    """Relative distance, in float64."""
    return ((found.double() - exact).norm() / exact.norm()).item()


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def weight_row(layers: Sequence[Layer], form: Format) -> Row:
    """Errors of a format, means over the layers: of the weights, and of outputs computed exactly with them."""
    errors: dict[str, list[float]] = {"bits": [], "weight_error": [], "output_error": []}
    theirs: dict[str, list[float]] = {"weight_error": [], "output_error": []}
    differing = {"codes": 0, "weights": 0}
    for layer in layers:
        weight, x, y = layer.weight.double(), layer.x.double(), layer.exact()
        codes, decoded, bits = form.ours(layer.weight)
        errors["bits"].append(bits)
        both = [(decoded, errors)]
        if form.theirs and has_bitsandbytes():
            their_codes, their_decoded = form.theirs(layer.weight)
            both.append((their_decoded, theirs))
            differing["codes"] += int((their_codes != codes).sum())
            differing["weights"] += int((their_decoded != decoded).sum())
        for values, where in both:
            where["weight_error"].append(distance(values, weight))
            where["output_error"].append(distance(x @ values.double().t(), y))
    row = {"table": "weights", "format": form.name, "quant_type": form.quant_type, "block_size": form.block_size}
    row |= {"double_quant": form.double_quant, **{name: _mean(values) for name, values in errors.items()}}
    if theirs["weight_error"]:
        row["bitsandbytes"] = {name: _mean(values) for name, values in theirs.items()}
        row["differing"] = differing
    return row | judged(row, "weight_error")


def judged(row: Row, name: str) -> Row:
    """Status of a row: "wrong" if our error is not finite or more than 1% above bitsandbytes'."""
    ours, theirs = row[name], row.get("bitsandbytes", {}).get(name)
    if not math.isfinite(ours):
        return {"status": "wrong", "reason": f"{name} is {ours}"}
    if theirs is not None and ours > 1.01 * theirs:
        return {"status": "wrong", "reason": f"{name} is {ours:.4g}, bitsandbytes' {theirs:.4g}"}
    return {"status": "ok", "reason": ""}


def plant(layer: Layer, where: str, magnitude: int) -> Layer:
    """The layer with OUTLIERS of its input features scaled by a power of two, exactly."""
    columns = torch.randperm(layer.x.shape[1], generator=torch.manual_seed(0))[:OUTLIERS]
    x, weight = layer.x.clone(), layer.weight.clone()
    if where in ("activations", "both"):
        x[:, columns] *= magnitude
    if where == "weights":
        weight[:, columns] *= magnitude
    if where == "both":
        weight[:, columns] /= magnitude
    return Layer(layer.name, weight, x)


def outlier_rows(layers: Sequence[Layer]) -> Iterator[Row]:
    """Errors of int8 products with the split at each threshold, beside 4-bit weights, by what was planted."""
    cases = [("nothing", 1), *((w, m) for w in ("activations", "weights", "both") for m in MAGNITUDES[1:])]
    for where, magnitude in cases:
        planted = [plant(layer, where, magnitude) for layer in layers]
        case = {"table": "outliers", "planted": where, "magnitude": magnitude}
        nf4 = [distance(_nf4_product(layer), layer.exact()) for layer in planted]
        yield {**case, "format": "NF4", "output_error": _mean(nf4), "status": "ok", "reason": ""}
        for threshold in THRESHOLDS:
            yield {**case, "format": "int8", "threshold": threshold, **_int8_products(planted, threshold)}


def _nf4_product(layer: Layer) -> Tensor:
    return quantlib.linear_4bit(layer.x, quantlib.quantize_4bit(layer.weight, double_quant=True))


def _int8_products(layers: Sequence[Layer], threshold: float) -> Row:
    ours, theirs, outliers = [], [], []
    for layer in layers:
        exact, q = layer.exact(), quantlib.quantize_int8(layer.weight)
        ours.append(distance(quantlib.linear_int8(layer.x, q, threshold=threshold), exact))
        outliers.append((layer.x.abs() >= threshold).any(0).double().mean().item() if threshold else 0.0)
        if has_bitsandbytes():
            module = bitsandbytes_layer(_linear(layer.weight), 8, "", False, threshold)
            with torch.no_grad():
                theirs.append(distance(module(layer.x), exact))
    row: Row = {"output_error": _mean(ours), "outlier_columns": _mean(outliers)}
    if theirs:
        row["bitsandbytes"] = {"output_error": _mean(theirs)}
    return row | judged(row, "output_error")


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def plant_in_model(model: nn.Module, magnitude: int) -> None:
    """Scales OUTLIERS features of every norm's output and divides the weights that read them: the same function."""
    columns = torch.randperm(model.config.hidden_size, generator=torch.manual_seed(0))[:OUTLIERS]
    with torch.no_grad():
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, readers in (
                (block.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
                (block.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
            ):
                norm.weight[columns] *= magnitude
                for reader in readers:
                    reader.weight[:, columns] /= magnitude


def perplexity_rows(base: Path, blocks: Dataset, dtype: torch.dtype, quick: bool) -> Iterator[Row]:
    """Perplexity of the model by format, and by threshold once outlier features are planted in it."""
    plain = [Quantization(16), Quantization(8), Quantization(8, threshold=0.0)]
    for quant_type in ("nf4", "fp4"):
        for block_size in (64,) if quick else (64, 256, 1024):
            plain += [Quantization(4, quant_type, block_size, double_quant) for double_quant in (False, True)]
    cases = [(quantization, 1) for quantization in plain]
    for magnitude in MAGNITUDES[1:]:
        thresholds = (0.0, 6.0) if quick or magnitude < max(MAGNITUDES) else THRESHOLDS
        cases += [(Quantization(8, threshold=threshold), magnitude) for threshold in thresholds]
        cases += [(Quantization(4), magnitude), (Quantization(16), magnitude)]
    model, _ = load_base(base, Quantization(16), CPU, dtype)
    for quantization, magnitude in cases:
        planted = copy.deepcopy(model)
        plant_in_model(planted, magnitude)
        yield _perplexity(planted, blocks, quantization, magnitude)


def _perplexity(model: nn.Module, blocks: Dataset, quantization: Quantization, magnitude: int) -> Row:
    q = quantization
    row: Row = {"table": "perplexity", "format": describe(q), "bits": q.bits, "magnitude": magnitude}
    row |= {"threshold": q.threshold} if q.bits == 8 else {}
    theirs = None
    if q.bits != 16:
        if has_bitsandbytes() and q.block_size == 64:
            theirs = copy.deepcopy(model)
        quantlib.quantize_model(model, q.bits, progress=False, **q.options())
    row["perplexity"] = math.exp(mean_loss(model, blocks, progress=False))
    if theirs is not None:
        for name, module in list(theirs.named_modules()):
            if isinstance(module, nn.Linear) and name != "lm_head":
                layer = bitsandbytes_layer(module, q.bits, q.quant_type, q.double_quant, q.threshold)
                parent, _, child = name.rpartition(".")
                setattr(theirs.get_submodule(parent), child, layer)
        row["bitsandbytes"] = {"perplexity": math.exp(mean_loss(theirs, blocks, progress=False))}
    return row | judged(row, "perplexity")


def describe(q: Quantization) -> str:
    """The name of a quantization in the table of perplexities."""
    if q.bits == 16:
        return "16 bits"
    if q.bits == 8:
        return f"LLM.int8(), threshold {q.threshold:g}" if q.threshold else "int8, no threshold"
    return f"{q.quant_type.upper()}, block {q.block_size}{', double quant' if q.double_quant else ''}"


def run(base: Path, quick: bool = False, progress: Callable[[str], None] = print) -> records.Record:
    """Measures everything on the model in `base`, and returns the record."""
    record = records.new("quality", machine.describe())
    dtype = choose_dtype("auto", CPU)
    tokenizer = load_tokenizer(base)
    model, _ = load_base(base, Quantization(16), CPU, dtype)
    _, held_out = corpus.documentation()
    length = 32 if quick else 256
    blocks = make_blocks(held_out[:8] if quick else held_out, tokenizer, length, "held-out text")
    blocks = blocks.select(range(min(len(blocks), 4 if quick else 32)))
    layers = capture(model, torch.tensor(blocks[:4]["input_ids"]), 32 if quick else 256)
    config = model.config
    record["model"] = {
        "hidden": config.hidden_size,
        "layers": config.num_hidden_layers,
        "linear_weights": sum(layer.weight.numel() for layer in layers),
        "dtype": str(dtype).removeprefix("torch."),
        "tokens": len(blocks) * length,
        "outliers": OUTLIERS,
    }
    results = record["results"]
    progress("weights")
    results += [weight_row(layers, form) for form in formats()]
    progress("outliers")
    results += outlier_rows(layers)
    progress("perplexity")
    results += perplexity_rows(base, blocks, dtype, quick)
    return record


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m bench quality`."""
    parser.add_argument(
        "--quick", action="store_true", help="a tiny model, hardly trained, to see that everything runs"
    )
    parser.add_argument("--out", type=Path, help="folder of the record (default bench/results/<machine>)")


def main(args: argparse.Namespace) -> int:
    """Measures, writes the record and prints its table. The exit code is 1 if an error is larger than it may be."""
    quiet()
    logging.disable(logging.WARNING)  # bitsandbytes warns at every int8 product of another dtype than float16
    warnings.filterwarnings("ignore", message="MatMul8bitLt")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        texts, _ = corpus.documentation()
        pretrain(texts[:8] if args.quick else texts, base, TINY if args.quick else BASE, progress=not args.quick)
        record = run(base, args.quick, progress=lambda what: print(what, file=sys.stderr, flush=True))
    path = machine.results_dir(args.out) / "quality.json"
    records.write(path, record)
    print(quality_report.table(record))
    print(f"\nwritten to {path}")
    return 1 if any(row["status"] != "ok" for row in record["results"]) else 0
