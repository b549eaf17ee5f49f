"""Examples of files (`data_files`) as rows; every error names the file and the line.

Language modelling: `{"text": ...}`; `{"prompt": ..., "completion": ...}`, where only the completion is learned; or a
conversation, `{"messages": [{"role": ..., "content": ...}, ...], "tools": [...]}`, where the assistant's turns are.
`prompt` and `completion` may be lists of messages, too, and `conversations` with `from` and `value` is ShareGPT's way
to write the same. Classification: `{"text": ..., "label": ...}`.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from peftcore.cli.data_files import records
from peftcore.errors import PeftcoreError, nearest

LANGUAGE_MODEL = "causal-lm"
CLASSIFICATION = "classification"
TASKS = (LANGUAGE_MODEL, CLASSIFICATION)

_KEYS = {
    LANGUAGE_MODEL: (("messages",), ("conversations",), ("prompt", "completion"), ("text",)),
    CLASSIFICATION: (("text", "label"),),
}
_SHOWN = {LANGUAGE_MODEL: "text, prompt/completion or messages", CLASSIFICATION: "text/label"}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES |= {"tool": "tool", "observation": "tool", "function": "tool"}

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example. `where` is `FILE:LINE`; `text` is the prompt where there is a completion.

    Of a conversation there are messages as chat templates take them, of which the assistant's from `learned_from` on
    are learned, and the tools that it may call.
    """

    where: str
    text: str
    completion: str | None = None
    label: str | None = None
    messages: Messages | None = None
    learned_from: int = 0
    tools: list[Any] | None = None

    @property
    def kind(self) -> str:
        """What its fields are called."""
        if self.messages is not None:
            return "messages"
        return "text" if self.completion is None else "prompt/completion"


def check_task(task: str) -> None:
    """Raise a PeftcoreError unless `task` is one of :data:`TASKS`."""
    if task not in TASKS:
        raise PeftcoreError(f"--task is one of {', '.join(TASKS)}, found '{task}'")


