"""What a training step takes: memory by what it is for, where in the step its peak falls, operations and bytes."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from functools import cached_property
from typing import Any

import torch
from torch import nn

from peftcore.engine import activate, apply, apply_to_fill, state_of, takes_batches
from peftcore.engine.summary import Summary, summary
from peftcore.errors import PeftcoreError
from peftcore.estimating.checkpointing import checkpoint
from peftcore.estimating.costs import kept
from peftcore.estimating.devices import Device, device_of
from peftcore.estimating.following import Event, Following, NotFollowed, Operation, Storage
from peftcore.estimating.heap import Held, held_by_process
from peftcore.estimating.libraries import OF_A_CARD
from peftcore.estimating.libraries import here as libraries_here
from peftcore.estimating.loop import ADAPTERS, BACKWARD, BASE, FORWARD, INPUTS, STATE, follow, is_paged
from peftcore.estimating.losses import rows_of
from peftcore.estimating.processes import GATHERED, GRADIENTS, MESSAGES
from peftcore.estimating.segments import peak_reserved
from peftcore.estimating.standing import apply_again, stand_in
from peftcore.estimating.step import Step
from peftcore.observation.config import text_config
from peftcore.optim.paging import PAGE_BYTES
from peftcore.quantization import quantize as to_4_bits
from peftcore.registry import registry

ACTIVATIONS, LOGITS, TEMPORARIES = "activations", "logits and loss", "temporaries"
KERNELS, KEPT = "inside operators", "kept by operators"
KINDS = (
    BASE, GATHERED, ADAPTERS, GRADIENTS, STATE, INPUTS, ACTIVATIONS, LOGITS, TEMPORARIES, KERNELS, MESSAGES, KEPT,
)  # fmt: skip
_OF_STEP = {each.name for each in dataclass_fields(Step)}
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
        step: how it is run.
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
    step: Step = field(default_factory=Step)
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
        """Is the device's memory enough? On this machine what is free of it now, for all ranks together."""
        if self.device is None:
            return None
        return self.needed * (self.step.ranks if self.device.measured else 1) <= self.device.memory

    def __str__(self) -> str:
        lines = [self.title, *(line for line in str(self.summary).splitlines() if not line.startswith(" "))]
        lines += [f"  {kind:<18}{size / 1e6:>12,.1f} MB" for kind, size in self.parts.items() if size]
        lines += [f"  {'peak':<18}{self.peak / 1e6:>12,.1f} MB, {self.where}"]
        if self.device is None or self.device.measured:
            ranks = f"; {self.step.ranks} of them here" if self.step.ranks > 1 else ""
            lines += [f"  {'of a process':<18}{self.resident / 1e6:>12,.1f} MB beside its libraries{ranks}"]
        else:
            lines += [f"  {'of the card':<18}{self.reserved / 1e6:>12,.1f} MB in segments of PyTorch's allocator"]
        if self.paged:
            lines += [f"  {'with state paged':<18}{self.least / 1e6:>12,.1f} MB"]
        lines += [f"{self.flops / 1e12:,.2f} T floating-point operations"]
        if self.device is not None and self.seconds is not None:
            room = f"{'fits' if self.fits else 'does not fit'} into {self.device.memory / 1e9:,.1f} GB"
            how = "at rates measured here" if self.device.measured else "by its data sheet, half of its rates, untested"
            how += ", without what ranks wait for" if self.step.ranks > 1 else ""
            lines[-1] += f": about {self.seconds:.2g} s a step on {self.device.name} ({how}); {room}"
        lines += [NOT_COUNTED]
        return "\n".join(lines)


def estimate(
    model: Any,
    method: Any = None,
    /,
    *,
    step: Step | None = None,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | Device | None = None,
    **options: Any,
) -> Estimate:
    """Estimate a training step by running it without memory: no weight is read, and the model is left alone.

    Args:
        model: a module, a config of transformers, a folder with a `config.json`, or a hub id.
        method: as `peftcore.apply` takes it, next to the adapters that the model has: `adapter=` names another one.
            None: these adapters are trained as they are, or, where there are none, every parameter is.
        step: how it is run; None: as `Step()` says.
        quantize: `nf4` or `fp4`: the base in 4 bits.
        dtype: of the base; None: the module's, or what the config says.
        device: for the time, and whether it fits: `cpu`, which is this machine, or a card of `CARDS`, such as `h100`.
        options: fields of `Step` (batch_size=4, length=2048, ranks=8, ...), before those of `step`; all others are of
            the method's config.

    Raises:
        NotFollowed: the model cannot be built or run without values, or has no loss.
        PeftcoreError: an argument is wrong, or the method refuses the model.
    """
    step = step_of(step, options)
    _refuse_doubtful(method)
    where = device_of(device) if isinstance(device, str) else device
    there: tuple[str, ...] = ()
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
                there = apply_again(made, model)
                _place(made, method, options, step)
                if step.gradient_checkpointing:
                    checkpoint(made, step.gradient_checkpointing)
                follow(following, made.train(), step, on_card=on_card)
        except PeftcoreError:
            raise
        except Exception as error:  # anything may go wrong in a forward, or in a method that looks at values
            raise NotFollowed(
                f"a step of {type(made).__name__} does not run without values: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
    parts = [] if method is None else [str(getattr(method, "peft_type", method))]
    parts += [f"adapters {list(there)}"] if there else []
    named = " next to ".join(parts) or "every parameter"
    found = _estimate(
        f"a training step of {type(made).__name__}, {named}, {step}",
        following,
        getattr(text_config(made.config), "vocab_size", None) if hasattr(made, "config") else None,
        summary(made),
        step,
    )
    return replace(found, device=where)


def step_of(step: Step | None, options: dict[str, Any]) -> Step:
    """The step with those `options` that are fields of one, which are taken out of them."""
    return replace(step or Step(), **{name: options.pop(name) for name in _OF_STEP & options.keys()})


def _refuse_doubtful(method: Any) -> None:
    """Raise where a name is one of the step's and of the method's config."""
    if isinstance(method, str):
        both = _OF_STEP & {each.name for each in dataclass_fields(registry.method(method).config_class)}
        if both:
            raise PeftcoreError(
                f"{', '.join(sorted(both))}: of a step and of {method}'s config. Give the config itself, and "
                "step=peftcore.Step(...)"
            )


def _place(model: nn.Module, method: Any, fields: dict[str, Any], step: Step) -> None:
    if step.per_sample and method is None:
        raise PeftcoreError("per_sample is of a method's adapters, and every parameter is trained: name a method")
    if step.per_sample:
        names = [f"adapter {number}" for number in range(step.per_sample)]
        for name in names:
            apply(model, method, adapter=name, **fields)
        rows = rows_of(step.loss, step.batch_size)
        activate(model, [names[row % step.per_sample] for row in range(rows)], per_sample=True)
    elif method is None and state_of(model) is None:
        model.requires_grad_(True)
    elif method is None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise PeftcoreError(
                "no active adapter of the model is trainable. Activate one that is, peftcore.activate(model, 'NAME'), "
                "or name a method"
            )
    elif isinstance(method, str) and takes_batches(method, fields):  # none are needed for its size
        apply_to_fill(model, registry.method(method).config_class(**fields))
    else:
        apply(model, method, **fields)


def _estimate(title: str, following: Following, vocabulary: int | None, about: Summary, step: Step) -> Estimate:
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
        step,
        is_paged(step.optimizer),
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
