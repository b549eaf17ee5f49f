"""Libraries of the CUDA kernels compiled for the emulator, for fixtures of pytest and for `benchmarks/card.py`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from support.compiled import OBJECTS, compiled, precompiled, unit

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
HERE = ROOT / "tests" / "emulator"
FLAGS = "-std=c++20 -O1 -fPIC -ffp-contract=off -DPEFTCORE_EMULATOR -Wall -Wextra -Werror "
FLAGS += f"-Wno-unknown-pragmas -Wno-unused-parameter -I{HERE} -I{CSRC}"
AVX512 = " -mavx2 -mf16c -mfma -mavx512f -mavx512bw -mavx512vl -mavx512dq"
SIMD = {"avx2": " -mavx2 -mf16c -mfma", "avx512": AVX512, "avx512bf16": AVX512 + " -mavx512bf16"}
# Host files that the operators on CUDA call, next to csrc/*/cuda.
HOST = ("weight/weight", "optim/dynamic8", "optim/rule_table", "optim/paged_state", "optim/pool", "optim/file_store")


def compiler() -> str | None:
    """Return the C++ compiler's command, or None if g++ is not installed."""
    return os.environ.get("CXX") or shutil.which("g++")


def compile_emulated(cxx: str, name: str, sources: Sequence[Path], flags: str, link: str) -> Path:
    """Return the path of a binary of `sources`, in which .cu files are compiled as C++."""

    def flags_of(source: Path) -> list[str]:
        return torch_flags() if source.parent == OBJECTS else SIMD.get(source.stem, "").split()

    return compiled(name, sources, cxx, flags.split(), link.split(), flags_of)


def kernel_sources() -> list[Path]:
    return [*sorted(CSRC.glob("**/*.cu")), HERE / "toys.cu", HERE / "seed.cpp"]


def library_of_kernels(cxx: str) -> Path:
    """Return the path of a library of the kernels in csrc and of the toy kernels."""
    header = precompiled(HERE / "emulator.h", cxx, FLAGS.split())
    return compile_emulated(cxx, "kernels.so", kernel_sources(), f"{FLAGS} -include {header}", "-shared")


def library_of_operators(cxx: str) -> Path:
    """Return the path of a library that, once loaded, runs the operators on CPU tensors by the emulated CUDA kernels.

    It contains csrc/*/cuda/*.cpp with the dispatch key CPU in place of CUDA. Its registrations replace those of the
    extension for the whole process.
    """
    operators = unit("operators_unit", operators_unit())
    header = precompiled(HERE / "emulator.h", cxx, FLAGS.split())
    lib = Path(torch.__file__).parent / "lib"
    link = f"-shared -L{lib} -Wl,--no-as-needed -ltorch -ltorch_cpu -lc10"
    return compile_emulated(cxx, "operators.so", [*kernel_sources(), operators], f"{FLAGS} -include {header}", link)


def torch_flags() -> list[str]:
    """Return the flags of a file that includes PyTorch, which is compiled without optimization: it only launches."""
    base = Path(torch.__file__).parent / "include"
    includes = [f"-isystem{path}" for path in (base, base / "torch" / "csrc" / "api" / "include")]
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
    return ["-O0", "-g0", "-Wno-error", abi, "-DTORCH_ASSERT_ONLY_METHOD_OPERATORS", *includes]


def operators_unit() -> str:
    """Return a C++ file that includes the host files of CUDA's operators.

    Their headers come first, so that the names which stand for CUDA are replaced only in the host files themselves.
    """
    files = [f"{name}.cpp" for name in HOST] + [
        path.relative_to(CSRC).as_posix() for path in sorted(CSRC.glob("*/cuda/*.cpp"))
    ]
    headers = dict.fromkeys(line for file in files for line in _includes(CSRC / file))
    return "\n".join(
        [
            *headers,
            '#include "runtime.h"',
            "#define CUDA CPU",
            "#define kCUDA kCPU",
            "#define pinned_memory(wanted) pinned_memory(false)",
            *(f'#include "{file}"' for file in files),
            "",
        ]
    )


def _includes(path: Path) -> Iterator[str]:
    return (line for line in path.read_text().splitlines() if line.startswith("#include"))
