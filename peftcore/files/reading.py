"""Reading of adapter folders written by peftcore, PEFT or another library, with one adapter or several."""

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
    """An adapter as its files have it.

    Args:
        method: the method that reads it.
        config: the method's config.
        tensors: tensors by the names that files of this release have.
        metadata: metadata of the tensors' file; empty for other libraries' formats.
    """

    method: Method
    config: Any
    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def adapter_folder(folder: Path, adapter: str) -> Path:
    """Return the folder of an adapter: `folder` itself for `default`, else a subfolder of its name, as in PEFT."""
    return folder / name_inside(adapter)


def name_inside(adapter: str) -> str:
    """Return the name of an adapter's subfolder; empty for the folder itself."""
    return "" if adapter == "default" else adapter


@limit_matching_time()
def read_adapter(folder: Path, model: nn.Module, method: str | None = None, applied: str | None = None) -> Stored:
    """Return the adapter in a folder.

    Args:
        method: the method that reads it; None: the method that wrote the file.
        applied: the method of the adapter that the file is for, which reads files that name no method.
    """
    return read_folder(folder, lambda opened: _read(opened, model, method, applied))


@dataclass(frozen=True)
class _Together:
    """Adapters that were saved in one call: their names, which were active, and the id of the save."""

    names: list[str]
    active: list[str]
    save: str | None


def read_saved(
    opened: Folder, model: nn.Module, adapter: str | None, method: str | None = None, model_name: str | None = None
) -> tuple[list[str] | None, dict[str, Stored]]:
    """Return (names of the active ones of adapters saved together, or None for one adapter; {name: adapter}).

    Args:
        model_name: the user's name of the model, whose part of a file for several models is read.
    """
    together = _saved_together(opened) if adapter is None and opened.only is None else None
    if together is None:
        return None, {adapter or "default": _read(opened, model, method, model_name=model_name)}
    stored = {name: _read(_of_several(opened, name, together.save), model, method) for name in together.names}
    return together.active, stored


def _saved_together(opened: Folder) -> _Together | None:
    """Return the adapters that were saved to a folder in one call, or None.

    The first of them decides: it is the first that a save renames.
    """
    candidates = [opened] if opened.has(TENSORS) else map(opened.inside, opened.folders())
    metadata = next((metadata for metadata in map(Folder.metadata, candidates) if TOGETHER in metadata), None)
    if metadata is None:
        return None
    names, active = _names_and_active(metadata[TOGETHER], opened.path)
    save = metadata.get(SAVE)
    missing = [name for name in names if not _of_several(opened, name, save).has(TENSORS)]
    if len(missing) == len([name for name in names if name_inside(name)]):
        return None  # one of several in a folder of its own
    if missing:
        raise CheckpointError(
            f"'{opened.path}' lacks the adapter '{missing[0]}', which was saved together with the others. Copy the "
            "folder again, or load one alone: peftcore.load(model, FOLDER, adapter='NAME')"
        )
    return _Together(names, active, save)


