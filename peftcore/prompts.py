"""Soft prompts and prefixes as adapters around the backbone: embeddings, mask, token types, positions and cache.

    SoftPrompt      p_1 … p_n  x_1 … x_m   before the first layer      mask  1 … 1  mask
    PrefixKV        k_1 … k_n  k(x_1) …    in every layer's attention  positions of x: n, n + 1, …

Both enter at prefill only, while the cache is empty; afterwards the cache holds them, and only the mask
and given positions grow. A soft prompt is cut off the output again, so labels, losses and heads above
the backbone need to know nothing. Several may be active: soft prompts stand in the order of activation,
`[first, …, last, tokens]`, prefixes likewise in the cache, in front of the soft prompts.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adapted import base_modules, original_forward
from peftcore.architecture import Architecture
from peftcore.errors import PeftcoreError
from peftcore.method import Around, PrefixKV, SoftPrompt

# The names under which attention modules take the cache, and what only cross-attention is given.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past")
_CROSS_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
_IN_CACHE = "_peftcore_prefix"  # attribute of a cache: how many of its tokens are prefixes


def compiled(model: nn.Module, architecture: Architecture, placement: SoftPrompt | PrefixKV) -> list[Around]:
    """The placement as adapters around modules of `model`.

    Raises:
        PeftcoreError: the model has no token embedding or no cache, shapes do not fit, or no room is left for input.
    """
    kind = type(placement).__name__
    if architecture.embedding is None:
        raise PeftcoreError(
            f"{kind} needs a model with a token embedding; {type(model).__name__} names none. A plugin's "
            f"peftcore_architecture hook can"
        )
    with torch.no_grad():
        shape = tuple(placement.adapter().shape)
    wanted = "[tokens, hidden]" if isinstance(placement, SoftPrompt) else "[layers, 2, kv_heads, tokens, head_dim]"
    if len(shape) != wanted.count(",") + 1:
        raise PeftcoreError(f"the adapter of a {kind} returns {wanted}, found a tensor of shape {list(shape)}")
    tokens = shape[0] if isinstance(placement, SoftPrompt) else shape[3]
    context = getattr(_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context <= tokens:
        raise PeftcoreError(
            f"a prompt of {tokens} tokens leaves no room for input: the context of {type(model).__name__} is "
            f"{context} tokens. Take fewer"
        )
    if isinstance(placement, SoftPrompt):
        return _soft_prompt(model, architecture, placement.adapter, *shape)
    return _prefix(model, architecture, placement.adapter, shape)


def _soft_prompt(
    model: nn.Module, architecture: Architecture, adapter: nn.Module, tokens: int, hidden: int
) -> list[Around]:
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
    path = _entry(model, architecture)
    backbone = model.get_submodule(path)
    causal = _is_causal(backbone, architecture)
    if architecture.task_type == "SEQ_CLS" and not causal:
        # The head pools a bidirectional encoder's output, by position 0 or by the mask: it must see the whole.
        return [Around("", SoftPromptAround(adapter, model, tokens, keeps=True))]
    around = SoftPromptAround(adapter, backbone, tokens, cache_argument=_cache_argument(backbone), causal=causal)
    return [Around(path, around)]


def _prefix(model: nn.Module, architecture: Architecture, adapter: nn.Module, shape: tuple[int, ...]) -> list[Around]:
    path = _entry(model, architecture)
    backbone = model.get_submodule(path)
    argument = _cache_argument(backbone)
    attentions = _attentions(backbone, path)
    if argument is None or not attentions:
        raise PeftcoreError(
            f"PrefixKV needs attention that takes a cache; that of {type(model).__name__} takes none. "
            "A soft prompt needs none"
        )
    layers = {module.layer_idx for module in attentions.values()}
    if layers != set(range(shape[0])):
        raise PeftcoreError(
            f"the prefix has keys and values for {shape[0]} layers, {type(model).__name__} has attention with a cache "
            f"in {len(layers)}: {sorted(layers)}"
        )
    from transformers.cache_utils import DynamicLayer

    cache = _new_cache(backbone)
    kept = getattr(cache, "self_attention_cache", cache).layers
    recurrent = [i for i, layer in enumerate(kept) if not isinstance(layer, DynamicLayer)]
    if recurrent:
        raise PeftcoreError(
            f"layers {recurrent} of {type(model).__name__} keep a recurrent state, which has no keys and values for "
            "PrefixKV. A soft prompt needs none"
        )
    around = PrefixAround(
        adapter,
        backbone,
        shape[3],
        cache_argument=argument,
        causal=architecture.is_encoder_decoder or _is_causal(backbone, architecture),
    )
    return [Around(path, around), *(Around(at, PrefixLayer(adapter, module)) for at, module in attentions.items())]


class _Backbone(nn.Module):
    """An adapter around a backbone, which reads the call by the backbone's own argument names.

    Args:
        tokens: how many the adapter puts before the input.
        cache_argument: name of the backbone's argument that is the attention cache.
        causal: positions are computed for padded batches, as `generate` does; an encoder counts from its start.
    """

    def __init__(
        self,
        adapter: nn.Module | None,
        module: nn.Module,
        tokens: int = 0,
        *,
        cache_argument: str | None = None,
        causal: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter
        self.tokens = tokens
        self._names = tuple(inspect.signature(original_forward(module)).parameters)[1:]
        self._cache_argument = cache_argument
        self._causal = causal
        self._counts = causal and "position_ids" in self._names
        self._context = _learned_context(module)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        return call

    def _cached(self, call: dict[str, Any]) -> tuple[Any, int]:
        """(cache or None, how many tokens it holds beside prefixes)."""
        cache = call.get(self._cache_argument) if self._cache_argument else None
        length = 0 if cache is None else _seen(cache)
        return cache, length - getattr(cache, _IN_CACHE, 0) if length else 0

    def _make_room(self, call: dict[str, Any], past: int) -> None:
        """Extend the mask by the adapter's tokens, and shift positions behind them."""
        inputs = call.get("inputs_embeds")
        length = (call["input_ids"] if inputs is None else inputs).shape[1]
        if self._context and past + self.tokens + length > self._context:
            raise PeftcoreError(
                f"{past + length} tokens of input and a prompt of {self.tokens} are more than the "
                f"{self._context} positions that this model has learned. Shorten the input"
            )
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            raise PeftcoreError(
                "a prompt needs a 2-d attention mask [batch, tokens] to extend, found "
                f"{list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__} (static caches make those; "
                "generate with the dynamic one)"
            )
        if positions is None and mask is not None and self._counts:
            positions = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]  # tokens count, padding does not
        if positions is not None:
            call["position_ids"] = positions + self.tokens
        if mask is not None:
            call["attention_mask"] = _prepend(mask, torch.ones, self.tokens)


