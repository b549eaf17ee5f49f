"""Which ways of training fit into a memory, and how long each takes.

    memory and time of a step = a + b · batch, each of them u + v · layers, from four steps of models of 2 and 3 layers

That is how ways are searched. Those that are answered were estimated whole, at their own batch and all layers; where
that does not fit (layers that differ), the batch is halved until it does.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from dataclasses import fields as dataclass_fields
from typing import Any

import torch

from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import Device, device_of, usable
from peftcore.estimating.prediction import Estimate, estimate
from peftcore.estimating.standing import config_of
from peftcore.optim.paging import bytes_of
from peftcore.registry import registry

LARGEST_BATCH = 64
PLAIN, PAGED = "adamw_torch", "paged_adamw_8bit"


@dataclass(frozen=True)
class Way:
    """A way to train that fits.

    Args:
        hours: of all examples once.
        next_need: bytes that the next larger batch would need, or the same without recomputing activations.
    """

    method: str
    fields: dict[str, Any]
    batch_size: int
    gradient_checkpointing: bool
    optimizer: str
    estimate: Estimate
    hours: float
    next_need: float

    @property
    def memory(self) -> float:
        """Bytes that it needs."""
        return self.estimate.needed

    def options(self) -> list[str]:
        """As `peftcore train` takes them."""
        chosen = ["--method", self.method]
        for name, value in self.fields.items():
            chosen += ["--set", f"{name}={value}"]
        chosen += ["--batch-size", str(self.batch_size), "--optim", self.optimizer]
        return chosen + (["--gradient-checkpointing"] if self.gradient_checkpointing else [])


@dataclass(frozen=True)
class Fit:
    """What fits into `memory` bytes, the fastest first; each later one needs less memory and takes longer."""

    memory: float
    device: Device
    ways: tuple[Way, ...]

    def __str__(self) -> str:
        lines = [f"into {self.memory / 1e9:,.1f} GB on {self.device.name}, fastest first:"]
        for way in self.ways:
            lines += [
                f"  {way.memory / 1e9:8,.2f} GB{way.hours:10,.2f} h an epoch   {' '.join(way.options())}",
                f"  {'':8}   twice the batch would need {way.next_need / 1e9:,.2f} GB",
            ]
        return "\n".join(lines)


@dataclass
class _Line:
    """Memory and seconds by batch, at all layers."""

    at_one: tuple[float, float]
    more: tuple[float, float]

    def at(self, batch: int) -> tuple[float, float]:
        (memory, seconds), (more_memory, more_seconds) = self.at_one, self.more
        return memory + (batch - 1) * more_memory, seconds + (batch - 1) * more_seconds


@dataclass
class _Search:
    config: Any
    device: Device
    length: int
    dtype: torch.dtype
    lines: dict[Any, _Line] = field(default_factory=dict)

    def estimate(self, config: Any, batch: int, method: str, its: dict[str, Any], again: bool, optim: str) -> Estimate:
        return estimate(
            config,
            method,
            batch_size=batch,
            length=self.length,
            optimizer=optim,
            gradient_checkpointing=again,
            dtype=self.dtype,
            device=self.device,
            **its,
        )

    def shallow(self, depth: int) -> Any:
        """The config with so many layers."""
        small = copy.deepcopy(self.config)
        small.num_hidden_layers = depth
        if getattr(small, "layer_types", None) is not None:
            small.layer_types = small.layer_types[:depth]
        return small

    def contenders(self, methods: list[tuple[str, dict[str, Any]]]) -> list[tuple[str, dict[str, Any]]]:
        """Those of which, for one example and one layer, no other needs less memory and less time."""
        small, found = self.shallow(1), []
        for method, its in methods:
            try:
                each = self.estimate(small, 1, method, its, False, PLAIN)
            except PeftcoreError:
                continue  # it does not apply to this model, or needs more than a rank
            found.append((each.least, each.seconds or 0.0, method, its))
        return [
            (method, its)
            for memory, seconds, method, its in found
            if not any(m <= memory and s <= seconds and (m, s) != (memory, seconds) for m, s, _, _ in found)
        ]

    def line(self, method: str, its: dict[str, Any], again: bool, optim: str) -> _Line:
        layers = self.config.num_hidden_layers
        found = {}
        for depth in (2, 3):
            small = self.shallow(depth)
            for batch in (1, 2):
                each = self.estimate(small, batch, method, its, again, optim)
                found[depth, batch] = float(each.least), each.seconds or 0.0

        def whole(batch: int, of: int) -> float:
            two, three = found[2, batch][of], found[3, batch][of]
            return two + (layers - 2) * (three - two)

        one, two = ((whole(batch, 0), whole(batch, 1)) for batch in (1, 2))
        return _Line(one, (two[0] - one[0], two[1] - one[1]))


def fit(
    model: Any,
    /,
    *,
    memory: int | str | None = None,
    device: str = "cpu",
    length: int = 512,
    examples: int = 1000,
    methods: Sequence[str] | None = None,
    ranks: Sequence[int] = (16,),
    dtype: torch.dtype = torch.bfloat16,
    most: int = 4,
    fields: Mapping[str, Any] | None = None,
) -> Fit:
    """Look for ways to train `model` in so much memory: method, rank, recomputed activations, batch, paged optimizer.

    Args:
        model: a config of transformers, a folder with a `config.json`, a hub id, or a model that has a config.
        memory: bytes, also as text ("24GB"); None: what the device has.
        device: `cpu`, which is this machine, or a card, as `estimate` takes it.
        length: tokens of an example. examples: how many there are.
        methods: their names; None: of those installed that have a rank `r` and need no field beside it, each that is
            smaller or faster than the others.
        ranks: of methods that have one.
        dtype: of the base.
        most: ways to answer at most.
        fields: of every method's config, such as target_modules.

    Returns:
        The front of memory against time.

    Raises:
        PeftcoreError: nothing fits, with the least that was found, or an argument is wrong.
    """
    where = device_of(device)
    try:
        room = where.memory if memory is None else float(bytes_of(memory) or 0)
    except ValueError as error:
        raise PeftcoreError(f"memory is bytes, or text such as '24GB', found {memory!r}") from error
    if room < 1e6:
        raise PeftcoreError(f"memory is bytes, or text such as '24GB', found {memory!r}: no model fits into that")
    if memory is not None and not where.measured:
        room = usable(room)
        if room < 1e6:
            raise PeftcoreError(f"memory={memory!r} on a card is no more than its context takes: give at least 1GB")
    search = _Search(config_of(model), replace(where, memory=room), length, dtype)
    candidates: list[tuple[_Line, str, dict[str, Any], bool, str]] = []
    named = _methods(methods, ranks, fields or {})
    for method, its in named if methods is not None else search.contenders(named):
        for again, optim in ((False, PLAIN), (True, PLAIN), (True, PAGED)):
            candidates.append((search.line(method, its, again, optim), method, its, again, optim))
    if not candidates:
        raise PeftcoreError("no method with a rank is installed that applies to this model. Name some: methods=[...]")
    sized: list[Any] = []
    for line, *rest in candidates:
        batch = LARGEST_BATCH
        while batch > 1 and line.at(batch)[0] > room:
            batch //= 2
        while batch >= 1:
            sized.append((*line.at(batch), batch, line, *rest))
            batch //= 2
    inside = [each for each in sized if each[0] <= room]
    if not inside:
        least, _, _, _, method, its, again, optim = min(sized, key=lambda each: each[0])
        raise PeftcoreError(
            f"nothing fits into {_size(room)}: the least is {_size(least)}, {method} with one example at a "
            "time and recomputed activations. Take a smaller model, shorter examples (length), or a method with a base "
            "in 4 bits"
        )
    ways: list[Way] = []
    for _, _, batch, line, method, its, again, optim in _front(inside, most):
        found = search.estimate(search.config, batch, method, its, again, optim)
        while found.needed > room and batch > 1:
            batch //= 2
            found = search.estimate(search.config, batch, method, its, again, optim)
        if found.needed <= room:
            hours = (found.seconds or 0.0) * math.ceil(examples / batch) / 3600
            ways.append(Way(method, its, batch, again, optim, found, hours, line.at(2 * batch)[0]))
    return Fit(room, where, tuple(sorted(ways, key=lambda way: way.hours)))


def _size(count: float) -> str:
    return f"{count / 1e9:,.2f} GB" if count >= 1e8 else f"{count / 1e6:,.1f} MB"


def _front(sized: list[Any], most: int) -> list[Any]:
    """Those of which no other needs less memory and takes less time an example, the fastest first."""
    front: list[Any] = []
    for each in sorted(sized, key=lambda each: (each[1] / each[2], each[0])):
        if not front or each[0] < front[-1][0]:
            front.append(each)
    if len(front) <= most:
        return front
    step = (len(front) - 1) / (most - 1) if most > 1 else 1
    return [front[round(i * step)] for i in range(most)]


def _methods(
    names: Sequence[str] | None, ranks: Sequence[int], given: Mapping[str, Any]
) -> list[tuple[str, dict[str, Any]]]:
    found: list[tuple[str, dict[str, Any]]] = []
    for name in names if names is not None else registry.methods():
        ranked = "r" not in given and "r" in {
            each.name for each in dataclass_fields(registry.method(name).config_class)
        }
        if ranked:
            found += [(name, {**given, "r": rank}) for rank in ranks]
        elif names is not None:
            found.append((name, dict(given)))
    return found
