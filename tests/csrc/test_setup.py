"""Functions of setup.py: its choices on other systems and processors than this one, and what it compiles."""

import re
import shutil
from pathlib import Path

import pytest
from support.levels import LEVELS_OF
from support.setup_file import setup_file

setup = setup_file()
toolchain = setup.toolchain


def program(folder: Path, name: str, says: str) -> str:
    path = folder / name
    path.write_text(f"#!/bin/sh\necho '{says}'\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize(
    ("machine", "kind"),
    [("x86_64", "x86-64"), ("AMD64", "x86-64"), ("aarch64", "64-bit ARM"), ("arm64", "64-bit ARM")],
)
def test_each_kind_of_processor_has_its_levels(machine, kind):
    assert tuple(toolchain.source_levels(machine, ["true"])) == LEVELS_OF[kind][1:]
    assert toolchain.source_levels(machine, ["false"]) == []  # a compiler that knows none of the flags


def test_other_processors_run_plain_kernels():
    assert toolchain.source_levels("riscv64", ["true"]) == []


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64-linux-gnu-g++")
def test_the_flags_of_arm_s_levels_are_known_to_its_compiler():
    assert toolchain.source_levels("aarch64", ["aarch64-linux-gnu-g++"]) == ["neon", "neonbf16"]


@pytest.fixture
def torch(tmp_path):
    facts = {"include": [tmp_path / "include", tmp_path / "api"], "lib": tmp_path / "lib"}
    for folder in (*facts["include"], facts["lib"]):
        folder.mkdir()
    return facts


def test_openmp_on_linux_is_the_compiler_s(torch):
    assert toolchain.openmp("Linux", False, torch) == (["-fopenmp"], [], None)  # PyTorch's is g++'s: loaded already
    assert toolchain.openmp("Linux", True, torch) == (["-fopenmp"], ["-fopenmp"], None)


def test_openmp_on_macos_is_pytorch_s_own(torch):
    (torch["include"][0] / "omp.h").touch()
    (torch["lib"] / "libomp.dylib").touch()
    compiled, linked, note = toolchain.openmp("Darwin", True, torch)
    assert compiled == ["-Xclang", "-fopenmp", f"-isystem {torch['include'][0]}"]
    assert linked == ["-lomp"] and note is None


def test_openmp_on_macos_may_have_homebrew_s_header(torch, tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain, "HOMEBREW", (str(tmp_path / "nowhere"), str(tmp_path / "libomp")))
    (tmp_path / "libomp" / "include").mkdir(parents=True)
    (tmp_path / "libomp" / "include" / "omp.h").touch()
    (torch["lib"] / "libomp.dylib").touch()
    assert toolchain.openmp("Darwin", True, torch)[0][-1] == f"-isystem {tmp_path}/libomp/include"


@pytest.mark.parametrize("there", ["omp.h", "libomp.dylib", ""])
def test_without_openmp_macos_gets_kernels_of_one_thread_and_one_line(torch, there, monkeypatch):
    monkeypatch.setattr(toolchain, "HOMEBREW", ())
    if there:
        ((torch["include"][0] if there == "omp.h" else torch["lib"]) / there).touch()
    compiled, linked, note = toolchain.openmp("Darwin", True, torch)
    missing = "libomp.dylib" if there == "omp.h" else "omp.h"
    assert (compiled, linked) == ([], []) and missing in note
    assert "brew install libomp" in note and "\n" not in note


def test_a_module_is_linked_as_its_system_links_modules():
    assert setup.link_flags("Linux", Path("/t/lib"))[:3] == ["-shared", "-L/t/lib", "-Wl,--no-as-needed"]
    mac = setup.link_flags("Darwin", Path("/t/my lib"))
    assert mac[:3] == ["-bundle", "-undefined", "dynamic_lookup"] and "-L'/t/my lib'" in mac
    assert not any(flag.startswith("-Wl") for flag in mac)


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(toolchain.platform, "system", lambda: "Windows")
    with pytest.raises(toolchain.BuildFailed, match=r"^it does not build on Windows.*Try: WSL") as refused:
        toolchain.compiler()
    assert "\n" not in str(refused.value)


