"""Load adapters strictly: what does not fit the model is an error."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from peftcore import adapter_files, engine
from peftcore.adaptation.adapted import base_parameters
from peftcore.adapter_files import CONFIG, TENSORS
from peftcore.checkpoint import single_file
from peftcore.checkpoint.fingerprint import difference
from peftcore.checkpoint.hub import folder_of
from peftcore.checkpoint.multiplier import multiplier_in, without
from peftcore.checkpoint.reading import (
    adapter_folder,
    read,
    read_saved,
    ties_partly,
)
from peftcore.checkpoint.tensors import fill, is_tied_in
from peftcore.engine.scaling import set_multiplier
from peftcore.engine.trained import base_tensors
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.method import Method, Train
from peftcore.observation import detect
from peftcore.peft_fields import ends_within_a_name, guarded
from peftcore.targets import drop_unmatched

Models = TypeVar("Models", bound="nn.Module | Mapping[str, Any]")


def load(
    model: Models,
    path: str | os.PathLike[str],
    *,
    adapter: str | None = None,
    trainable: bool = True,
    dtype: torch.dtype | None = None,
    check_base: bool = True,
    method: str | None = None,
    revision: str | None = None,
) -> Models:
    """Apply the adapter that lies in the folder `path`, or those that were saved there together.

    The folder was written here, by Hugging Face PEFT, or in a foreign format that a plugin reads. Where there is no
    folder `path` it may be an id on Hugging Face's hub, `ORG/NAME`, whose files are fetched by huggingface_hub. It may
    also be a single file for one model or several (`StateRules.files`), or its folder: a model is given its part.

    Args:
        model: or models by their names, such as `pipe.components`, each of which is given its part of such a file.
        adapter: the name of the folder's own adapter on this model, `default` if left out. Adapters that were saved
            together are all loaded if it is left out, under the names they had.
        trainable: False freezes it.
        dtype: of its parameters, as for `apply`.
        check_base: compare the fingerprint of the base that the adapter was trained on, where the file has one.
        method: the installed method that reads it. Needed only where several may, and an error names them.
        revision: a branch, tag or commit, on the hub.

    Raises:
        PluginError: no installed method reads it, or several may and none is named.
        CheckpointError: the files cannot be read, or do not fit the model. The model is then as it was.
    """
    folder = folder_of(path, revision)  # which may take its time, in which the model may be called
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


@engine.alone("load adapters", base=True)
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
    before = engine.state_of(model)
    active = before.active if before else ()
    done: list[str] = []
    try:
        for name, content in contents.items():
            if together and engine.state_of(model):
                engine.activate(model, [])  # two that train one parameter may lie together
            _load(model, adapter_folder(folder, name) if together else folder, content, name, dtype, check_base)
            done.append(name)
            engine.set_trainable(model, name, trainable)
        if together:
            engine.activate(model, [*active, *together["active"]])
    except BaseException:
        for name in reversed(done):
            engine.remove(model, name)
        if engine.state_of(model):
            engine.set_active(model, active)
        raise


def restore(model: nn.Module, path: str | os.PathLike[str], *, adapter: str = "default") -> None:
    """Give the applied `adapter` the values that lie in the folder `path`, which must be of the same method."""
    folder = Path(path)
    entry = engine.applied(model, adapter)
    method, _, tensors, metadata = read(folder, model, applied=entry.method)
    if method.name != entry.method:
        raise CheckpointError(f"'{folder}' holds {method.name}, the adapter '{adapter}' is {entry.method}")
    multiplier = multiplier_in(metadata)
    fill(model, adapter, tensors, folder, partly_tied=ties_partly(metadata))
    set_multiplier(model, adapter, multiplier)


def _load(
    model: nn.Module, folder: Path, content: Any, adapter: str, dtype: torch.dtype | None, check_base: bool
) -> None:
    method, config, tensors, metadata = content
    config, multiplier = without(method, config, metadata)
    if check_base:
        refuse_other_base(model, folder, metadata, "peftcore.load(...")
    config = config_on(model, method, config, tensors, metadata)
    _check_fits(model, method, config, tensors, folder)
    engine.apply_to_fill(model, config, adapter=adapter, dtype=dtype)
    try:
        fill(model, adapter, tensors, folder, partly_tied=ties_partly(metadata))
        set_multiplier(model, adapter, multiplier)
    except BaseException:
        engine.remove(model, adapter)
        raise


def config_on(
    model: nn.Module, method: Method, config: Any, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> Any:
    """A file's config, of modules that are in `model` alone, with the heads that its tensors bring."""
    changes: dict[str, Any] = {
        name: drop_unmatched(model, value)
        for name in ("target_modules", "modules_to_save", "exclude_modules")
        if isinstance(value := getattr(config, name, None), (list, tuple)) and value
    }
    if hasattr(config, "modules_to_save"):  # None: no other heads than those that the file holds
        named = changes.get("modules_to_save", config.modules_to_save) or []
        changes["modules_to_save"] = [*named, *_unnamed(model, method, named, tensors)]
    saved = changes.get("modules_to_save")
    if saved and getattr(config, "ensure_weight_tying", False) and "peftcore_version" not in metadata:
        changes["ensure_weight_tying"] = is_tied_in(model, method, saved, tensors)  # PEFT ties by names, and not always
    return dataclasses.replace(config, **changes)


