"""Adapters in single files without a config: their formats, and the parts for each model of a pipeline.

Such files are for inference. They contain the tensors that an adapter computes with and the fingerprint of its base,
but no state for training.
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

_METADATA_KEYS = (BASE,)  # all other metadata is for training, or becomes wrong once another tool changes the file
SUFFIX = ".safetensors"


def formats() -> dict[str, tuple[FileFormat, Method]]:
    """Return the single-file formats of all installed methods: {name for `save`: (format, method)}.

    If several methods have the same format, it belongs to the method without a flag in PEFT's config.
    """
    formats_by_name: dict[str, tuple[FileFormat, Method]] = {}
    for method in sorted(registry.methods().values(), key=lambda method: method.state.peft.flag is not None):
        if method.state.formats and method.recorded_as is None:
            for name, form in method.state.files.items():
                formats_by_name.setdefault(name, (form, method))
    return formats_by_name


def file_names() -> list[str]:
    """Return the names that files of these formats have in folders."""
    return sorted({form.file for form, _ in formats().values()})


def find_file(folder: Folder) -> str | None:
    """Return the name of the single file: the requested one, or the first in the folder with a known name, or None.

    Raises:
        CheckpointError: the folder also contains an adapter in PEFT's format, which may differ.
    """
    if folder.only is not None:
        return folder.only
    other_files = {name for name in folder.list_names() if name.endswith(SUFFIX) and name != TENSORS}
    known_files = [name for name in file_names() if name in other_files] if other_files else []
    if known_files and (folder.has(CONFIG) or folder.has(TENSORS)):
        raise CheckpointError(
            f"'{folder.path}' contains two adapters, '{TENSORS}' and '{known_files[0]}', which may differ. Pass the "
            f"file itself, '{folder.path / known_files[0]}', or move it to a separate folder"
        )
    return known_files[0] if known_files else None


def read(
    folder: Folder, file: str, model: nn.Module, model_name: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """Read the part of a file that belongs to `model`.

    Args:
        folder: the opened folder of the file.
        file: name of the file.
        model: the model.
        model_name: the user's name of the model; if None, a warning lists the parts for other models.

    Returns:
        Tensors, config fields and metadata, as in a folder in PEFT's format.

    Raises:
        CheckpointError: the file cannot be read, or does not have exactly one part for the model.
    """
    source = folder.path / file
    if file in (CONFIG, TENSORS):
        raise CheckpointError(f"'{source}' is one of an adapter's files. Pass its folder: '{folder.path}'")
    tensors, metadata = folder.tensors(file)
    form, method = _format_of(source, tensors)
    with guarded(method, f"'{source}'"):
        try:
            parts = form.split(tensors)
            parts_of_model = [""] if parts.keys() == {""} else form.parts(model, model_name)
            matching = [part for part in parts_of_model if part in parts]
            if len(matching) != 1:
                raise CheckpointError(_part_problem(model, parts_of_model, matching, parts))
            part_tensors, fields = form.read(model, matching[0], parts[matching[0]], metadata)
        except PeftcoreError as error:
            raise CheckpointError(f"'{source}' cannot be read: {error}") from error
    remaining = {part: len(names) for part, names in parts.items() if part not in matching}
    if remaining and model_name is None:
        warn(
            f"'{source}' also contains {_describe_parts(remaining)}, which belong to other models. Load these parts "
            "as well, or load all parts at once: peftcore.load(pipe.components, ...)",
        )
    metadata_of_parts = parse_json(metadata.get(PARTS, "{}").encode(errors="surrogatepass"), f"{source}: {PARTS}")
    about = metadata_of_parts.get(matching[0], {}) if isinstance(metadata_of_parts, dict) else {}
    return (
        part_tensors,
        fields,
        {name: about[name] for name in _METADATA_KEYS if isinstance(about, dict) and name in about},
    )


@dataclass(frozen=True)
class Parts:
    """Content of a single file, with the parts for all models.

    Args:
        format: name of the format for `save`.
        method: the method that the format belongs to.
        tensors: {part: {name: tensor}}.
        metadata: metadata of the file.
    """

    format: str
    method: Method
    tensors: dict[str, dict[str, Tensor]]
    metadata: dict[str, str]


def read_parts(folder: Folder, file: str) -> Parts:
    """Return the content of a single file.

    Raises:
        CheckpointError: the file cannot be read.
    """
    tensors, metadata = folder.tensors(file)
    form, method = _format_of(folder.path / file, tensors)
    name = next(name for name, (known_form, _) in formats().items() if known_form is form)
    return Parts(name, method, dict(form.split(tensors)), metadata)


def require_models_by_name(models: object) -> Mapping[str, Any]:
    """Return `models` if it maps names to models, else raise a PeftcoreError."""
    if not isinstance(models, Mapping):
        raise PeftcoreError(
            f"expected a model or a dictionary of models by name, found a {type(models).__name__}. For a pipeline, "
            "pass its components: peftcore.save(pipe.components, ...), peftcore.load(pipe.components, ...)"
        )
    return models


def owners(file: Path, models: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Return the models for which a file has a part, by the user's names.

    Raises:
        CheckpointError: a part belongs to none of the models, or to more than one.
    """
    folder = Folder.open(file)
    name = find_file(folder)
    if name is None:
        raise CheckpointError(
            f"'{file}' contains one adapter, but {len(models)} models were passed. Pass a single model: load(model, "
            "...)"
        )
    tensors, _ = folder.tensors(name)
    form, _ = _format_of(folder.path / name, tensors)
    parts = dict(form.split(tensors))
    models_with_parts: dict[str, nn.Module] = {}
    for model_name, model in models.items():
        for part in _parts_or_none(form, model, model_name):
            if part in parts:
                del parts[part]
                models_with_parts[model_name] = model
    if parts:
        description = _describe_parts({part: len(names) for part, names in parts.items()})
        raise CheckpointError(
            f"'{folder.path / name}' contains {description}, but no model for it was passed (passed: "
            f"{', '.join(models)}). Pass that model under its name in the pipeline, or load the other parts one by "
            "one: peftcore.load(model, ...)"
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
    """Write adapters to one file in the folder `path`, or to the file `path` itself.

    Args:
        format: name of the format.
        path: folder, or a file that ends in `.safetensors`.
        contents: (model, content) by the user's name of the model.

    Raises:
        CheckpointError: the file cannot be written, or parts of an existing file would be lost.
        PeftcoreError: the format cannot represent a model or a tensor.
    """
    form, method = formats()[format]
    parts: dict[str, tuple[nn.Module, Content]] = {}
    for model_name, (model, content) in contents.items():
        names = form.parts(model, model_name)
        if len(names) != 1:
            example = f"peftcore.save({{'{names[0]}': model}}, ..., format='{format}')"
            raise PeftcoreError(
                f"a {type(model).__name__} can be {' or '.join(map(repr, names))} of a pipeline. Pass it under its "
                f"name: {example}"
            )
        parts[names[0]] = model, content
    file = path if path.suffix == SUFFIX and not path.is_dir() else path / form.file
    _refuse_loss(file, path, parts)
    with guarded(method, f"format='{format}'", PeftcoreError):
        tensors, metadata = form.write(
            {part: (model, dict(content.tensors), dict(content.fields)) for part, (model, content) in parts.items()}
        )
    about = {part: {n: content.metadata[n] for n in _METADATA_KEYS} for part, (_, content) in parts.items()}
    write_file(file, to_bytes(tensors, {"format": "pt", **metadata, PARTS: json.dumps(about)}))


def _refuse_loss(file: Path, path: Path, parts: Mapping[str, Any]) -> None:
    """Raise a CheckpointError if parts of other models would be lost, or `path` has an adapter in another format."""
    existing = next((name for name in (CONFIG, TENSORS) if path != file and os.path.lexists(path / name)), None)
    if existing is not None:
        raise CheckpointError(f"'{path}' contains an adapter in another format ('{existing}'). Save to another folder")
    if not os.path.lexists(file):
        return
    try:
        names, _ = Folder.open(file).tensors(file.name)
        existing_parts = _format_of(file, names)[0].split(names)
    except CheckpointError as error:
        raise CheckpointError(
            f"the existing file '{file}' is not in a known format: {error}. Save elsewhere, or delete the file"
        ) from error
    lost_parts = {part: len(names) for part, names in existing_parts.items() if part not in parts}
    if lost_parts:
        raise CheckpointError(
            f"'{file}' also contains {_describe_parts(lost_parts)}, which this save would delete. Save all models "
            "together (peftcore.save(pipe.components, ...)), save elsewhere, or delete the file"
        )


def _format_of(source: Path, tensors: Mapping[str, Tensor]) -> tuple[FileFormat, Method]:
    known_formats = formats()
    matching = {name: entry for name, entry in known_formats.items() if entry[0].matches(tensors.keys())}
    if len(matching) != 1:
        names = ", ".join(f"'{name}'" for name in list(tensors)[:3]) or "none"
        problem = "is not in a known format"
        if matching:
            problem = f"matches several formats: {', '.join(matching)}"
        raise CheckpointError(
            f"'{source}' {problem} (known formats: {', '.join(known_formats) or 'none'}). Its tensors: {names}, ..."
        )
    return next(iter(matching.values()))


def _part_problem(
    model: nn.Module, parts_of_model: Sequence[str], matching: list[str], parts: Mapping[str, Collection[str]]
) -> str:
    if matching:
        example = f"peftcore.load({{'{matching[0]}': model}}, ...)"
        return (
            f"it contains {' and '.join(matching)}, and a {type(model).__name__} can be either. Choose one: {example}"
        )
    description = _describe_parts({part: len(names) for part, names in parts.items()})
    return f"it contains {description}, but no part for a {type(model).__name__} ({' or '.join(parts_of_model)})"


def _describe_parts(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{part or 'no part'} ({count} tensors)" for part, count in parts.items())
