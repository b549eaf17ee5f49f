"""Saving of adapters, in PEFT's format and in single-file formats."""

from __future__ import annotations

import dataclasses
import inspect
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
from peftcore.engine.scaling import scaled_config
from peftcore.engine.trained_parameters import TrainedParameters, all_of, base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError, warn, with_argument_hints
from peftcore.files import model_card, single_file
from peftcore.files.fingerprint import fingerprint
from peftcore.files.folder import Content, Folder
from peftcore.files.metadata import BASE, METHOD, OWN_FIELDS, PLUGIN, TIED, TOGETHER, VERSION
from peftcore.files.multiplier import multiplier_metadata
from peftcore.files.reading import name_inside
from peftcore.files.tensors import for_training, kept_on_disk, names_of_base, tensors_on_disk, trained_names
from peftcore.model import detect, targets
from peftcore.model.base_modules import base_parameters, caching_base_modules, original_forward
from peftcore.plugin import ranks, sharded
from peftcore.plugin.architecture import Architecture
from peftcore.plugin.method import Method
from peftcore.plugin.modules import own_tensors
from peftcore.plugin.peft_fields import peft_version, refuse_not_its_own
from peftcore.plugin.placements.placement import Placement
from peftcore.plugin.registry import registry
from peftcore.version import installed_version

PEFT = "peft"  # the default format
# Arguments that PEFT's wrappers for text pass to the model: common to all task types, and additional ones by task type.
_TEXT_ARGUMENTS = (
    "input_ids",
    "attention_mask",
    "inputs_embeds",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)
_TASK_ARGUMENTS = {
    "CAUSAL_LM": ("labels",),
    "SEQ_2_SEQ_LM": ("labels", "decoder_input_ids", "decoder_attention_mask", "decoder_inputs_embeds"),
    "SEQ_CLS": ("labels",),
    "TOKEN_CLS": ("labels",),
    "QUESTION_ANS": ("start_positions", "end_positions"),
    "FEATURE_EXTRACTION": (),
}


@with_argument_hints
def save(
    model: nn.Module | Mapping[str, Any],
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    dtype: torch.dtype | None = None,
    resumable: bool = True,
    format: str = PEFT,
) -> Path:
    """Save one or all of a model's adapters to the folder `path`.

    In a distributed run, rank 0 writes. If the model is sharded, every rank must call this function, which returns once
    the files exist. Otherwise the other ranks return immediately.

    Args:
        model: the model. Single-file formats also take models by name, such as `pipe.components`, and save those with
            adapters.
        path: folder to save to, or a file that ends in `.safetensors` for a single-file format.
        adapter: name of the adapter to save; by default all. If there are several, `default` is saved to the folder
            itself and all others to subfolders with their names, as in PEFT. `load` loads them together and restores
            which were active.
        dtype: dtype of the floating-point tensors on disk; by default their current dtype.
        resumable: False omits tensors that are only needed for further training (`StateRules.export`).
        format: "peft", or another format of the method. "per_expert" stores the factors of experts one by one, as vLLM
            and SGLang read them. "diffusers" and "kohya" write a single file into the folder, or to `path` itself.
            `load` reads all formats.

    Returns:
        `path`.

    Raises:
        CheckpointError: the files cannot be written, or a value is not finite. Existing files are unchanged.
        PeftcoreError: the method does not have the format, or the adapter cannot be stored in it; or adapters differ
            between ranks, or a rank has exited. The folder has either the old files or the new ones.

    Examples:
        >>> peftcore.apply(model, "lora", r=8)
        >>> peftcore.save(model, "my-adapter")          # adapter_config.json, adapter_model.safetensors
    """
    check_dtype(dtype)
    if format != PEFT and format in single_file.formats():
        return _save_single(model, Path(path), adapter, dtype, format)
    if not isinstance(model, nn.Module):
        raise PeftcoreError(
            f"format={format!r} saves one model, found {type(model).__name__}. Save each model to its own folder, or "
            f"use a single-file format: {', '.join(single_file.formats()) or 'none is installed'}"
        )
    names = _names(model, adapter)
    state = engine.require_state(model)
    if len(names) == 1:
        names_by_subfolder, metadata = {"": names[0]}, {}
    else:
        names_by_subfolder = {name_inside(name): name for name in names}
        metadata = {TOGETHER: json.dumps({"adapters": names, "active": state.active})}
    return _save(
        model, Path(path), names_by_subfolder, dtype=dtype, resumable=resumable, metadata=metadata, format=format
    )


