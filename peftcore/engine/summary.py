"""Summarize a model with adapters (`summary`), and preview what `apply` would do (`plan`)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.fused_forward import fused_modules, is_without_logits
from peftcore.engine.method_placements import adapted_paths, coverage_of, device_and_dtype, placements_for
from peftcore.engine.preflight import check_dtype
from peftcore.engine.state import (
    Applied,
    State,
    adapter_modules,
    adapter_parameters,
    changed_paths,
    check_model,
    state_of,
)
from peftcore.engine.trained_parameters import TrainedParameters
from peftcore.model.base_modules import (
    base_modules,
    base_parameters,
    caching_base_modules,
    original_class,
    original_forward,
)
from peftcore.model.experts import why_not_fused
from peftcore.model.experts.in_model import expert_weights, experts_per_token
from peftcore.model.targets import match_counts
from peftcore.model.targets.coverage import Coverage, percent
from peftcore.plugin import sharded
from peftcore.plugin.layers import shape_of
from peftcore.plugin.placements.placement import Placement


@dataclass(frozen=True, kw_only=True)
class Mixture:
    """Facts about the experts of a model whose weights are stacked, `[experts, out, in]`.

    Args:
        modules: number of modules of experts.
        count: number of experts in each module; the largest if they differ.
        per_token: number of experts that a token passes through.
        weights: number of weights of all experts.
        packed, adapted, idle: number of expert weights that are in 4 bits, have an adapter, are not used for a token.
        unfused: reason why some experts with an adapter or 4-bit weights run on dense copies; empty if none do.
        one_by_one: whether experts run one after the other because some have individual adapters.
    """

    modules: int
    count: int
    per_token: int
    weights: int
    packed: int
    adapted: int
    idle: int
    unfused: str | None = None
    one_by_one: bool = False

    def describe(self, base_parameters: int) -> str:
        """Describe the experts in one line; `base_parameters` is the number of parameters of the base."""
        execution = ""
        if self.packed or self.adapted:
            execution = "; one expert at a time" if self.one_by_one else "; fused"
            execution = (
                (f"; on dense copies of all weights, without dropout: {self.unfused}") if self.unfused else execution
            )
        return (
            f"experts: {self.modules} modules of {self.count}, {percent(self.weights, base_parameters)} of the "
            f"parameters; {percent(self.adapted, self.weights)} with an adapter, "
            f"{percent(self.packed, self.weights)} in 4 bits; a token meets {self.per_token} of {self.count}, "
            f"{base_parameters - self.idle:,} parameters in all{execution}"
        )


def mixture_of(
    model: nn.Module, reached: Collection[str] = (), copied: Collection[str] = (), one_by_one: bool = False
) -> Mixture | None:
    """Return facts about the experts of `model`; None if it has none.

    Args:
        reached: paths of modules and full names of parameters that have adapters. copied: full names of parameters
            whose change is not a low-rank product. one_by_one: whether some experts have individual adapters.
    """
    names_by_path = expert_weights(model)
    if not names_by_path:
        return None
    modules, targets = dict(base_modules(model)), set(reached)
    counts: list[int] = []
    counts_per_token: list[int] = []
    weights = packed = adapted = idle = 0
    reasons: list[str] = []
    for path, names in names_by_path.items():
        module = modules[path]
        for name in names:
            shape = shape_of(module, name)
            size, per_token = math.prod(shape), min(experts_per_token(module, model), shape[0])
            counts.append(shape[0])
            counts_per_token.append(per_token)
            weights += size
            idle += size // shape[0] * (shape[0] - per_token)
            is_packed = name in bits_of(module)
            is_adapted = not targets.isdisjoint((path, f"{path}.{name}"))
            packed += size if is_packed else 0
            adapted += size if is_adapted else 0
            reason = why_not_fused(module, original_forward(module)) if is_packed or is_adapted else None
            if not reason and f"{path}.{name}" in copied:
                reason = "its adapter is not a low-rank product"
            if reason:
                reasons.append(f"{original_class(module).__name__}: {reason}")
    return Mixture(
        modules=len(names_by_path),
        count=max(counts),
        per_token=max(counts_per_token),
        weights=weights,
        packed=packed,
        adapted=adapted,
        idle=idle,
        unfused="; ".join(dict.fromkeys(reasons)) or None,
        one_by_one=one_by_one,
    )


def bits_of(module: nn.Module) -> dict[str, tuple[int, int]]:
    """Return {name: (number of weights, bytes with scales)} of the module's 4-bit parameters."""
    sizes_by_name: dict[str, tuple[int, int]] = {}
    for name, packing in getattr(module, "packings", {}).items():  # `quantization.parameters.PackedParameters`
        parameter = module._parameters[name]
        if parameter is not None and not parameter.is_floating_point():
            buffers = (module._buffers[buffer] for buffer in packing.buffers)
            buffer_bytes = sum(buffer.nbytes for buffer in buffers if buffer is not None)
            sizes_by_name[name] = math.prod(packing.shape), parameter.nbytes + buffer_bytes
    return sizes_by_name


