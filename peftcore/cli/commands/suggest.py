"""`peftcore suggest`: which ways of training fit into a memory, and how long each takes; no weight is loaded."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from peftcore.cli import options
from peftcore.cli.console import say
from peftcore.cli.settings import RunOptions, Settings

EXAMPLES = (
    "peftcore suggest -m MODEL --memory 24GB --device rtx4090 --max-length 2048 --examples 10000",
    "peftcore suggest -m MODEL --method METHOD --rank 8 --rank 64",
)


def suggest(
    model: options.Model,
    memory: Annotated[
        str | None, typer.Option(help="Such as 24GB; default the device's, of this machine what is free.")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, this machine, or a card: t4, rtx4090, a100, h100, ...")] = "cpu",
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Repeatable; default those installed that have a rank.")
    ] = None,
    rank: Annotated[list[int] | None, typer.Option("--rank", min=1, help="Repeatable; default 16.")] = None,
    *,
    task: options.Task = None,
    labels: Annotated[str | None, typer.Option(help="For classification: the labels, separated by commas.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="How many there are, for the time of an epoch.")] = 1000,
    given: Annotated[RunOptions, ("max_length", "dtype", "precision", "parallel")],
    ranks: options.Ranks = 1,
) -> None:
    """Look for ways to train a model in so much memory, and print the commands for them.

    Each way is a step of training that was run without memory. Times on cards are guesses from their data sheets.
    """
    import peftcore
    from peftcore.cli import data, forecast, models

    task = task or (data.CLASSIFICATION if labels else data.LANGUAGE_MODEL)
    data.check_task(task)
    names = tuple(part.strip() for part in labels.split(",")) if labels else ()
    base = models.resolve(model)
    settings = Settings.of(given, model=base, data="", task=task, method="", device=device)
    found = peftcore.suggest(
        models.load_config(base, task, names),
        memory=memory,
        device=device,
        examples=examples,
        methods=method,
        r=rank or (16,),
        dtype=forecast.dtype_of_base(settings, names),
        length=given.max_length,
        **forecast.how(task, given.precision, given.parallel, ranks),
    )
    say(str(found))
    say("\nto train in the first of these ways:", "bold")
    chosen = [*found.ways[0].options(), "--max-length", str(given.max_length)]
    as_what = "bf16" if device != "cpu" and given.dtype == given.precision == "auto" else given.dtype
    shown = {"task": task, "dtype": as_what, "precision": given.precision, "parallel": given.parallel}
    for name, value in shown.items():
        if value not in (None, "auto") and (name != "task" or value == data.PREFERENCES):
            chosen += [f"--{name}", value]
    start = "peftcore" if given.parallel is None else f"torchrun --nproc-per-node {ranks} -m peftcore"
    say(f"  {start} train -m {shlex.quote(model)} -d DATA -o RUN {shlex.join(chosen)}")
