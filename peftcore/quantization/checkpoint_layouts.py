"""Checkpoints that other tools stored in 4 bits: which layout a config describes, and empty models of it."""

from __future__ import annotations

import copy
import importlib.util
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.model.targets import matches, sizes
from peftcore.model.targets.patterns import compiled, limited
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.plugin.checkpoints import CheckpointFormat, CheckpointLayout
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import parse_json, read_bytes
from peftcore.plugin.validation import shown
from peftcore.quantization.convert import convert
from peftcore.quantization.packed_experts import is_turned, pack_parameter
from peftcore.quantization.quant_types import check_reader
from peftcore.quantization.quantizable import selected, selected_experts

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELOPT = "hf_quant_config.json"  # file that ModelOpt writes next to, or in older versions instead of, the config


def find_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout | None:
    """Return the layout that a model's `quantization_config` describes; None if no plugin's format does.

    Raises:
        PeftcoreError: the package that reads such checkpoints is not installed, or the layout is not read.
    """
    check_reader(config, where)
    formats = registry.offered("peftcore_checkpoint_formats", CheckpointFormat)
    offered_format = formats.get(str(config.get("quant_method")))
    if offered_format is None:
        return None
    plugin, of_plugin = offered_format
    with registry.naming(plugin, "layout"):
        return of_plugin.layout(config, where)


def described(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a transformers config, or that of ModelOpt's file in the model's folder."""
    stored = getattr(config, "quantization_config", None)
    file = Path(str(getattr(config, "_name_or_path", "") or "?")) / MODELOPT
    if stored is not None or not file.is_file():
        return stored if isinstance(stored, Mapping) else None
    content = parse_json(read_bytes(file), file)
    details = content.get("quantization") if isinstance(content, Mapping) else None
    if not isinstance(details, Mapping):
        raise PeftcoreError(f"'{file}' must have an object 'quantization', found {shown(content)}")
    cache = details.get("kv_cache_quant_algo")
    return {**details, "quant_method": "modelopt", "kv_cache_scheme": cache}


def layout_of(config: PretrainedConfig) -> CheckpointLayout | None:
    """Return the layout of a transformers config's checkpoint; None if it is dense, or no plugin's format.

    Raises:
        PeftcoreError: the layout is not read, or by a package that is not installed.
    """
    stored = described(config)
    if stored is None:
        return None
    try:
        return find_layout(stored, str(getattr(config, "_name_or_path", "")))
    except PeftcoreError:
        is_compressed = stored.get("quant_method") == "compressed-tensors"
        if is_compressed and importlib.util.find_spec("compressed_tensors") is not None:
            return None  # transformers loads it with that library
        raise


def is_packed(config: Any) -> bool:
    """Return whether a transformers config is that of a checkpoint in 4 bits whose bits `quantization.load` keeps.

    Raises:
        PeftcoreError: the checkpoint is in a format that is not read, or by a package that is not installed.
    """
    return layout_of(config) is not None


def built_empty(config: Any, build: Callable[[Any], nn.Module]) -> nn.Module:
    """Return a model on the meta device, with layers in 4 bits where the checkpoint of its config has them.

    Args:
        config: a transformers config.
        build: (config) -> model, such as `AutoModelForCausalLM.from_config`; the config it gets is that of the dense
            model.

    Raises:
        PeftcoreError: as in `is_packed`, or by `build`.
    """
    layout = layout_of(config)
    with torch.device("meta"):
        model = build(config if layout is None else without_quantization(config))
    if layout is not None:
        pack_empty(model, layout)
    return model


def without_quantization(config: PretrainedConfig) -> PretrainedConfig:
    """Return a copy of a transformers config that describes the dense model."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""  # the folder may have ModelOpt's file
    return config


@limited()
def pack_empty(model: nn.Module, layout: CheckpointLayout) -> None:
    """Give a dense model on the meta device layers and experts in 4 bits, changed in place."""
    stay_dense = [_naming(pattern) for pattern in layout.dense]

    def is_packed(path: str) -> bool:
        return not any(names(path) for names in stay_dense)

    with torch.device("meta"):
        for path, layer in selected(model, None).items():
            if is_packed(path):
                columns, rows = sizes(layer)
                weight: Any = layer.weight
                convert(layer, layout.empty((rows, columns), weight.dtype, path), None)
        for path, names in selected_experts(model, None, MIN_BLOCKSIZE).items():
            module = model.get_submodule(path)
            if is_turned(module, layout.quant_type) or not is_packed(path):
                continue
            for name in names:
                parameter = module.get_parameter(name)
                packed = layout.empty(tuple(parameter.shape), parameter.dtype, f"{path}.{name}")
                pack_parameter(module, name, packed, None)


def _naming(pattern: str) -> Callable[[str], bool]:
    """Return a function that tests whether a name in a `quantization_config` means the layer at a path.

    Names are parts of a path, regular expressions after `re:`, or have asterisks.
    """
    if "*" in pattern and not pattern.startswith("re:"):
        anything = re.escape(pattern).replace(r"\*", ".*")
        return compiled(rf"{anything}(?:\..*)?", "ignore")
    if pattern.startswith("re:"):
        return compiled(f"(?:{pattern[3:]}).*", "ignore")
    return lambda path: matches(pattern, path) or pattern in path
