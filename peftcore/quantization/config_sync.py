"""Keep a transformers model's config and weight conversions consistent with its quantized layers."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.model.targets import is_linear
from peftcore.quantization.formats import FORMATS
from peftcore.quantization.four_bit_format import METHOD
from peftcore.quantization.parameters import PackedParameters
from peftcore.quantization.quantizable import expert_parameters

if TYPE_CHECKING:
    from transformers import PreTrainedModel
    from transformers.core_model_loading import WeightConverter, WeightRenaming

_CONVERSIONS = "_weight_conversions"  # transformers' attribute: how names on disk are converted to names in the model
_OWN_CONVERSIONS = "_peftcore_own_conversions"  # the conversions as they were before quantization


def packed_names(model: nn.Module) -> Iterator[tuple[str, PackedParameters, str]]:
    """Yield (path, module, name) of every 4-bit parameter."""
    for path, module in base_modules(model):
        if isinstance(module, PackedParameters):
            yield from ((path, module, name) for name in module.packings if module.packed_parameter(name) is not None)


def config_fields(model: nn.Module) -> dict[str, Any] | None:
    """Return the `quantization_config` for loading the model; None if the model is dense.

    The quantizer is bitsandbytes', or peftcore's if a weight is in a format that bitsandbytes cannot read.
    """
    packed = list(packed_names(model))
    if not packed:
        return None
    other_formats: list[tuple[PackedParameters, str]] = []  # weights in formats that bitsandbytes cannot read
    for _, module, name in packed:
        if FORMATS[module.packings[name].quant_type].quant_method == METHOD:
            other_formats.append((module, name))
    module, name = (other_formats or [packed[0][1:]])[0]
    packing = module.packings[name]
    dense = _dense_paths(model, {path for path, _, _ in packed})
    if other_formats:
        return {
            "quant_method": METHOD,
            "quant_type": packing.quant_type,
            "double_quant": False,
            "blocksize": packing.blocksize,
            "compute_dtype": str(module.compute_dtype).removeprefix("torch.") if module.compute_dtype else None,
            "skip": dense,
        }
    floating_dtype = next((p.dtype for _, p in base_parameters(model) if p.is_floating_point()), torch.float32)
    return {
        "quant_method": "bitsandbytes",
        "load_in_4bit": True,
        "load_in_8bit": False,
        "bnb_4bit_quant_type": packing.quant_type,
        "bnb_4bit_use_double_quant": module.settings_of(name).double_quant,
        "bnb_4bit_compute_dtype": str(module.compute_dtype or floating_dtype).removeprefix("torch."),
        "bnb_4bit_quant_storage": "uint8",
        "llm_int8_skip_modules": dense,
    }


def _dense_paths(model: nn.Module, packed: Collection[str]) -> list[str]:
    """Return the paths of linear layers and modules of experts that have no packed weight."""
    paths: list[str] = []
    for path, module in base_modules(model):
        if path not in packed and (is_linear(module) or expert_parameters(model, path, module)):
            paths.append(path)
    return paths


def sync_config(model: nn.Module) -> None:
    """Update a transformers model's `quantization_config` and weight conversions after its layers have changed."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "save_pretrained"):
        return
    fields = config_fields(model)
    if fields is not None:
        config.quantization_config = fields
    elif hasattr(config, "quantization_config"):
        del config.quantization_config
    _sync_conversions(model)


def _sync_conversions(model: PreTrainedModel) -> None:
    """Make `save_pretrained` write 4-bit weights under their names in the model.

    By default, transformers would split or merge them like dense weights, for example into one tensor per expert.
    """
    if _OWN_CONVERSIONS in model.__dict__:
        _restore_conversions(model)
    packed = [f"{path}.{name}" for path, _, name in packed_names(model)]
    loading = sys.modules.get("transformers.core_model_loading")
    if not packed or loading is None:
        return
    from transformers.conversion_mapping import get_model_conversion_mapping

    def splits(conversion: WeightConverter | WeightRenaming) -> bool:
        if not isinstance(conversion, loading.WeightConverter):
            return False
        reverse = conversion.reverse_transform()
        return any(reverse.rename_source_key(name)[1] is not None for name in packed)

    # The conversions that transformers uses for a model that was not loaded from a checkpoint.
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    default_conversions = [conversion for conversion in mapping if not isinstance(conversion, loading.PrefixChange)]
    model_conversions = getattr(model, _CONVERSIONS, None)
    if not any(map(splits, model_conversions or default_conversions)):
        return
    conversions = default_conversions if model_conversions is None else model_conversions
    remaining = [conversion for conversion in conversions if not splits(conversion)]
    # A checkpoint with the model's own names is loaded without the splitting conversions, but the dequantized model
    # needs them to be saved.
    if model_conversions is not None:
        model_conversions = [*remaining, *filter(splits, default_conversions)]
    model.__dict__[_OWN_CONVERSIONS] = model_conversions
    model.__dict__[_CONVERSIONS] = remaining


def _restore_conversions(model: PreTrainedModel) -> None:
    """Restore the conversions that the model had when all its weights were dense."""
    conversions = model.__dict__.pop(_OWN_CONVERSIONS)
    model.__dict__.pop(_CONVERSIONS, None)
    if conversions is not None:
        model.__dict__[_CONVERSIONS] = conversions