def _names(model: nn.Module, adapter: str | None) -> list[str]:
    """Return the names of the adapters to save."""
    return list(engine.require_state(model).applied) if adapter is None else [adapter]


def _save_single(
    models: nn.Module | Mapping[str, Any], path: Path, adapter: str | None, dtype: torch.dtype | None, format: str
) -> Path:
    """Write an adapter of each model to one file."""
    adapters = {
        model_name: (model, _only_adapter(model, adapter, format))
        for model_name, model in _with_adapters(models).items()
    }
    is_sharded = any(sharded.is_sharded(model) for model, _ in adapters.values())
    if not is_sharded and ranks.rank() > 0:
        return path
    with ranks.explaining_failure(f"'{path}' could not be written by all ranks") if is_sharded else nullcontext():
        contents: dict[str | None, tuple[nn.Module, Content]] = {}
        for model_name, (model, name) in adapters.items():
            if is_sharded:
                _refuse_drifted(model, name)
            contents[model_name] = model, _content(model, name, dtype, resumable=False)
        ranks.once(lambda: single_file.write(format, path, contents), together=is_sharded)
    return path


def _with_adapters(models: nn.Module | Mapping[str, Any]) -> dict[str | None, nn.Module]:
    """Return the models that have adapters, by the user's names; a single model has the name None."""
    if isinstance(models, nn.Module):
        return {None: models}
    modules = {
        name: model
        for name, model in single_file.require_models_by_name(models).items()
        if isinstance(model, nn.Module)
    }
    models_with_adapters: dict[str | None, nn.Module] = {}
    for name, model in modules.items():
        if engine.state_of(model) is not None:
            models_with_adapters[name] = model
    if not models_with_adapters:
        raise PeftcoreError(f"none of the models has adapters: {', '.join(modules) or 'no models were given'}")
    return models_with_adapters


def _only_adapter(model: nn.Module, adapter: str | None, format: str) -> str:
    """Return the name of the adapter to save in a single-file format, which takes one adapter per model."""
    names = _names(model, adapter)
    if len(names) != 1:
        raise PeftcoreError(
            f"format={format!r} saves one adapter per model, found {', '.join(names)}. Pass adapter='NAME'"
        )
    _check_savable(model)
    method = registry.method(engine.applied(model, names[0]).method)
    if format not in method.state.files:
        raise _format_error(names[0], method, format)
    return names[0]


def save_each(model: nn.Module, path: str | os.PathLike[str], adapters: Sequence[str]) -> Path:
    """Save these adapters to the folder `path` and its subfolders, all or none, to be read by `restore`."""
    return _save(model, Path(path), {name_inside(name): name for name in adapters})


def _save(
    model: nn.Module,
    folder: Path,
    names_by_subfolder: dict[str, str],
    *,
    dtype: torch.dtype | None = None,
    resumable: bool = True,
    metadata: Mapping[str, str] | None = None,
    format: str = PEFT,
) -> Path:
    """Write adapters to subfolders of `folder` on rank 0. Collective if the model is sharded."""
    _check_savable(model)
    is_sharded = sharded.is_sharded(model)
    if not names_by_subfolder or (not is_sharded and ranks.rank() != 0):
        return folder
    failure = (
        f"not all ranks could save the adapter ('{folder}' is consistent: it has either the old adapter or the new one)"
    )
    with ranks.explaining_failure(failure) if is_sharded else nullcontext():
        if is_sharded:
            for name in names_by_subfolder.values():
                _refuse_drifted(model, name)
        with caching_base_modules(model):
            contents: dict[str, Content] = {}
            for subfolder, name in names_by_subfolder.items():
                content = _content(model, name, dtype, resumable, metadata)
                contents[subfolder] = _in_format(model, name, format, content)
            tasks = {content.fields.get("task_type") for content in contents.values()}
            card = model_card.card(model, list(names_by_subfolder.values()), tasks.pop() if len(tasks) == 1 else None)
        ranks.once(lambda: _write(folder, contents, card), together=is_sharded)
    return folder


