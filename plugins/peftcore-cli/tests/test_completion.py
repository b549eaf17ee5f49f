"""What Tab offers."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from peftcore_cli import app, completion

from peftcore.plugin import discovery


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run, an adapter, and what is neither."""
    for folder in ("runs/one/adapter", "runs/two", "runs/.hidden"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "adapter_config.json").touch()
    (tmp_path / "rest").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        ("", ["runs/one", "runs/two"]),
        ("ru", ["runs/one", "runs/two"]),
        ("runs/t", ["runs/two"]),
        ("./r", ["./runs/one", "./runs/two"]),
        ("name=runs/o", ["name=runs/one"]),
        ("rest", []),
        ("nowhere/", []),
    ],
)
def test_runs_and_adapters(runs: Path, typed: str, offered: list[str]) -> None:
    assert completion.adapters(typed) == offered


def test_folders_from_home_and_from_the_root(runs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(runs))
    assert completion.adapters("~/runs/o") == ["~/runs/one"]
    assert completion.adapters(f"{runs}/runs/t") == [f"{runs}/runs/two"]


def test_methods_are_known_without_an_import(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "lora" in completion.methods("lo")
    assert completion.methods("lorra") == []
    points = [SimpleNamespace(name=name, module=module) for name, module in (("no", "json"), ("maybe", "not_there"))]
    monkeypatch.setattr(discovery, "entry_points", lambda group: points)
    assert completion.methods("") == ["maybe"]


def test_the_shell_is_answered(runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("_PEFTCORE_COMPLETE", "complete_bash")
    for words, offered in (
        ("peftcore train --method bit", "bitfit"),
        ("peftcore eval runs/o", "runs/one"),
        ("peftcore info runs/t", "runs/two"),
        ("peftcore plug", "plugins"),
    ):
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            app.run([])
        assert capsys.readouterr().out.split() == [offered]
