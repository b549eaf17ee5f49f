"""`load_state_dict` of a model with adapters takes a checkpoint of its base."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from peftcore.engine.state import state_of
from peftcore.model.base_modules import CHILD


def accept_base_checkpoints(model: nn.Module) -> RemovableHandle:
    """Let `model.load_state_dict(base_state_dict)` leave the adapters as they are, strictly loaded or not."""
    return model.register_load_state_dict_pre_hook(_add_adapters)


def _add_adapters(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Add the adapters' present values to a checkpoint that has none.

    PyTorch still reports them as missing where the base's own weights are replaced: by merged or trained ones, which
    the checkpoint would overwrite.
    """
    state = state_of(model)
    if state is None or state.merged is not None or any(entry.trained for entry in state.applied.values()):
        return
    if any(_is_of_adapter(key) for key in state_dict):
        return
    own = model.state_dict(prefix=prefix, keep_vars=True)
    state_dict.update((key, value) for key, value in own.items() if _is_of_adapter(key))


def _is_of_adapter(key: str) -> bool:
    return CHILD in key.split(".")
