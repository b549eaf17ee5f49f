"""Trainable tokens: rows of an embedding, and of a head tied to it, are trained.

      y [.., dim]                        logits [.., vocabulary]
          |                                      |
     .----+----.                            .----+----.
     |    W    |  <-- T [n, dim] of ids --> |    W    |    W' = W, with the rows `ids` replaced by T
     '----+----'                            '----+----'    y  = W'[token],   logits = W' x
        token                                  x [.., dim]

T starts as these rows. W' is never built. The method is Hugging Face PEFT's, which names no paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from peftcore.plugin import (
    Adapter,
    Architecture,
    Around,
    Base,
    Method,
    PeftRules,
    Placement,
    StateRules,
    embed_scale,
    hookimpl,
    looks_up,
    modules_tied_to,
    original_class,
    override,
    ranks,
    targets,
    tensor_name,
    validation,
)

peftcore_api = ">=3.0,<4"


@dataclass(frozen=True)
class TrainableTokensConfig:
    """Config with the fields and defaults of Hugging Face PEFT's `TrainableTokensConfig`.

    Args:
        token_indices: ids of the tokens, each once.
        target_modules: embeddings, or linear heads; None: the token embedding, and modules tied to it.
        init_weights: T starts as the rows of W; False: T is normal.
    """

    token_indices: Sequence[int] = ()
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> TrainableTokensConfig:
        named = self.target_modules or ([architecture.embedding] if architecture.embedding else None)
        validation.require(named is not None, "the model's token embedding is unknown. Name it: target_modules=[...]")
        return replace(self, target_modules=by_embedding(model, architecture, named))


class TokenRows(Adapter):
    """Rows T `[n, dim]` of the module at `path`; `ids` is sorted, and `places` has their positions in T."""

    ids: Tensor
    places: Tensor

    def __init__(self, path: str, module: Any, ids: Sequence[int], copy: bool = True) -> None:
        super().__init__()
        weight: Tensor = module.weight
        wrong = next((i for i in ids if not 0 <= i < len(weight)), None)
        validation.require(wrong is None, f"'{path}' has {len(weight)} rows, so no row for token {wrong}")
        once = 0 < len(set(ids)) == len(ids)
        validation.require(
            once, f"token ids for '{path}' must be distinct, and at least one, found {validation.shown(ids)}"
        )
        rows = torch.randn(len(ids), weight.shape[1])
        if copy and not weight.is_meta and not rows.is_meta:
            rows.copy_(ranks.whole(weight)[list(ids)])
        self.trainable_tokens_delta, self.path = nn.Parameter(rows), path
        self.is_table = isinstance(module, nn.Embedding) and looks_up(module)
        padding: Any = getattr(module, "padding_idx", None)  # gets no gradient, as in `nn.Embedding`
        self.padding = list(ids).index(padding) if padding in ids else None
        self.register_buffer("ids", torch.tensor(sorted(ids)), persistent=False)
        self.register_buffer("places", torch.tensor(ids).argsort(), persistent=False)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        module = base.module
        if isinstance(module, nn.Embedding) and self.is_table and not x.is_floating_point():
            y, at = base(x), torch.searchsorted(self.ids, x.contiguous()).clamp(max=len(self.ids) - 1)
            rows = F.embedding(self.places[at], self.trainable_tokens_delta, self.padding).to(y.dtype)
            return torch.where((self.ids[at] == x)[..., None], rows * embed_scale(module), y)
        if original_class(module).forward is not nn.Linear.forward:
            return base.on_weights({"weight": self.replaced})(x)
        y, bias = base(x), None if module.bias is None else module.bias[self.ids]
        rows = self.trainable_tokens_delta[self.places].to(x.dtype)
        return y.index_copy(-1, self.ids, F.linear(x, rows, bias).to(y.dtype))

    def replaced(self, weight: Tensor) -> Tensor:
        return weight.index_copy(0, self.ids, self.trainable_tokens_delta[self.places].to(weight.dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.replaced(weight), bias


def token_rows(model: nn.Module, path: str, ids: Sequence[int], copy: bool = True, together: bool = True) -> list[Any]:
    """Return rows `ids` for the module at `path`, and, if `together`, the same parameters for modules tied to it."""
    module = model.get_submodule(path)
    weight, kind = module._parameters.get("weight"), original_class(module).__name__
    validation.require(
        weight is not None and weight.is_floating_point() and weight.itemsize > 1,
        f"'{path}' ({kind}) is quantized, so its rows cannot be trained. Leave it out of quantization (skip=...)",
    )
    others = modules_tied_to(model, path) if together else []
    rows = TokenRows(path, module, ids, copy)
    return [Around(each, rows) for each in (path, *others)]


def export(placement: Around) -> dict[str, Tensor]:
    """Return T for a tied module, since PEFT writes it for each."""
    rows: Any = placement.adapter
    name = tensor_name(placement, "trainable_tokens_delta")
    return {} if placement.path == rows.path else {name: rows.trainable_tokens_delta}


def biased_heads(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the linear layers among the modules `paths` that have a bias, which PEFT leaves out of their outputs."""
    modules = {path: model.get_submodule(path) for path in paths}
    return [path for path, each in modules.items() if isinstance(each, nn.Linear) and each.bias is not None]


