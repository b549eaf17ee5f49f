"""Build of peftcore/_C, the C++/CUDA extension, with ninja.

The package also installs without the extension: operators then run on their PyTorch references, and `peftcore doctor`
says why. peftcore/_build.json, next to the binary, records what was built.

Environment:
    PEFTCORE_REQUIRE_EXT=1   make a failed build an error (default: a notice); not read when peftcore is imported
    PEFTCORE_CUDA=0|1        leave CUDA out | require it (default: built where nvcc is found)
    PEFTCORE_CUDA_ARCHS      for example "80;90+PTX" (default: those of the GPUs of this machine, or "80;90+PTX")
    PEFTCORE_SANITIZE        for example "address,undefined": instrument the host code
    CXX, NVCC, CUDA_HOME     compilers
    MAX_JOBS                 number of compilations at a time (default: the cores that this process may use)
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


def module_at(path):
    """Load a module from its file without importing its package, because importing peftcore needs PyTorch."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


toolchain = module_at(CSRC / "toolchain.py")
digest = module_at(ROOT / "peftcore" / "ops" / "_sources.py").digest

# Host files of these folders are compiled together, in translation units with these names: PyTorch's headers take five
# seconds per unit, and the files themselves less than one second each. CUDA's host files form a unit of their own.
UNITS = {
    "weight": "linear",
    "gemm": "linear",
    "quant4": "linear",
    "attention": "operators",
    "cross_entropy": "operators",
    "elementwise": "operators",
    "lora": "operators",
    "norms": "operators",
    "grouped": "grouped",
    "optim": "optim",
    "gradients.cpp": "optim",
    "module.cpp": "optim",  # both include pybind11
}


def commit():
    """Return git's description of this checkout, or "unknown" for a source archive (even inside another checkout)."""
    described = (
        toolchain.lines_of(["git", "describe", "--always", "--dirty", "--abbrev=12"], ROOT)[0]
        if (ROOT / ".git").exists()
        else ""
    )
    return described or "unknown"


def run_and_print(command):
    """Run the command and print its output line by line. Return whether it failed, and the lines.

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


def escape(path):
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def quoted(value):
    return shlex.quote(f'-D{value[0]}="{value[1]}"')


def link_flags(system, lib):
    """Return the flags to link a Python module against PyTorch's libraries.

    No rpath is set, since it would tie the binary to one environment: peftcore imports torch, which loads them, first.
    """
    libraries = [f"-L{shlex.quote(str(lib))}", "-ltorch", "-ltorch_cpu", "-lc10"]
    if system == "Darwin":
        return ["-bundle", "-undefined", "dynamic_lookup", *libraries]
    return ["-shared", libraries[0], "-Wl,--no-as-needed", *libraries[1:]]


def unit_of(source):
    """Return the name of the translation unit that includes this file, or None if it is compiled on its own."""
    parts = source.relative_to(CSRC).parts
    if source.suffix == ".cu" or source.stem in {"portable", *toolchain.SIMD}:
        return None
    return "cuda" if "cuda" in parts else UNITS.get(parts[0])


def write_if_changed(path, text):
    """Write the file unless it already has this text, since ninja recompiles files newer than their object."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text() != text:
        path.write_text(text)


