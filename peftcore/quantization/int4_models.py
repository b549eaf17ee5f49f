"""Models whose config says that a checkpoint of GPTQ, AWQ or compressed-tensors has their weights in int4."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.quantization.convert import convert
from peftcore.quantization.int4_layouts import CheckpointLayout, Int4Weight, int4_layout, to_affine4
from peftcore.quantization.nvfp4_layouts import empty_nvfp4, nvfp4_layout
from peftcore.quantization.packed_experts import is_turned, pack_parameter
from peftcore.quantization.quantizable import selected, selected_experts
from peftcore.targets import matches, sizes
from peftcore.targets.patterns import compiled, limited


def int4_config(config: Any) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a transformers config if `quantization.load` reads such checkpoints.

    Raises:
        PeftcoreError: it describes a layout that nothing here reads.
    """
    stored = getattr(config, "quantization_config", None)
    if not isinstance(stored, Mapping):
        return None
    try:
        return stored if find_layout(stored, str(getattr(config, "_name_or_path", ""))) is not None else None
    except PeftcoreError:
        method = stored["quant_method"]
        if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is not None:
            return None  # transformers loads it with that library
        raise


def without_quantization(config: Any) -> Any:
    """Return a copy of a transformers config that describes the dense model."""
    config = copy.deepcopy(config)
    del config.quantization_config
    return config


@limited()
def pack_empty(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give a dense model on the meta device int4 layers and experts, as its `quantization_config` says.

    Args:
        model: the model, changed in place.
        stored: the `quantization_config`, which `find_layout` knows.
    """
    scheme, is_symmetric = stored, stored["quant_method"] == "gptq" and stored.get("sym", True)
    if stored["quant_method"] == "compressed-tensors":
        scheme = next(iter(stored["config_groups"].values()))["weights"]
        is_symmetric = scheme.get("symmetric", True)
    is_ordered = stored.get("desc_act", False) or scheme.get("actorder") in ("group", "dynamic")
    ignored = [*(stored.get("ignore") or ()), *(stored.get("modules_to_not_convert") or ())]
    stay_dense = [_naming(pattern) for pattern in ignored]

    def empty(rows: int, columns: int, dtype: torch.dtype, path: str) -> PackedWeight:
        group = scheme.get("group_size") or -1
        group = columns if group == -1 or columns % group else group
        zeros = None if is_symmetric else torch.empty(rows, columns // group, dtype=torch.uint8)
        order = torch.empty(columns, dtype=torch.int64) if is_ordered else None
        scales = torch.empty(rows, columns // group, dtype=torch.float16)
        codes = torch.empty(rows * columns // 2, 1, dtype=torch.uint8)
        return to_affine4(Int4Weight(codes, scales, zeros, (rows, columns), group, order), dtype, path)

    def is_int4(path: str) -> bool:
        return not any(names(path) for names in stay_dense)

    with torch.device("meta"):
        for path, layer in selected(model, None).items():
            if is_int4(path):
                columns, rows = sizes(layer)
                weight: Any = layer.weight
                convert(layer, empty(rows, columns, weight.dtype, path), None)
        for path, names in selected_experts(model, None, MIN_BLOCKSIZE).items():
            module = model.get_submodule(path)
            if is_turned(module, "affine4") or not is_int4(path):
                continue
            for name in names:
                parameter = module.get_parameter(name)
                count, rows, columns = parameter.shape
                packed = empty(count * rows, columns, parameter.dtype, f"{path}.{name}")
                packed = packed._replace(shape=(count, rows, columns), permutation=None)
                pack_parameter(module, name, packed, None)


def _naming(pattern: str) -> Callable[[str], bool]:
    """Return what tests whether a name in a `quantization_config`, a part of a path or `re:...`, means a layer."""
    if pattern.startswith("re:"):
        return compiled(f"(?:{pattern[3:]}).*", "ignore")
    return lambda path: matches(pattern, path) or pattern in path
