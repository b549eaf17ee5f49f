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
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from peftcore.cli import image_files, labels, mixture
from peftcore.cli.data_files import alpaca_prompt, listed, records
from peftcore.cli.labels import Label
from peftcore.cli.token_rows import tokens_of
from peftcore.errors import PeftcoreError, nearest

LANGUAGE_MODEL = "causal-lm"
CLASSIFICATION, REGRESSION, MULTI_LABEL = LABELLED = labels.KINDS
TAGS, IMAGE = labels.TAGS, labels.IMAGE
HEADED = (*LABELLED, TAGS, IMAGE)  # with a new head on the base, whose outputs have labels
SEQ2SEQ = "seq2seq"
PREFERENCES = "dpo"
UNPAIRED = "kto"
ODDS, REWARD = "orpo", "reward"
ROLLOUTS = "grpo"
PAIRED = (PREFERENCES, ODDS, REWARD)  # rows with a chosen and a rejected answer
COMPARED = (PREFERENCES, UNPAIRED, ODDS, REWARD, ROLLOUTS)  # on judged answers, each with a module of its own
TASKS = (LANGUAGE_MODEL, SEQ2SEQ, *HEADED, *COMPARED)
NEW_HEAD = (*HEADED, REWARD)

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
    SEQ2SEQ: (("source", "target"), ("prompt", "completion"), ("instruction", "output")),
    CLASSIFICATION: _labelled("label"),
    REGRESSION: _labelled("label"),
    MULTI_LABEL: (*_labelled("label"), *_labelled("labels")),
    **dict.fromkeys(PAIRED, (("prompt", "chosen", "rejected"), ("chosen", "rejected"))),
    UNPAIRED: (("prompt", "completion", "label"),),
    ROLLOUTS: (("prompt",),),
    TAGS: (("tokens", "tags"), ("tokens", "ner_tags"), ("words", "tags")),
}
_SHOWN = {
    LANGUAGE_MODEL: "text, prompt/completion, messages, conversations, instruction/output or input_ids",
    MULTI_LABEL: "text/labels",
    SEQ2SEQ: "source/target",
}
_SHOWN |= {CLASSIFICATION: "text/label", REGRESSION: "text/label"}
_SHOWN |= dict.fromkeys(PAIRED, "prompt/chosen/rejected") | {
    UNPAIRED: "prompt/completion/label",
    ROLLOUTS: "prompt",
    TAGS: "tokens/tags",
}
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES |= {"tool": "tool", "observation": "tool", "function": "tool"}

_MARKS = ("weight", "train")  # keys that mark whether a turn is learned

Messages = list[dict[str, Any]]


@dataclass(frozen=True)
class Row:
    """One example. `where` is `FILE:LINE`; `text` is the prompt if there is a completion.

    A conversation has messages as chat templates take them, and the tools that may be called; the assistant's turns
    from `learned_from` on are learned, except the indices `not_learned`. In a preference `completion` is chosen and
    `rejected` is not; if it is a conversation, `messages` are the prompt and the two answers are one message each.
    `source` is the index of the data set. `is_good` marks an answer for KTO, with the prompt as in a preference.
    `pair` is the second text of a pair to classify. `tokens` are (ids, labels) of a row that is tokenized already.
    `words` have the tags that are the label. `image` is the path of an image.
    `columns` are fields for a function that judges answers.
    """

    where: str
    text: str
    completion: str | Messages | None = None
    rejected: str | Messages | None = None
    label: Label | None = None
    messages: Messages | None = None
    learned_from: int = 0
    not_learned: tuple[int, ...] = ()
    tools: list[Any] | None = None
    source: int = 0
    is_good: bool | None = None
    pair: str | None = None
    tokens: tuple[list[int], list[int]] | None = None
    words: tuple[str, ...] = ()
    image: str | None = None
    columns: dict[str, Any] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """Name of the example's fields."""
        if self.messages is not None:
            return "messages"
        if self.tokens is not None:
            return "input_ids"
        return "text" if self.completion is None else "prompt/completion"


