"""Find a model's backbone for soft prompts and prefixes, read its call, and extend its mask and positions.

In a row with several packed texts, positions restart at each text, as transformers expects.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules, original_forward
from peftcore.ops.calling import is_exporting
from peftcore.plugin import ranks
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.architecture import Architecture, text_config
from peftcore.plugin.placements.placement import Placement

# Argument names for the cache in attention modules.
_CACHE_ARGUMENTS = ("cache", "past_key_values", "layer_past", "cache_params")
IN_CACHE = "_peftcore_prefix"  # attribute of a cache: number of its tokens that are prefixes
IN_MASK = "_peftcore_masked"  # attribute of a cache: number of columns of this call's mask that belong to prefixes
SOFT = "soft_prompt"  # attribute of a call with a soft prompt before the input


class Backbone(Adapter):
    """Adapter around a backbone that reads the arguments of the call by name.

    Args:
        tokens: number of tokens that the adapter inserts before the input.
        cache_argument: name of the backbone's argument for the attention cache.
        causal: compute positions for padded batches, as `generate` does; an encoder numbers positions from its first
            column.
    """

    whole_batch = True

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
        self.adapter: Any = adapter  # None if it only extends mask and positions
        self.tokens = tokens
        self._names = forward_arguments(module)
        self._cache_argument = cache_argument
        self._causal = causal
        self.counts = causal and "position_ids" in self._names
        self._first = first_position(module)
        self._context = learned_context(module)

    def extra_repr(self) -> str:
        return f"tokens={self.tokens}"

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
        ranks.refuse_context_parallel("a prompt or prefix")
        call = arguments_by_name(self._names, args, kwargs)
        old = [name for name in _CACHE_ARGUMENTS if name in call and name not in self._names]
        # The module takes the cache under an older name.
        if old and self._cache_argument and call.get(self._cache_argument) is None:
            call[self._cache_argument] = call.pop(old[0])
        return call

    def _cached(self, call: dict[str, Any]) -> tuple[Any, int]:
        """Return (cache or None, number of tokens in the cache, excluding prefixes)."""
        cache = call.get(self._cache_argument) if self._cache_argument else None
        length = 0 if cache is None else tokens_in(cache)
        return cache, length - getattr(cache, IN_CACHE, 0) if length else 0

    def _make_room(self, call: dict[str, Any], past: int) -> int:
        """Make room for the adapter's tokens in mask and positions, and return the number of input tokens."""
        length = self._input_length(call, past)
        mask, positions = call.get("attention_mask"), call.get("position_ids")
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise PeftcoreError(
                f"a prompt needs an attention mask [batch, tokens], found {shape}. If you generate with a static "
                "cache, use the dynamic cache instead"
            )
        if self._causal:
            refuse_packed(call, "a prompt would precede only the first example")
        if positions is None and mask is not None and self.counts:
            token_positions = (mask.long().cumsum(-1) - 1).clamp(min=0)  # positions count tokens, not padding
            positions = token_positions[:, -length:] + self._first
        if positions is not None:
            call["position_ids"] = positions + self.tokens
        if mask is not None:
            call["attention_mask"] = prepend(mask, torch.ones, self.tokens)
        return length

    def _input_length(self, call: dict[str, Any], past: int) -> int:
        """Return the number of tokens of a call, excluding the adapter's tokens.

        Raises:
            PeftcoreError: the call has no tokens, or more than the model has positions for.
        """
        ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
        tokens_or_embeddings = ids if embeddings is None else embeddings
        if tokens_or_embeddings is None:
            raise PeftcoreError("a prompt needs input tokens, but the model was called without them. Pass input_ids")
        if tokens_or_embeddings.dim() != (2 if tokens_or_embeddings is ids else 3):
            raise PeftcoreError(
                "a prompt needs tokens of shape [batch, length], found a tensor of shape "
                f"{list(tokens_or_embeddings.shape)}"
            )
        length: int = tokens_or_embeddings.shape[1]
        if self._context and past + self.tokens + length > self._context:
            raise PeftcoreError(
                f"{past + length} input tokens and a prompt of {self.tokens} tokens exceed the {self._context} "
                "learned positions of the model. Shorten the input"
            )
        return length


class Positions(Backbone):
    """Adapter around a backbone that computes the decoder's positions from the input and the length of the cache.

    Padding and prefixes are not counted, because the adapter around the decoder adds its own tokens.
    """

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call = self._call(args, kwargs)
        _, past = self._cached(call)
        mask, inputs = call.get("attention_mask"), call.get("inputs_embeds")
        inputs = call.get("input_ids") if inputs is None else inputs
        if isinstance(mask, Tensor) and mask.dim() == 2:
            self._make_room(call, past=0)
        elif mask is None and inputs is not None and past > 0 and call.get("position_ids") is None:
            places = torch.arange(past, past + inputs.shape[1], device=inputs.device)
            call["position_ids"] = self._first + places.expand(len(inputs), -1)
        return base(**call)