def test_macos_wants_clang(tmp_path, monkeypatch):
    monkeypatch.setattr(toolchain.platform, "system", lambda: "Darwin")
    monkeypatch.setenv("CXX", program(tmp_path, "g++", "Apple clang version 15.0.0"))
    assert toolchain.compiler() == [str(tmp_path / "g++")] and toolchain.is_clang(toolchain.compiler())
    monkeypatch.setenv("CXX", program(tmp_path, "g++-14", "g++-14 (Homebrew GCC 14.2.0) 14.2.0"))
    with pytest.raises(toolchain.BuildFailed, match=r"PyTorch for macOS is built by Clang, and .* Set CXX=clang\+\+"):
        toolchain.compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(toolchain.BuildFailed, match="xcode-select --install"):
        toolchain.compiler()


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setenv("PEFTCORE_CUDA", "0")
    return setup.Build(tmp_path / "out" / "_C.so", tmp_path / "out", "0.1.0")


def test_every_source_is_compiled_once(build):
    units = build.translation_units()
    included = [
        f"{setup.CSRC}/{name}"
        for path in units
        for name in re.findall(r'^#include "(.*\.cpp)"', path.read_text(), re.M)
    ]
    alone = [str(path) for path in units if not path.is_relative_to(build.folder)]
    assert sorted([*alone, *included]) == sorted(map(str, build.sources()))


def test_a_unit_is_written_only_when_its_files_change(build):
    times = [path.stat().st_mtime_ns for path in build.translation_units()]
    assert times == [path.stat().st_mtime_ns for path in build.translation_units()]


def test_another_pytorch_changes_every_command(build):
    def flags() -> str:
        return re.search("^cflags = .*", build.ninja_file(build.facts()), re.M).group()

    before = flags()
    assert before == flags() and toolchain.torch_facts()["build"] in before
    build.torch["build"] = "2.14.0 0123abc"
    assert flags() == before.replace(toolchain.torch_facts()["build"], "2.14.0 0123abc")


@pytest.mark.parametrize(
    ("cards", "known", "wanted"),
    [
        ("9.0", "80 90 100", "90+PTX"),
        ("9.0 8.0 9.0", "80 90 100", "80+PTX;90+PTX"),
        ("10.0", "80 90 100", "100+PTX"),
        ("12.0", "80 90", "80;90+PTX"),  # newer than nvcc: compiled from PTX when it is loaded
        ("7.5", "75 80 90", "80;90+PTX"),  # older than the kernels support: references
        ("", "80 90", "80;90+PTX"),
    ],
)
def test_cuda_kernels_are_compiled_for_the_gpus_of_the_machine(tmp_path, monkeypatch, cards, known, wanted):
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    monkeypatch.delenv("PEFTCORE_CUDA_ARCHS", raising=False)
    program(tmp_path, "nvidia-smi", cards.replace(" ", "\n"))
    nvcc = program(tmp_path, "nvcc", "\n".join(f"compute_{number}" for number in known.split()))
    assert toolchain.local_architectures(nvcc) == wanted
    assert toolchain.architectures(nvcc)[1][0] == f"sm_{wanted.replace(';', '+').split('+')[0]}"
    monkeypatch.setenv("PEFTCORE_CUDA_ARCHS", "80;90+PTX")
    assert toolchain.architectures(nvcc) == (
        ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=[sm_90,compute_90]"],
        ["sm_80", "sm_90", "compute_90"],
    )
    monkeypatch.setenv("PEFTCORE_CUDA_ARCHS", "80,90")
    with pytest.raises(
        SystemExit, match=r"PEFTCORE_CUDA_ARCHS must list architectures such as 80 or 90\+PTX, found '80,90'"
    ):
        toolchain.architectures(nvcc)
    monkeypatch.setenv("PEFTCORE_CUDA_ARCHS", "90;75")
    with pytest.raises(SystemExit, match=r"need architecture 80 or later, found '75'\. Leave it out"):
        toolchain.architectures(nvcc)


def test_without_nvidia_smi_the_default_architecture_runs_on_every_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.local_architectures(tmp_path / "nvcc") == "80;90+PTX"


def test_the_announcement_names_the_optional_part_and_how_to_leave_it_out(build):
    assert "without CUDA kernels: switched off by PEFTCORE_CUDA=0" in build.announcement(2)
    build.nvcc, build.architectures = Path("nvcc"), ["sm_90", "compute_90"]
    line = build.announcement(2)
    assert "CUDA kernels for sm_90, compute_90" in line and "PEFTCORE_CUDA=0" in line and "\n" not in line
