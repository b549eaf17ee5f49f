"""Parsing of the `quantization_config` in a model's config.json, and the errors that all readers raise.

Two errors have a builder here, so that all readers word them alike: `unsupported_error` for a config that no reader
supports, and `damaged_error` for tensors that do not match their config.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from peftcore.plugin import CheckpointError, PeftcoreError, validation

INT4_ADVICE = "Use a 4-bit checkpoint of the model, or the dense checkpoint"


def unsupported_error(checkpoint: str, problem: str, supported: str, advice: str) -> PeftcoreError:
    """Build the error for an unsupported layout, such as `problem="GPTQ in 3 bits", supported="4 bits"`."""
    return PeftcoreError(f"'{checkpoint}' is quantized with {problem}, but only {supported} can be read. {advice}")


def check_bits(config: Mapping[str, Any], checkpoint: str, tool: str) -> None:
    """Raise a PeftcoreError if a config of GPTQ or AWQ does not specify 4 bits."""
    bits = config.get("bits", config.get("w_bit"))
    if bits != 4:
        raise unsupported_error(checkpoint, f"{tool} in {validation.shown(bits)} bits", "4 bits", INT4_ADVICE)


def read_object(config: Mapping[str, Any], key: str, checkpoint: str) -> Mapping[str, Any]:
    """Return the JSON object `key` of a `quantization_config`; {} if it is missing.

    Raises:
        PeftcoreError: the value is not an object.
    """
    value = config.get(key) or {}
    if not isinstance(value, Mapping):
        raise PeftcoreError(f"'{checkpoint}' has {key}={validation.shown(value)} in its config, expected an object")
    return value


def config_groups(config: Mapping[str, Any], checkpoint: str) -> dict[str, tuple[Mapping[str, Any], Mapping[str, Any]]]:
    """Return {name: (group, the group's `weights`)} for the `config_groups` of a `quantization_config`.

    Raises:
        PeftcoreError: a group is not an object, for example only the name of a preset.
    """
    groups = read_object(config, "config_groups", checkpoint)
    group_objects = {name: read_object(groups, name, checkpoint) for name in groups}
    return {name: (group, read_object(group, "weights", checkpoint)) for name, group in group_objects.items()}


def refuse_transforms(config: Mapping[str, Any], checkpoint: str, advice: str) -> None:
    """Raise a PeftcoreError if a checkpoint of compressed-tensors transforms activations or has sparse weights."""
    if config.get("transform_config"):
        problem = "compressed-tensors with transforms of the activations"
        raise unsupported_error(checkpoint, problem, "a model without them", advice)
    sparse = read_object(config, "sparsity_config", checkpoint).get("format", "dense")
    if sparse != "dense":
        problem = f"compressed-tensors with sparse weights ({validation.shown(sparse)})"
        raise unsupported_error(checkpoint, problem, "a dense layout", advice)


def dense_layers(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the patterns of layers that stay dense."""
    patterns: list[str] = []
    for field in ("ignore", "modules_to_not_convert", "exclude_modules"):  # each tool has its own name
        patterns += config.get(field) or ()
    return tuple(patterns)


def damaged_error(name: str, problem: str, kind: str = "int4") -> CheckpointError:
    """Build the error for a weight whose tensors do not fit the layout."""
    return CheckpointError(f"the {kind} weight '{name}' {problem}. The checkpoint is damaged or has another format")