class SoftPromptAround(_Backbone):
    """`adapter() -> [tokens, hidden]` before the embedded input; `keeps` leaves them in the output (an encoder's)."""

    def __init__(self, *args: Any, keeps: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._keeps = keeps
        # Without position ids a model counts padding (MPT) or runs over it (Mamba): it must not part prompt and input.
        self._behind_padding = self._causal and not self._counts

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        _, past = self._cached(call)
        mask = call.get("attention_mask")
        self._make_room(call, past)
        order = back = None
        if mask is not None and self._behind_padding:
            order, back = _orders(mask, self.tokens)
            call["attention_mask"] = call["attention_mask"].gather(-1, order)
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
            call["position_ids"] = torch.cat([own, positions], dim=-1)
        if call.get("token_type_ids") is not None:
            call["token_type_ids"] = _prepend(call["token_type_ids"], torch.zeros, self.tokens)
        output = base(**call)
        return output if self._keeps else _without_prompt(output, self.tokens, back)


class PrefixAround(_Backbone):
    """`adapter() -> [layers, 2, kv_heads, tokens, head_dim]`, put into the empty cache before the first token."""

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        cache, past = self._cached(call)
        self._make_room(call, past)
        if past > 0:
            return base(**call)
        given = call.get("inputs_embeds")
        given = given if given is not None else call["input_ids"]
        own = cache is None
        if own:
            cache = call[self._cache_argument] = _new_cache(base.module)
        dtype = base.module.get_input_embeddings().weight.dtype
        layers = getattr(cache, "self_attention_cache", cache)
        before = getattr(cache, _IN_CACHE, 0) if _seen(cache) else 0  # another prefix's
        for layer, (key, value) in enumerate(self.adapter().to(dtype).unbind(0)):  # [kv_heads, tokens, head_dim] each
            shape = (given.shape[0], *key.shape)
            layers.update(key.expand(shape), value.expand(shape), layer)
        setattr(cache, _IN_CACHE, before + self.tokens)
        output = base(**call)
        return output if not own or self._wants_cache(base.module, call) else _without(output, self._cache_argument)

    def _wants_cache(self, module: nn.Module, call: dict[str, Any]) -> bool:
        if not self._causal:
            return False
        asked = call.get("use_cache")
        asked = getattr(module.config, "use_cache", False) if asked is None else asked
        return bool(asked) and not (module.training and getattr(module, "gradient_checkpointing", False))


class PrefixLayer(nn.Module):
    """One attention module, where activation checkpointing takes the cache away from its layer.

    The layer runs again in the backward pass, so it must not write into a cache; here it gets one that stores
    nothing and holds this layer's part of the prefix, computed anew so that every run has its own graph.
    """

    def __init__(self, adapter: nn.Module, module: nn.Module) -> None:
        super().__init__()
        self._adapter = (adapter,)  # its owner is the adapter around the backbone: no parameters here
        self._layer = module.layer_idx
        self._names = tuple(inspect.signature(original_forward(module)).parameters)[1:]
        self._cache_argument = _cache_argument(module)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = dict(zip(self._names, args, strict=False))
        call.update(kwargs)
        cache = call.get(self._cache_argument)
        if any(call.get(name) is not None for name in _CROSS_ARGUMENTS) or not (
            cache is None or isinstance(cache, _Stateless)
        ):
            return base(*args, **kwargs)
        key, value = self._adapter[0]()[self._layer]  # [kv_heads, tokens, head_dim] each
        call[self._cache_argument] = _Stateless(key, value, cache)
        return base(**call)


class _Stateless:
    """A cache of one layer that stores nothing: keys and values come back with the prefix before them."""

    is_compileable = False

    def __init__(self, key: Tensor, value: Tensor, before: _Stateless | None) -> None:
        self._key = key if before is None else torch.cat([before._key, key], dim=1)
        self._value = value if before is None else torch.cat([before._value, value], dim=1)

    def update(self, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        shape = (key.shape[0], *self._key.shape)
        return (
            torch.cat([self._key.to(key.dtype).expand(shape), key], dim=2),
            torch.cat([self._value.to(value.dtype).expand(shape), value], dim=2),
        )

    def get_seq_length(self, *_args: Any) -> int:
        return self._key.shape[1]


class CrossMask(_Backbone):
    """A decoder whose encoder's output begins with a prompt: the cross-attention mask grows with it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(None, module)

    def forward(self, base: Any, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        states, mask = call.get("encoder_hidden_states"), call.get("encoder_attention_mask")
        if states is not None and mask is not None and mask.shape[-1] < states.shape[1]:
            call["encoder_attention_mask"] = _prepend(mask, torch.ones, states.shape[1] - mask.shape[-1])
        return base(**call)


def _entry(model: nn.Module, architecture: Architecture) -> str:
    """Path of the module that is called with tokens, at prefill and at each step.

    Heads of some models (OPT, models with images) call a decoder inside the backbone, not the backbone.
    """
    if architecture.is_encoder_decoder:
        return architecture.decoder
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else None
    inside = dict(base_modules(model.get_submodule(architecture.backbone), architecture.backbone))
    if decoder is not None and "inputs_embeds" in inspect.signature(original_forward(decoder)).parameters:
        return next((path for path, module in inside.items() if module is decoder), architecture.backbone)
    return architecture.backbone


def _attentions(backbone: nn.Module, prefix: str) -> dict[str, nn.Module]:
    """The innermost modules that take a cache and know their layer, by path: the attention modules."""
    found = {
        path: module
        for path, module in base_modules(backbone, prefix)
        if isinstance(getattr(module, "layer_idx", None), int) and _cache_argument(module) is not None
    }
    return {path: module for path, module in found.items() if not any(o.startswith(f"{path}.") for o in found)}


def _cache_argument(module: nn.Module) -> str | None:
    names = inspect.signature(original_forward(module)).parameters
    return next((name for name in _CACHE_ARGUMENTS if name in names), None)


def _is_causal(backbone: nn.Module, architecture: Architecture) -> bool:
    said = [m.is_causal for m in backbone.modules() if isinstance(getattr(m, "is_causal", None), bool)]
    return any(said) if said else architecture.cache_argument is not None


def _config(model: nn.Module) -> Any:
    config = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _learned_context(backbone: nn.Module) -> int | None:
    """How many positions a table of learned ones has; None where positions are computed."""
    context = getattr(_config(backbone), "max_position_embeddings", None)
    if not isinstance(context, int) or not hasattr(backbone, "get_input_embeddings"):
        return None
    tokens = backbone.get_input_embeddings()
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            offset = getattr(module, "offset", 0)  # OPT and BART keep 2 free in addition, RoBERTa within
            if module.num_embeddings == context + offset:
                return context - (0 if module.padding_idx is None or offset else module.padding_idx + 1)
    return None


def _new_cache(backbone: nn.Module) -> Any:
    from transformers import DynamicCache, EncoderDecoderCache

    cache = DynamicCache(config=backbone.config)
    if getattr(backbone.config, "is_encoder_decoder", False):
        return EncoderDecoderCache(cache, DynamicCache(config=backbone.config))
    return cache


def _seen(cache: Any) -> int:
    """How many tokens a cache holds; of one with recurrent states only, whether it holds any."""
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def _prepend(tensor: Tensor, fill: Any, tokens: int) -> Tensor:
    head = fill(tensor.shape[0], tokens, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([head, tensor], dim=-1)


def _orders(mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Indices that put a prompt from the front behind each row's left padding, and those of the input in the result."""
    padding = (mask.cumsum(-1) == 0).sum(-1, keepdim=True)  # [batch, 1]
    place = torch.arange(tokens + mask.shape[-1], device=mask.device)
    order = torch.where(place < padding, place + tokens, torch.where(place < padding + tokens, place - padding, place))
    place = place[: mask.shape[-1]]
    return order, torch.where(place < padding, place, place + tokens)


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


def _without(output: Any, name: str) -> Any:
    """A model output without the entry `name`, which the caller did not ask for."""
    if isinstance(output, tuple) or name not in output:
        return output
    return type(output)(**{key: value for key, value in output.items() if key != name})
