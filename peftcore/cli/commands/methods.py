"""`peftcore methods`: the installed methods, which of them work on a model, and the fields of a method's config."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from peftcore.cli import completion, options
from peftcore.cli.console import NO_METHOD, fail, out, say, table

EXAMPLES = (
    "peftcore methods",
    "peftcore methods METHOD",
    "peftcore methods --for MODEL",
)


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method whose fields to show.", autocompletion=completion.methods)
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for", metavar="MODEL", help="Model to try every method on, showing what each trains or why it cannot."
        ),
    ] = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,  # the application reads it
) -> None:
    """List the installed methods, those that work on a model, or the fields of one for --set."""
    import peftcore

    if name is not None and for_ is not None:
        fail(f"--for tries every method. Leave out '{name}', or use `peftcore plan` for a single method")
    if name is None:
        found = peftcore.methods()
        if not found:
            say(NO_METHOD)
        elif for_ is None:
            table(((name, _first_line(method)) for name, method in found.items()), ("method", ""))
        else:
            table(_tried(for_, task, list(found)), ("method", "trains", "size", ""))
        return
    from peftcore.cli.fields import describe

    config = peftcore.method(name).config_class
    hints = typing.get_type_hints(config)
    table(
        ((f.name, describe(hints[f.name]), _default(f)) for f in dataclasses.fields(config) if f.init),
        ("field", "takes", "default"),
    )
    if config.__doc__:
        out.print()
        say(inspect.cleandoc(config.__doc__))


def _tried(folder: str, task: str | None, names: list[str]) -> Iterator[tuple[str, str, str, str]]:
    """Yield each method's trainable parameters and bytes with its defaults, or the error."""
    import peftcore
    from peftcore.cli.amounts import megabytes
    from peftcore.cli.bases import base_files, models
    from peftcore.cli.tasks import registered

    base = models.empty_model(base_files.resolve(folder), task or registered.without_a_name())
    for name in names:
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            try:
                planned = peftcore.plan(base, name)
            except peftcore.PeftcoreError as error:
                yield name, "-", "-", str(error)
                continue
        notes = "; ".join(str(each.message) for each in warned)
        yield name, f"{planned.trainable_parameters:,}", megabytes(planned.trainable_bytes), notes


def _first_line(method: Any) -> str:
    package = sys.modules.get(method.config_class.__module__.partition(".")[0])
    return (getattr(package, "__doc__", None) or "").strip().partition("\n")[0]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "-" if field.default_factory is dataclasses.MISSING else str(field.default_factory())
