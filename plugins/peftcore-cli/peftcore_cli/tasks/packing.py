"""`--pack`: pack several short examples into a row, without attention between them.

The positions in a row restart at 0 with each example. From these, transformers makes a block-diagonal mask if the
model's attention supports it. The first label of an example is not learned, because the previous example would predict
it. `check` verifies that the model with its adapters really keeps packed examples from attending to each other.
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
from peftcore_cli.data.disk_list import LazySequence
from peftcore_cli.tasks.conversations import IGNORE_INDEX
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.evaluation_mode import evaluating

CLOSE = {
    torch.float32: 1e-4,
    torch.bfloat16: 3e-2,
    torch.float16: 3e-3,
}  # relative to the norm; a leak changes outputs by about 1


class PackedRows(LazySequence[Example]):
    """Rows of several examples, with `position_ids`, which are joined when they are indexed.

    Args:
        examples: examples with `input_ids` and `labels` of equal length.
        indices: indices of the examples in each row.
    """

    def __init__(self, examples: Sequence[Example], indices: Sequence[Sequence[int]]) -> None:
        self.examples, self.indices = examples, indices

    def __len__(self) -> int:
        return len(self.indices)

    def item(self, index: int) -> Example:
        """Return a row."""
        return _join([self.examples[i] for i in self.indices[index]])


def pack(sizes: Sequence[int], length: int) -> list[list[int]]:
    """Pack examples into rows of at most `length` tokens, best fit, longest first; return the indices in each row.

    Args:
        sizes: number of tokens of each example.
        length: maximum number of tokens of a row.
    """
    rows: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free tokens, row), sorted
    for example in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        size = sizes[example]
        index = bisect.bisect_left(room, (size, -1))
        if index < len(room):
            free, row = room.pop(index)
        else:
            free, row = length, len(rows)
            rows.append([])
        rows[row].append(example)
        bisect.insort(room, (free - size, row))
    return rows


def collate(rows: Sequence[Example], padding: int) -> dict[str, Any]:
    """Collate packed rows without an attention mask; each padding token is an example of its own."""
    length = max(len(row["input_ids"]) for row in rows)
    values = {"input_ids": padding, "labels": IGNORE_INDEX, "position_ids": 0}
    batch = {
        name: torch.tensor([row[name] + [value] * (length - len(row[name])) for row in rows])
        for name, value in values.items()
    }
    return {**batch, "use_cache": False}  # with a cache, transformers does not read examples from positions


def check(model: nn.Module, examples: Sequence[Example], subject: str) -> None:
    """Raise a PeftcoreError unless `model` has the same output for an example in a row as for the example alone.

    Trained parameters are perturbed during the test, because a new adapter may have no effect yet.

    Args:
        model: the model.
        examples: examples to test with.
        subject: subject of the message, such as `the model`.
    """
    first_example, second_example = examples[0], examples[min(1, len(examples) - 1)]
    changed_first = {
        **first_example,
        "input_ids": first_example["input_ids"][::-1][1:] + second_example["input_ids"][:1],
    }
    reason = "the model rejects positions that restart"
    try:
        with perturb_parameters(model):
            separate = torch.cat([_logits(model, [example]) for example in (first_example, second_example)])
            joint, joint_changed = (
                _logits(model, [first_example, second_example]),
                _logits(model, [changed_first, second_example]),
            )
    except (TypeError, PeftcoreError) as error:
        reason += f" ({str(error).partition(chr(10))[0]})"
    else:
        begin = len(first_example["input_ids"])
        difference = distance(joint, separate)
        leak = distance(joint_changed[begin:], joint[begin:])
        close = CLOSE.get(next(model.parameters()).dtype, 3e-2)
        if difference <= close and leak <= close:
            return
        reason = f"packed outputs differ from unpacked outputs by {100 * max(difference, leak):.2g} %"
    raise PeftcoreError(
        f"--pack does not work with {subject}, which does not separate packed examples: {reason}. Remove --pack"
    )


def _join(examples: Sequence[Example]) -> Example:
    row: Example = {"input_ids": [], "labels": [], "position_ids": []}
    for example in examples:
        row["input_ids"] += example["input_ids"]
        row["labels"] += [IGNORE_INDEX, *example["labels"][1:]]
        row["position_ids"] += range(len(example["input_ids"]))
    return row


def _logits(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the logits of one row, [tokens, vocabulary]."""
    batch = collate([_join(examples)], 0)
    device = next(model.parameters()).device
    inputs = {name: batch[name].to(device) for name in ("input_ids", "position_ids")}
    return model(**inputs, use_cache=False).logits[0].float()


def distance(a: Tensor, b: Tensor) -> float:
    """Return the norm of the difference relative to the norm of `b`."""
    return float((a - b).norm() / b.norm().clamp_min(1e-12))


@contextlib.contextmanager
def perturb_parameters(model: nn.Module) -> Iterator[None]:
    """Inside the block, add noise to trained parameters, in evaluation mode without gradients."""
    trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    saved_values = [copy.deepcopy(parameter.data) for parameter in trained_parameters]
    generator = torch.Generator().manual_seed(0)
    try:
        with evaluating(model):
            for parameter in trained_parameters:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
                parameter.add_((0.05 * noise).to(parameter))
            yield
    finally:
        with torch.no_grad():
            for parameter, value in zip(trained_parameters, saved_values, strict=True):
                parameter.copy_(value)
