"""What setup.py does on other systems and processors than this one: its functions, told where they are."""

import shutil
from pathlib import Path

import pytest
from setup_file import setup_file

from peftcore.ops.build_info import LEVELS

setup = setup_file()


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
    assert tuple(setup.source_levels(machine, ["true"])) == LEVELS[kind][1:]
    assert setup.source_levels(machine, ["false"]) == []  # a compiler that knows none of the flags


def test_other_processors_run_plain_kernels():
    assert setup.source_levels("riscv64", ["true"]) == []


@pytest.mark.skipif(shutil.which("aarch64-linux-gnu-g++") is None, reason="no aarch64-linux-gnu-g++")
def test_the_flags_of_arm_s_levels_are_known_to_its_compiler():
    assert setup.source_levels("aarch64", ["aarch64-linux-gnu-g++"]) == ["neon", "neonbf16"]


@pytest.fixture
def torch(tmp_path):
    facts = {"include": [tmp_path / "include", tmp_path / "api"], "lib": tmp_path / "lib"}
    for folder in (*facts["include"], facts["lib"]):
        folder.mkdir()
    return facts


def test_openmp_on_linux_is_the_compiler_s(torch):
    assert setup.openmp("Linux", False, torch) == (["-fopenmp"], [], None)  # PyTorch's is g++'s: loaded already
    assert setup.openmp("Linux", True, torch) == (["-fopenmp"], ["-fopenmp"], None)


def test_openmp_on_macos_is_pytorch_s_own(torch):
    (torch["include"][0] / "omp.h").touch()
    (torch["lib"] / "libomp.dylib").touch()
    compiled, linked, note = setup.openmp("Darwin", True, torch)
    assert compiled == ["-Xclang", "-fopenmp", f"-isystem {torch['include'][0]}"]
    assert linked == ["-lomp"] and note is None


def test_openmp_on_macos_may_have_homebrew_s_header(torch, tmp_path, monkeypatch):
    monkeypatch.setattr(setup, "HOMEBREW", (str(tmp_path / "nowhere"), str(tmp_path / "libomp")))
    (tmp_path / "libomp" / "include").mkdir(parents=True)
    (tmp_path / "libomp" / "include" / "omp.h").touch()
    (torch["lib"] / "libomp.dylib").touch()
    assert setup.openmp("Darwin", True, torch)[0][-1] == f"-isystem {tmp_path}/libomp/include"


@pytest.mark.parametrize("there", ["omp.h", "libomp.dylib", ""])
def test_without_openmp_macos_gets_kernels_of_one_thread_and_one_line(torch, there, monkeypatch):
    monkeypatch.setattr(setup, "HOMEBREW", ())
    if there:
        ((torch["include"][0] if there == "omp.h" else torch["lib"]) / there).touch()
    compiled, linked, note = setup.openmp("Darwin", True, torch)
    missing = "libomp.dylib" if there == "omp.h" else "omp.h"
    assert (compiled, linked) == ([], []) and missing in note
    assert "brew install libomp" in note and "\n" not in note


def test_a_module_is_linked_as_its_system_links_modules():
    assert setup.link_flags("Linux", Path("/t/lib"))[:3] == ["-shared", "-L/t/lib", "-Wl,--no-as-needed"]
    mac = setup.link_flags("Darwin", Path("/t/my lib"))
    assert mac[:3] == ["-bundle", "-undefined", "dynamic_lookup"] and "-L'/t/my lib'" in mac
    assert not any(flag.startswith("-Wl") for flag in mac)


def test_windows_is_refused_in_one_line(monkeypatch):
    monkeypatch.setattr(setup.platform, "system", lambda: "Windows")
    with pytest.raises(setup.BuildFailed, match=r"^it does not build on Windows.*Try: WSL") as refused:
        setup.compiler()
    assert "\n" not in str(refused.value)


def test_macos_wants_clang(tmp_path, monkeypatch):
    monkeypatch.setattr(setup.platform, "system", lambda: "Darwin")
    monkeypatch.setenv("CXX", program(tmp_path, "g++", "Apple clang version 15.0.0"))
    assert setup.compiler() == [str(tmp_path / "g++")] and setup.is_clang(setup.compiler())
    monkeypatch.setenv("CXX", program(tmp_path, "g++-14", "g++-14 (Homebrew GCC 14.2.0) 14.2.0"))
    with pytest.raises(setup.BuildFailed, match=r"PyTorch for macOS is built by Clang, and .* Set CXX=clang\+\+"):
        setup.compiler()
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(setup.BuildFailed, match="xcode-select --install"):
        setup.compiler()
