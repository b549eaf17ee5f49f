"""What DESIGN asks of the source tree: the direction of imports, and a core that names no method."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CORE = ROOT / "peftcore"

# Each may import the rooms to its left, and none to its right.
ORDER = [
    {"errors", "validation", "requirement", "ranks", "architecture", "method", "hookspecs", "ops"},
    {"registry", "adaptation", "adapter_files"},
    {"observation"},
    {"targets", "prompts"},
    {"engine"},
    {"checkpoint", "quantization", "optim"},
    {"merging", "parallel"},
    {"testing", "integrations"},
    {"cli", "__main__"},
]


def layer(room: str) -> int:
    return next(i for i, rooms in enumerate(ORDER) if room in rooms)


def imports(file: Path) -> list[str]:
    """Rooms of peftcore that `file` imports at run time (not under TYPE_CHECKING)."""
    found = []
    tree = ast.parse(file.read_text())
    typing_only = {
        id(child)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and getattr(node.test, "id", "") == "TYPE_CHECKING"
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.ImportFrom) and node.module == "peftcore":
            found += [
                alias.name
                for alias in node.names
                if (CORE / alias.name).is_dir() or (CORE / f"{alias.name}.py").exists()
            ]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("peftcore."):
            found.append(node.module.split(".")[1])
    return found


FILES = sorted(file for file in CORE.rglob("*.py") if file != CORE / "__init__.py")


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_direction_of_imports(file: Path) -> None:
    room = file.relative_to(CORE).parts[0].removesuffix(".py")
    for imported in imports(file):
        if imported != room:
            assert layer(imported) <= layer(room), f"{room} must not import {imported}"


def test_ops_import_only_torch() -> None:
    for file in (CORE / "ops").glob("*.py"):
        assert set(imports(file)) <= {"ops"}, file


METHODS = [path.name.removeprefix("peftcore-") for path in (ROOT / "plugins").iterdir() if path.is_dir()]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(CORE)))
def test_the_core_names_no_method(file: Path) -> None:
    if file.parent == CORE / "ops" and file.stem in ("lora", "__init__"):
        pytest.skip("an operator")
    text = file.read_text().lower()
    for method in METHODS:
        if method == "adapter":
            continue  # also the word for what any method places
        for spelling in {method, method.replace("-", "_"), method.replace("-", "")}:
            assert not re.search(rf"\b{spelling}", text), f"{file.name} names the method '{method}'"


def test_every_plugin_has_the_same_shape() -> None:
    for plugin in (ROOT / "plugins").iterdir():
        if plugin.is_dir():
            module = plugin / f"{plugin.name.replace('-', '_')}.py"
            for part in (plugin / "pyproject.toml", plugin / "README.md", plugin / "tests", module):
                assert part.exists(), f"{plugin.name} lacks {part.name}"
