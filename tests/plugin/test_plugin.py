"""`peftcore.plugin` is the whole contract: plugins import it, `peftcore` and `peftcore.ops`, and nothing else."""

import ast
import pkgutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from support.imports import ROOT, dotted

import peftcore
import peftcore.plugin

USERS = {*peftcore.__all__, "__version__"}
PROGRAMS = ("peftcore_cli", "peftcore_compare", "peftcore_serve")  # see tests/test_public_use.py
NAMESPACES = (
    "targets",
    "validation",
    "ranks",
    "safe_reading",
)  # modules of the contract, whose public names are part of it


def sources() -> Iterator[Path]:
    for plugin in [*ROOT.glob("plugins/*"), ROOT / "examples/plugin"]:
        files = (file for file in plugin.rglob("peftcore_*/**/*.py") if not {"tests", *PROGRAMS} & {*file.parts})
        yield from sorted(files)
        yield from sorted(plugin.glob("peftcore_*.py"))


def outside_of_the_contract(code: str) -> list[str]:
    """Return the names of peftcore's inner modules that a plugin's source uses."""
    allowed = {f"peftcore.{name}" for name in (*USERS, "ops", "plugin")}
    allowed |= {f"peftcore.plugin.{name}" for name in peftcore.plugin.__all__}
    found: set[str] = set()
    bound: dict[str, str] = {}  # by local name
    tree = ast.parse(code)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and f"{node.module}.".startswith("peftcore."):
            bound |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            inside = f"{node.module}.".startswith("peftcore.ops.")
            found |= {f"{node.module}.{alias.name}" for alias in node.names if not inside} - allowed
        elif isinstance(node, ast.Import):
            names = {alias.name for alias in node.names if f"{alias.name}.".startswith("peftcore.")}
            bound |= {"peftcore": "peftcore"} if names else {}
            found |= names - {"peftcore", "peftcore.plugin", "peftcore.ops"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = dotted(node).partition(".")
            full = f"{bound.get(first, '')}.{rest}".removeprefix("peftcore.plugin.")
            namespace, _, name = full.partition(".")
            if full.startswith("peftcore.") and full.count(".") == 1:
                found |= {full} - allowed
            elif namespace in NAMESPACES and name and "." not in name:
                module = getattr(peftcore.plugin, namespace)
                public = getattr(module, "__all__", [each for each in vars(module) if not each.startswith("_")])
                names = {each for each in public if not isinstance(getattr(module, each), ModuleType)}
                found |= {full} - {f"{namespace}.{each}" for each in names}
    return sorted(found)


@pytest.mark.parametrize("file", list(sources()), ids=lambda file: str(file.relative_to(ROOT)))
def test_plugins_import_the_contract_and_nothing_else(file: Path) -> None:
    assert outside_of_the_contract(file.read_text()) == []


def test_type_checkers_and_programs_read_the_same_names() -> None:
    tree = ast.parse(Path(peftcore.plugin.__file__).with_suffix(".pyi").read_text("utf-8"))
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom)]
    seen = {name.asname: f"{node.module}.{name.name}" for node in imports for name in node.names}
    assert sorted(str(name) for name in seen) == peftcore.plugin.__all__ == dir(peftcore.plugin)
    assert all(getattr(peftcore.plugin, str(name)) is pkgutil.resolve_name(home) for name, home in seen.items())


def test_users_of_models_see_no_name_of_the_contract() -> None:
    errors = {"PeftcoreError", "CheckpointError"}
    assert USERS & {*peftcore.plugin.__all__} == errors


def test_a_module_is_imported_when_a_name_of_it_is_used() -> None:
    code = (
        "from peftcore.plugin import Command, hookimpl; import sys; print('torch' in sys.modules); "
        "import peftcore; peftcore.plugin.check_method; print('peftcore.testing' in sys.modules)"
    )
    found = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.split() == ["False", "True"]
    with pytest.raises(AttributeError, match=r"module 'peftcore.plugin' has no attribute 'nonsense'"):
        _ = peftcore.plugin.nonsense
