"""`inspect`: describe an adapter from its files alone, without the base model."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import CheckpointError, PeftcoreError
from peftcore.files import reading, single_file
from peftcore.files.folder import Folder, read_folder
from peftcore.files.hub import folder_of
from peftcore.files.metadata import BASE, PARTS, VERSION, own_fields
from peftcore.model.targets import pattern_value
from peftcore.plugin.peft_fields import config_of_fields, with_own
from peftcore.plugin.peft_keys import PREFIX
from peftcore.plugin.safe_reading import CONFIG, TENSORS, parse_json

_FIELDS_WITH_ROWS = {"peft_type", "task_type", "base_model_name_or_path", "peft_version", "inference_mode"}


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter on disk.

    Args:
        path: folder or file of the adapter; for a hub id, the folder in the hub's cache.
        format: "peft", or the name of another library's format or of a single-file format.
        peft_type: PEFT's name of the method, in capitals.
        method: name of the installed method that reads the adapter, or None.
        problem: the error that `load` would raise, as far as it can be known without the base, or None.
        base: hub id or path of the base, if the files contain it.
        task_type: PEFT's name of the task, such as "CAUSAL_LM", if the files contain it.
        fields: fields of the config by PEFT's names, and fields that only peftcore has.
        writer: program that wrote the files, such as "PEFT 0.20.0", if they contain it.
        base_is_checked: whether the files have a fingerprint of the base, with which `load` compares the model.
        parts: tensors by name, for each model in a single file. A folder has one part, "". The tensors are on the meta
            device.
    """

    path: Path
    format: str
    peft_type: str
    method: str | None
    problem: PeftcoreError | None
    base: str | None
    task_type: str | None
    fields: dict[str, Any]
    writer: str | None
    base_is_checked: bool
    parts: dict[str, dict[str, Tensor]]

    @property
    def tensors(self) -> list[Tensor]:
        """Return the tensors of all parts, on the meta device."""
        return list(chain.from_iterable(tensors.values() for tensors in self.parts.values()))

    @property
    def parameters(self) -> int:
        """Return the number of values in the tensors."""
        return sum(tensor.numel() for tensor in self.tensors)

    @property
    def bytes(self) -> int:
        """Return the size of the tensors in bytes."""
        return sum(tensor.nbytes for tensor in self.tensors)

    def rows(self) -> list[tuple[str, str]]:
        """Return (label, text) pairs, as `print` shows them."""
        if list(self.parts) != [""]:
            parts = ((part or "of one model", _sizes(list(tensors.values()))) for part, tensors in self.parts.items())
            return [("layout", self.format), *parts]
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in self.tensors})
        rows = [("peft_type", self.peft_type), ("method", self.method or str(self.problem))]
        if self.problem is not None and self.method is not None:
            rows.append(("cannot be loaded", str(self.problem)))
        rows += [
            ("task", self.task_type or "-"),
            ("base", self.base or "-"),
            ("base is checked on load", "yes" if self.base_is_checked else "no (the file has no fingerprint)"),
            ("written by", self.writer or "-"),
            ("tensors", f"{len(self.tensors):,}, {', '.join(dtypes)}"),
            ("parameters", f"{self.parameters:,}"),
            ("size", f"{self.bytes / 1e6:.1f} MB" if self.bytes >= 1e6 else f"{self.bytes / 1e3:.1f} kB"),
            *_experts(self.fields, self.parts[""]),
        ]
        return [*rows, *_set_fields(self.fields)]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:{width}}  {text}" for label, text in rows)


