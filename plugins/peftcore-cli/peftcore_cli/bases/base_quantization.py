"""Quantization of an adapter's base: the format used in training, unless --quantize overrides it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import peftcore
from peftcore.errors import PeftcoreError
from peftcore_cli.bases.adapter_folders import AdapterTask, Quantization, adapter_task
from peftcore_cli.bases.models import empty_model
from peftcore_cli.fields import text_of

if TYPE_CHECKING:
    import torch

    from peftcore.ops import PackedWeight
    from peftcore_cli.settings import Settings

DENSE = "none"


def of_adapter(quantize: str | None, folder: Path | None, task: AdapterTask) -> str | Quantization | None:
    """Return the quantization of an adapter's base, as `models.load_model` takes it.

    Args:
        quantize: value of --quantize.
        folder: the adapter's folder; None for a base without an adapter.
        task: what the adapter was trained for.

    Raises:
        PeftcoreError: `quantize` contradicts the record.
    """
    return of_adapters(quantize, {str(folder): task})


def of_adapters(quantize: str | None, tasks: Mapping[str, AdapterTask]) -> str | Quantization | None:
    """Return the quantization of a base that several adapters share, as `models.load_model` takes it.

    Args:
        quantize: value of --quantize.
        tasks: tasks of the adapters by name or folder.

    Raises:
        PeftcoreError: `quantize` contradicts a record, or the records differ and `quantize` is None.
    """
    if quantize == DENSE:
        return None
    records = {name: task.quantized for name, task in tasks.items() if task.quantized is not None}
    for name, record in records.items():
        refuse_other(quantize, record, name, f", or pass --quantize {DENSE} for the dense base")
    choices = {*records.values()} if quantize is not None else {task.quantized for task in tasks.values()}
    if len(choices) > 1:
        (first_name, first_record), (second_name, second_record) = _different(tasks)
        raise PeftcoreError(
            f"the adapter '{first_name}' was trained on a base {_describe(first_record)}, but '{second_name}' on a "
            f"base {_describe(second_record)}. Use one adapter at a time, or pass --quantize {DENSE} for the dense base"
        )
    return choices.pop() if choices else quantize


def refuse_other(quantize: str | None, record: Quantization, name: str, hint: str = "") -> None:
    """Raise a PeftcoreError if a value of --quantize contradicts the record of the adapter `name`."""
    if quantize not in (None, record.quant_type):
        raise PeftcoreError(
            f"--quantize {quantize} contradicts the adapter '{name}', which was trained on a base quantized as "
            f"{record}. Remove --quantize{hint}"
        )


def refuse_late(quantize: str | None, base: str | Quantization | None, name: str, task: AdapterTask) -> None:
    """Raise a PeftcoreError if an adapter does not fit the format of the loaded base.

    Args:
        quantize: value of --quantize.
        base: quantization of the base, as `of_adapters` returned it.
        name: name of the adapter.
        task: what it was trained for.
    """
    current, record = Quantization(base) if isinstance(base, str) else base, task.quantized
    if quantize == DENSE or record == current or (record is None and quantize is not None):
        return
    raise PeftcoreError(
        f"the adapter '{name}' was trained on a base {_describe(record)}, but the base in memory is "
        f"{('dense' if current is None else f'quantized as {current}')}. Start again with adapters of one base "
        f"format, or with --quantize {DENSE} for the dense base"
    )


def _different(tasks: Mapping[str, AdapterTask]) -> list[tuple[str, Quantization | None]]:
    (first_name, task), *other_tasks = tasks.items()
    return [
        (first_name, task.quantized),
        next(
            (name, other_task.quantized) for name, other_task in other_tasks if other_task.quantized != task.quantized
        ),
    ]


def _describe(record: Quantization | None) -> str:
    return "without a record of 4 bits" if record is None else f"quantized as {record}"


def of_run(settings: Settings, labels: tuple[str, ...]) -> Quantization | None:
    """Return the quantization of a run's base by --quantize or its method, or None if the base is loaded unchanged.

    Raises:
        PeftcoreError: fields of the run contradict the adapter that training continues from.
    """
    record = requested_by(settings)
    if settings.method not in peftcore.methods() or peftcore.method(settings.method).prepare is None:
        return record
    saved_fields: dict[str, Any] = {}
    if settings.adapter is not None:
        saved_fields["modules_to_save"] = peftcore.inspect(settings.adapter).fields.get("modules_to_save")
    names = {option.name for option in fields(peftcore.method(settings.method).config_class)}
    saved_fields = {name: value for name, value in saved_fields.items() if name in names and value}
    if record is None:
        return by_method(settings.method, {**saved_fields, **settings.fields}, settings.model, settings.task, labels)
    shared = {option.name for option in fields(record)} & names
    set_fields = sorted(shared & settings.fields.keys())
    if set_fields:
        recorded_fields = {name: getattr(record, name) for name in shared - {"skip"}}
        by_fields = by_method(
            settings.method,
            {**saved_fields, **recorded_fields, **settings.fields},
            settings.model,
            settings.task,
            labels,
        )
        for name in set_fields:
            if by_fields is not None and getattr(by_fields, name) != getattr(record, name):
                raise PeftcoreError(
                    f"--set {name}={text_of(settings.fields[name])} contradicts the adapter in '{settings.adapter}', "
                    f"which has {name}={text_of(getattr(record, name))}. Remove --set {name}, or train a new adapter "
                    "without --adapter"
                )
    return record


def requested_by(settings: Settings) -> Quantization | None:
    """Return the quantization of the base before the method prepares it: the adapter's, or the one of --quantize."""
    record = None if settings.adapter is None else adapter_task(Path(settings.adapter)).quantized
    return record or (None if settings.quantize is None else Quantization(settings.quantize))


