"""What a file imports, of peftcore and of its plugins, in every way in which Python can be told to."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import peftcore

ROOT = Path(__file__).parents[2]
CORE = ROOT / "peftcore"


def _modules() -> dict[str, Path]:
    core = {".".join(file.relative_to(ROOT).with_suffix("").parts): file for file in CORE.rglob("*.py")}
    plugins = {file.stem: file for file in ROOT.glob("plugins/*/*.py")}
    return {name.removesuffix(".__init__"): file for name, file in (core | plugins).items()}


MODULES = _modules()
HOMES = {name: getattr(peftcore, name).__module__ for name in peftcore.__all__ if name != "hookimpl"} | {
    "hookimpl": "peftcore.plugin.hooks"
}


def tree_of(file: Path) -> ast.Module:
    """The file's syntax, without what is under `if TYPE_CHECKING`, and without docstrings."""
    return _AtRunTime().visit(ast.parse(file.read_text()))


class _AtRunTime(ast.NodeTransformer):
    def visit_If(self, node: ast.If) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        return node.orelse or ast.Pass() if getattr(node.test, "id", "") == "TYPE_CHECKING" else node

    def visit_Expr(self, node: ast.Expr) -> ast.AST:
        return ast.Pass() if isinstance(node.value, ast.Constant) else node


def module_of(dotted: str) -> str | None:
    """The module that `a.b.c` names or is in; a public name of peftcore is in its home. None for those of others."""
    package, _, name = dotted.partition(".")
    if package == "peftcore" and name.partition(".")[0] in HOMES:
        return HOMES[name.partition(".")[0]]
    while dotted and dotted not in MODULES:
        dotted = dotted.rpartition(".")[0]
    return dotted or None


def imports(file: Path) -> set[str]:
    """The modules that `file` imports at run time, at its top or within functions, by statement or by name.

    `import peftcore` alone is none: what counts is what is then asked of it. So is a string that names a module.
    """
    found: set[str | None] = set()
    nodes = list(ast.walk(tree_of(file)))
    inner = {id(node.value) for node in nodes if isinstance(node, ast.Attribute)}  # `a.b` of `a.b.c`
    for node in nodes:
        match node:
            case ast.Import(names=names):
                found |= {module_of(alias.name) for alias in names if alias.name != "peftcore"}
            case ast.ImportFrom(module=module, names=names, level=level):
                assert not level, f"{file}: a relative import, which this does not see"
                found |= {module_of(f"{module}.{alias.name}") for alias in names}
            case ast.Attribute() if id(node) not in inner and dotted(node).startswith("peftcore."):
                found.add(module_of(dotted(node)))
            case ast.Constant(value=str(text)) if text in MODULES and "." in text:
                found.add(text)
    return {module for module in found if module and MODULES[module] != file} - {"peftcore"}


def dotted(node: ast.AST) -> str:
    """`a.b.c` of an expression that is only names, else an empty text."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and dotted(node.value):
        return f"{dotted(node.value)}.{node.attr}"
    return ""


def private_names(file: Path) -> Iterator[str]:
    """The names with an underscore that `file` takes from other modules of peftcore or a plugin."""
    modules: dict[str, str] = {"peftcore": "peftcore"}  # by the name under which the file has them
    tree = tree_of(file)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom) and module_of(f"{node.module}"):
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                same_package = file.parent == MODULES[module_of(f"{node.module}.{alias.name}")].parent
                if _is_private(alias.name) and not (same_package and f"{node.module}.{alias.name}" in MODULES):
                    yield f"{node.module}.{alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_private(node.attr):
            first, _, rest = dotted(node.value).partition(".")
            full = ".".join(part for part in (modules.get(first, ""), rest) if part)
            if full in MODULES:
                yield f"{full}.{node.attr}"


def _is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")
