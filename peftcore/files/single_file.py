"""Single files without a config, for one model or several: their formats, and which part belongs to which model.

Such files are for exchange: they contain what an adapter computes and the fingerprint of its base, and nothing for
training.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore.errors import CheckpointError, PeftcoreError, warn
from peftcore.files.folder import Content, Folder, to_bytes, write_file
from peftcore.files.metadata import BASE, PARTS
from peftcore.plugin.method import FileFormat, Method
from peftcore.plugin.peft_fields import guarded
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import CONFIG, TENSORS, parse_json

_KEPT = (BASE,)  # the rest is for training, or wrong once another tool has changed the file
ENDING = ".safetensors"


def formats() -> dict[str, tuple[FileFormat, Method]]:
    """Return {name for `save`: (format, method)} of all installed methods.

    If several methods have a format, the method is the one without a flag.
    """
    by_name: dict[str, tuple[FileFormat, Method]] = {}
    for method in sorted(registry.methods().values(), key=lambda method: method.state.peft.flag is not None):
        if method.state.formats and method.recorded_as is None:
            for name, form in method.state.files.items():
                by_name.setdefault(name, (form, method))
    return by_name


def file_names() -> list[str]:
    """Return the file names of these formats in folders."""
    return sorted({form.file for form, _ in formats().values()})


def named_in(opened: Folder) -> str | None:
    """Return the name of the single file: the requested one, or the only known one in a folder.

    Raises:
        CheckpointError: the folder also contains an adapter, which may be another one.
    """
    if opened.only is not None:
        return opened.only
    others = {name for name in opened.listed() if name.endswith(ENDING) and name != TENSORS}
    known = [name for name in file_names() if name in others] if others else []
    if known and (opened.has(CONFIG) or opened.has(TENSORS)):
        raise CheckpointError(
            f"'{opened.path}' contains two adapters, '{TENSORS}' and '{known[0]}', which may differ. Pass the "
            f"file itself, '{opened.path / known[0]}', or move it into a folder of its own"
        )
    return known[0] if known else None


def read(
    opened: Folder, file: str, model: nn.Module, model_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Return (tensors, fields, metadata) of the part of `model`, as in a folder in PEFT's format.

    Args:
        model_name: the user's name of the model; if None, a warning lists the parts for other models.

    Raises:
        CheckpointError: the file cannot be read, or has no such part, or several.
    """
    where = opened.path / file
    if file in (CONFIG, TENSORS):
        raise CheckpointError(f"'{where}' is one of an adapter's files. Give the folder: '{opened.path}'")
    tensors, metadata = opened.tensors(file)
    form, method = _format_of(where, tensors)
    with guarded(method, f"'{where}'"):
        try:
            parts = form.split(tensors)
            parts_of_model = [""] if parts.keys() == {""} else form.parts(model, model_name)
            matching = [part for part in parts_of_model if part in parts]
            if len(matching) != 1:
                raise CheckpointError(_not_one(model, parts_of_model, matching, parts))
            part_tensors, fields = form.read(model, matching[0], parts[matching[0]], metadata)
        except PeftcoreError as error:
            raise CheckpointError(f"'{where}' cannot be read: {error}") from error
    left = {part: len(names) for part, names in parts.items() if part not in matching}
    if left and model_name is None:
        warn(
            f"'{where}' also contains {_counted(left)}, left for other models: peftcore.load(them, ...), or all at "
            "once: peftcore.load(pipe.components, ...)",
        )
    metadata_of_parts = parse_json(metadata.get(PARTS, "{}").encode(errors="surrogatepass"), f"{where}: {PARTS}")
    about = metadata_of_parts.get(matching[0], {}) if isinstance(metadata_of_parts, dict) else {}
    return part_tensors, fields, {name: about[name] for name in _KEPT if isinstance(about, dict) and name in about}


@dataclass(frozen=True)
class Parts:
    """A single file as it is, for every model that it has a part for.

    Args:
        format: name of its format for `save`.
        method: the method that the format belongs to.
        tensors: {part: {name: tensor}}.
        metadata: metadata of the file.
    """

    format: str
    method: Method
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]


def parts_of(opened: Folder, file: str) -> Parts:
    """Return the content of a single file.

    Raises:
        CheckpointError: it cannot be read.
    """
    tensors, metadata = opened.tensors(file)
    form, method = _format_of(opened.path / file, tensors)
    name = next(name for name, (known_form, _) in formats().items() if known_form is form)
    return Parts(name, method, dict(form.split(tensors)), metadata)


def by_name(models: object) -> Mapping[str, Any]:
    """Return `models` if it maps names to models, else raise a PeftcoreError."""
    if not isinstance(models, Mapping):
        raise PeftcoreError(
            f"expected a model or models by name, found a {type(models).__name__}. For a pipeline pass its components: "
            "peftcore.save(pipe.components, ...), peftcore.load(pipe.components, ...)"
        )
    return models


