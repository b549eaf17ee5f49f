"""The result of a run, and the exception of a stopped run."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from peftcore import Summary
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.training import best_checkpoint, forecast as forecasts, training_data
from peftcore_cli.training.memory_trace import Trace


@dataclass(frozen=True)
class Result:
    """Results of a finished run.

    `samples`: (writer, text) of the answers to --sample. `predicted`: the memory forecast, or None; `trace`: the step
    with the highest peak. `validation`: metrics on the examples set aside to choose among runs. `other`: metrics on
    texts from another domain, before and after. `spent`: seconds since the start of the command, by activity.
    `tokens_per_second`: throughput; 0 for images. `merges`: whether the adapter can be merged; None for full
    fine-tuning. `data_sets`: figures of each data set in a mixture. `best`: the evaluation whose adapter was saved, or
    None for the last one. `is_chat`: whether examples are conversations; `labels`: names of the model's outputs, in
    their order.
    """

    before: Metrics
    after: Metrics
    history: list[dict[str, Any]]
    summary: Summary
    steps: int
    train_rows: int
    eval_rows: int
    seconds: float
    training_seconds: float
    spent: dict[str, float]
    step_seconds: float
    tokens_per_second: float
    examples_per_second: float
    peak: dict[str, int]
    adapter: Path
    adapter_bytes: int
    samples: list[tuple[str, str]]
    is_chat: bool
    best: best_checkpoint.Best | None = None
    labels: tuple[str, ...] = ()
    predicted: forecasts.Forecast | None = None
    trace: Trace | None = None
    validation: Metrics | None = None
    other: tuple[Metrics, Metrics] | None = None
    merges: bool | None = None
    data_sets: list[training_data.DataSet] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON, without the history, which is in the checkpoints."""
        return {
            "before": self.before.as_dict(),
            "after": self.after.as_dict(),
            "baseline": self.after.baseline,
            "labels": list(self.labels),
            "confusion": self.after.confusion,
            "trainable_parameters": self.summary.trainable_parameters,
            "base_parameters": self.summary.base_parameters,
            "steps": self.steps,
            "best": self.best and asdict(self.best),
            "train_rows": self.train_rows,
            "eval_rows": self.eval_rows,
            "seconds": round(self.seconds, 1),
            "training_seconds": round(self.training_seconds, 1),
            "spent": {part: round(seconds, 1) for part, seconds in self.spent.items()},
            "step_seconds": self.step_seconds,
            "tokens_per_second": round(self.tokens_per_second, 1),
            "peak": self.peak,
            "peak_of_steps": self.trace.peak if self.trace is not None else None,
            "predicted_peak": list(self.predicted.peak) if self.predicted is not None else None,
            "adapter_bytes": self.adapter_bytes,
            "validation": self.validation and self.validation.as_dict(),
            "other": self.other and [metrics.as_dict() for metrics in self.other],
            "merges": self.merges,
            "data_sets": [data_set.to_json() for data_set in self.data_sets],
            "samples": self.samples,
        }


class Stopped(Exception):
    """Raised when the user stops a run. The run can be resumed from its checkpoint."""

    def __init__(self, step: int, steps: int) -> None:
        super().__init__(f"stopped at step {step} of {steps}")
