"""The extension as a binary: its facts, its SIMD levels, and life without it."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.setup_file import setup_file

import peftcore
from peftcore import ops
from peftcore.ops import _extension
from peftcore.ops._sources import digest
from peftcore.ops.build_info import build_info

ROOT = Path(peftcore.__file__).parents[1]
setup = setup_file()
needs_extension = pytest.mark.skipif(ops.extension is None, reason=f"no _C: {_extension.missing_because}")

ROUND_TRIP = """
import torch
from peftcore import ops
from peftcore.ops.build_info import build_info
x = torch.arange(-100, 100).view(10, 20) / 7
y = ops.dequantize_4bit(ops.quantize_4bit(x))
assert (x - y).abs().max() < 0.16 * x.abs().max()
print(build_info().cpu_level, build_info().missing_because, y.sum().item(), sep="|")
"""


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env={**os.environ, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


@needs_extension
def test_facts():
    info = build_info()
    assert info.available and not info.missing_because
    assert info.compiler and info.commit and info.version
    assert _extension.minor_version(info.torch_built_with) == _extension.minor_version(torch.__version__)
    assert info.compiled_cpu_levels[0] == "portable" and info.cpu_level in info.cpu_levels
    assert set(info.cpu_levels) <= set(info.compiled_cpu_levels)
    assert bool(info.cuda_architectures) != bool(info.cuda_missing_because)


@needs_extension
def test_a_level_is_chosen_by_name():
    before = ops.extension.cpu_level()
    with pytest.raises(ValueError, match=r"no CPU level 'avx3'.*available: portable"):
        ops.extension.set_cpu_level("avx3")
    assert ops.extension.cpu_level() == before
    ops.extension.set_cpu_level("portable")
    assert ops.extension.cpu_level() == "portable"
    ops.extension.set_cpu_level(before)


@needs_extension
def test_the_environment_chooses_a_level():
    done = python(ROUND_TRIP, PEFTCORE_CPU_LEVEL="portable")
    assert done.stdout.startswith("portable||"), done.stderr
    done = python("import peftcore.ops; print('imported')", PEFTCORE_CPU_LEVEL="fast")
    assert done.stdout == "" and re.search(
        "ValueError: invalid PEFTCORE_CPU_LEVEL: no CPU level 'fast' in this build.*available: portable.*unset it",
        done.stderr,
    )
    assert "Rebuild" not in done.stderr


def with_kernels_of(path):
    """Text of a .cu file and the .cuh files that it includes."""
    text = path.read_text()
    included = re.findall(r'#include "(.*\.cuh)"', text)
    return "".join([text, *(with_kernels_of(ROOT / "csrc" / name) for name in included)])


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])  # that of a build by default, and of an H100
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").rglob("*.cu")), ids=lambda path: path.name)
def test_cuda_kernels_do_not_spill(source, architecture, tmp_path):
    flags = ["-O3", "-std=c++17", f"-arch={architecture}", "-cubin", "-Xptxas", "-v", f"-I{ROOT / 'csrc'}"]
    done = subprocess.run(["nvcc", *flags, str(source), "-o", str(tmp_path / "out")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    spills = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert bool(spills) == ("__global__" in with_kernels_of(source))
    assert set(spills) <= {("0", "0", "0")}, done.stderr


def test_without_the_extension_references_give_the_same_values():
    without = python(ROUND_TRIP, PEFTCORE_EXT="0")
    assert without.stdout.startswith("reference|switched off by PEFTCORE_EXT=0|"), without.stderr
    x = torch.arange(-100, 100).view(10, 20) / 7
    assert float(without.stdout.split("|")[-1]) == ops.dequantize_4bit(ops.quantize_4bit(x)).sum().item()


@pytest.mark.nightly
def test_operators_pass_opcheck_and_refuse_lost_gradients_without_the_extension():
    tests = [str(ROOT / "tests" / "ops" / name) for name in ("test_quant4_calls.py", "test_gradients_of_operators.py")]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, "-k", "opcheck or gradients_of_operators"],
        env={**os.environ, "PEFTCORE_EXT": "0"},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    ("record", "reason", "warned"),
    [
        ({}, "has not been built here. Build it: .*pip install", False),
        ({"built": False, "reason": "no C++ compiler: g++ not found"}, "not built: no C\\+\\+ compiler", False),
        (
            {"built": True, "torch": "1.13.1+cu117"},
            "built with PyTorch 1.13.1\\+cu117, but this is PyTorch .* Rebuild",
            True,
        ),
    ],
)
def test_a_build_that_does_not_fit_is_not_loaded(record, reason, warned):
    if warned:
        with pytest.warns(RuntimeWarning, match=f"without its compiled extension: it was {reason}"):
            module, why = _extension.load(record)
    else:
        module, why = _extension.load(record)
    assert module is None and re.search(reason, why)


def test_a_patch_release_of_pytorch_fits():
    record = {"built": True, "torch": "2.13.0+cpu", "sources": digest(ROOT / "csrc")}
    assert _extension.reason_not_to_load(record, "2.13.1+cu130") == ("", False)
    assert _extension.reason_not_to_load(record, "2.14.0")[1]


def test_a_changed_source_makes_the_binary_a_stale_one(tmp_path):
    (tmp_path / "cpu").mkdir()
    source = tmp_path / "cpu" / "product.cpp"
    source.write_text("int a;")
    record = {"built": True, "torch": torch.__version__, "sources": digest(tmp_path)}
    assert _extension.reason_not_to_load(record, csrc=tmp_path) == ("", False)
    without = {name: value for name, value in record.items() if name != "sources"}  # of an older build
    for stale in (without, {**record, "sources": "0" * 16}):
        reason, warned = _extension.reason_not_to_load(stale, csrc=tmp_path)
        assert warned and re.search("it was not built from the current sources in .* Rebuild it", reason)
    (tmp_path / "notes.md").write_text("no source")
    assert _extension.reason_not_to_load(record, csrc=tmp_path) == ("", False)
    source.write_text("int b;")
    assert "not built from the current sources" in _extension.reason_not_to_load(record, csrc=tmp_path)[0]
    source.write_text("int a;")
    source.rename(tmp_path / "cpu" / "products.cpp")
    assert "not built from the current sources" in _extension.reason_not_to_load(record, csrc=tmp_path)[0]
    assert _extension.reason_not_to_load(record, csrc=None) == ("", False)  # a wheel comes without sources


def test_anothers_csrc_in_site_packages_is_not_ours(tmp_path):
    (tmp_path / "csrc").mkdir()
    (tmp_path / "csrc" / "other.cpp").write_text("int a;")
    assert _extension.sources_of_checkout(tmp_path) is None
    assert "--no-binary peftcore peftcore==" in _extension.build_command(None)
    (tmp_path / "setup.py").touch()
    assert _extension.sources_of_checkout(tmp_path) == tmp_path / "csrc"


@needs_extension
def test_there_is_one_openmp_in_a_process():
    """PyTorch's own: a wheel would bring a second of any that the extension names."""
    binary = Path(importlib.import_module("peftcore._C").__file__).read_bytes()
    assert b"GOMP_parallel" in binary or "clang" in build_info().compiler
    assert b"libgomp" not in binary or "clang" in build_info().compiler


