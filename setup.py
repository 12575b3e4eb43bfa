"""Builds `quantlib._C` (CPU) and, where CUDA's compiler is present, `quantlib._C_cuda`.

Both use PyTorch's stable ABI and CPython's limited API, so one wheel serves every torch >= 2.10 and every
Python >= 3.10. The CUDA module is compiled without torch's help: its kernels do not include torch, and any
nvcc that knows the architectures will do, whatever CUDA version torch itself was built with.

Environment: QUANTLIB_CUDA=0 never builds the CUDA module, QUANTLIB_CUDA=1 always; unset, it is built when
nvcc and a CUDA build of torch are there. QUANTLIB_CUDA_ARCHS="90" or "80 90" builds for these architectures only.
MAX_JOBS limits the number of compilers that run at once.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from glob import glob
from pathlib import Path

from setuptools import setup
from setuptools.errors import CompileError

try:
    import torch
    from torch.utils.cpp_extension import BuildExtension, CppExtension
except ImportError:
    sys.exit(
        "qlora-kernels: building needs PyTorch >= 2.10 in the environment that builds; "
        "install torch first, or build without --no-build-isolation"
    )

CUDA_ARCHITECTURES = ("75", "80", "90", "100", "120")
# No contraction: absmax * code + offset must round twice, as the format defines it.
CXX_FLAGS = ["-O3", "-g0", "-std=c++17", "-ffp-contract=off", "-fvisibility=hidden", "-Wall"]
STABLE_ABI = ["-DTORCH_TARGET_VERSION=0x020a000000000000", "-DTORCH_STABLE_ONLY"]
NVCC_FLAGS = ["-O3", "-std=c++17", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden"]
HEADERS = sorted(glob("csrc/**/*.h", recursive=True))
LIMITED_API = not sysconfig.get_config_var("Py_GIL_DISABLED")  # free-threaded Python has none


def find_cuda_home() -> str | None:
    """The CUDA toolkit's folder, from CUDA_HOME, CUDA_PATH, nvcc on PATH or the usual place; None without nvcc."""
    nvcc = shutil.which("nvcc")
    candidates = [
        os.environ.get("CUDA_HOME"),
        os.environ.get("CUDA_PATH"),
        nvcc and str(Path(nvcc).resolve().parent.parent),
        "/usr/local/cuda",
    ]
    # nvcc on PATH may be a script that starts another one, so each candidate must hold the headers too.
    for home in filter(None, candidates):
        if (Path(home) / "bin" / "nvcc").exists() and (Path(home) / "include" / "cuda_runtime.h").exists():
            return home
    return None


def decide_cuda(setting: str | None, cuda_home: str | None, torch_cuda: str | None) -> tuple[bool, str]:
    """Whether to build the CUDA module, and why not.

    `setting` is the value of QUANTLIB_CUDA, `torch_cuda` that of torch.version.cuda. Raises ValueError for a
    setting that is neither 0, 1 nor empty, and for 1 without nvcc.
    """
    if setting not in (None, "", "0", "1"):
        raise ValueError(f"QUANTLIB_CUDA={setting!r} is not understood: use 0 (never), 1 (always) or leave it unset")
    if setting == "0":
        return False, "QUANTLIB_CUDA=0"
    if cuda_home is None:
        if setting == "1":
            raise ValueError("QUANTLIB_CUDA=1, but nvcc was not found: set CUDA_HOME to the CUDA toolkit's folder")
        return False, "nvcc was not found (set CUDA_HOME to the CUDA toolkit's folder)"
    if setting != "1" and torch_cuda is None:
        return False, "the installed torch is built without CUDA (QUANTLIB_CUDA=1 builds it all the same)"
    return True, ""


def choose_architectures(setting: str | None, known: list[str]) -> list[str]:
    """The architectures to build for, such as ["80", "90"]: those named by QUANTLIB_CUDA_ARCHS, else all of ours.

    `known` is the output of `nvcc --list-gpu-code`. Raises ValueError for a name that this nvcc does not know.
    """
    wanted = (setting or "").replace(",", " ").replace(";", " ").split()
    for arch in wanted:
        if f"sm_{arch.rstrip('af')}" not in known:  # nvcc does not list 90a and 100f beside 90 and 100
            raise ValueError(
                f"QUANTLIB_CUDA_ARCHS={setting!r}: this nvcc does not know {arch!r}; it knows "
                + ", ".join(name.removeprefix("sm_") for name in known)
            )
    return wanted or [arch for arch in CUDA_ARCHITECTURES if f"sm_{arch}" in known]


