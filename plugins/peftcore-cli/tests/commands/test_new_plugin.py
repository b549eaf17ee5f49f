"""`peftcore new-plugin`: what it writes installs, passes its test, trains, saves, loads, and goes again."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
from peftcore_cli.commands.new_plugin import Kind, new_plugin, write
from support.imports import ROOT
from support.whole_run import WHOLE, nightly_but

import peftcore
from peftcore.plugin.registry import registry
from peftcore.testing import CHECKS, COMPILE, check_method


@pytest.mark.parametrize("kind", nightly_but([kind.value for kind in Kind], ("around",)))
def test_each_kind_passes_the_suite(kind: str, tmp_path: Path, monkeypatch) -> None:
    if kind not in ("around", "on-weight"):  # tracing is slow, and tried on two kinds
        monkeypatch.delitem(CHECKS, COMPILE)
    name = f"fresh-{kind}"
    package = write(name, Kind(kind), tmp_path)
    (file,) = package.glob("*.py")
    modules = {}
    for path in (file, *package.glob("tests/*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        modules[path.stem] = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, path.stem, modules[path.stem])
        spec.loader.exec_module(modules[path.stem])
        if path == file:
            registry.register(name, modules[file.stem])
    test = modules[f"test_{file.stem.removeprefix('peftcore_')}"]
    if not WHOLE:
        monkeypatch.setattr(test, "check_method", partial(check_method, families=("Llama",)))
    try:
        test.test_conformance()
    finally:
        registry.unregister(name)


@pytest.mark.parametrize("command", [["check", "--ignore", "I001"], ["format", "--check"]])
def test_what_is_written_passes_the_linters_of_this_repository(command: list[str], tmp_path: Path) -> None:
    """Except for the order of imports, which depends on the folder that ruff runs in."""
    for kind in Kind:
        write(f"fresh-{kind.value}", kind, tmp_path)
    config = ROOT / "pyproject.toml"
    lint = [sys.executable, "-m", "ruff", *command, "--config", config, tmp_path]
    result = subprocess.run(lint, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout


def test_the_printed_commands_work_where_only_peftcore_is_installed(tmp_path: Path, capsys) -> None:
    """A new environment of Python 3.11 has setuptools 65, which cannot build the package, and no pytest."""
    tomllib = pytest.importorskip("tomllib")
    new_plugin("gain", Kind.around, tmp_path)
    package = tmp_path / "peftcore-gain"
    assert capsys.readouterr().out.splitlines()[1:] == [
        f"  python -m pip install -e '{package}[test]'",
        f"  python -m pytest {package}",
    ]
    project = tomllib.loads((package / "pyproject.toml").read_text())["project"]
    assert project["optional-dependencies"] == {"test": ["peftcore[train]", "pytest>=8"]}


@pytest.mark.parametrize("name", ["Gain", "two--hyphens", "9lives", "a.b", "../x", "-x", ""])
def test_names_that_no_method_can_have(name: str, tmp_path: Path) -> None:
    with pytest.raises(peftcore.PeftcoreError, match="lowercase letters, digits and single hyphens"):
        write(name, Kind.around, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_what_is_there_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "peftcore-gain").mkdir()
    with pytest.raises(peftcore.PeftcoreError, match="exists already"):
        write("gain", Kind.around, tmp_path)


USE = """
import sys, torch, peftcore
from support import tiny
model = peftcore.apply(tiny.llama(), "fresh")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
losses = []
for _ in range(5):
    optimizer.zero_grad()
    loss = model(input_ids=tiny.TOKENS, labels=tiny.TOKENS).loss
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
peftcore.save(model, sys.argv[1])
assert torch.equal(tiny.logits(peftcore.load(tiny.llama(), sys.argv[1])), tiny.logits(model))
"""


@pytest.mark.nightly
def test_installed_with_pip_used_and_uninstalled(tmp_path: Path) -> None:
    package = write("fresh", Kind.around, tmp_path)
    site, adapter = tmp_path / "site", tmp_path / "adapter"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-build-isolation",
        "--no-deps",
        "--target",
        site,
        package,
    ]
    subprocess.run(install, check=True, capture_output=True)

    def python(*arguments: object, with_plugin: bool) -> subprocess.CompletedProcess:
        paths = [str(ROOT / "tests"), str(ROOT / "plugins/peftcore-cli"), *([str(site)] if with_plugin else [])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
        command = [sys.executable, "-W", "ignore", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    listed = python("-m", "peftcore_cli", "plugins", with_plugin=True)
    assert "peftcore-fresh" in listed.stdout, listed
    used = python("-c", USE, adapter, with_plugin=True)
    assert used.returncode == 0, used.stderr
    load = "import sys, peftcore; from support import tiny; peftcore.load(tiny.llama(), sys.argv[1])"
    gone = python("-c", load, adapter, with_plugin=False)
    assert "no installed method reads peft_type 'FRESH'" in gone.stderr
    assert "pip install peftcore-fresh==0.1.0" in gone.stderr
