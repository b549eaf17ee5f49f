"""What a training step takes: memory by what it is for, where in the step its peak falls, operations and bytes."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from peftcore.engine import apply, apply_to_fill, takes_batches
from peftcore.engine.summary import Summary, summary
from peftcore.errors import PeftcoreError
from peftcore.estimating.costs import kept
from peftcore.estimating.devices import Device, device_of
from peftcore.estimating.following import Event, Following, NotFollowed, Operation, Storage
from peftcore.estimating.heap import Held, held_by_process
from peftcore.estimating.libraries import OF_A_CARD
from peftcore.estimating.libraries import here as libraries_here
from peftcore.estimating.segments import peak_reserved
from peftcore.estimating.standing import stand_in
from peftcore.estimating.step import (
    ADAPTERS,
    BACKWARD,
    BASE,
    FORWARD,
    GRADIENTS,
    INPUTS,
    STATE,
    follow,
    is_paged,
    make_inputs,
    make_optimizer,
)
from peftcore.observation.config import text_config
from peftcore.optim.paging import PAGE_BYTES
from peftcore.quantization import quantize as to_4_bits
from peftcore.registry import registry

ACTIVATIONS, LOGITS, TEMPORARIES = "activations", "logits and loss", "temporaries"
KERNELS, KEPT = "inside operators", "kept by operators"
KINDS = (BASE, ADAPTERS, GRADIENTS, STATE, INPUTS, ACTIVATIONS, LOGITS, TEMPORARIES, KERNELS, KEPT)
_NOT_FOLLOWED = {
    "ranks": "of one process among several. With DDP each takes what one process takes, and all gradients once more in "
    "its buckets (torch's gradient_as_bucket_view)",
    "shard": "of a base that is sharded (FSDP2): each rank takes less than one process alone, of which the estimate is",
    "per_sample": "with adapters of each sample's own: a step of training follows one method",
    "reference": "with the passes of a reference model, as DPO makes them",
}
NOT_COUNTED = (
    "Not in it: Python with its libraries (0.4 GB and more), a trainer's own (log, examples), evaluation and loading; "
    "on CUDA its context."
)


@dataclass(frozen=True)
class Estimate:
    """A step's memory, by what it is for. Sizes in bytes.

    Args:
        parts: at the peak, by the names of `KINDS`.
        where: what runs at the peak.
        timeline: (operation, bytes of each of `KINDS` after it), in the order of the step.
        phases: (first operation, name) of each part of the step.
        summary: of the model with its adapters.
        operations: all of the step, in their order.
        storages: all memory of the step. events: what a process does with its heap.
        untouched: bytes of `kept by operators` that are never written.
        device: where it runs, for the time.
        paged: is the optimizer's state in pages? All of it is in `parts`; where memory is short, a page stays of it.
    """

    title: str
    parts: dict[str, int]
    where: str
    timeline: tuple[tuple[int, tuple[int, ...]], ...]
    phases: tuple[tuple[int, str], ...]
    operations: tuple[Operation, ...]
    summary: Summary
    paged: bool = False
    device: Device | None = None
    storages: tuple[Storage, ...] = field(default=(), repr=False)
    events: tuple[Event, ...] = field(default=(), repr=False)
    untouched: int = 0

    @cached_property
    def resident(self) -> int:
        """Bytes that a process has for all of it, with what glibc's malloc keeps of what was freed (`heap`)."""
        return self._held.most + self.parts[KEPT] - self.untouched

    @cached_property
    def _held(self) -> Held:
        return held_by_process(self.storages, self.operations, self.events, STATE)

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.parts.values())

    @cached_property
    def reserved(self) -> int:
        """Bytes of a card that PyTorch's allocator has for all of it (`segments`)."""
        return peak_reserved(self.storages, self.operations)

    @property
    def least(self) -> int:
        """Bytes at the peak with as much of the optimizer's state as can be outside of memory."""
        return self.peak - max(0, self.parts[STATE] - PAGE_BYTES) if self.paged else self.peak

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        return sum(operation.cost.flops for operation in self.operations)

    @property
    def seconds(self) -> float | None:
        """Of a step, where it is known on which device."""
        if self.device is None:
            return None
        return self.device.seconds(self.operations, self._held.fresh if self.device.measured else 0)

    @property
    def needed(self) -> float:
        """Bytes that must be free: for a process of this machine, or for tensors on a card."""
        on_card = self.device is not None and not self.device.measured
        return (self.reserved if on_card else self.resident) - (self.peak - self.least)

    @property
    def fits(self) -> bool | None:
        """Is the device's memory enough? On this machine, what is free of it now."""
        return None if self.device is None else self.needed <= self.device.memory

    def __str__(self) -> str:
        lines = [self.title, *(line for line in str(self.summary).splitlines() if not line.startswith(" "))]
        lines += [f"  {kind:<18}{size / 1e6:>12,.1f} MB" for kind, size in self.parts.items() if size]
        lines += [f"  {'peak':<18}{self.peak / 1e6:>12,.1f} MB, {self.where}"]
        if self.device is None or self.device.measured:
            lines += [f"  {'of a process':<18}{self.resident / 1e6:>12,.1f} MB beside its libraries"]
        else:
            lines += [f"  {'of the card':<18}{self.reserved / 1e6:>12,.1f} MB in segments of PyTorch's allocator"]
        if self.paged:
            lines += [f"  {'with state paged':<18}{self.least / 1e6:>12,.1f} MB"]
        lines += [f"{self.flops / 1e12:,.2f} T floating-point operations"]
        if self.device is not None and self.seconds is not None:
            room = f"{'fits' if self.fits else 'does not fit'} into {self.device.memory / 1e9:,.1f} GB"
            how = "at rates measured here" if self.device.measured else "by its data sheet, half of its rates, untested"
            lines[-1] += f": about {self.seconds:.2g} s a step on {self.device.name} ({how}); {room}"
        lines += [NOT_COUNTED]
        return "\n".join(lines)


