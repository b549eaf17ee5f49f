"""One file, without a config beside it, for one model or several at once: its format, and which part is whose.

Such files are for exchange: they hold what an adapter computes, the fingerprint of its base, and nothing for training.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from peftcore import adapter_files
from peftcore.adapter_files import CONFIG, TENSORS, Content, Folder
from peftcore.adapter_files.content import parse_json
from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.method import FileFormat, Method
from peftcore.peft_fields import guarded
from peftcore.registry import registry

PARTS = "peftcore_parts"  # in a file's metadata: {part: what a folder's tensors would say of themselves}
KEPT = ("peftcore_base",)  # of that; the rest is of training, or would be wrong once another tool has changed the file
ENDING = ".safetensors"


def formats() -> dict[str, tuple[FileFormat, Method]]:
    """Those that installed methods have, by the names by which `save` knows them, each with one method that has it.

    Of several methods with the same format that is the method without a flag.
    """
    methods = registry.methods().values()
    found: dict[str, tuple[FileFormat, Method]] = {}
    for method in [m for m in methods if m.state.flag is None] + [m for m in methods if m.state.flag is not None]:
        for name, form in method.state.files.items() if method.recorded_as is None else ():
            found.setdefault(name, (form, method))
    return found


def file_names() -> list[str]:
    """The names under which files of these formats lie in folders."""
    return sorted({form.file for form, _ in formats().values()})


def named_in(opened: Folder) -> str | None:
    """The name of the single file that is meant: that was asked for, or is a known one in a folder without another.

    Raises:
        CheckpointError: a folder holds an adapter beside it, which may be another.
    """
    if opened.only is not None:
        return opened.only
    there = [name for name in file_names() if opened.holds(name)]
    if there and (opened.holds(CONFIG) or opened.holds(TENSORS)):
        raise CheckpointError(
            f"'{opened.path}' holds two adapters, '{TENSORS}' and '{there[0]}', which may differ. Say which: give the "
            f"file itself, '{opened.path / there[0]}', or move it into a folder of its own"
        )
    return there[0] if there else None


def read(
    opened: Folder, file: str, model: nn.Module, called: str | None
) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, str]]:
    """(tensors, fields, metadata) of the part of `model`, as a folder in PEFT's layout holds them.

    Args:
        called: what the user calls the model; None: nothing, and a warning says what is left for others.

    Raises:
        CheckpointError: the file cannot be read, or holds no such part, or several.
    """
    where = opened.path / file
    if file in (CONFIG, TENSORS):
        raise CheckpointError(f"'{where}' is one of an adapter's files. Give the folder: '{opened.path}'")
    tensors, metadata = opened.tensors(file)
    form, method = _format_of(where, tensors)
    with guarded(method, f"'{where}'"):
        try:
            parts = form.split(tensors)
            wanted = [""] if parts.keys() == {""} else form.parts(model, called)
            there = [part for part in wanted if part in parts]
            if len(there) != 1:
                raise CheckpointError(_not_one(model, wanted, there, parts))
            found, fields = form.read(model, there[0], parts[there[0]], metadata)
        except PeftcoreError as error:
            raise CheckpointError(f"'{where}' cannot be read: {error}") from error
    left = {part: len(names) for part, names in parts.items() if part not in there}
    if left and called is None:
        warnings.warn(
            f"'{where}' also holds {_counted(left)}, left for other models: peftcore.load(them, ...), or all at once: "
            "peftcore.load(pipe.components, ...)",
            stacklevel=2,
        )
    own = parse_json(metadata.get(PARTS, "{}").encode(errors="surrogatepass"), f"{where}: {PARTS}")
    about = own.get(there[0], {}) if isinstance(own, dict) else {}
    return found, fields, {name: about[name] for name in KEPT if isinstance(about, dict) and name in about}


def contents(path: Path) -> tuple[str, dict[str, dict[str, Tensor]]] | None:
    """(name of the format, {part: its tensors}) of a single file, or of its folder; None of any other folder.

    Raises:
        CheckpointError: it cannot be read.
    """
    opened = Folder.opened(path)
    file = named_in(opened)
    if file is None:
        return None
    tensors, _ = opened.tensors(file)
    form, _ = _format_of(path, tensors)
    return next(name for name, (each, _) in formats().items() if each is form), dict(form.split(tensors))


def by_name(models: Any) -> Mapping[str, Any]:
    """Models by their names. Raises a PeftcoreError for anything else."""
    if not isinstance(models, Mapping):
        raise PeftcoreError(
            f"found a {type(models).__name__}, where a model belongs, or models by name: of a pipeline its components, "
            "peftcore.save(pipe.components, ...), peftcore.load(pipe.components, ...)"
        )
    return models


def owners(file: Path, models: Mapping[str, Any]) -> dict[str, nn.Module]:
    """Those of the models of a pipeline that a file has a part for, by what the user calls them.

    Raises:
        CheckpointError: a part has none, or none that can be told.
    """
    opened = Folder.opened(file)
    name = named_in(opened)
    if name is None:
        raise CheckpointError(
            f"'{file}' holds one adapter, and {len(models)} models are given. Give one: load(model, ...)"
        )
    tensors, _ = opened.tensors(name)
    form, _ = _format_of(opened.path / name, tensors)
    parts = dict(form.split(tensors))
    found: dict[str, nn.Module] = {}
    for called, model in models.items():
        for part in _parts_or_none(form, model, called):
            if part in parts:
                del parts[part]
                found[called] = model
    if parts:
        what = _counted({part: len(names) for part, names in parts.items()})
        raise CheckpointError(
            f"'{opened.path / name}' holds {what}, for which no model is given (found: {', '.join(models)}). Give it, "
            "by its name in the pipeline, or load the others one by one: peftcore.load(model, ...)"
        )
    return found


def _parts_or_none(form: FileFormat, model: Any, called: str) -> list[str]:
    if not isinstance(model, nn.Module):
        return []
    try:
        return list(form.parts(model, called))
    except PeftcoreError:
        return []


def write(format: str, path: Path, contents: Mapping[str | None, tuple[nn.Module, Content]]) -> None:
    """Write adapters to one file in `path`, or to the file `path` itself, by what the user calls their models.

    Raises:
        CheckpointError: it cannot be written, or would take the place of what it does not hold.
        PeftcoreError: a model, or a tensor, has no place in the format.
    """
    form, method = formats()[format]
    parts: dict[str, tuple[nn.Module, Content]] = {}
    for called, (model, content) in contents.items():
        names = form.parts(model, called)
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
    about = {part: {n: content.metadata[n] for n in KEPT} for part, (_, content) in parts.items()}
    adapter_files.write_file(file, tensors, {**metadata, PARTS: json.dumps(about)})


def _refuse_loss(file: Path, path: Path, parts: Mapping[str, Any]) -> None:
    """Raise a CheckpointError where parts of other models would be lost, or two adapters lie in one folder."""
    beside = next((name for name in (CONFIG, TENSORS) if path != file and os.path.lexists(path / name)), None)
    if beside is not None:
        raise CheckpointError(f"'{path}' holds an adapter in another format ('{beside}'). Save to another folder")
    if not os.path.lexists(file):
        return
    try:
        names, _ = Folder.opened(file).tensors(file.name)
        there = _format_of(file, names)[0].split(names)
    except CheckpointError as error:
        raise CheckpointError(
            f"what lies at '{file}' is not known here: {error}. Save elsewhere, or delete it"
        ) from error
    lost = {part: len(names) for part, names in there.items() if part not in parts}
    if lost:
        raise CheckpointError(
            f"'{file}' holds {_counted(lost)}, too, which this would overwrite. Save the models together: "
            "peftcore.save(pipe.components, ...); or elsewhere, or delete the file"
        )


def _format_of(where: Path, tensors: Mapping[str, Tensor]) -> tuple[FileFormat, Method]:
    known = formats()
    found = {name: each for name, each in known.items() if each[0].matches(tensors.keys())}
    if len(found) != 1:
        names = ", ".join(f"'{name}'" for name in list(tensors)[:3]) or "none"
        what = f"may be in any of these formats: {', '.join(found)}" if found else "is in no format that is known"
        raise CheckpointError(f"'{where}' {what} (known: {', '.join(known) or 'none'}). Its tensors: {names}, ...")
    return next(iter(found.values()))


def _not_one(model: nn.Module, wanted: Any, there: list[str], parts: Mapping[str, Any]) -> str:
    if there:
        example = f"peftcore.load({{'{there[0]}': model}}, ...)"
        return f"it holds {' and '.join(there)}, and a {type(model).__name__} may be either. Say which: {example}"
    counted = _counted({part: len(names) for part, names in parts.items()})
    return f"it holds {counted}, and nothing for a {type(model).__name__} ({' or '.join(wanted)})"


def _counted(parts: Mapping[str, int]) -> str:
    return ", ".join(f"{part or 'no part'} ({count} tensors)" for part, count in parts.items())
