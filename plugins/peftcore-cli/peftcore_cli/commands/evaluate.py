"""`peftcore eval`: evaluate a base model and its adapter on a file of examples."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from peftcore.errors import PeftcoreError
from peftcore_cli import options
from peftcore_cli.console import number, out, table, warn
from peftcore_cli.settings import RunOptions

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
    run_options: Annotated[RunOptions, ("metric", "eval_answers", "answer_tokens", "reward", "trust_remote_code")],
    quantize: options.Quantize = None,
    dtype: options.Dtype = "auto",
    device: options.Device = "auto",
    as_json: options.Json = False,
) -> object:
    """Evaluate a base model with and without its adapter on a file of examples.

    The base of a classifier has a randomly initialised head, so its metrics are at chance level. If the adapter records
    the seed, this is the head that training started from.
    """
    from peftcore_cli.bases import adapter_folders, base_and_adapter
    from peftcore_cli.data import row_reading
    from peftcore_cli.data.data_files import parse_columns
    from peftcore_cli.tasks import conversations, generations, metrics, positions, registered
    from peftcore_cli.training import measuring

    for source in row_reading.sources(data):
        if source.weight != 1:
            raise PeftcoreError(
                f"eval measures every example once, so --data {source.path} cannot have the weight "
                f"{source.weight:g}. Remove the weight"
            )
    task_record = adapter_folders.adapter_task(adapter, labels)
    task_record = replace(task_record, max_length=max_length or task_record.max_length)
    task = registered.find(task_record.task)
    rows = row_reading.read_rows(data, task.name, parse_columns(columns))
    task.answer_count(run_options.metric, run_options.eval_answers)  # raises for a task without answers
    is_of_answers = generations.is_user_function(run_options.metric) or (
        run_options.metric in generations.FIGURES and task.writes
    )
    if run_options.metric is not None and not is_of_answers:
        raise PeftcoreError(
            f"eval shows every metric of {task.name}, and --metric only adds metrics of answers "
            f"({', '.join(generations.FIGURES)}, FILE.py:FUNCTION), found '{run_options.metric}'. Remove --metric"
        )
    if ("reward" in task.options) != (run_options.reward is not None):
        raise PeftcoreError(
            f"--reward FILE.py:FUNCTION is required for {registered.names_with_option('reward')} and does not work "
            f"with other tasks (the task is {task.name})"
        )
    base = adapter_folders.base_of(adapter, model)
    processor = task.load_processor(base, adapter)
    conversations.set_template(processor, chat_template, task_record.chat_template)
    task_record = task.prepare(processor, task_record, base)
    examples = task.encode(rows, processor, task_record.max_length, task_record.labels).examples
    task.check_examples(examples, "evaluated")
    evaluation = measuring.evaluation_of(run_options, processor, task_record, rows, batch_size=batch_size)
    if task_record.seed is not None:
        from transformers import set_seed

        set_seed(task_record.seed % (1 << 32))  # initialises the head as in training
    loaded_model = base_and_adapter.load_base(base, task_record, adapter, quantize=quantize, dtype=dtype, device=device)
    if task.has_positions:
        positions.check(loaded_model, max(task.lengths(examples)))
    if base_and_adapter.fit_vocabulary(loaded_model, adapter):
        warn(base_and_adapter.NEW_ROWS)
    base_metrics = task.measure(loaded_model, examples, evaluation)
    base_and_adapter.load_adapter(loaded_model, adapter)
    adapter_metrics = task.measure(loaded_model, examples, evaluation)
    if as_json:
        return {
            "task": task.name,
            "examples": len(rows),
            "base": base_metrics.as_dict(),
            "adapter": adapter_metrics.as_dict(),
            "baseline": adapter_metrics.baseline
            and {"name": adapter_metrics.baseline[0], "value": adapter_metrics.baseline[1]},
            "labels": list(task_record.labels),
            "confusion": adapter_metrics.confusion,
        }
    table(metrics.rows(base_metrics, adapter_metrics), (number(len(rows), "example"), "base", "with the adapter"))
    if adapter_metrics.confusion is not None:
        out.print()
        cells = metrics.confusion_rows(adapter_metrics.confusion, task_record.labels)
        table(cells[1:], cells[0], title="with the adapter: true labels (down), predicted labels (across)")
    return None
