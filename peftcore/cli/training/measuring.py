"""Metrics of a run's model, as its task has them: on held-out examples, and on those of data sets and other domains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from peftcore.cli import task_names
from peftcore.cli.data.row import Row
from peftcore.cli.settings import Settings
from peftcore.cli.start import Clock
from peftcore.cli.tasks import (
    by_task,
    comparisons,
    generations,
    preferences,
    rollouts,
    sentence_pairs,
    transcripts,
)
from peftcore.cli.tasks.encoded_examples import Example
from peftcore.cli.tasks.metrics import Metrics
from peftcore.cli.training.training_data import Examples


@dataclass(frozen=True)
class Inputs:
    """What turns rows into inputs of the model, and outputs into names.

    Attributes:
        tokenizer: the tokenizer or processor.
        labels: names of the model's outputs, in order; empty if the task has none.
        pooling: how the vectors of a text's tokens become one; empty if the task has none.
        is_chat: whether examples are conversations.
    """

    tokenizer: Any
    labels: tuple[str, ...]
    pooling: str
    is_chat: bool


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
        inputs: the tokenizer, labels and pooling.
        examples: of the run.
        rows: the held-out examples as they were read, of which the first are answered.
        clock: of the run, for the part `evaluation`.
    """

    def __init__(
        self, settings: Settings, inputs: Inputs, examples: Examples, rows: Sequence[Row], clock: Clock
    ) -> None:
        self._clock = clock
        self._settings, self._inputs, self._examples = settings, inputs, examples
        self._comparison = comparisons.of(settings.task) if settings.task in task_names.COMPARED else None
        self.reward = rollouts.load_reward(settings.reward) if settings.reward is not None else None
        self._answered = generations.count(settings.task, settings.metric, settings.eval_answers)
        self._answering = None
        if self._answered and settings.task != task_names.SPEECH:
            self._answering = generations.Answering(
                rows,
                settings.task,
                inputs.tokenizer,
                settings.metric,
                count=self._answered,
                max_length=settings.max_length,
                max_new_tokens=settings.answer_tokens,
            )
        self._pairs = preferences.pairs_at_once(settings.batch_size, examples.longest)
        self._reference: dict[int, Any] = {}  # of comparisons: likelihoods before training, by id of the examples

    def keep_reference(self, model: Any) -> None:
        """Keep the likelihoods with which comparisons compare: those of the model before training."""
        if self._comparison is None:
            return
        some = self._examples
        for part in (some.held_out, some.validation, *some.held_out_sets.values()):
            if part and self._comparison.HAS_REFERENCE:
                found = self._comparison.likelihoods(model, part, self._inputs.tokenizer, self._pairs)
                self._reference[id(part)] = found

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
        with self._clock.part("evaluation"):
            return self._metrics(model, examples)

    def _metrics(self, model: Any, examples: list[Example] | None) -> Metrics:
        examples = self._examples.held_out if examples is None else examples
        settings, tokenizer = self._settings, self._inputs.tokenizer
        is_held_out = examples is self._examples.held_out
        if self.reward is not None:
            return rollouts.measure(model, examples, tokenizer, self.reward, settings.answer_tokens)
        if self._comparison is not None:
            return comparisons.measure(
                settings.task,
                model,
                examples,
                tokenizer,
                self._pairs,
                beta=settings.beta,
                reference=self._reference[id(examples)] if self._comparison.HAS_REFERENCE else [],
                weights=(settings.desirable_weight, settings.undesirable_weight),
            )
        if settings.task == task_names.SPEECH:
            count = self._answered if is_held_out else 0
            return transcripts.measure(model, examples, tokenizer, settings.batch_size, answered=count)
        if settings.task == task_names.EMBEDDING:
            pooling = self._inputs.pooling
            return sentence_pairs.measure(model, examples, tokenizer, settings.batch_size, pooling=pooling)
        # Not more tokens at once than in training, so that measuring fits too.
        budget = settings.batch_size * self._examples.longest
        if self._answering is not None and is_held_out:
            return generations.measure(self._answering, model, examples, tokenizer, tokens=budget)
        tag_names = self._inputs.labels if settings.task == task_names.TAGS else ()
        return by_task.measure(model, examples, tokenizer, tokens=budget, tag_names=tag_names)