def by_method(
    method: str, values: Mapping[str, Any], model: str, task: str, labels: tuple[str, ...]
) -> Quantization | None:
    """Return how a method quantizes the base before placing adapters, or None.

    The method prepares a base on the meta device, whose quantization is then read. Loading never materializes the dense
    base.
    """
    from peftcore.plugin import base_modules, find_weight_format
    from peftcore.quantization import quantizable, quantized_experts, quantized_layers

    chosen_method = peftcore.method(method)
    if chosen_method.prepare is None:
        return None
    config, empty = chosen_method.config_class(**values), empty_model(model, task, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` raises them
        quantizable_names = {*quantizable(empty)}
        chosen_method.prepare(empty, config)
    layers = dict(quantized_layers(empty))
    packed = {*layers}
    quantizations = {_quantization_of(layer.packed, layer.compute_dtype) for layer in layers.values()}
    for path, module in base_modules(empty):
        by_plugin = None if path in layers else find_weight_format(module)
        if by_plugin is not None and by_plugin.quantize and by_plugin.plain and path in quantizable_names:
            packed.add(path)
            quantizations.add(Quantization(by_plugin.name))
    expert_quantizations = []
    for path, module in quantized_experts(empty):
        for name in module.packings:
            weight = module.packed_parameter(name)
            if weight is not None:
                packed.add(f"{path}.{name}")
                expert_quantizations.append(_quantization_of(weight, module.compute_dtype))
    if not quantizations and expert_quantizations:
        # Experts whose rows are not a multiple of the block size have smaller blocks.
        quantizations = {max(expert_quantizations, key=lambda quantization: quantization.blocksize)}
    if len(quantizations) != 1:
        return None
    return replace(quantizations.pop(), skip=tuple(sorted(quantizable_names - packed)))


def _quantization_of(weight: PackedWeight, compute_dtype: torch.dtype | None) -> Quantization:
    dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    return Quantization(weight.quant_type, weight.nested_absmax is not None, weight.blocksize, dtype)
