"""What the extension is built with on this machine: compilers, ninja, PyTorch, SIMD levels, CUDA architectures."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from pathlib import Path

# SIMD levels, lowest first. A file compiled for a level has the level's name and fills its entries of the table of
# kernels (csrc/cpu/levels.cpp); every other file is built for the plain target.
AVX512 = ["-mavx2", "-mf16c", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SIMD = {
    "avx2": ["-mavx2", "-mf16c", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "neon": [],
    "neonbf16": ["-march=armv8-a+bf16"],
}
# By the names that Python has for the processor.
MACHINES = {
    ("x86_64", "AMD64"): ("avx2", "avx512", "avx512bf16", "amx"),
    ("aarch64", "arm64"): ("neon", "neonbf16"),
}

GPU_QUERY = ["--query-gpu=compute_cap", "--format=csv,noheader"]
# Runs on every GPU that the kernels support: PTX is compiled for later ones when it is loaded.
LOWEST_ARCHITECTURE, DEFAULT_ARCHITECTURES = 80, "80;90+PTX"

# Where Homebrew puts libomp, on Apple silicon and on Intel.
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")


class BuildFailed(Exception):
    """The extension cannot be built; the message says why and what to do."""


def lines_of(command, folder=None):
    """Return the lines of the command's standard output, run in the folder; one empty line if it fails."""
    try:
        return (
            subprocess.run(command, capture_output=True, text=True, cwd=folder, check=True).stdout.strip().split("\n")
        )
    except (OSError, subprocess.CalledProcessError):
        return [""]


def flag(name):
    value = os.environ.get(name, "")
    if value not in ("", "0", "1"):
        raise SystemExit(f"{name} must be 0 or 1, found {value!r}")
    return None if value == "" else value == "1"


def compiler():
    """Return the C++ compiler's command. On Windows and macOS PyTorch uses another C++ library than g++'s."""
    if platform.system() == "Windows":
        raise BuildFailed(
            "it does not build on Windows, where PyTorch is built by MSVC, which cannot compile these kernels. "
            "Try: WSL, in which it builds as on Linux"
        )
    cxx, mac = shlex.split(os.environ.get("CXX", "")), platform.system() == "Darwin"
    for candidate in [cxx] if cxx else [["g++"], ["c++"], ["clang++"]]:
        if not shutil.which(candidate[0]):
            continue
        if mac and not is_clang(candidate):
            raise BuildFailed(f"PyTorch for macOS is built by Clang, and {candidate[0]} is not Clang. Set CXX=clang++")
        return candidate
    wanted = cxx[0] if cxx else "g++, c++ or clang++"
    install = "xcode-select --install" if mac else "apt install g++"
    raise BuildFailed(f"no C++ compiler: {wanted} not found. Try: {install} (or set CXX)")


def is_clang(cxx):
    """Return whether the compiler is Clang, whatever its name: on macOS g++ and c++ are Clang, too."""
    return "clang" in lines_of([*cxx, "--version"])[0].lower()


def ninja():
    try:
        import ninja as package

        return str(Path(package.BIN_DIR) / "ninja")
    except ImportError:
        found = shutil.which("ninja")
        if found is None:
            raise BuildFailed("ninja not found. Try: pip install ninja") from None
        return found


def nvcc():
    wanted = os.environ.get("NVCC")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    for candidate in [wanted] if wanted else [*(f"{home}/bin/nvcc" for home in homes if home), "nvcc"]:
        found = shutil.which(candidate)
        if found:
            return Path(found).resolve()
    return None


def local_architectures(nvcc):
    """Return the architectures of this machine's GPUs as PEFTCORE_CUDA_ARCHS takes them, or the default.

    The default serves GPUs older than the kernels support, which use the references, and those newer than this nvcc.
    """
    found = {line.strip().replace(".", "") for line in lines_of(["nvidia-smi", *GPU_QUERY])}
    known = {line.strip().removeprefix("compute_") for line in lines_of([nvcc, "--list-gpu-arch"])}
    numbers = (number for number in found & known if number.isdigit())
    usable = sorted((number for number in numbers if int(number) >= LOWEST_ARCHITECTURE), key=int)
    return ";".join(f"{number}+PTX" for number in usable) or DEFAULT_ARCHITECTURES