def gencode_flags(archs: list[str]) -> list[str]:
    """Machine code for each architecture, and PTX of the last one for those to come."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


class Build(BuildExtension):
    """torch's build command, with the .cu files of an extension (its `cuda_sources`) compiled by nvcc."""

    def finalize_options(self) -> None:
        super().finalize_options()
        # A folder that stays, so that ninja compiles only what changed; `pip install -e .` would take a new one.
        self.build_temp = os.path.abspath("build/objects")

    def build_extension(self, ext) -> None:
        sources = getattr(ext, "cuda_sources", [])
        if sources:
            nvcc = str(Path(ext.cuda_home) / "bin" / "nvcc")
            flags = [*NVCC_FLAGS, *gencode_flags(ext.cuda_archs)]
            jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
            objects = Path(self.build_temp) / "_".join(ext.cuda_archs)  # another list of architectures, other objects
            with ThreadPoolExecutor(jobs) as pool:
                ext.extra_objects = list(pool.map(lambda source: self._nvcc(nvcc, flags, source, objects), sources))
            self.force = True  # setuptools would not link again, since it does not look at extra_objects
        super().build_extension(ext)

    def _nvcc(self, nvcc: str, flags: list[str], source: str, objects: Path) -> str:
        target = objects / f"{source}.o"
        inputs = [source, *HEADERS, __file__]
        if not target.exists() or target.stat().st_mtime < max(os.stat(path).st_mtime for path in inputs):
            target.parent.mkdir(parents=True, exist_ok=True)
            print(f"nvcc {source}", flush=True)
            if subprocess.run([nvcc, *flags, "-c", source, "-o", str(target)]).returncode:
                raise CompileError(f"nvcc failed on {source}, see its messages above")
        return str(target)


def extensions() -> list:
    """The CPU extension, and the CUDA one or a line that says why it is not built."""
    common = {"py_limited_api": LIMITED_API, "depends": HEADERS}
    cpu = CppExtension(
        "quantlib._C",
        sorted(["csrc/ops.cpp", *glob("csrc/cpu/*.cpp")]),
        include_dirs=[os.path.abspath("csrc")],
        extra_compile_args=CXX_FLAGS + STABLE_ABI,
        **common,
    )
    home = find_cuda_home()
    build_cuda, reason = decide_cuda(os.environ.get("QUANTLIB_CUDA"), home, torch.version.cuda)
    if not build_cuda:
        print(f"qlora-kernels: building the CPU part only, CUDA kernels are left out: {reason}", file=sys.stderr)
        return [cpu]
    cuda = CppExtension(
        "quantlib._C_cuda",
        ["csrc/cuda/ops.cpp"],
        include_dirs=[os.path.abspath("csrc"), f"{home}/include"],
        extra_compile_args=[*CXX_FLAGS, *STABLE_ABI, "-DUSE_CUDA"],
        library_dirs=[f"{home}/lib64"],
        libraries=["cudart_static", "dl", "rt", "pthread"],
        # libtorch brings libtorch_cuda, which has the current stream; the linker would drop it as unused.
        extra_link_args=["-Wl,--no-as-needed", "-ltorch", "-Wl,--as-needed"],
        **common,
    )
    known = subprocess.run([f"{home}/bin/nvcc", "--list-gpu-code"], check=True, capture_output=True, text=True).stdout
    cuda.cuda_home = home
    cuda.cuda_archs = choose_architectures(os.environ.get("QUANTLIB_CUDA_ARCHS"), known.split())
    cuda.cuda_sources = sorted(glob("csrc/cuda/*.cu"))
    return [cpu, cuda]


if __name__ == "__main__":
    try:
        modules = extensions()
    except ValueError as error:
        sys.exit(f"qlora-kernels: {error}")
    options = {"bdist_wheel": {"py_limited_api": "cp310"}} if LIMITED_API else {}
    setup(ext_modules=modules, cmdclass={"build_ext": Build}, options=options)