def check_task(task: str) -> None:
    """Raise a PeftcoreError unless `task` is one of :data:`TASKS`."""
    if task not in TASKS:
        raise PeftcoreError(f"--task must be one of {', '.join(TASKS)}, found '{task}'")


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
        if odd is not None and task == LANGUAGE_MODEL:
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
    for _, fields in itertools.chain.from_iterable(records(*each) for each in _sources(path, columns)):
        if not found and any(fields.keys() >= set(keys) for keys in _KEYS[TAGS]):
            return TAGS
        name = next((name for name in ("label", "labels") if name in fields), None)
        if name is None and not found:
            if {"source", "target"} <= fields.keys():
                return SEQ2SEQ
            return PREFERENCES if {"chosen", "rejected"} <= fields.keys() else LANGUAGE_MODEL
        if not found and {"prompt", "completion", "label"} <= fields.keys():
            return UNPAIRED
        found.append(fields.get(name or "label"))
    if not found:
        raise PeftcoreError(f"'{path}' has no examples")
    if labels.names(found[0]) is not None:
        return MULTI_LABEL
    numbers = [labels.number(label) for label in found]
    if all(number is not None for number in numbers) and not all(float(number or 0).is_integer() for number in numbers):
        return REGRESSION
    return CLASSIFICATION


def labels_of(rows: list[Row]) -> list[str]:
    """Return the distinct label names, numbers in numeric order, otherwise alphabetically; none for regression.

    Raises:
        PeftcoreError: a classifier has only one label, or no row has any.
    """
    if isinstance(rows[0].label, float):
        return []
    found: set[str] = set()
    for row in rows:
        found.update((row.label,) if isinstance(row.label, str) else row.label if isinstance(row.label, tuple) else ())
    if len(found) < 2 and (isinstance(rows[0].label, str) or rows[0].words):
        what = "word has the tag" if rows[0].words else "example has the label"
        raise PeftcoreError(f"{rows[0].where}: every {what} {found}; a classifier needs at least two")
    if not found:
        raise PeftcoreError(f"{rows[0].where}: no example has a label")
    return sorted(found, key=int) if all(each.removeprefix("-").isdecimal() for each in found) else sorted(found)


def targets(rows: list[Row], known: list[str]) -> list[int] | list[float] | list[tuple[float, ...]]:
    """Return each row's target: the index of its label in `known`, its number, or zeros and ones for all labels.

    Raises:
        PeftcoreError: a label is not known.
    """
    index = {label: i for i, label in enumerate(known)}
    for row in rows:
        for name in row.label if isinstance(row.label, tuple) else (row.label,):
            if isinstance(name, str) and name not in index:
                raise PeftcoreError(
                    f"{row.where}: label '{name}' is unknown{nearest(name, known)}. The model knows: "
                    f"{', '.join(known)}. Correct the label, or train with examples of it"
                )
    if isinstance(rows[0].label, float):
        return [row.label for row in rows if isinstance(row.label, float)]
    if isinstance(rows[0].label, tuple):
        return [tuple(float(label in row.label) for label in known) for row in rows if isinstance(row.label, tuple)]
    return [index[row.label] for row in rows if isinstance(row.label, str)]


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
            f"other names: --columns prompt=question,completion=answer{_of_others(task)}"
        )
    if task in PAIRED:
        return _preference(where, fields)
    if task == ROLLOUTS:
        return _asked(where, fields)
    if task == UNPAIRED:
        return _marked_answer(where, fields)
    if keys == ("messages",):
        return _conversation(where, _messages(where, "messages", fields["messages"]), 0, fields)
    if keys == ("conversations",):
        return _conversation(where, _of_sharegpt(where, fields["conversations"]), 0, fields)
    if keys == ("instruction", "output"):
        prompt = alpaca_prompt(_text(where, "instruction", fields["instruction"]), fields.get("input"))
        fields, keys = {"prompt": prompt, "completion": fields["output"]}, ("prompt", "completion")
    if keys == ("prompt", "completion") and isinstance(fields["prompt"], list) and task != SEQ2SEQ:
        before, answer = (_messages(where, key, fields[key]) for key in keys)
        return _conversation(where, [*before, *answer], len(before), fields)
    if task == TAGS:
        words, tags = labels.tagged_words(where, (keys[0], keys[1]), *(fields[key] for key in keys))
        return Row(where, " ".join(words), label=tags, words=words)
    if keys == ("input_ids",):
        return Row(where, "", tokens=tokens_of(where, fields))
    if task in LABELLED:
        text, *pair = (_text(where, key, fields[key]) for key in keys[:-1])
        label = labels.parsed(where, keys[-1], fields[keys[-1]], task)
        return Row(where, text, label=label, pair=pair[0] if pair else None)
    texts = [_text(where, key, fields[key]) for key in keys]
    if not texts[-1].strip():
        raise PeftcoreError(f"{where}: '{keys[-1]}' is empty")
    return Row(where, texts[0], completion=texts[1] if len(texts) > 1 else None)


