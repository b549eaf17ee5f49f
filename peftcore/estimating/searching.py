"""Lines of memory and time by batch for each way of training, from models of few layers.

    memory and time of a step = a + b · batch, each u + v · layers, from four steps of models of 2 and 3 layers

A way that is returned is followed with its own batch and all layers, which corrects its line.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from peftcore.architecture import text_config
from peftcore.errors import PeftcoreError
from peftcore.estimating.devices import Device
from peftcore.estimating.prediction import Estimate, estimate
from peftcore.estimating.step import Step

PLAIN, PAGED = "adamw_torch", "paged_adamw_8bit"
LARGEST_BATCH = 64
ALIKE = 0.05  # ways that differ by less in memory and time count as equal
_DEPTHS = (2, 3)


@dataclass(frozen=True)
class Choice:
    """Way of training without its batch size."""

    method: str
    fields: tuple[tuple[str, Any], ...]
    gradient_checkpointing: bool
    optimizer: str

    def __hash__(self) -> int:
        return hash((self.method, repr(self.fields), self.gradient_checkpointing, self.optimizer))


@dataclass
class Line:
    """Memory and time of a choice as lines of the batch size.

    Args:
        at_one: (bytes, seconds) with a batch of 1.
        more: (bytes, seconds) that each further example adds.
        trained: number of trained parameters.
        is_packed: whether the base is in 4 bits.
        correction: factors of bytes and of seconds.
    """

    at_one: tuple[float, float]
    more: tuple[float, float]
    trained: float
    is_packed: bool
    correction: tuple[float, float] = (1.0, 1.0)

    def at(self, batch: int) -> tuple[float, float]:
        """Return (bytes, seconds) of a step with this batch size."""
        memory, seconds = (
            factor * (first + (batch - 1) * each)
            for first, each, factor in zip(self.at_one, self.more, self.correction, strict=True)
        )
        return memory, seconds

    def correct(self, batch: int, found: Estimate) -> None:
        """Scale the line to what was found at this batch size."""
        memory, seconds = self.at(batch)
        by_memory, by_time = self.correction
        self.correction = by_memory * found.needed / memory, by_time * (found.seconds or 0.0) / (seconds or 1.0)


@dataclass(frozen=True)
class Sized:
    """Choice with a batch size, and its memory and time; `found` once it was followed with all layers."""

    choice: Choice
    batch: int
    memory: float
    seconds: float
    trained: float
    is_packed: bool
    found: Estimate | None = None

    @property
    def of_an_example(self) -> float:
        """Seconds per example."""
        return self.seconds / self.batch


@dataclass
class Search:
    """Cache of followed steps of one model on one device. `step`: the fields that are not searched."""

    config: Any
    device: Device
    step: Step
    dtype: torch.dtype
    lines: dict[Choice, Line] = field(default_factory=dict)
    _known: dict[Any, Estimate] = field(default_factory=dict)

    @property
    def least(self) -> int:
        """Smallest batch: a pair of texts is compared with another one."""
        return 2 if self.step.loss == "pairs" else 1

    def whole(self, choice: Choice, batch: int, length: int | None = None) -> Estimate:
        """Follow a step with all layers."""
        return self._estimate(choice, batch, None, length or self.step.length)

    def needs(self, choice: Choice, batch: int) -> float:
        """Return the bytes that were found with all layers, or else those of the choice's line."""
        known = self._known.get((choice, batch, None, self.step.length))
        return self.line(choice).at(batch)[0] if known is None else known.needed

    def line(self, choice: Choice) -> Line:
        """Return the line of a choice, from few layers; from all where they are few or cannot be counted."""
        if choice not in self.lines:
            one, two = ((self._bytes(choice, batch), self._seconds(choice, batch)) for batch in (1, 2))
            self.lines[choice] = Line(one, (two[0] - one[0], two[1] - one[1]), *self._base(choice))
        return self.lines[choice]

    def contenders(self, choices: Sequence[Choice]) -> dict[Choice, tuple[str, ...]]:
        """Return the `front` of the choices with one example at a time, and the methods equal to each."""
        found = []
        for choice in choices:
            try:
                found.append(Sized(choice, 1, self._bytes(choice, 1), self._seconds(choice, 1), *self._base(choice)))
            except PeftcoreError:
                continue  # it does not apply to this model, or needs other fields
        return {
            best.choice: tuple(e.choice.method for e in found if e is not best and is_alike(e, best))
            for best in front(found)
        }

    def _base(self, choice: Choice) -> tuple[float, bool]:
        """Return the number of trained parameters, and whether the base is in 4 bits."""
        trained = self._extrapolated(choice, 1, lambda each: each.summary.trainable_parameters)
        return trained, bool(self._extrapolated(choice, 1, lambda each: each.summary.packed_parameters))

    def _bytes(self, choice: Choice, batch: int) -> float:
        return self._extrapolated(choice, batch, lambda each: each.needed)

    def _seconds(self, choice: Choice, batch: int) -> float:
        return self._extrapolated(choice, batch, lambda each: each.seconds or 0.0)

    def _extrapolated(self, choice: Choice, batch: int, value: Callable[[Estimate], float]) -> float:
        layers = layers_of(self.config)
        if layers is None or layers <= _DEPTHS[-1]:
            return float(value(self.whole(choice, batch)))
        few, more = (float(value(self._estimate(choice, batch, depth, self.step.length))) for depth in _DEPTHS)
        return few + (layers - _DEPTHS[0]) * (more - few)

    def _estimate(self, choice: Choice, batch: int, depth: int | None, length: int) -> Estimate:
        key = choice, batch, depth, length
        if key not in self._known:
            self._known[key] = estimate(
                self.config if depth is None else shallow(self.config, depth),
                choice.method,
                step=replace(
                    self.step,
                    batch_size=batch,
                    length=length,
                    optimizer=choice.optimizer,
                    gradient_checkpointing=choice.gradient_checkpointing,
                ),
                dtype=self.dtype,
                device=self.device,
                **dict(choice.fields),
            )
        return self._known[key]


