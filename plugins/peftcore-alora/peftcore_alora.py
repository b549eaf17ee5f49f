"""Activated LoRA (Greenewald et al. 2025, arXiv 2504.12397): a LoRA that switches on at an invocation in the text.

    y_t = W x_t + scale · B A x_t     from the first token of the row's last invocation on
    y_t = W x_t                       before it, and in rows without one

The KV cache before the invocation therefore equals the base model's and can be shared with it. The invocation's
position is found in `input_ids` and stored on the cache for later calls. Tokens that come one at a time are assumed to
be generated and invoke nothing. Alternatively `model(..., alora_offsets=n)`, int64 [batch], adapts the last n tokens
of each row. Texts packed into one row each have their own invocation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple, cast

import peftcore_lora
import torch
from peftcore_lora.config import refuse_fields
from peftcore_lora.files import RULES, name_inside
from peftcore_lora.layers import LoraLinear, LoraOnWeight
from peftcore_lora.placing import place as place_lora, wrap_adapters
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Call,
    Fields,
    FileFormat,
    Method,
    Placement,
    Tensors,
    cached_tokens,
    current_call,
    hookimpl,
    ranks,
    refuse_packed,
    text_starts,
    validation,
)

peftcore_api = ">=3.7,<4"


@dataclass(frozen=True)
class AloraConfig(peftcore_lora.LoraConfig):
    """Config with LoRA's fields, for linear layers of decoders; saved as a LoRA with one more field, as in PEFT.

    Args:
        alora_invocation_tokens: token ids of the invocation, exactly as the tokenizer encodes it inside the text.
    """

    alora_invocation_tokens: Sequence[int] = ()
    reaches_experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self, "activated LoRA")
        tokens = list(self.alora_invocation_tokens)
        message = f"alora_invocation_tokens must be the token ids of the invocation (tokenizer.encode), found {tokens}"
        validation.require(bool(tokens) and all(type(t) is int and t >= 0 for t in tokens), message)


class Text(NamedTuple):
    """State stored on a cache: start of each row's invocation (-1: none), last token ids, number of tokens."""

    starts: Tensor
    tail: Tensor
    length: int


class Invocation(Adapter):
    """Finds invocations in a call's input. It wraps the backbone, to run before any layer extends the cache."""

    needs_call = ("alora_offsets",)

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = tuple(tokens)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        self.active()
        return base(*args, **kwargs)

    def active(self) -> Tensor:
        """Return where the adapter is active, bool `[batch, tokens]`; computed once per call."""
        ranks.refuse_context_parallel("activated LoRA")
        call = current_call()
        key = "alora", self.tokens
        if key not in call.state:
            has_offsets = call.get("alora_offsets") is not None
            call.state[key] = self.active_by_offsets(call) if has_offsets else self.active_by_tokens(call)
        return cast(Tensor, call.state[key])

    def active_by_offsets(self, call: Call) -> Tensor:
        refuse_packed(call, "alora_offsets must have one number for each row")
        rows, count = (call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]).shape[:2]
        last = torch.as_tensor(call["alora_offsets"]).reshape(rows, 1)
        return torch.arange(count, device=last.device) >= count - last

    def active_by_tokens(self, call: Call) -> Tensor:
        ids = call.get("input_ids")
        advice = "Pass alora_offsets, the number of last tokens to adapt in each row"
        validation.require(ids is not None, f"activated LoRA reads input_ids, but the call has none. {advice}")
        # Dynamo of PyTorch 2.9 cannot search the name of a builtin class.
        values = [value for value in call.values() if not isinstance(value, (int, float, str))]
        cache: Any = next((value for value in values if "Cache" in type(value).__name__), None)
        past = 0 if cache is None else cached_tokens(cache)
        stored = None if past == 0 else vars(cache).get("alora", {}).get(self.tokens)
        if past is None:
            # A recurrent model's cache does not count tokens. Any number works if nothing is stored yet.
            past = 1 if stored is None else stored.length
        beginnings, mask = text_starts(call), call.get("attention_mask")
        if beginnings is not None and cache is None:
            return self.active_in_packed(ids, beginnings.to(ids.device))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :].to(ids.device) == 0, -1)  # padding invokes nothing
        starts, tail = ids.new_full((len(ids),), -1), ids[:, :0]
        if stored is not None and len(stored.starts) == len(ids):
            # A start beyond the cached tokens means that the cache was cropped since.
            starts = torch.where(stored.starts < past, stored.starts, -1)
        if ids.shape[1] > 1 or not past:
            # The invocation may have begun in the cached tokens, so the search includes the end of the last call.
            tail = stored.tail if stored is not None and stored.length == past else tail
            text = torch.cat([tail, ids], 1)
            positions = torch.arange(1, text.shape[1] + 1, device=ids.device)
            latest = (self.invocation_starts(text) * positions).amax(1) - 1 - tail.shape[1]
            is_split = tail.numel() and bool(((latest < 0) & (latest >= -tail.shape[1])).any())
            validation.require(
                not is_split, "the invocation is split over two calls. Pass its tokens in one call or chunk"
            )
            starts = torch.where(latest >= 0, latest + past, starts)
            tail = text[:, max(0, text.shape[1] - len(self.tokens) + 1) :]
        if past and (stored is None or len(stored.starts) != len(ids)):
            reason = "the call continues a cache of earlier calls, whose text may have invoked the adapter"
            validation.require(
                bool((starts >= 0).all()), f"{reason}. {advice}; or pass the cache to the first call as well"
            )
        if cache is not None:
            vars(cache).setdefault("alora", {})[self.tokens] = Text(starts, tail, past + ids.shape[1])
        return (starts >= 0)[:, None] & (torch.arange(ids.shape[1], device=ids.device) + past >= starts[:, None])

    def active_in_packed(self, ids: Tensor, beginnings: Tensor) -> Tensor:
        """Return where the adapter is active in rows of packed texts: in each text from its last invocation on."""
        text_number, length = beginnings.expand_as(ids).long().cumsum(1), len(self.tokens)
        # An invocation counts only if its first and its last token are in the same text.
        in_one_text = text_number == F.pad(text_number, (0, length - 1))[:, length - 1 :]
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        starts = torch.where(self.invocation_starts(ids) & in_one_text, index, -1)
        per_text = starts.new_full((len(ids), ids.shape[1] + 1), -1).scatter_reduce(1, text_number, starts, "amax")
        latest = per_text.gather(1, text_number)
        return (latest >= 0) & (index >= latest)

    def invocation_starts(self, text: Tensor) -> Tensor:
        """Return the tokens at which an invocation begins, bool `[batch, tokens]`."""
        tokens = text.new_tensor(self.tokens)
        return (F.pad(text, (0, len(tokens) - 1), value=-1).unfold(1, len(tokens), 1) == tokens).all(-1)


