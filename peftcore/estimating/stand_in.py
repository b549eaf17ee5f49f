"""Meta models: copies of a model on the meta device, built from a model, a config or a folder."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import peftcore
from peftcore.engine import adapter_parameters, add_adapter, state_of
from peftcore.engine.state import refuse_merged, refuse_per_sample
from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed
from peftcore.plugin import meta_copy
from peftcore.plugin.layers import is_wrapped
from peftcore.quantization import QuantizedLinear, build_empty, is_packed, quantized_experts
from peftcore.quantization.convert import convert


def stand_in(model: Any, dtype: torch.dtype | None) -> nn.Module:
    """Return a copy of the model on the meta device, without adapters, in training mode.

    Args:
        model: A module, a transformers config, a folder with a `config.json`, or a hub id.
        dtype: Dtype of the floating-point parameters. None means the module's or the config's dtype, or else fp32.

    Raises:
        PeftcoreError: `model` has another type, or cannot be built on the meta device.
    """
    if isinstance(model, nn.Module):
        copy = _copy(model)
        return (copy if dtype is None else copy.to(dtype)).train()
    if isinstance(model, (str, Path)):
        model = _config(str(model))
    if not hasattr(model, "to_dict") or not hasattr(model, "model_type"):
        raise PeftcoreError(
            f"estimate needs a model, a transformers config, a folder or a hub id, found {type(model).__name__}"
        )
    return _built(model, dtype or getattr(model, "dtype", None) or torch.float32).train()


def apply_again(meta_model: nn.Module, model: Any) -> tuple[str, ...]:
    """Apply the adapters of `model` to its meta model `made`, and return the names of the active adapters.

    Raises:
        PeftcoreError: Adapters are merged, or each sample of a batch has its own.
    """
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is None:
        return ()
    refuse_merged(state, "estimate a step")
    refuse_per_sample(state, "estimate a step")
    for name, entry in state.applied.items():
        dtypes = {p.dtype for _, p in adapter_parameters(model, name)}
        add_adapter(
            meta_model,
            entry.config,
            {},
            adapter=name,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            fill=lambda: None,  # sizes alone matter
            active=name in state.active,
            trainable=entry.trainable,
        )
    if state.active:
        peftcore.activate(meta_model, list(state.active))
    return state.active


def config_of(model: Any) -> Any:
    """Return the config of a model, a folder or a hub id. A config is returned unchanged.

    Raises:
        PeftcoreError: There is no config.
    """
    config = _config(str(model)) if isinstance(model, (str, Path)) else getattr(model, "config", model)
    if not hasattr(config, "to_dict") or not hasattr(config, "model_type"):
        raise PeftcoreError(f"expected a transformers config or a model with a config, found {type(config).__name__}")
    return config


def refuse_not_followed(config: Any) -> None:
    """Raise NotFollowed if the config describes weights that are quantized in an unsupported way."""
    if not is_packed(config):
        _refuse_packed(config)


def _refuse_packed(config: Any) -> None:
    """Raise NotFollowed if the config describes quantized weights, since a model built from it would be dense."""
    quantization_config = getattr(config, "quantization_config", None)
    if quantization_config is not None:
        kind = (
            quantization_config.get("quant_method")
            if isinstance(quantization_config, dict)
            else getattr(quantization_config, "quant_method", None)
        )
        raise _not_followed(getattr(kind, "value", kind) or "see quantization_config")


def _not_followed(kind: str) -> NotFollowed:
    return NotFollowed(
        f"the weights are quantized ({kind}), which cannot be estimated. Pass the config of the dense model, with "
        "quantize='nf4' or a method that quantizes the base"
    )


def _copy(model: nn.Module) -> nn.Module:
    if next(quantized_experts(model), None) is not None:
        raise PeftcoreError(
            "the model's experts are already in 4 bits, which cannot be estimated. Pass the model's config instead, "
            "with quantize='nf4'"
        )
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.is_quantized}
    if not packed:
        _refuse_packed(getattr(model, "config", None))
    wrapped_param = next(filter(is_wrapped, model.parameters()), None)
    if wrapped_param is not None:
        raise _not_followed(type(wrapped_param).__name__)
    copy = meta_copy(model)
    for path, layer in packed.items():
        dense: Any = copy.get_submodule(path)
        convert(dense, layer.packed.to("meta"), layer.compute_dtype)
    return copy


def _config(where: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise PeftcoreError(
            "reading a folder or a hub id needs transformers. Install it: pip install transformers"
        ) from error
    if Path(where).is_absolute() and not Path(where).is_dir():  # the hub would report it as a malformed repository id
        raise PeftcoreError(f"the folder '{where}' does not exist. Pass a folder with a config.json, or a hub id")
    try:
        return AutoConfig.from_pretrained(where)
    except Exception as error:  # from transformers, or from the validation of the config's fields
        is_expected = isinstance(error, (OSError, ValueError, KeyError))
        reason = str(error if is_expected else error.__cause__ or error).strip().partition("\n")[0]
        raise PeftcoreError(f"the configuration of '{where}' cannot be read: {reason}") from error


def _built(config: Any, dtype: torch.dtype) -> nn.Module:
    """Build the class that the config names, or a language model. `from_config` would initialize weights."""
    import transformers

    if is_packed(config):
        return build_empty(config, lambda dense: _built(dense, dtype))
    _refuse_packed(config)
    config = copy.deepcopy(config)  # building a model changes its config
    model_class = getattr(transformers, (getattr(config, "architectures", None) or ["?"])[0], None)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if model_class is not None:
                return model_class._from_config(config, dtype=dtype)
            kind = next((k for k in kinds if type(config) in k._model_mapping), transformers.AutoModel)
            return kind.from_config(config, dtype=dtype)
    except Exception as error:
        raise NotFollowed(
            f"cannot build a model on the meta device from this {type(config).__name__}: {type(error).__name__}: "
            f"{str(error).partition(chr(10))[0]}"
        ) from error
