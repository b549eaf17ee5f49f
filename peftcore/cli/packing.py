"""`--pack`: several short examples in one row, which do not see one another.

A row says by positions that begin anew at 0 where an example begins. transformers makes of these a mask that is block
diagonal where the model's attention has one; a first label of an example is not learned, since what would predict it is
the example before. Whether a model, with its adapters, really keeps examples apart is found by trying (`check`).
"""

from __future__ import annotations

import bisect
import contextlib
import copy
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.cli.conversations import IGNORED
from peftcore.errors import PeftcoreError

Example = dict[str, Any]
_CLOSE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 3e-3}  # of the norm; leaks are of the order of 1


def packed(examples: Sequence[Example], length: int) -> list[Example]:
    """Rows of at most `length` tokens, with `position_ids`. The longest example first, each where it leaves least room.

    Args:
        examples: with `input_ids` and `labels` of one length each.
    """
    rows: list[list[Example]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), in order
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
    """Packed rows as one batch, without an attention mask: each token of padding is an example of its own."""
    length = max(len(row["input_ids"]) for row in rows)
    values = {"input_ids": padding, "labels": IGNORED, "position_ids": 0}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in values.items()
    }
    return {**batch, "use_cache": False}  # with a cache positions say nothing of examples


def check(model: nn.Module, examples: Sequence[Example], what: str) -> None:
    """Raise a PeftcoreError unless `model` computes of an example in a row what it computes of it alone.

    Values that are trained are moved a little for that time: a fresh adapter may act on nothing yet.

    Args:
        what: of which the message is, such as `the model`.
    """
    first, second = examples[0], examples[min(1, len(examples) - 1)]
    other = {**first, "input_ids": first["input_ids"][::-1][1:] + second["input_ids"][:1]}
    why = "it refuses positions that begin anew"
    try:
        with _tried(model):
            alone = torch.cat([_logits(model, [each]) for each in (first, second)])
            together, changed = _logits(model, [first, second]), _logits(model, [other, second])
    except (TypeError, PeftcoreError) as error:
        why += f" ({str(error).partition(chr(10))[0]})"
    else:
        begin = len(first["input_ids"])
        apart = _distance(together, alone)
        leak = _distance(changed[begin:], together[begin:])
        close = _CLOSE.get(next(model.parameters()).dtype, 3e-2)
        if apart <= close and leak <= close:
            return
        why = f"it computes other values of them than alone, by {100 * max(apart, leak):.2g} %"
    raise PeftcoreError(f"--pack: {what} does not keep apart the examples of a row: {why}. Leave out --pack")


def _joined(examples: Sequence[Example]) -> Example:
    row: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORED, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row


def _logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """[tokens, vocabulary] of one row."""
    batch = collate([_joined(examples)], 0)
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    return model(**inputs, use_cache=False).logits[0].float()


def _distance(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-12))


@contextlib.contextmanager
def _tried(model: nn.Module) -> Iterator[None]:
    """The model in evaluation, without gradients, its trained values moved by noise; all is afterwards as it was."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    kept, was_training = [copy.deepcopy(parameter.data) for parameter in trained], model.training
    draw = torch.Generator().manual_seed(0)
    model.eval()
    try:
        with torch.no_grad():
            for parameter in trained:
                noise = torch.randn(parameter.shape, generator=draw, dtype=torch.float32)
                parameter.add_((0.05 * noise).to(parameter))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained, kept, strict=True):
                parameter.copy_(value)
        model.train(was_training)