def estimate(
    model: Any,
    method: Any = None,
    /,
    *,
    batch_size: int = 8,
    length: int = 512,
    optimizer: str = "adamw_torch",
    quantize: str | None = None,
    gradient_checkpointing: bool | str = False,
    gradient_accumulation: int = 1,
    dtype: torch.dtype | None = None,
    device: str | Device | None = None,
    **fields: Any,
) -> Estimate:
    """Estimate a training step by running it without memory: no weight is read, and the model is left alone.

    Args:
        model: a module, a config of transformers, a folder with a `config.json`, or a hub id.
        method: as `peftcore.apply` takes it; None: every parameter is trained.
        batch_size, length: examples at once, and their tokens.
        optimizer: by the name that `peftcore train --optim` takes.
        quantize: `nf4` or `fp4`: the base in 4 bits.
        gradient_checkpointing: True, or `"reentrant"` for PyTorch's older kind.
        gradient_accumulation: batches that make one step.
        dtype: of the base; None: the module's, or what the config says.
        device: for the time, and whether it fits: `cpu`, which is this machine, or a card of `CARDS`, such as `h100`.
        fields: of the method's config.

    Raises:
        NotFollowed: the model cannot be built or run without values, or has no loss.
        PeftcoreError: an argument is wrong, or the method refuses the model.
    """
    numbers = {"batch_size": batch_size, "length": length, "gradient_accumulation": gradient_accumulation}
    for name, number in numbers.items():
        if not isinstance(number, int) or number < 1:
            raise PeftcoreError(f"{name} must be a whole number from 1, found {number!r}")
    for name in _NOT_FOLLOWED.keys() & fields.keys():
        raise NotFollowed(f"{name}: a step is not followed {_NOT_FOLLOWED[name]}")
    where = device_of(device) if isinstance(device, str) else device
    on_card = where is not None and not where.measured
    following = Following(OF_A_CARD if on_card else libraries_here())
    with ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # `apply` gives them when it is called for good
        made = stand_in(model, dtype)
        try:
            if quantize is not None:
                to_4_bits(made, quantize)
            with torch.device("meta"):
                _place(made, method, fields)
                if gradient_checkpointing:
                    checkpoint(made, gradient_checkpointing)
                chosen = make_optimizer(made.train(), optimizer)
            inputs = make_inputs(made, batch_size, length)
            with torch.device("cpu"):
                follow(following, made, inputs, chosen, gradient_accumulation)
        except PeftcoreError:
            raise
        except Exception as error:  # anything may go wrong in a forward, or in a method that looks at values
            raise NotFollowed(
                f"a step of {type(made).__name__} does not run without values: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
    named = "every parameter" if method is None else getattr(method, "peft_type", method)
    found = _estimate(
        f"a training step of {type(made).__name__}, {named}, batch {batch_size} x {length}",
        following,
        getattr(text_config(made.config), "vocab_size", None) if hasattr(made, "config") else None,
        summary(made),
        is_paged(optimizer),
    )
    return replace(found, device=where)


def _place(model: nn.Module, method: Any, fields: dict[str, Any]) -> None:
    if method is None:
        model.requires_grad_(True)
    elif isinstance(method, str) and takes_batches(method, fields):  # none are needed for its size
        apply_to_fill(model, registry.method(method).config_class(**fields))
    else:
        apply(model, method, **fields)


def checkpoint(model: nn.Module, kind: bool | str) -> None:
    """Let a model of transformers compute activations again in the backward, by either kind of PyTorch's."""
    if kind not in (True, "reentrant", "non-reentrant"):
        raise PeftcoreError(
            f"gradient_checkpointing is True, False, 'reentrant' or 'non-reentrant', found {kind!r}. Selective "
            "checkpointing is not followed"
        )
    for name in ("activation_checkpointing_enable", "gradient_checkpointing_enable"):  # by transformers' release
        if hasattr(model, name):
            getattr(model, name)({"use_reentrant": kind == "reentrant"})
            return
    raise NotFollowed(f"{type(model).__name__} has no gradient checkpointing of transformers' kind")


def _estimate(title: str, following: Following, vocabulary: int | None, about: Summary, paged: bool) -> Estimate:
    operations, storages = following.operations, following.storages
    ends = _ends_of_forwards(operations)
    changes: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for storage in storages:
        kind = KINDS.index(storage.kind or _kind(storage, operations, ends, vocabulary))
        changes[storage.born][kind] += storage.bytes
        if storage.died is not None:
            changes[storage.died][kind] -= storage.bytes
    for number, operation in enumerate(operations):
        if operation.cost.scratch:
            changes[number][KINDS.index(KERNELS)] += operation.cost.scratch
            changes[number + 1][KINDS.index(KERNELS)] -= operation.cost.scratch
    stays = kept([operation.cost for operation in operations], following.libraries)
    changes[0][KINDS.index(KEPT)] += stays.allocated
    now, timeline = [0] * len(KINDS), []
    for number in sorted(changes):
        for kind, change in changes[number].items():
            now[kind] += change
        timeline.append((number, tuple(now)))
    at, most = max(timeline, key=lambda entry: sum(entry[1]))
    phases = [
        (number, operation.phase)
        for number, operation in enumerate(operations)
        if number == 0 or operations[number - 1].phase != operation.phase
    ]
    parts = dict(zip(KINDS, most, strict=True))
    return Estimate(
        title,
        parts,
        _where(operations, at),
        tuple(timeline),
        tuple(phases),
        tuple(operations),
        about,
        paged,
        storages=tuple(storages),
        events=tuple(following.events),
        untouched=stays.allocated - stays.touched,
    )


def _ends_of_forwards(operations: list[Operation]) -> list[int]:
    """The operations behind the last one of each forward."""
    phases = [operation.phase for operation in operations]
    pairs = itertools.pairwise(phases)
    return [number + 1 for number, (one, other) in enumerate(pairs) if one.startswith(FORWARD) and one != other]


def _kind(storage: Storage, operations: list[Operation], ends: list[int], vocabulary: int | None) -> str:
    if vocabulary is not None and len(storage.shape) > 1 and storage.shape[-1] == vocabulary:
        return LOGITS
    if storage.born >= len(operations):
        return TEMPORARIES
    phase = operations[storage.born].phase
    if phase.startswith(FORWARD):
        end = next((end for end in ends if end > storage.born), len(operations))
        return ACTIVATIONS if storage.died is None or storage.died > end else TEMPORARIES
    again = phase.startswith(BACKWARD) and operations[storage.born].recomputed
    return ACTIVATIONS if again else TEMPORARIES


def _where(operations: list[Operation], at: int) -> str:
    operation = operations[min(at, len(operations) - 1)]
    inside = f" in {operation.module}" if operation.module else ""
    return f"{operation.phase}: {operation.name.partition('::')[2]}{inside}"
