"""What DESIGN asks of the source tree: the direction of imports, private names, and a core that names no method."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest
from support.imports import CORE, MODULES, ROOT, imports, private_names

# Each package may import packages of the lines above its own, and no others. Modules of a package that are on a line of
# their own, such as `files.folder`, are below the rest of it.
ORDER = [
    {
        "adapter",
        "errors",
        "field_types",
        "events",
        "layers",
        "ops",
    },
    {"architecture", "exporter", "extensions", "hookspecs"},
    {"validation", "ranks", "method", "files.safe_reading", "files.folder", "optim", "experts"},
    {"plugin_checks", "sharded_terms"},
    {"plugin_discovery"},
    {"plugin_errors"},
    {"registry"},
    {"weight_formats"},
    {"adaptation"},
    {"observation"},
    {"placements.placement", "placements.around", "placements.after", "placements.on_weight", "placements.train"},
    {"experts.in_model", "experts.joining", "experts.conversion"},
    {"targets", "prompts", "files.metadata", "files.peft_fields", "files.peft_configs"},
    {"placements"},
    {"engine"},
    {"files", "quantization"},
    {"merging", "parallel"},
    {"composing", "testing", "estimating"},
    {"exporting", "integrations"},
    {"plugin"},  # names of all of the above, which plugins import
    {"cli"},
    {"__main__"},
]
FILES = sorted(file for file in CORE.rglob("*.py") if file != CORE / "__init__.py")


def layer(module: str) -> int:
    """Return the line of a module, by its own name or that of its package."""
    package = module.split(".")[1]
    inside = ".".join(module.split(".")[1:3])
    lines = {name: i for i, names in enumerate(ORDER) for name in names}
    return lines.get(inside, lines[package])


def packages(file: Path) -> set[str]:
    return {module.split(".")[1] for module in imports(file)}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_direction_of_imports(file: Path) -> None:
    (module,) = (name for name, each in MODULES.items() if each == file)
    for imported in imports(file):
        same_package = imported.split(".")[1] == module.split(".")[1]  # `test_no_circle` looks inside packages
        assert layer(imported) < layer(module) + same_package, f"{module} must not import {imported}"


def test_no_circle() -> None:
    graph = {module: imports(file) for module, file in MODULES.items() if module != "peftcore"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        raise AssertionError(" imports ".join(reversed(error.args[1]))) from None


def imports_for_types(file: Path) -> set[str]:
    """Return the modules that a file imports from, also under `if TYPE_CHECKING`."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    plain = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    return plain | {str(node.module) for node in nodes if isinstance(node, ast.ImportFrom)}


@pytest.mark.parametrize("package", sorted(ROOT.glob("plugins/*/peftcore_*/")), ids=lambda package: package.name)
def test_no_circle_in_a_plugin_even_for_types(package: Path) -> None:
    files = {".".join(file.relative_to(package.parent).with_suffix("").parts): file for file in package.rglob("*.py")}
    graph = {module: imports_for_types(file) & files.keys() for module, file in files.items()}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_no_private_name_is_used_across_modules() -> None:
    found = [f"{module}: {name}" for module, file in MODULES.items() for name in private_names(file)]
    assert found == []


def test_ops_import_only_torch() -> None:
    for file in (CORE / "ops").glob("*.py"):
        assert packages(file) <= {"ops"}, file


METHODS = {
    folder.name.removeprefix("peftcore-")
    for folder in (ROOT / "plugins").iterdir()
    if any("def peftcore_methods" in f.read_text() for f in [*folder.glob("peftcore_*.py"), *folder.glob("*/*.py")])
}


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_the_core_names_no_method(file: Path) -> None:
    operators = ("lora", "dropout", "grouped", "grouped_operators", "linear_per_sample", "weight", "__init__")
    if file.parent == CORE / "ops" and file.stem in operators:
        pytest.skip("an operator")
    if file.parent.name == "exporting" and file.stem == "serving":
        pytest.skip("writes others' formats, which bear such names")
    if file.parent.name == "integrations" and file.stem == "diffusers":
        pytest.skip("has the names of diffusers' methods")
    text = file.read_text().lower()
    for method in METHODS:
        if method in ("adapter", "miss"):
            continue  # also the word for what any method places, and one of English
        for spelling in {method, method.replace("-", "_"), method.replace("-", "")}:
            end = r"(?![a-z])" if method in ("oft", "road") else ""  # often, roads
            assert not re.search(rf"\b{spelling}{end}", text), f"{file.name} names the method '{method}'"
