"""Prediction of a training step: memory by purpose, and the operation at its peak."""

from __future__ import annotations

import itertools
import warnings
from collections import defaultdict
from contextlib import ExitStack
from dataclasses import dataclass, field, fields as dataclass_fields, replace
from functools import cached_property
from threading import RLock
from typing import Any

import torch
from torch import nn

import peftcore
from peftcore.engine import add_adapter
from peftcore.errors import PeftcoreError
from peftcore.estimating.checkpointing import checkpoint
from peftcore.estimating.costs import retained_bytes
from peftcore.estimating.devices import Device, device_of, process_memory
from peftcore.estimating.following import Following, NotFollowed, Operation, Storage
from peftcore.estimating.loop import BACKWARD, FORWARD, follow, is_paged
from peftcore.estimating.losses import rows_of
from peftcore.estimating.peaks import held, peaks
from peftcore.estimating.purpose import Purpose
from peftcore.estimating.ranges import Range
from peftcore.estimating.segments import peak_reserved
from peftcore.estimating.stand_in import apply_again, stand_in
from peftcore.estimating.step import Step
from peftcore.estimating.tensor_parallel import divide, first_of, refuse_trained
from peftcore.optim import PAGE_BYTES
from peftcore.plugin import has_adapters, ranks, takes_batches, text_config
from peftcore.quantization import quantize as to_4_bits
from peftcore.training import recomputes

_ONE_AT_A_TIME = RLock()  # the simulation replaces functions of PyTorch, which overlapping threads would not restore
_PURPOSES = tuple(Purpose)
_OF_STEP = {item.name for item in dataclass_fields(Step)}
NOT_COUNTED = "Not included: loading, evaluation, data held by a trainer (logs, examples), and the CUDA context."


