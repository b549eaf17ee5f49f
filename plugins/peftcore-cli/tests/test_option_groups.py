"""The help of commands: what people use first, and everything in groups."""

from __future__ import annotations

import re
from typing import Any

import pytest
import typer
from peftcore_cli import core_commands
from peftcore_cli.app import build
from peftcore_cli.option_groups import DATA, EVALUATION, MEMORY, MODEL, OUTPUT, TASK, TRAINING
from support.commands import Run

FIRST = {
    "--batch-size",
    "--data",
    "--epochs",
    "--lr",
    "--max-length",
    "--method",
    "--model",
    "--output",
    "--quantize",
    "--set",
}
COMMANDS = [command.name for command in core_commands.peftcore_commands()]


def options(output: str) -> set[str]:
    """Return the options that a panel of the help has in its first column."""
    return set(re.findall(r"^│ [* ]* *(--[a-z-]+)", output, re.MULTILINE))


def test_help_of_train_shows_ten_options(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    output = run("train", "--help").output
    assert options(output) == {*FIRST, "--help"}
    assert len(output.splitlines()) < 80
    more = int(re.search(r"(\d+) more options: peftcore train --help-all", output)[1])
    assert len(options(run("train", "--help-all").output)) == len(FIRST) + 1 + more


def test_all_options_are_in_groups(run: Run) -> None:
    output = run("train", "--help-all").output
    titles = re.findall(r"^╭─ ([A-Z][a-z ]+) ─", output, re.MULTILINE)
    assert titles == ["Options", DATA, MODEL, TASK, TRAINING, EVALUATION, MEMORY, OUTPUT]


def test_few_options_are_in_one_list(run: Run) -> None:
    output = run("merge", "--help").output
    assert "--dtype" in options(output) and "--help-all" not in output


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_a_text(name: str) -> None:
    group: Any = typer.main.get_command(build([name]))
    command = group.commands[name]
    assert [param.name for param in command.params if not param.help] == []
