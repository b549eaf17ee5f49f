"""The tutorial's result, written from docs/plugins.md alone, passes its own tests; so does the page's plugin."""

import importlib.util
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import peftcore
from peftcore.registry import registry
from peftcore.testing import CHECKS, COMPILE, check_method

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs/plugins.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
NOT_COMPILED = [name for name in CHECKS if name != COMPILE]


def imported(file: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    spec = importlib.util.spec_from_file_location(file.stem, file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, file.stem, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sparse_gain(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    registry.register("sparse-gain", imported(ROOT / "examples/plugin/peftcore_sparse_gain.py", monkeypatch))
    yield imported(ROOT / "examples/plugin/tests/test_sparse_gain.py", monkeypatch)
    registry.unregister("sparse-gain")


def test_the_tutorials_result(sparse_gain: ModuleType) -> None:
    sparse_gain.test_conformance()
    sparse_gain.test_few_are_left()


def test_the_pages_plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (source,) = [block for block in BLOCKS if "GainConfig:" in block]
    file = tmp_path / "peftcore_gain.py"
    file.write_text(source)
    module = imported(file, monkeypatch)
    registry.register("gain", module)
    try:
        check_method(module.GainConfig(), families=["Qwen2", "GPT-2"], checks=NOT_COMPILED)
    finally:
        registry.unregister("gain")


def test_the_pages_names_and_links() -> None:
    code = "\n".join(BLOCKS)
    for block in BLOCKS:
        compile(block, "docs/plugins.md", "exec")
    for name in re.findall(r"peftcore\.(\w+)", code):
        assert hasattr(peftcore, name) or name == "testing", name
    for name in re.findall(r"`targets\.(\w+)", PAGE):
        assert hasattr(peftcore.targets, name), name
    for target in re.findall(r"\]\(([^)#:]+)\)", PAGE):
        assert (ROOT / "docs" / target).exists(), target
