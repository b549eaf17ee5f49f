"""Place of the samples of a batch in the tensors of a module's arguments and output.

A model is called with samples in dimension 0 of its inputs. Inside it they may be elsewhere: as `[tokens, samples,
width]`, as `[samples · tokens, width]`, or nowhere, as in a bias that depends only on positions. Sizes do not show it
(there may be as many tokens as samples), so `observation.sample_rows` observes the model with batches of different
sizes, and stores the result on each adapted module.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from peftcore.errors import PeftcoreError
from peftcore.plugin.call import Call

ROWS = "_peftcore_rows"  # attribute of an adapted module: its `Rows`, or a string that says why they are not known
# Instead of `Samples`: all samples share the tensor; they share it, with a dimension 0 of size 1; unknown.
SHARED, BROADCAST, UNKNOWN = "shared", "broadcast", "unknown"


@dataclass(frozen=True)
class Samples:
    """Samples of a batch, one after another in dimension `dim` of a tensor.

    Args:
        dim: the dimension.
        each: number of entries of each sample, or, with `tokens`, of each of its tokens.
        tokens: names of arguments of the model, `[samples, tokens, ...]`; the first one of a call has as many tokens.
    """

    dim: int = 0
    each: int = 1
    tokens: tuple[str, ...] = ()

    def entries(self, call: Call | None) -> int | None:
        """Return the number of entries of each sample in this call of the model, or None if it is not known."""
        if not self.tokens:
            return self.each
        given = (call.get(name) for name in (*self.tokens, *call)) if call is not None else ()
        return next((self.each * t.shape[1] for t in given if isinstance(t, Tensor) and t.dim() > 1), None)


@dataclass(frozen=True)
class Rows:
    """Place of the samples in the tensors of a module's arguments and output.

    Args:
        first: in the first tensor argument.
        arguments: by name of the argument, `Samples` or one of the constants above for each tensor, in its containers.
        output: likewise for the output.
    """

    first: Samples
    arguments: Mapping[str, Any]
    output: Any


def entries_of(samples: Tensor, each: int) -> Tensor:
    """Return the numbers of the entries of these samples, `each` consecutive ones per sample."""
    if each == 1:
        return samples
    return (samples[:, None] * each + torch.arange(each, device=samples.device)).flatten()


def taken(value: Any, where: Any, samples: Tensor, count: int) -> Any:
    """Return the part of an argument that belongs to some samples of a batch; what all samples share stays whole.

    Args:
        value: a tensor, a plain value, or containers of them.
        where: place of the samples in it, as in `Rows.arguments`.
        samples: int64, the numbers of the samples.
        count: number of samples in the batch.

    Raises:
        PeftcoreError: the place of the samples in a part of it is not known.
    """
    if isinstance(value, Tensor):
        size = value.shape[0] if value.dim() else 1
        in_rows = isinstance(where, Samples) and where.dim == 0
        if where == SHARED or (size == 1 and (where in (BROADCAST, UNKNOWN) or (count > 1 and in_rows))):
            return value
        where = Samples() if where == BROADCAST else where
        if isinstance(where, Samples) and where.dim < value.dim() and value.shape[where.dim] % count == 0:
            return value.index_select(where.dim, entries_of(samples, value.shape[where.dim] // count))
        raise PeftcoreError(
            f"an adapter for each of {count} samples: it is not known which part of an argument of shape "
            f"{list(value.shape)} belongs to which sample. Run the samples of each adapter in a batch of their own"
        )
    if type(value) in (tuple, list):
        return type(value)(taken(each, _inside(where, value, i), samples, count) for i, each in enumerate(value))
    if type(value) is dict:
        return {key: taken(each, _inside(where, value, key), samples, count) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PeftcoreError(
        f"an adapter for each of {count} samples: an argument of type {type(value).__name__} cannot be split. "
        "Only adapters of layers such as linear ones can be mixed in a batch"
    )


def joined(parts: list[Any], where: Any, counts: list[int], order: Tensor) -> Any:
    """Join the outputs of groups of samples into one output for the whole batch.

    A tensor that all samples of a group share, such as T5's position bias, is repeated for each of them.

    Args:
        parts: the output of each group.
        where: place of the samples in it, as in `Rows.output`.
        counts: number of samples of each group.
        order: int64, for each sample of the batch its place among the samples of all groups.

    Raises:
        PeftcoreError: the place of the samples in a part of it is not known.
    """
    if isinstance(parts[0], Tensor):
        if isinstance(where, Samples) and _divide(parts, where.dim, counts):
            each = parts[0].shape[where.dim] // counts[0]
            return torch.cat(parts, where.dim).index_select(where.dim, entries_of(order, each))
        sizes = [part.shape[0] if part.dim() else 0 for part in parts]
        may_be = counts if where == BROADCAST else [1] * len(counts)  # may have been repeated for each sample already
        if all(size in (1, n) for size, n in zip(sizes, may_be, strict=True)):
            return torch.cat([part.expand(n, *part.shape[1:]) for part, n in zip(parts, counts, strict=True)])[order]
        raise PeftcoreError(
            f"an adapter for each sample: an output of shape {list(parts[0].shape)} for {counts[0]} samples cannot be "
            "joined. Only adapters of layers such as linear ones can be mixed in a batch"
        )
    if type(parts[0]) in (tuple, list):
        own = zip(*parts, strict=True)
        return type(parts[0])(joined(list(p), _inside(where, parts[0], i), counts, order) for i, p in enumerate(own))
    if isinstance(parts[0], dict):  # the outputs of transformers' models, too
        items = {key: joined([p[key] for p in parts], _inside(where, parts[0], key), counts, order) for key in parts[0]}
        return type(parts[0])(**items)
    if parts[0] is None:
        return None
    raise PeftcoreError(f"an adapter for each sample: an output of type {type(parts[0]).__name__} cannot be joined")


def first_in(where: Any) -> Any:
    """Return the place of the samples in the first tensor of an output."""
    if isinstance(where, (tuple, list, dict)):
        return first_in(next(iter(where.values() if isinstance(where, dict) else where), UNKNOWN))
    return where


def _divide(parts: list[Tensor], dim: int, counts: list[int]) -> bool:
    """Return whether each part has the same number of entries for each of its samples."""
    sizes = [part.shape[dim] if dim < part.dim() else 0 for part in parts]
    return all(size and size * counts[0] == sizes[0] * count for size, count in zip(sizes, counts, strict=True)) and (
        sizes[0] % counts[0] == 0
    )


def _inside(where: Any, container: Any, key: Any) -> Any:
    """Return the entry of `where` for one item of a container, which may have other items than the observed one."""
    if isinstance(container, dict):
        return where.get(key, UNKNOWN) if isinstance(where, dict) else UNKNOWN
    return where[key] if type(where) is type(container) and len(where) == len(container) else UNKNOWN
