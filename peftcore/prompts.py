"""Soft prompts and prefixes as adapters around the backbone: mask, token types, positions and cache.

A prompt enters at prefill only, when the cache is empty; afterwards the cache holds it and only the
mask and given positions are shifted. The backbone's output is cut back to the caller's tokens, so
labels, heads and pooling above it need to know nothing.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapted import original_forward
from peftcore.architecture import Architecture
from peftcore.errors import PeftcoreError
from peftcore.method import Around, PrefixKV, SoftPrompt


def compiled(model: nn.Module, architecture: Architecture, placement: SoftPrompt | PrefixKV) -> list[Around]:
    """The placement as adapters around modules of `model`."""
    kind = type(placement).__name__
    if architecture.embedding is None:
        raise PeftcoreError(
            f"{kind} needs a model with a token embedding; {type(model).__name__} names none. A plugin's "
            f"peftcore_architecture hook can"
        )
    if isinstance(placement, PrefixKV):
        if architecture.cache_argument is None or architecture.is_encoder_decoder:
            raise PeftcoreError(f"PrefixKV needs a decoder with an attention cache; {type(model).__name__} has none")
        backbone = model.get_submodule(architecture.backbone)
        return [Around(architecture.backbone, PrefixAround(placement.adapter, backbone, architecture))]
    if architecture.is_encoder_decoder:
        encoder = model.get_submodule(architecture.encoder)
        return [
            Around(architecture.encoder, SoftPromptAround(placement.adapter, encoder, architecture, keeps=True)),
            Around(architecture.decoder, CrossMask(model.get_submodule(architecture.decoder))),
        ]
    backbone = model.get_submodule(architecture.backbone)
    return [Around(architecture.backbone, SoftPromptAround(placement.adapter, backbone, architecture))]


class _Backbone(nn.Module):
    """An adapter around a backbone, which reads the call by the backbone's own argument names."""

    def __init__(self, adapter: nn.Module | None, module: nn.Module, cache_argument: str | None = None) -> None:
        super().__init__()
        self.adapter = adapter
        self._names = tuple(inspect.signature(original_forward(module)).parameters)[1:]
        self._cache_argument = cache_argument

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        mask = call.get("attention_mask")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise PeftcoreError(
                "a prompt needs a 2-d attention mask [batch, tokens] to extend, found "
                f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} (compiled caches make those)"
            )
        return call

    def _past(self, call: dict[str, Any]) -> int:
        cache = call.get(self._cache_argument) if self._cache_argument else None
        return 0 if cache is None else cache.get_seq_length()

    def _shift(self, call: dict[str, Any], tokens: int, *, prefill: bool, inserted: bool) -> None:
        """Extend the mask by `tokens`, and shift positions behind them."""
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None:
            call["attention_mask"] = _prepend(mask, torch.ones, tokens)
        if positions is not None:
            call["position_ids"] = positions + tokens
        elif prefill and mask is not None and "position_ids" in self._names:
            # Left-padded rows: positions count tokens, not padding.
            call["position_ids"] = (mask.long().cumsum(-1) - 1).clamp(min=0) + tokens
        if inserted and prefill:
            positions = call.get("position_ids")
            if positions is not None:
                own = torch.arange(tokens, device=positions.device, dtype=positions.dtype)
                call["position_ids"] = torch.cat([own.expand(positions.shape[0], -1), positions], dim=-1)
            if call.get("token_type_ids") is not None:
                call["token_type_ids"] = _prepend(call["token_type_ids"], torch.zeros, tokens)


class SoftPromptAround(_Backbone):
    """`adapter() -> [tokens, hidden]` before the embedded input; `keeps` leaves them in the output (an encoder's)."""

    def __init__(
        self, adapter: nn.Module, module: nn.Module, architecture: Architecture, *, keeps: bool = False
    ) -> None:
        super().__init__(adapter, module, architecture.cache_argument)
        self._keeps = keeps

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        prompt = self.adapter()  # [n, hidden]
        tokens = prompt.shape[0]
        if self._past(call) > 0:
            self._shift(call, tokens, prefill=False, inserted=True)
            return base(**call)
        embedded = call.get("inputs_embeds")
        if embedded is None:
            embedded = base.module.get_input_embeddings()(call["input_ids"])  # [batch, length, hidden]
        prompt = prompt.to(embedded.dtype).expand(embedded.shape[0], -1, -1)
        call["input_ids"] = None
        call["inputs_embeds"] = torch.cat([prompt, embedded], dim=1)
        self._shift(call, tokens, prefill=True, inserted=True)
        output = base(**call)
        return output if self._keeps else _without_prompt(output, tokens)


class PrefixAround(_Backbone):
    """`adapter() -> [layers, 2, kv_heads, tokens, head_dim]`, put into the empty cache before the first token."""

    def __init__(self, adapter: nn.Module, module: nn.Module, architecture: Architecture) -> None:
        super().__init__(adapter, module, architecture.cache_argument)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        prefix = self.adapter()
        tokens = prefix.shape[3]
        prefill = self._past(call) == 0
        if prefill:
            given = call.get("inputs_embeds")
            given = given if given is not None else call["input_ids"]
            cache = call.get(self._cache_argument)
            if cache is None:
                from transformers import DynamicCache

                cache = DynamicCache(config=base.module.config)
            dtype = next(p.dtype for p in base.module.parameters() if p.is_floating_point())
            for layer, (key, value) in enumerate(prefix.to(dtype).unbind(0)):  # [kv_heads, n, head_dim] each
                shape = (given.shape[0], *key.shape)
                cache.update(key.expand(shape), value.expand(shape), layer)
            call[self._cache_argument] = cache
        self._shift(call, tokens, prefill=prefill, inserted=False)
        return base(**call)


class CrossMask(_Backbone):
    """A decoder whose encoder's output begins with a prompt: the cross-attention mask grows with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(None, module)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] < states.shape[1]:
            call["encoder_attention_mask"] = _prepend(mask, torch.ones, states.shape[1] - mask.shape[-1])
        return base(**call)


def _prepend(tensor: Tensor, fill: Any, tokens: int) -> Tensor:
    head = fill(tensor.shape[0], tokens, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([head, tensor], dim=-1)


def _without_prompt(output: Any, tokens: int) -> Any:
    if isinstance(output, tuple):
        return (output[0][:, tokens:], *output[1:])
    output.last_hidden_state = output.last_hidden_state[:, tokens:]
    return output
