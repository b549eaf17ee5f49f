"""Types of `peftcore.quantize`: the weight formats of the core and of plugins that can quantize a layer."""

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
from peftcore.quantization.packed_experts import is_turned
from peftcore.quantization.quantizable import with_skipped

_PACKAGES = {"8da4w": "peftcore-8da4w"}  # by the name of a type, without its group
# Packages that read checkpoints, by their `quant_method`. AQLM's makes transformers read them.
_READERS = {
    "aqlm": "peftcore-aqlm",
    **dict.fromkeys(("gptq", "awq", "compressed-tensors", "modelopt"), "peftcore-checkpoints"),
}


def find_type(quant_type: Any) -> tuple[Plugin, WeightFormat]:
    """Return the weight format `quant_type` and its plugin.

    Raises:
        PeftcoreError: no installed format with this name can quantize.
        PluginError: the format cannot be dequantized.
    """
    offered = registry.offered("peftcore_weight_formats", WeightFormat)
    known = {name: weight_format for name, weight_format in offered.items() if weight_format[1].quantize is not None}
    if isinstance(quant_type, str) and quant_type in known:
        plugin, weight_format = known[quant_type]
        if weight_format.decode is None or weight_format.plain is None:
            raise PluginError(
                f"the weight format '{quant_type}' of {plugin} has `quantize`, but not `decode` and `plain`. Add both"
            )
        return plugin, weight_format
    if isinstance(quant_type, str) and (package := _PACKAGES.get(quant_type.partition("-")[0])):
        installed = _installed(package)
        if installed is None:
            raise PeftcoreError(
                f"quant_type='{quant_type}' is in a package that is not installed. Run: pip install {package}"
            )
        if installed.error:
            raise PeftcoreError(f"quant_type='{quant_type}' is of {installed}, which is not usable: {installed.error}")
    names = ", ".join([*QUANT_TYPES, *sorted(name for name in known if name not in QUANT_TYPES)])
    raise PeftcoreError(f"quant_type={shown(quant_type)} is not known. Choose one of: {names}")


def _installed(package: str) -> Plugin | None:
    return next((plugin for plugin in registry.plugins() if plugin.distribution == package), None)


def check_reader(stored: Mapping[str, Any], where: str) -> str | None:
    """Return the package that reads a checkpoint as it is, or None.

    Args:
        stored: `quantization_config` of the checkpoint.
        where: its name, for messages.

    Raises:
        PeftcoreError: the package is not installed or not usable.
    """
    method = str(stored.get("quant_method"))
    package = _READERS.get(method)
    if package is None:
        return None
    installed = _installed(package)
    if installed is None:
        raise PeftcoreError(
            f"'{where}' is quantized with '{method}', which the package {package} reads. Run: pip install {package}"
        )
    if installed.error:
        raise PeftcoreError(f"'{where}' is quantized with '{method}', which {installed} reads: {installed.error}")
    return package


def refuse_read_as_it_is(stored: Mapping[str, Any], where: str) -> None:
    """Raise a PeftcoreError if a package makes transformers read such a checkpoint: it is not quantized again."""
    package = check_reader(stored, where)
    if package is not None:
        raise PeftcoreError(
            f"'{where}' is quantized with '{stored['quant_method']}' and is read as it is: after `import "
            f"{package.replace('-', '_')}`, by transformers' from_pretrained; on the command line without --quantize, "
            "with a method that does not quantize the base"
        )


def refuse_options(settings: FourBitSettings) -> None:
    """Raise a PeftcoreError for options that only the types of the core have."""
    if settings != FourBitSettings(settings.quant_type):
        raise PeftcoreError(
            f"quant_type='{settings.quant_type}' takes no double_quant, blocksize or compute_dtype, found "
            f"{settings.double_quant}, {shown(settings.blocksize)} and {settings.compute_dtype}. Leave them out, or "
            f"choose one of: {', '.join(QUANT_TYPES)}"
        )


def check_rows(
    model: nn.Module,
    settings: FourBitSettings,
    layers: Mapping[str, nn.Module],
    experts: Mapping[str, Mapping[str, int]],
    skip: Sequence[str] | None,
) -> None:
    """Raise a PeftcoreError for weights that do not divide into the format's blocks, if blocks are parts of rows.

    Args:
        model: the model.
        settings: settings of a type of the core.
        layers: linear layers to quantize, by path.
        experts: parameters to quantize of modules of experts, by path.
        skip: as in `peftcore.quantize`, for the message.
    """
    if not FORMATS[settings.quant_type].rows_are_blocks:
        return
    inputs = {path: sizes(layer)[0] for path, layer in layers.items()}  # number of inputs by weight
    for path, names in experts.items():
        module = model.get_submodule(path)
        dim = -2 if is_turned(module, settings.quant_type) else -1
        for name in names:
            inputs[f"{path}.{name}" if path else name] = module.get_parameter(name).shape[dim]
    wrong = [name for name, size in inputs.items() if size % settings.blocksize]
    if wrong:
        raise PeftcoreError(
            f"'{wrong[0]}' has {inputs[wrong[0]]} inputs, but {settings.quant_type} needs a multiple of "
            f"{settings.blocksize}. To quantize {type(model).__name__}, {_ways(model, settings, inputs, wrong, skip)}"
        )
    _try_one_expert(model, settings, experts)


def _ways(
    model: nn.Module,
    settings: FourBitSettings,
    inputs: Mapping[str, int],
    wrong: Sequence[str],
    skip: Sequence[str] | None,
) -> str:
    """Return what to do about weights whose inputs do not divide into blocks."""
    ways: list[str] = []
    common = math.gcd(*inputs.values())
    fitting = common & -common  # the largest power of two that divides all
    if MIN_BLOCKSIZE <= fitting < settings.blocksize:
        ways.append(f"choose blocksize={fitting}")
    if len(wrong) < len(inputs):
        ways.append(f"leave {len(wrong)} of {len(inputs)} weights dense: skip={with_skipped(model, skip, wrong)}")
    return ", or ".join([*ways, "choose nf4"])


def _try_one_expert(model: nn.Module, settings: FourBitSettings, experts: Mapping[str, Mapping[str, int]]) -> None:
    """Quantize an expert on the meta device: a format may need more, as NVFP4 does a multiple of 512 values in one."""
    for path, names in experts.items():
        module = model.get_submodule(path)
        for name in names:
            one = module.get_parameter(name)[:1].detach().to("meta")
            if is_turned(module, settings.quant_type):
                one = one.mT
            FORMATS[settings.quant_type].quantize(one, settings.blocksize, False)


def warn_of_experts(names: list[str], quant_type: str) -> None:
    """Warn of weights of experts, which a plugin's format does not store."""
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
            raise type(error)(f"'{path}': {error}. Layers before it are quantized: load the model again") from error
        if not weight_format.matches(layer):
            raise PluginError(
                f"quantize of {plugin} left '{path}' in another format: `matches` of the format '{weight_format.name}' "
                "must be true for it"
            )


def dequantize_by_plugin(module: nn.Module, weight_format: WeightFormat, dtype: torch.dtype | None) -> None:
    """Turn a layer in a plugin's format into an ordinary one with the values of its weight."""
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