def layers_of(config: Any) -> int | None:
    """Return the number of layers of a model with this config, or None if it does not say."""
    found = getattr(text_config(config), "num_hidden_layers", None)
    return found if isinstance(found, int) else None


def shallow(config: Any, depth: int) -> Any:
    """Return the config with so many layers."""
    small = copy.deepcopy(config)
    text = text_config(small)
    layers = text.num_hidden_layers
    text.num_hidden_layers = depth
    for name, value in vars(text).items():  # such as layer_types
        if isinstance(value, list) and len(value) == layers:
            setattr(text, name, value[:depth])
    return small


def front(sized: Sequence[Sized]) -> list[Sized]:
    """Return the Pareto front of memory and time per example, the fastest first.

    Of equal ways the one that trains the most parameters is kept. A way with a base in 4 bits, which is less exact,
    does not replace one with a dense base.
    """
    found: list[Sized] = []
    for each in sorted(sized, key=lambda each: (each.of_an_example, each.memory)):
        rivals = [n for n, other in enumerate(found) if each.is_packed or not other.is_packed]
        if all(each.memory < (1 - ALIKE) * found[n].memory for n in rivals):
            found.append(each)
            continue
        for n in rivals:
            more = each.trained > (1 + ALIKE) * found[n].trained and each.is_packed == found[n].is_packed
            if more and is_alike(each, found[n]):
                found[n] = each
                break
    return found


def is_alike(one: Sized, other: Sized) -> bool:
    """Return whether both are equal in memory and time."""
    return all(
        abs(a - b) <= ALIKE * max(a, b)
        for a, b in ((one.memory, other.memory), (one.of_an_example, other.of_an_example))
    )
