"""Count the positions of tokens in their texts: cached tokens count, padding and prefixes do not.

    Around(path, TokenCounter(...))      around the model, or a stack of an encoder-decoder: sees a call before any
                                         layer adds to its cache
    counter.places(y)                    for an adapter behind a layer, y [batch, tokens, width]

A recurrent cache does not contain tokens, so the counter stores the count as an attribute of the cache. If a call has
neither a mask nor a cache, its `position_ids` show where texts begin.
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

# Arguments for state of earlier calls other than a transformers `Cache`; their number of tokens is unknown.
OTHER_CACHES = ("past_key_values", "cache_params", "state", "mems", "past_buckets_states")
_COUNTS = "_peftcore_counted"  # attribute of a cache: `_TokenCounts`
_COUNTED_STACKS = "counted_stacks"  # attribute of a call: its facts and places, by stack


class Places(NamedTuple):
    """Positions of tokens in their texts, `[batch, tokens]` each.

    Args:
        place: 1-based position of each token in its text.
        is_text: False for padding.
        length: number of tokens of the text in this call; 0 for a text that began in an earlier call.
        begins: whether a new text begins at a token, without the first column. None if each row is one text.
    """

    place: Tensor
    is_text: Tensor
    length: Tensor
    begins: Tensor | None

    def packed(self) -> bool:
        """Return whether a row contains several texts."""
        return self.begins is not None and bool(self.begins.any())


class _TokenCounts(NamedTuple):
    """Number of tokens in a cache: per row including padding, and per text without padding, `[batch]`."""

    tokens: int
    text: Tensor


class _InputFacts(NamedTuple):
    """Arguments of a call that describe its tokens.

    Args:
        starts: where packed texts begin, as `text_starts` returns it.
        past: number of tokens in the cache; None if unknown.
        counts: counts stored on the cache by an earlier call.
    """

    mask: Any
    positions: Any
    starts: Tensor | None
    past: int | None
    counts: _TokenCounts | None


class TokenCounter(Adapter):
    """Adapter that counts tokens and returns the output unchanged.

    Args:
        module: the module that the adapter is around.
        stack: "encoder" or "decoder" to read the arguments of that stack; "" to read the arguments of the model's call.
        subject: name of the method, for error messages.
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
        call, own_arguments = current_call(), arguments_by_name(self._names, args, kwargs)
        places_by_size: dict[Any, Places] = {}
        input_facts = self._facts_of(own_arguments if self.stack else call)
        # getattr and setattr: Dynamo of PyTorch 2.9 does not trace methods of `vars(call)`.
        counted_stacks = getattr(call, _COUNTED_STACKS, {})
        setattr(call, _COUNTED_STACKS, {**counted_stacks, self.stack: (input_facts, places_by_size)})
        output = base(*args, **kwargs)
        output_values: Iterable[Any] = output if isinstance(output, tuple) else ()
        if isinstance(output, Mapping):
            output_values = output.values()
        cache = _cache(own_arguments.values()) or _cache(call.values()) or _cache(output_values)
        if places_by_size and cache is not None and self.stack != "encoder":
            places = next(iter(places_by_size.values()))
            setattr(cache, _COUNTS, _TokenCounts((input_facts.past or 0) + places.place.shape[1], places.place[:, -1]))
        return output

    def places(self, y: Tensor) -> Places:
        """Return the positions of the tokens in `y [batch, tokens, width]`, the output of a layer inside the module.

        Raises:
            PeftcoreError: a prompt precedes the input, or the call does not show which tokens are text.
        """
        call = current_call()
        self._require(
            not getattr(call, SOFT, False), "a soft prompt precedes the input. Activate only one of the two adapters"
        )
        counts_by_stack: dict[str, tuple[_InputFacts, dict[Any, Places]]] = getattr(call, _COUNTED_STACKS, {})
        if self.stack in counts_by_stack:
            input_facts, places_by_size = counts_by_stack[self.stack]
        else:
            input_facts, places_by_size = self._facts_of(call), {}
            # If a submodule is called directly, its layers may already have added this call's tokens to the cache.
            if input_facts.past != 0:
                input_facts = input_facts._replace(past=None, counts=None)
        key = y.shape[1], y.device
        if key not in places_by_size:
            places_by_size[key] = self._count(y, input_facts)
        return places_by_size[key]

    def _facts_of(self, call: Mapping[str, Any]) -> _InputFacts:
        """Return the arguments that describe the tokens of a call of the model or of a stack."""
        cache = None if self.stack == "encoder" else _cache(call.values())
        past, counts = (0, None) if cache is None else (cached_tokens(cache), getattr(cache, _COUNTS, None))
        if any(call.get(name) is not None and call[name] is not cache for name in OTHER_CACHES):
            past = None
        mask = call.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and self.stack == "decoder":
            mask = mask[:, getattr(cache, IN_MASK, 0) :]
        return _InputFacts(mask, call.get("position_ids"), text_starts(call), past, counts)

    def _count(self, y: Tensor, input_facts: _InputFacts) -> Places:
        expected = f"the output must be [batch, tokens, width], found {list(y.shape)}"
        self._require(y.dim() == 3, expected)
        rows, tokens = y.shape[:2]
        mask, past, counts = input_facts.mask, input_facts.past, input_facts.counts
        if counts is not None and counts.tokens != past:  # the cache was cropped
            counts = None
        if mask is None:
            unknown = "the number of tokens in the cache is unknown. Pass an attention_mask that covers all tokens"
            self._require(past is not None and (counts is None or len(counts.text) == rows), unknown)
            return self._without_mask(y, input_facts._replace(counts=counts), cast(int, past))
        shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        fits = isinstance(mask, Tensor) and mask.dim() == 2 and len(mask) in (1, rows) and mask.shape[1] >= tokens
        self._require(
            fits, f"the attention mask must be [batch, all tokens], found {shape}. Generate with the dynamic cache"
        )
        width = mask.shape[1]
        is_text = mask.to(y.device) != 0
        place = is_text.long().cumsum(1)[:, -tokens:]
        is_text = is_text[:, -tokens:]
        if width == tokens and past != 0:  # for this call only
            problem = (
                f"the mask covers only the {width} new tokens. Pass an attention_mask that also covers the earlier "
                "tokens"
            )
            self._require(counts is not None and len(counts.text) == rows, problem)
            place = place + cast(_TokenCounts, counts).text[:, None].to(y.device)
        else:
            problem = (
                f"the mask has {width} columns for {past} tokens in the cache and {tokens} new tokens. Pass an "
                "attention_mask that covers all tokens"
            )
            self._require(past is None or width == past + tokens, problem)
        length = torch.zeros_like(place) if past != 0 or width > tokens else place[:, -1:].expand_as(place)
        return Places(place, is_text, length, None)

    def _without_mask(self, y: Tensor, input_facts: _InputFacts, past: int) -> Places:
        rows, tokens = y.shape[:2]
        positions, starts, counts = input_facts.positions, input_facts.starts, input_facts.counts
        is_text = torch.ones(rows, tokens, dtype=torch.bool, device=y.device)
        place = torch.arange(1, tokens + 1, device=y.device).expand(rows, -1)
        if past:
            earlier_tokens = past if counts is None else counts.text[:, None].to(y.device)
            return Places(place + earlier_tokens, is_text, torch.zeros_like(place), None)
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

    def _require(self, condition: bool, problem: str) -> None:
        if not condition:
            raise PeftcoreError(f"{self.subject} counts the tokens of each text, which is not possible here: {problem}")


def cached_tokens(cache: Any) -> int | None:
    """Return the number of tokens in a cache, excluding prefixes; None for a recurrent cache without a count."""
    try:
        length = int(cache.get_seq_length())
    except (ValueError, AttributeError):  # only recurrent layers
        if hasattr(cache, "has_previous_state") and not cache.has_previous_state():
            return 0
        counts = getattr(cache, _COUNTS, None)
        return None if counts is None else counts.tokens
    return length - getattr(cache, IN_CACHE, 0) if length else 0


def _cache(values: Iterable[Any]) -> Any:
    # Dynamo of PyTorch 2.9 cannot search the name of a builtin class.
    values = [value for value in values if not isinstance(value, (int, float, str))]
    return next((value for value in values if "Cache" in type(value).__name__), None)
