"""What README shows is true: its plugin passes the conformance suite, its names exist."""

import importlib.util
import re
import sys
from pathlib import Path

import matrix
import pytest

import peftcore
from peftcore.registry import registry
from peftcore.testing import check_method

README = (Path(__file__).parent.parent / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture
def gain(tmp_path: Path, monkeypatch):
    """The module of the README's plugin, registered."""
    (source,) = [block for block in BLOCKS if "peftcore_gain.py" in block]
    assert len(source.splitlines()) <= 40
    file = tmp_path / "peftcore_gain.py"
    file.write_text(source)
    spec = importlib.util.spec_from_file_location("peftcore_gain", file)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "peftcore_gain", module)
    spec.loader.exec_module(module)
    registry.register("gain", module)
    yield module
    registry.unregister("gain")


def test_the_plugin_passes_the_suite(gain) -> None:
    report = check_method(gain.GainConfig())
    assert {result.reason for result in report.results} == {
        None,
        "PEFT has no such method",
        "its adapters share no tensor",
    }


def test_the_table_of_methods_is_that_of_the_conformance_runs() -> None:
    reports = matrix.read()
    assert reports.keys() == registry.methods().keys(), "run: make matrix"
    assert matrix.section(README) == matrix.table(reports), "run: make matrix"


def test_the_names_it_uses_exist() -> None:
    for name in re.findall(r"peftcore\.(\w+)", "\n".join(BLOCKS)):
        assert hasattr(peftcore, name), name


def test_its_links_lead_somewhere() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (root / target).exists(), target
