"""`After`: an adapter follows a module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from peftcore.plugin.link import Link
from peftcore.plugin.outputs import first_of, with_first
from peftcore.plugin.placements.placement import AtModule


class AfterLink(Link):
    """One adapter after the links inside."""

    __slots__ = ()
    follows = True

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._base(*args, **kwargs)
        return with_first(output, self._adapter(first_of(output)))


@dataclass(frozen=True, slots=True)
class After(AtModule):
    """Placement after a module: `adapter(y) -> y` changes its output, or the first element of a tuple."""

    path: str
    adapter: nn.Module
    link = AfterLink
