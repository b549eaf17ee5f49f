"""`SoftPrompt`: vectors before the input."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from peftcore.errors import PeftcoreError
from peftcore.plugin.call import arguments_read
from peftcore.plugin.placements.placement import Placement

if TYPE_CHECKING:
    from peftcore.plugin.architecture import Architecture
    from peftcore.plugin.placements.placement import Attachments


@dataclass(frozen=True)
class SoftPrompt(Placement):
    """Placement before the input: `adapter() -> [tokens, hidden]` precedes the embedded input of the backbone.

    An adapter that depends on the call (`Adapter.needs_call`) returns `[batch, tokens, hidden]`, or `[1, tokens,
    hidden]` for all rows.

    The output at the prompt's positions is removed. If the adapter's `in_output` returns True, the prompt comes first,
    even before padding, and its hidden states stay in the output of the model. The method must remove them with an
    `Around("", ...)`.

    Args:
        adapter: the adapter.
        shape: (tokens, hidden). Required if the adapter depends on the call, since it cannot be called in advance.
    """

    adapter: nn.Module
    shape: tuple[int, int] | None = None
    whole_model = True

    def attach(self, to: Attachments) -> None:
        to.prompt(self, self._known_shape())

    def _known_shape(self) -> tuple[int, int] | None:
        """Return the shape of one row if the adapter cannot be called to determine it."""
        if arguments_read([self.adapter]) is None:
            return None
        if self.shape is None:
            raise PeftcoreError(
                f"{type(self.adapter).__name__} depends on the call (needs_call), so its shape cannot be determined "
                "in advance. Pass the shape to the placement: SoftPrompt(adapter, shape=(tokens, hidden))"
            )
        return self.shape

    def divided(self, path: str, parameters: Sequence[str], divided: Collection[str]) -> None:
        """Return None: the prompt is prepended to token embeddings, which are not sharded."""

    def peft_tasks(self, architecture: Architecture) -> Sequence[str]:
        # PEFT puts prompts into the encoder of an encoder-decoder only.
        return ("CAUSAL_LM",) if architecture.is_encoder_decoder else ("CAUSAL_LM", "FEATURE_EXTRACTION")
