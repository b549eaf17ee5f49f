"""Several adapters in one batch: sample i passes through the adapter of the i-th name, or through none.

The module runs once for each adapter on the samples that are its own. An adapter's class that can do better has

    @staticmethod
    per_sample(adapters, index, base, *args, **kwargs) -> output, or NotImplemented

where `index`, int64 `[samples]`, says which of `adapters` (of this class) a sample passes through; -1 for none.

In a mixture of experts some modules get the tokens of all samples in one dimension, sample after sample. Which call of
the model they belong to says how many each sample has.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.compiler import is_dynamo_compiling

from peftcore.adaptation.call import current_call
from peftcore.adaptation.concurrency import Activation, ModelLock
from peftcore.adaptation.outputs import first_of, with_first
from peftcore.errors import PeftcoreError

_TOKENS = ("input_ids", "inputs_embeds", "hidden_states")  # what a call gets its tokens by


class Chosen:
    """What an activation means at one module: its adapters that some sample has, and which of them each sample has.

    Args:
        there: all adapters of the module, by name.
    """

    __slots__ = ("_index", "adapters", "names", "samples", "together")

    def __init__(self, there: Mapping[str, nn.Module | None], activation: Activation) -> None:
        self.names = [name for name in activation.mixed if name in there]
        self.adapters: list[Any] = [there[name] for name in self.names]
        number: dict[str | None, int] = {name: i for i, name in enumerate(self.names)}
        self.samples = [number.get(name, -1) for name in activation.samples or ()]
        kinds = {type(adapter) for adapter in self.adapters}
        self.together = getattr(next(iter(kinds)), "per_sample", None) if len(kinds) == 1 else None
        self._index: Tensor | None = None

    def index(self, device: torch.device) -> Tensor:
        """int64 `[samples]`: which of the adapters a sample has; -1 for none."""
        if self._index is None or self._index.device != device:
            self._index = torch.tensor(self.samples, device=device)
        return self._index

    def groups(self, each: int, device: torch.device) -> list[tuple[int, Tensor]]:
        """(adapter or -1, its rows), of which each sample has so many."""
        groups = []
        for which in sorted(set(self.samples)):
            own = torch.tensor([i for i, other in enumerate(self.samples) if other == which], device=device)
            if each > 1:
                own = (own[:, None] * each + torch.arange(each, device=device)).flatten()
            groups.append((which, own))
        return groups


class PerSample:
    """The link of a module's chain that gives each sample its adapter, as the activation of its model's lock has it.

    Args:
        adapters: those of the module, by name.
        behind: names of those that stand behind the module, not around it.
        link: (name) -> what calls that adapter around the module.
        lock: that of the model, whose calls are noted where it has experts.
    """

    __slots__ = ("_adapters", "_base", "_behind", "_link", "_lock", "module")

    def __init__(
        self,
        base: Any,
        adapters: Mapping[str, nn.Module | None],
        behind: Collection[str],
        link: Callable[[str], Callable[..., Any]],
        lock: ModelLock,
    ) -> None:
        self.module, self._base, self._lock = base.module, base, lock
        self._adapters, self._behind, self._link = adapters, behind, link

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        chosen = self._chosen()
        if not chosen.names:
            return self._base(*args, **kwargs)
        first = next((value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)), None)
        rows = 0 if first is None or not first.dim() else first.shape[0]
        each = self._rows_of_each(rows, len(chosen.samples))
        if first is None or each is None:
            batch = self._batch()
            found = rows if batch is None or batch[0] == len(chosen.samples) else batch[0]
            raise PeftcoreError(
                f"{len(chosen.samples)} samples were given adapters (activate(..., per_sample=True)), but "
                f"{type(self.module).__name__} gets "
                + ("no batch" if first is None or not first.dim() else f"a batch of {found}")
            )
        if chosen.together is not None:
            index = chosen.index(first.device)
            index = index if each == 1 else index.repeat_interleave(each)
            output = chosen.together(chosen.adapters, index, self._base, *args, **kwargs)
            if output is not NotImplemented:
                return output
        if all(name in self._behind for name in chosen.names):
            return self._after(chosen, each, *args, **kwargs)
        parts, order = [], []
        for which, own in chosen.groups(each, first.device):
            call = self._base if which < 0 else self._link(chosen.names[which])
            if len(own) == rows:
                return call(*args, **kwargs)
            parts.append(call(*_taken(args, own, rows), **_taken(kwargs, own, rows)))
            order.append(own)
        return _joined(parts, [len(own) for own in order], torch.cat(order).argsort())

    def _chosen(self) -> Chosen:
        """What the activation of now means here."""
        activation = self._lock.activation
        if is_dynamo_compiling():
            return Chosen(self._adapters, activation)
        found: Chosen | None = activation.found.get(self)
        if found is None:
            found = activation.found[self] = Chosen(self._adapters, activation)
        return found

    def _batch(self) -> tuple[int, int] | None:
        """(samples, tokens of each) of the running call of the model, where they are noted."""
        if self._lock.context is None:
            return None
        call = current_call()
        given = (call.get(name) for name in (*_TOKENS, *call))
        return next(((t.shape[0], t.shape[1]) for t in given if isinstance(t, Tensor) and t.dim() > 1), None)

    def _rows_of_each(self, rows: int, samples: int) -> int | None:
        """How many of `rows` a sample has; None where they are not those of these samples."""
        batch = self._batch()
        if batch is not None and batch[0] != samples:
            return None
        if rows == samples:
            return 1
        return batch[1] if batch is not None and batch[1] and rows == samples * batch[1] else None

    def _after(self, chosen: Chosen, each: int, *args: Any, **kwargs: Any) -> Any:
        """All adapters stand behind the module, which then runs once, on the whole batch."""
        output = self._base(*args, **kwargs)
        first = first_of(output)
        parts, order = [], []
        for which, own in chosen.groups(each, first.device):
            y = first[own]
            parts.append(y if which < 0 else chosen.adapters[which](y))
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
