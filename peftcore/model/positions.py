"""Number of positions in a model's learned position embedding."""

from __future__ import annotations

from torch import nn

_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
_OTHER_MODALITIES = ("vision", "visual", "audio")  # parts of a model that do not read tokens


def number_of_positions(model: nn.Module) -> int | None:
    """Return the number of learned position embeddings of the model; None if it has none."""
    counts = []
    for path, module in model.named_modules():
        is_table = isinstance(module, nn.Embedding) and path.rpartition(".")[2] in _TABLES
        if is_table and not any(part in path for part in _OTHER_MODALITIES):
            offset = getattr(module, "offset", None)  # OPT and BART have extra rows before the first position
            if offset is None:
                # RoBERTa's positions start after the padding index.
                offset = 0 if module.padding_idx is None else module.padding_idx + 1
            counts.append(int(module.num_embeddings) - offset)
    return min(counts, default=None)