@dataclass(frozen=True)
class Plan:
    """The placements that `apply` would make, and their size.

    Args:
        rows: (path or parameter name, kind, number of parameters, bytes) per placement; shared parameters count once.
        matches: number of modules that each resolved pattern of `target_modules` matches.
        coverage: fraction of layer weights with an adapter, and the layers without one.
        buffers, buffer_bytes: number of untrained values in the adapters, and their size in bytes.
        experts: facts about the model's experts, if it has any.
    """

    method: str
    config: Any
    rows: tuple[tuple[str, str, int, int], ...]
    matches: dict[str, int]
    base_parameters: int
    coverage: Coverage
    buffers: int = 0
    buffer_bytes: int = 0
    experts: Mixture | None = None

    @property
    def trainable_parameters(self) -> int:
        return sum(row[2] for row in self.rows)

    @property
    def trainable_bytes(self) -> int:
        return sum(row[3] for row in self.rows)

    def __str__(self) -> str:
        kinds = Counter(kind for _, kind, _, _ in self.rows)
        lines = [
            f"{self.method}: {', '.join(f'{count} x {kind}' for kind, count in kinds.items())}",
            f"trainable: {self.trainable_parameters:,} of {self.base_parameters:,} parameters "
            f"({share(self.trainable_parameters, self.base_parameters)}), {megabytes(self.trainable_bytes)}"
            + in_buffers(self.buffers, self.buffer_bytes),
            str(self.coverage),
            *expert_lines(self),
        ]
        lines += [f"  {pattern}: {count} modules" for pattern, count in self.matches.items()]
        return "\n".join(lines)


@dataclass(frozen=True)
class AdapterSummary:
    """One adapter: its method, number of modules, and size; shared parameters count once.

    Args:
        config: the method's config.
        trained: number of base parameters that it trains.
        buffers, buffer_bytes: number of untrained values in it, and their size in bytes.
    """

    name: str
    method: str
    config: Any
    active: bool
    modules: int
    trained: int
    parameters: int
    bytes: int
    buffers: int = 0
    buffer_bytes: int = 0


@dataclass(frozen=True)
class Summary:
    """Adapters of a model, and the number of trainable parameters.

    Args:
        trainable_parameters: number of parameters with `requires_grad`.
        base_bytes: size of the base in bytes, including the scales of 4-bit weights.
        changed: {path: description of the change} of adapted modules that were replaced, resized or parametrized.
        experts: facts about the model's experts, if it has any.
        packed_parameters, packed_bytes: number of 4-bit weights in the base, and their size in bytes with scales.
        without_logits: whether training computes the loss without logits (`loss_without_logits`).
        fused: number of fused modules of each kind (`fuse`).
    """

    adapters: tuple[AdapterSummary, ...]
    base_parameters: int
    base_bytes: int
    trainable_parameters: int
    merged: bool
    changed: dict[str, str] = field(default_factory=dict)
    experts: Mixture | None = None
    packed_parameters: int = 0
    packed_bytes: int = 0
    without_logits: bool = False
    fused: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [
            f"base: {self.base_parameters:,} parameters, {megabytes(self.base_bytes)}"
            + (" (adapters merged into it)" if self.merged else ""),
            f"trainable: {self.trainable_parameters:,} ({share(self.trainable_parameters, self.base_parameters)})",
            *expert_lines(self),
        ]
        if self.packed_parameters:
            bits = 8 * self.packed_bytes / self.packed_parameters
            part = share(self.packed_parameters, self.base_parameters)
            lines.insert(1, f"in 4 bits: {self.packed_parameters:,} of them ({part}), {bits:.3f} bits each with scales")
        if self.without_logits:
            lines.append("the loss is computed without logits, in training")
        if self.fused:
            lines.append(f"fused: {counted(self.fused)}")
        lines += [
            f"  {a.name}: {a.method}, {'active' if a.active else 'inactive'}, {a.modules} modules"
            + (f", {a.trained} tensor{'s' * (a.trained > 1)} of the base" if a.trained else "")
            + f", {a.parameters:,} parameters, {megabytes(a.bytes)}"
            + in_buffers(a.buffers, a.buffer_bytes)
            for a in self.adapters
        ]
        lines += [f"  changed since: '{path}' {description}" for path, description in self.changed.items()]
        return "\n".join(lines)