@dataclass(frozen=True)
class Estimate:
    """Prediction of a training step. Sizes in bytes.

    Args:
        title: Description of the model, the method and the step in one line.
        parts: Memory at the peak, by `Purpose`.
        where: Operation at the peak.
        timeline: (operation, bytes of each `Purpose` after it, in its order), in the order of the step.
        phases: (first operation, name) of each phase of the step.
        operations: All operations, in order.
        summary: Summary of the model with its adapters.
        step: Settings of the step.
        paged: Whether the optimizer's state is paged. `parts` includes all of it; if memory is short, a single page
            stays in memory.
        device: Device for `fits`.
        storages: All storages of the step.
        libraries: Resident bytes of this process before the step, excluding the model's weights; 0 on a GPU.
    """

    title: str
    parts: dict[str, int]
    where: str
    timeline: tuple[tuple[int, tuple[int, ...]], ...]
    phases: tuple[tuple[int, str], ...]
    operations: tuple[Operation, ...]
    summary: peftcore.Summary
    step: Step = field(default_factory=Step)
    paged: bool = False
    device: Device | None = None
    storages: tuple[Storage, ...] = field(default=(), repr=False)
    libraries: int = 0

    @cached_property
    def beyond_libraries(self) -> Range:
        """Bytes at the peak of a process on this machine, excluding Python and its libraries."""
        return held(peaks(self.storages, self.operations)).plus(self.parts[Purpose.KEPT])

    @property
    def process(self) -> Range:
        """Bytes at the peak of this process if it runs the step."""
        return self.beyond_libraries.plus(self.libraries)

    @property
    def peak(self) -> int:
        """Bytes of all tensors at the peak."""
        return sum(self.parts.values())

    @cached_property
    def reserved(self) -> int:
        """Bytes that PyTorch's allocator reserves on a GPU (see `segments`)."""
        return peak_reserved(self.storages, self.operations)

    @property
    def least(self) -> int:
        """Bytes of tensors at the peak, with as much of the optimizer's state as possible on disk."""
        return self.peak - max(0, self.parts[Purpose.STATE] - PAGE_BYTES) if self.paged else self.peak

    @property
    def flops(self) -> float:
        """Floating-point operations of a step."""
        return sum(operation.cost.flops for operation in self.operations)

    @property
    def needed(self) -> float:
        """Bytes that must be free: the upper estimate without libraries, or the reserved bytes on a GPU."""
        on_card = self.device is not None and self.device.is_card
        return (self.reserved if on_card else self.beyond_libraries.high) - (self.peak - self.least)

    @property
    def fits(self) -> bool | None:
        """Whether the device has enough memory (on this machine, for all ranks together), or None without a device."""
        if self.device is None:
            return None
        return self.needed * (1 if self.device.is_card else self.step.ranks) <= self.device.memory

    def __str__(self) -> str:
        lines = [self.title, *(line for line in str(self.summary).splitlines() if not line.startswith(" "))]
        lines += [f"  {purpose:<18}{size / 1e6:>12,.1f} MB" for purpose, size in self.parts.items() if size]
        lines += [f"  {'tensors at peak':<18}{self.peak / 1e6:>12,.1f} MB, {self.where}"]
        if self.device is None or not self.device.is_card:
            for_each_process = (
                (f", for each of {self.step.ranks} processes on this machine") if self.step.ranks > 1 else ""
            )
            libraries = (
                f"including {self.libraries / 1000000000.0:.2f} GB for Python and its libraries, as in this process"
            )
            lines += [f"  {'process':<18}{self.process!s:>15}, {libraries}{for_each_process}"]
        else:
            lines += [f"  {'GPU':<18}{self.reserved / 1000000.0:>12,.1f} MB reserved by PyTorch's allocator"]
        if self.paged:
            lines += [f"  {'with state paged':<18}{self.least / 1e6:>12,.1f} MB of tensors"]
        lines += [f"{self.flops / 1e12:,.2f} T floating-point operations"]
        if self.device is not None:
            verdict = "fits" if self.fits else "does not fit"
            lines += [f"{verdict} into {self.device.memory / 1e9:,.1f} GB on {self.device.name}"]
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
    """Predict a training step by running it on meta tensors. Weights are not read, and the model is not changed.

    Args:
        model: A module, a transformers config, a folder with a `config.json`, or a hub id.
        method: As in `peftcore.apply`. The model keeps its existing adapters; `adapter=` names the new one. None trains
            the model's current adapters, or all parameters of a model without adapters.
        step: Settings of the step. None means `Step()`.
        quantize: Name of the 4-bit format of a quantized base, such as `nf4`.
        dtype: Dtype of the base. None means the module's or the config's dtype.
        device: Device for `fits`: `cpu` for this machine, or a GPU in `CARDS` such as `h100`.
        options: Fields of `Step` (batch_size=4, length=2048, ranks=8, ...), which override `step`, and fields of the
            method's config.

    Raises:
        NotFollowed: The model cannot be built or run without values, or has no loss.
        PeftcoreError: An argument is wrong, or the method does not support the model.

    Examples:
        >>> config = AutoConfig.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> estimate = peftcore.estimate(config, "lora", r=16, batch_size=4, length=512, device="rtx4090")
        >>> print(estimate)
    """
    step = split_step_options(step, options)
    _refuse_ambiguous_fields(method)
    target = device_of(device) if isinstance(device, str) else device
    adapters: tuple[str, ...] = ()
    on_card = target is not None and target.is_card
    step = _as_model(step, model, on_card)
    libraries = 0 if on_card else process_memory() - _weights_here(model)
    following = Following(on_card=on_card)
    with ExitStack() as stack:
        stack.enter_context(_ONE_AT_A_TIME)
        stack.enter_context(torch.random.fork_rng(devices=[]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # users see these warnings when `apply` runs on the model itself
        meta_model = stand_in(model, dtype)
        try:
            mesh = stack.enter_context(first_of(step.tp_size))
            with torch.device("meta"):
                divide(meta_model, mesh)
            if quantize is not None:
                to_4_bits(meta_model, quantize)
            with torch.device("meta"):
                adapters = apply_again(meta_model, model)
                _place(meta_model, method, options, step)
                refuse_trained(meta_model, step.tp_size)
                if step.gradient_checkpointing:
                    checkpoint(meta_model, step.gradient_checkpointing)
                if step.fused:
                    peftcore.fuse(meta_model, recompute=step.recompute)  # type: ignore[arg-type]
                follow(following, meta_model.train(), step, on_card=on_card)
        except PeftcoreError:
            raise
        except Exception as error:  # a forward, or a method that reads values, may raise anything
            raise NotFollowed(
                f"a step of {type(meta_model).__name__} cannot run without values: {type(error).__name__}: "
                f"{str(error).partition(chr(10))[0]}"
            ) from error
    parts = [] if method is None else [str(getattr(method, "peft_type", method))]
    parts += [f"adapters {list(adapters)}"] if adapters else []
    trained_by = " next to ".join(parts) or "every parameter"
    prediction = _estimate(
        f"a training step of {type(meta_model).__name__}, {trained_by}, {step}",
        following,
        getattr(text_config(meta_model.config), "vocab_size", None) if hasattr(meta_model, "config") else None,
        peftcore.summary(meta_model),
        step,
    )
    return replace(prediction, device=target, libraries=libraries)


def _weights_here(model: Any) -> int:
    """Return the bytes of the model's tensors in this process, which the step already counts."""
    if not isinstance(model, nn.Module):
        return 0
    tensors = [ranks.local(tensor) for tensor in (*model.parameters(), *model.buffers())]
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in tensors if t.device.type == "cpu"}
    return sum(storage.nbytes() for storage in storages.values())


def split_step_options(step: Step | None, options: dict[str, Any]) -> Step:
    """Move the fields of `Step` from `options` into the step, and return it.

    The remaining options are fields of a config.
    """
    return replace(step or Step(), **{name: options.pop(name) for name in _OF_STEP & options.keys()})


def _as_model(step: Step, model: Any, on_card: bool) -> Step:
    """Return the step with the model's settings: loss without logits, and fused operators, if not on a GPU."""
    summary = peftcore.summary(model) if isinstance(model, nn.Module) else None
    without_logits = step.without_logits or (summary is not None and summary.without_logits)
    is_fused = summary is not None and bool(summary.fused)
    return replace(
        step,
        without_logits=without_logits,
        fused=(step.fused or is_fused) and not on_card,
        recompute=recomputes(model) if is_fused else step.recompute,
    )


def _refuse_ambiguous_fields(method: Any) -> None:
    """Raise PeftcoreError if a field of `Step` is also a field of the method's config."""
    if isinstance(method, str):
        shared_fields = _OF_STEP & {item.name for item in dataclass_fields(peftcore.method(method).config_class)}
        if shared_fields:
            raise PeftcoreError(
                f"{', '.join(sorted(shared_fields))} belong to both Step and the config of {method}. Pass the config "
                "object as method and step=peftcore.Step(...)"
            )


def _place(model: nn.Module, method: Any, fields: dict[str, Any], step: Step) -> None:
    if step.per_sample and method is None:
        raise PeftcoreError("per_sample needs a method, because all parameters are trained without one. Pass a method")
    if step.per_sample:
        names = [f"adapter {number}" for number in range(step.per_sample)]
        for name in names:
            peftcore.apply(model, method, adapter=name, **fields)
        rows = rows_of(step.loss, step.batch_size)
        peftcore.activate(model, [names[row % step.per_sample] for row in range(rows)], per_sample=True)
    elif method is None and not has_adapters(model):
        model.requires_grad_(True)
    elif method is None:
        if not any(parameter.requires_grad for parameter in model.parameters()):
            raise PeftcoreError(
                "no active adapter of the model is trainable. Activate a trainable adapter, peftcore.activate(model, "
                "'NAME'), or pass a method"
            )
    elif isinstance(method, str) and takes_batches(method, fields):  # its size does not depend on the batch
        add_adapter(model, method, fields, fill=lambda: None)
    else:
        peftcore.apply(model, method, **fields)


def _estimate(
    title: str, following: Following, vocabulary: int | None, summary: peftcore.Summary, step: Step
) -> Estimate:
    operations, storages = following.operations, following.storages
    ends = _ends_of_forwards(operations)
    changes: dict[int, dict[int, int]] = defaultdict(lambda: defaultdict(int))
    for storage in storages:
        kind = _PURPOSES.index(storage.kind or _kind(storage, operations, ends, vocabulary))
        changes[storage.born][kind] += storage.bytes
        if storage.died is not None:
            changes[storage.died][kind] -= storage.bytes
    for number, operation in enumerate(operations):
        if operation.cost.scratch:
            changes[number][_PURPOSES.index(Purpose.KERNELS)] += operation.cost.scratch
            changes[number + 1][_PURPOSES.index(Purpose.KERNELS)] -= operation.cost.scratch
    if not following.on_card:
        changes[0][_PURPOSES.index(Purpose.KEPT)] += retained_bytes([operation.cost for operation in operations])
    sizes, timeline = [0] * len(_PURPOSES), []
    for number in sorted(changes):
        for kind, change in changes[number].items():
            sizes[kind] += change
        timeline.append((number, tuple(sizes)))
    peak, sizes_at_peak = max(timeline, key=lambda entry: sum(entry[1]))
    phases = [
        (number, operation.phase)
        for number, operation in enumerate(operations)
        if number == 0 or operations[number - 1].phase != operation.phase
    ]
    parts: dict[str, int] = dict(zip(_PURPOSES, sizes_at_peak, strict=True))
    return Estimate(
        title=title,
        parts=parts,
        where=_location(operations, peak),
        timeline=tuple(timeline),
        phases=tuple(phases),
        operations=tuple(operations),
        summary=summary,
        step=step,
        paged=is_paged(step.optimizer),
        storages=tuple(storages),
    )


def _ends_of_forwards(operations: list[Operation]) -> list[int]:
    """Return the index of the operation after each forward."""
    phases = [operation.phase for operation in operations]
    pairs = itertools.pairwise(phases)
    return [
        number + 1
        for number, (phase, next_phase) in enumerate(pairs)
        if phase.startswith(FORWARD) and phase != next_phase
    ]


def _kind(storage: Storage, operations: list[Operation], ends: list[int], vocabulary: int | None) -> str:
    if vocabulary is not None and len(storage.shape) > 1 and storage.shape[-1] == vocabulary:
        return Purpose.LOGITS
    if storage.born >= len(operations):
        return Purpose.TEMPORARIES
    phase = operations[storage.born].phase
    if phase.startswith(FORWARD):
        end = next((end for end in ends if end > storage.born), len(operations))
        return Purpose.ACTIVATIONS if storage.died is None or storage.died > end else Purpose.TEMPORARIES
    is_recomputed = phase.startswith(BACKWARD) and operations[storage.born].recomputed
    return Purpose.ACTIVATIONS if is_recomputed else Purpose.TEMPORARIES


def _location(operations: list[Operation], number: int) -> str:
    operation = operations[min(number, len(operations) - 1)]
    module = f" in {operation.module}" if operation.module else ""
    return f"{operation.phase}: {operation.name.partition('::')[2]}{module}"
