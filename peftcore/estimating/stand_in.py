"""Stand-ins: a model of the same parts whose tensors have shapes and no values, from a model, a config or a folder."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from peftcore.engine import activate, adapter_parameters, apply_to_fill, state_of
from peftcore.engine.state import refuse_merged, refuse_per_sample
from peftcore.errors import PeftcoreError
from peftcore.estimating.following import NotFollowed
from peftcore.layers import is_wrapped
from peftcore.observation.meta import meta_copy
from peftcore.quantization import QuantizedLinear, quantized_experts
from peftcore.quantization.convert import convert_dense


def stand_in(model: Any, dtype: torch.dtype | None) -> nn.Module:
    """A model on the meta device, without adapters, in training mode.

    Args:
        model: a module, a config of transformers, a folder with a `config.json`, or a hub id.
        dtype: of its floating parameters; None: those of the module, or what the config says, else fp32.

    Raises:
        PeftcoreError: it is none of these, or no model can be built of it on the meta device.
    """
    if isinstance(model, nn.Module):
        copied = _copy(model)
        return (copied if dtype is None else copied.to(dtype)).train()
    if isinstance(model, (str, Path)):
        model = _config(str(model))
    if not hasattr(model, "to_dict") or not hasattr(model, "model_type"):
        raise PeftcoreError(
            f"estimate takes a model, a config of transformers, a folder or a hub id, found {type(model).__name__}"
        )
    return _built(model, dtype or getattr(model, "dtype", None) or torch.float32).train()


def apply_again(made: nn.Module, model: Any) -> tuple[str, ...]:
    """Apply the adapters of `model` to `made`, its stand-in, and return the names of the active ones.

    Raises:
        PeftcoreError: they are merged, or each sample of a batch has its own.
    """
    state = state_of(model) if isinstance(model, nn.Module) else None
    if state is None:
        return ()
    refuse_merged(state, "estimate a step")
    refuse_per_sample(state, "estimate a step")
    for name, entry in state.applied.items():
        dtypes = {p.dtype for _, p in adapter_parameters(model, name)}
        apply_to_fill(
            made,
            entry.config,
            adapter=name,
            dtype=dtypes.pop() if len(dtypes) == 1 else None,
            acts=name in state.active,
            trainable=entry.trainable,
        )
    if state.active:
        activate(made, list(state.active))
    return state.active


def config_of(model: Any) -> Any:
    """The config of a model, of a folder or hub id, or the config itself.

    Raises:
        PeftcoreError: there is none.
    """
    found = _config(str(model)) if isinstance(model, (str, Path)) else getattr(model, "config", model)
    if not hasattr(found, "to_dict") or not hasattr(found, "model_type"):
        raise PeftcoreError(f"a config of transformers is needed, found {type(found).__name__}")
    return found


def _refuse_packed(config: Any) -> None:
    """Raise where weights are stored in a form of which a model built from the config knows nothing."""
    told = getattr(config, "quantization_config", None)
    if told is not None:
        kind = told.get("quant_method") if isinstance(told, dict) else getattr(told, "quant_method", None)
        raise _not_followed(getattr(kind, "value", kind) or "see quantization_config")


def _not_followed(kind: str) -> NotFollowed:
    return NotFollowed(
        f"the weights are quantized ({kind}), which is not followed. Estimate from the config of the dense model, with "
        "quantize='nf4' or a method that packs the base"
    )


def _copy(model: nn.Module) -> nn.Module:
    if next(quantized_experts(model), None) is not None:
        raise PeftcoreError("the model's experts are in 4 bits already. Estimate from its config, with quantize=")
    packed = {path: m for path, m in model.named_modules() if isinstance(m, QuantizedLinear) and m.is_quantized}
    if not packed:
        _refuse_packed(getattr(model, "config", None))
    wrapped = next(filter(is_wrapped, model.parameters()), None)
    if wrapped is not None:
        raise _not_followed(type(wrapped).__name__)
    copied = meta_copy(model)
    for path, layer in packed.items():
        dense: Any = copied.get_submodule(path)
        dense.weight.data = dense.weight.data.to(layer.packings["weight"].dtype)
        double = layer.nested_absmax is not None
        convert_dense(dense, layer.quant_type, double, layer.blocksize, layer.compute_dtype)
    return copied


def _config(where: str) -> Any:
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise PeftcoreError("a folder or a hub id is read with transformers: pip install transformers") from error
    if Path(where).is_absolute() and not Path(where).is_dir():  # which the hub would call a bad name of its own
        raise PeftcoreError(f"there is no folder '{where}': give one with a config.json, or a hub id")
    try:
        return AutoConfig.from_pretrained(where)
    except Exception as error:  # of transformers, or of the class that checks a config's fields
        known = isinstance(error, (OSError, ValueError, KeyError))
        reason = str(error if known else error.__cause__ or error).strip().partition("\n")[0]
        raise PeftcoreError(f"the configuration of '{where}' cannot be read: {reason}") from error


def _built(config: Any, dtype: torch.dtype) -> nn.Module:
    """The class that the config names, or the one with a head for language; from_config would draw weights."""
    import transformers

    _refuse_packed(config)
    config = copy.deepcopy(config)  # which a model writes to
    named = getattr(transformers, (getattr(config, "architectures", None) or ["?"])[0], None)
    kinds = (transformers.AutoModelForCausalLM, transformers.AutoModelForSeq2SeqLM)
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if named is not None:
                return named._from_config(config, dtype=dtype)
            kind = next((k for k in kinds if type(config) in k._model_mapping), transformers.AutoModel)
            return kind.from_config(config, dtype=dtype)
    except Exception as error:
        raise NotFollowed(
            f"no model can be built on the meta device of this {type(config).__name__}: "
            f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"
        ) from error
