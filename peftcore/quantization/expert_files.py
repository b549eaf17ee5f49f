"""Experts as files have them, one by one, and how transformers makes one parameter `[experts, .., ..]` of them.

Its conversions stack all and join gate and up. What they do to each expert apart is done here to one at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

_APART = {1, 2, -1, -2}  # dimensions of one expert


def is_by_expert(converter: Any) -> bool:
    """Is all that this conversion does done to each expert apart?"""
    merges = [operation for operation in converter.operations if isinstance(operation, MergeModulelist)]
    others = [operation for operation in converter.operations if not isinstance(operation, MergeModulelist)]

    def is_apart(operation: Any) -> bool:
        if isinstance(operation, (Concatenate, Interleave)):
            return operation.dim in _APART
        return isinstance(operation, Transpose) and {operation.dim0, operation.dim1} <= _APART

    return (
        len(merges) == 1 and merges[0].dim == 0 and len(converter.target_patterns) == 1 and all(map(is_apart, others))
    )


def expert_of(converter: Any, tensors: Mapping[str, Tensor], name: str, model: nn.Module) -> Tensor:
    """What a conversion `is_by_expert` makes of one expert's tensors, by its source patterns, for the parameter."""
    found: dict[str, Any] = {pattern: [tensor] for pattern, tensor in tensors.items()}
    for operation in converter.operations:
        found = operation.convert(
            found,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    (value,) = found.values()
    return value[0]
