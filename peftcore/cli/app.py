"""The typer application: the commands of the core, one file each, and those that plugins add.

No command imports torch before it runs, and a plugin is imported for the list of commands only if its
source mentions `peftcore_commands`, so that `peftcore --help` answers at once.
"""

from __future__ import annotations

import functools
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any

import typer
from rich.markup import escape

from peftcore.cli import arguments, completion, console, signatures
from peftcore.cli.commands import (
    chat,
    compare,
    doctor,
    evaluate,
    export,
    generate,
    info,
    merge,
    methods,
    new_plugin,
    plan,
    plugins,
    suggest,
    train,
)
from peftcore.cli.console import fail, warn
from peftcore.errors import PeftcoreError

# What runs it, and examples for the end of its --help.
COMMANDS: dict[str, tuple[Callable[..., None], Sequence[str]]] = {
    "train": (train.train, train.EXAMPLES),
    "compare": (compare.compare, compare.EXAMPLES),
    "eval": (evaluate.evaluate, evaluate.EXAMPLES),
    "generate": (generate.generate, generate.EXAMPLES),
    "chat": (chat.chat, chat.EXAMPLES),
    "merge": (merge.merge, merge.EXAMPLES),
    "export": (export.export, export.EXAMPLES),
    "plan": (plan.plan, plan.EXAMPLES),
    "suggest": (suggest.suggest, suggest.EXAMPLES),
    "info": (info.info, info.EXAMPLES),
    "methods": (methods.methods, methods.EXAMPLES),
    "plugins": (plugins.plugins, plugins.EXAMPLES),
    "new-plugin": (new_plugin.new_plugin, new_plugin.EXAMPLES),
    "doctor": (doctor.doctor, doctor.EXAMPLES),
}
HOOK = "peftcore_commands"


def run(words: list[str] | None = None) -> None:
    """Run the command that `words` (by default those of the process) name."""
    warnings.showwarning = lambda message, *_, **__: warn(str(message))
    words = sys.argv[1:] if words is None else words
    build(words)(words, prog_name="peftcore")


def build(words: list[str]) -> typer.Typer:
    """Return the application. Plugins are asked for commands unless `words` name one of the core's."""
    app = typer.Typer(
        help="Parameter-efficient fine-tuning: an adapter from a model and a file of examples.",
        epilog=_epilog(["peftcore methods", "peftcore train --help"]),
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_options)
    for name, (command, examples) in COMMANDS.items():
        app.command(name, epilog=_epilog(examples))(_with_clear_errors(command))
    named = next((word for word in words if not word.startswith("-")), None)
    if named not in COMMANDS and any(completion.mentions(point, HOOK) for point in entry_points(group="peftcore")):
        from peftcore.registry import registry

        for _ in registry.answers("peftcore_commands", contain=True, app=app):
            pass
    return app


def _with_clear_errors(command: Callable[..., None]) -> Callable[..., None]:
    """Return `command` as typer reads it; errors that a user can act on end it with their message alone."""
    command = signatures.expand(command)

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            arguments.check(kwargs)
            command(*args, **kwargs)
        except PeftcoreError as error:
            fail(str(error))
        except OSError as error:
            refused = arguments.refusal(error)
            if refused is None:
                raise
            fail(refused)
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of a library in Rust: no Exception
                raise
            fail(f"the tokenizer cannot read the text: {str(error)[:400]}")

    return wrapped


def _epilog(examples: Sequence[str]) -> str:
    """Examples as typer prints them: paragraphs, without markup."""
    return "\n\n".join(["Examples:", *(escape(example) for example in examples)])


def _show_versions(wanted: bool) -> None:
    if wanted:
        from peftcore.cli.versions import versions

        for name, found in versions():
            console.say(f"{name} {found}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_versions, help="Show versions, and the SIMD level."),
    ] = False,
) -> None:
    pass
