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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from peftcore.cli.data import audio_files, image_files, image_turns, judged_rows, labels, mixture, pair_rows, turns
from peftcore.cli.data.data_files import alpaca_prompt, listed, records
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


Paths = str | os.PathLike[str] | Sequence[str]


def read_rows(path: Paths, task: str, columns: Mapping[str, str] | None = None) -> list[Row]:
    """Return all examples of a file, a folder of files or a hub dataset, or of several.

    Args:
        path: file, folder, or dataset id, or a list of these, whose weights are ignored.
        task: the task.
        columns: {our field name: the file's}. Of several data sets, those without any of these names are read as they
            are.

    Raises:
        PeftcoreError: a file is missing, empty or of another kind, or a line is wrong.
    """
    check_task(task)
    if task == IMAGE and columns:
        raise PeftcoreError("--columns names the fields of rows, and a folder of images has none. Leave it out")
    rows: list[Row] = []
    for source, (each, names) in enumerate(_sources(path, columns)):
        if task == IMAGE:
            found = [Row(file, "", label=label, image=file) for file, label in image_files.labelled(each)]
        else:
            found = [row_of(where, fields, task) for where, fields in records(each, names)]
        if not found:
            raise PeftcoreError(f"'{each}' has no examples")
        odd = next((row for row in found if row.kind != found[0].kind), None)
        if odd is not None and task in (LANGUAGE_MODEL, EMBEDDING):
            raise PeftcoreError(
                f"{odd.where}: this line has {odd.kind}, but the first line has {found[0].kind}. Split the file in two"
            )
        rows += [replace(row, source=source) for row in found] if source else found
    return rows


def sources(path: Paths) -> list[mixture.Source]:
    """Return the data sets of `--data`, with their weights."""
    texts = [os.fspath(path)] if isinstance(path, (str, os.PathLike)) else path
    return [mixture.parsed(text) for text in texts]


def _sources(path: Paths, columns: Mapping[str, str] | None) -> list[tuple[str, Mapping[str, str] | None]]:
    """Return (path, columns) of each data set: of several, only those that have one of the columns rename them."""
    paths = [source.path for source in sources(path)]
    if not columns or len(paths) == 1:
        return [(each, columns) for each in paths]
    named = {}
    for each in paths:
        _, fields = next(records(each), ("", {}))
        named[each] = not fields.keys().isdisjoint(columns.values())
    return [(each, columns if named[each] or not any(named.values()) else None) for each in paths]


def guess_task(path: Paths, columns: Mapping[str, str] | None = None) -> str:
    """Return the task that files have examples for.

    It is determined by the fields of the first line. If it has a label, all labels decide: lists mean multi-label;
    numbers of which at least one is not whole mean regression; everything else is classification.
    """
    if all(image_files.is_labelled(source.path) for source in sources(path)):
        return IMAGE
    found: list[Any] = []
    rows = itertools.chain.from_iterable(records(*each) for each in _sources(path, columns))
    seen = image_turns.first_with_images(fields for _, fields in rows)
    if seen is not None and image_turns.has_audio(seen):
        return AUDIO_TEXT
    if seen is not None:
        return IMAGE_PREFERENCES if {"chosen", "rejected"} <= seen.keys() else IMAGE_TEXT
    for _, fields in itertools.chain.from_iterable(records(*each) for each in _sources(path, columns)):
        if not found and any(fields.keys() >= set(keys) for keys in _KEYS[TAGS]):
            return TAGS
        name = next((name for name in ("label", "labels") if name in fields), None)
        if name is None and not found:
            if pair_rows.is_pairs(fields):
                return EMBEDDING
            if any(fields.keys() >= set(keys) for keys in _KEYS[SPEECH]):
                return SPEECH
            if {"source", "target"} <= fields.keys():
                return SEQ2SEQ
            return PREFERENCES if {"chosen", "rejected"} <= fields.keys() else LANGUAGE_MODEL
        if not found and {"prompt", "completion", "label"} <= fields.keys():
            return UNPAIRED
        found.append(fields.get(name or "label"))
    if not found:
        raise PeftcoreError(f"'{', '.join(source.path for source in sources(path))}' has no examples")
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
