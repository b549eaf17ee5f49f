"""Encoded examples: lengths, batches of similar lengths, and casts to the model's dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.torch_version import TorchVersion

Example = dict[str, Any]
_MIXES_DTYPES = TorchVersion(torch.__version__) >= "2.12"  # in the gradient of `mse_loss`


@dataclass(frozen=True)
class Encoded:
    """Examples as token ids, with the numbers of truncated rows and of dropped rows without a token to learn."""

    examples: list[Example]
    truncated: int
    left_out: int = 0


def length(example: Example) -> int:
    """Return the number of tokens of an example's longest text (of source and target, the longer); 1 for an image."""
    if "texts" in example:
        return max(map(len, example["texts"]))
    labels = example.get("labels")
    return max(len(example.get("input_ids", (0,))), len(labels) if isinstance(labels, list) else 0)


def is_encoder_decoder(model: nn.Module) -> bool:
    """Return whether the model is an encoder-decoder."""
    return bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))


def in_dtype(inputs: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Cast pixels and spectrograms to the dtype of the model, and with PyTorch before 2.12 a regression's labels."""
    names = {"pixel_values", "input_features"}
    if not _MIXES_DTYPES and getattr(getattr(model, "config", None), "problem_type", None) == "regression":
        names.add("labels")
    dtype = getattr(model, "dtype", torch.float32)
    floats = {name: value.to(dtype) for name, value in inputs.items() if name in names}
    return {**inputs, **floats}


def batches_of(examples: Sequence[Example], batch_size: int, tokens: int | None = None) -> Iterator[list[Example]]:
    """Yield batches of similar lengths, with at most `tokens` tokens including padding or a single longer example."""
    batch: list[Example] = []
    for i in sorted(range(len(examples)), key=lambda i: length(examples[i])):
        example = examples[i]
        is_full = len(batch) == batch_size or (tokens is not None and (len(batch) + 1) * length(example) > tokens)
        if batch and is_full:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch
