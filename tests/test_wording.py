"""Docstrings, comments and messages keep to plain English: none of the words that once had to be translated."""

import ast
import itertools
import re
from pathlib import Path

import pytest

import peftcore.ops

CORE = Path(peftcore.ops.__file__).parents[1]
OLD = re.compile(r"\b(told|beside|lies|stands|anew)\b|(?<![Tt]here )\bis no\b|\b(Those of|The same)\b")
LEGITIMATE = {"stands for", "stands in", "stand in", "is no more than"}
ROOT = CORE.parent
FILES = sorted(CORE.rglob("*.py"))
FILES += [file for file in sorted((ROOT / "plugins").rglob("*.py")) if "tests" not in file.parts]
GENERATED = {"census.md"}  # quotes messages of the models' own code
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "SECURITY.md", *sorted((ROOT / "docs").rglob("*.md"))]
PAGES = [page for page in [*PAGES, *sorted((ROOT / "plugins").glob("*/README.md"))] if page.name not in GENERATED]


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_word_of_the_old_dialect(file: Path) -> None:
    text = file.read_text("utf-8")
    for phrase in LEGITIMATE:
        text = text.replace(phrase, "")
    assert [line.strip() for line in text.split("\n") if OLD.search(line)] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_pages_are_in_plain_english(page: Path) -> None:
    text = re.sub(r"<!-- (\w+).*?: made by .*?<!-- end of .*?-->", "", page.read_text("utf-8"), flags=re.DOTALL)
    text = re.sub(r"`[^`\n]*`", "", text)  # code, and messages that are quoted
    for phrase in LEGITIMATE:
        text = text.replace(phrase, "")
    assert [line.strip() for line in text.split("\n") if OLD.search(line)] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_no_docstring_is_a_question(file: Path) -> None:
    nodes = ast.walk(ast.parse(file.read_text("utf-8")))
    documented = (node for node in nodes if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)))
    first_lines = [(ast.get_docstring(node) or "").partition("\n")[0] for node in documented]
    assert [line for line in first_lines if line.endswith("?")] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_are_markdown(file: Path) -> None:
    """The site shows a role of Sphinx, such as :class:`Base`, as it is written."""
    assert re.findall(r":[a-z]+:`[^`]*`", file.read_text("utf-8")) == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_no_heading_skips_a_level(page: Path) -> None:
    text = re.sub(r"^```.*?^```", "", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert [pair for pair in itertools.pairwise(levels) if pair[1] > pair[0] + 1] == []


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_documented_arguments_exist(file: Path) -> None:
    """Entries for several arguments, and of classes, which ruff's DOC102 does not read."""
    stale = []
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.ClassDef) and node.bases:
            continue  # may document inherited fields
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            section = re.search(r"^Args:\n((?: +.*\n|\n)+)", f"{ast.get_docstring(node) or ''}\n", re.MULTILINE)
            entries = re.findall(r"^ {4}(\w+(?:, \w+)*): ", section[1] if section else "", re.MULTILINE)
            fields = {each.arg for each in ast.walk(node) if isinstance(each, ast.arg)}
            fields |= {each.id if isinstance(each, ast.Name) else each.attr for each in ast.walk(node) if _is_set(each)}
            stale += [name for entry in entries for name in entry.split(", ") if name not in fields]
    assert stale == []


def _is_set(node: ast.AST) -> bool:
    return isinstance(node, (ast.Name, ast.Attribute)) and isinstance(node.ctx, ast.Store)
