"""Models whose config says that GPTQ, AWQ, compressed-tensors or ModelOpt stored their weights in 4 bits."""

from __future__ import annotations

import copy
import importlib.util
import math
import re
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.ops import PackedWeight
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.quantization.affine4_format import Int4Weight, to_affine4
from peftcore.quantization.convert import convert
from peftcore.quantization.int4_layouts import CheckpointLayout, groups_of, int4_layout
from peftcore.quantization.nvfp4_layouts import described, empty_nvfp4, nvfp4_layout
from peftcore.quantization.packed_experts import is_turned, pack_parameter
from peftcore.quantization.quant_types import check_reader
from peftcore.quantization.quantizable import selected, selected_experts
from peftcore.targets import matches, sizes
from peftcore.targets.patterns import compiled, limited


def find_layout(config: Mapping[str, Any], where: str) -> CheckpointLayout | None:
    """Return the layout that a model's `quantization_config` describes; None if another kind of format does.

    Raises:
        PeftcoreError: GPTQ, AWQ, compressed-tensors or ModelOpt wrote it, in a layout that is not read.
    """
    return nvfp4_layout(config, where) or int4_layout(config, where)


def int4_config(config: Any) -> Mapping[str, Any] | None:
    """Return the `quantization_config` of a transformers config if `quantization.load` reads such checkpoints.

    Raises:
        PeftcoreError: it describes a layout that nothing here reads, or that a package reads which is not installed.
    """
    stored = described(config)
    if stored is None:
        return None
    where = str(getattr(config, "_name_or_path", ""))
    check_reader(stored, where)
    try:
        return stored if find_layout(stored, where) is not None else None
    except PeftcoreError:
        method = stored["quant_method"]
        if method == "compressed-tensors" and importlib.util.find_spec("compressed_tensors") is not None:
            return None  # transformers loads it with that library
        raise


def without_quantization(config: Any) -> Any:
    """Return a copy of a transformers config that describes the dense model."""
    config = copy.deepcopy(config)
    config.__dict__.pop("quantization_config", None)
    config._name_or_path = ""  # the folder may have ModelOpt's file
    return config


class _Scheme(NamedTuple):
    """How a `quantization_config` stores the layers of a model.

    Args:
        group: number of inputs in a group; -1: one group in each row.
        has_zeros: groups have zero points.
        is_ordered: columns are in an order of their own (act-order).
    """

    group: int
    has_zeros: bool
    is_ordered: bool

    @classmethod
    def of(cls, stored: Mapping[str, Any]) -> _Scheme:
        method, weights, symmetric = stored["quant_method"], stored, False
        if method == "compressed-tensors":
            _, weights = next(iter(groups_of(stored, "").values()), ({}, {}))
        if method in ("compressed-tensors", "gptq"):
            symmetric = weights.get("symmetric" if method == "compressed-tensors" else "sym", True)
        is_ordered = stored.get("desc_act", False) or weights.get("actorder") in ("group", "dynamic")
        return cls(weights.get("group_size", weights.get("q_group_size")) or -1, not symmetric, is_ordered)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype, path: str) -> PackedWeight:
        """Return an int4 weight without values."""
        rows, columns = math.prod(shape[:-1]), shape[-1]
        group = columns if self.group == -1 or columns % self.group else self.group
        zeros = torch.empty(rows, columns // group, dtype=torch.uint8) if self.has_zeros else None
        order = torch.empty(columns, dtype=torch.int64) if self.is_ordered and len(shape) == 2 else None
        scales = torch.empty(rows, columns // group, dtype=torch.float16)
        codes = torch.empty(rows * columns // 2, 1, dtype=torch.uint8)
        packed = to_affine4(Int4Weight(codes, scales, zeros, (rows, columns), group, order), dtype, path)
        return packed._replace(shape=shape)


@limited()
def pack_empty(model: nn.Module, stored: Mapping[str, Any]) -> None:
    """Give a dense model on the meta device layers and experts in 4 bits, as its `quantization_config` says.

    Args:
        model: the model, changed in place.
        stored: the `quantization_config`, which `find_layout` knows.
    """
    layout, scheme = find_layout(stored, ""), _Scheme.of(stored)
    assert layout is not None
    lists = (stored.get(name) or () for name in ("ignore", "modules_to_not_convert", "exclude_modules"))
    stay_dense = [_naming(pattern) for patterns in lists for pattern in patterns]
    empty = empty_nvfp4 if layout.quant_type == "nvfp4" else scheme.empty

    def is_packed(path: str) -> bool:
        return not any(names(path) for names in stay_dense)

    with torch.device("meta"):
        for path, layer in selected(model, None).items():
            if is_packed(path):
                columns, rows = sizes(layer)
                weight: Any = layer.weight
                convert(layer, empty((rows, columns), weight.dtype, path), None)
        for path, names in selected_experts(model, None, MIN_BLOCKSIZE).items():
            module = model.get_submodule(path)
            if is_turned(module, layout.quant_type) or not is_packed(path):
                continue
            for name in names:
                parameter = module.get_parameter(name)
                packed = empty(tuple(parameter.shape), parameter.dtype, f"{path}.{name}")
                pack_parameter(module, name, packed, None)


def _naming(pattern: str) -> Callable[[str], bool]:
    """Return a function that tests whether a name in a `quantization_config` means the layer at a path.

    Names are parts of a path, regular expressions after `re:`, or have ModelOpt's asterisks.
    """
    if "*" in pattern and not pattern.startswith("re:"):
        anything = re.escape(pattern).replace(r"\*", ".*")
        return compiled(rf"{anything}(?:\..*)?", "ignore")
    if pattern.startswith("re:"):
        return compiled(f"(?:{pattern[3:]}).*", "ignore")
    return lambda path: matches(pattern, path) or pattern in path