class Build:
    """Ninja build of the extension."""

    def __init__(self, output, folder, version):
        self.output, self.folder = output, folder
        self.cxx, self.ninja, self.torch = toolchain.compiler(), toolchain.ninja(), toolchain.torch_facts()
        self.openmp, self.openmp_link, self.openmp_note = toolchain.openmp(
            platform.system(), toolchain.is_clang(self.cxx), self.torch
        )
        self.levels = toolchain.source_levels(platform.machine(), self.cxx)
        self.cuda_wanted = toolchain.flag("PEFTCORE_CUDA")
        self.nvcc = None if self.cuda_wanted is False else toolchain.nvcc()
        if self.cuda_wanted and self.nvcc is None:
            raise SystemExit(
                "PEFTCORE_CUDA=1, but nvcc was not found (tried NVCC, CUDA_HOME, CUDA_PATH, "
                "/usr/local/cuda and PATH). Set CUDA_HOME, or unset PEFTCORE_CUDA"
            )
        mismatch = toolchain.another_cuda(self.nvcc, self.torch["cuda"]) if self.nvcc else None
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
        self.gencode, self.architectures = toolchain.architectures(self.nvcc) if self.nvcc else ([], [])

    def facts(self):
        return {
            "version": self.version,
            "commit": commit(),
            "compiler": toolchain.lines_of([*self.cxx, "--version"])[0],
            "torch": self.torch["version"],
            "cuda_compiler": toolchain.lines_of([self.nvcc, "--version"])[-2:][0] if self.nvcc else "",
            "cuda_architectures": self.architectures,
            "cpu_levels": ["portable", *self.levels],
        }

    def sources(self):
        skip = {level for level in toolchain.SIMD if level not in self.levels}
        for path in sorted(CSRC.rglob("*.cpp")):
            on_cuda = "cuda" in path.relative_to(CSRC).parts
            if path.stem not in skip and (self.nvcc or not on_cuda):
                yield path
        if self.nvcc:
            yield from sorted(CSRC.rglob("*.cu"))

    def translation_units(self):
        """Write the files of shared units. Return all files to compile, CUDA kernels first as they take longest."""
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
            # Ninja does not track PyTorch's headers, so PyTorch's build is part of the command.
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
            # One compiler for all host code. A launcher before it, such as ccache, is not one.
            host = f"-ccbin {self.cxx[0]} " if len(self.cxx) == 1 else ""
            lines += [
                "rule nvcc",
                f"  command = {self.nvcc} {host}-O3 -std=c++17 -lineinfo -Xptxas -v --compiler-options "
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
            if source.stem in toolchain.SIMD:
                lines.append(f"  extra = {' '.join(toolchain.SIMD[source.stem])}")
            elif source.name == "build_facts.cpp":
                lines.append("  extra = " + " ".join(strings).replace("$", "$$"))
        lines.append(f"build {escape(self.output)}: link {' '.join(objects)}")
        lines.append(f"default {escape(self.output)}")
        return "\n".join(lines) + "\n"

    def announcement(self, jobs):
        """Return a line that describes what will be compiled, and how to leave out the optional part."""
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
        """Build the extension and return facts about it. If only CUDA fails and is not required, build without it."""
        facts, sources = self.facts(), digest(CSRC)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "build.ninja").write_text(self.ninja_file(facts))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        jobs = os.environ.get("MAX_JOBS") or str(cores)
        print(self.announcement(jobs), flush=True)
        failed, output = run_and_print([self.ninja, "-C", str(self.folder), "-j", jobs])
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
        raise toolchain.BuildFailed(f"compilation failed:\n{tail}")


class BuildExtension(build_ext):
    def build_extension(self, ext):
        output = Path(self.get_ext_fullpath(ext.name)).resolve()
        output.parent.mkdir(parents=True, exist_ok=True)
        try:
            # Unlike pip's temporary folder, this one is kept, so that ninja only builds what changed.
            kind = [
                sysconfig.get_config_var("SOABI"),
                Path(toolchain.compiler()[0]).name,
                os.environ.get("PEFTCORE_SANITIZE"),
            ]
            folder = ROOT / "build" / "-".join(filter(None, ["ninja", *kind]))
            build = Build(folder / output.name, folder, self.distribution.get_version())
            record = {"built": True} | build.run()
            shutil.copyfile(build.output, output)
        except (toolchain.BuildFailed, OSError) as error:
            if toolchain.flag("PEFTCORE_REQUIRE_EXT"):
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
    # Optional, because the package also installs where no compiler can build the binary.
    ext_modules=[Extension("peftcore._C", sources=[], optional=True)],
    cmdclass={"build_ext": BuildExtension},
)
