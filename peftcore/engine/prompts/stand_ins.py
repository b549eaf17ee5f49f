"""Stand-in tokens for a soft prompt, which the token embedding replaces by the prompt's vectors.

    input_ids   s …  s   x_1 …        s is an ordinary token
    embedded    p_1 … p_n  E(x_1) …

So everything else a model computes from its tokens fits the prompt: masks and positions of images, tables for each
layer, routing, the place of padding. A compiled graph, which cannot express this, puts the prompt before the embedded
input if that is equivalent.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore.plugin.adapter import Adapter, Base

_ENTERED = threading.local()  # {id of a backbone: prompts waiting for its token embedding}, in each thread


@dataclass
class Waiting:
    """Prompts between a backbone's call and its token embedding, and the number of columns they are in."""

    prompts: list[tuple[Tensor, Tensor]]  # places [batch, tokens], vectors [tokens, hidden] or [batch or 1, ...]
    columns: int = 0


@contextmanager
def entering(backbone: nn.Module) -> Iterator[Waiting]:
    """Make the token embedding of `backbone` insert the prompts added within the block; blocks may be nested.

    Raises:
        PeftcoreError: the token embedding was not called with the expected columns.
    """
    entered: dict[Any, Waiting] = _ENTERED.__dict__
    if id(backbone) in entered:
        yield entered[id(backbone)]
        return
    waiting = entered[id(backbone)] = Waiting([])
    try:
        yield waiting
    finally:
        del entered[id(backbone)]
    if waiting.prompts:
        raise PeftcoreError(
            f"{type(backbone).__name__} did not call its token embedding with its tokens, so a soft prompt had "
            "no effect. Pass inputs_embeds to the model, or use another method"
        )


class StandIns(Adapter):
    """Adapter around the token embedding that replaces stand-ins by the vectors of waiting prompts."""

    whole_batch = True

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self._backbone = (backbone,)  # not a child of this module

    def forward(self, base: Base, tokens: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        embedded = base(tokens, *args, **kwargs)
        entered: dict[Any, Waiting] = _ENTERED.__dict__
        waiting = entered.get(id(self._backbone[0]))
        if waiting is None or not waiting.prompts or embedded.shape[1:2] != (waiting.columns,):
            return embedded
        for places, vectors in waiting.prompts:
            rows = vectors.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
            embedded = embedded.scatter(1, places[..., None].expand(rows.shape), rows)
        waiting.prompts.clear()
        return embedded


def ordinary_token(config: Any) -> int:
    """Return the first token id that no config inside `config` names, such as padding or an image."""
    special: set[int] = set()
    queue = [config]
    while queue:
        for name, value in vars(queue.pop()).items():
            if hasattr(value, "to_dict"):
                queue.append(value)
            elif name.endswith(("token_id", "token_index", "token_ids")):
                special.update(v for v in (value if isinstance(value, (list, tuple)) else [value]) if v is not None)
    return next(token for token in range(len(special) + 1) if token not in special)


def places(order: Tensor | None, tokens: int, batch: int, device: torch.device) -> Tensor:
    """Return `[batch, tokens]`: where the first `tokens` columns are in rows of the order `order`."""
    first = torch.arange(tokens, device=device).expand(batch, -1)
    return first if order is None else order.argsort(-1)[:, :tokens]
