"""Build of peftcore/_C, the C++/CUDA extension, with ninja.

The package also installs without the extension: operators then run on their PyTorch references, and `peftcore doctor`
says why. peftcore/_build.json, next to the binary, records what was built.

Environment:
    PEFTCORE_REQUIRE_EXT=1   make a failed build an error (default: a notice)
    PEFTCORE_CUDA=0|1        leave CUDA out | require it (default: built where nvcc is found)
    PEFTCORE_CUDA_ARCHS      for example "80;90+PTX" (default: those of the GPUs of this machine, or "80+PTX")
    PEFTCORE_SANITIZE        for example "address,undefined": instrument the host code
    CXX, NVCC, CUDA_HOME     compilers
    MAX_JOBS                 number of compilations at a time
"""

import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
RECORD = "_build.json"

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

# Host files of these folders are compiled together, as translation units of these names: PyTorch's headers take five
# seconds of each unit that includes them, and the files themselves less than one each. CUDA's host files are one unit.
UNITS = {
    "weight": "linear",
    "gemm": "linear",
    "quant4": "linear",
    "lora": "lora",
    "grouped": "grouped",
    "optim": "optim",
    "module.cpp": "optim",  # both include pybind11
}

GPU_QUERY = ["--query-gpu=compute_cap", "--format=csv,noheader"]
# Runs on every GPU that the kernels support: PTX is compiled for later ones when it is loaded.
DEFAULT_ARCHITECTURE = "80+PTX"

# Where Homebrew puts libomp, on Apple silicon and on Intel.
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")


class BuildFailed(Exception):
    """The extension cannot be built; the message says why and what to do."""


def digest(csrc):
    """Return `peftcore.ops._sources.digest(csrc)` without importing the package, which needs PyTorch."""
    spec = importlib.util.spec_from_file_location("sources", ROOT / "peftcore" / "ops" / "_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(csrc)


def lines_of(command):
    """Return the lines of the command's standard output; one empty line if it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip().split("\n")
    except (OSError, subprocess.CalledProcessError):
        return [""]


def commit():
    """Return git's description of this checkout; a source archive may be inside a checkout of another project."""
    described = (
        lines_of(["git", "describe", "--always", "--dirty", "--abbrev=12"])[0] if (ROOT / ".git").exists() else ""
    )
    return described or "unknown"


def followed(command):
    """Run the command and print its output line by line; return whether it failed, and the lines.

    nvcc's reports of registers and shared memory are not printed.
    """
    lines, of_ptxas = [], re.compile(r"ptxas info|\s+\d+ bytes stack frame")
    status = {"NINJA_STATUS": "[%f/%t] ", **os.environ}
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=status
    ) as running:
        for line in running.stdout:
            lines.append(line.rstrip())
            if not of_ptxas.match(line):
                print(lines[-1], flush=True)
    return running.returncode != 0, lines


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
    usable = sorted((number for number in found & known if number.isdigit() and int(number) >= 80), key=int)
    return ";".join(f"{number}+PTX" for number in usable) or DEFAULT_ARCHITECTURE


def architectures(nvcc):
    """Return nvcc's -gencode flags and the names of the architectures, from PEFTCORE_CUDA_ARCHS or this machine."""
    flags, names = [], []
    for entry in (os.environ.get("PEFTCORE_CUDA_ARCHS") or local_architectures(nvcc)).split(";"):
        match = re.fullmatch(r"(\d+a?)(\+PTX)?", entry.strip())
        if match is None:
            raise SystemExit(f"PEFTCORE_CUDA_ARCHS must list architectures such as 80 or 90+PTX, found {entry!r}")
        number, ptx = match.groups()
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


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(value):
    return shlex.quote(f'-D{value[0]}="{value[1]}"')


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


