"""Trace of memory during a training step: samples, and the times at which phases end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peftcore_cli.training.progress import current_memory

EVERY = 0.004  # seconds between samples


@dataclass
class Trace:
    """Samples of one step.

    Args:
        samples: (seconds since an arbitrary origin, bytes).
        ends: the start of the step, then the end of each phase: forward and backward of each batch, then the optimizer.
    """

    samples: list[tuple[float, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Maximum of the samples, in bytes."""
        return max((size for _, size in self.samples), default=0)

    def by_phase(self, count: int) -> list[tuple[float, int]]:
        """Return (position, bytes) of each sample; position 1.5 is the middle of the second phase.

        Args:
            count: number of phases to return. If a step had more phases (from more batches), the first two and the last
                ones are returned. If it had fewer, the result is empty.
        """
        surplus = len(self.ends) - 1 - count
        if surplus < 0:
            return []
        phases = [*itertools.pairwise(self.ends)]
        phases = [*phases[:2], *phases[2 + surplus :]]
        points: list[tuple[float, int]] = []
        for number, (start, end) in enumerate(phases):
            duration = (end - start) or 1.0
            points += [(number + (at - start) / duration, size) for at, size in self.samples if start <= at <= end]
        return points


class MemoryTrace(TrainerCallback):
    """Keeps the trace of the step with the highest peak, except the first step, which creates the optimizer's state.

    Args:
        model: the trained model. The end of its forward pass ends a phase.
        memory: function that returns the bytes in use.
    """

    def __init__(self, model: nn.Module, memory: Callable[[], int] = current_memory) -> None:
        self.largest: Trace | None = None
        self._current: Trace | None = None
        self._memory = memory
        self._steps = 0
        self._over = threading.Event()
        self._hook = model.register_forward_hook(lambda m, *_: self._phase_ends() if m.training else None)

    def sample(self) -> None:
        """Take a sample if a step is running."""
        trace = self._current
        if trace is not None:
            trace.samples.append((time.perf_counter(), self._memory()))

    def close(self) -> None:
        """Stop taking samples."""
        self._over.set()
        self._hook.remove()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._current = Trace(ends=[time.perf_counter()])

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._phase_ends()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._phase_ends()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._phase_ends()
        trace, self._current = self._current, None
        self._steps += 1
        if trace is not None and self._steps > 1 and (self.largest is None or trace.peak > self.largest.peak):
            self.largest = trace

    def _phase_ends(self) -> None:
        if self._current is not None:
            self.sample()
            self._current.ends.append(time.perf_counter())

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self.sample()
