"""Evaluate a run's model on held-out examples, on each data set, and on texts from another domain."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcore_cli.bases.adapter_folders import AdapterTask
from peftcore_cli.data.row import Row
from peftcore_cli.settings import RunOptions, Settings
from peftcore_cli.start import Clock
from peftcore_cli.tasks import generations, registered
from peftcore_cli.tasks.encoded_examples import Example
from peftcore_cli.tasks.metrics import Metrics
from peftcore_cli.tasks.task import Evaluation
from peftcore_cli.training.training_data import Examples


@dataclass(frozen=True)
class EvaluationResults:
    """Metrics on held-out examples and on texts from another domain, and the loss on each of several data sets."""

    held_out: Metrics
    other: Metrics | None
    sets: dict[int, float]


class Evaluator:
    """Evaluates the run's model on held-out or other examples.

    Args:
        settings: settings of the run.
        processor: the tokenizer or processor.
        about: what the adapter is trained for.
        examples: encoded examples of the run.
        rows: the held-out rows. The first rows are answered.
        clock: clock of the run, whose part `evaluation` counts the time.
    """

    def __init__(
        self,
        settings: Settings,
        processor: Any,
        about: AdapterTask,
        examples: Examples,
        rows: Sequence[Row],
        clock: Clock,
    ) -> None:
        self._clock, self._examples, self._task = clock, examples, registered.find(settings.task)
        self.evaluation = evaluation_of(settings, processor, about, rows, longest=examples.longest)
        self._reference: dict[int, Any] = {}  # outputs of the model before training, by id of the examples

    def keep_reference(self, model: Any) -> None:
        """Store the outputs of the model before training, for tasks that compare with them."""
        examples = self._examples
        for part in (examples.held_out, examples.validation, *examples.held_out_sets.values()):
            if part:
                self._reference[id(part)] = self._task.reference(model, part, self.evaluation)

    def evaluate_all(self, model: Any, *, held_out: Metrics | None = None) -> EvaluationResults:
        """Return the metrics on all held-out data; `held_out` are those already known."""
        examples = self._examples
        return EvaluationResults(
            held_out=self(model) if held_out is None else held_out,
            other=self(model, examples.other) if examples.other else None,
            sets={source: self(model, part).loss for source, part in examples.held_out_sets.items()},
        )

    def __call__(self, model: Any, examples: Sequence[Example] | None = None) -> Metrics:
        """Return the metrics of `model` on `examples`, by default the held-out ones."""
        held_out = self._examples.held_out
        measured_examples = held_out if examples is None else examples
        reference = self._reference.get(id(measured_examples))
        with self._clock.part("evaluation"):
            return self._task.measure(
                model, measured_examples, self.evaluation, answers=measured_examples is held_out, reference=reference
            )


def evaluation_of(
    run_options: RunOptions,
    processor: Any,
    about: AdapterTask,
    rows: Sequence[Row],
    *,
    longest: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return the settings of an evaluation, according to options.

    Args:
        run_options: --metric, --eval-answers, --answer-tokens, --reward, and --batch-size unless it is passed.
        processor: the tokenizer or processor.
        about: what the adapter is trained for.
        rows: the examples. The first rows are answered.
        longest: tokens of the longest training example; None for no limit.
        batch_size: examples per batch.
    """
    task = registered.find(about.task)
    answer_count, answering = task.answer_count(run_options.metric, run_options.eval_answers), None
    if answer_count and task.writes:
        answering = generations.Answering(
            rows,
            processor,
            run_options.metric,
            count=answer_count,
            max_length=about.max_length,
            max_new_tokens=run_options.answer_tokens,
        )
    reward = None if run_options.reward is None else generations.load_reward(run_options.reward)
    size = run_options.batch_size if batch_size is None else batch_size
    return Evaluation(processor, about, size, longest, answer_count, answering, run_options.answer_tokens, reward)
