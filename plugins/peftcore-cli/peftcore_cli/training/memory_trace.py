"""Memory during a training step: samples and the times at which phases end."""

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
        samples: (second, bytes), with any origin of time.
        ends: the start of the step, then the end of each phase: forward and backward of each batch, then the optimizer.
    """

    samples: list[tuple[float, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """Most bytes of any sample."""
        return max((size for _, size in self.samples), default=0)

    def by_phase(self, count: int) -> list[tuple[float, int]]:
        """Return (number of completed phases, with fractions; bytes) of each sample.

        Args:
            count: number of phases to show. If a step had more, from more batches, the first two and the last ones are
                used; if it had fewer, the list is empty.
        """
        more = len(self.ends) - 1 - count
        if more < 0:
            return []
        phases = [*itertools.pairwise(self.ends)]
        phases = [*phases[:2], *phases[2 + more :]]
        return [
            (number + (when - start) / ((end - start) or 1.0), size)
            for number, (start, end) in enumerate(phases)
            for when, size in self.samples
            if start <= when <= end
        ]


class MemoryTrace(TrainerCallback):
    """Keeps the step with the most memory, except the first, in which the optimizer's state is made.

    Args:
        model: the trained model; the end of its forward ends a phase.
        memory: function that returns the bytes in use.
    """

    def __init__(self, model: nn.Module, memory: Callable[[], int] = current_memory) -> None:
        self.largest: Trace | None = None
        self._now: Trace | None = None
        self._memory = memory
        self._steps = 0
        self._over = threading.Event()
        self._hook = model.register_forward_hook(lambda m, *_: self._phase_ends() if m.training else None)

    def sample(self) -> None:
        """Take a sample, if a step is running."""
        now = self._now
        if now is not None:
            now.samples.append((time.perf_counter(), self._memory()))

    def close(self) -> None:
        """Stop taking samples."""
        self._over.set()
        self._hook.remove()

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        threading.Thread(target=self._watch, daemon=True).start()

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._now = Trace(ends=[time.perf_counter()])

    def on_substep_end(self, *_: Any, **__: Any) -> None:
        self._phase_ends()

    def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._phase_ends()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self._phase_ends()
        now, self._now = self._now, None
        self._steps += 1
        if now is not None and self._steps > 1 and (self.largest is None or now.peak > self.largest.peak):
            self.largest = now

    def _phase_ends(self) -> None:
        if self._now is not None:
            self.sample()
            self._now.ends.append(time.perf_counter())

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            self.sample()
