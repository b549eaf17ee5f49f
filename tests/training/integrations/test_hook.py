"""The hook `peftcore_integrations`: when functions run, and errors that name the plugin."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch import nn

import peftcore
from peftcore.plugin import Integration, hookimpl
from peftcore.plugin.registry import registry

INTEGRATIONS = Path(peftcore.__file__).parent / "training" / "integrations"


class Adds:
    """A plugin with one integration."""

    def __init__(self, integration: Any) -> None:
        self.answer = [integration]

    @hookimpl
    def peftcore_integrations(self) -> Any:
        return self.answer


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The name of a library that can be imported, with a class of models."""
    (tmp_path / "steerlib.py").write_text("from torch import nn\n\nclass Steered(nn.Sequential): ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield "steerlib"
    sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, "name", None) != "steerlib"]
    sys.modules.pop("steerlib", None)
    for name in ("steer", "other"):
        registry.unregister(name)


def adapted(model: nn.Module) -> nn.Module:
    return peftcore.apply(model, "lora", target_modules=["0"])


def sequential() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4))


def test_on_import_runs_once_when_an_adapter_meets_the_library(library: str) -> None:
    ran: list[str] = []
    for name in ("steer", "other"):  # two that wait for the same library
        integration = Integration(name=f"{name}-1", library=library, on_import=lambda name=name: ran.append(name))
        registry.register(name, Adds(integration), f"peftcore-{name}", "2.0")
    assert ran == []
    adapted(sequential())
    assert ran == []
    __import__(library)
    assert sorted(ran) == ["other", "steer"]
    adapted(sequential())
    assert len(ran) == 2
    assert not any(getattr(finder, "name", None) == library for finder in sys.meta_path)


def test_on_import_runs_at_apply_if_the_library_is_there(library: str) -> None:
    ran: list[str] = []
    __import__(library)
    integration = Integration(name="steer-2", library=library, on_import=lambda: ran.append("import"))
    registry.register("steer", Adds(integration))
    assert ran == []
    adapted(sequential())
    assert ran == ["import"]


def test_on_apply_gets_models_of_the_library(library: str) -> None:
    got: list[Any] = []
    registry.register("steer", Adds(Integration(name="steer-3", library=f"{library}.deep", on_apply=got.append)))
    steered = __import__(library).Steered(nn.Linear(4, 4))
    adapted(sequential())
    assert got == []
    adapted(steered)
    peftcore.apply(steered, "lora", target_modules=["0"], adapter="second")
    assert got == [steered, steered]


def test_an_integration_that_fails_is_named(library: str) -> None:
    def fail(*_: Any) -> None:
        raise KeyError("Trainer")

    registry.register(
        "steer", Adds(Integration(name="steer-4", library=library, on_import=fail)), "peftcore-steer", "2.0"
    )
    adapted(sequential())
    named = r"`steer-4.on_import` of the plugin 'steer' \(peftcore-steer 2.0\) failed: KeyError"
    for _ in range(2):  # the library is never used without its integration
        with pytest.raises(peftcore.PluginError, match=named):
            __import__(library)


def test_errors_of_peftcore_are_passed_on(library: str) -> None:
    def refuse(model: nn.Module) -> None:
        raise peftcore.PeftcoreError("Steered has no forward. Call it through steer")

    registry.register("steer", Adds(Integration(name="steer-5", library=library, on_apply=refuse)))
    with pytest.raises(peftcore.PeftcoreError, match=r"^Steered has no forward"):
        adapted(__import__(library).Steered(nn.Linear(4, 4)))


def test_two_integrations_with_the_same_name(library: str) -> None:
    registry.register("steer", Adds(Integration(name="trainer", library=library)), "peftcore-steer", "2.0")
    match = r"the plugin 'steer' \(peftcore-steer 2.0\) and peftcore both provide 'trainer'. Rename one"
    with pytest.raises(peftcore.PluginError, match=match):
        adapted(sequential())


@pytest.mark.parametrize("answer", ["steer", 3])
def test_integrations_of_another_type_are_refused(library: str, answer: Any) -> None:
    registry.register("steer", Adds(answer), "peftcore-steer", "2.0")
    with pytest.raises(peftcore.PluginError, match=r"'steer' .* must return a list of peftcore.plugin.Integration"):
        adapted(sequential())


@pytest.mark.nightly
@pytest.mark.parametrize("module", sorted(file.stem for file in INTEGRATIONS.glob("[a-z]*.py")))
def test_each_module_can_be_imported_first(module: str) -> None:
    """A library that a module imports may run the integration that imports the module."""
    code = f"import peftcore.training.integrations.{module}"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
