"""Base class of tasks: how to read and encode rows, train, evaluate and answer.

Each task is a subclass of `Task` in its own module, and `registered` finds it by name. The defaults describe a causal
language model, and a task overrides the differences.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from torch import nn
from transformers import PretrainedConfig

from peftcore.errors import PeftcoreError
from peftcore_cli.bases import models
from peftcore_cli.data import data_files, text_rows
from peftcore_cli.data.row import Row
from peftcore_cli.data.row_reading import row_of
from peftcore_cli.tasks import generations, text_examples, text_generation
from peftcore_cli.tasks.encoded_examples import Encoded, Example, length
from peftcore_cli.tasks.metrics import Metrics

if TYPE_CHECKING:
    from transformers import PreTrainedModel, TrainingArguments

    from peftcore import AdapterInfo
    from peftcore_cli.bases.adapter_folders import AdapterTask
    from peftcore_cli.data.first_lines import FirstLines
    from peftcore_cli.settings import RunOptions, Settings
    from peftcore_cli.training.trainers import Measuring

Keys = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Evaluation:
    """Settings of an evaluation, in a run or in `peftcore eval`.

    Attributes:
        processor: the tokenizer or processor.
        about: what the adapter was trained for.
        batch_size: examples per batch.
        longest: tokens of the longest training example, so that evaluation takes no more memory than training; None
            for no limit.
        answer_count: number of held-out examples to answer.
        answering: prompts to answer, for tasks whose answers are compared with references.
        answer_tokens: maximum number of tokens of an answer.
        reward: function that scores answers, or None.
    """

    processor: Any
    about: AdapterTask
    batch_size: int
    longest: int | None = None
    answer_count: int = 0
    answering: generations.Answering | None = None
    answer_tokens: int = 64
    reward: Any = None


class Task:
    """A task. The defaults describe training a causal language model.

    Attributes:
        name: value of `--task`, which run.json and peftcore_task.json also store.
        keys: the sets of fields that a row may have.
        shown_keys: `keys` as messages show them; None if rows are not lines of files.
        columns_example: example value of --columns, for messages.
        one_kind: whether all rows must have the same set of fields.
        model_class: name of the transformers class that loads the base.
        needed_model: kind of base that the task needs, for messages. `{}` is replaced by the base that was found. None
            if `check_config` raises the error.
        new_head: whether the base gets a new, trained head.
        has_labels: whether the outputs of the head are named by labels.
        reads_tokens: whether the base has a tokenizer.
        replaces_head: whether checkpoints have a head for other labels, which is replaced.
        has_positions: whether the base's positions limit the number of tokens.
        peft_task_type: `task_type` of PEFT's adapters for the task.
        options: options that only apply to tasks that list them.
        least_beta: the smallest --beta; None if the task has no --beta.
        least_batch: the smallest --batch-size.
        divides_batches: whether a batch can be split for gradient accumulation without changing the loss.
        learns_texts: whether the task is next-token prediction, with --pack, --teacher, --other-data and the loss
            without logits.
        divides_by_tokens: whether the loss of a step is averaged over all tokens of the accumulated batches.
        counts_tokens: whether the number of tokens of a step is known.
        fixed_ranks: whether a run can only be resumed on the same number of ranks.
        requires: (package, extra of peftcore) of the libraries that training imports.
        family: name of a family of tasks that can continue each other's adapters.
        figures: names of the metrics besides the loss.
        main_figure: metric that methods are compared by.
        writes: whether the model generates answers that can be compared with references (--eval-answers).
        step_loss: `loss` of `peftcore.Step`, to estimate the memory of a step.
        sequences: number of sequences per example in a step.
        examples_count: whether the memory of a step depends on the examples.
        needs_examples: whether the memory of a step can only be estimated from examples.
        unpredicted: reason why the memory of a step cannot be estimated, or None.
        answers_texts: whether the model answers a text (--sample).
        generates: whether `peftcore generate` supports the task.
        takes_pairs: whether the model takes a second text.
        predicts: whether `peftcore predict` supports the task.
        no_chat: reason why `peftcore chat` does not support the task, with the command to use; None if it does.
    """

    name: ClassVar[str]
    keys: ClassVar[Keys] = (
        ("messages",),
        ("conversations",),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("text",),
        ("input_ids",),
    )
    shown_keys: ClassVar[str | None] = None
    columns_example: ClassVar[str] = "prompt=question,completion=answer"
    one_kind: ClassVar[bool] = False

    model_class: ClassVar[str] = "AutoModelForCausalLM"
    needed_model: ClassVar[str | None] = "a text model, found {}. Pass another model"
    new_head: ClassVar[bool] = False
    has_labels: ClassVar[bool] = False
    reads_tokens: ClassVar[bool] = True
    replaces_head: ClassVar[bool] = False
    has_positions: ClassVar[bool] = True
    peft_task_type: ClassVar[str | None] = None

    options: ClassVar[tuple[str, ...]] = ()
    least_beta: ClassVar[float | None] = None
    least_batch: ClassVar[int] = 1
    divides_batches: ClassVar[bool] = True
    learns_texts: ClassVar[bool] = False
    divides_by_tokens: ClassVar[bool] = True
    counts_tokens: ClassVar[bool] = True
    fixed_ranks: ClassVar[bool] = False
    requires: ClassVar[tuple[tuple[str, str], ...]] = ()
    family: ClassVar[str | None] = None

    figures: ClassVar[tuple[str, ...]] = ("perplexity",)
    main_figure: ClassVar[str] = "loss"
    writes: ClassVar[bool] = False

    step_loss: ClassVar[str | None] = None
    sequences: ClassVar[int] = 1
    examples_count: ClassVar[bool] = False
    needs_examples: ClassVar[bool] = False
    unpredicted: ClassVar[str | None] = None

    answers_texts: ClassVar[bool] = True
    generates: ClassVar[bool] = True
    takes_pairs: ClassVar[bool] = False
    predicts: ClassVar[bool] = False
    no_chat: ClassVar[str | None] = None

    # Rows

    def reads_files(self, paths: Sequence[str]) -> bool:
        """Return whether the task claims these files by their kind, without reading them."""
        return False

    def recognises(self, lines: FirstLines) -> bool:
        """Return whether the task claims files that start with these lines. The last task that claims them wins."""
        return False

    def read(
        self,
        paths: Sequence[str],
        columns: Mapping[str, str] | None,
        records: Sequence[Iterable[data_files.Record]] | None = None,
    ) -> list[Iterator[Row]]:
        """Return the rows of each data set, which are read as they are iterated.

        Args:
            paths: the data sets.
            columns: {field: column of the files}.
            records: lines of each data set, if they were already read.

        Raises:
            PeftcoreError: a file is missing or of an unsupported type, or a line is invalid.
        """
        data_sets = records or data_files.records_of_each(paths, columns)
        return [(row_of(location, fields, self) for location, fields in data_set) for data_set in data_sets]

    def read_row(self, location: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return the row of a line.

        Args:
            location: file and line, for messages.
            fields: fields of the line.
            keys: the set of `keys` that the line matches.

        Raises:
            PeftcoreError: a field is invalid. The message begins with `location`.
        """
        return text_rows.row_of(location, fields, keys)

    def read_questions(self, paths: Sequence[str], columns: Mapping[str, str] | None, about: AdapterTask) -> list[Row]:
        """Return examples to answer, ignoring their labels and answers.

        Raises:
            PeftcoreError: a file is missing, empty or of an unsupported type, or a line is invalid.
        """
        rows = []
        for path, records in zip(paths, data_files.records_of_each(paths, columns), strict=True):
            path_rows = [self.read_question(location, fields, about) for location, fields in records]
            if not path_rows:
                raise PeftcoreError(f"'{path}' has no examples")
            rows += path_rows
        return rows

    def read_question(self, location: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        """Return the row of a line to answer, for a task that `predicts`."""
        raise NotImplementedError

    # The base

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        """Load the tokenizer of the base, or its processor of images or audio.

        Raises:
            PeftcoreError: it cannot be loaded.
        """
        return models.load_tokenizer(model, adapter)

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        """Raise a PeftcoreError unless the base with this config can be trained for the task."""

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Return the config fields that give the head its outputs and its loss."""
        return {}

    def uses(self, weight: str) -> bool:
        """Return whether the weight of this name affects the output."""
        return True

    def from_peft(self, info: AdapterInfo) -> AdapterTask | None:
        """Return the task record of an adapter that PEFT wrote, or None if the adapter is for another task."""
        from peftcore_cli.bases.adapter_folders import AdapterTask

        matches = self.peft_task_type is not None and info.task_type == self.peft_task_type
        return AdapterTask(self.name, 512) if matches else None

    def continues(self, other: Task, *, is_recorded: bool = True, labels: Sequence[str] = ()) -> bool:
        """Return whether training for this task can continue from another task's adapter.

        Args:
            other: the adapter's task.
            is_recorded: whether the folder records the task, which PEFT's folders do not.
            labels: labels of the adapter.
        """
        return other.name == self.name or (self.family is not None and self.family == other.family)

    def prepare(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
        """Set up the processor according to the task record, and return the record completed from the base.

        Raises:
            PeftcoreError: the record contradicts the processor or the base.
        """
        return about

    # Options and examples

    def check_options(self, run_options: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        """Raise a PeftcoreError for options of a run that contradict the task.

        Args:
            run_options: options of the run.
            data: values of `--data`.
            continues: whether the run starts from an adapter.
        """

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise a PeftcoreError if there is nothing to learn from these rows."""

    def check_examples(self, examples: Sequence[Example], subset: str, batch_size: int | None = None) -> None:
        """Raise a PeftcoreError if there is nothing to learn from these examples.

        Args:
            examples: encoded examples.
            subset: name of the examples in messages, such as "training".
            batch_size: batch size of training; None for evaluation.
        """

    def encode(
        self,
        rows: Sequence[Row],
        processor: Any,
        max_length: int,
        labels: Sequence[str] = (),
        *,
        may_be_empty: bool = False,
    ) -> Encoded:
        """Encode rows as examples.

        Args:
            rows: rows from `read_row`.
            processor: the tokenizer or processor.
            max_length: maximum number of tokens of an example.
            labels: names of the base's outputs.
            may_be_empty: whether to allow a result without a token to learn.

        Raises:
            PeftcoreError: a row has no tokens, or there is no token to learn.
        """
        return text_examples.encode(rows, processor, max_length, may_be_empty=may_be_empty)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return a padded batch of `input_ids`, `attention_mask` and `labels`, each [batch, length].

        Packed rows have `position_ids` instead of the mask.
        """
        return text_examples.collate(examples, processor.pad_token_id or 0)

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each example."""
        return [length(example) for example in examples]

    def as_texts(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return the examples as inputs of the base, for methods that initialise from data."""
        return examples

    # Training

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        """Return the trainer. `arguments` are the arguments that all trainers take."""
        from peftcore_cli.training.trainers import MeasuringTrainer

        collate = self.collator(processor)
        return MeasuringTrainer(**arguments, data_collator=collate, divides_by_tokens=self.divides_by_tokens)

    def collator(self, processor: Any) -> Any:
        """Return the function that makes a batch of examples."""
        return lambda examples: self.collate(examples, processor)

    def arguments(self, settings: Settings) -> tuple[type[TrainingArguments], dict[str, Any]]:
        """Return the class of the training arguments, and the arguments that are specific to this task."""
        from transformers import TrainingArguments

        return TrainingArguments, {}

    def examples_per_epoch(self, examples: int, settings: Settings) -> int:
        """Return the number of examples per epoch, given the number of encoded examples."""
        return examples

    @contextlib.contextmanager
    def with_loss(self, model: nn.Module, about: AdapterTask) -> Iterator[None]:
        """Make `model` return a loss inside the block, for methods that initialise from data."""
        yield

    # Measuring

    def answer_count(self, metric: str | None, count: int | None) -> int:
        """Return how many held-out examples to answer in each evaluation, given --metric and --eval-answers.

        Raises:
            PeftcoreError: models of this task write no answers.
        """
        return generations.answer_count(self, metric, count)

    def reference(self, model: nn.Module, examples: Sequence[Example], evaluation: Evaluation) -> Any:
        """Return the outputs of the model before training that `measure` compares with, or None."""
        return None

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        evaluation: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the metrics of `model` on `examples`, independent of batching and without drawing random numbers.

        Args:
            model: the model.
            examples: encoded examples.
            evaluation: settings of the evaluation.
            answers: whether to also generate answers, as for the held-out examples.
            reference: result of the method `reference`; None to compare with the base.
        """
        loss_metrics = text_examples.measure(model, examples, self, evaluation)
        if evaluation.answering is None or not answers:
            return loss_metrics
        return generations.with_answers(loss_metrics, evaluation.answering, model)

    # Memory

    def tokens_of_step(self, length: int, config: PretrainedConfig) -> int:
        """Return the number of tokens of the longest example, given the maximum length."""
        return length

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return the arguments of `peftcore.Step` that depend on the examples."""
        return {}

    # Answers

    def answer(
        self,
        model: PreTrainedModel,
        processor: Any,
        prompt: str,
        about: AdapterTask,
        *,
        chat: bool = False,
        pair: str | None = None,
        **sampling: Any,
    ) -> str:
        """Return the model's answer to a prompt.

        Args:
            model: the model.
            processor: the tokenizer.
            prompt: the text.
            about: what the adapter was trained for.
            chat: whether to format the prompt as a turn of the user.
            pair: second text, for a task that `takes_pairs`.
            sampling: arguments of `text_generation.generate_text`.
        """
        prompt_or_messages: Any = [{"role": "user", "content": prompt}] if chat else prompt
        return text_generation.generate_text(model, processor, prompt_or_messages, **sampling)

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return the answer to each row of `read_questions` as a JSON object, for tasks with `predicts`."""
        raise NotImplementedError

    def write_merged(self, folder: Path, model: PreTrainedModel, about: AdapterTask, base: str) -> None:
        """Write additional files that a merged model of this task needs."""
