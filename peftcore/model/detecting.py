"""Detection of a model's architecture: its task, and where its backbone, embedding and heads are.

It is read from the model itself, as transformers' models provide it, unless a plugin's `peftcore_architecture` hook
describes the model.

Heads for a task, which pre-training did not train, are

    loaded by from_pretrained   parameters that the checkpoint did not have, which transformers marks
    class for a task            and everything outside the backbone, whether the checkpoint has it or not

A class for a task is one that transformers lists for classification, detection, segmentation and similar tasks, with
the user's labels or vocabulary. Heads of language models do not count, nor does what is tied to the embedding.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from functools import cache
from typing import Any

from torch import Tensor, nn

from peftcore.errors import PluginError
from peftcore.model.base_modules import (
    CHILD,
    TRAINED,
    base_modules,
    base_parameters,
    original_class,
    original_forward,
)
from peftcore.model.sublayers import Observed
from peftcore.plugin import sharded
from peftcore.plugin.architecture import Architecture, text_config
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.registry import builtin, registry

# Names of the argument for the attention cache, which differ between releases of transformers.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # in releases of transformers

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


_TASK = re.compile(
    "(?<!ZERO_SHOT_)(?<!ZERO_SHOT_IMAGE_)(CLASSIFICATION|OBJECT_DETECTION|SEGMENTATION|QUESTION_ANSWERING"
    "|MULTIPLE_CHOICE|NEXT_SENTENCE_PREDICTION|CTC|RNNT|TDT|XVECTOR|REGRESSION|KEYPOINT_DETECTION|POSE_ESTIMATION)"
)

_TASK_NAME = re.compile("For.*(Classification|Detection|Segmentation|QuestionAnswering|MultipleChoice|CTC|Regression)")

_OURS = (CHILD, TRAINED)

_LOADED = "_is_hf_initialized"  # transformers' mark of a parameter that a checkpoint gave


def task_heads(model: nn.Module, backbone: str, output_head: str | None) -> tuple[str, ...]:
    """Return the paths of the modules of a transformers model that pre-training did not train.

    Args:
        model: the model.
        backbone: path of the module that runs the layers; "" if the class does not name one.
        output_head: path of the head that gives token logits.
    """
    kinds = _kinds().get(original_class(model).__name__, set())
    outside = _outside_backbone(model, backbone)
    loaded = any([getattr(parameter, _LOADED, False) for _, parameter in base_parameters(model)])
    of_task = any(map(_TASK.search, kinds)) if kinds else bool(_TASK_NAME.search(original_class(model).__name__))
    if of_task or not (kinds or loaded):
        inner = None if of_task else output_head
        heads = [path for path in outside if inner is None or not f"{inner}.".startswith(f"{path}.")]
    else:
        heads = []
    if loaded:
        for path in _missing(model, outside, output_head):
            heads += [path] if not _is_inside(path, heads) else []
    return tuple(heads)


def mark_as_loaded(parameter: Tensor, like: Tensor | None) -> None:
    """Mark `parameter`, a copy of `like`, as loaded from a checkpoint if `like` was."""
    if getattr(like, _LOADED, False):
        setattr(parameter, _LOADED, True)


def _outside_backbone(model: nn.Module, backbone: str) -> list[str]:
    """Return the children of the model that have parameters and neither are nor contain the backbone."""
    paths = {id(module): path for path, module in base_modules(model)}
    children = [(name, child) for name, child in model.named_children() if id(child) in paths and name not in _OURS]
    if backbone:
        backbones = {backbone.split(".")[0]}
    else:  # the class has a prefix without such a child, like CLIP's classifier with its own vision model
        backbones = {name for name, child in children if hasattr(child, "base_model_prefix")}
    if not backbones:
        return []
    return [  # a module that is also in the backbone has its name there
        paths[id(child)]
        for name, child in children
        if name not in backbones and any(True for _ in base_parameters(child))
    ]


def _missing(model: nn.Module, outside: list[str], output_head: str | None) -> Iterator[str]:
    """Yield the paths of modules none of whose parameters the checkpoint had.

    The output head is left out, since one that was made longer has no mark. So are modules of the backbone if most of
    its parameters have none: layers that were replaced after loading have no mark either.
    """
    loaded: dict[str, bool] = {}  # True for parameters of which the mark says nothing
    for name, found in base_parameters(model):
        parameter = sharded.original(found)
        can_be_marked = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        loaded[name] = not can_be_marked or getattr(parameter, _LOADED, False)
    backbone = [is_loaded for name, is_loaded in loaded.items() if not _is_inside(name, outside)]
    few_missing = 2 * sum(backbone) > len(backbone)
    for path in dict.fromkeys(name.rpartition(".")[0] for name, is_loaded in loaded.items() if not is_loaded):
        whole = not any(is_loaded for name, is_loaded in loaded.items() if name.startswith(f"{path}."))
        if path and path != output_head and whole and (few_missing or _is_inside(path, outside)):
            yield path


def _is_inside(path: str, others: list[str]) -> bool:
    return any(path == other or path.startswith(f"{other}.") for other in others)


@cache
def _kinds() -> dict[str, set[str]]:
    """Return {class: tasks of transformers' auto classes}, such as `IMAGE_CLASSIFICATION`."""
    from transformers.models.auto import modeling_auto

    found: dict[str, set[str]] = {}
    for mapping in dir(modeling_auto):
        kind = re.fullmatch("MODEL_(?:FOR_)?(.*?)_?MAPPING_NAMES", mapping)
        if kind is None:
            continue
        for names in getattr(modeling_auto, mapping).values():
            for name in (names,) if isinstance(names, str) else names:
                found.setdefault(name, set()).add(kind[1])
    return found
