"""The best checkpoint of a run by a held-out metric (`--load-best`, `--metric`), and early stopping (`--patience`).

Both follow from Trainer's log, which every checkpoint contains, so a resumed run keeps the best and the count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peftcore import ranks
from peftcore.cli import data, metrics
from peftcore.cli.console import say, warn
from peftcore.errors import PeftcoreError, nearest
from peftcore.integrations.transformers import is_complete

if TYPE_CHECKING:
    from peftcore.cli.settings import RunOptions

LOWER_IS_BETTER = ("loss", "perplexity")
FIGURES = {
    data.LANGUAGE_MODEL: ("perplexity",),
    data.CLASSIFICATION: ("accuracy", "macro_f1"),
    data.MULTI_LABEL: ("micro_f1", "macro_f1", "exact_match"),
    data.REGRESSION: ("pearson", "spearman"),
    data.IMAGE: ("accuracy", "macro_f1"),
    data.TAGS: ("accuracy", "macro_f1", "entity_f1"),
    data.PREFERENCES: ("preference_accuracy", "margin"),
    data.UNPAIRED: ("accuracy", "margin"),
}


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
        return f"step {self.step:,}, with {metrics.title(self.metric)} {metrics.shown(self.metric, self.value)}{early}"


def is_wanted(given: RunOptions) -> bool:
    """Return whether the best adapter is saved rather than the last."""
    return given.load_best or given.patience is not None


def check(given: RunOptions, task: str) -> None:
    """Raise a PeftcoreError if the options for the best checkpoint contradict each other or `task`."""
    if given.metric is not None:
        if not is_wanted(given):
            raise PeftcoreError(
                "--metric chooses the best checkpoint, and no option asks for it. Add --load-best or --patience N"
            )
        known = ("loss", *FIGURES[task])
        if given.metric not in known:
            raise PeftcoreError(
                f"--metric must be one of {', '.join(known)} for {task}, found '{given.metric}'"
                f"{nearest(given.metric, known)}"
            )
    if is_wanted(given) and given.save_every is not None and given.save_every != given.eval_every:
        raise PeftcoreError(
            "--load-best and --patience write a checkpoint at every evaluation, found --save-every "
            f"{given.save_every} with --eval-every {given.eval_every or 'left out'}. Leave out --save-every"
        )


def arguments(given: RunOptions, often: int) -> dict[str, Any]:
    """Return Trainer's arguments for keeping the best checkpoint; `often`: steps between evaluations by default."""
    if not is_wanted(given):
        return {}
    metric = given.metric or "loss"
    return {
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
        "greater_is_better": metric not in LOWER_IS_BETTER,
        "save_steps": given.eval_every or often,
    }


class BestCheckpoint(TrainerCallback):
    """Callback that evaluates at the last step, stops without improvement, and finds the best again on resuming.

    Args:
        metric: name of the metric.
        patience: evaluations without improvement before training stops; None to never stop early.
    """

    def __init__(self, metric: str = "loss", patience: int | None = None) -> None:
        self.metric, self.patience, self.stopped = metric, patience, False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.best_global_step:  # the folder of the run may have been moved
            folder = Path(args.output_dir) / f"checkpoint-{state.best_global_step}"
            if is_complete(folder):
                state.best_model_checkpoint = str(folder)
            else:
                warn(f"the best checkpoint so far, '{folder}', is not complete: the best is chosen from here on")
                state.best_model_checkpoint = state.best_metric = state.best_global_step = None
        self._stop_if_due(state, control)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps:
            control.should_evaluate = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop_if_due(state, control)

    def _stop_if_due(self, state: TrainerState, control: TrainerControl) -> None:
        values = evaluations(state.log_history, self.metric)
        waited = without_improvement(values, is_lower_better=self.metric in LOWER_IS_BETTER)
        due = self.patience is not None and bool(values) and waited >= self.patience
        if ranks.any_of(due):  # all ranks must stop at the same step
            if not self.stopped:
                say(f"no improvement of {metrics.title(self.metric)} in {waited} evaluations: training stops")
            self.stopped = control.should_training_stop = True

    def best(self, state: TrainerState) -> Best:
        """Return the best evaluation of a finished run.

        Raises:
            PeftcoreError: no evaluation gave a number.
        """
        if not state.best_global_step:
            raise PeftcoreError(
                f"no evaluation gave a finite {metrics.title(self.metric)}, so no checkpoint is the best. Lower the "
                "rate: --lr LR --overwrite"
            )
        early = self.stopped and state.global_step < state.max_steps
        return Best(state.best_global_step, self.metric, float(state.best_metric or 0.0), early)


def evaluations(history: Sequence[dict[str, Any]], metric: str) -> list[float]:
    """Return the values of a metric in Trainer's log, in order, one per step."""
    by_step = {entry["step"]: entry[f"eval_{metric}"] for entry in history if f"eval_{metric}" in entry}
    return [by_step[step] for step in sorted(by_step)]


def without_improvement(values: Sequence[float], *, is_lower_better: bool) -> int:
    """Return the number of values after the first best one; NaN is never better."""
    best, waited = float("inf"), 0
    for value in values:
        value = value if is_lower_better else -value
        best, waited = (value, 0) if value < best else (best, waited + 1)
    return waited
