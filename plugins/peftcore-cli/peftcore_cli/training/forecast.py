"""Forecast of a run's memory, printed before anything is loaded and compared with the measured peak."""

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

if TYPE_CHECKING:
    from peftcore_cli.training.training_data import Examples


@dataclass(frozen=True)
class Forecast:
    """Predicted peak memory of a run, in bytes.

    Args:
        libraries: resident bytes of the process at the time of the forecast; 0 on a card.
        room: free bytes at that time.
        together: number of processes of the run that share this memory.
        lighter: options of this run that need less, in addition to those of every run.
    """

    estimate: peftcore.Estimate
    libraries: int
    room: float
    on_card: bool = False
    together: int = 1
    lighter: tuple[str, ...] = ()

    @property
    def needed(self) -> float:
        """Bytes needed in addition to what the processes have."""
        found = self.estimate
        if self.on_card:
            return found.reserved - (found.peak - found.least)
        return self.together * found.needed

    @property
    def peak(self) -> Range:
        """Bytes of the process at its peak; on a card, of the card."""
        if self.on_card:
            return Range(self.estimate.reserved, self.estimate.reserved)
        return self.estimate.beyond_libraries.plus(self.libraries)

    def __str__(self) -> str:
        parts = sorted(self.estimate.parts.items(), key=lambda part: -part[1])
        most = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in parts[:4])
        each = f" in each of {self.estimate.step.ranks} processes" if self.estimate.step.ranks > 1 else ""
        return (
            f"predicted peak: {self.peak}{each}, {gigabytes(self.libraries)} of it Python and its libraries ({most}); "
            f"{gigabytes(self.room)} free"
        )


def how(task: str, precision: str, parallel: str | None, processes: int, tp_size: int = 1) -> dict[str, Any]:
    """Return the arguments of `peftcore.Step` that options determine.

    Raises:
        PeftcoreError: an option is unknown, or `parallel` and the number of processes do not fit together.
    """
    if precision not in precisions.PRECISIONS:
        raise PeftcoreError(f"--precision must be one of {', '.join(precisions.PRECISIONS)}, found '{precision}'")
    if parallel is not None and parallel not in torchrun.WAYS:
        raise PeftcoreError(f"--parallel must be one of {', '.join(torchrun.WAYS)}, found '{parallel}'")
    if parallel is None and processes > tp_size:
        raise PeftcoreError(f"{processes} processes need a way to share the work: --parallel ddp, or fsdp2")
    return {
        "loss": registered.find(task).step_loss,
        "mixed_precision": precision if precision in MIXED else None,
        "ranks": processes,
        "shard": parallel == "fsdp2",
        "tp_size": tp_size,
    }


def of_data(settings: Settings, rows: Sequence[Row] | None = None) -> dict[str, Any]:
    """Return the arguments of `peftcore.Step` that the data of `settings` determine; without data, those of texts.

    Args:
        settings: of the run.
        rows: its examples if they are read already.

    Raises:
        NotFollowed: the task needs examples, since a step depends on the sizes of images or the length of recordings.
        PeftcoreError: a file is missing or of another kind.
    """
    task = registered.find(settings.task)
    if not settings.data and task.needs_examples:
        raise NotFollowed(f"a step of --task {task.name} depends on the examples. Pass some: --data FILE")
    if not settings.data or not task.examples_count:
        return {}
    processor = task.load_processor(settings.model)
    conversations.set_template(processor, settings.chat_template)
    if rows is None:
        rows = row_reading.read_rows(settings.data, task.name, parse_columns(settings.columns))
    return task.step_of(task.encode(rows, processor, settings.max_length).examples, processor)


def is_without_logits(settings: Settings) -> bool:
    """Return whether `train` is expected to compute the loss without logits."""
    fits = registered.find(settings.task).learns_texts and settings.parallel is None
    return settings.without_logits == "on" or (settings.without_logits == "auto" and fits)


def is_fused(settings: Settings) -> bool:
    """Return whether `train` is expected to fuse operators, which it does on CPUs."""
    return settings.fuse == "on" or (settings.fuse == "auto" and settings.parallel is None)


def tokens_of_step(length: int, task: str, config: Any) -> int:
    """Return the tokens of a row whose longest has `length`."""
    return registered.find(task).tokens_of_step(length, config)


