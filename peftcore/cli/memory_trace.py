"""What memory a step of training really has while it goes: samples beside the moments at which its phases end."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import TrainerCallback

from peftcore.cli.progress import current_memory

EVERY = 0.004  # seconds between samples


@dataclass
class Trace:
    """One step.

    Args:
        samples: (second, bytes), seconds from anywhere.
        ends: when each of its phases ended, the first entry when the step began: forward and backward of each batch,
            then the optimizer.
    """

    samples: list[tuple[float, int]] = field(default_factory=list)
    ends: list[float] = field(default_factory=list)

    @property
    def peak(self) -> int:
        """The most bytes that were seen."""
        return max((size for _, size in self.samples), default=0)

    def by_phase(self, count: int) -> list[tuple[float, int]]:
        """(phases that were through, as 1.5 in the middle of the second; bytes) of each sample.

        Args:
            count: of phases to tell of: where there were more, of more batches, the first two and the last ones. None
                where there were fewer.
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
    """Keeps of all steps but the first, in which the optimizer's state is made, the one with the most memory.

    Args:
        model: what is trained, the end of whose forward is the end of a phase.
        memory: bytes that are taken now.
    """

    def __init__(self, model: nn.Module, memory: Callable[[], int] = current_memory) -> None:
        self.largest: Trace | None = None
        self._now: Trace | None = None
        self._memory = memory
        self._steps = 0
        self._over = threading.Event()
        self._hook = model.register_forward_hook(lambda m, *_: self._phase_ends() if m.training else None)

    def sample(self) -> None:
        """Note what is taken now, where a step is running."""
        now = self._now
        if now is not None:
            now.samples.append((time.perf_counter(), self._memory()))

    def close(self) -> None:
        """Take no more samples."""
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
