"""`peftcore plan`: what a method would place on a model, and its memory, without loading weights."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Annotated

import typer

from peftcore_cli import options
from peftcore_cli.console import say, table
from peftcore_cli.settings import RunOptions, Settings

if TYPE_CHECKING:
    from peftcore import Estimate, Plan

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
    as_json: options.Json = False,
) -> object:
    """Show what would be trained, and what a training step would need, before training."""
    import peftcore
    from peftcore.estimating import NotFollowed
    from peftcore_cli.amounts import megabytes
    from peftcore_cli.bases import base_files, models
    from peftcore_cli.training import forecast, training_run  # noqa: F401  # the memory of what `train` imports counts

    task, names = options.planned_task(task, data, labels)
    how = forecast.how(task, given.precision, given.parallel, ranks, tp_size)
    name, chosen = options.resolve_method(method, fields)
    base = models.empty_model(base_files.resolve(model), task, names)
    planned = peftcore.plan(base, name, **chosen)
    if not as_json:
        say(str(planned))
    settings = Settings.of(
        given, model=base_files.resolve(model), data=data or "", task=task, method=name, fields=chosen, device=device
    )
    why, found = forecast.unknown(task), None
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
    except NotFollowed as error:
        why = str(error)
    if as_json:
        memory = {"memory": found and _memory(found), "memory_unknown": None if found else why}
        return {"model": model, "task": task, **_placements(planned), **memory}
    say(f"\nthe memory of a step is not predicted: {why}" if found is None else f"\n{found}")
    if full:
        table(
            ((path, kind, f"{count:,}", megabytes(size)) for path, kind, count, size in planned.rows),
            ("where", "what", "parameters", "size"),
        )
    return None


def _placements(planned: Plan) -> dict[str, object]:
    return {
        "method": planned.method,
        "config": dataclasses.asdict(planned.config),
        "base_parameters": planned.base_parameters,
        "trainable_parameters": planned.trainable_parameters,
        "trainable_bytes": planned.trainable_bytes,
        "target_modules": planned.matches,
        "placements": [
            {"path": path, "kind": kind, "parameters": count, "bytes": size} for path, kind, count, size in planned.rows
        ],
    }


def _memory(found: Estimate) -> dict[str, object]:
    """Return the sizes of a step in bytes: of the process on this machine, or of the card's allocator."""
    on_card = found.device is not None and found.device.is_card
    return {
        "device": found.device and found.device.name,
        "device_memory": found.device and found.device.memory,
        "fits": found.fits,
        "tensors": found.peak,
        "parts": {str(purpose).replace(" ", "_"): size for purpose, size in found.parts.items()},
        "process": None if on_card else found.process._asdict(),
        "card": found.reserved if on_card else None,
    }