def dtype_of_base(settings: Settings, labels: tuple[str, ...] = ()) -> torch.dtype:
    """Return a base's dtype on this machine (`cpu`) or on a GPU of the table, for which auto is bf16."""
    if settings.device != "cpu":
        found = precisions.base_dtype(settings.precision, settings.dtype)
        return device_choice.torch_dtype("bf16" if found == "auto" else found, "cpu")
    return device_choice.torch_dtype(dtype_choice.of_run(settings, labels).say(), "cpu")


def forecast(
    settings: Settings, length: int, labels: tuple[str, ...], examples: Sequence[Example], processor: Any
) -> Forecast | None:
    """Return the forecast of a run, or print why there is none and return None.

    Args:
        settings: of the run.
        length: tokens of the longest example.
        labels: a classifier's labels.
        examples: encoded examples that are trained on.
        processor: the tokenizer, or the processor, of the examples.

    Raises:
        PeftcoreError: a setting is wrong, or cannot be used on a model without values.
    """
    why = _why_not(settings)
    if why is not None:
        say(f"memory is not predicted: {why}")
        return None
    dtype = device_choice.torch_dtype(precisions.base_dtype(settings.precision, settings.dtype), settings.device)
    try:
        shapes = registered.find(settings.task).step_of(examples, processor)
        found = _estimate(settings, length, labels, dtype, shapes)
    except NotFollowed as error:
        say(f"memory is not predicted: {error}")
        return None
    device = device_choice.torch_device(settings.device)
    on_cuda = device.type == "cuda"
    room = float(torch.cuda.mem_get_info(device)[0]) if on_cuda else memory_here()
    together = 1 if on_cuda else int(os.environ.get("LOCAL_WORLD_SIZE", settings.ranks))
    gc.collect()
    release_free_memory()
    return Forecast(found, 0 if on_cuda else current_memory(), room, on_cuda, together)


def _estimate(
    settings: Settings, length: int, labels: tuple[str, ...], dtype: torch.dtype, shapes: dict[str, Any]
) -> peftcore.Estimate:
    base = models.empty_model(settings.model, settings.task, labels).to(dtype)
    quantization = base_quantization.asked_by(settings)
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
            gradient_accumulation=min(2, settings.grad_accum),  # the second step takes what later steps take
            without_logits=is_without_logits(settings),
            fused=is_fused(settings),
            recompute=settings.recompute,
            **{**how(settings.task, settings.precision, settings.parallel, settings.ranks), **shapes},
        ),
        **settings.fields,
    )


def with_memory(
    settings: Settings, processor: Any, labels: tuple[str, ...], examples: Examples, *, force: bool
) -> tuple[Settings, Forecast | str | None]:
    """Return the settings with the base's dtype, and the predicted memory: None if the reason is printed.

    A reason that is returned is to be printed once the model has its adapter: before, it may be an error of the run.

    Args:
        settings: of the run.
        processor: the tokenizer or processor.
        labels: a classifier's labels.
        examples: encoded examples.
        force: run even if the predicted memory is not available.

    Raises:
        PeftcoreError: the predicted memory is not available, unless `force`.
    """
    base_in = dtype_choice.of_run(settings, labels)
    settings = replace(settings, dtype=base_in.say())
    try:
        predicted = forecast(settings, examples.longest, labels, examples.rows, processor)
    except PeftcoreError as error:
        return settings, str(error)
    if predicted is None:
        return settings, None
    if base_in.instead_of == "bf16":
        predicted = replace(predicted, lighter=("--dtype bf16",))
    say(str(predicted))
    if not force:
        said = predicted  # with several processes the first one decides, because free memory changes
        ranks.once(lambda: refuse_if_too_large(said, settings), together=True)
    return settings, predicted


def refuse_if_too_large(found: Forecast, settings: Settings) -> None:
    """Raise a PeftcoreError if a run needs more memory than is free, with options that need less."""
    if found.needed <= found.room:
        return
    ways = [
        *(["--batch-size 1 --grad-accum " + str(settings.batch_size)] if settings.batch_size > 1 else []),
        *(["--gradient-checkpointing"] if not settings.gradient_checkpointing else []),
        *(["--optim paged_adamw_8bit"] if not settings.optim.startswith("paged") else []),
        *found.lighter,
    ]
    raise PeftcoreError(
        f"this run needs about {gigabytes(found.needed)}, and {gigabytes(found.room)} are free. Use less with "
        f"{' or '.join(ways) or 'a smaller model'}, or run anyway with --force"
    )


