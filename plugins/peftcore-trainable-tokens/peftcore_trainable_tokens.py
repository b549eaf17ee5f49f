"""Trainable tokens: train rows of an embedding, and of a head tied to it.

      y [.., dim]                        logits [.., vocabulary]
          |                                      |
     .----+----.                            .----+----.
     |    W    |  <-- T [n, dim] of ids --> |    W    |    W' = W, with the rows `ids` replaced by T
     '----+----'                            '----+----'    y  = W'[token],   logits = W' x
        token                                  x [.., dim]

T is initialised with these rows. W' is never built. The method comes from Hugging Face PEFT; there is no paper.
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
        token_indices: token ids, without repetition.
        target_modules: embeddings or linear heads. None: the token embedding and modules tied to it.
        init_weights: True: T starts as the rows of W. False: T is normal.
    """

    token_indices: Sequence[int] = ()
    target_modules: str | Sequence[str] | None = None
    init_weights: bool = True

    def __post_init__(self) -> None:
        validation.check_types(self)

    def resolved(self, model: nn.Module, architecture: Architecture) -> TrainableTokensConfig:
        target_modules = self.target_modules or ([architecture.embedding] if architecture.embedding else None)
        validation.require(
            target_modules is not None, "the model's token embedding is unknown. Pass its name: target_modules=[...]"
        )
        return replace(self, target_modules=by_embedding(model, architecture, target_modules))


class TokenRows(Adapter):
    """Rows T `[n, dim]` of the module at `path`. `ids` is sorted; `positions` has each id's row in T."""

    ids: Tensor
    positions: Tensor

    def __init__(self, path: str, module: Any, ids: Sequence[int], copy: bool = True) -> None:
        super().__init__()
        weight: Tensor = module.weight
        missing_id = next((i for i in ids if not 0 <= i < len(weight)), None)
        validation.require(
            missing_id is None,
            f"'{path}' has {len(weight)} rows, so no row for token {missing_id}. Choose other ids, or call "
            "resize_token_embeddings first",
        )
        are_distinct = 0 < len(set(ids)) == len(ids)
        validation.require(
            are_distinct, f"token ids for '{path}' must be distinct, and at least one, found {validation.shown(ids)}"
        )
        rows = torch.randn(len(ids), weight.shape[1])
        if copy and not weight.is_meta and not rows.is_meta:
            rows.copy_(ranks.whole(weight)[list(ids)])
        self.trainable_tokens_delta, self.path = nn.Parameter(rows), path
        self.is_table = isinstance(module, nn.Embedding) and looks_up(module)
        # As in `nn.Embedding`, the padding token gets no gradient.
        padding: Any = getattr(module, "padding_idx", None)
        self.padding = list(ids).index(padding) if padding in ids else None
        self.register_buffer("ids", torch.tensor(sorted(ids)), persistent=False)
        self.register_buffer("positions", torch.tensor(ids).argsort(), persistent=False)

    def forward(self, base: Base, x: Tensor) -> Tensor:
        module = base.module
        if isinstance(module, nn.Embedding) and self.is_table and not x.is_floating_point():
            y, index = base(x), torch.searchsorted(self.ids, x.contiguous()).clamp(max=len(self.ids) - 1)
            rows = F.embedding(self.positions[index], self.trainable_tokens_delta, self.padding).to(y.dtype)
            return torch.where((self.ids[index] == x)[..., None], rows * embed_scale(module), y)
        if original_class(module).forward is not nn.Linear.forward:
            return base.on_weights({"weight": self.with_rows})(x)
        y, bias = base(x), None if module.bias is None else module.bias[self.ids]
        rows = self.trainable_tokens_delta[self.positions].to(x.dtype)
        return y.index_copy(-1, self.ids, F.linear(x, rows, bias).to(y.dtype))

    def with_rows(self, weight: Tensor) -> Tensor:
        """Return the weight with the rows of `ids` replaced by T."""
        return weight.index_copy(0, self.ids, self.trainable_tokens_delta[self.positions].to(weight.dtype))

    @override
    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        return self.with_rows(weight), bias


