"""`python -m bench <command>`: see `python -m bench --help`.

A command is a module of this package with `configure(parser)`, which adds its arguments, and `main(args) -> int`, the
exit code. Only the module of the command that was asked for is imported.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

COMMANDS = {
    "run": "time every op against its peers and the machine's limits; writes a record",
    "report": "make tables and plots from records, and the README's performance section",
    "compare": "compare two records, or the working tree with a commit",
    "limits": "measure what the machine can do: bandwidth and matrix rates",
    "model": "train whole models with this package and its peers",
    "quality": "errors of the formats on trained weights, and perplexity",
    "compiled": "what the Triton kernels become on every GPU: registers, spills, instructions; needs no GPU",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of this package and its peers.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    for name, text in COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        if argv[:1] == [name]:
            module = importlib.import_module(f"bench.{name}")
            module.configure(command)
    args = parser.parse_args(argv)
    try:
        return module.main(args)
    except (OSError, ValueError) as error:
        print(f"python -m bench {args.command}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