def refuse_other_base(model: nn.Module, folder: Path, metadata: dict[str, str], call: str) -> None:
    """Raise a CheckpointError if the file's fingerprint is of another base. `call`: what would take it all the same."""
    why = difference(base_tensors(model), metadata["peftcore_base"]) if "peftcore_base" in metadata else None
    if why:
        raise CheckpointError(
            f"'{folder}' was trained on another base: {why}. If each load of the base draws that anew (a head, "
            "new rows of a vocabulary), have its module trained along: modules_to_save. "
            f"To load it all the same: {call}, check_base=False)"
        )


def _check_fits(model: nn.Module, method: Method, config: Any, tensors: dict[str, Tensor], folder: Path) -> None:
    """Raise a CheckpointError unless the config can be applied, and asks for no more numbers than the file holds."""
    try:
        with torch.device("meta"), guarded(method, f"'{folder}'"):
            placed = engine.placements_for(model, config, {})
    except (CheckpointError, PluginError):
        raise
    except PeftcoreError as error:
        where = folder / CONFIG if (folder / CONFIG).exists() else folder
        raise CheckpointError(f"'{where}' does not fit {type(model).__name__}: {error}") from error
    kept = (tensor for each in placed.around for tensor in each.adapter.state_dict(keep_vars=True).values())
    wanted = sum(tensor.numel() for tensor in {id(tensor): tensor for tensor in kept}.values())  # shared ones once
    there = sum(tensor.numel() for tensor in tensors.values())
    if wanted > 2 * there + 1_000_000:  # a small difference is named tensor by tensor
        raise CheckpointError(
            f"'{folder / CONFIG}' asks for an adapter of {wanted:,} numbers, '{TENSORS}' holds {there:,}"
        )


def _unnamed(model: nn.Module, method: Method, saved: Sequence[str], tensors: Mapping[str, Tensor]) -> list[str]:
    """Heads, and modules that PEFT finds by the end of their path, that the file holds and its config does not name."""

    def in_file(path: str) -> bool:
        names = [f"{path}.{name}" for name, _ in base_parameters(model.get_submodule(path))]
        held = (method.state.tensor_name(Train((name,), saved=True), name) in tensors for name in names)
        return bool(names) and all(held)

    candidates = [*detect(model).task_heads, *ends_within_a_name(model, saved)]
    return [path for path in dict.fromkeys(candidates) if path not in saved and in_file(path)]
