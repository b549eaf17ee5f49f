"""Strict loading of adapters: what does not fit the model is an error."""

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
from peftcore.files.fitting import fill_applied, fitting
from peftcore.files.folder import read_folder
from peftcore.files.hub import folder_of
from peftcore.files.multiplier import multiplier_in
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
    """Apply the adapter in the folder `path`, or all adapters that were saved there together.

    The folder was written by peftcore, by Hugging Face PEFT, or in a foreign format that a plugin reads. If there is no
    such folder, `path` may be an id on Hugging Face's hub, `ORG/NAME`, which huggingface_hub downloads. It may also be
    a single file for one model or several (`FileFormat`), or the folder of one; a model gets its part.

    Args:
        model: the model, or models by name, such as `pipe.components`, each of which gets its part of a single file.
        adapter: the name of the adapter on this model; by default `default`, or for adapters saved together all of
            them, under their saved names.
        trainable: whether it trains. By default its parameters are frozen, as for inference.
        dtype: dtype of its parameters, as in `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, if the file has one.
        method: the installed method that reads it. Needed only if several can, which an error reports.
        revision: branch, tag or commit on the hub.

    Raises:
        PluginError: no installed method reads it, or several may and none is named.
        CheckpointError: the files cannot be read, or do not fit the model, which is then unchanged.
    """
    folder = folder_of(path, revision)  # may take long, so outside the lock: the model can be called meanwhile
    options = _Options(adapter=adapter, trainable=trainable, dtype=dtype, check_base=check_base, method=method)
    if isinstance(model, nn.Module):
        _load_all(model, folder, options)
        return model
    loaded: list[nn.Module] = []
    try:
        for model_name, part in single_file.owners(folder, single_file.by_name(model)).items():
            _load_all(part, folder, options, model_name)
            loaded.append(part)
    except BaseException:
        for part in loaded:
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
    engine.refuse_adapters_of_others(model)  # where a file's names match nothing
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
        loaded: list[str] = []
        try:
            for name, content in contents.items():
                if is_together and engine.state_of(model):
                    engine.activate(model, [])  # two of them may train the same parameter
                inside = adapter_folder(folder, name) if is_together else folder
                _load(model, inside, content, name, options)
                loaded.append(name)
            if saved_active is not None:
                engine.activate(model, [*active, *saved_active])
        except BaseException:
            for name in reversed(loaded):
                engine.remove(model, name)
            if engine.state_of(model):
                engine.set_active(model, active)
            raise


@limit_matching_time()
def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Set the values of the applied `adapter` to those in the folder `path`, which must be of the same method."""
    folder = Path(path)
    entry = engine.applied(model, adapter)
    stored = read_adapter(folder, model, applied=entry.method)
    if stored.method.name != entry.method:
        raise CheckpointError(
            f"'{folder}' contains an adapter of {stored.method.name}, but '{adapter}' is of {entry.method}"
        )
    multiplier = multiplier_in(stored.metadata)
    grown = grown_buffers(model, adapter, stored.tensors) if stored.method.trained_fields else []
    before = [(module, name, module._buffers[name]) for module, name, _ in grown]
    parameters = (parameter for _, parameter in engine.adapter_parameters(model, adapter))
    try:
        with sharded.gathered(parameters, write=True):
            for module, name, tensor in grown:
                module._buffers[name] = tensor
            fill_applied(model, adapter, folder, stored)
    except BaseException:
        for module, name, buffer in before:
            module._buffers[name] = buffer
        raise
    if stored.method.trained_fields:
        engine.set_trained_fields(entry, stored.method, stored.config)
    set_multiplier(model, adapter, multiplier)


def _load(model: nn.Module, folder: Path, content: Stored, adapter: str, options: _Options) -> None:
    fit = fitting(model, folder, content, options.check_base)

    def fill() -> None:
        fill_applied(model, adapter, folder, content)
        set_multiplier(model, adapter, fit.multiplier)

    engine.add_adapter(
        model, fit.to_fill, {}, adapter=adapter, dtype=options.dtype, fill=fill, trainable=options.trainable
    )
