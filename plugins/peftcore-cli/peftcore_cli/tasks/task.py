"""What a task is: how its rows are read, what they become, what is trained on them, measured and answered.

A task is a subclass of `Task` in a module of its own, and is found by its name, see `registered`. The defaults are
those of a causal language model; an attribute or a method is overridden where the task differs.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
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
    """How examples are measured, in a run or by `peftcore eval`.

    Attributes:
        processor: the tokenizer or processor.
        about: what the adapter is trained for.
        batch_size: examples per batch.
        longest: tokens of the longest training example, so that measuring takes no more memory than training; None for
            no limit.
        answered: number of held-out examples that are answered.
        answering: their prompts, for tasks whose answers are compared with what is wanted.
        answer_tokens: tokens of an answer at most.
        reward: function that judges answers, or None.
    """

    processor: Any
    about: AdapterTask
    batch_size: int
    longest: int | None = None
    answered: int = 0
    answering: generations.Answering | None = None
    answer_tokens: int = 64
    reward: Any = None


class Task:
    """What is trained: a causal language model, unless a subclass says otherwise.

    Attributes:
        name: as `--task` takes it, and as run.json and peftcore_task.json store it.
        keys: the names of a row's fields, several ways.
        shown_keys: these in messages; None if rows are not lines of files.
        columns_example: value of --columns in messages.
        one_kind: whether all rows must have the same names.
        streams: whether --streaming applies.
        model_class: name of transformers' class of the base.
        needed_model: which base it needs; `{}` is replaced by the one found. None if `check_config` says it.
        new_head: whether the base gets a new head, which is trained.
        has_labels: whether the outputs of the head have names, those of the labels.
        reads_tokens: whether the base has a tokenizer.
        replaces_head: whether checkpoints come with the head of other labels, which is replaced.
        has_positions: whether the tokens of an example take the base's positions.
        peft_task_type: `task_type` of PEFT's adapters for it.
        options: options of a run for this task and for others that name them, but for no other.
        least_beta: the smallest --beta; None without this option.
        least_batch: the smallest --batch-size.
        divides_batches: whether gradient accumulation leaves the loss as it is.
        learns_texts: whether texts are learned by the next token: --pack, --teacher, --other-data and the loss without
            logits apply.
        divides_by_tokens: whether the model can divide its loss by the number of tokens of a whole step.
        counts_tokens: whether the tokens of a step are known.
        fixed_ranks: whether a run resumes on the same number of ranks only.
        requires: (package, extra of peftcore) of what training imports.
        family: tasks of one family continue the adapters of each other.
        figures: names of what is measured, besides the loss.
        main_figure: the figure that methods are compared by.
        writes: whether answers are compared with what is wanted: --eval-answers.
        step_loss: `loss` of `peftcore.Step`, by which a step's memory is estimated.
        sequences: sequences of a step for each example.
        examples_count: whether a step's memory depends on the examples.
        needs_examples: whether it cannot be estimated without them.
        unpredicted: why the memory of a step cannot be estimated, or None.
        answers_texts: whether the model answers a text: --sample.
        generates: whether `peftcore generate` answers with it.
        takes_pairs: whether a second text may be passed to it.
        predicts: whether `peftcore predict` answers with it.
        no_chat: why `peftcore chat` does not answer with it, and the command that does; None if it does.
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
    streams: ClassVar[bool] = False

    model_class: ClassVar[str] = "AutoModelForCausalLM"
    needed_model: ClassVar[str | None] = "a model of texts, found {}. Pass another model"
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
        """Return whether these files are the task's because of their kind, whatever is in them."""
        return False

    def recognises(self, lines: FirstLines) -> bool:
        """Return whether files that begin with these lines are the task's, if no later task recognises them."""
        return False

    def read(
        self,
        paths: Sequence[str],
        columns: Mapping[str, str] | None,
        records: Sequence[Sequence[data_files.Record]] | None = None,
    ) -> list[list[Row]]:
        """Return the rows of each data set.

        Args:
            paths: the data sets.
            columns: {our field name: the files'}.
            records: the lines of each, if they have been read already.

        Raises:
            PeftcoreError: a file is missing or of another kind, or a line is wrong.
        """
        data_sets = records or data_files.records_of_each(paths, columns)
        return [[row_of(where, fields, self) for where, fields in data_set] for data_set in data_sets]

    def read_row(self, where: str, fields: dict[str, Any], keys: tuple[str, ...]) -> Row:
        """Return a line as a row.

        Args:
            where: file and line, for messages.
            fields: of the line.
            keys: the names in `keys` that the line has.

        Raises:
            PeftcoreError: a field is wrong; the message begins with `where`.
        """
        return text_rows.row_of(where, fields, keys)

    def read_questions(self, paths: Sequence[str], columns: Mapping[str, str] | None, about: AdapterTask) -> list[Row]:
        """Return examples to answer: labels and answers that are there are not read.

        Raises:
            PeftcoreError: a file is missing, empty or of another kind, or a line is wrong.
        """
        rows = []
        for path, records in zip(paths, data_files.records_of_each(paths, columns), strict=True):
            found = [self.read_question(where, fields, about) for where, fields in records]
            if not found:
                raise PeftcoreError(f"'{path}' has no examples")
            rows += found
        return rows

    def read_question(self, where: str, fields: dict[str, Any], about: AdapterTask) -> Row:
        """Return a line to answer as a row, for a task that `predicts`."""
        raise NotImplementedError

    # The base

    def load_processor(self, model: str, adapter: Path | None = None) -> Any:
        """Return what prepares the base's inputs: the tokenizer, or a processor of images or audio.

        Raises:
            PeftcoreError: it cannot be loaded.
        """
        return models.load_tokenizer(model, adapter)

    def check_config(self, model: str, config: PretrainedConfig) -> None:
        """Raise a PeftcoreError unless the base with this config can be trained for the task."""

    def head(self, labels: tuple[str, ...]) -> dict[str, Any]:
        """Return the config fields of the head, for the model to have its outputs and its loss."""
        return {}

    def uses(self, weight: str) -> bool:
        """Return whether a weight of the base, by its name, has an effect."""
        return True

    def of_peft(self, info: AdapterInfo) -> AdapterTask | None:
        """Return the record of an adapter that PEFT wrote, if it is for this task."""
        from peftcore_cli.bases.adapter_folders import AdapterTask

        is_own = self.peft_task_type is not None and info.task_type == self.peft_task_type
        return AdapterTask(self.name, 512) if is_own else None

    def continues(self, other: Task, *, is_recorded: bool = True, labels: Sequence[str] = ()) -> bool:
        """Return whether the adapter of another task can be trained further for this one.

        Args:
            other: the adapter's task.
            is_recorded: whether its folder says the task; PEFT's do not.
            labels: the adapter's.
        """
        return other.name == self.name or (self.family is not None and self.family == other.family)

    def prepared(self, processor: Any, about: AdapterTask, base: str) -> AdapterTask:
        """Return the record completed by what the base says, after the processor is set up as the record says.

        Raises:
            PeftcoreError: they contradict each other.
        """
        return about

    # Options and examples

    def check_options(self, given: RunOptions, data: Sequence[str], *, continues: bool) -> None:
        """Raise a PeftcoreError for options of a run that contradict the task.

        Args:
            given: the options.
            data: values of `--data`.
            continues: whether the run starts from an adapter.
        """

    def check_rows(self, rows: Sequence[Row]) -> None:
        """Raise a PeftcoreError if nothing can be learned of these rows."""

    def check_examples(self, examples: Sequence[Example], what: str, batch_size: int | None = None) -> None:
        """Raise a PeftcoreError if nothing can be learned of these examples.

        Args:
            examples: encoded.
            what: which they are, in the message.
            batch_size: of training; None for examples that are measured.
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
        """Return rows as examples.

        Args:
            rows: as `read_row` returned them.
            processor: the tokenizer or processor.
            max_length: tokens of an example at most.
            labels: names of the base's outputs.
            may_be_empty: whether there may be no token to learn.

        Raises:
            PeftcoreError: a row has no tokens, or there is no token to learn.
        """
        return text_examples.encode(rows, processor, max_length, may_be_empty=may_be_empty)

    def collate(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return a padded batch: `input_ids`, `attention_mask` and `labels`, [batch, length] each.

        Packed rows have `position_ids` in place of the mask.
        """
        return text_examples.collate(examples, processor.pad_token_id or 0)

    def lengths(self, examples: Sequence[Example]) -> list[int]:
        """Return the number of tokens of each example."""
        return [length(each) for each in examples]

    def as_texts(self, examples: Sequence[Example]) -> Sequence[Example]:
        """Return examples that the base itself takes, for methods that initialise from data."""
        return examples

    # Training

    def trainer(
        self, arguments: dict[str, Any], settings: Settings, processor: Any, about: AdapterTask, teacher: Any = None
    ) -> Measuring:
        """Return the trainer; `arguments` are those of all trainers."""
        from peftcore_cli.training.trainers import MeasuringTrainer

        collate = self.collator(processor)
        return MeasuringTrainer(**arguments, data_collator=collate, divides_by_tokens=self.divides_by_tokens)

    def collator(self, processor: Any) -> Any:
        """Return the function that makes a batch of examples."""
        return lambda examples: self.collate(examples, processor)

    def arguments(self, settings: Settings) -> tuple[type[TrainingArguments], dict[str, Any]]:
        """Return the class of Trainer's arguments, and arguments that only the task has."""
        from transformers import TrainingArguments

        return TrainingArguments, {}

    def drawn(self, examples: int, settings: Settings) -> int:
        """Return how many examples an epoch has, of this many rows."""
        return examples

    @contextlib.contextmanager
    def with_loss(self, model: nn.Module, about: AdapterTask) -> Iterator[None]:
        """Make `model` return the loss of batches inside the block, for methods that initialise from data."""
        yield

    # Measuring

    def answered(self, metric: str | None, given: int | None) -> int:
        """Return how many held-out examples are answered in each evaluation, given --metric and --eval-answers.

        Raises:
            PeftcoreError: the model of this task writes no answers.
        """
        return generations.count(self, metric, given)

    def reference(self, model: nn.Module, examples: Sequence[Example], how: Evaluation) -> Any:
        """Return what the model before training says, if measuring compares with it; else None."""
        return None

    def measure(
        self,
        model: nn.Module,
        examples: Sequence[Example],
        how: Evaluation,
        *,
        answers: bool = True,
        reference: Any = None,
    ) -> Metrics:
        """Return the metrics of `model` on `examples`, independent of batching; no random numbers are drawn.

        Args:
            model: the model.
            examples: encoded.
            how: how they are measured.
            answers: whether they are the held-out examples, which are answered.
            reference: of `reference`; None to compare with the base.
        """
        found = text_examples.measure(model, examples, self, how)
        if how.answering is None or not answers:
            return found
        return generations.with_answers(found, how.answering, model)

    # Memory

    def tokens_of_step(self, length: int, config: PretrainedConfig) -> int:
        """Return the tokens of a row whose longest has `length`."""
        return length

    def step_of(self, examples: Sequence[Example], processor: Any) -> dict[str, Any]:
        """Return the arguments of `peftcore.Step` that encoded examples determine."""
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
            about: what the adapter is trained for.
            chat: whether the prompt is a user's turn.
            pair: second text, for a task that `takes_pairs`.
            sampling: arguments of `text_generation.generate_text`.
        """
        given: Any = [{"role": "user", "content": prompt}] if chat else prompt
        return text_generation.generate_text(model, processor, given, **sampling)

    def predict(
        self, model: PreTrainedModel, rows: Sequence[Row], processor: Any, about: AdapterTask, *, answer_tokens: int
    ) -> list[dict[str, Any]]:
        """Return the answer to each row of `read_questions`, as fields of JSON, for a task that `predicts`."""
        raise NotImplementedError

    def write_merged(self, folder: Path, model: PreTrainedModel, about: AdapterTask, base: str) -> None:
        """Write the files that a merged model of this task needs besides its own."""
