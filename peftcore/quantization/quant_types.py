"""Values of `quant_type`: the weight formats, of the core and of plugins, that can quantize a layer."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from peftcore.errors import PeftcoreError, PluginError, warn
from peftcore.model.targets import sizes
from peftcore.ops.weight import MIN_BLOCKSIZE
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.layers import is_conv1d
from peftcore.plugin.method import WeightFormat
from peftcore.plugin.registry import registry
from peftcore.plugin.validation import shown
from peftcore.quantization.formats import FORMATS, QUANT_TYPES, FourBitSettings
from peftcore.quantization.packed_experts import packs_transpose
from peftcore.quantization.quantizable import extend_skip

_TYPE_PACKAGES = {"8da4w": "peftcore-8da4w"}  # by the name of a format, without its group size
# Packages that read checkpoints, by `quant_method`. The AQLM package makes transformers read them.
_READER_PACKAGES = {
    "aqlm": "peftcore-aqlm",
    **dict.fromkeys(("gptq", "awq", "compressed-tensors", "modelopt"), "peftcore-checkpoints"),
}


def find_type(quant_type: Any) -> tuple[Plugin, WeightFormat]:
    """Return the weight format `quant_type` and its plugin.

    Raises:
        PeftcoreError: no installed format of this name can quantize.
        PluginError: the format cannot dequantize.
    """
    all_formats = registry.offered("peftcore_weight_formats", WeightFormat)
    formats = {
        name: weight_format for name, weight_format in all_formats.items() if weight_format[1].quantize is not None
    }
    if isinstance(quant_type, str) and quant_type in formats:
        plugin, weight_format = formats[quant_type]
        if weight_format.decode is None or weight_format.plain is None:
            raise PluginError(
                f"the weight format '{quant_type}' of {plugin} has `quantize`, but lacks `decode` or `plain`. Add both"
            )
        return plugin, weight_format
    if isinstance(quant_type, str) and (package := _TYPE_PACKAGES.get(quant_type.partition("-")[0])):
        plugin_of_type = _find_plugin(package)
        if plugin_of_type is None:
            raise PeftcoreError(
                f"quant_type='{quant_type}' is in a package that is not installed. {_how_to_install(package)}"
            )
        if plugin_of_type.error:
            raise PeftcoreError(
                f"quant_type='{quant_type}' is provided by {plugin_of_type}, which cannot be used: "
                f"{plugin_of_type.error}"
            )
    names = ", ".join([*QUANT_TYPES, *sorted(name for name in formats if name not in QUANT_TYPES)])
    raise PeftcoreError(f"unknown quant_type {shown(quant_type)}. Choose one of: {names}")


def _how_to_install(package: str) -> str:
    return f"Run in a copy of peftcore's repository: pip install ./plugins/{package}"


def _find_plugin(package: str) -> Plugin | None:
    return next((plugin for plugin in registry.plugins() if plugin.distribution == package), None)


def find_reader_package(quantization_config: Mapping[str, Any], checkpoint: str) -> str | None:
    """Return the package that reads a quantized checkpoint, or None if the core or no package reads it.

    Args:
        quantization_config: the checkpoint's `quantization_config`.
        checkpoint: name of the checkpoint, for error messages.

    Raises:
        PeftcoreError: the package is not installed or not usable.
    """
    method = str(quantization_config.get("quant_method"))
    package = _READER_PACKAGES.get(method)
    if package is None:
        return None
    plugin = _find_plugin(package)
    if plugin is None:
        raise PeftcoreError(
            f"'{checkpoint}' is quantized with '{method}', which needs the package {package}. "
            f"{_how_to_install(package)}"
        )
    if plugin.error:
        raise PeftcoreError(
            f"'{checkpoint}' is quantized with '{method}', which is read by {plugin}, but that plugin cannot be "
            f"used: {plugin.error}"
        )
    return package


def refuse_plugin_checkpoint(quantization_config: Mapping[str, Any], checkpoint: str) -> None:
    """Raise a PeftcoreError if a checkpoint is quantized in a format that transformers loads through a plugin."""
    package = find_reader_package(quantization_config, checkpoint)
    if package is not None:
        raise PeftcoreError(
            f"'{checkpoint}' is already quantized with '{quantization_config['quant_method']}'. Load it with "
            f"transformers' from_pretrained after `import {package.replace('-', '_')}`. On the command line, omit "
            "--quantize and choose a method that does not quantize the base"
        )


def refuse_options(settings: FourBitSettings) -> None:
    """Raise a PeftcoreError for options that plugins' formats do not support."""
    if settings != FourBitSettings(settings.quant_type):
        raise PeftcoreError(
            f"quant_type='{settings.quant_type}' does not support double_quant, blocksize and compute_dtype, found "
            f"{settings.double_quant}, {shown(settings.blocksize)} and {settings.compute_dtype}. Omit these "
            f"arguments, or choose one of: {', '.join(QUANT_TYPES)}"
        )