def plan(model: nn.Module, method: str | Any, /, *, dtype: torch.dtype | None = None, **fields: Any) -> Plan:
    """Return the placements that `apply` would make with these arguments, and their size.

    The model is not changed. The adapters are created on the meta device and take no memory.

    Examples:
        >>> print(peftcore.plan(model, "lora", r=16))   # the model is not changed
    """
    check_dtype(dtype)
    with torch.device("meta"):
        attachments = placements_for(model, method, fields)
    parameters = dict(base_parameters(model))
    rows, buffers, buffer_bytes = [], 0, 0
    counted_tensors: set[Tensor] = set()  # adapters may share tensors
    for attachment in attachments.attached:
        _, adapter_dtype = device_and_dtype(model.get_submodule(attachment.path), dtype)
        new_parameters = [p for p in attachment.adapter.parameters() if p not in counted_tensors]
        new_buffers = [b for b in attachment.adapter.buffers() if b not in counted_tensors]
        counted_tensors.update(new_parameters, new_buffers)
        count = sum(p.numel() for p in new_parameters)
        kind = " and ".join(dict.fromkeys(type(part).__name__ for part in attachment.parts or [attachment.adapter]))
        rows.append((attachment.path, kind, count, count * adapter_dtype.itemsize))
        buffers += sum(b.numel() for b in new_buffers)
        for buffer in new_buffers:
            buffer_dtype = adapter_dtype if buffer.is_floating_point() else buffer.dtype
            buffer_bytes += buffer.numel() * buffer_dtype.itemsize
    for name in attachments.trained:
        rows.append((name, "trained parameter", parameters[name].numel(), parameters[name].nbytes))
    target_modules = getattr(attachments.config, "target_modules", None)
    return Plan(
        method=attachments.method.name,
        config=attachments.config,
        rows=tuple(rows),
        matches=match_counts(model, target_modules) if target_modules else {},
        base_parameters=sum(count for _, count in _base_of(model).values()),
        coverage=coverage_of(model, attachments),
        buffers=buffers,
        buffer_bytes=buffer_bytes,
        experts=mixture_of(
            model,
            [*adapted_paths(attachments.placements), *attachments.trained],
            set(_copied_by(attachments.placements)),
            _one_by_one(attachments.placements),
        ),
    )


def _copied_by(placements: Mapping[str, Sequence[Placement]]) -> list[str]:
    """Return the names of parameters whose change is not a low-rank product, so that calls copy the parameter."""
    names: list[str] = []
    for path, placements_at in placements.items():
        weights = (placement.copied_weight(path) for placement in placements_at)
        names += [weight for weight in weights if weight is not None]
    return names


def _one_by_one(placements: Mapping[str, Sequence[Placement]]) -> bool:
    """Return whether a placement adapts a single expert."""
    return any(
        any(placement.is_of_expert(path) for placement in placements_at) for path, placements_at in placements.items()
    )


def summary(model: nn.Module) -> Summary:
    """Return the adapters of `model`, the number of trainable parameters, and sizes. Works on any model.

    Examples:
        >>> peftcore.apply(model, "lora", r=8)
        >>> print(peftcore.summary(model))              # adapters, trainable parameters, sizes
    """
    check_model(model)
    with caching_base_modules(model):
        return _summary(model)


