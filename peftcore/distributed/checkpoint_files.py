"""Lazy access to the tensors of a checkpoint by their names in the model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn
from transformers import core_model_loading as loading
from transformers.conversion_mapping import get_model_conversion_mapping

from peftcore.errors import CheckpointError
from peftcore.model.base_modules import base_parameters
from peftcore.model.experts.conversion import expert_of, is_by_expert
from peftcore.quantization.formats import PARTS

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"


class CheckpointFiles:
    """The tensors of a checkpoint, looked up by their names in the model.

    Args:
        keys: {name of a tensor in the model: its name in the files}. experts: {name of a parameter that stacks experts:
            (transformers' conversion that stacks them, {source pattern: names of the experts' tensors in the files, in
            order})}.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.files = folder, _files(folder)
        self.keys = {name: name for name in self.files}
        self.experts: dict[str, tuple[Any, dict[str, list[str]]]] = {}
        self._archives: dict[str, Any] = {}
        self._stack = ExitStack()

    def rename(self, model: nn.Module) -> None:
        """Map the names in the files to the model's names, with transformers' conversions for this class of model."""
        if not hasattr(model, "base_model_prefix"):
            return
        names = {name for name, _ in (*base_parameters(model), *model.named_buffers())}
        renamings: list[loading.WeightRenaming] = []
        converters: list[loading.WeightConverter] = []
        for conversion in get_model_conversion_mapping(model):
            if isinstance(conversion, loading.WeightRenaming):
                renamings.append(conversion)
            elif isinstance(conversion, loading.WeightConverter) and is_by_expert(conversion):
                converters.append(conversion)
        by_pattern: dict[str, loading.WeightConverter] = {}
        for converter in converters:
            by_pattern.update(dict.fromkeys(converter.source_patterns, converter))
        self.keys = {}
        for key in sorted(self.files, key=loading.dot_natural_key):
            name = key if key in names else loading.rename_source_key(key, renamings, [])[0]
            target, pattern = (name, None) if name in names else loading.rename_source_key(name, [], converters)
            if pattern is None or target not in names:
                self.keys[name] = key
            else:
                lists = self.experts.setdefault(target, (by_pattern[pattern], {}))[1]
                lists.setdefault(pattern, []).append(key)

    def stored(self, key: str) -> Any:
        """Return a slice object for the stored tensor `key`; indexing it reads from the file."""
        file = self.files[key]
        if file not in self._archives:
            self._archives[file] = self._stack.enter_context(safe_open(self.folder / file, framework="pt"))
        return self._archives[file].get_slice(key)

    def parts(self, name: str) -> dict[str, Tensor]:
        """Return the tensors stored beside the bytes of a packed parameter, such as its scales."""
        keys = {part: self.keys[f"{name}.{part}"] for part in PARTS if f"{name}.{part}" in self.keys}
        return {part: self.stored(key)[...] for part, key in keys.items()}

    def by_expert(self, model: nn.Module, name: str, start: int, stop: int) -> Iterator[Tensor]:
        """Yield the tensors of the experts [start, stop) of a parameter."""
        converter, lists = self.experts[name]
        for i in range(start, stop):
            yield expert_of(converter, {p: self.stored(keys[i])[...] for p, keys in lists.items()}, name, model)

    def close(self) -> None:
        self._archives.clear()
        self._stack.close()


def _files(folder: Path) -> dict[str, str]:
    """Return {name of a tensor: name of its file} for a checkpoint."""
    if (folder / _INDEX).is_file():
        files = json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"]
        for file in sorted(set(files.values())):
            if not (folder / file).is_file():
                raise CheckpointError(
                    f"'{folder}' is incomplete: its index lists '{file}', which is missing. Copy or download the "
                    "file again"
                )
        return files
    if not (folder / _SINGLE).is_file():
        raise CheckpointError(
            f"'{folder}' contains neither {_SINGLE} nor {_INDEX}. Pass a local folder with safetensors files"
        )
    with safe_open(folder / _SINGLE, framework="pt") as archive:
        return dict.fromkeys(archive.keys(), _SINGLE)
