"""`peftcore methods`: list the installed methods, try them on a model, or show the config of one."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import typing
import warnings
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from peftcore_cli import completion, options
from peftcore_cli.console import NO_METHOD, fail, out, say, table

EXAMPLES = (
    "peftcore methods",
    "peftcore methods METHOD",
    "peftcore methods --for MODEL",
)


def methods(
    name: Annotated[
        str | None, typer.Argument(help="Method whose config fields to show.", autocompletion=completion.methods)
    ] = None,
    for_: Annotated[
        str | None,
        typer.Option(
            "--for",
            metavar="MODEL",
            help="Try every method on this model, and show what it would train, or the reason why it fails.",
        ),
    ] = None,
    task: options.Task = None,
    trust_remote_code: options.TrustRemoteCode = False,  # `app` reads this option
    as_json: options.Json = False,
) -> object:
    """List the installed methods, try them on a model, or show the config fields of one method."""
    import peftcore

    if name is not None and for_ is not None:
        fail(f"--for tries every method. Remove '{name}', or use `peftcore plan` for a single method")
    if name is not None:
        document = _config_of(name)
        if as_json:
            return document
        _show_config(document)
        return None
    installed_methods = peftcore.methods()
    if for_ is not None and installed_methods:
        rows = list(_try_methods(for_, task, list(installed_methods)))
        if as_json:
            return {"model": for_, "methods": rows}
        _show_plans(rows)
        return None
    descriptions = [{"name": name, "description": _first_line(method)} for name, method in installed_methods.items()]
    if as_json:
        return {"methods": descriptions}
    if not installed_methods:
        say(NO_METHOD)
        return None
    table(((row["name"], row["description"]) for row in descriptions), ("method", ""))
    return None


def _config_of(name: str) -> dict[str, Any]:
    """Return the fields of a method's config, their types in words, and their defaults."""
    import peftcore
    from peftcore_cli.fields import describe

    method = peftcore.method(name)
    hints = typing.get_type_hints(method.config_class)
    fields = [field for field in dataclasses.fields(method.config_class) if field.init]
    return {
        "name": method.name,
        "description": _first_line(method),
        "fields": [{"name": field.name, "takes": describe(hints[field.name]), **_default(field)} for field in fields],
        "documentation": inspect.cleandoc(method.config_class.__doc__ or ""),
    }


def _show_config(document: dict[str, Any]) -> None:
    rows = (
        (field["name"], field["takes"], "-" if field["required"] else str(field["default"]))
        for field in document["fields"]
    )
    table(rows, ("field", "takes", "default"))
    if document["documentation"]:
        out.print()
        say(document["documentation"])


def _try_methods(folder: str, task: str | None, names: list[str]) -> Iterator[dict[str, Any]]:
    """Yield the parameters that each method would train with its defaults, or the error."""
    import peftcore
    from peftcore_cli.bases import base_files, models
    from peftcore_cli.tasks import registered

    base = models.empty_model(base_files.resolve(folder), task or registered.default_name())
    for name in names:
        plan, error = None, None
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                plan = peftcore.plan(base, name)
            except peftcore.PeftcoreError as refused:
                error = str(refused)
        yield {
            "name": name,
            "trainable_parameters": None if plan is None else plan.trainable_parameters,
            "trainable_bytes": None if plan is None else plan.trainable_bytes,
            "warnings": [str(warning.message) for warning in caught] if error is None else [],
            "error": error,
        }


def _show_plans(plans: list[dict[str, Any]]) -> None:
    from peftcore_cli.amounts import megabytes

    rows: list[tuple[str, str, str, str]] = []
    for plan in plans:
        if plan["error"] is not None:
            rows.append((plan["name"], "-", "-", plan["error"]))
            continue
        size = megabytes(plan["trainable_bytes"])
        rows.append((plan["name"], f"{plan['trainable_parameters']:,}", size, "; ".join(plan["warnings"])))
    table(rows, ("method", "trains", "size", ""))


def _first_line(method: Any) -> str:
    package = sys.modules.get(method.config_class.__module__.partition(".")[0])
    return (getattr(package, "__doc__", None) or "").strip().partition("\n")[0]


def _default(field: dataclasses.Field[Any]) -> dict[str, Any]:
    if field.default is not dataclasses.MISSING:
        return {"default": field.default, "required": False}
    if field.default_factory is not dataclasses.MISSING:
        return {"default": field.default_factory(), "required": False}
    return {"default": None, "required": True}
