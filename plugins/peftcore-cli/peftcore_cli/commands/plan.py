"""`peftcore plan`: show what a method would train and how much memory a step takes, without loading weights."""

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
    run_options: Annotated[RunOptions, _OPTIONS],
    ranks: options.Ranks = 1,
    tp_size: options.TensorParallel = 1,
    device: Annotated[
        str, typer.Option(help="Device: cpu (this machine), or a GPU: t4, rtx4090, a100, h100, ...")
    ] = "cpu",
    full: Annotated[bool, typer.Option("--full", help="Also list every adapted module.")] = False,
    as_json: options.Json = False,
) -> object:
    """Show what would be trained and how much memory a training step would take, without training."""
    import peftcore
    from peftcore.estimating import NotFollowed
    from peftcore_cli.amounts import megabytes
    from peftcore_cli.bases import base_files, models
    from peftcore_cli.training import forecast, training_run  # noqa: F401  # imported so that the forecast counts the memory of the modules that `train` imports

    task, names = options.planned_task(task, data, labels)
    step_fields = forecast.step_options(task, run_options.precision, run_options.parallel, ranks, tp_size)
    name, method_fields = options.resolve_method(method, fields)
    base = models.empty_model(base_files.resolve(model), task, names)
    method_plan = peftcore.plan(base, name, **method_fields)
    if not as_json:
        say(str(method_plan))
    settings = Settings.from_options(
        run_options,
        model=base_files.resolve(model),
        data=data or "",
        task=task,
        method=name,
        fields=method_fields,
        device=device,
    )
    reason, estimate = forecast.unpredicted_reason(task), None
    try:
        if reason is not None:
            raise NotFollowed(reason)
        estimate = peftcore.estimate(
            base,
            name,
            step=peftcore.Step(
                batch_size=run_options.batch_size,
                length=forecast.tokens_of_step(run_options.max_length, task, base.config),
                optimizer=run_options.optim,
                gradient_checkpointing=run_options.gradient_checkpointing,
                gradient_accumulation=run_options.grad_accum,
                without_logits=forecast.is_without_logits(settings),
                fused=forecast.is_fused(settings),
                recompute=run_options.recompute,
                **{**step_fields, **forecast.step_data(settings)},
            ),
            dtype=forecast.dtype_of_base(settings, names),
            device=device,
            **method_fields,
        )
    except NotFollowed as error:
        reason = str(error)
    if as_json:
        memory = {"memory": estimate and _memory(estimate), "memory_unknown": None if estimate else reason}
        return {"model": model, "task": task, **_placements(method_plan), **memory}
    say(f"\nthe memory of a step is not predicted: {reason}" if estimate is None else f"\n{estimate}")
    if full:
        table(
            ((path, kind, f"{count:,}", megabytes(size)) for path, kind, count, size in method_plan.rows),
            ("where", "what", "parameters", "size"),
        )
    return None


def _placements(method_plan: Plan) -> dict[str, object]:
    return {
        "method": method_plan.method,
        "config": dataclasses.asdict(method_plan.config),
        "base_parameters": method_plan.base_parameters,
        "trainable_parameters": method_plan.trainable_parameters,
        "trainable_bytes": method_plan.trainable_bytes,
        "target_modules": method_plan.matches,
        "placements": [
            {"path": path, "kind": kind, "parameters": count, "bytes": size}
            for path, kind, count, size in method_plan.rows
        ],
    }


def _memory(estimate: Estimate) -> dict[str, object]:
    """Return the memory of a step in bytes: of the process on this machine, or of the GPU's allocator."""
    on_card = estimate.device is not None and estimate.device.is_card
    return {
        "device": estimate.device and estimate.device.name,
        "device_memory": estimate.device and estimate.device.memory,
        "fits": estimate.fits,
        "tensors": estimate.peak,
        "parts": {str(purpose).replace(" ", "_"): size for purpose, size in estimate.parts.items()},
        "process": None if on_card else estimate.process._asdict(),
        "card": estimate.reserved if on_card else None,
    }
