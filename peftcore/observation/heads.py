"""Detection of heads: modules that pre-training did not train.

    loaded by from_pretrained   parameters that the checkpoint did not have, which transformers marks
    class for a task            and everything outside the backbone, whether the checkpoint has it or not

A class for a task is one that transformers lists for classification, detection, segmentation and similar tasks, with
the user's labels or vocabulary. Heads of language models do not count, nor does what is tied to the embedding.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache

from torch import Tensor, nn

from peftcore import ranks
from peftcore.adaptation.base_modules import CHILD, TRAINED, base_modules, base_parameters
from peftcore.adaptation.class_swap import original_class

_TASK = re.compile(
    "(?<!ZERO_SHOT_)(?<!ZERO_SHOT_IMAGE_)(CLASSIFICATION|OBJECT_DETECTION|SEGMENTATION|QUESTION_ANSWERING"
    "|MULTIPLE_CHOICE|NEXT_SENTENCE_PREDICTION|CTC|RNNT|TDT|XVECTOR|REGRESSION|KEYPOINT_DETECTION|POSE_ESTIMATION)"
)
_TASK_NAME = re.compile("For.*(Classification|Detection|Segmentation|QuestionAnswering|MultipleChoice|CTC|Regression)")
_OURS = (CHILD, TRAINED)
_LOADED = "_is_hf_initialized"  # transformers' mark of a parameter that a checkpoint gave


def task_heads(model: nn.Module, backbone: str, output_head: str | None) -> tuple[str, ...]:
    """Paths of the modules of a transformers model that pre-training did not train.

    Args:
        backbone: path of the module that runs the layers, "" where the class names none.
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
    """Yield paths of modules whose parameters the checkpoint did not have.

    Not the output head, which may be one that was made longer. In the backbone they must be few: layers that were
    replaced after loading bear no mark, too.
    """
    marked: dict[str, bool] = {}
    for name, found in base_parameters(model):
        parameter = ranks.behind(found)
        plain = type(parameter) is nn.Parameter and parameter.is_floating_point() and not parameter.is_meta
        marked[name] = not plain or getattr(parameter, _LOADED, False)
    inside = [mark for name, mark in marked.items() if not _is_inside(name, outside)]
    few = 2 * sum(inside) > len(inside)
    for path in dict.fromkeys(name.rpartition(".")[0] for name, mark in marked.items() if not mark):
        whole = not any(mark for name, mark in marked.items() if name.startswith(f"{path}."))
        if path and path != output_head and whole and (few or _is_inside(path, outside)):
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
