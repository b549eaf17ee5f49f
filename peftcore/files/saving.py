"""Saving of adapters in Hugging Face PEFT's format."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import engine
from peftcore.engine.preflight import check_dtype
from peftcore.engine.trained import all_of, base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError, warn
from peftcore.files import model_card, single_file
from peftcore.files.fingerprint import fingerprint
from peftcore.files.folder import Content, Folder
from peftcore.files.metadata import BASE, METHOD, OWN_FIELDS, PLUGIN, TIED, TOGETHER, VERSION
from peftcore.files.multiplier import in_metadata
from peftcore.files.reading import name_inside
from peftcore.files.tensors import for_training, kept_on_disk, names_of_base, own_slots, tensors_on_disk
from peftcore.files.written_config import fields_of_config
from peftcore.model import detect
from peftcore.model.base_modules import base_parameters, walked_once
from peftcore.plugin import ranks
from peftcore.plugin.method import Method
from peftcore.plugin.modules import own_tensors
from peftcore.plugin.peft_fields import peft_version, refuse_not_its_own
from peftcore.plugin.registry import registry
from peftcore.version import installed_version

PEFT = "peft"  # the default format


def save(
    model: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    resumable: bool = True,
    format: str = PEFT,
) -> Path:
    """Write one or all of a model's adapters to the folder `path`.

    In a distributed run rank 0 writes. If the model is sharded, every rank must call this, and returns when the files
    exist; otherwise the other ranks return at once.

    Args:
        model: the model. For single-file formats also models by name, such as `pipe.components`; those with adapters
            are saved.
        adapter: the adapter to save; by default all. Of several, `default` is in the folder itself and the others are
            in subfolders of their name, as in PEFT; `load` finds them together, in the order of activation.
        dtype: dtype of the floating-point tensors on disk; by default their own.
        resumable: False leaves out what only further training needs (`StateRules.export`).
        format: "peft", or another that the method declares: "per_expert" writes the factors of experts one by one, as
            vLLM and SGLang read them; "diffusers" and "kohya" write a single file into the folder, or to `path` itself
            if it ends in `.safetensors`. `load` reads all formats.

    Returns:
        `path`.

    Raises:
        CheckpointError: the files cannot be written, or a value is not finite. Existing files are unchanged.
        PeftcoreError: the adapter does not have this format, or cannot be expressed in it; ranks have different
            adapters, or one has ended: the folder is whole.
    """
    check_dtype(dtype)
    if format != PEFT and format in single_file.formats():
        return _save_single(model, Path(path), adapter, dtype, format)
    if not isinstance(model, nn.Module):
        raise PeftcoreError(
            f"format={format!r} takes one model, found {type(model).__name__}. Save each model to its own folder, or "
            f"use a single-file format: {', '.join(single_file.formats()) or 'none is installed'}"
        )
    names = _names(model, adapter)
    state = engine.require_state(model)
    together = {} if len(names) == 1 else {TOGETHER: json.dumps({"adapters": names, "active": state.active})}
    inside = {name_inside(name) if together else "": name for name in names}
    return _save(model, Path(path), inside, dtype, resumable, together, format)


def _names(model: nn.Module, adapter: str | None) -> list[str]:
    """Return the names of the adapters to save."""
    return list(engine.require_state(model).applied) if adapter is None else [adapter]


def _save_single(
    model: nn.Module | Mapping[str, Any], path: Path, adapter: str | None, dtype: torch.dtype | None, format: str
) -> Path:
    """Write an adapter of each model to one file."""
    models: dict[str | None, nn.Module] = {None: model} if isinstance(model, nn.Module) else {}
    if not isinstance(model, nn.Module):
        there = {name: each for name, each in single_file.by_name(model).items() if isinstance(each, nn.Module)}
        models = {name: each for name, each in there.items() if engine.state_of(each) is not None}
        if not models:
            raise PeftcoreError(f"none of the models has adapters: {', '.join(there) or 'no models were given'}")
    chosen: dict[str | None, tuple[nn.Module, str]] = {}
    for model_name, each in models.items():
        names = _names(each, adapter)
        state = engine.require_state(each)
        if len(names) != 1:
            raise PeftcoreError(
                f"format={format!r} takes one adapter of a model, found {', '.join(names)}. Pass adapter='NAME'"
            )
        engine.refuse_merged(state, "save")
        engine.refuse_changed(each)
        _warn_of_others_trained(each)
        method = registry.method(engine.applied(each, names[0]).method)
        if format not in method.state.files:
            raise _no_format(names[0], method, format)
        chosen[model_name] = each, names[0]
    sharded = any(ranks.is_sharded(each) for each, _ in chosen.values())
    if not sharded and ranks.rank() > 0:
        return path
    with ranks.explaining_failure(f"'{path}' could not be written by all ranks") if sharded else nullcontext():
        for each, name in chosen.values() if sharded else ():
            _refuse_drifted(each, name)
        contents = {
            model_name: (each, _content(each, name, dtype, False, {})) for model_name, (each, name) in chosen.items()
        }
        ranks.once(lambda: single_file.write(format, path, contents), together=sharded)
    return path


def save_each(model: nn.Module, path: str | os.PathLike[str], adapters: Sequence[str]) -> Path:
    """Write these adapters to the folder `path` and its subfolders, all or none, for `restore`."""
    return _save(model, Path(path), {name_inside(name): name for name in adapters}, None, True, {})


def _save(
    model: nn.Module,
    folder: Path,
    inside: dict[str, str],
    dtype: torch.dtype | None,
    resumable: bool,
    metadata: dict[str, str],
    format: str = PEFT,
) -> Path:
    """Write adapters, by subfolder of `folder`, on rank 0. Collective if the model is sharded."""
    engine.refuse_merged(engine.require_state(model), "save")
    engine.refuse_changed(model)
    _warn_of_others_trained(model)
    together = ranks.is_sharded(model)
    if not together and ranks.rank() != 0:
        return folder
    failed = f"the adapter could not be saved by all ranks ('{folder}' is whole: as it was before, or as saved now)"
    with ranks.explaining_failure(failed) if together else nullcontext():
        for name in inside.values() if together else ():
            _refuse_drifted(model, name)
        if inside:
            with walked_once(model):
                contents = {
                    place: _in_format(model, name, format, _content(model, name, dtype, resumable, metadata))
                    for place, name in inside.items()
                }
                tasks = {content.fields.get("task_type") for content in contents.values()}
                card = model_card.card(model, list(inside.values()), tasks.pop() if len(tasks) == 1 else None)
            ranks.once(lambda: _write(folder, contents, card), together=together)
    return folder


def _write(folder: Path, contents: dict[str, Content], card: tuple[dict[str, Any], str]) -> None:
    Folder(folder).write(contents, model_card.rewritten(folder, *card))


def _refuse_drifted(model: nn.Module, adapter: str) -> None:
    """Raise a PeftcoreError on every rank if the adapter differs between ranks. Collective."""
    found = ranks.difference(dict(engine.adapter_parameters(model, adapter)))
    if found is not None:
        name, number, off = found
        raise PeftcoreError(
            f"adapter '{adapter}' was not saved: '{name}' on rank {number} differs by {off:.2g} from rank 0. The ranks "
            "have trained without averaging their gradients. Call peftcore.shard(model) after apply, which averages "
            "them in every backward pass"
        )
    whole = [
        (path, each) for path, each in engine.adapter_modules(model, adapter) if not ranks.any_part(each.parameters())
    ]
    found = ranks.difference(
        {
            f"{path}.{name}" if path else name: tensor
            for path, each in whole
            for name, tensor in own_tensors(each).items()
            if not isinstance(tensor, nn.Parameter)
        }
    )
    if found is not None:
        name, number, off = found
        raise PeftcoreError(
            f"adapter '{adapter}' was not saved: the buffer '{name}' on rank {number} differs by {off:.2g} from rank "
            f"0. The method '{engine.applied(model, adapter).method}' computes it from each rank's batches. It has to "
            "average it over the ranks in after_step"
        )


def _warn_of_others_trained(model: nn.Module) -> None:
    """Warn about parameters of the base with requires_grad=True, which no adapter's file contains."""
    of_adapters = {id(parameter) for _, own in all_of(model) for _, parameter in own.values(model)}
    others = [name for name, p in base_parameters(model) if p.requires_grad and id(p) not in of_adapters]
    if others:
        warn(
            f"{len(others)} base parameters have requires_grad=True, such as '{others[0]}', but belong to no adapter, "
            "so they are not saved. To train and save them, pass modules_to_save=[...] to apply; otherwise freeze "
            "them: requires_grad_(False)",
        )