def refused(model: nn.Module, tensors: Mapping[str, Tensor], _fields: Mapping[str, Any]) -> str | None:
    """Return why a file cannot be read: PEFT trained rows of a linear layer without its bias, and merges with it."""
    names = {name.removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter") for name in tensors}
    named = [path for path, _ in targets.base_modules(model) if f"base_model.model.{path}" in names]
    heads = biased_heads(model, [each for path in named for each in (path, *modules_tied_to(model, path))])
    if not heads:
        return None
    return (
        f"PEFT computes '{heads[0]}' without its bias if rows of it are trained, so the adapter was trained on "
        "outputs that differ from this model's. To load it, remove the bias: "
        f"model.get_submodule('{heads[0]}').bias = None"
    )


def selected(model: nn.Module, architecture: Architecture, named: Any) -> list[str]:
    """Return the paths of the embeddings and linear layers that `named` selects."""
    kinds = (nn.Embedding, nn.Linear)
    return list(targets.select(model, architecture, target_modules=named, supported=lambda m: isinstance(m, kinds)))


def by_embedding(model: nn.Module, architecture: Architecture, named: Any) -> Any:
    """Return `named` with the token embedding instead of modules tied to it.

    The rows are one parameter either way. PEFT adapts the head together with a named embedding, but not the embedding
    together with a named head, so a file that names the head would be a different model in PEFT.
    """
    embedding = architecture.embedding
    tied = modules_tied_to(model, embedding) if embedding else []
    chosen = selected(model, architecture, named) if tied else []
    if not set(chosen) & set(tied):
        return named
    return [embedding, *(path for path in chosen if path != embedding and path not in tied)]


def place(model: nn.Module, config: TrainableTokensConfig, architecture: Architecture) -> list[Placement]:
    chosen = selected(model, architecture, config.target_modules or [])
    there = dict(model.named_modules())
    placed: dict[str, Any] = {}  # tied modules are placed together
    for path in chosen:
        no_rows = f"'{path}' is a layer of one expert, and its rows are not tokens. Leave it out of target_modules"
        validation.require(path in there, no_rows)
        if path not in placed:
            placed |= {each.path: each for each in token_rows(model, path, config.token_indices, config.init_weights)}
    return list(placed.values())


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules("TRAINABLE_TOKENS", export=export, peft=PeftRules(unreadable=biased_heads, refused=refused))
    return [Method("trainable-tokens", TrainableTokensConfig, place, rules, learning_rate=1e-3)]
