"""What reaches the terminal: control characters in names and texts of strangers are escaped where they are printed."""

from __future__ import annotations

import io
import json
import logging
import warnings
from pathlib import Path

import pytest
import torch
import typer
from peftcore_cli import console
from peftcore_cli.app import run as run_app
from safetensors.torch import save_file
from support.commands import Run

import peftcore

RENAME = "\x1b]0;title\x07"  # renames the window of a terminal
ESCAPED = "\\x1b]0;title\\x07"


def test_control_characters_are_escaped() -> None:
    assert console.printable("a\x1b[2Jb\rc\x9b\x7f\u202e\udce9") == "a\\x1b[2Jb\\rc\\x9b\\x7f\\u202e\\udce9"
    kept = "é\t\n\u200d\U0001f600 \\x1b"
    assert console.printable(kept) == kept


@pytest.mark.parametrize("is_terminal", [False, True])
def test_everything_that_a_console_prints_is_escaped(is_terminal: bool) -> None:
    file = io.StringIO()
    printer = console.Console(file=file, force_terminal=is_terminal, width=80, color_system=None)
    printer.print(RENAME, style="bold")
    with printer.status(RENAME):
        pass
    assert "]0;title" in file.getvalue() and RENAME[:-1] not in file.getvalue()


def test_every_way_to_print_is_escaped(capsys: pytest.CaptureFixture[str]) -> None:
    for function in (console.say, console.warn, console.note):
        function(RENAME)
    console.table([(RENAME,)], (RENAME,), title=RENAME)
    with pytest.raises(typer.Exit):
        console.fail(RENAME)
    captured = capsys.readouterr()
    text = captured.out + captured.err
    assert "\x1b" not in text and text.count("\\x1b]0;title") == 7 and text.count("\\x07") >= 6


def test_what_a_model_writes_reaches_a_file_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    console.print_answer("a\r\n\x1b")
    assert capsys.readouterr().out == "a\r\n\x1b\n"


def test_a_model_s_answer_is_escaped_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    file = io.StringIO()
    monkeypatch.setattr(console, "out", console.Console(file=file, force_terminal=True, color_system=None))
    console.print_answer(RENAME)
    assert file.getvalue() == f"{ESCAPED}\n"


def test_a_log_is_escaped() -> None:
    record = logging.LogRecord("peftcore", logging.ERROR, "", 0, "%s", (RENAME,), None)
    assert console.LogFormatter().format(record) == ESCAPED


def test_names_in_an_adapter(run: Run, tmp_path: Path) -> None:
    folder = tmp_path / f"a{RENAME}"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 1, "target_modules": [RENAME], "base_model_name_or_path": RENAME}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    save_file({f"{RENAME}.lora_A.weight": torch.ones(1, 4)}, folder / "adapter_model.safetensors")
    found = run("info", folder)
    text = found.stdout + found.stderr
    assert "\\x1b]0;title" in text and "\x1b]0;title" not in text


def test_a_key_in_a_file_of_config(run: Run, tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('"\\u001b]0;title\\u0007" = 1\n')
    found = run("train", "--config", file, "-o", tmp_path / "run", code=2)
    assert "\\x1b]0;title" in found.stderr and "\x1b]0;title" not in found.stderr


def test_an_error_that_no_command_expects(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails() -> None:
        raise RuntimeError(RENAME)

    monkeypatch.setattr("peftcore_cli.versions.versions", fails)
    with pytest.raises(SystemExit, match=r"RuntimeError: \\x1b\]0;title\\x07"):
        run_app(["--version"])


def test_an_error_of_a_plugin(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(_words: list[str]) -> None:
        raise peftcore.PluginError(RENAME)

    monkeypatch.setattr("peftcore_cli.app.build", fails)
    with pytest.raises(SystemExit, match=r"peftcore: error: \\x1b\]0;title\\x07"):
        run_app(["--version"])


def test_a_warning_is_escaped(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def warns() -> list[tuple[str, str]]:
        warnings.warn(RENAME, stacklevel=1)
        return []

    monkeypatch.setattr("peftcore_cli.versions.versions", warns)
    with warnings.catch_warnings(), pytest.raises(SystemExit):
        warnings.simplefilter("always")
        run_app(["--version"])
    assert capsys.readouterr().err == f"warning: {ESCAPED}\n"


@pytest.mark.parametrize("ranks, program", [("1", "peftcore"), ("2", "torchrun --nproc-per-node 2 -m peftcore_cli")])
def test_the_command_that_resumes(ranks: str, program: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["peftcore", "train", "-o", "a run", "--overwrite"])
    monkeypatch.setenv("WORLD_SIZE", ranks)
    assert console.command(resume=True) == f"{program} train -o 'a run' --resume"
