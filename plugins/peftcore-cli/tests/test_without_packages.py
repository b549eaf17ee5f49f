"""The core without the packages that add commands, formats and integrations: it imports none, and trains."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
from support.commands import Run
from support.imports import CORE, ROOT

from peftcore.plugin.registry import registry

# Packages of plugins/ without a method, but the command line.
TOOLS = {
    package.parent.name.replace("-", "_")
    for package in ROOT.glob("plugins/*/pyproject.toml")
    if package.parent.name != "peftcore-cli"
    and not any("peftcore_methods" in file.read_text("utf-8") for file in package.parent.rglob("peftcore_*.py"))
    and not any("peftcore_methods" in file.read_text("utf-8") for file in package.parent.rglob("peftcore_*/*.py"))
}


def test_the_core_imports_no_plugin() -> None:
    importing = re.compile(r"^\s*(?:from|import) (peftcore_\w+)|import_module\(.(peftcore_\w+)", re.MULTILINE)
    found = {file.name: importing.findall(file.read_text("utf-8")) for file in CORE.rglob("*.py")}
    assert {name: names for name, names in found.items() if names} == {}


def test_train_without_the_packages(
    run: Run, llama: Path, reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "peftcore_compare" in TOOLS and "peftcore_lora" not in TOOLS
    registry.plugins()  # found before their imports fail
    for name in [name for name in sys.modules if name.partition(".")[0] in TOOLS]:
        monkeypatch.delitem(sys.modules, name)
    for name in TOOLS:
        monkeypatch.setitem(sys.modules, name, None)  # an import raises
    run("train", "-m", llama, "-d", reviews, "-o", tmp_path / "run", "--method", "lora", "--steps", 1)
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").is_file()
