"""Reading of adapter folders, with one or several adapters, written by peftcore, PEFT or another library."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore import engine
from peftcore.errors import CheckpointError, PeftcoreError, PluginError
from peftcore.files import single_file
from peftcore.files.folder import SAVE, Folder, TwoSavesError, read_folder
from peftcore.files.metadata import METHOD, PLUGIN, TIED, TOGETHER, VERSION, own_fields
from peftcore.files.resized_vocabulary import embedding_parameters
from peftcore.model.targets.patterns import limit_matching_time
from peftcore.plugin import sharded
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.method import ForeignFormat, Method
from peftcore.plugin.peft_fields import config_of, config_of_fields, guarded, method_of_fields, peft_version, with_own
from peftcore.plugin.peft_keys import name_in_base
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import CONFIG, TENSORS


@dataclass(frozen=True)
class Stored:
    """An adapter read from its files.

    Args:
        method: the method that reads it.
        config: the method's config.
        tensors: tensors by the names that this release gives them.
        metadata: metadata of the tensors' file; empty for other libraries' formats.
    """

    method: Method
    config: Any
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Return the folder of an adapter: `folder` itself for `default`, else a subfolder with its name, as in PEFT."""
    return folder / name_inside(adapter)


def name_inside(adapter: str) -> str:
    """Return the name of an adapter's subfolder; empty for the folder itself."""
    return "" if adapter == "default" else adapter


@limit_matching_time()
def read_adapter(folder: Path, model: nn.Module, method: str | None = None, applied: str | None = None) -> Stored:
    """Read the adapter in a folder.

    Args:
        folder: the adapter's folder.
        model: the model to read it for.
        method: the method to read it with; None for the method that wrote the file.
        applied: the method of the applied adapter that gets the values. It reads files that do not name a method.
    """
    return read_folder(folder, lambda opened: _read(opened, model, method, applied))


@dataclass(frozen=True)
class _SavedTogether:
    """Adapters that were saved in one call: their names, the names of the active ones, and the id of the save."""

    names: list[str]
    active: list[str]
    save: str | None


def read_saved(
    folder: Folder, model: nn.Module, adapter: str | None, method: str | None = None, model_name: str | None = None
) -> tuple[list[str] | None, dict[str, Stored]]:
    """Read one adapter, or all adapters that were saved together.

    Args:
        folder: the opened folder.
        model: the model to read them for.
        adapter: name for a single adapter; None for the saved names.
        method: the method to read them with; None for the method that wrote the file.
        model_name: the user's name of the model, whose part of a file for several models is read.

    Returns:
        Names of the active adapters (None for a single adapter), and the adapters by name.
    """
    together = _saved_together(folder) if adapter is None and folder.only is None else None
    if together is None:
        return None, {adapter or "default": _read(folder, model, method, model_name=model_name)}
    adapters = {name: _read(_folder_of_adapter(folder, name, together.save), model, method) for name in together.names}
    return together.active, adapters


def _saved_together(folder: Folder) -> _SavedTogether | None:
    """Return the adapters that were saved to a folder in one call; None if it has a single adapter.

    The first adapter decides, because a save renames its files first.
    """
    candidates = [folder] if folder.has(TENSORS) else map(folder.subfolder, folder.subfolders())
    metadata = next((metadata for metadata in map(Folder.metadata, candidates) if TOGETHER in metadata), None)
    if metadata is None:
        return None
    names, active = _names_and_active(metadata[TOGETHER], folder.path)
    save = metadata.get(SAVE)
    missing_names = [name for name in names if not _folder_of_adapter(folder, name, save).has(TENSORS)]
    if len(missing_names) == len([name for name in names if name_inside(name)]):
        return None  # one of the adapters, copied to its own folder
    if missing_names:
        raise CheckpointError(
            f"'{folder.path}' lacks the adapter '{missing_names[0]}', which was saved together with the others. Copy "
            "the folder again, or load a single adapter: peftcore.load(model, FOLDER, adapter='NAME')"
        )
    return _SavedTogether(names, active, save)


