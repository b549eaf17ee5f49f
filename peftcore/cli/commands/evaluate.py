"""`peftcore eval`: metrics of a base and its adapter on a file of examples."""

from __future__ import annotations

import functools
from typing import Annotated, Any

import typer

from peftcore.cli import options
from peftcore.cli.console import number, out, table, warn
from peftcore.cli.settings import RunOptions
from peftcore.errors import PeftcoreError

EXAMPLES = (
    "peftcore eval run -d test.jsonl",
    "peftcore eval adapter -m MODEL -d test.csv --labels negative,positive",
)


def evaluate(
    adapter: options.Adapter,
    data: options.Data,
    model: options.BaseModel = None,
    labels: options.Labels = None,
    columns: options.Columns = None,
    chat_template: options.ChatTemplate = None,
    max_length: options.MaxLength = None,
    batch_size: Annotated[int, typer.Option(min=1, metavar="N", help="Examples per batch.")] = 16,
    *,
    given: Annotated[RunOptions, ("metric", "eval_answers", "answer_tokens", "reward", "trust_remote_code")],
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
) -> None:
    """Measure a base and its adapter on a file of examples.

    A classifier's base has a randomly initialised head, the one that training started with if the adapter records it,
    so its figures show chance level.
    """
    from peftcore.cli import task_names
    from peftcore.cli.bases import adapter_folders, base_and_adapter, models
    from peftcore.cli.data import row_reading
    from peftcore.cli.data.data_files import parsed_columns

    weighted = next((each for each in row_reading.sources(data) if each.weight != 1), None)
    if weighted is not None:
        raise PeftcoreError(
            f"eval measures every example once, found the weight {weighted.weight:g} of --data {weighted.path}. "
            "Leave out the weight"
        )
    task = adapter_folders.adapter_task(adapter, labels)
    rows = row_reading.read_rows(data, task.task, parsed_columns(columns))
    from peftcore.cli.tasks import generations

    answered = generations.count(task.task, given.metric, given.eval_answers)
    is_of_answers = generations.is_own(given.metric) or (
        given.metric in generations.FIGURES and task.task in generations.WRITERS
    )
    if given.metric is not None and not is_of_answers:
        raise PeftcoreError(
            f"eval shows every metric of {task.task}; --metric adds one of answers ({', '.join(generations.FIGURES)}, "
            f"FILE.py:FUNCTION), found '{given.metric}'. Leave it out"
        )
    if (task.task == task_names.ROLLOUTS) != (given.reward is not None):
        raise PeftcoreError(
            f"--reward FILE.py:FUNCTION is what eval needs for grpo, and only for it, found {task.task}"
        )
    base = adapter_folders.base_of(adapter, model)
    tokenizer = models.load_processor(base, task.task, adapter)
    from peftcore.cli.tasks import by_task, conversations, metrics, positions
    from peftcore.cli.training import training_data

    conversations.set_template(tokenizer, chat_template, task.chat_template)
    length = max_length or task.max_length
    measure: Any = by_task.measure
    if task.task in task_names.COMPARED:
        from peftcore.cli.tasks import comparisons

        encoded = comparisons.of(task.task).encode(rows, tokenizer, length)
        measure = functools.partial(comparisons.measure, task.task, beta=task.beta, weights=task.weights)
        if given.reward is not None:
            from peftcore.cli.tasks import rollouts

            reward = rollouts.load_reward(given.reward)

            def measure(model: Any, some: Any, tokenizer: Any, _size: int) -> Any:
                return rollouts.measure(model, some, tokenizer, reward, given.answer_tokens)
    else:
        if task.task == task_names.SPEECH:
            from peftcore.cli.tasks import speech, transcripts

            speech.set_language(tokenizer, task.language, models.load_generation_config(base))
            measure = functools.partial(transcripts.measure, answered=answered)
        encoded = by_task.encode(rows, task.task, tokenizer, length, task.labels)
        if task.task == task_names.EMBEDDING:
            from peftcore.cli.tasks import sentence_pairs

            sentence_pairs.check(encoded.examples, "evaluated")
            pooling = task.pooling or sentence_pairs.pooling_of(base)
            measure = functools.partial(sentence_pairs.measure, pooling=pooling)
        if task.task == task_names.TAGS:
            measure = functools.partial(by_task.measure, tag_names=task.labels)
    if answered and task.task != task_names.SPEECH:
        answering = generations.Answering(
            rows,
            task.task,
            tokenizer,
            given.metric,
            count=answered,
            max_length=length,
            max_new_tokens=given.answer_tokens,
        )
        measure = functools.partial(generations.measure, answering)
    if task.seed is not None:
        from transformers import set_seed

        set_seed(task.seed % (1 << 32))  # initialises the head as in training
    loaded = base_and_adapter.load_base(base, task, adapter, quantize=quantize, dtype=dtype, device=device)
    if task.task not in (task_names.IMAGE, task_names.SPEECH, *task_names.MULTIMODAL):
        positions.check(loaded, max(training_data.lengths(encoded.examples, task.task)))
    if base_and_adapter.fit_vocabulary(loaded, adapter):
        warn(base_and_adapter.NEW_ROWS)
    before = measure(loaded, encoded.examples, tokenizer, batch_size)
    base_and_adapter.load_adapter(loaded, adapter)
    after = measure(loaded, encoded.examples, tokenizer, batch_size)
    table(metrics.rows(before, after), (number(len(rows), "example"), "base", "with the adapter"))
    if after.confusion is not None:
        out.print()
        cells = metrics.confusion_rows(after.confusion, task.labels)
        table(cells[1:], cells[0], title="with the adapter: labels (down), answers (across)")