def _of_others(task: str) -> str:
    """Return a hint at the keys of other tasks, for rows whose task was guessed from their keys."""
    if task != LANGUAGE_MODEL:
        return ""
    others = ", ".join(f"{_SHOWN[each]} ({each})" for each in TASKS if each in _SHOWN and each != task)
    return f". Other tasks have the keys {others}"


def _text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise PeftcoreError(f"{where}: '{key}' must be text, found {labels.short(value)}")
    return value


def _preference(where: str, fields: dict[str, Any]) -> Row:
    row = _compared_turns(where, fields) if isinstance(fields["chosen"], list) else _compared_texts(where, fields)
    if row.completion == row.rejected:
        raise PeftcoreError(f"{where}: 'chosen' and 'rejected' are the same")
    return row


def _asked(where: str, fields: dict[str, Any]) -> Row:
    """Return a prompt to answer, with the other fields of its line."""
    columns = {name: value for name, value in fields.items() if name != "prompt"}
    if columns.get("tools"):
        raise PeftcoreError(f"{where}: tools are not supported by --task grpo. Remove 'tools'")
    if isinstance(fields["prompt"], list):
        asked = _without_marks(_messages(where, "prompt", fields["prompt"]))
        if asked[-1]["role"] == "assistant":
            raise PeftcoreError(f"{where}: 'prompt' must end with a turn to answer, found one of the assistant")
        return Row(where, "", messages=asked, columns=columns)
    return Row(where, _text(where, "prompt", fields["prompt"]), columns=columns)


def _marked_answer(where: str, fields: dict[str, Any]) -> Row:
    """Return an answer with the mark of whether it is good: true or false, also as text or 1 and 0 as in CSV files."""
    marks = {"true": True, "1": True, "false": False, "0": False}
    is_good = marks.get(str(fields["label"]).strip().lower())
    if is_good is None:
        raise PeftcoreError(f"{where}: 'label' must be true or false, found {labels.short(fields['label'])}")
    if not isinstance(fields["prompt"], list):
        prompt, answer = (_text(where, key, fields[key]) for key in ("prompt", "completion"))
        if not answer.strip():
            raise PeftcoreError(f"{where}: 'completion' is empty")
        return Row(where, prompt, completion=answer, is_good=is_good)
    asked, said = (_messages(where, key, fields[key]) for key in ("prompt", "completion"))
    if [message["role"] for message in said] != ["assistant"]:
        found = ", ".join(message["role"] for message in said)
        raise PeftcoreError(f"{where}: 'completion' must be one assistant answer, found {found}")
    whole = _conversation(where, [*asked, *said], len(asked), fields)
    said = _without_marks(said)
    return Row(where, "", said, messages=_without_marks(asked), tools=whole.tools, is_good=is_good)


def _compared_texts(where: str, fields: dict[str, Any]) -> Row:
    prompt, chosen, rejected = (_text(where, key, fields.get(key)) for key in ("prompt", "chosen", "rejected"))
    for key, answer in (("chosen", chosen), ("rejected", rejected)):
        if not answer.strip():
            raise PeftcoreError(f"{where}: '{key}' is empty")
    return Row(where, prompt, completion=chosen, rejected=rejected)


def _compared_turns(where: str, fields: dict[str, Any]) -> Row:
    answers = {key: _messages(where, key, fields[key]) for key in ("chosen", "rejected")}
    if fields.get("prompt") is not None:
        asked = _messages(where, "prompt", fields["prompt"])
    else:  # both contain the whole conversation
        pairs = zip(answers["chosen"], answers["rejected"], strict=False)
        asked = [one for one, _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs)]
        answers = {key: messages[len(asked) :] for key, messages in answers.items()}
        if not asked:
            raise PeftcoreError(f"{where}: 'chosen' and 'rejected' must begin with the same prompt")
    for key, answer in answers.items():
        if [message["role"] for message in answer] != ["assistant"]:
            found = ", ".join(message["role"] for message in answer) or "nothing"
            raise PeftcoreError(f"{where}: '{key}' must be one assistant answer to the same prompt, found {found}")
    answers = {key: _without_marks(answer) for key, answer in answers.items()}
    whole = _conversation(where, [*asked, *answers["chosen"]], len(asked), fields)
    return Row(where, "", answers["chosen"], answers["rejected"], messages=_without_marks(asked), tools=whole.tools)


