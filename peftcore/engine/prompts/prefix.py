"""A prefix: keys and values at the start of every layer's attention cache."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from peftcore.engine.adaptation.tensor_parallel import Division, division_of
from peftcore.engine.prompts.backbone import (
    IN_CACHE,
    IN_MASK,
    Backbone,
    Positions,
    arguments_by_name,
    cache_argument,
    decoder_path,
    forward_arguments,
    input_embedding,
    is_causal,
    language_config,
    tokens_in,
)
from peftcore.errors import PeftcoreError
from peftcore.model.base_modules import base_modules, base_parameters
from peftcore.plugin import sharded
from peftcore.plugin.adapter import Adapter, Base
from peftcore.plugin.architecture import Architecture

# Arguments that only cross-attention gets.
_CROSS_ARGUMENTS = ("key_value_states", "encoder_hidden_states")
_FAILED = "_peftcore_failed"  # attribute of a cache: the call that inserted a prefix has raised an error
_TOKEN_BY_TOKEN = ("prophetnet",)  # families that read one token at a time if the cache is not empty
# Families whose attention computes distances between columns, including padding.
_COUNTS_PADDING = ("mpt", "cpmant", "roformer")


def place_prefix(
    model: nn.Module, architecture: Architecture, adapter: nn.Module, shape: tuple[int, ...]
) -> list[tuple[str, nn.Module]]:
    """Return (path, adapter) for the backbone and its attention modules, for a prefix of this shape.

    Raises:
        PeftcoreError: the cache of the model cannot hold the prefix.
    """
    path = decoder_path(model, architecture)
    attentions = _attentions(model.get_submodule(path), path)
    outer = model.get_submodule(architecture.backbone)
    # A backbone around the decoder that takes token types computes the masks of images from them.
    blocks = path != architecture.backbone and "token_type_ids" in forward_arguments(outer)
    if blocks:
        path = architecture.backbone
    backbone = model.get_submodule(path)
    argument = cache_argument(backbone)
    if argument is None or not attentions:
        raise PeftcoreError(
            f"PrefixKV needs attention with a cache, but {type(model).__name__} has none. Use a soft prompt"
        )
    _refuse_reading(model, path)
    with_attention: set[Any] = {_layer(module) for module in attentions.values()}
    if with_attention != set(range(shape[0])):
        raise PeftcoreError(
            f"the prefix has keys and values for {shape[0]} layers, but {type(model).__name__} has attention "
            f"with a cache in {len(with_attention)}: {sorted(with_attention)}"
        )
    cache = _new_cache(backbone, architecture.is_encoder_decoder)
    cache_layers = getattr(cache, "self_attention_cache", cache).layers
    _refuse_cache(model, cache_layers, count=shape[0])
    _refuse_widths(model, attentions, heads=shape[2], width=shape[4])
    division = _heads_division(attentions, shape[2])
    windows: dict[int | None, int | None] = {
        number: getattr(layer, "sliding_window", None) for number, layer in enumerate(cache_layers)
    }
    around = PrefixAround(
        adapter,
        backbone,
        shape[3],
        division=division,
        cache_argument=argument,
        causal=architecture.is_encoder_decoder or is_causal(backbone, architecture),
        window=min((window for window in windows.values() if window), default=None),
        blocks=blocks,
        crosses=architecture.is_encoder_decoder,
    )
    placements: list[tuple[str, nn.Module]] = [(path, around)]
    for attention_path, module in attentions.items():
        placements.append((attention_path, PrefixLayer(adapter, module, windows.get(_layer(module)), division)))
    is_inside = path != architecture.backbone and not architecture.is_encoder_decoder
    if is_inside and around.counts and not hasattr(outer, "get_rope_index"):
        outer_argument = cache_argument(outer) or argument  # some backbones pass it in **kwargs
        positions = Positions(None, outer, cache_argument=outer_argument, causal=True)
        placements.append((architecture.backbone, positions))
    return placements


def _refuse_reading(model: nn.Module, path: str) -> None:
    """Raise a PeftcoreError if the backbone at `path` reads tokens in a way that does not work with a filled cache."""
    backbone = model.get_submodule(path)
    config = language_config(backbone)
    if isinstance(input_embedding(backbone), nn.ModuleList):
        raise PeftcoreError(
            f"'{path}' of {type(model).__name__} reads several rows of codes per sequence, and PrefixKV would add a "
            "prefix to each row. Use a method for linear layers"
        )
    if getattr(config, "model_type", None) in _TOKEN_BY_TOKEN:
        raise PeftcoreError(
            f"{type(model).__name__} reads one token at a time if its cache is not empty, but PrefixKV fills the "
            "cache. Use a soft prompt"
        )
    if getattr(config, "kv_lora_rank", None):
        raise PeftcoreError(
            f"{type(model).__name__} has latent attention with keys and values of different widths, but PrefixKV "
            "needs equal widths. Use a soft prompt"
        )


def _refuse_cache(model: nn.Module, cache_layers: Sequence[Any], *, count: int) -> None:
    """Raise a PeftcoreError unless the model's cache has keys and values for each of the prefix's `count` layers.

    Args:
        cache_layers: the layers of an empty cache; an empty list if layers are created when the cache is filled.
    """
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    plain = (DynamicLayer, DynamicSlidingWindowLayer)
    other_layers = [i for i, layer in enumerate(cache_layers) if type(layer) not in plain and not _is_shared(layer)]
    if other_layers:
        raise PeftcoreError(
            f"PrefixKV needs keys and values in the cache, but layers {other_layers} of {type(model).__name__} cache "
            "a recurrent or compressed state. Use a soft prompt"
        )
    if cache_layers and len(cache_layers) != count:
        raise PeftcoreError(
            f"{type(model).__name__} caches keys and values of {len(cache_layers)} layers but runs {count}, so "
            "PrefixKV cannot assign prefixes to layers. Use a soft prompt"
        )


def _refuse_widths(model: nn.Module, attentions: dict[str, Any], *, heads: int, width: int) -> None:
    """Raise a PeftcoreError unless the keys and values of every attention module have `heads` heads of `width`."""
    widths = {width}
    for module in attentions.values():
        for name in ("head_dim", "v_head_dim"):
            widths.add(getattr(module, name, None) or width)
    if len(widths) > 1:
        raise PeftcoreError(
            f"PrefixKV needs heads of equal width in all layers, but {type(model).__name__} has widths "
            f"{sorted(widths)}. Use a soft prompt"
        )
    numbers = heads * width
    for path, module in attentions.items():
        outputs = {name: getattr(child, "out_features", numbers) for name, child in module.named_children()}
        differing = {name: outputs[name] for name in ("k_proj", "v_proj") if outputs.get(name, numbers) != numbers}
        if differing:
            raise PeftcoreError(
                f"PrefixKV gives each layer {heads} heads of width {width}, {numbers} features in all, but '{path}' "
                f"of {type(model).__name__} has output sizes {differing}. Use a soft prompt"
            )


class PrefixAround(Backbone):
    """Adapter around a backbone: `adapter() -> [layers, 2, kv_heads, tokens, head_dim]` fills the cache at prefill.

    Args:
        window: smallest attention window of the layers, in tokens; None without one.
        blocks: with an empty cache, attention within an image is bidirectional.
        crosses: the backbone is the decoder of an encoder-decoder, even if its config does not declare it.
        division: how tensor parallelism shards the projections of keys and values by heads; None if it does not.
    """

    def __init__(
        self,
        adapter: nn.Module,
        module: nn.Module,
        *args: Any,
        window: int | None = None,
        blocks: bool = False,
        crosses: bool = False,
        division: Division | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(adapter, module, *args, **kwargs)
        self._window = window
        self._blocks = blocks
        self._division = division
        self._crosses = crosses
        self._counts_padding = getattr(module.config, "model_type", None) in _COUNTS_PADDING

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call: dict[Any, Any] = self._call(args, kwargs)
        if self._cache_argument and not self._causal:
            call[self._cache_argument] = None  # bidirectional backbones do not cache anything for later calls
        cache, past = self._cached(call)
        self._refuse_failed(cache)
        self._refuse_padding(base.module, call.get("attention_mask"))
        self._refuse_images(base.module, call)
        length = self._make_room(call, past)
        self._refuse_longer_mask(base.module, call.get("attention_mask"), length)
        makes_cache = cache is None
        if makes_cache:
            cache = call[self._cache_argument] = _new_cache(base.module, self._crosses)
        if past == 0:
            self._fill(cache, base.module, call)
        masked_by_outer = getattr(cache, IN_MASK, 0)
        setattr(cache, IN_MASK, masked_by_outer + self.tokens)
        try:
            output = base(**call)
        except BaseException:
            setattr(cache, _FAILED, past == 0)
            raise
        finally:
            setattr(cache, IN_MASK, masked_by_outer)
        if makes_cache and not self._wants_cache(base.module, call):
            return _without(output, self._cache_argument)
        return output

    def _refuse_failed(self, cache: Any) -> None:
        """Raise a PeftcoreError if an earlier call put the prefix into this cache and then raised an error."""
        if not getattr(cache, _FAILED, False):
            return
        if tokens_in(cache):
            raise PeftcoreError(
                "the first call with this cache raised an error after inserting the prefix, so this call would "
                "insert it a second time. Pass a new cache"
            )
        setattr(cache, _FAILED, False)  # the cache has been reset since

    def _refuse_images(self, module: nn.Module, call: dict[str, Any]) -> None:
        if self._blocks and any(value is not None and "pixel" in name for name, value in call.items()):
            raise PeftcoreError(
                f"{type(module).__name__} only uses bidirectional attention for images while the cache is empty, but "
                "PrefixKV fills the cache. Use a soft prompt"
            )

    def _refuse_longer_mask(self, module: nn.Module, mask: Any, length: int) -> None:
        """Raise a PeftcoreError if a bidirectional backbone, which has no cache, is called to generate."""
        if not self._causal and mask is not None and mask.shape[1] != length + self.tokens:
            raise PeftcoreError(
                f"{type(module).__name__} is bidirectional and does not use a cache, but was called with {length} "
                f"tokens and a mask of {mask.shape[1] - self.tokens}. To generate, set is_decoder=True in its config"
            )

    def _fill(self, cache: Any, module: nn.Module, call: dict[str, Any]) -> None:
        inputs = call.get("inputs_embeds")
        inputs = inputs if inputs is not None else call["input_ids"]
        dtype = next(p.dtype for _, p in base_parameters(module) if p.is_floating_point())
        if (embedding := input_embedding(module)) is not None:
            dtype = embedding.weight.dtype
        layers = getattr(cache, "self_attention_cache", cache)
        earlier_prefix = getattr(cache, IN_CACHE, 0) if tokens_in(cache) else 0  # of another prefix
        for layer, (key, value) in enumerate(_of_rank(self.adapter, self._division).to(dtype).unbind(0)):
            if layer < len(layers.layers) and _is_shared(layers.layers[layer]):
                continue
            if layer >= len(layers.layers) and getattr(layers, "layer_class_to_replicate", None) is None:
                break  # the cache of a call that ends at an earlier layer (assistant_early_exit)
            shape = (inputs.shape[0], *key.shape)  # [batch, kv_heads, tokens, head_dim]
            layers.update(key.expand(shape), value.expand(shape), layer)
            if key.requires_grad:  # tensors inside a graph cannot be deep-copied
                layers.layers[layer].__deepcopy__ = _DeepCopy(layers.layers[layer])
        setattr(cache, IN_CACHE, earlier_prefix + self.tokens)

    def _refuse_padding(self, module: nn.Module, mask: Any) -> None:
        """Raise a PeftcoreError if padding between prefix and input would change relative positions."""
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return
        narrow = self._window is not None and mask.shape[1] + self.tokens > self._window
        if (self._counts_padding or narrow) and not mask[:, 0].all():
            reason = (
                ("includes padding in relative positions")
                if self._counts_padding
                else f"looks {self._window} tokens back"
            )
            raise PeftcoreError(
                f"{type(module).__name__} {reason}, so padding on the left would separate the prefix from the input. "
                "Pad on the right, use rows of equal length, or use a soft prompt"
            )

    def _wants_cache(self, module: nn.Module, call: dict[str, Any]) -> bool:
        if not self._causal:
            return False
        use_cache = call.get("use_cache")
        use_cache = getattr(language_config(module), "use_cache", False) if use_cache is None else use_cache
        return bool(use_cache) and not (module.training and getattr(module, "gradient_checkpointing", False))


class PrefixLayer(Adapter):
    """Adapter around one attention module, for activation checkpointing, which calls the layer without a cache.

    The layer runs again in the backward pass, so it must not write into a cache. This adapter passes it a cache that
    does not store anything and that starts with this layer's slice of the prefix, recomputed so that each run has its
    own graph.

    Args:
        window: attention window of the layer in tokens, including the token itself; None without one.
    """

    whole_batch = True

    def __init__(self, adapter: nn.Module, module: Any, window: int | None, division: Division | None = None) -> None:
        super().__init__()
        self._window = window
        self._division = division
        self._adapter = (adapter,)  # a child of the adapter around the backbone, not of this one
        self._layer = _layer(module)
        self._names = forward_arguments(module)
        self._cache_argument = cache_argument(module)

    def forward(self, base: Base, *args: Any, **kwargs: Any) -> Any:
        call: dict[Any, Any] = arguments_by_name(self._names, args, kwargs)
        cache = call.get(self._cache_argument)
        if any(call.get(name) is not None for name in _CROSS_ARGUMENTS) or not (
            cache is None or isinstance(cache, _Stateless)
        ):
            return base(*args, **kwargs)
        key, value = _of_rank(self._adapter[0], self._division)[self._layer]  # [kv_heads, tokens, head_dim] each
        call[self._cache_argument] = _Stateless(key, value, self._window, cache)
        return base(**call)


class _Stateless:
    """Cache of one layer that stores nothing: it returns keys and values after the prefix.

    Args:
        window: attention window of the layer, or None. As in transformers' cache and mask, a token sees at most the
            last `window - 1` tokens of the prefix.
    """

    is_compileable = False

    def __init__(self, key: Tensor, value: Tensor, window: int | None, outer: _Stateless | None) -> None:
        self._key: Tensor = key if outer is None else torch.cat([outer._key, key], dim=1)
        self._value: Tensor = value if outer is None else torch.cat([outer._value, value], dim=1)
        self._start = 0 if window is None else max(0, self._key.shape[1] - window + 1)

    def update(self, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        before_key, before_value = self._key[:, self._start :], self._value[:, self._start :]
        shape = (key.shape[0], *before_key.shape)
        return (
            torch.cat([before_key.to(key.dtype).expand(shape), key], dim=2),
            torch.cat([before_value.to(value.dtype).expand(shape), value], dim=2),
        )

    def get_seq_length(self, *_args: Any) -> int:
        return self._key.shape[1]


def _of_rank(adapter: nn.Module, division: Division | None) -> Tensor:
    """Return `adapter()`, `[layers, 2, kv_heads, tokens, head_dim]`, sliced to the heads of this rank."""
    key_values: Tensor = adapter()
    return key_values if division is None else division.part(key_values, 2)


def _heads_division(attentions: dict[str, Any], heads: int) -> Division | None:
    """Return how tensor parallelism shards the projections of keys and values in all layers; None if it does not.

    Raises:
        PeftcoreError: layers are sharded in different ways, other submodules of attention are sharded, or shards split
            a head.
    """
    if not any(sharded.has_divided(module) for module in attentions.values()):
        return None
    divisions: set[Division | None] = set()
    for module in attentions.values():
        for name in ("k_proj", "v_proj"):
            projection = getattr(module, name, None)
            divisions.add(division_of(projection) if isinstance(projection, nn.Module) else None)
    division = divisions.pop()
    if divisions or division is None or not division.output_in_parts or heads % division.mesh.size():
        raise PeftcoreError(
            "a prefix needs k_proj and v_proj to be sharded by heads, but tensor parallelism (tp_plan, tp_size) "
            f"shards the {heads} key-value heads of '{next(iter(attentions))}' in another way. Load the model "
            "without tp_plan, apply the adapter, and call peftcore.shard(model)"
        )
    return division


def _attentions(backbone: nn.Module, prefix: str) -> dict[str, Any]:
    """Return {path: module} of the attention modules: the innermost modules with a cache argument and a layer index."""
    modules = {
        path: module
        for path, module in base_modules(backbone, prefix)
        if _layer(module) is not None and cache_argument(module) is not None
    }
    innermost: dict[str, nn.Module] = {}
    for path, module in modules.items():
        if not any(other_path.startswith(f"{path}.") for other_path in modules):
            innermost[path] = module
    return innermost


def _layer(module: nn.Module) -> int | None:
    """Return the index of the cache layer that an attention module uses, or None."""
    # GPT-Neo calls it `layer_id`, a name with another meaning in Flaubert.
    is_gpt_neo = getattr(getattr(module, "config", None), "model_type", None) == "gpt_neo"
    index = getattr(module, "layer_idx", getattr(module, "layer_id", None) if is_gpt_neo else None)
    return index if isinstance(index, int) else None


def _new_cache(backbone: Any, crosses: bool) -> Any:
    from transformers.cache_utils import DynamicCache, EncoderDecoderCache  # lazy modules cannot be traced

    cache = DynamicCache(config=backbone.config)
    if crosses or any(getattr(backbone.config, name, False) for name in ("is_encoder_decoder", "add_cross_attention")):
        return EncoderDecoderCache(cache, DynamicCache())  # cross-attention has no window
    return cache


def _is_shared(layer: Any) -> bool:
    """Return whether a layer of the model shares the keys and values of an earlier one (Gemma 3n).

    Such a layer shares the prefix too, and its own slice of the prefix has no effect.
    """
    return type(layer).__name__ == "DummyLayer"


class _DeepCopy:
    """`__deepcopy__` of a cache layer that keeps the prefix's autograd graph, for models that rerun layers on a copy.

    It refers to the layer weakly, since otherwise the keys would outlive a training step.
    """

    def __init__(self, layer: Any) -> None:
        self._layer = ref(layer)

    def __call__(self, memo: dict[int, Any]) -> Any:
        layer = self._layer()
        if layer is None:
            raise PeftcoreError(
                "cannot deep-copy a shallow copy of a cache layer after the original has been deleted. Deep-copy the "
                "original"
            )
        layer_copy = copy.copy(layer)
        for name, value in vars(layer).items():
            if isinstance(value, Tensor):
                setattr(layer_copy, name, value.clone())
        layer_copy.__deepcopy__ = _DeepCopy(layer_copy)
        return layer_copy

    def __reduce__(self) -> tuple[Any, ...]:
        return _DeepCopy, (self._layer(),)


def _without(output: Any, name: str | None) -> Any:
    """Return a model output without the entry `name`, which the caller did not ask for."""
    if isinstance(output, tuple) or name not in output:
        return output
    return type(output)(**{key: value for key, value in output.items() if key != name})
