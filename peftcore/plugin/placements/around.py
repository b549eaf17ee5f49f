"""`Around`: an adapter wraps a module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from peftcore.plugin.placements.placement import AtModule


@dataclass(frozen=True, slots=True)
class Around(AtModule):
    """Placement around a module: `adapter(base, *args, **kwargs) -> output` replaces its forward.

    `base` is a `Base`: `base(*args, **kwargs)` calls the module with the adapters inside this one. The adapter can be
    merged if it has `merged`, see `Adapter`.

    Args:
        path: path of the module; "" for the model itself.
        adapter: the adapter.
        branches: names of other adapters of the module that this adapter combines. Its `base` is a `BranchedBase`:
            `base.branch(name)(*args, **kwargs)` runs only that adapter, around the module's own forward (`base.own`).
            While this adapter is active, the branches are only applied through it.
    """

    path: str
    adapter: nn.Module
    branches: Sequence[str] = ()
