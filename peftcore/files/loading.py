"""Strict loading of adapters: every mismatch with the model is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from peftcore import engine
from peftcore.engine.scaling import set_multiplier
from peftcore.errors import CheckpointError, with_argument_hints
from peftcore.files import single_file
from peftcore.files.fitting import check_fit, fill_applied
from peftcore.files.folder import read_folder
from peftcore.files.hub import folder_of
from peftcore.files.multiplier import read_multiplier
from peftcore.files.reading import Stored, adapter_folder, read_adapter, read_saved
from peftcore.files.tensors import grown_buffers
from peftcore.model import assuming_unchanged
from peftcore.model.targets.patterns import limit_matching_time
from peftcore.plugin import sharded

Models = TypeVar("Models", bound="nn.Module | Mapping[str, Any]")


@with_argument_hints
@limit_matching_time()
def load(
    model: Models,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    trainable: bool = False,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    method: str | None = None,
    revision: str | None = None,
) -> Models:
    """Load the adapter in the folder `path`, or all adapters that were saved there together, and apply it.

    The folder was written by peftcore, PEFT, or another library whose format a plugin reads. If there is no such
    folder, `path` may be a Hugging Face Hub id, `ORG/NAME`. `path` may also be a single file with parts for one or
    several models (`FileFormat`), or a folder that contains one. Each model gets its part.

    Args:
        model: the model, or models by name, such as `pipe.components`, each of which gets its part of a single file.
        path: folder, hub id or single file.
        adapter: name of the adapter on this model. The default is `default`; adapters that were saved together keep
            their names.
        trainable: whether the adapter trains. By default its parameters are frozen, as for inference.
        dtype: dtype of the adapter's parameters, as in `apply`.
        check_base: compare the model with the fingerprint of the base that the adapter was trained on, if the file has
            one.
        method: the installed method that reads the adapter. Only needed if several methods can read it.
        revision: branch, tag or commit on the hub.

    Raises:
        PluginError: no installed method reads the adapter, or several can and none is named.
        CheckpointError: the files cannot be read, or do not fit the model. The model stays unchanged.

    Examples:
        >>> model = AutoModelForCausalLM.from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct")
        >>> peftcore.load(model, "my-adapter")                                    # for inference
        >>> peftcore.load(model, "my-adapter", adapter="second", trainable=True)  # trainable, to continue its training
    """
    # A download may take long. It runs before the lock is taken, so that the model can be called in the meantime.
    folder = folder_of(path, revision)
    options = _Options(adapter=adapter, trainable=trainable, dtype=dtype, check_base=check_base, method=method)
    if isinstance(model, nn.Module):
        _load_all(model, folder, options)
        return model
    loaded_models: list[nn.Module] = []
    try:
        for model_name, part in single_file.owners(folder, single_file.require_models_by_name(model)).items():
            _load_all(part, folder, options, model_name)
            loaded_models.append(part)
    except BaseException:
        for part in loaded_models:
            engine.remove(part, adapter or "default")
        raise
    return model


@dataclass(frozen=True)
class _Options:
    """Arguments of `load`."""

    adapter: str | None
    trainable: bool
    dtype: torch.dtype | None
    check_base: bool
    method: str | None


@engine.exclusive("load adapters", base=True)
def _load_all(model: nn.Module, folder: Path, options: _Options, model_name: str | None = None) -> None:
    engine.refuse_adapters_of_others(model)  # PEFT's wrappers rename modules, so a file's names would match nothing
    active: tuple[str, ...] = ()
    state = engine.state_of(model)
    if state is not None:
        engine.refuse_per_sample(state, "load adapters")
        active = state.active
    saved_active, contents = read_folder(
        folder, lambda opened: read_saved(opened, model, options.adapter, options.method, model_name)
    )
    is_together = saved_active is not None
    with assuming_unchanged(model):
        loaded_names: list[str] = []
        try:
            for name, content in contents.items():
                if is_together and engine.state_of(model):
                    engine.activate(model, [])  # two active adapters must not train the same parameter
                adapter_path = adapter_folder(folder, name) if is_together else folder
                _load(model, adapter_path, content, name, options)
                loaded_names.append(name)
            if saved_active is not None:
                engine.activate(model, [*active, *saved_active])
        except BaseException:
            for name in reversed(loaded_names):
                engine.remove(model, name)
            if engine.state_of(model):
                engine.set_active(model, active)
            raise


@limit_matching_time()
def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Restore the values of the applied `adapter` from the folder `path`, which must have the same method."""
    folder = Path(path)
    entry = engine.applied(model, adapter)
    stored = read_adapter(folder, model, applied=entry.method)
    if stored.method.name != entry.method:
        raise CheckpointError(
            f"'{folder}' contains an adapter of method {stored.method.name}, but '{adapter}' uses {entry.method}. Pass "
            f"the folder that '{adapter}' was saved to"
        )
    multiplier = read_multiplier(stored.metadata)
    grown = grown_buffers(model, adapter, stored.tensors) if stored.method.trained_fields else []
    previous_buffers = [(module, name, module._buffers[name]) for module, name, _ in grown]
    parameters = (parameter for _, parameter in engine.adapter_parameters(model, adapter))
    try:
        with sharded.gathered(parameters, write=True):
            for module, name, tensor in grown:
                module._buffers[name] = tensor
            fill_applied(model, adapter, folder, stored)
    except BaseException:
        for module, name, buffer in previous_buffers:
            module._buffers[name] = buffer
        raise
    if stored.method.trained_fields:
        engine.set_trained_fields(entry, stored.method, stored.config)
    set_multiplier(model, adapter, multiplier)


def _load(model: nn.Module, folder: Path, content: Stored, adapter: str, options: _Options) -> None:
    fit = check_fit(model, folder, content, options.check_base)

    def fill() -> None:
        fill_applied(model, adapter, folder, content)
        set_multiplier(model, adapter, fit.multiplier)

    engine.add_adapter(
        model, fit.to_fill, {}, adapter=adapter, dtype=options.dtype, fill=fill, trainable=options.trainable
    )