def check_rows(
    model: nn.Module,
    settings: FourBitSettings,
    layers: Mapping[str, nn.Module],
    experts: Mapping[str, Mapping[str, int]],
    skip: Sequence[str] | None,
) -> None:
    """Raise a PeftcoreError for weights whose rows do not divide into the format's blocks, if blocks run along rows.

    Args:
        model: the model.
        settings: settings of one of the core's formats.
        layers: linear layers to quantize, by path.
        experts: experts' parameters to quantize, by the module's path.
        skip: as in `peftcore.quantize`, for the message.
    """
    if not FORMATS[settings.quant_type].rows_are_blocks:
        return
    inputs = {path: sizes(layer)[0] for path, layer in layers.items()}  # number of inputs by weight
    for path, names in experts.items():
        module = model.get_submodule(path)
        dim = -2 if packs_transpose(module, settings.quant_type) else -1
        for name in names:
            inputs[f"{path}.{name}" if path else name] = module.get_parameter(name).shape[dim]
    misfits = [name for name, size in inputs.items() if size % settings.blocksize]
    if misfits:
        raise PeftcoreError(
            f"'{misfits[0]}' has {inputs[misfits[0]]} inputs, but {settings.quant_type} needs a multiple of "
            f"{settings.blocksize}. To quantize {type(model).__name__}, "
            f"{_suggestions(model, settings, inputs, misfits, skip)}"
        )
    _try_one_expert(model, settings, experts)


def _suggestions(
    model: nn.Module,
    settings: FourBitSettings,
    inputs: Mapping[str, int],
    misfits: Sequence[str],
    skip: Sequence[str] | None,
) -> str:
    """Return the advice of the error about weights whose rows do not divide into blocks."""
    suggestions: list[str] = []
    divisor = math.gcd(*inputs.values())
    blocksize = divisor & -divisor  # the largest power of two that divides all input sizes
    if MIN_BLOCKSIZE <= blocksize < settings.blocksize:
        suggestions.append(f"choose blocksize={blocksize}")
    if len(misfits) < len(inputs):
        suggestions.append(
            f"leave {len(misfits)} of {len(inputs)} weights dense: skip={extend_skip(model, skip, misfits)}"
        )
    return ", or ".join([*suggestions, "choose nf4"])


def _try_one_expert(model: nn.Module, settings: FourBitSettings, experts: Mapping[str, Mapping[str, int]]) -> None:
    """Quantize one expert of each parameter on the meta device, so that the format raises its errors before any change.

    For example, NVFP4 needs experts whose size is a multiple of 512 values.
    """
    for path, names in experts.items():
        module = model.get_submodule(path)
        for name in names:
            expert = module.get_parameter(name)[:1].detach().to("meta")
            if packs_transpose(module, settings.quant_type):
                expert = expert.mT
            FORMATS[settings.quant_type].quantize(expert, settings.blocksize, False)


def warn_of_experts(names: list[str], quant_type: str) -> None:
    """Warn that experts stay dense, because plugins' formats store linear layers only."""
    if names:
        warn(
            f"{len(names)} weights of experts ('{names[0]}') are left dense, because quant_type='{quant_type}' stores "
            "linear layers only",
        )


def quantize_by_plugin(plugin: Plugin, weight_format: WeightFormat, layers: Mapping[str, nn.Module]) -> None:
    """Quantize dense linear layers, by path, in a plugin's format.

    Raises:
        PluginError: the plugin fails, or leaves a layer in another format.
    """
    assert weight_format.quantize is not None
    for path, layer in layers.items():
        _make_linear(layer)
        try:
            with registry.naming(plugin, "quantize"):
                weight_format.quantize(layer)
        except PeftcoreError as error:
            raise type(error)(
                f"'{path}' cannot be quantized: {error}. The layers before it have already been quantized, so load "
                "the model again"
            ) from error
        if not weight_format.matches(layer):
            raise PluginError(
                f"`quantize` of {plugin} left '{path}' in another format: `matches` of '{weight_format.name}' "
                "returned False. It must return True for a layer that `quantize` has converted"
            )


def dequantize_by_plugin(module: nn.Module, weight_format: WeightFormat, dtype: torch.dtype | None) -> None:
    """Turn a layer in a plugin's format into an `nn.Linear` with its dequantized weight."""
    assert weight_format.plain is not None
    weight = weight_format.read(module).detach()
    module._parameters["weight"] = nn.Parameter(weight if dtype is None else weight.to(dtype), requires_grad=False)
    weight_format.plain(module)


def _make_linear(layer: Any) -> None:
    """Turn a layer that computes x Wᵀ + b, such as a Conv1D, into an `nn.Linear`."""
    if is_conv1d(layer):
        layer.weight = nn.Parameter(layer.weight.detach().T.contiguous(), requires_grad=layer.weight.requires_grad)
        for attribute in ("nf", "nx"):
            layer.__dict__.pop(attribute, None)
        layer.out_features, layer.in_features = layer.weight.shape
    layer.__class__ = nn.Linear