def _check_savable(model: nn.Module) -> None:
    """Raise a PeftcoreError if adapters are merged or changed. Warn about trained parameters that are not saved."""
    engine.refuse_merged(engine.require_state(model), "save")
    engine.refuse_changed(model)
    owned_ids: set[int] = set()
    for _, owned in all_of(model):
        owned_ids.update(id(parameter) for _, parameter in owned.values(model))
    unowned_names = [name for name, p in base_parameters(model) if p.requires_grad and id(p) not in owned_ids]
    if unowned_names:
        warn(
            f"{len(unowned_names)} base parameters have requires_grad=True, such as '{unowned_names[0]}', but belong "
            "to no adapter, so they are not saved. To train and save them, pass modules_to_save=[...] to apply; "
            "otherwise freeze them: requires_grad_(False)",
        )


def _write(folder: Path, contents: dict[str, Content], card: tuple[dict[str, Any], str]) -> None:
    Folder(folder).write(contents, model_card.update_card(folder, *card))


def _refuse_drifted(model: nn.Module, adapter: str) -> None:
    """Raise a PeftcoreError on every rank if the adapter differs between ranks. Collective."""
    drift = ranks.find_unequal(dict(engine.adapter_parameters(model, adapter)))
    if drift is not None:
        name, rank, difference = drift
        raise PeftcoreError(
            f"adapter '{adapter}' was not saved: '{name}' on rank {rank} differs by {difference:.2g} from rank 0, "
            "because the ranks trained without averaging their gradients. Call peftcore.shard(model) after apply; "
            "it averages the gradients in every backward pass"
        )
    drift = ranks.find_unequal(_buffers(model, adapter))
    if drift is not None:
        name, rank, difference = drift
        raise PeftcoreError(
            f"adapter '{adapter}' was not saved: the buffer '{name}' on rank {rank} differs by {difference:.2g} from "
            f"rank 0. The method '{engine.applied(model, adapter).method}' computes the buffer from each rank's "
            "batches, and must average it over the ranks in after_step"
        )


