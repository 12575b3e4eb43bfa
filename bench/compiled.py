"""What the Triton kernels become on GPUs: compiled here for every target, without a GPU.

`python -m bench compiled` prints a row per kernel, configuration and target: registers a thread, bytes of stack (what
does not fit into registers spills there), shared memory of a program, the tensor-core instruction, the widest load and
store, machine instructions. Owners of kernels list them in `bench/compiled_<family>.py` as VARIANTS, with what they
expect; `tests/quant_triton/test_compiled.py` holds them to it.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import multiprocessing
import os
import re
import struct
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from quant_triton.launch import ARCHITECTURES, INTERPRETED, Architecture

OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg", "waves_per_eu")  # of a launch; all else is a constexpr


@dataclass(frozen=True)
class Expect:
    """What the machine code of a variant must have, besides no stack and shared memory that the chip has.

    tensor: target -> regular expression for `Facts.tensor`. load, store: bytes of the widest access to global memory,
    at least; half of it on AMD, whose warps are twice as wide. absent: regular expressions that match nothing in PTX.
    """

    tensor: Mapping[str, str] = field(default_factory=dict)
    load: int = 0
    store: int = 0
    absent: tuple[str, ...] = ()


@dataclass(frozen=True)
class Variant:
    """One kernel as one launch would compile it.

    name: unique, such as "dequantize_4bit nested bf16". kernel: a `triton.jit` function.
    signature: its arguments that are no constexprs: "*bf16", "*u8", "fp32", "i32"; "i32:16" for a multiple of 16.
        Pointers are multiples of 16 bytes, as torch allocates; "*bf16:1" is one that is not. Or a function of the
        Architecture that gives them, where some have another type or are constants.
    constants: constexprs, num_warps and num_stages, as `quant_triton.launch.launch` takes them, or a function of the
        Architecture that gives them, such as one that calls `quant_triton.launch.default`.
    options: what else the compiler is told, at least enable_fp_fusion.
    targets: names in `quant_triton.launch.ARCHITECTURES`.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str] | Callable[[Architecture], Mapping[str, str]]
    constants: Mapping[str, Any] | Callable[[Architecture], Mapping[str, Any]]
    options: Mapping[str, Any]
    expect: Expect = Expect()
    targets: tuple[str, ...] = tuple(ARCHITECTURES)

    def constants_on(self, target: str) -> dict[str, Any]:
        """Constexprs and launch options on a target."""
        return dict(self.constants(ARCHITECTURES[target]) if callable(self.constants) else self.constants)

    def signature_on(self, target: str) -> dict[str, str]:
        """Types of all other arguments on a target."""
        return dict(self.signature(ARCHITECTURES[target]) if callable(self.signature) else self.signature)


@dataclass(frozen=True)
class Facts:
    """What a variant became on a target.

    registers: a thread. stack: bytes of local memory a thread. shared: bytes a program. tensor: the tensor-core
    instruction and, for wgmma, where its first operand lies; "" without one. load, store: bytes of the widest access
    to global memory. instructions: how many, in SASS or AMD's assembly. assembly: PTX or AMD's.
    """

    registers: int
    stack: int
    shared: int
    tensor: str
    load: int
    store: int
    instructions: int
    assembly: str = field(repr=False, default="")


def compile_variant(variant: Variant, target: str) -> Any:
    """What `triton.compile` gives. Raises RuntimeError under the interpreter, and what the compiler raises."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if INTERPRETED:
        raise RuntimeError("bench.compiled: TRITON_INTERPRET is set, which replaces the compiler; unset it")
    constants, types = variant.constants_on(target), variant.signature_on(target)
    options = {name: constants.pop(name) for name in OPTIONS if name in constants} | dict(variant.options)
    names = variant.kernel.arg_names
    unknown = [name for name in {**types, **constants} if name not in names]
    missing = [name for name in names if name not in types and name not in constants]
    if unknown or missing:
        raise ValueError(f"bench.compiled: {variant.name}: no arguments of the kernel: {unknown}; missing: {missing}")
    signature, attributes = {}, {}
    for i, name in enumerate(names):
        kind, _, divisor = types.get(name, "constexpr").partition(":")
        signature[name] = kind
        if (divisor or ("16" if kind.startswith("*") else "")) == "16":
            attributes[(i,)] = [["tt.divisibility", 16]]
    arch = ARCHITECTURES[target]
    gpu = GPUTarget("cuda", arch.capability, 32) if arch.kind == "cuda" else GPUTarget("hip", target, arch.warp)
    return triton.compile(ASTSource(variant.kernel, signature, constants, attributes), target=gpu, options=options)


# ---------------------------------------------------------------------------------------------------
# Reading what came out


def _disassemble(tool: str, cubin: bytes, *arguments: str) -> str:
    """Output of cuobjdump or nvdisasm, which Triton's wheel carries."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [getattr(knobs.nvidia, tool).path, *arguments, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def sass(compiled: Any) -> str:
    """The machine code of a kernel compiled for an NVIDIA GPU."""
    return _disassemble("nvdisasm", compiled.asm["cubin"], "-c", "-novliw")


