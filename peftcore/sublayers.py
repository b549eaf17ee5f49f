"""Where the sublayers of known transformer layers lie: attention, cross-attention and feed-forward.

A layer is known by its class. For a family that is missing here, add a row, or name modules in the config.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Literal

from torch import nn

from peftcore.adapted import base_modules, original_class

ATTENTION, CROSS_ATTENTION, FEED_FORWARD = "attention", "cross_attention", "feed_forward"


@dataclass(frozen=True)
class Sublayer:
    """One sublayer h = F(x) and what follows: the residual, and in post-norm models a norm.

        post-norm (BERT):  x --- F --- h --- (+ x) --- norm ---
        pre-norm (Llama):  s --- norm --- x --- F --- h --- (+ s) ---

    Args:
        kind: which of the three it is.
        layer: index in its stack; encoder and decoder each count from 0.
        output: path of the module whose (first) output is h, before residual and norm. Dropout may follow.
        whole: path of the module that a branch from x to h runs beside. Its first argument is x and its (first)
            output is h; where `adds_residual`, its arguments are (h', x) and it adds them itself.
        adds_residual: see `whole`.
        norm: path of the norm whose input is h + x (post-norm), else None.
        stream: path of the module whose (first) output is h + s (pre-norm), None where no module's is.
        query: path of the layer that projects x to queries, None where keys and values share it.
        inner: paths of the layers from the hidden to the inner size of a feed-forward.
    """

    kind: Literal["attention", "cross_attention", "feed_forward"]
    layer: int
    output: str
    whole: str
    adds_residual: bool = False
    norm: str | None = None
    stream: str | None = None
    query: str | None = None
    inner: tuple[str, ...] = ()


def find(model: nn.Module) -> tuple[Sublayer, ...]:
    """The sublayers of all known layers of `model`, in its order; none where it has no known layer."""
    modules = dict(base_modules(model))
    return tuple(
        sublayer
        for path, module in modules.items()
        if path.rpartition(".")[2].isdigit()
        for sublayer in _of_layer(path, modules, _LAYERS.get(original_class(module).__name__, ()))
    )


def _of_layer(path: str, modules: dict[str, nn.Module], rows: tuple[Sublayer, ...]) -> Iterator[Sublayer]:
    for row in rows:
        if f"{path}.{row.output}" not in modules:
            continue  # a layer without cross-attention, or another release's names
        inside = {
            field.name: f"{path}.{value}" if value else path  # "" is the layer itself
            for field in fields(row)
            if isinstance(value := getattr(row, field.name), str) and field.name != "kind"
        }
        inner = tuple(there for name in row.inner if (there := f"{path}.{name}") in modules)
        yield Sublayer(row.kind, int(path.rpartition(".")[2]), adds_residual=row.adds_residual, inner=inner, **inside)


# One table a structure; paths are relative to the layer.

# Residual and norm are inside `*.output`, whose arguments are (inner states, x).
_BERT = (
    *(
        Sublayer(
            kind,
            0,
            output=f"{name}.output.dense",
            whole=f"{name}.output",
            adds_residual=True,
            norm=f"{name}.output.LayerNorm",
            query=f"{name}.self.query",
        )
        for kind, name in ((ATTENTION, "attention"), (CROSS_ATTENTION, "crossattention"))
    ),
    Sublayer(
        FEED_FORWARD,
        0,
        output="output.dense",
        whole="output",
        adds_residual=True,
        norm="output.LayerNorm",
        inner=("intermediate.dense",),
    ),
)
_DISTILBERT = (
    Sublayer(ATTENTION, 0, "attention", "attention", norm="sa_layer_norm", query="attention.q_lin"),
    Sublayer(FEED_FORWARD, 0, "ffn", "ffn", norm="output_layer_norm", inner=("ffn.lin1",)),
)
_VIT = (
    Sublayer(ATTENTION, 0, "attention", "attention", query="attention.q_proj"),
    Sublayer(FEED_FORWARD, 0, "mlp", "mlp", stream="", inner=("mlp.fc1",)),
)
_GPT2 = (  # queries, keys and values are one layer, `attn.c_attn`
    Sublayer(ATTENTION, 0, "attn", "attn"),
    Sublayer(CROSS_ATTENTION, 0, "crossattention", "crossattention", query="crossattention.q_attn"),
    Sublayer(FEED_FORWARD, 0, "mlp", "mlp", stream="", inner=("mlp.c_fc",)),
)
# Gemma 2 and 3 norm h once more before they add it: h is what comes before all norms.
_LLAMA = (
    Sublayer(ATTENTION, 0, "self_attn", "self_attn", query="self_attn.q_proj"),
    Sublayer(FEED_FORWARD, 0, "mlp", "mlp", stream="", inner=("mlp.gate_proj", "mlp.up_proj")),
)


_T5_OWN, _T5_CROSS = "layer.0.SelfAttention", "layer.1.EncDecAttention"
_T5 = (
    Sublayer(ATTENTION, 0, _T5_OWN, _T5_OWN, stream="layer.0", query=f"{_T5_OWN}.q"),
    Sublayer(CROSS_ATTENTION, 0, _T5_CROSS, _T5_CROSS, stream="layer.1", query=f"{_T5_CROSS}.q"),
    *(
        Sublayer(FEED_FORWARD, 0, path, path, stream=stream, inner=(f"{path}.wi", f"{path}.wi_0", f"{path}.wi_1"))
        for stream in ("layer.1", "layer.2")  # of the encoder, of the decoder
        for path in (f"{stream}.DenseReluDense",)
    ),
)

_LAYERS = {
    **dict.fromkeys(("BertLayer", "RobertaLayer", "XLMRobertaLayer", "CamembertLayer", "ElectraLayer"), _BERT),
    "TransformerBlock": _DISTILBERT,
    "ViTLayer": _VIT,
    "GPT2Block": _GPT2,
    **{
        f"{family}DecoderLayer": _LLAMA
        for family in ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2", "Gemma3", "SmolLM3")
    },
    **dict.fromkeys(("T5Block", "MT5Block"), _T5),
}
