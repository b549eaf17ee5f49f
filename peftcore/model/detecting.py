"""Detect a model's architecture: its task, and the paths of its backbone, embedding and heads.

A plugin can describe a model by the hook `peftcore_architecture`. Otherwise the architecture is derived from the config
and methods of transformers models.

Task heads are modules without pre-trained weights:

    models loaded by from_pretrained   modules whose parameters the checkpoint lacked, as transformers records it
    classes for a task                 in addition, everything outside the backbone

Classes for a task are those that transformers lists for classification, detection, segmentation and similar tasks with
the user's labels or vocabulary. Language model heads and modules tied to the embedding are not task heads.
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
from peftcore.model.sublayers import ObservedSublayers
from peftcore.plugin import sharded
from peftcore.plugin.architecture import Architecture, text_config
from peftcore.plugin.discovery import Plugin
from peftcore.plugin.hooks import hookimpl
from peftcore.plugin.registry import builtin, registry

_CACHE_ARGUMENTS = ("cache", "past_key_values", "cache_params")  # differs between versions and classes of transformers

# PEFT's task types by the suffix of the class name.
_TASK_TYPES = {
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def detect(model: nn.Module) -> Architecture:
    """Return the architecture of `model`, from a plugin's hook or derived from the model.

    Raises:
        PluginError: two plugins describe the model differently, or a hook does not return an Architecture.
    """
    description: tuple[Plugin, Architecture] | None = None
    for plugin, answer in registry.answers("peftcore_architecture", contain=True, first=True, model=model):
        if not isinstance(answer, Architecture):
            raise PluginError(
                f"peftcore_architecture of {plugin} must return a peftcore.plugin.Architecture or None, found "
                f"{type(answer).__name__}"
            )
        if description is None:
            description = plugin, answer
        elif answer != description[1]:
            raise PluginError(
                f"{description[0]} and {plugin} describe {type(model).__name__} differently in "
                "peftcore_architecture. Disable one of them by listing the plugins to use: "
                "PEFTCORE_PLUGINS=NAME,NAME"
            )
    assert description is not None  # the core's hook describes every model
    return description[1]


@hookimpl
def peftcore_architecture(model: nn.Module) -> Architecture:
    return _read_architecture(model)


builtin(sys.modules[__name__])


def _read_architecture(model: nn.Module) -> Architecture:
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "get_input_embeddings"):
        return Architecture(sublayers=ObservedSublayers(model))
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
        sublayers=ObservedSublayers(model),
    )


def _size(config: Any, name: str) -> int | None:
    """Return a size from the config; None if it is missing or differs between layers or stages."""
    try:
        value = getattr(config, name, None)
    except RuntimeError:  # transformers raises this error for sizes that differ between layers
        return None
    return value if isinstance(value, int) else None


def _token_embedding(model: nn.Module) -> nn.Module | None:
    """Return the result of `get_input_embeddings` if it embeds tokens rather than patches or audio."""
    module = _call(model, "get_input_embeddings")
    return module if isinstance(getattr(module, "embedding_dim", None), int) else None


def _falcon_heads(config: Any) -> int | None:
    """Return Falcon's number of key-value heads: 1 with multi-query attention, else None."""
    shares_heads = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", True)
    return 1 if shares_heads else None


def _call(model: nn.Module, name: str) -> nn.Module | None:
    try:
        return getattr(model, name)()
    except (AttributeError, NotImplementedError):
        return None


def _task_type(model: nn.Module, is_encoder_decoder: bool, output_head: str | None) -> str | None:
    name = type(model).__name__
    by_name = next((task_type for ending, task_type in _TASK_TYPES.items() if name.endswith(ending)), None)
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

_PEFTCORE_CHILDREN = (CHILD, TRAINED)

_LOADED_MARK = "_is_hf_initialized"  # attribute that transformers sets on parameters read from a checkpoint


