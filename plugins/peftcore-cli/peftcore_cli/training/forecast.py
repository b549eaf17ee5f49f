"""Forecast of a run's peak memory, printed before the model is loaded and compared with the measured peak.

`train` calls `with_memory`, which refuses runs that need more memory than is free. The first functions convert options
to arguments of `peftcore.estimate`, also for `plan`, `suggest` and `--fit` (`fitting.py`).
"""

from __future__ import annotations

import gc
import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

import peftcore
from peftcore.errors import PeftcoreError
from peftcore.estimating import MIXED, NotFollowed, Range, memory_here
from peftcore.plugin import ranks
from peftcore.quantization import release_free_memory
from peftcore_cli.amounts import gigabytes
from peftcore_cli.bases import base_quantization, device_choice, dtype_choice, models, precision as precisions
from peftcore_cli.console import say
from peftcore_cli.data import row_reading
from peftcore_cli.data.data_files import parse_columns
from peftcore_cli.data.row import Row
from peftcore_cli.options import FULL
from peftcore_cli.settings import Settings
from peftcore_cli.tasks import conversations, registered
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.training import torchrun
from peftcore_cli.training.progress import current_memory
from peftcore_cli.training.training_data import FIRST_ROWS

if TYPE_CHECKING:
    from peftcore_cli.training.training_data import Examples

_SHOWN_PARTS = 4  # number of parts of the peak memory to print, the largest first


@dataclass(frozen=True)
class Forecast:
    """Predicted peak memory of a run, in bytes.

    Args:
        estimate: estimate of a training step.
        libraries: resident memory of the process when the forecast was made; 0 on a GPU.
        room: free memory at that time.
        on_card: whether the memory is a GPU's.
        together: number of the run's processes that share this memory.
        lighter: additional options that would reduce the memory of this run.
    """

    estimate: peftcore.Estimate
    libraries: int
    room: float
    on_card: bool = False
    together: int = 1
    lighter: tuple[str, ...] = ()

    @property
    def required(self) -> float:
        """Bytes that the run needs in addition to the current memory of its processes."""
        estimate = self.estimate
        if self.on_card:
            return estimate.reserved - (estimate.peak - estimate.least)
        return self.together * estimate.needed

    @property
    def peak(self) -> Range:
        """Peak memory of the process, or of the GPU, in bytes."""
        if self.on_card:
            return Range(self.estimate.reserved, self.estimate.reserved)
        return self.estimate.beyond_libraries.plus(self.libraries)

    def __str__(self) -> str:
        ranks = self.estimate.step.ranks
        per_process = f" in each of {ranks} processes" if ranks > 1 else ""
        lines = [f"predicted peak: {self.peak}{per_process}; {gigabytes(self.room)} are free"]
        if not self.on_card:
            lines.append(f"  {gigabytes(self.libraries)}  Python and its libraries")
        parts = sorted(self.estimate.parts.items(), key=lambda part: -part[1])
        lines += [f"  {gigabytes(size)}  {purpose}" for purpose, size in parts[:_SHOWN_PARTS]]
        return "\n".join(lines)


def step_options(task: str, precision: str, parallel: str | None, processes: int, tp_size: int = 1) -> dict[str, Any]:
    """Return the arguments of `peftcore.Step` that depend on options.

    Raises:
        PeftcoreError: an option has an unknown value, or `parallel` does not fit the number of processes.
    """
    if precision not in precisions.PRECISIONS:
        raise PeftcoreError(f"--precision must be one of {', '.join(precisions.PRECISIONS)}, found '{precision}'")
    if parallel is not None and parallel not in torchrun.WAYS:
        raise PeftcoreError(f"--parallel must be one of {', '.join(torchrun.WAYS)}, found '{parallel}'")
    if parallel is None and processes > tp_size:
        raise PeftcoreError(f"{processes} processes need --parallel. Pass --parallel ddp or --parallel fsdp2")
    return {
        "loss": registered.find(task).step_loss,
        "mixed_precision": precision if precision in MIXED else None,
        "ranks": processes,
        "shard": parallel == "fsdp2",
        "tp_size": tp_size,
    }


