"""The typer application: the commands of the core and those of plugins, all from the hook `peftcore_commands`.

No command imports torch before it runs, and plugins are imported for the list of commands only if their source
mentions the hook, so that `peftcore --help` answers at once.
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
}  # commands in packages of their own, which may not be installed


def run(words: list[str] | None = None) -> None:
    """Run the command that `words` (by default those of the process) name."""
    warnings.showwarning = show_warning
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels when it is imported
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
    """Print a warning, unless it says what a library will change: that is for its callers (TRL's, at each step)."""
    if not issubclass(category, FutureWarning):
        warn(str(message))


def build(words: list[str]) -> typer.Typer:
    """Return the application. Plugins are imported unless `words` name a command of the core.

    Raises:
        PluginError: the command is in a package that is not installed, or two commands have the same name.
    """
    app = typer.Typer(
        help="Parameter-efficient fine-tuning: an adapter from a model and a file of examples.",
        epilog=_epilog(["peftcore methods", "peftcore train --help"]),
        no_args_is_help=True,
        pretty_exceptions_show_locals=False,
    )
    app.callback()(_options)
    typed = next((word for word in words if not word.startswith("-")), None)
    commands = known_commands(typed)
    if typed in PACKAGES and typed not in commands:
        package = PACKAGES[typed]
        broken = next((each for each in peftcore.plugins() if each.distribution == package and each.error), None)
        if broken is not None:
            raise PluginError(
                f"'peftcore {typed}' cannot run: {package} {broken.version} is not usable: {broken.error}"
            )
        raise PluginError(
            f"'peftcore {typed}' is in a package that is not installed. Run in a copy of peftcore's repository: "
            f"pip install ./plugins/{package}"
        )
    for command in commands.values():
        app.command(
            command.name,
            cls=SuggestingCommand,
            help=_unwrapped(inspect.getdoc(command.function) or ""),
            epilog=_epilog(command.examples),
        )(_with_clear_errors(command.function))
    return app


def _unwrapped(text: str) -> str:
    """Return a docstring with each paragraph in one line; typer would keep the lines' ends."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


def _with_clear_errors(command: Callable[..., object]) -> Callable[..., None]:
    """Return `command` as typer reads it; errors that a user can act on end it with their message alone."""
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
        from peftcore_cli.versions import versions

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