def architectures(nvcc):
    """Return nvcc's -gencode flags and the names of the architectures, from PEFTCORE_CUDA_ARCHS or this machine."""
    flags, names = [], []
    for entry in (os.environ.get("PEFTCORE_CUDA_ARCHS") or local_architectures(nvcc)).split(";"):
        match = re.fullmatch(r"(\d+a?)(\+PTX)?", entry.strip())
        if match is None:
            raise SystemExit(f"PEFTCORE_CUDA_ARCHS must list architectures such as 80 or 90+PTX, found {entry!r}")
        number, ptx = match.groups()
        if int(number.rstrip("a")) < LOWEST_ARCHITECTURE:
            raise SystemExit(
                f"PEFTCORE_CUDA_ARCHS: the kernels need architecture {LOWEST_ARCHITECTURE} or later, found {entry!r}. "
                "Leave it out: earlier GPUs use the references"
            )
        code = f"[sm_{number},compute_{number}]" if ptx else f"sm_{number}"
        flags.append(f"-gencode=arch=compute_{number},code={code}")
        names += [f"sm_{number}"] + ([f"compute_{number}"] if ptx else [])
    return flags, names


def torch_facts():
    try:
        import torch
    except ImportError as error:
        raise BuildFailed(
            f"PyTorch cannot be imported ({error}). Install it, then build with pip install --no-build-isolation ."
        ) from None
    base = Path(torch.__file__).parent
    return {
        "version": torch.__version__,
        "build": f"{torch.__version__} {torch.version.git_version}",
        "include": [base / "include", base / "include" / "torch" / "csrc" / "api" / "include"],
        "lib": base / "lib",
        "abi": int(torch.compiled_with_cxx11_abi()),
        "cuda": torch.version.cuda,
    }


def another_cuda(nvcc, torch_cuda):
    """Return why this nvcc's kernels cannot be used with a PyTorch built with `torch_cuda`, or None.

    The CUDA runtime is linked in: one of a later major version needs a newer driver than PyTorch's, and the process
    would have two. With a PyTorch without CUDA (None) there is nothing to compare.
    """
    found = re.search(r"release (\d+)\.(\d+)", "\n".join(lines_of([nvcc, "--version"])))
    if torch_cuda is None or found is None or found[1] == torch_cuda.split(".")[0]:
        return None
    return (
        f"nvcc is of CUDA {found[1]}.{found[2]}, this PyTorch of CUDA {torch_cuda}: their major versions must be the "
        f"same. Set CUDA_HOME or NVCC to a CUDA {torch_cuda.split('.')[0]}, or install a PyTorch for CUDA {found[1]}"
    )


def source_levels(machine, cxx):
    """Return the processor's levels whose flags the compiler knows: GCC 11 and Clang 12 know all, GCC 10 not AMX."""

    def knows(flags):
        command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    levels = next((levels for machines, levels in MACHINES.items() if machine in machines), ())
    return [level for level in levels if knows(SIMD[level])]


def openmp(system, clang, torch):
    """Return flags to compile and to link with OpenMP, and why there is none (loops then run in one thread), or None.

    It must be the library that PyTorch has loaded, as a second one would start further threads. g++ links to none and
    calls the loaded one. Apple's Clang has no header, and takes the option only behind -Xclang; PyTorch's wheels for
    macOS have the header and the library.
    """
    if system != "Darwin":
        return ["-fopenmp"], ["-fopenmp"] if clang else [], None
    folders = [*torch["include"], *(Path(place) / "include" for place in HOMEBREW)]
    header = next((folder for folder in folders if (folder / "omp.h").exists()), None)
    if header is None or not (torch["lib"] / "libomp.dylib").exists():
        missing = "omp.h" if header is None else f"{torch['lib']}/libomp.dylib"
        return [], [], f"{missing} was not found. Try: brew install libomp, with PyTorch's own wheel, and build again"
    return ["-Xclang", "-fopenmp", f"-isystem {shlex.quote(str(header))}"], ["-lomp"], None
