"""Evaluate the model of a training run: on held-out examples, on each data set, and on texts from another domain.

`Evaluator` evaluates during and after training. `evaluation_of` prepares the settings of an evaluation, also for
`peftcore eval`. The metrics themselves are computed by the task (`Task.measure`).
"""

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
    """Metrics of a model on all evaluation data.

    Attributes:
        held_out: metrics on the held-out examples.
        other: metrics on texts from another domain (--other-data); None without them.
        sets: held-out loss of each data set, by its index; empty for a single data set.
    """

    held_out: Metrics
    other: Metrics | None
    sets: dict[int, float]


class Evaluator:
    """Evaluates the run's model on held-out or other examples.

    Args:
        settings: settings of the run.
        processor: the tokenizer or processor.
        task_record: task that the adapter is trained for, with its settings.
        examples: encoded examples of the run.
        rows: the held-out rows. Answers are generated for the first rows.
        clock: clock of the run, which counts the time as `evaluation`.
    """

    def __init__(
        self,
        settings: Settings,
        processor: Any,
        task_record: AdapterTask,
        examples: Examples,
        rows: Sequence[Row],
        clock: Clock,
    ) -> None:
        self._clock, self._examples, self._task = clock, examples, registered.find(settings.task)
        self.evaluation = evaluation_of(settings, processor, task_record, rows, longest=examples.longest)
        self._reference: dict[int, Any] = {}  # outputs of the model before training, by `id` of the examples

    def keep_reference(self, model: Any) -> None:
        """Store the outputs of the model before training, for tasks that compare with them."""
        examples = self._examples
        for examples_of_set in (examples.held_out, examples.validation, *examples.held_out_sets.values()):
            if examples_of_set:
                self._reference[id(examples_of_set)] = self._task.reference(model, examples_of_set, self.evaluation)

    def evaluate_all(self, model: Any, *, held_out: Metrics | None = None) -> EvaluationResults:
        """Return the metrics on all held-out data. Pass `held_out` if these metrics have been computed already."""
        examples = self._examples
        losses_by_set: dict[int, float] = {}
        for set_index, examples_of_set in examples.held_out_sets.items():
            losses_by_set[set_index] = self(model, examples_of_set).loss
        return EvaluationResults(
            held_out=self(model) if held_out is None else held_out,
            other=self(model, examples.other) if examples.other else None,
            sets=losses_by_set,
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
    task_record: AdapterTask,
    rows: Sequence[Row],
    *,
    longest: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return the settings of an evaluation, according to options.

    Args:
        run_options: --metric, --eval-answers, --answer-tokens, --reward, and --batch-size unless it is passed.
        processor: the tokenizer or processor.
        task_record: task that the adapter is trained for, with its settings.
        rows: the examples. Answers are generated for the first rows.
        longest: number of tokens of the longest training example; None for no limit.
        batch_size: examples per batch.
    """
    task = registered.find(task_record.task)
    answer_count, answering = task.answer_count(run_options.metric, run_options.eval_answers), None
    if answer_count and task.writes:
        answering = generations.Answering(
            rows,
            processor,
            run_options.metric,
            count=answer_count,
            max_length=task_record.max_length,
            max_new_tokens=run_options.answer_tokens,
        )
    reward = None if run_options.reward is None else generations.load_reward(run_options.reward)
    return Evaluation(
        processor,
        task_record,
        batch_size=run_options.batch_size if batch_size is None else batch_size,
        longest=longest,
        answer_count=answer_count,
        answering=answering,
        answer_tokens=run_options.answer_tokens,
        reward=reward,
    )
