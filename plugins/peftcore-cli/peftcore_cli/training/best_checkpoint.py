"""The best checkpoint by a held-out metric (`--load-best`, `--metric`), and early stopping (`--patience`).

Both are derived from Trainer's log. Every checkpoint contains the log, so they survive resuming.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcore.errors import PeftcoreError, nearest
from peftcore.plugin import ranks
from peftcore.training import is_complete
from peftcore_cli.console import say, warn
from peftcore_cli.tasks import generations, metrics, registered

if TYPE_CHECKING:
    from peftcore_cli.settings import RunOptions

LOWER_IS_BETTER = ("loss", "perplexity", "wer")


@dataclass(frozen=True)
class Best:
    """The evaluation whose adapter was saved: its step, and the metric with its value.

    `stopped_early`: whether `--patience` ended the run.
    """

    step: int
    metric: str
    value: float
    stopped_early: bool

    def __str__(self) -> str:
        early = "; stopped early, without further improvement" if self.stopped_early else ""
        value = metrics.format_value(self.metric, self.value)
        return f"step {self.step:,}, with {metrics.title(self.metric)} {value}{early}"


def keeps_best(run_options: RunOptions) -> bool:
    """Return whether to save the best adapter instead of the last one."""
    return run_options.load_best or run_options.patience is not None


def check(run_options: RunOptions, task: str) -> None:
    """Raise a PeftcoreError if the options for the best checkpoint contradict each other or `task`."""
    run_task = registered.find(task)
    answer_count = run_task.answer_count(run_options.metric, run_options.eval_answers)
    if answer_count and run_options.parallel == "fsdp2":
        raise PeftcoreError(
            "answers cannot be generated with --parallel fsdp2, which shards the model. Use --parallel ddp"
        )
    if generations.is_user_function(run_options.metric):
        generations.load_function(str(run_options.metric))
    elif run_options.metric is not None:
        if not keeps_best(run_options) and not answer_count:
            raise PeftcoreError(
                "--metric selects the best checkpoint, so it needs --load-best or --patience N. Add one of these "
                "options"
            )
        names = ("loss", *run_task.figures)
        if run_options.metric not in names:
            raise PeftcoreError(
                f"--metric must be one of {', '.join(names)} for {task}, found '{run_options.metric}'"
                f"{nearest(run_options.metric, names)}"
            )
    if (
        keeps_best(run_options)
        and run_options.save_every is not None
        and run_options.save_every != run_options.eval_every
    ):
        raise PeftcoreError(
            "--load-best and --patience write a checkpoint at every evaluation, so --save-every "
            f"{run_options.save_every} contradicts --eval-every {run_options.eval_every or '(the default)'}. Remove "
            "--save-every"
        )


def arguments(run_options: RunOptions, default_interval: int) -> dict[str, Any]:
    """Return Trainer's arguments for keeping the best checkpoint. `often` is the default of --eval-every."""
    if not keeps_best(run_options):
        return {}
    metric = generations.name_of(run_options.metric or "loss")
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric not in LOWER_IS_BETTER,
        "save_steps": run_options.eval_every or default_interval,
    }


def of_run(run_options: RunOptions) -> BestCheckpoint | None:
    """Return the callback that tracks the best checkpoint, or None to save the last one."""
    return (
        BestCheckpoint(generations.name_of(run_options.metric or "loss"), run_options.patience)
        if keeps_best(run_options)
        else None
    )


class BestCheckpoint(TrainerCallback):
    """Callback that evaluates at the last step, stops early, and restores the best checkpoint on resuming.

    Args:
        metric: name of the metric.
        patience: number of evaluations without improvement after which to stop, or None.
    """

    def __init__(self, metric: str = "loss", patience: int | None = None) -> None:
        self.metric, self.patience, self.stopped_early = metric, patience, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_global_step:  # the run's folder may have been moved
            folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if is_complete(folder):
                state.best_model_checkpoint = str(folder)
            else:
                warn(f"the best checkpoint so far, '{folder}', is not complete, so only later checkpoints are compared")
                state.best_model_checkpoint = state.best_metric = state.best_global_step = None
        self._stop_if_due(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_due(state, control)

    def _stop_if_due(self, state: TrainerState, control: TrainerControl) -> None:
        values = evaluations(state.log_history, self.metric)
        evaluations_since_best = without_improvement(values, is_lower_better=self.metric in LOWER_IS_BETTER)
        due = self.patience is not None and bool(values) and evaluations_since_best >= self.patience
        if ranks.any_of(due):  # all ranks must stop at the same step
            if not self.stopped_early:
                name = metrics.title(self.metric)
                say(f"training stops, because {name} has not improved in {evaluations_since_best} evaluations")
            self.stopped_early = control.should_training_stop = True

    def best(self, state: TrainerState) -> Best | None:
        """Return the best evaluation with a checkpoint, or None if no checkpoint could be written.

        Raises:
            PeftcoreError: no evaluation gave a finite number.
        """
        if not state.best_global_step:
            if any(map(math.isfinite, evaluations(state.log_history, self.metric))):
                warn("no checkpoint was written at an evaluation, so the last adapter is saved instead of the best")
                return None
            raise PeftcoreError(
                f"no evaluation gave a finite {metrics.title(self.metric)}, so there is no best checkpoint. "
                "Lower the learning rate: --lr LR --overwrite"
            )
        early = self.stopped_early and state.global_step < state.max_steps
        return Best(state.best_global_step, self.metric, float(state.best_metric or 0.0), early)


def evaluations(history: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Return the values of a metric in Trainer's log, one per evaluated step, in order."""
    by_step = {entry["step"]: entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry}
    return [by_step[step] for step in sorted(by_step)]


def without_improvement(values: Sequence[float], *, is_lower_better: bool) -> int:
    """Return the number of values after the best one. NaN is never the best."""
    best, count = float("inf"), 0
    for value in values:
        value = value if is_lower_better else -value
        if value < best:
            best, count = value, 0
        else:
            count += 1
    return count