def read_rows(path: str | os.PathLike[str], task: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """All examples of a file, a folder of files or a dataset of the hub.

    Args:
        columns: the file's names of fields, by ours.

    Raises:
        PeftcoreError: the file is missing, empty or of another kind, or a line is wrong.
    """
    check_task(task)
    rows = [_row(where, fields, task) for where, fields in records(os.fspath(path), columns)]
    if not rows:
        raise PeftcoreError(f"'{path}' holds no example")
    odd = next((row for row in rows if row.kind != rows[0].kind), None)
    if odd is not None and task == LANGUAGE_MODEL:
        raise PeftcoreError(
            f"{odd.where}: {rows[0].kind} and {odd.kind} are mixed in one file; the first line has {rows[0].kind}. "
            "Split the file in two"
        )
    return rows


def guess_task(path: str | os.PathLike[str], columns: Mapping[str, str] | None = None) -> str:
    """The task that the first line of a file is an example of."""
    for _, fields in records(os.fspath(path), columns):
        return CLASSIFICATION if "label" in fields else LANGUAGE_MODEL
    raise PeftcoreError(f"'{path}' holds no example")


def hold_out(rows: list[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """(rest, held-out) by a random choice that depends on `seed` alone.

    Raises:
        PeftcoreError: `share` is not within (0, 1), or there are fewer than two rows.
    """
    if not 0 < share < 1:
        raise PeftcoreError(f"the share to hold out must be between 0 and 1, found {share:g}")
    if len(rows) < 2:
        raise PeftcoreError("one example cannot be split. Give another file to evaluate on: --eval-data FILE")
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    count = min(max(1, round(share * len(rows))), len(rows) - 1)
    held = set(order[:count])
    return [r for i, r in enumerate(rows) if i not in held], [r for i, r in enumerate(rows) if i in held]


def labels_of(rows: list[Row]) -> list[str]:
    """The distinct labels, numbers in numeric order, else alphabetically.

    Raises:
        PeftcoreError: there is only one.
    """
    labels = {row.label for row in rows if row.label is not None}
    if len(labels) < 2:
        raise PeftcoreError(f"{rows[0].where}: every example has the label {labels}; a classifier needs two or more")
    try:
        return sorted(labels, key=float)
    except ValueError:
        return sorted(labels)


def label_ids(rows: list[Row], labels: list[str]) -> list[int]:
    """Each row's label as its index in `labels`.

    Raises:
        PeftcoreError: a label is not among them.
    """
    index: dict[str | None, int] = {label: i for i, label in enumerate(labels)}
    for row in rows:
        if row.label not in index:
            raise PeftcoreError(
                f"{row.where}: the label '{row.label}' is unknown{nearest(row.label or '', labels)}. "
                f"The model knows: {', '.join(labels)}"
            )
    return [index[row.label] for row in rows]


def _row(where: str, fields: dict[str, Any], task: str) -> Row:
    keys = next((keys for keys in _KEYS[task] if all(fields.get(key) is not None for key in keys)), None)
    if keys is None:
        keys = next((keys for keys in _KEYS[task] if all(key in fields for key in keys)), None)
    if keys is None:
        raise PeftcoreError(
            f"{where}: {task} needs the keys {_SHOWN[task]}, found {', '.join(fields) or 'none'}. "
            "Where they have other names: --columns prompt=question,completion=answer"
        )
    if keys == ("messages",):
        return _conversation(where, _messages(where, "messages", fields["messages"]), 0, fields)
    if keys == ("conversations",):
        return _conversation(where, _of_sharegpt(where, fields["conversations"]), 0, fields)
    if keys == ("prompt", "completion") and isinstance(fields["prompt"], list):
        before, answer = (_messages(where, key, fields[key]) for key in keys)
        return _conversation(where, [*before, *answer], len(before), fields)
    for key in keys:
        value = fields[key]
        if key == "label" and isinstance(value, (int, str)):
            continue
        if not isinstance(value, str):
            raise PeftcoreError(f"{where}: '{key}' must be text, found {json.dumps(value, ensure_ascii=False)[:80]}")
    if not str(fields[keys[-1]]).strip():
        raise PeftcoreError(f"{where}: '{keys[-1]}' is empty")
    if task == CLASSIFICATION:
        return Row(where, str(fields["text"]), label=str(fields["label"]))
    if keys == ("text",):
        return Row(where, str(fields["text"]))
    return Row(where, str(fields["prompt"]), completion=str(fields["completion"]))


def _conversation(where: str, messages: Messages, learned_from: int, fields: dict[str, Any]) -> Row:
    if not any(message["role"] == "assistant" for message in messages[learned_from:]):
        raise PeftcoreError(f"{where}: no turn of the assistant, of which the model would learn")
    tools = fields.get("tools")
    if isinstance(tools, str):  # datasets keeps what differs from row to row as JSON text
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise PeftcoreError(f"{where}: 'tools' is not JSON: {error}") from error
    if tools is not None and not isinstance(tools, list):
        raise PeftcoreError(f"{where}: 'tools' must be a list, found {type(tools).__name__}")
    return Row(where, "", messages=messages, learned_from=learned_from, tools=tools or None)


def _messages(where: str, key: str, found: Any) -> Messages:
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else type(found).__name__
        raise PeftcoreError(f"{where}: '{key}' must be a list of messages, found {kind}")
    for index, message in enumerate(found):
        place = f"{where}: {key}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PeftcoreError(f'{place} must be {{"role": ..., "content": ...}}, found {str(message)[:80]}')
        content = message.get("content")
        if isinstance(content, list):
            raise PeftcoreError(f"{place} has content in parts (images or audio?), which no command reads. Give text")
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise PeftcoreError(f"{place} has no text as its content, found {str(content)[:80]}")
    # What a table of rows (Parquet, datasets) fills in where a message lacks a field.
    return [{name: value for name, value in message.items() if value is not None} for message in found]


def _of_sharegpt(where: str, found: Any) -> Messages:
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PeftcoreError(f"{where}: 'conversations' must be a list of turns, found {type(found).__name__}")
    if all("role" in each for each in found):
        return _messages(where, "conversations", found)
    for index, each in enumerate(found):
        if each.get("from") not in _ROLES:
            raise PeftcoreError(
                f"{where}: conversations[{index}] is from {each.get('from')!r}; known are {', '.join(_ROLES)}"
            )
    turns = [{"role": _ROLES[each["from"]], "content": each.get("value")} for each in found]
    return _messages(where, "conversations", turns)
