"""Experts stored one by one in files, and transformers' conversions to one parameter `[experts, .., ..]`.

The conversions stack all experts and join gate and up projections. Here they are applied to one expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

_APART = {1, 2, -1, -2}  # dimensions of one expert


def is_by_expert(converter: Any) -> bool:
    """Return whether the conversion treats each expert separately."""
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
    """Return one expert of a parameter, converted from its tensors by source pattern (see `is_by_expert`)."""
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
