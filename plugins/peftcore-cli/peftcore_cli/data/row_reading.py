"""Read files of examples (`data_files`) as rows. Every error names the file and the line.

Formats for language models: `{"text": ...}`; `{"prompt": ..., "completion": ...}`, with a loss on the completion alone;
Alpaca's `{"instruction": ..., "input": ..., "output": ...}`, with instruction and input as the prompt; and
conversations, `{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`, with a loss on assistant turns
except turns with `"weight": 0` or `"train": false`. `prompt` and `completion` may be lists of messages. ShareGPT's
`conversations`, with `from` and `value`, are also read. Format for classifiers: `{"text": ..., "label": ...}`, where
the label is a name (classification), a number (regression) or a list of names (multi-label).
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data import mixture
from peftcore_cli.data.data_files import Record, listed, records_of_each
from peftcore_cli.data.disk_list import DiskList
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import registered

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task

Paths = str | os.PathLike[str] | Sequence[str]


def read_rows(path: Paths, task: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return all examples for a given task in memory, see `read`."""
    return list(read(path, task, columns)[1])


def read(path: Paths, task: str | None, columns: Mapping[str, str] | None = None) -> tuple[str, DiskList[Row]]:
    """Return the task's name and all examples of one or more data sets, on disk.

    Args:
        path: file, folder or dataset id, or a list of these. Weights are ignored.
        task: name of the task, or None to infer it, see `guess_task`.
        columns: {field: column of the file}. Data sets with none of these columns are not renamed, if another data set
            has them.

    Raises:
        PeftcoreError: a file is missing, empty or of an unsupported type, or a line is invalid.
    """
    paths = [source.path for source in sources(path)]
    records: list[DiskList[Record]] | None = None
    row_task = _task_by_kind(paths) if task is None else registered.find(task)
    if row_task is None:
        records = [DiskList(data_set) for data_set in records_of_each(paths, columns)]
        row_task = _recognise(paths, itertools.chain.from_iterable(records))
    return row_task.name, DiskList(_checked_rows(paths, row_task, row_task.read(paths, columns, records)))


def _checked_rows(paths: Sequence[str], task: Task, data_sets: Sequence[Iterator[Row]]) -> Iterator[Row]:
    """Yield the rows of all data sets.

    Raises:
        PeftcoreError: see `read`.
    """
    for source, (path, rows) in enumerate(zip(paths, data_sets, strict=True)):
        first_kind = None
        for row in rows:
            first_kind = first_kind or row.kind
            if task.one_kind and row.kind != first_kind:
                raise PeftcoreError(
                    f"{row.location}: this line has {row.kind}, but the first line has {first_kind}. Use one format "
                    "per file"
                )
            yield replace(row, source=source) if source else row
        if first_kind is None:
            raise PeftcoreError(f"'{path}' has no examples. Add some, or remove its --data")


def sources(path: Paths) -> list[mixture.Source]:
    """Parse the data sets of `--data` and their weights."""
    texts = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path
    return [mixture.parse(text) for text in texts]


def guess_task(path: Paths, columns: Mapping[str, str] | None = None) -> str:
    """Return the name of the task that the examples are for.

    The task is inferred from the fields of the first line, and from images or audio in the first hundred lines. If the
    first line has a label, all labels are read: lists mean multi-label, numbers that are not all integers mean
    regression, and anything else means classification. If several tasks recognise the lines, the task registered last
    wins.
    """
    paths = [source.path for source in sources(path)]
    task = _task_by_kind(paths)
    if task is None:
        task = _recognise(paths, itertools.chain.from_iterable(records_of_each(paths, columns)))
    return task.name


def _task_by_kind(paths: Sequence[str]) -> Task | None:
    """Return the task that claims this kind of file, such as a folder of images, or None."""
    return next((task for task in reversed(registered.tasks()) if task.reads_files(paths)), None)


def _recognise(paths: Sequence[str], records: Iterator[Record]) -> Task:
    lines = FirstLines(paths, (fields for _, fields in records))
    return next(task for task in reversed(registered.tasks()) if task.recognises(lines))


def row_of(location: str, fields: dict[str, Any], task: Task) -> Row:
    """Return the row of a line.

    Raises:
        PeftcoreError: the fields do not fit `task`. The message begins with `location`.
    """
    keys = next((keys for keys in task.keys if all(fields.get(key) is not None for key in keys)), None)
    if keys is None:
        keys = next((keys for keys in task.keys if all(key in fields for key in keys)), None)
    if keys is None:
        raise PeftcoreError(
            f"{location}: {task.name} needs the keys {task.shown_keys}, found {listed(fields) or 'none'}. If the "
            f"columns have other names, map them: --columns {task.columns_example}{_of_others(task)}"
        )
    return task.read_row(location, fields, keys)


def _of_others(task: Task) -> str:
    """Return a hint that lists the fields of other tasks, for rows that no task recognises."""
    default, *others = registered.tasks()
    if task.name != default.name:
        return ""
    keys_by_task = [f"{other.shown_keys} ({other.name})" for other in others if other.shown_keys is not None]
    return f". Other tasks read the keys {', '.join(keys_by_task)}"
