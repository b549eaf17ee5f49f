"""Read conversations: check the messages, and determine the turns to learn."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from peftcore.errors import PeftcoreError
from peftcore_cli.data import labels
from peftcore_cli.data.row import Messages, Row

_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
_ROLES |= {"tool": "tool", "observation": "tool", "function": "tool"}
_MARKS = ("weight", "train")  # keys that mark whether a turn is learned


def conversation(location: str, messages: Messages, learned_from: int, fields: dict[str, Any]) -> Row:
    """Return the row of a conversation. Assistant turns from index `learned_from` on are learned.

    Raises:
        PeftcoreError: no turn is learned, a learned turn is empty, or `tools` is not a list.
    """
    not_learned = tuple(
        i for i, message in enumerate(messages) if not _is_learned(f"{location}: messages[{i}]", message)
    )
    messages = without_marks(messages)
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant" and i >= learned_from]
    learned_turns = [i for i in turns if i not in not_learned]
    if not learned_turns:
        raise PeftcoreError(f"{location}: the conversation has no assistant turn to learn. Add one, or remove the row")
    empty_turn = next((i for i in learned_turns if not _says_something(messages[i])), None)
    if empty_turn is not None:
        raise PeftcoreError(
            f"{location}: messages[{empty_turn}] is an empty assistant turn, which would teach the model to answer "
            'nothing. Remove the turn, or exclude it from the loss: "weight": 0'
        )
    tools = _tools_of(location, fields)
    return Row(location, "", messages=messages, learned_from=learned_from, not_learned=not_learned, tools=tools)


def _tools_of(location: str, fields: Mapping[str, Any]) -> list[Any] | None:
    """Return the tools of a conversation, or None if it has none."""
    tools = fields.get("tools")
    if isinstance(tools, str):  # the library datasets stores fields that differ between rows as JSON text
        try:
            tools = json.loads(tools)
        except (ValueError, RecursionError) as error:
            problem = "the value is nested too deeply" if isinstance(error, RecursionError) else error
            raise PeftcoreError(f"{location}: 'tools' is not valid JSON: {problem}") from error
    if tools is not None and not isinstance(tools, list):
        raise PeftcoreError(f"{location}: 'tools' must be a list, found {type(tools).__name__}")
    return tools or None


def _is_learned(place: str, message: Mapping[str, Any]) -> bool:
    """Return whether a turn is learned: not if it has `"weight": 0` (OpenAI) or `"train": false`."""
    weight, train = message.get("weight", 1), message.get("train", True)
    if not isinstance(weight, (int, float)) or weight not in (0, 1):
        raise PeftcoreError(f"{place}: 'weight' must be 0 or 1, found {labels.short(weight)}")
    if not isinstance(train, bool):
        raise PeftcoreError(f"{place}: 'train' must be true or false, found {labels.short(train)}")
    return bool(weight) and train


def without_marks(messages: Messages) -> Messages:
    """Remove the keys `weight` and `train`, which chat templates do not know."""
    return [{name: value for name, value in message.items() if name not in _MARKS} for message in messages]


def _says_something(message: Mapping[str, Any]) -> bool:
    """Return whether a turn has any content besides its role."""
    return any(value.strip() if isinstance(value, str) else value for name, value in message.items() if name != "role")


def messages_of(location: str, key: str, messages: Any, *, has_images: bool = False) -> Messages:
    """Check messages and join text parts. With `has_images`, content in parts is not changed."""
    if not isinstance(messages, list) or not messages:
        kind = "an empty list" if messages == [] else type(messages).__name__
        raise PeftcoreError(f"{location}: '{key}' must be a list of messages, found {kind}")
    messages = [dict(message) if isinstance(message, dict) else message for message in messages]
    for index, message in enumerate(messages):
        place = f"{location}: {key}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PeftcoreError(f'{place} must be {{"role": ..., "content": ...}}, found {str(message)[:80]}')
        content = message.get("content")
        if isinstance(content, list):
            if not (has_images and content):
                message["content"] = _text_of_parts(place, content)
        elif not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise PeftcoreError(f"{place}: 'content' must be text, found {str(content)[:80]}")
    return list(map(_without_nulls, messages))


def _without_nulls(message: dict[str, Any]) -> dict[str, Any]:
    """Remove fields that are None, with which tables (Parquet, datasets) fill the missing fields of a message."""
    return {name: value for name, value in message.items() if value is not None}


def _text_of_parts(place: str, parts: list[Any]) -> str:
    """Join the texts of {"type": "text", "text": ...} parts.

    Raises:
        PeftcoreError: there are other parts, or none.
    """
    texts = [part.get("text") for part in parts if isinstance(part, dict) and part.get("type") == "text"]
    if not parts or len(texts) != len(parts) or not all(isinstance(text, str) for text in texts):
        raise PeftcoreError(
            f"{place} has content parts other than text. Use --task image-text for images, with a vision-language "
            "model, or remove these parts"
        )
    return "".join(map(str, texts))


def messages_of_sharegpt(location: str, turn_list: Any) -> Messages:
    """Convert a conversation in ShareGPT's format to messages, and check it. Turns that have roles are only checked.

    Raises:
        PeftcoreError: the value is not a list of turns. The message begins with `location`.
    """
    if not isinstance(turn_list, list) or not all(isinstance(turn, dict) for turn in turn_list):
        raise PeftcoreError(f"{location}: 'conversations' must be a list of turns, found {type(turn_list).__name__}")
    if all("role" in turn for turn in turn_list):
        return messages_of(location, "conversations", turn_list)
    for index, turn in enumerate(turn_list):
        if not isinstance(turn.get("from"), str) or turn["from"] not in _ROLES:
            raise PeftcoreError(
                f"{location}: 'from' of conversations[{index}] must be one of {', '.join(_ROLES)}, found "
                f"{turn.get('from')!r}"
            )
    return messages_of(location, "conversations", list(map(_message_of_sharegpt, turn_list)))


def _message_of_sharegpt(turn: dict[str, Any]) -> dict[str, Any]:
    """Convert {"from": ..., "value": ...} to {"role": ..., "content": ...}."""
    marks = {name: turn[name] for name in _MARKS if name in turn}
    return {"role": _ROLES[turn["from"]], "content": turn.get("value"), **marks}
