"""Examples from files (`data_files`) as rows; every error names the file and the line.

Language modelling: `{"text": ...}`; `{"prompt": ..., "completion": ...}`, of which only the completion is learned;
Alpaca's `{"instruction": ..., "input": ..., "output": ...}`, where the first two are the prompt; or a conversation,
`{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`, of which the assistant's turns are learned, except
those with `"weight": 0` or `"train": false`. `prompt` and `completion` may also be lists of messages; `conversations`
with `from` and `value` is ShareGPT's form of a conversation. Labels: `{"text": ..., "label": ...}`, where the label is
a name (classification), a number (regression) or a list of names (multi-label).
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
from peftcore_cli.data.first_lines import FirstLines
from peftcore_cli.data.row import Row
from peftcore_cli.tasks import registered

if TYPE_CHECKING:
    from peftcore_cli.tasks.task import Task

Paths = str | os.PathLike[str] | Sequence[str]


def read_rows(path: Paths, task: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return all examples of files for a task that is known, see `read`."""
    return read(path, task, columns)[1]


def read(path: Paths, task: str | None, columns: Mapping[str, str] | None = None) -> tuple[str, list[Row]]:
    """Return the task's name and all examples of a file, a folder of files or a hub dataset, or of several.

    Args:
        path: file, folder, or dataset id, or a list of these, whose weights are ignored.
        task: name of the task, or None for the one that the files have examples for, see `guess_task`.
        columns: {our field name: the file's}. Of several data sets, those without any of these names are read as they
            are.

    Raises:
        PeftcoreError: a file is missing, empty or of another kind, or a line is wrong.
    """
    paths = [source.path for source in sources(path)]
    known = None
    if task is not None:
        found = registered.find(task)
    elif (by_kind := _by_kind(paths)) is not None:
        found = by_kind
    else:
        known = [list(each) for each in records_of_each(paths, columns)]
        found = _recognised(paths, itertools.chain.from_iterable(known))
    rows: list[Row] = []
    for source, (each, part) in enumerate(zip(paths, found.read(paths, columns, known), strict=True)):
        if not part:
            raise PeftcoreError(f"'{each}' has no examples")
        odd = next((row for row in part if row.kind != part[0].kind), None)
        if odd is not None and found.one_kind:
            raise PeftcoreError(
                f"{odd.where}: this line has {odd.kind}, but the first line has {part[0].kind}. Split the file in two"
            )
        rows += [replace(row, source=source) for row in part] if source else part
    return found.name, rows


def sources(path: Paths) -> list[mixture.Source]:
    """Return the data sets of `--data`, with their weights."""
    texts = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path
    return [mixture.parsed(text) for text in texts]


def guess_task(path: Paths, columns: Mapping[str, str] | None = None) -> str:
    """Return the name of the task that files have examples for.

    It is determined by the fields of the first line, and by images or audio in one of the first hundred. If the first
    line has a label, all labels decide: lists mean multi-label; numbers of which at least one is not whole mean
    regression; everything else is classification. The tasks are asked from the last one to the first.
    """
    paths = [source.path for source in sources(path)]
    found = _by_kind(paths)
    return (found or _recognised(paths, itertools.chain.from_iterable(records_of_each(paths, columns)))).name


def _by_kind(paths: Sequence[str]) -> Task | None:
    """Return the task that reads files of this kind, such as folders of images."""
    return next((task for task in reversed(registered.tasks()) if task.reads_files(paths)), None)


def _recognised(paths: Sequence[str], records: Iterator[Record]) -> Task:
    lines = FirstLines(paths, (fields for _, fields in records))
    return next(task for task in reversed(registered.tasks()) if task.recognises(lines))


def row_of(where: str, fields: dict[str, Any], task: Task) -> Row:
    """Return one example from the fields of a line.

    Raises:
        PeftcoreError: the fields are not those of `task`; the message begins with `where`.
    """
    keys = next((keys for keys in task.keys if all(fields.get(key) is not None for key in keys)), None)
    if keys is None:
        keys = next((keys for keys in task.keys if all(key in fields for key in keys)), None)
    if keys is None:
        raise PeftcoreError(
            f"{where}: {task.name} needs the keys {task.shown_keys}, found {listed(fields) or 'none'}. If they have "
            f"other names: --columns {task.columns_example}{_of_others(task)}"
        )
    return task.read_row(where, fields, keys)


def _of_others(task: Task) -> str:
    """Return a hint at the keys of other tasks, for rows that no task recognises."""
    first, *others = registered.tasks()
    if task.name != first.name:
        return ""
    shown = ", ".join(f"{each.shown_keys} ({each.name})" for each in others if each.shown_keys is not None)
    return f". Other tasks have the keys {shown}"