def token_rows(model: nn.Module, path: str, ids: Sequence[int], copy: bool = True, together: bool = True) -> list[Any]:
    """Place rows `ids` on the module at `path` and, if `together`, the same parameter on modules tied to it."""
    module = model.get_submodule(path)
    weight, class_name = module._parameters.get("weight"), original_class(module).__name__
    validation.require(
        weight is not None and weight.is_floating_point() and weight.itemsize > 1,
        f"'{path}' ({class_name}) is quantized, so its rows cannot be trained. Leave it out of quantization (skip=...)",
    )
    tied = modules_tied_to(model, path) if together else []
    rows = TokenRows(path, module, ids, copy)
    return [Around(adapted_path, rows) for adapted_path in (path, *tied)]


def export(placement: Around) -> dict[str, Tensor]:
    """Return T under the name of a tied module, since PEFT writes it for each."""
    rows: Any = placement.adapter
    name = tensor_name(placement, "trainable_tokens_delta")
    return {} if placement.path == rows.path else {name: rows.trainable_tokens_delta}


def biased_heads(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the linear layers among `paths` that have a bias, which PEFT's forward ignores."""
    modules = {path: model.get_submodule(path) for path in paths}
    return [path for path, module in modules.items() if isinstance(module, nn.Linear) and module.bias is not None]


def refused(model: nn.Module, tensors: Mapping[str, Tensor], _fields: Mapping[str, Any]) -> str | None:
    """Return why a file cannot be loaded, or None. PEFT ignores a head's bias in training, but not in merging."""
    names = {name.removesuffix(".trainable_tokens_delta").removesuffix(".token_adapter") for name in tensors}
    paths = [path for path, _ in targets.base_modules(model) if f"base_model.model.{path}" in names]
    tied: list[str] = []
    for path in paths:
        tied += modules_tied_to(model, path)
    heads = biased_heads(model, [*paths, *tied])
    if not heads:
        return None
    return (
        f"PEFT computes '{heads[0]}' without its bias while its rows are trained, so the adapter was trained on "
        "outputs that differ from this model's. To load it, remove the bias: "
        f"model.get_submodule('{heads[0]}').bias = None"
    )


def selected(model: nn.Module, architecture: Architecture, target_modules: Any) -> list[str]:
    """Return the paths of the selected embeddings and linear layers."""
    kinds = (nn.Embedding, nn.Linear)
    return list(
        targets.select(model, architecture, target_modules=target_modules, supported=lambda m: isinstance(m, kinds))
    )


def by_embedding(model: nn.Module, architecture: Architecture, target_modules: Any) -> Any:
    """Return target_modules with the token embedding instead of modules tied to it.

    The rows are one parameter either way. PEFT adapts a tied head together with a named embedding, but no tied
    embedding together with a named head, so a file that names the head would be a different model in PEFT.
    """
    embedding = architecture.embedding
    tied = modules_tied_to(model, embedding) if embedding else []
    paths = selected(model, architecture, target_modules) if tied else []
    if not set(paths) & set(tied):
        return target_modules
    return [embedding, *(path for path in paths if path != embedding and path not in tied)]


def place(model: nn.Module, config: TrainableTokensConfig, architecture: Architecture) -> list[Placement]:
    paths = selected(model, architecture, config.target_modules or [])
    modules = dict(model.named_modules())
    placements: dict[str, Any] = {}  # tied modules are placed together
    for path in paths:
        no_rows = f"'{path}' is a layer of one expert, whose rows are not tokens. Leave it out of target_modules"
        validation.require(path in modules, no_rows)
        if path not in placements:
            rows = token_rows(model, path, config.token_indices, config.init_weights)
            placements |= {placement.path: placement for placement in rows}
    return list(placements.values())


@hookimpl
def peftcore_methods() -> list[Method]:
    rules = StateRules("TRAINABLE_TOKENS", export=export, peft=PeftRules(unreadable=biased_heads, refused=refused))
    return [Method("trainable-tokens", TrainableTokensConfig, place, rules, learning_rate=1e-3)]
