"""Messages of a conversation, as rows have them: checked, and with marks of which turns are learned."""

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


def conversation(where: str, messages: Messages, learned_from: int, fields: dict[str, Any]) -> Row:
    not_learned = tuple(i for i, message in enumerate(messages) if not _is_learned(f"{where}: messages[{i}]", message))
    messages = without_marks(messages)
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


def without_marks(messages: Messages) -> Messages:
    """Return the messages without the marks of what is learned, which chat templates do not know."""
    return [{name: value for name, value in message.items() if name not in _MARKS} for message in messages]


def _says_something(message: Mapping[str, Any]) -> bool:
    """Return whether a turn has anything besides its role."""
    return any(value.strip() if isinstance(value, str) else value for name, value in message.items() if name != "role")


def messages_of(where: str, key: str, found: Any, *, has_images: bool = False) -> Messages:
    """Return checked messages; content in parts becomes text, unless it may have images."""
    if not isinstance(found, list) or not found:
        kind = "an empty list" if found == [] else type(found).__name__
        raise PeftcoreError(f"{where}: '{key}' must be a list of messages, found {kind}")
    found = [dict(message) if isinstance(message, dict) else message for message in found]
    for index, message in enumerate(found):
        place = f"{where}: {key}[{index}]"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise PeftcoreError(f'{place} must be {{"role": ..., "content": ...}}, found {str(message)[:80]}')
        content = message.get("content")
        if has_images and isinstance(content, list) and content:
            continue
        if isinstance(content, list) and (text := _joined_parts(content)) is not None:
            content = message["content"] = text
        if isinstance(content, list):
            raise PeftcoreError(
                f"{place} has content in parts other than text. If these are images, use --task image-text with a "
                "model that reads them; other parts are not supported"
            )
        if not isinstance(content, str) and not (content is None and message.get("tool_calls")):
            raise PeftcoreError(f"{place} has no text content, found {str(content)[:80]}")
    # tables (Parquet, datasets) fill missing fields of a message with this
    return [{name: value for name, value in message.items() if value is not None} for message in found]


def _joined_parts(parts: list[Any]) -> str | None:
    """Return the text of parts {"type": "text", "text": ...} without anything between them; None for other parts."""
    texts = [part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in parts]
    return "".join(map(str, texts)) if texts and all(isinstance(text, str) for text in texts) else None


def of_sharegpt(where: str, found: Any) -> Messages:
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise PeftcoreError(f"{where}: 'conversations' must be a list of turns, found {type(found).__name__}")
    if all("role" in each for each in found):
        return messages_of(where, "conversations", found)
    for index, each in enumerate(found):
        if not isinstance(each.get("from"), str) or each["from"] not in _ROLES:
            raise PeftcoreError(
                f"{where}: conversations[{index}] is from {each.get('from')!r}, expected one of {', '.join(_ROLES)}"
            )
    turns = [
        {"role": _ROLES[each["from"]], "content": each.get("value"), **{n: each[n] for n in _MARKS if n in each}}
        for each in found
    ]
    return messages_of(where, "conversations", turns)
