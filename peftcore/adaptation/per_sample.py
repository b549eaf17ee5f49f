"""Several adapters in one batch: sample i passes through the adapter of the i-th name, or through none.

The module runs once for each adapter on the samples that are its own. An adapter's class that can do better has

    @staticmethod
    per_sample(adapters, index, base, *args, **kwargs) -> output, or NotImplemented

where `index`, int64 `[samples]`, says which of `adapters` (of this class) a sample passes through; -1 for none.

In a mixture of experts some modules get the tokens of all samples in one dimension, sample after sample. Which call of
the model they belong to says how many each sample has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adaptation.call import current_call
from peftcore.adaptation.concurrency import ModelLock
from peftcore.adaptation.outputs import first_of, with_first
from peftcore.errors import PeftcoreError

_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")  # what a call gets its tokens by


class PerSample:
    """The link of a module's chain that gives each sample its adapter.

    Args:
        links: by name, (adapter, what calls it around the module).
        samples: a name of `links` or None for each sample, which are dimension 0 of every tensor.
        behind: all adapters stand behind the module, not around it.
        lock: that of the model, whose calls are noted where it has experts.
    """

    __slots__ = ("_adapters", "_base", "_behind", "_index", "_links", "_lock", "_samples", "module")

    def __init__(
        self,
        base: Any,
        links: dict[str, tuple[nn.Module, Callable[..., Any]]],
        samples: Sequence[str | None],
        behind: bool,
        lock: ModelLock,
    ) -> None:
        self.module, self._base, self._behind, self._lock = base.module, base, behind, lock
        names = list(links)
        self._adapters = [adapter for adapter, _ in links.values()]
        self._links = [link for _, link in links.values()]
        self._samples = [names.index(name) if name in links else -1 for name in samples]
        self._index = torch.tensor(self._samples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = 0 if first is None or not first.dim() else first.shape[0]
        each = self._rows_of_each(rows)
        if first is None or each is None:
            batch = self._batch()
            found = rows if batch is None or batch[0] == len(self._samples) else batch[0]
            raise PeftcoreError(
                f"{len(self._samples)} samples were given adapters (activate(..., per_sample=True)), but "
                f"{type(self.module).__name__} gets "
                + ("no batch" if first is None or not first.dim() else f"a batch of {found}")
            )
        kinds = {type(adapter) for adapter in self._adapters}
        together = getattr(next(iter(kinds)), "per_sample", None) if len(kinds) == 1 else None
        if together is not None:
            if self._index.device != first.device:
                self._index = self._index.to(first.device)
            index = self._index if each == 1 else self._index.repeat_interleave(each)
            output = together(self._adapters, index, self._base, *args, **kwargs)
            if output is not NotImplemented:
                return output
        if self._behind:
            return self._after(each, *args, **kwargs)
        parts, order = [], []
        for which, own in self._groups(each, first.device):
            call = self._base if which < 0 else self._links[which]
            if len(own) == rows:
                return call(*args, **kwargs)
            parts.append(call(*_taken(args, own, rows), **_taken(kwargs, own, rows)))
            order.append(own)
        return _joined(parts, [len(own) for own in order], torch.cat(order).argsort())

    def _batch(self) -> tuple[int, int] | None:
        """(samples, tokens of each) of the running call of the model, where they are noted."""
        if self._lock.context is None:
            return None
        call = current_call()
        given = (call.get(name) for name in (*_TOKENS, *call))
        return next(((t.shape[0], t.shape[1]) for t in given if isinstance(t, Tensor) and t.dim() > 1), None)

    def _rows_of_each(self, rows: int) -> int | None:
        """How many of `rows` a sample has; None where they are not those of these samples."""
        samples, batch = len(self._samples), self._batch()
        if batch is not None and batch[0] != samples:
            return None
        if rows == samples:
            return 1
        return batch[1] if batch is not None and batch[1] and rows == samples * batch[1] else None

    def _groups(self, each: int, device: torch.device) -> list[tuple[int, Tensor]]:
        """(adapter or -1, its rows)."""
        groups = []
        for which in sorted(set(self._samples)):
            own = torch.tensor([i for i, other in enumerate(self._samples) if other == which], device=device)
            if each > 1:
                own = (own[:, None] * each + torch.arange(each, device=device)).flatten()
            groups.append((which, own))
        return groups

    def _after(self, each: int, *args: Any, **kwargs: Any) -> Any:
        """All adapters stand behind the module, which then runs once, on the whole batch."""
        output = self._base(*args, **kwargs)
        first = first_of(output)
        parts, order = [], []
        for which, own in self._groups(each, first.device):
            y = first[own]
            parts.append(y if which < 0 else self._adapters[which](y))
            order.append(own)
        first = _joined(parts, [len(own) for own in order], torch.cat(order).argsort())
        return with_first(output, first)


def _taken(value: Any, rows: Tensor, samples: int) -> Any:
    """Those samples of an argument; what all samples share stays."""
    if isinstance(value, Tensor):
        if not value.dim() or (value.shape[0] == 1 and samples > 1):
            return value
        if value.shape[0] == samples:
            return value[rows]
        raise PeftcoreError(
            f"an adapter for each of {samples} samples: an argument of shape {list(value.shape)} cannot be split"
        )
    if type(value) in (tuple, list):
        return type(value)(_taken(each, rows, samples) for each in value)
    if type(value) is dict:
        return {key: _taken(each, rows, samples) for key, each in value.items()}
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise PeftcoreError(
        f"an adapter for each of {samples} samples: an argument of type {type(value).__name__} cannot be split. "
        "Only adapters of layers such as linear ones can be mixed in a batch"
    )


def _joined(parts: list[Any], counts: list[int], order: Tensor) -> Any:
    """The outputs of all samples, in their order; what all samples of a group share, as T5's biases of positions, too.

    Args:
        counts: how many samples each of the parts is of.
    """
    if isinstance(parts[0], Tensor):
        rows = [part if part.shape[:1] == (n,) else _shared(part, n) for part, n in zip(parts, counts, strict=True)]
        return torch.cat(rows)[order]
    if type(parts[0]) in (tuple, list):
        return type(parts[0])(_joined(list(each), counts, order) for each in zip(*parts, strict=True))
    if parts[0] is None:
        return None
    raise PeftcoreError(f"an adapter for each sample: an output of type {type(parts[0]).__name__} cannot be joined")


def _shared(part: Tensor, samples: int) -> Tensor:
    """What is the same for all samples of a group, for each of them."""
    if part.shape[:1] != (1,):
        raise PeftcoreError(
            f"an adapter for each sample: an output of shape {list(part.shape)} for {samples} samples is not joined. "
            "Only adapters of layers such as linear ones can be mixed in a batch"
        )
    return part.expand(samples, *part.shape[1:])
