"""What the source tree keeps besides its floors (`import-linter`): private names, and a core without methods."""

import re
from pathlib import Path

import pytest
from support.imports import CORE, MODULES, ROOT, imports, private_names

FILES = sorted(file for file in CORE.rglob("*.py") if file != CORE / "__init__.py")


def test_no_private_name_is_used_across_modules() -> None:
    found = [f"{module}: {name}" for module, file in MODULES.items() for name in private_names(file)]
    assert found == []


def test_ops_import_only_torch() -> None:
    for file in (CORE / "ops").glob("*.py"):
        assert {module.split(".")[1] for module in imports(file)} <= {"ops"}, file


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
    # Examples in docstrings call methods by name, as users do; the code does not.
    text = re.sub(r"^ +(>>>|\.\.\.) .*$", "", file.read_text().lower(), flags=re.MULTILINE)
    for method in METHODS:
        if method in ("adapter", "miss"):
            continue  # also the word for what any method places, and one of English
        for spelling in {method, method.replace("-", "_"), method.replace("-", "")}:
            end = r"(?![a-z])" if method in ("oft", "road") else ""  # often, roads
            assert not re.search(rf"\b{spelling}{end}", text), f"{file.name} names the method '{method}'"