@needs_extension
def test_an_operator_whose_kernel_takes_other_arguments_says_rebuild():
    """A schema that was changed on the Python side alone: known at import, by PyTorch's own comparison."""
    code = """
import pathlib, sys, types
source = pathlib.Path("peftcore/ops/linear_4bit.py").read_text()
assert source.count("Tensor? bias") >= 1
changed = source.replace("Tensor? bias", "int bias")
module = types.ModuleType("peftcore.ops.linear_4bit")
import importlib.abc, importlib.machinery, importlib.util
class Changed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name, path, target=None):
        return importlib.util.spec_from_loader(name, self) if name == "peftcore.ops.linear_4bit" else None
    def exec_module(self, module):
        exec(compile(changed, "linear_4bit.py", "exec"), vars(module))
sys.meta_path.insert(0, Changed())
import peftcore.ops
"""
    done = python(code)
    assert "the compiled extension belongs to another version: its 'linear_4bit" in done.stderr, done.stderr
    assert "Rebuild it: " in done.stderr


def test_an_extension_that_does_not_load_is_reported(monkeypatch):
    def broken(name):
        raise ImportError("undefined symbol: _ZN2at5emptyE")

    monkeypatch.setattr(_extension.importlib, "import_module", broken)
    with pytest.warns(RuntimeWarning, match="it failed to load: undefined symbol.*Rebuild"):
        module, why = _extension.load({"built": True, "torch": torch.__version__, "sources": digest(ROOT / "csrc")})
    assert module is None and "undefined symbol" in why