def fitted(settings: Settings, rows: Sequence[Row]) -> Settings:
    """Return the settings with the batch size, gradient checkpointing and optimizer of the first way that fits.

    The number of examples per step stays the same through gradient accumulation. With several processes the first one
    chooses for all. Collective.

    Raises:
        PeftcoreError: nothing fits, or the run cannot be predicted.
    """
    chosen = [settings]

    def choose() -> None:
        chosen[0] = _fitted(settings, rows)

    ranks.once(choose, together=True)
    return ranks.of_first(chosen[0])


def _fitted(settings: Settings, rows: Sequence[Row]) -> Settings:
    if device_choice.torch_device(settings.device).type != "cpu":
        raise PeftcoreError("--fit is for training on a CPU. For a GPU: peftcore suggest --device NAME --memory 24GB")
    why = _why_not(settings)
    if why is not None:
        raise PeftcoreError(f"--fit cannot choose: {why}")
    if settings.quantize is not None:
        raise PeftcoreError(
            "--fit chooses for a dense base. Leave it out, or see what fits with: peftcore suggest --model MODEL"
        )
    if settings.optim != PLAIN:
        raise PeftcoreError(f"--fit chooses the optimizer ({PLAIN} or {PAGED}). Leave out --optim {settings.optim}")
    dtype = dtype_choice.of_run(settings, ()).dtype  # `train` prints it
    config = models.load_config(settings.model, settings.task)
    step = peftcore.Step(
        length=tokens_of_step(settings.max_length, settings.task, config),
        without_logits=is_without_logits(settings),
        fused=is_fused(settings),
        recompute=settings.recompute,
        **{**how(settings.task, settings.precision, settings.parallel, settings.ranks), **of_data(settings, rows)},
    )
    known: dict[str, Any] = {"dtype": device_choice.torch_dtype(dtype, settings.device), "step": step}
    if not registered.find(settings.task).divides_batches:
        return _fitted_whole(settings, config, known)
    (way,) = peftcore.suggest(config, [settings.method], fields=settings.fields, max_ways=1, **known).ways
    return _with_way(settings, way.batch_size, way.optimizer, gradient_checkpointing=way.gradient_checkpointing)


def _fitted_whole(settings: Settings, config: Any, known: dict[str, Any]) -> Settings:
    """Like `fitted`, without dividing a batch, whose texts are compared with one another."""
    method = None if settings.method == FULL else settings.method
    for again, optimizer in ((False, PLAIN), (True, PLAIN), (True, PAGED)):
        step = replace(known["step"], batch_size=settings.batch_size, gradient_checkpointing=again, optimizer=optimizer)
        found = peftcore.estimate(config, method, **{**known, "step": step}, device="cpu", **settings.fields)
        if found.fits:
            return _with_way(settings, settings.batch_size, optimizer, gradient_checkpointing=again)
    raise PeftcoreError(
        f"--fit does not divide a batch of --task {settings.task}, whose texts are compared with one another, and "
        f"--batch-size {settings.batch_size} needs {gigabytes(found.needed)}. Pass a smaller one"
    )


def _with_way(settings: Settings, batch_size: int, optimizer: str, *, gradient_checkpointing: bool) -> Settings:
    """Return the settings with this way of training, with as many examples per step.

    Raises:
        PeftcoreError: the task compares the answers of a batch, and none of two or more fits and divides the step.
    """
    examples = settings.batch_size * settings.grad_accum
    least = registered.find(settings.task).least_batch
    most = min(settings.batch_size, batch_size)
    divisors = [n for n in range(least, most + 1) if examples % n == 0]
    if not divisors:
        raise PeftcoreError(
            f"--fit finds no batch for --task {settings.task}, which needs 2 or more examples and a divisor of the "
            f"{examples} examples of a step: {most} fit. Pass an even --batch-size, or a smaller --max-length"
        )
    batch_size = max(divisors)
    chosen = replace(
        settings,
        batch_size=batch_size,
        grad_accum=examples // batch_size,
        gradient_checkpointing=gradient_checkpointing,
        optim=optimizer,
    )
    again = " --gradient-checkpointing" if chosen.gradient_checkpointing else ""
    say(f"--fit: --batch-size {batch_size} --grad-accum {chosen.grad_accum} --optim {chosen.optim}{again}")
    return chosen


def unknown(task: str) -> str | None:
    """Return why the memory of a step of this task cannot be predicted, or None if it can."""
    return registered.find(task).unpredicted


def _why_not(settings: Settings) -> str | None:
    from peftcore.estimating import OPTIMIZERS

    if (why := unknown(settings.task)) is not None:
        return why
    if settings.teacher is not None:
        return "that of a teacher is not known"
    if settings.optim not in OPTIMIZERS:
        return f"the state of --optim {settings.optim} is not known"
    return None