def step_data(settings: Settings, rows: Sequence[Row] | None = None) -> dict[str, Any]:
    """Return the arguments of `peftcore.Step` that depend on the data. Without data, assume texts.

    Args:
        settings: settings of the run.
        rows: examples of the run, if they have been read.

    Raises:
        NotFollowed: the task needs examples, because a step depends on the sizes of images or recordings.
        PeftcoreError: a file is missing or of an unsupported type.
    """
    task = registered.find(settings.task)
    if not settings.data and task.needs_examples:
        raise NotFollowed(f"the memory of --task {task.name} depends on the examples. Pass examples: --data FILE")
    if not settings.data or not task.examples_count:
        return {}
    processor = task.load_processor(settings.model)
    conversations.set_template(processor, settings.chat_template)
    if rows is None:
        _, rows = row_reading.read(settings.data, task.name, parse_columns(settings.columns))
    if settings.streaming:
        rows = rows[:FIRST_ROWS]
    return task.step_of(task.encode(rows, processor, settings.max_length).examples, processor)


def is_without_logits(settings: Settings) -> bool:
    """Return whether `train` would compute the loss without logits, if the model allows it."""
    fits = registered.find(settings.task).learns_texts and settings.parallel is None
    return settings.without_logits == "on" or (settings.without_logits == "auto" and fits)


def is_fused(settings: Settings) -> bool:
    """Return whether `train` would fuse operators, as it does on CPUs."""
    return settings.fuse == "on" or (settings.fuse == "auto" and settings.parallel is None)


def tokens_of_step(length: int, task: str, config: Any) -> int:
    """Return the number of tokens of the longest row, given the maximum length."""
    return registered.find(task).tokens_of_step(length, config)


def dtype_of_base(settings: Settings, labels: tuple[str, ...] = ()) -> torch.dtype:
    """Return the dtype of a base on this machine (`cpu`) or on a GPU, where auto is bf16."""
    if settings.device != "cpu":
        dtype = precisions.base_dtype(settings.precision, settings.dtype)
        return device_choice.torch_dtype("bf16" if dtype == "auto" else dtype, "cpu")
    return device_choice.torch_dtype(dtype_choice.choose_for_run(settings, labels).report(), "cpu")


def forecast(
    settings: Settings, length: int, labels: tuple[str, ...], examples: Sequence[Example], processor: Any
) -> Forecast | None:
    """Return the forecast of a run, or print the reason why the memory is not predicted and return None.

    Args:
        settings: settings of the run.
        length: number of tokens of the longest example.
        labels: labels of a classifier.
        examples: encoded training examples.
        processor: tokenizer or processor of the examples.

    Raises:
        PeftcoreError: a setting is invalid, or cannot be used on the meta device.
    """
    reason = unpredicted_reason_of_run(settings)
    if reason is not None:
        say(f"memory is not predicted: {reason}")
        return None
    dtype = device_choice.torch_dtype(precisions.base_dtype(settings.precision, settings.dtype), settings.device)
    try:
        shapes = registered.find(settings.task).step_of(examples, processor)
        estimate = _estimate(settings, length, labels, dtype, shapes)
    except NotFollowed as error:
        say(f"memory is not predicted: {error}")
        return None
    device = device_choice.torch_device(settings.device)
    on_cuda = device.type == "cuda"
    room = float(torch.cuda.mem_get_info(device)[0]) if on_cuda else memory_here()
    processes = 1 if on_cuda else int(os.environ.get("LOCAL_WORLD_SIZE", settings.ranks))
    gc.collect()
    release_free_memory()
    return Forecast(estimate, 0 if on_cuda else current_memory(), room, on_cuda, processes)


def _estimate(
    settings: Settings, length: int, labels: tuple[str, ...], dtype: torch.dtype, shapes: dict[str, Any]
) -> peftcore.Estimate:
    base = models.empty_model(settings.model, settings.task, labels).to(dtype)
    quantization = base_quantization.requested_by(settings)
    if quantization is not None:
        with warnings.catch_warnings(), models.quantize_advice(settings.quantize):
            warnings.simplefilter("ignore")  # loading the model raises the same warnings
            peftcore.quantize(base, **quantization.arguments())
    return peftcore.estimate(
        base,
        None if settings.method == FULL else settings.method,
        step=peftcore.Step(
            batch_size=settings.batch_size * registered.find(settings.task).sequences,
            length=tokens_of_step(length, settings.task, base.config),
            optimizer=settings.optim,
            gradient_checkpointing=settings.gradient_checkpointing,
            # The memory is the same from the second batch on.
            gradient_accumulation=min(2, settings.grad_accum),
            without_logits=is_without_logits(settings),
            fused=is_fused(settings),
            recompute=settings.recompute,
            **{**step_options(settings.task, settings.precision, settings.parallel, settings.ranks), **shapes},
        ),
        **settings.fields,
    )


def with_memory(
    settings: Settings, processor: Any, labels: tuple[str, ...], examples: Examples, *, force: bool
) -> tuple[Settings, Forecast | None, str | None]:
    """Choose the base's dtype, predict the memory of the run, and print the forecast.

    Returns the settings with the dtype, the forecast if the memory can be predicted, and a reason that has not been
    printed yet if it cannot. Print this reason only after the adapter has been applied, because it may turn out to be
    an error of the run.

    Args:
        settings: settings of the run.
        processor: the tokenizer or processor.
        labels: labels of a classifier.
        examples: encoded examples.
        force: whether to run even if the predicted memory exceeds the free memory.

    Raises:
        PeftcoreError: the predicted memory exceeds the free memory and `force` is False.
    """
    choice = dtype_choice.choose_for_run(settings, labels)
    settings = replace(settings, dtype=choice.report())
    try:
        prediction = forecast(settings, examples.longest, labels, examples.rows, processor)
    except PeftcoreError as error:
        return settings, None, str(error)
    if prediction is None:  # `forecast` has printed the reason
        return settings, None, None
    if choice.replaced_dtype == "bf16":
        prediction = replace(prediction, lighter=("--dtype bf16",))
    say(str(prediction))
    if not force:
        # Rank 0 decides for all ranks, because free memory changes over time.
        prediction_to_check = prediction
        ranks.once(lambda: refuse_if_too_large(prediction_to_check, settings), together=True)
    return settings, prediction, None


def refuse_if_too_large(prediction: Forecast, settings: Settings) -> None:
    """Raise a PeftcoreError that suggests lighter options if a run needs more memory than is free."""
    if prediction.required <= prediction.room:
        return
    options: list[str] = []
    if settings.batch_size > 1:
        options.append(f"--batch-size 1 --grad-accum {settings.batch_size}")
    if not settings.gradient_checkpointing:
        options.append("--gradient-checkpointing")
    if not settings.optim.startswith("paged"):
        options.append("--optim paged_adamw_8bit")
    options += prediction.lighter
    raise PeftcoreError(
        f"this run needs about {gigabytes(prediction.required)} of memory, but only {gigabytes(prediction.room)} are "
        f"free. Save memory with {' or '.join(options) or 'a smaller model'}, or run anyway with --force"
    )


def unpredicted_reason(task: str) -> str | None:
    """Return the reason why the memory of this task's steps cannot be predicted, or None."""
    return registered.find(task).unpredicted


def unpredicted_reason_of_run(settings: Settings) -> str | None:
    """Return the reason why the memory of this run cannot be predicted, or None."""
    from peftcore.estimating import OPTIMIZERS

    task_reason = unpredicted_reason(settings.task)
    if task_reason is not None:
        return task_reason
    if settings.teacher is not None:
        return "the memory of a teacher is unknown"
    if settings.optim not in OPTIMIZERS:
        return f"the state size of --optim {settings.optim} is unknown"
    return None
