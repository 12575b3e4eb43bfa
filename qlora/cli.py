"""The `qlora` command: `qlora train`, `qlora eval`, `qlora generate`.

Exit codes: 0; 2 for anything the user can put right, told in one line on stderr (a full disk, too); 130 when
interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from qlora.errors import InputError, first_line

if TYPE_CHECKING:
    from qlora.model import Quantization


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; see {self.prog} --help")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", required=True, help="directory of a causal language model, or its hub id")
    group.add_argument("--bits", type=int, default=4, help="hold the base weights in 4, 8 or 16 bits (default 4)")
    group.add_argument("--quant-type", default="nf4", help="4 bits: nf4 or fp4 (default nf4)")
    group.add_argument("--block-size", type=int, default=64, help="4 bits: weights per scale (default 64)")
    group.add_argument(
        "--double-quant",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="4 bits: quantize the scales too (default on)",
    )
    group.add_argument(
        "--threshold",
        type=float,
        default=6.0,
        help="8 bits: input columns with an element at least this large are computed in 16 bits (default 6; 0: none)",
    )
    group.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    group.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float16", "float32"],
        help="of what is not quantized; auto: bfloat16 where the device has it, else float32",
    )


def _quantization(args: argparse.Namespace) -> Quantization:
    from qlora.model import Quantization

    return Quantization(args.bits, args.quant_type, args.block_size, args.double_quant, args.threshold)


def _add_train(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    data = parser.add_argument_group("data")
    data.add_argument("--data", nargs="+", required=True, metavar="FILE", help='UTF-8 text, or .jsonl with "text"')
    data.add_argument("--eval-data", nargs="+", default=[], metavar="FILE", help="held-out text")
    data.add_argument(
        "--eval-fraction", type=float, default=0.1, help="without --eval-data: fraction of --data to hold out"
    )
    data.add_argument("--seq-len", type=int, default=512, help="tokens in a block (default 512)")

    lora = parser.add_argument_group("adapter")
    lora.add_argument("--rank", type=int, default=16, help="(default 16)")
    lora.add_argument("--alpha", type=float, default=32.0, help="the branch is scaled by alpha / rank (default 32)")
    lora.add_argument("--dropout", type=float, default=0.05, help="on the branch's input (default 0.05)")
    lora.add_argument(
        "--target-modules", nargs="+", default=[], metavar="NAME", help="layers to adapt (default: every linear one)"
    )

    steps = parser.add_argument_group("training")
    steps.add_argument("--lr", type=float, default=2e-4, help="highest learning rate (default 2e-4)")
    steps.add_argument("--scheduler", default="cosine", help="linear, cosine (default) or constant")
    steps.add_argument("--warmup-ratio", type=float, default=0.03, help="of the steps (default 0.03)")
    steps.add_argument("--weight-decay", type=float, default=0.0)
    steps.add_argument("--max-grad-norm", type=float, default=1.0, help="(default 1; 0: no clipping)")
    steps.add_argument("--epochs", type=float, default=3.0, help="(default 3)")
    steps.add_argument("--max-steps", type=int, default=0, help="instead of --epochs")
    steps.add_argument("--batch-size", type=int, default=8, help="blocks per forward pass (default 8)")
    steps.add_argument("--grad-accum", type=int, default=1, help="forward passes per step (default 1)")
    steps.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    steps.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--output", required=True, metavar="DIR", help="for adapter, log, loss curve and checkpoints")
    output.add_argument("--eval-steps", type=int, default=0, help="evaluate every so many steps (default: at the end)")
    output.add_argument("--save-steps", type=int, default=100, help="checkpoint every so many steps (default 100)")
    output.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    output.add_argument("--overwrite", action="store_true", help="replace an earlier training in --output")


def _train(args: argparse.Namespace) -> None:
    from qlora.options import TrainOptions
    from qlora.train import train

    own = {"command", "run", "bits", "quant_type", "block_size", "double_quant", "threshold"}
    options = {name: value for name, value in vars(args).items() if name not in own}
    log = train(TrainOptions(quantization=_quantization(args), **options))
    print(f"trained {log['trainable_parameters']:,} parameters in {log['steps']} steps")
    if "perplexity" in log:
        print(f"held-out perplexity {log['perplexity']:.3f} (loss {log['eval_loss']:.4f})")
    print(f"adapter, training_log.json and loss.png are in {args.output}")


def _add_eval(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--adapter", metavar="DIR", help="output directory of a training")
    parser.add_argument("--data", nargs="+", required=True, metavar="FILE", help='UTF-8 text, or .jsonl with "text"')
    parser.add_argument("--seq-len", type=int, default=512, help="tokens in a block (default 512)")
    parser.add_argument("--batch-size", type=int, default=8, help="(default 8)")


def _eval(args: argparse.Namespace) -> None:
    from qlora.evaluate import ModelOptions, evaluate

    options = ModelOptions(args.model, args.adapter, _quantization(args), args.device, args.dtype)
    print(json.dumps(evaluate(options, args.data, args.seq_len, args.batch_size)))


def _add_generate(parser: argparse.ArgumentParser) -> None:
    _add_model(parser)
    parser.add_argument("--adapter", metavar="DIR", help="output directory of a training")
    parser.add_argument("--prompt", required=True)
    parser.add_argument("--max-new-tokens", type=int, default=100, help="(default 100)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 (default): always the likeliest token")
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--repetition-penalty", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)


def _generate(args: argparse.Namespace) -> None:
    from qlora.evaluate import ModelOptions, Sampling, generate, load

    sampling = Sampling(args.max_new_tokens, args.temperature, args.top_p, args.repetition_penalty, args.seed)
    sampling.check()
    model, tokenizer = load(ModelOptions(args.model, args.adapter, _quantization(args), args.device, args.dtype))
    print(args.prompt + generate(model, tokenizer, args.prompt, sampling))


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="qlora", description="Fine-tune language models on quantized weights.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, add, run, description in (
        ("train", _add_train, _train, "train a LoRA adapter on a quantized model"),
        ("eval", _add_eval, _eval, "perplexity of a model, with or without an adapter"),
        ("generate", _add_generate, _generate, "continue a prompt"),
    ):
        command = commands.add_parser(name, help=description, description=description)
        add(command)
        command.set_defaults(run=run)
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit code."""

    def work() -> None:
        args = _parser().parse_args(argv)
        quiet()
        args.run(args)

    return one_line_errors(work)


def one_line_errors(work: Callable[[], object]) -> int:
    """Run `work` and return the exit code; errors of the user's making go to stderr in one line."""
    try:
        work()
    except InputError as error:
        print(f"qlora: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"qlora: error: {first_line(error)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("qlora: interrupted; a training goes on with --resume", file=sys.stderr)
        return 130
    return 0


def quiet() -> None:
    """Leave the terminal to our own progress bars and messages."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with contextlib.suppress(ImportError):  # whole-model benchmarks run without it
        import datasets

        datasets.disable_progress_bars()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