def _buffers(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Return the saved buffers of an adapter by name, excluding modules with sharded parameters."""
    buffers: dict[str, Tensor] = {}
    for path, module in engine.adapter_modules(model, adapter):
        if sharded.any_shards(module.parameters()):
            continue
        for name, tensor in own_tensors(module).items():
            if not isinstance(tensor, nn.Parameter):
                buffers[f"{path}.{name}" if path else name] = tensor
    return buffers


def _content(
    model: nn.Module,
    adapter: str,
    dtype: torch.dtype | None,
    resumable: bool,
    metadata: Mapping[str, str] | None = None,
) -> Content:
    """Return the content of an adapter's files in PEFT's format. Collective if the model is sharded."""
    entry = engine.applied(model, adapter)
    method = registry.method(entry.method)
    with sharded.gathered(parameter for _, parameter in engine.adapter_parameters(model, adapter)):
        sharded.reshard(model)
        own_tensors_on_disk = tensors_on_disk(model, adapter, own=resumable, exported=True)
        kept = kept_on_disk(model, adapter)
        tensors = _for_disk({**own_tensors_on_disk, **kept}, adapter, own_tensors_on_disk, dtype)
        base = base_tensors(model)
        if kept or trained_names(model, adapter):
            # Tensors that the adapter owns do not identify the base: each load initializes a new head at random.
            on_disk = names_of_base(model, adapter, base)
            base = {name: tensor for name, tensor in base.items() if on_disk[name] not in tensors}
        plugin = registry.plugin_of(method.name)
        all_metadata = {
            VERSION: installed_version(),
            BASE: fingerprint(base, _important(model, base)),
            METHOD: method.name,
            PLUGIN: f"{plugin.distribution} {plugin.version}",
            TIED: json.dumps(getattr(entry.config, "ensure_weight_tying", True)),
            **multiplier_metadata(model, adapter),
        }
        fields, own_fields = _fields_of_config(model, method, adapter)
        refuse_not_its_own(method, fields, own_fields)
        if own_fields:
            all_metadata[OWN_FIELDS] = json.dumps(own_fields, allow_nan=False)
        with registry.naming(method.name, "write"):
            written_tensors = dict(method.state.write(model, dict(tensors), dataclasses.asdict(entry.config))[0])
        if written_tensors.keys() != tensors.keys() or any(
            written_tensors[name] is not tensor for name, tensor in tensors.items()
        ):
            _refuse_unreadable(model, adapter, tensors, written_tensors, {**fields, **own_fields})
    return Content(fields, written_tensors, {**all_metadata, **(metadata or {})})


def _fields_of_config(model: nn.Module, method: Method, adapter: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return an applied adapter's config as (fields of `adapter_config.json`, fields that PEFT does not have).

    The latter contain only values other than the default. Warns if PEFT cannot read the adapter.
    """
    # asdict keeps tuples, and JSON has no sets, tuples or dtypes.
    own_fields = dataclasses.asdict(scaled_config(model, adapter))
    with registry.naming(method.name, "write"):
        fields = dict(method.state.write_fields(own_fields))
    if "ensure_weight_tying" in fields:
        fields["ensure_weight_tying"] = _is_tied_in_peft(model, adapter)
    base = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    for name, value in fields.items():
        if isinstance(value, (set, frozenset)):
            fields[name] = sorted(value)
    method_fields = {name: fields.pop(name) for name in sorted(method.state.peft.own_fields) if name in fields}
    usual = {field.name: field.default for field in dataclasses.fields(method.config_class)}
    common = {
        **fields,
        "peft_type": method.state.peft_type,
        "task_type": _task_type(model, adapter),
        "base_model_name_or_path": base,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
    }
    return common, {name: value for name, value in method_fields.items() if _as_json(value) != _as_json(usual[name])}


def _as_json(value: object) -> str | None:
    """Return the JSON text of a value, or None for `dataclasses.MISSING`."""
    return None if isinstance(value, type(dataclasses.MISSING)) else json.dumps(value, sort_keys=True)


def _task_type(model: nn.Module, adapter: str) -> str | None:
    """Return PEFT's task type of an adapter, and warn if PEFT cannot read the adapter."""
    entry = engine.applied(model, adapter)
    prompts = [placement for placement in engine.placements(model, adapter) if placement.whole_model]
    task_type = _task_type_of(model, detect(model), prompts)
    if prompts and task_type is None:
        warn(
            f"Hugging Face PEFT ignores the prompts in this file, because it does not support prompts for "
            f"{type(model).__name__}",
        )
    paths = [*registry.method(entry.method).state.peft.unreadable(model, entry.paths)]
    paths += [
        path for path, placed in entry.placements.items() if any(placement.is_of_expert(path) for placement in placed)
    ]
    if paths:
        names = sorted({".".join(path.split(".")[-2:]) for path in paths})
        advice = f"exclude_modules={names}" if hasattr(entry.config, "exclude_modules") else f"adapt none of {names}"
        warn(
            f"Hugging Face PEFT cannot read this file: in a {type(model).__name__}, PEFT rejects the adapters of "
            f"{len(paths)} modules, such as '{paths[0]}', or assigns them to other modules. To save a file for PEFT, "
            f"exclude these modules: {advice}",
        )
    return task_type


def _is_tied_in_peft(model: nn.Module, adapter: str) -> bool:
    """Return whether PEFT's `ensure_weight_tying` ties the same parameters; if not, PEFT trains separate copies.

    PEFT turns any module that is tied to the embedding into a linear layer without a bias.
    """
    owned, embedding = TrainedParameters.of(model, adapter), detect(model).embedding
    groups = [slots for slots in owned.trained.values() if len(slots) > 1] if owned is not None else []
    if len(groups) != 1 or f"{embedding}.weight" not in groups[0]:
        return False
    other_slots = [slot for slot in groups[0] if slot != f"{embedding}.weight"]
    modules = [model.get_submodule(slot.rpartition(".")[0]) for slot in other_slots]
    return all(targets.is_linear(module) and module.bias is None for module in modules)


def _task_type_of(model: nn.Module, architecture: Architecture, prompts: Sequence[Placement]) -> str | None:
    """Return the `task_type` with which PEFT computes the same as peftcore.

    None is right for adapters without prompts. With prompts, None means that PEFT would ignore them.

    Args:
        model: the model.
        architecture: its architecture.
        prompts: placements of prompts and prefixes.
    """
    choices = [architecture.task_type]
    if prompts and architecture.task_type is None:
        generates = architecture.output_head is not None and hasattr(model, "prepare_inputs_for_generation")
        first_tasks, *other_tasks = (placement.peft_tasks(architecture) for placement in prompts)
        tasks = [task for task in first_tasks if all(task in tasks_of_prompt for tasks_of_prompt in other_tasks)]
        choices += [task for task in tasks if task != "CAUSAL_LM" or generates]
    return next((choice for choice in choices if choice is not None and _passes(model, choice)), None)


def _passes(model: nn.Module, task: str) -> bool:
    """Return whether the model's forward accepts the arguments that PEFT's wrapper for `task` passes."""
    arguments = inspect.signature(original_forward(model)).parameters
    takes_all = any(argument.kind is inspect.Parameter.VAR_KEYWORD for argument in arguments.values())
    names = (*_TEXT_ARGUMENTS, *_TASK_ARGUMENTS.get(task, ()))
    return "input_ids" in arguments and all(takes_all or name in arguments for name in names)


def _refuse_unreadable(
    model: nn.Module,
    adapter: str,
    tensors: Mapping[str, Tensor],
    written: dict[str, Tensor],
    fields: dict[str, Any],
) -> None:
    """Raise a PluginError unless the method's `read` restores all tensors passed to its `write`, in their shapes."""
    method = registry.method(engine.applied(model, adapter).method)
    fields = {**fields, "peft_version": peft_version()}
    with registry.naming(method.name, "read"), sharded.gathered_when_read(model):
        read_tensors = method.state.read(model, dict(written), fields)[0]
    expected = {**tensors_on_disk(model, adapter), **kept_on_disk(model, adapter)}
    for name in sorted(expected.keys() & tensors.keys() - for_training(model, adapter)):
        if name not in read_tensors or read_tensors[name].shape != tensors[name].shape:
            result = f"with shape {list(read_tensors[name].shape)}" if name in read_tensors else "not at all"
            raise PluginError(
                f"adapter '{adapter}' was not saved, because it could not be loaded again: '{name}' with shape "
                f"{list(tensors[name].shape)} comes back {result}. `write` of {method.name} must return tensors that "
                "its `read` restores"
            )


def _in_format(model: nn.Module, adapter: str, format: str, content: Content) -> Content:
    if format == PEFT:
        return content
    method = registry.method(engine.applied(model, adapter).method)
    if format not in method.state.layouts:
        raise _format_error(adapter, method, format)
    with registry.naming(method.name, f"layouts[{format!r}].write"):
        tensors, fields = method.state.layouts[format].write(model, content.tensors, content.fields)
    return Content(fields, tensors, content.metadata)


def _format_error(adapter: str, method: Method, format: str) -> PeftcoreError:
    known = ", ".join(map(repr, [PEFT, *method.state.layouts, *method.state.files]))
    return PeftcoreError(
        f"'{adapter}' ({method.name}) cannot be saved in the format {format!r}. Choose one of: {known}"
    )


def _important(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Return the names of tensors that identify the base best: the embedding and the heads."""
    architecture = detect(model)
    paths = [p for p in (architecture.embedding, architecture.output_head, *architecture.task_heads) if p]
    prefixes = tuple(f"{path}." for path in paths)
    return {name for name in names if name.startswith(prefixes)}


def _for_disk(
    tensors: dict[str, Tensor], adapter: str, own_names: Collection[str], dtype: torch.dtype | None
) -> dict[str, Tensor]:
    """Return full, contiguous tensors on the CPU that share no memory.

    Raises:
        CheckpointError: a tensor in `own_names` is not finite, or a value is too large for `dtype`.
    """
    is_sharded = sharded.any_shards(tensors.values())
    full_tensors: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        tensor = sharded.whole(tensor) if is_sharded else tensor.detach()
        if name in own_names and tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise CheckpointError(
                f"adapter '{adapter}' was not saved: '{name}' contains NaN or Inf, so training has diverged. "
                "Continue from an earlier checkpoint, with a smaller learning rate or a dtype with a larger range"
            )
        if dtype and tensor.is_floating_point():
            tensor = _cast(name, tensor, dtype)
        full_tensors[name] = tensor.cpu().contiguous()
    memory_addresses: set[int] = set()
    for name, tensor in full_tensors.items():
        if tensor.data_ptr() in memory_addresses:  # a tied parameter, under another name
            full_tensors[name] = tensor.clone()
        memory_addresses.add(tensor.data_ptr())
    return full_tensors


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast a tensor to another floating-point dtype. Raise a CheckpointError if a value is too large for it."""
    cast = tensor.to(dtype)
    if not bool((cast.isfinite() | ~tensor.isfinite()).all()):
        raise CheckpointError(
            f"'{name}' contains {tensor.abs().max().item():.3g}, which is too large for {dtype}. Choose a dtype with "
            "a larger range"
        )
    return cast