def _names_and_active(text: str, folder: Path) -> tuple[list[str], list[str]]:
    """Parse the names of adapters that were saved together, and the names of the active ones, from JSON.

    Raises:
        CheckpointError: the JSON does not have this form, or a name is not a valid adapter name.
    """
    try:
        together = json.loads(text)
        names, active = together["adapters"], together["active"]
        if not isinstance(names, list) or not isinstance(active, list):
            raise TypeError(f"adapters={names!r}, active={active!r}")
        if not names:
            raise ValueError("no names are given")
        for name in (*names, *active):
            engine.check_name(name)  # the name becomes part of a path
        if not set(active) <= set(names) or len({*names}) < len(names) or len({*active}) < len(active):
            raise ValueError(f"the active adapters are {active}, but the folder contains {names}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"the list of adapters in '{folder}' ({TOGETHER}) is invalid: {error}") from error
    return names, active


def _folder_of_adapter(folder: Folder, adapter: str, save: str | None) -> Folder:
    return folder.subfolder(name_inside(adapter), save) if name_inside(adapter) else folder


def _read(
    folder: Folder,
    model: nn.Module,
    method_name: str | None = None,
    applied: str | None = None,
    model_name: str | None = None,
) -> Stored:
    foreign = _find_foreign(folder, method_name)
    if foreign is not None:
        return _read_foreign(folder, model, foreign)
    file = single_file.find_file(folder)
    if file is not None:
        tensors, fields, metadata = single_file.read(folder, file, model, model_name)
        source = f"'{folder.path / file}'"
    else:
        tensors, metadata = folder.tensors()
        fields = folder.config()
        source = f"'{folder.path / CONFIG}'"
    # PyTorch cannot compare 8-bit floats with other dtypes. float32 represents all of their values.
    tensors = {n: t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t for n, t in tensors.items()}
    method_fields = own_fields(folder.path, metadata)
    method = method_of_fields(
        source,
        fields,
        method_fields,
        written_by=metadata.get(METHOD, applied),
        plugin=metadata.get(PLUGIN),
        method=method_name,
    )
    fields = with_own(f"'{folder.path / TENSORS}'", method, fields, method_fields)
    # Older files of PEFT lack the field, whose default is False.
    tied = metadata.get(TIED) != "false" if VERSION in metadata else fields.get("ensure_weight_tying")
    fields["ensure_weight_tying"] = False if tied is None else tied
    if VERSION in metadata:
        fields.setdefault("peft_version", peft_version())  # the PEFT release whose fields peftcore writes
    with guarded(method, f"'{folder.path}'"), sharded.gathered_when_read(model):
        for layout in method.state.layouts.values():
            tensors, fields = layout.read(model, tensors, fields)
        reason = None if VERSION in metadata else method.state.peft.refused(model, tensors, fields)
        if reason is not None:
            raise CheckpointError(f"'{folder.path}' cannot be read: {reason}")
        try:
            read_tensors, read_fields = method.state.read(model, tensors, fields)
            config = config_of(source, method, read_fields, str(fields["peft_type"]))
        except Exception:
            config_of_fields(source, method, fields)  # if the fields themselves are wrong, this raises a better error
            raise
        return Stored(method, config, dict(read_tensors), metadata)


def fields_of_folder(folder: Path) -> tuple[dict[str, Any], ForeignFormat | None]:
    """Return the config fields of an adapter folder by PEFT's names, and its foreign format or None.

    Raises:
        CheckpointError: the folder does not contain an adapter.
    """
    return read_folder(folder, fields_and_format)


def fields_and_format(folder: Folder, method: str | None = None) -> tuple[dict[str, Any], ForeignFormat | None]:
    """Return the config fields of an opened folder by PEFT's names, and its foreign format or None."""
    foreign = _find_foreign(folder, method)
    if foreign is None:
        return folder.config(), None
    with guarded(foreign.method, f"'{folder.path}'"):
        fields = {"peft_type": foreign.method.state.peft_type, **foreign.format.about(foreign.fields)}
    return fields, foreign.format


def vocabulary_rows(model: nn.Module, folder: Path) -> int | None:
    """Return the vocabulary size of the embedding or output head in an adapter's file, or None if it has neither."""
    names = set(embedding_parameters(model))

    def rows(opened: Folder) -> int | None:
        tensors = opened.tensors()[0] if opened.has(TENSORS) else {}
        return max((len(tensor) for name, tensor in tensors.items() if name_in_base(name) in names), default=None)

    return read_folder(folder, rows)


def config_of_folder(folder: Path, model: nn.Module, method: str | None = None) -> Any:
    """Return the config that `load` would apply to `model` for the adapter in a folder.

    Args:
        folder: the adapter's folder.
        model: the model.
        method: the method to read it with; None for the method that wrote the file.

    Raises:
        PluginError: no method can read the adapter, several can, or the named one cannot.
        CheckpointError: the folder is damaged, or does not contain an adapter.
    """
    return read_adapter(folder, model, method).config


def method_of(folder: Folder, method_name: str | None) -> Method:
    """Return the installed method that reads an opened folder; if `method_name` is given, that method.

    Raises:
        PluginError: no method can read the folder, several can, or the named one cannot.
        CheckpointError: the folder does not contain an adapter.
    """
    foreign = _find_foreign(folder, method_name)
    if foreign is not None:
        return foreign.method
    fields, metadata = folder.config(), folder.metadata()
    method_fields, source = own_fields(folder.path, metadata), f"'{folder.path / CONFIG}'"
    writer, plugin = metadata.get(METHOD), metadata.get(PLUGIN)
    return method_of_fields(source, fields, method_fields, written_by=writer, plugin=plugin, method=method_name)


@dataclass(frozen=True)
class _ForeignFolder:
    """A folder of another library: the plugin and the method that read it, its format, and the fields of its config."""

    plugin: Plugin
    method: Method
    format: ForeignFormat
    fields: dict[str, Any]


def _find_foreign(folder: Folder, method_name: str | None = None) -> _ForeignFolder | None:
    """Find the method that reads another library's folder; None for a folder in PEFT's format."""
    if _is_peft_folder(folder):
        return None
    matches = _matching_formats(folder, None if method_name is None else registry.method(method_name))
    if len(matches) > 1:
        names = ", ".join(f"'{name}' ({m.plugin.distribution} {m.plugin.version})" for name, m in matches.items())
        raise PluginError(
            f"{len(matches)} installed methods can read '{folder.path}': {names}. Choose one with method='NAME' "
            "(--method NAME on the command line), or restrict the plugins with PEFTCORE_PLUGINS=NAME,NAME"
        )
    return next(iter(matches.values()), None)


def _matching_formats(folder: Folder, required_method: Method | None) -> dict[str, _ForeignFolder]:
    """Return the first matching format of each method, or of `required_method` only, by the method's name."""
    matches: dict[str, _ForeignFolder] = {}
    for plugin in registry.plugins():
        for method in plugin.methods:
            if method.recorded_as is not None or required_method not in (None, method):
                continue
            for form in method.state.foreign:
                try:
                    fields = _fields_of_others(folder, form.config)
                    if fields is not None and form.matches(dict(fields)):
                        matches.setdefault(method.name, _ForeignFolder(plugin, method, form, fields))
                except (Exception, SystemExit) as error:
                    registry.go_on_without(f"ForeignFormat.matches of {form.name!r}", plugin, error)
    return matches


def _is_peft_folder(folder: Folder) -> bool:
    """Return whether the folder's config is in PEFT's format, in which case no other format is tried."""
    try:
        fields = folder.json(CONFIG)
    except TwoSavesError:
        raise
    except (FileNotFoundError, CheckpointError):
        return False
    return isinstance(fields, dict) and "peft_type" in fields


def _fields_of_others(folder: Folder, config: str) -> dict[str, Any] | None:
    """Return the fields of another library's config; None if it cannot be read or is PEFT's."""
    try:
        fields = folder.json(config)
    except (FileNotFoundError, CheckpointError):
        return None
    return fields if isinstance(fields, dict) and "peft_type" not in fields else None


def _read_foreign(folder: Folder, model: nn.Module, foreign: _ForeignFolder) -> Stored:
    tensors, _ = folder.tensors(foreign.format.tensors)
    try:
        with guarded(foreign.method, f"'{folder.path}'"):
            config, tensors = foreign.format.read(model, foreign.fields, tensors)
    except PeftcoreError as error:
        raise CheckpointError(f"'{folder.path}' (format: {foreign.format.name}) cannot be read: {error}") from error
    return Stored(foreign.method, config, tensors, {})
