"""Run transformers' conversions from experts stored one by one to a stacked parameter `[experts, .., ..]`.

transformers stacks all experts and concatenates gate and up projections. This module runs its conversions for one
expert at a time.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.core_model_loading import Concatenate, Interleave, MergeModulelist, Transpose

_DIMS_OF_EXPERT = {1, 2, -1, -2}  # all dimensions of the parameter except the first, the experts


def is_by_expert(converter: Any) -> bool:
    """Return whether the conversion treats each expert separately."""
    merges = [operation for operation in converter.operations if isinstance(operation, MergeModulelist)]
    other_operations = [operation for operation in converter.operations if not isinstance(operation, MergeModulelist)]

    def is_apart(operation: Any) -> bool:
        if isinstance(operation, (Concatenate, Interleave)):
            return operation.dim in _DIMS_OF_EXPERT
        return isinstance(operation, Transpose) and {operation.dim0, operation.dim1} <= _DIMS_OF_EXPERT

    return (
        len(merges) == 1
        and merges[0].dim == 0
        and len(converter.target_patterns) == 1
        and all(map(is_apart, other_operations))
    )


def expert_of(converter: Any, tensors: Mapping[str, Tensor], name: str, model: nn.Module) -> Tensor:
    """Convert the tensors of one expert, by source pattern, to its slice of the parameter (see `is_by_expert`)."""
    converted: dict[str, Any] = {pattern: [tensor] for pattern, tensor in tensors.items()}
    for operation in converter.operations:
        converted = operation.convert(
            converted,
            source_patterns=converter.source_patterns,
            target_patterns=converter.target_patterns,
            full_layer_name=name,
            model=model,
            config=model.config,
            missing_keys=None,
        )
    (value,) = converted.values()
    return value[0]
