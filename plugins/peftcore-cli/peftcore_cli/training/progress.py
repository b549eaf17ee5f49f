"""Progress of a training run: a bar with loss, tokens per second and memory, and a line per evaluation.

The first Ctrl-C (or SIGTERM) stops the run after the current step and writes a checkpoint. The second one stops it
immediately.
"""

from __future__ import annotations

import math
import re
import signal
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback, TrainerControl, TrainerState

from peftcore.errors import PeftcoreError
from peftcore.plugin import ranks
from peftcore_cli.amounts import gigabytes
from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.console import out, say, warn

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class TaskWriter(TrainerCallback):
    """Writes the task record into each checkpoint, so that commands can read checkpoints like adapters."""

    def __init__(self, task: AdapterTask | None) -> None:
        self.task = task

    def on_save(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
        if self.task is not None and args.should_save and folder.is_dir():
            self.task.write(folder)


class Meter(TrainerCallback):
    """Measures and shows training time and tokens since the start of this process."""

    def __init__(self) -> None:
        self.steps: list[float] = []  # duration of each step in seconds
        self.tokens = 0
        self._tokens_before = 0
        self._began = 0.0
        self._loss = float("nan")
        self._extra: list[float] = []  # additional loss of the method
        self._progress: Progress | None = None
        self._bar: Any = None

    @property
    def seconds(self) -> float:
        return sum(self.steps)

    @property
    def step_seconds(self) -> float:
        """Return the median duration of a step in seconds."""
        return statistics.median(self.steps) if self.steps else 0.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds if self.seconds else 0.0

    def on_train_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._tokens_before = state.num_input_tokens_seen
        if out.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[facts]}"),
                TimeRemainingColumn(),
                console=out,
            )
            self._bar = self._progress.add_task(
                "training", total=state.max_steps, completed=state.global_step, facts=""
            )
            self._progress.start()

    def on_step_begin(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._began = time.perf_counter()

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.steps.append(time.perf_counter() - self._began)
        self.tokens = state.num_input_tokens_seen - self._tokens_before
        if self._progress is not None:
            self._progress.update(self._bar, completed=state.global_step, facts=self._facts())

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any) -> None:
        if "loss" in logs:
            self._loss = logs["loss"]
            self._extra = [value for name, value in logs.items() if name.startswith("extra_loss/")]
            if not math.isfinite(self._loss):
                raise PeftcoreError(
                    f"training has diverged: the loss is {self._loss} at step {state.global_step}. Start again with "
                    "a lower learning rate: --lr LR --overwrite"
                )
            every = max(1, state.max_steps // 20)  # steps between progress lines, if the output is not a terminal
            if self._progress is None and state.global_step % every == 0:
                say(f"step {state.global_step}/{state.max_steps}  {self._facts()}")

    def on_train_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Remove the bar."""
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def _facts(self) -> str:
        extra = f"  extra loss {sum(self._extra):.4f}" if self._extra else ""
        speed = f"  {self.tokens_per_second:,.0f} tokens/s" if self.tokens else ""
        return f"loss {self._loss:.4f}{extra}{speed}  {gigabytes(current_memory())}"


class OrderlyStop(TrainerCallback):
    """Inside the block, the first SIGINT or SIGTERM requests a checkpoint and a stop after the step."""

    def __init__(self) -> None:
        self.is_requested = False
        self._previous_handlers: dict[int, Any] = {}

    def __enter__(self) -> OrderlyStop:
        if (
            threading.current_thread() is threading.main_thread()
        ):  # Python only allows signal handlers in the main thread
            self._previous_handlers = {number: signal.signal(number, self._request) for number in _SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _request(self, number: int, frame: FrameType | None) -> None:
        if self.is_requested:
            raise KeyboardInterrupt
        self.is_requested = True
        warn("writing a checkpoint and stopping after this step; press Ctrl-C again to stop immediately")

    def on_step_end(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.is_requested = ranks.any_of(self.is_requested)  # ranks may receive the signal at different steps
        if self.is_requested:
            control.should_save = args.save_strategy != "no"
            control.should_training_stop = True


def _on_cards(counter: Callable[[int], int]) -> int:
    """Return the sum of a counter of bytes, such as `torch.cuda.memory_allocated`, over all CUDA devices."""
    return sum(counter(index) for index in range(torch.cuda.device_count()))


def current_memory() -> int:
    """Return the allocated bytes on CUDA if this process uses CUDA, otherwise its resident bytes."""
    if _on_cards(torch.cuda.max_memory_allocated):
        return _on_cards(torch.cuda.memory_allocated)
    import psutil

    return psutil.Process().memory_info().rss


def peak_memory() -> dict[str, int]:
    """Return the peak resident bytes of this process, and on CUDA the peak allocated bytes."""
    if sys.platform == "linux":  # ru_maxrss would include the memory of the parent process
        status = Path("/proc/self/status").read_text()
        (peak,) = re.findall(r"^VmHWM:\s*(\d+) kB", status, re.MULTILINE)
        memory = 1024 * int(peak)
    elif sys.platform == "win32":
        import psutil

        memory = psutil.Process().memory_info().peak_wset
    else:
        import resource

        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS
    peaks = {"memory": memory}
    on_cards = _on_cards(torch.cuda.max_memory_allocated)
    return {**peaks, "CUDA memory": on_cards} if on_cards else peaks