def _names_and_active(text: str, folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of adapters that were saved together, and of those that were active, from JSON.

    Raises:
        CheckpointError: the JSON is something else, or a name could not be that of an adapter.
    """
    try:
        together = json.loads(text)
        names, active = together["adapters"], together["active"]
        if not isinstance(names, list) or not isinstance(active, list):
            raise TypeError(f"adapters={names!r}, active={active!r}")
        if not names:
            raise ValueError("no names are given")
        for name in (*names, *active):
            engine.check_name(name)  # it becomes a part of a path
        if not set(active) <= set(names) or len({*names}) < len(names) or len({*active}) < len(active):
            raise ValueError(f"{active} are active, but the folder has {names}")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise CheckpointError(f"the list of adapters in '{folder}' ({TOGETHER}) is invalid: {error}") from error
    return names, active


def _of_several(opened: Folder, adapter: str, save: str | None) -> Folder:
    return opened.inside(name_inside(adapter), save) if name_inside(adapter) else opened


def _read(
    opened: Folder,
    model: nn.Module,
    named: str | None = None,
    applied: str | None = None,
    model_name: str | None = None,
) -> Stored:
    foreign = _foreign(opened, named)
    if foreign is not None:
        return _read_foreign(opened, model, foreign)
    single = single_file.named_in(opened)
    if single is not None:
        tensors, fields, metadata = single_file.read(opened, single, model, model_name)
        where = f"'{opened.path / single}'"
    else:
        tensors, metadata = opened.tensors()
        fields = opened.config()
        where = f"'{opened.path / CONFIG}'"
    # torch cannot compare 8-bit floats with others; float32 represents them all.
    tensors = {n: t.float() if t.is_floating_point() and t.dtype.itemsize == 1 else t for n, t in tensors.items()}
    method_fields = own_fields(opened.path, metadata)
    method = method_of_fields(
        where,
        fields,
        method_fields,
        written_by=metadata.get(METHOD, applied),
        plugin=metadata.get(PLUGIN),
        method=named,
    )
    fields = with_own(f"'{opened.path / TENSORS}'", method, fields, method_fields)
    # PEFT's default is False, which its older files do not name.
    tied = metadata.get(TIED) != "false" if VERSION in metadata else fields.get("ensure_weight_tying")
    fields["ensure_weight_tying"] = False if tied is None else tied
    if VERSION in metadata:
        fields.setdefault("peft_version", peft_version())  # the fields are those of that release
    with guarded(method, f"'{opened.path}'"), sharded.gathered_when_read(model):
        for layout in method.state.layouts.values():
            tensors, fields = layout.read(model, tensors, fields)
        reason = None if VERSION in metadata else method.state.peft.refused(model, tensors, fields)
        if reason is not None:
            raise CheckpointError(f"'{opened.path}' cannot be read: {reason}")
        try:
            read_tensors, read_fields = method.state.read(model, tensors, fields)
            config = config_of(where, method, read_fields, str(fields["peft_type"]))
        except Exception:
            config_of_fields(where, method, fields)  # an error in the fields themselves is the better message
            raise
        return Stored(method, config, dict(read_tensors), metadata)


def fields_of_folder(folder: Path) -> tuple[dict[str, Any], ForeignFormat | None]:
    """Return the config fields of an adapter folder by PEFT's names, and its foreign format.

    Raises:
        CheckpointError: the folder does not contain an adapter.
    """
    return read_folder(folder, about)


def about(opened: Folder, method: str | None = None) -> tuple[dict[str, Any], ForeignFormat | None]:
    """Return the config fields of an opened folder by PEFT's names, and its foreign format."""
    foreign = _foreign(opened, method)
    if foreign is None:
        return opened.config(), None
    with guarded(foreign.method, f"'{opened.path}'"):
        fields = {"peft_type": foreign.method.state.peft_type, **foreign.format.about(foreign.fields)}
    return fields, foreign.format


def vocabulary_rows(model: nn.Module, folder: Path) -> int | None:
    """Return the number of rows of the embedding or output head in the adapter's file; None if it has neither."""
    names = set(embedding_parameters(model))

    def rows(opened: Folder) -> int | None:
        tensors = opened.tensors()[0] if opened.has(TENSORS) else {}
        return max((len(tensor) for name, tensor in tensors.items() if name_in_base(name) in names), default=None)

    return read_folder(folder, rows)


def config_of_folder(folder: Path, model: nn.Module, method: str | None = None) -> Any:
    """Return the config with which `load` would place the adapter in a folder on `model`.

    Args:
        method: the method that reads it; None: the method that wrote the file.

    Raises:
        PluginError: no method reads it, several do, or the named one does not.
        CheckpointError: the folder is damaged or does not contain an adapter.
    """
    return read_adapter(folder, model, method).config


def method_of(opened: Folder, named: str | None) -> Method:
    """Return the installed method that reads an opened folder, or the named one, if it can.

    Raises:
        PluginError: no method can read it, several can, or the named one cannot.
        CheckpointError: the folder does not contain an adapter.
    """
    foreign = _foreign(opened, named)
    if foreign is not None:
        return foreign.method
    fields, metadata = opened.config(), opened.metadata()
    method_fields, where = own_fields(opened.path, metadata), f"'{opened.path / CONFIG}'"
    writer, plugin = metadata.get(METHOD), metadata.get(PLUGIN)
    return method_of_fields(where, fields, method_fields, written_by=writer, plugin=plugin, method=named)


@dataclass(frozen=True)
class _Foreign:
    """Another library's folder: the plugin and the method that read it, its format, and the fields of its config."""

    plugin: Plugin
    method: Method
    format: ForeignFormat
    fields: dict[str, Any]


def _foreign(opened: Folder, named: str | None = None) -> _Foreign | None:
    """Return what reads another library's folder, whose config has no peft_type; None for a folder of PEFT."""
    if _is_of_peft(opened):
        return None
    matches = _matching_formats(opened, None if named is None else registry.method(named))
    if len(matches) > 1:
        names = ", ".join(f"'{name}' ({m.plugin.distribution} {m.plugin.version})" for name, m in matches.items())
        raise PluginError(
            f"'{opened.path}' may be read by any of {len(matches)} installed methods: {names}. Choose one: "
            f"method='NAME' (in commands: --method NAME); or restrict the plugins: PEFTCORE_PLUGINS=NAME,NAME"
        )
    return next(iter(matches.values()), None)


def _matching_formats(opened: Folder, chosen: Method | None) -> dict[str, _Foreign]:
    """Return what may read a folder, by method: its first format that matches. Only `chosen` if it is given."""
    matches: dict[str, _Foreign] = {}
    for plugin in registry.plugins():
        for method in plugin.methods:
            if method.recorded_as is not None or chosen not in (None, method):
                continue
            for form in method.state.foreign:
                try:
                    fields = _fields_of_others(opened, form.config)
                    if fields is not None and form.matches(dict(fields)):
                        matches.setdefault(method.name, _Foreign(plugin, method, form, fields))
                except (Exception, SystemExit) as error:
                    registry.go_on_without(f"ForeignFormat.matches of {form.name!r}", plugin, error)
    return matches


def _is_of_peft(opened: Folder) -> bool:
    """Return whether the folder's config is in PEFT's format, so that no other format is tried."""
    try:
        fields = opened.json(CONFIG)
    except TwoSavesError:
        raise
    except (FileNotFoundError, CheckpointError):
        return False
    return isinstance(fields, dict) and "peft_type" in fields


def _fields_of_others(opened: Folder, config: str) -> dict[str, Any] | None:
    """Return the fields of a config that is not PEFT's, or None."""
    try:
        fields = opened.json(config)
    except (FileNotFoundError, CheckpointError):
        return None
    return fields if isinstance(fields, dict) and "peft_type" not in fields else None


def _read_foreign(opened: Folder, model: nn.Module, foreign: _Foreign) -> Stored:
    tensors, _ = opened.tensors(foreign.format.tensors)
    try:
        with guarded(foreign.method, f"'{opened.path}'"):
            config, tensors = foreign.format.read(model, foreign.fields, tensors)
    except PeftcoreError as error:
        raise CheckpointError(f"'{opened.path}', of {foreign.format.name}, cannot be read: {error}") from error
    return Stored(foreign.method, config, tensors, {})
