"""Several adapters in one batch: each sample passes through its own adapter, or through none.

The module runs once per adapter, on the samples that have it. An adapter class can define a faster way:

    @staticmethod
    per_sample(adapters, index, base, *args, **kwargs) -> output, or NotImplemented

Samples are in dimension 0 of the first tensor, and `index`, int64 `[x.shape[0]]`, gives for each row the index of its
adapter in `adapters`; -1 for none.

The dimension of a module's samples was observed before (`rows.py`). The call records which sample each row belongs to:
when `generate` repeats samples for beams, it also repeats their indices (`SAMPLES`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.engine.adaptation.concurrency import ModelLock
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import ROWS
from peftcore.model.rows import UNKNOWN, Rows, Samples, first_placement, join_samples, slice_samples
from peftcore.plugin.adapter import Adapter
from peftcore.plugin.call import Call, CallState, Frame, as_if_called, current_frame
from peftcore.plugin.link import Link
from peftcore.plugin.outputs import first_of, with_first


class Group:
    """The indices of the samples in a batch that have the same adapter."""

    def __init__(self, numbers: tuple[int, ...], device: torch.device) -> None:
        self.numbers = numbers
        self.index = torch.tensor(numbers, device=device)  # int64

    def __len__(self) -> int:
        return len(self.numbers)


class SampleAdapters:
    """The adapters that samples use at one module, and the adapter of each sample.

    Args:
        adapters: all adapters of the module, by name.
        samples: the adapter's name of each sample.
    """

    __slots__ = ("_index", "adapters", "joint_forward", "names", "samples")

    def __init__(self, adapters: Mapping[str, nn.Module | None], samples: tuple[str | None, ...]) -> None:
        self.names = [name for name in dict.fromkeys(samples) if name is not None and name in adapters]
        self.adapters: list[Any] = [adapters[name] for name in self.names]
        number: dict[str | None, int] = {name: i for i, name in enumerate(self.names)}
        self.samples = [number.get(name, -1) for name in samples]
        kinds = {type(adapter) for adapter in self.adapters}
        self.joint_forward = _joint_forward_of(next(iter(kinds))) if len(kinds) == 1 else None
        self._index: Tensor | None = None

    def index(self, device: torch.device) -> Tensor:
        """Return the index of each sample's adapter, int64 `[samples]`; -1 for none."""
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.samples, device=device)
        return self._index

    def groups(self, device: torch.device) -> list[tuple[int, Group]]:
        """Return pairs of (index of an adapter or -1 for none, the samples that have it)."""
        return [
            (number, Group(tuple(i for i, sample_number in enumerate(self.samples) if sample_number == number), device))
            for number in sorted(set(self.samples))
        ]


def _joint_forward_of(kind: type[nn.Module]) -> Callable[..., Any] | None:
    """Return `per_sample` of a class of adapters, or None if it has none."""
    function = kind.per_sample if issubclass(kind, Adapter) else None
    return None if function is Adapter.per_sample else function


