"""`train --fit`: choose a batch size, gradient checkpointing and an optimizer that fit into the free memory of a CPU.

The choice is made before the model is loaded, from estimates of a training step. `forecast.py` then predicts the memory
of the run with the chosen settings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import PAGED, PLAIN
from peftcore.plugin import ranks
from peftcore_cli.amounts import gigabytes
from peftcore_cli.bases import device_choice, dtype_choice, models
from peftcore_cli.console import say
from peftcore_cli.data.row import Row
from peftcore_cli.options import FULL
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import registered
from peftcore_cli.training import forecast


def fit(settings: Settings, rows: Sequence[Row]) -> Settings:
    """Choose a batch size, gradient checkpointing and optimizer that fit into memory.

    Gradient accumulation keeps the number of examples per step constant. Rank 0 chooses for all ranks. Collective.

    Raises:
        PeftcoreError: nothing fits, or the memory of the run cannot be predicted.
    """
    choice = [settings]

    def choose() -> None:
        choice[0] = _choose(settings, rows)

    ranks.once(choose, together=True)
    return ranks.of_first(choice[0])


def _choose(settings: Settings, rows: Sequence[Row]) -> Settings:
    """Choose on this rank, see `fit`."""
    _refuse_unsupported(settings)
    dtype = dtype_choice.choose_for_run(settings, ()).dtype  # `train` prints the choice later
    config = models.load_config(settings.model, settings.task)
    step = peftcore.Step(
        length=forecast.tokens_of_step(settings.max_length, settings.task, config),
        without_logits=forecast.is_without_logits(settings),
        fused=forecast.is_fused(settings),
        recompute=settings.recompute,
        **{
            **forecast.step_options(settings.task, settings.precision, settings.parallel, settings.ranks),
            **forecast.step_data(settings, rows),
        },
    )
    base_dtype = device_choice.torch_dtype(dtype, settings.device)
    if not registered.find(settings.task).divides_batches:
        return _fit_whole_batch(settings, config, base_dtype, step)
    suggestion = peftcore.suggest(
        config, [settings.method], fields=settings.fields, max_ways=1, dtype=base_dtype, step=step
    )
    (way,) = suggestion.ways
    return _with_way(settings, way.batch_size, way.optimizer, gradient_checkpointing=way.gradient_checkpointing)


def _refuse_unsupported(settings: Settings) -> None:
    """Raise a PeftcoreError for settings for which `--fit` cannot choose."""
    if device_choice.torch_device(settings.device).type != "cpu":
        raise PeftcoreError(
            "--fit only works for training on a CPU. For a GPU use peftcore suggest --device NAME --memory 24GB"
        )
    reason = forecast.unpredicted_reason_of_run(settings)
    if reason is not None:
        raise PeftcoreError(f"--fit cannot choose: {reason}")
    if settings.quantize is not None:
        raise PeftcoreError(
            "--fit only works with a dense base. Remove --fit, or find settings that fit: peftcore suggest --model "
            "MODEL"
        )
    if settings.optim != PLAIN:
        raise PeftcoreError(f"--fit chooses the optimizer ({PLAIN} or {PAGED}). Remove --optim {settings.optim}")


def _fit_whole_batch(settings: Settings, config: Any, dtype: torch.dtype, step: peftcore.Step) -> Settings:
    """Choose gradient checkpointing and the optimizer, but keep the batch size of a task that compares its texts."""
    method = None if settings.method == FULL else settings.method
    for checkpointing, optimizer in ((False, PLAIN), (True, PLAIN), (True, PAGED)):
        step = replace(step, batch_size=settings.batch_size, gradient_checkpointing=checkpointing, optimizer=optimizer)
        estimate = peftcore.estimate(config, method, dtype=dtype, step=step, device="cpu", **settings.fields)
        if estimate.fits:
            return _with_way(settings, settings.batch_size, optimizer, gradient_checkpointing=checkpointing)
    raise PeftcoreError(
        f"--fit cannot reduce the batch size of --task {settings.task}, which compares the texts of a batch, and "
        f"--batch-size {settings.batch_size} needs {gigabytes(estimate.needed)}. Pass a smaller --batch-size"
    )


def _with_way(settings: Settings, batch_size: int, optimizer: str, *, gradient_checkpointing: bool) -> Settings:
    """Return the settings with this batch size and optimizer, but the same number of examples per step.

    Raises:
        PeftcoreError: the task needs at least two examples per batch, and no such batch fits and divides the step.
    """
    examples = settings.batch_size * settings.grad_accum
    smallest = registered.find(settings.task).least_batch
    largest = min(settings.batch_size, batch_size)
    possible_sizes = [size for size in range(smallest, largest + 1) if examples % size == 0]
    if not possible_sizes:
        raise PeftcoreError(
            f"--fit finds no batch size for --task {settings.task}: it must be at least 2 and divide the {examples} "
            f"examples per step, but only {largest} fit into memory. Pass an even --batch-size, or a smaller "
            "--max-length"
        )
    chosen_size = max(possible_sizes)
    chosen = replace(
        settings,
        batch_size=chosen_size,
        grad_accum=examples // chosen_size,
        gradient_checkpointing=gradient_checkpointing,
        optim=optimizer,
    )
    checkpointing = " --gradient-checkpointing" if gradient_checkpointing else ""
    say(
        f"--fit chooses --batch-size {chosen.batch_size} --grad-accum {chosen.grad_accum} --optim {chosen.optim}"
        f"{checkpointing}"
    )
    return chosen
