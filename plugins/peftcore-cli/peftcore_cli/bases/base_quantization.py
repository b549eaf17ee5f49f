"""How the base of an adapter is quantized: as its training recorded it, unless --quantize says otherwise."""

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


def of_adapter(asked: str | None, folder: Path | None, task: AdapterTask) -> str | Quantization | None:
    """Return how to quantize the base of an adapter, as `models.load_model` takes it.

    Args:
        asked: value of --quantize.
        folder: the adapter's folder; None for a base without an adapter.
        task: what the adapter was trained for.

    Raises:
        PeftcoreError: `asked` contradicts the record.
    """
    return of_adapters(asked, {str(folder): task})


def of_adapters(asked: str | None, tasks: Mapping[str, AdapterTask]) -> str | Quantization | None:
    """Return how to quantize the base that several adapters share, as `models.load_model` takes it.

    Args:
        asked: value of --quantize.
        tasks: what each was trained for, by its name or folder.

    Raises:
        PeftcoreError: `asked` contradicts a record, or records differ and nothing is asked.
    """
    if asked == DENSE:
        return None
    found = {name: task.quantized for name, task in tasks.items() if task.quantized is not None}
    for name, record in found.items():
        refuse_other(asked, record, name, f", or pass --quantize {DENSE} for the dense base")
    kinds = {*found.values()} if asked is not None else {task.quantized for task in tasks.values()}
    if len(kinds) > 1:
        (first, one), (other, another) = _different(tasks)
        raise PeftcoreError(
            f"the adapter '{first}' was trained on a base {_described(one)}, '{other}' on one {_described(another)}. "
            f"Use them one at a time, or pass --quantize {DENSE} for the dense base"
        )
    return kinds.pop() if kinds else asked


def refuse_other(asked: str | None, record: Quantization, name: str, hint: str = "") -> None:
    """Raise a PeftcoreError if `asked`, a value of --quantize, contradicts the record of the adapter `name`."""
    if asked not in (None, record.quant_type):
        raise PeftcoreError(
            f"--quantize {asked} contradicts the adapter '{name}', which was trained on a base quantized as {record}. "
            f"Leave it out{hint}"
        )


def refuse_late(asked: str | None, base: str | Quantization | None, name: str, task: AdapterTask) -> None:
    """Raise a PeftcoreError if an adapter that is loaded after the base was trained on a base in other bits.

    Args:
        asked: value of --quantize.
        base: how the base is quantized, as `of_adapters` returned it.
        name: of the adapter.
        task: what it was trained for.
    """
    here, record = Quantization(base) if isinstance(base, str) else base, task.quantized
    if asked == DENSE or record == here or (record is None and asked is not None):
        return
    raise PeftcoreError(
        f"the adapter '{name}' was trained on a base {_described(record)}, and the base in memory is "
        f"{'dense' if here is None else f'quantized as {here}'}. Start again with adapters of one kind, or with "
        f"--quantize {DENSE} for the dense base"
    )


def _different(tasks: Mapping[str, AdapterTask]) -> list[tuple[str, Quantization | None]]:
    (first, task), *others = tasks.items()
    return [
        (first, task.quantized),
        next((name, each.quantized) for name, each in others if each.quantized != task.quantized),
    ]


def _described(record: Quantization | None) -> str:
    return "without a record of 4 bits" if record is None else f"quantized as {record}"


def of_run(settings: Settings, labels: tuple[str, ...]) -> Quantization | None:
    """Return how a run quantizes its base, also where its method does; None for a base that is read as it is.

    Raises:
        PeftcoreError: the run continues an adapter, and its fields contradict how that was trained.
    """
    asked = asked_by(settings)
    if settings.method not in peftcore.methods() or peftcore.method(settings.method).prepare is None:
        return asked
    more: dict[str, Any] = {}
    if settings.adapter is not None:
        more["modules_to_save"] = peftcore.inspect(settings.adapter).fields.get("modules_to_save")
    names = {each.name for each in fields(peftcore.method(settings.method).config_class)}
    more = {name: value for name, value in more.items() if name in names and value}
    if asked is None:
        return by_method(settings.method, {**more, **settings.fields}, settings.model, settings.task, labels)
    known = {each.name for each in fields(asked)} & names
    given = sorted(known & settings.fields.keys())
    if given:
        recorded = {name: getattr(asked, name) for name in known - {"skip"}}
        wanted = by_method(
            settings.method, {**more, **recorded, **settings.fields}, settings.model, settings.task, labels
        )
        for name in given:
            if wanted is not None and getattr(wanted, name) != getattr(asked, name):
                raise PeftcoreError(
                    f"--set {name}={text_of(settings.fields[name])} contradicts the adapter in '{settings.adapter}', "
                    f"which has {name}={text_of(getattr(asked, name))}. Leave it out, or train a new adapter "
                    "without --adapter"
                )
    return asked


def asked_by(settings: Settings) -> Quantization | None:
    """Return how the base is quantized before a run's method sees it: as its adapter records, or by --quantize."""
    recorded = None if settings.adapter is None else adapter_task(Path(settings.adapter)).quantized
    return recorded or (None if settings.quantize is None else Quantization(settings.quantize))


def by_method(
    method: str, values: Mapping[str, Any], model: str, task: str, labels: tuple[str, ...]
) -> Quantization | None:
    """Return how a method quantizes the base before it places adapters, or None.

    The method prepares a base without weights to find out. A base loaded that way is never dense as a whole.
    """
    from peftcore.plugin import base_modules, find_weight_format
    from peftcore.quantization import quantizable, quantized_experts, quantized_layers

    found = peftcore.method(method)
    if found.prepare is None:
        return None
    config, empty = found.config_class(**values), empty_model(model, task, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # `apply` raises them
        could = {*quantizable(empty)}
        found.prepare(empty, config)
    layers = dict(quantized_layers(empty))
    packed = {*layers}
    ways = {_stored(each.packed, each.compute_dtype) for each in layers.values()}
    for path, module in base_modules(empty):
        by_plugin = None if path in layers else find_weight_format(module)
        if by_plugin is not None and by_plugin.quantize and by_plugin.plain and path in could:
            packed.add(path)
            ways.add(Quantization(by_plugin.name))
    of_experts = []
    for path, module in quantized_experts(empty):
        weights = {f"{path}.{name}": module.packed_parameter(name) for name in module.packings}
        packed |= {name for name, weight in weights.items() if weight is not None}
        of_experts += [_stored(weight, module.compute_dtype) for weight in weights.values() if weight is not None]
    if not ways and of_experts:  # experts that do not divide into blocks got smaller ones
        ways = {max(of_experts, key=lambda each: each.blocksize)}
    if len(ways) != 1:
        return None
    return replace(ways.pop(), skip=tuple(sorted(could - packed)))


def _stored(weight: PackedWeight, compute_dtype: torch.dtype | None) -> Quantization:
    dtype = None if compute_dtype is None else str(compute_dtype).removeprefix("torch.")
    return Quantization(weight.quant_type, weight.nested_absmax is not None, weight.blocksize, dtype)
