"""Detection of a model's architecture: its task, and where its backbone, embedding and heads are.

It is read from the model itself, as transformers' models provide it, unless a plugin's `peftcore_architecture` hook
describes the model.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from torch import nn

from peftcore.adaptation.base_modules import base_modules
from peftcore.adaptation.class_swap import original_forward
from peftcore.architecture import Architecture, text_config
from peftcore.errors import PluginError
from peftcore.hookspecs import hookimpl
from peftcore.observation.heads import task_heads
from peftcore.observation.sublayers import Observed
from peftcore.plugin_discovery import Plugin
from peftcore.registry import builtin, registry

# Names of the argument for the attention cache, which differ between releases of transformers.
_CACHE_ARGUMENTS = ("cache", "past_key_values")

# PEFT's task types, by the ending of a class's name.
_TASKS = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def detect(model: nn.Module) -> Architecture:
    """Return the architecture of `model`, from a plugin's hook or from the model itself.

    Raises:
        PluginError: two plugins describe the model differently, or a hook returns something else.
    """
    found: tuple[Plugin, Architecture] | None = None
    for plugin, answer in registry.answers("peftcore_architecture", contain=True, first=True, model=model):
        if not isinstance(answer, Architecture):
            raise PluginError(
                f"peftcore_architecture of {plugin} must return a peftcore.plugin.Architecture or None, found "
                f"{type(answer).__name__}"
            )
        if found is None:
            found = plugin, answer
        elif answer != found[1]:
            raise PluginError(
                f"peftcore_architecture: {found[0]} and {plugin} describe {type(model).__name__} differently. List the "
                f"plugins to use without one of them: PEFTCORE_PLUGINS=NAME,NAME"
            )
    assert found is not None  # the core describes every model
    return found[1]


@hookimpl
def peftcore_architecture(model: nn.Module) -> Architecture:
    return _read(model)


builtin(sys.modules[__name__])


def _read(model: nn.Module) -> Architecture:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        return Architecture(sublayers=Observed(model))
    is_encoder_decoder = bool(getattr(config, "is_encoder_decoder", False))
    config = text_config(config)
    is_encoder_decoder |= bool(getattr(config, "is_encoder_decoder", False))
    paths = {id(module): path for path, module in base_modules(model)}

    def path_of(module: nn.Module | None) -> str | None:
        return paths.get(id(module))

    backbone = path_of(getattr(model, "base_model", None)) or ""
    output_head = path_of(_call(model, "get_output_embeddings"))
    arguments = inspect.signature(original_forward(model.get_submodule(backbone))).parameters
    heads, hidden_size = _size(config, "num_attention_heads"), _size(config, "hidden_size")
    return Architecture(
        task_type=_task_type(model, is_encoder_decoder, output_head),
        is_encoder_decoder=is_encoder_decoder,
        backbone=backbone,
        encoder=path_of(_call(model, "get_encoder")) if is_encoder_decoder else None,
        decoder=path_of(_call(model, "get_decoder")) if is_encoder_decoder else None,
        embedding=path_of(_token_embedding(model)),
        output_head=output_head,
        task_heads=task_heads(model, backbone, output_head),
        cache_argument=next((name for name in _CACHE_ARGUMENTS if name in arguments), None),
        hidden_size=hidden_size,
        num_layers=_size(config, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_size(config, "num_key_value_heads") or _falcon_heads(config) or heads,
        head_dim=_size(config, "head_dim") or (hidden_size // heads if hidden_size and heads else None),
        sublayers=Observed(model),
    )


def _size(config: Any, name: str) -> int | None:
    """Return a size of the whole model; None if the config has none, or one for each layer or stage."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers refuses to give one value for layers that differ
        return None
    return value if isinstance(value, int) else None


def _token_embedding(model: nn.Module) -> nn.Module | None:
    """Return the result of `get_input_embeddings`, unless it embeds patches or waves."""
    module = _call(model, "get_input_embeddings")
    return module if isinstance(getattr(module, "embedding_dim", None), int) else None


def _falcon_heads(config: Any) -> int | None:
    """Return the number of heads that Falcon caches: one if all queries share it, else one for each query."""
    one = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", True)
    return 1 if one else None


def _call(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _task_type(model: nn.Module, is_encoder_decoder: bool, output_head: str | None) -> str | None:
    name = type(model).__name__
    by_name = next((task_type for ending, task_type in _TASKS.items() if name.endswith(ending)), None)
    if by_name is not None or output_head is None:
        return by_name
    if is_encoder_decoder:
        return "SEQ_2_SEQ_LM"
    return "CAUSAL_LM" if name.endswith(("ForCausalLM", "LMHeadModel")) else None
