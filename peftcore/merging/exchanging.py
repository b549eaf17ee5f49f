"""The record of a merge, and exchanges of a model's tensors that can be undone."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from peftcore import ranks
from peftcore.engine.changes import module_at
from peftcore.method import WeightFormat
from peftcore.observation.detecting import mark_as_loaded


@dataclass
class Unfinished:
    """What a merge without `unmerge` needs to go on after an interruption.

    Layers in `done` run without their adapters, so the model computes what it computed before.

    Args:
        dtype: that of dense weights in place of quantized ones, see `merge`.
        layers: the number of layers to merge.
        alike: names of parameters that stay tied, see `changed_alike`.
        tied: weights that merging unties, see `tied_weights`.
        done: paths of the merged layers.
        shared: merged parameters of `alike`, by the first name.
        unpacked: formats of quantized weights that dense ones replace, by path.
        removing: whether all layers are merged.
    """

    dtype: torch.dtype | None
    layers: int
    alike: list[list[str]]
    tied: list[tuple[str, str]]
    done: dict[str, None] = field(default_factory=dict)
    shared: dict[str, Tensor] = field(default_factory=dict)
    unpacked: dict[str, WeightFormat] = field(default_factory=dict)
    removing: bool = False

    @property
    def call(self) -> str:
        """The call that goes on."""
        dtype = "" if self.dtype is None else f", dtype={self.dtype}"
        return f"peftcore.merge(model, keep_adapters=False{dtype})"


@dataclass
class Merged:
    """State for `unmerge`: the adapters that were active, and the original tensors by name."""

    active: tuple[str, ...]
    aside: dict[str, Tensor] = field(default_factory=dict)
    tied: bool | None = None  # the model config's tie_word_embeddings, if merging untied them
    lost: dict[str, float] = field(default_factory=dict)  # by path, for quantized weights
    written: dict[str, tuple[torch.Size, torch.dtype]] = field(default_factory=dict)  # the merged tensors
    unpacked: tuple[WeightFormat, ...] = ()  # formats of quantized weights that dense ones replace
    unfinished: Unfinished | None = None  # of an interrupted merge, which cannot be undone

    @property
    def why(self) -> str:
        """Why other functions refuse the model, and what to do."""
        if self.unfinished is None:
            return "adapters are merged into the base. First peftcore.unmerge(model)"
        return (
            f"merging was interrupted after {len(self.unfinished.done)} of {self.unfinished.layers} layers, whose "
            f"original weights are not kept. First {self.unfinished.call}, which merges the rest"
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
