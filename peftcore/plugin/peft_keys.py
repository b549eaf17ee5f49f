"""Hugging Face PEFT's names of tensors in `adapter_model.safetensors`.

    tensor `scale` of an adapter at `layers.0.q_proj`    base_model.model.layers.0.q_proj.scale
    trained parameter `norm.weight` of the base          base_model.model.norm.weight
    the same, if an adapter is around `norm`             base_model.model.norm.base_layer.weight
    vectors of a prompt                                  prompt_embeddings

`Placement.tensor_name` names the tensors of a kind of placement, and `StateRules.tensor_name` those of a method.
"""

from __future__ import annotations

from typing import Protocol

# PEFT wraps the model twice: `PeftModel.base_model` is a tuner, and `model` in it the user's model.
PREFIX = "base_model.model."


def key_in_model(path: str, name: str) -> str:
    """Return the key of the tensor `name` of an adapter at `path` ("" for the model itself)."""
    return f"{PREFIX}{path}.{name}" if path else PREFIX + name


def key_of_trained(name: str, *, adapted: bool) -> str:
    """Return the key of the base parameter `name`, without PEFT's prefix.

    Args:
        name: name in the base.
        adapted: whether the adapter is also attached to the parameter's module, which PEFT then stores as `base_layer`.
    """
    path, _, attribute = name.rpartition(".")
    return f"{path}.base_layer.{attribute}" if adapted else name


def name_in_base(key: str) -> str:
    """Return the base's name for a parameter that is stored under `key`."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


class NamesTensors(Protocol):
    """The members of a `Placement` that the names on disk depend on."""

    @property
    def has_adapter(self) -> bool: ...

    def tensor_name(self, name: str) -> str: ...


def tensor_name(placement: NamesTensors, name: str) -> str:
    """Return the name on disk of the tensor `name` of a placement, in Hugging Face PEFT's format.

    `base_model.model.` + module path + name; for the vectors of a prompt, only the name.
    """
    return placement.tensor_name(name)


def prompt_tensor_name(placement: NamesTensors, name: str) -> str:
    """Return the name on disk like `tensor_name`, for prompts and prefixes, where PEFT has one wrapper less."""
    return name if placement.has_adapter else f"base_model.{name}"
