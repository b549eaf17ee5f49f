"""Activated LoRA (Greenewald et al. 2025, arXiv 2504.12397): a LoRA that is active after an invocation.

    y_t = W x_t + scale · B A x_t     at the tokens of a row's last invocation, and after them
    y_t = W x_t                       before it, and in rows without one

The cache before the invocation is therefore the base's. The position of an invocation in `input_ids` is stored with
the cache, for later calls with it; tokens that come one by one are assumed to be generated, and invoke nothing.
`model(..., alora_offsets=n)`, int64 [batch], gives the number of last tokens to adapt instead. Of texts packed into a
row, each has its own invocation.
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
from peftcore_lora.placing import place as place_lora, wrapped
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
        alora_invocation_tokens: token ids of the invocation, as they occur in the text.
    """

    alora_invocation_tokens: Sequence[int] = ()
    reaches_experts: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        refuse_fields(self, "activated LoRA")
        tokens = list(self.alora_invocation_tokens)
        wanted = f"alora_invocation_tokens must be the token ids of the invocation (tokenizer.encode), found {tokens}"
        validation.require(bool(tokens) and all(type(t) is int and t >= 0 for t in tokens), wanted)


class Text(NamedTuple):
    """Contents of a cache: start of each row's invocation (-1: none), its last tokens, and their number."""

    starts: Tensor
    tail: Tensor
    length: int


class Invocation(Adapter):
    """Search for invocations in a call's input, around the backbone, before any layer extends the cache."""

    needs_call = ("alora_offsets",)

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__()
        self.tokens = tuple(tokens)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        self.acts()
        return base(*args, **kwargs)

    def acts(self) -> Tensor:
        """Return `[batch, tokens]`, where the adapter is active."""
        ranks.refuse_context_parallel("activated LoRA")
        call = current_call()
        key = "alora", self.tokens
        if key not in call.state:
            call.state[key] = self.offset(call) if call.get("alora_offsets") is not None else self.found(call)
        return cast(Tensor, call.state[key])

    def offset(self, call: Call) -> Tensor:
        refuse_packed(call, "alora_offsets has one number for each row")
        rows, count = (call["inputs_embeds"] if call.get("input_ids") is None else call["input_ids"]).shape[:2]
        last = torch.as_tensor(call["alora_offsets"]).reshape(rows, 1)
        return torch.arange(count, device=last.device) >= count - last

    def found(self, call: Call) -> Tensor:
        ids, say = call.get("input_ids"), "Pass alora_offsets, the number of last tokens to adapt in each row"
        validation.require(ids is not None, f"activated LoRA reads input_ids, and the call has none. {say}")
        cache: Any = next((value for value in call.values() if "Cache" in type(value).__name__), None)
        past = 0 if cache is None else cached_tokens(cache)
        before = None if past == 0 else vars(cache).get("alora", {}).get(self.tokens)
        if past is None:  # a recurrent model's cache, which counts no tokens: any number works if nothing was stored
            past = 1 if before is None else before.length
        begins, mask = text_starts(call), call.get("attention_mask")
        if begins is not None and cache is None:
            return self.found_in_each(ids, begins.to(ids.device))
        if isinstance(mask, Tensor) and mask.dim() == 2:
            ids = ids.masked_fill(mask[:, -ids.shape[1] :].to(ids.device) == 0, -1)  # padding invokes nothing
        starts, tail = ids.new_full((len(ids),), -1), ids[:, :0]
        if before is not None and len(before.starts) == len(ids):
            starts = torch.where(before.starts < past, before.starts, -1)  # where not, the cache was cropped
        if ids.shape[1] > 1 or not past:
            tail = before.tail if before is not None and before.length == past else tail
            text, more = torch.cat([tail, ids], 1), len(self.tokens) - 1
            counted = torch.arange(1, text.shape[1] + 1, device=ids.device)
            last = (self.invoked(text) * counted).amax(1) - 1 - tail.shape[1]  # negative: there is none
            cut = tail.numel() and bool(((last < 0) & (last >= -tail.shape[1])).any())
            validation.require(not cut, "the invocation is split over two calls. Pass its tokens in one call or chunk")
            starts = torch.where(last >= 0, last + past, starts)
            tail = text[:, max(0, text.shape[1] - more) :]
        if past and (before is None or len(before.starts) != len(ids)):
            why = "the call continues a cache of earlier calls, whose text may have invoked the adapter"
            validation.require(bool((starts >= 0).all()), f"{why}. {say}; or pass the cache to the first call, too")
        if cache is not None:
            vars(cache).setdefault("alora", {})[self.tokens] = Text(starts, tail, past + ids.shape[1])
        return (starts >= 0)[:, None] & (torch.arange(ids.shape[1], device=ids.device) + past >= starts[:, None])

    def found_in_each(self, ids: Tensor, begins: Tensor) -> Tensor:
        """Return where the adapter is active in rows of packed texts: in each from its own last invocation on."""
        number, more = begins.expand_as(ids).long().cumsum(1), len(self.tokens) - 1
        whole = number == F.pad(number, (0, more))[:, more:]
        index = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        at = torch.where(self.invoked(ids) & whole, index, -1)
        last = at.new_full((len(ids), ids.shape[1] + 1), -1).scatter_reduce(1, number, at, "amax").gather(1, number)
        return (last >= 0) & (index >= last)

    def invoked(self, text: Tensor) -> Tensor:
        """Return the tokens, bool `[batch, tokens]`, at which an invocation begins."""
        wanted = text.new_tensor(self.tokens)
        return (F.pad(text, (0, len(wanted) - 1), value=-1).unfold(1, len(wanted), 1) == wanted).all(-1)


