"""4-bit checkpoints from other tools: find the layout that a config describes, and build empty models in it."""

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
from peftcore.model.targets.patterns import compile_pattern, limit_matching_time
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.plugin.checkpoints import CheckpointFormat, CheckpointLayout
from peftcore.plugin.registry import registry
from peftcore.plugin.safe_reading import parse_json, read_bytes
from peftcore.plugin.validation import shown
from peftcore.quantization.convert import convert
from peftcore.quantization.packed_experts import pack_parameter, packs_transpose
from peftcore.quantization.quant_types import find_reader_package
from peftcore.quantization.quantizable import select_experts, select_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MODELOPT = "hf_quant_config.json"  # ModelOpt's file; older versions write it instead of `quantization_config`


def find_layout(config: Mapping[str, Any], checkpoint: str) -> CheckpointLayout | None:
    """Return the layout that a `quantization_config` describes; None if no plugin handles its `quant_method`.

    Raises:
        PeftcoreError: the package that reads such checkpoints is not installed, or it does not support the layout.
    """
    find_reader_package(config, checkpoint)
    formats = registry.offered("peftcore_checkpoint_formats", CheckpointFormat)
    entry = formats.get(str(config.get("quant_method")))
    if entry is None:
        return None
    plugin, checkpoint_format = entry
    with registry.naming(plugin, "layout"):
        return checkpoint_format.layout(config, checkpoint)


def find_quantization_config(config: PretrainedConfig) -> Mapping[str, Any] | None:
    """Return a model's `quantization_config`, from its config or from ModelOpt's file in its folder."""
    quantization_config = getattr(config, "quantization_config", None)
    file = Path(str(getattr(config, "_name_or_path", "") or "?")) / MODELOPT
    if quantization_config is not None or not file.is_file():
        return quantization_config if isinstance(quantization_config, Mapping) else None
    content = parse_json(read_bytes(file), file)
    details = content.get("quantization") if isinstance(content, Mapping) else None
    if not isinstance(details, Mapping):
        raise PeftcoreError(f"'{file}' must have an object 'quantization', found {shown(content)}")
    cache_algorithm = details.get("kv_cache_quant_algo")
    return {**details, "quant_method": "modelopt", "kv_cache_scheme": cache_algorithm}


def layout_of(config: PretrainedConfig) -> CheckpointLayout | None:
    """Return the layout of a transformers config's checkpoint, or None if it is dense or no plugin handles it.

    Raises:
        PeftcoreError: the layout is not supported, or only by a package that is not installed.
    """
    quantization_config = find_quantization_config(config)
    if quantization_config is None:
        return None
    try:
        return find_layout(quantization_config, str(getattr(config, "_name_or_path", "")))
    except PeftcoreError:
        is_compressed = quantization_config.get("quant_method") == "compressed-tensors"
        if is_compressed and importlib.util.find_spec("compressed_tensors") is not None:
            return None  # transformers loads it with that library
        raise


def is_packed(config: Any) -> bool:
    """Return whether a transformers config belongs to a 4-bit checkpoint whose bits `quantization.load` keeps.

    Raises:
        PeftcoreError: the format is not supported, or only by a package that is not installed.
    """
    return layout_of(config) is not None


def build_empty(config: Any, build: Callable[[Any], nn.Module]) -> nn.Module:
    """Build a model on the meta device, with 4-bit layers where its checkpoint has them.

    Args:
        config: a transformers config.
        build: (config) -> model, such as `AutoModelForCausalLM.from_config`. It is called with a copy of `config`
            without the quantization.

    Raises:
        PeftcoreError: as in `is_packed`.
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
    config._name_or_path = ""  # otherwise `find_quantization_config` would find ModelOpt's file in the folder
    return config


@limit_matching_time()
def pack_empty(model: nn.Module, layout: CheckpointLayout) -> None:
    """Replace layers and experts of a dense model on the meta device by 4-bit ones, in place."""
    stay_dense = [_path_matcher(pattern) for pattern in layout.dense]

    def is_packed(path: str) -> bool:
        return not any(names(path) for names in stay_dense)

    with torch.device("meta"):
        for path, layer in select_layers(model, None).items():
            if is_packed(path):
                columns, rows = sizes(layer)
                weight: Any = layer.weight
                convert(layer, layout.empty((rows, columns), weight.dtype, path), None)
        for path, names in select_experts(model, None, MIN_BLOCKSIZE).items():
            module = model.get_submodule(path)
            if packs_transpose(module, layout.quant_type) or not is_packed(path):
                continue
            for name in names:
                parameter = module.get_parameter(name)
                packed = layout.empty(tuple(parameter.shape), parameter.dtype, f"{path}.{name}")
                pack_parameter(module, name, packed, None)


def _path_matcher(pattern: str) -> Callable[[str], bool]:
    """Return a function that tests whether a pattern of a `quantization_config` matches a path.

    A pattern is part of a path, a wildcard with asterisks, or a regular expression after `re:`.
    """
    if "*" in pattern and not pattern.startswith("re:"):
        anything = re.escape(pattern).replace(r"\*", ".*")
        return compile_pattern(rf"{anything}(?:\..*)?", "ignore")
    if pattern.startswith("re:"):
        return compile_pattern(f"(?:{pattern[3:]}).*", "ignore")
    return lambda path: matches(pattern, path) or pattern in path
