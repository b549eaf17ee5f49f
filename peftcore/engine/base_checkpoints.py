"""Load checkpoints of the base by `load_state_dict` into a model with adapters."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from peftcore.engine.state import state_of
from peftcore.model.base_modules import CHILD


def accept_base_checkpoints(model: nn.Module) -> RemovableHandle:
    """Make `model.load_state_dict` accept a state dict of the base, also with `strict=True`; adapters are unchanged."""
    return model.register_load_state_dict_pre_hook(_add_adapters)


def _add_adapters(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the adapters' current values to a checkpoint without adapters.

    While merged or trained weights replace the base's, nothing is added: the checkpoint would overwrite these weights,
    so PyTorch is left to report the adapters' keys as missing.
    """
    state = state_of(model)
    if state is None or state.merged is not None or any(entry.trained for entry in state.applied.values()):
        return
    if any(_is_of_adapter(key) for key in state_dict):
        return
    present_values = model.state_dict(prefix=prefix, keep_vars=True)
    state_dict.update((key, value) for key, value in present_values.items() if _is_of_adapter(key))


def _is_of_adapter(key: str) -> bool:
    return CHILD in key.split(".")
