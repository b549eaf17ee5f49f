"""Builds peftcore/_C, the C++/CUDA extension, with ninja.

The package installs without it too: then the operators run on their PyTorch references, and `peftcore doctor` says
why. What happened is recorded in peftcore/_build.json, beside the binary.

Environment:
    PEFTCORE_REQUIRE_EXT=1   a failed build is an error (default: a notice)
    PEFTCORE_CUDA=0|1        leave CUDA out | demand it (default: when nvcc is there)
    PEFTCORE_CUDA_ARCHS      default "80;90+PTX"
    PEFTCORE_SANITIZE        for example "address,undefined": instrument the host code
    CXX, NVCC, CUDA_HOME     which compilers
    MAX_JOBS                 compilations at once
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

# SIMD levels, lowest first. A file compiled for one carries its name and fills its entries of the table of kernels
# (csrc/cpu/levels.cpp); every other file is built for the plain target.
AVX512 = ["-mavx2", "-mf16c", "-mfma", "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq"]
SIMD = {
    "avx2": ["-mavx2", "-mf16c", "-mfma"],
    "avx512": AVX512,
    "avx512bf16": [*AVX512, "-mavx512bf16"],
    "amx": [*AVX512, "-mavx512bf16", "-mamx-tile", "-mamx-bf16"],
    "neon": [],
    "neonbf16": ["-march=armv8-a+bf16"],
}
# By what Python calls the processor.
MACHINES = {
    ("x86_64", "AMD64"): ("avx2", "avx512", "avx512bf16", "amx"),
    ("aarch64", "arm64"): ("neon", "neonbf16"),
}


# Where Homebrew puts libomp, on Apple silicon and on Intel.
HOMEBREW = ("/opt/homebrew/opt/libomp", "/usr/local/opt/libomp")


class BuildFailed(Exception):
    """The extension cannot be built; the message says why and what to do."""


def digest(csrc):
    """`peftcore.ops._sources.digest`, without importing the package, which needs PyTorch."""
    spec = importlib.util.spec_from_file_location("sources", ROOT / "peftcore" / "ops" / "_sources.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.digest(csrc)


def lines_of(command):
    """Standard output, or nothing when the command is not there or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=True).stdout.strip().split("\n")
    except (OSError, subprocess.CalledProcessError):
        return [""]


def commit():
    """Of this checkout; a source archive may lie in a checkout of something else."""
    described = (
        lines_of(["git", "describe", "--always", "--dirty", "--abbrev=12"])[0] if (ROOT / ".git").exists() else ""
    )
    return described or "unknown"


def followed(command):
    """Run the command and print its output line by line; return whether it failed, and the lines.

    What nvcc reports of registers and shared memory is left out.
    """
    lines, of_ptxas = [], re.compile(r"ptxas info|\s+\d+ bytes stack frame")
    status = {"NINJA_STATUS": "[%f/%t, %es] ", **os.environ}
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
    """Its command. On Windows and macOS PyTorch has another C++ library than g++'s."""
    if platform.system() == "Windows":
        raise BuildFailed(
            "it does not build on Windows, where PyTorch is built by MSVC, which does not know these kernels. "
            "Try: WSL, in which it builds as on Linux"
        )
    cxx, mac = shlex.split(os.environ.get("CXX", "")), platform.system() == "Darwin"
    for candidate in [cxx] if cxx else [["g++"], ["c++"], ["clang++"]]:
        if not shutil.which(candidate[0]):
            continue
        if mac and not is_clang(candidate):
            raise BuildFailed(f"PyTorch for macOS is built by Clang, and {candidate[0]} is another. Set CXX=clang++")
        return candidate
    wanted = cxx[0] if cxx else "g++, c++ or clang++"
    install = "xcode-select --install" if mac else "apt install g++"
    raise BuildFailed(f"no C++ compiler: {wanted} not found. Try: {install} (or set CXX)")


def is_clang(cxx):
    """Whatever its name: on macOS g++ and c++ are Clang, too."""
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


def architectures():
    """-gencode flags and names, from "80;90+PTX"."""
    flags, names = [], []
    for entry in os.environ.get("PEFTCORE_CUDA_ARCHS", "80;90+PTX").split(";"):
        match = re.fullmatch(r"(\d+a?)(\+PTX)?", entry.strip())
        if match is None:
            raise SystemExit(f"PEFTCORE_CUDA_ARCHS: {entry!r} is no architecture such as 80 or 90+PTX")
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
        "include": [base / "include", base / "include" / "torch" / "csrc" / "api" / "include"],
        "lib": base / "lib",
        "abi": int(torch.compiled_with_cxx11_abi()),
        "cuda": torch.version.cuda,
    }


