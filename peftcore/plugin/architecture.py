"""Description of a model for placements: its parts, its sizes, and the sublayers of its layers."""

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
    """One sublayer h = F(x), followed by the residual connection and, in post-norm models, a norm.

        post-norm (BERT):  x --- F --- h --- (+ x) --- norm ---
        pre-norm (Llama):  s --- norm --- x --- F --- h --- (+ s) ---

    Args:
        kind: kind of the sublayer. Other token mixers (a state-space model, a convolution, a Fourier transform) count
            as attention.
        layer: index of the layer in its stack. Encoder and decoder each count from 0.
        output: path of the module whose (first) output is h, before the residual connection and norm. Dropout may
            follow.
        width: size of h's last dimension.
        whole: path of the module that a branch from x to h runs parallel to. Its first argument is x and its (first)
            output is h, or h with the residual added; with `adds_residual`, its arguments are (h', x) and it adds the
            residual itself. None if there is no such module.
        adds_residual: see `whole`.
        norm: path of the norm whose input is h + x (post-norm), else None.
        stream: path of the module whose (first) output is h + s (pre-norm), or None.
        query: path of the layer that projects x to queries, or None if that layer also projects keys and values.
        output_projection: path of the layer that projects the concatenated outputs of the heads, `[..., heads *
            head_dim]`, to the hidden size (Llama's `o_proj`), or None if there is no such layer.
        inner: paths of the layers that project from the hidden to the inner size of a feed-forward.
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
    """Description of a model for placements. Unknown fields are None or empty.

    Args:
        task_type: PEFT's name of the task (`CAUSAL_LM`, `SEQ_2_SEQ_LM`, `SEQ_CLS`, ...).
        is_encoder_decoder: whether the model has an encoder and a decoder (T5).
        backbone: path of the module that embeds tokens and runs the layers; "" is the model itself.
        encoder, decoder: paths of the two stacks of an encoder-decoder.
        embedding: path of the token embedding.
        output_head: path of the head that computes token logits.
        task_heads: paths of the heads that were not pre-trained (a classifier).
        cache_argument: name of the backbone's argument for the attention cache.
        hidden_size, num_layers, num_heads, num_kv_heads, head_dim: sizes.
        sublayers: attention and feed-forward sublayers of all layers, observed on first use; empty if that fails.
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

    If it has two such parts, as MusicGen's text encoder and audio decoder, return the generating part.
    """
    if not hasattr(config, "get_text_config"):
        return config
    try:
        return config.get_text_config()
    except ValueError:  # ambiguous, because there are several
        return config.get_text_config(decoder=True)


def config_fields(config: Any) -> dict[str, Any]:
    """Return the fields of a model's config by name. For a dictionary, return its items; for other values, nothing."""
    items = config if isinstance(config, Mapping) else getattr(config, "__dict__", {})
    return {name: value for name, value in items.items() if isinstance(name, str)}
