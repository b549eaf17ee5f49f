"""A soft prompt: vectors before the embedded input of a decoder, an encoder, or the encoder of an encoder-decoder."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from peftcore.architecture import Architecture
from peftcore.errors import PeftcoreError
from peftcore.method import Around
from peftcore.prompts.backbone import IN_MASK, Backbone, cache_argument, entry, is_causal, prepend


def place_soft_prompt(
    model: nn.Module, architecture: Architecture, adapter: nn.Module, tokens: int, hidden: int
) -> list[Around]:
    """The adapters around the backbone, or around encoder and decoder, for a prompt `[tokens, hidden]`."""
    embedding = model.get_submodule(architecture.embedding)
    width = getattr(embedding, "embedding_dim", hidden)
    if hidden != width:
        raise PeftcoreError(f"the prompt's vectors have {hidden} numbers, the token embedding {width}")
    if architecture.is_encoder_decoder:
        encoder, decoder = (model.get_submodule(path) for path in (architecture.encoder, architecture.decoder))
        return [
            Around(architecture.encoder, SoftPromptAround(adapter, encoder, tokens, keeps=True)),
            Around(architecture.decoder, CrossMask(decoder)),
        ]
    path = entry(model, architecture)
    backbone = model.get_submodule(path)
    causal = is_causal(backbone, architecture)
    if architecture.task_type == "SEQ_CLS" and not causal:
        # The head pools a bidirectional encoder's output, by position 0 or by the mask: it must see the whole.
        return [Around("", SoftPromptAround(adapter, model, tokens, keeps=True))]
    around = SoftPromptAround(adapter, backbone, tokens, cache_argument=cache_argument(backbone), causal=causal)
    return [Around(path, around)]


class SoftPromptAround(Backbone):
    """`adapter() -> [tokens, hidden]` before the embedded input; `keeps` leaves them in the output (an encoder's)."""

    def __init__(self, *args: Any, keeps: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keeps = keeps

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        cache, past = self._cached(call)
        mask = call.get("attention_mask")
        self._make_room(call, past)
        order = back = None
        if mask is not None:
            # Padding must not part prompt and input: windows and ALiBi count it, recurrences run over it.
            prefixes = getattr(cache, IN_MASK, 0)
            order, back = orders(mask[:, prefixes:], self.tokens)
            grown = call["attention_mask"]
            call["attention_mask"] = torch.cat([grown[:, :prefixes], grown[:, prefixes:].gather(-1, order)], dim=-1)
        if past > 0:
            return base(**call)
        embedded = call.get("inputs_embeds")
        if embedded is None:
            embedded = base.module.get_input_embeddings()(call["input_ids"])  # [batch, length, hidden]
        prompt = self.adapter().to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        call["input_ids"] = None
        rows = torch.cat([prompt, embedded], dim=1)  # [batch, tokens + length, hidden]
        call["inputs_embeds"] = rows if order is None else _taken(rows, order)
        positions = call.get("position_ids")
        if positions is not None:
            own = torch.arange(-self.tokens, 0, device=positions.device, dtype=positions.dtype)
            own = positions.amin(-1, keepdim=True) + own  # the places just before the first token
            call["position_ids"] = _reordered(torch.cat([own, positions], dim=-1), order)
        if call.get("token_type_ids") is not None:
            types = prepend(call["token_type_ids"], torch.zeros, self.tokens)
            call["token_type_ids"] = _reordered(types, order)
        output = base(**call)
        return output if self._keeps else _without_prompt(output, self.tokens, back)


class CrossMask(Backbone):
    """A decoder whose encoder's output begins with a prompt: the cross-attention mask grows with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(None, module)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] < states.shape[1]:
            tokens = states.shape[1] - mask.shape[-1]
            order, _ = orders(mask, tokens)
            call["encoder_attention_mask"] = prepend(mask, torch.ones, tokens).gather(-1, order)
        return base(**call)


def orders(mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Indices that put a prompt from the front behind each row's left padding, and those of the input in the result."""
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # [batch, 1]
    place = torch.arange(tokens + mask.shape[-1], device=mask.device)
    order = torch.where(place < padding, place + tokens, torch.where(place < padding + tokens, place - padding, place))
    place = place[: mask.shape[-1]]
    return order, torch.where(place < padding, place, place + tokens)


def _reordered(values: Tensor, order: Tensor | None) -> Tensor:
    """`values [..., batch, tokens]` in the order of each row."""
    if order is None:
        return values
    shape = (*values.shape[:-2], *order.shape)
    return values.expand(shape).gather(-1, order.expand(shape))


def _taken(states: Tensor, order: Tensor) -> Tensor:
    return states.gather(1, order[..., None].expand(-1, -1, states.shape[-1]))


def _without_prompt(output: Any, tokens: int, back: Tensor | None = None) -> Any:
    """The output at the input's tokens: behind the prompt, or at the places `back`."""

    def cut(states: Tensor) -> Tensor:
        return states[:, tokens:] if back is None else _taken(states, back)

    if isinstance(output, tuple):
        return (cut(output[0]), *output[1:])
    output.last_hidden_state = cut(output.last_hidden_state)
    if getattr(output, "hidden_states", None) is not None:
        output.hidden_states = tuple(cut(states) for states in output.hidden_states)
    return output
