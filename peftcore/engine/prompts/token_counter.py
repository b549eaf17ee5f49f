"""Count which token of its text each token of a call is, without padding and prefixes, but with cached tokens.

    Around(path, TokenCounter(...))      around the model, or a stack of an encoder-decoder: sees a call before any
                                         layer adds to its cache
    counter.places(y)                    for an adapter behind a layer, y [batch, tokens, width]

The cache of a recurrence holds no tokens, so the count is stored on the cache. If a call has neither a mask nor a
cache, its positions show where texts begin.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.engine.prompts.backbone import (
    IN_CACHE,
    IN_MASK,
    SOFT,
    arguments_by_name,
    first_position,
    forward_arguments,
    text_starts,
)
from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.call import current_call

# State of earlier calls that is not a transformers `Cache`: how many tokens it has read is not known.
OTHER_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_COUNTED = "_peftcore_counted"  # attribute of a cache: `_Counted`


class Places(NamedTuple):
    """Positions of tokens in their texts, `[batch, tokens]` each.

    Args:
        place: position of each token in its text, from 1.
        is_text: False for padding.
        length: tokens of the text, as far as this call has them; 0 for a text that began in an earlier call.
        begins: tokens, except the first, at which another text begins; None if each row is one text.
    """

    place: Tensor
    is_text: Tensor
    length: Tensor
    begins: Tensor | None

    def packed(self) -> bool:
        """Return whether a row has several texts."""
        return self.begins is not None and bool(self.begins.any())


class _Counted(NamedTuple):
    """Tokens of each row that a cache has read: with padding, and without `[batch]`."""

    tokens: int
    text: Tensor


class _Given(NamedTuple):
    """What a call says of its tokens. past: how many its cache has read, None if unknown; starts: of packed texts."""

    mask: Any
    positions: Any
    starts: Tensor | None
    past: int | None
    noted: _Counted | None


class TokenCounter(Adapter):
    """Adapter that changes nothing and counts tokens.

    Args:
        module: the module it is around.
        stack: "encoder" or "decoder", whose own arguments are read; "" for those of the whole call.
        subject: whose adapters ask, for errors.
    """

    needs_call = True
    whole_batch = True

    def __init__(self, module: nn.Module, stack: str, subject: str) -> None:
        super().__init__()
        self.stack, self.subject = stack, subject
        self._names = forward_arguments(module)
        self._first = first_position(module)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        ranks.refuse_context_parallel(self.subject)
        call, own = current_call(), arguments_by_name(self._names, args, kwargs)
        known: dict[Any, Places] = {}
        vars(call).setdefault("counted", {})[self.stack] = self._given(own if self.stack else call), known
        output = base(*args, **kwargs)
        made = output.values() if isinstance(output, Mapping) else output if isinstance(output, tuple) else ()
        cache = _cache(own.values()) or _cache(call.values()) or _cache(made)
        if known and cache is not None and self.stack != "encoder":
            places = next(iter(known.values()))
            given = vars(call)["counted"][self.stack][0]
            setattr(cache, _COUNTED, _Counted((given.past or 0) + places.place.shape[1], places.place[:, -1]))
        return output

    def places(self, y: Tensor) -> Places:
        """Return the positions of the tokens of `y [batch, tokens, width]`, an output of a layer inside.

        Raises:
            PeftcoreError: a prompt is before the input, or the call does not show which of its tokens are text.
        """
        call = current_call()
        self._require(
            not vars(call).get(SOFT), "a soft prompt is before the input. Activate only one of the two adapters"
        )
        counted: dict[str, tuple[_Given, dict[Any, Places]]] = vars(call).get("counted", {})
        if self.stack in counted:
            given, known = counted[self.stack]
        else:
            given, known = self._given(call), {}
            if given.past != 0:  # a part was called directly, and its layers may have added this call's tokens
                given = given._replace(past=None, noted=None)
        key = y.shape[1], y.device
        if key not in known:
            known[key] = self._counted(y, given)
        return known[key]

    def _given(self, call: Mapping[str, Any]) -> _Given:
        """Return what the arguments of a call of the model, or of a stack, say."""
        cache = None if self.stack == "encoder" else _cache(call.values())
        past, noted = (0, None) if cache is None else (cached_tokens(cache), getattr(cache, _COUNTED, None))
        if any(call.get(name) is not None and call[name] is not cache for name in OTHER_CACHES):
            past = None
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and self.stack == "decoder":
            mask = mask[:, getattr(cache, IN_MASK, 0) :]
        return _Given(mask, call.get("position_ids"), text_starts(call), past, noted)

    def _counted(self, y: Tensor, given: _Given) -> Places:
        wanted = f"[batch, tokens, width] is needed, found {list(y.shape)}"
        self._require(y.dim() == 3, wanted)
        rows, tokens = y.shape[:2]
        mask, past, noted = given.mask, given.past, given.noted
        if noted is not None and noted.tokens != past:  # the cache was cropped
            noted = None
        if mask is None:
            unknown = "the cache does not say how many tokens it has read. Pass the whole attention_mask"
            self._require(past is not None and (noted is None or len(noted.text) == rows), unknown)
            return self._without_mask(y, given._replace(noted=noted), cast(int, past))
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) in (1, rows) and mask.shape[1] >= tokens
        self._require(fits, f"{wanted}, and a mask [batch, all tokens], found {shape}. Generate with the dynamic cache")
        width = mask.shape[1]
        is_text = mask.to(y.device) != 0
        place = is_text.long().cumsum(1)[:, -tokens:]
        is_text = is_text[:, -tokens:]
        if width == tokens and past != 0:  # for this call only
            found = f"the mask covers only these {width} tokens. Pass one that also covers those before them"
            self._require(noted is not None and len(noted.text) == rows, found)
            place = place + cast(_Counted, noted).text[:, None].to(y.device)
        else:
            found = f"{past} tokens are in the cache, {tokens} are new, and the mask has {width}"
            self._require(past is None or width == past + tokens, found)
        length = torch.zeros_like(place) if past != 0 or width > tokens else place[:, -1:].expand_as(place)
        return Places(place, is_text, length, None)

    def _without_mask(self, y: Tensor, given: _Given, past: int) -> Places:
        rows, tokens = y.shape[:2]
        positions, starts, noted = given.positions, given.starts, given.noted
        is_text = torch.ones(rows, tokens, dtype=torch.bool, device=y.device)
        place = torch.arange(1, tokens + 1, device=y.device).expand(rows, -1)
        if past:
            before = past if noted is None else noted.text[:, None].to(y.device)
            return Places(place + before, is_text, torch.zeros_like(place), None)
        if starts is None or starts.shape[1] != tokens:
            return Places(place, is_text, place[:, -1:].expand_as(place), None)
        begins = starts.to(y.device).expand(rows, -1)
        index = torch.arange(tokens, device=y.device).expand(rows, -1)
        start = torch.where(begins, index, 0).cummax(1).values
        if isinstance(positions, Tensor) and positions.dim() == 2:
            place = (positions.to(y.device) - self._first + 1).expand(rows, -1)
        else:
            place = index - start + 1
        ends = F.pad(begins[:, 1:], (0, 1), value=True)
        end = torch.where(ends, index, tokens).flip(1).cummin(1).values.flip(1)
        length = torch.where(place.gather(1, start) > 1, 0, place.gather(1, end))
        return Places(place, is_text, length, begins[:, 1:])

    def _require(self, condition: bool, found: str) -> None:
        if not condition:
            raise PeftcoreError(f"{self.subject} counts the tokens of each text and cannot count these: {found}")


def cached_tokens(cache: Any) -> int | None:
    """Return how many tokens a cache has read, without prefixes; None for a recurrence that did not count them."""
    try:
        length = int(cache.get_seq_length())
    except (ValueError, AttributeError):  # only recurrent layers
        if hasattr(cache, "has_previous_state") and not cache.has_previous_state():
            return 0
        noted = getattr(cache, _COUNTED, None)
        return None if noted is None else noted.tokens
    return length - getattr(cache, IN_CACHE, 0) if length else 0


def _cache(values: Iterable[Any]) -> Any:
    return next((value for value in values if "Cache" in type(value).__name__), None)
