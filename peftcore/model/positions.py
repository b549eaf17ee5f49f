"""Number of positions of a model with a table of them."""

from __future__ import annotations

from torch import nn

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_OTHERS = ("vision", "visual", "audio")  # parts of a model that read something other than tokens


def number_of_positions(model: nn.Module) -> int | None:
    """Return the number of tokens that the model has positions for, or None if it has no table of positions."""
    found = []
    for path, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES
        if is_table and not any(part in path for part in _OTHERS):
            before = getattr(module, "offset", None)  # rows before the first position, as in OPT and BART
            if before is None:
                before = 0 if module.padding_idx is None else module.padding_idx + 1  # as in RoBERTa
            found.append(int(module.num_embeddings) - before)
    return min(found, default=None)
