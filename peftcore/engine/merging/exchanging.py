"""The record of a merge, and exchanges of a model's tensors that can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.engine.changes import module_at
from peftcore.model.detecting import mark_as_loaded
from peftcore.plugin import ranks
from peftcore.plugin.method import WeightFormat


@dataclass
class Merged:
    """State for `unmerge`: the adapters that were active, and the original tensors by name."""

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None  # the model config's tie_word_embeddings, if merging untied them
    lost: dict[str, float] = field(default_factory=dict)  # by path, for quantized weights
    written: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)  # the merged tensors
    unpacked: tuple[WeightFormat, ...] = ()  # formats of quantized weights that dense ones replace
    stopped: str = ""  # where a merge that cannot be undone was interrupted

    @property
    def why(self) -> str:
        """Why other functions refuse the model, and what to do."""
        if not self.stopped:
            return "adapters are merged into the base. First peftcore.unmerge(model)"
        return (
            f"merging was interrupted after {self.stopped} layers, whose original weights are not kept. Load the base "
            "and the adapters again, and merge again"
        )


class Exchange:
    """Exchanges of parameters and buffers of a model.

    Args:
        model: the model.

    Attributes:
        aside: the original tensors, by name.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.aside: dict[str, Tensor] = {}
        self._before: list[tuple[dict[str, Any], str, Any]] = []

    def put(self, name: str, tensor: Tensor) -> None:
        """Replace the parameter or buffer `name` by `tensor`."""
        path, _, attribute = name.rpartition(".")
        module = self.model.get_submodule(path)
        before: Tensor = ranks.behind(getattr(module, attribute))
        self.aside.setdefault(name, before)
        held = getattr(module, "held_part", None) if attribute == "weight" else None
        table: dict[str, Any] = module._parameters if attribute in module._parameters else module._buffers
        if table is module._parameters:
            if held is not None:
                if tensor.is_floating_point() and not ranks.is_dtensor(tensor):
                    tensor = held.dtensor(held.of(tensor))
            elif ranks.is_dtensor(before) and not ranks.is_dtensor(tensor):
                tensor = ranks.divided_as(tensor, before)
            if not isinstance(tensor, nn.Parameter):
                tensor = nn.Parameter(tensor, requires_grad=False)
            mark_as_loaded(tensor, before)
        self._before.append((table, attribute, table.get(attribute)))
        table[attribute] = tensor

    def undo(self) -> None:
        """Put the tensors back that were there before."""
        for table, attribute, tensor in reversed(self._before):
            table[attribute] = tensor


def get(model: nn.Module, name: str) -> Any:
    """Return a parameter or buffer by name, or None if it or its module does not exist."""
    path, _, attribute = name.rpartition(".")
    return getattr(module_at(model, path), attribute, None)