def another_cuda(nvcc, torch_cuda):
    """Why kernels of this nvcc do not belong beside a PyTorch built with `torch_cuda`, or None.

    The CUDA runtime is linked in; one of a later major version wants a newer driver than PyTorch's, and the process
    would have two. A PyTorch without CUDA (None) has none to be compared with.
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
    """Of this kind of processor, those whose flags the compiler knows: GCC 11 and Clang 12 know all, GCC 10 no AMX."""

    def knows(flags):
        command = [*cxx, *flags, "-fsyntax-only", "-x", "c++", os.devnull]
        return subprocess.run(command, capture_output=True).returncode == 0

    levels = next((levels for machines, levels in MACHINES.items() if machine in machines), ())
    return [level for level in levels if knows(SIMD[level])]


def openmp(system, clang, torch):
    """Flags to compile and to link with OpenMP, and why there is none, or None: then loops run in one thread.

    It must be the one that PyTorch has loaded, as a second would have threads of its own. g++ calls what is there.
    Apple's Clang has no header, and knows the option only inside; PyTorch's wheels for macOS have the header and the
    library.
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
    """Of a Python module beside PyTorch's libraries, which are loaded before it.

    A relative rpath would tie the binary to one environment; peftcore imports torch first instead.
    """
    libraries = [f"-L{shlex.quote(str(lib))}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "Darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", libraries[0], "-Wl,--no-as-needed", *libraries[1:]]


class Build:
    """One ninja build: what goes in, where it goes, and what to record of it."""

    def __init__(self, output, folder, version):
        self.output, self.folder = output, folder
        self.cxx, self.ninja, self.torch = compiler(), ninja(), torch_facts()
        self.openmp, self.openmp_link, self.openmp_note = openmp(platform.system(), is_clang(self.cxx), self.torch)
        self.levels = source_levels(platform.machine(), self.cxx)
        self.cuda_wanted = flag("PEFTCORE_CUDA")
        self.nvcc = None if self.cuda_wanted is False else nvcc()
        if self.cuda_wanted and self.nvcc is None:
            raise SystemExit(
                "PEFTCORE_CUDA=1, but nvcc was not found (looked at NVCC, CUDA_HOME, CUDA_PATH, "
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

    def facts(self):
        return {
            "version": self.version,
            "commit": commit(),
            "compiler": lines_of([*self.cxx, "--version"])[0],
            "torch": self.torch["version"],
            "cuda_compiler": lines_of([self.nvcc, "--version"])[-2:][0] if self.nvcc else "",
            "cuda_architectures": architectures()[1] if self.nvcc else [],
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
            "  description = C++ $in",
            "rule link",
            f"  command = $cxx $in -o $out {instrument} {' '.join(link)}",
            "  description = link $out",
        ]
        if self.nvcc:
            lines += [
                "rule nvcc",
                f"  command = {self.nvcc} -O3 -std=c++17 -lineinfo -Xptxas -v --compiler-options "
                f"-fPIC,-fvisibility=hidden {' '.join(architectures()[0])} -I{CSRC} -MD -MF $out.d -c $in -o $out",
                "  deps = gcc",
                "  depfile = $out.d",
                "  description = CUDA $in",
            ]
        objects = []
        for source in self.sources():
            target = escape(self.folder / source.relative_to(ROOT)) + ".o"
            objects.append(target)
            lines.append(f"build {target}: {'nvcc' if source.suffix == '.cu' else 'cxx'} {escape(source)}")
            if source.stem in SIMD:
                lines.append(f"  extra = {' '.join(SIMD[source.stem])}")
            elif source.name == "build_facts.cpp":
                lines.append("  extra = " + " ".join(strings).replace("$", "$$"))
        lines.append(f"build {escape(self.output)}: link {' '.join(objects)}")
        lines.append(f"default {escape(self.output)}")
        return "\n".join(lines) + "\n"

    def announcement(self, jobs):
        """Say what is about to be compiled, and which part is optional."""
        count = sum(1 for _ in self.sources())
        kernels = ", ".join(["portable", *self.levels])
        optional = (
            f"CUDA kernels for {', '.join(architectures()[1])} are optional: PEFTCORE_CUDA=0 leaves them out"
            if self.nvcc
            else f"no CUDA kernels: {self.cuda_note}"
        )
        return f"compiling up to {count} files, {jobs} at a time: CPU kernels ({kernels}); {optional}"

    def run(self):
        """Builds; returns the facts. Without CUDA if only that part fails and it was not demanded."""
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
            self.nvcc, self.cuda_note = None, f"the CUDA kernels did not compile:\n{tail}"
            return self.run()
        raise BuildFailed(f"compilation failed:\n{tail}")


class BuildExtension(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Not pip's temporary folder: ninja builds what changed. One for each kind of build.
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
                "Operators run on their PyTorch references: right, but slower. See: peftcore doctor\n",
                file=sys.stderr,
                flush=True,
            )
        (output.parent / RECORD).write_text(json.dumps(record, indent=2) + "\n")

    def copy_extensions_to_source(self):
        """In place (editable) installs: the binary and its record go beside the sources."""
        super().copy_extensions_to_source()
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            if not built.exists():
                (ROOT / "peftcore" / built.name).unlink(missing_ok=True)
            shutil.copyfile(built.parent / RECORD, ROOT / "peftcore" / RECORD)


setup(
    # Optional: setuptools must not insist on a file that no compiler made.
    ext_modules=[Extension("peftcore._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
