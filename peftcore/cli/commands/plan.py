"""`peftcore plan`: what a method would place on a model, and what it would weigh; no weight is loaded."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli import options
from peftcore.cli.console import say, table
from peftcore.cli.settings import RunOptions, Settings

EXAMPLES = ("peftcore plan -m MODEL --method METHOD --set FIELD=VALUE --full",)

# Options of `train` that change what a step takes.
_OPTIONS = (
    "batch_size",
    "grad_accum",
    "max_length",
    "optim",
    "gradient_checkpointing",
    "dtype",
    "precision",
    "parallel",
)


def plan(
    model: options.Model,
    *,
    method: options.MethodName = None,
    fields: options.Fields = None,
    task: options.Task = None,
    labels: Annotated[str | None, typer.Option(help="For classification: the labels, separated by commas.")] = None,
    given: Annotated[RunOptions, _OPTIONS],
    ranks: options.Ranks = 1,
    device: Annotated[str, typer.Option(help="cpu, this machine, or a card: t4, rtx4090, a100, h100, ...")] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="List every placement.")] = False,
) -> None:
    """Show what would be trained, before anything is, and what a step of training would take."""
    import peftcore
    from peftcore.cli import data, forecast, models
    from peftcore.engine.summary import megabytes
    from peftcore.estimating import NotFollowed

    task = task or (data.CLASSIFICATION if labels else data.LANGUAGE_MODEL)
    data.check_task(task)
    how = forecast.how(task, given.precision, given.parallel, ranks)
    name, chosen = options.resolve_method(method, fields)
    names = tuple(part.strip() for part in labels.split(",")) if labels else ()
    base = models.empty_model(models.resolve(model), task, names)
    planned = peftcore.plan(base, name, **chosen)
    say(str(planned))
    settings = Settings.of(
        given, model=models.resolve(model), data="", task=task, method=name, fields=chosen, device=device
    )
    try:
        found = peftcore.estimate(
            base,
            name,
            step=peftcore.Step(
                batch_size=given.batch_size,
                length=given.max_length,
                optimizer=given.optim,
                gradient_checkpointing=given.gradient_checkpointing,
                gradient_accumulation=given.grad_accum,
                **how,
            ),
            dtype=forecast.dtype_of_base(settings, names),
            device=device,
            **chosen,
        )
        say(f"\n{found}")
    except NotFollowed as error:
        say(f"\nwhat a step takes is not predicted: {error}")
    if full:
        table(
            ((path, kind, f"{count:,}", megabytes(size)) for path, kind, count, size in planned.rows),
            ("where", "what", "parameters", "size"),
        )