def owners(file: Path, models: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the models for which a file has a part, by the user's names.

    Raises:
        CheckpointError: a part belongs to none of the models, or it is unclear to which.
    """
    opened = Folder.opened(file)
    name = named_in(opened)
    if name is None:
        raise CheckpointError(
            f"'{file}' contains one adapter, but {len(models)} models are given. Pass one: load(model, ...)"
        )
    tensors, _ = opened.tensors(name)
    form, _ = _format_of(opened.path / name, tensors)
    parts = dict(form.split(tensors))
    models_with_parts: dict[str, nn.Module] = {}
    for model_name, model in models.items():
        for part in _parts_or_none(form, model, model_name):
            if part in parts:
                del parts[part]
                models_with_parts[model_name] = model
    if parts:
        unowned = _counted({part: len(names) for part, names in parts.items()})
        raise CheckpointError(
            f"'{opened.path / name}' contains {unowned}, for which no model is given (found: {', '.join(models)}). "
            "Pass it under its name in the pipeline, or load the others one by one: peftcore.load(model, ...)"
        )
    return models_with_parts


def _parts_or_none(form: FileFormat, model: object, model_name: str) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    try:
        return list(form.parts(model, model_name))
    except PeftcoreError:
        return []


def write(format: str, path: Path, contents: Mapping[str | None, tuple[nn.Module, Content]]) -> None:
    """Write adapters, by the user's names of their models, to one file in `path`, or to the file `path` itself.

    Raises:
        CheckpointError: it cannot be written, or would overwrite parts that it does not contain.
        PeftcoreError: the format cannot represent a model or a tensor.
    """
    form, method = formats()[format]
    parts: dict[str, tuple[nn.Module, Content]] = {}
    for model_name, (model, content) in contents.items():
        names = form.parts(model, model_name)
        if len(names) != 1:
            example = f"peftcore.save({{'{names[0]}': model}}, ..., format='{format}')"
            raise PeftcoreError(
                f"a {type(model).__name__} may be {' or '.join(map(repr, names))} of a pipeline. Say which: {example}"
            )
        parts[names[0]] = model, content
    file = path if path.suffix == ENDING and not path.is_dir() else path / form.file
    _refuse_loss(file, path, parts)
    with guarded(method, f"format='{format}'", PeftcoreError):
        tensors, metadata = form.write(
            {part: (model, dict(content.tensors), dict(content.fields)) for part, (model, content) in parts.items()}
        )
    about = {part: {n: content.metadata[n] for n in _KEPT} for part, (_, content) in parts.items()}
    write_file(file, to_bytes(tensors, {"format": "pt", **metadata, PARTS: json.dumps(about)}))


def _refuse_loss(file: Path, path: Path, parts: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if parts of other models would be lost, or a folder would have two adapters."""
    existing = next((name for name in (CONFIG, TENSORS) if path != file and os.path.lexists(path / name)), None)
    if existing is not None:
        raise CheckpointError(f"'{path}' contains an adapter in another format ('{existing}'). Save to another folder")
    if not os.path.lexists(file):
        return
    try:
        names, _ = Folder.opened(file).tensors(file.name)
        existing_parts = _format_of(file, names)[0].split(names)
    except CheckpointError as error:
        raise CheckpointError(
            f"the existing file '{file}' is not in a known format: {error}. Save elsewhere, or delete it"
        ) from error
    lost = {part: len(names) for part, names in existing_parts.items() if part not in parts}
    if lost:
        raise CheckpointError(
            f"'{file}' also contains {_counted(lost)}, which this would overwrite. Save the models together: "
            "peftcore.save(pipe.components, ...); or elsewhere, or delete the file"
        )


def _format_of(where: Path, tensors: Mapping[str, Tensor]) -> tuple[FileFormat, Method]:
    known = formats()
    matching = {name: entry for name, entry in known.items() if entry[0].matches(tensors.keys())}
    if len(matching) != 1:
        names = ", ".join(f"'{name}'" for name in list(tensors)[:3]) or "none"
        problem = "is in no format that is known"
        if matching:
            problem = f"may be in any of these formats: {', '.join(matching)}"
        raise CheckpointError(f"'{where}' {problem} (known: {', '.join(known) or 'none'}). Its tensors: {names}, ...")
    return next(iter(matching.values()))


def _not_one(
    model: nn.Module, parts_of_model: Sequence[str], matching: list[str], parts: Mapping[str, Collection[str]]
) -> str:
    if matching:
        example = f"peftcore.load({{'{matching[0]}': model}}, ...)"
        return f"it contains {' and '.join(matching)}, and a {type(model).__name__} may be either. Say which: {example}"
    counted = _counted({part: len(names) for part, names in parts.items()})
    return f"it contains {counted}, and nothing for a {type(model).__name__} ({' or '.join(parts_of_model)})"


def _counted(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{part or 'no part'} ({count} tensors)" for part, count in parts.items())