def _conversation(where: str, messages: Messages, learned_from: int, fields: dict[str, Any]) -> Row:
    not_learned = tuple(i for i, message in enumerate(messages) if not _is_learned(f"{where}: messages[{i}]", message))
    messages = _without_marks(messages)
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and i >= learned_from]
    learned = [i for i in learned if i not in not_learned]
    if not learned:
        raise PeftcoreError(f"{where}: no assistant turn to learn")
    says_nothing = next((i for i in learned if not _says_something(messages[i])), None)
    if says_nothing is not None:
        raise PeftcoreError(
            f"{where}: messages[{says_nothing}] is an empty assistant turn, which would teach the model to say "
            'nothing. Remove it, or exclude it from learning: "weight": 0'
        )
    tools = fields.get("tools")
    if isinstance(tools, str):  # datasets stores fields that differ between rows as JSON text
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            what = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise PeftcoreError(f"{where}: 'tools' is not JSON: {what}") from error
    if tools is not None and not isinstance(tools, list):
        raise PeftcoreError(f"{where}: 'tools' must be a list, found {type(tools).__name__}")
    return Row(where, "", messages=messages, learned_from=learned_from, not_learned=not_learned, tools=tools or None)


def _is_learned(place: str, message: Mapping[str, Any]) -> bool:
    """Return False for a turn marked as not learned: `"weight": 0` (OpenAI), `"train": false`."""
    weight, train = message.get("weight", 1), message.get("train", True)
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise PeftcoreError(f"{place}: 'weight' must be 0 or 1, found {labels.short(weight)}")
    if not isinstance(train, bool):
        raise PeftcoreError(f"{place}: 'train' must be true or false, found {labels.short(train)}")
    return bool(weight) and train


def _without_marks(messages: Messages) -> Messages:
    """Return the messages without the marks of what is learned, which chat templates do not know."""
    return [{name: value for name, value in message.items() if name not in _MARKS} for message in messages]


def _says_something(message: Mapping[str, Any]) -> bool:
    """Return whether a turn has anything besides its role."""
    return any(value.strip() if isinstance(value, str) else value for name, value in message.items() if name != "role")


def _messages(where: str, key: str, found: Any) -> Messages:
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else type(found).__name__
        raise PeftcoreError(f"{where}: '{key}' must be a list of messages, found {kind}")
    found = [dict(message) if isinstance(message, dict) else message for message in found]
    for index, message in enumerate(found):
        place = f"{where}: {key}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PeftcoreError(f'{place} must be {{"role": ..., "content": ...}}, found {str(message)[:80]}')
        content = message.get("content")
        if isinstance(content, list) and (text := _joined_parts(content)) is not None:
            content = message["content"] = text
        if isinstance(content, list):
            raise PeftcoreError(
                f"{place} has content in parts other than text (such as images), which is not supported. Use text"
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise PeftcoreError(f"{place} has no text content, found {str(content)[:80]}")
    # tables (Parquet, datasets) fill missing fields of a message with this
    return [{name: value for name, value in message.items() if value is not None} for message in found]


def _joined_parts(parts: list[Any]) -> str | None:
    """Return the text of parts {"type": "text", "text": ...} without anything between them; None for other parts."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return "".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else None


def _of_sharegpt(where: str, found: Any) -> Messages:
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PeftcoreError(f"{where}: 'conversations' must be a list of turns, found {type(found).__name__}")
    if all("role" in each for each in found):
        return _messages(where, "conversations", found)
    for index, each in enumerate(found):
        if each.get("from") not in _ROLES:
            raise PeftcoreError(
                f"{where}: conversations[{index}] is from {each.get('from')!r}, expected one of {', '.join(_ROLES)}"
            )
    turns = [
        {"role": _ROLES[each["from"]], "content": each.get("value"), **{n: each[n] for n in _MARKS if n in each}}
        for each in found
    ]
    return _messages(where, "conversations", turns)
