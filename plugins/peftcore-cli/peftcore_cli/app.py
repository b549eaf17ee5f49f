"""The typer application. The core and plugins register their commands through the hook `peftcore_commands`.

To keep `peftcore --help` fast, commands import torch when they run, and a plugin is only imported to list its commands
if its source mentions the hook.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import logging
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.markup import escape

import peftcore
from peftcore.errors import PeftcoreError, PluginError
from peftcore.plugin import builtin, commands as known_commands
from peftcore_cli import arguments, console, core_commands, signatures
from peftcore_cli.console import fail, printable, warn
from peftcore_cli.synonyms import SuggestingCommand

builtin(core_commands)
PACKAGES = {
    "compare": "peftcore-compare",
    "serve": "peftcore-serve",
}  # commands in separate packages, which may not be installed


def run(words: list[str] | None = None) -> None:
    """Run a command line; `words` defaults to the arguments of the process."""
    warnings.showwarning = show_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # hides bitsandbytes' warning about kernels on import
    words = sys.argv[1:] if words is None else words
    try:
        app = build(words)
    except PluginError as error:
        sys.exit(printable(f"peftcore: error: {error}"))
    try:
        app(words, prog_name="peftcore")
    except Exception:  # typer's own traceback would not escape control characters in the message
        sys.exit(printable(traceback.format_exc()))


def show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    """Print a warning. FutureWarnings are dropped: they address developers, and TRL raises one at each step."""
    if not issubclass(category, FutureWarning):
        warn(str(message))


def build(words: list[str]) -> typer.Typer:
    """Return the application. Plugins are not imported if `words` start with a command of the core.

    Raises:
        PluginError: the command is in a package that is not installed, or two commands have the same name.
    """
    app = typer.Typer(
        help="Parameter-efficient fine-tuning: train an adapter for a model on a file of examples.",
        epilog=_epilog(["peftcore methods", "peftcore train --help"]),
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_options)
    command_name = next((word for word in words if not word.startswith("-")), None)
    commands = known_commands(command_name)
    if command_name in PACKAGES and command_name not in commands:
        package = PACKAGES[command_name]
        broken_plugin = next(
            (plugin for plugin in peftcore.plugins() if plugin.distribution == package and plugin.error), None
        )
        if broken_plugin is not None:
            raise PluginError(
                f"'peftcore {command_name}' cannot run, because the package {package} {broken_plugin.version} is "
                f"broken: {broken_plugin.error}"
            )
        raise PluginError(
            f"'peftcore {command_name}' is in a package that is not installed. Run in a copy of peftcore's "
            f"repository: pip install ./plugins/{package}"
        )
    for command in commands.values():
        app.command(
            command.name,
            cls=SuggestingCommand,
            help=_unwrap(inspect.getdoc(command.function) or ""),
            epilog=_epilog(command.examples),
        )(_with_clear_errors(command.function))
    return app


def _unwrap(text: str) -> str:
    """Return a docstring with each paragraph on one line, because typer keeps line breaks."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _with_clear_errors(command: Callable[..., object]) -> Callable[..., None]:
    """Return the function that typer runs for `command`. It prints a PeftcoreError as a message without a traceback."""
    command = signatures.expand(command)

    @functools.wraps(command)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        try:
            arguments.check(kwargs)
            if "trust_remote_code" in kwargs:
                from peftcore_cli.bases import base_files

                base_files.trust_remote_code(bool(kwargs["trust_remote_code"]))
            if not kwargs.get("as_json"):
                command(*args, **kwargs)
                return
            with contextlib.redirect_stdout(sys.stderr):
                document = command(*args, **kwargs)
            console.print_json(document)
        except PeftcoreError as error:
            fail(str(error))
        except OSError as error:
            message = arguments.refusal(error)
            if message is None:
                raise
            fail(message)
        except BaseException as error:
            if (
                type(error).__name__ != "PanicException"
            ):  # raised by libraries in Rust; a BaseException, but no Exception
                raise
            fail(f"the tokenizer cannot read the text: {str(error)[:400]}")

    return wrapped


def _epilog(examples: Sequence[str]) -> str:
    """Return the examples as text for typer: one paragraph each, with markup escaped."""
    return "\n\n".join(["Examples:", *(escape(example) for example in examples)])


def _show_versions(is_requested: bool) -> None:
    if is_requested:
        from peftcore_cli.versions import versions

        for name, version in versions():
            console.say(f"{name} {version}")
        raise typer.Exit


def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_versions, help=("Show versions and the SIMD level, and exit.")
        ),
    ] = False,
) -> None:
    pass