def test_a_damaged_record_counts_as_none(tmp_path):
    path = tmp_path / "_build.json"
    assert _extension.read_record(path) == {}
    for text in ("{", "[1]", "\x00"):
        path.write_text(text)
        assert _extension.read_record(path) == {}


def test_doctor_reports_what_is_missing_and_what_it_costs(monkeypatch):
    monkeypatch.setattr(_extension, "extension", None)
    monkeypatch.setattr(_extension, "missing_because", "it was not built: no C++ compiler")
    info = build_info()
    assert not info.available and info.cpu_level == "reference"
    assert "no C++ compiler" in info.missing_because and "slower" in info.costs[0]


# --- setup.py ------------------------------------------------------------


def build(tmp_path, **environment):
    """build_ext into a folder of its own; returns the process and the record."""
    inherited = {name: value for name, value in os.environ.items() if name != "PEFTCORE_REQUIRE_EXT"}  # CI sets it
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path)],
        env={**inherited, **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    path = tmp_path / "peftcore" / "_build.json"
    return done, json.loads(path.read_text()) if path.exists() else None


def test_without_a_compiler_the_package_installs_and_says_why(tmp_path):
    done, record = build(tmp_path, CXX="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert record["built"] is False and "no-such-compiler not found" in record["reason"]
    assert "installed WITHOUT its compiled extension" in done.stderr
    assert not list(tmp_path.rglob("_C*"))


def test_a_demanded_build_that_fails_is_an_error(tmp_path):
    done, record = build(tmp_path, CXX="false", PEFTCORE_CUDA="0", PEFTCORE_REQUIRE_EXT="1")
    assert done.returncode != 0 and record is None
    assert "PEFTCORE_REQUIRE_EXT=1, but the extension was not built: compilation failed" in done.stderr


def test_cuda_demanded_without_nvcc_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCORE_CUDA", "1")
    monkeypatch.setenv("NVCC", "no-such-nvcc")
    with pytest.raises(SystemExit, match="PEFTCORE_CUDA=1, but nvcc was not found"):
        setup.Build(tmp_path / "_C.so", tmp_path, "0.1.0")


def test_a_switch_that_is_neither_0_nor_1_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCORE_CUDA", "yes")
    with pytest.raises(SystemExit, match="PEFTCORE_CUDA must be 0 or 1, found 'yes'"):
        setup.Build(tmp_path / "_C.so", tmp_path, "0.1.0")


def test_nvcc_and_pytorch_of_two_cuda_majors_are_not_mixed(tmp_path, monkeypatch):
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 13.0, V13.0.48'\n[ $1 = --version ]\n")
    nvcc.chmod(0o755)
    monkeypatch.setenv("NVCC", str(nvcc))
    monkeypatch.setenv("PEFTCORE_CUDA", "1")
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert setup.Build(tmp_path / "_C.so", tmp_path, "0.1.0").nvcc == nvcc
    monkeypatch.setattr(torch.version, "cuda", "12.6")
    with pytest.raises(SystemExit, match=r"PEFTCORE_CUDA=1, but nvcc is of CUDA 13\.0, this PyTorch of CUDA 12\.6"):
        setup.Build(tmp_path / "_C.so", tmp_path, "0.1.0")
    monkeypatch.delenv("PEFTCORE_CUDA")
    build = setup.Build(tmp_path / "_C.so", tmp_path, "0.1.0")
    assert build.nvcc is None and "this PyTorch of CUDA 12.6" in build.cuda_note
