"""`peftcore plan`: what a method would place on a model, and its memory, without loading weights."""

from __future__ import annotations

from typing import Annotated

import typer

from peftcore.cli import options
from peftcore.cli.console import say, table
from peftcore.cli.settings import RunOptions, Settings

EXAMPLES = ("peftcore plan -m MODEL --method METHOD --set FIELD=VALUE --full",)

# Options of `train` that change a step's memory.
_OPTIONS = (
    "batch_size",
    "grad_accum",
    "max_length",
    "optim",
    "gradient_checkpointing",
    "dtype",
    "precision",
    "parallel",
    "without_logits",
    "fuse",
    "recompute",
    "trust_remote_code",
)


def plan(
    model: options.Model,
    *,
    method: options.MethodName = None,
    fields: options.Fields = None,
    task: options.Task = None,
    labels: options.PlannedLabels = None,
    data: options.PlannedData = None,
    given: Annotated[RunOptions, _OPTIONS],
    ranks: options.Ranks = 1,
    tp_size: options.TensorParallel = 1,
    device: Annotated[
        str, typer.Option(help="Device: cpu (this machine), or a GPU: t4, rtx4090, a100, h100, ...")
    ] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="List every placement.")] = False,
) -> None:
    """Show what would be trained, and what a training step would need, before training."""
    import peftcore
    from peftcore.cli.amounts import megabytes
    from peftcore.cli.bases import base_files, models
    from peftcore.cli.training import forecast, training_run  # noqa: F401  # the memory of what `train` imports counts
    from peftcore.estimating import NotFollowed

    task, names = options.planned_task(task, data, labels)
    how = forecast.how(task, given.precision, given.parallel, ranks, tp_size)
    name, chosen = options.resolve_method(method, fields)
    base = models.empty_model(base_files.resolve(model), task, names)
    planned = peftcore.plan(base, name, **chosen)
    say(str(planned))
    settings = Settings.of(
        given, model=base_files.resolve(model), data=data or "", task=task, method=name, fields=chosen, device=device
    )
    why = forecast.unknown(task)
    try:
        if why is not None:
            raise NotFollowed(why)
        found = peftcore.estimate(
            base,
            name,
            step=peftcore.Step(
                batch_size=given.batch_size,
                length=forecast.tokens_of_step(given.max_length, task, base.config),
                optimizer=given.optim,
                gradient_checkpointing=given.gradient_checkpointing,
                gradient_accumulation=given.grad_accum,
                without_logits=forecast.is_without_logits(settings),
                fused=forecast.is_fused(settings),
                recompute=given.recompute,
                **{**how, **forecast.of_data(settings)},
            ),
            dtype=forecast.dtype_of_base(settings, names),
            device=device,
            **chosen,
        )
        say(f"\n{found}")
    except NotFollowed as error:
        say(f"\nthe memory of a step is not predicted: {error}")
    if full:
        table(
            ((path, kind, f"{count:,}", megabytes(size)) for path, kind, count, size in planned.rows),
            ("where", "what", "parameters", "size"),
        )
