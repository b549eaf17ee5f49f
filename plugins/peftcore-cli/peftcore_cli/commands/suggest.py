"""`peftcore suggest`: find settings that fit into a memory budget, without loading weights."""

from __future__ import annotations

import shlex
from typing import TYPE_CHECKING, Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import say
from peftcore_cli.settings import RunOptions, Settings

if TYPE_CHECKING:
    from peftcore.estimating import Way

_SMALL_BASE = 1e9  # parameters; default rates were chosen on models below

EXAMPLES = (
    "peftcore suggest -m MODEL --method METHOD --memory 24GB --device rtx4090 --max-length 2048",
    "peftcore suggest -m MODEL --method METHOD --rank 8 --rank 64",
)


def suggest(
    model: options.Model,
    memory: Annotated[
        str | None,
        typer.Option(
            help="Memory budget, such as 24GB; default: the memory of the GPU, or the free memory of this machine."
        ),
    ] = None,
    device: Annotated[
        str, typer.Option(help="Device: cpu (this machine), or a GPU: t4, rtx4090, a100, h100, ...")
    ] = "cpu",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Method to consider. Repeatable; optional if only one is installed."),
    ] = None,
    rank: Annotated[
        list[int] | None, typer.Option("--rank", min=1, help="Rank to consider. Repeatable; default: 16.")
    ] = None,
    *,
    data: options.PlannedData = None,
    task: options.Task = None,
    labels: options.PlannedLabels = None,
    run_options: Annotated[
        RunOptions,
        ("max_length", "dtype", "precision", "parallel", "without_logits", "fuse", "recompute", "trust_remote_code"),
    ],
    ranks: options.Ranks = 1,
    as_json: options.Json = False,
) -> object:
    """Suggest settings that fit training into a memory budget, and print the commands.

    Each suggestion is checked by simulating a training step, which allocates no memory.
    """
    import peftcore
    from peftcore_cli.bases import base_files, models
    from peftcore_cli.training import forecast, training_run  # noqa: F401  # counts the memory of the modules that `train` imports

    given_task = task
    task, names = options.planned_task(task, data, labels)
    methods = method or [options.resolve_method(None, None)[0]]
    base = base_files.resolve(model)
    settings = Settings.from_options(run_options, model=base, data=data or "", task=task, method="", device=device)
    reason = forecast.unpredicted_reason(task)
    if reason is not None:
        raise PeftcoreError(f"suggest cannot estimate the memory of a step: {reason}. Train with a small --batch-size")
    config = models.load_config(base, task, names)
    if models.has_code(config, task):
        raise PeftcoreError(
            f"suggest only supports models in transformers, but '{model}' has its own code. Estimate one method with "
            "peftcore plan --trust-remote-code"
        )
    suggestion = peftcore.suggest(
        config,
        methods,
        memory=memory,
        device=device,
        r=rank or (16,),
        dtype=forecast.dtype_of_base(settings, names),
        length=forecast.tokens_of_step(run_options.max_length, task, config),
        without_logits=forecast.is_without_logits(settings),
        fused=forecast.is_fused(settings),
        recompute=run_options.recompute,
        **{
            **forecast.step_options(task, run_options.precision, run_options.parallel, ranks),
            **forecast.step_data(settings),
        },
    )
    train_options = ["--max-length", str(run_options.max_length)]
    train_dtype = (
        "bf16" if device != "cpu" and run_options.dtype == run_options.precision == "auto" else run_options.dtype
    )
    values = {
        "task": given_task,
        "dtype": train_dtype,
        "precision": run_options.precision,
        "parallel": run_options.parallel,
    }
    values |= {
        "without-logits": run_options.without_logits,
        "fuse": run_options.fuse,
        "recompute": run_options.recompute,
    }
    for name, value in values.items():
        if value not in (None, "auto"):
            train_options += [f"--{name}", value]
    files = " -d ".join(map(shlex.quote, data or ())) or "DATA"
    start = "peftcore" if run_options.parallel is None else f"torchrun --nproc-per-node {ranks} -m peftcore_cli"
    commands = []
    for way in suggestion.ways:
        rate = f"{peftcore.method(way.method).learning_rate:g}"
        train_words = shlex.join([*way.options(), "--lr", rate, *train_options])
        commands.append(f"{start} train -m {shlex.quote(model)} -d {files} -o RUN {train_words}")
    if as_json:
        ways = [{**_way(way), "command": command} for way, command in zip(suggestion.ways, commands, strict=True)]
        return {
            "model": model,
            "task": task,
            "device": suggestion.device.name,
            "memory": suggestion.memory,
            "ways": ways,
        }
    say(str(suggestion))
    say("\n--batch-size is the largest power of two that fits, up to 64; --lr is the method's default")
    if suggestion.ways[0].estimate.summary.base_parameters > _SMALL_BASE:
        say("the default rates suit small models. For this one, start with a lower --lr: see docs/choosing.md")
    say("to train with the first suggestion:", "bold")
    say(f"  {commands[0]}")
    return None


def _way(way: Way) -> dict[str, object]:
    return {
        "method": way.method,
        "fields": way.fields,
        "batch_size": way.batch_size,
        "gradient_checkpointing": way.gradient_checkpointing,
        "optimizer": way.optimizer,
        "memory": way.memory._asdict(),
    }