def _set_fields(fields: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return rows for the remaining fields that are set."""
    rows: list[tuple[str, str]] = []
    for name, value in sorted(fields.items()):
        if name not in _FIELDS_WITH_ROWS and value not in (None, False, "", [], {}):
            rows.append((f"  {name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)))
    return rows


def inspect(path: str | os.PathLike[str], *, method: str | None = None, revision: str | None = None) -> AdapterInfo:
    """Return facts about an adapter from its files alone, without the base model.

    Args:
        path: folder or single file of an adapter in any format that `load` reads, or a Hugging Face Hub id.
        method: the installed method that reads the adapter. Only needed if several methods can read it.
        revision: branch, tag or commit on the hub.

    Raises:
        CheckpointError: the files are missing or damaged, or do not contain an adapter.

    Examples:
        >>> info = peftcore.inspect("my-adapter")
        >>> info.method, info.parameters
    """

    def look(folder: Folder) -> AdapterInfo:
        file = single_file.find_file(folder)
        return _info_of_folder(folder, method) if file is None else _info_of_file(folder, file)

    return read_folder(folder_of(path, revision), look)


def _info_of_file(folder: Folder, file: str) -> AdapterInfo:
    content = single_file.read_parts(folder, file)
    metadata_of_parts = parse_json(
        content.metadata.get(PARTS, "{}").encode(errors="surrogatepass"), f"{folder.path / file}: {PARTS}"
    )
    metadata_of_parts = metadata_of_parts if isinstance(metadata_of_parts, dict) else {}
    return AdapterInfo(
        path=folder.path / file,
        format=content.format,
        peft_type=content.method.state.peft_type,
        method=content.method.name,
        problem=None,
        base=None,
        task_type=None,
        fields={},
        writer=_writer(content.metadata, {}),
        base_is_checked=any(isinstance(about, dict) and BASE in about for about in metadata_of_parts.values()),
        parts={part: _without_values(tensors) for part, tensors in content.tensors.items()},
    )


def _info_of_folder(folder: Folder, method_name: str | None) -> AdapterInfo:
    try:
        fields, foreign = reading.fields_and_format(folder, method_name)
    except CheckpointError:
        folder.tensors()  # `load` also reads the tensors first, so a folder without tensors raises the same error
        raise
    tensors, metadata = folder.tensors(foreign.tensors if foreign else TENSORS)
    own_field_values = own_fields(folder.path, metadata)
    problem: PeftcoreError | None = None
    name: str | None = None
    try:
        method = reading.method_of(folder, method_name)
        name = method.name
        if foreign is None:
            method_fields = with_own(f"'{folder.path / TENSORS}'", method, fields, own_field_values)
            config_of_fields(f"'{folder.path / CONFIG}'", method, method_fields)
    except PeftcoreError as error:
        problem = error
    return AdapterInfo(
        path=folder.path,
        format=foreign.name if foreign else "peft",
        peft_type=fields["peft_type"],
        method=name,
        problem=problem,
        base=_text(fields.get("base_model_name_or_path")),
        task_type=_text(fields.get("task_type")),
        fields={**own_field_values, **fields},
        writer=foreign.name if foreign else _writer(metadata, fields),
        base_is_checked=BASE in metadata,
        parts={"": _without_values(tensors)},
    )


def _text(value: Any) -> str | None:
    """Return `value` if it is non-empty text, else None; an untrusted file may have anything in a field."""
    return value if isinstance(value, str) and value else None


def _writer(metadata: Mapping[str, str], fields: Mapping[str, Any]) -> str | None:
    if VERSION in metadata:
        return f"peftcore {metadata[VERSION]}"
    return f"PEFT {fields['peft_version']}" if fields.get("peft_version") else None


def _without_values(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.empty_like(tensor, device="meta") for name, tensor in tensors.items()}


def _sizes(tensors: list[Tensor]) -> str:
    dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
    return f"{len(tensors):,} tensors, {', '.join(dtypes)}, {sum(tensor.numel() for tensor in tensors):,} parameters"


def _experts(fields: dict[str, Any], tensors: dict[str, Tensor]) -> list[tuple[str, str]]:
    """Return rows about adapted experts' parameters `[experts, out, in]`, whose A is `[experts · r, in]`."""
    targets = _parameters_by_module(fields.get("target_parameters"))
    counts: set[int] = set()
    modules: set[str] = set()
    parameters = 0
    for key, tensor in tensors.items():
        name_in_base = key.removeprefix(PREFIX).removesuffix(".weight").replace(".base_layer", "")
        path, _, factor = name_in_base.rpartition(".")
        names = _parameters_of(path, targets)
        if not names:
            continue
        modules.add(path)
        parameters += tensor.numel()
        ranks = {pattern_value(fields.get("rank_pattern"), f"{path}.{name}", fields.get("r")) for name in names}
        r = ranks.pop()
        if factor.endswith("_A") and not ranks and type(r) is int and r > 0:
            counts.add(tensor.shape[0] // r)
    if not modules or counts == {1}:
        return []
    of_experts = f" of {', '.join(map(str, sorted(counts)))} experts" if counts else ""
    share = 100 * parameters / sum(tensor.numel() for tensor in tensors.values())
    return [("experts", f"{len(modules)} modules{of_experts}, {parameters:,} of the parameters ({share:.3g} %)")]


def _parameters_by_module(target_parameters: object) -> dict[str, list[str]]:
    """Split the names in PEFT's `target_parameters` into {suffix of a module's path: parameter names}."""
    by_module: dict[str, list[str]] = {}
    for name in target_parameters if isinstance(target_parameters, list) else ():
        if isinstance(name, str):
            module, _, parameter = name.rpartition(".")
            by_module.setdefault(module, []).append(parameter)
    return by_module


def _parameters_of(path: str, by_module: Mapping[str, Sequence[str]]) -> list[str]:
    """Return the names of the module's parameters that are selected by a suffix of its path."""
    names: list[str] = []
    end = path
    while end:
        names += by_module.get(end, ())
        end = end.partition(".")[2]
    return names
