"""The command line, its packages, benchmarks, examples and `estimate` use the public API as any other program does."""

import ast
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import peftcore_cli
import pytest
from support.imports import ROOT

# Packages whose names a program may import; `peftcore.ops` and `peftcore.plugin` with their documented modules.
FRONTS = {
    "peftcore",
    "peftcore.errors",
    "peftcore.ops",
    "peftcore.plugin",
    "peftcore.optim",
    "peftcore.files",
    "peftcore.quantization",
    "peftcore.distributed",
    "peftcore.training",
    "peftcore.exporting",
    "peftcore.testing",
    "peftcore.estimating",
}
MODULES_OF_FRONTS = ("ranks", "safe_reading", "targets", "validation")

# The folders that are programs, with the inner names that each may import. No name is to be added.
PROGRAMS: dict[str, set[str]] = {
    "plugins/peftcore-cli/peftcore_cli": set(),
    "plugins/peftcore-compare/peftcore_compare": set(),
    "plugins/peftcore-serve/peftcore_serve": set(),
    "benchmarks": set(),
    "examples": set(),
    "docs": set(),
    # It runs a step on a copy without values, with the adapters of a model, and so needs to know how both are made.
    "peftcore/estimating": {
        "peftcore.engine.adapter_parameters",
        "peftcore.engine.add_adapter",
        "peftcore.engine.state.refuse_merged",
        "peftcore.engine.state.refuse_per_sample",
        "peftcore.engine.state_of",
        "peftcore.model.base_modules.original_forward",
        "peftcore.model.inputs.BATCH",
        "peftcore.model.inputs.LENGTH",
        "peftcore.model.inputs.example_inputs",
        "peftcore.plugin.layers.is_wrapped",
        "peftcore.quantization.convert.convert",
        "peftcore.training.loss_without_logits.switch_on",
    },
}


def imports(file: Path, package: str = "peftcore") -> Iterator[str]:
    """Yield the full names that a file imports from a package, including those for type checkers."""
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith(f"{package}."):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if f"{alias.name}.".startswith(f"{package}."))


def is_public(name: str) -> bool:
    """Return whether a full name is that of a front, or a name that a front has."""
    if name in FRONTS or name.startswith("peftcore.ops."):
        return "._" not in name
    home, _, last = name.rpartition(".")
    if home not in FRONTS:
        return False
    return last in MODULES_OF_FRONTS or not isinstance(getattr(import_module(home), last), ModuleType)


@pytest.mark.parametrize("program", PROGRAMS)
def test_programs_import_public_names_alone(program: str) -> None:
    own = f"{program.replace('/', '.')}."
    inner = {
        name
        for file in (ROOT / program).rglob("*.py")
        for name in imports(file)
        if not f"{name}.".startswith(own) and not is_public(name)
    }
    assert inner == PROGRAMS[program]


@pytest.mark.parametrize(
    "program", ["plugins/peftcore-compare/peftcore_compare", "plugins/peftcore-serve/peftcore_serve"]
)
def test_packages_with_commands_import_public_names_of_the_command_line(program: str) -> None:
    names = [name.split(".")[1:] for file in (ROOT / program).rglob("*.py") for name in imports(file, "peftcore_cli")]
    modules = peftcore_cli._PUBLIC["peftcore_cli"].split()
    for name, *inner in names:
        assert name in dir(peftcore_cli) and (not inner or name in modules), (name, inner)


def test_type_checkers_know_the_public_names_of_the_command_line() -> None:
    stub = Path(str(peftcore_cli.__file__)).with_suffix(".pyi")
    homes = {name.rpartition(".")[2]: name.rpartition(".")[0] for name in imports(stub, "peftcore_cli")}
    assert homes == peftcore_cli._HOMES
    assert all(getattr(peftcore_cli, name) for name in homes)


def test_the_check_sees_inner_names(tmp_path: Path) -> None:
    file = tmp_path / "program.py"
    file.write_text(
        "import peftcore\nfrom peftcore import PeftcoreError, quantization\nfrom peftcore.plugin import ranks\n"
        "from peftcore.engine import state_of\nfrom peftcore.quantization import convert, quantize\n"
        "import peftcore.files.folder\n"
    )
    found = [name for name in imports(file) if not is_public(name)]
    assert sorted(found) == ["peftcore.engine.state_of", "peftcore.files.folder", "peftcore.quantization.convert"]