def checked_shape(
    model: nn.Module,
    architecture: Architecture,
    placement: Placement,
    dimensions: Sequence[str],
    known_shape: tuple[int, ...] | None = None,
) -> tuple[int, ...]:
    """Return the shape of the tensor that a placement's adapter returns, after checking its dimensions.

    Args:
        dimensions: names of the dimensions; one is "tokens".
        known_shape: the shape, if the adapter cannot be called now to determine it.

    Raises:
        PeftcoreError: the model has no token embedding, the number of dimensions differs, or no position is left for
            the input.
    """
    kind = type(placement).__name__
    if architecture.embedding is None:
        raise PeftcoreError(
            f"{kind} needs a token embedding, but {type(model).__name__} does not declare one. Declare it in a "
            "plugin's peftcore_architecture hook"
        )
    with torch.no_grad():
        shape = tuple(placement.adapter().shape) if known_shape is None else known_shape
    if len(shape) != len(dimensions):
        raise PeftcoreError(
            f"the adapter of a {kind} must return a tensor [{', '.join(dimensions)}], found shape {list(shape)}"
        )
    tokens = shape[dimensions.index("tokens")]
    context = getattr(language_config(model), "max_position_embeddings", None)
    if isinstance(context, int) and 0 < context <= tokens:
        raise PeftcoreError(
            f"a prompt of {tokens} tokens leaves no room for input, since the context of {type(model).__name__} has "
            f"{context} tokens. Use a shorter prompt"
        )
    return shape


def decoder_path(model: nn.Module, architecture: Architecture) -> str:
    """Return the path of the module that is called with tokens, both at prefill and at each decoding step.

    Some models with heads (OPT, vision-language models) call a decoder inside the backbone, and some models do not
    declare a backbone.
    """
    if architecture.is_encoder_decoder:
        return stacks(model, architecture)[1]
    decoder = getattr(model, "get_decoder", lambda: None)()
    inner_modules = dict(base_modules(model.get_submodule(architecture.backbone), architecture.backbone))
    path = architecture.backbone
    if decoder is not None and "inputs_embeds" in forward_arguments(decoder):
        path = next((path for path, module in inner_modules.items() if module is decoder), path)
    if path == "" and architecture.output_head is not None and architecture.embedding is not None:
        parts = architecture.embedding.split(".")
        ancestors = (".".join(parts[:i]) for i in range(1, len(parts)))
        for ancestor in ancestors:
            if "inputs_embeds" in forward_arguments(model.get_submodule(ancestor)):
                return ancestor
    return path


def stacks(model: nn.Module, architecture: Architecture) -> tuple[str, str]:
    """Return the paths of the encoder and the decoder of an encoder-decoder.

    Raises:
        PeftcoreError: the model does not declare them.
    """
    if architecture.encoder is None or architecture.decoder is None:
        raise PeftcoreError(
            f"prompts and prefixes need an encoder and a decoder, but {type(model).__name__} does not declare both. "
            "Declare them in a plugin's peftcore_architecture hook"
        )
    return architecture.encoder, architecture.decoder


