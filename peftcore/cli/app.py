"""The typer application: the commands of the core, one file each, and those that plugins add.

No command imports torch before it runs, and a plugin is imported for the list of commands only if its
source mentions `peftcore_commands`, so that `peftcore --help` answers at once.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import typer

from peftcore.cli.commands import (
    chat,
    compare,
    doctor,
    evaluate,
    generate,
    info,
    merge,
    methods,
    new_plugin,
    plan,
    plugins,
    train,
)
from peftcore.cli.console import fail, warn
from peftcore.errors import PeftcoreError

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "compare": compare.compare,
    "eval": evaluate.evaluate,
    "generate": generate.generate,
    "chat": chat.chat,
    "merge": merge.merge,
    "plan": plan.plan,
    "info": info.info,
    "methods": methods.methods,
    "plugins": plugins.plugins,
    "new-plugin": new_plugin.new_plugin,
    "doctor": doctor.doctor,
}
HOOK = "peftcore_commands"


def run(arguments: list[str] | None = None) -> None:
    """Run the command that `arguments` (by default those of the process) name."""
    warnings.showwarning = lambda message, *_, **__: warn(str(message))
    arguments = sys.argv[1:] if arguments is None else arguments
    build(arguments)(arguments, prog_name="peftcore")


def build(arguments: list[str]) -> typer.Typer:
    """The application. Plugins are asked for commands unless `arguments` name one of the core's."""
    app = typer.Typer(
        help="Parameter-efficient fine-tuning: an adapter from a model and a file of examples.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_show_locals=False,
    )
    for name, command in COMMANDS.items():
        app.command(name)(_with_clear_errors(command))
    named = next((argument for argument in arguments if not argument.startswith("-")), None)
    if named not in COMMANDS and any(map(_mentions_commands, entry_points(group="peftcore"))):
        from peftcore.registry import registry

        for _ in registry.answers("peftcore_commands", contain=True, app=app):
            pass
    return app


def _with_clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Errors that a user can act on end the command with their message alone."""

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except PeftcoreError as error:
            fail(str(error))

    return wrapped


def _mentions_commands(entry_point: EntryPoint) -> bool:
    """May this plugin add commands? Read off its source, without running it; where that fails, yes."""
    try:
        spec = find_spec(entry_point.module)
        return spec is None or spec.origin is None or HOOK in Path(spec.origin).read_text(encoding="utf-8")
    except Exception:  # whatever a broken plugin does; the registry reports it
        return True
