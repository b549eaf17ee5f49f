"""The tutorial's result, written from docs/plugins.md alone, passes its own tests; so does the page's plugin."""

import importlib.util
import re
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from support.whole_run import WHOLE

import peftcore
from peftcore.plugin.registry import registry
from peftcore.testing import CHECKS, COMPILE, check_method

ROOT = Path(__file__).parent.parent
PAGES = [(ROOT / f"docs/{name}.md").read_text() for name in ("plugins", "plugin-contract", "plugin-hooks")]
BLOCKS = re.findall(r"```python\n(.*?)```", "\n".join(PAGES), re.DOTALL)
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
    test = imported(ROOT / "examples/plugin/tests/test_sparse_gain.py", monkeypatch)
    if not WHOLE:
        monkeypatch.setattr(test, "check_method", partial(check_method, families=("Llama",)))
    yield test
    registry.unregister("sparse-gain")


def test_the_tutorials_result(sparse_gain: ModuleType) -> None:
    sparse_gain.test_conformance()
    sparse_gain.test_most_outputs_are_pruned()


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


@pytest.fixture
def from_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], None]]:
    """Register under a name the plugin of the page whose source contains a text."""
    names: list[str] = []

    def register(name: str, text: str) -> None:
        (source,) = [block for block in BLOCKS if text in block]
        (tmp_path / f"peftcore_{name}.py").write_text(source)
        registry.register(name, imported(tmp_path / f"peftcore_{name}.py", monkeypatch))
        names.append(name)

    yield register
    for name in names:
        registry.unregister(name)


def test_the_pages_command(from_page: Any, tmp_path: Path) -> None:
    from support import tiny
    from support.commands import invoke

    from_page("count", "[Command(")
    peftcore.save(peftcore.apply(tiny.llama(), "lora", target_modules=["q_proj"], r=2), tmp_path / "run")
    held = 2 * 2 * (32 + 32)  # layers, r, in + out
    assert invoke("count", tmp_path / "run").output.strip() == f"{held}"
    assert invoke("count", tmp_path / "run", "--thousands").output.strip() == f"{held / 1000:.1f} thousand"
    assert "has no adapter_model.safetensors. Pass an adapter's folder" in invoke("count", tmp_path).stderr
    assert "peftcore count run/adapter --thousands" in invoke("count", "--help").output


def test_the_pages_integration(from_page: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from support import tiny

    (tmp_path / "ponder.py").write_text("def freeze(model):\n    return 'frozen'\n")
    monkeypatch.syspath_prepend(tmp_path)
    from_page("ponder", "[Integration(")
    model = tiny.llama()
    peftcore.apply(model, "lora", target_modules=["q_proj"])
    import ponder

    try:
        assert ponder.freeze(tiny.llama()) == "frozen"
        with pytest.raises(peftcore.PeftcoreError, match=r"would ignore adapters. Merge them first"):
            ponder.freeze(model)
    finally:
        sys.modules.pop("ponder")


def test_the_pages_export_format(from_page: Any, tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 2))
    from_page("npz", "NpzOptions")
    found = np.load(peftcore.export(model, tmp_path / "x" / "model.npz", format="npz", compressed=True))
    assert sorted(found) == ["0.bias", "0.weight"]
    assert np.array_equal(found["0.weight"], model[0].weight.detach().numpy())


def test_the_pages_architecture(from_page: Any) -> None:
    class TinyGPT(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.body, self.head = torch.nn.Embedding(9, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 9)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.body(self.embed(x)))

    def adapted() -> int:
        (adapter,) = peftcore.summary(peftcore.apply(TinyGPT(), "lora", r=2)).adapters
        return adapter.modules

    assert adapted() == 2
    from_page("tiny_gpt", "TinyGPT")
    assert adapted() == 1  # the head is known, and left out
