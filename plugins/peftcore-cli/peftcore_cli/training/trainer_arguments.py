"""Arguments of Trainer and TRL's trainers, from the settings of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import TrainingArguments

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import device_choice, precision
from peftcore_cli.options import FULL
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import registered
from peftcore_cli.training import best_checkpoint, optim_options


def of_run(settings: Settings, output: Path, examples: int, report_to: Sequence[str] = ()) -> TrainingArguments:
    """Return Trainer's arguments for this many examples."""
    task = registered.find(settings.task)
    examples = task.examples_per_epoch(examples, settings)
    per_epoch = math.ceil(math.ceil(examples / (settings.batch_size * settings.ranks)) / settings.grad_accum)
    steps = settings.steps or math.ceil(per_epoch * settings.epochs)
    often = max(1, math.ceil(steps / 5))
    kind, task_arguments = task.arguments(settings)
    try:
        return kind(
            output_dir=str(output / "checkpoints"),
            num_train_epochs=settings.epochs,
            max_steps=settings.steps or -1,
            per_device_train_batch_size=settings.batch_size,
            gradient_accumulation_steps=settings.grad_accum,
            learning_rate=settings.lr,
            lr_scheduler_type=settings.scheduler,
            warmup_steps=settings.warmup if settings.warmup >= 1 else math.ceil(steps * settings.warmup),
            weight_decay=settings.weight_decay,
            max_grad_norm=settings.max_grad_norm,
            optim=settings.optim,
            **optim_options.arguments(settings.optim_args),
            seed=settings.seed,
            **{**task_arguments, **_gradient_checkpointing(settings.gradient_checkpointing)},
            eval_strategy="steps",
            eval_steps=settings.eval_every or often,
            save_strategy="no" if settings.method == FULL else "steps",  # checkpoints only contain adapters
            **{"save_steps": settings.save_every or often, **best_checkpoint.arguments(settings, often)},
            save_total_limit=max(
                2, settings.keep
            ),  # so that a complete checkpoint exists while the next one is written
            logging_steps=max(1, steps // 100),
            logging_nan_inf_filter=False,  # show NaN and infinite losses
            include_num_input_tokens_seen="non_padding" if task.counts_tokens else "no",
            use_cpu=device_choice.torch_device(settings.device).type == "cpu",
            dataloader_pin_memory=device_choice.torch_device(settings.device).type == "cuda",
            report_to=list(report_to) or "none",
            run_name=output.name,
            **precision.arguments(settings.precision),
            disable_tqdm=True,
            remove_unused_columns=False,
        )
    except (ValueError, ImportError) as error:
        raise PeftcoreError(f"transformers' Trainer rejects these settings: {error}") from error


def check(settings: Settings, output: Path) -> None:
    """Raise a PeftcoreError if Trainer would reject the settings, before anything is loaded."""
    import torch
    from transformers import get_scheduler

    arguments = of_run(settings, output, 1_000)
    try:
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))])
        get_scheduler(arguments.lr_scheduler_type, optimizer, num_warmup_steps=0, num_training_steps=1)
    except (ValueError, TypeError, KeyError) as error:
        raise PeftcoreError(
            f"--scheduler {settings.scheduler} needs arguments that the command line cannot set: {error}. Use "
            "another schedule, such as linear, cosine or constant"
        ) from error


def checkpointing_name() -> str:
    """Return the name of Trainer's argument for gradient checkpointing, which depends on transformers' release."""
    names = {argument.name for argument in fields(TrainingArguments)}
    return "activation_checkpointing" if "activation_checkpointing" in names else "gradient_checkpointing"


def _gradient_checkpointing(is_on: bool) -> dict[str, Any]:
    """Return Trainer's arguments for gradient checkpointing."""
    if not is_on:
        return {}
    name = checkpointing_name()
    return {name: True, f"{name}_kwargs": {"use_reentrant": False}}
