"""Load adapters strictly: what does not fit the model is an error."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

from peftcore import adapter_files, engine, ranks
from peftcore.checkpoint import single_file
from peftcore.checkpoint.fitting import Content, brings_all, fill_applied, fitting
from peftcore.checkpoint.hub import folder_of
from peftcore.checkpoint.multiplier import multiplier_in
from peftcore.checkpoint.reading import adapter_folder, read, read_saved, ties_partly
from peftcore.checkpoint.resident import rest
from peftcore.checkpoint.tensors import fill
from peftcore.engine.scaling import set_multiplier
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.observation import left_as_it_is
from peftcore.targets.patterns import limited

Models = TypeVar("Models", bound="nn.Module | Mapping[str, Any]")


@limited()
def load(
    model: Models,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    trainable: bool | None = None,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    method: str | None = None,
    revision: str | None = None,
    resident: bool = True,
) -> Models:
    """Apply the adapter that lies in the folder `path`, or those that were saved there together.

    The folder was written here, by Hugging Face PEFT, or in a foreign format that a plugin reads. Where there is no
    folder `path` it may be an id on Hugging Face's hub, `ORG/NAME`, whose files are fetched by huggingface_hub. It may
    also be a single file for one model or several (`StateRules.files`), or its folder: a model is given its part.

    Args:
        model: or models by their names, such as `pipe.components`, each of which is given its part of such a file.
        adapter: the name of the folder's own adapter on this model, `default` if left out. Adapters that were saved
            together are all loaded if it is left out, under the names they had.
        trainable: False freezes it. By default it trains, but with `resident=False`.
        dtype: of its parameters, as for `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, where the file has one.
        method: the installed method that reads it. Needed only where several may, and an error names them.
        revision: a branch, tag or commit, on the hub.
        resident: if False, check that the adapter fits the model, then keep it on disk, frozen. It is read when
            `activate` or another function names it, and the least recently used is dropped when `set_resident_limit`
            is exceeded. The files must not change.

    Raises:
        PluginError: no installed method reads it, or several may and none is named.
        CheckpointError: the files cannot be read, or do not fit the model. The model is then as it was.
    """
    folder = folder_of(path, revision)  # which may take its time, in which the model may be called
    if not resident:
        if not isinstance(model, nn.Module) or trainable:
            found = type(model).__name__
            what = "is for adapters that do not train" if trainable else f"is of one model, found {found}"
            raise PeftcoreError(f"load(..., resident=False) {what}. Load it with resident=True")
        rest(model, folder, adapter, dtype, check_base, method)
        return model
    trainable = trainable is not False
    if isinstance(model, nn.Module):
        _load_all(model, folder, adapter, trainable, dtype, check_base, method)
        return model
    done: list[nn.Module] = []
    try:
        for called, each in single_file.owners(folder, single_file.by_name(model)).items():
            _load_all(each, folder, adapter, trainable, dtype, check_base, method, called)
            done.append(each)
    except BaseException:
        for each in done:
            engine.remove(each, adapter or "default")
        raise
    return model


@engine.exclusive("load adapters", base=True)
def _load_all(
    model: nn.Module,
    folder: Path,
    adapter: str | None,
    trainable: bool,
    dtype: torch.dtype | None,
    check_base: bool,
    method: str | None,
    called: str | None = None,
) -> None:
    engine.refuse_adapters_of_others(model)  # in which a file's names mean nothing
    together, contents = adapter_files.read(folder, lambda opened: read_saved(opened, model, adapter, method, called))
    with left_as_it_is(model):
        before = engine.state_of(model)
        active = before.active if before else ()
        done: list[str] = []
        try:
            for name, content in contents.items():
                if together and engine.state_of(model):
                    engine.activate(model, [])  # two that train one parameter may lie together
                inside = adapter_folder(folder, name) if together else folder
                _load(model, inside, content, name, dtype, check_base, trainable)
                done.append(name)
            if together:
                engine.activate(model, [*active, *together["active"]])
        except BaseException:
            for name in reversed(done):
                engine.remove(model, name)
            if engine.state_of(model):
                engine.set_active(model, active)
            raise


@limited()
def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Give the applied `adapter` the values that lie in the folder `path`, which must be of the same method."""
    folder = Path(path)
    entry = engine.applied(model, adapter)
    method, _, tensors, metadata = read(folder, model, applied=entry.method)
    if method.name != entry.method:
        raise CheckpointError(f"'{folder}' holds {method.name}, the adapter '{adapter}' is {entry.method}")
    multiplier = multiplier_in(metadata)
    with ranks.gathered((parameter for _, parameter in engine.adapter_parameters(model, adapter)), write=True):
        fill(model, adapter, tensors, folder, partly_tied=ties_partly(metadata))
    set_multiplier(model, adapter, multiplier)


def _load(
    model: nn.Module,
    folder: Path,
    content: Content,
    adapter: str,
    dtype: torch.dtype | None,
    check_base: bool,
    trainable: bool,
) -> None:
    placed, config, multiplier = fitting(model, folder, content, check_base)
    to_fill = placed if brings_all(placed, content[2]) else config
    engine.apply_to_fill(model, to_fill, adapter=adapter, dtype=dtype, trainable=trainable)
    try:
        fill_applied(model, adapter, folder, content)
        set_multiplier(model, adapter, multiplier)
    except BaseException:
        engine.remove(model, adapter)
        raise