def _summary(model: nn.Module) -> Summary:
    state = state_of(model) or State()
    base = _base_of(model)
    packed = _packed_sizes(model)
    packed_bytes = sum(size for _, size in packed)
    # `base` already counts the bytes of 4-bit codes, which hold two weights each.
    codes = sum((weights + 1) // 2 for weights, _ in packed)
    adapters, adapted_names, copied_names, one_by_one = [], set[str](), set[str](), False
    for name, entry in state.applied.items():
        adapters.append(_adapter_summary(model, name, entry, active=name in state.active))
        _put_base_back(base, model, name)
        adapted_names.update(entry.trained, adapted_paths(entry.placements))
        copied_names.update(_copied_by(entry.placements))
        one_by_one |= _one_by_one(entry.placements)
    return Summary(
        adapters=tuple(adapters),
        base_parameters=sum(count for _, count in base.values()),
        base_bytes=sum(_count(p) * p.itemsize for p, _ in base.values()) + packed_bytes - codes,
        trainable_parameters=sum(_count(p) for p in model.parameters() if p.requires_grad),
        merged=state.merged is not None,
        changed=changed_paths(model),
        experts=mixture_of(model, adapted_names, copied_names, one_by_one),
        packed_parameters=sum(weights for weights, _ in packed),
        packed_bytes=packed_bytes,
        without_logits=is_without_logits(model),
        fused=fused_modules(model),
    )


def _packed_sizes(model: nn.Module) -> list[tuple[int, int]]:
    """Return {name: (number of weights, bytes with scales)} of the base's 4-bit parameters."""
    sizes: dict[int, tuple[int, int]] = {}  # a shared parameter counts once
    for _, module in base_modules(model):
        for name, size in bits_of(module).items():
            sizes[id(module._parameters[name])] = size
    return list(sizes.values())


def _adapter_summary(model: nn.Module, name: str, entry: Applied, *, active: bool) -> AdapterSummary:
    parameters = {parameter for _, parameter in adapter_parameters(model, name)}
    buffers = {buffer for _, module in adapter_modules(model, name) for buffer in module.buffers()}
    return AdapterSummary(
        name=name,
        method=entry.method,
        config=entry.config,
        active=active,
        modules=len(entry.paths),
        trained=len(entry.trained),
        parameters=sum(map(_count, parameters)),
        bytes=sum(_count(p) * p.itemsize for p in parameters),
        buffers=sum(b.numel() for b in buffers),
        buffer_bytes=sum(b.nbytes for b in buffers),
    )


def _put_base_back(base: dict[int, tuple[nn.Parameter, int]], model: nn.Module, adapter: str) -> None:
    """Replace, in `base`, trained parameters that are in the model now by the base's original parameters."""
    tensors = TrainedParameters.of(model, adapter)
    for _, value, original in tensors.in_model(model) if tensors is not None else ():
        if isinstance(original, nn.Parameter):
            base.pop(id(value), None)
            base[id(original)] = original, _count(original)


def expert_lines(summary: Plan | Summary) -> list[str]:
    """Return the line of the report about experts; empty if there are none."""
    return [] if summary.experts is None else [summary.experts.describe(summary.base_parameters)]


def in_buffers(count: int, size: int) -> str:
    """Return `, and 1,024 numbers in buffers, 4.1 kB`, or an empty string if there are none."""
    return f", and {count:,} numbers in buffers, {megabytes(size)}" if count else ""


def counted(kinds: dict[str, int]) -> str:
    """Return text such as `2 x RMSNorm, 1 x gated MLP`."""
    return ", ".join(f"{count} x {kind}" for kind, count in kinds.items())


def share(part: int, total: int) -> str:
    """Return a percentage such as `1.23 %`, or `-` if the total is 0."""
    return f"{100 * part / total:.2f} %" if total else "-"


def megabytes(count: float) -> str:
    """Return a size such as `12.3 MB` (decimal), or in kB below 1 MB."""
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


def _base_of(model: nn.Module) -> dict[int, tuple[nn.Parameter, int]]:
    """Return {id: (base parameter, number of weights that it represents)}."""
    return {
        id(parameter): (parameter, math.prod(shape_of(module, name)))
        for _, module in base_modules(model)
        for name, parameter in module._parameters.items()
        if parameter is not None
    }


def _count(tensor: Tensor) -> int:
    """Return the number of values of the full tensor, also if it is sharded."""
    return sharded.shape_of(tensor).numel()
