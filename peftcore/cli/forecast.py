"""What a run will take, said before anything is loaded, and set beside what it took."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

import peftcore
from peftcore.cli import data, models, precision
from peftcore.cli.console import say
from peftcore.cli.options import FULL
from peftcore.cli.progress import current_memory, gigabytes
from peftcore.cli.settings import Settings
from peftcore.errors import PeftcoreError
from peftcore.estimating import memory_here
from peftcore.estimating.searching import PAGED, PLAIN


@dataclass(frozen=True)
class Forecast:
    """Bytes of a run's peak.

    Args:
        before: what the process had, with its libraries, when it was made.
        room: bytes that were free then.
    """

    estimate: peftcore.Estimate
    before: int
    room: float
    on_card: bool = False

    @property
    def needed(self) -> float:
        """Beside what the process has."""
        found = self.estimate
        return found.reserved - (found.peak - found.least) if self.on_card else found.needed

    @property
    def peak(self) -> int:
        """Of the process."""
        return self.estimate.reserved if self.on_card else self.before + self.estimate.resident

    def __str__(self) -> str:
        parts = sorted(self.estimate.parts.items(), key=lambda part: -part[1])
        most = ", ".join(f"{kind} {gigabytes(size)}" for kind, size in parts[:4])
        return (
            f"predicted: {gigabytes(self.peak)} at most, {gigabytes(self.before)} of them Python and its libraries "
            f"({most}); {gigabytes(self.room)} free"
        )


def forecast(settings: Settings, length: int, labels: tuple[str, ...]) -> Forecast | None:
    """What a run will take, or None with a line that says why that is not known.

    Args:
        length: tokens of the longest example.
    """
    why = _why_not(settings)
    if why is not None:
        say(f"memory is not predicted: {why}")
        return None
    dtype = models.torch_dtype(precision.base_dtype(settings.precision, settings.dtype), settings.device)
    try:
        found = _estimate(settings, length, labels, dtype)
    except PeftcoreError as error:  # what the run itself will refuse, it says itself
        say(f"memory is not predicted: {error}")
        return None
    on_cuda = models.torch_device(settings.device).type == "cuda"
    room = float(torch.cuda.mem_get_info()[0]) if on_cuda else memory_here()
    return Forecast(found, 0 if on_cuda else current_memory(), room, on_cuda)


def _estimate(settings: Settings, length: int, labels: tuple[str, ...], dtype: torch.dtype) -> peftcore.Estimate:
    return peftcore.estimate(
        models.empty_model(settings.model, settings.task, labels).to(dtype),
        None if settings.method == FULL else settings.method,
        batch_size=settings.batch_size,
        length=length,
        optimizer=settings.optim,
        gradient_checkpointing=settings.gradient_checkpointing,
        gradient_accumulation=min(2, settings.grad_accum),  # the second one takes what all others take
        **settings.fields,
    )


def refuse_if_too_large(found: Forecast, settings: Settings) -> None:
    """Raise a PeftcoreError where a run needs more memory than is free, with what would need less."""
    if found.needed <= found.room:
        return
    ways = [
        *(["--batch-size 1 --grad-accum " + str(settings.batch_size)] if settings.batch_size > 1 else []),
        *(["--gradient-checkpointing"] if not settings.gradient_checkpointing else []),
        *(["--optim paged_adamw_8bit"] if not settings.optim.startswith("paged") else []),
    ]
    raise PeftcoreError(
        f"this run needs about {gigabytes(found.needed)}, and {gigabytes(found.room)} are free. Less would be needed "
        f"with {' or '.join(ways) or 'a smaller model'}; --force goes on all the same"
    )


def fitted(settings: Settings) -> Settings:
    """The same with the batch, recomputed activations and the optimizer of the fastest way that fits into what is free.

    The examples of a step stay as many: what the batch loses is accumulated.

    Raises:
        PeftcoreError: none fits, or of such a run it is not known.
    """
    if models.torch_device(settings.device).type != "cpu":
        raise PeftcoreError("--fit is for training on a CPU. For a card: peftcore fit --device NAME --memory 24GB")
    why = _why_not(settings)
    if why is not None:
        raise PeftcoreError(f"--fit cannot choose: {why}")
    if settings.optim != PLAIN:
        raise PeftcoreError(f"--fit chooses the optimizer, of {PLAIN} and {PAGED}: leave out --optim {settings.optim}")
    dtype = precision.base_dtype(settings.precision, settings.dtype)
    (way,) = peftcore.fit(
        models.load_config(settings.model, settings.task),
        length=settings.max_length,
        methods=[settings.method],
        fields=settings.fields,
        dtype=models.torch_dtype(dtype, settings.device),
        most=1,
    ).ways
    batch_size = min(settings.batch_size, way.batch_size)
    chosen = replace(
        settings,
        batch_size=batch_size,
        grad_accum=-(-settings.batch_size * settings.grad_accum // batch_size),
        gradient_checkpointing=way.gradient_checkpointing,
        optim=way.optimizer,
    )
    again = " --gradient-checkpointing" if chosen.gradient_checkpointing else ""
    say(f"--fit: --batch-size {batch_size} --grad-accum {chosen.grad_accum} --optim {chosen.optim}{again}")
    return chosen


def _why_not(settings: Settings) -> str | None:
    from peftcore.estimating.step import OPTIMIZERS

    if settings.task == data.PREFERENCES:
        return "DPO's batches and its reference are not followed"
    if settings.parallel is not None:
        return f"of one process among several ({settings.parallel}) it is not known"
    if settings.precision in ("bf16", "fp16"):
        return "mixed precision is not followed"
    if settings.optim not in OPTIMIZERS:
        return f"the state of --optim {settings.optim} is not known"
    return None
