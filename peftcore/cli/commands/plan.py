"""`peftcore plan`: what a method would place on a model, and what it would weigh; no weight is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli import options
from peftcore.cli.console import say, table

EXAMPLES = ("peftcore plan -m MODEL --method METHOD --set FIELD=VALUE --full",)


def plan(
    model: options.Model,
    method: options.MethodName = None,
    fields: options.Fields = None,
    task: options.Task = None,
    labels: Annotated[str | None, typer.Option(help="For classification: the labels, separated by commas.")] = None,
    full: Annotated[bool, typer.Option("--full", help="List every placement.")] = False,
) -> None:
    """Show what would be trained, before anything is."""
    import peftcore
    from peftcore.cli import data, models
    from peftcore.engine.summary import megabytes

    task = task or (data.CLASSIFICATION if labels else data.LANGUAGE_MODEL)
    data.check_task(task)
    name, chosen = options.resolve_method(method, fields)
    names = tuple(part.strip() for part in labels.split(",")) if labels else ()
    planned = peftcore.plan(models.empty_model(models.resolve(model), task, names), name, **chosen)
    say(str(planned))
    if full:
        table(
            ((path, kind, f"{count:,}", megabytes(size)) for path, kind, count, size in planned.rows),
            ("where", "what", "parameters", "size"),
        )
