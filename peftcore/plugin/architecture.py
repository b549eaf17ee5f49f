"""Facts about a model that placements need: its parts, its sizes, and the sublayers of its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

Kind = Literal["attention", "cross_attention", "feed_forward"]
ATTENTION: Final = "attention"
CROSS_ATTENTION: Final = "cross_attention"
FEED_FORWARD: Final = "feed_forward"


@dataclass(frozen=True)
class Sublayer:
    """One sublayer h = F(x) and what follows: the residual, and in post-norm models a norm.

        post-norm (BERT):  x --- F --- h --- (+ x) --- norm ---
        pre-norm (Llama):  s --- norm --- x --- F --- h --- (+ s) ---

    Args:
        kind: which of the three it is. What mixes tokens instead of attention (a state space, a convolution,
            a Fourier transform) counts as attention.
        layer: index in its stack; encoder and decoder each count from 0.
        output: path of the module whose (first) output is h, before residual and norm. Dropout may follow.
        width: the size of h's last dimension.
        whole: path of the module that a branch from x to h runs parallel to. Its first argument is x and its (first)
            output is h, or h with the residual added; with `adds_residual`, its arguments are (h', x) and it adds
            them itself. None if there is no such module.
        adds_residual: see `whole`.
        norm: path of the norm whose input is h + x (post-norm), else None.
        stream: path of the module whose (first) output is h + s (pre-norm), or None.
        query: path of the layer that projects x to queries, None if keys and values share it.
        output_projection: path of the layer that projects the concatenated outputs of the heads, `[..., heads *
            head_dim]`, to the hidden size (Llama's `o_proj`), or None if there is no such layer.
        inner: paths of the layers from the hidden to the inner size of a feed-forward.
    """

    kind: Kind
    layer: int
    output: str
    width: int
    whole: str | None = None
    adds_residual: bool = False
    norm: str | None = None
    stream: str | None = None
    query: str | None = None
    output_projection: str | None = None
    inner: tuple[str, ...] = ()


@dataclass(frozen=True)
class Architecture:
    """Facts about a model that placements need; None or empty if unknown.

    Args:
        task_type: PEFT's name of the task (`CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS`, ...).
        is_encoder_decoder: has an encoder and a decoder (T5).
        backbone: path of the module that embeds and runs the layers; "" is the model itself.
        encoder, decoder: paths of the two stacks of an encoder-decoder.
        embedding: path of the token embedding.
        output_head: path of the head that computes token logits.
        task_heads: paths of the heads that pre-training did not train (a classifier's).
        cache_argument: name of the backbone's argument for the attention cache.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
        sublayers: attention and feed-forward of every layer, observed on first use; empty if that fails.
    """

    task_type: str | None = None
    is_encoder_decoder: bool = False
    backbone: str = ""
    encoder: str | None = None
    decoder: str | None = None
    embedding: str | None = None
    output_head: str | None = None
    task_heads: tuple[str, ...] = ()
    cache_argument: str | None = None
    hidden_size: int | None = None
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    head_dim: int | None = None
    sublayers: Sequence[Sublayer] = ()


def text_config(config: Any) -> Any:
    """Return the part of a transformers config that describes the language model, or `config` if it has no parts.

    If it has two, such as MusicGen's encoder of text and decoder of sound, return the one that generates.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # ambiguous: there are several
        return config.get_text_config(decoder=True)


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a model's config by name; of a dictionary its items, of a value without fields none."""
    items = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    return {name: value for name, value in items.items() if isinstance(name, str)}
