"""Several adapters in one batch: sample i passes through the adapter of the i-th name, or through none.

The module runs once for each adapter on the samples that are its own. An adapter's class that can do better has

    @staticmethod
    per_sample(adapters, index, base, *args, **kwargs) -> output, or NotImplemented

where `index`, int64 `[samples]`, says which of `adapters` (of this class) a sample passes through; -1 for none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftcore.adaptation.outputs import first_of, with_first
from peftcore.errors import PeftcoreError


class PerSample:
    """The link of a module's chain that gives each sample its adapter.

    Args:
        links: by name, (adapter, what calls it around the module).
        samples: a name of `links` or None for each sample, which are dimension 0 of every tensor.
        behind: all adapters stand behind the module, not around it.
    """

    __slots__ = ("_adapters", "_base", "_behind", "_index", "_links", "_samples", "module")

    def __init__(
        self,
        base: Any,
        links: dict[str, tuple[nn.Module, Callable[..., Any]]],
        samples: Sequence[str | None],
        behind: bool,
    ) -> None:
        self.module, self._base, self._behind = base.module, base, behind
        names = list(links)
        self._adapters = [adapter for adapter, _ in links.values()]
        self._links = [link for _, link in links.values()]
        self._samples = [names.index(name) if name in links else -1 for name in samples]
        self._index = torch.tensor(self._samples)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        found = None if first is None or not first.dim() else first.shape[0]
        if first is None or found is None or found != len(self._samples):
            raise PeftcoreError(
                f"{len(self._samples)} samples were given adapters (activate(..., per_sample=True)), but "
                f"{type(self.module).__name__} gets " + ("no batch" if found is None else f"a batch of {found}")
            )
        kinds = {type(adapter) for adapter in self._adapters}
        together = getattr(next(iter(kinds)), "per_sample", None) if len(kinds) == 1 else None
        if together is not None:
            if self._index.device != first.device:
                self._index = self._index.to(first.device)
            output = together(self._adapters, self._index, self._base, *args, **kwargs)
            if output is not NotImplemented:
                return output
        if self._behind:
            return self._after(*args, **kwargs)
        parts, order, counts = [], [], []
        for which, own in self._groups():
            call = self._base if which < 0 else self._links[which]
            if len(own) == found:
                return call(*args, **kwargs)
            rows = torch.tensor(own, device=first.device)
            parts.append(call(*_taken(args, rows, found), **_taken(kwargs, rows, found)))
            order += own
            counts.append(len(own))
        return _joined(parts, counts, torch.tensor(order, device=first.device).argsort())

    def _groups(self) -> list[tuple[int, list[int]]]:
        """(adapter or -1, its samples)."""
        return [
            (which, [i for i, other in enumerate(self._samples) if other == which])
            for which in sorted(set(self._samples))
        ]

    def _after(self, *args: Any, **kwargs: Any) -> Any:
        """All adapters stand behind the module, which then runs once, on the whole batch."""
        output = self._base(*args, **kwargs)
        first = first_of(output)
        parts, order, counts = [], [], []
        for which, own in self._groups():
            y = first[torch.tensor(own, device=first.device)]
            parts.append(y if which < 0 else self._adapters[which](y))
            order += own
            counts.append(len(own))
        first = _joined(parts, counts, torch.tensor(order, device=first.device).argsort())
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
