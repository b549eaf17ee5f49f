"""`PrefixKV`: keys and values in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from peftcore.plugin.placements.placement import Placement

if TYPE_CHECKING:
    from peftcore.plugin.architecture import Architecture
    from peftcore.plugin.placements.placement import Attachments


@dataclass(frozen=True)
class PrefixKV(Placement):
    """Placement in the cache: `adapter() -> [layers, 2, kv_heads, tokens, head_dim]` returns its first entries."""

    adapter: nn.Module
    whole_model = True

    def attach(self, to: Attachments) -> None:
        to.prefix(self)

    def peft_tasks(self, architecture: Architecture) -> Sequence[str]:
        return "CAUSAL_LM", "FEATURE_EXTRACTION"
