"""What the readers share: parts of a `quantization_config`, and errors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.plugin import CheckpointError, PeftcoreError, validation


def refused(where: str, found: str, needed: str, what_to_do: str) -> PeftcoreError:
    """Return the error for a checkpoint of a tool in a layout that is not read."""
    return PeftcoreError(f"'{where}' is quantized with {found}, but only {needed} can be read. {what_to_do}")


def object_in(config: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    """Return the JSON object `key` of a `quantization_config`, empty if it is missing.

    Raises:
        PeftcoreError: it is another value.
    """
    found = config.get(key) or {}
    if not isinstance(found, Mapping):
        raise PeftcoreError(f"'{where}' has {key}={validation.shown(found)} in its config, expected an object")
    return found


def groups_of(config: Mapping[str, Any], where: str) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return (group, its `weights`) of the `config_groups` of a `quantization_config`, by name.

    Raises:
        PeftcoreError: a group is not an object, such as the name of a preset without its settings.
    """
    groups = object_in(config, "config_groups", where)
    made = {name: object_in(groups, name, where) for name in groups}
    return {name: (group, object_in(group, "weights", where)) for name, group in made.items()}


def refuse_transforms(config: Mapping[str, Any], where: str, what_to_do: str) -> None:
    """Raise a PeftcoreError if compressed-tensors stored transforms of the activations, or sparse weights."""
    if config.get("transform_config"):
        found = "compressed-tensors with transforms of the activations"
        raise refused(where, found, "a model without them", what_to_do)
    sparse = object_in(config, "sparsity_config", where).get("format", "dense")
    if sparse != "dense":
        found = f"compressed-tensors with sparse weights ({validation.shown(sparse)})"
        raise refused(where, found, "a dense layout", what_to_do)


def dense_layers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the names of layers that stay dense."""
    lists = [config.get(name) or () for name in ("ignore", "modules_to_not_convert", "exclude_modules")]
    return tuple(pattern for patterns in lists for pattern in patterns)


def damaged(name: str, what: str, kind: str = "int4") -> CheckpointError:
    """Return the error for a weight of a layer that is not as its layout says."""
    return CheckpointError(f"the {kind} weight '{name}' {what}. The checkpoint is damaged or has another format")
