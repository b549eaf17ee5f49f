"""Metrics of a run's model, as its task has them: on held-out examples, and on those of data sets and other domains."""

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
class Measured:
    """Metrics on held-out examples and on texts of another domain, and the loss on each of several data sets."""

    held_out: Metrics
    other: Metrics | None
    sets: dict[int, float]


class Measure:
    """Metrics of the run's model on held-out examples, or on others with which it is called.

    Args:
        settings: of the run.
        processor: the tokenizer or processor.
        about: what the adapter is trained for.
        examples: of the run.
        rows: the held-out examples as they were read, of which the first are answered.
        clock: of the run, for the part `evaluation`.
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
        self.how = evaluation_of(settings, processor, about, rows, longest=examples.longest)
        self._reference: dict[int, Any] = {}  # what the model says before training, by id of the examples

    def keep_reference(self, model: Any) -> None:
        """Keep what the task compares with: that of the model before training."""
        some = self._examples
        for part in (some.held_out, some.validation, *some.held_out_sets.values()):
            if part:
                self._reference[id(part)] = self._task.reference(model, part, self.how)

    def all(self, model: Any, *, held_out: Metrics | None = None) -> Measured:
        """Return the metrics before or after training. `held_out`: those on held-out examples, if they are known."""
        examples = self._examples
        return Measured(
            held_out=self(model) if held_out is None else held_out,
            other=self(model, examples.other) if examples.other else None,
            sets={source: self(model, part).loss for source, part in examples.held_out_sets.items()},
        )

    def __call__(self, model: Any, examples: list[Example] | None = None) -> Metrics:
        """Return the metrics of `model` on `examples`; by default on held-out ones."""
        held_out = self._examples.held_out
        some = held_out if examples is None else examples
        reference = self._reference.get(id(some))
        with self._clock.part("evaluation"):
            return self._task.measure(model, some, self.how, answers=some is held_out, reference=reference)


def evaluation_of(
    given: RunOptions,
    processor: Any,
    about: AdapterTask,
    rows: Sequence[Row],
    *,
    longest: int | None = None,
    batch_size: int | None = None,
) -> Evaluation:
    """Return how options measure examples.

    Args:
        given: --metric, --eval-answers, --answer-tokens, --reward, and --batch-size unless it is passed.
        processor: the tokenizer or processor.
        about: what the adapter is trained for.
        rows: the examples, of which the first are answered.
        longest: tokens of the longest training example; None for no limit.
        batch_size: examples per batch.
    """
    task = registered.find(about.task)
    answered, answering = task.answer_count(given.metric, given.eval_answers), None
    if answered and task.writes:
        answering = generations.Answering(
            rows,
            processor,
            given.metric,
            count=answered,
            max_length=about.max_length,
            max_new_tokens=given.answer_tokens,
        )
    reward = None if given.reward is None else generations.load_reward(given.reward)
    size = given.batch_size if batch_size is None else batch_size
    return Evaluation(processor, about, size, longest, answered, answering, given.answer_tokens, reward)
