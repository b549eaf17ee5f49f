"""`trainable_token_indices`: rows of embeddings, trained with LoRA as `peftcore-trainable-tokens` trains them."""

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
    """Return why the token rows of PEFT's file cannot be computed here, or None."""
    return refused(model, tensors, fields) if refused is not None and fields.get("trainable_token_indices") else None


def misread_heads(model: nn.Module, paths: Iterable[str]) -> list[str]:
    """Return the modules among `paths` that have trained rows, and a bias that PEFT leaves out."""
    if token_rows is None:
        return []
    heads = biased_heads(model, paths)
    return [path for path in heads if any(isinstance(m, TokenRows) for m in model.get_submodule(path).modules())]


def place_tokens(model: nn.Module, config: LoraConfig, architecture: Architecture) -> list[Any]:
    """Return placements of the rows that the config names.

    Modules tied to the embedding have the same rows, unless others are named for them. Different rows are refused with
    ensure_weight_tying, and trained separately without.
    """
    given = config.trainable_token_indices or []
    validation.require(
        token_rows is not None,
        "trainable_token_indices needs the plugin peftcore-trainable-tokens, which is not installed. Install it",
    )
    if not isinstance(given, Mapping):
        validation.require(
            architecture.embedding is not None,
            "the model's token embedding is unknown. Name it: trainable_token_indices={name: [...]}",
        )
        given = {str(architecture.embedding): given}
    rows = _by_path(model, given)
    for path in rows:
        saved = next((entry for entry in config.modules_to_save or () if targets.is_inside(entry, path)), None)
        validation.require(
            saved is None,
            f"'{path}' is trained in full (modules_to_save names '{saved}'), and trainable_token_indices names rows of "
            "it. Leave one out",
        )
    placed: dict[str, Any] = {}
    for path in sorted(rows, key=lambda path: path != architecture.embedding):  # tied modules are placed with it
        if path in placed:
            continue
        tied = modules_tied_to(model, path) if path == architecture.embedding else []
        other = next((each for each in tied if list(rows.get(each, rows[path])) != list(rows[path])), None)
        validation.require(
            other is None or not config.ensure_weight_tying,
            f"trainable_token_indices names different rows of '{other}' and '{path}', which are tied. Name equal rows, "
            "or train the two separately: ensure_weight_tying=False",
        )
        placed |= {each.path: each for each in token_rows(model, path, rows[path], together=bool(tied) and not other)}
    return list(placed.values())


def _by_path(model: nn.Module, given: Mapping[str, Sequence[int]]) -> dict[str, Sequence[int]]:
    kinds = (nn.Embedding, nn.Linear)
    there = [path for path, module in base_modules(model) if isinstance(module, kinds)]
    found: dict[str, Sequence[int]] = {}
    for name, ids in given.items():
        paths = [path for path in there if targets.matches(name, path)]
        known = [part for path in there for part in (path, path.rpartition(".")[2])]
        validation.require(
            bool(paths), f"trainable_token_indices: '{name}' is not an embedding or head{nearest(name, known)}"
        )
        found |= dict.fromkeys(paths, ids)
    return found