def _text_size(elf: bytes) -> int:
    """Bytes of the sections of code of a 64-bit ELF file. Disassembling takes as long as compiling."""
    (start,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", elf, start + i * size) for i in range(count)]
    strings = sections[names][4]
    return sum(length for name, _, _, _, _, length in sections if elf.startswith(b".text", strings + name))


def _widest(text: str, pattern: str) -> int:
    return max((int(count or 1) * int(bits) // 8 for count, bits in re.findall(pattern, text)), default=0)


def _tensor_ptx(ptx: str) -> str:
    """The most frequent tensor-core instruction."""
    found = Counter()
    for name, rest in re.findall(r"^\s*(?:@\S+\s+)?((?:wgmma\.mma_async|mma|tcgen05\.mma)\.\S+)\s+(.*)", ptx, re.M):
        if name.startswith("wgmma"):
            # After the accumulators in braces comes the first operand: four registers, or a descriptor.
            name += " A in registers" if re.match(r"\{[^}]*\},\s*\{", rest) else " A in shared memory"
        found[re.sub(r"\.(sync|aligned|mma_async)", "", name)] += 1
    return found.most_common(1)[0][0] if found else ""


def _facts_cuda(compiled: Any, ptx: str) -> Facts:
    usage = _disassemble("cuobjdump", compiled.asm["cubin"], "-res-usage")
    registers, stack, local = (int(re.search(rf"\b{name}:(\d+)", usage).group(1)) for name in ("REG", "STACK", "LOCAL"))
    copies = [int(n, 0) for n in re.findall(r"cp\.async\.c[ag]\.shared\.global\S* \[[^]]*\], \[[^]]*\], (\w+)", ptx)]
    return Facts(
        registers=registers,
        stack=stack + local,
        shared=compiled.metadata.shared,
        tensor=_tensor_ptx(ptx),
        load=max([_widest(ptx, r"ld\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)"), *copies]),
        store=_widest(ptx, r"st\.global[\w:.]*?(?:\.v(\d))?\.[bfsu](\d+)"),
        instructions=_text_size(compiled.asm["cubin"]) // 16,  # bytes of one, from sm_70 on
        assembly=ptx,
    )


def _facts_hip(compiled: Any, assembly: str) -> Facts:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly).group(1))

    def widest(kind: str) -> int:
        words = re.findall(rf"(?:global|buffer)_{kind}_(dwordx(\d)|dword|u?short|s?short|[us]?byte)", assembly)
        sizes = {"dword": 4, "short": 2, "byte": 1}
        return max(
            (4 * int(n) if n else next(v for k, v in sizes.items() if w.endswith(k)) for w, n in words), default=0
        )

    tensor = Counter(re.findall(r"^\s*(v_mfma_\w+)", assembly, re.M))
    return Facts(
        registers=number("vgpr_count"),
        stack=number("private_segment_fixed_size"),
        shared=compiled.metadata.shared,
        tensor=tensor.most_common(1)[0][0] if tensor else "",
        load=widest("load"),
        store=widest("store"),
        instructions=len(re.findall(r"^\s+[svbdg]\w*_\w+", assembly, re.M)),
        assembly=assembly,
    )


def facts(variant: Variant, target: str) -> Facts:
    """Compiles a variant for a target and reads the result."""
    compiled = compile_variant(variant, target)
    if ARCHITECTURES[target].kind == "hip":
        return _facts_hip(compiled, compiled.asm["amdgcn"])
    return _facts_cuda(compiled, compiled.asm["ptx"])


def complaints(variant: Variant, target: str, found: Facts) -> list[str]:
    """What differs from what the variant expects; empty if nothing does."""
    expect, arch, wrong = variant.expect, ARCHITECTURES[target], []
    if found.stack:
        wrong.append(f"{found.stack} bytes of stack")
    if found.shared > arch.shared_memory:
        wrong.append(f"{found.shared} bytes of shared memory, {target} has {arch.shared_memory}")
    if target in expect.tensor and not re.search(expect.tensor[target], found.tensor):
        wrong.append(f"tensor-core instruction {found.tensor!r}, expected {expect.tensor[target]!r}")
    for kind in ("load", "store"):
        bytes_expected = getattr(expect, kind) * 32 // arch.warp
        if getattr(found, kind) < bytes_expected:
            wrong.append(f"{kind}s of {getattr(found, kind)} bytes, expected {bytes_expected}")
    if arch.kind == "cuda":
        wrong += [f"{pattern!r} in PTX" for pattern in expect.absent if re.search(pattern, found.assembly)]
    return wrong


# ---------------------------------------------------------------------------------------------------
# The command


def _facts_by_name(name: str, target: str) -> Facts:
    return facts(next(variant for variant in variants() if variant.name == name), target)


@contextmanager
def compiling(work: Sequence[tuple[Variant, str]]) -> Iterator[list[Future[Facts]]]:
    """The facts of variants on targets, to come from as many processes as there are cores, which others go before."""
    with ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn"), os.nice, (19,)) as pool:
        yield [pool.submit(_facts_by_name, variant.name, target) for variant, target in work]
        pool.shutdown(cancel_futures=True)


@functools.cache
def variants() -> tuple[Variant, ...]:
    """What `bench/compiled_*.py` list."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("compiled_*.py"))
    return tuple(variant for name in modules for variant in importlib.import_module(f"bench.{name}").VARIANTS)


def table(rows: Iterable[tuple[Variant, str, Facts]]) -> str:
    """The rows as aligned text."""
    lines = [("kernel", "target", "config", "regs", "stack", "shared", "load", "store", "instr", "tensor cores")]
    for variant, target, found in rows:
        constants = variant.constants_on(target)
        config = " ".join(f"{k}={v}" for k, v in constants.items() if k in OPTIONS or k.startswith("BLOCK"))
        numbers = (found.registers, found.stack, found.shared, found.load, found.store, found.instructions)
        lines.append((variant.name, target, config, *map(str, numbers), found.tensor))
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(f"{cell:<{width}}" for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `python -m bench compiled`."""
    parser.add_argument("names", nargs="*", help="only kernels whose name has one of these in it")
    parser.add_argument("--targets", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES), metavar="TARGET")
    parser.add_argument("--dump", type=Path, metavar="DIR", help="write every stage of compilation, SASS too, there")