def link_flags(system, lib):
    """Return the flags to link a Python module that uses PyTorch's libraries, which are loaded before it.

    A relative rpath would tie the binary to one environment; peftcore imports torch first instead.
    """
    libraries = [f"-L{shlex.quote(str(lib))}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "Darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", libraries[0], "-Wl,--no-as-needed", *libraries[1:]]


def unit_of(source):
    """Return the name of the translation unit that includes this host file of csrc, or None if it is its own."""
    parts = source.relative_to(CSRC).parts
    if source.suffix == ".cu" or source.stem in {"portable", *SIMD}:
        return None
    return "cuda" if "cuda" in parts else UNITS.get(parts[0])


def write_if_changed(path, text):
    """Write the file, unless it has this text already: ninja compiles what is newer than its object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Build:
    """Ninja build of the extension: its sources, where the binary goes, and what to record about it."""

    def __init__(self, output, folder, version):
        self.output, self.folder = output, folder
        self.cxx, self.ninja, self.torch = compiler(), ninja(), torch_facts()
        self.openmp, self.openmp_link, self.openmp_note = openmp(platform.system(), is_clang(self.cxx), self.torch)
        self.levels = source_levels(platform.machine(), self.cxx)
        self.cuda_wanted = flag("PEFTCORE_CUDA")
        self.nvcc = None if self.cuda_wanted is False else nvcc()
        if self.cuda_wanted and self.nvcc is None:
            raise SystemExit(
                "PEFTCORE_CUDA=1, but nvcc was not found (tried NVCC, CUDA_HOME, CUDA_PATH, "
                "/usr/local/cuda and PATH). Set CUDA_HOME, or unset PEFTCORE_CUDA"
            )
        mismatch = another_cuda(self.nvcc, self.torch["cuda"]) if self.nvcc else None
        if mismatch is not None:
            if self.cuda_wanted:
                raise SystemExit(f"PEFTCORE_CUDA=1, but {mismatch}")
            self.nvcc = None
        self.cuda_note = (
            None
            if self.nvcc
            else mismatch or ("switched off by PEFTCORE_CUDA=0" if self.cuda_wanted is False else "nvcc was not found")
        )
        self.version = version
        self.gencode, self.architectures = architectures(self.nvcc) if self.nvcc else ([], [])

    def facts(self):
        return {
            "version": self.version,
            "commit": commit(),
            "compiler": lines_of([*self.cxx, "--version"])[0],
            "torch": self.torch["version"],
            "cuda_compiler": lines_of([self.nvcc, "--version"])[-2:][0] if self.nvcc else "",
            "cuda_architectures": self.architectures,
            "cpu_levels": ["portable", *self.levels],
        }

    def sources(self):
        skip = {level for level in SIMD if level not in self.levels}
        for path in sorted(CSRC.rglob("*.cpp")):
            on_cuda = "cuda" in path.relative_to(CSRC).parts
            if path.stem not in skip and (self.nvcc or not on_cuda):
                yield path
        if self.nvcc:
            yield from sorted(CSRC.rglob("*.cu"))

    def translation_units(self):
        """Return the files to compile: CUDA kernels, which take longest, first. Files that share a unit are written."""
        alone, together = [], {}
        for source in self.sources():
            unit = unit_of(source)
            if unit is None:
                alone.append(source)
            else:
                together.setdefault(unit, []).append(source.relative_to(CSRC).as_posix())
        for unit, sources in together.items():
            path = self.folder / "csrc" / f"{unit}_unit.cpp"
            write_if_changed(path, "".join(f'#include "{source}"\n' for source in sources))
            alone.append(path)
        return sorted(alone, key=lambda path: (path.suffix != ".cu", path.parent != self.folder / "csrc", path))

    def ninja_file(self, facts):
        import pybind11

        sanitize = os.environ.get("PEFTCORE_SANITIZE", "")
        instrument = f"-fsanitize={sanitize} -fno-omit-frame-pointer -g1 -O1" if sanitize else ""
        includes = [CSRC, *self.torch["include"], pybind11.get_include(), sysconfig.get_path("include")]
        defines = [f"-DPEFTCORE_HAVE_{level.upper()}" for level in self.levels]
        common = [
            "-O3",
            "-fPIC",
            "-std=c++20",
            "-fvisibility=hidden",
            *self.openmp,
            "-ffp-contract=off",
            "-Wall",
            "-Wextra",
            "-Wno-unused-parameter",
            f"-D_GLIBCXX_USE_CXX11_ABI={self.torch['abi']}",
            "-DTORCH_ASSERT_ONLY_METHOD_OPERATORS",
            # PyTorch's headers are not among the dependencies that ninja knows: another PyTorch is another command.
            quoted(("PEFTCORE_TORCH_BUILD", self.torch["build"])).replace("$", "$$"),
            *defines,
            f"-I{includes[0]}",
            *(f"-isystem {shlex.quote(str(path))}" for path in includes[1:]),
        ]
        strings = [
            quoted(
                (
                    "PEFTCORE_" + key.upper().replace("CUDA_COMPILER", "NVCC"),
                    ",".join(value) if isinstance(value, list) else value,
                )
            )
            for key, value in facts.items()
        ]
        link = [*link_flags(platform.system(), self.torch["lib"]), *self.openmp_link]
        if self.nvcc:
            home = self.nvcc.parent.parent
            link += [f"-L{home}/lib64", f"-L{home}/lib", "-lcudart_static", "-ldl", "-lrt", "-lpthread"]
        lines = [
            "ninja_required_version = 1.5",
            f"cxx = {shlex.join(self.cxx)}",
            f"cflags = {' '.join(common)} {instrument}",
            "rule cxx",
            "  command = $cxx $cflags $extra -MMD -MF $out.d -c $in -o $out",
            "  deps = gcc",
            "  depfile = $out.d",
            "  description = $name",
            "rule link",
            f"  command = $cxx $in -o $out {instrument} {' '.join(link)}",
            "  description = linking",
        ]
        if self.nvcc:
            lines += [
                "rule nvcc",
                f"  command = {self.nvcc} -O3 -std=c++17 -lineinfo -Xptxas -v --compiler-options "
                f"-fPIC,-fvisibility=hidden {' '.join(self.gencode)} -I{CSRC} -MD -MF $out.d -c $in -o $out",
                "  deps = gcc",
                "  depfile = $out.d",
                "  description = $name",
            ]
        objects = []
        for source in self.translation_units():
            shared = source.is_relative_to(self.folder)
            name = source.relative_to(self.folder if shared else ROOT)
            target = escape(self.folder / name) + ".o"
            objects.append(target)
            lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
            lines.append(f"  name = {name}")
            if source.stem in SIMD:
                lines.append(f"  extra = {' '.join(SIMD[source.stem])}")
            elif source.name == "build_facts.cpp":
                lines.append("  extra = " + " ".join(strings).replace("$", "$$"))
        lines.append(f"build {escape(self.output)}: link {' '.join(objects)}")
        lines.append(f"default {escape(self.output)}")
        return "\n".join(lines) + "\n"

    def announcement(self, jobs):
        """Return a line that says what is about to be compiled, which part is optional, and how to leave it out."""
        count = len(self.translation_units())
        kernels = ", ".join(["portable", *self.levels])
        optional = (
            f"with CUDA kernels for {', '.join(self.architectures)}, half of the time "
            "(to leave them out: PEFTCORE_CUDA=0; for other GPUs: PEFTCORE_CUDA_ARCHS)"
            if self.nvcc
            else f"without CUDA kernels: {self.cuda_note}"
        )
        return f"compiling up to {count} files, {jobs} at a time: CPU kernels ({kernels}), {optional}"

    def run(self):
        """Build and return the facts; without CUDA if only the CUDA part fails and it was not required."""
        facts, sources = self.facts(), digest(CSRC)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.ninja_file(facts))
        jobs = os.environ.get("MAX_JOBS") or str(os.cpu_count() or 1)
        print(self.announcement(jobs), flush=True)
        failed, output = followed([self.ninja, "-C", str(self.folder), "-j", jobs])
        if not failed:
            if self.openmp_note:
                print(f"peftcore's kernels run in one thread: {self.openmp_note}", file=sys.stderr, flush=True)
            return facts | {"cuda_note": self.cuda_note, "openmp_note": self.openmp_note, "sources": sources}
        tail = "\n".join(output[-30:])
        if self.nvcc and not self.cuda_wanted and any(".cu.o" in line for line in output):
            print("the CUDA kernels do not compile; building without them", file=sys.stderr)
            self.gencode, self.architectures = [], []
            self.nvcc, self.cuda_note = None, f"the CUDA kernels did not compile:\n{tail}"
            return self.run()
        raise BuildFailed(f"compilation failed:\n{tail}")


class BuildExtension(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Kept, unlike pip's temporary folder, so that ninja builds what changed: one folder for each kind of build.
            kind = [sysconfig.get_config_var("SOABI"), Path(compiler()[0]).name, os.environ.get("PEFTCORE_SANITIZE")]
            folder = ROOT / "build" / "-".join(filter(None, ["ninja", *kind]))
            build = Build(folder / output.name, folder, self.distribution.get_version())
            record = {"built": True} | build.run()
            shutil.copyfile(build.output, output)
        except (BuildFailed, OSError) as error:
            if flag("PEFTCORE_REQUIRE_EXT"):
                raise SystemExit(f"PEFTCORE_REQUIRE_EXT=1, but the extension was not built: {error}") from None
            output.unlink(missing_ok=True)
            record = {"built": False, "reason": str(error)}
            print(
                f"\npeftcore is installed WITHOUT its compiled extension: {error}\n"
                "Operators run on their PyTorch references: the same results, slower. See: peftcore doctor\n",
                file=sys.stderr,
                flush=True,
            )
        (output.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self):
        """Copy the binary and its record next to the sources, for in-place (editable) installs."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if not built.exists():
                (ROOT / "peftcore" / built.name).unlink(missing_ok=True)
            shutil.copyfile(built.parent / RECORD, ROOT / "peftcore" / RECORD)


setup(
    # Optional: setuptools must not require the binary where no compiler built it.
    ext_modules=[Extension("peftcore._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