def _content(
    model: nn.Module, adapter: str, dtype: torch.dtype | None, resumable: bool, metadata: dict[str, str]
) -> Content:
    if not ranks.is_sharded(model):
        return _whole_content(model, adapter, dtype, resumable, metadata)
    with ranks.gathered(parameter for _, parameter in engine.adapter_parameters(model, adapter)):
        return _whole_content(model, adapter, dtype, resumable, metadata)


def _whole_content(
    model: nn.Module, adapter: str, dtype: torch.dtype | None, resumable: bool, metadata: dict[str, str]
) -> Content:
    entry = engine.applied(model, adapter)
    method = registry.method(entry.method)
    ranks.reshard(model)
    own = tensors_on_disk(model, adapter, own=resumable, exported=True)
    kept = kept_on_disk(model, adapter)
    whole = _for_disk({**own, **kept}, adapter, own, dtype)
    base = base_tensors(model)
    if kept or own_slots(model, adapter):
        # Tensors that the adapter owns may differ in the base, such as a head that every load re-initialises.
        on_disk = names_of_base(model, adapter, base)
        base = {name: tensor for name, tensor in base.items() if on_disk[name] not in whole}
    plugin = registry.plugin_of(method.name)
    about = {
        VERSION: installed_version(),
        BASE: fingerprint(base, _important(model, base)),
        METHOD: method.name,
        PLUGIN: f"{plugin.distribution} {plugin.version}",
        TIED: json.dumps(getattr(entry.config, "ensure_weight_tying", True)),
    }
    about |= in_metadata(model, adapter)
    fields, own_fields = fields_of_config(model, method, adapter)
    refuse_not_its_own(method, fields, own_fields)
    if own_fields:
        about[OWN_FIELDS] = json.dumps(own_fields, allow_nan=False)
    with registry.naming(method.name, "write"):
        written = dict(method.state.write(model, dict(whole), dataclasses.asdict(entry.config))[0])
    if written.keys() != whole.keys() or any(written[name] is not tensor for name, tensor in whole.items()):
        _refuse_unreadable(model, adapter, whole, written, {**fields, **own_fields})
    return Content(fields, written, {**about, **metadata})