def _dump(folder: Path, variant: Variant, target: str) -> None:
    compiled = compile_variant(variant, target)
    stem = re.sub(r"\W+", "-", variant.name)
    folder.mkdir(parents=True, exist_ok=True)
    stages = {name: compiled.asm[name] for name in ("ttgir", "ptx", "amdgcn") if name in compiled.asm}
    if "cubin" in compiled.asm:
        stages["sass"] = sass(compiled)
    for stage, text in stages.items():
        (folder / f"{stem}.{target}.{stage}").write_text(text, encoding="utf-8")


def main(args: argparse.Namespace) -> int:
    """Prints the table; 1 if a variant is not as expected."""
    chosen = [v for v in variants() if not args.names or any(name in v.name for name in args.names)]
    work = [(variant, target) for variant in chosen for target in args.targets if target in variant.targets]
    rows, wrong = [], []
    with compiling(work) as futures:
        for (variant, target), future in zip(work, tqdm(futures, unit="kernel", disable=None), strict=True):
            found = future.result()
            rows.append((variant, target, found))
            wrong += [f"{variant.name} on {target}: {text}" for text in complaints(variant, target, found)]
            if args.dump:
                _dump(args.dump, variant, target)
    print(table(rows))
    print(f"\n{len(rows)} compiled, {len(wrong)} not as expected", *wrong, sep="\n")
    return int(bool(wrong))
