"""`peftcore methods`: the installed methods, and the fields of one's config."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Annotated, Any

import typer

from peftcore.cli import completion
from peftcore.cli.console import NO_METHOD, out, say, table

EXAMPLES = (
    "peftcore methods",
    "peftcore methods METHOD",
)


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Show this method's fields.", autocompletion=completion.methods)
    ] = None,
) -> None:
    """List the installed methods, or with a name the fields that --set can give."""
    from peftcore.registry import registry

    if name is None:
        rows = [
            (method.name, f"{plugin.distribution} {plugin.version}", method.state.peft_type, _first_line(method))
            for plugin in registry.plugins()
            for method in plugin.methods
        ]
        if not rows:
            say(NO_METHOD)
            return
        table(rows, ("method", "from", "peft_type", ""))
        return
    from peftcore.cli.fields import describe

    config = registry.method(name).config_class
    hints = typing.get_type_hints(config)
    table(
        ((f.name, describe(hints[f.name]), _default(f)) for f in dataclasses.fields(config) if f.init),
        ("field", "takes", "default"),
    )
    if config.__doc__:
        out.print()
        say(inspect.cleandoc(config.__doc__))


def _first_line(method: Any) -> str:
    module = inspect.getmodule(method.config_class)
    return (getattr(module, "__doc__", None) or "").strip().partition("\n")[0]


def _default(field: dataclasses.Field[Any]) -> str:
    if field.default is not dataclasses.MISSING:
        return str(field.default)
    return "-" if field.default_factory is dataclasses.MISSING else str(field.default_factory())