def task_heads(model: nn.Module, backbone: str, output_head: str | None) -> tuple[str, ...]:
    """Return the paths of modules without pre-trained weights in a transformers model.

    Args:
        model: the model.
        backbone: path of the module that runs the layers; "" if the class does not declare one.
        output_head: path of the language model head.
    """
    tasks = _tasks_by_class().get(original_class(model).__name__, set())
    outside_backbone = _outside_backbone(model, backbone)
    has_loaded = any([getattr(parameter, _LOADED_MARK, False) for _, parameter in base_parameters(model)])
    is_task_class = any(map(_TASK.search, tasks)) if tasks else bool(_TASK_NAME.search(original_class(model).__name__))
    if is_task_class or not (tasks or has_loaded):
        inner_path = None if is_task_class else output_head
        heads = [path for path in outside_backbone if inner_path is None or not f"{inner_path}.".startswith(f"{path}.")]
    else:
        heads = []
    if has_loaded:
        for path in _modules_not_loaded(model, outside_backbone, output_head):
            heads += [path] if not _is_inside(path, heads) else []
    return tuple(heads)


def mark_as_loaded(parameter: Tensor, like: Tensor | None) -> None:
    """Mark `parameter` as loaded from a checkpoint if `like`, the parameter that it replaces, was loaded."""
    if getattr(like, _LOADED_MARK, False):
        setattr(parameter, _LOADED_MARK, True)


def _outside_backbone(model: nn.Module, backbone: str) -> list[str]:
    """Return the paths of the model's children that have parameters and do not contain the backbone."""
    paths = {id(module): path for path, module in base_modules(model)}
    children = [
        (name, child) for name, child in model.named_children() if id(child) in paths and name not in _PEFTCORE_CHILDREN
    ]
    if backbone:
        backbones = {backbone.split(".")[0]}
    else:  # the child's name is not the class's prefix, as in CLIP's classifier
        backbones = {name for name, child in children if hasattr(child, "base_model_prefix")}
    if not backbones:
        return []
    return [  # `paths` has the first name of each module, so one that is also in the backbone is not a head
        paths[id(child)]
        for name, child in children
        if name not in backbones and any(True for _ in base_parameters(child))
    ]


def _modules_not_loaded(model: nn.Module, outside_backbone: list[str], output_head: str | None) -> Iterator[str]:
    """Yield the paths of modules without parameters in the checkpoint.

    Resizing or replacing a layer after loading removes the mark of loaded parameters. Therefore the output head is
    never included, and modules of the backbone only if most of its parameters have the mark.
    """
    is_loaded_by_name: dict[str, bool] = {}  # also True for parameters that cannot have the mark
    for name, base_parameter in base_parameters(model):
        parameter = sharded.original(base_parameter)
        can_be_marked = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        is_loaded_by_name[name] = not can_be_marked or getattr(parameter, _LOADED_MARK, False)
    backbone = [is_loaded for name, is_loaded in is_loaded_by_name.items() if not _is_inside(name, outside_backbone)]
    few_missing = 2 * sum(backbone) > len(backbone)
    for path in dict.fromkeys(
        name.rpartition(".")[0] for name, is_loaded in is_loaded_by_name.items() if not is_loaded
    ):
        is_new = not any(is_loaded for name, is_loaded in is_loaded_by_name.items() if name.startswith(f"{path}."))
        if path and path != output_head and is_new and (few_missing or _is_inside(path, outside_backbone)):
            yield path


def _is_inside(path: str, parents: list[str]) -> bool:
    return any(path == parent or path.startswith(f"{parent}.") for parent in parents)


@cache
def _tasks_by_class() -> dict[str, set[str]]:
    """Return {class name: tasks in transformers' auto classes, such as `IMAGE_CLASSIFICATION`}."""
    from transformers.models.auto import modeling_auto

    tasks_by_class: dict[str, set[str]] = {}
    for mapping in dir(modeling_auto):
        task = re.fullmatch("MODEL_(?:FOR_)?(.*?)_?MAPPING_NAMES", mapping)
        if task is None:
            continue
        for names in getattr(modeling_auto, mapping).values():
            for name in (names,) if isinstance(names, str) else names:
                tasks_by_class.setdefault(name, set()).add(task[1])
    return tasks_by_class