class PerSample:
    """Link of a module's chain that passes each sample through its adapter.

    Args:
        base: the module's own forward.
        adapters: adapters of the module.
        link: (name) -> the link of that adapter around the module.
        lock: lock of the model, whose current activation is used.
    """

    __slots__ = ("_adapters", "_base", "_link", "_links", "_lock", "module")

    def __init__(
        self,
        base: Any,
        adapters: Any,
        link: Callable[[str], Callable[..., Any]],
        lock: ModelLock,
    ) -> None:
        self.module, self._base, self._lock = base.module, base, lock
        self._adapters, self._links, self._link = adapters._modules, adapters.links, link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        frame = current_frame()
        call = None if frame is None else frame.call
        sample_adapters = self._current_adapters(call)
        if not sample_adapters.names:
            return self._base(*args, **kwargs)
        first_tensor, rows = self._rows(len(sample_adapters.samples), call, args, kwargs)
        if sample_adapters.joint_forward is not None and all(
            self._links.get(name, Link).calls_adapter for name in sample_adapters.names
        ):
            output = self._run_in_one_pass(sample_adapters, rows.first, first_tensor, *args, **kwargs)
            if output is not NotImplemented:
                return output
        if all(self._links.get(name, Link).follows for name in sample_adapters.names):
            return self._run_after_module(sample_adapters, rows, frame, *args, **kwargs)
        parts, groups = [], sample_adapters.groups(first_tensor.device)
        count = len(sample_adapters.samples)
        for number, group in groups:
            run = self._base if number < 0 else self._link(sample_adapters.names[number])
            if len(group) == count:
                return run(*args, **kwargs)
            own_args, own_kwargs = self._slice_arguments(rows, first_tensor, group, count, args, kwargs)
            with as_if_called(frame, _restrict_frame(frame, group, count)):
                parts.append(run(*own_args, **own_kwargs))
        order = torch.cat([group.index for _, group in groups]).argsort()
        return join_samples(parts, rows.output, [len(group) for _, group in groups], order)

    def _current_adapters(self, call: Call | None) -> SampleAdapters:
        """Return this module's adapters for the current activation."""
        activation = self._lock.choice() or self._lock.activation
        sample_numbers = call.samples if call is not None else None
        samples = activation.samples or ()
        if sample_numbers is not None:
            samples = tuple(samples[i] for i in sample_numbers)
        if is_dynamo_compiling():
            return SampleAdapters(self._adapters, samples)
        sample_adapters: SampleAdapters | None = activation.cache.get((self.module, sample_numbers))
        if sample_adapters is None:
            sample_adapters = activation.cache[self.module, sample_numbers] = SampleAdapters(self._adapters, samples)
        return sample_adapters

    def _rows(
        self, samples: int, call: Call | None, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Tensor, Rows]:
        """Return (first tensor argument, position of the samples in it), after checking the number of samples."""
        first_tensor = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = self.module.__dict__.get(ROWS, "it was not observed")
        kind = type(self.module).__name__
        if isinstance(rows, str) or first_tensor is None:
            reason = rows if isinstance(rows, str) else "it is called without a tensor"
            raise PeftcoreError(
                f"{samples} samples have adapters (activate(..., per_sample=True)), but the input of a {kind} cannot "
                f"be split into samples: {reason}. Leave that module out of target_modules, or run the samples of "
                "each adapter in a separate batch"
            )
        entries_per_sample, dim = rows.first.entries(call), rows.first.dim
        size = first_tensor.shape[dim] if dim < first_tensor.dim() else 0
        if entries_per_sample is None or size != samples * entries_per_sample:
            batch_text = (
                f"{size // entries_per_sample:,}"
                if entries_per_sample and size % entries_per_sample == 0
                else f"{size:,} rows"
            )
            raise PeftcoreError(
                f"{samples} samples have adapters (activate(..., per_sample=True)), but {kind} got a batch of "
                f"{batch_text}. Name one adapter per sample"
            )
        return first_tensor, rows

    def _slice_arguments(
        self,
        rows: Rows,
        first_tensor: Tensor,
        samples: Group,
        count: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> tuple[list[Any], dict[str, Any]]:
        """Return the arguments restricted to some of the samples."""
        names: tuple[str, ...] = type(self.module)._peftcore_arguments

        def part(name: str, value: Any) -> Any:
            where = rows.first if value is first_tensor else rows.arguments.get(name, UNKNOWN)
            return slice_samples(value, where, samples.index, count)

        sliced_args = [part(names[i] if i < len(names) else "", value) for i, value in enumerate(args)]
        return sliced_args, {name: part(name, value) for name, value in kwargs.items()}

    def _run_in_one_pass(
        self, sample_adapters: SampleAdapters, placement: Samples, first_tensor: Tensor, *args: Any, **kwargs: Any
    ) -> Any:
        """Run all adapters in one pass by their class's `per_sample`; return NotImplemented if that is not possible."""
        joint_forward = cast(Callable[..., Any], sample_adapters.joint_forward)
        index = sample_adapters.index(first_tensor.device)
        entries_per_sample = first_tensor.shape[placement.dim] // len(sample_adapters.samples)
        index = index if entries_per_sample == 1 else index.repeat_interleave(entries_per_sample)
        if placement.dim == 0:
            return joint_forward(sample_adapters.adapters, index, self._base, *args, **kwargs)
        if not args or args[0] is not first_tensor or len(args) > 1 or kwargs:
            return NotImplemented
        output = joint_forward(sample_adapters.adapters, index, self._base, first_tensor.transpose(0, placement.dim))
        return output if output is NotImplemented else output.transpose(0, placement.dim).contiguous()

    def _run_after_module(
        self, sample_adapters: SampleAdapters, rows: Rows, frame: Frame | None, *args: Any, **kwargs: Any
    ) -> Any:
        """Run adapters that all follow the module: the module runs once on the whole batch."""
        output = self._base(*args, **kwargs)
        first_output, location, count = first_of(output), first_placement(rows.output), len(sample_adapters.samples)
        parts, groups = [], sample_adapters.groups(first_output.device)
        for number, group in groups:
            y = slice_samples(first_output, location, group.index, count)
            with as_if_called(frame, _restrict_frame(frame, group, count)):
                parts.append(y if number < 0 else sample_adapters.adapters[number](y))
        order = torch.cat([group.index for _, group in groups]).argsort()
        return with_first(output, join_samples(parts, location, [len(group) for _, group in groups], order))


class _CallOfSamples(Call):
    """View of a model call restricted to some of its samples.

    Args:
        call: the full call.
        where: position of the samples in the model's arguments, as in `Rows.arguments`.
        samples: the samples.
        count: number of samples in the batch.
    """

    def __init__(self, call: Call, locations: Mapping[str, Any], samples: Group, count: int) -> None:
        super().__init__(call._values)
        outer = call.samples
        self._sample_numbers = samples.numbers if outer is None else tuple(outer[i] for i in samples.numbers)
        self._call, self._where, self._index, self._count = call, locations, samples.index, count
        self.state = call.states.setdefault(samples.numbers, CallState())

    def __getitem__(self, name: str) -> Any:
        return slice_samples(self._call[name], self._where.get(name, UNKNOWN), self._index, self._count)

    def get(self, name: str, default: Any = None) -> Any:
        return self[name] if name in self._values else default


# Names of arguments with samples in dimension 0, for models whose observed calls did not include them.
_OF_SAMPLES = (
    "input_ids", "inputs_embeds", "attention_mask", "token_type_ids", "labels", "decoder_input_ids",
    "decoder_inputs_embeds", "decoder_attention_mask",
)  # fmt: skip


def _restrict_frame(frame: Frame | None, samples: Group, count: int) -> Call | None:
    """Return the call restricted to some samples, for the adapters of these samples."""
    if frame is None:
        return None
    rows = frame.module.__dict__.get(ROWS)
    locations = rows.arguments if isinstance(rows, Rows) else {}
    default_locations = dict.fromkeys((*_OF_SAMPLES, *frame.context.names), Samples())
    return _CallOfSamples(frame.call, {**default_locations, **locations}, samples, count)