class Alora(Adapter):
    """LoRA of a linear layer; x `[batch, tokens, in]`, or `[batch · tokens, in]`."""

    needs_call = Invocation.needs_call

    def __init__(self, lora: LoraLinear, invocation: Invocation) -> None:
        super().__init__()
        self.lora, self.invocation = lora, invocation

    def forward(self, base: Base, x: Tensor) -> Tensor:
        active = self.invocation.active().to(x.device)
        active = active[:, -x.shape[1] :] if x.dim() == 3 else active  # the output head may only get the last tokens
        fits = x.shape[:-1] == active.shape or x.shape[:-1] == (active.numel(),)
        message = f"activated LoRA needs layers whose input has {[*active.shape]} tokens, found {list(x.shape)}"
        validation.require(fits, f"{message}. Exclude such a layer: exclude_modules=[...]")
        y, (a, b) = base(x), self.lora.pair()
        s = F.linear(F.dropout(x.to(a.dtype), self.lora.dropout.p, self.lora.training), a)
        s = self.lora.scale * s * active.reshape(*x.shape[:-1], 1)
        return y + F.linear(s, b).to(y.dtype)


def place(model: nn.Module, config: AloraConfig, architecture: Architecture) -> list[Placement]:
    decoder = architecture.task_type in (None, "CAUSAL_LM") and architecture.embedding is not None
    message = f"activated LoRA is for text decoders, as in PEFT, but {type(model).__name__} is not one. Choose LoRA"
    validation.require(decoder, message)
    invocation = Invocation(config.alora_invocation_tokens)

    def wrap(lora: Any) -> Alora | None:
        return Alora(lora, invocation) if isinstance(lora, LoraLinear) and not isinstance(lora, LoraOnWeight) else None

    layers = wrap_adapters(place_lora(model, config, architecture), wrap, "activated LoRA")
    return [Around(architecture.backbone or "", invocation), *layers]


FLAG = "alora_invocation_tokens"


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    read_tensors, read_fields = RULES.read(model, tensors, {**fields, FLAG: None})
    return read_tensors, {**read_fields, FLAG: fields.get(FLAG) or ()}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = dataclasses.replace(
        RULES,
        tensor_name=name_inside,
        read=read,
        # LoRA's single-file formats are those of image models.
        formats=[file_format for file_format in RULES.formats if not isinstance(file_format, FileFormat)],
        peft=dataclasses.replace(RULES.peft, flag=FLAG, scaled=None),
    )
    return [Method("alora", AloraConfig, place, rules, learning_rate=1e-3)]
