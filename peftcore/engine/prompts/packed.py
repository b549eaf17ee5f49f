"""Rows into which several texts are packed, with positions that start again at each, as transformers separates them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from peftcore.errors import PeftcoreError


def text_starts(call: Mapping[str, Any]) -> Tensor | None:
    """Return the tokens at which texts begin, bool `[batch or 1, tokens]`; None if each row is one text.

    In a call with a mask `[batch, tokens]`, rows are not packed. Without one, a text begins where `position_ids` do not
    count on, or, if these are missing, where `cu_seq_lens_q` says.

    Args:
        call: arguments of the model or its backbone by name.
    """
    mask, positions, ends = (call.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return None
    if isinstance(positions, Tensor) and positions.dim() in (2, 3):
        # Of positions with an axis per coordinate, the first is constant within an image.
        begins = positions.diff(dim=-1) != 1 if positions.dim() == 2 else positions[0].diff(dim=-1) < 0
        return F.pad(begins, (1, 0), value=True)
    given = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
    if not isinstance(ends, Tensor) or not isinstance(given, Tensor):
        return None
    return torch.isin(torch.arange(given.shape[1], device=ends.device), ends)[None]


def refuse_packed(call: Mapping[str, Any], why: str) -> None:
    """Raise an error if rows of this call have several texts; in a compiled graph, an assertion raises it.

    Args:
        call: arguments of the model or its backbone by name.
        why: what a packed row would do, a clause.

    Raises:
        PeftcoreError: a row has several texts.
    """
    message = (
        f"a row packs several examples, as its position_ids or cu_seq_lens say, and {why}. Give each example its own "
        "row, in TRL by packing=False and padding_free=False"
    )
    starts, mask = text_starts(call), call.get("attention_mask")
    ends = [value for name, value in call.items() if value is not None and name.startswith("cu_seq")]
    if mask is None and any(isinstance(each, Tensor) and len(each) > 2 for each in ends):
        raise PeftcoreError(message)
    if starts is None or torch.compiler.is_exporting():
        return
    several = starts[:, 1:].any()
    if torch.compiler.is_compiling():
        torch._assert_async(~several, message)
    elif type(several) is Tensor and not several.is_meta and several:  # others have no values
        raise PeftcoreError(message)
