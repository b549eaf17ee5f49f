"""`trainable_token_indices`: rows of embeddings trained next to LoRA, by the plugin peftcore-trainable-tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from peftcore.plugin import Architecture, base_modules, modules_tied_to, nearest, targets, validation
from peftcore_lora.config import LoraConfig

try:
    from peftcore_trainable_tokens import TokenRows, biased_heads, refused, token_rows
except ImportError:
    token_rows = refused = None  # type: ignore[assignment]


def refused_tokens(model: nn.Module, tensors: Mapping[str, Tensor], fields: Mapping[str, Any]) -> str | None:
    """Return the reason why the token rows of PEFT's file cannot be read, or None."""
    if refused is None or not fields.get("trainable_token_indices"):
        return None
    return refused(model, tensors, fields)


def misread_heads(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the modules among `paths` that have trained rows and a bias, which PEFT does not add."""
    if token_rows is None:
        return []
    heads = biased_heads(model, paths)
    return [path for path in heads if any(isinstance(m, TokenRows) for m in model.get_submodule(path).modules())]


def place_tokens(model: nn.Module, config: LoraConfig, architecture: Architecture) -> list[Any]:
    """Return placements for the rows that the config names.

    Modules tied to the embedding train the same rows, unless the config names other rows for them. Those are trained
    separately, which ensure_weight_tying=True refuses.
    """
    token_ids = config.trainable_token_indices or []
    validation.require(
        token_rows is not None,
        "trainable_token_indices needs the plugin peftcore-trainable-tokens, which is not installed. Install it",
    )
    if not isinstance(token_ids, Mapping):
        validation.require(
            architecture.embedding is not None,
            "the model's token embedding is unknown. Pass its name: trainable_token_indices={name: [...]}",
        )
        token_ids = {str(architecture.embedding): token_ids}
    rows = _by_path(model, token_ids)
    for path in rows:
        saved_entry = next((entry for entry in config.modules_to_save or () if targets.is_inside(entry, path)), None)
        validation.require(
            saved_entry is None,
            f"'{path}' is trained in full (modules_to_save has '{saved_entry}'), but trainable_token_indices also "
            "selects rows of it. Remove it from one of the two",
        )
    placements: dict[str, Any] = {}
    # The embedding comes first, since its placements include the modules tied to it.
    for path in sorted(rows, key=lambda path: path != architecture.embedding):
        if path in placements:
            continue
        tied_paths = modules_tied_to(model, path) if path == architecture.embedding else []
        conflict = next((tied for tied in tied_paths if list(rows.get(tied, rows[path])) != list(rows[path])), None)
        validation.require(
            conflict is None or not config.ensure_weight_tying,
            f"trainable_token_indices names different rows of '{conflict}' and '{path}', which are tied. Name equal "
            "rows, or train the two separately: ensure_weight_tying=False",
        )
        for placement in token_rows(model, path, rows[path], together=bool(tied_paths) and not conflict):
            placements[placement.path] = placement
    return list(placements.values())


def _by_path(model: nn.Module, token_ids: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    """Return `token_ids` with the full path of each module instead of the suffix that the config names."""
    candidates = [path for path, module in base_modules(model) if isinstance(module, (nn.Embedding, nn.Linear))]
    leaves = [path.rpartition(".")[2] for path in candidates]
    rows: dict[str, Sequence[int]] = {}
    for name, ids in token_ids.items():
        paths = [path for path in candidates if targets.matches(name, path)]
        validation.require(
            bool(paths),
            f"trainable_token_indices: '{name}' is not an embedding or head{nearest(name, [*candidates, *leaves])}",
        )
        rows |= dict.fromkeys(paths, ids)
    return rows