def _refuse_unreadable(
    model: nn.Module, adapter: str, given: Mapping[str, Tensor], written: dict[str, Tensor], fields: dict[str, Any]
) -> None:
    """Raise a PluginError unless `read` returns the tensors that `write` was given, in their shapes."""
    method = registry.method(engine.applied(model, adapter).method)
    fields = {**fields, "peft_version": peft_version()}
    with registry.naming(method.name, "read"), ranks.whole_when_read(model):
        found = method.state.read(model, dict(written), fields)[0]
    wanted = {**tensors_on_disk(model, adapter), **kept_on_disk(model, adapter)}
    for name in sorted(wanted.keys() & given.keys() - for_training(model, adapter)):
        if name not in found or found[name].shape != given[name].shape:
            back = f"with shape {list(found[name].shape)}" if name in found else "not at all"
            raise PluginError(
                f"adapter '{adapter}' was not saved, since it could not be loaded: '{name}' with shape "
                f"{list(given[name].shape)} comes back {back}. `write` of {method.name} must keep it in a form "
                "that `read` reads"
            )


def _in_format(model: nn.Module, adapter: str, format: str, content: Content) -> Content:
    if format == PEFT:
        return content
    method = registry.method(engine.applied(model, adapter).method)
    if format not in method.state.layouts:
        raise _no_format(adapter, method, format)
    with registry.naming(method.name, f"layouts[{format!r}].write"):
        tensors, fields = method.state.layouts[format].write(model, content.tensors, content.fields)
    return Content(fields, tensors, content.metadata)


def _no_format(adapter: str, method: Method, format: str) -> PeftcoreError:
    known = ", ".join(map(repr, [PEFT, *method.state.layouts, *method.state.files]))
    return PeftcoreError(f"'{adapter}' ({method.name}) has no format {format!r}. Choose one of: {known}")


def _important(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return those of `names` that a load of the same base may re-initialise: heads and the embedding."""
    architecture = detect(model)
    paths = [p for p in (architecture.embedding, architecture.output_head, *architecture.task_heads) if p]
    inside = tuple(f"{path}." for path in paths)
    return {name for name in names if name.startswith(inside)}


def _for_disk(
    tensors: dict[str, Tensor], adapter: str, own: Collection[str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return whole tensors on the CPU that share no memory.

    Raises:
        CheckpointError: one of the adapter's `own` tensors is not finite, or a value is too large for `dtype`.
    """
    divided = ranks.any_part(tensors.values())
    whole: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = ranks.whole(tensor) if divided else tensor.detach()
        if name in own and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(
                f"adapter '{adapter}': '{name}' contains NaN or Inf and could not be loaded again: training has "
                "diverged. Continue from an earlier checkpoint, with a smaller learning rate or a dtype with a larger "
                "range"
            )
        if dtype and tensor.is_floating_point():
            tensor = _cast(name, tensor, dtype)
        whole[name] = tensor.cpu().contiguous()
    seen: set[int] = set()
    for name, tensor in whole.items():
        if tensor.data_ptr() in seen:  # a tied parameter, under another of its names
            whole[name] = tensor.clone()
        seen.add(tensor.data_ptr())
    return whole


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the tensor in another floating-point dtype; raise a CheckpointError if a value is too large for it."""
    cast = tensor.to(dtype)
    if not bool((cast.isfinite() | ~tensor.isfinite()).all()):
        raise CheckpointError(
            f"'{name}' contains {tensor.abs().max().item():.3g}, which is too large for {dtype}. Choose another dtype"
        )
    return cast
