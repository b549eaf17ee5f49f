"""`PrefixKV`: keys and values in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from peftcore.placements.placement import Placement
from peftcore.prompts import checked_shape
from peftcore.prompts.prefix import place_prefix

if TYPE_CHECKING:
    from peftcore.architecture import Architecture
    from peftcore.placements.attachments import Attachments

_DIMENSIONS = ("layers", "2", "kv_heads", "tokens", "head_dim")


@dataclass(frozen=True)
class PrefixKV(Placement):
    """Placement in the cache: `adapter() -> [layers, 2, kv_heads, tokens, head_dim]` are its first keys and values."""

    adapter: nn.Module
    whole_model = True

    def attach(self, to: Attachments) -> None:
        shape = checked_shape(to.model, to.architecture, self, _DIMENSIONS)
        for path, adapter in place_prefix(to.model, to.architecture, self.adapter, shape):
            to.wrap(self, path, adapter)

    def peft_tasks(self, architecture: Architecture) -> Sequence[str]:
        return "CAUSAL_LM", "FEATURE_EXTRACTION"
