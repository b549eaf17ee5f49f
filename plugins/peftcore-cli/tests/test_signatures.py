"""Options from dataclasses: what typer reads, what a command gets, and that an option is defined once."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Any

import pytest
import typer
from peftcore_cli import app, signatures
from peftcore_cli.settings import Display, RunOptions
from typer.testing import CliRunner


@dataclass(frozen=True, kw_only=True)
class Given:
    rate: Annotated[float, typer.Option(min=0, help="Learning rate.")]
    steps: Annotated[int | None, typer.Option("--steps", "-s", help="Steps.")] = None
    names: Annotated[list[str] | None, typer.Option(help="Names.")] = None
    keep: Annotated[int, typer.Option(help="Checkpoints.")] = 2


def called(words: list[str], command: Any) -> int:
    application = typer.Typer()
    application.command()(signatures.expand(command))
    return CliRunner().invoke(application, words).exit_code


def test_each_field_is_an_option_with_its_own_type_default_and_names() -> None:
    got: list[Any] = []

    def command(output: str, *, given: Given, force: bool = False) -> None:
        got.append((output, given, force))

    assert called(["out", "--rate", "0.5", "-s", "3", "--names", "a", "--names", "b", "--force"], command) == 0
    assert called(["out", "--rate", "1"], command) == 0
    assert got == [("out", Given(rate=0.5, steps=3, names=["a", "b"]), True), ("out", Given(rate=1.0), False)]
    assert called(["out"], command) == 2  # rate is required
    assert called(["out", "--rate", "-1"], command) == 2  # and at least 0


def test_a_command_may_name_the_fields_that_are_its_options() -> None:
    got: list[Any] = []

    def command(given: Annotated[Given, ("steps", "rate")]) -> None:
        got.append(given)

    assert called(["--rate", "1", "--steps", "4"], command) == 0 and got == [Given(rate=1.0, steps=4)]
    assert called(["--rate", "1", "--keep", "4"], command) == 2


def test_a_command_without_dataclasses_stays_as_it_is() -> None:
    def command(output: str) -> None:
        pass

    assert signatures.expand(command) is command


@pytest.mark.parametrize("name", ["train", "plan"])
def test_commands_have_the_options_of_the_dataclass(name: str) -> None:
    command: Any = typer.main.get_command(app.build([name])).commands[name]
    options = {option.name: option for option in command.params}
    shared = {field.name for field in fields(RunOptions)} | {field.name for field in fields(Display)}
    if name == "train":
        assert shared <= options.keys()
    assert all(option.help for option in options.values())