class Alora(Adapter):
    """LoRA of a linear layer; x `[batch, tokens, in]`, or `[batch · tokens, in]`."""

    needs_call = Invocation.needs_call

    def __init__(self, lora: LoraLinear, invocation: Invocation) -> None:
        super().__init__()
        self.lora, self.invocation = lora, invocation

    def forward(self, base: Base, x: Tensor) -> Tensor:
        acts = self.invocation.acts().to(x.device)
        acts = acts[:, -x.shape[1] :] if x.dim() == 3 else acts  # a head reads only the last tokens
        fits = x.shape[:-1] == acts.shape or x.shape[:-1] == (acts.numel(),)
        wanted = f"activated LoRA needs layers whose input has {[*acts.shape]} tokens, found {list(x.shape)}"
        validation.require(fits, f"{wanted}. Leave such a layer out: exclude_modules=[...]")
        y, (a, b) = base(x), self.lora.pair()
        s = F.linear(F.dropout(x.to(a.dtype), self.lora.dropout.p, self.lora.training), a)
        s = self.lora.scale * s * acts.reshape(*x.shape[:-1], 1)
        return y + F.linear(s, b).to(y.dtype)


def place(model: nn.Module, config: AloraConfig, architecture: Architecture) -> list[Placement]:
    decoder = architecture.task_type in (None, "CAUSAL_LM") and architecture.embedding is not None
    message = f"activated LoRA is for text decoders, as in PEFT, and {type(model).__name__} is not one. Choose LoRA"
    validation.require(decoder, message)
    invocation = Invocation(config.alora_invocation_tokens)

    def wrap(lora: Any) -> Alora | None:
        return Alora(lora, invocation) if isinstance(lora, LoraLinear) and not isinstance(lora, LoraOnWeight) else None

    layers = wrapped(place_lora(model, config, architecture), wrap, "activated LoRA")
    return [Around(architecture.backbone or "", invocation), *layers]


FLAG = "alora_invocation_tokens"


def read(model: nn.Module | None, tensors: dict[str, Tensor], fields: dict[str, Any]) -> tuple[Tensors, Fields]:
    found, read = RULES.read(model, tensors, {**fields, FLAG: None})
    return found, {**read, FLAG: fields.get(FLAG) or ()}


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = dataclasses.replace(
        RULES,
        tensor_name=name_inside,
        read=read,
        formats=[each for each in RULES.formats if not isinstance(each, FileFormat)],  # the others are for images
        peft=dataclasses.replace(RULES.peft, flag=FLAG, scaled=None),
    )
    return [Method("alora", AloraConfig, place, rules, learning_rate=1e-3)]
