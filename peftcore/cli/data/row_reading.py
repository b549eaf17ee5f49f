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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftcore.cli.data import audio_files, image_files, image_turns, judged_rows, labels, mixture, pair_rows, turns
from peftcore.cli.data.data_files import Record, alpaca_prompt, listed, records, renamed
from peftcore.cli.data.labels import text_of
from peftcore.cli.data.row import Row
from peftcore.cli.data.token_rows import tokens_of
from peftcore.cli.task_names import (
    AUDIO_TEXT,
    CLASSIFICATION,
    EMBEDDING,
    IMAGE,
    IMAGE_PREFERENCES,
    IMAGE_TEXT,
    LABELLED,
    LANGUAGE_MODEL,
    MULTI_LABEL,
    PAIRED,
    PREFERENCES,
    REGRESSION,
    ROLLOUTS,
    SEQ2SEQ,
    SPEECH,
    TAGS,
    TASKS,
    UNPAIRED,
    check_task,
)
from peftcore.errors import PeftcoreError

PAIRS = (("text", "text_pair"), ("sentence1", "sentence2"), ("premise", "hypothesis"))


def _labelled(label: str) -> tuple[tuple[str, ...], ...]:
    return (*((*pair, label) for pair in PAIRS), ("text", label))


_KEYS: dict[str, tuple[tuple[str, ...], ...]] = {
    LANGUAGE_MODEL: (
        ("messages",),
        ("conversations",),
        ("prompt", "completion"),
        ("instruction", "output"),
        ("text",),
        ("input_ids",),
    ),
    **dict.fromkeys((IMAGE_TEXT, AUDIO_TEXT), (("messages",), ("conversations",), ("prompt", "completion"))),
    EMBEDDING: pair_rows.KEYS,
    SPEECH: (("audio", "text"), ("audio", "sentence"), ("audio", "transcription")),
    SEQ2SEQ: (("source", "target"), ("prompt", "completion"), ("instruction", "output")),
    CLASSIFICATION: _labelled("label"),
    REGRESSION: _labelled("label"),
    MULTI_LABEL: (*_labelled("label"), *_labelled("labels")),
    **dict.fromkeys((*PAIRED, IMAGE_PREFERENCES), (("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
    UNPAIRED: (("prompt", "completion", "label"),),
    ROLLOUTS: (("prompt",),),
    TAGS: (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags")),
}
_SHOWN = {
    LANGUAGE_MODEL: "text, prompt/completion, messages, conversations, instruction/output or input_ids",
    MULTI_LABEL: "text/labels",
    SEQ2SEQ: "source/target",
    IMAGE_TEXT: "messages with images",
    AUDIO_TEXT: "messages with audio",
    SPEECH: "audio/text",
    EMBEDDING: "anchor/positive, anchor/positive/negative or sentence1/sentence2/score",
}
_SHOWN |= {CLASSIFICATION: "text/label", REGRESSION: "text/label"}
_SHOWN |= dict.fromkeys(PAIRED, "prompt/chosen/rejected") | {
    IMAGE_PREFERENCES: "prompt/chosen/rejected with images",
    UNPAIRED: "prompt/completion/label",
    ROLLOUTS: "prompt",
    TAGS: "tokens/tags",
}
# What `--columns` may be for a task, in messages.
_EXAMPLES = {SPEECH: "audio=file,text=transcript", EMBEDDING: "anchor=question,positive=answer", TAGS: "tokens=words"}
_EXAMPLES |= {SEQ2SEQ: "source=german,target=english", MULTI_LABEL: "text=body,labels=topics"}
_EXAMPLES |= dict.fromkeys((IMAGE_TEXT, AUDIO_TEXT), "messages=chat")
_EXAMPLES |= dict.fromkeys((CLASSIFICATION, REGRESSION), "text=review,label=stars")
_EXAMPLES |= dict.fromkeys((*PAIRED, IMAGE_PREFERENCES), "chosen=better,rejected=worse") | {ROLLOUTS: "prompt=question"}

_LOOKED_AT = 100  # first lines in which images or audio determine a task

Paths = str | os.PathLike[str] | Sequence[str]


def read_rows(path: Paths, task: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return all examples of files for a task that is known, see `read`."""
    return read(path, task, columns)[1]


def read(path: Paths, task: str | None, columns: Mapping[str, str] | None = None) -> tuple[str, list[Row]]:
    """Return the task and all examples of a file, a folder of files or a hub dataset, or of several.

    Args:
        path: file, folder, or dataset id, or a list of these, whose weights are ignored.
        task: the task, or None for the one that the files have examples for, see `guess_task`.
        columns: {our field name: the file's}. Of several data sets, those without any of these names are read as they
            are.

    Raises:
        PeftcoreError: a file is missing, empty or of another kind, or a line is wrong.
    """
    paths = [source.path for source in sources(path)]
    if task is not None:
        check_task(task)
    elif _are_images(paths):
        task = IMAGE
    if task == IMAGE:
        if columns:
            raise PeftcoreError("--columns names the fields of rows, and a folder of images has none. Leave it out")
        images = [list(image_files.labelled(each)) for each in paths]
        parts = [[Row(file, "", label=label, image=file) for file, label in folder] for folder in images]
    else:
        data_sets: Sequence[Iterable[Record]] = records_of_each(paths, columns)
        if task is None:
            data_sets = [list(each) for each in data_sets]
            task = _task_of(paths, itertools.chain.from_iterable(data_sets))
        parts = [[row_of(where, fields, task) for where, fields in data_set] for data_set in data_sets]
    rows: list[Row] = []
    for source, (each, part) in enumerate(zip(paths, parts, strict=True)):
        if not part:
            raise PeftcoreError(f"'{each}' has no examples")
        odd = next((row for row in part if row.kind != part[0].kind), None)
        if odd is not None and task in (LANGUAGE_MODEL, EMBEDDING):
            raise PeftcoreError(
                f"{odd.where}: this line has {odd.kind}, but the first line has {part[0].kind}. Split the file in two"
            )
        rows += [replace(row, source=source) for row in part] if source else part
    return task, rows


def sources(path: Paths) -> list[mixture.Source]:
    """Return the data sets of `--data`, with their weights."""
    texts = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path
    return [mixture.parsed(text) for text in texts]


def records_of_each(paths: Sequence[str], columns: Mapping[str, str] | None) -> list[Iterator[Record]]:
    """Return the records of each data set; where only some have one of the columns, only those rename them."""
    data_sets = [records(path) for path in paths]
    if not columns:
        return data_sets
    first = [list(itertools.islice(each, 1)) for each in data_sets]
    has_columns = [any(not fields.keys().isdisjoint(columns.values()) for _, fields in some) for some in first]
    whole = [itertools.chain(some, rest) for some, rest in zip(first, data_sets, strict=True)]
    return [
        (renamed(record, columns) for record in each) if has or not any(has_columns) else each
        for each, has in zip(whole, has_columns, strict=True)
    ]


def guess_task(path: Paths, columns: Mapping[str, str] | None = None) -> str:
    """Return the task that files have examples for.

    It is determined by the fields of the first line, and by images or audio in one of the first hundred. If the first
    line has a label, all labels decide: lists mean multi-label; numbers of which at least one is not whole mean
    regression; everything else is classification.
    """
    paths = [source.path for source in sources(path)]
    if _are_images(paths):
        return IMAGE
    return _task_of(paths, itertools.chain.from_iterable(records_of_each(paths, columns)))


def _are_images(paths: Sequence[str]) -> bool:
    return all(image_files.is_labelled(path) for path in paths)


def _task_of(paths: Sequence[str], lines: Iterator[Record]) -> str:
    rows = (fields for _, fields in lines)
    beginning = list(itertools.islice(rows, _LOOKED_AT))
    if not beginning:
        raise PeftcoreError(f"'{', '.join(paths)}' has no examples")
    shown = next((fields for fields in beginning if image_turns.has_images(fields)), None)
    if shown is not None and image_turns.has_audio(shown):
        return AUDIO_TEXT
    if shown is not None:
        return IMAGE_PREFERENCES if {"chosen", "rejected"} <= shown.keys() else IMAGE_TEXT
    first = beginning[0].keys()
    if any(first >= set(keys) for keys in _KEYS[TAGS]):
        return TAGS
    if {"prompt", "completion", "label"} <= first:
        return UNPAIRED
    if first.isdisjoint({"label", "labels"}):
        if pair_rows.is_pairs(first):
            return EMBEDDING
        if any(first >= set(keys) for keys in _KEYS[SPEECH]):
            return SPEECH
        if {"source", "target"} <= first:
            return SEQ2SEQ
        return PREFERENCES if {"chosen", "rejected"} <= first else LANGUAGE_MODEL
    found = [fields.get("label", fields.get("labels")) for fields in itertools.chain(beginning, rows)]
    if labels.names(found[0]) is not None:
        return MULTI_LABEL
    numbers = [labels.number(label) for label in found]
    if all(number is not None for number in numbers) and not all(float(number or 0).is_integer() for number in numbers):
        return REGRESSION
    return CLASSIFICATION


def row_of(where: str, fields: dict[str, Any], task: str) -> Row:
    """Return one example from the fields of a line.

    Raises:
        PeftcoreError: the fields are not those of `task`; the message begins with `where`.
    """
    keys = next((keys for keys in _KEYS[task] if all(fields.get(key) is not None for key in keys)), None)
    if keys is None:
        keys = next((keys for keys in _KEYS[task] if all(key in fields for key in keys)), None)
    if keys is None:
        raise PeftcoreError(
            f"{where}: {task} needs the keys {_SHOWN[task]}, found {listed(fields) or 'none'}. If they have "
            f"other names: --columns {_EXAMPLES.get(task, 'prompt=question,completion=answer')}{_of_others(task)}"
        )
    if task in PAIRED:
        if image_turns.has_images(fields):
            raise PeftcoreError(f"{where}: the row has images, which --task {task} does not read. Use --task image-dpo")
        return judged_rows.preference(where, fields)
    if task == IMAGE_PREFERENCES:
        return image_turns.preference(where, fields)
    if task in (IMAGE_TEXT, AUDIO_TEXT):
        return image_turns.row_of(where, fields, hears=task == AUDIO_TEXT)
    if task == SPEECH:
        said = text_of(where, keys[1], fields[keys[1]])
        if not said.strip():
            raise PeftcoreError(f"{where}: '{keys[1]}' is empty")
        return Row(where, said, audio=audio_files.named(where, "audio", fields["audio"]))
    if task == EMBEDDING:
        return pair_rows.row_of(where, keys, fields)
    if task == ROLLOUTS:
        return judged_rows.asked(where, fields)
    if task == UNPAIRED:
        return judged_rows.marked_answer(where, fields)
    if keys == ("messages",):
        return turns.conversation(where, turns.messages_of(where, "messages", fields["messages"]), 0, fields)
    if keys == ("conversations",):
        return turns.conversation(where, turns.of_sharegpt(where, fields["conversations"]), 0, fields)
    if keys == ("instruction", "output"):
        prompt = alpaca_prompt(text_of(where, "instruction", fields["instruction"]), fields.get("input"))
        fields, keys = {"prompt": prompt, "completion": fields["output"]}, ("prompt", "completion")
    if keys == ("prompt", "completion") and isinstance(fields["prompt"], list) and task != SEQ2SEQ:
        before, answer = (turns.messages_of(where, key, fields[key]) for key in keys)
        return turns.conversation(where, [*before, *answer], len(before), fields)
    if task == TAGS:
        words, tags = labels.tagged_words(where, (keys[0], keys[1]), *(fields[key] for key in keys))
        return Row(where, " ".join(words), label=tags, words=words)
    if keys == ("input_ids",):
        return Row(where, "", tokens=tokens_of(where, fields))
    if task in LABELLED:
        text, *pair = (text_of(where, key, fields[key]) for key in keys[:-1])
        label = labels.parsed(where, keys[-1], fields[keys[-1]], task)
        return Row(where, text, label=label, pair=pair[0] if pair else None)
    texts = [text_of(where, key, fields[key]) for key in keys]
    if not texts[-1].strip():
        raise PeftcoreError(f"{where}: '{keys[-1]}' is empty")
    return Row(where, texts[0], completion=texts[1] if len(texts) > 1 else None)


def _of_others(task: str) -> str:
    """Return a hint at the keys of other tasks, for rows whose task was guessed from their keys."""
    if task != LANGUAGE_MODEL:
        return ""
    others = ", ".join(f"{_SHOWN[each]} ({each})" for each in TASKS if each in _SHOWN and each != task)
    return f". Other tasks have the keys {others}"
