"""The pages of docs/coming-from say what convert-config makes of a config."""

from __future__ import annotations

import ast
import collections
import inspect
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from peftcore_convert_config import programs

DOCS = Path(__file__).parents[3] / "docs/coming-from"
PAIRS = [
    pytest.param(program, *pair, id=f"{program}-{i}")
    for program in programs.PROGRAMS
    for i, pair in enumerate(
        re.findall(r"```yaml\n(.*?)```\n+(?:[^`]*?)```toml\n(.*?)```", (DOCS / f"{program}.md").read_text(), re.DOTALL)
    )
]
LISTED = re.compile(r"^\| `([^`]+\.ya?ml)` \| (.*) \|$", re.MULTILINE)


def read_toml(text: str) -> dict[str, Any]:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.10 has no tomllib")
    found: dict[str, Any] = tomllib.loads(text)
    return found


@pytest.mark.parametrize(("program", "theirs", "ours"), PAIRS)
def test_the_file_of_a_page_becomes_the_one_next_to_it(program: str, theirs: str, ours: str) -> None:
    config = yaml.safe_load(theirs)
    assert programs.program_of(config) == program
    found = programs.convert(config)
    shown = read_toml(ours)
    named = ("data", "model") if program != "axolotl" else ()  # files that the programs find by names of their own
    options = {key: value for key, value in found.options.items() if key not in ("output", *named)}
    assert {**options, "set": found.fields} == {key: value for key, value in shown.items() if key not in named}
    assert found.left_out == {}


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_keys_without_a_counterpart_are_on_the_page(program: str) -> None:
    module = programs.PROGRAMS[program]
    cells = re.findall(r"^\| (.*?) \| ", (DOCS / f"{program}.md").read_text(), re.MULTILINE)
    named = set(re.findall(r"\w+", " ".join(cells)))
    known = {*module.NOTHING, *module.NOT_HERE, *module.REFUSED}
    assert len(known) > 15
    assert known - named == set()
    assert not module.NOTHING & module.NOT_HERE.keys()


@pytest.mark.parametrize("program", programs.PROGRAMS)
def test_the_page_of_examples_says_what_the_program_does(program: str) -> None:
    """docs/coming-from/examples.md is written from configs that are not here; its keys and reasons are the module's."""
    title = {"llama-factory": "LLaMA-Factory"}.get(program, program)
    section = (DOCS / "examples.md").read_text().partition(f"\n## {title}\n")[2].partition("\n## ")[0]
    outcomes = dict(LISTED.findall(section))
    kinds = collections.Counter(outcome.partition(" ")[0] for outcome in outcomes.values())
    counts = f"{kinds['whole']} whole, {kinds['without']} without some keys, {kinds['refused']} refused."
    assert len(outcomes) > 30 and f"{len(outcomes)} in `" in section and counts in section
    module, page = programs.PROGRAMS[program], (DOCS / f"{program}.md").read_text()
    said = set(_texts(inspect.getsource(module)))
    for name, outcome in outcomes.items():
        keys = re.findall(r"`(\w+)", outcome)
        assert not module.NOTHING & {*keys}, name
        assert all(f"`{key}" in page or key == "context_parapllel_size" for key in keys), name  # misspelt by axolotl
        reason = re.search(r"(instead|not here): (.*)$", outcome)
        assert (reason is not None) == outcome.startswith("refused"), name
        assert reason is None or {reason[2], f"none: {reason[2]}"} & said, name
    cases = json.loads(Path(__file__).with_name("converted_configs.json").read_text())
    trained = [case["example"].split("/", 2) for case in cases if case["example"].startswith(f"{program}/")]
    assert trained and all(not outcomes[rest.removeprefix("configs/")].startswith("refused") for *_, rest in trained)


def _texts(source: str) -> Iterator[str]:
    """Yield the texts in a module's source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
