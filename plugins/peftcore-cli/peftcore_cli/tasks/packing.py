"""`--pack`: several short examples in one row, without attention between them.

A row has positions that start again at 0 with each example. transformers makes a block-diagonal mask from these if the
model's attention supports it; the first label of an example is not learned, because the example before would predict
it. Whether a model with its adapters really separates examples is tested (`check`).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.errors import PeftcoreError
from peftcore_cli.tasks.conversations import IGNORED
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import evaluating

CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # relative to the norm; leaks are of order 1


def packed(examples: Sequence[Example], length: int) -> list[Example]:
    """Return rows of at most `length` tokens, with `position_ids`, filled best-fit from the longest example.

    Args:
        examples: with `input_ids` and `labels` of equal length.
        length: of a row.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(examples, key=lambda each: -len(each["input_ids"])):
        size = len(example["input_ids"])
        place = bisect.bisect_left(room, (size, -1))
        if place < len(room):
            free, row = room.pop(place)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (free - size, row))
    return [_joined(row) for row in rows]


def collate(rows: list[Example], padding: int) -> dict[str, Any]:
    """Return packed rows as one batch, without an attention mask: each padding token is its own example."""
    length = max(len(row["input_ids"]) for row in rows)
    values = {"input_ids": padding, "labels": IGNORED, "position_ids": 0}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in values.items()
    }
    return {**batch, "use_cache": False}  # with a cache, positions do not mark examples


def check(model: nn.Module, examples: Sequence[Example], what: str) -> None:
    """Raise a PeftcoreError unless `model` computes the same for an example in a row as for it alone.

    Trained values are perturbed meanwhile, because a new adapter may have no effect yet.

    Args:
        model: the model.
        examples: what to try it on.
        what: subject of the message, such as `the model`.
    """
    first, second = examples[0], examples[min(1, len(examples) - 1)]
    other = {**first, "input_ids": first["input_ids"][::-1][1:] + second["input_ids"][:1]}
    why = "it rejects positions that start again"
    try:
        with tried(model):
            alone = torch.cat([_logits(model, [each]) for each in (first, second)])
            together, changed = _logits(model, [first, second]), _logits(model, [other, second])
    except (TypeError, PeftcoreError) as error:
        why += f" ({str(error).partition(chr(10))[0]})"
    else:
        begin = len(first["input_ids"])
        apart = distance(together, alone)
        leak = distance(changed[begin:], together[begin:])
        close = CLOSE.get(next(model.parameters()).dtype, 3e-2)
        if apart <= close and leak <= close:
            return
        why = f"their outputs differ from those alone by {100 * max(apart, leak):.2g} %"
    raise PeftcoreError(f"--pack: {what} does not separate the examples of a row: {why}. Leave out --pack")


def _joined(examples: Sequence[Example]) -> Example:
    row: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row


def _logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the logits of one row, [tokens, vocabulary]."""
    batch = collate([_joined(examples)], 0)
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    return model(**inputs, use_cache=False).logits[0].float()


def distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


@contextlib.contextmanager
def tried(model: nn.Module) -> Iterator[None]:
    """Run the model in evaluation mode without gradients, with noise on trained values; restore it afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept = [copy.deepcopy(parameter.data) for parameter in trained]
    draw = torch.Generator().manual_seed(0)
    try:
        with evaluating(model):
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
                parameter.add_((0.05 * noise).to(parameter))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
