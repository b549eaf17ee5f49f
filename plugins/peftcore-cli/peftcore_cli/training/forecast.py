"""Forecast of a run's peak memory, printed before the model is loaded and compared with the measured peak."""

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
from peftcore.estimating import MIXED, PAGED, PLAIN, NotFollowed, Range, memory_here
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

_SHOWN_PARTS = 4  # the largest parts of the memory at the peak


@dataclass(frozen=True)
class Forecast:
    """Predicted peak memory of a run, in bytes.

    Args:
        libraries: resident bytes of the process when the forecast was made; 0 on a GPU.
        room: free bytes at that time.
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
    return device_choice.torch_dtype(dtype_choice.of_run(settings, labels).say(), "cpu")


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
    reason = _why_not(settings)
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
            warnings.simplefilter("ignore")  # loading raises them
            peftcore.quantize(base, **quantization.arguments())
    return peftcore.estimate(
        base,
        None if settings.method == FULL else settings.method,
        step=peftcore.Step(
            batch_size=settings.batch_size * registered.find(settings.task).sequences,
            length=tokens_of_step(length, settings.task, base.config),
            optimizer=settings.optim,
            gradient_checkpointing=settings.gradient_checkpointing,
            gradient_accumulation=min(2, settings.grad_accum),  # the memory is the same from the second batch on
            without_logits=is_without_logits(settings),
            fused=is_fused(settings),
            recompute=settings.recompute,
            **{**step_options(settings.task, settings.precision, settings.parallel, settings.ranks), **shapes},
        ),
        **settings.fields,
    )


def with_memory(
    settings: Settings, processor: Any, labels: tuple[str, ...], examples: Examples, *, force: bool
) -> tuple[Settings, Forecast | str | None]:
    """Return the settings with the base's dtype, and the forecast, a reason for its absence, or None if it was printed.

    Print a returned reason only after applying the adapter, because it may turn out to be an error of the run.

    Args:
        settings: settings of the run.
        processor: the tokenizer or processor.
        labels: labels of a classifier.
        examples: encoded examples.
        force: whether to run even if the predicted memory exceeds the free memory.

    Raises:
        PeftcoreError: the predicted memory exceeds the free memory and `force` is False.
    """
    choice = dtype_choice.of_run(settings, labels)
    settings = replace(settings, dtype=choice.say())
    try:
        prediction = forecast(settings, examples.longest, labels, examples.rows, processor)
    except PeftcoreError as error:
        return settings, str(error)
    if prediction is None:
        return settings, None
    if choice.instead_of == "bf16":
        prediction = replace(prediction, lighter=("--dtype bf16",))
    say(str(prediction))
    if not force:
        prediction_to_check = prediction  # rank 0 decides for all ranks, because free memory changes over time
        ranks.once(lambda: refuse_if_too_large(prediction_to_check, settings), together=True)
    return settings, prediction


def refuse_if_too_large(prediction: Forecast, settings: Settings) -> None:
    """Raise a PeftcoreError that suggests lighter options if a run needs more memory than is free."""
    if prediction.required <= prediction.room:
        return
    options = [
        *(["--batch-size 1 --grad-accum " + str(settings.batch_size)] if settings.batch_size > 1 else []),
        *(["--gradient-checkpointing"] if not settings.gradient_checkpointing else []),
        *(["--optim paged_adamw_8bit"] if not settings.optim.startswith("paged") else []),
        *prediction.lighter,
    ]
    raise PeftcoreError(
        f"this run needs about {gigabytes(prediction.required)} of memory, but only {gigabytes(prediction.room)} are "
        f"free. Save memory with {' or '.join(options) or 'a smaller model'}, or run anyway with --force"
    )


def fit(settings: Settings, rows: Sequence[Row]) -> Settings:
    """Choose a batch size, gradient checkpointing and optimizer that fit into memory.

    Gradient accumulation keeps the number of examples per step constant. Rank 0 chooses for all ranks. Collective.

    Raises:
        PeftcoreError: nothing fits, or the memory of the run cannot be predicted.
    """
    result = [settings]

    def choose() -> None:
        result[0] = _fit(settings, rows)

    ranks.once(choose, together=True)
    return ranks.of_first(result[0])


def _fit(settings: Settings, rows: Sequence[Row]) -> Settings:
    if device_choice.torch_device(settings.device).type != "cpu":
        raise PeftcoreError(
            "--fit only works for training on a CPU. For a GPU use peftcore suggest --device NAME --memory 24GB"
        )
    reason = _why_not(settings)
    if reason is not None:
        raise PeftcoreError(f"--fit cannot choose: {reason}")
    if settings.quantize is not None:
        raise PeftcoreError(
            "--fit only works with a dense base. Remove --fit, or find settings that fit: peftcore suggest --model "
            "MODEL"
        )
    if settings.optim != PLAIN:
        raise PeftcoreError(f"--fit chooses the optimizer ({PLAIN} or {PAGED}). Remove --optim {settings.optim}")
    dtype = dtype_choice.of_run(settings, ()).dtype  # `train` prints it
    config = models.load_config(settings.model, settings.task)
    step = peftcore.Step(
        length=tokens_of_step(settings.max_length, settings.task, config),
        without_logits=is_without_logits(settings),
        fused=is_fused(settings),
        recompute=settings.recompute,
        **{
            **step_options(settings.task, settings.precision, settings.parallel, settings.ranks),
            **step_data(settings, rows),
        },
    )
    fixed: dict[str, Any] = {"dtype": device_choice.torch_dtype(dtype, settings.device), "step": step}
    if not registered.find(settings.task).divides_batches:
        return _fit_whole_batch(settings, config, fixed)
    (way,) = peftcore.suggest(config, [settings.method], fields=settings.fields, max_ways=1, **fixed).ways
    return _with_way(settings, way.batch_size, way.optimizer, gradient_checkpointing=way.gradient_checkpointing)


def _fit_whole_batch(settings: Settings, config: Any, fixed: dict[str, Any]) -> Settings:
    """Choose like `fit`, but keep the batch size, because the task compares the texts of a batch."""
    method = None if settings.method == FULL else settings.method
    for checkpointing, optimizer in ((False, PLAIN), (True, PLAIN), (True, PAGED)):
        step = replace(
            fixed["step"], batch_size=settings.batch_size, gradient_checkpointing=checkpointing, optimizer=optimizer
        )
        estimate = peftcore.estimate(config, method, **{**fixed, "step": step}, device="cpu", **settings.fields)
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
    divisors = [n for n in range(smallest, largest + 1) if examples % n == 0]
    if not divisors:
        raise PeftcoreError(
            f"--fit finds no batch size for --task {settings.task}: it must be at least 2 and divide the {examples} "
            f"examples per step, but only {largest} fit into memory. Pass an even --batch-size, or a smaller "
            "--max-length"
        )
    batch_size = max(divisors)
    fitting = replace(
        settings,
        batch_size=batch_size,
        grad_accum=examples // batch_size,
        gradient_checkpointing=gradient_checkpointing,
        optim=optimizer,
    )
    checkpointing = " --gradient-checkpointing" if fitting.gradient_checkpointing else ""
    say(
        f"--fit chooses --batch-size {batch_size} --grad-accum {fitting.grad_accum} --optim "
        f"{fitting.optim}{checkpointing}"
    )
    return fitting


def unknown(task: str) -> str | None:
    """Return the reason why the memory of this task's steps cannot be predicted, or None."""
    return registered.find(task).unpredicted


def _why_not(settings: Settings) -> str | None:
    from peftcore.estimating import OPTIMIZERS

    if (reason := unknown(settings.task)) is not None:
        return reason
    if settings.teacher is not None:
        return "the memory of a teacher is unknown"
    if settings.optim not in OPTIMIZERS:
        return f"the state size of --optim {settings.optim} is unknown"
    return None