def arguments_by_name(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return {name: value} of a call's arguments."""
    return {**dict(zip(names, args)), **kwargs}  # noqa: B905  # PyTorch 2.9 traces strict=False as True


def forward_arguments(module: nn.Module) -> tuple[str, ...]:
    """Return the argument names of the module's forward."""
    return tuple(inspect.signature(original_forward(module)).parameters)[1:]


def cache_argument(module: nn.Module) -> str | None:
    """Return the name of the module's argument for the attention cache."""
    return next((name for name in _CACHE_ARGUMENTS if name in forward_arguments(module)), None)


def is_causal(backbone: nn.Module, architecture: Architecture) -> bool:
    """Return whether the backbone is causal, according to its attention modules, its config, or its cache argument."""
    config = language_config(backbone)
    declared = [getattr(module, "is_causal", None) for module in backbone.modules()] + [getattr(config, "causal", None)]
    if hasattr(config, "add_cross_attention"):  # encoder families that can also be decoders
        declared.append(getattr(config, "is_decoder", None))
    declared = [value for value in declared if isinstance(value, bool)]
    if getattr(config, "is_decoder", None) is True:
        return True
    return any(declared) if declared else architecture.cache_argument is not None


def language_config(model: nn.Module) -> Any:
    """Return the config of the language model in `model`."""
    return text_config(getattr(model, "config", None))


def input_embedding(module: Any) -> Any:
    """Return the token embedding that `module` declares, of any class; None if it declares none."""
    try:
        return module.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None


def learned_context(backbone: nn.Module) -> int | None:
    """Return the size of the learned position embedding; None if positions are computed."""
    context = getattr(language_config(backbone), "max_position_embeddings", None)
    tokens = input_embedding(backbone)
    if not isinstance(context, int) or tokens is None:
        return None
    for module in backbone.modules():
        if isinstance(module, nn.Embedding) and module is not tokens:
            # OPT and BART reserve 2 additional positions, RoBERTa 2 within the table.
            offset = getattr(module, "offset", 0)
            if module.num_embeddings == context + offset:
                return context - (0 if module.padding_idx is None or offset else module.padding_idx + 1)
    return None


def first_position(backbone: nn.Module) -> int:
    """Return the position of the first token; in models derived from RoBERTa it follows the position of padding."""
    roberta_embeddings = (m for m in backbone.modules() if hasattr(m, "create_position_ids_from_input_ids"))
    padding = next((getattr(module, "padding_idx", None) for module in roberta_embeddings), None)
    return 0 if padding is None else padding + 1


def tokens_in(cache: Any) -> int:
    """Return the number of tokens in a cache; with recurrent states only, 1 if the cache is filled and else 0."""
    if not hasattr(cache, "get_seq_length"):
        count = getattr(cache, "seqlen_offset", None)  # xLSTM's
        if count is None:
            raise PeftcoreError(
                f"a prompt needs the number of tokens in the cache, but {type(cache).__name__} has no "
                "get_seq_length(). Pass use_cache=False to the model"
            )
        return int(count)
    try:
        return cache.get_seq_length()
    except ValueError:
        return int(cache.has_previous_state())


def prepend(tensor: Tensor, fill: Any, tokens: int) -> Tensor:
    """Prepend `tokens` columns made by `fill` (torch.ones, torch.zeros) to `tensor [batch, n]`."""
    head = fill(tensor.shape[0], tokens, dtype=tensor.dtype, device=tensor.device)
    return torch.cat([head, tensor], dim=-1)


def text_starts(call: Mapping[str, Any]) -> Tensor | None:
    """Return a mask of the tokens where texts begin, bool `[batch or 1, tokens]`; None if each row is one text.

    In a call with a mask `[batch, tokens]`, rows are not packed. Without a mask, a text begins where `position_ids` do
    not increase by one, or without `position_ids`, at the offsets in `cu_seq_lens_q`.

    Args:
        call: {name: value} of the arguments of the model or its backbone.
    """
    mask, positions, ends = (call.get(name) for name in ("attention_mask", "position_ids", "cu_seq_lens_q"))
    if isinstance(mask, Tensor) and mask.dim() == 2:
        return None
    if isinstance(positions, Tensor) and positions.dim() in (2, 3):
        # In positions with an axis per coordinate, the first axis is constant within an image.
        begins = positions.diff(dim=-1) != 1 if positions.dim() == 2 else positions[0].diff(dim=-1) < 0
        return F.pad(begins, (1, 0), value=True)
    inputs = call.get("inputs_embeds") if call.get("input_ids") is None else call.get("input_ids")
    if not isinstance(ends, Tensor) or not isinstance(inputs, Tensor):
        return None
    return torch.isin(torch.arange(inputs.shape[1], device=ends.device), ends)[None]


def refuse_packed(call: Mapping[str, Any], why: str) -> None:
    """Raise an error if a row contains several texts; a compiled graph gets an assertion instead.

    Args:
        call: {name: value} of the arguments of the model or its backbone.
        why: the consequence of a packed row, as a clause of the error message.

    Raises:
        PeftcoreError: a row contains several texts.
    """
    message = (
        f"a row contains several packed examples (by its position_ids or cu_seq_lens), but {why}. Give each example "
        "its own row; in TRL, set packing=False and padding_free=False"
    )
    starts, mask = text_starts(call), call.get("attention_mask")
    ends = [value for name, value in call.items() if value is not None and name.startswith("cu_seq")]
    if mask is None and any(isinstance(offsets, Tensor) and len(offsets) > 2 for offsets in ends):
        raise PeftcoreError(message)
    if starts is None or is_exporting():
        return
    several = starts[:, 1:].any()
    if torch.compiler.is_compiling():
        torch._assert_async(~several, message)
    elif type(several) is Tensor and not several.is_meta and several:  # fake tensors have no values
        raise PeftcoreError(message)
